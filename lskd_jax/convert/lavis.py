"""salesforce/LAVIS's stage-1 BLIP-2 in: the authors' `.pth` files, and students that LSKD trained.

Such a file holds neither the model's sizes nor its tokenizer, and often not the frozen ViT: the sizes
come from a config, the tokenizer from a folder (bert-base-uncased), the ViT from a second file. Files
are unpickled with `weights_only=True`, so that they cannot run code.
"""
import dataclasses
from pathlib import Path
import pickle
import re

import numpy as np

from lskd_jax.convert import tables, tensors
from lskd_jax.convert.student import Imported, write_student
from lskd_jax.models.student import StudentConfig
from lskd_jax.trees import CheckpointError, one_line

VIT = "visual_encoder."
VISION_EPS = 1e-5  # of ln_vision in LAVIS


def import_lavis(source: Path | str, out: Path | str, *, config: StudentConfig,
                 tokenizer_dir: Path | str, vit: Path | str | None = None,
                 image_size: int | tuple[int, int] | None = None, seed: int = 0,
                 progress: bool = True) -> Imported:
  """A `.pth` of `Blip2Qformer` -> a model directory of a student.

  Args:
    source: the checkpoint.
    out: the model directory.
    config: the sizes of the checkpoint; vocabulary and image size are read from its tensors.
    tokenizer_dir: a folder with bert-base-uncased's vocab.txt or tokenizer.json.
    vit: the frozen ViT (`eva_vit_g.pth`, `clip_vit_L.pth`), needed where `source` has none. Its
      blocks beyond the config's depth, its last norm and its classifier are passed over, as LAVIS does.
    image_size: of the student's pictures, px: a side or (height, width); None = as the ViT's position
      embeddings.
    seed: of the parameters that the source does not have: the region tokens.

  Raises:
    CheckpointError, DataError: one line that names the file, key or setting; nothing is written.
  """
  found = read_pth(source)
  if vit is not None:
    own = {key: tensor for key, tensor in found.items() if not key.startswith(VIT)}
    found = own | _vit_of(read_pth(vit), config.vit.depth)
  elif not any(key.startswith(VIT) for key in found):
    raise CheckpointError(f"{source} holds no ViT ({VIT}*): give its file too, such as eva_vit_g.pth")
  scheme = tables.lavis_scheme(config)
  config = _sizes(config, found, scheme, source)
  table = tables.student_table(config, scheme)
  tables.check(table, {key: tensor.shape for key, tensor in found.items()}, scheme.ignored, source)
  return write_student(config, table, found, out, tokenizer_dir=Path(tokenizer_dir),
                       image_size=image_size, seed=seed, progress=progress)


def read_pth(path: Path | str) -> dict[str, tensors.Tensor]:
  """The tensors of a `.pth` file, mapped into memory rather than read where its format allows.

  Raises CheckpointError: truncated, a pickle that would run code, no dictionary of tensors, or
  PyTorch is not installed.
  """
  try:
    import torch
  except ImportError:
    raise CheckpointError(f"{path}: reading .pth files needs PyTorch: pip install torch") from None
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


def _sizes(config: StudentConfig, found: dict[str, tensors.Tensor], scheme: tables.Scheme,
           source) -> StudentConfig:
  """The config with what the tensors themselves tell: vocabulary, and side of the ViT's grid."""
  for key in (scheme.words, scheme.vit_positions):
    if key not in found:
      raise CheckpointError(f"{source} has no {key}: it is no stage-1 BLIP-2 of LAVIS with the config's "
                            "ViT (ViT-g/14: configs/common.py; CLIP's ViT-L/14: configs/blip2_vit_l.py)")
  vocabulary = found[scheme.words].shape[0]
  grid = round((found[scheme.vit_positions].shape[-2] - 1)**0.5)
  # Any side that gives this grid would do for the table; a checkpoint that fits its config keeps it.
  side = config.vit.image_size if config.vit.grid == (grid, grid) else grid * config.vit.patch
  return dataclasses.replace(
      config, vision_eps=VISION_EPS, vit=dataclasses.replace(config.vit, image_size=side),
      qformer=dataclasses.replace(config.qformer, vocabulary=vocabulary))
