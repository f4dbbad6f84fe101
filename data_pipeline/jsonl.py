"""JSON lines and dataclasses, in and out, with errors that say which file, line or key to mend."""

from __future__ import annotations

from collections.abc import Iterator
import dataclasses
import json
from pathlib import Path


class DataError(ValueError):
  """Input a user can mend. One line: which file, line or key, and what to do about it."""


def read_jsonl(path: str | Path) -> Iterator[tuple[int, dict]]:
  """Yields (line number from 1, object) of a jsonl file; blank lines are skipped.

  DataError names file:line where the text is not UTF-8, not whole JSON, or not an object.
  """
  path = Path(path)
  try:
    file = path.open("rb")
  except OSError as error:
    raise DataError(f"{path}: cannot be read ({error.strerror}); check the path") from None
  with file:
    for number, line in enumerate(file, start=1):
      if not line.strip():
        continue
      try:
        value = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
      except UnicodeDecodeError:
        raise DataError(f"{path}:{number}: not UTF-8 text; convert the file to UTF-8") from None
      except (ValueError, RecursionError):
        fault = "not a whole JSON object (half-written?)"
        raise DataError(f"{path}:{number}: {fault}; mend or delete the line") from None
      if not isinstance(value, dict):
        raise DataError(f"{path}:{number}: expected a JSON object {{...}} on each line")
      yield number, value


def to_line(value: dict) -> bytes:
  """One jsonl line with its newline, as UTF-8."""
  try:
    return json.dumps(value, ensure_ascii=False).encode() + b"\n"
  except UnicodeEncodeError:  # half of a surrogate pair has no UTF-8 form, but JSON can escape it
    return json.dumps(value).encode() + b"\n"


def lean(thing) -> dict:
  """A dataclass as JSON values, without the fields that hold their default."""
  row = {}
  for spec in dataclasses.fields(thing):
    value = getattr(thing, spec.name)
    required = spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING
    if required or not (value == spec.default or value == {}):
      row[spec.name] = _plain(value)
  return row


def _plain(value):
  if dataclasses.is_dataclass(value):
    return lean(value)
  if isinstance(value, tuple | list):
    return [_plain(item) for item in value]
  if isinstance(value, dict):
    return {str(key): _plain(item) for key, item in value.items()}
  return value


def checked(cls, row, where: str) -> dict:
  """Keyword arguments for `cls` from a JSON object, with names and types checked."""
  if not isinstance(row, dict):
    raise DataError(f"{where}: expected an object, got {row!r:.60}")
  specs = {spec.name: spec for spec in dataclasses.fields(cls)}
  for key in row:
    if key not in specs:
      raise DataError(f"{where}: unknown key {key!r}; put own fields under `extra`")
  values = {}
  for name, spec in specs.items():
    if name in row:
      try:
        values[name] = _READERS.get(spec.type, lambda value: value)(row[name])
      except (TypeError, ValueError, AttributeError):
        raise DataError(f"{where}: {name!r} is {row[name]!r:.60}, not {spec.type}") from None
    elif spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING:
      raise DataError(f"{where}: key {name!r} is missing")
  return values


def _exactly(kind):
  def read(value):
    if type(value) is not kind:
      raise TypeError
    return value

  return read


def _number(value) -> float:
  if type(value) not in (int, float):
    raise TypeError
  return float(value)


def _list_of(read, length=None):
  def read_all(value):
    if not isinstance(value, list | tuple) or length not in (None, len(value)):
      raise TypeError
    return tuple(read(item) for item in value)

  return read_all


# How each annotation above is read from JSON.
_READERS = {
  "int": _exactly(int),
  "str": _exactly(str),
  "dict": _exactly(dict),
  "float | None": lambda value: None if value is None else _number(value),
  "tuple[int, ...]": _list_of(_exactly(int)),
  "tuple[str, ...]": _list_of(_exactly(str)),
  "tuple[float, float, float, float]": _list_of(_number, length=4),
  "tuple[tuple[str, str], ...]": _list_of(_list_of(_exactly(str), length=2)),
  "tuple[Region, ...]": _list_of(_exactly(dict)),
  "tuple[Statement, ...]": _list_of(_exactly(dict)),
  "dict[int, str]": lambda value: {int(key): _exactly(str)(text) for key, text in value.items()},
}
