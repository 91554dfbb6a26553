"""Autoregressive model: the next token given those to its left, up to an end token.

Training: cross-entropy of every free token and of [EOS] behind the last one, averaged over them. Sampling: one token at
a time with a cache of keys and values. The model gives every string an exact probability:

    log p(x | prompt) = sum_t log p(x_t | prompt, x_<t) + log p([EOS] | prompt, x)

With corrupt.fim_rate, it also fills one gap: `prefix [MASK] suffix [MASK]` is the prompt then, and the middle the answer
(prefix, suffix, middle; Bavarian et al. 2022, arXiv 2207.14255).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ilm_jax.families import corruption as _corrupt
from ilm_jax.families import drawing, growing
from ilm_jax.families.contract import Family
from ilm_jax.families.growing import Rows, note
from ilm_jax.families.settings import sample_config
from ilm_jax.models import numerics, vocabulary
from ilm_jax.special_tokens import EOS, MASK
from ilm_jax.types import GREEDY, Batch, Metrics, Outputs, Prompt, Rule, Sampled, Score, UserError

corrupt = _corrupt.arm


def model_settings(cfg) -> dict:
  """The fields of ModelConfig that an autoregressive model decides."""
  del cfg
  return {'causal': True, 'stop_head': False}


def sample_settings(cfg) -> dict:
  """The fields of SampleConfig that the corruption decides."""
  return {'fim': cfg.corrupt.get('fim_rate', 0.0) > 0}


def sizes(cfg, longest: int, answer: int) -> tuple[int, int]:
  """(tokens, targets) of the longest example, with the two [MASK]s of a rearranged one; the end is a target too."""
  if not 0 <= cfg.corrupt.fim_rate <= 1:
    raise UserError(f'corrupt.fim_rate={cfg.corrupt.fim_rate}: expected a share from 0 to 1')
  return longest + 2 * (cfg.corrupt.fim_rate > 0), answer + 1


# --- training ---------------------------------------------------------------------------------------------------------


def target_losses(outputs: Outputs, batch: Batch, *, compute: str = 'float32', chunk: int = 2048):
  """The cross-entropy of each listed target, predicted at its gap: BxT."""
  lse_BxL = vocabulary.vocab_logsumexp(outputs.hidden_BxLxD, outputs.unembed_VxD, chunk=chunk, compute=compute)
  gap_BxT, token_BxT = batch['target_gap_BxT'], batch['target_token_BxT']
  z_BxT = vocabulary.target_logits(outputs.hidden_BxLxD, outputs.unembed_VxD, gap_BxT, token_BxT, compute=compute)
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
  fim: bool = False  # the model was trained to fill in the middle
  closed_tokens: tuple[int, ...] = ()  # ids never produced
  min_buffer: int = 64  # shortest cache; it doubles up to max_length as rows grow
  compute: str = 'float32'
  vocab_chunk: int = 2048

  @property
  def capacity(self) -> int:
    """Positions of the longest buffer: a row, and the [MASK]s of a gap."""
    return self.max_length + 2 * self.fim

  @classmethod
  def create(cls, sampling, **others) -> 'SampleConfig':
    """Build from a config's `sampling` part; [EOS] is never closed."""
    closed = tuple(token for token in others.pop('closed_tokens', ()) if token != EOS)
    return sample_config(cls, sampling, closed_tokens=closed, **others)


def check_prompt(given: dict, cfg: SampleConfig) -> None:
  """Refuse a prompt with a gap that a model which writes from left to right cannot fill."""
  gaps = np.flatnonzero(given['open']).tolist()
  if len(gaps) > 1:
    raise UserError(f'family=arm fills one gap of a text, got {len(gaps)}: use a model of family=ilm or mdm')
  if gaps and gaps[0] < len(given['tokens']) - 1 and not cfg.fim:
    raise UserError(
      'family=arm continues a text, and this one has a gap before its end: use a model trained with corrupt.fim_rate, or '
      'one of family=ilm or mdm'
    )


def sample(forward, rng, prompt: Prompt, cfg: SampleConfig) -> Sampled:
  """Continue each prompt until [EOS]: the prompt in one pass, then a chain of while loops over growing caches.

  Where a model was trained to fill in the middle, a row with an open gap before its end gets its new tokens there.

  Args:
    forward: `cache(rows, size)` and `cached(tokens_BxN, start_B, cache) -> (Outputs, cache)`, as of `model.Forward`.
    rng: the key of the whole run; a row's noise is fold_in(fold_in(rng, request), step) and nothing else.
    prompt: rows of given tokens; new ones come behind the last (`fim`: or into the first open gap).
    cfg: see SampleConfig.

  Returns:
    Sampled; `stop_prob_BxM` is the probability of [EOS] at each pass, `order_BxL` counts from left to right.
  """
  return growing.sample(GROWTH, forward, rng, prompt, cfg)


def begin(forward, rng, prompt: Prompt, cfg: SampleConfig, size: int) -> Rows:
  """Rows that hold their prompts in the order of the model, which has seen them."""
  memo = ()
  if cfg.fim:
    open_BxL, length_B = jnp.asarray(prompt.open_BxL, bool), jnp.asarray(prompt.length_B, jnp.int32)
    start_B = jnp.where(open_BxL.any(axis=1), open_BxL.argmax(axis=1) + 1, length_B)
    memo = Layout.of(start_B, start_B, length_B)
    prompt = prompt._replace(tokens_BxL=memo.arrange(prompt.tokens_BxL), length_B=memo.length_B)
  count, given = prompt.tokens_BxL.shape
  cache = forward.cached(prompt.tokens_BxL, jnp.zeros(count, jnp.int32), forward.cache(count, max(size, given)))[1]
  return growing.resize(growing.begin(rng, prompt, cfg, size, cache=cache, memo=memo), size)


def finish(rows: Rows, cfg: SampleConfig) -> Sampled:
  """What has been sampled, in reading order."""
  if cfg.fim:
    rows = growing.resize(rows, cfg.capacity)  # a row without [MASK]s may fill a smaller buffer
    layout = rows.memo.with_middle(rows.steps_B)
    rows = rows._replace(
      tokens_BxL=layout.restore(rows.tokens_BxL, 0),
      order_BxL=layout.restore(rows.order_BxL, -1),
      length_B=rows.length_B - layout.marks_B,
    )
  return growing.finish(rows, cfg)


class Layout(NamedTuple):
  """Where the middle of each row lies, in reading order: prefix [MASK] suffix [MASK] middle in the order of the model.

  A row whose middle comes last is the same in both orders, without [MASK]s.
  """

  first_B: jax.Array
  past_B: jax.Array
  length_B: jax.Array  # in the order of the model
  marks_B: jax.Array  # 2, or 0

  @classmethod
  def of(cls, first_B, past_B, length_B) -> 'Layout':
    """From the middle's borders and the length, in reading order."""
    marks_B = jnp.where(past_B < length_B, 2, 0)
    return cls(first_B, past_B, length_B + marks_B, marks_B)

  def with_middle(self, more_B) -> 'Layout':
    """After so many tokens have been added to the middle."""
    return self._replace(past_B=self.past_B + more_B, length_B=self.length_B + more_B)

  def suffix_B(self):
    """Tokens behind the middle."""
    return self.length_B - self.marks_B - self.past_B

  def arrange(self, tokens_BxL):
    """From reading order to the order of the model: BxL+2."""
    index_1xL = jnp.arange(tokens_BxL.shape[1] + 2)[None]
    first_Bx1, marks_Bx1, suffix_Bx1 = self.first_B[:, None], self.marks_B[:, None], self.suffix_B()[:, None]
    second_Bx1 = first_Bx1 + 1 + suffix_Bx1  # of the [MASK]s
    suffix_BxL = index_1xL + (self.past_B - self.first_B - 1)[:, None]
    middle_BxL = index_1xL - 2 - suffix_Bx1
    from_BxL = jnp.where(index_1xL < second_Bx1, suffix_BxL, middle_BxL)
    from_BxL = jnp.where((index_1xL < first_Bx1) | (marks_Bx1 == 0), index_1xL, from_BxL)
    moved_BxL = jnp.take_along_axis(tokens_BxL, from_BxL.clip(0, tokens_BxL.shape[1] - 1), axis=1)
    mark_BxL = (marks_Bx1 > 0) & ((index_1xL == first_Bx1) | (index_1xL == second_Bx1))
    return jnp.where(index_1xL < self.length_B[:, None], jnp.where(mark_BxL, MASK, moved_BxL), 0)

  def restore(self, array_BxL, fill: int):
    """From the order of the model to reading order, two positions less; `fill` behind the last token."""
    index_1xL = jnp.arange(array_BxL.shape[1] - 2)[None]
    middle_BxL = index_1xL + (2 + self.suffix_B())[:, None]
    suffix_BxL = index_1xL - (self.past_B - self.first_B - 1)[:, None]
    from_BxL = jnp.where(index_1xL < self.past_B[:, None], middle_BxL, suffix_BxL)
    plain_BxL = (index_1xL < self.first_B[:, None]) | (self.marks_B[:, None] == 0)
    from_BxL = jnp.where(plain_BxL, index_1xL, from_BxL).clip(0, array_BxL.shape[1] - 1)
    inside_BxL = index_1xL < (self.length_B - self.marks_B)[:, None]
    return jnp.where(inside_BxL, jnp.take_along_axis(array_BxL, from_BxL, axis=1), fill)


def step(forward, cfg: SampleConfig, rows: Rows) -> Rows:
  """The last token of each row through the model, one draw, one token more in each row that goes on."""
  rng_B = jax.vmap(jax.random.fold_in)(rows.rng_B, rows.steps_B)
  row_B = jnp.arange(rng_B.shape[0])
  at_B = jnp.maximum(rows.length_B - 1, 0)
  outputs, cache = forward.cached(rows.tokens_BxL[row_B, at_B][:, None], at_B, rows.cache)

  logits_BxV = logits(outputs.hidden_BxLxD[:, 0], outputs.unembed_VxD, cfg)
  log_prob_BxV = jax.nn.log_softmax(logits_BxV, axis=-1)
  least_B = jnp.maximum(rows.lack_BxL.max(axis=1), int(cfg.force_first))
  logits_BxV = logits_BxV.at[:, EOS].set(jnp.where(rows.steps_B < least_B, numerics.NEG_INF, logits_BxV[:, EOS]))
  token_B = drawing.choose(rng_B, logits_BxV, cfg.token)

  most_B = cfg.max_length + (rows.memo.marks_B if cfg.fim else 0)
  room_B = (rows.length_B < most_B) & (rows.steps_B < growing.most_steps(cfg))
  room_B &= rows.steps_B < rows.room_BxL.max(axis=1)
  ends_B = rows.active_B & (token_B == EOS)
  go_B = rows.active_B & ~ends_B & room_B

  def append(array_BxL, value_B):
    old_B = array_BxL[row_B, rows.length_B.clip(max=array_BxL.shape[1] - 1)]
    return array_BxL.at[row_B, rows.length_B].set(jnp.where(go_B, value_B, old_B), mode='drop')

  end_prob_B = jnp.exp(log_prob_BxV[:, EOS])
  return rows._replace(
    tokens_BxL=append(rows.tokens_BxL, token_B),
    order_BxL=append(rows.order_BxL, rows.steps_B),
    length_B=rows.length_B + go_B,
    active_B=go_B,
    steps_B=rows.steps_B + go_B,
    stopped_B=rows.stopped_B | ends_B,
    log_prob_BxM=note(rows.log_prob_BxM, rows.steps_B, log_prob_BxV[row_B, token_B], go_B),
    stop_prob_BxM=note(rows.stop_prob_BxM, rows.steps_B, end_prob_B, rows.active_B),
    cache=cache,
  )


GROWTH = growing.Growth(begin, step, finish=finish)


def logits(hidden, unembed_VxD, cfg: SampleConfig):
  """Logits with the closed tokens at NEG_INF."""
  bias_V = vocabulary.closed_bias(unembed_VxD.shape[0], cfg.closed_tokens)
  return vocabulary.vocab_logits(hidden, unembed_VxD, bias_V, compute=cfg.compute)


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
    fixed_BxL: given tokens; they come before the free ones (`fim`: or around them).
    length_B: of the rows.
    cfg: `closed_tokens`, `fim`, `compute` and `vocab_chunk` are read.
    kind: 'exact', or nothing.
    longest: not used.
  """
  del rng
  check_score(kind, longest)
  if cfg.fim:
    free_BxL = ~fixed_BxL & (jnp.arange(tokens_BxL.shape[1])[None] < length_B[:, None])
    free_B = free_BxL.sum(axis=1)
    first_B = jnp.where(free_B > 0, free_BxL.argmax(axis=1), length_B)
    layout = Layout.of(first_B, first_B + free_B, length_B)
    tokens_BxL, length_B = layout.arrange(tokens_BxL), layout.length_B
    fixed_BxL = jnp.arange(tokens_BxL.shape[1])[None] < (length_B - free_B)[:, None]
  index_BxL = jnp.broadcast_to(jnp.arange(tokens_BxL.shape[1]), tokens_BxL.shape)
  end_Bx1 = length_B[:, None] - 1
  free_BxL = ~fixed_BxL & (index_BxL <= end_Bx1)
  asked_BxL = jnp.where(index_BxL == end_Bx1, True, jnp.roll(free_BxL, -1, axis=1)) & (index_BxL <= end_Bx1)
  nll_B = jnp.where(asked_BxL, next_losses(forward, tokens_BxL, length_B, cfg), 0.0).sum(axis=1)
  return Score('exact', nll_B, jnp.zeros_like(nll_B), free_BxL.sum(axis=1))


def next_losses(forward, tokens_BxL, length_B, cfg: SampleConfig):
  """-log p of what follows each position, [EOS] behind the last token of a row: BxL.

  Args:
    forward: (tokens_BxL, length_B) -> Outputs.
    tokens_BxL: whole rows, in the order of the model.
    length_B: of the rows.
    cfg: `closed_tokens`, `compute` and `vocab_chunk` are read.
  """
  outputs = forward(tokens_BxL, length_B)
  bias_V = vocabulary.closed_bias(outputs.unembed_VxD.shape[0], cfg.closed_tokens)
  lse_BxL = vocabulary.vocab_logsumexp(
    outputs.hidden_BxLxD, outputs.unembed_VxD, bias_V, chunk=cfg.vocab_chunk, compute=cfg.compute
  )
  index_BxL = jnp.broadcast_to(jnp.arange(tokens_BxL.shape[1]), tokens_BxL.shape)
  next_BxL = jnp.where(index_BxL == length_B[:, None] - 1, EOS, jnp.roll(tokens_BxL, -1, axis=1))
  z_BxL = vocabulary.target_logits(outputs.hidden_BxLxD, outputs.unembed_VxD, index_BxL, next_BxL, compute=cfg.compute)
  return jnp.where(bias_V[next_BxL] < 0, jnp.inf, lse_BxL - z_BxL)


FAMILY = Family(
  name='arm',
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
  growth=GROWTH,
)
