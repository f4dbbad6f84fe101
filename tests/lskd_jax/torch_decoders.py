"""transformers' decoders as the reference: random weights, and the same weights in ours."""
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import torch
from transformers import OPTConfig, OPTForCausalLM

from lskd_jax import trees
from lskd_jax.convert import tables
from lskd_jax.convert.decoders import OPT_IGNORED, opt_table
from lskd_jax.models.decoders.opt import Opt, OptConfig
from lskd_jax.models.generate import generate_after, prompted
from lskd_jax.parallel import ACT_B
from tests.lskd_jax.torch_blip2 import noise

# width, embed, depth, heads, hidden, pre-norm. Little divides anything evenly.
OPT_SHAPES = [(24, 24, 2, 2, 40, True), (15, 15, 3, 3, 33, True), (20, 12, 2, 4, 50, False),
              (11, 11, 1, 1, 7, True)]


def opt_pair(shape, vocabulary=61, scan=True, seed=0):
  """(OPTForCausalLM, Opt) with the same random weights."""
  width, embed, depth, heads, hidden, pre_norm = shape
  model = noise(OPTForCausalLM(OPTConfig(
      vocab_size=vocabulary, hidden_size=width, word_embed_proj_dim=embed, num_hidden_layers=depth,
      num_attention_heads=heads, ffn_dim=hidden, max_position_embeddings=120,
      do_layer_norm_before=pre_norm, pad_token_id=1, bos_token_id=2, eos_token_id=3)), seed)
  config = OptConfig(vocabulary=vocabulary, width=width, embed=embed, depth=depth, heads=heads,
                     hidden=hidden, max_tokens=120, pre_norm=pre_norm, final_norm=pre_norm,
                     scan=scan, end=3)
  module = Opt(config, nnx.Rngs(0))
  return model, filled(module, opt_table(config, "", ""), model.state_dict(), OPT_IGNORED)


def filled(module: nnx.Module, table: list[tables.Entry], state: dict[str, torch.Tensor], ignored=()):
  """The module with PyTorch's numbers; every key and every leaf must be accounted for."""
  graph, params = nnx.split(module)
  shapes = {name: leaf.shape for name, leaf in trees.named_leaves(params).items()}
  tables.check(table, {key: tuple(value.shape) for key, value in state.items()}, ignored,
               "the reference")
  assert not tables.uncovered(table, shapes)
  leaves = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
  for entry in table:
    part = leaves[entry.ours][(*entry.at, ...)]
    part[...] = tables.to_ours(entry, state[entry.theirs].float().numpy(), part.shape)
  for path, leaf in nnx.to_flat_state(params):
    leaf.set_value(jnp.asarray(leaves["/".join(map(str, path))], out_sharding=leaf[...].sharding))
  return nnx.merge(graph, params)


def left_padded(rows: list[list[int]], pad: int) -> tuple[np.ndarray, np.ndarray]:
  """Token rows of different lengths -> int32[B, P] with padding on the left, bool[B, P]."""
  size = max(map(len, rows))
  tokens = np.array([[pad] * (size - len(row)) + row for row in rows], np.int32)
  real = np.array([[False] * (size - len(row)) + [True] * len(row) for row in rows])
  return tokens, real


def continuation(decoder, tokens, real, decoding, key=None, prompt_start=None):
  """What `decoder` generates after prompts: `prompt_start` None = the prompt's last token goes first
  (OPT), else the decoder's own start token (T5)."""
  graph, state = nnx.split(decoder)
  batch, size = tokens.shape
  tokens, real = (jax.device_put(x, ACT_B) for x in (tokens, real))

  @jax.jit
  def run(state, tokens, real, key):
    decoder = nnx.merge(graph, state)
    own = prompt_start is None
    memory = decoder.read(decoder.embed(tokens[:, :size - own]), real[:, :size - own])
    stream = tokens if own else jnp.full_like(tokens[:, :1], prompt_start)

    def write(cache, tokens, before, place, lineage):
      x = decoder.embed(tokens)[:, :, None]
      states, cache = decoder.write(memory, x, cache, place, lineage)
      return decoder.logits(states)[:, :, 0], cache
    cache = decoder.cache(batch, decoding.beams, 1 + decoding.max_tokens)
    prompts = prompted(memory, stream, decoder.words.shape[0])
    return generate_after(write, cache, prompts, decoding, key)
  return jax.tree.map(np.asarray, run(state, tokens, real, jax.random.key(0) if key is None else key))
