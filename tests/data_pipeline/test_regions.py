"""Regions: which slot a region gets, what its mentions become, where its box goes, its colour."""

import itertools

import numpy as np
from PIL import Image
import pytest

from data_pipeline import regions
from data_pipeline.records import DataError

# ---- slots ----


def test_evaluation_orders_slots_by_first_mention_then_id():
  assert regions.assign_slots([0, 2, 5, 9], (5, 0, 5), None, 8, distractors=False) == (5, 0)
  assert regions.assign_slots([9, 2, 5, 0], (5,), None, 8, distractors=True) == (5, 0, 2, 9)
  assert regions.assign_slots([9, 2, 5, 0], (5,), None, 3, distractors=True) == (5, 0, 2)


def test_training_shuffles_slots_and_draws_distractors_at_random():
  rng = np.random.default_rng(0)
  drawn = [regions.assign_slots(range(10), (3, 4), rng, 4, distractors=True) for _ in range(300)]
  assert all(len(set(slots)) == 4 and {3, 4} <= set(slots) for slots in drawn)
  assert {slots.index(3) for slots in drawn} == {0, 1, 2, 3}  # any slot
  assert set().union(*drawn) == set(range(10))  # every region gets its turn as a distractor
  plain = [regions.assign_slots(range(10), (3, 4), rng, 4, distractors=False) for _ in range(40)]
  assert set(plain) == {(3, 4), (4, 3)}


def test_the_same_seed_gives_the_same_slots():
  def draw():
    return regions.assign_slots(range(9), (1,), np.random.default_rng(7), 5, distractors=True)

  assert draw() == draw()


def test_slots_are_refused_for_absent_or_too_many_regions():
  with pytest.raises(DataError, match=r"\[4\] names no region"):
    regions.assign_slots([0, 1], (4,), None, 8, distractors=False)
  with pytest.raises(DataError, match="3 regions are mentioned, max_regions is 2"):
    regions.assign_slots([0, 1, 2], (0, 1, 2), None, 2, distractors=False)


# ---- mentions ----


def test_render_turns_region_ids_into_slots():
  assert regions.render("Is [3] with [7,3]?", slots=(7, 3)) == "Is [1] with [0] , [1]?"
  assert regions.render("nothing is pointed at", slots=()) == "nothing is pointed at"


def test_render_refuses_a_mention_without_a_slot():
  with pytest.raises(DataError, match=r"mention \[3\] has no slot among regions \[7\]"):
    regions.render("Is [7] or [3] here?", slots=(7,))


# ---- boxes, against pixels ----


def ramp(width, height):
  """A picture whose red is the column and whose green is the row of each pixel."""
  columns, rows = np.meshgrid(np.arange(width), np.arange(height))
  return np.stack([columns, rows, np.zeros_like(rows)], axis=-1).astype(np.uint8)


def box_of(mask):
  """The box (exclusive edges) of the true pixels of a mask."""
  rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
  return [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]


def inside(picture, box):
  """Which pixels of a transformed ramp came from inside a box of the original."""
  x, y = picture[..., 0].astype(int), picture[..., 1].astype(int)
  return (x >= box[0]) & (x < box[2]) & (y >= box[1]) & (y < box[3])


BOX = [10, 20, 40, 30]


@pytest.mark.parametrize(
  "crop", [(0, 0, 60, 50), (5, 10, 60, 50), (20, 22, 60, 50), (0, 0, 11, 21)]
)
def test_crop_boxes_follows_the_pixels(crop):
  picture = Image.fromarray(ramp(60, 50)).crop(crop)
  expected = box_of(inside(np.asarray(picture), BOX))
  assert regions.crop_boxes([BOX], crop).tolist() == [expected]
  # Resized to three times the width and twice the height, with each pixel repeated.
  width, height = 3 * picture.width, 2 * picture.height
  large = np.asarray(picture.resize((width, height), Image.Resampling.NEAREST))
  found = regions.crop_boxes([BOX], crop, (width, height))
  np.testing.assert_allclose(found, [box_of(inside(large, BOX))], atol=1e-9)


def test_flip_boxes_follows_the_pixels_and_undoes_itself():
  mirrored = ramp(60, 50)[:, ::-1]
  flipped = regions.flip_boxes([BOX], 60)
  assert flipped.tolist() == [box_of(inside(mirrored, BOX))] == [[20, 20, 50, 30]]
  assert regions.flip_boxes(flipped, 60).tolist() == [BOX]


def test_kept_fraction_counts_pixels():
  rng = np.random.default_rng(0)
  for _ in range(50):
    (x1, x2), (cx1, cx2) = np.sort(rng.choice(60, (2, 2), replace=False), axis=1).tolist()
    (y1, y2), (cy1, cy2) = np.sort(rng.choice(50, (2, 2), replace=False), axis=1).tolist()
    pixels = inside(ramp(60, 50), (x1, y1, x2, y2))
    kept = pixels[cy1:cy2, cx1:cx2].sum() / pixels.sum()
    found = regions.kept_fraction([[x1, y1, x2, y2]], (cx1, cy1, cx2, cy2))
    np.testing.assert_allclose(found, [kept])


def test_a_box_outside_the_crop_keeps_nothing_and_has_no_area():
  box = regions.crop_boxes([BOX], (50, 0, 60, 50))
  assert box.tolist() == [[0, 20, 0, 30]]
  assert regions.kept_fraction([BOX], (50, 0, 60, 50)).tolist() == [0.0]
  assert regions.kept_fraction([[5, 5, 5, 9]], (0, 0, 60, 50)).tolist() == [0.0]


def test_crop_keeps_asks_for_half_of_every_mentioned_box():
  mentioned = [BOX, [0, 0, 10, 10]]  # the crop below keeps 20/30 of the first, 4/10 of the second
  crop = (0, 0, 30, 4 + 50)
  assert regions.crop_keeps([BOX], crop)
  assert regions.crop_keeps(mentioned, crop)
  crop = (6, 0, 60, 50)
  assert not regions.crop_keeps(mentioned, crop)
  assert regions.crop_keeps(mentioned, crop, min_fraction=0.4)
  assert regions.crop_keeps([], crop)


def test_unit_boxes_are_shares_of_the_image():
  assert regions.unit_boxes([[0, 25, 30, 60]], 60, 50).tolist() == [[0.0, 0.5, 0.5, 1.0]]
  assert regions.unit_boxes([], 60, 50).shape == (0, 4)


@pytest.mark.parametrize(
  "text, found",
  [
    ("the man on the left", True),
    ("Right-hand side", True),
    ("leftmost", True),
    ("the bottomright corner", True),
    ("top_left", True),
    ("to his RIGHT.", True),
    ("a bright, upright copyright sign", False),
    ("the cleft", False),
    ("", False),
  ],
)
def test_direction_words(text, found):
  assert regions.has_direction_words(text) is found


# ---- drawing ----


def test_slot_colors_are_far_apart_for_32_slots():
  colors = np.array([regions.slot_color(k) for k in range(32)], float)
  distances = [np.linalg.norm(a - b) for a, b in itertools.combinations(colors, 2)]
  assert min(distances) > 50  # the five colours of the original are 64 apart, its greys 1
  first = [np.linalg.norm(a - b) for a, b in itertools.combinations(colors[:8], 2)]
  assert min(first) > 100


def test_slot_colors_never_change_and_do_not_run_out():
  few = [regions.slot_color(k) for k in range(64)]
  assert len({regions.slot_color(k) for k in range(1000)}) == 1000
  assert [regions.slot_color(k) for k in range(64)] == few
  assert regions.slot_color(0) == (0, 255, 0)


def test_the_overlay_draws_each_box_in_the_colour_of_its_slot_and_nothing_else():
  image = Image.new("RGB", (240, 240), (9, 9, 9))
  drawn = np.asarray(regions.draw_overlay(image, [[10, 20, 100, 60], [120, 130, 240, 240]]))
  for slot, box in enumerate([[10, 20, 100, 60], [120, 130, 240, 240]]):
    mask = (drawn == regions.slot_color(slot)).all(axis=-1)
    assert box_of(mask) == box  # the outline lies inside the box, up to its edge
  assert (drawn[22:58, 12:98] == 9).all()  # 2 pixels wide, and no fill
  assert (drawn[:20] == 9).all()
  assert (np.asarray(image) == 9).all()  # the input is left alone


def test_line_width_scales_with_the_image():
  assert [regions.line_width(s, 2 * s) for s in (48, 480, 2400)] == [2, 4, 20]


def test_tiny_and_overhanging_boxes_can_be_drawn():
  image = Image.new("RGB", (20, 20))
  drawn = regions.draw_overlay(image, [[5.2, 5.2, 5.4, 5.4], [-3, -3, 50, 50]])
  assert drawn.getpixel((0, 0)) == drawn.getpixel((19, 19)) == regions.slot_color(1)


def test_legacy_overlay_blends_a_faint_fill_and_draws_a_2_pixel_outline():
  image = Image.new("RGB", (40, 40), (100, 100, 100))
  drawn = regions.draw_overlay(image, [[10, 10, 29, 29]], palette="legacy")
  assert drawn.getpixel((10, 10)) == drawn.getpixel((29, 11)) == (0x05, 0xFF, 0x37)
  # Fill ff05cd at 32/255 over grey 100: 100 + (255-100)*32/255 = 119.5, 88.1, 113.2.
  np.testing.assert_allclose(drawn.getpixel((20, 20)), (119.5, 88.1, 113.2), atol=1)
  assert drawn.getpixel((30, 20)) == (100, 100, 100)


def test_legacy_colours_of_the_five_positions_and_the_greys_after_them():
  image = Image.new("RGB", (70, 10))
  boxes = [[10 * k, 0, 10 * k + 9, 9] for k in range(7)]
  drawn = regions.draw_overlay(image, boxes, palette="legacy")
  outlines = ["05ff37", "99ccff", "cc99ff", "f5ad42", "f55d42"]
  found = ["{:02x}{:02x}{:02x}".format(*drawn.getpixel((10 * k, 0))) for k in range(5)]
  assert found == outlines
  np.testing.assert_allclose(drawn.getpixel((50, 0)), (103, 102, 102), atol=1)
  np.testing.assert_allclose(drawn.getpixel((60, 0)), (103, 102, 102), atol=1)


def test_an_unknown_palette_is_refused():
  with pytest.raises(DataError, match="'neon'.*distinct"):
    regions.draw_overlay(Image.new("RGB", (9, 9)), [], palette="neon")
