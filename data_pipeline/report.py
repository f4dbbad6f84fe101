"""One HTML page about a corpus or a run: numbers, plots and a gallery of pictures with their boxes.

The page is a single file without scripts that never touches the network: plots and pictures are
inside it. `write_report` puts together whatever it is given (results table, learning curves,
precision and recall, funnel, figures, gallery) and leaves out the rest; `write_corpus_report`
gives it what a corpus alone can tell.

The same input gives the same bytes, and every text of the input is escaped.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
import contextlib
from dataclasses import dataclass
import os
from pathlib import Path
import re

import jinja2
import markupsafe
import numpy as np
from PIL import Image

from data_pipeline import plots
from data_pipeline.gallery import (
  GalleryGroup,
  GalleryItem,
  ShownStatement,
  gallery_groups,
  item_view,
)
from data_pipeline.plots import CriticCurve, Curve, Histogram, PrecisionRecall
from data_pipeline.records import DataError, ImageRecord, Statement, statement_mentions

__all__ = [
  "Bars", "CriticCurve", "Curve", "GalleryGroup", "GalleryItem", "Histogram", "PrecisionRecall",
  "ResultsTable", "ShownStatement", "corpus_figures", "gallery_groups",
  "write_corpus_report", "write_report",
]

MOST_BARS = 12    # categories of one figure; the rest becomes one bar


# --- what a page can show ------------------------------------------------------------------------

@dataclass(frozen=True)
class ResultsTable:
  """Rows of numbers, set like the results table of a paper; higher is better.

  rows: (name, cells) each; a cell is a number, None (not measured) or (number, interval text).
  chance: the cells of the grey first row. highlight: the name of the row the page is about.
  reference: names of rows shown for orientation (a ceiling, say), which cannot be the bold best.
  """
  columns: tuple[str, ...]
  rows: tuple[tuple[str, tuple], ...]
  chance: tuple | None = None
  highlight: str | None = None
  caption: str = ""
  reference: tuple[str, ...] = ()
  decimals: int = 1


@dataclass(frozen=True)
class Bars:
  """Counts of categories, drawn as horizontal bars."""
  title: str
  caption: str
  counts: tuple[tuple[str, int], ...]


# --- the page ------------------------------------------------------------------------------------

def write_report(
    path: Path | str, title: str, *, table: ResultsTable | None = None,
    curves: Sequence[Curve] | None = None, precision_recall: PrecisionRecall | None = None,
    funnel: Sequence[tuple[str, int]] | None = None,
    figures: Sequence[Histogram | Bars] | None = None,
    gallery: Sequence[GalleryGroup] | None = None, notes: Sequence[str] = (),
    facts: Mapping[str, str] | None = None, paper_table: ResultsTable | None = None) -> Path:
  """Writes the page and returns its path. Whatever is None or empty is left out.

  funnel: (step, count) in order; a count may grow where one thing becomes several.
  facts: name -> value, shown as tiles at the top. notes: paragraphs at the end.
  paper_table: published numbers, shown apart from `table` because they were measured elsewhere.
  The page is written under a temporary name and then renamed: a half-written one is never seen.
  """
  panels, names = plots.curve_panels(curves) if curves else ([], [])
  groups = [g for g in gallery or () if g.items]
  sections = {
    "results": ("Results", table and _table_view(table)),
    "paper": ("What the paper reports", paper_table and _table_view(paper_table)),
    "curves": ("Learning curves", [(name, _svg(svg)) for name, svg in panels]),
    "critic": ("Precision and recall of the critic",
               precision_recall and _svg(plots.precision_recall_svg(precision_recall))),
    "funnel": ("From pictures to corpus", _bars_view(funnel or (), steps=True)),
    "corpus": ("What the corpus holds", [_figure_view(f) for f in figures or ()]),
    "gallery": ("Gallery", [_group_view(g) for g in groups]),
    "notes": ("Notes", list(notes)),
  }
  page = _template().render(
    title=title, facts=dict(facts or {}), result=precision_recall,
    baselines=any(c.baseline is not None for c in curves or ()),
    sections={key: value for key, value in sections.items() if value[1]},
    legend=[(name, *plots.series_style(k)) for k, name in enumerate(names)],
    most_marks=max((len(i.boxes) for g in groups for i in g.items), default=0))
  return _write(Path(path), page)


def write_corpus_report(
    path: Path | str, title: str, records: Sequence[ImageRecord],
    load_image: Callable[[ImageRecord], Image.Image], *, cut: float | None = None,
    truth: Mapping[str, bool] | None = None, funnel: Sequence[tuple[str, int]] | None = None,
    notes: Sequence[str] = (), per_group: int = 8, seed: int = 0) -> Path:
  """The page about a corpus alone; returns its path. Scores, statements and truth may be missing.

  records: a list, or whatever else can be read several times. cut: the score from which on a
  statement is kept. truth: statement index -> is it right. funnel: as for `write_report`; without
  it, what the records themselves tell. DataError: no records.
  """
  statements = [s.score for record in records for s in record.statements]
  pictures, regions = sum(1 for _ in records), sum(len(r.regions) for r in records)
  if not pictures:
    raise DataError(f"{title}: the corpus has no pictures; run the stages before this one")
  steps = [("pictures", pictures), ("statements", len(statements))]
  if any(score is not None for score in statements):
    steps.append(("with a score", sum(score is not None for score in statements)))
    if cut is not None:
      kept = sum(score is not None and score >= cut for score in statements)
      steps.append((f"score of {cut:.2f} or more", kept))
  return write_report(
    path, title, funnel=funnel or (steps if statements else None), notes=notes,
    figures=corpus_figures(records, cut, truth),
    gallery=gallery_groups(records, load_image, cut, truth, per_group, seed),
    facts={"pictures": f"{pictures:,}", "regions": f"{regions:,}",
           "statements": f"{len(statements):,}"})


def _template():
  folder = Path(__file__).parent
  environment = jinja2.Environment(
    loader=jinja2.FileSystemLoader(folder), autoescape=True, undefined=jinja2.StrictUndefined,
    trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
  return environment.get_template("report.html.jinja")


def _write(path, text):
  temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary.write_text(text, encoding="utf-8", newline="\n")
    os.replace(temporary, path)
  except OSError as error:
    raise DataError(f"{path}: cannot write the report: {error.strerror or error}") from error
  finally:
    with contextlib.suppress(OSError):    # it was renamed, or never made
      temporary.unlink()
  return path


def _svg(text):
  """SVG made by `plots`, which has escaped the words in it."""
  return markupsafe.Markup(text)


def _table_view(table):
  """Cells as texts, and which of them is the best of its column."""
  def split(cell):
    value, interval = cell if isinstance(cell, tuple) else (cell, "")
    measured = value is not None and np.isfinite(value)
    return (f"{value:.{table.decimals}f}" if measured else "–"), interval
  rows = [(name, [split(c) for c in cells]) for name, cells in table.rows]
  best = []
  for column in range(len(table.columns)):
    shown = [cells[column][0] for name, cells in rows if name not in table.reference]
    best.append(max((s for s in shown if s != "–"), key=float, default=None))
  return {
    "columns": table.columns, "caption": table.caption,
    "chance": table.chance and [split(c) for c in table.chance],
    "rows": [{
      "name": name, "highlight": name == table.highlight, "reference": name in table.reference,
      "cells": [(text, interval, text == top and name not in table.reference)
                for (text, interval), top in zip(cells, best, strict=True)],
    } for name, cells in rows],
  }


def _bars_view(counts, steps=False):
  """Bars with their width in percent of the longest. `steps`: each also against the one before."""
  longest = max((n for _, n in counts), default=0)
  total = sum(n for _, n in counts)
  bars, before = [], None
  for label, n in counts:
    if not steps:
      note = f"{n / total:.1%}" if total else ""
    elif not before:
      note = ""
    else:
      note = f"{n / before:.1%} of the step before" if n <= before else f"{n / before:.1f} for each"
    bars.append({"label": label, "count": f"{n:,}", "note": note,
                 "width": f"{100 * n / longest if longest else 0:.2f}"})
    before = n
  return bars


def _figure_view(figure):
  bars = isinstance(figure, Bars)
  return {"title": figure.title, "caption": figure.caption,
          "bars": _bars_view(figure.counts) if bars else [],
          "svg": "" if bars else _svg(plots.histogram_svg(figure))}


def _group_view(group):
  return {"title": group.title, "caption": group.caption, "anchor": _anchor(group.title),
          "items": [item_view(item) for item in group.items]}


def _anchor(title):
  return "gallery-" + re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


# --- figures of a corpus --------------------------------------------------------------------------

def corpus_figures(records: Iterable[ImageRecord], cut: float | None = None,
                   truth: Mapping[str, bool] | None = None) -> list[Histogram | Bars]:
  """What a corpus holds, in figures: scores (with the cut, and split by truth where it is known),
  statements and regions per picture, mentions and words per statement, question types, sources.

  One pass; keeps a few numbers per statement. Figures without data are left out.
  """
  per_image, regions, per_statement, words = [], [], [], []
  types, sources = Counter(), Counter()
  scores = {"true": [], "false": [], "scored": []}
  for record in records:
    per_image.append(len(record.statements))
    regions.append(len(record.regions))
    for s in record.statements:
      per_statement.append(len(statement_mentions(s)))
      words.append(len(f"{s.question} {s.answer} {s.rationale}".split()))
      types[_question_type(s)] += 1
      sources[s.source or "not named"] += 1
      if s.score is not None:
        known = None if truth is None else truth.get(s.index)
        scores["scored" if known is None else "true" if known else "false"].append(s.score)
  edges = np.linspace(0, 1, 26)
  split = tuple((name, tuple(np.histogram(np.clip(v, 0, 1), edges)[0].tolist()))
                for name, v in scores.items() if v)
  meaning = "" if cut is None else "; what is right of the cut is kept"
  figures = [Histogram(
    "Scores", f"How sure the critic is of each statement{meaning}.", tuple(edges.tolist()), split,
    cut, "" if cut is None else f"cut {cut:.2f}", "score, P(accept)")] if split else []
  figures += [_count_histogram(*f) for f in (
    ("Statements per picture", "How many statements a picture has.", per_image, "statements"),
    ("Regions per picture", "How many regions a picture has.", regions, "regions"),
    ("Mentions per statement", "How many different regions a statement points at.", per_statement,
     "regions mentioned"),
    ("Words per statement", "Length of question, answer and rationale together.", words, "words"),
  ) if any(f[2])]
  figures += [Bars(title, caption, _top(counts)) for title, caption, counts in (
    ("Questions", "What is asked: the question's type, or else its first word.", types),
    ("Sources", "Which prompt variant wrote the statement.", sources)) if counts]
  return figures


def _question_type(statement: Statement):
  named = statement.provenance.get("type") or statement.extra.get("type")
  return str(named or (statement.question.lower().split() or ["(empty)"])[0])


def _count_histogram(title, caption, values, xlabel):
  # Between 9 and 30 bars: a single one would fill the plot and say nothing.
  low = max(0, min(min(values), max(values) - 4))
  high = max(max(values), low + 8)
  step = -(-(high - low + 1) // 30)
  edges = np.arange(low, high + step + 1, step) - 0.5
  counts = tuple(np.histogram(values, edges)[0].tolist())
  return Histogram(title, f"{caption} Mean {np.mean(values):.1f}, largest {max(values)}.",
                   tuple(edges.tolist()), ((title, counts),), xlabel=xlabel, whole=True)


def _top(counts):
  ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
  rest = ordered[MOST_BARS:]
  if not rest:
    return tuple(ordered)
  return (*ordered[:MOST_BARS], (f"{len(rest)} others", sum(n for _, n in rest)))
