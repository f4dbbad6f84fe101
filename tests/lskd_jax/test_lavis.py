"""LAVIS's .pth files in: the names of its stage-1 model, the frozen ViT in a file of its own."""
import dataclasses
import pickle

import numpy as np
import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from data_pipeline import tokenizer as tokenizers
from lskd_jax import checkpoint, trees
from lskd_jax.convert import hf, lavis, tables
from lskd_jax.models.qformer import QFormerConfig
from lskd_jax.models.student import StudentConfig
from lskd_jax.models.vit import CLIP_VIT_L, VitConfig
from lskd_jax.trees import CheckpointError
from tests.lskd_jax.torch_blip2 import WORDS, inputs, noise, normalised, our_features, ours, reference, theirs

SHAPE = (28, 7, 24, 3, 2, 40, 16, 4, 2, 32, 3, 2, 8)
CONFIG = StudentConfig(
    vit=VitConfig(image_size=224, patch=7, width=24, depth=2, heads=2, hidden=40),
    qformer=QFormerConfig(width=16, depth=4, heads=2, hidden=32, queries=3, max_tokens=40),
    embed=8)


def lavis_names(state: dict, width: int) -> dict:
  """transformers' state under LAVIS's names, by the replacements of the authors' own converter."""
  renamed = {}
  for key, value in state.items():
    key = key.replace("vision_model.embeddings.class_embedding", "visual_encoder.cls_token")
    key = key.replace("vision_model.embeddings.position_embedding", "visual_encoder.pos_embed")
    key = key.replace("vision_model.embeddings.patch_embedding", "visual_encoder.patch_embed.proj")
    key = key.replace("vision_model.encoder.layers", "visual_encoder.blocks")
    key = key.replace("self_attn.qkv", "attn.qkv").replace("self_attn.projection", "attn.proj")
    key = key.replace("layer_norm", "norm").replace("vision_model.post_layernorm", "ln_vision")
    key = key.replace("attention.attention", "attention.self")
    key = key.replace("qformer.encoder", "Qformer.bert.encoder")
    key = key.replace("qformer.layernorm", "Qformer.bert.embeddings.LayerNorm")
    if key.startswith("embeddings."):
      key = "Qformer.bert." + key
    key = key.replace("vision_projection", "vision_proj").replace("text_projection", "text_proj")
    if key.endswith("attn.qkv.bias"):  # LAVIS has no key bias
      assert not value[width:2 * width].any()
      renamed[key.replace("qkv.bias", "q_bias")] = value[:width].clone()
      renamed[key.replace("qkv.bias", "v_bias")] = value[2 * width:].clone()
    else:
      renamed[key] = value
  return renamed


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  """(transformers' model, state of the same in LAVIS's names, tokenizer, its folder)."""
  folder = tmp_path_factory.mktemp("tokenizer")
  tokenizer = tokenizers.train_tokenizer(WORDS * 2, folder, 256)
  model = reference(SHAPE[:3] + (2,) + SHAPE[4:], tokenizer.get_vocab_size())
  with torch.no_grad():
    for layer in model.vision_model.encoder.layers:
      layer.self_attn.qkv.bias[24:48] = 0
  model.vision_model.post_layernorm.eps = 1e-5  # where the two implementations differ
  state = lavis_names(model.state_dict(), 24)
  words, width = state["Qformer.bert.embeddings.word_embeddings.weight"].shape
  generator = torch.Generator().manual_seed(1)
  draw = lambda *shape: torch.randn(shape, generator=generator)
  head = "Qformer.cls.predictions"
  state |= {
      "temp": torch.tensor(0.05), f"{head}.bias": draw(words),
      f"{head}.transform.dense.weight": draw(width, width),
      f"{head}.transform.dense.bias": draw(width),
      f"{head}.transform.LayerNorm.weight": draw(width),
      f"{head}.transform.LayerNorm.bias": draw(width),
      f"{head}.decoder.weight": state["Qformer.bert.embeddings.word_embeddings.weight"],
      f"{head}.decoder.bias": draw(words),
      "Qformer.bert.embeddings.position_ids": torch.arange(40)[None]}
  return model, state, tokenizer, folder


def run(made, path, out, **options):
  return lavis.import_lavis(path, out, config=CONFIG, tokenizer_dir=made[3], progress=False,
                            **options)


def test_the_same_numbers_as_pytorch(made, tmp_path):
  """And the image size comes from the position embeddings, whatever the config says."""
  model, state, tokenizer, _ = made
  torch.save({"model": state, "optimizer": {}}, tmp_path / "blip2.pth")
  found = run(made, tmp_path / "blip2.pth", tmp_path / "ours")
  config, leaves = checkpoint.load_model(found.model)
  assert config["model"]["vit"]["image_size"] == 28
  leaves = trees.named_leaves(leaves)
  assert np.exp(leaves["log_temperature"]) == pytest.approx(0.05)
  assert (leaves["language_head/bias"] == state["Qformer.cls.predictions.bias"].numpy()).all()
  pixels, tokens = inputs(model, tokenizer)
  for want, have in zip(theirs(model, pixels, tokens), ours(found.model, pixels, tokens)):
    assert np.abs(want - have).max() <= 1e-5 * np.abs(want).max()


def test_the_frozen_vit_comes_from_its_own_file(made, tmp_path):
  """With a block more than BLIP-2 uses, and a classifier; its halves become float32."""
  _, state, _, _ = made
  vit = {key.removeprefix(lavis.VIT): value for key, value in state.items()
         if key.startswith(lavis.VIT)}
  rest = {key: value for key, value in state.items() if not key.startswith(lavis.VIT)}
  more = {key.replace("blocks.0", "blocks.2"): value for key, value in vit.items()
          if key.startswith("blocks.0")}
  vit = {key: value.half() for key, value in (vit | more).items()}
  torch.save({"model": rest}, tmp_path / "student.pth")
  torch.save(vit | {"head.weight": torch.zeros(3), "norm.bias": torch.zeros(24)},
             tmp_path / "eva.pth")
  with pytest.raises(ValueError, match="student.pth holds no ViT .*: give its file too"):
    run(made, tmp_path / "student.pth", tmp_path / "ours")
  found = run(made, tmp_path / "student.pth", tmp_path / "ours", vit=tmp_path / "eva.pth")
  leaves = trees.named_leaves(checkpoint.load_model(found.model)[1])
  want = state["visual_encoder.cls_token"].half().float().numpy()
  assert (leaves["vit/class_token"] == want[0, 0]).all()


def test_from_lavis_to_transformers(made, tmp_path):
  """Every tensor that transformers has a place for arrives there unchanged."""
  model, state, _, _ = made
  torch.save(state, tmp_path / "blip2.pth")
  found = run(made, tmp_path / "blip2.pth", tmp_path / "ours")
  folder = hf.export_hf(found.model, tmp_path / "hf", progress=False)
  again = type(model).from_pretrained(folder)
  assert all((a == b).all() for a, b in zip(model.parameters(), again.parameters()))


# --- CLIP's ViT ----------------------------------------------------------------------------------


CLIP = dataclasses.replace(CONFIG, vit=dataclasses.replace(
    CLIP_VIT_L, image_size=28, patch=7, width=24, depth=2, heads=2, hidden=40))


def clip_model(vit: VitConfig, **options):
  """transformers' CLIP tower with a block more than BLIP-2 uses."""
  return CLIPVisionModel(CLIPVisionConfig(
      hidden_size=vit.width, num_hidden_layers=vit.depth + 1, num_attention_heads=vit.heads,
      intermediate_size=vit.hidden, image_size=vit.image_size, patch_size=vit.patch, **options))


def clip_names(state: dict) -> dict:
  """Its state under the names of OpenAI's CLIP, which LAVIS keeps."""
  renamed = {}
  for key, value in state.items():
    if "k_proj" in key or "v_proj" in key:
      continue
    if "q_proj" in key:  # q, k and v are one tensor
      value = torch.cat([state[key.replace("q_proj", name)] for name in ("q_proj", "k_proj", "v_proj")])
    for theirs_, lavis_ in (
        ("embeddings.class_embedding", "class_embedding"),
        ("embeddings.position_embedding.weight", "positional_embedding"),
        ("embeddings.patch_embedding", "conv1"), ("pre_layrnorm", "ln_pre"),
        ("post_layernorm", "ln_post"), ("encoder.layers", "transformer.resblocks"),
        ("self_attn.q_proj.", "attn.in_proj_"), ("self_attn.out_proj", "attn.out_proj"),
        ("layer_norm", "ln_"), ("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj")):
      key = key.replace(theirs_, lavis_)
    renamed[key] = value
  return renamed


@pytest.fixture(scope="module")
def clip(made):
  """(CLIP's tower, its state under LAVIS's names, the rest of a stage-1 model)."""
  model = noise(clip_model(CLIP.vit))
  rest = {key: value for key, value in made[1].items() if not key.startswith(lavis.VIT)}
  return model, clip_names(model.state_dict()), rest


@pytest.mark.parametrize("image_size", [None, 45, (28, 56), (14, 56)])
def test_clips_vit_from_its_own_file(made, clip, tmp_path, image_size):
  """Its last block, last norm and projection are passed over; at any size it is that of PyTorch."""
  model, vit, rest = clip
  torch.save({"model": rest}, tmp_path / "blip2.pth")
  torch.save(vit | {"proj": torch.zeros(24, 8)}, tmp_path / "clip.pth")
  found = lavis.import_lavis(
      tmp_path / "blip2.pth", tmp_path / "ours", config=CLIP, tokenizer_dir=made[3],
      vit=tmp_path / "clip.pth", image_size=image_size, progress=False)
  size = dataclasses.replace(CLIP.vit, image_size=image_size or 28).size
  pixels = np.random.default_rng(0).integers(0, 256, (2, *size, 3), np.uint8)
  with torch.no_grad():
    states = model(normalised(pixels), interpolate_pos_encoding=True,
                   output_hidden_states=True).hidden_states
  want = states[CLIP.vit.depth].numpy()
  have = our_features(found.model, pixels)
  assert np.abs(want - have).max() <= 1e-5 * np.abs(want).max()


def test_clips_vit_within_the_checkpoint(made, clip, tmp_path):
  """`blip2_pretrained_vitL.pth`; with the sizes of another ViT, the line says where its own are."""
  _, vit, rest = clip
  whole = rest | {lavis.VIT + key: value for key, value in vit.items()
                  if "resblocks.2" not in key and "ln_post" not in key}
  torch.save(whole, tmp_path / "blip2.pth")
  load = lambda config: lavis.import_lavis(tmp_path / "blip2.pth", tmp_path / "ours", config=config,
                                           tokenizer_dir=made[3], progress=False)
  with pytest.raises(CheckpointError, match="has no visual_encoder.pos_embed: .*configs/blip2_vit_l.py"):
    load(CONFIG)
  found = load(CLIP)
  leaves = trees.named_leaves(checkpoint.load_model(found.model)[1])
  table = tables.vit_table(CLIP, tables.LAVIS_CLIP)
  assert {entry.theirs for entry in table} == {key for key in whole if key.startswith(lavis.VIT)}
  for entry in table:  # every number goes back to where it came from
    back = tables.to_theirs(entry, leaves[entry.ours][(*entry.at, ...)])
    assert back.tobytes() == whole[entry.theirs].numpy().tobytes(), entry
  with pytest.raises(CheckpointError, match="ours has CLIP's ViT .* transformers' BLIP-2 cannot hold"):
    hf.export_hf(found.model, tmp_path / "hf", progress=False)


def test_the_named_size_is_that_of_clips_vit_l():
  """Name by name and shape by shape, without its last block and last norm; nothing is allocated."""
  with torch.device("meta"):
    state = clip_names(clip_model(CLIP_VIT_L).state_dict())
  want = {lavis.VIT + key: tuple(value.shape) for key, value in state.items()
          if "resblocks.23." not in key and "ln_post" not in key}
  table = tables.vit_table(StudentConfig(vit=CLIP_VIT_L), tables.LAVIS_CLIP)
  assert {entry.theirs: entry.shape for entry in table} == want
  defaults = CLIPVisionConfig()  # of activation and epsilon: OpenAI's
  assert (CLIP_VIT_L.activation, CLIP_VIT_L.eps) == (defaults.hidden_act, defaults.layer_norm_eps)


# --- what is refused -----------------------------------------------------------------------------


class Payload:
  def __reduce__(self):
    return print, ("this ran",)


@pytest.mark.parametrize("content,error", [
    (lambda state: {**state, "extra": Payload()}, "holds more than tensors"),
    (lambda state: [1, 2], "holds no dictionary of tensors"),
    (lambda state: {"a": torch.zeros(2)}, "holds no ViT"),
    (lambda state: {key: v for key, v in state.items() if key != "query_tokens"},
     "missing: query_tokens"),
    (lambda state: state | {"opt_proj.weight": torch.zeros(1)}, "unknown: opt_proj.weight"),
])
def test_what_is_no_stage_1_model_is_one_line(made, tmp_path, content, error, capfd):
  torch.save(content(made[1]), tmp_path / "bad.pth")
  with pytest.raises(ValueError, match=error) as caught:
    run(made, tmp_path / "bad.pth", tmp_path / "ours")
  assert "\n" not in str(caught.value) and "this ran" not in capfd.readouterr().out
  assert not (tmp_path / "ours").exists()


def test_damaged_files_are_one_line(made, tmp_path):
  torch.save(made[1], tmp_path / "whole.pth")
  data = (tmp_path / "whole.pth").read_bytes()
  (tmp_path / "cut.pth").write_bytes(data[:len(data) // 2])
  (tmp_path / "pickle.pth").write_bytes(pickle.dumps(Payload(), protocol=2))
  for name, error in (("cut.pth", "no complete .pth file"), ("none.pth", "is not there"),
                      ("pickle.pth", "holds more than tensors|no complete .pth file")):
    with pytest.raises(ValueError, match=error) as caught:
      run(made, tmp_path / name, tmp_path / "ours")
    assert "\n" not in str(caught.value)
