"""Tokenizers: text to ids and back. The ids 0 to 6 are the same special tokens in all, and never come from text.

Every tokenizer has

    vocab_size, special_ids     ids are below vocab_size; the special ones are never inserted by a sampler
    encode(text)                ids; what looks like a special token in a text is ordinary characters
    encode_with_offsets(text)   (ids, spans): spans[i] = (start, end) in the text, in order and not overlapping; empty
                                for all but the last byte of a character that was spelled in bytes
    decode(ids)                 text; special ids are left out
    pieces(ids)                 one readable string a token, for displays
    spell(pieces)               the characters that each of them stands for in a text
    fingerprint                 of everything that decides the ids
    save(folder)                `load(folder)` gives the same tokenizer

decode(encode(text)) is text, with these exceptions:

- SentencePiece trained here: U+2581, which SentencePiece itself writes for a space, comes back as a space; and what a
  normalisation other than `identity` changes. A given model may also lack characters, or drop spaces.
- WordPiece: words come back with single spaces, punctuation where English has it, unknown words as [UNK]; lower case
  and without accents where the vocabulary is lower case.
- Words of the planning tasks: single spaces between them.
"""

import functools
import hashlib
import io
import itertools
import json
import re

from ilm_jax.special_tokens import BOS, CLS, SPECIAL, UNK
from ilm_jax.types import UserError

BYTE = re.compile(r'<0x[0-9A-F]{2}>')  # of SentencePiece
START = (SPECIAL[CLS], SPECIAL[BOS])  # stand before a text, and for no characters
INFO = 'ilm_tokenizer.json'  # of a saved tokenizer; written last
NORMALISATIONS = ('identity', 'nfkc', 'nmt_nfkc', 'nfkc_cf', 'nmt_nfkc_cf')
THREADS = 8  # of the training of SentencePiece: another number gives another model
FOLDERS = ('spiece.model', 'tokenizer.model', 'vocab.txt')  # what a folder of others may hold


class Tokenizer:
  """What all tokenizers share. Two are the same if their kind and the files that they are saved as are the same."""

  kind: str
  vocab_size: int
  special_ids = tuple(range(len(SPECIAL)))

  def files(self) -> dict[str, bytes]:
    """What `save` writes, and the class is made from again."""
    raise NotImplementedError

  @functools.cached_property
  def fingerprint(self) -> str:
    """Sixteen hexadecimal digits."""
    return fingerprint_of(self.kind, self.files())

  def save(self, folder) -> None:
    """Write the tokenizer into a folder; one that is there already, whole and the same, is left alone."""
    from etils import epath

    path, info = epath.Path(folder), {'kind': self.kind, 'fingerprint': self.fingerprint}
    text = json.dumps(info) + '\n'
    if (path / INFO).exists() and (path / INFO).read_text() == text:
      return
    path.mkdir(parents=True, exist_ok=True)
    for name, content in self.files().items():
      (path / name).write_bytes(content)
    (path / INFO).write_text(text)

  def __reduce__(self):
    return _make, (self.kind, self.files())


class WordTokenizer(Tokenizer):
  """Ids of a closed list of words, after the special tokens."""

  kind = 'words'

  def __init__(self, words):
    self.words = SPECIAL + tuple(words)
    self.vocab_size = len(self.words)
    self._ids = {word: i for i, word in enumerate(self.words) if i >= len(SPECIAL)}

  def files(self) -> dict[str, bytes]:
    return {'words.json': json.dumps(self.words[len(SPECIAL) :]).encode()}

  def ids(self, words) -> list[int]:
    """Look up a sequence of words."""
    for word in words:
      if word not in self._ids:
        known = self.words[len(SPECIAL) :]
        raise UserError(f'unknown token {word!r}: expected one of {known[0]} ... {known[-1]} ({len(known)} words)')
    return [self._ids[word] for word in words]

  def encode(self, text: str) -> list[int]:
    """The ids of words with spaces between them."""
    return self.ids(text.split())

  def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Ids, and where in the text each comes from."""
    found = list(re.finditer(r'\S+', text))
    return self.ids([match[0] for match in found]), [match.span() for match in found]

  def decode(self, ids) -> str:
    """The words, special ones left out."""
    return ' '.join(self.words[int(i)] for i in ids if int(i) >= len(SPECIAL))

  def pieces(self, ids) -> list[str]:
    """The words, special ones in brackets."""
    return [self.words[int(i)] for i in ids]

  def spell(self, pieces: list[str]) -> list[str]:
    """Words with a space before them."""
    return [' ' + piece for piece in pieces]


class SentencePiece(Tokenizer):
  """A SentencePiece model; its pieces but for control symbols and <unk>, in their order, have the ids from 7 on."""

  kind = 'sentencepiece'

  def __init__(self, model: bytes, name: str = 'the SentencePiece model'):
    import sentencepiece

    self._model = model
    try:
      self._processor = sp = sentencepiece.SentencePieceProcessor(model_proto=model)
      size = sp.vocab_size()
    except (RuntimeError, OSError, ValueError, TypeError) as error:
      raise UserError(f'{name} is no SentencePiece model: {_line(error)}') from None
    if not model or not size:
      raise UserError(f'{name} is no SentencePiece model: it is empty')
    ordinary = [i for i in range(size) if not (sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i))]
    self._theirs = [sp.unk_id()] * len(SPECIAL) + ordinary
    self._ours = [UNK] * size
    for ours, theirs in enumerate(ordinary, len(SPECIAL)):
      self._ours[theirs] = ours
    self.vocab_size = len(self._theirs)

  def files(self) -> dict[str, bytes]:
    return {'sentencepiece.model': self._model}

  def encode(self, text: str) -> list[int]:
    """The ids of a text."""
    check_text(text)
    return [self._ours[i] for i in self._processor.encode(text)]

  def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Ids, and where in the text each comes from."""
    from sentencepiece import sentencepiece_pb2

    check_text(text)
    serialized = self._processor.encode(text, out_type='serialized_proto')
    pieces = sentencepiece_pb2.SentencePieceText.FromString(serialized).pieces
    at = _characters(text)
    return [self._ours[p.id] for p in pieces], [(at[p.begin], at[p.end]) for p in pieces]

  def decode(self, ids) -> str:
    """The text; bytes that make no character come out as U+FFFD."""
    return self._processor.decode([self._theirs[int(i)] for i in ids if int(i) >= UNK])

  def pieces(self, ids) -> list[str]:
    """The pieces, with U+2581 for a space; special ones in brackets."""
    name = self._processor.id_to_piece
    return [SPECIAL[int(i)] if int(i) < len(SPECIAL) else name(self._theirs[int(i)]) for i in ids]

  def spell(self, pieces: list[str]) -> list[str]:
    """Spaces for U+2581; the characters that bytes make stand at the first of them."""
    out = []
    for is_byte, run in itertools.groupby(pieces, lambda piece: bool(BYTE.fullmatch(piece))):
      run = list(run)
      if is_byte:
        text = bytes.fromhex(''.join(piece[3:5] for piece in run)).decode('utf-8', 'replace')
        out += [text] + [''] * (len(run) - 1)
      else:
        out += ['' if piece in START else piece.replace('\u2581', ' ') for piece in run]
    return out


class WordPiece(Tokenizer):
  """A WordPiece vocabulary, as of BERT; its entries but for special ones, in their order, have the ids from 7 on."""

  kind = 'wordpiece'

  def __init__(self, vocab: bytes, lowercase: bool = True, name: str = 'the vocabulary'):
    try:
      import tokenizers
    except ImportError:
      raise UserError(
        f'{name}: WordPiece needs the package tokenizers: pip install "ilm_jax[wordpiece]" (or make setup '
        'EXTRAS=wordpiece)'
      ) from None
    self._vocab, self._lowercase = vocab, bool(lowercase)
    try:
      lines = vocab.decode().replace('\r\n', '\n').removesuffix('\n').split('\n')
    except UnicodeDecodeError as error:
      raise UserError(f'{name} is not UTF-8: byte {error.start} is {vocab[error.start]:#04x}') from None
    words = [word for word in lines if word not in SPECIAL]
    if not words or not all(words) or len(set(words)) < len(words) or any(' ' in word for word in words):
      raise UserError(f'{name} is no WordPiece vocabulary: expected a different word on each line')
    self._words = SPECIAL + tuple(words)
    self.vocab_size = len(self._words)
    ids = {word: i for i, word in enumerate(self._words) if i >= UNK}
    self._tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(ids, unk_token=SPECIAL[UNK]))
    self._tokenizer.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=self._lowercase)
    self._tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    self._tokenizer.decoder = tokenizers.decoders.WordPiece(cleanup=True)

  def files(self) -> dict[str, bytes]:
    return {'vocab.txt': self._vocab, 'settings.json': json.dumps({'lowercase': self._lowercase}).encode()}

  def encode(self, text: str) -> list[int]:
    """The ids of a text."""
    check_text(text)
    return self._tokenizer.encode(text, add_special_tokens=False).ids

  def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Ids, and where in the text each comes from."""
    check_text(text)
    encoded = self._tokenizer.encode(text, add_special_tokens=False)
    return encoded.ids, encoded.offsets

  def decode(self, ids) -> str:
    """The text, spaced by the rules of BERT's own decoder."""
    return self._tokenizer.decode([int(i) for i in ids if int(i) >= UNK])

  def pieces(self, ids) -> list[str]:
    """The entries of the vocabulary, special ones in brackets."""
    return [self._words[int(i)] for i in ids]

  def spell(self, pieces: list[str]) -> list[str]:
    """A space before what does not go on with a word."""
    return ['' if p in START else p[2:] if p.startswith('##') else ' ' + p for p in pieces]


# --- text -------------------------------------------------------------------------------------------------------------


def check_text(text: str) -> None:
  """Refuse a text that has no UTF-8 form (JSON may spell half a surrogate pair)."""
  try:
    text.encode()
  except UnicodeEncodeError as error:
    raise UserError(
      f'a text holds {text[error.start]!r} at character {error.start}, half of a surrogate pair, which is no character'
    ) from None


def _characters(text: str):
  """The index of the character at each byte of the UTF-8 form, and of the end."""
  if text.isascii():
    return range(len(text) + 1)
  at = []
  for i, character in enumerate(text):
    at += [i] * len(character.encode())
  return [*at, len(text)]


def _line(error: Exception) -> str:
  return ' '.join(str(error).split())[:200] or type(error).__name__


# --- training ---------------------------------------------------------------------------------------------------------


def train_sentencepiece(lines, *, size: int, normalization: str = 'identity') -> SentencePiece:
  """Train a unigram model with a fallback to bytes; the same lines give the same model, byte for byte.

  Args:
    lines: an iterator over lines of text (a line break is always a token of its own, a byte).
    size: of its vocabulary, special tokens included; where the lines hold too little for it, it becomes smaller.
    normalization: one of NORMALISATIONS.
  """
  import sentencepiece

  if normalization not in NORMALISATIONS:
    raise UserError(f'task.tokenizer.normalization={normalization!r}: expected one of {", ".join(NORMALISATIONS)}')
  model = io.BytesIO()
  try:
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(lines),
      model_writer=model,
      vocab_size=size - len(SPECIAL) + 1,  # its <unk> is one of ours
      hard_vocab_limit=False,
      byte_fallback=True,
      normalization_rule_name=normalization,
      add_dummy_prefix=False,
      remove_extra_whitespaces=False,
      unk_id=0,
      bos_id=-1,
      eos_id=-1,
      pad_id=-1,
      max_sentence_length=2**20,
      num_threads=THREADS,
      minloglevel=2,
    )
  except (RuntimeError, OSError, ValueError) as error:
    raise UserError(
      f'task.tokenizer.size={size}: no SentencePiece model of this size could be trained on the corpus '
      f'({_line(error)}): expected at least 256 bytes, the special tokens and each frequent character'
    ) from None
  return SentencePiece(model.getvalue())


# --- files ------------------------------------------------------------------------------------------------------------


def fingerprint_of(kind: str, files: dict[str, bytes]) -> str:
  """A hash of the files of a tokenizer."""
  digest = hashlib.blake2b(kind.encode(), digest_size=8)
  for name, content in sorted(files.items()):
    digest.update(f'{name} {len(content)} '.encode() + content)
  return digest.hexdigest()


def _make(kind: str, files: dict[str, bytes]) -> Tokenizer:
  if kind == WordTokenizer.kind:
    return WordTokenizer(json.loads(files['words.json']))
  if kind == SentencePiece.kind:
    return SentencePiece(files['sentencepiece.model'])
  return WordPiece(files['vocab.txt'], **json.loads(files['settings.json']))


KINDS = {
  WordTokenizer.kind: ('words.json',),
  SentencePiece.kind: ('sentencepiece.model',),
  WordPiece.kind: ('vocab.txt', 'settings.json'),
}


def load(folder) -> Tokenizer:
  """Read a saved tokenizer; refuses one whose files are not those that were saved."""
  from etils import epath

  path = epath.Path(folder)
  try:
    info = json.loads((path / INFO).read_text())
    kind, fingerprint = info['kind'], info['fingerprint']
    files = {name: (path / name).read_bytes() for name in KINDS[kind]}
  except FileNotFoundError as error:
    raise UserError(f'{folder} is no saved tokenizer: there is no {epath.Path(error.filename or INFO).name}') from None
  except (KeyError, TypeError, ValueError):
    raise UserError(f'{path / INFO} is not what a tokenizer is saved with') from None
  if fingerprint_of(kind, files) != fingerprint:
    raise UserError(f'the tokenizer in {folder} is damaged: its files are not those that were saved ({fingerprint})')
  return _make(kind, files)


def read(path, *, lowercase: bool = True) -> Tokenizer:
  """Read a tokenizer that a user gives.

  Args:
    path: a SentencePiece model (*.model), a WordPiece vocabulary (*.txt), a folder that holds one of FOLDERS, or one
      that a tokenizer was saved to.
    lowercase: is the WordPiece vocabulary one of lower case without accents?
  """
  from etils import epath

  given = file = epath.Path(path).expanduser()
  try:
    saved = (given / INFO).exists()
  except (OSError, ImportError) as error:  # epath needs a package for each kind of bucket
    raise UserError(f'the tokenizer {path} could not be read: {_line(error)}') from None
  if saved:
    return load(given)
  if given.is_dir():
    file = next((given / name for name in FOLDERS if (given / name).exists()), None)
    if file is None:
      raise UserError(f'the tokenizer {path}: expected one of {", ".join(FOLDERS)} in this folder')
  if not file.exists():
    raise UserError(f'the tokenizer {path} is not there: expected a *.model, a vocabulary *.txt, or a folder with one')
  try:
    content = file.read_bytes()
  except OSError as error:
    raise UserError(f'the tokenizer {file} could not be read: {error.strerror or error}') from None
  if file.suffix == '.txt':
    return WordPiece(content, lowercase, name=str(file))
  return SentencePiece(content, name=str(file))
