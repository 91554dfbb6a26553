"""Folders that are made once and are whole or absent, files fetched once, and lines that say how far it is.

A folder is made beside its place and renamed when complete, by one process of all those that share it at a time; what a
killed one has left is removed by the next. Of a bucket, each machine keeps a copy: a folder is made there, then copied
to the bucket, or copied from it where another machine has been first.
"""

import contextlib
import email.utils
import fcntl
import hashlib
import http.client
import os
import pathlib
import shutil
import time
import urllib.error
import urllib.request

from absl import logging
from etils import epath

from ilm_jax.types import UserError

REPORT_SECONDS = 10
WHOLE = '.whole'  # in a bucket: written last
PART = 2**20  # bytes of a download at a time
TIMEOUT = 60  # seconds without an answer


# --- how far it is ----------------------------------------------------------------------------------------------------


class Progress:
  """Logs, from time to time, how much is done, at which rate, and how long the rest will take.

  Args:
    what: is being done.
    total: of which `done` is a part; None where it is not known.
    unit: of the rate.
  """

  def __init__(self, what: str, total: int | None, unit: str):
    self.what, self.total, self.unit = what, total, unit
    self.start = self.said = time.monotonic()
    self.before = None

  def __call__(self, done: int, count: int) -> None:
    """Say so, when it is time: `done` of the total, `count` of the unit."""
    now = time.monotonic()
    self.before = done if self.before is None else self.before
    if now - self.said < REPORT_SECONDS:
      return
    self.said, seconds = now, now - self.start
    fraction = f'{100 * done / self.total:.0f} %, ' if self.total else ''
    new = done - self.before
    left = f', {duration((self.total - done) * seconds / new)} left' if self.total and new > 0 else ''
    logging.info('%s: %s%s %s, %s a second%s', self.what, fraction, f'{count:,}', self.unit,
                 f'{count / seconds:,.0f}', left)  # fmt: skip


def duration(seconds: float) -> str:
  """Seconds for people."""
  minutes, seconds = divmod(round(seconds), 60)
  return f'{minutes // 60} h {minutes % 60:02d} min' if minutes >= 60 else f'{minutes}:{seconds:02d} min'


# --- folders ----------------------------------------------------------------------------------------------------------


def is_remote(path) -> bool:
  """Is it in a bucket?"""
  return '://' in str(path)


def size_and_time(path) -> tuple[int, int]:
  """Bytes of a file, and when it was changed, in seconds; 0 where a bucket doesn't say."""
  if is_remote(path):
    stat = path.stat()
    return stat.length, int(stat.mtime or 0)
  stat = os.stat(path)  # epath's also asks for the owner's name, and there may be none
  return stat.st_size, int(stat.st_mtime)


def local(folder) -> pathlib.Path:
  """Where this machine keeps the things of a cache folder."""
  if not is_remote(folder):
    return pathlib.Path(folder).expanduser()
  home = pathlib.Path(os.environ.get('XDG_CACHE_HOME') or '~/.cache').expanduser()
  return home / 'ilm_jax' / 'data' / hashlib.blake2b(str(folder).encode(), digest_size=8).hexdigest()


def once(folder, name: str, make) -> pathlib.Path:
  """The folder `name` in a cache folder, made first where it is not there.

  Args:
    folder: the cache, local (shared with other machines or not) or in a bucket.
    name: everything that decides the content, in letters that a file name may have.
    make: fills the empty folder that it is given.

  Raises:
    UserError: the cache can't be written.
  """
  place = local(folder) / name
  if place.is_dir():
    return place
  try:
    with locked(place) as alone:
      if place.is_dir():
        return place
      if alone:
        for stale in place.parent.glob(f'.{place.name}.part-*'):
          shutil.rmtree(stale)
      part = place.parent / f'.{place.name}.part-{os.getpid()}-{time.time_ns()}'
      part.mkdir()
      try:
        if is_remote(folder):
          _share(epath.Path(folder) / name, part, make)
        else:
          make(part)
        try:
          part.rename(place)
        except OSError:
          if not place.is_dir():  # without locks, another may have been first, with the same
            raise
      finally:
        shutil.rmtree(part, ignore_errors=True)
  except (OSError, ImportError) as error:  # epath needs a package for each kind of bucket
    reason = getattr(error, 'strerror', None) or ' '.join(str(error).split())
    raise UserError(
      f'task.cache={folder} could not be written ({reason}): make room, or name another folder'
    ) from error
  return place


@contextlib.contextmanager
def locked(place: pathlib.Path):
  """Hold a lock beside a place; yields whether the file system knows locks."""
  place.parent.mkdir(parents=True, exist_ok=True)
  with (place.parent / f'.{place.name}.lock').open('w') as lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX)  # until closed, or the process ends
      alone = True
    except OSError:
      alone = False
    yield alone


def _share(remote, part: pathlib.Path, make) -> None:
  """Fill a folder from a bucket; where the bucket lacks it, fill it and copy it there."""
  if (remote / WHOLE).exists():
    logging.info('copying %s', remote)
    _copy(remote, part)
    (part / WHOLE).unlink(missing_ok=True)
    return
  make(part)
  logging.info('copying to %s', remote)
  _copy(epath.Path(part), remote)
  (remote / WHOLE).write_text('')


def _copy(source, target) -> None:
  target.mkdir(parents=True, exist_ok=True)
  for path in sorted(source.iterdir()):
    if path.is_dir():
      _copy(path, target / path.name)
    else:
      with path.open('rb') as reader, (target / path.name).open('wb') as writer:
        shutil.copyfileobj(reader, writer, PART)


# --- files from the network -------------------------------------------------------------------------------------------


def download(url: str, file: pathlib.Path) -> None:
  """Fetch a file, from where an interrupted attempt ended; it has its name only when it is whole.

  Raises:
    OSError: what the network or the server says.
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
      raise OSError(f'the server gave no answer that can be read ({type(error).__name__})') from error
    except urllib.error.HTTPError as error:
      if error.code != 416:  # "beyond the end"
        raise
      if error.headers.get('Content-Range', '').endswith(f'/{have}'):  # the last attempt has got all of it
        _date(part, error.headers.get('Last-Modified'))
        part.rename(file)
        return
      part.unlink()
      answer = urllib.request.urlopen(url, timeout=TIMEOUT)
    with answer:
      if answer.status != 206:  # from the start, whatever was asked for
        have = 0
      length = answer.headers.get('Content-Length')
      total = have + int(length) if length else None
      progress = Progress(f'downloading {url}', total, 'MB')
      with part.open('ab' if have else 'wb') as out:
        done = have
        progress(done, 0)
        try:
          while block := answer.read(PART):
            out.write(block)
            done += len(block)
            progress(done, (done - have) >> 20)
        except http.client.HTTPException:
          pass  # what is missing is said below
    if total is not None and done < total:
      raise OSError(f'the connection ended after {done:,} of {total:,} bytes')
    _date(part, answer.headers.get('Last-Modified'))
    part.rename(file)


def _date(file: pathlib.Path, text: str | None) -> None:
  """Give a file the date that the server told, so that all who download it have the same."""
  try:
    when = email.utils.parsedate_to_datetime(text or '').timestamp()
  except (TypeError, ValueError):
    when = 0  # as good, where the server says nothing
  with contextlib.suppress(OSError):  # some file systems do not let
    os.utime(file, (when, when))
