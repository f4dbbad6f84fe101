"""The optimizer: AdamW with clipped gradients, and its learning rate as a function of the step.

All functions take the same group of settings (an `ml_collections.ConfigDict` or anything with these
attributes):

    learning_rate   peak
    warmup_steps    length of the linear warm-up, in steps; 0 for none
    steps           length of the run
    final_share     learning rate at the end, as a share of the peak
    clip_norm       gradients are scaled down to this global norm
    b1, b2, eps     Adam's (Kingma & Ba 2015)
    weight_decay    decoupled (Loshchilov & Hutter 2019): per step, learning rate x weight_decay x p
"""
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

# Whether a parameter decays is decided by the last word of its own name, such as `kernel`, `q_bias`
# or `query_tokens`, never by its shape: stacking layers for a scan makes a matrix of every bias.
DECAYED = {"kernel"}
NOT_DECAYED = {
    "bias", "scale",  # of layers and norms
    "embedding", "words", "positions", "slot",  # tables, of which a step reads a few rows
    "token", "tokens",  # class token, query tokens: inputs rather than maps
    "temperature",  # of ITC; decay would pull log-temperature to 0, that is to temperature 1
    "gate",  # zero at the start; what opens them is the data alone
}


def schedule(config) -> Callable:
  """The learning rate of update number `step`, 0-based: linear warm-up, then half a cosine.

      step < warmup_steps:  peak (step + 1) / warmup_steps
      after:                peak (f + (1 - f) (1 + cos(pi t)) / 2),  t from 0 at the end of warm-up
                            to 1 at `steps` (Loshchilov & Hutter 2017, one cycle), f = final_share

  The function takes an int or a traced array, and stays at the final value after `steps`.

  Raises:
    ValueError: warm-up does not end before the run does.
  """
  if not 0 <= config.warmup_steps < config.steps:
    raise ValueError(f"warmup_steps={config.warmup_steps} must be at least 0 and less than "
                     f"steps={config.steps}")
  peak, warmup, final = config.learning_rate, config.warmup_steps, config.final_share
  length = config.steps - warmup

  def rate(step):
    rising = (step + 1) / max(warmup, 1)
    progress = jnp.clip((step - warmup) / length, 0, 1)
    falling = final + (1 - final) * (1 + jnp.cos(jnp.pi * progress)) / 2
    return peak * jnp.where(step < warmup, rising, falling)

  return rate


def decay_mask(params):
  """A tree like `params` with True where weight decay applies.

  Raises:
    ValueError: a parameter whose name is in neither list of this file; it names the parameter.
  """
  def decays(path, _):
    name = jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")  # of NNX
    word = name.rsplit("/", 1)[-1].rsplit("_", 1)[-1]
    if word not in DECAYED | NOT_DECAYED:
      raise ValueError(f"parameter {name}: add {word!r} to DECAYED or NOT_DECAYED in "
                       "lskd_jax/optim.py")
    return word in DECAYED
  return jax.tree_util.tree_map_with_path(decays, params)


def optimizer(config) -> optax.GradientTransformation:
  """AdamW on gradients clipped by their global norm, with `schedule` and `decay_mask`."""
  return optax.chain(
      optax.clip_by_global_norm(config.clip_norm),
      optax.adamw(schedule(config), b1=config.b1, b2=config.b2, eps=config.eps,
                  weight_decay=config.weight_decay, mask=decay_mask))
