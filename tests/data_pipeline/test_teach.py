"""The template teacher: true on true words, wrong on wrong ones, short, varied and reproducible."""

import collections
import re

import numpy as np
import pytest

from data_pipeline import clues, commonsense, judge, records, teach, verbalize
from data_pipeline.records import ImageRecord, Region, Verbalization
from data_pipeline.sources import scenes


def _words(text):
  """As BERT splits text: words, and every other sign by itself."""
  return re.findall(r"\w+|[^\w\s]", text)


def _taught(count, error_rate, seed=0, **options):
  for record, _ in scenes.scene_records(seed, count):
    yield teach.teach_record(verbalize.verbalize(record, seed, error_rate), seed, **options)


def _record(local, caption=""):
  regions = tuple(Region(i, (0, 0, 10, 10)) for i in local)
  words = Verbalization(captions=(caption,) if caption else (), local=local)
  return ImageRecord("a.png", 1, 96, 96, regions, verbalization=words)


def _answers(local, caption=""):
  """{(type, regions): (answer, reason)} of everything the teacher can say."""
  reader = teach.Reader(_record(local, caption).verbalization)
  drafts = ((t, r, reader.draft(t, r)) for t in teach.TYPES for r in reader.targets(t))
  return {(t, r): (d.answer, d.long) for t, r, d in drafts if d}


def test_what_it_says_about_a_figure():
  local = {
    2: "a figure in a tall white hat, holding an umbrella, waving",
    4: "a figure in a gold crown, holding a ball, sitting",
  }
  said = _answers(local, "a rainy beach: and so on")
  assert said == {
    ("role", (2,)): ("a chef", "a tall white hat"),
    ("role", (4,)): ("a king", "a gold crown"),
    ("why", (2,)): ("to stay dry", "an umbrella in the rain"),
    ("why", (4,)): ("to play a game", "a ball"),
    ("next", (2,)): ("close the umbrella", "an umbrella at the beach"),
    ("next", (4,)): ("kick the ball", "a ball at the beach"),
    ("feel", (2,)): ("friendly", "waving in the rain"),
    ("feel", (4,)): ("tired", "sitting in the rain"),
    ("relation", (2, 4)): ("greets the king", "waving near the gold crown"),
    ("relation", (4, 2)): ("rests near the chef", "sitting near the tall white hat"),
  }
  assert _answers(local, "a sunny city")["why", (2,)][0] == "to make some shade"
  assert _answers(local, "a sunny city")["next", (4,)][0] == "bounce the ball"


def test_what_it_says_about_a_photograph():
  said = _answers({0: "a large person at the left, next to a surfboard", 1: "a surfboard"})
  assert said["role", (0,)] == ("a surfer", "a surfboard")
  assert said["why", (1,)] == ("to ride the waves", "a surfboard")
  assert said["relation", (0, 1)] == ("rides the surfboard", "next to the surfboard")
  assert said["feel", (0,)] == ("excited", "a surfboard")
  assert ("relation", (1, 0)) not in said


def test_a_thing_on_the_other_side_is_another_one():
  near = "a person at the left, next to a dog"
  assert ("relation", (0, 1)) in _answers({0: near, 1: "a dog in the middle"})
  assert ("relation", (0, 1)) not in _answers({0: near, 1: "a dog at the right"})


def test_phrasings_of_a_captioning_model_are_read_too():
  read = clues.read_description("A man holding a red tennis racket, with two sports balls")
  assert (read.noun, read.held, read.near) == ("person", "tennis racket", ("sports ball",))
  setting = clues.read_captions(["Two people in the woods.", "It is raining."])
  assert setting == clues.Setting(place="forest", weather="rainy")


def test_everything_is_true_when_the_words_are():
  for record in _taught(60, error_rate=0):
    scene = scenes.scene_from_dict(record.extra["scene"])
    for statement in record.statements:
      assert judge.is_true(statement, scene) == (True, True), statement


def test_wrong_words_make_wrong_statements():
  truths = [
    judge.is_true(statement, scenes.scene_from_dict(record.extra["scene"]))
    for record in _taught(300, error_rate=0.25)
    for statement in record.statements
  ]
  assert 0.58 < np.mean([all(truth) for truth in truths]) < 0.67
  assert 0.65 < np.mean([answer for answer, _ in truths]) < 0.75


def test_statements_are_short_distinct_and_valid():
  vocabulary, indices = set(), set()
  for record in _taught(150, error_rate=0.25):
    assert records.validate(record) == record
    assert records.record_from_json(records.record_to_json(record)) == record
    asked = [(s.provenance["type"], s.region) for s in record.statements]
    assert len(asked) == len(set(asked)) == 8
    for s in record.statements:
      text = f"question: {s.question} answer: {s.answer} rationale: {s.rationale}"
      assert len(_words(text)) <= 40
      assert set(records.mentions(text)) == set(s.region)
      assert s.region_all == tuple(range(len(record.regions)))
      vocabulary |= set(_words(text))
      indices.add(s.index)
    for text in (*record.verbalization.captions, *record.verbalization.local.values()):
      vocabulary |= set(_words(text))
  assert len(indices) == 150 * 8
  assert len(vocabulary) <= 250


def test_types_take_turns_and_phrasings_vary():
  sources, questions = collections.Counter(), collections.defaultdict(set)
  for record in _taught(100, error_rate=0):
    for s in record.statements:
      sources[s.source] += 1
      questions[s.source].add(re.sub(r"\d", "", s.question))
  assert set(sources) == {f"template_v1_{type}" for type in teach.TYPES}
  assert max(sources.values()) - min(sources.values()) < 50  # of 160 each
  assert all(len(forms) >= 3 for forms in questions.values())


def test_the_same_seed_writes_the_same_statements():
  assert list(_taught(3, 0.25, seed=1)) == list(_taught(3, 0.25, seed=1))
  record = next(_taught(1, 0.25, seed=1))
  assert teach.teach_record(record, seed=2).statements != record.statements


def test_an_index_names_what_is_said_of_which_picture():
  """Judgements are found by it: it must not mean another statement in a corpus that was taught anew."""
  said, count = {}, 0
  for pictures in (0, 1):
    for record, _ in scenes.scene_records(pictures, 20):
      for seed in range(4):
        for s in teach.teach_record(verbalize.verbalize(record, 0), seed).statements:
          text = (record.image, s.question, s.answer, s.rationale)
          assert said.setdefault(s.index, text) == text
          count += 1
  assert len(set(said.values())) == len(said) < count  # one index for each, whenever it is said


def test_silence_where_nothing_is_known():
  assert teach.teach(_record({}), np.random.default_rng(0)) == ()
  assert teach.teach(_record({0: "a thing"}), np.random.default_rng(0)) == ()


def test_few_regions_give_few_statements():
  statements = teach.teach(
    _record({0: "a figure in a blue cap, holding a cup, standing"}), np.random.default_rng(0), 8
  )
  assert [s.region for s in statements] == [(0,)] * 4  # no second region, no relation


@pytest.mark.parametrize("table", [commonsense.WHY, commonsense.NEXT])
def test_answers_about_different_things_differ(table):
  texts = [set([e] if isinstance(e, str) else e.values()) for e in table.values()]
  assert set(table) == set(scenes.THINGS)
  assert len(set().union(*texts)) == sum(map(len, texts))


def test_the_knowledge_covers_scenes_and_the_classes_of_coco():
  assert {verbalize.HEADWEAR[r]: r for r in scenes.ROLES} == commonsense.HEADWEAR
  assert {p: does for p, (_, does) in commonsense.POSES.items()} == scenes.RELATIONS
  assert set(commonsense.PLACES) == set(scenes.PLACES)
  assert set(commonsense.WEATHER) == set(scenes.WEATHERS)
  assert len(commonsense.OBJECTS) == 79  # COCO's 80 without "person"
  assert set(commonsense.BESIDE) <= set(commonsense.OBJECTS)
  assert set(commonsense.ANIMAL_FEELINGS) <= set(commonsense.OBJECTS)
