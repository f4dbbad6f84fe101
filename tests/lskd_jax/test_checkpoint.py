"""What a user relies on: a resumed run goes on bit for bit, wherever and however often it is resumed."""
import json
import resource
import shutil
import time

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
import numpy as np
import pytest

from lskd_jax.checkpoint import Checkpointer, save_model
from lskd_jax.trees import CannotSaveError, CheckpointError, read_tree
from tests.lskd_jax.tiny_checkpoints import (
  assert_same_bits,
  init,
  mesh_of,
  saved,
  spread_over,
  steps_in,
  train_step,
)

# TensorStore drops the futures of its other reads when one of a damaged checkpoint fails.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


# --- resuming ------------------------------------------------------------------------------------


def test_a_run_without_checkpoints_has_nothing_to_restore(tmp_path):
  with Checkpointer(tmp_path) as checkpoints:
    assert checkpoints.restore_latest(jax.eval_shape(init, jax.random.key(0))) is None
    assert checkpoints.durable_step() is None


def test_four_steps_equal_two_steps_restore_two_steps(tmp_path):
  whole = init(jax.random.key(0))
  for _ in range(4):
    whole = train_step(whole)
  saved(tmp_path, [2])
  with Checkpointer(tmp_path) as checkpoints:
    state, extra = checkpoints.restore_latest(jax.eval_shape(init, jax.random.key(0)))
  assert extra == {"next_batch": 2} and state["step"] == 2
  assert_same_bits(train_step(train_step(state)), whole)


def test_the_durable_step_is_the_newest_one_completely_on_disk(tmp_path):
  with Checkpointer(tmp_path) as checkpoints:
    checkpoints.save(1, init(jax.random.key(0)))
    checkpoints.wait()
    (tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp").mkdir()  # a save under way
    assert checkpoints.durable_step() == 1


@pytest.mark.parametrize("shape", [(1, 1), (2, 4)])
def test_a_checkpoint_moves_to_another_mesh(tmp_path, shape):
  state = spread_over(mesh_of(8, 1), train_step(init(jax.random.key(0))))
  with Checkpointer(tmp_path) as checkpoints:
    checkpoints.save(1, state)
    checkpoints.wait()
    target = spread_over(mesh_of(*shape), init(jax.random.key(1)))
    restored, _ = checkpoints.restore_latest(target)
  assert_same_bits(restored, state)
  kernel = restored["params"]["heads"][0]["kernel"][...]
  assert kernel.sharding == NamedSharding(mesh_of(*shape), P("fsdp", "tensor"))


def test_shapes_from_eval_shape_are_restored_to_the_mesh_in_use(tmp_path):
  """An abstract array knows its partition spec but not the devices; scalars know neither."""
  mesh = mesh_of(4, 2)
  jax.set_mesh(mesh)
  def make():
    return {"step": jnp.zeros((), jnp.int32), "params": jnp.ones((8, 4), out_sharding=P("fsdp"))}
  with Checkpointer(tmp_path) as checkpoints:
    checkpoints.save(1, jax.jit(make)())
    checkpoints.wait()
    restored, _ = checkpoints.restore_latest(jax.eval_shape(make))
  assert restored["params"].sharding == NamedSharding(mesh, P("fsdp", None))
  assert restored["step"].sharding == NamedSharding(mesh, P())


def test_only_the_newest_checkpoints_are_kept_and_a_step_is_saved_once(tmp_path):
  states = saved(tmp_path, [1, 2, 3], keep=2)
  assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["2", "3"]
  with Checkpointer(tmp_path, keep=2) as checkpoints:
    checkpoints.save(3, states[1])  # there already: left alone
    state, _ = checkpoints.restore_latest(states[1])
    assert checkpoints.durable_step() == 3
  assert_same_bits(state, states[3])


def test_the_best_are_kept_beside_the_newest(tmp_path):
  """Of equal values the newest counts; NaN and steps without the metric are not among the best."""
  values = {1: 0.5, 2: 0.9, 3: 0.9, 4: float("nan"), 5: None, 6: 0.1}
  with Checkpointer(tmp_path, keep=1, keep_best=2, best_metric="right") as checkpoints:
    for step, value in values.items():
      checkpoints.save(step, {"a": jnp.zeros(1)}, metrics=None if value is None else {"right": value})
  assert steps_in(tmp_path) == [2, 3, 6]
  with Checkpointer(tmp_path, keep=1, keep_best=1, best_metric="right", best_mode="min") as checkpoints:
    checkpoints.save(7, {"a": jnp.zeros(1)}, metrics={"right": 0.2})
  assert steps_in(tmp_path) == [6, 7]


def test_a_metric_that_is_known_after_the_save_counts(tmp_path):
  with Checkpointer(tmp_path, keep=1, keep_best=1, best_metric="right") as checkpoints:
    assert checkpoints.is_empty()
    checkpoints.save(1, {"a": jnp.zeros(1)})
    checkpoints.add_metrics(1, {"right": 0.9})
    for step in (2, 3):
      checkpoints.save(step, {"a": jnp.zeros(1)}, metrics={"right": 0.5})
    assert not checkpoints.is_empty()
  assert steps_in(tmp_path) == [1, 3]


def test_the_best_by_no_metric_is_refused(tmp_path):
  with pytest.raises(CheckpointError, match="keep_best=1 needs the name of a metric"):
    Checkpointer(tmp_path, keep_best=1)


def test_save_every_says_when_a_periodic_save_is_due(tmp_path):
  with Checkpointer(tmp_path, save_every=50) as checkpoints:
    assert [step for step in range(1, 151) if checkpoints.due(step)] == [50, 100, 150]


def test_the_marker_says_what_was_saved_and_how_long_it_took(tmp_path):
  state = spread_over(mesh_of(4, 2), train_step(init(jax.random.key(0))))
  with Checkpointer(tmp_path) as checkpoints:
    assert checkpoints.seconds_of_last_save() is None
    checkpoints.save(7, state, {"next_batch": 7}, metrics={"loss": np.float32(0.5)})
    checkpoints.wait()
    assert checkpoints.seconds_of_last_save() > 0
  marker = json.loads((tmp_path / "checkpoints/7/COMMITTED.json").read_text())
  assert marker["step"] == 7 and marker["extra"] == {"next_batch": 7}
  assert marker["metrics"] == {"loss": 0.5}
  assert marker["mesh"] == {"fsdp": 4, "tensor": 2} and marker["processes"] == 1


def test_a_step_is_committed_without_anyone_waiting_for_it(tmp_path):
  with Checkpointer(tmp_path) as checkpoints:
    checkpoints.save(1, {"a": jnp.zeros(1)})
    deadline = time.monotonic() + 60
    while checkpoints.durable_step() is None and time.monotonic() < deadline:
      checkpoints.poll()
      time.sleep(0.01)
    assert checkpoints.durable_step() == 1


# --- the frozen part -----------------------------------------------------------------------------


def test_the_frozen_part_is_written_once_and_is_in_no_checkpoint(tmp_path):
  states = saved(tmp_path, [1, 2])
  assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoints", "frozen"]
  metadata = json.loads((tmp_path / "checkpoints" / "2" / "_CHECKPOINT_METADATA").read_text())
  assert not any("vit" in name for name in metadata["custom_metadata"]["leaves"])
  with Checkpointer(tmp_path) as checkpoints:
    state, _ = checkpoints.restore_latest(jax.eval_shape(init, jax.random.key(0)))
  assert state["frozen"]["vit"]["kernel"][...].dtype == jnp.bfloat16
  assert_same_bits(state["frozen"], states[1]["frozen"])


def test_a_frozen_part_left_half_written_is_written_again(tmp_path):
  (tmp_path / "frozen.orbax-checkpoint-tmp" / "d").mkdir(parents=True)
  saved(tmp_path, [1])
  assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoints", "frozen"]


def test_another_runs_frozen_part_is_refused(tmp_path):
  saved(tmp_path, [1])
  with Checkpointer(tmp_path) as checkpoints:
    with pytest.raises(CheckpointError, match="frozen part of another run: use another workdir"):
      checkpoints.save(2, init(jax.random.key(5)))


def test_frozen_leaves_out_of_a_model_directory_are_referred_to_and_not_copied(tmp_path):
  state = init(jax.random.key(0))
  frozen = {"vit": state["frozen"]["vit"], "table": jnp.arange(3)}  # the table is no model's parameter
  state = dict(state, frozen=frozen)
  save_model(tmp_path / "model", {}, {"vit": frozen["vit"], "heads": state["params"]["heads"]})
  with Checkpointer(tmp_path / "run", frozen_source=tmp_path / "model") as checkpoints:
    checkpoints.save(1, state)
  run = tmp_path / "run"
  assert set(read_tree(run / "frozen")) == {"table"}
  with Checkpointer(run) as checkpoints:  # what was referred to is known
    restored, _ = checkpoints.restore_latest(jax.eval_shape(lambda: state))
    assert_same_bits(restored, state)
    checkpoints.save(2, state)
  changed = jax.tree.map(lambda leaf: leaf + 1, frozen["vit"])
  save_model(tmp_path / "model", {}, {"vit": changed, "heads": state["params"]["heads"]})
  line = f"{run}/frozen.json refers to the parameters of {tmp_path}/model, which has changed or vanished"
  for _ in ("changed", "vanished"):
    with Checkpointer(run) as checkpoints:
      with pytest.raises(CheckpointError, match=line):
        checkpoints.restore_latest(state)
    shutil.rmtree(tmp_path / "model", ignore_errors=True)


@pytest.mark.parametrize("source", ["another model", "no model"])
def test_frozen_leaves_that_their_source_does_not_have_are_copied(tmp_path, source):
  state = init(jax.random.key(0))
  if source == "another model":
    save_model(tmp_path / source, {}, init(jax.random.key(1))["frozen"])
  with Checkpointer(tmp_path, frozen_source=tmp_path / source) as checkpoints:
    checkpoints.save(1, state)
  assert (tmp_path / "frozen").exists() and not (tmp_path / "frozen.json").exists()


# --- a full disk ---------------------------------------------------------------------------------


@pytest.fixture
def small_files():
  """Writing more than 20 kB to a file fails, as on a disk that is full."""
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
  yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def big(step):
  """A state that needs more than 20 kB on disk, also when it is packed."""
  return {"step": jnp.int32(step), "params": jax.random.normal(jax.random.key(step), (100_000,))}


def test_a_full_disk_is_noticed_at_the_next_step_and_the_last_good_checkpoint_stays(tmp_path, small_files):
  with Checkpointer(tmp_path) as checkpoints:
    checkpoints.save(1, {"step": jnp.int32(1), "params": jnp.zeros(100_000)})  # packs well
    checkpoints.wait()
    checkpoints.save(2, big(2))
    with pytest.raises(CannotSaveError, match="cannot save checkpoint 2 to .*newest complete one is 1"):
      for _ in range(6000):  # a training loop that never saves again
        checkpoints.poll()
        time.sleep(0.01)
    assert checkpoints.durable_step() == 1
    small_files()  # there is space again
    checkpoints.save(2, big(2))
  with Checkpointer(tmp_path) as checkpoints:
    assert_same_bits(checkpoints.restore_latest(big(0))[0], big(2))


def test_a_run_whose_disk_was_full_goes_on_once_there_is_space(tmp_path, small_files):
  with pytest.raises(CannotSaveError):
    with Checkpointer(tmp_path) as checkpoints:
      checkpoints.save(1, big(1))
  small_files()
  with Checkpointer(tmp_path) as checkpoints:
    assert checkpoints.restore_latest(big(0)) is None
    checkpoints.save(1, big(1))
  assert steps_in(tmp_path) == [1]


def test_a_full_disk_for_the_frozen_part_is_the_same_error(tmp_path, small_files):
  with Checkpointer(tmp_path) as checkpoints:
    with pytest.raises(CannotSaveError, match="cannot write .*frozen"):
      checkpoints.save(1, {"step": jnp.int32(1), "frozen": big(1)["params"]})


def test_a_failed_save_has_an_exit_code_of_its_own():
  assert CannotSaveError("full").exit_code == 4


# --- another model -------------------------------------------------------------------------------


def test_a_checkpoint_of_another_model_is_one_line_that_names_the_leaves(tmp_path):
  def tree(**params):
    return {"params": {name: jnp.zeros(shape) for name, shape in params.items()}}
  with Checkpointer(tmp_path) as checkpoints:
    checkpoints.save(1, tree(gate=(2,), kernel=(4, 8), old=(3,)))
    checkpoints.wait()
    with pytest.raises(CheckpointError) as error:
      checkpoints.restore_latest(tree(gate=(2,), kernel=(4, 16), new=(3,)))
    assert checkpoints.durable_step() == 1  # not taken for damage
  text = str(error.value)
  assert "\n" not in text
  assert "missing on disk: params/new;" in text
  assert "on disk but not in the model: params/old;" in text
  assert "params/kernel (float32[4,8] on disk, float32[4,16] in the model)" in text


def test_another_dtype_is_a_mismatch_too_since_a_silent_cast_would_change_values(tmp_path):
  with Checkpointer(tmp_path) as checkpoints:
    checkpoints.save(1, {"params": jnp.zeros(3)})
    checkpoints.wait()
    with pytest.raises(CheckpointError, match=r"float32\[3\] on disk, bfloat16\[3\] in the model"):
      checkpoints.restore_latest({"params": jnp.zeros(3, jnp.bfloat16)})
