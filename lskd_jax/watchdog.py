"""A run that is alive but stuck is found, named and ended; the runtime itself waits for ever.

Each process writes its step and phase to a board that all can read (`peers.store()`), at most once a
second and from a thread, so a main thread that hangs leaves its last step there. A process that has
made no progress for too long dumps the stacks of all its threads, names the process that is furthest
behind, tells the others to do the same, and exits with 150.
"""
import collections
import faulthandler
import json
import math
from pathlib import Path
import signal
import statistics
import sys
import threading
import time

from lskd_jax import exit_codes, peers

LOOK_EVERY = 1.0  # seconds
FAREWELL = 2.0  # seconds between telling the others and ending, so that they dump their stacks too
# Compiling takes what it takes, and the others wait for it.
WAITED_FOR = ("start", "restore", "compile", "evaluate")
PATIENT = (*WAITED_FOR, "save")


class Watchdog:
  """Watches one process of a run; the main thread only says where it is.

      with Watchdog(workdir, hang_after=300, compile_limit=3600) as watch:
        watch.at("restore", 0)
        ...
        watch.at("step", step)

  Args:
    workdir: gets stacks-<process>.txt and crash-<process>.json.
    hang_after: seconds without progress in a step, or 10 median steps if that is longer.
    compile_limit: seconds in one start-up, restore, compile, evaluation or save.
    store, leave, clock: for tests. clock: wall time, which processes compare.
  """

  def __init__(self, workdir, hang_after: float, compile_limit: float, store=None, leave=peers.leave,
               clock=time.time):
    self._workdir, self._hang_after, self._compile_limit = Path(workdir), hang_after, compile_limit
    self._store, self._leave, self._clock = store or peers.store(), leave, clock
    self._steps = collections.deque(maxlen=64)  # seconds of the last steps
    self._where = {"step": 0, "phase": "start", "time": clock()}
    self._step_began = None
    self._written = None
    self._closed = threading.Event()
    self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")

  def at(self, phase: str, step: int) -> None:
    """The main thread is in `phase`, after `step` steps.

    Phases: start, features (without a limit), restore, compile, step, evaluate, save, data.
    """
    now = self._clock()
    if phase == "step":
      if self._step_began and self._step_began[0] == step - 1:
        self._steps.append(now - self._step_began[1])
      self._step_began = step, now
    self._where = {"step": step, "phase": phase, "time": now}

  def limit(self, phase: str) -> float:
    """Seconds that a phase may take."""
    if phase == "features":
      return math.inf  # every image of the corpus through the ViT
    if phase in PATIENT:
      return self._compile_limit
    return max(self._hang_after, 10 * statistics.median(self._steps or [0.0]))

  def __enter__(self):
    if threading.current_thread() is threading.main_thread():
      faulthandler.register(signal.SIGUSR1, file=sys.__stderr__, all_threads=True)  # stacks on demand
    self._thread.start()
    return self

  def __exit__(self, *unused):
    self._closed.set()
    self._thread.join(timeout=5)

  def _watch(self) -> None:
    while not self._closed.wait(LOOK_EVERY):
      try:
        self.look()
      except Exception:  # the store is gone, and so is process 0: its loss ends us elsewhere
        continue

  def look(self) -> None:
    """Writes our line on the board, and ends the process if it, or another one, is stuck."""
    where = self._where
    if where is not self._written:
      self._store.set(f"board/{self._store.index}", json.dumps(where))
      self._written = where
    stuck = self._store.list("stuck")
    if stuck:
      self._end(min(stuck.items())[1])
    elif self._clock() - where["time"] > self.limit(where["phase"]):
      board = {int(i): json.loads(line) for i, line in self._store.list("board").items()}
      busy = any(line["phase"] in WAITED_FOR and self._clock() - line["time"] <= self._compile_limit
                 for line in board.values())
      if not busy:
        self._end(self._verdict(board), tell=True)

  def _verdict(self, board: dict[int, dict]) -> str:
    """One line: which process is late, and where all of them are."""
    late = min(board, key=lambda i: (board[i]["step"], board[i]["time"]))
    lines = (f"process {i} at step {line['step']} in {line['phase']} for {self._clock() - line['time']:.0f} s"
             for i, line in sorted(board.items()))
    return f"no progress; process {late} is late ({'; '.join(lines)})"

  def _end(self, verdict: str, tell: bool = False) -> None:
    index = self._store.index
    if tell:
      self._store.set(f"stuck/{index}", verdict)
    print(f"lskd: process {index}: {verdict}; exit code {exit_codes.STUCK}", file=sys.stderr, flush=True)
    faulthandler.dump_traceback(sys.__stderr__, all_threads=True)
    try:
      with (self._workdir / f"stacks-{index}.txt").open("w") as file:
        faulthandler.dump_traceback(file, all_threads=True)
    except OSError:
      pass  # standard error has them
    peers.write_crash(self._workdir, index, {"code": exit_codes.STUCK, "reason": verdict, "at": self._where})
    if tell and self._store.count > 1:
      time.sleep(FAREWELL)
    self._leave(exit_codes.STUCK)
