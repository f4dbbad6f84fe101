"""Negatives against a brute-force reading of their definition, whatever mesh, block and pool."""
import functools
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lskd_jax import negatives, rows as exchange
from lskd_jax.models.regions import mention_slots
from lskd_jax.parallel import make_mesh
from tests.lskd_jax import tiny
from tests.lskd_jax.tiny import DIGIT, OPENS_BRACKET, REGIONS, put

IMAGES, TEXTS, QUERIES, WIDTH = 16, 2, 3, 4
TEMPERATURE = 0.3
KEYS = tuple(jax.random.key(seed) for seed in (1, 2))
MESHES = {"1": {}, "8": dict(data=8), "2x4": dict(data=2, fsdp=4), "4x2": dict(data=4, fsdp=2)}


def stub(uses_region_tokens):
  """What drawing asks of a student."""
  return SimpleNamespace(
      config=SimpleNamespace(uses_region_tokens=uses_region_tokens),
      temperature=lambda: jnp.float32(TEMPERATURE),
      slots=lambda tokens: mention_slots(tokens, jnp.asarray(OPENS_BRACKET), jnp.asarray(DIGIT)))


@functools.partial(jax.jit, static_argnames=("pool", "block", "uses_region_tokens"))
def drawn(rows, keys=KEYS, pool=0, block=0, uses_region_tokens=True):
  return negatives.draw_negatives(stub(uses_region_tokens), rows, rows["image_vectors"], rows["text_vectors"],
                                  keys, pool, block)


def draw_on(mesh, rows, **options):
  with jax.set_mesh(make_mesh(**MESHES[mesh])):
    return jax.tree.map(np.asarray, drawn(put(rows), **options))


@pytest.fixture(scope="module")
def rows():
  """Images 0, 1 and 9 are one image; image 2 has one region; some statements do not exist."""
  rng = np.random.default_rng(0)
  rows = tiny.batch(0, IMAGES, TEXTS)
  rows["image_id"][[1, 9]] = rows["image_id"][0]
  rows["region_valid"][2] = [True, False, False, False]
  rows["statement_valid"][5] = False
  return rows | {"image_vectors": rng.normal(size=(IMAGES, QUERIES, WIDTH)).astype(np.float32),
                 "text_vectors": rng.normal(size=(IMAGES, TEXTS, WIDTH)).astype(np.float32)}


def mentioned(rows, b, s):
  tokens = rows["tokens"][b, s]
  return {int(t) - tiny.DIGITS for before, t in zip(tokens, tokens[1:])
          if before == tiny.BRACKET and tiny.DIGITS <= t < tiny.WORDS}


def brute_force(rows, pool):
  """Pair by pair: similarity in float64 plus the noise of the pair, the largest of what is allowed."""
  every = jnp.arange(IMAGES)
  image_noise, text_noise = (np.asarray(negatives.noise(key, every, every, shape))
                             for key, shape in zip(KEYS, ((), (TEXTS, TEXTS))))
  score = np.einsum("bqe,cse->bqcs", rows["image_vectors"].astype(float),
                    rows["text_vectors"].astype(float)).max(1) / TEMPERATURE
  valid, pool = rows["statement_valid"], pool or IMAGES

  def fits(b, c, s):
    return all(rows["region_valid"][b][k] for k in mentioned(rows, c, s))

  def others(b):
    return [c for c in range(b // pool * pool, b // pool * pool + pool)
            if rows["image_id"][c] != rows["image_id"][b]]
  image, text = np.full(IMAGES, -1), np.full((IMAGES, TEXTS), -1)
  for c in range(IMAGES):  # whose statements are shown image b
    real = np.flatnonzero(valid[c])
    found = {b: score[b, c, real].sum() + image_noise[b, c] for b in others(c)
             if all(fits(b, c, s) for s in real)}
    image[c] = max(found, key=found.get, default=-1)
  for b, slot in np.ndindex(IMAGES, TEXTS):  # which image is shown statement u of image c
    found = {c * TEXTS + u: score[b, c, u] + text_noise[b, c, slot, u]
             for c in others(b) for u in range(TEXTS) if valid[c, u] and fits(b, c, u)}
    text[b, slot] = max(found, key=found.get, default=-1)
  return image, text


@pytest.mark.parametrize("pool", [0, 8, 4, 2])
def test_draws_are_those_of_the_definition_on_every_mesh_and_in_every_block(rows, pool):
  image, text = brute_force(rows, pool)
  assert (image >= 0).any() and (text >= 0).any()
  for mesh, block in (("1", 0), ("1", 2), ("8", 8), ("2x4", 0), ("4x2", 8)):
    got = draw_on(mesh, rows, pool=pool, block=block)
    np.testing.assert_array_equal(np.where(got.has_image, got.image, -1), image, f"{mesh}, block {block}")
    np.testing.assert_array_equal(np.where(got.has_text, got.text, -1), text, f"{mesh}, block {block}")


def test_a_student_without_region_tokens_may_be_shown_any_mention(rows):
  """It has no regions to lack: with region tokens, a text that points finds no image without regions."""
  few = np.zeros((IMAGES, REGIONS), bool)
  got = draw_on("1", rows | {"region_valid": few}, uses_region_tokens=False)
  assert got.has_image.all() and got.has_text.all()
  assert not draw_on("1", rows | {"region_valid": few}).has_text.any()


def test_where_all_rows_show_one_image_there_are_no_negatives(rows):
  got = draw_on("1", rows | {"image_id": np.zeros(IMAGES, np.int32)})
  assert not got.has_image.any() and not got.has_text.any()
  assert got.image.min() >= 0 and got.image.max() < IMAGES and got.text.max() < IMAGES * TEXTS


def test_draws_follow_the_softmax_of_similarity_over_temperature():
  """A thousand pools of four images, each like its neighbours by logits of log 1, log 2 and log 3."""
  pools, size = 1000, 4
  logits = np.log([1.0, 2.0, 3.0])
  scores = np.zeros((size, size))  # image b with the statement of image c
  for b in range(size):
    for k in range(3):
      scores[b, (b + k + 1) % size] = logits[k]
  own, one = np.arange(pools * size, dtype=np.int32), np.ones((pools * size, 1), bool)
  rows = {"image_vectors": np.tile(scores[:, None] * TEMPERATURE, (pools, 1, 1)).astype(np.float32),
          "text_vectors": np.tile(np.eye(size)[:, None], (pools, 1, 1)).astype(np.float32),
          "image_id": own, "tokens": np.full((pools * size, 1, 1), tiny.WORDS),
          "region_valid": one, "statement_valid": one}
  got = draw_on("8", rows, pool=size, block=400)
  share = lambda distance: np.bincount(distance % size, minlength=size) / len(own)
  np.testing.assert_allclose(share(got.text[:, 0] - own), [0, 1 / 6, 2 / 6, 3 / 6], atol=0.03)
  np.testing.assert_allclose(share(own - got.image), [0, 1 / 6, 2 / 6, 3 / 6], atol=0.03)


def test_noise_belongs_to_a_pair():
  whole = np.asarray(negatives.noise(KEYS[0], jnp.arange(6), jnp.arange(9), (2,)))
  part = negatives.noise(KEYS[0], jnp.array([4, 1]), jnp.array([8, 3, 0]), (2,))
  np.testing.assert_array_equal(part, whole[[4, 1]][:, [8, 3, 0]])
  assert len(np.unique(whole)) == whole.size


# --- the exchange of what was drawn ---


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("pool", [0, 8, 2])
def test_rows_of_the_pool_can_be_fetched_from_any_device(mesh, pool):
  size = pool or IMAGES
  at = np.arange(IMAGES) // size * size + np.random.default_rng(0).integers(0, size, IMAGES)
  given = {"values": np.random.default_rng(1).normal(size=(IMAGES, 3)), "at": at.astype(np.int32)}
  with jax.set_mesh(make_mesh(**MESHES[mesh])):
    got = jax.jit(lambda rows: exchange.fetch(rows["values"], rows["at"], IMAGES, pool))(put(given))
  np.testing.assert_allclose(got, given["values"][at], rtol=1e-6)


@pytest.mark.parametrize("mesh,pool,received", [
    (dict(data=2, fsdp=4), 0, 16), (dict(data=2, fsdp=4), 8, 8), (dict(data=4, fsdp=2), 4, 4),
    (dict(data=4, fsdp=2), 8, 16),  # four devices are a pool, but two of them no axis: all is sent
    (dict(data=8), 2, None)])
def test_features_travel_within_a_pool_only(mesh, pool, received):
  """The compiled program gathers as many rows as a pool has, and nothing where a pool is one device."""
  given = {"features": np.zeros((IMAGES, 5, 7), np.float32), "at": np.arange(IMAGES, dtype=np.int32)}
  with jax.set_mesh(make_mesh(**mesh)):
    compiled = jax.jit(lambda rows: exchange.fetch(rows["features"], rows["at"], IMAGES, pool)).lower(
        put(given)).compile()
  gathers = re.findall(r"f32\[(\d+),35\]\S* all-gather\(.*replica_groups=", compiled.as_text())
  assert gathers == ([] if received is None else [str(received)])


# --- swapped regions ---


def test_swapped_regions():
  """No region keeps its box, slots without a region keep theirs, every other box is as likely."""
  rows = 6000
  valid = np.random.default_rng(0).random((rows, REGIONS)) < 0.7
  boxes = np.tile(np.arange(REGIONS, dtype=np.float32)[:, None], (rows, 1, 4))  # box k: k, k, k, k
  with jax.set_mesh(make_mesh()):
    swapped, possible = jax.jit(negatives.swapped_regions)(
        *put({"boxes": boxes, "valid": valid}).values(), jax.random.key(0))
  source = np.asarray(swapped)[..., 0].astype(int)
  np.testing.assert_array_equal(np.asarray(swapped), np.repeat(source[..., None], 4, -1))
  np.testing.assert_array_equal(possible, valid.sum(1) >= 2)
  slot = np.arange(REGIONS)
  for row, keep in enumerate(valid):
    if keep.sum() < 2:
      assert (source[row] == slot).all()
    else:
      assert not (source[row] == slot)[keep].any()
      assert sorted(source[row][keep]) == slot[keep].tolist()
      assert (source[row] == slot)[~keep].all()
  full = source[valid.all(1)]
  assert len(full) > 1000
  for k in range(REGIONS):
    shares = np.bincount(full[:, k], minlength=REGIONS) / len(full)
    np.testing.assert_allclose(np.delete(shares, k), 1 / 3, atol=0.06)
