"""Zebra puzzles as token ids: `[CLS] clues [BOS] attribute house value attribute house value ...`."""

import numpy as np

from ilm_jax.data.tokenizers import WordTokenizer
from ilm_jax.special_tokens import BOS, CLS
from ilm_jax.tasks.zebra.clues import DIGITS, Puzzle, to_words

# The order of the words determines their ids: '0' is 7, 'LHS' is 24.
WORDS = (
  *(*DIGITS, 'nbr', 'left-of', 'inbetween', 'immediate-left', 'ends', '!=', '='),
  *('c', 'n', 'CLUE_END', 'RHS', 'LHS'),
)
TOKENIZER = WordTokenizer(WORDS)


def max_tokens(houses: int, attributes: int) -> int:
  """Return the maximum number of tokens of a puzzle; none of 16,000 generated puzzles was longer."""
  return 64 + 11 * houses * attributes


def to_ids(puzzle: Puzzle) -> np.ndarray:
  """Return the token ids of a puzzle's clues and answer as uint8[n], with the cells in the solver's order."""
  digits = [str(number) for cell in puzzle.cells for number in cell]
  ids = [CLS, *TOKENIZER.ids(to_words(puzzle.clues)), BOS, *TOKENIZER.ids(digits)]
  return np.array(ids, np.uint8)


def to_example(ids: np.ndarray, order: str = 'solver') -> dict[str, np.ndarray]:
  """Make an example from a puzzle's token ids; tokens up to [BOS] are fixed, and order='sorted' sorts the cells."""
  tokens = ids.astype(np.int32)
  prompt_length = int(np.argmax(tokens == BOS)) + 1
  if order == 'sorted':
    tokens[prompt_length:] = np.ravel(sorted(tokens[prompt_length:].reshape(-1, 3).tolist()))
  return {'tokens': tokens, 'fixed': np.arange(len(tokens)) < prompt_length}
