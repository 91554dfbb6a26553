"""Tokenizers: text to token ids and back.

In every tokenizer the ids 0 to 6 are the special tokens of `special_tokens.SPECIAL`. Encoding a text yields none of
them except [UNK] (6). Every tokenizer has

    vocab_size, special_ids     all ids are below vocab_size; samplers never insert tokens whose id is in special_ids
    byte_ids                    ids of the tokens that stand for one byte, except tab and line breaks, or ()
    encode(text)                token ids; names of special tokens in the text are treated as ordinary characters
    encode_with_offsets(text)   (ids, spans): spans[i] = (start, end) are the character offsets of token i; spans are in
                                order and do not overlap. If one character is encoded as several byte tokens, the span
                                of the last byte token covers it and the other spans are empty
    decode(ids)                 text; special ids are skipped
    pieces(ids)                 one readable string per token, for display
    fingerprint                 hash of the vocabulary and of every setting that affects the ids
    save(folder)                writes files from which `load(folder)` restores the same tokenizer

decode(encode(text)) == text, with these exceptions:

- SentencePiece decodes U+2581, its symbol for a space, as a space, and a normalization other than `identity` changes
  the text. Models that were not trained by this package may also lack characters or drop spaces.
- WordPiece separates words by single spaces, spaces punctuation as in English and turns unknown words into [UNK];
  uncased vocabularies give lower-case text without accents. WordTokenizer separates words by single spaces.
"""

import codecs
import functools
import hashlib
import io
import itertools
import json
import re

from absl import logging
from etils import epath

from ilm_jax import paths
from ilm_jax.special_tokens import SPECIAL, UNK
from ilm_jax.types import UserError

INFO_FILE = 'ilm_tokenizer.json'  # file with the kind and fingerprint of a saved tokenizer; it is written last
NORMALIZATIONS = ('identity', 'nfkc', 'nmt_nfkc', 'nfkc_cf', 'nmt_nfkc_cf')  # SentencePiece's normalization rules
LINE = 2**12  # maximum number of characters per training line of SentencePiece; longer lines are cut
WHITESPACE = ('<0x09>', '<0x0A>', '<0x0D>')  # the bytes of tab and line breaks, as SentencePiece writes them
RESERVED = '\u2585'  # a character that SentencePiece uses internally
THREADS = 8  # number of SentencePiece training threads; constant, because the trained model depends on it
MODEL_FILES = ('spiece.model', 'tokenizer.model', 'vocab.txt')  # tokenizer files that pretrained models come with


class Tokenizer:
  """Base class of tokenizers. Two tokenizers of the same kind that save identical files have the same fingerprint."""

  kind: str
  words: tuple[str, ...]  # the text of each token id
  special_ids = tuple(range(len(SPECIAL)))
  byte_ids: tuple[int, ...] = ()  # ids of the tokens that stand for one byte, except tab and line breaks

  @property
  def vocab_size(self) -> int:
    """Number of ids, including those of the special tokens."""
    return len(self.words)

  def pieces(self, ids) -> list[str]:
    """Return a readable string for each id: special tokens in brackets; in SentencePiece, U+2581 for a space."""
    return [self.words[int(i)] for i in ids]

  def files(self) -> dict[str, bytes]:
    """Return the files (name -> content) that `save` writes and from which the tokenizer can be rebuilt."""
    raise NotImplementedError

  @functools.cached_property
  def fingerprint(self) -> str:
    """Hash of the tokenizer's kind and files, as 16 hexadecimal digits."""
    return fingerprint_of(self.kind, self.files())

  def save(self, folder) -> None:
    """Write the tokenizer into a folder. Does nothing if the same tokenizer is already saved there."""
    path = epath.Path(folder)
    text = json.dumps({'kind': self.kind, 'fingerprint': self.fingerprint}) + '\n'
    if (path / INFO_FILE).exists() and (path / INFO_FILE).read_text() == text:
      return
    path.mkdir(parents=True, exist_ok=True)
    for name, content in self.files().items():
      (path / name).write_bytes(content)
    (path / INFO_FILE).write_text(text)

  def __reduce__(self):
    return _make, (self.kind, self.files())


class WordTokenizer(Tokenizer):
  """A tokenizer with a fixed list of words, whose ids come after those of the special tokens."""

  kind = 'words'

  def __init__(self, words):
    self.words = SPECIAL + tuple(words)
    self._ids = {word: i for i, word in enumerate(self.words) if i >= len(SPECIAL)}

  def files(self) -> dict[str, bytes]:
    return {'words.json': json.dumps(self.words[len(SPECIAL) :]).encode()}

  def ids(self, words) -> list[int]:
    """Return the ids of a sequence of words; raise UserError if one is not in the vocabulary."""
    for word in words:
      if word not in self._ids:
        known = self.words[len(SPECIAL) :]
        raise UserError(f'unknown token {word!r}: expected one of {known[0]} ... {known[-1]} ({len(known)} words)')
    return [self._ids[word] for word in words]

  def encode(self, text: str) -> list[int]:
    return self.ids(text.split())

  def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    found = list(re.finditer(r'\S+', text))
    return self.ids([match[0] for match in found]), [match.span() for match in found]

  def decode(self, ids) -> str:
    return ' '.join(self.words[int(i)] for i in ids if int(i) >= len(SPECIAL))


class SentencePiece(Tokenizer):
  """Tokenizer from the content of a SentencePiece model file, which error messages call `name`.

  The model's pieces, except control symbols, unused pieces and <unk>, get the ids 7, 8, ... in the model's order.
  """

  kind = 'sentencepiece'

  def __init__(self, model: bytes, name: str = 'the SentencePiece model'):
    import sentencepiece

    self._model = model
    try:
      self._processor = sp = sentencepiece.SentencePieceProcessor(model_proto=model)
      size = sp.vocab_size()
    except (RuntimeError, OSError, ValueError, TypeError) as error:
      raise UserError(f'{name} is not a SentencePiece model: {_one_line(error)}') from None
    if not model or not size:
      raise UserError(f'{name} is not a SentencePiece model: it is empty')
    ordinary = [i for i in range(size) if not (sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i))]
    self._to_model = [sp.unk_id()] * len(SPECIAL) + ordinary  # our id -> id in the SentencePiece model
    self._from_model = [UNK] * size  # id in the SentencePiece model -> our id
    for our_id, model_id in enumerate(ordinary, len(SPECIAL)):
      self._from_model[model_id] = our_id
    self.words = (*SPECIAL, *map(sp.id_to_piece, ordinary))
    # SentencePiece has no other pieces for line breaks and often none for tabs, so samplers may insert these bytes.
    bytes_only = [i for i, model_id in enumerate(self._to_model) if sp.is_byte(model_id)]
    self.byte_ids = tuple(i for i in bytes_only if self.words[i] not in WHITESPACE)

  def files(self) -> dict[str, bytes]:
    return {'sentencepiece.model': self._model}

  def encode(self, text: str) -> list[int]:
    check_text(text)
    return [self._from_model[i] for i in self._processor.encode(text)]

  def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    from sentencepiece import sentencepiece_pb2

    check_text(text)
    serialized = self._processor.encode(text, out_type='serialized_proto')
    pieces = sentencepiece_pb2.SentencePieceText.FromString(serialized).pieces
    character = _character_at_byte(text)
    return [self._from_model[p.id] for p in pieces], [(character[p.begin], character[p.end]) for p in pieces]

  def decode(self, ids) -> str:
    """Return the text of token ids; byte tokens that do not form valid UTF-8 become U+FFFD."""
    return self._processor.decode([self._to_model[int(i)] for i in ids if int(i) >= UNK])


class WordPiece(Tokenizer):
  """WordPiece tokenizer, as in BERT, from the content of a vocabulary file with one entry per line.

  The entries, except special tokens, get the ids 7, 8, ... in file order. With `lowercase` (for uncased vocabularies),
  texts are lower-cased and stripped of accents. `name` names the vocabulary in error messages.
  """

  kind = 'wordpiece'

  def __init__(self, vocab: bytes, lowercase: bool = True, name: str = 'the vocabulary'):
    try:
      import tokenizers
    except ImportError:
      raise UserError(
        f'{name}: WordPiece needs the package tokenizers: install it with pip install "ilm_jax[wordpiece]" (or make '
        'setup EXTRAS=wordpiece)'
      ) from None
    self._vocab, self._lowercase = vocab, bool(lowercase)
    try:
      lines = vocab.decode().replace('\r\n', '\n').removesuffix('\n').split('\n')
    except UnicodeDecodeError as error:
      raise UserError(f'{name} is not UTF-8: byte {error.start} is {vocab[error.start]:#04x}') from None
    words = [word for word in lines if word not in SPECIAL]
    if not words or not all(words) or len(set(words)) < len(words) or any(' ' in word for word in words):
      raise UserError(f'{name} is not a WordPiece vocabulary: expected one word per line, without duplicates')
    self.words = SPECIAL + tuple(words)
    ids = {word: i for i, word in enumerate(self.words) if i >= UNK}
    self._tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(ids, unk_token=SPECIAL[UNK]))
    self._tokenizer.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=self._lowercase)
    self._tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    self._tokenizer.decoder = tokenizers.decoders.WordPiece(cleanup=True)

  def files(self) -> dict[str, bytes]:
    return {'vocab.txt': self._vocab, 'settings.json': json.dumps({'lowercase': self._lowercase}).encode()}

  def encode(self, text: str) -> list[int]:
    check_text(text)
    return self._tokenizer.encode(text, add_special_tokens=False).ids

  def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    check_text(text)
    encoded = self._tokenizer.encode(text, add_special_tokens=False)
    return encoded.ids, encoded.offsets

  def decode(self, ids) -> str:
    return self._tokenizer.decode([int(i) for i in ids if int(i) >= UNK])


def check_text(text: str) -> None:
  """Raise UserError if a text contains an unpaired surrogate (possible in JSON escapes), which UTF-8 cannot encode."""
  try:
    text.encode()
  except UnicodeEncodeError as error:
    found = f'{text[error.start]!r} at character {error.start}'
    raise UserError(f'a text contains the unpaired surrogate {found}: remove it') from None


def _character_at_byte(text: str):
  """Return a list that maps each byte offset of a text's UTF-8 encoding, including its end, to a character offset."""
  if text.isascii():
    return range(len(text) + 1)
  return [i for i, character in enumerate(text) for _ in character.encode()] + [len(text)]


def _one_line(error: Exception) -> str:
  """Format an error as a single line of at most 200 characters."""
  return ' '.join(str(error).split())[:200] or type(error).__name__


def _sentences(lines):
  """Cut the lines into parts that SentencePiece accepts: it would skip long lines and lines that contain RESERVED.

  Lines are cut at spaces where possible. Spaces at the ends of parts are left out, because a training text in which all
  lines end with a space gives a vocabulary of single characters.
  """
  cut = 0
  for line in lines:
    cut += len(line) > LINE
    for part in line.split(RESERVED):
      while len(part) > LINE:
        end = part.rfind(' ', 1, LINE)
        end = LINE if end < 0 else end
        yield part[:end].rstrip(' ')
        part = part[end:]
      yield part.rstrip(' ')
  if cut:
    logging.info('cut %d of the training lines of the tokenizer at the limit of %s characters', cut, f'{LINE:,}')


def train_sentencepiece(lines, *, size: int, normalization: str = 'identity', characters=frozenset()) -> SentencePiece:
  """Train a unigram SentencePiece model with byte fallback. The same lines give the same model, byte for byte.

  Every character of the lines, and of the set `characters`, becomes a piece, so that only characters that were never
  seen are encoded as bytes. The lines have no line breaks (a line break is always encoded as a byte token). `size` is
  the maximum vocabulary size, including special tokens; too little text gives a smaller one. Raises UserError if the
  normalization is not one of NORMALIZATIONS, or the size is too small for the characters.
  """
  import sentencepiece

  if normalization not in NORMALIZATIONS:
    raise UserError(f'task.tokenizer.normalization={normalization!r}: expected one of {", ".join(NORMALIZATIONS)}')
  model = io.BytesIO()
  try:
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=_sentences(itertools.chain(lines, sorted(characters - {'\n'}))),
      model_writer=model,
      vocab_size=size - len(SPECIAL) + 1,  # of SPECIAL, SentencePiece counts only <unk>
      hard_vocab_limit=False,
      character_coverage=1.0,
      user_defined_symbols=[RESERVED] if RESERVED in characters else [],
      byte_fallback=True,
      normalization_rule_name=normalization,
      add_dummy_prefix=False,
      remove_extra_whitespaces=False,
      unk_id=0,
      bos_id=-1,
      eos_id=-1,
      pad_id=-1,
      max_sentence_length=4 * LINE,  # in bytes
      num_threads=THREADS,
      minloglevel=2,
    )
  except (RuntimeError, OSError, ValueError) as error:
    if too_small := re.search(r'smaller than required_chars\. \d+ vs (\d+)', str(error)):
      needed = int(too_small[1]) + len(SPECIAL) - 1
      raise UserError(
        f'task.tokenizer.size={size} is too small: expected at least {needed}, for {needed - 256 - len(SPECIAL)} '
        f'different characters of the text, 256 bytes and {len(SPECIAL)} special tokens'
      ) from None
    raise UserError(
      f'task.tokenizer.size={size}: no SentencePiece model of this size could be trained on the corpus '
      f'({_one_line(error)}): choose another size'
    ) from None
  return SentencePiece(model.getvalue())


# --- files ------------------------------------------------------------------------------------------------------------


def fingerprint_of(kind: str, files: dict[str, bytes]) -> str:
  """Return the fingerprint of a tokenizer: a hash of its kind and of the files that it is saved as."""
  digest = hashlib.blake2b(kind.encode(), digest_size=8)
  for name, content in sorted(files.items()):
    digest.update(f'{name} {len(content)} '.encode() + content)
  return digest.hexdigest()


KINDS = {  # kind of tokenizer -> names of the files that it is saved as, and a function of their contents that loads it
  'words': (['words.json'], lambda words: WordTokenizer(json.loads(words))),
  'sentencepiece': (['sentencepiece.model'], SentencePiece),
  'wordpiece': (['vocab.txt', 'settings.json'], lambda vocab, settings: WordPiece(vocab, **json.loads(settings))),
}


def _make(kind: str, files: dict[str, bytes]) -> Tokenizer:
  """Create a tokenizer from its kind and the files (name -> content) that it was saved as."""
  names, make = KINDS[kind]
  return make(*(files[name] for name in names))


def load(folder) -> Tokenizer:
  """Load a tokenizer that `Tokenizer.save` wrote; raise UserError if it is missing or its files have changed since."""
  path = epath.Path(folder)
  try:
    info = json.loads((path / INFO_FILE).read_text())
    kind, fingerprint = info['kind'], info['fingerprint']
    files = {name: (path / name).read_bytes() for name in KINDS[kind][0]}
  except FileNotFoundError as error:
    missing = epath.Path(error.filename or INFO_FILE).name
    raise UserError(f'{folder} is not a saved tokenizer: {missing} is missing') from None
  except (KeyError, TypeError, ValueError):
    raise UserError(f'{path / INFO_FILE} is damaged: expected JSON with kind and fingerprint of a tokenizer') from None
  if fingerprint_of(kind, files) != fingerprint:
    raise UserError(f'the tokenizer in {folder} is damaged: its files do not match the saved fingerprint {fingerprint}')
  return _make(kind, files)


def read(path, *, lowercase: bool = True) -> Tokenizer:
  """Read the tokenizer at a path given in the config; raise UserError if it is missing or unreadable.

  The path names a SentencePiece model (*.model), a WordPiece vocabulary (*.txt; `lowercase` if it is uncased), a folder
  with one of MODEL_FILES, or a folder that `Tokenizer.save` wrote.
  """
  file = paths.resolve(path, 'task.tokenizer.path')
  try:
    if (file / INFO_FILE).exists():
      return load(file)
    if file.is_dir():
      found = [file / name for name in MODEL_FILES if (file / name).exists()]
      if not found:
        raise UserError(f'the folder {path} contains no tokenizer: expected one of {", ".join(MODEL_FILES)}')
      file = found[0]
    content = file.read_bytes()
  except (FileNotFoundError, NotADirectoryError):
    raise UserError(
      f'the tokenizer {path} does not exist: expected a *.model, a vocabulary *.txt, or a folder with one'
    ) from None
  except (OSError, ImportError) as error:  # ImportError: the package for cloud storage that epath needs is missing
    raise UserError(f'the tokenizer {file} could not be read: {_one_line(error)}') from None
  if file.suffix == '.txt':  # remove the byte order mark with which some editors start UTF-8 files
    return WordPiece(content.removeprefix(codecs.BOM_UTF8), lowercase, name=str(file))
  return SentencePiece(content, name=str(file))
