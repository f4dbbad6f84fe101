"""A batch divided into parts learns what the undivided batch does: losses, metrics and gradients."""
import dataclasses
import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lskd_jax import losses, step
from lskd_jax.models.layers import dropout, reshape
from lskd_jax.models.student import Sight
from lskd_jax.parallel import make_mesh
from lskd_jax.rows import check_block, check_parts
from tests.lskd_jax import tiny
from tests.lskd_jax.tiny import put

IMAGES, TEXTS, WIDTH = 16, 2, 8
KEY = jax.random.key(0)
NAMES = ("itc", "itm", "lm")
LOSS = tiny.LOSS | {"itc": 0.7, "itm": 1.3, "question": 0.5, "smoothing": 0.1}


def matrix(*shape):
  rng = np.random.default_rng(shape)
  return nnx.Param(jnp.asarray(rng.normal(size=shape) * 0.3, jnp.float32))


class SmallVit(nnx.Module):
  """uint8[B, 32, 32, 3] -> [B, 4, WIDTH]."""

  def __init__(self):
    self.kernel = matrix(3, WIDTH)

  def __call__(self, image):
    pixels = reshape(image[:, ::16, ::16].astype(jnp.float32) / 255, len(image), 4, 3)
    return jnp.tanh(pixels @ self.kernel[...])


class SmallWords(nnx.Module):
  """The matrix that makes logits of states."""

  def __init__(self):
    self.words = matrix(WIDTH, 32)


class Small(nnx.Module):
  """All that the losses ask of a student, with a matrix for each tower: it compiles in a second."""

  def __init__(self, rate=0.0):
    self.config = dataclasses.replace(tiny.STUDENT, qformer=dataclasses.replace(tiny.QFORMER, dropout=rate))
    self.vit, self.image, self.text = SmallVit(), matrix(WIDTH + 4, WIDTH), matrix(32, WIDTH)
    self.qformer, self.pair = SmallWords(), matrix(WIDTH, 2)
    self.log_temperature = nnx.Param(jnp.log(jnp.float32(0.3)))
    self.rate = rate

  def see(self, features, boxes, valid, once=False):
    regions = (boxes * valid[..., None]).sum(1, keepdims=True) + jnp.zeros_like(features[..., :1])
    return Sight(jnp.concatenate([features, regions], -1), None, valid)

  def read_image(self, sight, key):
    states = dropout(jnp.tanh(sight.memory @ self.image[...]), self.rate, key)
    return states, states.mean(1)

  def slots(self, tokens):
    return jnp.where((tokens >= tiny.DIGITS) & (tokens < tiny.WORDS), tokens - tiny.DIGITS, -1)

  def _read(self, tokens, key):
    return dropout(jnp.tanh(jax.nn.one_hot(tokens, 32) @ self.text[...]).mean(2), self.rate, key)

  def embed_image(self, states):
    return states / jnp.linalg.norm(states, axis=-1, keepdims=True)

  def embed_text(self, tokens, key):
    states = self._read(tokens, key)
    return states / jnp.linalg.norm(states, axis=-1, keepdims=True)

  def write_states(self, sight, cache, tokens, key):
    return dropout(jax.nn.one_hot(tokens, 32) @ self.text[...], self.rate, key) + cache[:, None, None]

  def language_head(self, states, words):
    return states @ words

  def match(self, sight, tokens, key):
    states = (sight.memory @ self.image[...]).mean(1)
    return (self._read(tokens, key) * states[:, None]) @ self.pair[...]

  def temperature(self):
    return jnp.exp(self.log_temperature[...])


@functools.cache
def learnt(mesh=(), parts=1, frozen=True, rate=0.0, **loss):
  """Metrics, and what one step of plain gradient descent took from each parameter: its gradient."""
  with jax.set_mesh(make_mesh(**dict(mesh))):
    graph, params, rest = step.split(Small(rate), ("vit",) if frozen else ())
    before = jax.tree.map(np.array, params)
    sgd, weights = optax.sgd(1.0), LOSS | loss
    train = step.make_train_step(graph, sgd, losses.student_objective(weights),
                                 {name: weights[name] for name in NAMES}, parts)
    state, metrics = train(step.init_state(params, sgd), rest, put(batch()), KEY)
    del metrics["examples"]
    gradients = jax.tree.map(lambda a, b: a - np.asarray(b), before, state["params"])
    return {name: float(value) for name, value in metrics.items()}, gradients


def batch():
  """Parts with unequal numbers of words and statements, and an image in two rows."""
  rows = tiny.batch(images=IMAGES, statements=TEXTS)
  rows["image_id"][6] = rows["image_id"][1]
  rows["statement_valid"][3] = False
  return rows


def equal(got, expected):
  assert got[0] == pytest.approx(expected[0], rel=1e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got[1], expected[1])


MESHES = [(), (("data", 8),), (("data", 2), ("fsdp", 4)), (("data", 2), ("fsdp", 2), ("tensor", 2))]


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("parts", [1, 2])
def test_parts_and_meshes_do_not_change_what_is_learnt(mesh, parts):
  """Losses, accuracies and gradients; negatives are those of the whole batch."""
  equal(learnt(mesh, parts), learnt())


@pytest.mark.parametrize("loss", [dict(pool=8), dict(pool=2, itc_block=8), dict(itc=0.0), dict(itm=0.0),
                                  dict(itc=0.0, itm=0.0), dict(lm=0.0), dict(detach_gathered=True)], ids=str)
def test_every_choice_of_losses_can_be_divided(loss):
  equal(learnt((("data", 2), ("fsdp", 2)), 4, **loss), learnt(**loss))


def test_a_vit_that_is_trained_learns_the_same_from_parts():
  divided, whole = learnt(parts=4, frozen=False), learnt(frozen=False)
  equal(divided, whole)
  assert np.abs(whole[1]["vit"]["kernel"][...]).max() > 1e-3


def test_negatives_are_of_the_whole_batch():
  """Parts of their own, as separate batches, have other and fewer negatives: another loss."""
  whole, _ = learnt()
  with jax.set_mesh(make_mesh()):
    parts = [put({name: rows[i::2] for name, rows in batch().items()}) for i in (0, 1)]
    halves = [losses.student_loss(Small(), part, LOSS, KEY) for part in parts]
  apart = {name: sum(half[0][name].total for half in halves) / sum(half[0][name].weight for half in halves)
           for name in NAMES}
  assert float(apart["lm"]) == pytest.approx(whole["lm"], rel=1e-5)
  assert float(apart["itc"]) < 0.9 * whole["itc"]


def test_dropout_is_the_same_in_both_passes():
  """Otherwise gradients would be those of another loss: here a step along them changes it as they say."""
  with jax.set_mesh(make_mesh()):
    graph, params, rest = step.split(Small(0.3), ("vit",))
    rows, rate = put(batch()), 1e-3

    @jax.jit
    def found(params):
      return step.divided_gradients(losses.student_objective(LOSS | {"itm": 0.0}),
                                    lambda params: nnx.merge(graph, params, rest), params, rows, KEY, LOSS, 2)
    _, _, gradients = found(params)
    moved = lambda by: float(found(jax.tree.map(lambda p, g: p + by * g, params, gradients))[0])
    slope = (moved(rate) - moved(-rate)) / (2 * rate)
  assert slope == pytest.approx(float(optax.global_norm(gradients))**2, rel=1e-2)


def test_parts_must_divide_the_rows_of_every_device():
  with pytest.raises(ValueError, match="=3: 16 images over 4 groups .* cannot be divided into 3 equal "
                                       "parts; make data.batch_size a multiple of 12"):
    check_parts(16, 4, 3, "train.microbatches=3")


def test_a_block_has_rows_of_every_device():
  with pytest.raises(ValueError, match="loss.itc_block=8: each of 16 groups .*; make it a multiple of 16"):
    check_block(64, 16, 8)
  check_block(64, 16, 32)


def test_a_real_student_can_be_divided_where_its_kernels_are_split():
  """With everything recomputed, its kernels gathered by each pass, and dropout off."""
  config = dataclasses.replace(tiny.STUDENT, region_mode="none",
                               qformer=dataclasses.replace(tiny.QFORMER, remat="full"))
  rows = batch()
  del rows["image"]  # cached features keep the program small
  rows["features"] = np.random.default_rng(0).normal(size=(IMAGES, 17, 16)).astype(np.float32)
  found = []
  with jax.set_mesh(make_mesh(data=2, fsdp=2)):
    for parts in (1, 2):
      train, state, frozen = tiny.training(tiny.student(config), loss=LOSS, optimizer=optax.sgd(1.0),
                                           microbatches=parts)
      state, metrics = train(state, frozen, put(rows), KEY)
      del metrics["examples"]
      found.append(({name: float(value) for name, value in metrics.items()},
                    jax.tree.map(np.asarray, state["params"])))
  equal(found[1], found[0])
