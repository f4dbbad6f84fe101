"""One training step by two processes on four devices is the step of one process on one device.

Run as a script, this file is one of the two processes.
"""
import os
from pathlib import Path
import subprocess
import sys

import jax
import numpy as np
import pytest

from lskd_jax import checkpoint, parallel
from lskd_jax.metrics import read_metrics
from lskd_jax.train import train
from lskd_jax.trees import named_leaves
from tests import tiny_runs

ROOT = Path(__file__).resolve().parents[2]


def one_step(folder, devices, task):
  """One step of a tiny model, a student with ITC, ITM and LM; a batch of four pictures in all."""
  config = tiny_runs.config_for(folder, task)
  # Adam's first step is g / (|g| + eps). Of a key's bias g is 0 but for rounding: it must not count.
  config.optim.update(steps=1, eps=1e-3)
  config.train.mesh.fsdp = devices
  return config


@pytest.mark.parametrize("task,logged", [
    ("tagger", ["words"]),
    # Three times the compilation of all losses, a minute on two cores.
    pytest.param("student", ["itc", "itm", "lm", "itm_region_swap_right"], marks=pytest.mark.slow)])
def test_two_processes_train_as_one(tmp_path, task, logged):
  tiny_runs.teach_scenes(tmp_path)
  port = str(tiny_runs.free_port())
  environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": "2"}
  with (tmp_path / "log").open("w") as log:
    processes = [subprocess.Popen([sys.executable, __file__, port, str(i), str(tmp_path), task],
                                  env=environment, stdout=log, stderr=log) for i in (0, 1)]
    try:
      train(one_step(tmp_path, 1, task), tmp_path / "one", progress=False)
      codes = [process.wait(timeout=300) for process in processes]
    finally:
      for process in processes:
        process.kill()
  text = (tmp_path / "log").read_text()
  assert codes == [0, 0], text[-3000:]
  assert text.count("processes         2 on 1 host") == 1  # process 0 alone speaks
  assert "rows per process  2 of 4" in text and (tmp_path / "two" / "parameters.txt").exists()

  (one,), (two,) = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
  for name in ("loss", "grad_norm", *logged):
    assert two[name] == pytest.approx(one[name], rel=1e-5), name
  one, two = (named_leaves(checkpoint.load_model(tmp_path / name / "model")[1])
              for name in ("one", "two"))
  assert list(one) == list(two)
  for name in one:
    np.testing.assert_allclose(two[name], one[name], atol=1e-5, err_msg=name)


def share_rows(number):
  """A batch on meshes whose rows are not those of process 0, then those of process 1."""
  here = jax.devices()
  interleaved = parallel.make_mesh(fsdp=4, devices=[here[i] for i in (0, 2, 3, 1)])
  across = parallel.make_mesh(tensor=4)  # both have all rows, and their part of each weight
  whole = np.arange(12.0, dtype=np.float32).reshape(4, 3)
  weights = np.arange(12.0, dtype=np.float32).reshape(3, 4)
  for mesh, own in ((interleaved, [[0, 3], [1, 2]][number]), (across, [0, 1, 2, 3])):
    assert parallel.own_rows(mesh, 4).tolist() == own
    rows = parallel.put_batch({"rows": whole[own]}, mesh)["rows"]
    split = parallel.put_whole(weights, jax.NamedSharding(mesh, jax.P(None, "tensor")))
    with jax.set_mesh(mesh):
      product = jax.jit(lambda a, b: jax.reshard(a, jax.P()) @ jax.reshard(b, jax.P()))(rows, split)
    np.testing.assert_array_equal(product, whole @ weights)


if __name__ == "__main__":
  port, number, folder, task = sys.argv[1:]
  parallel.initialize(f"localhost:{port}", 2, int(number))
  share_rows(int(number))
  train(one_step(Path(folder), 4, task), Path(folder) / "two", progress=False, announce=print)
