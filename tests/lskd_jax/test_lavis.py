"""LAVIS's .pth files in and out: its stage-1 model, LSKD's critic, the frozen ViT in a file of its own."""
import dataclasses
import hashlib
import pickle

from flax import nnx
import jax
import numpy as np
import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from data_pipeline import corpus_stages, stages, tokenizer as tokenizers
from lskd_jax import checkpoint, parallel, scoring, trees
from lskd_jax.convert import hf, lavis, lavis_export, tables, tensors
from lskd_jax.models import build
from lskd_jax.models.qformer import QFormerConfig
from lskd_jax.models.student import StudentConfig
from lskd_jax.models.vit import CLIP_VIT_L, VitConfig
from lskd_jax.trees import CheckpointError
from tests.lskd_jax import tiny_models
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
    (lambda state: state | {"odd_proj.weight": torch.zeros(1)}, "unknown: odd_proj.weight"),
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


# --- out -----------------------------------------------------------------------------------------


def export(model, path, **options):
  return lavis_export.export_lavis(model, path, progress=False, **options)


def saved_state(path):
  content = torch.load(path, weights_only=True)
  assert set(content) == {"model"}
  return content["model"]


def leaves_of(model):
  return trees.named_leaves(checkpoint.load_model(model)[1])


def test_out_again_every_tensor_is_the_same_to_the_byte(made, tmp_path):
  """All keys that LAVIS's class has, its buffer and its tied tensors too, and no other."""
  _, state, _, _ = made
  torch.save(state, tmp_path / "blip2.pth")
  found = run(made, tmp_path / "blip2.pth", tmp_path / "ours")
  done = export(found.model, tmp_path / "back.pth")
  assert done.notes == []
  back = saved_state(done.file)
  assert back.keys() == state.keys()
  head = "Qformer.cls.predictions"
  for key in state.keys() - {"temp", f"{head}.decoder.bias"}:  # its decoder's bias is not tied here
    assert back[key].dtype == state[key].dtype and torch.equal(back[key], state[key]), key
  assert back["temp"].shape == () and back["temp"].item() == pytest.approx(0.05, rel=1e-6)
  for tied, key in ((f"{head}.decoder.weight", "Qformer.bert.embeddings.word_embeddings.weight"),
                    (f"{head}.decoder.bias", f"{head}.bias")):
    assert back[tied].data_ptr() == back[key].data_ptr()
  for line in (tmp_path / "back.pth.SHA256SUMS").read_text().splitlines():
    digest, name = line.split("  ")
    assert hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() == digest
  assert sorted(path.name for path in tmp_path.iterdir()) == [
      "back.pth", "back.pth.SHA256SUMS", "back.pth.lskd.safetensors", "blip2.pth", "ours"]


def test_through_a_pth_transformers_gets_the_same_scores(made, tmp_path):
  """Match logits, cosines and ViT features: bit for bit those of the model that it began with."""
  model, state, tokenizer, _ = made
  torch.save(state, tmp_path / "blip2.pth")
  found = run(made, tmp_path / "blip2.pth", tmp_path / "ours")
  done = export(found.model, tmp_path / "back.pth")
  found = run(made, done.file, tmp_path / "again")
  folder = hf.export_hf(found.model, tmp_path / "hf", progress=False)
  again = type(model).from_pretrained(folder).eval()
  again.vision_model.post_layernorm.eps = 1e-5
  pixels, tokens = inputs(model, tokenizer)
  for want, have in zip(theirs(model, pixels, tokens), theirs(again, pixels, tokens)):
    assert want.tobytes() == have.tobytes()


@pytest.mark.parametrize("kind", ["student", "critic"])
def test_with_its_side_file_a_model_comes_back_bit_for_bit(made, tmp_path, kind):
  """Whatever config the import is given; only a key bias, which changes nothing, is zero then."""
  model = tiny_models.make_model(tmp_path / "model", kind)
  done = export(model, tmp_path / "out.pth")
  assert len(done.notes) == 1 and "key biases are left out" in done.notes[0]
  found = lavis.import_lavis(done.file, tmp_path / "back", config=CONFIG, progress=False,
                             tokenizer_dir=model / "tokenizer")
  assert found.fresh == [] and found.kind == kind
  assert checkpoint.load_config(model) == checkpoint.load_config(found.model)
  want, have = leaves_of(model), leaves_of(found.model)
  bias = "student/" * (kind == "critic") + "vit/stack/blocks/qkv/bias"
  want[bias] = want[bias].copy()
  want[bias][:, 1] = 0
  assert {name: value.tobytes() for name, value in want.items()} == {
      name: value.tobytes() for name, value in have.items()}


def test_the_vit_can_stay_out(made, tmp_path):
  """Then it is needed to read the file again, as with what LAVIS trained."""
  torch.save(made[1], tmp_path / "blip2.pth")
  found = run(made, tmp_path / "blip2.pth", tmp_path / "ours")
  whole = saved_state(export(found.model, tmp_path / "whole.pth").file)
  rest = saved_state(export(found.model, tmp_path / "rest.pth", vit=False).file)
  assert whole.keys() - rest.keys() == {key for key in whole if key.startswith("visual_encoder.")}
  torch.save({key.removeprefix(lavis.VIT): value for key, value in whole.items()
              if key.startswith(lavis.VIT)}, tmp_path / "eva.pth")
  with pytest.raises(CheckpointError, match="rest.pth holds no ViT"):
    run(made, tmp_path / "rest.pth", tmp_path / "again")
  again = run(made, tmp_path / "rest.pth", tmp_path / "again", vit=tmp_path / "eva.pth")
  want, have = leaves_of(found.model), leaves_of(again.model)
  assert all((want[name] == have[name]).all() for name in want)


def test_another_epsilon_is_said(made, tmp_path):
  """The weights are as they were; what LAVIS computes with them is not quite."""
  torch.save(made[1], tmp_path / "blip2.pth")
  found = run(made, tmp_path / "blip2.pth", tmp_path / "ours")
  path = found.model / "config.json"
  path.write_text(path.read_text().replace("1e-05", "1e-06"))
  done = export(found.model, tmp_path / "out.pth")
  assert done.notes == ["ln_vision was trained with eps 1e-06; LAVIS computes it with 1e-05"]
  again = run(made, done.file, tmp_path / "again")  # the side file remembers
  assert checkpoint.load_config(again.model)["model"]["vision_eps"] == 1e-6


def test_what_cannot_be_exported_is_one_line(tmp_path):
  student = tiny_models.make_model(tmp_path / "student")
  tagger = tiny_models.make_model(tmp_path / "tagger", "tagger")
  with pytest.raises(CheckpointError, match="holds a tagger; LAVIS has a place for students and"):
    export(tagger, tmp_path / "out.pth")
  (tmp_path / "mine.pth.SHA256SUMS").write_text("keep")
  with pytest.raises(CheckpointError, match="mine.pth.SHA256SUMS is there already"):
    export(student, tmp_path / "mine.pth")
  largest = max((student / "params").rglob("d/*"), key=lambda path: path.stat().st_size)
  data = bytearray(largest.read_bytes())
  data[len(data) // 2] ^= 4
  largest.write_bytes(data)
  with pytest.raises(CheckpointError, match="damaged"):
    export(student, tmp_path / "out.pth")
  assert not [path.name for path in tmp_path.iterdir() if "out.pth" in path.name]


def test_a_temperature_trained_further_by_lavis_is_taken(made, tmp_path):
  """The side file's is used for its last bit only."""
  torch.save(made[1], tmp_path / "blip2.pth")
  done = export(run(made, tmp_path / "blip2.pth", tmp_path / "ours").model, tmp_path / "out.pth")
  torch.save({"model": saved_state(done.file) | {"temp": torch.tensor(0.04)}}, done.file)
  leaves = leaves_of(run(made, done.file, tmp_path / "again").model)
  assert np.exp(leaves["log_temperature"]) == pytest.approx(0.04)


@pytest.mark.parametrize("note", [{}, {"lskd": "[]"}, {"lskd": "{\"model\": {\"odd\": 1}}"}])
def test_a_foreign_side_file_is_one_line(made, tmp_path, note):
  torch.save(made[1], tmp_path / "blip2.pth")
  tensors.write_safetensors(tmp_path / "blip2.pth.lskd.safetensors", [], note=note)
  with pytest.raises(CheckpointError, match="is no side file of an export") as caught:
    run(made, tmp_path / "blip2.pth", tmp_path / "ours")
  assert "\n" not in str(caught.value)


# --- the critic ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def critic(made):
  """(the two auxiliary heads in PyTorch, the critic's state as its training saves it).

  The language head was frozen, the word embeddings with it, since they are one tensor; LAVIS then
  leaves out what is frozen, but for a tensor's second name. The ViT is here for simplicity's sake.
  """
  torch.manual_seed(5)
  heads = {name: torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.ReLU(), torch.nn.Linear(16, 1))
           for name in ("qa_head", "r_head")}
  frozen = ("Qformer.bert.embeddings.word_embeddings.weight", "Qformer.cls.predictions.bias",
            "Qformer.cls.predictions.transform.")
  absent = ("vision_proj.", "text_proj.", "temp")
  state = {key: value for key, value in made[1].items() if not key.startswith(frozen + absent)}
  for name, head in heads.items():
    state |= {f"{name}.{key}": value for key, value in head.state_dict().items()}
  return heads, state


def critic_outputs(directory, pixels, tokens):
  """(accept logits [B, S, 2], answer [B, S], rationale [B, S]) of a model directory, no regions."""
  with jax.set_mesh(parallel.make_mesh()):
    model = build.load(directory)
    regions = model.config.max_regions
    batch = dict(image=pixels, tokens=tokens, boxes=np.zeros((2, regions, 4), np.float32),
                 region_valid=np.zeros((2, regions), bool))
    batch = parallel.put_batch(batch, jax.sharding.get_mesh())
    compute = jax.jit(lambda state, batch: nnx.merge(model.graph, state)(batch))
    return [np.asarray(value) for value in compute(model.state, batch)]


def test_the_critic_says_what_pytorch_says(made, critic, tmp_path):
  """Its accept head is the ITM head; in the reference the score heads read what that head reads."""
  model, _, tokenizer, _ = made
  heads, state = critic
  torch.save({"model": state}, tmp_path / "critic.pth")
  found = run(made, tmp_path / "critic.pth", tmp_path / "ours")
  assert found.kind == "critic" and checkpoint.load_config(found.model)["kind"] == "critic"
  assert "student/language_head/dense/kernel" in found.fresh
  assert not {"accept/kernel", "answer/out/bias", "student/language_head/bias"} & set(found.fresh)
  pixels, tokens = inputs(model, tokenizer)
  states = []
  hook = model.itm_head.register_forward_hook(lambda head, inputs, output: states.append(inputs[0]))
  wanted = [theirs(model, pixels, tokens)[1]]
  hook.remove()
  with torch.no_grad():
    wanted += [head(torch.stack(states, 1)).mean(2)[..., 0].numpy() for head in heads.values()]
  for want, have in zip(wanted, critic_outputs(found.model, pixels, tokens)):
    assert want.shape == have.shape and np.abs(want - have).max() <= 1e-5 * np.abs(want).max()


def test_the_critic_out_again(made, critic, tmp_path):
  """With the frozen parts too, which its class has and its training does not save."""
  _, state = critic
  torch.save({"model": state}, tmp_path / "critic.pth")
  found = run(made, tmp_path / "critic.pth", tmp_path / "ours")
  back = saved_state(export(found.model, tmp_path / "back.pth").file)
  for key in state.keys() - {"Qformer.cls.predictions.decoder.bias"}:
    assert torch.equal(back[key], state[key]), key
  head = "Qformer.cls.predictions"
  assert back.keys() - state.keys() == {
      "Qformer.bert.embeddings.word_embeddings.weight", f"{head}.bias",
      *(f"{head}.transform.{part}.{kind}" for part in ("dense", "LayerNorm")
        for kind in ("weight", "bias"))}
  assert torch.equal(back[f"{head}.bias"], state[f"{head}.decoder.bias"])


def test_the_corpus_is_scored_by_an_imported_critic_as_before(tmp_path):
  model = tiny_models.make_model(tmp_path / "model", "critic")
  done = export(model, tmp_path / "critic.pth")
  found = lavis.import_lavis(done.file, tmp_path / "back", config=CONFIG, progress=False,
                             tokenizer_dir=model / "tokenizer")
  corpus_stages.verbalize_scenes(tmp_path / "words", 2, progress=False)
  corpus_stages.teach_corpus(tmp_path / "words", tmp_path / "taught", progress=False)
  scores = []
  for directory, name in ((model, "before"), (found.model, "after")):
    scored = scoring.score_stages(tmp_path / "taught", tmp_path / "words" / "images", directory,
                                  tmp_path / name)
    assert scored.worth == f"P(accept) by the critic {directory}"
    scores.append([statement.score for record in stages.read_records(tmp_path / name)
                   for statement in record.statements])
  assert len(scores[0]) > 2 and len(set(scores[0])) > 2
  np.testing.assert_allclose(scores[0], scores[1], atol=1e-6)


@pytest.mark.parametrize("change,error", [
    (lambda state: {**state, "extra": Payload()}, "holds more than tensors"),
    (lambda state: {key: value for key, value in state.items() if key not in (
        "qa_head.2.bias", "itm_head.weight")}, "missing: itm_head.weight, qa_head.2.bias$"),
    (lambda state: state | {"r_head.0.weight": torch.zeros(16, 15)},
     r"of another shape: r_head.0.weight \(16x15, the config says 16x16\)"),
    (lambda state: state | {"vision_proj.bias": torch.zeros(8), "cls.weight": torch.zeros(1)},
     "unknown: vision_proj.bias, cls.weight"),
    (lambda state: {key: value for key, value in state.items() if "decoder.weight" not in key},
     "has no Qformer.bert.embeddings.word_embeddings.weight"),
])
def test_what_is_no_critic_is_one_line(made, critic, tmp_path, change, error, capfd):
  torch.save(change(critic[1]), tmp_path / "bad.pth")
  with pytest.raises(CheckpointError, match=error) as caught:
    run(made, tmp_path / "bad.pth", tmp_path / "ours")
  assert "\n" not in str(caught.value) and "this ran" not in capfd.readouterr().out
  assert not (tmp_path / "ours").exists()
