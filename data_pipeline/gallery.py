"""The report's gallery: which pictures are worth looking at, and how one is drawn in the page."""

import base64
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
import heapq
import io
import random

import numpy as np
from PIL import Image

from data_pipeline.records import ImageRecord, map_mentions, statement_mentions
from data_pipeline.regions import slot_color

Box = tuple[float, float, float, float]

VIEW = 300           # width of a picture in units of its drawing; about as many pixels of a screen
STORED_SIDE = 480    # pixels: a photograph's longer side in the page
PIXEL_ART = 200      # pixels: pictures up to this size are stored as they are and shown enlarged
MOST_BOXES = 12      # drawn in one picture, beyond those that its statements mention
TAG_HEIGHT = 17
UNKNOWN = ("#888888", "#fff")    # the chip of a number that has no box


@dataclass(frozen=True)
class ShownStatement:
  """A statement of the gallery. Its texts mention boxes by the numbers of `GalleryItem.boxes`.

  score: the critic's P(accept). kept: whether the cut keeps it. truth: whether it is right.
  None is "not known" and is not shown.
  """
  question: str
  answer: str
  rationale: str
  score: float | None = None
  kept: bool | None = None
  truth: bool | None = None


@dataclass(frozen=True)
class GalleryItem:
  """A picture with boxes and what is said about it.

  boxes: number -> xyxy in pixels of `image`; the k-th of them has the colour of slot k.
  labels: number -> what is there. others: boxes drawn faintly, without a number.
  """
  image: Image.Image
  boxes: Mapping[int, Box]
  statements: tuple[ShownStatement, ...] = ()
  labels: Mapping[int, str] = field(default_factory=dict)
  others: tuple[Box, ...] = ()
  caption: str = ""


@dataclass(frozen=True)
class GalleryGroup:
  """Pictures under one heading."""
  title: str
  caption: str
  items: tuple[GalleryItem, ...]


def gallery_groups(
    records: Iterable[ImageRecord], load_image: Callable[[ImageRecord], Image.Image],
    cut: float | None = None, truth: Mapping[str, bool] | None = None, per_group: int = 8,
    seed: int = 0) -> list[GalleryGroup]:
  """Picks what is worth looking at: the best, the worst, the borderline and random pictures.

  The scored groups show one statement per picture, so that `per_group` different pictures are seen;
  random pictures show up to three of theirs. Numbers are region ids as stored. truth: statement
  index -> is it right. Groups without members (no scores, no cut) are left out. One pass over the
  records; only the chosen pictures are loaded.
  """
  rng = random.Random(seed)

  def by_score(rank):
    """Of a record: its lowest ranking scored statement."""
    def pick(record):
      scored = [s for s in record.statements if s.score is not None]
      first = min(scored, key=rank, default=None)
      return first and (rank(first), (first,))
    return pick

  def by_lot(record):
    some = rng.sample(record.statements, min(3, len(record.statements)))
    return rng.random(), tuple(sorted(some, key=lambda s: -(s.score or 0)))

  picks = {
    "Best": ("The critic is surest that these are true.", by_score(lambda s: -s.score)),
    "Worst": ("The critic is surest that these are false.", by_score(lambda s: s.score)),
    "Borderline": (f"Nearest to the cut at {cut or 0:.2f}: the critic's hardest decisions.",
                   by_score(lambda s: abs(s.score - cut))),
    "Random": ("Pictures drawn by lot.", by_lot),
  }
  if cut is None:
    del picks["Borderline"]
  chosen = {title: [] for title in picks}    # heaps of (-rank, -place, record, statements)
  for place, record in enumerate(records):
    for title, (_, pick) in picks.items():
      found = pick(record)
      if found:
        heapq.heappush(chosen[title], (-found[0], -place, record, found[1]))
        if len(chosen[title]) > per_group:
          heapq.heappop(chosen[title])
  return [GalleryGroup(title, caption, tuple(
            _item(record, statements, load_image, cut, truth or {})
            for _, _, record, statements in sorted(chosen[title], reverse=True)))
          for title, (caption, _) in picks.items() if chosen[title]]


def _item(record, statements, load_image, cut, truth):
  image = load_image(record).convert("RGB")
  # A loader may give the picture smaller than stored; a width of 0 means that nobody measured it.
  known = record.width > 0 and record.height > 0
  scale = np.array([image.width / record.width, image.height / record.height] * 2) if known else 1
  boxes = {r.id: tuple(np.asarray(r.box) * scale) for r in record.regions}
  said = [i for s in statements for i in statement_mentions(s)]
  largest = sorted(boxes, key=lambda i: -_area(boxes[i]))[:MOST_BOXES]
  shown = list(dict.fromkeys(i for i in said if i in boxes)) or sorted(largest)
  return GalleryItem(
    image=image, boxes={i: boxes[i] for i in shown},
    labels={r.id: r.label for r in record.regions if r.label},
    others=tuple(boxes[i] for i in largest if i not in shown), caption=record.image,
    statements=tuple(ShownStatement(
      s.question, s.answer, s.rationale, s.score,
      None if cut is None or s.score is None else s.score >= cut, truth.get(s.index),
    ) for s in statements))


def _area(box):
  return (box[2] - box[0]) * (box[3] - box[1])


# --- a picture of the gallery --------------------------------------------------------------------

def item_view(item: GalleryItem) -> dict:
  """A picture as a drawing VIEW units wide: the pixels, a frame per box, a tag per frame.

  Frames and tags are drawn by the browser over the pixels, so that they stay sharp and the numbers
  stay legible however small the picture was.
  """
  scale = VIEW / item.image.width
  height = item.image.height * scale
  placed, marks = [], []
  order = {number: k for k, number in enumerate(item.boxes)}
  for number, box in item.boxes.items():
    frame = tuple(float(v) * scale for v in box)
    width = 9 + 8 * len(str(number))
    tag = _tag_place(frame, width, placed, height)
    placed.append((*tag, tag[0] + width, tag[1] + TAG_HEIGHT))
    color, ink = _colors(order[number])
    marks.append({"number": number, "k": order[number], "label": item.labels.get(number, ""),
                  "frame": _rect(frame), "color": color, "ink": ink,
                  "tag": [f"{v:.1f}" for v in (*tag, width, TAG_HEIGHT)],
                  "text": [f"{v:.1f}" for v in (tag[0] + width / 2, tag[1] + 13)]})
  return {
    "source": _data_uri(item.image), "pixel_art": max(item.image.size) <= PIXEL_ART,
    "width": VIEW, "height": f"{height:.1f}", "marks": marks, "caption": item.caption,
    "others": [_rect([float(v) * scale for v in box]) for box in item.others],
    "statements": [{
      "question": _pieces(s.question, order), "answer": _pieces(s.answer, order),
      "rationale": _pieces(s.rationale, order), "kept": s.kept, "truth": s.truth,
      "score": None if s.score is None else f"{s.score:.2f}",
      "percent": f"{100 * min(max(s.score or 0, 0), 1):.0f}",
    } for s in item.statements],
  }


def _data_uri(image):
  """Drawn pictures as they are, in PNG; photographs as JPEG of at most STORED_SIDE pixels."""
  image, buffer = image.convert("RGB"), io.BytesIO()
  if max(image.size) <= PIXEL_ART:
    image.save(buffer, "PNG", optimize=True)
    kind = "png"
  else:
    image.thumbnail((STORED_SIDE, STORED_SIDE), Image.Resampling.LANCZOS)
    image.save(buffer, "JPEG", quality=80, optimize=True)
    kind = "jpeg"
  return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _tag_place(frame, width, placed, height):
  """The tag's top left corner: the first place at the frame's rim that hides no other tag."""
  x1, y1, x2, y2 = frame
  wishes = [(x1, y1 - TAG_HEIGHT), (x2 - width, y1 - TAG_HEIGHT), (x1, y2), (x2 - width, y2),
            (x1, y1), (x2 - width, y1), (x1, y2 - TAG_HEIGHT), (x2 - width, y2 - TAG_HEIGHT),
            ((x1 + x2 - width) / 2, y1), ((x1 + x2 - width) / 2, (y1 + y2 - TAG_HEIGHT) / 2)]
  for x, y in wishes:
    inside = x >= 0 and y >= 0 and x + width <= VIEW and y + TAG_HEIGHT <= height
    free = all(x >= b[2] or x + width <= b[0] or y >= b[3] or y + TAG_HEIGHT <= b[1]
               for b in placed)
    if inside and free:
      return x, y
  return min(max(x1, 0), VIEW - width), min(max(y1, 0), max(height - TAG_HEIGHT, 0))


def _rect(frame):
  x1, y1, x2, y2 = frame
  return [f"{v:.1f}" for v in (x1, y1, x2 - x1, y2 - y1)]


def _colors(slot):
  """A slot's colour and black or white, whichever can be read on it, as CSS colours."""
  red, green, blue = (int(v) for v in slot_color(slot))
  light = 0.299 * red + 0.587 * green + 0.114 * blue > 140
  return f"#{red:02x}{green:02x}{blue:02x}", "#000" if light else "#fff"


def _pieces(text, order):
  """Cuts a text at its mentions: "[0,2] run" -> chips for 0 and 2, and the words.

  A chip is {number, color, ink, k}, k None for a number without a box; words are {text}.
  """
  # The mentions' numbers are set apart by a character that no text can need: every second part of
  # what is then split at it is a number.
  marked = map_mentions(text.replace("\0", ""), lambda number: f"\0{number}\0", joiner=" ")
  pieces = []
  for place, part in enumerate(marked.split("\0")):
    if place % 2:
      k = order.get(int(part))
      color, ink = UNKNOWN if k is None else _colors(k)
      pieces.append({"number": int(part), "k": k, "color": color, "ink": ink})
    elif part:
      pieces.append({"text": part})
  return pieces
