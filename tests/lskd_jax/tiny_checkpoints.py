"""What tests of checkpoints share: a small training state, a step, and damage."""
from pathlib import Path

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import numpy as np
import optax

from lskd_jax.checkpoint import Checkpointer
from lskd_jax.trees import named_leaves


class TwoTowers(nnx.Module):
  """A frozen tower and a trained one, with the dtypes that a student has."""

  def __init__(self, width, rngs):
    spread = nnx.initializers.lecun_normal()
    self.vit = nnx.Linear(width, width, kernel_init=spread, param_dtype=jnp.bfloat16, rngs=rngs)
    self.heads = nnx.List([nnx.Linear(width, width, rngs=rngs) for _ in range(2)])


def init(key, width=64):
  model = TwoTowers(width, nnx.Rngs(key))
  trainable = nnx.All(nnx.Param, nnx.Not(nnx.PathContains("vit")))
  _, params, frozen = nnx.split(model, trainable, ...)
  opt = optax.adam(1e-2).init(params)
  return {"step": jnp.zeros((), jnp.int32), "params": params, "opt": opt, "frozen": frozen}


@jax.jit
def train_step(state):
  def loss_fn(params):
    return sum(jnp.sum(jnp.tanh(leaf) ** 2) for leaf in jax.tree.leaves(params))
  grads = jax.grad(loss_fn)(state["params"])
  updates, opt = optax.adam(1e-2).update(grads, state["opt"], state["params"])
  params = optax.apply_updates(state["params"], updates)
  return dict(state, step=state["step"] + 1, params=params, opt=opt)


def assert_same_bits(left, right):
  left, right = named_leaves(left), named_leaves(right)
  assert list(left) == list(right)
  for name in left:
    assert left[name].dtype == right[name].dtype, name
    assert np.asarray(left[name]).tobytes() == np.asarray(right[name]).tobytes(), name


def mesh_of(*shape):
  return jax.make_mesh(shape, ("fsdp", "tensor"), axis_types=(AxisType.Explicit,) * 2)


def spread_over(mesh, tree):
  """Matrices split over both axes of the mesh, everything else whole."""
  def spec(leaf):
    return P("fsdp", "tensor") if leaf.ndim == 2 else P()
  return jax.tree.map(lambda leaf: jax.device_put(leaf, NamedSharding(mesh, spec(leaf))), tree)


def saved(workdir, steps, **options):
  """Trains, saving at the given steps; returns the states by step."""
  state, states = init(jax.random.key(0)), {}
  with Checkpointer(workdir, **options) as checkpoints:
    for step in range(1, max(steps) + 1):
      state = train_step(state)
      if step in steps:
        checkpoints.save(step, state, {"next_batch": step})
        states[step] = state
  return states


def steps_in(workdir):
  return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


def largest_data_file(folder):
  return max((p for p in Path(folder).rglob("d/*") if p.is_file()), key=lambda p: p.stat().st_size)


def flip_a_bit(path):
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(data)
