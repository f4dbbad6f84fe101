"""Prompts as token rows: where they are split, grouped and read back."""
import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from data_pipeline import prompts
from data_pipeline.prompts import Prompting
from data_pipeline.tokenizer import encode, load_tokenizer, train_tokenizer
from tests.data_pipeline.tiny_tokenizers import TEXTS, opt_tokenizer, t5_tokenizer


@pytest.fixture(scope="module")
def opt(tmp_path_factory):
  tokenizer = load_tokenizer(opt_tokenizer(tmp_path_factory.mktemp("opt")))
  return Prompting(tokenizer, (2,), (), encode(tokenizer, "\n")[0], 1)


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
  tokenizer = load_tokenizer(t5_tokenizer(tmp_path_factory.mktemp("t5")))
  return Prompting(tokenizer, (), (1,), 1, 0, one_stream=False)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
  return Prompting(train_tokenizer(TEXTS, tmp_path_factory.mktemp("bert"), 400, 1), (5,), (), 3, 0)


def pieces(prompting, ids):
  return [prompting.tokenizer.id_to_token(i) for i in ids]


def test_one_stream_is_split_where_the_answer_begins(opt):
  prompt, text = prompts.split_tokens(opt, " Question: who is [0]? ANSWER: [1] waves ")
  assert [2, *encode(opt.tokenizer, "Question: who is [0]? ANSWER: [1] waves")] == [*prompt, *text]
  assert pieces(opt, prompt)[-1] == ":" and pieces(opt, text)[:2] == ["Ġ[", "1"]
  assert prompt == prompts.prompt_tokens(opt, "Question: who is [0]? ANSWER: ")


def test_two_streams_are_encoded_each_by_itself(t5):
  prompt, text = prompts.split_tokens(t5, "question: who is [0]? answer: [1] waves")
  assert prompt == [*encode(t5.tokenizer, "question: who is [0]? answer:"), 1]
  assert text == encode(t5.tokenizer, "[1] waves")


@pytest.mark.parametrize("text", ["a sunny beach", "question: who is [0]? answer: ", "answered: no"])
def test_without_an_answer_the_whole_text_follows_an_empty_prompt(opt, t5, text):
  assert prompts.split_tokens(opt, text) == ([2], encode(opt.tokenizer, text.strip()))
  assert prompts.split_tokens(t5, text) == ([1], encode(t5.tokenizer, text.strip()))


def test_a_piece_over_the_border_belongs_to_the_prompt():
  """Such as ":)"; where nothing is left for the answer, the whole text is one."""
  tokenizer = Tokenizer(models.WordLevel({"answer": 0, ":)": 1, "a": 2}, unk_token="a"))
  tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
  joined = Prompting(tokenizer, (), (), 9, 9)
  assert prompts.split_tokens(joined, "answer:) a") == ([0, 1], [2])
  assert prompts.split_tokens(joined, "answer:)") == ([], [0, 1])


def test_texts_with_the_same_prompt_share_a_row():
  pairs = [([7, 8], [1, 2, 3]), ([9], [4]), ([7, 8], [5]), ([6, 6, 6], [1])]
  rows, places = prompts.grouped(pairs, pad=0)
  assert places == [(0, 0), (1, 0), (0, 1), (2, 0)]
  assert {name: values.shape for name, values in rows.items()} == {
    "prompt": (4, 16), "real": (4, 16), "tokens": (4, 2, 16)}
  for (b, s), (prompt, text) in zip(places, pairs):
    assert rows["prompt"][b][rows["real"][b]].tolist() == prompt
    assert rows["real"][b, -1]
    assert rows["tokens"][b, s].tolist() == text + [0] * (16 - len(text))


def test_rows_have_few_sizes():
  sizes = {prompts.left_padded([[1] * n], 0)[0].shape[1] for n in range(1, 100)}
  assert sizes == {16, 32, 64, 128}
  assert [len(prompts.filled_up([[k]] * k)) for k in range(1, 6)] == [1, 2, 4, 4, 8]


def test_what_is_written_is_read_up_to_its_end(opt, t5, bert):
  assert prompts.read_text(opt, [*encode(opt.tokenizer, " a chef\nand more")]) == "a chef"
  assert prompts.read_text(t5, [*encode(t5.tokenizer, "a chef"), 1, 0, 0]) == "a chef"
  row = [*encode(bert.tokenizer, "[0], [1]'s hat (tall) is white."), 3, 0, 0]
  assert prompts.read_text(bert, np.array(row)) == "[0], [1]'s hat (tall) is white."
  row = encode(bert.tokenizer, "a chef rationale: [0] waves")
  assert prompts.read_text(bert, row, ["waves", "rationale:"]) == "a chef"
