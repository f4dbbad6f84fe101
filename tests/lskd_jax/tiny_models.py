"""Model directories small enough to make and run in seconds, for tests that load one."""
from flax import nnx
import jax
import numpy as np

from data_pipeline import tokenizer as tokenizers
from lskd_jax import parallel
from lskd_jax.models import build
from lskd_jax.models.generative import generative_config
from lskd_jax.models.student import student_config
from tests.data_pipeline.tiny_tokenizers import opt_tokenizer, t5_tokenizer

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

# The same model for `lskd train`, on a config file of the scenes.
OVERRIDES = [
  "--config.model.vit.image_size=48", "--config.model.vit.width=16", "--config.model.vit.depth=1",
  "--config.model.vit.heads=2", "--config.model.vit.hidden=32", "--config.model.qformer.width=16",
  "--config.model.qformer.heads=2", "--config.model.qformer.hidden=32",
  "--config.model.qformer.queries=2", "--config.model.embed=8", "--config.data.batch_size=2",
  "--config.data.statements=2", "--config.optim.warmup_steps=0", "--config.optim.steps=2",
  "--config.train.tensorboard=False", "--config.eval.every=0", "--config.init.parts=()",
]


# What a decoder adds: its tokenizer, and sizes whose embeddings have rows to spare.
DECODERS = {
  "opt": (opt_tokenizer, dict(vocabulary=416, width=16, embed=12, depth=2, heads=2, hidden=32,
                              max_tokens=96)),
  "t5": (t5_tokenizer, dict(vocabulary=128, width=16, head=6, heads=2, hidden=32, depth=2,
                            decoder_depth=2)),
}


def make_model(folder, kind="student", region_mode="tokens", image_size=48, closed=()):
  """Writes a model directory with random weights, region gates included, and returns it.

  kind "generative" has OPT for its decoder; "opt" and "t5" say which.
  closed: last names of parameters left at zero, such as tiny.GATES.
  """
  sizes = {**MODEL, "vit": {**MODEL["vit"], "image_size": image_size}, "region_mode": region_mode}
  if kind in ("generative", *DECODERS):
    config = _generative(sizes, "opt" if kind == "generative" else kind, folder.parent / "tokenizer")
    kind = "generative"
  else:
    tokenizer = tokenizers.train_tokenizer(TEXTS, folder.parent / "tokenizer", 400, 1)
    qformer = {**MODEL["qformer"], "vocabulary": tokenizer.get_vocab_size()}
    config = student_config({**sizes, "qformer": qformer})
  tokenizer = tokenizers.load_tokenizer(folder.parent / "tokenizer")
  rng = np.random.default_rng(0)

  def random(path, leaf):
    name = jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")
    values = 0.2 * rng.standard_normal(leaf.shape)
    values = 0 * values if name.rsplit("/", 1)[-1] in closed else values
    return np.asarray(values + ("scale" in name), leaf.dtype)

  with jax.set_mesh(parallel.make_mesh(devices=jax.devices()[:1])):
    make = build.maker(kind, config, tokenizer)
    shapes = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))[1].filter(nnx.Param)
  build.save(folder, kind, config, jax.tree_util.tree_map_with_path(random, shapes),
             folder.parent / "tokenizer")
  return folder


def _generative(sizes, language_model, tokenizer_dir):
  make_tokenizer, decoder = DECODERS[language_model]
  tokenizer = tokenizers.load_tokenizer(make_tokenizer(tokenizer_dir))
  if language_model == "opt":
    decoder = {**decoder, "end": tokenizers.encode(tokenizer, "\n")[0]}
  qformer = {name: value for name, value in sizes["qformer"].items() if name != "max_tokens"}
  rest = {name: value for name, value in sizes.items() if name not in ("qformer", "embed")}
  return generative_config({**rest, "qformer": qformer, "language_model": language_model,
                            "decoder": {**decoder, "scan": False}})
