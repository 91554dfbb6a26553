"""Corruption of examples for the insertion family, compared to a worked example, plain loops and frequencies."""

import numpy as np
import pytest
from ml_collections import ConfigDict

from ilm_jax.families import corruption

OPEN, CLOSED = ConfigDict({'close_prompt': False}), ConfigDict({'close_prompt': True})
CLS, BOS = 1, 4


def example(fixed: str, tokens=None):
  """Build an example from a pattern: `CpB....` is [CLS], a prompt token, [BOS] and four free tokens."""
  if tokens is None:
    tokens = [{'C': CLS, 'B': BOS}.get(c, 10 + i) for i, c in enumerate(fixed)]
  return {'tokens': np.array(tokens, np.int32), 'fixed': np.array([c != '.' for c in fixed])}


def many(ex, number=200, cfg=OPEN):
  return [corruption.ilm(np.random.default_rng(i), ex, cfg) for i in range(number)]


class ChosenPositions:
  """A stand-in for the random generator that makes `corruption.ilm` drop the tokens at the given positions."""

  def __init__(self, *positions):
    self.positions = positions

  def permutation(self, free):
    return np.array([*self.positions, *(i for i in free if i not in self.positions)], int)


def test_corruption_reproduces_the_worked_example_of_its_docstring():
  a, b, c, d = 10, 11, 12, 13
  ex = example('CppB....', [CLS, 7, 8, BOS, a, b, c, d])
  for cfg, open_ in ((OPEN, [1, 2, 3, 4, 5]), (CLOSED, [3, 4, 5])):
    got = corruption.ilm(ChosenPositions(5, 6), ex, cfg, u=2.5 / 5)  # this u drops two of the four free tokens
    assert got['tokens'].tolist() == [CLS, 7, 8, BOS, a, d]
    assert got['target_gap'].tolist() == [4, 4] and got['target_token'].tolist() == [b, c]
    assert np.flatnonzero(got['open']).tolist() == open_
    assert (got['length'], got['free']) == (8, 4)
    dtypes = {name: got[name].dtype for name in ('tokens', 'target_gap', 'target_token', 'open')}
    assert dtypes == {'tokens': np.int32, 'target_gap': np.int32, 'target_token': np.int32, 'open': bool}


def test_the_number_and_the_choice_of_dropped_tokens_are_uniformly_random():
  ex, number = example('CB....'), 8_000
  dropped = [tuple(c['target_token']) for c in many(ex, number)]
  counts = np.bincount([len(tokens) for tokens in dropped])
  expected = number / 5
  assert len(counts) == 5
  assert np.square(counts - expected).sum() / expected < 20  # chi-square with 4 degrees of freedom: p-value 1/2,000
  counts = np.array([dropped.count((12 + i, 12 + j)) for i in range(4) for j in range(i + 1, 4)])
  expected = counts.sum() / 6
  assert counts.sum() == sum(len(tokens) == 2 for tokens in dropped)
  assert np.square(counts - expected).sum() / expected < 22  # chi-square with 5 degrees of freedom: p-value 1/2,000


@pytest.mark.parametrize('fixed', ['CppB..x..yy.', 'CB.', 'CB'])
def test_fixed_tokens_are_never_dropped_and_inserting_the_targets_restores_the_example(fixed):
  for ex in (example(fixed), example(fixed, np.random.default_rng(0).integers(0, 3, len(fixed)))):
    for got in many(ex, 50):
      if ex['tokens'].max() >= 10:  # all tokens of this example differ, so a fixed one can be recognized
        assert set(got['tokens'].tolist()) >= set(ex['tokens'][ex['fixed']].tolist())
      pieces = [[token] for token in got['tokens'].tolist()]
      for gap, token in zip(got['target_gap'], got['target_token'].tolist(), strict=True):
        pieces[gap].append(token)
      assert [token for piece in pieces for token in piece] == ex['tokens'].tolist()
      assert got['length'] == len(ex['tokens']) == len(got['tokens']) + len(got['target_token'])
      assert got['open'].tolist() == [False] + [True] * (len(got['tokens']) - 1)


def test_the_argument_u_determines_how_many_tokens_are_dropped_but_not_which():
  ex = example('CB....')
  numbers = [
    len(corruption.ilm(np.random.default_rng(0), ex, OPEN, u=(i + 0.5) / 50)['target_token']) for i in range(50)
  ]
  assert numbers == sorted(numbers) and np.bincount(numbers).tolist() == [10] * 5
  ends = [corruption.ilm(np.random.default_rng(0), ex, OPEN, u=u)['target_token'] for u in (0.0, np.nextafter(1, 0))]
  assert [len(tokens) for tokens in ends] == [0, 4]
  subsets = {tuple(corruption.ilm(np.random.default_rng(i), ex, OPEN, u=0.5)['target_token']) for i in range(20)}
  assert len(subsets) > 3 and {len(s) for s in subsets} == {2}


@pytest.mark.parametrize(
  ('fixed', 'expected'),
  [
    ('CppB..x..yy.', '   oooooo oo'),
    ('CpppB...', '    oooo'),  # the gap right of the prompt's last token is open
    ('CB..x', ' ooo '),  # a fixed token at the end closes the last gap
    ('C..', ' oo'),  # the gap right of [CLS] is closed even if the next token is free
  ],
)
def test_with_close_prompt_exactly_the_gaps_beside_free_tokens_are_open(fixed, expected):
  ex, expected = example(fixed), [c == 'o' for c in expected]
  assert corruption.open_gaps(ex['fixed']).tolist() == expected
  for got in many(ex, 50, CLOSED):
    assert got['open'].tolist() == [expected[ex['tokens'].tolist().index(token)] for token in got['tokens']]
    if fixed != 'C..':
      assert got['open'][got['target_gap']].all(), 'a target lies in a closed gap'


# --- infilling examples -----------------------------------------------------------------------------------------------

INFILL = {'tokens': np.arange(100, 130, dtype=np.int32), 'fixed': np.arange(30) < 2}


def test_choose_spans_gives_one_to_three_disjoint_spans_of_tokens_outside_the_prompt():
  free, numbers, shares = np.arange(30) >= 4, [], []
  for seed in range(600):
    chosen = corruption.choose_spans(np.random.default_rng(seed), free)
    assert not chosen[~free].any() and chosen.any()
    numbers.append(int((np.diff(chosen.astype(int), prepend=0) == 1).sum()))
    shares.append(chosen[free].mean())
  assert set(numbers) == {1, 2, 3} and min(numbers.count(n) for n in (1, 2, 3)) > 150
  assert 0.3 < np.mean(shares) < 0.6
  assert corruption.choose_spans(np.random.default_rng(0), np.array([False, True])).tolist() == [False, True]
  assert not corruption.choose_spans(np.random.default_rng(0), np.zeros(3, bool)).any()


def test_infilling_examples_drop_tokens_only_inside_the_chosen_spans():
  cfg, dropped = ConfigDict({'close_prompt': False, 'infill_rate': 1.0}), []
  for seed in range(200):
    made = corruption.ilm(np.random.default_rng(seed), INFILL, cfg)
    rng = np.random.default_rng(seed)
    rng.random()  # skip the number that decides whether this is an infilling example
    free = corruption.choose_spans(rng, ~INFILL['fixed'])
    missing = np.setdiff1d(INFILL['tokens'], made['tokens'])
    assert set(made['target_token'].tolist()) == set(missing.tolist()) <= set(INFILL['tokens'][free].tolist())
    assert (made['length'], made['free']) == (30, free.sum())
    for position, token in enumerate(made['tokens'].tolist()):
      i = token - 100
      assert made['open'][position] == bool(i > 0 and (free[i] or (i < 29 and free[i + 1])))
    dropped.append(len(missing) / free.sum())
  assert min(dropped) == 0 and max(dropped) == 1 and 0.4 < np.mean(dropped) < 0.6


def test_infill_rate_is_the_fraction_of_infilling_examples():
  cfg = ConfigDict({'close_prompt': False, 'infill_rate': 0.3})
  assert 0.25 < np.mean([made['free'] < 28 for made in many(INFILL, 1_000, cfg)]) < 0.35
