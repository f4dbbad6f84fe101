"""`lskd train` and `lskd watch`."""
import contextlib
import functools
import math
from pathlib import Path
import sys
import time

from data_pipeline.records import DataError
from lskd_jax.commands import folders
from lskd_jax.commands.arguments import add_verb, count, seed


def add_verbs(verbs) -> None:
  """Declares `train` and `watch`."""
  p = add_verb(verbs, "train", train, "train or resume a student or a critic",
               "lskd train --config configs/scenes_student.py --config.optim.steps=900 "
               "--workdir runs/student")
  p.add_argument("--config", required=True, type=Path, metavar="FILE",
                 help="Python file with get_config(); --config.key=value changes a value")
  p.add_argument("--workdir", required=True, type=Path, metavar="DIR",
                 help="checkpoints, metrics and at the end DIR/model; the same again resumes")
  p.add_argument("--reproduce-step", type=count, metavar="N",
                 help="do step N of this run again, print its metrics as JSON and compare them with "
                 "metrics.jsonl; nothing is written")
  p.add_argument("--accept-config", action="store_true",
                 help="go on with this config, though the run was started with another; what changed is kept "
                 "in DIR/config_changes.jsonl")
  group = p.add_argument_group("several processes, one per host")
  group.add_argument("--multi-host", action="store_true",
                     help="find the other processes: on TPU VMs, GKE, Slurm (srun) and Open MPI")
  group.add_argument("--coordinator", metavar="HOST:PORT", help="of process 0, where nothing finds it")
  group.add_argument("--process-id", type=seed, metavar="I", help="0 to N - 1, with --coordinator")
  group.add_argument("--processes", type=count, metavar="N",
                     help="how many there are; with --multi-host, how many there have to be")
  group.add_argument("--heartbeat", type=count, default=100, metavar="SECONDS",
                     help="a process that is silent for so long is taken for dead (default: 100)")
  group = p.add_argument_group("several processes on this machine, restarted when they are lost")
  group.add_argument("--local-processes", type=count, metavar="N",
                     help="logs in DIR/logs; the mesh must cover all of their devices")
  group.add_argument("--devices-per-process", type=count, metavar="D",
                     help="CPU devices of each; what the mesh needs if not given")

  p = add_verb(verbs, "watch", watch, "see how a run is doing: curves, time, what it lost to restarts",
               "lskd watch --workdir runs/student")
  p.add_argument("--workdir", required=True, type=Path, metavar="DIR", help="that of lskd train")
  p.add_argument("--once", action="store_true", help="print it once; else again every few seconds")
  p.add_argument("--metric", action="append", default=[], metavar="NAME",
                 help="draw this one of metrics.jsonl, instead of the loss; may be repeated")


def train(args) -> None:
  """Trains or resumes what a config file describes, or does one of its steps again."""
  if args.local_processes:
    for name in ("multi_host", "coordinator", "process_id", "processes"):
      if getattr(args, name) not in (None, False):
        args.parser.error("--local-processes starts the processes itself: leave out "
                          f"--{name.replace('_', '-')}")
    sys.exit(train_locally(args))
  if args.devices_per_process:
    args.parser.error("--devices-per-process is for --local-processes")
  began = time.time()
  from lskd_jax import peers, preemption
  # First of all: what follows, imports, corpus and compiles, takes minutes.
  with contextlib.closing(preemption.install()) as stop, peers.leaving_at_once(args.workdir, stop):
    run_config(args, stop, began)


def run_config(args, stop, began: float) -> None:
  """`train`, with the `Preemption` that may end it; began: when, in seconds since 1970."""
  from lskd_jax.config_files import load_config
  config = load_config(args.config, args.overrides)  # before anything slow
  for group in (config.data, config.eval):
    if group.corpus and (Path(group.corpus) / "stage.json").exists() and not group.image_root:
      group.image_root = str(folders.image_root(Path(group.corpus), needed=False) or "")
  import jax

  from lskd_jax import goodput, parallel
  from lskd_jax.replay import reproduce_step
  from lskd_jax.train import train as run
  parallel.initialize(args.coordinator, args.processes, args.process_id, multi_host=args.multi_host,
                      heartbeat_seconds=args.heartbeat)
  if args.reproduce_step:
    show(reproduce_step(config, args.workdir, args.reproduce_step), jax.process_index())
    return
  done = run(config, args.workdir, announce=functools.partial(print, flush=True), stop=stop, began=began,
             accept_config=args.accept_config)
  if jax.process_index() == 0:
    print(f"train: {done.steps} steps; the model is in {done.model}")
    print("\n".join(goodput.describe(goodput.summary(args.workdir))))


def show(found, process: int) -> None:
  """Prints a step that was done again; raises DataError if it came out different."""
  if process == 0:
    print(found.line())
    print("\n".join(found.report()), file=sys.stderr)
  if found.differences():
    raise DataError(f"step {found.step} is different from metrics.jsonl: {'; '.join(found.differences())}")


def watch(args) -> None:
  """Prints how a run is doing, until it is finished."""
  from lskd_jax import watch as screen
  screen.watch(args.workdir, args.once, tuple(args.metric))


def train_locally(args) -> int:
  """Runs this very command as several processes of this machine; the run's exit code.

  Raises DataError if the mesh cannot be spread evenly over that many processes.
  """
  from lskd_jax.config_files import load_config
  from lskd_jax.supervisor import supervise
  config = load_config(args.config, args.overrides)
  processes, devices = args.local_processes, args.devices_per_process
  if devices is None:
    axes = config.train.mesh.to_dict()
    needed = math.prod(size for size in axes.values() if size > 0)
    if -1 in axes.values():  # derived from what there is: as few as fit
      needed = math.lcm(needed, processes)
    if needed % processes:
      raise DataError(f"train.mesh needs {needed} device{'s' if needed > 1 else ''}, which cannot be spread "
                      f"over {processes} processes: try --config.train.mesh.data={processes}")
    devices = needed // processes
  own = without(args.argv, ("--local-processes", "--devices-per-process"))
  return supervise([sys.executable, "-m", "lskd_jax.cli", *own], processes, args.workdir, devices=devices)


def without(argv: list[str], flags: tuple[str, ...]) -> list[str]:
  """Arguments less these flags and their values, whether written `--flag 2` or `--flag=2`."""
  kept, is_value = [], False
  for word in argv:
    if not is_value and word.partition("=")[0] not in flags:
      kept.append(word)
    is_value = word in flags
  return kept
