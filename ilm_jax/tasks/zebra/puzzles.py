"""Zebra puzzles in pure Python: clues and their meaning, a solver that reasons as people do, a generator.

After Shah et al. 2024. A puzzle has n houses in a row and m attributes; each attribute gives every house another of the
values 0 .. n-1. A reference (row, value) names a house: row 0 holds the numbers of the houses, row 1 + a attribute a.
A table is a list of rows, each the values from the leftmost house to the rightmost.

    kind             references   meaning, in positions
    =                A B          A = B
    !=               A B          A != B
    nbr              A B          |A - B| = 1
    immediate-left   A B          A + 1 = B
    left-of          A B          A < B
    inbetween        A B C        A < B < C
    ends             A            A is the first or the last house

As words, `KIND LHS A RHS B C CLUE_END`, where a reference is `c a v` (attribute a has value v) or `n 0 p` (house p).
"""

import hashlib
import itertools
from typing import NamedTuple

import numpy as np

from ilm_jax.types import UserError

WEIGHTS = {'=': 4, '!=': 1, 'nbr': 2, 'ends': 2, 'immediate-left': 2, 'left-of': 2, 'inbetween': 1}  # of the generator
REFERENCES = {kind: {'ends': 1, 'inbetween': 3}.get(kind, 2) for kind in WEIGHTS}
METHODS = {  # of the solver, where it applies a clue, and of the generator, where one is drawn
  '=': '_equal', '!=': '_unequal', 'nbr': '_neighbours', 'immediate-left': '_immediate_left', 'left-of': '_left_of',
  'inbetween': '_in_between', 'ends': '_ends',
}  # fmt: skip
SYMMETRIC = ('=', '!=', 'nbr')
LARGEST = 6  # houses, and attributes: the digits of the vocabulary are 0 .. 5
FIRST_SOLVE = 5  # clues
MOST_CLUES_AT_ONCE = 3  # that the solver combines


class Clue(NamedTuple):
  """A kind, and the references (row, value) in the order of the text."""

  kind: str
  refs: tuple[tuple[int, int], ...]


class Puzzle(NamedTuple):
  """Clues, the table that they determine, and its cells (attribute, house, value) in the order of solving."""

  clues: list[Clue]
  table: list[list[int]]
  fills: list[tuple[int, int, int]]


# --- meaning ----------------------------------------------------------------------------------------------------------


def related(kind: str, at: tuple[int, ...], houses: int) -> bool:
  """Whether a clue of this kind is true when its references are in the houses `at`."""
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


def holds(clue: Clue, table: list[list[int]]) -> bool:
  """Whether a clue is true of a full table, row 0 included."""
  return related(clue.kind, tuple(table[row].index(value) for row, value in clue.refs), len(table[0]))


def answers(table: list[list[int]], clues: list[Clue]) -> bool:
  """Whether a table is an answer to a puzzle: every row a permutation, every clue true."""
  houses = list(range(len(table[0])))
  return all(sorted(row) == houses for row in table) and all(holds(clue, table) for clue in clues)


def canonical(clue: Clue) -> Clue:
  """The clue with the sides of a symmetric kind in a fixed order."""
  return Clue(clue.kind, tuple(sorted(clue.refs))) if clue.kind in SYMMETRIC else clue


def identity(clues: list[Clue], houses: int, attributes: int) -> int:
  """64 bits of a hash of what makes a puzzle the same: its size and its set of clues."""
  what = repr((houses, attributes, sorted({tuple(canonical(clue)) for clue in clues}))).encode()
  return int.from_bytes(hashlib.blake2b(what, digest_size=8).digest(), 'big')


def split_of(clues: list[Clue], houses: int, attributes: int) -> str:
  """The split of a puzzle's identity: 5 % validation, 5 % test."""
  return {0: 'validation', 1: 'test'}.get(identity(clues, houses, attributes) % 20, 'train')


# --- words ------------------------------------------------------------------------------------------------------------


def to_words(clues: list[Clue]) -> list[str]:
  """The clues as words."""
  out = []
  for kind, refs in clues:
    sides = [['c', str(row - 1), str(value)] if row else ['n', '0', str(value)] for row, value in refs]
    out += [kind, 'LHS', *sides[0], 'RHS', *itertools.chain(*sides[1:]), 'CLUE_END']
  return out


def from_words(words: list[str]) -> list[Clue]:
  """Read clues.

  Raises:
    UserError: which clue is malformed, and what was expected.
  """
  clues, begin = [], 0
  while begin < len(words):
    end = next((i for i in range(begin, len(words)) if words[i] == 'CLUE_END'), len(words))
    clue = words[begin:end]
    known = REFERENCES.get(clue[0] if clue else '')
    if known is None or end == len(words) or clue[1:2] != ['LHS'] or clue[5:6] != ['RHS'] or len(clue) != 3 + 3 * known:
      raise _malformed(len(clues), words[begin : end + 1], known)
    refs = []
    for at in (2, *range(6, len(clue), 3)):
      letter, row, value = clue[at : at + 3]
      if not (letter == 'c' or (letter == 'n' and row == '0')) or not (_digit(row) and _digit(value)):
        raise _malformed(len(clues), words[begin : end + 1], known)
      refs.append((int(row) + 1 if letter == 'c' else 0, int(value)))
    clues.append(Clue(clue[0], tuple(refs)))
    begin = end + 1
  return clues


def _digit(word: str) -> bool:
  return len(word) == 1 and word in '012345'


def _malformed(index: int, words: list[str], references: int | None) -> UserError:
  if references is None:
    expected = f'one of {" ".join(WEIGHTS)} first'
  else:
    expected = f'{words[0]} LHS REF RHS {"REF " * (references - 1)}CLUE_END with REF = c ATTRIBUTE VALUE or n 0 HOUSE'
  return UserError(f'clue {index + 1}, {" ".join(words[:16])!r}: expected {expected}')


# --- the solver -------------------------------------------------------------------------------------------------------


class Contradiction(Exception):
  """The clues leave a value without a house, or a house without a value."""


class Solver:
  """Fills the table by applying one clue, or two, or three in turn, and elimination: polynomial, and sound.

  What is carried from one success to the next is the answer alone. A *state* holds, within an attempt, the houses in
  which each value may still be: one integer, n bits for each reference, reference r = row * n + value at bit r * n.

  An attempt applies an ordered tuple of clues to a fresh state and succeeds when it fills a cell. Tuples are tried in
  lexicographic order, the single clues first. `_tried` remembers which clues were applied to which state, so that no
  tuple is tried twice on the same answer: a clue that is added later costs only the tuples that contain it, and clues
  that change nothing, or lead to a known state, cost nothing more.
  """

  def __init__(self, houses: int, attributes: int, clues=()):
    self.houses, self.attributes = houses, attributes
    self.full = (1 << houses) - 1
    self.placed = [True] * houses + [False] * (houses * attributes)  # by reference
    self.at = list(range(houses)) + [-1] * (houses * attributes)  # ... and where
    self.free = [0] + [self.full] * attributes  # houses of each row without a value
    self.fills = []
    self._clues, self._open = [], 0  # all of them, and a bit for each that can still tell something
    self._rules = {kind: getattr(self, name) for kind, name in METHODS.items()}
    self._restart()
    for clue in clues:
      self.add(clue)

  @property
  def solved(self) -> bool:
    return len(self.fills) == self.houses * self.attributes

  def knows(self, ref: tuple[int, int]) -> bool:
    """Whether the answer says where a reference is."""
    return self.placed[ref[0] * self.houses + ref[1]]

  def filled(self, row: int) -> int:
    """How many houses of a row have a value."""
    return self.houses - self.free[row].bit_count()

  def has(self, row: int, house: int) -> bool:
    """Whether the cell of a row and a house has a value."""
    return not self.free[row] >> house & 1

  def table(self) -> list[list[int]]:
    """The answer; -1 where nothing is known."""
    out = [[-1] * self.houses for _ in range(self.attributes + 1)]
    for ref, house in enumerate(self.at):
      if house >= 0:
        out[ref // self.houses][house] = ref % self.houses
    return out

  def add(self, clue: Clue) -> None:
    """Take a clue in; `solve` uses it."""
    refs = tuple(row * self.houses + value for row, value in clue.refs)
    if not all(self.placed[ref] for ref in refs):
      self._open |= 1 << len(self._clues)
    self._clues.append((self._rules[clue.kind], refs, tuple(sorted({row for row, _ in clue.refs}))))

  def solve(self) -> set[int]:
    """Go on until nothing more follows; returns the indices of the clues that helped.

    Raises:
      Contradiction: no table fits the clues.
    """
    used = set()
    while not self.solved:
      for size in range(1, MOST_CLUES_AT_ONCE + 1):
        if success := self._attempts(self._fresh, (), size):
          break
      else:
        break
      used.update(success[0])
      self._write(*success[1])
    return used

  def _attempts(self, state: int, before: tuple[int, ...], size: int):
    """Extend a tuple by `size` clues in every way; returns the first success as (tuple, (reference, house)).

    Everything shorter has failed, so a clue that leaves the state as it is can be skipped with all that follows it.
    """
    tried, after = self._tried.setdefault(state, [0, {}])
    taken = sum(1 << i for i in before)
    if size > 1:
      for index, child in sorted(after.items()):
        if not taken >> index & 1 and (success := self._attempts(child, (*before, index), size - 1)):
          return success
      return None
    left = self._open & ~tried & ~taken
    while left:
      index = (left & -left).bit_length() - 1
      left &= left - 1
      child, cell = self._apply(state, index)
      if cell is not None:
        return (*before, index), cell
      self._tried[state][0] |= 1 << index
      if child != state:
        after[index] = child
    return None

  def _apply(self, state: int, index: int):
    """Apply one clue, then elimination; returns (the new state, the cell it fills as (reference, house) or None)."""
    rule, refs, rows = self._clues[index]
    new, cell = rule(state, *refs)
    if cell is None and new != state:
      bits = self.houses * self.houses
      for row in rows:
        if (new ^ state) >> row * bits & (1 << bits) - 1 and (cell := self._eliminate(new, row)):
          break
    if cell is not None and not (0 <= cell[1] < self.houses and self._may(new, cell[0]) >> cell[1] & 1):
      raise Contradiction
    return new, cell

  def _eliminate(self, state: int, row: int):
    """The first house of a row with one candidate left, else the first value with one house left."""
    once = twice = 0
    lone = None
    values = [ref for ref in range(row * self.houses, (row + 1) * self.houses) if not self.placed[ref]]
    for ref in values:
      may = self._may(state, ref)
      twice |= once & may
      once |= may
      if lone is None and not may & (may - 1):
        lone = ref, may.bit_length() - 1
    if once != self.free[row]:
      raise Contradiction
    if single := once & ~twice:
      house = _lowest(single)
      return next(ref for ref in values if self._may(state, ref) >> house & 1), house
    return lone

  def _write(self, ref: int, house: int) -> None:
    """Fill a cell, then the last cells of rows; forget the clues that have nothing more to say."""
    self._fill(ref, house)
    for row in range(1, self.attributes + 1):
      if self.free[row].bit_count() == 1:
        last = next(r for r in range(row * self.houses, (row + 1) * self.houses) if not self.placed[r])
        self._fill(last, self.free[row].bit_length() - 1)
    for index, (_, refs, _) in enumerate(self._clues):
      if all(self.placed[r] for r in refs):
        self._open &= ~(1 << index)
    self._restart()

  def _fill(self, ref: int, house: int) -> None:
    row, value = divmod(ref, self.houses)
    self.placed[ref], self.at[ref] = True, house
    self.free[row] &= ~(1 << house)
    self.fills.append((row - 1, house, value))

  def _restart(self) -> None:
    """The state at the start of an attempt: a value may be in every house of its row that has none."""
    masks = [1 << self.at[ref] if placed else self.free[ref // self.houses] for ref, placed in enumerate(self.placed)]
    self._fresh = sum(mask << ref * self.houses for ref, mask in enumerate(masks))
    self._tried = {}  # state -> [bits of the clues applied to it without success, {clue: state, where it changed}]

  def _may(self, state: int, ref: int) -> int:
    return state >> ref * self.houses & self.full

  def _narrow(self, state: int, ref: int, to: int) -> int:
    """Keep only the houses `to` of an open reference."""
    may = self._may(state, ref)
    if self.placed[ref] or not may & ~to:
      return state
    if not may & to:
      raise Contradiction
    return state ^ (may & ~to) << ref * self.houses

  def _near(self, may: int) -> int:
    return (may << 1 | may >> 1) & self.full

  # Each rule returns (new state, cell that it fills or None). One of its references is open, at least. What two open
  # references exclude of each other is found in one pass: a house kept for one keeps its partner's house, and the
  # other way round. The chain of `inbetween` needs a second.

  def _equal(self, state, a, b):
    if self.placed[a] or self.placed[b]:
      return state, (b, self.at[a]) if self.placed[a] else (a, self.at[b])
    state = self._narrow(state, a, self._may(state, b))
    return self._narrow(state, b, self._may(state, a)), None

  def _unequal(self, state, a, b):
    if self.placed[a]:
      state = self._narrow(state, b, ~(1 << self.at[a]))
    elif self.placed[b]:
      state = self._narrow(state, a, ~(1 << self.at[b]))
    return state, None

  def _neighbours(self, state, a, b):
    if self.placed[a] or self.placed[b]:
      known, other = (a, b) if self.placed[a] else (b, a)
      new = self._narrow(state, other, self._near(1 << self.at[known]))
      may = self._may(new, other)
      return new, (other, may.bit_length() - 1) if new != state and not may & (may - 1) else None
    state = self._narrow(state, a, self._near(self._may(state, b)))
    return self._narrow(state, b, self._near(self._may(state, a))), None

  def _immediate_left(self, state, a, b):
    if self.placed[a] or self.placed[b]:
      return state, (b, self.at[a] + 1) if self.placed[a] else (a, self.at[b] - 1)
    state = self._narrow(state, a, self._may(state, b) >> 1)
    return self._narrow(state, b, self._may(state, a) << 1), None

  def _ordered(self, state, a, b):
    """Prune by A < B: A lies left of B's rightmost house, B right of A's leftmost."""
    state = self._narrow(state, a, (1 << self._may(state, b).bit_length() - 1) - 1)
    return self._narrow(state, b, -2 << _lowest(self._may(state, a)))

  def _left_of(self, state, a, b):
    new = self._ordered(state, a, b)
    if new != state and (self.placed[a] or self.placed[b]):
      other = b if self.placed[a] else a
      may = self._may(new, other)
      if not may & (may - 1):
        return new, (other, may.bit_length() - 1)
    return new, None

  def _in_between(self, state, a, b, c):
    for _ in range(2):
      state = self._ordered(self._ordered(state, a, b), b, c)
    return state, None

  def _ends(self, state, a):
    row, last = a // self.houses, self.houses - 1
    if self.has(row, 0) or self.has(row, last):
      return state, (a, last if self.has(row, 0) else 0)
    return self._narrow(state, a, 1 | 1 << last), None


def _lowest(bits: int) -> int:
  return (bits & -bits).bit_length() - 1


def solve(clues: list[Clue], houses: int, attributes: int) -> Solver:
  """Solve from scratch as far as the rules go."""
  solver = Solver(houses, attributes, clues)
  solver.solve()
  return solver


def any_table(clues: list[Clue], houses: int, attributes: int, most: int = 300):
  """Search for a table that fits the clues, by trial and propagation.

  Returns:
    the table, or None when there is none.

  Raises:
    TimeoutError: neither was found within `most` trials.
  """
  trials = itertools.count(1)
  refs = [(row, value) for row in range(1, attributes + 1) for value in range(houses)]

  def narrowed(may):
    """Drop the houses that some clue, or another value of the row, excludes, until none is left to drop."""
    while True:
      before = dict(may)
      for kind, names in clues:
        fits = [at for at in itertools.product(*map(may.get, names)) if consistent(names, at, kind)]
        for i, ref in enumerate(names):
          may[ref] = {at[i] for at in fits}
      for row, value in refs:
        if len(may[row, value]) == 1:
          for other in range(houses):
            if other != value:
              may[row, other] = may[row, other] - may[row, value]
      if not all(may.values()):
        return None
      if may == before:
        return may

  def consistent(names, at, kind):
    pairs = itertools.combinations(zip(names, at, strict=True), 2)
    distinct = all((r == s) == (x == y) for (r, x), (s, y) in pairs if r[0] == s[0])
    return distinct and related(kind, at, houses)

  def search(may):
    if next(trials) > most:
      raise TimeoutError
    may = narrowed(may)
    if may is None:
      return None
    choices = [ref for ref in refs if len(may[ref]) > 1]
    if not choices:
      return may
    ref = min(choices, key=lambda r: len(may[r]))
    found = (search({**may, ref: {house}}) for house in sorted(may[ref]))
    return next((table for table in found if table is not None), None)

  start = {(0, house): {house} for house in range(houses)} | {ref: set(range(houses)) for ref in refs}
  found = search(start)
  if found is None:
    return None
  table = [[-1] * houses for _ in range(attributes + 1)]
  for (row, value), at in found.items():
    table[row][min(at)] = value
  return table


# --- the generator ----------------------------------------------------------------------------------------------------


class Drawing:
  """A table, and clues drawn true of it until the solver fills it."""

  def __init__(self, rng: np.random.Generator, houses: int, attributes: int):
    self.rng, self.houses, self.attributes = rng, houses, attributes
    self.table = [list(range(houses)), *(rng.permutation(houses).tolist() for _ in range(attributes))]
    self.solver = Solver(houses, attributes)
    self.clues, self.solving = [], False
    self.count = [0] * (attributes + 1)  # how often each row occurs in the clues
    self.draw = {kind: getattr(self, name) for kind, name in METHODS.items()}

  def finish(self) -> list[Clue]:
    """Draw clues until the solver fills the table; returns those that it then uses from scratch, some sides swapped."""
    seen = set()
    kinds, weights = list(WEIGHTS), list(WEIGHTS.values())
    while not self.solver.solved:
      kind = kinds[self._pick(weights)]
      cells = self.draw[kind]()  # (row, house)
      clue = Clue(kind, tuple((row, self.table[row][house]) for row, house in cells))
      if canonical(clue) in seen or all(map(self.solver.knows, clue.refs)):
        continue
      seen.add(canonical(clue))
      self.clues.append(clue)
      self.solver.add(clue)
      for row, _ in clue.refs:
        self.count[row] += 1
      if len(self.clues) >= FIRST_SOLVE:
        self.solving = True
        self.solver.solve()
    used = Solver(self.houses, self.attributes, self.clues).solve()
    return [self._swapped(clue) for i, clue in enumerate(self.clues) if i in used]

  def _swapped(self, clue: Clue) -> Clue:
    swap = clue.kind in SYMMETRIC and self.rng.random() < 0.25
    return Clue(clue.kind, clue.refs[::-1]) if swap else clue

  def _below(self, number: int) -> int:
    return int(self.rng.random() * number)

  def _pick(self, weights: list[float]) -> int:
    left = self.rng.random() * sum(weights)
    for i, weight in enumerate(weights):
      left -= weight
      if left < 0:
        return i
    return len(weights) - 1

  def _row(self) -> int:
    """A row; those that occur often in the clues are drawn less, house numbers least."""
    weights = [1 / (3 + count) for count in self.count]
    weights[0] /= 5
    return self._pick(weights)

  def _row_unless(self, refused) -> int:
    while refused(row := self._row()):
      pass
    return row

  def _entity(self) -> tuple[int, int]:
    """A cell (row, house): once the solver has run, of a row with few filled cells, and there rather a filled one."""
    if not self.solving:
      return self._row(), self._below(self.houses)
    row = self._pick([self.houses - self.solver.filled(row) + 1 for row in range(self.attributes + 1)])
    return row, self._pick([5 if self.solver.has(row, house) else 1 for house in range(self.houses)])

  def _entity_before_last(self) -> tuple[int, int]:
    while (cell := self._entity())[1] >= self.houses - 1:
      pass
    return cell

  def _equal(self):
    row, house = self._entity()
    return (row, house), (self._row_unless(lambda other: other == row), house)

  def _unequal(self):
    row, house = self._entity()
    other = self._row_unless(lambda other: other == row)
    return (row, house), (other, (house + 1 + self._below(self.houses - 1)) % self.houses)

  def _neighbours(self):
    row, house = self._entity()
    other = self._row_unless(lambda other: row == other == 0)
    near = [h for h in (house - 1, house + 1) if 0 <= h < self.houses]
    return (row, house), (other, near[self._below(len(near))])

  def _immediate_left(self):
    row, house = self._entity_before_last()
    return (row, house), (self._row_unless(lambda other: row == other == 0), house + 1)

  def _left_of(self):
    row, house = self._entity_before_last()
    other = self._below(self.attributes + 1)
    if row == other == 0:
      other = self._row_unless(lambda other: other == 0)
    return (row, house), (other, house + 1 + self._below(self.houses - 1 - house))

  def _in_between(self):
    while True:
      row, house = self._row(), self._below(self.houses)
      if house <= self.houses - 3:
        break
    right = self._row_unless(lambda other: other == 0), house + 2 + self._below(self.houses - 2 - house)
    middle = self._row_unless(lambda other: other == 0), house + 1 + self._below(right[1] - house - 1)
    return (row, house), middle, right

  def _ends(self):
    return ((self._row_unless(lambda row: row == 0), (0, self.houses - 1)[self._below(2)]),)


def relabel(rng: np.random.Generator, clues: list[Clue], houses: int, attributes: int) -> list[Clue]:
  """Give every attribute's values other names: as likely a puzzle, with another identity."""
  names = [list(range(houses)), *(rng.permutation(houses).tolist() for _ in range(attributes))]
  return [Clue(kind, tuple((row, names[row][value]) for row, value in refs)) for kind, refs in clues]


def make_puzzle(rng: np.random.Generator, houses: int, attributes: int, split: str | None = None) -> Puzzle | None:
  """Draw a puzzle, of a split if one is named.

  Returns:
    the puzzle, or None (rare: the clues do not solve from scratch, or no relabelling belongs to the split).
  """
  clues = Drawing(rng, houses, attributes).finish()
  for _ in range(300):
    if split in (None, split_of(clues, houses, attributes)):
      break
    clues = relabel(rng, clues, houses, attributes)
  else:
    return None
  solver = solve(clues, houses, attributes)
  return Puzzle(clues, solver.table(), solver.fills) if solver.solved else None
