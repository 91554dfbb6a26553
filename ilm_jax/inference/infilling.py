"""Texts with gaps: from a user's parts to a prompt with open gaps, and from a sampled row back to the user's text.

A text with G gaps is G + 1 parts, some of them perhaps empty. The parts come back as they are, character for character:
the result is part, filling, part, ... The tokenizer sees a part without the spaces before a gap, because the tokens of
most begin with their space; a filling loses the spaces that the parts around it have already.
"""

from typing import NamedTuple

import numpy as np

from ilm_jax.special_tokens import BOS, CLS, MASK
from ilm_jax.types import UNLIMITED, UserError

MARKER = '___'
CONTEXT = 8  # tokens to the left with which a filling is decoded


class Gaps(NamedTuple):
  """A text with gaps, and how many tokens each may take."""

  parts: list[str]
  least: list[int]
  most: list[int]


class Filled(NamedTuple):
  """A text whose gaps were filled."""

  text: str
  fillings: list[str]
  spans: list[tuple[int, int]]  # of each filling in the text, in characters


def read(text, *, marker: str = MARKER, least=None, most=None, usual: int = 1) -> Gaps:
  """Check a request.

  Args:
    text: with `marker` at each gap; or the list of the parts around the gaps.
    marker: of a gap.
    least: tokens of a gap, at least; one number, or one for each gap; None: `usual`, or `most` if that is less.
    most: tokens of a gap, at most; None: no limit.
    usual: see `least`.

  Raises:
    UserError: no gap, gaps with nothing between them, or numbers that contradict each other.
  """
  if isinstance(text, str):
    if not marker:
      raise UserError("the marker of a gap is empty: expected a string such as '___'")
    parts = text.split(marker)
    if len(parts) == 1:
      raise UserError(f'no gap: expected {marker!r} in the text, got {text[:60]!r}')
  else:
    parts = list(text) if isinstance(text, (list, tuple)) else [None]
    if not all(isinstance(part, str) for part in parts):
      raise UserError(f'expected a text, or the list of its parts around the gaps, got {repr(text)[:60]}')
    if len(parts) < 2:
      raise UserError(f'no gap: expected at least two parts, got {len(parts)} (an empty one for a gap at an end)')
  for i, part in enumerate(parts[1:-1], 1):
    if not part.strip():
      raise UserError(f'gaps {i} and {i + 1} have nothing but space between them: make them one')
  gaps = len(parts) - 1
  least, most = _numbers(least, gaps, 'least'), _numbers(most, gaps, 'most')
  most = [UNLIMITED if n is None else min(n, UNLIMITED) for n in most]
  least = [min(usual, max(high, 0)) if n is None else n for n, high in zip(least, most, strict=True)]
  for i, (low, high) in enumerate(zip(least, most, strict=True), 1):
    if not 0 <= low <= high:
      raise UserError(f'gap {i} has least={low}, most={high}: expected 0 <= least <= most')
  return Gaps(parts, least, most)


def _numbers(value, gaps: int, name: str) -> list:
  values = list(value) if isinstance(value, (list, tuple)) else [value] * gaps
  if len(values) != gaps:
    raise UserError(f'{name}={values}: expected one number, or one for each of the {gaps} gaps')
  for number in values:
    if number is not None and (isinstance(number, bool) or not isinstance(number, (int, np.integer))):
      raise UserError(f'{name}={number!r}: expected a whole number of tokens')
  return values


def encode(gaps: Gaps, tokenizer, *, limit: int, masks: bool = False) -> dict:
  """The prompt of a request: tokens, open gaps, and their limits.

  Args:
    gaps: the request.
    tokenizer: of the model.
    limit: tokens of a row, at most.
    masks: put as many [MASK]s as tokens are asked for into each gap, for a model that replaces them.

  Raises:
    UserError: no token between two gaps, or no room for the least numbers of tokens.
  """
  if masks:
    for i, (low, high) in enumerate(zip(gaps.least, gaps.most, strict=True), 1):
      if low != high:
        raise UserError(
          f'gap {i}: this model replaces a known number of [MASK]s: give least and most, and make them equal'
        )
  tokens, at = [CLS, BOS], []
  for i, part in enumerate(gaps.parts):
    last = i == len(gaps.parts) - 1
    ids = tokenizer.encode(part if last else part.rstrip(' '))
    if i > 0 and not last and not ids:
      raise UserError(f'gaps {i} and {i + 1} have no token between them ({part!r}): make them one')
    tokens += ids
    if last:
      continue
    at.append(len(tokens) - 1)
    if masks and len(tokens) + gaps.least[i] <= limit:
      tokens += [MASK] * gaps.least[i]
  given = len(tokens) - tokens.count(MASK) * masks
  if given + sum(gaps.least) > limit or (given == limit and not masks):
    raise UserError(
      f'a text of {given} tokens and at least {sum(gaps.least)} to come leaves no room in '
      f'sampling.max_length={limit}: shorten it, or raise the limit'
    )
  tokens = np.array(tokens, np.int32)
  if masks:
    return {'tokens': tokens, 'open': np.zeros(len(tokens), bool), 'free': 0}
  least, most = np.zeros(len(tokens), np.int32), np.zeros(len(tokens), np.int32)
  least[at], most[at] = gaps.least, gaps.most
  given = {'tokens': tokens, 'open': np.isin(np.arange(len(tokens)), at)}
  if any(gaps.least):
    given['least'] = least
  if any(n != UNLIMITED for n in gaps.most):
    given['most'] = most
  return given


def decode(gaps: Gaps, row: dict, tokenizer) -> Filled:
  """The text of a sampled row, from the user's own parts and the tokens that came in between."""
  tokens, new = row['tokens'].tolist(), (row['order'] >= 0).tolist()
  fillings = []
  for ids, left in _runs(gaps, tokens, new, tokenizer):
    before = tokenizer.decode(left)
    whole = tokenizer.decode(left + ids)
    fillings.append(whole[len(before) :] if whole.startswith(before) else tokenizer.decode(ids))
  for i, (left, right) in enumerate(zip(gaps.parts, gaps.parts[1:], strict=False)):
    if left[-1:].isspace() or (i == 0 and not left):
      fillings[i] = fillings[i].lstrip(' ')
    if right[:1].isspace():
      fillings[i] = fillings[i].rstrip(' ')
  text, spans = gaps.parts[0], []
  for filling, part in zip(fillings, gaps.parts[1:], strict=True):
    spans.append((len(text), len(text) + len(filling)))
    text += filling + part
  return Filled(text, fillings, spans)


def _runs(gaps: Gaps, tokens: list[int], new: list[bool], tokenizer):
  """For each gap, the tokens that came into it, and those to the left of it."""
  given, runs = -1, {}
  for place, (token, fresh) in enumerate(zip(tokens, new, strict=True)):
    given += not fresh
    if fresh:
      runs.setdefault(given, (place, []))[1].append(token)
  count = 2
  for part in gaps.parts[:-1]:
    count += len(tokenizer.encode(part.rstrip(' ')))
    place, ids = runs.get(count - 1, (0, []))
    yield ids, tokens[max(2, place - CONTEXT) : place]
