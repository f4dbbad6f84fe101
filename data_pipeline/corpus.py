"""Random access to a corpus: record i and the bytes of its image.

A corpus is a built `lck` folder, a stage folder with an image root, or records in memory. The score
threshold is a view: `min_score` hides statements while reading, and no file is ever copied for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
import dataclasses
from dataclasses import dataclass
import json
import os
from pathlib import Path, PurePosixPath

from data_pipeline import stages
from data_pipeline.manifest import verify
from data_pipeline.records import DataError, ImageRecord, record_from_json, statement_mentions

# Corpora of at most this many images keep their parsed records in memory (a few KB each).
CACHED_RECORDS = 20_000

# Versions of the built dataset that this code reads; the builder writes the last one.
DATASET = "lck"
READABLE_VERSIONS = ("1.0.0",)


@dataclass(frozen=True)
class Outline:
  """How many texts an image has, so that a loader can skip images without reading them.

  statements: (number of regions mentioned, score) of every statement with an answer.
  """

  statements: tuple[tuple[int, float | None], ...] = ()
  captions: int = 0
  descriptions: int = 0


def outline(record: ImageRecord) -> Outline:
  """The Outline of a record."""
  words = record.verbalization
  return Outline(
    tuple((len(statement_mentions(s)), s.score) for s in record.statements if s.answer.strip()),
    sum(bool(caption.strip()) for caption in words.captions),
    sum(bool(text.strip()) for text in words.local.values()),
  )


class Corpus:
  """Images with their records, by row 0..len-1. Reading is thread-safe.

  `name` is where it comes from, for messages. Statements that score below `min_score`, or that have
  no score, are absent from its records where `min_score` is given.
  """

  def __init__(
    self,
    size: int,
    read_record: Callable[[int], ImageRecord],
    read_image: Callable[[int], bytes],
    name: str,
    min_score: float | None = None,
    outlines: Sequence[Outline] | None = None,
  ):
    if size == 0:
      raise DataError(f"{name}: the corpus is empty; check the stage before it")
    self.name = name
    self.min_score = min_score
    self._size = size
    self._read_record = read_record
    self._read_image = read_image
    self._outlines = outlines
    self._cache: dict[int, ImageRecord] | None = {} if size <= CACHED_RECORDS else None

  def __len__(self) -> int:
    return self._size

  def record(self, row: int) -> ImageRecord:
    """The record in row 0 <= row < len, with only the statements that `min_score` lets through."""
    if self._cache is not None and row in self._cache:
      return self._cache[row]
    record = self._read_record(self._checked(row))
    kept = tuple(s for s in record.statements if self._shows(s.score))
    record = dataclasses.replace(record, statements=kept)
    if self._cache is not None:
      self._cache[row] = record
    return record

  def image_bytes(self, row: int) -> bytes:
    """The image file of a row, as stored (PNG or JPEG). DataError where it cannot be read."""
    return self._read_image(self._checked(row))

  def outline(self, row: int) -> Outline:
    """How many texts `record(row)` has; in a built corpus, without reading it."""
    if self._outlines is None:
      return outline(self.record(row))
    found = self._outlines[self._checked(row)]
    kept = tuple(pair for pair in found.statements if self._shows(pair[1]))
    return dataclasses.replace(found, statements=kept)

  def _shows(self, score: float | None) -> bool:
    return self.min_score is None or (score is not None and score >= self.min_score)

  def _checked(self, row: int) -> int:
    if not 0 <= row < self._size:
      raise IndexError(f"row {row} of a corpus of {self._size} images")
    return row


def open_corpus(
  path: str | Path,
  image_root: str | Path | None = None,
  min_score: float | None = None,
  split: str | None = "train",
) -> Corpus:
  """Opens a built `lck` folder, or a stage folder or jsonl file of records.

  image_root: what the records' paths are relative to; a built folder holds its images itself.
  min_score: hides statements that score less, or were never scored. split: the images of one split;
  None means all of them.
  DataError: the folder is missing, unfinished, damaged, of another version, or has no such image.
  """
  path = Path(path)
  if (path / "dataset_info.json").exists():
    return _open_lck(path, min_score, split)
  if path.is_dir() and not (path / "stage.json").exists():
    nested = (f"{'*/' * depth}dataset_info.json" for depth in (1, 2, 3))
    built = [found.parent for pattern in nested for found in path.glob(pattern)]
    if built:
      raise DataError(f"{path}: holds built corpora; give one of them, such as {built[0]}")
  return _open_jsonl(path, image_root, min_score, split)


def corpus_of(
  records: Sequence[ImageRecord],
  image_root: str | Path | None = None,
  min_score: float | None = None,
  name: str = "records in memory",
) -> Corpus:
  """A corpus over records in memory; `image_root` is needed only where pixels are read."""

  def read_image(row: int) -> bytes:
    return read_image_file(image_root, records[row].image, name)

  return Corpus(len(records), records.__getitem__, read_image, name, min_score)


def read_image_file(image_root: str | Path | None, image: str, name: str) -> bytes:
  """The bytes of an image below `image_root`. DataError for a missing file or a path out of it."""
  if image_root is None:
    raise DataError(f"{name}: holds no images; give the image root that {image} is relative to")
  path = PurePosixPath(image)
  if path.is_absolute() or ".." in path.parts:
    raise DataError(f"{name}: image path {image!r} leads out of the image root; make it relative")
  try:
    return (Path(image_root) / path).read_bytes()
  except (OSError, ValueError) as error:  # ValueError: a path with a null character
    fault = getattr(error, "strerror", None) or error
    raise DataError(f"{Path(image_root) / path}: {fault}; check the image root") from None


# ---- a stage folder ----


def _open_jsonl(path: Path, image_root, min_score, split) -> Corpus:
  """A corpus over lines of jsonl files, found by their offsets: only small ones stay in memory."""
  files = [path] if path.is_file() else [shard.path for shard in stages.open_shards(path)]
  handles = [file.open("rb") for file in files]
  found = [line for k, file in enumerate(files) for line in _lines(k, file)]
  lines = [line for line, name in found if split in (None, name)]
  if found and not lines:
    raise DataError(_no_split(path, split, {name for _, name in found}))

  def read_record(row: int) -> ImageRecord:  # pread: threads share a file, not a position in it
    k, start, length = lines[row]
    return record_from_json(json.loads(os.pread(handles[k].fileno(), length, start)))

  def read_image(row: int) -> bytes:
    return read_image_file(image_root, corpus.record(row).image, corpus.name)

  corpus = Corpus(len(lines), read_record, read_image, _name(path, split), min_score)
  return corpus


def _lines(k: int, file: Path) -> Iterator[tuple[tuple[int, int, int], str]]:
  """(k, start, length) and split of each record in a jsonl file."""
  start = 0
  with file.open("rb") as lines:
    for number, line in enumerate(lines, start=1):
      if line.strip():
        try:
          row = json.loads(line)
          split = row.get("split", "train")
        except (ValueError, AttributeError):
          fault = "not a whole JSON object (half-written?)"
          raise DataError(f"{file}:{number}: {fault}; mend or delete the line") from None
        yield (k, start, len(line)), split
      start += len(line)


def _no_split(path: Path, split: str, known) -> str:
  return f"{path}: has no split {split!r}; choose from {sorted(known)}"


def _name(path: Path, split: str | None) -> str:
  return f"{path} (split {split!r})" if split else str(path)


# ---- a built folder ----


def _open_lck(path: Path, min_score, split) -> Corpus:
  # Imported here: a stage folder needs nothing of TFDS, and the import takes a second.
  import tensorflow_datasets as tfds
  from tensorflow_datasets.proto import tf_example_pb2

  _check_version(path)
  manifest = verify(path, contents=False)
  splits = list(manifest["splits"]) if split is None else [split]
  for name in splits:
    if name not in manifest["splits"]:
      raise DataError(_no_split(path, name, manifest["splits"]))
  source = tfds.builder_from_directory(str(path)).as_data_source(
    "+".join(splits), deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES
  )

  def feature(row: int, name: str) -> bytes:
    example = tf_example_pb2.Example.FromString(source[row])
    return example.features.feature[name].bytes_list.value[0]

  return Corpus(
    len(source),
    lambda row: record_from_json(json.loads(feature(row, "record"))),
    lambda row: feature(row, "image"),
    _name(path, split),
    min_score,
    [_outline_from_json(line) for name in splits for line in (path / f"index-{name}.jsonl").open()],
  )


def _outline_from_json(line: str) -> Outline:
  row = json.loads(line)
  return Outline(tuple(map(tuple, row["statements"])), row["captions"], row["descriptions"])


def _check_version(path: Path) -> None:
  try:
    info = json.loads((path / "dataset_info.json").read_bytes())
    name, version = info["name"], info["version"]
  except (OSError, ValueError, LookupError, TypeError):
    raise DataError(f"{path}: dataset_info.json cannot be read; build or copy it again") from None
  if name != DATASET:
    raise DataError(f"{path}: is the dataset {name!r}, not {DATASET!r}; give a built corpus")
  if version not in READABLE_VERSIONS:
    ours = ", ".join(READABLE_VERSIONS)
    raise DataError(f"{path}: has version {version}, this code reads {ours}; build it again")
