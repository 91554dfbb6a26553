"""Helpers for the tests of packing and of the input pipeline: make random corrupted examples, unpack a batch."""

import numpy as np


def random_examples(rng, number):
  """Return corrupted examples with random lengths and tokens."""
  out = []
  for _ in range(number):
    kept, dropped = int(rng.integers(1, 16)), int(rng.integers(0, 12))
    out.append({
      'tokens': rng.integers(1, 99, kept).astype(np.int32), 'open': rng.random(kept) < 0.5,
      'target_gap': np.sort(rng.integers(0, kept, dropped)).astype(np.int32),
      'target_token': rng.integers(1, 99, dropped).astype(np.int32), 'length': kept + dropped,
    })  # fmt: skip
  return out


def unpack(batch):
  """Extract the corrupted examples from a packed batch; return them by example id.

  Asserts that segments are contiguous and that everything outside of the segments is padding.
  """
  out = {}
  seen = {name: np.zeros(batch[name].shape, bool) for name in ('tokens_BxL', 'target_gap_BxT', 'cls_BxS')}
  for row, segment in np.argwhere(batch['example_id_BxS'] >= 0):
    inside = np.flatnonzero(batch['segment_BxL'][row] == segment + 1)
    mine = np.flatnonzero(batch['target_segment_BxT'][row] == segment + 1)
    start = batch['cls_BxS'][row, segment]
    assert inside.tolist() == list(range(start, start + len(inside))), 'a segment must be contiguous'
    assert batch['position_BxL'][row, inside].tolist() == list(range(len(inside)))
    assert batch['segment_weight_BxS'][row, segment] == 1
    seen['tokens_BxL'][row, inside] = seen['target_gap_BxT'][row, mine] = seen['cls_BxS'][row, segment] = True
    example_id = int(batch['example_id_BxS'][row, segment])
    assert example_id not in out
    out[example_id] = {
      'tokens': batch['tokens_BxL'][row, inside],
      'open': batch['open_BxL'][row, inside],
      'target_gap': batch['target_gap_BxT'][row, mine] - start,
      'target_token': batch['target_token_BxT'][row, mine],
    }
  for name, value in batch.items():
    axes = {'L': 'tokens_BxL', 'T': 'target_gap_BxT', 'S': 'cls_BxS'}[name[-1]]
    assert (value[~seen[axes]] == (-1 if name == 'example_id_BxS' else 0)).all(), (
      f'{name} must be padded with zeros (example ids with -1)'
    )
  return out


def assert_same_example(first, second):
  """Assert that two corrupted examples have equal values and dtypes in all fields of the first example."""
  assert first.keys() <= second.keys()
  for name in first:
    np.testing.assert_array_equal(first[name], second[name], err_msg=name)
    assert first[name].dtype == second[name].dtype, name
