"""Insertion Transformer (Stern et al. 2019), the baseline of arXiv 2505.05755: a separate softmax for every gap.

The softmax of a gap covers the whole vocabulary, where [EOS] means that the gap needs no further token. For gap k with
the set D_k of c = |D_k| dropped tokens, and p_k the softmax of its logits:

    loss_k = -1 / (c + 1) sum_{j in D_k} log p_k(x_j)     c > 0
    loss_k = -eos_weight log p_k([EOS])                   c = 0

The loss is the mean over all gaps. (The last gap of a full row also has an [EOS] target here; the reference
implementation omits this target.) A decoding step inserts a token into one gap or into every gap, except gaps that are
finished because [EOS] is probable. The model defines no distribution over gaps, so a string has no likelihood.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ilm_jax.families import corruption as _corrupt
from ilm_jax.families import drawing, growing, settings
from ilm_jax.families.contract import Family
from ilm_jax.families.growing import Rows
from ilm_jax.models import numerics, vocabulary
from ilm_jax.special_tokens import EOS
from ilm_jax.types import GREEDY, Batch, Metrics, Outputs, Rule, UserError

corrupt = _corrupt.it


# --- training ---------------------------------------------------------------------------------------------------------


def loss(outputs: Outputs, batch: Batch, cfg) -> Metrics:
  """Return the mean loss per gap, and its parts from token targets and from [EOS] targets, as (total, weight) pairs.

  `target_weight_BxT` of the batch is eos_weight for an [EOS] target, and 1 / (c + 1) for each of c tokens of a gap.
  """
  ce_BxT = vocabulary.target_nll(
    outputs, batch['target_gap_BxT'], batch['target_token_BxT'], chunk=cfg.vocab_chunk, compute=cfg.compute
  )
  ce_BxT = ce_BxT * batch['target_weight_BxT']
  gaps, end_BxT = batch['open_BxL'].sum().astype(jnp.float32), batch['target_token_BxT'] == EOS
  end, token = jnp.where(end_BxT, ce_BxT, 0.0).sum(), jnp.where(end_BxT, 0.0, ce_BxT).sum()
  return {'loss': (token + end, gaps), 'token_loss': (token, gaps), 'stop_loss': (end, gaps)}


# --- sampling ---------------------------------------------------------------------------------------------------------


class SampleConfig(NamedTuple):
  """Sampling settings; hashable, because jit takes them as a static argument."""

  max_length: int  # maximum number of tokens per row, counting the prompt
  max_steps: int | None = None  # maximum number of decoding steps that insert into a row; None: no limit
  gap: Rule = GREEDY  # with parallel=False: rule for drawing a gap by the log-sum-exp of its token logits
  token: Rule = GREEDY  # rule for drawing the token to insert into a gap
  parallel: bool = False  # whether a step inserts a token into every unfinished gap, instead of into one gap
  # A gap is finished if p([EOS]) > end_threshold or, with None (0 in a config), if [EOS] is its most probable token.
  end_threshold: float | None = None
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
    if sampling.get('end_threshold') == 0:
      sampling = {**sampling, 'end_threshold': None}
    others['suppressed_tokens'] = tuple({*others.get('suppressed_tokens', ()), EOS})
    return settings.sample_config(cls, sampling, **others)


def step(forward, cfg: SampleConfig, rows: Rows) -> Rows:
  """Run one decoding step: a forward pass, then an insertion into one gap (or every unfinished gap) of each row.

  It records log p(token | gap, not [EOS]), summed over the tokens, and as p(stop) the least p([EOS]) of an open gap.
  """
  gap_rng_B, token_rng_B = growing.step_keys(rows, 2)
  open_BxL = growing.open_gaps(rows)
  outputs = forward(rows.tokens_BxL, rows.length_B, open_BxL=open_BxL)
  closed_V = vocabulary.suppressed_bias(outputs.unembed_VxD.shape[0], settings.never_generated(cfg))
  total_BxL, end_prob_BxL, finished_BxL = _gap_states(outputs, closed_V, cfg)
  if cfg.force_first:
    finished_BxL &= rows.steps_B[:, None] > 0
  unfinished_BxL = open_BxL & ~finished_BxL
  done_B = ~unfinished_BxL.any(axis=1)
  room_B = (rows.length_B < cfg.max_length) & (rows.steps_B < growing.most_steps(cfg))
  go_B = rows.active_B & ~done_B & room_B

  if cfg.parallel:
    # If the row has no space for a token in every unfinished gap, only the leftmost unfinished gaps receive one.
    fits_BxL = jnp.cumsum(unfinished_BxL, axis=1) <= (cfg.max_length - rows.length_B)[:, None]
    go_BxL = unfinished_BxL & fits_BxL & go_B[:, None]
    token_BxL, logit_BxL = _draw_everywhere(token_rng_B, outputs, closed_V, cfg)
  else:
    gap_B = drawing.choose(gap_rng_B, jnp.where(unfinished_BxL, total_BxL, numerics.NEG_INF), cfg.gap)
    index_BxL = jnp.broadcast_to(jnp.arange(open_BxL.shape[1]), open_BxL.shape)
    go_BxL = (index_BxL == gap_B[:, None]) & go_B[:, None]
    token_B, logit_B = drawing.draw_token(token_rng_B, outputs, gap_B, closed_V, cfg.token, compute=cfg.compute)
    token_BxL, logit_BxL = (jnp.broadcast_to(value_B[:, None], open_BxL.shape) for value_B in (token_B, logit_B))

  return growing.advance(
    rows,
    go_B=go_B,
    stops_B=rows.active_B & done_B,
    inserted_B=go_BxL.sum(axis=1),
    log_prob_B=jnp.where(go_BxL, logit_BxL - total_BxL, 0.0).sum(axis=1),
    stop_prob_B=jnp.where(open_BxL, end_prob_BxL, 1.0).min(axis=1),
    tokens_BxL=drawing.insert_all(rows.tokens_BxL, token_BxL, go_BxL),
    max_left_BxL=drawing.insert_all(rows.max_left_BxL, rows.max_left_BxL, go_BxL),
    gap_BxL=drawing.insert_all(rows.gap_BxL, rows.gap_BxL, go_BxL),
    order_BxL=drawing.insert_all(rows.order_BxL, jnp.broadcast_to(rows.steps_B[:, None], open_BxL.shape), go_BxL),
  )


GROWTH = growing.Growth(
  growing.begin_without_cache, step, lambda length_B, cfg: 2 * length_B if cfg.parallel else length_B + 1
)
sample = functools.partial(growing.sample, GROWTH)


def _gap_states(outputs: Outputs, closed_V, cfg: SampleConfig):
  """Evaluate the softmax of every gap, over the tokens that may be inserted and [EOS].

  Returns (total_BxL, end_prob_BxL, finished_BxL): log-sum-exp of the logits without [EOS]; p([EOS]); whether p([EOS])
  is high enough for the gap to be finished.
  """
  hidden_BxLxD, unembed_VxD = outputs.hidden_BxLxD, outputs.unembed_VxD
  head = {'chunk': cfg.vocab_chunk, 'compute': cfg.compute}
  total_BxL = vocabulary.vocab_logsumexp(hidden_BxLxD, unembed_VxD, closed_V, **head)
  end_BxL = numerics.einsum('bld,d->bl', hidden_BxLxD, unembed_VxD[EOS], vocabulary.head_compute(cfg.compute))
  end_prob_BxL = jax.nn.sigmoid(end_BxL - total_BxL)
  if cfg.end_threshold is None:
    return total_BxL, end_prob_BxL, end_BxL >= vocabulary.vocab_max(hidden_BxLxD, unembed_VxD, closed_V, **head)
  return total_BxL, end_prob_BxL, end_prob_BxL > cfg.end_threshold


def _draw_everywhere(rng_B, outputs: Outputs, closed_V, cfg: SampleConfig):
  """Draw a token to insert right of every position; return the drawn tokens and their logits, both BxL."""

  def draw(row):  # one row at a time: the logits of all rows would need too much memory
    rng, hidden_LxD = row
    logits_LxV = vocabulary.vocab_logits(hidden_LxD, outputs.unembed_VxD, closed_V, compute=cfg.compute)
    rng_L = jax.vmap(functools.partial(jax.random.fold_in, rng))(jnp.arange(hidden_LxD.shape[0]))
    token_L = drawing.choose(rng_L, logits_LxV, cfg.token)
    return token_L, jnp.take_along_axis(logits_LxV, token_L[:, None], axis=1)[:, 0]

  return jax.lax.map(draw, (rng_B, outputs.hidden_BxLxD))


def check_prompt(given: dict, cfg: SampleConfig) -> None:
  """Raise UserError if a prompt limits the number of tokens in a gap, because only [EOS] can end a gap here."""
  del cfg
  if given.get('least') is not None or given.get('most') is not None:
    raise UserError('family=it supports no minimum or maximum length of a gap: remove the limits, or use family=ilm')


def check_score(kind: str | None, longest: int) -> None:
  """Raise UserError: this family defines no likelihood."""
  raise UserError('family=it has no likelihood, because it defines no distribution over gaps')


FAMILY = Family(
  name='it', corrupt=corrupt, loss=loss, sample=sample, SampleConfig=SampleConfig,
  model_settings=lambda cfg: {'causal': False, 'stop_head': False}, check_score=check_score,
  # Each token gives at most one target: itself if dropped, else [EOS] if no token is missing right of it.
  sizes=lambda cfg, longest, answer: (longest, longest), check_prompt=check_prompt, fills='free', growth=GROWTH,
  open_gap_embedding=True,
)  # fmt: skip
