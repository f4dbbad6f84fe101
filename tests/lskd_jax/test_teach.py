"""Texts that a generative student learns to write: transformers' loss and gradients, word by word.

OPT is told the whole text and learns from the answer on. T5 reads the question and writes the rest.
"""
from flax import nnx
import jax
import numpy as np
import optax
import pytest

from data_pipeline.texts import ANSWER, DESCRIPTION, QUESTION
from lskd_jax import losses, parallel, step, trees
from lskd_jax.convert import tables
from lskd_jax.evaluate.candidates import Scorer
from tests.lskd_jax import tiny, torch_teach
from tests.lskd_jax.tiny import put
from tests.lskd_jax.torch_decoders import left_padded

pytestmark = pytest.mark.usefixtures("one_device")

WEIGHTS = {"lm": 1.0, "question": 0.0, "end": 1.0, "smoothing": 0.0}
FROZEN = ("vit", "decoder")
KEY = jax.random.key(0)


def texts():
  """Rows of [CLS] … [SEP]: statements, a caption, one that was cut, and one that is not there."""
  rows = tiny.batch(images=4, statements=4, tokens=12)
  rows["tokens"][rows["tokens"] == torch_teach.PLACEHOLDER] = tiny.WORDS
  fields = rows["fields"]
  fields[:, :, 1:6] = QUESTION
  fields[:, :, 6:][fields[:, :, 6:] == QUESTION] = ANSWER
  fields[0, 0][fields[0, 0] > 0] = DESCRIPTION
  rows["tokens"][1, 0][rows["tokens"][1, 0] == tiny.SEP] = tiny.PAD
  return rows


def reference_rows(rows, kind):
  """The valid texts as transformers takes them, and the pictures they are about."""
  found = []
  for b, s in np.argwhere(rows["statement_valid"]):
    tokens, fields = rows["tokens"][b, s], rows["fields"][b, s]
    first = int(np.argmax(fields > QUESTION))
    real = tokens[:np.flatnonzero(tokens != tiny.PAD).max() + 1].tolist()
    prompt = real[:first] + ([tiny.SEP] if kind == "t5" else [])
    found.append((rows["image"][b], torch_teach.Row(prompt, real[first:])))
  images, found = zip(*found)
  return np.stack(images), list(found)


@pytest.fixture(scope="module", params=["opt", "t5"])
def kind(request):
  return request.param


@pytest.fixture(scope="module")
def theirs(kind):
  return torch_teach.reference(kind)


@pytest.fixture(scope="module")
def student(one_device, kind, theirs):
  return torch_teach.ours(theirs, torch_teach.config_of(kind))


def objective(model, batch, key):
  return losses.generative_loss(model, batch, WEIGHTS, key)


@pytest.fixture(scope="module")
def learnt(student):
  """Loss and gradients of the batch."""
  graph, params, frozen = step.split(student, FROZEN)

  @jax.jit
  def run(params, frozen, batch):
    loss = lambda params: objective(nnx.merge(graph, params, frozen), batch, KEY)[0]["lm"].mean()
    return jax.value_and_grad(loss)(params)
  value, gradients = run(params, frozen, put(texts()))
  return float(value), {name: np.asarray(leaf) for name, leaf in trees.named_leaves(gradients).items()}


def test_loss_and_gradients_are_those_of_transformers(kind, theirs, student, learnt):
  """Of all that is trained; the ViT and the decoder have no gradient."""
  loss, gradients = learnt
  theirs.zero_grad()
  want = torch_teach.their_loss(theirs, kind, *reference_rows(texts(), kind))
  want.backward()
  assert loss == pytest.approx(want.item(), rel=1e-5)
  named = dict(theirs.named_parameters())
  table = [entry for entry in torch_teach.table_of(student.config, gradients)
           if entry.ours in gradients]
  assert {entry.ours.split("/")[0] for entry in table} == {"ln_vision", "qformer", "decoder_proj"}
  for entry in table:
    gradient, have = named[entry.theirs].grad.numpy(), gradients[entry.ours][(*entry.at, ...)]
    if entry.theirs.endswith("key.bias"):  # which softmax does not see
      assert max(np.abs(have).max(), np.abs(gradient).max()) < 1e-6
      continue
    gap = np.abs(have - tables.to_ours(entry, gradient, have.shape)).max()
    assert gap <= 1e-4 * np.abs(gradient).max(), (entry.theirs, gap)
  closed = [name for name in gradients if name.endswith("gate")]
  assert len(closed) == 3 and all(np.abs(gradients[name]).max() > 0 for name in closed)
  assert not any(name.split("/")[0] in FROZEN for name in gradients)


@pytest.fixture(scope="module")
def steps(kind, theirs):
  """40 steps of gradient descent on the batch, on two devices, in two parts: the rate, the parameters
  before and after the first step, and the metrics of all."""
  rows = texts()
  words = (rows["fields"] > QUESTION).sum((0, 2))
  assert words[:2].sum() != words[2:].sum()
  rate, metrics = 0.05, []
  sgd = optax.sgd(rate)
  with jax.set_mesh(parallel.make_mesh(fsdp=2)):
    graph, params, frozen = step.split(torch_teach.ours(theirs, torch_teach.config_of(kind)), FROZEN)
    before = {name: np.array(leaf) for name, leaf in trees.named_leaves(params).items()}
    train = step.make_train_step(graph, sgd, objective, {"lm": 1.0}, 2)
    state, batch = step.init_state(params, sgd), put(rows)
    for _ in range(40):
      state, found = train(state, frozen, batch, KEY)
      metrics.append({name: float(value) for name, value in found.items() if name != "examples"})
      if len(metrics) == 1:
        after = {name: np.array(leaf) for name, leaf in trees.named_leaves(state["params"]).items()}
  return rate, before, after, metrics


def test_microbatches_add_up_to_the_batch(steps, learnt):
  """Loss and gradients, though the parts have unequal numbers of words: no mean of means."""
  rate, before, after, metrics = steps
  loss, gradients = learnt
  assert metrics[0]["loss"] == pytest.approx(metrics[0]["lm"], rel=1e-6)
  assert metrics[0]["loss"] == pytest.approx(loss, rel=1e-5)
  for name, gradient in gradients.items():
    change = (before[name] - after[name]) / rate
    scale = max(np.abs(gradient).max(), np.abs(before[name]).max())
    np.testing.assert_allclose(change, gradient, atol=1e-4 * scale, err_msg=name)


def test_one_batch_can_be_learnt(steps):
  """As far as a decoder of noise can be told what to write."""
  loss = [values["lm"] for values in steps[-1]]
  assert loss[-1] < 0.85 * loss[0]


def test_the_end_is_learnt_but_not_of_a_text_that_was_cut(kind, student):
  rows = texts()
  count = lambda rows: float(jax.jit(lambda model, batch: losses.generative_loss(
      model, batch, WEIGHTS, KEY)[0]["lm"].weight)(student, put(rows)))
  valid = rows["statement_valid"][..., None]
  written = ((rows["fields"] > QUESTION) & valid).sum()
  assert count(rows) == written + rows["statement_valid"].sum() - 1


def test_a_question_can_be_learnt_by_a_decoder_that_writes_it(kind, student, learnt):
  weights = WEIGHTS | {"question": 1.0}
  found = jax.jit(lambda model, batch: losses.generative_loss(model, batch, weights, KEY)[0]["lm"].mean())(
      student, put(texts()))
  assert (float(found) == pytest.approx(learnt[0], rel=1e-6)) == (kind == "t5")


def test_what_is_taught_stands_in_its_place(kind, student):
  """Tokens, fields and mentions, also where a text was moved to start the decoder's row."""
  rows = texts()
  taught, slots = jax.jit(lambda student, rows: (
      student.teach(*seen(student, rows), rows["tokens"], rows["fields"]), student.slots(rows["tokens"])))(
      student, put(rows))
  for b, s in np.argwhere(rows["statement_valid"]):
    text, fields, by = rows["tokens"][b, s], rows["fields"][b, s], int(taught.moved[b, s])
    first = int(np.argmax(fields > QUESTION))
    assert by == (0 if kind == "opt" else first - 1)
    np.testing.assert_array_equal(taught.tokens[b, s, first - by:12 - by], text[first:])
    np.testing.assert_array_equal(taught.fields[b, s, first - by:12 - by], fields[first:])
    if kind == "t5":
      assert taught.tokens[b, s, 0] == torch_teach.T5.start and taught.fields[b, s, 0] == 0
  assert (np.asarray(slots) >= 0).any()


def seen(student, rows):
  sight = student.see(student.vit(rows["image"]), rows["boxes"], rows["region_valid"])
  return sight, student.read_image(sight)


def test_scores_are_the_likelihoods_of_continued_prompts(student, kind):
  """Each token's score stands where the token stood; what is only read has none."""
  rows = texts()
  first = np.argmax(rows["fields"][:, 0] > QUESTION, -1)
  ends = [tiny.SEP] * (kind == "t5")  # T5 reads prompts that end
  prompts = [row[:at].tolist() + ends for row, at in zip(rows["tokens"][:, 0], first)]
  prompt, real = left_padded(prompts, tiny.PAD)
  rest = np.stack([np.append(row[at:], [tiny.PAD] * at) for row, at in zip(rows["tokens"][:, 0], first)])

  @jax.jit
  def continued(student, rows):
    sight, image = seen(student, rows)
    prompted = student.read(sight, image, rows["prompt"], rows["real"])
    return student.likelihoods(sight, prompted, rows["rest"][:, None])[:, 0]
  asked = dict(prompt=prompt, real=real, rest=rest.astype(np.int32))
  want = np.asarray(continued(student, put(rows | asked)))
  graph, state = nnx.split(student)
  found = Scorer(graph, state)({name: rows[name] for name in (
    "image", "boxes", "region_valid", "tokens", "fields")})
  assert set(found) == {"words"}
  for have, given, at, tokens in zip(found["words"][:, 0], want, first, rows["tokens"][:, 0]):
    length = (tokens != tiny.PAD).sum()
    np.testing.assert_allclose(have[at:length], given[:length - at], atol=1e-4)
    if kind == "t5":
      assert not have[:at].any()


def test_a_mention_keeps_its_region_where_its_text_is_moved(kind, theirs):
  """Open gates: other boxes for the mentioned region change every word after the mention alone."""
  config = torch_teach.config_of(kind, sites="T")
  student = torch_teach.ours(theirs, config, closed=())
  rows = texts()
  rows["tokens"][2, 0] = [tiny.CLS, 20, 21, 22, 23, 24, 25, tiny.BRACKET, tiny.DIGITS + 1, tiny.CLOSE, 26,
                          tiny.SEP]
  rows["fields"][2, 0] = [0, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 0]
  logits = jax.jit(lambda student, rows: student.teach(*seen(student, rows), rows["tokens"],
                                                       rows["fields"]).logits)
  before = np.asarray(logits(student, put(rows)))[2, 0]
  rows["boxes"][2, 1] = [0.05, 0.1, 0.3, 0.95]
  after = np.asarray(logits(student, put(rows)))[2, 0]
  mention = 8 - (0 if kind == "opt" else 5)
  np.testing.assert_array_equal(after[:mention], before[:mention])
  assert (np.abs(after - before)[mention:11 - (0 if kind == "opt" else 5)].max(-1) > 1e-4).all()
