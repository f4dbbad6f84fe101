"""Generative BLIP-2s in and out of transformers' folders: the same likelihoods, the same texts, the
same bytes."""
import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, Blip2ForConditionalGeneration, Blip2Model

from data_pipeline import tokenizer as tokenizers
from lskd_jax import checkpoint, trees
from lskd_jax.convert import hf, lavis, lavis_decoder, lavis_export, tensors
from lskd_jax.models.generate import Decoding
from lskd_jax.models.student import student_config
from lskd_jax.trees import CheckpointError
from tests.lskd_jax.torch_blip2 import normalised, save
from tests.lskd_jax.torch_decoders import left_padded
from tests.lskd_jax.torch_generative import (
  END,
  PAD,
  SHAPES,
  START,
  ours,
  pictures,
  reference,
  theirs_generated,
  theirs_logits,
)

PROMPTS = [[START, 9, 30, 12, 44], [START, 6, 7, 50, 31, 40, 4, 19]]
WRITTEN = np.array([[8, 15, 22, 41, 5], [33, 12, 12, 57, 9]])


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  """A tokenizer whose ids the tests do not use; only its brackets and digits have to be there."""
  folder = tmp_path_factory.mktemp("tokenizer")
  tokenizers.train_tokenizer(["a cat"] * 2, folder, 100)
  return folder


@pytest.fixture(scope="module")
def imported(tmp_path_factory, tokenizer):
  """{shape: (model, their folder, our model directory)}, made when asked for."""
  made = {}

  def get(name):
    if name not in made:
      folder = tmp_path_factory.mktemp(name)
      model = reference(name)
      save(model, folder / "theirs", tokenizer)
      made[name] = model, folder / "theirs", hf.import_hf(folder / "theirs", folder / "ours",
                                                          progress=False).model
    return made[name]
  return get


@pytest.mark.parametrize("name", SHAPES)
def test_the_same_likelihoods_as_pytorch(name, imported):
  """Within 1e-4 of the largest, after prompts of different lengths."""
  model, _, directory = imported(name)
  pixels, (prompt, real) = pictures(model), left_padded(PROMPTS, PAD)
  logits = torch.tensor(theirs_logits(model, pixels, prompt, real, WRITTEN)[:, :-1])
  want = logits.log_softmax(-1).gather(-1, torch.tensor(WRITTEN)[..., None])[..., 0].numpy()
  have = ours(directory, pixels, prompt, real, WRITTEN)
  assert np.abs(have - want).max() <= 1e-4 * np.abs(want).max()


@pytest.mark.parametrize("beams", [1, 5])
@pytest.mark.parametrize("name", SHAPES)
def test_the_same_texts_as_pytorch(name, beams, imported):
  """Token by token, up to 42 of them."""
  model, _, directory = imported(name)
  pixels, (prompt, real) = pictures(model), left_padded(PROMPTS, PAD)
  want = theirs_generated(model, pixels, prompt, real, num_beams=beams, max_new_tokens=42)
  have = ours(directory, pixels, prompt, real,
              decoding=Decoding(42, beams=beams, ends=(END,), pad=PAD)).tokens
  assert have[:, :want.shape[1]].tolist() == want.tolist()
  assert (have[:, want.shape[1]:] == PAD).all()


def test_a_model_directory_is_loaded_onto_a_mesh(imported):
  """Rows and parameters over two devices, heads and hidden widths over two: the same texts."""
  model, _, directory = imported("opt")
  pixels, (prompt, real) = pictures(model), left_padded(PROMPTS, PAD)
  decoding = Decoding(8, beams=3, ends=(END,), pad=PAD)
  alone, split = (ours(directory, pixels, prompt, real, decoding=decoding, fsdp=n, tensor=n)
                  for n in (1, 2))
  assert alone.tokens.tolist() == split.tokens.tolist()
  np.testing.assert_allclose(alone.scores, split.scores, rtol=1e-5)


@pytest.mark.parametrize("name", SHAPES)
def test_export_gives_back_every_tensor_and_transformers_loads_it(name, imported, tmp_path):
  model, folder, directory = imported(name)
  out = hf.export_hf(directory, tmp_path / "export", progress=False)
  before, after = tensors.read_folder(folder), tensors.read_folder(out)
  for key, tensor in after.items():
    assert tensor.read().tobytes() == before[key].read().tobytes(), key
  assert set(before) - set(after) <= {"language_model.lm_head.weight"}  # a copy of the word table
  loaded, info = Blip2ForConditionalGeneration.from_pretrained(out, output_loading_info=True)
  assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
  pixels, (prompt, real) = pictures(model), left_padded(PROMPTS, PAD)
  np.testing.assert_array_equal(theirs_logits(loaded.eval(), pixels, prompt, real, WRITTEN),
                                theirs_logits(model, pixels, prompt, real, WRITTEN))


@pytest.mark.parametrize("name", ["opt", "t5"])
def test_regions_in_pytorch(name, imported, tmp_path):
  """With open gates, modeling_lskd.py gives the same likelihoods and answers, and boxes matter."""
  directory = opened(imported(name)[2], tmp_path / "opened")
  out = hf.export_hf(directory, tmp_path / "export", progress=False)
  student = AutoModelForImageTextToText.from_pretrained(out, trust_remote_code=True).eval()
  pixels = pictures(student, 1)
  words = tokenizers.load_tokenizer(directory / "tokenizer")
  bracket, zero, one = (tokenizers.token_id(words, word) for word in "[01")
  prompt = np.array([[9, bracket, one, 8]])  # mentions [1]; and the answer mentions [0]
  written = np.array([[7, bracket, zero, 12]])
  real = np.ones_like(prompt, bool)
  boxes = np.array([[0.1, 0.2, 0.5, 0.9], [0.55, 0.05, 0.6, 0.1]], np.float32)
  found = []
  for rows in (boxes, boxes[::-1].copy()):
    have = ours(directory, pixels, prompt, real, written, boxes=rows)
    want = student.score(normalised(pixels), torch.tensor(rows), torch.tensor(prompt[0]),
                         torch.tensor(written)).numpy()
    assert np.abs(have - want).max() <= 1e-5 * np.abs(want).max()
    found.append(want)
  assert np.abs(found[0] - found[1]).max() > 1e-3
  answer = student.ask(normalised(pixels), torch.tensor(boxes), torch.tensor(prompt[0]), 12).tolist()
  text = ours(directory, pixels, prompt, real, decoding=Decoding(12, ends=(END,), pad=END),
              boxes=boxes).tokens[0].tolist()
  assert text[:len(answer)] == answer and set(text[len(answer):]) <= {END}


def opened(directory, out):
  """A copy of a model directory with random region parameters."""
  about, params = checkpoint.load_model(directory)
  rng = np.random.default_rng(0)

  def drawn(tree):
    return {name: drawn(leaf) if isinstance(leaf, dict) else
            (0.3 * rng.standard_normal(leaf.shape)).astype(np.float32) for name, leaf in tree.items()}
  params["regions"] = drawn(params["regions"])
  for group in params["qformer"]["stack"]["blocks"]["blocks"].values():
    if "cross" in group and group["cross"]:
      group["cross"]["gate"] = drawn({"gate": group["cross"]["gate"]})["gate"]
  checkpoint.save_model(out, about, params, directory / "tokenizer")
  return out


def test_blip2_model_is_read_too(imported, tokenizer, tmp_path):
  """Blip2Model holds the same tensors under the same names."""
  model, _, directory = imported("opt")
  other = Blip2Model(model.config)
  other.load_state_dict(model.state_dict())
  folder = save(other, tmp_path / "theirs", tokenizer)
  again = hf.import_hf(folder, tmp_path / "ours", progress=False).model
  same = checkpoint.load_model(again)[1], checkpoint.load_model(directory)[1]
  assert same[0]["decoder"]["words"].tobytes() == same[1]["decoder"]["words"].tobytes()


@pytest.mark.parametrize("change, message", [
    (dict(model_type="llama"), "text_config.model_type is 'llama'; only opt and t5 are computed here"),
    (dict(num_hidden_layers=3), "missing"),
    (dict(ffn_dim=41), "of another shape"),
    (dict(activation_function="silu"), "text_config.activation_function is 'silu'; only relu and gelu"),
    (dict(enable_bias=False), "text_config.enable_bias is false"),
])
def test_a_decoder_that_is_not_its_config_is_refused(change, message, imported, tmp_path):
  folder = tmp_path / "theirs"
  folder.mkdir()
  for file in imported("opt")[1].iterdir():
    (folder / file.name).write_bytes(file.read_bytes())
  about = json.loads((folder / "config.json").read_text())
  about["text_config"] |= change
  (folder / "config.json").write_text(json.dumps(about))
  with pytest.raises(CheckpointError, match=message) as caught:
    hf.import_hf(folder, tmp_path / "ours", progress=False)
  assert "\n" not in str(caught.value)
  assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize("name", ["opt", "t5"])
def test_lavis_stage_2_in_and_out(name, imported, tmp_path):
  """A .pth has neither ViT nor language model where they are frozen; with both given, and the side file,
  the student comes back bit for bit, and without it but for what LAVIS has no place for."""
  model, folder, directory = imported(name)
  language_model = tmp_path / "decoder"
  model.language_model.save_pretrained(language_model)
  about = json.loads((language_model / "config.json").read_text())
  about |= {"eos_token_id": END, **({"dense_act_fn": "gelu"} if name == "t5" else {})}
  (language_model / "config.json").write_text(json.dumps(about))
  for file in ("tokenizer.json", "tokenizer_config.json"):
    (language_model / file).write_bytes((folder / file).read_bytes())
  found = lavis_export.export_lavis(opened(directory, tmp_path / "opened"), tmp_path / "student.pth")
  assert any("language model is left out" in note for note in found.notes)
  keys = set(torch.load(tmp_path / "student.pth", weights_only=True)["model"])
  assert f"{name}_proj.weight" in keys and not any(key.startswith(f"{name}_model") for key in keys)
  again = lavis_decoder.import_stage2(tmp_path / "student.pth", tmp_path / "again",
                                      config=student_config({}), decoder_dir=language_model)
  want = trees.named_leaves(checkpoint.load_model(tmp_path / "opened")[1])
  have = trees.named_leaves(checkpoint.load_model(again.model)[1])
  assert set(want) == set(have)
  for key in want:
    if key != "vit/stack/blocks/qkv/bias":  # LAVIS has no key bias
      assert np.asarray(want[key]).tobytes() == np.asarray(have[key]).tobytes(), key


def test_stage_2_needs_its_language_model(imported, tmp_path):
  lavis_export.export_lavis(imported("opt")[2], tmp_path / "student.pth")
  with pytest.raises(CheckpointError, match="stage-2 model: give the folder of its language model"):
    lavis.import_lavis(tmp_path / "student.pth", tmp_path / "out", config=student_config({}),
                       tokenizer_dir=imported("opt")[1])
