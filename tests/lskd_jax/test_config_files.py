"""Config files and what the command line changes in them."""
import pytest

from data_pipeline.records import DataError
from lskd_jax.config_files import known_keys, load_config, set_value

FILE = """
from ml_collections import ConfigDict, FieldReference

def get_config():
  return ConfigDict(dict(
    steps=10, name="run", min_score=None,
    optim=dict(learning_rate=1e-3, warmup_steps=5), mesh=(1, 1), parts=(), augment=False,
    size=FieldReference(224, field_type=object)))
"""


@pytest.fixture
def file(tmp_path):
  path = tmp_path / "own.py"
  path.write_text(FILE)
  return path


@pytest.mark.parametrize("override,key,value", [
    ("steps=12", "steps", 12),
    ("optim.learning_rate=1e-4", "optim.learning_rate", 1e-4),
    ("optim.learning_rate=1", "optim.learning_rate", 1.0),
    ("name=a run", "name", "a run"),
    ("name=12", "name", "12"),
    ("name='12'", "name", "12"),
    ("name=a=b", "name", "a=b"),
    ("name=", "name", ""),
    ("augment=true", "augment", True),
    ("augment=False", "augment", False),
    ("mesh=(4,2)", "mesh", (4, 2)),
    ("mesh=[4, 2]", "mesh", (4, 2)),
    ("parts=('vit',)", "parts", ("vit",)),
    ("parts='vit'", "parts", ("vit",)),
    ("min_score=0.8", "min_score", 0.8),
    ("min_score=None", "min_score", None),
    ("size=364", "size", 364),
    ("size=(224,448)", "size", (224, 448)),
    ("size=224,448", "size", (224, 448)),
])
def test_a_value_is_read_as_the_type_of_its_default(file, override, key, value):
  config = load_config(file, [override])
  for name in key.split("."):
    config = config[name]
  assert config == value and type(config) is type(value)


def test_the_last_of_two_overrides_counts(file):
  assert load_config(file, ["min_score=0.8", "min_score=None"]).min_score is None


@pytest.mark.parametrize("override,error", [
    ("optim.learning_rat=1", "'optim.learning_rat' is unknown; did you mean 'optim.learning_rate'"),
    ("stebs=1", "'stebs' is unknown; did you mean 'steps'"),
    ("warmup_steps=1", "did you mean 'optim.warmup_steps'"),
    ("optim.zzz=1", "'optim.zzz' is unknown; there are learning_rate, warmup_steps"),
    ("name.first=1", "'name.first' is unknown"),
    ("optim=3", "'optim' is a group; set one of learning_rate, warmup_steps"),
    ("steps", "--config.steps: has no value"),
    ("steps=1.5", "--config.steps=1.5: a whole number is wanted"),
    ("steps=many", "--config.steps=many: a whole number is wanted"),
    ("steps=None", "a whole number is wanted"),
    ("augment=1", "--config.augment=1: true or false is wanted"),
    ("optim.learning_rate=fast", "a number is wanted"),
    ("mesh=(4,'a')", r"a list like the default \(1, 1\) is wanted"),
    ("mesh=(4,", "a list such as"),
    ("size=224x448", r"a whole number or a pair such as \(224, 448\) is wanted"),
    ("size=1.5", "a whole number or a pair"),
    ("min_score=high", "a number, None or a text in quotes is wanted"),
])
def test_a_wrong_key_or_type_is_one_line_that_names_it(file, override, error):
  with pytest.raises(DataError, match=error) as caught:
    load_config(file, [override])
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text,error", [
    ("x = 1", r"own.py: has no function get_config\(\)"),
    ("def get_config():\n  return {}", r"get_config\(\) returns a dict, not a ConfigDict"),
    ("def get_config(:", r"own.py:1: SyntaxError"),
    ("import nothing_of_this_name", r"own.py:1: ModuleNotFoundError"),
    ("def get_config():\n  a = 1\n  return a['b']", r"own.py:3: TypeError"),
    ("def get_config():\n  return {}['b']", r"own.py:2: KeyError"),
])
def test_an_error_in_the_file_names_its_line(file, text, error):
  file.write_text(text)
  with pytest.raises(DataError, match=error) as caught:
    load_config(file)
  assert "\n" not in str(caught.value)


def test_shipped_configs_are_found_from_anywhere(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert load_config("configs/common.py").optim.steps == 10_000
  assert load_config("common.py", ["optim.steps=3"]).optim.steps == 3
  with pytest.raises(DataError, match="--config own.py: no such file; give one, or one of"):
    load_config("own.py")


def test_every_key_of_the_defaults_can_be_set_to_its_own_value():
  config = load_config("configs/common.py")
  before = config.to_json_best_effort()
  for key in known_keys(config):
    group = config
    for name in key.split("."):
      group = group[name]
    set_value(config, key, str(group))
  assert config.to_json_best_effort() == before
