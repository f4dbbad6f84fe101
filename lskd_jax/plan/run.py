"""Plans: what is known already comes from the cache, the rest is compiled in a process of its own."""
from collections.abc import Sequence
import hashlib
from importlib.metadata import PackageNotFoundError, version
import json
import os
from pathlib import Path
import select
import signal
import subprocess
import sys
import tempfile
import time

from tqdm import tqdm

from data_pipeline.records import DataError
from data_pipeline.stages import write_json
from lskd_jax.config_files import load_config
from lskd_jax.plan import files
from lskd_jax.plan.topology import Topology, environment

# Keys of a config that the compiled step does not depend on.
IRRELEVANT = {"name", "seed", "eval", "guard",
              *(f"data.{name}" for name in (
                  "corpus", "image_root", "split", "min_score", "judgements", "features")),
              *(f"train.{name}" for name in (
                  "save_every", "save_minutes", "keep", "keep_best", "best_metric", "best_mode", "log_every",
                  "tensorboard", "grace", "hang_after", "compile_limit", "log_examples"))}


def measured(config: Path | str, overrides: Sequence[str], topology: Topology, low_effort: bool = False,
             label: str = "plan", quiet: bool = False) -> dict:
  """What `measure.measure` finds for a config file with overrides such as "data.batch_size=256".

  Raises DataError: the config or the topology is wrong, or the compiler crashed or was killed.
  """
  loaded = load_config(config, overrides)
  path = cache_folder() / f"{key(loaded, topology, low_effort)}.json"
  if path.exists():
    return json.loads(path.read_text())
  request = dict(config=str(config), overrides=list(overrides), topology=str(topology), low_effort=low_effort)
  facts = compiled(request, environment(topology), label, quiet)
  path.parent.mkdir(parents=True, exist_ok=True)
  write_json(path, facts)
  return facts


def compiled(request: dict, variables: dict, label: str, quiet: bool) -> dict:
  """Runs a worker to its end, with its stage and the time since it began on the terminal.

  An interrupt ends the worker at once, and so does the end of this process.
  """
  with tempfile.TemporaryFile() as errors:
    worker = subprocess.Popen([sys.executable, "-m", "lskd_jax.plan.worker", json.dumps(request)],
                              env={**os.environ, **variables}, stdout=subprocess.PIPE, stderr=errors)
    try:
      last = _follow(worker, label, quiet)
      if "facts" not in last:
        worker.wait()  # or its end would be ours
    finally:
      worker.kill()
      worker.wait()
    if "facts" in last:
      return last["facts"]
    if "error" in last:
      raise DataError(last["error"])
    errors.seek(0)
    text = errors.read().decode(errors="replace")
  lines = [line for line in text.splitlines() if line.strip()]
  doing = f"while {last.get('stage', 'starting')} for {request['topology']}"
  if worker.returncode == -signal.SIGKILL:
    raise DataError(f"the compiler was killed {doing}, as the system does when memory runs out; try "
                    "--low-effort, or a machine with more memory")
  if worker.returncode < 0 or "SIGSEGV" in text:
    raise DataError(f"the compiler crashed {doing}; try --low-effort, another batch size, or another version "
                    "of libtpu")
  raise RuntimeError("\n".join(["the planning process failed:", *lines[-30:]]))


def _follow(worker, label: str, quiet: bool) -> dict:
  """The last JSON line of a worker; shows its stages."""
  start, last, rest = time.monotonic(), {}, b""
  bar = tqdm(desc=label, bar_format="{desc}", disable=quiet, leave=False)
  try:
    while True:
      ready, _, _ = select.select([worker.stdout], [], [], 1.0)
      if ready:
        chunk = os.read(worker.stdout.fileno(), 65536)
        if not chunk:
          return last
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
          last = json.loads(line) if line.startswith(b'{"') else last
      seconds = int(time.monotonic() - start)
      bar.set_description_str(f"{label}: {last.get('stage', '')}, {seconds // 60}:{seconds % 60:02}")
  finally:
    bar.close()


def cache_folder() -> Path:
  """Where plans are kept: XDG_CACHE_HOME/lskd_jax/plans."""
  return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lskd_jax" / "plans"


def key(config, topology: Topology, low_effort: bool) -> str:
  """A name for what a compiled step depends on: config, its files, topology, effort, versions, our source."""
  about = json.loads(config.to_json_best_effort())
  for name in IRRELEVANT:
    group, _, last = name.rpartition(".")
    (about[group] if group else about).pop(last, None)
  model, folder = files.model_config(config), files.tokenizer_folder(config)
  words = folder / "tokenizer.json" if folder else None
  parts = [about, str(topology), low_effort, sys.version_info[:2], source_digest(),
           [path.read_text() if path and path.exists() else "" for path in (model, words)],
           [installed(name) for name in ("jax", "libtpu", "flax", "optax")]]
  return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def installed(package: str) -> str:
  """The version of a package, "" if it is not there."""
  try:
    return version(package)
  except PackageNotFoundError:
    return ""


def source_digest() -> str:
  """sha256 of the source of the packages whose code becomes part of the step."""
  root, total = Path(__file__).parents[2], hashlib.sha256()
  for path in sorted([*(root / "lskd_jax").glob("*.py"), *(root / "lskd_jax/models").rglob("*.py"),
                      *(root / "lskd_jax/plan").glob("[afhmt]*.py")]):
    total.update(path.read_bytes())
  return total.hexdigest()
