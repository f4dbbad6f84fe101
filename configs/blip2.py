"""LSKD's student: a stage-1 BLIP-2 with ViT-g/14, imported, on a published corpus, on all devices
that are there: eight, or any number that divides the batch.

    lskd import --from hf blip2-itm-vit-g --image-size 480 --out models/blip2
    lskd train --config configs/blip2.py --config.init.model=models/blip2 \
        --config.data.corpus=work/lck/lck/default/1.0.0 --config.data.min_score=0.8 --workdir work/student

Expected: nothing has been measured at this size; the settings are those of LSKD (Park et al. 2023: 480 px,
128 tokens, 256 statements a step, learning rate 1e-5, 10,000 steps, scores from 0.8 up). At the start
it computes exactly what the imported model computes, since the gates of the region tokens are closed.
"""
from configs import common


def get_config():
  """Sizes as in configs/common.py; the ViT stays frozen."""
  config = common.get_config()
  config.name = "blip2"
  config.model.dtype = "bfloat16"
  config.model.vit.image_size = 480
  config.model.qformer.remat = "full"    # what a block computes is not kept: 28 images fit a chip of 16 GB
  config.data.batch_size = 64
  config.data.statements = 4             # 256 statements a step, and a quarter of LSKD's ViT passes
  config.train.frozen_dtype = "bfloat16"
  return config
