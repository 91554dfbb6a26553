"""Corruption of training examples for each family, in NumPy only, because data workers must not use an accelerator.

An example is {'tokens': int32[n], 'fixed': bool[n]} with [CLS] first. Fixed tokens (the prompt, [BOS], the text around
a gap) are never dropped or masked; the other tokens are free. A corrupted example is a dict of variable-length arrays,
ready for packing:

    tokens, open          the input tokens, and for each whether a token may be inserted to its right
    target_gap            for each target, the index in `tokens` from which it is predicted: that of the token left of a
                          dropped token, or that of the [MASK] of a masked token
    target_token          for each target, the token id to predict
    length, free          number of tokens, and of free tokens, before corruption and padding
    target_weight         weight of each target in the loss (optional, default 1)
    noise                 noise level of the example, an input of the model (optional, default 0)
"""

import math

import numpy as np

from ilm_jax.special_tokens import EOS, MASK, PAD
from ilm_jax.types import UserError

SHORTEST_TIME = 1e-3  # smallest diffusion time t drawn for family=mdm; it bounds the loss weight 1 / t of a target


def ilm(rng: np.random.Generator, example, cfg, u: float | None = None) -> dict:
  """Drop a random subset of the L free (not given) tokens; its size is uniform on 0, ..., L, or set by `u` in [0, 1).

  Worked example: dropping b and c from `CLS p BOS a b c d` leaves `CLS p BOS a d`, with target_gap [3, 3] and
  target_token [b, c].

  `cfg.close_prompt` excludes the gaps inside the prompt from the training softmax (the reference implementation
  includes them). `cfg.infill_rate` is the fraction of infilling examples, in which only one to three spans are free,
  and the softmax excludes all gaps outside these spans. (The reference implementation excludes every gap without
  dropped tokens, but a sampler does not know these gaps.)
  """
  tokens, fixed = example['tokens'], example['fixed']
  share = cfg.get('infill_rate', 0.0)
  infill = u is None and share > 0 and rng.random() < share
  if infill:
    fixed = fixed | ~choose_spans(rng, ~fixed)
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
  """Make every free token and a final [EOS] a target, predicted from the position to its left; drop no token.

  For fill-in-the-middle (Bavarian et al. 2022, arXiv 2207.14255), a span of tokens (the middle) is moved to the end, a
  [MASK] takes its place, and a second [MASK] precedes the moved span. The [MASK]s are not targets.

  Worked example: `CLS a b c d` with middle b, c becomes `CLS a MASK d MASK b c`. The targets are a, d, b, c and EOS,
  each predicted from the token to its left.

  A fraction `cfg.fim_rate` of the training examples (`u` is None) is rearranged, with a middle between two uniformly
  random cuts of the free tokens. An example with fixed tokens after free tokens is always rearranged, with its free
  tokens as the middle; UserError if `fim_rate` is 0 or these tokens are not contiguous.
  """
  tokens, fixed = example['tokens'], example['fixed']
  free = np.flatnonzero(~fixed)
  before = {'length': len(tokens), 'free': len(free)}
  if len(free) and free[0] + len(free) != len(tokens):
    if not cfg.fim_rate:
      raise UserError(
        'family=arm writes from left to right, but an example has given tokens after tokens to generate: use '
        'corrupt.fim_rate=0.5 (fill-in-the-middle), or family=ilm or mdm'
      )
    if free[-1] - free[0] + 1 != len(free):
      raise UserError('family=arm fills one gap of a text, but an example has several gaps: use family=ilm or mdm')
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
  """Move tokens[first:past] (the middle) to the end, leaving a [MASK] in its old place and one before its new place.

  Returns (rearranged tokens, the index in them of each original token).
  """
  prefix, middle, suffix = np.split(tokens, [first, past])
  mask = np.array([MASK], tokens.dtype)
  index = np.arange(len(tokens))
  moved = np.where(index < first, index, np.where(index < past, index + 2 + len(suffix), index + 1 - len(middle)))
  return np.concatenate([prefix, mask, suffix, mask, middle]), moved


def it(rng: np.random.Generator, example, cfg, u: float | None = None) -> dict:
  """Drop tokens as `ilm` does; the targets of a gap are its dropped tokens, or [EOS] if it has none.

  In a gap with c > 0 dropped tokens, each of these is a target with weight 1 / (c + 1). In a gap without dropped
  tokens, [EOS] is the target, with weight `cfg.eos_weight`.
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


def choose_spans(rng: np.random.Generator, free: np.ndarray, most: int = 3) -> np.ndarray:
  """Return a mask of one to `most` disjoint, nonadjacent random spans of the free tokens."""
  where, chosen = np.flatnonzero(free), np.zeros(len(free), bool)
  number = min(int(rng.integers(1, most + 1)), (len(where) + 1) // 2)
  cuts = np.sort(rng.permutation(len(where) + 1)[: 2 * number])
  for first, past in cuts.reshape(-1, 2):
    chosen[where[first:past]] = True
  return chosen


def open_gaps(fixed: np.ndarray) -> np.ndarray:
  """Return a mask of the tokens after which tokens may be inserted: beside a free token, but not after [CLS]."""
  open_ = ~fixed | np.append(~fixed[1:], False)
  open_[0] = False
  return open_


def mdm(rng: np.random.Generator, example, cfg, u: float | None = None) -> dict:
  """Replace each free token by [MASK] with probability (1 - eps) t, for a diffusion time t ~ U(SHORTEST_TIME, 1].

  The schedule is log-linear: a token is masked with probability 1 - exp(-sigma(t)) at noise level sigma(t) =
  -log(1 - (1 - eps) t), and the loss weight of every target is sigma'(t) / (exp(sigma(t)) - 1) = 1 / t. eps is
  `cfg.noise_eps`; `u` in [0, 1) sets t (0 gives t = 1).

  The example is padded with [PAD]s, which count as free tokens, to `cfg.length` tokens (0: no padding); UserError if it
  is longer.
  """
  tokens, fixed = example['tokens'], example['fixed']
  before = {'length': len(tokens), 'free': int((~fixed).sum())}
  if cfg.length:
    if len(tokens) > cfg.length:
      raise UserError(f'corrupt.length={cfg.length}: an example has {len(tokens)} tokens: increase corrupt.length')
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
