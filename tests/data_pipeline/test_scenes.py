"""Scenes: reproducible, kept apart by their keys, and painted exactly where their boxes say."""

import dataclasses
import itertools
import json

import numpy as np
import pytest

from data_pipeline import records
from data_pipeline.sources import scene_figures, scenes

CHEF = scenes.Figure("chef", "umbrella", "running", "teal", "tan", (4.0, 50.0, 32.0, 90.0), 3)
KING = scenes.Figure("king", "fish", "sitting", "rose", "light", (40.0, 10.0, 68.0, 40.0), 1)
SCENE = scenes.Scene("beach", "rainy", (CHEF, KING))


def _canvas_difference(scene, other):
  """Where two scenes drawn with the same random numbers differ by more than rounding."""
  first, second = (
    np.asarray(scenes.draw_scene(s, np.random.default_rng(0)), np.int32) for s in (scene, other)
  )
  return np.abs(first - second).max(-1) > 8


def test_the_same_seed_gives_the_same_scenes_and_pictures():
  for (a, picture_a), (b, picture_b) in zip(scenes.scene_records(3, 4), scenes.scene_records(3, 9)):
    assert a == b
    assert picture_a.tobytes() == picture_b.tobytes()
  assert list(scenes.iter_scenes(3, 4)) != list(scenes.iter_scenes(4, 4))


def test_records_are_valid_and_keep_the_graph_as_json():
  for i, (record, picture) in enumerate(scenes.scene_records(5, 50, first_id=7, split="val")):
    assert records.validate(record) == record
    assert picture.size == (96, 96) and picture.mode == "RGB"
    assert record.image_id == 7 + i and record.split == "val"
    scene = scenes.scene_from_dict(json.loads(json.dumps(record.extra["scene"])))
    assert scenes.scene_to_dict(scene) == record.extra["scene"]
    assert [region.id for region in record.regions] == list(range(len(scene.figures)))
    assert [region.box for region in record.regions] == [figure.box for figure in scene.figures]
    assert 3 <= len(scene.figures) <= 6
    assert len({figure.cell for figure in scene.figures}) == len(scene.figures)


def test_excluded_scenes_never_occur():
  seen = [scenes.scene_key(s) for s in scenes.iter_scenes(1, 30, min_figures=1, max_figures=1)]
  again = scenes.iter_scenes(1, 30, exclude=seen, min_figures=1, max_figures=1)
  assert not {scenes.scene_key(s) for s in again} & set(seen)


def test_the_key_is_what_a_picture_shows_and_not_where():
  moved = scenes.Scene("beach", "rainy", (KING, dataclasses.replace(CHEF, cell=5, shirt="plum")))
  assert scenes.scene_key(moved) == scenes.scene_key(SCENE)
  for changed in (
    dataclasses.replace(SCENE, weather="sunny"),
    dataclasses.replace(SCENE, figures=(CHEF,)),
    dataclasses.replace(SCENE, figures=(dataclasses.replace(CHEF, pose="waving"), KING)),
  ):
    assert scenes.scene_key(changed) != scenes.scene_key(SCENE)


def test_ids_say_nothing_about_positions():
  cells = [s.figures[0].cell for s in scenes.iter_scenes(0, 300)]
  assert min(np.bincount(cells, minlength=6)) > 25  # 50 expected in each of six cells


@pytest.mark.parametrize("pose", scenes.POSES)
def test_a_box_is_tight_around_what_is_painted(pose):
  """Painted pixels, found as the difference to an empty scene, fill the box to the pixel."""
  for role, thing in zip(scenes.ROLES, scenes.THINGS):
    x1, y1, x2, y2 = scene_figures.figure_extent(role, thing, pose)
    box = (30.0, 40.0, 30.0 + x2 - x1, 40.0 + y2 - y1)
    scene = scenes.Scene("farm", "sunny", (scenes.Figure(role, thing, pose, "sky", "tan", box, 4),))
    rows, columns = np.nonzero(_canvas_difference(scene, dataclasses.replace(scene, figures=())))
    painted = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
    np.testing.assert_allclose(painted, box, atol=1.6)


def test_every_attribute_changes_the_picture_inside_the_box():
  kinds = {"role": scenes.ROLES, "thing": scenes.THINGS, "pose": scenes.POSES}
  for kind, values in kinds.items():
    for a, b in itertools.pairwise(values):
      pair = [
        dataclasses.replace(SCENE, figures=(dataclasses.replace(CHEF, **{kind: v}),))
        for v in (a, b)
      ]
      assert _canvas_difference(*pair).sum() > 25  # at least 5 x 5 pixels


def test_the_sun_is_behind_the_figures():
  high = dataclasses.replace(CHEF, box=(36.0, 0.0, 64.0, 40.0), cell=1)
  scene = scenes.Scene("city", "sunny", (high,))
  heads = [  # the middle of the hat, where the sun would be, under two different skies
    np.asarray(scenes.draw_scene(scene, np.random.default_rng(k)))[3:8, 48:52] for k in range(2)
  ]
  np.testing.assert_array_equal(*heads)


def test_relations_follow_from_pose_and_role():
  assert scenes.relation(SCENE, 0, 1) == ("runs to", "king")
  assert scenes.relation(SCENE, 1, 0) == ("rests near", "chef")


def test_impossible_counts_are_refused():
  with pytest.raises(records.DataError, match="within 1..6"):
    scenes.sample_scene(np.random.default_rng(0), (3, 7))
