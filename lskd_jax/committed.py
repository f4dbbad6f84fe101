"""Which steps of a run count: those whose folder has COMMITTED.json, the last file written into it.

Orbax's own list does not serve. It names a step from the start of its save, keeps it when the save
fails, and takes a folder whose copy was cut off for complete.
"""
import hashlib
import json
import math
import os
from pathlib import Path
import shutil

from etils import epath

from lskd_jax import exit_codes, trees
from lskd_jax.trees import CheckpointError, one_line

MARKER = "COMMITTED.json"
UNMARKED = f"it has no {MARKER}: its save or its copy was cut off"
DELETED = ".deleted"  # the ending of a folder on its way out


class FirstSaveLostError(CheckpointError):
  """The run was ended in its first save; it begins anew when it is started again."""
  exit_code = exit_codes.PREEMPTED


def folders(directory: epath.Path) -> list[int]:
  """All steps that have a folder, committed or not, oldest first."""
  return sorted(int(p.name) for p in directory.iterdir() if p.name.isdigit())


def steps(directory: epath.Path) -> list[int]:
  """The committed steps, oldest first."""
  return [step for step in folders(directory) if (directory / str(step) / MARKER).exists()]


def digest(value) -> str:
  """sha256 of a JSON value, the same for any order of its keys."""
  return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def commit(folder: epath.Path, marker: dict) -> None:
  """Writes the marker of a step that is completely on disk; it appears whole or not at all.

  Args:
    folder: the step's.
    marker: what it says. The names and sizes of the folder's files are added, so that a copy that
      was cut off is noticed without reading the arrays.
  """
  _mark(folder, marker | {"files": _files(folder)})
  _sync(folder.parent)


def add_metrics(folder: epath.Path, metrics: dict[str, float]) -> None:
  """Writes the marker of a committed step anew, with more metrics."""
  marker = json.loads((folder / MARKER).read_text())
  marker["metrics"] |= {name: float(value) for name, value in metrics.items()}
  _mark(folder, marker)


def _mark(folder: epath.Path, marker: dict) -> None:
  write_whole(folder / MARKER, json.dumps(marker, indent=1, sort_keys=True) + "\n")


def write_whole(path: epath.Path, text: str) -> None:
  """Writes a file that is on disk, under its name and whole, when this returns."""
  partial = path.parent / f"{path.name}.partial"
  with partial.open("w") as file:
    file.write(text)
    file.flush()
    os.fsync(file.fileno())
  partial.replace(path)
  _sync(path.parent)


def _sync(folder: epath.Path) -> None:
  handle = os.open(folder, os.O_RDONLY)
  try:
    os.fsync(handle)
  finally:
    os.close(handle)


def _files(folder: epath.Path) -> dict[str, int]:
  """{name: bytes} of a step's files."""
  return {str(path.relative_to(folder)): path.stat().st_size for path in Path(folder).rglob("*")
          if path.is_file() and not path.name.startswith(MARKER)}


def examine(folder: epath.Path, marked: bool = True) -> tuple[dict | None, str | None]:
  """(what `save` wrote about a step, None), or (None, why the step cannot be used).

  All but the arrays is checked here.

  Args:
    folder: the step's.
    marked: whether it must have a marker.
  """
  try:
    if marked:
      marker = json.loads((folder / MARKER).read_text())
      found = _files(folder)
      wrong = [name for name, size in marker["files"].items() if found.get(name) != size]
      if wrong:
        return None, f"files are missing or have another size: {trees.listed(wrong)}"
    about = trees.read_about(folder)
    if marked and digest(about) != marker["manifest"]:
      return None, f"its manifest is not the one that {MARKER} was written for"
  except FileNotFoundError:
    return None, UNMARKED
  except Exception as error:
    return None, f"what was written about it cannot be read: {one_line(error)}"
  return about, None


def superfluous(directory: epath.Path, keep: int, keep_best: int, metric: str, mode: str) -> list[int]:
  """The committed steps that are neither among the newest `keep` nor the best `keep_best`.

  Args:
    metric: the name among the metrics of a save; steps that lack it, or whose value is not finite,
      are not among the best. Of equal values the newest counts.
    mode: "min" or "max", whichever is better.
  """
  found = steps(directory)
  kept = set(found[-keep:])
  if keep_best:
    sign = 1 if mode == "min" else -1
    values = {step: _metrics(directory / str(step)).get(metric) for step in found}
    ranked = sorted((sign * value, -step) for step, value in values.items()
                    if value is not None and math.isfinite(value))
    kept |= {-step for _, step in ranked[:keep_best]}
  return [step for step in found if step not in kept]


def _metrics(folder: epath.Path) -> dict:
  try:
    return json.loads((folder / MARKER).read_text())["metrics"]
  except (OSError, ValueError, KeyError):
    return {}  # damaged; a restore would say so


def delete(folder: epath.Path) -> None:
  """Deletes a step. Killed in between, it leaves nothing that looks like one."""
  (folder / MARKER).unlink()  # first: not every file system renames a folder at once
  going = folder.parent / f"{folder.name}{DELETED}"
  folder.rename(going)
  going.rmtree()


def clean(directory: epath.Path) -> None:
  """Removes what killed saves and deletions have left; files may be going at the same time."""
  for path in directory.iterdir():
    if path.name.endswith(DELETED) or ".orbax-checkpoint-tmp" in path.name:
      shutil.rmtree(path, ignore_errors=True)


def move_aside(folder: epath.Path, damaged: epath.Path) -> None:
  """Moves a step to the folder `damaged`, under a name that is free there: 7, 7-2, 7-3, ..."""
  damaged.mkdir(parents=True, exist_ok=True)
  name, number = folder.name, 1
  while (damaged / name).exists():
    number += 1
    name = f"{folder.name}-{number}"
  folder.rename(damaged / name)
