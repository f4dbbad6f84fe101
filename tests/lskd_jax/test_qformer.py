"""The four passes of the Q-Former: BLIP-2's formulas in float64 NumPy, and what they promise."""
import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lskd_jax.models.qformer import QFormer, QFormerConfig
from tests.lskd_jax.tiny import filled, gelu, pure, put

pytestmark = pytest.mark.usefixtures("one_device")

# Four blocks: cross-attention in 0 and 2, and two groups for the scan.
CONFIG = QFormerConfig(vocabulary=32, width=8, depth=4, heads=2, hidden=12, queries=3, max_tokens=8)
VISION, B, S, T, N, M = 6, 2, 2, 7, 5, 9  # M: RoI tokens of an image


def qformer(dtype=jnp.float32, **changes):
  config = dataclasses.replace(CONFIG, **changes)
  return filled(lambda rngs: QFormer(config, VISION, rngs, dtype))


def make_inputs(seed=0):
  rng = np.random.default_rng(seed)
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
  return put({
      "features": draw(B, N, VISION), "region_tokens": draw(B, M, VISION),
      "region_valid": np.array([[True] * 4 + [False] * 5, [False] * M]),  # image 1 has no region
      "tokens": rng.integers(6, 32, (B, S, T)).astype(np.int32), "mention": draw(B, S, T, 8),
      "real": np.arange(T) < np.array([[7, 4], [5, 6]])[..., None]})


@jax.jit
def jitted_passes(model, inputs, key):
  memory = model.remember(inputs["features"], inputs["region_tokens"], inputs["region_valid"])
  text = inputs["tokens"], inputs["mention"]
  queries, cache = model.query_pass(memory, key)
  return {"queries": queries, "text": model.text_pass(*text, inputs["real"], key),
          "fused": model.fused_pass(memory, *text, inputs["real"], key),
          "causal": model.causal_pass(cache, *text, key)}


def passes(model, inputs, key=None):
  """All four passes: {name: states}, in NumPy."""
  return jax.tree.map(np.asarray, jitted_passes(model, inputs, key))


@pytest.fixture(scope="module")
def inputs(one_device):
  return make_inputs()


@pytest.fixture(scope="module")
def outputs(one_device, inputs):
  return passes(qformer(), inputs)


# --- the formulas, for one image and one text ---

def norm(x, p):
  centred = x - x.mean(-1, keepdims=True)
  return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + CONFIG.eps) * p["scale"] + p["bias"]


def heads(x, p):
  return np.einsum("td,dhk->thk", x, p["kernel"]) + p["bias"]


def attend(queries, keys, values, allowed):
  out = np.zeros(queries.shape)
  for t, h in np.ndindex(*queries.shape[:2]):
    seen = np.flatnonzero(allowed[t])
    weights = np.exp(keys[seen, h] @ queries[t, h] / math.sqrt(queries.shape[-1]))
    out[t, h] = weights / weights.sum() @ values[seen, h]
  return out


def join(x, p):
  return np.einsum("thk,hkd->td", x, p["kernel"]) + p["bias"]


def feed_forward(x, p):
  up = x @ p["mlp"]["up"]["kernel"] + p["mlp"]["up"]["bias"]
  return norm(x + gelu(up) @ p["mlp"]["down"]["kernel"] + p["mlp"]["down"]["bias"], p["norm"])


def cross_attend(x, p, features, regions):
  """Attention to the image, and tanh(gate) times attention to the regions, each with a softmax."""
  read = lambda tokens: attend(heads(x, p["query"]), heads(tokens, p["key"]),
                               heads(tokens, p["value"]), np.ones((len(x), len(tokens)), bool))
  seen = read(features)
  if len(regions):
    seen = seen + np.tanh(p["gate"])[:, None] * read(regions)
  return norm(x + join(seen, p["out"]), p["norm"])


def run(params, queries, text, allowed, features=None, regions=(), cache=None):
  """Post-norm blocks over the rows [queries; text]; `allowed` has a column per cached row and row.

  Returns the rows after the last block, and every block's self-attention keys and values.
  """
  rows, split, kept = np.concatenate([queries, text]), len(queries), []
  for i in range(CONFIG.depth):
    group, place = divmod(i, CONFIG.cross_every)
    block = jax.tree.map(lambda a: a[group], params["stack"]["blocks"]["blocks"][place])
    p = block["attention"]
    keys, values = heads(rows, p["key"]), heads(rows, p["value"])
    kept.append((keys, values))
    if cache is not None:
      keys, values = (np.concatenate(pair) for pair in zip(cache[i], (keys, values)))
    out = attend(heads(rows, p["query"]), keys, values, allowed)
    rows = norm(rows + join(out, p["out"]), p["norm"])
    queries, text = rows[:split], rows[split:]
    if split and i % CONFIG.cross_every == 0:
      queries = cross_attend(queries, block["cross"], features, regions)
    rows = np.concatenate([feed_forward(queries, block["query_forward"]),
                           feed_forward(text, block["text_forward"])])
  return rows, kept


def reference(model, inputs):
  """The four passes, one image and one text at a time."""
  params = pure(model)
  inputs = {name: np.asarray(a, np.float64 if a.dtype == np.float32 else a.dtype)
            for name, a in inputs.items()}
  queries, none = norm(params["query_tokens"], params["norm"]), np.zeros((0, CONFIG.width))
  out = {name: np.zeros((B, S, T, CONFIG.width)) for name in ("text", "causal")}
  out |= {"queries": np.zeros((B, 3, CONFIG.width)), "fused": np.zeros((B, S, 3, CONFIG.width))}
  for b in range(B):
    image = inputs["features"][b], inputs["region_tokens"][b][inputs["region_valid"][b]]
    out["queries"][b], cache = run(params, queries, none, np.ones((3, 3), bool), *image)
    for s in range(S):
      tokens, real = inputs["tokens"][b, s], inputs["real"][b, s]
      text = params["words"][tokens] + params["positions"][:T] + inputs["mention"][b, s]
      text = norm(text, params["norm"])
      out["text"][b, s] = run(params, none, text, np.tile(real, (T, 1)))[0]
      everyone = np.tile(np.concatenate([np.ones(3, bool), real]), (3 + T, 1))
      out["fused"][b, s] = run(params, queries, text, everyone, *image)[0][:3]
      causal = np.concatenate([np.ones((T, 3), bool), np.tri(T, dtype=bool)], 1)
      out["causal"][b, s] = run(params, none, text, causal, cache=cache)[0]
  return out


# --- tests ---

@pytest.fixture(scope="module")
def expected(one_device, inputs):
  return reference(qformer(), inputs)


@pytest.mark.parametrize("name", ["queries", "text", "fused", "causal"])
def test_each_pass_is_that_of_the_formulas(outputs, expected, name):
  np.testing.assert_allclose(outputs[name], expected[name], atol=2e-5)


def test_the_causal_pass_never_looks_ahead(outputs, inputs):
  for t in range(1, T):
    tokens = np.array(inputs["tokens"])
    tokens[:, :, t] = (tokens[:, :, t] + 1) % 32
    changed = passes(qformer(), inputs | put({"tokens": tokens}))["causal"]
    np.testing.assert_array_equal(changed[:, :, :t], outputs["causal"][:, :, :t])
    assert np.all(np.any(changed[:, :, t:] != outputs["causal"][:, :, t:], -1))


def test_the_causal_pass_sees_the_image_through_the_cached_queries(outputs, inputs):
  other = inputs | {"features": make_inputs(1)["features"]}
  changed = passes(qformer(), other)
  assert np.all(np.any(changed["causal"] != outputs["causal"], -1))
  np.testing.assert_array_equal(changed["text"], outputs["text"])


def test_padding_is_never_read(outputs, inputs):
  """What stands in padded places changes nothing, and neither does how much of it there is."""
  padded = ~np.asarray(inputs["real"])
  tokens = np.where(padded, 31, inputs["tokens"])
  mention = np.where(padded[..., None], 9, inputs["mention"]).astype(np.float32)
  changed = passes(qformer(), inputs | put({"tokens": tokens, "mention": mention}))
  np.testing.assert_array_equal(changed["fused"], outputs["fused"])
  np.testing.assert_array_equal(changed["text"][~padded], outputs["text"][~padded])
  assert np.any(changed["text"][padded] != outputs["text"][padded])


def test_texts_of_an_image_do_not_see_each_other(outputs, inputs):
  """Several texts per image are the same as one at a time."""
  other = make_inputs(1)
  mixed = {name: np.array(inputs[name]) for name in ("tokens", "mention")}
  for name, rows in mixed.items():
    rows[:, 1] = np.asarray(other[name])[:, 1]
  changed = passes(qformer(), inputs | put(mixed))
  for name in ("text", "fused", "causal"):
    np.testing.assert_array_equal(changed[name][:, 0], outputs[name][:, 0])
    assert np.any(changed[name][:, 1] != outputs[name][:, 1])


def test_images_do_not_see_each_other(outputs, inputs):
  other = make_inputs(1)
  features = np.array(inputs["features"])
  features[1] = np.asarray(other["features"])[1]
  changed = passes(qformer(), inputs | put({"features": features}))
  for name in ("queries", "fused", "causal"):
    np.testing.assert_array_equal(changed[name][0], outputs[name][0])
    assert np.any(changed[name][1] != outputs[name][1])


def test_invalid_regions_are_never_read(outputs, inputs):
  tokens = np.where(np.asarray(inputs["region_valid"])[..., None], inputs["region_tokens"], 1e3)
  changed = passes(qformer(), inputs | put({"region_tokens": tokens.astype(np.float32)}))
  for name in ("queries", "fused", "causal"):
    np.testing.assert_array_equal(changed[name], outputs[name])


def test_positions_belong_to_text_only(inputs, outputs):
  """Queries have none, and those of text start at 0 although the queries stand before it."""
  model = qformer()
  model.positions[...] = jnp.array(model.positions[...]).at[T:].set(100.0)
  changed = passes(model, inputs)
  for name, states in outputs.items():
    np.testing.assert_array_equal(changed[name], states)
  model.positions[...] = 1 - model.positions[...]
  changed = passes(model, inputs)
  np.testing.assert_array_equal(changed["queries"], outputs["queries"])
  assert np.all(np.any(changed["text"] != outputs["text"], -1))


@jax.jit
def gradient(model, inputs):
  def loss(model):
    memory = model.remember(inputs["features"], inputs["region_tokens"], inputs["region_valid"])
    return (model.query_pass(memory)[0][..., :3]**2).sum()
  return jax.value_and_grad(loss)(model)


def test_scanning_and_recomputing_change_no_number(inputs):
  groups = dict(depth=2, cross_every=1)
  models = qformer(**groups), qformer(**groups, scan=False, remat="full")
  for expected, got in zip(*(jax.tree.leaves(gradient(model, inputs)) for model in models)):
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5 * max(1, np.abs(expected).max()))


def test_dropout_is_a_function_of_the_key(inputs):
  @jax.jit
  def read(model, key):
    return model.query_pass(model.remember(inputs["features"]), key)[0]
  model, dropping = (qformer(depth=2, dropout=rate) for rate in (0.0, 0.3))
  keys = [jax.random.key(i) for i in range(2)]
  first, again, other = (np.asarray(read(dropping, keys[i])) for i in (0, 0, 1))
  plain = np.asarray(read(model, None))
  np.testing.assert_array_equal(first, again)
  assert np.all(np.any(first != other, -1))  # two steps, two masks
  assert np.all(np.any(first != plain, -1))
  np.testing.assert_array_equal(read(dropping, None), plain)  # evaluation drops nothing


def test_bfloat16_is_near_float32(inputs, outputs):
  for name, states in passes(qformer(jnp.bfloat16), inputs).items():
    assert states.dtype == jnp.bfloat16
    error = np.abs(states.astype(np.float32) - outputs[name]).mean()
    assert error < 0.03 * np.abs(outputs[name]).mean()


def test_blocks_that_do_not_fill_a_group_are_an_error():
  with pytest.raises(ValueError, match="depth=3 is not a multiple of qformer.cross_every=2"):
    qformer(depth=3)


def test_only_the_first_block_of_a_group_reads_the_image():
  first, second = qformer().stack.blocks.blocks
  assert first.cross is not None and second.cross is None
  assert qformer(cross_every=1).stack.blocks.blocks[0].cross is not None
