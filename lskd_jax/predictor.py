"""The pointing interface: a model directory, a picture, boxes, texts that mention them.

    model = lskd_jax.load("path/to/model")
    model.score("beach.jpg", [(40, 10, 90, 120)], ["question: what is [0] doing? answer: surfing"])
"""
from collections.abc import Sequence
import math
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from data_pipeline import images, regions
from data_pipeline.records import DataError, mentions
from data_pipeline.texts import ANSWER, NO_FIELD, RATIONALE, encode_texts
from data_pipeline.tokenizer import encode
from lskd_jax import parallel
from lskd_jax.evaluate.candidates import Scorer, mean_over
from lskd_jax.models import build

SHORTEST = 32  # tokens of a text row; longer ones are padded to 64, 128 …, to compile seldom


def load(directory: Path | str) -> "Predictor":
  """The student in a model directory, on this process's first device.

  Raises:
    CheckpointError: not a model directory, or a damaged one.
    DataError: a model of another kind, which cannot score texts.
  """
  mesh = parallel.make_mesh((1, 1), jax.local_devices()[:1])
  with jax.set_mesh(mesh):
    model = build.load(directory)
    if model.kind != "student":
      raise DataError(f"{directory}: holds a {model.kind}; scoring texts needs a student")
    return Predictor(model, mesh)


class Predictor:
  """A loaded student. Regions are boxes (x1, y1, x2, y2) in pixels of the given image; a text
  mentions the k-th of them, from 0, as "[k]"."""

  def __init__(self, model: build.Model, mesh):
    self.config = model.config
    self.tokenizer = model.tokenizer
    self._scorer = Scorer(model.graph, model.state)
    self._mesh = mesh

  def score(self, image, regions: Sequence[Sequence[float]], texts: Sequence[str]) -> list[dict]:
    """How well each text fits the picture: higher is better, among texts for the same picture.

    The image is computed once, however many texts there are.

    Args:
      image: a file (turned upright as its EXIF says), a PIL image, or uint8[H, W, 3].
      regions: at most `config.max_regions` boxes inside the image.
      texts: captions, or "question: … answer: … rationale: …".

    Returns:
      For each text {"text", "itm", "itc", "lm"}: the logit of image-text matching; the cosine of
      image-text contrast; the mean log-likelihood of the text's tokens, or of what follows
      "answer:" where there is something.

    Raises:
      DataError: one line that names the image, region or text.
    """
    picture = read_picture(image)
    boxes = check_boxes(regions, picture.size, self.config.max_regions)
    texts = [check_text(text, len(boxes)) for text in texts]
    if not texts:
      return []
    with jax.set_mesh(self._mesh):
      rows, fields = self._rows(picture, boxes, texts)
      found = {name: values[0] for name, values in self._scorer(rows).items()}
    likelihoods = [_mean_likelihood(*pair) for pair in zip(found["words"], fields)]
    return [{"text": text, "itm": float(itm), "itc": float(itc), "lm": lm}
            for text, itm, itc, lm in zip(texts, found["itm"], found["itc"], likelihoods)]

  def _rows(self, picture: Image.Image, boxes: np.ndarray, texts: list[str]):
    """One row of arrays for the scorer, and the texts' fields. Both lengths are rounded up."""
    config = self.config
    slots = range(len(boxes))
    rendered = [regions.render(text, slots) for text in texts]
    length = self._length(rendered)
    count = 1 << (len(texts) - 1).bit_length()
    tokens, fields = encode_texts(self.tokenizer, rendered, length)
    tokens = np.pad(tokens, ((0, count - len(texts)), (0, 0)))
    if config.region_mode in ("overlay", "both"):
      picture = regions.draw_overlay(picture, boxes)
    row = {"image": images.resize(np.asarray(picture), config.vit.image_size),
           "boxes": np.zeros((config.max_regions, 4), np.float32),
           "region_valid": np.zeros(config.max_regions, bool), "tokens": tokens}
    if config.uses_region_tokens:
      row["boxes"][:len(boxes)] = regions.unit_boxes(boxes, *picture.size)
      row["region_valid"][:len(boxes)] = True
    return {name: values[None] for name, values in row.items()}, fields

  def _length(self, texts: list[str]) -> int:
    """Tokens of a text row. DataError for a text with none, or with more than the model reads."""
    lengths = [len(encode(self.tokenizer, text)) + 2 for text in texts]  # [CLS] and [SEP]
    longest, most = max(lengths), self.config.qformer.max_tokens
    for text, length in zip(texts, lengths):
      if not 2 < length <= most:
        raise DataError(f"text {text!r:.60} has {length - 2} tokens; this model reads 1 to "
                        f"{most - 2}")
    return min(most, max(SHORTEST, 1 << (longest - 1).bit_length()))


def read_picture(image) -> Image.Image:
  """An RGB image from a file name, a PIL image or uint8[H, W, 3]; DataError for anything else."""
  if isinstance(image, str | Path):
    return images.read_image(image, upright=True)
  if isinstance(image, Image.Image):
    return image.convert("RGB")
  if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3 \
      and image.shape[2] == 3:
    return Image.fromarray(image)
  given = (f"{image.dtype}{list(image.shape)}" if isinstance(image, np.ndarray)
           else type(image).__name__)
  raise DataError(f"image: want a file name, a PIL image or uint8[H, W, 3], got {given}")


def check_boxes(boxes: Sequence[Sequence[float]], size: tuple[int, int],
                max_regions: int) -> np.ndarray:
  """float64[k, 4]; DataError for the first box that is not inside an image of (width, height)."""
  width, height = size
  if len(boxes) > max_regions:
    raise DataError(f"{len(boxes)} regions are given, this model takes at most {max_regions}")
  for k, box in enumerate(boxes):
    try:
      x1, y1, x2, y2 = (float(edge) for edge in box)
    except (TypeError, ValueError):
      raise DataError(f"region [{k}] is {box!r:.60}; give x1, y1, x2, y2") from None
    shown = ",".join(f"{edge:g}" for edge in (x1, y1, x2, y2))
    if not all(map(math.isfinite, (x1, y1, x2, y2))) or x2 <= x1 or y2 <= y1:
      raise DataError(f"region [{k}] = {shown} has no area; want x1 < x2 and y1 < y2")
    if x1 < 0 or y1 < 0 or x2 > width or y2 > height:
      raise DataError(f"region [{k}] = {shown} reaches outside the {width}x{height} image; give "
                      "pixels of this image")
  return np.array(boxes, np.float64).reshape(-1, 4)


def check_text(text: str, count: int) -> str:
  """The text; DataError if it is empty or mentions a region that is not there."""
  if not isinstance(text, str) or not text.strip():
    raise DataError(f"text {text!r:.60} is empty; write what is to be scored")
  for k in mentions(text):
    if k >= count:
      there = {0: "no region is", 1: "only region [0] is"}.get(count,
                                                               f"only [0] to [{count - 1}] are")
      raise DataError(f"text {text!r:.60} mentions [{k}], but {there} given; add a region or mend "
                      "the text")
  return text


def _mean_likelihood(words: np.ndarray, fields: np.ndarray) -> float:
  """Mean log-likelihood of answer and rationale, or of all tokens where there is no answer."""
  wanted = (ANSWER, RATIONALE)
  if not np.isin(fields, wanted).any():
    wanted = tuple(set(np.unique(fields).tolist()) - {NO_FIELD})
  return float(mean_over(words, fields, wanted))
