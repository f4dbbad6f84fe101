"""Which errors of a computation mean that another process of the run is gone."""
import jax
import pytest

from lskd_jax.peers import is_lost_peer


@pytest.mark.parametrize("error", [
    jax.errors.JaxRuntimeError("UNAVAILABLE: Socket closed"),
    jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED: Barrier timed out"),
    jax.errors.JaxRuntimeError("FAILED_PRECONDITION: Gloo all-reduce failed: Connection reset by peer"),
    ValueError("UNKNOWN: Gloo AllGather failed: [transport/tcp/pair.cc] Connection closed by peer")])
def test_a_connection_that_breaks_is_a_lost_peer(error):
  assert is_lost_peer(error)


@pytest.mark.parametrize("error", [
    jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory"),
    ValueError("the connection of two widths"),
    ConnectionError("Gloo")])
def test_other_errors_are_the_process_s_own(error):
  assert not is_lost_peer(error)
