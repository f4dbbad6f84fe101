"""The overlay arm of the drawn scenes: boxes drawn on the pixels, as in the paper, ViT trained too.

    lskd train --config configs/scenes_overlay.py --config.init.model=work/vit/model \
        --config.data.corpus=work/lck/lck/default/1.0.0 --config.data.min_score=0.5 --workdir work/overlay

Expected: see docs/demo.md.
"""
from configs import scenes_student


def get_config():
  """As the other arms, with colours instead of region tokens."""
  config = scenes_student.get_config()
  config.name = "overlay"
  config.data.region_mode = "overlay"
  config.data.cache_features = False
  config.train.frozen = ()
  return config
