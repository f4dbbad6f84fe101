"""For tests that compile whole models and run them a few times."""
import jax
import pytest


@pytest.fixture(scope="module")
def compile_quickly():
  """Compiles in half the time, to slower programs."""
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", False)
