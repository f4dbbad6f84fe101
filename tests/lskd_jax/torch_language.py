"""transformers' decoder of a generative model directory, and its prompts: embeddings of an image's
queries, then of words, with a region's vector at every mention."""
from flax import nnx
import jax
import numpy as np
import torch
from transformers import AutoTokenizer, OPTConfig, OPTForCausalLM

from lskd_jax import trees
from lskd_jax.convert import tables
from lskd_jax.convert.decoders import opt_table, t5_table
from lskd_jax.models import build
from lskd_jax.parallel import make_mesh, put_batch
from tests.lskd_jax import torch_t5


class Reference:
  """What PyTorch says of a model directory; `row` is the image and its regions, with B = 1."""

  def __init__(self, folder, row):
    self.tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    with jax.set_mesh(make_mesh()):
      model = build.load(folder)
      student = nnx.merge(model.graph, model.state)
      batch = put_batch(row, jax.sharding.get_mesh())
      sight = student.see(student.vit(batch["image"]), batch["boxes"], batch["region_valid"])
      self.image = torch.tensor(np.asarray(student.read_image(sight)))
      self.mention = torch.tensor(np.asarray(sight.mention[0]))
      leaves = {name: np.asarray(leaf) for name, leaf in trees.named_leaves(model.state).items()}
    config = model.config.decoder
    self.opt = model.config.language_model == "opt"
    if self.opt:
      table = opt_table(config, "", "decoder/")
      self.model = OPTForCausalLM(OPTConfig(
          vocab_size=config.vocabulary, hidden_size=config.width, word_embed_proj_dim=config.embed,
          num_hidden_layers=config.depth, num_attention_heads=config.heads, ffn_dim=config.hidden,
          max_position_embeddings=config.max_tokens, pad_token_id=config.pad, bos_token_id=config.start,
          eos_token_id=config.end)).eval()
    else:
      table = t5_table(config, "", "decoder/")
      self.model = torch_t5.reference(config)
    state = {entry.theirs: torch.tensor(np.array(tables.to_theirs(entry, leaves[entry.ours][entry.at])))
             for entry in table}
    missing, unexpected = self.model.load_state_dict(state, strict=False)
    assert not unexpected and all("embed_tokens" in key or key == "lm_head.weight" for key in missing)
    self.model.tie_weights() if self.opt else None

  def words(self, text: str, special: bool = True) -> tuple[list[int], torch.Tensor]:
    """Ids and embeddings; a token that holds the number of a "[k]" also has the region's vector."""
    found = self.tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
    x = self.model.get_input_embeddings().weight[found.input_ids].clone()
    for at, (start, end) in enumerate(found.offset_mapping):
      for k in range(10):
        place = text.find(f"[{k}]")
        while place >= 0:
          if start <= place + 1 < end:
            x[at] += self.mention[k]
          place = text.find(f"[{k}]", place + 1)
    return found.input_ids, x

  def likelihood(self, prompt: str, text: str) -> float:
    """Mean log-likelihood of the tokens of `text` after the image and the prompt."""
    with torch.no_grad():
      if self.opt:
        ids, x = self.words(prompt + text)
        wanted = ids[len(self.words(prompt)[0]):]
        logits = self.model(inputs_embeds=torch.cat([self.image[0], x])[None]).logits[0, :-1]
        logits = logits[-len(wanted):]
      else:
        wanted, x = self.words(text.strip(), special=False)
        start = self.model.get_input_embeddings().weight[:1]
        prompt = torch.cat([self.image[0], self.words(prompt)[1]])[None]
        logits = self.model(inputs_embeds=prompt,
                            decoder_inputs_embeds=torch.cat([start, x[:-1]])[None]).logits[0]
    words = torch.log_softmax(logits, -1)[range(len(wanted)), wanted]
    return float(words.mean())

  def answer(self, prompt: str, end: int, **settings) -> str:
    """What is written after the image and the prompt, as BLIP-2 does it."""
    x = torch.cat([self.image[0], self.words(prompt)[1]])[None]
    with torch.no_grad():
      found = self.model.generate(inputs_embeds=x, attention_mask=torch.ones(x.shape[:2]).long(),
                                  eos_token_id=end, do_sample=False,
                                  decoder_start_token_id=None if self.opt else 0, **settings)
    return self.tokenizer.decode(found[0], skip_special_tokens=True).strip()
