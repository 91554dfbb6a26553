"""Clues of zebra puzzles: what they mean, how they are written, and the hash that assigns a puzzle to a split.

From Shah et al. 2024. A puzzle has n houses in a row and m attributes. Each attribute gives each house a different one
of the values 0 .. n-1. A table is a list of rows: row 0 has the house numbers, from left to right; row 1 + a has the
values of attribute a, and `table[row][house]` is a value. A reference (row, value) stands for the house that has this
value in this row.

    kind             references   meaning, where A, B and C are house numbers
    =                A B          A = B
    !=               A B          A != B
    nbr              A B          |A - B| = 1
    immediate-left   A B          A + 1 = B
    left-of          A B          A < B
    inbetween        A B C        A < B < C
    ends             A            A is the first or the last house

Text form: `KIND LHS A RHS B C CLUE_END`, where a reference is `c a v` (attribute a has value v) or `n 0 p` (house p).
"""

import hashlib
import itertools
import re
from typing import NamedTuple

from ilm_jax.types import UserError

# Number of references (to houses) in each kind of clue.
NUM_REFERENCES = {'=': 2, '!=': 2, 'nbr': 2, 'ends': 1, 'immediate-left': 2, 'left-of': 2, 'inbetween': 3}
SYMMETRIC = ('=', '!=', 'nbr')  # kinds whose two references can be swapped
DIGITS = ('0', '1', '2', '3', '4', '5')  # the only numbers in the vocabulary
MAX_SIZE = len(DIGITS)  # maximum number of houses and of attributes
REFERENCE = '( c [0-5]| n 0) [0-5]'  # regular expression of a reference in the text form, such as ' c 0 3'


class Clue(NamedTuple):
  """A clue: its kind, and its references (row, value) in the order of the text form."""

  kind: str
  refs: tuple[tuple[int, int], ...]


class Puzzle(NamedTuple):
  """A puzzle: clues, solution table, and (attribute, house, value) cells in the order that the solver fills them."""

  clues: list[Clue]
  table: list[list[int]]
  cells: list[tuple[int, int, int]]

  @property
  def size(self) -> tuple[int, int]:
    """The number of houses and the number of attributes."""
    return len(self.table[0]), len(self.table) - 1


MEANING = {  # {kind of clue, except `ends`: predicate of the house numbers that the clue refers to}
  '=': lambda a, b: a == b,
  '!=': lambda a, b: a != b,
  'nbr': lambda a, b: abs(a - b) == 1,
  'immediate-left': lambda a, b: a + 1 == b,
  'left-of': lambda a, b: a < b,
  'inbetween': lambda a, b, c: a < b < c,
}


def is_true_of_houses(kind: str, at: tuple[int, ...], houses: int) -> bool:
  """Return whether a clue of this kind is true if it refers to the house numbers `at`, in this order."""
  return at[0] in (0, houses - 1) if kind == 'ends' else MEANING[kind](*at)


def is_true(clue: Clue, table: list[list[int]]) -> bool:
  """Return whether a clue is true for a complete table."""
  return is_true_of_houses(clue.kind, tuple(table[row].index(value) for row, value in clue.refs), len(table[0]))


def is_solution(table: list[list[int]], clues: list[Clue]) -> bool:
  """Return whether every row of a table is a permutation of the values and every clue is true for the table."""
  values = list(range(len(table[0])))
  return all(sorted(row) == values for row in table) and all(is_true(clue, table) for clue in clues)


def canonical(clue: Clue) -> Clue:
  """Return the clue, with sorted references if its kind is symmetric, so that equivalent clues compare equal."""
  return Clue(clue.kind, tuple(sorted(clue.refs))) if clue.kind in SYMMETRIC else clue


def identity(clues: list[Clue], houses: int, attributes: int) -> int:
  """Return a 64-bit hash of a puzzle's size and clues that does not depend on the order of the clues."""
  content = repr((houses, attributes, sorted({tuple(canonical(clue)) for clue in clues}))).encode()
  return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), 'big')


def split_of(clues: list[Clue], houses: int, attributes: int) -> str:
  """Return the split of a puzzle, by a hash of its size and clues: 5 % validation, 5 % test, 90 % training."""
  return {0: 'validation', 1: 'test'}.get(identity(clues, houses, attributes) % 20, 'train')


def to_words(clues: list[Clue]) -> list[str]:
  """Convert clues to their text form, as a list of words."""
  words = []
  for kind, refs in clues:
    references = [['c', str(row - 1), str(value)] if row else ['n', '0', str(value)] for row, value in refs]
    words += [kind, 'LHS', *references[0], 'RHS', *itertools.chain(*references[1:]), 'CLUE_END']
  return words


def from_words(words: list[str]) -> list[Clue]:
  """Parse the text form of clues; UserError quotes a malformed clue and shows the expected form."""
  clues, start = [], 0
  while start < len(words):
    end = words.index('CLUE_END', start) if 'CLUE_END' in words[start:] else len(words)
    clue = ' '.join(words[start : end + 1])
    where = f'clue {len(clues) + 1}, {" ".join(words[start : end + 1][:16])!r}'
    if (kind := words[start]) not in NUM_REFERENCES:
      raise UserError(f'{where}: expected a clue that begins with one of {" ".join(NUM_REFERENCES)}')
    others = NUM_REFERENCES[kind] - 1
    if not re.fullmatch(f'{re.escape(kind)} LHS{REFERENCE} RHS({REFERENCE}){{{others}}} CLUE_END', clue):
      expected = f'{kind} LHS REF RHS {"REF " * others}CLUE_END with REF = c ATTRIBUTE VALUE or n 0 HOUSE'
      raise UserError(f'{where}: expected {expected}')
    refs = re.findall(r'([cn]) (\d) (\d)', clue)
    clues.append(Clue(kind, tuple((int(row) + 1 if letter == 'c' else 0, int(value)) for letter, row, value in refs)))
    start = end + 1
  return clues
