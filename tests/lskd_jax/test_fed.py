"""The hash of what a run was fed: of every example, in order, over restarts."""
import json

import jax.numpy as jnp

from lskd_jax.fed import Fed


def examples(*rows):
  return {"image_id": jnp.asarray(rows, jnp.int32), "statement": jnp.zeros((len(rows), 2), jnp.int32)}


def digest(*steps):
  fed = Fed("unused")
  for step, rows in enumerate(steps):
    fed.add(step + 1, examples(*rows))
  fed.flush()
  return fed.digest


def test_every_example_and_its_place_counts():
  whole = digest((1, 2), (3, 4))
  assert whole == digest((1, 2), (3, 4))
  assert len({whole, digest((2, 1), (3, 4)), digest((3, 4), (1, 2)), digest((1, 2)), digest((1, 2), (3, 5)),
              digest((1, 2), (3, 4), (3, 4))}) == 6


def test_which_statement_was_read_counts():
  fed = Fed("unused")
  fed.add(1, {**examples(1, 2), "statement": jnp.ones((2, 2), jnp.int32)})
  fed.flush()
  assert fed.digest != digest((1, 2))


def test_a_resumed_run_goes_on_with_the_hash_and_drops_what_came_after_the_checkpoint(tmp_path):
  first = Fed(tmp_path, log=True)
  first.add(1, examples(1, 2))
  first.flush()
  saved = first.digest
  first.add(2, examples(9, 9))
  first.add(3, examples(8, 8))
  first.close()
  again = Fed(tmp_path, 1, saved, log=True)
  again.add(2, examples(3, 4))
  again.flush()
  again.close()
  assert again.digest == digest((1, 2), (3, 4))
  lines = (tmp_path / "examples.jsonl").read_text().splitlines()
  assert list(map(json.loads, lines)) == [{"step": 1, "image_id": [1, 2]}, {"step": 2, "image_id": [3, 4]}]


def test_the_log_is_off_unless_it_is_asked_for(tmp_path):
  fed = Fed(tmp_path)
  fed.add(1, examples(1))
  fed.flush()
  fed.close()
  assert list(tmp_path.iterdir()) == []
