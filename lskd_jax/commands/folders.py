"""What stage folders know beside their records: where the images are, and which cut was chosen."""
from collections.abc import Iterator
import contextlib
import filecmp
import itertools
import json
import os
from pathlib import Path

from data_pipeline import stages
from data_pipeline.records import DataError, ImageRecord

CUT = "cut.json"  # {"cut": the score to read with, ...} in the folder that `corpus filter` writes


def note_images(folder: Path, root: Path | None) -> None:
  """Notes in a finished stage's summary where its images are; near ones relatively, so that the
  folders can be moved together."""
  if root is None:
    return
  near = root.absolute().is_relative_to(folder.absolute().parent)
  noted = os.path.relpath(root, folder) if near else str(root.absolute())
  summary = stages.read_summary(folder)
  if summary.get("images") != noted:
    stages.write_json(folder / "summary.json", {**summary, "images": noted})


def image_root(folder: Path, given: Path | None = None, needed: bool = True) -> Path | None:
  """The image root of a stage folder: the one given, else the one noted there."""
  if given is not None:
    if not given.is_dir():
      raise DataError(f"--images {given}: is not a folder; give the one with the pictures")
    return given
  noted = stages.read_summary(folder).get("images")
  if noted is None:
    if needed:
      raise DataError(f"{folder}: does not say where its images are; give --images DIR")
    return None
  root = Path(os.path.normpath(folder / noted))
  if needed and not root.is_dir():
    raise DataError(f"{root}: the images noted in {folder} are not there; give --images DIR")
  return root


class Records:
  """The records of a stage folder, counted, and read anew each time they are iterated."""

  def __init__(self, folder: Path):
    self.shards = stages.open_shards(folder)

  def __len__(self) -> int:
    return sum(len(shard) for shard in self.shards)

  def __iter__(self) -> Iterator[ImageRecord]:
    return itertools.chain.from_iterable(self.shards)


def cut_of(folder: Path) -> float | None:
  """The cut that was chosen for a corpus, or None."""
  try:
    return float(json.loads((folder / CUT).read_bytes())["cut"])
  except FileNotFoundError:
    return None
  except (ValueError, LookupError, TypeError):
    raise DataError(f"{folder / CUT}: cannot be read; run `lskd corpus filter` again") from None


def built_folder(folder: Path) -> Path:
  """The one built dataset in a folder: itself, or below it as `corpus build` lays it out."""
  patterns = ("", "*/", "*/*/", "*/*/*/")
  found = [path.parent for p in patterns for path in folder.glob(f"{p}dataset_info.json")]
  if len(found) == 1:
    return found[0]
  if not found:
    raise DataError(f"{folder}: holds no built corpus; run `lskd corpus build` first")
  raise DataError(f"{folder}: holds several built corpora; give one of them, such as {found[0]}")


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
  """Gives a draft to write, which then appears as `path`, whole.

  A file in that place stays if it is the same; another one is never overwritten, since a person may
  have filled it in: DataError.
  """
  path.parent.mkdir(parents=True, exist_ok=True)
  draft = path.with_name(f".{path.stem}.partial{path.suffix}")
  try:
    yield draft
    if path.exists() and not filecmp.cmp(path, draft, shallow=False):
      raise DataError(f"{path}: is there with other content; give another --out, or delete it")
    draft.replace(path)
  finally:
    draft.unlink(missing_ok=True)


def rejections(number: int, listed: Path | str) -> str:
  """The line that tells how much was left out, and where it is listed."""
  return f"  rejected: {number}" + (f", with reasons in {listed}" if number else "")


def say_what_came(summary: dict, out: Path, *following: str) -> None:
  """Prints a finished stage's counts, where what it left out is listed, and what comes next."""
  print(f"{summary['stage']}: {summary['records']} images, {summary['regions']} regions, "
        f"{summary['statements']} statements in {out}")
  print(rejections(summary["rejected"], f"{out}/rejected-*.jsonl"))
  for line, command in zip(("  next: ", "        "), following):
    print(line + command)
