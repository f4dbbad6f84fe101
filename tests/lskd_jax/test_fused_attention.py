"""The fused attention of TPUs, run by Pallas' interpreter, against plain attention: numbers and gradients."""
import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lskd_jax.models import fused_attention, layers, vit
from lskd_jax.parallel import make_mesh
from tests.lskd_jax import tiny

ROWS, TOKENS, HEADS, WIDTH = 2, 130, 2, 24  # tokens no multiple of 128, heads narrower than it


def plain(*heads):
  """`layers.attend` on [B, h, T, k]."""
  return layers.attend(*(x.swapaxes(1, 2)[:, None] for x in heads))[:, 0].swapaxes(1, 2)


def fused(*heads):
  """The kernel, with noise where the padding is."""
  extra = jnp.full((ROWS, HEADS, fused_attention.padded(TOKENS) - TOKENS, WIDTH), 7.0,
                   out_sharding=fused_attention.LAYOUT)
  padded = (jnp.concatenate([x, extra], 2) for x in heads)
  return fused_attention.attend(*padded, TOKENS, interpret=True)[:, :, :TOKENS]


@pytest.fixture(scope="module")
def seen():
  """{which: (output, gradients)} on two devices that split the rows and two that split the heads."""
  noise = np.random.default_rng(0).normal(size=(3, ROWS, HEADS, TOKENS, WIDTH)).astype(np.float32)
  mesh = make_mesh(fsdp=2, tensor=2)
  results = {}
  with jax.set_mesh(mesh):
    heads = [jax.device_put(x, jax.NamedSharding(mesh, fused_attention.LAYOUT)) for x in noise]
    for name, attend in {"fused": fused, "plain": plain}.items():
      output, pullback = jax.vjp(jax.jit(attend), *heads)
      results[name] = output, pullback(heads[0])
  return jax.tree.map(np.asarray, results)


def test_it_is_plain_attention(seen):
  """What stands in the padding is seen by nobody."""
  np.testing.assert_allclose(seen["fused"][0], seen["plain"][0], atol=2e-5)


def test_its_gradients_are_those_of_plain_attention(seen):
  for got, expected in zip(seen["fused"][1], seen["plain"][1]):
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(got, expected, atol=1e-4)


@pytest.mark.parametrize("tokens, size", [(128, 128), (384, 384), (1280, 640), (1408, 128)])
def test_blocks_divide_the_padded_tokens(tokens, size):
  assert fused_attention.block(tokens) == size


@pytest.mark.parametrize("platform, attention, fused", [
    ("tpu", "auto", True), ("cpu", "auto", False), ("cpu", "fused", True), ("tpu", "plain", False)])
def test_a_vit_takes_it_on_tpus(platform, attention, fused):
  """Decided by the mesh's devices, so that compiling for TPUs on another machine decides alike."""
  device = jax.sharding.AbstractDevice(device_kind="any", num_cores=1, platform=platform)
  config = vit.VitConfig(image_size=16, patch=8, width=16, depth=1, heads=2, hidden=16, attention=attention)
  mesh = make_mesh().abstract_mesh.update(abstract_device=device)
  image = jax.ShapeDtypeStruct((1, 16, 16, 3), jnp.uint8)
  with jax.sharding.use_abstract_mesh(mesh):
    model = nnx.eval_shape(lambda: vit.Vit(config, nnx.Rngs(0)))
    traced = jax.jit(lambda model, image: model(image)).trace(model, image)
  assert ("pallas_call" in str(traced.jaxpr)) == fused


def test_a_vit_sees_the_same_through_it():
  config = vit.VitConfig(image_size=16, patch=8, width=16, depth=2, heads=2, hidden=16, scan=False)
  pixels = np.random.default_rng(1).integers(0, 256, (2, 16, 16, 3)).astype(np.uint8)
  with jax.set_mesh(make_mesh(fsdp=2, tensor=2)):
    image = tiny.put({"image": pixels})["image"]
    outputs = []
    for attention in ("plain", "fused"):
      chosen = dataclasses.replace(config, attention=attention)
      model = tiny.filled(lambda rngs, chosen=chosen: vit.Vit(chosen, rngs))
      model.stack.blocks.interpret = True
      outputs.append(np.asarray(jax.jit(lambda model, image: model(image))(model, image)))
  np.testing.assert_allclose(*outputs, atol=2e-5)


def test_an_unknown_attention_is_named():
  with pytest.raises(ValueError, match="attention 'flash' is unknown: choose auto, fused or plain"):
    dataclasses.replace(vit.VitConfig(), attention="flash")
