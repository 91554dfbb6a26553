"""Negative log-likelihood of texts under an insertion language model: upper bound, tighter estimate, exact value.

At a string s the model stops with probability pi(s); otherwise it draws a pair (gap, token) from p(. | s) and inserts
the token. A text x with L free tokens can be generated in L! insertion orders, and each order is a different sequence
of pairs, even if tokens repeat:

    p(x) = pi(x) sum_{orders} prod_t (1 - pi(s_t)) p(pair_t | s_t)

Let D be a uniformly random set of n free tokens, and s_D the text without these. Jensen's inequality over uniformly
random orders gives an upper bound, which equals the loss of arXiv 2505.05755 times L + 1, minus log L!:

    -log p(x) <= -log pi(x) + sum_{n=1}^{L} E_D[-log(1 - pi(s_D)) - 1/n sum_{j in D} log p(pair_j | s_D) - log n]

All probabilities are those of the sampler at temperature 1 without a stop threshold: suppressed tokens, and gaps where
the prompt allows no insertion, have probability 0.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ilm_jax.models import numerics, vocabulary
from ilm_jax.types import Score, UserError

MOST_EXACT = 12  # maximum number n of free tokens for kind='exact', which runs 2^n forward passes


class _Partial(NamedTuple):
  """Log-probabilities of the next decoding step, given a text with some tokens missing."""

  log_stop_B: jax.Array  # log pi(s), the log-probability that the model stops at this text
  log_go_B: jax.Array  # log (1 - pi(s)), the log-probability that the model inserts a token instead
  log_pair_BxL: jax.Array  # log-probability that an insertion adds the token missing here; 0 if none is missing


def _evaluate(forward, tokens_BxL, fixed_BxL, length_B, keep_BxL, cfg) -> _Partial:
  """Remove the tokens where keep_BxL is false, run the model on the shortened rows, and score the removed tokens."""
  index_BxL = jnp.broadcast_to(jnp.arange(tokens_BxL.shape[1]), tokens_BxL.shape)
  valid_BxL = index_BxL < length_B[:, None]
  keep_BxL = keep_BxL & valid_BxL
  order_BxL = jnp.argsort(~keep_BxL, axis=1, stable=True)
  count_B = keep_BxL.sum(axis=1)
  kept_BxL = jnp.take_along_axis(tokens_BxL, order_BxL, axis=1)
  next_free_BxL = jnp.roll(~fixed_BxL & valid_BxL, -1, axis=1).at[:, -1].set(False)
  open_BxL = jnp.take_along_axis((~fixed_BxL | next_free_BxL).at[:, 0].set(False), order_BxL, axis=1)
  open_BxL &= index_BxL < count_B[:, None]
  outputs = forward(jnp.where(index_BxL < count_B[:, None], kept_BxL, 0), count_B, open_BxL=open_BxL)
  bias_V = vocabulary.suppressed_bias(outputs.unembed_VxD.shape[0], cfg.suppressed_tokens)
  lse_BxL = vocabulary.vocab_logsumexp(
    outputs.hidden_BxLxD, outputs.unembed_VxD, bias_V, chunk=cfg.vocab_chunk, compute=cfg.compute
  )
  log_z_B = jax.nn.logsumexp(jnp.where(open_BxL, lse_BxL, numerics.NEG_INF), axis=1)
  gap_BxL = jnp.cumsum(keep_BxL, axis=1) - 1
  z_BxL = vocabulary.target_logits(outputs.hidden_BxLxD, outputs.unembed_VxD, gap_BxL, tokens_BxL, compute=cfg.compute)
  z_BxL += bias_V[tokens_BxL]  # suppressed tokens have probability 0
  log_stop_Bx2 = jax.nn.log_softmax(outputs.stop_BxSx2[:, 0], axis=-1)
  missing_BxL = valid_BxL & ~keep_BxL
  return _Partial(log_stop_Bx2[:, 0], log_stop_Bx2[:, 1], jnp.where(missing_BxL, z_BxL - log_z_B[:, None], 0.0))


def _random_ranks(rng, free_BxL):
  """Draw a uniformly random order of each row's free tokens; return each token's rank, and L at other positions."""
  rows, size = free_BxL.shape
  rng_B = jax.vmap(lambda b: jax.random.fold_in(rng, b))(jnp.arange(rows))
  noise_BxL = jnp.where(free_BxL, jax.vmap(lambda key: jax.random.uniform(key, (size,), jnp.float32))(rng_B), 2.0)
  rank_BxL = jnp.argsort(jnp.argsort(noise_BxL, axis=1), axis=1)
  return jnp.where(free_BxL, rank_BxL, size)


def _free(tokens_BxL, fixed_BxL, length_B):
  """Return (free_BxL, free_B): a mask of the free tokens and their number in each row."""
  free_BxL = ~fixed_BxL & (jnp.arange(tokens_BxL.shape[1])[None] < length_B[:, None])
  return free_BxL, free_BxL.sum(axis=1, dtype=jnp.int32)


def _sum_steps(term, free_B):
  """Return for each row the sum of term(n) over n = 0, ..., free_B."""

  def add(n, total_B):
    return total_B + jnp.where(n <= free_B, term(n), 0.0).astype(jnp.float32)

  return jax.lax.fori_loop(0, free_B.max() + 1, add, jnp.zeros(free_B.shape, jnp.float32))


def _standard_error(value_KxB, samples: int):
  """Return the standard error of the mean over `samples` independent values; NaN for a single value."""
  if samples == 1:
    return jnp.full(value_KxB.shape[1:], jnp.nan)
  return value_KxB.std(axis=0, ddof=1) / samples**0.5


def bound(forward, rng, tokens_BxL, fixed_BxL, length_B, cfg, samples: int = 2) -> Score:
  """Estimate the upper bound on -log p(x) without bias, as the mean of `samples` random samples.

  A sample draws one random set of missing tokens of every size n = 0 .. L, which takes L + 1 forward passes. A standard
  error needs at least 2 samples. `rng` draws the sets; of `cfg`, the settings of the vocabulary head are used.
  """
  free_BxL, free_B = _free(tokens_BxL, fixed_BxL, length_B)

  def once(k):
    def term(n):
      missing_BxL = _random_ranks(jax.random.fold_in(jax.random.fold_in(rng, k), n), free_BxL) < n
      partial = _evaluate(forward, tokens_BxL, fixed_BxL, length_B, ~missing_BxL, cfg)
      pair_B = jnp.where(missing_BxL, partial.log_pair_BxL, 0.0).sum(axis=1) / jnp.maximum(n, 1)
      return jnp.where(n == 0, -partial.log_stop_B, -partial.log_go_B - pair_B - jnp.log(jnp.maximum(n, 1)))

    return _sum_steps(term, free_B)

  nll_KxB = jax.lax.map(once, jnp.arange(samples))
  return Score('bound', nll_KxB.mean(axis=0), _standard_error(nll_KxB, samples), free_B)


def importance(forward, rng, tokens_BxL, fixed_BxL, length_B, cfg, samples: int = 16) -> Score:
  """Estimate -log p(x) as -log of the mean of L! p(x, order) over random insertion orders of the L free tokens.

  Its expectation lies between the exact value and the upper bound; its standard error is of first order (delta method).
  """
  free_BxL, free_B = _free(tokens_BxL, fixed_BxL, length_B)

  def once(k):
    rank_BxL = _random_ranks(jax.random.fold_in(rng, k), free_BxL)

    def term(t):  # log-probability of the decoding step after t insertions
      partial = _evaluate(forward, tokens_BxL, fixed_BxL, length_B, ~(free_BxL & (rank_BxL >= t)), cfg)
      pair_B = jnp.where(rank_BxL == t, partial.log_pair_BxL, 0.0).sum(axis=1)
      return jnp.where(t == free_B, partial.log_stop_B, partial.log_go_B + pair_B)

    return _sum_steps(term, free_B)

  log_KxB = jax.lax.map(once, jnp.arange(samples)) + jax.scipy.special.gammaln(free_B + 1.0)[None]
  mean_B = jax.nn.logsumexp(log_KxB, axis=0) - jnp.log(samples)
  weight_KxB = jnp.exp(log_KxB - mean_B[None])
  return Score('importance-weighted', -mean_B, _standard_error(weight_KxB, samples), free_B)


def exact(forward, rng, tokens_BxL, fixed_BxL, length_B, cfg, most: int = MOST_EXACT) -> Score:
  """Compute -log p(x) exactly, by dynamic programming over the set of free tokens inserted so far.

  This takes 2^most forward passes; rows with more than `most` free tokens score NaN. The bits of an integer encode a
  subset.
  """
  free_BxL, free_B = _free(tokens_BxL, fixed_BxL, length_B)
  bit_BxL = jnp.where(free_BxL, jnp.cumsum(free_BxL, axis=1) - 1, most)
  at_BxF = jnp.argsort(bit_BxL, axis=1, stable=True)[:, :most]  # positions of the free tokens

  def evaluate(subset):
    keep_BxL = ~free_BxL | ((subset >> jnp.minimum(bit_BxL, most)) & 1).astype(bool)
    partial = _evaluate(forward, tokens_BxL, fixed_BxL, length_B, keep_BxL, cfg)
    pair_BxF = jnp.take_along_axis(partial.log_pair_BxL, at_BxF, axis=1)
    return partial.log_stop_B, partial.log_go_B[:, None] + pair_BxF

  subsets = 2**most
  log_stop_AxB, log_pair_AxBxF = jax.lax.map(evaluate, jnp.arange(subsets))  # axes: A subsets, F free tokens

  def reach(subset, log_AxB):
    """Set the log-probability of reaching a subset: a log-sum-exp over which of its tokens was inserted last."""
    last_F = jnp.arange(most)
    inside_F = (subset >> last_F) & 1 == 1
    before_F = jnp.where(inside_F, subset ^ (1 << last_F), 0)
    log_FxB = log_AxB[before_F] + log_pair_AxBxF[before_F, :, last_F]
    return log_AxB.at[subset].set(jax.nn.logsumexp(jnp.where(inside_F[:, None], log_FxB, -jnp.inf), axis=0))

  start_AxB = jnp.zeros((subsets, free_B.shape[0]), jnp.float32)
  log_AxB = jax.lax.fori_loop(1, subsets, reach, start_AxB)
  whole_B = (1 << jnp.minimum(free_B, most)) - 1
  row_B = jnp.arange(free_B.shape[0])
  nll_B = -(log_AxB[whole_B, row_B] + log_stop_AxB[whole_B, row_B])
  return Score('exact', jnp.where(free_B <= most, nll_B, jnp.nan), jnp.zeros_like(nll_B), free_B)


KINDS = {'bound': bound, 'importance-weighted': importance, 'exact': exact}


def check_score(kind: str | None, longest: int) -> None:
  """Raise UserError if `kind` is unknown, or if it is 'exact' and a text has `longest` > MOST_EXACT free tokens."""
  if kind not in (None, *KINDS):
    raise UserError(f'score: kind={kind!r}: expected one of {", ".join(KINDS)} for family=ilm')
  if kind == 'exact' and longest > MOST_EXACT:
    raise UserError(
      f'score: kind=exact takes 2^n forward passes for n tokens, and a text has {longest} tokens: expected at most '
      f'{MOST_EXACT}; use kind=importance-weighted or kind=bound'
    )


def score(forward, rng, tokens_BxL, fixed_BxL, length_B, cfg, *, kind: str | None = None, longest: int = MOST_EXACT,
          **options) -> Score:  # fmt: skip
  """Score each row with the function KINDS[kind] (default: 'bound'); `options`, such as `samples`, are passed to it."""
  check_score(kind, longest)
  kind = kind or 'bound'
  if kind == 'exact':
    options = {'most': longest, **options}
  return KINDS[kind](forward, rng, tokens_BxL, fixed_BxL, length_B, cfg, **options)
