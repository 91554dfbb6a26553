"""Zebra puzzle solvers: `Solver` combines up to three clues at a time, as people do; `find_table` uses backtracking."""

import itertools

import numpy as np

from ilm_jax.tasks.zebra.clues import Clue, is_true_of_houses

MAX_COMBINED_CLUES = 3  # maximum number of clues that the solver combines to fill one cell


class Contradiction(Exception):
  """The clues contradict each other: some value has no possible house, or some house has no possible value."""


class Solver:
  """Fills a table cell by cell, by combining up to three clues and eliminating candidates.

  The solver runs in polynomial time and fills a cell only if the clues imply its value, but it does not solve every
  puzzle that has a unique solution. New clues can be added after a call of `solve`. `filled_cells` lists the cells
  (attribute, house, value) in the order in which they were filled.

  The candidates of a reference (row, value) are the houses in which the value may still be. A *state* holds the
  candidates of all references in one integer: n bits for each reference, with reference r = row * n + value at bit r*n.
  A reference is *known* if its value has been placed in a house, otherwise it is *open*; an *open* house of a row is
  one whose cell is empty.

  To fill a cell, the solver starts from the state in which every open reference may be in every open house of its row,
  and applies a sequence of clues. If this determines a cell, the cell is filled, the narrowed candidates are discarded,
  and the search starts again from the new table. Sequences of one clue are tried first, then those of two, then of
  three, each in lexicographic order. `_tried` records which clues were applied to which state, so no sequence is tried
  twice on the same table. After a clue is added, only sequences that contain this clue are tried.
  """

  def __init__(self, houses: int, attributes: int, clues=()):
    self.houses, self.attributes = houses, attributes
    self.filled_cells = []
    # `_known` and `_house` are indexed by row * houses + value; row 0, the house numbers, is known from the start.
    self._known = [True] * houses + [False] * (houses * attributes)
    self._house = list(range(houses)) + [-1] * (houses * attributes)  # house of each value of each row; -1: unknown
    self._all_houses = (1 << houses) - 1  # bit mask of all houses
    self._open_houses = [0] + [self._all_houses] * attributes  # bit mask of the empty cells of each row
    self._clues = []  # (kind, references, rows) of every clue
    self._open_clues = 0  # bit mask of the clues that mention a value whose house is unknown
    self._reset_search()
    for clue in clues:
      self.add(clue)

  @property
  def solved(self) -> bool:
    """Whether all cells of the table are filled."""
    return len(self.filled_cells) == self.houses * self.attributes

  def is_known(self, ref: tuple[int, int]) -> bool:
    """Return whether it is known which house has this value; `ref` is a pair (row of the table, value)."""
    return self._known[ref[0] * self.houses + ref[1]]

  def num_filled(self, row: int) -> int:
    """Return the number of filled cells of a row."""
    return self.houses - self._open_houses[row].bit_count()

  def is_filled(self, row: int, house: int) -> bool:
    """Return whether the cell of this row and house is filled."""
    return not self._open_houses[row] >> house & 1

  def table(self) -> list[list[int]]:
    """Return the table, with -1 in empty cells."""
    out = [[-1] * self.houses for _ in range(self.attributes + 1)]
    for ref, house in enumerate(self._house):
      if house >= 0:
        out[ref // self.houses][house] = ref % self.houses
    return out

  def add(self, clue: Clue) -> None:
    """Add a clue; the next call of `solve` uses it."""
    refs = tuple(row * self.houses + value for row, value in clue.refs)
    if not all(self._known[ref] for ref in refs):
      self._open_clues |= 1 << len(self._clues)
    self._clues.append((clue.kind, refs, tuple(sorted({row for row, _ in clue.refs}))))

  def solve(self) -> set[int]:
    """Fill cells until the rules determine no further cell; return the indices of the clues that were used."""
    used = set()
    while not self.solved:
      attempts = (self._search(self._start_state, (), length) for length in range(1, MAX_COMBINED_CLUES + 1))
      if not (success := next(filter(None, attempts), None)):
        break
      used.update(success[0])
      self._commit(*success[1])
    return used

  def _search(self, state: int, applied: tuple[int, ...], length: int):
    """Return the first sequence of `length` more clues that determines a cell, and its (reference, house); else None.

    All shorter sequences have failed before, so sequences that start with a clue without effect need not be tried.
    """
    tried, children = self._tried.setdefault(state, [0, {}])
    applied_mask = sum(1 << i for i in applied)
    if length > 1:
      for index, child in sorted(children.items()):
        if not applied_mask >> index & 1 and (success := self._search(child, (*applied, index), length - 1)):
          return success
      return None
    untried = self._open_clues & ~tried & ~applied_mask
    while untried:
      index = _lowest(untried)
      untried &= untried - 1
      child, cell = self._apply(state, index)
      if cell is not None:
        return (*applied, index), cell
      self._tried[state][0] |= 1 << index
      if child != state:
        children[index] = child
    return None

  def _apply(self, state: int, index: int):
    """Apply a clue to a state; return the new state and the (reference, house) pair now determined, or None."""
    kind, refs, rows = self._clues[index]
    new, cell = self._apply_rule(state, kind, refs)
    if cell is None and new != state:
      bits_per_row = self.houses * self.houses
      for row in rows:
        row_changed = (new ^ state) >> row * bits_per_row & (1 << bits_per_row) - 1
        if row_changed and (cell := self._eliminate(new, row)):
          break
    if cell is not None and not (0 <= cell[1] < self.houses and self._candidates(new, cell[0]) >> cell[1] & 1):
      raise Contradiction
    return new, cell

  def _eliminate(self, state: int, row: int):
    """Return a cell of a row, as (reference, house), that the remaining candidates determine, or None.

    Prefers the first house with only one possible value, then the first value with only one possible house.
    """
    once = twice = 0  # bit masks of the houses that are candidates for at least one value, and for at least two
    single_candidate = None
    open_refs = [ref for ref in range(row * self.houses, (row + 1) * self.houses) if not self._known[ref]]
    for ref in open_refs:
      candidates = self._candidates(state, ref)
      twice |= once & candidates
      once |= candidates
      if single_candidate is None and not candidates & (candidates - 1):
        single_candidate = ref, candidates.bit_length() - 1
    if once != self._open_houses[row]:
      raise Contradiction
    if exactly_once := once & ~twice:
      house = _lowest(exactly_once)
      return next(ref for ref in open_refs if self._candidates(state, ref) >> house & 1), house
    return single_candidate

  def _commit(self, ref: int, house: int) -> None:
    """Fill a cell, and the last empty cell of each row that has only one; drop clues that mention filled cells only."""
    self._fill(ref, house)
    for row in range(1, self.attributes + 1):
      if self._open_houses[row].bit_count() == 1:
        last = next(r for r in range(row * self.houses, (row + 1) * self.houses) if not self._known[r])
        self._fill(last, self._open_houses[row].bit_length() - 1)
    for index, (_, refs, _) in enumerate(self._clues):
      if all(self._known[r] for r in refs):
        self._open_clues &= ~(1 << index)
    self._reset_search()

  def _fill(self, ref: int, house: int) -> None:
    row, value = divmod(ref, self.houses)
    self._known[ref], self._house[ref] = True, house
    self._open_houses[row] &= ~(1 << house)
    self.filled_cells.append((row - 1, house, value))

  def _reset_search(self) -> None:
    """Compute the start state of the current table: each unplaced value may be in every empty cell of its row."""
    masks = [
      1 << self._house[ref] if known else self._open_houses[ref // self.houses] for ref, known in enumerate(self._known)
    ]
    self._start_state = sum(mask << ref * self.houses for ref, mask in enumerate(masks))
    # {state: [bit mask of the clues that were tried and determined no cell, {clue that changed the state: new state}]}
    self._tried = {}

  def _candidates(self, state: int, ref: int) -> int:
    """Return the bit mask of the houses that a state leaves possible for the value numbered `ref`."""
    return state >> ref * self.houses & self._all_houses

  def _restrict(self, state: int, ref: int, allowed: int) -> int:
    """Limit the houses of the value numbered `ref` to a bit mask, unless it is placed; return the new state."""
    candidates = self._candidates(state, ref)
    if self._known[ref] or not candidates & ~allowed:
      return state
    if not candidates & allowed:
      raise Contradiction
    return state ^ (candidates & ~allowed) << ref * self.houses

  def _beside(self, houses: int) -> int:
    """Return the bit mask of the houses next to at least one of the given houses (a bit mask)."""
    return (houses << 1 | houses >> 1) & self._all_houses

  def _restrict_order(self, state: int, a: int, b: int) -> int:
    """Apply a < b: a must be left of the rightmost candidate of b, and b right of the leftmost candidate of a."""
    state = self._restrict(state, a, (1 << self._candidates(state, b).bit_length() - 1) - 1)
    return self._restrict(state, b, -2 << _lowest(self._candidates(state, a)))

  def _apply_rule(self, state: int, kind: str, refs: tuple[int, ...]):
    """Remove candidates that a clue excludes; return the new state and the (reference, house) now determined, or None.

    At least one reference has no known house. With two of them, one pass (restrict a by b, then b by a) removes all it
    can; `inbetween` needs two passes.
    """
    a, b = refs[0], refs[-1]
    a_known, b_known = self._known[a], self._known[b]
    if kind == 'ends':
      row, last = a // self.houses, self.houses - 1
      if self.is_filled(row, 0) or self.is_filled(row, last):
        return state, (a, last if self.is_filled(row, 0) else 0)
      return self._restrict(state, a, 1 | 1 << last), None
    if kind == 'inbetween':
      for left, right in (refs[:2], refs[1:]) * 2:
        state = self._restrict_order(state, left, right)
      return state, None
    if kind in ('=', 'immediate-left'):
      distance = int(kind == 'immediate-left')
      if a_known or b_known:
        return state, (b, self._house[a] + distance) if a_known else (a, self._house[b] - distance)
      state = self._restrict(state, a, self._candidates(state, b) >> distance)
      return self._restrict(state, b, self._candidates(state, a) << distance), None
    known, other = (a, b) if a_known else (b, a)
    if kind == '!=':
      return self._restrict(state, other, ~(1 << self._house[known])) if a_known or b_known else state, None
    if kind == 'nbr':
      new = self._restrict(state, a, self._beside(self._candidates(state, b)))
      new = self._restrict(new, b, self._beside(self._candidates(new, a)))
    else:
      new = self._restrict_order(state, a, b)
    candidates = self._candidates(new, other)
    if new == state or not (a_known or b_known) or candidates & (candidates - 1):
      return new, None
    return new, (other, candidates.bit_length() - 1)


def _lowest(bits: int) -> int:
  """Return the index of the lowest set bit of an integer."""
  return (bits & -bits).bit_length() - 1


def solve(clues: list[Clue], houses: int, attributes: int) -> Solver:
  """Return a solver that has filled all cells it can; raise Contradiction if it finds the clues contradictory."""
  solver = Solver(houses, attributes, clues)
  solver.solve()
  return solver


def find_table(clues: list[Clue], houses: int, attributes: int, max_nodes: int = 300) -> list[list[int]] | None:
  """Return a table that satisfies the clues, found by backtracking with constraint propagation; None if there is none.

  Raises TimeoutError if the search visited `max_nodes` nodes without finding an answer.
  """
  node_numbers = itertools.count(1)
  refs = [(row, value) for row in range(1, attributes + 1) for value in range(houses)]

  def propagate(candidates):
    """Remove candidate houses that a clue or another value of the row excludes, until nothing changes."""
    before = None
    while candidates != before and all(candidates.values()):
      before = dict(candidates)
      for kind, names in clues:
        fits = [at for at in itertools.product(*map(candidates.get, names)) if consistent(names, at, kind)]
        for i, ref in enumerate(names):
          candidates[ref] = {at[i] for at in fits}
      for row, value in refs:
        if len(candidates[row, value]) == 1:
          for other in {*range(houses)} - {value}:
            candidates[row, other] = candidates[row, other] - candidates[row, value]

  def consistent(names, at, kind):
    pairs = itertools.combinations(zip(names, at, strict=True), 2)
    distinct = all((r == s) == (x == y) for (r, x), (s, y) in pairs if r[0] == s[0])
    return distinct and is_true_of_houses(kind, at, houses)

  def search(candidates):
    if next(node_numbers) > max_nodes:
      raise TimeoutError
    propagate(candidates)
    if not all(candidates.values()):
      return None
    undecided = [ref for ref in refs if len(candidates[ref]) > 1]
    if not undecided:
      rows = ([min(candidates[row, value]) for value in range(houses)] for row in range(attributes + 1))
      return [np.argsort(houses_of_values).tolist() for houses_of_values in rows]
    ref = min(undecided, key=lambda r: len(candidates[r]))
    return next(filter(None, (search({**candidates, ref: {house}}) for house in sorted(candidates[ref]))), None)

  return search({(0, house): {house} for house in range(houses)} | {ref: set(range(houses)) for ref in refs})
