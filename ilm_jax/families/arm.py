"""Autoregressive model: the next token given those to its left, up to an end token.

Training: cross-entropy of every free token and of [EOS] behind the last one, averaged over them. Sampling: one token at
a time with a cache of keys and values. The model gives every string an exact probability:

    log p(x | prompt) = sum_t log p(x_t | prompt, x_<t) + log p([EOS] | prompt, x)
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ilm_jax import ops
from ilm_jax.families import corrupt as _corrupt
from ilm_jax.families import growing
from ilm_jax.families.growing import Rows, note
from ilm_jax.families.settings import sample_config
from ilm_jax.tokenizer import EOS
from ilm_jax.types import GREEDY, Batch, Metrics, Outputs, Prompt, Rule, Sampled, Score, UserError

corrupt = _corrupt.arm


def model_settings(cfg) -> dict:
  """The fields of ModelConfig that an autoregressive model decides."""
  del cfg
  return {'causal': True, 'stop_head': False}


def most_targets(longest: int, answer: int) -> int:
  """Targets of an example of at most `longest` tokens, `answer` of them free: those, and the end."""
  del longest
  return answer + 1


# --- training ---------------------------------------------------------------------------------------------------------


def target_losses(outputs: Outputs, batch: Batch, *, compute: str = 'float32', chunk: int = 2048):
  """The cross-entropy of each listed target, predicted at its gap: BxT."""
  lse_BxL = ops.vocab_logsumexp(outputs.hidden_BxLxD, outputs.unembed_VxD, chunk=chunk, compute=compute)
  gap_BxT, token_BxT = batch['target_gap_BxT'], batch['target_token_BxT']
  z_BxT = ops.target_logits(outputs.hidden_BxLxD, outputs.unembed_VxD, gap_BxT, token_BxT, compute=compute)
  return jnp.take_along_axis(lse_BxL, gap_BxT, axis=1) - z_BxT


def loss(outputs: Outputs, batch: Batch, cfg) -> Metrics:
  """Mean cross-entropy over the target tokens of the batch; `string_loss` is its sum over a string, end included.

  Args:
    outputs: of the model on the batch.
    batch: see `types`.
    cfg: `compute` and `vocab_chunk` of the vocabulary head.
  """
  ce_BxT = target_losses(outputs, batch, compute=cfg.compute, chunk=cfg.vocab_chunk)
  used_BxT = (batch['target_segment_BxT'] > 0).astype(jnp.float32)
  total, count = (ce_BxT * used_BxT).sum(), used_BxT.sum()
  return {'loss': (total, count), 'string_loss': (total, batch['segment_weight_BxS'].sum())}


# --- sampling ---------------------------------------------------------------------------------------------------------


class SampleConfig(NamedTuple):
  """How to sample. Hashable: a jit compiles once for each."""

  max_length: int  # of a row, the prompt included, [EOS] not
  max_steps: int | None = None  # new tokens of a row, at most
  token: Rule = GREEDY
  force_first: bool = False  # at least one token before the end
  closed_tokens: tuple[int, ...] = ()  # ids never produced
  min_buffer: int = 64  # shortest cache; it doubles up to max_length as rows grow
  compute: str = 'float32'
  vocab_chunk: int = 2048

  @classmethod
  def create(cls, sampling, **others) -> 'SampleConfig':
    """Build from a config's `sampling` part; [EOS] is never closed."""
    closed = tuple(token for token in others.pop('closed_tokens', ()) if token != EOS)
    return sample_config(cls, sampling, closed_tokens=closed, **others)


def sample(forward, rng, prompt: Prompt, cfg: SampleConfig) -> Sampled:
  """Continue each prompt until [EOS]: the prompt in one pass, then a chain of while loops over growing caches.

  Args:
    forward: `cache(rows, size)` and `cached(tokens_BxN, start_B, cache) -> (Outputs, cache)`, as of `model.Forward`.
    rng: the key of the whole run; a row's noise is fold_in(fold_in(rng, request), step) and nothing else.
    prompt: rows of given tokens; new ones come behind the last.
    cfg: see SampleConfig.

  Returns:
    Sampled; `stop_prob_BxM` is the probability of [EOS] at each pass, `order_BxL` counts from left to right.
  """
  rows, start = prompt.tokens_BxL.shape
  empty = forward.cache(rows, growing.buffers(start, cfg)[0])
  cache = forward.cached(prompt.tokens_BxL, jnp.zeros(rows, jnp.int32), empty)[1]
  step = functools.partial(_step, forward, growing.request_keys(rng, prompt), cfg, growing.most_steps(cfg))
  return growing.grow(step, prompt, cfg, cache=cache)


def _step(forward, request_rng_B, cfg: SampleConfig, limit: int, state: Rows) -> Rows:
  """The last token of each row through the model, one draw, one token more in each row that goes on."""
  rng_B = jax.vmap(jax.random.fold_in)(request_rng_B, state.steps_B)
  row_B = jnp.arange(rng_B.shape[0])
  at_B = jnp.maximum(state.length_B - 1, 0)
  outputs, cache = forward.cached(state.tokens_BxL[row_B, at_B][:, None], at_B, state.cache)

  logits_BxV = logits(outputs.hidden_BxLxD[:, 0], outputs.unembed_VxD, cfg)
  log_prob_BxV = jax.nn.log_softmax(logits_BxV, axis=-1)
  if cfg.force_first:
    first_B = state.steps_B == 0
    logits_BxV = logits_BxV.at[:, EOS].set(jnp.where(first_B, ops.NEG_INF, logits_BxV[:, EOS]))
  token_B = ops.choose(rng_B, logits_BxV, cfg.token)

  room_B = (state.length_B < cfg.max_length) & (state.steps_B < limit)
  ends_B = state.active_B & (token_B == EOS)
  go_B = state.active_B & ~ends_B & room_B

  def append(array_BxL, value_B):
    old_B = array_BxL[row_B, state.length_B.clip(max=array_BxL.shape[1] - 1)]
    return array_BxL.at[row_B, state.length_B].set(jnp.where(go_B, value_B, old_B), mode='drop')

  end_prob_B = jnp.exp(log_prob_BxV[:, EOS])
  return Rows(
    tokens_BxL=append(state.tokens_BxL, token_B),
    open_BxL=state.open_BxL,
    order_BxL=append(state.order_BxL, state.steps_B),
    length_B=state.length_B + go_B,
    active_B=go_B,
    steps_B=state.steps_B + go_B,
    stopped_B=state.stopped_B | ends_B,
    log_prob_BxM=note(state.log_prob_BxM, state.steps_B, log_prob_BxV[row_B, token_B], go_B),
    stop_prob_BxM=note(state.stop_prob_BxM, state.steps_B, end_prob_B, state.active_B),
    cache=cache,
  )


def logits(hidden, unembed_VxD, cfg: SampleConfig):
  """Logits with the closed tokens at NEG_INF."""
  bias_V = jnp.zeros(unembed_VxD.shape[0]).at[jnp.array(cfg.closed_tokens, jnp.int32)].set(ops.NEG_INF)
  logits = ops.einsum('bd,vd->bv', hidden, unembed_VxD, ops.head_compute(cfg.compute))
  return logits + ops.expand(bias_V, logits.ndim)


# --- likelihood -------------------------------------------------------------------------------------------------------


def check_score(kind: str | None, longest: int) -> None:
  """Refuse a kind that there is not."""
  del longest
  if kind not in (None, 'exact'):
    raise UserError(f'score: kind={kind!r}: expected exact for family=arm')


def score(forward, rng, tokens_BxL, fixed_BxL, length_B, cfg: SampleConfig, *, kind: str | None = None,
          longest: int = 0) -> Score:  # fmt: skip
  """The exact negative log-likelihood of the free tokens and the end, over the tokens that `sample` can produce.

  Args:
    forward: (tokens_BxL, length_B) -> Outputs.
    rng: not used.
    tokens_BxL: whole rows, [CLS] first.
    fixed_BxL: given tokens; they come before the free ones.
    length_B: of the rows.
    cfg: `closed_tokens`, `compute` and `vocab_chunk` are read.
    kind: 'exact', or nothing.
    longest: not used.
  """
  del rng
  check_score(kind, longest)
  outputs = forward(tokens_BxL, length_B)
  bias_V = jnp.zeros(outputs.unembed_VxD.shape[0]).at[jnp.array(cfg.closed_tokens, jnp.int32)].set(ops.NEG_INF)
  lse_BxL = ops.vocab_logsumexp(
    outputs.hidden_BxLxD, outputs.unembed_VxD, bias_V, chunk=cfg.vocab_chunk, compute=cfg.compute
  )
  index_BxL = jnp.broadcast_to(jnp.arange(tokens_BxL.shape[1]), tokens_BxL.shape)
  end_Bx1 = length_B[:, None] - 1
  next_BxL = jnp.where(index_BxL == end_Bx1, EOS, jnp.roll(tokens_BxL, -1, axis=1))
  z_BxL = ops.target_logits(outputs.hidden_BxLxD, outputs.unembed_VxD, index_BxL, next_BxL, compute=cfg.compute)
  free_BxL = ~fixed_BxL & (index_BxL <= end_Bx1)
  asked_BxL = jnp.where(index_BxL == end_Bx1, True, jnp.roll(free_BxL, -1, axis=1)) & (index_BxL <= end_Bx1)
  nll_B = jnp.where(asked_BxL, lse_BxL - z_BxL, 0.0).sum(axis=1)
  return Score('exact', nll_B, jnp.zeros_like(nll_B), free_BxL.sum(axis=1))
