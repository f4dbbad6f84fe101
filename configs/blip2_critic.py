"""The paper's critic at its size: BLIP-2 with ViT-g/14 at 480 px, on judged statements, for 16 chips of v5e.

    lskd plan --config configs/blip2_critic.py --config.init.model=models/blip2 --topology v5e:4x4
    lskd import --from hf blip2-itm-vit-g --image-size 480 --out models/blip2
    lskd train --config configs/blip2_critic.py --config.init.model=models/blip2 \
        --config.data.corpus=work/taught --config.data.judgements=work/judgements.jsonl --workdir work/critic

Expected: nothing has been measured at this size; what the first command says of it is in docs/plan.md.
LSKD published no settings of its critic's training: they are those of configs/blip2.py, for fewer steps.
"""
from configs import blip2


def get_config():
  """As configs/blip2.py, with the accept, answer and rationale heads on the fused pass."""
  config = blip2.get_config()
  config.name = "blip2_critic"
  config.task = "critic"
  config.init.parts = ("student",)
  config.data.batch_size = 128
  config.optim.update(warmup_steps=100, steps=1000)
  return config
