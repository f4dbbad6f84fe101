"""LSKD's student on the smaller published BLIP-2: CLIP's ViT-L/14 instead of ViT-g/14, a third of its size.

    lskd import --from lavis blip2_pretrained_vitL.pth --config configs/blip2_vit_l.py \
        --tokenizer bert-base-uncased --out models/blip2_vit_l
    lskd train --config configs/blip2_vit_l.py --config.init.model=models/blip2_vit_l \
        --config.data.corpus=work/lck/lck/default/1.0.0 --config.data.min_score=0.8 --workdir work/student

Expected: nothing has been measured at this size; the sizes are those of LAVIS's `clip_L`, the other
settings those of configs/blip2.py, at 224 px. At the start it computes exactly what the imported model
computes, since the gates of the region tokens are closed.
"""
from configs import blip2


def get_config():
  """As configs/blip2.py, with CLIP's ViT without its last block."""
  config = blip2.get_config()
  config.name = "blip2_vit_l"
  config.model.vit.update(image_size=224, width=1024, depth=23, heads=16, hidden=4096, eps=1e-5,
                          activation="quick_gelu", input_norm=True, patch_bias=False)
  return config
