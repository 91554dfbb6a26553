"""Multi-head softmax attention within the segments of packed rows, rotary embedding, and the key-value cache.

Axis letters in addition to those of types.py: Q queries, M keys.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ilm_jax.models import numerics
from ilm_jax.models.config import ModelConfig


def rotary(x_BxLxHxK, position_BxL, *, dim: int, base: float = 10_000.0):
  """Apply rotary position embedding (arXiv 2104.09864) to the first `dim` channels of each head, in float32.

  Channel i of the first half of `dim` forms a pair with channel i of the second half.
  """
  frequency = base ** (-jnp.arange(0, dim, 2, dtype=jnp.float32) / dim)
  angle = position_BxL.astype(jnp.float32)[..., None, None] * numerics.expand(frequency, position_BxL.ndim + 2)
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  x = x_BxLxHxK.astype(jnp.float32)
  first, second, rest = x[..., : dim // 2], x[..., dim // 2 : dim], x[..., dim:]
  rotated = [first * cos - second * sin, second * cos + first * sin, rest]
  return jnp.concatenate(rotated, axis=-1).astype(x_BxLxHxK.dtype)


def segment_mask(segment_BxL, position_BxL, *, causal: bool):
  """Return a BxLxL mask that is True where the query at index i may attend to the key at index j.

  Tokens attend within their segment. Padding (segment 0) attends to all tokens, so that every query has a key (in a
  row with only padding, all logits are NEG_INF and the softmax is uniform).
  """
  query, key = segment_BxL[:, :, None], segment_BxL[:, None, :]
  mask_BxLxL = (key > 0) & ((query == key) | (query == 0))
  if causal:
    mask_BxLxL &= (query == 0) | (position_BxL[:, :, None] >= position_BxL[:, None, :])
  return mask_BxLxL


def attend(q_BxQxHxK, k_BxMxHxK, v_BxMxHxK, mask_BxQxM, *, cfg: ModelConfig, rng=None):
  """Compute softmax attention of Q queries over the M keys that the mask allows; `rng` enables dropout."""
  scale = cfg.head_dim**-0.5
  logits_BxHxQxM = numerics.einsum('bqhk,bshk->bhqs', q_BxQxHxK * scale, k_BxMxHxK, cfg.compute).astype(jnp.float32)
  weight_BxHxQxM = jax.nn.softmax(jnp.where(mask_BxQxM[:, None], logits_BxHxQxM, numerics.NEG_INF), axis=-1)
  weight_BxHxQxM = numerics.dropout(weight_BxHxQxM, cfg.attention_dropout, rng)
  return numerics.einsum('bhqs,bshk->bqhk', weight_BxHxQxM, v_BxMxHxK, cfg.compute)


class Cache(NamedTuple):
  """Cached attention keys and values of one transformer block, for positions 0 to M-1 of each row."""

  k_BxMxHxK: Any
  v_BxMxHxK: Any


def empty_cache(cfg: ModelConfig, rows: int, size: int) -> Cache:
  """Return an empty key-value cache for one transformer block, with room for `size` positions per row."""
  shape = rows, size, cfg.num_heads, cfg.head_dim
  dtype = jnp.float32 if cfg.compute == 'float32' else jnp.bfloat16  # other modes round keys and values to it anyway
  return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


def update_cache(cache: Cache, k_BxQxHxK, v_BxQxHxK, position_BxQ) -> Cache:
  """Write keys and values into the cache at their positions; entries for positions beyond its size are dropped."""
  row_Bx1 = jnp.arange(position_BxQ.shape[0])[:, None]
  return Cache(*(
    old.at[row_Bx1, position_BxQ].set(new.astype(old.dtype), mode='drop')
    for old, new in zip(cache, (k_BxQxHxK, v_BxQxHxK), strict=True)
  ))  # fmt: skip
