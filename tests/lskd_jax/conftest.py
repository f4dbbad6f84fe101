"""What the tests of models share: quick compilation, and a mesh of one device.

Nearly all time of these tests goes into compiling programs that then run for milliseconds, so
XLA's code generator is told not to optimise; what a program computes stays the same.
"""
import os

import jax
import pytest

from lskd_jax.parallel import make_mesh

# Read when the first array is made, which is after all tests are collected.
os.environ["XLA_FLAGS"] = (os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"
                           " --xla_cpu_use_fusion_emitters=false").strip()


@pytest.fixture(scope="module")
def one_device():
  """A 1x1 mesh for a whole file: `pytestmark = pytest.mark.usefixtures("one_device")`."""
  with jax.set_mesh(make_mesh()):
    yield
