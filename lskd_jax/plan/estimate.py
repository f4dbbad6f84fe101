"""From what was compiled to times and dollars: floors, bounds, hours, and how often to save.

A floor is the time that one resource alone needs at its published peak. Nothing here was run.
"""
import math
from typing import NamedTuple

from lskd_jax.plan.chips import CHIPS, ici
from lskd_jax.plan.topology import Topology

DAY = 86400.0


class Speed(NamedTuple):
  """How fast a step can be.

  floors: seconds of each resource: compute, memory, ici, dcn. bound: the largest one's name.
  overlapped: seconds of a step in which everything overlaps, the largest floor. serial: in which nothing
  does, their sum. rate: statements/s of all chips when overlapped. mfu: model FLOPs over peak, when
  overlapped; mfu_serial: when not; mfu_compute: when compute were all that takes time.
  """
  floors: dict[str, float]
  bound: str
  overlapped: float
  serial: float
  rate: float
  mfu: float
  mfu_serial: float
  mfu_compute: float


def speed(facts: dict, topology: Topology) -> Speed | None:
  """Floors and bounds from what `measure` found; None for CPUs, and where nothing was compiled."""
  chip = CHIPS.get(topology.kind)
  if chip is None or facts["memory"] is None:
    return None
  network = lambda crosses: sum(row["network"] for row in facts["collectives"] if row["crosses"] == crosses)
  peak = chip.flops * topology.chips
  floors = {"compute": facts["flops"]["executed"] / peak, "memory": facts["traffic"] / chip.bandwidth,
            "ici": network(False) / ici(topology) if topology.slice_chips > 1 else 0.0,
            "dcn": network(True) / chip.dcn}
  bound = max(floors, key=floors.get)
  overlapped, serial = floors[bound], sum(floors.values())
  mfu = lambda seconds: facts["flops"]["model"] / (peak * seconds)
  return Speed(floors, bound, overlapped, serial, facts["statements"] / overlapped, mfu(overlapped),
               mfu(serial), mfu(floors["compute"]))


def memory_needed(facts: dict) -> float:
  """Bytes that a step needs on one device: arguments, temporaries, code, and outputs that are not
  arguments written over."""
  memory = facts["memory"]
  return (memory["arguments"] + memory["temporaries"] + memory["code"] + memory["outputs"]
          - memory["aliased"])


def fits(facts: dict, topology: Topology) -> bool:
  """Whether the step fits the memory of a chip; for CPUs always."""
  if facts["memory"] is None:
    return False
  return topology.kind not in CHIPS or memory_needed(facts) <= CHIPS[topology.kind].memory


def save_interval(save_seconds: float, mtbf: float) -> float:
  """Seconds between saves that lose the least: sqrt(2 C MTBF) (Young 1974, A first order approximation to
  the optimum checkpoint interval; Daly 2006 refines it for C near MTBF).

  Args:
    save_seconds: C, for how long a save blocks the run.
    mtbf: mean seconds between preemptions.
  """
  return math.sqrt(2 * save_seconds * mtbf)


class Cost(NamedTuple):
  """A whole run: steps, hours of wall time, chip-hours, dollars; None where it would never end.

  lost: share of the wall time that preemptions and saves take.
  """
  steps: int
  hours: float | None
  chip_hours: float | None
  dollars: float | None
  lost: float


def cost(step_seconds: float, steps: int, chips: int, price: float, *, preemptions: float,
         save_every: int, save_seconds: float, recovery: float) -> Cost:
  """What a run costs when it is preempted `preemptions` times a day.

  Each preemption comes without notice: it loses half of the interval between saves, on average, and
  `recovery` seconds from the new machines' start to the first new step. With work w, saves included, the
  wall time t solves t = w + t (preemptions / day) (interval / 2 + recovery).
  """
  work = steps * step_seconds + steps // save_every * save_seconds
  loss = save_every * step_seconds / 2 + recovery
  useful = 1 - preemptions / DAY * loss
  if useful <= 0:
    return Cost(steps, None, None, None, 1.0)
  seconds = work / useful
  hours = seconds / 3600
  return Cost(steps, hours, hours * chips, hours * chips * price, 1 - steps * step_seconds / seconds)
