"""Statements, captions and descriptions as token rows with a field code per token.

A statement reads "question: {q} answer: {a} rationale: {r}". Lengths are in tokens, so a text that
is too long loses whole tokens: the rationale first, then the question, never the answer.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
import re

import numpy as np
from tokenizers import Tokenizer

from data_pipeline import tokenizer as words
from data_pipeline.records import DataError, Statement, map_mentions

# Field codes. A marker belongs to the field before it; "question:" belongs to the question.
NO_FIELD, QUESTION, ANSWER, RATIONALE, DESCRIPTION = range(5)
_PARTS = ("question", "answer", "rationale")


@dataclass(frozen=True)
class Text:
  """One text as a model reads it, still in region ids.

  tokens int32[n], n <= text_tokens: [CLS] text [SEP]. Where a mention's number belongs, the entry
  is -(region id + 1); `put_slots` turns it into a number token. fields int8[n]: a code per token.
  mentioned: the ids in `tokens`, in order of first mention. source: the text itself. cut: the field
  that was shortened, NO_FIELD where all of it fits. statement: which of its record's statements it
  is, -1 for other texts.
  """

  tokens: np.ndarray
  fields: np.ndarray
  mentioned: tuple[int, ...]
  source: str
  cut: int = NO_FIELD
  statement: int = -1


@dataclass(frozen=True)
class TextEncoder:
  """A tokenizer with the few token ids that every text needs, and the length of a text row."""

  tokenizer: Tokenizer
  text_tokens: int
  pad: int
  cls: int
  sep: int
  bracket: int
  close: int
  zero: int
  markers: tuple[list[int], list[int], list[int]]


def text_encoder(tokenizer: Tokenizer, text_tokens: int) -> TextEncoder:
  """A TextEncoder for rows of `text_tokens` tokens, [CLS] and [SEP] included."""
  if text_tokens < 16:
    raise DataError(f"text_tokens={text_tokens} leaves no room for a statement; use 16 or more")
  names = (words.PAD, words.CLS, words.SEP, "[", "]", "0")
  ids = (words.token_id(tokenizer, name) for name in names)
  markers = tuple(words.encode(tokenizer, f"{name}:") for name in _PARTS)
  return TextEncoder(tokenizer, text_tokens, *ids, markers)


def statement_texts(encoder: TextEncoder, statement: Statement) -> tuple[Text, Text] | None:
  """The token rows of a statement with and without its rationale.

  None if it has no answer, or one too long for the row.
  """
  fields = (statement.question, statement.answer, statement.rationale)
  pieces = [_pieces(encoder, text) for text in fields]
  if not pieces[1] or None in pieces:
    return None
  rows = []
  for with_rationale in (True, False):
    laid_out = _lay_out(encoder, *pieces[:2], pieces[2] if with_rationale else [])
    if laid_out is None:
      return None
    (ids, codes), cut = laid_out
    rows.append(_text(encoder, ids, codes, " ".join(fields), cut))
  return rows[0], rows[1]


def caption_text(encoder: TextEncoder, caption: str) -> Text | None:
  """The token row of free text, cut at its end; None if there is nothing in it."""
  pieces = _pieces(encoder, caption)
  if not pieces:
    return None
  kept = _cut(pieces, encoder.text_tokens - 2)
  cut = NO_FIELD if len(kept) == len(pieces) else DESCRIPTION
  return _text(encoder, kept, [DESCRIPTION] * len(kept), caption, cut)


def description_text(encoder: TextEncoder, described: Iterable[tuple[int, str]]) -> Text | None:
  """The token row of region descriptions, "[2] a figure in a tall hat. [0] a king."

  described: (region id, description), in the order wanted. Descriptions that do not fit whole are
  left out, except that the first is cut.
  """
  texts = [f"[{region_id}] {text.strip().rstrip('.')}." for region_id, text in described]
  room = encoder.text_tokens - 2
  kept, source, cut = [], [], NO_FIELD
  for text in texts:
    pieces = _pieces(encoder, text)
    if pieces is None:
      continue
    if len(kept) + len(pieces) > room:
      cut = DESCRIPTION
      if kept:
        break
      pieces = _cut(pieces, room)
    kept += pieces
    source.append(text)
  return _text(encoder, kept, [DESCRIPTION] * len(kept), " ".join(source), cut) if kept else None


def put_slots(encoder: TextEncoder, tokens: np.ndarray, slots: Iterable[int]) -> np.ndarray:
  """Replaces region ids in `tokens` by number tokens, in place; slots[k] is the id in slot k."""
  for slot, region_id in enumerate(slots):
    tokens[tokens == -(region_id + 1)] = words.token_id(encoder.tokenizer, str(slot))
  return tokens


_STATEMENT = re.compile(
  r"^\s*(?P<marker>question\s*:)?(?P<question>.*?)(?:\banswer\s*:(?P<answer>.*?)"
  r"(?:\brationale\s*:(?P<rationale>.*))?)?$",
  re.IGNORECASE | re.DOTALL,
)


def encode_texts(
  tokenizer: Tokenizer, texts: Iterable[str], text_tokens: int, end: bool = True
) -> tuple[np.ndarray, np.ndarray]:
  """(tokens int32[N,T], fields int8[N,T]) of finished texts, whose mentions are slots already.

  Fields are found from the markers: a text with "question:" at its start or "answer:" in it is a
  statement (or a prompt, if nothing follows "answer:"), any other a description. Too long texts
  are cut as in training. end: False leaves [SEP] off, for prompts that a model continues.
  DataError where an answer does not fit in T = text_tokens.
  """
  encoder = text_encoder(tokenizer, text_tokens)
  texts = list(texts)
  tokens = np.full((len(texts), text_tokens), encoder.pad, np.int32)
  fields = np.zeros((len(texts), text_tokens), np.int8)
  for row, text in enumerate(texts):
    ids, codes = _encode_finished(encoder, text)
    ids = [encoder.cls, *ids, encoder.sep] if end else [encoder.cls, *ids]
    tokens[row, : len(ids)] = ids
    fields[row, 1 : len(codes) + 1] = codes
  return tokens, fields


def _encode_finished(encoder: TextEncoder, text: str) -> tuple[list[int], list[int]]:
  found = _STATEMENT.match(text)
  if found["marker"] is None and found["answer"] is None:
    ids = words.encode(encoder.tokenizer, text)[: encoder.text_tokens - 2]
    return ids, [DESCRIPTION] * len(ids)
  parts = [words.encode(encoder.tokenizer, found[name] or "") for name in _PARTS]
  has_markers = [found["marker"] is not None, *(found[name] is not None for name in _PARTS[1:])]
  laid_out = _lay_out(encoder, *parts, has_markers=has_markers)
  if laid_out is None:
    raise DataError(f"the answer of {text!r:.80} is longer than {encoder.text_tokens} tokens")
  return laid_out[0]


def _lay_out(encoder, question, answer, rationale, has_markers=None):
  """((token ids, field codes), cut field) of a statement in text_tokens - 2, or None.

  has_markers: which of the three markers stand in the text; by default those of a full statement.
  """
  if has_markers is None:
    has_markers = [True, True, bool(rationale)]
  marks = [mark if has else [] for mark, has in zip(encoder.markers, has_markers, strict=True)]
  room = encoder.text_tokens - 2 - len(marks[0]) - len(marks[1]) - len(answer)
  if room < 0:
    return None
  kept_question = _cut(question, room)
  room -= len(kept_question) + len(marks[2])
  whole = len(kept_question) == len(question)
  kept_rationale = _cut(rationale, room) if whole and room > 0 else []
  cut = NO_FIELD if len(kept_rationale) == len(rationale) else RATIONALE
  cut = cut if whole else QUESTION
  if not kept_rationale and (cut or room < 0):
    marks[2] = []
  ids = [*marks[0], *kept_question, *marks[1], *answer, *marks[2], *kept_rationale]
  lengths = (
    len(marks[0]) + len(kept_question) + len(marks[1]),
    len(answer) + len(marks[2]),
    len(kept_rationale),
  )
  codes = [code for code, n in zip((QUESTION, ANSWER, RATIONALE), lengths) for _ in range(n)]
  return (ids, codes), cut


def _pieces(encoder: TextEncoder, text: str) -> list[int] | None:
  """Token ids of a text, with -(region id + 1) for the number inside every mention.

  None where the tokens do not show the same mentions as the text does (odd invisible characters
  between bracket and number).
  """
  ids = []

  def stand_in(region_id: int) -> str:
    ids.append(region_id)
    return "[0]"

  tokens = words.encode(encoder.tokenizer, map_mentions(text, stand_in))
  if not ids:
    return tokens
  numbers = [
    at
    for at in range(1, len(tokens) - 1)
    if tokens[at] == encoder.zero
    and tokens[at - 1] == encoder.bracket
    and tokens[at + 1] == encoder.close
  ]
  if len(numbers) != len(ids):
    return None
  for at, region_id in zip(numbers, ids, strict=True):
    tokens[at] = -(region_id + 1)
  return tokens


def _text(encoder: TextEncoder, ids: list[int], codes: list[int], source: str, cut: int) -> Text:
  mentioned = tuple(dict.fromkeys(-token - 1 for token in ids if token < 0))
  tokens = np.array([encoder.cls, *ids, encoder.sep], np.int32)
  fields = np.array([NO_FIELD, *codes, NO_FIELD], np.int8)
  return Text(tokens, fields, mentioned, source, cut)


def _cut(pieces: list[int], room: int) -> list[int]:
  """The first `room` tokens, less a mention that would be cut in two."""
  if len(pieces) <= room:
    return pieces
  room = max(room, 0)
  if pieces[room] < 0:
    room -= 1
  elif room and pieces[room - 1] < 0:
    room -= 2
  return pieces[: max(room, 0)]
