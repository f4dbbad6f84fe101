"""The generative student: ViT + Q-Former + region tokens, whose query states a decoder reads (BLIP-2).

The projected query states stand before the words of a prompt. ViT and decoder are usually frozen: the
Q-Former, the projection and the region embedding are trained. A mention carries its region's vector
wherever it stands, in a prompt or in what is written (site T, through Z_lm).
Axes: B images, S texts of an image, P tokens of a prompt, T of a text, Q queries, R region slots,
E width of the decoder's word embeddings, V its vocabulary.
"""
import dataclasses
import sys
from typing import Any, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp

from data_pipeline.texts import NO_FIELD, QUESTION
from lskd_jax.models import layers
from lskd_jax.models.decoders.attention import Cache, Memory
from lskd_jax.models.decoders.opt import Opt, OptConfig
from lskd_jax.models.decoders.t5 import T5, T5Config
from lskd_jax.models.generate import Decoding, Generated, Prompted, generate_after, prompted
from lskd_jax.models.qformer import QFormer, QFormerConfig
from lskd_jax.models.regions import RegionEncoder, at_mentions, mention_slots
from lskd_jax.models.student import Sight, Table, build_config, look
from lskd_jax.models.vit import Vit, VitConfig
from lskd_jax.parallel import ACT_B

DECODERS = {"opt": (OptConfig, Opt), "t5": (T5Config, T5)}


@dataclasses.dataclass(frozen=True)
class GenerativeConfig:
  vit: VitConfig = VitConfig()
  qformer: QFormerConfig = QFormerConfig(text=False)
  language_model: str = "opt"  # opt | t5: what `decoder` describes
  decoder: OptConfig | T5Config = OptConfig()
  max_regions: int = 8         # slots R
  sites: str = "PQT"           # where region tokens enter: see models/regions.py
  region_mode: str = "tokens"  # tokens | overlay | both | none
  vision_eps: float = 1e-5     # of ln_vision (LAVIS 1e-5, transformers 1e-6)
  prompt: str = "question: {question} answer:"  # how a question is asked; what a run trains on
  image_token: int | None = None  # the id that stands for a query in transformers' prompts
  dtype: str = "float32"       # of the computation; parameters are float32

  @property
  def uses_region_tokens(self) -> bool:
    return self.region_mode in ("tokens", "both")

  @property
  def max_tokens(self) -> int:
    """Tokens of the longest text that can be read or written; T5's positions have no end."""
    return self.decoder.max_tokens - self.qformer.queries if self.language_model == "opt" else sys.maxsize


class Taught(NamedTuple):
  """Texts as the decoder writes them.

  logits: float32[B, S, T, V] of the token after each place. tokens: int32[B, S, T]; fields:
  int8[B, S, T]. moved: int32[B, S], by how many places each text stands further left than it came.
  """
  logits: jax.Array
  tokens: jax.Array
  fields: jax.Array
  moved: jax.Array


class GenerativeStudent(nnx.Module):
  """See the module's docstring.

  Args:
    opens_bracket, digit: bool[V] and int32[V], the tokenizer's mention tables.
  """

  def __init__(self, config: GenerativeConfig, opens_bracket, digit, rngs):
    dtype = jnp.dtype(config.dtype)
    width, vision = config.qformer.width, config.vit.width
    self.config = config
    self.vit = Vit(config.vit, rngs, dtype)
    self.ln_vision = layers.layer_norm(vision, config.vision_eps, rngs)
    self.decoder = DECODERS[config.language_model][1](config.decoder, rngs, dtype)
    embed = self.decoder.words.shape[1]
    self.regions = RegionEncoder(vision, config.vit.grid, width, config.max_regions, config.sites,
                                 rngs, embed)
    self.qformer = QFormer(config.qformer, vision, rngs, dtype)
    self.decoder_proj = layers.Dense((width,), (embed,), jax.P("fsdp", None), rngs, dtype=dtype)
    self.opens_bracket = Table(jnp.asarray(opens_bracket, bool))
    self.digit = Table(jnp.asarray(digit, jnp.int32))

  def see(self, features: jax.Array, boxes: jax.Array, valid: jax.Array) -> Sight:
    """As Student.see."""
    return look(self, features, boxes, valid)

  def read_image(self, sight: Sight, key=None) -> jax.Array:
    """The query pass -> what stands before the words of a prompt: [B, Q, E]."""
    return self.decoder_proj(self.qformer.query_pass(sight.memory, key)[0])

  def words(self, sight: Sight, tokens: jax.Array, before: jax.Array | None = None) -> jax.Array:
    """Word embeddings, with the region's vector at every mention: int32[B, S, T] -> [B, S, T, E].

    before: int32[B, S, 1], the tokens before the texts; None = nothing that opens a mention.
    """
    return self._words(sight, tokens, self.slots(tokens, before))

  def slots(self, tokens: jax.Array, before: jax.Array | None = None) -> jax.Array:
    """As Student.slots; before: as in `words`."""
    return mention_slots(tokens, self.opens_bracket[...], self.digit[...], self.config.max_regions, before)

  def _words(self, sight: Sight, tokens: jax.Array, slots: jax.Array) -> jax.Array:
    x = self.decoder.embed(tokens)
    return x if sight.mention is None else x + at_mentions(slots, sight.mention)

  def teach(self, sight: Sight, image: jax.Array, tokens: jax.Array, fields: jax.Array) -> Taught:
    """Every text written behind its image, its own tokens given: for a loss or a score.

    A decoder that starts as it is told writes whole texts behind the queries, which it reads once for
    all texts of an image. One that starts itself (T5) reads the queries and the question, and writes
    what follows "answer:"; a text without a question is written whole.

    Args:
      image: [B, Q, E], from `read_image`.
      tokens: int32[B, S, T]; fields: int8[B, S, T]; both as the loader gives them.
    """
    if not self.decoder.starts_itself:
      present = jnp.ones(image.shape[:2], bool, out_sharding=ACT_B)
      states, _ = self.decoder.write(self.decoder.read(image, present), self.words(sight, tokens))
      return Taught(self.decoder.logits(states), tokens, fields, jnp.zeros_like(tokens[..., 0]))
    place, slots, own = jnp.arange(tokens.shape[-1]), self.slots(tokens), self.decoder.config
    first = jnp.argmax(fields > QUESTION, -1)  # of the tokens that are written
    memory = self._ask(sight, image, tokens, slots, first)
    # What is written, behind the decoder's own start.
    moved = first - 1
    tokens, slots, fields = (jnp.where(place == 0, start, shifted(row, moved, fill)) for row, start, fill in
                             ((tokens, own.start, own.pad), (slots, -1, -1), (fields, NO_FIELD, NO_FIELD)))
    rows = self._words(sight, tokens, slots)
    batch, texts, size, width = rows.shape
    states, _ = self.decoder.write(memory, layers.reshape(rows, batch * texts, 1, size, width))
    logits = self.decoder.logits(layers.reshape(states, batch, texts, size, states.shape[-1]))
    return Taught(logits, tokens, fields, moved)

  def _ask(self, sight: Sight, image: jax.Array, tokens: jax.Array, slots: jax.Array,
           first: jax.Array) -> Memory:
    """The queries and what stands before place `first` of each text, closed by the end token as all that
    T5 reads: a Memory of B * S prompts."""
    last = jnp.arange(tokens.shape[-1]) == first[..., None]
    words = self._words(sight, jnp.where(last, self.decoder.config.end, tokens), jnp.where(last, -1, slots))
    batch, texts, size, width = words.shape
    queries = jnp.broadcast_to(image[:, None], (batch, texts, *image.shape[1:]), out_sharding=ACT_B)
    rows = jnp.concatenate([queries.astype(words.dtype), words], 2)
    real = jnp.arange(rows.shape[2]) - queries.shape[2] <= first[..., None]
    return self.decoder.read(layers.reshape(rows, batch * texts, rows.shape[2], width),
                             layers.reshape(real, batch * texts, rows.shape[2]))

  def read(self, sight: Sight, image: jax.Array, prompt: jax.Array, real: jax.Array) -> Prompted:
    """One prompt for each image.

    Args:
      image: [B, Q, E], from `read_image`.
      prompt: int32[B, P], padded on the left: its last column is real. real: bool[B, P].
    """
    own = self.decoder.config.start if self.decoder.starts_itself else None
    taken = prompt.shape[1] if own is not None else prompt.shape[1] - 1
    words = self.words(sight, prompt[:, None, :taken])[:, 0]
    rows = jnp.concatenate([image.astype(words.dtype), words], 1)
    present = jnp.ones(image.shape[:2], bool, out_sharding=ACT_B)
    present = jnp.concatenate([present, real[:, :taken]], 1)
    if own is not None:  # an encoder counts distances: no padding may part the queries from the words
      order = jnp.argsort(~present, 1, stable=True)
      rows = jnp.take_along_axis(rows, order[..., None], 1)
      present = jnp.take_along_axis(present, order, 1)
    memory = self.decoder.read(rows, present)
    # What an encoder reads is no repetition, as transformers counts them.
    stream = prompt if own is None else jnp.full_like(prompt[:, :1], own)
    return prompted(memory, stream, self.decoder.words.shape[0])

  def likelihoods(self, sight: Sight, prompts: Prompted, tokens: jax.Array) -> jax.Array:
    """log P(token | prompt and the tokens before it): int32[B, S, T] -> float32[B, S, T].

    All S texts of an image continue its prompt, which is read once.
    """
    first = jnp.broadcast_to(prompts.first[:, None, None], (*tokens.shape[:2], 1), out_sharding=ACT_B)
    before = jnp.broadcast_to(prompts.before[:, None, None], first.shape, out_sharding=ACT_B)
    row = jnp.concatenate([first, tokens[..., :-1]], -1)
    states, _ = self.decoder.write(prompts.memory, self.words(sight, row, before))
    scores = jax.nn.log_softmax(self.decoder.logits(states))
    return jnp.take_along_axis(scores, tokens[..., None], -1)[..., 0]

  def generate(self, sight: Sight, prompts: Prompted, decoding: Decoding, key=None) -> Generated:
    """Writes one text after each prompt."""
    parts = self.decoder.parts()

    def write(cache: Cache, tokens, before, place, lineage) -> tuple[jax.Array, Any]:
      x = self.words(sight, tokens[..., None], before[..., None])
      states, cache = self.decoder.write(prompts.memory, x, cache, place, lineage, parts)
      return self.decoder.logits(states)[:, :, 0], cache
    cache = self.decoder.cache(prompts.first.shape[0], decoding.beams, 1 + decoding.max_tokens)
    return generate_after(write, cache, prompts, decoding, key)


def shifted(rows: jax.Array, by: jax.Array, fill) -> jax.Array:
  """rows[b, s, t + by[b, s]] at [b, s, t], `fill` where there is none: [B, S, T], int32[B, S]."""
  at = jnp.arange(rows.shape[-1]) + by[..., None]
  inside = (at >= 0) & (at < rows.shape[-1])
  return jnp.where(inside, jnp.take_along_axis(rows, jnp.where(inside, at, 0), -1), fill)


def generative_config(config: dict) -> GenerativeConfig:
  """Nested plain dict (config.json, or a config file's `model`) -> GenerativeConfig.

  Raises ValueError naming an unknown key.
  """
  config = dict(config)
  kind = config.get("language_model", "opt")
  if kind not in DECODERS:
    raise ValueError(f"model.language_model={kind!r} is unknown: choose {', '.join(DECODERS)}")
  parts = {"vit": VitConfig, "qformer": QFormerConfig, "decoder": DECODERS[kind][0]}
  config["qformer"] = {"text": False, **config.get("qformer", {})}
  for name, part in parts.items():
    config[name] = build_config(part, config.get(name, {}), name + ".")
  return build_config(GenerativeConfig, config, "")
