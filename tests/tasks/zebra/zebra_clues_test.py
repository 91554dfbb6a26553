"""Tests of the clues of zebra puzzles: their meaning, checked by enumeration, and the identity of a puzzle."""

import collections
import itertools

import pytest
import zebra_samples

from ilm_jax.tasks.zebra.clues import Clue, identity, is_solution, is_true, split_of

PAIRS = list(itertools.product(range(4), repeat=2))
MEANING = {  # kind -> the pairs of houses for which a clue is true
  '=': [(0, 0), (1, 1), (2, 2), (3, 3)],
  '!=': [(a, b) for a, b in PAIRS if a - b],
  'nbr': [(0, 1), (1, 0), (1, 2), (2, 1), (2, 3), (3, 2)],
  'immediate-left': [(0, 1), (1, 2), (2, 3)],
  'left-of': [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)],
}


@pytest.mark.parametrize('kind', MEANING)
def test_a_clue_of_two_references_is_true_of_the_listed_houses(kind):
  table = [[0, 1, 2, 3], [2, 0, 3, 1], [1, 3, 2, 0]]
  two_values = [(a, b) for a, b in PAIRS if is_true(Clue(kind, ((1, table[1][a]), (2, table[2][b]))), table)]
  house_and_value = [(a, b) for a, b in PAIRS if is_true(Clue(kind, ((0, a), (2, table[2][b]))), table)]
  assert two_values == house_and_value == MEANING[kind]


def test_inbetween_lists_the_left_the_middle_and_the_right_house():
  table = [[0, 1, 2, 3], [2, 0, 3, 1]]
  houses = [
    at
    for at in itertools.product(range(4), repeat=3)
    if is_true(Clue('inbetween', tuple((1, table[1][house]) for house in at)), table)
  ]
  assert houses == [(0, 1, 2), (0, 1, 3), (0, 2, 3), (1, 2, 3)]


def test_ends_is_true_of_the_first_and_the_last_house():
  table = [[0, 1, 2, 3], [2, 0, 3, 1]]
  assert [is_true(Clue('ends', ((1, value),)), table) for value in range(4)] == [False, True, True, False]


def test_a_solution_has_permutations_in_its_rows_and_satisfies_every_clue():
  table, clues = zebra_samples.TABLE, zebra_samples.CLUES
  assert is_solution(table, clues)
  assert not is_solution([[0, 1, 2], [0, 1, 2], *table[2:]], clues)
  assert not is_solution([[0, 1, 2], [0, 2, 2], *table[2:]], clues[1:2])


def test_different_puzzles_have_different_identities():
  left, right = Clue('left-of', ((1, 0), (2, 0))), Clue('left-of', ((2, 0), (1, 0)))
  same = Clue('=', ((1, 0), (2, 0)))
  variants = [([left], 3, 3), ([right], 3, 3), ([left], 4, 3), ([left], 3, 4), ([same], 3, 3), ([left, same], 3, 3)]
  assert len({identity(*variant) for variant in variants}) == len(variants)


def test_validation_and_test_are_five_percent_each():
  clues = [[Clue('=', ((1, a), (2, b))), Clue('!=', ((3, c), (d % 4, e)))]
           for a, b, c, d, e in itertools.product(range(6), repeat=5)]  # fmt: skip
  counts = collections.Counter(split_of(each, 6, 6) for each in clues[::2])
  for split, share in (('train', 0.9), ('validation', 0.05), ('test', 0.05)):
    assert abs(counts[split] / 3_888 - share) < 0.02
