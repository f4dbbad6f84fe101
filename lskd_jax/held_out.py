"""How a run does on images that it does not learn from: the same losses there, every `eval.every` steps."""
from collections.abc import Callable, Iterator
import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from lskd_jax import parallel
from lskd_jax.losses import Objective, Weighted
from lskd_jax.step import loss_and_gradients


class HeldOut(NamedTuple):
  """What an evaluation is made of.

  batches: as of `prepare.Parts`; the first `count` of them are measured. evaluate: of
  `make_evaluation_step`. key: of the draws of negatives.
  """
  batches: Callable[[int, int], Iterator[dict]]
  count: int
  evaluate: Callable
  key: jax.Array


def without_dropout(model_config):
  """The config of the same model when it is only looked at."""
  return dataclasses.replace(model_config, qformer=dataclasses.replace(model_config.qformer, dropout=0.0))


def make_evaluation_step(graphdef, objective: Objective | Callable, loss_weights: dict,
                         microbatches: int = 1) -> Callable:
  """Builds evaluate(params, frozen, batch, key) -> (found, told), jitted.

  found: {name: Weighted} of losses and other metrics, and as `loss` the weighted sum, which counts once
  for a batch. told: whether `batch["told"]`, bool[B], is true in any row.

  Args:
    graphdef: of a model `without_dropout`; the others are those of `step.make_train_step`.
  """
  @functools.partial(jax.jit, compiler_options=parallel.compiler_options())
  def evaluate(params, frozen, batch, key):
    rows = {name: value for name, value in batch.items() if name != "told"}
    # Nothing depends on the gradients here, so the compiler leaves them out.
    loss, found, _ = loss_and_gradients(graphdef, objective, loss_weights, microbatches, params, frozen,
                                        rows, key)
    return found | {"loss": Weighted(loss, jnp.float32(1))}, batch["told"].any()
  return evaluate


def measure(held_out: HeldOut, params, frozen, told: Callable[[], bool],
            alive: Callable[[], None], progress: bool = False) -> dict[str, float] | None:
  """The means over all batches, as `held_out_<metric>`; None if some process was told to stop.

  All processes then leave behind the same batch: whether they were told travels with their rows.

  Args:
    told: whether this process is to stop. alive: called once a batch.
  """
  sums, before, mesh = {}, None, jax.sharding.get_mesh()

  def add(found) -> bool:
    """Adds up what one batch gave; whether to leave."""
    values, leave = jax.device_get(found)
    for name, value in values.items():
      sums[name] = sums.get(name, np.zeros(2)) + np.array(value, np.float64)
    return bool(leave)

  shown = tqdm(held_out.batches(0, held_out.count), "evaluate", held_out.count, unit="batch", leave=False,
               dynamic_ncols=True, disable=not progress or jax.process_index() > 0)
  for number, batch in enumerate(shown):
    alive()
    batch["told"] = np.full(len(batch["image_id"]), told())
    found = held_out.evaluate(params, frozen, parallel.put_batch(batch, mesh),
                              jax.random.fold_in(held_out.key, number))
    if before and add(before):  # one behind, so that the device always has a batch to work on
      shown.close()
      return None
    before = found
  add(before)
  return {f"held_out_{name}": float(total / max(weight, 1e-9)) for name, (total, weight) in sums.items()}
