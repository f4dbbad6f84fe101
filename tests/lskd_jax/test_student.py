"""The student: how its heads read the Q-Former's passes, its region modes, and its configuration."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lskd_jax.models.student import StudentConfig, Tagger, student_config
from tests.lskd_jax import tiny
from tests.lskd_jax.tiny import BRACKET, DIGITS, STUDENT, WORDS, put, student

pytestmark = pytest.mark.usefixtures("one_device")


@jax.jit
def jitted_outputs(student, batch):
  """What a student says of a batch, and the states its heads read."""
  tokens = batch["tokens"]
  sight = student.see(student.vit(batch["image"]), batch["boxes"], batch["region_valid"])
  states, cache = student.read_image(sight)
  mention = None if sight.mention is None else student._mention(sight, tokens)
  return {
      "image": student.embed_image(states), "text": student.embed_text(tokens),
      "match": student.match(sight, tokens), "words": student.predict_words(sight, cache, tokens),
      "query_states": states, "fused_states": student.fuse(sight, tokens),
      "started_states": student.qformer.causal_pass(
          cache, tokens.at[:, :, 0].set(STUDENT.decoder_start), mention)}


def outputs(student, rows):
  return jax.tree.map(np.asarray, jitted_outputs(student, put(rows)))


@pytest.fixture(scope="module")
def rows():
  return tiny.batch()


@pytest.fixture(scope="module")
def plain(one_device, rows):
  return outputs(student(), rows)


def dense(x, p):
  return x @ p["kernel"] + p["bias"]


def test_contrastive_embeddings_are_unit_vectors(plain):
  assert plain["image"].shape == (4, 4, 16) and plain["text"].shape == (4, 2, 16)
  for name in ("image", "text"):
    np.testing.assert_allclose(np.linalg.norm(plain[name], axis=-1), 1, atol=1e-6)
  vectors = dense(plain["query_states"], tiny.pure(student())["vision_proj"])
  vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
  np.testing.assert_allclose(plain["image"], vectors, atol=1e-6)


def test_matching_logits_are_a_mean_over_queries(plain):
  expected = dense(plain["fused_states"], tiny.pure(student())["itm_head"]).mean(2)
  np.testing.assert_allclose(plain["match"], expected, atol=2e-6)


def test_word_logits_are_berts_prediction_head(plain):
  """Dense, GELU, norm, then the word embeddings transposed and a bias; the start is [DEC]."""
  p = tiny.pure(student())
  head = p["language_head"]
  x = tiny.gelu(dense(plain["started_states"], head["dense"]))
  x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-12)
  x = x * head["norm"]["scale"] + head["norm"]["bias"]
  np.testing.assert_allclose(plain["words"], x @ p["qformer"]["words"].T + head["bias"], atol=2e-5)


def test_the_first_token_is_replaced_in_the_causal_pass_only(plain, rows):
  """[CLS] there would tell a reader from a writer; LAVIS puts [DEC]."""
  tokens = rows["tokens"].copy()
  tokens[:, :, 0] = WORDS
  changed = outputs(student(), rows | {"tokens": tokens})
  np.testing.assert_array_equal(changed["words"], plain["words"])
  assert np.all(np.any(changed["text"] != plain["text"], -1))


def test_one_statement_of_one_image_alone_is_the_same(plain, rows):
  """Nothing depends on the batch or on the image's other statements; a batch of 1 keeps its axes."""
  alone = {name: values[1:2] for name, values in rows.items()}
  alone |= {name: alone[name][:, 1:] for name in ("tokens", "fields", "statement_valid")}
  for name, values in outputs(student(), alone).items():
    expected = plain[name][1:2] if name in ("image", "query_states") else plain[name][1:2, 1:]
    np.testing.assert_allclose(values, expected, atol=2e-5, err_msg=name)  # of logits up to 5


@pytest.mark.parametrize("mode, reads_boxes", [
    ("tokens", True), ("both", True), ("overlay", False), ("none", False)])
def test_region_modes(rows, mode, reads_boxes):
  config = dataclasses.replace(STUDENT, region_mode=mode)
  assert config.uses_region_tokens == reads_boxes
  shown = jax.jit(lambda student, a: student.see(
      student.vit(a["image"]), a["boxes"], a["region_valid"]).memory.keys)
  moved = rows | {"boxes": rows["boxes"] * np.float32(0.9)}
  before, after = (shown(student(config), put(r)) for r in (rows, moved))
  assert np.any(before != after) == reads_boxes


@pytest.mark.parametrize("value, expected", [(0.07, 0.07), (1e-6, 0.01), (30.0, 0.5)])
def test_the_temperature_stays_in_bounds(value, expected):
  model = student()
  model.log_temperature[...] = jnp.log(value)
  assert float(model.temperature()) == pytest.approx(expected, rel=1e-5)


def test_bfloat16_runs_and_is_near_float32(plain, rows):
  got = outputs(student(dataclasses.replace(STUDENT, dtype="bfloat16")), rows)
  for name in ("image", "text", "match", "words"):
    assert got[name].dtype == np.float32  # logits and embeddings, whatever the compute dtype
    error = np.abs(got[name] - plain[name]).mean()
    assert 0 < error < 0.05 * np.abs(plain[name]).mean(), name


# --- configuration ---

def test_a_config_is_built_from_nested_dicts():
  config = student_config({"vit": {"width": 8}, "qformer": {"depth": 4}, "sites": "P"})
  assert (config.vit.width, config.qformer.depth, config.sites) == (8, 4, "P")
  assert student_config({}) == StudentConfig()  # BLIP-2's sizes


def test_a_config_survives_json_and_back():
  assert student_config(dataclasses.asdict(STUDENT)) == STUDENT


@pytest.mark.parametrize("config, name", [
    ({"sizes": 3}, "model.sizes"), ({"vit": {"dept": 3}}, "model.vit.dept"),
    ({"qformer": {"head": 1}}, "model.qformer.head")])
def test_an_unknown_key_is_named(config, name):
  with pytest.raises(ValueError, match=f"{name} is unknown: .* has .*width|{name} is unknown"):
    student_config(config)


# --- the tagger, which pre-trains a ViT ---

@pytest.fixture(scope="module")
def tagger(one_device):
  return tiny.filled(lambda rngs: Tagger(STUDENT, tiny.OPENS_BRACKET, tiny.DIGIT, rngs))


def test_a_words_logit_is_a_log_mean_exp_over_the_patches_of_a_place(tagger, rows):
  logits = jax.jit(lambda t, *a: t(*a))(
      tagger, *(put(rows)[name] for name in ("image", "boxes", "region_valid")))
  assert logits.shape == (4, tiny.REGIONS + 1, tiny.VOCABULARY)
  p = tiny.pure(tagger)
  features = np.asarray(jax.jit(lambda t, i: t.norm(t.vit(i)[:, 1:]))(tagger, put(rows)["image"]))
  patches = dense(features.astype(np.float64), p["words"])
  grid = STUDENT.vit.grid[0]
  for b, boxes in enumerate(rows["boxes"]):
    for k, (x1, y1, x2, y2) in enumerate([*boxes, (0, 0, 1, 1)]):
      if k < tiny.REGIONS and not rows["region_valid"][b, k]:
        continue
      share = np.zeros((grid, grid))  # of each patch that lies in the box
      for i, j in np.ndindex(grid, grid):
        height = min(y2 * grid, i + 1) - max(y1 * grid, i)
        share[i, j] = max(height, 0) * max(min(x2 * grid, j + 1) - max(x1 * grid, j), 0)
      share = share.reshape(-1, 1)
      expected = np.log((share * np.exp(patches[b])).sum(0) / share.sum())
      np.testing.assert_allclose(logits[b, k], expected, atol=1e-4)


def test_words_describe_the_region_mentioned_last(tagger):
  """Before any mention, and in a caption, they describe the whole picture (here: place 4)."""
  text = [WORDS, BRACKET, DIGITS + 2, WORDS, WORDS, BRACKET, DIGITS, WORDS]
  caption = [WORDS, DIGITS, WORDS + 1, WORDS, WORDS, WORDS, WORDS, WORDS]
  tokens = put({"t": np.array([[text, caption]], np.int32)})["t"]
  assert tagger.places(tokens, 4).tolist() == [[[4, 4, 2, 2, 2, 2, 0, 0], [4] * 8]]
