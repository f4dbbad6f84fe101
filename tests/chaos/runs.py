"""Starts the processes of a run, waits for what they do, and tells how they ended."""
import json
import os
from pathlib import Path
import subprocess
import sys
import time

from tests.tiny_runs import free_port

ROOT = Path(__file__).resolve().parents[2]
DEVICES = 4  # of a run, over all of its processes
LONGEST = 150  # seconds that anything may take here
# Programs are compiled at every start of a process and run for milliseconds: what is compiled is kept,
# and hardly optimised.
QUICK = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
         "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"}


class Run:
  """The processes of one run on `workdir`; leaving the `with` kills what is left of them.

  Args:
    flags: of `one_process.py`.
  """

  def __init__(self, folder: Path, workdir: Path, processes: int, flags: tuple[str, ...] = ()):
    self.workdir = workdir
    workdir.mkdir(exist_ok=True)
    for mark in (workdir / "marks").glob("*"):
      mark.unlink()
    port = free_port()
    environment = {**os.environ, **QUICK, "PYTHONPATH": str(ROOT),
                   "JAX_NUM_CPU_DEVICES": str(DEVICES // processes)}
    script = Path(__file__).with_name("one_process.py")
    self.processes = []
    for i in range(processes):
      with self.log(i).open("ab") as log:
        self.processes.append(subprocess.Popen(
            [sys.executable, str(script), str(folder), str(workdir), *flags, "--processes", str(processes),
             "--process-id", str(i), "--coordinator", f"localhost:{port}"],
            env=environment, stdout=log, stderr=log))

  def log(self, process: int) -> Path:
    """Where a process prints."""
    return self.workdir / f"process-{process}.log"

  def printed(self) -> str:
    """What all processes have printed, for the messages of assertions."""
    return "\n".join(f"--- {path.name}\n{path.read_text()[-3000:]}"
                     for path in sorted(self.workdir.glob("process-*.log")))

  def wait_until(self, condition) -> None:
    """Waits for condition(), as closely as a fault has to be timed."""
    end = time.monotonic() + LONGEST
    while not condition():
      assert time.monotonic() < end, f"waited too long:\n{self.printed()}"
      assert any(p.poll() is None for p in self.processes), f"the run ended too early:\n{self.printed()}"
      time.sleep(0.002)

  def wait_for(self, phase: str, step: int, process: int = 0) -> None:
    """Waits until a process is in a phase of a step."""
    self.wait_until((self.workdir / "marks" / f"{phase}-{step}-{process}").exists)

  def signal(self, number: int, *which: int) -> None:
    """Sends a signal to these processes, to all if none is named."""
    for i in which or range(len(self.processes)):
      self.processes[i].send_signal(number)

  def codes(self) -> list[int]:
    """The exit codes, once all processes have ended."""
    end = time.monotonic() + LONGEST
    for process in self.processes:
      try:
        process.wait(timeout=max(0.1, end - time.monotonic()))
      except subprocess.TimeoutExpired:
        raise AssertionError(f"process {process.args[-3]} does not end:\n{self.printed()}") from None
    return [process.returncode for process in self.processes]

  def __enter__(self):
    return self

  def __exit__(self, *unused):
    for process in self.processes:
      process.kill()
      process.wait()


def finish(folder: Path, workdir: Path, processes: int, flags: tuple[str, ...] = ()) -> str:
  """Runs to the end; what the processes printed."""
  with Run(folder, workdir, processes, flags) as run:
    assert run.codes() == [0] * processes, run.printed()
    return run.printed()


def outcome(workdir: Path) -> dict:
  """What must not depend on what happened to a run: its digests, and the log of examples."""
  done = json.loads((workdir / "done.json").read_text())
  log = [json.loads(line) for line in (workdir / "examples.jsonl").read_text().splitlines()]
  return {"step": done["step"], "params_digest": done["params_digest"],
          "examples_digest": done["examples_digest"], "examples": log}
