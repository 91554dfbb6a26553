"""Text corpora: which files belong to which split, and which documents the files contain.

A corpus is a file, or a folder (with subfolders) of *.txt, *.tokens, *.jsonl and shards `NAME-00001-of-00100`. A file
belongs to a split if its name, or else its folder's name, contains train, valid, heldout, dev, eval or test. If there
are held-out files but no separate test files (or no separate validation files), a hash of each document divides the
held-out documents between validation and test. If no file name marks training files, or none marks held-out files (or
the corpus is a single file), the hash divides all documents into 95 % training, 2.5 % validation and 2.5 % test. The
hash gives identical documents the same split.

Documents are UTF-8. In JSONL files, each line's field `text` is a document. In other files, a document ends at a line
`<|endoftext|>` (mode `endoftext`), at an empty line (`paragraph`) or at each line's end (`line`), and at the end of the
file.
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

from ilm_jax.data import file_hashes, storage
from ilm_jax.types import UserError

SPLITS = ('train', 'validation', 'test')
DOCUMENTS = ('endoftext', 'paragraph', 'line')  # modes, each named after what ends a document in a text file
END = '<|endoftext|>'
BYTE_ORDER_MARK = b'\xef\xbb\xbf'  # the UTF-8 byte order mark, which some editors write at the start of a file
SHARES = 40  # number of hash buckets for documents: one for validation, one for test, 38 for training

NAMES = {  # split -> pattern of the names of its files or folders; the first matching pattern wins
  'test': re.compile(r'(?<![a-z])test(?![a-z])'),
  'validation': re.compile(r'valid|held[-_ ]?out|(?<![a-z])(val|dev|eval)(?![a-z])'),
  'train': re.compile(r'train'),
}
CORPUS_FILE = re.compile(r'\.(txt|tokens|jsonl)$|-\d+-of-\d+$')
CACHE_FILES = ('dataset_info.json', 'ilm_tokenizer.json')  # a folder with one of these is a cache, not a corpus


class File(NamedTuple):
  """A file of a text corpus."""

  path: Any
  name: str  # path relative to the corpus folder
  size: int  # bytes


class Corpus(NamedTuple):
  """The files of each split of a corpus.

  Attributes:
    files: split -> its files.
    shared: split -> all splits that read the same files; a hash of each document selects one of these splits. A split
      that shares its files with no other split has no entry.
  """

  files: dict[str, list[File]]
  shared: dict[str, tuple[str, ...]]

  def identity(self, split: str) -> list:
    """Return a JSON value that identifies the documents of a split, independent of where the corpus is stored."""
    return [list(self.hashes(split).items()), self.shared.get(split)]

  def hashes(self, *splits: str) -> dict[str, str]:
    """Return the hash of the content of each file of some splits, by name."""
    return file_hashes.hashes_of({file.name: file.path for split in splits for file in self.files[split]})


# --- files and their splits -------------------------------------------------------------------------------------------


def find(path: str) -> Corpus:
  """Find the files of a corpus and assign them to splits.

  Raises:
    UserError: the path does not exist, cannot be read, or holds no text files.
  """
  root = epath.Path(path).expanduser()
  try:
    if not root.exists():
      raise UserError(f'data.path={path} does not exist: expected a file, or a folder of *.txt, *.tokens or *.jsonl')
    files = list(_walk(root)) if root.is_dir() else [_file(root, root.name)]
  except UserError:
    raise
  except Exception as error:  # each storage service has its own types of errors
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
      examples = ', '.join(file.name for file in files[:5]) + ', ...' * (len(files) > 5)
      _warn_once(f'data.path={path}: the file names ({examples}) do not mark both training and held-out files, so the '
                 'documents of all files are divided among the splits by a hash')  # fmt: skip
    return Corpus({split: files for split in SPLITS}, dict.fromkeys(SPLITS, SPLITS))
  if unnamed := [file.name for file in files if split_named(file.name) is None]:
    _warn_once(f'data.path={path}: ignored {", ".join(unnamed[:5])}: their names indicate no split')
  held_out = ('validation', 'test')
  if named['validation'] and named['test']:
    return Corpus(named, {})
  both = named['validation'] or named['test']
  return Corpus({'train': named['train'], **dict.fromkeys(held_out, both)}, dict.fromkeys(held_out, held_out))


@functools.cache
def _warn_once(line: str) -> None:
  """Log a warning, once per process."""
  logging.warning('%s', line)


def split_named(name: str) -> str | None:
  """Return the split indicated by a file's name, or else by the innermost folder whose name indicates one, or None."""
  for part in reversed(pathlib.PurePosixPath(name.lower()).parts):
    for split, pattern in NAMES.items():
      if pattern.search(part):
        return split
  return None


def _walk(folder, prefix: str = ''):
  """Yield the corpus files in a folder and its subfolders, except hidden files and cache folders."""
  for path in folder.iterdir():
    if path.name.startswith('.'):
      continue
    if path.is_dir() and any((path / name).exists() for name in CACHE_FILES):
      continue
    if path.is_dir():
      yield from _walk(path, f'{prefix}{path.name}/')
    elif CORPUS_FILE.search(path.name):
      yield _file(path, prefix + path.name)


def _file(path, name: str) -> File:
  return File(path, name, storage.size_of(path))


def _reason(error: Exception) -> str:
  """Return a one-line description of an error."""
  error = error.reason if isinstance(getattr(error, 'reason', None), OSError) else error  # urllib wraps socket errors
  return getattr(error, 'strerror', None) or ' '.join(str(error).split()) or type(error).__name__


# --- documents --------------------------------------------------------------------------------------------------------


def split_of(text: str, splits: tuple[str, ...]) -> str:
  """Return the split of a document by a hash of its text.

  Args:
    text: the document.
    splits: the candidate splits. If they include 'train', validation and test get 1 / SHARES of the documents each;
      otherwise, they get half of them each.
  """
  value = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), 'big')
  if 'train' not in splits:
    return splits[value // SHARES % 2]
  return {0: 'validation', 1: 'test'}.get(value % SHARES, 'train')


def documents(corpus: Corpus, split: str, mode: str, *, what: str = ''):
  """Yield ((file path, document number), text) for the documents of a split.

  Args:
    corpus: the corpus, as returned by `find`.
    split: one of SPLITS.
    mode: one of DOCUMENTS; does not apply to JSONL files.
    what: name of the operation in progress log lines; '' disables them.

  Raises:
    UserError: text that is not UTF-8, an invalid JSONL line, or a file that cannot be read.
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
  """Yield the non-empty documents of one split of a corpus; used by commands: error messages name command-line flags.

  Args:
    path: path of the corpus.
    split: one of SPLITS.
    mode: one of DOCUMENTS.
    detokenised: whether to pass the documents through `detokenize`.
    flag: the command-line flag that sets the path.

  Raises:
    UserError: an unknown split or mode, or a corpus that cannot be read.
  """
  if split not in SPLITS:
    raise UserError(f'--split={split}: expected one of {", ".join(SPLITS)}')
  if mode not in DOCUMENTS:
    raise UserError(f'--documents={mode}: expected one of {", ".join(DOCUMENTS)}')
  try:
    for _, text in documents(find(path), split, mode, what=f'reading {path}'):
      if text:
        yield detokenize(text) if detokenised else text
  except UserError as error:
    raise UserError(str(error).replace('data.path=', f'{flag}=')) from None


def sample_uniformly(found, count: int, seed: int) -> list:
  """Sample up to `count` items of an iterable uniformly (reservoir sampling); return them in their original order."""
  rng, kept = np.random.default_rng(seed), []
  for index, item in enumerate(found):
    if len(kept) < count:
      kept.append((index, item))
    elif (slot := int(rng.integers(index + 1))) < count:
      kept[slot] = index, item
  return [item for _, item in sorted(kept, key=lambda pair: pair[0])]


def read(file: File, mode: str):
  """Yield (byte offset of the document's end, text) for the documents of a file."""
  try:
    with file.path.open('rb') as stream:
      if file.path.suffix == '.jsonl':
        yield from _json_lines(file.path, stream)
      else:
        yield from _texts(file.path, stream, mode)
  except OSError as error:
    raise UserError(f'{file.path} cannot be read: {_reason(error)}') from None


def _lines(stream):
  """Yield (byte offset, line) for the lines of a binary stream, without line breaks (LF, CRLF) or a byte order mark."""
  offset = 0
  for line in stream:
    start, offset = offset, offset + len(line)
    if start == 0 and line.startswith(BYTE_ORDER_MARK):
      start, line = len(BYTE_ORDER_MARK), line[len(BYTE_ORDER_MARK) :]
    yield start, line.removesuffix(b'\n').removesuffix(b'\r')


def _texts(path, stream, mode: str):
  """Yield (byte offset of the document's end, text) for the documents of a text file."""
  pending, end = [], 0  # lines of the current document; byte offset of its end
  for start, line in _lines(stream):
    end, text = start + len(line), decode(line, path, start)
    if mode == 'line':
      if text := text.strip():
        yield end, text
    elif (text.strip() == END) if mode == 'endoftext' else not text.strip():
      if document := '\n'.join(pending).strip():
        yield end, document
      pending = []
    else:
      pending.append(text)
  if document := '\n'.join(pending).strip():
    yield end, document


def _json_lines(path, stream):
  """Yield (byte offset of the document's end, text) for the documents of a JSONL file."""
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
      raise UserError(f'{path}, line {number}: "text" contains an unpaired surrogate: remove it') from None
    except (KeyError, TypeError, ValueError, RecursionError):
      raise UserError(f'{path}, line {number}: expected JSON with "text", a string, got {text.strip()[:80]}') from None
    yield start + len(line), found.strip()


def decode(content: bytes, path, start: int) -> str:
  """Decode UTF-8 bytes; raise a UserError with the file and the offset of the first byte that is not valid UTF-8.

  Args:
    content: the bytes.
    path: the file that contains the bytes.
    start: offset of the bytes in the file.
  """
  try:
    return content.decode()
  except UnicodeDecodeError as error:
    offset = start + error.start
    raise UserError(f'{path} is not UTF-8: byte {offset} is {content[error.start]:#04x}') from None


# --- the One Billion Word corpus --------------------------------------------------------------------------------------

ARCHIVE = '1-billion-word-language-modeling-benchmark-r13output'
DETOKENIZATION = [  # (pattern, replacement) pairs that remove the spaces inserted when LM1B was tokenized
  (re.compile(pattern), replacement)
  for pattern, replacement in [
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
]


def detokenize(text: str) -> str:
  """Remove the spaces around punctuation and clitics from a sentence of the One Billion Word corpus."""
  for pattern, replacement in DETOKENIZATION:
    text = pattern.sub(replacement, text)
  return text


# --- downloads --------------------------------------------------------------------------------------------------------

STORIES = 'https://huggingface.co/datasets/roneneldan/TinyStories/resolve/main/'
SOURCES = {  # name of a corpus -> URLs of its files
  'tinystories': tuple(f'{STORIES}TinyStoriesV2-GPT4-{part}.txt' for part in ('train', 'valid')),
  'lm1b': (f'https://www.statmt.org/lm-benchmark/{ARCHIVE}.tar.gz',),
}


def fetch(name: str, cache: str) -> str:
  """Return the folder of a corpus listed in SOURCES, downloading the corpus first if it is missing.

  Args:
    name: a key of SOURCES.
    cache: the cache folder.

  Raises:
    UserError: the download failed; the message says which files the user can put into which folder instead.
  """
  if not cache:
    raise UserError(f'data.path and task.cache are empty: set data.path to a copy of {name}, or task.cache to a folder '
                    'to download it to')  # fmt: skip
  folder = storage.local(cache) / 'downloads' / name
  files = [folder / url.rpartition('/')[2] for url in SOURCES[name]]
  for url, file in zip(SOURCES[name], files, strict=True):
    if not file.exists():
      try:
        storage.download(url, file)
      except OSError as error:
        raise UserError(
          f'the corpus {name} could not be downloaded from {url} ({_reason(error)}): put '
          f'{" and ".join(f.name for f in files)} into {folder}, or give --config.data.path=PATH'
        ) from None
  return unpack(str(files[0]), cache) if files[0].name.endswith('.tar.gz') else str(folder)


def unpack(archive: str, cache: str) -> str:
  """Return the cache folder with the unpacked content of a *.tar.gz archive, unpacking it first if necessary."""
  path = epath.Path(archive).expanduser()
  try:
    found = file_hashes.hash_of(path)
  except (OSError, ImportError) as error:
    raise UserError(f'data.path={archive} cannot be read: {_reason(error)}') from None

  def make(folder):
    logging.info('unpacking %s', path)
    try:
      with path.open('rb') as stream, tarfile.open(fileobj=stream, mode='r|gz') as tar:
        tar.extractall(folder, filter='data')
    except (tarfile.TarError, EOFError, ValueError) as error:
      raise UserError(f'{path} is damaged ({_reason(error)}): remove it and run the same command again') from None

  return str(storage.once(storage.local(cache), f'unpacked-{found}', make))
