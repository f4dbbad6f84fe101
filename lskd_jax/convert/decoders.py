"""The tensors of transformers' decoders, as parts of our leaves: see convert/tables.py."""
from lskd_jax.convert.tables import Entry, linear, norm
from lskd_jax.models.decoders.opt import OFFSET, OptConfig


def opt_table(config: OptConfig, theirs: str = "language_model.", ours: str = "decoder/") -> list[Entry]:
  """Every tensor of `OPTForCausalLM`, whose head is its word embeddings.

  theirs, ours: what stands before the keys and before the leaves' names.
  """
  theirs, width = f"{theirs}model.decoder.", config.width
  table = [
      Entry(f"{theirs}embed_tokens.weight", (config.vocabulary, config.embed), f"{ours}words"),
      Entry(f"{theirs}embed_positions.weight", (config.max_tokens + OFFSET, width),
            f"{ours}positions"),
  ]
  if config.embed != width:
    for name, sizes in (("project_in", (width, config.embed)), ("project_out", (config.embed, width))):
      table.append(Entry(f"{theirs}{name}.weight", sizes, f"{ours}{name}/kernel", (), "linear"))
  if config.final_norm:
    table += norm(f"{theirs}final_layer_norm", f"{ours}norm", width)
  for i in range(config.depth):
    key, block = f"{theirs}layers.{i}.", f"{ours}stack/blocks/"
    for name, part in (("query", "q"), ("key", "k"), ("value", "v"), ("out", "out")):
      table += linear(f"{key}self_attn.{part}_proj", block + name, width, width, (i,))
    table += norm(f"{key}self_attn_layer_norm", f"{block}attention_norm", width, (i,))
    table += linear(f"{key}fc1", f"{block}up", width, config.hidden, (i,))
    table += linear(f"{key}fc2", f"{block}down", config.hidden, width, (i,))
    table += norm(f"{key}final_layer_norm", f"{block}forward_norm", width, (i,))
  return table
