"""Preemption: all processes save at the same step, and end with an exit code that says so.

JAX's own service is not used: its C++ handler knows nothing of start-up and compiles, and any Python
handler installed later replaces it without a word. Here SIGTERM reaches a thread, whatever the main
thread does, and the threads of all processes agree through `peers.store()`:

1. who is told to stop writes so;
2. every process proposes the next step boundary that its loop has not passed;
3. the largest proposal counts. All save there, wait until it is on disk, and exit with 42.

A loop that comes to its own proposal waits for the others'. That cannot deadlock: they come from
threads, and every earlier step is dispatched. Where nothing can be saved, all exit with 43.
"""
import faulthandler
import signal
import sys
import threading
import time

from lskd_jax import errors, exit_codes, peers, signals

LOOK_EVERY = 0.2  # seconds between looks at what the others say
AGREE_WITHIN = 15.0  # seconds: a thread that has not proposed by then is gone
NOWHERE = -1  # the proposal of a process that has nothing to save


class Preempted(SystemExit):
  """The run was told to stop and has saved; the exit code is 42."""

  def __init__(self):
    super().__init__(exit_codes.PREEMPTED_SAVED)


class Agreement:
  """One event that is to meet all processes at the same boundary; its keys are under `name`."""

  def __init__(self, name: str):
    self.name = name
    self.reason = None  # once anyone has asked
    self.proposal = None  # ours
    self.boundary = None  # the agreed step, or NOWHERE
    self.since = None


class Preemption:
  """What a training loop asks at each step boundary, and the thread that knows the answer.

      stop = preemption.install()  # first of all
      ...
      stop.connect(workdir, grace=25)  # after jax.distributed
      ... first step ...
      stop.ready(step)
      while True:
        due = stop.at_boundary(step)  # None, "save" or "stop", the same on all processes

  Args:
    term: where SIGTERM and SIGHUP are noticed; None leaves it to others, as in tests and notebooks.
    leave: ends the process from a thread; for tests.
  """

  def __init__(self, term: signals.Term | None = None, leave=peers.leave):
    self._term, self._leave = term, leave
    self._store = None
    self._workdir = "."
    self._grace = 25.0
    self._asked = {}  # {kind: reason}, from this process, to be told to the others
    self._stop, self._save, self._saves = Agreement("stop"), Agreement("save-0"), 0
    self._position = None  # the next boundary the loop has not passed; None while nothing can be saved
    self._changed = threading.Condition()
    self._closed = threading.Event()
    self._warned = False
    self._clock = None  # runs from the first notice to the end
    self._thread = threading.Thread(target=self._watch, daemon=True, name="preemption")
    if term:
      self._thread.start()
      threading.Thread(target=self._listen, daemon=True, name="signals").start()

  # --- called by the main thread ---

  def connect(self, workdir, grace: float, store=None) -> None:
    """From here on processes agree. workdir: for crash records; grace: seconds from notice to end."""
    self._workdir, self._grace = workdir, grace
    self._store = store or peers.store()
    if not self._thread.is_alive():
      self._thread.start()

  def ready(self, step: int) -> None:
    """The state after `step` steps is there and can be saved at the next boundary."""
    with self._changed:
      self._position = step

  def at_boundary(self, step: int) -> str | None:
    """Tells that the loop is between two steps, after `step` of them; what is to be done there.

    Returns:
      "stop": save, wait until it is on disk, and raise Preempted. "save": save. None: go on.
    """
    due = None
    with self._changed:
      for kind, agreement in (("save", self._save), ("stop", self._stop)):
        if agreement.proposal is None:
          continue
        self._changed.wait_for(lambda: agreement.boundary is not None)
        if step == agreement.boundary:
          due = kind
        if kind == "save" and step >= agreement.boundary:
          self._saves += 1
          self._save = Agreement(f"save-{self._saves}")
      self._position = step + 1
    return due

  def ask(self, kind: str, reason: str) -> None:
    """Asks all processes to "save" or "stop" at the same boundary soon; from any thread."""
    self._asked.setdefault(kind, reason)
    if kind == "stop":
      self._start_clock()

  @property
  def stopping(self) -> bool:
    """Whether the run has been told to stop."""
    return self._stop.reason is not None

  def wait_until_told(self) -> None:
    """Returns once this process knows that the run is to stop, which another one already does."""
    with self._changed:
      self._changed.wait_for(lambda: self._stop.proposal is not None)

  def keep_handler(self) -> None:
    """Warns once if something has replaced our signal handlers, and puts them back."""
    replaced = self._term and self._term.keep()
    if replaced and not self._warned:
      self._warned = True
      errors.say(f"lskd: warning: {replaced}; it is ours again. Preemptions in between would have been "
                 "missed")

  def close(self) -> None:
    """Ends the thread and gives the signals back: the run is over. One that was told to stop ends, and what
    is told again while Python does so changes nothing."""
    self._closed.set()
    if self._clock:
      self._clock.cancel()
    if self._thread.is_alive():
      self._thread.join(timeout=5)
    if self._term:
      self._term.close(ignore=self.stopping)

  # --- threads: a signal is heard, and ends the process in time, also while process 0 does not answer ---

  def _listen(self) -> None:
    while not self._closed.is_set():
      if received := self._term.wait(LOOK_EVERY):
        self.ask("stop", received)
        return

  def _start_clock(self) -> None:
    if self._clock is None:
      self._clock = threading.Timer(self._grace, self._end,
                                    [f"no save within train.grace={self._grace:g} seconds"])
      self._clock.daemon = True
      self._clock.start()

  def _watch(self) -> None:
    while not self._closed.wait(LOOK_EVERY):
      try:
        self._look()
      except Exception as error:  # process 0, which keeps what processes say, cannot be reached
        self._end(f"process 0 cannot be reached ({errors.in_one_line(error)[:200]})")

  def _look(self) -> None:
    if self._store is not None:
      self._agree("stop", self._stop)
      self._agree("save", self._save)
    elif "stop" in self._asked:
      self._end("there is nothing to save yet")

  def _agree(self, kind: str, agreement: Agreement) -> None:
    store, name = self._store, agreement.name
    if agreement.boundary is not None or kind == "save" and self._position is None:
      return
    if agreement.reason is None:
      if kind in self._asked:
        reason = self._asked[kind] if kind == "stop" else self._asked.pop(kind)
        store.set(f"{name}/asked/{store.index}", reason)
      asked = store.list(f"{name}/asked")
      if not asked:
        return
      if kind == "stop":
        self._start_clock()
      process, reason = min(asked.items())
      with self._changed:  # the loop does not pass a boundary between the reading and the proposal
        agreement.proposal = NOWHERE if self._position is None else self._position
        agreement.since, agreement.reason = time.monotonic(), f"{reason} (process {process})"
        self._changed.notify_all()
      store.set(f"{name}/proposal/{store.index}", str(agreement.proposal))
    proposals = {int(i): int(step) for i, step in store.list(f"{name}/proposal").items()}
    if kind == "stop" and NOWHERE in proposals.values():
      self._end("there is nothing to save yet")
    elif len(proposals) == store.count:
      boundary = max(proposals.values())
      with self._changed:
        agreement.boundary = boundary
        self._changed.notify_all()
      if kind == "stop" and store.index == 0:
        errors.say(f"lskd: {agreement.reason}: all processes save at step {boundary} and stop")
    elif time.monotonic() > agreement.since + AGREE_WITHIN:
      silent = sorted(set(range(store.count)) - set(proposals))
      self._end(f"process {', '.join(map(str, silent))} says nothing")

  def _end(self, why: str) -> None:
    """Ends the process: preempted if it was to stop, else because another one is gone."""
    index = self._store.index if self._store else 0
    told = self._stop.reason or self._asked.get("stop")
    code = exit_codes.PREEMPTED if told else exit_codes.PEER_LOST
    with peers.deciding(code):
      if self._closed.is_set():
        return
      self._closed.set()
      if code == exit_codes.PEER_LOST:
        peers.write_crash(self._workdir, index, {"code": code, "reason": why})
      errors.say(f"lskd: process {index}: {f'{told}: ' if told else ''}{why}; exit code {code}")
      self._leave(code)


def install() -> Preemption:
  """Takes SIGTERM and SIGHUP over, for this process's main thread, and asks Google's metadata server.

  Call it as early as possible: what comes before ends the process without an exit code of ours. From here
  on SIGUSR1 prints the stacks of all threads, and SIGUSR2, which asks for a profile, ends no process that
  has no step to show yet or any more.
  """
  preemption = Preemption(signals.Term())
  faulthandler.register(signal.SIGUSR1, file=sys.__stderr__, all_threads=True)
  signal.signal(signal.SIGUSR2, signal.SIG_IGN)
  signals.watch_metadata(lambda reason: preemption.ask("stop", reason))
  return preemption
