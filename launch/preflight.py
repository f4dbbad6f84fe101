"""Runs on each host before every start: removes what an earlier run left, and checks the machine.

    python -m launch.preflight --folder DIR --chips 4 --hosts 4 --slices 1 --disk-gb 20 --mount DIR

Exit code 0 if the run can start; otherwise one line for each thing that is wrong.
"""
import argparse
import contextlib
import os
from pathlib import Path
import shutil
import signal
import sys
import tempfile
import time
from typing import NamedTuple

from launch import host

LOCK = Path("/tmp/libtpu_lockfile")  # libtpu makes it, and does not remove it when it is killed
OLDEST_PYTHON = (3, 11)


class Facts(NamedTuple):
  """What one host is like. environment: its MEGASCALE_ and TPU_ variables, and those of its metadata.

  worker: its number among the `hosts` of its slice; None for what the metadata does not have.
  bucket: what is wrong with the mounted bucket, if anything is.
  """
  chips: int
  worker: int | None
  hosts: int | None
  environment: dict[str, str]
  free_gb: float
  python: tuple[int, int]
  bucket: str | None


def gather(mount: Path, devices: Path = Path("/dev")) -> Facts:
  """The facts of this host."""
  environment = {name: value for name, value in os.environ.items() if name.startswith(("MEGASCALE_", "TPU_"))}
  for line in (host.metadata("tpu-env") or "").splitlines():  # lines such as MEGASCALE_NUM_SLICES: '2'
    name, colon, value = line.partition(":")
    if colon and name.startswith(("MEGASCALE_", "TPU_")):
      environment.setdefault(name.strip(), value.strip().strip("'"))
  endpoints = host.metadata("worker-network-endpoints")
  chips = len(list(devices.glob("accel[0-9]*"))) or len(list(devices.glob("vfio/[0-9]*")))
  return Facts(chips, host.worker_number(), len(endpoints.split(",")) if endpoints else None, environment,
               shutil.disk_usage(Path.home()).free / 1e9, sys.version_info[:2], wrong_with_bucket(mount))


def wrong_with_bucket(mount: Path) -> str | None:
  """Tries what a checkpoint needs in the end: its folder is renamed. None if that works."""
  if not os.path.ismount(mount):  # a host that was started anew has a plain folder there
    return "the bucket is not mounted"
  try:
    with tempfile.TemporaryDirectory(prefix=".preflight-", dir=mount, ignore_cleanup_errors=True) as scratch:
      folder = Path(scratch, "before")
      (folder / "subfolder").mkdir(parents=True)
      (folder / "subfolder" / "file").write_text("a file\n")
      folder.rename(folder.with_name("after"))
  except OSError as error:
    return (f"a folder in the bucket cannot be written and renamed ({error.strerror}), so that no checkpoint "
            "would be saved: mount it as launch/setup.sh does, with the right to write")
  return None


def problems(facts: Facts, chips: int, hosts: int, slices: int, disk_gb: float) -> list[str]:
  """What keeps a run from starting, a line each. chips: on each host; hosts: in each slice."""
  found = []
  if facts.chips != chips:
    found.append(f"{facts.chips} chips are there, {chips} are expected")
  if hosts > 1 and None in (facts.worker, facts.hosts):
    found.append("the metadata server does not say how many hosts there are and which one this is")
  elif facts.hosts not in (None, hosts):
    found.append(f"the slice has {facts.hosts} hosts, {hosts} are expected")
  # Machines that replace others sometimes keep a number that makes start-up wait for ever.
  told = facts.environment.get("MEGASCALE_NUM_SLICES", "1")
  if told != str(slices):
    found.append(f"MEGASCALE_NUM_SLICES is {told}, {slices} are expected")
  names = facts.environment.get("TPU_WORKER_HOSTNAMES")
  if names and len(names.split(",")) != hosts:
    found.append(f"TPU_WORKER_HOSTNAMES names {len(names.split(','))} hosts, {hosts} are expected")
  if facts.free_gb < disk_gb:
    found.append(f"{facts.free_gb:.0f} GB of disk are free, {disk_gb:g} are needed")
  if facts.python < OLDEST_PYTHON:
    found.append(f"Python {'.'.join(map(str, facts.python))} is too old, 3.11 is needed")
  if facts.bucket:
    found.append(facts.bucket)
  return found


def free_the_chips(folder: Path, lock: Path = LOCK, processes: Path = Path("/proc")) -> str | None:
  """Ends our own earlier run and removes libtpu's lock; what is wrong if somebody else holds it."""
  host.stop(folder, grace=30.0)
  if not lock.exists():
    return None
  for holder in _holders(lock, processes):
    if _is_ours(folder, holder):
      with contextlib.suppress(ProcessLookupError):
        os.kill(holder, signal.SIGKILL)
      for _ in range(200):
        if holder not in _holders(lock, processes):
          break
        time.sleep(0.05)
    else:
      words = (processes / str(holder) / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
      return f"process {holder} uses the chips, and is not of this run: {words.strip()[:100]}"
  try:
    lock.unlink(missing_ok=True)
  except PermissionError:  # in /tmp only its owner may; nor can one see what other users' processes hold
    return (f"{lock} is of another user (uid {lock.stat().st_uid}): end that user's work on the chips, then "
            f"`sudo rm {lock}`")
  return None


def _holders(lock: Path, processes: Path) -> list[int]:
  """Processes that have the file open, as far as this user may see."""
  found = []
  for process in processes.glob("[0-9]*"):
    with contextlib.suppress(OSError):
      if any(os.path.realpath(link) == str(lock.resolve()) for link in (process / "fd").iterdir()):
        found.append(int(process.name))
  return found


def _is_ours(folder: Path, pid: int) -> bool:
  """Whether a process belongs to the command that was started last: all of that are in one session."""
  try:
    return os.getsid(pid) == host.pids(folder)[1]
  except (ProcessLookupError, FileNotFoundError):
    return False


def main(argv: list[str]) -> int:
  """Reads the arguments, cleans and checks; the exit code."""
  parser = argparse.ArgumentParser(prog="python -m launch.preflight", description=__doc__.splitlines()[0])
  parser.add_argument("--folder", type=Path, required=True)
  for name, kind in (("chips", int), ("hosts", int), ("slices", int), ("disk-gb", float),
                     ("mount", Path)):
    parser.add_argument(f"--{name}", type=kind, required=True)
  args = parser.parse_args(argv)
  held = free_the_chips(args.folder.absolute())
  facts = gather(args.mount)
  found = ([held] if held else []) + problems(facts, args.chips, args.hosts, args.slices, args.disk_gb)
  name = f"worker {facts.worker or 0}"
  for line in found:
    print(f"ERROR: {name}: {line}", file=sys.stderr)
  variables = " ".join(f"{key}={value}" for key, value in sorted(facts.environment.items()))
  print(f"{name}: {facts.chips} chips, {facts.free_gb:.0f} GB free, {variables}")
  return 1 if found else 0


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
