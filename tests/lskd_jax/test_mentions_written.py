"""The generative student: where mentions carry their regions, in prompts and in what is written."""
import dataclasses

from flax import nnx
import jax
import numpy as np
import pytest

from lskd_jax.models.decoders.opt import OptConfig
from lskd_jax.models.decoders.t5 import T5Config
from lskd_jax.models.generate import Decoding
from lskd_jax.models.generative import GenerativeConfig, GenerativeStudent
from lskd_jax.parallel import ACT_B, put_batch
from tests.lskd_jax import tiny
from tests.lskd_jax.tiny import BRACKET, CLOSE, DIGIT, DIGITS, OPENS_BRACKET, QFORMER, VIT, VOCABULARY
from tests.lskd_jax.torch_decoders import left_padded

pytestmark = pytest.mark.usefixtures("one_device")

DECODERS = {
    "opt": OptConfig(vocabulary=VOCABULARY, width=16, embed=12, depth=2, heads=2, hidden=32,
                     max_tokens=64, pad=0, start=2, end=3),
    "t5": T5Config(vocabulary=VOCABULARY, width=16, head=6, heads=2, hidden=32, depth=1,
                   decoder_depth=2, start=0, end=3),
}
# One ends where the number of a mention may follow.
PROMPTS = [[2, 20, BRACKET, DIGITS + 1, CLOSE, 19], [2, 17, 18, BRACKET]]


def generative(kind, closed=()):
  config = GenerativeConfig(vit=VIT, qformer=dataclasses.replace(QFORMER, text=False),
                            language_model=kind, decoder=DECODERS[kind], max_regions=tiny.REGIONS)
  return tiny.filled(lambda rngs: GenerativeStudent(config, OPENS_BRACKET, DIGIT, rngs), closed=closed)


def run(module, function, **arrays):
  """`function(student, sight, image, batch)` under one jit, for an image per prompt."""
  graph, state = nnx.split(module)
  batch = {name: values for name, values in tiny.batch(images=len(PROMPTS)).items()
           if name in ("image", "boxes", "region_valid")}

  @jax.jit
  def whole(state, batch):
    student = nnx.merge(graph, state)
    sight = student.see(student.vit(batch["image"]), batch["boxes"], batch["region_valid"])
    return function(student, sight, student.read_image(sight), batch)
  batch = put_batch({**batch, **arrays}, jax.sharding.get_mesh())
  return jax.tree.map(np.asarray, whole(state, batch))


@pytest.mark.parametrize("kind", DECODERS)
def test_the_regions_vector_is_added_to_the_mentions_token_and_no_other(kind):
  text = [BRACKET, DIGITS + 1, CLOSE, DIGITS, BRACKET, 20, DIGITS, BRACKET, DIGITS]
  slots = [-1, 1, -1, -1, -1, -1, -1, -1, 0]
  tokens = np.array([[text], [text[1:] + text[:1]]], np.int32)
  before = np.array([[[20]], [[BRACKET]]], np.int32)

  def words(student, sight, image, batch):
    added = student.words(sight, batch["tokens"], batch["before"]) - student.decoder.embed(batch["tokens"])
    alone = student.words(sight, batch["tokens"]) - student.decoder.embed(batch["tokens"])
    return added, alone, sight.mention
  added, alone, mention = run(generative(kind), words, tokens=tokens, before=before)
  none = np.zeros(mention.shape[-1])
  for b, row in enumerate((slots, slots[1:] + slots[:1])):
    expected = [none if slot < 0 else mention[b, slot] for slot in row]
    np.testing.assert_allclose(added[b, 0], expected, atol=1e-6)
    np.testing.assert_allclose(alone[b, 0, 1:], expected[1:], atol=1e-6)
  assert np.abs(mention[:, :2]).min(-1).max() > 0
  assert not alone[1, 0, 0].any()  # nothing is known of what stands before


def test_where_a_prompt_ends_makes_no_difference():
  """Of one stream; also where a mention's bracket is the prompt's last token."""
  text = [2, 20, BRACKET, DIGITS + 1, CLOSE, 19, BRACKET, DIGITS, CLOSE, 25]

  def likelihoods(cut):
    prompt, real = left_padded([text[:cut]] * 2, pad=0)
    tokens = np.array([[text[cut:]]] * 2, np.int32)
    return run(generative("opt"), lambda student, sight, image, batch: student.likelihoods(
        sight, student.read(sight, image, batch["prompt"], batch["real"]), batch["tokens"]),
               prompt=prompt, real=real, tokens=tokens)[:, 0]
  whole = likelihoods(1)
  for cut in (3, 4, 7):
    np.testing.assert_allclose(likelihoods(cut), whole[:, cut - 1:], atol=1e-5)


@pytest.mark.parametrize("kind", DECODERS)
@pytest.mark.parametrize("beams", [1, 3])
def test_mentions_that_are_written_carry_their_regions(kind, beams):
  """What was written token by token is as likely as the same text in one piece."""
  module = generative(kind)
  decoding = Decoding(9, beams=beams, length_penalty=0.0)
  # Louder brackets and numbers, so that mentions are written.
  head = module.decoder.words if kind == "opt" else module.decoder.head
  louder = np.ones((VOCABULARY, 1), np.float32)
  louder[[BRACKET, *range(DIGITS, DIGITS + 4)]] = 4
  head[...] = head[...] * louder
  prompt, real = left_padded(PROMPTS, pad=0)

  def both(student, sight, image, batch):
    read = student.read(sight, image, batch["prompt"], batch["real"])
    found = student.generate(sight, read, decoding)
    tokens = jax.sharding.reshard(found.tokens, ACT_B)
    return found, student.likelihoods(sight, read, tokens[:, None])[:, 0]
  found, words = run(module, both, prompt=prompt, real=real)
  opened = np.concatenate([prompt[:, -1:] if kind == "opt" else 0 * prompt[:, -1:], found.tokens], 1)
  mentioned = OPENS_BRACKET[opened[:, :-1]] & (DIGIT[found.tokens] >= 0)
  assert mentioned.any()
  assert kind == "t5" or mentioned[1, 0]  # over the border of prompt and text
  np.testing.assert_allclose(found.scores, words.sum(-1), rtol=1e-4)
