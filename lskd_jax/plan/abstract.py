"""The train step of a config without a corpus, weights or devices that run: shapes, dtypes, shardings."""
from typing import NamedTuple

import jax
from jax.sharding import AbstractMesh, AxisType, NamedSharding

from data_pipeline import tokenizer as tokenizers
from lskd_jax import batches, parallel, prepare, step
from lskd_jax.frozen_dtype import narrowed
from lskd_jax.models import build
from lskd_jax.models.generative import DECODERS
from lskd_jax.models.qformer import QFormerConfig
from lskd_jax.plan import files


class AbstractStep(NamedTuple):
  """A train step and its arguments as shapes.

  arguments: (state, frozen, batch, run key), each leaf a ShapeDtypeStruct with its sharding.
  notes: what was assumed because a file is not here, one sentence each.
  """
  train_step: object
  arguments: tuple
  notes: tuple[str, ...]

  def trace(self):
    """The traced step: `.jaxpr`, `.lower()`."""
    return self.train_step.trace(*self.arguments)


def abstract_step(config, mesh) -> AbstractStep:
  """What `train.train` would run for a config on a mesh, or an abstract mesh.

  Raises DataError, ValueError: as `train.train` does about the config.
  """
  config, tokenizer, notes = known(config)
  model_config = prepare.sized(config, tokenizer)
  make = build.maker(config.task, model_config, tokenizer)
  with jax.sharding.use_abstract_mesh(getattr(mesh, "abstract_mesh", mesh)):
    with prepare.widths_divided():
      model = build.abstract(make)
    graph, params, frozen = prepare.divided(config, model)
    frozen = jax.eval_shape(lambda frozen: narrowed(graph, params, frozen, config.train.frozen_dtype), frozen)
    tx, train_step = prepare.make_step(config, graph)
    state = jax.eval_shape(lambda p: step.init_state(p, tx), params)
    key = jax.eval_shape(lambda: jax.random.key(0))
  laid_out = lambda tree: parallel.abstract_like(tree, mesh)
  batch = {name: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, parallel.ACT_B))
           for name, (shape, dtype) in batch_shapes(config, model_config).items()}
  return AbstractStep(_Within(train_step, mesh), (laid_out(state), laid_out(frozen), batch, laid_out(key)),
                      notes)


class _Within:
  """A jitted function that is traced with a mesh in use."""

  def __init__(self, function, mesh):
    self.function, self.mesh = function, getattr(mesh, "abstract_mesh", mesh)

  def trace(self, *arguments):
    with jax.sharding.use_abstract_mesh(self.mesh):
      return self.function.trace(*arguments)


def one_device_mesh() -> AbstractMesh:
  """A mesh of one device of no kind: for counting what a step needs, however it is divided."""
  axes = parallel.AXES
  return AbstractMesh((1,) * len(axes), axes, axis_types=(AxisType.Explicit,) * len(axes))


def known(config):
  """The config with what is not here replaced, the tokenizer or a stand-in, and notes about both."""
  config, notes = config.copy_and_resolve_references(), []
  model, there, folder = config.init.model, files.model_config(config), files.tokenizer_folder(config)
  if model and not there:
    notes.append(f"init.model={model} is not here: the published sizes are assumed")
    config.init.model = ""
  if folder:
    return config, tokenizers.load_tokenizer(folder), tuple(notes)
  config.data.tokenizer = ""
  size = vocabulary(config, published=bool(model) and not there)
  if not model:
    notes.append(f"there is no tokenizer yet: a vocabulary of {size}, data.vocabulary, is assumed")
  return config, tokenizers.stand_in(size), tuple(notes)


def vocabulary(config, published: bool) -> int:
  """How many words a stand-in tokenizer has: those of the published models, or of one trained on a corpus."""
  if not published:
    return config.data.vocabulary
  if config.task == "generative":
    decoder = config.model.decoder.to_dict()
    return decoder.get("vocabulary") or DECODERS[config.model.language_model][0]().vocabulary
  return QFormerConfig().vocabulary


def batch_shapes(config, model_config) -> dict:
  """{name: (shape, dtype)} of the batch a step takes: the loader's, with cached features and judgements."""
  options = batches.loader_options(config)
  images, texts, regions = options.batch_size, options.statements, options.max_regions
  shapes = {
      "image_id": ((images,), "int32"),
      "boxes": ((images, regions, 4), "float32"),
      "region_valid": ((images, regions), "bool"),
      "tokens": ((images, texts, options.text_tokens), "int32"),
      "fields": ((images, texts, options.text_tokens), "int8"),
      "statement": ((images, texts), "int32"),
      "statement_valid": ((images, texts), "bool"),
  }
  vit = model_config.vit
  if options.images:
    shapes["image"] = ((images, *vit.size, 3), "uint8")
  else:
    shapes["features"] = ((images, vit.tokens, vit.width), "float32")  # as features.py stores them
  if config.task == "critic":
    shapes |= {"accept": ((images, texts), "int32"), "answer_score": ((images, texts), "float32"),
               "rationale_score": ((images, texts), "float32")}
  return shapes
