"""Localized symbolic knowledge distillation in JAX: vision-language models that can be pointed at.

    import lskd_jax
    model = lskd_jax.load("path/to/model")
    model.ask(image, [(40, 10, 90, 120)], "what is [0] doing?")

Importing this package is quick: JAX is imported by `load`, or by the module that needs it.
"""
__version__ = "0.1.0"


def load(directory, **options):
  """The student in a model directory, ready to score texts and to answer questions.

  See `lskd_jax.predictor.load` for the options and the errors.
  """
  from lskd_jax import predictor
  return predictor.load(directory, **options)
