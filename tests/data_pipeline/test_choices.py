"""Questions about scenes: one right choice, others right elsewhere, trades that matter."""

import collections
import json

import numpy as np
import pytest

from data_pipeline import choices, teach, verbalize
from data_pipeline.records import DataError, ImageRecord
from data_pipeline.sources import scenes


@pytest.fixture(scope="module")
def corpus():
  return [record for record, _ in scenes.scene_records(21, 80, min_figures=4)]


@pytest.fixture(scope="module")
def items(corpus):
  return choices.choice_items(corpus, np.random.default_rng(0), per_image=4)


def _true_answers(scene, item):
  """{region ids: the true short answer} for the type of an item."""
  reader = teach.Reader(verbalize.verbalize_scene(scene, None, 0))
  return {t: reader.draft(item.type, t).answer for t in reader.targets(item.type)}


def _scene_of(corpus, item):
  return scenes.scene_from_dict(corpus[item.image_id].extra["scene"])


def test_the_label_is_true_and_the_others_are_true_elsewhere(corpus, items):
  for item in items:
    answers = _true_answers(_scene_of(corpus, item), item)
    right = answers.pop(item.target)
    assert len(item.choices) == len(set(item.choices)) == 4
    assert item.choices[item.label].endswith(right)
    for k, choice in enumerate(item.choices):
      if k != item.label:
        assert not choice.endswith(right)
        assert any(choice.endswith(answer) for answer in answers.values())


def test_after_a_trade_the_swap_label_is_true(corpus, items):
  for item in items:
    i, j = item.swap
    assert i in item.target
    before = _scene_of(corpus, item)
    figures = list(before.figures)
    figures[i], figures[j] = figures[j], figures[i]
    after = scenes.Scene(before.place, before.weather, tuple(figures))
    assert item.swap_label != item.label
    assert item.choices[item.swap_label].endswith(_true_answers(after, item)[item.target])


def test_rationales_fit_the_right_answer(corpus, items):
  for item in items:
    reader = teach.Reader(verbalize.verbalize_scene(_scene_of(corpus, item), None, 0))
    draft = reader.draft(item.type, item.target)
    assert len(set(item.rationales)) == 4
    right = item.rationales[item.rationale_label]
    assert right.endswith(draft.long) or right.endswith(draft.short)


def test_mentions_are_of_the_target_only(items):
  for item in items:
    for text in (item.question, *item.choices, *item.rationales):
      assert all(f"[{k}]" not in text for k in range(6) if k not in item.target)


def test_positions_and_types_are_balanced(items):
  types = collections.Counter(item.type for item in items)
  assert set(types) == set(teach.TYPES)
  assert min(types.values()) > 20
  for part in ("label", "swap_label", "rationale_label"):
    counts = np.bincount([getattr(item, part) for item in items], minlength=4)
    assert counts.min() > 0.15 * len(items)


def test_the_same_seed_asks_the_same(corpus, items):
  assert choices.choice_items(corpus, np.random.default_rng(0), per_image=4) == items
  assert len({item.index for item in items}) == len(items)
  assert max(collections.Counter(item.image for item in items).values()) <= 4


def test_figures_too_much_alike_are_not_asked_about():
  figure = scenes.Figure("chef", "cup", "running", "teal", "tan", (4.0, 50.0, 32.0, 90.0), 0)
  scene = scenes.Scene("city", "sunny", (figure,) * 4)
  record = scenes.scene_record(scene, "same.png", 0)
  assert choices.choice_items([record], np.random.default_rng(0)) == []


def test_captions_are_of_pictures_with_as_many_figures(corpus):
  items = choices.caption_items(corpus, np.random.default_rng(0))
  assert len(items) == len(corpus)
  of_caption = {}
  for record in corpus:
    scene = scenes.scene_from_dict(record.extra["scene"])
    for caption in verbalize.verbalize_scene(scene, None, 0).captions:
      of_caption[caption] = (record.image_id, len(scene.figures))
  for item in items:
    shown = [of_caption[caption] for caption in item.choices]
    assert shown[item.label][0] == item.image_id
    assert len(set(shown)) == 4
    assert len({figures for _, figures in shown}) == 1
    assert item.swap is None and item.rationales == ()


def test_items_round_trip_as_jsonl(corpus, items, tmp_path):
  asked = items + choices.caption_items(corpus, np.random.default_rng(0))
  choices.write_items(tmp_path / "items.jsonl", asked)
  assert choices.read_items(tmp_path / "items.jsonl") == asked


def test_other_records_and_files_are_refused(tmp_path):
  with pytest.raises(DataError, match="p.jpg: no scene graph"):
    choices.choice_items([ImageRecord("p.jpg", 1, 9, 9, ())], np.random.default_rng(0))
  (tmp_path / "items.jsonl").write_text(json.dumps({"index": "1"}) + "\n")
  with pytest.raises(DataError, match="items.jsonl:1"):
    choices.read_items(tmp_path / "items.jsonl")
