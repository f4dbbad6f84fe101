"""What a user relies on: a resumed run goes on bit for bit, and no damaged file is ever used."""
import json
import os
from pathlib import Path
import resource
import shutil
import signal
import subprocess
import sys
import time

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import numpy as np
import optax
import pytest

from lskd_jax.checkpoint import Checkpointer, load_config, load_model, save_model
from lskd_jax.trees import (
  CannotSaveError,
  CheckpointError,
  fingerprints,
  named_leaves,
  params_digest,
  read_tree,
)

# TensorStore drops the futures of its other reads when one of a damaged checkpoint fails.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


class TwoTowers(nnx.Module):
  """A frozen tower and a trained one, with the dtypes that a student has."""

  def __init__(self, width, rngs):
    spread = nnx.initializers.lecun_normal()
    self.vit = nnx.Linear(width, width, kernel_init=spread, param_dtype=jnp.bfloat16, rngs=rngs)
    self.heads = nnx.List([nnx.Linear(width, width, rngs=rngs) for _ in range(2)])


def init(key, width=64):
  model = TwoTowers(width, nnx.Rngs(key))
  trainable = nnx.All(nnx.Param, nnx.Not(nnx.PathContains("vit")))
  _, params, frozen = nnx.split(model, trainable, ...)
  opt = optax.adam(1e-2).init(params)
  return {"step": jnp.zeros((), jnp.int32), "params": params, "opt": opt, "frozen": frozen}


@jax.jit
def train_step(state):
  def loss_fn(params):
    return sum(jnp.sum(jnp.tanh(leaf) ** 2) for leaf in jax.tree.leaves(params))
  grads = jax.grad(loss_fn)(state["params"])
  updates, opt = optax.adam(1e-2).update(grads, state["opt"], state["params"])
  params = optax.apply_updates(state["params"], updates)
  return dict(state, step=state["step"] + 1, params=params, opt=opt)


def assert_same_bits(left, right):
  left, right = named_leaves(left), named_leaves(right)
  assert list(left) == list(right)
  for name in left:
    assert left[name].dtype == right[name].dtype, name
    assert np.asarray(left[name]).tobytes() == np.asarray(right[name]).tobytes(), name


def mesh_of(*shape):
  return jax.make_mesh(shape, ("fsdp", "tensor"), axis_types=(AxisType.Explicit,) * 2)


def spread_over(mesh, tree):
  """Matrices split over both axes of the mesh, everything else whole."""
  def spec(leaf):
    return P("fsdp", "tensor") if leaf.ndim == 2 else P()
  return jax.tree.map(lambda leaf: jax.device_put(leaf, NamedSharding(mesh, spec(leaf))), tree)


def saved(workdir, steps, **options):
  """Trains, saving at the given steps; returns the states by step."""
  state, states = init(jax.random.key(0)), {}
  with Checkpointer(workdir, **options) as checkpoints:
    for step in range(1, max(steps) + 1):
      state = train_step(state)
      if step in steps:
        checkpoints.save(step, state, {"next_batch": step})
        states[step] = state
  return states


def steps_in(workdir):
  return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


def largest_data_file(folder):
  return max((p for p in Path(folder).rglob("d/*") if p.is_file()), key=lambda p: p.stat().st_size)


def flip_a_bit(path):
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(data)


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


# --- damage --------------------------------------------------------------------------------------


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
  marker.unlink()
  flip_a_bit(largest_data_file(tmp_path / "checkpoints/1"))
  with Checkpointer(tmp_path) as checkpoints:
    with pytest.raises(CheckpointError, match="no checkpoint in .* can be restored"):
      checkpoints.restore_latest(states[1])


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


# --- all of them damaged -------------------------------------------------------------------------


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
import os, signal, sys, threading, time
import jax.numpy as jnp, numpy as np
from lskd_jax.checkpoint import Checkpointer
checkpoints = Checkpointer(sys.argv[1])
checkpoints.save(1, {"step": jnp.int32(1), "params": jnp.ones(16)})
checkpoints.wait()
big = jnp.asarray(np.random.default_rng(0).standard_normal(30_000_000, np.float32))
checkpoints.save(2, {"step": jnp.int32(2), "params": big})
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


# --- model directories ---------------------------------------------------------------------------


@pytest.fixture
def tokenizer(tmp_path):
  folder = tmp_path / "a_tokenizer"
  folder.mkdir()
  (folder / "tokenizer.json").write_text("{}")
  return folder


def test_a_model_directory_comes_back_as_it_was(tmp_path, tokenizer):
  params = init(jax.random.key(0))["frozen"]
  save_model(tmp_path / "model", {"width": 64}, params, tokenizer)
  assert sorted(p.name for p in (tmp_path / "model").iterdir()) == [
      "config.json", "params", "tokenizer"]
  assert (tmp_path / "model" / "tokenizer" / "tokenizer.json").read_text() == "{}"
  config, loaded = load_model(tmp_path / "model", jax.eval_shape(lambda: params))
  assert config == {"width": 64}
  assert_same_bits(loaded, params)


def test_a_model_loads_without_its_code_as_dicts_of_numpy_arrays(tmp_path):
  params = init(jax.random.key(0))["params"]
  save_model(tmp_path / "model", {}, params)
  _, loaded = load_model(tmp_path / "model")
  assert isinstance(loaded["heads"]["1"]["kernel"], np.ndarray)
  assert_same_bits(loaded, params)


def test_a_model_can_be_saved_from_numpy_and_again_over_itself(tmp_path):
  for value in (1, 2):
    save_model(tmp_path / "model", {"value": value}, {"kernel": np.full((2, 3), value, np.float32)})
  config, params = load_model(tmp_path / "model")
  assert config == {"value": 2} and params["kernel"].tolist() == [[2, 2, 2], [2, 2, 2]]
  assert [p.name for p in tmp_path.iterdir()] == ["model"]  # no temporary folder stays


def test_errors_about_model_directories_say_what_is_wrong(tmp_path):
  with pytest.raises(CheckpointError, match="nowhere is not a model directory: it has no config"):
    load_model(tmp_path / "nowhere")
  (tmp_path / "notes.txt").write_text("keep me")
  with pytest.raises(CheckpointError, match="holds other files: choose a new or empty folder"):
    save_model(tmp_path, {}, {"a": jnp.zeros(1)})
  with pytest.raises(CheckpointError, match="is not a folder: expected a tokenizer"):
    save_model(tmp_path / "model", {}, {"a": jnp.zeros(1)}, tmp_path / "no_tokenizer")
  with pytest.raises(CheckpointError, match="leaf a is float64: only arrays of at most 32 bits"):
    save_model(tmp_path / "model", {}, {"a": np.zeros(1)})
  save_model(tmp_path / "model", {}, {"a": jnp.zeros(1), "b": jnp.zeros(1)})
  with pytest.raises(CheckpointError, match="missing on disk: c; on disk but not in the model: b"):
    load_model(tmp_path / "model", {"a": jnp.zeros(1), "c": jnp.zeros(1)})
  (tmp_path / "model" / "config.json").write_text('{"half": ')
  with pytest.raises(CheckpointError, match="config.json is not JSON"):
    load_config(tmp_path / "model")


def test_a_damaged_model_directory_is_an_error(tmp_path):
  save_model(tmp_path / "model", {}, {"a": jax.random.normal(jax.random.key(0), (64, 64))})
  flip_a_bit(largest_data_file(tmp_path / "model"))
  with pytest.raises(CheckpointError, match="is damaged"):
    load_model(tmp_path / "model")


# --- fingerprints --------------------------------------------------------------------------------


def fingerprint(x):
  return fingerprints({"x": x})["x"]


def test_a_fingerprint_is_a_weighted_sum_of_bits():
  """Index i weighs i * 2654435761, made odd, along axis 0 and three times that along axis 1."""
  hashed = 2654435761
  assert fingerprint(np.int32([7, 0, 0])) == 7
  assert fingerprint(np.int32([0, 3, 0])) == 3 * hashed % 2**32
  assert fingerprint(np.int32([0, 0, 1])) == (2 * hashed + 1) % 2**32
  assert fingerprint(np.int32([[0, 0], [0, 5]])) == 5 * hashed * (3 * hashed) % 2**32
  assert fingerprint(np.float32(1.0)) == 0x3F800000  # the bits of 1.0; a scalar has no weight


def test_the_digest_of_parameters_depends_on_names_and_values_but_not_on_the_mesh():
  tree = {"kernel": jnp.arange(64.0).reshape(8, 8), "bias": jnp.ones(8)}
  digest = params_digest(tree)
  assert len(digest) == 64
  assert params_digest(spread_over(mesh_of(2, 4), tree)) == digest
  assert params_digest(jax.tree.map(np.asarray, tree)) == digest
  assert params_digest(tree | {"bias": tree["bias"].at[3].set(2)}) != digest
  assert params_digest({"kernel": tree["kernel"], "scale": tree["bias"]}) != digest


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "bool"])
def test_a_fingerprint_depends_on_values_and_places_but_not_on_the_mesh(dtype):
  values = np.arange(64).reshape(8, 8) % 3 - 1
  x = jnp.asarray(values).astype(dtype)
  whole = fingerprint(x)
  for mesh, spec in [(mesh_of(8, 1), P("fsdp")), (mesh_of(2, 4), P("tensor", "fsdp"))]:
    assert fingerprint(jax.device_put(x, NamedSharding(mesh, spec))) == whole
  assert fingerprint(x.T) != whole
  assert fingerprint(x.at[5, 5].set(x[5, 6])) != whole
