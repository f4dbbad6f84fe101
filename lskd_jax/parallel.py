"""Devices, processes and sharding: the mesh, and the named partition specs every module uses.

The mesh is explicit (`jax.sharding.AxisType.Explicit`): an array's sharding is part of its type, a
wrong spec is an error at trace time, and every collective is visible in the source as a `reshard`.

Axes, from the slowest network to the fastest
  slice   pods joined by the data centre's network: batch rows; parameters are whole on each slice
  data    batch rows; parameters are whole on each of its groups
  fsdp    batch rows and parameters
  tensor  heads and hidden widths

A spec's name spells the tensor's axes: b batch, s statement, t token, d model width, h heads,
k width of one head, f hidden width. `ACT_` is an activation, `W_` a weight.
"""
import math

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
import numpy as np

AXES = ("slice", "data", "fsdp", "tensor")
BATCH = ("slice", "data", "fsdp")  # what batch rows are split over

REPLICATED = P()
ACT_B = P(BATCH)  # any activation whose first axis is the batch and whose rest is whole
ACT_BTHK = P(BATCH, None, "tensor", None)
ACT_BSTHK = P(BATCH, None, None, "tensor", None)
ACT_BST3HK = P(BATCH, None, None, None, "tensor", None)
W_DF = P("fsdp", "tensor")
W_FD = P("tensor", "fsdp")
W_DHK = P("fsdp", "tensor", None)
W_D3HK = P("fsdp", None, "tensor", None)
W_HKD = P("tensor", None, "fsdp")
W_VD = P(None, "fsdp")  # an embedding table: rows whole, width split


def make_mesh(slice: int = 1, data: int = 1, fsdp: int = 1, tensor: int = 1, devices=None) -> Mesh:
  """A mesh of slice x data x fsdp x tensor devices, each axis at least 1.

  Raises ValueError if there are fewer devices than the shape needs.
  """
  devices = list(jax.devices() if devices is None else devices)
  shape = (slice, data, fsdp, tensor)
  needed = math.prod(shape)
  if len(devices) < needed:
    raise ValueError(f"mesh {'x'.join(map(str, shape))} needs {needed} devices, there are {len(devices)}: "
                     "set train.mesh to a smaller shape")
  grid = np.asarray(devices[:needed]).reshape(shape)
  return Mesh(grid, AXES, axis_types=(AxisType.Explicit,) * len(AXES))


def on_tpu() -> bool:
  """Whether the mesh in use is one of TPUs, also where a step is only compiled for them."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return device is not None and device.platform == "tpu"


def compiler_options() -> dict:
  """XLA's options for the step on the mesh in use.

  Fusing one matrix product into another makes libtpu 0.0.42 overflow its stack on a student with dropout and
  regions. It saves little: what such a fusion keeps on the chip is small.
  """
  return {"xla_tpu_dot_dot_fusion": False} if on_tpu() else {}


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
  """Numpy rows of this process -> global arrays, split along their first axis."""
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
