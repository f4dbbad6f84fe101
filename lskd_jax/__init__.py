"""Localized symbolic knowledge distillation in JAX: vision-language models that can be pointed at.

    import lskd_jax
    model = lskd_jax.load("path/to/model")
    model.score(image, [(40, 10, 90, 120)], ["question: who is [0]? answer: a chef"])
    model.ask(image, [(40, 10, 90, 120)], "who is [0]?")

Importing this package is quick: JAX is imported by `load`, or by the module that needs it.
"""
__version__ = "0.1.0"


def load(directory):
  """The student in a model directory, ready to score texts and answer; see `lskd_jax.predictor.load`."""
  from lskd_jax import predictor
  return predictor.load(directory)
