"""The borders of the design: which module may import which, and what no file may contain.

Imports are read from the source, so also those inside functions count.
"""
import ast
from pathlib import Path
import re
import sys

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("lskd_jax", "data_pipeline", "configs", "launch")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
LONGEST_FILE = 400  # lines: what can be read in one sitting

# The order of lskd_jax: a module imports modules of its own or an earlier row only.
ORDER = [
    ["lskd_jax.exit_codes", "lskd_jax.errors", "lskd_jax.peers"],  # how a process ends; without jax
    ["lskd_jax.agreement", "lskd_jax.streams", "lskd_jax.trees", "lskd_jax.committed", "lskd_jax.frozen",
     "lskd_jax.checkpoint", "lskd_jax.optim", "lskd_jax.guard", "lskd_jax.tensorboard",
     "lskd_jax.metrics", "lskd_jax.goodput", "lskd_jax.profiles"],  # the leaves
    ["lskd_jax.parallel"],
    ["lskd_jax.models.layers"],
    ["lskd_jax.models.vit", "lskd_jax.models.qformer", "lskd_jax.models.regions",
     "lskd_jax.models.decoders", "lskd_jax.models.fused_attention"],  # the towers
    ["lskd_jax.models"],  # student, critic, generate: what is made of towers
    ["lskd_jax.rows", "lskd_jax.contrast", "lskd_jax.negatives", "lskd_jax.losses"],
    ["lskd_jax.step"],
    ["lskd_jax.signals", "lskd_jax.preemption", "lskd_jax.watchdog"],  # what looks after a process
    # What a run needs besides the step: models from directories, cached features, judgements.
    ["lskd_jax.models.build", "lskd_jax.features", "lskd_jax.judged", "lskd_jax.fed", "lskd_jax.not_finite",
     "lskd_jax.frozen_dtype", "lskd_jax.parameter_table", "lskd_jax.batches", "lskd_jax.held_out",
     "lskd_jax.prepare", "lskd_jax.workdir"],
    ["lskd_jax.train", "lskd_jax.replay", "lskd_jax.evaluate", "lskd_jax.convert"],
    ["lskd_jax"],  # everything else: commands and what users call
]
LEAVES = ORDER[1]
USE_LEAVES = 7  # rows from here on (step, train, ...) may import leaves; towers and losses may not


def module_name(path: Path) -> str:
  parts = path.relative_to(ROOT).with_suffix("").parts
  return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in SOURCES}


def imports(path: Path) -> set[str]:
  """Full names of what a file imports; `from a import b` is a.b if that is a module of ours."""
  found = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f"{path}: write imports in full, not relative"
      for alias in node.names:
        full = f"{node.module}.{alias.name}"
        found.add(full if full in MODULES else node.module)
  return found


def top(name: str) -> str:
  return name.split(".")[0]


def row(module: str) -> int:
  """The row of ORDER whose longest prefix fits the module."""
  def fit(prefix):
    return len(prefix) if f"{module}.".startswith(f"{prefix}.") else 0
  return max(range(len(ORDER)), key=lambda r: max(map(fit, ORDER[r])))


def modules_of(package: str) -> list[str]:
  return [name for name in MODULES if top(name) == package]


@pytest.mark.parametrize("module", modules_of("data_pipeline"))
def test_data_pipeline_knows_nothing_of_jax(module):
  """Corpora are built and read on machines without JAX; a model comes in as a callable."""
  assert not {top(name) for name in imports(MODULES[module])} & {
      "jax", "jaxlib", "flax", "optax", "orbax", "lskd_jax", "configs"}


@pytest.mark.parametrize("module", modules_of("configs"))
def test_configs_import_ml_collections_and_each_other_only(module):
  allowed = {"ml_collections", "configs"} | set(sys.stdlib_module_names)
  assert {top(name) for name in imports(MODULES[module])} <= allowed


@pytest.mark.parametrize("module", modules_of("launch"))
def test_the_launcher_starts_without_jax(module):
  """It runs on laptops and looks after machines; of ours it takes the restart policy, configs and files."""
  allowed = {"launch", "configs", "ml_collections", "yaml"} | set(sys.stdlib_module_names)
  ours = {"lskd_jax.supervisor", "lskd_jax.exit_codes", "lskd_jax.config_files", "data_pipeline.records",
          "data_pipeline.stages", "lskd_jax"}
  assert {name for name in imports(MODULES[module]) if top(name) not in allowed} <= ours


@pytest.mark.parametrize("module", modules_of("lskd_jax"))
def test_lskd_jax_imports_in_one_direction(module):
  ours = {name for name in imports(MODULES[module]) if top(name) == "lskd_jax"}
  if module == "lskd_jax":
    return  # only `load`, when it is called
  for name in ours - {"lskd_jax", "lskd_jax.exit_codes"}:  # the version, and a table of numbers: for all
    if name in LEAVES:
      assert module in LEAVES or row(module) >= USE_LEAVES, f"{module} imports the leaf {name}"
    else:
      assert row(name) <= row(module), f"{module} imports {name}, which comes after it"


def test_the_order_is_read_as_meant():
  assert row("lskd_jax.models.layers") < row("lskd_jax.models.vit") < row("lskd_jax.models.student")
  assert row("lskd_jax.models.decoders.opt") == row("lskd_jax.models.vit")
  assert row("lskd_jax.evaluate.vcr") == row("lskd_jax.train") < row("lskd_jax.cli")


def test_no_import_cycles():
  graph = {name: {other for other in imports(path) if other in MODULES and other != name}
           for name, path in MODULES.items() if name != "lskd_jax"}
  done = set()

  def visit(name, trail):
    assert name not in trail, " -> ".join([*trail, name])
    if name not in done:
      for other in graph.get(name, ()):
        visit(other, [*trail, name])
      done.add(name)

  for name in graph:
    visit(name, [])


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_files_are_readable_in_one_sitting(path):
  assert len(path.read_text().splitlines()) <= LONGEST_FILE
  assert path.name != "utils.py", "name a file after what it is about"


def python_files():
  return [*SOURCES, *(path for folder in ("tests", "benchmarks")
                      for path in (ROOT / folder).rglob("*.py"))]


def test_tensorflow_is_imported_nowhere():
  """TFDS is used without it: TensorFlow is large, and clashes with other packages' protobuf."""
  users = [str(path.relative_to(ROOT)) for path in python_files()
           if {"tensorflow", "tensorflow_text"} & {top(name) for name in imports(path)}]
  assert users == []


def texts():
  """Every file of the project that a reader may open as text."""
  endings = {".py", ".md", ".toml", ".txt", ".sh", ".bib", ".html", ".jinja", ".json", ".yml",
             ".yaml", ".cfg", ".js", ".css", ""}
  for path in sorted(ROOT.rglob("*")):
    parts = path.relative_to(ROOT).parts
    hidden = any(part.startswith(".") and part != ".ci" for part in parts)
    made = any(part in ("shared", "build", "dist", "venv", "runs", "demo") or "egg-info" in part
               for part in parts)
    if path.is_file() and path.suffix in endings and not hidden and not made:
      yield path


def test_no_file_holds_a_path_of_somebodys_machine():
  pattern = re.compile(r"(?<![\w.])/(?:home|Users|root)/\w+")
  found = [f"{path.relative_to(ROOT)}: {match.group()}" for path in texts()
           for match in pattern.finditer(path.read_text(errors="replace"))]
  assert found == []
