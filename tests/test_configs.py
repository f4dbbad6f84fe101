"""Every config file: it makes a config, its docstring's command is one, and its model can be built."""
import dataclasses
import importlib
from pathlib import Path
import re
import shlex

from flax import nnx
import jax
import numpy as np
import pytest

from configs import common
from lskd_jax import cli, optim, parallel, step
from lskd_jax.batches import loader_options
from lskd_jax.config_files import known_keys, load_config
from lskd_jax.models.build import run_config
from lskd_jax.models.critic import Critic
from lskd_jax.models.decoders.opt import OPT_2_7B
from lskd_jax.models.decoders.t5 import FLAN_T5_XXL
from lskd_jax.models.generative import DECODERS, GenerativeStudent
from lskd_jax.models.student import Student, Tagger
from lskd_jax.models.vit import CLIP_VIT_L, EVA_VIT_G

FOLDER = Path(common.__file__).parent
ALL = sorted(path.stem for path in FOLDER.glob("[a-z]*.py")
             if not path.stem.startswith("launch"))  # of machines, not of runs: tests/launch
DEFAULTS = ("common", "scenes")  # what runs start from; no runs of their own
RUNS = [name for name in ALL if name not in DEFAULTS]
VOCABULARY = 600


def module(name):
  return importlib.import_module(f"configs.{name}")


def commands(name):
  """The shell commands of a config's docstring, as lists of words."""
  text = re.sub(r"\\\n", " ", module(name).__doc__)
  lines = [line.strip() for line in text.splitlines()]
  return [shlex.split(line) for line in lines if line.startswith(("lskd ", "python "))]


@pytest.mark.parametrize("name", ALL)
def test_a_config_has_the_keys_of_the_defaults_and_no_other(name):
  """But for the sizes of a decoder, which the defaults leave to `init.model`."""
  config = module(name).get_config()
  more = set(known_keys(config)) ^ set(known_keys(common.get_config()))
  sizes = {field.name for field in dataclasses.fields(DECODERS[config.model.language_model][0])}
  assert {key.removeprefix("model.decoder.") for key in more} <= sizes


@pytest.mark.parametrize("name", ALL)
def test_two_configs_share_nothing(name):
  """A run that changes its config changes no other's."""
  first, second = module(name).get_config(), module(name).get_config()
  before = second.to_json_best_effort()
  first.data.texts.captions = 99.0
  first.model.vit.width = 99
  assert second.to_json_best_effort() == before


@pytest.mark.parametrize("name", RUNS)
def test_the_docstring_has_commands_that_can_be_typed(name, capsys):
  """`lskd train` with this config, or a script that uses it; and only verbs, files and keys there are."""
  uses = 0
  for program, *words in commands(name):
    if program == "python":
      uses += name in (FOLDER.parent / words[0]).read_text()
      continue
    if words[0] == "train":
      assert words[words.index("--config") + 1] == f"configs/{name}.py" and "--workdir" in words
      overrides = [word.removeprefix("--config.") for word in words if word.startswith("--config.")]
      assert any(override.startswith("data.corpus=") for override in overrides)
      load_config(FOLDER / f"{name}.py", overrides)
      uses += 1
    verb = words[:2 if words[0] == "corpus" else 1]
    with pytest.raises(SystemExit) as ended:
      cli.main([*verb, "--help"])
    assert ended.value.code == 0
    options = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
    assert {word for word in words if re.fullmatch(r"--[a-z-]+", word)} <= options
  assert uses == 1


@pytest.mark.parametrize("name", RUNS)
def test_the_docstring_says_what_to_expect(name):
  assert "Expected: " in module(name).__doc__


@pytest.mark.parametrize("name", ALL)
def test_the_model_of_a_config_can_be_built_and_trained(name):
  """Shapes only: the model, the part that is trained, its optimizer, and what the loader gives."""
  config = module(name).get_config()
  sizes = config.model.to_dict()
  sizes["qformer"]["vocabulary"] = sizes["decoder"]["vocabulary"] = VOCABULARY
  about = run_config(config.task, {**sizes, "region_mode": config.data.region_mode})
  tables = np.zeros(VOCABULARY, bool), np.full(VOCABULARY, -1, np.int32)
  make = {"tagger": lambda rngs: Tagger(about, *tables, rngs),
          "student": lambda rngs: Student(about, *tables, rngs),
          "generative": lambda rngs: GenerativeStudent(about, *tables, rngs),
          "critic": lambda rngs: Critic(Student(about, *tables, rngs), rngs)}[config.task]
  with jax.set_mesh(parallel.make_mesh()):
    model = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
    _, params, frozen = step.split(model, tuple(config.train.frozen))
    state = jax.eval_shape(lambda p: step.init_state(p, optim.optimizer(config.optim)), params)
  assert sum(leaf.size for leaf in jax.tree.leaves(state["params"])) > 10_000
  for part in config.train.frozen:
    assert nnx.to_flat_state(frozen.filter(nnx.PathContains(part)))
  assert loader_options(config).batch_size == config.data.batch_size
  assert config.data.text_tokens <= about.max_tokens


def test_the_defaults_are_of_the_size_of_blip_2():
  """ViT-g/14 without its last block, as in BLIP-2: 39 blocks, 986 million parameters."""
  config = common.get_config()
  about = run_config("student", config.model.to_dict())
  tables = np.zeros(about.qformer.vocabulary, bool), np.zeros(about.qformer.vocabulary, np.int32)
  with jax.set_mesh(parallel.make_mesh()):
    model = nnx.eval_shape(lambda: Student(about, *tables, nnx.Rngs(0)))
  d, f = 1408, 6144
  block = (4 * d * d + 4 * d) + (2 * d * f + f + d) + 4 * d  # attention, MLP, two norms
  inputs = (14 * 14 * 3 + 1) * d + d + (1 + 16 * 16) * d     # patches, class token, positions
  assert sum(leaf.size for leaf in jax.tree.leaves(nnx.split(model.vit)[1])) == 39 * block + inputs


@pytest.mark.parametrize("name,tower", [("common", EVA_VIT_G), ("blip2_vit_l", CLIP_VIT_L)])
def test_published_towers_have_their_names(name, tower):
  assert run_config("student", module(name).get_config().model.to_dict()).vit == tower


def test_the_generative_students_decoder_is_opt_2_7b_and_frozen():
  config = module("blip2_opt").get_config()
  about = run_config("generative", config.model.to_dict())
  assert about.decoder == dataclasses.replace(OPT_2_7B, remat="dots")
  assert about.prompt == "question: {question} answer:"
  assert set(config.train.frozen) == {"vit", "decoder"}
  assert (config.loss.question, config.loss.smoothing) == (0, 0)


def test_the_large_generative_students_decoder_is_flan_t5_xxl():
  about = run_config("generative", module("blip2_t5_xxl").get_config().model.to_dict())
  assert about.decoder == dataclasses.replace(FLAN_T5_XXL, remat="dots")
