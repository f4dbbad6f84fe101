"""Photographs with boxes in the COCO format: an instances file, maybe a captions file, a folder.

COCO's `bbox` is x, y, width, height; records hold corners. Regions are numbered 0, 1, ... in the
order of the annotations that are kept, and labelled with the category's name.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path, PurePosixPath

from data_pipeline import images
from data_pipeline.records import DataError, ImageRecord, Region, Verbalization, validate

_KINDS = {int: "a whole number", str: "a text", list: "a list"}


def load_coco(instances: Path | str, captions: Path | str | None = None) -> list[dict]:
  """One plain dict per entry of `images`, in the file's order, with its annotations and captions.

  Annotations and captions of images that are not listed are passed over: `images` says what is
  wanted. DataError names the file and the key that is missing or of the wrong kind.
  """
  content = _read(instances, ("images", "annotations", "categories"))
  labels = {}
  for place, row in _rows(content, instances, "categories"):
    labels[_get(row, "id", int, place)] = _get(row, "name", str, place)
  licences = {
    row["id"]: row.get("name")
    for row in content.get("licenses", ())
    if isinstance(row, dict) and isinstance(row.get("id"), int)
  }
  items: dict[int, dict] = {}
  for place, row in _rows(content, instances, "images"):
    image_id = _get(row, "id", int, place)
    if image_id < 0:
      raise DataError(f"{place}: image id {image_id} is negative; number images from 0")
    if image_id in items:
      raise DataError(f"{place}: image id {image_id} is used twice; keep one")
    items[image_id] = {
      "image": _get(row, "file_name", str, place),
      "id": image_id,
      "width": _get(row, "width", int, place),
      "height": _get(row, "height", int, place),
      "licence": licences.get(row.get("license")),
      "source": row.get("flickr_url") or row.get("coco_url"),
      "annotations": [],
      "captions": [],
    }
  for place, row in _rows(content, instances, "annotations"):
    item = items.get(_get(row, "image_id", int, place))
    annotation = {
      "id": _get(row, "id", int, place),
      "bbox": _get(row, "bbox", list, place),
      "category": _get(row, "category_id", int, place),
      "crowd": bool(row.get("iscrowd")),
    }
    if annotation["category"] not in labels:
      raise DataError(f"{place}: category_id {annotation['category']} is not in `categories`")
    if item:
      item["annotations"].append(annotation | {"label": labels[annotation["category"]]})
  if captions is not None:
    for place, row in _rows(_read(captions, ("annotations",)), captions, "annotations"):
      item = items.get(_get(row, "image_id", int, place))
      if item:
        item["captions"].append(_get(row, "caption", str, place).strip())
  return list(items.values())


def coco_records(
  row: dict, image_root: Path, split: str = "train", file: str = "instances"
) -> list[ImageRecord | DataError]:
  """The record of one row of `load_coco`, and a DataError for each box that was left out.

  DataError is raised where the whole image is unusable. file: what the errors call the source.
  """
  name = row["image"]
  path = PurePosixPath(name)
  if path.is_absolute() or ".." in path.parts:
    raise DataError(f"{file}: file_name {name!r} leaves the image folder; make it relative to it")
  size = images.image_size(image_root / name)
  if size != (row["width"], row["height"]):
    stated = f"{row['width']}x{row['height']}"
    raise DataError(
      f"{image_root / name}: is {size[0]}x{size[1]}, {file} says {stated}; its boxes would be off"
    )
  record = ImageRecord(
    image=name,
    image_id=row["id"],
    width=row["width"],
    height=row["height"],
    regions=(),
    verbalization=Verbalization(captions=tuple(row["captions"])),
    split=split,
    extra=_origin(row),
  )
  regions, rejected = [], []
  for annotation in row["annotations"]:
    if annotation["crowd"]:
      continue  # a crowd box is an area with an unknown number of things: nothing to point at
    try:
      regions.append(_region(annotation, len(regions), record, file))
    except DataError as error:
      rejected.append(error)
  return [dataclasses.replace(record, regions=tuple(regions)), *rejected]


def _origin(row: dict) -> dict:
  """What to keep for credit and for tracing back: COCO's id, licence, address, crowds."""
  origin = {
    "coco_id": row["id"],
    "licence": row["licence"],
    "source": row["source"],
    "crowds": crowds(row),
  }
  return {key: value for key, value in origin.items() if value}


def crowds(row: dict) -> int:
  """How many of an image's annotations are crowds, which no box of one thing describes."""
  return sum(annotation["crowd"] for annotation in row["annotations"])


def _region(annotation: dict, region_id: int, record: ImageRecord, file: str) -> Region:
  place = f"{file}: annotation {annotation['id']}"
  bbox = annotation["bbox"]
  if len(bbox) != 4 or not all(type(v) in (int, float) and math.isfinite(v) for v in bbox):
    raise DataError(f"{place}: bbox {bbox} is not four finite numbers")
  x, y, width, height = bbox
  if width <= 0 or height <= 0:
    raise DataError(f"{place}: bbox {bbox} (x, y, width, height) has no area")
  box = (float(x), float(y), float(x + width), float(y + height))
  extra = {"coco_id": annotation["id"], "coco_category": annotation["category"]}
  region = Region(region_id, box, annotation["label"], extra)
  try:
    return validate(dataclasses.replace(record, regions=(region,))).regions[0]
  except DataError:
    size = f"{record.width}x{record.height}"
    raise DataError(f"{place}: bbox {bbox} is outside the {size} image {record.image}") from None


# ---- reading the json ----


def _read(path: Path | str, keys: tuple[str, ...]) -> dict:
  try:
    data = Path(path).read_bytes()
  except OSError as error:
    raise DataError(f"{path}: cannot be read ({error.strerror}); check the path") from None
  try:
    content = json.loads(data.decode(), object_hook=_without_mask)
  except UnicodeDecodeError:
    raise DataError(f"{path}: not UTF-8 text; is this the COCO json file?") from None
  except (ValueError, RecursionError) as error:
    raise DataError(f"{path}: not whole JSON ({error}); fetch the file again") from None
  for key in keys:
    if not isinstance(content, dict) or not isinstance(content.get(key), list):
      raise DataError(f"{path}: key {key!r} is missing or not a list; is this a COCO file?")
  return content


def _without_mask(row: dict) -> dict:
  # Outlines are nine tenths of COCO's instances files, and not used here.
  row.pop("segmentation", None)
  return row


def _rows(content: dict, path: Path | str, key: str):
  """(place for errors, row) of a list in the file."""
  for number, row in enumerate(content[key]):
    place = f"{path}: {key}[{number}]"
    if not isinstance(row, dict):
      raise DataError(f"{place}: expected an object, got {row!r:.60}")
    yield place, row


def _get(row: dict, key: str, kind: type, place: str):
  if key not in row:
    raise DataError(f"{place}: key {key!r} is missing")
  if type(row[key]) is not kind:
    raise DataError(f"{place}: key {key!r} is {row[key]!r:.60}, not {_KINDS[kind]}")
  return row[key]
