"""The mesh derived from devices, the rows of a batch that each process reads, and how processes start."""
import os
from pathlib import Path
import socket
import subprocess
import sys
from types import SimpleNamespace

import jax
from jax.sharding import AxisType
import numpy as np
import pytest

from lskd_jax import errors, exit_codes, parallel
from lskd_jax.parallel import make_mesh, own_rows, put_batch, rows_by_process
from tests.tiny_runs import free_port

ROOT = Path(__file__).resolve().parents[2]


def devices(count, per_process=None, per_slice=None):
  """Devices of processes and slices that do not exist: enough for a mesh, not for an array."""
  class Device(SimpleNamespace):
    __hash__ = object.__hash__
  return [Device(id=i, process_index=i // (per_process or count), slice_index=i // (per_slice or count),
                 platform="cpu") for i in range(count)]


# --- the mesh ------------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted,there,shape", [
    (dict(), devices(1), (1, 1, 1, 1)),
    (dict(), devices(8), (1, 1, 1, 1)),  # of one process, devices may be left unused
    (dict(slice=-1, fsdp=-1), devices(8), (1, 1, 8, 1)),
    (dict(slice=-1, fsdp=-1), devices(8, per_slice=4), (2, 1, 4, 1)),
    (dict(slice=-1, data=2, fsdp=-1), devices(16, per_slice=8), (2, 2, 4, 1)),
    (dict(data=-1, tensor=4), devices(8), (1, 2, 1, 4)),
    (dict(fsdp=2, tensor=-1), devices(8), (1, 1, 2, 4)),
])
def test_what_is_minus_one_follows_from_the_devices(wanted, there, shape):
  mesh = make_mesh(**wanted, devices=there)
  assert tuple(mesh.shape.values()) == shape and mesh.axis_names == parallel.AXES
  assert set(mesh.axis_types) == {AxisType.Explicit}


def test_without_numbers_a_mesh_is_one_device():
  assert make_mesh().size == 1 and make_mesh(slice=-1, fsdp=-1).size == jax.device_count() == 8


@pytest.mark.parametrize("wanted,there,error", [
    (dict(fsdp=4, tensor=4), devices(8),
     "train.mesh.fsdp=4 x train.mesh.tensor=4 needs 16 devices, there are 8: make it smaller, or -1"),
    (dict(data=16, fsdp=-1), devices(8), "train.mesh.data=16 needs 16 devices, there are 8"),
    (dict(data=3, fsdp=-1), devices(8), "train.mesh.data=3 does not divide the 8 devices"),
    (dict(data=-1, fsdp=-1), devices(8), "train.mesh: data and fsdp cannot both be -1"),
    (dict(tensor=0), devices(8), "train.mesh.tensor=0: must be 1 or more, or -1 to be derived"),
    (dict(fsdp=4), devices(8, per_process=4),
     "train.mesh.fsdp=4 uses 4 of the 8 devices of all processes, .* set train.mesh.fsdp=-1"),
])
def test_a_shape_that_does_not_fit_is_one_line_with_its_keys(wanted, there, error):
  with pytest.raises(ValueError, match=error) as caught:
    make_mesh(**wanted, devices=there)
  assert "\n" not in str(caught.value)


# --- rows ----------------------------------------------------------------------------------------


def test_every_process_reads_the_rows_of_its_devices():
  mesh = make_mesh(slice=-1, data=2, fsdp=-1, devices=devices(8, per_process=2, per_slice=4))
  rows = rows_by_process(mesh, 16)
  assert {process: found.tolist() for process, found in rows.items()} == {
      0: [0, 1, 2, 3], 1: [4, 5, 6, 7], 2: [8, 9, 10, 11], 3: [12, 13, 14, 15]}


def test_processes_that_share_rows_read_the_same_ones():
  """`tensor` across processes: each holds a half of the heads, for all of the rows."""
  rows = rows_by_process(make_mesh(tensor=4, fsdp=2, devices=devices(8, per_process=2)), 4)
  assert [rows[process].tolist() for process in range(4)] == [[0, 1], [0, 1], [2, 3], [2, 3]]


def test_rows_of_one_process_need_not_lie_together():
  """On a pod, neighbours in the network are neighbours in the mesh, whichever host they belong to."""
  there = devices(4, per_process=2)
  rows = rows_by_process(make_mesh(fsdp=4, devices=[there[i] for i in (0, 2, 3, 1)]), 8)
  assert rows[0].tolist() == [0, 1, 6, 7] and rows[1].tolist() == [2, 3, 4, 5]


def test_a_batch_that_cannot_be_split_is_refused():
  with pytest.raises(ValueError, match="data.batch_size=12: .* over 8 groups of devices .* a multiple of 8"):
    own_rows(make_mesh(slice=2, data=2, fsdp=2), 12)


@pytest.mark.parametrize("shape", [
    dict(), dict(slice=2, data=2, fsdp=2), dict(data=2, tensor=4), dict(tensor=8)])
def test_rows_go_to_where_the_mesh_wants_them(shape):
  mesh = make_mesh(**shape)
  rows = {"ids": np.arange(16, dtype=np.int32), "boxes": np.random.default_rng(0).normal(size=(16, 3, 4)) > 0}
  put = put_batch(rows, mesh)
  for name, values in rows.items():
    assert put[name].sharding.spec == parallel.ACT_B and put[name].dtype == values.dtype
    np.testing.assert_array_equal(put[name], values)
    for shard in put[name].addressable_shards:
      np.testing.assert_array_equal(shard.data, values[shard.index])


def test_rows_that_cannot_be_split_are_refused():
  with pytest.raises(ValueError, match="ids: 6 rows cannot be split over 4 groups"):
    put_batch({"ids": np.zeros(6)}, make_mesh(fsdp=4))


def test_the_overview_tells_processes_devices_mesh_and_rows():
  about = parallel.overview(make_mesh(data=2, fsdp=-1), 16)
  assert about["processes"] == "1 on 1 host" and about["devices"] == "8 per process, cpu; 8 in the mesh"
  assert about["mesh"] == "slice 1, data 2, fsdp 4, tensor 1" and about["rows per process"] == "16 of 16"


# --- start-up ------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments,error", [
    (dict(processes=2), "--processes 2 needs --coordinator HOST:PORT and --process-id; .* --multi-host"),
    (dict(processes=2, process_id=2, coordinator="a:1"), "--process-id 2: the 2 processes are 0 to 1"),
    (dict(processes=2, process_id=1, coordinator="somewhere"), "--coordinator somewhere: is not HOST:PORT"),
    (dict(multi_host=True, process_id=1), "--multi-host finds the processes by itself: leave out"),
])
def test_addresses_that_do_not_fit_together_are_refused(arguments, error):
  with pytest.raises(ValueError, match=error):
    parallel.initialize(**arguments)


@pytest.mark.parametrize("name,value", [
    ("TPU_WORKER_HOSTNAMES", "10.0.0.1,10.0.0.2"), ("TPU_PROCESS_BOUNDS", "2,2,1"),
    ("MEGASCALE_NUM_SLICES", "2"), ("SLURM_STEP_NUM_TASKS", "4")])
def test_a_worker_of_several_may_not_train_alone(monkeypatch, name, value):
  """Somebody forgot the flag: every worker would write to the same folder."""
  monkeypatch.setenv(name, value)
  with pytest.raises(ValueError, match=rf"one of several \({name}.* add --multi-host, or --processes 1"):
    parallel.initialize()
  parallel.initialize(processes=1)  # said to be meant


@pytest.mark.parametrize("environment", [
    {}, {"TPU_WORKER_HOSTNAMES": "localhost"}, {"TPU_PROCESS_BOUNDS": "1,1,1"}, {"SLURM_STEP_NUM_TASKS": "1"},
    {"SLURM_STEP_NUM_TASKS": ""}])
def test_a_single_worker_is_not_taken_for_one_of_several(environment):
  assert parallel.one_of_several(environment) is None


START = """
import os, sys
from lskd_jax import parallel
parallel.initialize(*eval(sys.argv[1]), **eval(sys.argv[2]))
import jax
print("started", jax.process_count(), jax.config.jax_enable_preemption_service)
"""


def start(arguments, options, **environment):
  environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": "1", **environment}
  return subprocess.run([sys.executable, "-c", START, repr(arguments), repr(options)], env=environment,
                        capture_output=True, text=True, timeout=120)


def test_a_process_whose_peers_do_not_come_says_so_and_ends():
  done = start((f"localhost:{free_port()}", 2, 0), {"start_seconds": 1})
  assert done.returncode == exit_codes.PEER_LOST
  assert done.stderr.strip().splitlines()[-1].startswith(
      "lskd: error: after 1 s not all of 2 processes have come to localhost:")


def test_a_port_that_another_program_has_is_an_error_that_another_start_cures():
  """A supervisor finds a free port, but process 0 listens there seconds later."""
  with socket.create_server(("localhost", 0)) as other:
    done = start((f"localhost:{other.getsockname()[1]}", 2, 0), {})
  assert "PortTakenError: process 0 cannot listen at localhost:" in done.stderr
  assert exit_codes.restarts(errors.exit_code(parallel.PortTakenError("localhost:1")))


def test_slurm_is_found_and_a_wrong_number_of_processes_refused():
  """A job of one task joins nobody; that two were announced is seen at once."""
  task = dict(SLURM_JOB_ID="7", SLURM_STEP_NODELIST="localhost", SLURM_NTASKS="1", SLURM_PROCID="0",
              SLURM_LOCALID="0", JAX_COORDINATOR_PORT=str(free_port()))
  done = start((), {"multi_host": True}, **task)
  assert done.stdout == "started 1 False\n", done.stderr
  done = start((None, 2), {"multi_host": True}, **task)
  assert "ValueError: --processes 2: 1 have joined; start as many as announced" in done.stderr


def test_where_there_is_no_cluster_that_is_said():
  done = start((), {"multi_host": True})
  assert "ValueError: --multi-host: JAX finds no TPU VM, Slurm step" in done.stderr
