"""Training runs, from a config and a work directory to a model directory.

One corpus of eight scenes and a chain of runs of a few steps, as a user would make them: a ViT on
words (extended by the guard), a student that starts from it, a critic that starts from the student.
"""
import gc
import json

import jax
import numpy as np
import pytest

from configs import scenes
from data_pipeline import corpus_stages, judge, stages
from data_pipeline.records import DataError
from data_pipeline.tokenizer import load_tokenizer
from lskd_jax import checkpoint, parallel
from lskd_jax.evaluate.candidates import Scorer
from lskd_jax.guard import needs_more
from lskd_jax.metrics import read_metrics
from lskd_jax.models import build
from lskd_jax.prepare import sized
from lskd_jax.replay import reproduce_step
from lskd_jax.train import Run, train
from lskd_jax.trees import named_leaves, read_manifest

RATES = {"steps_per_second", "images_per_second", "statements_per_second", "data_wait_share",
         "evaluation_share", "save_share", "step_share", "mfu"}


class KilledError(Exception):
  """What a run that is killed does not survive."""


def tiny_config(folder, **groups):
  """A student (LM only) or a tagger that compiles in seconds, on the corpus in `folder`."""
  config = scenes.get_config()
  config.model.embed = 8
  config.model.max_regions = 6
  config.model.vit.update(image_size=48, width=16, depth=1, heads=2, hidden=32)
  config.model.qformer.update(width=16, depth=1, cross_every=1, heads=2, hidden=32, queries=2,
                              dropout=0.1)
  config.data.update(corpus=str(folder / "taught"), image_root=str(folder / "words" / "images"),
                     batch_size=2, statements=2, text_tokens=32)
  config.loss.update(itc=0.0, itm=0.0)
  config.optim.update(warmup_steps=0, steps=4)
  config.train.update(save_every=2, log_every=1, tensorboard=False)
  for name, values in groups.items():
    if isinstance(values, dict):
      config[name].update(values)
    else:
      config[name] = values
  return config


def words_config(folder, **groups):
  """Four steps of the ViT on words, or eight where the guard extends the run."""
  config = tiny_config(folder, task="tagger", train=dict(frozen=()), eval=dict(every=2), **groups)
  config.data.texts.update(statements=0.0, captions=0.5, descriptions=0.5)
  config.optim.learning_rate = 1e-2
  return config


def student_config(folder, **groups):
  return tiny_config(folder, init=dict(model=str(folder / "runs/words/model"), parts=("vit",)),
                     eval=dict(every=1), **groups)


def run(config, workdir, evaluate=None):
  return train(config, workdir, evaluate=evaluate, progress=False)


def at_chance(graph, state, step):
  return {"dev_q_a": 0.25}


def killed_at(step):
  """An evaluation in which the process dies, before the step is saved."""
  def evaluate(graph, state, now):
    if now == step:
      raise KilledError
    return {"dev_q_a": 0.25}
  return evaluate


def parameters(workdir):
  return named_leaves(checkpoint.load_model(workdir / "model")[1])


def logged(workdir):
  """The metrics without what depends on the clock."""
  return [{name: value for name, value in line.items() if name not in RATES}
          for line in read_metrics(workdir / "metrics.jsonl")]


def assert_same_run(left, right):
  left_parameters, right_parameters = parameters(left), parameters(right)
  assert list(left_parameters) == list(right_parameters)
  for name in left_parameters:
    np.testing.assert_array_equal(left_parameters[name], right_parameters[name], err_msg=name)
  assert logged(left) == logged(right)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Eight taught scenes and judgements of half of their statements."""
  folder = tmp_path_factory.mktemp("train")
  corpus_stages.verbalize_scenes(folder / "words", 8, progress=False)
  corpus_stages.teach_corpus(folder / "words", folder / "taught", progress=False)
  judged = judge.judge_from_scene(stages.read_records(folder / "taught"), np.random.default_rng(0), 0.5)
  judge.write_judgements(folder / "judgements.jsonl", judged)
  return folder


@pytest.fixture(scope="module")
def words(folder):
  """A tagger at chance at half of its four steps, and therefore extended."""
  assert run(words_config(folder), folder / "runs/words", at_chance) == Run(
    folder / "runs/words/model", 8, True)
  return folder / "runs/words"


class Watch:
  """An evaluation that notes what can be seen of a run from outside."""

  def __init__(self):
    self.compiled, self.before, self.likelihoods = 0, {}, None
    jax.monitoring.register_event_duration_secs_listener(self._listen)

  def _listen(self, event, seconds, **unused):
    self.compiled += "backend_compile" in event

  def __call__(self, graph, state, step):
    self.before[step] = self.compiled
    if step == 4:
      self.likelihoods = likelihoods(graph, state)
    return {"evaluated": step / 10}


def likelihoods(graph, state):
  """The student's log-likelihoods of some tokens beside a grey picture with one region."""
  rows = {"image": np.full((1, 48, 48, 3), 99, np.uint8), "boxes": np.zeros((1, 6, 4), np.float32),
          "region_valid": np.arange(6)[None] < 1, "tokens": np.arange(2, 34, dtype=np.int32)[None, None]}
  rows["boxes"][0, 0] = 0.1, 0.2, 0.7, 0.9
  return Scorer(graph, state, heads=False)(rows)["words"]


@pytest.fixture(scope="module")
def student(folder, words):
  """Four uninterrupted steps with dropout, on the ViT of `words`: (work directory, what was seen)."""
  watch = Watch()
  run(student_config(folder), folder / "runs/student", watch)
  return folder / "runs/student", watch


# --- the ViT on words, and the guard -------------------------------------------------------------


def test_a_tagger_learns_words(words):
  loss = [line["loss"] for line in logged(words)]
  assert loss[-1] < 0.95 * loss[0]
  assert checkpoint.load_config(words / "model")["kind"] == "tagger"


def test_a_run_at_chance_is_extended_once_and_says_so(words):
  assert json.loads((words / "done.json").read_text()).items() >= {"step": 8, "extended": True}.items()
  assert [line["step"] for line in logged(words)] == list(range(1, 9))
  assert [line["step"] for line in logged(words) if "dev_q_a" in line] == [2, 4, 6, 8]


def test_an_extended_run_that_is_killed_keeps_its_length_and_goes_on_bit_for_bit(folder, words):
  workdir = folder / "runs/killed words"
  with pytest.raises(KilledError):
    run(words_config(folder), workdir, killed_at(6))
  assert not (workdir / "done.json").exists()
  assert run(words_config(folder), workdir, at_chance) == Run(workdir / "model", 8, True)
  assert_same_run(workdir, words)


@pytest.mark.parametrize("now,found,more", [
    (2, 0.31, True),    # half done and at chance
    (3, 0.31, True),    # at a later look, too
    (2, 0.32, False),   # has left chance
    (1, 0.31, False),   # too early to say
    (4, 0.31, False),   # done
])
def test_which_runs_are_extended(now, found, more):
  config = scenes.get_config()
  config.optim.steps = 4
  config.guard.update(metric="dev_q_a", at=0.5, below=0.32, factor=2.0)
  assert needs_more(config, {"dev_q_a": found}, now) == more
  assert not needs_more(config, {"another metric": 0.0}, now)


# --- a student: resuming, and what it leaves -----------------------------------------------------


def test_a_killed_run_goes_on_bit_for_bit(folder, student):
  """Two steps, then death in the fourth with the third unsaved; dropout, data and log go on."""
  workdir = folder / "runs/killed"

  def evaluate(graph, state, step):
    if step == 3:
      raise KilledError
    return {"evaluated": step / 10}
  with pytest.raises(KilledError):
    run(student_config(folder), workdir, evaluate)
  with (workdir / "metrics.jsonl").open("a") as file:
    file.write('{"step": 4, "lo')
  assert not (workdir / "model").exists()
  run(student_config(folder), workdir, lambda graph, state, step: {"evaluated": step / 10})
  assert_same_run(workdir, student[0])


def test_a_finished_run_returns_at_once(folder, student):
  workdir, _ = student
  config = student_config(folder)
  wanted = config.to_json_best_effort()
  before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}

  def never(graph, state, step):
    raise AssertionError("a finished run is not evaluated again")
  for _ in range(2):
    assert run(config, workdir, never) == Run(workdir / "model", 4, False)
  assert {path: path.stat().st_mtime_ns for path in workdir.rglob("*")} == before
  assert config.to_json_best_effort() == wanted  # a run leaves its caller's config alone


def test_the_config_a_run_was_given_is_not_changed(folder, words):
  """One config object can be used for several runs."""
  config = words_config(folder)
  assert run(config, words) == run(config, words)


@pytest.mark.parametrize("group,key,value", [("optim", "learning_rate", 1.0), ("data", "statements", 3),
                                             (None, "seed", 1)])
def test_another_config_in_the_same_work_directory_is_refused(folder, student, group, key, value):
  config = student_config(folder)
  (config[group] if group else config)[key] = value
  name = f"config.{group}.{key}" if group else f"config.{key}"
  with pytest.raises(DataError, match=f"started with another {name} .*use another --workdir"):
    run(config, student[0])


def test_a_run_goes_on_with_another_mesh_and_other_saves(folder, student):
  config, workdir, turns = student_config(folder), folder / "runs/moved", []

  def evaluate(graph, state, step):
    if step == 3 and not turns:
      turns.append("killed")
      raise KilledError
    return {"evaluated": step / 10}
  with pytest.raises(KilledError):
    run(config, workdir, evaluate)
  config.train.mesh.update(data=2, fsdp=1)
  config.train.update(save_every=1, keep=1)
  assert run(config, workdir, evaluate).steps == 4
  assert [path.name for path in (workdir / "checkpoints").iterdir()] == ["4"]
  for line, expected in zip(logged(workdir), logged(student[0]), strict=True):
    assert line["loss"] == pytest.approx(expected["loss"], rel=1e-5)


def test_a_second_run_in_the_same_work_directory_is_refused(folder, tmp_path):
  config = words_config(folder)
  config.train.grace = 0.01
  with stages.locked(tmp_path), pytest.raises(DataError, match="another process is writing to it"):
    run(config, tmp_path, at_chance)
  assert not (tmp_path / "config.json").exists()


@pytest.mark.parametrize("key", ["corpus", "image_root"])
def test_a_mistyped_path_claims_nothing(folder, tmp_path, key):
  config = words_config(folder)
  config.data[key] = str(folder / "mistyped")
  with pytest.raises(DataError, match="mistyped"):
    run(config, tmp_path / "run", at_chance)
  assert not (tmp_path / "run").exists()


def test_a_refused_config_leaves_no_tokenizer_to_another(folder, tmp_path, words):
  refused = words_config(folder)
  refused.data.update(vocabulary=150, text_tokens=1000)
  with pytest.raises(DataError, match="data.text_tokens=1000"):
    run(refused, tmp_path, at_chance)
  run(words_config(folder), tmp_path, at_chance)
  assert_same_run(tmp_path, words)


def test_a_step_after_an_extension_again_from_before_it(folder, words):
  """The learning rate of the steps before it was that of the short run."""
  found = reproduce_step(words_config(folder), words, 4, progress=False)
  assert (found.start, found.differences()) == (0, []) and found.logged


@pytest.mark.parametrize("group,key,value,error", [
    ("optim", "warmup_steps", 4, "warmup_steps=4 must be at least 0 and less than steps=4"),
    ("train", "log_every", 0, "train.log_every=0 must be at least 1"),
    ("train", "max_skipped", 0, "train.max_skipped=0 must be at least 1"),
    ("train", "keep_best", 1, "keep_best=1 needs the name of a metric"),
    ("data", "batch_size", 3, "data.batch_size=3: the mesh splits batches over 2 groups of devices")])
def test_a_config_that_cannot_be_run_leaves_no_folder(folder, tmp_path, group, key, value, error):
  config = words_config(folder)
  config.train.mesh.fsdp = 2
  config[group][key] = value
  with pytest.raises(ValueError, match=error):
    run(config, tmp_path / "run", at_chance)
  assert not (tmp_path / "run").exists()


def bytes_in_use():
  """The bytes of all arrays on devices, those that share memory counted once."""
  gc.collect()
  arrays = (array for array in jax.live_arrays() if array.dtype != jax.random.key(0).dtype)  # has no buffer
  shards = (shard.data for array in arrays for shard in array.addressable_shards)
  return sum({shard.unsafe_buffer_pointer(): shard.nbytes for shard in shards}.values())


def test_a_resumed_run_holds_its_state_once(folder, words, tmp_path):
  """What it was made with is gone when the checkpoint is there."""
  before, used = bytes_in_use(), {}

  def look(graph, state, step):
    used[step] = bytes_in_use() - before
    if step == 2 and "killed" not in used:
      used["killed"] = True
      raise KilledError
    return {}

  config = student_config(folder)
  config.train.save_every = 1
  with pytest.raises(KilledError):
    run(config, tmp_path, look)
  run(config, tmp_path, look)
  state = sum(array.nbytes for array in parameters(tmp_path).values())
  assert used[1] > state  # and the optimizer's
  assert used[2] == pytest.approx(used[1], rel=0.01)


def test_a_frozen_vit_stays_bit_for_bit_and_the_rest_learns(folder, words, student):
  initial, trained = parameters(words), parameters(student[0])
  frozen = [name for name in trained if name.startswith("vit/")]
  assert len(frozen) > 5
  for name in frozen:
    np.testing.assert_array_equal(trained[name], initial[name], err_msg=name)
  saved = checkpoint.Checkpointer(student[0]).directory
  assert sorted(path.name for path in saved.iterdir()) == ["4"]  # train.keep = 1
  losses = [line["lm"] for line in logged(student[0])]
  assert len(losses) == 4 and losses[-1] < losses[0]


def test_a_vit_that_was_frozen_in_bfloat16_leaves_with_all_its_bits(folder, words):
  """On the device and in `frozen/` are its rounded kernels, in the model directory the original ones."""
  config = words_config(folder, init=dict(model=str(words / "model"), parts=("vit",)))
  config.model.dtype = "bfloat16"
  config.train.update(frozen=("vit",), frozen_dtype="bfloat16")
  config.optim.steps = 2
  workdir = folder / "runs/narrow"
  run(config, workdir, at_chance)
  stored = read_manifest(workdir / "frozen")
  assert {stored[name]["dtype"] for name in stored if name.endswith("kernel")} == {"bfloat16"}
  initial, trained = parameters(words), parameters(workdir)
  for name in initial:
    same = np.array_equal(trained[name], initial[name])
    assert same == name.startswith("vit/") and trained[name].dtype == np.float32, name


def test_the_step_compiles_once(student):
  _, watch = student
  assert sorted(watch.before) == [1, 2, 3, 4]
  assert 0 < watch.before[1] == watch.before[4]  # also over the save at step 2


def test_the_log_has_losses_evaluations_and_rates(student):
  lines = read_metrics(student[0] / "metrics.jsonl")
  assert [line["evaluated"] for line in lines] == [0.1, 0.2, 0.3, 0.4]
  for line in lines:
    assert {"loss", "lm", "grad_norm", "answer_words_right"} <= set(line)
  assert RATES <= set(lines[-1])


def test_the_model_directory_speaks_as_the_trained_state(student):
  workdir, watch = student
  with jax.set_mesh(parallel.make_mesh()):
    model = build.load(workdir / "model")
    found = likelihoods(model.graph, model.state)
  assert model.kind == "student" and np.isfinite(found).all()
  np.testing.assert_array_equal(found, watch.likelihoods)


# --- cached features, and the critic -------------------------------------------------------------


@pytest.fixture(scope="module")
def cached(folder, student):
  """The student's run again, on cached features."""
  config = student_config(folder, data=dict(cache_features=True, features=str(folder / "features")))
  run(config, folder / "runs/cached", lambda graph, state, step: {"evaluated": step / 10})
  return folder / "runs/cached"


def test_cached_features_give_the_same_losses(student, cached):
  for line, other in zip(logged(student[0]), logged(cached), strict=True):
    assert line == pytest.approx(other, rel=1e-4)


def test_a_critic_learns_judgements_from_the_students_features(folder, student, cached):
  features = folder / "features" / "features.npy"
  before = features.stat().st_mtime_ns
  config = tiny_config(
    folder, task="critic", init=dict(model=str(cached / "model"), parts=("student",)),
    data=dict(cache_features=True, features=str(folder / "features"),
              judgements=str(folder / "judgements.jsonl")))
  config.model.qformer.dropout = 0.0
  config.data.update(batch_size=8, statements=4)  # all pictures at every step
  config.optim.update(steps=8, learning_rate=1e-2)
  found = run(config, folder / "runs/critic")
  assert features.stat().st_mtime_ns == before  # a critic's ViT is its student's
  lines = logged(folder / "runs/critic")
  assert {"accept", "answer", "rationale", "accept_right"} <= set(lines[0])
  assert lines[-1]["loss"] < 0.9 * lines[0]["loss"]
  assert checkpoint.load_config(found.model)["kind"] == "critic"
  trained, source = parameters(folder / "runs/critic"), parameters(cached)
  np.testing.assert_array_equal(trained["student/vit/positions"], source["vit/positions"])


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize("groups,error", [
    (dict(train=dict(microbatches=64)),
     "train.microbatches=64: 2 images over 1 groups .* cannot be divided into 64 equal parts; make data"),
    (dict(loss=dict(itc_block=5)), "loss.itc_block=5 does not divide data.batch_size=2: set it to a divisor"),
    (dict(loss=dict(pool=5)), "loss.pool=5 does not divide data.batch_size=2: set it to a divisor, or to 0"),
    (dict(train=dict(microbatches=0)), "train.microbatches=0 must be at least 1"),
    (dict(loss=dict(itc_block=-1)), "loss.itc_block=-1 must be 0, for all at once, or more"),
    (dict(loss=dict(pool=-1)), "loss.pool=-1: negatives are other images of a pool; set it to 2 or more"),
    (dict(loss=dict(pool=1)), "loss.pool=1: negatives are other images of a pool"),
    (dict(train=dict(frozen=("vitt",))), "train.frozen: the model has no part 'vitt'; its parts are"),
    (dict(train=dict(frozen=()), data=dict(cache_features=True)), "add 'vit' to train.frozen"),
    (dict(data=dict(cache_features=True, region_mode="overlay")), "images=False has no pixels"),
    (dict(task="teacher"), "task 'teacher' is unknown: choose tagger, student, generative, critic"),
    (dict(train=dict(mesh=dict(fsdp=64))), "train.mesh.fsdp=64 needs 64 devices, there are 8"),
    (dict(task="critic", data=dict(texts=dict(captions=0.1))), "data.texts.captions=0.1: a critic"),
])
def test_what_cannot_be_trained_is_one_line(folder, tmp_path, groups, error):
  with pytest.raises(ValueError, match=error) as caught:
    run(tiny_config(folder, **groups), tmp_path)
  assert "\n" not in str(caught.value)


# --- sizes that follow from the start ------------------------------------------------------------


STOCK = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[", "]", *map(str, range(10)), "dog"]


def stock_vocabulary(folder):
  (folder / "tokenizer").mkdir()
  (folder / "tokenizer" / "vocab.txt").write_text("\n".join(STOCK))
  return folder / "tokenizer"


def test_weights_for_other_rows_of_patches_are_refused(folder, tmp_path):
  """Four rows of four patches and two of eight have as many position embeddings."""
  (tmp_path / "config.json").write_text(json.dumps({"model": {
      "vision_eps": 1e-5, "qformer": {"vocabulary": 40}, "vit": {"image_size": [24, 96], "patch": 12}}}))
  tokenizer = load_tokenizer(stock_vocabulary(tmp_path))
  with pytest.raises(DataError, match=r"image_size=48: .* was made for \(24, 96\); set it to that"):
    sized(tiny_config(folder, init=dict(model=str(tmp_path))), tokenizer)


def test_sizes_follow_the_tokenizer_and_the_weights_to_start_from(folder, tmp_path):
  """A stock BERT vocabulary has [DEC] as its last word; transformers' ln_vision has its own eps."""
  start = {"model": {"vision_eps": 1e-6, "qformer": {"vocabulary": 40}}}
  (tmp_path / "config.json").write_text(json.dumps(start))
  tokenizer = load_tokenizer(stock_vocabulary(tmp_path))
  sizes = sized(tiny_config(folder, init=dict(model=str(tmp_path))), tokenizer)
  assert (sizes.decoder_start, sizes.vision_eps, sizes.qformer.vocabulary) == (len(STOCK), 1e-6, 40)
  sizes = sized(tiny_config(folder), tokenizer)
  assert (sizes.vision_eps, sizes.qformer.vocabulary) == (1e-5, len(STOCK) + 1)
