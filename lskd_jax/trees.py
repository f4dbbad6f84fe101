"""Trees of arrays on disk: names of leaves, their fingerprints, and one tree in one folder.

A leaf's name is its path, such as `params/qformer/blocks/up/kernel`, so what is on disk is a plain
nested dictionary and does not depend on the classes that made the tree.

Beside the arrays lies a manifest with each leaf's shape, dtype and fingerprint. Fingerprints are
checked after every restore, because orbax does not notice a flipped bit: it returns the wrong value
without an error.

Everything here is collective: on several hosts, all processes call it with the same arguments.
"""
import concurrent.futures
import functools
import hashlib
import json
import math

from etils import epath
import jax
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec, SingleDeviceSharding
import numpy as np
import orbax.checkpoint as ocp
import tensorstore

from lskd_jax import agreement, exit_codes, streams

NAMES_SHOWN = 20  # in one error line: a wrong config can mismatch thousands of leaves


class CheckpointError(ValueError):
  """A checkpoint or model directory that cannot be used: one line, with the path and what to do."""


class CannotSaveError(CheckpointError):
  """Something could not be written, for instance because the disk is full."""
  exit_code = exit_codes.CANNOT_SAVE


# --- names ---------------------------------------------------------------------------------------


def named_leaves(tree) -> dict[str, object]:
  """The leaves of any pytree by path, in the tree's own order: {"params/vit/kernel": leaf}.

  The `value` that an NNX Variable adds to the path is dropped.
  """
  named = {}
  for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
    if path and path[-1] == jax.tree_util.GetAttrKey("value"):
      path = path[:-1]
    named[jax.tree_util.keystr(path, simple=True, separator="/")] = leaf
  return named


def nest(named: dict[str, object]) -> dict:
  """{"a/b": 1} -> {"a": {"b": 1}}, the form that is stored."""
  root = {}
  for name, leaf in named.items():
    *parents, last = name.split("/")
    functools.reduce(lambda node, key: node.setdefault(key, {}), parents, root)[last] = leaf
  return root


def fill(target, named: dict[str, object]):
  """`target` with its leaves replaced by those of the same name."""
  return jax.tree.unflatten(jax.tree.structure(target), [named[n] for n in named_leaves(target)])


def listed(names) -> str:
  """Names for an error line: the first `NAMES_SHOWN`, and how many more there are."""
  names = list(names)
  rest = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
  return ", ".join(names[:NAMES_SHOWN]) + rest


def one_line(error: BaseException) -> str:
  """The first line of an error's first cause, shortened: orbax and tensorstore write long ones."""
  while error.__cause__ is not None:
    error = error.__cause__
  lines = str(error).strip().splitlines() or [type(error).__name__]
  return lines[0][:200]


# --- manifests -----------------------------------------------------------------------------------


def fingerprints(named: dict[str, object]) -> dict[str, int]:
  """A 32-bit number per array, which any single flipped bit changes, and no change of mesh does.

  The sum over all values of bits * weight(i, j, ...) modulo 2^32, the weight being the product of
  one odd number per axis, a function of the index along it. Integer addition does not round, so
  each host adds up its own shards. Flipping bit k changes the sum by 2^k times an odd number,
  which is never 0 modulo 2^32.

  Computed on the hosts: a save has to copy the arrays there anyway, and nothing has to be compiled
  in the seconds that are left before a preemption. A streamed leaf's is 0 until it is written.
  """
  with concurrent.futures.ThreadPoolExecutor() as pool:
    sums = np.array(list(pool.map(_sum_of_own_shards, named.values())), np.uint32)
  if jax.process_count() > 1:
    sums = multihost_utils.process_allgather(sums).sum(0, dtype=np.uint32)
  return dict(zip(named, sums.tolist()))


def _sum_of_own_shards(leaf) -> int:
  """This process's part of the sum; what every process has a copy of is process 0's."""
  if isinstance(leaf, streams.Streamed):
    return 0
  if jax.process_index() > 0 and getattr(leaf, "is_fully_addressable", True):
    return 0
  if not isinstance(leaf, jax.Array):
    return _weighted_sum(np.asarray(leaf), (0,) * np.ndim(leaf))
  return sum(
      _weighted_sum(np.asarray(jax.device_get(shard.data)),
                    [piece.start or 0 for piece in shard.index])
      for shard in leaf.addressable_shards if shard.replica_id == 0) % 2**32


def _weighted_sum(values: np.ndarray, starts) -> int:
  """The sum over one shard, whose first value has the index `starts` in the whole array."""
  unsigned = {1: np.uint8, 2: np.uint16, 4: np.uint32}[values.dtype.itemsize]
  sums = np.ascontiguousarray(values).view(unsigned).reshape(values.shape)
  sums = sums.astype(np.uint32, copy=False)
  for axis in reversed(range(values.ndim)):
    index = np.arange(starts[axis], starts[axis] + values.shape[axis], dtype=np.uint32)
    # 2654435761 is Knuth's multiplicative hash: it spreads neighbours, so that swapped values show.
    weights = index * np.uint32(2654435761 * (2 * axis + 1) % 2**32) | np.uint32(1)
    sums = np.einsum("...i,i->...", sums, weights)  # for integers several times faster than `@`
  return int(sums)


def make_manifest(named: dict[str, object]) -> dict[str, dict]:
  """{name: {"shape", "dtype", "fingerprint"}} of concrete arrays of at most 32 bits per value."""
  for name, leaf in named.items():
    if not hasattr(leaf, "dtype") or leaf.dtype.itemsize > 4:
      raise CheckpointError(f"leaf {name} is {getattr(leaf, 'dtype', type(leaf).__name__)}: "
                            "only arrays of at most 32 bits per value can be stored")
  numbers = fingerprints(named)
  return {name: {"shape": list(leaf.shape), "dtype": leaf.dtype.name, "fingerprint": numbers[name]}
          for name, leaf in named.items()}


def params_digest(tree) -> str:
  """A hash over all leaves of a tree, whatever the mesh and the number of processes. Collective."""
  return hashlib.sha256(json.dumps(make_manifest(named_leaves(tree)), sort_keys=True).encode()).hexdigest()


def check_structure(manifest: dict[str, dict], target: dict[str, object], where) -> None:
  """Raises one line that names every leaf whose presence, shape or dtype differs from `target`."""
  def kind(shape, dtype):
    return f"{dtype}[{','.join(map(str, shape))}]"
  text = differences(
      {name: kind(entry["shape"], entry["dtype"]) for name, entry in manifest.items()},
      {name: kind(leaf.shape, leaf.dtype.name) for name, leaf in target.items()},
      ("missing on disk", "on disk but not in the model", "different"),
      "{} on disk, {} in the model")
  if text:
    raise CheckpointError(f"{where} does not fit this model: {text}")


def differences(found: dict[str, str], wanted: dict[str, str], titles: tuple[str, str, str],
                pair: str) -> str:
  """Every name in which two sets of arrays differ, for an error line; "" where they agree.

  Args:
    found, wanted: {name: what is shown of it}.
    titles: of the names that are missing, that are too many, and that differ.
    pair: how the two sides of a name that differs are shown.
  """
  problems = (
      [name for name in wanted if name not in found],
      [name for name in found if name not in wanted],
      [f"{name} ({pair.format(found[name], shown)})" for name, shown in wanted.items()
       if found.get(name, shown) != shown],
  )
  return "; ".join(f"{title}: {listed(names)}" for title, names in zip(titles, problems) if names)


def check_values(manifest: dict[str, dict], named: dict[str, object], where) -> None:
  """Raises one line that names every leaf whose values are not those that were saved."""
  found = make_manifest(named)
  wrong = [name for name in manifest if found[name] != manifest[name]]
  if wrong:
    raise CheckpointError(f"{where} is damaged: values changed on disk in {listed(wrong)}")


# --- one tree in one folder ----------------------------------------------------------------------


def mesh_shape(named: dict[str, object]) -> dict[str, int]:
  """The mesh that the leaves are on; {} if they are on none."""
  meshes = (getattr(getattr(leaf, "sharding", None), "mesh", None) for leaf in named.values())
  return next((dict(mesh.shape) for mesh in meshes if mesh is not None), {})


def default_mesh():
  """The mesh of `jax.set_mesh`, or None."""
  mesh = jax.sharding.get_mesh()
  return None if mesh.empty else mesh


def place(leaf, mesh) -> jax.ShapeDtypeStruct:
  """What orbax needs to restore a leaf: shape, dtype and a sharding on real devices.

  Args:
    leaf: an array, or a shape from `jax.eval_shape`: its sharding is on an abstract mesh or None.
    mesh: the leaf's partition spec is applied to this mesh. None keeps the leaf's own sharding, or
      takes the first device if it has none.
  """
  sharding = getattr(leaf, "sharding", None)
  if mesh is not None:
    sharding = NamedSharding(mesh, getattr(sharding, "spec", PartitionSpec()))
  elif sharding is None or isinstance(getattr(sharding, "mesh", None), AbstractMesh):
    sharding = SingleDeviceSharding(jax.devices()[0])
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def tree_handler(*more: tuple, **options) -> ocp.PyTreeCheckpointHandler:
  """Orbax's reader and writer of one tree, set up so that a save compiles next to nothing.

  By default the replicas of an array share its writing, however small it is, and cutting it into
  pieces compiles a program for each shape: seconds that a save before a preemption may not have.

  Args:
    more: pairs of another type of leaf and its handler.
    options: of orbax's handler.
  """
  arrays = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=2**24)
  registry = ocp.type_handlers.create_type_handler_registry(
      *more, (jax.Array, arrays), (np.ndarray, ocp.type_handlers.NumpyHandler()))
  return ocp.PyTreeCheckpointHandler(type_handler_registry=registry, **options)


def save_arguments(named: dict[str, object], by_row: bool = False) -> ocp.args.PyTreeSave:
  """What orbax is told to save; `by_row` so that one row of a large leaf can be read by itself."""
  def how(leaf) -> ocp.SaveArgs:
    large = by_row and leaf.shape and math.prod(leaf.shape) * leaf.dtype.itemsize > streams.PIECE
    return ocp.SaveArgs(chunk_byte_size=streams.PIECE, shard_axes=(0,)) if large else ocp.SaveArgs()
  return ocp.args.PyTreeSave(nest(named), nest({name: how(leaf) for name, leaf in named.items()}))


def restore_arguments(target: dict[str, object], mesh, partial: bool = False) -> ocp.args.PyTreeRestore:
  """What orbax is told to restore: the named leaves, each to where `place` says."""
  places = nest({name: place(leaf, mesh) for name, leaf in target.items()})
  return ocp.args.PyTreeRestore(
      item=places, restore_args=ocp.checkpoint_utils.construct_restore_args(places),
      partial_restore=partial)


def write_tree(directory: epath.Path, tree) -> dict[str, dict]:
  """Stores a tree in a new folder that appears only when it is complete. Returns its manifest.

  Leaves may be `streams.Streamed`: of those no more than a few pieces are in memory.
  """
  named = named_leaves(tree)
  manifest = make_manifest(named)

  def seen(name: str, row: int, part: np.ndarray) -> None:
    total = manifest[name]["fingerprint"] + _weighted_sum(part, (row,) + (0,) * (part.ndim - 1))
    manifest[name]["fingerprint"] = total % 2**32
  stream = (streams.Streamed, streams.StreamHandler(seen))
  try:
    with ocp.Checkpointer(tree_handler(stream)) as writer:
      writer.save(directory, args=save_arguments(named, by_row=True),
                  custom_metadata={"leaves": manifest})  # is written after the arrays
  except CheckpointError:
    raise  # a streamed leaf could not be made
  except (OSError, ValueError) as error:
    raise CannotSaveError(f"cannot write {directory}: {one_line(error)}") from error
  return manifest


def read_about(directory: epath.Path) -> dict:
  """What was written about a folder of arrays beside them. Not collective; errors as orbax has them."""
  with ocp.Checkpointer(tree_handler()) as reader:
    about = reader.metadata(directory).custom_metadata
  if not about or "leaves" not in about:
    raise ValueError("it has no manifest")
  return about


def read_manifest(directory: epath.Path) -> dict[str, dict]:
  """The manifest of a folder that `write_tree` made."""
  def read():
    try:
      return read_about(directory)["leaves"], None
    except Exception as error:
      return None, one_line(error)
  manifest, problem = agreement.from_first(read)
  if problem:
    raise CheckpointError(f"{directory} is not a complete folder of arrays with a manifest: {problem}")
  return manifest


def read_tree(directory: epath.Path, target=None, mesh=None):
  """Restores what `write_tree` wrote, and checks every value.

  Beside the tree itself, memory holds what is being read: about the bytes of its largest leaf, as
  they are on disk and once more unpacked.

  Args:
    directory: the folder.
    target: the structure to return, with shapes, dtypes and shardings (see `place`); None returns
      nested dicts of numpy arrays.
    mesh: see `place`.
  """
  manifest = read_manifest(directory)
  if target is None:
    return nest(read_leaves(directory, manifest))
  wanted = named_leaves(target)
  check_structure(manifest, wanted, directory)
  return fill(target, read_leaves(directory, manifest, wanted, mesh))


def read_leaves(directory: epath.Path, manifest: dict[str, dict], wanted: dict[str, object] | None = None,
                mesh=None, partial: bool = False) -> dict[str, object]:
  """The named leaves of a folder, every value checked.

  Args:
    directory: the folder.
    manifest: the leaves to read, as they have to be.
    wanted: where they go, by the same names; None for numpy arrays.
    mesh: see `place`.
    partial: whether the folder has more leaves than these.

  Raises:
    CheckpointError: on all processes, if the files of any of them are missing or damaged.
  """
  if wanted is None:
    arguments = ocp.args.PyTreeRestore(
        restore_args=nest({name: ocp.RestoreArgs(restore_type=np.ndarray) for name in manifest}))
  else:
    arguments = restore_arguments(wanted, mesh, partial)
  # By default orbax reads all leaves at once, and where disks are fast holds the tree twice.
  largest = max(math.prod(entry["shape"]) for entry in manifest.values()) * 4
  named, problem = {}, None
  # Not by a Checkpointer: it waits for all processes, also for one that could not read.
  reader = tree_handler(restore_concurrent_gb=1 + largest // 10**9)
  try:
    named = named_leaves(reader.restore(directory, args=arguments))
  except jax.errors.JaxRuntimeError:
    raise  # a device that is out of memory says nothing about the files
  except Exception as error:  # for unreadable arrays orbax raises a plain Exception
    problem = one_line(error)
  finally:
    reader.close()
  if problem := agreement.first_problem(problem):
    raise CheckpointError(f"{directory} is damaged: {problem}")
  check_values(manifest, named, directory)
  return named


class LeafReader:
  """Reads what `write_tree` wrote piece by piece: in memory is one piece at a time.

  Args:
    directory: the folder.

  Raises:
    CheckpointError: not such a folder.
  """

  def __init__(self, directory: epath.Path):
    self.directory = epath.Path(directory).absolute()
    self.manifest = read_manifest(self.directory)
    self._stores: dict[str, tensorstore.TensorStore] = {}
    self._sums = dict.fromkeys(self.manifest, 0)
    self._read: dict[str, set] = {name: set() for name in self.manifest}

  def read(self, name: str, row: int | None = None) -> np.ndarray:
    """A leaf, or one row of its first axis. CheckpointError where the file is damaged."""
    try:
      if name not in self._stores:
        scheme = "" if "://" in str(self.directory) else "file://"
        place = {"driver": "ocdbt", "base": f"{scheme}{self.directory}/",
                 "path": name.replace("/", ".") + "/"}
        self._stores[name] = tensorstore.open({"driver": "zarr", "kvstore": place}).result()
      store = self._stores[name]
      values = (store if row is None else store[row:row + 1]).read().result()
    except ValueError as error:
      raise CheckpointError(f"{self.directory} is damaged: {one_line(error)}") from error
    if row not in self._read[name]:
      self._read[name].add(row)
      self._sums[name] += _weighted_sum(values, ((row or 0),) + (0,) * (values.ndim - 1))
    return values if row is None else values[0]

  def check(self) -> None:
    """Raises CheckpointError if a leaf that was read as a whole, or row by row, is damaged."""
    wrong = []
    for name, about in self.manifest.items():
      rows = self._read[name]
      complete = rows == {None} or about["shape"] and rows == set(range(about["shape"][0]))
      if complete and self._sums[name] % 2**32 != about["fingerprint"]:
        wrong.append(name)
    if wrong:
      raise CheckpointError(f"{self.directory} is damaged: values changed on disk in {listed(wrong)}")
