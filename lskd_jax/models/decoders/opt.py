"""OPT: a decoder-only language model with learned positions (Zhang et al. 2022).

As transformers computes it (`OPTForCausalLM`): positions count real tokens, so padding on the left
changes nothing; the head is tied to the word embeddings. Axes as in decoders/attention.py.
"""
import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp

from lskd_jax.models import layers
from lskd_jax.models.decoders import attention
from lskd_jax.models.decoders.attention import Cache, Memory, Source
from lskd_jax.parallel import ACT_B, BATCH, REPLICATED, W_DF, W_DHK, W_FD, W_HKD, W_VD

OFFSET = 2  # positions start at this row of their table
ACTIVATIONS = {"relu": jax.nn.relu, "gelu": layers.gelu}


@dataclasses.dataclass(frozen=True)
class OptConfig:
  """Sizes and variants; the defaults are OPT-2.7B's as BLIP-2 uses it."""
  vocabulary: int = 50272
  width: int = 2560
  embed: int = 2560            # width E of the word embeddings; opt-350m's differs from `width`
  depth: int = 32
  heads: int = 32
  hidden: int = 10240
  max_tokens: int = 2048       # positions
  activation: str = "relu"
  pre_norm: bool = True        # False (opt-350m): the norms follow the residual sums
  final_norm: bool = True      # False: opt-350m, and checkpoints from before transformers 4.20.1
  eps: float = 1e-5
  pad: int = 1                 # ids of padding, of the start of a text, and of its end, which BLIP-2
  start: int = 2               # sets to the newline
  end: int = 50118
  remat: str = "none"
  scan: bool = True


OPT_2_7B = OptConfig()
OPT_6_7B = OptConfig(width=4096, embed=4096, hidden=16384)


class Block(nnx.Module):
  """Causal self-attention and a feed-forward, each in a residual."""

  def __init__(self, config: OptConfig, rngs, dtype):
    head = config.width // config.heads
    make = lambda: layers.Dense((config.width,), (config.heads, head), W_DHK, rngs, dtype=dtype)
    self.query, self.key, self.value = make(), make(), make()
    self.out = layers.Dense((config.heads, head), (config.width,), W_HKD, rngs, dtype=dtype)
    self.attention_norm = layers.layer_norm(config.width, config.eps, rngs)
    self.up = layers.Dense((config.width,), (config.hidden,), W_DF, rngs, dtype=dtype)
    self.down = layers.Dense((config.hidden,), (config.width,), W_FD, rngs, dtype=dtype)
    self.forward_norm = layers.layer_norm(config.width, config.eps, rngs)
    self.pre_norm, self.activation = config.pre_norm, config.activation

  def __call__(self, x: jax.Array, memory: Source | None, own):
    """x: [B, S, T, D]; own: (keys, values) [B, S, h, T, k] -> Source, cache.

    Returns new x, the cache that `own` returned, and the new tokens' keys and values.
    """
    y = self.attention_norm(x).astype(x.dtype) if self.pre_norm else x
    q, k, v = (attention.split_heads(part, y) for part in (self.query, self.key, self.value))
    source, cache = own(k, v)
    sources = [source] if memory is None else [memory, source]
    seen = attention.attend(q, sources, q.shape[-1]**-0.5)
    x = x + self.out(seen.swapaxes(2, 3))
    x = x if self.pre_norm else self.attention_norm(x).astype(x.dtype)
    y = self.forward_norm(x).astype(x.dtype) if self.pre_norm else x
    hidden = ACTIVATIONS[self.activation](self.up(y, jax.P(BATCH, None, None, "tensor")))
    x = x + self.down(hidden)
    return (x if self.pre_norm else self.forward_norm(x).astype(x.dtype)), cache, (k, v)


class Opt(nnx.Module):
  """See the module's docstring, and decoders/attention.py for how a decoder is used."""

  starts_itself = False  # the prompt's last token is the first that is written

  def __init__(self, config: OptConfig, rngs, dtype=jnp.float32):
    if config.activation not in ACTIVATIONS:
      raise ValueError(f"decoder.activation {config.activation!r} is unknown: choose "
                       f"{', '.join(ACTIVATIONS)}")
    self.config, self.dtype = config, jnp.dtype(dtype)
    self.words = layers.normal(rngs.params(), (config.vocabulary, config.embed), W_VD)
    self.positions = layers.normal(rngs.params(), (config.max_tokens + OFFSET, config.width),
                                   REPLICATED)
    project = lambda *widths: None if config.embed == config.width else layers.Dense(
        *((width,) for width in widths), jax.P(None, None), rngs, bias=False, dtype=dtype)
    self.project_in = project(config.embed, config.width)
    self.project_out = project(config.width, config.embed)
    self.stack = layers.Stack(lambda rngs: Block(config, rngs, dtype), config.depth, rngs,
                              remat=config.remat, scan=config.scan)
    self.norm = layers.layer_norm(config.width, config.eps, rngs) if config.final_norm else None

  def embed(self, tokens: jax.Array) -> jax.Array:
    """int32[B, ...] -> float32[B, ..., E]."""
    return self.words.at[tokens].get(out_sharding=ACT_B)

  def read(self, prompt: jax.Array, real: jax.Array) -> Memory:
    """[B, P, E], bool[B, P] (False = padding, anywhere) -> what continuations see of the prompts."""
    places = jnp.cumsum(real, -1) - real
    size = prompt.shape[1]
    mask = jnp.tril(jnp.ones((size, size), bool)) & real[:, None, None, None, :]

    def apply(block, x, _):
      x, _, (keys, values) = block(x, None, lambda k, v: (Source(k, v, mask), None))
      return x, (keys[:, 0], values[:, 0])
    _, (keys, values) = self.stack(apply, self._enter(prompt[:, None], places[:, None]))
    return Memory(keys, values, real)

  def cache(self, batch: int, rows: int, places: int) -> Cache:
    """An empty cache for `write`."""
    size = self.config
    return attention.empty_cache(size.depth, batch, size.heads, places, rows,
                                 size.width // size.heads, self.dtype)

  def parts(self) -> list | None:
    """For a loop of `write`: see `Stack.parts`."""
    return self.stack.parts()

  def write(self, memory: Memory, x: jax.Array, cache: Cache | None = None, at=0, lineage=None,
            parts=None) -> tuple[jax.Array, Cache | None]:
    """Continuations of the prompts.

    Args:
      x: [B, S, T, E]: whole texts, or with a cache the next T tokens.
      cache, at, lineage: as `attention.own_source` takes them. parts: of `self.parts()`.

    Returns:
      states [B, S, T, D], from which `logits` tells what follows each token; and the cache.
    """
    places = memory.real.sum(-1)[:, None, None] + jnp.arange(x.shape[2]) + at
    places = jnp.broadcast_to(places, x.shape[:3], out_sharding=ACT_B)
    mask = memory.real[:, None, None, None, :]

    def apply(block, carry, inputs):
      x, cache, layer = carry
      keys, values = inputs
      own = lambda k, v: attention.own_source(k, v, None, cache, layer, at, lineage)
      x, cache, _ = block(x, Source(keys, values, mask), own)
      return (x, cache, layer + 1), None
    start = (self._enter(x, places), cache, jnp.zeros((), jnp.int32))
    (x, cache, _), _ = self.stack(apply, start, (memory.keys, memory.values), parts)
    return x, cache

  def logits(self, states: jax.Array) -> jax.Array:
    """[B, S, T, D] -> float32[B, S, T, V]."""
    x = states if self.norm is None else self.norm(states)
    x = x if self.project_out is None else self.project_out(x)
    return jnp.einsum("bste,ve->bstv", x.astype(self.dtype), self.words[...].astype(self.dtype),
                      out_sharding=ACT_B, preferred_element_type=jnp.float32)

  def _enter(self, x: jax.Array, places: jax.Array) -> jax.Array:
    """Word embeddings [B, S, T, E] at int32[B, S, T] real tokens from the start -> [B, S, T, D]."""
    x = x.astype(self.dtype)
    x = x if self.project_in is None else self.project_in(x)
    rows = jnp.minimum(places + OFFSET, self.positions.shape[0] - 1)
    return x + self.positions.at[rows].get(out_sharding=ACT_B).astype(self.dtype)
