"""What becomes of a run whose steps are skipped one after the other: it stops, and keeps the evidence."""
from collections.abc import Callable
import json
from pathlib import Path

import jax
import numpy as np

from lskd_jax import exit_codes
from lskd_jax.metrics import for_json


class NotFiniteError(ValueError):
  """Too many skipped steps in a row: one line, with the batch and how to look into it."""
  exit_code = exit_codes.NOT_FINITE


class Watch:
  """Called after every step with its number and metrics; raises NotFiniteError when it is enough.

  It looks at the step before, which is done or nearly done by then, so that the device always has a
  step to work on. All processes look at the same step, and so stop together.

  Args:
    workdir: the batch goes to `not_finite/step-N-process-I.npz`: this process's rows as the loader
      gives them, and `facts`, a JSON text with the step's metrics.
    max_skipped: how many steps in a row.
    batch_of: step number -> this process's rows, made anew; they are a function of the step.
    flush: writes the metrics of all steps so far, which a process that ends at once would lose.
  """

  def __init__(self, workdir, max_skipped: int, batch_of: Callable[[int], dict[str, np.ndarray]],
               flush: Callable[[], None] = lambda: None):
    self._folder, self._max, self._batch_of = Path(workdir) / "not_finite", max_skipped, batch_of
    self._flush = flush
    self._before = None

  def __call__(self, step: int, values: dict) -> None:
    values["skipped_in_row"].copy_to_host_async()
    self.look()
    self._before = step, values

  def look(self) -> None:
    """Looks at the newest step, which else is done when the next one comes; a run's last has no next."""
    before, self._before = self._before, None
    if before and int(jax.device_get(before[1]["skipped_in_row"])) >= self._max:
      self._flush()
      raise self._stop(*before)

  def _stop(self, step: int, values: dict) -> NotFiniteError:
    path = self._folder / f"step-{step}-process-{jax.process_index()}.npz"
    facts = {"step": step, "process": jax.process_index(), "processes": jax.process_count()}
    facts |= {name: for_json(float(value)) for name, value in jax.device_get(values).items()}
    try:
      self._folder.mkdir(parents=True, exist_ok=True)
      np.savez(path, **self._batch_of(step), facts=json.dumps(facts))
      kept = f"its batch is in {path}"
    except OSError as error:
      kept = f"its batch could not be saved ({error})"
    return NotFiniteError(
        f"{self._max} steps in a row had a loss or gradient that was not finite or above "
        f"train.max_grad_norm, the last of them step {step}; {kept}; look into it with the same command "
        f"and --reproduce-step {step}")
