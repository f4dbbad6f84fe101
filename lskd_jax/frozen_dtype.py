"""How the frozen part of a model is kept during a run: `train.frozen_dtype`."""
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from lskd_jax import parallel, trees
from lskd_jax.models.layers import Dense


def narrowed(graph, params, frozen, dtype: str):
  """The frozen part with its kernels in `dtype`, wherever the model would cast them to that at each use.

  So the model computes the same, bit for bit, with half the memory and no cast per step. What is
  used in float32 (norms, word embeddings that vectors are added to) stays as it is, and so does
  everything for dtype "".

  Args:
    graph, params, frozen: of `step.split`.

  Raises:
    ValueError: no part of the model computes in `dtype`.
  """
  if not dtype:
    return frozen
  kernels = {"/".join(map(str, (*path, "kernel")))
             for path, module in nnx.iter_modules(nnx.merge(graph, params, frozen))
             if isinstance(module, Dense) and jnp.dtype(module.dtype).name == dtype}
  if not kernels:
    raise ValueError(f"train.frozen_dtype={dtype}: the model does not compute in it; set model.dtype={dtype} "
                     "too, or train.frozen_dtype=''")
  return trees.fill(frozen, {name: leaf.astype(dtype) if name in kernels else leaf
                             for name, leaf in trees.named_leaves(frozen).items()})


def widened(frozen, source: dict | None):
  """The frozen part in float32 again, for a model directory.

  Args:
    source: the parameters of `init.model`. A value that became the frozen one when it was narrowed
      comes back with all its bits; for None, and for other values, the lost bits are zeros.
  """
  originals = trees.named_leaves(source or {})

  def widen(name: str, leaf):
    if not jnp.issubdtype(leaf.dtype, jnp.floating) or leaf.dtype == jnp.float32:
      return leaf
    original = originals.get(name)
    if original is None or original.shape != leaf.shape:
      return leaf.astype(jnp.float32)
    original = parallel.put_whole(np.asarray(original, np.float32), leaf.sharding)
    return _choose(original, leaf)
  return trees.fill(frozen, {name: widen(name, leaf) for name, leaf in trees.named_leaves(frozen).items()})


@jax.jit
def _choose(original, narrow):
  return jnp.where(original.astype(narrow.dtype) == narrow, original, narrow.astype(original.dtype))
