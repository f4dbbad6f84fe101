"""Input that is missing, damaged or of another kind: one line says what to mend, or the record is
rejected with its reason; what was written before stays whole."""
import errno
import json
import os
from pathlib import Path
import struct
import subprocess
import sys
import zlib

import numpy as np
from PIL import Image
import pytest

from data_pipeline import stages, tokenizer, verbalize
from data_pipeline.corpus import open_corpus
from data_pipeline.examples import LoaderOptions
from data_pipeline.loader import Loader
from data_pipeline.records import DataError, ImageRecord, Region, Statement
from lskd_jax import cli
from tests.lskd_jax.tiny_models import TEXTS, make_model

ROOT = Path(__file__).resolve().parents[1]


def lskd(*words):
  return cli.main([str(word) for word in words])


@pytest.fixture
def refused(capsys):
  """Runs a command that has to fail, and returns its one line on stderr."""
  def run(*words):
    capsys.readouterr()
    assert lskd(*words) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lskd:")]
    assert len(lines) == 1
    return lines[0].removeprefix("lskd: error: ")
  return run


@pytest.fixture
def works(capsys):
  """Runs a command that has to succeed, and returns what it printed."""
  def run(*words):
    capsys.readouterr()
    assert lskd(*words) == 0
    return capsys.readouterr().out
  return run


def png(width, height):
  """A PNG that says it is that large, with hardly any data."""
  def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(
      ">I", zlib.crc32(kind + data))
  header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
  return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99))
          + chunk(b"IEND", b""))


@pytest.fixture
def folder(tmp_path):
  """Photographs: a good one, half a JPEG, a bomb, and names of none."""
  images = tmp_path / "images"
  images.mkdir()
  pixels = np.random.default_rng(0).integers(0, 255, (48, 64, 3), np.uint8)
  Image.fromarray(pixels).save(images / "good.jpg")
  data = (images / "good.jpg").read_bytes()
  (images / "half.jpg").write_bytes(data[:len(data) // 2])
  (images / "bomb.png").write_bytes(png(40_000, 40_000))
  (images / "text.jpg").write_text("not a picture")
  return tmp_path


def record(image="good.jpg", text="what is [0]?", box=(4.0, 4.0, 30.0, 30.0), width=64, height=48,
           image_id=0):
  statement = Statement(f"{image_id}-0", text, "a dog", "it stands there", "v1")
  return ImageRecord(image, image_id, width, height, (Region(0, box, "dog"),), (statement,))


def stage(out, *records, shards=1):
  """A finished stage folder of these records."""
  stages.run_stage("given", stages.split_evenly(list(records), shards), lambda r: r, out, {}, False)
  return out


def rejected(folder):
  return [json.loads(line) for path in sorted(folder.glob("rejected*.jsonl"))
          for line in path.read_text().splitlines()]


# --- pictures ------------------------------------------------------------------------------------

PICTURES = {
  "missing.jpg": "missing.jpg: no such image",
  "half.jpg": "half.jpg: damaged",
  "bomb.png": "bomb.png: too large",
  "text.jpg": "text.jpg: not an image",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  return make_model(tmp_path_factory.mktemp("model") / "model")


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_that_cannot_be_pointed_at(folder, model, name, refused):
  line = refused("score", "--model", model, "--image", folder / "images" / name, "--text", "a dog")
  assert PICTURES[name] in line


def test_pictures_that_cannot_be_described_are_rejected_with_their_reason(folder, works):
  names = ["good.jpg", *PICTURES]
  size = {"bomb.png": (40_000, 40_000)}
  content = {
    "images": [dict(id=k, file_name=name, width=size.get(name, (64, 48))[0],
                    height=size.get(name, (64, 48))[1]) for k, name in enumerate(names)],
    "annotations": [dict(id=k, image_id=k, bbox=[4, 4, 20, 20], category_id=1, iscrowd=0)
                    for k in range(len(names))],
    "categories": [dict(id=1, name="person")]}
  (folder / "instances.json").write_text(json.dumps(content))
  said = works("corpus", "verbalize", "--source", "coco", "--annotations",
               folder / "instances.json", "--images", folder / "images", "--out", folder / "words")
  found = {row["where"]: row["reason"] for row in rejected(folder / "words")}
  assert set(found) == set(PICTURES)
  assert all(PICTURES[name] in reason for name, reason in found.items())
  assert "1 images" in said and f"rejected: 4, with reasons in {folder / 'words'}/rejected" in said


def test_pictures_that_cannot_be_built_are_rejected_with_their_reason(folder, works):
  records = [record("good.jpg")]
  records += [record(name, image_id=k + 1) for k, name in enumerate(PICTURES)]
  said = works("corpus", "build", "--corpus", stage(folder / "taught", *records), "--images",
               folder / "images", "--out", folder / "built")
  built = folder / "built" / "lck" / "default" / "1.0.0"
  assert {row["where"] for row in rejected(built)} == set(PICTURES)
  assert f"rejected: 4, with reasons in {built / 'rejected.jsonl'}" in said
  assert len(open_corpus(built)) == 1


def test_a_damaged_picture_stops_a_loader_with_its_name(folder, tmp_path):
  words = tokenizer.train_tokenizer(TEXTS, tmp_path / "tokenizer", 400, 1)
  corpus = open_corpus(stage(folder / "taught", record("half.jpg")), folder / "images")
  options = LoaderOptions(batch_size=1, image_size=48)
  with pytest.raises(DataError, match="half.jpg: damaged"):
    next(Loader(corpus, words, options, 0).batches())


@pytest.mark.parametrize("given,error", [
  (None, "does not say where its images are; give --images DIR"),
  ("nowhere", "nowhere: is not a folder"),
])
def test_pictures_that_nobody_can_find(folder, refused, given, error):
  words = ["corpus", "build", "--corpus", stage(folder / "taught", record()), "--out",
           folder / "built"]
  assert error in refused(*words, *(["--images", folder / given] if given else []))
  assert not (folder / "built").exists()


# --- regions -------------------------------------------------------------------------------------


@pytest.mark.parametrize("box,error", [
  ([70, 4, 10, 10], "bbox [70, 4, 10, 10] is outside the 64x48 image good.jpg"),
  ([4, 4, 0, 10], "bbox [4, 4, 0, 10] (x, y, width, height) has no area"),
  ([4, 4, float("nan"), 10], "is not four finite numbers"),
])
def test_a_box_of_nothing_is_rejected_and_its_picture_kept(folder, works, box, error):
  content = {"images": [dict(id=0, file_name="good.jpg", width=64, height=48)],
             "annotations": [dict(id=7, image_id=0, bbox=box, category_id=1, iscrowd=0),
                             dict(id=8, image_id=0, bbox=[1, 1, 9, 9], category_id=1, iscrowd=0)],
             "categories": [dict(id=1, name="person")]}
  (folder / "instances.json").write_text(json.dumps(content))
  works("corpus", "verbalize", "--source", "coco", "--annotations", folder / "instances.json",
        "--images", folder / "images", "--out", folder / "words")
  row, = rejected(folder / "words")
  assert row["where"] == "good.jpg" and "annotation 7" in row["reason"] and error in row["reason"]
  kept, = stages.read_records(folder / "words")
  assert [region.extra["coco_id"] for region in kept.regions] == [8]


@pytest.mark.parametrize("words,error", [
  (["--region", "0,0,64,49", "--text", "[0]"], "region [0] = 0,0,64,49 reaches outside the 64x48"),
  (["--region", "9,9,9,12", "--text", "[0]"], "region [0] = 9,9,9,12 has no area"),
  (["--region", "0,0,9,9", "--text", "is [1]?"], "mentions [1], but only region [0] is given"),
  (["--text", "is [0]?"], "mentions [0], but no region is given; add a region or mend the text"),
])
def test_what_cannot_be_pointed_at(folder, model, refused, words, error):
  assert error in refused("score", "--model", model, "--image", folder / "images" / "good.jpg",
                          *words)


def test_a_mention_of_no_region_is_rejected_when_the_dataset_is_built(folder, works):
  source = stage(folder / "taught", record(), record(text="who is [3]?", image_id=1,
                                                     image="other.jpg"))
  (folder / "images" / "other.jpg").write_bytes((folder / "images" / "good.jpg").read_bytes())
  works("corpus", "build", "--corpus", source, "--images", folder / "images", "--out",
        folder / "built")
  row, = rejected(folder / "built" / "lck" / "default" / "1.0.0")
  assert row["where"] == "other.jpg"
  assert "statement 1-0 names region 3; the image has [0]" in row["reason"]


# --- folders and files ---------------------------------------------------------------------------


def test_an_empty_corpus(folder, refused):
  stages.run_stage("given", [[]], lambda r: r, folder / "empty", {}, False)
  for verb in ("teach", "filter", "build"):
    line = refused("corpus", verb, "--corpus", folder / "empty", "--out", folder / "out")
    assert f"{folder / 'empty'}: holds no records (0 rejected)" in line
  assert not (folder / "out").exists()


def test_a_corpus_without_statements(folder, refused):
  unknown = Region(0, (4.0, 4.0, 30.0, 30.0), "zeppelin")
  bare = ImageRecord("good.jpg", 0, 64, 48, (unknown,))
  source = stage(folder / "words", verbalize.verbalize(bare))
  line = refused("corpus", "teach", "--corpus", source, "--out", folder / "taught")
  assert f"{source}: the template teacher has nothing to say about regions labelled ['zeppelin']" in line
  line = refused("corpus", "judge", "--corpus", source, "--sheet", "--out", folder / "sheet.csv")
  assert line == f"{source}: has no statements; run `lskd corpus teach` first"


def test_a_split_that_no_dataset_can_have(folder, refused):
  for source in (["scenes"], ["coco", "--annotations", "a.json", "--images", folder / "images"]):
    line = refused("corpus", "verbalize", "--source", *source, "--split", "val-1", "--out", folder / "words")
    assert line == "'val-1' cannot name a split; use letters, digits and '_', such as 'val_1'"
  assert not (folder / "words").exists()


def test_a_stage_that_left_nothing(folder, refused):
  content = {"images": [dict(id=0, file_name="missing.jpg", width=64, height=48)],
             "annotations": [], "categories": []}
  (folder / "instances.json").write_text(json.dumps(content))
  line = refused("corpus", "verbalize", "--source", "coco", "--annotations",
                 folder / "instances.json", "--images", folder / "images", "--out",
                 folder / "words")
  assert "holds no records (1 rejected); see rejected-*.jsonl there" in line


@pytest.mark.parametrize("damage,error", [
  (lambda data: data + b'{"image": "b.jp', ":2: not a whole JSON object (half-written?)"),
  (lambda data: data + b"\xff\xfe\n", ":2: not UTF-8 text"),
  (lambda data: data + b"[1]\n", ":2: expected a JSON object"),
  (lambda data: data.replace(b'"width": 64', b'"width": "64"'), ":1: good.jpg: 'width' is '64'"),
  (lambda data: data.replace(b'"regions"', b'"region"'), ":1: good.jpg: unknown key 'region'"),
])
def test_a_damaged_line_is_named(folder, refused, damage, error):
  source = stage(folder / "words", record())
  shard = source / "shard-00000-of-00001.jsonl"
  shard.write_bytes(damage(shard.read_bytes()))
  assert f"{shard}{error}" in refused("corpus", "teach", "--corpus", source, "--out",
                                      folder / "taught")
  assert not list((folder / "taught").glob("shard*"))


@pytest.mark.parametrize("line,error", [
  (b'{"index": "0-0", "accept": 1', "judged.jsonl:1: not a whole JSON object"),
  (b"\xff", "judged.jsonl:1: not UTF-8"),
  (b'{"index": "0-0", "accept": "perhaps"}', "judged.jsonl:1: verdict 'perhaps'"),
  (b'{"index": "zzz", "accept": 1}', "none of its 1 judgements is about a scored statement"),
  (b"", "judged.jsonl: holds no judgement"),
])
def test_judgements_that_cannot_be_used(folder, refused, line, error):
  (folder / "judged.jsonl").write_bytes(line + b"\n")
  scored = record()
  statement = Statement("0-0", "what is [0]?", "a person", "", score=0.5)
  source = stage(folder / "scored", ImageRecord(
    scored.image, 0, 64, 48, scored.regions, (statement,)))
  assert error in refused("corpus", "filter", "--corpus", source, "--judgements",
                          folder / "judged.jsonl", "--out", folder / "filtered")


def test_a_stage_of_another_version(folder, refused):
  source = stage(folder / "words", record())
  about = json.loads((source / "stage.json").read_text())
  (source / "stage.json").write_text(json.dumps({**about, "format": 99}))
  line = refused("corpus", "teach", "--corpus", source, "--out", folder / "taught")
  assert line == f"{source}: has format 99, this version reads 1; make it again"


def test_a_dataset_of_another_version(folder, works, refused):
  works("corpus", "build", "--corpus", stage(folder / "taught", record()), "--images",
        folder / "images", "--out", folder / "built")
  built = folder / "built" / "lck" / "default" / "1.0.0"
  text = (built / "dataset_info.json").read_text()
  (built / "dataset_info.json").write_text(text.replace('"1.0.0"', '"9.9.9"'))
  line = refused("train", "--config", "configs/scenes_student.py",
                 f"--config.data.corpus={built}", "--workdir", folder / "run")
  assert line == f"{built}: has version 9.9.9, this code reads 1.0.0; build it again"


def test_a_stage_made_with_other_options_is_not_mixed(folder, works, refused):
  source = stage(folder / "words", verbalize.verbalize(record()))
  works("corpus", "teach", "--corpus", source, "--out", folder / "taught")
  before = {path: path.read_bytes() for path in (folder / "taught").iterdir()}
  line = refused("corpus", "teach", "--corpus", source, "--out", folder / "taught", "--seed", 1)
  assert "was made with options {'seed': 0}, now asked for {'seed': 1}" in line
  assert {path: path.read_bytes() for path in (folder / "taught").iterdir()} == before


@pytest.mark.parametrize("words,error", [
  (["--config.optim.step=3"], "config key 'optim.step' is unknown; did you mean 'optim.steps'?"),
  (["--config.optim.steps=many"], "--config.optim.steps=many: a whole number is wanted"),
  (["--config.data.corpus=nowhere"], "nowhere: does not exist"),
])
def test_a_config_that_cannot_be_used(folder, refused, words, error):
  line = refused("train", "--config", "configs/scenes_student.py", *words, "--workdir",
                 folder / "run")
  assert error in line


# --- a full disk ---------------------------------------------------------------------------------


def test_a_full_disk_keeps_what_was_finished(folder, works, refused, monkeypatch):
  records = [verbalize.verbalize(record(f"{k}.jpg", image_id=k)) for k in range(6)]
  source = stage(folder / "words", *records, shards=3)
  works("corpus", "teach", "--corpus", source, "--out", folder / "expected")
  real, calls = os.fsync, []

  def fsync(handle):
    calls.append(handle)
    if len(calls) > 3:  # stage.json and the two files of the first shard
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    real(handle)

  monkeypatch.setattr(os, "fsync", fsync)
  line = refused("corpus", "teach", "--corpus", source, "--out", folder / "taught")
  assert "the disk is full; free some space and run again; finished shards are kept" in line
  assert sorted(path.name for path in (folder / "taught").iterdir()) == [
    "rejected-00000-of-00003.jsonl", "shard-00000-of-00003.jsonl", "stage.json"]
  line = refused("corpus", "build", "--corpus", folder / "taught", "--images",
                 folder / "images", "--out", folder / "built")
  assert "stage 'teach' is unfinished (1 of 3 shards); run it again" in line
  monkeypatch.undo()
  works("corpus", "teach", "--corpus", source, "--out", folder / "taught")
  for path in (folder / "expected").glob("shard*"):
    assert (folder / "taught" / path.name).read_bytes() == path.read_bytes()


def test_a_full_disk_under_the_pictures(tmp_path, works, refused, monkeypatch):
  real, calls = Image.Image.save, []

  def save(image, path, *args, **options):
    calls.append(path)
    if len(calls) > 3:
      Path(path).write_bytes(b"half")
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    real(image, path, *args, **options)

  words = ["corpus", "verbalize", "--source", "scenes", "--count", 5, "--out", tmp_path / "words"]
  monkeypatch.setattr(Image.Image, "save", save)
  assert "the disk is full; free some space and run again" in refused(*words)
  monkeypatch.undo()
  works(*words)
  for kept in stages.read_records(tmp_path / "words"):
    with Image.open(tmp_path / "words" / "images" / kept.image) as image:
      image.load()


# --- as a process --------------------------------------------------------------------------------


@pytest.mark.parametrize("words,code,line", [
  (["corpus", "teach", "--corpus", "nowhere", "--out", "out"], 1,
   "lskd: error: nowhere: does not exist; give the folder a stage was written to"),
  (["train", "--config", "configs/scenes.py", "--config.sede=1", "--workdir", "out"], 1,
   "lskd: error: config key 'sede' is unknown; did you mean 'seed'?"),
  (["corpus", "paint"], 2, "lskd corpus: error: argument STAGE: invalid choice: 'paint'"),
])
def test_exit_code_and_stderr(tmp_path, words, code, line):
  environment = {**os.environ, "PYTHONPATH": str(ROOT)}
  done = subprocess.run([sys.executable, "-m", "lskd_jax.cli", *words], cwd=tmp_path,
                        capture_output=True, text=True, check=False, env=environment)
  assert done.returncode == code and done.stdout == ""
  assert done.stderr.splitlines()[-1].startswith(line)
  assert code == 2 or done.stderr.count("\n") == 1
  assert list(tmp_path.iterdir()) == []
