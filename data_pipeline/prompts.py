"""Prompts and what follows them, as token rows: for models that score or write continuations.

Three kinds of models read prompts, and differ in where special tokens stand:

  start + prompt words | text …         one stream: OPT, and the Q-Former's causal pass ([DEC])
  prompt words + end   | text …         two streams: T5, whose encoder reads the prompt

In one stream the tokens are those of prompt and text written together, as the model has seen them;
in two streams each part has its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
import re

import numpy as np
from tokenizers import Tokenizer, models

from data_pipeline import tokenizer as words

SHORTEST = 16  # tokens of a row; longer rows are padded to 32, 64 …, so that few shapes are compiled

_ANSWER = re.compile(r"\banswer\s*:", re.IGNORECASE)
# Spaces beside punctuation, as WordPiece leaves them: "[ 0 ] ' s hat ." is "[0]'s hat."
_SPACED = re.compile(r" (?=[.?!,:;)\]]|' s\b)|(?<=[(\[]) |(?<=') (?=s\b)")


@dataclass(frozen=True)
class Prompting:
  """How a model's prompts look: the tokenizer, the ids before and after a prompt's words, the ids
  that end a text and that fill a row. one_stream: see the module's docstring."""

  tokenizer: Tokenizer
  before: tuple[int, ...]
  after: tuple[int, ...]
  end: int
  pad: int
  one_stream: bool = True


def prompt_tokens(prompting: Prompting, prompt: str) -> list[int]:
  """The token row of a prompt; an empty one has its special token only.

  No space stands at its end: the next word brings its own.
  """
  return [*prompting.before, *words.encode(prompting.tokenizer, prompt.strip()), *prompting.after]


def split_tokens(prompting: Prompting, text: str) -> tuple[list[int], list[int]]:
  """(prompt tokens, tokens of what follows "answer:"), or of the whole text after an empty prompt
  where there is no answer."""
  text = text.strip()
  marker = _ANSWER.search(text)
  cut = marker.end() if marker and text[marker.end():].strip() else 0
  if not prompting.one_stream:
    return (prompt_tokens(prompting, text[:cut]),
            words.encode(prompting.tokenizer, text[cut:].strip()))
  whole = prompting.tokenizer.encode(text, add_special_tokens=False)
  # A piece that begins in the prompt, such as ":)" after "answer", belongs to it.
  count = sum(start < cut for start, _ in whole.offsets)
  count = 0 if count == len(whole.ids) else count
  return [*prompting.before, *whole.ids[:count], *prompting.after], whole.ids[count:]


def read_text(prompting: Prompting, tokens: Sequence[int], stop: Sequence[str] = ()) -> str:
  """The text that was written, without special tokens, up to its end and to the first of `stop`."""
  tokens = list(tokens)
  if prompting.end in tokens:
    tokens = tokens[:tokens.index(prompting.end)]
  text = prompting.tokenizer.decode(tokens, skip_special_tokens=True)
  if isinstance(prompting.tokenizer.model, models.WordPiece):
    text = _SPACED.sub("", text)
  for string in stop:
    text = text.partition(string)[0]
  return text.strip()


def rounded(size: int, least: int = 1) -> int:
  """The next power of two, `least` at least."""
  return max(least, 1 << (size - 1).bit_length())


def left_padded(rows: Sequence[Sequence[int]], pad: int) -> tuple[np.ndarray, np.ndarray]:
  """Prompts -> tokens int32[N, P], padded on the left, and bool[N, P], False = padding."""
  size = rounded(max(map(len, rows)), SHORTEST)
  tokens = np.full((len(rows), size), pad, np.int32)
  real = np.zeros(tokens.shape, bool)
  for at, row in enumerate(rows):
    tokens[at, size - len(row):] = row
    real[at, size - len(row):] = True
  return tokens, real


def grouped(pairs: Sequence[tuple[list[int], list[int]]], pad: int) -> tuple[dict, list]:
  """Texts that continue the same prompt in one row, so that it is read once.

  Args:
    pairs: prompt tokens and text tokens, as `split_tokens` returns them.

  Returns:
    {"prompt": int32[B, P], "real": bool[B, P], "tokens": int32[B, S, T]}, every size rounded up; and
    the row and column (b, s) of each pair.
  """
  texts: dict[tuple[int, ...], list[list[int]]] = {}
  places = []
  for prompt, text in pairs:
    row = texts.setdefault(tuple(prompt), [])
    places.append((list(texts).index(tuple(prompt)), len(row)))
    row.append(text)
  prompts = filled_up(list(texts))
  most, longest = max(map(len, texts.values())), max(len(text) for _, text in pairs)
  tokens = np.full((len(prompts), rounded(most), rounded(longest, SHORTEST)), pad, np.int32)
  for place, (_, text) in zip(places, pairs, strict=True):
    tokens[place][: len(text)] = text
  prompt, real = left_padded(prompts, pad)
  return {"prompt": prompt, "real": real, "tokens": tokens}, places


def filled_up(rows: list) -> list:
  """The rows and as many copies of the first as make their number a power of two."""
  return rows + rows[:1] * (rounded(len(rows)) - len(rows))
