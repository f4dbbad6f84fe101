"""The objectives, each a sum over items and the weight it must be divided by.

ITC, ITM and LM are BLIP-2's stage-1 losses (Li et al. 2023; LAVIS `blip2_qformer.py`), extended to
several statements per image: statements of one image are never each other's negatives, and in the
image-to-text direction they are all positives. Axes as in models/student.py.
"""
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import reshard

from lskd_jax.models import layers
from lskd_jax.models.generative import GenerativeStudent
from lskd_jax.models.student import Sight, Student
from lskd_jax.parallel import ACT_B, REPLICATED

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


def similarity(image: jax.Array, text: jax.Array) -> jax.Array:
  """max over queries of the cosine: float32[B, Q, E], [C, S, E] -> float32[B, C, S]."""
  return jnp.einsum("bqe,cse->bqcs", image, reshard(text, REPLICATED)).max(1)


def itc_loss(image_to_text: jax.Array, text_to_image: jax.Array, image_id: jax.Array, valid: jax.Array,
             temperature, smoothing: float) -> Weighted:
  """Image-text contrast over the global batch, both directions averaged.

  Args:
    image_to_text, text_to_image: float32[B, B, S], `similarity` of image b with statement s of image
      c, for each direction: equal numbers, which may differ in where their gradients go.
    image_id: int32[B]; rows of one image are not each other's negatives.
    valid: bool[B, S] statements that exist.

  With one statement per image and distinct images this is LAVIS's loss: cross-entropy against
  (1 - smoothing) one-hot + smoothing / N.
  """
  ids = reshard(image_id, REPLICATED)
  other = (image_id[:, None] != ids[None])[..., None] & reshard(valid, REPLICATED)[None]
  own = jnp.arange(len(image_id))[:, None] == jnp.arange(len(image_id))[None]

  def cross_entropy(scores, axes, per_statement):
    """Of the positives, float32[B, S], among the other entries along `axes`."""
    logits = scores / temperature
    positive = jnp.where(own[..., None], logits, 0).sum(1)  # image b with its own statements
    negatives = jax.nn.logsumexp(jnp.where(other, logits, -1e9), axis=axes)
    counts = 1 + per_statement(other.sum(axes))
    smooth = (positive + per_statement(jnp.where(other, logits, 0).sum(axes))) / counts
    total = jnp.logaddexp(positive, per_statement(negatives))
    return total - (1 - smoothing) * positive - smoothing * smooth

  # The statement against all statements of other images; the image against all other images.
  loss = cross_entropy(image_to_text, (1, 2), lambda rows: rows[:, None])
  loss += cross_entropy(text_to_image, 0, lambda columns: reshard(columns, ACT_B))
  return Weighted((loss / 2 * valid).sum(), valid.sum())


def itm_loss(logits: jax.Array, label: int, weights: jax.Array) -> tuple[Weighted, Weighted]:
  """Cross-entropy of float32[B, S, 2] against `label`, and the accuracy, over weights [B, S]."""
  loss = -jax.nn.log_softmax(logits)[..., label]
  right = (jnp.argmax(logits, -1) == label) * weights
  return Weighted((loss * weights).sum(), weights.sum()), Weighted(right.sum(), weights.sum())


def draw(scores: jax.Array, allowed: jax.Array, key) -> tuple[jax.Array, jax.Array]:
  """One index of the last axis, with probability softmax(scores) over the allowed ones.

  Returns the indices and whether anything was allowed. Hard negatives are drawn with it: all rows
  at once, inside jit.
  """
  choice = jax.random.categorical(key, jnp.where(allowed, scores, -1e9), axis=-1)
  return choice, allowed.any(-1)


def swapped_regions(boxes: jax.Array, valid: jax.Array, key) -> tuple[jax.Array, jax.Array]:
  """The boxes of each image handed to other slots: the negatives that only pointing can tell.

  A random cyclic shift in a random order of the valid slots, so that no valid slot keeps its box.

  Returns:
    boxes float32[B, R, 4], and bool[B]: whether the image has two regions to swap.
  """
  batch, slots = valid.shape
  noise = jax.random.uniform(key, (batch, slots), out_sharding=ACT_B)
  order = jnp.argsort(jnp.where(valid, noise, 2.0), axis=1)        # valid slots first, shuffled
  count = valid.sum(1)
  place = jnp.arange(slots)[None]
  following = jnp.where(place + 1 < count[:, None], place + 1, 0)  # the next of the cycle
  source = jnp.take_along_axis(order, following, axis=1)
  # order[p] receives the box of order[p + 1]; slots without a region keep what they have.
  is_target = jax.nn.one_hot(order, slots, dtype=boxes.dtype)
  is_target = is_target * (place < count[:, None])[..., None]
  moved = jnp.take_along_axis(boxes, source[..., None], axis=1)
  received = jnp.einsum("bpr,bpc->brc", is_target, moved)
  return jnp.where(valid[..., None], received, boxes), count >= 2


def mentions_fit(slots: jax.Array, valid: jax.Array) -> jax.Array:
  """Whether all regions a text mentions exist in an image: int32[C, S, T], bool[B, R] -> [B, C, S].

  A negative that mentions a region its image lacks would betray itself.
  """
  mentioned = jax.nn.one_hot(reshard(slots, REPLICATED), valid.shape[1], dtype=jnp.float32).max(2)
  return jnp.einsum("csr,br->bcs", mentioned, (~valid).astype(jnp.float32)) == 0


class Negatives(NamedTuple):
  """The hard negatives of ITM.

  image: int32[B], the row whose image the statements of each row are shown.
  text: int32[B, S], the statements that each image is shown, numbered row * S + statement.
  has_image, has_text: bool[B], bool[B, S], whether there was one to show.
  """
  image: jax.Array
  text: jax.Array
  has_image: jax.Array
  has_text: jax.Array


def draw_negatives(student: Student, batch: dict, scores, image_key, text_key) -> Negatives:
  """Negatives in proportion to exp(scores), float32[B, B, S] as of `similarity`.

  One other image per row for its statements, and S statements of other images for its image, such
  that every region a statement mentions exists in the image it is shown.
  """
  tokens, valid = batch["tokens"], batch["statement_valid"]
  other = batch["image_id"][:, None] != reshard(batch["image_id"], REPLICATED)[None]
  fits = mentions_fit(student.slots(tokens), batch["region_valid"])
  if not student.config.uses_region_tokens:
    fits = jnp.ones_like(fits)
  # Statements of image c shown another image b: needs an image with all the regions they mention.
  needed = (fits | ~reshard(valid, REPLICATED)[None]).all(2)
  by_text = (scores * reshard(valid, REPLICATED)[None]).sum(2)
  image, has_image = draw(reshard(by_text.T, ACT_B), reshard((other & needed).T, ACT_B), image_key)
  # The image shown statements of others.
  size, texts, _ = tokens.shape
  wide = (size, texts, size, texts)
  spread = lambda rows: layers.reshape(
      jnp.broadcast_to(rows[:, None], wide, out_sharding=ACT_B), size, texts, size * texts)
  allowed = other[..., None] & fits & reshard(valid, REPLICATED)[None]
  text, has_text = draw(spread(scores), spread(allowed), text_key)
  return Negatives(image, text, has_image, has_text)


def itm_rows(student: Student, features, batch: dict, sight: Sight, negatives: Negatives, weights,
             keys):
  """The ITM loss of one batch: matches, hard negatives both ways, and region-swap negatives.

  Region vectors always come from the image a text is paired with. Returns {name: (loss, accuracy)}.
  """
  tokens = batch["tokens"]
  texts = tokens.shape[1]
  real = batch["statement_valid"].astype(jnp.float32)
  take = lambda rows, at: reshard(rows, REPLICATED).at[at].get(out_sharding=ACT_B)
  # One pass for all texts that an image is shown: its own and those of others.
  others = take(reshard(tokens, REPLICATED).reshape(-1, tokens.shape[-1]), negatives.text)
  logits = student.match(sight, jnp.concatenate([tokens, others], 1), keys[0])
  rows = {"match": itm_loss(logits[:, :texts], 1, real),
          "other_text": itm_loss(logits[:, texts:], 0, real * negatives.has_text)}
  other_sight = student.see(*(take(rows, negatives.image) for rows in
                              (features, batch["boxes"], batch["region_valid"])), once=True)
  rows["other_image"] = itm_loss(student.match(other_sight, tokens, keys[2]), 0,
                                 real * negatives.has_image[:, None])
  if weights["region_swap"] and student.config.uses_region_tokens:
    boxes, possible = swapped_regions(batch["boxes"], batch["region_valid"], keys[5])
    swapped = student.see(features, boxes, batch["region_valid"], once=True)
    mentions = (student.slots(tokens) >= 0).any(-1)
    rows["region_swap"] = itm_loss(student.match(swapped, tokens, keys[6]), 0,
                                   real * mentions * possible[:, None] * weights["region_swap"])
  return rows


def student_loss(student: Student, batch: dict, weights: dict, key,
                 negatives: Negatives | None = None) -> tuple[dict, dict]:
  """The stage-1 losses of a batch.

  Args:
    batch: as the loader gives it, on the device, with `features` [B, N, C] or `image`.
    weights: `itc`, `itm`, `lm` (0 leaves a loss out), `region_swap` (weight of those negatives in
      ITM), `question` (weight of a question's tokens in LM), `smoothing`, `detach_gathered` (ITC's
      gradient reaches the image in image-to-text and the text in text-to-image alone).
    key: PRNG key of this step: negatives and dropout.
    negatives: ITM's hard negatives; None draws them.

  Returns:
    {loss name: Weighted}, {metric name: Weighted}.
  """
  features = batch["features"] if "features" in batch else student.vit(batch["image"])
  tokens, valid = batch["tokens"], batch["statement_valid"]
  train = key if student.config.qformer.dropout else None
  keys = [None if train is None else jax.random.fold_in(train, i) for i in range(3)]
  sight = student.see(features, batch["boxes"], batch["region_valid"])
  states, cache = student.read_image(sight, keys[0])
  losses, metrics = {}, {}
  if weights["lm"]:
    written = student.write_states(sight, cache, tokens, keys[1])
    per_word = word_weights(batch["fields"], weights["question"], weights["end"]) * valid[..., None]
    losses["lm"], right = words_loss_of(student, written, tokens, per_word, weights["smoothing"])
    metrics["answer_words_right"] = answers_right(right, batch["fields"], valid)
  if weights["itc"] or weights["itm"]:
    image, text = student.embed_image(states), student.embed_text(tokens, keys[2])
    scores = similarity(image, text)
  if weights["itc"]:
    both = scores, scores
    if weights["detach_gathered"]:
      detach = jax.lax.stop_gradient
      both = similarity(image, detach(text)), similarity(detach(image), text)
    losses["itc"] = itc_loss(*both, batch["image_id"], valid, student.temperature(),
                             weights["smoothing"])
  if weights["itm"]:
    itm_keys = list(jax.random.split(jax.random.fold_in(key, 3), 7))
    for i in (0, 2, 6):  # dropout keys; 1, 3 and 5 draw negatives
      itm_keys[i] = None if train is None else itm_keys[i]
    if negatives is None:
      hardness = jax.lax.stop_gradient(scores / student.temperature())
      negatives = draw_negatives(student, batch, hardness, itm_keys[1], itm_keys[3])
    rows = itm_rows(student, features, batch, sight, negatives, weights, itm_keys)
    losses["itm"] = Weighted(*(sum(loss[i] for loss, _ in rows.values()) for i in (0, 1)))
    metrics |= {f"itm_{name}_right": right for name, (_, right) in rows.items()}
  return losses, metrics


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
