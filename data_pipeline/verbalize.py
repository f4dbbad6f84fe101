"""Describes pictures in words: the whole (captions) and every region (descriptions).

Downstream reads only the words, so every source ends in the same `Verbalization`. Scenes are
described from their graph with errors at a known rate; photographs from their annotations.
Describing with a captioning model is a callable that returns the same thing.
"""

import collections
from collections.abc import Sequence
import dataclasses

import numpy as np

from data_pipeline.records import DataError, ImageRecord, Verbalization
from data_pipeline.sources import scenes

# How a description names what tells the role.
HEADWEAR = {
  "chef": "tall white hat",
  "police officer": "blue cap",
  "firefighter": "red helmet",
  "builder": "orange helmet",
  "wizard": "pointed purple hat",
  "king": "gold crown",
  "cowboy": "brown wide hat",
  "archer": "green feathered hat",
}
PLACES = {
  "beach": "at the beach",
  "forest": "in the forest",
  "city": "in the city",
  "desert": "in the desert",
  "farm": "at the farm",
  "castle": "at the castle",
}


def article(noun: str) -> str:
  """The noun with "a" or "an": "an umbrella"."""
  return ("an " if noun[:1] in "aeiou" else "a ") + noun


def _wrong(rng, value, others, values):
  """A wrong value: half the time that of another figure of the picture, else any other value."""
  others = [v for v in others if v != value]
  pool = others if others and rng.random() < 0.5 else [v for v in values if v != value]
  return pool[int(rng.integers(len(pool)))]


def misread_scene(scene: scenes.Scene, rng: np.random.Generator, error_rate: float) -> scenes.Scene:
  """The scene as a careless reader sees it: every attribute is wrong with probability `error_rate`.

  One misreading stands behind all words about a picture, as one captioner's mistake would.
  """

  def read(value, others, values):
    return _wrong(rng, value, others, values) if rng.random() < error_rate else value

  figures = []
  for i, figure in enumerate(scene.figures):
    rest = scene.figures[:i] + scene.figures[i + 1 :]
    figures.append(
      dataclasses.replace(
        figure,
        role=read(figure.role, [f.role for f in rest], scenes.ROLES),
        thing=read(figure.thing, [f.thing for f in rest], scenes.THINGS),
        pose=read(figure.pose, [f.pose for f in rest], scenes.POSES),
      )
    )
  return scenes.Scene(
    read(scene.place, (), scenes.PLACES), read(scene.weather, (), scenes.WEATHERS), tuple(figures)
  )


def verbalize_scene(
  scene: scenes.Scene, rng: np.random.Generator | None, error_rate: float = 0.25
) -> Verbalization:
  """Words for a scene.

  Args:
    rng: draws the errors; not used when `error_rate` is 0.
    error_rate: probability that an attribute of a figure, the place or the weather is misread.

  Returns:
    A `Verbalization`: one description per figure, and two captions of the same content that go
    through the figures row by row.
  """
  seen = misread_scene(scene, rng, error_rate) if error_rate else scene
  local = {
    i: f"a figure in {article(HEADWEAR[f.role])}, holding {article(f.thing)}, {f.pose}"
    for i, f in enumerate(seen.figures)
  }
  people = sorted(seen.figures, key=lambda f: f.cell)
  captions = (
    f"a {seen.weather} {seen.place}: "
    + ", ".join(f"{HEADWEAR[f.role]} with {f.thing} {f.pose}" for f in people),
    f"{seen.weather} day {PLACES[seen.place]}: "
    + ", ".join(f"{f.pose} {HEADWEAR[f.role]} with {f.thing}" for f in people),
  )
  return Verbalization(captions=captions, local=local)


# ---- annotated photographs ----

_NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_PLURALS = {
  "person": "people",
  "sheep": "sheep",
  "skis": "skis",
  "scissors": "scissors",
  "mouse": "mice",
  "knife": "knives",
}


def _plural(noun):
  if noun in _PLURALS:
    return _PLURALS[noun]
  return noun + ("es" if noun.endswith(("s", "ch", "sh", "x")) else "s")


def _position(box, width):
  middle = (box[0] + box[2]) / 2 / width
  return "at the left" if middle < 1 / 3 else "at the right" if middle > 2 / 3 else "in the middle"


def _size(box, width, height):
  share = (box[2] - box[0]) * (box[3] - box[1]) / (width * height)
  return "large" if share > 0.2 else "small" if share < 0.02 else ""


def _gap(a, b):
  """Pixels between two boxes along the wider gap; 0 when they touch or overlap."""
  return max(a[0] - b[2], b[0] - a[2], a[1] - b[3], b[1] - a[3], 0.0)


def _neighbours(region, regions, reach):
  """Labels of other kinds within `reach` pixels, the nearest first, two at most."""
  near = [
    (_gap(region.box, r.box), r.id, r.label) for r in regions if r.id != region.id and r.label
  ]
  labels = [label for gap, _, label in sorted(near) if gap <= reach and label != region.label]
  return list(dict.fromkeys(labels))[:2]


def verbalize_annotations(record: ImageRecord, captions: Sequence[str] = ()) -> Verbalization:
  """Words for a picture whose regions carry labels, such as COCO's boxes.

  Args:
    record: an `ImageRecord` with its width and height known.
    captions: captions people wrote, taken over as they are.

  Returns:
    A `Verbalization`: "a large person at the left, next to a surfboard" for every labelled region,
    and after the given captions one that counts: "a picture with two people and a dog".
  """
  if not record.width or not record.height:
    raise DataError(
      f"{record.image}: width and height are needed to describe regions; read them from the image"
    )
  reach = 0.03 * max(record.width, record.height)
  local = {}
  for region in record.regions:
    if not region.label:
      continue
    size = _size(region.box, record.width, record.height)
    text = f"{article(f'{size} {region.label}'.strip())} {_position(region.box, record.width)}"
    near = _neighbours(region, record.regions, reach)
    local[region.id] = text + (", next to " + " and ".join(map(article, near)) if near else "")
  counts = collections.Counter(r.label for r in record.regions if r.label)
  parts = [
    article(label) if n == 1 else f"{_NUMBERS[n] if n < len(_NUMBERS) else 'many'} {_plural(label)}"
    for label, n in counts.items()
  ]
  if parts:
    listed = parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]
    captions = (*captions, f"a picture with {listed}")
  return Verbalization(captions=tuple(captions), local=local)


def verbalize(record: ImageRecord, seed: int = 0, error_rate: float = 0.25) -> ImageRecord:
  """The record with its verbalization: of its scene graph if it has one, else of its annotations.

  Captions that the source gave are kept. The errors depend on (seed, image id) alone.
  """
  if "scene" in record.extra:
    rng = np.random.default_rng([seed, record.image_id])
    words = verbalize_scene(scenes.scene_from_dict(record.extra["scene"]), rng, error_rate)
  else:
    words = verbalize_annotations(record, record.verbalization.captions)
  return dataclasses.replace(record, verbalization=words)
