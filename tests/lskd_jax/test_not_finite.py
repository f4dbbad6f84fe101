"""A run whose parameters break: it stops, keeps the batch, and the step can be done again."""
import json
import math

import numpy as np
import pytest

from configs import scenes
from data_pipeline import corpus_stages
from data_pipeline.corpus import open_corpus
from data_pipeline.loader import Loader
from data_pipeline.records import DataError
from data_pipeline.tokenizer import load_tokenizer
from lskd_jax import exit_codes, goodput
from lskd_jax.batches import loader_options
from lskd_jax.metrics import read_metrics
from lskd_jax.not_finite import NotFiniteError
from lskd_jax.replay import reproduce_step
from lskd_jax.train import train


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
  """A tagger whose first update makes every parameter infinite or undefined: (config, folder, error)."""
  folder = tmp_path_factory.mktemp("broken")
  corpus_stages.verbalize_scenes(folder / "words", 4, progress=False)
  config = scenes.get_config()
  config.task = "tagger"
  config.model.vit.update(image_size=48, width=16, depth=1, heads=2, hidden=32)
  config.data.update(corpus=str(folder / "words"), image_root=str(folder / "words" / "images"),
                     batch_size=2, statements=2, text_tokens=32)
  config.data.texts.update(statements=0.0, captions=0.5, descriptions=0.5)
  config.optim.update(warmup_steps=0, steps=9, learning_rate=math.inf)
  config.train.update(frozen=(), save_every=3, keep=2, log_every=1, tensorboard=False, max_skipped=3)
  with pytest.raises(NotFiniteError) as caught:
    train(config, folder / "run", progress=False)
  return config, folder / "run", caught.value


def test_the_run_stops_with_its_own_exit_code_and_says_how_to_look_into_it(broken):
  _, workdir, error = broken
  assert str(error) == (
      "3 steps in a row had a loss or gradient that was not finite or above train.max_grad_norm, the last "
      f"of them step 4; its batch is in {workdir}/not_finite/step-4-process-0.npz; look into it with the "
      "same command and --reproduce-step 4")
  assert error.exit_code == exit_codes.NOT_FINITE == 3


def test_the_last_step_of_a_run_counts_too(broken, tmp_path):
  config = broken[0].copy_and_resolve_references()
  config.optim.steps = 4
  with pytest.raises(NotFiniteError, match="the last of them step 4"):
    train(config, tmp_path / "run", progress=False)
  assert not (tmp_path / "run" / "model").exists()


def test_the_batch_of_the_last_skipped_step_is_kept_with_its_facts(broken):
  config, workdir, _ = broken
  corpus = open_corpus(config.data.corpus, config.data.image_root)
  loader = Loader(corpus, load_tokenizer(workdir / "tokenizer"), loader_options(config), config.seed)
  expected = loader.batch(3)  # batches are counted from 0, steps from 1
  with np.load(workdir / "not_finite" / "step-4-process-0.npz") as kept:
    facts = json.loads(str(kept["facts"]))
    assert set(kept.files) == set(expected) | {"facts"}
    for name, rows in expected.items():
      np.testing.assert_array_equal(kept[name], rows)
  assert facts["step"] == 4 and facts["loss"] == "NaN" and facts["skipped_in_row"] == 3


def test_every_step_is_in_the_log_with_what_was_skipped(broken):
  _, workdir, _ = broken
  lines = read_metrics(workdir / "metrics.jsonl")
  assert [line["skipped_steps"] for line in lines] == [0, 1, 2, 3]
  assert isinstance(lines[0]["loss"], float) and [line["loss"] for line in lines[1:]] == ["NaN"] * 3


def files(workdir):
  return {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}


def test_a_skipped_step_again_names_the_gradients_and_writes_nothing(broken):
  config, workdir, _ = broken
  before = files(workdir)
  found = reproduce_step(config, workdir, 4, progress=False)
  assert files(workdir) == before
  assert (found.start, found.skipped, found.differences()) == (3, True, [])  # from the checkpoint of step 3
  assert "vit/stack/blocks/qkv/kernel" in found.gradients
  first, second, third, fourth = found.report()
  assert first == "step 4 again, from the state after step 3"
  assert second.startswith("its update was skipped; not finite: ") and "loss" in second
  assert third.startswith("gradients that are not finite: ") and fourth.startswith("equal to metrics.jsonl")
  assert json.loads(found.line())["loss"] == "NaN"


def test_a_good_step_again_from_the_start(broken):
  config, workdir, _ = broken
  found = reproduce_step(config, workdir, 1, progress=False)
  assert (found.start, found.skipped, found.gradients, found.differences()) == (0, False, [], [])
  other = found._replace(logged=found.logged | {"loss": 0.5})
  assert other.differences() == [f"loss {found.values['loss']}, logged 0.5"]


def test_steps_that_there_are_not_are_refused(broken, tmp_path):
  config, workdir, _ = broken
  with pytest.raises(DataError, match="--reproduce-step 10: the run has 9 steps"):
    reproduce_step(config, workdir, 10, progress=False)
  with pytest.raises(DataError, match="no run was started here"):
    reproduce_step(config, tmp_path, 1, progress=False)
  assert not list(tmp_path.iterdir())


def test_the_run_knows_where_its_time_went(broken):
  found = goodput.summary(broken[1])
  assert found.starts == 1 and found.phase == goodput.END
  assert {goodput.PREPARATION, goodput.STARTUP, goodput.DATA, goodput.SAVE} <= set(found.badput)
  assert found.productive + sum(found.badput.values()) == pytest.approx(found.wall, abs=0.1)
