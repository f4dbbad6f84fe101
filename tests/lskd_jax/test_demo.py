"""The demo as a whole: its order, what it refuses, and that a kill costs nothing but time."""
import faulthandler
import json
import os
from pathlib import Path
import random
import re
import signal
import subprocess
import sys
import time

import pytest

from data_pipeline.records import DataError
from lskd_jax import demo
from lskd_jax.demo import FULL, QUICK, SIZES, TASKS, Task, claim, in_order, run_seed

ROOT = Path(__file__).resolve().parents[2]
PLAIN = dict(SIZES, seed=0, full=False, quick=False)


class FakeProcess:
  """A task that ends with `code` at the n-th look at it."""

  def __init__(self, looks, code=0):
    self.looks, self.code, self.returncode, self.killed = looks, code, None, False

  def poll(self):
    self.looks -= 1
    if self.looks <= 0:
      self.returncode = self.code
    return self.returncode

  def kill(self):
    self.killed = True


class Machine:
  """Stands in for `demo.launch`: notes what ran when, and on which cores."""

  def __init__(self, monkeypatch, cores, codes=None):
    self.launched, self.processes, self.side_by_side = [], {}, []
    self.codes, self.cores = codes or {}, cores
    monkeypatch.setattr(demo, "available_cores", lambda: list(cores))
    monkeypatch.setattr(demo, "launch", self.launch)
    monkeypatch.setattr(demo.time, "sleep", lambda seconds: None)

  def running(self):
    return [name for name, (_, process) in self.processes.items() if process.returncode is None]

  def launch(self, task, work, cores, *unused):
    for name in task.needs:
      assert (work / "tasks" / f"{name}.json").exists(), f"{task.name} before {name}"
    others = self.running()
    taken = [core for name in others for core in self.processes[name][0]]
    assert not set(taken) & set(cores) and set(cores) <= set(self.cores)
    assert len(cores) == min(task.cores, len(self.cores[:2]))
    self.side_by_side += [{name, task.name} for name in others]
    process = FakeProcess(2 + len(task.name) % 3, self.codes.get(task.name, 0))
    self.processes[task.name] = (cores, process)
    self.launched.append(task.name)
    return process


@pytest.mark.parametrize("tasks", [TASKS, TASKS + FULL], ids=["plain", "full"])
def test_whatever_ends_first_no_task_starts_before_its_needs(tasks):
  names = {task.name for task in tasks}
  assert len(names) == len(tasks)
  assert all(set(task.needs) <= names for task in tasks)
  for seed in range(20):
    rng, done, running = random.Random(seed), set(), {}
    while len(done) < len(tasks):
      ready = in_order(tasks, done, running)
      for task in ready:
        assert set(task.needs) <= done and task.name not in done | set(running)
      assert ready or running, f"nothing can go on after {sorted(done)}"
      running |= {task.name: task for task in ready[:rng.randrange(len(ready) + 1)]}
      if running:
        ended = rng.choice(sorted(running))
        del running[ended]
        done.add(ended)


def test_tasks_share_the_cores(tmp_path, monkeypatch, capsys):
  machine = Machine(monkeypatch, [4, 7, 9])
  run_seed(tmp_path, PLAIN)
  assert sorted(machine.launched) == sorted(task.name for task in TASKS)
  assert {"captions", "unfiltered"} in machine.side_by_side
  assert {"lskd", "none"} in machine.side_by_side
  alone = {task.name for task in TASKS if task.cores == 2}
  assert not any(alone & pair for pair in machine.side_by_side)
  assert all(core in (4, 7) for cores, _ in machine.processes.values() for core in cores)
  lines = capsys.readouterr().out.splitlines()
  assert len(lines) == len(TASKS) and lines[-1].split()[0] == f"{len(TASKS)}/{len(TASKS)}"
  for task in TASKS:
    assert json.loads((tmp_path / "tasks" / f"{task.name}.json").read_text())["seconds"] >= 0
  assert json.loads((tmp_path / "seconds.json").read_text()) >= 0


def test_one_core_runs_one_task_at_a_time(tmp_path, monkeypatch):
  machine = Machine(monkeypatch, [0])
  run_seed(tmp_path, dict(PLAIN, full=True))
  assert machine.side_by_side == [] and len(machine.launched) == len(TASKS + FULL)


def test_a_finished_demo_runs_nothing_again(tmp_path, monkeypatch, capsys):
  Machine(monkeypatch, [0, 1])
  run_seed(tmp_path, PLAIN)
  machine = Machine(monkeypatch, [0, 1])
  run_seed(tmp_path, PLAIN)
  assert machine.launched == []
  assert f"continuing: {len(TASKS)} of {len(TASKS)} tasks were done" in capsys.readouterr().out


def test_a_plain_demo_goes_on_as_a_full_one(tmp_path, monkeypatch):
  Machine(monkeypatch, [0, 1])
  run_seed(tmp_path, PLAIN)
  machine = Machine(monkeypatch, [0, 1])
  run_seed(tmp_path, dict(PLAIN, full=True))
  assert sorted(machine.launched) == sorted(task.name for task in FULL)
  assert json.loads((tmp_path / "demo.json").read_text())["full"] is True


@pytest.mark.parametrize("change,said", [
    (dict(seed=1), "seed=0, not 1"),
    (dict(beta=2.0), "beta=0.5, not 2.0"),
    (dict(QUICK, quick=True), r"=\w+, not \w+"),
])
def test_another_kind_of_demo_in_the_same_folder_is_refused(tmp_path, change, said):
  claim(tmp_path, PLAIN)
  with pytest.raises(DataError, match=f"{tmp_path} holds a demo with .*{said}; use another --workdir, "
                     "or the same options") as caught:
    claim(tmp_path, PLAIN | change)
  assert "\n" not in str(caught.value)
  assert json.loads((tmp_path / "demo.json").read_text()) == PLAIN


def test_a_task_that_fails_ends_the_demo_and_the_next_try_goes_on(tmp_path, monkeypatch):
  machine = Machine(monkeypatch, [0, 1], {"heads_critic": 3})
  with pytest.raises(DataError) as caught:
    run_seed(tmp_path, PLAIN)
  log = tmp_path / "tasks" / "heads_critic.log"
  assert f"task 'heads_critic' ended with code 3; see {log}" in str(caught.value)
  assert "\n" not in str(caught.value)
  assert all(machine.processes[name][1].killed for name in machine.running())
  finished = {path.stem for path in (tmp_path / "tasks").glob("*.json")}
  assert {"pictures", "words", "captions"} <= finished and "heads_critic" not in finished
  again = Machine(monkeypatch, [0, 1])
  run_seed(tmp_path, PLAIN)
  assert not finished & set(again.launched) and "heads_critic" in again.launched


def test_the_log_of_a_real_task_says_why_it_failed(tmp_path, monkeypatch):
  monkeypatch.setattr(demo, "TASKS", (Task("dreams", (), 1, "no such task"),))
  monkeypatch.setenv("PYTHONPATH", str(ROOT))
  monkeypatch.setattr(demo.sys.stderr, "isatty", lambda: False, raising=False)
  with pytest.raises(DataError, match="'dreams' ended with code 1; see .*dreams.log"):
    run_seed(tmp_path, PLAIN)
  assert "dreams" in (tmp_path / "tasks" / "dreams.log").read_text()


# --- the real thing ------------------------------------------------------------------------------


def start(workdir):
  """`lskd demo --quick` as a process, its output in WORKDIR.log."""
  environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
  with workdir.with_suffix(".log").open("ab") as log:
    return subprocess.Popen([sys.executable, "-m", "lskd_jax.cli", "demo", "--quick", "--seed", "5",
                             "--workdir", str(workdir)], env=environment, stdout=log, stderr=log)


def numbers(workdir):
  """results.json without what depends on the clock."""
  def without(value):
    if isinstance(value, dict):
      return {key: without(entry) for key, entry in value.items() if key != "seconds"}
    return [without(entry) for entry in value] if isinstance(value, list) else value
  return without(json.loads((workdir / "results.json").read_text()))


def tasks_of(workdir):
  """Command lines of the processes that work in a folder, of any state but dead."""
  found = []
  for path in Path("/proc").glob("[0-9]*/cmdline"):
    try:
      words = path.read_bytes().split(b"\0")
    except OSError:  # it ended meanwhile
      continue
    if b"lskd_jax.demo_tasks" in words and str(workdir).encode() in words:
      found.append(words)
  return found


@pytest.mark.slow
def test_a_killed_demo_ends_with_the_numbers_of_an_uninterrupted_one(tmp_path):
  """Killed after its second task, in the middle of the third."""
  faulthandler.cancel_dump_traceback_later()  # beside other work it may take longer than tests have
  whole, killed = tmp_path / "whole", tmp_path / "killed"
  process = start(killed)
  deadline = time.time() + 900
  while len(list((killed / "tasks").glob("*.json"))) < 2 and process.poll() is None:
    assert time.time() < deadline
    time.sleep(0.1)
  time.sleep(2)  # the third task is under way
  process.send_signal(signal.SIGKILL)
  assert process.wait() == -signal.SIGKILL
  if Path("/proc").is_dir():
    time.sleep(1)
    assert tasks_of(killed) == []  # its tasks died with it
  assert not (killed / "results.json").exists()
  for workdir in (killed, whole):
    process = start(workdir)
    try:
      assert process.wait(timeout=1800) == 0, workdir.with_suffix(".log").read_text()[-3000:]
    finally:
      process.kill()
  said = killed.with_suffix(".log").read_text()
  assert "continuing: 2 of" in said or "continuing: 3 of" in said
  assert numbers(killed) == numbers(whole)
  assert "lskd demo" in (whole / "report.html").read_text()
  picture = re.search(r"--image (\S+)", said)[1]
  assert Path(picture).is_file()  # the command at the end can be typed
