"""Reads the zebra puzzles that Shah et al. (2024) released as pickle files, without running any code from the files.

A file is a pickled list of puzzles [words, table, order]. `words` are the clues, `ANSWER`, then `attribute house value`
for each cell in the order in which the solver fills the cells. `table` has the house numbers in row 0 and one more row
for each attribute. `order` is an array that repeats information from `words`.
"""

import gc
import pathlib
import pickle

from ilm_jax import paths
from ilm_jax.tasks.zebra.clues import DIGITS, Puzzle, from_words
from ilm_jax.types import UserError

LAYOUT = 'expected a pickled list of [words, table, order], as Shah et al. 2024 released it'


class _Placeholder:
  """Stands in for every NumPy object in a pickle; the arrays are not needed, so no NumPy code has to run."""

  __slots__ = ()

  def __new__(cls, *_, **__):
    return super().__new__(cls)

  def __setstate__(self, _):
    pass


# All functions and classes that pickled NumPy arrays refer to, in old and new NumPy versions.
_NUMPY_GLOBALS = {
  *('numpy.core.multiarray._reconstruct', 'numpy._core.multiarray._reconstruct', 'numpy.ndarray', 'numpy.dtype'),
  *('numpy.core.numeric._frombuffer', 'numpy._core.numeric._frombuffer'),
  '_codecs.encode',  # encodes the bytes of an array in pickle protocols 0 to 2
}


class _Unpickler(pickle.Unpickler):
  """Loads lists, numbers and strings, replaces arrays by placeholders, and raises UserError for other objects."""

  def find_class(self, module, name):
    if f'{module}.{name}' not in _NUMPY_GLOBALS:
      raise UserError(f'refused because the pickle refers to {module}.{name}; expected only lists, strings, numbers '
                      'and arrays')  # fmt: skip
    return _Placeholder


def find_files(path: str) -> dict[str, pathlib.Path]:
  """Return {'all': path} for a single file, or {'train': path, 'test': path} for a folder with the released files."""
  place = paths.resolve(path, 'task.path')
  if '://' in str(place):
    raise UserError(f'task.path={path}: the released puzzles can be read from a local folder only; copy them there')
  place = pathlib.Path(place)
  if place.is_file():
    return {'all': place}
  if not place.is_dir():
    raise UserError(f'task.path={path} does not exist: name released files, or set task.path="" to generate puzzles')
  found = {}
  for split in ('train', 'test'):
    files = [file for file in place.iterdir() if split in file.name and file.suffix in ('.pkl', '.pickle')]
    if len(files) != 1:
      raise UserError(f'task.path={path}: expected one .pkl file with {split!r} in its name, found {len(files)}; name '
                      'a folder with the two released files, or a single file')  # fmt: skip
    found[split] = files[0]
  return found


def read(file: pathlib.Path):
  """Yield the puzzles of a released file. The whole file is loaded first; each record is freed after use."""
  records = _load(file)
  if type(records) is not list or not records:
    raise UserError(f'{file}: {LAYOUT}, got {type(records).__name__}')
  for index, record in enumerate(records):
    records[index] = None
    yield _to_puzzle(record, f'{file}, record {index}')


def _load(file: pathlib.Path):
  """Unpickle a file; raise UserError if the file is unreadable or damaged, or contains forbidden types."""
  gc_was_enabled = gc.isenabled()
  gc.disable()  # unpickling allocates millions of lists and frees none, so collecting garbage would only cost time
  try:
    with file.open('rb') as stream:
      return _Unpickler(stream).load()
  except UserError as error:
    raise UserError(f'{file}: {error}') from None
  except OSError as error:
    raise UserError(f'{file} cannot be read ({error.strerror or error})') from None
  except MemoryError:
    raise UserError(f'{file}: the file is damaged, or too large for the memory of this machine') from None
  except Exception as error:  # a damaged pickle can raise any exception
    if isinstance(error, EOFError) or 'truncated' in str(error):
      raise UserError(f'{file}: the pickle is truncated; copy it again') from None
    raise UserError(f'{file}: not a readable pickle ({type(error).__name__}); {LAYOUT}') from None
  finally:
    if gc_was_enabled:
      gc.enable()


def _to_puzzle(record, where: str) -> Puzzle:
  """Convert a record of a released file to a puzzle, after checking it; error messages begin with `where`."""
  if type(record) not in (list, tuple) or len(record) != 3:
    raise UserError(f'{where}: {LAYOUT}')
  words, table, _ = record
  if type(words) is not list or not all(type(word) is str for word in words) or words.count('ANSWER') != 1:
    raise UserError(f'{where}: expected a list of words with one ANSWER in it')
  is_table = type(table) is list and len(table) > 1 and all(type(row) is list for row in table)
  if not is_table or any(set(map(type, row)) != {int} or sorted(row) != list(range(len(table[0]))) for row in table):
    raise UserError(f'{where}: expected a table: a list of rows, each with the numbers 0 ... n-1 in some order')
  houses, attributes = len(table[0]), len(table) - 1
  answer_start = words.index('ANSWER') + 1
  try:
    clues = from_words(words[: answer_start - 1])
  except UserError as error:
    raise UserError(f'{where}: {error}') from None
  digits = words[answer_start:]
  cells = [tuple(int(d) for d in digits[i : i + 3] if d in DIGITS) for i in range(0, len(digits), 3)]
  table_cells = [(a, h, table[a + 1][h]) for a in range(attributes) for h in range(houses)]
  if sorted(cells) != table_cells or table[0] != list(range(houses)):
    raise UserError(f'{where}: expected `attribute house value` for each of the {len(table_cells)} cells of the table, '
                    'and the house numbers in row 0')  # fmt: skip
  if any(value >= houses or row > attributes for clue in clues for row, value in clue.refs):
    raise UserError(f'{where}: a clue names a house, value or attribute that is not in the table: expected houses and '
                    f'values below {houses}, attributes below {attributes}')  # fmt: skip
  return Puzzle(clues, table, cells)
