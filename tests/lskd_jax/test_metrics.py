"""The metrics file over restarts, throughput with a clock we set, and FLOPs counted by hand."""
import errno
import json
import math
from types import SimpleNamespace

import jax
from jax.experimental import pallas as pl
import jax.numpy as jnp
import pytest
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2  # the format of TensorBoard's files

from lskd_jax.metrics import MetricWriter, Throughput, peak_flops, read_metrics, step_flops


def lines(workdir):
  return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


# --- the metrics file ----------------------------------------------------------------------------


def test_one_json_line_per_step(tmp_path):
  with MetricWriter(tmp_path, tensorboard=False) as writer:
    writer.write(10, {"loss": jnp.float32(0.5), "lr": 1e-3})
    writer.write(20, {"loss": jnp.float32(0.25)})
  assert lines(tmp_path) == [{"step": 10, "loss": 0.5, "lr": 1e-3}, {"step": 20, "loss": 0.25}]


def test_writing_does_not_wait_a_step_is_fetched_when_the_next_one_comes(tmp_path):
  with MetricWriter(tmp_path, tensorboard=False) as writer:
    writer.write(1, {"loss": 1.0})
    assert lines(tmp_path) == []
    writer.write(2, {"loss": 2.0})
    assert [line["step"] for line in lines(tmp_path)] == [1]
    writer.flush()  # before a checkpoint of step 2
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]


def test_values_of_the_same_step_share_its_line(tmp_path):
  """Training logs a step and then evaluation adds to it, also after a checkpoint's flush."""
  with MetricWriter(tmp_path, tensorboard=False) as writer:
    writer.write(10, {"loss": 1.0})
    writer.write(10, {"accuracy": 0.5})
    writer.flush()
    writer.write(10, {"recall": 0.75})
    writer.write(20, {"loss": 0.5})
  assert lines(tmp_path) == [
      {"step": 10, "loss": 1.0, "accuracy": 0.5, "recall": 0.75}, {"step": 20, "loss": 0.5}]


def test_steps_cannot_go_back(tmp_path):
  with MetricWriter(tmp_path, tensorboard=False) as writer:
    writer.write(10, {"loss": 1.0})
    with pytest.raises(ValueError, match="metrics of step 9 come after those of step 10"):
      writer.write(9, {"loss": 1.0})


def test_a_resumed_run_drops_the_lines_after_the_restored_step(tmp_path):
  """Killed at step 40, resumed from the checkpoint of step 20: 30 and 40 are trained again."""
  with MetricWriter(tmp_path, tensorboard=False) as writer:
    for step in (10, 20, 30, 40):
      writer.write(step, {"loss": float(step)})
  with MetricWriter(tmp_path, step=20, tensorboard=False) as writer:
    assert [line["step"] for line in lines(tmp_path)] == [10, 20]
    writer.write(20, {"accuracy": 0.5})  # a last evaluation that is run again
    writer.write(30, {"loss": 3.0})
  assert lines(tmp_path) == [
      {"step": 10, "loss": 10.0}, {"step": 20, "loss": 20.0, "accuracy": 0.5},
      {"step": 30, "loss": 3.0}]


def test_a_torn_last_line_is_repaired(tmp_path):
  (tmp_path / "metrics.jsonl").write_text('{"step": 10, "loss": 1.0}\n{"step": 20, "lo')
  with MetricWriter(tmp_path, step=20, tensorboard=False) as writer:
    writer.write(30, {"loss": 3.0})
  assert [line["step"] for line in lines(tmp_path)] == [10, 30]


def test_a_diverged_loss_is_still_valid_json(tmp_path):
  with MetricWriter(tmp_path, tensorboard=False) as writer:
    writer.write(1, {"loss": jnp.float32(jnp.nan), "norm": jnp.float32(-jnp.inf)})
  assert read_metrics(tmp_path / "metrics.jsonl") == [
      {"step": 1, "loss": "NaN", "norm": "-Infinity"}]
  assert math.isnan(float("NaN"))  # what a reader does with it


def test_transfers_are_explicit(tmp_path):
  """The training loop forbids implicit transfers, so that none slows it down unseen."""
  loss = jnp.float32(2.0)
  with jax.transfer_guard("disallow"), MetricWriter(tmp_path, tensorboard=False) as writer:
    writer.write(1, {"loss": loss})
  assert lines(tmp_path) == [{"step": 1, "loss": 2.0}]


def on_the_board(folder):
  """What TensorBoard's files hold: (step, name, value)."""
  found = []
  for path in (folder / "tensorboard").iterdir():
    data = path.read_bytes()
    while data:  # a record: length (8 bytes), checksum (4), an Event, checksum (4)
      length = int.from_bytes(data[:8], "little")
      event = event_pb2.Event.FromString(data[12:12 + length])
      found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
      data = data[16 + length:]
  return found


def test_tensorboard_gets_the_same_values_as_soon_as_they_are_flushed(tmp_path):
  with MetricWriter(tmp_path) as writer:
    writer.write(7, {"loss": jnp.float32(0.5)})
    writer.flush()
    assert on_the_board(tmp_path) == [(7, "loss", 0.5)]  # also if the process is killed now


def test_a_disk_that_cannot_take_the_board_is_one_warning(tmp_path, monkeypatch, caplog):
  def full(self, event):
    raise OSError(errno.ENOSPC, "No space left on device")
  with MetricWriter(tmp_path) as writer:
    monkeypatch.setattr(EventsWriter, "write_event", full)
    for step in range(20):
      writer.write(step, {"loss": 0.5})
  assert len(lines(tmp_path)) == 20
  assert [record.message for record in caplog.records] == [
      "no more TensorBoard: [Errno 28] No space left on device"]


# --- throughput ----------------------------------------------------------------------------------


class Clock:
  now = 0.0

  def __call__(self):
    return self.now


def test_rates_of_two_steps_in_four_seconds_one_of_them_waiting():
  clock = Clock()
  rates = Throughput(flops_per_step=3e9, peak=6e9, clock=clock)
  for _ in range(2):
    with rates.waiting():
      clock.now += 0.5
    clock.now += 1.5
    rates.count(images=8, statements=20)
  with rates.paused("evaluation"):
    clock.now += 10
  with rates.paused("save"):
    clock.now += 6
  assert rates.report() == {
      "steps_per_second": 0.5, "images_per_second": 4.0, "statements_per_second": 10.0,  # in 4 s
      "data_wait_share": 0.05, "evaluation_share": 0.5, "save_share": 0.3,  # of all 20 s
      "step_share": pytest.approx(0.15), "mfu": 0.25}  # 2 x 3 GFLOP in 4 s, of 6 GFLOP/s
  assert rates.report() == {}  # nothing counted since


def test_parts_of_the_time_are_told_as_they_end():
  clock, told = Clock(), []
  rates = Throughput(clock=clock, record=lambda *part: told.append(part))
  with rates.waiting():
    clock.now += 0.5
  with rates.paused("save"):
    clock.now += 2
  assert told == [("data_wait", 0.5), ("save", 2)]


def test_without_a_known_peak_there_is_no_mfu():
  clock = Clock()
  rates = Throughput(flops_per_step=1e9, peak=None, clock=clock)
  clock.now = 1.0
  rates.count(images=1, statements=1)
  assert "mfu" not in rates.report()


@pytest.mark.parametrize("kind,peak", [
    ("TPU v5 lite", 197e12), ("TPU v5", 459e12), ("TPU v5p", 459e12), ("NVIDIA A100-SXM4-40GB", 312e12),
    ("NVIDIA A100 80GB PCIe", 312e12), ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12),
    ("NVIDIA L4", 121e12), ("NVIDIA L40S", 362e12), ("NVIDIA L40", None), ("something new", None)])
def test_published_peaks(kind, peak):
  assert peak_flops(SimpleNamespace(platform="any", device_kind=kind)) == peak


def test_a_cpus_peak_is_measured():
  here = sum(peak_flops(device) for device in jax.local_devices(backend="cpu"))
  assert 1e8 < here < 1e15  # 8 pretended devices share what the cores can do


# --- FLOPs ---------------------------------------------------------------------------------------


def traced(function, *shapes):
  return jax.jit(function).trace(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes))


def test_a_matrix_product_is_2mkn_flops():
  assert step_flops(traced(jnp.matmul, (3, 5), (5, 7))) == 2 * 3 * 5 * 7
  batched = traced(lambda x, y: jnp.einsum("bmk,bkn->bmn", x, y), (4, 3, 5), (4, 5, 7))
  assert step_flops(batched) == 4 * 2 * 3 * 5 * 7


def test_a_scan_counts_every_turn_which_xla_does_not():
  def tower(x, blocks):
    return jax.lax.scan(lambda x, block: (jnp.tanh(x @ block), None), x, blocks)[0]
  scanned = traced(tower, (4, 8), (12, 8, 8))
  assert step_flops(scanned) == 12 * 2 * 4 * 8 * 8
  assert scanned.lower().compile().cost_analysis()["flops"] < 2 * 2 * 4 * 8 * 8  # about one turn


def test_the_gradient_of_a_product_is_two_products_and_remat_adds_the_recomputed_one():
  def loss(x, w):
    return jnp.tanh(x @ w).sum()
  one = 2 * 4 * 8 * 8
  plain, remat = (jax.value_and_grad(f, argnums=(0, 1)) for f in (loss, jax.checkpoint(loss)))
  assert step_flops(traced(plain, (4, 8), (8, 8))) == 3 * one
  assert step_flops(traced(remat, (4, 8), (8, 8))) == 4 * one


def test_a_patch_convolution_and_its_gradients_agree_with_xla():
  def patchify(images, kernel):
    return jax.lax.conv_general_dilated(
        images, kernel, (4, 4), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
  shapes = (2, 16, 16, 3), (4, 4, 3, 8)
  one = 2 * (2 * 4 * 4) * 8 * (4 * 4 * 3)  # images x patches x outputs x inputs of a patch
  assert step_flops(traced(patchify, *shapes)) == one
  gradients = traced(jax.grad(lambda *a: patchify(*a).sum() ** 2, argnums=(0, 1)), *shapes)
  assert step_flops(gradients) == 3 * one
  assert gradients.lower().compile().cost_analysis()["flops"] == pytest.approx(3 * one, rel=0.01)


def test_a_kernel_counts_once_for_each_point_of_its_grid():
  def kernel(x, y, out):
    out[...] = x[...] @ y[...]

  def product(x, y):  # in 4 x 2 blocks of 8 x 16
    return pl.pallas_call(
      kernel, grid=(4, 2), out_shape=jax.ShapeDtypeStruct((32, 32), jnp.float32),
      in_specs=[pl.BlockSpec((8, 5), lambda i, j: (i, 0)), pl.BlockSpec((5, 16), lambda i, j: (0, j))],
      out_specs=pl.BlockSpec((8, 16), lambda i, j: (i, j)))(x, y)
  assert step_flops(traced(product, (32, 5), (5, 32))) == 2 * 32 * 5 * 32


def test_branches_count_by_the_longest_and_shards_by_their_number():
  def either(x):
    return jax.lax.cond(x[0, 0] > 0, lambda x: x @ x @ x, lambda x: x @ x, x)
  assert step_flops(traced(either, (8, 8))) == 2 * 2 * 8**3
  mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
  rows = jax.P("fsdp")
  split = jax.shard_map(lambda x, w: x @ w, mesh=mesh, in_specs=(rows, jax.P()), out_specs=rows)
  assert step_flops(traced(split, (16, 4), (4, 4))) == 2 * 16 * 4 * 4
