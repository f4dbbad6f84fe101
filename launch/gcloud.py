"""Every command the launcher runs, spelled out: functions from a config to words, and nothing else.

Syntax: the reference of `gcloud compute tpus queued-resources`, `tpu-vm ssh` and `gcloud storage`. Only
`gcloud alpha` knows --autocheckpoint-enabled and --provisioning-model.
"""
from pathlib import Path
import shlex
from typing import NamedTuple

from launch import config as configs
from launch.accelerators import accelerator

NOT_FOUND = r"NOT_FOUND|was not found"
NOTHING_THERE = r"matched no objects|Did not find existing container"
MINUTE = 60.0


class Command(NamedTuple):
  """A command to run.

  timeout: seconds. tries: before it counts as failed. accept: a pattern; a failure that prints it means
  that there is nothing, or nothing left to do. optional: a failure is told and forgotten.
  """
  words: tuple[str, ...]
  timeout: float = 2 * MINUTE
  tries: int = 4
  accept: str = ""
  optional: bool = False

  def __str__(self) -> str:
    return shlex.join(self.words)


# ---- queued resources ----


def create(config) -> Command:
  """Asks for the machines; returns while they are still being waited for."""
  kind = accelerator(config.accelerator_type)
  flex = config.provisioning == "flex-start"
  autocheckpoint = config.autocheckpoint and kind.family.autocheckpoint
  words = ["gcloud", *(["alpha"] if flex or autocheckpoint else []), "compute", "tpus", "queued-resources",
           "create", config.name]
  words += ([f"--node-count={config.nodes}", f"--node-prefix={config.name}"] if config.nodes > 1
            else [f"--node-id={config.name}"])
  words += [f"--accelerator-type={config.accelerator_type}",
            f"--runtime-version={config.runtime_version or kind.family.runtime}",
            f"--valid-until-duration={_seconds(config.wait_hours)}"]
  if flex:
    words += ["--provisioning-model=flex-start", f"--max-run-duration={_seconds(config.budget_hours)}"]
  elif config.provisioning in ("spot", "reserved"):
    words.append(f"--{config.provisioning}")
  if autocheckpoint:
    words.append("--autocheckpoint-enabled")
    if config.provisioning == "spot":  # without it SDK 528's `gcloud alpha` asks for the STANDARD model
      words.append("--provisioning-model=spot")
  # A try that was cut off may have succeeded.
  return Command((*words, "--async", "--quiet", *_where(config)), tries=1, accept="ALREADY_EXISTS")


def describe(config) -> Command:
  """Prints the state, such as ACTIVE; nothing if there is no such request."""
  return Command(("gcloud", "compute", "tpus", "queued-resources", "describe", config.name,
                  "--format=value(state.state)", *_where(config)), accept=NOT_FOUND)


def refusal(config) -> Command:
  """Prints why a request FAILED (QueuedResourceState in the TPU API's reference)."""
  return Command(("gcloud", "compute", "tpus", "queued-resources", "describe", config.name,
                  "--format=value(state.failedData.error.message)", *_where(config)), optional=True)


def delete(config) -> Command:
  """Deletes the request and its machines, in whatever state they are."""
  return Command(("gcloud", "compute", "tpus", "queued-resources", "delete", config.name, "--force",
                  "--quiet", *_where(config)), timeout=30 * MINUTE, accept=NOT_FOUND)


# ---- the bucket ----


def ship(config, code: str) -> list[Command]:
  """Packs the checkout's HEAD and copies it with its environment to the bucket.

  The folder holds requirements.lock and setup.sh already.
  """
  folder = Path(config.state).absolute() / config.name / code
  files = [folder / "code.tar.gz", folder / "requirements.lock", folder / "setup.sh"]
  return [Command(("git", "-C", config.source, "archive", "--format=tar.gz",
                   f"--output={files[0]}", "HEAD"), tries=1),
          Command(("gcloud", "storage", "cp", *map(str, files), f"{configs.in_bucket(config)}/code/{code}/"),
                  timeout=10 * MINUTE)]


def exits(config, run: str) -> Command:
  """Prints the exit file of each host that has ended in the start with that folder, a line each."""
  return Command(("gcloud", "storage", "cat", f"{configs.in_bucket(config)}/{run}/exit-*"),
                 accept=NOTHING_THERE)


def written(config, run: str) -> Command:
  """Lists the logs and exit files of the start with that folder, with the times of their last writing."""
  return Command(("gcloud", "storage", "ls", "--long", f"{configs.in_bucket(config)}/{run}/*"),
                 accept=NOTHING_THERE)


def markers(config) -> Command:
  """Prints the COMMITTED markers of the run's checkpoints."""
  workdir = configs.in_bucket(config, configs.work_directory(config))
  return Command(("gcloud", "storage", "ls", f"{workdir}/checkpoints/*/COMMITTED.json"), accept=NOTHING_THERE)


def logs(config, folder: Path) -> Command:
  """Copies what the hosts have written so far: logs and exit files of every start."""
  return Command(("gcloud", "storage", "rsync", "--recursive", f"{configs.in_bucket(config)}/run",
                  str(folder)), timeout=10 * MINUTE, accept=NOTHING_THERE)


# ---- the hosts ----


def setup(config, code: str) -> list[Command]:
  """Mounts the bucket and installs that version of the code on all hosts; what is there already stays."""
  url = f"{configs.in_bucket(config)}/code/{code}"
  script = (f"gcloud storage cp {url}/setup.sh lskd-setup.sh && bash lskd-setup.sh "
            + shlex.join([url, code, config.bucket.removeprefix("gs://"), config.mount,
                          configs.python_version(config), config.uv]))
  return [_ssh(config, node, script, timeout=20 * MINUTE) for node in nodes(config)]


def preflight(config, code: str) -> list[Command]:
  """Checks all hosts, after it has removed what an earlier run left."""
  kind = accelerator(config.accelerator_type)
  words = ["--folder", _folder(config), "--chips", kind.chips_per_host, "--hosts", kind.hosts,
           "--slices", config.nodes, "--disk-gb", config.disk_gb, "--mount", config.mount]
  return [_ssh(config, node, _python(code, "launch.preflight", *words), tries=2) for node in nodes(config)]


def start(config, code: str, run: str) -> list[Command]:
  """Starts the command on all hosts, detached from this connection. run: folder for logs and exit codes."""
  variables = [f"{name}={value}" for name, value in config.environment.items()]
  command = [*(["env", *variables] if variables else []), *configs.words(config)]
  run = f"{config.mount}/launch/{config.name}/{run}"
  return [_ssh(config, node, _python(code, "launch.host", "start", "--folder", _folder(config), "--run", run,
                                     "--slice", i, "--", *command))
          for i, node in enumerate(nodes(config))]


def ask(config, code: str) -> list[Command]:
  """Each host prints RUNS or IDLE: whether the command is there."""
  return [_ssh(config, node, _python(code, "launch.host", "ask", "--folder", _folder(config)),
               tries=1)._replace(optional=True) for node in nodes(config)]


def stop(config, code: str) -> list[Command]:
  """Lets the command save and end on all hosts; kills it after the grace."""
  return [_ssh(config, node, _python(code, "launch.host", "stop", "--folder", _folder(config),
                                     "--grace", config.grace_seconds),
               timeout=config.grace_seconds + 2 * MINUTE, tries=1)._replace(optional=True)
          for node in nodes(config)]


def nodes(config) -> list[str]:
  """Names of the slices: gcloud numbers them if there are several."""
  if config.nodes == 1:
    return [config.name]
  return [f"{config.name}-{i}" for i in range(config.nodes)]


def _ssh(config, node: str, script: str, timeout: float = 5 * MINUTE, tries: int = 4) -> Command:
  return Command(("gcloud", "compute", "tpus", "tpu-vm", "ssh", node, "--worker=all", f"--command={script}",
                  "--quiet", *_where(config)), timeout=timeout, tries=tries)


def _python(code: str, module: str, *words) -> str:
  return shlex.join([f"lskd/{code}/venv/bin/python", "-m", module, *map(str, words)])


def _folder(config) -> str:
  return f"lskd/{config.name}"


def _where(config) -> tuple[str, str]:
  return f"--project={config.project}", f"--zone={config.zone}"


def _seconds(hours: float) -> str:
  return f"{round(hours * 3600)}s"
