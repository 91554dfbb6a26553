"""The text task: language modelling on TinyStories, the One Billion Word corpus (LM1B) or any other corpus.

An example is `[CLS] [BOS] text`; all tokens of the text are generated, none is given. There is no correct answer, so
the task has no `score`, and runs are evaluated by their validation loss. A document that is too long is cut after a
sentence; the rest is dropped or becomes further examples.

The tokenizer is given by the user, or is SentencePiece trained on the corpus. Each run saves a copy in its folder.
"""

import functools
import hashlib
import itertools
import json
import os
import re
import tempfile

import numpy as np
from absl import logging
from etils import epath

from ilm_jax import paths
from ilm_jax.data import builders, file_hashes, storage
from ilm_jax.data import tokenizers as tokenizer_lib
from ilm_jax.special_tokens import BOS, CLS
from ilm_jax.tasks.contract import Task
from ilm_jax.tasks.text import corpora
from ilm_jax.types import UserError

PREFIX = 2  # fixed tokens before the text: [CLS] and [BOS]
FOLDER = 'tokenizer'  # subfolder of a run's folder that holds its tokenizer
WINDOW = 8  # characters tokenized per wanted token when cutting a document; doubled if they give too few tokens
MAX_VOCABULARY = 1_000_000  # maximum vocabulary size of a tokenizer that is trained
SENTENCE = re.compile(r'[.!?…]["\'”’)\]]*(?=\s)|[。！？][」』”’]*|(?<=\S)(?=\n)')  # matches the end of a sentence
WORD = re.compile(r'(?<=\S)(?=\s)')  # matches the end of a word


def check(cfg) -> None:
  """Raise UserError if the settings of the text task are invalid."""
  if cfg.length < PREFIX + 1:
    raise UserError(f'task.length={cfg.length}: expected at least {PREFIX + 1} ([CLS], [BOS] and a token)')
  for name, least in (('size', 1), ('documents', 1), ('seed', 0)):
    if cfg.tokenizer[name] < least:
      raise UserError(f'task.tokenizer.{name}={cfg.tokenizer[name]}: expected at least {least}')
  if cfg.tokenizer.size > MAX_VOCABULARY:
    raise UserError(f'task.tokenizer.size={cfg.tokenizer.size}: expected at most {MAX_VOCABULARY:,}')
  if cfg.documents not in corpora.DOCUMENTS:
    raise UserError(f'task.documents={cfg.documents!r}: expected one of {", ".join(corpora.DOCUMENTS)}')
  if cfg.source and cfg.source not in corpora.SOURCES:
    raise UserError(f'task.source={cfg.source!r}: expected one of {", ".join(corpora.SOURCES)}, or an empty string')


@functools.cache
def _scratch() -> tempfile.TemporaryDirectory:
  """Create this process's temporary cache folder, which is used if `task.cache` is empty."""
  return tempfile.TemporaryDirectory(prefix='ilm_jax-')


def _cache(cfg) -> str:
  """Return the path of the cache folder: `task.cache`, or a temporary folder if that is empty."""
  return os.fspath(paths.resolve(cfg.cache, 'task.cache')) if cfg.cache else _scratch().name


def corpus_of(cfg) -> corpora.Corpus:
  """Return the files of the corpus, downloading or unpacking it first if necessary."""
  check(cfg)
  path = cfg.corpus
  if not path and not cfg.source:
    raise UserError('data.path is empty: set --config.data.path=PATH to a file, or to a folder of *.txt or *.jsonl')
  if not path:
    path = corpora.fetch(cfg.source, cfg.cache and _cache(cfg))
  elif str(path).lower().endswith(('.tar.gz', '.tgz')):
    path = corpora.unpack(path, _cache(cfg))
  return corpora.find(path)


def texts(cfg, split: str, what: str):
  """Yield ((file path, document number), text) for the documents of a split; `what` is a name for progress logs."""
  return corpora.documents(corpus_of(cfg), split, cfg.documents, detokenized=cfg.detokenize, what=what)


def pieces_of(text: str, tokenizer, limit: int):
  """Yield (piece, token ids) for pieces of a text with at most `limit` tokens; whitespace between pieces is dropped.

  Each piece ends after a sentence, or else after a word, if possible.
  """
  start, size = 0, WINDOW * limit
  while True:
    window = text[start : start + size]
    ids = tokenizer.encode(window)
    if len(ids) <= limit and start + len(window) < len(text):
      size *= 2
      continue
    if len(ids) <= limit:
      yield window, ids
      return
    _, spans = tokenizer.encode_with_offsets(window)
    piece = window[: cut_at(window, max(spans[limit - 1][1], 1))]
    ids, spans = tokenizer.encode_with_offsets(piece)
    # Encoded on its own, the piece may have more tokens than it had within the longer text: shorten it further.
    while len(ids) > limit and (end := max(spans[limit - 1][1], 1)) < len(piece):
      piece = piece[:end]
      ids, spans = tokenizer.encode_with_offsets(piece)
    yield piece, ids[:limit]  # truncates a single character that is encoded as more than `limit` byte tokens
    start += len(piece)
    while start < len(text) and text[start].isspace():
      start += 1
    if start == len(text):
      return
    size = WINDOW * limit


def cut_at(text: str, end: int) -> int:
  """Return the index at which to cut a text so that at most `end` characters remain.

  The cut is after the last sentence, or else the last word, that ends between `end // 2` and `end`; otherwise at `end`.
  """
  for pattern in (SENTENCE, WORD):
    cuts = [match.end() for match in pattern.finditer(text, 0, end + 1) if end // 2 <= match.end() <= end]
    if cuts:
      return cuts[-1]
  return end


def prepare(cfg, split: str, tokenizer, counts: dict):
  """Yield (text, token ids) of the examples of a split, without [CLS] and [BOS]; long documents are cut.

  Writes into `counts` the numbers of `documents`, of `tokens`, of documents that were `cut`, and of documents that were
  skipped because they have no tokens (`without_tokens`).
  """
  counts.update({'documents': 0, 'tokens': 0, 'cut': 0, 'without_tokens': 0})
  limit, first_skipped = cfg.length - PREFIX, None
  for place, text in texts(cfg, split, f'preparing {cfg.label}, {split}'):
    pieces = pieces_of(text, tokenizer, limit)
    first, _ = head = next(pieces)
    kept = itertools.chain([head], pieces) if cfg.split_long_documents else [head]
    examples = [(piece, ids) for piece, ids in kept if ids]
    if not examples:
      first_skipped = first_skipped or place
      counts['without_tokens'] += 1
      continue
    counts['documents'] += 1
    counts['cut'] += len(first) < len(text)
    counts['tokens'] += sum(len(ids) for _, ids in examples)
    yield from examples
  if first_skipped:
    file, number = first_skipped
    logging.warning('%s: skipped %d documents that have no tokens, such as document %d of %s', cfg.label,
                    counts['without_tokens'], number, file)  # fmt: skip
  if not counts['tokens']:
    raise UserError(f'data.path={cfg.corpus}: the {split} split is empty: no document has a token; add text, '
                    'or use file names that contain train or valid')  # fmt: skip


def _hash(cfg, *what) -> str:
  """Return a hash of the document settings and of further JSON values, used in the names of cache entries."""
  settings = cfg.documents, cfg.detokenize, *what
  return hashlib.blake2b(json.dumps(settings).encode(), digest_size=8).hexdigest()


class Source:
  """Random access to the text examples of one split, which are tokenized and written to disk on first use.

  `counts` holds the numbers of documents and tokens of the split, see `prepare`.
  """

  endless = False  # the split is finite: an epoch has len(source) examples

  def __init__(self, cfg, split: str):
    check(cfg)
    words = tokenizer(cfg)
    identity = corpus_of(cfg).identity(split)
    name = f'text-{split}-{_hash(cfg, identity, words.fingerprint, cfg.length, cfg.split_long_documents)}'
    self._stored = builders.open_or_prepare_documents(
      _cache(cfg), name, lambda counts: prepare(cfg, split, words, counts)
    )
    self._size = min(cfg[f'num_{split}'] or len(self._stored), len(self._stored))
    self.counts = self._stored.counts
    rest = 'becomes further examples' if cfg.split_long_documents else 'is dropped'
    cut = f', {self.counts["cut"]:,} of them cut after {cfg.length - PREFIX} tokens (the rest {rest})'
    corpora.log_once(f'{cfg.label}, {split}: {self.counts["documents"]:,} documents, {self.counts["tokens"]:,} tokens'
                     + (cut if self.counts['cut'] else ''))  # fmt: skip

  def __len__(self) -> int:
    return self._size

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    tokens = np.concatenate([np.array([CLS, BOS], np.int32), self._stored.tokens(index)])
    return {'tokens': tokens, 'fixed': np.arange(len(tokens)) < PREFIX}

  def text(self, index: int) -> str:
    """Return the text of an example before tokenization."""
    return self._stored.text(index)


_TOKENIZERS = {}  # fingerprint -> tokenizer, of all tokenizers that this process has loaded


def tokenizer(cfg) -> tokenizer_lib.Tokenizer:
  """Return the tokenizer of a config: the one at `tokenizer.path`, or SentencePiece trained on the corpus.

  If the config has a fingerprint (see `resolve_assets`), UserError is raised for a tokenizer with another one.
  """
  fingerprint = cfg.tokenizer.fingerprint
  if fingerprint not in _TOKENIZERS:
    found = given(cfg) or trained(cfg)
    if fingerprint and found.fingerprint != fingerprint:
      raise UserError(f'the tokenizer of the config has fingerprint {found.fingerprint}, the one used in training has '
                      f'{fingerprint}: set task.tokenizer.path to that one')  # fmt: skip
    fingerprint = found.fingerprint
    _TOKENIZERS[fingerprint] = found
  return _TOKENIZERS[fingerprint]


def given(cfg) -> tokenizer_lib.Tokenizer | None:
  """Return the tokenizer at `tokenizer.path`, or None if the path is empty."""
  if not (path := cfg.tokenizer.path):
    return None
  return tokenizer_lib.read(paths.resolve(path, 'task.tokenizer.path'), lowercase=cfg.tokenizer.lowercase)


def trained(cfg) -> tokenizer_lib.Tokenizer:
  """Train SentencePiece on a sample of training documents, or load it from the cache if it was trained before."""
  check(cfg)
  settings = cfg.tokenizer
  identity = corpus_of(cfg).identity('train')
  what = identity, settings.size, settings.seed, settings.normalization, settings.documents

  def make(folder):
    characters = set()

    def read():
      for _, text in texts(cfg, 'train', 'reading documents to train the tokenizer'):
        characters.update(text)
        yield text

    sample = corpora.sample_uniformly(read(), settings.documents, settings.seed)
    if not sample:
      raise UserError(f'data.path={cfg.corpus}: the train split is empty, so no tokenizer can be trained')
    logging.info('training SentencePiece on %s documents', f'{len(sample):,}')
    lines = (line for text in sample for line in text.split('\n') if line)
    words = tokenizer_lib.train_sentencepiece(
      lines, size=settings.size, normalization=settings.normalization, characters=characters
    )
    logging.info('trained a SentencePiece tokenizer with %s tokens; the text has %s different characters',
                 f'{words.vocab_size:,}', f'{len(characters):,}')  # fmt: skip
    words.save(folder)

  return tokenizer_lib.load(storage.once(_cache(cfg), f'sentencepiece-{_hash(cfg, *what)}', make))


def resolve_assets(cfg, folder) -> None:
  """Write the fingerprint of a run's tokenizer into the config.

  A tokenizer saved in the run's folder takes precedence over the config's. UserError is raised if the config, the
  folder and the checkpoints do not agree on the tokenizer.
  """
  own = epath.Path(folder) / FOLDER if folder else None
  if own is None or not (own / tokenizer_lib.INFO_FILE).exists():
    try:
      cfg.tokenizer.fingerprint = tokenizer(cfg).fingerprint
    except UserError as error:
      missing = f'there is no tokenizer in {own}: ' if own and cfg.tokenizer.fingerprint else ''
      raise UserError(f'{missing}{error}') from None
    return
  words = tokenizer_lib.load(own)
  path = cfg.tokenizer.path
  if cfg.tokenizer.fingerprint not in ('', words.fingerprint):
    raise UserError(f'the tokenizer in {own} has fingerprint {words.fingerprint}, but the checkpoints next to it were '
                    f'trained with {cfg.tokenizer.fingerprint}: restore that tokenizer')  # fmt: skip
  try:
    is_there = path and paths.resolve(path, 'task.tokenizer.path').exists()
  except (UserError, OSError):
    is_there = False  # not an error: the run's own copy of the tokenizer is used
  if is_there and (other := given(cfg).fingerprint) != words.fingerprint:
    raise UserError(f'task.tokenizer.path={path} has fingerprint {other}, but the checkpoints in {folder} were trained '
                    f'with a tokenizer with fingerprint {words.fingerprint}: omit task.tokenizer.path, or choose '
                    'another --workdir')  # fmt: skip
  cfg.tokenizer.fingerprint = words.fingerprint
  _TOKENIZERS[words.fingerprint] = words


def save_assets(cfg, folder) -> None:
  """Save the config's tokenizer in a run's folder; warn if the corpus has changed since the run was last started."""
  tokenizer(cfg).save(epath.Path(folder) / FOLDER)
  hashes = corpus_of(cfg).hashes(*corpora.SPLITS)
  file_hashes.check_unchanged(folder, hashes, f'data.path={cfg.corpus or cfg.source}')


def encode_prompt(text: str, cfg) -> list[int]:
  """Return the token ids of a prompt: [CLS], [BOS] and the text to continue (empty: generate without a prompt)."""
  return [CLS, BOS, *tokenizer(cfg).encode(text)]


def decode(tokens, cfg) -> str:
  """Return the text of a sequence of token ids; special tokens are skipped."""
  return tokenizer(cfg).decode(tokens)


TASK = Task(
  name='text', tokenizer=tokenizer, source=Source, encode_prompt=encode_prompt, decode=decode,
  longest=lambda cfg: cfg.length,
  longest_answer=lambda cfg: cfg.length - PREFIX,
  resolve_assets=resolve_assets, save_assets=save_assets,
)  # fmt: skip
