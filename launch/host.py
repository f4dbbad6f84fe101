"""Runs on each host: keeps the command alive without a connection, and tells how it ended.

    python -m launch.host start --folder DIR --run DIR --slice I -- COMMAND …
    python -m launch.host ask --folder DIR
    python -m launch.host stop --folder DIR --grace SECONDS

`start` leaves a process behind that attends to the command. In `--folder`, on this machine's disk, are
`log` and `pids` (of the attendant and of the command). In `--run`, in the mounted bucket, are a copy of the
log, `log-SLICE-WORKER.txt`, and `exit-SLICE-WORKER.json`: when and with what code the command ended.
`ask` prints RUNS or IDLE: whether a command is attended to.
"""
import argparse
import contextlib
import fcntl
import json
import os
from pathlib import Path
import shutil
import signal
import subprocess
import sys
import time
import urllib.request

COPY_EVERY = 30.0  # seconds between copies of the log
BUCKET_AWAY = 3600.0  # seconds for which the exit code is written again if the bucket does not take it
POLL = 0.05
METADATA_PAUSES = (0.0, 1.0, 2.0, 4.0, 8.0)  # seconds before each try to ask the metadata server


def start(folder: Path, run: Path, slice_index: int, command: list[str]) -> None:
  """Starts the command, detached. The same run twice is no error: a connection may break after it."""
  folder.mkdir(parents=True, exist_ok=True)
  run.mkdir(parents=True, exist_ok=True)
  if is_running(folder):
    if (folder / "run").read_text() == str(run):
      print("runs already")
      return
    sys.exit(f"ERROR: {folder}: another run is still there; `python -m launch.host stop` ends it")
  name = f"{slice_index}-{worker_number() or 0}"  # preflight sees to it that each of several has one
  (run / f"exit-{name}.json").unlink(missing_ok=True)  # of an attempt that was taken back
  for left in ("pids", "log"):  # of an earlier start, which has its own copy of its log
    (folder / left).unlink(missing_ok=True)
  (folder / "run").write_text(str(run))
  with (folder / "attendant.log").open("ab") as log:
    subprocess.Popen([sys.executable, "-m", "launch.host", "attend", "--folder", str(folder),
                      "--run", str(run), "--name", name, "--", *command],
                     stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
  for _ in range(round(10 / POLL)):
    if (folder / "pids").exists() or (run / f"exit-{name}.json").exists():
      print(f"started {name}")
      return
    time.sleep(POLL)
  sys.exit(f"ERROR: {folder}: the attendant did not start; see attendant.log there")


def attend(folder: Path, run: Path, name: str, command: list[str]) -> None:
  """Waits for the command and writes down how it ended. A SIGTERM is for the command, not for this."""
  with (folder / "lock").open("w") as lock, (folder / "log").open("ab") as log:
    child, stopped = None, []

    def pass_on(number, frame):
      stopped.append(number)
      if child:
        child.send_signal(number)
    signal.signal(signal.SIGTERM, pass_on)
    fcntl.flock(lock, fcntl.LOCK_EX)  # held for as long as the command is attended to: see is_running
    variables = {**os.environ, "PYTHONUNBUFFERED": "1",  # the command is of the same environment
                 "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"}
    try:
      child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                               start_new_session=True, env=variables)
      _write(folder / "pids", f"{os.getpid()} {child.pid}")
      if stopped:
        child.send_signal(signal.SIGTERM)
      code = _wait(child, folder / "log", run / f"log-{name}.txt")
    except OSError as error:
      print(f"{command[0]}: {error.strerror}", file=sys.stderr)
      code = 127
    _tell(run, name, code, folder / "log")


def _wait(child, log: Path, copy: Path) -> int:
  while True:
    with contextlib.suppress(subprocess.TimeoutExpired):
      return child.wait(COPY_EVERY)
    _copy(log, copy)


def _write(path: Path, text: str) -> None:
  """All of it or nothing: somebody may be reading."""
  partial = path.with_name(f".{path.name}")
  partial.write_text(text)
  os.replace(partial, path)


def _tell(run: Path, name: str, code: int, log: Path) -> None:
  """Writes the rest of the log, then the exit code; again while the bucket is away, or nobody would know."""
  text = json.dumps({"time": time.time(), "code": code, "host": name}) + "\n"
  path, end, pause = run / f"exit-{name}.json", time.monotonic() + BUCKET_AWAY, 1.0
  while True:
    _copy(log, run / f"log-{name}.txt")
    try:
      return _write(path, text)
    except OSError as error:
      if time.monotonic() > end:
        raise
      print(f"{path}: {error.strerror}; trying again in {pause:g} s", file=sys.stderr, flush=True)
    time.sleep(pause)
    pause = min(2 * pause, COPY_EVERY)


def _copy(log: Path, copy: Path) -> None:
  with contextlib.suppress(OSError):  # the bucket may be away for a while; the log here is whole
    shutil.copyfile(log, copy)


def stop(folder: Path, grace: float) -> None:
  """Ends the command of a folder if there is one: SIGTERM, after `grace` seconds SIGKILL, by its pid."""
  for number, seconds in ((signal.SIGTERM, grace), (signal.SIGKILL, 10.0)):
    if not is_running(folder):
      return
    with contextlib.suppress(ProcessLookupError, FileNotFoundError):
      os.kill(pids(folder)[1], number)
    end = time.monotonic() + seconds
    while is_running(folder) and time.monotonic() < end:
      time.sleep(POLL)
  if is_running(folder):
    sys.exit(f"ERROR: {folder}: the run does not end")


def pids(folder: Path) -> tuple[int, int]:
  """Of the attendant and of the command that was started last. FileNotFoundError before there is one."""
  attendant, command = (folder / "pids").read_text().split()
  return int(attendant), int(command)


def is_running(folder: Path) -> bool:
  """Whether a command is attended to; a lock, since a number in a file may be another process by now."""
  if not (folder / "lock").exists():
    return False
  with (folder / "lock").open() as lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      return True
  return False


def metadata(name: str) -> str | None:
  """An attribute that Google's metadata server has for this machine; None if it has no such one.

  Without an answer after several tries the process ends: who takes no answer for an attribute that is not
  there becomes worker 0, which another host is.
  """
  server = os.environ.get("GCE_METADATA_IP", "metadata.google.internal")
  request = urllib.request.Request(f"http://{server}/computeMetadata/v1/instance/attributes/{name}",
                                   headers={"Metadata-Flavor": "Google"})
  for pause in METADATA_PAUSES:
    time.sleep(pause)
    try:
      with urllib.request.urlopen(request, timeout=5) as answer:
        return answer.read().decode()
    except OSError as error:
      if getattr(error, "code", None) == 404:
        return None
      problem = error
  sys.exit(f"ERROR: the metadata server {server} does not answer: {problem}")


def worker_number() -> int | None:
  """This host's number within its slice; None if the metadata server has none for it."""
  number = metadata("agent-worker-number")
  return None if number is None else int(number)


def main(argv: list[str]) -> None:
  """Reads the arguments and does it."""
  parser = argparse.ArgumentParser(prog="python -m launch.host", description=__doc__.splitlines()[0])
  parser.add_argument("verb", choices=["start", "attend", "ask", "stop"])
  parser.add_argument("--folder", type=Path, required=True)
  parser.add_argument("--run", type=Path)
  parser.add_argument("--slice", type=int, default=0)
  parser.add_argument("--name")
  parser.add_argument("--grace", type=float, default=300.0)
  at = argv.index("--") if "--" in argv else len(argv)
  args, command = parser.parse_args(argv[:at]), argv[at + 1:]
  folder = args.folder.absolute()
  if args.verb == "start":
    start(folder, args.run, args.slice, command)
  elif args.verb == "attend":
    attend(folder, args.run, args.name, command)
  elif args.verb == "ask":
    print("RUNS" if is_running(folder) else "IDLE")
  else:
    stop(folder, args.grace)


if __name__ == "__main__":
  main(sys.argv[1:])
