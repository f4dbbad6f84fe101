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
import lskd_jax
from lskd_jax import checkpoint, trees
from lskd_jax.convert import tables, tensors
from lskd_jax.convert.student import Imported, tokenizer_files, write_model
from lskd_jax.models.layers import ACTIVATIONS
from lskd_jax.models.qformer import QFormerConfig
from lskd_jax.models.student import StudentConfig, student_config
from lskd_jax.models.vit import PIXEL_MEAN, PIXEL_STD, VitConfig
from lskd_jax.trees import CheckpointError, one_line

SIDE_FILE = "lskd.safetensors"
CODE = "modeling_lskd.py"  # what runs the side file in PyTorch
TABLE = "table/"           # of the side file: what follows from the tokenizer, for that code
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
FLOAT32_PARTS = ("query_tokens", "qformer.")  # transformers keeps these in float32 in any export


# --- in ------------------------------------------------------------------------------------------


def import_hf(source: Path | str, out: Path | str, *, image_size: int | tuple[int, int] | None = None,
              max_regions: int = 8, seed: int = 0, progress: bool = True) -> Imported:
  """A folder of `Blip2ForImageTextRetrieval` -> a model directory of a student.

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
  config = student_config_of(source, max_regions)
  found = tensors.read_folder(source)
  table = tables.student_table(config, tables.HF)
  if "itm_head.weight" not in found and any(key.startswith("language_model.") for key in found):
    raise CheckpointError(f"{source} is a BLIP-2 that generates (language_model.*); a student is made "
                          "from one that matches: Blip2ForImageTextRetrieval")
  tables.check(table, {key: tensor.shape for key, tensor in found.items()}, tables.HF.ignored, source)
  side = source / SIDE_FILE
  extra = tensors.read_safetensors(side) if side.exists() else {}
  extra = {name: tensor for name, tensor in extra.items() if not name.startswith(TABLE)}
  return write_model("student", config, table, found, out, tokenizer_dir=source, own=extra,
                     image_size=image_size, seed=seed, progress=progress)


def student_config_of(source: Path, max_regions: int) -> StudentConfig:
  """The sizes that a transformers config.json describes; the side file's note has the rest."""
  path = source / "config.json"
  try:
    about = json.loads(path.read_text())
    if about.get("model_type") != "blip-2":
      raise CheckpointError(f"{path}: model_type is {about.get('model_type')!r}, not 'blip-2'")
    vision, qformer = about["vision_config"], about["qformer_config"]
    for part, name, known in ((vision, "vision_config", tuple(ACTIVATIONS)),
                              (qformer, "qformer_config", ("gelu",))):
      if part["hidden_act"] not in known:
        raise CheckpointError(f"{path}: {name}.hidden_act is {part['hidden_act']!r}; only "
                              f"{' and '.join(known)} are computed here")
    config = StudentConfig(
        vit=VitConfig(
            image_size=_side(vision["image_size"], path), patch=_side(vision["patch_size"], path),
            width=vision["hidden_size"], depth=vision["num_hidden_layers"],
            heads=vision["num_attention_heads"], hidden=vision["intermediate_size"],
            eps=vision["layer_norm_eps"], activation=vision["hidden_act"]),
        qformer=QFormerConfig(
            vocabulary=qformer["vocab_size"], width=qformer["hidden_size"],
            depth=qformer["num_hidden_layers"], heads=qformer["num_attention_heads"],
            hidden=qformer["intermediate_size"], queries=about["num_query_tokens"],
            cross_every=qformer["cross_attention_frequency"],
            max_tokens=qformer["max_position_embeddings"], eps=qformer["layer_norm_eps"],
            dropout=qformer["hidden_dropout_prob"]),
        embed=about["image_text_hidden_size"], max_regions=max_regions,
        vision_eps=vision["layer_norm_eps"])
    ours = about.get("lskd")
    config = config if ours is None else dataclasses.replace(config, **ours)
    for name, part in (("vision_config", config.vit), ("qformer_config", config.qformer)):
      if part.width % part.heads:
        raise CheckpointError(f"{path}: {name}: {part.heads} heads do not divide hidden_size="
                              f"{part.width}")
    return config
  except OSError:
    raise CheckpointError(f"{source} is no transformers folder: it has no config.json") from None
  except KeyError as error:
    raise CheckpointError(f"{path} has no {error.args[0]!r}; was it written by transformers 4.50 or "
                          "newer?") from None
  except CheckpointError:
    raise
  except (ValueError, TypeError) as error:
    raise CheckpointError(f"{path} cannot be used: {one_line(error)}") from None


def _side(size, path: Path) -> int:
  """One side of a square given as a number or as [height, width]."""
  sides = set(size) if isinstance(size, list) else {size}
  if len(sides) > 1:
    raise CheckpointError(f"{path}: {size} is not square; only square images and patches are read")
  return sides.pop()


# --- out -----------------------------------------------------------------------------------------


def export_hf(model_dir: Path | str, out: Path | str, *, dtype: str = "float32",
              progress: bool = True) -> Path:
  """A student's model directory -> a folder that `Blip2ForImageTextRetrieval.from_pretrained` reads.

  Beside it go the side file, the tokenizer, the image processor's settings, a model card and
  SHA256SUMS. Nothing appears under `out` before it is complete.

  Args:
    dtype: of the tensors; queries and Q-Former stay float32, as transformers keeps them.

  Raises:
    CheckpointError: no student's model directory, damaged, a ViT that transformers' BLIP-2 has no
      place for (CLIP's, or pictures that are no squares), or `out` holds other files.
  """
  model_dir, out = Path(model_dir), Path(out).absolute()
  if dtype not in DTYPES:
    raise CheckpointError(f"dtype {dtype!r} is unknown: choose {', '.join(DTYPES)}")
  about = checkpoint.load_config(model_dir)
  if about.get("kind") != "student":
    raise CheckpointError(f"{model_dir} holds a {about.get('kind')}; transformers has a place for "
                          "students only")
  if out.exists() and any(out.iterdir()):
    raise CheckpointError(f"{out} holds files: choose a new or empty folder")
  config = student_config(about["model"])
  _check_vit(config.vit, model_dir)
  table = tables.student_table(config, tables.HF)
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
    found = tokenizers.mention_tables(tokenizer, config.max_regions)
    side += [tensors.Planned(TABLE + name, values.shape, np.dtype(np.int32), functools.partial(
        np.asarray, values, np.int32)) for name, values in zip(("opens_bracket", "digit"), found)]
    digests[SIDE_FILE] = tensors.write_safetensors(partial / SIDE_FILE, side)
    reader.check()
    for file in [*tokenizer_files(model_dir / "tokenizer"), Path(__file__).with_name(CODE)]:
      shutil.copy(file, partial)
    texts = {"config.json": json.dumps(hf_config(config, dtype), indent=2) + "\n",
             "preprocessor_config.json": json.dumps(image_processor(config), indent=2) + "\n",
             "README.md": model_card(config)}
    for name, text in texts.items():
      (partial / name).write_text(text)
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


def hf_config(config: StudentConfig, dtype: str) -> dict:
  """transformers' config.json of a student; `lskd` holds the settings it has no word for."""
  vit, qformer = config.vit, config.qformer
  return {
      "architectures": ["Blip2ForImageTextRetrieval"],
      "auto_map": {"AutoModel": f"{CODE.removesuffix('.py')}.LskdStudent"},
      "model_type": "blip-2",
      "dtype": dtype,
      "num_query_tokens": qformer.queries,
      "image_text_hidden_size": config.embed,
      "vision_config": {
          "model_type": "blip_2_vision_model", "hidden_size": vit.width,
          "intermediate_size": vit.hidden, "num_hidden_layers": vit.depth,
          "num_attention_heads": vit.heads, "image_size": vit.image_size, "patch_size": vit.patch,
          "hidden_act": vit.activation, "layer_norm_eps": vit.eps, "qkv_bias": True},
      "qformer_config": {
          "model_type": "blip_2_qformer", "vocab_size": qformer.vocabulary,
          "hidden_size": qformer.width, "num_hidden_layers": qformer.depth,
          "num_attention_heads": qformer.heads, "intermediate_size": qformer.hidden,
          "hidden_act": "gelu", "hidden_dropout_prob": qformer.dropout,
          "attention_probs_dropout_prob": qformer.dropout,
          "max_position_embeddings": qformer.max_tokens, "layer_norm_eps": qformer.eps,
          "cross_attention_frequency": qformer.cross_every, "encoder_hidden_size": vit.width,
          "use_qformer_text_input": True},
      "lskd": {"max_regions": config.max_regions, "sites": config.sites,
               "region_mode": config.region_mode, "vision_eps": config.vision_eps,
               "temperature": config.temperature, "decoder_start": config.decoder_start},
  }


def image_processor(config: StudentConfig) -> dict:
  """The settings of transformers' BlipImageProcessor."""
  height, width = config.vit.size
  return {"image_processor_type": "BlipImageProcessor", "do_convert_rgb": True, "do_resize": True,
          "size": {"height": height, "width": width}, "resample": 3, "do_rescale": True,
          "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": list(PIXEL_MEAN),
          "image_std": list(PIXEL_STD)}


def model_card(config: StudentConfig) -> str:
  """README.md of an exported student."""
  side, note = config.vit.image_size, ""
  if config.vision_eps != config.vit.eps:
    note = (f"ln_vision was trained with eps {config.vision_eps:g}; transformers computes it with "
            f"the ViT's, {config.vit.eps:g}.")
  return f"""---
library_name: transformers
tags: [blip-2, image-text-matching, localized]
---
# A BLIP-2 student of localized statements

Made with lskd_jax {lskd_jax.__version__}. Stage-1 BLIP-2 (ViT and Q-Former) for pictures of {side} px.

```python
from transformers import AutoModel, Blip2ForImageTextRetrieval
student = AutoModel.from_pretrained("this folder", trust_remote_code=True)
base = Blip2ForImageTextRetrieval.from_pretrained("this folder")
```

`student.score(pixel_values, boxes, input_ids)` scores texts that point at regions with `[0]`, `[1]`, …
(`{CODE}`, self-contained). `base` is the same model without regions. The region tokens, the language
head and ITC's temperature are in `{SIDE_FILE}`; `lskd import --from hf` gives back the student as it
was. {note}
"""
