"""Regions in one example: their slots, the mentions of them, their boxes and their colours.

A record numbers its regions by id. One example or prompt offers some of them, in some order; a
region's place in that order is its *slot*, and "[k]" in the example's text means slot k. `slots` is
always the tuple that lists the region id of each slot: what is drawn, tagged and embedded all come
from it, so they cannot disagree.
Boxes are (x1, y1, x2, y2) in pixels, x2 and y2 exclusive: a box over a whole image of 4x3 pixels
is (0, 0, 4, 3).
"""

from __future__ import annotations

from collections.abc import Sequence
import colorsys
from functools import cache
import re

import numpy as np
from PIL import Image, ImageDraw

from data_pipeline.records import DataError, map_mentions

# A region of which a crop leaves less than this share of its area can no longer be pointed at.
KEPT_FRACTION = 0.5


# ---- slots and mentions ----


def assign_slots(
  region_ids: Sequence[int],
  mentioned: Sequence[int],
  rng: np.random.Generator | None,
  max_regions: int,
  distractors: bool,
) -> tuple[int, ...]:
  """The region ids of one example, in slot order.

  region_ids: all regions of the image. mentioned: those its texts mention, in order of mention.
  rng: None for evaluation: the mentioned in order of first mention, then, with distractors, the
    others by id. In training the slots are shuffled, and which distractors stay is random.
  max_regions: distractors are left out to keep to it.
  DataError if a mentioned id is not a region, or more than max_regions are mentioned.
  """
  mentioned = list(dict.fromkeys(mentioned))
  missing = [i for i in mentioned if i not in region_ids]
  if missing:
    raise DataError(f"mention [{missing[0]}] names no region; the image has {sorted(region_ids)}")
  if len(mentioned) > max_regions:
    fault = f"{len(mentioned)} regions are mentioned, max_regions is {max_regions}"
    raise DataError(f"{fault}; raise it or leave the statement out")
  others = sorted(set(region_ids) - set(mentioned)) if distractors else []
  if rng is None:
    return tuple(mentioned + others[: max_regions - len(mentioned)])
  room = min(len(others), max_regions - len(mentioned))
  chosen = mentioned + [others[i] for i in rng.permutation(len(others))[:room]]
  return tuple(chosen[i] for i in rng.permutation(len(chosen)))


def render(text: str, slots: Sequence[int]) -> str:
  """The text with region ids turned into slots: with slots (7, 3), "[3] and [7,3]" becomes
  "[1] and [0] , [1]". DataError for a mention of a region that has no slot: a tag that pointed at
  nothing, or a word that went missing, would teach the wrong thing silently."""
  slot_of = {region_id: slot for slot, region_id in enumerate(slots)}

  def tag(region_id: int) -> str:
    if region_id not in slot_of:
      raise DataError(
        f"mention [{region_id}] has no slot among regions {list(slots)}: {text!r:.80}"
      )
    return f"[{slot_of[region_id]}]"

  return map_mentions(text, tag)


# ---- boxes under crop, resize and mirroring ----


def crop_boxes(
  boxes: np.ndarray, crop: Sequence[float], size: tuple[int, int] | None = None
) -> np.ndarray:
  """Boxes [n, 4] in the frame of a crop of the image, clipped to it.

  crop: (x1, y1, x2, y2) in pixels of the image. size: (width, height) the crop is resized to; None
  leaves its own. A box outside the crop comes back with no area.
  """
  x1, y1, x2, y2 = crop
  width, height = size or (x2 - x1, y2 - y1)
  inside = np.clip(_boxes(boxes), [x1, y1, x1, y1], [x2, y2, x2, y2]) - [x1, y1, x1, y1]
  return inside * np.tile([width / (x2 - x1), height / (y2 - y1)], 2)


def flip_boxes(boxes: np.ndarray, width: float) -> np.ndarray:
  """Boxes [n, 4] in the mirrored (left to right) image of that width."""
  x1, y1, x2, y2 = _boxes(boxes).T
  return np.stack([width - x2, y1, width - x1, y2], axis=1)


def unit_boxes(boxes: np.ndarray, width: float, height: float) -> np.ndarray:
  """Boxes [n, 4] in pixels as float32 shares of the width and height, clipped to 0..1."""
  scaled = _boxes(boxes) / [width, height, width, height]
  return np.clip(scaled, 0.0, 1.0).astype(np.float32)


def kept_fraction(boxes: np.ndarray, crop: Sequence[float]) -> np.ndarray:
  """The share [n] of each box's area that lies inside the crop; 0 for a box without area."""
  boxes = _boxes(boxes)
  kept = crop_boxes(boxes, crop)
  area, kept_area = (np.prod(np.maximum(b[:, 2:] - b[:, :2], 0.0), axis=1) for b in (boxes, kept))
  return np.divide(kept_area, area, out=np.zeros_like(area), where=area > 0)


def crop_keeps(
  boxes: np.ndarray, crop: Sequence[float], min_fraction: float = KEPT_FRACTION
) -> bool:
  """Whether a crop leaves enough of every one of these boxes (give it the mentioned ones). If not,
  the statement that mentions them is dropped from the example, or another crop is drawn."""
  return bool((kept_fraction(boxes, crop) >= min_fraction).all())


# "left", "leftmost", "right-hand", "top_left", "bottomright"; not "bright" or "copyright". A
# "right" that means "correct" is caught too: it only costs one mirroring.
_DIRECTION = re.compile(
  r"(?<![a-z])(?:top|upper|bottom|lower|mid|middle|cent(?:er|re)|far|front|rear|back)?(?:left|right)",
  re.IGNORECASE,
)


def has_direction_words(text: str) -> bool:
  """Whether the text says left or right in any form, so that its image must not be mirrored."""
  return _DIRECTION.search(text) is not None


def _boxes(boxes) -> np.ndarray:
  """float64[n, 4], also from an empty list."""
  return np.asarray(boxes, np.float64).reshape(-1, 4)


# ---- drawing ----

# The original's five colours as (fill, outline), RGBA; fills of 1 and 3, and of 2 and 4, coincide.
_LEGACY = [
  ("#ff05cd20", "#05ff37ff"),
  ("#ff800020", "#99ccffff"),
  ("#862d2d20", "#cc99ffff"),
  ("#ff800020", "#f5ad42ff"),
  ("#862d2d20", "#f55d42ff"),
]
PALETTES = ("distinct", "legacy")


def draw_overlay(image: Image.Image, boxes, palette: str = "distinct") -> Image.Image:
  """A copy of an RGB image with the box of slot k, boxes[k], drawn in the colour of slot k.

  Draw after any change of colours, so that the colour that tells slots apart arrives unchanged,
  and before resizing. Later slots are drawn over earlier ones.
  "distinct": outlines in `slot_color(k)`, inside the box, as wide as the image asks for.
  "legacy": exactly as the original drew: outline 2 pixels wide over a faint fill, five colours and
  then greys that cannot be told apart.
  """
  if image.mode != "RGB":
    raise TypeError(f"want an RGB image, got mode {image.mode}")
  boxes = _boxes(boxes)
  if palette == "legacy":
    return _draw_legacy(image, boxes)
  if palette != "distinct":
    raise DataError(f"palette {palette!r} is unknown; choose from {PALETTES}")
  image = image.copy()
  pen = ImageDraw.Draw(image)
  width = line_width(*image.size)
  edge = np.array([image.width, image.height] * 2) - 1
  for slot, box in enumerate(boxes):
    x1, y1, x2, y2 = np.clip(np.round(box).astype(int) - [0, 0, 1, 1], 0, edge).tolist()
    pen.rectangle((x1, y1, max(x1, x2), max(y1, y2)), outline=slot_color(slot), width=width)
  return image


def line_width(width: int, height: int) -> int:
  """How many pixels wide an outline is, so that it is seen after the image is resized."""
  return max(2, round(min(width, height) / 120))


def _draw_legacy(image: Image.Image, boxes: np.ndarray) -> Image.Image:
  for slot, (x1, y1, x2, y2) in enumerate(boxes.tolist()):
    layer = Image.new("RGBA", image.size, (0, 0, 0, 0))
    fill, outline = _LEGACY[slot] if slot < len(_LEGACY) else _legacy_formula(slot)
    ImageDraw.Draw(layer).rectangle((x1, y1, x2, y2), fill=fill, outline=outline, width=2)
    image = Image.alpha_composite(image.convert("RGBA"), layer).convert("RGB")
  return image


def _legacy_formula(slot: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
  hue, saturation = (slot % 1024) / 1024, (slot % 1023) / 1023
  lightness = 0.4 + 0.6 * ((slot % 1025) / 1025)
  rgb = tuple(int(255 * c) for c in colorsys.hls_to_rgb(hue, lightness, saturation))
  return (*rgb, 32), (*rgb, 255)


def slot_color(slot: int) -> tuple[int, int, int]:
  """The RGB colour of a slot, the same whatever else is drawn, and unlike every earlier one.

  Colours are chosen one after another, each as far in CIE Lab from all before it as can be, so the
  first few differ most. They repeat after some 3,000.
  """
  if slot < 0:
    raise ValueError(f"slot {slot} is negative")
  colors = _distinct_colors(64 if slot < 64 else 4096)
  return colors[slot % len(colors)]


@cache
def _distinct_colors(count: int) -> list[tuple[int, int, int]]:
  """Farthest-point sampling of the colours that stand out on a photograph: not dark, not grey."""
  steps = np.arange(0, 256, 17)
  rgb = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), axis=-1).reshape(-1, 3)
  lab = _lab(rgb)
  stands_out = (lab[:, 0] >= 30) & (np.hypot(lab[:, 1], lab[:, 2]) >= 30)
  rgb, lab = rgb[stands_out], lab[stands_out]
  chosen = [int(np.flatnonzero((rgb == [0, 255, 0]).all(axis=1))[0])]  # the original began green
  nearest = np.full(len(rgb), np.inf)
  while len(chosen) < min(count, len(rgb)):
    distance = np.linalg.norm(lab - lab[chosen[-1]], axis=1)
    nearest = np.minimum(nearest, np.round(distance, 3))  # rounded: the same on every machine
    chosen.append(int(np.argmax(nearest)))
  return [tuple(color) for color in rgb[chosen].tolist()]


def _lab(rgb: np.ndarray) -> np.ndarray:
  """CIE Lab (D65) of sRGB colours [n, 3] in 0..255; IEC 61966-2-1 and CIE 15."""
  c = rgb / 255
  linear = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
  to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
  xyz = linear @ to_xyz.T / [0.95047, 1.0, 1.08883]
  f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz * (29 / 6) ** 2 / 3 + 4 / 29)
  x, y, z = f.T
  return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=1)
