"""TPU types by the names that gcloud gives them: chips, hosts, runtimes, and what Kubernetes calls them.

Sources: Google's pages on TPU versions, runtime versions and TPUs in GKE, read in 2026.
"""
from typing import NamedTuple

from data_pipeline.records import DataError


class Family(NamedTuple):
  """per_chip: what the number in a type's name counts for each chip (TensorCores before v5e and in v5p).
  whole: chips of the largest slice that is a single host; larger ones have four to a host.
  """
  runtime: str
  per_chip: int
  whole: int
  gke: str
  dimensions: int
  autocheckpoint: bool = False


FAMILIES = {
    "v2": Family("tpu-ubuntu2204-base", 2, 4, "", 2, True),
    "v3": Family("tpu-ubuntu2204-base", 2, 4, "", 2, True),
    "v4": Family("tpu-ubuntu2204-base", 2, 4, "tpu-v4-podslice", 3, True),
    "v5litepod": Family("v2-alpha-tpuv5-lite", 1, 8, "tpu-v5-lite-podslice", 2, True),
    "v5p": Family("v2-alpha-tpuv5", 2, 4, "tpu-v5p-slice", 3),
    "v6e": Family("v2-alpha-tpuv6e", 1, 8, "tpu-v6e-slice", 2),
    "tpu7x": Family("", 2, 4, "tpu7x", 3),
}

TOPOLOGIES = {
    2: {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"},
    3: {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8",
        512: "8x8x8", 1024: "8x8x16"},
}


class Accelerator(NamedTuple):
  """One slice: its family, chips in all and on each host, hosts."""
  family: Family
  chips: int
  chips_per_host: int
  hosts: int


def accelerator(name: str) -> Accelerator:
  """What a type such as "v5litepod-16" is. DataError for one that is not known."""
  family, dash, count = name.rpartition("-")
  if family not in FAMILIES or not count.isdecimal() or int(count) < 1:
    raise DataError(f"accelerator_type={name!r} is not known; write {', '.join(FAMILIES)} and a number, "
                    "such as v5litepod-16")
  about = FAMILIES[family]
  chips, rest = divmod(int(count), about.per_chip)
  per_host = chips if chips <= about.whole else 4
  if rest or not chips or chips % per_host:
    raise DataError(f"accelerator_type={name!r}: there is no slice of that size")
  return Accelerator(about, chips, per_host, chips // per_host)


def topology(kind: Accelerator) -> str:
  """The usual shape of a slice, "4x4". DataError where there is none of its size."""
  known = TOPOLOGIES[kind.family.dimensions]
  if kind.chips not in known:
    raise DataError(f"{kind.chips} chips have no usual topology: set topology, such as 4x4x12")
  return known[kind.chips]
