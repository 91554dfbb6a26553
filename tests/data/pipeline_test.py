"""Packing by a simulation with lists; batches as a function of (seed, step); the worker processes."""

import collections
import fractions
import hashlib
import importlib
import math
import os
import pathlib

import numpy as np
import pytest
from ml_collections import ConfigDict

from ilm_jax.data import pipeline
from ilm_jax.families import corruption
from ilm_jax.tasks import star
from ilm_jax.types import UserError

OPEN = ConfigDict({'close_prompt': False})


# --- the permutation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('size', [1, 2, 3, 4, 5, 6, 7, 8, 15, 16, 17, 100, 1000, 4096, 4097, 50_000])
def test_permute_is_a_bijection(size):
  out = pipeline.permute(np.arange(size), size, (0, 1))
  assert out.dtype == np.int64 and sorted(out.tolist()) == list(range(size))


def test_permute_works_on_any_part_and_in_any_order():
  whole = pipeline.permute(np.arange(1000), 1000, (3,))
  part = np.random.default_rng(0).permutation(1000)[:100]
  np.testing.assert_array_equal(pipeline.permute(part, 1000, (3,)), whole[part])
  index = np.arange(10)
  pipeline.permute(index, 1000, (3,))
  np.testing.assert_array_equal(index, np.arange(10))


def test_permute_reaches_numbers_that_no_array_holds():
  size = 2**40 + 12_345
  out = pipeline.permute(np.arange(size - 2_000, size), size, (0,))
  assert len(set(out.tolist())) == 2_000 and out.min() >= 0 and out.max() < size
  assert np.abs(np.histogram(out, 10, (0, size))[0] - 200).max() < 80


def test_other_seeds_permute_otherwise_and_evenly():
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


# --- packing ----------------------------------------------------------------------------------------------------------


def first_fit(sizes, shape):
  """The same policy with lists: the largest share of a row first, each into the first row with room."""
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
  return pipeline.Shape(*(int(rng.integers(1, high)) for high in (6, 30, 40, 5)))


def test_place_respects_every_capacity_and_leaves_out_only_what_has_no_room():
  rng, left_out = np.random.default_rng(0), 0
  for _ in range(300):
    shape = random_shape(rng)
    sizes = [(int(rng.integers(1, 16)), int(rng.integers(0, 16))) for _ in range(rng.integers(0, 20))]
    chosen = pipeline.place(sizes, shape)
    assert chosen == first_fit(sizes, shape)
    used = collections.Counter(row for row in chosen if row >= 0)
    for row, number in used.items():
      mine = [size for size, r in zip(sizes, chosen, strict=True) if r == row]
      assert 0 <= row < shape.rows and number <= shape.segments
      assert sum(t for t, _ in mine) <= shape.length and sum(t for _, t in mine) <= shape.targets
    left_out += chosen.count(-1)
  assert left_out > 100


def random_examples(rng, number):
  """Corrupted examples of random sizes and contents."""
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
  """{example id: corrupted example}, read entry by entry; everything outside of the segments must be padding."""
  out = {}
  seen = {name: np.zeros(batch[name].shape, bool) for name in ('tokens_BxL', 'target_gap_BxT', 'cls_BxS')}
  for row, segment in np.argwhere(batch['example_id_BxS'] >= 0):
    inside = np.flatnonzero(batch['segment_BxL'][row] == segment + 1)
    mine = np.flatnonzero(batch['target_segment_BxT'][row] == segment + 1)
    start = batch['cls_BxS'][row, segment]
    assert inside.tolist() == list(range(start, start + len(inside))), 'a segment is one stretch'
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
    assert (value[~seen[axes]] == (-1 if name == 'example_id_BxS' else 0)).all(), f'{name} is padded with zeros'
  return out


def assert_same(first, second):
  assert first.keys() <= second.keys()
  for name in first:
    np.testing.assert_array_equal(first[name], second[name], err_msg=name)
    assert first[name].dtype == second[name].dtype, name


def test_unpacking_gives_the_examples_back():
  rng, missing = np.random.default_rng(0), 0
  for _ in range(100):
    shape = random_shape(rng)
    examples = random_examples(rng, int(rng.integers(0, 15)))
    ids = (1_000 + rng.permutation(len(examples))).tolist()
    back = unpack(pipeline.pack(examples, ids, shape))
    chosen = first_fit([(len(e['tokens']), len(e['target_token'])) for e in examples], shape)
    assert set(back) == {i for i, row in zip(ids, chosen, strict=True) if row >= 0}
    for i, example in zip(ids, examples, strict=True):
      if i in back:
        assert_same(back[i], example)
    missing += len(examples) - len(back)
  assert missing > 50


def test_a_batch_has_the_shapes_and_types_of_the_legend():
  batch = pipeline.pack(random_examples(np.random.default_rng(0), 5), list(range(5)), pipeline.Shape(3, 20, 30, 4))
  sizes = {'B': 3, 'L': 20, 'T': 30, 'S': 4}
  for name, value in batch.items():
    assert value.shape == tuple(sizes[letter] for letter in name.split('_')[-1].split('x'))
  kinds = {'open_BxL': bool} | dict.fromkeys(['segment_weight_BxS', 'target_weight_BxT', 'noise_BxS'], np.float32)
  assert {name: value.dtype for name, value in batch.items()} == {n: np.dtype(kinds.get(n, np.int32)) for n in batch}


# --- batches of a step ------------------------------------------------------------------------------------------------


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
  return ConfigDict({'seed': 3, 'data': data, 'corrupt': {'close_prompt': False}})


SOURCE = star.Source(star_task(num_train=50), 'train')  # 16 a step: an epoch ends inside a step


def batches(start, stop, *, cfg=None, source=SOURCE, corrupt_fn=corruption.ilm, **hosts):
  made = pipeline.train_batches(source, corrupt_fn, cfg or config(), start=start, stop=stop, **hosts)
  try:
    return list(made)
  finally:
    if hasattr(made, 'close'):
      made.close()


def assert_equal(first, second):
  assert len(first) == len(second) > 0
  for a, b in zip(first, second, strict=True):
    assert a.keys() == b.keys()
    for name in a:
      np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.fixture(scope='module')
def first_eight():
  return batches(0, 8)


def test_a_run_that_starts_later_gets_the_same_batches(first_eight):
  assert_equal(batches(5, 8), first_eight[5:])
  assert_equal(batches(0, 1), first_eight[:1])
  assert_equal(batches(7, 8, source=star.Source(star_task(num_train=50), 'train')), first_eight[7:])


def test_the_last_step_of_a_run_does_not_change_its_batches(first_eight):
  assert_equal(batches(0, 3), first_eight[:3])
  assert batches(4, 4) == []


@pytest.mark.parametrize('hosts', [2, 4])
def test_the_rows_of_all_hosts_are_the_rows_of_one(hosts, first_eight):
  parts = [batches(2, 5, part=(host, hosts)) for host in range(hosts)]
  assert all(len(part[0]['tokens_BxL']) == 8 // hosts for part in parts)
  assert_equal([pipeline.concatenate(list(step)) for step in zip(*parts, strict=True)], first_eight[2:5])


def test_another_seed_draws_other_examples_and_other_corruptions(first_eight):
  cfg = config()
  cfg.seed = 4
  other = batches(0, 1, cfg=cfg)[0]
  assert (other['tokens_BxL'] != first_eight[0]['tokens_BxL']).any()
  (one,) = batches(0, 1, cfg=cfg, source=star.Source(star_task(num_train=1), 'train'))
  (two,) = batches(0, 1, source=star.Source(star_task(num_train=1), 'train'))
  assert (one['target_token_BxT'] != two['target_token_BxT']).any(), 'one graph only: the corruption differs'


def test_an_example_is_corrupted_by_its_own_generator(first_eight):
  """Read back from the rows of steps 0 to 7: examples 0 to 127, each as its own generator corrupts its graph."""
  back = {}
  for batch in first_eight:
    back |= unpack(batch)
  assert sorted(back) == list(range(128))
  for epoch in range(3):
    ids = range(50 * epoch, min(50 * (epoch + 1), 128))
    graphs = []
    for i in ids:
      for graph in range(50):
        example = corruption.ilm(np.random.default_rng((3, 0, i)), SOURCE[graph], OPEN)
        if all(np.array_equal(back[i][name], example[name]) for name in back[i]):
          graphs.append(graph)
          break
      else:
        raise AssertionError(f'example {i} comes from no graph')
    assert len(graphs) == len(set(graphs)), 'a graph comes once in an epoch'


class Numbers:
  """A source whose example i holds the number 10 + i."""

  endless = False

  def __init__(self, size):
    self.size = size

  def __len__(self):
    return self.size

  def __getitem__(self, index):
    return {'tokens': np.array([1, 4, 10 + index], np.int32), 'fixed': np.array([True, True, False])}


def keep_all(rng, example, cfg, u=None):
  return corruption.ilm(rng, example, cfg, u=0.0)


def test_every_epoch_is_another_permutation_of_the_source():
  made = batches(0, 9, cfg=config(batch_size=8), source=Numbers(18), corrupt_fn=keep_all)  # 72 = 4 x 18
  back = {}
  for batch in made:
    back |= unpack(batch)
  order = [int(back[i]['tokens'][2]) - 10 for i in range(72)]
  epochs = [order[18 * e : 18 * (e + 1)] for e in range(4)]
  assert all(sorted(epoch) == list(range(18)) for epoch in epochs)
  assert len(set(map(tuple, epochs))) == 4 and list(range(18)) not in epochs


def test_an_endless_source_is_read_in_order():
  source = star.Source(star_task(num_train=0), 'train')
  back = unpack(batches(1_000_000, 1_000_001, source=source)[0])
  assert sorted(back) == list(range(16_000_000, 16_000_016))
  for i, got in back.items():
    assert_same(got, corruption.ilm(np.random.default_rng((3, 0, i)), source[i], OPEN))


def test_what_does_not_fit_is_missing_from_the_ids():
  cfg = config(rows=4, segments=1)
  (batch,) = batches(0, 1, cfg=cfg)
  ids = batch['example_id_BxS']
  assert (ids >= 0).sum() == 4 == batch['segment_weight_BxS'].sum()
  for group in range(4):  # one row of each group, of its four examples
    assert 4 * group <= ids[group, 0] < 4 * (group + 1)


# --- worker processes -------------------------------------------------------------------------------------------------


def started_backends():
  from jax._src import xla_bridge

  return len(xla_bridge._backends)


def spying_corrupt(rng, example, cfg, u=None):
  """corrupt.ilm, leaving a note of this process and of the jax backends it has started."""
  pathlib.Path(cfg.folder, str(os.getpid())).write_text(str(started_backends()))
  return corruption.ilm(rng, example, cfg, u)


def test_worker_processes_make_the_same_batches_and_start_no_jax_backend(first_eight, tmp_path):
  cfg = config(num_workers=2)
  cfg.corrupt.folder = str(tmp_path)
  assert_equal(batches(3, 8, cfg=cfg, corrupt_fn=spying_corrupt), first_eight[3:])
  notes = {path.name: path.read_text() for path in tmp_path.iterdir()}
  assert len(notes) == 2 and str(os.getpid()) not in notes, 'the work was done elsewhere'
  assert set(notes.values()) == {'0'}

  import jax

  assert jax.devices() and started_backends(), 'jax keeps its backends elsewhere now: look there'


# --- settings that do not fit -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ('data', 'hosts', 'words'),
  [
    ({'batch_size': 18}, 1, ['data.batch_size=18', 'data.groups=4', '16 or 20']),
    ({'batch_size': 3}, 1, ['data.batch_size=3', 'use data.batch_size=4']),
    ({'rows': 10}, 1, ['data.rows=10', 'data.groups=4', '8 or 12']),
    ({}, 3, ['data.groups=4', '3 hosts', 'use data.groups=3']),
    ({'groups': 1}, 2, ['data.groups=1', '2 hosts', 'use data.groups=2']),
    ({'groups': 8, 'rows': 16}, 5, ['data.groups=8', '5 hosts', 'use data.groups=10']),
  ],
)
def test_what_does_not_divide_is_refused_in_one_line_with_the_nearest_that_fits(data, hosts, words):
  with pytest.raises(UserError) as error:
    batches(0, 1, cfg=config(**data), part=(0, hosts))
  assert '\n' not in str(error.value)
  for word in words:
    assert word in str(error.value)


# --- validation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('rows', [4, 8])  # 4: a batch's examples need several packed ones
def test_validation_holds_each_example_once_in_the_same_way_every_time(rows):
  source, cfg = star.Source(star_task(num_train=0), 'validation'), config(rows=rows)
  made = list(pipeline.validation_batches(source, corruption.ilm, cfg))
  other = config(rows=rows)
  other.seed = 99
  fresh = star.Source(star_task(num_train=0), 'validation')
  assert_equal(made, list(pipeline.validation_batches(fresh, corruption.ilm, other)))
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


def test_validation_drops_every_number_of_tokens_equally_often():
  task = star_task(num_train=0, degree=2, min_length=5, max_length=5, min_plan=0)  # answers of 8 tokens: 9 numbers
  source, seen = star.Source(task, 'validation'), collections.Counter()
  by_place = []
  for batch in pipeline.validation_batches(source, corruption.ilm, config()):
    back = unpack(batch)
    seen.update(len(got['target_token']) for got in back.values())
    by_place += [(i, len(got['target_token'])) for i, got in back.items()]
  assert seen == dict.fromkeys(range(9), 10)
  assert abs(np.corrcoef(np.array(by_place).T)[0, 1]) < 0.3, 'the number has nothing to do with the place'


def test_a_validation_example_that_fits_no_row_is_refused_in_one_line():
  source = star.Source(star_task(num_train=0), 'validation')
  with pytest.raises(UserError, match=r'row_length') as error:
    list(pipeline.validation_batches(source, corruption.ilm, config(row_length=16)))
  assert '\n' not in str(error.value)


# --- a golden batch ---------------------------------------------------------------------------------------------------

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
The batch of a (seed, step) is no longer what it was. A run that was started before this change and continues after it
does not give the weights it would have given, and the numbers of docs/measured.md are those of other batches. If that
is meant (another generator, another order of draws, another policy of packing), say so in CHANGELOG.md and put the new
values here; if it is not, something that should have no influence has one (numpy may have changed its draws).
"""


def digest(array):
  return hashlib.sha256(repr((array.dtype.str, array.shape)).encode() + array.tobytes()).hexdigest()[:16]


def test_the_batch_of_a_step_is_what_it_was(first_eight):
  batch = first_eight[3]  # the epoch ends in it
  assert batch['tokens_BxL'][0, :8].tolist() == [1, 8, 21, 7, 13, 13, 23, 23], CHANGED
  assert batch['target_gap_BxT'][0, :12].tolist() == [25, 25, 25, 26, 26, 50, 50, 50, 53, 53, 82, 82], CHANGED
  assert batch['example_id_BxS'][:2].tolist() == [[49, 50, 51, -1, -1], [48, -1, -1, -1, -1]], CHANGED
  assert {name: digest(value) for name, value in batch.items()} == GOLDEN, CHANGED


# --- the shipped configs ----------------------------------------------------------------------------------------------

SHIPPED = [('star', name) for name in ('tiny', 'mini', 'easy', 'medium', 'hard')]


def left_out(cfg, steps, pool=4_000):
  """Examples that found no room in `steps` steps, with sizes drawn as the corruption draws them."""
  task = importlib.import_module(f'ilm_jax.tasks.{cfg.task.name}')
  source = task.source(cfg.task, 'train')
  fixed = np.array([source[i]['fixed'].sum() for i in range(pool)])
  free = np.array([(~source[i]['fixed']).sum() for i in range(pool)])
  shape, rng, missing = pipeline.shape_of(cfg.data), np.random.default_rng(0), 0
  for _ in range(steps * cfg.data.groups):
    at = rng.integers(0, pool, cfg.data.batch_size // cfg.data.groups)
    dropped = rng.integers(0, free[at] + 1)
    sizes = list(zip((fixed[at] + free[at] - dropped).tolist(), dropped.tolist(), strict=True))
    missing += pipeline.place(sizes, shape).count(-1)
  return missing


@pytest.mark.parametrize(('file', 'argument'), SHIPPED)
@pytest.mark.parametrize('steps', [300, pytest.param(10_000, marks=pytest.mark.long)])
def test_shipped_configs_leave_nothing_out(file, argument, steps):
  assert left_out(importlib.import_module(f'configs.{file}').get_config(argument), steps) == 0


@pytest.mark.parametrize(('file', 'argument'), SHIPPED)
def test_the_simulation_would_notice_too_few_rows(file, argument):
  cfg = importlib.import_module(f'configs.{file}').get_config(argument)
  cfg.data.rows = cfg.data.rows * 3 // 4 // cfg.data.groups * cfg.data.groups
  assert left_out(cfg, 20, pool=500) > 0


@pytest.mark.parametrize(('file', 'argument'), SHIPPED)
def test_the_longest_example_fits_a_row_with_all_or_none_dropped(file, argument):
  cfg = importlib.import_module(f'configs.{file}').get_config(argument)
  shape, longest = pipeline.shape_of(cfg.data), star.longest(cfg.task)
  assert longest <= shape.length and 2 * (cfg.task.max_length - 1) <= shape.targets
