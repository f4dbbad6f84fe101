"""Checkpoints of a training run, and model directories: what is written and how it comes back.

A run's `workdir` holds

    checkpoints/<step>/     the training state without its frozen part (orbax); COMMITTED.json is
                            written last, and only a step that has it counts
    frozen/, frozen.json    the frozen part, once: see `frozen.py`
    damaged/<step>/         checkpoints that could not be used, moved aside

and a model directory holds `config.json`, `tokenizer/` and `params/` (orbax).

Everything here is collective: all processes call it with the same arguments, on a folder that all see.
"""
import json
import logging
import threading
import time

from etils import epath
import jax
import orbax.checkpoint as ocp

import lskd_jax
from lskd_jax import agreement, committed, frozen as frozen_part, trees
from lskd_jax.agreement import barrier
from lskd_jax.trees import CannotSaveError, CheckpointError, one_line

log = logging.getLogger(__name__)

# --- checkpoints of a run ------------------------------------------------------------------------


class Checkpointer:
  """Saves and restores the training state of one run under `workdir`.

  The state is a dict of pytrees, such as step, params, opt and frozen. Its `frozen` entry is stored
  at the first save and is afterwards only compared.

      with Checkpointer(workdir, keep=3, save_every=1000) as checkpoints:
        found = checkpoints.restore_latest(jax.eval_shape(init, key))
        state, extra = found or (init(key), {})
        ...
        checkpoints.poll()
        if checkpoints.due(step):
          checkpoints.save(step, state, {"extended": False})

  Args:
    workdir: the run's folder, made when missing.
    keep: how many of the newest checkpoints stay.
    save_every: what `due` answers by, in steps. `save` itself never skips a step.
    keep_best: how many of the best stay besides, by the metric of that name given to `save`.
    best_metric: its name.
    best_mode: "min" or "max", whichever is better.
    frozen_source: the model directory that frozen leaves were read from: what is unchanged there is
      not copied but referred to.

  Attributes:
    report: what `restore_latest` chose, and what it set aside and why; one line, or "".
    set_aside: the steps it set aside.
  """

  def __init__(self, workdir, keep: int = 3, save_every: int = 1000, *, keep_best: int = 0,
               best_metric: str = "", best_mode: str = "max", frozen_source=None):
    check_settings(keep, save_every, keep_best, best_metric, best_mode)
    self.workdir = epath.Path(workdir).absolute()
    self.directory = self.workdir / "checkpoints"
    self.save_every = save_every
    self.report, self.set_aside = "", ()
    self._kept = keep, keep_best, best_metric, best_mode
    self._frozen_source = frozen_source
    self._frozen = None  # digest of the frozen part, once this process has stored or restored it
    if jax.process_index() == 0:  # the only one that makes folders here, also in a save
      self.directory.mkdir(parents=True, exist_ok=True)
      committed.clean(self.directory)
    self._steps = set(agreement.from_first(lambda: committed.steps(self.directory)))
    self._writer = ocp.AsyncCheckpointer(trees.tree_handler())
    self._saving = None  # (step, thread, word) of a save under way
    self._seconds = None

  def due(self, step: int) -> bool:
    """Whether a periodic save falls on `step`, the number of finished steps."""
    return step % self.save_every == 0

  def save(self, step: int, state: dict, extra: dict | None = None, *,
           metrics: dict[str, float] | None = None) -> None:
    """Starts saving `state` as checkpoint `step`; returns when its arrays may be overwritten.

    Writing goes on in the background, and `wait` returns when it is done. A step that is there
    already is left alone.

    Args:
      step: the number of finished steps.
      state: as above.
      extra: anything JSON can hold; comes back with the state.
      metrics: what `best_metric` is looked up in.

    Raises:
      CannotSaveError: this save or an earlier one in the background failed (a full disk).
      CheckpointError: the stored frozen part belongs to another run.
    """
    if step in self._steps:
      return
    self.wait()
    started = time.monotonic()
    state = dict(state)
    frozen = state.pop("frozen", {})
    if self._frozen is None and jax.tree.leaves(frozen):
      self._frozen = committed.digest(frozen_part.store(self.workdir, frozen, self._frozen_source))
    named = trees.named_leaves(state)
    about = {"leaves": trees.make_manifest(named), "frozen": self._frozen, "extra": extra or {}}
    marker = {
        "step": step, "manifest": committed.digest(about), "version": lskd_jax.__version__,
        "mesh": trees.mesh_shape(named), "processes": jax.process_count(), "extra": about["extra"],
        "metrics": {name: float(value) for name, value in (metrics or {}).items()}}
    word = agreement.Word()
    try:
      self._writer.save(self.directory / str(step), args=trees.save_arguments(named),
                        custom_metadata=about, force=True)
    except (OSError, ValueError) as error:
      word.say({"error": one_line(error)})
      raise self._cannot_save(step, one_line(error)) from error
    thread = threading.Thread(target=self._finish, args=(step, marker, word, started), daemon=True,
                              name=f"commit {step}")
    self._saving = step, thread, word
    self._steps.add(step)
    thread.start()

  def _finish(self, step: int, marker: dict, word: agreement.Word, started: float) -> None:
    """Commits a step as soon as orbax has written it; in the background, on every process."""
    try:
      self._writer.wait_until_finished()  # all processes have written, and the folder has its name
      if jax.process_index() == 0:
        committed.commit(self.directory / str(step), marker)
        word.say({"seconds": time.monotonic() - started})
    except BaseException as error:  # for the main thread, which asks at the next step
      word.say({"error": one_line(error)})
      return
    if jax.process_index() == 0:
      try:
        for old in committed.superfluous(self.directory, *self._kept):
          committed.delete(self.directory / str(old))
      except OSError as error:
        log.warning("an old checkpoint cannot be deleted: %s", error)

  def poll(self) -> None:
    """To be called each step: raises CannotSaveError if the save under way has failed, on any process.

    Never waits. It asks the coordination service, if there are several processes and a save is under
    way: a fraction of a millisecond.
    """
    if self._saving is None:
      return
    step, _, word = self._saving
    said = word.heard()
    if not said:
      return
    self._saving = None
    errors = [value["error"] for value in said if "error" in value]
    if errors:
      self._steps.discard(step)
      raise self._cannot_save(step, errors[0])
    self._seconds = said[0]["seconds"]

  def wait(self) -> None:
    """Returns when the save under way is committed. Raises CannotSaveError if it failed."""
    if self._saving is None:
      return
    thread = self._saving[1]
    while self._saving is not None:
      thread.join(timeout=0.05)  # not for ever: it may be waiting for a process that failed
      self.poll()
    thread.join()

  def seconds_of_last_save(self) -> float | None:
    """How long the last complete save took, from `save` to its commit; None before there is one."""
    return self._seconds

  def add_metrics(self, step: int, metrics: dict[str, float]) -> None:
    """Adds metrics to a committed step: those of an evaluation that was made after its save."""
    self.wait()
    if jax.process_index() == 0:
      committed.add_metrics(self.directory / str(step), metrics)

  def is_empty(self) -> bool:
    """Whether there is no checkpoint at all, not even a damaged one."""
    return agreement.from_first(lambda: not committed.folders(self.directory))

  def durable_step(self) -> int | None:
    """The newest committed step; a save under way does not count."""
    return max(committed.steps(self.directory), default=None)

  def restore_latest(self, target: dict, mesh=None) -> tuple[dict, dict] | None:
    """Restores the newest usable checkpoint; None if there is no checkpoint at all.

    Steps are tried from newest to oldest, by all processes alike. One that is damaged on any of them,
    or was never committed, is reported and passed over, and moved to `damaged/` once an older one has
    been restored. Only where no step at all is committed, one whose every value is right is taken and
    committed: a run may have been killed just before it could say so.

    Args:
      target: the state's structure with shapes, dtypes and shardings: `jax.eval_shape` of the
        function that makes it, or a state itself. It need not be on the mesh that saved.
      mesh: the target's partition specs are applied to this mesh; by default to that of
        `jax.set_mesh`, and if there is none, arrays go where the target's are.

    Returns:
      (state, extra) as given to `save`, bit for bit.

    Raises:
      CheckpointError: the checkpoint is another model's (the line names the leaves), every
        checkpoint is damaged, or the frozen part is damaged or another run's.
      FirstSaveLostError: the only checkpoint was never committed and is damaged; it is in `damaged/` now.
    """
    self.wait()
    mesh = mesh or trees.default_mesh()
    target = dict(target)
    frozen_target = target.pop("frozen", {})
    wanted = trees.named_leaves(target)
    found, marked = agreement.from_first(
        lambda: (committed.folders(self.directory), committed.steps(self.directory)))
    aside = {}
    for step in reversed(found):
      folder = self.directory / str(step)
      about, problem = None, committed.UNMARKED
      if step in marked or not marked:
        about, problem = agreement.from_first(
            lambda: committed.examine(folder, bool(marked)))  # noqa: B023 - called at once
      if not problem:
        trees.check_structure(about["leaves"], wanted, folder)  # another model is not damage
        try:
          named = trees.read_leaves(folder, about["leaves"], wanted, mesh)
        except CheckpointError as error:
          problem = str(error)
      if problem:
        aside[step] = problem
        if jax.process_index() == 0:
          log.warning("checkpoint %d is set aside: %s", step, problem)
        continue
      state = trees.fill(target, named)
      if jax.tree.leaves(frozen_target):
        state["frozen"] = frozen_part.restore(self.workdir, frozen_target, about["frozen"], mesh)
        self._frozen = about["frozen"]
      self._settle(step, aside, None if step in marked else about)
      return state, about["extra"]
    if aside and not marked and len(aside) == 1:  # a folder's rename on a mounted bucket is not one step
      self._settle(None, aside)
      raise committed.FirstSaveLostError(f"{self.report}; start again to begin anew")
    if aside:
      newest = next(iter(aside.values()))
      raise CheckpointError(
          f"no checkpoint in {self.directory} can be restored, of steps "
          f"{trees.listed(map(str, aside))} (newest: {newest}); remove that folder to start over")
    return None

  def _settle(self, step: int | None, aside: dict[int, str], about: dict | None = None) -> None:
    """Makes the folder say what was found: damaged steps out of the way, `step` committed with `about`."""
    def settle() -> str | None:
      try:
        for bad in aside:
          committed.move_aside(self.directory / str(bad), self.workdir / "damaged")
        if about:
          committed.commit(self.directory / str(step), {
              "step": step, "manifest": committed.digest(about), "extra": about["extra"], "metrics": {}})
      except OSError as error:
        return str(error)
    if problem := agreement.from_first(settle):
      raise CheckpointError(f"damaged checkpoints cannot be moved to {self.workdir / 'damaged'}: {problem}")
    self._steps = (self._steps - set(aside)) | ({step} - {None})
    self.set_aside = tuple(aside)
    self.report = "; ".join([f"resuming from checkpoint {step}" if step else "no checkpoint is complete", *(
        f"set aside checkpoint {bad}: {problem}" for bad, problem in aside.items())])
    if jax.process_index() == 0:
      log.info(self.report)

  def _cannot_save(self, step: int, problem: str) -> CannotSaveError:
    return CannotSaveError(
        f"cannot save checkpoint {step} to {self.directory}: {problem}; the newest complete one is "
        f"{self.durable_step()}; with space on that disk, the same command goes on from there")

  def close(self) -> None:
    """Waits for the save under way and ends orbax's threads."""
    self.wait()
    self._writer.close()

  def __enter__(self):
    return self

  def __exit__(self, kind, error, trace):
    if error is None:
      self.close()
    elif jax.process_count() == 1:  # of several, one may be gone that the save would wait for
      try:
        self.close()
      except CannotSaveError as second:
        log.warning("%s", second)


def check_settings(keep: int, save_every: int, keep_best: int, best_metric: str, best_mode: str) -> None:
  """Raises CheckpointError for settings that a `Checkpointer` cannot follow."""
  if keep < 1 or save_every < 1:
    raise CheckpointError(f"keep={keep} and save_every={save_every} must both be at least 1")
  if keep_best and not best_metric or best_mode not in ("min", "max"):
    raise CheckpointError(f"keep_best={keep_best} needs the name of a metric and the mode 'min' or "
                          f"'max': got best_metric={best_metric!r}, best_mode={best_mode!r}")


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
