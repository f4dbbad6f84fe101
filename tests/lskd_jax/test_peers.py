"""How a process of a run ends when something goes wrong in it."""
import errno
import os

import pytest

from data_pipeline.records import DataError
from data_pipeline.stages import write_json
from lskd_jax import errors, peers
from lskd_jax.exit_codes import CANNOT_SAVE, INPUT


def ends_with(error, workdir) -> tuple[int, str]:
  """The exit code and the line of an error in a run."""
  with pytest.raises(type(error)) as raised, peers.leaving_at_once(workdir):
    raise error
  return errors.exit_code(raised.value), errors.in_one_line(raised.value)


def test_a_full_disk_ends_a_run_as_a_checkpoint_that_cannot_be_written(tmp_path):
  """Whichever file is the first: writing, unlike opening, does not say which it was."""
  for number in (errno.ENOSPC, errno.EDQUOT):
    assert ends_with(OSError(number, "full"), tmp_path) == (
        CANNOT_SAVE, f"{tmp_path}: the disk is full; free some space and run again")
  assert ends_with(OSError(errno.ENOSPC, "full", "/cache/a"), tmp_path)[1].startswith("/cache/a: the disk")
  assert ends_with(PermissionError(errno.EACCES, "refused", "a"), tmp_path) == (INPUT, "a: refused")


def test_so_does_one_that_was_put_into_words_already(tmp_path, monkeypatch):
  def full(*unused):
    raise OSError(errno.ENOSPC, "full")
  monkeypatch.setattr(os, "fsync", full)
  with pytest.raises(DataError, match="done.json: the disk is full") as raised:
    with peers.leaving_at_once(tmp_path):
      write_json(tmp_path / "done.json", {})
  assert errors.exit_code(raised.value) == CANNOT_SAVE
