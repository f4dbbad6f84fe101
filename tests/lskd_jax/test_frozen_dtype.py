"""The frozen part in bfloat16: half the bytes, the same numbers, and the original bits in the end."""
import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lskd_jax import step
from lskd_jax.frozen_dtype import narrowed, widened
from lskd_jax.trees import named_leaves
from tests.lskd_jax import tiny

pytestmark = pytest.mark.usefixtures("one_device")


def parts(dtype, frozen=("vit", "words")):
  """A student that computes in `dtype`: graph, trainable part, frozen part."""
  return step.split(tiny.student(dataclasses.replace(tiny.STUDENT, dtype=dtype)), frozen)


def test_kernels_are_narrowed_and_nothing_else():
  """Norms and embeddings are used in float32, and tables are no parameters at all."""
  graph, params, frozen = parts("bfloat16")
  before, after = named_leaves(frozen), named_leaves(narrowed(graph, params, frozen, "bfloat16"))
  changed = {name for name in before if before[name].dtype != after[name].dtype}
  assert changed == {name for name in before if name.endswith("kernel")} and len(changed) > 3
  assert {after[name].dtype for name in changed} == {jnp.dtype("bfloat16")}
  assert after["qformer/words"].dtype == jnp.float32 and after["opens_bracket"].dtype == bool


def test_kernels_that_are_used_in_float32_stay_so():
  """The projections of ITC compute in float32 whatever the model does."""
  graph, params, frozen = parts("bfloat16", ("vision_proj", "vit"))
  after = named_leaves(narrowed(graph, params, frozen, "bfloat16"))
  assert after["vision_proj/kernel"].dtype == jnp.float32
  assert after["vit/patchify/kernel"].dtype == jnp.bfloat16


def test_a_narrowed_tower_computes_the_same_bit_for_bit():
  graph, params, frozen = parts("bfloat16")
  image = tiny.put({"image": tiny.batch()["image"]})["image"]
  see = jax.jit(lambda params, frozen: nnx.merge(graph, params, frozen).vit(image))
  wide, narrow = see(params, frozen), see(params, narrowed(graph, params, frozen, "bfloat16"))
  assert wide.dtype == jnp.bfloat16
  np.testing.assert_array_equal(wide, narrow)


def test_frozen_parts_have_neither_gradients_nor_optimizer_state():
  graph, params, frozen = parts("bfloat16")
  state = jax.eval_shape(lambda p: step.init_state(p, tiny.optim.optimizer(tiny.ADAM)), params)
  names = [name for name in named_leaves(state) if "vit" in name.split("/") or name.endswith("words")]
  assert names == [] and any("qformer" in name for name in named_leaves(state["opt"]))


def test_an_empty_dtype_changes_nothing():
  graph, params, frozen = parts("float32")
  assert narrowed(graph, params, frozen, "") is frozen


@pytest.mark.parametrize("wanted", ["bfloat16", "half"])
def test_a_dtype_that_the_model_does_not_compute_in_is_refused(wanted):
  with pytest.raises(ValueError, match=f"train.frozen_dtype={wanted}: .* set model.dtype={wanted} too"):
    narrowed(*parts("float32"), wanted)


def test_the_original_bits_come_back_from_the_weights_a_run_started_from():
  graph, params, frozen = parts("bfloat16")
  original = jax.tree.map(np.asarray, nnx.to_pure_dict(frozen))
  restored = named_leaves(widened(narrowed(graph, params, frozen, "bfloat16"), original))
  for name, value in named_leaves(frozen).items():
    assert restored[name].dtype == value.dtype
    np.testing.assert_array_equal(restored[name], value)


def test_without_those_weights_the_rounded_values_are_what_there_is():
  """Of a part that was not copied, or of weights that have changed since."""
  graph, params, frozen = parts("bfloat16")
  narrow = narrowed(graph, params, frozen, "bfloat16")
  other = jax.tree.map(lambda a: np.asarray(a) * 2, nnx.to_pure_dict(frozen))
  for source in (None, other):
    for name, value in named_leaves(widened(narrow, source)).items():
      np.testing.assert_array_equal(value, named_leaves(narrow)[name], err_msg=name)
