"""Nonsense in a launch config is one line that names the key, before anything is asked of a cloud."""
from pathlib import Path
import re
import shlex

import pytest

from configs import launch as defaults, launch_v5e
from launch import __main__ as command_line
from launch.accelerators import accelerator, topology
from launch.config import check, in_bucket
from lskd_jax.config_files import known_keys

GIVEN = ["--config.project=p", "--config.bucket=gs://bucket"]


@pytest.mark.parametrize("verb,words,said", [
    ("up", ["--config.name=My_Run"], "name='My_Run': take up to 40 of a-z, 0-9 and -, starting with a "
     "letter"),
    ("up", ["--config.project="], "project='': say which, in the config or with --config.project=…"),
    ("up", ["--config.bucket=bucket"], "bucket='bucket': write gs://NAME, without a folder"),
    ("up", ["--config.command="], "command='': what should the hosts run? `lskd train --config … "
     "--workdir …`"),
    ("up", ["--config.command=lskd train"], "command: has no --workdir; the checkpoints there are what a "
     "restart continues from"),
    ("up", ["--config.command='lskd train \"a'"], "command: No closing quotation"),
    ("up", ["--config.command=lskd train --workdir out"], "command: --workdir out must lie below "
     "mount='/mnt/lskd', where it outlives the machines"),
    ("up", ["--config.command=lskd train --workdir /mnt/lskd/a"], "command: 4 hosts run it, so it needs "
     "--multi-host"),
    ("up", ["--config.accelerator_type=v9-8"], "accelerator_type='v9-8' is not known; write v2, v3, v4, "
     "v5litepod, v5p, v6e, tpu7x and a number, such as v5litepod-16"),
    ("up", ["--config.accelerator_type=v5p-7"], "accelerator_type='v5p-7': there is no slice of that size"),
    ("up", ["--config.accelerator_type=tpu7x-128"], "accelerator_type='tpu7x-128' has no queued resources, "
     "only Kubernetes: use `python -m launch manifest`"),
    ("up", ["--config.provisioning=cheap"], "provisioning='cheap': one of spot, on-demand, reserved, "
     "flex-start"),
    ("up", ["--config.provisioning=flex-start", "--config.budget_hours=200"], "budget_hours=200: flex-start "
     "lends machines for at most 168 hours"),
    ("up", ["--config.budget_hours=0"], "budget_hours=0.0: must be above 0"),
    ("up", ["--config.budget_hours=None"], "budget_hours=None: has to have a value"),
    ("up --backend local", ["--config.local.processes=0"], "local.processes=0: must be a whole number above "
     "0"),
    ("up --backend local", ["--config.local.devices=0"], "local.devices=0: must be a whole number above 0"),
    ("up --workdir out", [], "--workdir is for --backend local; on machines it is part of the config's "
     "command"),
    ("up", ["--config.max_failures=-1"], "max_failures=-1: must not be negative"),
    ("up", ["--config.zoone=a"], "config key 'zoone' is unknown; did you mean 'zone'?"),
    ("manifest --out out.yaml", [], "image='': Kubernetes needs a container image in which the command "
     "can run"),
    ("manifest --out out.yaml", ["--config.accelerator_type=v3-8"],
     "accelerator_type='v3-8' is not offered in Kubernetes"),
    ("manifest --out out.yaml", ["--config.provisioning=reserved"], "provisioning='reserved': one of spot, "
     "on-demand"),
    ("manifest --out out.yaml", ["--config.provisioning=cheap"], "provisioning='cheap': one of spot, "
     "on-demand"),
    ("skypilot --out out.yaml", ["--config.provisioning=flex-start"], "provisioning='flex-start': one of "
     "spot, on-demand"),
    ("skypilot --out out.yaml", ["--config.nodes=2"], "nodes=2: SkyPilot asks for each slice by itself, and "
     "they would not find each other; use `python -m launch up` or `manifest`, or nodes=1"),
    ("skypilot --out out.yaml", ["--config.zone="], "zone='': say which, in the config or with "
     "--config.zone=…")])
def test_nonsense_is_refused_in_one_line(verb, words, said, capsys):
  code = command_line.main([*verb.split(), "--config", "configs/launch_v5e.py", *GIVEN, *words])
  assert (code, capsys.readouterr().err) == (1, f"launch: error: {said}\n")


def test_a_config_of_a_training_run_is_not_one_of_a_launcher(capsys):
  assert command_line.main(["up", "--config", "configs/forkme.py"]) == 1
  assert "is no launch config" in capsys.readouterr().err


def test_an_unknown_argument_is_refused(capsys):
  with pytest.raises(SystemExit) as ended:
    command_line.main(["up", "--config", "configs/launch_v5e.py", "--dryrun"])
  assert ended.value.code == 2


def test_the_example_is_a_launch_config_and_its_command_can_be_typed():
  config = launch_v5e.get_config()
  assert set(known_keys(config)) == set(known_keys(defaults.get_config()))
  example = re.search(r"    python -m launch .*?\n\n", launch_v5e.__doc__, re.DOTALL)[0]
  words = shlex.split(example.replace("\\\n", " "))
  args = command_line.read_arguments(words[3:])
  assert args.config == Path("configs/launch_v5e.py") and args.dry_run
  config.update(project="p", bucket="gs://bucket")
  check(config, "tpu-vm")


@pytest.mark.parametrize("name,chips,per_host,hosts,shape", [
    ("v5litepod-8", 8, 8, 1, "2x4"), ("v5litepod-16", 16, 4, 4, "4x4"), ("v6e-256", 256, 4, 64, "16x16"),
    ("v5p-8", 4, 4, 1, "2x2x1"), ("v5p-128", 64, 4, 16, "4x4x4"), ("v4-32", 16, 4, 4, "2x2x4"),
    ("tpu7x-128", 64, 4, 16, "4x4x4")])
def test_what_a_type_means(name, chips, per_host, hosts, shape):
  kind = accelerator(name)
  assert (kind.chips, kind.chips_per_host, kind.hosts) == (chips, per_host, hosts)
  assert topology(kind) == shape


def test_a_path_below_the_mount_is_a_url_of_the_bucket():
  config = launch_v5e.get_config()
  config.bucket = "gs://bucket"
  assert in_bucket(config, "/mnt/lskd/runs/a") == "gs://bucket/runs/a"
  assert in_bucket(config) == "gs://bucket/launch/lskd-v5e"
