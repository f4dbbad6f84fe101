"""Overlays, crops and mirroring with their boxes, and texts encoded outside of a batch."""

import dataclasses

import numpy as np
import pytest

from data_pipeline import regions
from data_pipeline.corpus import corpus_of
from data_pipeline.loader import Loader, batch_at
from data_pipeline.records import DataError, Statement
from data_pipeline.texts import encode_texts
from tests.data_pipeline.test_loader import (
  EVALUATION,
  OPTIONS,
  RECORDS,
  SIZE,
  make_tokenizer,
  valid_texts,
  write_images,
)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
  return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def corpus(root):
  return corpus_of(RECORDS, root)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def test_region_modes(root, tokenizer):
  record = dataclasses.replace(RECORDS[0], statements=RECORDS[0].statements[:1])

  def batch(mode):
    options = dataclasses.replace(EVALUATION, batch_size=1, image_size=SIZE, region_mode=mode)
    return batch_at(corpus_of([record], root), tokenizer, options, 0, 0)

  found = {mode: batch(mode) for mode in ("tokens", "overlay", "both", "none")}
  for mode, other in found.items():
    np.testing.assert_array_equal(other["tokens"], found["tokens"]["tokens"])  # text is the same
    with_boxes, drawn = mode in ("tokens", "both"), mode in ("overlay", "both")
    assert other["region_valid"].any() == with_boxes == other["boxes"].any()
    # The corner pixel of region 9, which has slot 0, and of region 4, slot 1.
    corners = [tuple(other["image"][0, 8, x].tolist()) for x in (24, 0)]
    plain = [(0, 0, 255), (255, 0, 0)]
    assert corners == ([regions.slot_color(0), regions.slot_color(1)] if drawn else plain)


# ---- augmentation ----


@pytest.mark.parametrize("size", [(64, 64), (48, 96)])
def test_boxes_follow_crops_and_mirroring(corpus, tokenizer, size):
  """Boxes are shares of height and width, whatever the two are."""
  options = dataclasses.replace(OPTIONS, augment=True, image_size=size, batch_size=40)
  batch = batch_at(corpus, tokenizer, options, 0, 0)
  assert batch["image"].shape == (40, *size, 3)
  assert len({image.tobytes() for image in batch["image"]}) > 20
  seen, (height, width) = set(), size
  for image, boxes, valid in zip(batch["image"], batch["boxes"], batch["region_valid"]):
    for x1, y1, x2, y2 in boxes[valid]:
      red, _, blue = image[int(height * (y1 + y2) / 2), int(width * (x1 + x2) / 2)].astype(int)
      assert abs(red - blue) > 200  # the centre of a box is still red or blue
      seen.add((red > blue, x1 < 0.4))
  assert seen == {(True, True), (True, False), (False, True), (False, False)}


def test_a_crop_drops_the_statements_whose_regions_it_cuts_away(corpus, tokenizer):
  options = dataclasses.replace(OPTIONS, augment=True, batch_size=40, statements=3, text_tokens=48)
  loader = Loader(corpus, tokenizer, options, 0)
  batch = loader.batch(0)
  dropped = ~batch["statement_valid"]
  assert 0 < dropped.sum() == loader.counts["cropped away"] < dropped.size
  assert batch["statement_valid"].any(-1).all()  # else the whole image would have been used
  assert not batch["tokens"][dropped].any()
  bracket = tokenizer.token_to_id("[")
  for tokens, valid in zip(batch["tokens"], batch["region_valid"]):
    after = tokens[:, 1:][tokens[:, :-1] == bracket]
    slots = {int(tokenizer.id_to_token(i)) for i in after}
    assert all(valid[slot] for slot in slots)  # what is still mentioned is still there


def test_an_image_is_not_mirrored_when_its_text_says_left_or_right(root, tokenizer):
  record = dataclasses.replace(
    RECORDS[0], statements=(Statement("0", "who is leftmost?", "a king", ""),)
  )
  options = dataclasses.replace(
    OPTIONS, augment=True, batch_size=30, image_size=SIZE, distractors=1.0
  )
  batch = batch_at(corpus_of([record], root), tokenizer, options, 0, 0)
  for image, boxes, valid in zip(batch["image"], batch["boxes"], batch["region_valid"]):
    for x1, _, x2, _ in boxes[valid]:
      red, _, blue = image[16, min(int(16 * (x1 + x2)), 31)].astype(int)
      assert (red > blue) == (x1 + x2 < 1)  # red stays on the left


# ---- texts of prompts and candidates ----


def test_encode_texts_gives_the_rows_the_student_was_trained_on(corpus, tokenizer):
  loader = Loader(
    corpus, tokenizer, dataclasses.replace(EVALUATION, images=False, text_tokens=48), 0
  )
  batch = loader.batch(0)
  texts = valid_texts(tokenizer, batch)
  tokens, fields = encode_texts(tokenizer, texts, 48)
  np.testing.assert_array_equal(tokens, batch["tokens"][batch["statement_valid"]])
  np.testing.assert_array_equal(fields, batch["fields"][batch["statement_valid"]])


@pytest.mark.parametrize(
  ("text", "fields"),
  [
    ("a king", [4, 4]),
    ("question: why", [1, 1, 1]),
    ("Question: why Answer: late", [1, 1, 1, 1, 1, 2]),
    ("why answer: late rationale: rain", [1, 1, 1, 2, 2, 2, 3]),
    ("question: why answer: late rationale:", [1, 1, 1, 1, 1, 2, 2, 2]),
    ("rationale: late", [4, 4, 4]),
  ],
)
def test_fields_are_found_from_the_markers(tokenizer, text, fields):
  tokens, found = encode_texts(tokenizer, [text], 16)
  assert found[0].tolist() == [0, *fields] + [0] * (15 - len(fields))
  assert tokens[0, : len(fields) + 2].tolist() == tokenizer.encode(text).ids


def test_a_prompt_can_be_left_open(tokenizer):
  tokens, _ = encode_texts(tokenizer, ["question: why answer:"], 16, end=False)
  assert tokenizer.token_to_id("[SEP]") not in tokens


def test_a_candidate_answer_is_never_cut(tokenizer):
  with pytest.raises(DataError, match="answer of .* is longer than 16 tokens"):
    encode_texts(tokenizer, ["question: why answer: " + "it is late " * 6], 16)
