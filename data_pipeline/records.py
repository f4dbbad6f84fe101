"""The records every stage reads and writes: an image, its regions and its statements, as jsonl.

A text points at regions with mentions: "[3]" is region 3 of the image, "[0,2]" is regions 0 and 2.
In records the numbers are region *ids*; `regions.render` turns them into the slots of one example.
The formats of the original LSKD release live in `original.py` and are offered here as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
import dataclasses
from dataclasses import dataclass, field
import math
import re

from data_pipeline.jsonl import DataError, checked, lean, read_jsonl, to_line
from data_pipeline.mentions import map_mentions, mentions
from data_pipeline.original import FORM, TEXTS, choice_keys, give, row_keys, take, text_keys

__all__ = [  # one place to import from, whichever file of the package a name lives in
  "ChoiceItem",
  "DataError",
  "ImageRecord",
  "Region",
  "Statement",
  "Verbalization",
  "check_split",
  "choice_from_json",
  "choice_to_json",
  "map_mentions",
  "mentions",
  "original_to_records",
  "read_jsonl",
  "record_from_json",
  "record_to_json",
  "records_to_original",
  "statement_mentions",
  "to_line",
  "validate",
]


@dataclass(frozen=True)
class Region:
  """A part of one image. `box` is (x1, y1, x2, y2) in pixels of the stored image, x2 and y2
  exclusive edges. `extra` keeps what a source knows besides (masks as `segms`, its own ids)."""

  id: int
  box: tuple[float, float, float, float]
  label: str = ""
  extra: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Statement:
  """A question, answer and rationale about an image; the three texts mention region ids.

  index: unique name of the statement. source: the prompt variant that made it. score: the critic's
  P(accept), None before the critic ran. region: the ids the statement is about; region_all: every
  id that was offered to the teacher.
  """

  index: str
  question: str
  answer: str
  rationale: str
  source: str = ""
  teacher: str = ""
  score: float | None = None
  region: tuple[int, ...] = ()
  region_all: tuple[int, ...] = ()
  provenance: dict = field(default_factory=dict)
  extra: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Verbalization:
  """Text that stands for an image: captions of the whole, one description per region id (`local`),
  and question/answer pairs (`dynamic`)."""

  captions: tuple[str, ...] = ()
  local: dict[int, str] = field(default_factory=dict)
  dynamic: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class ImageRecord:
  """One image with all its regions and statements. `image` is a path relative to an image root.
  A width and height of 0 mean "not known yet" (see `images.with_size`)."""

  image: str
  image_id: int
  width: int
  height: int
  regions: tuple[Region, ...]
  statements: tuple[Statement, ...] = ()
  verbalization: Verbalization = Verbalization()
  split: str = "train"
  extra: dict = field(default_factory=dict)


@dataclass(frozen=True)
class ChoiceItem:
  """One multiple-choice question about an image. `label` indexes `choices`; None = not given.
  `scores` are the file's own scores of the choices (not a model's), empty when it has none."""

  image: str
  question: str
  choices: tuple[str, ...]
  label: int | None
  regions: tuple[Region, ...]
  index: str
  scores: tuple[float, ...] = ()
  answer_prefix: str = "Answer:"
  context: str = ""
  extra: dict = field(default_factory=dict)


# ---- checking ----


def check_split(name: str) -> None:
  """DataError if a built dataset cannot have a split of this name."""
  if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", name) or name == "all":
    raise DataError(f"{name!r} cannot name a split; use letters, digits and '_', such as 'val_1'")


def statement_mentions(statement: Statement) -> tuple[int, ...]:
  """The ids mentioned in question, answer, rationale, in that order, each once."""
  return mentions(f"{statement.question} {statement.answer} {statement.rationale}")


def validate(record: ImageRecord) -> ImageRecord:
  """The record with boxes clipped to the image, or DataError that names what is wrong.

  Wrong is: no image size, a box that is not finite, has no area or lies outside the image, an id
  that is negative or used twice, and a mention, `region` or description of an absent region.
  """
  name = record.image or f"image_id {record.image_id}"
  if record.width <= 0 or record.height <= 0:
    raise DataError(f"{name}: image size {record.width}x{record.height} is not known; fill it in")
  ids = [region.id for region in record.regions]
  for region_id in ids:
    if region_id < 0 or ids.count(region_id) > 1:
      fault = "negative" if region_id < 0 else "used twice"
      raise DataError(f"{name}: region id {region_id} is {fault}; give every region its own id")
  regions = tuple(_clip(region, record, name) for region in record.regions)

  def check(wanted, where):
    missing = [i for i in wanted if i not in ids]
    if missing:
      raise DataError(f"{name}: {where} names region {missing[0]}; the image has {sorted(ids)}")

  for statement in record.statements:
    check(statement_mentions(statement), f"statement {statement.index}")
    check(statement.region, f"`region` of statement {statement.index}")
    check(statement.region_all, f"`region_all` of statement {statement.index}")
  check(record.verbalization.local, "the verbalization")
  return dataclasses.replace(record, regions=regions)


def _clip(region: Region, record: ImageRecord, name: str) -> Region:
  if len(region.box) != 4 or not all(math.isfinite(edge) for edge in region.box):
    raise DataError(f"{name}: region {region.id} has box {region.box}; give four finite numbers")
  x1, y1, x2, y2 = region.box
  if x1 >= x2 or y1 >= y2:
    raise DataError(f"{name}: region {region.id} has box {region.box}; want x1 < x2 and y1 < y2")
  if x1 >= 0 and y1 >= 0 and x2 <= record.width and y2 <= record.height:
    return region
  clipped = (max(x1, 0.0), max(y1, 0.0), min(x2, record.width), min(y2, record.height))
  if clipped[0] >= clipped[2] or clipped[1] >= clipped[3]:
    size = f"{record.width}x{record.height}"
    raise DataError(f"{name}: region {region.id} with box {region.box} is outside the {size} image")
  return dataclasses.replace(region, box=tuple(float(edge) for edge in clipped))


# ---- native jsonl: one image per line ----


def record_to_json(record: ImageRecord) -> dict:
  """The native jsonl object of a record; fields at their default are left out."""
  return lean(record)


def record_from_json(row: dict) -> ImageRecord:
  """The reverse of `record_to_json`. DataError names a missing, unknown or ill-typed key."""
  values = checked(ImageRecord, row, str(row.get("image", "record")))
  name = values["image"]
  regions = (checked(Region, region, f"{name}: regions") for region in values["regions"])
  values["regions"] = tuple(Region(**region) for region in regions)
  if "statements" in values:
    rows = (checked(Statement, row, f"{name}: statements") for row in values["statements"])
    values["statements"] = tuple(Statement(**row) for row in rows)
  if "verbalization" in values:
    words = checked(Verbalization, values["verbalization"], f"{name}: verbalization")
    values["verbalization"] = Verbalization(**words)
  return ImageRecord(**values)


# ---- the original's formats ----


def original_to_records(rows: Iterable[dict], where: str = "") -> list[ImageRecord]:
  """Rows of the original's one-statement-per-line format, as one record per image.

  Reads the released token lists, the older `qar` strings, `text_input`/`text_output`, and critic
  rows (`label`, `reject_label`, `qa_score`, `r_score` stay in the statement's `extra`). Rows of an
  image that disagree about a region or the split go to records of their own with the same
  image_id. The format has no image size: width and height are 0 unless the rows give them.

  where: put before the row number in a DataError, for instance the file's name.
  """
  groups, image_ids = [], {}
  of_image: dict[str, list] = {}
  for number, row in enumerate(rows, start=1):
    try:
      common, statement, regions = _read_row(row)
    except DataError as error:
      raise DataError(f"{where}{': ' if where else ''}row {number}: {error}") from None
    candidates = of_image.setdefault(common["image"], [])
    for group in candidates:
      if group[0] == common and all(group[1].get(r.id, r) == r for r in regions):
        break
    else:
      group = (common, {}, [])
      candidates.append(group)
      groups.append(group)
    group[1].update((region.id, region) for region in regions)
    group[2].append((number, statement, [region.id for region in regions]))
    image_ids.setdefault(common["image"], len(image_ids))
  order = [number for _, _, members in groups for number, _, _ in members]
  scattered = order != sorted(order)
  records = []
  for common, regions, members in groups:
    statements = []
    for number, statement, ids in members:
      place = {"row": number} if scattered else {}
      if ids != list(regions):
        place["references"] = ids
      if place:
        form = {**statement.extra.get(FORM, {}), **place}
        statement = dataclasses.replace(statement, extra={**statement.extra, FORM: form})
      statements.append(statement)
    records.append(
      ImageRecord(
        image_id=image_ids[common["image"]],
        regions=tuple(regions.values()),
        statements=tuple(statements),
        **common,
      )
    )
  return records


def records_to_original(records: Iterable[ImageRecord]) -> Iterator[dict]:
  """The rows of `records` in the original's format, in their original order. Rows that came from
  `original_to_records` come back equal; statements without a row number come last."""
  records = list(records)
  places = [
    (statement.extra.get(FORM, {}).get("row", math.inf), r, s)
    for r, record in enumerate(records)
    for s, statement in enumerate(record.statements)
  ]
  for _, r, s in sorted(places):
    yield _write_row(records[r], records[r].statements[s])


def choice_from_json(row: dict) -> ChoiceItem:
  """A unified choice-task row (keys `text_input`, `references`, `choices`, ...). DataError names
  the key that cannot be read. The older names `question` and `text` are read as well."""
  values, extra = take(row, choice_keys(row))
  texts, scores = zip(*values["choices"], strict=True) if values["choices"] else ((), ())
  if None in scores and any(score is not None for score in scores):
    raise DataError("choices: some have a score and some have none; give all of them one, or none")
  return ChoiceItem(
    image=values["image"],
    question=values[text_keys(row)[0]],
    choices=texts,
    label=values["label"],
    regions=tuple(Region(*region) for region in values["references"]),
    index=values["instance_id"],
    scores=() if None in scores else scores,
    answer_prefix=values["answer_prefix"],
    context=values["context"],
    extra=extra,
  )


def choice_to_json(item: ChoiceItem) -> dict:
  """The reverse of `choice_from_json`, equal to the row that was read."""
  keys = item.extra.get(FORM, {}).get("keys", ())
  scores = item.scores or (None,) * len(item.choices)
  values = {
    "image": item.image,
    text_keys(keys or ("text_input",))[0]: item.question,
    "references": tuple(_parts(region) for region in item.regions),
    "choices": tuple(zip(item.choices, scores, strict=True)),
    "label": item.label,
    "answer_prefix": item.answer_prefix,
    "instance_id": item.index,
    "context": item.context,
  }
  return give(choice_keys(keys), values, item.extra)


def _parts(region: Region) -> tuple:
  """A region as the plain tuple `original.py` works with."""
  return region.id, region.box, region.label, region.extra


def _read_row(row: dict) -> tuple[dict, Statement, tuple[Region, ...]]:
  """(what belongs to the image, the statement, the regions) of one original row."""
  values, extra = take(row, row_keys(row))
  common = {key: values[key] for key in _COMMON}
  texts = values["qar"] if "qar" in values else [values[key] for key in text_keys(row)]
  own = {key: values[key] for key in _OWN}
  statement = Statement(values["index"], *texts, score=values["prediction"], extra=extra, **own)
  return common, statement, tuple(Region(*region) for region in values["references"])


def _write_row(record: ImageRecord, statement: Statement) -> dict:
  form = statement.extra.get(FORM, {})
  keys = form.get("keys", ())
  texts = tuple(getattr(statement, name) for name in TEXTS)
  regions = {region.id: region for region in record.regions}
  values = {key: getattr(record, key) for key in _COMMON}
  values |= {key: getattr(statement, key) for key in ("index", *_OWN)}
  values |= {"prediction": statement.score, "qar": texts}
  values |= dict(zip(text_keys(keys), texts, strict=True))
  values["references"] = tuple(
    _parts(regions[i]) for i in form.get("references", regions) if i in regions
  )
  return give(row_keys(keys), values, statement.extra)


# Keys of a row that mean the same as the field of that name: of the image, and of the statement.
_COMMON = ("image", "split", "width", "height")
_OWN = ("source", "teacher", "region", "region_all", "provenance")
