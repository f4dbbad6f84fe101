"""OPT computes what transformers' OPT computes, however its text is divided into prompt and
continuation."""
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from lskd_jax.models.decoders.opt import Opt, OptConfig
from lskd_jax.parallel import ACT_B
from tests.lskd_jax.torch_decoders import OPT_SHAPES, left_padded, opt_pair

pytestmark = pytest.mark.usefixtures("one_device")

ROWS = [[5, 9, 30, 12, 44, 8, 17], [23, 6, 7, 50, 31, 40, 4, 19, 22], [11, 10, 9, 8, 7, 6]]
PROMPT = 5  # of the columns; what follows is the continuation


def call(decoder, function, *arrays):
  """`function(decoder, *arrays)`, jitted."""
  graph, state = nnx.split(decoder)
  arrays = [jax.device_put(np.asarray(a), ACT_B) for a in arrays]
  run = jax.jit(lambda state, *arrays: function(nnx.merge(graph, state), *arrays))
  return np.asarray(run(state, *arrays))


def taught(decoder, tokens, real):
  """Logits of the continuation, all at once."""
  memory = decoder.read(decoder.embed(tokens)[:, :PROMPT], real[:, :PROMPT])
  return decoder.logits(decoder.write(memory, decoder.embed(tokens)[:, None, PROMPT:])[0])[:, 0]


def reference(model, tokens, real):
  with torch.no_grad():
    logits = model(torch.tensor(tokens).long(), attention_mask=torch.tensor(real).long()).logits
  return logits.float().numpy()[:, PROMPT:]


@pytest.mark.parametrize("shape", OPT_SHAPES, ids=lambda s: f"{s[0]}x{s[2]}{'' if s[5] else '-post'}")
@pytest.mark.parametrize("scan", [True, False], ids=["scanned", "unrolled"])
def test_the_same_logits_as_pytorch(shape, scan):
  """With prompts of different lengths, padded on the left; opt-350m's variant has other norms."""
  model, opt = opt_pair(shape, scan=scan)
  tokens, real = left_padded(ROWS, pad=1)
  want, have = reference(model, tokens, real), call(opt, taught, tokens, real)
  assert np.abs(want - have).max() <= 1e-5 * np.abs(want).max()
  assert (want.argmax(-1) == have.argmax(-1)).all()


def test_token_by_token_is_all_at_once():
  """The cache holds what the tokens before it left there."""
  _, opt = opt_pair(OPT_SHAPES[0])
  tokens, real = left_padded(ROWS, pad=1)

  def stepwise(opt, tokens, real):
    memory = opt.read(opt.embed(tokens)[:, :PROMPT], real[:, :PROMPT])
    cache, found = opt.cache(len(ROWS), 1, 6), []
    for place in range(tokens.shape[1] - PROMPT):
      x = opt.embed(tokens[:, PROMPT + place])[:, None, None]
      states, cache = opt.write(memory, x, cache, place)
      found.append(opt.logits(states)[:, 0, 0])
    return jnp.stack(found, 1)
  np.testing.assert_allclose(call(opt, stepwise, tokens, real), call(opt, taught, tokens, real),
                             rtol=1e-5, atol=1e-5)


def test_continuations_of_a_prompt_share_its_memory_and_nothing_else():
  """Three candidates for one prompt give the logits that each gives alone."""
  _, opt = opt_pair(OPT_SHAPES[1])
  tokens, real = left_padded(ROWS, pad=1)
  rng = np.random.default_rng(0)
  texts = rng.integers(4, 60, (3, 3, 4)).astype(np.int32)

  def together(opt, tokens, real, texts):
    memory = opt.read(opt.embed(tokens), real)
    return opt.logits(opt.write(memory, opt.embed(texts))[0])

  found = call(opt, together, tokens, real, texts)
  for k in range(3):
    alone = call(opt, together, tokens, real, texts[:, k:k + 1])
    np.testing.assert_allclose(found[:, k:k + 1], alone, rtol=1e-5, atol=1e-5)


def test_bfloat16_is_as_close_to_float32_as_pytorchs():
  """Parameters, norms, softmax and logits stay float32, so it is a little closer."""
  tokens, real = left_padded(ROWS, pad=1)
  ours, theirs = [], []
  for seed in range(3):
    model, opt = opt_pair(OPT_SHAPES[0], seed=seed)
    exact = reference(model, tokens, real)
    half = Opt(opt.config, nnx.Rngs(0), jnp.bfloat16)
    nnx.update(half, nnx.state(opt))
    ours.append(np.abs(call(half, taught, tokens, real) - exact).mean())
    theirs.append(np.abs(reference(model.bfloat16(), tokens, real) - exact).mean())
  assert np.mean(ours) <= np.mean(theirs)


def test_an_activation_that_opt_does_not_have_is_refused():
  with pytest.raises(ValueError, match="decoder.activation 'swish' is unknown: choose relu, gelu"):
    Opt(OptConfig(width=4, embed=4, heads=1, depth=1, hidden=4, vocabulary=5, activation="swish"),
        nnx.Rngs(0))
