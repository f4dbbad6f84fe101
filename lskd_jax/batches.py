"""From a config to the corpora of a run, one to learn from and one to evaluate on, and to their batches."""
from collections.abc import Callable, Iterator
from pathlib import Path

from data_pipeline.corpus import Corpus, open_corpus
from data_pipeline.examples import LoaderOptions
from data_pipeline.judge import read_judgements
from data_pipeline.loader import Loader
from data_pipeline.records import DataError
from lskd_jax.judged import judged_corpus, judgement_columns


def find_corpus(config, path: str, image_root: str, split: str) -> tuple[Corpus, Callable | None]:
  """A corpus to learn from or to evaluate on, and for a critic its `judgement_columns`.

  Raises DataError: no such corpus or split, or no judgement is about it.
  """
  corpus = open_corpus(path, image_root or None, config.data.min_score, split or None)
  if config.task != "critic":
    return corpus, None
  unjudged = [kind for kind in ("captions", "descriptions") if config.data.texts[kind]]
  if unjudged:
    raise DataError(f"data.texts.{unjudged[0]}={config.data.texts[unjudged[0]]}: a critic learns from "
                    "judged statements only; set it to 0")
  judgements = read_judgements(config.data.judgements)
  corpus = judged_corpus(corpus, judgements)
  return corpus, judgement_columns(corpus, judgements)


def has_held_out(config) -> bool:
  """Whether a config names images to evaluate on."""
  return bool(config.eval.every and (config.eval.corpus or config.eval.split))


def find_held_out(config) -> tuple[Corpus, Callable | None] | None:
  """`find_corpus` of the images to evaluate on, if there are any; DataError if the run learns from them."""
  if not has_held_out(config):
    return None
  held_out, data = config.eval, config.data
  path = held_out.corpus or data.corpus
  same_corpus = Path(path).resolve() == Path(data.corpus).resolve()
  if same_corpus and (not held_out.split or data.split in ("", held_out.split)):
    raise DataError(f"eval.split={held_out.split!r}: the run learns from these images of {path}; name "
                    "another split, or another eval.corpus")
  return find_corpus(config, path, held_out.image_root or data.image_root, held_out.split)


def whole_batches(config, loader: Loader) -> int:
  """How many batches an evaluation has: what does not fill one is left out, since shapes are fixed.

  Raises DataError if not even one is filled.
  """
  count = int(loader.steps_per_epoch)
  if not count:
    raise DataError(f"{loader.corpus.name}: {len(loader.rows)} images with texts do not fill one batch of "
                    f"data.batch_size={config.data.batch_size} to evaluate on; hold out more, or make it "
                    "smaller")
  return min(count, config.eval.batches or count)


def batches_of(loader: Loader, own_rows, cached, columns: Callable | None) -> Callable:
  """(start, end) -> this process's rows of the batches of steps start + 1 to end.

  Args:
    cached: the corpus's features, put beside the images; or None. columns: more of a batch; or None.
  """
  def batches(start: int, end: int) -> Iterator[dict]:
    for batch in loader.batches(start, end - start, own_rows):
      if cached is not None:
        batch["features"] = cached[batch["image_id"]]
      if columns is not None:
        batch |= columns(batch)
      yield batch
  return batches


def loader_options(config) -> LoaderOptions:
  """The loader's options: the config's `data` group where the names agree."""
  data = config.data
  names = ("batch_size", "statements", "text_tokens", "region_mode", "shuffle_slots", "distractors",
           "rationale_dropout", "augment")
  return LoaderOptions(**{name: data[name] for name in names}, texts=data.texts.to_dict(),
                       max_regions=config.model.max_regions,
                       image_size=config.model.vit.image_size, images=not data.cache_features)
