"""Sample puzzles and helpers for the zebra tests."""

import functools
import itertools
import pickle

import numpy as np

from ilm_jax.configs import zebra as zebra_config
from ilm_jax.tasks.zebra.clues import Clue, to_words
from ilm_jax.tasks.zebra.generator import ClueGenerator, make_puzzle

# A puzzle of the released data set: its text, its clues and its table.
TEXT = (
  'ends LHS c 0 1 RHS CLUE_END left-of LHS c 2 1 RHS c 2 2 CLUE_END = LHS n 0 0 RHS c 0 0 CLUE_END '
  'inbetween LHS c 1 1 RHS c 2 0 c 1 2 CLUE_END ANSWER 0 0 0 0 2 1 0 1 2 1 1 0 1 0 1 1 2 2 2 1 0 2 0 1 2 2 2'
)
CLUES = [
  Clue('ends', ((1, 1),)),
  Clue('left-of', ((3, 1), (3, 2))),
  Clue('=', ((0, 0), (1, 0))),
  Clue('inbetween', ((2, 1), (3, 0), (2, 2))),
]
TABLE = [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 0, 2]]


def task(**changes):
  """Return a zebra task config with few, small puzzles and no cache; `changes` override settings."""
  cfg = zebra_config.get_config('small').task
  cfg.update({'num_train': 40, 'num_validation': 10, 'num_test': 10, 'cache': '', **changes})
  return cfg


@functools.cache
def puzzles():
  """Return forty puzzles of each size (houses, attributes) from 3 x 3 to 4 x 4."""
  sizes = itertools.product((3, 4), (3, 4))
  rng = np.random.default_rng(1)
  return [make_puzzle(rng, houses, attributes) for houses, attributes in sizes for _ in range(40)]


def drawn(number, houses, attributes):
  """Generate `number` puzzles; return (table, all clues drawn, clues that the generator selected) of each."""
  out = []
  for seed in range(number):
    generator = ClueGenerator(np.random.default_rng((7, houses, attributes, seed)), houses, attributes)
    kept = generator.run()
    out.append((generator.table, generator.clues, kept))
  return out


def all_tables(houses, attributes):
  """Yield every possible table with these numbers of houses and attributes."""
  rows = [list(row) for row in itertools.permutations(range(houses))]
  for chosen in itertools.product(rows, repeat=attributes):
    yield [list(range(houses)), *chosen]


def all_tokens(source):
  """Return the token ids of all examples of a source."""
  return [source[i]['tokens'].tolist() for i in range(len(source))]


def assert_one_line(error, *parts):
  """Assert that an error message is a single line that contains all `parts`."""
  assert '\n' not in str(error.value)
  for part in parts:
    assert part in str(error.value), f'{part!r} is not in {error.value}'


def to_record(puzzle):
  """Convert a puzzle to a record in the layout of the released files."""
  words = [*to_words(puzzle.clues), 'ANSWER', *(str(number) for cell in puzzle.cells for number in cell)]
  return [words, puzzle.table, np.array([cell[:2] for cell in puzzle.cells], np.int16)]


def write_records(path, records, protocol=4):
  """Pickle records to a file; return its path."""
  path.write_bytes(pickle.dumps(list(records), protocol))
  return path
