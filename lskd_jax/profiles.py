"""A profile of a running process on demand: traces of a few steps in `workdir/profiles/step-N/`.

`kill -USR2 PID` asks one process for three steps. A file `workdir/profile` asks process 0; it may hold
the number of steps, and is removed when it is seen. TensorBoard (with its profile plugin), XProf and
Perfetto read the result.
"""
from collections.abc import Callable
import logging
from pathlib import Path
import signal
import threading
import time

import jax
from tqdm import tqdm

log = logging.getLogger(__name__)

STEPS = 3
LOOK_EVERY = 5.0  # seconds between looks for the file: on a mounted bucket each one is a request


class Profiler:
  """Called after every step with its number and metrics. Nothing that goes wrong in it disturbs the run.

  Args:
    workdir: the run's folder.
    clock: seconds, for tests.
  """

  def __init__(self, workdir, clock: Callable[[], float] = time.monotonic):
    self._workdir, self._clock = Path(workdir), clock
    self._signalled = False
    self._looked = -LOOK_EVERY
    self._folder, self._last = None, 0  # of the trace under way
    self._restore = None
    if threading.current_thread() is threading.main_thread():  # others may not set handlers
      self._restore = signal.signal(signal.SIGUSR2, self._on_signal)

  def _on_signal(self, *unused) -> None:
    self._signalled = True

  def __call__(self, step: int, values: dict) -> None:
    try:
      if self._folder is None:
        steps = self._asked()
        if steps:
          jax.block_until_ready(values)  # the trace begins with a whole step
          self._begin(step, steps)
      elif step >= self._last:
        jax.block_until_ready(values)
        self._end()
    except Exception as error:
      log.warning("no profile: %s", error)
      self._folder = None

  def close(self) -> None:
    """Ends a trace that is under way, and gives the signal back."""
    if self._restore is not None:
      signal.signal(signal.SIGUSR2, self._restore)
    if self._folder is not None:
      try:
        self._end()
      except Exception as error:
        log.warning("no profile: %s", error)

  def _asked(self) -> int:
    """How many steps to trace from now on; 0 if nobody asked."""
    if self._signalled:
      self._signalled = False
      return STEPS
    if jax.process_index() > 0 or self._clock() - self._looked < LOOK_EVERY:
      return 0
    self._looked = self._clock()
    file = self._workdir / "profile"
    if not file.exists():
      return 0
    text = file.read_text().strip()
    file.unlink()
    if text and not (text.isdecimal() and int(text)):
      raise ValueError(f"{file} holds {text!r}, not a number of steps")
    return int(text or STEPS)

  def _begin(self, step: int, steps: int) -> None:
    process = f"-process-{jax.process_index()}" if jax.process_index() else ""
    folder = self._workdir / "profiles" / f"step-{step + 1}{process}"
    jax.profiler.start_trace(folder)
    self._folder, self._last = folder, step + steps

  def _end(self) -> None:
    folder, self._folder = self._folder, None
    jax.profiler.stop_trace()
    tqdm.write(f"profile: steps up to {self._last} are in {folder}")
