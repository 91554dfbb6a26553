"""Masked diffusion language model (MDLM, arXiv 2406.07524): tokens turn into [MASK]s, the model turns them back.

At a time t in (0, 1] each free token of a string x is a [MASK] with probability (1 - eps) t. The model is told the
noise level sigma(t) = -log(1 - (1 - eps) t), and gives each [MASK] j a distribution p(. | z_t) over tokens. With the
weight sigma'(t) / (exp(sigma(t)) - 1) = 1 / t,

    -log p(x) <= NELBO = integral over t of  1/t  E_{z_t} sum_{j masked} -log p(x_j | z_t)

`loss.mdm`: 'nelbo' is this, of each string, with t > SHORTEST_TIME; 'mean_masked' divides the same weighted sum by the
number of [MASK]s in the batch (the reference, and no bound).

The length of a string is given, or it is predicted: then strings are filled up with [PAD]s, which are tokens as others.

Sampling starts with [MASK]s in all the places of the answer. 'ancestral' goes from t = 1 to 0 in equal steps and
reveals each [MASK] with probability (t - s) / t between t and s, all that are left in the last step; the other orders
reveal the tokens whose distributions are the most certain.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ilm_jax.families import corruption as _corrupt
from ilm_jax.families import drawing
from ilm_jax.families.contract import Family
from ilm_jax.families.growing import fit
from ilm_jax.families.settings import sample_config
from ilm_jax.models import numerics, vocabulary
from ilm_jax.special_tokens import MASK, PAD
from ilm_jax.types import Batch, Metrics, Outputs, Prompt, Rule, Sampled, Score, UserError

corrupt = _corrupt.mdm

LOSSES = ('mean_masked', 'nelbo')
ORDERS = ('ancestral', 'top_probability', 'margin', 'entropy')
LENGTHS = ('predicted', 'given')
ALIVE = 2**24  # logits that the sampler holds at a time


def model_settings(cfg) -> dict:
  """The fields of ModelConfig that masked diffusion decides; the head of a conditioned model has its norm."""
  conditioning = cfg.model.get('conditioning') or 'adaln'
  norm = {'final_norm': True} if conditioning == 'adaln' else {}
  return {'causal': False, 'stop_head': False, 'conditioning': conditioning, **norm}


def sample_settings(cfg) -> dict:
  """The fields of SampleConfig that the corruption decides."""
  return {'noise_eps': cfg.corrupt.noise_eps}


def sizes(cfg, longest: int, answer: int) -> tuple[int, int]:
  """(tokens, targets) of the longest example with its padding; refuses settings that don't fit together."""
  eps, length, data = cfg.corrupt.noise_eps, cfg.corrupt.length, cfg.data
  if not 0 < eps < 1:
    raise UserError(f'corrupt.noise_eps={eps}: expected a share above 0 and below 1')
  if cfg.loss.mdm not in LOSSES:
    raise UserError(f'loss.mdm={cfg.loss.mdm!r}: expected one of {", ".join(LOSSES)}')
  if cfg.sampling.length == 'predicted' and cfg.sampling.max_length != length:
    raise UserError(
      f'sampling.max_length={cfg.sampling.max_length}: expected corrupt.length={length}, to which the examples are '
      'padded: make them equal, or use sampling.length=given'
    )
  if not length:
    return longest, answer
  if length < longest:
    raise UserError(f'corrupt.length={length}: the longest example has {longest} tokens: raise it')
  fit = min(data.row_length // length, data.segments)
  if 0 < fit * data.rows < data.batch_size:
    rows = -(-data.batch_size // (fit * data.groups)) * data.groups
    raise UserError(
      f'data.rows={data.rows} hold {fit * data.rows} examples of corrupt.length={length} tokens, fewer than '
      f'data.batch_size={data.batch_size}: use data.rows={rows}'
    )
  return length, length - 1


def noise_level(time, eps: float):
  """sigma(t) of the log-linear schedule."""
  return -jnp.log1p(-(1.0 - eps) * time)


# --- training ---------------------------------------------------------------------------------------------------------


def example_losses(outputs: Outputs, batch: Batch, *, compute: str = 'float32', chunk: int = 2048):
  """Sums over the [MASK]s of each segment.

  Returns:
    (weighted_BxS, plain_BxS, masked_BxS): cross-entropies with their targets' weights and without, and how many.
  """
  segments = batch['cls_BxS'].shape[1]
  hidden_BxLxD, unembed_VxD = outputs.hidden_BxLxD, outputs.unembed_VxD
  gap_BxT, segment_BxT = batch['target_gap_BxT'], batch['target_segment_BxT']
  lse_BxL = vocabulary.vocab_logsumexp(hidden_BxLxD, unembed_VxD, chunk=chunk, compute=compute)
  z_BxT = vocabulary.target_logits(hidden_BxLxD, unembed_VxD, gap_BxT, batch['target_token_BxT'], compute=compute)
  loss_BxT = jnp.take_along_axis(lse_BxL, gap_BxT, axis=1) - z_BxT
  sums = [numerics.segment_sum(x, segment_BxT, segments) for x in (loss_BxT * batch['target_weight_BxT'], loss_BxT)]
  return *sums, numerics.segment_sum((segment_BxT > 0).astype(jnp.float32), segment_BxT, segments)


def loss(outputs: Outputs, batch: Batch, cfg) -> Metrics:
  """The training loss; 'string_bound', the NELBO in nats of a string, whatever is minimised; the loss of a [MASK].

  The bound has no bias for the integral from SHORTEST_TIME to 1, where the times are drawn; what is below, about
  SHORTEST_TIME times the loss of single [MASK]s, is in `score` alone.

  Args:
    outputs: of the model on the batch.
    batch: see `types`.
    cfg: `mdm`, one of LOSSES, `compute` and `vocab_chunk` of the vocabulary head.
  """
  weighted_BxS, plain_BxS, masked_BxS = example_losses(outputs, batch, compute=cfg.compute, chunk=cfg.vocab_chunk)
  weight_BxS = batch['segment_weight_BxS']
  weighted, masked = (weight_BxS * weighted_BxS).sum(), (weight_BxS * masked_BxS).sum()
  bound = (1.0 - _corrupt.SHORTEST_TIME) * weighted, weight_BxS.sum()  # the density of t is 1 / (1 - SHORTEST_TIME)
  return {
    'loss': bound if cfg.mdm == 'nelbo' else (weighted, masked),
    'string_bound': bound,
    'token_loss': ((weight_BxS * plain_BxS).sum(), masked),
  }


# --- sampling ---------------------------------------------------------------------------------------------------------


class SampleConfig(NamedTuple):
  """How to sample. Hashable: a jit compiles once for each."""

  max_length: int  # of a row, the prompt included; where the length is predicted, the row as it was trained
  max_steps: int | None = None  # denoising steps; None: max_length
  order: str = 'ancestral'  # one of ORDERS
  length: str = 'predicted'  # 'given': Prompt.free_B says how many tokens come
  token: Rule = Rule()  # a token, at each place that is revealed
  closed_tokens: tuple[int, ...] = (MASK,)  # ids never produced
  noise_eps: float = 1e-3  # of the schedule that the model was trained with
  score_draws: int = 32  # corruptions of a string from which `score` estimates its bound
  min_buffer: int = 64  # shortest buffer of prompts
  compute: str = 'float32'
  vocab_chunk: int = 2048

  @classmethod
  def create(cls, sampling, *, closed_tokens=(), **others) -> 'SampleConfig':
    """Build from a config's `sampling` part; [MASK] is closed, and [PAD] is not where the length is predicted."""
    made = sample_config(cls, sampling, closed_tokens=closed_tokens, **others)
    for name, allowed in (('order', ORDERS), ('length', LENGTHS)):
      if getattr(made, name) not in allowed:
        raise UserError(f'sampling.{name}={getattr(made, name)!r}: expected one of {", ".join(allowed)}')
    if made.max_steps is not None and made.max_steps < 1:
      raise UserError(f'sampling.max_steps={made.max_steps}: expected at least 1')
    if made.score_draws < 2 or made.score_draws % 2:
      raise UserError(f'sampling.score_draws={made.score_draws}: expected an even number from 2')
    closed = {*closed_tokens, MASK} - ({PAD} if made.length == 'predicted' else set())
    return made._replace(closed_tokens=tuple(sorted(closed)))


def check_prompt(given: dict, cfg: SampleConfig) -> None:
  """Where lengths are given, refuse a prompt that does not say how many tokens come after it, or says too many."""
  if cfg.length != 'given':
    return
  tokens, free = len(given['tokens']), given.get('free', -1)
  if free < 0:
    raise UserError(
      "sampling.length='given' needs the number of tokens to come of each prompt ('free'), got none: give it, or use "
      "a model that predicts the length with sampling.length='predicted'"
    )
  if tokens + free > cfg.max_length:
    raise UserError(
      f'a prompt of {tokens} tokens and {free} to come are more than sampling.max_length={cfg.max_length}: raise the '
      'limit'
    )


class _State(NamedTuple):
  step: jax.Array
  tokens_BxL: jax.Array
  order_BxL: jax.Array
  steps_B: jax.Array
  log_prob_BxM: jax.Array


def sample(forward, rng, prompt: Prompt, cfg: SampleConfig) -> Sampled:
  """Reveal all [MASK]s of every row in at most max_steps forward passes: one while loop, without a host sync.

  The [MASK]s are those that the prompt holds and, where the gap after its last token is open, those put behind it: up
  to max_length, or as many as Prompt.free_B says (unknown, -1, is none). [PAD]s that were sampled are then taken out.

  Args:
    forward: (tokens_BxL, length_B, noise_BxS) -> Outputs, with S = 1.
    rng: the key of the whole run; a row's noise is fold_in(fold_in(rng, request), step) and nothing else.
    prompt: rows of given tokens; its buffer may be shorter than max_length.
    cfg: see SampleConfig.

  Returns:
    Sampled, with L = max_length and M = max_steps. Several tokens have the same order; log_prob is the sum over a
    step's tokens, [PAD]s included; steps_B counts forward passes up to the one that revealed the last token (in some of
    an ancestral row nothing is revealed); stop_prob is 0, and every row that is not empty has stopped.
  """
  size, limit = cfg.max_length, cfg.max_length if cfg.max_steps is None else cfg.max_steps
  index_1xL = jnp.arange(size)[None]
  given_B = prompt.length_B.astype(jnp.int32)
  last_B = jnp.maximum(given_B - 1, 0)[:, None]
  tail_open_B = jnp.take_along_axis(prompt.open_BxL.astype(bool), last_B, axis=1)[:, 0] & (given_B > 0)
  room_B = size - given_B
  if cfg.length == 'given':
    room_B = jnp.clip(prompt.free_B, 0, room_B)
  length_B = given_B + jnp.where(tail_open_B, room_B, 0)
  # Where the length was predicted in training, a text whose end is given is seen with the padding behind it.
  seen_B = jnp.where(given_B > 0, size, 0) if cfg.length == 'predicted' else length_B
  given_BxL, inside_BxL = index_1xL < given_B[:, None], index_1xL < length_B[:, None]
  tokens_BxL = jnp.where(given_BxL, fit(prompt.tokens_BxL.astype(jnp.int32), size, PAD), MASK)
  tokens_BxL = jnp.where(inside_BxL, tokens_BxL, PAD)

  request_rng_B = jax.vmap(functools.partial(jax.random.fold_in, rng))(prompt.request_B)
  masks_B = (tokens_BxL == MASK).sum(axis=1)
  step = functools.partial(_step, forward, request_rng_B, cfg, limit, seen_B, masks_B, given_BxL)
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
  length_B = keep_BxL.sum(axis=1)
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
  """One forward pass; tokens for some of the [MASK]s that are left of each row's `masks_B`."""
  masked_BxL = state.tokens_BxL == MASK
  left_B = masked_BxL.sum(axis=1)
  if cfg.order == 'ancestral':
    time_B = jnp.full(left_B.shape, 1.0, jnp.float32) - state.step / limit
  else:
    time_B = left_B / jnp.maximum(masks_B, 1)
  outputs = forward(state.tokens_BxL, length_B, noise_level(time_B, cfg.noise_eps)[:, None])

  rng_B = jax.vmap(jax.random.fold_in, (0, None))(request_rng_B, state.step)
  reveal_rng_B, token_rng_B = jax.vmap(jax.random.split, out_axes=1)(rng_B)
  token_BxL, log_prob_BxL, certainty_BxL = choose_tokens(outputs, cfg, token_rng_B, given_BxL)
  if cfg.order == 'ancestral':
    draw_BxL = jax.vmap(lambda rng: jax.random.uniform(rng, masked_BxL.shape[1:]))(reveal_rng_B)
    reveal_BxL = masked_BxL & (draw_BxL < 1.0 / (limit - state.step))  # (t - s) / t; the last time 1
  else:
    steps_B = jnp.clip(masks_B, 1, limit)  # a row takes no more steps than it has [MASK]s
    after_B = masks_B * (steps_B - 1 - state.step) // steps_B
    order_BxL = jnp.argsort(-jnp.where(masked_BxL, certainty_BxL, -jnp.inf), axis=1, stable=True)
    rank_BxL = jnp.argsort(order_BxL, axis=1)
    reveal_BxL = masked_BxL & (rank_BxL < (left_B - after_B)[:, None])
  return _State(
    step=state.step + 1,
    tokens_BxL=jnp.where(reveal_BxL, token_BxL, state.tokens_BxL),
    order_BxL=jnp.where(reveal_BxL, state.step, state.order_BxL),
    steps_B=state.steps_B + (left_B > 0),
    log_prob_BxM=state.log_prob_BxM.at[:, state.step].set(jnp.where(reveal_BxL, log_prob_BxL, 0.0).sum(axis=1)),
  )


def choose_tokens(outputs: Outputs, cfg: SampleConfig, rng_B, given_BxL):
  """Draw a token for every position, a few positions at a time (never all their logits).

  The [MASK]s of a prompt stand for a token each: where `given_BxL`, there is no [PAD].

  Returns:
    (token_BxL, log_prob_BxL, certainty_BxL): the second is under the model at temperature 1. Certainty is of the
    model's distribution, whatever token was drawn: the logarithm of its largest probability ('top_probability'), the
    difference of its two largest ('margin'), or minus its entropy.
  """
  unembed_VxD = outputs.unembed_VxD
  bias_V = vocabulary.closed_bias(unembed_VxD.shape[0], (*cfg.closed_tokens, MASK))

  def at(place):
    hidden_BxD, position, given_B = place
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
  together = min(size, max(1, ALIVE // (rows * len(bias_V))))
  chosen = jax.lax.map(at, (hidden_LxBxD, jnp.arange(size), given_BxL.T), batch_size=together)
  return tuple(x_LxB.swapaxes(0, 1) for x_LxB in chosen)


# --- likelihood -------------------------------------------------------------------------------------------------------


def check_score(kind: str | None, longest: int) -> None:
  """Refuse a kind that there is not."""
  del longest
  if kind not in (None, 'bound'):
    raise UserError(f'score: kind={kind!r}: expected bound for family=mdm')


def score(forward, rng, tokens_BxL, fixed_BxL, length_B, cfg: SampleConfig, *, kind: str | None = None,
          longest: int = 0) -> Score:  # fmt: skip
  """Estimate the NELBO of each string, without bias: a bound on -log p of what 'ancestral' draws in many small steps.

  The sampler reveals each of the F free tokens at a time of its own, uniform in (0, 1], going down from t = 1; at t_n,
  the n-th smallest of these times, n tokens are still [MASK]s, and any of them may be the one. So with the same times,

      NELBO = sum_{n=1}^F  E_times  1/n sum_{j masked at t_n} -log p(x_j | z, sigma(t_n))

  which is the integral of the family's equation over all of (0, 1], without its singular weight. It is estimated with
  n in equal strata, two draws of each. There is no term for t = 1: here, as in the sampler, a token is masked with
  probability t, so nothing is left unmasked there (the share eps that training leaves enters only through the noise
  level that the model is told). The tokens are those that the sampler may produce, at temperature 1.

  Where the length is predicted the string is filled up with [PAD]s to max_length, which are free tokens and say where
  it ends; their cost is in nll_B, but they are not counted in tokens_B. Strings with [PAD]s inside, which the sampler
  would make into the same string, are left out, which the bound allows. Where it is given, this is -log p(x | length).

  Args:
    forward: (tokens_BxL, length_B, noise_BxS) -> Outputs, with S = 1.
    rng: a key; a row's noise depends on it and on the row's index.
    tokens_BxL: whole strings.
    fixed_BxL: tokens that are given.
    length_B: 0 for an empty row, whose score is 0.
    cfg: `score_draws` forward passes are made.
    kind: 'bound', or nothing.
    longest: not used.

  Returns:
    Score of kind 'bound' (in a jit, return its arrays alone); infinite for a string that the sampler can't produce.
  """
  check_score(kind, longest)
  rows, size = tokens_BxL.shape
  if cfg.length == 'predicted':
    size = max(size, cfg.max_length)
  index_1xL = jnp.arange(size)[None]
  string_BxL = index_1xL < length_B[:, None]
  total_B = jnp.where(length_B > 0, cfg.max_length, 0) if cfg.length == 'predicted' else length_B
  tokens_BxL = jnp.where(string_BxL, fit(tokens_BxL, size, PAD), PAD)
  fixed_BxL = string_BxL & fit(fixed_BxL, size, False)
  free_BxL = (index_1xL < total_B[:, None]) & ~fixed_BxL
  free_B = free_BxL.sum(axis=1)
  index_BxL = jnp.broadcast_to(index_1xL, (rows, size))
  rng_B = jax.vmap(functools.partial(jax.random.fold_in, rng))(jnp.arange(rows))
  strata = cfg.score_draws // 2

  def draw(number):
    number_rng_B = jax.vmap(jax.random.fold_in, (0, None))(rng_B, number)
    size_rng_B, time_rng_B = jax.vmap(jax.random.split, out_axes=1)(number_rng_B)
    quantile_B = (number // 2 + jax.vmap(jax.random.uniform)(size_rng_B)) / strata
    masks_B = jnp.clip(1 + (quantile_B * free_B).astype(jnp.int32), 0, free_B)
    time_BxL = jax.vmap(lambda rng: jax.random.uniform(rng, (size,)))(time_rng_B)
    rank_BxL = jnp.argsort(jnp.argsort(jnp.where(free_BxL, time_BxL, 2.0), axis=1, stable=True), axis=1)
    masked_BxL = free_BxL & (rank_BxL < masks_B[:, None])
    time_B = jnp.where(masked_BxL, time_BxL, 0.0).max(axis=1)

    noise_Bx1 = noise_level(time_B, cfg.noise_eps)[:, None]
    hidden_BxLxD, unembed_VxD, _ = forward(jnp.where(masked_BxL, MASK, tokens_BxL), total_B, noise_Bx1)
    bias_V = vocabulary.closed_bias(unembed_VxD.shape[0], (*cfg.closed_tokens, MASK))
    lse_BxL = vocabulary.vocab_logsumexp(hidden_BxLxD, unembed_VxD, bias_V, chunk=cfg.vocab_chunk, compute=cfg.compute)
    z_BxL = vocabulary.target_logits(hidden_BxLxD, unembed_VxD, index_BxL, tokens_BxL, compute=cfg.compute)
    loss_BxL = jnp.where(bias_V[tokens_BxL] < 0, jnp.inf, lse_BxL - z_BxL)
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
  name='mdm',
  corrupt=corrupt,
  loss=loss,
  sample=sample,
  SampleConfig=SampleConfig,
  model_settings=model_settings,
  sizes=sizes,
  score=score,
  check_score=check_score,
  sample_settings=sample_settings,
  check_prompt=check_prompt,
  fills='masks',
)
