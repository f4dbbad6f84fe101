"""The discriminative student: ViT + Q-Former + region tokens, with ITC, ITM and LM heads (BLIP-2).

Everything about an image is computed once (`see`) and used by as many statements and losses as
there are. Axes: B images, S texts of an image, T tokens, R region slots, Q queries, E embedding.
"""
import dataclasses
from typing import Any, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp

from lskd_jax.models import layers
from lskd_jax.models.decoders.attention import Cache
from lskd_jax.models.generate import Decoding, Generated, Prompted, generate_after, prompted
from lskd_jax.models.qformer import ImageMemory, ImageTokens, QFormer, QFormerConfig
from lskd_jax.models.regions import ROI, RegionEncoder, at_mentions, coverage, mention_slots
from lskd_jax.models.vit import Vit, VitConfig
from lskd_jax.parallel import ACT_B

PAD, DEC = 0, 5  # token ids of [PAD] and [DEC], fixed by the tokenizer's order of special tokens


@dataclasses.dataclass(frozen=True)
class StudentConfig:
  vit: VitConfig = VitConfig()
  qformer: QFormerConfig = QFormerConfig()
  embed: int = 256             # width E of the contrastive embeddings
  max_regions: int = 8         # slots R
  sites: str = "PQT"           # where region tokens enter: see models/regions.py
  region_mode: str = "tokens"  # tokens | overlay | both | none
  vision_eps: float = 1e-5     # of ln_vision (LAVIS 1e-5, transformers 1e-6)
  temperature: float = 0.07    # initial temperature of ITC
  decoder_start: int = DEC     # token that starts a text in the causal pass
  dtype: str = "float32"       # of the computation; parameters are float32

  @property
  def uses_region_tokens(self) -> bool:
    return self.region_mode in ("tokens", "both")

  @property
  def max_tokens(self) -> int:
    """Tokens of the longest text that can be read."""
    return self.qformer.max_tokens


class Table(nnx.Variable):
  """A constant that travels with the model and is never trained."""


class Sight(NamedTuple):
  """What the passes need of a batch of images: computed once, shared by all texts.

  memory: cross-attention keys and values, or for a single pass what to make them of; mention:
  float32[B, R, D] (site T) or None; valid: bool[B, R] regions that exist.
  """
  memory: ImageMemory | ImageTokens
  mention: Any
  valid: jax.Array


def look(student: nnx.Module, features: jax.Array, boxes: jax.Array, valid: jax.Array,
         once: bool = False) -> Sight:
  """Image and regions through a student's `ln_vision`, `regions` and `qformer`: see Student.see."""
  features = student.ln_vision(features).astype(student.qformer.dtype)
  if student.config.uses_region_tokens:
    features, tokens, mention = student.regions(features, boxes, valid)
    token_valid = None if tokens is None else jnp.repeat(valid, ROI * ROI, axis=1)
    images = ImageTokens(features, tokens, token_valid)
  else:
    images, mention, valid = ImageTokens(features), None, jnp.zeros_like(valid)
  return Sight(images if once else student.qformer.remember(*images), mention, valid)


class LanguageHead(nnx.Module):
  """BERT's prediction head: dense, GELU, norm, then the word embeddings transposed plus a bias."""

  def __init__(self, config: QFormerConfig, rngs, dtype):
    self.dense = layers.Dense((config.width,), (config.width,), jax.P("fsdp", None), rngs,
                              dtype=dtype)
    self.norm = layers.layer_norm(config.width, config.eps, rngs)
    self.bias = layers.constant(0.0, (config.vocabulary,))

  def __call__(self, x: jax.Array, words: jax.Array) -> jax.Array:
    """[B, S, T, D], [V, D] -> float32[B, S, T, V]."""
    return self.logits(self.transform(x), words)

  def transform(self, x: jax.Array) -> jax.Array:
    """All but the last product: [B, S, T, D] -> [B, S, T, D] in the compute dtype."""
    return self.norm(layers.gelu(self.dense(x))).astype(self.dense.dtype)

  def logits(self, x: jax.Array, words: jax.Array) -> jax.Array:
    """The last product: [B, S, T, D], [V, D] -> float32[B, S, T, V]."""
    logits = jnp.einsum("bstd,vd->bstv", x, words.astype(x.dtype), out_sharding=ACT_B,
                        preferred_element_type=jnp.float32)
    return logits + self.bias[...]


class Student(nnx.Module):
  """See the module's docstring.

  Args:
    opens_bracket, digit: bool[V] and int32[V], the tokenizer's mention tables.
  """

  def __init__(self, config: StudentConfig, opens_bracket, digit, rngs):
    dtype = jnp.dtype(config.dtype)
    width, vision = config.qformer.width, config.vit.width
    self.config = config
    self.vit = Vit(config.vit, rngs, dtype)
    self.ln_vision = layers.layer_norm(vision, config.vision_eps, rngs)
    self.regions = RegionEncoder(vision, config.vit.grid, width, config.max_regions, config.sites,
                                 rngs)
    self.qformer = QFormer(config.qformer, vision, rngs, dtype)
    self.vision_proj = layers.Dense((width,), (config.embed,), jax.P("fsdp", None), rngs)
    self.text_proj = layers.Dense((width,), (config.embed,), jax.P("fsdp", None), rngs)
    self.itm_head = layers.Dense((width,), (2,), jax.P("fsdp", None), rngs)
    self.language_head = LanguageHead(config.qformer, rngs, dtype)
    self.log_temperature = layers.constant(jnp.log(config.temperature), ())
    self.opens_bracket = Table(jnp.asarray(opens_bracket, bool))
    self.digit = Table(jnp.asarray(digit, jnp.int32))

  def slots(self, tokens: jax.Array, before: jax.Array | None = None) -> jax.Array:
    """The slot every token mentions, -1 for none: int32[B, S, T]; `before` as in mention_slots."""
    return mention_slots(tokens, self.opens_bracket[...], self.digit[...],
                         self.config.max_regions, before)

  def see(self, features: jax.Array, boxes: jax.Array, valid: jax.Array, once: bool = False) -> Sight:
    """Image and regions -> what all passes share.

    Args:
      features: [B, N, C], what the ViT returned.
      boxes: float32[B, R, 4] xyxy in [0, 1]; valid: bool[B, R]; both ignored in the region modes
        `overlay` and `none`.
      once: for a single pass, which then makes the keys and values block by block, and with
        `qformer.remat="full"` never holds those of two blocks.
    """
    return look(self, features, boxes, valid, once)

  def read_image(self, sight: Sight, key=None):
    """The query pass -> query states [B, Q, D], and the cache of the causal pass."""
    return self.qformer.query_pass(sight.memory, key)

  def embed_image(self, query_states: jax.Array) -> jax.Array:
    """[B, Q, D] -> unit vectors float32[B, Q, E]."""
    return _unit(self.vision_proj(query_states))

  def embed_text(self, tokens: jax.Array, key=None) -> jax.Array:
    """int32[B, S, T] -> unit vectors float32[B, S, E].

    Takes no image and no boxes: a mention carries its slot and nothing else here, since anything
    computed from the image would let the contrastive loss match without reading.
    """
    mention = None
    if self.config.uses_region_tokens and "T" in self.config.sites:
      mention = at_mentions(self.slots(tokens), self.regions.identities())
    states = self.qformer.text_pass(tokens, mention, tokens != PAD, key)
    return _unit(self.text_proj(states[:, :, 0]))

  def match(self, sight: Sight, tokens: jax.Array, key=None) -> jax.Array:
    """The fused pass -> float32[B, S, 2] logits (no match, match), mean over queries (ITM)."""
    return self.itm_head(self.fuse(sight, tokens, key)).mean(2)

  def fuse(self, sight: Sight, tokens: jax.Array, key=None) -> jax.Array:
    """The fused pass -> query states [B, S, Q, D]."""
    mention = self._mention(sight, tokens)
    return self.qformer.fused_pass(sight.memory, tokens, mention, tokens != PAD, key)

  def predict_words(self, sight: Sight, cache, tokens: jax.Array, key=None) -> jax.Array:
    """The causal pass -> float32[B, S, T, V]: logits of the token AFTER each position.

    The first token, [CLS], is replaced by `config.decoder_start`.
    """
    return self.language_head(self.write_states(sight, cache, tokens, key), self.qformer.words[...])

  def write_states(self, sight: Sight, cache, tokens: jax.Array, key=None) -> jax.Array:
    """What `predict_words` predicts words from: [B, S, T, D]."""
    start = jnp.full_like(tokens[:, :, :1], self.config.decoder_start)
    started = jnp.concatenate([start, tokens[:, :, 1:]], -1)
    return self.qformer.causal_pass(cache, started, self._mention(sight, tokens), key)

  def read(self, sight: Sight, cache, prompt: jax.Array, real: jax.Array) -> Prompted:
    """One prompt for each image, for `generate`.

    Args:
      cache: from `read_image`.
      prompt: int32[B, P], `config.decoder_start` and words, padded on the left: its last column is
        real. real: bool[B, P].
    """
    taken = prompt[:, None, :-1]
    mention = self._mention(sight, taken)
    memory = self.qformer.read_prompt(cache, taken[:, 0], None if mention is None else mention[:, 0],
                                      real[:, :-1])
    return prompted(memory, prompt, self.config.qformer.vocabulary)

  def generate(self, sight: Sight, prompts: Prompted, decoding: Decoding, key=None) -> Generated:
    """Writes one text after each prompt, with the causal pass token by token."""
    def write(cache: Cache, tokens, before, place, lineage) -> tuple[jax.Array, Any]:
      tokens = tokens[..., None]
      mention = self._mention(sight, tokens, before[..., None])
      states, cache = self.qformer.write(prompts.memory, tokens, mention, cache, place, lineage)
      return self.language_head(states, self.qformer.words[...])[:, :, 0], cache
    cache = self.qformer.cache(prompts.first.shape[0], decoding.beams, 1 + decoding.max_tokens)
    return generate_after(write, cache, prompts, decoding, key)

  def temperature(self) -> jax.Array:
    """ITC's temperature; learned in log space, so it cannot reach zero, and clipped to [0.01, 0.5]."""
    return jnp.clip(jnp.exp(self.log_temperature[...]), 0.01, 0.5)

  def _mention(self, sight: Sight, tokens: jax.Array, before: jax.Array | None = None):
    if sight.mention is None:
      return None
    return at_mentions(self.slots(tokens, before), sight.mention)


def _unit(x: jax.Array) -> jax.Array:
  x = x.astype(jnp.float32)
  return x * jax.lax.rsqrt(jnp.sum(x * x, -1, keepdims=True) + 1e-12)


class Tagger(nnx.Module):
  """A ViT with a word classifier on every patch: pre-trains the ViT on captions as bags of words.

  The objective is that of Joulin et al. 2016 (Learning visual features from large weakly supervised
  data), over the whole picture for a caption and over its box for a region's description. A word's
  logit there is the log-mean-exp over the patches, the usual pooling of multiple-instance
  learning: a word needs only one place to be true of it.
  """

  def __init__(self, config: StudentConfig, opens_bracket, digit, rngs):
    self.vit = Vit(config.vit, rngs, jnp.dtype(config.dtype))
    self.norm = layers.layer_norm(config.vit.width, config.vision_eps, rngs)
    self.words = layers.Dense((config.vit.width,), (config.qformer.vocabulary,), jax.P("fsdp", None),
                              rngs)
    self.words.bias[...] = jnp.full_like(self.words.bias[...], -2.0)  # most words are absent
    self.opens_bracket = Table(jnp.asarray(opens_bracket, bool))
    self.digit = Table(jnp.asarray(digit, jnp.int32))

  def __call__(self, image: jax.Array, boxes: jax.Array, valid: jax.Array) -> jax.Array:
    """Logits of every word of the vocabulary in each region, and last in the whole picture.

    Args:
      image: uint8[B, H, W, 3]; boxes: float32[B, R, 4] xyxy in [0, 1]; valid: bool[B, R].

    Returns:
      float32[B, R + 1, V].
    """
    logits = self.words(self.norm(self.vit(image)[:, 1:]))
    cover = coverage(boxes, self.vit.config.grid)
    cover = layers.reshape(cover, *boxes.shape[:2], logits.shape[1]) * valid[..., None]
    cover = jnp.concatenate([cover, jnp.ones_like(cover[:, :1])], 1)
    highest = jax.lax.stop_gradient(logits.max(1, keepdims=True))
    pooled = jnp.einsum("brn,bnv->brv", cover, jnp.exp(logits - highest))
    return jnp.log(pooled / (cover.sum(-1, keepdims=True) + 1e-6) + 1e-9) + highest

  def places(self, tokens: jax.Array, regions: int) -> jax.Array:
    """What each token describes: the slot mentioned last before it, `regions` = the whole picture.

    int32[B, S, T] -> int32[B, S, T].
    """
    slots = mention_slots(tokens, self.opens_bracket[...], self.digit[...], regions)
    at = jnp.where(slots >= 0, jnp.arange(tokens.shape[-1]), -1)
    at = jax.lax.cummax(at, axis=2)
    last = jnp.take_along_axis(slots, jnp.maximum(at, 0), axis=2)
    return jnp.where(at >= 0, last, regions)


def student_config(config: dict) -> StudentConfig:
  """Nested plain dict (config.json, or a config file's `model`) -> StudentConfig.

  Raises ValueError naming an unknown key.
  """
  config = dict(config)
  parts = {"vit": VitConfig, "qformer": QFormerConfig}
  for name, kind in parts.items():
    config[name] = build_config(kind, config.get(name, {}), name + ".")
  return build_config(StudentConfig, config, "")


def build_config(kind, values: dict, prefix: str):
  """A config's dataclass from a dict; ValueError naming an unknown key, which `prefix` precedes."""
  known = {field.name for field in dataclasses.fields(kind)}
  for key in values:
    if key not in known:
      raise ValueError(f"model.{prefix}{key} is unknown: {kind.__name__} has {', '.join(sorted(known))}")
  return kind(**values)


def init_student(config: StudentConfig, opens_bracket, digit, seed: int) -> Student:
  """A student with fresh weights, laid out on the mesh in use."""
  return Student(config, opens_bracket, digit, nnx.Rngs(jax.random.key(seed)))


