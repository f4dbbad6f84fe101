"""Records: what a line of each format becomes, and that nothing is lost on the way back."""

import copy
import json
import random

import pytest

from data_pipeline.records import (
  ChoiceItem,
  DataError,
  ImageRecord,
  Region,
  Statement,
  Verbalization,
  choice_from_json,
  choice_to_json,
  map_mentions,
  mentions,
  original_to_records,
  read_jsonl,
  record_from_json,
  record_to_json,
  records_to_original,
  to_line,
  validate,
)

# The complete older-form record of the original: texts are strings inside `qar`.
OLDER_ROW = {
  "image": "VG_100K_2/2378381.jpg",
  "index": "chatgpt_region1_ref0_1",
  "region": "0",
  "qar": {
    "question": "What is the engine of the plane suggesting about the scene?",
    "answer": "The engine of the plane suggests that this is an active and exciting scene, "
    "possibly an air show or aerobatics event. ",
    "rationale": "rationale",
  },
  "references": [
    {
      "name": "0",
      "boxes": [[114.4206848145, 171.4768066406, 136.3255767822, 193.6623840332]],
      "segms": None,
      "obj_guess": "propeller",
      "tag": "region",
    },
    {
      "name": "1",
      "boxes": [[109.6865615845, 179.2686004639, 129.4137573242, 202.239730835]],
      "segms": None,
      "obj_guess": "motor",
      "tag": "region",
    },
    {
      "name": "2",
      "boxes": [[114.892616272, 168.8507995605, 138.860748291, 185.9940795898]],
      "segms": None,
      "obj_guess": "tank_(storage_vessel)",
      "tag": "region",
    },
    {
      "name": "3",
      "boxes": [[152.9057159424, 176.6907348633, 162.3196868896, 185.0597229004]],
      "segms": None,
      "obj_guess": "machine_gun",
      "tag": "region",
    },
  ],
}


def reference(name, box, label="lion", **others):
  whole = {"name": name, "boxes": [box], "segms": None, "obj_guess": label, "tag": "region"}
  return whole | others


# The released form: texts are word tokens, a mention is a nested list of region ids.
RELEASED_ROW = {
  "image": "VG_100K/2348412.jpg",
  "source": "chatgpt_region_any_v4_people",
  "split": "train",
  "index": "chatgpt_region_any_v4_people-858297",
  "region": [4],
  "region_all": [0, 2, 4],
  "references": [
    reference("4", [379.6391601562, 152.25, 420.5, 200.125]),
    reference("0", [10.0, 20.0, 400.0, 480.0], "woman"),
    reference("2", [0.5, 1.5, 100.0, 90.0], "shirt"),
  ],
  "question": ["What", "is", "the", "gold", "lion", "on", [0, 2], "woman's", "shirt,", [4], "?"],
  "answer": ["It", "is", [4], "a", "brooch."],
  "rationale": ["Gold", "pins", "are", "worn."],
  "prediction": 0.940065,
}

CHOICE_ROW = {
  "image": "vcr1images/x/y@0.jpg",
  "text_input": ["Does", [2], "feel", "comfortable", "?"],
  "references": {"2": {"boxes": [[10.0, 20.0, 200.0, 300.0, 0.99]], "obj_guess": "person"}},
  "choices": [
    {"text_output": ["Yes", "."], "score": 0.0},
    {"text_output": ["No", ",", [2], "is", "tense", "."], "score": 1.0},
  ],
  "label": 1,
  "answer_prefix": "Answer:",
  "instance_id": "val-0",
}


def assert_lossless(rows):
  """Rows -> records -> native jsonl -> records -> rows: equal as text, so key order counts too."""
  records = original_to_records(copy.deepcopy(rows))
  stored = [record_from_json(json.loads(to_line(record_to_json(r)))) for r in records]
  assert stored == records
  again = list(records_to_original(stored))
  assert again == rows or json.dumps(again) == json.dumps(rows)  # NaN is not equal to itself
  assert json.dumps(again) == json.dumps(rows)
  return records


# ---- mentions ----


def test_mentions_are_listed_once_in_order_of_first_mention():
  assert mentions("Is [4] near [0,2] or [ 0, 7 ]? [4] [x] []") == (4, 0, 2, 7)


def test_map_mentions_names_each_id_and_joins_those_of_one_mention():
  assert map_mentions("[0,2] and [1].", lambda i: f"<{i}>") == "<0> , <2> and <1>."


# ---- the original's corpus rows ----


def test_released_row_becomes_text_with_mentions_and_comes_back_equal():
  (record,) = assert_lossless([RELEASED_ROW])
  (statement,) = record.statements
  assert statement.question == "What is the gold lion on [0,2] woman's shirt, [4] ?"
  assert (statement.region, statement.region_all) == ((4,), (0, 2, 4))
  assert statement.score == 0.940065
  assert statement.source == "chatgpt_region_any_v4_people"
  assert record.regions[0] == Region(4, (379.6391601562, 152.25, 420.5, 200.125), "lion")
  assert statement.extra == {}  # the released form needs no memory of how it looked


def test_older_row_with_strings_comes_back_equal():
  (record,) = assert_lossless([OLDER_ROW])
  assert record.statements[0].rationale == "rationale"
  assert record.statements[0].region == (0,)
  assert [region.label for region in record.regions] == [
    "propeller",
    "motor",
    "tank_(storage_vessel)",
    "machine_gun",
  ]


def test_rows_of_one_image_become_one_record_in_the_original_order():
  first = RELEASED_ROW | {"index": "a", "references": RELEASED_ROW["references"][:2]}
  other = RELEASED_ROW | {"index": "b", "image": "VG_100K/1.jpg"}
  third = RELEASED_ROW | {"index": "c", "references": RELEASED_ROW["references"][::-1]}
  records = assert_lossless([first, other, third])
  assert [[s.index for s in record.statements] for record in records] == [["a", "c"], ["b"]]
  assert [region.id for region in records[0].regions] == [4, 0, 2]


def test_rows_that_disagree_about_a_region_get_their_own_record_of_the_same_image():
  moved = RELEASED_ROW | {"index": "b", "references": [reference("4", [1.0, 2.0, 3.0, 4.0])]}
  last = RELEASED_ROW | {"index": "c"}
  records = assert_lossless([RELEASED_ROW, moved, last])
  assert [r.image_id for r in records] == [0, 0]
  assert [[s.index[-1] for s in r.statements] for r in records] == [["7", "c"], ["b"]]


@pytest.mark.parametrize(
  "change",
  [
    {"question": []},
    {"question": ["", "two words", "[3]", [], [0], "", "x [0]", "[0,", "2]"]},
    {"question": ["[0, 2]"], "answer": [[0], [2]], "rationale": ["glued[4]tail"]},
    {"prediction": 1},
    {"prediction": None},
    {"source": None, "split": "val"},
    {"references": None},
    {"references": []},
    {"region": [], "region_all": None, "unknown": {"b": [1.0, None], "a": "\ud800"}},
    {"original_form": {"keys": ["x"]}},
    {"teacher": "gpt", "provenance": "a hash", "width": 640, "height": 480},
    {"references": [reference("4", [1, 2.5, 3, 4, 0.9]), reference(0, [1, 2, 3, 4], None, x=1)]},
    {"references": [{"boxes": [[1.0, 2.0, 3.0, 4.0]], "name": "7", "segms": [[[0, 1]]]}]},
    {"label": ["accept", "reject", "accept"], "qa_score": 0.5, "r_score": 1},
    {"reject_label": 0},
  ],
)
def test_odd_rows_survive(change):
  assert_lossless([RELEASED_ROW | change])
  assert_lossless([dict(reversed((RELEASED_ROW | change).items()))])


@pytest.mark.parametrize("key", sorted(set(RELEASED_ROW) - {"image"}))
def test_an_absent_key_stays_absent(key):
  assert_lossless([{k: v for k, v in RELEASED_ROW.items() if k != key}])


def test_critic_rows_keep_their_votes_in_extra():
  (record,) = assert_lossless([RELEASED_ROW | {"label": ["accept", "reject", "accept"]}])
  assert record.statements[0].extra["label"] == ["accept", "reject", "accept"]


def test_the_text_variants_of_the_original_loaders_are_read():
  base = {"image": "a.jpg", "index": "0"}
  pair = base | {"text_input": ["Who", "is", [1], "?"], "text_output": ["A", "cook."]}
  whole = base | {"full_text_input": ["All", "of", "it."]}
  label = base | {"question": "Question: Who?", "answer": "Answer: Me.", "region": "0"}
  records = original_to_records([pair, whole, label])
  texts = [(s.question, s.answer) for s in records[0].statements]
  assert texts == [("Who is [1] ?", "A cook."), ("All of it.", ""), ("Who?", "Me.")]
  assert_lossless([pair, whole, label])


def test_a_changed_field_is_written_and_not_its_old_form():
  row = RELEASED_ROW | {"prediction": None, "question": ["[4]", "?"]}
  (record,) = original_to_records([row])
  changed = record_to_json(record)
  changed["statements"][0] |= {"score": 0.5, "question": "Where is [0]?"}
  (written,) = records_to_original([record_from_json(changed)])
  assert written["prediction"] == 0.5
  assert written["question"] == ["Where", "is", [0], "?"]
  assert written["answer"] == RELEASED_ROW["answer"]


def test_records_made_here_are_written_in_the_released_form():
  record = ImageRecord(
    "a.jpg", 7, 64, 48, (Region(3, (1.0, 2.0, 3.0, 4.0), "dog"),),
    (Statement("s-0", "What is [3]?", "[3,3] barks.", "Dogs do.", region=(3,)),),
  )  # fmt: skip
  (row,) = records_to_original([record])
  assert list(row)[:11] == list(RELEASED_ROW)[:10] + ["width"]  # no prediction before the critic
  assert row["references"] == [reference("3", [1.0, 2.0, 3.0, 4.0], "dog")]
  assert row["question"] == ["What", "is", [3], "?"]
  assert row["answer"] == [[3, 3], "barks."]


def test_random_rows_survive():
  """Many rows with shuffled keys, missing keys and odd values, several per image."""
  rng = random.Random(0)
  odd = ["", " ", "[1]", "[1,", 5, 2.0, None, True, [], {}, {"a": 1}]
  for _ in range(60):
    rows = []
    for number in range(rng.randint(1, 6)):
      row = copy.deepcopy(RELEASED_ROW) | {"index": str(number), "image": rng.choice("ab")}
      rng.shuffle(row["references"])
      del row["references"][rng.randint(1, 3) :]
      for key in rng.sample(["source", "split", "tag", "mood", "teacher"], 3):
        row[key] = rng.choice(odd)
      row["question"] = [rng.choice(["a", "", "b c", "[2]", [2], [0, 4]]) for _ in range(5)]
      keys = [k for k in row if k == "image" or rng.random() < 0.9]
      rng.shuffle(keys)
      rows.append({key: row[key] for key in keys})
    assert_lossless(rows)


@pytest.mark.parametrize(
  "change, culprit",
  [
    ({"image": None}, "image"),
    ({"question": [{"a": 1}]}, "question"),
    ({"question": [[0.5]]}, "question"),
    ({"references": [{"name": "4"}]}, "boxes"),
    ({"references": [reference("person", [1.0, 2.0, 3.0, 4.0])]}, "name"),
    ({"references": [reference("1", [1.0, 2.0])]}, "boxes"),
    ({"references": [reference("1", [1.0, 2, 3, 4]), reference("1", [5.0, 6, 7, 8])]}, "region 1"),
    ({"prediction": "high"}, "prediction"),
  ],
)
def test_an_unreadable_row_is_named_with_its_key(change, culprit):
  with pytest.raises(DataError, match=f"file.jsonl: row 2: .*{culprit}"):
    original_to_records([RELEASED_ROW, RELEASED_ROW | change], where="file.jsonl")


# ---- choice tasks ----


def test_choice_row_is_read_and_comes_back_equal():
  item = choice_from_json(CHOICE_ROW)
  assert item.question == "Does [2] feel comfortable ?"
  assert item.choices == ("Yes .", "No , [2] is tense .")
  assert (item.scores, item.label, item.index) == ((0.0, 1.0), 1, "val-0")
  assert item.regions[0].box == (10.0, 20.0, 200.0, 300.0)
  assert json.dumps(choice_to_json(item)) == json.dumps(CHOICE_ROW)


@pytest.mark.parametrize(
  "change",
  [
    {"label": None},
    {"references": None},
    {"references": {"02": {"boxes": [[1, 2, 3, 4]]}, "1": {"boxes": [[1.0, 2.0, 3.0, 4.0]]}}},
    {"choices": [{"text_output": ["a"], "id": 3}, {"text_output": "b"}]},
    {"choices": []},
    {"question": ["Why", "?"], "text_input": ["Who", "?"]},
    {"context": "before", "movie": "x"},
  ],
)
def test_odd_choice_rows_survive(change):
  for row in (CHOICE_ROW | change, dict(reversed((CHOICE_ROW | change).items()))):
    assert json.dumps(choice_to_json(choice_from_json(row))) == json.dumps(row)


def test_choice_rows_may_use_the_documented_names_question_and_text():
  row = {"image": "a.jpg", "question": ["Who", "?"], "choices": [{"text": ["Me."]}]}
  item = choice_from_json(row)
  assert (item.question, item.choices, item.label) == ("Who ?", ("Me.",), None)
  assert choice_to_json(item) == row


def test_a_choice_item_made_here_can_be_written():
  item = ChoiceItem("a.jpg", "Is [0] ?", ("yes", "no"), 0, (Region(0, (0.0, 0, 9, 9)),), "q-1")
  row = choice_to_json(item)
  assert row["text_input"] == ["Is", [0], "?"]
  assert row["choices"] == [{"text_output": ["yes"]}, {"text_output": ["no"]}]
  assert choice_from_json(row) == item


# ---- native jsonl ----

RECORD = ImageRecord(
  image="a.jpg", image_id=5, width=100, height=50,
  regions=(Region(0, (1.0, 2.0, 3.0, 4.0), "dog", {"coco_id": 9}), Region(3, (0.0, 0.0, 5.0, 5.0))),
  statements=(Statement("s", "What is [3]?", "[0,3]", "So.", score=0.25, provenance={"n": 1}),),
  verbalization=Verbalization(("a park",), {3: "a cup"}, (("who?", "nobody"),)),
  split="val",
)  # fmt: skip


def test_native_record_survives_and_leaves_defaults_out():
  row = json.loads(to_line(record_to_json(RECORD)))
  assert record_from_json(row) == RECORD
  assert "extra" not in row and "teacher" not in row["statements"][0]


@pytest.mark.parametrize(
  "change, culprit",
  [
    ({"image": 3}, "'image'"),
    ({"width": "9"}, "'width'"),
    ({"colour": 1}, "unknown key 'colour'"),
    ({"regions": [{"id": 0}]}, "'box' is missing"),
    ({"regions": [{"id": 0, "box": [1, 2, 3]}]}, "'box'"),
    ({"statements": [{"index": "x"}]}, "'question' is missing"),
    ({"verbalization": {"local": {"x": "y"}}}, "'local'"),
    ({"verbalization": {"dynamic": [["only a question"]]}}, "'dynamic'"),
  ],
)
def test_an_ill_formed_native_record_is_refused_by_key(change, culprit):
  with pytest.raises(DataError, match=culprit):
    record_from_json(record_to_json(RECORD) | change)


def test_read_jsonl_counts_lines_and_skips_blank_ones(tmp_path):
  path = tmp_path / "a.jsonl"
  path.write_bytes(b'\xef\xbb\xbf{"a": 1}\n\n{"a": "\xc3\xa9\xe2\x80\xa8"}')
  assert list(read_jsonl(path)) == [(1, {"a": 1}), (3, {"a": "é\u2028"})]


@pytest.mark.parametrize(
  "line", [b'{"a": "\xff"}', b'{"a": [1, 2', b"[1]", b"3", b"[" * 100_000, b'{"a": ' + b"9" * 5000]
)
def test_read_jsonl_names_the_damaged_line(tmp_path, line):
  path = tmp_path / "a.jsonl"
  path.write_bytes(b'{"a": 1}\n' + line)
  with pytest.raises(DataError, match=r"a.jsonl:2: "):
    list(read_jsonl(path))


def test_read_jsonl_says_when_there_is_no_file(tmp_path):
  with pytest.raises(DataError, match="none.jsonl"):
    list(read_jsonl(tmp_path / "none.jsonl"))


# ---- validate ----


def with_regions(*regions, **changes):
  values = {"image": "a.jpg", "image_id": 0, "width": 100, "height": 50, "regions": regions}
  return ImageRecord(**values | changes)


def test_validate_clips_a_box_that_reaches_over_the_edge():
  record = validate(with_regions(Region(0, (-5.0, 10.0, 120.0, 60.0))))
  assert record.regions[0].box == (0.0, 10.0, 100.0, 50.0)


@pytest.mark.parametrize(
  "record, culprit",
  [
    (with_regions(Region(0, (0.0, 0.0, float("nan"), 5.0))), "region 0.*finite"),
    (with_regions(Region(0, (5.0, 0.0, 5.0, 5.0))), "x1 < x2"),
    (with_regions(Region(0, (100.0, 0.0, 110.0, 5.0))), "outside the 100x50 image"),
    (with_regions(Region(1, (0.0, 0, 9, 9)), Region(1, (0.0, 0, 9, 9))), "id 1 is used twice"),
    (with_regions(Region(-1, (0.0, 0, 9, 9))), "negative"),
    (with_regions(width=0), "size 0x50"),
    (with_regions(statements=(Statement("s", "[2]?", "", ""),)), "statement s names region 2"),
    (with_regions(statements=(Statement("s", "", "", "", region=(4,)),)), "region 4"),
    (with_regions(verbalization=Verbalization(local={1: "x"})), "verbalization names region 1"),
  ],
)
def test_validate_names_what_is_wrong(record, culprit):
  with pytest.raises(DataError, match=f"a.jpg: .*{culprit}"):
    validate(record)
