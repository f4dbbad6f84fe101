"""Folders that appear whole or not at all, and can be checked later.

manifest.json in such a folder tells the size and sha256 of every file, and what the files hold.
"""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import errno
import hashlib
import json
import os
from pathlib import Path
import shutil

from data_pipeline import stages
from data_pipeline.records import DataError

NAME = "manifest.json"


def describe_files(folder: Path) -> dict[str, dict]:
  """{file name: {"bytes", "sha256"}} of the files in a folder, in order of name."""
  names = sorted(path.name for path in folder.iterdir() if path.is_file() and path.name != NAME)
  return {
    name: {"bytes": (folder / name).stat().st_size, "sha256": sha256(folder / name)}
    for name in names
  }


def write_manifest(folder: Path, contents: dict) -> None:
  """Writes the manifest of a folder: `contents`, and "files" for everything in it so far."""
  manifest = {**contents, "files": describe_files(folder)}
  (folder / NAME).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> dict:
  """The manifest of a folder; DataError where it is missing or unreadable."""
  try:
    manifest = json.loads((folder / NAME).read_bytes())
    if isinstance(manifest, dict) and isinstance(manifest.get("files"), dict):
      return manifest
  except (OSError, ValueError):
    pass
  raise DataError(f"{folder / NAME}: missing or unreadable; build or copy the folder again")


def verify(folder: Path, contents: bool = True) -> dict:
  """Checks every file against the manifest and returns it; DataError names the first bad file.

  contents: False compares only that the files are there with the right size, without reading them.
  """
  manifest = read_manifest(folder)
  for name, expected in manifest["files"].items():
    path = folder / name
    if not path.is_file():
      raise DataError(f"{path}: missing; build or copy the folder again")
    size = path.stat().st_size
    if size != expected["bytes"]:
      fault = f"has {size} bytes, its manifest says {expected['bytes']}"
      raise DataError(f"{path}: {fault}; build or copy the folder again")
    if contents and sha256(path) != expected["sha256"]:
      raise DataError(f"{path}: does not match its sha256; build or copy the folder again")
  return manifest


def sha256(path: Path) -> str:
  """The sha256 of a file, in hexadecimal."""
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def new_folder(final: Path, overwrite: bool) -> Iterator[Path]:
  """Gives an empty folder to fill, and renames it to `final` when the block is done.

  It has to get a manifest. A folder that is in place already stays if its manifest is the same and
  its files are whole; otherwise it is replaced, or a DataError if `overwrite` is False. DataError
  too where another process fills the same folder, or the disk is full. A process killed within the
  block leaves `incomplete.<name>` beside `final`, which the next one removes.
  """
  folder = final.parent
  work, old = (final.with_name(f"{kind}.{final.name}") for kind in ("incomplete", "replaced"))
  with _writing(final):
    folder.mkdir(parents=True, exist_ok=True)
    with stages.locked(folder):
      if old.exists() and not final.exists():
        old.rename(final)  # a process ended between the two renames below
      shutil.rmtree(old, ignore_errors=True)
      shutil.rmtree(work, ignore_errors=True)
      try:
        work.mkdir()
        yield work
        for path in work.iterdir():
          _flush(path)
        if not final.exists():
          work.rename(final)
        elif overwrite:
          final.rename(old)
          work.rename(final)
          shutil.rmtree(old, ignore_errors=True)
        elif not _same(final, work):
          fault = "holds another dataset, or a damaged one"
          raise DataError(f"{final}: {fault}; delete it, overwrite it, or use another folder")
      finally:
        shutil.rmtree(work, ignore_errors=True)


def _same(final: Path, work: Path) -> bool:
  with contextlib.suppress(DataError):
    return verify(final) == read_manifest(work)
  return False


def _flush(path: Path) -> None:
  with path.open("rb") as file:
    os.fsync(file.fileno())


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
  """Says in one line what the system refuses. ArrayRecordWriter raises RuntimeError for it."""
  try:
    yield
  except (OSError, RuntimeError) as error:
    text = str(error)
    if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in text:
      raise DataError(f"{path}: the disk is full; free some space and run again") from error
    if isinstance(error, OSError):
      raise DataError(f"{path}: cannot be written ({error.strerror}); check the folder") from error
    raise
