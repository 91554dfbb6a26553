"""Clues of zebra puzzles: what they mean, how they are written, and the hash that assigns a puzzle to a split.

After Shah et al. 2024. A puzzle has n houses in a row and m attributes; each attribute gives each house a different one
of the values 0 .. n-1. A reference (row, value) names a house: row 0 holds the house numbers, row 1 + a the values of
attribute a. A table is a list of rows, and `table[row][house]` a value; houses are numbered from left to right.

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
from typing import NamedTuple

from ilm_jax.types import UserError

# Number of references of each kind of clue.
NUM_REFERENCES = {'=': 2, '!=': 2, 'nbr': 2, 'ends': 1, 'immediate-left': 2, 'left-of': 2, 'inbetween': 3}
SYMMETRIC = ('=', '!=', 'nbr')  # kinds whose two references can be swapped
MAX_SIZE = 6  # largest number of houses, and of attributes: the vocabulary has the digits 0 to 5


class Clue(NamedTuple):
  """A kind of clue, and its references (row, value) in the order of the text form."""

  kind: str
  refs: tuple[tuple[int, int], ...]


class Puzzle(NamedTuple):
  """Clues, the table that solves them, and its cells (attribute, house, value) in the order the solver fills them."""

  clues: list[Clue]
  table: list[list[int]]
  cells: list[tuple[int, int, int]]

  @property
  def size(self) -> tuple[int, int]:
    """Numbers of houses and of attributes."""
    return len(self.table[0]), len(self.table) - 1


# --- meaning ----------------------------------------------------------------------------------------------------------


def is_true_of_houses(kind: str, at: tuple[int, ...], houses: int) -> bool:
  """Return whether a clue of this kind is true if its references name the houses `at`, out of `houses` houses."""
  match kind:
    case '=':
      return at[0] == at[1]
    case '!=':
      return at[0] != at[1]
    case 'nbr':
      return abs(at[0] - at[1]) == 1
    case 'immediate-left':
      return at[0] + 1 == at[1]
    case 'left-of':
      return at[0] < at[1]
    case 'inbetween':
      return at[0] < at[1] < at[2]
    case _:
      return at[0] in (0, houses - 1)


def is_true(clue: Clue, table: list[list[int]]) -> bool:
  """Return whether a clue is true of a complete table."""
  return is_true_of_houses(clue.kind, tuple(table[row].index(value) for row, value in clue.refs), len(table[0]))


def is_solution(table: list[list[int]], clues: list[Clue]) -> bool:
  """Return whether every row of a table is a permutation of the values and every clue is true of it."""
  values = list(range(len(table[0])))
  return all(sorted(row) == values for row in table) and all(is_true(clue, table) for clue in clues)


# --- identity ---------------------------------------------------------------------------------------------------------


def canonical(clue: Clue) -> Clue:
  """Return the clue with the references of a symmetric kind sorted, so that equivalent clues are equal."""
  return Clue(clue.kind, tuple(sorted(clue.refs))) if clue.kind in SYMMETRIC else clue


def identity(clues: list[Clue], houses: int, attributes: int) -> int:
  """Return a 64-bit hash of the size of a puzzle and its set of clues; the order of the clues does not matter."""
  content = repr((houses, attributes, sorted({tuple(canonical(clue)) for clue in clues}))).encode()
  return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), 'big')


def split_of(clues: list[Clue], houses: int, attributes: int) -> str:
  """Return the split of a puzzle: its hash puts 5 % of the puzzles in validation and 5 % in test."""
  return {0: 'validation', 1: 'test'}.get(identity(clues, houses, attributes) % 20, 'train')


# --- text form --------------------------------------------------------------------------------------------------------


def to_words(clues: list[Clue]) -> list[str]:
  """Return the words of the text form of clues."""
  words = []
  for kind, refs in clues:
    references = [['c', str(row - 1), str(value)] if row else ['n', '0', str(value)] for row, value in refs]
    words += [kind, 'LHS', *references[0], 'RHS', *itertools.chain(*references[1:]), 'CLUE_END']
  return words


def from_words(words: list[str]) -> list[Clue]:
  """Parse the text form of clues.

  Raises:
    UserError: a clue is malformed; the message quotes it and says what was expected.
  """
  clues, start = [], 0
  while start < len(words):
    end = next((i for i in range(start, len(words)) if words[i] == 'CLUE_END'), len(words))
    clue = words[start:end]
    num_refs = NUM_REFERENCES.get(clue[0] if clue else '')
    if (
      num_refs is None
      or end == len(words)
      or clue[1:2] != ['LHS']
      or clue[5:6] != ['RHS']
      or len(clue) != 3 + 3 * num_refs
    ):
      raise _malformed(len(clues), words[start : end + 1], num_refs)
    refs = []
    for at in (2, *range(6, len(clue), 3)):
      letter, row, value = clue[at : at + 3]
      if not (letter == 'c' or (letter == 'n' and row == '0')) or not (is_digit(row) and is_digit(value)):
        raise _malformed(len(clues), words[start : end + 1], num_refs)
      refs.append((int(row) + 1 if letter == 'c' else 0, int(value)))
    clues.append(Clue(clue[0], tuple(refs)))
    start = end + 1
  return clues


def is_digit(word: str) -> bool:
  """Return whether a word is one of the digits 0 to 5."""
  return len(word) == 1 and word in '012345'


def _malformed(index: int, words: list[str], num_refs: int | None) -> UserError:
  if num_refs is None:
    expected = f'a clue that begins with one of {" ".join(NUM_REFERENCES)}'
  else:
    expected = f'{words[0]} LHS REF RHS {"REF " * (num_refs - 1)}CLUE_END with REF = c ATTRIBUTE VALUE or n 0 HOUSE'
  return UserError(f'clue {index + 1}, {" ".join(words[:16])!r}: expected {expected}')
