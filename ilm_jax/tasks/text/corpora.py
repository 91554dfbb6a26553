"""Corpora: which files hold which split, and the documents in them.

A path is a file, or a folder of *.txt, *.tokens, *.jsonl and shards (`NAME-00001-of-00100`), in folders of its own
perhaps. Names that hold train, valid, heldout, dev, eval or test say the split. Without a named test set, the held-out
documents are shared between validation and test by a hash; without named files of both kinds (a single file, say), all
documents are shared 95 / 2.5 / 2.5 by it. Equal documents are of one split then.

Documents: in JSONL, the field `text` of each line. In other files, a document ends with a line `<|endoftext|>` and with
the file (`endoftext`), with an empty line (`paragraph`), or with its line (`line`). Text is UTF-8.
"""

import functools
import hashlib
import json
import pathlib
import re
import tarfile
from typing import Any, NamedTuple

import numpy as np
from absl import logging
from etils import epath

from ilm_jax.data import storage
from ilm_jax.types import UserError

SPLITS = ('train', 'validation', 'test')
DOCUMENTS = ('endoftext', 'paragraph', 'line')
END = '<|endoftext|>'
MARK = b'\xef\xbb\xbf'  # which some editors write at the start of UTF-8
SHARES = 40  # one each of validation and test

NAMES = {  # what says the split in the name of a file, or else of a folder
  'test': re.compile(r'(?<![a-z])test(?![a-z])'),
  'validation': re.compile(r'valid|held[-_ ]?out|(?<![a-z])(val|dev|eval)(?![a-z])'),
  'train': re.compile(r'train'),
}
KINDS = re.compile(r'\.(txt|tokens|jsonl)$|-\d+-of-\d+$')


class File(NamedTuple):
  """A file of a corpus."""

  path: Any
  name: str  # below the corpus's path
  size: int
  changed: int  # when, in seconds


class Corpus(NamedTuple):
  """The files of each split; `shared` says among which splits a hash of the document decides, where it does."""

  files: dict[str, list[File]]
  shared: dict[str, tuple[str, ...]]

  def identity(self, split: str) -> list:
    """What decides the documents of a split, wherever the files are."""
    return [[(file.name, file.size, file.changed) for file in self.files[split]], self.shared.get(split)]


# --- files ------------------------------------------------------------------------------------------------------------


OURS = ('dataset_info.json', 'ilm_tokenizer.json')  # of folders with what is prepared


def find(path: str) -> Corpus:
  """Look for the files of a corpus.

  Raises:
    UserError: nothing there, or no text in it.
  """
  root = epath.Path(path).expanduser()
  try:
    if not root.exists():
      raise UserError(f'data.path={path} does not exist: expected a file, or a folder of *.txt, *.tokens or *.jsonl')
    files = list(_walk(root)) if root.is_dir() else [_file(root, root.name)]
  except UserError:
    raise
  except Exception as error:  # each kind of bucket has types of its own
    if not isinstance(error, OSError | ImportError) and not storage.is_remote(path):
      raise
    raise UserError(f'data.path={path} cannot be read: {_reason(error)}') from None
  files = sorted((file for file in files if file.size), key=lambda file: file.name)
  if not files:
    raise UserError(
      f'data.path={path} holds no text: expected a file that is not empty, or a folder of *.txt, *.tokens, *.jsonl or '
      'shards NAME-00001-of-00100'
    )
  named = {split: [file for file in files if split_named(file.name) == split] for split in SPLITS}
  if not named['train'] or not (named['validation'] or named['test']):
    if len(files) > 1 and any(named.values()):
      some = ', '.join(file.name for file in files[:5]) + ', ...' * (len(files) > 5)
      _warn(f'data.path={path}: the names of {some} do not say both what is for training and what is held out: the '
            'documents of all are shared among the splits')  # fmt: skip
    return Corpus({split: files for split in SPLITS}, dict.fromkeys(SPLITS, SPLITS))
  if odd := [file.name for file in files if split_named(file.name) is None]:
    _warn(f'data.path={path}: passed over {", ".join(odd[:5])}, whose name says no split')
  held_out = ('validation', 'test')
  if named['validation'] and named['test']:
    return Corpus(named, {})
  both = named['validation'] or named['test']
  return Corpus({'train': named['train'], **dict.fromkeys(held_out, both)}, dict.fromkeys(held_out, held_out))


@functools.cache
def _warn(line: str) -> None:
  """Log a warning, once in a process."""
  logging.warning('%s', line)


def split_named(name: str) -> str | None:
  """The split that the name of a file says, or of the nearest folder that says one."""
  for part in reversed(pathlib.PurePosixPath(name.lower()).parts):
    for split, words in NAMES.items():
      if words.search(part):
        return split
  return None


def _walk(folder, prefix: str = ''):
  for path in folder.iterdir():
    if path.name.startswith('.'):
      continue
    if path.is_dir() and any((path / name).exists() for name in OURS):
      continue  # a cache that lies inside the corpus
    if path.is_dir():
      yield from _walk(path, f'{prefix}{path.name}/')
    elif KINDS.search(path.name):
      yield _file(path, prefix + path.name)


def _file(path, name: str) -> File:
  return File(path, name, *storage.size_and_time(path))


def _reason(error: Exception) -> str:
  error = error.reason if isinstance(getattr(error, 'reason', None), OSError) else error  # urllib wraps what happened
  return getattr(error, 'strerror', None) or ' '.join(str(error).split()) or type(error).__name__


# --- documents --------------------------------------------------------------------------------------------------------


def split_of(text: str, splits: tuple[str, ...]) -> str:
  """The split of a document among several: 1 / SHARES of all each of validation and test, halves without train."""
  value = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), 'big')
  if 'train' not in splits:
    return splits[value // SHARES % 2]
  return {0: 'validation', 1: 'test'}.get(value % SHARES, 'train')


def documents(corpus: Corpus, split: str, mode: str, *, what: str = ''):
  """Yield (place, text) of the documents of a split; `place` is for people. Logs how far it is, with `what`.

  Raises:
    UserError: what is no UTF-8, a broken line of JSONL, a file that can't be read.
  """
  files, splits = corpus.files[split], corpus.shared.get(split)
  total = sum(file.size for file in files)
  progress, before, count = storage.Progress(what, total, 'documents'), 0, 0
  for file in files:
    for number, (end, text) in enumerate(read(file, mode), 1):
      if splits and split_of(text, splits) != split:
        continue
      count += 1
      yield (file.path, number), text
      if what:
        progress(before + end, count)
    before += file.size


def read_split(path: str, split: str, mode: str, *, detokenised: bool = False, flag: str = '--path'):
  """Yield the texts of a split of a corpus that a command was given by a flag, which messages name."""
  if split not in SPLITS:
    raise UserError(f'--split={split}: expected one of {", ".join(SPLITS)}')
  if mode not in DOCUMENTS:
    raise UserError(f'--documents={mode}: expected one of {", ".join(DOCUMENTS)}')
  try:
    for _, text in documents(find(path), split, mode, what=f'reading {path}'):
      if text:
        yield detokenise(text) if detokenised else text
  except UserError as error:
    raise UserError(str(error).replace('data.path=', f'{flag}=')) from None


def draw(found, count: int, seed: int) -> list:
  """At most `count` of what an iterable yields, drawn uniformly by a generator with this seed, in their order."""
  rng, kept = np.random.default_rng(seed), []
  for index, one in enumerate(found):
    if len(kept) < count:
      kept.append((index, one))
    elif (at := int(rng.integers(index + 1))) < count:
      kept[at] = index, one
  return [one for _, one in sorted(kept, key=lambda pair: pair[0])]


def read(file: File, mode: str):
  """Yield (bytes read so far, text) of the documents of a file."""
  try:
    with file.path.open('rb') as stream:
      if file.path.suffix == '.jsonl':
        yield from _json_lines(file.path, stream)
      else:
        yield from _texts(file.path, stream, mode)
  except OSError as error:
    raise UserError(f'{file.path} cannot be read: {_reason(error)}') from None


def _lines(stream):
  """Yield (bytes before, line) with plain line ends, without a byte order mark."""
  at = 0
  for line in stream:
    start, at = at, at + len(line)
    if start == 0 and line.startswith(MARK):
      start, line = len(MARK), line[len(MARK) :]
    yield start, line.removesuffix(b'\n').removesuffix(b'\r')


def _texts(path, stream, mode: str):
  held, end = [], 0
  for start, line in _lines(stream):
    end, text = start + len(line), decode(line, path, start)
    if mode == 'line':
      if text := text.strip():
        yield end, text
    elif (text.strip() == END) if mode == 'endoftext' else not text.strip():
      if whole := '\n'.join(held).strip():
        yield end, whole
      held = []
    else:
      held.append(text)
  if whole := '\n'.join(held).strip():
    yield end, whole


def _json_lines(path, stream):
  for number, (start, line) in enumerate(_lines(stream), 1):
    if not line.strip():
      continue
    text = decode(line, path, start)
    try:
      found = json.loads(text)['text']
      if not isinstance(found, str):
        raise TypeError
      found.encode()
    except UnicodeEncodeError:
      raise UserError(f'{path}, line {number}: "text" holds half of a surrogate pair, which is no character') from None
    except (KeyError, TypeError, ValueError, RecursionError):
      raise UserError(f'{path}, line {number}: expected JSON with "text", a string, got {text.strip()[:80]}') from None
    yield start + len(line), found.strip()


def decode(content: bytes, path, start: int) -> str:
  """Bytes that begin at `start` of a file as text."""
  try:
    return content.decode()
  except UnicodeDecodeError as error:
    at = start + error.start
    raise UserError(f'{path} is not UTF-8: byte {at} is {content[error.start]:#04x}') from None


# --- one billion words ------------------------------------------------------------------------------------------------

ARCHIVE = '1-billion-word-language-modeling-benchmark-r13output'
_SPACED = [  # (pattern, what it becomes): undoes what the tokeniser of the corpus has put between characters
  (r'(https?) : / / ', r'\1://'),
  (r" '(s|m|d|t|re|ve|ll|S|M|D|T|RE|VE|LL)\b", r"'\1"),
  (r" (n't|N'T)\b", r'\1'),
  (r' (\.+|[,:;?!%])(?= |$)', r'\1'),
  (r'([$£€#]) (?=\d)', r'\1'),
  (r'([(\[]) ', r'\1'),
  (r' ([)\]])', r'\1'),
  (r' / ', '/'),
  (r' @-@ ', '-'),
  (r'" ([^"]*[^" ]) "', r'"\1"'),
  (r'^" ', '"'),
  (r"(?<!\S)' ([^']*[^' ]) '(?!\S)", r"'\1'"),
]
SPACED = [(re.compile(pattern), plain) for pattern, plain in _SPACED]


def detokenise(text: str) -> str:
  """A sentence of the One Billion Word corpus as people write it: no spaces around punctuation and clitics."""
  for pattern, plain in SPACED:
    text = pattern.sub(plain, text)
  return text


# --- from the network -------------------------------------------------------------------------------------------------

STORIES = 'https://huggingface.co/datasets/roneneldan/TinyStories/resolve/main/'
SOURCES = {  # name of a corpus -> its files' addresses
  'tinystories': tuple(f'{STORIES}TinyStoriesV2-GPT4-{part}.txt' for part in ('train', 'valid')),
  'lm1b': (f'https://www.statmt.org/lm-benchmark/{ARCHIVE}.tar.gz',),
}


def fetch(name: str, cache: str) -> str:
  """The folder of a known corpus, downloaded first where it is not there.

  Raises:
    UserError: no network, or no such file there; says what to put where.
  """
  if not cache:
    raise UserError(f'data.path is empty, and task.cache too: give the path of {name}, or a folder to download it to')
  folder = storage.local(cache) / 'downloads' / name
  files = [folder / url.rpartition('/')[2] for url in SOURCES[name]]
  for url, file in zip(SOURCES[name], files, strict=True):
    if not file.exists():
      try:
        storage.download(url, file)
      except OSError as error:
        raise UserError(
          f'{name} is not at hand: {url} could not be downloaded ({_reason(error)}); put '
          f'{" and ".join(f.name for f in files)} into {folder}, or give --config.data.path=PATH'
        ) from None
  return unpack(str(files[0]), cache) if files[0].name.endswith('.tar.gz') else str(folder)


def unpack(archive: str, cache: str) -> str:
  """The folder that a *.tar.gz is unpacked to, below a cache folder."""
  path = epath.Path(archive).expanduser()
  try:
    size, _ = storage.size_and_time(path)
    path.open('rb').close()
  except (OSError, ImportError) as error:
    raise UserError(f'data.path={archive} cannot be read: {_reason(error)}') from None
  what = hashlib.blake2b(repr((path.name, size)).encode(), digest_size=8).hexdigest()

  def make(folder):
    logging.info('unpacking %s', path)
    try:
      with path.open('rb') as stream, tarfile.open(fileobj=stream, mode='r|gz') as tar:
        tar.extractall(folder, filter='data')
    except (tarfile.TarError, EOFError, ValueError) as error:
      raise UserError(f'{path} is damaged ({_reason(error)}): remove it, and start again') from None

  return str(storage.once(storage.local(cache), f'unpacked-{what}', make))
