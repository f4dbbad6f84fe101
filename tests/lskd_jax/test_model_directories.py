"""Model directories: what is written comes back, or an error says why not."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lskd_jax.checkpoint import load_config, load_model, save_model
from lskd_jax.trees import CheckpointError
from tests.lskd_jax.tiny_checkpoints import assert_same_bits, flip_a_bit, init, largest_data_file

# TensorStore drops the futures of its other reads when one of a damaged checkpoint fails.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture
def tokenizer(tmp_path):
  folder = tmp_path / "a_tokenizer"
  folder.mkdir()
  (folder / "tokenizer.json").write_text("{}")
  return folder


def test_a_model_directory_comes_back_as_it_was(tmp_path, tokenizer):
  params = init(jax.random.key(0))["frozen"]
  save_model(tmp_path / "model", {"width": 64}, params, tokenizer)
  assert sorted(p.name for p in (tmp_path / "model").iterdir()) == [
      "config.json", "params", "tokenizer"]
  assert (tmp_path / "model" / "tokenizer" / "tokenizer.json").read_text() == "{}"
  config, loaded = load_model(tmp_path / "model", jax.eval_shape(lambda: params))
  assert config == {"width": 64}
  assert_same_bits(loaded, params)


def test_a_model_loads_without_its_code_as_dicts_of_numpy_arrays(tmp_path):
  params = init(jax.random.key(0))["params"]
  save_model(tmp_path / "model", {}, params)
  _, loaded = load_model(tmp_path / "model")
  assert isinstance(loaded["heads"]["1"]["kernel"], np.ndarray)
  assert_same_bits(loaded, params)


def test_a_model_can_be_saved_from_numpy_and_again_over_itself(tmp_path):
  for value in (1, 2):
    save_model(tmp_path / "model", {"value": value}, {"kernel": np.full((2, 3), value, np.float32)})
  config, params = load_model(tmp_path / "model")
  assert config == {"value": 2} and params["kernel"].tolist() == [[2, 2, 2], [2, 2, 2]]
  assert [p.name for p in tmp_path.iterdir()] == ["model"]  # no temporary folder stays


def test_errors_about_model_directories_say_what_is_wrong(tmp_path):
  with pytest.raises(CheckpointError, match="nowhere is not a model directory: it has no config"):
    load_model(tmp_path / "nowhere")
  (tmp_path / "notes.txt").write_text("keep me")
  with pytest.raises(CheckpointError, match="holds other files: choose a new or empty folder"):
    save_model(tmp_path, {}, {"a": jnp.zeros(1)})
  with pytest.raises(CheckpointError, match="is not a folder: expected a tokenizer"):
    save_model(tmp_path / "model", {}, {"a": jnp.zeros(1)}, tmp_path / "no_tokenizer")
  with pytest.raises(CheckpointError, match="leaf a is float64: only arrays of at most 32 bits"):
    save_model(tmp_path / "model", {}, {"a": np.zeros(1)})
  save_model(tmp_path / "model", {}, {"a": jnp.zeros(1), "b": jnp.zeros(1)})
  with pytest.raises(CheckpointError, match="missing on disk: c; on disk but not in the model: b"):
    load_model(tmp_path / "model", {"a": jnp.zeros(1), "c": jnp.zeros(1)})
  (tmp_path / "model" / "config.json").write_text('{"half": ')
  with pytest.raises(CheckpointError, match="config.json is not JSON"):
    load_config(tmp_path / "model")


def test_a_damaged_model_directory_is_an_error(tmp_path):
  save_model(tmp_path / "model", {}, {"a": jax.random.normal(jax.random.key(0), (64, 64))})
  flip_a_bit(largest_data_file(tmp_path / "model"))
  with pytest.raises(CheckpointError, match="is damaged"):
    load_model(tmp_path / "model")
