"""The negatives of ITM: other images and texts in proportion to their similarity, and swapped regions.

What is drawn depends on the key, the embeddings and the pools, but neither on the mesh nor on how much of the
similarity matrix is computed at a time: every pair has noise of its own. The candidate with the largest
logit + Gumbel noise is a draw from the softmax (Maddison et al. 2014, A* sampling).
"""
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lskd_jax.contrast import similarity
from lskd_jax.models.student import Student
from lskd_jax.parallel import ACT_B, REPLICATED
from lskd_jax.rows import block_count, by_owner, gathered, in_parts, joined, numbers, pool_axes


class Negatives(NamedTuple):
  """The hard negatives of ITM.

  image: int32[B], the row whose image the statements of each row are shown.
  text: int32[B, S], the statements that each image is shown, numbered row * S + statement.
  has_image, has_text: bool[B], bool[B, S], whether there was one to show.
  """
  image: jax.Array
  text: jax.Array
  has_image: jax.Array
  has_text: jax.Array


def draw_negatives(student: Student, batch: dict, image: jax.Array, text: jax.Array, keys, pool: int = 0,
                   block: int = 0) -> Negatives:
  """Negatives in proportion to exp(similarity / temperature), without gradients.

  One other image per row for all its statements, by the sum of their similarities, and S statements of other
  images for its image, such that every region a statement mentions exists in the image it is shown.

  Args:
    image: float32[B, Q, E]; text: float32[B, S, E]; unit vectors.
    keys: of the images and of the texts.
    pool: a row's negatives are among the rows r with its r // pool; 0 = the whole batch.
    block: as of `contrast.statement_losses`.
  """
  tokens, valid = batch["tokens"], batch["statement_valid"]
  size, texts = valid.shape
  lacks = (~batch["region_valid"]).astype(jnp.float32) * student.config.uses_region_tokens
  mentions = jax.nn.one_hot(student.slots(tokens), lacks.shape[1], dtype=jnp.float32).max(2)
  blocks, (_, within) = block_count(size, block), pool_axes(size, pool)

  @functools.partial(jax.shard_map, in_specs=(*[ACT_B] * 6, *[REPLICATED] * 3), out_specs=ACT_B)
  def on_device(image, text, image_id, valid, lacks, mentions, temperature, image_key, text_key):
    rows = numbers(image_id)

    def draw(_, own):
      text, their_id, exists, mentions, columns = gathered(own, within)
      scores = similarity(image, text) / temperature
      fits = jnp.einsum("csr,br->bcs", mentions, lacks) == 0
      other = image_id[:, None] != their_id
      if pool:
        other &= rows[:, None] // pool == columns // pool
      # Statements of others, shown the image of this row.
      allowed = other[..., None] & fits & exists
      shown = jnp.where(allowed, scores, -jnp.inf)[:, None]
      shown = shown + jnp.moveaxis(noise(text_key, rows, columns, (texts, texts)), 2, 1)
      value, at = _best(shown.reshape(len(rows), texts, -1), -1)
      drawn_text = value, columns[at // texts] * texts + at % texts
      # Images of others, shown the statements of this column: with all the regions they mention.
      allowed = other & (fits | ~exists).all(2)
      shown = jnp.where(allowed, (scores * exists).sum(2), -jnp.inf) + noise(image_key, rows, columns)
      value, at = _best(shown, 0)
      return None, (drawn_text, _first(by_owner((value, rows[at]), within)))
    parts = in_parts((text, image_id, valid, mentions, rows), blocks)
    _, (drawn_text, drawn_image) = jax.lax.scan(draw, None, parts)
    (text_value, text), (image_value, image) = _first(drawn_text), joined(drawn_image)
    return Negatives(image, text, image_value > -jnp.inf, text_value > -jnp.inf)
  fixed = jax.lax.stop_gradient((image, text, student.temperature()))
  return on_device(*fixed[:2], batch["image_id"], valid, lacks, mentions, fixed[2], *keys)


def noise(key, rows: jax.Array, columns: jax.Array, shape: tuple[int, ...] = ()) -> jax.Array:
  """Gumbel noise, a function of (key, row, column): int32[b], int32[c] -> float32[b, c, *shape]."""
  of_pair = lambda row_key, column: jax.random.gumbel(jax.random.fold_in(row_key, column), shape)
  row_keys = jax.vmap(jax.random.fold_in, (None, 0))(key, rows)
  return jax.vmap(jax.vmap(of_pair, (None, 0)), (0, None))(row_keys, columns)


def _best(values, axis: int):
  """The largest along an axis, and where it stands."""
  return values.max(axis), values.argmax(axis)


def _first(drawn):
  """Of candidates along axis 0, pairs of a value and a choice, the one with the largest value."""
  at = drawn[0].argmax(0)[None]
  return tuple(jnp.take_along_axis(candidates, at, 0)[0] for candidates in drawn)


def swapped_regions(boxes: jax.Array, valid: jax.Array, key) -> tuple[jax.Array, jax.Array]:
  """The boxes of each image handed to other slots: the negatives that only pointing can tell.

  A random cyclic shift in a random order of the valid slots, so that no valid slot keeps its box.

  Returns:
    boxes float32[B, R, 4], and bool[B]: whether the image has two regions to swap.
  """
  batch, slots = valid.shape
  noise = jax.random.uniform(key, (batch, slots), out_sharding=ACT_B)
  order = jnp.argsort(jnp.where(valid, noise, 2.0), axis=1)        # valid slots first, shuffled
  count = valid.sum(1)
  place = jnp.arange(slots)[None]
  following = jnp.where(place + 1 < count[:, None], place + 1, 0)  # the next of the cycle
  source = jnp.take_along_axis(order, following, axis=1)
  # order[p] receives the box of order[p + 1]; slots without a region keep what they have.
  is_target = jax.nn.one_hot(order, slots, dtype=boxes.dtype)
  is_target = is_target * (place < count[:, None])[..., None]
  moved = jnp.take_along_axis(boxes, source[..., None], axis=1)
  received = jnp.einsum("bpr,bpc->brc", is_target, moved)
  return jnp.where(valid[..., None], received, boxes), count >= 2
