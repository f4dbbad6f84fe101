"""The training state and the one jitted training step.

State is a plain dict pytree: step, params (the trainable parameters), opt, skipped (how many steps
were, in total and in a row). Frozen parameters and constants are a second argument: no gradients, no
optimizer state, stored once.
Randomness is a function of (run key, step).
"""
from collections.abc import Callable
import functools

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import reshard
import optax

from lskd_jax.losses import Weighted
from lskd_jax.parallel import ACT_B, REPLICATED


def trainable(frozen: tuple[str, ...]):
  """The filter of trainable leaves: parameters outside the named parts, e.g. ("vit",)."""
  return nnx.All(nnx.Param, *(nnx.Not(nnx.PathContains(part)) for part in frozen))


def split(model: nnx.Module, frozen: tuple[str, ...]):
  """A model -> graph definition, trainable state, frozen state."""
  return nnx.split(model, trainable(frozen), ...)


def init_state(params, optimizer: optax.GradientTransformation) -> dict:
  """The state before the first step; consumes nothing."""
  zero = lambda: jnp.zeros((), jnp.int32)
  return {"step": zero(), "params": params, "opt": optimizer.init(params),
          "skipped": {"total": zero(), "in_row": zero()}}


def make_train_step(graphdef, optimizer, objective: Callable, loss_weights: dict,
                    microbatches: int = 1, max_grad_norm: float | None = 0.0) -> Callable:
  """Builds step(state, frozen, batch, run_key) -> (state, metrics), jitted, state donated.

  Among the metrics, `examples` is what was fed, on every process: image_id int32[B] and, where the
  batch has it, statement int32[B, S].

  Args:
    objective: (model, batch, key) -> ({loss: Weighted}, {metric: Weighted}).
    loss_weights: {loss: weight}; the loss is the weighted sum of the losses' means.
    microbatches: the statements of a batch are divided into this many parts, whose gradients add
      up to exactly the undivided batch's (each loss is a sum over statements and a weight).
    max_grad_norm: a step whose loss or gradient norm is not finite, or whose norm is above this
      (0 = no bound), changes nothing but `step` and `skipped`. None makes every update.

  Raises ValueError for microbatches with ITC or ITM: their negatives would shrink with the part.
  """
  contrastive = [name for name in ("itc", "itm") if loss_weights.get(name)]
  if microbatches > 1 and contrastive:
    raise ValueError(f"train.microbatches={microbatches} cannot be combined with "
                     f"{' and '.join(contrastive)}: a part of the batch has fewer negatives than the "
                     "batch. Set train.microbatches=1, or these loss weights to 0")

  def sums(params, frozen, batch, key, totals):
    """Loss of a microbatch, its losses divided by the WHOLE batch's weights."""
    model = nnx.merge(graphdef, params, frozen)
    losses, metrics = objective(model, batch, key)
    loss = sum(loss_weights.get(name, 1.0) * value.total / jnp.maximum(totals[name], 1e-9)
               for name, value in losses.items())
    return loss, losses | metrics

  def gradients(params, frozen, batch, key):
    if microbatches == 1:
      def whole(params):
        model = nnx.merge(graphdef, params, frozen)
        losses, metrics = objective(model, batch, key)
        loss = sum(loss_weights.get(name, 1.0) * value.mean() for name, value in losses.items())
        return loss, losses | metrics
      (loss, metrics), grads = jax.value_and_grad(whole, has_aux=True)(params)
      return loss, metrics, grads
    parts = split_statements(batch, microbatches)
    # Weights depend on no parameter, so a first, cheap pass under eval finds their totals.
    weights = lambda part: jax.tree.map(
        lambda value: value.weight, objective(nnx.merge(graphdef, params, frozen), part, key)[0],
        is_leaf=lambda value: isinstance(value, Weighted))
    totals = jax.tree.map(lambda *values: sum(values), *(weights(part) for part in parts))
    loss, metrics, grads = 0.0, None, None
    for i, part in enumerate(parts):
      (part_loss, part_metrics), part_grads = jax.value_and_grad(sums, has_aux=True)(
          params, frozen, part, jax.random.fold_in(key, i), totals)
      add = functools.partial(jax.tree.map, jnp.add)
      grads = part_grads if grads is None else add(grads, part_grads)
      metrics = part_metrics if metrics is None else add(metrics, part_metrics)
      loss += part_loss
    return loss, metrics, grads

  @functools.partial(jax.jit, donate_argnums=0)
  def train_step(state, frozen, batch, run_key):
    key = jax.random.fold_in(run_key, state["step"])
    loss, metrics, grads = gradients(state["params"], frozen, batch, key)
    updates, opt = optimizer.update(grads, state["opt"], state["params"])
    updated = {"params": optax.apply_updates(state["params"], updates), "opt": opt}
    norm, skipped = optax.global_norm(grads), state["skipped"]
    if max_grad_norm is not None:
      good = jnp.isfinite(loss) & jnp.isfinite(norm)
      if max_grad_norm:
        good &= norm <= max_grad_norm
      # A choice between values, leaf by leaf: it fuses into the update and needs no memory.
      updated = jax.tree.map(functools.partial(jnp.where, good), updated,
                             {name: state[name] for name in updated})
      skipped = {"total": skipped["total"] + ~good, "in_row": jnp.where(good, 0, skipped["in_row"] + 1)}
    means = {name: value.mean() for name, value in metrics.items()}
    means |= {"loss": loss, "grad_norm": norm,
              "skipped_steps": skipped["total"], "skipped_in_row": skipped["in_row"]}
    means["examples"] = {name: reshard(batch[name], REPLICATED) for name in ("image_id", "statement")
                         if name in batch}
    return {"step": state["step"] + 1, "skipped": skipped, **updated}, means
  return train_step


def split_statements(batch: dict, parts: int) -> list[dict]:
  """The batch's statements (axis 1 of every [B, S, …] array of statements) in equal parts."""
  statements = batch["statement_valid"].shape[1]
  if statements % parts:
    raise ValueError(f"train.microbatches={parts} does not divide data.statements={statements}")
  size = statements // parts
  per_statement = {"tokens", "fields", "statement", "statement_valid", "accept", "answer_score",
                   "rationale_score"}
  return [{name: reshard(rows[:, i * size:(i + 1) * size], ACT_B) if name in per_statement else rows
           for name, rows in batch.items()} for i in range(parts)]
