"""The rows of a batch: divided so that nothing moves, and exchanged between devices.

Rows are split over `parallel.BATCH`: each device has b = B / n rows that follow each other. Functions that
say "on each device" are called within `jax.shard_map` over the mesh in use and take the rows of one.
"""
import functools
import math

import jax
import jax.numpy as jnp

from lskd_jax.parallel import ACT_B, BATCH


def in_parts(tree, parts: int):
  """Every `parts`-th row goes to one part: [B, ...] -> [parts, B / parts, ...], for each leaf.

  So each device keeps its rows and has as many in each part, and the parts are the same for any number of
  devices. Works on whole arrays and on each device.
  """
  cut = lambda rows: _rows_to(rows, (len(rows) // parts, parts, *rows.shape[1:])).swapaxes(0, 1)
  return jax.tree.map(cut, tree)


def joined(tree):
  """The inverse of `in_parts`: [parts, B / parts, ...] -> [B, ...], for each leaf."""
  def join(parts):
    count, size, *rest = parts.shape
    return _rows_to(parts.swapaxes(0, 1), (count * size, *rest))
  return jax.tree.map(join, tree)


def _rows_to(rows: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """A reshape that leaves the first axis split as it is: left alone, JAX moves mesh axes to later ones."""
  return jax.lax.reshape(rows, shape, out_sharding=jax.P(*jax.typeof(rows).sharding.spec[:1]))


def check_parts(batch_size: int, groups: int, parts: int, key: str) -> None:
  """Raises ValueError unless the rows of each group of devices can be divided; `key`: what asks for it."""
  if batch_size % (groups * parts):
    raise ValueError(f"{key}: {batch_size} images over {groups} groups of devices (slice x data x fsdp) "
                     f"cannot be divided into {parts} equal parts; make data.batch_size a multiple of "
                     f"{groups * parts}")


def check_block(batch_size: int, groups: int, block: int) -> None:
  """Raises ValueError unless the batch is whole blocks of `block` rows (0 is one), each over all devices."""
  if block < 0:
    raise ValueError(f"loss.itc_block={block} must be 0, for all at once, or more")
  block_count(batch_size, block)
  if block % groups:
    raise ValueError(f"loss.itc_block={block}: each of {groups} groups of devices (slice x data x fsdp) has "
                     f"a part of a block; make it a multiple of {groups}")


def check_pool(batch_size: int, pool: int) -> None:
  """Raises ValueError unless pools of `pool` rows divide the batch; 0 is the whole batch."""
  if pool < 0 or pool == 1:  # which would train without negatives
    raise ValueError(f"loss.pool={pool}: negatives are other images of a pool; set it to 2 or more, or to 0 "
                     "for the whole batch")
  if pool and batch_size % pool:
    raise ValueError(f"loss.pool={pool} does not divide data.batch_size={batch_size}: set it to a divisor, "
                     "or to 0 for the whole batch")


def block_count(batch_size: int, block: int) -> int:
  """How many blocks of `block` rows a batch has, 0 being all rows; ValueError if they do not divide it."""
  if block and batch_size % block:
    raise ValueError(f"loss.itc_block={block} does not divide data.batch_size={batch_size}: set it to a "
                     "divisor, or to 0 for all at once")
  return batch_size // block if block else 1


def pool_axes(batch_size: int, pool: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
  """The axes of the batch whose devices share no pool, and those whose devices may.

  A pool is `pool` rows that follow each other (0 = the whole batch). The leading axes whose sizes' product
  divides the number of pools part the batch into whole pools.
  """
  pools, mesh = batch_size // pool if pool else 1, jax.sharding.get_abstract_mesh()
  apart = max(i for i in range(len(BATCH) + 1) if pools % math.prod(mesh.shape[a] for a in BATCH[:i]) == 0)
  return BATCH[:apart], BATCH[apart:]


def numbers(rows: jax.Array) -> jax.Array:
  """On each device: which rows of the batch its own are, int32[b]."""
  return jax.lax.axis_index(BATCH) * len(rows) + jnp.arange(len(rows))


def gathered(tree, axes: tuple[str, ...]):
  """On each device: the rows of all devices along `axes`, [b, ...] -> [b n, ...], for each leaf.

  Its gradient sums what all devices have and gives each the part of its own rows.
  """
  return jax.tree.map(lambda rows: jax.lax.all_gather(rows, axes, tiled=True), tree) if axes else tree


def by_owner(tree, axes: tuple[str, ...]):
  """On each device: what it found out about the rows of `gathered` is told to the devices that own them.

  [b n, ...] -> [n, b, ...]: what each of the n devices along `axes` has to say of this device's rows.
  """
  size = math.prod(jax.sharding.get_abstract_mesh().shape[axis] for axis in axes)

  def tell(found):
    found = found.reshape(size, len(found) // size, *found.shape[1:])
    return jax.lax.all_to_all(found, axes, 0, 0) if axes else found
  return jax.tree.map(tell, tree)


def fetch(rows: jax.Array, at: jax.Array, batch_size: int, pool: int) -> jax.Array:
  """Rows of others: [N, ...], int32[B, ...] -> [B, ..., ...]; N is B or a multiple, as of statements.

  Row b may ask for rows of its own pool only, so devices that share no pool exchange nothing. No gradient.
  """
  apart, within = pool_axes(batch_size, pool)

  @functools.partial(jax.shard_map, in_specs=(ACT_B, ACT_B), out_specs=ACT_B)
  def on_device(rows, at):
    # One row is one vector here: a TPU lays out longer shapes such that it copies all that was gathered.
    known = gathered(rows.reshape(len(rows), -1), within)
    first = jax.lax.axis_index(apart) * len(known) if apart else 0
    return known[at - first].reshape(*at.shape, *rows.shape[1:])
  return on_device(jax.lax.stop_gradient(rows), at)
