"""transformers' BLIP-2 as the reference: random weights, its scores, and ours of a model directory."""
from flax import nnx
import jax
import numpy as np
import torch
from transformers import Blip2Config, Blip2ForImageTextRetrieval

from lskd_jax import parallel
from lskd_jax.convert import model_directory
from lskd_jax.models import build
from lskd_jax.models.vit import PIXEL_MEAN, PIXEL_STD

WORDS = ["a dog sits", "two dogs run to [0]", "the man waits for [1] and a dog and the other dogs"]


def noise(model, seed=0):
  """Every parameter overwritten: the initial values of transformers are too small to show errors."""
  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for name, value in model.named_parameters():
      drawn = torch.randn(value.shape, generator=generator)
      norm = name.endswith("weight") and value.ndim == 1
      value.copy_(1 + 0.1 * drawn if norm else drawn * (0.1 if value.ndim == 1 else 0.3))
  return model.eval()


def reference(shape, vocabulary):
  side, patch, width, depth, heads, hidden, *qformer, every, embed = shape
  return noise(Blip2ForImageTextRetrieval(Blip2Config(
      vision_config=dict(image_size=side, patch_size=patch, hidden_size=width,
                         num_hidden_layers=depth, num_attention_heads=heads,
                         intermediate_size=hidden),
      qformer_config=dict(vocab_size=vocabulary, hidden_size=qformer[0],
                          num_hidden_layers=qformer[1], num_attention_heads=qformer[2],
                          intermediate_size=qformer[3], max_position_embeddings=40,
                          use_qformer_text_input=True, cross_attention_frequency=every),
      num_query_tokens=qformer[4], image_text_hidden_size=embed)))


def save(model, folder, tokenizer_dir, **options):
  model.save_pretrained(folder, **options)
  for file in model_directory.tokenizer_files(tokenizer_dir):
    (folder / file.name).write_bytes(file.read_bytes())
  return folder


def inputs(model, tokenizer, seed=0):
  """Two pictures, and for each two texts of different lengths."""
  side = model.config.vision_config.image_size
  pixels = np.random.default_rng(seed).integers(0, 256, (2, side, side, 3), np.uint8)
  rows = [tokenizer.encode(text).ids for text in WORDS[1:]]
  tokens = np.zeros((2, 2, max(map(len, rows))), np.int32)
  for k, row in enumerate(rows):
    tokens[:, k, :len(row)] = row
  return pixels, tokens


def normalised(pixels):
  """uint8[B, H, W, 3] -> float32[B, 3, H, W] as the models of transformers take it."""
  scaled = (pixels / 255 - np.array(PIXEL_MEAN)) / np.array(PIXEL_STD)
  return torch.tensor(scaled, dtype=torch.float32).permute(0, 3, 1, 2)


def their_features(model, pixels, **embedding):
  """What the ViT of PyTorch says of pictures, before `post_layernorm`."""
  with torch.no_grad():
    embedded = model.vision_model.embeddings(normalised(pixels), **embedding)
    return model.vision_model.encoder(embedded).last_hidden_state.numpy()


def our_features(directory, pixels):
  """What the ViT of a model directory says of them."""
  with jax.set_mesh(parallel.make_mesh(devices=jax.devices()[:1])):
    model = build.load(directory)
    vit = nnx.merge(model.graph, model.state).vit
    batch = parallel.put_batch({"pixels": pixels}, jax.sharding.get_mesh())
    return np.asarray(jax.jit(lambda vit, pixels: vit(pixels))(vit, batch["pixels"]))


def theirs(model, pixels, tokens):
  """(ViT features, match logits [B, S, 2], cosines [B, S]) by PyTorch."""
  scaled, ids = normalised(pixels), torch.tensor(tokens, dtype=torch.long)
  with torch.no_grad():
    def call(k, match):
      return model(pixel_values=scaled, input_ids=ids[:, k], attention_mask=(ids[:, k] > 0).long(),
                   use_image_text_matching_head=match).logits_per_image
    match = torch.stack([call(k, True) for k in range(2)], 1)
    cosines = torch.stack([call(k, False).diagonal() for k in range(2)], 1)
  return their_features(model, pixels), match.numpy(), cosines.numpy()


def ours(directory, pixels, tokens):
  """The same by the student of a model directory, without regions."""
  with jax.set_mesh(parallel.make_mesh()):
    model = build.load(directory)
    regions = model.config.max_regions
    boxes, valid = np.zeros((2, regions, 4), np.float32), np.zeros((2, regions), bool)

    @jax.jit
    def compute(state, batch):
      student = nnx.merge(model.graph, state)
      features = student.vit(batch["pixels"])
      sight = student.see(features, batch["boxes"], batch["valid"])
      image = student.embed_image(student.read_image(sight)[0])
      cosines = jax.numpy.einsum("bqe,bse->bqs", image, student.embed_text(batch["tokens"])).max(1)
      return features, student.match(sight, batch["tokens"]), cosines
    batch = parallel.put_batch(dict(pixels=pixels, tokens=tokens, boxes=boxes, valid=valid),
                               jax.sharding.get_mesh())
    return [np.asarray(value) for value in compute(model.state, batch)]
