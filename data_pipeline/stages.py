"""Resumable stages: work over items, written shard by shard into a plain folder.

    summary = run_stage("verbalize", open_shards(source), describe, out, {"captioner": "blip2"})

A stage folder holds, for n shards:
  stage.json                         what made it: format, stage, options, inputs, shards
  shard-00000-of-0000n.jsonl         its records; a shard is finished when this file exists
  rejected-00000-of-0000n.jsonl      what was left out: {"reason", "where"} per line
  summary.json                       the counts; written last, so it marks a finished stage
Every file is written under another name, flushed to the disk and renamed, so a process killed at
any moment leaves only whole files, and running again goes on with the first unfinished shard.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
import contextlib
from dataclasses import dataclass
import errno
import fcntl
import hashlib
import json
import os
from pathlib import Path
import sys
import time

from tqdm import tqdm

from data_pipeline.records import (
  DataError,
  ImageRecord,
  read_jsonl,
  record_from_json,
  record_to_json,
  to_line,
)

FORMAT = 1
_PARTIAL = ".partial"  # the ending of a file that is still being written


@dataclass(frozen=True)
class Shard:
  """The records of one shard file, read anew each time it is iterated."""

  path: Path
  records: int

  def __len__(self) -> int:
    return self.records

  def __iter__(self) -> Iterator[ImageRecord]:
    for line, row in read_jsonl(self.path):
      try:
        yield record_from_json(row)
      except DataError as error:
        raise DataError(f"{self.path}:{line}: {error}") from None


def split_evenly(items: list, shards: int) -> list[list]:
  """`items` in order, as at most `shards` lists of nearly equal length, none of them empty."""
  shards = max(1, min(shards, len(items)))
  edges = [len(items) * k // shards for k in range(shards + 1)]
  return [items[start:end] for start, end in zip(edges, edges[1:], strict=False)]


def run_stage(
  name: str,
  items_by_shard: list,
  work: Callable,
  out: Path | str,
  options: dict,
  progress: bool = True,
  workers: int = 1,
  inputs: str = "",
) -> dict:
  """Runs `work` on every item and writes the results to the stage folder `out`; resumes if it can.

  items_by_shard: one entry per shard: a list, a `Shard`, or a function that returns the items.
  work: item -> an ImageRecord, a dict, a list of these, or None. A DataError it raises rejects the
    item; a DataError inside the returned list is one more rejected line beside the others.
  options: what besides the items decides the result (JSON values).
  workers: threads that work at once, for work that waits (an LLM). The order of the results, and
    so every byte, stays the same.
  inputs: names the items' origin where that cannot be seen from them (entries that are functions).

  Returns the summary: stage, shards, records, regions, statements, rejected. A stage that kept no
  record is run anew by the next call.
  DataError when the folder was made with other options or inputs, another process writes to it,
  or the disk is full; finished shards stay.
  """
  out = Path(out)
  with _write_errors(out):
    out.mkdir(parents=True, exist_ok=True)
  shards = len(items_by_shard)
  stage = {
    "format": FORMAT,
    "stage": name,
    "options": options,
    "inputs": inputs or fingerprint(items_by_shard),
    "shards": shards,
  }
  with locked(out):
    _claim(out, json.loads(json.dumps(stage, default=str)))
    _unfinish_if_empty(out)
    todo = [k for k in range(shards) if not _file(out, "shard", k, shards).exists()]
    if progress and len(todo) < shards:
      print(f"{name}: {shards - len(todo)} of {shards} shards were already done", file=sys.stderr)
    if not todo and (out / "summary.json").exists():
      return read_summary(out)
    with _bar(name, items_by_shard, todo, progress) as bar:
      for k in todo:
        items = items_by_shard[k]() if callable(items_by_shard[k]) else items_by_shard[k]
        _write_shard(out, k, shards, _results(work, items, workers), bar)
    summary = {"stage": name, "shards": shards, **_count(out, shards)}
    write_json(out / "summary.json", summary)
  return summary


def open_shards(folder: Path | str) -> list[Shard]:
  """The shards of a finished stage, to read or to give to the next stage.

  DataError when the folder is missing, unfinished, of another format, or holds no record.
  """
  folder = Path(folder)
  summary = read_summary(folder)
  if not summary["records"]:
    rejected = summary["rejected"]
    raise DataError(f"{folder}: holds no records ({rejected} rejected); see rejected-*.jsonl there")
  counts = summary["records_by_shard"]
  shards = [Shard(_file(folder, "shard", k, len(counts)), n) for k, n in enumerate(counts)]
  for shard in shards:
    if not shard.path.exists():
      raise DataError(f"{shard.path}: is missing; run stage {summary['stage']!r} again")
  return shards


def read_records(folder: Path | str) -> Iterator[ImageRecord]:
  """All records of a finished stage folder, or of one jsonl file of records. Errors as above."""
  folder = Path(folder)
  shards = [Shard(folder, 0)] if folder.is_file() else open_shards(folder)
  return (record for shard in shards for record in shard)


def count_records(folder: Path | str) -> int:
  """How many records `read_records` yields for a stage folder."""
  return sum(len(shard) for shard in open_shards(folder))


def read_summary(folder: Path | str) -> dict:
  """The summary of a finished stage; DataError when missing, unfinished or of another format."""
  folder = Path(folder)
  if not (folder / "stage.json").exists():
    fault = "is not a stage folder (no stage.json)" if folder.exists() else "does not exist"
    raise DataError(f"{folder}: {fault}; give the folder a stage was written to")
  stage = _read_json(folder / "stage.json")
  if stage.get("format") != FORMAT:
    found = stage.get("format")
    raise DataError(f"{folder}: has format {found}, this version reads {FORMAT}; make it again")
  if not (folder / "summary.json").exists():
    done = len(list(folder.glob("shard-*.jsonl")))
    state = f"stage {stage['stage']!r} is unfinished ({done} of {stage['shards']} shards)"
    raise DataError(f"{folder}: {state}; run it again, it goes on where it stopped")
  return _read_json(folder / "summary.json")


def write_json(path: Path | str, value) -> None:
  """Writes `value` as indented JSON, all of it or nothing. DataError when the disk is full."""
  path = Path(path)
  text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
  with _whole_files(path) as (file,), _write_errors(path):
    file.write(text.encode())


# ---- inside ----


def _file(folder: Path, kind: str, k: int, shards: int) -> Path:
  return folder / f"{kind}-{k:05d}-of-{shards:05d}.jsonl"


def _read_json(path: Path) -> dict:
  try:
    value = json.loads(path.read_bytes())
  except (OSError, ValueError):
    value = None
  if not isinstance(value, dict):
    raise DataError(f"{path}: cannot be read as a JSON object; delete the folder and run again")
  return value


def fingerprint(items_by_shard: list) -> str:
  """A hash of what the items say, as far as that can be seen without running anything."""
  digest = hashlib.sha256()
  for items in items_by_shard:
    if isinstance(items, Shard):
      with items.path.open("rb") as file:
        digest.update(hashlib.file_digest(file, "sha256").digest())
    elif isinstance(items, list | tuple | range):
      for item in items:
        value = record_to_json(item) if isinstance(item, ImageRecord) else item
        digest.update(json.dumps(value, default=lambda other: type(other).__name__).encode())
    digest.update(b"\n")
  return digest.hexdigest()[:16]


@contextlib.contextmanager
def locked(folder: Path, patience: float = 0.0) -> Iterator[None]:
  """Holds the folder against a second process; the system lets go of it when this one dies.

  patience: seconds to wait for a process that has it. Raises DataError if it still has it then.
  """
  handle = os.open(folder, os.O_RDONLY)
  end = time.monotonic() + patience
  while True:
    try:
      fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      if time.monotonic() < end:
        time.sleep(0.1)
        continue
      os.close(handle)
      raise DataError(f"{folder}: another process is writing to it; wait or end that one") from None
    except OSError:
      pass  # a file system without locks: go on as if alone
    break
  try:
    yield
  finally:
    os.close(handle)


def _claim(out: Path, stage: dict) -> None:
  """Writes stage.json, or checks that the folder was made by the same stage with the same data."""
  for left_over in out.glob(f"*.json*{_PARTIAL}"):
    left_over.unlink()
  if not (out / "stage.json").exists():
    return write_json(out / "stage.json", stage)
  found = _read_json(out / "stage.json")
  for key in stage:
    theirs, ours = found.get(key), stage[key]
    if theirs == ours:
      continue
    if key == "options" and isinstance(theirs, dict):
      keys = [k for k in {**theirs, **ours} if theirs.get(k) != ours.get(k)]
      theirs, ours = ({k: values.get(k) for k in keys} for values in (theirs, ours))
    advice = "give another --out, or delete the files in this folder; folders in it can stay"
    raise DataError(f"{out}: was made with {key} {theirs}, now asked for {ours}; {advice}")


def _unfinish_if_empty(out: Path) -> None:
  """Makes a stage that kept no record an unfinished one: the cause may lie outside its options and
  inputs, as with a wrong folder of images, and be mended."""
  if (out / "summary.json").exists() and not read_summary(out)["records"]:
    for path in out.glob("shard-*.jsonl"):
      path.unlink()
    (out / "summary.json").unlink()


def _bar(name: str, items_by_shard: list, todo: list[int], progress: bool) -> tqdm:
  """A progress bar over items with the time left; over unknown counts it shows the speed."""
  sizes = [len(items) if hasattr(items, "__len__") else None for items in items_by_shard]
  known = None not in sizes
  done = sum(size for k, size in enumerate(sizes) if k not in todo) if known else 0
  return tqdm(
    desc=name,
    total=sum(sizes) if known else None,
    initial=done,
    unit="item",
    disable=not progress or not todo,
    mininterval=0.5 if sys.stderr.isatty() else 30.0,
  )


def _results(work: Callable, items: Iterable, workers: int) -> Iterator[tuple[object, list]]:
  """(item, what became of it) in the order of the items."""
  if workers <= 1:
    yield from ((item, _attempt(work, item)) for item in items)
    return
  pool = ThreadPoolExecutor(workers)
  try:
    waiting = deque()
    for item in items:
      waiting.append((item, pool.submit(_attempt, work, item)))
      if len(waiting) >= 2 * workers:
        first, future = waiting.popleft()
        yield first, future.result()
    for item, future in waiting:
      yield item, future.result()
  finally:
    pool.shutdown(cancel_futures=True)


def _attempt(work: Callable, item) -> list:
  """The results of one item as a list of ImageRecord, dict and DataError."""
  try:
    result = work(item)
    if result is None:
      return []
    return [result] if isinstance(result, ImageRecord | dict) else list(result)
  except DataError as error:
    return [error]


def _write_shard(out: Path, k: int, shards: int, results: Iterator, bar: tqdm) -> None:
  # The shard is renamed last: where it exists, its rejected file does too.
  paths = _file(out, "rejected", k, shards), _file(out, "shard", k, shards)
  with contextlib.closing(results), _whole_files(*paths) as (rejected, kept):
    for number, (item, values) in enumerate(results):
      for value in values:
        file = kept
        if isinstance(value, DataError):
          file, value = rejected, {"reason": str(value), "where": _where(item, k, number)}
        line = to_line(record_to_json(value) if isinstance(value, ImageRecord) else value)
        with _write_errors(paths[-1]):
          file.write(line)
      bar.update()


def _where(item, k: int, number: int) -> str:
  """What names an item to a reader: its image or index, else its place."""
  for key in ("image", "index"):
    name = item.get(key) if isinstance(item, dict) else getattr(item, key, None)
    if isinstance(name, str):
      return name
  return str(item) if isinstance(item, str | int | Path) else f"shard {k} item {number}"


@contextlib.contextmanager
def _whole_files(*paths: Path):
  """Opens files for writing that appear under their names, in this order, only when all is well."""
  # Of this process: another one may be writing the same file.
  partial = [path.with_name(f"{path.name}.{os.getpid()}{_PARTIAL}") for path in paths]
  files = []
  try:
    with _write_errors(paths[-1]):
      files += [path.open("wb") for path in partial]
    yield files
    with _write_errors(paths[-1]):
      for file in files:
        file.flush()
        os.fsync(file.fileno())
        file.close()
      for source, path in zip(partial, paths, strict=True):
        os.replace(source, path)
  finally:
    for file in files:
      with contextlib.suppress(OSError):
        file.close()
    for path in partial:
      path.unlink(missing_ok=True)


@contextlib.contextmanager
def _write_errors(path: Path):
  """Says in words what the system refuses, around writing only: errors of `work` pass unchanged."""
  try:
    yield
  except OSError as error:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
      advice = "free some space and run again; finished shards are kept"
      raise DataError(f"{path}: the disk is full; {advice}") from error
    raise DataError(f"{path}: cannot be written ({error.strerror}); check the folder") from error


def _count(out: Path, shards: int) -> dict:
  """Counts from the files themselves, so that an interrupted stage ends with the same summary."""
  counts = {"records": 0, "regions": 0, "statements": 0, "rejected": 0, "records_by_shard": []}
  for k in range(shards):
    records = 0
    for _, row in read_jsonl(_file(out, "shard", k, shards)):
      records += 1
      for key in ("regions", "statements"):
        counts[key] += len(row.get(key, ()))
    counts["records"] += records
    counts["records_by_shard"].append(records)
    counts["rejected"] += sum(1 for _ in read_jsonl(_file(out, "rejected", k, shards)))
  return counts
