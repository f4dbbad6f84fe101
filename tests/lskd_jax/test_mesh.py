"""One training step is the same on every mesh: on one device, and on eight with the axes in use.

Each mesh is a compilation of all losses, so one mesh with three axes stands for all in a plain run. On it,
all that can be is computed twice instead of kept, which changes no number either.
"""
import dataclasses
import functools
from types import SimpleNamespace

import jax
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from lskd_jax.parallel import make_mesh
from tests.lskd_jax import tiny

ONE, THREE_AXES = (1, 1, 1, 1), (2, 1, 2, 2)  # slice, data, fsdp, tensor
MESHES = [THREE_AXES, pytest.param((2, 2, 2, 1), marks=pytest.mark.slow)]


@functools.cache
def one_step(shape):
  """Parameters filled by name and placed on the mesh, one step on the same batch and key."""
  with jax.set_mesh(make_mesh(*shape)):
    qformer = dataclasses.replace(tiny.QFORMER, remat="full" if shape == THREE_AXES else "none")
    train, state, frozen = tiny.training(tiny.student(dataclasses.replace(tiny.STUDENT, qformer=qformer)))
    before = shardings(state)
    state, metrics = train(state, frozen, tiny.put(tiny.batch(images=8)), jax.random.key(3))
    numpy = jax.tree.map(np.asarray, state)
    gradients = jax.tree.map(lambda a: a / (1 - tiny.ADAM.b1), numpy["opt"][1][0].mu)
    fed = metrics.pop("examples")
    assert np.asarray(fed["image_id"]).tolist() == list(range(8))
    return SimpleNamespace(metrics={name: float(value) for name, value in metrics.items()},
                           gradients=gradients, params=numpy["params"], before=before,
                           after=shardings(state))


def shardings(tree):
  """{name of a leaf: its partition spec}."""
  return {jax.tree_util.keystr(path): leaf.sharding.spec
          for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_losses_and_metrics_do_not_depend_on_the_mesh(shape):
  """Same negatives and swaps too: random numbers are a function of the key alone."""
  assert one_step(shape).metrics == pytest.approx(one_step(ONE).metrics, rel=1e-5)
  assert {"loss", "itc", "itm", "lm", "itm_region_swap_right"} < set(one_step(shape).metrics)


@pytest.mark.parametrize("shape", MESHES, ids=str)
@pytest.mark.parametrize("what", ["gradients", "params"])
def test_gradients_and_updates_do_not_depend_on_the_mesh(shape, what):
  got, expected = (getattr(one_step(s), what) for s in (shape, ONE))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, expected)


def test_the_step_moved_the_parameters():
  moved = jax.tree.map(lambda g: float(np.abs(g).max()), one_step(ONE).gradients)
  assert max(jax.tree.leaves(moved)) > 1e-2


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_the_step_keeps_every_sharding(shape):
  """An optimizer that moved one would make the second step compile anew."""
  assert one_step(shape).after == one_step(shape).before


def test_parameters_and_their_moments_are_split_as_named():
  """Widths over `fsdp`, heads and hidden widths over `tensor`, never the axis of layers."""
  specs = one_step(THREE_AXES).after
  where = {"attention']['query": P(None, "fsdp", "tensor", None),
           "mlp']['up": P(None, "fsdp", "tensor")}
  for part, spec in where.items():
    found = [value for name, value in specs.items() if part in name and "kernel" in name]
    assert len(found) >= 3 and set(found) == {spec}  # the parameter and Adam's two moments
