"""How much a compiled program moves through the memory of a chip, and which lines of source are why."""
from collections.abc import Sequence
import re

from lskd_jax.plan.hlo import COLLECTIVES, Instruction, Program, arrays, elements, result, runs

# What these name or contain is counted where it is made, or moves nothing.
NO_TRAFFIC = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional",
              "call", "after-all", "partition-id", "replica-id", "opt-barrier"}

HEADERS = ("FileNames", "FunctionNames", "FileLocations", "StackFrames")  # of a module's text


def traffic(program: Program) -> dict[int, float]:
  """Bytes that one device reads from and writes to its main memory in a step: a coarse upper estimate.

  Returns {stack frame: bytes}; `places` says where in the source a frame is.

  Operands and results of every instruction that is not inside a fusion and not in fast memory. Of an
  array that a fusion only slices, or writes a slice of, the slice counts: loops carry whole stacks.
  """
  reached, total = runs(program), {}
  for name, times in reached.times.items():
    if name in reached.fused:
      continue
    types = {instruction.name: instruction.type for instruction in program.computations[name]}
    for one in program.computations[name]:
      moved = times * _moved(program, types, one)
      if moved:
        frame = re.search(r"stack_frame_id=(\d+)", one.attributes)
        frame = int(frame[1]) if frame else 0
        total[frame] = total.get(frame, 0.0) + moved
  return total


def places(text: str, ours: str = "lskd_jax/", passed: Sequence[str] = ("layers.py", "attention.py")) -> dict:
  """{stack frame: "models/vit.py:74 Block.__call__"}: the innermost line of ours, from a module's header.

  Args:
    ours: files with this in their name; frames without one get none. passed: files to look beyond.
  """
  tables, current = {name: {} for name in HEADERS}, None
  for line in text.splitlines():
    entry = re.match(r"(\d+) (.*)", line)
    if line in HEADERS:
      current = tables[line]
    elif entry and current is not None:
      current[int(entry[1])] = entry[2]
    elif line.startswith(("ENTRY", "%")):
      break
  files, functions, locations, frames = tables.values()
  number = lambda text, name: int(re.search(rf"{name}=(\d+)", text)[1])

  def place(frame: int) -> str | None:
    while frame in frames:
      where = locations[number(frames[frame], "file_location_id")]
      file = files[number(where, "file_name_id")].strip('"')
      if ours in file and not file.endswith(tuple(passed)):
        function = functions[number(where, "function_name_id")].strip('"')
        return f"{file.rpartition(ours)[2]}:{number(where, 'line')} {function.replace('<locals>.', '')}"
      frame = number(frames[frame], "parent_frame_id") - 1  # which counts from 1, so that 1 is none
    return None
  return {frame: place(frame) for frame in frames}


def _moved(program: Program, types: dict[str, str], instruction: Instruction) -> float:
  opcode = instruction.opcode
  if opcode in NO_TRAFFIC or opcode.endswith(("-done", "-update")):
    return 0
  if opcode == "dynamic-slice":
    return 2 * main_memory(instruction.type)
  if opcode == "dynamic-update-slice":
    return 2 * main_memory(types.get(instruction.operands[1], ""))
  if opcode in ("copy-start", "slice-start"):  # (to, from, flag)
    to = main_memory(elements(instruction.type)[0])
    return to + (main_memory(types.get(instruction.operands[0], "")) if opcode == "copy-start" else to)
  if opcode.endswith("-start") and opcode.removesuffix("-start") in COLLECTIVES:
    return 2 * result(instruction)
  read = [main_memory(types.get(operand, "")) for operand in instruction.operands]
  written = main_memory(instruction.type)
  called = re.search(r"\bcalls=%?([\w.\-]+)", instruction.attributes)
  if called:
    read, written = _through_slices(program, called[1], read, written)
  return sum(read) + written


def _through_slices(program: Program, fusion: str, read: list[float], written: float):
  """What a fusion reads of each operand and writes, where it takes or replaces slices only."""
  body = program.computations.get(fusion, [])
  types = {instruction.name: instruction.type for instruction in body}
  read = list(read)
  for parameter in (one for one in body if one.opcode == "parameter"):
    index, uses = int(parameter.arguments), [one for one in body if parameter.name in one.operands]
    if index >= len(read) or not uses:
      continue
    sliced = [one for one in uses if one.opcode == "dynamic-slice"]
    updated = [one for one in uses
               if one.opcode == "dynamic-update-slice" and one.operands[0] == parameter.name]
    if len(sliced) + len(updated) == len(uses):
      part = sum(main_memory(one.type) for one in sliced)
      read[index] = min(read[index], part)
      for one in updated:
        whole, slice_ = main_memory(parameter.type), main_memory(types.get(one.operands[1], ""))
        written = max(slice_, written - whole + slice_)
  return read, written


def main_memory(kind: str) -> float:
  """Bytes of a type in main memory."""
  return sum(size for size, inside in arrays(kind) if inside)
