"""The learning rate, the decay list and one AdamW update, all against values worked out by hand."""
from types import SimpleNamespace

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lskd_jax.optim import decay_mask, optimizer, schedule


def settings(**changes):
  defaults = dict(learning_rate=1e-3, warmup_steps=4, steps=12, final_share=0.1, clip_norm=1.0,
                  b1=0.9, b2=0.98, eps=1e-8, weight_decay=0.05)
  return SimpleNamespace(**defaults | changes)


@pytest.mark.parametrize("step, share", [
    (0, 0.25), (1, 0.5), (3, 1.0),  # warm-up in 4 steps; the first update is not wasted on rate 0
    (4, 1.0),  # the cosine starts at its top
    (6, 0.1 + 0.9 * (1 + 0.5 ** 0.5) / 2),  # a quarter of the way: cos(pi / 4) = sqrt(1/2)
    (8, 0.55),  # half way: the mean of 1 and 0.1
    (12, 0.1), (1000, 0.1),  # the end, and after it
])
def test_warm_up_and_cosine_step_by_step(step, share):
  assert float(schedule(settings())(step)) == pytest.approx(1e-3 * share, rel=1e-6)
  assert float(jax.jit(schedule(settings()))(jnp.int32(step))) == pytest.approx(1e-3 * share)


def test_no_warm_up_starts_at_the_peak():
  assert float(schedule(settings(warmup_steps=0))(0)) == pytest.approx(1e-3)


def test_a_warm_up_longer_than_the_run_is_an_error():
  with pytest.raises(ValueError, match="warmup_steps=12 must be at least 0 and less than steps=12"):
    schedule(settings(warmup_steps=12))


class Parts(nnx.Module):
  """One parameter of each kind that a student has."""

  def __init__(self, rngs):
    self.dense = nnx.Linear(2, 3, rngs=rngs)
    self.norm = nnx.LayerNorm(3, rngs=rngs)
    self.table = nnx.Embed(5, 3, rngs=rngs)
    self.blocks = jax.vmap(lambda rngs: nnx.Linear(2, 2, rngs=rngs))(rngs.split(4))
    self.query_tokens = nnx.Param(jnp.ones((2, 3)))
    self.positions = nnx.Param(jnp.ones((2, 3)))
    self.paint_gate = nnx.Param(jnp.ones((2, 3)))
    self.log_temperature = nnx.Param(jnp.ones(()))


def test_only_kernels_decay_whatever_their_shape_is():
  params = nnx.split(Parts(nnx.Rngs(0)), nnx.Param)[1]
  assert params["blocks"]["bias"][...].ndim == 2  # stacked biases look like a matrix
  mask = nnx.to_pure_dict(decay_mask(params))
  assert mask == {
      "dense": {"kernel": True, "bias": False},
      "norm": {"scale": False, "bias": False},
      "table": {"embedding": False},
      "blocks": {"kernel": True, "bias": False},
      "query_tokens": False, "positions": False, "paint_gate": False, "log_temperature": False}


def test_a_new_kind_of_parameter_has_to_be_decided():
  with pytest.raises(ValueError, match="parameter head/novelty: add 'novelty' to DECAYED or NOT"):
    decay_mask({"head": {"novelty": jnp.ones(3)}})


def test_the_first_update_by_hand():
  """Adam's first update is -rate sign(g), since m / sqrt(v) = g / |g|; decay adds -rate wd p."""
  config = settings(warmup_steps=0, learning_rate=0.1, weight_decay=0.5)
  params = {"kernel": jnp.array([2.0, -1.0]), "bias": jnp.array([2.0])}
  grads = {"kernel": jnp.array([0.3, -0.1]), "bias": jnp.array([0.2])}
  tx = optimizer(config)
  updates, _ = tx.update(grads, tx.init(params), params)
  np.testing.assert_allclose(updates["kernel"], [-0.1 - 0.1, 0.1 + 0.05], rtol=1e-5)
  np.testing.assert_allclose(updates["bias"], [-0.1], rtol=1e-5)


def test_gradients_are_clipped_together():
  """[3, 4] has norm 5, so all of it is scaled by 1/5. Adam's first moment shows it: (1 - b1) g."""
  params = {"a": {"kernel": jnp.zeros(1)}, "b": {"bias": jnp.zeros(1)}}
  grads = {"a": {"kernel": jnp.array([3.0])}, "b": {"bias": jnp.array([4.0])}}
  tx = optimizer(settings(clip_norm=1.0))
  _, state = tx.update(grads, tx.init(params), params)
  moments = optax.tree.get(state, "mu")
  np.testing.assert_allclose(moments["a"]["kernel"], [0.1 * 0.6], rtol=1e-5)
  np.testing.assert_allclose(moments["b"]["bias"], [0.1 * 0.8], rtol=1e-5)


def test_a_module_state_trains_under_jit():
  """The optimizer takes an NNX state as it is, and leaves its structure alone."""
  params = nnx.split(Parts(nnx.Rngs(0)), nnx.Param)[1]
  tx = optimizer(settings())
  update = jax.jit(lambda grads, opt, params: tx.update(grads, opt, params))
  updates, _ = update(params, tx.init(params), params)
  assert jax.tree.structure(optax.apply_updates(params, updates)) == jax.tree.structure(params)
