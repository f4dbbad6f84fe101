"""Filtering: measures of scores against values worked out by hand, and what a cut keeps."""

import numpy as np
import pytest

from data_pipeline import filter as filtering, stages
from data_pipeline.records import DataError, ImageRecord, Statement

# Six judgements, worked out on paper. Sorted by score the labels read 1 0 (1 0) 1 0, where the
# brackets hold two equal scores.
SCORES = [0.9, 0.8, 0.5, 0.5, 0.4, 0.1]
LABELS = [1, 0, 1, 0, 1, 0]


def random_judgements(seed, count=40):
  """Scores on a coarse grid, so that many are equal, and labels that follow them loosely."""
  rng = np.random.default_rng(seed)
  scores = rng.integers(0, 12, count) / 12
  labels = (rng.random(count) < 0.2 + 0.6 * scores).astype(int)
  labels[:2] = 0, 1
  return scores, labels


# ---- ranking ----


def test_precision_recall_by_hand():
  curve = filtering.precision_recall(SCORES, LABELS)
  assert curve["cut"].tolist() == [0.9, 0.8, 0.5, 0.4, 0.1]
  np.testing.assert_allclose(curve["precision"], [1, 1 / 2, 2 / 4, 3 / 5, 3 / 6])
  np.testing.assert_allclose(curve["recall"], [1 / 3, 1 / 3, 2 / 3, 1, 1])
  np.testing.assert_allclose(curve["accepted"], [1 / 6, 2 / 6, 4 / 6, 5 / 6, 1])


def test_average_precision_and_roc_auc_by_hand():
  # Recall rises by a third at the cuts 0.9, 0.5 and 0.4.
  assert filtering.average_precision(SCORES, LABELS) == pytest.approx((1 + 2 / 4 + 3 / 5) / 3)
  # Of the 9 pairs: 0.9 wins 3; 0.5 wins 1 and ties 1; 0.4 wins 1.
  assert filtering.roc_auc(SCORES, LABELS) == pytest.approx((3 + 1.5 + 1) / 9)


def test_a_perfect_a_reversed_and_a_constant_score():
  labels = [1, 1, 0, 0]
  assert filtering.average_precision([4, 3, 2, 1], labels) == 1.0
  assert filtering.roc_auc([4, 3, 2, 1], labels) == 1.0
  assert filtering.roc_auc([1, 2, 3, 4], labels) == 0.0
  assert filtering.roc_auc([7, 7, 7, 7], labels) == 0.5
  assert filtering.average_precision([7, 7, 7, 7], labels) == 0.5  # the share of accepts


@pytest.mark.parametrize("seed", range(5))
def test_measures_agree_with_plain_loops(seed):
  scores, labels = random_judgements(seed)
  area, recall_before = 0.0, 0.0
  for cut in sorted(set(scores), reverse=True):
    taken = [label for score, label in zip(scores, labels) if score >= cut]
    recall = sum(taken) / sum(labels)
    area += (recall - recall_before) * sum(taken) / len(taken)
    recall_before = recall
  assert filtering.average_precision(scores, labels) == pytest.approx(area)
  pairs = [
    1.0 if a > b else 0.5 if a == b else 0.0
    for a, right in zip(scores, labels) if right
    for b, wrong in zip(scores, labels) if not wrong
  ]  # fmt: skip
  assert filtering.roc_auc(scores, labels) == pytest.approx(np.mean(pairs))
  shuffled = np.random.default_rng(seed).permutation(len(scores))
  assert filtering.average_precision(scores[shuffled], labels[shuffled]) == pytest.approx(area)


def test_the_bootstrap_interval_holds_the_value_and_narrows_with_more_judgements():
  scores, labels = random_judgements(0, 60)
  low, high = filtering.bootstrap_interval(scores, labels, repeats=300)
  assert low < filtering.average_precision(scores, labels) < high
  assert (low, high) == filtering.bootstrap_interval(scores, labels, repeats=300)  # seeded
  many = filtering.bootstrap_interval(np.tile(scores, 16), np.tile(labels, 16), repeats=300)
  assert many[1] - many[0] < 0.5 * (high - low)  # a quarter, in the long run
  auc = filtering.bootstrap_interval(scores, labels, filtering.roc_auc, repeats=50)
  assert 0 < auc[0] < auc[1] < 1


@pytest.mark.parametrize(
  "scores, labels, fault",
  [
    ([], [], "no judgements"),
    ([0.1, float("nan")], [1, 0], "not finite"),
    ([0.1, 0.2], [0, 0], "none of 2 judgements accepts"),
    ([0.1, 0.2], [1, 1], "none of 2 judgements rejects"),
    ([0.1, 0.2], [1, 2], "1 .accept. or 0"),
  ],
)
def test_measures_without_meaning_are_refused(scores, labels, fault):
  with pytest.raises(DataError, match=fault):
    filtering.roc_auc(scores, labels)


# ---- calibration ----


def test_calibration_error_by_hand():
  # Two bins: {0.1, 0.3} predict 0.2 and observe 0.5; {0.8, 1.0} predict 0.9 and observe 1.
  probabilities, labels = [0.1, 0.3, 0.8, 1.0], [0, 1, 1, 1]
  table = filtering.reliability(probabilities, labels, bins=2)
  np.testing.assert_allclose(table["predicted"], [0.2, 0.9])
  np.testing.assert_allclose(table["observed"], [0.5, 1.0])
  assert table["count"].tolist() == [2, 2]
  error = filtering.calibration_error(probabilities, labels, bins=2)
  assert error == pytest.approx((2 * 0.3 + 2 * 0.1) / 4)


def test_an_empty_bin_is_nan_and_costs_nothing():
  table = filtering.reliability([0.05, 0.95], [0, 1], bins=4)
  assert np.isnan(table["observed"]).tolist() == [False, True, True, False]
  assert filtering.calibration_error([0.0, 1.0], [0, 1]) == 0.0


@pytest.mark.parametrize("scale, shift", [(1.0, 0.0), (100.0, -5000.0)])
def test_platt_finds_the_true_curve(scale, shift):
  """Labels drawn from P = sigmoid(2 x - 1): the fit finds 2 and -1, whatever the unit of x."""
  rng = np.random.default_rng(0)
  x = rng.normal(size=20_000)
  labels = rng.random(len(x)) < filtering.sigmoid(2 * x - 1)
  fit = filtering.calibrate(scale * x + shift, labels)
  assert fit.slope * scale == pytest.approx(2, abs=0.1)
  assert fit.offset + fit.slope * shift == pytest.approx(-1, abs=0.1)
  p = filtering.apply_calibration(fit, scale * x + shift)
  assert filtering.calibration_error(p, labels) < 0.02


def test_platt_agrees_with_a_grid_search_on_the_smoothed_targets():
  scores, labels = np.array([0.0, 1.0, 2.0, 3.0, 4.0]), np.array([0, 0, 1, 0, 1])
  targets = np.where(labels == 1, 3 / 4, 1 / 5)  # (2 + 1) / (2 + 2) and 1 / (3 + 2)
  slopes, offsets = np.meshgrid(np.linspace(0, 2, 401), np.linspace(-3, 1, 401), indexing="ij")
  p = filtering.sigmoid(slopes[..., None] * scores + offsets[..., None])
  loss = -(targets * np.log(p) + (1 - targets) * np.log(1 - p)).sum(-1)
  best = np.unravel_index(loss.argmin(), loss.shape)
  fit = filtering.calibrate(scores, labels)
  assert fit.slope == pytest.approx(slopes[best], abs=0.01)
  assert fit.offset == pytest.approx(offsets[best], abs=0.02)


def test_calibration_stays_finite_where_scores_separate_or_say_nothing():
  fit = filtering.calibrate([1, 2, 3, 4], [0, 0, 1, 1])
  assert 0 < fit.slope < 100
  flat = filtering.calibrate([5, 5, 5, 5], [0, 0, 0, 1])
  p = filtering.apply_calibration(flat, [5.0])
  assert p == pytest.approx((1 * 2 / 3 + 3 * 1 / 5) / 4)  # the mean of the smoothed targets


def test_temperature_scaling_keeps_the_even_point():
  rng = np.random.default_rng(1)
  logits = 5 * rng.normal(size=20_000)  # five times too sure
  labels = rng.random(20_000) < filtering.sigmoid(logits / 5)
  fit = filtering.calibrate(logits, labels, kind="temperature")
  assert fit.offset == 0.0 and fit.slope == pytest.approx(1 / 5, abs=0.02)
  before = filtering.calibration_error(filtering.sigmoid(logits), labels)
  after = filtering.calibration_error(filtering.apply_calibration(fit, logits), labels)
  assert after < 0.03 < 0.1 < before


def test_logit_undoes_sigmoid_and_neither_overflows():
  x = np.array([-10.0, 0.0, 3.0])
  np.testing.assert_allclose(filtering.logit(filtering.sigmoid(x)), x)
  assert filtering.sigmoid([-1e5, 1e5]).tolist() == [0.0, 1.0]
  assert np.isfinite(filtering.logit([0.0, 1.0])).all()


# ---- the cut ----


def test_the_default_cut_has_the_best_f1():
  # F1 per cut: 0.5, 0.4, 4/7, 3/4, 2/3 (from the curve above).
  cut = filtering.choose_cut(SCORES, LABELS)
  assert (cut.cut, cut.precision, cut.recall) == (0.4, 3 / 5, 1.0)
  assert cut.accepted == pytest.approx(5 / 6)
  assert cut.rule == "best F1"


def test_a_target_precision_gives_the_lowest_cut_that_reaches_it():
  assert filtering.choose_cut(SCORES, LABELS, target_precision=0.55).cut == 0.4
  assert filtering.choose_cut(SCORES, LABELS, target_precision=0.7).cut == 0.9
  with pytest.raises(DataError, match="no cut reaches precision 0.9; the best is 0.500 at cut 1"):
    filtering.choose_cut([1, 1, 0], [1, 0, 0], target_precision=0.9)


def test_the_cut_says_how_sure_its_precision_is():
  """Wilson's interval: 1 of 1 right leaves precision anywhere from 21 %, 100 of 100 from 96 %."""
  one = filtering.choose_cut([2, 1], [1, 0], target_precision=1.0)
  assert one.precision == 1.0 and one.precision_low == pytest.approx(0.2065, abs=1e-3)
  many = filtering.choose_cut([2] * 100 + [1], [1] * 100 + [0], target_precision=1.0)
  assert many.precision_low == pytest.approx(0.963, abs=1e-3)


# ---- what is kept ----


def statement(index, answer, score=None, question="What is [0]?", rationale=""):
  return Statement(index, question, answer, rationale, score=score)


def record(*statements, image="a.png"):
  return ImageRecord(image, 0, 10, 10, (), statements)


def indices(result):
  return [s.index for s in result.statements]


def test_statements_below_the_cut_are_left_out_with_the_reason():
  kept, *rejected = filtering.filter_record(
    record(statement("a", "x", 0.8), statement("b", "y", 0.79), statement("c", "z")), 0.8
  )
  assert indices(kept) == ["a"]
  assert [str(error) for error in rejected] == [
    "a.png: statement b: score 0.7900 is below 0.8",
    "a.png: statement c: has no score; run `lskd corpus score` first",
  ]


def test_of_statements_that_say_the_same_the_best_scored_stays():
  kept, *rejected = filtering.filter_record(
    record(
      statement("a", "A red  hat.", 0.5, rationale="one"),
      statement("b", "a red hat", 0.9, rationale="two"),
      statement("c", "A red hat!", 0.9),
      statement("d", "A red hat", 0.9, question="What is [1]?"),
    )
  )
  assert indices(kept) == ["b", "d"]  # another region is another statement
  assert ["says the same as b" in str(error) for error in rejected] == [True, True]


def test_question_and_answer_are_not_run_together():
  twins = [statement("a", "b", question="x [1]"), statement("b", "[1] b", question="x")]
  assert indices(filtering.filter_record(record(*twins))[0]) == ["a", "b"]


def test_an_image_with_nothing_left_is_left_out():
  (error,) = filtering.filter_record(record(statement("a", "x", 0.1)), 0.8)
  assert isinstance(error, DataError)
  (error,) = filtering.filter_record(record())
  assert "has no statements" in str(error)


def test_filter_corpus_is_a_stage(tmp_path):
  records = [
    record(statement(f"{n}-0", "x", n / 10), statement(f"{n}-1", "y", 0.9), image=f"{n}.png")
    for n in range(10)
  ]
  stages.run_stage("source", [records[:5], records[5:]], lambda r: r, tmp_path / "in", {}, False)
  summary = filtering.filter_corpus(tmp_path / "in", tmp_path / "out", 0.8, progress=False)
  assert (summary["records"], summary["statements"], summary["rejected"]) == (10, 12, 8)
  assert [len(r.statements) for r in stages.read_records(tmp_path / "out")] == [1] * 8 + [2] * 2
  with pytest.raises(DataError, match=r"holds no records \(20 rejected\)"):
    filtering.filter_corpus(tmp_path / "in", tmp_path / "none", 0.95, progress=False)
