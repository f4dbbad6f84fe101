"""Training: a config and a work directory in, a model directory out.

The loop's order is a contract: evaluate, save, and only then draw the next batch, step, log. So a
checkpoint never knows a batch that its parameters have not seen, and a run that is killed anywhere
continues bit for bit.

The work directory: config.json, tokenizer/, checkpoints/, frozen/ and frozen.json, features/,
parameters.txt, metrics.jsonl, goodput.jsonl, examples.jsonl, tensorboard/, restarts.json; when there is a
reason damaged/ (checkpoints set aside), profiles/, not_finite/, crash-<process>.json and
stacks-<process>.txt; and at the end model/ and done.json.
"""
from collections.abc import Callable
import contextlib
import json
import logging
from pathlib import Path
import time
from typing import NamedTuple

from flax import nnx
import jax
from tqdm import tqdm

from data_pipeline.records import DataError
from data_pipeline.stages import write_json
from lskd_jax import (
  checkpoint,
  errors,
  goodput,
  held_out,
  metrics,
  not_finite,
  parallel,
  parameter_table,
  peers,
  preemption,
  profiles,
  step,
  trees,
)
from lskd_jax.batches import has_held_out
from lskd_jax.fed import Fed
from lskd_jax.frozen_dtype import widened
from lskd_jax.guard import needs_more
from lskd_jax.models import build
from lskd_jax.prepare import (
  Parts,
  check_config,
  extended,
  model_flops,
  prepare,
  start_weights,
)
from lskd_jax.watchdog import Watchdog
from lskd_jax.workdir import alone, claim, count_start

log = logging.getLogger(__name__)


class Run(NamedTuple):
  """What a finished run leaves: its model directory, steps, and whether it had to be extended."""
  model: Path
  steps: int
  extended: bool


class Watchers(NamedTuple):
  """What looks after a run beside its loop."""
  stop: preemption.Preemption
  dog: Watchdog
  spent: goodput.Log


def train(config, workdir, *, evaluate: Callable | None = None, progress: bool = True,
          announce: Callable[[str], None] | None = None, stop: preemption.Preemption | None = None,
          began: float | None = None, accept_config: bool = False) -> Run:
  """Trains or resumes; a finished run returns at once.

  In a run of several processes an error in one of them ends it at once, with its exit code.

  Args:
    config: as `configs/common.py` makes it.
    workdir: made when missing; belongs to one config, of which what is in `workdir.FREE` may change.
    evaluate: (graph, state, step) -> {metric: value}, every `config.eval.every` steps, besides the losses
      on held-out images. The metric `config.guard.metric` decides about extending the run.
    announce: given what the run starts on, as text: processes, mesh, parameters. None = not wanted.
    stop: `preemption.install()`, made as early as possible; None leaves SIGTERM to the caller.
    began: when the process started, in seconds since 1970, for the goodput log; None = now.
    accept_config: go on with this config whatever the work directory was started with.

  Raises:
    Preempted: the run was told to stop, and has saved.
    DataError, ValueError, CheckpointError: one line that names the file, key or step.
    NotFiniteError: too many steps in a row were skipped.
  """
  workdir = Path(workdir)
  claim(config, workdir, accept=accept_config)
  finished = workdir / "done.json"
  if finished.exists():
    done = json.loads(finished.read_text())
    return Run(workdir / "model", done["step"], done["extended"])
  if config.eval.every and not (evaluate or has_held_out(config)):
    raise DataError(f"eval.every={config.eval.every}: there is nothing to evaluate on; name held-out images "
                    "with eval.split or eval.corpus, or set it to 0")
  watchers = Watchers(stop or preemption.Preemption(),
                      Watchdog(workdir, config.train.hang_after, config.train.compile_limit),
                      goodput.Log(workdir, began))
  watchers.stop.connect(workdir, config.train.grace)
  with (peers.leaving_at_once(workdir, watchers.stop), watchers.dog, contextlib.closing(watchers.stop),
        contextlib.closing(watchers.spent)):
    watchers.stop.keep_handler()
    mesh = parallel.make_mesh(**config.train.mesh)
    check_config(config, mesh)
    if announce:
      about = parallel.overview(mesh, config.data.batch_size)
      if jax.process_index() == 0:
        announce("\n".join(f"{name:18}{value}" for name, value in about.items()))
    with jax.set_mesh(mesh):
      watchers.spent.phase(goodput.PREPARATION)
      # Only _train holds the parts, so that it can let go of the first parameters.
      done = _train(config, workdir, mesh, prepare(config, workdir, mesh, progress, watchers.dog.at),
                    watchers, evaluate, progress, announce, accept_config)
    if jax.process_index() == 0:
      write_json(finished, done)
  return Run(workdir / "model", done["step"], done["extended"])


def _train(config, workdir: Path, mesh, parts: Parts, watchers: Watchers, evaluate, progress: bool,
           announce, accept_config: bool) -> dict:
  """The loop; returns what done.json says."""
  stop, dog, spent = watchers
  is_extended = False
  workdir.mkdir(parents=True, exist_ok=True)
  with alone(workdir, patience=1.5 * config.train.grace), checkpoint.Checkpointer(
      workdir, config.train.keep, config.train.save_every, keep_best=config.train.keep_best,
      best_metric=config.train.best_metric, best_mode=config.train.best_mode,
      frozen_source=config.init.model or None) as saver:
    claim(config, workdir, write=True, accept=accept_config)
    restarts = count_start(workdir)
    # --- resume, or start ---
    dog.at("restore", 0)
    spent.phase(goodput.RESTORE)
    first = jax.jit(lambda params: step.init_state(params, parts.tx), donate_argnums=0)
    target = jax.eval_shape(first, parts.params) | {"frozen": jax.eval_shape(lambda tree: tree, parts.frozen)}
    if announce:
      parameter_table.announce(target, mesh, workdir, announce)
    if saver.is_empty():
      state = first(parts.params) | {"frozen": parts.frozen}
      extra = {"extended": False, "examples": "", "evaluation_left": False}
      parts = parts._replace(params=None, frozen=None)
    else:
      parts = parts._replace(params=None, frozen=None)  # before, so that there is room for the restored
      state, extra = saver.restore_latest(target, mesh)
      if jax.process_index() == 0 and (progress or saver.set_aside):
        errors.say(f"lskd: {saver.report}")
      if extra["extended"]:
        is_extended, config, parts = True, *extended(config, parts)
    frozen = state.pop("frozen")
    start, steps = int(state["step"]), config.optim.steps
    spent.restored(start)
    spent.phase(goodput.PREPARATION)
    source = parts.batches(start, steps)
    writer = metrics.MetricWriter(workdir, start, config.train.tensorboard)
    fed = Fed(workdir, start, extra["examples"], config.train.log_examples)
    guard = not_finite.Watch(workdir, config.train.max_skipped,
                             lambda number: next(parts.batches(number - 1, number)), writer.flush)
    profiler = profiles.Profiler(workdir)
    rates = metrics.Throughput(record=spent.add)
    timer = SaveTimer(config.train, stop)
    bar = tqdm(total=steps, initial=start, desc=config.name, unit="step",
               disable=not progress or jax.process_index() > 0, dynamic_ncols=True, leave=False)
    now, values, compiled, left = start, {}, False, extra["evaluation_left"]

    def settle():
      dog.at("wait", now)  # a process that is stuck in a step is not one that evaluates or saves
      jax.block_until_ready(state)

    def save(measured: dict):
      writer.flush()  # a run killed after the save resumes behind these lines
      fed.flush()
      saver.save(now, {**state, "frozen": frozen},
                 {"extended": is_extended, "examples": fed.digest, "evaluation_left": left},
                 metrics=measured if config.train.keep_best else None)

    # Inside of what would wait for the other processes, so that an error does not; `spent` never waits.
    with contextlib.ExitStack() as files, peers.leaving_at_once(workdir, stop), contextlib.closing(spent):
      for file in (bar, profiler, writer, fed):
        files.callback(file.close)
      while True:
        saver.poll()
        # evaluate
        measured = {}
        due = config.eval.every and (now % config.eval.every == 0 or now == steps)
        if (evaluate or parts.held_out) and due and (now > start or left):
          settle()
          with rates.paused("evaluation"):
            measured, left = _evaluate(parts, evaluate, state["params"], frozen, now, watchers, progress)
          dog.at("log", now)
          writer.write(now, measured)
          if now == start and measured and config.train.keep_best:  # its checkpoint is older than they are
            saver.add_metrics(now, measured)
          bar.set_postfix({name: f"{value:.3f}" for name, value in measured.items()
                           if name == "held_out_loss" or not name.startswith("held_out_")})
          if not is_extended and needs_more(config, measured, now):
            is_extended, config, parts = True, *extended(config, parts)
            steps, compiled = config.optim.steps, False
            bar.total = steps
            source = parts.batches(now, steps)
        # save
        due = stop.at_boundary(now) if now > start else None
        if now > start and (due or saver.due(now) or now == steps):
          settle()
          dog.at("save", now)
          with rates.paused("save"):
            save(values | measured)
            timer.saved()
            if due == "stop":
              saver.wait()
              raise preemption.Preempted
        if now == steps:
          guard.look()
          break
        # next batch
        dog.at("data", now)
        with rates.waiting():
          batch = next(source)
        rows = parallel.put_batch(batch, mesh)
        # step
        dog.at("step" if compiled else "compile", now)
        if now == start:
          spent.phase(goodput.STARTUP)
          needed = model_flops(config, parts, state, frozen, rows, parts.run_key)
          rates = metrics.Throughput(needed, _peak(mesh), record=spent.add)
        state, values = parts.train_step(state, frozen, rows, parts.run_key)
        now += 1
        fed.add(now, values.pop("examples"))
        others = config.data.batch_size / len(batch["image_id"])  # have as many valid statements, on average
        rates.count(config.data.batch_size, int(batch["statement_valid"].sum() * others))
        # log
        if compiled:
          spent.step(now)
        else:
          compiled = True
          jax.block_until_ready(values)
          stop.ready(now)
          stop.keep_handler()
          rates.restart()  # the first step compiles
          spent.phase(goodput.STEP)
        guard(now, values)
        profiler(now, values)
        bar.update()
        if now % config.train.log_every == 0 or now == steps:
          writer.write(now, values | rates.report())
          stop.keep_handler()
        timer.look(saver.seconds_of_last_save())
    dog.at("save", now)
    with rates.paused("save"):
      saver.wait()
    if config.train.frozen_dtype:
      frozen = widened(frozen, start_weights(config))
    build.save(workdir / "model", config.task, parts.model_config,
               nnx.merge_state(state["params"], frozen), parts.tokenizer_dir)
    return {"step": steps, "params_digest": trees.params_digest(state["params"]),
            "examples_digest": fed.digest, "restarts": restarts, "extended": is_extended}


def _evaluate(parts: Parts, evaluate: Callable | None, params, frozen, now: int, watchers: Watchers,
              progress: bool):
  """An evaluation's metrics, and whether it was left because the run is to stop.

  One that was left is made again before anything else when the run goes on.
  """
  stop, dog, _ = watchers
  dog.at("evaluate", now)
  measured = {}
  if parts.held_out:
    measured = held_out.measure(parts.held_out, params, frozen, lambda: stop.stopping,
                                lambda: dog.at("evaluate", now), progress)
    if measured is None:
      stop.wait_until_told()
      return {}, True
  if evaluate:
    measured |= evaluate(parts.graph, nnx.merge_state(params, frozen), now)
  return measured, False


def _peak(mesh):
  peak = metrics.peak_flops(mesh.devices.flat[0])
  return None if peak is None else peak * mesh.devices.size


class SaveTimer:
  """Asks for saves by the clock, and tells if one takes longer than a preemption leaves."""

  def __init__(self, config, stop):
    self._minutes, self._grace, self._stop = config.save_minutes, config.grace, stop
    self._warned = False
    self.saved()

  def saved(self) -> None:
    """A save was begun."""
    self._at, self._asked = time.monotonic(), False

  def look(self, seconds: float | None) -> None:
    """Once a step. seconds: how long the last complete save took, None if there was none."""
    late = self._minutes and time.monotonic() - self._at > 60 * self._minutes
    if late and not self._asked and jax.process_index() == 0:
      self._asked = True
      self._stop.ask("save", "train.save_minutes")
    if seconds and seconds > self._grace and not self._warned:
      self._warned = True
      log.warning("a save takes %.0f s, and a preemption leaves train.grace=%g: it would lose up to "
                  "train.save_every steps", seconds, self._grace)
