"""What happened while nobody looked is judged by what it was, and not by the time it took to look again."""
import re
import time

import pytest

from launch.planner import HOUR, State
from launch.up import newest_time, read_state, up, write_state
from tests.launch.test_up import ACTIVE, DONE
from tests.launch.test_whose import ENDLESS, interrupted


def test_a_run_that_was_done_in_time_is_done_however_late_one_looks(config, cloud, clock):
  config.budget_hours = 48
  cloud(lives=[{"states": [ACTIVE], "starts": [{"after": 5, "exits": [[0, 0]]}]}])
  interrupted(config, clock, 8)
  clock.sleep(60 * HOUR)
  assert up(config, print, clock) == 0


def test_a_run_that_ended_to_be_started_again_keeps_to_its_budget(config, cloud, clock):
  """The machines were there all the time, and cost money."""
  config.budget_hours = 48
  cloud(lives=[{"states": [ACTIVE], "starts": [{"after": 5, "exits": [[150, 150]]}]}])
  interrupted(config, clock, 8)
  clock.sleep(60 * HOUR)
  said = []
  assert up(config, said.append, clock) == 1
  assert said[0] == "the budget of 48 hours is used up: deleting the machines"
  assert read_state(config).spent > 60 * HOUR


@pytest.mark.parametrize("written, hours", [
    ({}, 0.0), ({"written": "2027-01-16T04:00:00Z"}, 20.0), ({"written": "2099-01-01T00:00:00Z"}, 60.0)])
def test_machines_that_were_taken_away_count_until_their_last_sign_of_life(
    config, cloud, clock, written, hours):
  """20 h after the first look, or after the last one, which was minutes later; 60 h pass in between."""
  config.budget_hours = 61
  cloud(lives=[{"states": [*[ACTIVE] * 4, "SUSPENDED"], "starts": [ENDLESS]}, DONE], **written)
  interrupted(config, clock, 6)
  clock.sleep(60 * HOUR)
  assert up(config, print, clock) == 0
  assert read_state(config).spent / HOUR == pytest.approx(hours, abs=0.1)


def test_status_counts_the_same_hours(config, cloud, launch):
  there = {"lives": [], "looks": -1, "start": ENDLESS, "cats": 0}
  cloud(life={"states": ["SUSPENDED"]}, **there)
  state = State(began="TIME", project="project", zone="zone-a", nodes=1, accelerator_type="v5p-16",
                resource=ACTIVE, active_seen=time.time() - 60 * HOUR, spent=HOUR, starts=1, running=True)
  write_state(config, state)
  assert re.search(r"hours used +1\.00 of 48", launch("status")[1].out)
  cloud(life={"states": [ACTIVE]}, **there)
  assert re.search(r"hours used +61\.00 of 48", launch("status")[1].out)


def test_the_newest_time_of_a_listing_is_found():
  listing = ("      2048  2027-01-15T08:00:00Z  gs://bucket/run/log-0-0.txt\n"
             "        61  2027-01-15T09:00:00Z  gs://bucket/run/exit-0-0.json\n"
             "      2048  2027-01-15T08:30:00Z  gs://bucket/run/log-0-1.txt\n"
             "TOTAL: 3 objects, 4157 bytes (4.06kiB)\n")
  assert newest_time(listing) == 1_800_000_000 + HOUR
  assert newest_time("") == 0
