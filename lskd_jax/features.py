"""ViT features of a whole corpus, computed once: what a frozen ViT says never changes.

Region tokens are painted on the ViT's OUTPUT, so students that differ in regions, texts or losses
share one cache; only drawn overlays and augmented pixels need the ViT at every step.
"""
import contextlib
import fcntl
import hashlib
import json
from pathlib import Path

from flax import nnx
import jax
import numpy as np
from tqdm import tqdm

from data_pipeline import images
from data_pipeline.corpus import Corpus
from data_pipeline.records import DataError
from data_pipeline.stages import write_json
from lskd_jax import parallel


def cached_features(vit, corpus: Corpus, folder, *, batch: int = 64, progress: bool = True):
  """The features of every image of `corpus`, from `folder` or computed and stored there.

  Args:
    vit: the module; its parameters, its image size and the corpus together name the cache.

  Returns:
    float32[len(corpus), 1 + rows * columns, C], memory-mapped.

  Raises:
    DataError: a picture is missing or damaged, or several processes share the run.
  """
  if jax.process_count() > 1:
    raise DataError("data.cache_features=True works in a run of one process; set it to False")
  folder = Path(folder)
  about = {"vit": digest(nnx.split(vit)[1]), "images": corpus_digest(corpus),
           "image_size": list(vit.config.size)}
  path, note = folder / "features.npy", folder / "features.json"
  stored = lambda: note.exists() and json.loads(note.read_text()) == about
  if not stored():
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
      with contextlib.suppress(OSError):  # a file system without locks: go on as if alone
        fcntl.flock(lock, fcntl.LOCK_EX)  # of runs that share the folder, one computes, others wait
      if not stored():
        note.unlink(missing_ok=True)
        _compute(vit, corpus, path, batch, progress)
        write_json(note, about)
  return np.load(path, mmap_mode="r")


def _compute(vit, corpus: Corpus, path: Path, batch: int, progress: bool) -> None:
  """Writes the features of every image to `path`."""
  size = vit.config.size
  graph, state = nnx.split(vit)
  see = jax.jit(lambda state, image: nnx.merge(graph, state)(image))
  mesh = jax.sharding.get_mesh()
  shape = (len(corpus), vit.config.tokens, vit.config.width)
  partial = path.with_suffix(".partial")
  rows = np.lib.format.open_memmap(partial, "w+", np.float32, shape)
  steps = range(0, len(corpus), batch)
  for start in tqdm(steps, "image features", disable=not progress, unit="batch", leave=False):
    count = min(batch, len(corpus) - start)
    pixels = np.zeros((batch, *size, 3), np.uint8)
    for i in range(count):
      decoded = images.decode(corpus.image_bytes(start + i), name=corpus.record(start + i).image)
      pixels[i] = images.resize(decoded, size)
    seen = see(state, parallel.put_batch({"image": pixels}, mesh)["image"])
    rows[start:start + count] = np.asarray(seen)[:count]
  rows.flush()
  partial.rename(path)


def digest(tree) -> str:
  """sha256 over the shapes and values of a pytree of arrays, in order."""
  total = hashlib.sha256()
  for leaf in jax.tree.leaves(tree):
    total.update(f"{leaf.shape} {leaf.dtype}\n".encode())
    total.update(np.ascontiguousarray(jax.device_get(leaf)).tobytes())
  return total.hexdigest()


def corpus_digest(corpus: Corpus) -> str:
  """sha256 over the names and sizes of a corpus's images, in row order."""
  total = hashlib.sha256()
  for row in range(len(corpus)):
    record = corpus.record(row)
    total.update(f"{record.image}\0{record.width}x{record.height}\n".encode())
  return total.hexdigest()
