"""Likelihoods of an insertion language model whose stopping is sampled (a bound, a tighter one, the exact value).

At a string s the model stops with probability pi(s), else inserts a pair (gap, token) drawn from p(. | s). The ways to
write x with L free tokens are the L! orders of insertion, each a different sequence of pairs also where tokens repeat:

    p(x) = pi(x) sum_{orders} prod_t (1 - pi(s_t)) p(pair_t | s_t)

Jensen's inequality with uniform orders, and D a uniform set of n missing tokens, gives the bound (arXiv 2505.05755's
loss times L + 1, less log L!):

    -log p(x) <= -log pi(x) + sum_{n=1}^{L} E_D[-log(1 - pi(s_D)) - 1/n sum_{j in D} log p(pair_j | s_D) - log n]

p is that of the sampler: closed tokens and gaps have no mass, temperature 1, no threshold.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ilm_jax.models import numerics, vocabulary
from ilm_jax.types import Score, UserError

MOST_EXACT = 12  # free tokens of a row whose subsets are enumerated


class _Step(NamedTuple):
  """What the model says of a string with some tokens missing."""

  log_stop_B: jax.Array
  log_go_B: jax.Array
  log_pair_BxL: jax.Array  # of inserting the missing token that belongs at each position (0 elsewhere)


def _look(forward, tokens_BxL, fixed_BxL, length_B, keep_BxL, cfg) -> _Step:
  """Run the model on the kept tokens of each row, moved to the left."""
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
  bias_V = vocabulary.closed_bias(outputs.unembed_VxD.shape[0], cfg.closed_tokens)
  lse_BxL = vocabulary.vocab_logsumexp(
    outputs.hidden_BxLxD, outputs.unembed_VxD, bias_V, chunk=cfg.vocab_chunk, compute=cfg.compute
  )
  log_z_B = jax.nn.logsumexp(jnp.where(open_BxL, lse_BxL, numerics.NEG_INF), axis=1)
  gap_BxL = jnp.cumsum(keep_BxL, axis=1) - 1
  z_BxL = vocabulary.target_logits(outputs.hidden_BxLxD, outputs.unembed_VxD, gap_BxL, tokens_BxL, compute=cfg.compute)
  z_BxL += bias_V[tokens_BxL]  # what is never inserted has no probability
  log_BxSx2 = jax.nn.log_softmax(outputs.stop_BxSx2[:, 0], axis=-1)
  missing_BxL = valid_BxL & ~keep_BxL
  return _Step(log_BxSx2[:, 0], log_BxSx2[:, 1], jnp.where(missing_BxL, z_BxL - log_z_B[:, None], 0.0))


def _ranks(rng, free_BxL):
  """A uniform order of the free tokens of each row: 0, 1, ... on them, L elsewhere. Row b uses fold_in(rng, b)."""
  rows, size = free_BxL.shape
  rng_B = jax.vmap(lambda b: jax.random.fold_in(rng, b))(jnp.arange(rows))
  noise_BxL = jnp.where(free_BxL, jax.vmap(lambda key: jax.random.uniform(key, (size,)))(rng_B), 2.0)
  rank_BxL = jnp.argsort(jnp.argsort(noise_BxL, axis=1), axis=1)
  return jnp.where(free_BxL, rank_BxL, size)


def _free(tokens_BxL, fixed_BxL, length_B):
  return ~fixed_BxL & (jnp.arange(tokens_BxL.shape[1])[None] < length_B[:, None])


def bound(forward, rng, tokens_BxL, fixed_BxL, length_B, cfg, samples: int = 2) -> Score:
  """The bound, from one random set of each size n = 0 .. L (L + 1 passes), averaged over `samples` of them.

  Args:
    forward: (tokens_BxL, length_B, open_BxL=) -> Outputs.
    rng: key of the sets.
    tokens_BxL: whole rows, [CLS] first.
    fixed_BxL: given tokens.
    length_B: of the rows.
    cfg: `closed_tokens`, `compute` and `vocab_chunk` are read.
    samples: at least 2 for a standard error.
  """
  free_BxL = _free(tokens_BxL, fixed_BxL, length_B)
  free_B = free_BxL.sum(axis=1)

  def once(k):
    def add(n, total_B):
      missing_BxL = _ranks(jax.random.fold_in(jax.random.fold_in(rng, k), n), free_BxL) < n
      step = _look(forward, tokens_BxL, fixed_BxL, length_B, ~missing_BxL, cfg)
      pair_B = jnp.where(missing_BxL, step.log_pair_BxL, 0.0).sum(axis=1) / jnp.maximum(n, 1)
      term_B = jnp.where(n == 0, -step.log_stop_B, -step.log_go_B - pair_B - jnp.log(jnp.maximum(n, 1)))
      return total_B + jnp.where(n <= free_B, term_B, 0.0)

    return jax.lax.fori_loop(0, free_B.max() + 1, add, jnp.zeros(free_B.shape, jnp.float32))

  nll_KxB = jax.lax.map(once, jnp.arange(samples))
  error_B = nll_KxB.std(axis=0, ddof=1) / samples**0.5 if samples > 1 else jnp.full(free_B.shape, jnp.nan)
  return Score('bound', nll_KxB.mean(axis=0), error_B, free_B)


def importance(forward, rng, tokens_BxL, fixed_BxL, length_B, cfg, samples: int = 16) -> Score:
  """-log of the mean of L! p(x, order) over random orders: between the bound and the exact value, in expectation.

  The standard error is that of the mean, to first order. For the arguments see `bound`.
  """
  free_BxL = _free(tokens_BxL, fixed_BxL, length_B)
  free_B = free_BxL.sum(axis=1)

  def once(k):
    rank_BxL = _ranks(jax.random.fold_in(rng, k), free_BxL)

    def add(t, total_B):  # t tokens are there
      step = _look(forward, tokens_BxL, fixed_BxL, length_B, ~(free_BxL & (rank_BxL >= t)), cfg)
      pair_B = jnp.where(rank_BxL == t, step.log_pair_BxL, 0.0).sum(axis=1)
      term_B = jnp.where(t == free_B, step.log_stop_B, step.log_go_B + pair_B)
      return total_B + jnp.where(t <= free_B, term_B, 0.0)

    return jax.lax.fori_loop(0, free_B.max() + 1, add, jnp.zeros(free_B.shape, jnp.float32))

  log_KxB = jax.lax.map(once, jnp.arange(samples)) + jax.scipy.special.gammaln(free_B + 1.0)[None]
  mean_B = jax.nn.logsumexp(log_KxB, axis=0) - jnp.log(samples)
  share_KxB = jnp.exp(log_KxB - mean_B[None])
  error_B = share_KxB.std(axis=0, ddof=1) / samples**0.5 if samples > 1 else jnp.full(free_B.shape, jnp.nan)
  return Score('importance-weighted', -mean_B, error_B, free_B)


def exact(forward, rng, tokens_BxL, fixed_BxL, length_B, cfg, most: int = MOST_EXACT) -> Score:
  """The exact value by dynamic programming over the sets of free tokens that are there: 2^L passes.

  Args:
    forward: (tokens_BxL, length_B, open_BxL=) -> Outputs.
    rng: not used.
    tokens_BxL: whole rows, [CLS] first.
    fixed_BxL: given tokens.
    length_B: of the rows.
    cfg: `closed_tokens`, `compute` and `vocab_chunk` are read.
    most: free tokens of a row (static); a row with more gets a NaN.
  """
  del rng
  free_BxL = _free(tokens_BxL, fixed_BxL, length_B)
  free_B = free_BxL.sum(axis=1)
  bit_BxL = jnp.where(free_BxL, jnp.cumsum(free_BxL, axis=1) - 1, most)
  at_BxF = jnp.argsort(bit_BxL, axis=1, stable=True)[:, :most]  # positions of the free tokens

  def look(there):
    keep_BxL = ~free_BxL | ((there >> jnp.minimum(bit_BxL, most)) & 1).astype(bool)
    step = _look(forward, tokens_BxL, fixed_BxL, length_B, keep_BxL, cfg)
    pair_BxF = jnp.take_along_axis(step.log_pair_BxL, at_BxF, axis=1)
    return step.log_stop_B, step.log_go_B[:, None] + pair_BxF

  sets = 2**most
  log_stop_AxB, log_pair_AxBxF = jax.lax.map(look, jnp.arange(sets))

  def reach(there, log_AxB):
    """log-probability of reaching a set: over the last token that came in."""
    last_F = jnp.arange(most)
    inside_F = (there >> last_F) & 1 == 1
    before_F = jnp.where(inside_F, there ^ (1 << last_F), 0)
    log_FxB = log_AxB[before_F] + log_pair_AxBxF[before_F, :, last_F]
    return log_AxB.at[there].set(jax.nn.logsumexp(jnp.where(inside_F[:, None], log_FxB, -jnp.inf), axis=0))

  start_AxB = jnp.zeros((sets, free_B.shape[0]), jnp.float32)
  log_AxB = jax.lax.fori_loop(1, sets, reach, start_AxB)
  whole_B = (1 << jnp.minimum(free_B, most)) - 1
  row_B = jnp.arange(free_B.shape[0])
  nll_B = -(log_AxB[whole_B, row_B] + log_stop_AxB[whole_B, row_B])
  return Score('exact', jnp.where(free_B <= most, nll_B, jnp.nan), jnp.zeros_like(nll_B), free_B)


KINDS = {'bound': bound, 'importance-weighted': importance, 'exact': exact}


def check_score(kind: str | None, longest: int) -> None:
  """Refuse a kind that there is not, or that would take too long."""
  if kind not in (None, *KINDS):
    raise UserError(f'score: kind={kind!r}: expected one of {", ".join(KINDS)} for family=ilm')
  if kind == 'exact' and longest > MOST_EXACT:
    raise UserError(
      f'score: kind=exact takes 2^n passes for n tokens, {longest} here: expected at most {MOST_EXACT}; use '
      'importance-weighted or bound'
    )


def score(forward, rng, tokens_BxL, fixed_BxL, length_B, cfg, *, kind: str | None = None, longest: int = MOST_EXACT,
          **options) -> Score:  # fmt: skip
  """Score rows by one of KINDS (the bound by default); `options` are its own.

  `longest` is the largest number of free tokens, where the caller knows it: the exact value takes 2^longest passes.
  """
  check_score(kind, longest)
  kind = kind or 'bound'
  if kind == 'exact':
    options = {'most': longest, **options}
  return KINDS[kind](forward, rng, tokens_BxL, fixed_BxL, length_B, cfg, **options)
