"""Softmax attention in one kernel on TPUs: the weights of all pairs of tokens never reach memory.

The kernel is JAX's own for TPUs (`jax.experimental.pallas.ops.tpu.splash_attention`, after Dao et al. 2022,
FlashAttention). It knows nothing of meshes, so it runs in a `shard_map`: rows and heads are independent.
"""
import functools
import math

import jax
from jax.experimental.pallas.ops.tpu import splash_attention as splash
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from lskd_jax.parallel import BATCH

LANES = 128       # blocks of tokens are multiples of a vector register's width
MAX_BLOCK = 640   # tokens; a block of float32 scores is then 1.6 MB of on-chip memory
LAYOUT = P(BATCH, "tensor", None, None)  # [B, h, T, k], as the kernel reads


def attend(queries: jax.Array, keys: jax.Array, values: jax.Array, tokens: int,
           interpret: bool = False) -> jax.Array:
  """softmax(q k / sqrt(width of a head)) v among the first `tokens` tokens of each row.

  Args:
    queries, keys, values: [B, h, T, k], T = `padded(tokens)`.
    interpret: runs the kernel's Python on any device, slowly: for tests.

  Returns:
    [B, h, T, k]; what stands behind `tokens` means nothing.
  """
  queries = queries * jnp.asarray(1 / math.sqrt(queries.shape[-1]), queries.dtype)  # the kernel does not
  local = functools.partial(_local, tokens=tokens, interpret=interpret)
  # The kernel does not say over which axes its output varies, hence no check of that.
  return jax.shard_map(local, in_specs=(LAYOUT,) * 3, out_specs=LAYOUT, check_vma=False)(
      queries, keys, values)


def padded(tokens: int) -> int:
  """The number of tokens that the kernel reads for so many."""
  return -(-tokens // LANES) * LANES


def _local(queries, keys, values, *, tokens: int, interpret: bool):
  """One device's rows and heads, [b, h, T, k] each; tokens from `tokens` on are padding."""
  heads, length = queries.shape[1:3]
  size = block(length)
  sizes = splash.BlockSizes(block_q=size, block_kv=size, block_q_dkv=size, block_kv_dkv=size,
                            block_q_dq=size, block_kv_dq=size)
  mask = splash.MultiHeadMask([splash.FullMask((length, length))] * heads)
  kernel = splash.make_splash_mha_single_device(mask, block_sizes=sizes, interpret=interpret)
  # Tokens see those of their own segment: padding sees padding alone.
  segment = (jnp.arange(length) >= tokens).astype(jnp.int32)
  return jax.vmap(kernel, (0, 0, 0, None))(queries, keys, values, splash.SegmentIds(segment, segment))


def block(tokens: int) -> int:
  """The largest block that divides a multiple of LANES and is at most MAX_BLOCK."""
  return max(size for size in range(LANES, MAX_BLOCK + 1, LANES) if tokens % size == 0)
