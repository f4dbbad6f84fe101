"""Stage 1 of the drawn scenes: the Q-Former on the verbalizer's captions, ITC + ITM + LM, no regions.

    lskd train --config configs/scenes_captions.py --config.init.model=work/vit/model \
        --config.data.corpus=work/words --config.data.image_root=work/words/images --workdir work/captions

Expected: ITC ends near 1.0, because place, weather and length identify a caption (chance among 16
is 2.8), LM near 2.2. About a minute on one core.
"""
from configs import scenes


def get_config():
  """The student before any statement: what the arms are compared with."""
  config = scenes.get_config()
  config.name = "captions"
  config.init.parts = ("vit",)
  config.data.texts.update(statements=0.0, captions=1.0)
  config.data.region_mode = "none"
  config.data.batch_size = 16
  config.data.statements = 1
  config.data.text_tokens = 48
  config.data.cache_features = True
  config.optim.update(learning_rate=1e-3, steps=200)
  return config
