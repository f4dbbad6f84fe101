"""A generative student with Flan-T5-XXL, imported, on a published corpus, for 64 chips of v5p.

    lskd plan --config configs/blip2_t5_xxl.py --config.init.model=models/blip2_t5_xxl --topology v5p:4x4x4
    lskd import --from hf blip2-flan-t5-xxl --image-size 480 --out models/blip2_t5_xxl
    lskd train --config configs/blip2_t5_xxl.py --config.init.model=models/blip2_t5_xxl \
        --config.data.corpus=work/lck/lck/default/1.0.0 --config.data.min_score=0.8 --workdir work/student

Expected: nothing has been measured at this size; what the first command says of it is in docs/plan.md. The
settings are those of configs/blip2_opt.py. At the start it computes exactly what the imported model
computes, since the gates of the region tokens are closed.
"""
from configs import blip2_opt


def get_config():
  """As configs/blip2_opt.py, with the sizes of google/flan-t5-xxl: 11 billion parameters, frozen."""
  config = blip2_opt.get_config()
  config.name = "blip2_t5_xxl"
  config.model.language_model = "t5"
  config.model.decoder.update(vocabulary=32128, width=4096, head=64, heads=64, hidden=10240, depth=24,
                              decoder_depth=24)
  config.data.batch_size = 256
  return config
