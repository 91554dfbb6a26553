"""Tests of the input pipeline: permutations, batches as a function of (seed, step), worker processes, golden batch."""

import collections
import hashlib
import math
import multiprocessing.shared_memory
import os
import pathlib
import signal

import numpy as np
import pytest
from batch_helpers import assert_same_example, unpack
from ml_collections import ConfigDict
from text_helpers import refused

from ilm_jax.data import packing, pipeline, storage
from ilm_jax.families import corruption
from ilm_jax.tasks import star

CORRUPT = ConfigDict({'close_prompt': False})


# --- permutation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('size', [1, 2, 3, 7, 16, 17, 1000, 4096, 50_000])
def test_permute_is_a_bijection(size):
  out = pipeline.permute(np.arange(size), size, (0, 1))
  assert out.dtype == np.int64 and sorted(out.tolist()) == list(range(size))


def test_permute_maps_each_index_independently_and_does_not_modify_its_input():
  whole = pipeline.permute(np.arange(1000), 1000, (3,))
  part = np.random.default_rng(0).permutation(1000)[:100]
  before = part.copy()
  np.testing.assert_array_equal(pipeline.permute(part, 1000, (3,)), whole[part])
  np.testing.assert_array_equal(part, before)


def test_permute_works_for_ranges_too_large_for_an_array():
  size = 2**40 + 12_345
  out = pipeline.permute(np.arange(size - 2_000, size), size, (0,))
  assert len(set(out.tolist())) == 2_000 and out.min() >= 0 and out.max() < size
  assert np.abs(np.histogram(out, 10, (0, size))[0] - 200).max() < 80


def test_permutations_are_uniform_over_seeds_and_uncorrelated_between_seeds():
  number, size = 2_000, 7
  counts = np.zeros((size, size))
  for seed in range(number):
    counts[np.arange(size), pipeline.permute(np.arange(size), size, (seed, 5))] += 1
  expected = number / size
  assert np.abs(counts - expected).max() < 6 * math.sqrt(expected)
  big = [pipeline.permute(np.arange(1000), 1000, (seed,)) for seed in range(3)]
  for i, j in ((0, 1), (0, 2), (1, 2)):
    assert (big[i] == big[j]).mean() < 0.02
    assert abs(np.corrcoef(big[i], big[j])[0, 1]) < 0.15
  assert abs(np.corrcoef(big[0], np.arange(1000))[0, 1]) < 0.15


# --- training batches -------------------------------------------------------------------------------------------------


def star_task(num_train, **settings):
  return ConfigDict({
    'degree': 3, 'min_length': 3, 'max_length': 6, 'min_plan': 2, 'num_nodes': 20, 'seed': 0,
    'num_train': num_train, 'num_validation': 90, 'num_test': 90, **settings,
  })  # fmt: skip


def config(**data):
  data = {
    'batch_size': 16, 'groups': 4, 'rows': 8, 'row_length': 96, 'targets': 0, 'segments': 5, 'num_workers': 0,
    'prefetch': 2, **data,
  }  # fmt: skip
  return ConfigDict({'seed': 3, 'data': data, 'corrupt': CORRUPT.to_dict()})


SOURCE = star.Source(star_task(num_train=50), 'train')  # 50 is not a multiple of the 16 examples of a step


def make_batches(start, stop, *, cfg=None, source=SOURCE, corrupt=corruption.ilm, **part):
  """Return the training batches of steps `start` to `stop - 1`."""
  iterator = pipeline.train_batches(source, corrupt, cfg or config(), start=start, stop=stop, **part)
  try:
    return list(iterator)
  finally:
    if hasattr(iterator, 'close'):
      iterator.close()


def assert_equal_batches(first, second):
  assert len(first) == len(second) > 0
  for a, b in zip(first, second, strict=True):
    assert a.keys() == b.keys()
    for name in a:
      np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.fixture(scope='module')
def first_eight():
  return make_batches(0, 8)


def test_the_batch_of_a_step_does_not_depend_on_where_the_iterator_starts_or_stops(first_eight):
  for start, stop in ((5, 8), (0, 3)):
    assert_equal_batches(make_batches(start, stop), first_eight[start:stop])
  assert_equal_batches(make_batches(7, 8, source=star.Source(star_task(num_train=50), 'train')), first_eight[7:])
  assert make_batches(4, 4) == []


@pytest.mark.parametrize('processes', [2, 4])
def test_several_processes_together_read_the_same_rows_as_a_single_process(processes, first_eight):
  parts = [make_batches(2, 5, part=(process, processes)) for process in range(processes)]
  assert all(len(part[0]['tokens_BxL']) == 8 // processes for part in parts)
  assert_equal_batches([packing.concatenate(list(step)) for step in zip(*parts, strict=True)], first_eight[2:5])


def test_the_seed_changes_the_order_and_the_corruption_of_examples(first_eight):
  cfg = config()
  cfg.seed = 4
  other = make_batches(0, 1, cfg=cfg)[0]
  assert (other['tokens_BxL'] != first_eight[0]['tokens_BxL']).any()
  (one,) = make_batches(0, 1, cfg=cfg, source=star.Source(star_task(num_train=1), 'train'))
  (two,) = make_batches(0, 1, source=star.Source(star_task(num_train=1), 'train'))
  assert (one['target_token_BxT'] != two['target_token_BxT']).any()  # the same graph, corrupted differently


def test_each_epoch_has_a_new_permutation_and_each_example_its_own_random_generator(first_eight):
  back = {}
  for batch in first_eight:
    back |= unpack(batch)
  assert sorted(back) == list(range(128))  # 128 = 8 steps of 16 examples

  def graph_of(i):
    for graph in range(50):
      example = corruption.ilm(np.random.default_rng((3, 0, i)), SOURCE[graph], CORRUPT)
      if all(np.array_equal(back[i][name], example[name]) for name in back[i]):
        return graph
    raise AssertionError(f'no source graph gives example {i} when corrupted with random generator {i}')

  graphs = [graph_of(i) for i in range(128)]
  epochs = graphs[:50], graphs[50:100]
  assert all(sorted(epoch) == list(range(50)) for epoch in epochs) and len(set(graphs[100:])) == 28
  assert epochs[0] != epochs[1] and list(range(50)) not in epochs


def test_examples_of_an_endless_source_are_read_in_order():
  source = star.Source(star_task(num_train=0), 'train')
  back = unpack(make_batches(1_000_000, 1_000_001, source=source)[0])
  assert sorted(back) == list(range(16_000_000, 16_000_016))
  for i, got in back.items():
    assert_same_example(got, corruption.ilm(np.random.default_rng((3, 0, i)), source[i], CORRUPT))


def test_examples_that_fit_into_no_row_are_left_out_of_the_batch():
  cfg = config(rows=4, segments=1)
  (batch,) = make_batches(0, 1, cfg=cfg)
  ids = batch['example_id_BxS']
  assert (ids >= 0).sum() == 4 == batch['segment_weight_BxS'].sum()
  for group in range(4):  # each group has four examples, but only one row, which has room for one of them
    assert 4 * group <= ids[group, 0] < 4 * (group + 1)


# --- worker processes -------------------------------------------------------------------------------------------------


def count_jax_backends():
  from jax._src import xla_bridge

  return len(xla_bridge._backends)


def spying_corrupt(rng, example, cfg, u=None):
  """Apply the ILM corruption; write the number of JAX backends of this process to a file named after its id."""
  pathlib.Path(cfg.folder, str(os.getpid())).write_text(str(count_jax_backends()))
  return corruption.ilm(rng, example, cfg, u)


def test_worker_processes_make_the_same_batches_without_a_jax_backend(first_eight, tmp_path):
  cfg = config(num_workers=2)
  cfg.corrupt.folder = str(tmp_path)
  assert_equal_batches(make_batches(3, 8, cfg=cfg, corrupt=spying_corrupt), first_eight[3:])
  notes = {path.name: path.read_text() for path in tmp_path.iterdir()}
  assert len(notes) == 2 and str(os.getpid()) not in notes, 'two worker processes should have made the batches'
  assert set(notes.values()) == {'0'}

  import jax

  assert jax.devices() and count_jax_backends(), 'JAX has moved its list of backends: adapt count_jax_backends'


def test_without_enough_shared_memory_worker_processes_send_the_same_batches_through_pipes(
  first_eight, monkeypatch, caplog
):
  monkeypatch.setattr(storage, 'free_shared_memory', lambda *_: 0)
  monkeypatch.setattr(multiprocessing.shared_memory, 'SharedMemory', None)  # fails if this process reads shared memory
  assert_equal_batches(make_batches(6, 8, cfg=config(num_workers=1)), first_eight[6:])
  assert any('/dev/shm has 0 MB' in line and 'data.num_workers=1' in line for line in caplog.messages)


def dying_corrupt(rng, example, cfg, u=None):
  """Kill the process, as the system does if shared memory or memory runs out."""
  os.kill(os.getpid(), signal.SIGKILL)


def test_the_error_for_a_killed_worker_process_names_the_setting_num_workers():
  with refused('was killed', 'shared memory', 'data.num_workers'):
    make_batches(0, 1, cfg=config(num_workers=1), corrupt=dying_corrupt)


# --- invalid settings -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ('data', 'processes', 'words'),
  [
    ({'batch_size': 18}, 1, ['data.batch_size=18', 'data.groups=4', '16 or 20']),
    ({'batch_size': 3}, 1, ['data.batch_size=3', 'use data.batch_size=4']),
    ({'rows': 10}, 1, ['data.rows=10', 'data.groups=4', '8 or 12']),
    ({}, 3, ['data.groups=4', '3 processes', 'use data.groups=3']),
    ({'groups': 1}, 2, ['data.groups=1', '2 processes', 'use data.groups=2']),
    ({'groups': 8, 'rows': 16}, 5, ['data.groups=8', '5 processes', 'use data.groups=10']),
  ],
)
def test_errors_for_indivisible_settings_name_the_nearest_valid_value(data, processes, words):
  with refused(*words):
    make_batches(0, 1, cfg=config(**data), part=(0, processes))


# --- validation batches -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize('rows', [4, 8])  # 4 rows are too few for the 16 examples of a batch
def test_validation_batches_hold_each_example_once_with_the_same_corruption_for_every_seed(rows):
  source, cfg = star.Source(star_task(num_train=0), 'validation'), config(rows=rows)
  made = list(pipeline.validation_batches(source, corruption.ilm, cfg))
  other = config(rows=rows)
  other.seed = 99
  fresh = star.Source(star_task(num_train=0), 'validation')
  assert_equal_batches(made, list(pipeline.validation_batches(fresh, corruption.ilm, other)))
  assert {batch['tokens_BxL'].shape for batch in made} == {(rows, 96)}
  found = [unpack(batch) for batch in made]
  assert sorted(i for part in found for i in part) == list(range(90))
  assert sum(batch['segment_weight_BxS'].sum() for batch in made) == 90
  assert (len(made) > 6) == (rows == 4)
  for part in found:
    for i, got in part.items():
      tokens = [[token] for token in got['tokens'].tolist()]
      for gap, token in zip(got['target_gap'], got['target_token'].tolist(), strict=True):
        tokens[gap].append(token)
      assert [token for row in tokens for token in row] == source[i]['tokens'].tolist()


def test_validation_uses_every_number_of_dropped_tokens_equally_often():
  # All answers have 8 tokens, so 0 to 8 tokens can be dropped.
  task = star_task(num_train=0, degree=2, min_length=5, max_length=5, min_plan=0)
  source, seen = star.Source(task, 'validation'), collections.Counter()
  number_by_index = []
  for batch in pipeline.validation_batches(source, corruption.ilm, config()):
    back = unpack(batch)
    seen.update(len(got['target_token']) for got in back.values())
    number_by_index += [(i, len(got['target_token'])) for i, got in back.items()]
  assert seen == dict.fromkeys(range(9), 10)
  correlation = np.corrcoef(np.array(number_by_index).T)[0, 1]
  assert abs(correlation) < 0.3, 'the number of dropped tokens must not depend on the index of the example'


def test_a_validation_example_longer_than_a_row_is_refused():
  source = star.Source(star_task(num_train=0), 'validation')
  with refused('does not fit into an empty row', 'data.row_length=16'):
    list(pipeline.validation_batches(source, corruption.ilm, config(row_length=16)))


# --- golden batch -----------------------------------------------------------------------------------------------------

GOLDEN = {
  'tokens_BxL': '8de322ce9fe6f3fe',
  'segment_BxL': 'e9afaad7083cda16',
  'position_BxL': 'fa403a45decdf9b6',
  'open_BxL': 'a7730f53abd4cb52',
  'target_gap_BxT': '7005ade63a56c754',
  'target_token_BxT': '4f65790706681a3b',
  'target_segment_BxT': 'e26a969d22504c3c',
  'cls_BxS': 'ae1b5923e6af67ed',
  'segment_weight_BxS': 'f6d0f5c4e0cfadbd',
  'example_id_BxS': '8c5c3704f6fe7057',
  'free_BxS': '36398112f3fb79e4',
  'length_BxS': '96df4bb4aac9c63e',
  'noise_BxS': 'a6b915102b3d0efc',
  'target_weight_BxT': '8f2a05b359887a3d',
}

CHANGED = """
The batch of this (seed, step) has changed: runs started before the change would resume with different data, and the
results in docs/measured.md were measured with the old batches. If you changed the random generator, the order of random
draws or the packing policy on purpose, mention it in CHANGELOG.md and update the golden values in this file. Otherwise,
find out what changed the batch; a new NumPy version may generate different random numbers.
"""


def digest(array):
  return hashlib.sha256(repr((array.dtype.str, array.shape)).encode() + array.tobytes()).hexdigest()[:16]


def test_a_training_batch_equals_the_golden_batch(first_eight):
  batch = first_eight[3]  # the first epoch ends in this step
  assert batch['tokens_BxL'][0, :8].tolist() == [1, 8, 21, 7, 13, 13, 23, 23], CHANGED
  assert batch['target_gap_BxT'][0, :12].tolist() == [25, 25, 25, 26, 26, 50, 50, 50, 53, 53, 82, 82], CHANGED
  assert batch['example_id_BxS'][:2].tolist() == [[49, 50, 51, -1, -1], [48, -1, -1, -1, -1]], CHANGED
  assert {name: digest(value) for name, value in batch.items()} == GOLDEN, CHANGED
