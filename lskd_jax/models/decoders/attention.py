"""What the decoders share: prompts read once, continuations written token by token, and attention to
both.

A decoder reads a batch of B prompts into a `Memory`. Every prompt then has S continuations (the
candidates of a choice, or the beams of a search) that all see its memory, which is therefore never
copied; each continuation has rows of its own in a `Cache`. Heads stand before tokens, so that
attention is plain batched matrix products. Axes: L blocks, h heads of width k, P tokens of a prompt,
T of a continuation, G places of a cache.

Both decoders are used the same way:

  decoder.embed(tokens)                        int32[...] -> float32[..., E]
  decoder.read(prompt, real)                   [B, P, E], bool[B, P] -> Memory
  decoder.cache(batch, rows, places)           -> an empty Cache
  decoder.write(memory, x, cache=None, at=0)   [B, S, T, E] -> states [B, S, T, D], Cache
  decoder.logits(states)                       [..., D] -> float32[..., V]
"""
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lskd_jax.models import layers
from lskd_jax.parallel import ACT_BSTHK


class Memory(NamedTuple):
  """Prompts as their readers need them.

  keys, values: [L, B, h, P, k]; real: bool[B, P], False = padding.
  """
  keys: jax.Array
  values: jax.Array
  real: jax.Array


class Cache(NamedTuple):
  """The self-attention keys and values of what is being written: [L, B, S, h, G, k] each."""
  keys: jax.Array
  values: jax.Array


def empty_cache(depth: int, batch: int, rows: int, heads: int, places: int, width: int, dtype) -> Cache:
  """A cache that holds nothing yet, L, B, S, h, G and k given; split as what will be put there."""
  spec = jax.P(None, "fsdp", None, "tensor", None, None)
  make = lambda: jnp.zeros((depth, batch, rows, heads, places, width), dtype, out_sharding=spec)
  return Cache(make(), make())


def split_heads(dense: layers.Dense, x: jax.Array) -> jax.Array:
  """[B, S, T, D] -> [B, S, h, T, k]."""
  return dense(x, ACT_BSTHK).swapaxes(2, 3)


def attend(queries: jax.Array, sources: list[tuple], scale: float) -> jax.Array:
  """One softmax over the keys of several sources (Vaswani et al. 2017).

  Args:
    queries: [B, S, h, T, k].
    sources: (keys, values, mask, bias) each. keys, values: [B, h, U, k], shared by all S, or
      [B, S, h, U, k]. mask: bool broadcastable to [B, S, h, T, U], True where attention is allowed, or
      None. bias: float32 of such a shape, added to the scaled scores, or None.
    scale: of the scores.

  Returns:
    [B, S, h, T, k]; the softmax is float32.
  """
  scores = []
  for keys, _, mask, bias in sources:
    shape = "bhuk" if keys.ndim == 4 else "bshuk"
    found = jnp.einsum(f"bshtk,{shape}->bshtu", queries, keys, preferred_element_type=jnp.float32)
    found = found * scale if bias is None else found * scale + bias
    scores.append(found if mask is None else jnp.where(mask, found, layers.MASKED))
  weights = jax.nn.softmax(scores[0] if len(scores) == 1 else jnp.concatenate(scores, -1), -1)
  seen, start = 0, 0
  for keys, values, _, _ in sources:
    shape = "bhuk" if values.ndim == 4 else "bshuk"
    share = weights[..., start:start + keys.shape[-2]].astype(values.dtype)
    seen += jnp.einsum(f"bshtu,{shape}->bshtk", share, values)
    start += keys.shape[-2]
  return seen


def remember(cache: tuple | None, keys: jax.Array, values: jax.Array, at) -> tuple:
  """Own keys and values of T new tokens, at places `at` and following of a block's cache.

  Args:
    cache: (keys, values) [B, S, h, G, k] of one block, or None: the new tokens are all there is.
    keys, values: [B, S, h, T, k].

  Returns:
    (keys, values) to attend to, which is also the block's new cache.
  """
  if cache is None:
    return keys, values
  return tuple(jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), at, axis=3)
               for old, new in zip(cache, (keys, values)))


def causal_mask(tokens: int, places: int, at) -> jax.Array:
  """bool[T, G]: token t of those written from place `at` on sees the places up to its own."""
  return jnp.arange(places) <= (jnp.arange(tokens) + at)[:, None]
