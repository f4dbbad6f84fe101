"""How the processes of a run agree: on a value, on a problem, on what happened in the background.

`barrier`, `from_first` and `first_problem` are collective, and use the devices: all processes call
them in the same order, on the main thread. A `Word` needs neither.
"""
from collections.abc import Callable
import itertools
import json

import jax
from jax._src import distributed  # the key-value store has no public name
from jax.experimental import multihost_utils
import numpy as np

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
  """A value that one process says once, and all can hear without waiting for it.

  It goes through the coordination service, so it may be used on any thread, and is heard while
  devices are busy. All processes make their Words in the same order.
  """
  _numbers = itertools.count()

  def __init__(self):
    self._key = f"lskd_jax/word/{next(self._numbers)}"
    self._value = None

  def say(self, value: dict) -> None:
    """Says `value`, which JSON can hold. Of several, the first counts."""
    if jax.process_count() == 1:
      self._value = self._value or value
      return
    try:
      distributed.global_state.client.key_value_set(self._key, json.dumps(value))
      self._value = value  # to be heard here even if the service ends
    except jax.errors.JaxRuntimeError as error:
      if "ALREADY_EXISTS" not in str(error):
        raise

  def heard(self) -> dict | None:
    """The value, or None as long as nobody has said one."""
    if jax.process_count() > 1 and self._value is None:
      try:
        self._value = json.loads(distributed.global_state.client.key_value_try_get(self._key))
      except jax.errors.JaxRuntimeError as error:
        if "NOT_FOUND" not in str(error):
          raise
    return self._value
