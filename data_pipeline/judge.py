"""Judgements: a person's accept or reject of a statement, and how right its two parts are.

Three sources: people, who fill in a sheet (`write_sheet`); label files of the original system; and
for scenes the graph, which judges as people do, now and then wrongly. `accept` is 1 for accept
everywhere.
"""

from collections.abc import Iterable, Sequence
import csv
import dataclasses
from dataclasses import dataclass
import json
import math
from pathlib import Path

import numpy as np

from data_pipeline.records import DataError, ImageRecord, Statement, read_jsonl
from data_pipeline.sources import scenes

ACCEPT_WORDS = {"1", "1.0", "yes", "y", "true", "accept"}
REJECT_WORDS = {"0", "0.0", "no", "n", "false", "reject"}


@dataclass(frozen=True)
class Judgement:
  """One verdict on one statement.

  index: the statement's index. accept: 1 = accept, 0 = reject. answer_score, rationale_score: how
  right each part is (0..1 from sheets and scenes; the original's own scale in imported files), NaN
  when not given. judge: who judged.
  """

  index: str
  accept: int
  answer_score: float = math.nan
  rationale_score: float = math.nan
  judge: str = ""


# ---- judging scenes by their graph ----


def _holds(fact, scene):
  kind, region, value = fact
  allowed = value if isinstance(value, (list, tuple)) else [value]
  if kind in ("place", "weather"):
    return getattr(scene, kind) in allowed
  if kind in ("role", "thing", "pose"):
    return getattr(scene.figures[region], kind) in allowed
  raise DataError(f"a fact of kind {kind!r} cannot be judged from a scene; use a sheet for people")


def is_true(statement: Statement, scene: scenes.Scene) -> tuple[bool, bool]:
  """(answer is true, rationale is true) of a template statement, from the facts it rests on."""
  facts = statement.provenance
  if "facts" not in facts:
    raise DataError(
      f"statement {statement.index}: no facts in its provenance; only template statements have"
    )
  return tuple(all(_holds(f, scene) for f in facts[key]) for key in ("facts", "rationale_facts"))


def _chosen(records, share, per_image, rng):
  """(record, statement) pairs: `per_image` of some images, `share` of all statements in total."""
  if not 0 < share <= 1:
    raise DataError(f"share={share}: give a number in (0, 1]")
  wanted = round(share * sum(len(r.statements) for r in records))
  chosen = []
  for k in rng.permutation(len(records)).tolist():
    statements = records[k].statements
    for i in sorted(rng.permutation(len(statements))[:per_image].tolist()):
      if len(chosen) == wanted:
        return chosen
      chosen.append((records[k], statements[i]))
  if (
    len(chosen) < wanted
  ):  # every image has had its turn and the share is not reached: judge more of each
    seen = {id(s) for _, s in chosen}
    rest = [(r, s) for r in records for s in r.statements if id(s) not in seen]
    chosen += [rest[i] for i in sorted(rng.permutation(len(rest))[: wanted - len(chosen)].tolist())]
  return chosen


def judge_from_scene(
  records: Iterable[ImageRecord],
  rng: np.random.Generator,
  share: float = 0.05,
  wrong: float = 0.05,
  per_image: int = 3,
) -> list[Judgement]:
  """Judges a share of the statements by the truth, as careful people would.

  Args:
    records: scene records with statements.
    share: how many of all statements are judged; they come `per_image` on each of some images.
    wrong: the share of verdicts that is turned around.

  Returns:
    A list of `Judgement`. A verdict turned into a reject names the answer or the rationale at
    random.
  """
  judgements = []
  for record, statement in _chosen(list(records), share, per_image, rng):
    if "scene" not in record.extra:
      raise DataError(f"{record.image}: no scene graph to judge by; use a sheet for people")
    answer, rationale = is_true(statement, scenes.scene_from_dict(record.extra["scene"]))
    if rng.random() < wrong:
      if answer and rationale:
        answer = bool(rng.random() < 0.5)
        rationale = not answer
      else:
        answer = rationale = True
    judgements.append(
      Judgement(
        statement.index, int(answer and rationale), float(answer), float(rationale), "scene"
      )
    )
  return judgements


# ---- judgement files ----


def _score(value, where):
  if value is None or value == "":
    return math.nan
  word = str(value).strip().lower()
  if word in ACCEPT_WORDS:
    return 1.0
  if word in REJECT_WORDS:
    return 0.0
  try:
    return float(word)
  except ValueError:
    raise DataError(f"{where}: score {value!r} is not a number or yes/no") from None


def _verdict(value, where):
  word = str(value).strip().lower()
  if word in ACCEPT_WORDS:
    return 1
  if word in REJECT_WORDS:
    return 0
  raise DataError(f"{where}: verdict {value!r}; write 1 (accept) or 0 (reject)")


def judgement_from_row(row: dict, where: str = "row") -> Judgement | None:
  """A `Judgement` from one row of a judgement file, or None for a row nobody has filled in.

  Three forms are read. Ours: `accept` with `answer_score`, `rationale_score`. The original's two,
  with `qa_score`, `r_score`: `reject_label` (1 = reject), and `label`, a list of votes of which
  more than half must be "accept". When a row has both, `reject_label` counts.
  """
  index = str(row.get("index") or "")
  if not index:
    raise DataError(f"{where}: no `index`; each judgement names its statement")
  if row.get("accept") not in (None, ""):
    accept = _verdict(row["accept"], where)
  elif row.get("reject_label") not in (None, ""):
    accept = 1 - _verdict(row["reject_label"], where)
  elif isinstance(row.get("label"), list) and row["label"]:
    accept = _majority([_verdict(vote, where) for vote in row["label"]])
  elif "accept" in row:
    return None
  else:
    raise DataError(f"{where}: no verdict; needs `accept`, `reject_label` or a list `label`")
  answer = row.get("answer_score", row.get("qa_score"))
  rationale = row.get("rationale_score", row.get("r_score"))
  return Judgement(
    index, accept, _score(answer, where), _score(rationale, where), str(row.get("judge") or "")
  )


def read_judgements(path: str | Path) -> list[Judgement]:
  """The judgements of a .jsonl or .csv file: ours, filled-in sheets, the original's label files.

  One per statement, in the order of their first rows. Several rows of a statement, as of several
  people, become one: accepted if more than half accept, with the means of the scores given.
  """
  path = Path(path)
  if path.suffix == ".csv":
    try:
      with path.open(newline="", encoding="utf-8-sig") as file:
        rows = list(enumerate(csv.DictReader(file), 2))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
      raise DataError(f"{path}: cannot be read as CSV ({error})") from None
  else:
    rows = read_jsonl(path)
  by_index = {}
  for line, row in rows:
    judgement = judgement_from_row(row, f"{path}:{line}")
    if judgement is not None:
      by_index.setdefault(judgement.index, []).append(judgement)
  return [_together(votes) for votes in by_index.values()]


def _together(votes: list[Judgement]) -> Judgement:
  """One judgement of all those of a statement."""

  def mean(scores):
    given = [score for score in scores if not math.isnan(score)]
    return sum(given) / len(given) if given else math.nan

  return Judgement(
    votes[0].index,
    _majority([vote.accept for vote in votes]),
    mean([vote.answer_score for vote in votes]),
    mean([vote.rationale_score for vote in votes]),
    ", ".join(dict.fromkeys(vote.judge for vote in votes if vote.judge)),
  )


def _majority(votes: list[int]) -> int:
  return int(2 * sum(votes) > len(votes))


def write_judgements(path: str | Path, judgements: Iterable[Judgement]) -> None:
  """Writes judgements as jsonl, one per line; scores that are not given are left out."""
  lines = []
  for judgement in judgements:
    row = {k: v for k, v in dataclasses.asdict(judgement).items() if v == v}
    lines.append(json.dumps(row, ensure_ascii=False) + "\n")
  Path(path).write_text("".join(lines), encoding="utf-8")


# ---- sheets for people ----

_SHEET_COLUMNS = (
  "index",
  "image",
  "regions",
  "question",
  "answer",
  "rationale",
  "accept",
  "answer_score",
  "rationale_score",
  "judge",
)


def write_sheet(
  records: Iterable[ImageRecord],
  share: float,
  path: str | Path,
  seed: int = 0,
  per_image: int = 3,
) -> int:
  """Writes statements for a person to judge, as CSV or jsonl by the suffix of `path`.

  The person fills in `accept` (1 or 0) and, if they like, `answer_score`, `rationale_score` (0 to
  1) and `judge`; `read_judgements` reads the file back and skips what was left empty. `regions`
  gives the box of every region the statement is about, "id: x1,y1,x2,y2" in pixels.

  Returns:
    The number of statements on the sheet.
  """
  rows = []
  for record, statement in _chosen(list(records), share, per_image, np.random.default_rng(seed)):
    boxes = {r.id: ",".join(f"{v:.0f}" for v in r.box) for r in record.regions}
    rows.append(
      {
        "index": statement.index,
        "image": record.image,
        "regions": "; ".join(f"{i}: {boxes[i]}" for i in statement.region if i in boxes),
        "question": statement.question,
        "answer": statement.answer,
        "rationale": statement.rationale,
        "accept": "",
        "answer_score": "",
        "rationale_score": "",
        "judge": "",
      }
    )
  path = Path(path)
  with path.open("w", newline="", encoding="utf-8") as file:
    if path.suffix == ".csv":
      writer = csv.DictWriter(file, _SHEET_COLUMNS)
      writer.writeheader()
      writer.writerows(rows)
    else:
      file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
  return len(rows)


def split_judgements(
  judgements: Sequence[Judgement],
  records: Iterable[ImageRecord],
  held_out: float = 0.3,
  seed: int = 0,
) -> tuple[list[Judgement], list[Judgement]]:
  """Splits judgements by image, so that no image has judgements in both parts.

  Args:
    records: records that hold the judged statements; they say which image an index belongs to.
    held_out: share of the judged images in the second part.

  Returns:
    (training judgements, held-out judgements), each in the given order.
  """
  image_of = {s.index: r.image_id for r in records for s in r.statements}
  for judgement in judgements:
    if judgement.index not in image_of:
      raise DataError(f"judgement of {judgement.index!r}: no such statement in the records")
  images = sorted({image_of[j.index] for j in judgements})
  order = np.random.default_rng(seed).permutation(len(images))
  held = {images[i] for i in order[: round(held_out * len(images))].tolist()}
  return (
    [j for j in judgements if image_of[j.index] not in held],
    [j for j in judgements if image_of[j.index] in held],
  )
