"""One image as one row of a batch: which texts, which slots, which pixels.

Everything is a function of the record, the options and the random generator given, so an example
can be made again exactly.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
from PIL import Image

from data_pipeline import images, regions
from data_pipeline.corpus import Outline
from data_pipeline.records import DataError, ImageRecord, mentions, statement_mentions
from data_pipeline.texts import (
  Text,
  TextEncoder,
  caption_text,
  description_text,
  statement_texts,
)

TEXT_KINDS = ("statements", "captions", "descriptions")
REGION_MODES = ("tokens", "overlay", "both", "none")

CROP_AREA = (0.5, 1.0)  # of the image, as in BLIP-2's RandomResizedCrop
CROP_RATIO = (3 / 4, 4 / 3)  # width : height


@dataclass(frozen=True)
class LoaderOptions:
  """What a batch holds. Every field has a default that suits the embedded scenes.

  batch_size: images per step over all processes (B). statements: text slots per image (S).
  text_tokens: tokens per text, start and end included (T). max_regions: region slots (R).
  image_size: of the model input, in pixels: the side of a square, or (height, width); the aspect
    ratio is not kept.
  texts: what a text slot is filled with, as shares of TEXT_KINDS; an image that lacks a kind uses
    the others.
  rationale_dropout: share of statements written without their rationale.
  region_mode: "tokens" gives boxes; "overlay" draws them on the pixels instead; "both"; "none".
  shuffle_slots: region ids get their slots in random order; otherwise in order of first mention.
  distractors: share of images that offer all their regions, not only the mentioned ones.
  augment: random resized crops and mirroring, with the boxes following.
  images: False leaves `image` out, for students that read cached features.
  threads, prefetch: threads that make batches, and how many batches they keep ready.
  """

  batch_size: int = 16
  statements: int = 4
  text_tokens: int = 64
  max_regions: int = 8
  image_size: int | tuple[int, int] = 96
  texts: dict[str, float] = field(default_factory=lambda: {"statements": 1.0})
  rationale_dropout: float = 0.0
  region_mode: str = "tokens"
  shuffle_slots: bool = True
  distractors: float = 0.5
  augment: bool = False
  images: bool = True
  threads: int = 2
  prefetch: int = 8

  def __post_init__(self):
    for name in ("batch_size", "statements", "text_tokens", "max_regions", "image_size"):
      if np.min(getattr(self, name)) < 1:
        raise DataError(f"loader {name}={getattr(self, name)}; it must be at least 1")
    for name in ("rationale_dropout", "distractors"):
      if not 0 <= getattr(self, name) <= 1:
        raise DataError(f"loader {name}={getattr(self, name)}; it is a share from 0 to 1")
    unknown = sorted(set(self.texts) - set(TEXT_KINDS))
    if unknown:
      raise DataError(f"loader texts: unknown kind {unknown[0]!r}; choose from {TEXT_KINDS}")
    if min(self.texts.values(), default=0) < 0 or not sum(self.texts.values()) > 0:
      raise DataError(f"loader texts={self.texts}; shares are >= 0 and one is above 0")
    if self.region_mode not in REGION_MODES:
      raise DataError(f"loader region_mode={self.region_mode!r}; choose from {REGION_MODES}")
    if not self.images and (self.augment or self.region_mode in ("overlay", "both")):
      raise DataError("loader images=False has no pixels for augment=True or an overlay")


@dataclass(frozen=True)
class Pools:
  """The texts of one image, ready to be drawn from.

  statements: (with rationale, without) of every statement that fits. descriptions: (id, text).
  """

  statements: tuple[tuple[Text, Text], ...] = ()
  captions: tuple[Text, ...] = ()
  descriptions: tuple[tuple[int, str], ...] = ()


def has_text(found: Outline, options: LoaderOptions) -> bool:
  """Whether an image has any text the options ask for, judged without its tokens."""
  count = {
    "statements": sum(mentioned <= options.max_regions for mentioned, _ in found.statements),
    "captions": found.captions,
    "descriptions": found.descriptions,
  }
  return any(count[kind] for kind, share in options.texts.items() if share)


def make_pools(encoder: TextEncoder, record: ImageRecord, options: LoaderOptions) -> Pools:
  """Encodes the texts of a record.

  Left out are: a statement whose answer is empty or longer than the row, a text that mentions more
  than max_regions regions, and a caption or description that mentions a region the image lacks.
  """
  ids = {region.id for region in record.regions}

  def fits(text: str, *more: int) -> bool:
    mentioned = {*mentions(text), *more}
    return bool(text.strip()) and len(mentioned) <= options.max_regions and mentioned <= ids

  statements = record.statements if options.texts.get("statements") else ()
  pairs = [
    tuple(replace(text, statement=number) for text in statement_texts(encoder, statement) or ())
    for number, statement in enumerate(statements)
    if len(statement_mentions(statement)) <= options.max_regions
  ]
  captions = record.verbalization.captions if options.texts.get("captions") else ()
  encoded = [caption_text(encoder, caption) for caption in captions if fits(caption)]
  local = record.verbalization.local if options.texts.get("descriptions") else {}
  return Pools(
    statements=tuple(pair for pair in pairs if pair),
    captions=tuple(text for text in encoded if text),
    descriptions=tuple((i, text) for i, text in sorted(local.items()) if fits(text, i)),
  )


def choose_texts(
  encoder: TextEncoder, pools: Pools, options: LoaderOptions, rng: np.random.Generator
) -> list[Text | None]:
  """Fills the text slots of one image; all None if it has no text.

  Each slot draws its kind by the shares. Statements and captions are drawn without repeats until
  they are used up, then again from the start. Together the texts mention at most max_regions
  regions: one that would go beyond is passed over, and a slot nothing fits in repeats an earlier
  text.
  """
  kinds = [kind for kind in TEXT_KINDS if options.texts.get(kind) and getattr(pools, kind)]
  if not kinds:
    return [None] * options.statements
  shares = np.array([options.texts[kind] for kind in kinds])
  drawn = rng.choice(kinds, size=options.statements, p=shares / shares.sum())
  decks = {
    "statements": [pools.statements[i] for i in rng.permutation(len(pools.statements))],
    "captions": [(pools.captions[i],) * 2 for i in rng.permutation(len(pools.captions))],
  }
  short = rng.random(options.statements) < options.rationale_dropout
  mentioned: set[int] = set()
  chosen = []
  for slot, kind in enumerate(drawn):
    room = options.max_regions
    if kind == "descriptions":
      text = _describe(encoder, pools.descriptions, mentioned, options, rng)
    else:
      pair = _next_that_fits(decks[kind], mentioned, room)
      text = pair and pair[int(short[slot])]
    text = text or (chosen[slot % len(chosen)] if chosen else None)
    chosen.append(text)
    mentioned.update(text.mentioned if text else ())
  return chosen


def choose_slots(
  record: ImageRecord, texts: list[Text | None], options: LoaderOptions, rng: np.random.Generator
) -> tuple[int, ...]:
  """The region id of each slot: the mentioned regions, and sometimes the image's others."""
  mentioned = [region_id for text in texts if text for region_id in text.mentioned]
  offer_all = bool(rng.random() < options.distractors)
  ids = tuple(region.id for region in record.regions)
  try:
    return regions.assign_slots(
      ids, mentioned, rng if options.shuffle_slots else None, options.max_regions, offer_all
    )
  except DataError as error:
    raise DataError(f"{record.image}: {error}") from None


def _next_that_fits(deck: list, mentioned: set[int], room: int):
  """The first pair of the deck that keeps within `room` regions, moved to its end; or None."""
  for at, pair in enumerate(deck):
    if len(mentioned.union(pair[0].mentioned)) <= room:
      deck.append(deck.pop(at))
      return pair
  return None


def _describe(encoder, descriptions, mentioned: set[int], options, rng) -> Text | None:
  """A text of region descriptions, in random order where slots are, within max_regions regions."""
  order = rng.permutation(len(descriptions)) if options.shuffle_slots else range(len(descriptions))
  taken, described = set(mentioned), []
  for region_id, text in (descriptions[i] for i in order):
    ids = taken | {region_id, *mentions(text)}
    if len(ids) <= options.max_regions:
      taken = ids
      described.append((region_id, text))
  return description_text(encoder, described)


@dataclass(frozen=True)
class Frame:
  """The part of the stored image that the model sees.

  crop: (x1, y1, x2, y2) in whole pixels of the stored image. flip: mirrored left to right.
  boxes float32[k,4]: the regions in slot order, xyxy in [0,1] of the crop as the model sees it.
  visible bool[k]: enough of the region is inside the crop to point at it.
  """

  crop: tuple[int, int, int, int]
  flip: bool
  boxes: np.ndarray
  visible: np.ndarray


def whole_frame(record: ImageRecord, slots: tuple[int, ...]) -> Frame:
  """The whole image, with the regions of `slots` (region ids)."""
  return _frame(record, slots, (0, 0, record.width, record.height), flip=False)


def random_frame(
  record: ImageRecord, slots: tuple[int, ...], texts: list[Text | None], rng: np.random.Generator
) -> Frame:
  """A random crop, mirrored half the time unless a text has words such as "left".

  If the crop takes a mentioned region from every text, the whole image is used instead.
  """
  crop = _random_crop(record.width, record.height, rng)
  mirror = rng.random() < 0.5
  directed = any(regions.has_direction_words(text.source) for text in texts if text)
  frame = _frame(record, slots, crop, mirror and not directed)
  if not any(still_true(texts, slots, frame)):
    frame = _frame(record, slots, (0, 0, record.width, record.height), frame.flip)
  return frame


def still_true(texts: list[Text | None], slots: tuple[int, ...], frame: Frame) -> list[bool]:
  """For each text: whether it is there and the frame shows every region it mentions."""
  seen = {region_id for region_id, visible in zip(slots, frame.visible, strict=True) if visible}
  return [text is not None and seen.issuperset(text.mentioned) for text in texts]


def pixels(
  data: bytes, record: ImageRecord, slots: tuple[int, ...], frame: Frame, options: LoaderOptions
) -> np.ndarray:
  """uint8[H,W,3]: the frame of an image file, squashed to `options.image_size`.

  An overlay is drawn on the stored image, before anything is cut or scaled, so it follows both.
  DataError where the file is damaged or has another size than the record says.
  """
  array = images.decode(data, name=record.image)
  if array.shape[:2] != (record.height, record.width):
    size = f"{array.shape[1]}x{array.shape[0]}"
    raise DataError(f"{record.image}: is {size}, its record says {record.width}x{record.height}")
  if options.region_mode in ("overlay", "both") and slots:
    image = regions.draw_overlay(Image.fromarray(array), _boxes(record, slots))
    array = np.asarray(image)
  x1, y1, x2, y2 = frame.crop
  array = images.resize(array[y1:y2, x1:x2], options.image_size)
  return np.ascontiguousarray(array[:, ::-1]) if frame.flip else array


def _boxes(record: ImageRecord, slots: tuple[int, ...]) -> np.ndarray:
  """float32[k,4]: the boxes of the region ids in `slots`, in pixels of the stored image."""
  box = {region.id: region.box for region in record.regions}
  return np.array([box[region_id] for region_id in slots], np.float32).reshape(-1, 4)


def _frame(record: ImageRecord, slots: tuple[int, ...], crop, flip: bool) -> Frame:
  if not record.width or not record.height:
    raise DataError(f"{record.image}: its record has no image size; fill in width and height")
  boxes = _boxes(record, slots)
  visible = regions.kept_fraction(boxes, crop) >= regions.KEPT_FRACTION
  boxes = regions.crop_boxes(boxes, crop, (1, 1))
  boxes = regions.flip_boxes(boxes, 1.0) if flip else boxes
  return Frame(crop, flip, boxes.astype(np.float32), visible)


def _random_crop(width: int, height: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
  """A crop with a random share of the area and a random shape; the whole image if none fits."""
  for _ in range(10):
    area = width * height * rng.uniform(*CROP_AREA)
    ratio = np.exp(rng.uniform(*np.log(CROP_RATIO)))
    w, h = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
    if 1 <= w <= width and 1 <= h <= height:
      x, y = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
      return x, y, x + w, y + h
  return 0, 0, width, height
