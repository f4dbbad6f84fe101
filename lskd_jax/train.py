"""Training: a config and a work directory in, a model directory out.

The loop's order is a contract: evaluate, save, and only then draw the next batch, step, log. So a
checkpoint never knows a batch that its parameters have not seen, and a run that is killed anywhere
continues bit for bit.

The work directory: config.json, tokenizer/, checkpoints/, frozen/, damaged/ (checkpoints set aside),
features/, metrics.jsonl, tensorboard/, and at the end model/ and finished.json.
"""
from collections.abc import Callable
import json
from pathlib import Path
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
from lskd_jax import checkpoint, features, metrics, parallel, step
from lskd_jax.judged import judged_corpus, judgement_columns
from lskd_jax.models import build
from lskd_jax.prepare import claim, divided, find_tokenizer, loader_options, make_step, sized


class Run(NamedTuple):
  """What a finished run leaves: its model directory, steps, and whether it had to be extended."""
  model: Path
  steps: int
  extended: bool


def train(config, workdir, *, evaluate: Callable | None = None, progress: bool = True) -> Run:
  """Trains or resumes; a finished run returns at once.

  Args:
    config: as `configs/common.py` makes it.
    workdir: made when missing; belongs to this config alone.
    evaluate: (graph, state, step) -> {metric: value}, every `config.eval.every` steps; its metric
      `config.guard.metric` decides about extending the run.

  Raises:
    DataError, ValueError, CheckpointError: one line that names the file, key or step.
  """
  workdir = Path(workdir)
  claim(config, workdir)
  model_dir = workdir / "model"
  finished = workdir / "finished.json"
  if finished.exists():
    done = json.loads(finished.read_text())
    return Run(model_dir, done["steps"], done["extended"])
  mesh = parallel.make_mesh(**config.train.mesh)
  with jax.set_mesh(mesh):
    run = _train(config, workdir, mesh, evaluate, progress)
  if jax.process_index() == 0:
    write_json(finished, {"steps": run.steps, "extended": run.extended})
  return run


def _train(config, workdir: Path, mesh, evaluate, progress: bool) -> Run:
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
    about, source = checkpoint.load_model(config.init.model)
    if config.task == "critic" and about["kind"] == "student":
      source = {"student": source}  # the whole student is one part of a critic
    state = build.copy_parts(state, source, tuple(config.init.parts))
  graph, params, frozen = divided(config, nnx.merge(graph, state))

  # --- what the loader gives and what the step takes ---
  options = loader_options(config)
  cached = None
  if config.data.cache_features:
    if "vit" not in config.train.frozen:
      raise ValueError("data.cache_features=True needs a ViT that does not change: add 'vit' to "
                       "train.frozen")
    if jax.process_count() > 1:
      raise ValueError("data.cache_features=True works in a single process: set it to False")
    vit = nnx.merge(graph, params, frozen)
    vit = vit.student.vit if config.task == "critic" else vit.vit
    cached = features.cached_features(vit, corpus, config.data.features or workdir / "features",
                                      progress=progress)
  loader = Loader(corpus, tokenizer, options, config.seed)
  columns = judgement_columns(corpus, judgements) if config.task == "critic" else None
  tx, train_step = make_step(config, graph)
  claim(config, workdir, write=True)

  def batches(start: int, end: int):
    for batch in loader.batches(start, end - start, jax.process_index(), jax.process_count()):
      if cached is not None:
        batch["features"] = cached[batch["image_id"]]
      if columns is not None:
        batch |= columns(batch)
      yield batch

  # --- state: resume, or start ---
  steps = config.optim.steps
  run_key = jax.random.key(config.seed)
  extended = False
  with checkpoint.Checkpointer(workdir, config.train.keep, config.train.save_every) as saver:
    state = {**jax.jit(lambda p: step.init_state(p, tx))(params), "frozen": frozen}
    found = saver.restore_latest(state, mesh)
    if found is not None:
      state, extra = found
      if extra["extended"]:
        extended, steps, tx, train_step = extend(config, graph)
    frozen = state.pop("frozen")
    start = int(state["step"])
    writer = metrics.MetricWriter(workdir, start, config.train.tensorboard)
    rates = metrics.Throughput(peak=None)
    bar = tqdm(total=steps, initial=start, desc=config.name, unit="step", disable=not progress,
               dynamic_ncols=True, leave=False)
    source = batches(start, steps)
    now = start
    try:
      while True:
        # evaluate
        due = config.eval.every and (now % config.eval.every == 0 or now == steps)
        if evaluate and due and now > start:
          with rates.paused():
            measured = evaluate(graph, nnx.merge_state(state["params"], frozen), now)
          writer.write(now, measured)
          bar.set_postfix({name: f"{value:.3f}" for name, value in measured.items()})
          if needs_more(config, measured, now, extended):
            extended, steps, tx, train_step = extend(config, graph)
            bar.total = steps
            source = batches(now, steps)
        # save
        if now > start and (saver.due(now) or now == steps):
          with rates.paused():
            writer.flush()  # a run killed after the save resumes behind these lines
            saver.save(now, {**state, "frozen": frozen}, {"extended": extended})
        if now == steps:
          break
        # next batch
        with rates.waiting():
          batch = next(source)
        rows = parallel.put_batch(batch, mesh)
        # step
        if now == start:
          rates = metrics.Throughput(metrics.step_flops(
              train_step.trace(state, frozen, rows, run_key)), _peak(mesh))
        state, values = train_step(state, frozen, rows, run_key)
        now += 1
        # log
        if now == start + 1:
          jax.block_until_ready(values)
          rates.restart()  # the first step compiles
        count = int(batch["statement_valid"].sum()) * jax.process_count()
        rates.count(len(batch["image_id"]) * jax.process_count(), count)
        bar.update()
        if now % config.train.log_every == 0 or now == steps:
          writer.write(now, values | rates.report())
    finally:
      bar.close()
      writer.close()
    saver.wait()
  build.save(workdir / "model", config.task, model_config,
             nnx.merge_state(state["params"], frozen), tokenizer_dir)
  return Run(workdir / "model", steps, extended)


def _peak(mesh):
  peak = metrics.peak_flops(mesh.devices.flat[0])
  return None if peak is None else peak * mesh.devices.size


def needs_more(config, measured: dict, now: int, extended: bool) -> bool:
  """Whether a run that is half done has not left chance, and so is to be extended."""
  guard = config.guard
  return (not extended and guard.metric in measured and now >= guard.at * config.optim.steps
          and now < config.optim.steps and measured[guard.metric] < guard.below)


def extend(config, graph):
  """The longer schedule of a run that had not left chance: (True, steps, optimizer, step)."""
  longer = config.copy_and_resolve_references()
  longer.optim.steps = round(config.optim.steps * config.guard.factor)
  return True, longer.optim.steps, *make_step(longer, graph)
