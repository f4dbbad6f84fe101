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

from lskd_jax.losses import Objective, row_by_row
from lskd_jax.models.layers import gathered
from lskd_jax.parallel import REPLICATED, compiler_options
from lskd_jax.rows import in_parts, joined

DIVIDED = 7  # the number of a divided batch's keys: those of losses.py are smaller


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


def make_train_step(graphdef, optimizer, objective: Objective | Callable, loss_weights: dict,
                    microbatches: int = 1, max_grad_norm: float | None = 0.0) -> Callable:
  """Builds step(state, frozen, batch, run_key) -> (state, metrics), jitted, state donated.

  Among the metrics, `examples` is what was fed, on every process: image_id int32[B] and, where the
  batch has it, statement int32[B, S].

  Args:
    objective: an Objective, or for losses whose rows do not need each other a function
      (model, batch, key) -> ({loss: Weighted}, {metric: Weighted}).
    loss_weights: {loss: weight}; the loss is the weighted sum of the losses' means.
    microbatches: the images of a batch are divided into this many parts, whose gradients add up to those of
      the undivided batch, negatives included. Each device keeps its own rows.
    max_grad_norm: a step whose loss or gradient norm is not finite, or whose norm is above this
      (0 = no bound), changes nothing but `step` and `skipped`. None makes every update.
  """
  @functools.partial(jax.jit, donate_argnums=0, compiler_options=compiler_options())
  def train_step(state, frozen, batch, run_key):
    key = jax.random.fold_in(run_key, state["step"])
    loss, metrics, grads = loss_and_gradients(graphdef, objective, loss_weights, microbatches,
                                              state["params"], frozen, batch, key)
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


def loss_and_gradients(graphdef, objective: Objective | Callable, loss_weights: dict, microbatches: int,
                       params, frozen, batch: dict, key):
  """A batch's loss, its losses and metrics as {name: Weighted}, and the gradients; see `make_train_step`."""
  if not isinstance(objective, Objective):
    objective = row_by_row(objective)
  model_of = lambda params: gathered(nnx.merge(graphdef, params, frozen, copy=True))
  if microbatches > 1:
    return divided_gradients(objective, model_of, params, batch, key, loss_weights, microbatches)

  def whole(params):
    losses, metrics = objective(model_of(params), batch, key)
    return weighted_sum(losses, loss_weights), losses | metrics
  (loss, metrics), grads = jax.value_and_grad(whole, has_aux=True)(params)
  return loss, metrics, grads


def weighted_sum(losses: dict, loss_weights: dict, totals: dict | None = None):
  """Sum of the losses' means times their weights.

  Args:
    totals: {loss: what to divide it by}; None = its own weight.
  """
  totals = totals or {name: value.weight for name, value in losses.items()}
  return sum((loss_weights.get(name, 1.0) * value.total / jnp.maximum(totals[name], 1e-9)
              for name, value in losses.items()), start=jnp.float32(0))


def divided_gradients(objective: Objective, model_of: Callable, params, batch: dict, key, loss_weights: dict,
                      parts: int):
  """Loss, metrics and gradients of a batch whose activations are held a part at a time.

  As in GradCache (Gao et al. 2021, Scaling deep contrastive learning batch size under memory limited setup):
  a first pass reads all parts without gradients. The losses over their embeddings give gradients with respect
  to those, which a second pass carries on into each part when it is read again, together with the losses of
  its own rows. Draws are those of the whole batch; dropout has a key for each part, the same in both passes.

  Args:
    model_of: params -> model.
  """
  keys = jax.random.split(jax.random.fold_in(key, DIVIDED), parts)
  rows_of = in_parts(batch, parts)

  def first(_, part):
    model, (rows, key) = model_of(params), part
    looked = objective.look(model, rows)
    seen = {name: value for name, value in looked.items() if name not in rows}
    return None, (objective.read(model, looked, key)[0], seen)
  _, (embeddings, seen) = jax.lax.scan(first, None, (rows_of, keys))
  embeddings, whole = joined(embeddings), batch | joined(seen)

  def across(params, embeddings):
    losses, rows = objective.across(model_of(params), embeddings, whole, key)
    return weighted_sum(losses, loss_weights), (losses, rows)
  (loss, (found, drawn)), (grads, towards) = jax.value_and_grad(
      across, (0, 1), has_aux=True)(params, embeddings)
  rows_of |= in_parts(drawn, parts)
  if "vit" not in params:  # what a frozen ViT sees does not change: keep it rather than see it again
    rows_of |= seen

  def part_losses(params, rows, key):
    model = model_of(params)
    rows = objective.look(model, rows)
    embeddings, context = objective.read(model, rows, key)
    return embeddings, *objective.within(model, rows, context, key)

  # Weights depend on no parameter, so the compiler leaves everything else out of this.
  totals = jax.tree.map(lambda weights: weights.sum(0), jax.lax.map(lambda part: {
      name: value.weight for name, value in part_losses(params, *part)[1].items()}, (rows_of, keys)))

  def second(grads, part):
    *part, towards = part

    def surrogate(params):
      embeddings, losses, metrics = part_losses(params, *part)
      loss = weighted_sum(losses, loss_weights, totals)
      carried = jax.tree.map(lambda value, gradient: (value * gradient).sum(), embeddings, towards)
      return loss + sum(jax.tree.leaves(carried)), (loss, losses | metrics)
    (_, found), more = jax.value_and_grad(surrogate, has_aux=True)(params)
    return jax.tree.map(jnp.add, grads, more), found
  grads, found_of = jax.lax.scan(second, grads, (rows_of, keys, in_parts(towards, parts)))
  within, metrics = jax.tree.map(lambda values: values.sum(0), found_of)
  return loss + within, found | metrics, grads
