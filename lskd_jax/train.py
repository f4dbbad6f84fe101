"""Training: a config and a work directory in, a model directory out.

The loop's order is a contract: evaluate, save, and only then draw the next batch, step, log. So a
checkpoint never knows a batch that its parameters have not seen, and a run that is killed anywhere
continues bit for bit.

The work directory: config.json, tokenizer/, checkpoints/, frozen/, damaged/ (checkpoints set aside),
features/, parameters.txt, metrics.jsonl, examples.jsonl, tensorboard/, restarts.json, and at the end model/
and done.json.
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

from data_pipeline import tokenizer as tokenizers
from data_pipeline.corpus import open_corpus
from data_pipeline.judge import read_judgements
from data_pipeline.loader import Loader
from data_pipeline.records import DataError
from data_pipeline.stages import write_json
from lskd_jax import (
  checkpoint,
  features,
  metrics,
  optim,
  parallel,
  parameter_table,
  peers,
  preemption,
  step,
  trees,
)
from lskd_jax.fed import Fed
from lskd_jax.frozen_dtype import narrowed, widened
from lskd_jax.judged import judged_corpus, judgement_columns
from lskd_jax.models import build
from lskd_jax.prepare import (
  claim,
  count_start,
  find_tokenizer,
  loader_options,
  make_objective,
  sized,
  start_weights,
)
from lskd_jax.watchdog import Watchdog

log = logging.getLogger(__name__)


class Run(NamedTuple):
  """What a finished run leaves: its model directory, steps, and whether it had to be extended."""
  model: Path
  steps: int
  extended: bool


def train(config, workdir, *, evaluate: Callable | None = None, progress: bool = True,
          announce: Callable[[str], None] | None = None, stop: preemption.Preemption | None = None) -> Run:
  """Trains or resumes; a finished run returns at once.

  In a run of several processes an error in one of them ends it at once, with its exit code.

  Args:
    config: as `configs/common.py` makes it.
    workdir: made when missing; belongs to this config alone.
    evaluate: (graph, state, step) -> {metric: value}, every `config.eval.every` steps; its metric
      `config.guard.metric` decides about extending the run.
    announce: given what the run starts on, as text: processes, mesh, parameters. None = not wanted.
    stop: `preemption.install()`, made as early as possible; None leaves SIGTERM to the caller.

  Raises:
    Preempted: the run was told to stop, and has saved.
    DataError, ValueError, CheckpointError: one line that names the file, key or step.
  """
  workdir = Path(workdir)
  claim(config, workdir)
  model_dir = workdir / "model"
  finished = workdir / "done.json"
  if finished.exists():
    done = json.loads(finished.read_text())
    return Run(model_dir, done["step"], done["extended"])
  stop = stop or preemption.Preemption()
  stop.connect(workdir, config.train.grace)
  watch = Watchdog(workdir, config.train.hang_after, config.train.compile_limit)
  with peers.leaving_at_once(workdir, stop), watch, contextlib.closing(stop):
    stop.keep_handler()
    mesh = parallel.make_mesh(**config.train.mesh)
    own_rows = parallel.own_rows(mesh, config.data.batch_size)
    if announce:
      about = parallel.overview(mesh, config.data.batch_size)
      if jax.process_index() == 0:
        announce("\n".join(f"{name:18}{value}" for name, value in about.items()))
    with jax.set_mesh(mesh):
      done = _train(config, workdir, mesh, own_rows, evaluate, progress, announce, stop, watch)
    if jax.process_index() == 0:
      write_json(finished, done)
  return Run(model_dir, done["step"], done["extended"])


def _train(config, workdir: Path, mesh, own_rows, evaluate, progress: bool, announce, stop, watch) -> dict:
  # --- data ---
  corpus = open_corpus(config.data.corpus, config.data.image_root or None,
                       config.data.min_score, config.data.split or None)
  if config.task == "critic":
    unjudged = [kind for kind in ("captions", "descriptions") if config.data.texts[kind]]
    if unjudged:
      raise DataError(f"data.texts.{unjudged[0]}={config.data.texts[unjudged[0]]}: a critic learns from "
                      "judged statements only; set it to 0")
    judgements = read_judgements(config.data.judgements)
    corpus = judged_corpus(corpus, judgements)
  tokenizer_dir = find_tokenizer(config, workdir, corpus)
  tokenizer = tokenizers.load_tokenizer(tokenizer_dir)

  # --- model ---
  model_config = sized(config, tokenizer)
  make = build.maker(config.task, model_config, tokenizer)
  graph, state = build.initialize(make, config.seed)
  if config.init.model:
    state = build.copy_parts(state, start_weights(config), tuple(config.init.parts))
  frozen_parts = tuple(config.train.frozen)
  graph, params, frozen = step.split(nnx.merge(graph, state), frozen_parts)
  names = {name for path, _ in nnx.to_flat_state(frozen) for name in path}
  unknown = [part for part in frozen_parts if part not in names]
  if unknown:
    raise DataError(f"train.frozen: the model has no part {unknown[0]!r}; its parts are "
                    f"{', '.join(sorted(params.keys()))}")

  # --- what the loader gives and what the step takes ---
  options = loader_options(config)
  cached = None
  if config.data.cache_features:
    if "vit" not in frozen_parts:
      raise ValueError("data.cache_features=True needs a ViT that does not change: add 'vit' to "
                       "train.frozen")
    if jax.process_count() > 1:
      raise ValueError("data.cache_features=True works in a single process: set it to False")
    vit = nnx.merge(graph, params, frozen)
    vit = vit.student.vit if config.task == "critic" else vit.vit
    watch.at("features", 0)
    cached = features.cached_features(vit, corpus, config.data.features or workdir / "features",
                                      progress=progress)
    watch.at("start", 0)
  frozen = narrowed(graph, params, frozen, config.train.frozen_dtype)
  loader = Loader(corpus, tokenizer, options, config.seed)
  columns = judgement_columns(corpus, judgements) if config.task == "critic" else None
  objective = make_objective(config)
  claim(config, workdir, write=True)
  restarts = count_start(workdir)

  def batches(start: int, end: int):
    for batch in loader.batches(start, end - start, own_rows):
      if cached is not None:
        batch["features"] = cached[batch["image_id"]]
      if columns is not None:
        batch |= columns(batch)
      yield batch

  # --- state: resume, or start ---
  steps = config.optim.steps
  tx = optim.optimizer(config.optim)
  losses_of = {"student": ("itc", "itm", "lm"), "generative": ("lm",)}.get(config.task, ())
  loss_weights = {name: config.loss[name] for name in losses_of}
  train_step = step.make_train_step(graph, tx, objective, loss_weights, config.train.microbatches)
  run_key = jax.random.key(config.seed)
  extended = False
  with checkpoint.Checkpointer(workdir, config.train.keep, config.train.save_every) as saver:
    state = {**jax.jit(lambda p: step.init_state(p, tx))(params), "frozen": frozen}
    if announce:
      parameter_table.announce(state, mesh, workdir, announce)
    watch.at("restore", 0)
    found = saver.restore_latest(state, mesh)
    extra = {"extended": False, "examples": ""}
    if found is not None:
      state, extra = found
      if extra["extended"]:
        extended, steps, tx, train_step = extend(config, graph, objective, loss_weights)
    frozen = state.pop("frozen")
    start = int(state["step"])
    writer = metrics.MetricWriter(workdir, start, config.train.tensorboard)
    fed = Fed(workdir, start, extra["examples"], config.train.log_examples)
    rates = metrics.Throughput(peak=None)
    bar = tqdm(total=steps, initial=start, desc=config.name, unit="step",
               disable=not progress or jax.process_index() > 0, dynamic_ncols=True, leave=False)
    source = batches(start, steps)
    now = start
    compiled = False
    timer = SaveTimer(config.train, stop)

    def save():
      writer.flush()  # a run killed after the save resumes behind these lines
      fed.flush()
      saver.save(now, {**state, "frozen": frozen}, {"extended": extended, "examples": fed.digest})

    # Inside of what would wait for the other processes, so that an error does not.
    with contextlib.ExitStack() as files, peers.leaving_at_once(workdir, stop):
      for file in (bar, writer, fed):
        files.callback(file.close)
      while True:
        # evaluate
        due = config.eval.every and (now % config.eval.every == 0 or now == steps)
        if evaluate and due and now > start:
          watch.at("evaluate", now)
          with rates.paused():
            measured = evaluate(graph, nnx.merge_state(state["params"], frozen), now)
          writer.write(now, measured)
          bar.set_postfix({name: f"{value:.3f}" for name, value in measured.items()})
          if needs_more(config, measured, now, extended):
            extended, steps, tx, train_step = extend(config, graph, objective, loss_weights)
            compiled = False
            bar.total = steps
            source = batches(now, steps)
        # save
        due = stop.at_boundary(now) if now > start else None
        if now > start and (due or saver.due(now) or now == steps):
          watch.at("save", now)
          with rates.paused(), timer.saving():
            save()
            if due == "stop":
              saver.wait()
              raise preemption.Preempted
        if now == steps:
          break
        # next batch
        watch.at("data", now)
        with rates.waiting():
          batch = next(source)
        rows = parallel.put_batch(batch, mesh)
        # step
        watch.at("step" if compiled else "compile", now)
        if now == start:
          rates = metrics.Throughput(metrics.step_flops(
              train_step.trace(state, frozen, rows, run_key)), _peak(mesh))
        state, values = train_step(state, frozen, rows, run_key)
        now += 1
        fed.add(now, values.pop("examples"))
        # log
        if not compiled:
          compiled = True
          jax.block_until_ready(values)
          stop.ready(now)
          stop.keep_handler()
          rates.restart()  # the first step compiles
        others = options.batch_size / len(own_rows)  # have as many valid statements, on average
        rates.count(options.batch_size, int(batch["statement_valid"].sum() * others))
        bar.update()
        if now % config.train.log_every == 0 or now == steps:
          writer.write(now, values | rates.report())
          stop.keep_handler()
        timer.ask_if_due()
    watch.at("save", now)
    saver.wait()
  if config.train.frozen_dtype:
    frozen = widened(frozen, start_weights(config))
  build.save(workdir / "model", config.task, model_config,
             nnx.merge_state(state["params"], frozen), tokenizer_dir)
  return {"step": steps, "params_digest": trees.params_digest(state["params"]),
          "examples_digest": fed.digest, "restarts": restarts, "extended": extended}


def _peak(mesh):
  peak = metrics.peak_flops(mesh.devices.flat[0])
  return None if peak is None else peak * mesh.devices.size


class SaveTimer:
  """Asks for saves by the clock, and tells if one takes longer than a preemption leaves."""

  def __init__(self, config, stop):
    self._minutes, self._grace, self._stop = config.save_minutes, config.grace, stop
    self._saved = time.monotonic()
    self._asked = self._warned = False

  @contextlib.contextmanager
  def saving(self):
    """Around every save."""
    start = time.monotonic()
    yield
    self._saved, self._asked = time.monotonic(), False
    if self._saved - start > self._grace and not self._warned:
      self._warned = True
      log.warning("a save took %.0f s, and a preemption leaves train.grace=%g: it would lose up to "
                  "train.save_every steps", self._saved - start, self._grace)

  def ask_if_due(self) -> None:
    """Asks all processes to save soon if the last save is older than `train.save_minutes`."""
    late = self._minutes and time.monotonic() - self._saved > 60 * self._minutes
    if late and not self._asked and jax.process_index() == 0:
      self._asked = True
      self._stop.ask("save", "train.save_minutes")


def needs_more(config, measured: dict, now: int, extended: bool) -> bool:
  """Whether a run that is half done has not left chance, and so is to be extended."""
  guard = config.guard
  return (not extended and guard.metric in measured and now >= guard.at * config.optim.steps
          and now < config.optim.steps and measured[guard.metric] < guard.below)


def extend(config, graph, objective, loss_weights):
  """The longer schedule of a run that had not left chance: (True, steps, optimizer, step)."""
  longer = config.optim.copy_and_resolve_references()
  longer.steps = round(config.optim.steps * config.guard.factor)
  tx = optim.optimizer(longer)
  return True, longer.steps, tx, step.make_train_step(graph, tx, objective, loss_weights,
                                                      config.train.microbatches)
