"""What models say of statements: the same whatever stands beside them, never silently nothing."""
import dataclasses
import io

import jax
import numpy as np
from PIL import Image
import pytest

from data_pipeline import corpus_stages, judge, stages
from data_pipeline.corpus import corpus_of, read_image_file
from data_pipeline.judge import Judgement
from data_pipeline.records import DataError, ImageRecord, Region, Statement
from lskd_jax import evidence, parallel, predictor, scoring
from lskd_jax.models import build
from tests.lskd_jax.tiny_models import make_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Three taught scenes and their pictures, a student and a critic."""
  folder = tmp_path_factory.mktemp("scoring")
  corpus_stages.verbalize_scenes(folder / "words", 3, progress=False)
  corpus_stages.teach_corpus(folder / "words", folder / "taught", progress=False)
  make_model(folder / "student")
  make_model(folder / "critic", "critic")
  return folder


@pytest.fixture(autouse=True)
def mesh():
  with jax.set_mesh(parallel.make_mesh(devices=jax.devices()[:1])):
    yield


@pytest.fixture(scope="module")
def student(folder):
  with jax.set_mesh(parallel.make_mesh(devices=jax.devices()[:1])):
    return build.load(folder / "student")


@pytest.fixture(scope="module")
def speak(student):
  return scoring.speaker(student)


@pytest.fixture(scope="module")
def records(folder):
  return list(stages.read_records(folder / "taught"))


def said(folder, student, speak, records):
  root = folder / "words" / "images"
  return scoring.say(student, speak, records,
                     lambda at: read_image_file(root, records[at].image, str(root)))


def test_likelihoods_are_those_of_pointing(folder, student, records):
  """The corpus and `lskd score` agree: all regions in order of id are slots 0, 1, …"""
  corpus = corpus_of(records, folder / "words" / "images")
  found = scoring.statement_likelihoods(student, corpus, progress=False)
  assert set(found) == {s.index for r in records for s in r.statements}
  pointing = predictor.load(folder / "student")
  record = records[0]
  statement = record.statements[0]
  text = (f"question: {statement.question} answer: {statement.answer} "
          f"rationale: {statement.rationale}")
  row, _ = pointing.score(folder / "words" / "images" / record.image,
                          [region.box for region in record.regions], [text, text])
  item = found[statement.index]
  assert item.mean == pytest.approx(row["lm"], rel=1e-4)
  assert item.total == pytest.approx(item.mean * item.tokens) and item.lowest <= item.mean
  assert item.source == statement.source


def test_a_statement_is_scored_the_same_in_any_company(folder, student, speak, records):
  together = said(folder, student, speak, records)
  last = records[-1]
  alone = dataclasses.replace(last, statements=last.statements[-1:])
  (found,), = said(folder, student, speak, [alone])
  np.testing.assert_allclose(found, together[-1][-1], rtol=1e-5)


def test_features_stand_for_pixels(folder, student, speak, records):
  from flax import nnx

  from lskd_jax.features import cached_features
  corpus = corpus_of(records, folder / "words" / "images")
  vit = nnx.merge(student.graph, student.state).vit
  cached = cached_features(vit, corpus, folder / "features", progress=False)
  plain = scoring.statement_likelihoods(student, corpus, progress=False)
  found = scoring.statement_likelihoods(student, corpus, cached, progress=False)
  for index, item in found.items():
    np.testing.assert_allclose(item[:4], plain[index][:4], rtol=1e-4)


def test_what_cannot_be_read_is_said_in_its_place(folder, student, speak, records):
  good, second, third = records
  odd = dataclasses.replace(good, statements=(
    good.statements[0],
    Statement("no-answer", "who?", "", "why"),
    Statement("absent", "who is [9]?", "a chef", ""),
    Statement("long", "who?", "word " * 80, "")))
  missing = dataclasses.replace(second, image="scenes/missing.png")
  wrong_size = dataclasses.replace(third, width=200, height=200)
  found = said(folder, student, speak, [odd, missing, wrong_size, good])
  assert found[0][0].shape == (4,)
  assert [str(error).split(": ", 2)[1] for error in found[0][1:]] == [
    "statement no-answer", "statement absent", "statement long"]
  assert "has no answer" in str(found[0][1]) and "[9] names no region" in str(found[0][2])
  assert "missing.png: No such file" in str(found[1])
  assert "is 96x96, its record says 200x200" in str(found[2])
  np.testing.assert_allclose(found[3][0], found[0][0], rtol=1e-5)


def test_more_regions_than_slots(folder, student, speak):
  """Each statement gets the regions it mentions first; one that mentions too many is refused."""
  image = Image.fromarray(np.random.default_rng(1).integers(0, 255, (40, 40, 3), np.uint8))
  buffer = io.BytesIO()
  image.save(buffer, "PNG")
  regions = tuple(Region(k, (4.0 * k, 0.0, 4.0 * k + 4, 40.0)) for k in range(9))
  two = Statement("two", "what do [8] and [3] do?", "[8] waves", "")
  seven = Statement("seven", "who are [0,1,2,3,4,5,6]?", "a crowd", "")
  record = ImageRecord("crowd.png", 0, 40, 40, regions, (two, seven))
  found, = scoring.say(student, speak, [record], lambda at: buffer.getvalue())
  assert "7 regions are mentioned, max_regions is 6" in str(found[1])
  slots = [8, 3, 0, 1, 2, 4]
  as_slots = dataclasses.replace(
    record, regions=tuple(Region(k, regions[i].box) for k, i in enumerate(slots)),
    statements=(Statement("two", "what do [0] and [1] do?", "[0] waves", ""),))
  (expected,), = scoring.say(student, speak, [as_slots], lambda at: buffer.getvalue())
  np.testing.assert_allclose(found[0], expected, rtol=1e-5)


def test_a_critic_gives_probabilities(folder, records):
  corpus = corpus_of(records, folder / "words" / "images")
  critic = build.load(folder / "critic")
  scores = scoring.critic_scores(critic, corpus, progress=False)
  assert len(scores) == sum(len(r.statements) for r in records)
  assert all(0 < score < 1 for score in scores.values()) and len(set(scores.values())) > 1
  with pytest.raises(DataError, match="a student is needed, and this model is a critic"):
    scoring.statement_likelihoods(critic, corpus, progress=False)


def test_a_stage_keeps_what_it_can_and_lists_the_rest(folder, records, tmp_path):
  images = tmp_path / "images" / "scenes"
  images.mkdir(parents=True)
  for record in records[1:]:
    name = record.image.split("/")[1]
    data = (folder / "words" / "images" / record.image).read_bytes()
    (images / name).write_bytes(data)
  (images / records[0].image.split("/")[1]).write_bytes(b"\x89PNG half")
  scored = scoring.score_stages(folder / "taught", tmp_path / "images", folder / "student",
                                tmp_path / "out")
  assert scored.summary["records"] == 2 and scored.summary["rejected"] == 1
  assert "uncalibrated" in scored.worth
  rejected = (tmp_path / "out" / "likelihoods" / "rejected-00000-of-00001.jsonl").read_text()
  assert records[0].image in rejected
  kept = [s for r in stages.read_records(tmp_path / "out") for s in r.statements]
  critic = evidence.uncalibrated([scoring.evidence_of(s) for s in kept])
  np.testing.assert_allclose([s.score for s in kept],
                             critic.scores([scoring.evidence_of(s) for s in kept]))


def test_more_judgements_need_no_new_likelihoods(folder, records, tmp_path):
  """The student's pass over the corpus takes hours, the fit a moment."""
  out, model, images = tmp_path / "out", folder / "student", folder / "words" / "images"
  indices = [s.index for record in records for s in record.statements]
  judge.write_judgements(tmp_path / "few.jsonl", [Judgement(i, k % 2) for k, i in enumerate(indices[:12])])
  judge.write_judgements(tmp_path / "all.jsonl", [Judgement(i, k % 2) for k, i in enumerate(indices)])
  judge.write_judgements(tmp_path / "other.jsonl", [Judgement("of another corpus", 1)])
  for name, error in (("missing", "cannot be read"), ("other", "give the judgements of this corpus")):
    with pytest.raises(DataError, match=error):
      scoring.score_stages(folder / "taught", images, model, out, tmp_path / f"{name}.jsonl")
  assert not out.exists()  # found before the pass
  first = scoring.score_stages(folder / "taught", images, model, out, tmp_path / "few.jsonl")
  with pytest.raises(DataError, match="delete the files in this folder; folders in it can stay"):
    scoring.score_stages(folder / "taught", images, model, out, tmp_path / "all.jsonl")
  said = {path: path.stat().st_mtime_ns for path in (out / "likelihoods").iterdir()}
  for path in out.iterdir():
    if path.is_file():
      path.unlink()
  second = scoring.score_stages(folder / "taught", images, model, out, tmp_path / "all.jsonl")
  assert "fitted to 12 judgements" in first.worth and f"fitted to {len(indices)}" in second.worth
  assert {path: path.stat().st_mtime_ns for path in (out / "likelihoods").iterdir()} == said


def test_another_model_is_another_stage(folder, tmp_path):
  assert scoring.model_digest(folder / "student") == scoring.model_digest(folder / "student")
  assert scoring.model_digest(folder / "student") != scoring.model_digest(folder / "critic")
  out = tmp_path / "out"
  scoring.score_stages(folder / "taught", folder / "words" / "images", folder / "critic", out)
  with pytest.raises(DataError, match="was made with"):
    other = make_model(tmp_path / "other", "critic", "none")
    scoring.score_stages(folder / "taught", folder / "words" / "images", other, out)
