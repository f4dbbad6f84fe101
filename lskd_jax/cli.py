"""The `lskd` command: `lskd VERB --help` tells each verb's arguments, with an example.

Exit code 0 when the work is done, 1 when something in the input has to be mended (one line says
what), 2 for arguments that cannot be read, 130 when interrupted; `exit_codes.py` has the others.
"""
import argparse
import os
import sys

import lskd_jax
from lskd_jax import errors
from lskd_jax.commands import corpus, models, planning, training


def main(argv: list[str] | None = None) -> int:
  """Runs one command and returns its exit code; errors in the arguments exit with 2."""
  args = read_arguments(sys.argv[1:] if argv is None else argv)
  try:
    args.run(args)
  except KeyboardInterrupt as error:
    errors.report(error)
    return errors.exit_code(error)
  except BrokenPipeError:  # the reader of a pipe has seen enough: `lskd score … | head -1`
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1
  except (ValueError, OSError) as error:
    if not errors.is_about_input(error):
      raise
    errors.report(error)
    return errors.exit_code(error)
  return 0


def read_arguments(argv: list[str]) -> argparse.Namespace:
  """The parsed command line; `run` is the function of its verb."""
  parser = argparse.ArgumentParser(
      prog="lskd", allow_abbrev=False, description="Localized symbolic knowledge distillation: "
      "from pictures to a vision-language model that can be pointed at.",
      epilog="start with: lskd demo --quick")
  parser.add_argument("--version", action="version", version=f"lskd {lskd_jax.__version__}")
  verbs = parser.add_subparsers(metavar="VERB", required=True)
  models.add_demo(verbs)
  corpus.add_verbs(verbs)
  training.add_verbs(verbs)
  planning.add_verbs(verbs)
  models.add_verbs(verbs)
  args, rest = parser.parse_known_args(argv)
  args.argv, args.overrides = argv, []
  for argument in rest:
    if not (argument.startswith("--config.") and args.run in (training.train, planning.plan)):
      args.parser.error(f"unrecognized argument: {argument}")
    args.overrides.append(argument.removeprefix("--config."))
  return args


if __name__ == "__main__":
  sys.exit(main())
