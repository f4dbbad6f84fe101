"""Procedural scenes: pictures of little people whose every fact is known.

A scene is a place, the weather, and three to six figures, each with a role (told by the headwear),
a thing in the hand and a pose. The scene graph is the truth that verbalizations, statements,
judgements and questions are measured against. A figure's region id is its position in
`Scene.figures`; figures stand in random cells, so an id says nothing about where a figure is.
"""

import dataclasses
from dataclasses import dataclass
import hashlib
import json

import numpy as np
from PIL import Image

from data_pipeline.records import DataError, ImageRecord, Region
from data_pipeline.sources import scene_drawing, scene_figures

SIZE = scene_drawing.SIZE
ROWS, COLUMNS = 2, 3

ROLES = ("chef", "police officer", "firefighter", "builder", "wizard", "king", "cowboy", "archer")
THINGS = ("umbrella", "ball", "book", "balloon", "phone", "cup", "flower", "sword", "fish", "broom")
POSES = ("standing", "waving", "cheering", "running", "sitting")
PLACES = ("beach", "forest", "city", "desert", "farm", "castle")
WEATHERS = ("sunny", "rainy", "snowy")
SHIRTS = tuple(scene_figures.SHIRTS)
SKINS = tuple(scene_figures.SKINS)

# What a figure in this pose does to another one.
RELATIONS = {
  "standing": "waits for",
  "waving": "greets",
  "cheering": "cheers for",
  "running": "runs to",
  "sitting": "rests near",
}


@dataclass(frozen=True)
class Figure:
  """One person. `box` is xyxy in pixels, tight around body and thing; `cell` is 0..5 by rows."""

  role: str
  thing: str
  pose: str
  shirt: str
  skin: str
  box: tuple[float, float, float, float]
  cell: int


@dataclass(frozen=True)
class Scene:
  """A place, the weather and its figures; figure i is region i."""

  place: str
  weather: str
  figures: tuple[Figure, ...]


def relation(scene: Scene, i: int, j: int) -> tuple[str, str]:
  """What figure `i` does to figure `j`, such as ("greets", "chef")."""
  return RELATIONS[scene.figures[i].pose], scene.figures[j].role


def _pick(rng, values):
  return values[int(rng.integers(len(values)))]


def _place_figure(rng, role, thing, pose, cell):
  """A box in the cell, inside the image: x +-1.5 px, y 0..4.5 px, scale 0.88..0.98 at random."""
  x1, y1, x2, y2 = scene_figures.figure_extent(role, thing, pose)
  scale = rng.uniform(0.88, 0.98)
  row, column = divmod(cell, COLUMNS)
  width, height = (x2 - x1) * scale, (y2 - y1) * scale
  left = SIZE / COLUMNS * (column + 0.5) + rng.uniform(-1.5, 1.5) - width / 2
  top = SIZE / ROWS * (row + 1) - rng.uniform(1.5, 6) + y1 * scale
  left = min(max(left, 0.0), SIZE - width)
  top = min(max(top, 0.0), SIZE - height)
  return tuple(round(v, 2) for v in (left, top, min(left + width, SIZE), min(top + height, SIZE)))


def sample_scene(rng: np.random.Generator, figures: tuple[int, int] = (3, 6)) -> Scene:
  """A random scene of `figures` = (fewest, most) figures; all attributes are independent."""
  if not 1 <= figures[0] <= figures[1] <= ROWS * COLUMNS:
    raise DataError(f"figures={figures}: give (fewest, most) within 1..{ROWS * COLUMNS}")
  count = int(rng.integers(figures[0], figures[1] + 1))
  people = []
  for cell in rng.permutation(ROWS * COLUMNS)[:count].tolist():
    role, thing, pose = _pick(rng, ROLES), _pick(rng, THINGS), _pick(rng, POSES)
    people.append(
      Figure(
        role,
        thing,
        pose,
        _pick(rng, SHIRTS),
        _pick(rng, SKINS),
        _place_figure(rng, role, thing, pose, cell),
        cell,
      )
    )
  return Scene(_pick(rng, PLACES), _pick(rng, WEATHERS), tuple(people))


def draw_scene(scene: Scene, rng: np.random.Generator) -> Image.Image:
  """The scene as an RGB image of 96 x 96 pixels; `rng` varies only what is not in the graph."""
  return scene_drawing.draw(scene.place, scene.weather, scene.figures, rng)


def scene_to_dict(scene: Scene) -> dict:
  """The scene as plain JSON values."""
  return json.loads(json.dumps(dataclasses.asdict(scene)))


def scene_from_dict(values: dict) -> Scene:
  """The inverse of `scene_to_dict`."""
  figures = tuple(Figure(**{**f, "box": tuple(f["box"])}) for f in values["figures"])
  return Scene(values["place"], values["weather"], figures)


def scene_key(scene: Scene) -> str:
  """A hash of what the picture shows: place, weather, and the figures' facts in any order."""
  people = sorted((f.role, f.thing, f.pose) for f in scene.figures)
  return hashlib.sha256(json.dumps([scene.place, scene.weather, people]).encode()).hexdigest()[:16]


def make_scene(seed: int, i: int, exclude=frozenset(), min_figures=3, max_figures=6) -> Scene:
  """Scene i of a seed: made from (seed, i) alone, its key in `exclude` never."""
  rng = np.random.default_rng([seed, i])
  scene = sample_scene(rng, (min_figures, max_figures))
  while scene_key(scene) in exclude:
    scene = sample_scene(rng, (min_figures, max_figures))
  return scene


def iter_scenes(seed, count, exclude=(), min_figures=3, max_figures=6):
  """Yields `count` scenes, the i-th made from (seed, i) alone; none has its key in `exclude`."""
  exclude = frozenset(exclude)
  for i in range(count):
    yield make_scene(seed, i, exclude, min_figures, max_figures)


def scene_record(scene: Scene, image: str, image_id: int, split: str = "train") -> ImageRecord:
  """The record of a scene: one region per figure, the graph in `extra["scene"]`, no texts yet."""
  regions = tuple(Region(i, f.box, "figure") for i, f in enumerate(scene.figures))
  return ImageRecord(
    image, image_id, SIZE, SIZE, regions, split=split, extra={"scene": scene_to_dict(scene)}
  )


def picture(seed: int, i: int, scene: Scene) -> Image.Image:
  """The picture of scene i of a seed."""
  return draw_scene(scene, np.random.default_rng([seed, i, 1]))


def scene_records(seed, count, exclude=(), min_figures=3, max_figures=6, split="train", first_id=0):
  """Yields `count` (record, picture) pairs, the i-th made from (seed, i) alone.

  Record i is named scenes/{seed}-{i:06d}.png and has image id `first_id` + i. The pictures are not
  stored; the other arguments are those of `iter_scenes`.
  """
  for i, scene in enumerate(iter_scenes(seed, count, exclude, min_figures, max_figures)):
    yield scene_record(scene, image_name(seed, i), first_id + i, split), picture(seed, i, scene)


def image_name(seed: int, i: int) -> str:
  """Where the picture of scene i of a seed lies below its image root."""
  return f"scenes/{seed}-{i:06d}.png"
