"""Image-text contrast over the batch of all devices, a block of the similarity matrix at a time.

Each device compares its own images with the statements of all. What a statement needs to know of other
devices' images, three numbers from each device, is sent to its owner: images' embeddings stay where they are.
Axes as in models/student.py; b are the rows of one device, c those of a block.
"""
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lskd_jax.parallel import ACT_B, BATCH, REPLICATED
from lskd_jax.rows import block_count, by_owner, gathered, in_parts, joined

ABSENT = -1e9  # a logit whose exponential is 0; infinities would make gradients NaN


class Others(NamedTuple):
  """What a cross-entropy needs of its negatives: log-sum-exp and sum of the logits, and their number."""
  logsumexp: jax.Array
  total: jax.Array
  count: jax.Array


def similarity(image: jax.Array, text: jax.Array) -> jax.Array:
  """max over queries of the cosine, on one device: float32[b, Q, E], [c, S, E] -> float32[b, c, S]."""
  return jnp.einsum("bqe,cse->bqcs", image, text).max(1)


def statement_losses(image: jax.Array, text: jax.Array, image_id: jax.Array, valid: jax.Array, temperature,
                     smoothing: float, detach: bool = False, block: int = 0) -> jax.Array:
  """The contrastive loss of each statement, both directions averaged.

  Image to text: the statement among all statements of other images. Text to image: its image among all other
  images. With one statement per image and distinct images this is LAVIS's loss: cross-entropy against
  (1 - smoothing) one-hot + smoothing / N.

  Args:
    image: float32[B, Q, E]; text: float32[B, S, E]; unit vectors.
    image_id: int32[B]; rows of one image are not each other's negatives.
    valid: bool[B, S] statements that exist.
    detach: the gradient reaches the image in image-to-text and the text in text-to-image alone.
    block: images whose statements are compared at a time, forward and backward: a device holds
      [b, Q, block, S] cosines. 0 = all.

  Returns:
    float32[B, S], of statements that do not exist something finite.

  Raises:
    ValueError: block does not divide the batch or a device's part of it.
  """
  stop = jax.lax.stop_gradient if detach else lambda x: x
  blocks = block_count(len(image), block)

  @functools.partial(jax.shard_map, in_specs=(ACT_B, ACT_B, ACT_B, ACT_B, REPLICATED), out_specs=ACT_B)
  def on_device(image, text, image_id, valid, temperature):
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def compare(_, own):
      text, theirs, exists = gathered(own, BATCH)
      other = (image_id[:, None] != theirs)[..., None] & exists
      to_text = to_image = similarity(image, stop(text)) / temperature
      if detach:
        to_image = similarity(stop(image), text) / temperature
      return None, (_others(to_text, other, (1, 2)), _all(by_owner(_others(to_image, other, 0), BATCH)))
    _, (texts, images) = jax.lax.scan(compare, None, in_parts((text, image_id, valid), blocks))
    own = lambda image, text: jnp.einsum("bqe,bse->bqs", image, text).max(1) / temperature
    per_image = jax.tree.map(lambda x: x[:, None], _all(texts))
    return (_cross_entropy(own(image, stop(text)), per_image, smoothing)
            + _cross_entropy(own(stop(image), text), joined(images), smoothing)) / 2
  return on_device(image, text, image_id, valid, temperature)


def _others(logits, other, axes) -> Others:
  return Others(jax.nn.logsumexp(jnp.where(other, logits, ABSENT), axes),
                jnp.where(other, logits, 0).sum(axes), other.sum(axes).astype(jnp.float32))


def _all(parts: Others) -> Others:
  """Of several sets of negatives, along axis 0, that of their union."""
  return Others(jax.nn.logsumexp(parts.logsumexp, 0), parts.total.sum(0), parts.count.sum(0))


def _cross_entropy(positive, others: Others, smoothing: float):
  smooth = (positive + others.total) / (1 + others.count)
  return jnp.logaddexp(positive, others.logsumexp) - (1 - smoothing) * positive - smoothing * smooth
