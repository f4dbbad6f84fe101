"""The overlay arm of the drawn scenes: boxes drawn on the pixels, as in the paper.

    lskd train --config configs/scenes_overlay.py --config.init.model=work/vit/model \
        --config.data.corpus=work/lck/lck/default/1.0.0 --config.data.min_score=0.5 --workdir work/overlay

Expected: Q->A stays at chance. In the causal pass the queries never see the question, so they must
hold what every colour marks before they know which one is asked about (docs/demo.md). As in the
paper, a picture belongs to one statement, and half of the pictures show only the regions that it
mentions: with one box there is one thing to hold, the easiest start there is. A ViT trained along
does worse: with so few pictures a step it forgets what it saw before.
"""
from configs import scenes_student


def get_config():
  """As the other arms, with colours instead of region tokens; the ViT runs at every step."""
  config = scenes_student.get_config()
  config.name = "overlay"
  config.data.region_mode = "overlay"
  config.data.cache_features = False
  config.model.qformer.queries = 16   # more to hold
  config.data.statements = 1
  config.data.distractors = 0.5
  return config
