"""Asking and scoring with students of either kind: what a decoder is given, and what it answers."""
import jax
import numpy as np
import pytest

from data_pipeline.records import DataError
import lskd_jax
from lskd_jax import predictor
from lskd_jax.models.vit import Vit
from tests.lskd_jax.tiny import GATES
from tests.lskd_jax.tiny_models import make_model
from tests.lskd_jax.torch_language import Reference

BOXES = [(0, 0, 40, 40), (30, 10, 80, 60)]
# Two prompts of different lengths, a caption, an answer of one token, mentions on both sides.
SPLIT = [("question: who is [0]? answer:", " a chef rationale: [0], [1] wave"),
         ("question: who is [0]? answer:", " fish"),
         ("Question: is [1] beside [0], at the sunny beach? Answer:", " the king"),
         ("", "a sunny beach: [1] sits"), ("", "question: who is [0]? answer:")]
TEXTS = [prompt + text for prompt, text in SPLIT]
QUICK = dict(beams=2, max_tokens=8, min_tokens=6, length_penalty=1.0)  # one program for most tests
QUESTIONS = ["who is [0]?", "what does [1] do to [0] at the sunny beach?", "is it gold?"]


@pytest.fixture(scope="module")
def picture():
  return np.random.default_rng(0).integers(0, 255, (60, 80, 3), np.uint8)


@pytest.fixture(scope="module", params=["opt", "t5"])
def folder(request, tmp_path_factory):
  return make_model(tmp_path_factory.mktemp(request.param) / "model", request.param)


@pytest.fixture(scope="module")
def model(folder):
  return lskd_jax.load(folder)


@pytest.fixture(scope="module", params=["student", "generative"])
def anyone(request, tmp_path_factory):
  """A student of each kind."""
  return lskd_jax.load(make_model(tmp_path_factory.mktemp(request.param) / "model", request.param))


def likelihoods(model, picture, boxes, texts):
  return [row["lm"] for row in model.score(picture, boxes, texts)]


def reference(folder, model, picture):
  image = predictor.read_picture(picture)
  row = model._picture_row(image, predictor.check_boxes(BOXES, image.size, model.config.max_regions))
  return Reference(folder, row)


# --- the same as PyTorch -------------------------------------------------------------------------


def test_likelihoods_are_those_of_pytorch(folder, model, picture):
  """Of what follows "answer:", or of the whole text; whatever stands beside it in a batch."""
  found = model.score(picture, BOXES, TEXTS)
  assert [row["text"] for row in found] == TEXTS
  assert all(row["itm"] is None and row["itc"] is None for row in found)
  theirs = reference(folder, model, picture)
  expected = [theirs.likelihood(prompt, text) for prompt, text in SPLIT]
  np.testing.assert_allclose([row["lm"] for row in found], expected, rtol=1e-4)


@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_answers_are_those_of_pytorch(kind, picture, tmp_path):
  """Three questions of different lengths at once, against one after the other; the defaults."""
  folder = make_model(tmp_path / "model", kind, closed=("mention_gate",))
  model = lskd_jax.load(folder)
  found = model.ask(picture, BOXES, QUESTIONS)
  theirs, end = reference(folder, model, picture), model.config.decoder.end
  assert found == [
      theirs.answer(f"question: {question} answer:", end, num_beams=5, max_new_tokens=30,
                    min_new_tokens=1, length_penalty=-1.0) for question in QUESTIONS]
  assert len(set(found)) > 1


# --- what an answer depends on -------------------------------------------------------------------


def test_a_question_gets_the_same_answer_alone(anyone, picture):
  together = anyone.ask(picture, BOXES, QUESTIONS, **QUICK)
  assert [anyone.ask(picture, BOXES, question, **QUICK) for question in QUESTIONS] == together
  assert all(isinstance(answer, str) for answer in together)
  assert anyone.ask(picture, BOXES, []) == []


def test_where_a_region_is_decides_how_likely_an_answer_is(model, picture):
  here, there = (likelihoods(model, picture, boxes, TEXTS[:1]) for boxes in (BOXES, BOXES[::-1]))
  assert abs(here[0] - there[0]) > 1e-4


def test_before_training_regions_change_nothing(picture, tmp_path):
  """Their gates are at zero."""
  model = lskd_jax.load(make_model(tmp_path / "model", "generative", closed=GATES))
  here, there = (likelihoods(model, picture, boxes, TEXTS) for boxes in (BOXES, BOXES[::-1]))
  assert here == there


def test_draws_follow_their_seed(anyone, picture):
  draw = lambda seed: anyone.ask(picture, BOXES, QUESTIONS[0], sample=True, temperature=2.0,
                                 max_tokens=8, seed=seed)
  assert draw(0) == draw(0) != draw(1)


def test_an_answer_ends_before_a_stop(anyone, picture):
  whole = anyone.ask(picture, BOXES, QUESTIONS[0], **QUICK)
  word = whole.split()[-1]
  assert anyone.ask(picture, BOXES, QUESTIONS[0], stop=["not there", word], **QUICK) == (
    whole.partition(word)[0].strip()) != whole


def test_the_prompt_can_be_another(anyone, picture):
  """A caption's is empty, or what the caption begins with."""
  usual = anyone.ask(picture, BOXES, "who is [0]?", **QUICK)
  assert usual == anyone.ask(picture, BOXES, "who is [0]?", prompt="question: {question} answer:", **QUICK)
  free = anyone.ask(picture, BOXES, "[0] is a", prompt="{question}", **QUICK)
  assert free == anyone.caption(picture, BOXES, "[0] is a", **QUICK) != usual
  assert anyone.caption(picture, **QUICK) != free


# --- once ----------------------------------------------------------------------------------------


def test_the_picture_is_computed_once_for_all_questions(picture, tmp_path, monkeypatch):
  seen, call = [], Vit.__call__
  monkeypatch.setattr(Vit, "__call__", lambda self, image: seen.append(image.shape)
                      or call(self, image))
  lskd_jax.load(make_model(tmp_path / "model", "generative")).ask(picture, BOXES, QUESTIONS, **QUICK)
  assert seen == [(1, 48, 48, 3)]


def test_questions_of_similar_length_compile_nothing_anew(anyone, picture):
  compiled = []
  listen = lambda event, *_, **__: compiled.append(event) if "backend_compile" in event else None
  anyone.ask(picture, BOXES, "who is [0]?", **QUICK)
  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    anyone.ask(picture[:50], BOXES[:1], "is [0] a king?", **QUICK)
    assert compiled == []
    anyone.ask(picture, BOXES, ["who is [0]?"] * 2, **QUICK)
    assert len(compiled) == 1  # two prompts are another shape; the picture's is the same
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)


# --- what cannot be asked ------------------------------------------------------------------------


@pytest.mark.parametrize("question,settings,error", [
  ("who is [2]?", {}, r"question 'who is \[2\]\?' mentions \[2\], but only \[0\] to \[1\] are given; "
   "add a region or mend the question"),
  (" ", {}, "question ' ' is empty"),
  ("who?", dict(prompt="answer:"), r"prompt 'answer:' has no \{question\}"),
  ("who?", dict(prompt="{question} [3]"), r"prompt '\{question\} \[3\]' mentions \[3\]"),
  ("who?", dict(stop=[""]), r"stop=\[''\]: want a list of strings, none of them empty"),
  ("who?", dict(stop="."), r"stop='\.': want a list of strings"),
  ("who?", dict(seed=2**32), "seed=4294967296: want 0 to 4294967295"),
  ("who?", dict(beams=0), "beams=0: want 1 or more"),
  ("who?", dict(sample=True, beams=3), "beams=3 searches and sample=True draws"),
])
def test_an_error_names_the_culprit(anyone, picture, question, settings, error):
  with pytest.raises(ValueError, match=error) as caught:
    anyone.ask(picture, BOXES, question, **settings)
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind,most", [("student", 64), ("opt", 94)])
def test_positions_are_limited(kind, most, picture, tmp_path):
  model = lskd_jax.load(make_model(tmp_path / "model", kind))
  error = rf"has \d+ tokens, and 30 follow; this model reads {most} in all"
  with pytest.raises(DataError, match=f"prompt 'question: it it .* {error}"):
    model.ask(picture, [], "it " * 40)
  if kind == "opt":
    with pytest.raises(DataError, match=r"text 'it it .* has 1 tokens, and \d+ follow"):
      model.score(picture, [], ["it " * 80])
