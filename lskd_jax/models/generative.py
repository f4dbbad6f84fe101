"""The generative student: ViT + Q-Former + region tokens, whose query states a decoder reads (BLIP-2).

The projected query states stand before the words of a prompt. ViT and decoder are usually frozen: the
Q-Former, the projection and the region embedding are trained. A mention carries its region's vector
wherever it stands, in a prompt or in what is written (site T, through Z_lm).
Axes: B images, S texts of an image, P tokens of a prompt, T of a text, Q queries, R region slots,
E width of the decoder's word embeddings, V its vocabulary.
"""
import dataclasses
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp

from lskd_jax.models import layers
from lskd_jax.models.decoders.attention import Cache
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
    x = self.decoder.embed(tokens)
    if sight.mention is None:
      return x
    slots = mention_slots(tokens, self.opens_bracket[...], self.digit[...], self.config.max_regions,
                          before)
    return x + at_mentions(slots, sight.mention)

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
    def write(cache: Cache, tokens, before, place, lineage) -> tuple[jax.Array, Any]:
      x = self.words(sight, tokens[..., None], before[..., None])
      states, cache = self.decoder.write(prompts.memory, x, cache, place, lineage)
      return self.decoder.logits(states)[:, :, 0], cache
    cache = self.decoder.cache(prompts.first.shape[0], decoding.beams, 1 + decoding.max_tokens)
    return generate_after(write, cache, prompts, decoding, key)


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
