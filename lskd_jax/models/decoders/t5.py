"""T5: an encoder reads the prompt, a decoder writes after it (Raffel et al. 2020; version 1.1, Flan-T5).

Pre-norm blocks without biases. Attention scores are not divided by the root of the head's width;
instead, each tower adds a learned bias to them, one number per head and bucket of the distance between
two tokens. Its table stands in block 0 of published weights, and all blocks share it. The interface and
the axes are those of models/decoders/attention.py.
"""
import dataclasses
import functools
import math

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from lskd_jax.models import layers
from lskd_jax.models.decoders import attention
from lskd_jax.models.decoders.attention import Cache, Memory, Source
from lskd_jax.parallel import ACT_B, BATCH, REPLICATED, W_DF, W_DHK, W_FD, W_HKD, W_VD

ACTIVATIONS = {  # by transformers' names, which config.json files use
    "gelu": layers.gelu,
    "gelu_new": jax.nn.gelu,  # approximated by tanh
    "gelu_pytorch_tanh": jax.nn.gelu,
    "relu": jax.nn.relu,
}


@dataclasses.dataclass(frozen=True)
class T5Config:
  """Beside each field: its name in transformers' config.json of a T5."""
  vocabulary: int = 32128        # vocab_size
  width: int = 2048              # d_model
  head: int = 64                 # d_kv; heads * head need not be the width
  heads: int = 32                # num_heads
  hidden: int = 5120             # d_ff
  depth: int = 24                # num_layers
  decoder_depth: int = 24        # num_decoder_layers; num_layers where it is absent
  buckets: int = 32              # relative_attention_num_buckets
  max_distance: int = 128        # relative_attention_max_distance
  activation: str = "gelu"       # dense_act_fn, which BLIP-2 sets apart from feed_forward_proj
  gated: bool = True             # feed_forward_proj starts with "gated-"
  tied: bool = False             # scale_decoder_outputs, before transformers 5 tie_word_embeddings:
                                 # the head is the word table, and states are scaled for it
  eps: float = 1e-6              # layer_norm_epsilon
  start: int = 0                 # decoder_start_token_id
  end: int = 1                   # eos_token_id
  pad: int = 0                   # pad_token_id
  remat: str = "none"
  scan: bool = True


# Sizes of google/flan-t5-xl and google/flan-t5-xxl; the activation is that of Salesforce's
# blip2-flan-t5-xl and -xxl, whose other fields are the same.
FLAN_T5_XL = T5Config()
FLAN_T5_XXL = dataclasses.replace(FLAN_T5_XL, width=4096, heads=64, hidden=10240)


def distance_buckets(buckets: int, max_distance: int) -> np.ndarray:
  """int32[max_distance + 1]: the bucket of each distance (Raffel et al. 2020, section 2.1).

  Half of the buckets hold one distance each, the others are spaced by its logarithm; the last bucket
  is also that of all larger distances. A table, so that no device's logarithm decides.
  """
  exact = buckets // 2
  distance = np.arange(max_distance + 1)
  share = np.log(np.maximum(distance, exact) / exact) / math.log(max_distance / exact)
  spaced = exact + (share * (buckets - exact)).astype(np.int32)
  return np.where(distance < exact, distance, np.minimum(spaced, buckets - 1)).astype(np.int32)


def rms_norm(config: T5Config, rngs) -> nnx.RMSNorm:
  """x / sqrt(mean(x^2) + eps) * scale in float32."""
  return nnx.RMSNorm(config.width, epsilon=config.eps, dtype=jnp.float32, rngs=rngs)


class Attention(nnx.Module):
  """Attention of normalised rows to keys and values, their own or a prompt's."""

  def __init__(self, config: T5Config, rngs, dtype):
    make = functools.partial(layers.Dense, (config.width,), (config.heads, config.head), W_DHK, rngs,
                             bias=False, dtype=dtype)
    # Scores are not scaled, so the initial queries are.
    self.query = make(stddev=(config.width * config.head)**-0.5)
    self.key, self.value = make(), make()
    self.out = layers.Dense((config.heads, config.head), (config.width,), W_HKD, rngs, bias=False,
                            dtype=dtype)

  def remember(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """[B, S, T, D] -> keys, values [B, S, h, T, k]."""
    return attention.split_heads(self.key, x), attention.split_heads(self.value, x)

  def __call__(self, x: jax.Array, source: Source) -> jax.Array:
    """[B, S, T, D] -> [B, S, T, D]."""
    seen = attention.attend(attention.split_heads(self.query, x), [source], scale=1.0)
    return self.out(seen.swapaxes(2, 3))


class FeedForward(nnx.Module):
  """down(act(gate(x)) * up(x)) (Shazeer 2020), or down(act(up(x))) without a gate."""

  def __init__(self, config: T5Config, rngs, dtype):
    make = functools.partial(layers.Dense, rngs=rngs, bias=False, dtype=dtype)
    self.gate = make((config.width,), (config.hidden,), W_DF) if config.gated else None
    self.up = make((config.width,), (config.hidden,), W_DF)
    self.down = make((config.hidden,), (config.width,), W_FD)
    self.activation = config.activation

  def __call__(self, x: jax.Array) -> jax.Array:
    """[B, S, T, D] -> [B, S, T, D]."""
    act, spec = ACTIVATIONS[self.activation], jax.P(BATCH, None, None, "tensor")
    up = self.up(x, spec)
    return self.down(act(up) if self.gate is None else act(self.gate(x, spec)) * up)


class Block(nnx.Module):
  """Adds to x: attention to itself, in the decoder attention to the prompt, and the feed-forward."""

  def __init__(self, config: T5Config, cross: bool, rngs, dtype):
    self.attention_norm, self.attention = rms_norm(config, rngs), Attention(config, rngs, dtype)
    self.cross_norm = rms_norm(config, rngs) if cross else None
    self.cross = Attention(config, rngs, dtype) if cross else None
    self.forward_norm, self.forward = rms_norm(config, rngs), FeedForward(config, rngs, dtype)

  def __call__(self, x: jax.Array, own, prompt: Source | None = None):
    """x: [B, S, T, D]; own: (keys, values) [B, S, h, T, k] -> Source, cache.

    Returns the new x, and the cache that `own` returned.
    """
    rows = self.attention_norm(x)
    source, cache = own(*self.attention.remember(rows))
    x = x + self.attention(rows, source)
    if self.cross is not None:
      x = x + self.cross(self.cross_norm(x), prompt)
    return x + self.forward(self.forward_norm(x)), cache


class Tower(nnx.Module):
  """Blocks, the table of the bias that they share, and the norm after the last.

  causal: the decoder, which sees only what stands before, and the prompt through cross-attention.
  """

  def __init__(self, config: T5Config, depth: int, causal: bool, rngs, dtype):
    self.config, self.causal = config, causal
    self.distances = layers.normal(rngs.params(), (config.buckets, config.heads), REPLICATED,
                                   config.width**-0.5)
    self.stack = layers.Stack(lambda rngs: Block(config, causal, rngs, dtype), depth, rngs,
                              remat=config.remat, scan=config.scan)
    self.norm = rms_norm(config, rngs)

  def bias(self, readers: jax.Array, places: jax.Array) -> jax.Array:
    """Positions int32[T] of those that read, int32[U] of what is read -> float32[h, T, U]."""
    config, steps = self.config, places - readers[:, None]
    # The encoder's second half of buckets is for what stands after the reader.
    count = config.buckets if self.causal else config.buckets // 2
    distance = jnp.maximum(-steps, 0) if self.causal else jnp.abs(steps)
    table = jnp.asarray(distance_buckets(count, config.max_distance))
    bucket = table[jnp.minimum(distance, config.max_distance)]
    bucket = bucket if self.causal else bucket + count * (steps > 0)
    return self.distances[...][bucket].transpose(2, 0, 1)


class T5(nnx.Module):
  """See the module's docstring and models/decoders/attention.py. Its width E is D.

  Raises ValueError for an activation that is not in ACTIVATIONS.
  """

  starts_itself = True  # with config.start, once the whole prompt is read

  def __init__(self, config: T5Config, rngs, dtype=jnp.float32):
    if config.activation not in ACTIVATIONS:
      raise ValueError(f"activation {config.activation!r} is unknown: choose {', '.join(ACTIVATIONS)}")
    self.config = config
    self.dtype = dtype
    self.words = layers.normal(rngs.params(), (config.vocabulary, config.width), W_VD, 1.0)
    self.encoder = Tower(config, config.depth, False, rngs, dtype)
    self.decoder = Tower(config, config.decoder_depth, True, rngs, dtype)
    self.head = None if config.tied else layers.normal(
        rngs.params(), (config.vocabulary, config.width), W_VD, config.width**-0.5)

  def embed(self, tokens) -> jax.Array:
    """int32[B, ...] or one token -> float32[B, ..., D] or float32[D]."""
    tokens = jnp.asarray(tokens)
    return self.words.at[tokens].get(out_sharding=ACT_B if tokens.ndim else REPLICATED)

  def encode(self, prompt: jax.Array, real: jax.Array) -> jax.Array:
    """[B, P, D], bool[B, P] -> the encoder's float32[B, P, D]; where `real` is False, any numbers."""
    positions, mask = jnp.arange(prompt.shape[1]), real[:, None, None, None]
    bias = self.encoder.bias(positions, positions)
    x = prompt[:, None].astype(self.dtype)
    own = lambda keys, values: (Source(keys, values, mask, bias), None)
    x, _ = self.encoder.stack(lambda block, x, _: block(x, own), x)
    return self.encoder.norm(x)[:, 0]

  def read(self, prompt: jax.Array, real: jax.Array) -> Memory:
    """The prompt's keys and values in every block of the decoder.

    Args:
      prompt: [B, P, D], embeddings of tokens or of anything else.
      real: bool[B, P], False = padding, at either end: only differences of positions count.
    """
    rows = self.encode(prompt, real)[:, None]
    keys, values = self.decoder.stack.map(lambda block: block.cross.remember(rows))
    return Memory(keys[:, :, 0], values[:, :, 0], real)

  def cache(self, batch: int, rows: int, places: int) -> Cache:
    """An empty cache of `places` tokens for each of `rows` continuations of a prompt."""
    config = self.config
    return attention.empty_cache(config.decoder_depth, batch, config.heads, places, rows, config.head,
                                 self.dtype)

  def parts(self) -> list | None:
    """For a loop of `write`: see `Stack.parts`."""
    return self.decoder.stack.parts()

  def write(self, memory: Memory, x: jax.Array, cache: Cache | None = None, at=0, lineage=None,
            parts=None) -> tuple[jax.Array, Cache | None]:
    """Continuations of the prompts.

    Args:
      x: [B, S, T, D], the decoder's inputs; the first of a continuation is `embed(config.start)`.
        Whole texts, or with a cache the next T tokens.
      cache, at, lineage: as `attention.own_source` takes them. parts: of `self.parts()`.

    Returns:
      states float32[B, S, T, D], from which `logits` tells what follows each token; and the cache.
    """
    steps = jnp.arange(x.shape[2])
    places = steps if cache is None else jnp.arange(cache.keys.shape[3])
    bias = self.decoder.bias(steps + at, places)
    real = memory.real[:, None, None, None]

    def apply(block, carry, inputs):
      x, cache, layer = carry
      own = lambda keys, values: attention.own_source(keys, values, bias, cache, layer, at, lineage)
      x, cache = block(x, own, Source(*inputs, real))
      return (x, cache, layer + 1), None
    start = (x.astype(self.dtype), cache, jnp.zeros((), jnp.int32))
    (x, cache, _), _ = self.decoder.stack(apply, start, (memory.keys, memory.values), parts)
    return self.decoder.norm(x), cache

  def logits(self, states: jax.Array) -> jax.Array:
    """[B, ..., D] -> float32[B, ..., V]."""
    if self.head is None:
      states, table = states * self.config.width**-0.5, self.words[...]
    else:
      table = self.head[...]
    return jnp.einsum("...d,vd->...v", states.astype(self.dtype), table.astype(self.dtype),
                      out_sharding=ACT_B, preferred_element_type=jnp.float32)
