"""How long a save holds up the training loop, as a share of a save that is waited for.

    python benchmarks/async_save.py --gigabytes 1 --rounds 7

Saves a state of random float32 values with `Checkpointer`, in turn in the background and waited for,
each to a new step of the same run, and prints one JSON line: the medians of both in seconds, and of their
ratio per round. The goal is a ratio below 0.1. A save is timed when the one before it is finished;
fingerprints are part of what holds up the loop.
"""
import argparse
import json
import statistics
import tempfile
import time

import jax
import jax.numpy as jnp

from lskd_jax.checkpoint import Checkpointer

LEAVES = 24  # about as many large leaves as a stacked Q-Former has with its optimizer state


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--gigabytes", type=float, default=1.0, help="size of the state")
  parser.add_argument("--rounds", type=int, default=7)
  parser.add_argument("--folder", default=None, help="where to write; by default a temporary folder")
  args = parser.parse_args()
  rows = max(1, round(args.gigabytes * 1e9 / 4 / LEAVES / 1024))
  keys = jax.random.split(jax.random.key(0), LEAVES)
  params = {f"leaf{i}": jax.random.normal(key, (rows, 1024)) for i, key in enumerate(keys)}
  jax.block_until_ready(params)

  blocked, waited = [], []
  with tempfile.TemporaryDirectory(dir=args.folder) as folder:
    with Checkpointer(folder, keep=1) as checkpoints:
      def seconds(step, wait):
        start = time.perf_counter()
        checkpoints.save(step, {"step": jnp.int32(step), "params": params})
        if wait:
          checkpoints.wait()
        taken = time.perf_counter() - start
        checkpoints.wait()  # with the deletion of the step before
        return taken
      seconds(1, wait=True)  # makes folders and threads
      for turn in range(1, args.rounds + 1):
        blocked.append(seconds(2 * turn, wait=False))
        waited.append(seconds(2 * turn + 1, wait=True))
  print(json.dumps({
      "gigabytes": sum(leaf.nbytes for leaf in params.values()) / 1e9, "rounds": args.rounds,
      "async_seconds": statistics.median(blocked), "sync_seconds": statistics.median(waited),
      "share": statistics.median(a / b for a, b in zip(blocked, waited))}))


if __name__ == "__main__":
  main()
