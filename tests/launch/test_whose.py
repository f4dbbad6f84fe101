"""Machines that were asked for are never forgotten, and those of others are left alone."""
import json

import pytest

from data_pipeline.records import DataError
from launch.executor import Refused
from launch.up import read_state, up
from tests.launch.test_up import ACTIVE, DONE, WAITING, commands, interrupted_after

ENDLESS = {"after": 999, "exits": []}


def interrupted(config, clock, sleeps):
  """Calls `up`, and presses Ctrl-C."""
  with pytest.raises(KeyboardInterrupt):
    up(config, print, clock._replace(sleep=interrupted_after(sleeps, clock.sleep)))


# ---- those that were asked for ----


@pytest.mark.parametrize("key, value", [("zone", "zone-b"), ("project", "other"), ("nodes", 2),
                                        ("accelerator_type", "v5p-32")])
def test_a_config_that_means_other_machines_is_refused_while_there_are_some(config, cloud, clock, key, value):
  """A request that waits may be granted when nobody thinks of it any more, and would cost money for ever."""
  cloud(lives=[{"states": [WAITING], "starts": []}, DONE])
  interrupted(config, clock, 4)
  asked_for, before = config[key], commands(config)
  config[key] = value
  there = rf"run \({WAITING}\) is there with {key}={asked_for!r}; go on with that, or delete it first"
  with pytest.raises(DataError, match=f"^{key}={value!r}: {there}"):
    up(config, print, clock)
  assert commands(config) == before


def test_down_and_status_are_about_the_machines_that_are_there(config, cloud, clock, launch):
  cloud(lives=[{"states": [WAITING], "starts": []}])
  interrupted(config, clock, 4)
  assert "1 x v5p-16 in zone-a of project" in launch("status", "--config.zone=zone-b")[1].out
  shown = launch("down", "--yes", "--config.zone=zone-b")[1]
  assert shown.out.startswith("run: deleted in zone-a of project;")
  assert "--zone=zone-b" not in commands(config)


def test_where_nothing_is_left_the_config_may_change(config, cloud, clock):
  config.budget_hours = 0.5
  cloud(lives=[{"states": [ACTIVE], "starts": [ENDLESS]}, DONE])
  assert up(config, print, clock) == 1, "the budget is used up"
  config.budget_hours, config.zone = 1.0, "zone-b"
  assert up(config, print, clock) == 0


def test_a_request_is_remembered_before_it_is_made(config, cloud, clock):
  """It may be granted although the connection broke, or Ctrl-C was pressed, before the answer."""
  cloud(lives=[DONE], failures={"create 1": "Connection reset by peer"})
  interrupted(config, clock, 2)
  assert read_state(config).resource
  config.zone = "zone-b"
  with pytest.raises(DataError, match="zone='zone-a'"):
    up(config, print, clock)


def test_a_request_that_is_refused_is_not_remembered(config, cloud, clock):
  cloud(lives=[DONE], failures={"create 1": "INVALID_ARGUMENT: no such zone"})
  with pytest.raises(Refused):
    up(config, print, clock)
  config.zone = "zone-b"
  assert up(config, print, clock) == 0


def test_down_helps_against_a_state_that_cannot_be_read(launch, cloud, config, tmp_path):
  cloud(lives=[], life={"states": [ACTIVE]}, looks=-1)
  (tmp_path / "state" / "run").mkdir(parents=True)
  (tmp_path / "state" / "run" / "state.json").write_text("{")
  assert launch("down", "--yes")[0] == 0
  assert json.loads((tmp_path / "cloud.json").read_text())["life"] is None
  assert read_state(config).resource == ""


# ---- those of others ----


@pytest.fixture
def of_others(cloud):
  """Machines of the same name, at work for somebody else."""
  cloud(lives=[DONE], life={"states": [ACTIVE], "starts": [ENDLESS]}, looks=-1)


def test_machines_that_this_state_has_not_asked_for_are_left_alone(config, of_others, clock):
  with pytest.raises(DataError, match=r"^run \(ACTIVE\) is in zone-a of project already, and \S+/state.json "
                                      "has not asked for it: take another `name`"):
    up(config, print, clock)
  assert "ssh" not in commands(config) and "delete" not in commands(config)
  with pytest.raises(DataError):
    up(config, print, clock)  # a second call knows no better


def test_another_launchers_run_is_left_alone(config, cloud, clock, tmp_path):
  cloud(lives=[{"states": [ACTIVE], "starts": [ENDLESS]}])
  interrupted(config, clock, 6)
  config.state = str(tmp_path / "elsewhere")
  with pytest.raises(DataError, match="has not asked for it"):
    up(config, print, clock)


def test_who_wants_to_delete_the_machines_of_others_learns_that_they_are(of_others, launch, monkeypatch):
  asked = []
  monkeypatch.setattr("builtins.input", lambda text: asked.append(text) or "y")
  assert "ACTIVE (not asked for by this state, in zone-a of project)" in launch("status")[1].out
  assert launch("down")[0] == 0
  assert asked == ["delete run (ACTIVE, not asked for by this state, in zone-a of project)? [y/N] "]
