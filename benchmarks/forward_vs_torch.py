"""ViT and Q-Former forward against transformers' modules: the query pass and the fused ITM pass.

    python benchmarks/forward_vs_torch.py [--batch 8] [--dtype bfloat16]

Three rows, each checked to give the same numbers before it is timed: the ViT; the query pass from
the ViT's features; the fused pass of one text per image from the same features, cross-attention
keys and values included. Prints one JSON line.
"""
import json

from flax import nnx
import jax
import numpy as np
import peers
import torch


def main() -> None:
  parser = peers.arguments(__doc__)
  parser.add_argument("--batch", type=int, default=8, help="images")
  args = parser.parse_args()
  config = peers.student_config(args)
  model = peers.make_peer(config)
  image, tokens = peers.pictures(args.batch, args.image_size), peers.texts(args.batch, args.text_tokens)
  with peers.mesh():
    graph, state = peers.make_student(config, model)
    results = compare(args, graph, state, model, image, tokens)
  print(json.dumps({"benchmark": "forward_vs_torch", **peers.sizes(args), "batch": args.batch,
                    "passes": results}))


def compare(args, graph, state, model, image, tokens) -> dict:
  """Agreement, times and FLOPs of each row."""
  batch = peers.on_mesh({
      "image": image, "tokens": tokens[:, None], "boxes": np.zeros((args.batch, 8, 4), np.float32),
      "valid": np.zeros((args.batch, 8), bool)})

  def student(state):
    return nnx.merge(graph, state)

  def see(state, features, batch):
    return student(state).see(features, batch["boxes"], batch["valid"])
  ours = {
      "vit": lambda state, features, batch: student(state).vit(batch["image"]),
      "query_pass": lambda state, features, batch: student(state).read_image(
          see(state, features, batch))[0],
      "fused_pass": lambda state, features, batch: student(state).match(
          see(state, features, batch), batch["tokens"])[:, 0]}
  model = model.to(getattr(torch, args.dtype)).requires_grad_(False)
  pixels, tokens = peers.pixels(image).to(model.dtype), peers.put(tokens)
  results = {}
  with torch.inference_mode():
    features = peers.see(model, pixels)
    norm = model.vision_model.post_layernorm
    theirs = {"vit": lambda: peers.see(model, pixels),
              "query_pass": lambda: peers.query_pass(model, norm(features)),
              "fused_pass": lambda: peers.match(model, norm(features), tokens)}
    inputs = state, peers.on_mesh({"x": features.float().cpu().numpy()})["x"], batch
    for name, function in ours.items():
      run, seconds, flops = peers.compiled(jax.jit(function), *inputs)
      wanted, torch_flops = peers.counted(theirs[name])
      error = peers.check(name, run(*inputs), wanted, args.dtype)
      times = peers.time_in_turn(lambda: run(*inputs), theirs[name], args.repeats)
      results[name] = {**times, "compile_s": seconds, "ours_gflop": round(flops / 1e9, 1),
                       "torch_gflop": round(torch_flops / 1e9, 1),
                       "mfu": peers.utilisation(flops, times["ours_ms"]), "difference": error}
  return results


if __name__ == "__main__":
  main()
