"""The corruption of an example, against the worked example of the specification, loops and frequencies."""

import numpy as np
import pytest
from ml_collections import ConfigDict

from ilm_jax.families import corruption

OPEN, CLOSED = ConfigDict({'close_prompt': False}), ConfigDict({'close_prompt': True})
CLS, BOS = 1, 4


def example(fixed: str, tokens=None):
  """An example from a picture: `CpB....` has [CLS], a prompt token, [BOS] and four free tokens."""
  fixed_ = np.array([c != '.' for c in fixed])
  if tokens is None:
    tokens = [{'C': CLS, 'B': BOS}.get(c, 10 + i) for i, c in enumerate(fixed)]
  return {'tokens': np.array(tokens, np.int32), 'fixed': fixed_}


class Chosen:
  """A generator that drops chosen tokens: u decides how many, the permutation starts with them."""

  def __init__(self, *positions):
    self.positions = positions

  def permutation(self, free):
    return np.array([*self.positions, *(i for i in free if i not in self.positions)], int)


def drop(ex, *positions, cfg=OPEN):
  free = (~ex['fixed']).sum()
  return corruption.ilm(Chosen(*positions), ex, cfg, u=(len(positions) + 0.5) / (free + 1))


def many(ex, number=200, cfg=OPEN):
  return [corruption.ilm(np.random.default_rng(i), ex, cfg) for i in range(number)]


def test_the_worked_example_of_the_specification():
  a, b, c, d = 10, 11, 12, 13
  got = drop(example('CppB....', [CLS, 7, 8, BOS, a, b, c, d]), 5, 6)
  assert got['tokens'].tolist() == [CLS, 7, 8, BOS, a, d]
  assert got['target_gap'].tolist() == [4, 4] and got['target_token'].tolist() == [b, c]
  assert np.flatnonzero(got['open']).tolist() == [1, 2, 3, 4, 5]
  assert got['length'] == 8


def test_the_number_of_dropped_tokens_is_uniform_from_none_to_all():
  ex, number = example('CpB....'), 5_000
  counts = np.bincount([len(c['target_token']) for c in many(ex, number)], minlength=6)
  assert counts[5] == 0
  expected = number / 5
  assert np.square(counts[:5] - expected).sum() / expected < 20  # 4 degrees of freedom: one in 2,000


def test_the_dropped_tokens_are_a_uniform_subset():
  ex, number = example('CB....'), 8_000
  pairs = [tuple(c['target_token']) for c in many(ex, number) if len(c['target_token']) == 2]
  assert abs(len(pairs) - number / 5) < 4.5 * np.sqrt(number * 0.16)
  counts = np.array([pairs.count((12 + i, 12 + j)) for i in range(4) for j in range(i + 1, 4)])
  assert counts.sum() == len(pairs)
  expected = len(pairs) / 6
  assert np.square(counts - expected).sum() / expected < 22  # 5 degrees of freedom: one in 2,000


def test_fixed_tokens_are_never_dropped():
  ex = example('CppB..x..yy.')
  kept_always = ex['tokens'][ex['fixed']].tolist()
  for got in many(ex):
    assert [t for t in got['tokens'].tolist() if t in kept_always] == kept_always
    assert not set(got['target_token'].tolist()) & set(kept_always)


def test_a_dropped_token_belongs_to_the_nearest_kept_token_to_its_left():
  ex = example('CppB..x..yy.')  # all tokens differ
  order = ex['tokens'].tolist()
  for got in many(ex):
    kept, dropped = got['tokens'].tolist(), got['target_token'].tolist()
    assert len(got['target_gap']) == len(dropped)
    for gap, token in zip(got['target_gap'], dropped, strict=True):
      left = order.index(token) - 1
      while order[left] not in kept:
        left -= 1
      assert kept[gap] == order[left]


@pytest.mark.parametrize('fixed', ['CppB..x..yy.', 'CB.', 'CB', 'CB..........'])
def test_putting_the_dropped_tokens_back_gives_the_example(fixed):
  ex = example(fixed, np.random.default_rng(0).integers(0, 3, len(fixed)))  # many equal tokens
  for got in many(ex, 50):
    rows = [[token] for token in got['tokens'].tolist()]
    for gap, token in zip(got['target_gap'], got['target_token'].tolist(), strict=True):
      rows[gap].append(token)
    assert [token for row in rows for token in row] == ex['tokens'].tolist()
    assert got['length'] == len(ex['tokens']) == len(got['tokens']) + len(got['target_token'])
    assert len(got['open']) == len(got['tokens'])


def test_u_decides_the_number_and_equal_strata_drop_equally_often():
  ex = example('CB....')
  sizes = [len(corruption.ilm(np.random.default_rng(0), ex, OPEN, u=(i + 0.5) / 50)['target_token']) for i in range(50)]
  assert sizes == sorted(sizes) and np.bincount(sizes).tolist() == [10] * 5
  ends = [corruption.ilm(np.random.default_rng(0), ex, OPEN, u=u)['target_token'] for u in (0.0, np.nextafter(1, 0))]
  assert [len(tokens) for tokens in ends] == [0, 4]


def test_u_leaves_the_subset_to_the_generator():
  ex = example('CB........')
  subsets = {tuple(corruption.ilm(np.random.default_rng(i), ex, OPEN, u=0.5)['target_token']) for i in range(20)}
  assert len(subsets) > 5 and {len(s) for s in subsets} == {4}


def test_the_same_generator_gives_the_same_corruption():
  ex = example('CppB..x..yy.')
  for first, second in zip(many(ex, 20), many(ex, 20), strict=True):
    for name in first:
      np.testing.assert_array_equal(first[name], second[name])


def test_the_example_itself_is_left_alone():
  ex = example('CppB..x..yy.')
  before = {name: value.copy() for name, value in ex.items()}
  many(ex, 20)
  for name in ex:
    np.testing.assert_array_equal(ex[name], before[name])


def test_every_gap_but_that_of_cls_is_open_by_default():
  for got in many(example('CppB..x..yy.')):
    assert got['open'].tolist() == [False] + [True] * (len(got['tokens']) - 1)


def test_close_prompt_opens_exactly_the_gaps_beside_free_tokens():
  ex = example('CppB..x..yy.')
  # right of:  C p p B . . x . . y y .
  expected = [0, 0, 0, 1, 1, 1, 1, 1, 1, 0, 1, 1]
  assert corruption.open_gaps(ex['fixed']).tolist() == [bool(e) for e in expected]
  for got in many(ex, cfg=CLOSED):
    assert got['open'].tolist() == [bool(expected[ex['tokens'].tolist().index(t)]) for t in got['tokens']]
    assert got['open'][got['target_gap']].all(), 'a target may not lie in a closed gap'


def test_close_prompt_of_a_prompt_and_its_answer_leaves_the_last_prompt_token_open():
  got = drop(example('CpppB...'), 5, 6, 7, cfg=CLOSED)
  assert got['open'].tolist() == [False] * 4 + [True]


def test_a_fixed_token_at_the_end_closes_the_end():
  assert corruption.open_gaps(example('CB..x')['fixed']).tolist() == [False, True, True, True, False]


def test_cls_is_closed_even_with_a_free_token_beside_it():
  assert corruption.open_gaps(np.array([True, False, False])).tolist() == [False, True, True]


def test_arrays_have_the_types_that_packing_expects():
  for got in many(example('CB....'), 20):
    assert {name: got[name].dtype for name in ('tokens', 'target_gap', 'target_token', 'open')} == {
      'tokens': np.int32, 'target_gap': np.int32, 'target_token': np.int32, 'open': bool,
    }  # fmt: skip


# --- texts with gaps --------------------------------------------------------------------------------------------------


def test_stretches_are_one_to_three_with_others_between_them():
  free, numbers, shares = np.arange(30) >= 4, [], []
  for seed in range(600):
    chosen = corruption.stretches(np.random.default_rng(seed), free)
    assert not chosen[~free].any() and chosen.any()
    numbers.append(int((np.diff(chosen.astype(int), prepend=0) == 1).sum()))
    shares.append(chosen[free].mean())
  assert set(numbers) == {1, 2, 3} and min(numbers.count(n) for n in (1, 2, 3)) > 150
  assert 0.3 < np.mean(shares) < 0.6
  assert corruption.stretches(np.random.default_rng(0), np.array([False, True])).tolist() == [False, True]
  assert not corruption.stretches(np.random.default_rng(0), np.zeros(3, bool)).any()


def test_a_text_with_gaps_lets_tokens_come_only_there():
  ex = {'tokens': np.arange(100, 130, dtype=np.int32), 'fixed': np.arange(30) < 2}
  cfg, dropped = ConfigDict({'close_prompt': False, 'infill_rate': 1.0}), []
  for seed in range(200):
    made = corruption.ilm(np.random.default_rng(seed), ex, cfg)
    free = corruption.stretches(skip_one(np.random.default_rng(seed)), ~ex['fixed'])
    gone = np.setdiff1d(ex['tokens'], made['tokens'])
    assert set(made['target_token'].tolist()) == set(gone.tolist()) <= set(ex['tokens'][free].tolist())
    assert (made['length'], made['free']) == (30, free.sum())
    for place, token in enumerate(made['tokens'].tolist()):
      i = token - 100
      assert made['open'][place] == bool(i > 0 and (free[i] or (i < 29 and free[i + 1])))
    dropped.append(len(gone) / free.sum())
  assert min(dropped) == 0 and max(dropped) == 1 and 0.4 < np.mean(dropped) < 0.6


def skip_one(rng):
  """The generator after the draw that decides whether there are gaps."""
  rng.random()
  return rng


def test_a_share_of_the_examples_are_texts_with_gaps():
  ex = {'tokens': np.arange(100, 130, dtype=np.int32), 'fixed': np.arange(30) < 2}
  cfg = ConfigDict({'close_prompt': False, 'infill_rate': 0.3})
  some = [corruption.ilm(np.random.default_rng(seed), ex, cfg)['free'] < 28 for seed in range(1_000)]
  assert 0.25 < np.mean(some) < 0.35
