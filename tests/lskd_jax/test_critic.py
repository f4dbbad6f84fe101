"""The critic: three heads on the fused pass, each learning from its own judgements."""
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lskd_jax.losses import critic_loss
from lskd_jax.models.critic import Critic
from lskd_jax.models.student import Student
from tests.lskd_jax import tiny
from tests.lskd_jax.tiny import put

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def critic(one_device):
  make = lambda rngs: Critic(Student(tiny.STUDENT, tiny.OPENS_BRACKET, tiny.DIGIT, rngs), rngs)
  return tiny.filled(make)


@pytest.fixture(scope="module")
def judged():
  rng = np.random.default_rng(0)
  scores = rng.random((2, 4, 2)).astype(np.float32)
  return tiny.batch() | {"accept": rng.integers(0, 2, (4, 2)).astype(np.int32),
                         "answer_score": scores[0], "rationale_score": scores[1]}


@jax.jit
def jitted_losses(critic, batch):
  """Losses, how large the gradient of each head is under each, and what the heads said."""
  graph, heads, rest = tiny.parts(critic, "answer", "rationale")

  def total(heads, name):
    return critic_loss(nnx.merge(graph, heads, rest), batch, None)[0][name].mean()
  moved = {}
  for name in ("answer", "rationale"):
    grads = jax.grad(total)(heads, name)
    moved |= {(name, head): jnp.abs(grads[head]["out"]["kernel"][...]).max() for head in grads}
  losses, metrics = critic_loss(critic, batch, None)
  means = {name: value.mean() for name, value in (losses | metrics).items()}
  return means, moved, critic(batch)


def losses_of(critic, rows):
  return jax.tree.map(np.asarray, jitted_losses(critic, put(rows)))


def test_losses_by_hand(critic, judged):
  """Cross-entropy of accept, half the squared error of the others; unreal statements count for
  nothing."""
  means, _, (logits, answer, rationale) = losses_of(critic, judged)
  real = [(b, s) for b in range(4) for s in range(2) if (b, s) != (3, 1)]
  assert [(b, s) for b, s in np.argwhere(judged["statement_valid"]).tolist()] == real
  accept, right, squares = [], [], {"answer": [], "rationale": []}
  for b, s in real:
    odds = logits[b, s].astype(np.float64)
    label = judged["accept"][b, s]
    accept.append(np.log(np.exp(odds).sum()) - odds[label])
    right.append(odds.argmax() == label)
    squares["answer"].append((answer[b, s] - judged["answer_score"][b, s])**2 / 2)
    squares["rationale"].append((rationale[b, s] - judged["rationale_score"][b, s])**2 / 2)
  assert means["accept"] == pytest.approx(np.mean(accept), rel=1e-5)
  assert means["accept_right"] == pytest.approx(np.mean(right))
  for name, values in squares.items():
    assert means[name] == pytest.approx(np.mean(values), rel=1e-5)


@pytest.mark.parametrize("name", ["answer", "rationale"])
def test_each_score_trains_its_own_head(critic, judged, name):
  before, moved, _ = losses_of(critic, judged)
  after, _, _ = losses_of(critic, judged | {f"{name}_score": 1 - judged[f"{name}_score"]})
  assert {loss for loss in before if before[loss] != after[loss]} == {name}
  assert [head for head in ("answer", "rationale") if moved[name, head]] == [name]


def test_the_label_1_means_accept(critic, judged):
  _, _, (logits, _, _) = losses_of(critic, judged)
  agreeing = judged | {"accept": logits.argmax(-1).astype(np.int32)}
  opposed = judged | {"accept": logits.argmin(-1).astype(np.int32)}
  assert losses_of(critic, agreeing)[0]["accept_right"] == 1
  assert losses_of(critic, opposed)[0]["accept_right"] == 0
  assert losses_of(critic, agreeing)[0]["accept"] < losses_of(critic, opposed)[0]["accept"]


def test_heads_are_means_over_the_queries_of_the_fused_pass(critic, judged):
  batch = put(judged)

  @jax.jit
  def fused(critic):
    student = critic.student
    sight = student.see(student.vit(batch["image"]), batch["boxes"], batch["region_valid"])
    return student.fuse(sight, batch["tokens"])
  states, p = np.asarray(fused(critic), np.float64), tiny.pure(critic)
  dense = lambda x, layer: x @ layer["kernel"] + layer["bias"]
  _, _, (logits, answer, rationale) = losses_of(critic, judged)
  np.testing.assert_allclose(logits, dense(states, p["accept"]).mean(2), atol=1e-5)
  for name, got in (("answer", answer), ("rationale", rationale)):
    hidden = np.maximum(dense(states, p[name]["hidden"]), 0)
    np.testing.assert_allclose(got, dense(hidden, p[name]["out"])[..., 0].mean(2), atol=1e-5)


def test_cached_features_give_the_same_judgement(critic, judged):
  features = np.asarray(jax.jit(lambda critic, image: critic.student.vit(image))(
      critic, put(judged)["image"]))
  cached = {name: rows for name, rows in judged.items() if name != "image"} | {"features": features}
  _, _, seen = losses_of(critic, judged)
  for got, expected in zip(jax.jit(lambda critic, batch: critic(batch))(critic, put(cached)), seen):
    np.testing.assert_allclose(got, expected, atol=1e-5)
