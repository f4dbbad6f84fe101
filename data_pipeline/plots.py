"""The report's figures, as SVG text to be put inside a page.

matplotlib draws them, and three things are then changed in its output:
  colours become CSS variables of the page, so that one drawing is legible in light and dark mode;
  text stays text, in the page's own font, so that it can be read aloud, searched and copied;
  ids, dates and version numbers go, so that the same data always gives the same bytes.
"""

from dataclasses import dataclass
import io
import re

from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
import matplotlib.style
import numpy as np

# matplotlib only knows real colours. These stand for the page's until `_inline` names them.
INK, GRID, BAR = "#010101", "#010102", "#010103"
SERIES = tuple(f"#0102{k:02x}" for k in range(8))
DASHES = ("-", (0, (6, 2)), (0, (2, 1.5)), (0, (7, 2, 1.5, 2)))
STYLE = {
  "svg.fonttype": "none", "svg.hashsalt": "lskd", "text.parse_math": False, "font.size": 9.5,
  "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": INK,
  "axes.labelcolor": INK, "axes.titlesize": 11, "axes.grid": True, "axes.axisbelow": True,
  "grid.color": GRID, "grid.linewidth": 0.7, "xtick.color": INK, "ytick.color": INK,
  "text.color": INK, "legend.frameon": False, "lines.linewidth": 1.8,
  "hatch.color": GRID, "hatch.linewidth": 1.2,
}
WIDTH, HEIGHT = 5.4, 3.3    # inches; 72 SVG units each
MOST_POINTS = 400           # of one line; a precision-recall curve has one per statement
FEW_POINTS = 40             # up to so many, each point of a learning curve is marked


@dataclass(frozen=True)
class Curve:
  """A value over training steps. Curves of one `panel` share a plot; one `name`, one colour.

  `baseline` (chance, say) is drawn as a level grey line; the panel's first one that is set counts.
  """
  name: str
  steps: tuple[float, ...]
  values: tuple[float, ...]
  panel: str = ""
  baseline: float | None = None


@dataclass(frozen=True)
class CriticCurve:
  """Precision over recall of one critic, one point per threshold, in the order of the recall."""
  name: str
  recall: tuple[float, ...]
  precision: tuple[float, ...]
  average_precision: float


@dataclass(frozen=True)
class PrecisionRecall:
  """One critic or several over each other. All values are fractions in [0, 1].

  `cut` is the chosen threshold on the score and (`recall`, `after`) the point it gives: `after` is
  the precision of what is kept and `before` that of everything, without a critic.
  """
  critics: tuple[CriticCurve, ...]
  cut: float | None = None
  recall: float | None = None
  before: float | None = None
  after: float | None = None


@dataclass(frozen=True)
class Histogram:
  """Counts between `edges` (one more than counts). Several series are stacked: (name, counts).

  whole: the values are whole numbers, and so are the axis' marks. marker: a vertical line.
  """
  title: str
  caption: str
  edges: tuple[float, ...]
  series: tuple[tuple[str, tuple[int, ...]], ...]
  marker: float | None = None
  marker_label: str = ""
  xlabel: str = ""
  whole: bool = False


def series_style(k):
  """(CSS colour, matplotlib dash) of the k-th line. Dashes change with the colours, so that lines
  can be told apart without seeing colours."""
  return f"var(--s{k % len(SERIES)})", DASHES[k % len(DASHES)]


def curve_panels(curves):
  """Curves -> ([(panel, SVG)], names): the k-th name's line has the k-th `series_style`."""
  names = list(dict.fromkeys(c.name for c in curves))
  panels = []
  for panel in dict.fromkeys(c.panel for c in curves):
    chosen = [c for c in curves if c.panel == panel]
    with _style():
      figure, axes = _figure()
      for c in chosen:
        k = names.index(c.name)
        color, dashes = SERIES[k % len(SERIES)], DASHES[k % len(DASHES)]
        if len(c.steps) <= FEW_POINTS:
          axes.plot(c.steps, c.values, color=color, linestyle=dashes, marker="o", markersize=3.5)
        else:    # a noisy line hides the others: it stays faint behind its running mean
          axes.plot(c.steps, c.values, color=color, linewidth=0.8, alpha=0.25)
          axes.plot(c.steps, _running_mean(c.values), color=color, linestyle=dashes)
      baseline = next((c.baseline for c in chosen if c.baseline is not None), None)
      if baseline is not None:
        axes.axhline(baseline, color=INK, linewidth=1, linestyle=(0, (1, 3)))
      axes.set_xlabel("training step")
      panels.append((panel, _inline(figure, f"{panel or 'value'} over training steps")))
  return panels, names


def _running_mean(values):
  """Mean of each value and its neighbours, a thirtieth of the line to either side."""
  values, reach = np.asarray(values, float), max(1, len(values) // 30)
  total = np.concatenate([[0.0], np.cumsum(values)])
  place = np.arange(len(values))
  low, high = np.maximum(place - reach, 0), np.minimum(place + reach + 1, len(values))
  return (total[high] - total[low]) / (high - low)


def precision_recall_svg(result):
  """PrecisionRecall -> SVG text, with the chosen cut marked and the precision without it."""
  with _style():
    figure, axes = _figure(width=6.4, height=3.9)
    for k, critic in enumerate(result.critics):
      keep = np.unique(np.linspace(0, len(critic.recall) - 1, MOST_POINTS).round().astype(int))
      axes.plot(np.asarray(critic.recall)[keep], np.asarray(critic.precision)[keep],
                color=SERIES[k % len(SERIES)], linestyle=DASHES[k % len(DASHES)],
                label=f"{critic.name}, AP {critic.average_precision:.3f}")
    if result.before is not None:
      axes.axhline(result.before, color=INK, linewidth=1, linestyle=(0, (1, 3)),
                   label=f"keep everything: {result.before:.1%} true")
    if result.recall is not None and result.after is not None:
      label = "chosen cut" if result.cut is None else f"cut at {result.cut:.2f}"
      axes.plot([result.recall], [result.after], "o", markersize=9, markerfacecolor="none",
                color=INK, markeredgewidth=1.8, linestyle="none",
                label=f"{label}: {result.after:.1%} true")
    lowest = min([min(c.precision, default=0) for c in result.critics]
                 + [v for v in (result.before,) if v is not None], default=0)
    axes.set(xlabel="recall: share of the true statements that is kept",
             ylabel="precision: share of the kept that is true",
             xlim=(-0.02, 1.02), ylim=(max(0, lowest - 0.05), 1.03))
    figure.legend(loc="outside upper left", ncols=2)
    return _inline(figure, "precision over recall")


def histogram_svg(histogram):
  """Histogram -> SVG text. Stacked series differ in colour and in hatching."""
  with _style():
    figure, axes = _figure(width=4.8, height=2.7)
    edges = np.asarray(histogram.edges, float)
    bottom = np.zeros(len(edges) - 1)
    for k, (name, counts) in enumerate(histogram.series):
      axes.bar(edges[:-1], counts, np.diff(edges) * 0.92, bottom=bottom, align="edge",
               color=SERIES[k % len(SERIES)] if k else BAR, label=name,
               hatch="////" if k % 2 else None)
      bottom += np.asarray(counts)
    if histogram.marker is not None:
      axes.axvline(histogram.marker, color=INK, linewidth=1.4, linestyle=(0, (4, 2)),
                   label=histogram.marker_label or None)
    if len(histogram.series) > 1 or (histogram.marker is not None and histogram.marker_label):
      figure.legend(loc="outside upper left", ncols=3, handlelength=1.4, columnspacing=1.2)
    axes.grid(axis="x", visible=False)
    axes.yaxis.get_major_locator().set_params(integer=True, nbins=5)
    if histogram.whole:
      axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel(histogram.xlabel)
    return _inline(figure, histogram.title)


def _style():
  """The figures' settings, whatever the user's own matplotlib settings are."""
  return matplotlib.style.context(["default", STYLE])


def _figure(width=WIDTH, height=HEIGHT):
  figure = Figure(figsize=(width, height), layout="constrained")
  FigureCanvasSVG(figure)
  return figure, figure.add_subplot()


def _inline(figure, label):
  """A figure as an <svg> element that lives inside the page (see the module's docstring)."""
  buffer = io.StringIO()
  figure.savefig(buffer, format="svg", transparent=True,
                 metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
  svg = buffer.getvalue()
  svg = svg[svg.index("<svg"):]
  svg = re.sub(r"<svg [^>]*?(viewBox=\"[^\"]*\")[^>]*>",
               lambda m: f'<svg {m[1]} role="img" aria-label="{_attribute(label)}">', svg, count=1)
  svg = re.sub(r'<g id="[^"]*"', "<g", svg)
  svg = re.sub(r"<!--.*?-->|<style.*?</style>", "", svg, flags=re.DOTALL)    # it styles the page
  svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)
  svg = svg.replace(INK, "currentColor").replace(GRID, "var(--grid)").replace(BAR, "var(--bar)")
  for k, color in enumerate(SERIES):
    svg = svg.replace(color, f"var(--s{k})")
  return re.sub(r"\n\s*", "\n", svg).strip()


def _attribute(text):
  return (text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
          .replace('"', "&quot;"))
