"""The T5 decoder: transformers' numbers, and prompts that are read once for many continuations."""
import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.models.t5.modeling_t5 import T5Attention

from lskd_jax import parallel, trees
from lskd_jax.convert import decoders, tables
from lskd_jax.models.decoders.t5 import T5, T5Config, distance_buckets
from tests.lskd_jax import torch_t5
from tests.lskd_jax.tiny import put

pytestmark = pytest.mark.usefixtures("one_device")

# As BLIP-2 has it: gated, exact GELU, a head of its own.
BLIP2 = T5Config(vocabulary=50, width=24, head=7, heads=4, hidden=40, depth=2, decoder_depth=2)
# (config, tokens of a prompt, of a continuation). Little divides anything evenly; lengths go beyond
# the buckets of single distances, twice also beyond the last bucket.
CASES = [
    (BLIP2, 140, 40),
    (T5Config(vocabulary=37, width=15, head=4, heads=5, hidden=33, depth=1, decoder_depth=3, buckets=8,
              max_distance=20, activation="gelu_new", tied=True), 45, 30),
    (T5Config(vocabulary=64, width=20, head=11, heads=1, hidden=17, depth=3, decoder_depth=1,
              activation="relu", gated=False, tied=True), 21, 18),  # T5 1.0
    (T5Config(vocabulary=29, width=18, head=3, heads=7, hidden=50, depth=1, decoder_depth=2, buckets=10,
              max_distance=33, activation="gelu_pytorch_tanh", eps=1e-3), 9, 1),
]
B = 4


def make_inputs(config, prompt=12, rows=1, tokens=9, seed=0):
  """Prompts padded on the left, on the right, in the middle and not at all; `rows` continuations."""
  rng = np.random.default_rng(seed)
  places = np.arange(prompt)
  real = np.stack([places >= 3, places < prompt - 4, abs(places - 4) > 1, places >= 0])
  written = rng.integers(2, config.vocabulary, (B, rows, tokens))
  written[..., 0] = config.start
  return (rng.integers(2, config.vocabulary, (B, prompt)).astype(np.int32), real,
          written.astype(np.int32))


@jax.jit
def whole(model, inputs):
  """(the encoder's output, states, logits) of continuations written in one go."""
  prompt, real, written = inputs
  embedded = model.embed(prompt)
  states, _ = model.write(model.read(embedded, real), model.embed(written))
  return model.encode(embedded, real), states, model.logits(states)


@jax.jit
def stepwise(model, inputs):
  """The states of continuations written one token at a time."""
  prompt, real, written = inputs
  memory, x = model.read(model.embed(prompt), real), model.embed(written)
  batch, rows, tokens = written.shape

  def step(carry):
    at, cache, states = carry
    new, cache = model.write(memory, jax.lax.dynamic_slice_in_dim(x, at, 1, 2), cache, at)
    return at + 1, cache, jax.lax.dynamic_update_slice_in_dim(states, new, at, 2)
  # One place is never written: the cache may be longer than what is in it.
  start = 0, model.cache(batch, rows, tokens + 1), jnp.zeros_like(x)
  return jax.lax.while_loop(lambda carry: carry[0] < tokens, step, start)[2]


def on_mesh(inputs):
  return tuple(put(dict(enumerate(inputs))).values())


def numbers(run, model, inputs):
  return jax.tree.map(np.asarray, run(model, on_mesh(inputs)))


@pytest.fixture(scope="module")
def theirs():
  return torch_t5.reference(BLIP2)


@pytest.fixture(scope="module")
def model(one_device, theirs):
  return torch_t5.ours(theirs, BLIP2)


def assert_near(have, want, share):
  """Differences of at most `share` of the largest value."""
  assert np.abs(have - want).max() <= share * np.abs(want).max()


# --- the numbers of transformers -----------------------------------------------------------------


@pytest.mark.parametrize("config,prompt,tokens", CASES, ids=lambda c: getattr(c, "activation", c))
def test_the_same_numbers_as_pytorch(config, prompt, tokens):
  reference = torch_t5.reference(config)
  inputs = make_inputs(config, prompt, 1, tokens)
  encoded, logits = torch_t5.theirs(reference, *inputs[:2], inputs[2][:, 0])
  have_encoded, _, have = numbers(whole, torch_t5.ours(reference, config), inputs)
  # Rounding: PyTorch's float32 is itself 1e-5 away from its float64.
  assert_near(have_encoded[inputs[1]], encoded[inputs[1]], 2e-5)
  assert_near(have[:, 0], logits, 5e-5)
  assert (have[:, 0].argmax(-1) == logits.argmax(-1)).all()


def test_every_tensor_goes_back_to_the_byte():
  """That every tensor has its leaf, and every leaf its tensor, is checked wherever a test fills ours."""
  for config, *_ in CASES:
    reference = torch_t5.reference(config)
    tensors, model = torch_t5.state_dict(reference), torch_t5.ours(reference, config)
    leaves = {name: np.asarray(leaf) for name, leaf in trees.named_leaves(nnx.state(model)).items()}
    for entry in decoders.t5_table(config, torch_t5.PREFIX, ""):
      back = tables.to_theirs(entry, leaves[entry.ours][(*entry.at, ...)])
      assert np.array_equal(back, tensors[entry.theirs]), entry.theirs


@pytest.mark.parametrize("buckets,max_distance", [(32, 128), (16, 128), (8, 20), (10, 33)])
def test_every_distance_is_in_the_bucket_of_transformers(buckets, max_distance):
  distance = torch.arange(max_distance + 1)
  want = T5Attention._relative_position_bucket(-distance, False, buckets, max_distance)
  np.testing.assert_array_equal(distance_buckets(buckets, max_distance), want)


def test_the_gradient_of_a_prompt_is_that_of_pytorch(theirs):
  """What trains the tower that makes a frozen decoder's prompts; blocks are computed anew for it."""
  inputs = make_inputs(BLIP2)
  embedded = np.random.default_rng(1).normal(size=(*inputs[0].shape, BLIP2.width)).astype(np.float32)
  prompt = torch.tensor(embedded, requires_grad=True)
  theirs(inputs_embeds=prompt, attention_mask=torch.tensor(inputs[1]),
         decoder_input_ids=torch.tensor(inputs[2][:, 0], dtype=torch.long)).logits.square().sum().backward()

  @jax.jit
  def gradient(model, embedded, inputs):
    def loss(embedded):
      states, _ = model.write(model.read(embedded, inputs[1]), model.embed(inputs[2]))
      return jnp.square(model.logits(states)).sum()
    return jax.grad(loss)(embedded)
  model = torch_t5.ours(theirs, BLIP2, remat="full")
  have = gradient(model, on_mesh([embedded])[0], on_mesh(inputs))
  assert_near(np.asarray(have), prompt.grad.numpy(), 1e-4)


def test_bfloat16_errs_no_more_than_pytorchs(theirs):
  """Mean error of the logits against PyTorch's float32, ours and PyTorch's in bfloat16."""
  ours, pytorchs = [], []
  half = torch_t5.reference(BLIP2).to(torch.bfloat16)
  model = torch_t5.ours(theirs, BLIP2, jnp.bfloat16)
  for seed in range(3):
    inputs = make_inputs(BLIP2, 30, 1, 30, seed)
    flat = (*inputs[:2], inputs[2][:, 0])
    want = torch_t5.theirs(theirs, *flat)[1]
    _, states, logits = numbers(whole, model, inputs)
    assert states.dtype == logits.dtype == np.float32
    ours.append(np.abs(logits[:, 0] - want).mean())
    pytorchs.append(np.abs(torch_t5.theirs(half, *flat)[1] - want).mean())
  assert 0 < np.mean(ours) <= 1.5 * np.mean(pytorchs)


# --- reading once, writing many ------------------------------------------------------------------


@pytest.mark.parametrize("scan", [True, False])
def test_writing_token_by_token_is_writing_in_one_go(theirs, model, scan):
  """Inside a while loop, with a place that is known only as it runs; unrolled blocks give the same
  numbers as scanned ones."""
  inputs = make_inputs(BLIP2, 12, 2, 25)
  want = numbers(whole, model, inputs)[1]
  assert_near(numbers(stepwise, torch_t5.ours(theirs, BLIP2, scan=scan), inputs), want, 1e-5)


def test_several_tokens_continue_a_cache(model):
  """What stands already is written in one go, and so are the tokens after it."""
  inputs = make_inputs(BLIP2)
  want = numbers(whole, model, inputs)[1]

  @jax.jit
  def in_two(model, inputs):
    prompt, real, written = inputs
    memory, x = model.read(model.embed(prompt), real), model.embed(written)
    first, cache = model.write(memory, x[:, :, :4], model.cache(B, 1, x.shape[2]))
    rest, _ = model.write(memory, x[:, :, 4:], cache, 4)
    return jnp.concatenate([first, rest], 2)
  assert_near(numbers(in_two, model, inputs), want, 1e-5)


def test_continuations_share_a_memory_and_do_not_see_each_other(model):
  prompt, real, written = make_inputs(BLIP2, rows=3)
  together = numbers(whole, model, (prompt, real, written))[2]
  for row in range(3):
    alone = numbers(whole, model, (prompt, real, written[:, row:row + 1]))[2]
    assert_near(together[:, row:row + 1], alone, 1e-5)


def test_padding_is_never_read(model):
  prompt, real, written = make_inputs(BLIP2)
  changed = np.where(real, prompt, 1)
  assert (changed != prompt).any()
  for want, have in zip(numbers(whole, model, (prompt, real, written))[1:],
                        numbers(whole, model, (changed, real, written))[1:]):
    np.testing.assert_array_equal(have, want)


def test_a_prompt_may_stand_anywhere_between_its_padding(model):
  """Only differences of positions count: padding on either side is the same."""
  prompt, _, written = make_inputs(BLIP2)
  short = prompt[:, 4:]
  real = np.broadcast_to(np.arange(12) < 8, prompt.shape)
  right = np.concatenate([short, prompt[:, :4]], 1)
  have = numbers(whole, model, (right, real, written))[2]
  assert_near(numbers(whole, model, (prompt, real[:, ::-1].copy(), written))[2], have, 1e-5)


# --- how it is run -------------------------------------------------------------------------------


@pytest.mark.parametrize("scan", [True, False])
def test_numbers_do_not_depend_on_the_mesh(theirs, model, scan):
  """Rows over two devices, heads, hidden widths and caches over four; scanned or unrolled."""
  inputs = make_inputs(BLIP2, rows=2)
  want = numbers(whole, model, inputs)
  with jax.set_mesh(parallel.make_mesh(fsdp=2, tensor=4)):
    split = torch_t5.ours(theirs, BLIP2, scan=scan)
    assert_near(numbers(whole, split, inputs)[2], want[2], 1e-5)
    assert_near(numbers(stepwise, split, inputs), want[1], 1e-5)
    cache = split.cache(B, 2, 5)
    assert {shard.data.shape for shard in cache.keys.addressable_shards} == {(2, 2, 1, 5, 2, 7)}


def test_one_token_is_embedded_without_a_batch(theirs, model):
  """Every continuation starts with the same input."""
  start = np.asarray(model.embed(BLIP2.start))
  assert np.array_equal(start, theirs.shared.weight[BLIP2.start].detach())


def test_an_unknown_activation_is_an_error():
  with pytest.raises(ValueError, match="activation 'silu' is unknown: choose gelu, gelu_new"):
    T5(dataclasses.replace(BLIP2, activation="silu"), nnx.Rngs(0))
