"""Cached features: computed once, and never those of another ViT or of other pictures."""
import dataclasses
import threading

from flax import nnx
import jax
import numpy as np
import pytest

from data_pipeline import corpus_stages, images, stages
from data_pipeline.corpus import corpus_of
from data_pipeline.records import DataError
from lskd_jax import parallel
from lskd_jax.features import cached_features
from lskd_jax.models.vit import Vit, VitConfig

pytestmark = pytest.mark.usefixtures("one_device")

SIZE = VitConfig(image_size=24, patch=12, width=8, depth=1, heads=2, hidden=8, scan=False)


@pytest.fixture(scope="module")
def words(tmp_path_factory):
  """Five drawn scenes."""
  folder = tmp_path_factory.mktemp("words")
  corpus_stages.verbalize_scenes(folder, 5, progress=False)
  return folder


@pytest.fixture(scope="module")
def corpus(words):
  return corpus_of(list(stages.read_records(words)), words / "images")


@pytest.fixture(scope="module")
def vit(one_device):
  return Vit(SIZE, nnx.Rngs(0), jax.numpy.float32)


def of(vit, corpus, folder, batch=2):
  return cached_features(vit, corpus, folder, batch=batch, progress=False)


def stamp(folder):
  return (folder / "features.npy").stat().st_mtime_ns, (folder / "features.npy").stat().st_ino


def test_row_i_is_what_the_vit_says_of_picture_i(vit, corpus, tmp_path):
  found = of(vit, corpus, tmp_path / "new" / "folder")
  assert found.shape == (5, 1 + 2 * 2, 8) and found.dtype == np.float32
  pixels = np.stack([images.resize(images.decode(corpus.image_bytes(row)), 24) for row in range(5)])
  rows = parallel.put_batch({"image": pixels}, jax.sharding.get_mesh())
  np.testing.assert_allclose(found, vit(rows["image"]), rtol=1e-5, atol=1e-6)
  assert len({row.tobytes() for row in found}) == 5


def test_a_finished_cache_is_read_and_not_computed_again(vit, corpus, tmp_path):
  first = np.array(of(vit, corpus, tmp_path))
  before = stamp(tmp_path)
  np.testing.assert_array_equal(of(vit, corpus, tmp_path, batch=5), first)
  assert stamp(tmp_path) == before
  (tmp_path / "lock").unlink()
  assert isinstance(of(vit, corpus, tmp_path), np.memmap)  # it stays on disk
  assert not (tmp_path / "lock").exists()  # nothing is written: the folder may be read-only


def test_another_vit_has_other_features(vit, corpus, tmp_path):
  first = np.array(of(vit, corpus, tmp_path))
  other = Vit(SIZE, nnx.Rngs(1), jax.numpy.float32)
  assert not np.allclose(of(other, corpus, tmp_path), first)
  np.testing.assert_array_equal(of(vit, corpus, tmp_path), first)


def test_the_same_numbers_in_another_shape_are_another_vit(corpus, tmp_path):
  """Two heads of width 4 and four of width 2 may hold the same bytes."""
  def ones(heads):
    vit = Vit(dataclasses.replace(SIZE, heads=heads), nnx.Rngs(0), jax.numpy.float32)
    graph, state = nnx.split(vit)
    return nnx.merge(graph, jax.tree.map(jax.numpy.ones_like, state))
  of(ones(2), corpus, tmp_path)
  before = stamp(tmp_path)
  of(ones(4), corpus, tmp_path)
  assert stamp(tmp_path) != before


def test_the_same_numbers_at_another_image_size_are_another_vit(vit, corpus, tmp_path):
  """One row of four patches has as many position embeddings as two of two."""
  square = np.array(of(vit, corpus, tmp_path))
  graph, state = nnx.split(Vit(dataclasses.replace(SIZE, image_size=(12, 48)), nnx.Rngs(0)))
  flat = nnx.merge(graph, nnx.split(vit)[1])
  assert not np.allclose(of(flat, corpus, tmp_path), square)


def test_other_pictures_have_other_features(vit, corpus, words, tmp_path):
  records = list(stages.read_records(words))
  first = np.array(of(vit, corpus, tmp_path))
  for others in (records[:4], records[::-1], [dataclasses.replace(records[0], width=95), *records[1:]]):
    found = of(vit, corpus_of(others, words / "images"), tmp_path)
    assert len(found) == len(others)
  np.testing.assert_array_equal(of(vit, corpus_of(records[::-1], words / "images"), tmp_path),
                                first[::-1])


def test_statements_do_not_matter(vit, corpus, words, tmp_path):
  """Every arm of a comparison shares one cache, whatever it reads about the pictures."""
  of(vit, corpus, tmp_path)
  before = stamp(tmp_path)
  silent = [dataclasses.replace(r, statements=(), regions=()) for r in stages.read_records(words)]
  of(vit, corpus_of(silent, words / "images", name="silent"), tmp_path)
  assert stamp(tmp_path) == before


def test_a_cache_killed_half_way_is_computed_again(vit, corpus, tmp_path):
  first = np.array(of(vit, corpus, tmp_path / "whole"))

  def image_bytes(row):
    if row == 3:
      raise KeyboardInterrupt
    return corpus.image_bytes(row)
  killed = corpus_of([corpus.record(row) for row in range(5)], None)
  killed.image_bytes = image_bytes
  folder = tmp_path / "killed"
  with pytest.raises(KeyboardInterrupt):
    of(vit, killed, folder)
  assert not (folder / "features.npy").exists() and not (folder / "features.json").exists()
  np.testing.assert_array_equal(of(vit, corpus, folder), first)
  (folder / "features.json").unlink()  # killed between the two renames
  before = stamp(folder)
  np.testing.assert_array_equal(of(vit, corpus, folder), first)
  assert stamp(folder) != before


def test_two_runs_that_share_a_folder_compute_once(vit, corpus, tmp_path):
  read, found = [], {}

  def image_bytes(row):
    read.append(row)
    return corpus.image_bytes(row)
  counted = corpus_of([corpus.record(row) for row in range(5)], None)
  counted.image_bytes = image_bytes
  mesh = jax.sharding.get_mesh()

  def run(name):
    with jax.set_mesh(mesh):
      found[name] = np.array(of(vit, counted, tmp_path))
  threads = [threading.Thread(target=run, args=(name,)) for name in "ab"]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert sorted(read) == [0, 1, 2, 3, 4]
  np.testing.assert_array_equal(found["a"], found["b"])


def test_a_damaged_picture_is_named(vit, words, tmp_path):
  record = next(stages.read_records(words))
  (tmp_path / record.image).parent.mkdir(parents=True)
  (tmp_path / record.image).write_bytes(b"no picture")
  with pytest.raises(DataError, match=f"{record.image}: not an image"):
    of(vit, corpus_of([record], tmp_path), tmp_path / "features")
