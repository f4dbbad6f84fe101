"""TensorBoard's files: scalars over steps, written when they come, so that a killed run loses none."""
from collections.abc import Mapping
import logging
import os
from pathlib import Path
import time

log = logging.getLogger(__name__)


class Board:
  """An event file in `folder`. A disk that cannot take it is one warning, and the end of the board.

  tensorboardX's own SummaryWriter writes from a thread, minutes later; one that has met a full disk makes
  its callers wait for ever.

  Args:
    folder: made when missing.
    step: TensorBoard hides what an earlier process wrote after this step.
  """

  def __init__(self, folder: Path, step: int):
    # Up to a second that a command without training need not wait for.
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog
    from tensorboardX.summary import scalar
    self._event, self._scalar = Event, scalar
    folder.mkdir(parents=True, exist_ok=True)
    # The name it makes has only the second: two quick starts would write into one file.
    self._file = EventsWriter(str(folder / "events"), filename_suffix=f".{os.getpid()}")
    self._write(Event(step=step + 1, session_log=SessionLog(status=SessionLog.START)))

  def add(self, step: int, values: Mapping[str, float]) -> None:
    """Puts the values of a step on disk."""
    for name, value in values.items():
      self._write(self._event(step=step, summary=self._scalar(name, value)))
    self._guarded(lambda: self._file.flush())

  def close(self) -> None:
    """Closes the file."""
    self._guarded(lambda: self._file.close())
    self._file = None

  def _write(self, event) -> None:
    event.wall_time = time.time()
    self._guarded(lambda: self._file.write_event(event))

  def _guarded(self, act) -> None:
    if self._file is None:
      return
    try:
      act()
    except OSError as error:
      log.warning("no more TensorBoard: %s", error)
      self._file = None
