"""The decoding loop shared by the families that generate by adding tokens to a row (ilm, it, arm).

A family collects the four functions that describe its decoding in a `Growth`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ilm_jax.types import UNLIMITED, Prompt, Sampled


class Rows(NamedTuple):
  """Partially decoded rows. The first axis of every array is the row axis; M is the maximum number of steps plus 1."""

  tokens_BxL: jax.Array  # token ids, 0 on padding
  order_BxL: jax.Array  # decoding step that inserted each token; -1 for tokens of the prompt and padding
  max_left_BxL: jax.Array  # how many more tokens may be inserted into the gap right of each position
  min_left_BxL: jax.Array  # how many more tokens must be inserted into the gap right of each position
  gap_BxL: jax.Array  # which of the prompt's gaps (1, 2, ...) lies right of each position; 0: none
  length_B: jax.Array  # number of tokens in each row
  active_B: jax.Array  # whether the row is still being decoded
  steps_B: jax.Array  # number of decoding steps that inserted a token into the row
  stopped_B: jax.Array  # whether the model ended the row (False: still active, or ended by a limit)
  rng_B: jax.Array  # RNG key of each row; the keys of its decoding steps are derived from it
  log_prob_BxM: jax.Array  # log-probability of each step's insertions
  stop_prob_BxM: jax.Array  # the model's probability of stopping at each step
  cache: Any = ()  # key/value cache of a causal model; its arrays have positions as their second axis
  memo: Any = ()  # further per-row state that only one family uses


# Fields of Rows with one value per buffer position -> the value at unused positions.
FILL = {'tokens_BxL': 0, 'order_BxL': -1, 'max_left_BxL': 0, 'min_left_BxL': 0, 'gap_BxL': 0}


def most_steps(cfg) -> int:
  """Return the maximum number of decoding steps that may insert a token into a row."""
  return min(cfg.max_length if cfg.max_steps is None else cfg.max_steps, cfg.max_length)


def request_keys(rng, prompt: Prompt):
  """Return an RNG key for each row, which depends only on `rng` and the row's request number."""
  return jax.vmap(functools.partial(jax.random.fold_in, rng))(prompt.request_B)


def step_keys(rows: Rows, count: int):
  """Return `count` arrays of RNG keys, with one key per row, for the current step of each row."""
  rng_B = jax.vmap(jax.random.fold_in)(rows.rng_B, rows.steps_B)
  return jax.vmap(functools.partial(jax.random.split, num=count), out_axes=1)(rng_B)


def open_gaps(rows: Rows):
  """Return a BxL mask of the positions that may still receive a token on their right."""
  return (rows.max_left_BxL > 0) & (jnp.arange(rows.tokens_BxL.shape[1])[None] < rows.length_B[:, None])


def buffers(start: int, cfg) -> list[int]:
  """Return the buffer sizes for rows that grow from `start` tokens: cfg.min_buffer, its doubles, cfg.capacity."""
  size, sizes = cfg.min_buffer, []
  while size < min(start, cfg.capacity):
    size *= 2
  while size < cfg.capacity:
    sizes.append(size)
    size *= 2
  return sizes + [cfg.capacity]


def begin(rng, prompt: Prompt, cfg, size: int, *, cache=(), memo=()) -> Rows:
  """Return the initial rows: the prompts in a buffer of `size` positions."""
  count = prompt.tokens_BxL.shape[0]
  trace_BxM = jnp.zeros((count, most_steps(cfg) + 1), jnp.float32)
  open_BxL = jnp.asarray(prompt.open_BxL, bool).at[:, 0].set(False)

  def where_open(value_BxL):
    return pad_or_cut(jnp.where(open_BxL, value_BxL, 0).astype(jnp.int32), size, 0)

  return Rows(
    tokens_BxL=pad_or_cut(jnp.asarray(prompt.tokens_BxL, jnp.int32), size, 0),
    order_BxL=jnp.full((count, size), -1, jnp.int32),
    max_left_BxL=where_open(UNLIMITED if prompt.most_BxL is None else prompt.most_BxL),
    min_left_BxL=where_open(0 if prompt.least_BxL is None else prompt.least_BxL),
    gap_BxL=where_open(jnp.cumsum(open_BxL, axis=1)),
    length_B=jnp.asarray(prompt.length_B, jnp.int32),
    active_B=jnp.asarray(prompt.length_B) > 0,
    steps_B=jnp.zeros(count, jnp.int32),
    stopped_B=jnp.zeros(count, bool),
    rng_B=request_keys(rng, prompt),
    log_prob_BxM=trace_BxM,
    stop_prob_BxM=trace_BxM,
    cache=cache,
    memo=memo,
  )


def begin_without_cache(forward, rng, prompt: Prompt, cfg, size: int) -> Rows:
  """Return the initial rows of a model that needs neither a cache nor a forward pass over the prompt."""
  return begin(rng, prompt, cfg, size)


def advance(rows: Rows, *, go_B, stops_B, inserted_B, log_prob_B, stop_prob_B, **arrays) -> Rows:
  """Update the rows after a decoding step; `arrays` are the new values of other fields of `Rows`.

  Rows become inactive unless the step inserts tokens (`go_B`); `stops_B`: the model ends the row. `log_prob_B` is
  recorded where `go_B` is true, and `stop_prob_B` in the rows that were active.
  """
  # Cast back: with jax_enable_x64, sums and indices become int64, but in a while loop types must not change.
  old = {name: getattr(rows, name) for name in arrays}
  arrays = jax.tree.map(lambda new, old: jnp.asarray(new, old.dtype), arrays, old)
  return rows._replace(
    length_B=rows.length_B + jnp.asarray(inserted_B, jnp.int32),
    active_B=go_B,
    steps_B=rows.steps_B + go_B,
    stopped_B=rows.stopped_B | stops_B,
    log_prob_BxM=record(rows.log_prob_BxM, rows.steps_B, log_prob_B, go_B),
    stop_prob_BxM=record(rows.stop_prob_BxM, rows.steps_B, stop_prob_B, rows.active_B),
    **arrays,
  )


def resize(rows: Rows, size: int) -> Rows:
  """Pad or cut the rows to a buffer of `size` positions."""
  arrays = {name: pad_or_cut(getattr(rows, name), size, fill) for name, fill in FILL.items()}
  return rows._replace(**arrays, cache=jax.tree.map(lambda array: pad_or_cut(array, size, 0), rows.cache))


def finish(rows: Rows, cfg) -> Sampled:
  """Return the rows as a `Sampled`, whose arrays over positions are padded or cut to max_length."""
  rows = resize(rows._replace(cache=()), cfg.max_length)
  return Sampled(**{name: getattr(rows, name) for name in Sampled._fields})


class Growth(NamedTuple):
  """The decoding functions of a model family, described in `contract.Growth`."""

  begin: Callable[..., Rows]
  step: Callable[..., Rows]
  needed: Callable[..., Any] = lambda length_B, cfg: length_B + 1
  finish: Callable[..., Sampled] = finish


def sample(growth: Growth, forward, rng, prompt: Prompt, cfg) -> Sampled:
  """Decode until all rows are finished: one while loop for each buffer size, without synchronizing with the host.

  Step t of request r draws with the key fold_in(fold_in(rng, r), t). The prompt's buffer may be shorter than
  cfg.max_length. A loop ends when no row is active, or when an active row might outgrow the buffer in its next step.
  """
  sizes = buffers(prompt.tokens_BxL.shape[1] + cfg.capacity - cfg.max_length, cfg)
  rows = growth.begin(forward, rng, prompt, cfg, sizes[0])
  for size in sizes:
    rows = resize(rows, size)

    def going(rows, size=size):
      full_B = rows.active_B & (growth.needed(rows.length_B, cfg) > size)
      return rows.active_B.any() & ((size == sizes[-1]) | ~full_B.any())

    rows = jax.lax.while_loop(going, functools.partial(growth.step, forward, cfg), rows)
  return growth.finish(rows, cfg)


def pad_or_cut(array, size: int, fill):
  """Pad (with `fill`) or cut the second axis of an array to `size` positions."""
  extra = max(0, size - array.shape[1])
  return jnp.pad(array, ((0, 0), (0, extra)) + ((0, 0),) * (array.ndim - 2), constant_values=fill)[:, :size]


def record(trace_BxM, steps_B, value_B, where_B):
  """Write value_B[b] into trace_BxM[b, steps_B[b]] for each row b where `where_B` is true; return the new trace."""
  row_B = jnp.arange(steps_B.shape[0])
  return trace_BxM.at[row_B, steps_B].set(jnp.where(where_B, value_B, trace_BxM[row_B, steps_B]))
