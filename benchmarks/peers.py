"""The PyTorch side of the benchmarks: transformers' BLIP-2 with a student's weights, and fair timing.

The peer is `Blip2ForImageTextRetrieval` as transformers computes it (scaled_dot_product_attention),
with the language head, the temperature and the cached causal pass that LAVIS has and transformers
lacks, written in PyTorch over transformers' own layers. Both sides hold the same weights.
"""
import argparse
from collections.abc import Callable
import dataclasses
import statistics
import time

from flax import nnx
import jax
import numpy as np
import torch
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode
from transformers import Blip2Config, Blip2ForImageTextRetrieval

from lskd_jax import metrics, parallel, trees
from lskd_jax.convert import tables
from lskd_jax.models.qformer import QFormerConfig
from lskd_jax.models.student import PAD, Student, StudentConfig
from lskd_jax.models.vit import PIXEL_MEAN, PIXEL_STD, VitConfig

VOCABULARY, DEC = 30523, 30522  # bert-base-uncased and [DEC], which LAVIS appends
SCHEME = dataclasses.replace(tables.HF, language_head="language_head")


# --- arguments and inputs ------------------------------------------------------------------------


def arguments(doc: str) -> argparse.ArgumentParser:
  """A parser with the sizes and settings that all benchmarks have."""
  parser = argparse.ArgumentParser(description=doc.splitlines()[0],
                                   formatter_class=argparse.ArgumentDefaultsHelpFormatter)
  parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32",
                      help="of the computation, on both sides")
  parser.add_argument("--repeats", type=int, default=5, help="timed calls of each side, in turn")
  parser.add_argument("--image-size", type=int, default=224, help="px")
  parser.add_argument("--patch", type=int, default=16, help="px")
  parser.add_argument("--vit", type=int, nargs=3, default=(384, 12, 6), metavar=("D", "BLOCKS", "HEADS"))
  parser.add_argument("--qformer", type=int, nargs=3, default=(384, 6, 6),
                      metavar=("D", "BLOCKS", "HEADS"))
  parser.add_argument("--queries", type=int, default=32)
  parser.add_argument("--text-tokens", type=int, default=32)
  parser.add_argument("--scan", action=argparse.BooleanOptionalAction, default=True,
                      help="ours: scan over the Q-Former's blocks, as its config has it, or unroll them")
  return parser


def student_config(args, **changes) -> StudentConfig:
  """A student without regions, as transformers and LAVIS have none."""
  width, depth, heads = args.vit
  vit = VitConfig(image_size=args.image_size, patch=args.patch, width=width, depth=depth, heads=heads,
                  hidden=4 * width)
  width, depth, heads = args.qformer
  qformer = QFormerConfig(vocabulary=VOCABULARY, width=width, depth=depth, heads=heads,
                          hidden=4 * width, queries=args.queries, scan=args.scan)
  return StudentConfig(vit=vit, qformer=qformer, region_mode="none", vision_eps=1e-6,
                       decoder_start=DEC, dtype=args.dtype, **changes)


def sizes(args) -> dict:
  """The settings of a run, for its JSON line."""
  return {"device": device(), "jax_device": jax.devices()[0].device_kind, "dtype": args.dtype,
          "torch_threads": torch.get_num_threads(), "repeats": args.repeats,
          "image": [args.image_size, args.patch], "vit": list(args.vit), "qformer": list(args.qformer),
          "queries": args.queries, "text_tokens": args.text_tokens, "scan": args.scan}


def pictures(count: int, side: int, seed: int = 0) -> np.ndarray:
  """Noise: uint8[count, side, side, 3]."""
  return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), np.uint8)


def texts(*shape: int, seed: int = 0) -> np.ndarray:
  """Random words, from half a row to a full row long: int32[*shape], padded at the end."""
  rng = np.random.default_rng(seed)
  length = rng.integers(shape[-1] // 2, shape[-1] + 1, (*shape[:-1], 1))
  words = rng.integers(1000, VOCABULARY - 1, shape)
  return np.where(np.arange(shape[-1]) < length, words, PAD).astype(np.int32)


# --- the two models ------------------------------------------------------------------------------


def device() -> str:
  return "cuda" if torch.cuda.is_available() else "cpu"


def put(array: np.ndarray) -> torch.Tensor:
  """An array on PyTorch's device; integers as int64."""
  return torch.tensor(array, dtype=torch.long if array.dtype.kind == "i" else None, device=device())


def pixels(image: np.ndarray) -> torch.Tensor:
  """Normalised as CLIP does: uint8[N, H, W, 3] -> float32[N, 3, H, W]."""
  scaled = (image.astype(np.float32) / 255 - np.array(PIXEL_MEAN)) / np.array(PIXEL_STD)
  return put(scaled.astype(np.float32)).permute(0, 3, 1, 2).contiguous()


class Transform(torch.nn.Module):
  """BERT's prediction head up to the vocabulary."""

  def __init__(self, width: int, eps: float):
    super().__init__()
    self.dense = torch.nn.Linear(width, width)
    self.LayerNorm = torch.nn.LayerNorm(width, eps=eps)

  def forward(self, x):
    return self.LayerNorm(functional.gelu(self.dense(x)))


class LanguageHead(torch.nn.Module):
  """Its logits: a product with the word embeddings, to which it is tied, and a bias."""

  def __init__(self, width: int, vocabulary: int, eps: float):
    super().__init__()
    self.transform = Transform(width, eps)
    self.bias = torch.nn.Parameter(torch.zeros(vocabulary))

  def forward(self, x, words):
    return functional.linear(self.transform(x), words, self.bias)


def make_peer(config: StudentConfig, seed: int = 0) -> Blip2ForImageTextRetrieval:
  """transformers' model of this size, every parameter noise, plus `language_head` and `log_temperature`."""
  vit, qformer = config.vit, config.qformer
  model = Blip2ForImageTextRetrieval(Blip2Config(
      vision_config=dict(
          image_size=vit.image_size, patch_size=vit.patch, hidden_size=vit.width,
          num_hidden_layers=vit.depth, num_attention_heads=vit.heads, intermediate_size=vit.hidden),
      qformer_config=dict(
          vocab_size=qformer.vocabulary, hidden_size=qformer.width, num_hidden_layers=qformer.depth,
          num_attention_heads=qformer.heads, intermediate_size=qformer.hidden,
          max_position_embeddings=qformer.max_tokens, hidden_dropout_prob=qformer.dropout,
          attention_probs_dropout_prob=qformer.dropout, use_qformer_text_input=True,
          encoder_hidden_size=vit.width, cross_attention_frequency=qformer.cross_every),
      num_query_tokens=qformer.queries, image_text_hidden_size=config.embed))
  model.language_head = LanguageHead(qformer.width, qformer.vocabulary, qformer.eps)
  model.log_temperature = torch.nn.Parameter(torch.tensor(config.temperature).log())
  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for name, value in model.named_parameters():
      if name != "log_temperature":
        is_scale = value.ndim == 1 and name.endswith("weight")
        value.normal_(1.0 if is_scale else 0.0, 0.1 if value.ndim == 1 else 0.05, generator=generator)
  # XLA's default on GPUs, too.
  torch.set_float32_matmul_precision("high")
  return model.to(device()).eval()


def make_student(config: StudentConfig, model: Blip2ForImageTextRetrieval):
  """Graph and state of a student with the weights of `model`, on the mesh in use."""
  make = lambda: Student(config, np.zeros(config.qformer.vocabulary, bool),
                         np.full(config.qformer.vocabulary, -1), nnx.Rngs(0))
  graph, state = nnx.split(jax.jit(make)())
  return graph, nnx.merge_state(state, filled(state.filter(nnx.Param),
                                             tables.student_table(config, SCHEME), model))


def filled(params, table: list[tables.Entry], model: torch.nn.Module):
  """`params` with the weights of PyTorch's `model`, as a table places them."""
  tensors = model.state_dict()
  leaves = {name: np.array(value) for name, value in trees.named_leaves(params).items()}
  for entry in table:
    part = leaves[entry.ours][(*entry.at, ...)]
    part[...] = tables.to_ours(entry, tensors[entry.theirs].float().cpu().numpy(), part.shape)
  values = iter(leaves.values())
  return jax.tree.map(lambda leaf: jax.device_put(next(values), leaf.sharding), params)


# --- the peer's passes ---------------------------------------------------------------------------


def see(model, image: torch.Tensor) -> torch.Tensor:
  """The ViT without its last norm, which is trained: [N, 3, H, W] -> [N, 1 + grid^2, C]."""
  vision = model.vision_model
  return vision.encoder(vision.embeddings(image)).last_hidden_state


def ones(rows: int, columns: int) -> torch.Tensor:
  return torch.ones(rows, columns, dtype=torch.long, device=device())


def query_pass(model, features: torch.Tensor) -> torch.Tensor:
  """[N, M, C] -> [N, Q, D]."""
  return model.qformer(query_embeds=model.query_tokens.expand(len(features), -1, -1),
                       encoder_hidden_states=features).last_hidden_state


def text_pass(model, tokens: torch.Tensor) -> torch.Tensor:
  """int64[N, T] -> [N, T, D]."""
  return model.qformer(query_embeds=model.embeddings(input_ids=tokens), query_length=0,
                       attention_mask=(tokens != PAD).long()).last_hidden_state


def match(model, features: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
  """The fused pass: [N, M, C], int64[N, T] -> [N, 2]."""
  rows, queries = len(tokens), model.query_tokens.shape[1]
  embeds = model.embeddings(input_ids=tokens,
                            query_embeds=model.query_tokens.expand(rows, -1, -1))
  mask = torch.cat([ones(rows, queries), (tokens != PAD).long()], 1)
  states = model.qformer(query_embeds=embeds, query_length=queries, attention_mask=mask,
                         encoder_hidden_states=features).last_hidden_state
  return model.itm_head(states[:, :queries]).mean(1)


def embed_image(model, query_states: torch.Tensor) -> torch.Tensor:
  return functional.normalize(model.vision_projection(query_states), dim=-1)


def embed_text(model, tokens: torch.Tensor) -> torch.Tensor:
  return functional.normalize(model.text_projection(text_pass(model, tokens)[:, 0]), dim=-1)


def cached_query_pass(model, features: torch.Tensor):
  """`query_pass` that also returns every layer's self-attention keys and values."""
  x, cache = model.qformer.layernorm(model.query_tokens.expand(len(features), -1, -1)), []
  for layer in model.qformer.encoder.layer:
    x, kept = _self_attention(layer.attention, x)
    cache.append(kept)
    if layer.has_cross_attention:
      x = layer.crossattention(hidden_states=x, encoder_hidden_states=features)
    x = layer.feed_forward_chunk_query(x)
  return x, cache


def causal_pass(model, cache: list, tokens: torch.Tensor) -> torch.Tensor:
  """Text that sees the cached queries and the text before it: int64[N, T] -> [N, T, D]."""
  size, queries = tokens.shape[1], cache[0][0].shape[2]
  mask = torch.ones(size, queries + size, dtype=torch.bool, device=device()).tril(queries)
  x = model.qformer.layernorm(model.embeddings(input_ids=tokens))
  for layer, past in zip(model.qformer.encoder.layer, cache):
    x = layer.feed_forward_chunk(_self_attention(layer.attention, x, past, mask)[0])
  return x


def _self_attention(attention, x, past=None, mask=None):
  """A layer's self-attention to its rows and to cached ones before them; also its keys and values."""
  inner = attention.attention
  split = lambda linear: linear(x).unflatten(-1, (inner.num_attention_heads, -1)).transpose(1, 2)
  query, key, value = split(inner.query), split(inner.key), split(inner.value)
  kept = key, value
  if past is not None:
    key, value = torch.cat([past[0], key], 2), torch.cat([past[1], value], 2)
  seen = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
  return attention.output(seen.transpose(1, 2).flatten(2), x), kept


# --- checks and timing ---------------------------------------------------------------------------


def check(name: str, ours, theirs: torch.Tensor, dtype: str) -> float:
  """The largest difference relative to the largest value; ends the benchmark if it is too large."""
  ours = np.asarray(ours, np.float64)
  theirs = theirs.detach().double().cpu().numpy()
  error = float(np.abs(ours - theirs).max() / np.abs(theirs).max())
  if not error <= (1e-4 if dtype == "float32" and device() == "cpu" else 5e-2):
    raise SystemExit(f"{name}: ours and PyTorch's differ by {error:.1e} of the largest value")
  return float(f"{error:.1e}")


def compiled(function, *args):
  """A jitted function compiled for `args`, the seconds that took, and its FLOPs."""
  start = time.perf_counter()
  traced = function.trace(*args)
  run = traced.lower().compile()
  return run, round(time.perf_counter() - start, 1), metrics.step_flops(traced)


def counted(function: Callable):
  """What a call of PyTorch returns, and the FLOPs of its matrix products.

  On CPUs those inside attention are missing: PyTorch's counter knows no formula for that kernel.
  """
  with FlopCounterMode(display=False) as counter:
    found = function()
  return found, counter.get_total_flops()


def time_in_turn(ours: Callable, theirs: Callable, repeats: int) -> dict:
  """Median milliseconds of both, called in turn after a warm-up call each."""
  def theirs_done():
    theirs()
    if device() == "cuda":
      torch.cuda.synchronize()
  calls = {"ours": lambda: jax.block_until_ready(ours()), "torch": theirs_done}
  seconds = {name: [] for name in calls}
  for turn in range(repeats + 1):
    for name, call in calls.items():
      start = time.perf_counter()
      call()
      if turn:
        seconds[name].append(time.perf_counter() - start)
  medians = {name: statistics.median(values) for name, values in seconds.items()}
  return {"ours_ms": round(1e3 * medians["ours"], 1), "torch_ms": round(1e3 * medians["torch"], 1),
          "ratio": round(medians["torch"] / medians["ours"], 2)}


def utilisation(flops: float, milliseconds: float) -> float | None:
  """Share of the device's peak FLOP/s; None where the peak is not known."""
  peak = metrics.peak_flops(jax.devices()[0])
  return peak and round(flops / (milliseconds / 1e3 * peak), 3)


def mesh():
  """One device, the first that JAX sees."""
  return jax.set_mesh(parallel.make_mesh())



def on_mesh(rows: dict) -> dict:
  """NumPy rows on the mesh in use."""
  return parallel.put_batch(rows, jax.sharding.get_mesh())
