"""Decides: (config, what was done so far, what is there now) -> commands, a wait, and the next state.

Pure, so that every road through preemptions and failures can be tested without a cloud. A plan's state
holds once all of its commands have succeeded; if one fails, the state before it still holds, and the next
look decides anew. All commands may therefore be repeated. Only a request for machines holds from before its
command on, which may have reached the cloud although it failed.
"""
from typing import NamedTuple

from launch import gcloud
from launch.accelerators import accelerator
from launch.gcloud import Command
from lskd_jax import exit_codes
from lskd_jax.supervisor import Budgets, Decision, Tally, decide

# States of a queued resource. ACCEPTED was renamed to WAITING_FOR_RESOURCES; both still occur.
QUEUED = ("CREATING", "ACCEPTED", "WAITING_FOR_RESOURCES")
ENDING = ("SUSPENDING", "DELETING")
ENDED = ("SUSPENDED", "FAILED")  # they use up quota until they are deleted

KILLED = 137  # speaks for what ended without an exit code
HOUR = 3600.0
LONGEST = {"PROVISIONING": 2 * HOUR, "SUSPENDING": HOUR, "DELETING": HOUR}
LAST_HOSTS = HOUR  # for the others to finish after one host is done: they may still write the model
AFTER_STOP = 600.0  # for exit files to appear after hosts were told to stop
ASK_EVERY = 600.0  # between questions to the hosts whether the command is there
LONGEST_SILENCE = HOUR  # without an answer, and without a word in the bucket, where logs come twice a minute
LONGEST_DELAY = HOUR / 2
PLACE = ("project", "zone", "nodes", "accelerator_type")  # keys of a config that say which machines


class State(NamedTuple):
  """What the launcher remembers; kept as JSON, so that `up` continues where another one left off.

  began: when the first `up` was called; it names the starts' folder in the bucket, so that what another
  run of this name left there is never read. project, …, accelerator_type: what was asked for last.
  resource, since: the state seen last, and since when (Unix seconds). spent: seconds of ACTIVE so far.
  code_version: hash of what was shipped. starts: of the command; running: the last one has not been seen
  to end; preempted: it ended so, and was counted, on the machines that are there. asked: when the hosts
  were asked whether the command is there; unheard: since when they have not all answered. before, durable:
  checkpointed steps when it started, and now. first_end: when the first host was seen to have ended.
  troubles: commands that failed in a row. code, why: how the run ended.
  """
  began: str = ""
  project: str = ""
  zone: str = ""
  nodes: int = 0
  accelerator_type: str = ""
  resource: str = ""
  since: float = 0.0
  active_seen: float | None = None
  spent: float = 0.0
  code_version: str = ""
  starts: int = 0
  running: bool = False
  preempted: bool = False
  asked: float = 0.0
  unheard: float | None = None
  before: int | None = None
  durable: int | None = None
  first_end: float | None = None
  stopped: bool = False
  not_before: float = 0.0
  failures: int = 0
  preemptions: int = 0
  troubles: int = 0
  code: int | None = None
  why: str = ""


class Seen(NamedTuple):
  """One look. resource: None if there is none. exits: codes of the hosts that ended, earliest first.

  idle: hosts that said that no command is there; None if they were not asked; silent: some did not answer.
  alive: when a host last wrote to the bucket; only looked up where it matters. error: why a request FAILED.
  """
  resource: str | None
  exits: tuple[int, ...] = ()
  durable: int | None = None
  idle: int | None = None
  silent: bool = False
  alive: float = 0.0
  error: str = ""


class Plan(NamedTuple):
  """Commands to run now, then `state` holds; then a wait of so many seconds. done: nothing is left."""
  state: State
  say: str
  commands: tuple[Command, ...] = ()
  wait: float = 0.0
  done: bool = False


def account(state: State, seen: Seen, now: float) -> State:
  """The state after a look: what is there, since when, and the time the machines have been there.

  Machines that are gone count until their newest sign of life that is known: nobody may have looked for days.
  """
  resource = seen.resource or ""
  if state.active_seen is not None:
    end = now if resource == "ACTIVE" else max(state.active_seen, min(seen.alive, now))
    state = state._replace(spent=state.spent + end - state.active_seen)
  if resource != state.resource:
    state = state._replace(resource=resource, since=now)
  if seen.idle is not None:
    state = state._replace(asked=now, unheard=(state.unheard or now) if seen.silent else None)
  durable = state.durable if seen.durable is None else seen.durable
  return state._replace(active_seen=now if resource == "ACTIVE" else None, durable=durable,
                        before=state.before if state.running else durable)


def hosts(config) -> int:
  """How many hosts the machines have."""
  return config.nodes * accelerator(config.accelerator_type).hosts


def run_folder(state: State) -> str:
  """Of the last start, below the launcher's folder in the bucket."""
  return f"run/{state.began}/{state.starts}"


def plan(config, version: str, state: State, seen: Seen, now: float) -> Plan:
  """What to do next. version: hash of the code to run; state: after `account`; now: Unix seconds."""
  resource, was_running, ended = seen.resource, state.running, None
  if was_running and (len(seen.exits) >= hosts(config) or resource not in ("ACTIVE", *ENDING)):
    ended = _verdict(config, state, seen)
    state = _after(config, state, ended, now)
  # After the exit codes: a run that is done is done, whatever it took.
  if state.code is None and state.spent >= config.budget_hours * HOUR:
    state = state._replace(code=exit_codes.INPUT,
                           why=f"the budget of {config.budget_hours:g} hours is used up")
  if state.code is None and state.troubles > config.max_failures:
    state = state._replace(code=exit_codes.INPUT, why=f"{state.troubles} commands failed in a row, the last "
                           f"with: {state.why}")
  if state.code is not None:
    return _wind_down(config, state, resource)
  if ended and resource == "ACTIVE":
    return _wait(config, state, ended.why, ended.delay)
  if not was_running and state.code_version != version:  # before there are machines that cost money
    if now < state.not_before:
      return _wait(config, state, "waiting before the code is shipped again", state.not_before - now)
    return Plan(state._replace(code_version=version), "shipping the code",
                tuple(gcloud.ship(config, version)))
  if resource is None:
    if now < state.not_before:
      return _wait(config, state, "waiting before the next request", state.not_before - now)
    place = {key: config[key] for key in PLACE}
    return Plan(state._replace(resource=QUEUED[0], since=now, **place), "asking for machines",
                (gcloud.create(config),), wait=config.poll)
  if resource in ENDED:
    what = f"{resource} ({seen.error})" if seen.error else resource
    if not was_running:  # refused, or taken away, before anything ran
      if resource == "FAILED":
        state = _useless(config, state, now, what)
      elif not state.preempted:
        state = _after(config, state, _verdict(config, state, seen), now)
      if state.code is not None:
        return _wind_down(config, state, resource)
    return _replace(config, state, f"{what}: deleting what is left")
  if resource == "ACTIVE":
    return _active(config, state, seen, now)
  longest = config.wait_hours * HOUR + HOUR / 2 if resource in QUEUED else LONGEST.get(resource, HOUR)
  if now - state.since > longest:
    return _replace(config, state, f"{resource} for {(now - state.since) / HOUR:.1f} h: starting over")
  return _wait(config, state, resource)


def _active(config, state: State, seen: Seen, now: float) -> Plan:
  version = state.code_version
  if not state.running:
    if state.troubles >= 2:
      state = _useless(config, state, now, state.why)
      if state.code is not None:
        return _wind_down(config, state, seen.resource)
      return _replace(config, state._replace(troubles=0), "the machines cannot be used: taking others")
    if now < state.not_before:
      return _wait(config, state, "ACTIVE: waiting before the next start", state.not_before - now)
    step = "the beginning" if state.durable is None else f"step {state.durable}"
    state = state._replace(starts=state.starts + 1, running=True, preempted=False, asked=now,
                           unheard=None)
    return Plan(state, f"start {state.starts} from {step}: preparing all hosts",
                (*gcloud.setup(config, version), *gcloud.preflight(config, version),
                 *gcloud.start(config, version, run_folder(state))))
  if (seen.idle or 0) > len(seen.exits):
    decision = _verdict(config, state, seen, KILLED)
    state = _after(config, state, decision, now)
    if state.code is not None:
      return _wind_down(config, state, seen.resource)
    return _wait(config, state, f"a host lost the command and left no exit code: {decision.why}",
                 decision.delay)
  if not seen.exits:
    if seen.silent and min(now - state.unheard, now - seen.alive) > LONGEST_SILENCE:
      return _take_others(config, state, seen, now,
                          f"nothing was heard of the hosts for {LONGEST_SILENCE / HOUR:g} h: taking others")
    return _wait(config, state, f"running, start {state.starts}")
  if state.first_end is None:
    state = state._replace(first_end=now)
  if not state.stopped:
    if now - state.first_end <= (config.linger if any(seen.exits) else LAST_HOSTS):
      return _wait(config, state, f"{len(seen.exits)} of {hosts(config)} hosts have ended",
                   min(config.poll, config.linger))
    return Plan(state._replace(stopped=True, first_end=now), "ending the other hosts",
                tuple(gcloud.stop(config, version)))
  if now - state.first_end <= AFTER_STOP:
    return _wait(config, state, f"{len(seen.exits)} of {hosts(config)} hosts have ended")
  return _take_others(config, state, seen, now, "hosts do not answer: taking others")


def _take_others(config, state: State, seen: Seen, now: float, why: str) -> Plan:
  """Replaces machines some of whose hosts hang: a failure, unless others said that they were preempted."""
  state = _after(config, state, _verdict(config, state, seen, KILLED), now)
  return _replace(config, state, why) if state.code is None else _wind_down(config, state, seen.resource)


def _verdict(config, state: State, seen: Seen, code: int = exit_codes.PREEMPTED) -> Decision:
  """What follows when a start is over. `code` is of hosts that left none; if machines are gone, preempted."""
  codes = seen.exits if len(seen.exits) >= hosts(config) else (*seen.exits, code)
  return decide(codes, state.before, state.durable, _tally(state), _budgets(config))


def _useless(config, state: State, now: float, error: str) -> State:
  """The state once machines, or the request for them, came to nothing before a start: a failure."""
  decision = decide([KILLED], state.before, state.durable, _tally(state), _budgets(config))
  state = _after(config, state, decision, now)
  if decision.restart:
    return state
  return state._replace(code=exit_codes.INPUT,
                        why=f"{state.failures} failures in a row, the last with: {error}")


def _after(config, state: State, decision: Decision, now: float) -> State:
  """The state once a start is over."""
  state = state._replace(running=False, preempted=decision.code in exit_codes.PREEMPTIONS, first_end=None,
                         stopped=False, failures=decision.tally.failures,
                         preemptions=decision.tally.preemptions, not_before=now + decision.delay)
  return state if decision.restart else state._replace(code=decision.code, why=decision.why)


def _wind_down(config, state: State, resource: str | None) -> Plan:
  if resource is None:
    return Plan(state, state.why, done=True)
  if resource == "DELETING":
    return _wait(config, state, resource)
  stop = tuple(gcloud.stop(config, state.code_version)) if state.running else ()
  return Plan(state._replace(resource="", active_seen=None, running=False),
              f"{state.why}: deleting the machines", (*stop, gcloud.delete(config)))


def _replace(config, state: State, why: str) -> Plan:
  return Plan(state._replace(resource="", active_seen=None, preempted=False), why, (gcloud.delete(config),))


def _wait(config, state: State, why: str, seconds: float | None = None) -> Plan:
  return Plan(state, why, wait=config.poll if seconds is None else seconds)


def after_trouble(config, state: State, now: float, error: str) -> State:
  """The state once a command of a plan has failed for good: wait longer each time."""
  delay = min(config.poll * 2 ** state.troubles, LONGEST_DELAY)
  return state._replace(troubles=state.troubles + 1, not_before=now + delay, why=error)


def _tally(state: State) -> Tally:
  return Tally(state.failures, state.preemptions)


def _budgets(config) -> Budgets:
  return Budgets(config.max_failures, config.max_preemptions, config.backoff)
