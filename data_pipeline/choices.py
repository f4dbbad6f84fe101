"""Questions with four choices about scenes, for measuring what a student learned.

The same teacher that writes the training statements writes them, but from true words. The wrong
choices are right for other regions of the same picture, so only looking where the question points
can tell. Every question can also be asked with the boxes of two regions traded: then another of its
choices is right.
"""

from collections.abc import Iterable
import dataclasses
from dataclasses import dataclass
import json
from pathlib import Path
import zlib

import numpy as np

from data_pipeline import teach, verbalize
from data_pipeline.records import DataError, ImageRecord, Region, read_jsonl
from data_pipeline.sources import scenes

CHOICES = 4


@dataclass(frozen=True)
class SceneChoice:
  """One question about one picture.

  type: a type of the teacher, or "caption" (which caption is of this picture; question and
  rationales empty). choices, label: the answers and which is right. rationales, rationale_label:
  the same for the rationale, to be chosen when the right answer is given. regions: all regions of
  the picture. target: the region ids the question is about. swap: two region ids whose boxes trade
  places; swap_label: the choice that is right afterwards.
  """

  index: str
  image: str
  image_id: int
  type: str
  question: str
  choices: tuple[str, ...]
  label: int
  rationales: tuple[str, ...] = ()
  rationale_label: int | None = None
  regions: tuple[Region, ...] = ()
  target: tuple[int, ...] = ()
  swap: tuple[int, int] | None = None
  swap_label: int | None = None


def _scene(record):
  if "scene" not in record.extra:
    raise DataError(f"{record.image}: no scene graph; these questions are made from scenes")
  return scenes.scene_from_dict(record.extra["scene"])


def trade(scene: scenes.Scene, i: int, j: int) -> scenes.Scene:
  """The scene after figures `i` and `j` traded places: region i now shows what region j showed."""
  figures = list(scene.figures)
  figures[i], figures[j] = figures[j], figures[i]
  return dataclasses.replace(scene, figures=tuple(figures))


def _read(scene):
  """The teacher's reader of the true words about a scene."""
  return teach.Reader(verbalize.verbalize_scene(scene, None, error_rate=0))


def _shuffled(texts, index):
  """The texts in an order drawn from the item's own index, and where the first one went."""
  order = np.random.default_rng(zlib.crc32(index.encode())).permutation(len(texts)).tolist()
  return tuple(texts[k] for k in order), order.index(0)


def _swap_for(scene, reader, type, target, partner, answers):
  """(swap, the answer right after it) when the target trades places with `partner`, or None."""
  i = target[0]
  j = target[1] if type == "relation" else partner[0]
  after = _read(trade(scene, i, j)).draft(type, target).answer
  return ((i, j), after) if after in answers[1:] else None


def _item(record, scene, reader, type, target, rng):
  """A `SceneChoice` about `target`; None without four different answers or a trade that matters."""
  right = reader.draft(type, target)
  others = [t for t in reader.targets(type) if t != target]
  others = [others[k] for k in rng.permutation(len(others)).tolist()]
  if type == "relation":  # the pair the other way round is what a trade of the two makes true
    others.sort(key=lambda t: t != target[::-1])
  chosen, texts = [target], {right.answer}
  for other in others:
    answer = reader.draft(type, other).answer
    if answer not in texts and len(chosen) < CHOICES:
      texts.add(answer)
      chosen.append(other)
  if len(chosen) < CHOICES:
    return None
  drafts = [reader.draft(type, t) for t in chosen]
  answers = [d.answer for d in drafts]
  swap = next(
    (s for t in chosen[1:] if (s := _swap_for(scene, reader, type, target, t, answers))), None
  )
  if swap is None:
    return None
  # Wrong choices keep the words of another region's answer but mention the regions asked about.
  form = rng.integers(0, 1 << 16, 3).tolist()
  spoken = [teach.phrase(dataclasses.replace(d, regions=target), *form) for d in drafts]
  rationales = list(dict.fromkeys(r for _, _, r in spoken))
  if len(rationales) < CHOICES:
    return None
  index = f"{record.image_id}-{type}-" + "-".join(map(str, target))
  choices, label = _shuffled([a for _, a, _ in spoken], index)
  rationales, rationale_label = _shuffled(rationales, index + "-rationale")
  swapped = spoken[answers.index(swap[1])][1]
  return SceneChoice(
    index,
    record.image,
    record.image_id,
    type,
    spoken[0][0],
    choices,
    label,
    rationales,
    rationale_label,
    record.regions,
    target,
    swap[0],
    choices.index(swapped),
  )


def choice_items(
  records: Iterable[ImageRecord], rng: np.random.Generator, per_image: int = 3
) -> list[SceneChoice]:
  """Questions about regions of held-out scenes, up to `per_image` a picture.

  The type asked least so far comes first, as far as a picture has four different answers to it.
  """
  counts = dict.fromkeys(teach.TYPES, 0)
  items = []
  for record in records:
    scene = _scene(record)
    reader = _read(scene)
    asked = []
    for type in sorted(teach.TYPES, key=lambda t: (counts[t], rng.random())):
      targets = reader.targets(type)
      for k in rng.permutation(len(targets)).tolist() if len(asked) < per_image else ():
        item = _item(record, scene, reader, type, targets[k], rng)
        if item is not None:
          asked.append(item)
          counts[type] += 1
          break
    items += asked
  return items


def caption_items(records: Iterable[ImageRecord], rng: np.random.Generator) -> list[SceneChoice]:
  """One question per picture: which of four true captions is of this picture?

  The wrong ones are captions of other records with as many figures and other content; a picture
  without three of those is left out.
  """
  records = list(records)
  shown = [_scene(record) for record in records]
  captions = [verbalize.verbalize_scene(scene, None, error_rate=0).captions for scene in shown]
  sized = {}
  for k, scene in enumerate(shown):
    sized.setdefault(len(scene.figures), []).append(k)
  items = []
  for k, record in enumerate(records):
    form = int(rng.integers(len(captions[k])))
    pool = sized[len(shown[k].figures)]
    texts = [captions[k][form]]
    for p in rng.permutation(len(pool)).tolist():
      other = pool[p]
      differs = (
        scenes.scene_key(shown[other]) != scenes.scene_key(shown[k])
        and captions[other][form] not in texts
      )
      if differs and len(texts) < CHOICES:
        texts.append(captions[other][form])
    if len(texts) == CHOICES:
      index = f"{record.image_id}-caption"
      choices, label = _shuffled(texts, index)
      items.append(
        SceneChoice(
          index,
          record.image,
          record.image_id,
          "caption",
          "",
          choices,
          label,
          regions=record.regions,
        )
      )
  return items


def write_items(path: str | Path, items: Iterable[SceneChoice]) -> None:
  """Writes items as jsonl, one per line."""
  lines = [json.dumps(dataclasses.asdict(item), ensure_ascii=False) + "\n" for item in items]
  Path(path).write_text("".join(lines), encoding="utf-8")


def read_items(path: str | Path) -> list[SceneChoice]:
  """The items of a file written by `write_items`."""
  items = []
  for line, row in read_jsonl(path):
    try:
      for key in ("choices", "rationales", "target"):
        row[key] = tuple(row[key])
      row["swap"] = tuple(row["swap"]) if row["swap"] else None
      row["regions"] = tuple(Region(**{**r, "box": tuple(r["box"])}) for r in row["regions"])
      items.append(SceneChoice(**row))
    except (KeyError, TypeError) as error:
      raise DataError(
        f"{path}:{line}: not a scene question ({error}); write it with write_items"
      ) from None
  return items
