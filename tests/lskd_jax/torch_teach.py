"""transformers' BLIP-2 with a decoder as the reference for training: its loss, its gradients, and the
same weights in our generative student."""
from typing import NamedTuple

from flax import nnx
import jax
import numpy as np
import torch
from transformers import Blip2Config, Blip2ForConditionalGeneration

from lskd_jax import trees
from lskd_jax.convert import decoders, tables
from lskd_jax.models.decoders.opt import OptConfig
from lskd_jax.models.decoders.t5 import T5Config
from lskd_jax.models.generative import GenerativeConfig, GenerativeStudent
from lskd_jax.models.qformer import QFormerConfig
from lskd_jax.models.student import StudentConfig
from lskd_jax.models.vit import VitConfig
from tests.lskd_jax import tiny
from tests.lskd_jax.torch_blip2 import noise, normalised

VIT = VitConfig(image_size=32, patch=8, width=16, depth=1, heads=4, hidden=28)
QFORMER = QFormerConfig(width=24, depth=2, heads=2, hidden=36, queries=5, cross_every=1, text=False)
VOCABULARY = tiny.VOCABULARY
PLACEHOLDER = VOCABULARY - 1  # what stands for a query in transformers, and so in no text
# Rows of tests/lskd_jax/tiny.py: [CLS] … [SEP].
OPT = OptConfig(vocabulary=VOCABULARY, width=20, embed=20, depth=2, heads=2, hidden=33, max_tokens=40,
                pad=tiny.PAD, start=tiny.CLS, end=tiny.SEP)
T5 = T5Config(vocabulary=VOCABULARY, width=20, head=7, heads=3, hidden=33, depth=2, decoder_depth=2,
              pad=tiny.PAD, start=tiny.PAD, end=tiny.SEP)


def config_of(kind: str, **changes) -> GenerativeConfig:
  return GenerativeConfig(vit=VIT, qformer=QFORMER, language_model=kind, max_regions=tiny.REGIONS,
                          decoder={"opt": OPT, "t5": T5}[kind], vision_eps=VIT.eps, **changes)


def reference(kind: str, seed: int = 0) -> Blip2ForConditionalGeneration:
  """A BLIP-2 of noise of the sizes above."""
  if kind == "opt":
    text = dict(model_type="opt", hidden_size=OPT.width, word_embed_proj_dim=OPT.embed,
                num_hidden_layers=OPT.depth, num_attention_heads=OPT.heads, ffn_dim=OPT.hidden,
                max_position_embeddings=OPT.max_tokens, dropout=0.0)
  else:
    text = dict(model_type="t5", d_model=T5.width, d_kv=T5.head, num_heads=T5.heads, d_ff=T5.hidden,
                num_layers=T5.depth, num_decoder_layers=T5.decoder_depth, dropout_rate=0.0,
                feed_forward_proj="gated-gelu", tie_word_embeddings=False, dense_act_fn="gelu",
                decoder_start_token_id=T5.start)
  model = Blip2ForConditionalGeneration(Blip2Config(
      vision_config=dict(image_size=VIT.image_size, patch_size=VIT.patch, hidden_size=VIT.width,
                         num_hidden_layers=VIT.depth, num_attention_heads=VIT.heads,
                         intermediate_size=VIT.hidden),
      qformer_config=dict(hidden_size=QFORMER.width, num_hidden_layers=QFORMER.depth,
                          num_attention_heads=QFORMER.heads, intermediate_size=QFORMER.hidden,
                          cross_attention_frequency=QFORMER.cross_every),
      text_config=dict(vocab_size=VOCABULARY, pad_token_id=tiny.PAD, bos_token_id=tiny.CLS,
                       eos_token_id=tiny.SEP, **text),
      num_query_tokens=QFORMER.queries, image_token_index=PLACEHOLDER))
  if kind == "t5":  # transformers 5 ties the head in memory whatever the config says
    head = model.language_model.lm_head
    head.weight = torch.nn.Parameter(torch.empty_like(head.weight))
  model = noise(model, seed)
  with torch.no_grad():
    for name, value in model.named_parameters():
      if name.endswith(".q.weight"):  # T5 does not scale its scores: its queries are small
        value *= T5.head**-0.5
  return model


def table_of(config: GenerativeConfig, shapes: dict) -> list[tables.Entry]:
  """The parts of stage 1 that a generative student has, the projection, and the decoder."""
  stage1 = tables.student_table(StudentConfig(vit=config.vit, qformer=config.qformer), tables.HF)
  table = [entry for entry in stage1 if entry.ours in shapes]
  table += tables.linear("language_projection", "decoder_proj", config.qformer.width, config.decoder.width)
  decoder = {"opt": decoders.opt_table, "t5": decoders.t5_table}[config.language_model]
  return table + decoder(config.decoder, "language_model.", "decoder/")


def ours(model, config: GenerativeConfig, closed=tiny.GATES) -> GenerativeStudent:
  """Our student with the numbers of theirs; its region tokens are noise, by default behind closed gates."""
  make = lambda rngs: GenerativeStudent(config, tiny.OPENS_BRACKET, tiny.DIGIT, rngs)
  graph, state = nnx.split(tiny.filled(make, closed=closed))
  leaves = trees.named_leaves(state)
  values = {name: np.array(leaf) for name, leaf in leaves.items()}
  tensors = {key: value.detach().numpy() for key, value in model.named_parameters()}
  table = table_of(config, values)
  tables.check(table, {key: value.shape for key, value in tensors.items()}, (), "the reference")
  rest = {name.partition("/")[0] for name in values} - {entry.ours.partition("/")[0] for entry in table}
  assert rest == {"regions", "opens_bracket", "digit"}
  for entry in table:
    part = values[entry.ours][(*entry.at, ...)]
    part[...] = tables.to_ours(entry, tensors[entry.theirs], part.shape)
  placed = [jax.device_put(values[name], leaf.sharding) for name, leaf in leaves.items()]
  return nnx.merge(graph, jax.tree.unflatten(jax.tree.structure(state), placed))


class Row(NamedTuple):
  """A text as transformers takes it: what stands before the labels, and the labels."""
  prompt: list[int]
  labels: list[int]


def their_loss(model, kind: str, image, rows: list[Row]) -> torch.Tensor:
  """The mean loss of one text for each picture uint8[B, H, W, 3], by transformers."""
  queries = [PLACEHOLDER] * QFORMER.queries
  if kind == "opt":
    inputs = [queries + row.prompt + row.labels for row in rows]
    labels = [[-100] * (len(queries) + len(row.prompt)) + row.labels for row in rows]
  else:
    inputs, labels = [queries + row.prompt for row in rows], [row.labels for row in rows]
  padded = lambda rows, fill: torch.tensor([row + [fill] * (max(map(len, rows)) - len(row)) for row in rows])
  mask = padded([[1] * len(row) for row in inputs], 0)
  return model(pixel_values=normalised(image), input_ids=padded(inputs, tiny.PAD), attention_mask=mask,
               labels=padded(labels, -100)).loss
