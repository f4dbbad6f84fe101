"""The tokenizer: trained reproducibly, readable by transformers, and able to find mentions."""

import re

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import GPT2Tokenizer

from data_pipeline.records import DataError
from data_pipeline.tokenizer import (
  SPECIAL_TOKENS,
  encode,
  load_tokenizer,
  mention_tables,
  resolve_mentions,
  train_tokenizer,
)
from tests.data_pipeline.tiny_tokenizers import opt_tokenizer, t5_tokenizer

TEXTS = [
  f"question: why does [{i}] hold the {thing}? answer: [{i}] is a {job}. rationale: it is {place}."
  for i, (thing, job, place) in enumerate(
    [("ball", "chef", "late"), ("spoon", "king", "raining"), ("crown", "king", "late")] * 3
  )
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  out = tmp_path_factory.mktemp("tokenizer")
  train_tokenizer(TEXTS, out)
  return out


def test_special_tokens_come_first_in_a_fixed_order(folder):
  tokenizer = load_tokenizer(folder)
  assert [tokenizer.token_to_id(token) for token in SPECIAL_TOKENS] == [0, 1, 2, 3, 4, 5]


def test_text_is_lower_cased_and_framed_by_cls_and_sep(folder):
  assert load_tokenizer(folder).encode("The KING").tokens == ["[CLS]", "the", "king", "[SEP]"]


def test_a_mention_is_three_tokens(folder):
  tokenizer = load_tokenizer(folder)
  tokens = [tokenizer.id_to_token(i) for i in encode(tokenizer, "why does[12]hold")]
  assert tokens == ["why", "does", "[", "12", "]", "hold"]


def test_the_same_texts_give_the_same_bytes(folder, tmp_path):
  # vocab_size is low enough that merges with equal counts compete for the last places.
  for name in ("first", "second"):
    train_tokenizer(TEXTS, tmp_path / name, vocab_size=150)
  first, second = (
    (tmp_path / name / "tokenizer.json").read_bytes() for name in ("first", "second")
  )
  assert first == second
  assert load_tokenizer(tmp_path / "first").get_vocab_size() == 150


def test_transformers_reads_the_folder(folder):
  transformers = pytest.importorskip("transformers")
  theirs = transformers.AutoTokenizer.from_pretrained(folder)
  ours = load_tokenizer(folder)
  text = "Question: is [3] a Chef, or [0] , [2]?"
  assert theirs(text).input_ids == ours.encode(text).ids
  assert (theirs.pad_token, theirs.bos_token) == ("[PAD]", "[DEC]")
  assert len(theirs) == ours.get_vocab_size()


def test_a_stock_bert_folder_gets_the_missing_dec_token(tmp_path):
  stock = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "king", "[", "]", "0", "##s"]
  (tmp_path / "vocab.txt").write_text("\n".join(stock) + "\n")
  tokenizer = load_tokenizer(tmp_path)
  assert tokenizer.token_to_id("[DEC]") == len(stock)
  assert tokenizer.encode("The Kings").tokens == ["[CLS]", "the", "king", "##s", "[SEP]"]


def test_a_special_token_spelt_in_a_text_is_only_text(folder):
  # Otherwise a caption that says "[PAD]" would be masked out, and "[SEP]" would end the text.
  tokenizer = load_tokenizer(folder)
  assert not {0, 3} & set(encode(tokenizer, "a [SEP] in the [PAD] text"))


def test_what_cannot_be_read_is_one_clear_error(tmp_path):
  with pytest.raises(DataError, match="no tokenizer.json, no vocab.txt"):
    load_tokenizer(tmp_path)
  (tmp_path / "tokenizer.json").write_text("{half")
  with pytest.raises(DataError, match="copy it again"):
    load_tokenizer(tmp_path)
  with pytest.raises(DataError, match="no words"):
    train_tokenizer(["", "  "], tmp_path / "new")
  with pytest.raises(DataError, match="raise it"):
    train_tokenizer(TEXTS, tmp_path / "new", vocab_size=20)


# ---- mentions ----


POINTING = pytest.mark.parametrize(
  ("text", "slots"),
  [
    ("[0][1]", [0, 1]),
    ("([2])", [2]),
    ("[0], [1]", [0, 1]),
    ("[3] at the start of a line\n[4]", [3, 4]),
    ("what is [11] about to do to [1]'s king?", [11, 1]),
    ("2 or (2) or [two] or 2] is no mention", []),
    ("[99] is beyond the slots", []),
  ],
)
@POINTING
def test_mentions_are_found_from_the_tokens(folder, text, slots):
  tokenizer = load_tokenizer(folder)
  tables = mention_tables(tokenizer, max_regions=16)
  found = resolve_mentions(np.array(encode(tokenizer, text)), *tables, max_regions=16)
  assert found[found >= 0].tolist() == slots


def test_the_tables_have_one_row_per_token(folder):
  tokenizer = load_tokenizer(folder)
  opens_bracket, digit = mention_tables(tokenizer, max_regions=4)
  assert opens_bracket.shape == digit.shape == (tokenizer.get_vocab_size(),)
  assert [tokenizer.id_to_token(i) for i in np.flatnonzero(opens_bracket)] == ["["]
  assert {tokenizer.id_to_token(i): int(digit[i]) for i in np.flatnonzero(digit >= 0)} == {
    "0": 0, "1": 1, "2": 2, "3": 3,
  }  # fmt: skip


def _with_pieces(*pieces):
  """A tokenizer that, unlike BERT's, may join brackets and digits in one token."""
  letters = "abcdefghijklmnopqrstuvwxyz:?.,()'\n []0123456789"
  vocab = {piece: i for i, piece in enumerate(["[UNK]", *letters, *pieces])}
  tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
  ends = "|".join(sorted(map(re.escape, [*pieces, *letters]), key=len, reverse=True))
  tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(ends), "isolated")
  return tokenizer


def test_pieces_that_join_brackets_and_digits_still_point():
  # "][" opens a bracket, "1]" begins with the number, "[1]" and "[0" bring their own bracket.
  tokenizer = _with_pieces("][", "1]", "[1]", "[0")
  tables = mention_tables(tokenizer, max_regions=2)
  text = "[0][1] ([1]) [0]"
  found = resolve_mentions(np.array(encode(tokenizer, text)), *tables, max_regions=2)
  assert found[found >= 0].tolist() == [0, 1, 1, 0]


def test_a_piece_with_two_mentions_is_refused():
  with pytest.raises(DataError, match=r"several mentions in one token, '\[0\]\[1\]'"):
    mention_tables(_with_pieces("[0][1]"), max_regions=2)


def test_a_number_of_two_tokens_is_refused():
  with pytest.raises(DataError, match="splits the number 10"):
    mention_tables(_with_pieces(), max_regions=11)


# ---- the tokenizers of decoders ----


@pytest.fixture(scope="module")
def decoders(tmp_path_factory):
  out = tmp_path_factory.mktemp("decoders")
  return {"opt": opt_tokenizer(out / "opt"), "t5": t5_tokenizer(out / "t5")}


@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_a_decoders_tokens_are_those_of_transformers(decoders, kind):
  """Also the start of every text for OPT, </s> = 2, and its end for T5, </s> = 1."""
  transformers = pytest.importorskip("transformers")
  theirs = transformers.AutoTokenizer.from_pretrained(decoders[kind])
  ours = load_tokenizer(decoders[kind])
  for text in ["question: who is [0]? answer: [1][2], ([3]).", " the  odd\n[0]", "é [0]'s", "", "]["]:
    assert ours.encode(text).ids == theirs(text).input_ids
    assert encode(ours, text) == theirs(text, add_special_tokens=False).input_ids
    assert ours.decode(ours.encode(text).ids) == theirs.decode(theirs(text).input_ids,
                                                               skip_special_tokens=True)
  start, *_, end = ours.encode("a chef").ids
  assert (start if kind == "opt" else end) == {"opt": 2, "t5": 1}[kind]


@pytest.mark.parametrize(("kind", "regions"), [("opt", 16), ("t5", 6)])
@POINTING
def test_a_decoders_mentions_are_found_from_its_tokens(decoders, kind, regions, text, slots):
  """Byte-level BPE joins "][" and "],", Unigram even "[0]" and "1]"; both mark spaces."""
  if "[11]" in text and regions <= 11:
    pytest.skip("as many regions cannot be pointed at")
  tokenizer = load_tokenizer(decoders[kind])
  tables = mention_tables(tokenizer, regions)
  found = resolve_mentions(np.array(encode(tokenizer, text)), *tables, max_regions=regions)
  assert found[found >= 0].tolist() == slots


def test_the_pieces_that_open_a_mention_or_hold_one(decoders):
  tokenizer = load_tokenizer(decoders["opt"])
  opens_bracket, digit = mention_tables(tokenizer, max_regions=4)
  pieces = {tokenizer.id_to_token(i) for i in np.flatnonzero(opens_bracket)}
  assert {"[", "Ġ[", "][", "Ġ(["} <= pieces
  assert {tokenizer.id_to_token(i) for i in np.flatnonzero(digit >= 0)} == set("0123")
  tokenizer = load_tokenizer(decoders["t5"])
  opens_bracket, digit = mention_tables(tokenizer, max_regions=4)
  values = {tokenizer.id_to_token(i): int(digit[i]) for i in np.flatnonzero(digit >= 0)}
  assert (values["0"], values["▁[0]"], values["▁[1"], values["2]"]) == (0, 4, 5, 2)


def test_a_decoder_that_splits_numbers_has_as_many_regions_as_it_does_not(decoders):
  with pytest.raises(DataError, match=r"splits the number 10, so \[10\] cannot be pointed at; .*<= 10"):
    mention_tables(load_tokenizer(decoders["t5"]), max_regions=16)


def test_a_stock_opt_folder_reads_as_transformers_reads_it(tmp_path):
  """vocab.json and merges.txt, as GPT-2 and OPT are published."""
  trained = Tokenizer(models.BPE())
  trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  trained.train_from_iterator(TEXTS, trainers.BpeTrainer(
    vocab_size=400, special_tokens=["<s>", "<pad>", "</s>", "<unk>"], show_progress=False,
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
  trained.model.save(str(tmp_path))
  ours, theirs = load_tokenizer(tmp_path), GPT2Tokenizer.from_pretrained(str(tmp_path))
  for text in (*TEXTS, "what is [0]?", " [1][2], a\n[3].", "naïve \u2603"):
    ids = encode(ours, text)
    assert ids == theirs(text).input_ids
    assert ours.decode(ids) == text
  assert ours.decode([ours.token_to_id("</s>")]) == ""
