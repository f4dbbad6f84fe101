"""transformers' T5 as the reference: random weights, the same weights in ours, and its numbers."""
import dataclasses

from flax import nnx
import jax.numpy as jnp
import numpy as np
import torch
from transformers import T5Config as TorchConfig, T5ForConditionalGeneration

from lskd_jax.convert import decoders
from lskd_jax.models.decoders.t5 import T5, T5Config
from tests.lskd_jax.torch_blip2 import noise
from tests.lskd_jax.torch_decoders import filled

PREFIX = "language_model."  # as in a BLIP-2


def reference(config: T5Config, seed: int = 0) -> T5ForConditionalGeneration:
  """A T5 of noise in float32. transformers knows of gates by the name of the feed-forward alone."""
  about = TorchConfig(
      vocab_size=config.vocabulary, d_model=config.width, d_kv=config.head, num_heads=config.heads,
      d_ff=config.hidden, num_layers=config.depth, num_decoder_layers=config.decoder_depth,
      relative_attention_num_buckets=config.buckets,
      relative_attention_max_distance=config.max_distance, layer_norm_epsilon=config.eps,
      feed_forward_proj="gated-gelu" if config.gated else "relu", tie_word_embeddings=config.tied)
  about.dense_act_fn = config.activation
  model = T5ForConditionalGeneration(about)
  if not config.tied:  # transformers 5 ties the head in memory whatever the config says
    model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.lm_head.weight))
  return noise(model, seed)


def state_dict(model) -> dict[str, torch.Tensor]:
  return {PREFIX + key: value for key, value in model.state_dict().items()}


def ours(model, config: T5Config, dtype=jnp.float32, **changes) -> T5:
  """Our T5 with the numbers of theirs, on the mesh in use; `changes` of how it runs."""
  module = T5(dataclasses.replace(config, **changes), nnx.Rngs(0), dtype)
  table = decoders.t5_table(config, PREFIX, "")
  return filled(module, table, state_dict(model), decoders.t5_ignored(config, PREFIX))


def theirs(model, prompt, real, written) -> tuple[np.ndarray, np.ndarray]:
  """Tokens int[B, P], bool[B, P], int[B, T] -> (the encoder's output, the decoder's logits)."""
  with torch.no_grad():
    found = model(input_ids=torch.tensor(prompt, dtype=torch.long), attention_mask=torch.tensor(real),
                  decoder_input_ids=torch.tensor(written, dtype=torch.long), use_cache=False)
  return found.encoder_last_hidden_state.float().numpy(), found.logits.float().numpy()
