"""Defaults of `python -m launch`, with a reason beside each value that is not obvious.

A launch config starts from `get_config()` here; `configs/launch_v5e.py` is one. Any value can be changed
from the command line, as `--config.zone=us-west4-a`. docs/launch.md tells what each command does with it.
"""
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  """A run on one TPU slice; name, project, zone, accelerator_type, bucket and command must be given."""
  config = ConfigDict()
  config.name = ""              # of the queued resource, its nodes and the folder in the bucket
  config.command = ""           # every host runs it: `lskd train --multi-host … --workdir /mnt/lskd/…`
  config.state = "runs/launch"  # folder on this machine: what was done so far, transcripts, fetched logs
  config.environment = ConfigDict()  # variables of that command
  config.bucket = ""            # gs://…: code, logs, exit codes and the work directory
  config.mount = "/mnt/lskd"    # where the hosts see the bucket (Cloud Storage FUSE)

  # --- machines
  config.project = ""
  config.zone = ""
  config.accelerator_type = ""  # as gcloud names it: v5litepod-16, v4-32, v5p-128, v6e-64; tpu7x-128 on
                                # Kubernetes only
  config.runtime_version = ""   # "" = the one of the accelerator, see launch/accelerators.py
  config.nodes = 1              # slices, joined by the data centre's network
  config.provisioning = "spot"  # spot | on-demand | reserved | flex-start; the last two not for `manifest`
                                # and `skypilot`
  config.autocheckpoint = True  # SIGTERM before maintenance, where the accelerator has it (v2 to v4, v5e)
  config.wait_hours = 24.0      # how long a request may wait for machines before it is made anew
  config.source = "."           # the git checkout whose HEAD is shipped
  config.requirements = ""      # file with the hosts' packages; "" = exactly those installed here
  config.python = ""            # version for the hosts, whose images have 3.10; "" = that of this machine
  config.uv = "0.13.8"          # makes their environment, with any Python
  config.disk_gb = 20           # free space that each host must have

  # --- limits
  config.budget_hours = 24.0    # of the machines being there; then the run is stopped and they are deleted
  config.price = 0.0            # dollars per chip and hour, for `status`; 0 = not known
  config.max_failures = 10      # restarts in a row without a newer checkpoint
  config.max_preemptions = 10_000
  config.backoff = 30.0         # seconds before a restart; doubles with each failure in a row
  config.linger = 60.0          # seconds that the other hosts have to end by themselves
  config.poll = 60.0            # seconds between looks

  # --- `up --backend local`
  config.local = ConfigDict(dict(processes=2, devices=1))

  # --- `manifest` (Kubernetes)
  config.topology = ""          # "" = the usual one of the number of chips
  config.image = ""             # container image in which the command can run
  config.namespace = "default"
  config.service_account = "default"  # with access to the bucket
  config.grace_seconds = 300    # between SIGTERM and SIGKILL: a save must fit, in train.grace of the run, too
  return config
