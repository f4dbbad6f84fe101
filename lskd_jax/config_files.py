"""Config files of training runs, and `--config.key=value` on the command line.

A config file is Python with a function `get_config()` that returns a ConfigDict. A value given on
the command line is read as the type of the default it replaces.
"""
import ast
from collections.abc import Iterable, Iterator
import difflib
from pathlib import Path
import runpy

from ml_collections import ConfigDict

from data_pipeline.records import DataError


def load_config(path: Path | str, overrides: Iterable[str] = ()) -> ConfigDict:
  """The config of a file, with overrides such as "optim.steps=200" applied.

  path: a file; or the name of one of this package's, such as `configs/scenes_student.py`, from any
  folder.

  Raises:
    DataError: no such file, an error inside it (with its line), an unknown key (with the closest
      known one), or a value of another type.
  """
  config = _run(_find(Path(path)))
  for override in overrides:
    key, equals, text = override.partition("=")
    if not equals:
      raise DataError(f"--config.{key}: has no value; write --config.{key}=VALUE")
    set_value(config, key, text)
  return config


def set_value(config: ConfigDict, key: str, text: str) -> None:
  """Sets the value at a dotted key from what was typed. Errors as in `load_config`."""
  group, parts = config, key.split(".")
  for part in parts[:-1]:
    group = group[part] if isinstance(group, ConfigDict) and part in group else None
  name = parts[-1]
  if not isinstance(group, ConfigDict) or name not in group:
    raise DataError(f"config key {key!r} is unknown; {_suggestion(config, key)}")
  if isinstance(group[name], ConfigDict):
    raise DataError(f"config key {key!r} is a group; set one of {', '.join(sorted(group[name]))}")
  kind = group.get_type(name)
  try:
    value = _read(text, kind, group[name])
  except ValueError as error:
    raise DataError(f"--config.{key}={text}: {error}") from None
  group[name] = value


def known_keys(config: ConfigDict, prefix: str = "") -> Iterator[str]:
  """Every dotted key that holds a value."""
  for name, value in config.items():
    if isinstance(value, ConfigDict):
      yield from known_keys(value, f"{prefix}{name}.")
    else:
      yield prefix + name


def _suggestion(config: ConfigDict, key: str) -> str:
  """The known key closest to an unknown one; where none is close, what there is in its group."""
  keys = list(known_keys(config))
  close = difflib.get_close_matches(key, keys, 1, 0.8)
  if not close:  # the right name in the wrong group, or a slip in a long one
    last = {known.rsplit(".", 1)[-1]: known for known in reversed(keys)}
    close = difflib.get_close_matches(key.rsplit(".", 1)[-1], list(last), 1, 0.7)
    close = [last[name] for name in close]
  if close:
    return f"did you mean {close[0]!r}?"
  group, parts = config, key.split(".")[:-1]
  while parts and isinstance(group.get(parts[0]), ConfigDict):
    group = group[parts.pop(0)]
  return f"there are {', '.join(sorted(group))}"


_NAMES = {bool: "true or false", int: "a whole number", float: "a number", tuple: "a list such as "
          "(1, 2)", object: "a whole number or a pair such as (224, 448)"}


def _read(text: str, kind: type, default):
  """The typed value. ValueError says what is wanted instead."""
  if kind is str:
    value = _literal(text)
    return value if isinstance(value, str) and text[:1] in "\"'" else text
  if kind is bool:
    if text.lower() not in ("true", "false"):
      raise ValueError(f"{_NAMES[bool]} is wanted")
    return text.lower() == "true"
  value = _literal(text)
  if value is _NOT_A_LITERAL:
    wanted = _NAMES.get(kind, "a number, None or a text in quotes")
    raise ValueError(f"{wanted} is wanted")
  if kind is float and value is None:  # a threshold, for one, can be switched off
    return None
  if kind is float and type(value) is int:
    value = float(value)
  if kind is tuple:
    value = _tuple(value, default)
  if kind is object and type(value) not in (int, tuple):  # a size: a side, or both
    raise ValueError(f"{_NAMES[object]} is wanted")
  if kind not in (type(None), object) and type(value) is not kind:
    raise ValueError(f"{_NAMES.get(kind, kind.__name__)} is wanted")
  return value


def _tuple(value, default: tuple):
  """A tuple with entries of the default's type; a single value is a tuple of one."""
  value = tuple(value) if isinstance(value, list | tuple) else (value,)
  kinds = {type(entry) for entry in default}
  if len(kinds) == 1 and {type(entry) for entry in value} - kinds:
    raise ValueError(f"a list like the default {default} is wanted")
  return value


_NOT_A_LITERAL = object()


def _literal(text: str):
  try:
    return ast.literal_eval(text)
  except (ValueError, SyntaxError, MemoryError, RecursionError):
    return _NOT_A_LITERAL


def _find(path: Path) -> Path:
  """The file itself, or the one of this name among the installed configs."""
  if path.is_file():
    return path
  import configs
  own = Path(configs.__file__).parent / path.name
  if path.parent.name in ("", "configs") and own.is_file():
    return own
  names = ", ".join(sorted(f"configs/{p.name}" for p in own.parent.glob("[a-z]*.py")))
  raise DataError(f"--config {path}: no such file; give one, or one of {names}")


def _run(path: Path) -> ConfigDict:
  try:
    names = runpy.run_path(str(path))
    config = names["get_config"]()
  except KeyError as error:
    if error.args != ("get_config",):
      raise DataError(f"{_place(error, path)}: KeyError: {error}") from error
    raise DataError(f"{path}: has no function get_config(); see configs/common.py") from None
  except Exception as error:  # whatever Python the user wrote
    text = " ".join(str(error).split())
    raise DataError(f"{_place(error, path)}: {type(error).__name__}: {text}") from error
  if not isinstance(config, ConfigDict):
    raise DataError(f"{path}: get_config() returns a {type(config).__name__}, not a ConfigDict")
  return config


def _place(error: Exception, path: Path) -> str:
  """file:line of the last line in the config file that led to the error."""
  if isinstance(error, SyntaxError) and error.filename:
    return f"{error.filename}:{error.lineno}"
  line, trace = None, error.__traceback__
  while trace is not None:
    if trace.tb_frame.f_code.co_filename == str(path):
      line = trace.tb_lineno
    trace = trace.tb_next
  return f"{path}:{line}" if line else str(path)
