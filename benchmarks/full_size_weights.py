"""A full-size BLIP-2 (ViT-g/14, Q-Former) in, one picture scored, out again: time and memory.

    python benchmarks/full_size_weights.py --workdir DIR [--dtype float16]

Writes a transformers folder with random weights at the published sizes, then runs `lskd import`,
`lskd score` with ten texts and a region, and `lskd export`, each in a process of its own. Memory is
the largest sampled `RssAnon` of the process (what it cannot give back; Linux only) beside its
largest resident size, which counts mapped files too. Needs 15 GB of disk. Prints one JSON line.
"""
import argparse
import json
from pathlib import Path
import re
import resource
import shutil
import subprocess
import sys
import time

import numpy as np
from PIL import Image

from data_pipeline import tokenizer as tokenizers
from lskd_jax.convert import hf, hf_configs, tables, tensors
from lskd_jax.models.qformer import QFormerConfig
from lskd_jax.models.student import StudentConfig

WORDS = 30523  # bert-base-uncased and [DEC]


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--workdir", type=Path, required=True)
  parser.add_argument("--dtype", choices=tuple(hf.DTYPES), default="float32")
  args = parser.parse_args()
  work = args.workdir
  work.mkdir(parents=True, exist_ok=True)
  source, model, out = work / "source", work / "model", work / "export"
  parameters = make_source(source, args.dtype)
  Image.fromarray(np.random.default_rng(0).integers(0, 256, (224, 224, 3), np.uint8)).save(
      work / "picture.png")
  texts = [f"question: what is [0] doing? answer: thing {n}" for n in range(10)]
  results = {
      "import": measure("import", "--from", "hf", source, "--out", model),
      "score": measure("score", "--model", model, "--image", work / "picture.png", "--region",
                       "10,10,100,100", "--text", *texts)}
  shutil.rmtree(out, ignore_errors=True)
  results["export"] = measure("export", "--to", "hf", "--model", model, "--out", out, "--dtype",
                              args.dtype)
  before, after = tensors.read_folder(source), tensors.read_folder(out)
  same = before.keys() == after.keys() and all(
      before[key].read().tobytes() == after[key].read().tobytes() for key in before)
  print(json.dumps({"benchmark": "full_size_weights", "parameters": parameters,
                    "dtype": args.dtype, "largest_tensor_mib": largest(before),
                    "same_to_the_byte": same, **results}))


def make_source(folder: Path, dtype: str) -> int:
  """A transformers folder with random weights; returns the number of parameters."""
  config = StudentConfig(qformer=QFormerConfig(vocabulary=WORDS, dropout=0.1), vision_eps=1e-6)
  folder.mkdir(parents=True, exist_ok=True)
  numbers = (str(n) for n in range(10))
  tokenizers.train_tokenizer(["question: what is [0] doing? answer: thing", *numbers], folder, 256, 1)
  rng = np.random.default_rng(0)
  table = tables.student_table(config, tables.HF)

  def make(entry):
    noise = rng.standard_normal(entry.shape, np.float32) * 0.02
    is_scale = entry.ours.endswith("scale")
    return (1 + noise if is_scale else noise).astype(hf.kept_as(entry.theirs, dtype))
  tensors.write_folder(folder, [
      tensors.Planned(entry.theirs, entry.shape, hf.kept_as(entry.theirs, dtype),
                      lambda entry=entry: make(entry)) for entry in table])
  (folder / "config.json").write_text(json.dumps(hf_configs.write_config("student", config, dtype)))
  return sum(int(np.prod(entry.shape)) for entry in table)


def largest(found: dict[str, tensors.Tensor]) -> int:
  return max(int(np.prod(t.shape)) * t.dtype.itemsize for t in found.values()) >> 20


def measure(*words) -> dict[str, float]:
  """Runs one `lskd` command: its seconds and its memory in MiB."""
  start = time.perf_counter()
  process = subprocess.Popen([sys.executable, "-m", "lskd_jax.cli", *map(str, words)],
                             stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
  own = 0
  while process.poll() is None:
    try:
      status = Path(f"/proc/{process.pid}/status").read_text()
    except OSError:
      break
    found = re.search(r"RssAnon:\s+(\d+) kB", status)
    own = max(own, int(found[1]) if found else 0)
    time.sleep(0.05)
  if process.wait():
    raise SystemExit(f"lskd {words[0]} ended with code {process.returncode}")
  resident = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss  # of the largest child so far
  return {"seconds": round(time.perf_counter() - start, 1), "own_mib": own >> 10,
          "resident_mib": resident >> 10}


if __name__ == "__main__":
  main()
