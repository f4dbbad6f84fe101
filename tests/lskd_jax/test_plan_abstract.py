"""The step as shapes: for every task, from a config alone, and what it assumes of files that are not here."""
import jax
import pytest

from data_pipeline import tokenizer as tokenizers
from data_pipeline.corpus import open_corpus
from data_pipeline.loader import Loader
from data_pipeline.records import DataError
from lskd_jax import batches, cli, metrics, parallel, prepare, step
from lskd_jax.config_files import load_config
from lskd_jax.plan import abstract, measure, topology
from tests.lskd_jax.tiny_models import OVERRIDES, make_model

SMALL = [one.removeprefix("--config.") for one in OVERRIDES] + ["model.qformer.depth=2"]
# One config of each task, cached features and pictures, both decoders.
TASKS = {
  "scenes_student": SMALL, "scenes_critic": SMALL, "scenes_words": SMALL,
  "scenes_itm": [*SMALL, "data.cache_features=False"],
  "blip2_opt": [*SMALL, "model.vit.image_size=42"], "blip2_t5_xxl": [*SMALL, "model.vit.image_size=42"]}


def config(name: str, *overrides: str):
  loaded = load_config(f"configs/{name}.py", [*TASKS.get(name, SMALL), *overrides])
  if loaded.task == "generative":
    loaded.model.decoder.update(width=16, heads=2, hidden=32, depth=1)
  return loaded


@pytest.mark.parametrize("name", TASKS)
def test_the_step_of_every_task_can_be_traced_without_corpus_weights_or_devices(name):
  found = abstract.abstract_step(config(name), abstract.one_device_mesh())
  assert metrics.step_flops(found.trace()) > 1e5
  assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(found.arguments))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A few drawn scenes with statements."""
  root = tmp_path_factory.mktemp("corpus")
  lskd = lambda *words: cli.main([str(word) for word in words])
  assert lskd("corpus", "verbalize", "--source", "scenes", "--count", 6, "--out", root / "words") == 0
  assert lskd("corpus", "teach", "--corpus", root / "words", "--out", root / "taught") == 0
  return root


@pytest.fixture(scope="module")
def corpus(folder):
  return open_corpus(folder / "taught", folder / "words" / "images")


@pytest.mark.parametrize("name", ["scenes_itm", "scenes_words"])
def test_the_batch_is_what_the_loader_gives(name, corpus):
  loaded = config(name)
  _, tokenizer, _ = abstract.known(loaded)
  batch = Loader(corpus, tokenizer, batches.loader_options(loaded), 0).batch(0)
  shapes = abstract.batch_shapes(loaded, prepare.sized(loaded, tokenizer))
  assert {name: (rows.shape, str(rows.dtype)) for name, rows in batch.items()} == shapes


def test_a_model_that_is_not_here_has_the_published_sizes_and_the_plan_says_so():
  found, tokenizer, notes = abstract.known(config("blip2_opt", "init.model=models/blip2_opt"))
  assert tokenizer.get_vocab_size() == 50272 and found.init.model == ""
  assert notes == ("init.model=models/blip2_opt is not here: the published sizes are assumed",)


def test_a_model_that_is_here_gives_its_sizes(tmp_path):
  model = make_model(tmp_path / "model")
  loaded = config("scenes_student", f"init.model={model}")
  _, tokenizer, notes = abstract.known(loaded)
  assert tokenizer.get_vocab_size() == tokenizers.load_tokenizer(model / "tokenizer").get_vocab_size()
  assert notes == ()


def test_a_vocabulary_to_be_trained_is_as_large_as_it_may_become():
  loaded = config("scenes_student", "data.vocabulary=200")
  _, tokenizer, notes = abstract.known(loaded)
  assert tokenizer.get_vocab_size() == 200 and "200" in notes[0]
  with pytest.raises(DataError, match="a vocabulary of 20 has no room"):
    abstract.known(config("scenes_student", "data.vocabulary=20"))


@pytest.mark.parametrize("mesh,line", [
    (dict(fsdp=8), "mesh.fsdp=8 does not divide a width of 12 in the model: set it to 4 .*mesh.data=-1"),
    (dict(tensor=8), "mesh.tensor=8 does not divide a width of 2 in the model: set it to 2 or a divisor")])
def test_a_width_that_the_mesh_does_not_divide_is_one_line(mesh, line):
  loaded = config("scenes_student", "model.qformer.width=12", "model.qformer.heads=2")
  with pytest.raises(DataError, match=line):
    abstract.abstract_step(loaded, parallel.make_mesh(**mesh))


def test_stored_features_of_a_vit_that_changes_are_refused_as_by_train():
  loaded = config("scenes_student", "train.frozen=()", "data.batch_size=8", "train.mesh.fsdp=-1")
  with pytest.raises(DataError, match="data.cache_features=True .* add 'vit' to train.frozen"):
    measure.measure(loaded, topology.parse("cpu:8"))


AGAIN = ("model.qformer.remat=full", "train.microbatches=2", "model.vit.attention=fused")


def test_flops_of_the_model_leave_out_what_is_computed_again():
  once, again = config("scenes_itm", "data.batch_size=8"), config("scenes_itm", "data.batch_size=8", *AGAIN)
  executed = metrics.step_flops(abstract.abstract_step(again, abstract.one_device_mesh()).trace())
  assert measure.model_flops(again) == measure.model_flops(once) < executed


def test_training_counts_the_flops_that_a_plan_calls_the_models(tmp_path, folder):
  data = "data.batch_size=8", f"data.corpus={folder}/taught", f"data.image_root={folder}/words/images"
  loaded = config("scenes_itm", *AGAIN[:2], *data)
  mesh = parallel.make_mesh(fsdp=2)
  with jax.set_mesh(mesh):
    parts = prepare.prepare(loaded, tmp_path, mesh, progress=False)
    loaded.data.tokenizer = str(parts.tokenizer_dir)
    state = jax.eval_shape(lambda params: step.init_state(params, parts.tx), parts.params)
    rows = parallel.put_batch(next(parts.batches(0, 1)), mesh)
    found = prepare.model_flops(loaded, parts, state, parts.frozen, rows, parts.run_key)
  assert found == measure.model_flops(loaded)


# --- with a TPU's compiler -------------------------------------------------------------------------


@pytest.mark.slow
def test_a_small_step_compiles_for_two_slices_of_tpus(tmp_path, monkeypatch):
  pytest.importorskip("libtpu")
  from lskd_jax.plan import run
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  named = topology.parse("2x v5e:2x2")
  overrides = [*SMALL, "data.batch_size=8", "train.mesh.slice=-1", "train.mesh.fsdp=-1"]
  found = run.measured("configs/scenes_student.py", overrides, named, low_effort=True, quiet=True)
  assert found["mesh"] == dict(slice=2, data=1, fsdp=4, tensor=1)
  assert "one of 2 hosts: `lskd train` refuses it" in found["notes"][-1]
  assert {row["crosses"] for row in found["collectives"]} == {True, False}
  assert 0 < found["memory"]["temporaries"] < 1e9 and found["traffic"] > 0
  assert any("models/" in place for place in found["places"])


@pytest.mark.slow
def test_a_shape_that_libtpu_does_not_know_is_one_line(tmp_path, monkeypatch):
  pytest.importorskip("libtpu")
  from lskd_jax.plan import run
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  with pytest.raises(DataError, match="v5e:3x5: libtpu refuses it"):
    run.measured("configs/scenes_student.py", [*SMALL, "data.batch_size=15", "train.mesh.fsdp=-1"],
                 topology.parse("v5e:3x5"), quiet=True)
