"""Model directories to models and back: the one place that knows the kinds of model there are.

  tagger      a ViT with a word classifier (pre-training of the ViT)
  student     the discriminative student
  generative  the generative student: with a decoder
  critic      a student with the critic's three heads
"""
from collections.abc import Callable
import dataclasses
from pathlib import Path
from typing import NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

from data_pipeline import tokenizer as tokenizers
from data_pipeline.records import DataError
from lskd_jax import checkpoint, parallel
from lskd_jax.models.critic import Critic
from lskd_jax.models.generative import GenerativeConfig, GenerativeStudent, generative_config
from lskd_jax.models.student import Student, StudentConfig, Table, Tagger, student_config

STUDENTS = ("student", "generative")  # the kinds that score texts and write them
KINDS = ("tagger", *STUDENTS, "critic")
# Fields of a run's `model` that belong to one of the two configs alone.
_STUDENTS = ("embed", "temperature", "decoder_start")
_GENERATIVES = ("language_model", "decoder", "prompt")


class Model(NamedTuple):
  """A loaded model: `nnx.merge(graph, state)` is the module."""
  kind: str
  config: StudentConfig | GenerativeConfig
  graph: nnx.GraphDef
  state: nnx.State
  tokenizer: Tokenizer


def model_config(kind: str, config: dict) -> StudentConfig | GenerativeConfig:
  """The config of a kind of model from nested plain dicts; ValueError naming an unknown key."""
  return (generative_config if kind == "generative" else student_config)(config)


def run_config(kind: str, sizes: dict) -> StudentConfig | GenerativeConfig:
  """As `model_config`, from the `model` of a run's config, which has the fields of all kinds."""
  others = _STUDENTS if kind == "generative" else _GENERATIVES
  return model_config(kind, {name: value for name, value in sizes.items() if name not in others})


def maker(kind: str, config: StudentConfig | GenerativeConfig, tokenizer: Tokenizer) -> Callable:
  """rngs -> module. Raises ValueError for an unknown kind, DataError for an unfit tokenizer."""
  tables = mention_tables(kind, config, tokenizer)
  if kind == "tagger":
    return lambda rngs: Tagger(config, *tables, rngs)
  if kind == "student":
    return lambda rngs: Student(config, *tables, rngs)
  if kind == "generative":
    return lambda rngs: GenerativeStudent(config, *tables, rngs)
  if kind == "critic":
    return lambda rngs: Critic(Student(config, *tables, rngs), rngs)
  raise ValueError(f"task {kind!r} is unknown: choose {', '.join(KINDS)}")


def mention_tables(kind: str, config, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
  """The tokenizer's mention tables; a decoder's word embeddings often have rows to spare for them.

  Raises DataError: an unfit tokenizer, or one with ids that the decoder has no row for.
  """
  opens_bracket, digit = tokenizers.mention_tables(tokenizer, config.max_regions)
  if kind != "generative":
    return opens_bracket, digit
  spare = config.decoder.vocabulary - len(digit)
  if spare < 0:
    raise DataError(f"the tokenizer has {len(digit)} ids, the decoder embeddings for "
                    f"{config.decoder.vocabulary}; they do not belong together")
  return np.pad(opens_bracket, (0, spare)), np.pad(digit, (0, spare), constant_values=-1)


def abstract(make: Callable) -> nnx.Module:
  """What `make` would make, with shapes in place of arrays: nothing is computed."""
  return nnx.eval_shape(lambda: make(nnx.Rngs(0)))


def initialize(make: Callable, seed: int):
  """Graph definition and freshly initialised state, made on the mesh in use under one jit."""
  graph, _ = nnx.split(abstract(make))
  state = jax.jit(lambda key: nnx.split(make(nnx.Rngs(key)))[1])(jax.random.key(seed))
  return graph, state


def save(directory, kind: str, config, state: nnx.State, tokenizer_dir) -> None:
  """Writes a model directory."""
  checkpoint.save_model(directory, describe(kind, config), state.filter(nnx.Param), tokenizer_dir)


def describe(kind: str, config: StudentConfig | GenerativeConfig) -> dict:
  """The config.json of a model directory."""
  return {"format": 1, "kind": kind, "model": dataclasses.asdict(config)}


def load(directory) -> Model:
  """Reads a model directory onto the mesh in use.

  Raises:
    CheckpointError: not a model directory, damaged, or of another format.
  """
  about = checkpoint.load_config(directory)
  if about.get("format") != 1 or about.get("kind") not in KINDS:
    raise checkpoint.CheckpointError(
        f"{directory}/config.json: format {about.get('format')!r}, kind {about.get('kind')!r}; this "
        f"version reads format 1 of {', '.join(KINDS)}")
  config = model_config(about["kind"], about["model"])
  tokenizer = tokenizers.load_tokenizer(Path(directory) / "tokenizer")
  make = maker(about["kind"], config, tokenizer)
  graph, state = nnx.split(abstract(make))
  _, params = checkpoint.load_model(directory, state.filter(nnx.Param))
  tables = mention_tables(about["kind"], config, tokenizer)
  constants = state.filter(Table)
  for path, leaf in nnx.to_flat_state(constants):
    leaf.set_value(jnp.asarray(tables[0] if path[-1] == "opens_bracket" else tables[1]))
  return Model(about["kind"], config, graph, nnx.merge_state(constants, params), tokenizer)


def copy_parts(state: nnx.State, source: dict, parts: tuple[str, ...]) -> nnx.State:
  """`state` with the named top-level parts taken from another model's parameters.

  Args:
    source: nested dict of numpy arrays, as `checkpoint.load_model(directory)` returns it.
    parts: names such as "vit"; () takes every part that both have.

  Raises:
    CheckpointError: a part is missing in either, or its parameters differ in name or shape.
  """
  ours = {tuple(map(str, path)): leaf for path, leaf in nnx.to_flat_state(state.filter(nnx.Param))}
  theirs = dict(_flatten(source))
  names = parts or sorted({path[0] for path in ours} & {path[0] for path in theirs})
  if not names:
    raise checkpoint.CheckpointError(
        f"init.model has no part of this model: it has {', '.join(sorted(source))}; wanted are "
        f"{', '.join(sorted({path[0] for path in ours}))}")
  for name in names:
    wanted = {path: leaf for path, leaf in ours.items() if path[0] == name}
    given = {path: value for path, value in theirs.items() if path[0] == name}
    if not wanted or not given:
      raise checkpoint.CheckpointError(f"init.parts: there is no part {name!r} to copy; the source "
                                       f"has {', '.join(sorted(source))}")
    odd = sorted(set(wanted) ^ set(given)) or [
        path for path in wanted if wanted[path][...].shape != given[path].shape]
    if odd:
      raise checkpoint.CheckpointError(
          f"init.model does not fit: {'/'.join(odd[0])} is missing or of another shape "
          f"({len(odd)} such); use the model sizes of that directory's config.json")
    for path, leaf in wanted.items():
      leaf[...] = parallel.put_whole(np.asarray(given[path]), leaf[...].sharding)
  return state


def _flatten(tree: dict, path: tuple[str, ...] = ()):
  for name, value in tree.items():
    if isinstance(value, dict):
      yield from _flatten(value, (*path, str(name)))
    else:
      yield (*path, str(name)), value
