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
SEAM = (150, 160, 190)
SHADOW = (62, 54, 88)
DUST, DUST_RIM = (255, 232, 190), (176, 124, 76)
STAR, STAR_RIM = (255, 236, 60), (206, 110, 0)
CHAIR, CHAIR_LIGHT = (0, 96, 106), (0, 130, 138)
CUFF = (255, 104, 92)

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
    _dome(0, -1.0, 7.2, 9.4, (216, 30, 38)),
    _rect(-1.5, -11.6, 1.5, -3, (160, 12, 26)),
    _poly(((-10.4, 2), (-7.6, -1.8), (7.6, -1.8), (10.4, 2)), (172, 12, 26)),
    _poly(((-3.6, -7.4), (3.6, -7.4), (2.8, -1.4), (0, 0.4), (-2.8, -1.4)), (255, 222, 80)),
  ],
  "builder": [
    _dome(0, 0.4, 7.6, 10.4, (255, 136, 0)),
    _rect(-2, -10.6, 2, -1, WHITE),
    _oval(-4.8, -4, 0.9, 3.0, (206, 88, 0)),
    _oval(4.8, -4, 0.9, 3.0, (206, 88, 0)),
    _rect(-8.8, -1.2, 8.8, 1.6, (206, 88, 0)),
  ],
  "wizard": [
    _poly(((-7.2, 0.6), (-2, -9), (2.4, -15), (4, -8.4), (7.2, 0.6)), (112, 46, 184)),
    _oval(0, 0.3, 9.4, 2.5, (76, 20, 136)),
    _oval(0.9, -7.8, 1.5, 1.5, GOLD),
    _oval(-2.4, -3.8, 1.5, 1.5, GOLD),
    _oval(3.2, -3.6, 1.3, 1.3, GOLD),
  ],
  "king": [
    _poly(
      ((-7.2, 1.6), (-8.8, -9.4), (-4, -4.6), (0, -12), (4, -4.6), (8.8, -9.4), (7.2, 1.6)),
      (255, 206, 20),
    ),
    _rect(-7.2, -1.4, 7.2, 1.6, (214, 150, 0)),
    _oval(0, -11.4, 2.0, 2.0, (226, 44, 70)),
    _oval(-8.4, -9.4, 2.0, 2.0, (40, 110, 240)),
    _oval(8.4, -9.4, 2.0, 2.0, (40, 110, 240)),
    _oval(0, -2.6, 2.0, 2.0, (226, 44, 70)),
  ],
  "cowboy": [
    _poly(
      ((-6.6, 0.5), (-6.4, -8.8), (-3, -10.8), (0, -9), (3, -10.8), (6.4, -8.8), (6.6, 0.5)),
      (170, 98, 40),
    ),
    _poly(
      ((-12, -4.4), (-8, -0.4), (8, -0.4), (12, -4.4), (9.6, 2), (0, 3), (-9.6, 2)), (132, 70, 24)
    ),
    _rect(-6.5, -3.6, 6.5, -0.6, (255, 236, 190)),
  ],
  "archer": [
    _poly(((-9, 1.8), (-6.2, -6), (0, -9), (6, -4.6), (11.6, 0.4), (5, 2)), (44, 160, 62)),
    _poly(((-9, 1.8), (-8, -0.8), (5.6, -0.8), (11.6, 0.4), (5, 2)), (16, 100, 40)),
    _line(((-4.4, -3.6), (-7.4, -8.6), (-8.6, -13)), (240, 40, 50), 3.0),
  ],
}

# ---- things: the origin is the hand ----
# Each is 14 to 17 pixels across and mostly one strong colour that no other thing has, so that it
# can still be told at a glance, and by a model that sees the picture in coarse patches.

_MAGENTA, _PINK = (244, 16, 148), (255, 128, 204)
_VIOLET, _CYAN = (104, 20, 214), (20, 236, 255)
_LIME, _DARK_LIME = (158, 240, 24), (104, 184, 0)
_STEEL, _JADE = (34, 40, 62), (0, 214, 160)
_BLUE, _BROWN = (16, 56, 246), (92, 40, 10)

_THINGS = {
  "umbrella": [
    _line(((0, 5), (0, -6)), (70, 14, 62), 2.4),
    _line(((0, 5), (1.8, 6.6), (3.6, 4.8)), (70, 14, 62), 2.2),
    _dome(0, -2.6, 8.4, 9.8, _MAGENTA),
    _dome(0, -2.6, 3.2, 9.8, _PINK),
    _dome(0, -2.6, 1.6, 8.2, _MAGENTA),
    _oval(-5.6, -2.6, 2.8, 1.2, _MAGENTA),
    _oval(0, -2.6, 2.8, 1.2, _MAGENTA),
    _oval(5.6, -2.6, 2.8, 1.2, _MAGENTA),
    _oval(0, -12.4, 1.2, 1.2, (70, 14, 62)),
  ],
  "ball": [
    _oval(0, -2, 7.6, 7.6, (120, 44, 0)),
    _oval(0, -2, 7, 7, (255, 100, 0)),
    _line(((-6.6, -2), (6.6, -2)), (120, 44, 0), 1.2),
    _line(((0, -8.6), (0, 4.6)), (120, 44, 0), 1.2),
    _line(((-5, -6.6), (-2.8, -2), (-5, 2.6)), (120, 44, 0), 1.1),
    _line(((5, -6.6), (2.8, -2), (5, 2.6)), (120, 44, 0), 1.1),
  ],
  "book": [
    _poly(((-8.2, -8), (0, -6), (8.2, -8), (8.2, 5), (0, 7), (-8.2, 5)), _VIOLET),
    _poly(((-6.2, -8.6), (-0.5, -6.6), (-0.5, 4.6), (-6.2, 2.8)), WHITE),
    _poly(((6.2, -8.6), (0.5, -6.6), (0.5, 4.6), (6.2, 2.8)), WHITE),
    _line(((-4.8, -4.6), (-2, -3.7)), _VIOLET, 0.9),
    _line(((-4.8, -1.4), (-2, -0.5)), _VIOLET, 0.9),
    _line(((4.8, -4.6), (2, -3.7)), _VIOLET, 0.9),
    _line(((4.8, -1.4), (2, -0.5)), _VIOLET, 0.9),
  ],
  "balloon": [
    _line(((0, 6), (1, 3.4), (0, 1)), (90, 84, 100), 1.0),
    _poly(((0, -0.4), (-2.4, 2.6), (2.4, 2.6)), (190, 0, 24)),
    _oval(0, -6.4, 7, 7.6, (236, 0, 30)),
    _oval(-2.8, -9.6, 1.3, 2.0, (255, 176, 184)),
  ],
  "phone": [
    _rect(-6, -10, 6, 6.6, (12, 12, 18)),
    _rect(-4, -7.8, 4, 3, _CYAN),
    _oval(0, 4.8, 1.0, 1.0, (220, 224, 230)),
  ],
  "cup": [
    _oval(6, -1.2, 4.0, 4.6, _DARK_LIME),
    _oval(6, -1.2, 1.8, 2.4, (236, 255, 206)),
    _oval(-1, 4.4, 6, 1.6, _DARK_LIME),
    _rect(-7, -6.4, 5, 4.6, _LIME),
    _oval(-1, -6.4, 6, 2.0, _DARK_LIME),
    _oval(-1, -6.3, 4.8, 1.2, (96, 54, 30)),
    _line(((-3.2, -8.6), (-2.2, -10.2), (-3.2, -11.8)), WHITE, 1.2),
    _line(((0.8, -8.6), (1.8, -10.2), (0.8, -11.8)), WHITE, 1.2),
  ],
  "flower": [
    _line(((0, 7), (0, -2)), (20, 120, 40), 2.2),
    _poly(((0, 6), (5.4, 1.6), (5.2, 5)), (20, 120, 40)),
    *[
      _oval(5 * math.cos(a), -5 + 5 * math.sin(a), 2.8, 2.8, (255, 240, 0))
      for a in np.arange(8) * math.pi / 4
    ],
    _oval(0, -5, 5, 5, (255, 240, 0)),
    _oval(0, -5, 2.8, 2.8, (124, 62, 10)),
  ],
  "sword": [
    _poly(((-4.6, 0), (-4.6, -10.4), (0, -15.6), (4.6, -10.4), (4.6, 0)), _STEEL),
    _poly(((-3.4, 0), (-3.4, -10), (0, -13.8), (3.4, -10), (3.4, 0)), (240, 248, 255)),
    _rect(-0.9, -10.4, 0.9, 0, _JADE),
    _rect(-7.4, -2.2, 7.4, 2.2, _STEEL),
    _rect(-6.6, -1.4, 6.6, 1.4, _JADE),
    _rect(-1.8, 2, 1.8, 5, _STEEL),
    _oval(0, 6, 2.4, 2.2, _JADE),
  ],
  "fish": [
    _poly(((2.6, -1.4), (9, -7.4), (7.4, -1.4), (9, 4.6)), (4, 26, 178)),
    _poly(((-4.6, -5.2), (0.4, -9.4), (3.4, -4.8)), (4, 26, 178)),
    _oval(-1.6, -1.4, 6.8, 5.6, _BLUE),
    _line(((0.4, -4.4), (2, -1.4), (0.4, 1.6)), (4, 26, 178), 1.2),
    _oval(-5, -2.8, 1.7, 1.7, WHITE),
    _oval(-5.3, -2.8, 0.9, 0.9, INK),
  ],
  "broom": [
    _line(((0, -12), (0, 1)), (150, 82, 30), 2.6),
    _poly(((-3.2, -1), (3.2, -1), (7.6, 5), (8, 10.4), (-8, 10.4), (-7.6, 5)), _BROWN),
    _rect(-3.4, -2, 3.4, 0.6, (196, 132, 60)),
    _line(((-2.4, 4), (-3.6, 10)), (52, 18, 2), 1.0),
    _line(((2.4, 4), (3.6, 10)), (52, 18, 2), 1.0),
  ],
}

# ---- poses ----
# The right hand (the viewer's right) always holds the thing. What tells a pose besides the body is
# one bold cue on the free side: a shadow, a waving glove, stars, dust or an armchair.


def _star(x, y, r):
  """A five-pointed star with a dark rim."""
  angles = -math.pi / 2 + np.arange(10) * math.pi / 5

  def star(r):
    radii = (r, 0.5 * r) * 5
    return tuple((x + q * math.cos(a), y + q * math.sin(a)) for q, a in zip(radii, angles))

  return [_poly(star(r + 1), STAR_RIM), _poly(star(r), STAR)]


def _puff(x, y, r):
  return [_oval(x, y, r, r * 0.9, DUST_RIM), _oval(x, y - 0.3, r - 0.8, r * 0.9 - 0.9, DUST)]


_BEHIND = {
  "standing": [
    _poly(((2.6, -0.4), (-3, -3.4), (-13, -5.0), (-16, -3.6), (-15.6, -1), (-9, 0.6)), SHADOW),
    _oval(-1.4, -0.2, 5.4, 1.4, SHADOW),
  ],
  "waving": [],
  "cheering": [_oval(-1.6, -0.8, 9, 1.7, SHADOW)],
  "running": [*_puff(-6, -2.2, 3.2), *_puff(-12.4, -6, 2.8), *_puff(-11.2, -3, 4.2)],
  "sitting": [
    _rect(-12, -16.6, 7, -3, CHAIR),
    _oval(-7.5, -16.6, 4.5, 3.6, CHAIR),
    _oval(2.5, -16.6, 4.5, 3.6, CHAIR),
    _rect(-7.5, -20.2, 2.5, -14, CHAIR),
    _rect(-13, -2, -10.2, 0.8, SHOES),
    _rect(6.6, -2, 9.4, 0.8, SHOES),
    _rect(-14, -8.6, 11, -1.2, CHAIR),
    _rect(-10, -5.4, 6, -4, CHAIR_LIGHT),
    _rect(-15, -11, -9.6, -1.2, CHAIR_LIGHT),
    _oval(-12.3, -11, 2.7, 2.2, CHAIR_LIGHT),
  ],
}
_IN_FRONT = {
  "standing": [],
  "waving": [
    _oval(-11.6, -34, 4.5, 4.6, INK),
    _oval(-11.6, -34, 4.0, 4.1, WHITE),
    _rect(-14.2, -31, -8.2, -26.4, CUFF),
    _line(((-16.6, -28), (-17.1, -33), (-16.4, -37), (-13.6, -39.9)), WHITE, 1.5),
  ],
  "cheering": [*_star(-12, -18.6, 3.4), *_star(11, -12.8, 3.2)],
  "running": [],
  "sitting": [],
}


def _body(pose):
  """The shapes below the head, where the head goes, and where the right hand is."""
  if pose == "standing":
    hip, lean = -11.0, 0
    legs = [((-3.6, -11), (-3.6, -1.2)), ((-0.4, -11), (-0.4, -1.2))]
    left, hand = ((-7, -19), (-8.6, -15), (-8.8, -9.8)), (7.8, -12.4)
    right = ((3, -19), (5.2, -14), hand)
  elif pose == "waving":
    hip, lean = -9.0, 2.4
    legs = [((-4.2, -9), (-7, -1.2)), ((0.2, -9), (3, -1.2))]
    left, hand = ((-4.6, -17), (-9.6, -21), (-11, -31)), (8, -11.4)
    right = ((4.4, -17), (5.8, -12), hand)
  elif pose == "cheering":
    hip, lean = -12.4, -0.6
    legs = [((-4.2, -12.4), (-8, -10), (-11.6, -6.8)), ((0.2, -12.4), (4.6, -10), (8.4, -6.8))]
    left, hand = ((-7.4, -20.2), (-10.6, -24), (-12.6, -32)), (10, -26.4)
    right = ((2.4, -20.2), (7.4, -22.4), hand)
  elif pose == "running":
    hip, lean = -10.0, 4.0
    legs = [((-5, -10), (-8.4, -7.6), (-12.4, -10.6)), ((-1, -10), (7.4, -8), (8, -1.4))]
    left, hand = ((-3.4, -18), (-8.4, -15), (-11.2, -18.6)), (10.4, -14)
    right = ((6.6, -18), (8.4, -14), hand)
  else:
    hip, lean = -5.0, 0
    legs = [((-4.6, -5), (-6, -4), (-6, -1.4)), ((0.6, -5), (2, -4), (2, -1.4))]
    left, hand = ((-7, -12.6), (-10, -10.6), (-11.6, -11.4)), (8, -8.6)
    right = ((3, -12.6), (5.4, -9), hand)
  shoulder = hip - 9.4
  shapes = list(_BEHIND[pose])
  for leg in legs:
    shapes.append(_line(leg, TROUSERS, 3.6))
    x, y = leg[-1]
    if pose == "running" and x < 0:
      shapes.append(_oval(x - 0.8, y - 0.4, 1.7, 2.6, SHOES))
    else:
      shapes.append(_oval(x + (1 if x > 0 else -1), y + 0.3, 2.6, 1.6, SHOES))
  shapes.append(_line(left, "sleeve", 3.4))
  shapes.append(_oval(left[-1][0], left[-1][1], 2.2, 2.2, "skin"))
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
  shapes += _moved(_THINGS[thing], hand[0] + 2, hand[1])
  shapes.append(_oval(hand[0], hand[1], 1.8, 1.8, "skin"))
  shapes += _IN_FRONT[pose]
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
