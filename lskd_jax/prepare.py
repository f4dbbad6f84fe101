"""From a config to the parts of a run: sizes, tokenizer, loader, objective; and who owns a work directory."""
from collections.abc import Callable
import json
from pathlib import Path

import jax

from data_pipeline import tokenizer as tokenizers
from data_pipeline.corpus import Corpus
from data_pipeline.examples import LoaderOptions
from data_pipeline.records import DataError
from data_pipeline.stages import write_json
from data_pipeline.texts import text_encoder
from lskd_jax import checkpoint, losses
from lskd_jax.models import build
from lskd_jax.models.generative import GenerativeConfig
from lskd_jax.models.student import StudentConfig
from lskd_jax.models.vit import VitConfig


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
    if config.train.microbatches > 1:
      raise DataError(f"train.microbatches={config.train.microbatches}: a tagger learns the words of "
                      "all texts of a picture together; set it to 1")
    return lambda model, batch, key: losses.words_loss(model, batch, len(tokenizers.SPECIAL_TOKENS))
  if config.task == "critic":
    return losses.critic_loss
  weights = config.loss.to_dict()
  if config.task == "generative":
    if config.model.language_model == "t5" and weights["question"]:
      raise DataError(f"loss.question={weights['question']}: T5 reads questions and writes none; set it "
                      "to 0")
    return lambda model, batch, key: losses.generative_loss(model, batch, weights, key)
  return lambda model, batch, key: losses.student_loss(model, batch, weights, key)


def loader_options(config) -> LoaderOptions:
  """The loader's options: the config's `data` group where the names agree."""
  data = config.data
  names = ("batch_size", "statements", "text_tokens", "region_mode", "shuffle_slots", "distractors",
           "rationale_dropout", "augment")
  return LoaderOptions(**{name: data[name] for name in names}, texts=data.texts.to_dict(),
                       max_regions=config.model.max_regions,
                       image_size=config.model.vit.image_size, images=not data.cache_features)


def find_tokenizer(config, workdir: Path, corpus: Corpus) -> Path:
  """The tokenizer directory: the config's, the initial model's, or trained on the corpus."""
  if config.data.tokenizer:
    return Path(config.data.tokenizer)
  if config.init.model:
    return Path(config.init.model) / "tokenizer"
  folder = workdir / "tokenizer"
  if not (folder / "tokenizer.json").exists() and jax.process_index() == 0:
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


def claim(config, workdir: Path, write: bool = False) -> None:
  """Refuses a work directory of another config; with `write`, keeps the config of a new one.

  It is written once the data and the model are there, so a mistyped path claims nothing.
  """
  wanted = json.loads(config.to_json_best_effort())
  path = workdir / "config.json"
  if path.exists():
    theirs = json.loads(path.read_text())
    if theirs != wanted:
      key = first_difference(theirs, wanted)
      raise DataError(f"{path}: this run was started with another {key}; use another --workdir, or "
                      "the same config")
  elif write and jax.process_index() == 0:
    workdir.mkdir(parents=True, exist_ok=True)
    write_json(path, wanted)


def count_start(workdir: Path) -> int:
  """How often the run of this work directory was started again; counts this start. 0 on process > 0."""
  if jax.process_index() > 0:
    return 0
  path = workdir / "restarts.json"
  restarts = json.loads(path.read_text())["restarts"] + 1 if path.exists() else 0
  write_json(path, {"restarts": restarts})
  return restarts


def first_difference(a, b, path: str = "config") -> str:
  """The dotted name of the first key in which two nested dicts differ."""
  if isinstance(a, dict) and isinstance(b, dict):
    for key in sorted(set(a) | set(b)):
      if a.get(key) != b.get(key):
        return first_difference(a.get(key), b.get(key), f"{path}.{key}")
  return path


