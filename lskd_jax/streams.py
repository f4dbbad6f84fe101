"""Leaves that are made while they are written, so that a tree on its way to disk need not fit in memory."""
import collections
from collections.abc import Callable, Iterator
import dataclasses
import math

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore

PIECE = 2**25  # bytes: larger leaves are made and stored in pieces of about this size
UNDER_WAY = 4 * PIECE  # bytes that may wait to be on disk while more are made


@dataclasses.dataclass(eq=False)
class Streamed:
  """A leaf that `trees.write_tree` asks for its values when their turn comes.

  shape, dtype: of the leaf.
  parts: given a number of rows, yields the leaf in parts of that many rows of its first axis, the
    last one perhaps shorter. A scalar is one part.
  """
  shape: tuple[int, ...]
  dtype: np.dtype
  parts: Callable[[int], Iterator[np.ndarray]]


class StreamHandler(ocp.type_handlers.NumpyHandler):
  """Orbax's writer of streamed leaves; on disk they are NumPy arrays like any others.

  Args:
    seen: called with a leaf's name, the first row of a part, and the part, in the leaf's dtype.
  """

  def __init__(self, seen: Callable[[str, int, np.ndarray], None]):
    super().__init__()
    self._seen = seen

  async def serialize(self, values, infos, args=None):
    """Makes and writes every leaf. Orbax may wait for futures: there are none, all is on disk."""
    if jax.process_index() > 0:
      return []
    writes = collections.deque()  # (bytes, future) of parts under way
    try:
      for leaf, info, how in zip(values, infos, args):
        name = jax.tree_util.keystr(info.keypath, simple=True, separator="/")
        store = await tensorstore.open(
            ocp.type_handlers.get_json_tspec_write(
                info, use_ocdbt=True, global_shape=leaf.shape, local_shape=leaf.shape,
                dtype=leaf.dtype, process_index=0, arg=how),
            create=True, context=info.ts_context)
        row = 0
        for part in leaf.parts(_rows(leaf)):
          part = np.asarray(part, leaf.dtype, order="C")
          self._seen(name, row, part)
          rows = len(part) if leaf.shape else 1
          place = store[row:row + rows] if leaf.shape else store
          writes.append((part.nbytes, place.write(part, can_reference_source_data_indefinitely=True)))
          row += rows
          del part  # from here on it lives as long as it is being written
          while sum(size for size, _ in writes) > UNDER_WAY:
            await writes.popleft()[1]
        if row != (leaf.shape or (1,))[0]:
          raise ValueError(f"{name}: {row} rows were made for shape {leaf.shape}")
      while writes:
        await writes.popleft()[1]
    finally:
      for _, write in writes:
        write.exception()  # waits: what is still being written could not be removed
    return []


def _rows(leaf: Streamed) -> int:
  """How many rows make a part: all rows of a leaf that is stored in one piece."""
  row = math.prod(leaf.shape[1:]) * leaf.dtype.itemsize
  return max(1, PIECE // max(1, row))
