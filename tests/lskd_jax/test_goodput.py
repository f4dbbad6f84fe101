"""The time of a run over its starts, with a clock we set: every second is somewhere."""
import json

import pytest

from lskd_jax import goodput
from lskd_jax.goodput import Log


class Clock:
  now = 1000.0

  def __call__(self):
    return self.now


def start(workdir, clock, restored, steps, seconds=2.0):
  """A process: 3 s to the devices, 4 s to prepare, 1 s to restore, 10 s to compile, then steps."""
  log = Log(workdir, clock=clock)
  for spent, phase in ((3, goodput.PREPARATION), (4, goodput.RESTORE), (1, goodput.STARTUP),
                       (10, goodput.STEP)):
    clock.now += spent
    if phase == goodput.STARTUP:
      log.restored(restored)
    log.phase(phase)
  for step in range(restored + 2, steps + 1):  # the first one compiled
    clock.now += seconds
    log.step(step)
  return log


PREPARED = {goodput.INITIALIZATION: 3, goodput.PREPARATION: 4, goodput.RESTORE: 1, goodput.STARTUP: 10}


def test_a_run_that_was_never_disturbed(tmp_path):
  clock = Clock()
  log = start(tmp_path, clock, 0, 11)
  for part, seconds in (("data_wait", 1.0), ("evaluation", 6.0), ("save", 3.0)):
    clock.now += seconds
    log.add(part, seconds)
  clock.now += 2.0
  log.step(12)
  log.phase(goodput.OTHER)
  clock.now += 5.0  # the model is written
  log.close()
  found = goodput.summary(tmp_path)
  assert found.productive == 22  # eleven steps
  assert found.badput == PREPARED | {
      goodput.DATA: 1, goodput.EVALUATION: 6, goodput.SAVE: 3, goodput.OTHER: 5}
  assert found.wall == found.productive + sum(found.badput.values()) == 55
  assert found.goodput == 22 / 55 and found.starts == 1 and found.end == clock.now


def test_steps_behind_the_restored_checkpoint_are_wasted_and_the_gap_is_recovery(tmp_path):
  clock = Clock()
  start(tmp_path, clock, 0, 16)  # 30 s of steps are a line
  clock.now += 100.0  # killed; nobody knows when
  start(tmp_path, clock, 6, 11).close()
  found = goodput.summary(tmp_path)
  assert found.starts == 2
  assert found.productive == 2.0 * (5 + 4)  # 2 … 6 of the first process, 8 … 11 of the second
  assert found.badput[goodput.WASTED] == pytest.approx(2.0 * 10)
  assert found.badput[goodput.RECOVERY] == 100
  assert found.badput[goodput.STARTUP] == 20
  assert found.productive + sum(found.badput.values()) == pytest.approx(found.wall)


def test_a_start_without_a_checkpoint_wastes_all_steps_before_it(tmp_path):
  clock = Clock()
  start(tmp_path, clock, 0, 6).close()
  start(tmp_path, clock, 6, 11).close()
  start(tmp_path, clock, 0, 3).close()
  found = goodput.summary(tmp_path)
  assert found.productive == 2.0 * 2 and found.badput[goodput.WASTED] == 2.0 * (5 + 4)


def test_a_restart_that_dies_before_it_restores_wastes_nothing(tmp_path):
  clock = Clock()
  start(tmp_path, clock, 0, 6).close()
  log = Log(tmp_path, clock=clock)
  clock.now += 7
  log.phase(goodput.PREPARATION)
  found = goodput.summary(tmp_path)
  assert goodput.WASTED not in found.badput and found.badput[goodput.INITIALIZATION] == 10
  assert found.phase == goodput.PREPARATION


def test_many_quick_steps_are_few_lines(tmp_path):
  start(tmp_path, Clock(), 0, 10_001, seconds=0.01).close()
  lines = goodput.read_lines(tmp_path)
  assert [line["steps"] for line in lines if "steps" in line][0][0] == 2
  assert len(lines) < 10


def test_a_line_torn_by_a_kill_costs_only_itself(tmp_path):
  clock = Clock()
  start(tmp_path, clock, 0, 6).close()
  path = tmp_path / "goodput.jsonl"
  path.write_text(path.read_text() + '{"run": 0, "start": 10')
  clock.now += 50
  start(tmp_path, clock, 6, 9).close()
  assert goodput.summary(tmp_path).badput[goodput.RECOVERY] == 50
  assert '{"run": 0, "start": 10\n{"run": 1' in path.read_text()


def test_time_before_the_log_was_made_counts_from_the_start_of_the_process(tmp_path):
  clock = Clock()
  log = Log(tmp_path, began=clock.now - 20, clock=clock)
  log.phase(goodput.PREPARATION)
  assert goodput.summary(tmp_path).badput == {goodput.INITIALIZATION: 20}


def test_a_run_that_is_refused_leaves_no_file(tmp_path):
  clock = Clock()
  log = Log(tmp_path / "run", clock=clock)
  clock.now += 1
  log.phase(goodput.PREPARATION)
  assert not (tmp_path / "run").exists() and goodput.summary(tmp_path / "run") is None
  (tmp_path / "run").mkdir()
  clock.now += 2
  log.close()
  lines = (tmp_path / "run" / "goodput.jsonl").read_text().splitlines()
  assert [json.loads(line)["seconds"] for line in lines] == [
      {goodput.INITIALIZATION: 1}, {goodput.PREPARATION: 2}]


def test_a_summary_in_words(tmp_path):
  clock = Clock()
  start(tmp_path, clock, 0, 11).close()
  first, largest, *_ = goodput.describe(goodput.summary(tmp_path))
  assert first == "goodput 52.6% of 38.0 s since the first of 1 start"
  assert largest == "   26.3%  PROGRAM_STARTUP  10.0 s"


@pytest.mark.parametrize("seconds,text", [(4.24, "4.2 s"), (200, "3 min 20 s"), (7500, "2 h 05 min"),
                                          (93_600, "1 d 02 h")])
def test_lengths_of_time(seconds, text):
  assert goodput.spell(seconds) == text
