"""Zebra puzzle examples: generated on demand or in advance (cached on disk), or read from the released files."""

import concurrent.futures.process
import contextlib
import functools
import hashlib
import multiprocessing
import os
import signal
import threading
from typing import NamedTuple

import numpy as np
from absl import logging

from ilm_jax import paths
from ilm_jax.data import builders, file_hashes, storage
from ilm_jax.data.tokenizers import WordTokenizer
from ilm_jax.special_tokens import BOS, CLS
from ilm_jax.tasks.zebra import released
from ilm_jax.tasks.zebra.clues import DIGITS, MAX_SIZE, Puzzle, identity, split_of, to_words
from ilm_jax.tasks.zebra.generator import make_puzzle
from ilm_jax.types import UserError

SPLITS = ('train', 'validation', 'test')
ORDERS = ('solver', 'sorted')  # possible orders of the cells in an answer
MIN_SIZE = 3  # minimum number of houses and minimum number of attributes of a puzzle
KINDS = ('nbr', 'left-of', 'inbetween', 'immediate-left', 'ends', '!=', '=')
TOKENIZER = WordTokenizer((*DIGITS, *KINDS, 'c', 'n', 'CLUE_END', 'RHS', 'LHS'))  # the order determines the ids


def max_tokens(houses: int, attributes: int) -> int:
  """Return the maximum number of tokens of a puzzle of this size; none of 16,000 generated puzzles was longer."""
  return 64 + 11 * houses * attributes


def to_ids(puzzle: Puzzle) -> np.ndarray:
  """Return a puzzle's token ids (clues, then cells in the order that the solver fills them) as uint8[n]."""
  digits = [str(number) for cell in puzzle.cells for number in cell]
  return np.array([CLS, *TOKENIZER.ids(to_words(puzzle.clues)), BOS, *TOKENIZER.ids(digits)], np.uint8)


def check_config(cfg) -> None:
  """Raise UserError if a setting of the zebra task is out of range or conflicts with another one."""
  for what in ('houses', 'attributes'):
    low, high = cfg[f'min_{what}'], cfg[f'max_{what}']
    if not MIN_SIZE <= low <= high <= MAX_SIZE:
      raise UserError(f'task.min_{what}={low}, task.max_{what}={high}: expected {MIN_SIZE} <= min_{what} <= max_{what} '
                      f'<= {MAX_SIZE}')  # fmt: skip
  if cfg.order not in ORDERS:
    raise UserError(f'task.order={cfg.order!r}: expected one of {", ".join(ORDERS)}')
  if cfg.num_workers < 0:
    raise UserError(f'task.num_workers={cfg.num_workers}: expected a number of processes, or 0 to start none')
  if cfg.cache and not cfg.path and not cfg.num_train:
    raise UserError('task.num_train=0 means endless training data, which cannot be cached: set task.num_train to a '
                    'number of puzzles, or task.cache=""')  # fmt: skip


class Source:
  """Random access to the zebra examples of one split: released, cached on disk, or generated on demand.

  Generated examples of a finite split are cached in memory.
  """

  def __init__(self, cfg, split: str):
    check_config(cfg)
    self.cfg, self.split = cfg, split
    self.size = cfg[f'num_{split}']
    self.endless = split == 'train' and not cfg.num_train and not cfg.path
    self._recipe = Recipe.from_config(cfg, split)
    self._stored = None  # the token ids of all puzzles, if they are released or cached on disk
    self._generated = {}  # the token ids of the puzzles generated so far, by index
    if cfg.path:
      name, make = _released_name(cfg, split), functools.partial(released_puzzles, cfg, split)
    else:
      name = self._recipe.folder_name(self.size)
      make = functools.partial(generate, self._recipe, self.size, cfg.num_workers)
    if cfg.cache:
      cache = os.fspath(paths.resolve(cfg.cache, 'task.cache'))
      self._stored = builders.open_or_prepare_sequences(cache, name, make)
    elif cfg.path:
      self._stored = [ids.tobytes() for ids in make()]  # bytes objects need less memory than arrays
    if self._stored is not None:
      self.size = len(self._stored)

  def __len__(self) -> int:
    return 2**62 if self.endless else self.size

  def puzzle(self, index: int) -> Puzzle:
    """Generate the split's puzzle with this index, including its table."""
    return generate_one(self._recipe, index)

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    if self._stored is not None:
      ids = np.frombuffer(self._stored[index], np.uint8)
    else:
      ids = self._generated[index] if index in self._generated else _generate_ids(self._recipe, index)
      if not self.endless:
        self._generated[index] = ids
    tokens = ids.astype(np.int32)
    prompt_length = int(np.argmax(tokens == BOS)) + 1
    if self.cfg.order == 'sorted':
      tokens[prompt_length:] = np.ravel(sorted(tokens[prompt_length:].reshape(-1, 3).tolist()))
    return {'tokens': tokens, 'fixed': np.arange(len(tokens)) < prompt_length}


class Recipe(NamedTuple):
  """The settings that determine a split's generated puzzles; `houses` and `attributes` are (minimum, maximum)."""

  seed: int
  split: str
  houses: tuple[int, int]
  attributes: tuple[int, int]

  @classmethod
  def from_config(cls, cfg, split: str) -> 'Recipe':
    return cls(cfg.seed, split, (cfg.min_houses, cfg.max_houses), (cfg.min_attributes, cfg.max_attributes))

  def folder_name(self, count: int) -> str:
    """Return the name of the folder that caches the first `count` puzzles."""
    sizes = '-'.join(map(str, (*self.houses, *self.attributes)))
    return f'zebra-{sizes}-seed{self.seed}-{self.split}-{count}'


def generate_one(recipe: Recipe, index: int) -> Puzzle:
  """Generate puzzle `index` of a split, with a uniformly random size; depends only on the recipe and the index."""
  rng = np.random.default_rng((recipe.seed, SPLITS.index(recipe.split), index))
  while True:
    houses, attributes = (int(rng.integers(*bounds, endpoint=True)) for bounds in (recipe.houses, recipe.attributes))
    puzzle = make_puzzle(rng, houses, attributes, recipe.split)
    if puzzle is not None and len(to_ids(puzzle)) <= max_tokens(houses, attributes):
      return puzzle


def _generate_ids(recipe: Recipe, index: int) -> np.ndarray:
  return to_ids(generate_one(recipe, index))


def generate(recipe: Recipe, count: int, num_workers: int):
  """Yield the token ids of puzzles 0 to count-1 of a split, generated by worker processes (0: by this process)."""
  make = functools.partial(_generate_ids, recipe)
  progress = storage.Progress(f'generating zebra puzzles, {recipe.split}', count, 'puzzles')
  with contextlib.ExitStack() as stack:
    puzzles = map(make, range(count))
    if num_workers:
      storage.free_shared_memory('task.num_workers', num_workers)  # raises UserError if no process can be started
      # Use 'spawn', because forking a process that runs accelerator threads can deadlock.
      pool = concurrent.futures.ProcessPoolExecutor(num_workers, multiprocessing.get_context('spawn'), _start_worker)
      chunk_size = max(1, min(64, count // (4 * num_workers)))
      puzzles = stack.enter_context(pool).map(make, range(count), chunksize=chunk_size)
      stack.callback(pool.shutdown, wait=False, cancel_futures=True)
    try:
      for done, ids in enumerate(puzzles, 1):
        yield ids
        progress(done, done)
    except concurrent.futures.process.BrokenProcessPool:
      raise UserError(f'one of the {num_workers} processes that generate puzzles was killed, possibly for lack of '
                      'memory: start again with a smaller task.num_workers') from None  # fmt: skip


def _start_worker() -> None:
  """Initialize a worker process: ignore Ctrl-C, and exit when the parent process ends, even if it is killed."""
  signal.signal(signal.SIGINT, signal.SIG_IGN)

  def exit_with_parent():
    multiprocessing.parent_process().join()
    os._exit(1)

  threading.Thread(target=exit_with_parent, daemon=True).start()


def released_puzzles(cfg, split: str):
  """Yield the token ids of the released puzzles of a split, restricted to the puzzle sizes in the config.

  If `cfg.path` is a folder, it must hold the released training and test files. The test file is the test split;
  `split_of` moves some puzzles of the training file to validation, and puzzles that also occur in the test file are
  excluded from training and validation. If `cfg.path` is a single file, `split_of` divides its puzzles into all splits.
  """
  files = released.find_files(cfg.path)
  limit = cfg[f'num_{split}']  # maximum number of puzzles; 0: no limit
  max_length, test_set = max_tokens(cfg.max_houses, cfg.max_attributes), set()
  if 'all' not in files and split != 'test':
    logging.info('zebra: reading %s, to exclude the test puzzles from training and validation', files['test'])
    test_set = {identity(puzzle.clues, *puzzle.size) for puzzle in released.read(files['test'])}
  file = files.get('all') or files['test' if split == 'test' else 'train']
  logging.info('zebra: reading %s', file)
  num_yielded, num_skipped, progress = 0, 0, storage.Progress(f'reading {file}', None, 'puzzles')
  for num_read, puzzle in enumerate(released.read(file)):
    progress(num_read, num_read)
    houses, attributes = puzzle.size
    if not (cfg.min_houses <= houses <= cfg.max_houses and cfg.min_attributes <= attributes <= cfg.max_attributes):
      continue
    part = split_of(puzzle.clues, houses, attributes)
    if 'all' not in files:  # the test file is the test split, so no puzzle of the training file belongs to it
      part = 'test' if split == 'test' else {'test': 'train'}.get(part, part)
    if part != split:
      continue
    ids = to_ids(puzzle)
    if identity(puzzle.clues, houses, attributes) in test_set or len(ids) > max_length:
      num_skipped += 1
      continue
    yield ids
    num_yielded += 1
    if num_yielded == limit:
      break
  if num_skipped:
    logging.info('zebra %s: left out %d puzzles that are too long or occur in the test set', split, num_skipped)
  if not num_yielded:
    raise UserError(f'task.path={cfg.path}: no puzzle of the {split} split has an allowed size: lower task.min_houses '
                    'or task.min_attributes, or raise task.max_houses or task.max_attributes')  # fmt: skip


def released_hashes(cfg) -> dict[str, str]:
  """Return {name: hash of the content} of the released files."""
  return file_hashes.hashes_of({file.name: file for file in released.find_files(cfg.path).values()})


def _released_name(cfg, split: str) -> str:
  """Return a split's cache folder name, a hash of the released files and of the settings that select puzzles."""
  sizes = cfg.min_houses, cfg.max_houses, cfg.min_attributes, cfg.max_attributes
  settings = repr((released_hashes(cfg), sizes, cfg.num_train, cfg.num_validation, cfg.num_test)).encode()
  return f'zebra-released-{split}-{hashlib.blake2b(settings, digest_size=8).hexdigest()}'
