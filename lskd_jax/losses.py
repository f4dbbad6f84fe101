"""The objectives, each a sum over items and the weight it must be divided by.

ITC, ITM and LM are BLIP-2's stage-1 losses (Li et al. 2023; LAVIS `blip2_qformer.py`), extended to
several statements per image: statements of one image are never each other's negatives, and in the
image-to-text direction they are all positives. Axes as in models/student.py.
"""
from collections.abc import Callable
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lskd_jax.contrast import statement_losses
from lskd_jax.models import layers
from lskd_jax.models.generative import GenerativeStudent
from lskd_jax.models.student import Sight, Student
from lskd_jax.negatives import Negatives, draw_negatives, swapped_regions
from lskd_jax.rows import fetch

QUESTION, ANSWER, RATIONALE, CAPTION = 1, 2, 3, 4  # values of the batch's `fields`


class Weighted(NamedTuple):
  """A sum and its weight; the mean is total / weight. Adds across microbatches without bias."""
  total: jax.Array
  weight: jax.Array

  def mean(self) -> jax.Array:
    return self.total / jnp.maximum(self.weight, 1e-9)


def word_weights(fields: jax.Array, question_weight: float, end_weight: float) -> jax.Array:
  """Weight of each token in the LM loss: int8[B, S, T] -> float32[B, S, T].

  Answers, rationales and captions count 1, questions `question_weight`, the token after the last of
  them, with which a text ends, `end_weight`, padding 0.
  """
  words = jnp.where(fields == QUESTION, question_weight, (fields > 0).astype(jnp.float32))
  after = jnp.pad(fields, ((0, 0), (0, 0), (1, 0)))[..., :-1] > 0
  return jnp.where(after & (fields == 0), end_weight, words)


def word_likelihoods(logits: jax.Array, tokens: jax.Array) -> jax.Array:
  """log P(token t | tokens before it): [B, S, T, V], int32[B, S, T] -> float32[B, S, T].

  Entry t belongs to token t, predicted at position t - 1; entry 0 is 0.
  """
  chosen, total = _next_word(logits.astype(jnp.float32), tokens)
  return jnp.pad((chosen - total)[:, :, :-1], ((0, 0), (0, 0), (1, 0)))


def _next_word(logits, tokens):
  """The logit of the token after each position and the log-sum-exp there, float32[B, S, T] each.

  The last position has none after it, and what stands there means nothing: cutting it off the
  logits would copy them all. A sum picks the logit, because the gradient of a gather is a scatter.
  """
  following = jnp.roll(tokens, -1, -1)[..., None]
  is_next = jnp.arange(logits.shape[-1]) == following
  return jnp.where(is_next, logits, 0).sum(-1), jax.nn.logsumexp(logits, -1)


def lm_loss(logits: jax.Array, tokens: jax.Array, weights: jax.Array,
            smoothing: float) -> tuple[Weighted, jax.Array]:
  """Next-token cross-entropy with label smoothing, weighted per token of the text (ITG).

  Returns the loss, and bool[B, S, T - 1]: whether each token but the first is the likeliest one.
  """
  logits = logits.astype(jnp.float32)
  chosen, total = _next_word(logits, tokens)
  loss = total - chosen
  if smoothing:
    loss = (1 - smoothing) * loss + smoothing * (total - logits.mean(-1))
  weights = weights[:, :, 1:]
  right = chosen >= jax.lax.stop_gradient(logits).max(-1)
  return Weighted((loss[:, :, :-1] * weights).sum(), weights.sum()), right[:, :, :-1]


def words_loss_of(student: Student, states: jax.Array, tokens: jax.Array, weights: jax.Array,
                  smoothing: float) -> tuple[Weighted, jax.Array]:
  """`lm_loss` of the words that a student predicts from `write_states`.

  With `qformer.remat="full"` one statement of each image at a time, and nothing of size V is kept: the logits
  of all statements are the step's largest array (28 images x 4 x 128 tokens x 30523 words: 1.75 GB).
  """
  head = student.language_head
  if student.config.qformer.remat != "full":
    return lm_loss(head(states, student.qformer.words[...]), tokens, weights, smoothing)
  words = layers.whole(student.qformer.words[...], student.qformer.dtype)

  @jax.checkpoint
  def statement(rows):
    states, tokens, weights = (row[:, None] for row in rows)
    return lm_loss(head.logits(states, words), tokens, weights, smoothing)
  rows = (head.transform(states), tokens, weights)
  loss, right = jax.lax.map(statement, tuple(row.swapaxes(0, 1) for row in rows))
  return jax.tree.map(lambda part: part.sum(0), loss), right[:, :, 0].swapaxes(0, 1)


def answers_right(right: jax.Array, fields: jax.Array, valid: jax.Array) -> Weighted:
  """Next-token accuracy in answers: bool[B, S, T - 1] of `lm_loss`, int8[B, S, T], bool[B, S]."""
  asked = (fields[:, :, 1:] == ANSWER) & valid[..., None]
  return Weighted((right & asked).sum(), asked.sum())


def itc_loss(image: jax.Array, text: jax.Array, batch: dict, temperature, weights: dict) -> Weighted:
  """Image-text contrast over the global batch: `contrast.statement_losses` of the statements that exist."""
  valid = batch["statement_valid"]
  loss = statement_losses(image, text, batch["image_id"], valid, temperature, weights["smoothing"],
                          weights["detach_gathered"], weights["itc_block"])
  return Weighted((loss * valid).sum(), valid.sum())


def itm_loss(logits: jax.Array, label: int, weights: jax.Array) -> tuple[Weighted, Weighted]:
  """Cross-entropy of float32[B, S, 2] against `label`, and the accuracy, over weights [B, S]."""
  loss = -jax.nn.log_softmax(logits)[..., label]
  right = (jnp.argmax(logits, -1) == label) * weights
  return Weighted((loss * weights).sum(), weights.sum()), Weighted(right.sum(), weights.sum())


class Objective(NamedTuple):
  """What a step learns, in four stages, so that a batch can be divided though its rows need each other.

  look(model, rows) -> rows, with what the ViT makes of their images: `features` [B, N, C].
  read(model, rows, key) -> embeddings, context: a pytree of [B, ...], all that rows learn of each other, and
    anything that `within` needs of the same rows.
  across(model, embeddings, batch, key) -> losses, rows: what needs the whole batch, and more entries of the
    batch, such as negatives, that come of it.
  within(model, rows, context, key) -> losses, metrics: what each row learns by itself.

  Losses and metrics are {name: Weighted}.
  """
  look: Callable
  read: Callable
  across: Callable
  within: Callable

  def __call__(self, model, batch: dict, key) -> tuple[dict, dict]:
    """The losses and metrics of a batch that is not divided."""
    batch = self.look(model, batch)
    embeddings, context = self.read(model, batch, key)
    losses, rows = self.across(model, embeddings, batch, key)
    more, metrics = self.within(model, batch | rows, context, key)
    return losses | more, metrics


def row_by_row(loss: Callable) -> Objective:
  """The objective of a loss (model, batch, key) -> losses, metrics whose rows do not need each other."""
  return Objective(look=lambda model, rows: rows, read=lambda model, rows, key: ((), None),
                   across=lambda model, embeddings, batch, key: ({}, {}),
                   within=lambda model, rows, context, key: loss(model, rows, key))


def student_objective(weights: dict, negatives: Negatives | None = None) -> Objective:
  """The stage-1 losses; arguments as of `student_loss`."""
  return Objective(_look, functools.partial(_read, weights=weights),
                   functools.partial(_across, weights=weights, negatives=negatives),
                   functools.partial(_within, weights=weights))


def student_loss(student: Student, batch: dict, weights: dict, key,
                 negatives: Negatives | None = None) -> tuple[dict, dict]:
  """The stage-1 losses of a batch.

  Args:
    batch: as the loader gives it, on the device, with `features` [B, N, C] or `image`.
    weights: the config's `loss`: `itc`, `itm`, `lm` (0 leaves a loss out), `region_swap` (weight of those
      negatives in ITM), `question` (weight of a question's tokens in LM), `smoothing`, `detach_gathered`
      (ITC's gradient reaches the image in image-to-text and the text in text-to-image alone), `itc_block`
      (images whose statements are compared at a time, 0 = all), `pool` (rows among which ITM's negatives are
      drawn, 0 = all).
    key: PRNG key of this step: negatives and dropout.
    negatives: ITM's hard negatives; None draws them.

  Returns:
    {loss name: Weighted}, {metric name: Weighted}.
  """
  return student_objective(weights, negatives)(student, batch, key)


# Numbers folded into a step's key: 0, 1, 2, 4, 5 and 6 for the dropout of a pass, 3 for all draws.
def _dropout(student: Student, key, number: int):
  return jax.random.fold_in(key, number) if student.config.qformer.dropout else None


def _look(student: Student, rows: dict) -> dict:
  return rows if "features" in rows else rows | {"features": student.vit(rows["image"])}


def _read(student: Student, rows: dict, key, weights: dict):
  sight = student.see(rows["features"], rows["boxes"], rows["region_valid"])
  states, cache = student.read_image(sight, _dropout(student, key, 0))
  embeddings = {}
  if weights["itc"] or weights["itm"]:
    embeddings = {"image": student.embed_image(states),
                  "text": student.embed_text(rows["tokens"], _dropout(student, key, 2))}
  return embeddings, (sight, cache)


def _across(student: Student, embeddings: dict, batch: dict, key, weights: dict, negatives):
  losses, rows = {}, {}
  if weights["itc"]:
    losses["itc"] = itc_loss(**embeddings, batch=batch, temperature=student.temperature(), weights=weights)
  if weights["itm"]:
    *keys, swap_key = jax.random.split(jax.random.fold_in(key, 3), 3)
    if negatives is None:
      negatives = draw_negatives(student, batch, **embeddings, keys=keys, pool=weights["pool"],
                                 block=weights["itc_block"])
    rows = shown_rows(batch, negatives, weights["pool"])
    if weights["region_swap"] and student.config.uses_region_tokens:
      swapped, possible = swapped_regions(batch["boxes"], batch["region_valid"], swap_key)
      rows |= {"swapped_boxes": swapped, "can_swap": possible}
  return losses, rows


def _within(student: Student, rows: dict, context, key, weights: dict):
  sight, cache = context
  losses, metrics = {}, {}
  if weights["lm"]:
    valid = rows["statement_valid"]
    written = student.write_states(sight, cache, rows["tokens"], _dropout(student, key, 1))
    per_word = word_weights(rows["fields"], weights["question"], weights["end"]) * valid[..., None]
    losses["lm"], right = words_loss_of(student, written, rows["tokens"], per_word, weights["smoothing"])
    metrics["answer_words_right"] = answers_right(right, rows["fields"], valid)
  if weights["itm"]:
    keys = [_dropout(student, key, number) for number in (4, 5, 6)]
    kinds = itm_rows(student, rows, sight, weights, keys)
    losses["itm"] = Weighted(*(sum(loss[i] for loss, _ in kinds.values()) for i in (0, 1)))
    metrics |= {f"itm_{name}_right": right for name, (_, right) in kinds.items()}
  return losses, metrics


def shown_rows(batch: dict, negatives: Negatives, pool: int) -> dict:
  """Each row's negatives: other_features, other_boxes, other_region_valid, other_tokens, has_image, has_text.

  The ViT's output is exchanged as it is, before ln_vision and all that follows, and no gradient travels back:
  a ViT that is trained learns nothing from the negatives that it saw.
  """
  size, texts, length = batch["tokens"].shape
  take = lambda rows, at: fetch(rows, at, size, pool)
  names = ("features", "boxes", "region_valid")
  rows = {f"other_{name}": take(batch[name], negatives.image) for name in names}
  rows["other_tokens"] = take(layers.reshape(batch["tokens"], size * texts, length), negatives.text)
  return rows | {"has_image": negatives.has_image, "has_text": negatives.has_text}


def itm_rows(student: Student, rows: dict, sight: Sight, weights: dict, keys) -> dict:
  """The ITM loss: matches, hard negatives both ways, and region-swap negatives.

  Region vectors always come from the image a text is paired with.

  Args:
    rows: a batch with what `shown_rows` returns, and for region swaps swapped_boxes and can_swap.
    keys: of the dropout of three passes, or None each.

  Returns:
    {name: (loss, accuracy)}.
  """
  tokens = rows["tokens"]
  texts = tokens.shape[1]
  real = rows["statement_valid"].astype(jnp.float32)
  # One pass for all texts that an image is shown: its own and those of others.
  logits = student.match(sight, jnp.concatenate([tokens, rows["other_tokens"]], 1), keys[0])
  kinds = {"match": itm_loss(logits[:, :texts], 1, real),
           "other_text": itm_loss(logits[:, texts:], 0, real * rows["has_text"])}
  other_sight = student.see(*(rows[f"other_{name}"] for name in ("features", "boxes", "region_valid")),
                            once=True)
  kinds["other_image"] = itm_loss(student.match(other_sight, tokens, keys[1]), 0,
                                  real * rows["has_image"][:, None])
  if "swapped_boxes" in rows:
    swapped = student.see(rows["features"], rows["swapped_boxes"], rows["region_valid"], once=True)
    mentions = (student.slots(tokens) >= 0).any(-1)
    kinds["region_swap"] = itm_loss(student.match(swapped, tokens, keys[2]), 0,
                                    real * mentions * rows["can_swap"][:, None] * weights["region_swap"])
  return kinds


def generative_loss(student: GenerativeStudent, batch: dict, weights: dict, key) -> tuple[dict, dict]:
  """The language-model loss of a generative student (BLIP-2's second stage, LSKD's prefix LM).

  Cross-entropy of answers, rationales and captions and of the end of a text, given the image and what
  stands before: the question is a prefix. A text that was cut has no end to learn.

  Args:
    batch: as in `student_loss`.
    weights: `question` (weight of a question's tokens; T5 reads them only), `end`, `smoothing`.
    key: PRNG key of this step, for dropout.

  Returns:
    {"lm": Weighted}, {metric name: Weighted}.
  """
  features = batch["features"] if "features" in batch else student.vit(batch["image"])
  sight = student.see(features, batch["boxes"], batch["region_valid"])
  image = student.read_image(sight, key if student.config.qformer.dropout else None)
  logits, tokens, fields, _ = student.teach(sight, image, batch["tokens"], batch["fields"])
  valid = batch["statement_valid"]
  per_word = word_weights(fields, weights["question"], weights["end"])
  cut = (fields == 0) & (tokens != student.decoder.config.end)
  per_word = jnp.where(cut, 0, per_word) * valid[..., None]
  loss, right = lm_loss(logits, tokens, per_word, weights["smoothing"])
  return {"lm": loss}, {"answer_words_right": answers_right(right, fields, valid)}


def words_loss(tagger, batch: dict, absent: int) -> tuple[dict, dict]:
  """Binary cross-entropy of every vocabulary word against the words of captions and descriptions.

  The words of a caption are those of the whole picture; the words that follow a mention in a
  description are those of its region. Only places with a text count. Ids below `absent` (special
  tokens) are no words.
  """
  logits = tagger(batch["image"], batch["boxes"], batch["region_valid"])[..., absent:]
  tokens, regions = batch["tokens"], batch["boxes"].shape[1]
  real = (tokens >= absent) & batch["statement_valid"][..., None]
  place = jax.nn.one_hot(jnp.where(real, tagger.places(tokens, regions), -1), regions + 1)
  word = jax.nn.one_hot(tokens, logits.shape[-1] + absent)[..., absent:]
  present = (jnp.einsum("bstr,bstv->brv", place, word) > 0).astype(jnp.float32)
  loss = -(present * jax.nn.log_sigmoid(logits) + (1 - present) * jax.nn.log_sigmoid(-logits))
  described = present.max(-1)
  return {"words": Weighted((loss.mean(-1) * described).sum(), described.sum())}, {}


def critic_loss(critic, batch: dict, key) -> tuple[dict, dict]:
  """Cross-entropy of accept, and half the squared error of each auxiliary head (LSKD critic).

  The batch carries the judgements: accept int32[B, S], answer_score and rationale_score
  float32[B, S]; each auxiliary head has its own target.
  """
  logits, answer, rationale = critic(batch, key)
  valid = batch["statement_valid"].astype(jnp.float32)
  loss = -jnp.take_along_axis(jax.nn.log_softmax(logits), batch["accept"][..., None], -1)[..., 0]
  squared = (answer - batch["answer_score"])**2, (rationale - batch["rationale_score"])**2
  weighted = lambda x: Weighted((x * valid).sum(), valid.sum())
  losses = {"accept": weighted(loss), "answer": weighted(0.5 * squared[0]),
            "rationale": weighted(0.5 * squared[1])}
  right = (jnp.argmax(logits, -1) == batch["accept"]).astype(jnp.float32)
  return losses, {"accept_right": weighted(right)}
