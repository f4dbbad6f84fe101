"""The ViT against its formulas written out in float64 NumPy."""
import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lskd_jax.models.vit import PIXEL_MEAN, PIXEL_STD, Vit, VitConfig
from tests.lskd_jax.tiny import filled, gelu, pure, put

pytestmark = pytest.mark.usefixtures("one_device")

# 22 px: the last 6 are less than a patch.
CONFIG = VitConfig(image_size=22, patch=8, width=8, depth=2, heads=2, hidden=12)
CLIP = dict(activation="quick_gelu", input_norm=True, patch_bias=False, eps=1e-5)


def vit(**changes):
  config = dataclasses.replace(CONFIG, **changes)
  return filled(lambda rngs: Vit(config, rngs))


@jax.jit
def see(vit, image):
  return vit(image)


@jax.jit
def gradient(vit, image):
  return jax.grad(lambda vit: (vit(image)**2).sum())(vit)


@pytest.fixture(scope="module")
def image():
  pixels = np.random.default_rng(0).integers(0, 256, (2, 22, 22, 3)).astype(np.uint8)
  return put({"image": pixels})["image"]


def reference(config, params, image):
  """uint8[H, W, 3] -> float64[1 + rows * columns, 8]: patches row by row, a class token before them."""
  def layer_norm(x, p):
    centred = x - x.mean(-1, keepdims=True)
    deviation = np.sqrt((centred**2).mean(-1, keepdims=True) + config.eps)
    return centred / deviation * p["scale"] + p["bias"]
  pixels = (image / 255 - np.array(PIXEL_MEAN)) / np.array(PIXEL_STD)
  dense = lambda x, p: x @ p["kernel"] + p.get("bias", 0)
  activation = {"gelu": gelu, "quick_gelu": lambda x: x / (1 + np.exp(-1.702 * x))}[config.activation]
  tokens = [params["class_token"]]
  for row, column in np.ndindex(image.shape[0] // 8, image.shape[1] // 8):
    patch = pixels[8 * row:8 * row + 8, 8 * column:8 * column + 8]
    tokens.append(dense(patch.reshape(-1), params["patchify"]))
  x = np.stack(tokens) + params["positions"]
  if config.input_norm:
    x = layer_norm(x, params["input_norm"])
  for i in range(config.depth):
    block = jax.tree.map(lambda a: a[i], params["stack"]["blocks"])
    normed = layer_norm(x, block["norm1"])
    q, k, v = (np.einsum("td,dhk->htk", normed, block["qkv"]["kernel"][:, j])
               + block["qkv"]["bias"][j][:, None] for j in range(3))
    scores = q @ k.swapaxes(1, 2) / math.sqrt(config.width // config.heads)
    weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    x = x + np.einsum("htk,hkd->td", weights @ v, block["out"]["kernel"]) + block["out"]["bias"]
    hidden = activation(dense(layer_norm(x, block["norm2"]), block["mlp"]["up"]))
    x = x + dense(hidden, block["mlp"]["down"])
  return x


def test_tokens_are_those_of_the_formulas(image):
  model = vit()
  expected = [reference(CONFIG, pure(model), picture) for picture in np.asarray(image)]
  np.testing.assert_allclose(see(model, image), expected, atol=2e-5)


def test_a_vit_like_clips_and_pictures_that_are_no_squares():
  """A norm before the blocks, x sigmoid(1.702 x), patches without bias; 18 x 42 px are 2 x 5 patches."""
  model = vit(image_size=(18, 42), **CLIP)
  pixels = np.random.default_rng(1).integers(0, 256, (2, 18, 42, 3)).astype(np.uint8)
  expected = [reference(model.config, pure(model), picture) for picture in pixels]
  np.testing.assert_allclose(see(model, put({"image": pixels})["image"]), expected, atol=2e-5)
  assert "bias" not in pure(model)["patchify"]


def test_pixels_beyond_the_last_whole_patch_are_unused(image):
  changed = np.array(image)
  changed[:, 16:], changed[:, :, 16:] = 0, 0
  np.testing.assert_array_equal(see(vit(), image), see(vit(), put({"image": changed})["image"]))


def test_there_is_one_token_per_patch_and_a_class_token():
  assert VitConfig().grid == (16, 16)  # 224 px in patches of 14
  assert VitConfig(image_size=480).grid == (34, 34)  # 480 is no multiple of 14: 4 px are unused
  assert VitConfig(image_size=(224, 448)).grid == (16, 32) and VitConfig().tokens == 257
  assert jax.eval_shape(lambda v, i: v(i), vit(), jnp.zeros((1, 22, 22, 3), jnp.uint8)).shape == (
      1, 1 + 2 * 2, 8)


@pytest.mark.parametrize("changes", [dict(scan=False), dict(remat="full"), dict(remat="dots")])
def test_scanning_and_recomputing_change_no_gradient(image, changes):
  pairs = zip(*(jax.tree.leaves(gradient(model, image)) for model in (vit(**changes), vit())))
  for got, expected in pairs:
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_bfloat16_is_near_float32(image):
  half = filled(lambda rngs: Vit(CONFIG, rngs, jnp.bfloat16))
  assert half.class_token[...].dtype == jnp.float32  # parameters stay float32
  near, exact = see(half, image), np.asarray(see(vit(), image))
  assert near.dtype == jnp.bfloat16
  assert np.abs(near.astype(np.float32) - exact).mean() < 0.02 * np.abs(exact).mean()


def test_an_image_size_is_a_side_or_both():
  """A list, as JSON gives it, is the same as a pair, and a pair of equal sides the same as a side."""
  assert VitConfig(image_size=[224, 448]) == VitConfig(image_size=(224, 448))
  assert VitConfig(image_size=(224, 224)) == VitConfig() and VitConfig().size == (224, 224)
  for wrong in (13, (224, 13), (224,), (1, 2, 3), "224", 224.0, None):
    with pytest.raises(ValueError, match="give a side or .height, width., each at least a patch, 14 px"):
      VitConfig(image_size=wrong)


def test_an_unknown_activation_is_named():
  with pytest.raises(ValueError, match="activation 'relu6' is unknown: choose gelu, quick_gelu"):
    vit(activation="relu6")
