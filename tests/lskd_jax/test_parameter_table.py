"""Where the parameters of the full-size students lie, compared line by line with files in tests/golden.

After a change that is meant, write them anew and read what `git diff` says:

    python -m tests.lskd_jax.test_parameter_table
"""
import importlib
from pathlib import Path

from flax import nnx
import jax
import numpy as np
import pytest

from lskd_jax import optim, parallel, step
from lskd_jax.frozen_dtype import narrowed
from lskd_jax.models.build import run_config
from lskd_jax.models.generative import GenerativeStudent
from lskd_jax.models.student import Student
from lskd_jax.parameter_table import announce, rows, sharding_table, totals
from tests.lskd_jax import tiny

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
VOCABULARIES = {"blip2": 30523, "blip2_opt": 50272}  # BERT's and [DEC]; OPT's rows
KINDS = {"student": Student, "generative": GenerativeStudent}


def full_size(name):
  """The table of a shipped config on a mesh derived from eight devices; shapes only, no weights."""
  config = importlib.import_module(f"configs.{name}").get_config()
  sizes = config.model.to_dict()
  sizes["qformer"]["vocabulary"] = sizes["decoder"]["vocabulary"] = VOCABULARIES[name]
  about = run_config(config.task, {**sizes, "region_mode": config.data.region_mode})
  tables = np.zeros(VOCABULARIES[name], bool), np.zeros(VOCABULARIES[name], np.int32)
  mesh = parallel.make_mesh(**config.train.mesh)
  with jax.set_mesh(mesh):
    model = nnx.eval_shape(lambda: KINDS[config.task](about, *tables, nnx.Rngs(0)))
    graph, params, frozen = step.split(model, tuple(config.train.frozen))
    frozen = jax.eval_shape(lambda p, f: narrowed(graph, p, f, config.train.frozen_dtype), params, frozen)
    state = jax.eval_shape(lambda p: step.init_state(p, optim.optimizer(config.optim)), params)
    return sharding_table({**state, "frozen": frozen}, mesh)


@pytest.mark.parametrize("name", VOCABULARIES)
def test_the_full_size_students_lie_as_agreed(name):
  assert full_size(name) == (GOLDEN / f"parameters_{name}.txt").read_text()


@pytest.fixture(scope="module")
def state():
  """A tiny student's on 2 x 4 devices: (state, mesh)."""
  mesh = parallel.make_mesh(fsdp=2, tensor=4)
  with jax.set_mesh(mesh):
    _, state, frozen = tiny.training(tiny.student())
  return {**state, "frozen": frozen}, mesh


def test_bytes_are_those_that_a_device_really_holds(state):
  state, mesh = state
  found = totals(rows(state, mesh))
  for part, kind in (("params", "trainable"), ("frozen", "frozen"), ("opt", "optimizer")):
    leaves = jax.tree.leaves(state[part])
    # A scalar that was made without a mesh lies on the first device only.
    first = [shard.data for leaf in leaves for shard in leaf.addressable_shards if shard.device.id == 0]
    assert found[kind] == (len(leaves), sum(leaf.size for leaf in leaves), sum(a.nbytes for a in first))


def test_the_table_names_shape_spec_and_kind_and_a_stack_once(state):
  lines = [line.split("  ") for line in sharding_table(*state).splitlines()]
  found = {words[0]: [word.strip() for word in words if word.strip()] for words in lines}
  assert found["vit/stack/blocks/mlp/up/kernel"][1:] == [
      "1x16x32", "float32", "-, fsdp, tensor", "256", "frozen"]
  assert found["qformer/words"][3:] == ["-, fsdp", "2,048", "frozen"]
  assert found["log_temperature"][1:] == ["scalar", "float32", "whole", "4", "trainable"]
  assert sum(name.endswith("mlp/up/kernel") for name in found) == 3  # one of the ViT, two of the Q-Former


def test_at_the_start_the_table_is_said_and_kept(state, tmp_path):
  said = []
  announce(*state, tmp_path, said.append)
  (text,) = said
  table = (tmp_path / "parameters.txt").read_text()
  assert table == sharding_table(*state) and text.startswith(table)
  assert " trainable, " in text and " MB, optimizer " in text


if __name__ == "__main__":
  jax.config.update("jax_platforms", "cpu")
  jax.config.update("jax_num_cpu_devices", 8)
  for config_name in VOCABULARIES:
    (GOLDEN / f"parameters_{config_name}.txt").write_text(full_size(config_name))
