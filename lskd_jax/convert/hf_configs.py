"""The JSON and text beside a transformers BLIP-2: its sizes read, and written for what was trained here."""
import dataclasses
import json
from pathlib import Path

import lskd_jax
from lskd_jax.models.decoders.opt import ACTIVATIONS as OPT_ACTIVATIONS, OptConfig
from lskd_jax.models.decoders.t5 import ACTIVATIONS as T5_ACTIVATIONS, T5Config
from lskd_jax.models.generative import GenerativeConfig
from lskd_jax.models.layers import ACTIVATIONS
from lskd_jax.models.qformer import QFormerConfig
from lskd_jax.models.student import StudentConfig
from lskd_jax.models.vit import PIXEL_MEAN, PIXEL_STD, VitConfig
from lskd_jax.trees import CheckpointError, one_line

CODE = "modeling_lskd.py"  # runs the side file in PyTorch
SIDE_FILE = "lskd.safetensors"
CLASSES = {"student": "Blip2ForImageTextRetrieval", "generative": "Blip2ForConditionalGeneration"}
PARTS = {"vision_config": "blip_2_vision_model", "qformer_config": "blip_2_qformer"}  # of a config.json
# What transformers' config.json has no word for, and its key "lskd" holds.
OURS = {"student": ("max_regions", "sites", "region_mode", "vision_eps", "temperature", "decoder_start"),
        "generative": ("max_regions", "sites", "region_mode", "vision_eps", "prompt")}
# How BLIP-2 was asked (Li et al. 2023, section 4.2).
PROMPT = "Question: {question} Answer:"


# --- in ------------------------------------------------------------------------------------------


def read_config(source: Path, kind: str, max_regions: int) -> StudentConfig | GenerativeConfig:
  """The sizes that a transformers folder's JSON describes; the side file's note has the rest.

  Args:
    kind: student or generative.

  Raises CheckpointError: no such folder, or a BLIP-2 that is not computed here.
  """
  path = source / "config.json"
  try:
    about = json.loads(path.read_text())
    if about.get("model_type") != "blip-2":
      raise CheckpointError(f"{path}: model_type is {about.get('model_type')!r}, not 'blip-2'")
    for part, name in PARTS.items():
      about[part] = _completed(name, about[part])
    vit = _vit(about["vision_config"], path)
    common = dict(vit=vit, max_regions=max_regions, vision_eps=vit.eps)
    if kind == "student":
      qformer = _qformer(about, True, path)
      config = StudentConfig(qformer=qformer, embed=about["image_text_hidden_size"], **common)
    else:
      language_model, decoder = read_decoder(source, about["text_config"])
      config = GenerativeConfig(
          qformer=_qformer(about, about["qformer_config"].get("use_qformer_text_input", False), path),
          language_model=language_model, decoder=decoder, prompt=PROMPT,
          image_token=about.get("image_token_index"), **common)
    config = dataclasses.replace(config, **about.get("lskd", {}))
    for name, part in (("vision_config", config.vit), ("qformer_config", config.qformer)):
      if part.width % part.heads:
        raise CheckpointError(f"{path}: {name}: {part.heads} heads do not divide hidden_size="
                              f"{part.width}")
    return config
  except OSError:
    raise CheckpointError(f"{source} is no transformers folder: it has no config.json") from None
  except KeyError as error:
    raise CheckpointError(f"{path} has no {error.args[0]!r}; was it written by transformers 4.50 or "
                          "newer?") from None
  except CheckpointError:
    raise
  except (ValueError, TypeError, AttributeError) as error:
    raise CheckpointError(f"{path} cannot be used: {one_line(error)}") from None


def _completed(name: str, part: dict) -> dict:
  """A part of a config.json with all of its keys: transformers may leave out what is its default."""
  from transformers import AutoConfig
  return AutoConfig.for_model(name, **{key: part[key] for key in part if key != "model_type"}).to_dict()


def _vit(about: dict, path: Path) -> VitConfig:
  _known(about["hidden_act"], ACTIVATIONS, "vision_config.hidden_act", path)
  return VitConfig(
      image_size=_side(about["image_size"], path), patch=_side(about["patch_size"], path),
      width=about["hidden_size"], depth=about["num_hidden_layers"],
      heads=about["num_attention_heads"], hidden=about["intermediate_size"],
      eps=about["layer_norm_eps"], activation=about["hidden_act"])


def _qformer(about: dict, text: bool, path: Path) -> QFormerConfig:
  size = about["qformer_config"]
  _known(size["hidden_act"], ("gelu",), "qformer_config.hidden_act", path)
  return QFormerConfig(
      vocabulary=size["vocab_size"], width=size["hidden_size"], depth=size["num_hidden_layers"],
      heads=size["num_attention_heads"], hidden=size["intermediate_size"],
      queries=about["num_query_tokens"], cross_every=size["cross_attention_frequency"],
      max_tokens=size["max_position_embeddings"], text=text, eps=size["layer_norm_eps"],
      dropout=size["hidden_dropout_prob"])


def read_decoder(source: Path, about: dict) -> tuple[str, OptConfig | T5Config]:
  """The name and sizes of a language model; what its JSON leaves out is as transformers has it.

  about: its part of the config.json in the folder `source`.
  """
  from transformers import AutoConfig
  path, name = source / "config.json", about.get("model_type", "opt")
  _known(name, ("opt", "t5"), "text_config.model_type", path)
  size = AutoConfig.for_model(name, **{key: about[key] for key in about if key != "model_type"})
  end = size.eos_token_id
  generation = source / "generation_config.json"
  if generation.exists():
    end = json.loads(generation.read_text()).get("eos_token_id", end)
  end = end[0] if isinstance(end, list) else end
  if name == "t5":
    _known(size.dense_act_fn, T5_ACTIVATIONS, "text_config.dense_act_fn", path)
    return name, T5Config(
        vocabulary=size.vocab_size, width=size.d_model, head=size.d_kv, heads=size.num_heads,
        hidden=size.d_ff, depth=size.num_layers, decoder_depth=size.num_decoder_layers,
        buckets=size.relative_attention_num_buckets, max_distance=size.relative_attention_max_distance,
        activation=size.dense_act_fn, gated=size.is_gated_act, tied=size.scale_decoder_outputs,
        eps=size.layer_norm_epsilon, start=about.get("decoder_start_token_id", size.pad_token_id),
        end=end, pad=size.pad_token_id)
  _known(size.activation_function, OPT_ACTIVATIONS, "text_config.activation_function", path)
  for key in ("enable_bias", "layer_norm_elementwise_affine"):
    if not getattr(size, key):
      raise CheckpointError(f"{path}: text_config.{key} is false; only OPT with biases is computed here")
  if size.hidden_size % size.num_attention_heads:
    raise CheckpointError(f"{path}: text_config: {size.num_attention_heads} heads do not divide "
                          f"hidden_size={size.hidden_size}")
  return name, OptConfig(
      vocabulary=size.vocab_size, width=size.hidden_size, embed=size.word_embed_proj_dim,
      depth=size.num_hidden_layers, heads=size.num_attention_heads, hidden=size.ffn_dim,
      max_tokens=size.max_position_embeddings, activation=size.activation_function,
      pre_norm=size.do_layer_norm_before,
      final_norm=size.do_layer_norm_before and not size._remove_final_layer_norm,
      pad=size.pad_token_id, start=size.bos_token_id, end=end)


def _known(value, known, name: str, path: Path) -> None:
  if value not in known:
    raise CheckpointError(f"{path}: {name} is {value!r}; only {' and '.join(known)} are computed here")


def _side(size, path: Path) -> int:
  """One side of a square given as a number or as [height, width]."""
  sides = set(size) if isinstance(size, list) else {size}
  if len(sides) > 1:
    raise CheckpointError(f"{path}: {size} is not square; only square images and patches are read")
  return sides.pop()


# --- out -----------------------------------------------------------------------------------------


def write_config(kind: str, config: StudentConfig | GenerativeConfig, dtype: str) -> dict:
  """transformers' config.json; its key "lskd" holds the settings that it has no word for."""
  vit, qformer = config.vit, config.qformer
  auto = {"student": ("AutoModel", "LskdStudent"),
          "generative": ("AutoModelForImageTextToText", "LskdGenerative")}[kind]
  about = {
      "architectures": [CLASSES[kind]],
      "auto_map": {auto[0]: f"{CODE.removesuffix('.py')}.{auto[1]}"},
      "model_type": "blip-2",
      "dtype": dtype,
      "num_query_tokens": qformer.queries,
      "vision_config": {
          "model_type": "blip_2_vision_model", "hidden_size": vit.width,
          "intermediate_size": vit.hidden, "num_hidden_layers": vit.depth,
          "num_attention_heads": vit.heads, "image_size": vit.image_size, "patch_size": vit.patch,
          "hidden_act": vit.activation, "layer_norm_eps": vit.eps, "qkv_bias": True},
      "qformer_config": {
          "model_type": "blip_2_qformer", "vocab_size": qformer.vocabulary,
          "hidden_size": qformer.width, "num_hidden_layers": qformer.depth,
          "num_attention_heads": qformer.heads, "intermediate_size": qformer.hidden,
          "hidden_act": "gelu", "hidden_dropout_prob": qformer.dropout,
          "attention_probs_dropout_prob": qformer.dropout,
          "max_position_embeddings": qformer.max_tokens, "layer_norm_eps": qformer.eps,
          "cross_attention_frequency": qformer.cross_every, "encoder_hidden_size": vit.width,
          "use_qformer_text_input": qformer.text},
      "lskd": {key: getattr(config, key) for key in OURS[kind]},
  }
  if kind == "student":
    return {**about, "image_text_hidden_size": config.embed}
  text = {"opt": _opt_config, "t5": _t5_config}[config.language_model](config.decoder)
  return {**about, "image_token_index": config.image_token, "text_config": {**text, "dtype": dtype}}


def _opt_config(size: OptConfig) -> dict:
  return {
      "model_type": "opt", "vocab_size": size.vocabulary, "hidden_size": size.width,
      "word_embed_proj_dim": size.embed, "num_hidden_layers": size.depth,
      "num_attention_heads": size.heads, "ffn_dim": size.hidden,
      "max_position_embeddings": size.max_tokens, "activation_function": size.activation,
      "do_layer_norm_before": size.pre_norm,
      "_remove_final_layer_norm": size.pre_norm and not size.final_norm, "pad_token_id": size.pad,
      "bos_token_id": size.start, "eos_token_id": size.end}


def _t5_config(size: T5Config) -> dict:
  return {
      "model_type": "t5", "vocab_size": size.vocabulary, "d_model": size.width, "d_kv": size.head,
      "num_heads": size.heads, "d_ff": size.hidden, "num_layers": size.depth,
      "num_decoder_layers": size.decoder_depth, "relative_attention_num_buckets": size.buckets,
      "relative_attention_max_distance": size.max_distance, "dense_act_fn": size.activation,
      "feed_forward_proj": ("gated-" if size.gated else "") + (
          "gelu" if size.activation.startswith("gelu") else size.activation),
      "is_gated_act": size.gated, "tie_word_embeddings": size.tied, "layer_norm_epsilon": size.eps,
      "decoder_start_token_id": size.start, "eos_token_id": size.end, "pad_token_id": size.pad}


def generation_config(decoder: OptConfig | T5Config) -> dict:
  """transformers' generation_config.json: where a text starts and ends."""
  about = {"eos_token_id": decoder.end, "pad_token_id": decoder.pad}
  start = "decoder_start_token_id" if isinstance(decoder, T5Config) else "bos_token_id"
  return {**about, start: decoder.start}


def processor_config(config: GenerativeConfig) -> dict:
  """The settings of transformers' Blip2Processor."""
  return {"processor_class": "Blip2Processor", "num_query_tokens": config.qformer.queries}


def image_processor(config: StudentConfig | GenerativeConfig) -> dict:
  """The settings of transformers' BlipImageProcessor."""
  height, width = config.vit.size
  return {"image_processor_type": "BlipImageProcessor", "do_convert_rgb": True, "do_resize": True,
          "size": {"height": height, "width": width}, "resample": 3, "do_rescale": True,
          "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": list(PIXEL_MEAN),
          "image_std": list(PIXEL_STD)}


def model_card(kind: str, config: StudentConfig | GenerativeConfig) -> str:
  """README.md of an export."""
  side, note = config.vit.image_size, ""
  if config.vision_eps != config.vit.eps:
    note = (f"ln_vision was trained with eps {config.vision_eps:g}; transformers computes it with "
            f"the ViT's, {config.vit.eps:g}.")
  if kind == "student":
    what, tag, loader = "Stage-1 BLIP-2 (ViT and Q-Former)", "image-text-matching", "AutoModel"
    use = "`student.score(pixel_values, boxes, input_ids)` scores texts that point at regions with `[0]`, …"
    if config.region_mode in ("overlay", "both"):
      use += ("\nIts pictures had the regions drawn on them: draw them before (`data_pipeline.regions."
              "draw_overlay`).")
    rest = "The region tokens, the language\nhead and ITC's temperature are"
  else:
    what = f"BLIP-2 (ViT, Q-Former and {config.language_model.upper()})"
    tag, loader = "image-text-to-text", "AutoModelForImageTextToText"
    use = ("`student.ask(pixel_values, boxes, input_ids)` answers a prompt that points at regions with "
           "`[0]`, …;\n`student.score(pixel_values, boxes, input_ids, answer_ids)` scores answers")
    rest = "The region tokens are"
  return f"""---
library_name: transformers
tags: [blip-2, {tag}, localized]
---
# A BLIP-2 student of localized statements

Made with lskd_jax {lskd_jax.__version__}. {what} for pictures of {side} px.

```python
from transformers import {loader}, {CLASSES[kind]}
student = {loader}.from_pretrained("this folder", trust_remote_code=True)
base = {CLASSES[kind]}.from_pretrained("this folder")
```

{use}
(`{CODE}`, self-contained). `base` is the same model without regions. {rest} in `{SIDE_FILE}`;
`lskd import --from hf` gives back the student as it was. {note}
"""
