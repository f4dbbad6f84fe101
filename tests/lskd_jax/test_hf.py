"""transformers' BLIP-2 in and out: the same numbers as PyTorch, and every tensor back as it was."""
import hashlib
import json
import shutil

import numpy as np
import pytest
import torch
from transformers import AutoConfig, Blip2ForImageTextRetrieval

from data_pipeline import tokenizer as tokenizers
from lskd_jax import checkpoint, trees
from lskd_jax.convert import hf, hf_configs, tensors
from lskd_jax.trees import CheckpointError
from tests.lskd_jax import tiny_models
from tests.lskd_jax.torch_blip2 import (
  WORDS,
  inputs,
  our_features,
  ours,
  reference,
  save,
  their_features,
  theirs,
)

# vit: side, patch, width, depth, heads, hidden; Q-Former: width, depth, heads, hidden, queries,
# cross-attention every; width of the embeddings. Little divides anything evenly.
SHAPES = [
    (28, 14, 24, 2, 2, 40, 16, 2, 2, 32, 3, 2, 8),
    (30, 7, 15, 1, 3, 33, 21, 3, 3, 17, 5, 3, 7),    # 2 px left over at the edge
    (33, 11, 22, 3, 1, 10, 12, 2, 4, 50, 1, 1, 5),   # cross-attention in every layer
    (16, 16, 36, 1, 4, 64, 20, 4, 5, 20, 9, 2, 16),  # a single patch
    (45, 9, 18, 2, 6, 54, 18, 3, 2, 40, 4, 1, 3),
    (24, 5, 14, 4, 7, 28, 10, 6, 1, 11, 2, 3, 9),
    (20, 10, 44, 2, 11, 13, 26, 1, 13, 30, 6, 1, 1),
    (39, 13, 8, 1, 2, 16, 40, 2, 8, 80, 7, 2, 12),
    (26, 6, 27, 5, 9, 7, 9, 2, 3, 9, 32, 1, 4),
    (64, 8, 10, 2, 5, 30, 14, 4, 7, 28, 8, 2, 6),
    (21, 7, 32, 3, 4, 48, 32, 6, 4, 64, 10, 2, 10),
    (50, 25, 6, 2, 1, 24, 24, 3, 6, 12, 3, 3, 11),
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  folder = tmp_path_factory.mktemp("tokenizer")
  return tokenizers.train_tokenizer(WORDS * 2, folder, 256), folder


@pytest.fixture
def saved(tmp_path, tokenizer):
  """(model, folder) of one saved reference."""
  model = reference(SHAPES[0], tokenizer[0].get_vocab_size())
  return model, save(model, tmp_path / "theirs", tokenizer[1])


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"vit{s[2]}x{s[3]}-qformer{s[6]}x{s[7]}")
def test_the_same_numbers_as_pytorch(shape, tmp_path, tokenizer):
  """ViT, ITM and ITC within 1e-5 of the largest value, the likelier label identical."""
  model = reference(shape, tokenizer[0].get_vocab_size())
  folder = save(model, tmp_path / "theirs", tokenizer[1])
  found = hf.import_hf(folder, tmp_path / "ours", progress=False)
  pixels, tokens = inputs(model, tokenizer[0])
  wanted, computed = theirs(model, pixels, tokens), ours(found.model, pixels, tokens)
  for want, have in zip(wanted, computed):
    assert np.abs(want - have).max() <= 1e-5 * np.abs(want).max()
  assert (wanted[1].argmax(-1) == computed[1].argmax(-1)).all()


@pytest.mark.parametrize("size", [(364, 364), (480, 480), (224, 448), (112, 448), (250, 130)])
def test_another_image_size_stretches_the_positions(size, tmp_path, tokenizer):
  """As transformers does at run time when asked to; 112x448 has as many patches as 224x224."""
  model = reference((224, 28, *SHAPES[0][2:]), tokenizer[0].get_vocab_size())
  folder = save(model, tmp_path / "theirs", tokenizer[1])
  found = hf.import_hf(folder, tmp_path / "ours", image_size=size, progress=False)
  pixels = np.random.default_rng(0).integers(0, 256, (2, *size, 3), np.uint8)
  wanted = their_features(model, pixels, interpolate_pos_encoding=True)
  have = our_features(found.model, pixels)
  assert np.abs(wanted - have).max() <= 1e-5 * np.abs(wanted).max()
  if size[0] != size[1]:  # the list in config.json is a pair again; transformers has squares only
    assert checkpoint.load_config(found.model)["model"]["vit"]["image_size"] == list(size)
    with pytest.raises(CheckpointError, match=f"sees pictures of {size[0]}x{size[1]} px; .* squares"):
      hf.export_hf(found.model, tmp_path / "hf", progress=False)
    assert not (tmp_path / "hf").exists()


def test_quick_gelu_goes_in_and_out(saved, tmp_path, tokenizer):
  """A transformers ViT may have CLIP's activation."""
  model, _ = saved
  model.config.vision_config.hidden_act = "quick_gelu"
  folder = save(model, tmp_path / "quick", tokenizer[1])
  model = Blip2ForImageTextRetrieval.from_pretrained(folder)
  found = hf.import_hf(folder, tmp_path / "ours", progress=False)
  pixels = inputs(model, tokenizer[0])[0]
  wanted, have = their_features(model, pixels), our_features(found.model, pixels)
  assert np.abs(wanted - have).max() <= 1e-5 * np.abs(wanted).max()
  back = hf.export_hf(found.model, tmp_path / "back", progress=False)
  config = json.loads((back / "config.json").read_text())
  assert config["vision_config"]["hidden_act"] == "quick_gelu"


def test_out_again_every_tensor_is_the_same_to_the_byte(saved, tmp_path):
  model, folder = saved
  hf.import_hf(folder, tmp_path / "ours", progress=False)
  back = hf.export_hf(tmp_path / "ours", tmp_path / "back", progress=False)
  again, report = Blip2ForImageTextRetrieval.from_pretrained(back, output_loading_info=True)
  assert not report["missing_keys"] and not report["unexpected_keys"]
  assert not report["mismatched_keys"]
  for (name, want), (_, have) in zip(model.state_dict().items(), again.state_dict().items()):
    assert want.numpy().tobytes() == have.numpy().tobytes(), name


def test_a_trained_student_comes_back_bit_for_bit(tmp_path):
  """Region tokens, the language head and the temperature travel in the side file."""
  student = tiny_models.make_model(tmp_path / "student")
  folder = hf.export_hf(student, tmp_path / "hf", progress=False)
  found = hf.import_hf(folder, tmp_path / "back", progress=False)
  assert found.fresh == []
  (about, want), (about_back, have) = (checkpoint.load_model(path) for path in (student, found.model))
  for part in ("vit", "qformer"):  # how to run it is no property of the weights
    about["model"][part] |= {"scan": True, "remat": "none"}
  assert about == about_back
  want, have = trees.named_leaves(want), trees.named_leaves(have)
  assert {name: value.tobytes() for name, value in want.items()} == {
      name: value.tobytes() for name, value in have.items()}


def test_shards_and_halves_are_read(saved, tmp_path, tokenizer):
  """float16 and bfloat16 become the same float32; the index may name several files."""
  model, _ = saved
  for kind in (torch.float16, torch.bfloat16):
    folder = tmp_path / str(kind)
    save(model.to(kind), folder, tokenizer[1], max_shard_size="20KB")
    assert (folder / tensors.INDEX).exists()
    found = hf.import_hf(folder, tmp_path / "ours", progress=False)
    leaves = trees.named_leaves(checkpoint.load_model(found.model)[1])
    want = model.state_dict()["itm_head.weight"].float().numpy()
    assert (leaves["itm_head/kernel"].T == want).all()


def test_what_a_config_leaves_out_is_as_transformers_has_it(saved, tmp_path):
  """Published folders name only what differs from the defaults."""
  about = json.loads((saved[1] / "config.json").read_text())
  whole = hf_configs.read_config(saved[1], "student", 8)
  for part, name in hf_configs.PARTS.items():
    defaults = AutoConfig.for_model(name).to_dict()
    about[part] = {key: value for key, value in about[part].items() if value != defaults.get(key)}
  assert "hidden_act" not in about["vision_config"] and "layer_norm_eps" not in about["qformer_config"]
  (tmp_path / "config.json").write_text(json.dumps(about))
  assert hf_configs.read_config(tmp_path, "student", 8) == whole


def test_an_export_in_halves_keeps_the_qformer_whole(saved, tmp_path):
  model, folder = saved
  hf.import_hf(folder, tmp_path / "ours", progress=False)
  found = tensors.read_folder(hf.export_hf(tmp_path / "ours", tmp_path / "half", dtype="float16",
                                           progress=False))
  kinds = {key: tensor.dtype for key, tensor in found.items()}
  assert kinds["itm_head.weight"] == np.float16 and kinds["query_tokens"] == np.float32
  assert kinds["qformer.layernorm.weight"] == np.float32
  want = model.state_dict()["itm_head.weight"].half().numpy()
  assert (found["itm_head.weight"].read() == want).all()


def test_large_exports_are_split_and_their_sums_hold(saved, tmp_path, monkeypatch):
  model, folder = saved
  hf.import_hf(folder, tmp_path / "ours", progress=False)
  monkeypatch.setattr(tensors.write_folder, "__defaults__", (20_000, iter))
  back = hf.export_hf(tmp_path / "ours", tmp_path / "back", progress=False)
  assert len(list(back.glob("model-*.safetensors"))) > 1
  for line in (back / "SHA256SUMS").read_text().splitlines():
    digest, name = line.split("  ")
    assert hashlib.sha256((back / name).read_bytes()).hexdigest() == digest
  again = Blip2ForImageTextRetrieval.from_pretrained(back)
  assert all((a == b).all() for a, b in zip(model.parameters(), again.parameters()))


# --- what is refused -----------------------------------------------------------------------------


def edit_config(folder, *path, value):
  config = json.loads((folder / "config.json").read_text())
  place = config
  for key in path[:-1]:
    place = place[key]
  place[path[-1]] = value
  (folder / "config.json").write_text(json.dumps(config))


def truncate(folder):
  data = (folder / tensors.SINGLE).read_bytes()
  (folder / tensors.SINGLE).write_bytes(data[:-100])


def lose_a_shard(folder):
  (folder / tensors.INDEX).write_text(json.dumps({"weight_map": {"a": "model-00002.safetensors"}}))


@pytest.mark.parametrize("damage,error", [
    (truncate, r"model.safetensors is no complete safetensors file"),
    (lose_a_shard, r"index.json names model-00002.safetensors, which is not there"),
    (lambda folder: (folder / tensors.SINGLE).unlink(), "holds neither model.safetensors nor"),
    (lambda folder: (folder / "config.json").unlink(), "it has no config.json"),
    (lambda folder: edit_config(folder, "model_type", value="blip"), "model_type is 'blip'"),
    (lambda folder: edit_config(folder, "vision_config", "hidden_act", value="relu"),
     "vision_config.hidden_act is 'relu'; only gelu and quick_gelu are computed here"),
    (lambda folder: edit_config(folder, "qformer_config", "hidden_act", value="quick_gelu"),
     "qformer_config.hidden_act is 'quick_gelu'"),
    (lambda folder: edit_config(folder, "vision_config", "image_size", value=[28, 42]),
     "is not square"),
    (lambda folder: edit_config(folder, "vision_config", "num_hidden_layers", value=1),
     r"unknown: vision_model.encoder.layers.1"),
    (lambda folder: edit_config(folder, "qformer_config", "intermediate_size", value=31),
     r"of another shape: .*intermediate.dense.weight \(32x16, the config says 31x16\)"),
    (lambda folder: (folder / "tokenizer.json").unlink(), "has no tokenizer.json, no vocab.txt"),
])
def test_a_damaged_source_is_one_line_and_nothing_is_written(saved, tmp_path, damage, error):
  folder = saved[1]
  damage(folder)
  before = sorted(path.name for path in tmp_path.iterdir())
  with pytest.raises(ValueError, match=error) as caught:
    hf.import_hf(folder, tmp_path / "ours", progress=False)
  assert "\n" not in str(caught.value)
  assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_damaged_model_directory_is_not_exported(tmp_path):
  student = tiny_models.make_model(tmp_path / "student")
  largest = max((student / "params").rglob("d/*"), key=lambda path: path.stat().st_size)
  data = bytearray(largest.read_bytes())
  data[len(data) // 2] ^= 4
  largest.write_bytes(data)
  with pytest.raises(CheckpointError, match="damaged"):
    hf.export_hf(student, tmp_path / "hf", progress=False)
  assert not (tmp_path / "hf").exists()


def test_an_import_never_replaces_its_source(saved):
  """A transformers folder has a config.json, as a model directory has."""
  folder = saved[1]
  before = sorted(path.name for path in folder.iterdir())
  with pytest.raises(CheckpointError, match="holds other files: choose a new or empty folder"):
    hf.import_hf(folder, folder, progress=False)
  assert sorted(path.name for path in folder.iterdir()) == before


def test_an_export_never_overwrites(tmp_path):
  student = tiny_models.make_model(tmp_path / "student")
  (tmp_path / "hf").mkdir()
  (tmp_path / "hf" / "mine.txt").write_text("keep")
  with pytest.raises(CheckpointError, match="choose a new or empty folder"):
    hf.export_hf(student, tmp_path / "hf", progress=False)
  shutil.rmtree(tmp_path / "hf")
  with pytest.raises(CheckpointError, match="dtype 'float8' is unknown"):
    hf.export_hf(student, tmp_path / "hf", dtype="float8", progress=False)
