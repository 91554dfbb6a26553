"""Paths that a user gives: local folders and files, or URLs of a bucket such as gs://bucket/folder."""

import fnmatch
import os
import re

from etils import epath

from ilm_jax.types import UserError

# URL scheme -> the package that reads it, and what to install.
BUCKETS = {
  'gs': ('gcsfs', "pip install 'ilm_jax[gcs]'"),
  's3': ('s3fs', 'pip install s3fs'),
  'az': ('adlfs', 'pip install adlfs'),
}
_SCHEME = re.compile(r'([A-Za-z][A-Za-z0-9+.-]*):/+|(file|' + '|'.join(BUCKETS) + '):', re.IGNORECASE)
_FILE_URL = re.compile(r'file:(//localhost/|///|/(?!/))/*', re.IGNORECASE)  # a file URL up to the / of its path


def resolve(path, setting: str = '') -> epath.Path:
  """Return the path with ~ expanded and file:// removed; raise UserError (which names `setting`) if it is unusable.

  Errors are a mistyped scheme such as gss://, a file URL of another host, and a bucket whose package is not installed.
  """
  text = os.fspath(path)
  name = f'{setting}=' if setting else ''
  if (match := _SCHEME.match(text)) and (scheme := (match[1] or match[2]).lower()) == 'file':
    if not (prefix := _FILE_URL.match(text)):
      raise UserError(f'{name}{text}: expected a local path, or file:///PATH with an absolute path')
    text = '/' + text[prefix.end() :]
  elif match:
    if not text.startswith(tuple(f'{scheme}://' for scheme in BUCKETS)):
      known = ', '.join(f'{scheme}://' for scheme in BUCKETS)
      raise UserError(f'{name}{text}: unknown scheme {match[0]}: expected a local path, or one of {known}')
    package, install = BUCKETS[scheme]
    if not _installed(package):
      raise UserError(f'{name}{text}: reading {scheme}:// needs the package {package}: {install}')
    return epath.Path(text)
  if '\0' in text:
    raise UserError(f'{name}{text!r}: a path cannot contain the character NUL')
  expanded = os.path.expanduser(text)
  if text.startswith('~') and expanded == text:
    raise UserError(f'{name}{text}: the home folder of {text.split("/")[0]} is unknown: write the whole path')
  return epath.Path(expanded)


def _installed(package: str) -> bool:
  """Return whether a package can be imported."""
  try:
    __import__(package)
  except ImportError:
    return False
  return True


def matching(folder, pattern: str) -> list[epath.Path]:
  """Return the entries of a folder whose names match a pattern, sorted; [] if the folder does not exist.

  Unlike `glob`, it does not read [, * and ? in the name of the folder itself as a pattern.
  """
  try:
    entries = list(epath.Path(folder).iterdir())
  except (FileNotFoundError, NotADirectoryError):
    return []
  return sorted(entry for entry in entries if fnmatch.fnmatchcase(entry.name, pattern))
