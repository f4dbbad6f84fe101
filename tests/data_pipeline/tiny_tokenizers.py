"""Small tokenizers of the kinds that decoders come with, trained on a few texts."""
import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

TEXTS = [
  "question: who is [0]? answer: a chef rationale: [0] wears a tall white hat\n",
  "question: what does [1] do to [2]? answer: [1] greets the king rationale: waving\n",
  "[0], [1] and [2][3] sit at the table ([4]), with gold crown and fish.\n",
  "a sunny beach: tall white hat with cup waving, gold crown with fish sitting\n",
  "question: is [10] beside [11]? answer: no, [12] is. rationale: [13], [14] and [15] stand by [99]'s\n",
] * 3


def opt_tokenizer(folder, vocabulary: int = 400) -> Path:
  """GPT-2's byte-level BPE with OPT's special tokens: <pad> = 1, and </s> = 2 before every text."""
  tokenizer = Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  special = ["<s>", "<pad>", "</s>", "<unk>"]
  tokenizer.train_from_iterator(TEXTS, trainers.BpeTrainer(
    vocab_size=vocabulary, special_tokens=special, show_progress=False,
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
  tokenizer.post_processor = processors.TemplateProcessing(
    single="</s> $A", special_tokens=[("</s>", 2)])
  return _save(tokenizer, folder, tokenizer_class="GPT2Tokenizer", bos_token="</s>",
               eos_token="</s>", pad_token="<pad>", unk_token="</s>")


def t5_tokenizer(folder, vocabulary: int = 200) -> Path:
  """SentencePiece's Unigram as T5 has it: <pad> = 0, and </s> = 1 after every text; <unk> = 2."""
  tokenizer = Tokenizer(models.Unigram())
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
    pre_tokenizers.WhitespaceSplit(),
    pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")])
  tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
  tokenizer.train_from_iterator(TEXTS, trainers.UnigramTrainer(
    vocab_size=vocabulary, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>",
    show_progress=False, initial_alphabet=list("0123456789[]():?.,' ")))
  tokenizer.post_processor = processors.TemplateProcessing(
    single="$A </s>", special_tokens=[("</s>", 1)])
  return _save(tokenizer, folder, tokenizer_class="T5Tokenizer", eos_token="</s>",
               pad_token="<pad>", unk_token="<unk>")


def _save(tokenizer: Tokenizer, folder, **config) -> Path:
  """A folder that transformers' AutoTokenizer reads too."""
  folder = Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  tokenizer.save(str(folder / "tokenizer.json"))
  (folder / "tokenizer_config.json").write_text(json.dumps({
    "clean_up_tokenization_spaces": False, **config}))
  return folder
