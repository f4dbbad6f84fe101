"""LSKD's generative student: BLIP-2 with OPT-2.7B, imported, on a published corpus, on
all devices that are there: eight, or any number that divides the batch.

    lskd import --from hf blip2-opt-2.7b --image-size 480 --out models/blip2_opt
    lskd train --config configs/blip2_opt.py --config.init.model=models/blip2_opt \
        --config.data.corpus=work/lck/lck/default/1.0.0 --config.data.min_score=0.8 --workdir work/student

Expected: nothing has been measured at this size. LSKD published no settings for this student: they are
those of configs/blip2.py, with the loss of BLIP-2's second stage (plain cross-entropy) on answers and
rationales. The decoder's sizes are those of the imported model, its tokenizer too. At the start it
computes exactly what the imported model computes, since the gates of the region tokens are closed.
"""
from configs import blip2


def get_config():
  """As configs/blip2.py; ViT and decoder stay frozen, and the Q-Former learns what to tell the decoder."""
  config = blip2.get_config()
  config.name = "blip2_opt"
  config.task = "generative"
  config.model.language_model = "opt"
  config.model.decoder.remat = "dots"    # gradients go through the whole decoder to the queries
  config.train.frozen = ("vit", "decoder")
  config.loss.update(itc=0.0, itm=0.0, question=0.0, smoothing=0.0)
  return config
