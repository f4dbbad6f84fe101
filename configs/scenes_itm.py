"""Region-swap ITM on the drawn scenes: can the match head tell [0] from [1]?

    lskd demo --full
    python benchmarks/itm_region_swap.py --demo demo

Expected: see benchmarks/README.md.
"""
from configs import scenes_student


def get_config():
  """ITM with region-swap negatives beside LM; ITC draws the hard negatives."""
  config = scenes_student.get_config()
  config.name = "itm"
  config.init.parts = ()            # everything the initial student has
  config.data.statements = 2
  config.loss.update(itc=0.1, itm=1.0, lm=0.5, region_swap=2.0)
  config.optim.update(learning_rate=1e-3, steps=600)
  config.train.save_every = 200
  config.guard.below = 0.0
  return config
