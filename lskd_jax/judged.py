"""Judgements as training data: a corpus of judged statements, and their columns of a batch."""
from collections.abc import Callable, Iterable
import dataclasses

import numpy as np

from data_pipeline.corpus import Corpus
from data_pipeline.judge import Judgement
from data_pipeline.records import DataError


def judged_corpus(corpus: Corpus, judgements: Iterable[Judgement]) -> Corpus:
  """The same images, row for row, with only their judged statements.

  Raises DataError if no judgement is about a statement of the corpus.
  """
  judged = {judgement.index for judgement in judgements}
  found = judged & {s.index for row in range(len(corpus)) for s in corpus.record(row).statements}
  if not found:
    raise DataError(f"{corpus.name}: none of the {len(judged)} judgements is about one of its "
                    "statements; give the judgements of this corpus")

  def record(row: int):
    whole = corpus.record(row)
    kept = tuple(s for s in whole.statements if s.index in found)
    return dataclasses.replace(whole, statements=kept)
  return Corpus(len(corpus), record, corpus.image_bytes,
                f"{corpus.name}, judged statements")


def judgement_columns(corpus: Corpus, judgements: Iterable[Judgement]) -> Callable[[dict], dict]:
  """batch -> accept int32[B, S], answer_score and rationale_score float32[B, S].

  A sub-score that nobody gave counts as the verdict: 1 for accepted, 0 for rejected.
  """
  by_index = {judgement.index: judgement for judgement in judgements}

  def columns(batch: dict) -> dict:
    shape = batch["statement"].shape
    table = np.zeros((*shape, 3), np.float32)
    for b, row in enumerate(batch["image_id"]):
      statements = corpus.record(int(row)).statements
      for s, number in enumerate(batch["statement"][b]):
        if number >= 0:
          table[b, s] = _targets(by_index[statements[number].index])
    return {"accept": table[..., 0].astype(np.int32), "answer_score": table[..., 1],
            "rationale_score": table[..., 2]}
  return columns


def _targets(judgement: Judgement) -> tuple[float, float, float]:
  given = (judgement.answer_score, judgement.rationale_score)
  return (judgement.accept, *(judgement.accept if np.isnan(score) else score for score in given))
