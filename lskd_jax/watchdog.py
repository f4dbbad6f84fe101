"""A run that is alive but stuck is found, named and ended; the runtime itself waits for ever.

Each process writes its step and phase to a board that all can read (`peers.store()`), once a second and
from a thread, so a main thread that hangs leaves its last step there. A process that has made no progress
for too long dumps the stacks of all its threads, names the process that is furthest behind, tells the
others to do the same, and exits with 150.

A process whose thread no longer writes is lost. Collectives say so at once, but not barriers, such as those
of a save: these wait until a heartbeat is late by 100 s.
"""
import collections
import contextlib
import faulthandler
import json
import math
from pathlib import Path
import statistics
import sys
import threading
import time

from lskd_jax import errors, exit_codes, peers

LOOK_EVERY = 1.0  # seconds
FAREWELL = 2.0  # seconds between telling the others and ending, so that they dump their stacks too
SILENT = 30  # looks without a sign of life: the process is gone. Looks, since a suspended machine has none
SUSPENDED = 5.0  # seconds by which a look is late when the process or the machine has slept in between
LEFT = 5  # looks after a process ended with an error, in which the others may meet the same one
# Compiling takes what it takes, and the others wait for it.
WAITED_FOR = ("start", "restore", "compile", "evaluate")
PATIENT = (*WAITED_FOR, "save")
TRAINING = ("step", "data", "save")  # elsewhere one call may keep all threads of a process out


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
    self._slept = []  # (end, seconds) of each time the process was suspended
    self._signs = {}  # {(kind, process): (last sign, looks since it changed)}
    self._board = {}  # as it was last seen
    self._unanswered = 0  # looks since process 0 last answered
    self._closed = threading.Event()
    self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")

  def at(self, phase: str, step: int) -> None:
    """The main thread is in `phase`, after `step` steps.

    Phases: start, features (without a limit), restore, compile, step, wait (for the step), evaluate, log,
    save, data.
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
    self._thread.start()
    threading.Thread(target=self._watch_process_0, daemon=True, name="watchdog of process 0").start()
    return self

  def __exit__(self, *unused):
    self._closed.set()
    self._thread.join(timeout=5)

  def _watch(self) -> None:
    while True:
      before = self._clock()
      if self._closed.wait(LOOK_EVERY):
        return
      if self._clock() - before > LOOK_EVERY + SUSPENDED:
        self.slept(self._clock() - before)
      try:
        self.look()
      except Exception:  # the store is gone, and so is process 0: its loss ends us elsewhere
        continue

  def _watch_process_0(self) -> None:
    """Where it is silent, a look at the board may wait for it until its connection is given up."""
    while not self._closed.wait(LOOK_EVERY):
      self._unanswered += 1
      phase = self._board.get(0, self._where)["phase"]
      late = self._spent(self._where) > self.limit(self._where["phase"])
      if self._unanswered > SILENT and (phase in TRAINING or late):
        self._end(exit_codes.PEER_LOST, "process 0 does not answer")

  def slept(self, seconds: float) -> None:
    """The process was suspended for so long, until now; no phase took that time."""
    self._slept.append((self._clock(), seconds))

  def _spent(self, where: dict) -> float:
    """Seconds in the phase of `where`."""
    return self._clock() - where["time"] - sum(seconds for end, seconds in self._slept if end > where["time"])

  def look(self) -> None:
    """Writes our line on the board, and ends the process if it or another one is stuck or lost."""
    where = self._where
    self._store.set(f"board/{self._store.index}", json.dumps(where | {"alive": self._clock()}))
    board = self._board = {int(i): json.loads(line) for i, line in self._store.list("board").items()}
    self._unanswered = 0
    stuck, lost = self._store.list("stuck"), self._lost(board)
    if stuck:
      self._end(exit_codes.STUCK, min(stuck.items())[1])
    elif lost:
      self._end(exit_codes.PEER_LOST, lost)
    elif self._spent(where) > self.limit(where["phase"]):
      busy = any(line["phase"] in WAITED_FOR and self._clock() - line["time"] <= self._compile_limit
                 and self._signs["board", i][1] <= SILENT for i, line in board.items())
      if not busy:
        verdict = self._verdict(board)
        self._store.set(f"stuck/{self._store.index}", verdict)
        self._end(exit_codes.STUCK, verdict)

  def _lost(self, board: dict[int, dict]) -> str | None:
    """One line about a process that is gone; None if all are there."""
    fine = {str(code) for code in (exit_codes.DONE, *exit_codes.PREEMPTIONS)}
    for i, code in self._store.list("left").items():
      if code not in fine and self._looks_since("left", i, code) > LEFT:
        return f"process {i} ended with code {code}"
    for i, line in board.items():
      silent = self._looks_since("board", i, line["alive"]) > SILENT and i != self._store.index
      if silent and line["phase"] in TRAINING:
        return f"process {i} has given no sign of life since step {line['step']} in {line['phase']}"
    return None

  def _looks_since(self, kind: str, process, sign) -> int:
    before, looks = self._signs.get((kind, process), (None, 0))
    self._signs[kind, process] = sign, looks + 1 if sign == before else 0
    return self._signs[kind, process][1]

  def _verdict(self, board: dict[int, dict]) -> str:
    """One line: which process is late, and where all of them are.

    Of one that was stopped, the board may have the very step at which the others wait for it.
    """
    late = min(board, key=lambda i: (self._signs["board", i][1] <= 2, board[i]["step"], board[i]["time"]))
    lines = (f"process {i} at step {line['step']} in {line['phase']} for {self._clock() - line['time']:.0f} s"
             for i, line in sorted(board.items()))
    return f"no progress; process {late} is late ({'; '.join(lines)})"

  def _end(self, code: int, verdict: str) -> None:
    index = self._store.index
    with peers.deciding(code):  # others may see in the meantime that a peer which is as stuck has ended
      peers.write_crash(self._workdir, index, {"code": code, "reason": verdict, "at": self._where})
      with contextlib.suppress(OSError), (self._workdir / f"stacks-{index}.txt").open("w") as file:
        faulthandler.dump_traceback(file, all_threads=True)
      errors.say(f"lskd: process {index}: {verdict}; exit code {code}")
      with contextlib.suppress(OSError, ValueError):
        if errors.writable(sys.__stderr__, 1.0):
          faulthandler.dump_traceback(sys.__stderr__, all_threads=True)
      if self._store.count > 1:
        time.sleep(FAREWELL)
      self._leave(code)
