"""Text corpora: which files belong to which split, and which documents the files contain.

A corpus is a file, or a folder (with subfolders) of *.txt, *.tokens, *.jsonl, *.ndjson, *.parquet and shards
`NAME-00001-of-00100`, also compressed (*.gz). Hidden folders, the folders of runs, and caches are skipped. A file
belongs to a split if its name, or else its folder's name, contains one of the words train, valid, heldout, dev, eval or
test. If there are held-out files but no separate test files (or no separate validation files), a hash of each document
divides the held-out documents between validation and test. If no file name marks training files, or none marks held-out
files (or the corpus is a single file), the hash divides all documents into 95 % training, 2.5 % validation and 2.5 %
test. The hash gives identical documents the same split.

Documents are UTF-8. In JSON Lines and Parquet files, the field `text` of each line or row is a document. In other
files, a document ends at a line `<|endoftext|>` (mode `endoftext`), at an empty line (`paragraph`) or at each line's
end (`line`), and at the end of the file.
"""

import functools
import gzip
import hashlib
import heapq
import json
import os
import pathlib
import re
import tarfile
import zlib
from typing import Any, NamedTuple

import numpy as np
from absl import logging

from ilm_jax import paths
from ilm_jax.data import file_hashes, storage
from ilm_jax.types import UserError

SPLITS = ('train', 'validation', 'test')
DOCUMENTS = ('endoftext', 'paragraph', 'line')  # modes, each named after what ends a document in a text file
END = '<|endoftext|>'
BYTE_ORDER_MARK = b'\xef\xbb\xbf'  # some editors write it at the start of UTF-8 files
SHARES = 40  # number of hash buckets for documents: one for validation, one for test, 38 for training

WORD = r'(?<![^\W\d_])(%s)((set|data)s?)?(?![^\W\d_])'  # pattern of a whole word, such as test in test_2 and testset
NAMES = {  # split -> pattern of the names of its files or folders; the first matching pattern wins
  'test': re.compile(WORD % 'test(ing)?'),
  'validation': re.compile(WORD % 'valid(ation)?|held[-_ ]?out|val|dev|eval(uation)?'),
  'train': re.compile(WORD % 'train(ing)?'),
}
# Names without an ending (digits after a dot, as in v1.2, are none), and LM1B's names news.en and news.en.heldout.
PLAIN = r'(^|/)([^./]|\.\d+(?!\w))+(\.en)?(\.heldout)?'
CORPUS_FILE = re.compile(rf'(\.(txt|tokens|jsonl|ndjson|parquet)(-\d+-of-\d+)?|{PLAIN}-\d+-of-\d+)(\.gz)?$', re.I)
READABLE = '*.txt, *.tokens, *.jsonl, *.ndjson, *.parquet or shards NAME-00001-of-00100, also compressed (*.gz)'
CODE = ('.py', '.ipynb', '.sh')
SETTINGS = ('.yaml', '.yml', '.toml', '.cfg', '.ini', '.log')  # endings of settings and logs
RUN_FILE = re.compile(r'(run|data|eval)\.json|events\.out\..*|checkpoints|damaged-checkpoint-.*')  # in a run's folder
CACHE_ENTRY = re.compile(
  r'(^|/)((text-(train|validation|test)|sentencepiece|unpacked)-[0-9a-f]{16,}|downloads/(tinystories|lm1b))/$'
)


class File(NamedTuple):
  """A file of a text corpus."""

  path: Any
  name: str  # path relative to the corpus folder
  size: int  # bytes


class Corpus(NamedTuple):
  """The files of each split; `shared` maps a split to all splits that read the same files (including itself)."""

  files: dict[str, list[File]]
  shared: dict[str, tuple[str, ...]]

  def identity(self, split: str) -> list:
    """Return a JSON value that identifies the documents of a split, independent of where the corpus is stored."""
    return [list(self.hashes(split).items()), self.shared.get(split)]

  def hashes(self, *splits: str) -> dict[str, str]:
    """Return {file name: hash of the content} of the files of the given splits."""
    return file_hashes.hashes_of({file.name: file.path for split in splits for file in self.files[split]})


def find(path: str) -> Corpus:
  """Find the files of a corpus and assign them to splits."""
  root = paths.resolve(path, 'data.path')
  skipped, unread = {}, {}  # folder -> the reason why it is skipped; file -> the reason why it is not read
  try:
    if not root.exists():
      link = f': it is a link to {os.readlink(root)}' if os.path.islink(root) else ''
      raise UserError(f'data.path={path} does not exist{link}: expected a file, or a folder of {READABLE}')
    if root.is_dir():
      files, unread = _choose(path, dict(sorted(_walk(root, skipped))), skipped)
    elif CORPUS_FILE.search(root.name) or re.search(rf'{PLAIN}(\.gz)?$', root.name, re.I):
      files = [File(root, root.name, size)] if (size := storage.size_of(root)) else []
    else:
      raise UserError(f'data.path={path} has an unknown ending: expected a folder or {READABLE}; convert or rename it')
  except Exception as error:  # each storage service raises its own types of errors
    if isinstance(error, UserError) or not (isinstance(error, OSError | ImportError) or storage.is_remote(path)):
      raise
    raise UserError(f'data.path={path} cannot be read: {_reason(error)}') from None
  if skipped:
    log_once(f'data.path={path}: skipped folders: {_listed([f"{name} ({why})" for name, why in skipped.items()])}')
  _check_unread(path, unread, files, tuple(skipped))
  named = {split: [file for file in files if split_named(file.name) == split] for split in SPLITS}
  if not named['train'] or not (named['validation'] or named['test']):
    if len(files) > 1 and any(named.values()):
      names = _listed([file.name for file in files])
      log_once(f'data.path={path}: the file names ({names}) do not mark both training and held-out files, so the '
               'documents of all files are divided among the splits by a hash', logging.WARNING)  # fmt: skip
    return Corpus(dict.fromkeys(SPLITS, files), dict.fromkeys(SPLITS, SPLITS))
  if unnamed := [file.name for file in files if split_named(file.name) is None]:
    log_once(f'data.path={path}: ignored {_listed(unnamed)}: their names indicate no split', logging.WARNING)
  if named['validation'] and named['test']:
    return Corpus(named, {})
  held_out, both = ('validation', 'test'), named['validation'] or named['test']
  return Corpus({'train': named['train'], **dict.fromkeys(held_out, both)}, dict.fromkeys(held_out, held_out))


@functools.cache
def log_once(line: str, level: int = logging.INFO) -> None:
  """Log a line, once per process."""
  logging.log(level, '%s', line)


def split_named(name: str) -> str | None:
  """Return the split indicated by a file's name, or else by the innermost folder whose name indicates one, or None."""
  separated = re.sub('(?<=[a-z])(?=[A-Z])', ' ', name)  # 'myTrain.txt' -> 'my Train.txt'
  for part in reversed(pathlib.PurePosixPath(separated.lower()).parts):
    for split, pattern in NAMES.items():
      if pattern.search(part):
        return split
  return None


def _listed(names: list[str]) -> str:
  """Return the names separated by commas; if there are more than five, only the first five and the number."""
  return ', '.join(names[:5]) + f', ... ({len(names)} in all)' * (len(names) > 5)


def _choose(path: str, found: dict, skipped: dict[str, str]) -> tuple[list[File], dict[str, str]]:
  """Return the files to read of `found` (name -> path), and a dict of the others: name -> why it is not read."""
  files, unread = [], {}
  for name, file in found.items():
    if folder := next((folder for folder in skipped if name.startswith(folder)), ''):
      unread[name] = f'is in the skipped folder {folder}, which {skipped[folder]}'
    elif os.path.islink(file) and not os.path.exists(file):
      unread[name] = f'is a link to {os.readlink(file)}, which does not exist'
      if '.' not in file.name or CORPUS_FILE.search(name):
        raise UserError(f'data.path={path}: {name} {unread[name]}: correct or remove the link')
    elif not CORPUS_FILE.search(name):
      unread[name] = 'has an unknown ending'
    elif not (size := storage.size_of(file)):
      unread[name] = 'is empty'
    elif name.lower().endswith('.gz') and (plain := name[:-3]) in found and plain not in unread:
      unread[name] = f'is not needed: {plain} is read instead'
    else:
      files.append(File(file, name, size))
  return files, unread


def _check_unread(path: str, unread: dict[str, str], files: list[File], skipped: tuple[str, ...]) -> None:
  """Warn of unread files; raise UserError if no file is read or an unread file's name marks it as training text.

  The error is not raised for code, nor for a file whose name extends that of a file that is read (train.txt.md5).
  """
  if not files:
    found = '; found: ' * bool(unread) + _listed([' '.join(item) for item in unread.items()])
    raise UserError(
      f'data.path={path} holds no text: expected a file that is not empty, or a folder of {READABLE}{found}'
    )
  # If only held-out files are read, the names of folders, settings and logs count, too.
  splits = {split_named(file.name) for file in files}
  only_held_out = 'train' not in splits and not splits <= {None}
  harmless = CODE if only_held_out else CODE + SETTINGS
  for name, reason in unread.items():
    is_other = name.lower().endswith(harmless) or name.startswith(tuple(file.name for file in files))
    if split_named(name if only_held_out else name.rpartition('/')[2]) == 'train' and not is_other:
      raise UserError(f'data.path={path}: {name} is named like training text, but {reason}: expected {READABLE}; '
                      'convert, move, rename or remove it')  # fmt: skip
  if listed := [f'{name} {reason}' for name, reason in unread.items() if not name.startswith(skipped)]:
    log_once(f'data.path={path}: these files are not read: {_listed(listed)}; expected {READABLE}', logging.WARNING)


def _walk(root, skipped: dict[str, str]):
  """Yield (name relative to `root`, path) of the files in a folder and its subfolders, except runs and caches.

  Each folder is visited once, although links may lead to it: preferably by a path that names a split, then by a path
  without links. Folders that are not read are added to `skipped` with the reason; the files of those that may hold text
  of the user are yielded nevertheless.
  """
  pending, seen = [(True, False, '', root)], set()  # sorted: (names no split, is a link, path relative to root, path)
  while pending:
    *_, prefix, folder = heapq.heappop(pending)
    real = str(folder) if storage.is_remote(folder) else os.path.realpath(folder)
    if real in seen:
      continue
    seen.add(real)
    # For local folders, epath's iterdir() omits names that end with ~.
    names = {path.name for path in folder.iterdir()} if storage.is_remote(folder) else set(os.listdir(folder))
    if prefix and (reason := _reason_to_skip(folder, prefix, names)):
      skipped[prefix], has_no_text = reason
      if has_no_text:
        continue
    for name in names:
      if name.startswith('.') or ('run.json' in names and RUN_FILE.fullmatch(name)):
        continue
      path, inner = folder / name, f'{prefix}{name}/'
      if path.is_dir():
        heapq.heappush(pending, (split_named(inner) is None, os.path.islink(path), inner, path))
      else:
        yield prefix + name, path


def _reason_to_skip(folder, prefix: str, names: set[str]) -> tuple[str, bool] | None:
  """Return (why a folder is skipped, whether it certainly holds no text of the user), or None for a folder to read."""
  if marks := names & {'run.json', 'ilm_tokenizer.json', 'pyvenv.cfg'}:  # of a run, a tokenizer, a virtual environment
    return f'holds {min(marks)}', marks != {'run.json'} or 'checkpoints' in names
  if {'dataset_info.json', 'features.json'} <= names and re.search(r'\.(array_record|tfrecord)\b', ' '.join(names)):
    return 'holds a TFDS data set', False
  if CACHE_ENTRY.search(prefix):
    # Locks of storage.once lie next to a cache entry, locks of storage.download inside it.
    locks = paths.matching(folder.parent, f'.{folder.name}.lock') or paths.matching(folder, '.*.lock')
    return 'is named like prepared data', bool(locks) or storage.WHOLE in names
  return None


def _reason(error: Exception) -> str:
  """Return a one-line description of an error."""
  error = error.reason if isinstance(getattr(error, 'reason', None), OSError) else error  # urllib wraps socket errors
  return getattr(error, 'strerror', None) or ' '.join(str(error).split()) or type(error).__name__


def split_of(text: str, splits: tuple[str, ...]) -> str:
  """Return which of the given splits a document belongs to, by a hash of its text.

  Of all three splits, validation and test get 1 / SHARES of the documents each; without 'train', half of them each.
  """
  value = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), 'big')
  if 'train' not in splits:
    return splits[value // SHARES % 2]
  return {0: 'validation', 1: 'test'}.get(value % SHARES, 'train')


def documents(corpus: Corpus, split: str, mode: str, *, detokenized: bool = False, what: str = ''):
  """Yield ((file path, document number), text) for the documents of a split.

  `mode`, one of DOCUMENTS, applies to text files only. `what` is a name for progress logs; '' disables them.
  """
  files, splits, before, count = corpus.files[split], corpus.shared.get(split), 0, 0
  progress = storage.Progress(what, sum(file.size for file in files), 'documents')
  for file in files:
    for number, (end, text) in enumerate(read(file, mode), 1):
      if splits and split_of(text, splits) != split:
        continue
      count += 1
      yield (file.path, number), detokenize(text) if detokenized else text
      if what:
        progress(before + end, count)
    before += file.size


def read_split(path: str, split: str, mode: str, *, detokenized: bool = False, flag: str = '--path'):
  """Yield the non-empty documents of one split of a corpus; error messages name the command-line flags to correct.

  `flag` is the command-line flag that sets `path`.
  """
  if split not in SPLITS:
    raise UserError(f'--split={split}: expected one of {", ".join(SPLITS)}')
  if mode not in DOCUMENTS:
    raise UserError(f'--documents={mode}: expected one of {", ".join(DOCUMENTS)}')
  try:
    for _, text in documents(find(path), split, mode, detokenized=detokenized, what=f'reading {path}'):
      if text:
        yield text
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
  """Yield (number of bytes read from the file so far, text) for the documents of a file."""
  match = CORPUS_FILE.search(file.name)
  kind = ((match and match[2]) or 'txt').lower()
  parse = {'jsonl': _json_lines, 'ndjson': _json_lines, 'parquet': _parquet}.get(kind)
  try:
    with file.path.open('rb') as raw:
      stream = gzip.GzipFile(fileobj=raw) if file.name.lower().endswith('.gz') else raw
      for text in parse(file.path, stream) if parse else _texts(file.path, stream, mode):
        yield raw.tell(), text
  except (OSError, EOFError, zlib.error) as error:
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
  """Yield the documents of a text file."""
  pending = []  # lines of the current document
  for start, line in _lines(stream):
    text = decode(line, path, start)
    if mode == 'line':
      if text := text.strip():
        yield text
    elif (text.strip() == END) if mode == 'endoftext' else not text.strip():
      if document := '\n'.join(pending).strip():
        yield document
      pending = []
    else:
      pending.append(text)
  if document := '\n'.join(pending).strip():
    yield document


def _json_lines(path, stream):
  """Yield the documents of a JSON Lines file."""
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
    yield found.strip()


def _parquet(path, stream):
  """Yield the documents of a Parquet file, the values of its column `text`."""
  try:
    import pyarrow
    from pyarrow import parquet
  except ImportError:
    raise UserError(f"{path}: Parquet needs the package pyarrow: pip install 'ilm_jax[parquet]'") from None
  try:
    table = parquet.ParquetFile(stream)
    if 'text' not in (columns := table.schema_arrow.names):
      raise UserError(f'{path}: expected a column "text", found the columns {", ".join(columns)}')
    values = (value for batch in table.iter_batches(1_000, columns=['text']) for value in batch.column(0).to_pylist())
    for number, value in enumerate(values, 1):
      if not isinstance(value, str):
        raise UserError(f'{path}, row {number}: expected a string in the column "text", got {repr(value)[:80]}')
      yield value.strip()
  except (pyarrow.ArrowException, UnicodeDecodeError) as error:
    raise UserError(f'{path} is not a readable Parquet file: {_reason(error)}') from None


def decode(content: bytes, path, start: int) -> str:
  """Decode bytes at offset `start` of a UTF-8 file; UserError names the file and the offset of an invalid byte."""
  try:
    return content.decode()
  except UnicodeDecodeError as error:
    offset = start + error.start
    raise UserError(f'{path} is not UTF-8: byte {offset} is {content[error.start]:#04x}') from None


ARCHIVE = '1-billion-word-language-modeling-benchmark-r13output'
_DETOKENIZATION = [(re.compile(pattern), replacement) for pattern, replacement in (
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
)]  # fmt: skip


def detokenize(text: str) -> str:
  """Remove the spaces that tokenization inserted around punctuation and clitics in the One Billion Word corpus."""
  for pattern, replacement in _DETOKENIZATION:
    text = pattern.sub(replacement, text)
  return text


STORIES = 'https://huggingface.co/datasets/roneneldan/TinyStories/resolve/main/'
SOURCES = {  # name of a corpus -> URLs of its files
  'tinystories': tuple(f'{STORIES}TinyStoriesV2-GPT4-{part}.txt' for part in ('train', 'valid')),
  'lm1b': (f'https://www.statmt.org/lm-benchmark/{ARCHIVE}.tar.gz',),
}


def fetch(name: str, cache: str) -> str:
  """Return the folder of a corpus listed in SOURCES, downloading it into the folder `cache` first if it is missing."""
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
        names = ' and '.join(f.name for f in files)
        raise UserError(f'the corpus {name} could not be downloaded from {url} ({_reason(error)}): put {names} into '
                        f'{folder}, or set --config.data.path=PATH') from None  # fmt: skip
  return unpack(str(files[0]), cache) if files[0].name.endswith('.tar.gz') else str(folder)


def unpack(archive: str, cache: str) -> str:
  """Return the cache folder with the unpacked content of a *.tar.gz archive, unpacking it first if necessary."""
  path = paths.resolve(archive, 'data.path')
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
