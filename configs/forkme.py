"""A student on your own pictures: copy this file and change what is marked.

    lskd train --config configs/forkme.py --config.data.corpus=work/taught \
        --config.data.image_root=photos --workdir work/student

Expected: on one CPU core about one step a second at this size; the LM loss falls below 2 within a
few hundred steps on a corpus of template statements. For a BLIP-2-sized student on accelerators,
drop the lines marked SMALL: configs/common.py has BLIP-2's sizes.
"""
from configs import common


def get_config():
  """A small student from random weights."""
  config = common.get_config()
  config.name = "student"
  config.model.embed = 128                                            # SMALL
  config.model.vit.update(image_size=224, patch=16, width=192, depth=4, heads=4, hidden=768)  # SMALL
  config.model.qformer.update(width=192, depth=4, heads=4, hidden=768, queries=16, max_tokens=128,
                              dropout=0.0)                            # SMALL
  config.data.text_tokens = 64
  config.data.batch_size = 8
  config.data.texts.update(statements=0.7, captions=0.1, descriptions=0.2)
  config.train.frozen = ()              # from random weights; freeze a ViT that is pretrained
  config.optim.update(learning_rate=5e-4, warmup_steps=100, steps=2000, b2=0.98)
  config.train.mesh.update(data=-1, fsdp=1)  # a small model is whole on each of the devices
  config.train.save_every = 200
  return config
