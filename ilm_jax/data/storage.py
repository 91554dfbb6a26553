"""Cache folders that are built once and appear atomically, resumable downloads, and progress logging.

A cache folder is built under a temporary name and renamed when it is complete, so no reader sees a partial folder. A
file lock allows one builder process at a time, and a new builder first deletes the unfinished folders of killed
processes. If the cache is in a bucket (gs://...), each machine keeps a local copy: the first machine builds the folder
and uploads it, the other machines download it.
"""

import contextlib
import fcntl
import hashlib
import http.client
import multiprocessing
import os
import pathlib
import shutil
import time
import urllib.error
import urllib.request

from absl import logging
from etils import epath

from ilm_jax import paths
from ilm_jax.types import UserError

REPORT_SECONDS = 10  # seconds between progress log lines
WHOLE = '.whole'  # marker file that is uploaded last: a folder in a bucket is complete only if it holds this file
CHUNK = 2**20  # number of bytes to copy or download at a time
TIMEOUT = 60  # seconds to wait for a download server's response before giving up


class Progress:
  """Logs the progress of the operation `what` every REPORT_SECONDS: percentage done, rate, estimated remaining time.

  `total` is the amount of work in any unit, such as bytes, or None if unknown; `unit` names the items that are counted,
  such as 'documents'.
  """

  def __init__(self, what: str, total: int | None, unit: str):
    self.what, self.total, self.unit = what, total, unit
    self.start = self.reported = time.monotonic()
    self.initial = None  # work already done at the first call, excluded from the estimate of the remaining time

  def __call__(self, done: int, count: int) -> None:
    """Log progress, at most once every REPORT_SECONDS: `done` of the total work, and `count` items."""
    now = time.monotonic()
    self.initial = done if self.initial is None else self.initial
    if now - self.reported < REPORT_SECONDS:
      return
    self.reported, seconds = now, now - self.start
    percentage = f'{100 * done / self.total:.0f} %, ' if self.total else ''
    new = done - self.initial
    remaining = f', {duration((self.total - done) * seconds / new)} left' if self.total and new > 0 else ''
    logging.info('%s: %s%s %s, %s a second%s', self.what, percentage, f'{count:,}', self.unit,
                 f'{count / seconds:,.0f}', remaining)  # fmt: skip


def duration(seconds: float) -> str:
  """Format seconds as `M:SS min`, or as `H h MM min` if they are at least an hour."""
  minutes, seconds = divmod(round(seconds), 60)
  return f'{minutes // 60} h {minutes % 60:02d} min' if minutes >= 60 else f'{minutes}:{seconds:02d} min'


def is_remote(path) -> bool:
  """Return whether a path is a URL such as gs://bucket/folder."""
  return '://' in str(path)


def size_of(path) -> int:
  """Return a file's size in bytes."""
  # For local files, epath's stat() fails if the owner's user id has no user name, as in some containers.
  return path.stat().length if is_remote(path) else os.stat(path).st_size


def free_shared_memory(setting: str, value: int) -> int:
  """Return the number of free bytes in /dev/shm; if it cannot be used, raise UserError with advice on `setting`."""
  try:
    multiprocessing.get_context('spawn').Lock()
    status = os.statvfs('/dev/shm')
  except FileNotFoundError:
    return 2**62  # an operating system without /dev/shm: no limit is known
  except OSError as error:
    reason = error.strerror
  else:
    free = status.f_bavail * status.f_frsize
    if not status.f_blocks or free >= 2**20:  # a file system without a limit reports 0 blocks
      return free or 2**62
    reason = f'only {free >> 10} KiB are free'
  raise UserError(
    f'{setting}={value}: worker processes need shared memory, but /dev/shm cannot be used ({reason}): set {setting}=0, '
    'or mount a writable /dev/shm of sufficient size (docker run --shm-size=1g)'
  )


def local(folder) -> pathlib.Path:
  """Return the local path of a cache folder; for a bucket, the path of its local copy under XDG_CACHE_HOME."""
  folder = paths.resolve(folder, 'task.cache')
  if not is_remote(folder):
    return pathlib.Path(folder)
  home = paths.resolve(os.environ.get('XDG_CACHE_HOME') or '~/.cache', 'XDG_CACHE_HOME')
  return pathlib.Path(home, 'ilm_jax', 'data', hashlib.blake2b(str(folder).encode(), digest_size=8).hexdigest())


def once(folder, name: str, make) -> pathlib.Path:
  """Return the local path of the entry `name` of a cache folder (local or in a bucket), building it if it is missing.

  `make` gets the path of an empty folder, into which it writes the entry's files. The name must be unique to
  the content and a valid file name. Raises UserError if the cache cannot be written.
  """
  folder = paths.resolve(folder, 'task.cache')
  place = local(folder) / name
  if place.is_dir():
    return place
  try:
    with locked(place) as alone:
      if place.is_dir():
        return place
      if alone:
        for stale in paths.matching(place.parent, f'.{place.name}.part-*'):
          shutil.rmtree(stale)
      part = place.parent / f'.{place.name}.part-{os.getpid()}-{time.time_ns()}'
      part.mkdir()
      try:
        if is_remote(folder):
          _download_or_make(epath.Path(folder) / name, part, make)
        else:
          make(part)
        try:
          part.rename(place)
        except OSError:
          if not place.is_dir():  # on a file system without locks, another process may have built the same entry first
            raise
      finally:
        shutil.rmtree(part, ignore_errors=True)
  except (OSError, ImportError) as error:  # ImportError: the package for cloud storage that epath needs is missing
    reason = getattr(error, 'strerror', None) or ' '.join(str(error).split())
    raise UserError(
      f'task.cache={folder} could not be written ({reason}): free some disk space or choose another folder'
    ) from error
  return place


@contextlib.contextmanager
def locked(place: pathlib.Path):
  """Hold an exclusive lock on a file next to `place`; yields False if the file system does not support locks."""
  place.parent.mkdir(parents=True, exist_ok=True)
  with (place.parent / f'.{place.name}.lock').open('w') as lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX)  # held until the file is closed or the process ends
      alone = True
    except OSError:
      alone = False
    yield alone


def _download_or_make(remote, part: pathlib.Path, make) -> None:
  """Download a complete folder from a bucket into `part`; if there is none, fill `part` with `make` and upload it."""
  if (remote / WHOLE).exists():
    logging.info('downloading the cache folder %s', remote)
    _copy(remote, part)
    (part / WHOLE).unlink(missing_ok=True)
    return
  make(part)
  logging.info('uploading the cache folder %s', remote)
  _copy(epath.Path(part), remote)
  (remote / WHOLE).write_text('')


def _copy(source, target) -> None:
  """Copy a folder recursively; either path may be local or in a bucket."""
  target.mkdir(parents=True, exist_ok=True)
  for path in sorted(source.iterdir()):
    if path.is_dir():
      _copy(path, target / path.name)
    else:
      with path.open('rb') as reader, (target / path.name).open('wb') as writer:
        shutil.copyfileobj(reader, writer, CHUNK)


def download(url: str, file: pathlib.Path) -> None:
  """Download a URL to a file, resuming an interrupted download; OSError gives the reason if it fails.

  The content is written to `NAME.part`, which is renamed to `file` when it is complete.
  """
  file.parent.mkdir(parents=True, exist_ok=True)
  with locked(file) as alone:
    part = file.parent / (f'{file.name}.part' if alone else f'{file.name}.part-{os.getpid()}-{time.time_ns()}')
    if file.exists():
      return
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={'Range': f'bytes={have}-'} if have else {})
    try:
      answer = urllib.request.urlopen(request, timeout=TIMEOUT)
    except http.client.HTTPException as error:
      raise OSError(f'the server sent an invalid HTTP response ({type(error).__name__})') from error
    except urllib.error.HTTPError as error:
      if error.code != 416:  # 416: the requested range starts at or beyond the end of the file
        raise
      if error.headers.get('Content-Range', '').endswith(f'/{have}'):  # the .part file is already complete
        part.rename(file)
        return
      part.unlink()
      answer = urllib.request.urlopen(url, timeout=TIMEOUT)
    with answer:
      if answer.status != 206:  # the server ignored the requested range and sends the whole file
        have = 0
      length = answer.headers.get('Content-Length')
      done, total = have, (have + int(length) if length else None)
      progress = Progress(f'downloading {url}', total, 'MB')
      with part.open('ab' if have else 'wb') as out:
        progress(done, 0)
        try:
          while block := answer.read(CHUNK):
            out.write(block)
            done += len(block)
            progress(done, (done - have) >> 20)
        except http.client.HTTPException:
          pass  # the connection broke; the comparison of sizes below raises the error
    if total is not None and done < total:
      raise OSError(f'the connection ended after {done:,} of {total:,} bytes')
    part.rename(file)
