"""Reading a compiled program (XLA's HLO text): how often each instruction runs, and what collectives move.

The text is the only full account of what a compiler made: its own `cost_analysis` counts the body of a
loop once, whatever its length. Devices are numbered as in the mesh, first axis slowest.
"""
from collections.abc import Iterator, Sequence
import math
import re
from typing import NamedTuple

import numpy as np

BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "bf16": 2, "c64": 8, "c128": 16, "token": 0, "opaque": 0}
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all",
               "collective-permute", "collective-broadcast")
SHARED_CHANNEL = "1"  # JAX gives it to every collective inside `jax.shard_map`


class Instruction(NamedTuple):
  """One line: `%name = type opcode(operands), attributes`."""
  name: str
  type: str
  opcode: str
  operands: tuple[str, ...]
  arguments: str  # the text between the parentheses
  attributes: str


class Program(NamedTuple):
  """Computations by name, each a list of instructions in order, the last of them its result."""
  computations: dict[str, list[Instruction]]
  entry: str


class Collective(NamedTuple):
  """One collective of a program.

  times: how often it runs in a step. result: bytes of its result on one device. group: how many devices
  take part. crosses: whether its devices are of more than one slice, so that it goes over DCN.
  """
  kind: str
  times: int
  result: float
  group: int
  crosses: bool

  @property
  def network(self) -> float:
    """Bytes that one device sends in a step, in a ring (Thakur et al. 2005, Optimization of collective
    communication operations in MPICH)."""
    share = (self.group - 1) / max(self.group, 1)
    factor = {"all-reduce": 2 * share, "reduce-scatter": self.group - 1, "collective-permute": 1,
              "collective-broadcast": 1}.get(self.kind, share)
    return self.times * self.result * factor


# --- text -> instructions --------------------------------------------------------------------------


def parse(text: str) -> Program:
  """The text of a compiled module, such as `compiled.as_text()`."""
  computations, entry, current = {}, "", None
  for line in text.splitlines():
    if current is None:
      head = re.match(r"(ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .*)?\{$", line)
      if head and not line.startswith("HloModule"):
        current = computations[head[2]] = []
        entry = head[2] if head[1] else entry
    elif line == "}":  # a kernel's settings take several lines, one of which starts with a bracket
      current = None
    else:
      instruction = _instruction(line)
      if instruction:
        current.append(instruction)
  if not entry:
    raise ValueError("this is no HLO module: it has no ENTRY computation")
  return Program(computations, entry)


def _instruction(line: str) -> Instruction | None:
  found = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = ", line)
  if not found:
    return None
  start = found.end()
  end = _closing(line, start) + 1 if line[start] == "(" else line.index(" ", start)
  opening = line.index("(", end)
  closing = _closing(line, opening)
  arguments = line[opening + 1:closing]
  return Instruction(found[1], line[start:end], line[end:opening].strip(),
                     tuple(re.findall(r"%([\w.\-]+)", arguments)), arguments, line[closing + 1:])


def _closing(line: str, start: int) -> int:
  """The index of the parenthesis that closes the one at `start`."""
  depth = 0
  for found in re.compile(r"[()]").finditer(line, start):
    depth += 1 if found[0] == "(" else -1
    if not depth:
      return found.start()
  raise ValueError(f"a line of HLO without its closing parenthesis: {line[:80]}")


def arrays(kind: str) -> Iterator[tuple[float, bool]]:
  """(bytes, whether in main memory) of each array of a type.

  A layout's S(1) is the chip's fast memory, other spaces are registers, flags or the host's memory.
  """
  for dtype, shape, layout in re.findall(r"\b([a-z]+[a-z0-9]*)\[([0-9,<=]*)\](\{[^}]*\})?", kind):
    size = math.prod(int(side.lstrip("<=")) for side in shape.split(",") if side)
    space = re.search(r"S\((\d+)\)", layout)
    yield size * _width(dtype), not (space and space[1] != "0")


def _width(dtype: str) -> float:
  if dtype in BYTES:
    return BYTES[dtype]
  bits = re.match(r"[a-z]+(\d+)", dtype)  # f32, s8, u32, f8e4m3fn
  return int(bits[1]) / 8 if bits else 0


# --- how often -------------------------------------------------------------------------------------


class Runs(NamedTuple):
  """Of each computation that is reached: how often it runs.

  fused: of those inside a fusion, the computation that it stands in, and the fusion.
  """
  times: dict[str, int]
  fused: dict[str, tuple[str, Instruction]]


def runs(program: Program) -> Runs:
  """How often each computation of a program runs: loop bodies as often as the loops around them turn.

  All branches of a conditional count, so this is an upper estimate where there are any.
  """
  times, fused = {}, {}

  def visit(name: str, count: int, inside: tuple[str, Instruction] | None) -> None:
    times[name] = times.get(name, 0) + count
    if inside:
      fused[name] = inside
    for instruction in program.computations.get(name, ()):
      for called, turns, hidden in _calls(program, name, instruction):
        around = inside[0] if inside else name
        visit(called, count * turns, (around, instruction) if inside or hidden else None)
  visit(program.entry, 1, None)
  return Runs(times, fused)


def _calls(program: Program, around: str, instruction: Instruction) -> Iterator[tuple[str, int, bool]]:
  """(computation, times, whether fused) for what an instruction of the computation `around` runs.

  The sums of reductions are left out.
  """
  attributes = instruction.attributes
  if instruction.opcode == "while":
    yield _named(attributes, "body"), trips(program, around, instruction), False
  elif instruction.opcode == "conditional":
    for listed in re.findall(r"branch_computations=\{([^}]*)\}", attributes):
      for name in re.findall(r"%?([\w.\-]+)", listed):
        yield name, 1, False
    for name in re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", attributes):
      yield name, 1, False
  elif instruction.opcode == "call":
    yield _named(attributes, "to_apply"), 1, False
  else:
    for name in re.findall(r"\bcalls=%?([\w.\-]+)", attributes):
      yield name, 1, True


def trips(program: Program, around: str, loop: Instruction) -> int:
  """How often a loop in the computation `around` turns: its known trip count, or the whole number that its
  condition compares with, less the one that it counts from, in steps of 1.

  Loops of a scan count from 0, and from 1 where the compiler took the first turn out. 1 where no number is
  found.
  """
  known = re.search(r'known_trip_count[^0-9]*(\d+)', loop.attributes)
  if known:
    return int(known[1])
  names, numbers = [_named(loop.attributes, "condition")], []
  start = _counts_from(program.computations.get(names[0], ()), program.computations[around], loop)
  while names:
    for instruction in program.computations.get(names.pop(), ()):
      if instruction.opcode == "constant" and re.match(r"[su]\d+\[\]", instruction.type):
        numbers.append(int(instruction.arguments))
      names += re.findall(r"\bcalls=%?([\w.\-]+)", instruction.attributes)
  return max(1, max(numbers, default=1) - start)


def _counts_from(condition: Sequence[Instruction], around: Sequence[Instruction], loop: Instruction) -> int:
  """What the counter that a loop's condition compares starts as; 0 where that is no constant."""
  named = {one.name: one for one in around}
  given = named.get(loop.operands[0])
  compared = [one for one in condition
              if one.opcode == "get-tuple-element" and one.name in condition[-1].operands]
  if not compared or given is None or given.opcode != "tuple":
    return 0
  start = named.get(given.operands[int(re.search(r"index=(\d+)", compared[0].attributes)[1])])
  while start is not None and start.opcode == "copy":
    start = named.get(start.operands[0])
  return int(start.arguments) if start is not None and start.opcode == "constant" else 0


def _named(attributes: str, key: str) -> str:
  return re.search(rf"\b{key}=%?([\w.\-]+)", attributes)[1]


# --- collectives -----------------------------------------------------------------------------------


def collectives(program: Program, slice_of: Sequence[int]) -> list[Collective]:
  """The collectives of a program, each once wherever it runs.

  Asynchronous ones stand in the text several times, once for each fusion that they run beside.

  Args:
    slice_of: the slice of each device, by its number.
  """
  found, reached = {}, runs(program)
  for name, times in reached.times.items():
    around, fusion = reached.fused.get(name, (name, None))
    for instruction in program.computations.get(name, ()):
      collective = _collective(instruction, times, slice_of)
      if collective is None:
        continue
      if collective.kind == "all-reduce" and fusion and "AllReduceScatterFusion" in fusion.attributes:
        # It keeps a part of each sum and sends no more than that needs, though what is in it says all-reduce.
        collective = collective._replace(kind="reduce-scatter", result=collective.result / collective.group)
      key = collective.kind, collective.crosses, around, _identity(instruction)
      if key not in found or collective.network > found[key].network:
        found[key] = collective
  return list(found.values())


def _identity(instruction: Instruction) -> str:
  """What the pieces of one collective in a computation share, and no other has."""
  attributes = instruction.attributes
  channel = re.search(r"channel_id=(\d+)", attributes)
  if channel and channel[1] != SHARED_CHANNEL:
    return channel[1]
  chain = re.search(r'(?:async_collective_name|chain_id)="[^"]*"', attributes)
  return chain[0] if chain else instruction.name


def _collective(instruction: Instruction, times: int, slice_of: Sequence[int]) -> Collective | None:
  kind, attributes = instruction.opcode.removesuffix("-start"), instruction.attributes
  if kind in COLLECTIVES:
    groups = device_groups(attributes, len(slice_of))
    crosses = any(len({slice_of[device] for device in group}) > 1 for group in groups)
    size = 2 if kind == "collective-permute" else max(map(len, groups))
    return Collective(kind, times, result(instruction), size, crosses)
  # Between slices, a TPU's compiler sends to and receives from the host, which does the rest over DCN.
  between = re.search(r'_xla_megascale_transfer_type="(\w+)"', attributes)
  if kind != "recv" or not between:
    return None
  received = sum(size for size, _ in arrays(elements(instruction.type)[0]))
  return Collective(between[1].lower().replace("_", "-"), times, received, max(slice_of) + 1, True)


def result(instruction: Instruction) -> float:
  """Bytes of a collective's result on one device."""
  kind = instruction.type
  if instruction.opcode in ("all-gather-start", "collective-permute-start", "ragged-all-to-all-start",
                            "all-to-all-start", "reduce-scatter-start"):
    kind = elements(kind)[1]  # (operand, result, flags)
  return sum(size for size, _ in arrays(kind))


def elements(kind: str) -> list[str]:
  """The types in a tuple type."""
  inner, depth, parts = kind[1:-1], 0, [""]
  for letter in inner:
    depth += (letter in "([{") - (letter in ")]}")
    if letter == "," and not depth:
      parts.append("")
    else:
      parts[-1] += letter
  return parts


def device_groups(attributes: str, devices: int) -> list[list[int]]:
  """The groups of devices that take part in a collective together: the four ways in which HLO writes them.

    source_target_pairs={{0,1},{1,0}}    replica_groups={{0,1},{2,3}}    replica_groups=[2,4]<=[4,2]T(1,0)
    replica_groups=mesh['a'=2,'b'=4] {'b'}
  """
  listed = re.search(r"(?:source_target_pairs|replica_groups)=\{(\{[\d,{} ]*\})\}", attributes)
  if listed:
    groups = re.findall(r"\{([\d, ]+)\}", listed[1])
    return [[int(device) for device in group.split(",")] for group in groups]
  iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes)
  if iota:
    shape, sides, order = ([int(n) for n in text.split(",")] if text else None for text in iota.groups())
    grid = np.arange(math.prod(sides)).reshape(sides)
    return (grid if order is None else grid.transpose(order)).reshape(shape).tolist()
  mesh = re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", attributes)
  if mesh:
    return _mesh_groups(dict(re.findall(r"'([^']+)'=(\d+)", mesh[1])), mesh[2])
  return [list(range(devices))]


def _mesh_groups(axes: dict[str, str], together: str) -> list[list[int]]:
  """Groups along named axes of a mesh, or along a part of one: 'a':(2)4 is a part of 4 behind one of 2."""
  sides, kept, grouped = [], [], []
  parts = {name: (int(before or 1), int(size or 0)) for name, before, size in
           re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", together)}
  for name, side in axes.items():
    side = int(side)
    before, size = parts.get(name, (side, 1))
    size = size or side
    for length, target in ((before, kept), (size, grouped), (side // (before * size), kept)):
      target.append(len(sides))
      sides.append(length)
  grid = np.arange(math.prod(sides)).reshape(sides).transpose(kept + grouped)
  return grid.reshape(-1, math.prod(sides[axis] for axis in grouped)).tolist()
