"""What a demo found: results.json, the table in the terminal, report.html."""
import json
from pathlib import Path

import numpy as np

from data_pipeline import filter as filtering, report, stages
from data_pipeline.images import read_image
from lskd_jax.metrics import read_metrics

COLUMNS = ("q_a", "qa_r", "q_ar", "swap", "caption")
TITLES = {"q_a": "Q→A", "qa_r": "QA→R", "q_ar": "Q→AR", "swap": "swap", "caption": "caption"}
CHANCE = {"q_a": 0.25, "qa_r": 0.25, "q_ar": 0.0625, "swap": 0.25, "caption": 0.25}
ARMS = ("pretrained", "unfiltered", "lskd", "none", "overlay", "ceiling")
HEAD = "lm"  # the head of the table: the only one that all arms train


def collect(folders: list[Path]) -> dict:
  """The results of one or several seeds; medians where there are several."""
  seeds = [_seed(folder) for folder in folders]
  results = _summary(seeds, np.median)
  results["seeds"] = [seed["seed"] for seed in seeds]
  results["seconds"] = round(sum(seed["seconds"] for seed in seeds), 1)
  if len(seeds) > 1:
    results["means"] = {key: value for key, value in _summary(seeds, np.mean).items()}
    results["lowest"] = {key: value for key, value in _summary(seeds, np.min).items()}
    results["differences"] = _differences(seeds)
  results["per_seed"] = seeds
  return results


def _seed(folder: Path) -> dict:
  """Everything one seed measured."""
  read = lambda name: json.loads((folder / name).read_text())
  arms = {}
  for name in ARMS:
    if (folder / "results" / f"{name}.json").exists():
      found = read(f"results/{name}.json")
      columns = found["columns"]
      arms[name] = {**{c: columns[c][HEAD] for c in COLUMNS}, "head": HEAD,
                    "all_heads": {c: columns[c] for c in COLUMNS}, "types": columns["types"],
                    "steps": found["steps"], "extended": found["extended"]}
  truth, cut = read("truth.json"), read("cut.json")
  kept, true_kept = 0, 0
  for record in stages.read_records(folder / "scored"):
    for statement in record.statements:
      if statement.score >= cut["cut"]:
        kept, true_kept = kept + 1, true_kept + truth[statement.index]
  critic = {"ap": cut["ap"][cut["critic"]], "precision_before": sum(truth.values()) / len(truth),
            "precision_after": true_kept / max(kept, 1), "kept": kept / len(truth),
            "kind": cut["critic"], "cut": cut["cut"], "ap_by_kind": cut["ap"]}
  return {"seed": read("demo.json")["seed"], "seconds": read("seconds.json"), "arms": arms,
          "critic": critic}


def _summary(seeds: list[dict], statistic) -> dict:
  """One number per arm and column, and per critic figure, over the seeds."""
  value = lambda numbers: round(float(statistic(list(numbers))), 4)
  names = [name for name in ARMS if all(name in seed["arms"] for seed in seeds)]
  arms = {name: {**{c: value(s["arms"][name][c] for s in seeds) for c in COLUMNS}, "head": HEAD}
          for name in names}
  figures = ("ap", "precision_before", "precision_after", "kept")
  return {"arms": arms, "critic": {f: value(s["critic"][f] for s in seeds) for f in figures}}


def _differences(seeds: list[dict]) -> dict:
  """Paired differences over the seeds, each with its mean and 95 % interval (Student's t)."""
  pairs = {"lskd - unfiltered, q_a": lambda s: s["arms"]["lskd"]["q_a"] - s["arms"]["unfiltered"]["q_a"],
           "lskd - none, q_a": lambda s: s["arms"]["lskd"]["q_a"] - s["arms"]["none"]["q_a"],
           "lskd q_a - lskd swap": lambda s: s["arms"]["lskd"]["q_a"] - s["arms"]["lskd"]["swap"],
           "precision after - before": lambda s: (s["critic"]["precision_after"]
                                                  - s["critic"]["precision_before"])}
  return {name: mean_interval([difference(seed) for seed in seeds])
          for name, difference in pairs.items()}


# Two-sided 95 % quantiles of Student's t for 1 to 9 degrees of freedom.
STUDENT_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def mean_interval(values: list[float]) -> dict:
  """Mean and 95 % interval of a few paired differences; beyond ten, the normal quantile is used."""
  values = np.array(values)
  quantile = STUDENT_T[len(values) - 2] if len(values) <= 10 else 1.96
  half = quantile * values.std(ddof=1) / np.sqrt(len(values))
  return {"mean": round(float(values.mean()), 4), "low": round(float(values.mean() - half), 4),
          "high": round(float(values.mean() + half), 4)}


# --- terminal ---


def table(results: dict) -> str:
  """The results as the paper lays them out: a row per arm, percent."""
  wide = 12
  lines = ["", f"{'arm':{wide}}" + "".join(f"{TITLES[c]:>9}" for c in COLUMNS)]
  row = lambda name, values: f"{name:{wide}}" + "".join(f"{100 * values[c]:9.1f}" for c in COLUMNS)
  lines += [row("chance", CHANCE)] + [row(name, arm) for name, arm in results["arms"].items()]
  critic = results["critic"]
  lines += ["", f"scores by the {HEAD} head; "
            + ("medians of seeds " + ", ".join(map(str, results["seeds"]))
               if len(results["seeds"]) > 1 else f"seed {results['seeds'][0]}"),
            f"critic: AP {100 * critic['ap']:.1f}; true statements {100 * critic['precision_before']:.1f} % "
            f"before the cut, {100 * critic['precision_after']:.1f} % after it, "
            f"{100 * critic['kept']:.0f} % kept"]
  for name, difference in results.get("differences", {}).items():
    lines.append(f"{name}: {100 * difference['mean']:+.1f} points "
                 f"(95 % interval {100 * difference['low']:+.1f} to {100 * difference['high']:+.1f})")
  return "\n".join(lines + notes(results))


def notes(results: dict) -> list[str]:
  """What a reader must know before believing a number."""
  lines = []
  for seed in results["per_seed"]:
    for name, arm in seed["arms"].items():
      if arm["extended"]:
        lines.append(f"seed {seed['seed']}: `{name}` was at chance at half its steps and was extended "
                     f"to {arm['steps']} steps")
      if name in ("unfiltered", "lskd", "ceiling") and arm["q_a"] < 0.32:
        lines.append(f"seed {seed['seed']}: `{name}` has not converged; its row supports no claim")
  return lines


# --- report.html ---


def write(path: Path, folders: list[Path], results: dict) -> None:
  """The HTML report: all seeds' table, and the first seed's curves, cut, funnel and gallery."""
  folder = folders[0]
  percent = lambda value: round(100 * value, 1)
  rows = [(name, [percent(arm[c]) for c in COLUMNS]) for name, arm in results["arms"].items()]
  grid = report.ResultsTable(
      [TITLES[c] for c in COLUMNS], rows, [percent(CHANCE[c]) for c in COLUMNS], "lskd",
      "Accuracy in percent on held-out pictures. Q→A, QA→R, Q→AR: which answer, rationale, both; "
      "the distractors are right for other regions of the same picture. swap: the same question "
      "after two boxes traded places. caption: which caption is the picture's. "
      f"Scores by the {HEAD} head" + (", medians over seeds." if len(folders) > 1 else "."),
      reference=("ceiling",))
  scored = json.loads((folder / "held-out-scores.json").read_text())
  labels = np.array(scored.pop("labels"))
  cut = json.loads((folder / "cut.json").read_text())
  curves = [filtering.precision_recall(np.array(values), labels) for values in scored.values()]
  chosen = np.array(scored[cut["critic"]])
  critics = [report.CriticCurve(f"{kind} critic", curve["recall"], curve["precision"], cut["ap"][kind])
             for kind, curve in zip(scored, curves)]
  recall = float((chosen[labels == 1] >= cut["cut"]).mean())
  critic = results["critic"]
  pointed = report.PrecisionRecall(critics, cut["cut"], recall, float(labels.mean()),
                                   float(labels[chosen >= cut["cut"]].mean()))
  truth = json.loads((folder / "truth.json").read_text())
  records = list(stages.read_records(folder / "scored"))
  load = lambda record: read_image(folder / "words" / "images" / record.image)
  report.write_report(
      path, "lskd demo", table=grid, curves=learning_curves(folder), precision_recall=pointed,
      funnel=funnel(folder, records, cut["cut"]),
      gallery=report.gallery_groups(records, load, cut["cut"], truth),
      figures=report.corpus_figures(records, cut["cut"], truth), notes=notes(results),
      facts={"seeds": ", ".join(map(str, results["seeds"])),
             "true statements": f"{percent(critic['precision_before'])} % before the cut, "
                                f"{percent(critic['precision_after'])} % after",
             "kept": f"{percent(critic['kept'])} %", "critic used": f"{cut['critic']} ({cut['rule']})"})


def learning_curves(folder: Path) -> list[report.Curve]:
  """Development accuracy and LM loss of every arm, and the loss of the two stages before."""
  curves = []
  for name in ("words", "captions", *ARMS):
    path = folder / "runs" / name / "metrics.jsonl"
    if not path.exists():
      continue
    lines = read_metrics(path)
    accuracy = [(line["step"], 100 * line["dev_q_a"]) for line in lines if "dev_q_a" in line]
    if accuracy:
      curves.append(report.Curve(name, *zip(*accuracy), "Q→A on the development set, %", 25.0))
    loss = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    panel = "training loss of the arms" if name in ARMS else f"training loss of `{name}`"
    curves.append(report.Curve(name, *zip(*loss), panel))
  return curves


def funnel(folder: Path, records: list, cut: float) -> list[tuple[str, int]]:
  """How many of what was written is left after each step."""
  taught = stages.read_summary(folder / "taught")
  scored = [s.score for record in records for s in record.statements]
  return [("images", len(records)), ("statements written", taught["statements"] + taught["rejected"]),
          ("parsed", taught["statements"]), ("valid", len(scored)),
          ("above the cut", sum(score >= cut for score in scored))]
