"""No damaged, half-written or half-copied checkpoint is ever used, and none is deleted."""
import os
from pathlib import Path
import signal
import subprocess
import sys

import jax.numpy as jnp
import pytest

from lskd_jax import errors, exit_codes
from lskd_jax.checkpoint import Checkpointer
from lskd_jax.committed import FirstSaveLostError
from lskd_jax.trees import CheckpointError
from tests.lskd_jax.tiny_checkpoints import (
  assert_same_bits,
  flip_a_bit,
  largest_data_file,
  saved,
  steps_in,
  train_step,
)

# TensorStore drops the futures of its other reads when one of a damaged checkpoint fails.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def test_one_flipped_bit_is_noticed_and_the_run_goes_on_from_the_step_before(tmp_path):
  states = saved(tmp_path, [1, 2])
  flip_a_bit(largest_data_file(tmp_path / "checkpoints" / "2"))
  with Checkpointer(tmp_path) as checkpoints:
    state, extra = checkpoints.restore_latest(states[1])
    assert extra == {"next_batch": 1}
    assert_same_bits(state, states[1])
    assert (tmp_path / "damaged" / "2").is_dir()
    checkpoints.save(2, train_step(state))  # the step can be saved again
    checkpoints.wait()
    assert_same_bits(checkpoints.restore_latest(states[1])[0], states[2])


@pytest.mark.parametrize("file", ["_CHECKPOINT_METADATA", "_METADATA", "manifest.ocdbt", "largest"])
def test_a_checkpoint_with_a_missing_or_short_file_is_passed_over(tmp_path, file):
  states = saved(tmp_path, [1, 2])
  folder = tmp_path / "checkpoints" / "2"
  if file == "largest":
    path = largest_data_file(folder)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
  else:
    (folder / file).unlink()
  with Checkpointer(tmp_path) as checkpoints:
    state, _ = checkpoints.restore_latest(states[1])
  assert_same_bits(state, states[1])


def test_a_step_without_its_marker_is_set_aside_and_the_report_says_why(tmp_path):
  """So is a copy that was cut off: whole files are there, but not the last one."""
  states = saved(tmp_path, [1, 2])
  (tmp_path / "checkpoints/2/COMMITTED.json").unlink()
  with Checkpointer(tmp_path) as checkpoints:
    assert checkpoints.durable_step() == 1
    state, _ = checkpoints.restore_latest(states[1])
    assert checkpoints.report == (
        "resuming from checkpoint 1; set aside checkpoint 2: it has no COMMITTED.json: its save or its "
        "copy was cut off")
  assert_same_bits(state, states[1])
  assert steps_in(tmp_path) == [1] and (tmp_path / "damaged/2").is_dir()


def test_a_copy_whose_marker_came_before_its_arrays_is_set_aside(tmp_path):
  states = saved(tmp_path, [1, 2])
  missing = largest_data_file(tmp_path / "checkpoints" / "2")
  missing.unlink()
  with Checkpointer(tmp_path) as checkpoints:
    assert checkpoints.restore_latest(states[1])[0]["step"] == 1
    name = missing.relative_to(tmp_path / "checkpoints/2")
    assert f"files are missing or have another size: {name}" in checkpoints.report


def test_a_marker_belongs_to_one_manifest(tmp_path):
  states = saved(tmp_path, [1, 2])
  path = tmp_path / "checkpoints/2/_CHECKPOINT_METADATA"
  path.write_text(path.read_text().replace('"next_batch": 2', '"next_batch": 3'))
  with Checkpointer(tmp_path) as checkpoints:
    assert checkpoints.restore_latest(states[1])[1] == {"next_batch": 1}
    assert "its manifest is not the one that COMMITTED.json was written for" in checkpoints.report


def test_a_run_killed_just_before_its_first_commit_does_not_lose_the_step(tmp_path):
  """Nothing is committed, so there is nothing to fall back to; and every value of the step is right."""
  states = saved(tmp_path, [1])
  marker = tmp_path / "checkpoints/1/COMMITTED.json"
  marker.unlink()
  with Checkpointer(tmp_path) as checkpoints:
    assert_same_bits(checkpoints.restore_latest(states[1])[0], states[1])
    assert checkpoints.durable_step() == 1


def test_a_run_killed_in_its_first_save_begins_anew(tmp_path):
  """As where folders are not renamed at once: one step is there, in part, and nothing before it."""
  states = saved(tmp_path, [1])
  (tmp_path / "checkpoints/1/COMMITTED.json").unlink()
  largest_data_file(tmp_path / "checkpoints/1").unlink()
  with Checkpointer(tmp_path) as checkpoints:
    with pytest.raises(FirstSaveLostError, match="set aside checkpoint 1: .*; start again") as caught:
      checkpoints.restore_latest(states[1])
  assert errors.exit_code(caught.value) == exit_codes.PREEMPTED and (tmp_path / "damaged/1").is_dir()
  with Checkpointer(tmp_path) as checkpoints:
    assert checkpoints.is_empty()


@pytest.mark.parametrize("committed", [True, False])
def test_steps_all_of_which_are_damaged_are_left_where_they_are(tmp_path, committed):
  """A copy may be under way, or somebody may still mend them."""
  states = saved(tmp_path, [1, 2])
  for step in (1, 2):
    flip_a_bit(largest_data_file(tmp_path / "checkpoints" / str(step)))
    if not committed:
      (tmp_path / "checkpoints" / str(step) / "COMMITTED.json").unlink()
  with Checkpointer(tmp_path) as checkpoints:
    with pytest.raises(CheckpointError, match="no checkpoint in .* can be restored"):
      checkpoints.restore_latest(states[1])
  assert steps_in(tmp_path) == [1, 2]


def test_setting_a_step_aside_twice_keeps_both(tmp_path):
  for _ in range(2):
    states = saved(tmp_path, [1, 2])
    flip_a_bit(largest_data_file(tmp_path / "checkpoints" / "2"))
    with Checkpointer(tmp_path) as checkpoints:
      checkpoints.restore_latest(states[1])
  assert sorted(path.name for path in (tmp_path / "damaged").iterdir()) == ["2", "2-2"]


def test_a_deletion_that_was_killed_leaves_nothing_that_looks_like_a_step(tmp_path):
  states = saved(tmp_path, [1, 2])
  (tmp_path / "checkpoints/1/COMMITTED.json").unlink()  # what a deletion does first
  (tmp_path / "checkpoints/1").rename(tmp_path / "checkpoints/1.deleted")
  with Checkpointer(tmp_path) as checkpoints:
    assert checkpoints.restore_latest(states[1])[0]["step"] == 2
  assert steps_in(tmp_path) == [2]


def test_when_all_checkpoints_are_damaged_the_run_does_not_silently_start_over(tmp_path):
  states = saved(tmp_path, [1, 2])
  for step in (1, 2):
    flip_a_bit(largest_data_file(tmp_path / "checkpoints" / str(step)))
  for _ in range(2):  # also not at the second try
    with Checkpointer(tmp_path) as checkpoints:
      with pytest.raises(CheckpointError, match="of steps 2, 1 .*remove that folder to start over"):
        checkpoints.restore_latest(states[1])


def test_a_half_written_step_is_ignored_and_removed(tmp_path):
  states = saved(tmp_path, [1])
  left_over = tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp"
  (left_over / "d").mkdir(parents=True)
  with Checkpointer(tmp_path) as checkpoints:
    assert checkpoints.restore_latest(states[1])[0]["step"] == 1
    checkpoints.save(2, train_step(states[1]))
  assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["1", "2"]


KILLED_WHILE_SAVING = """
import os, signal, sys, time
import jax.numpy as jnp, numpy as np
from lskd_jax import errors, exit_codes
from lskd_jax.checkpoint import Checkpointer
from lskd_jax.committed import FirstSaveLostError
checkpoints = Checkpointer(sys.argv[1])
checkpoints.save(1, {"step": jnp.int32(1), "params": jnp.ones(16)})
checkpoints.wait()
big = jnp.asarray(np.random.default_rng(0).standard_normal(30_000_000, np.float32))
checkpoints.save(2, {"step": jnp.int32(2), "params": big})
while not list(checkpoints.directory.glob("*tmp*")):
  time.sleep(0.001)
os.kill(os.getpid(), signal.SIGKILL)  # the arrays are being written now
"""


@pytest.mark.slow
def test_a_process_killed_in_the_middle_of_a_save_resumes_from_the_step_before(tmp_path):
  root = Path(__file__).resolve().parents[2]
  killed = subprocess.run([sys.executable, "-c", KILLED_WHILE_SAVING, tmp_path], timeout=120,
                          env=os.environ | {"PYTHONPATH": str(root)}, check=False)
  assert killed.returncode == -signal.SIGKILL
  assert any("tmp" in p.name for p in (tmp_path / "checkpoints").iterdir())
  target = {"step": jnp.int32(0), "params": jnp.zeros(16)}
  with Checkpointer(tmp_path) as checkpoints:
    state, _ = checkpoints.restore_latest(target)
    assert state["step"] == 1
    checkpoints.save(2, state)
  assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["1", "2"]
