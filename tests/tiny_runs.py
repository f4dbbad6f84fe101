"""What tests that start real training processes share: a few taught scenes, a tiny run on them, a port."""
import contextlib
from pathlib import Path
import random
import socket

from configs import scenes
from data_pipeline import corpus_stages


def teach_scenes(folder: Path) -> None:
  """Puts eight scenes into `folder/words`, and with statements into `folder/taught`."""
  corpus_stages.verbalize_scenes(folder / "words", 8, progress=False)
  corpus_stages.teach_corpus(folder / "words", folder / "taught", progress=False)


def teach_others(folder: Path) -> None:
  """Puts ten scenes that are not among those into `folder/other words` and `folder/others`."""
  corpus_stages.verbalize_scenes(folder / "other words", 10, seed=1, split="validation", progress=False)
  corpus_stages.teach_corpus(folder / "other words", folder / "others", progress=False)


def evaluate_on_others(config, folder: Path) -> None:
  """Adds an evaluation after each step, on the scenes of `teach_others`."""
  config.eval.update(every=1, corpus=str(folder / "others"), image_root=str(folder / "other words/images"))


def config_for(folder: Path, task: str = "student"):
  """A run on the scenes in `folder` whose model compiles in seconds; four pictures a step."""
  config = scenes.get_config()
  config.task = task
  config.model.embed = 8
  config.model.max_regions = 6
  config.model.vit.update(image_size=24, width=16, depth=1, heads=2, hidden=32)
  config.model.qformer.update(width=16, depth=1, cross_every=1, heads=2, hidden=32, queries=2)
  config.data.update(corpus=str(folder / "taught"), image_root=str(folder / "words" / "images"),
                     batch_size=4, statements=2, text_tokens=32)
  if task == "tagger":
    config.data.texts.update(statements=0.0, captions=0.5, descriptions=0.5)
  config.optim.warmup_steps = 0
  config.train.update(tensorboard=False, log_every=1)
  return config


def free_port() -> int:
  """A port of this machine that nobody listens on, below those that systems hand out: it stays free."""
  while True:
    port = random.SystemRandom().randrange(20_000, 32_000)
    with socket.socket() as tried, contextlib.suppress(OSError):
      tried.bind(("localhost", port))
      return port
