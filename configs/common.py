"""Defaults of every training run, with a reason beside each value that is not obvious.

A run's config file starts from `get_config()` here and changes what it must. Any value can be
changed from the command line, as `--config.optim.learning_rate=1e-4`; unknown keys are refused.
"""
from ml_collections import ConfigDict, FieldReference


def get_config() -> ConfigDict:
  """The defaults: a student on an `lck` corpus, at the size of BLIP-2 with ViT-g/14."""
  config = ConfigDict()
  config.name = "train"         # what the progress bar calls the run
  config.seed = 0               # weights, order of the data, slots, negatives
  config.task = "student"       # student | generative (with a decoder) | critic | tagger (a ViT on
                                # captions as bags of words)

  config.model = model = ConfigDict()
  model.embed = 256             # width of the contrastive embeddings
  model.max_regions = 8         # slots; the tokenizer must have each number as one token
  model.sites = "PQT"           # where region tokens enter: painted, queried, in the text
  model.temperature = 0.07      # of ITC at the start (CLIP, BLIP-2)
  model.dtype = "float32"       # bfloat16 on accelerators that have it
  model.vit = ConfigDict(dict(  # EVA-CLIP ViT-g/14 as in BLIP-2
      image_size=FieldReference(224, field_type=object),  # or (height, width)
      patch=14, width=1408, depth=39, heads=16, hidden=6144, eps=1e-6, activation="gelu",
      input_norm=False, patch_bias=True, remat="none", scan=True,
      attention="auto"))        # fused (one kernel, TPUs only) | plain | auto: fused on TPUs
  model.qformer = ConfigDict(dict(  # BERT-base with 32 queries (BLIP-2)
      width=768, depth=12, heads=12, hidden=3072, queries=32, cross_every=2, max_tokens=512,
      dropout=0.1, remat="none", scan=True))
  model.language_model = "opt"  # generative: opt | t5, as init.model has it, with its decoder's sizes
  model.decoder = ConfigDict(dict(remat="none", scan=True))  # without init.model, also the sizes: see
                                # lskd_jax/models/decoders

  config.init = ConfigDict()
  config.init.model = ""        # a model directory to start from; "" = random weights
  config.init.parts = ()        # which of its top-level parts; () = all that both models have

  config.data = data = ConfigDict()
  data.corpus = ""              # a built lck folder, or a stage folder with image_root
  data.image_root = ""
  data.split = "train"          # "" = all images
  data.min_score = None         # only statements the critic gave at least this; None = all
  data.judgements = ""          # critic: a jsonl or csv of judgements
  data.tokenizer = ""           # a tokenizer directory; "" = that of init.model, else trained here
  data.vocabulary = 8192        # size of a WordPiece vocabulary trained on the corpus, at most
  data.batch_size = 16          # images per step, over all processes
  data.statements = 4           # texts per image: nearly free, because the image is computed once
  data.text_tokens = 128        # as in LSKD; a statement that is longer loses its rationale's end
  data.texts = ConfigDict(dict(statements=1.0, captions=0.0, descriptions=0.0))  # shares
  data.rationale_dropout = 0.5  # LSKD trains half of the statements without their rationale
  data.region_mode = "tokens"   # tokens | overlay | both | none
  data.shuffle_slots = True     # so that a slot says nothing about the region
  data.distractors = 0.5        # share of images that offer all regions, not only the mentioned ones
  data.augment = False          # random crops and mirroring, boxes following
  data.cache_features = False   # a frozen ViT runs once per image of the corpus, not once per step
  data.features = ""            # where; "" = in the work directory. Runs may share it

  config.loss = ConfigDict(dict(
      itc=1.0, itm=1.0, lm=1.0,  # BLIP-2's stage 1: equal weights; 0 leaves a loss out
      region_swap=1.0,           # weight of the region-swap negatives within ITM
      question=1.0,              # weight of a question's own words in LM (LSKD: the whole text);
                                 # 0 for a generative student that is asked questions
      end=1.0,                   # weight of the token that ends a text, in LM (LAVIS: as any other)
      smoothing=0.1,             # label smoothing of ITC and LM (LAVIS)
      detach_gathered=False,     # True: ITC's gradient reaches one side of each direction, as in LAVIS
      itc_block=0,               # images whose statements ITC compares at a time; 0 = the whole batch at once
      pool=0))                   # images among which ITM's negatives are drawn; 0 = the whole batch

  config.optim = ConfigDict(dict(
      learning_rate=1e-5, warmup_steps=1000, steps=10_000, final_share=0.1,  # LSKD
      clip_norm=1.0, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.05))

  config.train = ConfigDict(dict(
      mesh=ConfigDict(dict(      # devices along each axis (docs/training.md, section 5)
          slice=-1,              # pods joined by the data centre's network; -1 = as many as there are
          data=1,                # copies of the parameters; rows of the batch
          fsdp=-1,               # pieces of each parameter; rows of the batch. -1 = the remaining devices
          tensor=1)),            # pieces of heads and hidden widths
      microbatches=1,            # parts of a batch's images whose gradients are added up, negatives included
      frozen=("vit",),           # parts without gradients and optimizer state
      frozen_dtype="",           # how their kernels are stored: "" = float32, or model.dtype
      save_every=1000, keep=3,   # steps between checkpoints, and how many of the newest stay
      save_minutes=0.0,          # also save when the last save is so old; 0 = by steps only
      keep_best=0,               # how many stay besides, by a metric of the evaluation or the step
      best_metric="", best_mode="max",  # its name, and which is better: min | max
      log_every=50, tensorboard=True,
      max_skipped=10,            # steps in a row whose loss or gradient is not finite, until the run stops
      max_grad_norm=0.0,         # a step with a larger gradient is skipped, too; 0 = no bound
      grace=25.0,                # seconds between the notice of a preemption and its end; GCE gives 30
      hang_after=300.0,          # seconds without progress, or 10 median steps, until a run is stuck
      compile_limit=3600.0,      # the same for a start, a restore, a compile, an evaluation or a save
      log_examples=False))       # examples.jsonl: which images each step was fed

  config.eval = ConfigDict(dict(  # losses on images that the run does not learn from
      every=0,                   # steps between evaluations; 0 = none
      corpus="", image_root="",  # as in data; "" = those of data
      split="",                  # of that corpus, "" = all; one of the two has to be given
      batches=0))                # of data.batch_size images, at most; 0 = all

  config.guard = ConfigDict(dict(  # a run that has not left chance at half its steps is extended
      metric="dev_q_a", at=0.5, below=0.32, factor=2.0))
  return config
