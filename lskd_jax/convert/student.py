"""A model directory from tensors of PyTorch, whatever the names they come under."""
from collections.abc import Callable
import dataclasses
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
  """Fills a model's leaves from PyTorch's tensors and writes its model directory.

  The leaves are files while they are filled, so memory holds a tensor at a time.

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
  with jax.set_mesh(parallel.make_mesh((1, 1), jax.local_devices()[:1])):
    state = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))[1].filter(nnx.Param)
    shapes = {name: leaf.shape for name, leaf in trees.named_leaves(state).items()}
    own, rest = own or {}, tables.uncovered(table, {**shapes, positions: source_positions})
    odd = [name for name in own if name not in rest or own[name].shape != shapes[name]]
    if odd:
      raise CheckpointError(f"the side file does not fit this model: {trees.listed(odd)}")
    fresh = [name for name in rest if name not in own]
    out = Path(out).absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as folder:
      leaves = {name: np.lib.format.open_memmap(f"{folder}/{k}.npy", "w+", np.float32, shape)
                for k, (name, shape) in enumerate(shapes.items())}
      for entry in tqdm(table, "import", unit="tensor", disable=not progress, leave=False):
        tensor = found[entry.theirs].read()
        part = leaves[entry.ours][(*entry.at, ...)]
        if entry.ours == positions:
          part[...] = resize_positions(tensor.reshape(source_positions), source.grid, config.vit.grid)
        else:
          part[...] = tables.to_ours(entry, tensor, part.shape)
      for name, tensor in own.items():
        leaves[name][...] = tensor.read()
      for name, values in _initial(make, fresh, seed).items():
        leaves[name][...] = values
      words = Path(folder, "tokenizer")
      words.mkdir()
      for file in tokenizer_files(tokenizer_dir):
        shutil.copy(file, words)
      checkpoint.save_model(out, build.describe(kind, config), trees.nest(leaves), words)
  return Imported(out, fresh, kind)


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
