"""How a stuck run is found and named: a clock that tests turn, and a dictionary for the board."""
import json
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest

from lskd_jax import watchdog
from lskd_jax.exit_codes import PEER_LOST, STUCK
from lskd_jax.peers import LocalStore
from lskd_jax.watchdog import Watchdog


@pytest.fixture
def run(tmp_path, monkeypatch):
  """Two watchdogs (`dogs`) of one run; `clock.now` is turned by hand, `codes` are theirs by process."""
  monkeypatch.setattr(watchdog, "FAREWELL", 0)
  clock, texts, codes = SimpleNamespace(now=1000.0), {}, {}
  dogs = [Watchdog(tmp_path, hang_after=300, compile_limit=3600, store=LocalStore(i, 2, texts),
                   leave=lambda code, i=i: codes.update({i: code}), clock=lambda: clock.now)
          for i in (0, 1)]
  return SimpleNamespace(dogs=dogs, clock=clock, codes=codes, folder=tmp_path)


def put(run, phases, steps):
  for dog, phase, step in zip(run.dogs, phases, steps):
    dog.at(phase, step)
    dog.look()


def test_the_process_with_the_fewest_steps_is_named_and_both_end(run):
  put(run, ("step", "data"), (8, 7))
  run.clock.now += 299
  run.dogs[0].look()
  assert run.codes == {}
  run.clock.now += 2
  run.dogs[0].look()
  run.dogs[1].look()  # told by the other
  assert run.codes == {0: STUCK, 1: STUCK}
  for i in (0, 1):
    crash = json.loads((run.folder / f"crash-{i}.json").read_text())
    assert crash["code"] == STUCK
    assert "process 1 is late" in crash["reason"] and "step 7 in data for 301 s" in crash["reason"]
    assert "in look" in (run.folder / f"stacks-{i}.txt").read_text()


def test_of_processes_at_the_same_step_the_one_that_moved_longest_ago_is_named(run):
  put(run, ("step", "step"), (8, 8))
  run.clock.now += 5
  run.dogs[0].at("save", 8)
  run.dogs[0].look()
  run.clock.now += 4000
  run.dogs[0].look()
  assert "process 1 is late" in json.loads((run.folder / "crash-0.json").read_text())["reason"]


def test_a_process_that_shows_no_life_is_named_before_one_that_came_to_the_step_earlier(run):
  put(run, ("step", "step"), (8, 8))
  run.clock.now += 1
  run.dogs[1].at("step", 8)
  run.dogs[1].look()
  for _ in range(5):
    run.clock.now += 60
    run.dogs[0].look()
  assert "process 1 is late" in json.loads((run.folder / "crash-0.json").read_text())["reason"]


def test_time_in_which_a_process_was_suspended_is_not_counted(run):
  put(run, ("step", "step"), (8, 8))
  run.clock.now += 4000
  run.dogs[0].slept(3990)  # noticed by the thread that looks
  run.dogs[0].look()
  run.clock.now += 289
  run.dogs[0].look()
  assert run.codes == {}
  run.clock.now += 2
  run.dogs[0].look()
  assert run.codes == {0: STUCK}


@pytest.mark.parametrize("phase", ["start", "restore", "compile", "evaluate"])
def test_a_process_that_compiles_is_waited_for_by_itself_and_by_others(run, phase):
  put(run, ("step", phase), (8, 8))
  run.clock.now += 3500
  for dog in run.dogs:
    dog.look()
  assert run.codes == {}
  run.clock.now += 200
  run.dogs[0].look()
  assert run.codes == {0: STUCK}


def test_a_process_that_is_gone_is_not_waited_for_even_if_it_was_compiling(run):
  """The board is a second old: it may have stopped in a step since."""
  put(run, ("step", "compile"), (8, 7))
  run.clock.now += 400
  look(run.dogs[0], watchdog.SILENT)
  assert run.codes == {}
  look(run.dogs[0], 3)
  assert run.codes == {0: STUCK}


def test_slow_steps_have_ten_times_their_median(run):
  dog = run.dogs[0]
  for step in range(5):
    dog.at("step", step)
    run.clock.now += 100
    dog.at("data", step + 1)
  assert dog.limit("step") == 1000
  assert dog.limit("data") == 1000
  assert dog.limit("compile") == 3600


def look(dog, times):
  for _ in range(times):
    dog.look()


def test_a_process_without_a_sign_of_life_in_training_is_lost(run):
  put(run, ("save", "save"), (8, 8))
  look(run.dogs[0], watchdog.SILENT)
  assert run.codes == {}
  run.dogs[0].look()
  run.dogs[0].look()
  assert run.codes == {0: PEER_LOST}
  assert "process 1 has given no sign of life since step 8 in save" in (
    run.folder / "crash-0.json").read_text()


def test_a_process_that_compiles_may_be_silent(run):
  """One call into C++ may keep all of its threads out."""
  put(run, ("step", "compile"), (8, 8))
  look(run.dogs[0], 5 * watchdog.SILENT)
  assert run.codes == {}


def test_the_end_of_another_process_with_an_error_ends_a_process_that_waits_for_it(run):
  put(run, ("restore", "restore"), (0, 0))
  run.dogs[0]._store.set("left/1", "1")
  look(run.dogs[0], watchdog.LEFT)
  assert run.codes == {}
  look(run.dogs[0], 3)
  assert run.codes == {0: PEER_LOST}


def test_process_0_is_lost_when_it_no_longer_answers(tmp_path, monkeypatch):
  """It keeps the board: a look waits until its connection is given up, which may take minutes."""
  class Silent(LocalStore):
    def list(self, folder):
      never.wait(20)
  monkeypatch.setattr(watchdog, "LOOK_EVERY", 0.01)
  never, left, codes = threading.Event(), threading.Event(), []
  leave = lambda code: (codes.append(code), left.set())
  with Watchdog(tmp_path, hang_after=300, compile_limit=3600, store=Silent(1, 2), leave=leave) as watch:
    watch.at("compile", 0)
    assert not left.wait(0.5)  # there a late answer is not missed
    watch.at("step", 1)
    assert left.wait(15)
    never.set()
  assert codes[0] == PEER_LOST
  assert "process 0 does not answer" in (tmp_path / "crash-1.json").read_text()


def test_a_terminal_that_stands_still_does_not_keep_a_stuck_run_from_ending(tmp_path):
  script = ("import os, threading\nfrom lskd_jax.watchdog import Watchdog\n"
            "read, write = os.pipe()\nos.dup2(write, 2)\nos.set_blocking(2, False)\n"
            "try:\n  while True: os.write(2, b'#')\nexcept BlockingIOError: os.set_blocking(2, True)\n"
            f"with Watchdog({str(tmp_path)!r}, hang_after=0.5, compile_limit=3600) as watch:\n"
            "  watch.at('step', 3)\n  threading.Event().wait(60)")
  assert subprocess.run([sys.executable, "-c", script], timeout=60).returncode == STUCK
  assert json.loads((tmp_path / "crash-0.json").read_text())["code"] == STUCK
  assert "wait" in (tmp_path / "stacks-0.txt").read_text()


def test_a_main_thread_that_hangs_is_ended_from_the_watchdogs_thread(tmp_path):
  script = ("import threading\nfrom lskd_jax.watchdog import Watchdog\n"
            f"with Watchdog({str(tmp_path)!r}, hang_after=0.5, compile_limit=3600) as watch:\n"
            "  watch.at('step', 3)\n  threading.Event().wait(60)")
  child = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
  assert child.returncode == STUCK
  assert "process 0 is late (process 0 at step 3 in step" in child.stderr
