"""Text (arXiv 2505.05755): stories, sentences, or documents of one's own, as `[CLS] [BOS] text`, all of it free.

A text has no right answer: there is no `score`, and what is measured is the loss. A document that is too long is cut
where a sentence ends; its rest is left out, or becomes further documents.

A run carries its tokenizer in its folder: one that was given, or SentencePiece trained on the corpus.

As text (prompts and output): the text itself.
"""

import functools
import hashlib
import itertools
import json
import re
import tempfile

import numpy as np
from absl import logging
from etils import epath

from ilm_jax.data import builders, storage
from ilm_jax.data import tokenizers as tokenizer_lib
from ilm_jax.special_tokens import BOS, CLS
from ilm_jax.tasks.contract import Task
from ilm_jax.tasks.text import corpora
from ilm_jax.types import UserError

GIVEN = 2  # [CLS] and [BOS]
FOLDER = 'tokenizer'  # in the folder of a run
WINDOW = 8  # characters a token of which a long text is looked at at a time, and more if they hold too few tokens
SENTENCE = re.compile(r'[.!?…]["\'”’)\]]*(?=\s)|[。！？][」』”’]*|(?<=\S)(?=\n)')
WORD = re.compile(r'(?<=\S)(?=\s)')


def check(cfg) -> None:
  """Refuse settings that mean no data."""
  if cfg.length < GIVEN + 1:
    raise UserError(f'task.length={cfg.length}: expected at least {GIVEN + 1}, [CLS], [BOS] and a token')
  if cfg.documents not in corpora.DOCUMENTS:
    raise UserError(f'task.documents={cfg.documents!r}: expected one of {", ".join(corpora.DOCUMENTS)}')
  if cfg.source and cfg.source not in corpora.SOURCES:
    raise UserError(f'task.source={cfg.source!r}: expected one of {", ".join(corpora.SOURCES)}, or nothing')


def longest(cfg) -> int:
  """Tokens of the longest example."""
  return cfg.length


def longest_answer(cfg) -> int:
  """Tokens of the longest text."""
  return cfg.length - GIVEN


# --- the corpus -------------------------------------------------------------------------------------------------------


@functools.cache
def _scratch() -> tempfile.TemporaryDirectory:
  """A cache folder for this process alone, where the config names none."""
  return tempfile.TemporaryDirectory(prefix='ilm_jax-')


def _cache(cfg) -> str:
  return cfg.cache or _scratch().name


def corpus_of(cfg) -> corpora.Corpus:
  """The files of the corpus, downloaded or unpacked where need be."""
  check(cfg)
  path = cfg.corpus
  if not path and not cfg.source:
    raise UserError('data.path is empty: give --config.data.path=PATH, a file or a folder of *.txt or *.jsonl')
  if not path:
    path = corpora.fetch(cfg.source, cfg.cache)
  elif str(path).endswith(('.tar.gz', '.tgz')):
    path = corpora.unpack(path, _cache(cfg))
  return corpora.find(path)


def texts(cfg, split: str, *, what: str = ''):
  """Yield (place, text) of the documents of a split, as the model is to see them."""
  for place, text in corpora.documents(corpus_of(cfg), split, cfg.documents, what=what):
    yield place, corpora.detokenise(text) if cfg.detokenize else text


def pieces_of(text: str, tokenizer, limit: int):
  """Yield (piece, ids) of a text: pieces of at most `limit` tokens that end with a sentence, or a word, if possible."""
  start, size = 0, WINDOW * limit
  while True:
    window = text[start : start + size]
    whole = start + len(window) == len(text)
    ids = tokenizer.encode(window)
    if len(ids) <= limit and not whole:
      size *= 2
      continue
    if len(ids) <= limit:
      yield window, ids
      return
    _, spans = tokenizer.encode_with_offsets(window)
    piece = window[: cut_at(window, max(spans[limit - 1][1], 1))]
    ids, spans = tokenizer.encode_with_offsets(piece)
    while len(ids) > limit and (end := max(spans[limit - 1][1], 1)) < len(piece):
      piece = piece[:end]  # without what follows, the same characters have taken more tokens
      ids, spans = tokenizer.encode_with_offsets(piece)
    yield piece, ids[:limit]  # one character may take more bytes than that
    start += len(piece)
    while start < len(text) and text[start].isspace():
      start += 1
    if start == len(text):
      return
    size = WINDOW * limit


def cut_at(text: str, end: int) -> int:
  """Where to cut a text of which `end` characters may stay: behind the last sentence, if half of them stay so."""
  for ends in (SENTENCE, WORD):
    where = [match.end() for match in ends.finditer(text, 0, end + 1) if end // 2 <= match.end() <= end]
    if where:
      return where[-1]
  return end


def prepare(cfg, split: str, tokenizer, counts: dict):
  """Yield (text, ids) of a split; count documents and tokens, and what was cut or passed over."""
  counts.update({'documents': 0, 'tokens': 0, 'cut': 0, 'without_tokens': 0})
  limit, empty = cfg.length - GIVEN, None
  for place, text in texts(cfg, split, what=f'preparing {cfg.label}, {split}'):
    pieces = pieces_of(text, tokenizer, limit)
    first, _ = head = next(pieces)
    found = [(piece, ids) for piece, ids in itertools.chain([head], pieces if cfg.split_long_documents else ()) if ids]
    if not found:
      empty = empty or place
      counts['without_tokens'] += 1
      continue
    counts['documents'] += 1
    counts['cut'] += len(first) < len(text)
    counts['tokens'] += sum(len(ids) for _, ids in found)
    yield from found
  if empty:
    file, number = empty
    logging.warning('%s: passed over %d documents without a token, such as document %d of %s', cfg.label,
                    counts['without_tokens'], number, file)  # fmt: skip
  if not counts['tokens']:
    raise UserError(
      f'data.path={cfg.corpus}: the {split} split has no document with a token: give more text, or files whose names '
      'hold train and valid'
    )


def _name(cfg, *what) -> str:
  settings = cfg.documents, cfg.detokenize, *what
  return hashlib.blake2b(json.dumps(settings).encode(), digest_size=8).hexdigest()


class Source:
  """Random access to the documents of one split, prepared on disk."""

  endless = False

  def __init__(self, cfg, split: str):
    check(cfg)
    words = tokenizer(cfg)
    identity = corpus_of(cfg).identity(split)
    name = f'text-{split}-{_name(cfg, identity, words.fingerprint, cfg.length, cfg.split_long_documents)}'
    self._stored = builders.documents(_cache(cfg), name, lambda counts: prepare(cfg, split, words, counts))
    limit = {'train': cfg.num_train, 'validation': cfg.num_validation, 'test': cfg.num_test}[split]
    self._size = min(limit or len(self._stored), len(self._stored))
    self.counts = self._stored.counts
    rest = 'goes on in further examples' if cfg.split_long_documents else 'is left out'
    cut = f', {self.counts["cut"]:,} of them longer than {cfg.length - GIVEN} tokens (the rest {rest})'
    _say(f'{cfg.label}, {split}: {self.counts["documents"]:,} documents, {self.counts["tokens"]:,} tokens'
         + (cut if self.counts['cut'] else ''))  # fmt: skip

  def __len__(self) -> int:
    return self._size

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    tokens = np.concatenate([np.array([CLS, BOS], np.int32), self._stored.tokens(index)])
    return {'tokens': tokens, 'fixed': np.arange(len(tokens)) < GIVEN}

  def text(self, index: int) -> str:
    """An example as characters, before the tokenizer."""
    return self._stored.text(index)


source = Source


@functools.cache
def _say(line: str) -> None:
  """Log a line, once in a process."""
  logging.info('%s', line)


# --- the tokenizer ----------------------------------------------------------------------------------------------------

_KNOWN = {}  # fingerprint -> tokenizer: of this process


def tokenizer(cfg) -> tokenizer_lib.Tokenizer:
  """The tokenizer that the config names: by its fingerprint once it is settled, else given, else trained."""
  want = cfg.tokenizer.fingerprint
  if want not in _KNOWN:
    found = given(cfg) or trained(cfg)
    if want and found.fingerprint != want:
      raise UserError(
        f'the tokenizer of the config has fingerprint {found.fingerprint}, expected {want}, the one the model was '
        'trained with: give that one as task.tokenizer.path'
      )
    want = found.fingerprint
    _KNOWN[want] = found
  return _KNOWN[want]


def given(cfg) -> tokenizer_lib.Tokenizer | None:
  """The tokenizer at `tokenizer.path`, if there is such a setting."""
  path = cfg.tokenizer.path
  return tokenizer_lib.read(path, lowercase=cfg.tokenizer.lowercase) if path else None


def trained(cfg) -> tokenizer_lib.Tokenizer:
  """SentencePiece, trained on documents drawn from the training split; kept in the cache."""
  check(cfg)
  settings = cfg.tokenizer
  identity = corpus_of(cfg).identity('train')
  what = identity, settings.size, settings.seed, settings.normalization, settings.documents

  def make(folder):
    sample = draw((text for _, text in texts(cfg, 'train', what='reading for the tokenizer')), settings)
    if not sample:
      raise UserError(f'data.path={cfg.corpus}: the train split has no document, so no tokenizer can be trained')
    logging.info('training SentencePiece on %s documents', f'{len(sample):,}')
    lines = (line for text in sample for line in text.split('\n') if line)
    words = tokenizer_lib.train_sentencepiece(lines, size=settings.size, normalization=settings.normalization)
    logging.info('SentencePiece: %s pieces', f'{words.vocab_size:,}')
    words.save(folder)

  return tokenizer_lib.load(storage.once(_cache(cfg), f'sentencepiece-{_name(cfg, *what)}', make))


def draw(found, settings) -> list[str]:
  """At most `documents` of the texts, drawn uniformly by a generator seeded with `seed`, in their order."""
  return corpora.draw(found, settings.documents, settings.seed)


def settle(cfg, folder) -> None:
  """Find the tokenizer of the run in `folder` (its own, or the one the config names) and note which it is.

  Raises:
    UserError: the config names another one than the run has, or than its model was trained with.
  """
  own = epath.Path(folder) / FOLDER if folder else None
  if own is None or not (own / tokenizer_lib.INFO).exists():
    try:
      cfg.tokenizer.fingerprint = tokenizer(cfg).fingerprint
    except UserError as error:
      missing = f'there is no tokenizer in {own}: ' if own and cfg.tokenizer.fingerprint else ''
      raise UserError(f'{missing}{error}') from None
    return
  words = tokenizer_lib.load(own)
  path = cfg.tokenizer.path
  if cfg.tokenizer.fingerprint not in ('', words.fingerprint):
    raise UserError(
      f'the tokenizer in {own} has fingerprint {words.fingerprint}, but the checkpoints beside it were trained with '
      f'{cfg.tokenizer.fingerprint}: put that one back'
    )
  if path and epath.Path(path).expanduser().exists() and (other := given(cfg).fingerprint) != words.fingerprint:
    raise UserError(
      f'task.tokenizer.path={path} ({other}) is not the tokenizer that the checkpoints in {folder} were trained with '
      f'({words.fingerprint}): leave it out, or give another --workdir'
    )
  cfg.tokenizer.fingerprint = words.fingerprint
  _KNOWN[words.fingerprint] = words


def carry(cfg, folder) -> None:
  """Write the tokenizer into the folder of a run."""
  tokenizer(cfg).save(epath.Path(folder) / FOLDER)


# --- tokens and text --------------------------------------------------------------------------------------------------


def encode_prompt(text: str, cfg) -> list[int]:
  """A text that is to be continued, as tokens; an empty one asks for a whole text."""
  return [CLS, BOS, *tokenizer(cfg).encode(text)]


def decode(tokens, cfg) -> str:
  """A row as text."""
  return tokenizer(cfg).decode(tokens)


TASK = Task(
  name='text',
  tokenizer=tokenizer,
  source=Source,
  longest=longest,
  longest_answer=longest_answer,
  encode_prompt=encode_prompt,
  decode=decode,
  settle=settle,
  carry=carry,
)
