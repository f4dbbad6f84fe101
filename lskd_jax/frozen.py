"""The part of a run's state that does not change: stored once, or named where it already lies.

    frozen/      the leaves (orbax)
    frozen.json  where leaves came unchanged out of a model directory: its path, and the manifest of
                 these leaves; frozen/ then has only the others

Everything here is collective.
"""
import json

from etils import epath
import jax

from lskd_jax import agreement, trees
from lskd_jax.committed import digest, write_whole
from lskd_jax.trees import CannotSaveError, CheckpointError, one_line


def store(workdir: epath.Path, tree, source=None) -> dict[str, dict]:
  """Stores the frozen part if `workdir` has none yet, or else compares it. Returns its manifest.

  Args:
    workdir: of the run.
    tree: the frozen part; may be empty.
    source: the model directory that leaves may have come from. It must stay as long as the run.

  Raises:
    CheckpointError: the folder has the frozen part of another run.
    CannotSaveError: it could not be written.
  """
  named = trees.named_leaves(tree)
  if not named:
    return {}
  manifest = trees.make_manifest(named)
  reference, stored = _stored(workdir)
  if reference is None and not stored and source:
    reference = _refer(workdir, manifest, source)
  borrowed = reference["leaves"] if reference else {}
  rest = {name: leaf for name, leaf in named.items() if name not in borrowed}
  if rest and not stored:
    trees.write_tree(workdir / "frozen", rest)
  elif borrowed | (trees.read_manifest(workdir / "frozen") if rest else {}) != manifest:
    raise CheckpointError(
        f"{workdir / 'frozen'} is the frozen part of another run: use another workdir")
  return manifest


def restore(workdir: epath.Path, target, wanted: str, mesh):
  """The frozen part, every value checked.

  Args:
    workdir: of the run.
    target, mesh: as in `trees.read_tree`.
    wanted: the digest of the manifest that `store` returned.

  Raises:
    CheckpointError: it is damaged or another run's, or the model directory that it refers to has
      changed or vanished.
  """
  reference, stored = _stored(workdir)
  borrowed = reference["leaves"] if reference else {}
  own = trees.read_manifest(workdir / "frozen") if stored else {}
  manifest = borrowed | own
  if digest(manifest) != wanted:
    raise CheckpointError(f"{workdir / 'frozen'} is not the frozen part that the checkpoints were "
                          "trained with")
  leaves = trees.named_leaves(target)
  trees.check_structure(manifest, leaves, workdir / "frozen")
  named = {}
  if own:
    named |= trees.read_leaves(workdir / "frozen", own, {name: leaves[name] for name in own}, mesh)
  if borrowed:
    try:
      named |= trees.read_leaves(epath.Path(reference["model"]) / "params", borrowed,
                                 {name: leaves[name] for name in borrowed}, mesh, partial=True)
    except CheckpointError as error:
      raise CheckpointError(
          f"{workdir / 'frozen.json'} refers to the parameters of {reference['model']}, which has "
          f"changed or vanished: put that model directory back ({one_line(error)})") from None
  return trees.fill(target, named)


def _stored(workdir: epath.Path) -> tuple[dict | None, bool]:
  """(frozen.json or None, whether there is frozen/)."""
  def look():
    path = workdir / "frozen.json"
    try:
      reference = json.loads(path.read_text()) if path.exists() else None
    except (OSError, ValueError) as error:
      return None, False, f"{path} cannot be read: {one_line(error)}"
    return reference, (workdir / "frozen").exists(), None
  reference, stored, problem = agreement.from_first(look)
  if problem:
    raise CheckpointError(problem)
  return reference, stored


def _refer(workdir: epath.Path, manifest: dict[str, dict], source) -> dict | None:
  """Writes frozen.json for the leaves that `source` has; None if it has none, or has others there."""
  source = epath.Path(source).absolute()
  try:
    there = trees.read_manifest(source / "params")
  except CheckpointError:
    return None
  leaves = {name: entry for name, entry in manifest.items() if name in there}
  if not leaves or any(there[name] != entry for name, entry in leaves.items()):
    return None  # equal zeros alone are no reason to need that directory
  reference = {"model": str(source), "leaves": leaves}
  problem = None
  if jax.process_index() == 0:
    try:
      write_whole(workdir / "frozen.json", json.dumps(reference, indent=1) + "\n")
    except OSError as error:
      problem = f"cannot write {workdir / 'frozen.json'}: {one_line(error)}"
  if problem := agreement.first_problem(problem):
    raise CannotSaveError(problem)
  return reference
