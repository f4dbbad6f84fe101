"""What a model says of the statements of a corpus: the critic's P(accept), or a student's evidence.

Statements of an image share a row, so the image is computed once for all of them. Which slots a
statement's regions get depends on its image and on itself alone, never on its neighbours: all
regions in order of id where the model has a slot for each, else those it mentions, then the others.
"""
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
import dataclasses
import itertools
from pathlib import Path
from typing import NamedTuple

from etils import epath
from flax import nnx
import jax
import numpy as np
from tqdm import tqdm

from data_pipeline import corpus_stages, regions, stages
from data_pipeline.corpus import Corpus, read_image_file
from data_pipeline.examples import LoaderOptions, pixels, whole_frame
from data_pipeline.filter import roc_auc
from data_pipeline.images import decode
from data_pipeline.records import DataError, ImageRecord, Statement, statement_mentions, validate
from data_pipeline.texts import TextEncoder, put_slots, statement_texts, text_encoder
from lskd_jax import checkpoint, evidence, parallel, trees
from lskd_jax.committed import digest
from lskd_jax.evaluate.candidates import Scorer, in_batches
from lskd_jax.evidence import Evidence, EvidenceCritic, evidence_features
from lskd_jax.models import build
from lskd_jax.models.build import Model

TEXT_TOKENS = 128   # of a statement at most, as in training; less where the model reads fewer
PER_ROW = 8         # statements of one image in one row
BATCH = {"student": 32, "critic": 32, "generative": 4}  # rows at a time; a decoder's vocabulary is large
GROUP = 64          # images read at a time
KEY = "likelihood"  # of a statement's `extra`: what a student said of it


# --- a whole corpus ------------------------------------------------------------------------------


def critic_scores(model: Model, corpus: Corpus, cached=None,
                  progress: bool = True) -> dict[str, float]:
  """P(accept) of every statement by a critic of kind `heads`: {statement index: score}.

  Runs on the mesh in use, as everything here.

  Args:
    cached: the ViT's features of the corpus's images, by row (`features.cached_features`).

  Raises:
    DataError: the first image or statement that the model cannot read.
  """
  found = _of_corpus(model, ("critic",), corpus, cached, progress)
  return {statement.index: float(values[0]) for statement, values in found}


def statement_likelihoods(model: Model, corpus: Corpus, cached=None,
                          progress: bool = True) -> dict[str, Evidence]:
  """What a student says of every statement: {statement index: Evidence}. Else as above."""
  found = _of_corpus(model, build.STUDENTS, corpus, cached, progress)
  return {statement.index: Evidence(*values.tolist(), statement.source)
          for statement, values in found}


def _of_corpus(model: Model, kinds: tuple[str, ...], corpus: Corpus, cached,
               progress: bool) -> Iterator[tuple[Statement, np.ndarray]]:
  if model.kind not in kinds:
    raise DataError(f"a {kinds[0]} is needed, and this model is a {model.kind}")
  speak = speaker(model)
  starts = range(0, len(corpus), GROUP)
  for start in tqdm(starts, "score", disable=not progress, unit="batch", leave=False):
    rows = range(start, min(start + GROUP, len(corpus)))
    records = [corpus.record(row) for row in rows]
    answers = say(model, speak, records, lambda at, rows=rows: corpus.image_bytes(rows[at]),
                  None if cached is None else cached[rows.start:rows.stop])
    for record, found in zip(records, answers):
      for statement, values in zip(record.statements, _or_raise(found)):
        yield statement, _or_raise(values)


def _or_raise(found):
  if isinstance(found, DataError):
    raise found
  return found


# --- a stage -------------------------------------------------------------------------------------


def say_stage(model: Model, name: str, source: Path | str, image_root: Path | str,
              out: Path | str, options: dict, progress: bool = True) -> dict:
  """Asks a model about every statement of a stage folder, as a resumable stage of its own.

  A critic's statements come out with their `score`; a student's with the numbers of `Evidence` in
  `extra["likelihood"]`. Images and statements that cannot be read go to rejected-*.jsonl.

  Args:
    name: of the stage. options: what names the model, such as its `model_digest`.

  Returns the summary of the stage.
  """
  speak = speaker(model)

  def finish(statement: Statement, values: np.ndarray) -> Statement:
    if model.kind == "critic":
      return dataclasses.replace(statement, score=float(values[0]))
    return dataclasses.replace(statement, extra={**statement.extra, KEY: values.tolist()})

  def work(records: list[ImageRecord]) -> Iterator[ImageRecord | DataError]:
    def read(at: int) -> bytes:
      return read_image_file(image_root, records[at].image, str(image_root))

    for record, found in zip(records, say(model, speak, records, read)):
      if isinstance(found, DataError):
        yield found
        continue
      pairs = list(zip(record.statements, found))
      kept = tuple(finish(s, values) for s, values in pairs if not isinstance(values, DataError))
      yield dataclasses.replace(record, statements=kept)
      yield from (error for _, error in pairs if isinstance(error, DataError))

  shards = stages.open_shards(source)
  groups = [_Groups(shard) for shard in shards]
  return stages.run_stage(name, groups, work, out, options, progress,
                          inputs=stages.fingerprint(shards))


class Scored(NamedTuple):
  """What `score_stages` did: the summary of its stage, and in words what the scores are worth."""
  summary: dict
  worth: str


def score_stages(source: Path | str, image_root: Path | str, model_dir: Path | str,
                 out: Path | str, judgements: Path | str | None = None) -> Scored:
  """Scores a stage folder with the model of a directory; resumable, and on one device.

  With a critic the score is its P(accept). With a student a critic of kind `evidence` is fitted to
  the judgements and written to OUT/critic.json; what the student said stays in OUT/likelihoods. The
  judged statements themselves are scored by critics that saw no judgement about their image, so
  that a cut may be chosen on the same judgements. Without judgements, `evidence.uncalibrated`.

  Raises:
    DataError, CheckpointError: one line that names the file or folder.
  """
  out = Path(out)
  accept = None if judgements is None else _verdicts_on(source, judgements)  # first: the rest takes long
  options = {"model": model_digest(model_dir)}
  with jax.set_mesh(parallel.make_mesh(devices=jax.local_devices()[:1])):
    model = build.load(model_dir)
    if model.kind == "critic":
      summary = say_stage(model, "score", source, image_root, out, options)
      return Scored(summary, f"P(accept) by the critic {model_dir}")
    said = say_stage(model, "likelihoods", source, image_root, out / "likelihoods", options)
  critic, own, worth = _fit(out / "likelihoods", accept)

  def score(records: Sequence[ImageRecord]) -> list[list[float]]:
    return [[own.get(s.index, p) for s, p in zip(r.statements, critic.scores(
        [evidence_of(s) for s in r.statements]).tolist())] for r in records]

  options["judgements"] = accept and digest(sorted(accept.items()))[:16]
  summary = corpus_stages.score_corpus(out / "likelihoods", out, score, options)
  stages.write_json(out / "critic.json", critic.to_json())
  return Scored({**summary, "rejected": summary["rejected"] + said["rejected"]}, worth)


def _verdicts_on(source: Path | str, judgements: Path | str) -> dict[str, int]:
  """{statement index: verdict}; DataError if none is about a statement of the stage folder."""
  accept = evidence.read_verdicts(judgements)
  if not any(s.index in accept for r in stages.read_records(source) for s in r.statements):
    raise DataError(f"{judgements}: none of its {len(accept)} judgements is about a statement of "
                    "this corpus; give the judgements of this corpus")
  return accept


def _fit(likelihoods: Path, accept: dict[str, int] | None) -> tuple[EvidenceCritic, dict[str, float], str]:
  """The critic, {index: score} of the judged statements, and what the scores are worth."""
  if accept is None:
    found = [evidence_of(s) for r in stages.read_records(likelihoods) for s in r.statements]
    return evidence.uncalibrated(found), {}, (
        "uncalibrated, for want of --judgements: they rank statements, but are no probabilities")
  judged = [(r.image, s) for r in stages.read_records(likelihoods) for s in r.statements
            if s.index in accept]
  found = [evidence_of(s) for _, s in judged]
  labels = [accept[s.index] for _, s in judged]
  scores = evidence.cross_scores(found, labels, [image for image, _ in judged])
  own = {s.index: float(p) for (_, s), p in zip(judged, scores)}
  worth = f"P(accept), fitted to {len(labels)} judgements, of which {sum(labels)} accept"
  if 0 < sum(labels) < len(labels):
    area = roc_auc(scores, labels)
    worth += f"; ROC area {area:.3f} on images that the fit had not seen"
  return evidence.fit_evidence(found, labels), own, worth


def evidence_of(statement: Statement) -> Evidence:
  """What `say_stage` with a student noted about a statement."""
  return Evidence(*statement.extra[KEY], statement.source)


def model_digest(directory: Path | str) -> str:
  """A hash of what a model directory holds: its config and the fingerprints of its parameters."""
  about = [checkpoint.load_config(directory),
           trees.read_manifest(epath.Path(directory).absolute() / "params")]
  return digest(about)[:16]


class _Groups:
  """The records of a shard in lists of GROUP: read when called, counted before."""

  def __init__(self, shard: stages.Shard):
    self.shard = shard

  def __len__(self) -> int:
    return -(-len(self.shard) // GROUP)

  def __call__(self) -> Iterator[list[ImageRecord]]:
    records = iter(self.shard)
    while group := list(itertools.islice(records, GROUP)):
      yield group


# --- some records --------------------------------------------------------------------------------


class _Row(NamedTuple):
  """Some statements of one image, ready for the model.

  record: which of the records. statements: their positions in it.
  """
  record: int
  statements: tuple[int, ...]
  arrays: dict[str, np.ndarray]


def speaker(model: Model) -> Callable[[dict], np.ndarray]:
  """A function from rows of arrays to float64[B, S, K]: of a critic P(accept), K = 1; of a student
  the numbers of `Evidence`, K = 4."""
  if model.kind in build.STUDENTS:
    scorer = Scorer(model.graph, model.state, heads=False)
    return lambda arrays: evidence_features(scorer(arrays)["words"], arrays["fields"])
  if model.kind != "critic":
    raise DataError(f"a model of kind {model.kind!r} cannot score statements; give a student or a "
                    "critic")

  @jax.jit
  def accept(state, batch):
    return jax.nn.softmax(nnx.merge(model.graph, state)(batch)[0])[..., 1:]

  def probabilities(arrays: dict) -> np.ndarray:
    rows = {name: values for name, values in arrays.items() if name != "fields"}
    batch = parallel.put_batch(rows, jax.sharding.get_mesh())
    return np.asarray(accept(model.state, batch), np.float64)
  return probabilities


def say(model: Model, speak: Callable, records: Sequence[ImageRecord],
        read: Callable[[int], bytes], features=None) -> list:
  """What the model says of the statements of some records.

  Args:
    speak: `speaker(model)`.
    read: position in `records` -> the bytes of its image.
    features: [len(records), N, C], the ViT's tokens of each record: then no image is read.

  Returns:
    For every record a list with, for every statement, float64[K] or the DataError that it met; or
    one DataError where the image cannot be read.
  """
  config = model.config
  encoder = text_encoder(model.tokenizer, min(TEXT_TOKENS, config.max_tokens))
  options = LoaderOptions(max_regions=config.max_regions, image_size=config.vit.image_size,
                          region_mode=config.region_mode)
  if features is not None and options.region_mode in ("overlay", "both"):
    raise ValueError(f"region mode {options.region_mode!r} draws on pixels: give no features")

  def prepare(at: int):
    record = records[at]
    try:
      if not (record.width and record.height):  # not known yet
        height, width = decode(read(at), name=record.image).shape[:2]
        record = dataclasses.replace(record, width=width, height=height)
      record = validate(dataclasses.replace(record, statements=()))
      found = None if features is None else features[at]
      return _rows(record, at, records[at].statements, found, read, encoder, options)
    except DataError as error:
      return [], error

  with ThreadPoolExecutor() as pool:  # decoding JPEGs lets go of the interpreter
    prepared = list(pool.map(prepare, range(len(records))))
  answers = [answer for _, answer in prepared]
  rows = [row for own, _ in prepared for row in own]
  batch = BATCH[model.kind]
  for start in range(0, len(rows), batch):
    part = rows[start:start + batch]
    arrays = {name: np.stack([row.arrays[name] for row in part]) for name in part[0].arrays}
    arrays = _trimmed(arrays)
    values = speak(next(in_batches(arrays, batch)))  # filled up: few shapes, each compiled once
    for row, said in zip(part, values):
      for position, value in zip(row.statements, said):
        answers[row.record][position] = value
  return answers


def _trimmed(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """The rows without the columns that are padding in all texts, down to a multiple of 16 tokens."""
  longest = np.flatnonzero(arrays["fields"].any((0, 1))).max() + 2  # and [SEP]
  size = min(-(-int(longest) // 16) * 16, arrays["fields"].shape[-1])
  return {**arrays, **{name: arrays[name][..., :size] for name in ("tokens", "fields")}}


def _rows(record: ImageRecord, at: int, statements: Sequence[Statement], features,
          read: Callable[[int], bytes], encoder: TextEncoder,
          options: LoaderOptions) -> tuple[list[_Row], list]:
  """The rows of one record, and for every statement None or the DataError that keeps it out."""
  faults, by_slots = [], {}
  for position, statement in enumerate(statements):
    try:
      slots = _slots(record, statement, options.max_regions)
      texts = statement_texts(encoder, statement)
      if texts is None:
        raise DataError(f"has no answer, or one that needs more than {encoder.text_tokens} tokens")
      by_slots.setdefault(slots, []).append((position, texts[0]))
      faults.append(None)
    except DataError as error:
      faults.append(DataError(f"{record.image}: statement {statement.index}: {error}"))
  rows = []
  data = read(at) if by_slots and features is None else None
  for slots, members in by_slots.items():
    frame = whole_frame(record, slots)
    image = ({"features": features} if data is None else
             {"image": pixels(data, record, slots, frame, options)})
    boxes = np.zeros((options.max_regions, 4), np.float32)
    valid = np.zeros(options.max_regions, bool)
    if options.region_mode in ("tokens", "both"):
      boxes[:len(slots)], valid[:len(slots)] = frame.boxes, True
    for start in range(0, len(members), PER_ROW):
      part = members[start:start + PER_ROW]
      tokens = np.full((PER_ROW, encoder.text_tokens), encoder.pad, np.int32)
      fields = np.zeros((PER_ROW, encoder.text_tokens), np.int8)
      for k, (_, text) in enumerate(part):
        tokens[k, :len(text.tokens)] = text.tokens
        fields[k, :len(text.fields)] = text.fields
      put_slots(encoder, tokens, slots)
      arrays = {**image, "boxes": boxes, "region_valid": valid, "tokens": tokens, "fields": fields}
      rows.append(_Row(at, tuple(position for position, _ in part), arrays))
  return rows, faults


def _slots(record: ImageRecord, statement: Statement, max_regions: int) -> tuple[int, ...]:
  """The region id of each slot. DataError for a mention of no region, or of too many."""
  ids = tuple(sorted(region.id for region in record.regions))
  slots = regions.assign_slots(ids, statement_mentions(statement), None, max_regions, True)
  return ids if len(ids) <= max_regions else slots
