"""The critic of kind `heads` on judged statements of the drawn scenes (the paper's critic).

    lskd train --config configs/scenes_critic.py --config.init.model=work/captions/model \
        --config.data.corpus=work/taught --config.data.image_root=work/words/images \
        --config.data.judgements=work/judgements.jsonl --workdir work/critic

Expected: with 5 % of the statements judged it barely ranks (AP a few points above the share of
true statements): so few judgements do not teach a fused pass to see. The demo reports it beside
the critic of kind `evidence`, which needs them only for its threshold.
"""
from configs import scenes


def get_config():
  """Accept, answer and rationale heads on the fused pass."""
  config = scenes.get_config()
  config.name = "critic"
  config.task = "critic"
  config.init.parts = ("student",)
  config.data.batch_size = 16
  config.data.statements = 3
  config.data.cache_features = True
  config.train.frozen = ("vit",)
  config.optim.update(learning_rate=5e-4, steps=200)
  return config
