"""Tensors on disk in PyTorch's formats, one at a time: a whole checkpoint is never in memory.

A checkpoint is read through `{key: Tensor}`: shapes are known at once, numbers come when asked for.
"""
from collections.abc import Callable, Iterable
import hashlib
import json
import math
from pathlib import Path
import struct
from typing import NamedTuple

import ml_dtypes
import numpy as np
import safetensors

from lskd_jax.trees import CheckpointError, listed, one_line

DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
          "I64": np.int64, "I32": np.int32, "U8": np.uint8, "BOOL": np.bool_}
NAMES = {np.dtype(kind): name for name, kind in DTYPES.items()}
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class Tensor(NamedTuple):
  """shape and dtype of a stored tensor; `read()` returns its numbers."""
  shape: tuple[int, ...]
  dtype: np.dtype
  read: Callable[[], np.ndarray]


def read_folder(folder: Path | str) -> dict[str, Tensor]:
  """The tensors of a transformers folder: one safetensors file, or shards with an index.

  Raises:
    CheckpointError: no such file, a shard that the index names and is not there, a truncated or
      damaged file, a tensor that is in the index and not in its shard.
  """
  folder = Path(folder)
  if not (folder / INDEX).exists():
    if not (folder / SINGLE).exists():
      raise CheckpointError(f"{folder} holds neither {SINGLE} nor {INDEX}; give a folder that "
                            "transformers' save_pretrained wrote")
    return read_safetensors(folder / SINGLE)
  try:
    shards = json.loads((folder / INDEX).read_text())["weight_map"]
  except (ValueError, KeyError, TypeError) as error:
    raise CheckpointError(f"{folder / INDEX} is no index of shards: {one_line(error)}") from None
  found = {}
  for name in sorted(set(shards.values())):
    if not (folder / name).exists():
      raise CheckpointError(f"{folder / INDEX} names {name}, which is not there; copy it again")
    found |= read_safetensors(folder / name)
  lost = [key for key in shards if key not in found]
  if lost:
    raise CheckpointError(f"{folder}: its shards lack {listed(lost)}, which {INDEX} promises")
  return found


def read_note(path: Path | str) -> dict[str, str]:
  """The texts that `write_safetensors` noted in a file that `read_safetensors` has read."""
  with safetensors.safe_open(path, "numpy") as file:
    return file.metadata() or {}


def read_safetensors(path: Path | str) -> dict[str, Tensor]:
  """The tensors of one safetensors file; CheckpointError where it is truncated or no such file."""
  path = Path(path)
  try:
    with safetensors.safe_open(path, "numpy") as file:  # checks the header against the file's size
      slices = {key: file.get_slice(key) for key in file.keys()}
      kinds = {key: (tuple(part.get_shape()), part.get_dtype()) for key, part in slices.items()}
  except (safetensors.SafetensorError, OSError) as error:
    raise CheckpointError(f"{path} is no complete safetensors file ({one_line(error)}); copy it "
                          "again") from None
  unknown = [f"{key} ({kind})" for key, (_, kind) in kinds.items() if kind not in DTYPES]
  if unknown:
    raise CheckpointError(f"{path} holds numbers of a kind that is not read here: {listed(unknown)}")

  def reader(key: str) -> Callable[[], np.ndarray]:
    def read() -> np.ndarray:
      try:
        with safetensors.safe_open(path, "numpy") as file:
          return file.get_tensor(key)
      except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: {key} cannot be read ({one_line(error)})") from None
    return read
  return {key: Tensor(shape, np.dtype(DTYPES[kind]), reader(key))
          for key, (shape, kind) in kinds.items()}


# --- writing -------------------------------------------------------------------------------------


class Planned(NamedTuple):
  """A tensor to be written: its key, shape and dtype now, its numbers when its turn comes."""
  key: str
  shape: tuple[int, ...]
  dtype: np.dtype
  make: Callable[[], np.ndarray]


def write_folder(folder: Path, planned: Iterable[Planned], shard_bytes: int = 5 * 10**9,
                 progress: Callable = iter) -> dict[str, str]:
  """Writes shards, and an index last where there are several, under the names transformers reads.

  Args:
    planned: in the order wanted. A tensor is made, written and forgotten before the next is made.
    shard_bytes: a shard ends before the tensor that would make it larger.
    progress: wraps the list of tensors, as tqdm does.

  Returns:
    {file name: sha256} of what was written.
  """
  planned = list(planned)
  shards: list[list[Planned]] = [[]]
  for tensor in planned:
    if shards[-1] and _bytes(shards[-1]) + _bytes([tensor]) > shard_bytes:
      shards.append([])
    shards[-1].append(tensor)
  steps = iter(progress(planned))
  if len(shards) == 1:
    return {SINGLE: write_safetensors(folder / SINGLE, shards[0], steps)}
  digests, weights = {}, {}
  for number, shard in enumerate(shards, 1):
    name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
    digests[name] = write_safetensors(folder / name, shard, steps)
    weights |= {tensor.key: name for tensor in shard}
  index = {"metadata": {"total_size": _bytes(planned)}, "weight_map": weights}
  text = json.dumps(index, indent=2, sort_keys=True) + "\n"
  (folder / INDEX).write_text(text)
  digests[INDEX] = hashlib.sha256(text.encode()).hexdigest()
  return digests


def write_safetensors(path: Path, planned: list[Planned], steps: Iterable | None = None,
                      note: dict[str, str] | None = None) -> str:
  """Writes one file, its header first, since all sizes are known. Returns its sha256.

  steps: advanced once per tensor, for a progress bar. note: texts that the header keeps.
  """
  header: dict = {"__metadata__": {"format": "pt", **(note or {})}}
  at = 0
  for tensor in planned:
    size = _bytes([tensor])
    header[tensor.key] = {"dtype": NAMES[np.dtype(tensor.dtype)], "shape": list(tensor.shape),
                          "data_offsets": [at, at + size]}
    at += size
  text = json.dumps(header, separators=(",", ":")).encode()
  text += b" " * (-len(text) % 8)  # the format wants the numbers aligned
  digest = hashlib.sha256()
  with path.open("wb") as file:
    def write(data) -> None:
      file.write(data)
      digest.update(data)
    write(struct.pack("<Q", len(text)))
    write(text)
    for tensor in planned:
      if steps is not None:
        next(steps, None)
      values = np.asarray(tensor.make(), dtype=tensor.dtype, order="C")
      if values.shape != tensor.shape:
        raise ValueError(f"{tensor.key}: made {values.shape}, planned {tensor.shape}")
      write(values.reshape(-1).view(np.uint8).data)
  return digest.hexdigest()


def _bytes(planned: list[Planned]) -> int:
  return sum(math.prod(t.shape) * np.dtype(t.dtype).itemsize for t in planned)
