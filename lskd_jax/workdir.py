"""Whose a work directory is: of one config, and of one run at a time."""
from collections.abc import Iterator
import contextlib
import json
from pathlib import Path
import time

import jax

from data_pipeline.records import DataError
from data_pipeline.stages import locked, write_json
from lskd_jax import errors

# What a run may change on its way: where and how it computes, what it measures, keeps and tells. Its
# results stay the same, to the bit or up to the order of sums. All else is what it learns.
FREE = ("name", "eval", "loss.itc_block", "model.decoder.remat", "model.qformer.remat", "model.vit.remat",
        "train.best_metric", "train.best_mode", "train.compile_limit", "train.grace", "train.hang_after",
        "train.keep", "train.keep_best", "train.log_every", "train.log_examples", "train.mesh",
        "train.max_skipped", "train.microbatches", "train.save_every", "train.save_minutes",
        "train.tensorboard")


def claim(config, workdir: Path, write: bool = False, accept: bool = False) -> None:
  """Refuses a work directory of another config; keys in `FREE` may change.

  Args:
    write: keep the config. That is done once the data and the model are there, so that a mistyped path
      claims nothing. A line of `config_changes.jsonl` has what changed, and when.
    accept: take any change.
  """
  wanted = json.loads(config.to_json_best_effort())
  path = workdir / "config.json"
  changes = differences(json.loads(path.read_text()), wanted) if path.exists() else {}
  for key, (theirs, ours) in changes.items():
    if not accept and not any(f"{key}.".startswith(f"config.{free}.") for free in FREE):
      raise DataError(f"{path}: this run was started with another {key} ({theirs!r}, now {ours!r}); use "
                      "another --workdir, the same config, or --accept-config to go on with this one")
  if write and jax.process_index() == 0 and (changes or not path.exists()):
    workdir.mkdir(parents=True, exist_ok=True)
    if changes:
      with (workdir / "config_changes.jsonl").open("a") as file:
        at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        file.write(json.dumps({"time": at, "changes": changes}) + "\n")
    write_json(path, wanted)


def differences(a, b, path: str = "config") -> dict[str, tuple]:
  """{dotted name: (value in a, value in b)} of what differs in two nested dicts; None where it is missing."""
  if not (isinstance(a, dict) and isinstance(b, dict)):
    return {} if a == b else {path: (a, b)}
  found = {}
  for key in sorted(set(a) | set(b)):
    found |= differences(a.get(key), b.get(key), f"{path}.{key}")
  return found


@contextlib.contextmanager
def alone(workdir: Path, patience: float) -> Iterator[None]:
  """Keeps a second run out of a work directory; process 0 does it for all.

  A file system without locks knows of no others, and a machine that is gone holds none.

  Args:
    patience: seconds that another run has to end in, since one that was told to may still save.

  Raises DataError if it is there for longer.
  """
  with contextlib.ExitStack() as held:
    if jax.process_index() == 0:
      try:
        held.enter_context(locked(workdir))
      except DataError:
        errors.say(f"lskd: another run is in {workdir}; waiting {patience:.0f} s for its end")
        held.enter_context(locked(workdir, patience))
    yield


def count_start(workdir: Path) -> int:
  """How often the run of this work directory was started again; counts this start. 0 on process > 0."""
  if jax.process_index() > 0:
    return 0
  path = workdir / "restarts.json"
  restarts = json.loads(path.read_text())["restarts"] + 1 if path.exists() else 0
  write_json(path, {"restarts": restarts})
  return restarts
