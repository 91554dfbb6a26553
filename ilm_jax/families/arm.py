"""Autoregressive language model: it predicts each token from the tokens to its left and ends a text with [EOS].

Training minimizes the mean cross-entropy of the free tokens (to be generated, not given) and of the final [EOS].
Sampling generates one token per forward pass with a key-value cache. Every string has an exact log-probability:

    log p(x | prompt) = sum_t log p(x_t | prompt, x_<t) + log p([EOS] | prompt, x)

With corrupt.fim_rate > 0 the model can also fill one gap in a text (fill-in-the-middle; Bavarian et al. 2022, arXiv
2207.14255). It reads its tokens in model order, `prefix [MASK] suffix [MASK] middle`, and generates the middle; reading
order is `prefix middle suffix`.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ilm_jax.families import corruption as _corrupt
from ilm_jax.families import drawing, growing
from ilm_jax.families.contract import Family
from ilm_jax.families.growing import Rows, record
from ilm_jax.families.settings import never_generated, sample_config
from ilm_jax.models import numerics, vocabulary
from ilm_jax.special_tokens import EOS, MASK
from ilm_jax.types import GREEDY, Batch, Metrics, Outputs, Prompt, Rule, Sampled, Score, UserError

corrupt = _corrupt.arm


def sizes(cfg, longest: int, answer: int) -> tuple[int, int]:
  """Return the maximum numbers of tokens (2 more with fill-in-the-middle) and targets ([EOS] is one) of an example."""
  if not 0 <= cfg.corrupt.fim_rate <= 1:
    raise UserError(f'corrupt.fim_rate={cfg.corrupt.fim_rate}: expected a fraction from 0 to 1')
  return longest + 2 * (cfg.corrupt.fim_rate > 0), answer + 1


# --- training ---------------------------------------------------------------------------------------------------------


def loss(outputs: Outputs, batch: Batch, cfg) -> Metrics:
  """Return the cross-entropy in nats per target (`loss`) and per string (`string_loss`), as (total, weight) pairs."""
  ce_BxT = vocabulary.target_nll(
    outputs, batch['target_gap_BxT'], batch['target_token_BxT'], chunk=cfg.vocab_chunk, compute=cfg.compute
  )
  valid_BxT = (batch['target_segment_BxT'] > 0).astype(jnp.float32)
  total, count = (ce_BxT * valid_BxT).sum(), valid_BxT.sum()
  return {'loss': (total, count), 'string_loss': (total, batch['segment_weight_BxS'].sum())}


# --- sampling ---------------------------------------------------------------------------------------------------------


class SampleConfig(NamedTuple):
  """Sampling settings; hashable, because jit takes them as a static argument."""

  max_length: int  # maximum tokens per row, counting the prompt but not [EOS]
  max_steps: int | None = None  # maximum generated tokens per row; None: limited by max_length only
  token: Rule = GREEDY  # rule for drawing each token: temperature, top-k, top-p
  force_first: bool = False  # do not allow [EOS] as the first generated token
  fim: bool = False  # whether the model was trained with fill-in-the-middle
  suppressed_tokens: tuple[int, ...] = ()  # ids of tokens that are never generated
  byte_ids: tuple[int, ...] = ()  # tokens for one byte of a character: sampled only if bytes=True, but always scored
  bytes: bool = False  # whether to sample the one-byte tokens (byte_ids) too; the text may then be invalid UTF-8
  min_buffer: int = 64  # initial cache length in tokens; it doubles as rows grow, up to their maximum length
  compute: str = 'float32'  # precision of the matrix products in the vocabulary head
  vocab_chunk: int = 2048  # the logits are computed for this many vocabulary entries at a time

  @property
  def capacity(self) -> int:
    """Maximum buffer length: max_length plus the two [MASK]s of fill-in-the-middle."""
    return self.max_length + 2 * self.fim

  @classmethod
  def create(cls, sampling, **others) -> 'SampleConfig':
    """Build a SampleConfig from the `sampling` section of a config; [EOS] can always be generated."""
    closed = tuple(token for token in others.pop('suppressed_tokens', ()) if token != EOS)
    return sample_config(cls, sampling, suppressed_tokens=closed, **others)


def check_prompt(given: dict, cfg: SampleConfig) -> None:
  """Raise UserError if the prompt has gaps that this model cannot fill."""
  gaps = np.flatnonzero(given['open']).tolist()
  if len(gaps) > 1:
    raise UserError(f'family=arm fills one gap of a text, got {len(gaps)} gaps: use a model of family=ilm or mdm')
  if gaps and gaps[0] < len(given['tokens']) - 1 and not cfg.fim:
    raise UserError(
      'family=arm can only continue a text, but this prompt has a gap before its end: use a model trained with '
      'corrupt.fim_rate above 0, or family=ilm or mdm'
    )


def begin(forward, rng, prompt: Prompt, cfg: SampleConfig, size: int) -> Rows:
  """Return the rows before the first step: prompts in the order in which the model reads them, with a key-value cache.

  With `cfg.fim`, a prompt that has a gap before its last token is filled at this gap instead of being continued.
  """
  memo = ()
  if cfg.fim:
    open_BxL, length_B = jnp.asarray(prompt.open_BxL, bool), jnp.asarray(prompt.length_B, jnp.int32)
    start_B = jnp.where(open_BxL.any(axis=1), open_BxL.argmax(axis=1) + 1, length_B)
    memo = Layout.of(start_B, start_B, length_B)  # the middle (text to fill in) is still empty: it ends where it starts
    prompt = prompt._replace(tokens_BxL=memo.arrange(prompt.tokens_BxL), length_B=memo.length_B)
  count, given = prompt.tokens_BxL.shape
  cache = forward.apply_cached(
    prompt.tokens_BxL, jnp.zeros(count, jnp.int32), forward.empty_cache(count, max(size, given))
  )[1]
  return growing.resize(growing.begin(rng, prompt, cfg, size, cache=cache, memo=memo), size)


def finish(rows: Rows, cfg: SampleConfig) -> Sampled:
  """Return the sampled rows, with their tokens in reading order."""
  if cfg.fim:
    rows = growing.resize(rows, cfg.capacity)  # because `restore` removes two positions even without [MASK]s
    layout = rows.memo.extend_middle(rows.steps_B)
    rows = rows._replace(
      tokens_BxL=layout.restore(rows.tokens_BxL, 0),
      order_BxL=layout.restore(rows.order_BxL, -1),
      length_B=rows.length_B - layout.masks_B,
    )
  return growing.finish(rows, cfg)


class Layout(NamedTuple):
  """Mapping between reading order (prefix middle suffix) and model order (prefix [MASK] suffix [MASK] middle).

  A row without a suffix contains no [MASK]s, and its two orders are the same.
  """

  start_B: jax.Array  # index in reading order of the first token of the middle (the filled-in text)
  end_B: jax.Array  # index in reading order just after the last token of the middle
  length_B: jax.Array  # row length as the model reads it, including the [MASK]s
  masks_B: jax.Array  # number of [MASK]s in the row: 2, or 0 if no text follows the filled-in text

  @classmethod
  def of(cls, start_B, end_B, length_B) -> 'Layout':
    """Build a layout from the middle's start and end index and the row length, all in reading order."""
    masks_B = jnp.where(end_B < length_B, 2, 0)
    return cls(start_B, end_B, length_B + masks_B, masks_B)

  def extend_middle(self, count_B) -> 'Layout':
    """Return the layout after `count_B` tokens were appended to the middle (the filled-in text)."""
    return self._replace(end_B=self.end_B + count_B, length_B=self.length_B + count_B)

  def model_index(self, size: int):
    """Return (index in the model's order, whether it is in the row) for the first `size` positions in reading order."""
    index_1xL = jnp.arange(size)[None]
    start_Bx1, end_Bx1, masks_Bx1 = self.start_B[:, None], self.end_B[:, None], self.masks_B[:, None]
    suffix_Bx1 = (self.length_B - self.masks_B - self.end_B)[:, None]
    moved_BxL = index_1xL + jnp.where(index_1xL < end_Bx1, 2 + suffix_Bx1, 1 + start_Bx1 - end_Bx1)
    unmoved_BxL = (index_1xL < start_Bx1) | (masks_Bx1 == 0)
    return jnp.where(unmoved_BxL, index_1xL, moved_BxL), index_1xL < (self.length_B - self.masks_B)[:, None]

  def arrange(self, tokens_BxL):
    """Reorder tokens from reading order to the order that the model reads, with room for its two [MASK]s."""
    rows, size = tokens_BxL.shape
    to_BxL, valid_BxL = self.model_index(size)
    row_Bx1, beyond = jnp.arange(rows)[:, None], size + 2
    first_mask_B = jnp.where(self.masks_B > 0, self.start_B, beyond)
    second_mask_B = jnp.where(self.masks_B > 0, self.start_B + 1 + self.length_B - self.masks_B - self.end_B, beyond)
    out_BxL = jnp.zeros((rows, size + 2), tokens_BxL.dtype)
    out_BxL = out_BxL.at[row_Bx1, jnp.where(valid_BxL, to_BxL, beyond)].set(tokens_BxL, mode='drop')
    return out_BxL.at[row_Bx1, jnp.stack([first_mask_B, second_mask_B], axis=1)].set(MASK, mode='drop')

  def restore(self, array_BxL, fill: int):
    """Reorder an array from the model's order to reading order, without room for [MASK]s; pad each row with `fill`."""
    from_BxL, valid_BxL = self.model_index(array_BxL.shape[1] - 2)
    from_BxL = from_BxL.clip(0, array_BxL.shape[1] - 1)
    return jnp.where(valid_BxL, jnp.take_along_axis(array_BxL, from_BxL, axis=1), fill)


def step(forward, cfg: SampleConfig, rows: Rows) -> Rows:
  """Run the model on the last token of each row, draw the next token, and append it to the rows that continue."""
  rng_B = jax.vmap(jax.random.fold_in)(rows.rng_B, rows.steps_B)
  row_B = jnp.arange(rng_B.shape[0])
  last_B = jnp.maximum(rows.length_B - 1, 0)
  outputs, cache = forward.apply_cached(rows.tokens_BxL[row_B, last_B][:, None], last_B, rows.cache)

  logits_BxV = logits(outputs.hidden_BxLxD[:, 0], outputs.unembed_VxD, cfg)
  log_prob_BxV = jax.nn.log_softmax(logits_BxV, axis=-1)
  min_steps_B = jnp.maximum(rows.min_left_BxL.max(axis=1), int(cfg.force_first))
  logits_BxV = logits_BxV.at[:, EOS].set(jnp.where(rows.steps_B < min_steps_B, numerics.NEG_INF, logits_BxV[:, EOS]))
  token_B = drawing.choose(rng_B, logits_BxV, cfg.token)

  max_length_B = cfg.max_length + (rows.memo.masks_B if cfg.fim else 0)
  may_grow_B = (rows.length_B < max_length_B) & (rows.steps_B < growing.most_steps(cfg))
  may_grow_B &= rows.steps_B < rows.max_left_BxL.max(axis=1)
  ends_B = rows.active_B & (token_B == EOS)
  continue_B = rows.active_B & ~ends_B & may_grow_B

  def append(array_BxL, value_B):
    old_B = array_BxL[row_B, rows.length_B.clip(max=array_BxL.shape[1] - 1)]
    return array_BxL.at[row_B, rows.length_B].set(jnp.where(continue_B, value_B, old_B), mode='drop')

  end_prob_B = jnp.exp(log_prob_BxV[:, EOS])
  return rows._replace(
    tokens_BxL=append(rows.tokens_BxL, token_B),
    order_BxL=append(rows.order_BxL, rows.steps_B),
    length_B=rows.length_B + continue_B,
    active_B=continue_B,
    steps_B=rows.steps_B + continue_B,
    stopped_B=rows.stopped_B | ends_B,
    log_prob_BxM=record(rows.log_prob_BxM, rows.steps_B, log_prob_BxV[row_B, token_B], continue_B),
    stop_prob_BxM=record(rows.stop_prob_BxM, rows.steps_B, end_prob_B, rows.active_B),
    cache=cache,
  )


GROWTH = growing.Growth(begin, step, finish=finish)
sample = functools.partial(growing.sample, GROWTH)


def logits(hidden, unembed_VxD, cfg: SampleConfig):
  """Return vocabulary logits, with NEG_INF for the tokens that are never generated."""
  bias_V = vocabulary.suppressed_bias(unembed_VxD.shape[0], never_generated(cfg))
  return vocabulary.vocab_logits(hidden, unembed_VxD, bias_V, compute=cfg.compute)


# --- likelihood -------------------------------------------------------------------------------------------------------


def check_score(kind: str | None, longest: int) -> None:
  """Raise UserError unless `kind` is None or 'exact', the only kind of likelihood that this family computes."""
  if kind not in (None, 'exact'):
    raise UserError(f"score: kind={kind!r}: expected 'exact' for family=arm")


def score(forward, rng, tokens_BxL, fixed_BxL, length_B, cfg: SampleConfig, *, kind: str | None = None,
          longest: int = 0) -> Score:  # fmt: skip
  """Return the exact -log p of each row's free (not given) tokens and [EOS] when sampling at temperature 1.

  The given tokens precede the free tokens or, with `cfg.fim`, surround them. Tokens in `cfg.suppressed_tokens` are
  never generated, so they have probability 0. `rng` and `longest` are not used.
  """
  check_score(kind, longest)
  if cfg.fim:
    free_BxL = ~fixed_BxL & (jnp.arange(tokens_BxL.shape[1])[None] < length_B[:, None])
    free_B = free_BxL.sum(axis=1)
    start_B = jnp.where(free_B > 0, free_BxL.argmax(axis=1), length_B)
    layout = Layout.of(start_B, start_B + free_B, length_B)
    tokens_BxL, length_B = layout.arrange(tokens_BxL), layout.length_B
    fixed_BxL = jnp.arange(tokens_BxL.shape[1])[None] < (length_B - free_B)[:, None]
  index_BxL = jnp.broadcast_to(jnp.arange(tokens_BxL.shape[1]), tokens_BxL.shape)
  end_Bx1 = length_B[:, None] - 1
  free_BxL = ~fixed_BxL & (index_BxL <= end_Bx1)
  # Position i predicts token i + 1, and the last position predicts [EOS].
  scored_BxL = jnp.where(index_BxL == end_Bx1, True, jnp.roll(free_BxL, -1, axis=1)) & (index_BxL <= end_Bx1)
  nll_B = jnp.where(scored_BxL, next_losses(forward, tokens_BxL, length_B, cfg), 0.0).sum(axis=1)
  return Score('exact', nll_B, jnp.zeros_like(nll_B), free_BxL.sum(axis=1))


def next_losses(forward, tokens_BxL, length_B, cfg: SampleConfig):
  """Return -log p (BxL, nats) of the token after each position, [EOS] after the last; rows are in the model's order."""
  index_BxL = jnp.broadcast_to(jnp.arange(tokens_BxL.shape[1]), tokens_BxL.shape)
  next_BxL = jnp.where(index_BxL == length_B[:, None] - 1, EOS, jnp.roll(tokens_BxL, -1, axis=1))
  head = {'chunk': cfg.vocab_chunk, 'compute': cfg.compute}
  return vocabulary.target_nll(forward(tokens_BxL, length_B), index_BxL, next_BxL, cfg.suppressed_tokens, **head)


FAMILY = Family(
  name='arm', corrupt=corrupt, loss=loss, sample=sample, SampleConfig=SampleConfig,
  model_settings=lambda cfg: {'causal': True, 'stop_head': False}, sizes=sizes, score=score, check_score=check_score,
  sample_settings=lambda cfg: {'fim': cfg.corrupt.get('fim_rate', 0.0) > 0}, check_prompt=check_prompt, growth=GROWTH,
)  # fmt: skip
