"""Insertion Transformer (Stern et al. 2019), the baseline of arXiv 2505.05755: every gap has a softmax of its own.

A gap's softmax is over the vocabulary with [EOS], which says that nothing is missing there. For a gap k with the
dropped tokens D_k, c = |D_k|, and p_k = softmax(Z[k]):

    loss_k = -1 / (c + 1) sum_{j in D_k} log p_k(x_j)     c > 0
    loss_k = -eos_weight log p_k([EOS])                   c = 0

averaged over the gaps (the last gap of a full row has its [EOS] too, which the reference's code leaves out). Sampling
inserts one token in one gap, or in every open gap, until all gaps are finished. There is no distribution over gaps, so
a string has no likelihood.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ilm_jax.families import arm, drawing, growing, settings
from ilm_jax.families import corruption as _corrupt
from ilm_jax.families.contract import Family
from ilm_jax.families.growing import Rows, note
from ilm_jax.models import numerics, vocabulary
from ilm_jax.special_tokens import EOS
from ilm_jax.types import GREEDY, Batch, Metrics, Outputs, Prompt, Rule, Sampled, UserError

corrupt = _corrupt.it


def model_settings(cfg) -> dict:
  """The fields of ModelConfig that an Insertion Transformer decides."""
  del cfg
  return {'causal': False, 'stop_head': False}


def sizes(cfg, longest: int, answer: int) -> tuple[int, int]:
  """(tokens, targets) of the longest example: each token is dropped, or has an end symbol behind it."""
  del cfg, answer
  return longest, longest


# --- training ---------------------------------------------------------------------------------------------------------


def loss(outputs: Outputs, batch: Batch, cfg) -> Metrics:
  """The mean over gaps of each gap's loss, and its two parts as shares of it.

  Args:
    outputs: of the model on the batch.
    batch: see `types`; `target_weight_BxT` holds the 1 / (c + 1) and the eos_weight.
    cfg: `compute` and `vocab_chunk` of the vocabulary head.
  """
  ce_BxT = arm.target_losses(outputs, batch, compute=cfg.compute, chunk=cfg.vocab_chunk)
  ce_BxT = ce_BxT * batch['target_weight_BxT']
  gaps = batch['open_BxL'].sum().astype(jnp.float32)
  end_BxT = batch['target_token_BxT'] == EOS
  end = jnp.where(end_BxT, ce_BxT, 0.0).sum()
  token = jnp.where(end_BxT, 0.0, ce_BxT).sum()
  return {'loss': (token + end, gaps), 'token_loss': (token, gaps), 'stop_loss': (end, gaps)}


# --- sampling ---------------------------------------------------------------------------------------------------------


class SampleConfig(NamedTuple):
  """How to sample. Hashable: a jit compiles once for each."""

  max_length: int  # of a row, the prompt included
  max_steps: int | None = None  # forward passes that insert, at most
  gap: Rule = GREEDY  # serial: the gap by its unnormalised total, as the reference
  token: Rule = GREEDY
  parallel: bool = False  # insert in every gap that is not finished, not in one
  end_threshold: float | None = None  # a gap is finished when p([EOS]) is above it; None (0 in a config): at the argmax
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
    if sampling.get('end_threshold') == 0:
      sampling = {**sampling, 'end_threshold': None}
    others['closed_tokens'] = tuple({*others.get('closed_tokens', ()), EOS})
    made = settings.sample_config(cls, sampling, **others)
    if made.end_threshold is not None and not 0 < made.end_threshold < 1:
      raise UserError(f'sampling.end_threshold={made.end_threshold}: expected a probability, or 0 for the argmax')
    return made


def sample(forward, rng, prompt: Prompt, cfg: SampleConfig) -> Sampled:
  """Insert tokens until every open gap of every row is finished, without a host sync.

  Args:
    forward: (tokens_BxL, length_B) -> Outputs.
    rng: the key of the whole run; a row's noise is fold_in(fold_in(rng, request), step) and nothing else.
    prompt: rows of given tokens.
    cfg: see SampleConfig.

  Returns:
    Sampled; `log_prob_BxM` is the sum over the tokens of a step of log p(token | gap, not [EOS]), `stop_prob_BxM` the
    smallest p([EOS]) of the open gaps.
  """
  return growing.sample(GROWTH, forward, rng, prompt, cfg)


def check_prompt(given: dict, cfg: SampleConfig) -> None:
  """Refuse numbers of tokens: a gap is finished when its own softmax says so."""
  del cfg
  if given.get('least') is not None or given.get('most') is not None:
    raise UserError('family=it has no minimum or maximum length of a gap: leave them out, or use family=ilm')


def begin(forward, rng, prompt: Prompt, cfg: SampleConfig, size: int) -> Rows:
  """Rows that hold their prompts."""
  del forward
  return growing.begin(rng, prompt, cfg, size)


def needed(length_B, cfg: SampleConfig):
  """Positions after the next step, at most: a parallel one may double a row."""
  return 2 * length_B if cfg.parallel else length_B + 1


def step(forward, cfg: SampleConfig, rows: Rows) -> Rows:
  """One forward pass; tokens in one gap, or all unfinished gaps, of each row that goes on."""
  rng_B = jax.vmap(jax.random.fold_in)(rows.rng_B, rows.steps_B)
  gap_rng_B, token_rng_B = jax.vmap(functools.partial(jax.random.split, num=2), out_axes=1)(rng_B)
  open_BxL = (rows.room_BxL > 0) & (jnp.arange(rows.tokens_BxL.shape[1])[None] < rows.length_B[:, None])
  outputs = forward(rows.tokens_BxL, rows.length_B, open_BxL=open_BxL)
  hidden_BxLxD, unembed_VxD = outputs.hidden_BxLxD, outputs.unembed_VxD
  row_B, size = jnp.arange(rng_B.shape[0]), rows.tokens_BxL.shape[1]
  lengths = {'chunk': cfg.vocab_chunk, 'compute': cfg.compute}

  # Which gaps are finished: by the softmax over all entries, [EOS] among them.
  closed_V = vocabulary.closed_bias(unembed_VxD.shape[0], cfg.closed_tokens)
  total_BxL = vocabulary.vocab_logsumexp(hidden_BxLxD, unembed_VxD, closed_V, **lengths)  # without [EOS]
  index_BxL = jnp.broadcast_to(jnp.arange(size), rows.tokens_BxL.shape)
  end_BxL = numerics.einsum('bld,d->bl', hidden_BxLxD, unembed_VxD[EOS], vocabulary.head_compute(cfg.compute))
  end_prob_BxL = jax.nn.sigmoid(end_BxL - total_BxL)
  if cfg.end_threshold is None:
    finished_BxL = end_BxL >= vocabulary.vocab_max(hidden_BxLxD, unembed_VxD, closed_V, **lengths)
  else:
    finished_BxL = end_prob_BxL > cfg.end_threshold
  if cfg.force_first:
    finished_BxL &= rows.steps_B[:, None] > 0
  unfinished_BxL = open_BxL & ~finished_BxL

  done_B = ~unfinished_BxL.any(axis=1)
  room_B = (rows.length_B < cfg.max_length) & (rows.steps_B < growing.most_steps(cfg))
  go_B = rows.active_B & ~done_B & room_B
  if cfg.parallel:
    # The first gaps win where there is not room for all.
    fits_BxL = jnp.cumsum(unfinished_BxL, axis=1) <= (cfg.max_length - rows.length_B)[:, None]
    go_BxL = unfinished_BxL & fits_BxL & go_B[:, None]

    def draw(row):  # one row at a time: the logits of all gaps of all rows would not fit
      rng, hidden_LxD = row
      logits_LxV = vocabulary.vocab_logits(hidden_LxD, unembed_VxD, closed_V, compute=cfg.compute)
      token_L = drawing.choose(
        jax.vmap(functools.partial(jax.random.fold_in, rng))(jnp.arange(size)), logits_LxV, cfg.token
      )
      return token_L, jnp.take_along_axis(logits_LxV, token_L[:, None], axis=1)[:, 0]

    token_BxL, chosen_BxL = jax.lax.map(draw, (token_rng_B, hidden_BxLxD))
  else:
    gap_B = drawing.choose(gap_rng_B, jnp.where(unfinished_BxL, total_BxL, numerics.NEG_INF), cfg.gap)
    go_BxL = (index_BxL == gap_B[:, None]) & go_B[:, None]
    hidden_BxD = jnp.take_along_axis(hidden_BxLxD, gap_B[:, None, None], axis=1)[:, 0]
    logits_BxV = vocabulary.vocab_logits(hidden_BxD, unembed_VxD, closed_V, compute=cfg.compute)
    token_B = drawing.choose(token_rng_B, logits_BxV, cfg.token)
    token_BxL = jnp.broadcast_to(token_B[:, None], index_BxL.shape)
    chosen_BxL = jnp.broadcast_to(logits_BxV[row_B, token_B][:, None], index_BxL.shape)
  log_prob_B = jnp.where(go_BxL, chosen_BxL - total_BxL, 0.0).sum(axis=1)
  end_prob_B = jnp.where(open_BxL, end_prob_BxL, 1.0).min(axis=1)

  steps_BxL = jnp.broadcast_to(rows.steps_B[:, None], index_BxL.shape)
  return rows._replace(
    tokens_BxL=drawing.insert_all(rows.tokens_BxL, token_BxL, go_BxL),
    room_BxL=drawing.insert_all(rows.room_BxL, rows.room_BxL, go_BxL),
    gap_BxL=drawing.insert_all(rows.gap_BxL, rows.gap_BxL, go_BxL),
    order_BxL=drawing.insert_all(rows.order_BxL, steps_BxL, go_BxL),
    length_B=rows.length_B + go_BxL.sum(axis=1),
    active_B=go_B,
    steps_B=rows.steps_B + go_B,
    stopped_B=rows.stopped_B | (rows.active_B & done_B),
    log_prob_BxM=note(rows.log_prob_BxM, rows.steps_B, log_prob_B, go_B),
    stop_prob_BxM=note(rows.stop_prob_BxM, rows.steps_B, end_prob_B, rows.active_B),
  )


GROWTH = growing.Growth(begin, step, needed)


def check_score(kind: str | None, longest: int) -> None:
  """Refuse: an Insertion Transformer has no distribution over gaps."""
  raise UserError('family=it has no likelihood: its softmaxes say which token comes into a gap, not which gap is next')


FAMILY = Family(
  name='it',
  corrupt=corrupt,
  loss=loss,
  sample=sample,
  SampleConfig=SampleConfig,
  model_settings=model_settings,
  sizes=sizes,
  check_score=check_score,
  check_prompt=check_prompt,
  fills='free',
  growth=GROWTH,
  open_gap_embedding=True,
)
