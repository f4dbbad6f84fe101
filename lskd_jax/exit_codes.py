"""What a process says by its exit code, and whether starting it again helps.

| code | meaning | again? |
|---|---|---|
| 0 | the work is done | no |
| 1, 2 | something in the input or the arguments has to be mended | no |
| 3 | the loss or its gradient was not finite several steps in a row | no |
| 4 | the disk is full, or a checkpoint could not be written; the last good one is kept | no |
| 42 | preempted, and a checkpoint of this very step is committed | yes |
| 43 | preempted before a save could finish; the last committed step counts | yes |
| 130 | interrupted by hand | no |
| 134, 137, 143 | ended by the system: abort, kill, terminate | yes, as a failure |
| 150 | stuck: no step for too long; all stacks were dumped | yes, as a failure |
| 151 | another process of the run was lost | yes, as a failure |

42 and everything from 128 up is what xpk and JobSet restart by default; 43 has to be named there.
"""
DONE = 0
INPUT = 1
ARGUMENTS = 2
NOT_FINITE = 3
CANNOT_SAVE = 4
PREEMPTED_SAVED = 42
PREEMPTED = 43
INTERRUPTED = 130
STUCK = 150
PEER_LOST = 151

PREEMPTIONS = (PREEMPTED_SAVED, PREEMPTED)  # restarted as often as it takes


def restarts(code: int) -> bool:
  """Whether a launcher is to start the run again after this code; negative codes are signals."""
  return code in PREEMPTIONS or code < 0 or (code > 127 and code != INTERRUPTED)
