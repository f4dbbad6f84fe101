"""The search over meshes, rematerialisation and batch sizes, with a made-up compiler."""
import json

import pytest

from configs import blip2, blip2_opt
from data_pipeline.records import DataError
from lskd_jax.plan import search, topology

V5E = topology.parse("v5e:4x4")
BATCH = 16 * 16  # images, where the search starts: 16 a chip


@pytest.fixture
def config():
  config = blip2.get_config()
  config.data.batch_size = BATCH
  return config


def compiler(asked: list, per_image: float = 1e9):
  """A compiler for which memory grows with images, less where things are recomputed, and which is fastest
  with parameters over all chips; tensor=2 cannot be made."""
  def compile_one(overrides, label):
    asked.append((dict(one.split("=") for one in overrides), label))
    value = asked[-1][0]
    if value["train.mesh.tensor"] == "2":
      raise ValueError("a width does not divide")
    batch, remat = int(value["data.batch_size"]), value.get("model.qformer.remat", "full")
    kept = {"none": 1.0, "dots": 0.5, "full": 0.25}[remat]
    flops = batch * 5e12 * {"none": 1.0, "dots": 1.01, "full": 1.3}[remat]
    memory = {"arguments": 1e9 if value["train.mesh.fsdp"] == "16" else 5e9, "outputs": 0, "aliased": 0,
              "temporaries": per_image * kept * batch / 16, "code": 0}
    return {"batch_size": batch, "statements": 4 * batch, "chips": 16, "seconds": 60.0, "memory": memory,
            "flops": {"model": batch * 5e12, "executed": flops}, "traffic": 1e9, "collectives": []}
  return compile_one


def test_the_best_trial_fits_recomputes_little_and_fills_the_chip(config):
  asked = []
  best = search.search(config, V5E, compiler(asked))[0]
  # 16.9 GB a chip: 16 images of 0.5 GB and 1 GB of parameters with "dots".
  assert best.fits and best.choice.fsdp == 16 and best.choice.remat == "dots"
  assert best.choice.images >= 16
  assert len(asked) < 16


def test_what_cannot_be_made_is_passed_over(config):
  assert all(trial.choice.tensor == 1 for trial in search.search(config, V5E, compiler([])))


def test_where_no_mesh_can_be_made_the_search_says_why(config):
  def refuse(overrides, label):
    raise DataError("libtpu is not here")
  with pytest.raises(DataError, match="libtpu is not here"):
    search.search(config, V5E, refuse)


def test_towers_that_recompute_differently_are_first_left_as_they_are():
  config, asked = blip2_opt.get_config(), []
  config.data.batch_size = BATCH
  search.search(config, V5E, compiler(asked))
  remats = [(value.get("model.qformer.remat"), value.get("model.decoder.remat")) for value, _ in asked]
  meshes = len(search.meshes(V5E))
  assert set(remats[:meshes]) == {(None, None)} and remats[meshes] == ("none", "none")


def test_trials_are_written_with_the_names_of_what_was_chosen_and_found(config):
  first = json.loads(json.dumps(search.as_json(search.search(config, V5E, compiler([])))))[0]
  assert first["choice"]["fsdp"] == 16 and first["speed"]["bound"] == "compute"


@pytest.mark.parametrize("keys", [
    {"loss.pool": 192, "loss.itc_block": 96}, {"train.microbatches": 3}, {"train.microbatches": 12}])
def test_batches_are_multiples_of_pools_blocks_and_parts(config, keys):
  config.update_from_flattened_dict(keys)
  config.data.batch_size = 12 * 16
  asked = []

  def crowded(overrides, label):
    facts = compiler(asked)(overrides, label)
    if facts["batch_size"] > 12 * 16:  # of which nothing tells beforehand
      facts["memory"]["temporaries"] = 1e12
    return facts
  search.search(config, V5E, crowded)
  assert {int(value["data.batch_size"]) for value, _ in asked} == {12 * 16, 24 * 16}


def test_nothing_is_tried_twice_and_the_label_says_how_long_it_takes(config):
  asked = []
  search.search(config, V5E, compiler(asked))
  tried = [tuple(sorted(value.items())) for value, _ in asked]
  assert len(set(tried)) == len(tried)
  assert asked[0][1].startswith("trial 1 of about") and asked[-1][1].endswith("min left")


def test_a_batch_that_should_have_fitted_and_did_not_is_made_smaller(config):
  asked, makes = [], compiler([])

  def crowded(overrides, label):
    facts = makes(overrides, label)
    asked.append(facts["batch_size"] // 16)
    if asked[-1] > 20:  # of which nothing tells beforehand
      facts["memory"]["temporaries"] = 1e12
    return facts
  trials = search.search(config, V5E, crowded)
  assert max(asked) > 20 and trials[0].fits


def test_the_text_has_the_overrides_of_the_best(config):
  shown = search.text(search.search(config, V5E, compiler([])), V5E)
  assert "compiled at low effort, not run" in shown
  assert "--config.train.mesh.fsdp=16" in shown and "--config.model.qformer.remat=dots" in shown


def test_where_nothing_fits_the_text_says_so(config):
  trials = search.search(config, V5E, compiler([], per_image=1e12))
  assert not trials[0].fits and "none fits" in search.text(trials, V5E)


def test_cpus_cannot_be_compared(config):
  with pytest.raises(DataError, match="give a TPU topology"):
    search.search(config, topology.parse("cpu:8"), compiler([]))
