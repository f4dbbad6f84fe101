"""A student that compiles in seconds, parameters that hide no mistake, and batches for both.

Fresh weights hide errors: zero gates, zero biases and unit scales drop out of every formula. So
tests fill every parameter with seeded noise, and say so where they want a gate closed.
"""
import math
from types import SimpleNamespace
import zlib

from flax import nnx
import jax
import numpy as np

from lskd_jax import losses, optim, parallel, step
from lskd_jax.models.qformer import QFormerConfig
from lskd_jax.models.student import Student, StudentConfig
from lskd_jax.models.vit import VitConfig

PAD, CLS, SEP = 0, 2, 3
BRACKET, CLOSE, DIGITS, WORDS, VOCABULARY = 6, 7, 8, 12, 32  # ids: "[", "]", "0" …, first word, end
REGIONS = 4
OPENS_BRACKET = np.arange(VOCABULARY) == BRACKET
DIGIT = np.where((np.arange(VOCABULARY) >= DIGITS) & (np.arange(VOCABULARY) < WORDS),
                 np.arange(VOCABULARY) - DIGITS, -1).astype(np.int32)
GATES = ("paint_gate", "mention_gate", "identity_gate", "gate")

VIT = VitConfig(image_size=32, patch=8, width=16, depth=1, heads=4, hidden=32)
# Two blocks, both with cross-attention: the scan then compiles one, and the causal pass, which reads
# the queries as they enter a block, still sees the image in the second.
QFORMER = QFormerConfig(vocabulary=VOCABULARY, width=32, depth=2, heads=4, hidden=32, queries=4,
                        cross_every=1, max_tokens=16)
STUDENT = StudentConfig(vit=VIT, qformer=QFORMER, embed=16, max_regions=REGIONS)

LOSS = {"itc": 1.0, "itm": 1.0, "lm": 1.0, "region_swap": 1.0, "question": 1.0, "end": 0.0,
        "smoothing": 0.0, "detach_gathered": False, "itc_block": 0, "pool": 0}
# Epsilon is large, so that an update is a smooth function of its gradient: Adam turns a gradient
# that is zero but for rounding, such as that of a key's bias, into a full step either way.
ADAM = SimpleNamespace(learning_rate=1e-2, warmup_steps=0, steps=100, final_share=0.1, clip_norm=1.0,
                       b1=0.9, b2=0.98, eps=1e-3, weight_decay=0.01)


def make_student(config=STUDENT):
  """rngs -> Student with the tiny mention tables."""
  return lambda rngs: Student(config, OPENS_BRACKET, DIGIT, rngs)


def filled(make, seed: int = 0, closed: tuple[str, ...] = ()):
  """The module of `make(rngs)` on the mesh in use, its parameters noise that depends on their names.

  Nothing is compiled for it, and a parameter has the same values whatever else a module has.

  Args:
    closed: last names of parameters left at zero, such as GATES.
  """
  graph, abstract = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
  mesh = jax.sharding.get_mesh()

  def fill(path, leaf):
    name = jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")
    last = name.rsplit("/", 1)[-1]
    noise = np.random.default_rng([seed, zlib.crc32(name.encode())]).normal(size=leaf.shape)
    if last in ("opens_bracket", "digit"):
      value = OPENS_BRACKET if last == "opens_bracket" else DIGIT
    elif last in closed:
      value = np.zeros(leaf.shape)
    elif last == "scale":
      value = 1 + 0.1 * noise
    elif last == "log_temperature":
      value = np.log(0.2)
    else:
      value = noise * (0.2 if last in ("bias", *GATES) else 0.3)
    value = np.asarray(value, leaf.dtype)
    return jax.device_put(value, parallel.sharding_of(leaf, mesh))
  return nnx.merge(graph, jax.tree_util.tree_map_with_path(fill, abstract))


def student(config=STUDENT, seed: int = 0, closed: tuple[str, ...] = ()) -> Student:
  """A student of noise."""
  return filled(make_student(config), seed, closed)


def pure(module) -> dict:
  """A module's variables as nested dicts of float64 (or integer) NumPy arrays."""
  double = lambda a: np.asarray(a, np.float64) if np.asarray(a).dtype.kind == "f" else np.asarray(a)
  return jax.tree.map(double, nnx.to_pure_dict(nnx.split(module)[1]))


def parts(module, *names: str):
  """(graph, parameters whose path has one of the names, everything else); () = all parameters."""
  wanted = nnx.Param if not names else nnx.All(
      nnx.Param, nnx.Any(*(nnx.PathContains(name) for name in names)))
  return nnx.split(module, wanted, ...)


def batch(seed: int = 0, images: int = 4, statements: int = 2, tokens: int = 12) -> dict:
  """A batch as the loader gives it: every image has its own number of regions, texts of several
  lengths mention some of them, and the last statement of the last image does not exist."""
  rng = np.random.default_rng(seed)
  low = rng.uniform(0, 0.6, (images, REGIONS, 2))
  boxes = np.concatenate([low, low + rng.uniform(0.1, 0.4, low.shape)], -1).astype(np.float32)
  count = 2 + np.arange(images) % (REGIONS - 1)
  ids = np.full((images, statements, tokens), PAD, np.int32)
  fields = np.zeros(ids.shape, np.int8)
  valid = np.ones((images, statements), bool)
  valid[-1, -1] = statements == 1
  for b, s in np.argwhere(valid):
    length = rng.integers(tokens - 4, tokens + 1)
    text = rng.integers(WORDS, VOCABULARY, length)
    text[0], text[-1] = CLS, SEP
    text[2:5] = BRACKET, DIGITS + rng.integers(count[b]), CLOSE
    ids[b, s, :length] = text
    fields[b, s, 1:length - 1] = np.sort(rng.integers(1, 4, length - 2))  # question … rationale
  return {
      "image": rng.integers(0, 256, (images, VIT.image_size, VIT.image_size, 3)).astype(np.uint8),
      "image_id": np.arange(images, dtype=np.int32),
      "boxes": boxes,
      "region_valid": np.arange(REGIONS) < count[:, None],
      "tokens": ids, "fields": fields, "statement_valid": valid}


def training(model, *, loss=LOSS, optimizer=None, frozen=("vit", "words"), microbatches=1):
  """The step of a student, its first state and its frozen part."""
  optimizer = optim.optimizer(ADAM) if optimizer is None else optimizer
  graph, params, frozen = step.split(model, frozen)
  weights = {name: loss[name] for name in ("itc", "itm", "lm")}
  train_step = step.make_train_step(graph, optimizer, losses.student_objective(loss), weights, microbatches)
  return train_step, step.init_state(params, optimizer), frozen


def gelu(x):
  """x (1 + erf(x / sqrt 2)) / 2 in float64."""
  return x * (1 + np.vectorize(math.erf, otypes=[float])(x / math.sqrt(2))) / 2


def put(rows: dict) -> dict:
  """A batch on the mesh in use."""
  return parallel.put_batch(rows, jax.sharding.get_mesh())
