"""Batches: what is in them, that they depend on (seed, step) alone, and that nothing is lost."""

import dataclasses
import io

import numpy as np
from PIL import Image
import pytest

from data_pipeline import regions, stages
from data_pipeline.corpus import corpus_of, open_corpus
from data_pipeline.examples import LoaderOptions
from data_pipeline.loader import Loader, batch_at, batches
from data_pipeline.records import DataError, ImageRecord, Region, Statement, Verbalization
from data_pipeline.texts import encode_texts
from data_pipeline.tokenizer import load_tokenizer, train_tokenizer

SIZE = 32
NAMES = ("king", "chef", "clown", "nurse", "soldier")


def _record(k):
  """An image of two regions, ids 4 (left) and 9 (right), with three statements and other texts."""
  name = NAMES[k]
  return ImageRecord(
    image=f"{name}.png",
    image_id=100 + k,
    width=SIZE,
    height=SIZE,
    regions=(Region(4, (0, 8, 8, 24)), Region(9, (24, 8, 32, 24))),
    statements=(
      Statement("0", f"why does [9] look at [4]'s {name}?", "[9] waits", "[4] is late", score=0.9),
      Statement("1", f"who is the {name}?", "[4]", "it holds a ball", score=0.5),
      Statement("2", "what comes next?", f"the {name} sits", "", score=0.1),
    ),
    verbalization=Verbalization(
      captions=(f"a {name} in the rain",), local={4: f"a {name}", 9: "a ball."}
    ),
  )


RECORDS = [_record(k) for k in range(len(NAMES))]


def write_images(root):
  """One image per record: grey, lighter from record to record, with a red and a blue region."""
  for k, record in enumerate(RECORDS):
    pixels = np.full((SIZE, SIZE, 3), 40 * k, np.uint8)
    pixels[8:24, :8] = (255, 0, 0)  # region 4 is red
    pixels[8:24, 24:] = (0, 0, 255)  # region 9 is blue
    Image.fromarray(pixels).save(root / record.image)
  return root


def make_tokenizer(out):
  """A tokenizer that knows every word of the records."""
  texts = [t for r in RECORDS for s in r.statements for t in (s.question, s.answer, s.rationale)]
  train_tokenizer([*texts, "a ball in the rain", *NAMES], out, min_frequency=1)
  return load_tokenizer(out)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
  return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def corpus(root):
  return corpus_of(RECORDS, root)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


OPTIONS = LoaderOptions(
  batch_size=4, statements=2, text_tokens=32, max_regions=3, image_size=16, threads=1
)
EVALUATION = dataclasses.replace(OPTIONS, shuffle_slots=False, distractors=0.0)


def _options(base=OPTIONS, **changes):
  return dataclasses.replace(base, **changes)


def valid_texts(tokenizer, batch):
  """The valid texts of a batch as strings, without special tokens."""
  rows = batch["tokens"][batch["statement_valid"]]
  return [tokenizer.decode(row.tolist()) for row in rows]


def _assert_equal(first, second):
  assert first.keys() == second.keys()
  for name in first:
    np.testing.assert_array_equal(first[name], second[name], err_msg=name)


def _one(record, root, tokenizer, options, step=0, seed=0):
  """A batch made of one record only."""
  return batch_at(corpus_of([record], root), tokenizer, options, seed, step)


# ---- what a batch holds ----


def test_shapes_and_types_are_always_the_same(corpus, tokenizer):
  for step in range(3):
    batch = batch_at(corpus, tokenizer, OPTIONS, 0, step)
    assert {name: (value.shape, value.dtype.name) for name, value in batch.items()} == {
      "image": ((4, 16, 16, 3), "uint8"),
      "image_id": ((4,), "int32"),
      "boxes": ((4, 3, 4), "float32"),
      "region_valid": ((4, 3), "bool"),
      "tokens": ((4, 2, 32), "int32"),
      "fields": ((4, 2, 32), "int8"),
      "statement": ((4, 2), "int32"),
      "statement_valid": ((4, 2), "bool"),
    }


def test_a_statement_reads_as_question_answer_rationale_with_slots(root, tokenizer):
  # In evaluation the slots follow the order of first mention: 9 gets slot 0, 4 gets slot 1.
  record = dataclasses.replace(RECORDS[0], statements=RECORDS[0].statements[:1])
  batch = _one(record, root, tokenizer, _options(EVALUATION, batch_size=1, statements=1))
  text = "question: why does [0] look at [1]'s king? answer: [0] waits rationale: [1] is late"
  expected = tokenizer.encode(text)
  assert batch["tokens"][0, 0, : len(expected.ids)].tolist() == expected.ids
  assert not batch["tokens"][0, 0, len(expected.ids) :].any()  # [PAD] is 0
  np.testing.assert_allclose(
    batch["boxes"][0], [[0.75, 0.25, 1, 0.75], [0, 0.25, 0.25, 0.75], [0, 0, 0, 0]]
  )
  assert batch["region_valid"][0].tolist() == [True, True, False]


def test_a_mention_of_two_regions_reads_as_rendered_text_does(root, tokenizer):
  statement = Statement("0", "([4,9]) or[9]?", "a king", "")
  record = dataclasses.replace(RECORDS[0], statements=(statement,))
  batch = _one(record, root, tokenizer, _options(EVALUATION, batch_size=1, statements=1))
  rendered = regions.render("question: ([4,9]) or[9]? answer: a king", slots=(4, 9))
  assert rendered == "question: ([0] , [1]) or[1]? answer: a king"
  np.testing.assert_array_equal(batch["tokens"][0], encode_texts(tokenizer, [rendered], 32)[0])


def test_every_token_knows_its_field(root, tokenizer):
  # 0 special, 1 question, 2 answer, 3 rationale; a marker belongs to the field before it.
  record = dataclasses.replace(RECORDS[0], statements=RECORDS[0].statements[:1])
  batch = _one(record, root, tokenizer, _options(EVALUATION, batch_size=1, statements=1))
  tokens = [tokenizer.id_to_token(i) for i in batch["tokens"][0, 0]]
  fields = batch["fields"][0, 0].tolist()
  words = {code: [t for t, f in zip(tokens, fields) if f == code] for code in (1, 2, 3)}
  assert words[1][:3] == ["question", ":", "why"] and words[1][-2:] == ["answer", ":"]
  assert words[2] == ["[", "0", "]", "waits", "rationale", ":"]
  assert words[3] == ["[", "1", "]", "is", "late"]
  assert tokens[fields.index(1) - 1] == "[CLS]" and "[SEP]" in [
    t for t, f in zip(tokens, fields) if f == 0
  ]


def test_image_id_is_the_row_in_the_corpus(corpus, tokenizer):
  batch = batch_at(corpus, tokenizer, OPTIONS, 0, 0)
  background = batch["image"][:, 0, 0, 0]
  assert background.tolist() == (40 * batch["image_id"]).tolist()


def test_images_are_left_out_for_students_with_cached_features(corpus, tokenizer):
  batch = batch_at(corpus, tokenizer, _options(images=False), 0, 0)
  with_images = batch_at(corpus, tokenizer, OPTIONS, 0, 0)
  del with_images["image"]
  _assert_equal(batch, with_images)


def test_a_stage_folder_gives_the_same_batches_as_records_in_memory(
  corpus, tokenizer, root, tmp_path
):
  stages.run_stage("x", [RECORDS[:2], RECORDS[2:]], lambda r: r, tmp_path, {}, progress=False)
  stored = open_corpus(tmp_path, root)
  _assert_equal(
    batch_at(stored, tokenizer, OPTIONS, 0, 1), batch_at(corpus, tokenizer, OPTIONS, 0, 1)
  )


# ---- a pure function of (seed, step) ----


def test_a_batch_depends_on_seed_and_step_alone(corpus, tokenizer):
  first = batch_at(corpus, tokenizer, OPTIONS, seed=3, step=5)
  loader = Loader(corpus, tokenizer, OPTIONS, seed=3)
  for step in (9, 0, 5):  # whatever was made before
    again = loader.batch(step)
  _assert_equal(first, again)
  for seed, step in ((4, 5), (3, 6)):
    other = batch_at(corpus, tokenizer, OPTIONS, seed, step)
    assert not np.array_equal(first["tokens"], other["tokens"])


def test_threads_change_nothing(corpus, tokenizer):
  for threads, prefetch in ((0, 0), (4, 3)):
    options = _options(threads=threads, prefetch=prefetch)
    for step, batch in enumerate(batches(corpus, tokenizer, options, seed=0, steps=6)):
      _assert_equal(batch, batch_at(corpus, tokenizer, OPTIONS, 0, step))
    assert step == 5


def test_resuming_gives_the_rest_of_the_same_batches(corpus, tokenizer):
  whole = list(batches(corpus, tokenizer, OPTIONS, seed=1, steps=7))
  rest = list(batches(corpus, tokenizer, OPTIONS, seed=1, start_step=4, steps=3))
  assert len(rest) == 3
  for expected, found in zip(whole[4:], rest, strict=True):
    _assert_equal(expected, found)


@pytest.mark.parametrize("shares", [[[0, 1], [2, 3]], [[3, 0], [1], [2]], [[0, 1, 2], [1, 2, 3]]])
def test_rows_are_the_same_whoever_reads_them(corpus, tokenizer, shares):
  """Processes with interleaved rows, with unequal numbers of them, and with rows in common."""
  whole = list(batches(corpus, tokenizer, OPTIONS, seed=0, steps=3))
  for rows in shares:
    part = list(batches(corpus, tokenizer, OPTIONS, 0, 0, 3, rows=rows))
    assert len(part) == 3
    for expected, found in zip(whole, part, strict=True):
      _assert_equal({name: values[rows] for name, values in expected.items()}, found)


@pytest.mark.parametrize("rows", [[], [4], [-1, 0]])
def test_rows_that_a_batch_does_not_have_are_refused(corpus, tokenizer, rows):
  with pytest.raises(DataError, match="a batch has the rows 0 to 3"):
    batch_at(corpus, tokenizer, OPTIONS, 0, 0, rows)


def test_example_ids_tell_what_a_step_reads(corpus, tokenizer):
  loader = Loader(corpus, tokenizer, OPTIONS, 2)
  for step in (0, 1, 7):  # five images: batches cross the borders of epochs
    np.testing.assert_array_equal(loader.example_ids(step), loader.batch(step)["image_id"])
  assert loader.example_ids(0).dtype == np.int64


def test_every_epoch_shows_each_image_once_in_another_order(corpus, tokenizer):
  # 5 images in batches of 4: epochs end within a batch, and nothing is dropped.
  ids = np.concatenate(
    [b["image_id"] for b in batches(corpus, tokenizer, _options(images=False), 0, steps=15)]
  )
  epochs = [tuple(epoch) for epoch in ids.reshape(12, 5)]
  assert all(sorted(epoch) == [0, 1, 2, 3, 4] for epoch in epochs)
  assert len(set(epochs)) > 6
  assert Loader(corpus, tokenizer, OPTIONS, 0).steps_per_epoch == 5 / 4


# ---- which texts ----


def test_statements_do_not_repeat_until_all_are_used(root, tokenizer):
  options = _options(EVALUATION, batch_size=1, statements=4, text_tokens=48)
  for step in range(5):
    texts = valid_texts(tokenizer, _one(RECORDS[1], root, tokenizer, options, step))
    assert len(texts) == 4 and len(set(texts[:3])) == 3 and texts[3] == texts[0]


def test_a_threshold_hides_statements_and_images_without_any_left(root, tokenizer):
  records = [RECORDS[0], dataclasses.replace(RECORDS[1], statements=RECORDS[1].statements[1:])]
  loader = Loader(corpus_of(records, root, min_score=0.8), tokenizer, OPTIONS, 0)
  assert loader.rows.tolist() == [0]  # row 1 has scores 0.5 and 0.1 only
  assert all("why does" in text for text in valid_texts(tokenizer, loader.batch(0)))
  with pytest.raises(DataError, match="no image has statements with a score of 0.95 or more"):
    Loader(corpus_of(records, root, min_score=0.95), tokenizer, OPTIONS, 0)


def test_captions_and_descriptions_fill_slots_by_their_shares(corpus, tokenizer):
  options = _options(EVALUATION, images=False, texts={"captions": 1, "descriptions": 3})
  loader = Loader(corpus, tokenizer, options, 0)
  texts = [text for step in range(60) for text in valid_texts(tokenizer, loader.batch(step))]
  captions = [text for text in texts if text.endswith("in the rain")]
  described = [text for text in texts if text.startswith("[ 0 ] a ")]
  assert len(captions) + len(described) == len(texts) == 60 * 4 * 2
  assert 0.18 < len(captions) / len(texts) < 0.32
  assert "[ 0 ] a king . [ 1 ] a ball ." in described
  assert set(np.unique(loader.batch(0)["fields"])) == {0, 4}


def test_an_image_without_one_kind_uses_the_others(root, tokenizer):
  record = dataclasses.replace(RECORDS[0], verbalization=Verbalization())
  options = _options(texts={"statements": 0.1, "captions": 0.9})
  assert _one(record, root, tokenizer, options)["statement_valid"].all()


def test_rationales_can_be_dropped(corpus, tokenizer):
  def rationales(share):
    options = _options(images=False, rationale_dropout=share, text_tokens=48)
    loader = Loader(corpus, tokenizer, options, 0)
    written = [(loader.batch(step)["fields"] == 3).any(-1) for step in range(40)]
    return np.mean(written)

  # One of the three statements never has a rationale.
  assert rationales(1.0) == 0
  assert 0.25 < rationales(0.5) < 0.42 < 0.6 < rationales(0.0) < 0.73


def test_too_long_texts_lose_rationale_then_question_and_never_the_answer(root, tokenizer):
  # As tokens: markers 2+2+2, question 4 + mention, answer 4, rationale 7.
  statement = Statement("0", "why is it late [4]", "it is late ?", "it is [9] , it is late")

  def text(text_tokens):
    record = dataclasses.replace(RECORDS[0], statements=(statement,))
    options = _options(EVALUATION, batch_size=1, statements=1, text_tokens=text_tokens)
    loader = Loader(corpus_of([record], root), tokenizer, options, 0)
    return valid_texts(tokenizer, loader.batch(0))[0], dict(loader.counts)

  whole = (
    "question : why is it late [ 0 ] answer : it is late ? rationale : it is [ 1 ] , it is late"
  )
  assert text(32) == (whole, {"whole": 1})
  # Room for 4 of the rationale's tokens: the mention is not cut in two, it goes.
  short = "question : why is it late [ 0 ] answer : it is late ? rationale : it is"
  assert text(23) == (short, {"cut rationale": 1})
  assert text(18)[0] == "question : why is it late [ 0 ] answer : it is late ?"
  # Two tokens less and the question shrinks, again by its whole mention.
  assert text(16) == ("question : why is it late answer : it is late ?", {"cut question": 1})


def test_an_answer_that_does_not_fit_leaves_the_slot_empty(root, tokenizer):
  long = Statement("0", "why?", "it is late " * 20, "")
  record = dataclasses.replace(RECORDS[0], statements=(long,))
  loader = Loader(corpus_of([record], root), tokenizer, OPTIONS, 0)
  batch = loader.batch(0)
  assert not batch["statement_valid"].any() and not batch["tokens"].any()
  assert loader.counts == {"empty": 8}


# ---- which regions ----


def test_slots_are_shuffled_in_training(root, tokenizer):
  record = dataclasses.replace(RECORDS[0], statements=RECORDS[0].statements[:1])
  loader = Loader(corpus_of([record], root), tokenizer, _options(images=False), 0)
  left_first = [bool(loader.batch(step)["boxes"][0, 0, 0] == 0) for step in range(40)]
  assert 8 < sum(left_first) < 32
  # Text and boxes agree: the first mention is region 9, which lies at x1 = 0.75.
  for step in range(10):
    batch = loader.batch(step)
    slot = int(tokenizer.id_to_token(batch["tokens"][0, 0, 6]))
    assert batch["boxes"][0, slot, 0] == 0.75


def test_distractors_are_regions_that_nobody_mentions(root, tokenizer):
  record = dataclasses.replace(RECORDS[0], statements=RECORDS[0].statements[1:2])  # mentions 4
  for share, wanted in ((0.0, {1}), (1.0, {2}), (0.5, {1, 2})):
    loader = Loader(
      corpus_of([record], root), tokenizer, _options(images=False, distractors=share), 0
    )
    found = np.concatenate([loader.batch(step)["region_valid"].sum(-1) for step in range(5)])
    assert set(found.tolist()) == wanted


def test_texts_never_mention_more_regions_than_there_are_slots(root, tokenizer):
  # Statements about regions (4), (9) and (4, 9), with room for one region: the pair is left out,
  # and the slots are filled with statements about whichever region came first.
  statements = tuple(
    Statement(str(k), f"why {ids}?", "it waits", "")
    for k, ids in enumerate(("[4]", "[9]", "[4,9]"))
  )
  record = dataclasses.replace(RECORDS[0], statements=statements)
  options = _options(statements=3, max_regions=1)
  for step in range(4):
    batch = _one(record, root, tokenizer, options, step)
    assert batch["statement_valid"].all()
    texts = valid_texts(tokenizer, batch)
    assert set(texts) == {"question : why [ 0 ] ? answer : it waits"}


def test_a_mention_of_an_absent_region_names_the_image(root, tokenizer):
  bad = dataclasses.replace(RECORDS[0], statements=(Statement("0", "who is [7]?", "a king", ""),))
  with pytest.raises(DataError, match=r"king.png: mention \[7\] names no region"):
    _one(bad, root, tokenizer, OPTIONS)


# ---- errors ----


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"batch_size": 0}, "batch_size=0"),
    ({"distractors": 1.5}, "a share from 0 to 1"),
    ({"texts": {"poems": 1.0}}, "unknown kind 'poems'"),
    ({"texts": {"captions": 0.0}}, "one is above 0"),
    ({"region_mode": "colour"}, "region_mode='colour'"),
    ({"images": False, "region_mode": "overlay"}, "no pixels"),
    ({"images": False, "augment": True}, "no pixels"),
  ],
)
def test_options_that_make_no_sense_are_refused(changes, message):
  with pytest.raises(DataError, match=message):
    LoaderOptions(**changes)


def test_a_damaged_image_stops_training_and_is_named(root, tokenizer, tmp_path):
  data = io.BytesIO()
  Image.new("RGB", (SIZE, SIZE)).save(data, "PNG")
  (tmp_path / "king.png").write_bytes(data.getvalue()[:60])
  with pytest.raises(DataError, match="king.png"):
    list(batches(corpus_of(RECORDS[:1], tmp_path), tokenizer, OPTIONS, 0, steps=1))


def test_an_image_of_another_size_than_recorded_is_an_error(root, tokenizer):
  wrong = dataclasses.replace(RECORDS[0], width=64)  # its boxes would all be off
  with pytest.raises(DataError, match="is 32x32, its record says 64x32"):
    _one(wrong, root, tokenizer, OPTIONS)
