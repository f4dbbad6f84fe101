"""One training step is the same on every mesh: 1x1, the batch over 8 devices, 2 x 4 with heads.

On the last, all that can be is computed twice instead of kept, which changes no number either.
"""
import dataclasses
from types import SimpleNamespace

import jax
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from lskd_jax.parallel import make_mesh
from tests.lskd_jax import tiny

MESHES = [(1, 1), (8, 1), (2, 4)]


def one_step(shape):
  """Parameters filled by name and placed on the mesh, one step on the same batch and key."""
  with jax.set_mesh(make_mesh(fsdp=shape[0], tensor=shape[1])):
    qformer = dataclasses.replace(tiny.QFORMER, remat="full" if shape == MESHES[-1] else "none")
    student = tiny.student(dataclasses.replace(tiny.STUDENT, qformer=qformer))
    train, state, frozen = tiny.training(student)
    before = shardings(state)
    state, metrics = train(state, frozen, tiny.put(tiny.batch(images=8)), jax.random.key(3))
    del metrics["examples"]
    numpy = jax.tree.map(np.asarray, state)
    gradients = jax.tree.map(lambda a: a / (1 - tiny.ADAM.b1), numpy["opt"][1][0].mu)
    return SimpleNamespace(metrics={name: float(value) for name, value in metrics.items()},
                           gradients=gradients, params=numpy["params"], before=before,
                           after=shardings(state))


def shardings(tree):
  """{name of a leaf: its partition spec}."""
  return {jax.tree_util.keystr(path): leaf.sharding.spec
          for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


@pytest.fixture(scope="module")
def results():
  return {shape: one_step(shape) for shape in MESHES}


@pytest.mark.parametrize("shape", MESHES[1:], ids=str)
def test_losses_and_metrics_do_not_depend_on_the_mesh(results, shape):
  """Same negatives and swaps too: random numbers are a function of the key alone."""
  assert results[shape].metrics == pytest.approx(results[(1, 1)].metrics, rel=1e-5)
  assert {"loss", "itc", "itm", "lm", "itm_region_swap_right"} < set(results[shape].metrics)


@pytest.mark.parametrize("shape", MESHES[1:], ids=str)
@pytest.mark.parametrize("what", ["gradients", "params"])
def test_gradients_and_updates_do_not_depend_on_the_mesh(results, shape, what):
  got, expected = (getattr(results[s], what) for s in (shape, (1, 1)))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, expected)


def test_the_step_moved_the_parameters(results):
  moved = jax.tree.map(lambda g: float(np.abs(g).max()), results[(1, 1)].gradients)
  assert max(jax.tree.leaves(moved)) > 1e-2


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_the_step_keeps_every_sharding(results, shape):
  """An optimizer that moved one would make the second step compile anew."""
  assert results[shape].after == results[shape].before


def test_parameters_and_their_moments_are_split_as_named(results):
  """Widths over `fsdp`, heads and hidden widths over `tensor`, never the axis of layers."""
  specs = results[(2, 4)].after
  where = {"attention']['query": P(None, "fsdp", "tensor", None),
           "mlp']['up": P(None, "fsdp", "tensor")}
  for part, spec in where.items():
    found = [value for name, value in specs.items() if part in name and "kernel" in name]
    assert len(found) >= 3 and set(found) == {spec}  # the parameter and Adam's two moments


def test_a_mesh_needs_its_devices():
  with pytest.raises(ValueError, match="train.mesh.tensor=4 needs 16 devices, there are 8: make it smaller"):
    make_mesh(fsdp=4, tensor=4)
