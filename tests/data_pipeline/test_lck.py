"""The built corpus: a TFDS folder that anyone can read, the same bytes every time, never half."""

import dataclasses
import json
import math
from pathlib import Path
import signal
import subprocess
import sys

import numpy as np
from PIL import Image
import pytest
import tensorflow_datasets as tfds
from tensorflow_datasets.core import dataset_metadata

from data_pipeline import stages
from data_pipeline.corpus import corpus_of, open_corpus
from data_pipeline.lck import build_lck, publish_lck
from data_pipeline.records import DataError, ImageRecord, Region, Statement, Verbalization


def _image(path, size, seed=0):
  path.parent.mkdir(parents=True, exist_ok=True)
  pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
  Image.fromarray(pixels).save(path)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
  root = tmp_path_factory.mktemp("images")
  _image(root / "a/king.png", (40, 30))
  _image(root / "chef.jpg", (20, 20))
  _image(root / "empty.png", (8, 8))
  return root


RECORDS = [
  ImageRecord(
    image="a/king.png",
    image_id=7,
    width=40,
    height=30,
    regions=(
      Region(3, (0.1, 0.2, 10.3, 20.0), "king", {"segms": [[0, 1, 2]]}),
      Region(5, (12.0, 0.0, 40.0, 30.0), "chef"),
    ),
    statements=(
      Statement("s-0", "why does [3] wait?", "[5] cooks", "[3,5] sit", "v1", "template", 0.9, (3,)),
      Statement("s-1", "who is [5]?", "a chef — “cuisinier”", "", "v2", "gpt", extra={"k": 1}),
    ),
    verbalization=Verbalization(("a king and a chef",), {3: "a man in a crown"}, (("Q?", "A."),)),
    extra={"licence": "CC BY 4.0"},
  ),
  ImageRecord("chef.jpg", 8, 20, 20, (), (Statement("s-2", "q", "a", "r", score=0.1 + 0.2),)),
  ImageRecord("empty.png", 9, 8, 8, (), split="val"),
]


@pytest.fixture(scope="module")
def built(root, tmp_path_factory):
  out = tmp_path_factory.mktemp("built")
  return build_lck(RECORDS, root, out, images_per_shard=1, progress=False)


def _files(folder):
  return {path.name: path.read_bytes() for path in folder.iterdir()}


# ---- what is in it ----


def test_plain_tfds_reads_it_without_our_code(built, root):
  assert built.parts[-3:] == ("lck", "default", "1.0.0")
  source = tfds.builder_from_directory(built).as_data_source("train")
  assert len(source) == 2
  example = source[0]
  assert example["path"] == b"a/king.png" and example["image_id"] == 7
  assert (example["width"], example["height"], example["split"]) == (40, 30, b"train")
  assert np.array_equal(example["image"], np.asarray(Image.open(root / "a/king.png")))
  assert example["region_ids"].tolist() == [3, 5]
  np.testing.assert_allclose(
    example["region_boxes"], [[0.1, 0.2, 10.3, 20.0], [12, 0, 40, 30]], rtol=1e-6
  )
  assert example["region_labels"] == [b"king", b"chef"]
  statements = example["statements"]
  assert list(statements["question"]) == [b"why does [3] wait?", b"who is [5]?"]
  assert statements["answer"][1].decode() == "a chef — “cuisinier”"
  assert list(statements["teacher"]) == [b"template", b"gpt"]
  assert statements["score"][0] == np.float32(0.9)
  assert math.isnan(statements["score"][1])  # no critic has seen it


def test_an_image_without_regions_and_statements_is_an_example_too(built):
  example = tfds.builder_from_directory(built).as_data_source("val")[0]
  assert example["region_boxes"].shape == (0, 4)
  assert len(example["region_labels"]) == len(example["statements"]["question"]) == 0


def test_it_is_found_by_name_and_describes_itself(built):
  builder = tfds.builder("lck/default", data_dir=built.parents[2])
  assert builder.info.description.startswith("Localized Commonsense Knowledge")
  assert "Localized Symbolic Knowledge Distillation" in builder.info.citation
  assert {name: split.num_examples for name, split in builder.info.splits.items()} == {
    "train": 2,
    "val": 1,
  }


def test_records_come_back_equal_and_images_byte_for_byte(built, root):
  # Scores and boxes are float32 in the plain features; `record` keeps them exactly.
  corpus = open_corpus(built, split=None)
  assert [corpus.record(row) for row in range(3)] == RECORDS
  for row, record in enumerate(RECORDS):
    assert corpus.image_bytes(row) == (root / record.image).read_bytes()


def test_tags_are_ones_that_tfds_knows():
  tags = Path(__file__).parents[2] / "data_pipeline/lck/TAGS.txt"
  names = [line.split("#")[0].strip() for line in tags.read_text().splitlines()]
  assert set(names) <= set(dataset_metadata.valid_tags())


# ---- the same bytes, whole or not there ----


def test_a_second_build_has_the_same_bytes(built, root, tmp_path):
  again = build_lck(iter(RECORDS), root, tmp_path, images_per_shard=1, progress=False)
  assert _files(again) == _files(built)


def test_building_again_into_the_same_place_changes_nothing(root, tmp_path):
  first = build_lck(RECORDS, root, tmp_path, progress=False)
  before = {path.name: path.stat().st_mtime_ns for path in first.iterdir()}
  assert build_lck(RECORDS, root, tmp_path, progress=False) == first
  assert {path.name: path.stat().st_mtime_ns for path in first.iterdir()} == before


def test_another_dataset_is_overwritten_only_when_asked(root, tmp_path):
  folder = build_lck(RECORDS, root, tmp_path, progress=False)
  with pytest.raises(DataError, match="holds another dataset"):
    build_lck(RECORDS[:1], root, tmp_path, progress=False)
  assert len(open_corpus(folder)) == 2
  build_lck(RECORDS[:1], root, tmp_path, overwrite=True, progress=False)
  assert len(open_corpus(folder)) == 1
  assert [path.name for path in folder.parent.iterdir()] == ["1.0.0"]


def test_a_killed_build_leaves_no_dataset_and_the_next_one_succeeds(built, root, tmp_path):
  script = f"""
import itertools, os, sys
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from data_pipeline.lck import build_lck
from data_pipeline.records import ImageRecord
def records():
  yield ImageRecord("chef.jpg", 8, 20, 20, ())
  print("writing", flush=True)
  sys.stdin.read()  # wait for the SIGKILL
build_lck(records(), {str(root)!r}, {str(tmp_path)!r}, images_per_shard=1, progress=False)
"""
  child = subprocess.Popen(
    [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
  )
  assert child.stdout.readline() == b"writing\n"
  with pytest.raises(DataError, match="another process is writing"):
    build_lck(RECORDS, root, tmp_path, progress=False)
  child.send_signal(signal.SIGKILL)
  child.wait()
  folder = tmp_path / "lck" / "default"
  assert [path.name for path in folder.iterdir()] == ["incomplete.1.0.0"]  # not a version: unseen
  again = build_lck(RECORDS, root, tmp_path, images_per_shard=1, progress=False)
  assert [path.name for path in folder.iterdir()] == ["1.0.0"]
  assert _files(again) == _files(built)


def test_tensorflow_is_never_imported(root, tmp_path):
  script = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from data_pipeline.lck import build_lck
from data_pipeline.corpus import open_corpus
from data_pipeline.records import ImageRecord
folder = build_lck([ImageRecord("chef.jpg", 8, 20, 20, ())], {str(root)!r}, {str(tmp_path)!r})
corpus = open_corpus(folder)
corpus.record(0), corpus.image_bytes(0)
assert "tensorflow" not in sys.modules
"""
  subprocess.run([sys.executable, "-c", script], check=True, stderr=subprocess.DEVNULL)


# ---- what is left out ----


def test_images_that_cannot_be_used_are_left_out_with_a_reason(root, tmp_path):
  (root / "cut.jpg").write_bytes((root / "chef.jpg").read_bytes()[:200])
  (root / "note.png").write_text("not an image")
  (root / "king.gif").write_bytes(b"GIF89a")
  chef = RECORDS[1]
  bad = {
    "gone.jpg": "No such file",
    "cut.jpg": "damaged",
    "note.png": "not a PNG or JPEG",
    "king.gif": "not a PNG or JPEG",
    "../etc/passwd": "leads out of the image root",
  }
  records = [chef, *(dataclasses.replace(chef, image=image) for image in bad)]
  records += [
    chef,
    dataclasses.replace(chef, image="empty.png", width=20, height=20),
    dataclasses.replace(RECORDS[0], regions=RECORDS[0].regions[:1]),
    dataclasses.replace(RECORDS[2], split="val/2"),
  ]
  reasons = [*bad.values(), "twice", "is 8x8, its record says 20x20", "region 5", "name a split"]
  folder = build_lck(records, root, tmp_path, progress=False)
  rejected = [json.loads(line) for line in (folder / "rejected.jsonl").open()]
  assert [row["where"] for row in rejected][:5] == list(bad)
  for row, reason in zip(rejected, reasons, strict=True):
    assert reason in row["reason"], row
  manifest = json.loads((folder / "manifest.json").read_text())
  assert manifest["rejected"] == 9 and manifest["splits"]["train"]["images"] == 1
  assert len(open_corpus(folder)) == 1


def test_a_size_that_is_not_known_yet_is_filled_in(root, tmp_path):
  folder = build_lck([ImageRecord("chef.jpg", 8, 0, 0, ())], root, tmp_path, progress=False)
  assert (open_corpus(folder).record(0).width, open_corpus(folder).record(0).height) == (20, 20)


def test_nothing_to_build_from_is_an_error_and_leaves_nothing(root, tmp_path):
  with pytest.raises(DataError, match=r"no image to build from \(1 rejected\); the first: .*No such"):
    build_lck([ImageRecord("gone.png", 1, 8, 8, ())], root, tmp_path, progress=False)
  assert not list((tmp_path / "lck" / "default").iterdir())


# ---- opening ----


def test_the_threshold_is_a_view(built):
  assert [s.index for s in open_corpus(built).record(0).statements] == ["s-0", "s-1"]
  view = open_corpus(built, min_score=0.5)
  assert [s.index for s in view.record(0).statements] == ["s-0"]  # s-1 has no score
  assert view.record(1).statements == ()
  assert view.outline(0).statements == ((2, 0.9),)  # s-0 mentions two regions


def test_only_the_training_split_is_read_unless_asked(built):
  assert [open_corpus(built, split=name).record(0).image for name in ("train", "val")] == [
    "a/king.png",
    "empty.png",
  ]
  with pytest.raises(DataError, match=r"no split 'test'; choose from \['train', 'val'\]"):
    open_corpus(built, split="test")


def test_a_stage_folder_is_a_corpus_too(root, tmp_path):
  stages.run_stage("x", [RECORDS[:1], RECORDS[1:]], lambda r: r, tmp_path, {}, progress=False)
  corpus = open_corpus(tmp_path, root, split=None)
  assert [corpus.record(row) for row in range(len(corpus))] == RECORDS
  assert corpus.image_bytes(1) == (root / "chef.jpg").read_bytes()
  assert len(open_corpus(tmp_path, root)) == 2
  with pytest.raises(DataError, match="give the image root"):
    open_corpus(tmp_path).image_bytes(0)
  with pytest.raises(DataError, match="has no split"):
    open_corpus(tmp_path, root, split="test")


def test_records_in_memory_are_a_corpus_too(root):
  corpus = corpus_of(RECORDS, root)
  assert corpus.record(1) == RECORDS[1]
  with pytest.raises(IndexError):
    corpus.record(3)
  with pytest.raises(DataError, match="is empty"):
    corpus_of([])


def test_what_cannot_be_opened_is_named(built, tmp_path):
  with pytest.raises(DataError, match="does not exist"):
    open_corpus(tmp_path / "nowhere")
  with pytest.raises(DataError, match="holds built corpora; give one of them, such as .*1.0.0"):
    open_corpus(built.parents[2])
  copy = tmp_path / "copy"
  copy.mkdir()
  for name, data in _files(built).items():
    (copy / name).write_bytes(data)
  info = json.loads((copy / "dataset_info.json").read_text())
  (copy / "dataset_info.json").write_text(json.dumps({**info, "version": "2.0.0"}))
  with pytest.raises(DataError, match=r"copy: has version 2.0.0, this code reads 1.0.0"):
    open_corpus(copy)
  (copy / "dataset_info.json").write_bytes((built / "dataset_info.json").read_bytes())
  shard = next(copy.glob("lck-train*"))
  shard.write_bytes(shard.read_bytes()[:-1])
  with pytest.raises(DataError, match="its manifest says"):
    open_corpus(copy)


def test_reading_is_thread_safe_and_parses_once(built):
  from concurrent.futures import ThreadPoolExecutor

  corpus = open_corpus(built)
  with ThreadPoolExecutor(8) as pool:
    found = list(pool.map(lambda k: corpus.record(k % 2), range(200)))
  assert found == [RECORDS[0], RECORDS[1]] * 100
  assert corpus.record(0) is corpus.record(0)


# ---- publishing ----


def test_publishing_copies_every_byte_and_adds_a_card(built, tmp_path):
  published = publish_lck(
    built, tmp_path, image_source="COCO 2017", critic="heads, seed 1", threshold=0.8
  )
  assert published == tmp_path / "lck" / "default" / "1.0.0"
  files = _files(published)
  card = files.pop("README.md").decode()
  assert files == _files(built)
  for line in (
    "| train | 2 | 2 | 3 | 2 |",  # images, regions, statements, of these scored
    "The images come from: COCO 2017. Their licence: not stated by the publisher.",
    "| CC BY 4.0 | 1 |",
    "| gpt | 1 |",
    "Critic: heads, seed 1. Recommended threshold: 0.8.",
  ):
    assert line in card
  assert open_corpus(published, split=None).record(0) == RECORDS[0]


def test_the_card_of_a_published_dataset_can_be_mended(built, tmp_path):
  publish_lck(built, tmp_path)
  published = publish_lck(built, tmp_path, image_licence="CC BY 4.0")
  assert "Their licence: CC BY 4.0." in (published / "README.md").read_text()
  assert [path.name for path in published.parent.iterdir()] == ["1.0.0"]


def test_a_damaged_source_is_not_published(root, tmp_path):
  folder = build_lck(RECORDS, root, tmp_path / "built", progress=False)
  shard = next(folder.glob("lck-train*"))
  data = bytearray(shard.read_bytes())
  data[len(data) // 2] ^= 1
  shard.write_bytes(data)
  with pytest.raises(DataError, match="does not match its sha256"):
    publish_lck(folder, tmp_path / "published")
  assert not (tmp_path / "published").exists()


def test_a_full_disk_is_one_clear_error(root, tmp_path, monkeypatch):
  # /dev/full accepts no byte, like a full disk.
  monkeypatch.setattr("data_pipeline.lck.lck_dataset_builder.to_line", _write_to_full_disk)
  with pytest.raises(DataError, match="the disk is full"):
    build_lck([ImageRecord("gone.png", 1, 8, 8, ())], root, tmp_path, progress=False)
  assert not list((tmp_path / "lck" / "default").iterdir())


def _write_to_full_disk(_):
  with open("/dev/full", "wb") as file:
    file.write(b"x")
