"""Zebra puzzles (Shah et al. 2024; arXiv 2505.05755): which house has which value of each attribute, given clues.

The answer lists the cells of the table: `[CLS] clues [BOS] attribute house value attribute house value ...`. They are
in the order in which a solver fills them (`task.order=solver`) or sorted (`task.order=sorted`).

Text form of prompts and answers: `KIND LHS ref RHS ref CLUE_END ... ANSWER attribute house value ...`, see clues.py.
"""

import math

import numpy as np

from ilm_jax.data import file_hashes
from ilm_jax.data.tokenizers import WordTokenizer
from ilm_jax.special_tokens import BOS, CLS
from ilm_jax.tasks.contract import Task
from ilm_jax.tasks.zebra.clues import from_words, is_solution
from ilm_jax.tasks.zebra.encoding import TOKENIZER, max_tokens
from ilm_jax.tasks.zebra.solver import Contradiction, find_table, solve
from ilm_jax.tasks.zebra.source import Source, released_hashes
from ilm_jax.types import UserError


def tokenizer(cfg) -> WordTokenizer:
  """Return the tokenizer of the 18 words of clues and answers."""
  del cfg
  return TOKENIZER


def longest(cfg) -> int:
  """Return the maximum number of tokens of an example; longer puzzles are discarded."""
  return max_tokens(cfg.max_houses, cfg.max_attributes)


def longest_answer(cfg) -> int:
  """Return the maximum number of tokens of an answer: three per cell of the largest table."""
  return 3 * cfg.max_houses * cfg.max_attributes


def chance(cfg) -> float:
  """Return the expected exact match accuracy of answers with random permutations, averaged over puzzle sizes."""
  houses, attributes = (range(cfg[f'min_{what}'], cfg[f'max_{what}'] + 1) for what in ('houses', 'attributes'))
  return float(np.mean([math.factorial(n) ** -m for n in houses for m in attributes]))


def score(predicted: np.ndarray, reference: np.ndarray, cfg) -> dict[str, tuple[float, float]]:
  """Compare the tokens of a predicted answer with the reference answer; every three tokens are one cell.

  Returns:
    {metric: (total, weight)}. `exact_match`: whether the sets of cells are equal, in any order. `iou`: intersection
    over union of the sets of cells. `token_accuracy`: fraction of the reference's positions with the correct token.
  """
  del cfg
  predicted_cells, reference_cells = _cells(predicted), _cells(reference)
  common = min(len(predicted), len(reference))
  num_correct = int((predicted[:common] == reference[:common]).sum())
  return {
    'exact_match': (float(predicted_cells == reference_cells), 1.0),
    'iou': (len(predicted_cells & reference_cells) / max(1, len(predicted_cells | reference_cells)), 1.0),
    'token_accuracy': (float(num_correct), float(len(reference))),
  }


def _cells(tokens) -> set[tuple[int, ...]]:
  return {tuple(map(int, tokens[i : i + 3])) for i in range(0, len(tokens), 3)}


def encode_prompt(text: str, cfg) -> list[int]:
  """Return the token ids of a prompt, after checking that its clues are solvable; text after `ANSWER` is ignored.

  Raises:
    UserError: the prompt is empty or malformed or has an unknown word, the puzzle's size is outside the config's range,
      or the clues contradict each other or are too few for the solver.
  """
  words = text.split()
  words = words[: words.index('ANSWER')] if 'ANSWER' in words else words
  ids = TOKENIZER.ids(words)
  if not words:
    raise UserError('the prompt is empty: expected clues, such as `= LHS n 0 0 RHS c 0 1 CLUE_END`')
  check_solvable(from_words(words), cfg)
  return [CLS, *ids, BOS]


def check_solvable(clues, cfg) -> None:
  """Raise UserError if the solver cannot determine the whole table from the clues.

  The clues need not mention the largest value, so there may be one house more than they mention; both sizes are tried.
  """
  attributes = max(row for clue in clues for row, _ in clue.refs)
  houses = max(cfg.min_houses, 1 + max(value for clue in clues for _, value in clue.refs))
  if houses > cfg.max_houses or not cfg.min_attributes <= attributes <= cfg.max_attributes:
    raise UserError(
      f'the clues need at least {houses} houses and {attributes} attributes: expected {cfg.min_houses} to '
      f'{cfg.max_houses} houses and {cfg.min_attributes} to {cfg.max_attributes} attributes'
    )
  problems = []
  for size in range(houses, min(houses + 1, cfg.max_houses) + 1):
    problem = _problem(clues, size, attributes)
    if problem is None:
      return
    problems.append(problem)
  raise UserError(problems[0])


def _problem(clues, houses: int, attributes: int) -> str | None:
  """Return an error message if the clues contradict each other or the solver cannot fill the table, else None."""
  contradiction = (
    f'the clues contradict each other: no table of {houses} houses and {attributes} attributes satisfies them all'
  )
  try:
    solver = solve(clues, houses, attributes)
    if not solver.solved and find_table(clues, houses, attributes) is None:
      return contradiction
  except Contradiction:
    return contradiction
  except TimeoutError:
    pass  # the backtracking search gave up before it found a table or proved a contradiction
  if solver.solved:
    return None if is_solution(solver.table(), clues) else contradiction
  return (
    f'the clues cannot be solved: the solver fills {len(solver.filled_cells)} of {houses * attributes} cells '
    f'({houses} houses, {attributes} attributes) and then stops; add clues'
  )


def decode(tokens, cfg) -> str:
  """Return the text of the token ids of a prompt and its answer."""
  del cfg
  return ' '.join('ANSWER' if word == '[BOS]' else word for word in TOKENIZER.pieces(tokens[1:]))


def save_assets(cfg, folder) -> None:
  """Warn if the released files have changed since the run in this folder was last started."""
  if cfg.path:
    file_hashes.check_unchanged(folder, released_hashes(cfg), f'task.path={cfg.path}')


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
  save_assets=save_assets,
)
