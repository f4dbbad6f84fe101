"""Every objective against a brute-force reading of its definition, in float64 or in PyTorch."""
import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lskd_jax import losses
from lskd_jax.models import layers
from lskd_jax.models.regions import mention_slots
from tests.lskd_jax import tiny
from tests.lskd_jax.tiny import DIGIT, OPENS_BRACKET, REGIONS, STUDENT, put

pytestmark = pytest.mark.usefixtures("one_device")


def on_mesh(**arrays):
  """Arguments split over the mesh as those of a loss are."""
  return put(arrays).values()


def test_a_mean_of_nothing_is_zero():
  assert losses.Weighted(jnp.float32(0), jnp.float32(0)).mean() == 0
  assert losses.Weighted(jnp.float32(6), jnp.float32(4)).mean() == 1.5


# --- LM ---

@pytest.fixture(scope="module")
def spoken():
  """Logits, tokens and weights (0 for padding and the question) of 2 images x 2 statements."""
  rng = np.random.default_rng(0)
  logits = rng.normal(size=(2, 2, 6, 9)).astype(np.float32) * 2
  tokens = rng.integers(0, 9, (2, 2, 6)).astype(np.int32)
  weights = (rng.random((2, 2, 6)) < 0.6).astype(np.float32)
  return logits, tokens, weights


def torch_lm(logits, tokens, weights, smoothing):
  """PyTorch's loss of tokens 1 … T - 1, predicted one place before them."""
  target = np.where(weights[:, :, 1:] > 0, tokens[:, :, 1:], -100)
  return F.cross_entropy(logits[:, :, :-1].reshape(-1, 9), torch.tensor(target).long().reshape(-1),
                         label_smoothing=smoothing, ignore_index=-100)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_lm_is_pytorchs_cross_entropy_with_label_smoothing(spoken, smoothing):
  logits, tokens, weights = spoken

  @jax.jit
  def loss(logits):
    return losses.lm_loss(logits, *on_device, smoothing)[0].mean()
  on_device = on_mesh(t=tokens, w=weights)
  on_device = tuple(on_device)
  value, grad = jax.value_and_grad(loss)(*on_mesh(l=logits))
  reference = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
  expected = torch_lm(reference, tokens, weights, smoothing)
  expected.backward()
  assert float(value) == pytest.approx(expected.item(), rel=1e-5)
  np.testing.assert_allclose(grad, reference.grad, atol=1e-6)


def test_lm_weights_each_word(spoken):
  """A sum over words of weight times loss, to be divided by the sum of the weights."""
  logits, tokens, _ = spoken
  weights = np.random.default_rng(1).random(tokens.shape).astype(np.float32)
  got, right = losses.lm_loss(*on_mesh(l=logits, t=tokens, w=weights), 0.0)
  total = 0.0
  for b, s, t in np.ndindex(2, 2, 5):
    scores = logits[b, s, t].astype(np.float64)
    total += weights[b, s, t + 1] * (np.log(np.exp(scores).sum()) - scores[tokens[b, s, t + 1]])
    assert right[b, s, t] == (scores.argmax() == tokens[b, s, t + 1])
  assert float(got.total) == pytest.approx(total, rel=1e-5)
  assert float(got.weight) == pytest.approx(weights[:, :, 1:].sum(), rel=1e-5)


def test_word_likelihoods_are_log_probabilities(spoken):
  logits, tokens, _ = spoken
  got = np.asarray(losses.word_likelihoods(*on_mesh(l=logits, t=tokens)))
  for b, s in np.ndindex(2, 2):
    assert got[b, s, 0] == 0  # nothing predicts the first token
    for t in range(1, 6):
      scores = logits[b, s, t - 1].astype(np.float64)
      expected = scores[tokens[b, s, t]] - np.log(np.exp(scores).sum())
      assert got[b, s, t] == pytest.approx(expected, abs=1e-5)


def test_weights_of_words_by_field():
  """Padding and special tokens 0, question as asked, answer, rationale and caption 1."""
  fields = jnp.array([[[0, 1, 2, 3, 4]]], jnp.int8)
  assert losses.word_weights(fields, 0.25, 0.5).tolist() == [[[0, 0.25, 1, 1, 1]]]
  assert losses.word_weights(fields[..., :-1], 0.25, 0.5).tolist() == [[[0, 0.25, 1, 1]]]
  padded = jnp.pad(fields, ((0, 0), (0, 0), (0, 2)))  # [SEP] and [PAD]
  assert losses.word_weights(padded, 0.25, 0.5).tolist() == [[[0, 0.25, 1, 1, 1, 0.5, 0]]]


# --- ITM ---

class Seen(NamedTuple):
  """What the stub makes of an image: the inputs themselves."""
  features: jax.Array
  boxes: jax.Array
  valid: jax.Array


class Stub:
  """Stands in for a student: notes which image, regions and text it is asked to match."""

  def __init__(self, region_mode="tokens"):
    self.config = dataclasses.replace(STUDENT, region_mode=region_mode)
    self.pairs = []

  def temperature(self):
    return 1.0

  def slots(self, tokens):
    return mention_slots(tokens, jnp.asarray(OPENS_BRACKET), jnp.asarray(DIGIT))

  def see(self, features, boxes, valid, once=False):
    return Seen(features, boxes, valid)

  def match(self, sight, tokens, key):
    """Logits that depend on image, boxes and text in some arbitrary way."""
    mix = tokens.sum(-1) * 0.1 + sight.features[:, :1] + sight.boxes.std((1, 2))[:, None]
    logits = jnp.stack([jnp.sin(mix), jnp.cos(3 * mix)], -1)
    self.pairs.append((sight, tokens, logits))
    return logits


IMAGES, TEXTS = 6, 2
ORDER = ["match", "other_image", "other_text", "region_swap"]


@pytest.fixture(scope="module")
def rows():
  """Images 0 and 1 are one image in two rows; image 2 has one region; one text has no mention."""
  rows = tiny.batch(0, IMAGES, TEXTS)
  rows["image_id"] = np.array([5, 5, 1, 2, 3, 4], np.int32)
  rows["region_valid"][2] = [True, False, False, False]
  at = rows["tokens"][2] == tiny.BRACKET
  rows["tokens"][2][np.roll(at, 1, -1)] = tiny.DIGITS
  rows["tokens"][4, 0, 2] = tiny.WORDS
  del rows["image"]
  return rows | {"features": np.arange(IMAGES, dtype=np.float32)[:, None]}


@functools.partial(jax.jit, static_argnames=("region_mode", "region_swap"))
def jitted_itm(batch, scores, key, region_mode, region_swap):
  stub = Stub(region_mode)
  sight = stub.see(batch["features"], batch["boxes"], batch["region_valid"])
  # Statement k is the unit vector k, so that what an image is there is their similarity.
  vectors = {"image": layers.reshape(scores, IMAGES, 1, IMAGES * TEXTS), "text": batch.pop("basis")}
  weights = tiny.LOSS | {"itc": 0.0, "region_swap": region_swap}
  _, drawn = losses.student_objective(weights).across(stub, vectors, batch, key)
  found = losses.itm_rows(stub, batch | drawn, sight, weights, [None] * 3)
  (sight, tokens, logits), other_image, *swapped = stub.pairs  # own and other texts share a pass
  own, other_text = ((sight, tokens[:, part], logits[:, part])
                     for part in (slice(0, TEXTS), slice(TEXTS, 2 * TEXTS)))
  return found, dict(zip(ORDER, (own, other_image, other_text, *swapped)))


def run_itm(rows, scores, seed=0, region_mode="tokens", region_swap=1.0):
  """-> {name: (loss, accuracy)}, {name: (image and regions, texts, logits)}, all in NumPy."""
  basis = np.eye(IMAGES * TEXTS, dtype=np.float32).reshape(IMAGES, TEXTS, -1)
  found, pairs = jitted_itm(put(rows | {"basis": basis}), *on_mesh(s=scores.astype(np.float32)),
                            jax.random.key(seed), region_mode, region_swap)
  return ({name: found[name] for name in ORDER if name in found},
          jax.tree.map(np.asarray, pairs))


@pytest.fixture(scope="module")
def itm(one_device, rows):
  """One draw of negatives for each of several similarity matrices."""
  rng = np.random.default_rng(0)
  return [run_itm(rows, rng.normal(size=(IMAGES, IMAGES, TEXTS)) * 2, seed) for seed in range(6)]


def mentioned(rows, b, s):
  tokens = rows["tokens"][b, s]
  return {int(t) - tiny.DIGITS for before, t in zip(tokens, tokens[1:])
          if before == tiny.BRACKET and tiny.DIGITS <= t < tiny.WORDS}


def weight_of(rows, name, b, s):
  """Whether a row takes part in ITM: its statement exists, and for swaps points at something."""
  real = bool(rows["statement_valid"][b, s])
  if name != "region_swap":
    return real
  return real and rows["region_valid"][b].sum() >= 2 and bool(mentioned(rows, b, s))


def test_a_match_is_a_statement_with_its_own_image(rows, itm):
  for _, pairs in itm:
    sight, tokens, _ = pairs["match"]
    np.testing.assert_array_equal(tokens, rows["tokens"])
    np.testing.assert_array_equal(sight.features, rows["features"])
    np.testing.assert_array_equal(sight.boxes, rows["boxes"])


def test_another_image_brings_its_own_regions_and_lacks_none_that_is_mentioned(rows, itm):
  for _, pairs in itm:
    sight, tokens, _ = pairs["other_image"]
    np.testing.assert_array_equal(tokens, rows["tokens"])
    for b, shown in enumerate(sight.features[:, 0].astype(int)):
      assert rows["image_id"][shown] != rows["image_id"][b]
      np.testing.assert_array_equal(sight.boxes[b], rows["boxes"][shown])
      np.testing.assert_array_equal(sight.valid[b], rows["region_valid"][shown])
      for s in np.flatnonzero(rows["statement_valid"][b]):
        assert all(rows["region_valid"][shown][k] for k in mentioned(rows, b, s))


def test_another_text_is_a_real_one_of_another_image_whose_mentions_exist_here(rows, itm):
  source = {rows["tokens"][c, u].tobytes(): (c, u)
            for c, u in np.argwhere(rows["statement_valid"]).tolist()}
  drawn = set()
  for _, pairs in itm:
    sight, tokens, _ = pairs["other_text"]
    np.testing.assert_array_equal(sight.boxes, rows["boxes"])
    for b, s in np.ndindex(IMAGES, TEXTS):
      c, u = source[tokens[b, s].tobytes()]  # KeyError: a statement that does not exist
      drawn.add((c, u))
      assert rows["image_id"][c] != rows["image_id"][b]
      assert all(rows["region_valid"][b][k] for k in mentioned(rows, c, u))
  assert len(drawn) > 5


def test_a_region_swap_keeps_image_and_text_and_moves_every_region(rows, itm):
  for _, pairs in itm:
    sight, tokens, _ = pairs["region_swap"]
    np.testing.assert_array_equal(tokens, rows["tokens"])
    np.testing.assert_array_equal(sight.features, rows["features"])
    for b, valid in enumerate(rows["region_valid"]):
      stays = (sight.boxes[b] == rows["boxes"][b]).all(-1)
      assert not stays[valid].any() if valid.sum() >= 2 else stays.all()


def test_itm_is_a_cross_entropy_over_the_rows_that_count(rows, itm):
  for found, pairs in itm:
    assert list(found) == ORDER
    for name, (loss, right) in found.items():
      label, total, correct, count = int(name == "match"), 0.0, 0, 0
      logits = pairs[name][2].astype(np.float64)
      for b, s in np.ndindex(IMAGES, TEXTS):
        if weight_of(rows, name, b, s):
          total += np.log(np.exp(logits[b, s]).sum()) - logits[b, s, label]
          correct += logits[b, s].argmax() == label
          count += 1
      assert float(loss.total) == pytest.approx(total, rel=1e-4)
      assert loss.weight == right.weight == count and right.total == correct


def test_hard_negatives_are_the_similar_ones(rows):
  """A similarity of 90 decides the draw: of the image for a row's texts, and of the text."""
  scores = np.zeros((IMAGES, IMAGES, TEXTS))
  scores[3, 5] = 90  # image 3 is what the texts of row 5 resemble …
  scores[4, 0, 1] = 90  # … and image 4 resembles the second text of row 0
  rows = rows | {"region_valid": np.ones((IMAGES, REGIONS), bool)}
  for seed in range(3):
    _, pairs = run_itm(rows, scores, seed)
    assert pairs["other_image"][0].features[5, 0] == 3
    np.testing.assert_array_equal(pairs["other_text"][1][4], rows["tokens"][[0, 0], [1, 1]])


def test_without_another_image_there_are_no_negatives_of_that_kind(rows):
  rows = rows | {"image_id": np.zeros(IMAGES, np.int32)}
  found, _ = run_itm(rows, np.zeros((IMAGES, IMAGES, TEXTS)))
  counts = [float(found[name][0].weight) for name in ("match", "other_image", "other_text")]
  assert counts == [11, 0, 0]
  assert all(np.isfinite(loss.total) for loss, _ in found.values())


def test_region_swaps_are_for_students_that_see_region_tokens(rows):
  """An overlay is drawn on the pixels: there is nothing to swap. Weight 0 leaves them out too."""
  scores = np.zeros((IMAGES, IMAGES, TEXTS))
  assert "region_swap" not in run_itm(rows, scores, region_mode="overlay")[0]
  assert "region_swap" not in run_itm(rows, scores, region_swap=0.0)[0]
  whole, half = (run_itm(rows, scores, region_swap=w)[0]["region_swap"][0] for w in (1.0, 0.5))
  assert half.weight == whole.weight / 2 and half.total == pytest.approx(whole.total / 2)


# --- the whole ---

@pytest.mark.parametrize("weights, expected", [
    ({"itc": 0.5, "itm": 0, "lm": 1}, {"itc", "lm"}),
    ({"itc": 0, "itm": 1, "lm": 0}, {"itm"})])
def test_a_weight_of_zero_leaves_a_loss_out(weights, expected):
  weights = tiny.LOSS | weights
  found, metrics = jax.eval_shape(
      lambda student, batch: losses.student_loss(student, batch, weights, jax.random.key(0)),
      tiny.student(), put(tiny.batch()))
  assert set(found) == expected
  assert ("answer_words_right" in metrics) == ("lm" in expected)
  assert ("itm_match_right" in metrics) == ("itm" in expected)


# --- the tagger's ---

def test_words_are_counted_in_the_places_that_have_a_text():
  """Binary cross-entropy over the vocabulary, a mean over places: regions 0, 1 and the whole."""
  vocabulary, absent, places = 9, 5, 3
  rng = np.random.default_rng(0)
  logits = rng.normal(size=(2, places, vocabulary)).astype(np.float32)
  tokens = np.array([[[2, 5, 7, 3, 0], [2, 8, 6, 6, 3]],
                     [[2, 6, 3, 0, 0], [2, 7, 3, 0, 0]]], np.int32)
  place = np.array([[[2, 2, 2, 2, 2], [0, 0, 0, 1, 1]],
                    [[1, 1, 1, 1, 1], [2, 2, 2, 2, 2]]], np.int32)
  valid = np.array([[True, True], [True, False]])

  class Tagger:
    def __call__(self, image, boxes, valid):
      return on_device["logits"]

    def places(self, tokens, regions):
      assert regions == places - 1
      return on_device["place"]
  on_device = put({"logits": logits, "place": place})
  batch = put({"image": np.zeros((2, 1)), "boxes": np.zeros((2, places - 1, 4), np.float32),
               "region_valid": np.ones((2, places - 1), bool), "tokens": tokens,
               "statement_valid": valid})
  found, _ = losses.words_loss(Tagger(), batch, absent)
  words = {(0, 2): {5, 7}, (0, 0): {8, 6}, (0, 1): {6}, (1, 1): {6}}  # the last text is not real
  total = 0.0
  for (b, k), present in words.items():
    p = 1 / (1 + np.exp(-logits[b, k, absent:].astype(np.float64)))
    at = np.isin(np.arange(absent, vocabulary), list(present))
    total += -np.where(at, np.log(p), np.log(1 - p)).mean()
  assert float(found["words"].total) == pytest.approx(total, rel=1e-5)
  assert float(found["words"].weight) == len(words)
