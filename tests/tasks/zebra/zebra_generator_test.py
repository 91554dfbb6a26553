"""Tests of the zebra puzzle generator: each puzzle has one solution, and random draws have the intended frequencies."""

import collections

import numpy as np
from zebra_samples import all_tables, drawn, puzzles

from ilm_jax.tasks.zebra.clues import Clue, canonical, is_solution, to_words
from ilm_jax.tasks.zebra.generator import WEIGHTS, ClueGenerator, make_puzzle, relabel
from ilm_jax.tasks.zebra.solver import Solver, solve


def test_a_generated_puzzle_has_distinct_true_clues_and_an_answer_with_every_cell_of_its_table():
  for puzzle in puzzles():
    assert is_solution(puzzle.table, puzzle.clues)
    assert len(set(map(canonical, puzzle.clues))) == len(puzzle.clues)
    cells = [(a, h, v) for a, row in enumerate(puzzle.table[1:]) for h, v in enumerate(row)]
    assert sorted(puzzle.cells) == cells


def test_a_generated_puzzle_has_exactly_one_solution():
  for seed in range(25):
    puzzle = make_puzzle(np.random.default_rng(seed), 3, 3)
    assert [table for table in all_tables(3, 3) if is_solution(table, puzzle.clues)] == [puzzle.table]


def test_the_generator_returns_only_the_clues_that_the_solver_uses_in_the_order_drawn():
  for _, clues, kept in drawn(12, 4, 4):
    used = Solver(4, 4, clues).solve()
    assert list(map(canonical, kept)) == [canonical(clues[i]) for i in sorted(used)]


def test_the_generator_stops_at_the_first_clue_that_makes_the_puzzle_solvable():
  """The solver first runs after five clues; if more were drawn, the puzzle is unsolvable without the last clue."""
  lengths = set()
  for _, clues, _ in drawn(40, 3, 3):
    lengths.add(len(clues))
    assert len(clues) == 5 or not solve(clues[:-1], 3, 3).solved
  assert min(lengths) == 5


def test_numbers_of_clues_match_an_independent_implementation():
  """Compare the mean numbers of clues and of tokens for two sizes, and the most and the least frequent kind of clue."""
  kinds = collections.Counter()
  for size, num_clues, num_tokens in (((3, 3), 5.3, 80.5), ((4, 4), 11.1, 158.5)):
    some = [make_puzzle(np.random.default_rng((5, i)), *size) for i in range(150)]
    assert abs(np.mean([len(p.clues) for p in some]) - num_clues) < 0.35
    assert abs(np.mean([len(to_words(p.clues)) + 1 + 3 * len(p.cells) for p in some]) - num_tokens) < 3
    kinds.update(clue.kind for puzzle in some for clue in puzzle.clues)
  order = [kind for kind, _ in kinds.most_common()]
  assert order[0] == '=' and order[-1] == '!=' and set(order) == set(WEIGHTS)


def test_the_two_sides_of_a_symmetric_clue_are_swapped_with_probability_one_quarter():
  generator = ClueGenerator(np.random.default_rng(0), 3, 3)
  for kind in WEIGHTS:
    clue = Clue(kind, ((1, 0), (2, 1))[: 1 if kind == 'ends' else 2])
    num_swapped = sum(generator._maybe_swap(clue) != clue for _ in range(2_000))
    if kind in ('=', '!=', 'nbr'):
      assert abs(num_swapped - 500) < 80
    else:
      assert num_swapped == 0


def test_rows_and_cells_are_drawn_in_proportion_to_their_weights():
  generator = ClueGenerator(np.random.default_rng(0), 4, 2)
  generator.row_counts = [0, 2, 7]
  rows = collections.Counter(generator._row() for _ in range(12_000))
  weights = np.array([1 / 3 / 5, 1 / 5, 1 / 10])
  np.testing.assert_allclose([rows[row] / 12_000 for row in range(3)], weights / weights.sum(), rtol=0, atol=0.02)
  # Row 0 of the table is full (weight 1), row 1 has one filled cell, in house 0 (weight 4), row 2 is empty (weight 5).
  generator.guided = True
  generator.solver.add(Clue('=', ((0, 0), (1, 3))))
  generator.solver.solve()
  cells = collections.Counter(generator._cell() for _ in range(12_000))
  row_shares = [sum(n for (r, _), n in cells.items() if r == row) / 12_000 for row in range(3)]
  np.testing.assert_allclose(row_shares, [0.1, 0.4, 0.5], rtol=0, atol=0.02)
  house_shares = [cells[1, house] / 4_800 for house in range(4)]
  np.testing.assert_allclose(house_shares, [5 / 8, 1 / 8, 1 / 8, 1 / 8], rtol=0, atol=0.03)


def test_clues_with_renamed_values_still_have_exactly_one_solution():
  rng = np.random.default_rng(2)
  for _, _, kept in drawn(6, 3, 3):
    other = relabel(rng, kept, 3, 3)
    assert [c.kind for c in other] == [c.kind for c in kept]
    assert sum(is_solution(table, other) for table in all_tables(3, 3)) == 1
