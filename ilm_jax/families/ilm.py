"""Insertion language model (arXiv 2505.05755): one softmax over all (gap, token) pairs, and a stop head.

Notation: s is a text without its dropped tokens, h_k the hidden state of the token s_k, W_v the unembedding of token v,
and Z[k, v] = <h_k, W_v> the logit of inserting v right of s_k. D is the set of n = |D| dropped tokens; dropped token
x_j belongs to the gap right of position g(j) of s. The loss of one example is

    loss = [n > 0] (logsumexp_{k, v} Z[k, v] - 1/n sum_{j in D} Z[g(j), x_j])  +  stop_weight * CE(stop logits, [n > 0])

Decoding step: run a forward pass; end the row if the stop head decides to stop; otherwise draw a gap and a token, and
insert the token into the gap.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ilm_jax.families import corruption as _corrupt
from ilm_jax.families import drawing, growing, likelihood
from ilm_jax.families.contract import Family
from ilm_jax.families.growing import Rows
from ilm_jax.families.settings import never_generated, sample_config
from ilm_jax.models import numerics, vocabulary
from ilm_jax.types import GREEDY, LEAST_TEMPERATURE, Batch, Metrics, Outputs, Rule, UserError

corrupt = _corrupt.ilm
score, check_score = likelihood.score, likelihood.check_score


def sizes(cfg, longest: int, answer: int) -> tuple[int, int]:
  """Return the maximum numbers of an example's tokens (if none is dropped) and targets (its dropped tokens)."""
  if not 0 <= cfg.corrupt.infill_rate <= 1:
    raise UserError(f'corrupt.infill_rate={cfg.corrupt.infill_rate}: expected a fraction from 0 to 1')
  return longest, answer


# --- training ---------------------------------------------------------------------------------------------------------


def example_losses(outputs: Outputs, batch: Batch, *, compute: str = 'float32', chunk: int = 2048):
  """Return the insertion loss (0 without dropped tokens), stop loss and number of dropped tokens of each example, BxS.

  Both losses are cross-entropies in nats, without weights.
  """
  segments = batch['cls_BxS'].shape[1]
  lse_BxL = vocabulary.vocab_logsumexp(outputs.hidden_BxLxD, outputs.unembed_VxD, chunk=chunk, compute=compute)
  log_z_BxS = numerics.segment_logsumexp(lse_BxL, batch['segment_BxL'], batch['open_BxL'], segments)
  gap_BxT, token_BxT = batch['target_gap_BxT'], batch['target_token_BxT']
  z_BxT = vocabulary.target_logits(outputs.hidden_BxLxD, outputs.unembed_VxD, gap_BxT, token_BxT, compute=compute)
  used_BxT = (batch['target_segment_BxT'] > 0).astype(jnp.float32)
  dropped_BxS = numerics.segment_sum(used_BxT, batch['target_segment_BxT'], segments)
  z_BxS = numerics.segment_sum(z_BxT * used_BxT, batch['target_segment_BxT'], segments)
  some_BxS = dropped_BxS > 0
  token_BxS = jnp.where(some_BxS, log_z_BxS - z_BxS / jnp.maximum(dropped_BxS, 1), 0.0)
  log_stop_BxSx2 = jax.nn.log_softmax(outputs.stop_BxSx2, axis=-1)
  stop_BxS = -jnp.where(some_BxS, log_stop_BxSx2[..., 1], log_stop_BxSx2[..., 0])
  return token_BxS, stop_BxS, dropped_BxS


def loss(outputs: Outputs, batch: Batch, cfg) -> Metrics:
  """Return the training loss and its parts as (total, weight) pairs over the examples of a batch.

  `cfg.stop_weight` multiplies the stop loss. With length_weight='elbo', the loss of an example with L free tokens is
  multiplied by (L + 1) / mean_weight, the mean of L + 1 over the data; with stop_weight=1 it is then an upper bound on
  -log p(x), up to constants. length_weight='none' gives the paper's loss.

  `token_loss` and `stop_loss` lack these weights. `string_bound` estimates, in nats and under the training softmax,
  the upper bound on -log p(x) (see `likelihood`): (L + 1) (token loss + stop loss) - log L!.
  """
  token_BxS, stop_BxS, dropped_BxS = example_losses(outputs, batch, compute=cfg.compute, chunk=cfg.vocab_chunk)
  # An example with L free tokens has L + 1 possible numbers of dropped tokens.
  sizes_BxS = jnp.asarray(batch['free_BxS'], jnp.float32) + 1.0
  bound_BxS = sizes_BxS * (token_BxS + stop_BxS) - jax.scipy.special.gammaln(sizes_BxS)
  length_BxS = sizes_BxS / cfg.mean_weight if cfg.length_weight == 'elbo' else 1.0
  parts = {
    'loss': length_BxS * (token_BxS + cfg.stop_weight * stop_BxS),
    'token_loss': token_BxS,
    'stop_loss': stop_BxS,
    'string_bound': bound_BxS,
    'stop_accuracy': (outputs.stop_BxSx2[..., 1] > outputs.stop_BxSx2[..., 0]) == (dropped_BxS > 0),
  }
  weight_BxS = batch['segment_weight_BxS']
  return {name: ((weight_BxS * part_BxS).sum(), weight_BxS.sum()) for name, part_BxS in parts.items()}


# --- sampling ---------------------------------------------------------------------------------------------------------


class SampleConfig(NamedTuple):
  """Sampling settings; hashable, because jit takes them as a static argument."""

  max_length: int  # maximum number of tokens per row, counting the prompt
  max_steps: int | None = None  # maximum number of decoding steps that insert into a row; None: no limit
  gap: Rule = GREEDY  # first stage: rule for drawing a gap, weighted by the total probability of inserting there
  token: Rule = GREEDY  # second stage: rule for drawing a token for the gap
  joint: Rule | None = None  # if set: rule for drawing a (gap, token) pair in a single stage
  gaps: int = 1  # maximum number of insertions per decoding step, at most one right of each token; 0: no maximum
  gap_threshold: float = 0.0  # with gaps != 1: skip gaps less probable than this fraction of the best gap's probability
  stop_threshold: float | None = 0.9  # stop when p(stop) >= this; None (0 in a config): stop with probability p(stop)
  stop_temperature: float = 1.0  # divides the logits of the stop head
  force_first: bool = False  # insert at least one token before stopping
  suppressed_tokens: tuple[int, ...] = ()  # token ids that are never inserted (special tokens)
  byte_ids: tuple[int, ...] = ()  # tokens for one byte of a character: sampled only if bytes=True, but always scored
  bytes: bool = False  # whether to sample the one-byte tokens (byte_ids) too; the text may then be invalid UTF-8
  min_buffer: int = 64  # initial buffer length in tokens; it doubles up to max_length as rows grow
  compute: str = 'float32'  # precision of the matrix products in the vocabulary head
  vocab_chunk: int = 2048  # the logits are computed for this many vocabulary entries at a time

  @property
  def capacity(self) -> int:
    """Maximum buffer length in tokens."""
    return self.max_length

  @classmethod
  def create(cls, sampling, **others) -> 'SampleConfig':
    """Build a SampleConfig from the `sampling` section of a config; raise UserError for values out of range."""
    if sampling.get('stop_threshold') == 0:
      sampling = {**sampling, 'stop_threshold': None}
    made = sample_config(cls, sampling, **others)
    if made.gaps != 1 and made.joint is not None:
      raise UserError(
        f'sampling.gaps={made.gaps} cannot be combined with sampling.joint, which draws one (gap, token) pair per '
        'step: use sampling.gaps=1 or remove sampling.joint'
      )
    return made


def step(forward, cfg: SampleConfig, rows: Rows) -> Rows:
  """Run one decoding step: a forward pass, the stop decision, and the insertions of the rows that continue.

  A row does not stop while one of its gaps has fewer tokens than its minimum. If the stop head would end such a row, or
  the row has room only for the tokens that the minimums require, it inserts only into gaps below their minimum.
  """
  gap_rng_B, token_rng_B, stop_rng_B = growing.step_keys(rows, 3)
  open_BxL = growing.open_gaps(rows)
  outputs = forward(rows.tokens_BxL, rows.length_B, open_BxL=open_BxL)
  stop_prob_B = jax.nn.softmax(outputs.stop_BxSx2[:, 0] / max(cfg.stop_temperature, LEAST_TEMPERATURE), axis=-1)[:, 0]
  threshold = cfg.stop_threshold
  if threshold is None:
    threshold = jax.vmap(lambda rng: 1.0 - jax.random.uniform(rng, (), jnp.float32))(stop_rng_B)  # uniform in (0, 1]
  wants_stop_B = stop_prob_B >= threshold

  left_B = jnp.minimum(cfg.max_length - rows.length_B, growing.most_steps(cfg) - rows.steps_B)
  lacking_BxL = open_BxL & (rows.min_left_BxL > 0)
  first_BxL = rows.gap_BxL != jnp.roll(rows.gap_BxL, 1, axis=1)  # first position of each gap: count its minimum once
  lack_B = jnp.where(lacking_BxL & first_BxL, rows.min_left_BxL, 0).sum(axis=1)
  only_lacking_B = (lack_B > 0) & (wants_stop_B | (left_B <= lack_B))
  open_BxL &= lacking_BxL | ~only_lacking_B[:, None]
  limit_BxL = jnp.where(only_lacking_B[:, None], rows.min_left_BxL, rows.max_left_BxL)

  stops_B = wants_stop_B & (lack_B == 0)
  if cfg.force_first:
    stops_B &= rows.steps_B > 0
  go_B = rows.active_B & ~stops_B & (left_B > 0) & open_BxL.any(axis=1)

  gap_BxG, token_BxG, log_prob_BxG, ok_BxG = choose_pairs(outputs, open_BxL, cfg, gap_rng_B, token_rng_B)
  go_BxG = go_B[:, None] & (ok_BxG if cfg.gaps == 1 else _within_limits(rows, gap_BxG, ok_BxG, limit_BxL, lack_B, cfg))
  return growing.advance(
    rows,
    go_B=go_B,
    stops_B=rows.active_B & stops_B,
    inserted_B=go_BxG.sum(axis=1),
    log_prob_B=jnp.where(go_BxG, log_prob_BxG, 0.0).sum(axis=1),
    stop_prob_B=stop_prob_B,
    **_insert(rows, gap_BxG, token_BxG, go_BxG),
  )


GROWTH = growing.Growth(
  growing.begin_without_cache, step,
  lambda length_B, cfg: length_B + (jnp.minimum(cfg.gaps, length_B) if cfg.gaps else length_B),
)  # fmt: skip
sample = functools.partial(growing.sample, GROWTH)


def _within_limits(rows: Rows, gap_BxG, ok_BxG, limit_BxL, lack_B, cfg: SampleConfig):
  """Return a BxG mask of those proposed insertions (best first) that keep the token limits of gap and row."""
  number_BxG = jnp.take_along_axis(rows.gap_BxL, gap_BxG, axis=1)
  same_gap_BxGxG = (number_BxG[:, :, None] == number_BxG[:, None, :]) & ok_BxG[:, None, :]
  before_BxG = (same_gap_BxGxG & jnp.tri(gap_BxG.shape[1], k=-1, dtype=bool)[None]).sum(axis=2)
  ok_BxG &= before_BxG < jnp.take_along_axis(limit_BxL, gap_BxG, axis=1)
  # An insertion beyond its gap's minimum number of tokens may not use space that other gaps need for theirs.
  required_BxG = before_BxG < jnp.take_along_axis(rows.min_left_BxL, gap_BxG, axis=1)
  spare_B = cfg.max_length - rows.length_B - lack_B
  ok_BxG &= required_BxG | (jnp.cumsum(ok_BxG & ~required_BxG, axis=1) <= spare_B[:, None])
  return ok_BxG & (jnp.cumsum(ok_BxG, axis=1) <= (cfg.max_length - rows.length_B)[:, None])


def _insert(rows: Rows, gap_BxG, token_BxG, go_BxG) -> dict:
  """Insert token_BxG right of positions gap_BxG where go_BxG is true; return the changed arrays of `rows` by name."""

  def insert(array_BxL, value_BxG):
    if gap_BxG.shape[1] == 1:
      return drawing.insert(array_BxL, gap_BxG[:, 0], value_BxG[:, 0], go_BxG[:, 0])
    row_Bx1 = jnp.arange(gap_BxG.shape[0])[:, None]
    value_BxL = jnp.zeros_like(array_BxL).at[row_Bx1, gap_BxG].set(value_BxG.astype(array_BxL.dtype))
    go_BxL = jnp.zeros(array_BxL.shape, bool).at[row_Bx1, gap_BxG].set(go_BxG)
    return drawing.insert_all(array_BxL, value_BxL, go_BxL)

  def inherit(array_BxL):  # an inserted token takes the value of the token to its left
    return insert(array_BxL, jnp.take_along_axis(array_BxL, gap_BxG, axis=1))

  number_BxG = jnp.take_along_axis(rows.gap_BxL, gap_BxG, axis=1)
  used_BxL = ((rows.gap_BxL[:, :, None] == number_BxG[:, None, :]) & go_BxG[:, None, :]).sum(axis=2)
  return {
    'tokens_BxL': insert(rows.tokens_BxL, token_BxG),
    'order_BxL': insert(rows.order_BxL, jnp.broadcast_to(rows.steps_B[:, None], gap_BxG.shape)),
    'max_left_BxL': inherit(rows.max_left_BxL - used_BxL),
    'min_left_BxL': inherit(rows.min_left_BxL - used_BxL),
    'gap_BxL': inherit(rows.gap_BxL),
  }


def choose_pairs(outputs: Outputs, open_BxL, cfg: SampleConfig, gap_rng_B, token_rng_B):
  """Draw (gap, token) pairs per row, among the open gaps and the tokens that are not suppressed.

  With gaps=1, this is one pair; otherwise it is up to `cfg.gaps` different gaps under the rule `cfg.gap`, without
  replacement, and a token for each.

  Returns (gap_BxG, token_BxG, log_prob_BxG, ok_BxG), best gap first. log_prob is the pair's log-probability at
  temperature 1, without top-k and top-p. ok is false for entries to ignore: their gap is closed or below
  `cfg.gap_threshold`.
  """
  vocab = outputs.unembed_VxD.shape[0]
  bias_V = vocabulary.suppressed_bias(vocab, never_generated(cfg))
  lse_BxL = vocabulary.vocab_logsumexp(
    outputs.hidden_BxLxD, outputs.unembed_VxD, bias_V, chunk=cfg.vocab_chunk, compute=cfg.compute
  )
  lse_BxL = jnp.where(open_BxL, lse_BxL, numerics.NEG_INF)
  log_z_Bx1 = jax.nn.logsumexp(lse_BxL, axis=1, keepdims=True)
  if cfg.joint is not None:
    logits_BxLxV = vocabulary.vocab_logits(outputs.hidden_BxLxD, outputs.unembed_VxD, bias_V, compute=cfg.compute)
    logits_BxLxV = jnp.where(open_BxL[..., None], logits_BxLxV, numerics.NEG_INF)
    flat_BxLV = logits_BxLxV.reshape(open_BxL.shape[0], -1)
    pair_Bx1 = drawing.choose(gap_rng_B, flat_BxLV, cfg.joint)[:, None]
    logit_Bx1 = jnp.take_along_axis(flat_BxLV, pair_Bx1, axis=1)
    return pair_Bx1 // vocab, pair_Bx1 % vocab, logit_Bx1 - log_z_Bx1, jnp.ones(pair_Bx1.shape, bool)

  def draw(keys_and_gaps):
    rng_B, gap_B = keys_and_gaps
    return drawing.draw_token(rng_B, outputs, gap_B, bias_V, cfg.token, compute=cfg.compute)

  if cfg.gaps == 1:
    gap_B = drawing.choose(gap_rng_B, lse_BxL, cfg.gap)
    token_B, logit_B = draw((token_rng_B, gap_B))
    return gap_B[:, None], token_B[:, None], logit_B[:, None] - log_z_Bx1, jnp.ones((len(gap_B), 1), bool)
  count = min(cfg.gaps or open_BxL.shape[1], open_BxL.shape[1])
  candidate_BxL = lse_BxL
  if cfg.gap_threshold:
    least_Bx1 = lse_BxL.max(axis=1, keepdims=True) + math.log(cfg.gap_threshold)
    candidate_BxL = jnp.where(lse_BxL >= least_Bx1, lse_BxL, numerics.NEG_INF)
  gap_BxG, ok_BxG = drawing.choose_several(gap_rng_B, candidate_BxL, cfg.gap, count=count)
  more = jax.vmap(lambda number: jax.vmap(jax.random.fold_in, (0, None))(token_rng_B, number))(jnp.arange(1, count))
  rng_GxB = jnp.concatenate([token_rng_B[None], more])  # the first gap's key is the one that gaps=1 uses
  token_GxB, logit_GxB = jax.lax.map(draw, (rng_GxB, gap_BxG.T))  # a loop: the logits of all gaps are too large
  return gap_BxG, token_GxB.T, logit_GxB.T - log_z_Bx1, ok_BxG


FAMILY = Family(
  name='ilm', corrupt=corrupt, loss=loss, sample=sample, SampleConfig=SampleConfig,
  model_settings=lambda cfg: {'causal': False, 'stop_head': True}, sizes=sizes, score=score, check_score=check_score,
  growth=GROWTH, open_gap_embedding=True, length_weights=('none', 'elbo'),
)  # fmt: skip
