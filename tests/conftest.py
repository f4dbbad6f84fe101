"""Settings of the whole test run, made before any test imports JAX.

Eight CPU devices stand in for a pod, so that sharding is really exercised on a laptop: under an
explicit mesh a wrong partition spec is an error at trace time, whatever the hardware is.
"""
import atexit
import os
from pathlib import Path
import shutil
import signal
import tempfile

# Tests mean the same on a machine with an accelerator: they run on its CPU.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Compiled programs are shared within the session, also with the processes that tests start.
os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="lskd_jax_compiled_")
atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

# A shell starts background jobs with SIGINT ignored, `nohup` with SIGHUP, and what tests start and interrupt
# would inherit that.
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
  if signal.getsignal(number) is signal.SIG_IGN:
    signal.signal(number, handler)

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
# Random numbers do not depend on how an array is sharded.
jax.config.update("jax_threefry_partitionable", True)

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def mesh_is_restored():
  """Takes back a test's `jax.set_mesh`, so that tests do not depend on their order."""
  before = jax.sharding.get_mesh()
  yield
  jax.set_mesh(before)


@pytest.fixture(autouse=True, scope="module")
def compiled_programs_are_dropped():
  """Of the tests of one file: no other file uses them, and together they are gigabytes."""
  yield
  jax.clear_caches()


@pytest.fixture
def real_sample() -> Path:
  """A folder with a few real photographs (`images/`) and COCO-style boxes (`instances.json`).

  It is not part of the repository: $LSKD_REAL_SAMPLE names it, or it lies beside the checkout.
  """
  folder = Path(os.environ.get("LSKD_REAL_SAMPLE") or REPOSITORY.parent / "shared" / "real_sample")
  if not folder.is_dir():
    pytest.skip(f"no photographs in {folder}; set LSKD_REAL_SAMPLE to a folder of them")
  return folder
