"""Generated texts are those of transformers' `generate`, with the same weights and settings."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from lskd_jax.models.generate import Decoding, Start, generate
from tests.lskd_jax.torch_decoders import OPT_SHAPES, continuation, left_padded, opt_pair

pytestmark = pytest.mark.usefixtures("one_device")

PROMPTS = [[5, 9, 30, 12, 44], [23, 6, 7, 50, 31, 40, 4, 19, 22], [11, 10, 9]]
TOKENS = 45
ENDS = (3, 17)

# Ours, and what transformers calls it.
SETTINGS = {
    "greedy": ({}, {}),
    "beam": (dict(beams=5), dict(num_beams=5)),
    "short": (dict(beams=4, length_penalty=-1.0), dict(num_beams=4, length_penalty=-1.0)),
    "early": (dict(beams=3, length_penalty=2.0, early_stopping=True),
              dict(num_beams=3, length_penalty=2.0, early_stopping=True)),
    "varied": (dict(repetition_penalty=1.5), dict(repetition_penalty=1.5)),
    "long": (dict(beams=3, repetition_penalty=1.3, min_tokens=9),
             dict(num_beams=3, repetition_penalty=1.3, min_new_tokens=9)),
}


def reference(model, tokens, real, **settings):
  with torch.no_grad():
    found = model.generate(torch.tensor(tokens).long(), attention_mask=torch.tensor(real).long(),
                           max_new_tokens=TOKENS, eos_token_id=list(ENDS), pad_token_id=1,
                           do_sample=False, return_dict_in_generate=True, output_scores=True,
                           **settings)
  return found.sequences[:, tokens.shape[1]:].numpy(), getattr(found, "sequences_scores", None)


@pytest.mark.parametrize("name, shape", [(name, 0) for name in SETTINGS] + [
    (name, shape) for name in ("greedy", "beam") for shape in (1, 2)])
def test_the_same_tokens_as_pytorch(name, shape):
  """For ragged prompts in one batch, over up to 45 tokens."""
  ours, theirs = SETTINGS[name]
  model, opt = opt_pair(OPT_SHAPES[shape])
  tokens, real = left_padded(PROMPTS, pad=1)
  want, scores = reference(model, tokens, real, **theirs)
  have = continuation(opt, tokens, real, Decoding(TOKENS, ends=ENDS, pad=1, **ours))
  longest = want.shape[1]
  assert longest >= 40 or name not in ("greedy", "beam")
  assert have.tokens[:, :longest].tolist() == want.tolist()
  assert (have.tokens[:, longest:] == 1).all()
  if scores is not None:
    np.testing.assert_allclose(have.scores, scores.numpy(), rtol=1e-4)


def test_a_prompt_gets_the_same_text_whatever_stands_beside_it():
  """Padding is not read, and the beams of a prompt are its own."""
  _, opt = opt_pair(OPT_SHAPES[0])
  decoding = Decoding(20, beams=3, ends=ENDS, pad=1)
  together = continuation(opt, *left_padded(PROMPTS, pad=1), decoding).tokens
  for prompt, text in zip(PROMPTS, together):
    alone = continuation(opt, *left_padded([prompt], pad=1), decoding).tokens
    assert alone.tolist() == [text.tolist()]


def drawn(logits, draws, **settings):
  """The first tokens of `draws` samples from fixed logits [V]."""
  size = len(logits)
  start = Start(jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (draws, 1, size)), (), 0,
                jnp.zeros(draws, jnp.int32))
  found = generate(lambda cache, *_: (start.logits, cache), start,
                   Decoding(1, sample=True, **settings), jax.random.key(0))
  return np.bincount(np.asarray(found.tokens)[:, 0], minlength=size) / draws


def test_samples_follow_the_probabilities():
  logits = np.log([0.5, 0.3, 0.15, 0.05])
  np.testing.assert_allclose(drawn(logits, 20_000), np.exp(logits), atol=0.015)
  hot = np.sqrt(np.exp(logits))
  np.testing.assert_allclose(drawn(logits, 20_000, temperature=2.0), hot / hot.sum(), atol=0.015)


@pytest.mark.parametrize("settings, kept", [
    (dict(top_k=2), [0, 1]),
    (dict(top_p=0.6), [0, 1]),    # 0.5 alone does not reach it
    (dict(top_p=0.4), [0]),
    (dict(top_k=3, top_p=0.9), [0, 1, 2]),
])
def test_nucleus_and_top_k_cut_the_unlikely(settings, kept):
  probabilities = np.array([0.5, 0.3, 0.15, 0.05])
  wanted = np.where(np.isin(np.arange(4), kept), probabilities, 0)
  found = drawn(np.log(probabilities), 20_000, **settings)
  np.testing.assert_allclose(found, wanted / wanted.sum(), atol=0.015)


@pytest.mark.parametrize("change, message", [
    (dict(max_tokens=0), "max_tokens=0: want 1 or more"),
    (dict(min_tokens=31), "min_tokens=31: want from 0 to max_tokens"),
    (dict(top_p=0.0), "top_p=0.0: want above 0"),
    (dict(temperature=0.0), "temperature=0.0: want above 0"),
    (dict(sample=True, beams=2), "beams=2 searches and sample=True draws"),
])
def test_settings_that_make_no_sense_are_refused(change, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(Decoding(), **change)
