"""Tables for a model: logits that are a hash of the whole row, so that every token and every place matters."""

import jax.numpy as jnp
import numpy as np

from ilm_jax.types import Outputs


def mix(x):
  """Scramble uint32 words."""
  x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
  x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
  return x ^ (x >> 16)


def table(tokens_BxL, length_B, xp, *, vocab=9, scale=64, stop_shift=6.0):
  """(logits_BxLxV, stop_BxSx2): integers over powers of two, exact in float32; every token of a row changes them."""
  rows, size = tokens_BxL.shape
  index_1xL = xp.arange(size, dtype=xp.uint32)[None]
  words_BxL = mix(tokens_BxL.astype(xp.uint32) * np.uint32(2654435761) + index_1xL)
  words_BxL = xp.where(index_1xL < length_B[:, None].astype(xp.uint32), words_BxL, xp.uint32(0))
  row_B = words_BxL.sum(axis=1, dtype=xp.uint32)
  place_1xLxV = index_1xL[..., None] * np.uint32(7919) + xp.arange(vocab, dtype=xp.uint32)[None, None] * np.uint32(
    104729
  )
  logits_BxLxV = (mix(row_B[:, None, None] + place_1xLxV) % np.uint32(1009)).astype(xp.float32) / scale
  stop_B = (mix(row_B + np.uint32(77)) % np.uint32(1009)).astype(xp.float32) / 128 - stop_shift
  return logits_BxLxV, xp.stack([stop_B, xp.zeros(rows, xp.float32)], axis=1)[:, None]


class Forward:
  """The table as a sampler's `forward`; its cache is the tokens themselves."""

  def __init__(self, **settings):
    self.settings = settings

  def __call__(self, tokens_BxL, length_B, open_BxL=None):
    del open_BxL  # it is not told
    logits_BxLxV, stop_BxSx2 = table(tokens_BxL, length_B, jnp, **self.settings)
    return Outputs(logits_BxLxV, jnp.eye(logits_BxLxV.shape[2]), stop_BxSx2)

  def cache(self, rows, size):
    return jnp.zeros((rows, size), jnp.int32)

  def cached(self, tokens_BxN, start_B, cache):
    row_Bx1 = jnp.arange(tokens_BxN.shape[0])[:, None]
    at_BxN = start_B[:, None] + jnp.arange(tokens_BxN.shape[1])[None]
    cache = cache.at[row_Bx1, at_BxN].set(tokens_BxN, mode='drop')
    outputs = self(cache, start_B + tokens_BxN.shape[1])
    hidden = jnp.take_along_axis(outputs.hidden_BxLxD, at_BxN[..., None].clip(max=cache.shape[1] - 1), axis=1)
    return Outputs(hidden, outputs.unembed_VxD), cache

  def look_up(self, row):
    """(logits[place][token], p(stop)) of one row of any length."""
    logits, stop = table(np.array([row]), np.array([len(row)]), np, **self.settings)
    return logits[0].astype(np.float64), 1 / (1 + np.exp(-np.float64(stop[0, 0, 0])))
