"""transformers' BLIP-2 in and out: folders that `from_pretrained` reads and `save_pretrained` writes.

What transformers has no place for (region tokens, the language head, ITC's temperature) travels in
a side file, `lskd.safetensors`, under our names; with it, a student comes back bit for bit, and
`modeling_lskd.py`, which travels along, runs it in PyTorch.
"""
import dataclasses
import functools
import json
from pathlib import Path
import shutil

import ml_dtypes
import numpy as np
from tqdm import tqdm

from data_pipeline import tokenizer as tokenizers
from data_pipeline.manifest import sha256
from lskd_jax import checkpoint, trees
from lskd_jax.convert import decoders, hf_configs, tables, tensors
from lskd_jax.convert.hf_configs import CODE, SIDE_FILE
from lskd_jax.convert.model_directory import Imported, tokenizer_files, write_model
from lskd_jax.models import build
from lskd_jax.models.vit import VitConfig
from lskd_jax.trees import CheckpointError

TABLE = "table/"  # of the side file: what follows from the tokenizer, for modeling_lskd.py
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
FLOAT32_PARTS = ("query_tokens", "qformer.")  # transformers keeps these in float32 in any export


# --- in ------------------------------------------------------------------------------------------


def import_hf(source: Path | str, out: Path | str, *, image_size: int | tuple[int, int] | None = None,
              max_regions: int = 8, seed: int = 0, progress: bool = True) -> Imported:
  """A folder of a BLIP-2 -> a model directory.

  `Blip2ForImageTextRetrieval` makes a student, `Blip2ForConditionalGeneration` and `Blip2Model` with
  OPT or T5 a generative student.

  Args:
    source: config.json, safetensors, and the tokenizer's files.
    out: the model directory.
    image_size: of the student's pictures, px: a side or (height, width); None = as the source.
      Position embeddings are stretched to it.
    max_regions: slots of the student; the source's side file, where there is one, has its own.
    seed: of the parameters that the source does not have.

  Raises:
    CheckpointError, DataError: one line that names the file, key or setting; nothing is written.
  """
  source = Path(source)
  found = tensors.read_folder(source)
  kind = "student" if not any(key.startswith("language_") for key in found) else "generative"
  config = hf_configs.read_config(source, kind, max_regions)
  table, ignored = make_table(kind, config)
  tables.check(table, {key: tensor.shape for key, tensor in found.items()}, ignored, source)
  side = source / SIDE_FILE
  extra = tensors.read_safetensors(side) if side.exists() else {}
  extra = {name: tensor for name, tensor in extra.items() if not name.startswith(TABLE)}
  return write_model(kind, config, table, found, out, tokenizer_dir=source, own=extra,
                     image_size=image_size, seed=seed, progress=progress)


def make_table(kind: str, config) -> tuple[list[tables.Entry], tuple[str, ...]]:
  """The table of a kind of model in transformers' names, and the keys that hold nothing to load."""
  if kind == "student":
    return tables.student_table(config, tables.HF), tables.HF.ignored
  return decoders.generative_table(config), decoders.decoder_ignored(config, "language_model.")


# --- out -----------------------------------------------------------------------------------------


def export_hf(model_dir: Path | str, out: Path | str, *, dtype: str = "float32",
              progress: bool = True) -> Path:
  """A model directory of a student of either kind -> a folder that transformers' BLIP-2 reads.

  The class is `Blip2ForImageTextRetrieval`, or with a decoder `Blip2ForConditionalGeneration`. Beside
  it go the side file, the tokenizer, the image processor's settings, a model card and SHA256SUMS.
  Nothing appears under `out` before it is complete.

  Args:
    dtype: of the tensors; queries and Q-Former stay float32, as transformers stores them.

  Raises:
    CheckpointError: no student's model directory, damaged, a ViT that transformers' BLIP-2 has no
      place for (CLIP's, or pictures that are no squares), or `out` holds other files.
  """
  model_dir, out = Path(model_dir), Path(out).absolute()
  if dtype not in DTYPES:
    raise CheckpointError(f"dtype {dtype!r} is unknown: choose {', '.join(DTYPES)}")
  about = checkpoint.load_config(model_dir)
  kind = about.get("kind")
  if kind not in hf_configs.CLASSES:
    raise CheckpointError(f"{model_dir} holds a {kind}; transformers has a place for students only")
  if out.exists() and any(out.iterdir()):
    raise CheckpointError(f"{out} holds files: choose a new or empty folder")
  config = build.model_config(kind, about["model"])
  _check_vit(config.vit, model_dir)
  table, _ = make_table(kind, config)
  reader = trees.LeafReader(model_dir / "params")
  shapes = {name: tuple(entry["shape"]) for name, entry in reader.manifest.items()}
  rest = tables.uncovered(table, shapes)
  partial = out.parent / f".{out.name}.partial"
  shutil.rmtree(partial, ignore_errors=True)
  partial.mkdir(parents=True)
  try:
    planned = [tensors.Planned(entry.theirs, entry.shape, kept_as(entry.theirs, dtype),
                               functools.partial(tables.read_theirs, entry, reader)) for entry in table]
    bar = functools.partial(tqdm, desc="export", unit="tensor", disable=not progress, leave=False)
    digests = tensors.write_folder(partial, planned, progress=bar)
    side = [tensors.Planned(name, shapes[name], np.dtype(np.float32),
                            functools.partial(reader.read, name)) for name in rest]
    tokenizer = tokenizers.load_tokenizer(model_dir / "tokenizer")
    found = build.mention_tables(kind, config, tokenizer)
    side += [tensors.Planned(TABLE + name, values.shape, np.dtype(np.int32), functools.partial(
        np.asarray, values, np.int32)) for name, values in zip(("opens_bracket", "digit"), found)]
    digests[SIDE_FILE] = tensors.write_safetensors(partial / SIDE_FILE, side)
    reader.check()
    for file in [*tokenizer_files(model_dir / "tokenizer"), Path(__file__).with_name(CODE)]:
      shutil.copy(file, partial)
    _write_settings(partial, kind, config, tokenizer.get_vocab_size(), dtype)
    for file in partial.iterdir():
      if file.name not in digests:  # the small ones; weights were summed up as they were written
        digests[file.name] = sha256(file)
    sums = "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items()))
    (partial / "SHA256SUMS").write_text(sums)
    if out.exists():
      out.rmdir()
    partial.rename(out)
  finally:
    shutil.rmtree(partial, ignore_errors=True)
  return out


def _write_settings(folder: Path, kind: str, config, words: int, dtype: str) -> None:
  """The JSON files and the model card. words: how many the tokenizer has."""
  settings = {"preprocessor_config.json": hf_configs.image_processor(config)}
  if kind == "generative":
    if config.image_token is None and words < config.decoder.vocabulary:
      config = dataclasses.replace(config, image_token=words)  # where Blip2Processor will put it
    settings["generation_config.json"] = hf_configs.generation_config(config.decoder)
    settings["processor_config.json"] = hf_configs.processor_config(config)
  settings["config.json"] = hf_configs.write_config(kind, config, dtype)
  for name, values in settings.items():
    (folder / name).write_text(json.dumps(values, indent=2) + "\n")
  (folder / "README.md").write_text(hf_configs.model_card(kind, config))


def _check_vit(vit: VitConfig, model_dir: Path) -> None:
  """Raises CheckpointError for a ViT that transformers' BLIP-2 has no place for."""
  if vit.input_norm or not vit.patch_bias:
    raise CheckpointError(f"{model_dir} has CLIP's ViT (a norm before its blocks, patches without bias), "
                          "which transformers' BLIP-2 cannot hold")
  if not isinstance(vit.image_size, int):
    height, width = vit.size
    raise CheckpointError(f"{model_dir} sees pictures of {height}x{width} px; transformers' BLIP-2 holds "
                          "position embeddings of squares only")


def kept_as(key: str, dtype: str) -> np.dtype:
  """The dtype that an export in `dtype` gives a tensor."""
  return np.dtype(np.float32 if key.startswith(FLOAT32_PARTS) else DTYPES[dtype])
