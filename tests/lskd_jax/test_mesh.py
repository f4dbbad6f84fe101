"""One training step is the same whatever the mesh: 1x1, batch over 8 devices, or 2 x 4 with heads."""
from types import SimpleNamespace

import jax
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from lskd_jax import losses, optim, step
from lskd_jax.parallel import make_mesh
from tests.lskd_jax import tiny

WEIGHTS = {"itc": 1.0, "itm": 1.0, "lm": 1.0, "region_swap": 1.0, "question": 1.0, "smoothing": 0.1}
# A large epsilon keeps the update a smooth function of the gradient: Adam turns a gradient that is
# zero but for rounding, such as that of a key's bias, into a full step in either direction.
ADAM = SimpleNamespace(learning_rate=1e-2, warmup_steps=0, steps=10, final_share=0.1, clip_norm=1e6,
                       b1=0.9, b2=0.98, eps=1.0, weight_decay=0.05)
MESHES = [(1, 1), (8, 1), (2, 4)]


def one_step(shape):
  """Parameters filled once by name and placed on the mesh, one step on the same batch and key."""
  with jax.set_mesh(make_mesh(shape)):
    optimizer = optim.optimizer(ADAM)
    graph, params, frozen = step.split(tiny.student(), ("vit",))
    objective = lambda model, batch, key: losses.student_loss(model, batch, WEIGHTS, key)
    train = step.make_train_step(graph, optimizer, objective, {n: WEIGHTS[n] for n in WEIGHTS})
    state = step.init_state(params, optimizer)
    before = shardings(state)
    state, metrics = train(state, frozen, tiny.put(tiny.batch(images=8)), jax.random.key(3))
    numpy = jax.tree.map(np.asarray, state)
    gradients = jax.tree.map(lambda a: a / (1 - ADAM.b1), numpy["opt"][1][0].mu)
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
  where = {"attention']['query": P(None, "fsdp", "tensor", None), "mlp']['up": P(None, "fsdp", "tensor")}
  for part, spec in where.items():
    found = [value for name, value in specs.items() if part in name and "kernel" in name]
    assert len(found) >= 3 and set(found) == {spec}  # the parameter and Adam's two moments


def test_a_mesh_needs_its_devices():
  with pytest.raises(ValueError, match="mesh 4x4 needs 16 devices, there are 8: set train.mesh"):
    make_mesh((4, 4))
