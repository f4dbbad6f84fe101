"""The stage-1 training step (ITC + ITM + LM, AdamW) against PyTorch, with one and four statements an image.

    python benchmarks/stage1_step_vs_torch.py [--statements 1 4] [--dtype bfloat16]

PyTorch's side is transformers' ViT and Q-Former with the losses as LAVIS defines them. LAVIS has one
text per image, so several statements are several rows that repeat the image. On both sides the ViT
is frozen and part of the step. Before the timing, both compute the losses and the norm of the
gradient of a batch in which every draw of a negative has the same outcome: half of its images show
one thing and half another. Prints one JSON line.
"""
import json
from types import SimpleNamespace

from flax import nnx
import jax
import numpy as np
import peers
import torch
from torch.nn import functional

from lskd_jax import losses, optim, step
from lskd_jax.models.student import PAD

LOSS = {"itc": 1.0, "itm": 1.0, "lm": 1.0, "region_swap": 0.0, "question": 1.0, "end": 0.0,
        "smoothing": 0.1, "detach_gathered": False, "itc_block": 0, "pool": 0}
ADAM = SimpleNamespace(learning_rate=1e-4, warmup_steps=0, steps=1000, final_share=1.0, clip_norm=1.0,
                       b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.05)


def main() -> None:
  parser = peers.arguments(__doc__)
  parser.set_defaults(scan=False)
  parser.add_argument("--batch", type=int, default=8, help="images of a step")
  parser.add_argument("--statements", type=int, nargs="+", default=(1, 4), help="texts per image")
  args = parser.parse_args()
  results = {}
  with peers.mesh():
    for statements in args.statements:
      results[f"statements_{statements}"] = compare(args, statements)
  print(json.dumps({"benchmark": "stage1_step_vs_torch", **peers.sizes(args), "batch": args.batch,
                    **results}))


def compare(args, statements: int) -> dict:
  """Both sides of one shape: agreement, times, compile time, FLOPs."""
  config = peers.student_config(args)
  model = peers.make_peer(config)
  graph, params, frozen = step.split(nnx.merge(*peers.make_student(config, model)), ("vit", "regions"))
  optimizer = optim.optimizer(ADAM)
  train_step = step.make_train_step(graph, optimizer, losses.student_objective(LOSS),
                                    {name: LOSS[name] for name in ("itc", "itm", "lm")})
  state = jax.jit(lambda params: step.init_state(params, optimizer))(params)
  key = jax.random.key(0)
  rows = make_batch(args, statements, distinct=False)
  batch = peers.on_mesh(rows)
  run, seconds, flops = peers.compiled(train_step, state, frozen, batch, key)
  theirs = TorchStep(model, args.dtype)
  state, ours = run(state, frozen, batch, key)
  wanted = theirs(theirs.rows(rows))
  errors = {name: peers.check(name, ours[name], wanted[name], args.dtype)
            for name in ("itc", "itm", "lm", "grad_norm")}

  rows = make_batch(args, statements)
  batch, torch_rows = peers.on_mesh(rows), theirs.rows(rows)
  _, torch_flops = peers.counted(lambda: theirs(torch_rows))

  def next_step():
    nonlocal state
    state, values = run(state, frozen, batch, key)
    return values
  times = peers.time_in_turn(next_step, lambda: theirs(torch_rows), args.repeats)
  return {**times, "ours_ms_per_statement": round(times["ours_ms"] / args.batch / statements, 1),
          "compile_s": seconds, "ours_gflop": round(flops / 1e9), "torch_gflop": round(torch_flops / 1e9),
          "mfu": peers.utilisation(flops, times["ours_ms"]), "differences": errors}


def make_batch(args, statements: int, distinct: bool = True) -> dict:
  """A batch as the loader gives it. Not distinct: two images only, each with one text, repeated."""
  count = args.batch if distinct else 2
  image = peers.pictures(count, args.image_size)
  tokens = peers.texts(count, statements if distinct else 1, args.text_tokens)
  ids = np.arange(count, dtype=np.int32)
  if not distinct:
    which = np.arange(args.batch) % 2
    image, tokens, ids = image[which], np.repeat(tokens[which], statements, 1), ids[which]
  return {"image": image, "image_id": ids, "tokens": tokens,
          "fields": np.where(tokens != PAD, losses.CAPTION, 0).astype(np.int8),
          "statement_valid": np.ones(tokens.shape[:2], bool),
          "boxes": np.zeros((args.batch, 8, 4), np.float32),
          "region_valid": np.zeros((args.batch, 8), bool)}


class TorchStep:
  """LAVIS's `Blip2Qformer.forward` over transformers' modules, and a step of AdamW."""

  def __init__(self, model, dtype: str):
    self.model = model.train()
    for parameter in [*model.vision_model.embeddings.parameters(),
                      *model.vision_model.encoder.parameters()]:
      parameter.requires_grad_(False)
    self.trained = [p for p in model.parameters() if p.requires_grad]
    self.optimizer = torch.optim.AdamW(self.trained, ADAM.learning_rate, (ADAM.b1, ADAM.b2), ADAM.eps,
                                       ADAM.weight_decay, fused=True)
    self.cast = lambda: torch.autocast(peers.device(), torch.bfloat16, enabled=dtype == "bfloat16")

  def rows(self, batch: dict) -> dict:
    """One row per statement: its image repeated."""
    repeats = batch["tokens"].shape[1]
    return {"pixels": peers.pixels(batch["image"]).repeat_interleave(repeats, 0),
            "image_id": peers.put(batch["image_id"].repeat(repeats)),
            "tokens": peers.put(batch["tokens"].reshape(-1, batch["tokens"].shape[2])),
            "repeats": repeats}

  def __call__(self, rows: dict) -> dict:
    self.optimizer.zero_grad()
    with self.cast():
      found = self.losses(**rows)
    sum(found.values()).backward()
    norm = torch.nn.utils.clip_grad_norm_(self.trained, ADAM.clip_norm)
    self.optimizer.step()
    return found | {"grad_norm": norm}

  def losses(self, pixels, image_id, tokens, repeats) -> dict:
    model, size = self.model, len(tokens)
    with torch.no_grad():
      features = peers.see(model, pixels)
    features = model.vision_model.post_layernorm(features)
    states, cache = peers.cached_query_pass(model, features)
    similarity = torch.einsum("bqe,ce->bqc", peers.embed_image(model, states),
                              peers.embed_text(model, tokens)).max(1).values / model.log_temperature.exp()
    # As LAVIS masks the rows of one image when it trains retrieval.
    same = image_id[:, None] == image_id
    first = torch.arange(size, device=tokens.device) % repeats == 0  # a repeated image counts once
    itc = contrast(similarity, ~same) / 2 + contrast(similarity.T, ~same & first) / 2
    with torch.no_grad():
      draw = lambda scores: torch.multinomial(scores.masked_fill(same, -1e4).softmax(1), 1)[:, 0]
      image, text = draw(similarity.T), draw(similarity)
    logits = peers.match(model, torch.cat([features, features[image], features]),
                         torch.cat([tokens, tokens, tokens[text]]))
    labels = torch.cat([torch.ones(size), torch.zeros(2 * size)]).long().to(tokens.device)
    started = tokens.clone()
    started[:, 0] = peers.DEC
    words = model.language_head(peers.causal_pass(model, cache, started)[:, :-1],
                                model.embeddings.word_embeddings.weight)
    lm = functional.cross_entropy(words.flatten(0, 1), tokens[:, 1:].flatten(), ignore_index=PAD,
                                  label_smoothing=LOSS["smoothing"])
    return {"itc": itc, "itm": functional.cross_entropy(logits, labels), "lm": lm}


def contrast(logits, negatives):
  """Cross-entropy of the diagonal against the negatives of each row, with label smoothing."""
  allowed = negatives | torch.eye(len(logits), dtype=torch.bool, device=logits.device)
  likelihoods = logits.masked_fill(~allowed, -1e9).log_softmax(1)
  smooth = likelihoods.masked_fill(~allowed, 0).sum(1) / allowed.sum(1)
  return -((1 - LOSS["smoothing"]) * likelihoods.diagonal() + LOSS["smoothing"] * smooth).mean()


if __name__ == "__main__":
  main()
