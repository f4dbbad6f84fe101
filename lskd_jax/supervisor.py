"""Starts the processes of one run, and starts them again when they ended for a reason that passes.

`decide` is the policy, a pure function that `launch` uses for pods as well. `supervise` runs real
processes on this machine under it. JAX is never imported here: a supervisor has to outlive it.
"""
import codecs
from collections.abc import Callable, Iterable
import contextlib
import os
from pathlib import Path
import re
import selectors
import signal
import socket
import subprocess
import sys
import time
from typing import NamedTuple

from lskd_jax import errors, exit_codes, signals

POLL = 0.02  # seconds between looks at the processes
LONGEST_BACKOFF = 64.0  # seconds


class Budgets(NamedTuple):
  """How often a run may be started again.

  failures: in a row without a newer durable step. preemptions: over the whole run; they are nobody's
  fault, so that their number only bounds a loop. backoff: seconds before the first restart; doubles
  with each failure in a row.
  """
  failures: int = 10
  preemptions: int = 10_000
  backoff: float = 1.0


class Tally(NamedTuple):
  """What has been used up: failures in a row without progress, preemptions in all."""
  failures: int = 0
  preemptions: int = 0


class Decision(NamedTuple):
  """restart after `delay` seconds, or stop with `code`; `why` says it in a few words."""
  restart: bool
  code: int
  tally: Tally
  delay: float
  why: str


DEFAULT = Budgets()
CONSEQUENCES = (exit_codes.PEER_LOST, 134)  # JAX aborts the processes that lose their coordinator


def decide(codes: Iterable[int], before: int | None, after: int | None, tally: Tally,
           budgets: Budgets) -> Decision:
  """What follows when all processes of a run have ended.

  Args:
    codes: exit codes in the order in which the processes ended; negative ones are signals. The first
      that is not 0 speaks for the run, since the others tend to be its consequences; codes that are
      consequences by their meaning speak only where there are no others.
    before, after: durable steps when the processes were started and now; None if there is none.
    tally: of the restarts so far.
  """
  ends = [shell_code(code) for code in codes if code]
  code = next((code for code in ends if code not in CONSEQUENCES), ends[0] if ends else exit_codes.DONE)
  if code == exit_codes.DONE:
    return Decision(False, code, tally, 0.0, "done")
  if not exit_codes.restarts(code):
    return Decision(False, code, tally, 0.0, f"a restart does not cure {describe(code)}")
  progress = after is not None and (before is None or after > before)
  failures = 0 if progress else tally.failures
  if code in exit_codes.PREEMPTIONS:
    tally = Tally(failures, tally.preemptions + 1)
    used, budget, name = tally.preemptions, budgets.preemptions, "preemptions"
    delay = budgets.backoff
  else:
    tally = Tally(failures + 1, tally.preemptions)
    used, budget, name = tally.failures, budgets.failures, "failures in a row without progress"
    delay = min(budgets.backoff * 2 ** (tally.failures - 1), LONGEST_BACKOFF)
  if used > budget:
    return Decision(False, code, tally, 0.0, f"{used} {name}, the last with {describe(code)}")
  where = "the start" if after is None else f"step {after}"
  return Decision(True, code, tally, delay, f"restarting {used}/{budget} from {where}")


def shell_code(code: int) -> int:
  """A process's code as a shell tells it: signal n is 128 + n."""
  return 128 - code if code < 0 else code


_MEANINGS = {
    exit_codes.DONE: "done", exit_codes.INPUT: "input to be mended",
    exit_codes.ARGUMENTS: "arguments to be mended", exit_codes.NOT_FINITE: "loss not finite",
    exit_codes.CANNOT_SAVE: "cannot save", exit_codes.PREEMPTED_SAVED: "preempted, saved",
    exit_codes.PREEMPTED: "preempted, not saved", exit_codes.INTERRUPTED: "interrupted",
    exit_codes.STUCK: "stuck", exit_codes.PEER_LOST: "another process lost"}


def describe(code: int) -> str:
  """A code with its meaning: "137 (SIGKILL)", "42 (preempted, saved)"."""
  meaning = _MEANINGS.get(code)
  if meaning is None and code > 128:
    with contextlib.suppress(ValueError):
      meaning = signal.Signals(code - 128).name
  return f"{code} ({meaning})" if meaning else str(code)


def newest_step(markers: Iterable[str]) -> int | None:
  """The newest step among paths such as `…/checkpoints/40/COMMITTED.json`; None if there is none."""
  found = (re.search(r"(?:^|/)checkpoints/(\d+)/COMMITTED\.json$", str(marker)) for marker in markers)
  return max((int(match[1]) for match in found if match), default=None)


def durable_step(workdir: Path | str) -> int | None:
  """The newest step of a work directory whose checkpoint is committed."""
  return newest_step(path.as_posix() for path in Path(workdir).glob("checkpoints/*/COMMITTED.json"))


# ---- processes on this machine ----

QUESTIONS = (signal.SIGUSR1, signal.SIGUSR2)  # for stacks and for a profile; a process goes on


class Caught(NamedTuple):
  """Signals so far: SIGTERM, SIGINT and the first SIGHUP, which end a run, and those of QUESTIONS."""
  ends: list[signal.Signals]
  questions: list[signal.Signals]


def supervise(command: list[str], processes: int, workdir: Path | str, *, devices: int = 1,
              budgets: Budgets = DEFAULT, linger: float = 30.0,
              environment: dict[str, str] | None = None) -> int:
  """Runs `command` as the processes of one run on this machine, and again under the policy.

  Each process gets `--processes N --process-id I --coordinator localhost:PORT` and its own set of
  `devices` CPU devices, and writes to `workdir/logs/process-I.log`; process 0 to the terminal, too.
  SIGTERM, SIGINT and SIGHUP become SIGTERM for all of them: they save and end, and are not started
  again. A second SIGTERM or SIGINT kills them. SIGUSR1 (show the stacks) is passed on to all, SIGUSR2
  (make a profile) to process 0.

  Args:
    linger: seconds that the others have to end by themselves once one process ended with a code
      other than 0. Then they get SIGTERM, and a third of that later SIGKILL.
    environment: variables beside those of this process.

  Returns the run's exit code; raises OSError if the command cannot be started.
  """
  logs = Path(workdir) / "logs"
  logs.mkdir(parents=True, exist_ok=True)
  say = _reporter(logs / "supervisor.log")
  tally, starts = Tally(), 0
  # A progress bar is written at once, and not when a buffer is full.
  variables = {**os.environ, **(environment or {}), "JAX_NUM_CPU_DEVICES": str(devices),
               "PYTHONUNBUFFERED": "1"}
  with _caught_signals() as caught:
    while True:
      starts += 1
      before = durable_step(workdir)
      say(f"start {starts}: {processes} process{'es' if processes > 1 else ''} with {devices} CPU "
          f"device{'s' if devices > 1 else ''} each, logs in {logs}")
      codes = _run_once(command, processes, variables, logs, linger, caught, say)
      decision = decide(codes, before, durable_step(workdir), tally, budgets)
      if caught.ends:
        say(f"stopped by {caught.ends[0].name}: ends with {describe(decision.code)}")
        return decision.code
      if not decision.restart:
        say(decision.why if decision.code == exit_codes.DONE else f"giving up: {decision.why}")
        return decision.code
      tally = decision.tally
      say(f"{decision.why} in {decision.delay:g} s")
      _sleep(decision.delay, caught)
      if caught.ends:
        say(f"stopped by {caught.ends[0].name} between two starts")
        return decision.code


def _run_once(command, processes, variables: dict, logs: Path, linger, caught, say) -> list[int]:
  """Starts all processes and waits for them; their codes in the order in which they ended."""
  place = f"localhost:{_free_port()}"
  running, codes = {}, []
  deadline, next_signal, passed_on = None, signal.SIGTERM, 0
  with contextlib.ExitStack() as stack, selectors.DefaultSelector() as outputs:
    try:
      for i in range(processes):
        log = stack.enter_context((logs / f"process-{i}.log").open("ab", buffering=0))
        child = subprocess.Popen(
            [*command, "--processes", str(processes), "--process-id", str(i), "--coordinator", place],
            env=variables, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=_begin,
            stdout=log if i else subprocess.PIPE, stderr=log if i else subprocess.PIPE)
        running[i] = child
        if i == 0:
          for pipe, target in ((child.stdout, sys.stdout), (child.stderr, sys.stderr)):
            os.set_blocking(stack.enter_context(pipe).fileno(), False)
            outputs.register(pipe, selectors.EVENT_READ, (log, target, _decoder()))
      while running:
        _pass_output(outputs, POLL)
        for i, child in list(running.items()):
          if child.poll() is not None:
            del running[i]
            codes.append(child.returncode)
            say(f"process {i} ended with {describe(shell_code(child.returncode))}")
            if child.returncode and deadline is None:
              deadline = time.monotonic() + linger
        heard = len(caught.ends)  # read once: a signal may come while the one before is passed on
        if heard > passed_on:
          _signal_all(running, signal.SIGKILL if passed_on else signal.SIGTERM)
          passed_on = heard
        while caught.questions:
          number = caught.questions.pop()
          for i, child in running.items():
            if i == 0 or number == signal.SIGUSR1:
              child.send_signal(number)
        if deadline is not None and running and time.monotonic() > deadline:
          say(f"process{'es' if len(running) > 1 else ''} {', '.join(map(str, running))} still there: "
              f"{next_signal.name}")
          _signal_all(running, next_signal)
          deadline, next_signal = time.monotonic() + linger / 3, signal.SIGKILL
      while _pass_output(outputs, 0):
        pass
    finally:  # nothing is left behind, whatever went wrong here
      _signal_all(running, signal.SIGKILL)
      for child in running.values():
        child.wait()
  return codes


def _signal_all(running: dict, number: signal.Signals) -> None:
  for child in running.values():
    child.send_signal(number)


def _pass_output(outputs, timeout: float) -> bool:
  """Copies what process 0 wrote to its log and to the terminal; whether there was anything.

  A terminal that stands still (Ctrl-S, a pager) misses some of it: the run goes on, and can be ended.
  """
  if not outputs.get_map():
    time.sleep(timeout)
    return False
  some = False
  for key, _ in outputs.select(timeout):
    log, target, decoder = key.data
    data = os.read(key.fd, 4096)  # what `errors.writable` is good for
    if not data:
      outputs.unregister(key.fileobj)
      continue
    some = True
    with contextlib.suppress(OSError):  # a full disk is for the run itself to notice
      log.write(data)
    text = decoder.decode(data)
    with contextlib.suppress(OSError):  # nobody reads any more; the run goes on
      if errors.writable(target, 0.1):
        target.write(text)
        target.flush()
  return some


def _decoder():
  return codecs.getincrementaldecoder("utf-8")("replace")


def _begin() -> None:
  """In a new process: no question ends it before it can answer, and it gets a SIGTERM when the supervisor is
  gone, so that no half of a run stays behind."""
  for number in QUESTIONS:
    signal.signal(number, signal.SIG_IGN)
  signals.end_with_parent(signal.SIGTERM)


def _free_port() -> int:
  with socket.socket() as found:
    found.bind(("localhost", 0))
    return found.getsockname()[1]


@contextlib.contextmanager
def _caught_signals():
  """A `Caught` whose lists grow; what was there before comes back at the end.

  A terminal that closes sends several SIGHUPs, of its shell and of the kernel: only the first signal may be
  one. It stays ignored where `nohup` has it so.
  """
  caught = Caught([], [])

  def handle(number, frame):
    if number in QUESTIONS:
      caught.questions.append(number)
    elif not (caught.ends and number == signal.SIGHUP):
      caught.ends.append(signal.Signals(number))

  numbers = [signal.SIGTERM, signal.SIGINT, *QUESTIONS]
  if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
    numbers.append(signal.SIGHUP)
  before = {number: signal.signal(number, handle) for number in numbers}
  try:
    yield caught
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)


def _sleep(seconds: float, caught: Caught) -> None:
  end = time.monotonic() + seconds
  while not caught.ends and time.monotonic() < end:
    time.sleep(min(POLL, seconds))


def _reporter(path: Path) -> Callable[[str], None]:
  """Prints a line, and adds it with the time to a file, if that can be written."""
  def say(text: str) -> None:
    with contextlib.suppress(OSError), path.open("a") as log:
      log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
    errors.say(f"supervisor: {text}")
  return say
