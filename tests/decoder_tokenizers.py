"""Small tokenizers of the kinds that decoders bring along: byte-level BPE (OPT) and Unigram (T5)."""
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from data_pipeline import tokenizer as words


def train_bpe(texts, folder) -> Tokenizer:
  """As OPT's: `<pad>` is 1, `</s>` is 2, a space belongs to the word after it."""
  tokenizer = Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=600, special_tokens=["<s>", "<pad>", "</s>", "<unk>"], show_progress=False,
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
  return _trained(tokenizer, trainer, texts, folder)


def train_unigram(texts, folder) -> Tokenizer:
  """As T5's: `<pad>` is 0, `</s>` is 1, and every word starts with a "▁"."""
  tokenizer = Tokenizer(models.Unigram())
  tokenizer.normalizer = normalizers.NFKC()
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
    [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
  tokenizer.decoder = decoders.Metaspace()
  trainer = trainers.UnigramTrainer(
    vocab_size=400, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>",
    show_progress=False)
  # A bracket or digit among words would be learnt with its neighbours.
  spread = [" ".join(text.replace("[", " [ ").replace("]", " ] ").split()) for text in texts]
  return _trained(tokenizer, trainer, [*spread, " ".join("[]0123456789")], folder)


def _trained(tokenizer, trainer, texts, folder) -> Tokenizer:
  tokenizer.train_from_iterator(texts, trainer)
  words.save_tokenizer(tokenizer, folder)
  return words.load_tokenizer(folder)
