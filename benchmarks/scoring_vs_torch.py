"""Scoring every text with every image (ITM and ITC) against PyTorch: 32 images, 50 texts.

    python benchmarks/scoring_vs_torch.py [--images 32] [--texts 50] [--dtype bfloat16]

Three ways to the same two tables of scores:
  ours      one call per image with all texts; the image's cross-attention keys and values are
            computed once
  batched   transformers' modules, one call per image with its features expanded to all texts
  pairwise  `Blip2ForImageTextRetrieval` as its documentation calls it, from pixels, once with and
            once without the ITM head for each pair; timed on some pairs and extrapolated to all
In `ours` and `batched` the ViT's features are computed before and left out of the time, and texts
and images are embedded once each for ITC. Prints one JSON line.
"""
import json
import statistics
import time

from flax import nnx
import jax
import numpy as np
import peers
import torch

from lskd_jax.models.student import PAD


def main() -> None:
  parser = peers.arguments(__doc__)
  parser.set_defaults(repeats=3, scan=False)
  parser.add_argument("--images", type=int, default=32)
  parser.add_argument("--texts", type=int, default=50)
  parser.add_argument("--pairs", type=int, default=20, help="pairs that the pairwise way is timed on")
  args = parser.parse_args()
  config = peers.student_config(args)
  model = peers.make_peer(config)
  image, tokens = peers.pictures(args.images, args.image_size), peers.texts(args.texts, args.text_tokens)
  with peers.mesh(), torch.inference_mode():
    graph, state = peers.make_student(config, model)
    results = compare(args, graph, state, model, image, tokens)
  print(json.dumps({"benchmark": "scoring_vs_torch", **peers.sizes(args), "images": args.images,
                    "texts": args.texts, **results}))


def compare(args, graph, state, model, image, tokens) -> dict:
  model = model.to(getattr(torch, args.dtype)).requires_grad_(False)
  pixels, torch_tokens = peers.pixels(image).to(model.dtype), peers.put(tokens)
  features = torch.cat([peers.see(model, part) for part in pixels.split(8)])
  rows = [peers.on_mesh({"features": row[None], "boxes": np.zeros((1, 8, 4), np.float32),
                         "valid": np.zeros((1, 8), bool)}) for row in features.float().cpu().numpy()]
  tokens = peers.on_mesh({"tokens": tokens[None]})["tokens"]

  def embed(state, tokens):
    return nnx.merge(graph, state).embed_text(tokens)[0]

  def score(state, row, tokens, texts):
    student = nnx.merge(graph, state)
    sight = student.see(row["features"], row["boxes"], row["valid"])
    image = student.embed_image(student.read_image(sight)[0])[0]
    return student.match(sight, tokens)[0, :, 1], (image @ texts.T).max(0)
  embed, embed_s, embed_flops = peers.compiled(jax.jit(embed), state, tokens)
  texts = embed(state, tokens)
  score, score_s, score_flops = peers.compiled(jax.jit(score), state, rows[0], tokens, texts)

  def ours():
    texts = embed(state, tokens)
    return [score(state, row, tokens, texts) for row in rows]

  def batched():
    norm = model.vision_model.post_layernorm
    texts = peers.embed_text(model, torch_tokens)
    found = []
    for row in features:
      row = norm(row[None])
      image = peers.embed_image(model, peers.query_pass(model, row))[0]
      expanded = row.expand(len(torch_tokens), -1, -1)
      found.append((peers.match(model, expanded, torch_tokens)[:, 1], (image @ texts.T).max(0).values))
    return found
  wanted, torch_flops = peers.counted(batched)
  errors = {name: peers.check(name, np.stack([pair[i] for pair in ours()]),
                              torch.stack([pair[i] for pair in wanted]), args.dtype)
            for i, name in enumerate(("itm", "itc"))}
  times = peers.time_in_turn(ours, batched, args.repeats)
  flops = embed_flops + args.images * score_flops
  pair = pair_seconds(args, model, pixels, torch_tokens, wanted)
  pairwise = 1e3 * pair * args.images * args.texts
  return {**times, "compile_s": round(embed_s + score_s, 1), "ours_gflop": round(flops / 1e9),
          "torch_gflop": round(torch_flops / 1e9),
          "mfu": peers.utilisation(flops, times["ours_ms"]), "differences": errors,
          "pairwise_ms": round(pairwise), "pairwise_ratio": round(pairwise / times["ours_ms"], 1),
          "pairwise_is": f"extrapolated from {args.pairs} of {args.images * args.texts} pairs"}


def pair_seconds(args, model, pixels, tokens, wanted) -> float:
  """Median seconds of one pair, both scores, the first left out; they must be those of `wanted`."""
  rng, seconds, scores = np.random.default_rng(0), [], []
  images, texts = (rng.integers(0, n, args.pairs + 1) for n in (args.images, args.texts))
  for i, k in zip(images, texts):
    text = tokens[k:k + 1, :int((tokens[k] != PAD).sum())]  # alone, a text needs no padding
    call = {"pixel_values": pixels[i:i + 1], "input_ids": text, "attention_mask": torch.ones_like(text)}
    start = time.perf_counter()
    itm = model(**call, use_image_text_matching_head=True).logits_per_image[0, 1].item()
    itc = model(**call, use_image_text_matching_head=False).logits_per_image[0, 0].item()
    seconds.append(time.perf_counter() - start)
    scores.append((itm, itc))
  for name, values, table in zip(("itm", "itc"), zip(*scores), zip(*wanted)):
    peers.check(f"{name} of pairs", values, torch.stack(table)[images, texts], args.dtype)
  return statistics.median(seconds[1:])


if __name__ == "__main__":
  main()
