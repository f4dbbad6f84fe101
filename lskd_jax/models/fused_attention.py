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
LAYOUT = P(BATCH, "tensor", None, None)


def attend(queries: jax.Array, keys: jax.Array, values: jax.Array, interpret: bool = False) -> jax.Array:
  """softmax(q k / sqrt(k)) v among the tokens of each row, as `layers.attend` without a mask.

  Args:
    queries, keys, values: [B, 1, T, h, k].
    interpret: runs the kernel's Python on any device, slowly: for tests.

  Returns:
    [B, 1, T, h, k].
  """
  tokens, width = queries.shape[2], queries.shape[-1]
  padded = -(-tokens // LANES) * LANES

  def rows(x):  # -> [B, h, padded T, k]
    return jnp.pad(x[:, 0].swapaxes(1, 2), ((0, 0), (0, 0), (0, padded - tokens), (0, 0)))
  queries = queries * jnp.asarray(1 / math.sqrt(width), queries.dtype)  # the kernel does not scale
  local = functools.partial(_local, tokens=tokens, interpret=interpret)
  # The kernel does not say over which axes its output varies, hence no check of that.
  seen = jax.shard_map(local, in_specs=(LAYOUT,) * 3, out_specs=LAYOUT, check_vma=False)(
      rows(queries), rows(keys), rows(values))
  return seen[:, :, :tokens].swapaxes(1, 2)[:, None]


def _local(queries, keys, values, *, tokens: int, interpret: bool):
  """One device's rows and heads, [b, h, T, k] each; tokens from `tokens` on are padding."""
  heads, padded = queries.shape[1:3]
  size = block(padded)
  sizes = splash.BlockSizes(block_q=size, block_kv=size, block_q_dkv=size, block_kv_dkv=size,
                            block_q_dq=size, block_kv_dq=size)
  mask = splash.MultiHeadMask([splash.FullMask((padded, padded))] * heads)
  kernel = splash.make_splash_mha_single_device(mask, block_sizes=sizes, interpret=interpret)
  # Tokens see those of their own segment: padding sees padding alone.
  segment = (jnp.arange(padded) >= tokens).astype(jnp.int32)
  return jax.vmap(kernel, (0, 0, 0, None))(queries, keys, values, splash.SegmentIds(segment, segment))


def block(tokens: int) -> int:
  """The largest block that divides a multiple of LANES and is at most MAX_BLOCK."""
  return max(size for size in range(LANES, MAX_BLOCK + 1, LANES) if tokens % size == 0)
