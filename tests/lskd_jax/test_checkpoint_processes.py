"""Checkpoints of several processes: what one cannot read none uses, and any other number goes on from it.

Run as a script, this file is one of the processes.
"""
import logging
import os
from pathlib import Path
import subprocess
import sys
import time

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import numpy as np

from lskd_jax import agreement, parallel, peers, trees
from lskd_jax.checkpoint import Checkpointer
from tests.tiny_runs import free_port

ROOT = Path(__file__).resolve().parents[2]
VALUES = np.arange(64, dtype=np.float32).reshape(8, 8)


def state_at(step):
  """A state split over all devices of all processes: leaf `kernel` by rows."""
  mesh = jax.make_mesh((jax.device_count(),), ("fsdp",), axis_types=(AxisType.Explicit,))
  def put(values, spec):
    sharding = NamedSharding(mesh, spec)
    return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])
  return {"step": put(np.int32(step), P()), "params": {"kernel": put(VALUES + step, P("fsdp", None))}}


def start(role, folder, count):
  """Starts `count` processes of one device each, and returns the exit code and output of each."""
  port = free_port()
  environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": "1"}
  processes = [subprocess.Popen(
      [sys.executable, __file__, role, str(folder), str(port), str(number), str(count)], text=True,
      env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for number in range(count)]
  try:
    return [(process.wait(timeout=120), process.stdout.read()) for process in processes]
  finally:
    for process in processes:
      process.kill()


def test_two_processes_save_and_one_goes_on_from_what_both_can_read(tmp_path):
  """Process 1 cannot read step 2, though its files are whole: process 0 passes over it as well."""
  for code, output in start("two", tmp_path, 2):
    assert code == 0, output[-3000:]
    assert f"digest {trees.params_digest(state_at(2))}" in output
    assert ("resuming from checkpoint 1; set aside checkpoint 2: " in output
            and "its cable is cut (process 1)" in output)
  with Checkpointer(tmp_path) as checkpoints:
    restored, extra = checkpoints.restore_latest(state_at(0))
  assert extra == {"next": 1}
  np.testing.assert_array_equal(restored["params"]["kernel"], VALUES + 1)


def test_a_save_that_fails_on_one_process_ends_all_of_them(tmp_path):
  (code, output), (other_code, other) = start("full", tmp_path, 2)
  assert (code, other_code) == (4, 4), (output + other)[-3000:]
  for said in (output, other):
    assert "cannot save checkpoint 2 " in said and "the newest complete one is 1" in said
  assert Checkpointer(tmp_path).durable_step() == 1


def two(folder):
  """Saves two steps; then process 1 cannot read the second."""
  with Checkpointer(folder) as checkpoints:
    for step in (1, 2):
      checkpoints.save(step, state_at(step), {"next": step})
    checkpoints.wait()
    assert checkpoints.durable_step() == 2
    assert checkpoints.seconds_of_last_save() > 0
    print("digest", trees.params_digest(state_at(2)))
    handler = trees.tree_handler
    def cut(**options):
      reader = handler(**options)
      restore = reader.restore
      def fail(directory, *args, **more):
        if directory.name == "2":
          raise OSError("its cable is cut")
        return restore(directory, *args, **more)
      reader.restore = fail
      return reader
    if jax.process_index() == 1:
      trees.tree_handler = cut
    state, extra = checkpoints.restore_latest(state_at(0))
    assert extra == {"next": 1} and int(state["step"]) == 1
    print(checkpoints.report)


def full(folder):
  """Process 1's disk is full at step 2; neither loop waits, and no device is asked."""
  with Checkpointer(folder) as checkpoints:
    checkpoints.save(1, state_at(1))
    checkpoints.wait()
    if jax.process_index() == 1:
      import resource
      resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
    try:
      checkpoints.save(2, state_at(2))
      deadline = time.monotonic() + 60
      while time.monotonic() < deadline:
        checkpoints.poll()
        time.sleep(0.01)
    except trees.CannotSaveError as error:
      print(error, flush=True)
      peers.leave(error.exit_code)


if __name__ == "__main__":
  role, folder, port, number, count = sys.argv[1:]
  logging.disable()
  parallel.initialize(f"localhost:{port}", int(count), int(number))
  {"two": two, "full": full}[role](folder)
  agreement.barrier("done")
