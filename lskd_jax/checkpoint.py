"""Checkpoints of a training run, and model directories: what is written and how it comes back.

A run's `workdir` holds

    checkpoints/<step>/   the training state without its frozen part (orbax)
    frozen/               the frozen part, written once
    damaged/<step>/       checkpoints that could not be restored, moved aside

and a model directory holds `config.json`, `tokenizer/` and `params/` (orbax).

Everything here is collective: on several hosts, all processes call it with the same arguments, on a
folder that all of them see.
"""
import hashlib
import json
import logging

from etils import epath
import jax
from jax.experimental import multihost_utils
import numpy as np
import orbax.checkpoint as ocp

from lskd_jax import trees
from lskd_jax.trees import CheckpointError, one_line

log = logging.getLogger(__name__)

# --- checkpoints of a run ------------------------------------------------------------------------


class Checkpointer:
  """Saves and restores the training state of one run under `workdir`.

  The state is a dict of pytrees, such as step, params, opt and frozen. Its `frozen` entry goes to
  `workdir/frozen` at the first save and is afterwards only compared.

      with Checkpointer(workdir, keep=3, save_every=1000) as checkpoints:
        found = checkpoints.restore_latest(jax.eval_shape(init, key))
        state, extra = found or (init(key), {})
        ...
        if checkpoints.due(step):
          checkpoints.save(step, state, {"next_batch": step})

  Args:
    workdir: the run's folder, made when missing.
    keep: how many of the newest checkpoints stay.
    save_every: what `due` answers by, in steps. `save` itself never skips a step.
  """

  def __init__(self, workdir, keep: int = 3, save_every: int = 1000):
    if keep < 1 or save_every < 1:
      raise CheckpointError(f"keep={keep} and save_every={save_every} must both be at least 1")
    workdir = epath.Path(workdir).absolute()
    self.directory = workdir / "checkpoints"
    self.frozen_directory = workdir / "frozen"
    self.damaged_directory = workdir / "damaged"
    self.save_every = save_every
    self._frozen = None  # manifest of frozen/, once this process has written or compared it
    # Left-overs of a save that was killed are removed in the background; a save waits for that.
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
    self._manager = ocp.CheckpointManager(
        self.directory, options=options, item_handlers=trees.tree_handler())

  def due(self, step: int) -> bool:
    """Whether a periodic save falls on `step`, the number of finished steps."""
    return step % self.save_every == 0

  def save(self, step: int, state: dict, extra: dict | None = None) -> None:
    """Starts saving `state` as checkpoint `step`; returns when its arrays may be overwritten.

    Writing goes on in the background, and `wait` returns when it is done. A step that is there
    already is left alone. `extra` is anything JSON can hold.

    Raises:
      CheckpointError: this save or an earlier one in the background failed (a full disk), or
        `frozen/` belongs to another run.
    """
    if step in self._manager.all_steps():
      return
    state = dict(state)
    frozen = self._store_frozen(state.pop("frozen", {}))
    named = trees.named_leaves(state)
    about = {"leaves": trees.make_manifest(named), "frozen": frozen, "extra": extra or {}}
    json.dumps(about)  # a TypeError here, before anything is written
    try:
      self._manager.save(
          step, args=trees.save_arguments(named), custom_metadata=about, force=True)
    except (OSError, ValueError) as error:
      raise self._cannot_save(error) from error

  def wait(self) -> None:
    """Returns when every started save is on disk. Raises CheckpointError if one failed."""
    try:
      self._manager.wait_until_finished()
    except (OSError, ValueError) as error:
      raise self._cannot_save(error) from error

  def durable_step(self) -> int | None:
    """The newest step that is completely on disk; a save under way does not count."""
    return max(self._steps_on_disk(), default=None)

  def restore_latest(self, target: dict, mesh=None) -> tuple[dict, dict] | None:
    """Restores the newest usable checkpoint; None if there is no checkpoint at all.

    Steps are tried from newest to oldest. A damaged one is reported and passed over, and moved to
    `damaged/` once an older one has been restored.

    Args:
      target: the state's structure with shapes, dtypes and shardings: `jax.eval_shape` of the
        function that makes it, or a state itself. It need not be on the mesh that saved.
      mesh: the target's partition specs are applied to this mesh; by default to that of
        `jax.set_mesh`, and if there is none, arrays go where the target's are.

    Returns:
      (state, extra) as given to `save`, bit for bit.

    Raises:
      CheckpointError: the checkpoint is another model's (the line names the leaves), every
        checkpoint is damaged, or `frozen/` is damaged or another run's.
    """
    mesh = mesh or trees.default_mesh()
    target = dict(target)
    frozen_target = target.pop("frozen", {})
    damaged = {}
    for step in sorted(self._steps_on_disk(), reverse=True):
      found, problem = self._try_restore(step, target, mesh)
      if not _all_processes(problem is None):
        damaged[step] = problem or "damaged on another host"
        log.warning("checkpoint %d is passed over: %s", step, damaged[step])
        continue
      self._move_aside(damaged)
      state, about = found
      if jax.tree.leaves(frozen_target):
        state["frozen"] = self._restore_frozen(frozen_target, about["frozen"], mesh)
      return state, about["extra"]
    if damaged:
      newest = next(iter(damaged.values()))
      raise CheckpointError(
          f"no checkpoint in {self.directory} can be restored, of steps "
          f"{trees.listed(map(str, damaged))} (newest: {newest}); remove that folder to start over")
    return None

  def _steps_on_disk(self) -> list[int]:
    # Not `all_steps()`: the manager counts a save from its start, also if it later fails.
    return ocp.utils.checkpoint_steps(self.directory)

  def _try_restore(self, step: int, target: dict, mesh):
    """((state, what `save` wrote about it), None), or (None, problem) for a damaged step."""
    where = f"checkpoint {step} in {self.directory}"
    try:
      about = self._manager.metadata(step).custom_metadata
      manifest = about["leaves"]
    except Exception as error:
      return None, f"its manifest cannot be read ({one_line(error)})"
    wanted = trees.named_leaves(target)
    trees.check_structure(manifest, wanted, where)  # another model is not damage: this one raises
    try:
      tree = self._manager.restore(step, args=trees.restore_arguments(wanted, mesh))
      named = trees.named_leaves(tree)
      trees.check_values(manifest, named, where)
    except jax.errors.JaxRuntimeError:
      raise  # a device that is out of memory says nothing about the files
    except Exception as error:  # for unreadable arrays orbax raises a plain Exception
      return None, one_line(error)
    return (trees.fill(target, named), about), None

  def _move_aside(self, damaged: dict[int, str]) -> None:
    """Moves damaged steps to `damaged/`, so that training can save these steps again."""
    if not damaged:
      return
    if jax.process_index() == 0:
      self.damaged_directory.mkdir(parents=True, exist_ok=True)
      for step in damaged:
        _remove(self.damaged_directory / str(step))
        (self.directory / str(step)).rename(self.damaged_directory / str(step))
    barrier("damaged checkpoints are moved")
    self._manager.reload()

  def _store_frozen(self, frozen) -> str | None:
    """Writes `frozen/` once, or makes sure that it is this run's. Returns its digest."""
    named = trees.named_leaves(frozen)
    if not named:
      return None
    if self._frozen is None:
      if self.frozen_directory.exists():
        manifest = trees.read_manifest(self.frozen_directory)
        if trees.make_manifest(named) != manifest:
          raise CheckpointError(
              f"{self.frozen_directory} is the frozen part of another run: use another workdir")
      else:
        manifest = trees.write_tree(self.frozen_directory, frozen)
      self._frozen = manifest
    return _digest(self._frozen)

  def _restore_frozen(self, target, digest: str | None, mesh):
    manifest = trees.read_manifest(self.frozen_directory)
    if _digest(manifest) != digest:
      raise CheckpointError(
          f"{self.frozen_directory} is not the frozen part that the checkpoints were trained with")
    frozen = trees.read_tree(self.frozen_directory, target, mesh)
    self._frozen = manifest
    return frozen

  def _cannot_save(self, error: BaseException) -> CheckpointError:
    return CheckpointError(f"cannot save to {self.directory}: {one_line(error)}")

  def close(self) -> None:
    """Waits for started saves and ends orbax's threads."""
    self.wait()
    self._manager.close()

  def __enter__(self):
    return self

  def __exit__(self, *unused):
    self.close()


def _digest(manifest: dict) -> str:
  return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


# --- model directories ---------------------------------------------------------------------------


def save_model(directory, config: dict, params, tokenizer_dir=None) -> None:
  """Writes a model directory; nothing appears under its name before it is complete.

  Args:
    directory: where. An existing model directory is replaced, another non-empty folder refused.
    config: what JSON can hold, enough to build the model again.
    params: nested dict or `nnx.State` of arrays or `streams.Streamed`: all parts of the model, the
      frozen ones too.
    tokenizer_dir: folder whose files become `tokenizer/`; None for a model without text.

  Raises:
    CheckpointError: the folder holds something else, there is no tokenizer, or the disk is full.
  """
  directory = epath.Path(directory).absolute()
  text = json.dumps(config, indent=2, sort_keys=True) + "\n"
  if tokenizer_dir is not None and not epath.Path(tokenizer_dir).is_dir():
    raise CheckpointError(f"{tokenizer_dir} is not a folder: expected a tokenizer's files")
  refuse_other_folder(directory)
  partial = directory.parent / f"{directory.name}.partial"
  try:
    if jax.process_index() == 0:
      _remove(partial)
      partial.mkdir(parents=True)
      (partial / "config.json").write_text(text)
      if tokenizer_dir is not None:
        _copy_folder(epath.Path(tokenizer_dir), partial / "tokenizer")
    barrier("model directory is prepared")
    trees.write_tree(partial / "params", params)
  except BaseException:  # Ctrl-C too: gigabytes that nobody can use are not left lying about
    if jax.process_index() == 0:
      _remove(partial)
    raise
  if jax.process_index() == 0:
    replaced = directory.parent / f"{directory.name}.replaced"
    _remove(replaced)
    if directory.exists():
      directory.rename(replaced)
    partial.rename(directory)
    _remove(replaced)
  barrier("model directory is complete")


def refuse_other_folder(directory) -> None:
  """Raises CheckpointError for a folder with files that is no model directory: it is not replaced."""
  directory = epath.Path(directory)
  ours = all((directory / name).exists() for name in ("config.json", "params"))
  if directory.exists() and any(directory.iterdir()) and not ours:
    raise CheckpointError(f"{directory} holds other files: choose a new or empty folder")


def load_model(directory, target=None, mesh=None) -> tuple[dict, object]:
  """Reads a model directory: (config, params).

  Args:
    directory: as written by `save_model`.
    target: the parameters' structure with shapes, dtypes and shardings, for instance
      `nnx.split(nnx.eval_shape(make_model), ...)[1]`: names, shapes and dtypes must fit exactly.
      None returns nested dicts of numpy arrays with string keys.
    mesh: as in `Checkpointer.restore_latest`.

  Raises:
    CheckpointError: not a model directory, damaged, or not this model's: the leaves are named.
  """
  directory = epath.Path(directory).absolute()
  config = load_config(directory)
  return config, trees.read_tree(directory / "params", target, mesh or trees.default_mesh())


def load_config(directory) -> dict:
  """The `config.json` of a model directory, without reading its parameters."""
  path = epath.Path(directory) / "config.json"
  try:
    return json.loads(path.read_text())
  except OSError:
    raise CheckpointError(f"{directory} is not a model directory: it has no config.json") from None
  except ValueError as error:
    raise CheckpointError(f"{path} is not JSON: {one_line(error)}") from None


def _all_processes(ok: bool) -> bool:
  """Whether `ok` holds on all processes, so that they take the same branch."""
  if jax.process_count() == 1:
    return ok
  return bool(np.all(multihost_utils.process_allgather(np.asarray(ok))))


def barrier(name: str) -> None:
  """Returns when all processes have come here; `name` is the same on all of them."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)


def _remove(folder: epath.Path) -> None:
  if folder.exists():
    folder.rmtree()


def _copy_folder(source: epath.Path, target: epath.Path) -> None:
  target.mkdir(parents=True)
  for item in source.iterdir():
    if item.is_dir():
      _copy_folder(item, target / item.name)
    else:
      item.copy(target / item.name)
