"""Which tensor of a BLIP-2 with a decoder in PyTorch is which part of which leaf of ours.

A decoder's names are transformers', behind the prefix it has inside a BLIP-2.
"""
from lskd_jax.convert import tables
from lskd_jax.convert.tables import Entry, Scheme, linear, norm
from lskd_jax.models.decoders.opt import OFFSET, OptConfig
from lskd_jax.models.decoders.t5 import T5Config
from lskd_jax.models.generative import GenerativeConfig

# Copies of the word table, and a bias that no T5 uses though the first checkpoints have it.
T5_IGNORED = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight",
              "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight")


OPT_IGNORED = ("lm_head.weight",)  # the head is the word table


def generative_table(config: GenerativeConfig, scheme: Scheme = tables.HF) -> list[Entry]:
  """Every tensor of a BLIP-2 with a decoder: `Blip2ForConditionalGeneration`, or LAVIS's stage 2."""
  width = config.qformer.width
  decoder = decoder_table(config, decoder_prefix(config, scheme))
  embed = decoder[0].shape[1]  # of the word embeddings
  projection = "language_projection" if scheme is tables.HF else f"{config.language_model}_proj"
  return [
      *tables.vit_table(config, scheme),
      *norm(scheme.ln_vision, "ln_vision", config.vit.width),
      Entry("query_tokens", (1, config.qformer.queries, width), "qformer/query_tokens"),
      *norm(scheme.qformer_norm, "qformer/norm", width),
      *tables.qformer_blocks(config, scheme),
      *linear(projection, "decoder_proj", width, embed),
      *decoder,
  ]


def decoder_prefix(config: GenerativeConfig, scheme: Scheme) -> str:
  """What stands before the decoder's own keys."""
  return "language_model." if scheme is tables.HF else f"{config.language_model}_model."


def decoder_table(config: GenerativeConfig, prefix: str) -> list[Entry]:
  """The decoder's tensors alone; the word embeddings come first."""
  make = {"opt": opt_table, "t5": t5_table}[config.language_model]
  return make(config.decoder, prefix, "decoder/")


def decoder_ignored(config: GenerativeConfig, prefix: str) -> tuple[str, ...]:
  """Keys of a decoder that hold nothing to load."""
  if config.language_model == "t5":
    return t5_ignored(config.decoder, prefix)
  return tuple(prefix + key for key in OPT_IGNORED)


def t5_ignored(config: T5Config, prefix: str) -> tuple[str, ...]:
  """Keys of a `T5ForConditionalGeneration` that hold nothing to load: a tied head is one more copy."""
  return tuple(prefix + key for key in (*T5_IGNORED, *(["lm_head.weight"] if config.tied else [])))


def t5_table(config: T5Config, prefix: str, ours: str) -> list[Entry]:
  """Every tensor of a `T5ForConditionalGeneration` of this size.

  Args:
    prefix: of their keys, such as "language_model." in a BLIP-2.
    ours: of our names, such as "decoder/".
  """
  words = (config.vocabulary, config.width)
  table = [Entry(f"{prefix}shared.weight", words, f"{ours}words")]
  if not config.tied:
    table.append(Entry(f"{prefix}lm_head.weight", words, f"{ours}head"))
  for tower, depth in (("encoder", config.depth), ("decoder", config.decoder_depth)):
    table += [
        Entry(f"{prefix}{tower}.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
              (config.buckets, config.heads), f"{ours}{tower}/distances"),
        Entry(f"{prefix}{tower}.final_layer_norm.weight", (config.width,), f"{ours}{tower}/norm/scale"),
    ]
    for i in range(depth):
      table += _t5_block(config, f"{prefix}{tower}.block.{i}.layer.", f"{ours}{tower}/stack/blocks/", i,
                         cross=tower == "decoder")
  return table


def _t5_block(config: T5Config, theirs: str, ours: str, i: int, cross: bool) -> list[Entry]:
  """Theirs: sub-layers 0, 1, 2 of a block, each with a norm; ours: by name."""
  width, inner = config.width, config.heads * config.head
  heads = [("q", "query", (inner, width)), ("k", "key", (inner, width)), ("v", "value", (inner, width)),
           ("o", "out", (width, inner))]
  up, down = (config.hidden, width), (width, config.hidden)
  gated = [("wi_0", "gate", up), ("wi_1", "up", up), ("wo", "down", down)]
  sublayers = [("SelfAttention", "attention", heads)]
  if cross:
    sublayers.append(("EncDecAttention", "cross", heads))
  sublayers.append(("DenseReluDense", "forward",
                    gated if config.gated else [("wi", "up", up), ("wo", "down", down)]))
  table = []
  for number, (key, name, parts) in enumerate(sublayers):
    table.append(Entry(f"{theirs}{number}.layer_norm.weight", (width,), f"{ours}{name}_norm/scale", (i,)))
    table += [Entry(f"{theirs}{number}.{key}.{part}.weight", shape, f"{ours}{name}/{leaf}/kernel", (i,),
                    "linear") for part, leaf, shape in parts]
  return table


def opt_table(config: OptConfig, prefix: str, ours: str) -> list[Entry]:
  """Every tensor of an `OPTForCausalLM` of this size. prefix, ours: as above."""
  theirs, width = f"{prefix}model.decoder.", config.width
  table = [
      Entry(f"{theirs}embed_tokens.weight", (config.vocabulary, config.embed), f"{ours}words"),
      Entry(f"{theirs}embed_positions.weight", (config.max_tokens + OFFSET, width),
            f"{ours}positions"),
  ]
  if config.embed != width:
    for name, sizes in (("project_in", (width, config.embed)), ("project_out", (config.embed, width))):
      table.append(Entry(f"{theirs}{name}.weight", sizes, f"{ours}{name}/kernel", (), "linear"))
  if config.final_norm:
    table += norm(f"{theirs}final_layer_norm", f"{ours}norm", width)
  for i in range(config.depth):
    key, block = f"{theirs}layers.{i}.", f"{ours}stack/blocks/"
    for name, part in (("query", "q"), ("key", "k"), ("value", "v"), ("out", "out")):
      table += linear(f"{key}self_attn.{part}_proj", block + name, width, width, (i,))
    table += norm(f"{key}self_attn_layer_norm", f"{block}attention_norm", width, (i,))
    table += linear(f"{key}fc1", f"{block}up", width, config.hidden, (i,))
    table += linear(f"{key}fc2", f"{block}down", config.hidden, width, (i,))
    table += norm(f"{key}final_layer_norm", f"{block}forward_norm", width, (i,))
  return table
