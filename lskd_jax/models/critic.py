"""The critic of kind `heads`: the paper's, three heads on the fused pass.

P(accept) of a statement is its score; the auxiliary heads predict the judgement's answer and
rationale sub-scores. Logits and auxiliary values are means over the queries.
"""
from flax import nnx
import jax
import jax.numpy as jnp

from lskd_jax.models import layers
from lskd_jax.models.student import Student


class ScoreHead(nnx.Module):
  """Linear, ReLU, Linear to one value: [..., D] -> [...]."""

  def __init__(self, width: int, rngs):
    self.hidden = layers.Dense((width,), (width,), jax.P("fsdp", None), rngs)
    self.out = layers.Dense((width,), (1,), jax.P("fsdp", None), rngs)

  def __call__(self, x):
    return self.out(jax.nn.relu(self.hidden(x)))[..., 0]


class Critic(nnx.Module):
  """A student's fused pass with the accept, answer and rationale heads."""

  def __init__(self, student: Student, rngs):
    width = student.config.qformer.width
    self.student = student
    self.accept = layers.Dense((width,), (2,), jax.P("fsdp", None), rngs)
    self.answer = ScoreHead(width, rngs)
    self.rationale = ScoreHead(width, rngs)

  def __call__(self, batch: dict, key=None):
    """A batch with `features` or `image` -> accept logits [B, S, 2], answer and rationale [B, S]."""
    student = self.student
    features = batch["features"] if "features" in batch else student.vit(batch["image"])
    sight = student.see(features, batch["boxes"], batch["region_valid"], once=True)
    key = key if student.config.qformer.dropout else None
    states = student.fuse(sight, batch["tokens"], key).astype(jnp.float32)
    return self.accept(states).mean(2), self.answer(states).mean(2), self.rationale(states).mean(2)
