"""Devices, processes and sharding: the mesh, and the named partition specs every module uses.

The mesh is explicit (`jax.sharding.AxisType.Explicit`): an array's sharding is part of its type, a
wrong spec is an error at trace time, and every collective is visible in the source as a `reshard`.

Axes
  fsdp    batch rows and parameters are split over it
  tensor  heads and hidden widths are split over it

A spec's name spells the tensor's axes: b batch, s statement, t token, d model width, h heads,
k width of one head, f hidden width. `ACT_` is an activation, `W_` a weight.
"""
import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
import numpy as np

AXES = ("fsdp", "tensor")

REPLICATED = P()
ACT_B = P("fsdp")  # any activation whose first axis is the batch and whose rest is whole
ACT_BTHK = P("fsdp", None, "tensor", None)
ACT_BSTHK = P("fsdp", None, None, "tensor", None)
ACT_BST3HK = P("fsdp", None, None, None, "tensor", None)
W_DF = P("fsdp", "tensor")
W_FD = P("tensor", "fsdp")
W_DHK = P("fsdp", "tensor", None)
W_D3HK = P("fsdp", None, "tensor", None)
W_HKD = P("tensor", None, "fsdp")
W_VD = P(None, "fsdp")  # an embedding table: rows whole, width split


def make_mesh(shape: tuple[int, int] = (1, 1), devices=None) -> Mesh:
  """A mesh of `fsdp` x `tensor` devices.

  Raises ValueError if there are fewer devices than the shape needs.
  """
  devices = list(jax.devices() if devices is None else devices)
  needed = int(np.prod(shape))
  if len(devices) < needed:
    raise ValueError(f"mesh {shape[0]}x{shape[1]} needs {needed} devices, there are {len(devices)}: "
                     "set train.mesh to a smaller shape")
  grid = np.asarray(devices[:needed]).reshape(shape)
  return Mesh(grid, AXES, axis_types=(AxisType.Explicit,) * len(AXES))


def initialize(coordinator: str | None, processes: int, process_id: int) -> None:
  """Joins the processes of one run; call it before anything else touches a device.

  Args:
    coordinator: `host:port` of process 0; None on TPU pods, where JAX finds it by itself.
    processes: number of processes of the run; 1 does nothing.
    process_id: this process's number, 0-based.
  """
  if processes == 1:
    return
  jax.distributed.initialize(coordinator, processes, process_id)
  if jax.process_count() != processes:
    raise RuntimeError(f"{jax.process_count()} processes joined, {processes} were announced")


def put_batch(batch: dict, mesh: Mesh) -> dict:
  """Numpy rows of this process -> global arrays, split over `fsdp` along their first axis."""
  sharding = NamedSharding(mesh, ACT_B)
  return {name: jax.make_array_from_process_local_data(sharding, rows)
          for name, rows in batch.items()}


def sharding_of(leaf, mesh: Mesh) -> NamedSharding:
  """The sharding an abstract array carries; scalars carry none and are replicated."""
  spec = leaf.sharding.spec if leaf.sharding is not None else REPLICATED
  return NamedSharding(mesh, spec)


def abstract_like(tree, mesh: Mesh):
  """Shapes, dtypes and shardings of `tree` on `mesh`: what a checkpoint reader restores into."""
  return jax.tree.map(
      lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding_of(a, mesh)), tree)
