"""Where the time of a run went, over all of its starts: the lines of `workdir/goodput.jsonl`.

Goodput is the time in steps that survived, divided by the wall time since the first start. A step that
a later start did again, because it lay behind the checkpoint that was restored, did not survive.
Everything else is badput, under the names of ml-goodput-measurement 0.2.3 (`BadputType`); evaluation is
what it calls a custom event.

    {"run": 0, "start": 1.7e9, "end": 1.7e9, "seconds": {"STEP": 28.1, "DATA_LOADING_SYNC": 1.9},
     "steps": [51, 100], "next": "STEP"}

A line is a stretch of time: which start it belongs to, seconds since 1970, how its time was spent, the
first and last step that were done in it, and what comes after it. A stretch ends with its phase, and
after `STRETCH` seconds of steps at the latest, so a week of steps is a few megabytes.
"""
from collections import Counter
from collections.abc import Callable
import json
from pathlib import Path
import time
from typing import NamedTuple

import jax

STRETCH = 30.0  # seconds of steps per line: what is not known about a process that was killed

STEP = "STEP"
INITIALIZATION = "TPU_INITIALIZATION"  # from the start of the process to the devices
PREPARATION = "TRAINING_PREP"  # corpus, model, loader
RESTORE = "UNPRODUCTIVE_CHECKPOINT_RESTORE_TIME"
STARTUP = "PROGRAM_STARTUP"  # the first step, which compiles
DATA = "DATA_LOADING_SYNC"
SAVE = "UNPRODUCTIVE_CHECKPOINT_SAVE_TIME"
EVALUATION = "EVAL"
OTHER = "OTHER"
END = "END"  # what comes after the last line; what is done then, such as writing the model, is OTHER
WASTED = "WASTED_PROGRESS_FROM_DISRUPTION"  # steps that were done again
RECOVERY = "INFRASTRUCTURE_RECOVERY_FROM_DISRUPTION"  # from the last sign of life to the next start

PARTS = {"data_wait": DATA, "evaluation": EVALUATION, "save": SAVE}  # by their names in metrics.jsonl


class Log:
  """Appends the lines of one start. Only process 0 writes; on the others every method does nothing.

      log = Log(workdir)                      # in INITIALIZATION
      log.phase(PREPARATION)                  # from here on
      ...
      log.phase(RESTORE)
      log.restored(step)
      log.phase(STARTUP); ...; log.phase(STEP)
      log.add("data_wait", 0.2)               # of the phase's time, this much went elsewhere
      log.step(now)
      ...
      log.close()

  Lines wait in memory until the folder exists: a run that is refused leaves none.

  Args:
    workdir: the run's folder; None writes nothing.
    began: when the process started, as `clock` tells it; by default now.
    clock: seconds since 1970, for tests.
  """

  def __init__(self, workdir, began: float | None = None, clock: Callable[[], float] = time.time):
    self._active = workdir is not None and jax.process_index() == 0
    if not self._active:
      return
    self._path, self._clock = Path(workdir) / "goodput.jsonl", clock
    earlier = read_lines(workdir)
    self._run = 1 + max((line["run"] for line in earlier), default=-1)
    self._start, self._phase = clock() if began is None else began, INITIALIZATION
    self._spent, self._facts, self._waiting = Counter(), {}, []

  def phase(self, name: str) -> None:
    """From now on the time belongs to `name`."""
    if self._active:
      self._end_stretch(name)
      self._phase = name

  def add(self, part: str, seconds: float) -> None:
    """So many seconds of the phase went into a part of PARTS."""
    if self._active:
      self._spent[PARTS[part]] += seconds

  def restored(self, step: int) -> None:
    """Training goes on behind this step; 0 without a checkpoint. What came later is done again."""
    if self._active:
      self._facts["restored"] = step

  def step(self, now: int) -> None:
    """Step number `now` is done."""
    if not self._active:
      return
    first = self._facts.get("steps", (now,))[0]
    self._facts["steps"] = first, now
    if self._clock() - self._start >= STRETCH:
      self._end_stretch(self._phase)

  def close(self) -> None:
    """Writes what is left; what follows is the end of the process, and may be closed again."""
    self.phase(END)

  def _end_stretch(self, following: str) -> None:
    end = self._clock()
    rest = end - self._start - sum(self._spent.values())
    idle = self._phase == END or self._phase == STEP and "steps" not in self._facts
    self._spent[OTHER if idle else self._phase] += max(rest, 0)
    seconds = {name: round(value, 3) for name, value in self._spent.items()}
    self._waiting.append({"run": self._run, "start": self._start, "end": end, "seconds": seconds,
                          **self._facts, "next": following})
    self._start, self._spent, self._facts = end, Counter(), {}
    if self._path.parent.exists():
      with self._path.open("ab+") as file:
        if file.tell() and (file.seek(-1, 2), file.read())[1] != b"\n":
          file.write(b"\n")  # behind a line that was torn when a process was killed
        file.write("".join(json.dumps(line) + "\n" for line in self._waiting).encode())
      self._waiting = []


def read_lines(workdir) -> list[dict]:
  """The lines of a run in order; [] if there are none. Torn lines are left out."""
  path, lines = Path(workdir) / "goodput.jsonl", []
  if path.exists():
    for text in path.read_text(errors="replace").splitlines():
      try:
        lines.append(json.loads(text))
      except ValueError:
        continue
  return [line for line in lines if isinstance(line, dict) and "seconds" in line]


class Summary(NamedTuple):
  """Where the time went: seconds, except `goodput`, a share of `wall`.

  starts: how often the run was started. end: the last sign of life, since 1970. phase: what it was
  about to do then. badput: by name, the largest first; with `productive` it adds up to `wall`.
  """
  wall: float
  goodput: float
  productive: float
  badput: dict[str, float]
  starts: int
  end: float
  phase: str


def summary(workdir) -> Summary | None:
  """Adds up the log of a run, running or not; None if it has none."""
  lines = read_lines(workdir)
  if not lines:
    return None
  restored = {line["run"]: line["restored"] for line in lines if "restored" in line}
  productive, badput, end = 0.0, Counter(), lines[0]["start"]
  for line in lines:
    badput[RECOVERY] += max(line["start"] - end, 0)  # 0 but between one start's last line and the next's
    end = max(end, line["end"])
    survived = _survived(line, restored)
    for name, seconds in line["seconds"].items():
      if name == STEP:
        productive += seconds * survived
        badput[WASTED] += seconds * (1 - survived)
      else:
        badput[name] += seconds
  wall = end - lines[0]["start"]
  badput = {name: seconds for name, seconds in badput.most_common() if seconds > 0}
  starts = len({line["run"] for line in lines})
  return Summary(wall, productive / wall if wall else 0.0, productive, badput, starts, end, lines[-1]["next"])


def _survived(line: dict, restored: dict[int, int]) -> float:
  """The share of a line's steps that no later start went back behind."""
  if "steps" not in line:
    return 1.0
  first, last = line["steps"]
  kept = min((step for run, step in restored.items() if run > line["run"]), default=last)
  return max(min(last, kept) - first + 1, 0) / (last - first + 1)


def describe(found: Summary) -> list[str]:
  """A line of goodput, and one for each kind of badput."""
  starts = f"{found.starts} start{'s' * (found.starts > 1)}"
  lines = [f"goodput {found.goodput:.1%} of {spell(found.wall)} since the first of {starts}"]
  for name, seconds in found.badput.items():
    lines.append(f"  {seconds / max(found.wall, 1e-9):6.1%}  {name}  {spell(seconds)}")
  return lines


def spell(seconds: float) -> str:
  """A length of time, to two figures of what matters: 1 d 02 h, 2 h 05 min, 3 min 20 s, 4.2 s."""
  if seconds < 60:
    return f"{seconds:.1f} s"
  minutes, rest = divmod(round(seconds), 60)
  if minutes < 60:
    return f"{minutes} min {rest:02} s"
  hours, minutes = divmod(minutes, 60)
  if hours < 24:
    return f"{hours} h {minutes:02} min"
  return f"{hours // 24} d {hours % 24:02} h"
