"""The README's table of what a pod would need, and how collectives grow with the number of chips.

    python benchmarks/plan_table.py --low-effort

Compiles full-size train steps for TPU topologies without a TPU (`pip install -e '.[tpu]'`) and prints
three Markdown tables: the runs, weak scaling, and the memory of the contrastive loss alone. Nothing is run.
Each step takes minutes; what was compiled is kept, so an interrupted table goes on where it stopped.
"""
import argparse
from pathlib import Path

from lskd_jax.config_files import load_config
from lskd_jax.plan import report, run, topology

CONFIGS = Path(__file__).parents[1] / "configs"
STUDENT = "blip2", ("init.model=models/blip2",)
CRITIC = "blip2_critic", ("init.model=models/blip2",)
T5_XXL = "blip2_t5_xxl", ("init.model=models/blip2_t5_xxl",)
RUNS = (  # what, config, topology, images a chip
    ("student, ViT-g, 480 px", STUDENT, "v5e:4x4", 28),
    ("student, ViT-g, 480 px", STUDENT, "v5p:4x4x4", 64),
    ("critic, ViT-g, 480 px", CRITIC, "v5e:4x4", 28),
    ("generative student, Flan-T5-XXL", T5_XXL, "v5p:4x4x4", 16),
)
HEADER = ("run", "topology", "images/chip", "needs, of GB", "fits", "bound by", "statements/s/chip",
          "MFU at most", "MFU by compute alone", "hours", "on demand", "spot")
SCALES = ("v5e:4x4", "v5e:8x8", "v5e:16x16")
IMAGES = 16  # a chip, in the tables of scaling
# Over 16 chips, however many there are: parameters, ITM's negatives, and what of ITC is held at a time.
GROUPS = ("train.mesh.data=-1", "train.mesh.fsdp=16", f"loss.pool={16 * IMAGES}",
          f"loss.itc_block={16 * IMAGES}")
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# A step whose memory is that of ITC: no ViT, two narrow blocks, short texts, no other loss.
ITC_ALONE = ("data.cache_features=True", "model.vit.image_size=42", "model.qformer.depth=2",
             "model.qformer.remat=full", "data.text_tokens=16", "loss.itm=0.0", "loss.lm=0.0")


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--low-effort", action="store_true", help="as of lskd plan")
  low_effort = parser.parse_args().low_effort
  print_runs(low_effort)
  print_scaling(low_effort)
  print_itc(low_effort)


def planned(config: tuple, named: str, images: int, low_effort: bool, *overrides: str) -> dict:
  """The plan of a config with `images` images a chip."""
  name, fixed = config
  where = topology.parse(named)
  overrides = (*fixed, f"data.batch_size={images * where.chips}", *overrides)
  path = CONFIGS / f"{name}.py"
  facts = run.measured(path, overrides, where, low_effort, f"{name} on {named}")
  train = load_config(path, overrides).train
  return report.plan(facts, where, report.Run(), train.save_every, train.save_minutes)


def print_runs(low_effort: bool) -> None:
  print("Compiled, not run. 1,000,000 statements x 5 epochs at the bound, if everything overlaps:\n")
  print_head(*HEADER)
  for what, config, named, images in RUNS:
    found = planned(config, named, images, low_effort)
    if found["memory"] is None:
      print_row(what, named, images, found["refused"], "no", *["-"] * (len(HEADER) - 5))
      continue
    speed, ways = found["speed"], found["costs"]
    print_row(what, named, images, f"{gb(found['needed'])} of {gb(found['memory_of_chip'])}",
              "yes" if found["fits"] else "no", speed["bound"], f"{speed['rate'] / found['chips']:.0f}",
              f"{speed['mfu']:.0%}", f"{speed['mfu_compute']:.0%}", f"{ways['on demand']['hours']:.1f}",
              *(f"${ways[way]['dollars']:,.0f}" if way in ways else "-" for way in ("on demand", "spot")))


def print_scaling(low_effort: bool) -> None:
  print(f"\nThe student with {IMAGES} images a chip: GB that one device sends in a step (ring model)\n")
  print_head("chips", *KINDS, "all", "ms at the links", "temporaries GB")
  for named in SCALES:
    found = planned(STUDENT, named, IMAGES, low_effort, *GROUPS)
    if found["memory"] is None:
      print_row(named, found["refused"])
      continue
    sent = [sum(row["network"] for row in found["collectives"] if row["kind"] == kind) for kind in KINDS]
    print_row(named, *map(gb, sent), gb(sum(sent)), f"{found['speed']['floors']['ici'] * 1e3:.0f}",
              gb(found["memory"]["temporaries"]))


def print_itc(low_effort: bool) -> None:
  print(f"\nA step with the contrastive loss and next to nothing else, {IMAGES} images a chip\n")
  print_head("chips", "images", "statements", "temporaries GB")
  for named in SCALES:
    found = planned(STUDENT, named, IMAGES, low_effort, *GROUPS, *ITC_ALONE)
    print_row(named, found["batch_size"], found["statements"], gb(found["memory"]["temporaries"]))


def gb(size: float) -> str:
  return f"{size / 1e9:.2f}"


def print_head(*cells: str) -> None:
  print_row(*cells)
  print("|---" * len(cells) + "|")


def print_row(*cells) -> None:
  print(f"| {' | '.join(map(str, cells))} |", flush=True)


if __name__ == "__main__":
  main()
