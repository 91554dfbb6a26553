"""What the samplers that write token by token share: rows that grow in buffers that double, in one jit."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ilm_jax.types import Prompt, Sampled


class Rows(NamedTuple):
  """Rows on their way from a prompt to an answer."""

  tokens_BxL: jax.Array
  open_BxL: jax.Array
  order_BxL: jax.Array
  length_B: jax.Array
  active_B: jax.Array
  steps_B: jax.Array
  stopped_B: jax.Array
  log_prob_BxM: jax.Array
  stop_prob_BxM: jax.Array
  cache: Any = ()  # of a model that keeps one; its arrays have positions as their second axis


def most_steps(cfg) -> int:
  """Steps of a row, at most."""
  return min(cfg.max_length if cfg.max_steps is None else cfg.max_steps, cfg.max_length)


def request_keys(rng, prompt: Prompt):
  """A key for each row, from its request alone."""
  return jax.vmap(functools.partial(jax.random.fold_in, rng))(prompt.request_B)


def buffers(start: int, cfg) -> list[int]:
  """The lengths a row's buffer takes on its way from `start` positions to max_length."""
  size, sizes = cfg.min_buffer, []
  while size < min(start, cfg.max_length):
    size *= 2
  while size < cfg.max_length:
    sizes.append(size)
    size *= 2
  return sizes + [cfg.max_length]


def grow(step, prompt: Prompt, cfg, *, cache=(), longest=lambda length_B: length_B + 1) -> Sampled:
  """Repeat a step until no row is active: a chain of while loops over growing buffers, without a host sync.

  Args:
    step: Rows -> Rows.
    prompt: where the rows start.
    cfg: `max_length`, `max_steps`, `min_buffer`.
    cache: of the model, for the first buffer.
    longest: lengths -> the lengths after one more step, at most; a loop ends when they do not fit its buffer.

  Returns:
    Sampled, with L = max_length and M = the largest number of steps, plus one for the forward pass that stops.
  """
  count, start = prompt.tokens_BxL.shape
  trace_BxM = jnp.zeros((count, most_steps(cfg) + 1), jnp.float32)
  rows = Rows(
    tokens_BxL=jnp.asarray(prompt.tokens_BxL, jnp.int32),
    open_BxL=jnp.asarray(prompt.open_BxL, bool).at[:, 0].set(False),
    order_BxL=jnp.full((count, start), -1, jnp.int32),
    length_B=jnp.asarray(prompt.length_B, jnp.int32),
    active_B=jnp.asarray(prompt.length_B) > 0,
    steps_B=jnp.zeros(count, jnp.int32),
    stopped_B=jnp.zeros(count, bool),
    log_prob_BxM=trace_BxM,
    stop_prob_BxM=trace_BxM,
    cache=cache,
  )
  sizes = buffers(start, cfg)
  for size in sizes:
    rows = rows._replace(
      tokens_BxL=fit(rows.tokens_BxL, size, 0),
      open_BxL=fit(rows.open_BxL, size, False),
      order_BxL=fit(rows.order_BxL, size, -1),
      cache=jax.tree.map(lambda array, size=size: fit(array, size, 0), rows.cache),
    )
    last = size == sizes[-1]

    def going(rows, size=size, last=last):
      full = jnp.bool_(False) if last else (rows.active_B & (longest(rows.length_B) > size)).any()
      return rows.active_B.any() & ~full

    rows = jax.lax.while_loop(going, step, rows)
  return Sampled(**{name: getattr(rows, name) for name in Sampled._fields})


def fit(array, size: int, fill):
  """Pad or cut the second axis to `size` positions."""
  extra = max(0, size - array.shape[1])
  return jnp.pad(array, ((0, 0), (0, extra)) + ((0, 0),) * (array.ndim - 2), constant_values=fill)[:, :size]


def note(trace_BxM, steps_B, value_B, where_B):
  """Write each row's value at its step, in the rows with `where`."""
  row_B = jnp.arange(steps_B.shape[0])
  return trace_BxM.at[row_B, steps_B].set(jnp.where(where_B, value_B, trace_BxM[row_B, steps_B]))
