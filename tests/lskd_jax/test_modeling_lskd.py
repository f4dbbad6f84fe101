"""The PyTorch module that travels with an export: a student with regions gives the same scores."""
import jax
import numpy as np
import pytest
import torch
from transformers import AutoModel

from data_pipeline.tokenizer import load_tokenizer
from lskd_jax import parallel
from lskd_jax.convert import hf
from lskd_jax.evaluate.candidates import Scorer
from lskd_jax.models import build
from lskd_jax.models.vit import PIXEL_MEAN, PIXEL_STD
from tests.lskd_jax.tiny_models import TEXTS, make_model

BOXES = np.array([[0.1, 0.2, 0.5, 0.9], [0.55, 0.05, 0.6, 0.1], [0.0, 0.0, 1.0, 1.0]], np.float32)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
  """(model directory, exported folder)."""
  folder = tmp_path_factory.mktemp("student")
  model = make_model(folder / "model")
  return model, hf.export_hf(model, folder / "hf", progress=False)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_the_same_scores_with_and_without_regions(exported, count):
  """ITM, ITC and every word's likelihood within 1e-5 of the largest."""
  directory, folder = exported
  pixels = np.random.default_rng(0).integers(0, 256, (1, 48, 48, 3), np.uint8)
  with jax.set_mesh(parallel.make_mesh()):
    model = build.load(directory)
    rows = [model.tokenizer.encode(text).ids for text in TEXTS]
    tokens = np.zeros((len(rows), max(map(len, rows))), np.int32)
    for k, row in enumerate(rows):
      tokens[k, :len(row)] = row
    regions = model.config.max_regions
    boxes, valid = np.zeros((1, regions, 4), np.float32), np.zeros((1, regions), bool)
    boxes[0, :count], valid[0, :count] = BOXES[:count], True
    ours = Scorer(model.graph, model.state)(
        {"image": pixels, "boxes": boxes, "region_valid": valid, "tokens": tokens[None]})
  student = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
  scaled = (pixels / 255 - np.array(PIXEL_MEAN)) / np.array(PIXEL_STD)
  theirs = student.score(torch.tensor(scaled, dtype=torch.float32).permute(0, 3, 1, 2),
                         torch.tensor(BOXES[:count]), torch.tensor(tokens, dtype=torch.long))
  real = tokens > 0
  for name in ("itm", "itc"):
    want = theirs[name].numpy()
    assert np.abs(ours[name][0] - want).max() <= 1e-5 * np.abs(want).max(), name
  want = theirs["words"].numpy()
  assert np.abs(ours["words"][0] - want)[real].max() <= 1e-5 * np.abs(want[real]).max()


def test_regions_matter(exported):
  """The comparison above would show nothing if the gates were closed."""
  student = AutoModel.from_pretrained(exported[1], trust_remote_code=True).eval()
  pixels = torch.zeros(1, 3, 48, 48)
  tokens = torch.tensor([student_tokens(exported[0])])
  first, second = (student.score(pixels, torch.tensor(BOXES[rows]), tokens)
                   for rows in ([0, 1], [1, 0]))
  assert abs(first["itm"] - second["itm"]).item() > 1e-3
  assert first["itc"].item() != second["itc"].item()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_folder_of_halves_scores_nearly_the_same(exported, tmp_path, dtype):
  folders = exported[1], hf.export_hf(exported[0], tmp_path / "hf", dtype=dtype, progress=False)
  pixels, tokens = torch.ones(1, 3, 48, 48), torch.tensor([student_tokens(exported[0])])
  whole, halves = (AutoModel.from_pretrained(folder, trust_remote_code=True).eval().score(
      pixels, torch.tensor(BOXES), tokens) for folder in folders)
  for name, want in whole.items():
    scale = max(want.abs().max(), 1.0)  # a cosine's scale is 1, however small it is
    assert (halves[name] - want).abs().max() <= 0.01 * scale, name


def student_tokens(directory):
  return load_tokenizer(directory / "tokenizer").encode(TEXTS[0]).ids
