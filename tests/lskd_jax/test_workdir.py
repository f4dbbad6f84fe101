"""A work directory belongs to one config, of which some keys may change, and to one run at a time."""
import json

import pytest

from configs import common
from data_pipeline.records import DataError
from lskd_jax.workdir import alone, claim, differences


@pytest.fixture
def workdir(tmp_path):
  """Started with the defaults."""
  claim(common.get_config(), tmp_path, write=True)
  return tmp_path


def changed(**keys):
  config = common.get_config()
  with config.unlocked():
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in keys.items()})
  return config


def kept(workdir):
  return json.loads((workdir / "config.json").read_text())


@pytest.mark.parametrize("keys", [
    {"train__mesh__data": 4}, {"train__save_every": 7, "train__keep": 9}, {"eval__every": 10},
    {"model__vit__remat": "full"}, {"train__microbatches": 2}, {"name": "another name"}])
def test_what_changes_no_result_may_change_and_is_kept(workdir, keys):
  claim(changed(**keys), workdir)
  assert kept(workdir) == json.loads(common.get_config().to_json_best_effort())
  claim(changed(**keys), workdir, write=True)
  assert kept(workdir) == json.loads(changed(**keys).to_json_best_effort())
  (line,) = (workdir / "config_changes.jsonl").read_text().splitlines()
  assert set(json.loads(line)["changes"]) == {f"config.{name.replace('__', '.')}" for name in keys}


@pytest.mark.parametrize("keys", [
    {"seed": 1}, {"optim__learning_rate": 1.0}, {"data__batch_size": 4}, {"model__vit__depth": 2},
    {"loss__pool": 4}, {"train__frozen": ()}, {"train__max_grad_norm": 1.0}])
def test_what_changes_results_is_refused_until_it_is_accepted(workdir, keys):
  for write in (False, True):
    with pytest.raises(DataError, match="another config.* --accept-config"):
      claim(changed(**keys), workdir, write=write)
  claim(changed(**keys), workdir, write=True, accept=True)
  claim(changed(**keys), workdir, write=True)
  assert len((workdir / "config_changes.jsonl").read_text().splitlines()) == 1


def test_the_key_is_named_with_both_values(workdir):
  with pytest.raises(DataError, match=r"another config.optim.learning_rate \(1e-05, now 0.5\)"):
    claim(changed(optim__learning_rate=0.5, train__keep=9), workdir)


def test_differences_name_keys_that_only_one_has():
  assert differences({"a": {"b": 1, "c": [2]}}, {"a": {"b": 1, "c": [3]}}) == {"config.a.c": ([2], [3])}
  assert differences({"a": {}}, {"a": {"new": 0}}) == {"config.a.new": (None, 0)}
  assert differences({"a": None}, {"a": {"b": 1}}) == {"config.a": (None, {"b": 1})}


def test_a_second_run_waits_for_the_end_of_the_first_and_is_refused(tmp_path, capsys):
  with alone(tmp_path, 0.05):
    with pytest.raises(DataError, match="another process is writing"):
      with alone(tmp_path, 0.05):
        pass
  assert "another run is in" in capsys.readouterr().err
  with alone(tmp_path, 0.05):  # let go of
    pass
