"""What the samplers that write token by token share: rows that grow in buffers that double, in one jit.

A family that grows its rows has

    begin(forward, rng, prompt, cfg, size) -> Rows     in a buffer of `size` positions
    step(forward, cfg, rows)               -> Rows     after one forward pass
    needed(length_B, cfg)                  positions after the next step, at most
    finish(rows, cfg)                      -> Sampled, from rows of any size

so that `sample` below runs a batch to its end, and `batching` exchanges finished rows for new ones.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ilm_jax.types import UNLIMITED, Prompt, Sampled


class Rows(NamedTuple):
  """Rows on their way from a prompt to an answer; the first axis of every array is that of the rows."""

  tokens_BxL: jax.Array
  order_BxL: jax.Array
  room_BxL: jax.Array  # tokens that may still come right of this one; 0: closed
  lack_BxL: jax.Array  # tokens that must still come there
  gap_BxL: jax.Array  # positions with the same number share their room and their lack
  length_B: jax.Array
  active_B: jax.Array
  steps_B: jax.Array
  stopped_B: jax.Array
  rng_B: jax.Array  # key of each request
  log_prob_BxM: jax.Array
  stop_prob_BxM: jax.Array
  cache: Any = ()  # of a model that keeps one; its arrays have positions as their second axis
  memo: Any = ()  # what a family remembers of each row


def most_steps(cfg) -> int:
  """Steps of a row, at most."""
  return min(cfg.max_length if cfg.max_steps is None else cfg.max_steps, cfg.max_length)


def request_keys(rng, prompt: Prompt):
  """A key for each row, from its request alone."""
  return jax.vmap(functools.partial(jax.random.fold_in, rng))(prompt.request_B)


def buffers(start: int, cfg) -> list[int]:
  """The lengths a row's buffer takes on its way from `start` positions to the longest."""
  size, sizes = cfg.min_buffer, []
  while size < min(start, cfg.capacity):
    size *= 2
  while size < cfg.capacity:
    sizes.append(size)
    size *= 2
  return sizes + [cfg.capacity]


def begin(rng, prompt: Prompt, cfg, size: int, *, cache=(), memo=()) -> Rows:
  """Rows that hold their prompts, in a buffer of `size` positions."""
  count = prompt.tokens_BxL.shape[0]
  trace_BxM = jnp.zeros((count, most_steps(cfg) + 1), jnp.float32)
  open_BxL = jnp.asarray(prompt.open_BxL, bool).at[:, 0].set(False)
  gap_BxL = jnp.cumsum(open_BxL, axis=1)
  room_BxL = jnp.full(open_BxL.shape, UNLIMITED) if prompt.most_BxL is None else jnp.asarray(prompt.most_BxL)
  lack_BxL = jnp.zeros(open_BxL.shape, jnp.int32) if prompt.least_BxL is None else jnp.asarray(prompt.least_BxL)
  return Rows(
    tokens_BxL=fit(jnp.asarray(prompt.tokens_BxL, jnp.int32), size, 0),
    order_BxL=jnp.full((count, size), -1, jnp.int32),
    room_BxL=fit(jnp.where(open_BxL, room_BxL, 0).astype(jnp.int32), size, 0),
    lack_BxL=fit(jnp.where(open_BxL, lack_BxL, 0).astype(jnp.int32), size, 0),
    gap_BxL=fit(jnp.where(open_BxL, gap_BxL, 0).astype(jnp.int32), size, 0),
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


def resize(rows: Rows, size: int) -> Rows:
  """The same rows in a buffer of `size` positions."""
  return rows._replace(
    tokens_BxL=fit(rows.tokens_BxL, size, 0),
    order_BxL=fit(rows.order_BxL, size, -1),
    room_BxL=fit(rows.room_BxL, size, 0),
    lack_BxL=fit(rows.lack_BxL, size, 0),
    gap_BxL=fit(rows.gap_BxL, size, 0),
    cache=jax.tree.map(lambda array: fit(array, size, 0), rows.cache),
  )


def finish(rows: Rows, cfg) -> Sampled:
  """What has been sampled, with L = max_length and M = the largest number of steps, and one for the pass that stops."""
  made = {name: getattr(rows, name) for name in Sampled._fields}
  cut = {'tokens_BxL': fit(rows.tokens_BxL, cfg.max_length, 0), 'order_BxL': fit(rows.order_BxL, cfg.max_length, -1)}
  return Sampled(**{**made, **cut})


def one_more(length_B, cfg):
  """A step adds one token."""
  del cfg
  return length_B + 1


class Growth(NamedTuple):
  """The functions of a family whose rows grow, see above."""

  begin: Any
  step: Any
  needed: Any = one_more
  finish: Any = finish


def sample(growth: Growth, forward, rng, prompt: Prompt, cfg) -> Sampled:
  """Repeat a family's step until no row is active: a chain of while loops over growing buffers, without a host sync."""
  sizes = buffers(prompt.tokens_BxL.shape[1] + cfg.capacity - cfg.max_length, cfg)
  rows = growth.begin(forward, rng, prompt, cfg, sizes[0])
  for size in sizes:
    rows = resize(rows, size)

    def going(rows, size=size):
      full_B = rows.active_B & (growth.needed(rows.length_B, cfg) > size)
      return rows.active_B.any() & ((size == sizes[-1]) | ~full_B.any())

    rows = jax.lax.while_loop(going, functools.partial(growth.step, forward, cfg), rows)
  return growth.finish(rows, cfg)


def fit(array, size: int, fill):
  """Pad or cut the second axis to `size` positions."""
  extra = max(0, size - array.shape[1])
  return jnp.pad(array, ((0, 0), (0, extra)) + ((0, 0),) * (array.ndim - 2), constant_values=fill)[:, :size]


def note(trace_BxM, steps_B, value_B, where_B):
  """Write each row's value at its step, in the rows with `where`."""
  row_B = jnp.arange(steps_B.shape[0])
  return trace_BxM.at[row_B, steps_B].set(jnp.where(where_B, value_B, trace_BxM[row_B, steps_B]))
