"""Students with region tokens in PyTorch, self-contained: it travels with the weights it runs.

    from transformers import AutoModel, AutoTokenizer
    model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    tokens = AutoTokenizer.from_pretrained(folder)(texts, return_tensors="pt", padding=True)
    scores = model.score(pixel_values, boxes, tokens.input_ids)

`LskdStudent` is transformers' Blip2ForImageTextRetrieval, `LskdGenerative` its
Blip2ForConditionalGeneration (AutoModelForImageTextToText); their weights are loaded as they are, with
what `lskd.safetensors` holds beside them. Inference only: dropout is not applied. It computes in float32,
whatever the dtype of the files.
Axes: S texts of one picture, T tokens, P of a prompt, R regions, Q queries, N patches.
"""
import math

from safetensors.torch import load_file
import torch
from torch.nn import functional as F
from transformers import Blip2ForConditionalGeneration, Blip2ForImageTextRetrieval
from transformers.utils import cached_file

ROI = 3           # RoIAlign bins per side
SAMPLES = 2       # of a bin, per side
FREQUENCIES = 8   # octaves of the box encoding
PAD = 0           # of a student without a decoder
WHERE = ("revision", "token", "cache_dir", "subfolder", "local_files_only", "force_download", "proxies")


class LskdStudent(Blip2ForImageTextRetrieval):
  """A student that matches texts with pictures."""

  @classmethod
  def from_pretrained(cls, folder, *args, **options):
    """As transformers', and with the region tokens and heads of `lskd.safetensors`."""
    return with_side_file(super().from_pretrained(folder, *args, **options), folder, options)

  @torch.no_grad()
  def score(self, pixel_values, boxes, input_ids):
    """How well each text fits one picture whose regions its mentions [0], [1] … point at.

    Args:
      pixel_values: float32[1, 3, H, W], normalised as `preprocessor_config.json` says.
      boxes: float32[R, 4], x1 y1 x2 y2 in [0, 1] of the picture.
      input_ids: int64[S, T], [CLS] text [SEP], padded.

    Returns:
      itm float32[S], the match logit; itc float32[S], the cosine; words float32[S, T], the
      log-likelihood of each token in the causal pass (0 for the first).
    """
    settings = self.config.lskd
    memory, mention = see(self, pixel_values, boxes)
    slots = mention_slots(self, input_ids)
    pointed = at_mentions(slots, mention)
    count, real = len(input_ids), input_ids != PAD
    queries = self.qformer.layernorm(self.query_tokens)

    seen, _, cache = run(self, queries, None, None, memory)
    image = F.normalize(self.vision_projection(seen), dim=-1)

    identity = 0
    if settings["region_mode"] in ("tokens", "both") and "T" in settings["sites"]:
      identity = at_mentions(slots, rms_norm(own(self, "regions/slot"))
                             @ own(self, "regions/identity_gate"))
    alone = run(self, None, self._embed(input_ids, identity), real[:, None, None])[1]
    text = F.normalize(self.text_projection(alone[:, 0]), dim=-1)

    size = queries.shape[1]
    mask = torch.cat([real.new_ones(count, size), real], 1)[:, None, None]
    fused = run(self, queries.expand(count, -1, -1), self._embed(input_ids, pointed), mask, memory)[0]

    started = torch.cat([torch.full_like(input_ids[:, :1], settings["decoder_start"]),
                         input_ids[:, 1:]], 1)
    length = input_ids.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=real.device).tril()
    mask = torch.cat([causal.new_ones(length, size), causal], 1)[None, None]
    states = run(self, None, self._embed(started, pointed), mask, cache=cache)[1]
    words = likelihoods(self._language_head(states)[:, :-1], input_ids[:, 1:])
    return {"itm": self.itm_head(fused).mean(1)[:, 1], "itc": (text @ image[0].T).max(-1).values,
            "words": F.pad(words, (1, 0))}

  def _embed(self, input_ids, mention):
    positions = self.embeddings.position_embeddings.weight[:input_ids.shape[1]]
    return self.qformer.layernorm(self.embeddings.word_embeddings(input_ids) + positions + mention)

  def _language_head(self, x):
    x = F.gelu(x @ own(self, "language_head/dense/kernel") + own(self, "language_head/dense/bias"))
    x = F.layer_norm(x, x.shape[-1:], own(self, "language_head/norm/scale"),
                     own(self, "language_head/norm/bias"), self.config.qformer_config.layer_norm_eps)
    return x @ self.embeddings.word_embeddings.weight.T + own(self, "language_head/bias")


class LskdGenerative(Blip2ForConditionalGeneration):
  """A student whose decoder, OPT or T5, writes about pictures."""

  @classmethod
  def from_pretrained(cls, folder, *args, **options):
    """As transformers', and with the region tokens of `lskd.safetensors`."""
    return with_side_file(super().from_pretrained(folder, *args, **options), folder, options)

  @torch.no_grad()
  def score(self, pixel_values, boxes, input_ids, answer_ids):
    """How likely each answer is after one prompt about one picture.

    Args:
      pixel_values, boxes: as in LskdStudent.score.
      input_ids: int64[P], the prompt, without tokens for the picture: OPT's begins with its start
        token, T5's ends with its end token.
      answer_ids: int64[S, T], padded at the end with any token.

    Returns:
      float32[S, T], the log-likelihood of each token.
    """
    image, mention = self._read_image(pixel_values, boxes)
    size = answer_ids.shape[1]
    return likelihoods(self._logits(image, mention, input_ids, answer_ids)[:, -size - 1:-1], answer_ids)

  @torch.no_grad()
  def ask(self, pixel_values, boxes, input_ids, max_tokens=30):
    """The likeliest continuation of a prompt, token by token: int64[n], without its end token."""
    image, mention = self._read_image(pixel_values, boxes)
    end, written = self.generation_config.eos_token_id, input_ids[:0]
    while len(written) < max_tokens:
      token = self._logits(image, mention, input_ids, written[None])[0, -1].argmax()
      if token == end:
        break
      written = torch.cat([written, token[None]])
    return written

  def _read_image(self, pixel_values, boxes):
    """What stands before a prompt [1, Q, E], and the vectors of the regions [R, E]."""
    memory, mention = see(self, pixel_values, boxes)
    states = run(self, self.qformer.layernorm(self.query_tokens), None, None, memory)[0]
    return self.language_projection(states), mention

  def _logits(self, image, mention, input_ids, answer_ids):
    """Of what follows each token: float32[S, …, V], the last T + 1 for the answer and after it."""
    count = len(answer_ids)
    prompt = input_ids[None].expand(count, -1)
    if self.config.use_decoder_only_language_model:
      rows = self._embed(torch.cat([prompt, answer_ids], 1), mention)
      rows = torch.cat([image.expand(count, -1, -1), rows], 1)
      return self.language_model(inputs_embeds=rows).logits
    read = torch.cat([image.expand(count, -1, -1), self._embed(prompt, mention)], 1)
    start = answer_ids.new_full((count, 1), self.generation_config.decoder_start_token_id)
    written = self._embed(torch.cat([start, answer_ids], 1), mention)
    return self.language_model(inputs_embeds=read, decoder_inputs_embeds=written).logits

  def _embed(self, ids, mention):
    return self.get_input_embeddings()(ids) + at_mentions(mention_slots(self, ids), mention)


# --- what both share; `model` is either ----------------------------------------------------------


def with_side_file(loaded, folder, options):
  """A loaded model as the student computes it, with the tensors of `lskd.safetensors`.

  Kernels are [inputs, outputs].
  """
  model = loaded[0] if isinstance(loaded, tuple) else loaded
  model.float()
  where = {name: options[name] for name in WHERE if name in options}
  model.vision_model.post_layernorm.eps = model.config.lskd["vision_eps"]
  for name, value in load_file(cached_file(folder, "lskd.safetensors", **where)).items():
    model.register_buffer(name.replace("/", "__"), value.to(model.device), persistent=False)
  return loaded


def own(model, name):
  """A tensor of `lskd.safetensors`."""
  return getattr(model, name.replace("/", "__"))


def see(model, pixel_values, boxes):
  """What the Q-Former reads of a picture and its regions, layer by layer, and mention vectors [R, D]."""
  features = model.vision_model.encoder(model.vision_model.embeddings(pixel_values))
  features = model.vision_model.post_layernorm(features.last_hidden_state)
  tokens = mention = None
  if model.config.lskd["region_mode"] == "overlay" and len(boxes):
    raise ValueError("boxes: this student sees regions that are drawn on the picture, and no boxes")
  if model.config.lskd["region_mode"] in ("tokens", "both") and len(boxes):
    features, tokens, mention = region_tokens(model, features[0], boxes.float())
  memory = []
  for layer in model.qformer.encoder.layer:
    attention = layer.crossattention.attention if layer.has_cross_attention else None
    memory.append(attention and [
        None if rows is None else (heads(model, attention.key(rows)), heads(model, attention.value(rows)))
        for rows in (features, tokens)])
  return memory, mention


def mention_slots(model, input_ids):
  """The slot that each token mentions, or -1: int64[S, T] -> int64[S, T]."""
  before = F.pad(input_ids, (1, 0))[:, :-1]
  opened = own(model, "table/opens_bracket").bool()[before]
  opened[:, 0] = False
  number, most = own(model, "table/digit").long()[input_ids], model.config.lskd["max_regions"]
  minus = torch.full_like(number, -1)
  return torch.where(number >= most, number - most, torch.where(opened, number, minus))


def at_mentions(slots, vectors):
  """The vector of each mentioned slot: int64[S, T], [R, D] -> [S, T, D]; 0 where there is none."""
  if vectors is None:
    return 0
  there = (slots >= 0) & (slots < len(vectors))
  return vectors[slots.clamp(0, len(vectors) - 1)] * there[..., None]


def region_tokens(model, features, boxes):
  """Sites P, Q, T: painted features [1, 1 + N, C], RoI tokens [1, R * 9, C], mentions [R, D]."""
  patches, sites = features[1:], model.config.lskd["sites"]
  grid = math.isqrt(len(patches))
  cover = coverage(boxes, grid).flatten(1)
  pooled = cover @ patches / (cover.sum(1, keepdim=True) + 1e-6)
  encoded = encode_boxes(boxes) @ own(model, "regions/geometry_in/kernel")
  hidden = F.gelu(encoded + own(model, "regions/geometry_in/bias"), approximate="tanh")
  geometry = hidden @ own(model, "regions/geometry_out/kernel") + own(model, "regions/geometry_out/bias")
  mention = None
  if "T" in sites:
    mention = rms_norm(geometry + pooled @ own(model, "regions/content/kernel"))
    mention = mention @ own(model, "regions/mention_gate")
  if "P" in sites:
    paint = (geometry + own(model, "regions/slot")[:len(boxes)]) @ own(model, "regions/paint_gate")
    features = torch.cat([features[:1], patches + cover.T @ paint])
  tokens = None
  if "Q" in sites:
    tokens = roi_align(features[1:].reshape(grid, grid, -1), boxes).flatten(0, 2)[None]
  return features[None], tokens, mention


def run(model, queries, text, mask, memory=None, cache=None):
  """Queries, text or both through the Q-Former -> queries, text, own keys and values."""
  caches, group = [], 0
  for i, layer in enumerate(model.qformer.encoder.layer):
    rows = [x for x in (queries, text) if x is not None]
    x, attention = torch.cat(rows, 1), layer.attention.attention
    q, k, v = (heads(model, part(x)) for part in (attention.query, attention.key, attention.value))
    caches.append((k, v))
    if cache is not None:
      k, v = (torch.cat([old.expand(len(x), -1, -1, -1), new], 2)
              for old, new in zip(cache[i], (k, v)))
    x = layer.attention.output(attend(q, k, v, mask), x)
    size = 0 if queries is None else queries.shape[1]
    if queries is not None:
      queries = x[:, :size]
      if layer.has_cross_attention:
        q = heads(model, layer.crossattention.attention.query(queries))
        picture, regions = memory[i]
        seen = attend(q, *picture)
        if regions is not None:
          gate = torch.tanh(own(model, "qformer/stack/blocks/blocks/0/cross/gate")[group])
          width = seen.shape[-1] // len(gate)
          seen = seen + gate.repeat_interleave(width) * attend(q, *regions)
        queries = layer.crossattention.output(seen, queries)
      queries = layer.output_query(layer.intermediate_query(queries), queries)
    if text is not None:
      text = layer.output(layer.intermediate(x[:, size:]), x[:, size:])
    group += layer.has_cross_attention
  return queries, text, caches


def heads(model, x):
  """[B, T, D] -> [B, h, T, k]."""
  return x.unflatten(-1, (model.config.qformer_config.num_attention_heads, -1)).transpose(1, 2)


def likelihoods(logits, tokens):
  """log P(token): float32[S, T, V], int64[S, T] -> float32[S, T]."""
  return logits.float().log_softmax(-1).gather(-1, tokens[..., None])[..., 0]


def attend(q, k, v, mask=None):
  """[B, h, T, k] … -> [B, T, D]; mask is True where attention is allowed."""
  seen = F.scaled_dot_product_attention(q, k.expand(len(q), -1, -1, -1),
                                        v.expand(len(q), -1, -1, -1), mask)
  return seen.transpose(1, 2).flatten(2)


def rms_norm(x):
  return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


def coverage(boxes, grid):
  """Share of each patch that each box covers: [R, 4] -> [R, grid, grid]."""
  cells = torch.arange(grid, device=boxes.device)

  def overlap(low, high):
    ends = torch.minimum(high[:, None] * grid, cells + 1)
    return (ends - torch.maximum(low[:, None] * grid, cells)).clamp(0, 1)
  return overlap(boxes[:, 1], boxes[:, 3])[:, :, None] * overlap(boxes[:, 0], boxes[:, 2])[:, None]


def encode_boxes(boxes):
  """[p, sin(2^j pi p), cos(2^j pi p)] of p = (x1, y1, x2, y2, w, h): [R, 4] -> [R, 102]."""
  p = torch.cat([boxes, boxes[:, 2:] - boxes[:, :2]], 1)
  angles = p[..., None] * (2.0**torch.arange(FREQUENCIES, device=boxes.device) * math.pi)
  return torch.cat([p, angles.flatten(1).sin(), angles.flatten(1).cos()], 1)


def roi_align(features, boxes):
  """RoIAlign (He et al. 2017): [H, W, C], [R, 4] -> [R, 3, 3, C], y first."""
  def hats(low, high, size):
    t = (torch.arange(ROI * SAMPLES, device=boxes.device) + 0.5) / (ROI * SAMPLES)
    at = (low[:, None] * size - 0.5 + t * (high - low)[:, None] * size).clamp(0, size - 1)
    hats = (1 - (at[..., None] - torch.arange(size, device=boxes.device)).abs()).relu()
    return hats.unflatten(1, (ROI, SAMPLES)).mean(2)
  high, wide = features.shape[:2]
  return torch.einsum("rsh,rtw,hwc->rstc", hats(boxes[:, 1], boxes[:, 3], high),
                      hats(boxes[:, 0], boxes[:, 2], wide), features)
