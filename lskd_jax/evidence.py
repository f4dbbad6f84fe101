"""The critic of kind `evidence`: P(accept) from how likely a student finds a statement.

A student that was trained on unfiltered statements has seen many of them agree about a picture; a
statement that it finds unlikely there is probably false. What is left to learn from judgements is
small: four numbers per statement and the prompt variant that wrote it, through a logistic
regression. So a few hundred judgements are enough where the critic of kind `heads` needs thousands.

Plain NumPy in float64; no JAX.
"""
from collections.abc import Sequence
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_pipeline.filter import sigmoid
from data_pipeline.judge import read_judgements
from data_pipeline.records import DataError
from data_pipeline.texts import ANSWER, RATIONALE

STEPS = 100       # Newton steps at most; a fit takes about eight
CONVERGED = 1e-9  # largest entry of the gradient of the mean loss


class Evidence(NamedTuple):
  """What a student says of one statement, over the tokens of its answer and rationale.

  total, lowest, mean: of their log-likelihoods. tokens: how many they are. source: the statement's
  prompt variant.
  """
  total: float
  lowest: float
  mean: float
  tokens: float
  source: str = ""


def evidence_features(words, fields) -> np.ndarray:
  """(total, lowest, mean, tokens) of statements: float64[..., 4].

  Args:
    words: [..., T] log-likelihood of every token given those before it.
    fields: int[..., T] which part of the statement a token belongs to (`data_pipeline.texts`).
  """
  words = np.asarray(words, np.float64)
  counted = np.isin(fields, (ANSWER, RATIONALE))
  tokens = counted.sum(-1)
  total = np.where(counted, words, 0.0).sum(-1)
  lowest = np.where(counted, words, 0.0).min(-1)  # log-likelihoods are never above 0
  return np.stack([total, lowest, total / np.maximum(tokens, 1), tokens], -1)


@dataclass(frozen=True)
class EvidenceCritic:
  """P(accept) = sigmoid(offset + weights . (x - center) / scale).

  x: the four numbers of `Evidence`, then a 1 for the statement's source among `sources` and 0 for
  the others. judgements: how many it was fitted to; with 0 its scores rank, but are no
  probabilities.
  """
  sources: tuple[str, ...]
  center: tuple[float, ...]
  scale: tuple[float, ...]
  weights: tuple[float, ...]
  offset: float
  judgements: int

  def scores(self, evidence: Sequence[Evidence]) -> np.ndarray:
    """P(accept) of each statement: float64[N]."""
    x = (_inputs(evidence, self.sources) - self.center) / self.scale
    return sigmoid(self.offset + x @ np.array(self.weights))

  def to_json(self) -> dict:
    """The critic as JSON values; `from_json` gives it back exactly."""
    return dataclasses.asdict(self)

  @classmethod
  def from_json(cls, values: dict) -> "EvidenceCritic":
    """The reverse of `to_json`."""
    lists = ("sources", "center", "scale", "weights")
    return cls(**{**values, **{name: tuple(values[name]) for name in lists}})


def read_verdicts(path: Path | str) -> dict[str, int]:
  """{statement index: 1 for accept, 0 for reject} of a judgement file; DataError if it is empty."""
  verdicts = {judgement.index: judgement.accept for judgement in read_judgements(path)}
  if not verdicts:
    raise DataError(f"{path}: holds no judgement; fill in `accept` with 1 or 0")
  return verdicts


def fit_evidence(evidence: Sequence[Evidence], labels: Sequence[int],
                 l2: float = 1.0) -> EvidenceCritic:
  """Fits the critic to judgements by penalised maximum likelihood.

  Minimises sum_i logloss_i + l2 / 2 |weights|^2 over standardised inputs, the offset unpenalised,
  by Newton's method (iteratively reweighted least squares). The targets are Platt's (1999),
  (n+ + 1) / (n+ + 2) for accept and 1 / (n- + 2) for reject, so that a handful of judgements, or
  judgements that all agree, give no infinite offset and no certainty.

  Args:
    labels: 1 = accept, 0 = reject.
    l2: strength of the penalty. Inputs have unit variance, so 1 is a weak prior.

  Raises:
    DataError: there are no judgements, or one of the numbers is not finite.
  """
  labels = np.asarray(labels, np.float64)
  if len(evidence) != len(labels):
    raise ValueError(f"{len(evidence)} statements and {len(labels)} labels must be equally many")
  if not len(labels):
    raise DataError("there are no judgements to fit a critic to; run `lskd corpus judge`")
  if not np.isin(labels, (0, 1)).all():
    raise DataError("judgements must be 1 (accept) or 0 (reject)")
  sources = tuple(sorted({item.source for item in evidence}))
  x = _inputs(evidence, sources)
  center, scale = x.mean(0), x.std(0)
  scale = np.where(scale > 1e-12, scale, 1.0)  # an input that never varies tells nothing
  x = np.concatenate([(x - center) / scale, np.ones((len(x), 1))], 1)
  right = labels.sum()
  targets = np.where(labels == 1, (right + 1) / (right + 2), 1 / (len(labels) - right + 2))
  penalty = np.append(np.full(x.shape[1] - 1, l2), 0.0)

  def loss(w):
    return np.sum(np.logaddexp(0.0, x @ w) - targets * (x @ w)) + 0.5 * np.sum(penalty * w * w)

  weights = np.zeros(x.shape[1])
  for _ in range(STEPS):
    p = sigmoid(x @ weights)
    gradient = x.T @ (p - targets) + penalty * weights
    if np.abs(gradient).max() < CONVERGED * len(x):
      break
    curvature = (x * (p * (1 - p))[:, None]).T @ x + np.diag(penalty + 1e-12)
    step = np.linalg.solve(curvature, gradient)
    size = 1.0
    while loss(weights - size * step) > loss(weights) and size > 1e-8:
      size /= 2
    weights = weights - size * step
  return EvidenceCritic(sources, *map(_floats, (center, scale, weights[:-1])), float(weights[-1]),
                        len(labels))


def uncalibrated(evidence: Sequence[Evidence]) -> EvidenceCritic:
  """The critic to use without judgements: the sigmoid of the mean log-likelihood's z-score.

  It ranks statements; its scores are no probabilities, and half of them are above 0.5 whatever the
  statements are worth.
  """
  if not len(evidence):
    raise DataError("there are no statements to score")
  x = _inputs(evidence, ())
  scale = np.where(x.std(0) > 1e-12, x.std(0), 1.0)
  return EvidenceCritic((), _floats(x.mean(0)), _floats(scale), (0.0, 0.0, 1.0, 0.0), 0.0, 0)


def cross_scores(evidence: Sequence[Evidence], labels: Sequence[int], groups: Sequence,
                 l2: float = 1.0, folds: int = 5, seed: int = 0) -> np.ndarray:
  """P(accept) of judged statements, each by a critic that saw no judgement of its group.

  These scores may choose a threshold on the very judgements that the critic was fitted to.

  Args:
    groups: what must not be split, such as each statement's image.

  Raises:
    DataError: fewer than two groups.
  """
  names = sorted(set(groups))
  if len(names) < 2:
    raise DataError(f"{len(names)} judged images are too few; judge statements of two or more")
  folds = min(folds, len(names))
  fold_of = dict(zip(names, np.random.default_rng(seed).permutation(len(names)) % folds))
  fold = np.array([fold_of[name] for name in groups])
  labels = np.asarray(labels)
  scores = np.zeros(len(labels))
  for k in range(folds):
    rest, held = np.flatnonzero(fold != k), np.flatnonzero(fold == k)
    critic = fit_evidence([evidence[i] for i in rest], labels[rest], l2)
    scores[held] = critic.scores([evidence[i] for i in held])
  return scores


def _inputs(evidence: Sequence[Evidence], sources: tuple[str, ...]) -> np.ndarray:
  """float64[N, 4 + len(sources)]."""
  numbers = np.array([item[:4] for item in evidence], np.float64).reshape(-1, 4)
  if not np.isfinite(numbers).all():
    raise DataError("a statement's log-likelihood is not finite; train the student again")
  own = np.array([[item.source == name for name in sources] for item in evidence], np.float64)
  return np.concatenate([numbers, own.reshape(len(numbers), len(sources))], 1)


def _floats(values) -> tuple[float, ...]:
  return tuple(float(value) for value in values)
