"""Does ITM with region-swap negatives learn to tell [0] from [1]? Cold and warm start.

    python benchmarks/itm_region_swap.py --demo demo [--steps 1000] [--starts cold warm]

Needs a work directory of `lskd demo --full`. Trains the same student with the same batches twice on
the true statements: `cold`, whose Q-Former starts from random weights, and `warm`, which starts from
the demo's `ceiling` arm, a student that already tells regions apart in its causal pass. Then, on
held-out pictures, each question with its right answer is shown twice: with the boxes as they are
and with the boxes of two regions traded, where the answer is wrong. `pair` is how often the match
logit of the first is the higher one (chance 50 %).

Prints one JSON line.
"""
import argparse
import json
from pathlib import Path

import jax
import numpy as np

from data_pipeline.choices import SceneChoice
from data_pipeline.texts import ANSWER
from lskd_jax import demo_tasks, parallel
from lskd_jax.evaluate.candidates import Scorer, sum_over
from lskd_jax.evaluate.scenes import item_rows
from lskd_jax.metrics import read_metrics
from lskd_jax.models import build
from lskd_jax.train import train

STARTS = {"cold": "words", "warm": "ceiling"}  # the demo's run whose model each starts from


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--demo", type=Path, required=True)
  parser.add_argument("--steps", type=int, default=1000)
  parser.add_argument("--starts", nargs="+", choices=STARTS, default=list(STARTS))
  args = parser.parse_args()
  results = {}
  for name in args.starts:
    workdir = args.demo / "runs" / f"itm-{name}-{args.steps}"
    config = demo_tasks.run_config(args.demo, "scenes_itm", f"itm {name}")
    config.data.corpus = str(args.demo / "true")
    config.data.features = str(args.demo / "features")
    config.init.model = str(args.demo / "runs" / STARTS[name] / "model")
    config.init.parts = ("vit",) if name == "cold" else ()
    config.optim.steps = args.steps
    run = train(config, workdir)
    with jax.set_mesh(parallel.make_mesh()):
      results[name] = pair_accuracy(args.demo, build.load(run.model))
    last = [line for line in read_metrics(workdir / "metrics.jsonl") if "itm" in line][-10:]
    for key in ("itm", "itm_match_right", "itm_region_swap_right", "itm_other_image_right"):
      results[name][f"train_{key}"] = round(float(np.mean([line[key] for line in last])), 3)
  print(json.dumps({"benchmark": "itm_region_swap", "steps": args.steps, **results}))


def pair_accuracy(work: Path, model: build.Model) -> dict[str, float]:
  """How often the match head and the LM head prefer the boxes as they are."""
  items, pixels = demo_tasks.held_out(work, "test")
  items: list[SceneChoice] = [item for item in items if item.swap is not None]
  scorer = Scorer(model.graph, model.state)
  images = {"features": scorer.features(pixels)}
  texts = [[f"question: {i.question} answer: {i.choices[i.label]}"] for i in items]
  scores = []
  for swapped in (False, True):
    rows = item_rows(items, texts, images, model.tokenizer, model.config.max_regions,
                     demo_tasks.TEXT_TOKENS, model.config.vit.image_size, swapped)
    fields = rows.pop("fields")
    found = scorer.many(rows, 32)
    scores.append({"itm": found["itm"][:, 0], "match": found["match"][:, 0],
                   "lm": sum_over(found["words"], fields, [ANSWER])[:, 0]})
  pairs = {f"pair_{head}": round(float((scores[0][head] > scores[1][head]).mean()), 3)
           for head in ("match", "lm")}
  return {"items": len(items), **pairs}


if __name__ == "__main__":
  main()
