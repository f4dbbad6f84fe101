"""What the verbs share: how they are declared, and the kinds of values they take."""
from argparse import ArgumentParser, ArgumentTypeError, RawDescriptionHelpFormatter
from collections.abc import Callable
import math


def add_verb(verbs, name: str, run: Callable, summary: str, example: str) -> ArgumentParser:
  """Declares a verb: `run(args)` is called for it. The example is a line of a shell."""
  parser = verbs.add_parser(
      name, help=summary, description=summary[0].upper() + summary[1:] + ".",
      epilog=f"example: {example}", allow_abbrev=False,
      formatter_class=RawDescriptionHelpFormatter)  # the example stays one line, to copy
  parser.set_defaults(run=run, parser=parser)
  return parser


def count(text: str) -> int:
  """A whole number from 1 on."""
  return _number(text, int, lambda value: value >= 1, "a whole number from 1 on")


def seed(text: str) -> int:
  """A whole number from 0 on."""
  return _number(text, int, lambda value: value >= 0, "a whole number from 0 on")


def number(text: str) -> float:
  """A finite number."""
  return _number(text, float, math.isfinite, "a number")


def positive(text: str) -> float:
  """A finite number above 0."""
  return _number(text, float, lambda value: 0 < value < math.inf, "a number above 0")


def amount(text: str) -> float:
  """A finite number from 0 on."""
  return _number(text, float, lambda value: 0 <= value < math.inf, "a number from 0 on")


def share(text: str) -> float:
  """A number from 0 to 1."""
  return _number(text, float, lambda value: 0 <= value <= 1, "a number from 0 to 1")


def image_size(text: str) -> int | tuple[int, int]:
  """PX, or HEIGHTxWIDTH."""
  try:
    height, width = map(count, text.split("x") if "x" in text else (text, text))
  except (ValueError, ArgumentTypeError):
    raise ArgumentTypeError(f"{text!r} is not PX or HEIGHTxWIDTH, such as 364 or 224x448") from None
  return height if height == width else (height, width)


def box(text: str) -> tuple[float, ...]:
  """x1,y1,x2,y2."""
  try:
    x1, y1, x2, y2 = map(float, text.split(","))
  except ValueError:
    raise ArgumentTypeError(f"{text!r} is not x1,y1,x2,y2") from None
  return x1, y1, x2, y2


def _number(text: str, kind: type, fits: Callable, wanted: str):
  try:
    value = kind(text)
  except ValueError:
    value = None
  if value is None or not fits(value):
    raise ArgumentTypeError(f"{text!r} is not {wanted}")
  return value
