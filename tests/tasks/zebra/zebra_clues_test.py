"""Tests of zebra clues: their meaning, checked by enumeration, and the hash that identifies a puzzle."""

import collections
import itertools

import pytest
import zebra_samples

from ilm_jax.tasks.zebra.clues import Clue, identity, is_solution, is_true, split_of

MEANING = {  # kind of clue -> every combination of houses of its values (with four houses) that makes the clue true
  '=': [(0, 0), (1, 1), (2, 2), (3, 3)],
  '!=': [(a, b) for a in range(4) for b in range(4) if a - b],
  'nbr': [(0, 1), (1, 0), (1, 2), (2, 1), (2, 3), (3, 2)],
  'immediate-left': [(0, 1), (1, 2), (2, 3)],
  'left-of': [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)],
  'inbetween': [(0, 1, 2), (0, 1, 3), (0, 2, 3), (1, 2, 3)],  # houses of the left, middle and right value
  'ends': [(0,), (3,)],
}


@pytest.mark.parametrize('rows', [(1, 2, 3), (0, 2, 1)])  # table row of each value; row 0 holds the house numbers
@pytest.mark.parametrize('kind', MEANING)
def test_a_clue_is_true_for_exactly_the_listed_houses(kind, rows):
  table = [[0, 1, 2, 3], [2, 0, 3, 1], [1, 3, 2, 0], [3, 2, 0, 1]]
  found = [
    houses
    for houses in itertools.product(range(4), repeat=len(MEANING[kind][0]))
    if is_true(Clue(kind, tuple((row, table[row][house]) for row, house in zip(rows, houses, strict=False))), table)
  ]
  assert found == MEANING[kind]


def test_a_solution_has_a_permutation_in_each_row_and_satisfies_every_clue():
  table, clues = zebra_samples.TABLE, zebra_samples.CLUES
  assert is_solution(table, clues)
  assert not is_solution([[0, 1, 2], [0, 1, 2], *table[2:]], clues)
  assert not is_solution([[0, 1, 2], [0, 2, 2], *table[2:]], clues[1:2])


def test_different_puzzles_have_different_hashes():
  left, right = Clue('left-of', ((1, 0), (2, 0))), Clue('left-of', ((2, 0), (1, 0)))
  same = Clue('=', ((1, 0), (2, 0)))
  variants = [([left], 3, 3), ([right], 3, 3), ([left], 4, 3), ([left], 3, 4), ([same], 3, 3), ([left, same], 3, 3)]
  assert len({identity(*variant) for variant in variants}) == len(variants)


def test_five_percent_of_the_puzzles_belong_to_validation_and_five_percent_to_test():
  clues = [[Clue('=', ((1, a), (2, b))), Clue('!=', ((3, c), (d % 4, e)))]
           for a, b, c, d, e in itertools.product(range(6), repeat=5)]  # fmt: skip
  counts = collections.Counter(split_of(each, 6, 6) for each in clues[::2])
  for split, share in (('train', 0.9), ('validation', 0.05), ('test', 0.05)):
    assert abs(counts[split] / 3_888 - share) < 0.02
