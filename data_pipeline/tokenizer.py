"""The student's tokenizer: WordPiece over lower-cased text, or its decoder's own; and where its tokens
hold a mention.

A folder holds `tokenizer.json`, which both the `tokenizers` package and transformers'
`AutoTokenizer` read. A stock BERT folder that has only `vocab.txt` works too.

A mention is not a token of its own. "[12]" becomes "[", "12", "]", as in stock BERT, and a model
finds mentions by two tables over the vocabulary (`mention_tables`), so no embedding is ever added.
"""

from __future__ import annotations

from collections.abc import Iterable
import functools
import json
from pathlib import Path
import re

import numpy as np
from tokenizers import (
  Tokenizer,
  decoders,
  models,
  normalizers,
  pre_tokenizers,
  processors,
  trainers,
)

from data_pipeline.records import DataError

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]")
PAD, UNK, CLS, SEP, MASK, DEC = SPECIAL_TOKENS

# Whole words in every trained vocabulary: the markers of a statement, brackets and region numbers.
_NUMBERS = tuple(str(number) for number in range(64))
_ALWAYS = ("[", "]", ":", ",", ".", "?", "question", "answer", "rationale", *_NUMBERS)


def train_tokenizer(
  texts: Iterable[str],
  out_dir: str | Path,
  vocab_size: int = 8192,
  min_frequency: int = 2,
) -> Tokenizer:
  """Trains a WordPiece vocabulary and writes it to `out_dir`; the same texts give the same bytes.

  The vocabulary starts with `SPECIAL_TOKENS` (ids 0 to 5), the marker words and the numbers 0 to
  63, and grows to at most `vocab_size`. Words seen fewer than `min_frequency` times are spelt out.
  DataError where there is no text, or `vocab_size` is too small for the letters of the texts.
  """
  texts = [str(text) for text in texts]
  if not any(text.strip() for text in texts):
    raise DataError(f"{out_dir}: no text to train a tokenizer on; the corpus has no words")
  blank = _wordpiece({UNK: 0}, lowercase=True)
  letters = sorted({letter for text in texts for letter in blank.normalizer.normalize_str(text)})
  letters = [letter for letter in letters if not letter.isspace()]
  # The trainer gives ids to single letters in the order of a hash map, which differs from run to
  # run, and breaks ties between merges by id. Naming all of them beforehand fixes both.
  inside = [f"##{letter}" for letter in letters if _stays_in_word(blank, letter)]
  first = list(dict.fromkeys([*SPECIAL_TOKENS, *_ALWAYS, *letters, *inside]))
  if len(first) > vocab_size:
    raise DataError(f"vocab_size={vocab_size} is below the {len(first)} single letters; raise it")
  trainer = trainers.WordPieceTrainer(
    vocab_size=vocab_size,
    min_frequency=min_frequency,
    special_tokens=first,
    show_progress=False,
  )
  blank.train_from_iterator(texts, trainer)
  tokenizer = _finish(_wordpiece(blank.get_vocab(with_added_tokens=True), lowercase=True))
  save_tokenizer(tokenizer, out_dir)
  return tokenizer


def stand_in(size: int) -> Tokenizer:
  """A WordPiece tokenizer of `size` words, most of them made up: for what depends on their number alone.

  DataError where `size` has no room for the words that every vocabulary has.
  """
  first = [*SPECIAL_TOKENS, *_ALWAYS]
  if size < len(first):
    raise DataError(f"a vocabulary of {size} has no room for the {len(first)} words that all have; raise it")
  words = [*first, *(f"word{number}" for number in range(len(first), size))]
  return _finish(_wordpiece({word: index for index, word in enumerate(words)}, lowercase=True))


def save_tokenizer(tokenizer: Tokenizer, out_dir: str | Path) -> None:
  """Writes `tokenizer.json` and the `tokenizer_config.json` that transformers asks for."""
  out_dir = Path(out_dir)
  out_dir.mkdir(parents=True, exist_ok=True)
  config = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": DEC,
    "pad_token": PAD,
    "unk_token": UNK,
    "cls_token": CLS,
    "sep_token": SEP,
    "mask_token": MASK,
    "clean_up_tokenization_spaces": False,
  }
  files = {
    "tokenizer_config.json": json.dumps(config, indent=2, sort_keys=True) + "\n",
    "tokenizer.json": tokenizer.to_str(pretty=True) + "\n",
  }
  for name, text in files.items():
    temporary = out_dir / f".{name}.tmp"
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(out_dir / name)


def load_tokenizer(folder: str | Path) -> Tokenizer:
  """Reads a folder with `tokenizer.json`, or as stock BERT has it, with `vocab.txt`, or as stock OPT
  has it, with `vocab.json` and `merges.txt`.

  A WordPiece vocabulary without [DEC] (stock BERT) gets it as its last token, as BLIP-2 has it.
  Text that spells a special token, such as "[SEP]", is read as plain text, never as the token.
  DataError where the folder holds none of them, or one that cannot be read.
  """
  folder = Path(folder)
  saved, vocabulary = folder / "tokenizer.json", folder / "vocab.txt"
  byte_level = folder / "vocab.json", folder / "merges.txt"
  if not (saved.exists() or vocabulary.exists() or all(path.exists() for path in byte_level)):
    raise DataError(
      f"{folder}: has no tokenizer.json, no vocab.txt, and no vocab.json with merges.txt; give a "
      "tokenizer folder"
    )
  try:
    if saved.exists():
      tokenizer = Tokenizer.from_file(str(saved))
    elif not vocabulary.exists():
      tokenizer = _byte_level(*byte_level)
    else:
      vocab = models.WordPiece.read_file(str(vocabulary))
      tokenizer = _wordpiece(vocab, lowercase=_is_lower_case(folder))
  except Exception as error:  # the package raises plain Exception
    fault = str(error).splitlines()[0]
    raise DataError(f"{folder}: the tokenizer cannot be read ({fault}); copy it again") from None
  return _finish(tokenizer)


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
  """Token ids of the text alone: no [CLS], [SEP] or padding, no truncation."""
  return tokenizer.encode(text, add_special_tokens=False).ids


def token_id(tokenizer: Tokenizer, token: str) -> int:
  """The id of a token that must exist; DataError otherwise."""
  found = tokenizer.token_to_id(token)
  if found is None:
    raise DataError(f"the tokenizer has no token {token!r}; train or choose another tokenizer")
  return found


@functools.lru_cache(maxsize=1024)
def number_token(tokenizer: Tokenizer, number: int) -> int:
  """The token by which "[number]" differs from "[0]", wherever it stands in a text.

  DataError where there is none, because the tokenizer joins numbers with brackets or splits them.
  """
  zero, found = (tokenizer.token_to_id(str(n)) for n in (0, number))
  for template, wanted in _SURROUNDINGS:
    row, other = (encode(tokenizer, template.format(k=n, n=0)) for n in (0, number))
    numbers = iter([found if letter == "k" else zero for letter in wanted])
    expected = [next(numbers, None) if token == zero else token for token in row]
    if "k" in wanted and (row.count(zero) != len(wanted) or other != expected):
      raise DataError(
        f"the tokenizer has no token of its own for the number in [{number}]; choose another "
        f"tokenizer, or at most {number} regions"
      )
  return found


def piece_text(tokenizer: Tokenizer, token: int) -> str:
  """The text that one token stands for."""
  return _piece_text(tokenizer.id_to_token(token))


def mention_tables(tokenizer: Tokenizer, max_regions: int) -> tuple[np.ndarray, np.ndarray]:
  """Two tables over the vocabulary from which a model finds mentions: (opens_bracket, digit).

  opens_bracket bool[V]: the piece ends in "[".
  digit int32[V]: k where the piece is, or begins with, the number k of a mention ("1", "1]");
    max_regions + k where the piece holds a mention's bracket itself ("[1]", "[1");
    -1 elsewhere, and for numbers from max_regions on.
  `resolve_mentions` says how they are used. Checked here, for every k < max_regions: k is one
  token, and "[k]" is found in every surrounding we write it in. DataError names what fails: a
  vocabulary with pieces such as "[0][1]" (two mentions in one token) cannot point.
  """
  pieces = tokenizer.get_vocab(with_added_tokens=True)
  size = max(pieces.values()) + 1
  opens_bracket = np.zeros(size, bool)
  digit = np.full(size, -1, np.int32)
  for piece, index in pieces.items():
    if piece in SPECIAL_TOKENS:
      continue
    text = _piece_text(piece)
    opens_bracket[index] = text.endswith("[")
    digit[index] = _digit(text, piece, max_regions)
  _check_tables(tokenizer, max_regions, opens_bracket, digit)
  return opens_bracket, digit


def resolve_mentions(
  tokens: np.ndarray, opens_bracket: np.ndarray, digit: np.ndarray, max_regions: int
) -> np.ndarray:
  """int32[..., T]: the slot that each token mentions, or -1. The reference of the models' look-up.

  tokens int32[..., T]. A token mentions k if it is the number k and the token before it ends in
  "[", or if it holds the bracket itself.
  """
  before = np.roll(opens_bracket[tokens], 1, axis=-1)
  before[..., 0] = False
  number = digit[tokens]
  return np.where(number >= max_regions, number - max_regions, np.where(before, number, -1))


def _wordpiece(vocab: dict[str, int], lowercase: bool) -> Tokenizer:
  """An untrained or given vocabulary with BERT's rules: punctuation always stands alone."""
  tokenizer = Tokenizer(models.WordPiece(vocab, unk_token=UNK))
  tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
  tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
  tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=False)
  return tokenizer


def _byte_level(vocabulary: Path, merges: Path) -> Tokenizer:
  """A given vocabulary with GPT-2's rules, as OPT has it; words in <> are special."""
  tokenizer = Tokenizer(models.BPE.from_file(str(vocabulary), str(merges)))
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  special = [piece for piece in tokenizer.get_vocab() if re.fullmatch(r"</?[a-z]+>", piece)]
  tokenizer.add_special_tokens(sorted(special, key=tokenizer.token_to_id))
  return tokenizer


def _stays_in_word(tokenizer: Tokenizer, letter: str) -> bool:
  """Whether a letter can follow another in one word; punctuation and ideographs cannot."""
  text = tokenizer.normalizer.normalize_str(f"a{letter}")
  return len(tokenizer.pre_tokenizer.pre_tokenize_str(text)) == 1


def _finish(tokenizer: Tokenizer) -> Tokenizer:
  """Makes the special tokens of a WordPiece tokenizer special, and sets [CLS] text [SEP]."""
  if isinstance(tokenizer.model, models.WordPiece):
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    ends = [(token, token_id(tokenizer, token)) for token in (CLS, SEP)]
    tokenizer.post_processor = processors.TemplateProcessing(
      single=f"{CLS} $A {SEP}", special_tokens=ends
    )
  tokenizer.no_padding()
  tokenizer.no_truncation()
  tokenizer.encode_special_tokens = True
  return tokenizer


def _is_lower_case(folder: Path) -> bool:
  """The `do_lower_case` of a stock folder's tokenizer_config.json; BERT uncased is the default."""
  path = folder / "tokenizer_config.json"
  config = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
  return bool(config.get("do_lower_case", True))


def _piece_text(piece: str) -> str:
  """The text a piece stands for. Brackets and digits are themselves in every scheme; a leading
  space is written in three ways ("Ġ" byte-level, "▁" sentencepiece, none in WordPiece)."""
  return piece.replace("Ġ", " ").replace("Ċ", "\n").replace("▁", " ")


def _digit(text: str, piece: str, max_regions: int) -> int:
  """The entry of one piece in the `digit` table of `mention_tables`."""
  # A number counts right after "[" inside the piece, or at its start; a "]" or the end must follow.
  numbers = [
    (found[1] == "[", int(found[2])) for found in re.finditer(r"(\[|^)([0-9]{1,9})(?=\]|$)", text)
  ]
  numbers = [(inside, number) for inside, number in numbers if number < max_regions]
  if len(numbers) > 1:
    raise DataError(
      f"the tokenizer joins several mentions in one token, {piece!r}, so regions cannot be "
      "pointed at; choose another tokenizer"
    )
  if not numbers:
    return -1
  inside, number = numbers[0]
  return max_regions + number if inside else number


# How mentions stand in our texts; {k} is the tested number, {n} a neighbour.
_SURROUNDINGS = (
  ("[{k}]", "k"),
  ("[{k}][{n}]", "kn"),
  ("([{k}])", "k"),
  ("[{k}], [{n}]", "kn"),
  ("[{k}] , [{n}]", "kn"),
  ("question: what is [{k}] doing? answer: [{n}] waits for [{k}]. rationale: [{k}]'s", "knkk"),
  ("\n[{k}]\n[{n}]", "kn"),
  ("a {k} or ({k}) is no mention, [{n}] is", "n"),
)


def _check_tables(tokenizer, max_regions, opens_bracket, digit) -> None:
  for k in range(max_regions):
    if not np.any(np.isin(digit[encode(tokenizer, f"[{k}]")], [k, max_regions + k])):
      raise DataError(
        f"the tokenizer splits the number {k}, so [{k}] cannot be pointed at; choose another "
        f"tokenizer, or max_regions <= {k}"
      )
  for k in range(max_regions):
    neighbour = (k + 1) % max_regions
    for template, wanted in _SURROUNDINGS:
      text = template.format(k=k, n=neighbour)
      tokens = np.array(encode(tokenizer, text))
      found = resolve_mentions(tokens, opens_bracket, digit, max_regions)
      expected = [k if letter == "k" else neighbour for letter in wanted]
      if found[found >= 0].tolist() != expected:
        raise DataError(
          f"the tokenizer reads {text!r} as mentions of {found[found >= 0].tolist()}, not of "
          f"{expected}; choose another tokenizer"
        )
