"""What the processes of a run tell each other outside of collectives, and how a process ends.

Texts by key, in the coordination service of `jax.distributed`, so they arrive also while a process
computes, compiles, or waits in a collective for one that never comes. A run of one process has a
dictionary instead.
"""
import contextlib
import json
import os
from pathlib import Path
import sys
import threading
import time
import traceback

from lskd_jax import errors, exit_codes

LINGER = 3.0  # seconds process 0 waits for the others to end: without its service they abort
LAST_WORDS = 10.0  # seconds

# Held by the thread that decides how this process ends, from before its last words; others wait for the end.
_deciding = threading.RLock()


@contextlib.contextmanager
def deciding(code: int):
  """For the thread that ends this process: others wait. Whatever the last words may wait for, a terminal, a
  file, process 0, the process is gone `LAST_WORDS` seconds later."""
  with _deciding:
    last = threading.Timer(LAST_WORDS, os._exit, [code])
    last.daemon = True
    last.start()
    try:
      yield
    finally:
      last.cancel()


class LocalStore:
  """Texts by key within one process; also stands in for the service in tests, shared by threads.

  index, count: this process's number, and how many the run has.
  """

  def __init__(self, index: int = 0, count: int = 1, texts: dict | None = None):
    self.index, self.count = index, count
    self._texts = {} if texts is None else texts

  def set(self, key: str, text: str) -> None:
    """Sets a text; the last one counts."""
    self._texts[key] = text

  def list(self, folder: str) -> dict[str, str]:
    """{rest of the key: text} of all keys that begin with `folder/`."""
    return {key.removeprefix(f"{folder}/"): text for key, text in list(self._texts.items())
            if key.startswith(f"{folder}/")}


class JaxStore:
  """The same in the coordination service. Raises JaxRuntimeError when process 0 cannot be reached."""

  def __init__(self, client, index: int, count: int):
    self._client, self.index, self.count = client, index, count

  def set(self, key: str, text: str) -> None:
    self._client.key_value_set(f"lskd/{key}", text, allow_overwrite=True)

  def list(self, folder: str) -> dict[str, str]:
    start = f"lskd/{folder}/"
    return {key.removeprefix(start): text for key, text in self._client.key_value_dir_get(start)}


def store() -> LocalStore | JaxStore:
  """The store of this run: the coordination service once `jax.distributed` is initialized."""
  # Not an import: signals are looked after before JAX is there.
  distributed = sys.modules.get("jax._src.distributed")
  state = getattr(distributed, "global_state", None)
  if getattr(state, "client", None) is None:
    return LocalStore()
  return JaxStore(state.client, state.process_id, state.num_processes)


def leave(code: int) -> None:
  """Ends this process now, from any thread: no `finally`, no barrier at exit that a lost peer delays.

  Process 0 goes last: the others abort as soon as its coordination service is gone. The first thread
  that comes here decides; a second one waits for the end.
  """
  with deciding(code):
    for stream in (sys.stdout, sys.stderr):
      with contextlib.suppress(OSError, ValueError):
        if errors.writable(stream, 0.1):
          stream.flush()
    farewell = threading.Thread(target=_say_farewell, args=(store(), code), daemon=True)
    farewell.start()  # in a thread, because a call to a service that is gone may block
    farewell.join(LINGER)
    os._exit(code)


def _say_farewell(store, code: int) -> None:
  if store.index:
    store.set(f"left/{store.index}", str(code))
  end = time.monotonic() + LINGER
  while store.index == 0 and len(store.list("left")) < store.count - 1 and time.monotonic() < end:
    time.sleep(0.05)


def write_crash(workdir, index: int, record: dict) -> None:
  """Writes workdir/crash-<process>.json: why this process ended."""
  path = Path(workdir) / f"crash-{index}.json"
  try:
    path.write_text(json.dumps({"process": index, "time": time.time(), **record}, indent=2) + "\n")
  except OSError as error:  # a full disk must not change the exit code
    errors.say(f"lskd: {path} cannot be written: {errors.in_one_line(error)}")


def is_lost_peer(error: BaseException) -> bool:
  """Whether an error out of a computation means that another process or its connection is gone."""
  kind, text = type(error).__name__, str(error)
  if kind == "ValueError":  # as which JAX raises some of them: UNKNOWN: Gloo AllGather failed: …
    return "Gloo" in text
  return kind in ("JaxRuntimeError", "XlaRuntimeError") and any(
      sign in text for sign in ("Gloo", "UNAVAILABLE", "ABORTED", "CANCELLED", "DEADLINE_EXCEEDED",
                                "oordination", "onnection", "eartbeat"))


class leaving_at_once:
  """Within it, an error ends a process of several at once, with its exit code and a crash record.

  The others would otherwise wait for it, and it for them, until the heartbeat times out. A run of one
  process raises as usual. A full disk has the exit code of a checkpoint that cannot be written, whatever
  met it first.

      with leaving_at_once(workdir, stop):
        ...

  Args:
    workdir: where the crash record goes; also what is full if an error about that names no file.
    stop: `preemption.Preemption`: peers that are lost while the run stops are preempted.
  """

  def __init__(self, workdir, stop=None):
    self._workdir, self._stop = workdir, stop

  def __enter__(self):
    return self

  def __exit__(self, kind, error, trace):
    if error is not None and errors.is_full_disk(error):
      error.exit_code = exit_codes.CANNOT_SAVE
      if isinstance(error, OSError) and error.filename is None:
        error.filename = str(self._workdir)
    found = store()
    if error is None or found.count == 1:
      return
    code = errors.exit_code(error)
    if is_lost_peer(error):
      code = exit_codes.PREEMPTED if self._stop and self._stop.stopping else exit_codes.PEER_LOST
    with deciding(code):
      self._end(found, error, code)

  def _end(self, found, error: BaseException, code: int) -> None:
    if code not in (exit_codes.DONE, *exit_codes.PREEMPTIONS):
      write_crash(self._workdir, found.index, {
          "code": code, "reason": errors.in_one_line(error), "traceback": traceback.format_exception(error)})
    if is_lost_peer(error):
      errors.say(f"lskd: process {found.index}: another process of this run is lost: "
                 f"{errors.in_one_line(error)[:300]}")
    elif not isinstance(error, SystemExit):
      errors.report(error)
    leave(code)
