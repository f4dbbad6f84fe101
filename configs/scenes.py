"""Sizes of the students of the drawn scenes, shared by the demo's runs; not a run of its own.

The same architecture as BLIP-2, small enough to train in a minute on one core: float32, because
bfloat16 is slower on CPUs, and unrolled, because two blocks gain nothing from a scan.
"""
from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
  """Defaults at the scenes' size."""
  config = common.get_config()
  config.model.embed = 64
  config.model.vit.update(image_size=96, patch=12, width=96, depth=2, heads=4, hidden=384,
                          scan=False)
  config.model.qformer.update(width=96, depth=2, heads=4, hidden=192, queries=8, max_tokens=64,
                              dropout=0.0, scan=False)
  config.data.vocabulary = 512
  config.data.text_tokens = 36  # a statement of the template teacher has 28 on average
  config.data.rationale_dropout = 0.0
  config.data.distractors = 1.0   # boxes tell nothing about which regions the texts are about
  config.loss.question = 0.1      # what is asked is not what is to be learned
  config.loss.end = 0.0           # texts are scored here, never written
  config.loss.smoothing = 0.0     # scores are compared as likelihoods
  config.optim.update(learning_rate=2e-3, b2=0.98, weight_decay=0.01, final_share=0.05,
                      warmup_steps=50)
  config.guard.below = 0.28       # chance is 0.25; one standard error on the development set is 0.034
  config.train.mesh.update(slice=1, fsdp=1)  # one device, however many a machine has
  config.train.save_every = 250
  config.train.keep = 1
  config.train.log_every = 10
  return config
