"""Writes the TFDS dataset `lck`, and publishes it.

    <out_dir>/lck/<config>/1.0.0/
      lck-train.array_record-00000-of-00002 …   the examples, one per image
      features.json, dataset_info.json          what TFDS needs to read them
      index-train.jsonl                         how many texts each image has, in the same order
      rejected.jsonl                            images left out, each with its reason
      manifest.json                             counts, and the sha256 of every file above

The shards are written here and described to TFDS, rather than by a `GeneratorBasedBuilder`, because
that one serialises map fields in random order: no two builds of the same data have the same bytes,
so a checksum would mean nothing. The same records and images give the same folder, byte for byte.
A build is written under another name and renamed when it is whole. It cannot resume (the expensive
stages before it can), but a killed one leaves nothing that the next would trip over.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
import contextlib
import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
import re
import shutil
import sys

from array_record.python.array_record_module import ArrayRecordWriter
import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core.example_serializer import ExampleSerializer
from tqdm import tqdm

from data_pipeline import images
from data_pipeline.corpus import READABLE_VERSIONS, outline, read_image_file
from data_pipeline.manifest import NAME as MANIFEST, new_folder, verify, write_manifest
from data_pipeline.records import DataError, ImageRecord, check_split, record_to_json, to_line, validate

NAME = "lck"
VERSION = READABLE_VERSIONS[-1]

# About 350 MB of photographs: large enough for cloud storage, small enough to shuffle by file.
IMAGES_PER_SHARD = 4096


def features() -> tfds.features.FeaturesDict:
  """The features of one example; README.md beside this file explains them."""
  text, number = tfds.features.Text, tfds.features.Scalar
  return tfds.features.FeaturesDict({
    "image": tfds.features.Image(shape=(None, None, 3)),
    "image_id": number(np.int64),
    "path": text(),
    "width": number(np.int32),
    "height": number(np.int32),
    "split": text(),
    "region_ids": tfds.features.Tensor(shape=(None,), dtype=np.int64),
    "region_boxes": tfds.features.Tensor(shape=(None, 4), dtype=np.float32),
    "region_labels": tfds.features.Sequence(text()),
    "statements": tfds.features.Sequence({
      "index": text(),
      "question": text(),
      "answer": text(),
      "rationale": text(),
      "score": np.float32,
      "source": text(),
      "teacher": text(),
    }),
    "record": text(),
  })  # fmt: skip


def to_example(record: ImageRecord, data: bytes) -> dict:
  """The example of one record; `data` are the bytes of its image file."""
  texts = ("index", "question", "answer", "rationale", "source", "teacher")
  statements = {name: [_utf8(getattr(s, name)) for s in record.statements] for name in texts}
  scores = [np.nan if s.score is None else s.score for s in record.statements]
  boxes = [region.box for region in record.regions]
  return {
    "image": data,
    "image_id": record.image_id,
    "path": _utf8(record.image),
    "width": record.width,
    "height": record.height,
    "split": record.split,
    "region_ids": np.array([region.id for region in record.regions], np.int64),
    "region_boxes": np.array(boxes, np.float32).reshape(-1, 4),
    "region_labels": [_utf8(region.label) for region in record.regions],
    "statements": {**statements, "score": scores},
    "record": to_line(record_to_json(record)).rstrip(b"\n"),
  }


def build_lck(
  records: Iterable[ImageRecord],
  image_root: str | Path,
  out_dir: str | Path,
  config_name: str = "default",
  images_per_shard: int = IMAGES_PER_SHARD,
  overwrite: bool = False,
  progress: bool = True,
) -> Path:
  """Writes `records` with their images as a TFDS dataset; returns its folder.

  Images keep their order and their bytes. An image that is missing, damaged, not PNG or JPEG, of
  another size than recorded, or listed twice is left out with its reason, as is a record that
  `validate` refuses. If the same dataset is there already, nothing changes.
  DataError: no image is left, another dataset is there and `overwrite` is False, another build is
  writing to the folder, or the disk is full.
  """
  if not re.fullmatch(r"[A-Za-z0-9_.-]+", config_name):
    raise DataError(f"config_name {config_name!r}: use letters, digits, '_', '.' and '-'")
  folder = Path(out_dir) / NAME / config_name
  with new_folder(folder / VERSION, overwrite) as work:
    contents = _write_examples(records, Path(image_root), work, images_per_shard, progress)
    manifest = {"dataset": NAME, "config": config_name, "version": VERSION, **contents}
    write_manifest(work, manifest)
  return folder / VERSION


# ---- writing ----


def _write_examples(
  records: Iterable[ImageRecord],
  image_root: Path,
  work: Path,
  images_per_shard: int,
  progress: bool,
) -> dict:
  """Writes everything but the manifest into `work`; returns what the manifest tells about it."""
  schema = features()
  serializer = ExampleSerializer(schema.get_serialized_info())
  tally = _Tally()
  seen: set[str] = set()
  first_reason = ""  # told where nothing is left, since then rejected.jsonl is not left either
  total = len(records) if hasattr(records, "__len__") else None
  with contextlib.ExitStack() as stack:
    splits: dict[str, _Split] = {}
    rejected = stack.enter_context((work / "rejected.jsonl").open("wb"))
    every = 0.5 if sys.stderr.isatty() else 30.0  # seconds between lines in a log file
    bar = tqdm(records, "build", total, unit="image", disable=not progress, mininterval=every)
    for record in bar:
      try:
        if record.image in seen:
          raise DataError(f"{record.image}: is in the records twice; merge the two")
        record, data = _read(record, image_root)
        encoded = schema.encode_example(to_example(record, data))
        example = serializer.get_tf_example(encoded).SerializeToString(deterministic=True)
      except (DataError, OverflowError) as error:
        tally.rejected += 1
        first_reason = first_reason or f"; the first: {error}"
        rejected.write(to_line({"reason": str(error), "where": record.image}))
        continue
      seen.add(record.image)
      if record.split not in splits:
        split = _Split(work, record.split, images_per_shard)
        splits[record.split] = stack.enter_context(contextlib.closing(split))
      splits[record.split].add(example, record)
      tally.add(record)
  if not splits:
    raise DataError(f"no image to build from ({tally.rejected} rejected){first_reason}")
  _describe(work, [splits[name].finish() for name in sorted(splits)])
  return tally.contents()


def _read(record: ImageRecord, image_root: Path) -> tuple[ImageRecord, bytes]:
  """The checked record, with its size filled in, and the bytes of its image. DataError says why
  it cannot be in the dataset."""
  check_split(record.split)
  data = read_image_file(image_root, record.image, str(image_root))
  if not data.startswith((b"\xff\xd8\xff", b"\x89PNG")):
    raise DataError(f"{record.image}: is not a PNG or JPEG file; convert it")
  height, width = images.decode(data, name=record.image).shape[:2]
  if not record.width and not record.height:
    record = dataclasses.replace(record, width=width, height=height)
  if (record.width, record.height) != (width, height):
    said = f"{record.width}x{record.height}"
    raise DataError(f"{record.image}: is {width}x{height}, its record says {said}; mend the record")
  return validate(record), data


class _Split:
  """The shards of one split, and its index, while they are written."""

  def __init__(self, work: Path, name: str, images_per_shard: int):
    self.work, self.name, self.images_per_shard = work, name, images_per_shard
    self.lengths: list[int] = []
    self.bytes = 0
    self._writer = None
    self._index = (work / f"index-{name}.jsonl").open("wb")

  def add(self, example: bytes, record: ImageRecord) -> None:
    if not self.lengths or self.lengths[-1] == self.images_per_shard:
      self._close_shard()
      # group_size:1 is what random access needs: one example per compressed block.
      self._writer = ArrayRecordWriter(str(self._path(len(self.lengths))), "group_size:1")
      self.lengths.append(0)
    self._writer.write(example)
    self._index.write(to_line(dataclasses.asdict(outline(record))))
    self.lengths[-1] += 1
    self.bytes += len(example)

  def close(self) -> None:
    self._close_shard()
    self._index.close()

  def finish(self) -> tfds.core.SplitInfo:
    """Gives the shards their final names, which hold their number."""
    for k in range(len(self.lengths)):
      self._path(k).rename(self._path(k, len(self.lengths)))
    return tfds.core.SplitInfo(
      name=self.name,
      shard_lengths=self.lengths,
      num_bytes=self.bytes,
      filename_template=tfds.core.ShardedFileTemplate(
        data_dir=self.work, dataset_name=NAME, split=self.name, filetype_suffix="array_record"
      ),
    )

  def _close_shard(self) -> None:
    writer, self._writer = self._writer, None
    if writer:
      writer.close()

  def _path(self, k: int, shards: int | None = None) -> Path:
    end = f"-of-{shards:05d}" if shards else ""
    return self.work / f"{NAME}-{self.name}.array_record-{k:05d}{end}"


@dataclass
class _Tally:
  """Counts for the manifest, and from there for the dataset card."""

  rejected: int = 0
  splits: dict[str, Counter] = field(default_factory=dict)
  teachers: Counter = field(default_factory=Counter)
  sources: Counter = field(default_factory=Counter)
  licences: Counter = field(default_factory=Counter)

  def add(self, record: ImageRecord) -> None:
    counts = self.splits.setdefault(record.split, Counter())
    scored = sum(statement.score is not None for statement in record.statements)
    counts.update(images=1, regions=len(record.regions), statements=len(record.statements))
    counts.update(scored=scored)
    self.teachers.update(statement.teacher or "unknown" for statement in record.statements)
    self.sources.update(statement.source or "unknown" for statement in record.statements)
    self.licences[str(record.extra.get("licence") or "not recorded")] += 1

  def contents(self) -> dict:
    return {
      "splits": {name: dict(counts) for name, counts in sorted(self.splits.items())},
      "rejected": self.rejected,
      "teachers": dict(sorted(self.teachers.items())),
      "sources": dict(sorted(self.sources.items())),
      "licences": dict(sorted(self.licences.items())),
    }


def _describe(work: Path, splits: list[tfds.core.SplitInfo]) -> None:
  """Writes features.json and dataset_info.json."""
  here = Path(__file__).parent
  tfds.folder_dataset.write_metadata(
    data_dir=work,
    features=features(),
    split_infos=splits,
    version=VERSION,
    check_data=False,  # it would read through TensorFlow
    description=(here / "README.md").read_text(encoding="utf-8"),
    citation=(here / "CITATIONS.bib").read_text(encoding="utf-8"),
  )


def _utf8(text: str) -> bytes:
  """Text as bytes; half a surrogate pair becomes "?" (the `record` feature keeps it)."""
  return text.encode("utf-8", "replace")


# ---- publishing ----


def publish_lck(
  built: str | Path,
  destination: str | Path,
  image_source: str = "",
  image_licence: str = "",
  critic: str = "",
  threshold: float | None = None,
  notes: str = "",
  overwrite: bool = False,
) -> Path:
  """Copies a built dataset to `destination`/lck/<config>/<version> with a dataset card.

  Every byte is checked against the manifest on the way. The card, README.md, tells the counts, who
  wrote the statements (from the records), and what is given here: where the images come from and
  their licence, the critic, the recommended threshold, and notes in Markdown.
  DataError for a damaged source, or another dataset in the place and `overwrite` False.
  """
  built = Path(built)
  manifest = verify(built)
  folder = Path(destination) / NAME / manifest["config"]
  with new_folder(folder / manifest["version"], overwrite) as work:
    for name in [*manifest["files"], MANIFEST]:
      shutil.copyfile(built / name, work / name)
    verify(work)
  # Last, and again on a rerun, so that the card of what is published already can be mended.
  card = _card(manifest, image_source, image_licence, critic, threshold, notes)
  draft = folder / "README.md.partial"
  draft.write_text(card, encoding="utf-8")
  return draft.replace(folder / manifest["version"] / "README.md").parent


def _card(manifest, image_source, image_licence, critic, threshold, notes) -> str:
  """The dataset card in Markdown. What nobody said is written down as unknown, not left out."""
  unknown = "not stated by the publisher"
  recorded = _table("images", manifest["licences"])
  rows = [
    f"| {name} | {c['images']} | {c['regions']} | {c['statements']} | {c['scored']} |"
    for name, c in manifest["splits"].items()
  ]
  return f"""# {NAME}: {manifest["config"]}, version {manifest["version"]}

{(Path(__file__).parent / "README.md").read_text(encoding="utf-8").strip()}

## Counts

| split | images | regions | statements | scored |
|---|---|---|---|---|
{chr(10).join(rows)}

Left out while building, with reasons in `rejected.jsonl`: {manifest["rejected"]} images.

## Licences

The images come from: {image_source or unknown}. Their licence: {image_licence or unknown}.
This dataset grants no rights in the images beyond that. Licences written in the records:

{recorded}

## Who wrote the statements

{_table("statements", manifest["teachers"], "teacher")}

{_table("statements", manifest["sources"], "prompt variant")}

## Scores

Critic: {critic or unknown}. Recommended threshold: {unknown if threshold is None else threshold}.
Scores are kept for every statement, so another threshold needs no other download.

{notes}
"""


def _table(counted: str, counts: dict[str, int], of: str = "licence") -> str:
  rows = [f"| {name} | {count} |" for name, count in counts.items()]
  return "\n".join([f"| {of} | {counted} |", "|---|---|", *rows])
