"""What the little people in scenes look like: hats, things, poses, each a list of shapes.

Shapes live in the figure's own frame: 1 unit is 1 pixel at scale 1, the origin lies between the
feet, x grows to the right and y downwards. A shape is (kind, points, fill, width) with the kinds
"line" (a polyline with round ends), "poly", "oval" and "rect" (two corners). A fill is a colour, or
the name of a colour that differs from figure to figure: shirt, sleeve, skin, blush.
"""

import functools
import math

import numpy as np

INK = (52, 44, 66)
WHITE = (255, 255, 255)
TROUSERS = (58, 62, 92)
SHOES = (44, 38, 46)
GOLD = (255, 218, 56)
SHADOW, DUST, SEAM = (96, 92, 110), (238, 232, 224), (150, 160, 190)

SHIRTS = {
  "rose": (226, 112, 128),
  "teal": (58, 160, 158),
  "lilac": (160, 132, 208),
  "sky": (98, 160, 226),
  "mint": (134, 198, 140),
  "plum": (132, 82, 122),
  "cream": (240, 226, 190),
  "slate": (112, 124, 146),
}
SKINS = {"light": (250, 214, 184), "tan": (222, 168, 122), "brown": (150, 100, 70)}


def _line(points, fill, width):
  return ("line", points, fill, width)


def _poly(points, fill):
  return ("poly", points, fill, 0)


def _oval(x, y, rx, ry, fill):
  return ("oval", ((x - rx, y - ry), (x + rx, y + ry)), fill, 0)


def _rect(x1, y1, x2, y2, fill):
  return ("rect", ((x1, y1), (x2, y2)), fill, 0)


def _dome(x, y, rx, ry, fill):
  """The upper half of an ellipse."""
  angles = np.linspace(0, math.pi, 13)
  return _poly(tuple((x + rx * math.cos(a), y - ry * math.sin(a)) for a in angles), fill)


def _moved(shapes, dx, dy):
  return [(k, tuple((x + dx, y + dy) for x, y in points), f, w) for k, points, f, w in shapes]


# ---- headwear: the origin is where the hat meets the top of the head ----

_HEADWEAR = {
  "chef": [
    _oval(-4.4, -7.6, 4.8, 4.7, SEAM),
    _oval(4.4, -7.6, 4.8, 4.7, SEAM),
    _oval(0, -9.3, 5.4, 5.0, SEAM),
    _rect(-5.7, -6, 5.7, 1.6, SEAM),
    _oval(-4.2, -7.6, 4.2, 4.0, WHITE),
    _oval(4.2, -7.6, 4.2, 4.0, WHITE),
    _oval(0, -9.2, 4.8, 4.4, WHITE),
    _rect(-5, -6.5, 5, 1.2, WHITE),
    _line(((-2, -2.5), (-2, -6.5)), (206, 212, 226), 0.7),
    _line(((2, -2.5), (2, -6.5)), (206, 212, 226), 0.7),
    _rect(-5.2, -1.4, 5.2, 1.2, (226, 230, 240)),
  ],
  "police officer": [
    _poly(((-8, -7.5), (8, -7.5), (5.6, -1.5), (-5.6, -1.5)), (28, 46, 124)),
    _oval(0, -7.4, 8, 2.4, (40, 62, 152)),
    _rect(-5.6, -2.6, 5.6, 0.6, (18, 26, 66)),
    _oval(0, 0.6, 7, 1.5, (18, 22, 44)),
    _oval(0, -4.4, 1.9, 2.0, GOLD),
  ],
  "firefighter": [
    _dome(0, -1.0, 6.6, 8.6, (216, 30, 38)),
    _rect(-1.4, -10.6, 1.4, -3, (160, 12, 26)),
    _poly(((-9.5, 1.8), (-7, -1.6), (7, -1.6), (9.5, 1.8)), (188, 18, 30)),
    _poly(((-2.8, -6.2), (2.8, -6.2), (2.2, -1.4), (0, 0), (-2.2, -1.4)), (255, 214, 70)),
  ],
  "builder": [
    _dome(0, 0.4, 6.8, 9.0, (255, 122, 0)),
    _rect(-1.5, -9.4, 1.5, -1, (255, 160, 50)),
    _oval(-3.8, -3.8, 0.8, 2.8, (206, 88, 0)),
    _oval(3.8, -3.8, 0.8, 2.8, (206, 88, 0)),
    _rect(-7.8, -1.0, 7.8, 1.4, (206, 88, 0)),
  ],
  "wizard": [
    _poly(((-6.4, 0.6), (-1.6, -8.6), (2.2, -14), (3.4, -8), (6.4, 0.6)), (112, 46, 184)),
    _oval(0, 0.3, 8.6, 2.2, (86, 28, 150)),
    _oval(0.8, -7.6, 1.1, 1.1, GOLD),
    _oval(-2.2, -3.2, 1.1, 1.1, GOLD),
    _oval(2.8, -3.4, 0.9, 0.9, WHITE),
  ],
  "king": [
    _poly(
      ((-6.4, 1.4), (-7.6, -8.2), (-3.4, -3.8), (0, -10), (3.4, -3.8), (7.6, -8.2), (6.4, 1.4)),
      GOLD,
    ),
    _rect(-6.4, -0.8, 6.4, 1.4, (236, 184, 30)),
    _oval(0, -9.6, 1.5, 1.5, (226, 44, 70)),
    _oval(-7.4, -8.2, 1.4, 1.4, (60, 120, 230)),
    _oval(7.4, -8.2, 1.4, 1.4, (60, 120, 230)),
    _oval(0, -2.0, 1.3, 1.3, (226, 44, 70)),
  ],
  "cowboy": [
    _poly(
      ((-5.2, 0.5), (-5, -7.2), (-2.4, -8.8), (0, -7.2), (2.4, -8.8), (5, -7.2), (5.2, 0.5)),
      (138, 84, 42),
    ),
    _poly(
      ((-11.5, -3.4), (-8, 0.4), (8, 0.4), (11.5, -3.4), (9, 2), (0, 2.8), (-9, 2)), (112, 66, 30)
    ),
    _rect(-5.2, -1.8, 5.2, 0.2, (226, 190, 120)),
  ],
  "archer": [
    _poly(((-8.2, 1.6), (-5.4, -4.6), (0, -7), (5.4, -3.4), (11, 0.6), (4, 1.8)), (44, 150, 62)),
    _poly(((-8.2, 1.6), (-7.4, -0.6), (5, -0.4), (11, 0.6), (4, 1.8)), (24, 112, 44)),
    _line(((-4.4, -2.6), (-7.2, -7.6), (-8.6, -11.6)), (232, 60, 60), 2.2),
  ],
}

# ---- things: the origin is the hand ----

_THINGS = {
  "umbrella": [
    _line(((0, 3), (0, -9)), (80, 60, 70), 1.3),
    _line(((0, 3), (1.4, 4.4), (2.6, 3)), (80, 60, 70), 1.3),
    _poly(
      (
        (-7, -5.4),
        (-6, -9),
        (-3, -11.6),
        (0, -12.4),
        (3, -11.6),
        (6, -9),
        (7, -5.4),
        (4.6, -6.8),
        (2.3, -5.4),
        (0, -6.8),
        (-2.3, -5.4),
        (-4.6, -6.8),
      ),
      (240, 70, 160),
    ),
    _poly(
      ((-2.3, -5.4), (-1.6, -9), (0, -12.4), (1.6, -9), (2.3, -5.4), (0, -6.8)), (255, 176, 216)
    ),
  ],
  "ball": [
    _oval(0.5, -1, 6, 6, (244, 122, 34)),
    _line(((-5.2, -1), (6.2, -1)), (110, 52, 20), 0.9),
    _line(((0.5, -6.6), (0.5, 4.6)), (110, 52, 20), 0.9),
    _oval(-1.6, -3.6, 1.2, 1.0, (255, 196, 140)),
  ],
  "book": [
    _poly(((-6.4, -5.4), (0, -3.8), (6.8, -5.4), (6.8, 4), (0, 5.4), (-6.4, 4)), (36, 96, 206)),
    _poly(((-5.2, -6), (0, -4.4), (0, 3.6), (-5.2, 2.4)), WHITE),
    _poly(((5.6, -6), (0, -4.4), (0, 3.6), (5.6, 2.4)), (232, 236, 246)),
    _line(((-3.8, -3), (-1.4, -2.3)), (150, 156, 180), 0.7),
    _line(((-3.8, -0.6), (-1.4, 0.1)), (150, 156, 180), 0.7),
    _line(((3.9, -3), (1.5, -2.3)), (150, 156, 180), 0.7),
    _line(((3.9, -0.6), (1.5, 0.1)), (150, 156, 180), 0.7),
  ],
  "balloon": [
    _line(((0, 2), (0.8, -2), (0.4, -4)), (90, 84, 100), 0.8),
    _oval(0.6, -9.4, 4.8, 5.6, (224, 24, 52)),
    _poly(((0.6, -4.6), (-0.9, -3), (2.1, -3)), (224, 24, 52)),
    _oval(-1.0, -11.6, 1.2, 1.8, (255, 160, 170)),
  ],
  "phone": [
    _rect(-4.2, -9, 4.4, 4.4, (26, 26, 34)),
    _rect(-2.9, -7.2, 3.1, 1.6, (96, 226, 240)),
    _oval(0.1, 3.0, 0.8, 0.8, (190, 196, 206)),
  ],
  "cup": [
    _oval(5, -0.6, 2.9, 3.1, (96, 168, 30)),
    _oval(5, -0.6, 1.4, 1.6, (224, 240, 236)),
    _rect(-4.6, -4.6, 4.4, 4.6, (132, 206, 48)),
    _rect(-4.6, -1.6, 4.4, 1.0, WHITE),
    _oval(-0.1, -4.6, 4.6, 1.4, (104, 62, 40)),
    _line(((-1.8, -6.6), (-1, -8), (-1.8, -9.4)), WHITE, 0.9),
    _line(((1.6, -6.6), (2.4, -8), (1.6, -9.4)), WHITE, 0.9),
  ],
  "flower": [
    _line(((0, 4.5), (0.6, -4)), (40, 140, 60), 1.6),
    _poly(((0.2, 2), (4.6, -1.6), (4.4, 1.8)), (60, 170, 76)),
    *[
      _oval(0.7 + 3.4 * math.cos(a), -7.4 + 3.4 * math.sin(a), 2.5, 2.5, (255, 236, 70))
      for a in np.arange(6) * math.pi / 3
    ],
    _oval(0.7, -7.4, 2.3, 2.3, (150, 84, 30)),
  ],
  "sword": [
    _poly(((-2.9, -2.4), (-2.9, -11.6), (0, -15), (2.9, -11.6), (2.9, -2.4)), (96, 106, 134)),
    _poly(((-2.1, -2.4), (-2.1, -11.4), (0, -13.8), (2.1, -11.4), (2.1, -2.4)), (224, 232, 244)),
    _line(((0, -2.6), (0, -11.6)), (150, 162, 184), 0.8),
    _rect(-5, -3.2, 5, -0.6, (210, 150, 30)),
    _line(((0, -0.8), (0, 3)), (104, 60, 34), 2.2),
    _oval(0, 4, 1.6, 1.6, (210, 150, 30)),
  ],
  "fish": [
    _oval(-0.4, -1, 5.4, 3.7, (44, 168, 226)),
    _poly(((3.8, -1), (8.4, -5), (8.4, 3)), (22, 122, 190)),
    _poly(((-2, -4), (1, -7), (3, -3.6)), (22, 122, 190)),
    _oval(-1, 0.6, 3.8, 1.7, (176, 230, 250)),
    _oval(-3.2, -2, 1.2, 1.2, WHITE),
    _oval(-3.3, -2, 0.6, 0.6, INK),
  ],
  "broom": [
    _line(((-0.6, -12), (0.8, 3)), (126, 78, 40), 2.2),
    _rect(-2.4, 0.6, 4, 2.8, (196, 40, 50)),
    _poly(((-2.2, 2.6), (3.8, 2.6), (6.6, 9.2), (-4.6, 9.2)), (240, 200, 100)),
    _line(((-0.2, 4), (-1.4, 9)), (180, 134, 50), 0.8),
    _line(((1.8, 4), (3, 9)), (180, 134, 50), 0.8),
  ],
}

# ---- poses: (hip height, lean of the shoulders, legs, left arm, right arm) ----
# The right hand (the viewer's right) always holds the thing.


def _body(pose):
  """The shapes below the head, where the head goes, and where the right hand is."""
  if pose == "standing":
    hip, lean = -9.0, 0
    legs = [((-4.2, -9), (-4.4, -1.2)), ((0.2, -9), (0.4, -1.2))]
    left, hand = ((-7, -17), (-8.6, -12.8), (-8.8, -8.8)), (8.4, -12.6)
    right = ((3, -17), (5.2, -13), hand)
  elif pose == "waving":
    hip, lean = -9.0, -1.0
    legs = [((-4.2, -9), (-7, -1.2)), ((0.2, -9), (3, -1.2))]
    left, hand = ((-8, -16.6), (-13, -18.6), (-14.4, -28.4)), (8.4, -12.6)
    right = ((3, -17), (5.2, -13), hand)
  elif pose == "cheering":
    hip, lean = -11.0, 0
    legs = [((-4.2, -11), (-8, -7.5), (-12, -4)), ((0.2, -11), (4, -7.5), (8, -4))]
    left, hand = ((-7, -19), (-11.4, -23), (-13.4, -31)), (10.4, -29)
    right = ((3, -19), (7.4, -22), hand)
  elif pose == "running":
    hip, lean = -10.0, 3.2
    legs = [((-4.2, -10), (-8.4, -6), (-14.4, -7.6)), ((0.2, -10), (7.2, -7.4), (6.4, -1.2))]
    left, hand = ((-4, -18), (-10, -16.4), (-12.6, -20.4)), (11.4, -14)
    right = ((6, -18), (8.4, -14), hand)
  else:
    hip, lean = -2.6, 0
    legs = [((-3, -3.2), (-9, -5.2), (-13.6, -2.2)), ((0, -2), (-6, -1.6), (-12, -1.6))]
    left, hand = ((-7, -10.4), (-10, -8.6), (-9.6, -6)), (8.4, -6.6)
    right = ((3, -10.4), (5.4, -7), hand)
  shoulder = hip - 9.4
  shapes = []
  if pose == "cheering":
    shapes.append(_oval(-2, -0.4, 8, 1.3, SHADOW))
  elif pose == "running":
    shapes += [_oval(-12.6, -1.4, 2.2, 1.6, DUST), _oval(-8.6, -1.0, 1.5, 1.1, DUST)]
  for leg in legs:
    shapes.append(_line(leg, TROUSERS, 3.6))
    x, y = leg[-1]
    if pose == "sitting":
      shapes.append(_oval(x - 1.2, y - 1.0, 1.6, 2.8, SHOES))
    else:
      shapes.append(_oval(x + (1 if pose == "running" else -1), y + 0.3, 2.6, 1.6, SHOES))
  shapes.append(_line(left, "sleeve", 3.4))
  r = 2.6 if pose == "waving" else 2.1
  shapes.append(_oval(left[-1][0], left[-1][1], r, r, "skin"))
  shapes.append(
    _poly(
      (
        (-6.6, hip + 1),
        (2.6, hip + 1),
        (3.6 + lean, shoulder + 1.6),
        (1.6 + lean, shoulder),
        (-5.6 + lean, shoulder),
        (-7.6 + lean, shoulder + 1.6),
      ),
      "shirt",
    )
  )
  shapes.append(_line(right, "sleeve", 3.4))
  return shapes, (-2 + lean * 1.2, shoulder - 3.8), hand


def _head(x, y):
  return [
    _oval(x, y, 5.2, 5.0, "skin"),
    _oval(x - 3.3, y + 1.6, 1.1, 0.8, "blush"),
    _oval(x + 3.3, y + 1.6, 1.1, 0.8, "blush"),
    _oval(x - 1.9, y + 0.2, 0.75, 0.95, INK),
    _oval(x + 1.9, y + 0.2, 0.75, 0.95, INK),
    _line(((x - 1.5, y + 2.4), (x, y + 3.1), (x + 1.5, y + 2.4)), (150, 60, 60), 0.8),
  ]


@functools.cache
def figure_shapes(role, thing, pose):
  """The shapes of one figure, back to front."""
  shapes, head, hand = _body(pose)
  shapes += _head(*head)
  shapes += _moved(_HEADWEAR[role], head[0], head[1] - 4.2)
  shapes += _moved(_THINGS[thing], hand[0] + 1.4, hand[1])
  shapes.append(_oval(hand[0], hand[1], 1.8, 1.8, "skin"))
  return tuple(shapes)


@functools.cache
def figure_extent(role, thing, pose):
  """The tight box (x1, y1, x2, y2) of a figure and its thing in the figure's own frame, scale 1."""
  low, high = [], []
  for _, points, _, width in figure_shapes(role, thing, pose):
    points = np.array(points)
    low.append(points.min(0) - width / 2)
    high.append(points.max(0) + width / 2)
  return (*np.min(low, 0).tolist(), *np.max(high, 0).tolist())
