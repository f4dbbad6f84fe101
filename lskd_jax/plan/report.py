"""A plan as numbers, and as text for a terminal. Both say that the step was compiled and never run."""
import dataclasses
import math

from lskd_jax.plan import estimate
from lskd_jax.plan.chips import CHIPS, PRICES_OF
from lskd_jax.plan.topology import Topology

COMPILED = "compiled, not run"
GB = 1e9


@dataclasses.dataclass(frozen=True)
class Run:
  """The run to be paid for.

  price: dollars per chip-hour; None = the list prices. preemptions: a day, of spot capacity, each without
  notice. save_seconds: how long a save blocks the run; recovery: seconds from new machines' start to the
  first new step.
  """
  statements: int = 1_000_000
  epochs: float = 5
  price: float | None = None
  preemptions: float = 2.0
  save_seconds: float = 5.0
  recovery: float = 300.0


def plan(facts: dict, topology: Topology, run: Run, save_every: int, save_minutes: float = 0.0) -> dict:
  """Everything about a step and its run, for JSON: `facts`, and what follows from them.

  Args:
    save_every, save_minutes: of `train`; the shorter interval counts, 0 minutes are none.
  """
  speed = estimate.speed(facts, topology)
  found = {"status": COMPILED, **facts, "fits": estimate.fits(facts, topology)}
  if topology.kind in CHIPS:
    found["memory_of_chip"] = CHIPS[topology.kind].memory
  if facts["memory"]:
    found["needed"] = estimate.memory_needed(facts)
  if speed is None:
    return found
  steps = math.ceil(run.statements * run.epochs / facts["statements"])
  between = math.ceil(60 * save_minutes / speed.overlapped) if save_minutes > 0 else save_every
  wanted = dataclasses.asdict(run) | {"save_every": save_every, "save_minutes": save_minutes}
  return found | {"speed": speed._asdict(), "run": wanted,
                  "costs": costs(speed.overlapped, steps, topology, run, min(save_every, between)),
                  "save_interval": interval(speed.overlapped, run)}


def costs(step_seconds: float, steps: int, topology: Topology, run: Run, save_every: int) -> dict:
  """{how it is paid for: Cost as a dict with its price and preemptions a day}."""
  chip = CHIPS[topology.kind]
  ways = {"on demand": (chip.on_demand, 0.0), "spot": (chip.spot, run.preemptions)}
  if run.price is not None:
    ways = {"at the given price": (run.price, run.preemptions)}
  return {way: estimate.cost(step_seconds, steps, topology.chips, price, preemptions=preemptions,
                             save_every=save_every, save_seconds=run.save_seconds, recovery=run.recovery
                             )._asdict() | {"price": price, "preemptions": preemptions}
          for way, (price, preemptions) in ways.items() if price is not None}


def interval(step_seconds: float, run: Run) -> dict | None:
  """The best interval between saves, {seconds, steps}; None without preemptions."""
  if not run.preemptions:
    return None
  seconds = estimate.save_interval(run.save_seconds, estimate.DAY / run.preemptions)
  return {"seconds": seconds, "steps": max(1, round(seconds / step_seconds))}


# --- text ------------------------------------------------------------------------------------------


def text(found: dict, topology: Topology) -> str:
  """A plan for a terminal."""
  lines = [f"plan for {topology}: {COMPILED}"]
  lines += [f"note       {note}" for note in found["notes"]]
  effort = ", at low effort (it moves more bytes than the default would)" if found["low_effort"] else ""
  lines += [f"compiler   {found['compiler']}, {clock(found['seconds'])}{effort}",
            f"mesh       {', '.join(f'{axis} {side}' for axis, side in sorted(found['mesh'].items()))}",
            f"step       {found['batch_size']} images, {found['statements']} statements; "
            f"{found['batch_size'] / found['chips']:g} images a device"]
  lines += [*_memory(found), *_flops(found), *_collectives(found), *_speed(found, topology)]
  return "\n".join([*lines, *_costs(found)])


def _memory(found: dict) -> list[str]:
  table = {f"{name} parameters": found["bytes"][name] for name in ("trainable", "frozen")}
  table |= {"optimizer": found["bytes"]["optimizer"], "batch": found["bytes"]["batch"]}
  lines = ["", "memory of one device, GB (1e9 bytes)"]
  if found["memory"]:
    table |= {"temporaries (activations, gradients)": found["memory"]["temporaries"],
              "code": found["memory"]["code"]}
  lines += [f"  {name:36} {size / GB:8.3f}" for name, size in table.items()]
  if not found["memory"]:
    return [*lines, f"  DOES NOT FIT: the compiler refused it ({found['refused']})"]
  lines.append(f"  {'needed':36} {found['needed'] / GB:8.3f}")
  if "memory_of_chip" in found:
    left = found["memory_of_chip"] - found["needed"]
    verdict = "fits" if found["fits"] else "DOES NOT FIT"
    lines.append(f"  {'of a chip':36} {found['memory_of_chip'] / GB:8.3f}   {verdict}: {left / GB:+.2f} GB, "
                 f"{left / found['memory_of_chip']:+.0%}")
  return lines


def _flops(found: dict) -> list[str]:
  model, executed = found["flops"]["model"], found["flops"]["executed"]
  return ["", f"TFLOP of a step, all devices: {model / 1e12:.4g} of the model, {executed / 1e12:.4g} "
          f"executed ({executed / model - 1:+.0%} recomputed or padded)"]


def _collectives(found: dict) -> list[str]:
  if found["memory"] is None:
    return []
  lines = ["", "collectives of one device      group  network   sites   times   result GB   sent GB"]
  for row in found["collectives"]:
    lines.append(f"  {row['kind']:27} {row['group']:6}  {'DCN' if row['crosses'] else 'ICI':7} "
                 f"{row['sites']:7} {row['times']:7} {row['result'] / GB:11.4f} {row['network'] / GB:9.4f}")
  return lines if found["collectives"] else ["", "no collectives"]


def _speed(found: dict, topology: Topology) -> list[str]:
  speed = found.get("speed")
  if speed is None:
    if topology.kind == "cpu":
      return ["", "CPU devices have no published peaks: no floors, speed or cost. A --topology such as "
              "v5e:4x4 has them"]
    return []
  notes = {"compute": "executed FLOPs at the published peak",
           "memory": f"{found['traffic'] / GB:.0f} GB, a coarse upper estimate (30 % or worse)",
           "ici": "bytes sent at the links of a corner chip", "dcn": "bytes sent between slices"}
  lines = ["", "floor of a step from       ms"]
  for name, seconds in speed["floors"].items():
    mark = "   <- bounds the step" * (name == speed["bound"])
    lines += [f"  {name:16} {seconds * 1e3:11.1f}   {notes[name]}{mark}"] * bool(seconds)
  lines += ["", "most of the memory traffic, by line of source"]
  lines += [f"  {moved / found['traffic']:6.0%}  {place}" for place, moved in [*found["places"].items()][:6]]
  return [*lines, "",
          f"bound      {speed['rate']:.0f} statements/s, {speed['rate'] / found['chips']:.0f} a chip, "
          f"if everything overlaps ({speed['overlapped'] * 1e3:.0f} ms a step)",
          f"MFU        at most {speed['mfu']:.0%}; {speed['mfu_serial']:.0%} if nothing overlaps; "
          f"{speed['mfu_compute']:.0%} if compute alone took time"]


def _costs(found: dict) -> list[str]:
  if "costs" not in found:
    return []
  run, best = found["run"], found["save_interval"]
  lines = ["", f"a run of {run['statements']:,} statements x {run['epochs']:g} epochs, at the bound "
           f"(prices: {'yours' if run['price'] is not None else PRICES_OF})"]
  for way, one in found["costs"].items():
    if one["hours"] is None:
      lines.append(f"  {way:18} never ends: preemptions take all there is; save more often")
      continue
    lines.append(f"  {way:18} {one['steps']} steps, {one['hours']:.1f} h, {one['chip_hours']:.0f} "
                 f"chip-hours, ${one['dollars']:,.0f} at ${one['price']:g}; {one['preemptions']:g} "
                 f"preemptions a day without notice, {one['lost']:.1%} of the time lost")
  if best:
    minutes = f" and train.save_minutes={run['save_minutes']:g}" * (run["save_minutes"] > 0)
    lines.append(f"save every {best['steps']} steps ({clock(best['seconds'])}) for {run['preemptions']:g} "
                 f"preemptions a day without notice and saves of {run['save_seconds']:g} s; the config has "
                 f"train.save_every={run['save_every']}{minutes}")
  return lines


def clock(seconds: float) -> str:
  """93 -> "1:33"."""
  return f"{int(seconds) // 60}:{int(seconds) % 60:02}"
