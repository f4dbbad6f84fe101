"""What `lskd eval` does: a benchmark's items, a model, and the files with what came of it."""
from collections.abc import Callable
import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from data_pipeline import images, regions
from data_pipeline.choices import SceneChoice, read_items
from data_pipeline.records import DataError
from data_pipeline.stages import write_json
from lskd_jax import parallel
from lskd_jax.evaluate import scenes
from lskd_jax.evaluate.candidates import Scorer
from lskd_jax.models import build

TEXT_TOKENS = 128  # at most, as in training
BATCH = {"student": 32, "generative": 8}  # items at a time; a decoder's vocabulary is large


def run_scenes(model_dir: Path, data: Path, image_root: Path, out: Path) -> dict:
  """Scores the items of a file; writes OUT/metrics.json, which it returns, and predictions.jsonl.

  Raises:
    DataError, CheckpointError: one line that names the file, item or folder.
  """
  items = read_items(data)
  if not items:
    raise DataError(f"{data}: holds no items")
  with jax.set_mesh(parallel.make_mesh(devices=jax.local_devices()[:1])):
    model = build.load(model_dir)
    if model.kind not in build.STUDENTS:
      raise DataError(f"{model_dir}: holds a {model.kind}; this benchmark needs a student")
    size = model.config.vit.image_size
    items, pictures = _with_pictures(items, image_root)
    scorer = _Remembering(Scorer(model.graph, model.state))
    overlay = _overlay(size) if model.config.region_mode in ("overlay", "both") else None
    if overlay is None:
      rows = {"features": scorer.features(np.stack([images.resize(p, size) for p in pictures]))}
    else:
      rows = {"image": pictures}
    columns = _columns(items)
    found = scenes.evaluate(
        scorer, items, rows, model.tokenizer, max_regions=model.config.max_regions,
        text_tokens=min(TEXT_TOKENS, model.config.max_tokens), image_size=pictures.shape[1],
        columns=columns, batch=BATCH[model.kind], overlay=overlay, progress=True)
  types = found.pop("types", {})
  metrics = {"benchmark": "scenes", "model": str(model_dir), "data": str(data),
             "items": len(items), "columns": found, "q_a_by_type": types}
  out.mkdir(parents=True, exist_ok=True)
  predictions = _predictions(items, columns, scorer.heard)
  lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in predictions]
  draft = out / ".predictions.jsonl.partial"
  draft.write_text("".join(lines), encoding="utf-8")
  draft.replace(out / "predictions.jsonl")
  write_json(out / "metrics.json", metrics)  # last: it marks a finished evaluation
  return metrics


class _Remembering:
  """A Scorer that keeps the scores it gave, in the order it was asked."""

  def __init__(self, scorer: Scorer):
    self.scorer, self.heads, self.features = scorer, scorer.heads, scorer.features
    self.heard: list[dict[str, np.ndarray]] = []

  def many(self, rows: dict, batch: int, label: str = "") -> dict[str, np.ndarray]:
    self.heard.append(self.scorer.many(rows, batch, label))
    return self.heard[-1]


def _with_pictures(items: list[SceneChoice], root: Path) -> tuple[list[SceneChoice], np.ndarray]:
  """The items with their picture's row as image id, and the pictures, uint8[N, size, size, 3]."""
  names = list(dict.fromkeys(item.image for item in items))
  pictures = [np.asarray(images.read_image(root / name)) for name in names]
  for name, picture in zip(names, pictures):
    if picture.shape != pictures[0].shape or picture.shape[0] != picture.shape[1]:
      height, width = picture.shape[:2]
      raise DataError(f"{root / name}: is {width}x{height}; drawn scenes are squares of one size")
  row = {name: k for k, name in enumerate(names)}
  return [dataclasses.replace(item, image_id=row[item.image]) for item in items], np.stack(pictures)


def _overlay(size: int) -> Callable:
  """(picture, boxes in [0, 1]) -> the picture with the boxes drawn, as the model sees it."""
  def draw(picture: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    drawn = regions.draw_overlay(Image.fromarray(picture), boxes * picture.shape[0])
    return images.resize(np.asarray(drawn), size)
  return draw


def _asked(items: list[SceneChoice]) -> dict[str, list[SceneChoice]]:
  """The items of each column, in the order in which the benchmark asks."""
  localized = [item for item in items if item.type != "caption"]
  return {"q_a": localized, "qa_r": localized, "q_ar": localized,
          "swap": [item for item in localized if item.swap is not None],
          "caption": [item for item in items if item.type == "caption"]}


def _columns(items: list[SceneChoice]) -> tuple[str, ...]:
  """The columns that there are items for."""
  return tuple(name for name in scenes.COLUMNS if _asked(items)[name])


def _predictions(items, columns, heard) -> list[dict]:
  """One row per item and column: the right choice, and each head's scores of all choices."""
  labels = {"qa_r": "rationale_label", "swap": "swap_label"}
  rows = []
  asked = [name for name in columns if name != "q_ar"]  # that one follows from two others
  for name, scores in zip(asked, heard, strict=True):
    for at, item in enumerate(_asked(items)[name]):
      given = {head: [float(s) for s in scores[head][at]] for head in scenes.HEADS if head in scores}
      rows.append({"column": name, "index": item.index, "image": item.image,
                   "label": getattr(item, labels.get(name, "label")),
                   "chosen": {head: int(np.argmax(values)) for head, values in given.items()},
                   "scores": given})
  return rows
