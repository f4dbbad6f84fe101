"""Q-Former: a BERT whose learned queries read an image (Li et al. 2023, BLIP-2).

Post-norm BERT blocks with one self-attention shared by queries and text, feed-forwards of their
own for queries and for text, and cross-attention to the image for query rows in the first of every
`cross_every` blocks. Four passes share the weights:

  queries  queries see each other and the image; returns their hidden states and, per block, their
           self-attention keys and values (the cache of the causal pass)
  text     text alone, bidirectional
  fused    queries and text see each other, queries see the image
  causal   text sees the cached queries and the text before it; also token by token, after a prompt
           (`read_prompt`, `write`)

Several texts of one image share everything of the image: cross-attention keys and values are
computed once per image and pass. Axes: B images, S texts of an image, T tokens, Q queries,
N image tokens, h heads of width k.
"""
import dataclasses
from typing import Any, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp

from lskd_jax.models import layers
from lskd_jax.models.decoders import attention
from lskd_jax.models.decoders.attention import Cache, Memory, Source
from lskd_jax.parallel import ACT_B, ACT_BSTHK, ACT_BTHK, REPLICATED, W_DHK, W_HKD, W_VD


@dataclasses.dataclass(frozen=True)
class QFormerConfig:
  vocabulary: int = 30523
  width: int = 768
  depth: int = 12
  heads: int = 12
  hidden: int = 3072
  queries: int = 32
  cross_every: int = 2        # cross-attention in blocks 0, 2, 4 …
  max_tokens: int = 512       # text positions
  text: bool = True           # False: queries alone, as a generative student has it
  eps: float = 1e-12
  dropout: float = 0.0
  remat: str = "none"
  scan: bool = True


class ImageTokens(NamedTuple):
  """A batch of images whose keys and values each block makes when it gets there: for a single pass.

  features: [B, N, C]; region_tokens: [B, M, C] or None; region_valid: bool[B, M] or None.
  """
  features: jax.Array
  region_tokens: Any = None
  region_valid: Any = None


class ImageMemory(NamedTuple):
  """The cross-attention keys and values of a batch of images, one leading entry per block pair.

  keys, values: [G, B, N, h, k]; region_keys, region_values: [G, B, R * 9, h, k] or None;
  region_valid: bool[B, R * 9] or None.
  """
  keys: jax.Array
  values: jax.Array
  region_keys: Any = None
  region_values: Any = None
  region_valid: Any = None


def _add_and_norm(x, update, norm):
  """Post-norm residual: normalised in float32, handed on in the compute dtype, as a scan needs."""
  return norm(x + update).astype(x.dtype)


class SelfAttention(nnx.Module):
  """norm(x + out(attend(x))): the sub-layer of every block."""

  def __init__(self, config: QFormerConfig, rngs, dtype):
    head = config.width // config.heads
    make = lambda: layers.Dense((config.width,), (config.heads, head), W_DHK, rngs, dtype=dtype)
    self.query, self.key, self.value = make(), make(), make()
    self.out = layers.Dense((config.heads, head), (config.width,), W_HKD, rngs, dtype=dtype)
    self.norm = layers.layer_norm(config.width, config.eps, rngs)

  def __call__(self, x, mask, cache, key, rate):
    """x: [B, S, T, D]; cache: (keys, values) [B, Q, h, k] or None -> new x, own (keys, values)."""
    q, k, v = (dense(x, ACT_BSTHK) for dense in (self.query, self.key, self.value))
    all_keys, all_values = k, v
    if cache is not None:  # every text of an image sees the same cached queries
      shape = (*x.shape[:2], *cache[0].shape[1:])
      keys, values = (jnp.broadcast_to(a[:, None], shape, out_sharding=ACT_BSTHK) for a in cache)
      all_keys, all_values = (jnp.concatenate(pair, 2) for pair in ((keys, k), (values, v)))
    out = layers.attend(q, all_keys, all_values, mask, layers.fold_in(key, 0), rate)
    x = _add_and_norm(x, layers.dropout(self.out(out), rate, layers.fold_in(key, 1)), self.norm)
    return x, (k, v)


class CrossAttention(nnx.Module):
  """norm(x + out(attend(x, image) + tanh(gate) attend(x, regions))): query rows only (site Q)."""

  def __init__(self, config: QFormerConfig, vision: int, rngs, dtype):
    head = config.width // config.heads
    self.query = layers.Dense((config.width,), (config.heads, head), W_DHK, rngs, dtype=dtype)
    self.key = layers.Dense((vision,), (config.heads, head), W_DHK, rngs, dtype=dtype)
    self.value = layers.Dense((vision,), (config.heads, head), W_DHK, rngs, dtype=dtype)
    self.out = layers.Dense((config.heads, head), (config.width,), W_HKD, rngs, dtype=dtype)
    self.norm = layers.layer_norm(config.width, config.eps, rngs)
    self.gate = layers.constant(0.0, (config.heads,))  # gamma of site Q

  def memory(self, images: ImageTokens) -> ImageMemory:
    """This block's entry of ImageMemory."""
    keys_values = lambda x: (self.key(x, ACT_BTHK), self.value(x, ACT_BTHK))
    regions = (None, None) if images.region_tokens is None else keys_values(images.region_tokens)
    return ImageMemory(*keys_values(images.features), *regions, images.region_valid)

  def __call__(self, x, memory: ImageMemory, key, rate):
    """x: [B, S, Q, D]; memory: one block's entry -> [B, S, Q, D]."""
    batch, texts, queries, width = x.shape
    # All texts' queries are rows that read one image.
    rows = layers.reshape(x, batch, 1, texts * queries, width)
    q = self.query(rows, ACT_BSTHK)
    keys, values = memory.keys[:, None], memory.values[:, None]
    seen = layers.attend(q, keys, values, None, layers.fold_in(key, 0), rate)
    if memory.region_keys is not None:
      mask = memory.region_valid[:, None, None, None, :]
      keys, values = memory.region_keys[:, None], memory.region_values[:, None]
      regions = layers.attend(q, keys, values, mask)
      # Rows of an image without regions are exactly zero, not softmax over nothing.
      any_region = memory.region_valid.any(-1)[:, None, None, None, None]
      gate = jnp.tanh(self.gate[...])[:, None]
      seen += (gate * jnp.where(any_region, regions, 0)).astype(seen.dtype)
    out = layers.reshape(self.out(seen), *x.shape)
    return _add_and_norm(x, layers.dropout(out, rate, layers.fold_in(key, 1)), self.norm)


class FeedForward(nnx.Module):
  """norm(x + mlp(x))."""

  def __init__(self, config: QFormerConfig, rngs, dtype):
    self.mlp = layers.Mlp(config.width, config.hidden, rngs, dtype)
    self.norm = layers.layer_norm(config.width, config.eps, rngs)

  def __call__(self, x, key, rate):
    return _add_and_norm(x, layers.dropout(self.mlp(x), rate, key), self.norm)


class Block(nnx.Module):
  """One block; `vision` is the width of the image tokens, None = a block without cross-attention."""

  def __init__(self, config: QFormerConfig, vision: int | None, rngs, dtype):
    self.attention = SelfAttention(config, rngs, dtype)
    self.cross = CrossAttention(config, vision, rngs, dtype) if vision else None
    self.query_forward = FeedForward(config, rngs, dtype)
    self.text_forward = FeedForward(config, rngs, dtype) if config.text else None
    self.rate = config.dropout

  def __call__(self, queries, text, mask, cache, memory, key):
    """Queries, text or both (either may be None) through the block.

    Args:
      queries: [B, S, Q, D]; text: [B, S, T, D].
      mask: bool, broadcastable to [B, S, h, rows, columns]: rows [queries; text], columns
        [cached queries; queries; text].
      cache: the block's cached query keys and values, for the causal pass.
      memory: the block's entry of ImageMemory.

    Returns:
      queries, text, and the rows' self-attention keys and values.
    """
    rows = [x for x in (queries, text) if x is not None]
    x = jnp.concatenate(rows, axis=2) if len(rows) > 1 else rows[0]
    x, keys_values = self.attention(x, mask, cache, layers.fold_in(key, 0), self.rate)
    split = 0 if queries is None else queries.shape[2]
    if queries is not None:
      queries = x[:, :, :split]
      if self.cross is not None:
        queries = self.cross(queries, memory, layers.fold_in(key, 1), self.rate)
      queries = self.query_forward(queries, layers.fold_in(key, 2), self.rate)
    if text is not None:
      text = self.text_forward(x[:, :, split:], layers.fold_in(key, 3), self.rate)
    return queries, text, keys_values

  def write(self, text, memory: Source, own):
    """Text that sees the prompt's entry of the block and itself, as decoders write it.

    text: [B, S, T, D]; own: (keys, values) [B, S, h, T, k] -> Source, cache. Returns text, cache.
    """
    part = self.attention
    q, k, v = (attention.split_heads(dense, text) for dense in (part.query, part.key, part.value))
    source, cache = own(k, v)
    seen = attention.attend(q, [memory, source], q.shape[-1]**-0.5)
    text = _add_and_norm(text, part.out(seen.swapaxes(2, 3)), part.norm)
    return self.text_forward(text, None, 0.0), cache


class Group(nnx.Module):
  """A block with cross-attention and the `cross_every - 1` blocks after it: what the stack scans."""

  def __init__(self, config: QFormerConfig, vision: int, rngs, dtype, size: int | None = None):
    size = config.cross_every if size is None else size
    self.blocks = nnx.List([Block(config, None if i else vision, rngs, dtype) for i in range(size)])

  def __call__(self, queries, text, mask, caches, memory, key):
    """As Block; caches and the returned keys and values have a leading axis of blocks."""
    own = []
    for i, block in enumerate(self.blocks):
      cache = None if caches is None else jax.tree.map(lambda a: a[i], caches)
      queries, text, keys_values = block(queries, text, mask, cache, memory,
                                         layers.fold_in(key, i))
      own.append(keys_values)
    return queries, text, jax.tree.map(lambda *a: jnp.stack(a), *own)


class QFormer(nnx.Module):
  """The four passes over one set of weights; `vision` is the width C of the image tokens."""

  def __init__(self, config: QFormerConfig, vision: int, rngs, dtype=jnp.float32):
    if config.depth % config.cross_every:
      raise ValueError(f"qformer.depth={config.depth} is not a multiple of "
                       f"qformer.cross_every={config.cross_every}")
    self.config = config
    self.dtype = dtype
    if config.text:
      self.words = layers.normal(rngs.params(), (config.vocabulary, config.width), W_VD)
      self.positions = layers.normal(rngs.params(), (config.max_tokens, config.width), REPLICATED)
    self.query_tokens = layers.normal(rngs.params(), (config.queries, config.width), REPLICATED)
    self.norm = layers.layer_norm(config.width, config.eps, rngs)
    self.stack = layers.Stack(lambda rngs: Group(config, vision, rngs, dtype),
                              config.depth // config.cross_every, rngs,
                              remat=config.remat, scan=config.scan, shared=True)

  def embed_text(self, tokens: jax.Array, mention=None, places=None) -> jax.Array:
    """Word + position (+ mention vector, site T): int32[B, S, T], [B, S, T, D] -> [B, S, T, D].

    places: int32[B, S, T], the tokens' positions; None = from 0 on.
    """
    x = self.words.at[tokens].get(out_sharding=ACT_B)
    x = x + (self.positions[:tokens.shape[-1]] if places is None else
             self.positions.at[places].get(out_sharding=ACT_B))
    x = x if mention is None else x + mention.astype(x.dtype)
    return self.norm(x).astype(self.dtype)

  def embed_queries(self, batch: int, texts: int) -> jax.Array:
    """-> [B, S, Q, D]."""
    shape = (batch, texts, *self.query_tokens.shape)
    x = jnp.broadcast_to(self.norm(self.query_tokens[...]), shape, out_sharding=ACT_B)
    return x.astype(self.dtype)

  def remember(self, features, region_tokens=None, region_valid=None) -> ImageMemory:
    """The keys and values of all blocks, for several passes over the same images: as ImageTokens."""
    images = ImageTokens(features, region_tokens, region_valid)
    made = self.stack.map(lambda group: group.blocks[0].cross.memory(images)._replace(region_valid=None))
    return made._replace(region_valid=region_valid)

  def _run(self, queries, text, mask, caches, memory: ImageMemory | ImageTokens | None, key):
    keys = None if key is None else jax.random.split(key, self.stack.depth)
    tokens = memory if isinstance(memory, ImageTokens) else None
    valid = None if memory is None else memory.region_valid
    entries = memory._replace(region_valid=None) if isinstance(memory, ImageMemory) else None

    def apply(group, carry, inputs):
      caches, entry, key = inputs
      if tokens is not None:
        entry = group.blocks[0].cross.memory(tokens)
      elif entry is not None:
        entry = entry._replace(region_valid=valid)
      queries, text, own = group(*carry, mask, caches, entry, key)
      return (queries, text), own
    (queries, text), own = self.stack(apply, (queries, text), (caches, entries, keys))
    return queries, text, own

  def query_pass(self, memory: ImageMemory, key=None):
    """-> query states [B, Q, D], and the cache of every block: [G, E, B, Q, h, k] twice."""
    batch = memory.keys.shape[1]
    queries, _, own = self._run(self.embed_queries(batch, 1), None, None, None, memory, key)
    return queries[:, 0], jax.tree.map(lambda a: a[:, :, :, 0], own)

  def text_pass(self, tokens, mention, real, key=None):
    """Bidirectional text. tokens int32[B, S, T], real bool[B, S, T] (no padding) -> [B, S, T, D]."""
    mask = real[:, :, None, None, :]
    return self._run(None, self.embed_text(tokens, mention), mask, None, None, key)[1]

  def fused_pass(self, memory: ImageMemory | ImageTokens, tokens, mention, real, key=None):
    """Queries and text together -> query states [B, S, Q, D]."""
    batch, texts = tokens.shape[:2]
    seen = jnp.ones((batch, texts, self.config.queries), bool, out_sharding=ACT_B)
    mask = jnp.concatenate([seen, real], -1)[:, :, None, None, :]
    queries = self.embed_queries(batch, texts)
    return self._run(queries, self.embed_text(tokens, mention), mask, None, memory, key)[0]

  def causal_pass(self, caches, tokens, mention, key=None):
    """Text that sees the cached queries and the text before it -> [B, S, T, D]."""
    size = tokens.shape[-1]
    seen = jnp.ones((size, self.config.queries), bool)
    mask = jnp.concatenate([seen, jnp.tril(jnp.ones((size, size), bool))], -1)[None, None, None]
    return self._run(None, self.embed_text(tokens, mention), mask, caches, None, key)[1]

  # --- the causal pass token by token: a prompt, then what is written after it ---------------------

  def read_prompt(self, caches, tokens, mention, real) -> Memory:
    """What the continuations of prompts see: the cached queries, and the prompts.

    Args:
      caches: as `query_pass` returned them. tokens: int32[B, P], padded on the left.
      mention: [B, P, D] or None. real: bool[B, P], False = padding.
    """
    batch, size = tokens.shape
    places = jnp.maximum(jnp.cumsum(real, -1) - 1, 0)
    queries = jnp.ones((batch, self.config.queries), bool, out_sharding=ACT_B)
    causal = jnp.tril(jnp.ones((size, size), bool)) & real[:, None]
    mask = jnp.concatenate([jnp.broadcast_to(queries[:, None], (batch, size, queries.shape[1]),
                                             out_sharding=ACT_B), causal], -1)[:, None, None]
    text = self.embed_text(tokens[:, None], None if mention is None else mention[:, None],
                           places[:, None])
    own = self._run(None, text, mask, caches, None, None)[2]

    def join(cached, written):  # [G, E, B, Q, h, k], [G, E, B, 1, P, h, k] -> [G, E, B, h, Q + P, k]
      return jnp.concatenate([cached, written[:, :, :, 0]], 3).swapaxes(3, 4)
    return Memory(*map(join, caches, own), jnp.concatenate([queries, real], -1))

  def cache(self, batch: int, rows: int, places: int) -> Cache:
    """An empty cache for `write`."""
    size = self.config
    return attention.empty_cache(size.depth, batch, size.heads, places, rows,
                                 size.width // size.heads, self.dtype)

  def write(self, memory: Memory, tokens, mention, cache: Cache, at, lineage=None):
    """The next T tokens of S continuations of each prompt.

    Args:
      tokens: int32[B, S, T]; mention: [B, S, T, D] or None.
      cache, at, lineage: as `attention.own_source` takes them.

    Returns:
      states [B, S, T, D] and the cache.
    """
    places = memory.real.sum(-1)[:, None, None] - self.config.queries + at
    places = jnp.broadcast_to(places + jnp.arange(tokens.shape[2]), tokens.shape, out_sharding=ACT_B)
    mask = memory.real[:, None, None, None, :]

    def apply(group, carry, inputs):
      x, cache, layer = carry
      for i, block in enumerate(group.blocks):
        own = lambda k, v, layer=layer + i: attention.own_source(k, v, None, cache, layer, at, lineage)
        keys, values = (a[i] for a in inputs)
        x, cache = block.write(x, Source(keys, values, mask), own)
      return (x, cache, layer + len(group.blocks)), None
    start = (self.embed_text(tokens, mention, places), cache, jnp.zeros((), jnp.int32))
    (x, cache, _), _ = self.stack(apply, start, (memory.keys, memory.values))
    return x, cache
