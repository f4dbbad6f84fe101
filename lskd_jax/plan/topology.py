"""Named topologies: how many chips of which kind, and their devices on a machine that has none of them.

A TPU's compiler comes as a Python package, libtpu, and needs no TPU. It reads its environment once, when
it is loaded, so `environment` has to be set before JAX starts: see worker.py.
"""
from collections.abc import Mapping
import math
import re
from typing import NamedTuple

from data_pipeline.records import DataError

WAY_OUT = "pip install -e '.[tpu]'"
KINDS = ("v4", "v5e", "v5p", "v6e", "cpu")


class Topology(NamedTuple):
  """`slices` pods of `shape` chips of one kind; slices are joined by the data centre's network (DCN)."""
  kind: str
  shape: tuple[int, ...]
  slices: int = 1

  @property
  def slice_chips(self) -> int:
    return math.prod(self.shape)

  @property
  def chips(self) -> int:
    return self.slices * self.slice_chips

  @property
  def name(self) -> str:
    """As libtpu names one slice, such as "v5e:4x4"."""
    return f"{self.kind}:{'x'.join(map(str, self.shape))}"

  def __str__(self) -> str:
    return f"{self.slices}x {self.name}" if self.slices > 1 else self.name


def parse(text: str) -> Topology:
  """"v5e:4x4", "2x v5e:16x16" (two slices) or "cpu:8" -> Topology. DataError for anything else."""
  found = re.fullmatch(r"(?:(\d+)x\s*)?([a-z0-9]+):(\d+(?:x\d+)*)", text.strip().lower())
  if found and found[2] in ("tpu7x", "v7x", "v7"):
    raise DataError(f"--topology {text}: TPU7x has two devices a chip and peaks that nobody has checked "
                    f"this plan against; choose {', '.join(KINDS)}")
  if not found or found[2] not in KINDS:
    raise DataError(f"--topology {text}: is no KIND:SHAPE of {', '.join(KINDS)}, such as v5e:4x4, "
                    "v5p:4x4x4, '2x v5e:16x16' or cpu:8")
  topology = Topology(found[2], tuple(map(int, found[3].split("x"))), int(found[1] or 1))
  if not topology.chips:
    raise DataError(f"--topology {text}: has no chips")
  return topology


def environment(topology: Topology) -> Mapping[str, str]:
  """Environment variables for a process that compiles for a topology and runs nothing on it."""
  if topology.kind == "cpu":
    return {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(topology.chips)}
  # v4 and v5p are named by their cores, of which a chip has two.
  number = topology.slice_chips * (2 if topology.kind in ("v4", "v5p") else 1)
  kind = {"v5e": "v5litepod"}.get(topology.kind, topology.kind)
  return {
      "JAX_PLATFORMS": "cpu",
      "TPU_SKIP_MDS_QUERY": "1",  # there is no metadata server to ask
      "TPU_WORKER_HOSTNAMES": "localhost",
      "TPU_ACCELERATOR_TYPE": f"{kind}-{number}",
      "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # several plans at a time, or beside a run
      "TPU_MIN_LOG_LEVEL": "3",
      # Its default of 64 KiB is too little for the cost model of nested fusions: the compiler crashes.
      "LIBTPU_INIT_ARGS": "--fibers_default_thread_stack_size=8388608",
  }


def devices(topology: Topology) -> list:
  """The devices, slice after slice; call it in a process with `environment(topology)`.

  Raises DataError: libtpu is not there, or knows no such shape.
  """
  import jax
  from jax.experimental import topologies
  if topology.kind == "cpu":
    return jax.devices("cpu")[:topology.chips]
  try:
    import libtpu  # noqa: F401  only whether it is there
  except ImportError:
    raise DataError(f"--topology {topology} needs the TPU's compiler, libtpu: {WAY_OUT}; or plan with "
                    f"less detail for --topology cpu:{topology.chips}") from None
  options = {"num_slices": topology.slices} if topology.slices > 1 else {}
  if topology.kind == "v4":
    options["chip_config_name"] = "megacore"  # one device a chip, as on the machines
  if topology.slice_chips == 1:
    options["chips_per_host_bounds"] = [1, 1, 1]
  try:
    found = topologies.get_topology_desc(platform="tpu", topology_name=topology.name, **options).devices
  except Exception as error:  # libtpu raises JaxRuntimeError of all kinds
    reason = " ".join(str(error).split()).rpartition("INVALID_ARGUMENT: ")[2]
    raise DataError(f"--topology {topology}: libtpu refuses it ({reason[:200]}); see the shapes in the "
                    "Cloud TPU documentation of this chip") from None
  if len(found) != topology.chips:
    raise DataError(f"--topology {topology}: libtpu makes {len(found)} devices of {topology.chips} chips; "
                    "give the shape with all its sides, such as v4:2x2x1")
  return list(found)
