"""Fingerprints and digests of trees of arrays: of values, names and places, whatever the mesh."""
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
import numpy as np
import pytest

from lskd_jax.trees import fingerprints, params_digest
from tests.lskd_jax.tiny_checkpoints import mesh_of, spread_over


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
