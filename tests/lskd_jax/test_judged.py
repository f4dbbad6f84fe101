"""Judgements as training data: only what was judged is shown, each text with its own verdict."""
import math

import numpy as np
import pytest

from data_pipeline import tokenizer as tokenizers
from data_pipeline.corpus import corpus_of
from data_pipeline.examples import LoaderOptions
from data_pipeline.judge import Judgement
from data_pipeline.loader import Loader
from data_pipeline.records import DataError, ImageRecord, Region, Statement
from lskd_jax.judged import judged_corpus, judgement_columns


def record(number, *indices):
  regions = (Region(0, (0.0, 0.0, 4.0, 8.0)), Region(1, (4.0, 0.0, 8.0, 8.0)))
  statements = tuple(Statement(index, "who is [0]?", f"the {index}", "a hat") for index in indices)
  return ImageRecord(f"{number}.png", number, 8, 8, regions, statements)


@pytest.fixture
def corpus(tmp_path):
  for number in range(3):
    (tmp_path / f"{number}.png").write_bytes(b"bytes of %d" % number)
  return corpus_of([record(0, "cook", "king"), record(1, "farmer"), record(2, "nurse", "knight")],
                   tmp_path, name="five statements")


JUDGED = [Judgement("king", 1, 1.0, 0.5), Judgement("nurse", 0, 0.25), Judgement("knight", 1),
          Judgement("of another corpus", 1)]


def test_only_judged_statements_are_left_and_rows_stay(corpus):
  found = judged_corpus(corpus, JUDGED)
  left = [[s.index for s in found.record(row).statements] for row in range(len(found))]
  assert left == [["king"], [], ["nurse", "knight"]]
  assert [found.record(row).image for row in range(3)] == ["0.png", "1.png", "2.png"]
  assert found.image_bytes(1) == b"bytes of 1"
  assert found.name == "five statements, judged statements"
  assert len(corpus.record(0).statements) == 2  # the corpus itself is as it was


def test_judgements_of_another_corpus_are_refused(corpus):
  with pytest.raises(DataError, match="five statements: none of the 2 judgements is about one of "
                     "its statements; give the judgements of this corpus"):
    judged_corpus(corpus, [Judgement("a", 1), Judgement("b", 0)])
  with pytest.raises(DataError, match="none of the 0 judgements"):
    judged_corpus(corpus, [])


def test_columns_are_in_the_order_of_the_batch(corpus):
  columns = judgement_columns(judged_corpus(corpus, JUDGED), JUDGED)
  batch = {"image_id": np.array([2, 0]), "statement": np.array([[1, 0, -1], [0, -1, -1]])}
  found = columns(batch)
  assert set(found) == {"accept", "answer_score", "rationale_score"}
  # An absent sub-score counts as the verdict: nurse's rationale 0, both of knight 1.
  np.testing.assert_array_equal(found["accept"], [[1, 0, 0], [1, 0, 0]])
  np.testing.assert_array_equal(found["answer_score"], [[1, 0.25, 0], [1, 0, 0]])
  np.testing.assert_array_equal(found["rationale_score"], [[1, 0, 0], [0.5, 0, 0]])
  assert found["accept"].dtype == np.int32 and found["answer_score"].dtype == np.float32
  assert not any(math.isnan(value) for value in found["rationale_score"].flat)


def test_columns_fit_what_the_loader_gives(corpus, tmp_path):
  """Each text of a batch says which statement it is; its verdict stands in the same place."""
  judged = judged_corpus(corpus, JUDGED)
  texts = [s.answer for row in range(3) for s in corpus.record(row).statements]
  tokenizer = tokenizers.train_tokenizer(texts, tmp_path / "tokenizer", 200, 1)
  options = LoaderOptions(batch_size=4, statements=2, text_tokens=24, images=False)
  loader = Loader(judged, tokenizer, options, seed=0)
  assert loader.rows.tolist() == [0, 2]  # nothing about picture 1 was judged
  batch = loader.batch(0)
  found = judgement_columns(judged, JUDGED)(batch)
  verdict = {"king": 1, "nurse": 0, "knight": 1}
  seen = set()
  for b, s in np.argwhere(batch["statement_valid"]):
    text = tokenizer.decode(batch["tokens"][b, s])
    name, = (name for name in verdict if name in text)
    assert found["accept"][b, s] == verdict[name]
    seen.add(name)
  assert seen == set(verdict)
