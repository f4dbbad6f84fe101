"""Corpus -> batches. The batch of a step is a pure function of (seed, step).

Row r of step s is element s * batch_size + r of one endless stream, in which every epoch holds each
image once, in an order of its own. Everything random about an element is drawn from its position in
that stream, so nothing depends on threads, on where training was resumed, or on how many processes
share the work: each says which rows of a batch it wants.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
import functools
import sys
import threading

import grain
import numpy as np
from tokenizers import Tokenizer

from data_pipeline.corpus import CACHED_RECORDS, Corpus
from data_pipeline.examples import (
  LoaderOptions,
  Pools,
  choose_slots,
  choose_texts,
  has_text,
  make_pools,
  pixels,
  random_frame,
  still_true,
  whole_frame,
)
from data_pipeline.records import DataError
from data_pipeline.texts import DESCRIPTION, NO_FIELD, QUESTION, RATIONALE, put_slots, text_encoder

_CUT_NAMES = {
  NO_FIELD: "whole",
  QUESTION: "cut question",
  RATIONALE: "cut rationale",
  DESCRIPTION: "cut description",
}


class Loader:
  """Makes the batches of one corpus. `batches` and `batch_at` are the short ways to use it.

  rows: the corpus rows that have a text to show; all others are left out of every epoch.
  counts: what became of the text slots filled so far, prefetched batches included: "whole",
    "cut rationale", "cut question", "cut description", "cropped away", "empty".
  """

  def __init__(self, corpus: Corpus, tokenizer: Tokenizer, options: LoaderOptions, seed: int):
    if seed < 0:
      raise DataError(f"seed={seed}; it must be 0 or above")
    self.corpus = corpus
    self.options = options
    self.seed = seed
    self.encoder = text_encoder(tokenizer, options.text_tokens)
    put_slots(self.encoder, np.zeros(1, np.int32), range(options.max_regions))  # fails now or never
    usable = (row for row in range(len(corpus)) if has_text(corpus.outline(row), options))
    self.rows = np.fromiter(usable, np.int64)
    if not len(self.rows):
      wanted = " or ".join(sorted(kind for kind, share in options.texts.items() if share))
      cut = "" if corpus.min_score is None else f" with a score of {corpus.min_score} or more"
      raise DataError(f"{corpus.name}: no image has {wanted}{cut}; nothing to load")
    self.counts = Counter()
    self._counting = threading.Lock()
    self._epoch_order = functools.lru_cache(maxsize=4)(self._shuffled)
    in_memory = len(self.rows) <= CACHED_RECORDS
    self._pools = functools.cache(self._encoded) if in_memory else self._encoded

  @property
  def steps_per_epoch(self) -> float:
    """How many steps show every image once."""
    return len(self.rows) / self.options.batch_size

  def batch(self, step: int, rows: Iterable[int] | None = None) -> dict[str, np.ndarray]:
    """Rows of the batch of `step`, in the order asked for; None = all `batch_size` of them.

    image uint8[b,H,W,3] of image_size, unless images=False
    image_id int32[b]: the row in the corpus
    boxes float32[b,R,4]: xyxy in [0,1] of the model input; 0 where not valid
    region_valid bool[b,R]
    tokens int32[b,S,T]: start, text, end and padding (texts.py); mentions are slots
    fields int8[b,S,T]: 0 special or padding, 1 question, 2 answer, 3 rationale, 4 description
    statement int32[b,S]: which of the record's statements a text is, -1 for other texts
    statement_valid bool[b,S]

    Raises DataError for no rows, or a row that is not of the batch.
    """
    size = self.options.batch_size
    rows = range(size) if rows is None else [int(row) for row in rows]
    if not rows or not 0 <= min(rows) <= max(rows) < size:
      raise DataError(f"rows {list(rows)[:8]}: a batch has the rows 0 to {size - 1}")
    examples = [self._example(step * size + row) for row in rows]
    return {name: np.stack([example[name] for example in examples]) for name in examples[0]}

  def batches(
    self, start_step: int = 0, steps: int | None = None, rows: Iterable[int] | None = None
  ) -> Iterator[dict[str, np.ndarray]]:
    """The batches of steps start_step, start_step + 1, …: `steps` of them, or without end.

    They are made ahead by `options.threads` threads. `rows` as in `batch`.
    """
    end = sys.maxsize if steps is None else start_step + steps
    make = functools.partial(self.batch, rows=None if rows is None else tuple(rows))
    reading = grain.ReadOptions(
      num_threads=self.options.threads, prefetch_buffer_size=self.options.prefetch
    )
    return iter(grain.MapDataset.range(start_step, end).map(make).to_iter_dataset(reading))

  def example_ids(self, step: int) -> np.ndarray:
    """int64[batch_size]: the corpus row behind every row of a step, without reading any of them."""
    start = step * self.options.batch_size
    return np.array([self._row(start + row) for row in range(self.options.batch_size)], np.int64)

  def _row(self, position: int) -> int:
    """The corpus row of the element at one position of the stream."""
    epoch, at = divmod(position, len(self.rows))
    return int(self._epoch_order(epoch)[at])

  def _shuffled(self, epoch: int) -> np.ndarray:
    """The rows in the order of one epoch."""
    # grain's own shuffle costs milliseconds per element below a thousand elements, and gives epoch
    # 1 of seed 0 the order of epoch 0 of seed 1.
    return np.random.default_rng([self.seed, 0, epoch]).permutation(self.rows)

  def _encoded(self, row: int) -> Pools:
    return make_pools(self.encoder, self.corpus.record(row), self.options)

  def _example(self, position: int) -> dict[str, np.ndarray]:
    """The element at one position of the stream."""
    options = self.options
    row = self._row(position)
    record = self.corpus.record(row)
    rng = np.random.default_rng([self.seed, 1, position])

    texts = choose_texts(self.encoder, self._pools(row), options, rng)
    slots = choose_slots(record, texts, options, rng)
    if options.augment:
      frame = random_frame(record, slots, texts, rng)
    else:
      frame = whole_frame(record, slots)
    valid = still_true(texts, slots, frame)

    example = {
      "image_id": np.int32(row),
      "boxes": np.zeros((options.max_regions, 4), np.float32),
      "region_valid": np.zeros(options.max_regions, bool),
      "tokens": np.full((options.statements, options.text_tokens), self.encoder.pad, np.int32),
      "fields": np.zeros((options.statements, options.text_tokens), np.int8),
      "statement": np.full(options.statements, -1, np.int32),
      "statement_valid": np.array(valid),
    }
    if options.images:
      data = self.corpus.image_bytes(row)
      example["image"] = pixels(data, record, slots, frame, options)
    if options.region_mode in ("tokens", "both"):
      example["region_valid"][: len(slots)] = frame.visible
      example["boxes"][: len(slots)] = np.where(frame.visible[:, None], frame.boxes, 0)
    for s, text in enumerate(texts):
      if valid[s]:
        example["statement"][s] = text.statement
        example["tokens"][s, : len(text.tokens)] = text.tokens
        example["fields"][s, : len(text.fields)] = text.fields
    put_slots(self.encoder, example["tokens"], slots)
    self._count(texts, valid)
    return example

  def _count(self, texts: list, valid: list[bool]) -> None:
    names = [
      _CUT_NAMES[text.cut] if ok else "cropped away" if text else "empty"
      for text, ok in zip(texts, valid, strict=True)
    ]
    with self._counting:
      self.counts.update(names)


def batches(
  corpus: Corpus,
  tokenizer: Tokenizer,
  options: LoaderOptions,
  seed: int,
  start_step: int = 0,
  steps: int | None = None,
  rows: Iterable[int] | None = None,
) -> Iterator[dict[str, np.ndarray]]:
  """The batches from `start_step` on; `Loader.batch` lists their fields.

  Resuming is starting with another `start_step`; who reads which rows may change on the way.
  """
  return Loader(corpus, tokenizer, options, seed).batches(start_step, steps, rows)


def batch_at(
  corpus: Corpus,
  tokenizer: Tokenizer,
  options: LoaderOptions,
  seed: int,
  step: int,
  rows: Iterable[int] | None = None,
) -> dict[str, np.ndarray]:
  """The batch of one step, made on its own. For many, keep a `Loader`."""
  return Loader(corpus, tokenizer, options, seed).batch(step, rows)
