"""How good scores are, measured on judgements, and what is kept of a corpus because of them.

`scores` are real numbers, higher = better; `labels` are judgements, 1 = accept, 0 = reject. A cut
accepts score >= cut. Everything is float64.
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
from dataclasses import dataclass
from pathlib import Path
import re
import unicodedata

import numpy as np

from data_pipeline import stages
from data_pipeline.records import DataError, ImageRecord, Statement

# ---- how well scores rank ----


def precision_recall(scores, labels) -> dict[str, np.ndarray]:
  """What each possible cut would give, from the highest cut (fewest accepted) to the lowest.

  Arrays over the distinct scores: cut; precision, the share of the accepted that is right;
  recall, the share of the right that is accepted; accepted, the share of all that is accepted.
  """
  scores, labels = _checked(scores, labels)
  order = np.argsort(-scores, kind="stable")
  scores, labels = scores[order], labels[order]
  last = np.append(scores[1:] != scores[:-1], True)  # equal scores are accepted together
  right = np.cumsum(labels)[last]
  accepted = np.flatnonzero(last) + 1.0
  return {
    "cut": scores[last],
    "precision": right / accepted,
    "recall": right / labels.sum(),
    "accepted": accepted / len(labels),
  }


def average_precision(scores, labels) -> float:
  """Area under the precision-recall steps: the sum of precision * (recall gained) over the cuts.
  Equal scores count as one step, so the order of the rows cannot change it."""
  curve = precision_recall(scores, labels)
  gained = np.diff(curve["recall"], prepend=0.0)
  return float(np.sum(curve["precision"] * gained))


def roc_auc(scores, labels) -> float:
  """The chance that a right statement scores above a wrong one, ties counting half
  (Mann-Whitney U)."""
  scores, labels = _checked(scores, labels, both=True)
  _, place, counts = np.unique(scores, return_inverse=True, return_counts=True)
  rank = (np.cumsum(counts) - (counts - 1) / 2)[place]  # equal scores share their mean rank
  right = labels.sum()
  wins = rank[labels == 1].sum() - right * (right + 1) / 2
  return float(wins / (right * (len(labels) - right)))


def bootstrap_interval(
  scores,
  labels,
  metric: Callable = average_precision,
  level: float = 0.95,
  repeats: int = 1000,
  seed: int = 0,
) -> tuple[float, float]:
  """(low, high) of a metric over judgements drawn again with replacement: how far it could move
  with another sample of this size. Draws in which a class is missing are drawn again."""
  scores, labels = _checked(scores, labels, both=True)
  rng = np.random.default_rng(seed)
  values = []
  while len(values) < repeats:
    rows = rng.integers(len(labels), size=len(labels))
    if 0 < labels[rows].sum() < len(labels):
      values.append(metric(scores[rows], labels[rows]))
  tail = (1 - level) / 2
  low, high = np.quantile(values, [tail, 1 - tail])
  return float(low), float(high)


# ---- whether scores mean what they say ----


def reliability(probabilities, labels, bins: int = 10) -> dict[str, np.ndarray]:
  """Per bin of equal width over 0..1: mean predicted probability, observed share of accepts
  (both nan where the bin is empty), and the number of statements."""
  probabilities, labels = _checked(probabilities, labels, needs_accept=False)
  if probabilities.min() < 0 or probabilities.max() > 1:
    raise DataError("reliability needs probabilities in 0..1; calibrate the scores first")
  place = np.minimum((probabilities * bins).astype(int), bins - 1)  # 1.0 is in the last bin
  count = np.bincount(place, minlength=bins)
  share = np.where(count > 0, 1 / np.maximum(count, 1), np.nan)
  return {
    "predicted": np.bincount(place, probabilities, bins) * share,
    "observed": np.bincount(place, labels, bins) * share,
    "count": count,
  }


def calibration_error(probabilities, labels, bins: int = 10) -> float:
  """Expected calibration error: the mean over statements of |predicted - observed| of their bin
  (Guo et al. 2017, equation 3)."""
  table = reliability(probabilities, labels, bins)
  gap = np.nan_to_num(np.abs(table["predicted"] - table["observed"]))
  return float(np.sum(gap * table["count"]) / table["count"].sum())


@dataclass(frozen=True)
class Calibration:
  """P(accept) = sigmoid(slope * score + offset)."""

  slope: float
  offset: float


def calibrate(scores, labels, kind: str = "platt") -> Calibration:
  """Fits a Calibration to judgements by maximum likelihood.

  kind: "platt" fits slope and offset (any real scores); "temperature" only the slope (scores that
  are logits). The targets are Platt's smoothed ones, (n+ + 1) / (n+ + 2) and 1 / (n- + 2), so that
  the fit is finite even when the scores separate the judgements perfectly
  (Platt 1999; Newton steps with halving as in Lin, Lin and Weng 2007).
  """
  if kind not in ("platt", "temperature"):
    raise DataError(f"calibration {kind!r} is unknown; choose platt or temperature")
  scores, labels = _checked(scores, labels, both=True)
  # Unit scale: one step size suits logits and sums of log-likelihoods alike.
  center = scores.mean() if kind == "platt" else 0.0
  spread = np.sqrt(np.mean((scores - center) ** 2)) or 1.0
  z = (scores - center) / spread
  inputs = np.stack([z, np.ones_like(z)], axis=1)[:, : 2 if kind == "platt" else 1]
  right = labels.sum()
  targets = np.where(labels == 1, (right + 1) / (right + 2), 1 / (len(labels) - right + 2))

  def loss(weights):
    return np.mean(np.logaddexp(0.0, inputs @ weights) - targets * (inputs @ weights))

  weights = np.zeros(inputs.shape[1])
  for _ in range(100):
    p = sigmoid(inputs @ weights)
    gradient = inputs.T @ (p - targets) / len(z)
    if np.abs(gradient).max() < 1e-12:
      break
    curvature = (inputs * (p * (1 - p))[:, None]).T @ inputs / len(z)
    step = np.linalg.solve(curvature + 1e-12 * np.eye(len(weights)), gradient)
    size = 1.0
    while loss(weights - size * step) > loss(weights) and size > 1e-10:
      size /= 2
    weights = weights - size * step
  slope = weights[0] / spread
  offset = weights[1] - slope * center if kind == "platt" else 0.0
  return Calibration(float(slope), float(offset))


def apply_calibration(calibration: Calibration, scores) -> np.ndarray:
  """P(accept), float64, of scores of any shape."""
  return sigmoid(calibration.slope * np.asarray(scores, np.float64) + calibration.offset)


def sigmoid(x) -> np.ndarray:
  """1 / (1 + exp(-x)) without overflow."""
  return np.exp(-np.logaddexp(0.0, -np.asarray(x, np.float64)))


def logit(probabilities, margin: float = 1e-7) -> np.ndarray:
  """The reverse of sigmoid, for probabilities held `margin` away from 0 and 1."""
  p = np.clip(np.asarray(probabilities, np.float64), margin, 1 - margin)
  return np.log(p) - np.log1p(-p)


# ---- choosing the cut ----


@dataclass(frozen=True)
class Cut:
  """A cut and what it gave on the judgements it was chosen on. precision_low: the lower end of the
  95 % Wilson interval of the precision, which a small sample can make much lower."""

  cut: float
  precision: float
  recall: float
  accepted: float
  precision_low: float
  rule: str


def choose_cut(scores, labels, target_precision: float | None = None, beta: float = 1.0) -> Cut:
  """The cut to filter with; give it judgements that were not used to fit the scores.

  With a target: the lowest cut whose precision reaches it, which keeps most. DataError when none
  does. Without: the cut with the best F_beta = (1 + beta^2) P R / (beta^2 P + R), of equal ones the
  highest; beta below 1 weighs precision more, as suits a corpus that can spare statements.
  """
  curve = precision_recall(scores, labels)
  precision, recall = curve["precision"], curve["recall"]
  if target_precision is None:
    total = beta**2 * precision + recall
    both = (1 + beta**2) * precision * recall
    score = np.divide(both, total, out=np.zeros_like(total), where=total > 0)
    best, rule = int(np.argmax(score)), f"best F{beta:g}"
  else:
    reached = np.flatnonzero(precision >= target_precision)
    if not len(reached):
      top = int(np.argmax(precision))
      found = f"the best is {precision[top]:.3f} at cut {curve['cut'][top]:.3f}"
      raise DataError(f"no cut reaches precision {target_precision}; {found}; lower the target")
    best, rule = int(reached[-1]), f"precision >= {target_precision}"
  accepted = round(curve["accepted"][best] * len(labels))
  return Cut(
    cut=float(curve["cut"][best]),
    precision=float(precision[best]),
    recall=float(recall[best]),
    accepted=float(curve["accepted"][best]),
    precision_low=_wilson_low(precision[best], accepted),
    rule=rule,
  )


def _wilson_low(share: float, count: int, z: float = 1.959964) -> float:
  """Lower end of the Wilson score interval of a share seen in `count` trials."""
  center = share + z * z / (2 * count)
  spread = z * np.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
  return float(max(0.0, (center - spread) / (1 + z * z / count)))


# ---- what is kept ----


def normal_text(statement: Statement) -> str:
  """Question and answer without case, punctuation and spacing; mentions stay. Two statements of
  one image with the same normal text say the same, whatever their rationales."""
  text = unicodedata.normalize("NFKC", f"{statement.question} | {statement.answer}").casefold()
  return " ".join(re.findall(r"\w+|[\[\]|]", text))


def filter_record(
  record: ImageRecord, min_score: float | None = None
) -> list[ImageRecord | DataError]:
  """The record with the statements worth keeping, and a DataError for each that was left out.

  Left out are statements that score below min_score (or have no score to compare), and of those
  that say the same all but the best scored, or the first of equal ones. A record of which no
  statement is left is left out too.
  """
  kept: dict[str, Statement] = {}
  rejected = []

  def reject(statement, reason):
    rejected.append(DataError(f"{record.image}: statement {statement.index}: {reason}"))

  for statement in record.statements:
    if min_score is not None and statement.score is None:
      reject(statement, "has no score; run `lskd corpus score` first")
      continue
    if min_score is not None and not statement.score >= min_score:
      reject(statement, f"score {statement.score:.4f} is below {min_score}")
      continue
    key = normal_text(statement)
    if key in kept:
      statement, worse = sorted((kept[key], statement), key=_score, reverse=True)
      reject(worse, f"says the same as {statement.index}")
    kept[key] = statement
  if not kept:
    return rejected or [DataError(f"{record.image}: has no statements")]
  return [dataclasses.replace(record, statements=tuple(kept.values())), *rejected]


def filter_corpus(
  source: Path | str, out: Path | str, min_score: float | None = None, progress: bool = True
) -> dict:
  """Writes the statements of a finished stage worth keeping as a new stage folder; its
  rejected-*.jsonl say what was left out and why. Returns the summary; DataError when nothing is
  left."""

  def work(record: ImageRecord):
    return filter_record(record, min_score)

  options = {"min_score": min_score}
  summary = stages.run_stage("filter", stages.open_shards(source), work, out, options, progress)
  stages.open_shards(out)
  return summary


def _score(statement: Statement) -> float:
  return -np.inf if statement.score is None else statement.score


def _checked(scores, labels, both: bool = False, needs_accept: bool = True):
  """float64 scores and labels [n], or DataError where a measure would have no meaning."""
  scores = np.asarray(scores, np.float64)
  labels = np.asarray(labels, np.float64)
  if scores.shape != labels.shape or scores.ndim != 1:
    raise ValueError(f"scores {scores.shape} and labels {labels.shape} must be equally long")
  if not len(labels):
    raise DataError("there are no judgements to measure with; run `lskd corpus judge`")
  if not np.isfinite(scores).all():
    raise DataError(f"score {scores[~np.isfinite(scores)][0]} is not finite; score again")
  if not np.isin(labels, (0, 1)).all():
    raise DataError("judgements must be 1 (accept) or 0 (reject)")
  if needs_accept and not labels.any():
    raise DataError(f"none of {len(labels)} judgements accepts its statement; judge more")
  if both and labels.all():
    raise DataError(f"none of {len(labels)} judgements rejects its statement; judge more")
  return scores, labels
