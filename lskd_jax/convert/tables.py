"""Which tensor of a PyTorch BLIP-2 is which part of which leaf of ours: one explicit table.

Two schemes of names: `HF`, transformers' `Blip2ForImageTextRetrieval`, and `LAVIS`, the stage-1 model
of salesforce/LAVIS (`Blip2Qformer`), from which the authors' checkpoints and LSKD's come. The tensors
are the same; LAVIS stores no key bias of the ViT, and has the language head and ITC's temperature,
which transformers leaves out. `LAVIS_CLIP` is LAVIS with CLIP's ViT, which transformers' BLIP-2 cannot
hold.

A table is a bijection: `check` refuses a checkpoint with a key too many, a key too few or another
shape, in one line that lists all of them.
"""
from collections.abc import Iterable
import dataclasses
import math
from typing import NamedTuple

import numpy as np

from lskd_jax.models.student import StudentConfig
from lskd_jax.trees import CheckpointError, LeafReader, differences


class Entry(NamedTuple):
  """One tensor of theirs and the part of our leaf that it fills.

  theirs, shape: its key and shape in PyTorch.
  ours: the name of our leaf. at: leading indices into it (the block of a stack, q k or v), () = all.
  layout: how the numbers are arranged: `same` order; `linear`, a kernel that PyTorch stores as
    [outputs, inputs] and we as inputs + outputs; `patches`, a convolution whose stride is its size;
    `log`, a number of which we keep the logarithm.
  """
  theirs: str
  shape: tuple[int, ...]
  ours: str
  at: tuple[int, ...] = ()
  layout: str = "same"


@dataclasses.dataclass(frozen=True)
class Scheme:
  """The names of one PyTorch implementation. {i} is a block's number.

  vit_*: of the ViT; the first of vit_attention is what stands before `weight` and `bias` of q, k and
  v. vit_input_norm: "" = none. vit_batch_axis: whether class token and positions have one. key_bias:
  whether the ViT's q, k and v share one bias tensor, or only q and v have one each. qformer_*: of the
  Q-Former; `inner` is the word between an attention and its query, key and value. *_proj: of the
  contrastive embeddings. language_head, temperature: "" = none. ignored: keys that hold nothing to
  load.
  """
  vit_class: str
  vit_positions: str
  vit_patches: str
  vit_block: str
  vit_norms: tuple[str, str]
  vit_attention: tuple[str, str]
  vit_mlp: tuple[str, str]
  key_bias: bool
  ln_vision: str
  words: str
  positions: str
  qformer_norm: str
  qformer_block: str
  inner: str
  vision_proj: str
  text_proj: str
  vit_input_norm: str = ""
  vit_batch_axis: bool = True
  language_head: str = ""
  temperature: str = ""
  ignored: tuple[str, ...] = ()


HF = Scheme(
    vit_class="vision_model.embeddings.class_embedding",
    vit_positions="vision_model.embeddings.position_embedding",
    vit_patches="vision_model.embeddings.patch_embedding",
    vit_block="vision_model.encoder.layers.{i}.",
    vit_norms=("layer_norm1", "layer_norm2"),
    vit_attention=("self_attn.qkv.", "self_attn.projection"),
    vit_mlp=("mlp.fc1", "mlp.fc2"),
    key_bias=True,
    ln_vision="vision_model.post_layernorm",
    words="embeddings.word_embeddings.weight",
    positions="embeddings.position_embeddings.weight",
    qformer_norm="qformer.layernorm",
    qformer_block="qformer.encoder.layer.{i}.",
    inner="attention",
    vision_proj="vision_projection",
    text_proj="text_projection",
    ignored=("embeddings.position_ids",),  # a buffer that transformers 4 stored
)
LAVIS = Scheme(
    vit_class="visual_encoder.cls_token",
    vit_positions="visual_encoder.pos_embed",
    vit_patches="visual_encoder.patch_embed.proj",
    vit_block="visual_encoder.blocks.{i}.",
    vit_norms=("norm1", "norm2"),
    vit_attention=("attn.qkv.", "attn.proj"),
    vit_mlp=("mlp.fc1", "mlp.fc2"),
    key_bias=False,
    ln_vision="ln_vision",
    words="Qformer.bert.embeddings.word_embeddings.weight",
    positions="Qformer.bert.embeddings.position_embeddings.weight",
    qformer_norm="Qformer.bert.embeddings.LayerNorm",
    qformer_block="Qformer.bert.encoder.layer.{i}.",
    inner="self",
    vision_proj="vision_proj",
    text_proj="text_proj",
    language_head="Qformer.cls.predictions",
    temperature="temp",
    # A buffer, and two tensors that are tied to others.
    ignored=("Qformer.bert.embeddings.position_ids", "Qformer.cls.predictions.decoder.weight",
             "Qformer.cls.predictions.decoder.bias"),
)
LAVIS_CLIP = dataclasses.replace(
    LAVIS,
    vit_class="visual_encoder.class_embedding",
    vit_positions="visual_encoder.positional_embedding",
    vit_patches="visual_encoder.conv1",
    vit_block="visual_encoder.transformer.resblocks.{i}.",
    vit_norms=("ln_1", "ln_2"),
    vit_attention=("attn.in_proj_", "attn.out_proj"),
    vit_mlp=("mlp.c_fc", "mlp.c_proj"),
    key_bias=True,
    vit_input_norm="visual_encoder.ln_pre",
    vit_batch_axis=False,
)


def lavis_scheme(config: StudentConfig) -> Scheme:
  """LAVIS's names of a student: CLIP's ViT, which has a norm before its blocks, has its own."""
  return LAVIS_CLIP if config.vit.input_norm else LAVIS


def student_table(config: StudentConfig, scheme: Scheme) -> list[Entry]:
  """Every tensor of a stage-1 BLIP-2 of this size."""
  width, vision, embed = config.qformer.width, config.vit.width, config.embed
  return [
      *vit_table(config, scheme),
      *norm(scheme.ln_vision, "ln_vision", vision),
      Entry(scheme.words, (config.qformer.vocabulary, width), "qformer/words"),
      Entry(scheme.positions, (config.qformer.max_tokens, width), "qformer/positions"),
      Entry("query_tokens", (1, config.qformer.queries, width), "qformer/query_tokens"),
      *norm(scheme.qformer_norm, "qformer/norm", width),
      *qformer_blocks(config, scheme),
      *linear(scheme.vision_proj, "vision_proj", width, embed),
      *linear(scheme.text_proj, "text_proj", width, embed),
      *linear("itm_head", "itm_head", width, 2),
      *_language_head(config, scheme),
      *([Entry(scheme.temperature, (), "log_temperature", (), "log")] if scheme.temperature else []),
  ]


def critic_table(config: StudentConfig, scheme: Scheme) -> list[Entry]:
  """Every tensor of LSKD's critic (`Blip2Critic`), which comes in LAVIS's names only.

  Its accept head is stage 1's ITM head trained further, label 1 = accept; `qa_head` and `r_head` are
  Linear, ReLU, Linear. It has nothing for contrast.
  """
  table, width = [], config.qformer.width
  for entry in student_table(config, scheme):
    part = entry.ours.partition("/")[0]
    if part == "itm_head":
      table.append(entry._replace(ours=entry.ours.replace(part, "accept")))
    elif part not in ("vision_proj", "text_proj", "log_temperature"):
      table.append(entry._replace(ours=f"student/{entry.ours}"))
  for theirs, ours in (("qa_head", "answer"), ("r_head", "rationale")):
    table += linear(f"{theirs}.0", f"{ours}/hidden", width, width)
    table += linear(f"{theirs}.2", f"{ours}/out", width, 1)
  return table


def vit_table(config: StudentConfig, scheme: Scheme) -> list[Entry]:
  """The ViT's tensors alone: LAVIS keeps a frozen ViT in a file of its own."""
  vit = config.vit
  block = "vit/stack/blocks"
  batch = scheme.vit_batch_axis
  table = [
      Entry(scheme.vit_class, (1, 1, vit.width) if batch else (vit.width,), "vit/class_token"),
      Entry(scheme.vit_positions, (1,) * batch + (vit.tokens, vit.width), "vit/positions"),
      Entry(f"{scheme.vit_patches}.weight", (vit.width, 3, vit.patch, vit.patch),
            "vit/patchify/kernel", (), "patches"),
  ]
  if vit.patch_bias:
    table.append(Entry(f"{scheme.vit_patches}.bias", (vit.width,), "vit/patchify/bias"))
  if vit.input_norm:
    table += norm(scheme.vit_input_norm, "vit/input_norm", vit.width)
  (qkv, out), (up, down) = scheme.vit_attention, scheme.vit_mlp
  for i in range(vit.depth):
    prefix = scheme.vit_block.format(i=i)
    for ours, theirs in zip(("norm1", "norm2"), scheme.vit_norms):
      table += norm(prefix + theirs, f"{block}/{ours}", vit.width, (i,))
    table.append(Entry(f"{prefix}{qkv}weight", (3 * vit.width, vit.width), f"{block}/qkv/kernel",
                       (i,), "linear"))
    if scheme.key_bias:
      table.append(Entry(f"{prefix}{qkv}bias", (3 * vit.width,), f"{block}/qkv/bias", (i,)))
    else:
      attention = prefix + qkv.partition(".")[0]
      table += [Entry(f"{attention}.{name}_bias", (vit.width,), f"{block}/qkv/bias", (i, row))
                for name, row in (("q", 0), ("v", 2))]
    table += linear(prefix + out, f"{block}/out", vit.width, vit.width, (i,))
    table += linear(prefix + up, f"{block}/mlp/up", vit.width, vit.hidden, (i,))
    table += linear(prefix + down, f"{block}/mlp/down", vit.hidden, vit.width, (i,))
  return table


def qformer_blocks(config, scheme: Scheme) -> Iterable[Entry]:
  """The Q-Former's blocks of a student of either kind."""
  size, width = config.qformer, config.qformer.width
  for i in range(size.depth):
    group, member = divmod(i, size.cross_every)
    ours, theirs = f"qformer/stack/blocks/blocks/{member}", scheme.qformer_block.format(i=i)
    attentions = [("attention", "attention", width)]
    if member == 0:
      attentions.append(("cross", "crossattention", config.vit.width))
    for name, key, memory in attentions:
      for part, inputs in (("query", width), ("key", memory), ("value", memory)):
        yield from linear(f"{theirs}{key}.{scheme.inner}.{part}", f"{ours}/{name}/{part}", inputs,
                           width, (group,))
      yield from linear(f"{theirs}{key}.output.dense", f"{ours}/{name}/out", width, width, (group,))
      yield from norm(f"{theirs}{key}.output.LayerNorm", f"{ours}/{name}/norm", width, (group,))
    for name, suffix in (("text_forward", ""), ("query_forward", "_query"))[not size.text:]:
      yield from linear(f"{theirs}intermediate{suffix}.dense", f"{ours}/{name}/mlp/up", width,
                         size.hidden, (group,))
      yield from linear(f"{theirs}output{suffix}.dense", f"{ours}/{name}/mlp/down", size.hidden,
                         width, (group,))
      yield from norm(f"{theirs}output{suffix}.LayerNorm", f"{ours}/{name}/norm", width, (group,))


def _language_head(config: StudentConfig, scheme: Scheme) -> Iterable[Entry]:
  if scheme.language_head:
    width = config.qformer.width
    yield Entry(f"{scheme.language_head}.bias", (config.qformer.vocabulary,), "language_head/bias")
    transform = f"{scheme.language_head}.transform"
    yield from linear(f"{transform}.dense", "language_head/dense", width, width)
    yield from norm(f"{transform}.LayerNorm", "language_head/norm", width)


def linear(theirs: str, ours: str, inputs: int, outputs: int, at=()) -> list[Entry]:
  """A linear layer with a bias."""
  return [Entry(f"{theirs}.weight", (outputs, inputs), f"{ours}/kernel", at, "linear"),
          Entry(f"{theirs}.bias", (outputs,), f"{ours}/bias", at)]


def norm(theirs: str, ours: str, width: int, at=()) -> list[Entry]:
  """A layer norm with a bias."""
  return [Entry(f"{theirs}.weight", (width,), f"{ours}/scale", at),
          Entry(f"{theirs}.bias", (width,), f"{ours}/bias", at)]


# --- numbers -------------------------------------------------------------------------------------


def to_ours(entry: Entry, tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
  """A tensor of theirs as the part of our leaf that has this shape."""
  if entry.layout == "log":
    return np.log(tensor.astype(np.float64)).astype(np.float32)
  if entry.layout == "linear":
    tensor = tensor.T
  elif entry.layout == "patches":
    tensor = tensor.transpose(2, 3, 1, 0)
  return tensor.reshape(shape)


def to_theirs(entry: Entry, part: np.ndarray) -> np.ndarray:
  """The inverse of `to_ours`: bit for bit, but for the rounding of a `log`."""
  if entry.layout == "log":
    return np.exp(part.astype(np.float64)).astype(np.float32)
  if entry.layout == "linear":
    return part.reshape(entry.shape[::-1]).T
  if entry.layout == "patches":
    width, colours, high, wide = entry.shape
    return part.reshape(high, wide, colours, width).transpose(3, 2, 0, 1)
  return part.reshape(entry.shape)


def read_theirs(entry: Entry, reader: LeafReader) -> np.ndarray:
  """One tensor of theirs from a model directory; nothing but its row of our leaf is read."""
  row, *deeper = entry.at or (None,)
  return to_theirs(entry, reader.read(entry.ours, row)[tuple(deeper)])


# --- checks --------------------------------------------------------------------------------------


def check(table: list[Entry], found: dict[str, tuple[int, ...]], ignored: Iterable[str],
          where) -> None:
  """Raises one CheckpointError that lists every key too few, too many or of another shape.

  found: {key: shape} of a checkpoint.
  """
  show = lambda shape: "x".join(map(str, shape)) or "scalar"
  text = differences({key: show(shape) for key, shape in found.items() if key not in ignored},
                     {entry.theirs: show(entry.shape) for entry in table},
                     ("missing", "unknown", "of another shape"), "{}, the config says {}")
  if text:
    raise CheckpointError(f"{where} is not the BLIP-2 that its config describes: {text}")


def uncovered(table: list[Entry], shapes: dict[str, tuple[int, ...]]) -> list[str]:
  """Our leaves that no entry fills, such as the region tokens.

  Raises AssertionError where a leaf is filled twice or in part, other than by LAVIS's ViT without
  key biases: the table itself would be wrong.
  """
  filled: dict[str, int] = {}
  places = set()
  for entry in table:
    assert (entry.ours, entry.at) not in places, entry
    places.add((entry.ours, entry.at))
    filled[entry.ours] = filled.get(entry.ours, 0) + math.prod(entry.shape)
  for name, count in filled.items():
    size = math.prod(shapes[name])
    assert count == size or name.endswith("vit/stack/blocks/qkv/bias") and 3 * count == 2 * size, name
  return [name for name in shapes if name not in filled]
