"""Region tokens: their formulas, and what must stay true of a student that has them."""
import dataclasses
import functools
import inspect

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data_pipeline import tokenizer as tokenizers
from lskd_jax import losses
from lskd_jax.models import regions
from lskd_jax.models.qformer import CrossAttention
from lskd_jax.models.student import Student
from tests.lskd_jax import tiny
from tests.lskd_jax.tiny import BRACKET, CLOSE, DIGITS, GATES, REGIONS, STUDENT, put, student

pytestmark = pytest.mark.usefixtures("one_device")

WITHOUT = dataclasses.replace(STUDENT, region_mode="none")
TOKENS, VISION = STUDENT.vit.tokens, STUDENT.vit.width


def on_mesh(rows):
  return put({"rows": rows})["rows"]


def batch_with_features(seed=0, **changes):
  """A batch whose images are given as what a ViT would say of them."""
  rows = tiny.batch(seed)
  shape = (len(rows.pop("image")), TOKENS, VISION)
  rows["features"] = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
  return rows | changes


# Two programs can only agree bit for bit where the compiler keeps the order of a program's sums.
@functools.partial(jax.jit, compiler_options={
    "xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": True})
def jitted_outputs(student, batch):
  sight = student.see(batch["features"], batch["boxes"], batch["region_valid"])
  queries, cache = student.read_image(sight)
  return {"queries": queries, "text": student.embed_text(batch["tokens"]),
          "match": student.match(sight, batch["tokens"]),
          "words": student.predict_words(sight, cache, batch["tokens"])}


def outputs(student, rows):
  """Everything a student says of a batch, in NumPy: query states, text features, logits."""
  return jax.tree.map(np.asarray, jitted_outputs(student, put(rows)))


def assert_same(got, expected, *names):
  for name in names or expected:
    np.testing.assert_array_equal(got[name], expected[name], err_msg=name)


# --- a pretrained student stays what it is ---

def test_with_closed_gates_regions_change_no_bit():
  """At step 0 a student with regions computes what it did without."""
  rows = batch_with_features()
  closed = student(closed=GATES)
  assert rows["region_valid"].any() and (np.asarray(closed.slots(put(rows)["tokens"])) >= 0).any()
  assert_same(outputs(closed, rows), outputs(student(WITHOUT), rows))


def test_without_regions_trained_gates_change_no_bit():
  """Whatever values the region parameters have: no region, no difference."""
  rows = batch_with_features(region_valid=np.zeros((4, REGIONS), bool))
  got, expected = outputs(student(), rows), outputs(student(WITHOUT), rows)
  assert_same(got, expected, "queries", "match", "words")
  # A mention in a text alone is its slot, whether or not an image has that region …
  assert np.any(got["text"] != expected["text"])
  rows["tokens"] = np.where(rows["tokens"] == BRACKET, tiny.WORDS, rows["tokens"])
  assert_same(outputs(student(), rows), outputs(student(WITHOUT), rows))  # … and no mention, nothing


def test_closed_gates_equal_no_regions_in_one_program():
  """Gates and regions are values, not code: this holds bit for bit on every backend."""
  rows = batch_with_features()
  nothing = rows | {"region_valid": np.zeros((4, REGIONS), bool)}
  expected = outputs(student(closed=GATES), nothing)
  assert_same(outputs(student(closed=GATES), rows), expected)
  assert_same(outputs(student(), nothing), expected, "queries", "match", "words")


def test_an_image_without_regions_is_unchanged_beside_one_that_has_some():
  rows = batch_with_features()
  rows["region_valid"][1] = False
  got, expected = outputs(student(), rows), outputs(student(WITHOUT), rows)
  for name in ("queries", "match", "words"):
    np.testing.assert_array_equal(got[name][1], expected[name][1])
    assert np.all(np.any(got[name][0] != expected[name][0], -1))


@pytest.mark.parametrize("site, changed", [
    ("paint_gate", {"queries", "match", "words"}),  # P: whoever reads the image
    ("gate", {"queries", "match", "words"}),  # Q
    ("mention_gate", {"match", "words"}),  # T in passes that see the image
    ("identity_gate", {"text"}),  # T in the text-only pass
])
def test_each_gate_opens_one_site(site, changed):
  rows = batch_with_features()
  got = outputs(student(closed=tuple(set(GATES) - {site})), rows)
  expected = outputs(student(closed=GATES), rows)
  assert {name for name in got if np.any(got[name] != expected[name])} == changed


def test_sites_that_are_off_contribute_nothing():
  rows = batch_with_features()
  off = student(dataclasses.replace(STUDENT, sites=""))
  assert_same(outputs(off, rows), outputs(student(WITHOUT), rows))
  with pytest.raises(ValueError, match="region sites 'PX': only the letters P, Q and T are known"):
    student(dataclasses.replace(STUDENT, sites="PX"))


def test_fresh_gates_are_zero_and_nothing_else_is():
  encoder = regions.RegionEncoder(4, (2, 3), 4, 2, "PQT", nnx.Rngs(0))
  zero = {path[0] for path, leaf in nnx.to_flat_state(nnx.split(encoder)[1])
          if path[-1] != "bias" and not np.any(leaf[...])}
  assert zero == {"paint_gate", "mention_gate", "identity_gate"}
  cross = CrossAttention(STUDENT.qformer, VISION, nnx.Rngs(0), jnp.float32)
  assert cross.gate[...].tolist() == [0.0] * 4  # gamma of site Q: one per head


# --- gradients ---

@jax.jit
def jitted_gradients(student, batch):
  """Of LM and ITC, for the region parameters."""
  graph, params, rest = tiny.parts(student, "regions", "gate")

  def loss(params):
    weights = tiny.LOSS | {"itm": 0.0, "smoothing": 0.1}
    found, _ = losses.student_loss(nnx.merge(graph, params, rest), batch, weights, None)
    return sum(value.mean() for value in found.values())
  return jax.grad(loss)(params)


def named(grads):
  """{last two names of a region parameter: its gradient}."""
  return {"/".join(map(str, path[-2:])): np.asarray(leaf[...])
          for path, leaf in nnx.to_flat_state(grads)}


def moving(grads):
  return {name for name, grad in named(grads).items() if grad.any()}


GATE_NAMES = {"regions/paint_gate", "regions/mention_gate", "regions/identity_gate", "cross/gate"}


def test_gates_move_first_and_the_encoder_after_them():
  rows, model = put(batch_with_features()), student(closed=GATES)
  first = jitted_gradients(model, rows)
  assert moving(first) == GATE_NAMES
  graph, params, rest = tiny.parts(model, "regions", "gate")
  stepped = jax.tree.map(lambda p, g: p - 0.1 * g, params, first)
  second = jitted_gradients(nnx.merge(graph, stepped, rest), rows)
  assert moving(second) == set(named(second))
  assert len(named(second)) == 4 + 6  # gates; two dense layers of geometry, content, slot


def test_two_zeros_in_series_never_move():
  """Why the encoder starts at random: with it at zero too, the gates have no gradient."""
  model = student(closed=GATES)
  encoder = model.regions
  for zeroed in (encoder.geometry_out.kernel, encoder.geometry_out.bias, encoder.content.kernel,
                 encoder.slot):
    zeroed[...] = jnp.zeros_like(zeroed[...])
  grads = jitted_gradients(model, put(batch_with_features()))
  assert moving(grads) == {"cross/gate"}  # site Q needs no encoder
  assert all(np.isfinite(grad).all() for grad in named(grads).values())


# --- slots are names ---

@pytest.fixture(scope="module")
def renamed():
  """A batch, and the same with slots renamed in the list of boxes and in the texts."""
  rows = batch_with_features()
  new = np.array([2, 0, 3, 1])  # the new name of each slot
  moved = {name: np.empty_like(rows[name]) for name in ("boxes", "region_valid")}
  for name, values in moved.items():
    values[:, new] = rows[name]
  names = np.arange(tiny.VOCABULARY)
  names[DIGITS:DIGITS + REGIONS] = DIGITS + new
  return rows, rows | moved | {"tokens": names[rows["tokens"]].astype(np.int32)}


def test_renaming_slots_changes_nothing_if_names_carry_nothing(renamed):
  model = student()
  model.regions.slot[...] = jnp.zeros_like(model.regions.slot[...])
  words = np.array(model.qformer.words[...])
  words[DIGITS:DIGITS + REGIONS] = words[DIGITS]
  model.qformer.words[...] = jnp.asarray(words)
  before, after = (outputs(model, rows) for rows in renamed)
  for name in ("queries", "text", "match"):
    np.testing.assert_allclose(after[name], before[name], atol=1e-4, err_msg=name)


def test_renaming_slots_is_seen_through_their_names(renamed):
  before, after = (outputs(student(), rows) for rows in renamed)
  for name in ("queries", "text", "match"):
    assert np.abs(after[name] - before[name]).max() > 1e-2


# --- the contrastive loss must read ---

def test_the_text_pass_of_itc_takes_no_image():
  assert list(inspect.signature(Student.embed_text).parameters) == ["self", "tokens", "key"]
  assert list(inspect.signature(regions.RegionEncoder.identities).parameters) == ["self"]


def test_text_features_in_the_loss_do_not_depend_on_images_or_boxes(monkeypatch):
  """Taken from within the loss itself, for a student whose region parameters are anything."""
  seen, contrast = [], losses.itc_loss

  def spy(image, text, *rest, **more):
    seen.append(text)
    return contrast(image, text, *rest, **more)
  monkeypatch.setattr(losses, "itc_loss", spy)

  @jax.jit
  def text_features(model, batch):
    weights = tiny.LOSS | {"lm": 0.0, "itm": 0.0, "smoothing": 0.1}
    loss = losses.student_loss(model, batch, weights, None)[0]["itc"].mean()
    return loss, seen.pop()
  rows, other = batch_with_features(), batch_with_features(1)
  replaced = rows | {name: other[name] for name in ("features", "boxes")}
  replaced["region_valid"] = ~rows["region_valid"]
  (loss, text), (other_loss, other_text) = (
      text_features(student(), put(r)) for r in (rows, replaced))
  assert loss != other_loss
  np.testing.assert_array_equal(text, other_text)


# --- coverage, box encoding, RoIAlign ---

def test_coverage_of_a_box_by_hand():
  """On a 2x2 grid, x from 1/4 to 3/4 is half of each column; y from 0 to 1/2 is the first row."""
  cover = regions.coverage(jnp.array([[[0.25, 0.0, 0.75, 0.5]]]), (2, 2))
  np.testing.assert_allclose(cover[0, 0], [[0.5, 0.5], [0, 0]], atol=1e-7)


def coverage_loop(box, rows, columns):
  """The share of every patch that lies in the box, one patch at a time, in float64."""
  share = np.zeros((rows, columns))
  x1, y1, x2, y2 = np.asarray(box, np.float64) * [columns, rows, columns, rows]
  for i, j in np.ndindex(rows, columns):
    share[i, j] = max(min(y2, i + 1) - max(y1, i), 0) * max(min(x2, j + 1) - max(x1, j), 0)
  return share


@pytest.mark.parametrize("grid", [(7, 7), (3, 8), (5, 1)])
def test_coverage_is_the_share_of_every_patch(grid):
  boxes = tiny.batch(3, images=8)["boxes"]
  cover = np.asarray(regions.coverage(jnp.asarray(boxes), grid))
  assert cover.shape == (8, REGIONS, *grid)
  expected = [[coverage_loop(box, *grid) for box in image] for image in boxes]
  np.testing.assert_allclose(cover, expected, atol=2e-6)
  area = (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])
  np.testing.assert_allclose(cover.mean((-1, -2)), area, atol=1e-6)
  assert cover.min() >= 0 and cover.max() <= 1


def test_a_box_smaller_than_a_patch_covers_its_own_patch_only():
  cover = np.asarray(regions.coverage(jnp.array([[[0.55, 0.30, 0.56, 0.31]]]), (4, 4)))[0, 0]
  assert np.argwhere(cover).tolist() == [[1, 2]]  # row 0.30 * 4, column 0.55 * 4
  assert cover.sum() == pytest.approx(0.04 * 0.04, rel=1e-4)


def test_box_encoding():
  """(x1, y1, x2, y2, w, h), then sines and cosines at 8 octaves of each."""
  box = np.array([[[0.25, 0.5, 0.75, 0.5625]]], np.float32)
  encoded = np.asarray(regions.encode_boxes(on_mesh(box)))[0, 0]
  p = np.array([0.25, 0.5, 0.75, 0.5625, 0.5, 0.0625])
  angles = [2**j * np.pi * value for value in p for j in range(8)]
  np.testing.assert_allclose(encoded, [*p, *np.sin(angles), *np.cos(angles)], atol=2e-5)


def roi_align_loop(features, box, bins=3, samples=2):
  """torchvision.ops.roi_align(aligned=True, sampling_ratio=2), one sample at a time, in float64."""
  height, width, channels = features.shape
  x1, y1, x2, y2 = box * [width, height, width, height] - 0.5

  def bilinear(y, x):
    if y < -1 or y > height or x < -1 or x > width:
      return np.zeros(channels)
    y, x = max(y, 0), max(x, 0)
    top, left = int(y), int(x)
    if top >= height - 1:
      top, y = height - 1, height - 1
    if left >= width - 1:
      left, x = width - 1, width - 1
    down, right = min(top + 1, height - 1), min(left + 1, width - 1)
    v, u = y - top, x - left
    return ((1 - v) * ((1 - u) * features[top, left] + u * features[top, right])
            + v * ((1 - u) * features[down, left] + u * features[down, right]))
  out = np.zeros((bins, bins, channels))
  for i, j in np.ndindex(bins, bins):
    for a, b in np.ndindex(samples, samples):
      y = y1 + (i + (a + 0.5) / samples) * (y2 - y1) / bins
      x = x1 + (j + (b + 0.5) / samples) * (x2 - x1) / bins
      out[i, j] += bilinear(y, x) / samples**2
  return out


def test_roi_align_is_that_of_torchvision():
  """On a grid that is no square: at random, at the borders, whole, and smaller than a cell."""
  rng = np.random.default_rng(0)
  features = rng.normal(size=(2, 5, 8, 3))
  low = rng.uniform(0, 0.7, (2, 8, 2))
  boxes = np.concatenate([low, low + rng.uniform(0.02, 0.3, low.shape)], -1)
  boxes[0, :4] = [[0, 0, 1, 1], [0, 0, 0.05, 0.9], [0.9, 0.8, 1, 1], [0.51, 0.51, 0.52, 0.515]]
  got = jax.jit(regions.roi_align)(features.astype(np.float32), boxes.astype(np.float32))
  expected = [[roi_align_loop(f, box) for box in image] for f, image in zip(features, boxes)]
  np.testing.assert_allclose(got, expected, atol=1e-5)


def test_roi_align_of_a_ramp_reads_where_the_box_is():
  """Cell i of a ramp holds its centre, (i + 1/2) / 10: the bins of a box read their own centres."""
  ramp = np.broadcast_to((np.arange(10) + 0.5) / 10, (1, 10, 10))[..., None].astype(np.float32)
  box = jnp.array([[[0.2, 0.4, 0.8, 0.7]]])
  along_x = regions.roi_align(jnp.asarray(ramp), box)[0, 0, :, :, 0]
  along_y = regions.roi_align(jnp.asarray(ramp).swapaxes(1, 2), box)[0, 0, :, :, 0]
  np.testing.assert_allclose(along_x, np.tile([0.3, 0.5, 0.7], (3, 1)), atol=1e-6)
  np.testing.assert_allclose(along_y, np.tile([[0.45], [0.55], [0.65]], (1, 3)), atol=1e-6)


@pytest.mark.parametrize("image_size", [32, (16, 64)])
def test_the_encoder_is_that_of_the_formulas(image_size):
  """On 4 x 4 patches, and on as many in 2 rows of 8."""
  rows = batch_with_features()
  vit = dataclasses.replace(STUDENT.vit, image_size=image_size)
  encoder = student(dataclasses.replace(STUDENT, vit=vit)).regions
  inputs = (on_mesh(rows[name]) for name in ("features", "boxes", "region_valid"))
  got = jax.jit(lambda encoder, *inputs: encoder(*inputs))(encoder, *inputs)
  p = tiny.pure(encoder)
  for b, boxes in enumerate(rows["boxes"]):
    features = rows["features"][b].astype(np.float64)
    cover = np.stack([coverage_loop(box, *vit.grid).reshape(-1) for box in boxes])
    painted = features.copy()
    for k, box in enumerate(boxes):
      valid = rows["region_valid"][b, k]
      phi = np.asarray(regions.encode_boxes(on_mesh(box[None, None])))[0, 0]
      hidden = phi @ p["geometry_in"]["kernel"] + p["geometry_in"]["bias"]
      hidden = np.asarray(jax.nn.gelu(hidden.astype(np.float32)))
      geometry = hidden @ p["geometry_out"]["kernel"] + p["geometry_out"]["bias"]
      pooled = cover[k] @ features[1:] / (cover[k].sum() + 1e-6)
      region = geometry + pooled @ p["content"]["kernel"]
      region /= np.sqrt((region**2).mean() + 1e-6)
      painted[1:] += valid * np.outer(cover[k], (geometry + p["slot"][k]) @ p["paint_gate"])
      np.testing.assert_allclose(got[2][b, k], valid * region @ p["mention_gate"], atol=2e-5)
    np.testing.assert_allclose(got[0][b], painted, atol=5e-5)
    grid = painted[1:].reshape(*vit.grid, VISION)
    tokens = [roi_align_loop(grid, box.astype(np.float64)).reshape(9, VISION) for box in boxes]
    np.testing.assert_allclose(got[1][b], np.concatenate(tokens), atol=5e-5)


# --- mentions ---

def test_a_mention_is_a_digit_after_a_bracket():
  tokens = np.array([[[BRACKET, DIGITS + 1, CLOSE, DIGITS + 2, CLOSE, BRACKET, BRACKET, DIGITS],
                      [DIGITS + 1, BRACKET, tiny.WORDS, DIGITS, BRACKET, CLOSE, DIGITS, BRACKET]]])
  slots = regions.mention_slots(on_mesh(tokens), jnp.asarray(tiny.OPENS_BRACKET),
                                jnp.asarray(tiny.DIGIT))
  assert slots.tolist() == [[[-1, 1, -1, -1, -1, -1, -1, 0], [-1] * 8]]


@pytest.mark.parametrize("text, expected", [
    ("[0][1]", [0, 1]),
    ("([2]), [0] , [1].", [2, 0, 1]),
    ("[3]", [3]),
    ("\n[1]\nwhy does [0]'s dog look at [1]?", [1, 0, 1]),
    ("question: who is [2]? answer: [0]. rationale: [3] says so", [2, 0, 3]),
    ("2 dogs, (2), 2], [ dog ] and no mention", []),
    ("[4] and [10] are more than there are slots", []),
    ("[[1]] is [ 1 ] twice", [1, 1]),  # the brackets of a mention may stand apart
])
def test_mentions_are_found_through_a_trained_tokenizer(tokenizer, text, expected):
  """The look-up in the graph agrees with the intent, and with NumPy's reference, at any length."""
  tables = tokenizers.mention_tables(tokenizer, REGIONS)
  tokens = np.zeros((1, 2, 40), np.int32)
  ids = tokenizer.encode(text).ids
  tokens[0, 1, :len(ids)] = ids
  slots = np.asarray(regions.mention_slots(on_mesh(tokens), *map(jnp.asarray, tables)))
  assert slots[0, 1][slots[0, 1] >= 0].tolist() == expected
  assert (slots[0, 0] == -1).all()  # padding
  np.testing.assert_array_equal(slots, tokenizers.resolve_mentions(tokens, *tables, REGIONS))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  texts = [f"question: why does [{i}] look at the dog? answer: [0] says so" for i in range(12)]
  return tokenizers.train_tokenizer(texts, tmp_path_factory.mktemp("tokenizer"), 200)


def test_a_piece_that_holds_a_whole_mention_is_one():
  """Byte-pair vocabularies may have "[2]" as one piece: its entry is max_regions + 2."""
  opens, digit = jnp.array([False, True, False, False]), jnp.array([-1, -1, 1, REGIONS + 2])
  tokens = on_mesh(np.array([[[3, 2, 1, 2, 0, 3]]], np.int32))
  slots = regions.mention_slots(tokens, opens, digit, REGIONS)
  assert slots.tolist() == [[[2, -1, -1, 1, -1, 2]]]


def test_nothing_stands_before_the_first_token():
  """Not even where id 0 is the bracket."""
  opens, digit = jnp.array([True, False]), jnp.array([-1, 3])
  tokens = on_mesh(np.array([[[1, 0, 1]]], np.int32))
  assert regions.mention_slots(tokens, opens, digit).tolist() == [[[-1, -1, 3]]]


def test_mention_vectors_go_to_their_mentions():
  slots = on_mesh(np.array([[[-1, 1, -1]], [[0, -1, 1]]], np.int32))
  shared = jnp.array([[1.0, 2.0], [3.0, 4.0]])
  assert regions.at_mentions(slots, shared).tolist() == [
      [[[0, 0], [3, 4], [0, 0]]], [[[1, 2], [0, 0], [3, 4]]]]
  of_image = on_mesh(np.array([[[1, 2], [3, 4]], [[5, 6], [7, 8]]], np.float32))
  assert regions.at_mentions(slots, of_image).tolist() == [
      [[[0, 0], [3, 4], [0, 0]]], [[[5, 6], [0, 0], [7, 8]]]]
