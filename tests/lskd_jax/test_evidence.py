"""The critic on likelihoods: its numbers by hand, its fit against the equations it solves."""
import json

import numpy as np
import pytest

from data_pipeline.judge import Judgement, write_judgements
from data_pipeline.records import DataError
from lskd_jax.evidence import (
  Evidence,
  EvidenceCritic,
  cross_scores,
  evidence_features,
  fit_evidence,
  read_verdicts,
  uncalibrated,
)


def made(count=200, seed=0, sources=("v3", "v4")):
  """Statements whose mean likelihood and source tell, noisily, whether they are accepted."""
  rng = np.random.default_rng(seed)
  items, labels = [], []
  for _ in range(count):
    mean, source = rng.normal(-2, 0.7), sources[rng.integers(len(sources))]
    tokens = int(rng.integers(4, 20))
    items.append(Evidence(mean * tokens, mean - rng.random(), mean, tokens, source))
    wish = 2.5 * (mean + 2) + (1.0 if source == "v3" else -1.0)
    labels.append(int(rng.random() < 1 / (1 + np.exp(-wish))))
  return items, labels


def test_features_count_answer_and_rationale_only():
  words = [[0, -1, -2, -3, -5, -9], [0, -1, -2, -3, -5, -9]]
  fields = [[0, 1, 2, 2, 3, 0], [0, 1, 1, 1, 1, 0]]
  found = evidence_features(words, fields)
  assert found.tolist() == [[-10, -5, -10 / 3, 3], [0, 0, 0, 0]]


def test_the_fit_solves_its_equations():
  """The penalised gradient is 0: sum (p - target) x + l2 w = 0, and for the offset without l2."""
  items, labels = made()
  critic = fit_evidence(items, labels, l2=3.0)
  assert critic.sources == ("v3", "v4") and critic.judgements == 200
  x = np.array([[*item[:4], item.source == "v3", item.source == "v4"] for item in items], float)
  x = (x - x.mean(0)) / x.std(0)
  right = sum(labels)
  targets = np.where(np.array(labels) == 1, (right + 1) / (right + 2), 1 / (200 - right + 2))
  residual = critic.scores(items) - targets
  np.testing.assert_allclose(x.T @ residual + 3.0 * np.array(critic.weights), 0, atol=1e-6)
  assert residual.sum() == pytest.approx(0, abs=1e-6)


def test_it_ranks_and_is_calibrated_on_new_statements():
  critic = fit_evidence(*made(400))
  items, labels = made(4000, seed=1)
  scores, labels = critic.scores(items), np.array(labels)
  assert scores[labels == 1].mean() - scores[labels == 0].mean() > 0.25
  for low in (0.2, 0.4, 0.6):
    some = (scores >= low) & (scores < low + 0.2)
    assert scores[some].mean() == pytest.approx(labels[some].mean(), abs=0.08)


def test_a_source_that_no_judgement_had_is_scored_by_its_likelihoods():
  critic = fit_evidence(*made())
  low, high = (Evidence(m * 9, m - 1, m, 9, "v9") for m in (-4.0, -1.0))
  scores = critic.scores([low, high])
  assert 0 < scores[0] < scores[1] < 1


@pytest.mark.parametrize("labels,expected", [([1], 2 / 3), ([0], 1 / 3), ([1, 1], 3 / 4)])
def test_few_judgements_give_no_certainty(labels, expected):
  """Equal statements: the score is the target, (n+ + 1) / (n+ + 2) or 1 / (n- + 2)."""
  items = [Evidence(-6, -3, -2, 3, "v")] * len(labels)
  assert fit_evidence(items, labels).scores(items) == pytest.approx([expected] * len(labels))


def test_judgements_that_agree_or_separate_perfectly_have_a_finite_fit():
  items, _ = made(50)
  labels = [int(item.mean > -2) for item in items]
  for given in (labels, [1] * 50):
    scores = fit_evidence(items, given, l2=1e-3).scores(items)
    assert np.isfinite(scores).all() and scores.max() < 1


def test_without_judgements_the_score_is_the_z_score_of_the_mean():
  items = [Evidence(0, 0, mean, 1) for mean in (-3.0, -2.0, -1.0)]
  critic = uncalibrated(items)
  z = np.array([-1, 0, 1]) / np.sqrt(2 / 3)
  np.testing.assert_allclose(critic.scores(items), 1 / (1 + np.exp(-z)))
  assert critic.judgements == 0


def test_json_gives_it_back_exactly():
  critic = fit_evidence(*made())
  assert EvidenceCritic.from_json(json.loads(json.dumps(critic.to_json()))) == critic


def test_cross_scores_never_see_a_groups_own_judgements():
  """Labels that are a coin per group: a critic that saw the group would do better than chance."""
  rng = np.random.default_rng(3)
  coin = rng.integers(0, 2, 40)
  groups = [f"image-{k}" for k in range(40) for _ in range(5)]
  items = [Evidence(-k, -k, -k, 5, f"source-{k}") for k in range(40) for _ in range(5)]
  labels = np.repeat(coin, 5)
  scores = cross_scores(items, labels, groups)
  inside = fit_evidence(items, labels).scores(items)
  assert ((inside > 0.5) == labels).mean() > 0.95
  assert ((scores > 0.5) == labels).mean() < 0.75
  assert np.array_equal(scores, cross_scores(items, labels, groups))


@pytest.mark.parametrize("items,labels,error", [
    ([], [], "there are no judgements"),
    ([Evidence(-1, -1, -1, 1)], [2], "must be 1 .accept. or 0"),
    ([Evidence(-np.inf, -1, -1, 1)], [1], "not finite"),
    ([Evidence(-1, -1, -1, 1)], [1, 0], "1 statements and 2 labels"),
])
def test_what_cannot_be_fitted(items, labels, error):
  with pytest.raises(ValueError, match=error):
    fit_evidence(items, labels)
  with pytest.raises(DataError, match="1 judged images are too few"):
    cross_scores([Evidence(-1, -1, -1, 1)], [1], ["a"])


def test_an_unfilled_sheet_holds_no_judgement(tmp_path):
  write_judgements(tmp_path / "judged.jsonl", [Judgement("a", 1), Judgement("b", 0)])
  assert read_verdicts(tmp_path / "judged.jsonl") == {"a": 1, "b": 0}
  (tmp_path / "sheet.csv").write_text("index,accept\na,\n")
  with pytest.raises(DataError, match="sheet.csv: holds no judgement; fill in `accept`"):
    read_verdicts(tmp_path / "sheet.csv")
