"""What an error says to a user, and the exit code it ends a command with."""
import errno
import os
import select
import sys
import traceback

from lskd_jax import exit_codes

OURS = ("data_pipeline", "lskd_jax", "configs")


def exit_code(error: BaseException) -> int:
  """The exit code a command ends with: the error's own `exit_code`, or what its kind means."""
  if isinstance(error, SystemExit):
    return error.code if isinstance(error.code, int) else exit_codes.DONE if error.code is None else 1
  if isinstance(error, KeyboardInterrupt):
    return exit_codes.INTERRUPTED
  return getattr(error, "exit_code", exit_codes.INPUT)


def say(text: str, patience: float | None = 1.0) -> None:
  """Prints a line to standard error. That nobody reads it, after a lost connection, changes nothing else.

  patience: seconds to wait where it is full and nobody reads; then the line is left out. None waits.
  """
  if not writable(sys.stderr, patience):
    return
  try:
    print(text, file=sys.stderr, flush=True)
  except OSError as error:
    if error.errno in (errno.EPIPE, errno.EIO):  # or Python tries again at its end, and exits with 120
      os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


def writable(stream, seconds: float | None) -> bool:
  """False if a write would wait: for a terminal stopped by Ctrl-S, or a full pipe that nobody reads.

  True is good for 4096 bytes: the room that Linux calls a pipe writable for.
  """
  try:
    return bool(select.select([], [stream], [], seconds)[1])
  except (OSError, ValueError, TypeError):  # not a file of the system
    return True


def report(error: BaseException) -> None:
  """Prints one line for what a user can mend, and a traceback where the program is wrong."""
  if isinstance(error, KeyboardInterrupt):
    say("lskd: interrupted; run the same command again: demo, corpus and train go on where they stopped",
        None)
  elif isinstance(error, (ValueError, OSError)) and is_about_input(error):
    say(f"lskd: error: {in_one_line(error)}", None)
  else:
    say("".join(traceback.format_exception(error)).rstrip(), None)


def is_about_input(error: BaseException) -> bool:
  """Whether an error says what a user can mend, rather than where the program is wrong.

  It is if our own code raised it, or the system about a file; a ValueError from inside a library is
  not, and keeps its traceback.
  """
  if isinstance(error, OSError):
    return error.filename is not None or is_full_disk(error)
  if type(error).__module__.split(".")[0] in OURS:
    return True
  trace = error.__traceback__
  while trace.tb_next is not None:
    trace = trace.tb_next
  return trace.tb_frame.f_globals.get("__name__", "").split(".")[0] in OURS


def is_full_disk(error: BaseException) -> bool:
  """Whether an error, or the one it was raised from, says that a disk or a quota is full."""
  full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
  return full or error.__cause__ is not None and is_full_disk(error.__cause__)


def in_one_line(error: BaseException) -> str:
  """The message without line breaks; for the system's errors, the file and what it refused."""
  if isinstance(error, OSError):
    where = f"{error.filename}: " if error.filename else ""
    full = "the disk is full; free some space and run again"
    return f"{where}{full if is_full_disk(error) else error.strerror or type(error).__name__}"
  return " ".join(str(error).split()) or type(error).__name__
