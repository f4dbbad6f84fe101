"""A run seen from outside, by what it leaves in its work directory: curves, last values, time, state."""
from collections.abc import Callable
import json
import math
from pathlib import Path
import shutil
import sys
import time
from typing import NamedTuple

from ml_collections import ConfigDict
import plotext

from data_pipeline.records import DataError
from lskd_jax import committed, goodput, guard
from lskd_jax.metrics import read_metrics

SILENT = 300.0  # seconds without a sign of life that are worth a word
SHARES = ("step", "data_wait", "evaluation", "save")


class State(NamedTuple):
  """What a run's work directory tells.

  lines: of metrics.jsonl. curves: the metrics that are drawn unless others are asked for. total: its
  steps, None if unknown. durable: the newest committed step. done: what done.json holds, None before.
  """
  lines: list[dict]
  curves: list[str]
  total: int | None
  durable: int | None
  goodput: goodput.Summary | None
  done: dict | None


def read(workdir) -> State:
  """Reads a work directory, of a run that is under way or over.

  Raises DataError if no run was started there.
  """
  workdir = Path(workdir)
  config = _json(workdir / "config.json")
  if config is None:
    raise DataError(f"{workdir}: no run was started here; give the --workdir of lskd train")
  done = _json(workdir / "done.json")
  saved = workdir / "checkpoints"
  steps = committed.steps(saved) if saved.exists() else []
  lines = read_metrics(workdir / "metrics.jsonl")
  total = done["step"] if done else planned_steps(config, lines)
  curves = [name for name in ("loss", "held_out_loss", config.get("guard", {}).get("metric"))
            if any(name in line for line in lines)]
  return State(lines, curves, total, max(steps, default=None), goodput.summary(workdir), done)


def planned_steps(config: dict, lines: list[dict]) -> int | None:
  """How many steps the run is to take: more than its config says once it was extended."""
  if "steps" not in config.get("optim", {}):
    return None
  config = ConfigDict(config)
  return config.optim.steps if guard.extended_after(config, lines) is None else guard.extended_steps(config)


def screen(workdir, now: float, width: int = 100, names: tuple[str, ...] = ()) -> str:
  """What there is to say about a run, as text.

  Args:
    now: seconds since 1970.
    width: columns.
    names: metrics to draw; () = the loss, and if an evaluation measures them its held-out loss and the
      metric of config.guard.
  """
  state = read(workdir)
  drawn = [curve(state.lines, name, width) for name in names or state.curves]
  return "\n".join([*drawn, *status(state, now), *values(state.lines)])


def status(state: State, now: float) -> list[str]:
  """How far the run is, whether it lives, and where its time went."""
  step = max([line["step"] for line in state.lines] + [state.durable or 0])
  text = f"step {step}" + (f" of {state.total} ({step / state.total:.0%})" if state.total else "")
  rates = [line["steps_per_second"] for line in state.lines if "steps_per_second" in line]
  rate = rates[-1] if rates else None
  if rate:
    text += f", {rate:.3g} steps/s"
  left = (state.total or step) - step
  if state.done is None and rate and left > 0:
    text += f", {goodput.spell(left / rate)} left"
  lines = [text, f"durable step: {'none yet' if state.durable is None else state.durable}"]
  found = state.goodput
  if state.done is not None:
    lines.append("finished: " + ", ".join(f"{name} {value}" for name, value in state.done.items()))
  elif found is not None:
    ago = goodput.spell(max(now - found.end, 0))
    if found.phase == goodput.END:
      lines.append(f"ending, or ended without being finished, {ago} ago; the same lskd train resumes it")
    elif now - found.end > SILENT:
      lines.append(f"no sign of life for {ago}, in {found.phase}: killed, stuck, or busy with something long")
    else:
      lines.append(f"running: {found.phase}, last sign of life {ago} ago")
  if found is not None:
    lines += goodput.describe(found)
  return lines


def values(lines: list[dict]) -> list[str]:
  """The newest value of every metric, with the shares of the time in a line of their own."""
  newest = {}
  for line in lines:
    newest |= line
  newest.pop("step", None)
  texts = []
  shares = {part: newest.pop(f"{part}_share") for part in SHARES if f"{part}_share" in newest}
  if shares:
    texts.append("time: " + " · ".join(f"{part} {share:.1%}" for part, share in shares.items()))
  words = [f"{name} {float(value):.4g}" for name, value in newest.items()]
  if words:
    texts.append("last: " + " · ".join(words))
  return texts


def curve(lines: list[dict], name: str, width: int = 100, height: int = 14) -> str:
  """A metric over the steps, drawn in `width` columns; neighbouring steps are averaged.

  Raises DataError if no line has the metric.
  """
  points = [(line["step"], float(line[name])) for line in lines if name in line]
  if not points:
    known = sorted({key for line in lines for key in line} - {"step"})
    raise DataError(f"metrics.jsonl has no {name!r} yet; it has {', '.join(known) or 'no line'}")
  finite = [point for point in points if math.isfinite(point[1])]
  size = -(-len(finite) // (2 * width)) or 1  # a braille character is two points wide
  groups = [finite[i:i + size] for i in range(0, len(finite), size)]
  title = name + (f" ({len(points) - len(finite)} not finite)" if len(finite) < len(points) else "")
  plotext.clear_figure()
  plotext.theme("clear")
  plotext.plot_size(width, height)
  plotext.title(title)
  plotext.plot([sum(step for step, _ in group) / len(group) for group in groups],
               [sum(value for _, value in group) / len(group) for group in groups], marker="braille")
  text = plotext.uncolorize(plotext.build())
  return "\n".join(row.rstrip() for row in text.splitlines())


def watch(workdir, once: bool = False, names: tuple[str, ...] = (), every: float = 3.0,
          clock: Callable[[], float] = time.time, sleep: Callable[[float], None] = time.sleep) -> None:
  """Prints a run's screen, again every few seconds until it is finished or Ctrl-C.

  Args:
    once: print it once.
  """
  while True:
    text = screen(workdir, clock(), shutil.get_terminal_size((100, 40)).columns, names)
    clear = "" if once or not sys.stdout.isatty() else "\x1b[2J\x1b[H"
    print(clear + text, flush=True)
    if once or read(workdir).done is not None:
      return
    sleep(every)


def _json(path: Path) -> dict | None:
  """A file that another process may be about to write; None if it is not there yet."""
  try:
    return json.loads(path.read_text())
  except (OSError, ValueError):
    return None
