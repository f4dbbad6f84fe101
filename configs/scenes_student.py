"""A student of the drawn scenes: statements about regions, region tokens, frozen ViT.

    lskd train --config configs/scenes_student.py --config.init.model=work/vit/model \
        --config.data.corpus=work/lck/lck/default/1.0.0 --config.data.min_score=0.5 --workdir work/student

Expected: localized Q->A leaves chance (25 %) between steps 250 and 500 and ends between 66 and 85 %,
depending on the seed. About two minutes on one core.
"""
from configs import scenes


def get_config():
  """Every arm of the demo; they differ in corpus and region mode only."""
  config = scenes.get_config()
  config.name = "student"
  config.init.parts = ("vit",)  # the Q-Former starts from random weights: see docs/demo.md
  config.data.batch_size = 16
  config.data.statements = 4
  # The verbalizer's words too, as noisy as they are: descriptions tie every region to what is seen
  # there, captions keep the whole picture readable.
  config.data.texts.update(statements=0.6, descriptions=0.35, captions=0.05)
  config.data.cache_features = True
  config.loss.update(itc=0.0, itm=0.0)  # three times the statements per second; LM is the head used
  config.optim.steps = 1000
  return config
