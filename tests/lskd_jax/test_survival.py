"""Real runs that are preempted, lose a process, or hang: exit codes, and nothing lost or repeated.

The runs are `lskd train` on loopback: a tagger on eight scenes, on a mesh of two devices, as one process
or two. Faults come when the metrics file has a line, never after a time.
"""
import json
import os
from pathlib import Path
import signal
import subprocess
import sys
import time

import pytest

from lskd_jax.exit_codes import DONE, NOT_FINITE, PEER_LOST, PREEMPTED_SAVED, STUCK
from lskd_jax.metrics import read_metrics
from tests import tiny_runs

ROOT = Path(__file__).resolve().parents[2]
LONG = 280  # seconds
STEPS = 100
CONFIG = f"""
from pathlib import Path
from tests import tiny_runs

def get_config():
  config = tiny_runs.config_for(Path(__file__).parent, "tagger")
  config.optim.steps = {STEPS}
  config.train.mesh.fsdp = 2
  config.train.update(frozen=(), save_every=40, log_examples=True)
  return config
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("survival")
  tiny_runs.teach_scenes(folder)
  (folder / "config.py").write_text(CONFIG)
  return folder


class Processes:
  """`lskd train` as `count` processes on two devices; a context that leaves none behind."""

  def __init__(self, workdir, count, *overrides):
    port = tiny_runs.free_port()
    self.workdir, self.metrics = workdir, workdir / "metrics.jsonl"
    self.before = self.metrics.exists() and self.metrics.stat().st_ino  # a run makes the file anew
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": str(2 // count)}
    self.log = workdir.with_suffix(".log").open("a")
    self.children = []
    for i in range(count):
      words = [sys.executable, "-m", "lskd_jax.cli", "train", "--workdir", workdir,
               "--config", workdir.parent / "config.py", *overrides]
      if count > 1:
        words += ["--processes", count, "--process-id", i, "--coordinator", f"localhost:{port}"]
      self.children.append(subprocess.Popen(list(map(str, words)), env=environment, stdout=self.log,
                                            stderr=self.log))

  def __enter__(self):
    return self

  def __exit__(self, *unused):
    for child in self.children:
      child.kill()
      child.wait()
    self.log.close()

  def said(self) -> str:
    return self.workdir.with_suffix(".log").read_text()

  def at_step(self, step):
    """Waits until this run has written a line of this step."""
    end = time.monotonic() + LONG
    while (not self.metrics.exists() or self.metrics.stat().st_ino == self.before
           or not any(line["step"] >= step for line in read_metrics(self.metrics))):
      assert time.monotonic() < end and all(child.poll() is None for child in self.children), self.said()
      time.sleep(0.01)
    return self

  def codes(self):
    return [child.wait(timeout=LONG) for child in self.children]


def outcome(workdir):
  """What must not depend on faults: done.json but for `restarts`, and the steps and images that were fed."""
  done = json.loads((workdir / "done.json").read_text())
  restarts = done.pop("restarts")
  return restarts, done, (workdir / "examples.jsonl").read_text()


@pytest.fixture(scope="module")
def uninterrupted(folder):
  """One process on two devices."""
  with Processes(folder / "uninterrupted", 1) as run:
    assert run.codes() == [DONE], run.said()
  restarts, done, examples = outcome(folder / "uninterrupted")
  assert restarts == 0 and done["step"] == STEPS
  assert [json.loads(line)["step"] for line in examples.splitlines()] == list(range(1, STEPS + 1))
  return done, examples


@pytest.mark.slow
def test_a_run_of_one_process_saves_on_sigterm_and_goes_on_bit_for_bit(folder, uninterrupted):
  with Processes(folder / "one", 1) as run:
    run.at_step(3).children[0].send_signal(signal.SIGTERM)
    assert run.codes() == [PREEMPTED_SAVED], run.said()
  assert max(line["step"] for line in read_metrics(folder / "one" / "metrics.jsonl")) < 40
  with Processes(folder / "one", 1) as run:
    assert run.codes() == [DONE], run.said()
  assert outcome(folder / "one") == (1, *uninterrupted)


@pytest.mark.slow
def test_a_lost_process_and_a_sigterm_to_one_of_two_change_nothing_but_time(folder, uninterrupted):
  workdir = folder / "two"
  with Processes(workdir, 2) as run:
    run.at_step(3).children[1].kill()
    assert run.codes()[0] == PEER_LOST, run.said()
  assert json.loads((workdir / "crash-0.json").read_text())["code"] == PEER_LOST
  with Processes(workdir, 2) as run:
    run.at_step(3).children[1].send_signal(signal.SIGTERM)
    assert run.codes() == [PREEMPTED_SAVED] * 2, run.said()
    assert "SIGTERM (process 1): all processes save at step" in run.said()
  with Processes(workdir, 2) as run:
    assert run.codes() == [DONE] * 2, run.said()
  assert outcome(workdir) == (2, *uninterrupted)


@pytest.mark.slow
def test_a_process_that_stands_still_is_named_and_the_run_ends(folder):
  workdir = folder / "stuck"
  with Processes(workdir, 2, "--config.train.hang_after=5.0") as run:
    run.at_step(20).children[1].send_signal(signal.SIGSTOP)
    assert run.children[0].wait(timeout=LONG) == STUCK, run.said()
  assert "process 1 is late" in json.loads((workdir / "crash-0.json").read_text())["reason"]
  assert "train.py" in (workdir / "stacks-0.txt").read_text()


@pytest.mark.slow
def test_two_processes_stop_at_the_same_broken_step_and_do_it_again(folder):
  """A learning rate that float32 has as infinite: each keeps its rows of the batch, both replay the step."""
  workdir, broken = folder / "broken", ("--config.optim.learning_rate=1e300", "--config.train.max_skipped=3")
  with Processes(workdir, 2, *broken) as run:
    assert NOT_FINITE in run.codes(), run.said()
  assert run.said().count("--reproduce-step 4") >= 1
  assert sorted(path.name for path in (workdir / "not_finite").iterdir()) == [
      "step-4-process-0.npz", "step-4-process-1.npz"]
  with Processes(workdir, 2, *broken, "--reproduce-step", "4") as run:
    assert run.codes() == [DONE] * 2, run.said()
  assert "equal to metrics.jsonl" in run.said() and "gradients that are not finite" in run.said()


@pytest.mark.slow
def test_a_profile_of_one_of_two_processes_on_demand(folder):
  workdir = folder / "profiled"
  with Processes(workdir, 2) as run:
    run.at_step(3).children[1].send_signal(signal.SIGUSR2)
    assert run.codes() == [DONE] * 2, run.said()
  (trace,) = (workdir / "profiles").iterdir()
  assert trace.name.endswith("-process-1") and list(trace.rglob("*.xplane.pb"))
