"""Devices, processes and sharding: start-up, the mesh, and the named partition specs every module uses.

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
from collections import Counter
import contextlib
import functools
import math
import os
import socket
import threading
import zlib

import jax
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
import numpy as np

from lskd_jax import errors, exit_codes

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

# --- the mesh ------------------------------------------------------------------------------------


def make_mesh(slice: int = 1, data: int = 1, fsdp: int = 1, tensor: int = 1, devices=None) -> Mesh:
  """A mesh of slice x data x fsdp x tensor devices.

  Args:
    slice: -1 = as many as the devices have slices; 1 for devices that know of none.
    data, fsdp, tensor: one of them may be -1 = whatever devices remain.
    devices: of all processes; by default `jax.devices()`, or the first of them if fewer are needed.

  Raises:
    ValueError: the shape does not fit the devices, or leaves some of several processes unused. The
      line names the keys of `train.mesh`.
  """
  devices = list(jax.devices() if devices is None else devices)
  shape = _shape({"slice": slice, "data": data, "fsdp": fsdp, "tensor": tensor}, devices)
  return Mesh(_arranged(shape, devices), AXES, axis_types=(AxisType.Explicit,) * len(AXES))


def _shape(wanted: dict[str, int], devices: list) -> tuple[int, ...]:
  """The mesh's shape, its -1 derived from the devices."""
  for axis, size in wanted.items():
    if size < 1 and size != -1:
      raise ValueError(f"train.mesh.{axis}={size}: must be 1 or more, or -1 to be derived")
  there, slices = len(devices), _slices(devices)
  sizes = wanted | ({"slice": slices} if wanted["slice"] == -1 else {})
  derived = [axis for axis, size in sizes.items() if size == -1]
  if len(derived) > 1:
    raise ValueError(f"train.mesh: {' and '.join(derived)} cannot both be -1; give one of them a number")
  needed = math.prod(size for size in sizes.values() if size != -1)
  asked = " x ".join(f"train.mesh.{axis}={size}" for axis, size in sizes.items() if size > 1) or "train.mesh"
  if needed > there:
    raise ValueError(f"{asked} needs {needed} devices, there are {there}: make it smaller, or -1")
  if derived:
    if there % needed:
      raise ValueError(f"{asked} does not divide the {there} devices; choose a divisor of {there}")
    sizes[derived[0]] = there // needed
  elif needed < there and len({device.process_index for device in devices}) > 1:
    raise ValueError(f"{asked} uses {needed} of the {there} devices of all processes, and each has to take "
                     "part: set train.mesh.fsdp=-1")
  if devices[0].platform == "tpu" and slices > 1 and sizes["slice"] != slices:
    raise ValueError(f"train.mesh.slice={sizes['slice']}: the devices are of {slices} slices; set it to -1")
  return tuple(sizes[axis] for axis in AXES)


def _slices(devices: list) -> int:
  return len({getattr(device, "slice_index", 0) for device in devices})


def _arranged(shape: tuple[int, ...], devices: list) -> np.ndarray:
  """The devices on the mesh: on TPUs, neighbours on the inner axes are neighbours in the network."""
  needed = math.prod(shape)
  if devices[0].platform != "tpu" or needed < len(devices):
    return np.asarray(devices[:needed]).reshape(shape)
  # Without splitting, an axis of the mesh would have to be a whole number of the pod's axes.
  if _slices(devices) > 1:
    return mesh_utils.create_hybrid_device_mesh((1, *shape[1:]), (shape[0], 1, 1, 1), devices,
                                                allow_split_physical_axes=True)
  return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)


def on_tpu() -> bool:
  """Whether the mesh in use is one of TPUs, also where a step is only compiled for them."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return device is not None and device.platform == "tpu"


def compiler_options() -> dict:
  """XLA's options for a step on the mesh in use.

  Fusing one matrix product into another makes libtpu 0.0.42 overflow its stack on a student with dropout and
  regions. It saves little: what such a fusion keeps on the chip is small.
  """
  return {"xla_tpu_dot_dot_fusion": False} if on_tpu() else {}


def sharding_of(leaf, mesh: Mesh) -> NamedSharding:
  """The sharding an abstract array carries; scalars carry none and are replicated."""
  spec = leaf.sharding.spec if leaf.sharding is not None else REPLICATED
  return NamedSharding(mesh, spec)


def abstract_like(tree, mesh: Mesh):
  """Shapes, dtypes and shardings of `tree` on `mesh`: what a checkpoint reader restores into."""
  return jax.tree.map(
      lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding_of(a, mesh)), tree)

# --- batches -------------------------------------------------------------------------------------


def own_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
  """int64[n]: the rows of a batch that the devices of this process hold, in rising order.

  Raises:
    ValueError: the batch cannot be split evenly over the mesh.
  """
  return rows_by_process(mesh, batch_size)[jax.process_index()]


@functools.lru_cache(maxsize=64)
def rows_by_process(mesh: Mesh, batch_size: int) -> dict[int, np.ndarray]:
  """The `own_rows` of every process: they follow from the mesh alone.

  Processes whose devices differ in `tensor` only have the same rows.
  """
  groups = math.prod(mesh.shape[axis] for axis in BATCH)
  if batch_size % groups:
    raise ValueError(f"data.batch_size={batch_size}: the mesh splits batches over {groups} groups of devices "
                     f"(slice x data x fsdp); use a multiple of {groups}")
  masks = {}
  places = NamedSharding(mesh, ACT_B).devices_indices_map((batch_size,))
  for device, index in places.items():
    masks.setdefault(device.process_index, np.zeros(batch_size, bool))[index] = True
  return {process: np.flatnonzero(mask) for process, mask in sorted(masks.items())}


def put_batch(batch: dict, mesh: Mesh) -> dict:
  """Numpy rows of this process, those of `own_rows` -> global arrays, split along their first axis."""
  groups = math.prod(mesh.shape[axis] for axis in BATCH)
  own = len(own_rows(mesh, groups))
  sharding = NamedSharding(mesh, ACT_B)

  def put(name, rows):
    count, rest = divmod(len(rows), own)
    if rest:
      raise ValueError(f"{name}: {len(rows)} rows cannot be split over {own} groups of devices")
    starts = {start * count: i * count for i, start in enumerate(own_rows(mesh, groups))}

    def part(index):
      start = starts[index[0].start or 0]
      return rows[start:start + count]
    return jax.make_array_from_callback((groups * count, *rows.shape[1:]), sharding, part)
  return {name: put(name, rows) for name, rows in batch.items()}


def put_whole(values: np.ndarray, sharding: NamedSharding) -> jax.Array:
  """An array that every process has in full -> a global array.

  `jax.device_put` would first send all of it to every process, to compare.
  """
  return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])

# --- start-up ------------------------------------------------------------------------------------

# What tells a process that it is one of several: lists of addresses, bounds of a grid, counts.
_LISTS = ("TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES")
_BOUNDS = ("TPU_PROCESS_BOUNDS", "TPU_HOST_BOUNDS")
_COUNTS = ("MEGASCALE_NUM_SLICES", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")


class PortTakenError(ValueError):
  """Another program has the coordinator's port; a supervisor starts the run again with another one."""
  exit_code = exit_codes.PEER_LOST

  def __init__(self, where: str):
    super().__init__(f"process 0 cannot listen at {where}: its port is in use, or not of this host; choose "
                     "another one")


def initialize(coordinator: str | None = None, processes: int | None = None, process_id: int | None = None, *,
               multi_host: bool = False, start_seconds: int = 600, heartbeat_seconds: int = 100) -> None:
  """Joins the processes of one run; call it before anything else touches a device.

  By default there is one process, and nothing to join. JAX's own preemption service stays off: two
  that catch SIGTERM would replace each other's handlers.

  Args:
    coordinator: `host:port` of process 0, any free port of it; with `processes` and `process_id`.
    processes: number of processes. With `multi_host`, how many are expected, None = any number.
    process_id: this process's number, 0-based.
    multi_host: JAX finds all of this by itself, on Cloud TPU VMs, GKE (JobSet too), Kubernetes, Slurm and
      Open MPI.
    start_seconds: if not all processes have come after this long, this one ends with exit code 151.
    heartbeat_seconds: a process that is not heard of for so long is taken for dead.

  Raises:
    PortTakenError: on process 0, the port is in use.
    ValueError: the arguments do not fit together, no cluster is found, the processes are not as many as
      announced or have unequal numbers of devices, or this process is one of several workers and was
      not told so.
  """
  jax.config.update("jax_enable_preemption_service", False)
  if multi_host and (coordinator or process_id is not None):
    raise ValueError("--multi-host finds the processes by itself: leave out --coordinator and --process-id")
  if not multi_host and (processes or 1) == 1:
    _refuse_lone_worker(processes)
    return
  if not multi_host:
    _check_addresses(coordinator, processes, process_id)
    if process_id == 0:
      _check_port(coordinator)
  where = coordinator or "the coordinator"
  with _all_come(start_seconds, f"{processes or 'the'} processes", where):
    try:
      jax.distributed.initialize(
          coordinator, None if multi_host else processes, process_id,
          # Addresses that were given are not mended with what a cluster's variables say.
          cluster_detection_method=None if multi_host else "deactivate",
          initialization_timeout=start_seconds + 60, heartbeat_timeout_seconds=heartbeat_seconds)
    except Exception as error:  # of the metadata server, Kubernetes, sockets, or JAX's own
      text = " ".join(str(error).split())[:300]
      if multi_host and "should be defined" in text:
        raise ValueError("--multi-host: JAX finds no TPU VM, Slurm step, Kubernetes job or mpirun here; give "
                         "--coordinator, --processes and --process-id") from error
      if "Failed to start RPC server" in text:
        raise PortTakenError(where) from error
      raise ValueError(f"the processes of this run could not be joined at {where}: {text}") from error
    found = Counter(device.process_index for device in jax.devices())
  if processes not in (None, len(found)):
    raise ValueError(f"--processes {processes}: {len(found)} have joined; start as many as announced")
  if len(set(found.values())) > 1:
    few = min(found, key=found.get)
    raise ValueError(f"process {few} has {found[few]} devices, others {max(found.values())}; give all "
                     "of them as many")


def _check_addresses(coordinator: str | None, processes: int, process_id: int | None) -> None:
  if coordinator is None or process_id is None:
    raise ValueError(f"--processes {processes} needs --coordinator HOST:PORT and --process-id; on a cluster, "
                     "--multi-host finds them")
  if not 0 <= process_id < processes:
    raise ValueError(f"--process-id {process_id}: the {processes} processes are 0 to {processes - 1}")
  host, _, port = coordinator.rpartition(":")
  if not host or not port.isdigit():
    raise ValueError(f"--coordinator {coordinator}: is not HOST:PORT")


def _check_port(coordinator: str) -> None:
  """JAX may crash where it cannot listen."""
  both = socket.has_dualstack_ipv6()
  try:
    socket.create_server(("", int(coordinator.rpartition(":")[2])), dualstack_ipv6=both,
                         family=socket.AF_INET6 if both else socket.AF_INET).close()
  except OSError as error:
    raise PortTakenError(coordinator) from error


def _refuse_lone_worker(processes: int | None) -> None:
  """Each worker of a pod that trains alone would write over the others' files."""
  sign = None if processes == 1 else one_of_several(os.environ)
  if sign is None and jax.process_count() > 1 and not jax.distributed.is_initialized():
    sign = f"its devices are of {jax.process_count()} hosts"
  if sign:
    raise ValueError(f"this process is one of several ({sign}) and would train alone: add --multi-host, or "
                     "--processes 1 if that is meant")


def one_of_several(environment) -> str | None:
  """What in the environment says that this process is one of several; None if nothing does."""
  for name in _LISTS:
    if "," in environment.get(name, ""):
      return f"{name} has {len(environment[name].split(','))} entries"
  for name in (*_BOUNDS, *_COUNTS):
    numbers = environment.get(name, "").split(",")
    if all(number.strip().isdigit() for number in numbers) and math.prod(map(int, numbers)) > 1:
      return f"{name}={environment[name]}"
  return None


@contextlib.contextmanager
def _all_come(seconds: int, who: str, where: str):
  """Ends the process if the block takes too long: JAX's own timeout aborts it with a stack trace."""
  def end():
    errors.say(f"lskd: error: after {seconds} s not all of {who} have come to {where}: start the missing "
               "ones, or look whether that address and their numbers are right")
    os._exit(exit_codes.PEER_LOST)
  timer = threading.Timer(seconds, end)
  timer.daemon = True
  timer.start()
  try:
    yield
  finally:
    timer.cancel()


def overview(mesh: Mesh, batch_size: int) -> dict[str, str]:
  """What a run starts on, for a table: processes, devices, mesh, rows. All processes call it."""
  host = np.uint32(zlib.crc32(socket.gethostname().encode()))
  hosts = len(np.unique(multihost_utils.process_allgather(host))) if jax.process_count() > 1 else 1
  device = mesh.devices.flat[0]
  rows = sorted({len(rows) for rows in rows_by_process(mesh, batch_size).values()})
  return {
      "processes": f"{jax.process_count()} on {hosts} host{'s' if hosts > 1 else ''}",
      "devices": f"{jax.local_device_count()} per process, {device.device_kind}; {mesh.size} in the mesh",
      "mesh": ", ".join(f"{axis} {mesh.shape[axis]}" for axis in AXES),
      "rows per process": f"{' or '.join(map(str, rows))} of {batch_size}"}
