"""BLIP-2's stage 1 in PyTorch: transformers' modules, and what only LAVIS has, written from its definition.

transformers has no language head, no cached queries and no losses. Axes: B pictures and as many texts,
T tokens, Q queries, N image tokens, E embedding.
"""
import numpy as np
import torch
import torch.nn.functional as F

from lskd_jax.convert import tables
from lskd_jax.models.vit import PIXEL_MEAN, PIXEL_STD
from tests.lskd_jax import torch_blip2

VISION_EPS = 1e-5  # of ln_vision in LAVIS
TEMPERATURE, SMOOTHING, IGNORED = 0.07, 0.1, -100


class Head(torch.nn.Module):
  """BERT's prediction head, its decoder tied to the word embeddings."""

  def __init__(self, width, vocabulary):
    super().__init__()
    self.transform = torch.nn.ModuleDict({"dense": torch.nn.Linear(width, width),
                                          "LayerNorm": torch.nn.LayerNorm(width, eps=1e-12)})
    self.bias = torch.nn.Parameter(torch.zeros(vocabulary))

  def forward(self, x, words):
    return self.transform["LayerNorm"](F.gelu(self.transform["dense"](x))) @ words.T + self.bias


def stage1(shape, vocabulary, seed=0):
  """transformers' model of a shape with a `head` and a `temp`, in float64: all noise but `temp`."""
  model = torch_blip2.reference(shape, vocabulary)
  model.vision_model.post_layernorm.eps = VISION_EPS
  model.head = Head(model.config.qformer_config.hidden_size, vocabulary)
  torch_blip2.noise(model, seed)
  model.temp = torch.nn.Parameter(torch.tensor(TEMPERATURE))
  model.vision_model.embeddings.requires_grad_(False)
  model.vision_model.encoder.requires_grad_(False)
  return model.double()


def table(config):
  """The package's table of transformers' names, and of LAVIS's for what transformers leaves out."""
  found = tables.student_table(config, tables.HF)
  covered = {entry.ours for entry in found}
  return found + [entry for entry in tables.student_table(config, tables.LAVIS)
                  if entry.ours not in covered]


def parameter(model, entry):
  """The parameter of an entry of `table`."""
  return model.get_parameter(entry.theirs.replace("Qformer.cls.predictions", "head"))


# --- the passes ----------------------------------------------------------------------------------


def features(model, pixels):
  """What the ViT returns: uint8[B, H, W, 3] -> [B, N, C]."""
  scaled = (pixels / 255 - np.array(PIXEL_MEAN)) / np.array(PIXEL_STD)
  scaled = torch.tensor(scaled).permute(0, 3, 1, 2).to(model.dtype)
  return model.vision_model.encoder(model.vision_model.embeddings(scaled)).last_hidden_state


def query_pass(model, image):
  """[B, N, C] after ln_vision -> query states [B, Q, D], and the rows that entered each layer."""
  x, entered = model.qformer.layernorm(model.query_tokens).expand(len(image), -1, -1), []
  for layer in model.qformer.encoder.layer:
    entered.append(x)
    x = layer(x, encoder_hidden_states=image, query_length=x.shape[1])
  return x, entered


def text_pass(model, tokens):
  """int64[B, T] -> [B, T, D]."""
  return model.qformer(query_embeds=model.embeddings(input_ids=tokens), query_length=0,
                       attention_mask=(tokens > 0).long()).last_hidden_state


def fused_pass(model, image, tokens):
  """-> query states [B, Q, D] that have read image and text."""
  queries = model.query_tokens.expand(len(tokens), -1, -1)
  seen = torch.cat([torch.ones(queries.shape[:2]).long(), (tokens > 0).long()], 1)
  states = model.qformer(query_embeds=model.embeddings(input_ids=tokens, query_embeds=queries),
                         query_length=queries.shape[1], attention_mask=seen,
                         encoder_hidden_states=image).last_hidden_state
  return states[:, :queries.shape[1]]


def causal_pass(model, entered, tokens, start):
  """Text that sees every query, with the keys and values of the query pass, and the text before it.

  Its first token becomes `start`. -> [B, T, D].
  """
  started = torch.cat([torch.full_like(tokens[:, :1], start), tokens[:, 1:]], 1)
  x = model.qformer.layernorm(model.embeddings(input_ids=started))
  size = tokens.shape[1]
  before = torch.ones(size, size, dtype=torch.bool).tril()
  mask = torch.cat([torch.ones(size, entered[0].shape[1], dtype=torch.bool), before], 1)
  for layer, queries in zip(model.qformer.encoder.layer, entered):
    attention = layer.attention.attention
    split = lambda rows: rows.unflatten(-1, (attention.num_attention_heads, -1)).transpose(1, 2)
    seen = torch.cat([queries, x], 1)
    read = F.scaled_dot_product_attention(split(attention.query(x)), split(attention.key(seen)),
                                          split(attention.value(seen)), mask)
    x = layer.attention.output(read.transpose(1, 2).flatten(2), x)
    x = layer.output(layer.intermediate(x), x)
  return x


def passes(model, found, tokens, start):
  """Every sub-module after the ViT, on its features [B, N, C] and one text per picture.

  -> queries [B, Q, D], text [B, T, D], fused [B, Q, D], causal [B, T, D], words [B, T, V] (logits),
  itm [B, 2] (logits), image [B, Q, E] and sentence [B, E] (unit vectors), scores [B, B] (cosines).
  """
  image = model.vision_model.post_layernorm(found)
  queries, entered = query_pass(model, image)
  text, fused = text_pass(model, tokens), fused_pass(model, image, tokens)
  causal = causal_pass(model, entered, tokens, start)
  words = model.head(causal, model.embeddings.word_embeddings.weight)
  unit = F.normalize(model.vision_projection(queries), dim=-1)
  sentence = F.normalize(model.text_projection(text[:, 0]), dim=-1)
  return {"queries": queries, "text": text, "fused": fused, "causal": causal, "words": words,
          "itm": model.itm_head(fused).mean(1), "image": unit, "sentence": sentence,
          "scores": torch.einsum("bqe,ce->bqc", unit, sentence).amax(1)}


# --- the losses (LAVIS, Blip2Qformer.forward) ----------------------------------------------------


def losses(model, pixels, tokens, images, texts, start, detach_gathered):
  """ITC, ITM and LM; and what they come from, `passes` and the query states of ITM, pairs [3B, Q, D].

  Args:
    images, texts: int64[B], the picture that each text, and the text that each picture, is shown as a
      hard negative.
    detach_gathered: as LAVIS, where what comes from all devices carries no gradient.
  """
  with torch.no_grad():
    found = features(model, pixels)
  out = passes(model, found, tokens, start)
  gathered = lambda rows: rows.detach() if detach_gathered else rows
  to_text = torch.einsum("bqe,ce->bqc", out["image"], gathered(out["sentence"])).amax(1)
  to_image = torch.einsum("be,cqe->bcq", out["sentence"], gathered(out["image"])).amax(2)
  own = torch.arange(len(tokens))
  itc = [F.cross_entropy(scores / model.temp, own, label_smoothing=SMOOTHING)
         for scores in (to_text, to_image)]
  image = model.vision_model.post_layernorm(found)
  out["pairs"] = fused_pass(model, torch.cat([image, image[images], image]),
                            torch.cat([tokens, tokens, tokens[texts]]))
  labels = torch.cat([torch.ones_like(own), torch.zeros_like(own), torch.zeros_like(own)])
  following = tokens[:, 1:].masked_fill(tokens[:, 1:] == 0, IGNORED)
  lm = F.cross_entropy(out["words"][:, :-1].flatten(0, 1), following.flatten(),
                       label_smoothing=SMOOTHING, ignore_index=IGNORED)
  itm = F.cross_entropy(model.itm_head(out["pairs"]).mean(1), labels)
  return {"itc": sum(itc) / 2, "itm": itm, "lm": lm}, out
