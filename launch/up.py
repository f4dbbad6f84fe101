"""`up`: looks, plans and executes until the run is over; what it knows is in a file, so it can be stopped."""
from collections.abc import Callable
import contextlib
import copy
import datetime
import fcntl
import hashlib
import importlib.metadata
import importlib.resources
import json
from pathlib import Path
import re
import subprocess
import time

from data_pipeline.records import DataError
from data_pipeline.stages import write_json
from launch import gcloud, planner
from launch.executor import Clock, CommandFailed, Refused, executor
from launch.gcloud import Command
from launch.planner import HOUR, QUEUED, Seen, State, account, after_trouble, plan, run_folder
from lskd_jax import exit_codes
from lskd_jax.supervisor import describe, newest_step

OWN = ("lskd-jax", "lskd_jax", "pip", "setuptools", "wheel")  # installed from the checkout, or there anyway
LOOKS = 5  # must fail in a row before gcloud is given up: time also passes while a laptop is asleep

REAL = Clock()


def up(config, say: Callable[[str], None], clock: Clock = REAL) -> int:
  """Brings the run to its end; its exit code, or 1 if it was given up or the budget is used up.

  Raises DataError where the checkout cannot be shipped, Refused where gcloud will never do it. Whatever is
  raised, Ctrl-C as well, has a note if machines are still there.
  """
  with locked(state_folder(config)):
    state = read_state(config)
    refuse_other_machines(config, state)
    try:
      return _until_done(config, state, say, clock)
    except BaseException as error:
      resource = read_state(config).resource
      if resource:
        error.add_note(f"{config.name} ({resource}) is still there and may cost money: `python -m launch up` "
                       "looks after it again, `down` deletes it")
      raise


def _until_done(config, state: State, say: Callable[[str], None], clock: Clock) -> int:
  folder = state_folder(config)
  state = taken_up(state, clock.now(), say)
  # A start that runs, or a run that is done, does not depend on what the checkout has become.
  keep = state.running or state.code is not None
  version = state.code_version if keep else prepare(config)
  run = executor(folder / "transcript.log", clock, say)
  said, unanswered = "", []  # times of the looks that have failed since the last that did not
  while True:
    try:
      seen = look(config, state, run, clock.now() - state.asked >= planner.ASK_EVERY)
      unanswered = []
    except CommandFailed as error:  # says nothing about the run: this machine may be offline
      unanswered.append(clock.now())
      if len(unanswered) >= LOOKS and clock.now() - unanswered[0] > config.wait_hours * HOUR:
        raise Refused(f"gcloud has not answered for {config.wait_hours:g} hours: {error}") from None
      clock.sleep(config.poll)
      continue
    if seen.resource and not asked_here(config, state):
      raise DataError(f"{config.name} ({seen.resource}) is in {config.zone} of {config.project} already, "
                      f"and {folder}/state.json has not asked for it: take another `name`, or the `state` "
                      "that has, or delete it with `python -m launch down`")
    state = account(state, seen, clock.now())
    todo = plan(config, version, state, seen, clock.now())
    if todo.say != said:
      say(todo.say)
      said = todo.say
    looked = state
    if gcloud.create(config) in todo.commands:  # a request may be there although asking for it failed
      state = todo.state
    if todo.commands:  # they take long: Ctrl-C may come
      write_state(config, state)
    try:
      for command in todo.commands:
        run(command)
      state = todo.state._replace(troubles=0) if todo.commands else todo.state
    except CommandFailed as error:
      state = after_trouble(config, state, clock.now(), str(error))
    except Refused:
      write_state(config, looked)
      raise
    write_state(config, state)
    if todo.done:
      return state.code
    clock.sleep(todo.wait)


def taken_up(state: State, now: float, say: Callable[[str], None]) -> State:
  """The state that a call of `up` begins with: what ended the run in an earlier one has been mended."""
  if not state.began:
    state = state._replace(began=time.strftime("%Y%m%d-%H%M%S", time.gmtime(now)))
  if state.code == exit_codes.DONE:
    say("this run is done; for another one take another name and --workdir. To go on with this one, say "
        "for longer: `python -m launch down`, then `up`")
  elif state.code is not None:
    say(f"it had ended with {describe(state.code)}: {state.why}; taking it up again")
    state = state._replace(code=None, why="", failures=0, troubles=0, not_before=0.0)
  return state


def look(config, state: State, run: Callable[[Command], str], ask: bool = False) -> Seen:
  """What is there now; only as many commands as the state needs. ask: also ask the hosts, which is slow."""
  resource = run(gcloud.describe(config)).strip() or None
  exits, durable, idle, silent, alive = (), None, None, False, 0.0
  error = " ".join(run(gcloud.refusal(config)).split()) if resource == "FAILED" else ""
  if state.running:
    if ask and resource == "ACTIVE":  # before the exit codes: a host that is idle has written its own
      words = " ".join(map(run, gcloud.ask(config, state.code_version))).split()
      idle = words.count("IDLE")
      silent = idle + words.count("RUNS") < planner.hosts(config)
    exits = read_exits(run(gcloud.exits(config, run_folder(state))))
    if silent or resource != "ACTIVE" and state.active_seen:  # or taken away since the last look
      alive = newest_time(run(gcloud.written(config, run_folder(state))))
  if exits or idle or (resource == "ACTIVE") != state.running:
    durable = newest_step(run(gcloud.markers(config)).split())
  return Seen(resource, exits, durable, idle, silent, alive, error)


def read_exits(text: str) -> tuple[int, ...]:
  """Exit codes of lines such as {"time": 1.5, "code": 42}, earliest first."""
  found = [json.loads(line) for line in text.splitlines() if line.strip()]
  return tuple(one["code"] for one in sorted(found, key=lambda one: one["time"]))


def newest_time(text: str) -> float:
  """The newest of the times, such as 2026-08-01T12:00:00Z, in a listing; Unix seconds, 0 if there is none."""
  found = re.findall(r"\b\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", text)
  return max((datetime.datetime.fromisoformat(one).timestamp() for one in found), default=0.0)


# ---- what is kept on this machine ----


def state_folder(config) -> Path:
  """Where the state, the transcript and what is shipped lie; made when missing."""
  folder = Path(config.state).absolute() / config.name
  folder.mkdir(parents=True, exist_ok=True)
  return folder


def read_state(config) -> State:
  """What earlier calls have done; the beginning if there were none."""
  path = state_folder(config) / "state.json"
  if not path.exists():
    return State()
  try:
    return State(**json.loads(path.read_text()))
  except (ValueError, TypeError):
    raise DataError(f"{path}: cannot be read; after `python -m launch down` begin anew") from None


def write_state(config, state: State) -> None:
  """For the next call."""
  write_json(state_folder(config) / "state.json", state._asdict())


def refuse_other_machines(config, state: State) -> None:
  """Raises DataError if the config means other machines than those that may be there: nobody would look
  after these any more.
  """
  for key in planner.PLACE if state.resource else ():
    there = getattr(state, key)
    if config[key] != there:
      raise DataError(f"{key}={config[key]!r}: {config.name} ({state.resource}) is there with "
                      f"{key}={there!r}; go on with that, or delete it first: `python -m launch down`")


def asked_here(config, state: State) -> bool:
  """Whether what has the run's name in that zone was asked for by this state; else it is somebody else's."""
  return (state.project, state.zone) == (config.project, config.zone)


def as_there(config, state: State):
  """The config with the machines that may be there, whatever it has become since they were asked for."""
  there = copy.deepcopy(config)
  there.update({key: getattr(state, key) for key in planner.PLACE if state.resource})
  return there


@contextlib.contextmanager
def locked(folder: Path):
  """Keeps a second `up`, or a `down`, away from the same run."""
  with (folder / "lock").open("w") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise DataError(f"{folder}: another `python -m launch up` looks after this run; stop it first "
                      "(the run itself goes on)") from None
    yield


# ---- what is shipped ----


def prepare(config) -> str:
  """Writes what goes beside the code, and returns the hash of all that is shipped.

  Raises DataError if the source is no git checkout, or has changes that are not committed: what runs on
  a pod should have a name. Files that git does not know are not shipped, and may be there.
  """
  tree = _git(config, "rev-parse", "HEAD^{tree}")
  if _git(config, "status", "--porcelain", "--untracked-files=no"):
    raise DataError(f"source={config.source!r} has changes that are not committed: commit them, since what "
                    "is shipped is HEAD")
  lock = lock_file(config)
  setup = (importlib.resources.files("launch") / "setup.sh").read_text()
  version = hashlib.sha256("\n".join((tree, lock, setup)).encode()).hexdigest()[:12]
  folder = state_folder(config) / version
  folder.mkdir(exist_ok=True)
  (folder / "requirements.lock").write_text(lock)
  (folder / "setup.sh").write_text(setup)
  return version


def lock_file(config) -> str:
  """The packages of the hosts, one `name==version` a line: of the file in the config, or installed here."""
  if config.requirements:
    return Path(config.requirements).read_text()
  found = {dist.metadata["Name"]: dist.version for dist in importlib.metadata.distributions()}
  if "libtpu" not in found:
    raise DataError("requirements='': the packages installed here would be shipped, and libtpu is not among "
                    "them: pip install -e '.[tpu]', or name a file")
  odd = sorted(f"{name} {version}" for name, version in found.items() if "+" in version)
  if odd:
    raise DataError(f"requirements='': {odd[0]} is installed here, which the package index does not have: "
                    "ship from an environment made by pip install -e '.[tpu]', or name a file")
  return "".join(f"{name}=={found[name]}\n" for name in sorted(found, key=str.lower)
                 if name.lower() not in OWN)


def _git(config, *words: str) -> str:
  done = subprocess.run(["git", "-C", config.source, *words], capture_output=True, text=True, check=False)
  if done.returncode:
    raise DataError(f"source={config.source!r} is not a git checkout with a commit; set it to one")
  return done.stdout.strip()


# ---- what would be done ----


def rehearse(config) -> list[str]:
  """The commands of a first pass from nothing to the end, in order, with remarks; nothing is run."""
  try:
    version, remarks = prepare(config), []
  except DataError as error:
    version, remarks = "HASH", [f"# to be mended before it can be shipped: {error}"]
  hosts = planner.hosts(config)
  state, resource, exits = State(began="TIME"), None, ()
  lines = [*remarks, f"# every {config.poll:g} s", str(gcloud.describe(config))]
  while True:
    seen = Seen(resource, exits)
    state = account(state, seen, 0.0)
    todo = plan(config, version, state, seen, 0.0)
    lines += [f"# {todo.say}", *map(str, todo.commands)]
    if todo.done:
      return lines
    state = todo.state
    if todo.commands:  # they worked
      if gcloud.create(config) in todo.commands:
        resource = QUEUED[-1]
      elif gcloud.delete(config) in todo.commands:
        resource = None
    elif resource in QUEUED:
      lines.append(f"# … until it is ACTIVE, for at most {config.wait_hours:g} h")
      resource = "ACTIVE"
    else:
      lines += [str(gcloud.exits(config, run_folder(state))),
                f"# … until all {hosts} hosts have ended, for at most {config.budget_hours:g} h",
                str(gcloud.markers(config))]
      exits = (0,) * hosts
