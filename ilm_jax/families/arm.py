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
from ilm_jax.families.settings import buffers, sample_config
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


class _State(NamedTuple):
  tokens_BxL: jax.Array
  length_B: jax.Array
  active_B: jax.Array
  steps_B: jax.Array
  stopped_B: jax.Array
  log_prob_BxM: jax.Array
  stop_prob_BxM: jax.Array
  cache: list


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
  limit = min(cfg.max_length if cfg.max_steps is None else cfg.max_steps, cfg.max_length)
  request_rng_B = jax.vmap(functools.partial(jax.random.fold_in, rng))(prompt.request_B)
  trace_BxM = jnp.zeros((rows, limit + 1), jnp.float32)
  sizes = buffers(start, cfg)
  length_B = prompt.length_B.astype(jnp.int32)
  state = _State(
    tokens_BxL=prompt.tokens_BxL.astype(jnp.int32),
    length_B=length_B,
    active_B=length_B > 0,
    steps_B=jnp.zeros(rows, jnp.int32),
    stopped_B=jnp.zeros(rows, bool),
    log_prob_BxM=trace_BxM,
    stop_prob_BxM=trace_BxM,
    cache=forward.cached(prompt.tokens_BxL, jnp.zeros_like(length_B), forward.cache(rows, sizes[0]))[1],
  )
  for size in sizes:
    state = _resize(state, size)
    last = size == sizes[-1]

    def going(state, size=size, last=last):
      full = jnp.bool_(False) if last else (state.active_B & (state.length_B >= size)).any()
      return state.active_B.any() & ~full

    state = jax.lax.while_loop(going, functools.partial(_step, forward, request_rng_B, cfg, limit), state)
  index_1xL = jnp.arange(cfg.max_length)[None]
  new_BxL = (index_1xL >= length_B[:, None]) & (index_1xL < state.length_B[:, None])
  return Sampled(
    tokens_BxL=state.tokens_BxL,
    length_B=state.length_B,
    order_BxL=jnp.where(new_BxL, index_1xL - length_B[:, None], -1),
    log_prob_BxM=state.log_prob_BxM,
    stop_prob_BxM=state.stop_prob_BxM,
    steps_B=state.steps_B,
    stopped_B=state.stopped_B,
  )


def _resize(state: _State, size: int) -> _State:
  """Pad (or cut: only padding is lost) tokens and cache to `size` positions."""

  def fit(array):
    extra = max(0, size - array.shape[1])
    return jnp.pad(array, ((0, 0), (0, extra)) + ((0, 0),) * (array.ndim - 2))[:, :size]

  return state._replace(tokens_BxL=fit(state.tokens_BxL), cache=jax.tree.map(fit, state.cache))


def _step(forward, request_rng_B, cfg: SampleConfig, limit: int, state: _State) -> _State:
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

  def note(trace_BxM, value_B, where_B):
    return trace_BxM.at[row_B, state.steps_B].set(jnp.where(where_B, value_B, trace_BxM[row_B, state.steps_B]))

  old_B = state.tokens_BxL[row_B, state.length_B.clip(max=state.tokens_BxL.shape[1] - 1)]
  return _State(
    tokens_BxL=state.tokens_BxL.at[row_B, state.length_B].set(jnp.where(go_B, token_B, old_B), mode='drop'),
    length_B=state.length_B + go_B,
    active_B=go_B,
    steps_B=state.steps_B + go_B,
    stopped_B=state.stopped_B | ends_B,
    log_prob_BxM=note(state.log_prob_BxM, log_prob_BxV[row_B, token_B], go_B),
    stop_prob_BxM=note(state.stop_prob_BxM, jnp.exp(log_prob_BxV[:, EOS]), state.active_B),
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
