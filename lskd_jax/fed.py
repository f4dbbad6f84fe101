"""Which examples a run was fed: a hash of all of them in order, and if wished a log."""
import hashlib
import json
from pathlib import Path

import jax
import numpy as np

from lskd_jax.metrics import read_metrics


class Fed:
  """A chain h(s + 1) = sha256(h(s), rows of the corpus, numbers of statements) over the steps of a run.

  It is made of what the jitted step returns, so of what was really fed, in the order of global rows,
  and does not depend on the mesh or the number of processes. Values are fetched one step late, so
  nothing waits for them; `flush` before `digest`.

  Args:
    workdir: the run's folder.
    step, digest: where a resumed run goes on.
    log: whether process 0 writes workdir/examples.jsonl, a line {"step", "image_id"} per step.
  """

  def __init__(self, workdir, step: int = 0, digest: str = "", log: bool = False):
    self.digest = digest
    self._pending = None
    self._file = None
    if log and jax.process_index() == 0:
      path = Path(workdir) / "examples.jsonl"
      kept = [line for line in read_metrics(path) if line["step"] <= step]
      partial = path.with_suffix(".partial")
      partial.write_text("".join(json.dumps(line) + "\n" for line in kept))
      partial.replace(path)
      self._file = path.open("a")

  def add(self, step: int, examples: dict) -> None:
    """What the step that ended as `step` was fed: image_id int32[B], statement int32[B, S], replicated."""
    self.flush()
    for array in examples.values():
      array.copy_to_host_async()
    self._pending = step, examples

  def flush(self) -> None:
    """Waits for the last step; then `digest` counts it."""
    if self._pending is None:
      return
    step, examples = self._pending
    self._pending = None
    values = [np.asarray(examples[name]).astype("<i4") for name in sorted(examples)]
    chain = hashlib.sha256(bytes.fromhex(self.digest))
    for value in values:
      chain.update(value.tobytes())
    self.digest = chain.hexdigest()
    if self._file:
      line = {"step": step, "image_id": np.asarray(examples["image_id"]).tolist()}
      self._file.write(json.dumps(line) + "\n")
      self._file.flush()

  def close(self) -> None:
    """Closes the log."""
    if self._file:
      self._file.close()
