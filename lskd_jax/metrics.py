"""What a run reports: values over steps, throughput, and the share of peak FLOP/s in use."""
from collections.abc import Callable, Mapping
import contextlib
import functools
import json
import math
import os
from pathlib import Path
import re
import time

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.interpreters import partial_eval
import numpy as np

from lskd_jax.tensorboard import Board

# --- values over steps ---------------------------------------------------------------------------


class MetricWriter:
  """Writes scalars to `workdir/metrics.jsonl` and, for TensorBoard, to `workdir/tensorboard/`.

  The file has one line per logged step, {"step": 120, "loss": 0.7, ...}, with steps strictly
  increasing, also over restarts. Infinite and undefined values are the strings "Infinity",
  "-Infinity" and "NaN", since JSON has no numbers for them; Python's `float` reads them.

  Writing does not wait for the device: the values of a step are fetched when the next ones come.
  Call `flush` before each checkpoint, so that the file has every step that a checkpoint has.

  Only process 0 writes; on the others every method does nothing. `workdir` is a local or mounted
  folder.

  Args:
    workdir: the run's folder, made when missing.
    step: the step this run resumes from; lines after it are dropped, and so is a torn last line.
    tensorboard: False writes only the jsonl file.
  """

  def __init__(self, workdir, step: int = 0, tensorboard: bool = True):
    self.active = jax.process_index() == 0
    if not self.active:
      return
    workdir = Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    self.path = workdir / "metrics.jsonl"
    self._pending = None  # (step, values still on the device)
    kept = [line for line in read_metrics(self.path) if line["step"] <= step]
    self._last = kept.pop() if kept else {"step": -1}  # may still get more values
    temporary = self.path.with_suffix(".partial")
    temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
    temporary.replace(self.path)
    self._file = self.path.open("a")
    self._start_of_last = self._file.tell()
    if self._last["step"] >= 0:
      self._write_line()
    self._board = Board(workdir / "tensorboard", step) if tensorboard else None

  def write(self, step: int, values: Mapping) -> None:
    """Records scalars by name (arrays on the device, or numbers) for `step`.

    Values for the step of the call before are added to its line.

    Raises:
      ValueError: `step` is earlier than one already written.
    """
    if not self.active:
      return
    newest = self._pending[0] if self._pending else self._last["step"]
    if step < newest:
      raise ValueError(f"metrics of step {step} come after those of step {newest}")
    self._fetch()
    for value in jax.tree.leaves(dict(values)):
      if isinstance(value, jax.Array):
        value.copy_to_host_async()
    self._pending = step, dict(values)

  def flush(self) -> None:
    """Waits for the values given so far and puts them on disk, or into the bucket that is mounted there."""
    if self.active:
      self._fetch()
      os.fsync(self._file.fileno())

  def _fetch(self) -> None:
    if self._pending is None:
      return
    step, values = self._pending
    self._pending = None
    values = {name: float(value) for name, value in jax.device_get(values).items()}
    if step != self._last["step"]:
      self._start_of_last = self._file.tell()
      self._last = {"step": step}
    self._last |= {name: for_json(value) for name, value in values.items()}
    self._write_line()
    if self._board:
      self._board.add(step, values)

  def _write_line(self) -> None:
    """Writes the last line, in place of what the file has of it."""
    self._file.truncate(self._start_of_last)
    self._file.seek(self._start_of_last)
    self._file.write(json.dumps(self._last) + "\n")
    self._file.flush()

  def close(self) -> None:
    """Flushes and closes the files."""
    self.flush()
    if self.active:
      self._file.close()
      if self._board:
        self._board.close()

  def __enter__(self):
    return self

  def __exit__(self, *unused):
    self.close()


def read_metrics(path) -> list[dict]:
  """The lines of a metrics file in order; [] if there is none. A torn line is left out."""
  path = Path(path)
  if not path.exists():
    return []
  lines = []
  for text in path.read_text(errors="replace").splitlines():
    try:
      line = json.loads(text)
    except ValueError:
      continue
    if isinstance(line, dict) and "step" in line:
      lines.append(line)
  return lines


def for_json(value: float) -> float | str:
  """A number, or its name where JSON has none for it; `float` reads both."""
  if math.isfinite(value):
    return value
  return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


# --- throughput ----------------------------------------------------------------------------------


class Throughput:
  """Rates since the last report, and what the time went into.

      rates = Throughput(step_flops(plain_step.trace(...)), peak_flops(device) * device_count)
      with rates.waiting():
        batch = next(batches)
      state, metrics = train_step(state, batch)
      rates.count(images=256, statements=1024)
      ...
      writer.write(step, metrics | rates.report())

  A step is counted when it is dispatched, not when it is done; over a report interval the two agree
  as long as something, such as `MetricWriter`, waits for earlier steps.

  Args:
    flops_per_step: model FLOPs of one step on all devices, nothing recomputed; None leaves `mfu` out.
    peak: FLOP/s of all devices together; None leaves `mfu` out.
    clock: seconds, for tests.
    record: called with the name and seconds of every part of the time, as `goodput.Log.add` is.
  """

  def __init__(self, flops_per_step: float | None = None, peak: float | None = None,
               clock=time.perf_counter, record: Callable[[str, float], None] | None = None):
    self.flops_per_step, self.peak, self.clock = flops_per_step, peak, clock
    self._record = record or (lambda part, seconds: None)
    self.restart()

  def restart(self) -> None:
    """Forgets what was counted, for instance after the first step, which compiles."""
    self._start = self.clock()
    self._spent = {"data_wait": 0.0, "evaluation": 0.0, "save": 0.0}
    self._steps = self._images = self._statements = 0

  def count(self, images: int, statements: int) -> None:
    """Counts one step with its images and valid statements, over all hosts."""
    self._steps += 1
    self._images += images
    self._statements += statements

  def waiting(self) -> contextlib.AbstractContextManager:
    """Time spent here is waiting for data."""
    return self._timed("data_wait")

  def paused(self, part: str) -> contextlib.AbstractContextManager:
    """Time spent here is an "evaluation" or a "save", and does not count for the rates."""
    return self._timed(part)

  @contextlib.contextmanager
  def _timed(self, part: str):
    start = self.clock()
    yield
    seconds = self.clock() - start
    self._spent[part] += seconds
    self._record(part, seconds)

  def report(self) -> dict[str, float]:
    """What was measured since the last report, and starts anew; {} if no step was counted.

    steps_per_second, images_per_second, statements_per_second: without evaluation and saving;
    data_wait_share, evaluation_share, save_share, step_share: of all the time, adding up to 1, the
    steps being the rest; mfu, model FLOPs utilisation: model FLOPs / (seconds x peak FLOP/s), in the
    seconds of the rates.
    """
    total = self.clock() - self._start
    seconds = total - self._spent["evaluation"] - self._spent["save"]
    if self._steps == 0 or seconds <= 0:
      return {}
    rates = {
        "steps_per_second": self._steps / seconds,
        "images_per_second": self._images / seconds,
        "statements_per_second": self._statements / seconds,
    } | {f"{part}_share": spent / total for part, spent in self._spent.items()}
    rates["step_share"] = 1 - sum(self._spent.values()) / total
    if self.flops_per_step and self.peak:
      rates["mfu"] = self.flops_per_step * self._steps / (seconds * self.peak)
    self.restart()
    return rates


# --- FLOPs ---------------------------------------------------------------------------------------

# Dense bfloat16 FLOP/s of one chip. Keys are what a `device_kind` starts with.
PEAK_FLOPS = {
    # "System architecture" pages of the Cloud TPU documentation; v5e and v6e say that they are "lite".
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    # NVIDIA's data sheets of these products; where they give a number with sparsity, half of it.
    "NVIDIA A100": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,  # SXM
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40S": 362e12,
}


def peak_flops(device) -> float | None:
  """Peak FLOP/s of one device, or None if it is not known (then report no MFU, not a wrong one).

  TPU and GPU: the published dense bfloat16 peak. CPU: what a float32 matrix product reaches here, measured
  for a fraction of a second and divided by the number of CPU devices, which share the cores.
  """
  if device.platform == "cpu":
    return _measured_matmul_flops() / jax.local_device_count("cpu")
  # The longest key that fits as whole words: "NVIDIA A100-SXM4-40GB" is an A100, an L40 is no L4.
  fits = [kind for kind in PEAK_FLOPS if re.match(re.escape(kind) + r"(?!\w)", device.device_kind)]
  return PEAK_FLOPS[max(fits, key=len)] if fits else None


@functools.cache
def _measured_matmul_flops(size: int = 1024, tries: int = 5) -> float:
  """FLOP/s of this host's cores, with NumPy: a JAX array would go to the mesh in use."""
  x = np.ones((size, size), np.float32)
  seconds = []
  for _ in range(tries):
    start = time.perf_counter()
    x @ x
    seconds.append(time.perf_counter() - start)
  return 2 * size**3 / min(seconds)


def step_flops(traced) -> float:
  """FLOPs of the matrix products and convolutions of one call, on all devices together.

  Counted from the jaxpr, because XLA's `cost_analysis` counts the body of a scan once, whatever its
  length, and so misses nearly all of a scanned tower. A product [m, k] x [k, n] is 2 m k n FLOPs;
  everything else is left out, as usual for MFU (Chowdhery et al. 2022, PaLM, appendix B).

  What rematerialisation computes twice is counted twice: trace a step without it for MFU.

  Args:
    traced: `jax.jit(f).trace(*args)`, or a jaxpr. Arguments may be shapes.
  """
  jaxpr = getattr(traced, "jaxpr", traced)
  jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
  # The compiler leaves out what nothing reads, such as all but the weights in a first look at the losses.
  used, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
  return _flops(used)


def _flops(jaxpr) -> float:
  return sum(_equation_flops(equation) for equation in jaxpr.eqns)


def _equation_flops(equation) -> float:
  name, parameters = equation.primitive.name, equation.params
  if name == "dot_general":
    (contracted, _), _ = parameters["dimension_numbers"]
    sizes = [equation.invars[0].aval.shape[axis] for axis in contracted]
    return 2.0 * equation.outvars[0].aval.size * math.prod(sizes)
  if name == "conv_general_dilated":
    kernel = equation.invars[1].aval
    per_output = kernel.size / kernel.shape[parameters["dimension_numbers"].rhs_spec[0]]
    # Of a dilated input (the gradient of a strided convolution) only every d-th value is not 0.
    return 2.0 * equation.outvars[0].aval.size * per_output / math.prod(parameters["lhs_dilation"])
  inner = [_flops(jaxpr) for jaxpr in _inner_jaxprs(parameters.values())]
  if name == "scan":
    return parameters["length"] * sum(inner)
  if name == "cond":
    return max(inner)
  if name == "pallas_call":  # a kernel runs at every point of its grid
    return sum(inner) * math.prod(side for side in parameters["grid_mapping"].grid if isinstance(side, int))
  if name == "shard_map":  # shapes inside are those of one device
    return parameters["mesh"].size * sum(inner)
  return sum(inner)  # a `while` loop counts once: its length is not in the program


def _inner_jaxprs(values):
  for value in values:
    if isinstance(value, (Jaxpr, ClosedJaxpr)):
      yield value
    elif isinstance(value, (tuple, list)):
      yield from _inner_jaxprs(value)
