"""What a demo reports, on a small results tree made up here."""
import json

import pytest

from data_pipeline import stages
from data_pipeline.records import ImageRecord, Region, Statement
from data_pipeline.sources import scenes
from lskd_jax import demo_report
from lskd_jax.demo_report import collect, mean_interval, table

HEADS = ("itm", "itc", "itm+itc")


def column(lm):
  """One column's accuracies: the LM head's, and other heads that must not be mistaken for it."""
  return {"lm": lm, **dict.fromkeys(HEADS, 0.99)}


def result(q_a, swap=0.2, extended=False, steps=900):
  columns = {"q_a": column(q_a), "qa_r": column(0.3), "q_ar": column(0.1), "swap": column(swap),
             "caption": column(0.9), "types": {"role": q_a}}
  return {"columns": columns, "steps": steps, "extended": extended}


def make_seed(folder, seed, arms, scores=(0.9, 0.8, 0.2, 0.7)):
  """A finished demo of two pictures and four statements; those numbered 0 and 1 are true.

  With the cut at 0.7 the default scores keep statements 0, 1 and 3: 2 of 3 are true.
  """
  for name in ("results", "runs/lskd"):
    (folder / name).mkdir(parents=True)
  for name, found in arms.items():
    stages.write_json(folder / "results" / f"{name}.json", found)

  def record(i):
    statements = tuple(Statement(str(k), "who is [0]?", "a chef", "[0] has a hat", score=scores[k])
                       for k in (2 * i, 2 * i + 1))
    image = scenes.image_name(seed, i)
    (folder / "words/images" / image).parent.mkdir(parents=True, exist_ok=True)
    scenes.picture(seed, i, scenes.make_scene(seed, i)).save(folder / "words/images" / image)
    return ImageRecord(image, i, 96, 96, (Region(0, (8.0, 8.0, 40.0, 60.0), "person"),), statements)
  for stage in ("taught", "scored"):
    stages.run_stage(stage, [[0, 1]], record, folder / stage, {}, progress=False)
  stages.write_json(folder / "truth.json", {"0": True, "1": True, "2": False, "3": False})
  stages.write_json(folder / "demo.json", {"seed": seed})
  stages.write_json(folder / "seconds.json", 100.5)
  stages.write_json(folder / "cut.json", {"cut": 0.7, "critic": "evidence", "rule": "best F0.5",
                                          "ap": {"evidence": 0.8, "heads": 0.6}, "held_out": 4})
  stages.write_json(folder / "held-out-scores.json", {"labels": [1, 1, 0, 0], "heads": [0.5, 0.6, 0.7, 0.1],
                                                      "evidence": [0.9, 0.8, 0.2, 0.7]})
  lines = [{"step": 1, "loss": 3.0}, {"step": 2, "dev_q_a": 0.5}, {"step": 3, "loss": 2.0}]
  (folder / "runs/lskd/metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
  return folder


@pytest.fixture
def one(tmp_path):
  return make_seed(tmp_path / "one", 3, {
    "unfiltered": result(0.6), "lskd": result(0.7), "none": result(0.25)})


@pytest.mark.parametrize("values,mean,low,high", [
  ([1.0, 2.0, 3.0], 2.0, -0.4843, 4.4843),   # sd 1: 4.303 / sqrt 3 = 2.4843
  ([0.0, 1.0], 0.5, -5.853, 6.853),          # sd sqrt 0.5: 12.706 / 2 = 6.353
  ([5.0] * 10, 5.0, 5.0, 5.0),
  ([0.0, 2.0] * 5, 1.0, 0.246, 1.754),       # sd sqrt(10 / 9): 2.262 / 3 = 0.754
  ([0.0, 1.0, 2.0] * 4, 1.0, 0.5175, 1.4825),  # sd sqrt(8 / 11), 12 of them: 1.96 sqrt(8 / 132)
])
def test_mean_and_interval(values, mean, low, high):
  assert mean_interval(values) == pytest.approx({"mean": mean, "low": low, "high": high}, abs=1e-4)


def test_the_results_of_one_seed(one):
  found = collect([one])
  assert found["seeds"] == [3] and found["seconds"] == 100.5
  assert found["arms"]["lskd"] == {"q_a": 0.7, "qa_r": 0.3, "q_ar": 0.1, "swap": 0.2, "caption": 0.9,
                                   "head": "lm"}
  # Two of four statements are true; three are kept, of which two are true.
  assert found["critic"] == {"ap": 0.8, "precision_before": 0.5, "precision_after": 0.6667,
                             "kept": 0.75}
  seed, = found["per_seed"]
  assert seed["arms"]["lskd"]["all_heads"]["q_a"]["itm"] == 0.99
  assert seed["critic"]["ap_by_kind"] == {"evidence": 0.8, "heads": 0.6}
  assert seed["critic"]["kind"] == "evidence"
  assert "means" not in found and "differences" not in found
  json.dumps(found)


def test_the_results_of_three_seeds(tmp_path):
  """Medians of 0.5 0.7 0.9; the pairs differ by 0.1, 0.2 and 0.3."""
  folders = [make_seed(tmp_path / str(k), k, {
    "unfiltered": result(q_a - 0.1 * (k + 1)), "lskd": result(q_a), "none": result(0.25),
    **({"overlay": result(0.3)} if k else {})}) for k, q_a in enumerate((0.9, 0.5, 0.7))]
  found = collect(folders)
  assert found["seeds"] == [0, 1, 2] and found["seconds"] == 301.5
  assert found["arms"]["lskd"]["q_a"] == 0.7
  assert found["means"]["arms"]["lskd"]["q_a"] == 0.7
  assert found["lowest"]["arms"]["lskd"]["q_a"] == 0.5
  assert "overlay" not in found["arms"]  # not measured with every seed
  difference = found["differences"]["lskd - unfiltered, q_a"]
  assert difference == pytest.approx({"mean": 0.2, "low": -0.0484, "high": 0.4484}, abs=1e-4)
  assert found["differences"]["precision after - before"]["mean"] == pytest.approx(0.1667, abs=1e-4)
  text = table(found)
  assert "medians of seeds 0, 1, 2" in text
  assert "lskd - unfiltered, q_a: +20.0 points (95 % interval -4.8 to +44.8)" in text


def test_the_table(one):
  lines = table(collect([one])).splitlines()
  rows = {line.split()[0]: line.split()[1:] for line in lines[1:6]}
  assert rows["arm"] == ["Q→A", "QA→R", "Q→AR", "swap", "caption"]
  assert rows["chance"] == ["25.0", "25.0", "6.2", "25.0", "25.0"]
  assert rows["lskd"] == ["70.0", "30.0", "10.0", "20.0", "90.0"]
  assert list(rows) == ["arm", "chance", "unfiltered", "lskd", "none"]
  assert len({len(line) for line in lines[1:6]}) == 1  # columns stand under their titles
  assert "scores by the lm head; seed 3" in lines
  assert ("critic: AP 80.0; true statements 50.0 % before the cut, 66.7 % after it, 75 % kept"
          in lines)


def test_what_a_reader_must_know_is_said(tmp_path):
  folder = make_seed(tmp_path / "demo", 3, {
    "unfiltered": result(0.31), "lskd": result(0.7, extended=True, steps=1800), "none": result(0.25)})
  text = table(collect([folder]))
  assert "seed 3: `unfiltered` has not converged; its row supports no claim" in text
  assert ("seed 3: `lskd` was at chance at half its steps and was extended to 1800 steps" in text)
  assert "`none`" not in text  # at chance, where it belongs


def test_nothing_kept_is_no_division_by_zero(tmp_path):
  folder = make_seed(tmp_path / "demo", 3, {"lskd": result(0.7)}, scores=(0.1, 0.1, 0.1, 0.1))
  critic = collect([folder])["critic"]
  assert critic["kept"] == 0 and critic["precision_after"] == 0


def test_the_page(one, tmp_path):
  path = tmp_path / "report.html"
  demo_report.write(path, [one], collect([one]))
  page = path.read_text()
  for text in ("lskd demo", "unfiltered", "70.0", "evidence (best F0.5)", "Q→AR",
               "50.0 % before the cut, 66.7 % after", "a chef"):
    assert text in page, text
