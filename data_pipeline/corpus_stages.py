"""The stages of a corpus as plain functions: a source folder in, a stage folder out, resumable.

  verbalize_scenes        nothing  -> pictures and their words
  verbalize_photographs   photographs and boxes -> words
  teach_corpus            words    -> statements
  score_corpus            statements and a scorer -> scores

All return `run_stage`'s summary. Filtering is `filter.filter_corpus`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from data_pipeline import stages, teach, verbalize
from data_pipeline.records import DataError, ImageRecord, check_split
from data_pipeline.sources import coco, scenes


def verbalize_scenes(
  out: Path | str,
  count: int,
  seed: int = 0,
  error_rate: float = 0.25,
  exclude=(),
  min_figures: int = 3,
  max_figures: int = 6,
  split: str = "train",
  progress: bool = True,
  scenes_per_shard: int = 500,
) -> dict:
  """Draws `count` scenes under OUT/images and describes them, erring at `error_rate`.

  exclude: scene keys that must not occur (`scenes.scene_key`), such as those of held-out pictures.
  """
  check_split(split)
  out = Path(out)
  images, exclude = out / "images", frozenset(exclude)

  def work(i: int) -> ImageRecord:
    scene = scenes.make_scene(seed, i, exclude, min_figures, max_figures)
    record = scenes.scene_record(scene, scenes.image_name(seed, i), i, split)
    path = images / record.image
    path.parent.mkdir(parents=True, exist_ok=True)
    # A picture that a killed run left half-written is drawn again: its shard was not finished.
    scenes.picture(seed, i, scene).save(path, compress_level=1)
    return verbalize.verbalize(record, seed, error_rate)

  options = {
    "source": "scenes",
    "seed": seed,
    "error_rate": error_rate,
    "figures": [min_figures, max_figures],
    "split": split,
    "excluded": len(exclude),
  }
  shards = stages.split_evenly(list(range(count)), -(-count // scenes_per_shard))
  return stages.run_stage("verbalize", shards, work, out, options, progress)


def verbalize_photographs(
  annotations: Path | str,
  images: Path | str,
  out: Path | str,
  captions: Path | str | None = None,
  split: str = "train",
  progress: bool = True,
) -> dict:
  """Reads a COCO file and describes its pictures from their boxes.

  Left out and listed with the reason in rejected-*.jsonl: images that are missing, damaged or of
  another size than the file says, and boxes without area or outside their image. The summary has
  `crowds` too, the number of crowd annotations passed over. DataError when `images` is no folder, or
  no image is left.
  """
  check_split(split)
  if not Path(images).is_dir():
    raise DataError(f"{images}: is not a folder; give the one with the photographs")
  rows = coco.load_coco(annotations, captions)

  def work(row: dict) -> list:
    found = coco.coco_records(row, images, split, Path(annotations).name)
    return [r if isinstance(r, DataError) else verbalize.verbalize(r) for r in found]

  shards = stages.split_evenly(rows, -(-len(rows) // 500))
  options = {"source": "coco", "split": split}
  summary = stages.run_stage("verbalize", shards, work, out, options, progress)
  stages.open_shards(out)  # nothing to read is a mistake: says so
  return {**summary, "crowds": sum(map(coco.crowds, rows))}


def teach_corpus(
  source: Path | str, out: Path | str, per_image: int = 8, seed: int = 0, progress: bool = True
) -> dict:
  """The template teacher writes up to `per_image` statements for every verbalized image.

  DataError when it has nothing to say about any of them.
  """
  options = {"teacher": "template", "per_image": per_image, "seed": seed}

  def work(record: ImageRecord) -> ImageRecord:
    return teach.teach_record(record, seed, per_image)

  summary = stages.run_stage("teach", stages.open_shards(source), work, out, options, progress)
  if not summary["statements"]:
    labels = sorted({region.label for r in stages.read_records(out) for region in r.regions})
    raise DataError(
      f"{source}: the template teacher has nothing to say about regions labelled {labels[:8]}; it "
      "knows drawn scenes, the things of COCO's categories, and people beside these"
    )
  return summary


def score_corpus(
  source: Path | str,
  out: Path | str,
  score: Callable[[Sequence[ImageRecord]], Sequence[Sequence[float]]],
  options: dict,
  batch: int = 64,
  progress: bool = True,
) -> dict:
  """Gives every statement its score: P(accept) by a critic.

  score: records -> for each record the score of each of its statements.
  options: what makes the scores, such as the critic's directory and digest.
  """
  shards = [_grouped(shard, batch) for shard in stages.open_shards(source)]

  def work(records: list[ImageRecord]) -> list[ImageRecord]:
    scored = []
    for record, scores in zip(records, score(records), strict=True):
      if len(scores) != len(record.statements):
        raise DataError(f"{record.image}: {len(record.statements)} statements, {len(scores)} scores")
      pairs = zip(record.statements, scores, strict=True)
      statements = tuple(replace(s, score=float(value)) for s, value in pairs)
      scored.append(replace(record, statements=statements))
    return scored

  inputs = stages.fingerprint(stages.open_shards(source))
  return stages.run_stage("score", shards, work, out, options, progress, inputs=inputs)


def _grouped(shard, batch: int) -> Callable:
  """A function that returns the records of a shard in lists of `batch`."""

  def read() -> list[list[ImageRecord]]:
    records = list(shard)
    return [records[start : start + batch] for start in range(0, len(records), batch)]

  return read
