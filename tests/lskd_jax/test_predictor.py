"""Pointing at a picture: what the scores mean, and what is said of input that has none."""
import jax
from jax.sharding import AxisType
import numpy as np
from PIL import Image
import pytest

from data_pipeline import regions
from data_pipeline.records import DataError
import lskd_jax
from lskd_jax import predictor
from lskd_jax.models.vit import Vit
from lskd_jax.trees import CheckpointError
from tests.lskd_jax.tiny_models import make_model

WHO = "question: who is [0]? answer: a chef rationale: [0] wears a tall white hat"
OTHER = WHO.replace("[0]", "[1]")
BOXES = [(0, 0, 40, 40), (30, 10, 80, 60)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return make_model(tmp_path_factory.mktemp("tokens") / "model")


@pytest.fixture(scope="module")
def model(folder):
  return lskd_jax.load(folder)


@pytest.fixture(scope="module")
def picture():
  return np.random.default_rng(0).integers(0, 255, (60, 80, 3), np.uint8)


class FakeScorer:
  """Keeps the rows it is given; every token is as likely as its place in the text, negated."""

  def __init__(self, graph, state):
    self.rows = None

  def __call__(self, rows):
    self.rows = rows
    shape = rows["tokens"].shape
    words = np.broadcast_to(-np.arange(shape[2], dtype=np.float64), shape)
    return {"words": words, "itm": np.zeros(shape[:2]), "itc": np.zeros(shape[:2])}


@pytest.fixture
def fake(folder, monkeypatch):
  monkeypatch.setattr(predictor, "Scorer", FakeScorer)
  return lskd_jax.load(folder)


def same(left, right):
  for a, b in zip(left, right, strict=True):
    assert a["text"] == b["text"]
    np.testing.assert_allclose([a[k] for k in ("itm", "itc", "lm")],
                               [b[k] for k in ("itm", "itc", "lm")], rtol=1e-4, atol=1e-5)


# --- scores --------------------------------------------------------------------------------------


def test_every_text_gets_its_three_scores(model, picture):
  found = model.score(picture, BOXES, [WHO, OTHER])
  assert [list(row) for row in found] == [["text", "itm", "itc", "lm"]] * 2
  assert [row["text"] for row in found] == [WHO, OTHER]
  assert all(-1 <= row["itc"] <= 1 and row["lm"] < 0 for row in found)
  assert all(type(row[head]) is float for row in found for head in ("itm", "itc", "lm"))


def test_a_text_scores_the_same_in_any_company(model, picture):
  both = model.score(picture, BOXES, [WHO, OTHER])
  same(model.score(picture, BOXES, [OTHER, WHO]), both[::-1])


def test_what_is_pointed_at_decides(model, picture):
  here = model.score(picture, BOXES, [WHO, OTHER])
  there = model.score(picture, BOXES[::-1], [WHO, OTHER])
  for head in ("itm", "lm"):
    assert abs(here[0][head] - there[0][head]) > 1e-5
    assert abs(here[0][head] - here[1][head]) > 1e-5


def test_the_picture_is_computed_once_for_all_texts(folder, picture, monkeypatch):
  seen, call = [], Vit.__call__
  monkeypatch.setattr(Vit, "__call__", lambda self, image: seen.append(image.shape)
                      or call(self, image))
  lskd_jax.load(folder).score(picture, BOXES, [WHO, OTHER])
  assert seen == [(1, 48, 48, 3)]


def test_files_and_images_and_arrays_are_the_same_picture(model, picture, tmp_path):
  image = Image.fromarray(picture)
  image.save(tmp_path / "picture.png")
  found = model.score(picture, BOXES, [WHO, OTHER])
  assert model.score(image, BOXES, [WHO, OTHER]) == found
  assert model.score(tmp_path / "picture.png", BOXES, [WHO, OTHER]) == found
  assert model.score(str(tmp_path / "picture.png"), BOXES, [WHO, OTHER]) == found


def test_a_transparent_picture_is_white_there_as_a_file_and_as_an_image(model, tmp_path):
  Image.new("RGBA", (80, 60), (0, 0, 0, 0)).save(tmp_path / "clear.png")
  found = model.score(np.full((60, 80, 3), 255, np.uint8), BOXES, [WHO])
  assert model.score(tmp_path / "clear.png", BOXES, [WHO]) == found
  assert model.score(Image.open(tmp_path / "clear.png"), BOXES, [WHO]) == found


def test_a_photograph_is_turned_upright(model, picture, tmp_path):
  exif = Image.Exif()
  exif[0x0112] = 6  # the camera was turned: 80 x 60 as stored, 60 x 80 as seen
  Image.fromarray(picture).save(tmp_path / "turned.png", exif=exif)
  upright = Image.fromarray(np.rot90(picture, -1))
  box = [(0, 0, 60, 80)] * 2
  same(model.score(tmp_path / "turned.png", box, [WHO, OTHER]),
       model.score(upright, box, [WHO, OTHER]))


def test_the_mesh_of_the_caller_is_left_alone(folder, picture):
  mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(AxisType.Explicit,) * 2)
  with jax.set_mesh(mesh):
    model = lskd_jax.load(folder)
    model.score(picture, BOXES, [WHO, OTHER])
    assert jax.sharding.get_mesh() == mesh


@pytest.mark.parametrize("text,counted", [
    # [CLS] question : who is [ 0 ] ? answer : a chef …; entry t has likelihood -t.
    ("question: who is [0]? answer: a chef", [11, 12]),
    ("question: who is [0]? answer: a chef rationale: a hat", [11, 12, 13, 14, 15, 16]),
    ("question: who is [0]? answer:", range(1, 11)),
    ("a chef with [0]", range(1, 7)),
])
def test_lm_is_the_mean_over_what_follows_answer(fake, picture, text, counted):
  found, = fake.score(picture, BOXES, [text])
  assert found["lm"] == pytest.approx(-np.mean(counted))


def test_the_kth_region_is_slot_k(fake, picture):
  fake.score(picture, BOXES, [WHO, OTHER, "two: [0,1]"])
  rows = fake._scorer.rows
  assert rows["tokens"].shape == (1, 4, 32)  # rounded up, so that few shapes are compiled
  assert rows["region_valid"].tolist() == [[True, True, False, False, False, False]]
  np.testing.assert_allclose(rows["boxes"][0, :2], [[0, 0, .5, 2 / 3], [.375, 1 / 6, 1, 1]])
  assert fake.tokenizer.decode(rows["tokens"][0, 2], True).split() == "two : [ 0 ] , [ 1 ]".split()


@pytest.mark.parametrize("mode,drawn,boxes", [
    ("tokens", False, 2), ("overlay", True, 0), ("both", True, 2), ("none", False, 0)])
def test_regions_reach_the_model_as_it_was_trained(mode, drawn, boxes, picture, tmp_path,
                                                   monkeypatch):
  monkeypatch.setattr(predictor, "Scorer", FakeScorer)
  model = lskd_jax.load(make_model(tmp_path / "model", region_mode=mode))
  model.score(picture, BOXES, [WHO])
  rows = model._scorer.rows
  plain = Image.fromarray(picture)
  shown = regions.draw_overlay(plain, BOXES) if drawn else plain
  expected = np.asarray(shown.resize((48, 48), Image.Resampling.BICUBIC))
  assert np.array_equal(rows["image"][0], expected)
  assert rows["region_valid"].sum() == boxes


@pytest.mark.parametrize("mode", ["tokens", "overlay"])
def test_a_model_may_see_pictures_that_are_no_squares(mode, picture, tmp_path):
  """They are squashed to its height and width; boxes stay the same shares of the picture."""
  model = lskd_jax.load(make_model(tmp_path / "model", region_mode=mode, image_size=(24, 96)))
  assert model.config.vit.image_size == (24, 96)
  heard, score = [], model._scorer
  model._scorer = lambda rows: heard.append(rows) or score(rows)
  here, there = (model.score(picture, boxes, [WHO])[0] for boxes in (BOXES, BOXES[::-1]))
  assert abs(here["itm"] - there["itm"]) > 1e-5
  shown = Image.fromarray(picture)
  shown = regions.draw_overlay(shown, BOXES) if mode == "overlay" else shown
  expected = np.asarray(shown.resize((96, 24), Image.Resampling.BICUBIC))
  np.testing.assert_array_equal(heard[0]["image"], expected[None])
  if mode == "tokens":
    np.testing.assert_allclose(heard[0]["boxes"][0, :2], [[0, 0, .5, 2 / 3], [.375, 1 / 6, 1, 1]])


def test_no_texts_no_scores(model, picture):
  assert model.score(picture, BOXES, []) == []


# --- what cannot be scored -----------------------------------------------------------------------


@pytest.mark.parametrize("boxes,texts,error", [
    ([(0, 0, 80, 61)], ["[0]"], r"region \[0\] = 0,0,80,61 reaches outside the 80x60 image"),
    ([(0, 0, 9, 9), (-1, 0, 9, 9)], ["[0]"], r"region \[1\] = -1,0,9,9 reaches outside"),
    ([(9, 0, 9, 5)], ["[0]"], r"region \[0\] = 9,0,9,5 has no area"),
    ([(0, 5, 9, 2)], ["[0]"], r"region \[0\] = 0,5,9,2 has no area"),
    ([(0, 0, float("nan"), 2)], ["[0]"], r"region \[0\] = 0,0,nan,2 has no area"),
    ([(0, 0, 9)], ["[0]"], r"region \[0\] is \(0, 0, 9\); give x1, y1, x2, y2"),
    ([(0, 0, 9, 9)] * 7, ["[0]"], "7 regions are given, this model takes at most 6"),
    ([], ["is [0]?"], r"text 'is \[0\]\?' mentions \[0\], but no region is given"),
    ([(0, 0, 9, 9)], ["[0] [1]"], r"mentions \[1\], but only region \[0\] is given"),
    ([(0, 0, 9, 9)] * 2, ["ok", "[0,2]"], r"mentions \[2\], but only \[0\] to \[1\] are given"),
    ([], [" "], "text ' ' is empty"),
    ([], "dog", "texts: want a list of texts, got 'dog'"),
    ([], ["word " * 80], r"text 'word .* has \d+ tokens; this model reads 1 to 62"),
])
def test_an_error_names_the_culprit(model, picture, boxes, texts, error):
  with pytest.raises(DataError, match=error) as caught:
    model.score(picture, boxes, texts)
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize("image,error", [
    (np.zeros((4, 4), np.uint8), r"got uint8\[4, 4\]"),
    (np.zeros((4, 4, 3)), r"got float64\[4, 4, 3\]"),
    (None, "got NoneType"),
    ("missing.jpg", "missing.jpg: no such image"),
])
def test_what_is_no_picture(model, image, error):
  with pytest.raises(DataError, match=error):
    model.score(image, [], ["a"])


def test_what_is_no_student(tmp_path):
  with pytest.raises(CheckpointError, match="is not a model directory"):
    lskd_jax.load(tmp_path)
  critic = make_model(tmp_path / "critic", "critic")
  with pytest.raises(DataError, match="holds a critic; scoring texts needs a student"):
    lskd_jax.load(critic)


