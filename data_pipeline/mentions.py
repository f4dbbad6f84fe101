"""Mentions in texts: "[3]" points at region 3, "[0,2]" at regions 0 and 2.

The original stores a text as word tokens, a mention as a nested list: ["Is", [0, 2], "on?"].
"""

from __future__ import annotations

from collections.abc import Callable
import re

_MENTION = re.compile(r"\[\s*([0-9]{1,9}(?:\s*,\s*[0-9]{1,9})*)\s*\]")
_LABEL = re.compile(r"^(?:Question|Answer|Rationale):\s*")


def mentions(text: str) -> tuple[int, ...]:
  """The ids a text mentions, each once, in order of first mention: "[4] and [0,4]" -> (4, 0)."""
  ids = [int(number) for inside in _MENTION.findall(text) for number in inside.split(",")]
  return tuple(dict.fromkeys(ids))


def map_mentions(text: str, name: Callable[[int], str], joiner: str = " , ") -> str:
  """Replaces every mention by `name(id)`; several ids in one mention are joined by `joiner`."""
  return _MENTION.sub(
    lambda found: joiner.join(name(int(number)) for number in found[1].split(",")), text
  )


def join_tokens(raw: list | str | None) -> str:
  """The text of a token list. A string, as older files have it, only loses its "Question: " label.

  ValueError for a token that is neither a string nor a list of region ids.
  """
  if raw is None or isinstance(raw, str):
    return _LABEL.sub("", raw or "")
  words = []
  for token in raw:
    if isinstance(token, list) and all(type(i) is int and i >= 0 for i in token):
      token = "[" + ",".join(map(str, token)) + "]"
    if not isinstance(token, str):
      raise ValueError(f"token {token!r} is neither a word nor a list of region ids")
    words.append(token)
  return " ".join(words)


def split_tokens(text: str) -> list:
  """The token list of a text; a mention is its own token: "of [1]." -> ["of", [1], "."]."""
  if "[" not in text:
    return text.split(" ") if text else []
  compact = _MENTION.sub(lambda found: "".join(found[0].split()), text)
  tokens = []
  for word in compact.split(" "):
    pieces = [piece for piece in re.split(r"(\[[0-9,]+\])", word) if piece] or [""]
    tokens += [_ids(piece) if _MENTION.fullmatch(piece) else piece for piece in pieces]
  return tokens


def _ids(mention: str) -> list[int]:
  return [int(number) for number in mention[1:-1].split(",")]
