"""The localized multiple-choice benchmark on drawn scenes.

  q_a      4 answers to a question about a region (or a pair); the distractors are the right answers
           for other regions of the same picture
  qa_r     4 rationales, given the question and the right answer
  q_ar     both right, each chosen as above (VCR's Q->AR)
  swap     the same question after the boxes of two regions traded places, scored against the answer
           that is right after the trade
  caption  which of 4 captions is the picture's

Chance is 25 % (6.25 % for q_ar). Slots are given in order of first mention, then of region id.
"""
from collections.abc import Sequence

import numpy as np
from tokenizers import Tokenizer

from data_pipeline import regions
from data_pipeline.choices import SceneChoice
from data_pipeline.records import mentions
from data_pipeline.texts import ANSWER, DESCRIPTION, RATIONALE, encode_texts
from lskd_jax.evaluate.candidates import HEADS, Scorer, sum_over

COLUMNS = ("q_a", "qa_r", "q_ar", "swap", "caption")


def evaluate(scorer: Scorer, items: Sequence[SceneChoice], images: dict, tokenizer: Tokenizer, *,
             max_regions: int, text_tokens: int, image_size: int, columns=COLUMNS, batch: int = 32,
             overlay=None, progress: bool = False) -> dict[str, dict[str, float]]:
  """Accuracies of every head.

  Args:
    images: {"features": [N, ...]} or {"image": uint8[N, H, W, 3]}, rows by the items' `image_id`.
    overlay: (image row, slot boxes in [0, 1]) -> row with boxes drawn, for students that see
      regions as pixels; called per item, because slots differ.
    progress: shows a bar for every column.

  Returns:
    {column: {head: accuracy}}, and "types": {type: accuracy of q_a by the last head}.
  """
  localized = [item for item in items if item.type != "caption"]
  captions = [item for item in items if item.type == "caption"]
  right: dict[str, dict[str, np.ndarray]] = {}

  def choose(name, items, texts, labels, field, swapped=False):
    rows = item_rows(items, texts, images, tokenizer, max_regions, text_tokens, image_size, swapped,
                 overlay)
    scores = scorer.many(rows, batch, f"evaluate {name}" if progress else "")
    scores["lm"] = sum_over(scores["words"], rows["fields"], [field])
    heads = HEADS if scorer.heads else ("lm",)
    right[name] = {head: scores[head].argmax(1) == np.array(labels) for head in heads}

  if "q_a" in columns:
    texts = [[f"question: {i.question} answer: {c}" for c in i.choices] for i in localized]
    choose("q_a", localized, texts, [i.label for i in localized], ANSWER)
  if "qa_r" in columns:
    texts = [[f"question: {i.question} answer: {i.choices[i.label]} rationale: {r}"
              for r in i.rationales] for i in localized]
    choose("qa_r", localized, texts, [i.rationale_label for i in localized], RATIONALE)
  if "q_ar" in columns:
    right["q_ar"] = {head: right["q_a"][head] & right["qa_r"][head] for head in right["q_a"]}
  if "swap" in columns:
    swappable = [i for i in localized if i.swap is not None]
    texts = [[f"question: {i.question} answer: {c}" for c in i.choices] for i in swappable]
    choose("swap", swappable, texts, [i.swap_label for i in swappable], ANSWER, swapped=True)
  if "caption" in columns:
    choose("caption", captions, [i.choices for i in captions], [i.label for i in captions],
           DESCRIPTION)
  result = {name: {head: float(hits.mean()) for head, hits in heads.items()}
            for name, heads in right.items()}
  if "q_a" in right:
    types = np.array([item.type for item in localized])
    hits = right["q_a"]["lm"]
    result["types"] = {kind: float(hits[types == kind].mean()) for kind in sorted(set(types))}
  return result


def item_rows(items, texts, images, tokenizer, max_regions, text_tokens, image_size, swapped=False,
              overlay=None) -> dict[str, np.ndarray]:
  """Numpy rows of one column: what the scorer takes, and the texts' fields.

  texts: for every item its candidate texts, mentions as region ids. The rest as in `evaluate`;
  swapped: the boxes of each item's `swap` trade places.
  """
  count, choices = len(items), len(texts[0])
  boxes = np.zeros((count, max_regions, 4), np.float32)
  valid = np.zeros((count, max_regions), bool)
  rendered = []
  for n, item in enumerate(items):
    ids = tuple(region.id for region in item.regions)
    mentioned = tuple(dict.fromkeys(i for text in texts[n] for i in mentions(text)))
    slots = regions.assign_slots(ids, mentioned, None, max_regions, True)
    where = {region.id: np.clip(np.array(region.box) / image_size, 0, 1) for region in item.regions}
    if swapped:
      i, j = item.swap
      where[i], where[j] = where[j], where[i]
    for slot, region_id in enumerate(slots):
      boxes[n, slot], valid[n, slot] = where[region_id], True
    rendered += [regions.render(text, slots) for text in texts[n]]
  tokens, fields = encode_texts(tokenizer, rendered, text_tokens)
  (name, source), = images.items()
  take = np.array([item.image_id for item in items])
  pixels = source[take]
  if overlay is not None:
    pixels = np.stack([overlay(row, box[ok]) for row, box, ok in zip(pixels, boxes, valid)])
  return {name: pixels, "boxes": boxes, "region_valid": valid,
          "tokens": tokens.reshape(count, choices, text_tokens),
          "fields": fields.reshape(count, choices, text_tokens)}
