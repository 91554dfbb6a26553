"""Zebra puzzles (Shah et al. 2024; arXiv 2505.05755): from clues, which attribute has which value in which house.

The answer lists the cells of the table: `[CLS] clues [BOS] attribute house value attribute house value ...`, in the
order in which a solver finds them, or sorted. Puzzles are generated here, or read from the released files.

As text (prompts and output): `KIND LHS ref RHS ref CLUE_END ... ANSWER attribute house value ...`.
"""

import array
import concurrent.futures.process
import contextlib
import functools
import hashlib
import math
import multiprocessing
import os
import signal
import threading
import time
from typing import NamedTuple

import numpy as np
from absl import logging

from ilm_jax.data import builders
from ilm_jax.data.tokenizers import WordTokenizer
from ilm_jax.special_tokens import BOS, CLS
from ilm_jax.tasks.contract import Task
from ilm_jax.tasks.zebra import released
from ilm_jax.tasks.zebra.puzzles import (
  LARGEST,
  Contradiction,
  Puzzle,
  answers,
  any_table,
  from_words,
  identity,
  make_puzzle,
  solve,
  split_of,
  to_words,
)
from ilm_jax.types import UserError

SPLITS = ('train', 'validation', 'test')
ORDERS = ('solver', 'sorted')
SMALLEST = 3  # houses, and attributes
# The order of the words decides the ids: 0 is 7, LHS is 24.
WORDS = (
  *('0', '1', '2', '3', '4', '5', 'nbr', 'left-of', 'inbetween', 'immediate-left', 'ends', '!=', '='),
  *('c', 'n', 'CLUE_END', 'RHS', 'LHS'),
)
TOKENIZER = WordTokenizer(WORDS)
REPORT_SECONDS = 10


def tokenizer(cfg) -> WordTokenizer:
  """The 18 words of clues and answers."""
  del cfg
  return TOKENIZER


def longest(cfg) -> int:
  """Tokens of the longest example: 11 a cell and 64, 460 at 6 x 6. Longer puzzles (none in 16,000) are drawn again."""
  return _longest(cfg.max_houses, cfg.max_attributes)


def _longest(houses: int, attributes: int) -> int:
  return 64 + 11 * houses * attributes


def longest_answer(cfg) -> int:
  """Three tokens a cell."""
  return 3 * cfg.max_houses * cfg.max_attributes


def chance(cfg) -> float:
  """A random permutation of the values for each attribute, over all sizes."""
  houses, attributes = (range(cfg[f'min_{what}'], cfg[f'max_{what}'] + 1) for what in ('houses', 'attributes'))
  return float(np.mean([math.factorial(n) ** -m for n in houses for m in attributes]))


def check(cfg) -> None:
  """Refuse settings that mean no data."""
  for what in ('houses', 'attributes'):
    low, high = cfg[f'min_{what}'], cfg[f'max_{what}']
    if not SMALLEST <= low <= high <= LARGEST:
      raise UserError(
        f'task.min_{what}={low}, task.max_{what}={high}: expected {SMALLEST} <= min_{what} <= max_{what} <= {LARGEST}'
      )
  if cfg.order not in ORDERS:
    raise UserError(f'task.order={cfg.order!r}: expected one of {", ".join(ORDERS)}')
  if cfg.num_workers < 0:
    raise UserError(f'task.num_workers={cfg.num_workers}: expected 0 (this process) or a number of processes')
  if cfg.cache and not cfg.path and not cfg.num_train:
    raise UserError('task.num_train=0 is an endless set, which cannot be cached: give a number, or task.cache=""')


# --- generated puzzles ------------------------------------------------------------------------------------------------


class Recipe(NamedTuple):
  """What decides the puzzles of a split."""

  seed: int
  split: str
  houses: tuple[int, int]
  attributes: tuple[int, int]

  @classmethod
  def of(cls, cfg, split: str) -> 'Recipe':
    return cls(cfg.seed, split, (cfg.min_houses, cfg.max_houses), (cfg.min_attributes, cfg.max_attributes))

  def name(self, count: int) -> str:
    """A name for a folder."""
    sizes = '-'.join(map(str, (*self.houses, *self.attributes)))
    return f'zebra-{sizes}-seed{self.seed}-{self.split}-{count}'


def draw(recipe: Recipe, index: int) -> Puzzle:
  """Puzzle `index` of a split, a function of the recipe and the index alone; its size is uniform."""
  rng = np.random.default_rng((recipe.seed, SPLITS.index(recipe.split), index))
  while True:
    houses, attributes = (int(rng.integers(*bounds, endpoint=True)) for bounds in (recipe.houses, recipe.attributes))
    puzzle = make_puzzle(rng, houses, attributes, recipe.split)
    if puzzle is not None and len(to_ids(puzzle)) <= _longest(houses, attributes):
      return puzzle


def _draw_ids(recipe: Recipe, index: int) -> np.ndarray:
  return to_ids(draw(recipe, index))


def generate(recipe: Recipe, count: int, workers: int):
  """Yield puzzles 0 ... count-1 of a split as ids, made by `workers` processes (0: this one); logs rate and time left.

  The result does not depend on the workers.
  """
  make = functools.partial(_draw_ids, recipe)
  start = said = time.monotonic()
  with contextlib.ExitStack() as stack:
    examples = map(make, range(count))
    if workers:
      # A fresh interpreter each: forking a process that runs accelerator threads can hang.
      pool = concurrent.futures.ProcessPoolExecutor(workers, multiprocessing.get_context('spawn'), _start_worker)
      examples = stack.enter_context(pool).map(make, range(count), chunksize=max(1, min(64, count // (4 * workers))))
      stack.callback(pool.shutdown, wait=False, cancel_futures=True)
    try:
      for done, tokens in enumerate(examples, 1):
        yield tokens
        if time.monotonic() - said > REPORT_SECONDS:
          said = time.monotonic()
          rate = done / (said - start)
          logging.info('zebra %s: %d of %d puzzles, %.0f a second, %s left', recipe.split, done, count, rate,
                       _duration((count - done) / rate))  # fmt: skip
    except concurrent.futures.process.BrokenProcessPool:
      raise UserError(
        f'one of the {workers} processes that generate puzzles was killed, by a lack of memory perhaps: start again '
        'with fewer, task.num_workers'
      ) from None
  if said > start:
    logging.info('zebra %s: %d puzzles in %s', recipe.split, count, _duration(time.monotonic() - start))


def _start_worker() -> None:
  """Leave Ctrl-C to the parent, and end with it even when it is killed."""
  signal.signal(signal.SIGINT, signal.SIG_IGN)

  def follow():
    multiprocessing.parent_process().join()
    os._exit(1)

  threading.Thread(target=follow, daemon=True).start()


def _duration(seconds: float) -> str:
  minutes, seconds = divmod(round(seconds), 60)
  return f'{minutes // 60} h {minutes % 60:02d} min' if minutes >= 60 else f'{minutes}:{seconds:02d} min'


# --- released puzzles -------------------------------------------------------------------------------------------------


def released_puzzles(cfg, split: str):
  """Yield the released puzzles of a split and of the config's sizes as ids.

  A folder holds the published training and test sets: validation is the share of the training set that `split_of` gives
  it, and what occurs in the test set is left out of both. A single file is split by `split_of` alone.
  """
  files = released.files(cfg.path)
  limit = {'train': cfg.num_train, 'validation': cfg.num_validation, 'test': cfg.num_test}[split]
  held_out = set()
  if 'all' not in files and split != 'test':
    logging.info('zebra: reading %s for what must not be trained on', files['test'])
    held_out = {identity(p.clues, len(p.table[0]), len(p.table) - 1) for p in released.read(files['test'])}
  file = files.get('all') or files['test' if split == 'test' else 'train']
  logging.info('zebra: reading %s', file)
  done, skipped, said = 0, 0, time.monotonic()
  for number, puzzle in enumerate(released.read(file)):
    if time.monotonic() - said > REPORT_SECONDS:
      said = time.monotonic()
      logging.info('zebra %s: %d puzzles taken of %d read', split, done, number)
    size = houses, attributes = len(puzzle.table[0]), len(puzzle.table) - 1
    if not (cfg.min_houses <= houses <= cfg.max_houses and cfg.min_attributes <= attributes <= cfg.max_attributes):
      continue
    if 'all' in files:
      fits = split_of(puzzle.clues, *size) == split
    else:
      fits = split == 'test' or (split == 'validation') == (split_of(puzzle.clues, *size) == 'validation')
    if not fits:
      continue
    ids = to_ids(puzzle)
    if identity(puzzle.clues, *size) in held_out or len(ids) > longest(cfg):
      skipped += 1
      continue
    yield ids
    done += 1
    if done == limit:
      break
  if skipped:
    logging.info('zebra %s: left out %d puzzles, in the test set too or too long', split, skipped)
  if not done:
    raise UserError(f'task.path={cfg.path}: no puzzle of the {split} split has the sizes that the config asks for')


def _released_name(cfg, split: str) -> str:
  files = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns)
           for file in released.files(cfg.path).values()]  # fmt: skip
  sizes = cfg.min_houses, cfg.max_houses, cfg.min_attributes, cfg.max_attributes
  what = repr((files, sizes, cfg.num_train, cfg.num_validation, cfg.num_test)).encode()
  return f'zebra-released-{split}-{hashlib.blake2b(what, digest_size=8).hexdigest()}'


class Compact:
  """Sequences of bytes, back to back: 200 bytes a puzzle."""

  def __init__(self, sequences):
    self._flat, self._ends = bytearray(), array.array('q', [0])
    for tokens in sequences:
      self._flat += tokens.tobytes()
      self._ends.append(len(self._flat))

  def __len__(self) -> int:
    return len(self._ends) - 1

  def __getitem__(self, index: int) -> np.ndarray:
    return np.frombuffer(self._flat, np.uint8, self._ends[index + 1] - self._ends[index], self._ends[index])


# --- the source -------------------------------------------------------------------------------------------------------


class Source:
  """Random access to the puzzles of one split: released, cached on disk, or generated when asked for and then kept."""

  def __init__(self, cfg, split: str):
    check(cfg)
    self.cfg, self.split = cfg, split
    self.size = {'train': cfg.num_train, 'validation': cfg.num_validation, 'test': cfg.num_test}[split]
    self.endless = split == 'train' and not cfg.num_train and not cfg.path
    self._recipe = Recipe.of(cfg, split)
    self._stored, self._kept = None, {}
    if cfg.path and cfg.cache:
      self._stored = builders.prepared(cfg.cache, _released_name(cfg, split), lambda: released_puzzles(cfg, split))
    elif cfg.path:
      self._stored = Compact(released_puzzles(cfg, split))
    elif cfg.cache:
      recipe, size, workers = self._recipe, self.size, cfg.num_workers  # without self, which holds what is made
      self._stored = builders.prepared(cfg.cache, recipe.name(size), lambda: generate(recipe, size, workers))
    if self._stored is not None:
      self.size = len(self._stored)

  def __len__(self) -> int:
    return 2**62 if self.endless else self.size

  def puzzle(self, index: int) -> Puzzle:
    """A generated puzzle, clues, table and all."""
    return draw(self._recipe, index)

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    if self._stored is not None:
      return to_example(self._stored[index], self.cfg.order)
    if index in self._kept:
      return to_example(self._kept[index], self.cfg.order)
    ids = _draw_ids(self._recipe, index)
    if not self.endless:
      self._kept[index] = ids
    return to_example(ids, self.cfg.order)


source = Source


# --- tokens and text --------------------------------------------------------------------------------------------------


def to_ids(puzzle: Puzzle) -> np.ndarray:
  """A puzzle as ids, uint8; the cells in the order of solving."""
  cells = [str(number) for fill in puzzle.fills for number in fill]
  ids = [CLS, *TOKENIZER.ids(to_words(puzzle.clues)), BOS, *TOKENIZER.ids(cells)]
  return np.array(ids, np.uint8)


def to_example(ids: np.ndarray, order: str = 'solver') -> dict[str, np.ndarray]:
  """Ids as an example: everything up to [BOS] is fixed."""
  tokens = ids.astype(np.int32)
  prompt = int(np.argmax(tokens == BOS)) + 1
  if order == 'sorted':
    tokens[prompt:] = np.ravel(sorted(tokens[prompt:].reshape(-1, 3).tolist()))
  return {'tokens': tokens, 'fixed': np.arange(len(tokens)) < prompt}


def score(predicted: np.ndarray, reference: np.ndarray, cfg) -> dict[str, tuple[float, float]]:
  """Compare free tokens, read in threes.

  `exact_match`: the same set of cells, in any order. `iou`: cells in both over cells in either. `token_accuracy`: right
  tokens over the reference's positions, so it depends on the order.
  """
  del cfg
  found, wanted = _cells(predicted), _cells(reference)
  common = min(len(predicted), len(reference))
  right = int((predicted[:common] == reference[:common]).sum())
  return {
    'exact_match': (float(found == wanted), 1.0),
    'iou': (len(found & wanted) / max(1, len(found | wanted)), 1.0),
    'token_accuracy': (float(right), float(len(reference))),
  }


def _cells(tokens) -> set[tuple[int, ...]]:
  return {tuple(map(int, tokens[i : i + 3])) for i in range(0, len(tokens), 3)}


def encode_prompt(text: str, cfg) -> list[int]:
  """The given tokens of clues (what follows ANSWER is left out), once they are known to make a puzzle.

  Raises:
    UserError: an unknown word, a malformed clue, a size the config does not have, clues that contradict each other,
      or too few of them to go on by.
  """
  words = text.split()
  words = words[: words.index('ANSWER')] if 'ANSWER' in words else words
  ids = TOKENIZER.ids(words)
  if not words:
    raise UserError('the prompt is empty: expected clues, such as `= LHS n 0 0 RHS c 0 1 CLUE_END`')
  check_puzzle(from_words(words), cfg)
  return [CLS, *ids, BOS]


def check_puzzle(clues, cfg) -> None:
  """Refuse clues that the solver cannot turn into a table. Clues need not name the last value, so two sizes are tried.

  Raises:
    UserError: see encode_prompt.
  """
  attributes = max(row for clue in clues for row, _ in clue.refs)
  houses = max(cfg.min_houses, 1 + max(value for clue in clues for _, value in clue.refs))
  if houses > cfg.max_houses or not cfg.min_attributes <= attributes <= cfg.max_attributes:
    raise UserError(
      f'the clues speak of {houses} houses and {attributes} attributes or more: expected {cfg.min_houses} to '
      f'{cfg.max_houses} houses and {cfg.min_attributes} to {cfg.max_attributes} attributes'
    )
  verdicts = []
  for size in range(houses, min(houses + 1, cfg.max_houses) + 1):
    verdict = _verdict(clues, size, attributes)
    if verdict is None:
      return
    verdicts.append(verdict)
  raise UserError(verdicts[0])


def _verdict(clues, houses: int, attributes: int) -> str | None:
  """What is wrong with a puzzle, None if nothing."""
  wrong = f'the clues contradict each other: no table of {houses} houses and {attributes} attributes fits them all'
  try:
    solver = solve(clues, houses, attributes)
    if not solver.solved and any_table(clues, houses, attributes) is None:
      return wrong
  except Contradiction:
    return wrong
  except TimeoutError:
    pass
  if solver.solved:
    return None if answers(solver.table(), clues) else wrong
  return (
    f'the clues cannot be solved: the solver stops at {len(solver.fills)} of {houses * attributes} cells '
    f'({houses} houses, {attributes} attributes); add clues'
  )


def decode(tokens, cfg) -> str:
  """A row as text."""
  del cfg
  return ' '.join('ANSWER' if word == '[BOS]' else word for word in TOKENIZER.pieces(tokens[1:]))


TASK = Task(
  name='zebra',
  tokenizer=tokenizer,
  source=Source,
  longest=longest,
  longest_answer=longest_answer,
  encode_prompt=encode_prompt,
  decode=decode,
  score=score,
  chance=chance,
)
