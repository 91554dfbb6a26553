"""Zebra puzzles (Shah et al. 2024; arXiv 2505.05755): which house has which value of each attribute, given clues.

The answer lists the cells of the table: `[CLS] clues [BOS] attribute house value attribute house value ...`. They are
in the order in which a solver fills them (`task.order=solver`) or sorted (`task.order=sorted`).

Text form of prompts and answers: `KIND LHS ref RHS ref CLUE_END ... ANSWER attribute house value ...`, see clues.py.
"""

import math

import numpy as np

from ilm_jax.data import file_hashes
from ilm_jax.special_tokens import BOS, CLS
from ilm_jax.tasks.contract import Task
from ilm_jax.tasks.zebra.clues import from_words, is_solution
from ilm_jax.tasks.zebra.solver import Contradiction, find_table, solve
from ilm_jax.tasks.zebra.source import TOKENIZER, Source, max_tokens, released_hashes
from ilm_jax.types import UserError


def chance(cfg) -> float:
  """Return the exact-match accuracy to expect if each row is a random permutation, averaged over puzzle sizes."""
  houses, attributes = (range(cfg[f'min_{what}'], cfg[f'max_{what}'] + 1) for what in ('houses', 'attributes'))
  return float(np.mean([math.factorial(n) ** -m for n in houses for m in attributes]))


def score(predicted: np.ndarray, reference: np.ndarray, cfg) -> dict[str, tuple[float, float]]:
  """Return {metric: (total, weight)} of an answer; each cell of the table is three tokens.

  `exact_match` and `iou` (intersection over union) compare the sets of cells, `token_accuracy` the tokens in order.
  """
  predicted_cells, reference_cells = _cells(predicted), _cells(reference)
  num_correct = sum(a == b for a, b in zip(predicted, reference, strict=False))
  return {
    'exact_match': (float(predicted_cells == reference_cells), 1.0),
    'iou': (len(predicted_cells & reference_cells) / max(1, len(predicted_cells | reference_cells)), 1.0),
    'token_accuracy': (float(num_correct), float(len(reference))),
  }


def _cells(tokens) -> set[tuple[int, ...]]:
  return {tuple(map(int, tokens[i : i + 3])) for i in range(0, len(tokens), 3)}


def encode_prompt(text: str, cfg) -> list[int]:
  """Return the token ids of a prompt, after checking that its clues are solvable; text after `ANSWER` is ignored."""
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
    raise UserError(f'the clues need at least {houses} houses and {attributes} attributes: expected {cfg.min_houses} '
                    f'to {cfg.max_houses} houses, {cfg.min_attributes} to {cfg.max_attributes} attributes')  # fmt: skip
  problems = [_problem(clues, size, attributes) for size in range(houses, min(houses + 1, cfg.max_houses) + 1)]
  if all(problems):
    raise UserError(problems[0])


def _problem(clues, houses: int, attributes: int) -> str | None:
  """Return an error message if the clues contradict each other or the solver cannot fill the table, else None."""
  size = f'{houses} houses and {attributes} attributes'
  contradiction = f'the clues contradict each other: no table of {size} satisfies them all'
  try:
    solver = solve(clues, houses, attributes)
    if solver.solved:
      return None if is_solution(solver.table(), clues) else contradiction
    if find_table(clues, houses, attributes) is None:
      return contradiction
  except Contradiction:
    return contradiction
  except TimeoutError:
    pass  # the backtracking search gave up before it found a table or proved a contradiction
  return (f'the clues cannot be solved: the solver fills {len(solver.filled_cells)} of {houses * attributes} cells (of '
          f'{size}) and then stops; add clues')  # fmt: skip


def decode(tokens, cfg) -> str:
  """Return the text of the token ids of a prompt and its answer."""
  return ' '.join('ANSWER' if word == '[BOS]' else word for word in TOKENIZER.pieces(tokens[1:]))


def save_assets(cfg, folder) -> None:
  """Warn if the released files have changed since the run in this folder was last started."""
  if cfg.path:
    file_hashes.check_unchanged(folder, released_hashes(cfg), f'task.path={cfg.path}')


TASK = Task(
  name='zebra', source=Source, encode_prompt=encode_prompt, decode=decode, score=score, chance=chance,
  save_assets=save_assets,
  tokenizer=lambda cfg: TOKENIZER,
  longest=lambda cfg: max_tokens(cfg.max_houses, cfg.max_attributes),  # longer puzzles are discarded
  longest_answer=lambda cfg: 3 * cfg.max_houses * cfg.max_attributes,  # three tokens for each cell of the largest table
)  # fmt: skip
