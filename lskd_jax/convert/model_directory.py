"""A model directory from tensors of PyTorch, whatever the names they come under."""
from collections.abc import Callable, Iterator
import dataclasses
import functools
from pathlib import Path
import shutil
import tempfile
from typing import NamedTuple

from flax import nnx
import jax
import numpy as np
from tqdm import tqdm

from data_pipeline import tokenizer as tokenizers
from lskd_jax import checkpoint, parallel, trees
from lskd_jax.convert import tables
from lskd_jax.convert.positions import resize_positions
from lskd_jax.convert.tensors import Tensor
from lskd_jax.models import build
from lskd_jax.models.generative import GenerativeConfig
from lskd_jax.models.student import StudentConfig
from lskd_jax.streams import Streamed
from lskd_jax.trees import CheckpointError

POSITIONS = "vit/positions"


class Imported(NamedTuple):
  """What an import made: the model directory, our leaves that the source had nothing for, its kind."""
  model: Path
  fresh: list[str]
  kind: str


def write_model(kind: str, config: StudentConfig | GenerativeConfig, table: list[tables.Entry],
                found: dict[str, Tensor], out: Path | str, *, tokenizer_dir: Path,
                own: dict[str, Tensor] | None = None,
                image_size: int | tuple[int, int] | None = None, seed: int = 0,
                progress: bool = True) -> Imported:
  """Writes the model directory of a model whose leaves are filled from PyTorch's tensors.

  Every leaf is made while it is written, so memory holds a tensor and a few pieces of leaves.

  Args:
    kind: student, generative or critic.
    config: of the source; the model's, but for the image size and the start token of its tokenizer.
    table, found: what `tables.check` has compared.
    own: whole leaves under our own names.
    image_size: of the student's pictures, px: a side or (height, width); None = as the source.
    seed: of the leaves that neither has.
  """
  checkpoint.refuse_other_folder(out)  # before minutes of work
  tokenizer = tokenizers.load_tokenizer(tokenizer_dir)
  if kind != "generative":
    config = dataclasses.replace(config, decoder_start=tokenizers.token_id(tokenizer, tokenizers.DEC))
  positions = next(entry.ours for entry in table if entry.ours.endswith(POSITIONS))
  source = config.vit
  source_positions = (source.tokens, source.width)
  if image_size is not None:
    config = dataclasses.replace(config, vit=dataclasses.replace(source, image_size=image_size))
  make = build.maker(kind, config, tokenizer)
  with jax.set_mesh(parallel.make_mesh(devices=jax.local_devices()[:1])):
    state = nnx.split(build.abstract(make))[1].filter(nnx.Param)
    shapes = {name: leaf.shape for name, leaf in trees.named_leaves(state).items()}
    own, rest = own or {}, tables.uncovered(table, {**shapes, positions: source_positions})
    odd = [name for name in own if name not in rest or own[name].shape != shapes[name]]
    if odd:
      raise CheckpointError(f"the side file does not fit this model: {trees.listed(odd)}")
    fresh = [name for name in rest if name not in own]
    entries: dict[str, list[tables.Entry]] = {}
    for entry in table:
      entries.setdefault(entry.ours, []).append(entry)
    with tqdm(desc="import", total=len(table), unit="tensor", disable=not progress,
              leave=False) as bar, tempfile.TemporaryDirectory() as words:
      def read(entry: tables.Entry) -> np.ndarray:
        bar.update()
        tensor = found[entry.theirs].read()
        if entry.ours == positions:
          tensor = resize_positions(tensor.reshape(source_positions), source.grid, config.vit.grid)
        return tensor
      parts = {name: functools.partial(_filled, shapes[name], entries[name], read) for name in entries}
      parts |= {name: functools.partial(_slices, tensor.read) for name, tensor in own.items()}
      parts |= {name: functools.partial(_slices, lambda values=values: values)
                for name, values in _initial(make, fresh, seed).items()}
      leaves = {name: Streamed(shape, np.dtype(np.float32), parts[name])
                for name, shape in shapes.items()}
      for file in tokenizer_files(tokenizer_dir):
        shutil.copy(file, words)
      checkpoint.save_model(out, build.describe(kind, config), trees.nest(leaves), words)
  return Imported(Path(out).absolute(), fresh, kind)


def _filled(shape: tuple[int, ...], entries: list[tables.Entry], read: Callable,
            rows: int) -> Iterator[np.ndarray]:
  """A leaf that the table fills, so many rows at a time; what no tensor fills is 0."""
  if not entries[0].at:
    yield from _slices(lambda: tables.to_ours(entries[0], read(entries[0]), shape), rows)
    return
  for start in range(0, shape[0], rows):
    stack = np.zeros((min(rows, shape[0] - start), *shape[1:]), np.float32)
    for entry in entries:
      if start <= entry.at[0] < start + rows:
        part = stack[(entry.at[0] - start, *entry.at[1:], ...)]
        part[...] = tables.to_ours(entry, read(entry), part.shape)
    yield stack


def _slices(read: Callable[[], np.ndarray], rows: int) -> Iterator[np.ndarray]:
  """A whole leaf, so many rows at a time."""
  values = read()
  yield from (values[k:k + rows] for k in range(0, len(values), rows)) if values.ndim else [values]


def _initial(make: Callable, names: list[str], seed: int) -> dict[str, np.ndarray]:
  """Fresh values of some leaves; what is not asked for is not computed."""
  @jax.jit
  def init(key):
    named = trees.named_leaves(nnx.split(make(nnx.Rngs(key)))[1].filter(nnx.Param))
    return {name: named[name] for name in names}
  return jax.device_get(init(jax.random.key(seed)))


def tokenizer_files(folder: Path) -> list[Path]:
  """The files of a folder that make its tokenizer."""
  names = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json",
           "vocab.json", "merges.txt", "spiece.model", "added_tokens.json")
  return [Path(folder, name) for name in names if Path(folder, name).exists()]
