"""salesforce/LAVIS's stage-1 BLIP-2 in: the authors' `.pth` files, LSKD's students and its critic.

Such a file holds neither the model's sizes nor its tokenizer, and often not the frozen ViT: the sizes
come from a config, the tokenizer from a folder (bert-base-uncased), the ViT from a second file. Files
are unpickled with `weights_only=True`, so that they cannot run code. What `lavis_export` writes has a
side file, FILE.lskd.safetensors, with the sizes and what LAVIS has no place for.
"""
from collections.abc import Callable
import dataclasses
import json
from pathlib import Path
import pickle
import re

import numpy as np

from lskd_jax.convert import tables, tensors
from lskd_jax.convert.model_directory import Imported, write_model
from lskd_jax.models.student import StudentConfig, student_config
from lskd_jax.models.vit import VitConfig
from lskd_jax.trees import CheckpointError, one_line

VIT = "visual_encoder."
VISION_EPS = 1e-5  # of ln_vision in LAVIS
SIDE = ".lskd.safetensors"  # what the side file's name ends with, after that of the .pth
NOTE = "lskd"               # of the side file: the config.json of the model directory
PROJECTIONS = ("opt_proj.", "t5_proj.")  # what stage 2 has
SCORE_HEADS = ("qa_head.", "r_head.")  # what tells a critic from a student
HEAD = tables.LAVIS.language_head
TIED = {f"{HEAD}.decoder.weight": tables.LAVIS.words, f"{HEAD}.decoder.bias": f"{HEAD}.bias"}


def import_lavis(source: Path | str, out: Path | str, *, config: StudentConfig,
                 tokenizer_dir: Path | str, vit: Path | str | None = None,
                 image_size: int | tuple[int, int] | None = None, seed: int = 0,
                 progress: bool = True) -> Imported:
  """A `.pth` of `Blip2Qformer` or LSKD's `Blip2Critic` -> a model directory of a student or critic.

  The critic's language head is frozen, and LAVIS stores no frozen parameter: such a file lacks the
  head's transform, and has the word embeddings under the name of the decoder that they are tied to.

  Args:
    source: the checkpoint.
    out: the model directory.
    config: the sizes of the checkpoint, where no side file has them; vocabulary and image size are
      read from its tensors.
    tokenizer_dir: a folder with bert-base-uncased's vocab.txt or tokenizer.json.
    vit: the frozen ViT (`eva_vit_g.pth`, `clip_vit_L.pth`), needed where `source` has none. Its
      blocks beyond the config's depth, its last norm and its classifier are passed over, as LAVIS does.
    image_size: of the model's pictures, px: a side or (height, width); None = as the ViT's position
      embeddings.
    seed: of the parameters that neither source nor side file has, such as the region tokens.

  Raises:
    CheckpointError, DataError: one line that names the file, key or setting; nothing is written.
  """
  found, side = read_pth(source), Path(f"{source}{SIDE}")
  if any(key.startswith(PROJECTIONS) for key in found):
    raise CheckpointError(f"{source} is a stage-2 model: give the folder of its language model with "
                          "--decoder DIR")
  extra = tensors.read_safetensors(side) if side.exists() else {}
  config = (noted_config(side, student_config) if side.exists() else
            dataclasses.replace(config, vision_eps=VISION_EPS))
  found = with_vit(found, source, vit, config.vit.depth)
  for tied, key in TIED.items():
    if key not in found and tied in found:
      found[key] = found.pop(tied)
  scheme = tables.lavis_scheme(config)
  config = _sizes(config, found, scheme, source)
  kind, table = _layout(config, found, scheme)
  tables.check(table, {key: tensor.shape for key, tensor in found.items()}, scheme.ignored, source)
  for entry in [entry for entry in table if entry.layout == "log" and entry.ours in extra]:
    # The logarithm of a rounded exponential may be off by a bit; the side file's is not, unless the
    # .pth was trained further.
    if tables.to_theirs(entry, extra[entry.ours].read()) == found[entry.theirs].read():
      table.remove(entry)
    else:
      del extra[entry.ours]
  return write_model(kind, config, table, found, out, tokenizer_dir=Path(tokenizer_dir), own=extra,
                     image_size=image_size, seed=seed, progress=progress)


def read_pth(path: Path | str) -> dict[str, tensors.Tensor]:
  """The tensors of a `.pth` file, mapped into memory rather than read where its format allows.

  Raises CheckpointError: truncated, a pickle that would run code, no dictionary of tensors, or
  PyTorch is not installed.
  """
  torch = pytorch(path)
  if not Path(path).is_file():
    raise CheckpointError(f"{path} is not there")
  try:
    try:
      content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except RuntimeError as error:
      if "mmap can only be used" not in str(error):  # the format of PyTorch before 1.6
        raise
      content = torch.load(path, map_location="cpu", weights_only=True)
  except pickle.UnpicklingError as error:
    reason = one_line(error).partition(". ")[0]
    raise CheckpointError(f"{path} holds more than tensors ({reason}) and is not opened") from None
  except (RuntimeError, EOFError, OSError, ValueError) as error:
    raise CheckpointError(f"{path} is no complete .pth file ({one_line(error)}); copy it again") \
        from None
  content = content.get("model", content) if isinstance(content, dict) else content
  if not isinstance(content, dict) or not all(isinstance(v, torch.Tensor) for v in content.values()):
    raise CheckpointError(f"{path} holds no dictionary of tensors, nor one under 'model'")

  def tensor(value) -> tensors.Tensor:
    half = value.dtype == torch.bfloat16  # NumPy has no such numbers
    read = lambda: (value.float() if half else value).numpy()
    kind = np.dtype(np.float32) if half else np.dtype(str(value.dtype).removeprefix("torch."))
    return tensors.Tensor(tuple(value.shape), kind, read)
  return {key: tensor(value) for key, value in content.items()}


def pytorch(path: Path | str):
  """The module `torch`, which only `.pth` files need; CheckpointError where it is not installed."""
  try:
    import torch
  except ImportError:
    raise CheckpointError(f"{path}: .pth files need PyTorch: pip install torch") from None
  return torch


def with_vit(found: dict[str, tensors.Tensor], source, vit, depth: int) -> dict[str, tensors.Tensor]:
  """The tensors of a checkpoint with those of a ViT's own file, or CheckpointError: it has none."""
  if vit is not None:
    own = {key: tensor for key, tensor in found.items() if not key.startswith(VIT)}
    return own | _vit_of(read_pth(vit), depth)
  if not any(key.startswith(VIT) for key in found):
    raise CheckpointError(f"{source} holds no ViT ({VIT}*): give its file too, such as eva_vit_g.pth")
  return found


def _vit_of(found: dict[str, tensors.Tensor], depth: int) -> dict[str, tensors.Tensor]:
  """The tensors of a ViT's own file under the names they have in a whole checkpoint."""
  kept = {}
  for key, tensor in found.items():
    block = re.match(r"(?:blocks|transformer\.resblocks)\.(\d+)\.", key)
    rest = ("norm.", "fc_norm.", "head.", "ln_post.", "proj")  # the last two are CLIP's
    if block and int(block[1]) >= depth or key.startswith(rest):
      continue
    kept[VIT + key] = tensor
  return kept


def _layout(config: StudentConfig, found: dict[str, tensors.Tensor],
            scheme: tables.Scheme) -> tuple[str, list[tables.Entry]]:
  """Which kind of model the keys are of, and its table."""
  if not any(key.startswith(SCORE_HEADS) for key in found):
    return "student", tables.student_table(config, scheme)
  table, transform = tables.critic_table(config, scheme), f"{HEAD}.transform."
  if not any(key.startswith(transform) for key in found):
    table = [entry for entry in table if not entry.theirs.startswith(transform)]
  return "critic", table


def noted_config(side: Path, make: Callable):
  """The config that `lavis_export` noted in a side file, by `make(nested dict)`."""
  try:
    return make(json.loads(tensors.read_note(side)[NOTE])["model"])
  except (KeyError, ValueError, TypeError) as error:
    raise CheckpointError(f"{side} is no side file of an export ({one_line(error)}); take it away, or "
                          "copy it again") from None


def _sizes(config: StudentConfig, found: dict[str, tensors.Tensor], scheme: tables.Scheme,
           source) -> StudentConfig:
  """The config with what the tensors themselves tell: vocabulary, and side of the ViT's grid."""
  if scheme.words not in found:
    raise CheckpointError(f"{source} has no {scheme.words}: it is no stage-1 BLIP-2 of LAVIS")
  vocabulary = found[scheme.words].shape[0]
  return dataclasses.replace(config, vit=with_side(config.vit, found, scheme, source),
                             qformer=dataclasses.replace(config.qformer, vocabulary=vocabulary))


def with_side(vit: VitConfig, found: dict[str, tensors.Tensor], scheme: tables.Scheme,
              source) -> VitConfig:
  """The ViT's sizes with the side of the pictures that its position embeddings are for."""
  if scheme.vit_positions not in found:
    raise CheckpointError(f"{source} has no {scheme.vit_positions}: it is no BLIP-2 of LAVIS with the "
                          "config's ViT (ViT-g/14: configs/common.py; CLIP's ViT-L/14: "
                          "configs/blip2_vit_l.py)")
  grid = round((found[scheme.vit_positions].shape[-2] - 1)**0.5)
  # Any side that gives this grid would do for the table; a checkpoint that fits its config keeps it.
  side = vit.image_size if vit.grid == (grid, grid) else grid * vit.patch
  return dataclasses.replace(vit, image_size=side)
