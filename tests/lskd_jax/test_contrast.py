"""Image-text contrast against PyTorch in float64, whole and in blocks, on one device and on eight."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lskd_jax import contrast
from lskd_jax.parallel import make_mesh
from tests.lskd_jax.tiny import put

IMAGES, TEXTS, QUERIES, WIDTH = 16, 2, 3, 4
TEMPERATURE, SMOOTHING = 0.2, 0.1
MESHES = {"1 device": {}, "8 devices": dict(data=8), "2 x 2 with tensor 2": dict(data=2, fsdp=2, tensor=2)}


def unit_vectors(rng, *shape):
  x = rng.normal(size=shape)
  return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def batch(images=IMAGES, texts=TEXTS, seed=0):
  """Embeddings, and images that stand in several rows, with statements that do not exist."""
  rng = np.random.default_rng(seed)
  ids = np.arange(images, dtype=np.int32)
  ids[images // 2] = ids[-1] = ids[0]
  valid = np.ones((images, texts), bool)
  valid[1, -1] = valid[-1, 0] = texts == 1
  return {"image": unit_vectors(rng, images, QUERIES, WIDTH), "text": unit_vectors(rng, images, texts, WIDTH),
          "image_id": ids, "valid": valid}


def torch_losses(image, text, temperature, ids, valid, smoothing=SMOOTHING, detach=False):
  """Statement by statement: its own image among all others, and it among all other texts.

  Rows of the same image are left out on both sides, and so are texts that do not exist.
  """
  score = lambda image, text: torch.einsum("bqe,cse->bqcs", image, text).amax(1) / temperature
  to_text = score(image, text.detach() if detach else text)
  to_image = score(image.detach() if detach else image, text)
  found = []
  for b, s in np.argwhere(valid).tolist():
    others = [c for c in range(len(ids)) if ids[c] != ids[b]]
    texts = [to_text[b, c, u] for c in others for u in range(valid.shape[1]) if valid[c, u]]
    images = [to_image[c, b, s] for c in others]
    both = [F.cross_entropy(torch.stack([own, *negatives]), torch.tensor(0), label_smoothing=smoothing)
            for own, negatives in ((to_text[b, b, s], texts), (to_image[b, b, s], images))]
    found.append(sum(both) / 2)
  return torch.stack(found)


@functools.partial(jax.jit, static_argnames=("detach", "block"))
def loss_and_gradients(rows, temperature, detach=False, block=0):
  def mean(image, text, temperature):
    loss = contrast.statement_losses(image, text, rows["image_id"], rows["valid"], temperature, SMOOTHING,
                                     detach, block)
    return (loss * rows["valid"]).sum() / rows["valid"].sum()
  return jax.value_and_grad(mean, (0, 1, 2))(rows["image"], rows["text"], temperature)


def check(rows, reference, mesh=None, **options):
  """Value and gradients against `reference(image, text, temperature)` in PyTorch, in float64."""
  with jax.set_mesh(make_mesh(**(mesh or {}))):
    value, grads = loss_and_gradients(put(rows), jnp.float32(TEMPERATURE), **options)
  inputs = [torch.tensor(x, dtype=torch.float64, requires_grad=True)
            for x in (rows["image"], rows["text"], TEMPERATURE)]
  expected = reference(*inputs)
  expected.backward()
  assert float(value) == pytest.approx(expected.item(), rel=1e-6)
  for got, wanted in zip(grads, inputs):
    scale = max(wanted.grad.abs().max().item(), 1e-9)
    np.testing.assert_allclose(got, wanted.grad, atol=1e-6 * scale)


@pytest.mark.parametrize("detach", [False, True], ids=["all gradients", "detached"])
@pytest.mark.parametrize("mesh,block", [
    ("1 device", 0), ("1 device", 4), ("1 device", 1), ("8 devices", 0), ("8 devices", 8),
    ("2 x 2 with tensor 2", 8)])
def test_blocks_and_meshes_do_not_change_the_loss_or_its_gradients(mesh, block, detach):
  rows = batch()
  check(rows, lambda *inputs: torch_losses(*inputs, rows["image_id"], rows["valid"], detach=detach).mean(),
        MESHES[mesh], detach=detach, block=block)


def test_with_one_statement_per_image_it_is_that_of_lavis():
  """max over queries, / temperature, cross-entropy both ways, label smoothing 0.1."""
  def lavis(image, text, temperature):
    image_to_text = torch.einsum("bqe,cse->bqcs", image, text)[..., 0].amax(1) / temperature
    own = torch.arange(IMAGES)
    return (F.cross_entropy(image_to_text, own, label_smoothing=SMOOTHING)
            + F.cross_entropy(image_to_text.T, own, label_smoothing=SMOOTHING)) / 2
  check(batch(texts=1) | {"image_id": np.arange(IMAGES, dtype=np.int32)}, lavis)


def test_the_statements_of_an_image_are_all_its_positives():
  """Moving one closer to its image lowers its loss, and raises that of no sibling."""
  images, texts = 5, 2
  scores = np.random.default_rng(0).normal(size=(images, 1, images * texts)).astype(np.float32)
  closer = scores.copy()
  closer[0, 0, 0] += 0.5  # image 0 with its statement 0
  # Statement k is the unit vector k, so that what an image is there is their similarity.
  text = np.eye(images * texts, dtype=np.float32).reshape(images, texts, -1)
  rows = {"text": text, "ids": np.arange(images, dtype=np.int32), "valid": np.ones((images, texts), bool)}
  with jax.set_mesh(make_mesh()):
    before, after = (
        np.asarray(contrast.statement_losses(*put({"image": image} | rows).values(), 0.2, 0.0))[0]
        for image in (scores, closer))
  assert after[0] < before[0] and after[1] == before[1]


def test_of_a_single_image_it_is_zero():
  """No negatives, nothing to tell apart: a loss of 0 and no NaN."""
  rows = {name: values[:1] for name, values in batch().items()}
  with jax.set_mesh(make_mesh()):
    value, grads = loss_and_gradients(put(rows), jnp.float32(TEMPERATURE))
  assert float(value) == pytest.approx(0, abs=1e-6)
  assert all(np.isfinite(grad).all() for grad in grads)


# --- memory ---


def sizes_on_a_device(jaxpr, inside=False):
  """Elements of every array that a program makes on each device, in `shard_map`."""
  for equation in jaxpr.eqns:
    inner = inside or equation.primitive.name == "shard_map"
    if inside:
      yield from (out.aval.size for out in equation.outvars if hasattr(out.aval, "size"))
    for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda v: hasattr(v, "eqns")):
      value = getattr(value, "jaxpr", value)
      if hasattr(value, "eqns"):
        yield from sizes_on_a_device(value, inner)


def largest_on_a_device(images, block):
  with jax.set_mesh(make_mesh(data=8)):
    traced = loss_and_gradients.trace(put(batch(images)), jnp.float32(TEMPERATURE), block=block)
  return max(sizes_on_a_device(traced.jaxpr.jaxpr))


def test_a_device_never_holds_more_than_its_rows_against_one_block():
  """Forward and backward: [own rows, queries, block, statements], and without blocks the whole batch."""
  for images in (64, 128):
    own = images // 8
    assert largest_on_a_device(images, block=8) <= own * QUERIES * 8 * TEXTS
    assert largest_on_a_device(images, block=0) == own * QUERIES * images * TEXTS


def test_what_the_compiled_loss_needs_grows_with_a_devices_rows_alone():
  """Twice the images on eight devices: twice the temporary memory in blocks, four times without them."""
  def temporary(images, block):
    with jax.set_mesh(make_mesh(data=8)):
      compiled = loss_and_gradients.lower(put(batch(images)), jnp.float32(TEMPERATURE), block=block).compile()
    return compiled.memory_analysis().temp_size_in_bytes
  assert temporary(512, 64) < 2.2 * temporary(256, 64)
  assert temporary(512, 0) > 3 * temporary(256, 0)
  assert temporary(512, 64) < temporary(512, 0) / 4


def test_blocks_must_divide_the_batch():
  with jax.set_mesh(make_mesh()), pytest.raises(ValueError, match="itc_block=3 does not divide .*=16: set"):
    loss_and_gradients(put(batch()), jnp.float32(TEMPERATURE), block=3)
