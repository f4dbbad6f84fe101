"""Compiles a train step for a topology, and says what came out as plain numbers."""
from collections.abc import Callable
import math
import re
import time

import jax

from data_pipeline.records import DataError
from lskd_jax import metrics, parallel, prepare
from lskd_jax.plan import hlo, traffic
from lskd_jax.plan.abstract import AbstractStep, abstract_step, one_device_mesh
from lskd_jax.plan.topology import Topology, devices

PLACES = 20  # lines of source that a plan names
LOW_EFFORT = {"exec_time_optimization_effort": -1.0}  # a third of the time; the same memory within 2 %


def measure(config, topology: Topology, low_effort: bool = False,
            progress: Callable[[str], None] = lambda stage: None) -> dict:
  """Traces, lowers and compiles the step of a config; nothing runs, no array is made.

  Args:
    low_effort: compile quicker, to code that moves more bytes.
    progress: called with the name of each stage as it begins.

  Returns (bytes are of one device, FLOPs of all devices together):
    mesh, chips, batch_size, statements: of a step.
    parameters: {trainable, frozen} numbers of values.
    bytes: {trainable, frozen, optimizer, batch}.
    memory: {arguments, temporaries, outputs, aliased, code}, or None where it did not fit.
    refused: what the compiler said if it did not fit, else "".
    flops: {model, executed}.
    collectives: [{kind, crosses, group, sites, times, result, network}], sums by the first three.
    traffic: coarse upper estimate of what a device moves through its main memory.
    places: {line of source: its part of that}, the largest first.
    notes, seconds, low_effort, compiler.

  Raises DataError, ValueError: one line.
  """
  start = time.monotonic()
  progress("describing the devices")
  mesh = parallel.make_mesh(**config.train.mesh, devices=devices(topology))
  if mesh.size != topology.chips:
    raise DataError(f"train.mesh uses {mesh.size} of the {topology.chips} devices of {topology}: add "
                    "--config.train.mesh.slice=-1 --config.train.mesh.fsdp=-1")
  prepare.check_config(config, mesh)
  progress("tracing the step")
  abstract = abstract_step(config, mesh)
  traced = abstract.trace()
  facts = {
      "task": config.task, "topology": str(topology), "chips": topology.chips, "mesh": dict(mesh.shape),
      "batch_size": config.data.batch_size, "statements": config.data.batch_size * config.data.statements,
      **sizes(abstract),
      "flops": {"model": model_flops(config), "executed": metrics.step_flops(traced)},
      "notes": list(abstract.notes), "low_effort": low_effort, "compiler": compiler(topology)}
  hosts = len({device.process_index for device in mesh.devices.flat})
  if config.data.cache_features and hosts > 1:
    facts["notes"].append("data.cache_features=True works in a run of one process, and this is one of "
                          f"{hosts} hosts: `lskd train` refuses it")
  progress("lowering the step")
  lowered = traced.lower()
  progress("compiling the step")
  try:
    compiled = lowered.compile(compiler_options=LOW_EFFORT if low_effort and topology.kind != "cpu" else None)
  except Exception as error:  # XLA raises JaxRuntimeError of all kinds
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    return facts | {"memory": None, "refused": refusal(str(error)), "collectives": [], "traffic": 0.0,
                    "places": {}, "seconds": time.monotonic() - start}
  progress("reading the compiled step")
  text = compiled.as_text()
  program = hlo.parse(text)
  slice_of = [getattr(device, "slice_index", 0) for device in mesh.devices.flat]
  return facts | {
      "memory": memory(compiled), "refused": "",
      "collectives": summed(hlo.collectives(program, slice_of)), **memory_traffic(program, text),
      "seconds": time.monotonic() - start}


def sizes(abstract: AbstractStep) -> dict:
  """Numbers of parameters, and bytes that one device holds of each argument of a step."""
  state, frozen, batch, _ = abstract.arguments
  trees = {"trainable": state["params"], "frozen": frozen, "optimizer": state["opt"], "batch": batch}
  count = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
  return {"parameters": {name: count(trees[name]) for name in ("trainable", "frozen")},
          "bytes": {name: sum(map(shard_bytes, jax.tree.leaves(tree))) for name, tree in trees.items()}}


def shard_bytes(leaf) -> int:
  """Bytes of one device's part of an array."""
  return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def model_flops(config) -> float:
  """FLOPs that a step needs, on all devices together, nothing recomputed and nothing padded."""
  return metrics.step_flops(abstract_step(prepare.undivided(config), one_device_mesh()).trace())


def memory(compiled) -> dict:
  """What the compiler reserves on one device, in bytes."""
  stats = compiled.memory_analysis()
  return {"arguments": stats.argument_size_in_bytes, "temporaries": stats.temp_size_in_bytes,
          "outputs": stats.output_size_in_bytes, "aliased": stats.alias_size_in_bytes,
          "code": stats.generated_code_size_in_bytes}


def refusal(message: str) -> str:
  """The sentence in which a compiler says how much memory a program would need."""
  found = re.search(r"Used .*? of .*? hbm[^\n]*", message)
  return found[0] if found else " ".join(message.split())[:200]


def summed(found: list[hlo.Collective]) -> list[dict]:
  """Collectives added up by kind, network and size of group, the largest first."""
  groups = {}
  for one in found:
    groups.setdefault((one.kind, one.crosses, one.group), []).append(one)
  rows = [dict(kind=kind, crosses=crosses, group=group, sites=len(ones), times=sum(one.times for one in ones),
               result=sum(one.times * one.result for one in ones), network=sum(one.network for one in ones))
          for (kind, crosses, group), ones in groups.items()]
  return sorted(rows, key=lambda row: -row["network"])


def memory_traffic(program: hlo.Program, text: str) -> dict:
  """{traffic, places} of `measure`."""
  frames, places, found = traffic.traffic(program), traffic.places(text), {}
  for frame, moved in frames.items():
    place = places.get(frame) or "elsewhere"
    found[place] = found.get(place, 0.0) + moved
  largest = sorted(found.items(), key=lambda item: -item[1])[:PLACES]
  return {"traffic": sum(frames.values()), "places": dict(largest)}


def compiler(topology: Topology) -> str:
  """Name and version of what compiles."""
  if topology.kind == "cpu":
    return f"jax {jax.__version__}, XLA for CPU"
  from importlib.metadata import version
  return f"jax {jax.__version__}, libtpu {version('libtpu')}"
