"""Model directories: what is written comes back, and what does not fit is named."""
import json

from flax import nnx
import jax
import numpy as np
import pytest

from data_pipeline import tokenizer as tokenizers
from lskd_jax import checkpoint
from lskd_jax.models import build
from lskd_jax.models.student import student_config
from lskd_jax.trees import CheckpointError, named_leaves
from tests.lskd_jax import tiny
from tests.lskd_jax.tiny_models import MODEL, make_model

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A model of each kind with the same sizes."""
  folder = tmp_path_factory.mktemp("models")
  for kind in build.KINDS:
    make_model(folder / kind, kind)
  return folder


def arrays(state):
  return {name: np.asarray(leaf) for name, leaf in named_leaves(state).items()}


@pytest.mark.parametrize("kind", build.KINDS)
def test_a_model_directory_comes_back_bit_for_bit(folder, kind, tmp_path):
  model = build.load(folder / kind)
  assert model.kind == kind
  if kind == "generative":
    assert model.config.decoder.vocabulary > model.tokenizer.get_vocab_size()  # rows to spare
  else:
    assert model.config == student_config(
      {**MODEL, "qformer": {**MODEL["qformer"], "vocabulary": model.tokenizer.get_vocab_size()}})
  build.save(tmp_path / "again", kind, model.config, model.state, folder / kind / "tokenizer")
  again = build.load(tmp_path / "again")
  first, second = arrays(model.state), arrays(again.state)
  assert list(first) == list(second) and len(first) > 10
  for name in first:
    np.testing.assert_array_equal(first[name], second[name], err_msg=name)
  module = nnx.merge(again.graph, again.state)
  rows = model.tokenizer.get_vocab_size()
  tables = tokenizers.mention_tables(model.tokenizer, model.config.max_regions)
  student = module.student if kind == "critic" else module
  np.testing.assert_array_equal(student.opens_bracket[:rows], tables[0])
  np.testing.assert_array_equal(student.digit[:rows], tables[1])
  assert not student.opens_bracket[rows:].any() and (student.digit[rows:] == -1).all()


def test_constants_are_not_stored_but_made_from_the_tokenizer(folder):
  _, stored = checkpoint.load_model(folder / "student")
  assert not {"opens_bracket", "digit"} & set(stored)


def test_an_unknown_kind_is_refused(folder, tmp_path):
  model = build.load(folder / "tagger")
  with pytest.raises(ValueError, match="task 'teacher' is unknown: choose tagger, student, generative"):
    build.maker("teacher", model.config, model.tokenizer)


@pytest.mark.parametrize("change", [{"format": 2}, {"kind": "teacher"}, {"kind": None}])
def test_a_directory_of_another_version_is_refused(folder, tmp_path, change):
  about = checkpoint.load_config(folder / "student") | change
  (tmp_path / "config.json").write_text(json.dumps(about))
  with pytest.raises(CheckpointError, match="this version reads format 1 of tagger, student, "):
    build.load(tmp_path)


# --- parts of another model ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def filled(one_device):
  """Two students of noise."""
  return [nnx.split(tiny.student(seed=seed))[1] for seed in (0, 1)]


@pytest.fixture
def state(filled):
  """The student whose parts are replaced; every test may write to its own."""
  return jax.tree.map(lambda leaf: jax.device_put(np.array(leaf), leaf.sharding), filled[0])


@pytest.fixture
def source(filled):
  """The other one, as `checkpoint.load_model` returns it: nested dicts of arrays."""
  return nnx.to_pure_dict(jax.tree.map(np.asarray, filled[1].filter(nnx.Param)))


def test_named_parts_are_copied_and_nothing_else(filled, state, source):
  ours, theirs = map(arrays, filled)
  copied = arrays(build.copy_parts(state, source, ("vit", "log_temperature")))
  for name in ours:
    wanted = theirs if name.split("/")[0] in ("vit", "log_temperature") else ours
    np.testing.assert_array_equal(copied[name], wanted[name], err_msg=name)
  assert not np.array_equal(ours["vit/positions"], theirs["vit/positions"])


def test_no_name_copies_all_that_both_have(filled, state, source):
  del source["qformer"]
  source["words"] = {"kernel": np.ones(3)}  # a tagger's
  ours, theirs = map(arrays, filled)
  copied = arrays(build.copy_parts(state, source, ()))
  for name in ours:
    wanted = ours if name.split("/")[0] == "qformer" else theirs
    np.testing.assert_array_equal(copied[name], wanted[name], err_msg=name)


def test_copied_parts_stay_where_the_model_is(state, source):
  before = {name: leaf.sharding for name, leaf in named_leaves(state).items()}
  after = named_leaves(build.copy_parts(state, source, ("vit",)))
  assert {name: leaf.sharding for name, leaf in after.items()} == before


@pytest.mark.parametrize("parts", [("vitt",), ("vit", "vitt"), ("opens_bracket",)])
def test_a_part_that_is_not_there_is_named(state, source, parts):
  with pytest.raises(CheckpointError, match=f"no part '{parts[-1]}' to copy; the source has "
                     "itm_head, language_head, ln_vision, log_temperature"):
    build.copy_parts(state, source, parts)


def test_a_source_without_any_part_is_no_silent_start_from_nothing(state, source):
  with pytest.raises(CheckpointError, match="init.model has no part of this model: it has student; "
                     "wanted are itm_head, "):
    build.copy_parts(state, {"student": source}, ())


def test_another_size_names_the_leaf(state, source):
  source["vit"]["patchify"]["kernel"] = np.zeros((1, 2, 3))
  with pytest.raises(CheckpointError, match=r"does not fit: vit/patchify/kernel is missing or of "
                     r"another shape \(1 such\); use the model sizes of that directory's config.json"):
    build.copy_parts(state, source, ("vit",))


@pytest.mark.parametrize("change", ["missing", "too many"])
def test_other_leaves_are_named(state, source, change):
  if change == "missing":
    name = "patchify"
    del source["vit"][name]["kernel"]
  else:
    name = "register"
    source["vit"][name] = {"kernel": np.zeros(3)}
  with pytest.raises(CheckpointError, match=f"does not fit: vit/{name}/kernel is missing"):
    build.copy_parts(state, source, ())
