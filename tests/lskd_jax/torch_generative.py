"""transformers' BLIP-2 with a decoder as the reference, and ours of a model directory."""
from flax import nnx
import jax
import numpy as np
import torch
from transformers import Blip2Config, Blip2ForConditionalGeneration

from lskd_jax import parallel
from lskd_jax.models import build
from lskd_jax.models.generate import Decoding
from tests.lskd_jax.torch_blip2 import noise, normalised

IMAGE = 96  # the id that stands for a query in their prompts
PAD, START, END = 1, 2, 3
OPT = dict(model_type="opt", vocab_size=97, hidden_size=24, word_embed_proj_dim=24, ffn_dim=40,
           num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=120, pad_token_id=PAD,
           bos_token_id=START, eos_token_id=END)
T5 = dict(model_type="t5", vocab_size=97, d_model=20, d_kv=7, d_ff=33, num_layers=2, num_heads=3,
          feed_forward_proj="gated-gelu", dense_act_fn="gelu", tie_word_embeddings=False,
          pad_token_id=0, eos_token_id=END, decoder_start_token_id=0)
# The decoder, and of the ViT and the Q-Former: widths, blocks, heads, hidden widths, queries, every.
SHAPES = {
    "opt": (OPT, (28, 14, 24, 2, 2, 40), (16, 2, 2, 32, 3, 2)),
    "opt-odd": ({**OPT, "hidden_size": 15, "word_embed_proj_dim": 15, "ffn_dim": 33,
                 "num_attention_heads": 3, "num_hidden_layers": 3}, (33, 11, 22, 3, 1, 10),
                (12, 2, 4, 50, 5, 1)),
    "t5": (T5, (30, 7, 15, 1, 3, 33), (21, 3, 3, 17, 5, 3)),
    "t5-tied": ({**T5, "tie_word_embeddings": True, "num_decoder_layers": 1, "dense_act_fn": "gelu_new"},
                (24, 8, 14, 2, 7, 28), (10, 2, 1, 11, 2, 2)),
}


def reference(name: str, seed=0) -> Blip2ForConditionalGeneration:
  decoder, (side, patch, width, depth, heads, hidden), qformer = SHAPES[name]
  model = Blip2ForConditionalGeneration(Blip2Config(
      vision_config=dict(image_size=side, patch_size=patch, hidden_size=width, num_hidden_layers=depth,
                         num_attention_heads=heads, intermediate_size=hidden),
      qformer_config=dict(vocab_size=20, hidden_size=qformer[0], num_hidden_layers=qformer[1],
                          num_attention_heads=qformer[2], intermediate_size=qformer[3],
                          max_position_embeddings=12, cross_attention_frequency=qformer[5]),
      text_config=decoder, num_query_tokens=qformer[4], image_token_index=IMAGE))
  if decoder.get("tie_word_embeddings") is False:
    # transformers 5 ties the head of any T5 in memory, whatever its config says.
    head = model.language_model.lm_head
    head.weight = torch.nn.Parameter(torch.empty_like(head.weight))
  model.generation_config.eos_token_id = END
  return noise(model, seed)


def pictures(model, count=2):
  side = model.config.vision_config.image_size
  return np.random.default_rng(0).integers(0, 256, (count, side, side, 3), np.uint8)


def prompted(model, prompt, real):
  """Their arguments: the queries' places before the prompts, whose padding T5 has at the end."""
  image = np.full((len(prompt), model.config.num_query_tokens), IMAGE)
  if not model.config.use_decoder_only_language_model:
    order = np.argsort(~real, 1, kind="stable")
    prompt, real = (np.take_along_axis(x, order, 1) for x in (prompt, real))
  return dict(input_ids=torch.tensor(np.concatenate([image, prompt], 1)).long(),
              attention_mask=torch.tensor(np.concatenate([image > 0, real], 1)).long())


def theirs_logits(model, pixels, prompt, real, written):
  """Logits of `written` after the prompts, and after it: [B, T + 1, V]."""
  ids = prompted(model, prompt, real)
  rest = torch.tensor(written).long()
  if model.config.use_decoder_only_language_model:
    ids = dict(input_ids=torch.cat([ids["input_ids"], rest], 1),
               attention_mask=torch.cat([ids["attention_mask"], torch.ones_like(rest)], 1))
  else:
    ids["decoder_input_ids"] = torch.cat([torch.zeros_like(rest[:, :1]), rest], 1)
  with torch.no_grad():
    logits = model(pixel_values=normalised(pixels), **ids).logits
  return logits[:, -written.shape[1] - 1:].numpy()


def theirs_generated(model, pixels, prompt, real, **settings):
  with torch.no_grad():
    ids = prompted(model, prompt, real)
    found = model.generate(normalised(pixels), **ids, do_sample=False, pad_token_id=PAD, **settings).numpy()
  # OPT repeats the prompt, T5 its start token.
  return found[:, ids["input_ids"].shape[1] if model.config.use_decoder_only_language_model else 1:]


def ours(directory, pixels, prompt, real, written=None, decoding: Decoding | None = None, boxes=(),
         fsdp=1, tensor=1):
  """Likelihoods of `written` after the prompts, [B, T], or what is generated; every picture has the
  same boxes."""
  batch = len(pixels)
  with jax.set_mesh(parallel.make_mesh(fsdp=fsdp, tensor=tensor)):
    model = build.load(directory)
    regions = model.config.max_regions
    rows = dict(pixels=pixels, prompt=prompt.astype(np.int32), real=real,
                boxes=np.zeros((batch, regions, 4), np.float32), valid=np.zeros((batch, regions), bool))
    rows["boxes"][:, :len(boxes)] = np.reshape(boxes, (-1, 4))
    rows["valid"][:, :len(boxes)] = True
    if written is not None:
      rows["written"] = written.astype(np.int32)

    @jax.jit
    def compute(state, batch):
      student = nnx.merge(model.graph, state)
      sight = student.see(student.vit(batch["pixels"]), batch["boxes"], batch["valid"])
      read = student.read(sight, student.read_image(sight), batch["prompt"], batch["real"])
      if decoding is not None:
        return student.generate(sight, read, decoding)
      return student.likelihoods(sight, read, batch["written"][:, None])[:, 0]
    return jax.tree.map(np.asarray, compute(model.state, parallel.put_batch(rows, jax.sharding.get_mesh())))
