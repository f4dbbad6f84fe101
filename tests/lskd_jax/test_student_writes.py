"""The stage-1 student writes: the causal pass token by token is the causal pass of the whole text."""
import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import reshard
import numpy as np
import pytest

from lskd_jax.models.generate import Decoding, Start, generate
from lskd_jax.parallel import ACT_B, REPLICATED, make_mesh, put_batch
from tests.lskd_jax import tiny
from tests.lskd_jax.tiny import BRACKET, CLOSE, DIGITS, STUDENT, WORDS, student
from tests.lskd_jax.torch_decoders import left_padded

# Ragged; the second ends where the number of a mention may follow, the last is a
# caption's.
PROMPTS = [[5, 20, BRACKET, DIGITS + 1, CLOSE, 19], [5, 17, 18, BRACKET, DIGITS, CLOSE, 30, BRACKET],
           [5, WORDS + 3], [5]]
TOKENS = 7
SEARCHES = {"greedy": {}, "beams": dict(beams=3, length_penalty=-1.0, repetition_penalty=1.2)}


def decoding(name) -> Decoding:
  return Decoding(TOKENS, min_tokens=4, ends=(3,), **SEARCHES[name])


def images(count):
  return {name: values for name, values in tiny.batch(images=count).items()
          if name in ("image", "boxes", "region_valid")}


def written(module, prompts, decoding, batch):
  """What the student writes, the prompts in one batch."""
  graph, state = nnx.split(module)
  tokens, real = left_padded(prompts, pad=0)

  @jax.jit
  def run(state, batch):
    student = nnx.merge(graph, state)
    sight = student.see(student.vit(batch["image"]), batch["boxes"], batch["region_valid"])
    prompted = student.read(sight, student.read_image(sight)[1], batch["tokens"], batch["real"])
    return student.generate(sight, prompted, decoding)
  batch = put_batch({**batch, "tokens": tokens, "real": real}, jax.sharding.get_mesh())
  return jax.tree.map(np.asarray, run(state, batch))


def recomputed(module, prompts, decoding, batch):
  """The same with nothing kept: every token is predicted by `predict_words` of all before it."""
  graph, state = nnx.split(module)
  beams, longest = decoding.beams, max(map(len, prompts)) + TOKENS
  rows = np.array([prompt + [0] * (longest - len(prompt)) for prompt in prompts], np.int32)
  last = np.array([len(prompt) - 1 for prompt in prompts])

  @jax.jit
  def run(state, batch):
    student = nnx.merge(graph, state)
    sight = student.see(student.vit(batch["image"]), batch["boxes"], batch["region_valid"])
    cache = student.read_image(sight)[1]

    def write(history, tokens, before, place, lineage):  # history: int32[B, places, beams]
      new = reshard(tokens, REPLICATED)[:, None]
      history = jax.lax.dynamic_update_slice(history, new, (0, place, 0))
      own = jnp.eye(beams, dtype=bool)[None, :, None] if lineage is None else reshard(
          lineage, REPLICATED)
      texts = jnp.where(own, history[:, None], 0).sum(-1)
      at = jnp.arange(longest) - last[:, None]  # 0 where a prompt's last token stands
      taken = jnp.take_along_axis(texts, jnp.clip(at, 0, TOKENS)[:, None], -1)
      whole = jnp.where((at < 0)[:, None], rows[:, None], taken)
      logits = student.predict_words(sight, cache, reshard(whole, ACT_B))
      return jnp.take_along_axis(logits, (last + place)[:, None, None, None], 2)[:, :, 0], history
    history = jnp.zeros((len(prompts), 1 + TOKENS, beams), jnp.int32)
    first = jnp.array([prompt[-1] for prompt in prompts], jnp.int32)
    tokens = jnp.broadcast_to(first[:, None], (len(prompts), beams))
    logits, history = write(history, tokens, tokens, 0, None)
    seen = jax.nn.one_hot(rows, logits.shape[-1], dtype=bool).any(1)
    return generate(write, Start(logits, history, 1, first, seen), decoding)
  return jax.tree.map(np.asarray, run(state, put_batch(batch, jax.sharding.get_mesh())))


def check(module, name):
  """The same tokens with and without what is kept; they depend on the prompts."""
  batch = images(len(PROMPTS))
  loud = np.isin(np.arange(tiny.VOCABULARY), [BRACKET, *range(DIGITS, DIGITS + 4)])
  module.language_head.bias[...] += 4.0 * loud  # so that mentions are written
  found = written(module, PROMPTS, decoding(name), batch)
  expected = recomputed(module, PROMPTS, decoding(name), batch)
  assert found.tokens.tolist() == expected.tokens.tolist()
  np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-4)
  assert DIGITS <= found.tokens[1, 0] < DIGITS + 4  # a mention over the border of prompt and text
  assert len({tuple(row) for row in found.tokens.tolist()}) == len(PROMPTS)


@pytest.mark.parametrize("name", SEARCHES)
def test_what_is_kept_changes_nothing(name, one_device):
  """For ragged prompts with mentions, also one that is written over the border of prompt and text."""
  check(student(), name)


def test_blocks_without_cross_attention_keep_their_own(one_device):
  qformer = dataclasses.replace(STUDENT.qformer, depth=4, cross_every=2, scan=False)
  check(student(dataclasses.replace(STUDENT, qformer=qformer)), "beams")


def test_on_several_devices_the_same_is_written():
  with jax.set_mesh(make_mesh()):
    expected = written(student(), PROMPTS, decoding("beams"), images(4))
  with jax.set_mesh(make_mesh(fsdp=2, tensor=2)):
    found = written(student(), PROMPTS, decoding("beams"), images(4))
  assert found.tokens.tolist() == expected.tokens.tolist()
