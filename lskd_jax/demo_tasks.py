"""The demo's tasks: each a function of the work directory, run in a process of its own.

    python -m lskd_jax.demo_tasks TASK WORKDIR

Every task continues where an interrupted one stopped and does nothing where it was finished: stages
commit shard by shard, training resumes from its checkpoint, and small files are renamed into place.
The sizes come from WORKDIR/demo.json.
"""
from collections.abc import Callable
import dataclasses
import importlib
import json
from pathlib import Path
import sys

from flax import nnx
import jax
import numpy as np

from data_pipeline import (
  choices,
  corpus_stages,
  filter as filtering,
  images,
  judge,
  regions,
  stages,
  tokenizer as tokenizers,
)
from data_pipeline.corpus import Corpus, open_corpus
from data_pipeline.lck import build_lck, publish_lck
from data_pipeline.sources import scenes
from lskd_jax import evidence, features, parallel
from lskd_jax.evaluate import scenes as benchmark
from lskd_jax.evaluate.candidates import Scorer
from lskd_jax.judged import judged_corpus
from lskd_jax.models import build
from lskd_jax.prepare import corpus_texts
from lskd_jax.scoring import critic_scores, statement_likelihoods
from lskd_jax.train import train

HELD_OUT = {"dev": 1, "test": 2}   # seeds of the held-out pictures, beside the training pictures' 0
PUBLISHED = "published/lck/default/1.0.0"
TEXT_TOKENS = 48                   # of a text when it is scored: no caption is longer
MIN_FIGURES = 4                    # of a held-out picture: a question needs four different answers


def settings(work: Path) -> dict:
  """What `demo.run` decided for this work directory."""
  return json.loads((work / "demo.json").read_text())


# --- data ---


def pictures(work: Path) -> None:
  """Held-out and training scenes, statements, judgements, questions, the tokenizer."""
  size = settings(work)
  held = set()
  for split, number in HELD_OUT.items():
    folder = work / split
    corpus_stages.verbalize_scenes(folder, size[split], scene_seed(size, number), 0.0, held,
                                   MIN_FIGURES, split=split)
    records = list(stages.read_records(folder))
    held |= {scenes.scene_key(scenes.scene_from_dict(r.extra["scene"])) for r in records}
    rng = np.random.default_rng([size["seed"], number])
    items = choices.choice_items(records, rng) + choices.caption_items(records, rng)
    choices.write_items(work / f"{split}.jsonl", items)
  corpus_stages.verbalize_scenes(work / "words", size["train"], scene_seed(size, 0),
                                 size["error_rate"], held)
  corpus_stages.teach_corpus(work / "words", work / "taught", size["per_image"], size["seed"])
  records = list(stages.read_records(work / "taught"))
  rng = np.random.default_rng([size["seed"], 3])
  judged = judge.judge_from_scene(records, rng, size["judged"], size["misjudged"])
  judge.write_judgements(work / "judgements.jsonl", judged)
  fit, held_out = judge.split_judgements(judged, records, held_out=0.3, seed=size["seed"])
  judge.write_judgements(work / "judgements-fit.jsonl", fit)
  judge.write_judgements(work / "judgements-held-out.jsonl", held_out)
  stages.write_json(work / "truth.json", {s.index: all(judge.is_true(s, scene_of(r)))
                                          for r in records for s in r.statements})
  corpus = open_corpus(work / "taught", work / "words" / "images")
  tokenizers.train_tokenizer(corpus_texts(corpus), work / "tokenizer", 512)


def scene_seed(size: dict, number: int) -> int:
  """Seeds of pictures never meet those of another demo seed or set."""
  return 1000 * size["seed"] + number


def scene_of(record) -> scenes.Scene:
  return scenes.scene_from_dict(record.extra["scene"])


def true_statements(work: Path) -> None:
  """The taught corpus with its true statements only: what the ceiling arm reads."""
  truth = json.loads((work / "truth.json").read_text())

  def work_on(record):
    kept = tuple(s for s in record.statements if truth[s.index])
    return dataclasses.replace(record, statements=kept)
  stages.run_stage("true", stages.open_shards(work / "taught"), work_on, work / "true", {})


# --- training ---


def run_config(work: Path, name: str, run: str):
  """A config of `configs/`, set up for this work directory; `run` names the run."""
  size = settings(work)
  config = importlib.import_module(f"configs.{name}").get_config()
  config.name = run
  config.seed = size["seed"]
  config.data.tokenizer = str(work / "tokenizer")
  config.data.corpus = str(work / "taught")
  config.data.image_root = str(work / "words" / "images")
  config.optim.steps = max(4, round(config.optim.steps * size["steps"]))
  config.optim.warmup_steps = min(config.optim.warmup_steps, config.optim.steps // 4)
  if size["quick"]:
    config.guard.below = 0.0  # so few steps never leave chance
  return config


def words(work: Path) -> None:
  """Stage 0: the ViT, and what it says of every picture, which all later runs share."""
  run = train(run_config(work, "scenes_words", "words"), work / "runs" / "words")

  def see():
    model = build.load(run.model)
    vit = nnx.merge(model.graph, model.state).vit
    features.cached_features(vit, open_corpus(work / "taught", work / "words" / "images"),
                             work / "features")
  on_mesh(see)


def captions(work: Path) -> None:
  """Stage 1: the arm `pretrained`."""
  config = run_config(work, "scenes_captions", "captions")
  config.init.model = str(work / "runs" / "words" / "model")
  config.data.features = str(work / "features")
  train(config, work / "runs" / "captions")


def heads_critic(work: Path) -> None:
  """The paper's critic, on the same judgements, scored on the held-out ones."""
  config = run_config(work, "scenes_critic", "heads critic")
  config.init.model = str(work / "runs" / "captions" / "model")
  config.data.features = str(work / "features")
  config.data.judgements = str(work / "judgements-fit.jsonl")
  run = train(config, work / "runs" / "heads_critic")
  corpus = judged_only(work, "judgements-held-out.jsonl")
  scores = on_mesh(lambda: critic_scores(build.load(run.model), corpus,
                                         cached=features_of(work, corpus)))
  stages.write_json(work / "heads-held-out.json", scores)


EVALUATE = "evaluate-"  # of a task's name; the arm's follows
ARMS = {  # name: (corpus, region mode)
    "unfiltered": ("taught", "tokens"),
    "lskd": ("lck", "tokens"),
    "none": ("lck", "none"),
    "overlay": ("lck", "overlay"),
    "ceiling": ("true", "tokens"),
}


def arm(work: Path, name: str) -> None:
  """Trains one arm."""
  corpus, region_mode = ARMS[name]
  config_name = "scenes_overlay" if region_mode == "overlay" else "scenes_student"
  config = run_config(work, config_name, name)
  config.init.model = str(work / "runs" / "words" / "model")
  config.data.features = "" if region_mode == "overlay" else str(work / "features")
  config.data.region_mode = region_mode
  if region_mode == "none":
    config.guard.below = 0.0  # with the regions hidden, chance is where it belongs
  if corpus == "lck":
    config.data.corpus = str(work / PUBLISHED)
    config.data.min_score = json.loads((work / "cut.json").read_text())["cut"]
    config.data.image_root = ""
  else:
    config.data.corpus = str(work / corpus)
  config.eval.every = config.optim.steps // 4
  train(config, work / "runs" / name, evaluate=dev_evaluation(work))


def dev_evaluation(work: Path) -> Callable:
  """A cheap look at the development set, LM head only: what decides about extending a run."""
  loaded = []

  def evaluate(graph, state, step):
    if not loaded:
      loaded.append(held_out(work, "dev"))
    found = score_held_out(work, graph, state, *loaded[0], columns=("q_a",))
    return {"dev_q_a": found["q_a"]["lm"]}
  return evaluate


def held_out(work: Path, split: str):
  """The items of a held-out set and its pictures, uint8[N, 96, 96, 3]."""
  corpus = open_corpus(work / split, work / split / "images", split=split)
  pixels = np.stack([images.decode(corpus.image_bytes(row)) for row in range(len(corpus))])
  return choices.read_items(work / f"{split}.jsonl"), pixels


def score_held_out(work: Path, graph, state, items, pixels, columns=benchmark.COLUMNS, heads=0):
  """Accuracies of a student; the ViT runs once per picture unless boxes are drawn on the pixels.

  heads: all items are chosen by the LM head; the other heads, which cost several times as much, are
  measured on every n-th item, `heads` of them (0 = not at all: a quick look, without a bar).
  """
  scorer = Scorer(graph, state, heads=False)
  config = scorer.config
  overlay = draw_boxes if config.region_mode in ("overlay", "both") else None
  rows = {"image": pixels} if overlay else {"features": scorer.features(pixels)}

  def evaluate(scorer, items):
    return benchmark.evaluate(scorer, items, rows, scorer_tokenizer(work), overlay=overlay,
                              max_regions=config.max_regions, text_tokens=TEXT_TOKENS,
                              image_size=config.vit.image_size, columns=columns,
                              progress=bool(heads))
  found = evaluate(scorer, items)
  if heads:
    others = evaluate(Scorer(graph, state), items[::max(1, len(items) // heads)])
    for column in columns:
      found[column] = {**others[column], **found[column]}
  return found


def scorer_tokenizer(work: Path):
  return tokenizers.load_tokenizer(work / "tokenizer")


def draw_boxes(image: np.ndarray, boxes: np.ndarray) -> np.ndarray:
  """One picture with its boxes ([0, 1]) drawn in slot colours."""
  from PIL import Image
  return np.asarray(regions.draw_overlay(Image.fromarray(image), boxes * image.shape[0]))


def evaluate_arm(work: Path, name: str) -> None:
  """Writes results/NAME.json: every column by every head on the held-out test pictures."""
  run = work / "runs" / ("captions" if name == "pretrained" else name)

  def evaluate():
    model = build.load(run / "model")
    return score_held_out(work, model.graph, model.state, *held_out(work, "test"), heads=240)
  done = json.loads((run / "done.json").read_text())
  (work / "results").mkdir(exist_ok=True)
  stages.write_json(work / "results" / f"{name}.json", {
      "columns": on_mesh(evaluate), "steps": done["step"], "extended": done["extended"]})


def on_mesh(call: Callable):
  """Runs `call` with a one-device mesh in use."""
  with jax.set_mesh(parallel.make_mesh()):
    return call()


# --- critic, cut, corpus ---


def judged_only(work: Path, file: str) -> Corpus:
  """The taught corpus with the statements that a judgement file is about."""
  corpus = open_corpus(work / "taught", work / "words" / "images")
  return judged_corpus(corpus, judge.read_judgements(work / file))


def features_of(work: Path, corpus: Corpus):
  """The shared features of the training pictures."""
  return np.load(work / "features" / "features.npy", mmap_mode="r")


def score(work: Path) -> None:
  """Both critics on held-out judgements; the better one scores the whole corpus; the cut."""
  corpus = open_corpus(work / "taught", work / "words" / "images")
  model = on_mesh(lambda: build.load(work / "runs" / "unfiltered" / "model"))
  found = on_mesh(lambda: statement_likelihoods(model, corpus, cached=features_of(work, corpus)))
  fit = judge.read_judgements(work / "judgements-fit.jsonl")
  critic = evidence.fit_evidence([found[j.index] for j in fit], [j.accept for j in fit])
  scores = {index: float(p) for index, p in zip(found, critic.scores(list(found.values())))}
  held = judge.read_judgements(work / "judgements-held-out.jsonl")
  labels = np.array([j.accept for j in held])
  heads = json.loads((work / "heads-held-out.json").read_text())
  by_kind = {"evidence": np.array([scores[j.index] for j in held]),
             "heads": np.array([heads[j.index] for j in held])}
  ap = {kind: filtering.average_precision(values, labels) for kind, values in by_kind.items()}
  chosen = max(ap, key=ap.get)
  if chosen == "heads":
    critic_model = on_mesh(lambda: build.load(work / "runs" / "heads_critic" / "model"))
    scores = on_mesh(lambda: critic_scores(critic_model, corpus, cached=features_of(work, corpus)))
  cut = filtering.choose_cut(by_kind[chosen], labels, beta=settings(work)["beta"])
  options = {"critic": chosen, "cut": cut.cut}
  corpus_stages.score_corpus(work / "taught", work / "scored",
                             lambda records: [[scores[s.index] for s in r.statements]
                                              for r in records], options)
  stages.write_json(work / "held-out-scores.json",
                    {"labels": labels.tolist(), **{k: v.tolist() for k, v in by_kind.items()}})
  stages.write_json(work / "cut.json", {"cut": cut.cut, "critic": chosen, "ap": ap,
                                        "rule": cut.rule, "held_out": len(held)})


def publish(work: Path) -> None:
  """The TFDS dataset `lck`, published; training reads it back from there."""
  cut = json.loads((work / "cut.json").read_text())
  records = list(stages.read_records(work / "scored"))  # counted, for the time left
  built = build_lck(records, work / "words" / "images", work / "built")
  publish_lck(built, work / "published", image_source="drawn scenes", image_licence="Apache-2.0",
              critic=f"{cut['critic']} critic", threshold=cut["cut"])


def main(argv=None) -> None:
  """Runs one task."""
  name, folder = argv or sys.argv[1:]
  work = Path(folder)
  if name in ARMS:
    arm(work, name)
  elif name.startswith(EVALUATE):
    evaluate_arm(work, name.removeprefix(EVALUATE))
  else:
    {"pictures": pictures, "true": true_statements, "words": words, "captions": captions,
     "heads_critic": heads_critic, "score": score, "publish": publish}[name](work)


if __name__ == "__main__":
  main()
