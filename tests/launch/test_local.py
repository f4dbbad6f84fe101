"""The local backend: real processes, and SIGTERMs as a preemption sends them."""
import os
from pathlib import Path
import signal
import subprocess
import sys
import time

ROOT = Path(__file__).resolve().parents[2]

# Two starts are preempted, the third comes to the end.
TRAIN = """
import os, pathlib, signal, sys, time
words = sys.argv
i = words[words.index("--process-id") + 1]
workdir = pathlib.Path(words[words.index("--workdir") + 1])
turns = workdir / f"turns-{i}"
turn = len(turns.read_text()) if turns.exists() else 0
turns.write_text("x" * (turn + 1))
assert os.environ["WHO"] == "7"  # numbers are written as text
def save(*_):
  step = workdir / "checkpoints" / str(10 * (turn + 1))
  step.mkdir(parents=True, exist_ok=True)
  (step / "COMMITTED.json").touch()
  sys.exit(42)
signal.signal(signal.SIGTERM, save)
if turn < 2:
  partial = workdir / f"partial-{turn}-{i}"
  partial.write_text(str(os.getpid()))
  partial.rename(workdir / f"ready-{turn}-{i}")
  time.sleep(60)
"""


def test_a_run_that_is_preempted_twice_ends_complete(tmp_path):
  (tmp_path / "train.py").write_text(TRAIN)
  (tmp_path / "launch_here.py").write_text(
      "from configs import launch\n\n"
      "def get_config():\n  config = launch.get_config()\n  config.name = 'here'\n"
      f"  config.command = '{sys.executable} -S {tmp_path / 'train.py'} --workdir {tmp_path}'\n"
      "  config.environment.WHO = 7\n  config.backoff = 0.01\n  return config\n")
  process = subprocess.Popen([sys.executable, "-m", "launch", "up", "--backend", "local",
                              "--config", str(tmp_path / "launch_here.py")],
                             cwd=ROOT, stderr=subprocess.PIPE, text=True)
  try:
    for turn in (0, 1):
      ready = [tmp_path / f"ready-{turn}-{i}" for i in (0, 1)]
      end = time.monotonic() + 60
      while not all(path.exists() for path in ready):
        assert time.monotonic() < end, "the processes did not start"
        time.sleep(0.01)
      for path in ready:
        os.kill(int(path.read_text()), signal.SIGTERM)
    _, events = process.communicate(timeout=60)
  finally:
    process.kill()
  assert process.returncode == 0, events
  assert (tmp_path / "turns-0").read_text() == (tmp_path / "turns-1").read_text() == "xxx"
  assert "restarting 1/10000 from step 10" in events and "restarting 2/10000 from step 20" in events
