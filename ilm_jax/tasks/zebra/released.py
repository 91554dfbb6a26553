"""The released zebra puzzles (Shah et al. 2024): pickled lists of [tokens, table, order], read without trusting them.

`tokens` are words: the clues, `ANSWER`, then `attribute house value` for each cell in the order of solving; `table` has
row 0 with the numbers of the houses and a row for each attribute; `order` is an array that says nothing new.
"""

import gc
import pathlib
import pickle

from ilm_jax.tasks.zebra.puzzles import Puzzle, from_words
from ilm_jax.types import UserError

LAYOUT = 'expected a pickled list of [tokens, table, order], as Shah et al. 2024 released it'


class _Ignored:
  """Stands in for all of NumPy in a pickle: the arrays there are not needed, so none of its code is run."""

  __slots__ = ()

  def __new__(cls, *_, **__):
    return super().__new__(cls)

  def __setstate__(self, _):
    pass


_NUMPY = {
  *((f'numpy.{core}.multiarray', '_reconstruct') for core in ('core', '_core')),
  *((f'numpy.{core}.numeric', '_frombuffer') for core in ('core', '_core')),
  *(('numpy', name) for name in ('ndarray', 'dtype')),
  ('_codecs', 'encode'),  # the bytes of arrays in old protocols
}


class _Refused(Exception):
  pass


class _Unpickler(pickle.Unpickler):
  """Makes lists, numbers and strings; arrays become stand-ins, and anything else is refused."""

  def find_class(self, module, name):
    if (module, name) not in _NUMPY:
      raise _Refused(f'{module}.{name}')
    return _Ignored


def files(path: str) -> dict[str, pathlib.Path]:
  """The files of a path: {'all': the file itself}, or {'train': ..., 'test': ...} of a folder."""
  place = pathlib.Path(path).expanduser()
  if place.is_file():
    return {'all': place}
  if not place.is_dir():
    raise UserError(f'task.path={path}: there is no such file or folder; name the released pickles, or task.path=""')
  found = {}
  for split in ('train', 'test'):
    fits = [file for file in sorted(place.iterdir()) if split in file.name and file.suffix in ('.pkl', '.pickle')]
    if len(fits) != 1:
      raise UserError(
        f'task.path={path}: expected one .pkl file with {split!r} in its name, found {len(fits)}; '
        'name a folder with the two released files, or one file'
      )
    found[split] = fits[0]
  return found


def read(file: pathlib.Path):
  """Yield the puzzles of a file. The whole pickle is in memory first, and its records are freed one by one.

  Raises:
    UserError: the file is truncated, has another layout, or holds anything but lists, strings, numbers and arrays.
  """
  records = _load(file)
  if type(records) is not list or not records:
    raise UserError(f'{file}: {LAYOUT}, got {type(records).__name__}')
  for index, record in enumerate(records):
    records[index] = None
    yield _puzzle(record, f'{file}, record {index}')


def _load(file: pathlib.Path):
  collecting = gc.isenabled()
  gc.disable()  # millions of new lists, none of them garbage
  try:
    with file.open('rb') as stream:
      return _Unpickler(stream).load()
  except _Refused as error:
    raise UserError(
      f'{file}: refused, it holds {error}; only lists, strings, numbers and arrays are read from a pickle'
    ) from None
  except OSError as error:
    raise UserError(f'{file} cannot be read ({error.strerror or error})') from None
  except MemoryError:
    raise UserError(f'{file}: too large for the memory of this machine, or damaged') from None
  except Exception as error:  # a damaged pickle may raise anything
    if isinstance(error, EOFError) or 'truncated' in str(error):
      raise UserError(f'{file}: the pickle is truncated; copy it again') from None
    raise UserError(f'{file}: no pickle that can be read ({type(error).__name__}); {LAYOUT}') from None
  finally:
    if collecting:
      gc.enable()


def _puzzle(record, where: str) -> Puzzle:
  """Check a record against its layout: words, sizes, and cells that are those of the table."""
  if type(record) not in (list, tuple) or len(record) != 3:
    raise UserError(f'{where}: {LAYOUT}')
  words, table, _ = record
  if type(words) is not list or not all(type(word) is str for word in words) or words.count('ANSWER') != 1:
    raise UserError(f'{where}: expected a list of words with one ANSWER among them')
  if type(table) is not list or len(table) < 2 or not all(_is_row(row, len(table[0])) for row in table):
    raise UserError(f'{where}: expected a table of lists, each with the numbers 0 ... n-1')
  houses, attributes, at = len(table[0]), len(table) - 1, words.index('ANSWER')
  try:
    clues = from_words(words[:at])
  except UserError as error:
    raise UserError(f'{where}: {error}') from None
  digits = words[at + 1 :]
  cells = [(a, h, table[a + 1][h]) for a in range(attributes) for h in range(houses)]
  fills = [tuple(int(d) for d in digits[i : i + 3] if len(d) == 1 and d in '012345') for i in range(0, len(digits), 3)]
  if sorted(fills) != cells or table[0] != list(range(houses)):
    raise UserError(f'{where}: expected `attribute house value` of each of the {len(cells)} cells of the table')
  if any(value >= houses or row > attributes for clue in clues for row, value in clue.refs):
    raise UserError(
      f'{where}: a clue names a house, a value or an attribute that is not in the table, expected 0 ... n-1'
    )
  return Puzzle(clues, table, fills)


def _is_row(row, houses: int) -> bool:
  return type(row) is list and all(type(value) is int for value in row) and sorted(row) == list(range(houses))
