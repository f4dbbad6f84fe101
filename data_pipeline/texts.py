"""Statements, captions and descriptions as token rows with a field code per token.

A statement reads "question: {q} answer: {a} rationale: {r}", and its row is what the tokenizer makes of
that running text, between the tokens that a model of this kind starts and ends a text with:

  WordPiece (BERT)      [CLS] … [SEP]
  byte-level BPE (OPT)  </s> … and the newline, which ends a text in BLIP-2
  Unigram (T5)          … </s>; the decoder has a start of its own

Lengths are in tokens, so a text that is too long loses whole tokens: the rationale first, then the
question, never the answer.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
import functools
import re

import numpy as np
from tokenizers import Tokenizer, models

from data_pipeline import tokenizer as words
from data_pipeline.records import DataError, Statement, map_mentions

# Field codes. A marker belongs to the field before it; "question:" belongs to the question.
NO_FIELD, QUESTION, ANSWER, RATIONALE, DESCRIPTION = range(5)
_PARTS = ("question", "answer", "rationale")
_MARKERS = ("question:", " answer:", " rationale:")


@dataclass(frozen=True)
class Text:
  """One text as a model reads it, still in region ids.

  tokens int32[n], n <= text_tokens: start, text, end. Where a mention's number belongs, the entry is
  -(region id + 1); `put_slots` turns it into a number token. fields int8[n]: a code per token.
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
  """A tokenizer with what every text needs of it, and the length of a text row.

  start: the tokens before a text, one or none. end: the token after it. ends_cut: whether it also
  stands after a text that was cut. mention_tables: where a "[0]" is, as `tokenizer.mention_tables`
  has it. markers: the tokens of _MARKERS.
  """

  tokenizer: Tokenizer
  text_tokens: int
  pad: int
  start: tuple[int, ...]
  end: int
  ends_cut: bool
  mention_tables: tuple[np.ndarray, np.ndarray]
  markers: tuple[list[int], list[int], list[int]]


def text_encoder(tokenizer: Tokenizer, text_tokens: int) -> TextEncoder:
  """A TextEncoder for rows of `text_tokens` tokens, start and end included.

  DataError for a tokenizer of another kind, or one whose mentions cannot be renumbered.
  """
  if text_tokens < 16:
    raise DataError(f"text_tokens={text_tokens} leaves no room for a statement; use 16 or more")
  words.number_token(tokenizer, 0)
  markers = tuple(words.encode(tokenizer, marker) for marker in _MARKERS)
  return TextEncoder(
    tokenizer, text_tokens, *_frame(tokenizer), _stand_in_tables(tokenizer), markers
  )


def _frame(tokenizer: Tokenizer) -> tuple[int, tuple[int, ...], int, bool]:
  """pad, start, end and ends_cut of a TextEncoder."""
  name = words.token_id
  if isinstance(tokenizer.model, models.WordPiece):
    frame = (name(tokenizer, token) for token in (words.PAD, words.CLS, words.SEP))
    pad, start, end = frame
    return pad, (start,), end, True  # [SEP] closes a segment, whatever is in it
  pad, stop = name(tokenizer, "<pad>"), name(tokenizer, "</s>")
  if isinstance(tokenizer.model, models.Unigram):
    return pad, (), stop, False
  newline = words.encode(tokenizer, "\n")
  if not isinstance(tokenizer.model, models.BPE) or len(newline) != 1:
    raise DataError(
      "the tokenizer is not WordPiece, Unigram, or BPE with a token for the newline; choose the one "
      "that belongs to the model"
    )
  return pad, (stop,), newline[0], False


@functools.lru_cache(maxsize=8)
def _stand_in_tables(tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
  return words.mention_tables(tokenizer, 1)


def statement_texts(encoder: TextEncoder, statement: Statement) -> tuple[Text, Text] | None:
  """The token rows of a statement with and without its rationale.

  None if it has no answer, or one too long for the row.
  """
  fields = (statement.question, statement.answer, statement.rationale)
  pieces = [_pieces(encoder, text, " ") for text in fields]
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
    pieces = _pieces(encoder, text, " " if kept else "")
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
    tokens[tokens == -(region_id + 1)] = words.number_token(encoder.tokenizer, slot)
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
  are cut as in training. end: False leaves the end off, for prompts that a model continues.
  DataError where an answer does not fit in T = text_tokens.
  """
  encoder = text_encoder(tokenizer, text_tokens)
  texts = list(texts)
  tokens = np.full((len(texts), text_tokens), encoder.pad, np.int32)
  fields = np.zeros((len(texts), text_tokens), np.int8)
  for row, text in enumerate(texts):
    ids, codes = _encode_finished(encoder, text)
    ids = [*encoder.start, *ids, encoder.end] if end else [*encoder.start, *ids]
    tokens[row, : len(ids)] = ids
    at = len(encoder.start)
    fields[row, at : at + len(codes)] = codes
  return tokens, fields


def _encode_finished(encoder: TextEncoder, text: str) -> tuple[list[int], list[int]]:
  found = _STATEMENT.match(text)
  if found["marker"] is None and found["answer"] is None:
    ids = _encode(encoder, text)[: encoder.text_tokens - 2]
    return ids, [DESCRIPTION] * len(ids)
  present = [found["marker"] is not None, *(found[name] is not None for name in _PARTS[1:])]
  marks = [mark if there else [] for mark, there in zip(encoder.markers, present, strict=True)]
  leads = (" " if marks[0] else "", " ", " ")
  parts = [_encode(encoder, found[name] or "", lead) for name, lead in zip(_PARTS, leads)]
  if not marks[0] and not parts[0]:  # nothing stands before "answer:"
    marks[1] = words.encode(encoder.tokenizer, "answer:")
  laid_out = _lay_out(encoder, *parts, marks)
  if laid_out is None:
    raise DataError(f"the answer of {text!r:.80} is longer than {encoder.text_tokens} tokens")
  return laid_out[0]


def _lay_out(encoder, question, answer, rationale, marks=None):
  """((token ids, field codes), cut field) of a statement in text_tokens - 2, or None.

  marks: the tokens of the three markers, [] for one that is not there; by default those of a full
  statement.
  """
  if marks is None:
    marks = [*encoder.markers[:2], encoder.markers[2] if rationale else []]
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
    marks = [*marks[:2], []]
  ids = [*marks[0], *kept_question, *marks[1], *answer, *marks[2], *kept_rationale]
  lengths = (
    len(marks[0]) + len(kept_question) + len(marks[1]),
    len(answer) + len(marks[2]),
    len(kept_rationale),
  )
  codes = [code for code, n in zip((QUESTION, ANSWER, RATIONALE), lengths) for _ in range(n)]
  return (ids, codes), cut


def _encode(encoder: TextEncoder, text: str, lead: str = "") -> list[int]:
  """Token ids of a text on one line, since a newline ends a decoder's text, after `lead`."""
  text = re.sub(r"[ \t\r\n]+", " ", text).strip()
  return words.encode(encoder.tokenizer, lead + text) if text else []


def _pieces(encoder: TextEncoder, text: str, lead: str = "") -> list[int] | None:
  """Token ids of a text, with -(region id + 1) for the number inside every mention.

  lead: what stands between it and the text before it. None where the tokens do not show the same
  mentions as the text does (odd invisible characters between bracket and number).
  """
  ids = []

  def stand_in(region_id: int) -> str:
    ids.append(region_id)
    return "[0]"

  tokens = _encode(encoder, map_mentions(text, stand_in), lead)
  if not ids:
    return tokens
  slots = words.resolve_mentions(np.array(tokens), *encoder.mention_tables, max_regions=1)
  numbers = [
    at
    for at in np.flatnonzero(slots[:-1] == 0)
    if words.piece_text(encoder.tokenizer, tokens[at + 1]).startswith("]")
  ]
  if len(numbers) != len(ids):
    return None
  for at, region_id in zip(numbers, ids, strict=True):
    tokens[at] = -(region_id + 1)
  return tokens


def _text(encoder: TextEncoder, ids: list[int], codes: list[int], source: str, cut: int) -> Text:
  mentioned = tuple(dict.fromkeys(-token - 1 for token in ids if token < 0))
  end = [encoder.end] if encoder.ends_cut or not cut else []
  tokens = np.array([*encoder.start, *ids, *end], np.int32)
  fields = np.zeros(len(tokens), np.int8)
  fields[len(encoder.start) :][: len(codes)] = codes
  return Text(tokens, fields, mentioned, source, cut)


def _cut(pieces: list[int], room: int) -> list[int]:
  """The first `room` tokens, less a mention that would be cut in two.

  A piece such as "][" closes one mention and opens the next: neither can stay without the other.
  """
  if len(pieces) <= room:
    return pieces
  room = max(room, 0)
  while room and (pieces[room] < 0 or pieces[room - 1] < 0):
    room -= 1
  return pieces[:room]
