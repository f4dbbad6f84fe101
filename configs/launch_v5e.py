"""BLIP-2's student on 16 chips of TPU v5e, on spot capacity.

    python -m launch up --dry-run --config configs/launch_v5e.py --config.project=my-project \
        --config.bucket=gs://my-bucket

Expected: the commands are printed; without `--dry-run` they are run. Nothing of this was ever run against
Google Cloud, only against a stand-in for `gcloud`: docs/launch.md.
"""
from configs import launch


def get_config():
  """Four hosts with four chips each."""
  config = launch.get_config()
  config.name = "lskd-v5e"
  config.zone = "us-west4-a"
  config.accelerator_type = "v5litepod-16"
  config.command = ("lskd train --multi-host --config configs/blip2.py "
                    "--config.init.model=/mnt/lskd/models/blip2 "
                    "--config.data.corpus=/mnt/lskd/lck/default/1.0.0 --workdir /mnt/lskd/runs/lskd-v5e")
  config.budget_hours = 48.0
  return config
