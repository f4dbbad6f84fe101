"""`lskd plan`."""
from pathlib import Path

from lskd_jax.commands.arguments import add_verb, amount, count, positive


def add_verbs(verbs) -> None:
  """Declares `plan`."""
  p = add_verb(verbs, "plan", plan, "what a pod would need for a config, compiled without one",
               "lskd plan --config configs/blip2.py --topology v5e:4x4 --config.data.batch_size=256")
  p.add_argument("--config", required=True, type=Path, metavar="FILE",
                 help="as for train; --config.key=value changes a value")
  p.add_argument("--topology", required=True, metavar="KIND:SHAPE",
                 help="v4, v5e, v5p or v6e with a shape: v5e:4x4, v5p:4x4x4, '2x v5e:16x16' for two slices; "
                      "cpu:8 needs no libtpu, and says less")
  p.add_argument("--out", type=Path, metavar="FILE", help="the whole plan as JSON")
  p.add_argument("--low-effort", action="store_true",
                 help="compile in a third of the time: the same memory, more memory traffic")
  p.add_argument("--search", action="store_true",
                 help="try meshes, rematerialisations and batch sizes; an interrupted search goes on")
  group = p.add_argument_group("the run to be paid for")
  group.add_argument("--statements", type=count, default=1_000_000, metavar="N")
  group.add_argument("--epochs", type=positive, default=5, metavar="X")
  group.add_argument("--price", type=amount, metavar="DOLLARS", help="per chip-hour; default: list prices")
  group.add_argument("--preemptions-per-day", type=amount, default=2.0, metavar="X",
                     help="of spot capacity, without notice: on a notice train saves, which loses less")
  group.add_argument("--save-seconds", type=amount, default=5.0, metavar="S",
                     help="for how long a save blocks the run")
  group.add_argument("--recovery-seconds", type=amount, default=300.0, metavar="S",
                     help="from the start of new machines to the first new step")


def plan(args) -> None:
  """Compiles the step of a config for a topology and reports what it needs."""
  from data_pipeline.records import DataError
  from data_pipeline.stages import write_json
  from lskd_jax.config_files import load_config
  from lskd_jax.plan import report, run, search, topology
  named = topology.parse(args.topology)
  config = load_config(args.config, args.overrides)
  if config.train.save_every < 1:  # before minutes of compiling
    raise DataError(f"train.save_every={config.train.save_every} must be at least 1")
  if args.search:
    trials = search.search(config, named, lambda overrides, label: run.measured(
        args.config, [*args.overrides, *overrides], named, True, label))
    found = {"status": report.COMPILED, "trials": search.as_json(trials)}
    text = search.text(trials, named)
  else:
    facts = run.measured(args.config, args.overrides, named, args.low_effort, str(named))
    wanted = report.Run(args.statements, args.epochs, args.price, args.preemptions_per_day,
                        args.save_seconds, args.recovery_seconds)
    found = report.plan(facts, named, wanted, config.train.save_every, config.train.save_minutes)
    text = report.text(found, named)
  if args.out:
    write_json(args.out, found)
  print(text)
