"""What a launcher must not do: pay for machines that are of no use, forget them, or end without a reason."""
import importlib.resources
import os
import re
import subprocess
import sys

import pytest

from data_pipeline.records import DataError
from launch import executor as executor_module
from launch.executor import CommandFailed, Refused, executor
from launch.gcloud import Command
from launch.up import prepare, read_state, up
from tests.launch.test_up import ACTIVE, DONE, WAITING, commands, interrupted_after

ENDLESS = {"after": 999, "exits": []}


def requests(config) -> int:
  """How often machines were asked for."""
  return commands(config).count("queued-resources create")


# ---- when it gives up ----


def test_machines_of_no_use_are_not_replaced_for_ever(config, cloud, clock):
  """A run that came far once has not come any further by machines that never ran it."""
  config.max_failures = 2
  cloud(lives=[{"states": [*[ACTIVE] * 3, "SUSPENDED"], "starts": [ENDLESS]},
               *[{"states": [ACTIVE], "starts": []}, {"states": ["SUSPENDED"], "starts": []}] * 9],
        commits={"1": 40}, failures={f"preflight {n}": "worker 1: 0 chips are there" for n in range(2, 99)})
  assert up(config, print, clock) == 1
  assert requests(config) == 1 + 3 + 2, "one that ran, three of no use, two taken away between them"
  assert read_state(config).why == ("3 failures in a row, the last with: ERROR: (gcloud.preflight) worker 1: "
                                    "0 chips are there")


def test_a_bucket_that_takes_no_code_is_noticed_before_machines_are_there(config, cloud, clock):
  config.max_failures = 2
  cloud(lives=[DONE], failures={f"cp {n}": "The specified bucket does not exist" for n in range(1, 99)})
  assert up(config, print, clock) == 1
  assert requests(config) == 0
  assert read_state(config).why == ("3 commands failed in a row, the last with: ERROR: (gcloud.cp) The "
                                    "specified bucket does not exist")


def test_a_request_that_is_refused_again_and_again_is_given_up_with_the_reason(config, cloud, clock):
  config.max_failures = 2
  cloud(lives=[{"states": ["FAILED"], "starts": [], "error": "no quota for v5p"}] * 9)
  said = []
  assert up(config, said.append, clock) == 1
  assert requests(config) == 3
  assert "FAILED (no quota for v5p): deleting what is left" in said
  assert read_state(config).why == "3 failures in a row, the last with: FAILED (no quota for v5p)"


def test_machines_that_are_taken_away_before_a_start_are_nobodys_fault(config, cloud, clock):
  config.max_failures = 2
  cloud(lives=[*[{"states": ["SUSPENDED"], "starts": []}] * 5, DONE])
  assert up(config, print, clock) == 0
  assert read_state(config).preemptions == 5


def test_a_preemption_with_a_warning_counts_once(config, cloud, clock):
  """The hosts end with 42 while the machines are there, which are taken away a moment later."""
  config.max_preemptions = 1
  cloud(lives=[{"states": [*[ACTIVE] * 3, "SUSPENDING", "SUSPENDED"],
                "starts": [{"after": 1, "exits": [[42, 42]]}]}, DONE], commits={"1": 40, "2": 80})
  assert up(config, print, clock) == 0
  assert read_state(config).preemptions == 1


def test_machines_that_are_taken_away_before_a_start_count_after_a_preemption_too(config, cloud, clock):
  cloud(lives=[{"states": [*[ACTIVE] * 3, "SUSPENDED"], "starts": [ENDLESS]},
               {"states": ["SUSPENDED"], "starts": []}, DONE])
  assert up(config, print, clock) == 0
  assert read_state(config).preemptions == 2


MAY_COST = ("run ({}) is still there and may cost money: `python -m launch up` looks after it again, `down` "
            "deletes it")


@pytest.mark.parametrize("error", [
    "UNAUTHENTICATED: Request had invalid authentication credentials.",
    "There was a problem refreshing your current auth tokens: ('invalid_grant: Bad Request', {'error': "
    "'invalid_grant', 'error_description': 'reauth related error (invalid_rapt)'})"])
def test_who_is_logged_out_learns_that_machines_are_there(config, cloud, clock, error):
  cloud(lives=[{"states": [ACTIVE], "starts": [ENDLESS]}],
        failures={f"describe {n}": error for n in range(6, 999)})
  with pytest.raises(Refused, match=re.escape(error)) as raised:
    up(config, print, clock)
  assert raised.value.__notes__ == [MAY_COST.format(ACTIVE)]


@pytest.mark.parametrize("during, there", [
    ("git", None), ("create", "CREATING"), ("lskd-setup.sh", ACTIVE), ("exit-", ACTIVE)])
def test_who_presses_ctrl_c_learns_what_is_there(cloud, launch, monkeypatch, during, there):
  """Machines cost money before the start, too, and a request that was made may be granted later."""
  cloud(lives=[{"states": [ACTIVE], "starts": [ENDLESS]}])
  real = executor_module._once

  def once(command):
    if during in str(command):
      raise KeyboardInterrupt
    return real(command)
  monkeypatch.setattr(executor_module, "_once", once)
  code, shown = launch("up", "--config.poll=0.001")
  assert code == 130
  assert shown.err.startswith("launch: interrupted; to go on: python -m launch up --config ")
  assert shown.err.endswith(f". {MAY_COST.format(there)}\n") == (there is not None)


def test_an_error_of_any_kind_says_what_is_there_in_the_same_line(cloud, launch, config):
  cloud(lives=[{"states": [WAITING], "starts": []}], failures={"describe 5": "UNAUTHENTICATED: log in"})
  code, shown = launch("up", "--config.poll=0.001")
  assert code == 1
  assert shown.err.startswith("launch: error: ERROR: (gcloud.describe) UNAUTHENTICATED: log in (in: ")
  assert shown.err.endswith(f". {MAY_COST.format(WAITING)}\n") and shown.err.count("\n") == 1
  code, shown = launch("up", "--config.requirements=/nowhere/requirements.txt")
  assert (code, shown.err) == (1, "launch: error: /nowhere/requirements.txt: No such file or directory. "
                                  f"{MAY_COST.format(WAITING)}\n")


@pytest.mark.parametrize("place", ["pipe", "terminal"])
def test_up_looks_after_the_run_although_nobody_reads_what_it_says(gcloud_on_path, arguments, place):
  """Its output went to `head`, or its terminal was closed."""
  gcloud_on_path(lives=[DONE])
  reader, writer = os.pipe() if place == "pipe" else os.openpty()
  os.close(reader)
  words = [sys.executable, "-m", "launch", "up", *arguments, "--config.poll=0.001"]
  done = subprocess.run(words, stdout=writer, stderr=subprocess.PIPE, text=True, check=False, timeout=60)
  os.close(writer)
  assert (done.returncode, done.stderr) == (0, "")


def test_who_may_not_reach_the_hosts_learns_it_at_once(config, cloud, clock):
  denied = "ERROR: (gcloud.compute.tpus.tpu-vm.ssh) PERMISSION_DENIED: Permission 'tpu.nodes.update' denied"
  cloud(lives=[{"states": [ACTIVE], "starts": []}], failures={"setup 1": denied})
  with pytest.raises(Refused, match=re.escape(denied)):
    up(config, print, clock)
  assert requests(config) == 1


def test_what_a_hosts_own_command_was_refused_is_tried_again(config, cloud, clock):
  """The rights of a new machine may come a moment later."""
  denied = "ERROR: (gcloud.storage.cp) PERMISSION_DENIED: no access to gs://bucket"
  cloud(lives=[DONE], failures={"setup 1": denied})
  assert up(config, print, clock) == 0


def test_what_may_fail_does_not_keep_machines_from_being_deleted(config, cloud, clock):
  denied = "ERROR: (gcloud.compute.tpus.tpu-vm.ssh) PERMISSION_DENIED: Permission 'tpu.nodes.update' denied"
  config.budget_hours = 0.1
  cloud(lives=[{"states": [ACTIVE], "starts": [ENDLESS]}], failures={"stop 1": denied})
  assert up(config, print, clock) == 1
  assert "[0] gcloud compute tpus queued-resources delete" in commands(config)


# ---- when a run that ended is taken up again ----


def test_a_larger_budget_takes_a_run_up_again(config, cloud, clock):
  config.budget_hours = 0.5
  cloud(lives=[{"states": [ACTIVE], "starts": [ENDLESS]}, DONE])
  assert up(config, print, clock) == 1
  said = []
  assert up(config, said.append, clock) == 1, "the same budget is still used up"
  spent = read_state(config).spent
  config.budget_hours = 1.0
  assert up(config, said.append, clock) == 0
  assert ("it had ended with 1 (input to be mended): the budget of 0.5 hours is used up; taking it up again"
          in said)
  assert read_state(config).spent > spent >= 1800


def test_mended_input_takes_a_run_up_again(config, cloud, clock):
  cloud(lives=[{"states": [ACTIVE], "starts": [{"after": 1, "exits": [[1, 1]]}]}, DONE])
  assert up(config, print, clock) == 1
  assert up(config, print, clock) == 0


def test_taking_a_run_up_again_forgives_the_failures(config, cloud, clock):
  config.max_failures = 2
  cloud(lives=[{"states": ["FAILED"], "starts": []}] * 6)
  assert up(config, print, clock) == up(config, print, clock) == 1
  assert requests(config) == 6


def test_a_run_that_is_done_says_so_and_costs_nothing_more(config, cloud, clock):
  cloud(lives=[DONE])
  said = []
  assert up(config, said.append, clock) == up(config, said.append, clock) == 0
  assert requests(config) == 1
  assert any(line.startswith("this run is done; for another one take another name") for line in said)


def test_what_an_earlier_run_of_the_name_left_is_never_read(config, cloud, clock, launch):
  """Its exit codes are still in the bucket, and would decide the new one."""
  cloud(lives=[DONE, DONE])
  assert up(config, print, clock) == 0
  assert launch("down")[0] == 0
  assert up(config, print, clock) == 0
  folders = re.findall(r"--run (\S+)", commands(config))
  assert len(folders) == len(set(folders)) == 2


# ---- while it runs ----


@pytest.fixture
def own_checkout(config, checkout, tmp_path):
  """A checkout that a test may change."""
  subprocess.run(["git", "clone", "-q", str(checkout), str(tmp_path / "own")], check=True)
  config.source = str(tmp_path / "own")
  return tmp_path / "own"


def test_a_running_run_does_not_depend_on_what_the_checkout_has_become(config, cloud, clock, own_checkout):
  cloud(lives=[{"states": [ACTIVE], "starts": [{"after": 20, "exits": [[42, 42]]},
                                               {"after": 1, "exits": [[0, 0]]}]}])
  with pytest.raises(KeyboardInterrupt):
    up(config, print, clock._replace(sleep=interrupted_after(8, clock.sleep)))
  version = read_state(config).code_version
  (own_checkout / "train.py").write_text("print('in the middle of something')\n")
  assert up(config, print, clock) == 0
  assert read_state(config).code_version == version, "a restart goes on with what was started"
  assert commands(config).count("git -C") == 1


def test_what_is_shipped_is_committed_but_other_files_may_be_there(config, own_checkout):
  version = prepare(config)
  (own_checkout / "my_launch.py").write_text("from configs import launch_v5e\n")
  assert prepare(config) == version
  (own_checkout / "train.py").write_text("print('changed')\n")
  with pytest.raises(DataError, match="has changes that are not committed"):
    prepare(config)


def test_a_host_without_command_and_without_exit_code_counts_as_killed(config, cloud, clock):
  """It was switched on anew, say; the others may wait for it for ever."""
  cloud(lives=[{"states": [ACTIVE], "starts": [ENDLESS, {"after": 1, "exits": [[0, 0]]}], "idle": [0, 1, 0]}],
        commits={"1": 40, "2": 80})
  said = []
  assert up(config, said.append, clock) == 0
  assert "a host lost the command and left no exit code: restarting 1/10 from step 40" in said
  assert read_state(config).starts == 2


def test_a_laptop_that_wakes_up_without_a_network_is_not_without_an_answer_for_days(config, cloud, clock):
  """Nobody asked while it was asleep."""
  cloud(lives=[{"states": [ACTIVE], "starts": [{"after": 20, "exits": [[0, 0]]}]}],
        failures={f"describe {n}": "Unable to find the server at tpu.googleapis.com" for n in range(8, 28)})
  config.budget_hours = 48
  left = [7]

  def sleep(seconds):
    left[0] -= 1
    clock.sleep(seconds if left[0] else 30 * 3600)
  assert up(config, print, clock._replace(sleep=sleep)) == 0


def test_who_is_without_an_answer_for_days_gives_up(config, cloud, clock):
  config.poll = 3600.0
  cloud(lives=[{"states": [ACTIVE], "starts": [ENDLESS]}],
        failures={f"describe {n}": "Unable to find the server at tpu.googleapis.com" for n in range(8, 999)})
  with pytest.raises(Refused, match="gcloud has not answered for 24 hours"):
    up(config, print, clock)


@pytest.mark.parametrize("ended, preemptions", [([151], 0), ([0], 0), ([42], 2), ([43], 2)])
def test_a_host_that_hangs_is_a_failure_unless_the_others_were_preempted(
    config, cloud, clock, ended, preemptions):
  """What left no exit code is no preemption by itself: there would be no limit to it."""
  config.max_failures = config.max_preemptions = 1
  cloud(lives=[{"states": [ACTIVE], "starts": [{"after": 1, "exits": [ended]}]}] * 9,
        commits={str(n): 40 for n in range(9)})
  assert up(config, print, clock) == (ended[0] if preemptions else 137)
  assert requests(config) == 2
  assert read_state(config).preemptions == preemptions


UNREACHABLE = {f"ask {n}": "[/usr/bin/ssh] exited with return code [255]." for n in range(1, 999)}


def test_hosts_that_cannot_be_asked_are_left_alone_while_they_write_to_the_bucket(config, cloud, clock):
  config.poll = 600.0
  cloud(lives=[{"states": [ACTIVE], "starts": [{"after": 20, "exits": [[0, 0]]}]}],
        failures=UNREACHABLE, written="2099-01-01T00:00:00Z")
  assert up(config, print, clock) == 0
  assert read_state(config).starts == 1


@pytest.mark.parametrize("written", [{}, {"written": "2027-01-15T08:05:00Z"}])
def test_hosts_of_which_nothing_is_heard_for_an_hour_are_replaced(config, cloud, clock, written):
  """Neither do they answer nor is a log renewed: nothing runs there any more, and it costs money."""
  config.max_failures, config.poll = 2, 600.0
  cloud(lives=[{"states": [ACTIVE], "starts": [ENDLESS]}] * 9, failures=UNREACHABLE, **written)
  said = []
  assert up(config, said.append, clock) == 137
  assert said.count("nothing was heard of the hosts for 1 h: taking others") == 2
  assert requests(config) == 3
  assert read_state(config).spent < 3 * 1.4 * 3600


def test_a_connection_that_breaks_now_and_then_is_no_silence(config, cloud, clock):
  config.poll = 600.0
  cloud(lives=[{"states": [ACTIVE], "starts": [{"after": 20, "exits": [[0, 0]]}]}],
        failures={f"ask {n}": "[/usr/bin/ssh] exited with return code [255]." for n in range(1, 99) if n % 4})
  assert up(config, print, clock) == 0
  assert read_state(config).starts == 1


# ---- why a command failed ----


def test_what_a_host_said_is_shown_and_all_of_it_kept(tmp_path, clock):
  """gcloud's remark that a worker failed comes last, and says nothing."""
  script = ("echo 'ERROR: worker 1: 0 chips are there' >&2; echo 'more about it' >&2;"
            "echo '##### Command execution on worker 1 failed with exit status 1. Continuing.' >&2; exit 1")
  said = []
  with pytest.raises(CommandFailed, match="^ERROR: worker 1: 0 chips are there$"):
    executor(tmp_path / "transcript.log", clock, said.append)(Command(("bash", "-c", script), tries=1))
  assert said == ["failed, try 1 of 1: ERROR: worker 1: 0 chips are there"]
  assert "\n  more about it\n  ##### Command" in (tmp_path / "transcript.log").read_text()


def test_without_an_error_line_the_last_one_of_the_host_is_shown(tmp_path, clock):
  script = "echo 'No space left on device' >&2; echo '##### Command execution on worker 0 failed' >&2; exit 1"
  with pytest.raises(CommandFailed, match="^No space left on device$"):
    executor(tmp_path / "transcript.log", clock, print)(Command(("bash", "-c", script), tries=1))


def test_setup_says_which_step_failed(tmp_path):
  for name, script in (("sudo", "exit 0"),
                       ("gcsfuse", "[ $1 = --help ] && echo --metadata-cache-negative-ttl-secs")):
    (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / name).chmod(0o755)
  words = ["gs://bucket/code", "version", "bucket", str(tmp_path / "mount"), "3.12", "0.13.8"]
  done = subprocess.run(["bash", str(importlib.resources.files("launch") / "setup.sh"), *words], text=True,
                        env={"PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": str(tmp_path)},
                        capture_output=True, check=False, timeout=60)
  assert done.returncode == 1
  last = done.stderr.splitlines()[-1]
  assert re.fullmatch(r'ERROR: setup.sh, line \d+: gcsfuse --implicit-dirs .* "\$bucket" "\$mount"', last)
