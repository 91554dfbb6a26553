"""Masked diffusion language model (MDLM, arXiv 2406.07524): free tokens are replaced by [MASK], then predicted.

At a time t in (0, 1] each free token of a string x is masked with probability (1 - eps) t, which gives z_t. The model
receives the noise level sigma(t) = -log(1 - (1 - eps) t) and predicts a token distribution p(. | z_t) at each [MASK] j.
The loss at time t has weight sigma'(t) / (exp(sigma(t)) - 1) = 1 / t:

    -log p(x) <= NELBO = integral over t of  1/t  E_{z_t} sum_{j masked} -log p(x_j | z_t)

The training loss `loss.mdm` is 'nelbo', the NELBO per string for t > SHORTEST_TIME, or 'mean_masked', the same weighted
sum divided by the number of [MASK]s in the batch, which is not a bound; the reference implementation trains with it.

With sampling.length='predicted', the model is trained on strings padded to a fixed length, with [PAD]s that are masked
and predicted like other tokens; with 'given', each prompt says how many tokens to generate.

Sampling starts from a fully masked answer. The order 'ancestral' divides the time from 1 to 0 into equal steps. A step
from t to s reveals each [MASK] with probability (t - s) / t, and the last step reveals all remaining [MASK]s. The other
orders first reveal the tokens of which the model is most certain.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ilm_jax.families import corruption as _corrupt
from ilm_jax.families import drawing
from ilm_jax.families.contract import Family
from ilm_jax.families.growing import pad_or_cut, request_keys
from ilm_jax.families.settings import never_generated, sample_config
from ilm_jax.models import numerics, vocabulary
from ilm_jax.special_tokens import MASK, PAD
from ilm_jax.types import Batch, Metrics, Outputs, Prompt, Rule, Sampled, Score, UserError

corrupt = _corrupt.mdm

LOSSES = ('mean_masked', 'nelbo')
ORDERS = ('ancestral', 'top_probability', 'margin', 'entropy')
LENGTHS = ('predicted', 'given')
MAX_LOGITS = 2**24  # maximum number of logits that the sampler holds in memory at a time


def model_settings(cfg) -> dict:
  """Return the ModelConfig fields that this family sets; adaLN conditioning requires the final LayerNorm."""
  conditioning = cfg.model.get('conditioning') or 'adaln'
  norm = {'final_norm': True} if conditioning == 'adaln' else {}
  return {'causal': False, 'stop_head': False, 'conditioning': conditioning, **norm}


def sizes(cfg, longest: int, answer: int) -> tuple[int, int]:
  """Return the numbers of tokens and targets of the longest padded example; raise UserError if settings conflict."""
  eps, length, data = cfg.corrupt.noise_eps, cfg.corrupt.length, cfg.data
  if not 0 < eps < 1:
    raise UserError(f'corrupt.noise_eps={eps}: expected a fraction above 0 and below 1')
  if cfg.loss.mdm not in LOSSES:
    raise UserError(f'loss.mdm={cfg.loss.mdm!r}: expected one of {", ".join(LOSSES)}')
  if cfg.sampling.length == 'predicted' and cfg.sampling.max_length != length:
    raise UserError(
      f'sampling.max_length={cfg.sampling.max_length}: expected corrupt.length={length}, the padded length of '
      'training examples: make them equal, or use sampling.length=given'
    )
  if not length:
    return longest, answer
  if length < longest:
    raise UserError(f'corrupt.length={length}: the longest example has {longest} tokens: increase corrupt.length')
  per_row = min(data.row_length // length, data.segments)
  if 0 < per_row * data.rows < data.batch_size:
    rows = -(-data.batch_size // (per_row * data.groups)) * data.groups
    raise UserError(
      f'data.rows={data.rows} can hold {per_row * data.rows} examples of corrupt.length={length} tokens, fewer than '
      f'data.batch_size={data.batch_size}: use data.rows={rows}'
    )
  return length, length - 1


def noise_level(time, eps: float):
  """Return the noise level sigma(t) of the log-linear schedule at time t."""
  return -jnp.log1p(-(1.0 - eps) * time)


# --- training ---------------------------------------------------------------------------------------------------------


def example_losses(outputs: Outputs, batch: Batch, *, compute: str = 'float32', chunk: int = 2048):
  """Return per segment: cross-entropy in nats, summed over [MASK]s, with and without weights; number of [MASK]s."""
  segments, segment_BxT = batch['cls_BxS'].shape[1], batch['target_segment_BxT']
  loss_BxT = vocabulary.target_nll(
    outputs, batch['target_gap_BxT'], batch['target_token_BxT'], chunk=chunk, compute=compute
  )
  sums = [numerics.segment_sum(x, segment_BxT, segments) for x in (loss_BxT * batch['target_weight_BxT'], loss_BxT)]
  return *sums, numerics.segment_sum((segment_BxT > 0).astype(jnp.float32), segment_BxT, segments)


def loss(outputs: Outputs, batch: Batch, cfg) -> Metrics:
  """Return `loss` (of kind `cfg.mdm`), `string_bound` and `token_loss` (per [MASK]) as (total, weight) pairs, in nats.

  `string_bound` is an unbiased estimate of the NELBO integral over the training times, from SHORTEST_TIME to 1. Only
  `score` includes the rest of the integral, which is about SHORTEST_TIME times the loss of a single [MASK].
  """
  weighted_BxS, plain_BxS, masks_BxS = example_losses(outputs, batch, compute=cfg.compute, chunk=cfg.vocab_chunk)
  weight_BxS = batch['segment_weight_BxS']
  weighted, masks = (weight_BxS * weighted_BxS).sum(), (weight_BxS * masks_BxS).sum()
  bound = (1.0 - _corrupt.SHORTEST_TIME) * weighted, weight_BxS.sum()  # undo the density 1 / (1 - SHORTEST_TIME) of t
  return {
    'loss': bound if cfg.mdm == 'nelbo' else (weighted, masks),
    'string_bound': bound,
    'token_loss': ((weight_BxS * plain_BxS).sum(), masks),
  }


# --- sampling ---------------------------------------------------------------------------------------------------------


class SampleConfig(NamedTuple):
  """Sampling settings; hashable, because jit takes them as a static argument."""

  max_length: int  # maximum tokens per row, counting the prompt; with length='predicted', the padded training length
  max_steps: int | None = None  # maximum number of denoising steps; None: max_length
  order: str = 'ancestral'  # which [MASK]s each step reveals: one of ORDERS
  length: str = 'predicted'  # number of tokens to generate: 'predicted' by the model, or 'given' in Prompt.free_B
  token: Rule = Rule()  # rule for drawing each token: temperature, top-k, top-p
  suppressed_tokens: tuple[int, ...] = (MASK,)  # ids of tokens that are never generated
  byte_ids: tuple[int, ...] = ()  # tokens for one byte of a character: sampled only if bytes=True, but always scored
  bytes: bool = False  # whether to sample the one-byte tokens (byte_ids) too; the text may then be invalid UTF-8
  noise_eps: float = 1e-3  # eps of the training schedule, which masks a token with probability (1 - eps) t
  score_draws: int = 32  # number of random maskings that `score` averages for the upper bound on a string's -log p
  min_buffer: int = 64  # minimum length in tokens to which prompts are padded
  compute: str = 'float32'  # precision of the matrix products in the vocabulary head
  vocab_chunk: int = 2048  # the logits are computed for this many vocabulary entries at a time

  @classmethod
  def create(cls, sampling, *, suppressed_tokens=(), **others) -> 'SampleConfig':
    """Build a SampleConfig from the `sampling` section of a config; raise UserError for values out of range.

    [MASK] is never generated; [PAD] can be generated with length='predicted', where it marks the end of the text.
    """
    made = sample_config(cls, sampling, suppressed_tokens=suppressed_tokens, **others)
    for name, allowed in (('order', ORDERS), ('length', LENGTHS)):
      if getattr(made, name) not in allowed:
        raise UserError(f'sampling.{name}={getattr(made, name)!r}: expected one of {", ".join(allowed)}')
    if made.max_steps is not None and made.max_steps < 1:
      raise UserError(f'sampling.max_steps={made.max_steps}: expected at least 1')
    closed = {*suppressed_tokens, MASK} - ({PAD} if made.length == 'predicted' else set())
    return made._replace(suppressed_tokens=tuple(sorted(closed)))


def check_prompt(given: dict, cfg: SampleConfig) -> None:
  """With length='given', raise UserError if the prompt's number of tokens to generate is missing or too large."""
  if cfg.length != 'given':
    return
  tokens, free = len(given['tokens']), given.get('free', -1)
  if free < 0:
    raise UserError(
      "sampling.length='given' requires the number of tokens to generate ('free') in each prompt, got none: add it, or "
      "use a model trained to predict the length, with sampling.length='predicted'"
    )
  if tokens + free > cfg.max_length:
    raise UserError(
      f'a prompt of {tokens} tokens and {free} tokens to generate exceed sampling.max_length={cfg.max_length}: '
      'increase it'
    )


class _State(NamedTuple):
  step: jax.Array
  tokens_BxL: jax.Array
  order_BxL: jax.Array
  steps_B: jax.Array
  log_prob_BxM: jax.Array


def sample(forward, rng, prompt: Prompt, cfg: SampleConfig) -> Sampled:
  """Replace all [MASK]s of every row by tokens, in at most max_steps forward passes, in one loop on the device.

  A prompt can contain [MASK]s. If the gap after its last token is open, [MASK]s are appended: up to max_length or, with
  length='given', Prompt.free_B of them (none for free_B = -1). Generated [PAD]s are removed at the end. Step t of
  request r draws with the key fold_in(fold_in(rng, r), t).

  log_prob_BxM sums over all tokens of a step, including [PAD]s. steps_B counts the forward passes until the last token
  is revealed, also those that reveal nothing. stop_prob_BxM is 0, and stopped_B is true for every non-empty row.
  """
  size, limit = cfg.max_length, cfg.max_length if cfg.max_steps is None else cfg.max_steps
  index_1xL = jnp.arange(size)[None]
  given_B = prompt.length_B.astype(jnp.int32)
  last_B = jnp.maximum(given_B - 1, 0)[:, None]
  tail_open_B = jnp.take_along_axis(prompt.open_BxL.astype(bool), last_B, axis=1)[:, 0] & (given_B > 0)
  new_B = size - given_B
  if cfg.length == 'given':
    new_B = jnp.clip(prompt.free_B, 0, new_B)
  length_B = given_B + jnp.where(tail_open_B, new_B, 0)
  # A model that predicts the length always reads padded rows, even if the prompt contains the end of the text.
  input_length_B = jnp.where(given_B > 0, size, 0) if cfg.length == 'predicted' else length_B
  given_BxL, inside_BxL = index_1xL < given_B[:, None], index_1xL < length_B[:, None]
  tokens_BxL = jnp.where(given_BxL, pad_or_cut(prompt.tokens_BxL.astype(jnp.int32), size, PAD), MASK)
  tokens_BxL = jnp.where(inside_BxL, tokens_BxL, PAD)

  masks_B = (tokens_BxL == MASK).sum(axis=1)
  step = functools.partial(_step, forward, request_keys(rng, prompt), cfg, limit, input_length_B, masks_B, given_BxL)
  start = _State(
    step=jnp.zeros((), jnp.int32),
    tokens_BxL=tokens_BxL,
    order_BxL=jnp.full(tokens_BxL.shape, -1, jnp.int32),
    steps_B=jnp.zeros_like(given_B),
    log_prob_BxM=jnp.zeros((len(given_B), limit), jnp.float32),
  )
  end = jax.lax.while_loop(lambda state: (state.step < limit) & (state.tokens_BxL == MASK).any(), step, start)

  keep_BxL = inside_BxL & ~((end.tokens_BxL == PAD) & (end.order_BxL >= 0))
  keep_first_BxL = jnp.argsort(~keep_BxL, axis=1, stable=True)
  length_B = keep_BxL.sum(axis=1, dtype=jnp.int32)
  inside_BxL = index_1xL < length_B[:, None]
  return Sampled(
    tokens_BxL=jnp.where(inside_BxL, jnp.take_along_axis(end.tokens_BxL, keep_first_BxL, axis=1), PAD),
    length_B=length_B,
    order_BxL=jnp.where(inside_BxL, jnp.take_along_axis(end.order_BxL, keep_first_BxL, axis=1), -1),
    log_prob_BxM=end.log_prob_BxM,
    stop_prob_BxM=jnp.zeros_like(end.log_prob_BxM),
    steps_B=end.steps_B,
    stopped_B=given_B > 0,
  )


def _step(forward, request_rng_B, cfg: SampleConfig, limit: int, length_B, masks_B, given_BxL, state) -> _State:
  """Run one forward pass and reveal some of the remaining [MASK]s; `masks_B` counts the initial [MASK]s per row."""
  masked_BxL = state.tokens_BxL == MASK
  remaining_B = masked_BxL.sum(axis=1)
  if cfg.order == 'ancestral':
    time_B = jnp.full(remaining_B.shape, 1.0, jnp.float32) - state.step / limit
  else:
    time_B = remaining_B / jnp.maximum(masks_B, 1)
  outputs = forward(state.tokens_BxL, length_B, noise_level(time_B, cfg.noise_eps)[:, None])
  rng_B = jax.vmap(jax.random.fold_in, (0, None))(request_rng_B, state.step)
  reveal_rng_B, token_rng_B = jax.vmap(jax.random.split, out_axes=1)(rng_B)
  token_BxL, log_prob_BxL, certainty_BxL = choose_tokens(outputs, cfg, token_rng_B, given_BxL)
  if cfg.order == 'ancestral':
    draw_BxL = jax.vmap(lambda rng: jax.random.uniform(rng, masked_BxL.shape[1:], jnp.float32))(reveal_rng_B)
    reveal_BxL = masked_BxL & (draw_BxL < 1.0 / (limit - state.step))  # (t - s) / t for the step from time t to s
  else:
    steps_B = jnp.clip(masks_B, 1, limit)  # no more steps than [MASK]s, so each step reveals at least one
    after_B = masks_B * (steps_B - 1 - state.step) // steps_B
    order_BxL = jnp.argsort(-jnp.where(masked_BxL, certainty_BxL, -jnp.inf), axis=1, stable=True)
    rank_BxL = jnp.argsort(order_BxL, axis=1)
    reveal_BxL = masked_BxL & (rank_BxL < (remaining_B - after_B)[:, None])
  return _State(
    step=state.step + 1,
    tokens_BxL=jnp.where(reveal_BxL, token_BxL, state.tokens_BxL),
    order_BxL=jnp.where(reveal_BxL, state.step, state.order_BxL),
    steps_B=state.steps_B + (remaining_B > 0),
    log_prob_BxM=state.log_prob_BxM.at[:, state.step].set(jnp.where(reveal_BxL, log_prob_BxL, 0.0).sum(axis=1)),
  )


def choose_tokens(outputs: Outputs, cfg: SampleConfig, rng_B, given_BxL):
  """Draw a token for every position; logits are computed for a few positions at a time to limit memory.

  A [MASK] in the prompt (where `given_BxL`) stands for exactly one token, so it is never filled with [PAD].

  Returns (token_BxL, log_prob_BxL, certainty_BxL); log_prob is that of the token at temperature 1. Certainty depends
  only on the model's distribution: its largest log-probability ('top_probability', 'ancestral'), the difference of its
  two largest probabilities ('margin'), or its negative entropy ('entropy').
  """
  unembed_VxD = outputs.unembed_VxD
  bias_V = vocabulary.suppressed_bias(unembed_VxD.shape[0], (*never_generated(cfg), MASK))

  def draw(position_inputs):
    hidden_BxD, position, given_B = position_inputs
    logits_BxV = vocabulary.vocab_logits(hidden_BxD, unembed_VxD, bias_V, compute=cfg.compute)
    logits_BxV = logits_BxV.at[:, PAD].add(jnp.where(given_B, numerics.NEG_INF, 0.0))
    log_prob_BxV = jax.nn.log_softmax(logits_BxV)
    token_B = drawing.choose(jax.vmap(jax.random.fold_in, (0, None))(rng_B, position), logits_BxV, cfg.token)
    certainty_B = log_prob_BxV.max(axis=1)
    if cfg.order == 'margin':
      top_Bx2 = jnp.exp(jax.lax.top_k(log_prob_BxV, 2)[0])
      certainty_B = top_Bx2[:, 0] - top_Bx2[:, 1]
    elif cfg.order == 'entropy':
      certainty_B = (jnp.exp(log_prob_BxV) * log_prob_BxV).sum(axis=1)
    return token_B, jnp.take_along_axis(log_prob_BxV, token_B[:, None], axis=1)[:, 0], certainty_B

  hidden_LxBxD = outputs.hidden_BxLxD.swapaxes(0, 1)
  size, rows, _ = hidden_LxBxD.shape
  positions = min(size, max(1, MAX_LOGITS // (rows * len(bias_V))))
  drawn = jax.lax.map(draw, (hidden_LxBxD, jnp.arange(size), given_BxL.T), batch_size=positions)
  return tuple(x_LxB.swapaxes(0, 1) for x_LxB in drawn)


# --- likelihood -------------------------------------------------------------------------------------------------------


def check_score(kind: str | None, longest: int) -> None:
  """Raise UserError unless `kind` is None or 'bound', the only kind of likelihood that this family computes."""
  if kind not in (None, 'bound'):
    raise UserError(f"score: kind={kind!r}: expected 'bound' for family=mdm")


def score(forward, rng, tokens_BxL, fixed_BxL, length_B, cfg: SampleConfig, *, kind: str | None = None,
          longest: int = 0) -> Score:  # fmt: skip
  """Return an unbiased estimate of the NELBO of each string, from `cfg.score_draws` forward passes.

  The NELBO bounds -log p of the strings that ancestral sampling generates at temperature 1 in the limit of many steps.
  This sampler reveals each of the F free tokens at its own uniform time in (0, 1], going down from t = 1. At the n-th
  smallest of these times, t_n, n tokens are still masked, and each of these n is equally likely to be revealed. Hence

      NELBO = sum_{n=1}^F  E_times  1/n sum_{j masked at t_n} -log p(x_j | z, sigma(t_n))

  which equals the integral in the module docstring over all of (0, 1], but has no weight 1/t that diverges at 0. The
  estimate divides n into equal strata and makes two draws in each. Tokens are masked with probability t, as in the
  sampler; eps only enters the noise level given to the model.

  With length='predicted', the [PAD]s up to max_length are free tokens that mark the end: nll_B includes their cost,
  tokens_B does not count them. (The sampler also yields the same string from rows with [PAD]s in other places; ignoring
  these rows keeps the bound valid.) With length='given', the result bounds -log p(x | length). Strings that cannot be
  sampled score infinity, and empty rows 0.
  """
  check_score(kind, longest)
  rows, size = tokens_BxL.shape
  if cfg.length == 'predicted':
    size = max(size, cfg.max_length)
  index_1xL = jnp.arange(size)[None]
  string_BxL = index_1xL < length_B[:, None]
  total_B = jnp.where(length_B > 0, cfg.max_length, 0) if cfg.length == 'predicted' else length_B
  tokens_BxL = jnp.where(string_BxL, pad_or_cut(tokens_BxL, size, PAD), PAD)
  fixed_BxL = string_BxL & pad_or_cut(fixed_BxL, size, False)
  free_BxL = (index_1xL < total_B[:, None]) & ~fixed_BxL
  free_B = free_BxL.sum(axis=1)
  index_BxL = jnp.broadcast_to(index_1xL, (rows, size))
  rng_B = jax.vmap(functools.partial(jax.random.fold_in, rng))(jnp.arange(rows))
  strata = cfg.score_draws // 2

  def draw(number):
    number_rng_B = jax.vmap(jax.random.fold_in, (0, None))(rng_B, number)
    size_rng_B, time_rng_B = jax.vmap(jax.random.split, out_axes=1)(number_rng_B)
    quantile_B = (number // 2 + jax.vmap(lambda rng: jax.random.uniform(rng, (), jnp.float32))(size_rng_B)) / strata
    masks_B = jnp.clip(1 + (quantile_B * free_B).astype(jnp.int32), 0, free_B)
    time_BxL = jax.vmap(lambda rng: jax.random.uniform(rng, (size,), jnp.float32))(time_rng_B)
    rank_BxL = jnp.argsort(jnp.argsort(jnp.where(free_BxL, time_BxL, 2.0), axis=1, stable=True), axis=1)
    masked_BxL = free_BxL & (rank_BxL < masks_B[:, None])
    time_B = jnp.where(masked_BxL, time_BxL, 0.0).max(axis=1)
    noise_Bx1 = noise_level(time_B, cfg.noise_eps)[:, None]
    outputs = forward(jnp.where(masked_BxL, MASK, tokens_BxL), total_B, noise_Bx1)
    closed = (*cfg.suppressed_tokens, MASK)
    loss_BxL = vocabulary.target_nll(outputs, index_BxL, tokens_BxL, closed, chunk=cfg.vocab_chunk, compute=cfg.compute)
    return jnp.where(masked_BxL, loss_BxL, 0.0).sum(axis=1) * free_B / jnp.maximum(masks_B, 1)

  nelbo_HxPxB = jax.lax.map(draw, jnp.arange(2 * strata)).reshape(strata, 2, rows)
  nll_B = jnp.where(length_B <= total_B, nelbo_HxPxB.mean(axis=(0, 1)), jnp.inf)
  error_B = jnp.sqrt(jnp.square(nelbo_HxPxB[:, 0] - nelbo_HxPxB[:, 1]).sum(axis=0) / 4) / strata
  return Score(
    kind='bound',
    nll_B=nll_B,
    error_B=jnp.where(jnp.isfinite(nll_B), error_B, 0.0),
    tokens_B=(free_BxL & string_BxL).sum(axis=1),
  )


FAMILY = Family(
  name='mdm', corrupt=corrupt, loss=loss, sample=sample, SampleConfig=SampleConfig, model_settings=model_settings,
  sizes=sizes, score=score, check_score=check_score, sample_settings=lambda cfg: {'noise_eps': cfg.corrupt.noise_eps},
  check_prompt=check_prompt, fills='masks',
)  # fmt: skip
