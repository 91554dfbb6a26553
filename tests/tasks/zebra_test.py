"""Zebra puzzles: what clues mean, by enumeration; the solver against a slow twin; files, text and scores."""

import collections
import contextlib
import itertools
import os
import pathlib
import pickle
import subprocess
import sys
import time

import numpy as np
import pytest
from ml_collections import ConfigDict

from ilm_jax.configs import zebra as config
from ilm_jax.data import builders
from ilm_jax.tasks.zebra import puzzles as zebra_puzzles
from ilm_jax.tasks.zebra import released
from ilm_jax.tasks.zebra import task as zebra
from ilm_jax.tasks.zebra.puzzles import Clue, Contradiction
from ilm_jax.types import UserError

ROOT = pathlib.Path(__file__).parents[2]
CLS, BOS = 1, 4
EXAMPLE = (
  'ends LHS c 0 1 RHS CLUE_END left-of LHS c 2 1 RHS c 2 2 CLUE_END = LHS n 0 0 RHS c 0 0 CLUE_END '
  'inbetween LHS c 1 1 RHS c 2 0 c 1 2 CLUE_END ANSWER 0 0 0 0 2 1 0 1 2 1 1 0 1 0 1 1 2 2 2 1 0 2 0 1 2 2 2'
)
TABLE = [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 0, 2]]
CLUES = [
  Clue('ends', ((1, 1),)),
  Clue('left-of', ((3, 1), (3, 2))),
  Clue('=', ((0, 0), (1, 0))),
  Clue('inbetween', ((2, 1), (3, 0), (2, 2))),
]


def task(**changes):
  cfg = config.get_config('small').task
  cfg.update({'num_train': 40, 'num_validation': 10, 'num_test': 10, 'cache': '', **changes})
  return cfg


@pytest.fixture(scope='module')
def puzzles():
  """Forty puzzles of each size up to 4 x 4."""
  sizes = itertools.product((3, 4), (3, 4))
  rng = np.random.default_rng(1)
  return [zebra_puzzles.make_puzzle(rng, houses, attributes) for houses, attributes in sizes for _ in range(40)]


def one_line(error, *parts):
  assert '\n' not in str(error.value)
  for part in parts:
    assert part in str(error.value), f'{part!r} is not in {error.value}'


# --- the meaning of clues ---------------------------------------------------------------------------------------------

PAIRS = list(itertools.product(range(4), repeat=2))
MEANING = {
  '=': [(0, 0), (1, 1), (2, 2), (3, 3)],
  '!=': [(a, b) for a, b in PAIRS if a - b],
  'nbr': [(0, 1), (1, 0), (1, 2), (2, 1), (2, 3), (3, 2)],
  'immediate-left': [(0, 1), (1, 2), (2, 3)],
  'left-of': [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)],
}


@pytest.mark.parametrize('kind', MEANING)
def test_a_clue_of_two_references_is_true_of_these_pairs_of_houses(kind):
  table = [[0, 1, 2, 3], [2, 0, 3, 1], [1, 3, 2, 0]]
  true = [
    (a, b)
    for a, b in PAIRS
    if zebra_puzzles.holds(Clue(kind, ((1, table[1][a]), (2, table[2][b]))), table)
  ]  # fmt: skip
  assert true == MEANING[kind]
  assert true == [(a, b) for a, b in PAIRS if zebra_puzzles.holds(Clue(kind, ((0, a), (2, table[2][b]))), table)]


def test_inbetween_names_the_left_one_the_middle_one_and_the_right_one():
  table = [[0, 1, 2, 3], [2, 0, 3, 1]]
  true = [
    at
    for at in itertools.product(range(4), repeat=3)
    if zebra_puzzles.holds(Clue('inbetween', tuple((1, table[1][house]) for house in at)), table)
  ]
  assert true == [(0, 1, 2), (0, 1, 3), (0, 2, 3), (1, 2, 3)]


def test_ends_is_true_of_the_first_and_the_last_house():
  table = [[0, 1, 2, 3], [2, 0, 3, 1]]
  assert [zebra_puzzles.holds(Clue('ends', ((1, value),)), table) for value in range(4)] == [False, True, True, False]


def test_an_answer_is_a_permutation_in_every_row_and_true_to_every_clue():
  assert zebra_puzzles.answers(TABLE, CLUES)
  assert not zebra_puzzles.answers([[0, 1, 2], [0, 1, 2], *TABLE[2:]], CLUES)
  assert not zebra_puzzles.answers([[0, 1, 2], [0, 2, 2], *TABLE[2:]], CLUES[1:2])


# --- the solver -------------------------------------------------------------------------------------------------------


def twin(clues, houses, attributes):
  """The solver again, with sets, and without remembering anything: (cells in order, clues that helped)."""
  where = {(0, house): house for house in range(houses)}  # the answer
  fills, used, open_ = [], set(), list(range(len(clues)))
  rows = range(1, attributes + 1)

  def values(row):
    return [(row, value) for value in range(houses) if (row, value) not in where]

  def taken(row):
    return {where[ref] for ref in where if ref[0] == row}

  def eliminate(may):
    for row in rows:
      for house in sorted(set(range(houses)) - taken(row)):
        fits = [ref for ref in values(row) if house in may[ref]]
        if len(fits) == 1:
          return fits[0], house
      for ref in values(row):
        if len(may[ref]) == 1:
          return ref, min(may[ref])
    return None

  def apply(clue, may):
    kind, (a, *rest) = clue
    b = rest[0] if rest else None
    known = a if a in where else b
    other = b if a in where else a
    placed = bool(rest) and (a in where or b in where)
    if kind == '=':
      if placed:
        return other, where[known]
      may[a] = may[b] = may[a] & may[b]
    elif kind == '!=':
      if placed:
        may[other] = may[other] - {where[known]}
    elif kind == 'nbr':
      near = lambda at: {h + d for h in at for d in (-1, 1)}  # noqa: E731
      if placed:
        less = may[other] & near({where[known]})
        if less != may[other] and len(less) == 1:
          return other, min(less)
        may[other] = less
      else:
        for _ in range(2):
          may[a] = may[a] & near(may[b])
          may[b] = may[b] & near(may[a])
    elif kind == 'immediate-left':
      if placed:
        return other, where[known] + (1 if known == a else -1)
      for _ in range(2):
        may[a] = {h for h in may[a] if h + 1 in may[b]}
        may[b] = {h for h in may[b] if h - 1 in may[a]}
    elif kind == 'left-of':
      before = may[a], may[b]
      order(may, a, b)
      if placed and before != (may[a], may[b]) and len(may[other]) == 1:
        return other, min(may[other])
    elif kind == 'inbetween':
      for _ in range(2):
        order(may, a, b)
        order(may, b, rest[1])
    else:
      for end, opposite in ((0, houses - 1), (houses - 1, 0)):
        if end in taken(a[0]):
          return a, opposite
      may[a] = may[a] & {0, houses - 1}
    return None

  def order(may, a, b):
    if a not in where:
      may[a] = {h for h in may[a] if h < max(may[b])}
    if b not in where:
      may[b] = {h for h in may[b] if h > min(may[a])}

  def attempt(chosen):
    may = {ref: {where[ref]} for ref in where}
    may |= {ref: set(range(houses)) - taken(row) for row in rows for ref in values(row)}
    for index in chosen:
      if cell := apply(clues[index], may) or eliminate(may):
        return cell
    return None

  def fill(ref, house):
    where[ref] = house
    fills.append((ref[0] - 1, house, ref[1]))

  while len(fills) < houses * attributes:
    tuples = itertools.chain(*(itertools.permutations(open_, size) for size in (1, 2, 3)))
    found = next(((chosen, cell) for chosen in tuples if (cell := attempt(chosen))), None)
    if found is None:
      break
    used |= set(found[0])
    fill(*found[1])
    for row in rows:
      if len(values(row)) == 1:
        fill(values(row)[0], *(set(range(houses)) - taken(row)))
    open_ = [i for i in open_ if not all(ref in where for ref in clues[i].refs)]
  return fills, used


def drawn(number, houses, attributes):
  """(table, all the clues drawn, those kept) of a few puzzles."""
  out = []
  for seed in range(number):
    drawing = zebra_puzzles.Drawing(np.random.default_rng((7, houses, attributes, seed)), houses, attributes)
    kept = drawing.finish()
    out.append((drawing.table, drawing.clues, kept))
  return out


@pytest.mark.parametrize('size', [(3, 3), (3, 4), (4, 3), (4, 4), (5, 3)])
def test_the_solver_agrees_with_its_slow_twin(size):
  for _, clues, kept in drawn(12, *size):
    for given in (clues, kept, kept[:-1], kept[::-1], clues[: len(clues) // 2]):  # the last ones get stuck
      solver = zebra_puzzles.Solver(*size, given)
      used = solver.solve()
      assert (solver.fills, used) == twin(given, *size)


def test_the_solver_agrees_with_its_slow_twin_where_clues_only_narrow():
  """Clues of order and distance alone, in six houses: long chains of pruning, few of them solvable."""
  houses, rng = 6, np.random.default_rng(11)
  kinds = [kind for kind in zebra_puzzles.WEIGHTS if kind not in ('=', '!=')]
  progress = 0
  for _ in range(100):
    table = [list(range(houses)), *(rng.permutation(houses).tolist() for _ in range(2))]
    clues = []
    while len(clues) < 8:
      kind = kinds[rng.integers(len(kinds))]
      refs = [(int(rng.integers(3)), int(rng.integers(houses))) for _ in range(zebra_puzzles.REFERENCES[kind])]
      if len(set(refs)) == len(refs) and any(row for row, _ in refs) and (kind != 'ends' or refs[0][0]):
        clue = Clue(kind, tuple(refs))
        clues += [clue] * zebra_puzzles.holds(clue, table)
    solver = zebra_puzzles.Solver(houses, 2, clues)
    used = solver.solve()
    assert (solver.fills, used) == twin(clues, houses, 2)
    progress += len(solver.fills)
  assert progress > 100


def test_adding_clues_one_by_one_succeeds_where_starting_again_does():
  for table, clues, _ in drawn(20, 4, 4):
    solver = zebra_puzzles.Solver(4, 4)
    for clue in clues:
      solver.add(clue)
      solver.solve()
      assert all(table[a + 1][house] == value for a, house, value in solver.fills)
    assert solver.solved and solver.table() == table


def test_the_example_of_the_data_set_is_solved_in_its_order():
  words = EXAMPLE.split()
  at = words.index('ANSWER')
  assert zebra_puzzles.from_words(words[:at]) == CLUES
  solver = zebra_puzzles.solve(CLUES, 3, 3)
  assert solver.table() == TABLE
  assert [number for fill in solver.fills for number in fill] == list(map(int, words[at + 1 :]))


@pytest.mark.parametrize(
  'clues',
  [
    [Clue('=', ((0, 0), (1, 0))), Clue('=', ((0, 1), (1, 0)))],
    [Clue('=', ((1, 0), (1, 1)))],
    [Clue('immediate-left', ((0, 2), (1, 0)))],
    [Clue('left-of', ((1, 0), (2, 0))), Clue('left-of', ((2, 0), (1, 0)))],
    [Clue('ends', ((1, value),)) for value in range(3)],
    [Clue('nbr', ((0, 0), (1, 0))), Clue('ends', ((1, 0),))],
  ],
)
def test_contradictory_clues_have_no_table(clues):
  assert not any(zebra_puzzles.answers(table, clues) for table in tables(3, 2))
  assert zebra_puzzles.any_table(clues, 3, 2) is None
  with contextlib.suppress(Contradiction):
    assert not zebra_puzzles.answers(zebra_puzzles.solve(clues, 3, 2).table(), clues)


def tables(houses, attributes):
  """Every table."""
  rows = [list(row) for row in itertools.permutations(range(houses))]
  for chosen in itertools.product(rows, repeat=attributes):
    yield [list(range(houses)), *chosen]


def test_any_table_finds_one_where_there_is_one():
  rng = np.random.default_rng(3)
  for _, clues, _ in drawn(6, 3, 3):
    for number in (1, 2, 4):
      some = [clues[i] for i in rng.permutation(len(clues))[:number]]
      assert zebra_puzzles.answers(zebra_puzzles.any_table(some, 3, 3), some)


# --- the generator ----------------------------------------------------------------------------------------------------


def test_every_clue_is_true_and_all_are_different(puzzles):
  for puzzle in puzzles:
    assert zebra_puzzles.answers(puzzle.table, puzzle.clues)
    assert len(set(map(zebra_puzzles.canonical, puzzle.clues))) == len(puzzle.clues)


def test_a_puzzle_has_one_answer():
  for seed in range(25):
    puzzle = zebra_puzzles.make_puzzle(np.random.default_rng(seed), 3, 3)
    assert [table for table in tables(3, 3) if zebra_puzzles.answers(table, puzzle.clues)] == [puzzle.table]


def test_the_fills_are_the_cells_of_the_table(puzzles):
  for puzzle in puzzles:
    cells = [(a, h, v) for a, row in enumerate(puzzle.table[1:]) for h, v in enumerate(row)]
    assert sorted(puzzle.fills) == cells


def test_only_clues_that_help_are_kept():
  """A clue that is not in the original set's solution is gone; the order of the others stays."""
  for _, clues, kept in drawn(12, 4, 4):
    used = [zebra_puzzles.canonical(clues[i]) for i in sorted(twin(clues, 4, 4)[1])]
    assert [zebra_puzzles.canonical(clue) for clue in kept] == used


def test_drawing_stops_with_the_first_clue_that_is_enough():
  """From the fifth on: with one less the solver gets stuck."""
  lengths = set()
  for _, clues, _ in drawn(40, 3, 3):
    lengths.add(len(clues))
    assert len(clues) == 5 or not zebra_puzzles.solve(clues[:-1], 3, 3).solved
  assert min(lengths) == 5


def test_clues_occur_as_often_as_measured():
  """Against an independent implementation: clues and tokens (with ANSWER) of 3 x 3 and 4 x 4, and shares of kinds."""
  kinds = collections.Counter()
  for size, clues, tokens in (((3, 3), 5.3, 80.5), ((4, 4), 11.1, 158.5)):
    drawn_ = [zebra_puzzles.make_puzzle(np.random.default_rng((5, i)), *size) for i in range(250)]
    assert abs(np.mean([len(p.clues) for p in drawn_]) - clues) < 0.35
    lengths = [len(zebra_puzzles.to_words(p.clues)) + 1 + 3 * len(p.fills) for p in drawn_]
    assert abs(np.mean(lengths) - tokens) < 3
    kinds.update(clue.kind for puzzle in drawn_ for clue in puzzle.clues)
  order = [kind for kind, _ in kinds.most_common()]
  assert order[0] == '=' and order[-1] == '!=' and set(order) == set(zebra_puzzles.WEIGHTS)


def test_a_side_is_swapped_one_time_in_four():
  drawing = zebra_puzzles.Drawing(np.random.default_rng(0), 3, 3)
  for kind in zebra_puzzles.WEIGHTS:
    clue = Clue(kind, ((1, 0), (2, 1))[: 1 if kind == 'ends' else 2])
    swapped = sum(drawing._swapped(clue) != clue for _ in range(2_000))
    assert abs(swapped - (500 if kind in ('=', '!=', 'nbr') else 0)) < (80 if kind in ('=', '!=', 'nbr') else 1)


def test_draws_follow_their_weights():
  drawing = zebra_puzzles.Drawing(np.random.default_rng(0), 4, 2)
  drawing.count = [0, 2, 7]
  rows = collections.Counter(drawing._row() for _ in range(12_000))
  weights = np.array([1 / 3 / 5, 1 / 5, 1 / 10])
  assert np.allclose([rows[row] / 12_000 for row in range(3)], weights / weights.sum(), atol=0.02)
  # Cells of row 1: house 0 is filled. Rows: full 1, one filled 4, none filled 5.
  drawing.solving = True
  drawing.solver.add(Clue('=', ((0, 0), (1, 3))))
  drawing.solver.solve()
  cells = collections.Counter(drawing._entity() for _ in range(12_000))
  assert np.allclose([sum(n for (r, _), n in cells.items() if r == row) / 12_000 for row in range(3)],
                     [0.1, 0.4, 0.5], atol=0.02)  # fmt: skip
  assert np.allclose([cells[1, house] / 4_800 for house in range(4)], [5 / 8, 1 / 8, 1 / 8, 1 / 8], atol=0.03)


def test_relabelling_keeps_a_puzzle_a_puzzle():
  rng = np.random.default_rng(2)
  for _, _, kept in drawn(6, 3, 3):
    other = zebra_puzzles.relabel(rng, kept, 3, 3)
    assert [c.kind for c in other] == [c.kind for c in kept]
    assert sum(zebra_puzzles.answers(table, other) for table in tables(3, 3)) == 1


# --- the source -------------------------------------------------------------------------------------------------------


def all_of(source):
  return [source[i]['tokens'].tolist() for i in range(len(source))]


def test_access_is_random_and_repeatable():
  first, second = (zebra.source(task(), 'train') for _ in range(2))
  forwards = all_of(first)
  assert [second[i]['tokens'].tolist() for i in reversed(range(40))][::-1] == forwards == all_of(first)
  assert len(set(map(tuple, forwards))) == 40
  assert all_of(zebra.source(task(num_train=5), 'train')) == forwards[:5], 'the number of puzzles does not matter'
  assert zebra.source(task(seed=1), 'train')[0]['tokens'].tolist() != forwards[0]
  assert zebra.source(task(), 'test')[0]['tokens'].tolist() != forwards[0]


def test_every_size_occurs():
  source = zebra.source(task(), 'train')
  sizes = collections.Counter((len(p.table[0]), len(p.table) - 1) for p in map(source.puzzle, range(40)))
  assert set(sizes) == {(3, 3), (3, 4), (4, 3), (4, 4)}


def test_an_epoch_can_be_endless():
  source = zebra.source(task(num_train=0), 'train')
  assert source.endless and len(source) > 10**12
  assert source[2**40]['tokens'].tolist() == source[2**40]['tokens'].tolist() != source[2**40 + 1]['tokens'].tolist()
  assert not zebra.source(task(), 'train').endless and len(zebra.source(task(), 'test')) == 10


def test_the_splits_share_no_puzzle():
  """Whatever the order of the clues and of the sides of symmetric ones: the hash knows no order."""
  for split in zebra.SPLITS:
    source = zebra.source(task(), split)
    for puzzle in map(source.puzzle, range(10)):
      size = len(puzzle.table[0]), len(puzzle.table) - 1
      turned = [Clue(c.kind, c.refs[::-1]) if c.kind in ('=', '!=', 'nbr') else c for c in puzzle.clues[::-1]]
      assert zebra_puzzles.split_of(puzzle.clues, *size) == zebra_puzzles.split_of(turned, *size) == split


def test_what_is_not_the_same_puzzle_has_another_identity():
  left, right = Clue('left-of', ((1, 0), (2, 0))), Clue('left-of', ((2, 0), (1, 0)))
  same = Clue('=', ((1, 0), (2, 0)))
  variants = [([left], 3, 3), ([right], 3, 3), ([left], 4, 3), ([left], 3, 4), ([same], 3, 3), ([left, same], 3, 3)]
  assert len({zebra_puzzles.identity(*variant) for variant in variants}) == len(variants)


def test_one_puzzle_in_ten_is_held_out():
  clues = [[Clue('=', ((1, a), (2, b))), Clue('!=', ((3, c), (d % 4, e)))]
           for a, b, c, d, e in itertools.product(range(6), repeat=5)]  # fmt: skip
  number = collections.Counter(zebra_puzzles.split_of(c, 6, 6) for c in clues[::2])
  for split, share in (('train', 0.9), ('validation', 0.05), ('test', 0.05)):
    assert abs(number[split] / 3_888 - share) < 0.02


@pytest.mark.parametrize('order', ['solver', 'sorted'])
def test_an_example_is_clues_then_cells(order):
  source = zebra.source(task(order=order), 'train')
  solved = 0
  for index in range(20):
    puzzle, example = source.puzzle(index), source[index]
    tokens, fixed = example['tokens'], example['fixed']
    assert tokens.dtype == np.int32 and fixed.dtype == bool and len(tokens) <= zebra.longest(source.cfg)
    words = zebra.TOKENIZER.pieces(tokens)
    bos = words.index('[BOS]')
    assert words[0] == '[CLS]' and fixed.tolist() == [True] * (bos + 1) + [False] * (len(tokens) - bos - 1)
    assert zebra_puzzles.from_words(words[1:bos]) == puzzle.clues
    cells = [tuple(map(int, words[i : i + 3])) for i in range(bos + 1, len(words), 3)]
    assert cells == (sorted(puzzle.fills) if order == 'sorted' else puzzle.fills)
    solved += cells != sorted(cells)
  assert (solved > 10) == (order == 'solver')


def test_words_have_the_ids_of_the_reference():
  words = zebra.tokenizer(task()).words
  assert len(words) == zebra.tokenizer(task()).vocab_size == 25
  assert words[:7] == ('[PAD]', '[CLS]', '[MASK]', '[EOS]', '[BOS]', '[SEP]', '[UNK]')
  ids = {word: i for i, word in enumerate(words)}
  assert [ids[str(digit)] for digit in range(6)] == [7, 8, 9, 10, 11, 12]
  rest = ['nbr', 'left-of', 'inbetween', 'immediate-left', 'ends', '!=', '=', 'c', 'n', 'CLUE_END', 'RHS', 'LHS']
  assert [ids[word] for word in rest] == list(range(13, 25))


def test_the_longest_puzzle_fills_the_block_of_the_paper():
  assert zebra.longest(config.get_config('full').task) == 460


@pytest.mark.parametrize(
  'change',
  [{'min_houses': 2}, {'max_houses': 7}, {'min_attributes': 5}, {'max_attributes': 2}, {'order': 'random'},
   {'num_workers': -1}, {'num_train': 0, 'cache': 'somewhere'}, {'path': '/nowhere'}],
)  # fmt: skip
def test_settings_that_mean_nothing_are_refused_in_one_line(change):
  with pytest.raises(UserError) as error:
    zebra.source(task(**change), 'train')
  one_line(error, 'task.')


# --- on disk ----------------------------------------------------------------------------------------------------------


def test_cached_puzzles_are_those_made_on_the_fly(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  cfg = task(cache='data', num_test=25)
  cached = zebra.source(cfg, 'test')
  expected = all_of(zebra.source(task(num_test=25), 'test'))
  assert all_of(cached) == expected and len(cached) == 25
  assert [pickle.loads(pickle.dumps(cached))[i]['tokens'].tolist() for i in (24, 0)] == [expected[24], expected[0]]
  monkeypatch.setattr(zebra, 'generate', None)  # the second time nothing is generated
  assert all_of(zebra.source(cfg, 'test')) == expected
  assert all_of(zebra.source(task(cache='data', num_test=25, order='sorted'), 'test')) != expected


def test_other_settings_are_other_files():
  cfg = {'seed': 1}, {'min_houses': 4}, {'max_houses': 5}, {'min_attributes': 4}, {'max_attributes': 5}, {}
  recipes = [zebra.Recipe.of(task(**change), split) for change in cfg for split in zebra.SPLITS]
  assert len({recipe.name(count) for recipe in recipes for count in (10, 20)}) == 2 * len(recipes)


def test_processes_do_not_change_the_puzzles():
  recipe = zebra.Recipe.of(task(), 'validation')
  one, two = ([tokens.tolist() for tokens in zebra.generate(recipe, 9, workers)] for workers in (0, 2))
  assert one == two and len(one) == 9


def test_a_killed_parent_takes_its_processes_with_it():
  code = (
    'from ilm_jax.tasks.zebra import task as zebra\n'
    'import multiprocessing\n'
    'if __name__ == "__main__":\n'
    '  recipe = zebra.Recipe(0, "train", (3, 4), (3, 4))\n'
    '  puzzles = zebra.generate(recipe, 10**5, 1)\n'
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


@pytest.mark.parametrize('error', [KeyboardInterrupt, ValueError])
def test_an_interrupted_preparation_leaves_nothing_half_made(tmp_path, error):
  rows = [np.arange(n, dtype=np.uint8) for n in range(1, 30)]
  closed = []

  def interrupted():
    try:
      yield from rows[:20]
      raise error
    finally:
      closed.append(True)

  with pytest.raises(error):
    builders.prepared(tmp_path, 'some', interrupted)
  assert closed
  assert [file.name for file in tmp_path.rglob('*') if file.is_file()] == ['.token_sequences.lock']
  # ... and what a killed process could not tidy up is neither read nor kept
  killed = tmp_path / 'some' / builders.NAME / f'incomplete.ABCDEF_{builders.VERSION}'
  killed.mkdir()
  (killed / 'dataset_info.json').write_text('{')
  made = builders.prepared(tmp_path, 'some', lambda: (row for row in rows))
  assert [made[i].tolist() for i in range(len(made))] == [row.tolist() for row in rows]
  assert not killed.exists()


def test_a_cache_that_cannot_be_written_is_said_in_one_line(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(UserError) as error:
    zebra.source(task(cache=str(tmp_path / 'file')), 'test')
  one_line(error, 'task.cache', 'could not be written')


# --- the released files -----------------------------------------------------------------------------------------------


def record(puzzle):
  words = [*zebra_puzzles.to_words(puzzle.clues), 'ANSWER', *(str(number) for fill in puzzle.fills for number in fill)]
  return [words, puzzle.table, np.array([fill[:2] for fill in puzzle.fills], np.int16)]


def write(path, records, protocol=4):
  path.write_bytes(pickle.dumps(records, protocol))
  return path


@pytest.mark.parametrize('protocol', range(pickle.HIGHEST_PROTOCOL + 1))
def test_released_puzzles_are_read(puzzles, tmp_path, protocol):
  found = list(released.read(write(tmp_path / 'some.pkl', [record(p) for p in puzzles[::8]], protocol)))
  assert found == puzzles[::8]


def test_names_of_numpy_before_version_2_are_read(puzzles, tmp_path):
  content = pickle.dumps([record(puzzles[0])], 2).replace(b'numpy._core.', b'numpy.core.')
  (tmp_path / 'old.pkl').write_bytes(content)
  assert b'numpy.core.multiarray' in content
  assert list(released.read(tmp_path / 'old.pkl')) == puzzles[:1]


@pytest.mark.parametrize('cache', [False, True])
def test_a_folder_keeps_the_published_split(puzzles, tmp_path, cache):
  mine, held_out = puzzles[:120], puzzles[120:] + puzzles[:3]  # three occur in both
  write(tmp_path / 'zebra-train.pkl', list(map(record, mine)))
  write(tmp_path / 'zebra-test.pkl', list(map(record, held_out)))
  cfg = task(path=str(tmp_path), cache=str(tmp_path / 'cache') if cache else '', num_train=0, num_test=50)
  train, validation, test = ([tuple(t) for t in all_of(zebra.source(cfg, split))] for split in zebra.SPLITS)
  assert test == [tuple(zebra.to_ids(p).tolist()) for p in held_out][:43]
  assert sorted(train + validation) == sorted(tuple(zebra.to_ids(p).tolist()) for p in mine[3:])
  assert len(validation) == sum(zebra_puzzles.split_of(p.clues, len(p.table[0]), len(p.table) - 1) == 'validation'
                                for p in mine[3:]) > 0  # fmt: skip
  assert len(zebra.source(task(path=str(tmp_path), num_train=7), 'train')) == 7
  small = zebra.source(task(path=str(tmp_path), num_train=0, max_houses=3, max_attributes=3), 'train')
  assert len(small) == sum(tuple(t) in {tuple(zebra.to_ids(p).tolist()) for p in mine[3:40]} for t in train)


def test_a_single_file_is_split_by_identity(puzzles, tmp_path):
  file = write(tmp_path / 'some.pkl', [record(p) for p in puzzles])
  cfg = task(path=str(file), num_train=0, num_validation=99, num_test=99)
  found = {split: all_of(zebra.source(cfg, split)) for split in zebra.SPLITS}
  for split in zebra.SPLITS:
    fits = [p for p in puzzles if zebra_puzzles.split_of(p.clues, len(p.table[0]), len(p.table) - 1) == split]
    assert found[split] == [zebra.to_ids(p).tolist() for p in fits] != []


class Attack:
  def __init__(self, call):
    self.call = call

  def __reduce__(self):
    return self.call


@pytest.mark.parametrize('protocol', [0, 2, 4])
def test_a_pickle_that_calls_anything_is_refused_before_it_does(puzzles, tmp_path, protocol):
  bait = tmp_path / 'bait'
  for call in ((os.mkdir, (str(bait),)), (eval, (f'__import__("os").mkdir({str(bait)!r})',)), (np.load, ('x',)),
               (getattr, ([], 'append'))):  # fmt: skip
    words, table, _ = record(puzzles[0])
    file = write(tmp_path / 'bad.pkl', [record(puzzles[0]), [words, table, Attack(call)]], protocol)
    with pytest.raises(UserError) as error:
      list(released.read(file))
    one_line(error, 'refused', call[0].__name__)
  assert not bait.exists()


def test_a_truncated_pickle_is_said_in_one_line(puzzles, tmp_path):
  content = write(tmp_path / 'whole.pkl', [record(p) for p in puzzles[:20]]).read_bytes()
  for size in (0, 1, 5, 100, len(content) // 2, len(content) - 1):
    (tmp_path / 'cut.pkl').write_bytes(content[:size])
    with pytest.raises(UserError) as error:
      list(released.read(tmp_path / 'cut.pkl'))
    one_line(error, 'truncated', 'cut.pkl')


def broken(puzzle):
  """Records of other layouts."""
  words, table, order = record(puzzle)
  at = words.index('ANSWER')
  return {
    'two members': [words, table],
    'no list': 5,
    'no answer': [[word for word in words if word != 'ANSWER'], table, order],
    'text': [' '.join(words), table, order],
    'numbers': [list(range(9)), table, order],
    'an unknown kind': [['maybe', *words[1:]], table, order],
    'a cell short': [words[:-3], table, order],
    'a digit short': [words[:-1], table, order],
    'a wrong cell': [[*words[:-1], str((int(words[-1]) + 1) % 3)], table, order],
    'a cell twice': [[*words[:-3], *words[at + 1 : at + 4]], table, order],
    'a large value': [['=', 'LHS', 'c', '0', '5', 'RHS', 'n', '0', '0', 'CLUE_END', *words], table, order],
    'house numbers missing': [words, table[1:], order],
    'house numbers shuffled': [words, [table[0][::-1], *table[1:]], order],
    'no permutation': [words, [*table[:-1], [0] * len(table[0])], order],
    'fractions': [words, [[float(value) for value in row] for row in table], order],
    'an array for a table': [words, np.array(table), order],
  }


@pytest.mark.parametrize('what', broken(zebra_puzzles.Puzzle(CLUES, TABLE, [(0, 0, 0)])))
def test_another_layout_is_said_in_one_line(puzzles, tmp_path, what):
  file = write(tmp_path / 'odd.pkl', [record(puzzles[1]), broken(puzzles[0])[what]])
  with pytest.raises(UserError) as error:
    list(released.read(file))
  one_line(error, 'odd.pkl, record 1', 'expected')


@pytest.mark.parametrize(
  'content', [pickle.dumps({'a': 1}), pickle.dumps([]), pickle.dumps('x'), b'PK\x03\x04zip', b'hello\n']
)
def test_another_file_is_said_in_one_line(tmp_path, content):
  (tmp_path / 'odd.pkl').write_bytes(content)
  with pytest.raises(UserError) as error:
    list(released.read(tmp_path / 'odd.pkl'))
  one_line(error, 'odd.pkl', 'expected a pickled list of [tokens, table, order]')


def test_a_folder_needs_one_file_of_each_split(puzzles, tmp_path):
  for names in ((), ('train.pkl',), ('train.pkl', 'test.pkl', 'test2.pkl')):
    for name in names:
      write(tmp_path / name, [record(puzzles[0])])
    with pytest.raises(UserError) as error:
      zebra.source(task(path=str(tmp_path)), 'test')
    one_line(error, 'task.path', 'expected one .pkl file')


def test_a_split_without_puzzles_is_refused(puzzles, tmp_path):
  for name in ('train.pkl', 'test.pkl'):
    write(tmp_path / name, [record(puzzles[0])])  # 3 x 3
  with pytest.raises(UserError) as error:
    zebra.source(task(path=str(tmp_path), min_houses=4), 'test')
  one_line(error, 'no puzzle of the test split')


# --- text and scores --------------------------------------------------------------------------------------------------


def test_a_puzzle_survives_the_way_to_text_and_back():
  source = zebra.source(task(), 'train')
  for index in range(20):
    example = source[index]
    text = zebra.decode(example['tokens'], source.cfg)
    prompt = example['tokens'][example['fixed']].tolist()
    for form in (text, text.split(' ANSWER')[0], '\n ' + text.replace(' ', '  ')):
      assert zebra.encode_prompt(form, source.cfg) == prompt


def test_the_example_as_text():
  cfg = task()
  prompt = zebra.encode_prompt(EXAMPLE, cfg)
  assert prompt[:9] == [CLS, 17, 24, 20, 7, 8, 23, 22, 14] and prompt[-1] == BOS
  answer = zebra.TOKENIZER.ids(EXAMPLE.split('ANSWER ')[1].split())
  assert zebra.decode([*prompt, *answer], cfg) == EXAMPLE
  assert zebra.decode(prompt, cfg) == EXAMPLE.split(' 0 0 0 0')[0]


CLUE_TEXT = EXAMPLE.split(' ANSWER')[0]


@pytest.mark.parametrize('prompt, parts', [
  ('', ['empty']),
  ('ANSWER 0 0 0', ['empty']),
  (CLUE_TEXT.replace('ends', 'end'), ["unknown token 'end'", '0 ... LHS']),
  (CLUE_TEXT.replace('c 0 1', 'c 0 6'), ["unknown token '6'"]),
  ('[BOS] ' + CLUE_TEXT, ["unknown token '[BOS]'"]),
  (CLUE_TEXT.replace('n 0 0', 'n 1 0'), ['clue 3', 'n 0 HOUSE']),
  (CLUE_TEXT.replace('n 0 0', '0 n 0'), ['clue 3']),
  (CLUE_TEXT.replace('c 2 0 c 1 2', 'c 2 0'), ['clue 4', 'inbetween LHS REF RHS REF REF CLUE_END']),
  (CLUE_TEXT.replace('RHS c 0 0', 'RHS c 0 0 c 0 1'), ['clue 3']),
  (CLUE_TEXT.replace('LHS n', 'RHS n'), ['clue 3']),
  (CLUE_TEXT.removesuffix(' CLUE_END'), ['clue 4']),
  ('CLUE_END ' + CLUE_TEXT, ['clue 1', 'one of = != nbr']),
  (CLUE_TEXT + ' 0 0', ['clue 5']),
  ('= LHS n 0 1 RHS c 0 0 CLUE_END ' + CLUE_TEXT, ['contradict']),
  (CLUE_TEXT + ' != LHS c 0 0 RHS n 0 0 CLUE_END', ['contradict']),
  (CLUE_TEXT + ' = LHS n 0 0 RHS n 0 1 CLUE_END', ['contradict']),
  (' '.join(f'ends LHS c {a} {v} RHS CLUE_END' for a in range(3) for v in range(4)), ['contradict']),
  ('ends LHS c 0 1 RHS CLUE_END ends LHS c 2 1 RHS CLUE_END', ['cannot be solved', '0 of 9 cells']),
  (CLUE_TEXT.removeprefix('ends LHS c 0 1 RHS CLUE_END '), ['cannot be solved', 'of 9 cells']),
  (CLUE_TEXT.replace('c 0 0', 'c 0 4'), ['5 houses', '3 to 4']),
  (CLUE_TEXT.replace('c 2', 'c 5'), ['6 attributes', '3 to 4']),
  (CLUE_TEXT.replace('c 2', 'c 0'), ['2 attributes', '3 to 4']),
])  # fmt: skip
def test_a_bad_prompt_is_refused_in_one_line(prompt, parts):
  with pytest.raises(UserError) as error:
    zebra.encode_prompt(prompt, task())
  one_line(error, *parts)


def test_the_last_value_need_not_be_named():
  """Rows of four houses whose value 3 no clue names: the clues of values 0 to 2 say it all."""
  clues = [Clue('=', ((1, value), (2, value))) for value in range(3)]
  clues += [Clue('immediate-left', ((1, value), (3, value))) for value in range(3)]
  clues += [Clue('left-of', ((1, 0), (1, 1))), Clue('left-of', ((1, 1), (1, 2)))]
  text = ' '.join(zebra_puzzles.to_words(clues))
  assert zebra_puzzles.solve(clues, 4, 3).solved
  assert zebra.encode_prompt(text, task())[0] == CLS
  with pytest.raises(UserError) as error:
    zebra.encode_prompt(text, task(max_houses=3))
  one_line(error, 'contradict')


def test_the_score_compares_sets_of_cells():
  reference = np.array([7, 7, 8, 7, 8, 9, 8, 7, 7], np.int32)

  def score(*predicted):
    pairs = zebra.score(np.array(predicted, np.int32), reference, task())
    assert pairs['exact_match'][1] == pairs['iou'][1] == 1 and pairs['token_accuracy'][1] == 9
    return tuple(pairs[name][0] for name in ('exact_match', 'iou', 'token_accuracy'))

  assert score(*reference) == (1, 1, 9)
  assert score(8, 7, 7, 7, 7, 8, 7, 8, 9) == (1, 1, 2), 'any order of cells will do'
  assert score(7, 7, 8, 7, 8, 9) == (0, 2 / 3, 6)
  assert score(7, 7, 8, 7, 8, 9, 8, 7, 8) == (0, 2 / 4, 8)
  assert score(*reference, 9, 9, 9) == (0, 3 / 4, 9)
  assert score(*reference, 9) == (0, 3 / 4, 9), 'a rest is a wrong cell'
  assert score(7, *reference[:-1])[:2] == (0, 0), 'cells begin at every third token'
  assert score() == (0, 0, 0)


def test_configs_fit_together():
  for name in config.NAMES:
    cfg = config.get_config(name)
    assert cfg.data.row_length >= zebra.longest(cfg.task) == cfg.sampling.max_length
    assert cfg.sampling.max_steps >= 3 * cfg.task.max_houses * cfg.task.max_attributes
    zebra.check(cfg.task)
  with pytest.raises(ValueError, match='small, full'):
    config.get_config('medium')
  assert isinstance(cfg.task, ConfigDict)
