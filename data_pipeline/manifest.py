"""manifest.json: the size and sha256 of every file in a folder, and what the files hold."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

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
