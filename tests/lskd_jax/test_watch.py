"""What `lskd watch` says of work directories in all states a run can be in."""
import json

import pytest

from data_pipeline.records import DataError
from lskd_jax import committed, goodput, watch


class Clock:
  now = 1000.0

  def __call__(self):
    return self.now


@pytest.fixture
def run(tmp_path):
  """A run of 100 steps after 40 of them, 2 s each, and its clock."""
  clock = Clock()
  (tmp_path / "config.json").write_text(json.dumps(
      {"optim": {"steps": 100}, "guard": {"metric": "dev", "at": 0.5, "below": 0.3, "factor": 2.0}}))
  log = goodput.Log(tmp_path, clock=clock)
  for phase in (goodput.PREPARATION, goodput.STARTUP, goodput.STEP):
    clock.now += 5
    log.phase(phase)
  with (tmp_path / "metrics.jsonl").open("w") as file:
    for step in range(2, 41):
      clock.now += 2
      log.step(step)
      line = {"step": step, "loss": 8 / step, "steps_per_second": 0.5, "step_share": 0.9,
              "data_wait_share": 0.1, "evaluation_share": 0.0, "save_share": 0.0, "skipped_steps": 1.0}
      if step == 20:
        line |= {"loss": "NaN", "dev": 0.25}
      file.write(json.dumps(line) + "\n")
  log.phase(goodput.STEP)
  for step in (10, 30, 40):
    (tmp_path / "checkpoints" / str(step)).mkdir(parents=True)
    if step < 40:
      (tmp_path / "checkpoints" / str(step) / committed.MARKER).touch()
  return tmp_path, clock


def test_a_running_run(run):
  workdir, clock = run
  text = watch.screen(workdir, clock.now + 4, width=60)
  assert "loss (1 not finite)" in text and "dev" in text
  assert max(len(row) for row in text.split("step 40")[0].splitlines()) <= 60
  assert "step 40 of 100 (40%), 0.5 steps/s, 2 min 00 s left" in text
  assert "durable step: 30" in text  # 40 is still being written
  assert "last sign of life 4.0 s ago" in text
  assert "goodput 83.9% of 1 min 33 s since the first of 1 start" in text and "PROGRAM_STARTUP" in text
  assert "time: step 90.0% · data_wait 10.0% · evaluation 0.0% · save 0.0%" in text
  assert "loss 0.2 · steps_per_second 0.5 · skipped_steps 1 · dev 0.25" in text


def test_a_run_that_was_extended_has_more_steps(run):
  workdir, clock = run
  with (workdir / "metrics.jsonl").open("a") as file:
    file.write(json.dumps({"step": 50, "dev": 0.29}) + "\n")
  assert "step 50 of 200 (25%)" in watch.screen(workdir, clock.now)


def test_a_silent_run_is_called_silent(run):
  workdir, clock = run
  assert "no sign of life" not in watch.screen(workdir, clock.now + 299)
  assert "no sign of life for 6 min 40 s, in STEP: killed, stuck" in watch.screen(workdir, clock.now + 400)


def test_a_run_that_was_stopped_says_that_it_can_be_resumed(run):
  workdir, clock = run
  goodput.Log(workdir, clock=clock).close()
  assert "ended without being finished, 6 min 40 s ago" in watch.screen(workdir, clock.now + 400)


def test_a_finished_run_is_printed_once_and_that_is_all(run, capsys):
  workdir, clock = run
  sleeps = []

  def sleep(seconds):
    sleeps.append(seconds)
    (workdir / "done.json").write_text(json.dumps({"step": 100, "restarts": 2}))
  watch.watch(workdir, clock=clock, sleep=sleep)
  assert sleeps == [3.0]
  assert "finished: step 100, restarts 2" in capsys.readouterr().out


def test_once_prints_once(run, capsys):
  workdir, clock = run
  watch.watch(workdir, once=True, names=("skipped_steps",), clock=clock, sleep=None)
  assert "skipped_steps" in capsys.readouterr().out.splitlines()[0]


def test_a_run_that_has_only_begun(tmp_path):
  (tmp_path / "config.json").write_text("{}")
  assert watch.screen(tmp_path, 0.0) == "step 0\ndurable step: none yet"


def test_what_cannot_be_shown_is_named(run):
  workdir, clock = run
  with pytest.raises(DataError, match="has no 'los' yet; it has data_wait_share, dev, "):
    watch.screen(workdir, clock.now, names=("los",))
  with pytest.raises(DataError, match="no run was started here"):
    watch.screen(workdir / "checkpoints", clock.now)
