"""`up --backend local`: the run of a launch config as processes of this machine."""
import shlex
import sys

from launch import config as configs
from lskd_jax.supervisor import Budgets, supervise


def rehearse(config, workdir: str | None = None) -> list[str]:
  """What would be run: a remark, and the command line of each process, less its number."""
  return [f"# {config.local.processes} processes with {config.local.devices} CPU devices each, restarted up "
          f"to {config.max_failures} times in a row", shlex.join(_words(config, workdir))]


def up(config, workdir: str | None = None) -> int:
  """Runs `config.local.processes` processes under the policy of the config; the run's exit code.

  workdir: instead of the command's, which usually lies where only TPU hosts have it.
  """
  budgets = Budgets(config.max_failures, config.max_preemptions, config.backoff)
  return supervise(_words(config, workdir), config.local.processes, workdir or configs.work_directory(config),
                   devices=config.local.devices, budgets=budgets, linger=config.linger,
                   environment={name: str(value) for name, value in config.environment.items()})


def _words(config, workdir: str | None) -> list[str]:
  words = configs.words(config)
  if words[0] == "lskd":  # of this Python, whether it is installed or not
    words = [sys.executable, "-m", "lskd_jax.cli", *(word for word in words[1:] if word != "--multi-host")]
  return words + (["--workdir", workdir] if workdir else [])  # the last one counts
