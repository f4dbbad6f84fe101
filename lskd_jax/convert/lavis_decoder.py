"""salesforce/LAVIS's stage-2 BLIP-2 in: ViT, Q-Former and the projection to a frozen language model.

LAVIS saves no frozen parameter, so its `.pth` files lack the language model, and often the ViT: those
come from the folder in which transformers has OPT or T5, and from a second file.
"""
import dataclasses
import json
from pathlib import Path

from data_pipeline import tokenizer as tokenizers
from lskd_jax.convert import decoders, hf_configs, lavis, tables, tensors
from lskd_jax.convert.model_directory import Imported, write_model
from lskd_jax.models.generative import GenerativeConfig, generative_config
from lskd_jax.models.student import StudentConfig
from lskd_jax.trees import CheckpointError, one_line

NEWLINE = "Ċ"  # as byte-level tokenizers write it: where BLIP-2's OPT ends a text


def import_stage2(source: Path | str, out: Path | str, *, config: StudentConfig,
                  decoder_dir: Path | str, vit: Path | str | None = None,
                  image_size: int | tuple[int, int] | None = None, seed: int = 0,
                  progress: bool = True) -> Imported:
  """A `.pth` of `Blip2OPT` or `Blip2T5` -> a model directory of a generative student.

  Args:
    source: the checkpoint, such as blip2_pretrained_opt2.7b.pth; its side file, if there is one, has
      the sizes and the region tokens.
    out: the model directory.
    config: sizes of ViT and Q-Former, where no side file has them.
    decoder_dir: config.json, safetensors and tokenizer of the language model, such as those of
      facebook/opt-2.7b or google/flan-t5-xl.
    vit, image_size, seed: as `lavis.import_lavis` takes them.

  Raises:
    CheckpointError, DataError: one line that names the file, key or setting; nothing is written.
  """
  decoder_dir, side = Path(decoder_dir), Path(f"{source}{lavis.SIDE}")
  found = lavis.read_pth(source)
  if not any(key.startswith(lavis.PROJECTIONS) for key in found):
    raise CheckpointError(f"{source} is no stage-2 model (it has none of {', '.join(lavis.PROJECTIONS)}): "
                          "leave --decoder away")
  extra = tensors.read_safetensors(side) if side.exists() else {}
  generative = (lavis.noted_config(side, generative_config) if side.exists() else
                _sizes(config, decoder_dir))
  found = lavis.with_vit(found, source, vit, generative.vit.depth)
  scheme = tables.lavis_scheme(generative)
  prefix = decoders.decoder_prefix(generative, scheme)
  found |= {prefix + key: tensor for key, tensor in tensors.read_folder(decoder_dir).items()}
  if not side.exists():
    size = lavis.with_side(generative.vit, found, scheme, source)
    generative = dataclasses.replace(generative, vit=size)
  table = decoders.generative_table(generative, scheme)
  ignored = (*scheme.ignored, *decoders.decoder_ignored(generative, prefix))
  tables.check(table, {key: tensor.shape for key, tensor in found.items()}, ignored, source)
  return write_model("generative", generative, table, found, out, tokenizer_dir=decoder_dir, own=extra,
                     image_size=image_size, seed=seed, progress=progress)


def _sizes(config: StudentConfig, decoder_dir: Path) -> GenerativeConfig:
  """ViT and Q-Former of a student's config, the language model of a folder, as LAVIS runs them."""
  path = decoder_dir / "config.json"
  try:
    language_model, decoder = hf_configs.read_decoder(decoder_dir, json.loads(path.read_text()))
  except OSError:
    raise CheckpointError(f"{decoder_dir} is no transformers folder: it has no config.json") from None
  except (ValueError, TypeError, AttributeError) as error:
    raise CheckpointError(f"{path} cannot be used: {one_line(error)}") from None
  if language_model == "t5":
    decoder = dataclasses.replace(decoder, activation="gelu")  # LAVIS's, whatever T5 was trained with
  else:
    tokenizer = tokenizers.load_tokenizer(decoder_dir)
    decoder = dataclasses.replace(decoder, end=tokenizers.token_id(tokenizer, NEWLINE))
  return GenerativeConfig(
      vit=config.vit, qformer=dataclasses.replace(config.qformer, text=False),
      language_model=language_model, decoder=decoder, max_regions=config.max_regions,
      sites=config.sites, region_mode=config.region_mode, vision_eps=lavis.VISION_EPS,
      prompt=hf_configs.PROMPT)
