"""Hashes of file contents: they identify prepared data, and show whether a run's data changed since its last start."""

import concurrent.futures
import contextlib
import hashlib
import json
import os

from absl import logging
from etils import epath

from ilm_jax.types import UserError

RECORD = 'data.json'  # file in a run's folder with the hashes of the data files that it was last started with
BLOCK, BLOCKS = 2**20, 16  # files above BLOCK * BLOCKS = 16 MiB: only BLOCKS blocks of BLOCK bytes are hashed


def hash_of(path) -> str:
  """Return a hash of a file's size and content, as 16 hexadecimal digits.

  Of a large file, only its start, its end and evenly spaced blocks between them are read.
  """
  with path.open('rb') as stream:
    size = stream.seek(0, os.SEEK_END)
    digest = hashlib.blake2b(str(size).encode(), digest_size=8)
    step = BLOCK if size <= BLOCK * BLOCKS else (size - BLOCK) / (BLOCKS - 1)
    for i in range(min(BLOCKS, -(-size // BLOCK))):
      stream.seek(round(i * step))
      digest.update(stream.read(BLOCK))
  return digest.hexdigest()


def hashes_of(files: dict) -> dict[str, str]:
  """Return name -> hash for files given as name -> path; raise UserError if one cannot be read."""

  def read(path) -> str:
    try:
      return hash_of(path)
    except (OSError, ImportError) as error:  # ImportError: the package for cloud storage that epath needs is missing
      raise UserError(f'{path} cannot be read: {getattr(error, "strerror", None) or error}') from None

  with concurrent.futures.ThreadPoolExecutor(16) as pool:
    return dict(zip(files, pool.map(read, files.values()), strict=True))


def check_unchanged(folder, hashes: dict[str, str], what: str) -> None:
  """Warn if data files differ from those of the last start of the run in `folder`; record the new hashes there.

  `hashes` maps the name of each file to its hash; `what` names the data in the warning.
  """
  record = epath.Path(folder) / RECORD
  before = hashes
  with contextlib.suppress(FileNotFoundError):
    try:
      before = dict(json.loads(record.read_bytes()))
    except (ValueError, TypeError):
      logging.warning('%s is damaged, so changes of the data since the last start cannot be noticed', record)
  changes = [
    f'{name} {"is new" if name not in before else "is missing" if name not in hashes else "has other content"}'
    for name in sorted(before.keys() | hashes.keys())
    if before.get(name) != hashes.get(name)
  ]
  if changes:
    rest = f' and {len(changes) - 5} more' if len(changes) > 5 else ''
    logging.warning('%s has changed since this run was last started, and training goes on with the new data: %s%s',
                    what, ', '.join(changes[:5]), rest)  # fmt: skip
  part = record.parent / f'.{RECORD}.{os.getpid()}.part'  # the record is replaced only when the new one is complete
  part.write_text(json.dumps(hashes) + '\n')
  part.replace(record)
