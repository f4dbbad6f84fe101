"""Runs of a generative student: the decoder stays as it is, and the Q-Former learns to speak to it.

Two pictures, models of noise (OPT with a byte-level BPE tokenizer, T5 with a Unigram one), and runs of a
few steps that start from their ViT and decoder, as a user would make them.
"""
import dataclasses
import json

from flax import nnx
import jax
from ml_collections import ConfigDict
import numpy as np
import pytest

from data_pipeline import choices, corpus_stages, stages
from data_pipeline.corpus import corpus_of
from data_pipeline.records import DataError
from data_pipeline.texts import text_encoder
from data_pipeline.tokenizer import load_tokenizer
from lskd_jax import checkpoint, parallel, scoring
from lskd_jax.commands import benchmarks
from lskd_jax.models import build
from lskd_jax.models.generative import generative_config
from lskd_jax.prepare import corpus_texts, sized
from lskd_jax.trees import named_leaves, read_manifest
from tests import tiny_runs
from tests.decoder_tokenizers import train_bpe, train_unigram
from tests.lskd_jax import tiny
from tests.lskd_jax.test_train import KilledError, assert_same_run, logged, parameters, run, tiny_config

STEPS = 40
OTHER = {"opt": "t5", "t5": "opt"}
DECODERS = {
  "opt": dict(width=16, embed=12, depth=1, heads=2, hidden=32, max_tokens=96, scan=False, start=2),
  "t5": dict(width=16, head=6, depth=1, decoder_depth=1, heads=2, hidden=32, scan=False),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Two taught scenes, ten to evaluate on, and for each decoder a tokenizer and a model to start from."""
  folder = tmp_path_factory.mktemp("generative")
  corpus_stages.verbalize_scenes(folder / "words", 2, progress=False)
  corpus_stages.teach_corpus(folder / "words", folder / "taught", progress=False)
  tiny_runs.teach_others(folder)
  corpus = corpus_of(list(stages.read_records(folder / "taught")), folder / "words" / "images")
  texts = list(corpus_texts(corpus))
  for kind, train in (("opt", train_bpe), ("t5", train_unigram)):
    start_model(folder / kind, kind, train(texts, folder / f"tokenizer {kind}"))
  return folder


def start_model(folder, kind, tokenizer):
  """A model directory of noise, whose decoder has rows to spare for its tokenizer."""
  text = text_encoder(tokenizer, 64)
  decoder = dict(vocabulary=tokenizer.get_vocab_size() + 3, pad=text.pad, end=text.end, **DECODERS[kind])
  config = generative_config(dict(
    vit=dict(image_size=48, patch=12, width=16, depth=1, heads=2, hidden=32, scan=False),
    qformer=dict(width=16, depth=1, cross_every=1, heads=2, hidden=32, queries=2, scan=False),
    max_regions=6, language_model=kind, decoder=decoder))
  with jax.set_mesh(parallel.make_mesh(devices=jax.devices()[:1])):
    state = nnx.split(tiny.filled(build.maker("generative", config, tokenizer)))[1]
    build.save(folder, "generative", config, state, folder.parent / f"tokenizer {kind}")


def config_of(folder, kind, **groups):
  """The decoder's sizes and tokenizer are those of the model to start from."""
  config = tiny_config(folder, task="generative", **groups)
  tiny_runs.evaluate_on_others(config, folder)
  config.eval.update(every=10, batches=1)
  config.init.update(model=str(folder / kind), parts=("vit", "decoder"))
  config.data.text_tokens = 64
  config.loss.update(question=0.0, smoothing=0.0)
  config.model.language_model = kind
  config.optim.update(steps=STEPS, learning_rate=1e-2)
  config.train.update(save_every=20, frozen=("vit", "decoder"))
  return config


def evaluate_until(last):
  """An evaluation in which the process dies after step `last`."""
  def evaluate(graph, state, step):
    if step > last:
      raise KilledError
    return {"evaluated": step / 10}
  return evaluate


@pytest.fixture(scope="module", params=["opt", "t5"])
def kind(request):
  return request.param


@pytest.fixture(scope="module")
def trained(folder, kind):
  """The work directory of an uninterrupted run."""
  run(config_of(folder, kind), folder / "runs" / kind, evaluate_until(STEPS))
  return folder / "runs" / kind


@pytest.fixture(scope="module")
def cached(folder, kind):
  """The work directory of the same run's first step, on cached features."""
  config = config_of(folder, kind, data=dict(cache_features=True))
  config.optim.steps = 1
  run(config, folder / "runs" / f"cached {kind}")
  return folder / "runs" / f"cached {kind}"


def test_every_step_is_logged(trained):
  lines = logged(trained)
  assert len(lines) == STEPS
  assert all({"loss", "lm", "grad_norm", "answer_words_right"} <= set(line) for line in lines)


def test_vit_and_decoder_stay_bit_for_bit_and_the_rest_learns(folder, kind, trained):
  before, after = named_leaves(checkpoint.load_model(folder / kind)[1]), parameters(trained)
  frozen = [name for name in after if name.split("/")[0] in ("vit", "decoder")]
  assert {name.split("/")[0] for name in frozen} == {"vit", "decoder"}
  for name in frozen:
    np.testing.assert_array_equal(after[name], before[name], err_msg=name)
  gates = [name for name in after if name.endswith("gate")]  # closed at the start
  assert len(gates) == 3 and all(after[name].any() for name in gates)


def test_frozen_parts_are_referred_to_and_have_no_optimizer_state(folder, kind, trained):
  stored = json.loads((trained / f"checkpoints/{STEPS}/_METADATA").read_text())["tree_metadata"]
  parts = {part["key"] for leaf in stored.values() for part in leaf["key_metadata"]}
  assert {"params", "opt", "qformer", "decoder_proj"} <= parts and not {"vit", "decoder"} & parts
  reference = json.loads((trained / "frozen.json").read_text())
  assert reference["model"] == str(folder / kind)
  assert {name.split("/")[0] for name in reference["leaves"]} == {"vit", "decoder"}
  assert set(read_manifest(trained / "frozen")) == {"opens_bracket", "digit"}  # no parameters, so not there


def test_a_killed_run_goes_on_bit_for_bit(folder, kind, trained):
  workdir = folder / "runs" / f"killed {kind}"
  with pytest.raises(KilledError):
    run(config_of(folder, kind), workdir, evaluate_until(29))
  assert not (workdir / "model").exists()
  run(config_of(folder, kind), workdir, evaluate_until(STEPS))
  assert_same_run(workdir, trained)


def test_the_decoder_writes_of_held_out_images_too(trained):
  measured = [line["held_out_lm"] for line in logged(trained) if "held_out_lm" in line]
  assert len(measured) == STEPS // 10 and all(np.isfinite(measured)) and len(set(measured)) == len(measured)


def test_cached_features_give_the_same_loss(trained, cached):
  line, = logged(cached)
  assert line["lm"] == pytest.approx(logged(trained)[0]["lm"], rel=1e-5)


# --- what a run leaves, and a run that starts from it --------------------------------------------


def test_the_model_directory_scores_statements(folder, cached, trained):
  """What it was trained on is likelier than after the first step."""
  about = checkpoint.load_config(trained / "model")
  assert about["kind"] == "generative" and about["model"]["prompt"] == "question: {question} answer:"
  records = list(stages.read_records(folder / "taught"))
  corpus = corpus_of(records, folder / "words" / "images")
  with jax.set_mesh(parallel.make_mesh(devices=jax.devices()[:1])):
    before, after = (scoring.statement_likelihoods(build.load(model), corpus, progress=False)
                     for model in (cached / "model", trained / "model"))
  assert set(after) == {s.index for r in records for s in r.statements}
  assert all(item.lowest <= item.mean < 0 and item.tokens > 0 for item in after.values())
  total = lambda found: sum(item.total for item in found.values())
  assert total(after) > total(before)


def test_a_benchmark_is_scored_by_likelihood_alone(folder, trained, tmp_path):
  items = choices.choice_items(stages.read_records(folder / "words"), np.random.default_rng(0), 2)
  choices.write_items(tmp_path / "items.jsonl", items)
  metrics = benchmarks.run_scenes(trained / "model", tmp_path / "items.jsonl", folder / "words" / "images",
                                  tmp_path / "out")
  assert all(set(heads) == {"lm"} for heads in metrics["columns"].values())
  rows = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
  for column in ("q_a", "qa_r"):
    asked = [row for row in rows if row["column"] == column]
    assert len(asked) == len(items) and all(score < 0 for row in asked for score in row["scores"]["lm"])
    hits = [row["chosen"]["lm"] == row["label"] for row in asked]
    assert metrics["columns"][column]["lm"] == pytest.approx(np.mean(hits))


def test_a_stage_is_scored(folder, kind, trained, tmp_path):
  scored = scoring.score_stages(folder / "taught", folder / "words" / "images", trained / "model", tmp_path)
  assert scored.summary["rejected"] == 0 and "uncalibrated" in scored.worth


def test_the_decoder_is_that_of_the_model_to_start_from(folder, kind):
  """What a config says of it comes on top, such as how it is computed; another kind is refused."""
  config, tokenizer = config_of(folder, kind), load_tokenizer(folder / f"tokenizer {kind}")
  stored = build.model_config("generative", checkpoint.load_config(folder / kind)["model"])
  config.model.decoder.update(remat="full", scan=False)
  assert sized(config, tokenizer).decoder == dataclasses.replace(stored.decoder, remat="full")
  other = load_tokenizer(folder / f"tokenizer {OTHER[kind]}")
  with pytest.raises(DataError, match=r"pads and ends texts with tokens \(.*; they do not belong together"):
    sized(config, other)
  config.model.language_model = OTHER[kind]
  with pytest.raises(DataError, match=rf"model.language_model={config.model.language_model}: .* has "
                     rf"{kind}; set it to that"):
    sized(config, tokenizer)


def test_a_new_decoder_fits_the_tokenizer(folder, kind):
  config, tokenizer = config_of(folder, kind), load_tokenizer(folder / f"tokenizer {kind}")
  config.init.model = ""
  config.model.decoder = ConfigDict(dict(width=20, heads=4))
  found = sized(config, tokenizer).decoder
  names = {"opt": ("</s>", "Ċ"), "t5": ("<pad>", "</s>")}[kind]
  assert (found.width, found.heads, found.vocabulary) == (20, 4, tokenizer.get_vocab_size())
  assert tuple(map(tokenizer.id_to_token, (found.start, found.end))) == names
  assert tokenizer.id_to_token(found.pad) == "<pad>"


@pytest.mark.parametrize("kind,change,error", [
  ("t5", dict(loss=dict(question=0.5)), "loss.question=0.5: T5 reads questions and writes none; set it to 0"),
  ("opt", dict(data=dict(text_tokens=95)), "data.text_tokens=95: this model takes texts of at most 94"),
])
def test_what_cannot_be_trained_is_one_line(folder, kind, change, error, tmp_path):
  config = config_of(folder, kind)
  for group, values in change.items():
    config[group].update(values)
  with pytest.raises(DataError, match=error) as caught:
    run(config, tmp_path / "run")
  assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()
