"""Models larger than memory: leaves are made while they are written, and orbax cannot tell."""
import tracemalloc
import weakref

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore

from data_pipeline import tokenizer as tokenizers
from lskd_jax import checkpoint, streams, trees
from lskd_jax.convert import model_directory, tables, tensors
from lskd_jax.models.qformer import QFormerConfig
from lskd_jax.models.student import StudentConfig
from lskd_jax.models.vit import VitConfig
from lskd_jax.trees import CheckpointError
from tests.lskd_jax import tiny_models


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
  """Leaves of more than 1 KiB are stored by rows and made a piece at a time."""
  monkeypatch.setattr(streams, "PIECE", 2**10)
  monkeypatch.setattr(streams, "UNDER_WAY", 2**12)


def arrays():
  rng = np.random.default_rng(0)
  return {
      "scalar": np.float32(3.5)[...],
      "vector": rng.standard_normal(7).astype(np.float32),
      "decoder": {"stack": rng.standard_normal((6, 20, 30), np.float32),      # a row is 2.4 pieces
                  "kernel": rng.standard_normal((50, 32)).astype("bfloat16"),  # 16 rows make a piece
                  "bias": rng.standard_normal((9, 4), np.float32)},            # stored in one piece
  }


def streamed(tree):
  def stream(leaf):
    def parts(rows):
      yield from (leaf[k:k + rows] for k in range(0, len(leaf), rows)) if leaf.ndim else [leaf]
    return streams.Streamed(leaf.shape, leaf.dtype, parts)
  return jax.tree.map(stream, tree)


# --- on disk -------------------------------------------------------------------------------------


def stored(folder):
  """Every key and value of an OCDBT folder: the metadata and chunks of its arrays."""
  store = tensorstore.KvStore.open({"driver": "ocdbt", "base": f"file://{folder}/"}).result()
  return {key: store[key] for key in store.list().result()}


def test_what_is_streamed_is_what_orbax_writes_of_arrays(tmp_path):
  want = trees.write_tree(tmp_path / "arrays", arrays())
  assert trees.write_tree(tmp_path / "streamed", streamed(arrays())) == want
  assert trees.read_manifest(tmp_path / "streamed") == want
  assert stored(tmp_path / "streamed") == stored(tmp_path / "arrays")
  assert (tmp_path / "streamed/_METADATA").read_text() == (tmp_path / "arrays/_METADATA").read_text()


def test_orbax_alone_restores_it_onto_a_mesh(tmp_path):
  trees.write_tree(tmp_path / "tree", streamed(arrays()))
  mesh = jax.make_mesh((2, 4), ("fsdp", "tensor"), axis_types=(AxisType.Explicit,) * 2)

  def place(leaf):
    spec = P(None, "fsdp") if leaf.ndim == 3 else P()
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))
  with ocp.StandardCheckpointer() as reader:
    found = reader.restore(tmp_path / "tree", jax.tree.map(place, arrays()))
  jax.tree.map(np.testing.assert_array_equal, found, arrays())
  assert found["decoder"]["stack"].sharding.spec == P(None, "fsdp")
  with ocp.PyTreeCheckpointer() as reader:
    jax.tree.map(np.testing.assert_array_equal, reader.restore(tmp_path / "tree"), arrays())


def test_a_leaf_of_too_few_rows_is_an_error_and_leaves_nothing(tmp_path):
  short = streams.Streamed((4, 3), np.dtype(np.float32), lambda rows: [np.zeros((3, 3))])
  with pytest.raises(CheckpointError, match=r"leaf: 3 rows were made for shape \(4, 3\)"):
    trees.write_tree(tmp_path / "tree", {"leaf": short})
  assert not (tmp_path / "tree").exists()


def test_memory_does_not_grow_with_the_tree(tmp_path, monkeypatch):
  """24 MB of leaves are written with a few rows of 64 KiB in memory (NumPy tells tracemalloc)."""
  monkeypatch.setattr(streams, "PIECE", 2**16)
  monkeypatch.setattr(streams, "UNDER_WAY", 2**18)
  rng = np.random.default_rng(0)
  leaf = streams.Streamed((16, 128, 128), np.dtype(np.float32), lambda rows: (
      rng.standard_normal((rows, 128, 128), np.float32) for _ in range(0, 16, rows)))
  tracemalloc.start()
  try:
    trees.write_tree(tmp_path / "tree", {str(k): leaf for k in range(24)})
    peak = tracemalloc.get_traced_memory()[1]
  finally:
    tracemalloc.stop()
  assert peak < 2**22


class SlowDisk:
  """A store that writes nothing before it is waited for."""
  waiting, most = 0, 0

  def __init__(self, store):
    self.store = store

  def __getitem__(self, place):
    return SlowDisk(self.store[place])

  def write(self, part, **options):
    SlowDisk.waiting += part.nbytes
    SlowDisk.most = max(SlowDisk.most, SlowDisk.waiting)

    async def later():
      await self.store.write(part, **options)
      SlowDisk.waiting -= part.nbytes
    return later()


def test_a_slow_disk_is_waited_for(tmp_path, monkeypatch):
  """Otherwise what is made would pile up in memory."""
  at_once = tensorstore.open

  async def slowly(*args, **options):
    return SlowDisk(await at_once(*args, **options))
  monkeypatch.setattr(streams.tensorstore, "open", slowly)
  trees.write_tree(tmp_path / "tree", streamed({str(k): arrays() for k in range(4)}))
  assert SlowDisk.waiting == 0
  assert streams.UNDER_WAY < SlowDisk.most <= streams.UNDER_WAY + 20 * 30 * 4


# --- an import -----------------------------------------------------------------------------------


class Source:
  """A checkpoint's tensors that remembers which of its numbers are still in memory."""

  def __init__(self, config, stop_at=None, stop_with=None):
    self.table = tables.student_table(config, tables.HF)
    self.found = {entry.theirs: tensors.Tensor(entry.shape, np.dtype(np.float32),
                                               lambda entry=entry: self.read(entry))
                  for entry in self.table}
    self.stop_at, self.stop_with = stop_at, stop_with
    self.alive, self.most, self.reads = {}, 0, 0

  def numbers(self, entry):
    seed = self.table.index(entry)
    return np.random.default_rng(seed).standard_normal(entry.shape, np.float32)

  def read(self, entry):
    self.reads += 1
    if self.reads == self.stop_at:
      raise self.stop_with
    values = self.numbers(entry)
    self.alive[self.reads] = values.nbytes
    weakref.finalize(values, self.alive.pop, self.reads)
    self.most = max(self.most, sum(self.alive.values()))
    return values


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  folder = tmp_path_factory.mktemp("tokenizer")
  return tokenizers.train_tokenizer(tiny_models.TEXTS, folder, 400, 1), folder


@pytest.fixture
def run(tokenizer, tmp_path):
  """A function that imports a `Source` of a deep and narrow student."""
  config = StudentConfig(
      vit=VitConfig(image_size=16, patch=4, width=32, depth=12, heads=2, hidden=128),
      qformer=QFormerConfig(vocabulary=tokenizer[0].get_vocab_size(), width=16, depth=4, heads=2,
                            hidden=32, queries=2, max_tokens=40), embed=8)

  def run(**options):
    source = Source(config, **options)
    model_directory.write_model("student", config, source.table, source.found, tmp_path / "model",
                                tokenizer_dir=tokenizer[1], progress=False)
    return source
  return run


def test_an_import_holds_few_of_its_sources_tensors(run, tmp_path):
  source = run()
  sizes = [4 * int(np.prod(entry.shape)) for entry in source.table]
  assert source.reads == len(sizes)  # and reads each once
  assert source.most <= 2 * max(sizes) + streams.UNDER_WAY
  assert sum(sizes) > 10 * source.most
  leaves = trees.named_leaves(checkpoint.load_model(tmp_path / "model")[1])
  for entry in source.table:
    have = leaves[entry.ours][entry.at]
    assert (have == tables.to_ours(entry, source.numbers(entry), have.shape)).all(), entry


@pytest.mark.parametrize("error", [KeyboardInterrupt(), CheckpointError("shard 2 cannot be read")])
def test_an_interrupted_import_leaves_what_was_there(run, tmp_path, error):
  checkpoint.save_model(tmp_path / "model", {"value": 1}, {"kernel": np.ones(3, np.float32)})
  with pytest.raises(type(error)):
    run(stop_at=100, stop_with=error)
  assert [path.name for path in tmp_path.iterdir()] == ["model"]
  config, params = checkpoint.load_model(tmp_path / "model")
  assert config == {"value": 1} and params["kernel"].tolist() == [1, 1, 1]


def test_what_a_killed_process_left_is_cleared_away_by_the_next(tmp_path):
  (tmp_path / "model.partial/params.orbax-checkpoint-tmp/d").mkdir(parents=True)
  checkpoint.save_model(tmp_path / "model", {}, streamed(arrays()))
  assert [path.name for path in tmp_path.iterdir()] == ["model"]
