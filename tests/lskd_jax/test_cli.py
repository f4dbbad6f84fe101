"""The command line: the whole road on a few scenes and on photographs, and what it prints."""
import csv
import json
import os
from pathlib import Path
import shlex
import subprocess
import sys
import types

import numpy as np
import pytest

from data_pipeline import choices, stages
from data_pipeline.corpus import open_corpus
from data_pipeline.sources import scenes
from lskd_jax import cli, goodput
from lskd_jax.convert.model_directory import Imported
from lskd_jax.train import Run
from lskd_jax.trees import read_manifest
from tests.lskd_jax.tiny_models import OVERRIDES, make_model

ROOT = Path(__file__).resolve().parents[2]
VERBS = ["demo", "train", "watch", "plan", "eval", "score", "ask", "import", "export",
         *(f"corpus {stage}" for stage in (
           "verbalize", "teach", "judge", "score", "filter", "build", "report", "publish"))]


def lskd(*words):
  """Runs a command that has to succeed."""
  assert cli.main([str(word) for word in words]) == 0


def start(*words):
  """A command in a process of its own."""
  return subprocess.run([sys.executable, "-m", "lskd_jax.cli", *map(str, words)], cwd=ROOT,
                        capture_output=True, text=True, check=False)


# --- help ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_an_example(verb, capsys):
  with pytest.raises(SystemExit) as caught:
    cli.main([*verb.split(), "--help"])
  assert caught.value.code == 0
  assert f"example: lskd {verb}" in capsys.readouterr().out


def test_the_examples_can_be_read(capsys):
  """The arguments that the help shows exist."""
  for verb in VERBS:
    with pytest.raises(SystemExit):
      cli.main([*verb.split(), "--help"])
    text = " ".join(capsys.readouterr().out.partition("example: lskd ")[2].split())
    assert cli.read_arguments(shlex.split(text)).run


def test_help_is_quick_and_leaves_jax_alone():
  code = ("import sys; from lskd_jax import cli\n"
          "try: cli.main(['--help'])\n"
          "except SystemExit: pass\n"
          "sys.exit(any(name in sys.modules for name in ('jax', 'flax', 'numpy', 'PIL')))")
  assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False,
                        capture_output=True).returncode == 0


@pytest.mark.parametrize("words", [
  [], ["corpus"], ["paint"], ["corpus", "teach"], ["score", "--region", "1,2,3"],
  ["corpus", "verbalize", "--source", "scenes", "--out", "x", "--count", "0"],
  ["corpus", "verbalize", "--source", "coco", "--out", "x"],
  "corpus verbalize --source coco --annotations a --images b --out x --count 5".split(),
  "corpus verbalize --source scenes --images b --out x".split(),
  "corpus filter --corpus x --out y --min-score nan".split(),
  "corpus publish --corpus x --out y --threshold inf".split(),
  ["ask", "--model", "m", "--image", "i", "--question", "q", "--top-k", "3"],
  ["train", "--config", "a", "--workdir", "b", "--devices-per-process", "2"],
  ["demo", "--config.optim.steps=2"], ["train", "--config", "a", "--workdir", "b", "--confi.x=1"],
])
def test_wrong_usage_exits_with_two(words, capsys):
  with pytest.raises(SystemExit) as caught:
    cli.main(words)
  assert caught.value.code == 2
  assert "lskd" in capsys.readouterr().err


def test_the_demo_gets_its_arguments(monkeypatch):
  calls = []
  demo = types.ModuleType("lskd_jax.demo")
  demo.run = lambda **arguments: calls.append(arguments)
  monkeypatch.setitem(sys.modules, "lskd_jax.demo", demo)
  monkeypatch.setattr("lskd_jax.demo", demo, raising=False)
  lskd("demo", "--quick", "--workdir", "there", "--seeds", 3)
  assert calls == [dict(workdir=Path("there"), quick=True, full=False, seed=0, seeds=3)]


# --- errors --------------------------------------------------------------------------------------


def fails(error, monkeypatch, capsys):
  """The exit code and the lines on stderr of a verb that raises."""
  def run(**arguments):
    raise error
  demo = types.ModuleType("lskd_jax.demo")
  demo.run = run
  monkeypatch.setitem(sys.modules, "lskd_jax.demo", demo)
  monkeypatch.setattr("lskd_jax.demo", demo, raising=False)
  return cli.main(["demo"]), capsys.readouterr().err.splitlines()


def test_an_interrupted_command_says_how_to_go_on(monkeypatch, capsys):
  code, lines = fails(KeyboardInterrupt(), monkeypatch, capsys)
  assert code == 130
  assert lines == ["lskd: interrupted; run the same command again: demo, corpus and train go on where "
                   "they stopped"]


def test_what_the_system_refuses_names_the_file(monkeypatch, capsys):
  error = PermissionError(13, "Permission denied", "/data/out")
  assert fails(error, monkeypatch, capsys) == (1, ["lskd: error: /data/out: Permission denied"])
  error = OSError(28, "No space left on device")
  assert fails(error, monkeypatch, capsys) == (
    1, ["lskd: error: the disk is full; free some space and run again"])


def test_an_error_of_the_program_keeps_its_traceback(monkeypatch, capsys):
  for error in (TypeError("wrong"), ZeroDivisionError(), ValueError("from a library")):
    with pytest.raises(type(error)):
      fails(error, monkeypatch, capsys)


# --- the road ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def road(tmp_path_factory):
  """A folder in which eight scenes were verbalized, taught, judged; and a student."""
  folder = tmp_path_factory.mktemp("road")
  lskd("corpus", "verbalize", "--source", "scenes", "--count", 8, "--out", folder / "words")
  lskd("corpus", "teach", "--corpus", folder / "words", "--out", folder / "taught")
  lskd("corpus", "judge", "--corpus", folder / "taught", "--share", 0.5,
       "--out", folder / "judged.jsonl")
  make_model(folder / "model")
  return folder


@pytest.fixture(scope="module")
def scored(road):
  lskd("corpus", "score", "--corpus", road / "taught", "--model", road / "model",
       "--judgements", road / "judged.jsonl", "--out", road / "scored")
  return road / "scored"


def test_pictures_and_words_are_written_together(road, capsys):
  lskd("corpus", "verbalize", "--source", "scenes", "--count", 8, "--out", road / "words")
  said = capsys.readouterr().out
  expected = [record for record, _ in scenes.scene_records(0, 8)]
  regions = sum(len(record.regions) for record in expected)
  assert said.startswith(f"verbalize: 8 images, {regions} regions, 0 statements in ")
  assert "rejected: 0\n" in said
  assert f"next: lskd corpus teach --corpus {road / 'words'} --out DIR" in said
  names = sorted(path.name for path in (road / "words" / "images" / "scenes").iterdir())
  assert names == [f"0-{k:06d}.png" for k in range(8)]
  records = list(stages.read_records(road / "words"))
  assert [record.regions for record in records] == [record.regions for record in expected]
  assert all(record.verbalization.captions for record in records)


def test_folders_know_where_the_pictures_are_also_when_moved(road, tmp_path, capsys):
  moved = tmp_path / "moved"
  moved.mkdir()
  for name in ("words", "taught"):
    subprocess.run(["cp", "-r", road / name, moved / name], check=True)
  lskd("corpus", "build", "--corpus", moved / "taught", "--out", moved / "built")
  (moved / "words" / "images").rename(moved / "pictures")
  assert cli.main(["corpus", "build", "--corpus", str(moved / "taught"), "--out",
                   str(moved / "again")]) == 1
  assert f"{moved / 'words/images'}: the images noted" in capsys.readouterr().err
  lskd("corpus", "build", "--corpus", moved / "taught", "--images", moved / "pictures",
       "--out", moved / "again")


def test_judgements_are_never_overwritten(road, capsys):
  sheet = road / "sheets" / "sheet.csv"
  command = ["corpus", "judge", "--corpus", road / "taught", "--sheet", "--share", 0.1,
             "--out", sheet]
  lskd(*command)
  lskd(*command)  # the same again
  with sheet.open(newline="") as file:
    rows = list(csv.DictReader(file))
  assert len(rows) == 6 and rows[0]["accept"] == ""
  filled = sheet.read_text().replace(",,,\n", ",1,,\n")
  sheet.write_text(filled)
  assert cli.main(list(map(str, command))) == 1
  assert f"{sheet}: is there with other content" in capsys.readouterr().err
  assert sheet.read_text() == filled
  assert os.listdir(sheet.parent) == ["sheet.csv"]


def test_judgements_are_not_written_as_csv(road, capsys):
  words = ["corpus", "judge", "--corpus", road / "taught", "--out", road / "judged.csv"]
  assert cli.main(list(map(str, words))) == 1
  assert f"--out {road / 'judged.csv'}: judgements are written as .jsonl" in capsys.readouterr().err
  assert not (road / "judged.csv").exists()


def test_scores_come_from_the_judgements(road, scored, capsys):
  capsys.readouterr()
  lskd("corpus", "score", "--corpus", road / "taught", "--model", road / "model",
       "--judgements", road / "judged.jsonl", "--out", scored)
  said = capsys.readouterr().out
  assert "scores: P(accept), fitted to 32 judgements" in said
  assert all(0 < s.score < 1 for r in stages.read_records(scored) for s in r.statements)
  assert json.loads((scored / "critic.json").read_text())["judgements"] == 32


def test_a_critic_that_saw_no_picture_is_an_error_that_can_be_mended(road, tmp_path, capsys):
  (tmp_path / "empty").mkdir()
  words = ["corpus", "score", "--corpus", road / "taught", "--out", tmp_path / "out",
           "--model", make_model(tmp_path / "critic", "critic")]
  assert cli.main([*map(str, words), "--images", str(tmp_path / "empty")]) == 1
  assert f"{tmp_path / 'out'}: holds no records (8 rejected)" in capsys.readouterr().err
  lskd(*words)
  assert all(s.score is not None for r in stages.read_records(tmp_path / "out") for s in r.statements)


def test_from_scores_to_a_published_dataset(road, scored, capsys):
  capsys.readouterr()
  lskd("corpus", "filter", "--corpus", scored, "--judgements", road / "judged.jsonl",
       "--out", road / "filtered")
  assert "on 32 judgements: precision" in capsys.readouterr().out
  cut = json.loads((road / "filtered" / "cut.json").read_text())
  scores = [s.score for r in stages.read_records(scored) for s in r.statements]
  assert cut["rule"] == "best F1" and cut["kept"] == sum(s >= cut["cut"] for s in scores)

  lskd("corpus", "build", "--corpus", road / "filtered", "--out", road / "built")
  built = road / "built" / "lck" / "default" / "1.0.0"
  said = capsys.readouterr().out
  assert f"build: 8 images, 64 statements in {built}" in said
  low = float(said.partition("--config.data.min_score=")[2].split()[0])
  corpus = open_corpus(built, min_score=low)
  assert sum(len(corpus.record(row).statements) for row in range(8)) == cut["kept"]

  lskd("corpus", "report", "--corpus", road / "filtered", "--out", road / "report.html")
  page = (road / "report.html").read_text()
  assert "data:image/png;base64" in page and f"cut {cut['cut']:.2f}" in page

  lskd("corpus", "publish", "--corpus", road / "built", "--out", road / "published",
       "--image-licence", "CC0", "--threshold", 0.5)
  published = road / "published" / "lck" / "default" / "1.0.0"
  assert "Their licence: CC0" in (published / "README.md").read_text()
  assert len(open_corpus(published)) == 8


def test_a_cut_can_be_given_and_left_out_again(road, scored, tmp_path, capsys):
  out = tmp_path / "filtered"
  lskd("corpus", "filter", "--corpus", scored, "--out", out, "--min-score", 0.0)
  assert "cut: 0.0000 (given) keeps 64 of 64 statements" in capsys.readouterr().out
  assert json.loads((out / "cut.json").read_text())["cut"] == 0
  lskd("corpus", "filter", "--corpus", scored, "--out", out)
  assert "no cut: give --judgements or --min-score" in capsys.readouterr().out
  assert not (out / "cut.json").exists()


def test_a_benchmark_leaves_metrics_and_predictions(road, capsys):
  records = list(stages.read_records(road / "words"))
  items = choices.choice_items(records, np.random.default_rng(0), 2)[:6]
  items += choices.caption_items(records, np.random.default_rng(0))
  choices.write_items(road / "items.jsonl", items)
  lskd("eval", "--model", road / "model", "--benchmark", "scenes", "--data", road / "items.jsonl",
       "--images", road / "words" / "images", "--out", road / "results")
  assert f"eval: {len(items)} items" in capsys.readouterr().out
  metrics = json.loads((road / "results" / "metrics.json").read_text())
  lines = (road / "results" / "predictions.jsonl").read_text().splitlines()
  rows = [json.loads(line) for line in lines]
  assert {row["column"] for row in rows} | {"q_ar"} == set(metrics["columns"])
  for column in ("q_a", "qa_r", "swap"):
    for head, accuracy in metrics["columns"][column].items():
      hits = [row["chosen"][head] == row["label"] for row in rows if row["column"] == column]
      assert accuracy == pytest.approx(np.mean(hits))


def test_pointing_prints_one_line_of_json_for_each_text(road, capsys):
  capsys.readouterr()
  lskd("score", "--model", road / "model", "--image",
       road / "words" / "images" / "scenes" / "0-000000.png", "--region", "0,0,32,48",
       "--text", "question: who is [0]? answer: a chef", "a sunny beach")
  lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
  assert [set(line) for line in lines] == [{"text", "itm", "itc", "lm"}] * 2
  assert lines[1]["text"] == "a sunny beach"


@pytest.mark.parametrize("kind", ["student", "opt", "t5"])
def test_asking_prints_one_line_of_json_for_each_question(road, kind, tmp_path, capsys):
  model = make_model(tmp_path / "model", kind)
  picture = ["--image", road / "words" / "images" / "scenes" / "0-000000.png", "--model", model]
  short = ["--max-tokens", "4", "--beams", "2", "--length-penalty", "1"]
  capsys.readouterr()
  lskd("ask", *picture, "--region", "0,0,32,48", "--question", "who is [0]?", "--question", "is it late?",
       *short)
  lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
  assert [list(line) for line in lines] == [["question", "answer"]] * 2
  assert [line["question"] for line in lines] == ["who is [0]?", "is it late?"]
  lskd("ask", *picture, "--caption", *short)
  line, = capsys.readouterr().out.splitlines()
  assert list(json.loads(line)) == ["caption"]
  for words, error in ((["--question", "who is [0]?"], "mentions [0], but no region is given"),
                       (["--region", "0,0,9,9999", "--question", "who?"], "reaches outside the"),
                       (["--question", "who?", "--min-tokens", "40"], "min_tokens=40: want from 0")):
    assert cli.main(["ask", *map(str, picture), *words]) == 1
    said = capsys.readouterr().err
    assert error in said and said.startswith("lskd: error: ") and said.count("\n") == 1


@pytest.mark.parametrize("words", [
  ["--question", "who?", "--caption"], [], ["--caption", "--prompt", "{question}"],
  ["--question", "who?", "--temperature", "hot"], ["--question", "who?", "--beams", "0"]])
def test_a_question_or_a_caption_is_asked_for(words, capsys):
  with pytest.raises(SystemExit) as caught:
    cli.main(["ask", "--model", "m", "--image", "i.png", *words])
  assert caught.value.code == 2


def test_training_finds_the_pictures_of_a_stage_folder(road, monkeypatch, tmp_path):
  configs = []

  def train(config, workdir, began, **unused):
    configs.append(config)
    goodput.Log(workdir, began).close()
    return Run(tmp_path / "model", 1, False)

  monkeypatch.setattr("lskd_jax.train.train", train)
  words = ["train", "--config", "configs/scenes_student.py", "--workdir", tmp_path,
           f"--config.data.corpus={road / 'taught'}"]
  lskd(*words)
  lskd(*words, "--config.data.image_root=elsewhere")
  assert [config.data.image_root for config in configs] == [
    str(road / "words" / "images"), "elsewhere"]


# --- photographs ---------------------------------------------------------------------------------


def test_photographs_from_files_to_a_trained_student(real_sample, tmp_path, capsys):
  lskd("corpus", "verbalize", "--source", "coco", "--annotations", real_sample / "instances.json",
       "--images", real_sample / "images", "--out", tmp_path / "words")
  assert "passed over: 1 boxes of crowds" in capsys.readouterr().out
  lskd("corpus", "teach", "--corpus", tmp_path / "words", "--out", tmp_path / "taught")
  lskd("corpus", "judge", "--corpus", tmp_path / "taught", "--sheet", "--share", 0.2,
       "--out", tmp_path / "sheet.csv")
  lskd("corpus", "build", "--corpus", tmp_path / "taught", "--out", tmp_path / "built")
  lskd("corpus", "report", "--corpus", tmp_path / "taught", "--out", tmp_path / "report.html")
  assert "data:image/jpeg;base64" in (tmp_path / "report.html").read_text()

  built = tmp_path / "built" / "lck" / "default" / "1.0.0"
  train = ["train", "--config", "configs/scenes_student.py", *OVERRIDES,
           f"--config.data.corpus={built}", "--workdir", tmp_path / "run"]
  capsys.readouterr()
  lskd(*train)
  told = capsys.readouterr().out
  assert f"train: 2 steps; the model is in {tmp_path / 'run' / 'model'}\ngoodput " in told
  assert "PROGRAM_STARTUP" in told
  lskd(*train)  # finished: nothing to do
  lskd("watch", "--workdir", tmp_path / "run", "--once")
  assert "step 2 of 2 (100%)" in capsys.readouterr().out
  assert cli.main(["watch", "--workdir", str(tmp_path)]) == 1
  assert f"{tmp_path}: no run was started here" in capsys.readouterr().err

  lskd(*train, "--reproduce-step", 2)
  told = capsys.readouterr()
  assert json.loads(told.out)["step"] == 2 and "equal to metrics.jsonl in all" in told.err
  log = tmp_path / "run" / "metrics.jsonl"
  log.write_text(log.read_text().replace('"loss": ', '"loss": 1'))
  assert cli.main([*map(str, train), "--reproduce-step", "2"]) == 1
  assert "lskd: error: step 2 is different from metrics.jsonl: loss " in capsys.readouterr().err

  photograph = sorted((real_sample / "images").iterdir())[0]
  capsys.readouterr()
  lskd("score", "--model", tmp_path / "run" / "model", "--image", photograph,
       "--region", "10,10,200,200", "--text", "question: what is [0]? answer: a person",
       "question: what is [0]? answer: a dog")
  lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
  assert len(lines) == 2 and all(np.isfinite(line["lm"]) for line in lines)


def test_the_installed_command_says_errors_in_one_line(tmp_path):
  done = start("corpus", "teach", "--corpus", tmp_path / "nothing", "--out", tmp_path / "out")
  assert done.returncode == 1
  assert done.stderr == (f"lskd: error: {tmp_path / 'nothing'}: does not exist; give the folder a "
                         "stage was written to\n")


def test_weights_out_and_in_again(tmp_path, capsys):
  """To transformers and back: the same scores."""
  model = make_model(tmp_path / "model")
  lskd("export", "--to", "hf", "--model", model, "--out", tmp_path / "hf")
  lskd("import", "--from", "hf", tmp_path / "hf", "--out", tmp_path / "again")
  told = capsys.readouterr().out
  assert told == f"export: {tmp_path / 'hf'}\nimport: a student in {tmp_path / 'again'}\n"
  assert trees_of(model) == trees_of(tmp_path / "again")
  lskd("import", "--from", "hf", tmp_path / "hf", "--out", tmp_path / "wide", "--image-size", "24x96")
  about = json.loads((tmp_path / "wide" / "config.json").read_text())
  assert about["model"]["vit"]["image_size"] == [24, 96]


def test_to_lavis_and_in_again(tmp_path, capsys):
  """A critic; its kind and sizes are read from the files, and what changes on the way is said."""
  model = make_model(tmp_path / "model", "critic")
  lskd("export", "--to", "lavis", "--model", model, "--out", tmp_path / "critic.pth")
  told = capsys.readouterr().out
  assert told.startswith(f"export: {tmp_path / 'critic.pth'}\nnote: the ViT's key biases are left out")
  lskd("import", "--from", "lavis", tmp_path / "critic.pth", "--tokenizer", model / "tokenizer",
       "--out", tmp_path / "again")
  assert capsys.readouterr().out == f"import: a critic in {tmp_path / 'again'}\n"
  before, after = trees_of(model), trees_of(tmp_path / "again")
  assert {name for name in before if before[name] != after[name]} == {
    "student/vit/stack/blocks/qkv/bias"}


def test_an_import_from_lavis_takes_the_region_mode_of_its_config(tmp_path, monkeypatch):
  """A critic that was trained on drawn boxes has to go on drawing them."""
  configs = []
  monkeypatch.setattr("lskd_jax.convert.lavis.import_lavis", lambda source, out, *, config, **options: (
    configs.append(config) or Imported(out, [], "critic")))
  (tmp_path / "sizes.py").write_text(
    "from configs import common\n\ndef get_config():\n  config = common.get_config()\n"
    "  config.data.region_mode = 'overlay'\n  return config\n")
  lskd("import", "--from", "lavis", "critic.pth", "--tokenizer", tmp_path, "--out", tmp_path / "out",
       "--config", tmp_path / "sizes.py")
  assert configs[0].region_mode == "overlay" and configs[0].vit.width == 1408


def trees_of(model):
  """{leaf: fingerprint} of a model directory."""
  return {name: leaf["fingerprint"] for name, leaf in read_manifest(model / "params").items()}


def test_what_an_export_takes_depends_on_its_target(tmp_path, capsys):
  for words, error in (("--to hf --without-vit", "--without-vit is for --to lavis"),
                       ("--to lavis --dtype float16", "--dtype is for --to hf")):
    with pytest.raises(SystemExit) as caught:
      cli.main(["export", *words.split(), "--model", "x", "--out", str(tmp_path / "out")])
    assert caught.value.code == 2
    assert error in capsys.readouterr().err


@pytest.mark.parametrize("words,error", [
  ("--from lavis x.pth", "--from lavis needs --tokenizer DIR"),
  ("--from hf x --vit eva.pth", "--vit is for --from lavis"),
  ("--from hf x --image-size 224x", "'224x' is not PX or HEIGHTxWIDTH, such as 364 or 224x448"),
  ("--from hf x --image-size 0", "'0' is not PX or HEIGHTxWIDTH"),
  ("--from hf x --image-size 1x2x3", "'1x2x3' is not PX or HEIGHTxWIDTH"),
])
def test_what_an_import_needs_depends_on_its_source(words, error, capsys, tmp_path):
  with pytest.raises(SystemExit) as caught:
    cli.main(["import", *words.split(), "--out", str(tmp_path / "model")])
  assert caught.value.code == 2
  assert error in capsys.readouterr().err
