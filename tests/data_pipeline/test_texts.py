"""Rows of tokens for models of all kinds: each is what its tokenizer makes of the running text.

WordPiece is BERT's, for students that read with the Q-Former; byte-level BPE is OPT's, Unigram is T5's.
"""
import re

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from data_pipeline import tokenizer as words
from data_pipeline.records import DataError, Statement
from data_pipeline.texts import (
  ANSWER,
  DESCRIPTION,
  QUESTION,
  RATIONALE,
  caption_text,
  description_text,
  encode_texts,
  put_slots,
  statement_texts,
  text_encoder,
)
from tests.decoder_tokenizers import train_bpe, train_unigram

STATEMENT = Statement("0", "why does [4] greet [7,2]?", "[4][7] wave, waiting for [2].",
                      "they hold a cup, [7]'s, and ([2]) smiles")
SLOTS = [7, 4, 2]  # region 7 has slot 0
RENDERED = ("why does [1] greet [0] , [2]?", "[1][0] wave, waiting for [2].",
            "they hold a cup, [0]'s, and ([2]) smiles")
RUNNING = "question: {} answer: {} rationale: {}".format(*RENDERED)
TEXTS = [RUNNING, "question: who is [0]? answer: a king rationale: he wears a crown"]
KINDS = {"wordpiece": words.train_tokenizer, "bpe": train_bpe, "unigram": train_unigram}
# What stands around a text, by name or as text.
FRAMES = {"wordpiece": (["[CLS]"], "[SEP]"), "bpe": (["</s>"], "Ċ"), "unigram": ([], "</s>")}


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
  return request.param


@pytest.fixture(scope="module")
def tokenizer(kind, tmp_path_factory):
  return KINDS[kind](TEXTS * 3, tmp_path_factory.mktemp(kind))


def row_of(encoder, text):
  return put_slots(encoder, text.tokens.copy(), SLOTS)


def inside(kind, tokenizer, row):
  """The ids between start and end, which are checked."""
  start, end = FRAMES[kind]
  names = [tokenizer.id_to_token(i) for i in row]
  assert names[:len(start)] == start and names[-1] == end
  return row[len(start):-1].tolist()


def test_a_statement_is_its_running_text(kind, tokenizer):
  encoder = text_encoder(tokenizer, 128)
  whole, short = statement_texts(encoder, STATEMENT)
  ids = inside(kind, tokenizer, row_of(encoder, whole))
  assert ids == words.encode(tokenizer, RUNNING)
  if kind != "wordpiece":  # whose decoder puts spaces around punctuation
    assert tokenizer.decode(ids) == RUNNING
  without = "question: {} answer: {}".format(*RENDERED)
  assert inside(kind, tokenizer, row_of(encoder, short)) == words.encode(tokenizer, without)
  assert whole.mentioned == (4, 7, 2)


def test_fields_say_what_a_token_belongs_to(kind, tokenizer):
  encoder = text_encoder(tokenizer, 128)
  text, _ = statement_texts(encoder, STATEMENT)
  row = row_of(encoder, text)
  parts = {QUESTION: f"question: {RENDERED[0]} answer:", ANSWER: f" {RENDERED[1]} rationale:",
           RATIONALE: f" {RENDERED[2]}"}
  for field, part in parts.items():
    assert row[text.fields == field].tolist() == words.encode(tokenizer, part)
  assert text.fields[-1] == 0 and (text.fields == 0).sum() == 1 + len(FRAMES[kind][0])


def test_only_the_number_of_a_mention_is_replaced(kind, tokenizer):
  encoder = text_encoder(tokenizer, 128)
  text, _ = statement_texts(encoder, STATEMENT)
  number = lambda token: -token - 1
  assert [number(token) for token in text.tokens if token < 0] == [4, 7, 2, 4, 7, 2, 7, 2]
  row = row_of(encoder, text)
  tables = words.mention_tables(tokenizer, 8)
  slots = words.resolve_mentions(row, *tables, max_regions=8)
  np.testing.assert_array_equal(slots >= 0, text.tokens < 0)
  assert slots[slots >= 0].tolist() == [SLOTS.index(number(t)) for t in text.tokens if t < 0]


def test_a_cut_text_holds_whole_mentions_and_does_not_end(kind, tokenizer):
  """At every length: the rationale goes first, then the question, and the answer stays."""
  reference = statement_texts(text_encoder(tokenizer, 128), STATEMENT)[0]
  answer = reference.tokens[reference.fields == ANSWER].tolist()
  opening, tables = {}, words.mention_tables(tokenizer, 1)
  lengths = [n for n in range(16, len(reference.tokens) + 2)
             if statement_texts(text_encoder(tokenizer, n), STATEMENT)]
  assert len(lengths) > 20
  for length in lengths:
    encoder = text_encoder(tokenizer, length)
    text, _ = statement_texts(encoder, STATEMENT)
    tokens = text.tokens.tolist()
    assert len(tokens) <= length
    assert text.tokens[text.fields == ANSWER].tolist() in (answer, answer[:-len(encoder.markers[2])])
    for at in np.flatnonzero(text.tokens < 0):  # between the brackets it had
      assert tables[0][tokens[at - 1]]
      assert words.piece_text(tokenizer, tokens[at + 1]).startswith("]")
    for at in np.flatnonzero(tables[0][np.maximum(tokens, 0)]):
      assert tokens[at + 1] < 0  # no bracket without its number
    opening[length] = tokens[-1] == encoder.end
    assert opening[length] == (kind == "wordpiece" or not text.cut)
  assert opening[lengths[-1]] and (kind == "wordpiece" or not opening[lengths[0]])


def test_other_texts_are_their_running_text(kind, tokenizer):
  encoder = text_encoder(tokenizer, 64)
  caption = caption_text(encoder, " they wave\n for [4] ")
  described = description_text(encoder, [(4, "a king in [7]'s crown."), (2, "waiting")])
  for text, running in ((caption, "they wave for [1]"),
                        (described, "[1] a king in [0]'s crown. [2] waiting.")):
    assert inside(kind, tokenizer, row_of(encoder, text)) == words.encode(tokenizer, running)
    assert set(text.fields.tolist()) == {0, DESCRIPTION}


@pytest.mark.parametrize("text", [
  "Question: who is [0]? Answer: a king", "who is [0]? answer: a king rationale: a crown",
  "answer: a king", "a king greets [0]", "question: who is [0]? answer:"])
def test_finished_texts_are_their_running_text(kind, tokenizer, text):
  tokens, fields = encode_texts(tokenizer, [text], 64)
  row = tokens[0][:len(inside_row(kind, tokens, fields))]
  assert inside(kind, tokenizer, row) == words.encode(tokenizer, text.lower())
  encoder = text_encoder(tokenizer, 64)
  assert (tokens[0][len(row):] == encoder.pad).all()
  open_row, _ = encode_texts(tokenizer, [text], 64, end=False)
  assert open_row[0].tolist() == [*row[:-1], *[encoder.pad] * (65 - len(row))]


def inside_row(kind, tokens, fields):
  """The row of one text, start and end included."""
  return tokens[0][:np.flatnonzero(fields[0]).max() + 2]


def test_finished_texts_are_the_rows_of_training(kind, tokenizer):
  encoder = text_encoder(tokenizer, 128)
  text, _ = statement_texts(encoder, STATEMENT)
  tokens, fields = encode_texts(tokenizer, [RUNNING], 128)
  np.testing.assert_array_equal(tokens[0][:len(text.tokens)], row_of(encoder, text))
  np.testing.assert_array_equal(fields[0][:len(text.fields)], text.fields)


# --- tokenizers that cannot be used --------------------------------------------------------------


def with_pieces(*pieces):
  """A BPE tokenizer for which each of these pieces is one token."""
  letters = "abcdefghijklmnopqrstuvwxyz:?.,()'\n []0123456789"
  vocab = {piece: i for i, piece in enumerate(["<pad>", "</s>", "<unk>", *letters, *pieces])}
  tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", ignore_merges=True))
  ends = "|".join(map(re.escape, [*pieces, *letters]))
  tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(ends), "isolated")
  return tokenizer


@pytest.mark.parametrize("piece,number", [("[0", 0), ("0]", 0), ("1]", 1), ("2][", 2)])
def test_numbers_that_are_joined_with_brackets_are_refused(piece, number):
  """They can be pointed with as they stand, but not be given other numbers token by token."""
  with pytest.raises(DataError, match=rf"no token of its own for the number in \[{number}\]; choose "
                     rf"another tokenizer, or at most {number} regions") as caught:
    put_slots(text_encoder(with_pieces(piece), 16), np.zeros(1, np.int32), range(4))
  assert "\n" not in str(caught.value)


def test_brackets_may_be_joined_with_each_other():
  encoder = text_encoder(with_pieces("][", "],"), 64)
  text = caption_text(encoder, "[3][5], a king")
  names = [encoder.tokenizer.id_to_token(i) for i in put_slots(encoder, text.tokens, [5, 3])]
  assert names[1:6] == ["[", "1", "][", "0", "],"]


def test_a_tokenizer_of_another_kind_is_refused():
  tokenizer = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "[": 2, "]": 3, "0": 4, "[UNK]": 5},
                                         unk_token="[UNK]"))
  tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
  with pytest.raises(DataError, match="is not WordPiece, Unigram, or BPE with a token for the newline"):
    text_encoder(tokenizer, 16)
