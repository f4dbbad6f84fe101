"""Where every parameter lies: names, shapes, partition specs and bytes, as a table to read at the start."""
import math
from pathlib import Path
from typing import NamedTuple

import jax

from lskd_jax import parallel, trees

KINDS = {"params": "trainable", "frozen": "frozen", "opt": "optimizer"}


class Row(NamedTuple):
  """One array: a stack of equal blocks is one array, its first axis the blocks."""
  name: str
  shape: tuple[int, ...]
  dtype: str
  spec: str    # the mesh axes of each axis, "-" = whole
  bytes: int   # of one device
  kind: str    # one of KINDS' values


def rows(state: dict, mesh) -> list[Row]:
  """Every array of a training state (`params`, `frozen`, `opt`; others are left out), real or abstract."""
  found = []
  for part, kind in KINDS.items():
    for name, leaf in trees.named_leaves(state.get(part, {})).items():
      sharding = parallel.sharding_of(leaf, mesh)
      size = math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
      found.append(Row(name, tuple(leaf.shape), leaf.dtype.name, _spec(sharding.spec, leaf.ndim), size, kind))
  return found


def sharding_table(state: dict, mesh) -> str:
  """The parameters one per line, then totals; the optimizer's arrays are summed up only."""
  all_rows = rows(state, mesh)
  lines = [("name", "shape", "dtype", "spec", "bytes per device", "")]
  lines += [(row.name, _shape(row.shape), row.dtype, row.spec, f"{row.bytes:,}", row.kind)
            for row in all_rows if row.kind != "optimizer"]
  for kind, (count, values, size) in totals(all_rows).items():
    lines.append((f"all {count} arrays", f"{values:,}", "", "", f"{size:,}", kind))
  widths = [max(map(len, column)) for column in zip(*lines)]
  align = (str.ljust, str.rjust, str.ljust, str.ljust, str.rjust, str.ljust)
  text = "\n".join("  ".join(pad(cell, width) for pad, cell, width in zip(align, line, widths)).rstrip()
                   for line in lines)
  return f"mesh: {', '.join(f'{axis} {size}' for axis, size in mesh.shape.items())}\n{text}\n"


def totals(found: list[Row]) -> dict[str, tuple[int, int, int]]:
  """{kind: (arrays, values, bytes of one device)}."""
  sums = {}
  for row in found:
    count, values, size = sums.get(row.kind, (0, 0, 0))
    sums[row.kind] = count + 1, values + math.prod(row.shape), size + row.bytes
  return sums


def announce(state: dict, mesh, workdir, say) -> None:
  """Process 0 says the table and how large it all is, and keeps the table in `workdir/parameters.txt`."""
  if jax.process_index() > 0:
    return
  path, table = Path(workdir) / "parameters.txt", sharding_table(state, mesh)
  path.write_text(table)
  found = totals(rows(state, mesh))
  values = ", ".join(f"{count:,} {kind}" for kind, (_, count, _) in found.items() if kind != "optimizer")
  sizes = ", ".join(f"{kind} {size / 1e6:,.1f} MB" for kind, (_, _, size) in found.items())
  say(f"{table}\n{'parameters':18}{values}; also in {path}\n{'bytes per device':18}{sizes}")


def _shape(shape: tuple[int, ...]) -> str:
  return "x".join(map(str, shape)) or "scalar"


def _spec(spec, ndim: int) -> str:
  """P(None, ("slice", "data"), "tensor") of three axes -> "-, slice+data, tensor"; "whole" for none."""
  if not any(spec):
    return "whole"
  names = ["-" if axis is None else axis if isinstance(axis, str) else "+".join(axis) for axis in spec]
  return ", ".join(names + ["-"] * (ndim - len(names)))
