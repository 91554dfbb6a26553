"""Infill requests: encode a text with gaps for the sampler, and decode the sampled tokens to the filled text.

A text with G gaps is given as the G + 1 parts around the gaps, some of which may be empty. The result is part, filling,
part, ..., with every part preserved character for character. Most tokenizers attach a space to the token that follows
it. Therefore the spaces at the end of a part before a gap are not tokenized, and spaces that the adjacent parts already
contain are stripped from a filling.
"""

from typing import NamedTuple

import numpy as np

from ilm_jax.special_tokens import BOS, CLS, MASK
from ilm_jax.types import UNLIMITED, UserError

MARKER = '___'
CONTEXT = 8  # tokens left of a filling that are decoded together with the filling


class Gaps(NamedTuple):
  """An infill request: a text with gaps, and limits on the length of each filling."""

  parts: list[str]  # the given text around the gaps, one part more than there are gaps
  least: list[int]  # minimum number of tokens in each gap
  most: list[int]  # maximum number of tokens in each gap


class Filled(NamedTuple):
  """A text with its gaps filled."""

  text: str
  fillings: list[str]  # generated text in each gap
  spans: list[tuple[int, int]]  # (start, end) offset of each filling in the text, in characters


def parse_request(text, *, marker: str = MARKER, least=None, most=None, default_least: int = 1) -> Gaps:
  """Check a text with gaps and its length limits, in the form that `LanguageModel.infill` takes; return the request.

  A `least` of None means `default_least`, or `most` if `most` is smaller. UserError: there is no gap, adjacent gaps
  have no text between them, or the limits contradict each other.
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
      raise UserError(f'expected a text, or a list of the parts around its gaps, got {repr(text)[:60]}')
    if len(parts) < 2:
      raise UserError(f'no gap: expected at least two parts, got {len(parts)}; for a gap at an end, add an empty part')
  for i, part in enumerate(parts[1:-1], 1):
    if not part.strip():
      raise UserError(f'gaps {i} and {i + 1} have only whitespace between them: merge them into one gap')
  least, most = _numbers(least, len(parts) - 1, 'least'), _numbers(most, len(parts) - 1, 'most')
  for i, limits in enumerate(zip(least, most, strict=True), 1):
    given = {name: n for name, n in zip(('least', 'most'), limits, strict=True) if n is not None}
    if [0, *given.values()] != sorted([0, *given.values()]):
      words = ', '.join(f'{name}={n}' for name, n in given.items())
      raise UserError(f'gap {i} has {words}: expected 0 <= least <= most')
  most = [UNLIMITED if n is None else n for n in most]
  least = [min(default_least, high) if n is None else n for n, high in zip(least, most, strict=True)]
  return Gaps(parts, least, most)


def _numbers(value, count: int, name: str) -> list:
  """Return a list with the length limit of each gap, given one number for all gaps or a list with one per gap."""
  values = list(value) if isinstance(value, (list, tuple)) else [value] * count
  if len(values) != count:
    raise UserError(f'{name}={values}: expected one number, or a list with one for each of the {count} gaps')
  for number in values:
    if number is not None and (isinstance(number, bool) or not isinstance(number, (int, np.integer))):
      raise UserError(f'{name}={number!r}: expected a whole number of tokens')
  return values


def encode(gaps: Gaps, tokenizer, *, limit: int, masks: bool = False) -> dict:
  """Convert an infill request to the sampler's input: tokens, open gaps (which accept insertions), and length limits.

  With `masks`, for a masked diffusion model, each gap is filled with [MASK] tokens instead and needs least == most.
  UserError: two gaps have no token between them, or the text with the minimum fillings exceeds `limit` tokens.
  """
  if masks:
    for i, (low, high) in enumerate(zip(gaps.least, gaps.most, strict=True), 1):
      if low != high:
        raise UserError(f'gap {i}: this model replaces a fixed number of [MASK] tokens: set least equal to most')
  tokens, open_at = [CLS, BOS], []  # open_at: for each gap, the position of the last token before the gap
  for i, part in enumerate(gaps.parts[:-1]):
    ids = tokenizer.encode(part.rstrip(' '))
    if i > 0 and not ids:
      raise UserError(f'gaps {i} and {i + 1} have no token between them ({part!r}): merge them into one gap')
    tokens += ids
    open_at.append(len(tokens) - 1)
    if masks and len(tokens) + gaps.least[i] <= limit:
      tokens += [MASK] * gaps.least[i]
  tokens += tokenizer.encode(gaps.parts[-1])
  num_given = len(tokens) - tokens.count(MASK) * masks
  if num_given + sum(gaps.least) > limit or (num_given == limit and not masks):
    needed = f'{num_given} given tokens and at least {sum(gaps.least)} in the gaps'
    raise UserError(f'{needed} do not fit within sampling.max_length={limit}: shorten the text, or raise the limit')
  tokens = np.array(tokens, np.int32)
  if masks:
    return {'tokens': tokens, 'open': np.zeros(len(tokens), bool), 'free': 0}
  least, most = np.zeros(len(tokens), np.int32), np.zeros(len(tokens), np.int32)
  least[open_at], most[open_at] = gaps.least, [min(n, UNLIMITED) for n in gaps.most]
  given = {'tokens': tokens, 'open': np.isin(np.arange(len(tokens)), open_at)}
  if any(gaps.least):
    given['least'] = least
  if any(n < UNLIMITED for n in gaps.most):
    given['most'] = most
  return given


def decode(gaps: Gaps, row: dict, tokenizer) -> Filled:
  """Convert a row that was sampled for an infill request (its 'tokens' and their 'order') to the filled text."""
  fillings = []
  for ids, context in _fillings(gaps, row, tokenizer):
    before, whole = tokenizer.decode(context), tokenizer.decode(context + ids)
    fillings.append(whole[len(before) :] if whole.startswith(before) else tokenizer.decode(ids))
  text, spans = gaps.parts[0], []
  for i, (left, right) in enumerate(zip(gaps.parts, gaps.parts[1:], strict=False)):
    if left[-1:].isspace() or (i == 0 and not left):
      fillings[i] = fillings[i].lstrip(' ')
    if right[:1].isspace():
      fillings[i] = fillings[i].rstrip(' ')
    spans.append((len(text), len(text) + len(fillings[i])))
    text += fillings[i] + right
  return Filled(text, fillings, spans)


def _fillings(gaps: Gaps, row: dict, tokenizer):
  """For each gap, yield (ids of the inserted tokens, ids of up to CONTEXT tokens to the left of the gap)."""
  # `found` maps the number of given tokens to the left of a gap to the (start, token ids) of its filling.
  tokens, num_given, found = row['tokens'].tolist(), 0, {}
  for position, (token, order) in enumerate(zip(tokens, row['order'].tolist(), strict=True)):
    num_given += order < 0
    if order >= 0:
      found.setdefault(num_given, (position, []))[1].append(token)
  num_left = 2  # number of given tokens left of the gap, including [CLS] and [BOS]
  for part in gaps.parts[:-1]:
    num_left += len(tokenizer.encode(part.rstrip(' ')))
    position, ids = found.get(num_left, (0, []))
    yield ids, tokens[max(2, position - CONTEXT) : position]
