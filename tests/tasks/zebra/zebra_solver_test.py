"""Tests of the zebra solver against a slow reimplementation with sets, and of the backtracking search find_table."""

import contextlib
import itertools

import numpy as np
import pytest
from zebra_samples import CLUES, TABLE, TEXT, all_tables, drawn

from ilm_jax.tasks.zebra.clues import NUM_REFERENCES, Clue, from_words, is_solution, is_true, is_true_of_houses
from ilm_jax.tasks.zebra.solver import Contradiction, Solver, find_table, solve


def slow_solve(clues, houses, attributes):
  """Reimplement `Solver` with sets, without caching failed attempts; return (cells in filling order, used clues)."""
  where = {(0, house): house for house in range(houses)}  # (row of the table, value) -> its house, if known
  filled, used, open_clues = [], set(), list(range(len(clues)))
  rows = range(1, attributes + 1)

  def open_refs(row):
    return [(row, value) for value in range(houses) if (row, value) not in where]

  def filled_houses(row):
    return {where[ref] for ref in where if ref[0] == row}

  def eliminate(may):
    for row in rows:
      for house in sorted(set(range(houses)) - filled_houses(row)):
        fits = [ref for ref in open_refs(row) if house in may[ref]]
        if len(fits) == 1:
          return fits[0], house
      for ref in open_refs(row):
        if len(may[ref]) == 1:
          return ref, min(may[ref])
    return None

  def apply(clue, may):
    """Apply a clue to `may`, the possible houses of each (row, value); return the cell that it determines, or None."""
    kind, refs = clue
    if kind == 'ends':
      for end, opposite in ((0, houses - 1), (houses - 1, 0)):
        if end in filled_houses(refs[0][0]):
          return refs[0], opposite
      may[refs[0]] = may[refs[0]] & {0, houses - 1}
      return None
    one_known = len(refs) == 2 and any(ref in where for ref in refs)
    if kind == '!=' and not one_known:
      return None
    before = dict(may)
    relation = 'left-of' if kind == 'inbetween' else kind
    for _ in range(2):
      for a, b in itertools.pairwise(refs):
        may[a] = {x for x in may[a] if any(is_true_of_houses(relation, (x, y), houses) for y in may[b])}
        may[b] = {y for y in may[b] if any(is_true_of_houses(relation, (x, y), houses) for x in may[a])}
    if one_known and kind != '!=':
      other = refs[1] if refs[0] in where else refs[0]
      if kind in ('=', 'immediate-left') or (may[other] != before[other] and len(may[other]) == 1):
        return other, min(may[other])
    return None

  def attempt(sequence):
    may = {ref: {where[ref]} for ref in where}
    may |= {ref: set(range(houses)) - filled_houses(row) for row in rows for ref in open_refs(row)}
    for index in sequence:
      if cell := apply(clues[index], may) or eliminate(may):
        return cell
    return None

  def fill(ref, house):
    where[ref] = house
    filled.append((ref[0] - 1, house, ref[1]))

  while len(filled) < houses * attributes:
    sequences = itertools.chain(*(itertools.permutations(open_clues, length) for length in (1, 2, 3)))
    found = next(((sequence, cell) for sequence in sequences if (cell := attempt(sequence))), None)
    if found is None:
      break
    used |= set(found[0])
    fill(*found[1])
    for row in rows:
      if len(open_refs(row)) == 1:
        fill(open_refs(row)[0], *(set(range(houses)) - filled_houses(row)))
    open_clues = [i for i in open_clues if not all(ref in where for ref in clues[i].refs)]
  return filled, used


@pytest.mark.parametrize('size', [(3, 3), (3, 4), (4, 4), (5, 3)])
def test_the_solver_agrees_with_the_slow_reimplementation(size):
  for _, clues, kept in drawn(6, *size):
    # The last two sets of clues are incomplete and often do not determine the whole table.
    for given in (clues, kept[::-1], kept[:-1], clues[: len(clues) // 2]):
      solver = Solver(*size, given)
      used = solver.solve()
      assert (solver.filled_cells, used) == slow_solve(given, *size)


def test_the_solver_agrees_with_the_slow_reimplementation_without_equality_and_inequality_clues():
  """Without = and != clues, most clues only narrow the candidates; few of these random puzzles can be solved."""
  houses, rng = 6, np.random.default_rng(11)
  kinds = ['nbr', 'ends', 'immediate-left', 'left-of', 'inbetween']
  num_filled = 0
  for _ in range(40):
    table = [list(range(houses)), *(rng.permutation(houses).tolist() for _ in range(2))]
    clues = []
    while len(clues) < 8:
      kind = kinds[rng.integers(len(kinds))]
      refs = [(int(rng.integers(3)), int(rng.integers(houses))) for _ in range(NUM_REFERENCES[kind])]
      if len(set(refs)) == len(refs) and any(row for row, _ in refs) and (kind != 'ends' or refs[0][0]):
        clue = Clue(kind, tuple(refs))
        clues += [clue] * is_true(clue, table)
    solver = Solver(houses, 2, clues)
    used = solver.solve()
    assert (solver.filled_cells, used) == slow_solve(clues, houses, 2)
    num_filled += len(solver.filled_cells)
  assert num_filled > 40


def test_clues_can_be_added_between_calls_of_solve():
  for table, clues, _ in drawn(20, 4, 4):
    solver = Solver(4, 4)
    for clue in clues:
      solver.add(clue)
      solver.solve()
      assert all(table[a + 1][house] == value for a, house, value in solver.filled_cells)
    assert solver.solved and solver.table() == table


def test_the_solver_fills_a_puzzle_of_shah_et_al_in_the_order_of_their_solver():
  words = TEXT.split()
  answer_start = words.index('ANSWER') + 1
  assert from_words(words[: answer_start - 1]) == CLUES
  solver = solve(CLUES, 3, 3)
  assert solver.table() == TABLE
  assert [number for cell in solver.filled_cells for number in cell] == list(map(int, words[answer_start:]))


@pytest.mark.parametrize(
  'clues',
  [
    [Clue('=', ((0, 0), (1, 0))), Clue('=', ((0, 1), (1, 0)))],
    [Clue('=', ((1, 0), (1, 1)))],
    [Clue('immediate-left', ((0, 2), (1, 0)))],
    [Clue('left-of', ((1, 0), (2, 0))), Clue('left-of', ((2, 0), (1, 0)))],
    [Clue('ends', ((1, value),)) for value in range(3)],
    [Clue('nbr', ((0, 0), (1, 0))), Clue('ends', ((1, 0),))],
  ],
)
def test_no_table_is_found_for_contradictory_clues(clues):
  assert not any(is_solution(table, clues) for table in all_tables(3, 2))
  assert find_table(clues, 3, 2) is None
  with contextlib.suppress(Contradiction):
    assert not is_solution(solve(clues, 3, 2).table(), clues)


def test_find_table_returns_a_solution_if_there_is_one():
  rng = np.random.default_rng(3)
  for _, clues, _ in drawn(6, 3, 3):
    for number in (1, 2, 4):
      some = [clues[i] for i in rng.permutation(len(clues))[:number]]
      assert is_solution(find_table(some, 3, 3), some)


def test_find_table_gives_up_after_visiting_max_nodes_search_nodes():
  with pytest.raises(TimeoutError):
    find_table([Clue('!=', ((1, 0), (2, 0)))], 3, 3, max_nodes=1)
