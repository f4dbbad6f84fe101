"""Paints scenes: figures in a place with weather, 96 x 96 pixels.

A figure's shapes are fitted into its box, so a box in a scene is exactly what is painted.
Everything is painted four times too large and averaged down, which is what makes the edges soft.
"""

import functools

import numpy as np
from PIL import Image, ImageDraw

from data_pipeline.sources import scene_figures

SIZE = 96
ZOOM = 4
WHITE = (255, 255, 255)


@functools.cache
def _packed(role, thing, pose):
  """Coordinates of all shapes as one float64[points, 2], and where each shape's points end."""
  shapes = scene_figures.figure_shapes(role, thing, pose)
  points = np.array([p for _, points, _, _ in shapes for p in points])
  return shapes, points


def _paint(pen, shapes, points, colors, scale):
  """Paints shapes whose points (already in zoomed pixels) follow one another in `points`."""
  start = 0
  for kind, own, fill, width in shapes:
    xy = points[start : start + len(own)]
    start += len(own)
    fill = colors.get(fill, fill) if isinstance(fill, str) else fill
    if kind == "oval":
      pen.ellipse((*xy[0], *xy[1]), fill=fill)
    elif kind == "rect":
      pen.rectangle((*xy[0], *xy[1]), fill=fill)
    elif kind == "poly":
      pen.polygon([tuple(p) for p in xy], fill=fill)
    else:
      w = width * scale
      pen.line([tuple(p) for p in xy], fill=fill, width=max(1, round(w)))
      if w > 4:
        r = w / 2 - 0.5
        for x, y in xy:
          pen.ellipse((x - r, y - r, x + r, y + r), fill=fill)


def draw_figure(pen, figure):
  """Paints `figure` into its box on a canvas that is `ZOOM` times larger than the scene."""
  shapes, points = _packed(figure.role, figure.thing, figure.pose)
  x1, y1, x2, y2 = scene_figures.figure_extent(figure.role, figure.thing, figure.pose)
  scale = (figure.box[3] - figure.box[1]) / (y2 - y1)
  placed = (points - (x1, y1)) * scale + figure.box[:2]
  shirt, skin = scene_figures.SHIRTS[figure.shirt], scene_figures.SKINS[figure.skin]
  colors = {
    "shirt": shirt,
    "sleeve": tuple(int(c * 0.86) for c in shirt),
    "skin": skin,
    "blush": (skin[0], int(skin[1] * 0.82), int(skin[2] * 0.82)),
  }
  _paint(pen, shapes, (placed * ZOOM).tolist(), colors, scale * ZOOM)


# ---- places and weather ----

HORIZON = 30

_SKIES = {  # top, horizon
  "sunny": ((92, 178, 246), (206, 236, 255)),
  "rainy": ((92, 102, 124), (156, 166, 182)),
  "snowy": ((176, 178, 214), (232, 230, 246)),
}
_GROUNDS = {  # far, near
  "beach": ((250, 226, 160), (236, 200, 130)),
  "forest": ((110, 176, 84), (72, 140, 62)),
  "city": ((178, 178, 186), (140, 140, 152)),
  "desert": ((240, 176, 104), (220, 138, 76)),
  "farm": ((190, 158, 78), (160, 112, 62)),
  "castle": ((200, 182, 214), (164, 146, 186)),
}


def _gradient(top, bottom, rows):
  mix = np.linspace(0, 1, rows)[:, None]
  return np.array(top) * (1 - mix) + np.array(bottom) * mix


@functools.cache
def _backdrop(place, weather):
  """Sky and ground of a place, zoomed, without anything that varies from picture to picture."""
  sky = _gradient(*_SKIES[weather], HORIZON * ZOOM)
  ground = _gradient(*_GROUNDS[place], (SIZE - HORIZON) * ZOOM)
  if weather == "rainy":
    ground = ground * 0.82 + np.array((60, 70, 96)) * 0.12
  elif weather == "snowy":
    ground = ground * 0.72 + np.array((255, 255, 255)) * 0.28
  column = np.concatenate([sky, ground]).clip(0, 255).astype(np.uint8)
  return Image.fromarray(np.repeat(column[:, None], SIZE * ZOOM, 1))


def _boxes(pen, rects):
  for x1, y1, x2, y2, fill in rects:
    pen.rectangle((x1 * ZOOM, y1 * ZOOM, x2 * ZOOM, y2 * ZOOM), fill=fill)


def _blob(pen, x, y, rx, ry, fill):
  pen.ellipse(((x - rx) * ZOOM, (y - ry) * ZOOM, (x + rx) * ZOOM, (y + ry) * ZOOM), fill=fill)


def _shape(pen, points, fill):
  pen.polygon([(x * ZOOM, y * ZOOM) for x, y in points], fill=fill)


def _beach(pen, rng, shift):
  _boxes(
    pen,
    [
      (0, 24, SIZE, 33, (40, 140, 190)),
      (0, 29, SIZE, 30, (120, 200, 226)),
      (0, 33, SIZE, 34.4, (240, 250, 252)),
    ],
  )
  x = 20 + shift
  _shape(pen, [(x - 7, 24), (x + 7, 24), (x + 4, 27.4), (x - 4, 27.4)], (170, 70, 50))
  _shape(pen, [(x - 0.6, 23.4), (x - 0.6, 10), (x + 8, 22)], WHITE)
  _shape(pen, [(x - 1.6, 22), (x - 1.6, 12), (x - 6, 22)], (250, 210, 120))
  for x, y in rng.uniform((4, 40), (92, 94), (4, 2)):
    _blob(pen, x, y, 1.6, 1.0, (250, 238, 214))


def _forest(pen, rng, shift):
  for k, x in enumerate(np.arange(-2, 104, 12) + shift * 0.5):
    h = 15 + 5 * ((k * 7) % 3)
    green = ((28, 96, 58), (44, 122, 66), (20, 80, 52))[k % 3]
    _boxes(pen, [(x - 1, 30, x + 1, 34, (104, 70, 44))])
    _shape(pen, [(x - 7, 31), (x, 31 - h * 0.75), (x + 7, 31)], green)
    _shape(pen, [(x - 5, 24), (x, 31 - h - 4), (x + 5, 24)], green)
  for x, y in rng.uniform((4, 40), (92, 94), (3, 2)):
    _boxes(pen, [(x - 0.7, y, x + 0.7, y + 2.4, (240, 226, 206))])
    _shape(
      pen,
      [(x - 2.4, y + 0.6), (x - 1.4, y - 1.4), (x + 1.4, y - 1.4), (x + 2.4, y + 0.6)],
      (206, 60, 50),
    )


def _city(pen, rng, shift):
  x = -6 + shift * 0.5
  for k in range(8):
    h, w = (14, 24, 18, 27, 12, 22, 16, 25)[k], 13
    wall = ((96, 108, 140), (124, 116, 146), (84, 96, 122), (140, 128, 140))[k % 4]
    _boxes(pen, [(x, 31 - h, x + w, 32, wall)])
    lit = (255, 226, 130) if k % 3 else (190, 214, 236)
    _boxes(
      pen,
      [
        (x + 2.5 + 4.6 * i, 34 - h + 5 * j, x + 5 + 4.6 * i, 36 - h + 5 * j, lit)
        for i in range(2)
        for j in range((h - 4) // 5)
      ],
    )
    x += w + 1
  _boxes(pen, [(0, 32, SIZE, 33.6, (120, 118, 130))])
  for x in np.arange(4, 96, 22) + shift:
    _boxes(pen, [(x, 62, x + 10, 63.6, (236, 232, 220))])


def _desert(pen, rng, shift):
  _shape(pen, [(0, 30), (0, 22), (20 + shift, 15), (52 + shift, 30)], (226, 150, 90))
  _shape(pen, [(40 + shift, 30), (74 + shift, 18), (110, 27), (110, 30)], (232, 162, 98))
  for x, h in ((12 - shift, 15), (64 - shift, 12)):
    green = (60, 132, 78)
    _boxes(
      pen,
      [
        (x - 1.8, 34 - h, x + 1.8, 35, green),
        (x - 6, 30 - h * 0.4, x, 32.4 - h * 0.4, green),
        (x - 6, 26 - h * 0.4, x - 3.8, 31 - h * 0.4, green),
        (x, 28.6 - h * 0.4, x + 5.6, 30.8 - h * 0.4, green),
        (x + 3.4, 24.6 - h * 0.4, x + 5.6, 30 - h * 0.4, green),
      ],
    )
    _blob(pen, x, 34 - h, 1.8, 1.8, green)
  for x, y in rng.uniform((4, 42), (92, 94), (3, 2)):
    _blob(pen, x, y, 2.4, 1.3, (190, 112, 70))


def _farm(pen, rng, shift):
  x = 62 + shift
  _boxes(
    pen,
    [
      (x, 17, x + 24, 32, (186, 46, 44)),
      (x + 8, 22, x + 16, 32, WHITE),
      (x + 9, 23, x + 15, 32, (140, 30, 32)),
    ],
  )
  _shape(pen, [(x - 2, 17.6), (x + 4, 9.6), (x + 20, 9.6), (x + 26, 17.6)], (112, 70, 62))
  for x in np.arange(-4, 58, 7) + shift * 0.5:
    _boxes(pen, [(x, 25, x + 1.8, 33, (244, 236, 222))])
  _boxes(
    pen, [(0, 27, 58 + shift, 28.4, (244, 236, 222)), (0, 30, 58 + shift, 31.4, (244, 236, 222))]
  )
  for y in (44, 54, 64, 74, 84, 93):
    _boxes(pen, [(0, y, SIZE, y + 1.6, (126, 84, 48))])


def _castle(pen, rng, shift):
  stone, dark = (136, 124, 158), (108, 96, 132)
  _boxes(
    pen, [(0, 20, SIZE, 32, stone)] + [(x, 16.6, x + 4, 20, stone) for x in np.arange(-2, 98, 8)]
  )
  for x in (8 + shift, 74 + shift):
    _boxes(pen, [(x, 9, x + 13, 32, dark), (x + 5, 15, x + 8, 20, (44, 36, 66))])
    _boxes(pen, [(x + d, 6, x + d + 3, 9, dark) for d in (0, 5, 10)])
    _boxes(pen, [(x + 6, 0.6, x + 6.8, 8, (70, 60, 80))])
    _shape(pen, [(x + 6.8, 0.8), (x + 12.4, 2.6), (x + 6.8, 4.6)], (226, 60, 110))
  x = 46 + shift
  _blob(pen, x, 25, 5, 5, (74, 50, 52))
  _boxes(pen, [(x - 5, 25, x + 5, 32, (74, 50, 52))])
  for y in (46, 62, 78, 92):
    _boxes(pen, [(0, y, SIZE, y + 0.8, (150, 132, 172))])


_MOTIFS = {
  "beach": _beach,
  "forest": _forest,
  "city": _city,
  "desert": _desert,
  "farm": _farm,
  "castle": _castle,
}


def _cloud(pen, x, y, size, fill):
  for dx, dy, r in ((-4, 0.6, 2.6), (0, -0.8, 3.6), (4.2, 0.6, 2.8)):
    _blob(pen, x + dx * size, y + dy * size, r * 1.2 * size, r * 0.8 * size, fill)


def _sky(pen, weather, rng):
  x1, x2 = rng.uniform(8, 44), rng.uniform(52, 88)
  if weather == "sunny":
    x = rng.uniform(36, 60)
    _blob(pen, x, 8, 7.4, 7.4, (255, 240, 170))
    _blob(pen, x, 8, 5.6, 5.6, (255, 214, 60))
    _cloud(pen, x1 - 6, 8, 0.8, WHITE)
    _cloud(pen, x2 + 6, 12, 0.9, WHITE)
  else:
    fill = (74, 82, 102) if weather == "rainy" else (246, 246, 252)
    _cloud(pen, x1, 5, 1.5, fill)
    _cloud(pen, x2, 7, 1.6, fill)


def _weather(pen, weather, rng):
  """What falls in front of everything."""
  if weather == "rainy":
    for x, y in (rng.uniform(0, SIZE, (60, 2)) * ZOOM).tolist():
      pen.line((x, y, x - 1.4 * ZOOM, y + 4.6 * ZOOM), fill=(190, 214, 250), width=2)
  elif weather == "snowy":
    for x, y in (rng.uniform(0, SIZE, (54, 2)) * ZOOM).tolist():
      pen.ellipse((x - 3.4, y - 3.4, x + 3.4, y + 3.4), fill=WHITE)


def draw(place, weather, figures, rng):
  """Paints a scene.

  `figures` are painted far to near (by the lower edge of their boxes); `rng` moves clouds, motifs,
  pebbles and raindrops about. Returns an RGB image of `SIZE` x `SIZE` pixels.
  """
  canvas = _backdrop(place, weather).copy()
  pen = ImageDraw.Draw(canvas)
  _sky(pen, weather, rng)
  _MOTIFS[place](pen, rng, rng.uniform(-5, 5))
  for figure in sorted(figures, key=lambda figure: figure.box[3]):
    draw_figure(pen, figure)
  _weather(pen, weather, rng)
  return canvas.reduce(ZOOM)
