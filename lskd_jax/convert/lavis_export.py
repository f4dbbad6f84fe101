"""LAVIS's `.pth` out: what `Blip2Qformer`, `Blip2OPT`, `Blip2T5`, or LSKD's `Blip2Critic` loads.

LAVIS takes a language model from where transformers has it, so that of a generative student stays out.
LAVIS has no place for region tokens, nor for the sizes of a model: they go to a side file,
FILE.lskd.safetensors, with which `lavis.import_lavis` gives the model back as it was.
"""
import functools
import json
from pathlib import Path
import shutil
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from data_pipeline.manifest import sha256
from lskd_jax import checkpoint, trees
from lskd_jax.convert import decoders, lavis, tables, tensors
from lskd_jax.models import build
from lskd_jax.trees import CheckpointError, one_line

SUMS = ".SHA256SUMS"  # what the file with the sums' name ends with
TABLES = {"student": tables.student_table, "critic": tables.critic_table,
          "generative": decoders.generative_table}
POSITION_IDS = "Qformer.bert.embeddings.position_ids"


class Exported(NamedTuple):
  """The file that an export wrote, and what LAVIS will compute otherwise than we do, a line each."""
  file: Path
  notes: list[str]


def export_lavis(model_dir: Path | str, out: Path | str, *, vit: bool = True,
                 progress: bool = True) -> Exported:
  """The model directory of a student or critic -> `torch.save({"model": state})`, in float32.

  Beside it go the side file and FILE.SHA256SUMS. FILE appears last, and only when it is complete.
  Tensors are made one at a time and wait on disk, so that memory holds one and the disk for a
  while both copies.

  Args:
    out: a new file.
    vit: False leaves out the ViT, which LAVIS's own training does not save where it is frozen.

  Raises:
    CheckpointError: no such model directory, damaged, `out` or a file beside it is there already, or
      PyTorch is not installed.
  """
  torch = lavis.pytorch(out)
  model_dir, out = Path(model_dir), Path(out).absolute()
  about = checkpoint.load_config(model_dir)
  kind = about.get("kind")
  if kind not in TABLES:
    raise CheckpointError(f"{model_dir} holds a {kind}; LAVIS has a place for students and critics only")
  files = [out.with_name(out.name + ending) for ending in (lavis.SIDE, SUMS, "")]
  for file in files:
    if file.exists():
      raise CheckpointError(f"{file} is there already: choose another name")
  config = build.model_config(kind, about["model"])
  if not isinstance(config.vit.image_size, int):
    height, width = config.vit.size
    raise CheckpointError(f"{model_dir} sees pictures of {height}x{width} px; LAVIS's position embeddings "
                          "are those of squares")
  table = TABLES[kind](config, tables.lavis_scheme(config))
  reader = trees.LeafReader(model_dir / "params")
  shapes = {name: tuple(entry["shape"]) for name, entry in reader.manifest.items()}
  rest = tables.uncovered(table, shapes)
  rest += [entry.ours for entry in table if entry.layout == "log"]  # whose exponential is rounded
  side = [tensors.Planned(name, shapes[name], np.dtype(np.float32), functools.partial(
      reader.read, name)) for name in rest]
  table = [entry for entry in table if not entry.ours.startswith("decoder/")]
  if not vit:
    table = [entry for entry in table if not entry.theirs.startswith(lavis.VIT)]
  partial = out.with_name(f".{out.name}.partial")
  shutil.rmtree(partial, ignore_errors=True)
  partial.mkdir(parents=True)
  made = [partial / file.name for file in files]
  try:
    digest = tensors.write_safetensors(made[0], side, note={lavis.NOTE: json.dumps(about)})
    state = _on_disk(torch, partial / "tensors", table, reader, progress)
    state |= {key: state[other] for key, other in lavis.TIED.items() if other in state}
    state[POSITION_IDS] = torch.arange(config.qformer.max_tokens)[None]
    notes = _notes(kind, config, table, reader)
    reader.check()
    try:
      torch.save({"model": state}, made[2])
    except RuntimeError as error:
      raise CheckpointError(f"{out} cannot be written ({one_line(error)}); is the disk full?") from None
    made[1].write_text(f"{sha256(made[2])}  {made[2].name}\n{digest}  {made[0].name}\n")
    for file, final in zip(made, files):
      file.rename(final)
  finally:
    shutil.rmtree(partial, ignore_errors=True)
  return Exported(out, notes)


def _on_disk(torch, path: Path, table: list[tables.Entry], reader: trees.LeafReader,
             progress: bool) -> dict:
  """{their key: tensor} of a table. The numbers are written to a file and mapped from there."""
  with path.open("wb") as file:
    for entry in tqdm(table, "export", unit="tensor", disable=not progress, leave=False):
      values = np.asarray(tables.read_theirs(entry, reader), np.float32, order="C")
      file.write(values.reshape(-1).view(np.uint8).data)
  numbers, at, state = np.memmap(path, np.float32, "c"), 0, {}
  for entry in table:
    size = int(np.prod(entry.shape))
    state[entry.theirs] = torch.from_numpy(numbers[at:at + size].reshape(entry.shape))
    at += size
  return state


def _notes(kind: str, config, table: list[tables.Entry], reader: trees.LeafReader) -> list[str]:
  notes = []
  if kind == "generative":
    notes.append("the language model is left out, as LAVIS does; --decoder DIR gives it back to an import")
  if config.vision_eps != lavis.VISION_EPS:
    notes.append(f"ln_vision was trained with eps {config.vision_eps:g}; LAVIS computes it with "
                 f"{lavis.VISION_EPS:g}")
  without_key = [entry for entry in table if entry.theirs.endswith("attn.q_bias")]
  if any(reader.read(entry.ours, entry.at[0])[1].any() for entry in without_key):
    notes.append("the ViT's key biases are left out, since LAVIS has none; after the softmax they "
                 "change nothing")
  return notes
