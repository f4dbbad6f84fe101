"""Reads and checks a launch config: a mistake is one line, before anything is asked of a cloud."""
from collections.abc import Iterable
from pathlib import Path
import re
import shlex
import sys

from ml_collections import ConfigDict

from configs import launch as defaults
from data_pipeline.records import DataError
from launch.accelerators import accelerator
from lskd_jax.config_files import known_keys, load_config

PROVISIONING = ("spot", "on-demand", "reserved", "flex-start")
ELSEWHERE = ("spot", "on-demand")  # what the files for Kubernetes and SkyPilot can say
LONGEST_FLEX = 168.0  # hours: seven days, Google's limit


def read(path: Path | str, overrides: Iterable[str], backend: str) -> ConfigDict:
  """The checked config of a file, with overrides such as "zone=us-west4-a".

  backend: tpu-vm (queued resources) | local | kubernetes | skypilot; each needs other keys.

  Raises:
    DataError: names the key and the way out.
  """
  config = load_config(path, overrides)
  missing = set(known_keys(defaults.get_config())) - set(known_keys(config))
  if missing:
    raise DataError(f"{path}: is no launch config, it has no {min(missing)!r}: start from configs/launch.py")
  check(config, backend)
  return config


def check(config: ConfigDict, backend: str) -> None:
  """Raises DataError for the first value that cannot work on that backend."""
  empty = [key for key, value in config.items() if value is None]
  if empty:
    raise DataError(f"{empty[0]}=None: has to have a value")
  if not re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", config.name):
    raise DataError(f"name={config.name!r}: take up to 40 of a-z, 0-9 and -, starting with a letter")
  for key in ("max_failures", "max_preemptions", "backoff", "linger"):
    if config[key] < 0:
      raise DataError(f"{key}={config[key]}: must not be negative")
  for key in ("nodes", "budget_hours", "wait_hours", "poll", "grace_seconds"):
    if not config[key] > 0:
      raise DataError(f"{key}={config[key]}: must be above 0")
  for key, value in config.local.items():
    if not (isinstance(value, int) and value > 0):
      raise DataError(f"local.{key}={value}: must be a whole number above 0")
  for name in config.environment:
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
      raise DataError(f"environment: {name!r} cannot be the name of a variable")
  workdir = Path(work_directory(config))
  if backend == "local":
    return
  if not re.fullmatch(r"gs://[a-z0-9][-_.a-z0-9]+", config.bucket):
    raise DataError(f"bucket={config.bucket!r}: write gs://NAME, without a folder")
  if not config.mount.startswith("/") or Path(config.mount) not in workdir.parents:
    raise DataError(f"command: --workdir {workdir} must lie below mount={config.mount!r}, where it outlives "
                    "the machines")
  kind = accelerator(config.accelerator_type)
  if kind.hosts * config.nodes > 1 and words(config)[0] == "lskd" and "--multi-host" not in words(config):
    raise DataError(f"command: {kind.hosts * config.nodes} hosts run it, so it needs --multi-host")
  known = PROVISIONING if backend == "tpu-vm" else ELSEWHERE
  if config.provisioning not in known:
    raise DataError(f"provisioning={config.provisioning!r}: one of {', '.join(known)}")
  if backend == "kubernetes":
    if not kind.family.gke:
      raise DataError(f"accelerator_type={config.accelerator_type!r} is not offered in Kubernetes")
    if not config.image:
      raise DataError("image='': Kubernetes needs a container image in which the command can run")
    return
  if not kind.family.runtime:
    raise DataError(f"accelerator_type={config.accelerator_type!r} has no queued resources, only Kubernetes: "
                    "use `python -m launch manifest`")
  if backend == "skypilot" and config.nodes > 1:
    raise DataError(f"nodes={config.nodes}: SkyPilot asks for each slice by itself, and they would not find "
                    "each other; use `python -m launch up` or `manifest`, or nodes=1")
  for key in ("project", "zone"):
    if not config[key]:
      raise DataError(f"{key}='': say which, in the config or with --config.{key}=…")
  if config.provisioning == "flex-start" and config.budget_hours > LONGEST_FLEX:
    raise DataError(f"budget_hours={config.budget_hours:g}: flex-start lends machines for at most "
                    f"{LONGEST_FLEX:g} hours")


def words(config: ConfigDict) -> list[str]:
  """The command as words. DataError if it is empty or its quotes do not match."""
  try:
    found = shlex.split(config.command)
  except ValueError as error:
    raise DataError(f"command: {error}") from None
  if not found:
    raise DataError("command='': what should the hosts run? `lskd train --config … --workdir …`")
  return found


def work_directory(config: ConfigDict) -> str:
  """What follows `--workdir` in the command. DataError if nothing does."""
  found = words(config)
  for i, word in enumerate(found):
    name, equals, value = word.partition("=")
    if name == "--workdir" and (equals or found[i + 1:]):
      return value if equals else found[i + 1]
  raise DataError("command: has no --workdir; the checkpoints there are what a restart continues from")


def python_version(config: ConfigDict) -> str:
  """Of the environment on the hosts: by default that of this machine, whose packages are pinned."""
  return config.python or f"{sys.version_info[0]}.{sys.version_info[1]}"


def in_bucket(config: ConfigDict, path: str = "") -> str:
  """A path below the mount as a URL of the bucket; without one, the folder of this run's launcher."""
  if path:
    return f"{config.bucket}/{Path(path).relative_to(config.mount)}"
  return f"{config.bucket}/launch/{config.name}"
