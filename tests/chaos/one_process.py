"""One process of a run that faults are injected into. A script, which `runs.py` starts.

Whatever the run is about to do, it leaves a mark in `workdir/marks` first, such as `save-3-0` (phase,
step, process): a fault is then timed by what a run does, and not by the clock.
"""
import argparse
import os
from pathlib import Path
import resource
import signal
import sys
import time

from lskd_jax import errors, parallel, preemption, watchdog
from lskd_jax.train import train
from tests import tiny_runs

STEPS, SAVE_EVERY = 9, 3
LARGEST_FILE = 60_000  # bytes on the full disk: metrics still fit, a checkpoint does not


def config_for(folder: Path, held_out: bool = False):
  """A student with ITC and LM on four devices; the corpus is in `folder`.

  Runs of one, two and four processes are compared bit for bit. A sum over two devices is the same
  however processes are joined, the last bits of one over four are not. Of four is only the norm of the
  gradients, and nothing is clipped by it.
  """
  config = tiny_runs.config_for(folder)
  config.loss.itm = 0.0  # takes longest to compile, and sums over the same devices as the others
  config.optim.update(steps=STEPS, clip_norm=1e9)
  config.train.mesh.update(fsdp=2, tensor=2)
  config.train.update(save_every=SAVE_EVERY, keep=3, log_examples=True, hang_after=12.0, grace=20.0)
  if held_out:
    tiny_runs.evaluate_on_others(config, folder)
  config.eval.every = 1
  return config


def main() -> int:
  parser = argparse.ArgumentParser()
  parser.add_argument("folder", type=Path)
  parser.add_argument("workdir", type=Path)
  parser.add_argument("--stuck", type=int, nargs=2, metavar=("PROCESS", "STEP"))
  parser.add_argument("--killed-once", type=int, nargs=2, metavar=("PROCESS", "STEP"))
  parser.add_argument("--full-disk-after", type=int, metavar="STEP")
  parser.add_argument("--held-out", action="store_true", help="evaluations of two slow batches")
  parser.add_argument("--processes", type=int, default=1)
  parser.add_argument("--process-id", type=int, default=0)
  parser.add_argument("--coordinator")
  args = parser.parse_args()
  marks = args.workdir / "marks"
  marks.mkdir(parents=True, exist_ok=True)
  at = watchdog.Watchdog.at

  def at_and_mark(self, phase: str, step: int) -> None:
    at(self, phase, step)
    while phase == "data" and step == SAVE_EVERY + 1 and not (
        args.workdir / f"checkpoints/{SAVE_EVERY}/COMMITTED.json").exists():
      time.sleep(0.05)  # cases that end a run after its first save count on it, however slow the disk is
    (marks / f"{phase}-{step}-{args.process_id}").touch()
    if args.killed_once == [args.process_id, step] and phase == "data" and not (marks / "killed").exists():
      (marks / "killed").touch()
      os.kill(os.getpid(), signal.SIGKILL)
    if args.held_out and phase == "evaluate":
      time.sleep(0.5)  # longer than it takes to notice a signal
    if args.stuck == [args.process_id, step] and phase == "data":
      time.sleep(1000)
    if (args.workdir / f"checkpoints/{args.full_disk_after}/COMMITTED.json").exists():
      signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
      resource.setrlimit(resource.RLIMIT_FSIZE, (LARGEST_FILE, resource.RLIM_INFINITY))

  watchdog.Watchdog.at = at_and_mark
  try:
    run(args)
  except Exception as error:
    errors.report(error)
    return errors.exit_code(error)
  return 0


def run(args) -> None:
  """What `lskd train` does, with an evaluation that takes as long as a signal needs."""
  def evaluate(graph, state, step: int) -> dict:
    if not args.held_out:
      time.sleep(0.2)
    return {}
  stop = preemption.install()
  parallel.initialize(args.coordinator, args.processes, args.process_id)
  train(config_for(args.folder, args.held_out), args.workdir, evaluate=evaluate, progress=False, stop=stop)


if __name__ == "__main__":
  sys.exit(main())
