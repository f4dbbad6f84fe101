"""From a config to the parts of a run: sizes, tokenizer, batches, step; and who owns a work directory."""
from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import math
from pathlib import Path
import re
from typing import NamedTuple

from flax import nnx
import jax
import optax

from data_pipeline import tokenizer as tokenizers
from data_pipeline.corpus import Corpus
from data_pipeline.loader import Loader
from data_pipeline.records import DataError
from data_pipeline.texts import text_encoder
from lskd_jax import checkpoint, features, guard, losses, metrics, optim, parallel, rows, step
from lskd_jax.batches import (
  batches_of,
  find_corpus,
  find_held_out,
  loader_options,
  whole_batches,
)
from lskd_jax.frozen_dtype import narrowed
from lskd_jax.held_out import HeldOut, make_evaluation_step, without_dropout
from lskd_jax.models import build
from lskd_jax.models.generative import GenerativeConfig
from lskd_jax.models.student import StudentConfig
from lskd_jax.models.vit import VitConfig


class Parts(NamedTuple):
  """What a run is made of, before its state.

  graph, params, frozen: of `step.split`, at the start. batches: (start, end) -> the batches of steps
  start + 1 to end, this process's rows. tx: the optimizer. train_step: of `step.make_train_step`.
  held_out: None unless the config names images to evaluate on.
  """
  model_config: StudentConfig | GenerativeConfig
  graph: nnx.GraphDef
  params: nnx.State
  frozen: nnx.State
  tokenizer_dir: Path
  batches: Callable[[int, int], Iterator[dict]]
  tx: optax.GradientTransformation
  train_step: Callable
  run_key: jax.Array
  held_out: HeldOut | None


def prepare(config, workdir: Path, mesh, progress: bool = True,
            at: Callable[[str, int], None] = lambda phase, step: None) -> Parts:
  """Makes the parts of a run on the mesh in use.

  Args:
    at: told when the features of the corpus are made, which takes long, and when that is over.

  Raises:
    DataError, ValueError, CheckpointError: one line that names the file or key.
  """
  # --- data ---
  corpus, columns = find_corpus(config, config.data.corpus, config.data.image_root, config.data.split)
  others = find_held_out(config)
  if not config.data.cache_features:
    for images in (corpus, *others[:1]) if others else (corpus,):
      images.image_bytes(0)  # a wrong image_root is found now, not at the first batch or evaluation
  tokenizer_dir = find_tokenizer(config, workdir, corpus)
  tokenizer = tokenizers.load_tokenizer(tokenizer_dir)

  # --- model ---
  model_config = sized(config, tokenizer)
  with widths_divided():
    graph, state = build.initialize(build.maker(config.task, model_config, tokenizer), config.seed)
  if config.init.model:
    state = build.copy_parts(state, start_weights(config), tuple(config.init.parts))
  graph, params, frozen = divided(config, nnx.merge(graph, state))

  # --- batches ---
  cached = lambda corpus, part: None
  if config.data.cache_features:
    vit = nnx.merge(graph, params, frozen)
    vit = vit.student.vit if config.task == "critic" else vit.vit
    folder = Path(config.data.features or workdir / "features")

    def cached(corpus, part):
      at("features", 0)
      found = features.cached_features(vit, corpus, folder / part, progress=progress)
      at("start", 0)
      return found
  own_rows, run_key = parallel.own_rows(mesh, config.data.batch_size), jax.random.key(config.seed)
  options = loader_options(config)
  loader = Loader(corpus, tokenizer, options, config.seed)
  batches = batches_of(loader, own_rows, cached(corpus, ""), columns)
  held_out = None
  if others:
    corpus, columns = others
    loader = Loader(corpus, tokenizer, dataclasses.replace(options, augment=False), config.seed)
    count = whole_batches(config, loader)  # before the features, which take long
    still = build.maker(config.task, without_dropout(model_config), tokenizer)
    still_graph, *_ = divided(config, build.abstract(still))
    held_out = HeldOut(batches_of(loader, own_rows, cached(corpus, "held_out"), columns), count,
                       make_evaluation_step(still_graph, make_objective(config), loss_weights(config),
                                            config.train.microbatches), run_key)
  frozen = narrowed(graph, params, frozen, config.train.frozen_dtype)
  return Parts(model_config, graph, params, frozen, tokenizer_dir, batches, *make_step(config, graph),
               run_key, held_out)


def extended(config, parts: Parts) -> tuple:
  """The config and the parts of a run that goes on for longer, because it had not left chance."""
  longer = config.copy_and_resolve_references()
  longer.optim.steps = guard.extended_steps(config)
  tx, train_step = make_step(longer, parts.graph)
  return longer, parts._replace(tx=tx, train_step=train_step)


def divided(config, model: nnx.Module):
  """A model -> graph definition, trainable state, frozen state, by `train.frozen`.

  Raises DataError for a part that the model lacks.
  """
  graph, params, frozen = step.split(model, tuple(config.train.frozen))
  names = {name for path, _ in nnx.to_flat_state(frozen) for name in path}
  for part in config.train.frozen:
    if part not in names:
      raise DataError(f"train.frozen: the model has no part {part!r}; its parts are "
                      f"{', '.join(sorted(params.keys()))}")
  return graph, params, frozen


def make_step(config, graph):
  """The optimizer of a config, and its jitted training step: see `step.make_train_step`."""
  tx = optim.optimizer(config.optim)
  return tx, step.make_train_step(graph, tx, make_objective(config), loss_weights(config),
                                  config.train.microbatches, config.train.max_grad_norm)


@contextlib.contextmanager
def widths_divided():
  """Turns JAX's error about a width that an axis of the mesh does not divide into a DataError of one line."""
  try:
    yield
  except ValueError as error:
    found = re.search(r"spec \('(\w+)',\) .* (\d+) times, .*divide the dimension size (\d+)", str(error))
    if not found:
      raise
    axis, parts, width = found[1], int(found[2]), int(found[3])
    rest = ", and train.mesh.data=-1 for the remaining devices" if axis == "fsdp" else ""
    raise DataError(f"train.mesh.{axis}={parts} does not divide a width of {width} in the model: set it to "
                    f"{math.gcd(parts, width)} or a divisor of that{rest}") from None


def undivided(config):
  """A config whose step computes the same with nothing divided, recomputed or padded: what MFU counts."""
  plain = config.copy_and_resolve_references()
  if plain.model.vit.attention == "fused" or parallel.on_tpu():
    plain.model.vit.attention = "plain"
  for tower in ("vit", "qformer", "decoder"):
    plain.model[tower].remat = "none"
  plain.train.microbatches = 1
  return plain


def model_flops(config, parts: Parts, *arguments) -> float:
  """FLOPs that a step needs, on all devices together, whatever it recomputes.

  Args:
    arguments: of `parts.train_step`; arrays or shapes.
  """
  plain, train_step = undivided(config), parts.train_step
  if plain != config.copy_and_resolve_references():  # else the trace of the step itself is used again
    tokenizer = tokenizers.load_tokenizer(parts.tokenizer_dir)
    graph, *_ = divided(plain, build.abstract(build.maker(config.task, sized(plain, tokenizer), tokenizer)))
    _, train_step = make_step(plain, graph)
  return metrics.step_flops(train_step.trace(*arguments))


def loss_weights(config) -> dict[str, float]:
  """{loss: its weight in the sum}; a loss without one counts once."""
  names = {"student": ("itc", "itm", "lm"), "generative": ("lm",)}.get(config.task, ())
  return {name: config.loss[name] for name in names}


def sized(config, tokenizer) -> StudentConfig | GenerativeConfig:
  """The model's sizes: the config's, and what follows from the tokenizer and from `init.model`."""
  sizes = config.model.to_dict()
  sizes["region_mode"] = config.data.region_mode
  source = checkpoint.load_config(config.init.model)["model"] if config.init.model else None
  if config.task == "generative":
    sizes["decoder"] = decoder_sizes(config, tokenizer, source)
  else:
    sizes["decoder_start"] = tokenizers.token_id(tokenizer, tokenizers.DEC)
    sizes["qformer"]["vocabulary"] = tokenizer.get_vocab_size()
    if source and not config.data.tokenizer:  # its embeddings may have more rows than its tokenizer has words
      sizes["qformer"]["vocabulary"] = source["qformer"]["vocabulary"]
  if source:
    sizes["vision_eps"] = source["vision_eps"]  # of imported weights, LAVIS's or transformers'
  found = build.run_config(config.task, sizes)
  if source:
    ours, theirs = found.vit, VitConfig(**source.get("vit", {}))
    # As many position embeddings in other rows would fit, and mean something else.
    if ours.tokens == theirs.tokens and ours.grid != theirs.grid and not config.init.parts:
      raise DataError(f"model.vit.image_size={ours.image_size}: {config.init.model} was made for "
                      f"{theirs.image_size}; set it to that, or import the weights for the other size")
  if config.data.text_tokens > found.max_tokens:
    raise DataError(f"data.text_tokens={config.data.text_tokens}: this model takes texts of at most "
                    f"{found.max_tokens} tokens; set it to that or less")
  return found


def decoder_sizes(config, tokenizer, source: dict | None) -> dict:
  """The decoder's config: that of `init.model`, or of a new one that fits the tokenizer.

  Raises:
    DataError: `init.model` has a decoder of another kind, or the tokenizer is not its.
  """
  wanted = config.model.decoder.to_dict()
  text = text_encoder(tokenizer, config.data.text_tokens)
  if source and "decoder" in source:
    if source["language_model"] != config.model.language_model:
      raise DataError(f"model.language_model={config.model.language_model}: {config.init.model} has "
                      f"{source['language_model']}; set it to that")
    frame = source["decoder"]["pad"], source["decoder"]["end"]
    if frame != (text.pad, text.end):
      raise DataError(f"the decoder of {config.init.model} pads and ends texts with tokens {frame}, the "
                      f"tokenizer with {text.pad, text.end}; they do not belong together")
    return source["decoder"] | wanted
  start = text.start[0] if text.start else text.pad
  return {"vocabulary": tokenizer.get_vocab_size(), "pad": text.pad, "start": start, "end": text.end} | wanted


def start_weights(config) -> dict | None:
  """The parameters of `init.model` as nested dicts of NumPy arrays; None if a run starts from random ones.

  Raises CheckpointError: no model directory, or damaged.
  """
  if not config.init.model:
    return None
  about, source = checkpoint.load_model(config.init.model)
  # The whole student is one part of a critic.
  return {"student": source} if config.task == "critic" and about["kind"] == "student" else source


def make_objective(config) -> Callable:
  """(model, batch, key) -> losses and metrics, of the config's task."""
  if config.task == "tagger":
    return lambda model, batch, key: losses.words_loss(model, batch, len(tokenizers.SPECIAL_TOKENS))
  if config.task == "critic":
    return losses.critic_loss
  weights = config.loss.to_dict()
  if config.task == "generative":
    if config.model.language_model == "t5" and weights["question"]:
      raise DataError(f"loss.question={weights['question']}: T5 reads questions and writes none; set it "
                      "to 0")
    return lambda model, batch, key: losses.generative_loss(model, batch, weights, key)
  return losses.student_objective(weights)


def check_config(config, mesh) -> None:
  """Raises ValueError or DataError for what is wrong whatever the data are, before anything is written.

  A batch that cannot be divided as asked on this mesh, a warm-up longer than the run, a loss that the
  model does not have, intervals and parts that are none, stored features of a ViT that changes.
  """
  optim.schedule(config.optim)
  make_objective(config)
  train = config.train
  for group, names in (("train", ("log_every", "max_skipped", "microbatches")),
                       ("data", ("batch_size", "statements", "text_tokens"))):
    for name in names:
      if config[group][name] < 1:
        raise DataError(f"{group}.{name}={config[group][name]} must be at least 1")
  checkpoint.check_settings(train.keep, train.save_every, train.keep_best, train.best_metric, train.best_mode)
  parallel.own_rows(mesh, config.data.batch_size)
  images, groups = config.data.batch_size, math.prod(mesh.shape[axis] for axis in parallel.BATCH)
  rows.check_parts(images, groups, train.microbatches, f"train.microbatches={train.microbatches}")
  rows.check_block(images, groups, config.loss.itc_block)
  rows.check_pool(images, config.loss.pool)
  if config.data.cache_features and "vit" not in train.frozen:
    raise DataError("data.cache_features=True needs a ViT that does not change: add 'vit' to train.frozen")


def find_tokenizer(config, workdir: Path, corpus: Corpus) -> Path:
  """The tokenizer directory: the config's, the initial model's, or trained on the corpus."""
  if config.data.tokenizer:
    return Path(config.data.tokenizer)
  if config.init.model:
    return Path(config.init.model) / "tokenizer"
  folder = workdir / "tokenizer"
  # Before config.json is there, it may be what another config left when it was refused.
  mine = (folder / "tokenizer.json").exists() and (workdir / "config.json").exists()
  if not mine and jax.process_index() == 0:
    tokenizers.train_tokenizer(corpus_texts(corpus), folder, config.data.vocabulary)
  checkpoint.barrier("tokenizer is trained")
  return folder


def corpus_texts(corpus: Corpus):
  """Every text of a corpus, as a student reads it."""
  for row in range(len(corpus)):
    record = corpus.record(row)
    yield from record.verbalization.captions
    yield from record.verbalization.local.values()
    for statement in record.statements:
      yield (f"question: {statement.question} answer: {statement.answer} "
             f"rationale: {statement.rationale}")
