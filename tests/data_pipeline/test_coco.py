"""COCO files: what an annotation becomes, what is left out and why, how bad files are named."""

import json
import os
from pathlib import Path

from PIL import Image
import pytest

from data_pipeline import images, stages
from data_pipeline.corpus_stages import verbalize_photographs
from data_pipeline.records import DataError, Region
from data_pipeline.sources import coco

REAL_SAMPLE = Path(
  os.environ.get("LSKD_REAL_SAMPLE", Path(__file__).parents[3] / "shared" / "real_sample")
)


def annotation(number, bbox, image_id=7, category_id=18, **others):
  values = {"id": number, "image_id": image_id, "category_id": category_id, "bbox": bbox}
  return values | others


def content(*annotations):
  return {
    "licenses": [{"id": 1, "name": "CC BY"}],
    "images": [
      {"id": 7, "file_name": "a.png", "width": 40, "height": 30, "license": 1},
      {"id": 5, "file_name": "b.png", "width": 20, "height": 20, "coco_url": "http://x/b"},
    ],
    "annotations": list(annotations),
    "categories": [{"id": 18, "name": "dog"}, {"id": 1, "name": "person"}],
  }


@pytest.fixture
def folder(tmp_path):
  """A folder with the two images of `content`; write(dict or bytes) -> path of the json."""
  Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
  Image.new("RGB", (20, 20)).save(tmp_path / "b.png")
  return tmp_path


def write(folder, value, name="instances.json"):
  path = folder / name
  path.write_bytes(value if isinstance(value, bytes) else json.dumps(value).encode())
  return path


def import_all(folder, value, **others):
  summary = verbalize_photographs(
    write(folder, value), folder, folder / "out", progress=False, **others
  )
  return summary, list(stages.read_records(folder / "out"))


def reasons(folder):
  lines = [path.read_text().splitlines() for path in sorted(folder.glob("out/rejected-*.jsonl"))]
  return [json.loads(line)["reason"] for line in sum(lines, [])]


def test_boxes_become_corners_numbered_in_the_order_of_annotations(folder):
  summary, records = import_all(
    folder,
    content(
      annotation(900, [1, 2, 10, 5.5]),
      annotation(901, [0, 0, 20, 20], image_id=5, category_id=1),
      annotation(902, [5, 5, 5, 5], category_id=1),
    ),
    split="val",
  )
  first, second = records
  assert first.regions == (
    Region(0, (1.0, 2.0, 11.0, 7.5), "dog", {"coco_id": 900, "coco_category": 18}),
    Region(1, (5.0, 5.0, 10.0, 10.0), "person", {"coco_id": 902, "coco_category": 1}),
  )
  assert (first.image, first.image_id, first.width, first.height) == ("a.png", 7, 40, 30)
  assert first.split == "val"
  assert first.extra == {"coco_id": 7, "licence": "CC BY"}
  assert second.extra == {"coco_id": 5, "source": "http://x/b"}
  assert (summary["records"], summary["regions"], summary["rejected"]) == (2, 3, 0)


def test_crowds_are_skipped_and_counted(folder):
  summary, records = import_all(
    folder,
    content(
      annotation(1, [0, 0, 40, 30], iscrowd=1, segmentation={"counts": [1]}),
      annotation(2, [0, 0, 5, 5], iscrowd=0),
    ),
  )
  assert summary["crowds"] == 1 and summary["rejected"] == 0
  assert [region.extra["coco_id"] for region in records[0].regions] == [2]
  assert records[0].extra["crowds"] == 1


def test_a_box_that_reaches_over_the_edge_is_clipped(folder):
  _, records = import_all(folder, content(annotation(1, [30, 20, 10.5, 10.25])))
  assert records[0].regions[0].box == (30.0, 20.0, 40.0, 30.0)


def test_unusable_boxes_are_rejected_with_file_and_annotation(folder):
  summary, records = import_all(
    folder,
    content(
      annotation(1, [3, 3, 0, 5]),
      annotation(2, [3, 3, 5, -1]),
      annotation(3, [40, 3, 5, 5]),
      annotation(4, [1, 2, 3]),
      annotation(5, [1, 2, float("nan"), 4]),
      annotation(6, [1, 1, 4, 4]),
    ),
  )
  assert [region.extra["coco_id"] for region in records[0].regions] == [6]
  assert records[0].regions[0].id == 0
  found = reasons(folder)
  assert [f"instances.json: annotation {n}: " in r for n, r in enumerate(found, 1)] == [True] * 5
  assert "no area" in found[0] and "no area" in found[1] and "outside the 40x30" in found[2]
  assert summary["rejected"] == 5


def test_images_that_are_missing_or_of_another_size_are_rejected(folder):
  (folder / "b.png").unlink()
  summary, records = import_all(folder, content())
  assert [record.image for record in records] == ["a.png"]
  assert "b.png: no such image" in reasons(folder)[0] and summary["rejected"] == 1


def test_an_image_of_another_size_than_stated_is_rejected(folder):
  Image.new("RGB", (80, 60)).save(folder / "a.png")
  import_all(folder, content())
  assert "a.png: is 80x60, instances.json says 40x30" in reasons(folder)[0]


def test_a_file_name_that_leaves_the_folder_is_rejected(folder):
  value = content()
  value["images"][0]["file_name"] = "../secret.png"
  import_all(folder, value)
  assert "leaves the image folder" in reasons(folder)[0]


def test_captions_become_part_of_the_verbalization(folder):
  captions = {
    "annotations": [
      {"id": 1, "image_id": 7, "caption": "A dog.\n"},
      {"id": 2, "image_id": 99, "caption": "of an image not listed"},
      {"id": 3, "image_id": 7, "caption": "Two."},
    ]
  }
  _, records = import_all(folder, content(), captions=write(folder, captions, "captions.json"))
  assert records[0].verbalization.captions == ("A dog.", "Two.")
  assert records[1].verbalization.captions == ()


def test_annotations_of_images_not_listed_are_passed_over(folder):
  rows = coco.load_coco(write(folder, content(annotation(1, [0, 0, 2, 2], image_id=12345))))
  assert [len(row["annotations"]) for row in rows] == [0, 0]


def without(key, *path):
  value = content(annotation(1, [0, 0, 2, 2]))
  row = value
  for step in path:
    row = row[step]
  del row[key]
  return value


@pytest.mark.parametrize(
  "value, culprit",
  [
    (json.dumps(content()).encode()[:-30], "not whole JSON"),
    (b'{"images": "\xff"}', "not UTF-8"),
    (b"[]", "'images' is missing"),
    (without("annotations"), "'annotations' is missing"),
    (without("categories"), "'categories' is missing"),
    (without("bbox", "annotations", 0), r"annotations\[0\]: key 'bbox' is missing"),
    (without("width", "images", 1), r"images\[1\]: key 'width' is missing"),
    (without("name", "categories", 0), r"categories\[0\]: key 'name' is missing"),
    (content(annotation(1, [0, 0, 2, 2], category_id=4)), "category_id 4 is not in"),
    (content(annotation("x", [0, 0, 2, 2])), r"annotations\[0\]: key 'id' is 'x'"),
    (content() | {"images": [content()["images"][0]] * 2}, "image id 7 is used twice"),
    (content() | {"images": [content()["images"][0] | {"id": -1}]}, "image id -1 is negative"),
    (content() | {"images": [3]}, r"images\[0\]: expected an object"),
  ],
)
def test_a_malformed_file_is_named_with_its_key(folder, value, culprit):
  with pytest.raises(DataError, match=f"instances.json: .*{culprit}"):
    coco.load_coco(write(folder, value))


def test_a_missing_file_is_named(tmp_path):
  with pytest.raises(DataError, match="none.json: cannot be read"):
    coco.load_coco(tmp_path / "none.json")


@pytest.mark.skipif(not REAL_SAMPLE.exists(), reason="the sample photographs are not here")
def test_real_photographs(tmp_path):
  summary = verbalize_photographs(
    REAL_SAMPLE / "instances.json", REAL_SAMPLE / "images", tmp_path / "out", progress=False
  )
  assert (summary["records"], summary["regions"] + summary["crowds"]) == (14, 119)
  assert summary["rejected"] == 0
  for record in stages.read_records(tmp_path / "out"):
    assert images.read_image(REAL_SAMPLE / "images" / record.image).size == (
      record.width,
      record.height,
    )
    assert record.extra["licence"] and all(region.label for region in record.regions)


def test_after_a_wrong_image_folder_the_right_one_is_read(folder):
  instances, out = write(folder, content()), folder / "out"
  with pytest.raises(DataError, match="nowhere: is not a folder"):
    verbalize_photographs(instances, folder / "nowhere", out, progress=False)
  (folder / "wrong").mkdir()
  with pytest.raises(DataError, match=r"holds no records \(2 rejected\)"):
    verbalize_photographs(instances, folder / "wrong", out, progress=False)
  assert len(reasons(folder)) == 2
  assert verbalize_photographs(instances, folder, out, progress=False)["records"] == 2
  assert len(list(stages.read_records(out))) == 2 and reasons(folder) == []
