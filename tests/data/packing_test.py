"""Tests of packing: against a simple implementation with lists, and with the row sizes of the star-graph configs."""

import collections
import fractions

import numpy as np
import pytest
from batch_helpers import assert_same_example, random_examples, unpack

from ilm_jax.configs import star as star_config
from ilm_jax.data import packing
from ilm_jax.tasks import star


def first_fit(sizes, shape):
  """First-fit decreasing with lists: return the row of each example, or -1 if no row has room for it."""
  rows = [[] for _ in range(shape.rows)]
  shares = [fractions.Fraction(a, shape.length) + fractions.Fraction(b, shape.targets) for a, b in sizes]
  for i in sorted(range(len(sizes)), key=lambda i: (-shares[i], i)):
    for row in rows:
      tokens, targets = (sum(sizes[j][k] for j in row) + sizes[i][k] for k in (0, 1))
      if tokens <= shape.length and targets <= shape.targets and len(row) < shape.segments:
        row.append(i)
        break
  return [next((r for r, row in enumerate(rows) if i in row), -1) for i in range(len(sizes))]


def random_shape(rng):
  return packing.Shape(*(int(rng.integers(1, high)) for high in (6, 30, 40, 5)))


def test_examples_are_assigned_to_rows_first_fit_decreasing_within_all_capacities():
  rng, left_out = np.random.default_rng(0), 0
  for _ in range(300):
    shape = random_shape(rng)
    sizes = [(int(rng.integers(1, 16)), int(rng.integers(0, 16))) for _ in range(rng.integers(0, 20))]
    rows = packing.assign_rows(sizes, shape)
    assert rows == first_fit(sizes, shape)
    for row, number in collections.Counter(row for row in rows if row >= 0).items():
      inside = [size for size, r in zip(sizes, rows, strict=True) if r == row]
      assert 0 <= row < shape.rows and number <= shape.segments
      assert sum(t for t, _ in inside) <= shape.length and sum(t for _, t in inside) <= shape.targets
    left_out += rows.count(-1)
  assert left_out > 100


def test_packed_examples_can_be_read_back_unchanged():
  rng, missing = np.random.default_rng(0), 0
  for _ in range(100):
    shape = random_shape(rng)
    examples = random_examples(rng, int(rng.integers(0, 15)))
    ids = (1_000 + rng.permutation(len(examples))).tolist()
    back = unpack(packing.pack(examples, ids, shape))
    rows = first_fit([(len(e['tokens']), len(e['target_token'])) for e in examples], shape)
    assert set(back) == {i for i, row in zip(ids, rows, strict=True) if row >= 0}
    for i, example in zip(ids, examples, strict=True):
      if i in back:
        assert_same_example(back[i], example)
    missing += len(examples) - len(back)
  assert missing > 50


def test_batch_arrays_have_the_shapes_that_their_names_state_and_the_documented_dtypes():
  batch = packing.pack(random_examples(np.random.default_rng(0), 5), list(range(5)), packing.Shape(3, 20, 30, 4))
  sizes = {'B': 3, 'L': 20, 'T': 30, 'S': 4}
  for name, value in batch.items():
    assert value.shape == tuple(sizes[letter] for letter in name.split('_')[-1].split('x'))
  kinds = {'open_BxL': bool} | dict.fromkeys(['segment_weight_BxS', 'target_weight_BxT', 'noise_BxS'], np.float32)
  assert {name: value.dtype for name, value in batch.items()} == {n: np.dtype(kinds.get(n, np.int32)) for n in batch}


# --- shipped configs --------------------------------------------------------------------------------------------------


def count_left_out(cfg, steps, pool):
  """Simulate `steps` training steps with random numbers of dropped tokens; count the examples that fit into no row."""
  source = star.Source(cfg.task, 'train')
  fixed = np.array([source[i]['fixed'].sum() for i in range(pool)])
  free = np.array([(~source[i]['fixed']).sum() for i in range(pool)])
  shape, rng, missing = packing.shape_of(cfg.data), np.random.default_rng(0), 0
  for _ in range(steps * cfg.data.groups):
    at = rng.integers(0, pool, cfg.data.batch_size // cfg.data.groups)
    dropped = rng.integers(0, free[at] + 1)
    sizes = list(zip((fixed[at] + free[at] - dropped).tolist(), dropped.tolist(), strict=True))
    missing += packing.assign_rows(sizes, shape).count(-1)
  return missing


@pytest.mark.parametrize('size', ['tiny', 'mini', 'easy', 'medium', 'hard'])
@pytest.mark.parametrize('steps', [200, pytest.param(10_000, marks=pytest.mark.long)])
def test_star_graph_configs_have_just_enough_rows_for_every_example(size, steps):
  cfg = star_config.get_config(size)
  shape = packing.shape_of(cfg.data)
  assert star.TASK.longest(cfg.task) <= shape.length and 2 * (cfg.task.max_length - 1) <= shape.targets
  assert count_left_out(cfg, steps, pool=min(4_000, 10 * steps)) == 0
  cfg.data.rows = cfg.data.rows * 3 // 4 // cfg.data.groups * cfg.data.groups
  assert count_left_out(cfg, 20, pool=500) > 0
