"""What the training loop costs beside the steps themselves, on the CPU.

    python benchmarks/step_overhead.py [--seconds 1.0] [--rounds 8] [--window 4]

The real `lskd_jax.train.train` on drawn scenes, with its loader, log, guards and TensorBoard. The loop's
steps and the same compiled step in a tight loop, each waited for with `block_until_ready`, take turns:
`window` steps of the one, then of the other. Overhead is the median of the loop's seconds per step over
the median of the tight loop's, minus 1; time in which the device waits for the host shows there, and
so does what the loader's threads take from a device that is the CPU. The batch is chosen so that a
step takes about `--seconds`. Prints one JSON line.
"""
import argparse
import json
from pathlib import Path
import statistics
import tempfile
import time

import jax

from configs import scenes
from data_pipeline import corpus_stages
from lskd_jax import step
from lskd_jax.train import train

WARM = 2  # steps before the first window: the first one compiles


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--seconds", type=float, default=1.0, help="how long a step is to take")
  parser.add_argument("--rounds", type=int, default=8, help="pairs of windows")
  parser.add_argument("--window", type=int, default=4, help="steps of a window")
  args = parser.parse_args()
  with tempfile.TemporaryDirectory() as folder:
    folder = Path(folder)
    corpus_stages.verbalize_scenes(folder / "words", 64, progress=False)
    corpus_stages.teach_corpus(folder / "words", folder / "taught", progress=False)
    batch = 8
    alone = statistics.median(measure(folder, "size", batch, 1, 3)[1])
    batch = max(1, round(batch * args.seconds / alone))
    loop, alone = measure(folder, "run", batch, args.rounds, args.window)
  loop_s, step_s = statistics.median(loop), statistics.median(alone)
  print(json.dumps({"benchmark": "step_overhead", "batch": batch, "loop_s": round(loop_s, 4),
                    "step_s": round(step_s, 4), "overhead": round(loop_s / step_s - 1, 4),
                    "loop": rounded(loop), "alone": rounded(alone)}))


def measure(folder: Path, name: str, batch: int, rounds: int, window: int) -> tuple[list, list]:
  """Trains; seconds per step of each window of the loop, and of each window of the step alone."""
  config = scenes.get_config()
  config.data.update(corpus=str(folder / "taught"), image_root=str(folder / "words" / "images"),
                     batch_size=batch, statements=4)
  config.optim.update(warmup_steps=0, steps=WARM + rounds * window)
  config.train.update(save_every=10**6, log_every=window)
  loop, alone = [], []
  make = step.make_train_step
  step.make_train_step = lambda *arguments, **options: Timed(make(*arguments, **options), window, loop, alone)
  try:
    train(config, folder / name, progress=False)
  finally:
    step.make_train_step = make
  return loop, alone


class Timed:
  """A training step that times the loop around it, and between two windows of the loop itself.

  The loop notices nothing: it gets the state and metrics of the last step.
  """

  def __init__(self, run, window: int, loop: list, alone: list):
    self.run, self.trace = run, run.trace
    self.window, self.loop, self.alone = window, loop, alone
    self.calls, self.start = 0, None

  def __call__(self, state, frozen, batch, key):
    state, values = self.run(state, frozen, batch, key)
    self.calls += 1
    done, rest = divmod(self.calls - WARM, self.window)
    if self.calls < WARM or rest:
      return state, values
    jax.block_until_ready(values)
    if done:  # from the end of the last window: `window` turns of the loop, each with its step
      self.loop.append((time.perf_counter() - self.start) / self.window)
      start = time.perf_counter()
      for _ in range(self.window):
        state, values = self.run(state, frozen, batch, key)
        jax.block_until_ready(values)
      self.alone.append((time.perf_counter() - start) / self.window)
    self.start = time.perf_counter()
    return state, values


def rounded(seconds: list[float]) -> list[float]:
  return [round(value, 4) for value in seconds]


if __name__ == "__main__":
  main()
