"""Judgements: from graphs, from the original's label files, and from people's sheets."""

import csv
import json
import math

import numpy as np
import pytest

from data_pipeline import judge, teach, verbalize
from data_pipeline.judge import Judgement
from data_pipeline.records import DataError, ImageRecord, Statement
from data_pipeline.sources import scenes

CHEF = scenes.Figure("chef", "cup", "running", "teal", "tan", (4.0, 50.0, 32.0, 90.0), 3)
KING = scenes.Figure("king", "fish", "sitting", "rose", "light", (40.0, 10.0, 68.0, 40.0), 1)
SCENE = scenes.Scene("forest", "rainy", (CHEF, KING))


@pytest.fixture(scope="module")
def corpus():
  return [
    teach.teach_record(verbalize.verbalize(record, 1), 1)
    for record, _ in scenes.scene_records(1, 200)
  ]


def _statement(facts, rationale_facts=()):
  provenance = {"facts": facts, "rationale_facts": list(rationale_facts)}
  return Statement("1-0", "q", "a", "r", provenance=provenance)


@pytest.mark.parametrize(
  "facts,true",
  [
    ([["role", 0, "chef"]], True),
    ([["role", 1, "chef"]], False),
    ([["pose", 0, "running"], ["role", 1, "king"]], True),
    ([["pose", 1, "running"], ["role", 0, "king"]], False),
    ([["thing", 0, "cup"], ["weather", None, ["rainy", "snowy"]]], True),
    ([["thing", 0, "cup"], ["weather", None, ["sunny"]]], False),
    ([["place", None, "forest"]], True),
  ],
)
def test_truth_is_read_off_the_graph(facts, true):
  assert judge.is_true(_statement(facts), SCENE) == (true, True)
  assert judge.is_true(_statement([], facts), SCENE) == (True, true)


def test_what_the_graph_cannot_judge_is_refused():
  with pytest.raises(DataError, match="'near'"):
    judge.is_true(_statement([["near", 0, "dog"]]), SCENE)
  with pytest.raises(DataError, match="no facts"):
    judge.is_true(Statement("7", "q", "a", "r"), SCENE)
  photograph = ImageRecord("p.jpg", 1, 9, 9, (), statements=(_statement([]),))
  with pytest.raises(DataError, match="p.jpg"):
    judge.judge_from_scene([photograph], np.random.default_rng(0), share=1)


def test_a_share_is_judged_three_to_an_image(corpus):
  judged = judge.judge_from_scene(corpus, np.random.default_rng(0), share=0.06, wrong=0)
  assert len(judged) == 96  # 6 % of 200 x 8
  assert len({j.index for j in judged}) == 96
  assert len({j.index.split("-")[0] for j in judged}) == 32
  scene_of = {
    s.index: (s, scenes.scene_from_dict(r.extra["scene"])) for r in corpus for s in r.statements
  }
  for j in judged:
    answer, rationale = judge.is_true(*scene_of[j.index])
    assert (j.answer_score, j.rationale_score) == (answer, rationale)
    assert j.accept == (answer and rationale)
  assert judged == judge.judge_from_scene(corpus, np.random.default_rng(0), share=0.06, wrong=0)


def test_people_err_at_the_rate_and_consistently(corpus):
  right = judge.judge_from_scene(corpus, np.random.default_rng(0), share=1, wrong=0)
  erring = judge.judge_from_scene(corpus, np.random.default_rng(0), share=1, wrong=0.2)
  truth = {j.index: j.accept for j in right}
  assert len(erring) == len(right) == 1600
  assert abs(np.mean([truth[j.index] != j.accept for j in erring]) - 0.2) < 0.04
  assert all(j.accept == (j.answer_score == j.rationale_score == 1) for j in erring)


@pytest.mark.parametrize(
  "row,accept",
  [
    ({"reject_label": 0}, 1),
    ({"reject_label": 1}, 0),
    ({"label": ["accept", "reject", "accept"]}, 1),
    ({"label": ["accept", "reject", "reject"]}, 0),
    ({"label": ["accept", "accept", "accept"], "reject_label": 1}, 0),
    ({"accept": 1}, 1),
    ({"accept": "no"}, 0),
  ],
)
def test_all_label_forms_have_one_polarity(row, accept):
  read = judge.judgement_from_row({"index": "a-1", "qa_score": 0.5, "r_score": 2, **row})
  assert read == Judgement("a-1", accept, 0.5, 2.0)


def test_judgement_files_round_trip(tmp_path):
  judgements = [Judgement("1-0", 1, 1.0, 1.0, "me"), Judgement("1-1", 0, 0.0, 1.0)]
  judge.write_judgements(tmp_path / "j.jsonl", judgements)
  assert judge.read_judgements(tmp_path / "j.jsonl") == judgements
  judge.write_judgements(tmp_path / "k.jsonl", [Judgement("2-0", 0)])
  assert "NaN" not in (tmp_path / "k.jsonl").read_text()
  assert math.isnan(judge.read_judgements(tmp_path / "k.jsonl")[0].answer_score)


def test_several_people_judge_a_statement_together(tmp_path):
  path = tmp_path / "sheets.csv"
  path.write_text(
    "index,accept,answer_score,rationale_score,judge\n"
    "a,1,1,,ann\nb,1,,,ann\na,0,0.5,0,bob\nb,0,,,bob\na,yes,,0.5,cleo\nb,,,,cleo\n"
  )
  first, second = judge.read_judgements(path)
  assert first == Judgement("a", 1, 0.75, 0.25, "ann, bob, cleo")
  assert (second.index, second.accept, second.judge) == ("b", 0, "ann, bob")  # half is not enough
  assert math.isnan(second.answer_score)


def test_files_that_cannot_be_read_name_the_line(tmp_path):
  path = tmp_path / "j.jsonl"
  for row, fault in [
    ({"accept": 1}, "no `index`"),
    ({"index": "1"}, "no verdict"),
    ({"index": "1", "accept": "maybe"}, "'maybe'"),
    ({"index": "1", "accept": 1, "answer_score": "good"}, "'good'"),
  ]:
    path.write_text(json.dumps({"index": "0", "accept": 1}) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(DataError, match=f"j.jsonl:2.*{fault}"):
      judge.read_judgements(path)


def test_a_person_fills_in_a_csv_sheet(corpus, tmp_path):
  path = tmp_path / "sheet.csv"
  assert judge.write_sheet(corpus[:10], 0.15, path) == 12
  with path.open(newline="") as file:
    rows = list(csv.DictReader(file))
  assert judge.read_judgements(path) == []  # nothing is filled in yet
  regions = {f"{r.image}": r.regions for r in corpus}
  first = rows[0]["regions"].split(";")[0]
  number, edges = first.split(": ")
  box = regions[rows[0]["image"]][int(number)].box
  np.testing.assert_allclose([float(edge) for edge in edges.split(",")], box, atol=0.5)
  rows[0] |= {"accept": "1", "judge": "ann"}
  rows[4] |= {"accept": "no", "answer_score": "yes", "rationale_score": "0"}
  with path.open("w", newline="") as file:
    writer = csv.DictWriter(file, rows[0])
    writer.writeheader()
    writer.writerows(rows)
  first, second = judge.read_judgements(path)
  assert (first.index, first.accept, first.judge) == (rows[0]["index"], 1, "ann")
  assert second == Judgement(rows[4]["index"], 0, 1.0, 0.0)


def test_a_jsonl_sheet_has_the_same_rows(corpus, tmp_path):
  judge.write_sheet(corpus[:10], 0.15, tmp_path / "sheet.csv", seed=3)
  judge.write_sheet(corpus[:10], 0.15, tmp_path / "sheet.jsonl", seed=3)
  rows = [json.loads(line) for line in (tmp_path / "sheet.jsonl").open()]
  with (tmp_path / "sheet.csv").open(newline="") as file:
    assert rows == list(csv.DictReader(file))
  assert judge.read_judgements(tmp_path / "sheet.jsonl") == []


def test_parts_share_no_image(corpus):
  judged = judge.judge_from_scene(corpus, np.random.default_rng(0), share=0.3)
  train, held = judge.split_judgements(judged, corpus, held_out=0.25, seed=1)
  images = [{j.index.split("-")[0] for j in part} for part in (train, held)]
  assert not images[0] & images[1]
  assert len(images[1]) == round(0.25 * len(images[0] | images[1]))
  assert sorted(j.index for j in train + held) == sorted(j.index for j in judged)
  with pytest.raises(DataError, match="'x'"):
    judge.split_judgements([Judgement("x", 1)], corpus)


@pytest.mark.parametrize("share", [0, 1.5])
def test_shares_are_shares(corpus, share):
  with pytest.raises(DataError, match="share"):
    judge.judge_from_scene(corpus, np.random.default_rng(0), share=share)
