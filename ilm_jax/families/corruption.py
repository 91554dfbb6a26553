"""What each family does to an example on the host, in numpy alone (the data workers never touch an accelerator).

An example is {'tokens': int32[n], 'fixed': bool[n]}: [CLS] first; fixed tokens (prompt, [BOS], the text around a gap)
are never dropped or masked. A corrupted example is a dict of arrays of variable length, ready to be packed:

    tokens, open          what is left, in order, and whether a token may be inserted to the right of each
    target_gap            for each dropped token, the index (in `tokens`) of the nearest kept token to its left; for a
                          masked one, of its [MASK]
    target_token          ... and its id
    length, free          number of tokens, and of free ones, before the corruption and its padding
    target_weight         (1 where left out) of each target in the loss
    noise                 (0 where left out) noise level that the model is told
"""

import math

import numpy as np

from ilm_jax.special_tokens import EOS, MASK, PAD
from ilm_jax.types import UserError

SHORTEST_TIME = 1e-3  # of masked diffusion: the weight of a target is 1 / time


def ilm(rng: np.random.Generator, example, cfg, u: float | None = None) -> dict:
  """Drop a uniform subset of uniform size n ~ U{0..L} of the L free tokens.

  Worked example: `CLS p BOS a b c d` with b and c dropped keeps `CLS p BOS a d`, with target_gap [3, 3] and
  target_token [b, c].

  Args:
    rng: the example's own generator.
    example: see above.
    cfg: `close_prompt` closes the gaps inside the prompt in the training softmax (the reference leaves them open).
      `infill`: the share of the examples of which only a few stretches are free, as they are when a model fills gaps;
      their other gaps are closed. (The reference closes each gap in which nothing is missing at the moment; a sampler
      cannot know those.) With `model.open_gap_embedding`, the model is told which gaps are open, as the reference's is.
    u: a number in [0, 1) that decides n in place of a draw (stratified validation, of whole texts).
  """
  tokens, fixed = example['tokens'], example['fixed']
  share = cfg.get('infill_rate', 0.0)
  infill = u is None and share > 0 and rng.random() < share
  if infill:
    fixed = fixed | ~stretches(rng, ~fixed)
  free = np.flatnonzero(~fixed)
  n = int((rng.random() if u is None else u) * (len(free) + 1))
  keep = np.ones(len(tokens), bool)
  keep[rng.permutation(free)[:n]] = False
  dropped = np.flatnonzero(~keep)
  open_ = open_gaps(fixed) if cfg.close_prompt or infill else np.arange(len(tokens)) > 0
  return {
    'tokens': tokens[keep],
    'open': open_[keep],
    'target_gap': (np.cumsum(keep) - 1)[dropped].astype(np.int32),
    'target_token': tokens[dropped],
    'length': len(tokens),
    'free': len(free),
  }


def arm(rng: np.random.Generator, example, cfg, u: float | None = None) -> dict:
  """Every free token, and [EOS] behind the last, as the target of the token before it; nothing is dropped.

  For filling in the middle (Bavarian et al. 2022, arXiv 2207.14255), a stretch of tokens is moved behind the others,
  and a [MASK] takes its place; a second [MASK] comes before it. The [MASK]s are no targets.

  Worked example: `CLS a b c d`, of which b and c are the middle, becomes `CLS a MASK d MASK b c`, with the targets a,
  d, b, c and EOS, given the token to the left of each.

  Args:
    rng: the example's own generator.
    example: see above.
    cfg: `fim_rate`, the share of the examples that are rearranged: the middle lies between two uniform cuts of the free
      tokens. An example with given tokens behind free ones always is, and its free tokens are the middle.
    u: of a validation example, which is left in its order; else None.

  Raises:
    UserError: given tokens stand behind free ones, and `fim_rate` is 0, or the free tokens are not in one piece.
  """
  tokens, fixed = example['tokens'], example['fixed']
  free = np.flatnonzero(~fixed)
  before = {'length': len(tokens), 'free': len(free)}
  if len(free) and free[0] + len(free) != len(tokens):
    if not cfg.fim_rate:
      raise UserError(
        'family=arm writes from left to right, but an example has given tokens behind free ones: expected the free '
        'tokens last; use corrupt.fim_rate=0.5 (filling in the middle), or family=ilm or mdm'
      )
    if free[-1] - free[0] + 1 != len(free):
      raise UserError(
        'family=arm fills one gap of a text, but an example has free tokens in several places: use family=ilm or mdm'
      )
    tokens, place = rearrange(tokens, free[0], free[-1] + 1)
  elif cfg.fim_rate and u is None and rng.random() < cfg.fim_rate:
    first, past = sorted(len(tokens) - rng.integers(len(free), size=2, endpoint=True))
    tokens, place = rearrange(tokens, first, past)
  else:
    place = np.arange(len(tokens))
  free = np.sort(place[free])
  return {
    'tokens': tokens,
    'open': np.zeros(len(tokens), bool),
    'target_gap': np.append(free - 1, len(tokens) - 1).astype(np.int32),
    'target_token': np.append(tokens[free], EOS).astype(np.int32),
    **before,
  }


def rearrange(tokens: np.ndarray, first: int, past: int) -> tuple[np.ndarray, np.ndarray]:
  """Move the middle, tokens[first:past], behind the others, with a [MASK] in its place and another before it.

  Returns:
    The new tokens, and the index among them of each of the old ones.
  """
  prefix, middle, suffix = np.split(tokens, [first, past])
  mask = np.array([MASK], tokens.dtype)
  index = np.arange(len(tokens))
  moved = np.where(index < first, index, np.where(index < past, index + 2 + len(suffix), index + 1 - len(middle)))
  return np.concatenate([prefix, mask, suffix, mask, middle]), moved


def it(rng: np.random.Generator, example, cfg, u: float | None = None) -> dict:
  """Drop tokens as `ilm`; a gap with c of them has each as a target of weight 1 / (c + 1), an empty gap [EOS].

  Args:
    rng: the example's own generator.
    example: see above.
    cfg: `close_prompt` as for `ilm`; `eos_weight` of an empty gap's target.
    u: as for `ilm`.
  """
  out = ilm(rng, example, cfg, u)
  count = np.bincount(out['target_gap'], minlength=len(out['tokens']))
  empty = np.flatnonzero(out['open'] & (count == 0)).astype(np.int32)
  weight = 1 / (count[out['target_gap']] + 1)
  return out | {
    'target_gap': np.append(out['target_gap'], empty),
    'target_token': np.append(out['target_token'], np.full(len(empty), EOS, np.int32)),
    'target_weight': np.append(weight, np.full(len(empty), cfg.eos_weight)).astype(np.float32),
  }


def stretches(rng: np.random.Generator, free: np.ndarray, most: int = 3) -> np.ndarray:
  """Choose one to three stretches of the free tokens, with others between them, by uniform cuts; True inside."""
  where, chosen = np.flatnonzero(free), np.zeros(len(free), bool)
  number = min(int(rng.integers(1, most + 1)), (len(where) + 1) // 2)
  cuts = np.sort(rng.permutation(len(where) + 1)[: 2 * number])
  for first, past in cuts.reshape(-1, 2):
    chosen[where[first:past]] = True
  return chosen


def open_gaps(fixed: np.ndarray) -> np.ndarray:
  """Where a token may be inserted right of each token: beside free tokens only, never right of [CLS] (index 0)."""
  open_ = ~fixed | np.append(~fixed[1:], False)
  open_[0] = False
  return open_


def mdm(rng: np.random.Generator, example, cfg, u: float | None = None) -> dict:
  """Put [MASK] in the place of each free token with probability (1 - eps) t, at a time t ~ U(SHORTEST_TIME, 1].

  The log-linear schedule: noise level sigma(t) = -log(1 - (1 - eps) t), so that a token is masked with probability
  1 - exp(-sigma). A target weighs sigma'(t) / (exp(sigma(t)) - 1) = 1 / t.

  Args:
    rng: the example's own generator.
    example: see above.
    cfg: `length` pads the example to so many tokens with [PAD]s that are free tokens like the others (0: as it is),
      `noise_eps` is eps.
    u: a number in [0, 1) that decides t in place of a draw (stratified validation): 0 is t = 1.

  Raises:
    UserError: an example longer than `length`.
  """
  tokens, fixed = example['tokens'], example['fixed']
  before = {'length': len(tokens), 'free': int((~fixed).sum())}
  if cfg.length:
    if len(tokens) > cfg.length:
      raise UserError(f'corrupt.length={cfg.length}: an example has {len(tokens)} tokens: raise it')
    padding = (0, cfg.length - len(tokens))
    tokens, fixed = np.pad(tokens, padding, constant_values=PAD), np.pad(fixed, padding)
  time = 1.0 - (1.0 - SHORTEST_TIME) * (rng.random() if u is None else u)
  share = (1.0 - cfg.noise_eps) * time
  masked = ~fixed & (rng.random(len(tokens)) < share)
  where = np.flatnonzero(masked)
  return {
    'tokens': np.where(masked, MASK, tokens).astype(np.int32),
    'open': np.zeros(len(tokens), bool),
    'target_gap': where.astype(np.int32),
    'target_token': tokens[where].astype(np.int32),
    'target_weight': np.full(len(where), 1.0 / time, np.float32),
    'noise': -math.log1p(-share),
    **before,
  }
