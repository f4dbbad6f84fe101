"""What the decoders share: prompts read once, continuations written token by token, and attention to
both.

A decoder reads a batch of B prompts into a `Memory`. Every prompt then has S continuations (the
candidates of a choice, or the beams of a search) that all see its memory, which is therefore never
copied. What they write is kept in a `Cache`: place by place, S rows each. A row sees the places of the
rows it descends from (`lineage`), so a beam that branches off another shares its past instead of
copying it. Heads stand before tokens, so that attention is plain batched matrix products.
Axes: L blocks, h heads of width k, P tokens of a prompt, T of a continuation, G places of a cache.

Both decoders are used the same way:

  decoder.embed(tokens)                  int32[...] -> float32[..., E]
  decoder.read(prompt, real)             [B, P, E], bool[B, P] -> Memory
  decoder.cache(batch, rows, places)     -> an empty Cache
  decoder.write(memory, x)               [B, S, T, E] -> states [B, S, T, D], None: whole texts
  decoder.write(memory, x, cache, at, lineage)  the next T tokens of each row -> states, Cache
  decoder.parts()                        -> what a loop hands to `write`, so that blocks are cut once
  decoder.logits(states)                 [..., D] -> float32[..., V]
"""
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lskd_jax.models import layers
from lskd_jax.parallel import ACT_B, ACT_BSTHK, BATCH


class Memory(NamedTuple):
  """Prompts as their continuations need them.

  keys, values: [L, B, h, P, k]; real: bool[B, P], False = padding.
  """
  keys: jax.Array
  values: jax.Array
  real: jax.Array


class Cache(NamedTuple):
  """The self-attention keys and values of what is written: [L, B, h, G, S, k] each."""
  keys: jax.Array
  values: jax.Array


class Source(NamedTuple):
  """Something to attend to.

  keys, values: [B, h, U, k], shared by all S, or [B, S, h, U, k]. mask: bool broadcastable to
  [B, S, h, T, U], True where attention is allowed, or None. bias: float32 of such a shape, added to
  the scaled scores, or None.
  """
  keys: jax.Array
  values: jax.Array
  mask: jax.Array | None = None
  bias: jax.Array | None = None


def attend(queries: jax.Array, sources: list[Source], scale: float) -> jax.Array:
  """One softmax, in float32, over the keys of all sources (Vaswani et al. 2017).

  queries: [B, S, h, T, k] -> [B, S, h, T, k].
  """
  scores = []
  for keys, _, mask, bias in sources:
    shape = "bhuk" if keys.ndim == 4 else "bshuk"
    found = jnp.einsum(f"bshtk,{shape}->bshtu", queries, keys, preferred_element_type=jnp.float32)
    found = found * scale if bias is None else found * scale + bias
    scores.append(found if mask is None else jnp.where(mask, found, layers.MASKED))
  weights = jax.nn.softmax(scores[0] if len(scores) == 1 else jnp.concatenate(scores, -1), -1)
  seen, start = 0, 0
  for source in sources:
    shape = "bhuk" if source.values.ndim == 4 else "bshuk"
    share = weights[..., start:start + source.keys.shape[-2]].astype(source.values.dtype)
    seen += jnp.einsum(f"bshtu,{shape}->bshtk", share, source.values)
    start += source.keys.shape[-2]
  return seen


def empty_cache(depth: int, batch: int, heads: int, places: int, rows: int, width: int,
                dtype) -> Cache:
  """A Cache for `places` tokens of `rows` continuations of each of `batch` prompts."""
  shape = (depth, batch, heads, places, rows, width)
  spec = jax.P(None, BATCH, "tensor")
  return Cache(*(jnp.zeros(shape, dtype, out_sharding=spec) for _ in range(2)))


def split_heads(dense: layers.Dense, x: jax.Array) -> jax.Array:
  """[B, S, T, D] -> [B, S, h, T, k]."""
  return dense(x, ACT_BSTHK).swapaxes(2, 3)


def own_source(keys: jax.Array, values: jax.Array, bias=None, cache: Cache | None = None,
               layer=None, at=None, lineage=None) -> tuple[Source, Cache | None]:
  """What continuations see of themselves in one block, and the cache with the new tokens in it.

  Args:
    keys, values: [B, S, h, T, k] of the new tokens, each of which sees those before it.
    bias: float32[h, T, T], or with a cache float32[h, T, G], or None.
    cache: of all blocks, of which `layer` is meant; None = the new tokens are all there is.
    at: the place of the first new token. lineage: bool[B, S, G, S], whether row s descends from row s'
      at place g; None = from itself.
  """
  tokens = keys.shape[3]
  if cache is None:
    return Source(keys, values, jnp.tril(jnp.ones((tokens, tokens), bool)), bias), None

  def put(old, new):
    new = new.transpose(0, 2, 3, 1, 4)[None].astype(old.dtype)  # [1, B, h, T, S, k]
    return jax.lax.dynamic_update_slice(old, new, (layer, 0, 0, at, 0, 0))
  cache = Cache(put(cache.keys, keys), put(cache.values, values))
  _, batch, heads, places, rows, width = cache.keys.shape
  lineage = jnp.eye(rows, dtype=bool)[None, :, None] if lineage is None else lineage
  before = jnp.arange(places) <= at + jnp.arange(tokens)[:, None]
  mask = lineage[:, :, None] & before[None, None, :, :, None]
  mask = jnp.broadcast_to(mask, (batch, rows, tokens, places, rows), out_sharding=ACT_B)
  mask = layers.reshape(mask, batch, rows, 1, tokens, places * rows)

  def of_block(whole):
    block = jax.lax.dynamic_index_in_dim(whole, layer, keepdims=False)
    return jax.lax.reshape(block, (batch, heads, places * rows, width),
                           out_sharding=jax.P(BATCH, "tensor"))
  bias = None if bias is None else jnp.repeat(bias, rows, -1)
  return Source(of_block(cache.keys), of_block(cache.values), mask, bias), cache
