"""The pixels a model is given: those of transformers' BlipImageProcessor for the same file and size."""
import numpy as np
from PIL import Image
import pytest
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from data_pipeline import images
from lskd_jax.convert import hf_configs
from lskd_jax.models.student import StudentConfig
from lskd_jax.models.vit import PIXEL_MEAN, PIXEL_STD, VitConfig


def difference(path, side):
  """The largest difference of normalised pixels, by our own export's processor settings."""
  settings = hf_configs.image_processor(StudentConfig(vit=VitConfig(image_size=side)))
  settings.pop("image_processor_type")
  with Image.open(path) as image:
    want = BlipImageProcessorPil(**settings)(image, return_tensors="np")["pixel_values"][0]
  bytes_of = images.resize(images.decode(path.read_bytes(), name=path.name), side)
  have = (bytes_of.astype(np.float32) / 255 - np.float32(PIXEL_MEAN)) / np.float32(PIXEL_STD)
  assert want.std() > 0.1
  return np.abs(want.transpose(1, 2, 0) - have).max()


@pytest.mark.parametrize("side", [48, 224, 364])
@pytest.mark.parametrize("name,options", [("a.png", {}), ("a.jpg", dict(quality=80))])
def test_files(tmp_path, side, name, options):
  """Bicubic, squashed to a square; one float32 rounding apart at most."""
  rng = np.random.default_rng(side)
  coarse = Image.fromarray(rng.integers(0, 256, (9, 12, 3), np.uint8))
  coarse.resize((307, 211), Image.Resampling.BICUBIC).save(tmp_path / name, **options)
  assert difference(tmp_path / name, side) <= 1e-6


def test_real_photographs(real_sample):
  for path in sorted((real_sample / "images").iterdir())[:5]:
    assert difference(path, 224) <= 1e-6
