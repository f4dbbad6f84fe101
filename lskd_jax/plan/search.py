"""Looks for the mesh, the rematerialisation and the batch size that make a step fastest and fit.

Trying everything would take days. So it goes one question at a time, each with the best answers so far:
meshes with the config's own settings, then rematerialisation, then the largest batch that fits. Every
trial is compiled at low effort and kept (run.py), so an interrupted search goes on where it stopped.
"""
from collections.abc import Callable, Sequence
import math
from typing import NamedTuple

from data_pipeline.records import DataError
from lskd_jax.plan import estimate
from lskd_jax.plan.chips import CHIPS
from lskd_jax.plan.topology import Topology

REMATS = ("none", "dots", "full")
OWN = "own"       # each tower as the config has it, where they differ
SHARDS = (1, 16)  # of the parameters, besides all chips of a slice; with tensor=1 and 2
TENSORS = (1, 2)
KEPT = 2          # answers to a question that go on to the next
SHRINK = 0.85     # of a batch that was meant to fit and did not


class Choice(NamedTuple):
  """What a trial tries: the mesh of a slice, the rematerialisation, and images a chip."""
  data: int
  fsdp: int
  tensor: int
  remat: str
  images: int


class Trial(NamedTuple):
  """A step that was compiled: its overrides of the config, what `measure` found, and its speed."""
  choice: Choice
  overrides: tuple[str, ...]
  facts: dict
  fits: bool
  speed: estimate.Speed | None


def search(config, topology: Topology, compile_one: Callable[[Sequence[str], str], dict]) -> list[Trial]:
  """The trials, those that fit first, then by statements/s.

  Args:
    config: where the search starts; its batch size is the first one tried.
    compile_one: (overrides, label) -> what `measure.measure` finds; raises ValueError where the step
      cannot be made with them.

  Raises DataError, ValueError: a topology of CPUs, which have no speed; or what kept the last mesh from being
  compiled, if none could be.
  """
  if topology.kind not in CHIPS:
    raise DataError(f"--search --topology {topology}: CPU devices have no published peaks to compare by; "
                    "give a TPU topology")
  trials, refused = {}, None

  def ask(choices: Sequence[Choice], later: int) -> list[Choice]:
    """Compiles what is new of the choices; the best `KEPT` of all of them. later: trials to come."""
    nonlocal refused
    new = [choice for choice in dict.fromkeys(choices) if choice not in trials]
    for i, choice in enumerate(new):
      label = progress(len(trials), len(new) - i + later, [one for one in trials.values() if one])
      try:
        trials[choice] = tried(config, topology, choice, compile_one, label)
      except ValueError as error:  # for instance a width that does not divide
        trials[choice], refused = None, error
    return sorted((one for one in choices if trials[one]), key=lambda one: order(trials[one]))[:KEPT]

  images, own = max(1, config.data.batch_size // topology.chips), own_remat(config)
  best = ask([Choice(*mesh, own, images) for mesh in meshes(topology)], 4 * KEPT)
  if not best:
    raise refused
  best = ask([one._replace(remat=remat) for one in best for remat in (own, *REMATS)], 2 * KEPT)
  for one in best:
    larger = largest_batch(trials[one], config, topology)
    if larger and not any(trials[two].fits for two in ask([one._replace(images=larger)], 1)):
      smaller = divisible(int(larger * SHRINK), one, config, topology)
      ask([one._replace(images=smaller)] * bool(smaller), 0)
  return sorted((trial for trial in trials.values() if trial), key=order)


def progress(done: int, left: int, known: Sequence[Trial]) -> str:
  """A label such as "trial 3 of about 12, 40 min left"."""
  seconds = sum(trial.facts["seconds"] for trial in known) / max(len(known), 1) * left
  return f"trial {done + 1} of about {done + left}" + f", {seconds / 60:.0f} min left" * bool(known)


def order(trial: Trial) -> tuple:
  """What a better trial has less of: it fits, many statements/s, and if it does not fit, little memory."""
  if not trial.fits:
    return 1, estimate.memory_needed(trial.facts) if trial.facts["memory"] else float("inf")
  return 0, -trial.speed.rate


def tried(config, topology: Topology, choice: Choice, compile_one, label: str) -> Trial:
  """A trial; raises ValueError where the step cannot be made."""
  overrides = overrides_of(config, topology, choice)
  facts = compile_one(overrides, label)
  return Trial(choice, overrides, facts, estimate.fits(facts, topology), estimate.speed(facts, topology))


def meshes(topology: Topology) -> list[tuple[int, int, int]]:
  """Divisions of a slice's chips into data x fsdp x tensor: parameters whole on each chip, over groups of
  chips, and over all of them."""
  found = []
  for tensor in TENSORS:
    chips, left = divmod(topology.slice_chips, tensor)
    found += [(chips // fsdp, fsdp, tensor) for fsdp in dict.fromkeys((chips, *SHARDS))
              if not left and chips % fsdp == 0]
  return found


def towers(config) -> list[str]:
  """The parts of a model that gradients go through."""
  return ["qformer", *(["decoder"] if config.task == "generative" else []),
          *([] if "vit" in config.train.frozen else ["vit"])]


def own_remat(config) -> str:
  """What a config recomputes: the rematerialisation of all its towers, or `OWN` where they differ."""
  found = {config.model[tower].remat for tower in towers(config)}
  return found.pop() if len(found) == 1 else OWN


def overrides_of(config, topology: Topology, choice: Choice) -> tuple[str, ...]:
  """A choice as overrides of a config; every tower with gradients is rematerialised alike, but for `OWN`."""
  remat = [] if choice.remat == OWN else [f"model.{one}.remat={choice.remat}" for one in towers(config)]
  return (f"train.mesh.slice={topology.slices}", f"train.mesh.data={choice.data}",
          f"train.mesh.fsdp={choice.fsdp}", f"train.mesh.tensor={choice.tensor}",
          *remat, f"data.batch_size={choice.images * topology.chips}")


def largest_batch(trial: Trial, config, topology: Topology) -> int | None:
  """Images a chip that should just fit, temporaries growing with them; None if that is no change."""
  if trial.facts["memory"] is None:
    return None
  images, temporaries = trial.choice.images, trial.facts["memory"]["temporaries"]
  room = CHIPS[topology.kind].memory - (estimate.memory_needed(trial.facts) - temporaries)
  found = divisible(int(images * room / temporaries), trial.choice, config, topology)
  return found if found >= 1 and found != images else None


def divisible(images: int, choice: Choice, config, topology: Topology) -> int:
  """The most images a chip, up to `images`, that the config's pools, blocks and parts divide; 0 if none.

  A multiple of 4 above 8 where that can be, since the compiler pads odd shapes.
  """
  chips = topology.chips
  parts = config.train.microbatches * (chips // choice.tensor)  # of all groups of devices
  wanted = (config.loss.pool or 1, config.loss.itc_block or 1, parts)
  step = math.lcm(*(size // math.gcd(size, chips) for size in wanted))
  even = math.lcm(step, 4)
  return images // even * even if images > 8 and images >= even else images // step * step


def as_json(trials: Sequence[Trial]) -> list[dict]:
  """Trials as dicts all through, in their order."""
  return [trial._asdict() | {"choice": trial.choice._asdict(), "speed": trial.speed and trial.speed._asdict()}
          for trial in trials]


def text(trials: Sequence[Trial], topology: Topology, best: int = 5) -> str:
  """The best few trials for a terminal, and how to use the first."""
  lines = [f"search for {topology}: compiled at low effort, not run; {len(trials)} trials", "",
           "images/chip  data fsdp tensor  remat   needed GB   step ms  bound by  statements/s  MFU at most"]
  for trial in trials[:best]:
    data, fsdp, tensor, remat, images = trial.choice
    needed = f"{estimate.memory_needed(trial.facts) / 1e9:9.2f}" if trial.facts["memory"] else "  refused"
    row, speed = f"{images:11}  {data:4} {fsdp:4} {tensor:6}  {remat:5}   {needed}", trial.speed
    if trial.fits:
      row += f" {speed.overlapped * 1e3:9.0f}  {speed.bound:8}  {speed.rate:12.0f}  {speed.mfu:11.0%}"
    lines.append(row if trial.fits else f"{row}   does not fit")
  if not trials[0].fits:
    return "\n".join([*lines, "", "none fits: start from a smaller data.batch_size, or take more chips"])
  return "\n".join([*lines, "", "the first: " + " ".join(f"--config.{one}" for one in trials[0].overrides)])
