"""Result files of commands: check their paths before the work starts, and never leave a partly written file."""

import contextlib
import os

from etils import epath

from ilm_jax import paths
from ilm_jax.types import UserError


def check(out: str, inputs=()) -> epath.Path:
  """Return the path that --out names; raise UserError if no file can be written there.

  `inputs` are pairs of a flag and the file that the flag names, which --out must not overwrite.
  """
  path = paths.resolve(out, '--out')
  if path.is_dir():
    raise UserError(f'--out={out} is a folder: expected a file')
  if '://' not in out and not path.parent.is_dir():
    raise UserError(f'--out={out}: the folder {path.parent} does not exist: create it')
  for flag, given in inputs:
    if given and paths.resolve(given, flag).resolve() == path.resolve():
      raise UserError(f'--out and {flag} are the same file, {path}: choose another --out')
  return path


@contextlib.contextmanager
def replacing(path: epath.Path, label: str):
  """Open a file for writing bytes; the file at `path` is replaced only when the new one is complete.

  If writing fails, as on a full disk, the old file stays as it is, and a UserError starts with `label`.
  """
  # Write directly to buckets, where only complete files appear, and to devices and pipes, which cannot be replaced.
  name = os.fspath(path)
  direct = '://' in name or name.startswith(('/dev/', '/proc/')) or (os.path.exists(name) and not os.path.isfile(name))
  target = path if direct else epath.Path(os.path.realpath(name))  # replace the file that a symbolic link points to
  part = path if direct else target.parent / f'.{target.name}.{os.getpid()}.part'
  try:
    with part.open('wb') as file:
      yield file
    if part != target:
      part.replace(target)
  except BrokenPipeError:
    raise
  except OSError as error:
    raise UserError(f'{label} cannot be written: {error.strerror or error}') from None
  finally:
    if part != target:
      part.unlink(missing_ok=True)
