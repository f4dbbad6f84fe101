"""A student with region tokens in PyTorch, self-contained: it travels with the weights it runs.

    from transformers import AutoModel, AutoTokenizer
    model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    tokens = AutoTokenizer.from_pretrained(folder)(texts, return_tensors="pt", padding=True)
    scores = model.score(pixel_values, boxes, tokens.input_ids)

It is transformers' Blip2ForImageTextRetrieval, whose weights it loads as they are, with what
`lskd.safetensors` holds beside them. Inference only: dropout is not applied.
"""
import math

from safetensors.torch import load_file
import torch
from torch.nn import functional as F
from transformers import Blip2ForImageTextRetrieval
from transformers.utils import cached_file

ROI = 3           # RoIAlign bins per side
SAMPLES = 2       # of a bin, per side
FREQUENCIES = 8   # octaves of the box encoding
PAD = 0


class LskdStudent(Blip2ForImageTextRetrieval):
  """The student. Axes: S texts of one picture, T tokens, R regions, Q queries, N patches."""

  def __init__(self, config):
    super().__init__(config)
    self.settings = config.lskd
    self.vision_model.post_layernorm.eps = self.settings["vision_eps"]

  @classmethod
  def from_pretrained(cls, folder, *args, **options):
    """As transformers', and with the region tokens and heads of `lskd.safetensors`."""
    loaded = super().from_pretrained(folder, *args, **options)
    model = loaded[0] if isinstance(loaded, tuple) else loaded
    for name, value in load_file(cached_file(folder, "lskd.safetensors")).items():
      model.register_buffer(name.replace("/", "__"), value.to(model.device), persistent=False)
    return loaded

  def own(self, name):
    """A tensor of `lskd.safetensors`; kernels are [inputs, outputs]."""
    return getattr(self, name.replace("/", "__"))

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
    features = self.vision_model.encoder(self.vision_model.embeddings(pixel_values))
    features = self.vision_model.post_layernorm(features.last_hidden_state)
    uses_regions = self.settings["region_mode"] in ("tokens", "both") and len(boxes)
    regions = mention = None
    if uses_regions:
      features, regions, mention = self._regions(features[0], boxes.float())
    slots = self.mention_slots(input_ids)
    at = F.one_hot(slots.clamp(min=-1) + 1, self.settings["max_regions"] + 1)[..., 1:].float()
    pointed = 0 if mention is None else at[..., :len(boxes)] @ mention
    count, real = len(input_ids), input_ids != PAD
    queries = self.qformer.layernorm(self.query_tokens)
    memory = [self._memory(layer, features, regions) for layer in self.qformer.encoder.layer]

    seen, _, cache = self._run(queries, None, None, memory)
    image = F.normalize(self.vision_projection(seen), dim=-1)

    identity = 0
    if self.settings["region_mode"] in ("tokens", "both") and "T" in self.settings["sites"]:
      identity = at @ (rms_norm(self.own("regions/slot")) @ self.own("regions/identity_gate"))
    alone = self._run(None, self._embed(input_ids, identity), real[:, None, None])[1]
    text = F.normalize(self.text_projection(alone[:, 0]), dim=-1)

    size = queries.shape[1]
    mask = torch.cat([real.new_ones(count, size), real], 1)[:, None, None]
    fused = self._run(queries.expand(count, -1, -1), self._embed(input_ids, pointed), mask, memory)[0]

    started = torch.cat([torch.full_like(input_ids[:, :1], self.settings["decoder_start"]),
                         input_ids[:, 1:]], 1)
    length = input_ids.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=real.device).tril()
    mask = torch.cat([causal.new_ones(length, size), causal], 1)[None, None]
    states = self._run(None, self._embed(started, pointed), mask, cache=cache)[1]
    logits = self._language_head(states)[:, :-1].log_softmax(-1)
    words = logits.gather(-1, input_ids[:, 1:, None])[..., 0]
    return {"itm": self.itm_head(fused).mean(1)[:, 1], "itc": (text @ image[0].T).max(-1).values,
            "words": F.pad(words, (1, 0))}

  def mention_slots(self, input_ids):
    """The slot that each token mentions, or -1: int64[S, T] -> int64[S, T]."""
    before = F.pad(input_ids, (1, 0))[:, :-1]
    opened = self.own("table/opens_bracket").bool()[before]
    opened[:, 0] = False
    number, most = self.own("table/digit").long()[input_ids], self.settings["max_regions"]
    minus = torch.full_like(number, -1)
    return torch.where(number >= most, number - most, torch.where(opened, number, minus))

  def _regions(self, features, boxes):
    """Sites P, Q, T: painted features [1, 1 + N, C], RoI tokens [1, R * 9, C], mentions [R, D]."""
    patches, sites = features[1:], self.settings["sites"]
    grid = math.isqrt(len(patches))
    cover = coverage(boxes, grid).flatten(1)
    pooled = cover @ patches / (cover.sum(1, keepdim=True) + 1e-6)
    encoded = encode_boxes(boxes) @ self.own("regions/geometry_in/kernel")
    hidden = F.gelu(encoded + self.own("regions/geometry_in/bias"), approximate="tanh")
    geometry = hidden @ self.own("regions/geometry_out/kernel") + self.own("regions/geometry_out/bias")
    mention = None
    if "T" in sites:
      mention = rms_norm(geometry + pooled @ self.own("regions/content/kernel"))
      mention = mention @ self.own("regions/mention_gate")
    if "P" in sites:
      paint = (geometry + self.own("regions/slot")[:len(boxes)]) @ self.own("regions/paint_gate")
      features = torch.cat([features[:1], patches + cover.T @ paint])
    tokens = None
    if "Q" in sites:
      tokens = roi_align(features[1:].reshape(grid, grid, -1), boxes).flatten(0, 2)[None]
    return features[None], tokens, mention

  def _memory(self, layer, features, regions):
    """What a layer's queries read: keys and values of the picture, and of its regions."""
    if not layer.has_cross_attention:
      return None
    attention = layer.crossattention.attention
    return [None if rows is None else (self._heads(attention.key(rows)),
                                       self._heads(attention.value(rows)))
            for rows in (features, regions)]

  def _run(self, queries, text, mask, memory=None, cache=None):
    """Queries, text or both through the Q-Former -> queries, text, own keys and values."""
    caches, group = [], 0
    for i, layer in enumerate(self.qformer.encoder.layer):
      rows = [x for x in (queries, text) if x is not None]
      x, attention = torch.cat(rows, 1), layer.attention.attention
      q, k, v = (self._heads(part(x)) for part in (attention.query, attention.key, attention.value))
      caches.append((k, v))
      if cache is not None:
        k, v = (torch.cat([old.expand(len(x), -1, -1, -1), new], 2)
                for old, new in zip(cache[i], (k, v)))
      x = layer.attention.output(attend(q, k, v, mask), x)
      size = 0 if queries is None else queries.shape[1]
      if queries is not None:
        queries = x[:, :size]
        if layer.has_cross_attention:
          q = self._heads(layer.crossattention.attention.query(queries))
          picture, regions = memory[i]
          seen = attend(q, *picture)
          if regions is not None:
            gate = torch.tanh(self.own("qformer/stack/blocks/blocks/0/cross/gate")[group])
            width = seen.shape[-1] // len(gate)
            seen = seen + gate.repeat_interleave(width) * attend(q, *regions)
          queries = layer.crossattention.output(seen, queries)
        queries = layer.output_query(layer.intermediate_query(queries), queries)
      if text is not None:
        text = layer.output(layer.intermediate(x[:, size:]), x[:, size:])
      group += layer.has_cross_attention
    return queries, text, caches

  def _heads(self, x):
    """[B, T, D] -> [B, h, T, k]."""
    return x.unflatten(-1, (self.config.qformer_config.num_attention_heads, -1)).transpose(1, 2)

  def _embed(self, input_ids, mention):
    positions = self.embeddings.position_embeddings.weight[:input_ids.shape[1]]
    return self.qformer.layernorm(self.embeddings.word_embeddings(input_ids) + positions + mention)

  def _language_head(self, x):
    x = F.gelu(x @ self.own("language_head/dense/kernel") + self.own("language_head/dense/bias"))
    x = F.layer_norm(x, x.shape[-1:], self.own("language_head/norm/scale"),
                     self.own("language_head/norm/bias"),
                     self.config.qformer_config.layer_norm_eps)
    return x @ self.embeddings.word_embeddings.weight.T + self.own("language_head/bias")


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
