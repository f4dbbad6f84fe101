"""Runs commands: with a timeout, again when they fail for a reason that may pass, and on the record."""
from collections.abc import Callable
from pathlib import Path
import re
import subprocess
import time
from typing import NamedTuple

from launch.gcloud import Command

# What trying again does not change: the request itself, or who asks.
PERMANENT = re.compile(r"PERMISSION_DENIED|INVALID_ARGUMENT|UNAUTHENTICATED|unrecognized arguments|"
                       r"Invalid choice|Reauthentication|invalid_grant|invalid_rapt|"
                       r"You do not currently have an active account")
OF_SSH = "ERROR: (gcloud.compute.tpus.tpu-vm.ssh)"  # begins what ssh says itself; the rest is of a host
FIRST_PAUSE = 5.0  # seconds before the second try; doubles


class Clock(NamedTuple):
  """Unix seconds, and waiting; tests have their own."""
  now: Callable[[], float] = time.time
  sleep: Callable[[float], None] = time.sleep


class CommandFailed(Exception):
  """A command failed as often as it may be tried."""


class Refused(Exception):
  """A command that can never work as it is: one line for the user."""


def executor(transcript: Path, clock: Clock, say: Callable[[str], None]) -> Callable[[Command], str]:
  """A function that runs a command and returns what it printed.

  transcript: gets a line for each try, and all that a failing one wrote. Its function raises CommandFailed,
  or Refused.
  """
  def run(command: Command) -> str:
    for number in range(command.tries):
      if number:
        clock.sleep(FIRST_PAUSE * 2 ** (number - 1))
      code, out, wrote = _once(command)
      error = "" if code == 0 else _reason(code, wrote)
      stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(clock.now()))
      with transcript.open("a") as log:
        log.write(f"{stamp} [{code}] {command}\n")
        log.writelines(f"  {line}\n" for line in wrote.splitlines() if code and line.strip())
      if code == 0:
        return out
      if command.accept and re.search(command.accept, error):
        return ""
      own = "ssh" not in command.words or error.startswith(OF_SSH)
      if own and not command.optional and PERMANENT.search(error):
        raise Refused(f"{error} (in: {command})")
      say(f"failed, try {number + 1} of {command.tries}: {error}")
    if command.optional:
      return ""
    raise CommandFailed(error)
  return run


def _once(command: Command) -> tuple[int, str, str]:
  """Exit code (124: the time was up), output, and what a failing command wrote about it."""
  try:
    done = subprocess.run(command.words, capture_output=True, text=True, errors="replace",
                          stdin=subprocess.DEVNULL, timeout=command.timeout, check=False)
  except subprocess.TimeoutExpired:
    return 124, "", f"no answer within {command.timeout:g} s"
  except FileNotFoundError:
    raise Refused(f"{command.words[0]} is not installed on this machine") from None
  return done.returncode, done.stdout, done.stderr or done.stdout


def _reason(code: int, wrote: str) -> str:
  """The line that tells why. gcloud's own, that a worker failed, comes after what that worker wrote."""
  lines = [line.strip() for line in wrote.splitlines() if line.strip() and not line.startswith("#####")]
  errors = [line for line in lines if line.startswith("ERROR")]
  return (errors or lines or [f"exit code {code}"])[-1]
