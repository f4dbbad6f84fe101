"""Scores of candidate texts for an image: what choosing, ranking and filtering are made of.

Heads, each "higher is better" (Li et al. 2023; LSKD does not say which one it used, so all are
computed and every result names its head):

  itm      the match logit of the fused pass, mean over queries
  itc      max over queries of the cosine of image and text embedding
  itm+itc  their sum, as LAVIS ranks retrieval
  lm       sum of the log-likelihoods of the candidate's own words in the causal pass, or of a
           generative student's decoder, which has this head alone

The arithmetic after the network is float64 on the host.
"""
from collections.abc import Iterable, Iterator

from flax import nnx
import jax
import numpy as np
from tqdm import tqdm

from lskd_jax import losses, parallel
from lskd_jax.models.generative import GenerativeConfig, GenerativeStudent, shifted
from lskd_jax.models.student import Student

HEADS = ("itm", "itc", "itm+itc", "lm")


class Scorer:
  """Scores texts with one student of either kind; compiles once per shape of the input.

  Args:
    graph, state: of the student, as `models.build.load` returns them.
    heads: False computes the causal pass alone, several times cheaper; only `lm` and `words` then. A
      generative student has nothing else.
  """

  def __init__(self, graph, state, heads: bool = True):
    self.state = state
    self.config = nnx.merge(graph, state).config
    writes = isinstance(self.config, GenerativeConfig)
    self.heads = heads = heads and not writes
    self._see = jax.jit(lambda state, image: nnx.merge(graph, state).vit(image))

    @jax.jit
    def score(state, batch):
      student: Student | GenerativeStudent = nnx.merge(graph, state)
      features = batch["features"] if "features" in batch else student.vit(batch["image"])
      sight = student.see(features, batch["boxes"], batch["region_valid"])
      tokens = batch["tokens"]
      if writes:
        taught = student.teach(sight, student.read_image(sight), tokens, batch["fields"])
        words = losses.word_likelihoods(taught.logits, taught.tokens)
        return {"words": shifted(words, -taught.moved, 0.0)}  # to where each token came
      states, cache = student.read_image(sight)
      logits = student.predict_words(sight, cache, tokens)
      found = {"words": losses.word_likelihoods(logits, tokens)}
      if heads:
        image, text = student.embed_image(states), student.embed_text(tokens)
        found["itc"] = jax.numpy.einsum("bqe,bse->bqs", image, text).max(1)
        found["itm"] = student.match(sight, tokens)
      return found
    self._score = score

  def __call__(self, rows: dict) -> dict[str, np.ndarray]:
    """Scores a batch of numpy rows.

    Args:
      rows: `features` [B, N, C] or `image`, `boxes`, `region_valid`, `tokens` [B, S, T]; for a
        generative student also `fields` [B, S, T].

    Returns:
      words float64[B, S, T], log-likelihood of every token (0 for those that a decoder reads and does
      not write), and with heads: itc float64[B, S],
      itm float64[B, S] the match logit, match float64[B, S] = P(match).
    """
    batch = parallel.put_batch(rows, jax.sharding.get_mesh())
    found = {name: np.asarray(value, np.float64)
             for name, value in self._score(self.state, batch).items()}
    if self.heads:
      logits = found["itm"]
      found["match"] = 1 / (1 + np.exp(logits[..., 0] - logits[..., 1]))
      found["itm"] = logits[..., 1]
      found["itm+itc"] = found["itm"] + found["itc"]
    return found

  def features(self, image: np.ndarray, batch: int = 64) -> np.ndarray:
    """The ViT's tokens of every picture: uint8[N, H, W, 3] -> float32[N, 1 + rows * columns, C]."""
    mesh = jax.sharding.get_mesh()
    parts = [np.asarray(self._see(self.state, parallel.put_batch(rows, mesh)["image"]))
             for rows in in_batches({"image": image}, batch)]
    return np.concatenate(parts)[:len(image)]

  def many(self, rows: dict, batch: int, label: str = "") -> dict[str, np.ndarray]:
    """As a call, for any number of rows, `batch` at a time; the last batch is padded, not shown.

    label: of a progress bar; "" = none.
    """
    size = len(next(iter(rows.values())))
    batches = tqdm(in_batches(rows, batch), label, -(-size // batch), unit="batch", leave=False,
                   disable=not label)
    parts = [self(part) for part in batches]
    return {name: np.concatenate([part[name] for part in parts])[:size] for name in parts[0]}


def in_batches(rows: dict, batch: int) -> Iterator[dict]:
  """Slices of `batch` rows; the last is filled up with its own first row."""
  size = len(next(iter(rows.values())))
  for start in range(0, size, batch):
    take = np.arange(start, start + batch)
    take[take >= size] = start
    yield {name: values[take] for name, values in rows.items()}


def sum_over(words: np.ndarray, fields: np.ndarray, wanted: Iterable[int]) -> np.ndarray:
  """Sum of the log-likelihoods of the tokens in the wanted fields: [..., T] -> [...]."""
  return np.where(np.isin(fields, list(wanted)), words, 0).sum(-1)


def mean_over(words: np.ndarray, fields: np.ndarray, wanted: Iterable[int]) -> np.ndarray:
  """Their mean; 0 where a text has none."""
  count = np.isin(fields, list(wanted)).sum(-1)
  return sum_over(words, fields, wanted) / np.maximum(count, 1)
