"""Evaluation while training: the losses on images that a run does not learn from."""
from dataclasses import replace
import json
import threading

from flax import nnx
import jax
import numpy as np
import pytest

from data_pipeline.corpus import open_corpus
from data_pipeline.loader import Loader
from data_pipeline.records import DataError
from lskd_jax import held_out, losses, parallel, preemption, prepare
from lskd_jax.batches import loader_options
from lskd_jax.metrics import read_metrics
from lskd_jax.models import build
from lskd_jax.train import train
from tests import tiny_runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Eight scenes to learn from and ten to evaluate on: two batches, and two that fill none."""
  folder = tmp_path_factory.mktemp("held_out")
  tiny_runs.teach_scenes(folder)
  tiny_runs.teach_others(folder)
  return folder


def config_for(folder, **groups):
  """Three steps with dropout, and an evaluation after each."""
  config = tiny_runs.config_for(folder)
  config.model.qformer.dropout = 0.5
  config.loss.itm = 0.0  # takes longest to compile
  config.optim.steps = 3
  config.train.update(save_every=100, log_examples=True)
  tiny_runs.evaluate_on_others(config, folder)
  for name, values in groups.items():
    config[name].update(values)
  return config


def run(config, workdir, **more):
  """A run's parameters and its lines with an evaluation, as held_out_… alone."""
  train(config, workdir, progress=False, **more)
  digest = json.loads((workdir / "done.json").read_text())["params_digest"]
  return digest, [{name: value for name, value in line.items() if name.startswith("held_out_")}
                  for line in read_metrics(workdir / "metrics.jsonl")]


@pytest.fixture(scope="module")
def evaluated(folder):
  return run(config_for(folder), folder / "run")


def test_every_loss_and_metric_of_the_step_is_measured_on_the_held_out_images(evaluated):
  _, lines = evaluated
  assert len(lines) == 3
  assert set(lines[0]) == {f"held_out_{name}" for name in ("loss", "lm", "itc", "answer_words_right")}
  assert len({line["held_out_loss"] for line in lines}) == 3


def test_learning_is_the_same_with_and_without_evaluations(folder, evaluated):
  assert run(config_for(folder, eval=dict(every=0)), folder / "blind") == (evaluated[0], [{}] * 3)


def test_the_last_evaluation_is_what_the_finished_model_says_without_dropout(folder, evaluated):
  """LM and ITC, which draw nothing, computed anew from the model directory."""
  config = config_for(folder)
  corpus = open_corpus(folder / "others", folder / "other words/images", split=None)
  with jax.set_mesh(parallel.make_mesh(**config.train.mesh)):
    model = build.load(folder / "run" / "model")
    calm = replace(model.config, qformer=replace(model.config.qformer, dropout=0.0))
    graph, _ = nnx.split(build.maker("student", calm, model.tokenizer)(nnx.Rngs(0)))
    student = nnx.merge(graph, model.state)
    loader = Loader(corpus, model.tokenizer, loader_options(config), config.seed)
    totals = {name: np.zeros(2) for name in ("lm", "itc")}
    for step in range(2):
      rows = parallel.put_batch(loader.batch(step), jax.sharding.get_mesh())
      found, _ = losses.student_loss(student, rows, config.loss.to_dict(), jax.random.key(0))
      for name in totals:
        totals[name] += [float(found[name].total), float(found[name].weight)]
  for name, (total, weight) in totals.items():
    assert evaluated[1][-1][f"held_out_{name}"] == pytest.approx(total / weight, rel=1e-4)


def measured(config, workdir):
  """The evaluation of a run before its first step, with ITM, whose negatives are drawn."""
  config.loss.itm = 1.0
  mesh = parallel.make_mesh(**config.train.mesh)
  with jax.set_mesh(mesh):
    parts = prepare.prepare(config, workdir, mesh, progress=False)
    return held_out.measure(parts.held_out, parts.params, parts.frozen, lambda: False, lambda: None)


@pytest.fixture(scope="module")
def before_learning(folder):
  return measured(config_for(folder), folder / "before")


def test_negatives_are_the_same_each_time_and_in_microbatches(folder, before_learning):
  assert {"held_out_itm", "held_out_itm_other_text_right"} <= set(before_learning)
  found = measured(config_for(folder, train=dict(microbatches=2)), folder / "before")
  assert found == pytest.approx(before_learning, rel=1e-4)


def test_at_most_so_many_batches(folder, before_learning):
  found = measured(config_for(folder, eval=dict(batches=1)), folder / "before")
  assert found != before_learning and set(found) == set(before_learning)


def test_a_mesh_of_several_devices_measures_the_same(folder, before_learning):
  found = measured(config_for(folder, train=dict(mesh=dict(data=2, fsdp=2))), folder / "before")
  assert found == pytest.approx(before_learning, rel=1e-4)


class ToldInAnEvaluation(preemption.Preemption):
  """A run that is told to stop when the evaluation after a step has begun."""

  def __init__(self, step):
    super().__init__()
    self._step, self.now = step, 0

  def at_boundary(self, step):
    self.now = step
    return super().at_boundary(step)

  @property
  def stopping(self):  # the watcher's own thread asks too, and it is that thread which is waited for
    in_loop = threading.current_thread() is threading.main_thread()
    if in_loop and self.now == self._step - 1 and not super().stopping:
      self.ask("stop", "a test")
      self.wait_until_told()
    return super().stopping


def test_a_run_that_is_told_to_stop_leaves_its_evaluation_and_makes_it_when_it_goes_on(folder, evaluated):
  workdir = folder / "told"
  with pytest.raises(preemption.Preempted):
    train(config_for(folder), workdir, progress=False, stop=ToldInAnEvaluation(2))
  lines = read_metrics(workdir / "metrics.jsonl")
  assert [line["step"] for line in lines] == [1, 2] and "held_out_loss" not in lines[-1]
  assert [path.name for path in (workdir / "checkpoints").iterdir()] == ["2"]
  assert run(config_for(folder), workdir) == evaluated


@pytest.mark.parametrize("groups,error", [
    (dict(eval=dict(corpus="")), "eval.every=1: there is nothing to evaluate on; name held-out images"),
    (dict(eval=dict(corpus="", split="train")), "eval.split='train': the run learns from these images"),
    (dict(data=dict(corpus="others", split="validation")), "eval.split='': the run learns from these"),
    (dict(eval=dict(split="test")), r"others: has no split 'test'; choose from .'validation'."),
    (dict(data=dict(batch_size=16)), "10 images with texts do not fill one batch of data.batch_size=16"),
])
def test_what_cannot_be_evaluated_is_one_line(folder, tmp_path, groups, error):
  config = config_for(folder, **groups)
  if config.data.corpus == "others":
    config.data.corpus = config.eval.corpus
  with pytest.raises(DataError, match=error) as caught:
    run(config, tmp_path)
  assert "\n" not in str(caught.value) and not (tmp_path / "config.json").exists()
