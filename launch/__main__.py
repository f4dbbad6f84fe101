"""`python -m launch VERB --help` tells each verb's arguments, with an example.

Exit code of `up`: the run's own, see lskd_jax/exit_codes.py; 1 where it was given up or the budget is
used up, 130 after Ctrl-C (the run goes on). Of the other verbs: 0, or 1 with one line that says why.
"""
from argparse import ArgumentParser, Namespace
import contextlib
import errno
import os
from pathlib import Path
import shlex
import sys
import time

from data_pipeline.records import DataError
from launch import config as configs, gcloud, local, manifests
from launch.accelerators import accelerator
from launch.executor import Clock, CommandFailed, Refused, executor
from launch.planner import HOUR, State, account
from launch.up import as_there, asked_here, locked, look, read_state, rehearse, state_folder, up
from lskd_jax import exit_codes
from lskd_jax.supervisor import describe, newest_step

EXAMPLE = "example: python -m launch {} --config my_launch.py{}"


def main(argv: list[str] | None = None) -> int:
  """Runs one verb; its exit code."""
  argv = sys.argv[1:] if argv is None else argv
  args = read_arguments(argv)
  try:
    return args.run(args)
  except KeyboardInterrupt as error:
    _complain(f"interrupted; to go on: python -m launch {shlex.join(argv)}", error)
    return exit_codes.INTERRUPTED
  except (DataError, Refused, CommandFailed) as error:
    _complain(f"error: {error}", error)
  except OSError as error:
    _complain(f"error: {error.filename}: {error.strerror}", error)
  return exit_codes.INPUT


def read_arguments(argv: list[str]) -> Namespace:
  """The parsed command line; `run` is the function of its verb."""
  parser = ArgumentParser(prog="python -m launch", allow_abbrev=False, description=
                          "Runs training on TPU pods that can be taken away. See docs/launch.md.")
  verbs = parser.add_subparsers(metavar="VERB", required=True)
  p = _add(verbs, "up", run_up, "start, look after or take up again a run until it is done", " --dry-run")
  p.add_argument("--dry-run", action="store_true", help="print the commands of a first pass; run nothing")
  p.add_argument("--backend", choices=["tpu-vm", "local"], default="tpu-vm",
                 help="local: processes on this machine, under the same policy")
  p.add_argument("--workdir", help="with --backend local: instead of the command's")
  _add(verbs, "status", run_status, "show the machines, the run and what it has cost")
  p = _add(verbs, "logs", run_logs, "fetch the logs of all hosts, also while they are running")
  p.add_argument("--out", type=Path, metavar="DIR", help="instead of the folder of the state")
  p.add_argument("--tail", type=int, default=10, metavar="N", help="lines of the first host to print")
  p = _add(verbs, "down", run_down, "delete the machines, forget the state; checkpoints and logs stay",
           " --yes")
  p.add_argument("--yes", action="store_true", help="do not ask")
  for name, function, summary in (("manifest", run_manifest, "write a Kubernetes JobSet"),
                                  ("skypilot", run_skypilot, "write a SkyPilot task")):
    p = _add(verbs, name, function, summary, " --out FILE")
    p.add_argument("--out", type=Path, required=True, metavar="FILE")
  args, rest = parser.parse_known_args(argv)
  for word in rest:
    if not word.startswith("--config."):
      args.parser.error(f"unrecognized argument: {word}")
  args.overrides = [word.removeprefix("--config.") for word in rest]
  return args


def _add(verbs, name: str, run, summary: str, rest: str = "") -> ArgumentParser:
  parser = verbs.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".",
                            epilog=EXAMPLE.format(name, rest), allow_abbrev=False)
  parser.add_argument("--config", required=True, type=Path, metavar="FILE",
                      help="Python file with get_config(); --config.key=value changes a value")
  parser.set_defaults(run=run, parser=parser)
  return parser


def say(text: str) -> None:
  """Shows one line with the time."""
  show(f"{time.strftime('%H:%M:%S')} launch: {text}")


def show(text: str, stream=None) -> None:
  """Prints to standard output, or `stream`. That nobody reads it any more changes nothing else: machines have
  to be looked after also when the terminal is closed, or `head` has seen enough.
  """
  stream = stream or sys.stdout
  try:
    print(text, file=stream, flush=True)
  except OSError as error:
    if error.errno not in (errno.EPIPE, errno.EIO):
      raise
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # or Python tries again at its end


def _complain(text: str, error: BaseException) -> None:
  """Shows one line, with what `up` has noted about machines that are still there."""
  line = ". ".join([text, *getattr(error, "__notes__", [])])
  show(f"launch: {' '.join(line.split())}", sys.stderr)


# ---- verbs ----


def run_up(args) -> int:
  """Brings a run to its end, or prints what that would take."""
  config = configs.read(args.config, args.overrides, args.backend)
  if args.backend == "local":
    if args.dry_run:
      show("\n".join(local.rehearse(config, args.workdir)))
      return 0
    return local.up(config, args.workdir)
  if args.workdir:
    raise DataError("--workdir is for --backend local; on machines it is part of the config's command")
  if args.dry_run:
    show("\n".join(rehearse(config)))
    return 0
  code = up(config, say)
  say(f"the run ended with {describe(code)}")
  return code


def run_status(args) -> int:
  """A table of what there is."""
  config = configs.read(args.config, args.overrides, "tpu-vm")
  state = read_state(config)
  config = as_there(config, state)
  run = _executor(config)
  seen = look(config, state, run)
  ours = not seen.resource or asked_here(config, state)
  durable = newest_step(run(gcloud.markers(config)).split())
  hours = account(state, seen, time.time()).spent / HOUR
  chips = accelerator(config.accelerator_type).chips * config.nodes
  if state.code is not None:
    doing = f"ended with {describe(state.code)}: {state.why}"
  else:
    doing = f"start {state.starts}, {'running' if state.running else 'not running'}"
  rows = [("machines", f"{seen.resource or 'none'} ({machines(config, ours)})"),
          ("run", doing), ("hosts that ended", ", ".join(map(describe, seen.exits)) or "none"),
          ("durable step", "none" if durable is None else durable),
          ("failures in a row", f"{state.failures} of {config.max_failures}"),
          ("preemptions", state.preemptions),
          ("hours used", f"{hours:.2f} of {config.budget_hours:g}")]
  if config.price:
    rows.append(("dollars", f"{hours * chips * config.price:.2f} of "
                            f"{config.budget_hours * chips * config.price:.2f}"))
  for name, value in rows:
    show(f"{name:18} {value}")
  return 0


def run_logs(args) -> int:
  """Fetches logs and prints the end of one."""
  config = configs.read(args.config, args.overrides, "tpu-vm")
  folder = args.out or state_folder(config) / "logs"
  folder.mkdir(parents=True, exist_ok=True)
  _executor(config)(gcloud.logs(config, folder))
  found = sorted(folder.glob("*/*/log-*.txt"), key=lambda path: (
      path.parent.parent.name, int(path.parent.name), path.name))  # when it began, start, host
  if not found:
    show(f"no host has written a log yet ({folder})")
    return 0
  for path in found:
    show(path)
  first = next(path for path in found if path.parent == found[-1].parent)
  show("\n".join(first.read_text(errors="replace").splitlines()[-args.tail:]))
  return 0


def run_down(args) -> int:
  """Deletes the machines and forgets what was done; checkpoints and logs stay."""
  config = configs.read(args.config, args.overrides, "tpu-vm")
  folder = state_folder(config)
  with locked(folder):
    state = State()
    with contextlib.suppress(DataError):  # a state that cannot be read is forgotten, too
      state = read_state(config)
    config = as_there(config, state)
    run = _executor(config)
    resource = run(gcloud.describe(config)).strip()
    if resource:
      if not args.yes:
        try:
          what = machines(config, asked_here(config, state))
          answer = input(f"delete {config.name} ({resource}, {what})? [y/N] ")
        except EOFError:
          raise DataError("nothing was deleted: without a terminal to ask at, say --yes") from None
        if answer.strip().lower() not in ("y", "yes"):
          show("nothing was deleted")
          return exit_codes.INPUT
      run(gcloud.delete(config))
    (folder / "state.json").unlink(missing_ok=True)
  place = f"in {config.zone} of {config.project}"
  done = f"deleted {place}" if resource else f"there was nothing to delete {place}"
  show(f"{config.name}: {done}; checkpoints and logs are in {config.bucket}")
  return 0


def run_manifest(args) -> int:
  """Writes a JobSet."""
  config = configs.read(args.config, args.overrides, "kubernetes")
  text = manifests.as_yaml(manifests.jobset(config), f"kubectl apply -f {args.out.name}")
  return _write(args.out, text)


def run_skypilot(args) -> int:
  """Writes a SkyPilot task."""
  config = configs.read(args.config, args.overrides, "skypilot")
  text = manifests.as_yaml(manifests.skypilot(config), f"sky jobs launch {args.out.name}")
  return _write(args.out, text)


def machines(config, ours: bool) -> str:
  """What is there, in a few words; what somebody else asked for may be of any size."""
  what = (f"{config.nodes} x {config.accelerator_type}" if ours
          else "not asked for by this state,")
  return f"{what} in {config.zone} of {config.project}"


def _write(path: Path, text: str) -> int:
  path.write_text(text)
  show(path)
  return 0


def _executor(config):
  return executor(state_folder(config) / "transcript.log", Clock(), say)


if __name__ == "__main__":
  sys.exit(main())
