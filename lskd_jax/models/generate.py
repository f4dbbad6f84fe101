"""Generation: greedy, beam search and sampling, each one jitted loop of static shapes.

The results are those of transformers' `generate` with the same weights and settings (its
`_beam_search`, `_sample` and logits processors define the details). A loop knows nothing of the model
but a `write` function; beams share the past they have in common through `lineage`
(decoders/attention.py), so nothing is copied when beams are reordered.
Axes: B prompts, S beams, G places (tokens that may be generated), V vocabulary.
"""
from collections.abc import Callable
import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import reshard

from lskd_jax.parallel import ACT_B, REPLICATED

NEVER = -1e9  # the score of what must not be chosen, as in transformers


@dataclasses.dataclass(frozen=True)
class Decoding:
  """How to generate; the defaults are greedy.

  ends: ids of which each ends a text. pad: id that fills the places after an end.
  length_penalty: beams are ranked by their log-likelihood / length^length_penalty.
  early_stopping: a beam search ends when it has found as many texts as it has beams; without it, when
    no running beam can become better.
  repetition_penalty: divides the scores of tokens seen in prompt or text (Keskar et al. 2019).
  sample: draw tokens, from the top_k likeliest (0 = all) of the smallest set whose probability
    reaches top_p (nucleus sampling, Holtzman et al. 2020), at a temperature.
  """
  max_tokens: int = 30
  min_tokens: int = 0
  beams: int = 1
  length_penalty: float = 1.0
  early_stopping: bool = False
  repetition_penalty: float = 1.0
  sample: bool = False
  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0
  ends: tuple[int, ...] = ()
  pad: int = 0

  def __post_init__(self):
    wanted = [("max_tokens", self.max_tokens >= 1, "1 or more"),
              ("min_tokens", 0 <= self.min_tokens <= self.max_tokens, "from 0 to max_tokens"),
              ("beams", self.beams >= 1, "1 or more"),
              ("repetition_penalty", self.repetition_penalty > 0, "above 0"),
              ("temperature", self.temperature > 0, "above 0"),
              ("top_k", self.top_k >= 0, "0 (= all) or more"),
              ("top_p", 0 < self.top_p <= 1, "above 0, and 1 at most")]
    for name, fits, text in wanted:
      if not fits:
        raise ValueError(f"{name}={getattr(self, name)}: want {text}")
    if self.sample and self.beams > 1:
      raise ValueError(f"beams={self.beams} searches and sample=True draws: choose one of them")


class Start(NamedTuple):
  """Where a generation starts: what `write` said and kept of the prompts' last tokens.

  logits: float32[B, S, V], equal for all S; cache: as `write` takes it, places 0 … taken; place: how
  many. last: int32[B], the token before the first generated one. seen: bool[B, V], the tokens of the
  prompts, for the repetition penalty; None = none.
  """
  logits: jax.Array
  cache: Any
  place: int
  last: jax.Array
  seen: jax.Array | None = None


class Prompted(NamedTuple):
  """Prompts that a model has read, all but the token that is written first.

  memory: of what was read, as the model's `write` takes it. first: int32[B], the prompt's last token,
  or the model's own start token. before: int32[B], the token before it. seen: bool[B, V], the
  prompts' tokens, for the repetition penalty.
  """
  memory: Any
  first: jax.Array
  before: jax.Array
  seen: jax.Array


class Generated(NamedTuple):
  """tokens: int32[B, G], ends included, then padding. scores: float32[B], the log-likelihood of each
  text, with beams divided by length^length_penalty; 0 where tokens were drawn."""
  tokens: jax.Array
  scores: jax.Array


def prompted(memory, tokens: jax.Array, vocabulary: int) -> Prompted:
  """Prompts int32[B, P] of which the model has read all but the last token."""
  first = tokens[:, -1]
  before = tokens[:, -2] if tokens.shape[1] > 1 else jnp.zeros_like(first)
  return Prompted(memory, first, before, jax.nn.one_hot(tokens, vocabulary, dtype=bool).any(1))


def generate_after(write: Callable, cache, prompts: Prompted, decoding: Decoding, key=None) -> Generated:
  """One text after each prompt; `write` as in `generate`, `cache` empty."""
  shape = (prompts.first.shape[0], decoding.beams)
  first, before = (jnp.broadcast_to(x[:, None], shape, out_sharding=ACT_B)
                   for x in (prompts.first, prompts.before))
  logits, cache = write(cache, first, before, 0, None)
  return generate(write, Start(logits, cache, 1, prompts.first, prompts.seen), decoding, key)


def generate(write: Callable, start: Start, decoding: Decoding, key=None) -> Generated:
  """Texts that follow the prompts.

  Args:
    write: (cache, tokens int32[B, S], before int32[B, S], place, lineage) -> (logits float32[B, S, V],
      cache): writes one token of every row at `place`; `before` are the tokens before them, which a
      mention needs. lineage: bool[B, S, place + G, S] or None.
    key: of the draws; needed with decoding.sample.
  """
  if decoding.sample and key is None:
    raise ValueError("sample=True needs a key")
  def whole(cache, *arguments):
    """`write` on every device's rows; the bookkeeping of a loop is small, and whole on all devices."""
    tokens, before, place, lineage = arguments
    spread = [x if x is None else reshard(x, ACT_B) for x in (tokens, before, lineage)]
    logits, cache = write(cache, *spread[:2], place, spread[2])
    return reshard(logits, REPLICATED), cache
  logits, last, seen = (x if x is None else reshard(x, REPLICATED)
                        for x in (start.logits, start.last, start.seen))
  start = start._replace(logits=logits, last=last, seen=seen)
  if decoding.beams > 1:
    return _search(whole, start, decoding)
  return _follow(whole, start, decoding, key)


def _follow(write: Callable, start: Start, decoding: Decoding, key) -> Generated:
  """Greedy or sampled: one row per prompt."""
  batch = start.logits.shape[0]

  def choose(n, logits, state):
    scores = _processed(logits[:, 0], state["seen"], n, decoding)
    if decoding.sample:
      chosen = jax.random.categorical(jax.random.fold_in(key, n), _kept(scores, decoding))
      gain = 0.0
    else:
      chosen = jnp.argmax(scores, -1)
      gain = jnp.take_along_axis(jax.nn.log_softmax(scores), chosen[:, None], -1)[:, 0]
    done = state["done"]
    chosen = jnp.where(done, decoding.pad, chosen).astype(jnp.int32)
    return {
        "tokens": jax.lax.dynamic_update_slice(state["tokens"], chosen[:, None], (0, n)),
        "scores": state["scores"] + jnp.where(done, 0, gain),
        "done": done | _ends(chosen, decoding),
        "seen": _add_seen(state["seen"], chosen),
        "before": state["last"], "last": chosen}

  def step(carry):
    n, state, cache = carry
    logits, cache = write(cache, state["last"][:, None], state["before"][:, None], start.place + n - 1,
                          None)
    return n + 1, choose(n, logits, state), cache

  nothing = jnp.zeros_like(start.last)
  state = {"tokens": jnp.full((batch, decoding.max_tokens), decoding.pad, jnp.int32),
           "scores": jnp.zeros(batch), "done": nothing > 0, "seen": _seen(start, decoding),
           "before": start.last, "last": start.last}
  state = choose(0, start.logits, state)
  more = lambda carry: (carry[0] < decoding.max_tokens) & ~carry[1]["done"].all()
  _, state, _ = jax.lax.while_loop(more, step, (1, state, start.cache))
  return Generated(state["tokens"], state["scores"])


def _search(write: Callable, start: Start, decoding: Decoding) -> Generated:
  """Beam search: S running beams of every prompt, and the best S finished texts so far."""
  batch, beams, size = start.logits.shape
  places, most = start.place + decoding.max_tokens, decoding.max_tokens
  kept = max(2, 1 + len(decoding.ends)) * beams

  def choose(n, logits, state):
    scores = _processed(jax.nn.log_softmax(logits), state["seen"], n, decoding)
    scores = scores + state["scores"][..., None]
    # The best of all beams are among the best of each.
    each, token = jax.lax.top_k(scores, min(kept, size))
    best, at = jax.lax.top_k(each.reshape(batch, -1), kept)
    parent, token = at // each.shape[-1], jnp.take_along_axis(token.reshape(batch, -1), at, 1)
    texts = jnp.take_along_axis(state["tokens"], parent[..., None], 1)
    texts = jax.lax.dynamic_update_slice(texts, token[..., None], (0, 0, n))
    ended = _ends(token, decoding) | (n + 1 == most)

    # Running beams: the best that have not ended.
    running, chosen = jax.lax.top_k(best + NEVER * ended, beams)
    pick = lambda values: jnp.take_along_axis(
        values, chosen.reshape(*chosen.shape, *(1,) * (values.ndim - 2)), 1)
    token, parent = pick(token), pick(parent)
    new = dict(state, tokens=pick(texts), scores=running, last=token,
               before=jnp.take_along_axis(state["last"], parent, 1))
    lineage = jnp.take_along_axis(state["lineage"], parent[..., None, None], 1)
    own = jnp.broadcast_to(jnp.eye(beams, dtype=bool)[None, :, None], (batch, beams, 1, beams))
    # A row's next token stands at its own place; its past is its parent's.
    new["lineage"] = jax.lax.dynamic_update_slice(lineage, own, (0, 0, start.place + n, 0))
    if state["seen"] is not None:
      new["seen"] = _add_seen(jnp.take_along_axis(state["seen"], parent[..., None], 1), token)

    # Finished texts: only the first S candidates may become one.
    ending = ended & (jnp.arange(kept) < beams)
    full = state["finished"].all(-1, keepdims=True) & decoding.early_stopping
    value = best / jnp.float32(n + 1)**decoding.length_penalty
    value += NEVER * full + NEVER * ~state["open"] + NEVER * ~ending
    merged = jnp.concatenate([state["values"], value], 1)
    new["values"], chosen = jax.lax.top_k(merged, beams)
    new["texts"] = jnp.take_along_axis(jnp.concatenate([state["texts"], texts], 1),
                                       chosen[..., None], 1)
    new["finished"] = jnp.take_along_axis(jnp.concatenate([state["finished"], ending], 1), chosen, 1)

    # Whether a running beam can still become better than the worst finished text.
    hope = running[:, :1] / jnp.float32(n + 1)**decoding.length_penalty
    worst = jnp.where(new["finished"], new["values"].min(1, keepdims=True), NEVER)
    new["open"] = state["open"] & (hope > worst).any(-1, keepdims=True)
    new["more"] = (new["open"].any() & ~(new["finished"].all() & decoding.early_stopping)
                   & ~ended.all())
    return new

  def step(carry):
    n, state, cache = carry
    logits, cache = write(cache, state["last"], state["before"], start.place + n - 1,
                          state["lineage"])
    return n + 1, choose(n, logits, state), cache

  texts = jnp.full((batch, beams, most), decoding.pad, jnp.int32)
  last = jnp.broadcast_to(start.last[:, None], (batch, beams))
  seen = _seen(start, decoding)
  eye = jnp.broadcast_to(jnp.eye(beams, dtype=bool)[None, :, None], (batch, beams, places, beams))
  state = {
      "tokens": texts, "texts": texts, "last": last, "before": last, "lineage": eye,
      "seen": None if seen is None else jnp.broadcast_to(seen[:, None], (batch, beams, size)),
      "scores": jnp.where(jnp.arange(beams) == 0, 0.0, NEVER) + jnp.zeros((batch, 1)),
      "values": jnp.full((batch, beams), NEVER), "finished": jnp.zeros((batch, beams), bool),
      "open": jnp.ones((batch, 1), bool), "more": jnp.array(True)}
  state = choose(0, start.logits, state)
  _, state, _ = jax.lax.while_loop(lambda carry: carry[1]["more"], step, (1, state, start.cache))
  return Generated(state["texts"][:, 0], state["values"][:, 0])


def _processed(scores: jax.Array, seen, n, decoding: Decoding) -> jax.Array:
  """Scores [..., V] of the n-th token with the repetition penalty and the minimum length."""
  if seen is not None:
    penalty = decoding.repetition_penalty
    scores = jnp.where(seen, jnp.where(scores < 0, scores * penalty, scores / penalty), scores)
  if decoding.min_tokens and decoding.ends:
    ends = jnp.isin(jnp.arange(scores.shape[-1]), jnp.array(decoding.ends))
    scores = jnp.where(ends & (n < decoding.min_tokens), -jnp.inf, scores)
  return scores


def _kept(scores: jax.Array, decoding: Decoding) -> jax.Array:
  """Scores [B, V] at the temperature, -inf outside the top_k and the nucleus."""
  scores = scores / decoding.temperature
  if decoding.top_k:
    least = jax.lax.top_k(scores, min(decoding.top_k, scores.shape[-1]))[0][:, -1:]
    scores = jnp.where(scores < least, -jnp.inf, scores)
  if decoding.top_p < 1:
    order = jnp.argsort(scores, -1)
    below = jnp.cumsum(jax.nn.softmax(jnp.take_along_axis(scores, order, -1)), -1)
    out = (below <= 1 - decoding.top_p).at[:, -1].set(False)
    rank = jnp.argsort(order, -1)
    scores = jnp.where(jnp.take_along_axis(out, rank, -1), -jnp.inf, scores)
  return scores


def _ends(tokens: jax.Array, decoding: Decoding) -> jax.Array:
  if not decoding.ends:
    return jnp.zeros(tokens.shape, bool)
  return jnp.isin(tokens, jnp.array(decoding.ends))


def _seen(start: Start, decoding: Decoding):
  """bool[B, V] where there is a repetition penalty, else None: nothing to keep."""
  if decoding.repetition_penalty == 1:
    return None
  batch, _, size = start.logits.shape
  return jnp.zeros((batch, size), bool) if start.seen is None else start.seen


def _add_seen(seen, tokens: jax.Array):
  return None if seen is None else seen | jax.nn.one_hot(tokens, seen.shape[-1], dtype=bool)
