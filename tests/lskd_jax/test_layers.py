"""The parts all towers are made of, each against arithmetic written out in NumPy."""
import math

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lskd_jax.models import layers
from lskd_jax.parallel import ACT_BTHK, W_DHK, W_HKD, make_mesh, put_batch

pytestmark = pytest.mark.usefixtures("one_device")

B, S, T, U, HEADS, WIDTH = 2, 3, 4, 5, 2, 8


def attention_loop(queries, keys, values, mask):
  """Softmax attention, one query at a time, in float64."""
  out = np.zeros(queries.shape)
  for b, s, t, h in np.ndindex(*queries.shape[:4]):
    allowed = [u for u in range(keys.shape[2]) if mask[b, s, h, t, u]]
    scores = [queries[b, s, t, h] @ keys[b, s, u, h] / math.sqrt(queries.shape[-1]) for u in allowed]
    weights = np.exp(np.array(scores) - max(scores))
    out[b, s, t, h] = sum(w * values[b, s, u, h] for w, u in zip(weights / weights.sum(), allowed))
  return out


@pytest.fixture(scope="module")
def tensors():
  """Queries, keys, values and a mask that leaves every query at least its first key."""
  rng = np.random.default_rng(0)
  shapes = (B, S, T, HEADS, WIDTH), (B, S, U, HEADS, WIDTH), (B, S, U, HEADS, WIDTH)
  mask = rng.random((B, S, HEADS, T, U)) < 0.5
  mask[..., 0] = True
  return *(rng.normal(size=shape).astype(np.float32) for shape in shapes), mask


@pytest.fixture(scope="module")
def attend():
  return jax.jit(layers.attend)


def test_attention_is_a_softmax_over_the_allowed_keys(tensors, attend):
  queries, keys, values, mask = tensors
  expected = attention_loop(*(x.astype(np.float64) for x in tensors[:3]), mask)
  np.testing.assert_allclose(attend(queries, keys, values, mask), expected, atol=2e-6)


def test_without_a_mask_every_key_is_allowed(tensors, attend):
  queries, keys, values, mask = tensors
  expected = attention_loop(*(x.astype(np.float64) for x in tensors[:3]), np.ones_like(mask))
  np.testing.assert_allclose(attend(queries, keys, values), expected, atol=2e-6)


def test_a_masked_key_has_no_weight_at_all(tensors, attend):
  queries, keys, values, mask = tensors
  mask = mask & (np.arange(U) != 3)
  before = attend(queries, keys, values, mask)
  keys, values = keys.copy(), values.copy()
  keys[:, :, 3], values[:, :, 3] = 1e3, -1e3
  np.testing.assert_array_equal(attend(queries, keys, values, mask), before)


def test_attention_in_bfloat16_keeps_its_softmax_in_float32(tensors, attend):
  """Scores 300 and 301 are one number in bfloat16; their softmax is not one half."""
  queries = jnp.full((1, 1, 1, 1, 1), 1.0, jnp.bfloat16)
  keys = jnp.array([256.0, 258.0], jnp.bfloat16).reshape(1, 1, 2, 1, 1)
  values = jnp.array([0.0, 1.0], jnp.bfloat16).reshape(1, 1, 2, 1, 1)
  out = attend(queries, keys, values)
  assert out.dtype == jnp.bfloat16
  assert float(out[0, 0, 0, 0, 0]) == pytest.approx(1 / (1 + math.exp(-2)), abs=4e-3)
  half = [x.astype(jnp.bfloat16) for x in tensors[:3]]
  near = attend(*half, tensors[3]).astype(np.float32)
  np.testing.assert_allclose(near, attend(*tensors), atol=0.05)


def test_dense_makes_heads_and_takes_them_back():
  make, join = nnx.Rngs(0), nnx.Rngs(1)
  split = layers.Dense((6,), (2, 3), W_DHK, make)
  merge = layers.Dense((2, 3), (6,), W_HKD, join, bias=False)
  split.bias[...] = jnp.arange(6.0).reshape(2, 3)
  x = np.random.default_rng(0).normal(size=(2, 4, 6)).astype(np.float32)
  heads = split(x, ACT_BTHK)
  expected = np.einsum("btd,dhk->bthk", x, split.kernel[...]) + np.arange(6.0).reshape(2, 3)
  np.testing.assert_allclose(heads, expected, atol=1e-6)
  np.testing.assert_allclose(merge(heads), np.einsum("bthk,hkd->btd", heads, merge.kernel[...]),
                             atol=1e-6)
  assert merge.bias is None


def test_dense_starts_at_one_over_the_root_of_its_fan_in():
  kernel = np.asarray(layers.Dense((4, 100), (50,), jax.P(), nnx.Rngs(0)).kernel[...])
  assert kernel.shape == (4, 100, 50)
  assert kernel.std() == pytest.approx(1 / math.sqrt(400), rel=0.03)


def test_mlp_uses_the_exact_gelu():
  """gelu(x) = x (1 + erf(x / sqrt 2)) / 2; the tanh formula differs by up to 5e-4."""
  mlp = layers.Mlp(1, 1, nnx.Rngs(0))
  mlp.up.kernel[...], mlp.down.kernel[...] = jnp.ones((1, 1)), jnp.ones((1, 1))
  x = np.linspace(-4, 4, 41, dtype=np.float32).reshape(1, -1, 1)
  expected = [v * (1 + math.erf(v / math.sqrt(2))) / 2 for v in x.ravel().tolist()]
  np.testing.assert_allclose(np.ravel(mlp(x)), expected, atol=1e-6)


def test_rms_norm_by_hand():
  """The mean square of (3, 4) is 12.5."""
  expected = np.array([3.0, 4.0]) / math.sqrt(12.5)
  np.testing.assert_allclose(layers.rms_norm(jnp.array([3.0, 4.0])), expected, rtol=1e-6)
  np.testing.assert_array_equal(layers.rms_norm(jnp.zeros(2)), [0, 0])  # not NaN


def test_layer_norm_is_exact_far_from_zero():
  """E[x^2] - E[x]^2 would lose everything here: values 1000 +- 0.01."""
  norm = layers.layer_norm(2, 1e-12, nnx.Rngs(0))
  np.testing.assert_allclose(norm(jnp.array([[1000.0, 1000.0625]])), [[-1, 1]], rtol=1e-3)


def test_dropout_scales_what_it_keeps():
  x = jnp.full((200, 200), 3.0)
  out = np.asarray(layers.dropout(x, 0.25, jax.random.key(0)))
  assert set(np.unique(out)) == {0.0, 4.0}  # 3 / (1 - 0.25)
  assert (out == 0).mean() == pytest.approx(0.25, abs=0.01)


def test_dropout_is_off_in_evaluation_and_at_rate_zero():
  x = jnp.ones((3, 3))
  assert layers.dropout(x, 0.5, None) is x
  assert layers.dropout(x, 0.0, jax.random.key(0)) is x
  assert layers.fold_in(None, 3) is None


def test_dropout_does_not_depend_on_the_mesh():
  mask = np.asarray(layers.dropout(jnp.ones((8, 16)), 0.5, jax.random.key(0)))
  mesh = make_mesh(fsdp=8)
  with jax.set_mesh(mesh):
    x = put_batch({"x": np.ones((8, 16), np.float32)}, mesh)["x"]
    np.testing.assert_array_equal(layers.dropout(x, 0.5, jax.random.key(0)), mask)


class Block(nnx.Module):
  """x -> x + dropout(tanh(W x)): enough for the stack to have something to recompute."""

  def __init__(self, rngs):
    self.dense = layers.Dense((8,), (8,), jax.P("fsdp", None), rngs)

  def __call__(self, x, key=None):
    return x + layers.dropout(jnp.tanh(self.dense(x)), 0.5, key)


def stack_of(depth=3, **options):
  return layers.Stack(Block, depth, nnx.Rngs(0), **options)


def rows(seed=0):
  x = np.random.default_rng(seed).normal(size=(2, 8)).astype(np.float32)
  return put_batch({"x": x}, jax.sharding.get_mesh())["x"]


def add_up(stack, x):
  """A carry, an input per block and an output per block."""
  def apply(block, carry, step):
    carry = block(carry) * step
    return carry, carry.sum()
  return stack(apply, x, jnp.arange(1.0, stack.depth + 1))


@jax.jit
def gradient(stack, x):
  """Value and gradient of the last carry's sum."""
  loss, grads = jax.value_and_grad(lambda stack: add_up(stack, x)[0].sum())(stack)
  return loss, grads.blocks.dense.kernel[...]


def test_a_stack_applies_its_blocks_in_order():
  stack, x = stack_of(), rows()
  out, sums = add_up(stack, x)
  kernels, expected, expected_sums = np.asarray(stack.blocks.dense.kernel[...]), np.asarray(x), []
  assert kernels.shape == (3, 8, 8)
  for i in range(3):
    expected = (expected + np.tanh(expected @ kernels[i])) * (i + 1)
    expected_sums.append(expected.sum())
  np.testing.assert_allclose(out, expected, rtol=1e-5)
  np.testing.assert_allclose(sums, expected_sums, rtol=1e-5)


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("remat", ["none", "full", "dots"])
def test_scanning_and_recomputing_change_no_number(scan, remat):
  loss, kernel = gradient(stack_of(scan=scan, remat=remat), rows())
  expected_loss, expected_kernel = gradient(stack_of(), rows())
  np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
  np.testing.assert_allclose(kernel, expected_kernel, rtol=1e-5, atol=1e-6)


def test_an_unknown_remat_policy_is_an_error():
  with pytest.raises(ValueError, match="remat 'some' is unknown: choose none, dots or full"):
    stack_of(remat="some")


def test_every_block_of_a_scan_drops_other_values():
  """A random state inside the blocks would give each block the same mask."""
  stack = stack_of(depth=2)
  stack.blocks.dense.kernel[...] = jnp.full((2, 8, 8), 1.0)
  x = jnp.full((50, 8), 1.0)
  keys = jax.random.split(jax.random.key(0), 2)
  dropped = stack(lambda block, x, key: (x, block(x, key) == x), x, keys)[1]
  assert dropped.shape == (2, 50, 8)
  assert not np.array_equal(dropped[0], dropped[1])


def test_map_gives_one_output_per_block():
  stack = stack_of()
  x = jnp.ones((1, 8))
  out = stack.map(lambda block, x: block(x), x)
  kernels = np.asarray(stack.blocks.dense.kernel[...])
  np.testing.assert_allclose(out, 1 + np.tanh(np.ones((1, 1, 8)) @ kernels), rtol=1e-5,
                             atol=1e-6)
