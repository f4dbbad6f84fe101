"""Model directories small enough to make and run in seconds, for tests that load one."""
from flax import nnx
import jax
import numpy as np

from data_pipeline import tokenizer as tokenizers
from data_pipeline.texts import text_encoder
from lskd_jax import parallel
from lskd_jax.models import build

TEXTS = [
  "question: who is [0]? answer: a chef rationale: [0] wears a tall white hat",
  "question: what does [1] do to [2]? answer: [1] greets the king rationale: waving",
  "a sunny beach: tall white hat with cup waving, gold crown with fish sitting",
]

MODEL = {
  "vit": dict(image_size=48, patch=12, width=16, depth=1, heads=2, hidden=32, scan=False),
  "qformer": dict(width=16, depth=2, heads=2, hidden=32, queries=2, max_tokens=64, scan=False),
  "embed": 8, "max_regions": 6,
}

# What a generative student has besides.
DECODERS = {
  "opt": dict(width=16, embed=12, depth=1, heads=2, hidden=32, max_tokens=96, scan=False),
  "t5": dict(width=16, head=6, depth=1, decoder_depth=1, heads=2, hidden=32, scan=False),
}

# The same model for `lskd train`, on a config file of the scenes.
OVERRIDES = [
  "--config.model.vit.image_size=48", "--config.model.vit.width=16", "--config.model.vit.depth=1",
  "--config.model.vit.heads=2", "--config.model.vit.hidden=32", "--config.model.qformer.width=16",
  "--config.model.qformer.heads=2", "--config.model.qformer.hidden=32",
  "--config.model.qformer.queries=2", "--config.model.embed=8", "--config.data.batch_size=2",
  "--config.data.statements=2", "--config.optim.warmup_steps=0", "--config.optim.steps=2",
  "--config.train.tensorboard=False", "--config.eval.every=0", "--config.init.parts=()",
]


def make_model(folder, kind="student", region_mode="tokens", image_size=48, language_model="opt",
               tokenizer_dir=None):
  """Writes a model directory with random weights, region gates included, and returns it.

  tokenizer_dir: by default that of a WordPiece tokenizer, trained here.
  """
  if tokenizer_dir is None:
    tokenizer_dir = folder.parent / "tokenizer"
    tokenizers.train_tokenizer(TEXTS, tokenizer_dir, 400, 1)
  tokenizer = tokenizers.load_tokenizer(tokenizer_dir)
  config = build.run_config(kind, model_of(tokenizer, language_model) | {
    "vit": {**MODEL["vit"], "image_size": image_size}, "region_mode": region_mode})
  rng = np.random.default_rng(0)

  def random(path, leaf):
    name = jax.tree_util.keystr(path)
    # The words of a decoder that has something to say are far apart.
    values = (1.0 if "decoder" in name and "words" in name else 0.2) * rng.standard_normal(leaf.shape)
    return np.asarray(values + ("scale" in name), leaf.dtype)

  with jax.set_mesh(parallel.make_mesh((1, 1), jax.devices()[:1])):
    make = build.maker(kind, config, tokenizer)
    shapes = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))[1].filter(nnx.Param)
  build.save(folder, kind, config, jax.tree_util.tree_map_with_path(random, shapes), tokenizer_dir)
  return folder


def model_of(tokenizer, language_model="opt") -> dict:
  """MODEL for a tokenizer, as a run's config would have it."""
  text, size = text_encoder(tokenizer, 64), tokenizer.get_vocab_size()
  start = text.start[0] if text.start else text.pad
  decoder = dict(vocabulary=size, pad=text.pad, start=start, end=text.end, **DECODERS[language_model])
  return {**MODEL, "qformer": {**MODEL["qformer"], "vocabulary": size},
          "language_model": language_model, "decoder": decoder}
