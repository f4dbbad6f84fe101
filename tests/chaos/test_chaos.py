"""Whatever happens to a run, starting it again gives what the undisturbed run gives, bit for bit.

Every case starts real processes, lets something happen at a point that the run itself announces, looks
at the exit codes, and starts the same command again, also with another number of processes. Then the
parameters' digest and the log of examples must be those of a run that nothing happened to.

10 to 120 s a case, two side by side on two cores: `pytest -m slow tests/chaos`.
"""
import functools
import json
import os
import shutil
import signal
import sys
from typing import NamedTuple

import pytest

from lskd_jax import exit_codes
from lskd_jax.metrics import read_metrics
from lskd_jax.supervisor import supervise
from tests.chaos import runs
from tests.chaos.one_process import SAVE_EVERY, STEPS
from tests.chaos.runs import Run, finish, outcome
from tests.tiny_runs import teach_others, teach_scenes

pytestmark = pytest.mark.slow

TERM, KILL = signal.SIGTERM, signal.SIGKILL
SAVED, NOT_SAVED, STUCK, LOST = (exit_codes.PREEMPTED_SAVED, exit_codes.PREEMPTED, exit_codes.STUCK,
                                 exit_codes.PEER_LOST)
ABORTED = -signal.SIGABRT  # what the runtime does to a process whose coordinator is gone
CHANGES = [(2, 2), (2, 4), (4, 1)]  # processes before a fault, and when the run is started again


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Eight taught scenes to learn from, and ten others."""
  folder = tmp_path_factory.mktemp("chaos")
  teach_scenes(folder)
  teach_others(folder)
  return folder


@pytest.fixture(scope="module")
def undisturbed(folder):
  """What comes out of a run of two processes that nothing happens to."""
  finish(folder, folder / "undisturbed", 2)
  found = outcome(folder / "undisturbed")
  assert [line["step"] for line in found["examples"]] == list(range(1, STEPS + 1))
  return found


def durable(workdir) -> list[int]:
  """The steps with a checkpoint that counts."""
  return sorted(int(path.parent.name) for path in workdir.glob("checkpoints/*/COMMITTED.json"))


def goes_on(folder, workdir, processes, undisturbed, flags=()) -> None:
  """A run started again takes its newest checkpoint, and ends as if nothing had happened."""
  newest = durable(workdir)[-1:]
  printed = finish(folder, workdir, processes, flags)
  assert all((workdir / f"marks/compile-{step}-0").exists() for step in newest), printed
  assert outcome(workdir) == undisturbed


@pytest.mark.parametrize("processes", [1, 4])
def test_bits_do_not_depend_on_how_many_processes_share_the_devices(folder, undisturbed, processes):
  finish(folder, folder / f"alone-{processes}", processes)
  assert outcome(folder / f"alone-{processes}") == undisturbed


# --- processes that are told to end, or are ended ------------------------------------------------------


class Case(NamedTuple):
  """`number` is sent to processes `which` (all if there is none) when the run comes to (phase, step)."""
  name: str
  before: int  # processes
  after: int   # when it is started again
  phase: str
  step: int
  number: signal.Signals
  which: tuple[int, ...]
  codes: set[int]  # that the processes may end with
  saved: int | None = None  # the durable step that is left; None: any


SIGNALS = [
    Case("SIGTERM to one", 2, 2, "data", 4, TERM, (1,), {SAVED}),
    Case("SIGTERM to one, then more", 2, 4, "data", 4, TERM, (0,), {SAVED}),
    Case("SIGTERM to one, then fewer", 4, 1, "data", 4, TERM, (2,), {SAVED}),
    Case("SIGTERM to all", 2, 2, "step", 5, TERM, (), {SAVED}),
    Case("SIGTERM to all, then more", 2, 4, "step", 5, TERM, (), {SAVED}),
    Case("SIGTERM to all, then fewer", 4, 1, "step", 5, TERM, (), {SAVED}),
    Case("SIGTERM to the only one", 1, 2, "step", 5, TERM, (), {SAVED}),
    Case("SIGTERM during the first compile", 2, 2, "compile", 0, TERM, (1,), {NOT_SAVED}),
    Case("SIGTERM to all during the first compile", 2, 4, "compile", 0, TERM, (), {NOT_SAVED}),
    Case("SIGTERM during the first compile, then fewer", 4, 1, "compile", 0, TERM, (2,), {NOT_SAVED}),
    Case("SIGTERM during evaluation", 2, 2, "evaluate", 4, TERM, (0,), {SAVED}),
    Case("SIGTERM during evaluation, then more", 2, 4, "evaluate", 5, TERM, (), {SAVED}),
    Case("SIGTERM during a save", 2, 2, "save", SAVE_EVERY, TERM, (1,), {SAVED}),
    Case("SIGTERM during a save, then more", 2, 4, "save", SAVE_EVERY, TERM, (0,), {SAVED}),
    Case("SIGTERM to all during a save, then fewer", 4, 1, "save", SAVE_EVERY, TERM, (), {SAVED}),
    Case("SIGKILL of a worker", 2, 2, "data", 5, KILL, (1,), {-KILL, LOST}, SAVE_EVERY),
    Case("SIGKILL of a worker, then more", 2, 4, "data", 5, KILL, (1,), {-KILL, LOST}, SAVE_EVERY),
    Case("SIGKILL of a worker, then one", 4, 1, "data", 5, KILL, (3,), {-KILL, LOST}, SAVE_EVERY),
    Case("SIGKILL of the coordinator", 2, 2, "data", 5, KILL, (0,), {-KILL, ABORTED, LOST}, SAVE_EVERY),
    Case("SIGKILL of the coordinator, then more", 2, 4, "data", 5, KILL, (0,), {-KILL, ABORTED, LOST},
         SAVE_EVERY),
    Case("SIGKILL of the coordinator, then one", 4, 1, "data", 5, KILL, (0,), {-KILL, ABORTED, LOST},
         SAVE_EVERY),
    Case("SIGKILL of a worker during a save", 2, 2, "save", 2 * SAVE_EVERY, KILL, (1,), {-KILL, LOST}),
    Case("SIGKILL of the coordinator during a save", 2, 4, "save", 2 * SAVE_EVERY, KILL, (0,),
         {-KILL, ABORTED, LOST}),
    Case("SIGKILL of a worker during a save, then one", 4, 1, "save", 2 * SAVE_EVERY, KILL, (2,),
         {-KILL, ABORTED, LOST}),
    Case("SIGKILL of all during the first save", 2, 2, "save", SAVE_EVERY, KILL, (), {-KILL}),
]


@pytest.mark.parametrize("case", SIGNALS, ids=lambda case: f"{case.name}, {case.before} to {case.after}")
def test_a_run_that_is_ended_goes_on(folder, undisturbed, tmp_path, case):
  with Run(folder, tmp_path / "run", case.before) as run:
    run.wait_for(case.phase, case.step, case.which[0] if case.which else 0)
    run.signal(case.number, *case.which)
    codes = run.codes()
    assert set(codes) <= case.codes, run.printed()
  steps = durable(run.workdir)
  if case.codes == {SAVED}:
    assert max(steps) >= case.step, run.printed()
  if case.saved is not None:
    assert max(steps) == case.saved, run.printed()
  goes_on(folder, run.workdir, case.after, undisturbed)


@pytest.mark.parametrize("before,after,which", [(2, 2, (1,)), (2, 4, ()), (4, 1, (3,))])
def test_an_evaluation_is_left_and_made_again_when_the_run_goes_on(folder, undisturbed, tmp_path, before,
                                                                   after, which):
  """On held-out images: its batches are collectives, which all processes have to leave at the same one."""
  with Run(folder, tmp_path / "run", before, ("--held-out",)) as run:
    run.wait_for("evaluate", 4, which[0] if which else 0)
    run.signal(TERM, *which)
    assert set(run.codes()) == {SAVED}, run.printed()
  evaluated = lambda: [line["step"] for line in read_metrics(run.workdir / "metrics.jsonl")
                       if "held_out_loss" in line]
  assert (durable(run.workdir)[-1], evaluated()) == (4, [1, 2, 3]), run.printed()
  goes_on(folder, run.workdir, after, undisturbed, ("--held-out",))
  assert evaluated() == list(range(1, STEPS + 1))


@pytest.mark.parametrize("before,after,which", [(2, 2, 1), (2, 4, 0), (4, 1, 3)])
def test_a_process_that_is_stuck_is_named_and_the_run_ended(folder, undisturbed, tmp_path, before, after,
                                                            which):
  with Run(folder, tmp_path / "run", before, ("--stuck", str(which), "5")) as run:
    assert run.codes() == [STUCK] * before, run.printed()
    crash = json.loads((run.workdir / "crash-0.json").read_text())
  assert f"process {which} is late" in crash["reason"]
  assert "at_and_mark" in (run.workdir / f"stacks-{which}.txt").read_text()
  goes_on(folder, run.workdir, after, undisturbed)


# --- checkpoints that are no good ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_saves(folder):
  """The work directory of a run of so many processes that was told to stop after its second checkpoint."""
  def save_twice(processes: int):
    with Run(folder, folder / f"two saves of {processes}", processes) as run:
      run.wait_for("data", 2 * SAVE_EVERY)
      run.signal(TERM)
      assert run.codes() == [SAVED] * processes, run.printed()
    assert len(durable(run.workdir)) >= 2
    return run.workdir
  return functools.cache(save_twice)


def largest_file(checkpoint):
  return max((path for path in checkpoint.rglob("*") if path.is_file()), key=lambda p: p.stat().st_size)


def truncate(checkpoint):
  file = largest_file(checkpoint)
  os.truncate(file, file.stat().st_size // 2)


def flip_a_bit(checkpoint):
  """Early in the largest file, where the arrays are: its end can hold indexes that nothing reads."""
  file = largest_file(checkpoint)
  data = bytearray(file.read_bytes())
  data[len(data) // 4] ^= 16
  file.write_bytes(data)


def copy_half(checkpoint):
  """As a copy that was cut off leaves it: half of the files are there, and not the marker, the last one."""
  files = sorted((path for path in checkpoint.rglob("*") if path.is_file()),
                 key=lambda path: path.name == "COMMITTED.json")
  for path in files[len(files) // 2:]:
    path.unlink()


def lose_metadata(checkpoint):
  found = [*checkpoint.rglob("_METADATA")]
  assert found
  for path in found:
    path.unlink()


@pytest.mark.parametrize("before,after", CHANGES)
@pytest.mark.parametrize("damage", [truncate, flip_a_bit, copy_half, lose_metadata],
                         ids=lambda damage: damage.__name__)
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_it_used(
    folder, undisturbed, two_saves, tmp_path, damage, before, after):
  workdir = tmp_path / "run"
  shutil.copytree(two_saves(before), workdir)
  for log in workdir.glob("process-*.log"):
    log.unlink()
  *_, good, newest = durable(workdir)
  damage(workdir / "checkpoints" / str(newest))
  printed = finish(folder, workdir, after)
  assert f"resuming from checkpoint {good}; set aside checkpoint {newest}: " in printed, printed
  assert list((workdir / "damaged").glob(f"{newest}*"))
  assert outcome(workdir) == undisturbed


@pytest.mark.parametrize("before,after", CHANGES)
def test_a_full_disk_stops_the_run_and_leaves_the_last_good_checkpoint(folder, undisturbed, tmp_path, before,
                                                                       after):
  with Run(folder, tmp_path / "run", before, ("--full-disk-after", str(SAVE_EVERY))) as run:
    codes = run.codes()
    assert exit_codes.CANNOT_SAVE in codes and set(codes) <= {exit_codes.CANNOT_SAVE, LOST, ABORTED}, (
        run.printed())
  assert durable(run.workdir) == [SAVE_EVERY]
  goes_on(folder, run.workdir, after, undisturbed)


# --- the supervisor ------------------------------------------------------------------------------------


def test_the_supervisor_starts_a_run_again_until_it_is_done(folder, undisturbed, tmp_path, monkeypatch):
  for name, value in {**runs.QUICK, "PYTHONPATH": str(runs.ROOT)}.items():
    monkeypatch.setenv(name, value)
  workdir = tmp_path / "run"
  command = [sys.executable, str(runs.ROOT / "tests/chaos/one_process.py"), str(folder), str(workdir),
             "--killed-once", "1", "5"]
  assert supervise(command, 2, workdir, devices=2, linger=5) == 0
  assert outcome(workdir) == undisturbed
  assert json.loads((workdir / "done.json").read_text())["restarts"] == 1
