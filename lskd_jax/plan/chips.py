"""What is published about each chip: speeds, memory, network, and what an hour of it costs.

Sources
  peaks     `metrics.PEAK_FLOPS`: dense bfloat16, Cloud TPU documentation, "System architecture".
  memory    what XLA has to give away, from its "Used … of 15.75G hbm" messages on each kind; the rest of
            the 16, 32 or 96 GiB is reserved. Bandwidth: Cloud TPU documentation, pages v4, v5e, v5p, v6e.
  link      bytes/s of one ICI link in one direction, "How to Scale Your Model" (Austin et al. 2025),
            part 2, which lies a tenth below the documentation's (two-way bandwidth / 2 / links).
  dcn       Cloud TPU documentation: v5e 6.4 Tbit/s per pod of 256, v6e 25.6 Tbit/s, v5p 50 Gbit/s a chip.
            v4: assumed to be as v5p.
  prices    dollars per chip-hour in us-central1 (v4: us-central2), from skypilot-catalog's
            catalogs/v8/gcp/vms.csv at commit 006059e0 (2026); v4's list price was not looked up again.
            Spot prices change up to once a day: give --price.
"""
from typing import NamedTuple

from lskd_jax.metrics import PEAK_FLOPS
from lskd_jax.plan.topology import Topology

PRICES_OF = "us-central, list prices of 2026"


class Chip(NamedTuple):
  """Bytes, bytes/s, FLOP/s and dollars per hour of one chip; None where nothing is published."""
  flops: float
  memory: float
  bandwidth: float
  link: float
  dcn: float
  on_demand: float
  spot: float | None


GIB = 2**30
CHIPS = {
    "v4": Chip(PEAK_FLOPS["TPU v4"], 30.75 * GIB, 1228e9, 45e9, 6.25e9, 3.22, None),
    "v5e": Chip(PEAK_FLOPS["TPU v5e"], 15.75 * GIB, 819e9, 45e9, 3.125e9, 1.20, 0.245),
    "v5p": Chip(PEAK_FLOPS["TPU v5p"], 95.74 * GIB, 2765e9, 90e9, 6.25e9, 4.20, 0.836),
    "v6e": Chip(PEAK_FLOPS["TPU v6e"], 31.25 * GIB, 1640e9, 90e9, 12.5e9, 2.70, 0.544),
}


def ici(topology: Topology) -> float:
  """Bytes/s that the chip with the fewest links sends to its neighbours: a chip in a corner.

  An axis closes to a ring, and so has two links a chip, where its side is 16 (v5e, v6e) or a multiple of
  4 in a slice of whole 4x4x4 cubes (v4, v5p); else its end has one (Cloud TPU documentation, topologies).
  """
  if topology.kind in ("v5e", "v6e"):
    rings = [side == 16 for side in topology.shape]
  else:
    rings = [all(side % 4 == 0 for side in topology.shape)] * len(topology.shape)
  links = sum((2 if ring else 1) for side, ring in zip(topology.shape, rings) if side > 1)
  return links * CHIPS[topology.kind].link
