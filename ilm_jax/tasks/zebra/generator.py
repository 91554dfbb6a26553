"""A generator of random zebra puzzles: it draws a table, then true clues until the solver can fill the table."""

import numpy as np

from ilm_jax.tasks.zebra.clues import SYMMETRIC, Clue, Puzzle, canonical, split_of
from ilm_jax.tasks.zebra.solver import Solver, solve

# Relative frequency of each kind of clue. Reordering the kinds would change the puzzles that a seed generates.
WEIGHTS = {'=': 4, '!=': 1, 'nbr': 2, 'ends': 2, 'immediate-left': 2, 'left-of': 2, 'inbetween': 1}
CLUES_BEFORE_SOLVING = 5  # clues drawn before the solver is called for the first time
SWAP_PROBABILITY = 0.25  # probability that the two references of a symmetric clue are swapped
MAX_RELABELLINGS = 300  # maximum number of attempts to move a puzzle to the requested split by renaming its values


class ClueGenerator:
  """Draws a random table, and random clues that are true for the table."""

  def __init__(self, rng: np.random.Generator, houses: int, attributes: int):
    self.rng, self.houses, self.attributes = rng, houses, attributes
    self.table = [list(range(houses)), *(rng.permutation(houses).tolist() for _ in range(attributes))]
    self.clues = []  # all clues drawn so far, including those that the solver did not need
    self.solver = Solver(houses, attributes)  # receives each clue when it is drawn
    self.guided = False  # whether the solver has been called; from then on, clues favour rows with few filled cells
    self.row_counts = [0] * (attributes + 1)  # number of references to each row of the table in the clues

  def run(self) -> list[Clue]:
    """Draw clues until the solver fills the table; return those that a solver uses when it starts with all of them.

    The references of symmetric clues are swapped at random.
    """
    seen, kinds, weights = set(), list(WEIGHTS), list(WEIGHTS.values())
    while not self.solver.solved:
      kind = kinds[self._weighted_index(weights)]
      cells = self._draw(kind)  # (row, house) of each reference
      clue = Clue(kind, tuple((row, self.table[row][house]) for row, house in cells))
      if canonical(clue) in seen or all(map(self.solver.is_known, clue.refs)):
        continue
      seen.add(canonical(clue))
      self.clues.append(clue)
      self.solver.add(clue)
      for row, _ in clue.refs:
        self.row_counts[row] += 1
      if len(self.clues) >= CLUES_BEFORE_SOLVING:
        self.guided = True
        self.solver.solve()
    used = Solver(self.houses, self.attributes, self.clues).solve()
    return [self._maybe_swap(clue) for i, clue in enumerate(self.clues) if i in used]

  def _maybe_swap(self, clue: Clue) -> Clue:
    swap = clue.kind in SYMMETRIC and self.rng.random() < SWAP_PROBABILITY
    return Clue(clue.kind, clue.refs[::-1]) if swap else clue

  def _below(self, n: int) -> int:
    """Draw a uniform integer from 0 to n-1."""
    return int(self.rng.random() * n)

  def _weighted_index(self, weights: list[float]) -> int:
    """Draw an index with probability proportional to its weight."""
    remaining = self.rng.random() * sum(weights)
    for i, weight in enumerate(weights):
      remaining -= weight
      if remaining < 0:
        return i
    return len(weights) - 1

  def _row(self) -> int:
    """Draw a table row; row 0 (the house numbers) and rows that occur often in the clues are less likely."""
    weights = [1 / (3 + count) for count in self.row_counts]
    weights[0] /= 5
    return self._weighted_index(weights)

  def _attribute_row(self) -> int:
    """Draw a table row other than row 0."""
    while not (row := self._row()):
      pass
    return row

  def _cell(self) -> tuple[int, int]:
    """Draw a cell (row, house); once the solver has run, prefer rows with few filled cells, then filled cells."""
    if not self.guided:
      return self._row(), self._below(self.houses)
    row = self._weighted_index([self.houses - self.solver.num_filled(row) + 1 for row in range(self.attributes + 1)])
    return row, self._weighted_index([5 if self.solver.is_filled(row, house) else 1 for house in range(self.houses)])

  def _draw(self, kind: str) -> tuple[tuple[int, int], ...]:
    """Draw a true clue of this kind; return the cell (row, house) of each reference."""
    last = self.houses - 1
    if kind == 'ends':
      return ((self._attribute_row(), (0, last)[self._below(2)]),)
    if kind == 'inbetween':
      row, house = self._row(), self._below(self.houses)
      while house > last - 2:
        row, house = self._row(), self._below(self.houses)
      right = self._attribute_row(), house + 2 + self._below(last - 1 - house)
      middle = self._attribute_row(), house + 1 + self._below(right[1] - house - 1)
      return (row, house), middle, right
    row, house = self._cell()
    while kind in ('immediate-left', 'left-of') and house == last:
      row, house = self._cell()
    other_row = self._below(self.attributes + 1) if kind == 'left-of' else self._row()
    while other_row == row and (row == 0 or kind in ('=', '!=')):
      other_row = self._row()
    if kind == '=':
      other_house = house
    elif kind == '!=':
      other_house = (house + 1 + self._below(last)) % self.houses
    elif kind == 'nbr':
      neighbours = [h for h in (house - 1, house + 1) if 0 <= h <= last]
      other_house = neighbours[self._below(len(neighbours))]
    else:
      other_house = house + 1 + (self._below(last - house) if kind == 'left-of' else 0)
    return (row, house), (other_row, other_house)


def relabel(rng: np.random.Generator, clues: list[Clue], houses: int, attributes: int) -> list[Clue]:
  """Rename every attribute's values at random. The distribution of puzzles stays the same; the split may change."""
  new_values = [list(range(houses)), *(rng.permutation(houses).tolist() for _ in range(attributes))]
  return [Clue(kind, tuple((row, new_values[row][value]) for row, value in refs)) for kind, refs in clues]


def make_puzzle(rng: np.random.Generator, houses: int, attributes: int, split: str | None = None) -> Puzzle | None:
  """Draw a random puzzle that belongs to the given split (None: any split).

  Returns None, which is rare, if the solver fails on the selected clues or no relabelling belongs to the split.
  """
  clues = ClueGenerator(rng, houses, attributes).run()
  for _ in range(MAX_RELABELLINGS):
    if split in (None, split_of(clues, houses, attributes)):
      break
    clues = relabel(rng, clues, houses, attributes)
  else:
    return None
  solver = solve(clues, houses, attributes)
  return Puzzle(clues, solver.table(), solver.filled_cells) if solver.solved else None
