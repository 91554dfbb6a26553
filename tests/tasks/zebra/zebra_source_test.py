"""Tests of the zebra example source: puzzles generated on demand, cached on disk, or read from the released files."""

import os
import pathlib
import pickle
import subprocess
import sys
import time

import numpy as np
import pytest
from zebra_samples import all_tokens, assert_one_line, puzzles, task, to_record, write_records

from ilm_jax.data import builders
from ilm_jax.tasks.zebra import source as source_lib
from ilm_jax.tasks.zebra.clues import Clue, from_words, split_of
from ilm_jax.tasks.zebra.source import SPLITS, TOKENIZER, Recipe, Source, generate, max_tokens, to_ids
from ilm_jax.tasks.zebra.task import TASK
from ilm_jax.types import UserError

ROOT = pathlib.Path(__file__).parents[3]


# --- generated puzzles ------------------------------------------------------------------------------------------------


def test_puzzles_do_not_depend_on_the_order_of_access_or_on_num_train():
  first, second = (Source(task(), 'train') for _ in range(2))
  forwards = all_tokens(first)
  assert [second[i]['tokens'].tolist() for i in reversed(range(40))][::-1] == forwards == all_tokens(first)
  assert len(set(map(tuple, forwards))) == 40
  assert all_tokens(Source(task(num_train=5), 'train')) == forwards[:5], 'num_train must not change the puzzles'
  assert Source(task(seed=1), 'train')[0]['tokens'].tolist() != forwards[0]
  assert Source(task(), 'test')[0]['tokens'].tolist() != forwards[0]
  sizes = {first.puzzle(i).size for i in range(40)}
  assert sizes == {(3, 3), (3, 4), (4, 3), (4, 4)}


def test_training_puzzles_are_endless_if_num_train_is_zero():
  endless = Source(task(num_train=0), 'train')
  assert endless.endless and len(endless) > 10**12
  assert endless[2**40]['tokens'].tolist() == endless[2**40]['tokens'].tolist() != endless[2**40 + 1]['tokens'].tolist()
  assert not Source(task(), 'train').endless and len(Source(task(), 'test')) == 10


def test_the_split_of_a_puzzle_ignores_the_order_of_clues_and_swapped_sides_of_symmetric_clues():
  for split in SPLITS:
    source = Source(task(), split)
    for puzzle in map(source.puzzle, range(10)):
      reordered = [Clue(c.kind, c.refs[::-1]) if c.kind in ('=', '!=', 'nbr') else c for c in puzzle.clues[::-1]]
      assert split_of(puzzle.clues, *puzzle.size) == split_of(reordered, *puzzle.size) == split


@pytest.mark.parametrize('order', ['solver', 'sorted'])
def test_a_zebra_example_lists_the_clues_and_then_the_cells(order):
  source = Source(task(order=order), 'train')
  num_unsorted = 0
  for index in range(20):
    puzzle, example = source.puzzle(index), source[index]
    tokens, fixed = example['tokens'], example['fixed']
    assert tokens.dtype == np.int32 and fixed.dtype == bool and len(tokens) <= max_tokens(*puzzle.size)
    words = TOKENIZER.pieces(tokens)
    bos = words.index('[BOS]')
    assert words[0] == '[CLS]' and fixed.tolist() == [True] * (bos + 1) + [False] * (len(tokens) - bos - 1)
    assert from_words(words[1:bos]) == puzzle.clues
    cells = [tuple(map(int, words[i : i + 3])) for i in range(bos + 1, len(words), 3)]
    assert cells == (sorted(puzzle.cells) if order == 'sorted' else puzzle.cells)
    num_unsorted += cells != sorted(cells)
  assert (num_unsorted > 10) == (order == 'solver')


@pytest.mark.parametrize(
  'change',
  [{'min_houses': 2}, {'max_houses': 7}, {'min_attributes': 5}, {'max_attributes': 2}, {'order': 'random'},
   {'num_workers': -1}, {'num_train': 0, 'cache': 'somewhere'},
   {'path': '/nowhere'}, {'path': 'gss://b'}, {'path': 'gs://b'}, {'cache': 'gss://b'}, {'cache': __file__}],
)  # fmt: skip
def test_invalid_settings_of_the_zebra_task_are_refused_with_a_one_line_error(change):
  with pytest.raises(UserError) as error:
    Source(task(**change), 'train')
  assert_one_line(error, 'task.')


# --- worker processes and the cache -----------------------------------------------------------------------------------


def test_the_number_of_worker_processes_does_not_change_the_puzzles():
  recipe = Recipe.from_config(task(), 'validation')
  without, with_two = ([ids.tolist() for ids in generate(recipe, 9, num_workers)] for num_workers in (0, 2))
  assert without == with_two and len(without) == 9


def test_worker_processes_end_when_their_parent_is_killed():
  code = (
    'from ilm_jax.tasks.zebra.source import Recipe, generate\n'
    'import multiprocessing\n'
    'if __name__ == "__main__":\n'
    '  puzzles = generate(Recipe(0, "train", (3, 4), (3, 4)), 10**5, 1)\n'
    '  next(puzzles)\n'
    '  print(*(child.pid for child in multiprocessing.active_children()), flush=True)\n'
    '  input()\n'
  )
  with subprocess.Popen(
    [sys.executable, '-c', code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT
  ) as process:
    (child,) = map(int, process.stdout.readline().split())
    os.kill(child, 0)
    process.kill()
  deadline = time.monotonic() + 60
  with pytest.raises(ProcessLookupError):
    while time.monotonic() < deadline:
      os.kill(child, 0)
      time.sleep(0.05)


def test_cached_puzzles_equal_those_generated_on_demand(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  cfg = task(cache='data', num_test=25)
  cached = Source(cfg, 'test')
  expected = all_tokens(Source(task(num_test=25), 'test'))
  assert all_tokens(cached) == expected and len(cached) == 25
  assert all_tokens(pickle.loads(pickle.dumps(cached))) == expected
  monkeypatch.setattr(source_lib, 'generate_one', None)  # an existing cache must be read without generating puzzles
  assert all_tokens(Source(cfg, 'test')) == expected
  assert all_tokens(Source(task(cache='data', num_test=25, order='sorted'), 'test')) != expected


def test_the_cache_folder_name_contains_every_setting_that_changes_the_puzzles():
  cfg = task(seed=3)
  assert Recipe.from_config(cfg, 'test').folder_name(25) == 'zebra-3-4-3-4-seed3-test-25'
  changes = {'seed': 1}, {'min_houses': 4}, {'max_houses': 5}, {'min_attributes': 4}, {'max_attributes': 5}, {}
  recipes = [Recipe.from_config(task(**change), split) for change in changes for split in SPLITS]
  assert len({recipe.folder_name(count) for recipe in recipes for count in (10, 20)}) == 2 * len(recipes)


@pytest.mark.parametrize('error', [KeyboardInterrupt, ValueError])
def test_an_interrupted_preparation_leaves_no_half_written_cache(tmp_path, error):
  rows = [np.arange(n, dtype=np.uint8) for n in range(1, 30)]
  closed = []

  def interrupted():
    try:
      yield from rows[:20]
      raise error
    finally:
      closed.append(True)

  with pytest.raises(error):
    builders.open_or_prepare_sequences(tmp_path, 'some', interrupted)
  assert closed
  assert [file.name for file in tmp_path.rglob('*') if file.is_file()] == ['.some.lock']
  # A killed process leaves an unfinished folder, which the next preparation removes.
  killed = tmp_path / '.some.part-1-2'
  killed.mkdir()
  (killed / 'dataset_info.json').write_text('{')
  made = builders.open_or_prepare_sequences(tmp_path, 'some', lambda: (row for row in rows))
  assert [made[i].tolist() for i in range(len(made))] == [row.tolist() for row in rows]
  assert not killed.exists()


# --- released puzzles -------------------------------------------------------------------------------------------------


def tokens_of(some):
  return [to_ids(puzzle).tolist() for puzzle in some]


@pytest.mark.parametrize('cache', [False, True])
def test_a_folder_of_released_files_keeps_the_published_test_set(tmp_path, cache):
  train_file, test_file = puzzles()[:120], puzzles()[120:] + puzzles()[:3]  # three puzzles occur in both files
  write_records(tmp_path / 'zebra-train.pkl', map(to_record, train_file))
  write_records(tmp_path / 'zebra-test.pkl', map(to_record, test_file))
  cfg = task(path=str(tmp_path), cache=str(tmp_path / 'cache') if cache else '', num_train=0, num_test=50)
  train, validation, test = (all_tokens(Source(cfg, split)) for split in SPLITS)
  assert test == tokens_of(test_file)
  is_validation = [split_of(p.clues, *p.size) == 'validation' for p in train_file[3:]]
  assert validation == tokens_of(p for p, yes in zip(train_file[3:], is_validation, strict=True) if yes) != []
  assert train == tokens_of(p for p, yes in zip(train_file[3:], is_validation, strict=True) if not yes)
  assert len(Source(task(path=str(tmp_path), num_train=7), 'train')) == 7
  small = Source(task(path=str(tmp_path), num_train=0, max_houses=3, max_attributes=3), 'train')
  assert all_tokens(small) == [tokens for tokens in train if tokens in tokens_of(train_file[:40])]  # only 3 x 3


def test_a_single_released_file_is_divided_into_splits_by_hash(tmp_path):
  file = write_records(tmp_path / 'some.pkl', map(to_record, puzzles()))
  cfg = task(path=str(file), num_train=0, num_validation=99, num_test=99)
  for split in SPLITS:
    expected = tokens_of(p for p in puzzles() if split_of(p.clues, *p.size) == split)
    assert all_tokens(Source(cfg, split)) == expected != []


def test_a_folder_without_exactly_one_training_and_one_test_file_is_refused(tmp_path):
  for names in ((), ('train.pkl',), ('train.pkl', 'test.pkl', 'test2.pkl')):
    for name in names:
      write_records(tmp_path / name, map(to_record, puzzles()[:1]))
    with pytest.raises(UserError) as error:
      Source(task(path=str(tmp_path)), 'test')
    assert_one_line(error, 'task.path', 'expected one .pkl file')


def test_a_released_split_without_puzzles_of_the_configured_sizes_is_refused(tmp_path):
  for name in ('train.pkl', 'test.pkl'):
    write_records(tmp_path / name, map(to_record, puzzles()[:1]))  # one 3 x 3 puzzle
  with pytest.raises(UserError) as error:
    Source(task(path=str(tmp_path), min_houses=4), 'test')
  assert_one_line(error, 'no puzzle of the test split')


def test_a_resumed_run_warns_if_the_released_puzzle_files_have_changed_and_reads_the_new_ones(tmp_path, caplog):
  file = write_records(tmp_path / 'some.pkl', map(to_record, puzzles()[:60]))
  cfg = task(path=str(file), cache=str(tmp_path / 'cache'), num_train=0)
  caplog.set_level('WARNING', 'absl')
  before = all_tokens(Source(cfg, 'train'))
  TASK.save_assets(cfg, tmp_path)
  TASK.save_assets(cfg, tmp_path)
  assert not caplog.messages
  times = file.stat()
  write_records(file, map(to_record, puzzles()[60:120]))
  os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
  TASK.save_assets(cfg, tmp_path)
  assert f'task.path={file} has changed' in caplog.text and 'some.pkl has other content' in caplog.text
  assert all_tokens(Source(cfg, 'train')) != before
