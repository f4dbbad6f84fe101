"""How the processes of a run agree: on a value, on a problem, on what happened in the background.

`barrier`, `from_first` and `first_problem` are collective, and use the devices: all processes call
them in the same order, on the main thread. A `Word` needs neither.
"""
from collections.abc import Callable
import itertools
import json

import jax
from jax.experimental import multihost_utils
import numpy as np

from lskd_jax import peers

PROBLEM_BYTES = 1000  # of each process's problem: a gather needs one length


def barrier(name: str) -> None:
  """Returns when all processes have come here; `name` is the same on all of them."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)


def from_first(make: Callable[[], object]):
  """What `make()` returns on process 0, on all processes; only there it is called.

  So that all see the same folder, even where a network file system shows some hosts an older one.
  The value is anything JSON can hold. `make` must not raise: the others would wait for ever.
  """
  if jax.process_count() == 1:
    return make()
  text = json.dumps(make()).encode() if jax.process_index() == 0 else b""
  size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
  padded = np.frombuffer(text.ljust(size), np.uint8)
  return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(padded)).tobytes())


def first_problem(problem: str | None) -> str | None:
  """The problem of the first process that has one, on all processes; None if there is none."""
  if jax.process_count() == 1:
    return problem
  text = (problem or "").encode()[:PROBLEM_BYTES].ljust(PROBLEM_BYTES)
  texts = multihost_utils.process_allgather(np.frombuffer(text, np.uint8))
  for process, row in enumerate(np.asarray(texts)):
    if said := row.tobytes().decode(errors="replace").strip():
      return f"{said} (process {process})"
  return None


class Word:
  """A value that processes say, and all can hear without waiting for it.

  It goes through `peers.store()`, so it may be used on any thread, and is heard while devices are busy.
  All processes make their Words in the same order.
  """
  _numbers = itertools.count()

  def __init__(self):
    self._store = peers.store()
    self._folder = f"word/{next(self._numbers)}"
    self._own = None  # to be heard here even if the store is gone

  def say(self, value: dict) -> None:
    """Says `value`, which JSON can hold, for this process."""
    try:
      self._store.set(f"{self._folder}/{self._store.index}", json.dumps(value))
    finally:  # last: who hears it here may end this process at once
      self._own = value

  def heard(self) -> list[dict]:
    """What processes have said so far; [] as long as nobody has."""
    if self._own is not None:
      return [self._own]
    return [json.loads(text) for text in self._store.list(self._folder).values()]
