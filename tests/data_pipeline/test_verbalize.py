"""Words for pictures: exact without errors, wrong at the asked rate, plain for photographs."""

import dataclasses

import numpy as np
import pytest

from data_pipeline import verbalize
from data_pipeline.records import DataError, ImageRecord, Region, Verbalization
from data_pipeline.sources import scenes

CHEF = scenes.Figure("chef", "umbrella", "running", "teal", "tan", (4.0, 50.0, 32.0, 90.0), 3)
KING = scenes.Figure("king", "fish", "sitting", "rose", "light", (40.0, 10.0, 68.0, 40.0), 1)
SCENE = scenes.Scene("forest", "rainy", (CHEF, KING))


def test_without_errors_the_words_are_the_scene():
  words = verbalize.verbalize_scene(SCENE, None, error_rate=0)
  assert words.local == {
    0: "a figure in a tall white hat, holding an umbrella, running",
    1: "a figure in a gold crown, holding a fish, sitting",
  }
  assert words.captions == (  # row by row: the king stands in the upper row
    "a rainy forest: gold crown with fish sitting, tall white hat with umbrella running",
    "rainy day in the forest: sitting gold crown with fish, running tall white hat with umbrella",
  )


def test_every_attribute_is_wrong_at_the_rate():
  wrong, copied, total = 0, 0, 0
  settings = np.zeros(2)
  for i, scene in enumerate(scenes.iter_scenes(2, 400)):
    seen = verbalize.misread_scene(scene, np.random.default_rng(i), 0.25)
    settings += seen.place != scene.place, seen.weather != scene.weather
    for k, (a, b) in enumerate(zip(scene.figures, seen.figures)):
      assert a.box == b.box and a.cell == b.cell
      for kind in ("role", "thing", "pose"):
        value = getattr(b, kind)
        total += 1
        if value != getattr(a, kind):
          wrong += 1
          copied += value in [getattr(f, kind) for j, f in enumerate(scene.figures) if j != k]
  assert abs(wrong / total - 0.25) < 0.02  # one standard error is 0.006
  assert np.all(np.abs(settings / 400 - 0.25) < 0.08)  # one standard error is 0.022
  assert copied / wrong > 0.5  # half on purpose, more by chance


def test_errors_are_the_same_in_all_words_of_a_picture():
  for i, scene in enumerate(scenes.iter_scenes(8, 40)):
    words = verbalize.verbalize_scene(scene, np.random.default_rng(i), 0.5)
    hats = {k: text.split(",")[0].split(" in a")[1].lstrip("n ") for k, text in words.local.items()}
    order = sorted(hats, key=lambda k: scene.figures[k].cell)
    for caption in words.captions:
      parts = caption.split(": ")[1].split(", ")
      assert all(hats[k] in part for k, part in zip(order, parts, strict=True))


def test_captions_are_short_enough():
  words = [verbalize.verbalize_scene(s, None, 0) for s in scenes.iter_scenes(6, 100, (), 6, 6)]
  assert max(len(caption.split()) for w in words for caption in w.captions) <= 45


def test_a_record_is_described_the_same_each_time_and_errors_depend_on_the_seed():
  record, _ = next(scenes.scene_records(1, 1))
  assert verbalize.verbalize(record, seed=3) == verbalize.verbalize(record, seed=3)
  seeds = {verbalize.verbalize(record, seed=k).verbalization.captions for k in range(5)}
  assert len(seeds) > 1


def _photograph(**changes):
  regions = (
    Region(0, (0, 0, 200, 400), "person"),
    Region(3, (195, 300, 300, 420), "surfboard"),
    Region(5, (560, 10, 580, 30), "bird"),
    Region(6, (570, 300, 640, 480), "bird"),
    Region(9, (300, 0, 310, 10)),
  )
  given = Verbalization(captions=("a man at sea",))
  record = ImageRecord("a.jpg", 1, 640, 480, regions, verbalization=given)
  return dataclasses.replace(record, **changes)


def test_annotations_become_sizes_places_neighbours_and_counts():
  words = verbalize.verbalize(_photograph()).verbalization
  assert words.local == {
    0: "a large person at the left, next to a surfboard",
    3: "a surfboard in the middle, next to a person",
    5: "a small bird at the right",
    6: "a bird at the right",
  }
  assert words.captions == (
    "a man at sea",
    "a picture with a person, a surfboard and two birds",
  )


def test_a_picture_without_labels_has_only_its_captions():
  words = verbalize.verbalize(_photograph(regions=())).verbalization
  assert words.captions == ("a man at sea",) and words.local == {}


def test_positions_need_the_size_of_the_picture():
  with pytest.raises(DataError, match="a.jpg: width and height"):
    verbalize.verbalize(_photograph(width=0))
