"""A run on machines that are taken away twice ends complete, and every command on the way is known."""
import io
import json
import os
import re

import pytest

from data_pipeline.records import DataError
from launch.executor import Refused
from launch.planner import State
from launch.up import lock_file, locked, prepare, read_state, state_folder, up

WAITING, ACTIVE = "WAITING_FOR_RESOURCES", "ACTIVE"
DONE = {"states": [ACTIVE], "starts": [{"after": 1, "exits": [[0, 0]]}]}


def commands(config) -> str:
  """The transcript less its times."""
  text = (state_folder(config) / "transcript.log").read_text()
  return re.sub(r"^\d{4}-\d\d-\d\d [\d:]{8} ", "", text, flags=re.MULTILINE)


def test_a_run_survives_two_preemptions_a_stuck_host_and_failing_commands(
    config, gcloud_on_path, clock, golden, tmp_path):
  gcloud_on_path(
      lives=[
          # Preempted with a warning: both hosts save and say so.
          {"states": [WAITING, "PROVISIONING", *[ACTIVE] * 5, "SUSPENDING", "SUSPENDED"],
           "starts": [{"after": 2, "exits": [[42], [42, 42]]}]},
          # Preempted without one.
          {"states": ["ACCEPTED", *[ACTIVE] * 3, "SUSPENDED"], "starts": [{"after": 99, "exits": []}]},
          # A host is stuck, the other is told to end; the same machines go on to the end.
          {"states": [WAITING, ACTIVE],
           "starts": [{"after": 1, "exits": [*[[150]] * 3, [150, 137]]},
                      {"after": 2, "exits": [[0], [0, 0]]}]}],
      commits={"1": 40, "2": 60, "3": 60, "4": 80},
      failures={"create 2": "RESOURCE_EXHAUSTED: Quota limit 'TPUV5sPreemptiblePerProjectPerZone' exceeded",
                "setup 1": "[/usr/bin/ssh] exited with return code [255].",
                "start 2": "[/usr/bin/ssh] exited with return code [255].",
                "describe 9": "UNAVAILABLE: The service is currently unavailable.",
                "cp 1": "HTTPError 503"})
  said = []
  assert up(config, said.append, clock) == 0
  golden("up.txt", commands(config))
  golden("up_said.txt", "\n".join(said) + "\n")
  state = read_state(config)
  assert (state.code, state.starts, state.durable) == (0, 4, 80)
  assert json.loads((tmp_path / "cloud.json").read_text())["life"] is None, "machines are left"


def test_code_is_shipped_once(config, cloud, clock):
  lives = [{"states": [*[ACTIVE] * 4, "SUSPENDED"], "starts": [{"after": 99, "exits": []}]}, DONE]
  cloud(lives=lives)
  assert up(config, print, clock) == 0
  assert commands(config).count("gcloud storage cp") - commands(config).count("lskd-setup.sh gs://") == 1


def test_an_error_of_the_run_stops_it_and_deletes_the_machines(config, cloud, clock):
  cloud(lives=[{"states": [ACTIVE], "starts": [{"after": 1, "exits": [[1, 151]]}]}])
  assert up(config, print, clock) == 1
  assert "[0] gcloud compute tpus queued-resources delete" in commands(config)


def test_a_run_that_fails_without_progress_is_given_up(config, cloud, clock):
  config.max_failures = 2
  start = {"after": 0, "exits": [[150, 150]]}
  cloud(lives=[{"states": [ACTIVE], "starts": [start] * 9}], commits={str(n): 40 for n in range(9)})
  assert up(config, print, clock) == 150
  assert read_state(config).starts == 3


def test_the_budget_ends_the_run_and_is_kept_over_calls(config, cloud, clock):
  config.budget_hours = 0.5
  cloud(lives=[{"states": [ACTIVE], "starts": [{"after": 999, "exits": []}]}])
  with pytest.raises(KeyboardInterrupt):
    up(config, print, clock._replace(sleep=interrupted_after(10, clock.sleep)))
  assert 0 < read_state(config).spent < 1800
  said = []
  assert up(config, said.append, clock) == 1
  assert "the budget of 0.5 hours is used up: deleting the machines" in said
  assert "launch.host stop" in commands(config), "the run may save before it ends"
  assert 1800 <= read_state(config).spent < 1800 + 2 * config.poll


def interrupted_after(sleeps, sleep):
  """A sleep during which Ctrl-C is pressed at the n-th call."""
  left = [sleeps]

  def one(seconds):
    left[0] -= 1
    if not left[0]:
      raise KeyboardInterrupt
    sleep(seconds)
  return one


def test_after_ctrl_c_the_same_command_looks_after_the_run_again(config, cloud, clock):
  cloud(lives=[{"states": [ACTIVE], "starts": [{"after": 20, "exits": [[0, 0]]}]}])
  with pytest.raises(KeyboardInterrupt):
    up(config, print, clock._replace(sleep=interrupted_after(8, clock.sleep)))
  assert read_state(config).running
  assert up(config, print, clock) == 0
  assert commands(config).count("launch.host start") == 1


def test_hosts_that_do_not_answer_are_replaced(config, cloud, clock):
  broken = {f"preflight {n}": "worker 1: 0 chips are there, 4 are expected" for n in range(1, 5)}
  cloud(lives=[{"states": [ACTIVE], "starts": []}, DONE], failures=broken)
  said = []
  assert up(config, said.append, clock) == 0
  assert "the machines cannot be used: taking others" in said


def test_machines_that_never_come_are_asked_for_anew(config, cloud, clock):
  config.poll = 3600.0
  cloud(lives=[{"states": [WAITING], "starts": []}, DONE])
  said = []
  assert up(config, said.append, clock) == 0
  assert any(line.startswith("WAITING_FOR_RESOURCES for 25.") for line in said)


def test_being_offline_says_nothing_about_the_run(config, cloud, clock):
  offline = {f"describe {n}": "Unable to find the server" for n in range(5, 29)}
  cloud(lives=[{"states": [ACTIVE], "starts": [{"after": 3, "exits": [[0, 0]]}]}], failures=offline)
  assert up(config, print, clock) == 0
  assert read_state(config).starts == 1


def test_what_gcloud_will_never_do_is_said_at_once(config, cloud, clock):
  cloud(lives=[DONE], failures={"create 1": "INVALID_ARGUMENT: no such zone"})
  with pytest.raises(Refused, match="INVALID_ARGUMENT: no such zone"):
    up(config, print, clock)


def test_a_second_launcher_keeps_off(config, cloud, clock):
  with locked(state_folder(config)), pytest.raises(DataError, match="another `python -m launch up`"):
    up(config, print, clock)


# ---- what is shipped ----


def test_uncommitted_changes_are_not_shipped_silently(config, tmp_path):
  config.source = str(tmp_path)
  with pytest.raises(DataError, match="is not a git checkout"):
    prepare(config)


def test_the_hash_is_of_the_code_and_of_its_environment(config, tmp_path):
  first = prepare(config)
  assert prepare(config) == first
  (tmp_path / "requirements.txt").write_text("jax==0.10.3\n")
  assert prepare(config) != first


def test_the_environment_is_pinned(config, monkeypatch):
  config.requirements = ""
  with monkeypatch.context() as patch:
    patch.setattr("importlib.metadata.distributions", lambda: [])
    with pytest.raises(DataError, match="libtpu is not among"):
      lock_file(config)


# ---- the other verbs ----


def test_a_dry_run_prints_every_command_of_a_first_pass(launch, golden):
  code, shown = launch("up", "--dry-run")
  assert code == 0
  golden("dry_run.txt", shown.out)


def test_a_dry_run_of_several_slices_with_flex_start(launch, golden):
  code, shown = launch("up", "--dry-run", "--config.nodes=2", "--config.provisioning=flex-start",
                       "--config.accelerator_type=v6e-16")
  assert code == 0
  golden("dry_run_slices.txt", shown.out)


def test_spot_machines_with_autocheckpoint_are_asked_for_as_spot_twice(launch):
  """`gcloud alpha` has a second argument for it, whose default is not what --spot says."""
  create = next(line for line in launch("up", "--dry-run", "--config.accelerator_type=v5litepod-8",
                                        )[1].out.splitlines() if "create" in line)
  assert create.startswith("gcloud alpha ")
  assert {"--spot", "--autocheckpoint-enabled", "--provisioning-model=spot"} <= set(create.split())


def test_status_shows_machines_run_and_costs(launch, config, cloud, clock):
  cloud(lives=[DONE], commits={"1": 80})
  up(config, [].append, clock)
  code, shown = launch("status", "--config.price=1.2")
  table = dict(re.split(r"\s{2,}", line, maxsplit=1) for line in shown.out.splitlines())
  assert code == 0
  assert table["machines"] == "none (1 x v5p-16 in zone-a of project)"
  assert table["run"] == "ended with 0 (done): done"
  assert table["durable step"] == "80"
  assert table["dollars"].endswith(f"of {48 * 8 * 1.2:.2f}")


def test_logs_of_all_hosts_are_fetched(launch, cloud, tmp_path):
  assert launch("logs")[1].out.startswith("no host has written a log yet")
  cloud(begun=1)
  code, shown = launch("logs", "--tail", "1", "--out", str(tmp_path / "logs"))
  assert code == 0 and shown.out.splitlines() == [
      f"{tmp_path}/logs/20270115-080000/1/log-0-0.txt", f"{tmp_path}/logs/20270115-080000/1/log-0-1.txt",
      "step 2"]


def test_down_without_a_terminal_deletes_nothing(launch, cloud, monkeypatch):
  cloud(lives=[], life={"states": [ACTIVE]}, looks=-1)
  monkeypatch.setattr("sys.stdin", io.StringIO())
  code, shown = launch("down")
  assert code == 1
  assert shown.err == "launch: error: nothing was deleted: without a terminal to ask at, say --yes\n"


def test_down_asks_and_deletes(launch, cloud, monkeypatch, tmp_path):
  cloud(lives=[], life={"states": [ACTIVE]}, looks=-1)
  monkeypatch.setattr("builtins.input", lambda text: "n")
  assert launch("down")[0] == 1
  assert launch("down", "--yes")[0] == 0
  assert json.loads((tmp_path / "cloud.json").read_text())["life"] is None
  assert launch("down", "--yes")[1].out.startswith("run: there was nothing to delete")


def test_a_missing_gcloud_is_one_line(launch, monkeypatch, tmp_path):
  monkeypatch.undo()
  monkeypatch.setenv("PATH", str(tmp_path))
  code, shown = launch("status")
  assert (code, shown.err) == (1, "launch: error: gcloud is not installed on this machine\n")


def test_the_state_can_be_read_back(config):
  folder = state_folder(config)
  (folder / "state.json").write_text(json.dumps(State(starts=3)._asdict()))
  assert read_state(config) == State(starts=3)
  (folder / "state.json").write_text("{")
  with pytest.raises(DataError, match=re.escape(os.fspath(folder))):
    read_state(config)
