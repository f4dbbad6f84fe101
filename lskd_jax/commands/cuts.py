"""The cut of a scored corpus: chosen on judgements, or given; measured either way."""
from collections.abc import Iterable
import dataclasses
from pathlib import Path

from data_pipeline import filter as filtering
from data_pipeline.records import DataError, ImageRecord
from lskd_jax.evidence import read_verdicts


def choose(records: Iterable[ImageRecord], judgements: Path | None, target_precision: float | None,
           min_score: float | None) -> dict | None:
  """What `cut.json` holds: the cut, and how good scores and cut are on the judgements.

  None without judgements and without a cut given. The precision of a cut is worth as much as the
  judgements are new to the critic.

  Raises:
    DataError: no judgement is about the corpus, statements have no score, or no cut reaches the
      target.
  """
  if judgements is None and target_precision is not None:
    raise DataError("--target-precision needs --judgements FILE to measure precision on")
  if judgements is None and min_score is None:
    return None
  scores = {s.index: s.score for record in records for s in record.statements}
  known = [score for score in scores.values() if score is not None]
  if not known:
    raise DataError("the statements have no scores; run `lskd corpus score` first")
  found = {} if min_score is None else {"cut": min_score, "rule": "given"}
  if judgements is not None:
    verdicts = read_verdicts(judgements)
    pairs = [(scores[i], accept) for i, accept in verdicts.items() if scores.get(i) is not None]
    if not pairs:
      raise DataError(f"{judgements}: none of its {len(verdicts)} judgements is about a scored "
                      "statement of this corpus; give the judgements of this corpus")
    found |= measure(*zip(*pairs), target_precision, min_score)
  kept = sum(score >= found["cut"] for score in known)
  return found | {"statements": len(scores), "kept": kept}


def measure(scores, labels, target_precision: float | None, min_score: float | None) -> dict:
  """The chosen cut with its precision and recall; average precision and ROC area of the scores."""
  if min_score is None:
    found = dataclasses.asdict(filtering.choose_cut(scores, labels, target_precision))
  else:
    kept = [label for score, label in zip(scores, labels) if score >= min_score]
    found = {"precision": sum(kept) / len(kept) if kept else None,
             "recall": sum(kept) / sum(labels) if any(labels) else None,
             "accepted": len(kept) / len(labels)}
  both = 0 < sum(labels) < len(labels)
  return found | {"judgements": len(labels), "right": sum(labels),
                  "average_precision": filtering.average_precision(scores, labels)
                  if any(labels) else None,
                  "roc_area": filtering.roc_auc(scores, labels) if both else None}


def in_words(found: dict | None) -> str:
  """What a person wants to know of `choose`'s result."""
  if found is None:
    return "no cut: give --judgements or --min-score to choose one"
  text = (f"cut: {found['cut']:.4f} ({found['rule']}) keeps {found['kept']} of "
          f"{found['statements']} statements")
  if "judgements" in found:
    def percent(share):
      return "–" if share is None else f"{100 * share:.1f} %"
    text += (f"\n  on {found['judgements']} judgements: precision {percent(found['precision'])} "
             f"(of all, {percent(found['right'] / found['judgements'])} are right), recall "
             f"{percent(found['recall'])}, average precision {percent(found['average_precision'])}")
  return text
