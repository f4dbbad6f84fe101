"""`lskd train`."""
import math
from pathlib import Path
import sys

from data_pipeline.records import DataError
from lskd_jax.commands import folders
from lskd_jax.commands.arguments import add_verb, count, seed


def add_verbs(verbs) -> None:
  """Declares `train`."""
  p = add_verb(verbs, "train", train, "train or resume a student or a critic",
               "lskd train --config configs/scenes_student.py --config.optim.steps=900 "
               "--workdir runs/student")
  p.add_argument("--config", required=True, type=Path, metavar="FILE",
                 help="Python file with get_config(); --config.key=value changes a value")
  p.add_argument("--workdir", required=True, type=Path, metavar="DIR",
                 help="checkpoints, metrics and at the end DIR/model; the same again resumes")
  group = p.add_argument_group("several processes, one per host")
  group.add_argument("--processes", type=count, default=1, metavar="N")
  group.add_argument("--process-id", type=seed, default=0, metavar="I", help="0 to N - 1")
  group.add_argument("--coordinator", metavar="HOST:PORT",
                     help="of process 0; not needed on TPU pods")
  group = p.add_argument_group("several processes on this machine, restarted when they are lost")
  group.add_argument("--local-processes", type=count, metavar="N",
                     help="logs in DIR/logs; the mesh must cover all of their devices")
  group.add_argument("--devices-per-process", type=count, metavar="D",
                     help="CPU devices of each; what the mesh needs if not given")


def train(args) -> None:
  """Trains or resumes what a config file describes."""
  from lskd_jax.config_files import load_config
  config = load_config(args.config, args.overrides)  # before anything slow
  if args.local_processes:
    sys.exit(train_locally(args, config))
  corpus = Path(config.data.corpus)
  if (corpus / "stage.json").exists() and not config.data.image_root:
    config.data.image_root = str(folders.image_root(corpus, needed=False) or "")
  from lskd_jax import parallel
  from lskd_jax.train import train as run
  parallel.initialize(args.coordinator, args.processes, args.process_id)
  done = run(config, args.workdir)
  if args.process_id == 0:
    print(f"train: {done.steps} steps; the model is in {done.model}")


def train_locally(args, config) -> int:
  """Runs this very command as several processes of this machine; the run's exit code.

  Raises DataError if the mesh cannot be spread evenly over that many processes.
  """
  from lskd_jax.supervisor import supervise
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
