"""One step of a run again, from a checkpoint and the data, to see whether and why it came out so.

Nothing is written to the work directory: checkpoints are read through a folder of links, which is
also where a damaged one would be set aside.
"""
import contextlib
import json
import math
from pathlib import Path
import re
import tempfile
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from tqdm import tqdm

from data_pipeline.records import DataError
from lskd_jax import checkpoint, guard, parallel, trees
from lskd_jax.metrics import for_json, read_metrics
from lskd_jax.prepare import (
  Parts,
  check_config,
  extended,
  loss_weights,
  make_objective,
  prepare,
)
from lskd_jax.step import init_state, make_train_step
from lskd_jax.workdir import claim


class Replay(NamedTuple):
  """A step that was done again.

  values: its metrics. logged: what metrics.jsonl says of the same metrics, None if it has no line.
  skipped: whether its update was left out. gradients: names of gradients that are not finite.
  """
  step: int
  start: int
  values: dict[str, float | str]
  logged: dict[str, float | str] | None
  skipped: bool
  gradients: list[str]

  def line(self) -> str:
    """The metrics as a line of metrics.jsonl."""
    return json.dumps({"step": self.step, **self.values})

  def differences(self) -> list[str]:
    """Each metric that metrics.jsonl has otherwise, with both values."""
    return [f"{name} {value}, logged {self.logged[name]}" for name, value in self.values.items()
            if self.logged and self.logged[name] != value]

  def report(self) -> list[str]:
    """What is there to say beside the metrics, a line each."""
    lines = [f"step {self.step} again, from the state after step {self.start}"]
    if self.skipped:
      bad = [name for name, value in self.values.items() if not math.isfinite(float(value))]
      lines.append(f"its update was skipped; not finite: {', '.join(bad) or 'nothing'}")
    if self.gradients:
      lines.append(f"gradients that are not finite: {trees.listed(self.gradients)}")
    if self.logged is None:
      lines.append("metrics.jsonl has no line of this step to compare with")
    elif not self.differences():
      lines.append(f"equal to metrics.jsonl in all {len(self.logged)} metrics")
    return lines


def reproduce_step(config, workdir, number: int, progress: bool = True) -> Replay:
  """Does one step of the run in `workdir` again, from the newest checkpoint before it, or from the start.

  Args:
    number: of the step, as in metrics.jsonl, from 1 on.

  Raises:
    DataError: no run, or it has no such step; and what `prepare` raises.
  """
  workdir = Path(workdir)
  if not (workdir / "config.json").exists():
    raise DataError(f"{workdir}: no run was started here; give the --workdir of one")
  claim(config, workdir)
  mesh = parallel.make_mesh(**config.train.mesh)
  check_config(config, mesh)
  with jax.set_mesh(mesh):
    return _replay(number, config, workdir, mesh, prepare(config, workdir, mesh, progress), progress)


def _replay(step: int, config, workdir: Path, mesh, parts: Parts, progress: bool) -> Replay:
  state = {**jax.jit(lambda p: init_state(p, parts.tx))(parts.params), "frozen": parts.frozen}
  extra, logged, lines = {}, None, read_metrics(workdir / "metrics.jsonl")
  with _checkpoints_before(step, workdir) as view, checkpoint.Checkpointer(view) as reader:
    found = reader.restore_latest(state, mesh)
    if found is not None:
      state, extra = found
  state = dict(state)
  frozen, start = state.pop("frozen"), int(state["step"])
  switch = guard.extended_after(config, lines)  # perhaps since that checkpoint
  if extra.get("extended"):
    switch, (config, parts) = None, extended(config, parts)
  steps = config.optim.steps if switch is None else guard.extended_steps(config)
  if step > steps:
    raise DataError(f"--reproduce-step {step}: the run has {steps} steps")
  for before, batch in enumerate(tqdm(parts.batches(start, step), total=step - start, desc="replay",
                                      unit="step", disable=not progress, leave=False), start):
    if before == switch:
      config, parts = extended(config, parts)
    rows = parallel.put_batch(batch, mesh)
    state, values = parts.train_step(state, frozen, rows, parts.run_key)
  values = {name: for_json(float(value)) for name, value in values.items() if isinstance(value, jax.Array)}
  skipped, gradients = values["skipped_in_row"] > 0, []
  if skipped:  # so the parameters are still those from before the step
    again = {"step": state["step"] - 1, "params": state["params"], "skipped": state["skipped"],
             "opt": GRADIENTS.init(state["params"])}
    gradient_step = make_train_step(parts.graph, GRADIENTS, make_objective(config), loss_weights(config),
                                    config.train.microbatches, max_grad_norm=None)
    found, _ = gradient_step(again, frozen, rows, parts.run_key)
    gradients = not_finite_leaves(found["opt"])
  for line in lines:
    if line["step"] == step and "loss" in line:
      logged = {name: line[name] for name in values if name in line}
  return Replay(step, start, values, logged, skipped, gradients)


# An optimizer that changes nothing and whose state is the last gradient.
GRADIENTS = optax.GradientTransformation(
    init=lambda params: jax.tree.map(jnp.zeros_like, params),
    update=lambda gradients, state, params: (jax.tree.map(jnp.zeros_like, gradients), gradients))


def not_finite_leaves(tree) -> list[str]:
  """The names of the arrays that have a value which is not finite."""
  finite = jax.jit(lambda leaves: [jnp.isfinite(leaf).all() for leaf in leaves])
  named = trees.named_leaves(tree)
  return [name for name, good in zip(named, jax.device_get(finite(list(named.values())))) if not good]


@contextlib.contextmanager
def _checkpoints_before(step: int, workdir: Path):
  """A work directory of links, with the checkpoints that `step` can be reached from."""
  with tempfile.TemporaryDirectory() as view:
    view = Path(view)
    (view / "checkpoints").mkdir()
    folders = [path for path in workdir.glob("checkpoints/*")
               if re.fullmatch(r"\d+", path.name) and int(path.name) < step]
    for folder in folders:  # folders of links, not links to folders: those can be moved and removed
      twin = view / "checkpoints" / folder.name
      twin.mkdir()
      for path in sorted(folder.rglob("*")):
        if path.is_dir():
          (twin / path.relative_to(folder)).mkdir()
        else:
          (twin / path.relative_to(folder)).symlink_to(path.absolute())
    for path in workdir.glob("frozen*"):
      (view / path.name).symlink_to(path.absolute())
    yield view
