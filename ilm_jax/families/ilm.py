"""Insertion language model (arXiv 2505.05755): one softmax over all (gap, token) pairs, and a head that stops.

For a string s with kept tokens k and logits Z[k, v] = <h_k, W_v> ("insert v right of s_k"), and D the dropped tokens,
n = |D|, token j of which belongs right of g(j):

    loss = [n > 0] (logsumexp_{k, v} Z[k, v] - 1/n sum_{j in D} Z[g(j), x_j])  +  stop_weight * CE(stop logits, [n > 0])

Sampling: a forward pass; stop if the stop head says so; else draw a gap and a token, insert, repeat.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ilm_jax.families import corruption as _corrupt
from ilm_jax.families import drawing, growing, likelihood
from ilm_jax.families.contract import Family
from ilm_jax.families.growing import Rows, note
from ilm_jax.families.settings import sample_config
from ilm_jax.models import numerics, vocabulary
from ilm_jax.types import GREEDY, Batch, Metrics, Outputs, Prompt, Rule, Sampled, UserError

corrupt = _corrupt.ilm
score, check_score = likelihood.score, likelihood.check_score


def model_settings(cfg) -> dict:
  """The fields of ModelConfig that an insertion model decides."""
  del cfg
  return {'causal': False, 'stop_head': True}


def sizes(cfg, longest: int, answer: int) -> tuple[int, int]:
  """(tokens, targets) of the longest example: nothing may be dropped, or all that is free."""
  if not 0 <= cfg.corrupt.infill_rate <= 1:
    raise UserError(f'corrupt.infill_rate={cfg.corrupt.infill_rate}: expected a share from 0 to 1')
  return longest, answer


# --- training ---------------------------------------------------------------------------------------------------------


def example_losses(outputs: Outputs, batch: Batch, *, compute: str = 'float32', chunk: int = 2048):
  """The two parts of the loss of each segment, unweighted.

  Returns:
    (token_BxS, stop_BxS, dropped_BxS): cross-entropy of the insertions (0 where nothing was dropped), cross-entropy of
    the stop head, number of dropped tokens.
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
  """The training loss and its parts, as totals and weights over the batch's examples.

  Args:
    outputs: of the model on the batch.
    batch: see `types`.
    cfg: `stop_weight` (lambda), `compute` and `vocab_chunk` of the vocabulary head; `length_weight`: 'none' (the
      paper), or 'elbo', which weights an example of L free tokens by L + 1 over the data's mean of it, `mean_weight`:
      then the loss, with stop_weight 1, is the bound itself but for constants.

  Returns:
    'loss', its parts without the length weight, the share of right stop decisions, and 'string_bound': the estimate
    (L + 1) (token + stop loss) - log L! of the bound of -log p(x) in nats (see `likelihood`), over the gaps and tokens
    of the training softmax.
  """
  token_BxS, stop_BxS, dropped_BxS = example_losses(outputs, batch, compute=cfg.compute, chunk=cfg.vocab_chunk)
  weight_BxS = batch['segment_weight_BxS']
  weight = weight_BxS.sum()
  token, stop = (weight_BxS * token_BxS).sum(), (weight_BxS * stop_BxS).sum()
  more_BxS = batch['free_BxS'] + 1.0
  bound_BxS = more_BxS * (token_BxS + stop_BxS) - jax.scipy.special.gammaln(more_BxS)
  length_BxS = more_BxS / cfg.mean_weight if cfg.length_weight == 'elbo' else jnp.ones_like(more_BxS)
  total = (weight_BxS * length_BxS * (token_BxS + cfg.stop_weight * stop_BxS)).sum()
  right_BxS = (outputs.stop_BxSx2[..., 1] > outputs.stop_BxSx2[..., 0]) == (dropped_BxS > 0)
  return {
    'loss': (total, weight),
    'token_loss': (token, weight),
    'stop_loss': (stop, weight),
    'string_bound': ((weight_BxS * bound_BxS).sum(), weight),
    'stop_accuracy': ((weight_BxS * right_BxS).sum(), weight),
  }


# --- sampling ---------------------------------------------------------------------------------------------------------


class SampleConfig(NamedTuple):
  """How to sample. Hashable: a jit compiles once for each."""

  max_length: int  # of a row, the prompt included
  max_steps: int | None = None  # forward passes of a row that insert, at most
  gap: Rule = GREEDY  # two-stage: the gap by its total probability ...
  token: Rule = GREEDY  # ... then the token, given the gap
  joint: Rule | None = None  # instead: one draw among all (gap, token) pairs
  gaps: int = 1  # gaps that a step inserts into, the best by the rule; 0: all
  gap_threshold: float = 0.0  # of them, those whose probability is at least this share of the best one's
  stop_threshold: float | None = 0.9  # stop when p(stop) reaches it; None (0 in a config): with probability p(stop)
  stop_temperature: float = 1.0
  force_first: bool = False  # insert at least one token
  closed_tokens: tuple[int, ...] = ()  # ids never inserted (special tokens)
  min_buffer: int = 64  # shortest buffer; it doubles up to max_length as rows grow
  compute: str = 'float32'
  vocab_chunk: int = 2048

  @property
  def capacity(self) -> int:
    """Positions of the longest buffer."""
    return self.max_length

  @classmethod
  def create(cls, sampling, **others) -> 'SampleConfig':
    """Build from a config's `sampling` part."""
    if sampling.get('stop_threshold') == 0:
      sampling = {**sampling, 'stop_threshold': None}
    made = sample_config(cls, sampling, **others)
    if made.stop_threshold is not None and not 0 < made.stop_threshold <= 1:
      raise UserError(f'sampling.stop_threshold={made.stop_threshold}: expected a probability, or 0 to sample the stop')
    if made.gaps < 0 or not 0 <= made.gap_threshold <= 1:
      raise UserError(
        f'sampling.gaps={made.gaps}, sampling.gap_threshold={made.gap_threshold}: expected a number of gaps (0: all), '
        'and a share from 0 to 1'
      )
    if made.gaps != 1 and made.joint is not None:
      raise UserError(
        f'sampling.gaps={made.gaps}: several gaps at once are drawn in two stages: leave out sampling.joint'
      )
    return made


def sample(forward, rng, prompt: Prompt, cfg: SampleConfig) -> Sampled:
  """Insert tokens until every row has stopped: a chain of while loops over growing buffers, without a host sync.

  Args:
    forward: (tokens_BxL, length_B) -> Outputs with S = 1.
    rng: the key of the whole run; a row's noise is fold_in(fold_in(rng, request), step) and nothing else.
    prompt: rows of given tokens; its buffer may be shorter than max_length.
    cfg: see SampleConfig.

  Returns:
    Sampled, with L = max_length and M = the largest number of insertions, plus one for the forward pass that stops.
  """
  return growing.sample(GROWTH, forward, rng, prompt, cfg)


def begin(forward, rng, prompt: Prompt, cfg: SampleConfig, size: int) -> Rows:
  """Rows that hold their prompts."""
  del forward
  return growing.begin(rng, prompt, cfg, size)


def step(forward, cfg: SampleConfig, rows: Rows) -> Rows:
  """One forward pass, one test of the stop head, one insertion (or several) in each row that goes on.

  While a gap lacks tokens of its least number, the row does not stop; when the stop head wants it to, or a limit is
  near, the next token comes into such a gap.
  """
  rng_B = jax.vmap(jax.random.fold_in)(rows.rng_B, rows.steps_B)
  gap_rng_B, token_rng_B, stop_rng_B = jax.vmap(functools.partial(jax.random.split, num=3), out_axes=1)(rng_B)
  open_BxL = (rows.room_BxL > 0) & (jnp.arange(rows.tokens_BxL.shape[1])[None] < rows.length_B[:, None])
  outputs = forward(rows.tokens_BxL, rows.length_B, open_BxL=open_BxL)

  stop_prob_B = jax.nn.softmax(outputs.stop_BxSx2[:, 0] / cfg.stop_temperature, axis=-1)[:, 0]
  threshold = cfg.stop_threshold
  if threshold is None:
    threshold = jax.vmap(lambda rng: 1.0 - jax.random.uniform(rng))(stop_rng_B)  # in (0, 1]
  wants_stop_B = stop_prob_B >= threshold
  lacks_BxL = open_BxL & (rows.lack_BxL > 0)
  room_B = jnp.minimum(cfg.max_length - rows.length_B, growing.most_steps(cfg) - rows.steps_B)
  first_BxL = rows.gap_BxL != jnp.roll(rows.gap_BxL, 1, axis=1)  # a gap's positions stand together
  lack_B = jnp.where(lacks_BxL & first_BxL, rows.lack_BxL, 0).sum(axis=1)
  only_B = (lack_B > 0) & (wants_stop_B | (room_B <= lack_B))  # what is left is for the gaps that lack tokens
  open_BxL &= lacks_BxL | ~only_B[:, None]
  limit_BxL = jnp.where(only_B[:, None], rows.lack_BxL, rows.room_BxL)
  wants_stop_B &= lack_B == 0
  if cfg.force_first:
    wants_stop_B &= rows.steps_B > 0
  go_B = rows.active_B & ~wants_stop_B & (room_B > 0) & open_BxL.any(axis=1)

  if cfg.gaps == 1:
    gap_B, token_B, log_prob_B = choose_pair(outputs, open_BxL, cfg, gap_rng_B, token_rng_B)
    gap_BxG, token_BxG, go_BxG = gap_B[:, None], token_B[:, None], go_B[:, None]
  else:
    gap_BxG, token_BxG, log_prob_BxG, ok_BxG = choose_pairs(outputs, open_BxL, cfg, gap_rng_B, token_rng_B)
    shared_BxGxG = _shared(rows.gap_BxL, gap_BxG, gap_BxG) & ok_BxG[:, None, :]
    before_BxG = (shared_BxGxG & jnp.tri(gap_BxG.shape[1], k=-1, dtype=bool)[None]).sum(axis=2)
    ok_BxG &= before_BxG < jnp.take_along_axis(limit_BxL, gap_BxG, axis=1)
    wanted_BxG = before_BxG < jnp.take_along_axis(rows.lack_BxL, gap_BxG, axis=1)  # the others leave room for these
    spare_B = cfg.max_length - rows.length_B - lack_B
    ok_BxG &= wanted_BxG | (jnp.cumsum(ok_BxG & ~wanted_BxG, axis=1) <= spare_B[:, None])
    ok_BxG &= jnp.cumsum(ok_BxG, axis=1) <= (cfg.max_length - rows.length_B)[:, None]
    go_BxG = ok_BxG & go_B[:, None]
    log_prob_B = jnp.where(go_BxG, log_prob_BxG, 0.0).sum(axis=1)

  def insert(array_BxL, value_BxG):
    if cfg.gaps == 1:
      return drawing.insert(array_BxL, gap_BxG[:, 0], value_BxG[:, 0], go_BxG[:, 0])
    row_Bx1 = jnp.arange(len(go_B))[:, None]
    value_BxL = jnp.zeros_like(array_BxL).at[row_Bx1, gap_BxG].set(value_BxG.astype(array_BxL.dtype))
    return drawing.insert_all(array_BxL, value_BxL, jnp.zeros_like(open_BxL).at[row_Bx1, gap_BxG].set(go_BxG))

  def spread(array_BxL):
    """What is said of a gap, also of its new tokens."""
    return insert(array_BxL, jnp.take_along_axis(array_BxL, gap_BxG, axis=1))

  index_BxL = jnp.broadcast_to(jnp.arange(open_BxL.shape[1])[None], open_BxL.shape)
  used_BxL = (_shared(rows.gap_BxL, index_BxL, gap_BxG) & go_BxG[:, None, :]).sum(axis=2)
  return rows._replace(
    tokens_BxL=insert(rows.tokens_BxL, token_BxG),
    order_BxL=insert(rows.order_BxL, jnp.broadcast_to(rows.steps_B[:, None], gap_BxG.shape)),
    room_BxL=spread(rows.room_BxL - used_BxL),
    lack_BxL=spread(rows.lack_BxL - used_BxL),
    gap_BxL=spread(rows.gap_BxL),
    length_B=rows.length_B + go_BxG.sum(axis=1),
    active_B=go_B,
    steps_B=rows.steps_B + go_B,
    stopped_B=rows.stopped_B | (rows.active_B & wants_stop_B),
    log_prob_BxM=note(rows.log_prob_BxM, rows.steps_B, log_prob_B, go_B),
    stop_prob_BxM=note(rows.stop_prob_BxM, rows.steps_B, stop_prob_B, rows.active_B),
  )


def needed(length_B, cfg: SampleConfig):
  """Positions after the next step, at most."""
  return length_B + cfg.gaps if cfg.gaps else 2 * length_B


GROWTH = growing.Growth(begin, step, needed)


def _shared(gap_BxL, one_BxN, other_BxG):
  """Whether two positions lie in the same gap: BxNxG."""
  one_BxN, other_BxG = (jnp.take_along_axis(gap_BxL, index, axis=1) for index in (one_BxN, other_BxG))
  return one_BxN[:, :, None] == other_BxG[:, None, :]


def choose_pairs(outputs: Outputs, open_BxL, cfg: SampleConfig, gap_rng_B, token_rng_B):
  """Draw `gaps` different gaps of each row, by the rule without replacement, and a token for each.

  Returns:
    (gap_BxG, token_BxG, log_prob_BxG, ok_BxG): the best gap first; not ok where there are fewer gaps, or where one is
    below the threshold; log-probabilities are those of the pairs under the model, before the rules.
  """
  hidden_BxLxD, unembed_VxD = outputs.hidden_BxLxD, outputs.unembed_VxD
  bias_V = vocabulary.closed_bias(unembed_VxD.shape[0], cfg.closed_tokens)
  lse_BxL = vocabulary.vocab_logsumexp(hidden_BxLxD, unembed_VxD, bias_V, chunk=cfg.vocab_chunk, compute=cfg.compute)
  lse_BxL = jnp.where(open_BxL, lse_BxL, numerics.NEG_INF)
  count = min(cfg.gaps or open_BxL.shape[1], open_BxL.shape[1])
  some_BxL = lse_BxL
  if cfg.gap_threshold:
    least_Bx1 = lse_BxL.max(axis=1, keepdims=True) + math.log(cfg.gap_threshold)
    some_BxL = jnp.where(lse_BxL >= least_Bx1, lse_BxL, numerics.NEG_INF)
  gap_BxG, ok_BxG = drawing.choose_several(gap_rng_B, some_BxL, cfg.gap, count=count)

  def draw(column):  # one gap of each row at a time: the logits of all would not fit
    rng_B, gap_B = column
    hidden_BxD = jnp.take_along_axis(hidden_BxLxD, gap_B[:, None, None], axis=1)[:, 0]
    logits_BxV = vocabulary.vocab_logits(hidden_BxD, unembed_VxD, bias_V, compute=cfg.compute)
    token_B = drawing.choose(rng_B, logits_BxV, cfg.token)
    return token_B, jnp.take_along_axis(logits_BxV, token_B[:, None], axis=1)[:, 0]

  more = jax.vmap(lambda number: jax.vmap(jax.random.fold_in, (0, None))(token_rng_B, number))(jnp.arange(1, count))
  rng_GxB = jnp.concatenate([token_rng_B[None], more])  # the first as where there is one gap
  token_GxB, chosen_GxB = jax.lax.map(draw, (rng_GxB, gap_BxG.T))
  return gap_BxG, token_GxB.T, chosen_GxB.T - jax.nn.logsumexp(lse_BxL, axis=1, keepdims=True), ok_BxG


def choose_pair(outputs: Outputs, open_BxL, cfg: SampleConfig, gap_rng_B, token_rng_B):
  """Draw a (gap, token) pair of each row among the open gaps and tokens.

  Returns:
    (gap_B, token_B, log_prob_B): the last is the pair's log-probability under the model, before the rule.
  """
  hidden_BxLxD, unembed_VxD = outputs.hidden_BxLxD, outputs.unembed_VxD
  vocab = unembed_VxD.shape[0]
  bias_V = vocabulary.closed_bias(vocab, cfg.closed_tokens)
  lse_BxL = vocabulary.vocab_logsumexp(hidden_BxLxD, unembed_VxD, bias_V, chunk=cfg.vocab_chunk, compute=cfg.compute)
  lse_BxL = jnp.where(open_BxL, lse_BxL, numerics.NEG_INF)

  if cfg.joint is None:
    gap_B = drawing.choose(gap_rng_B, lse_BxL, cfg.gap)
    hidden_BxD = jnp.take_along_axis(hidden_BxLxD, gap_B[:, None, None], axis=1)[:, 0]
    logits_BxV = vocabulary.vocab_logits(hidden_BxD, unembed_VxD, bias_V, compute=cfg.compute)
    token_B = drawing.choose(token_rng_B, logits_BxV, cfg.token)
    chosen_B = jnp.take_along_axis(logits_BxV, token_B[:, None], axis=1)[:, 0]
  else:
    logits_BxLxV = vocabulary.vocab_logits(hidden_BxLxD, unembed_VxD, bias_V, compute=cfg.compute)
    logits_BxLxV = jnp.where(open_BxL[..., None], logits_BxLxV, numerics.NEG_INF)
    flat_BxLV = logits_BxLxV.reshape(open_BxL.shape[0], -1)
    pair_B = drawing.choose(gap_rng_B, flat_BxLV, cfg.joint)
    gap_B, token_B = pair_B // vocab, pair_B % vocab
    chosen_B = jnp.take_along_axis(flat_BxLV, pair_B[:, None], axis=1)[:, 0]
  return gap_B, token_B, chosen_B - jax.nn.logsumexp(lse_BxL, axis=1)


FAMILY = Family(
  name='ilm',
  corrupt=corrupt,
  loss=loss,
  sample=sample,
  SampleConfig=SampleConfig,
  model_settings=model_settings,
  sizes=sizes,
  score=score,
  check_score=check_score,
  growth=GROWTH,
  open_gap_embedding=True,
  length_weights=('none', 'elbo'),
)
