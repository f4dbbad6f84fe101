"""The pointing interface: a model directory, a picture, boxes, texts that mention them.

    model = lskd_jax.load("path/to/model")
    model.score("beach.jpg", [(40, 10, 90, 120)], ["question: what is [0] doing? answer: surfing"])
    model.ask("beach.jpg", [(40, 10, 90, 120)], "what is [0] doing?")
"""
from collections.abc import Sequence
import math
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from data_pipeline import images, prompts, regions, tokenizer as words
from data_pipeline.prompts import Prompting
from data_pipeline.records import DataError, mentions
from data_pipeline.regions import render
from data_pipeline.texts import ANSWER, NO_FIELD, RATIONALE, encode_texts
from lskd_jax import parallel
from lskd_jax.evaluate.candidates import Scorer, mean_over
from lskd_jax.evaluate.continuations import Continuer
from lskd_jax.models import build
from lskd_jax.models.generate import Decoding
from lskd_jax.models.generative import DECODERS

SHORTEST = 32  # tokens of a text row; longer ones are padded to 64, 128 …, to compile seldom
PROMPT = "question: {question} answer:"  # of a student without a decoder: how its statements begin

# LAVIS's `predict_answers` of BLIP-2 with T5, but for max_tokens (10 there), and its `generate`.
ANSWERS = dict(beams=5, max_tokens=30, min_tokens=1, length_penalty=-1.0)
CAPTIONS = {**ANSWERS, "length_penalty": 1.0}


def load(directory: Path | str) -> "Predictor":
  """The student in a model directory, on this process's first device.

  Raises:
    CheckpointError: not a model directory, or a damaged one.
    DataError: a model of another kind, which cannot score texts.
  """
  mesh = parallel.make_mesh(devices=jax.local_devices()[:1])
  with jax.set_mesh(mesh):
    model = build.load(directory)
    if model.kind not in build.STUDENTS:
      raise DataError(f"{directory}: holds a {model.kind}; scoring texts needs a student")
    return Predictor(model, mesh)


class Predictor:
  """A loaded student of either kind. Regions are boxes (x1, y1, x2, y2) in pixels of the given image; a text
  mentions the k-th of them, from 0, as "[k]"."""

  def __init__(self, model: build.Model, mesh):
    self.config = model.config
    self.tokenizer = model.tokenizer
    self._generative = model.kind == "generative"
    self._prompting = prompting(model)
    self._scorer = None if self._generative else Scorer(model.graph, model.state)
    self._continuer = Continuer(model.graph, model.state)
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
      "answer:" where there is something. A generative student has `lm` only: the others are None.

    Raises:
      DataError: one line that names the image, region or text.
    """
    if isinstance(texts, str):
      raise DataError(f"texts: want a list of texts, got {texts!r:.60}")
    picture = read_picture(image)
    boxes = check_boxes(regions, picture.size, self.config.max_regions)
    texts = [check_text(text, len(boxes)) for text in texts]
    if not texts:
      return []
    rendered = [render(text, range(len(boxes))) for text in texts]
    with jax.set_mesh(self._mesh):
      found = (self._likelihoods if self._generative else self._heads)(
          self._picture_row(picture, boxes), rendered)
    return [{"text": text, "itm": itm, "itc": itc, "lm": lm}
            for text, itm, itc, lm in zip(texts, *found, strict=True)]

  def ask(self, image, regions: Sequence[Sequence[float]], question: str | Sequence[str], *,
          prompt: str | None = None, stop: Sequence[str] = (), seed: int = 0,
          **decoding) -> str | list[str]:
    """What the student answers; a list of questions gets a list of answers.

    The image is computed once, however many questions there are. The same call gives the same answer.

    Args:
      image, regions: as for `score`.
      question: may mention regions, "what is [0] doing?".
      prompt: how it is asked; "{question}" stands for the question. Default: the model's own.
      stop: an answer ends before the first of these strings, such as "rationale:".
      seed: of the draws, with sample=True.
      decoding: fields of `models.generate.Decoding`, over the defaults in ANSWERS; with sample=True
        beams=1 is one of them. Other settings are compiled anew.

    Raises:
      DataError: one line that names the image, region or question.
    """
    picture = read_picture(image)
    boxes = check_boxes(regions, picture.size, self.config.max_regions)
    template = (self.config.prompt if self._generative else PROMPT) if prompt is None else prompt
    if "{question}" not in check_text(template, len(boxes), "prompt"):
      raise DataError(f"prompt {template!r:.60} has no {{question}}; say where the question stands")
    single = isinstance(question, str)
    asked = [check_text(text, len(boxes), "question") for text in ([question] if single else question)]
    texts = [template.replace("{question}", text.strip()) for text in asked]
    answers = self._write(picture, boxes, texts, stop, seed, ANSWERS, decoding)
    return answers[0] if single else answers

  def caption(self, image, regions: Sequence[Sequence[float]] = (), prompt: str = "", *,
              stop: Sequence[str] = (), seed: int = 0, **decoding) -> str:
    """What the student says of the picture, or how it goes on after a prompt such as "a photo of".

    Args and errors as for `ask`; the defaults of decoding are in CAPTIONS.
    """
    picture = read_picture(image)
    boxes = check_boxes(regions, picture.size, self.config.max_regions)
    if prompt:
      check_text(prompt, len(boxes), "prompt")
    return self._write(picture, boxes, [prompt], stop, seed, CAPTIONS, decoding)[0]

  def _write(self, picture: Image.Image, boxes: np.ndarray, texts: list[str], stop: Sequence[str],
             seed: int, defaults: dict, given: dict) -> list[str]:
    """What follows each prompt."""
    defaults = {**defaults, "beams": 1} if given.get("sample") else defaults
    end, pad = self._prompting.end, self._prompting.pad
    decoding = Decoding(**{**defaults, **given}, ends=(end,), pad=pad)
    if isinstance(stop, str) or "" in stop:
      raise DataError(f"stop={stop!r:.60}: want a list of strings, none of them empty")
    if not 0 <= seed < 2**32:
      raise DataError(f"seed={seed}: want 0 to {2**32 - 1}")
    if not texts:
      return []
    rows = [prompts.prompt_tokens(self._prompting, render(text, range(len(boxes))))
            for text in texts]
    for text, row in zip(texts, rows):
      self._check_room(f"prompt {text!r:.60}", len(row), decoding.max_tokens)
    tokens, real = prompts.left_padded(prompts.filled_up(rows), pad)
    with jax.set_mesh(self._mesh):
      seen = self._continuer.look(self._picture_row(picture, boxes))
      found = self._continuer.write(seen, {"prompt": tokens, "real": real}, decoding, seed)
    return [prompts.read_text(self._prompting, row, stop) for row in found[:len(texts)]]

  def _heads(self, picture_row: dict, texts: list[str]) -> tuple[list, list, list]:
    """itm, itc and lm of every text. The number of texts and their length are rounded up."""
    tokens, fields = encode_texts(self.tokenizer, texts, self._length(texts))
    tokens = np.pad(tokens, ((0, prompts.rounded(len(texts)) - len(texts)), (0, 0)))
    found = self._scorer({**picture_row, "tokens": tokens[None]})
    lm = [_mean_likelihood(*pair) for pair in zip(found["words"][0], fields)]
    return *(found[head][0, :len(texts)].tolist() for head in ("itm", "itc")), lm

  def _likelihoods(self, picture_row: dict, texts: list[str]) -> tuple[list, list, list]:
    """The same by a decoder, which has lm only; texts that share a prompt share its reading."""
    pairs = [prompts.split_tokens(self._prompting, text) for text in texts]
    for text, (prompt, tokens) in zip(texts, pairs):
      self._check_room(f"text {text!r:.60}", len(prompt), len(tokens))
    rows, places = prompts.grouped(pairs, self._prompting.pad)
    found = self._continuer.likelihoods(self._continuer.look(picture_row), rows)
    lm = [float(found[place][:len(tokens)].mean()) for place, (_, tokens) in zip(places, pairs)]
    return [None] * len(texts), [None] * len(texts), lm

  def _picture_row(self, picture: Image.Image, boxes: np.ndarray) -> dict:
    """The picture as the model sees it, and its regions: arrays with a batch axis of 1."""
    config = self.config
    if config.region_mode in ("overlay", "both"):
      picture = regions.draw_overlay(picture, boxes)
    row = {"image": images.resize(np.asarray(picture), config.vit.image_size),
           "boxes": np.zeros((config.max_regions, 4), np.float32),
           "region_valid": np.zeros(config.max_regions, bool)}
    if config.uses_region_tokens:
      row["boxes"][:len(boxes)] = regions.unit_boxes(boxes, *picture.size)
      row["region_valid"][:len(boxes)] = True
    return {name: values[None] for name, values in row.items()}

  def _length(self, texts: list[str]) -> int:
    """Tokens of a text row. DataError for a text with none, or with more than the model reads."""
    lengths = [len(words.encode(self.tokenizer, text)) + 2 for text in texts]  # [CLS] and [SEP]
    longest, most = max(lengths), self.config.max_tokens
    for text, length in zip(texts, lengths):
      if not 2 < length <= most:
        raise DataError(f"text {text!r:.60} has {length - 2} tokens; this model reads 1 to "
                        f"{most - 2}")
    return min(most, prompts.rounded(longest, SHORTEST))

  def _check_room(self, name: str, prompt: int, written: int) -> None:
    """DataError where a prompt and what follows it are longer than the model's positions."""
    most = self.config.max_tokens
    if prompt + written > most:
      raise DataError(f"{name} has {prompt} tokens, and {written} follow; this model reads {most} in "
                      "all")


def prompting(model: build.Model) -> Prompting:
  """How the prompts of a student of either kind look; DataError where its tokenizer lacks a token."""
  config, tokenizer = model.config, model.tokenizer
  if model.kind == "student":
    pad, end = (words.token_id(tokenizer, token) for token in (words.PAD, words.SEP))
    return Prompting(tokenizer, (config.decoder_start,), (), end, pad)
  decoder = config.decoder
  if DECODERS[config.language_model][1].starts_itself:
    return Prompting(tokenizer, (), (decoder.end,), decoder.end, decoder.pad, one_stream=False)
  return Prompting(tokenizer, (decoder.start,), (), decoder.end, decoder.pad)


def read_picture(image) -> Image.Image:
  """An RGB image from a file name, a PIL image or uint8[H, W, 3]; DataError for anything else."""
  if isinstance(image, str | Path):
    return images.read_image(image, upright=True)
  if isinstance(image, Image.Image):
    return images.to_rgb(image)
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


def check_text(text: str, count: int, name: str = "text") -> str:
  """The text; DataError if it is empty or mentions a region that is not there."""
  if not isinstance(text, str) or not text.strip():
    raise DataError(f"{name} {text!r:.60} is empty; write some words")
  for k in mentions(text):
    if k >= count:
      there = {0: "no region is", 1: "only region [0] is"}.get(count,
                                                               f"only [0] to [{count - 1}] are")
      raise DataError(f"{name} {text!r:.60} mentions [{k}], but {there} given; add a region or mend "
                      f"the {name}")
  return text


def _mean_likelihood(words: np.ndarray, fields: np.ndarray) -> float:
  """Mean log-likelihood of answer and rationale, or of all tokens where there is no answer."""
  wanted = (ANSWER, RATIONALE)
  if not np.isin(fields, wanted).any():
    wanted = tuple(set(np.unique(fields).tolist()) - {NO_FIELD})
  return float(mean_over(words, fields, wanted))
