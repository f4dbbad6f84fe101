"""What all towers are made of: dense layers, attention, the scanned stack of blocks.

Modules hold parameters and no random state; they are used as plain pytrees under JAX transforms.
Softmax, layer norms and logits are float32 whatever the compute dtype is.
"""
from collections.abc import Callable
import functools
import math

from flax import nnx
import jax
import jax.numpy as jnp

from lskd_jax.parallel import ACT_B, BATCH, REPLICATED, W_DF, W_FD

REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}  # and "none": save everything

MASKED = float(jnp.finfo(jnp.float32).min)


def normal(key, shape, spec, stddev=0.02, dtype=jnp.float32):
  """A parameter of N(0, stddev) entries laid out by `spec`."""
  return nnx.Param(nnx.initializers.normal(stddev)(key, shape, dtype, out_sharding=spec))


def constant(value, shape, spec=REPLICATED, dtype=jnp.float32):
  """A parameter filled with `value`."""
  return nnx.Param(jnp.full(shape, value, dtype, out_sharding=spec))


class Dense(nnx.Module):
  """`x @ kernel + bias` over the last `len(inputs)` axes of x.

  Args:
    inputs, outputs: widths, one or several axes each: (d,) -> (h, k) makes heads.
    spec: partition spec of the kernel, of shape inputs + outputs.
    stddev: of the initial kernel; None = 1 / sqrt(fan in).
  """

  def __init__(self, inputs: tuple[int, ...], outputs: tuple[int, ...], spec, rngs, *,
               bias: bool = True, stddev: float | None = None, dtype=jnp.float32):
    stddev = 1 / math.sqrt(math.prod(inputs)) if stddev is None else stddev
    self.kernel = normal(rngs.params(), inputs + outputs, spec, stddev)
    bias_spec = jax.P(*tuple(spec)[len(inputs):])
    self.bias = constant(0.0, outputs, _without_fsdp(bias_spec)) if bias else None
    self.inputs = len(inputs)
    self.dtype = dtype

  def __call__(self, x: jax.Array, out_spec=ACT_B) -> jax.Array:
    """x: [B, ..., *inputs] -> [B, ..., *outputs] in the compute dtype, laid out by `out_spec`."""
    contract = tuple(range(x.ndim - self.inputs, x.ndim)), tuple(range(self.inputs))
    y = jax.lax.dot_general(x.astype(self.dtype), whole(self.kernel[...], self.dtype),
                            (contract, ((), ())), out_sharding=out_spec)
    return y if self.bias is None else y + self.bias[...].astype(self.dtype)


def _without_fsdp(spec):
  """A bias is small: whole over `fsdp`, split over `tensor` like the output it is added to."""
  return jax.P(*(None if axis == "fsdp" else axis for axis in spec))


def layer_norm(width: int, eps: float, rngs) -> nnx.LayerNorm:
  """LayerNorm in float32 with the two-pass variance."""
  return nnx.LayerNorm(width, epsilon=eps, use_fast_variance=False, dtype=jnp.float32, rngs=rngs)


def reshape(x: jax.Array, *shape: int) -> jax.Array:
  """Reshapes all but the batch axis, which stays first and split over devices."""
  return jax.lax.reshape(x, shape, out_sharding=ACT_B)


def rms_norm(x: jax.Array, eps: float = 1e-6) -> jax.Array:
  """x / sqrt(mean(x^2) + eps) over the last axis, in float32 (Zhang & Sennrich 2019, no scale)."""
  x = x.astype(jnp.float32)
  return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)


def gelu(x: jax.Array) -> jax.Array:
  """x (1 + erf(x / sqrt 2)) / 2 (Hendrycks & Gimpel 2016), computed in float32.

  Written with erf as PyTorch does: the erfc of `jax.nn.gelu` is three times slower on CPUs.
  """
  wide = x.astype(jnp.float32)
  return (0.5 * wide * (1 + jax.lax.erf(wide * math.sqrt(0.5)))).astype(x.dtype)


ACTIVATIONS = {
    "gelu": gelu,                                           # BERT, ViT
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),  # CLIP
}


class Mlp(nnx.Module):
  """down(activation(up(x))), the activation one of ACTIVATIONS."""

  def __init__(self, width: int, hidden: int, rngs, dtype=jnp.float32, activation: str = "gelu"):
    if activation not in ACTIVATIONS:
      raise ValueError(f"activation {activation!r} is unknown: choose {', '.join(ACTIVATIONS)}")
    self.activation = activation
    self.up = Dense((width,), (hidden,), W_DF, rngs, dtype=dtype)
    self.down = Dense((hidden,), (width,), W_FD, rngs, dtype=dtype)

  def __call__(self, x: jax.Array) -> jax.Array:
    """[B, ..., D] -> [B, ..., D]."""
    hidden_spec = jax.P(BATCH, *(None,) * (x.ndim - 2), "tensor")
    return self.down(ACTIVATIONS[self.activation](self.up(x, hidden_spec)))


def dropout(x: jax.Array, rate: float, key) -> jax.Array:
  """Inverted dropout; `key` None = evaluation."""
  if key is None or rate == 0.0:
    return x
  keep = jax.random.bernoulli(key, 1 - rate, x.shape, out_sharding=jax.typeof(x).sharding)
  return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)


def attend(queries, keys, values, mask=None, key=None, rate: float = 0.0):
  """Softmax attention: softmax(q k / sqrt(width of a head)) v.

  Args:
    queries: [B, S, T, h, k]; keys, values: [B, S, U, h, k].
    mask: bool, broadcastable to [B, S, h, T, U], True where attention is allowed; None = everywhere.
    key, rate: dropout of the attention weights.

  Returns:
    [B, S, T, h, k].
  """
  # Heads before tokens: plain batched matrix products, several times faster than a five-axis einsum.
  queries, keys, values = (x.swapaxes(2, 3) for x in (queries, keys, values))
  scores = jnp.einsum("bshtk,bshuk->bshtu", queries, keys, preferred_element_type=jnp.float32)
  scores *= 1 / math.sqrt(queries.shape[-1])
  weights = jax.nn.softmax(scores if mask is None else jnp.where(mask, scores, MASKED), -1)
  weights = dropout(weights, rate, key).astype(values.dtype)
  return jnp.einsum("bshtu,bshuk->bshtk", weights, values).swapaxes(2, 3)


class Stack(nnx.Module):
  """`depth` equal blocks, their parameters stacked on axis 0. The only place that scans.

  Args:
    make_block: rngs -> block.
    remat: `none` saves everything for the backward pass; `full` recomputes everything; `dots`
      recomputes all but the matrix products.
    shared: several passes of a step use the blocks: see `gathered`.
    scan: False unrolls the loop: the same numbers, longer compilation, faster for few blocks.
  """

  def __init__(self, make_block: Callable, depth: int, rngs, *, remat: str = "none",
               scan: bool = True, shared: bool = False):
    if remat != "none" and remat not in REMAT_POLICIES:
      raise ValueError(f"remat {remat!r} is unknown: choose none, dots or full")
    self.depth, self.remat, self.scan, self.shared = depth, remat, scan, shared
    self.blocks = jax.vmap(make_block)(rngs.split(depth))

  def __call__(self, apply: Callable, carry, inputs=None, parts=None):
    """Runs `apply(block, carry, input) -> (carry, output)` block after block.

    Args:
      carry: a pytree handed from block to block.
      inputs: a pytree whose leaves have a leading axis of `depth`, or None.
      parts: what `self.parts()` returned, for a loop around the stack.

    Returns:
      The last carry, and the outputs stacked on axis 0.
    """
    def body(carry, block_and_input):
      return apply(block_and_input[0], carry, block_and_input[1])
    if self.remat != "none":
      body = jax.checkpoint(body, policy=REMAT_POLICIES[self.remat], prevent_cse=not self.scan)
    if self.scan:
      return jax.lax.scan(body, carry, (self.blocks, inputs))
    outputs = []
    for i, block in enumerate(parts or self.parts()):
      carry, output = body(carry, (block, jax.tree.map(lambda a: a[i], inputs)))
      outputs.append(output)
    return carry, jax.tree.map(lambda *leaves: jnp.stack(leaves), *outputs)

  def parts(self) -> list | None:
    """The blocks one by one, None for a stack that scans.

    Taking them from the stack copies their parameters on CPUs, so a loop does it once, outside.
    """
    if self.scan:
      return None
    return [jax.tree.map(lambda a: a[i], self.blocks) for i in range(self.depth)]

  def map(self, apply: Callable, *shared):
    """`apply(block, *shared)` for every block, outputs stacked on axis 0."""
    return self(lambda block, carry, _: (carry, apply(block, *shared)), ())[1]


def gathered(model: nnx.Module) -> nnx.Module:
  """The model with the kernels that several passes use made whole on every device, in the compute dtype.

  So each is gathered once in a step, and its gradient, which the passes add up on each device, is reduced
  once over the rows' axes, instead of once in every pass. Costs their memory, and nothing on a mesh that
  does not split rows. Call it where gradients are taken, on a model that was just merged.
  """
  for _, stack in nnx.iter_graph(model):
    if isinstance(stack, Stack) and stack.shared:
      for _, dense in nnx.iter_graph(stack):
        if isinstance(dense, Dense):
          dense.kernel.set_value(whole(dense.kernel[...], dense.dtype))
  return model


def whole(kernel: jax.Array, dtype) -> jax.Array:
  """A kernel gathered over the rows' axes, for matrix products; its gradient is reduced where it was split.

  Only matrix products take such an array (`reduced` in its spec): nothing can be added to it. Left to itself,
  XLA for TPUs would turn the product of a split kernel into a loop that reads the rows once per part.
  """
  kernel = kernel.astype(dtype)
  sharding = jax.typeof(kernel).sharding
  if sharding.spec.reduced or "fsdp" not in sharding.spec or all(sharding.mesh.shape[a] == 1 for a in BATCH):
    return kernel
  return jax.sharding.reshard(kernel, jax.P(*_without_fsdp(sharding.spec.partitions), reduced=set(BATCH)))


def fold_in(key, *numbers: int):
  """A key made of `key` and numbers; None (evaluation) stays None."""
  return None if key is None else functools.reduce(jax.random.fold_in, numbers, key)
