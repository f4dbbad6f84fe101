"""Writing after prompts of image tokens and words: ours against transformers' `generate`, same weights.

    python benchmarks/generation_vs_torch.py [--beams 5] [--dtype bfloat16]

A batch of prompts, each 32 image tokens and 8 words, goes through an OPT of the size of opt-125m;
`--beams 1` is greedy. The image tokens are given, since encoding pictures is the same for any text: its
time is measured too, and stands apart as `image_encoding`. Both sides must write the same tokens before
they are timed. Prints one JSON line: medians in ms for the whole batch, `ratio` = PyTorch's / ours.
"""
import functools
import json

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import peers
import torch
from transformers import OPTConfig, OPTForCausalLM

from lskd_jax import parallel
from lskd_jax.convert.decoders import opt_table
from lskd_jax.models.decoders.opt import Opt, OptConfig
from lskd_jax.models.generate import Decoding, Start, generate

END = 50118  # the newline, at which BLIP-2 stops


def main() -> None:
  parser = peers.arguments(__doc__)
  parser.add_argument("--batch", type=int, default=8, help="prompts")
  parser.add_argument("--beams", type=int, default=5, help="1 = greedy")
  parser.add_argument("--tokens", type=int, default=30, help="written after each prompt")
  parser.add_argument("--words", type=int, default=8, help="of a prompt, after its image tokens")
  parser.add_argument("--opt", type=int, nargs=3, default=(768, 12, 12), metavar=("D", "BLOCKS", "HEADS"))
  args = parser.parse_args()
  with peers.mesh():
    width, depth, heads = args.opt
    config = OptConfig(width=width, embed=width, depth=depth, heads=heads, hidden=4 * width, scan=False)
    model = make_peer(config)
    graph, state = make_opt(config, model, args.dtype)
    prompts = 0.5 * np.random.default_rng(0).standard_normal(
        (args.batch, args.queries + args.words, width)).astype(np.float32)
    decoding = Decoding(args.tokens, beams=args.beams, ends=(END,), pad=config.pad)
    rows = jax.device_put(prompts, parallel.ACT_B)
    run, seconds, _ = peers.compiled(
        jax.jit(functools.partial(write_after, graph, decoding)), state, rows)

    if args.dtype == "bfloat16":
      model = model.bfloat16()
    embeds = peers.put(prompts).to(model.dtype)
    mask = peers.ones(*prompts.shape[:2])

    @torch.inference_mode()
    def theirs():
      return model.generate(inputs_embeds=embeds, attention_mask=mask, max_new_tokens=args.tokens,
                            num_beams=args.beams, do_sample=False, eos_token_id=END,
                            pad_token_id=config.pad)
    ours = lambda: run(state, rows)
    same = float(np.mean(np.asarray(ours()) == theirs().cpu().numpy()))
    if same < 1 and args.dtype == "float32" and peers.device() == "cpu":
      raise SystemExit(f"only {same:.1%} of the tokens are the same")
    found = peers.time_in_turn(ours, theirs, args.repeats)
    encoding = image_encoding(args)
  print(json.dumps({
      "benchmark": "generation_vs_torch", **found, "compile_s": seconds, "same_tokens": same,
      "ours_ms_per_token": round(found["ours_ms"] / args.tokens, 2),
      "torch_ms_per_token": round(found["torch_ms"] / args.tokens, 2), "beams": args.beams,
      "batch": args.batch, "tokens": args.tokens, "words": args.words, "opt": list(args.opt),
      "image_encoding": encoding, **peers.sizes(args)}))


def make_peer(config: OptConfig) -> OPTForCausalLM:
  """transformers' OPT of this size, every parameter noise, spread so that no token wins by itself."""
  model = OPTForCausalLM(OPTConfig(
      vocab_size=config.vocabulary, hidden_size=config.width, word_embed_proj_dim=config.embed,
      num_hidden_layers=config.depth, num_attention_heads=config.heads, ffn_dim=config.hidden,
      pad_token_id=config.pad, bos_token_id=config.start, eos_token_id=END))
  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for name, value in model.named_parameters():
      is_scale = value.ndim == 1 and name.endswith("weight")
      value.normal_(1.0 if is_scale else 0.0, 0.1 if value.ndim == 1 else 0.05, generator=generator)
  return model.to(peers.device()).eval()


def make_opt(config: OptConfig, model: OPTForCausalLM, dtype: str):
  """Graph and state of ours with its weights, on the mesh in use."""
  graph, state = nnx.split(jax.jit(lambda: Opt(config, nnx.Rngs(0), jnp.dtype(dtype)))())
  return graph, peers.filled(state, opt_table(config, "", ""), model)


def write_after(graph, decoding: Decoding, state, prompts: jax.Array) -> jax.Array:
  """[B, P, E] -> int32[B, decoding.max_tokens]."""
  opt = nnx.merge(graph, state)
  batch = prompts.shape[0]
  real = jnp.ones((batch, prompts.shape[1] - 1), bool, out_sharding=parallel.ACT_B)
  memory, parts = opt.read(prompts[:, :-1], real), opt.parts()

  def follow(cache, x, place, lineage):
    states, cache = opt.write(memory, x, cache, place, lineage, parts)
    return opt.logits(states)[:, :, 0], cache

  def write(cache, tokens, before, place, lineage):
    return follow(cache, opt.embed(tokens)[:, :, None], place, lineage)
  first = jnp.broadcast_to(prompts[:, None, -1:], (batch, decoding.beams, 1, prompts.shape[-1]),
                           out_sharding=parallel.ACT_B)
  cache = opt.cache(batch, decoding.beams, 1 + decoding.max_tokens)
  logits, cache = follow(cache, first, 0, None)
  nothing = jnp.zeros(batch, jnp.int32, out_sharding=parallel.ACT_B)
  return generate(write, Start(logits, cache, 1, nothing), decoding).tokens


def image_encoding(args) -> dict:
  """Medians of ViT and query pass for the batch's pictures, on both sides."""
  config = peers.student_config(args)
  model = peers.make_peer(config)
  graph, state = peers.make_student(config, model)
  image = peers.pictures(args.batch, args.image_size)
  rows = jax.device_put(image, parallel.ACT_B)

  def encode(state, image):
    student = nnx.merge(graph, state)
    regions = config.max_regions
    boxes = jnp.zeros((len(image), regions, 4), out_sharding=parallel.ACT_B)
    valid = jnp.zeros((len(image), regions), bool, out_sharding=parallel.ACT_B)
    return student.read_image(student.see(student.vit(image), boxes, valid))[0]
  run = peers.compiled(jax.jit(encode), state, rows)[0]
  given = peers.pixels(image)
  if args.dtype == "bfloat16":
    model, given = model.bfloat16(), given.bfloat16()

  @torch.inference_mode()
  def theirs():
    return peers.query_pass(model, model.vision_model.post_layernorm(peers.see(model, given)))
  return peers.time_in_turn(lambda: run(state, rows), theirs, args.repeats)


if __name__ == "__main__":
  main()
