"""Fake models for tests of sampling: the logits are a hash of all tokens of the row and their positions."""

import jax
import jax.numpy as jnp
import numpy as np

from ilm_jax.types import UNLIMITED, Outputs, Prompt


def mix(x):
  """Hash uint32 integers, elementwise."""
  x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
  x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
  return x ^ (x >> 16)


def table(tokens_BxL, length_B, xp, *, vocab=9, scale=64, stop_shift=6.0):
  """Return (logits_BxLxV, stop_BxSx2): hashes of the tokens, as values that float32 represents exactly.

  Args:
    tokens_BxL: token ids.
    length_B: number of tokens of each row; later entries are ignored.
    xp: numpy or jax.numpy.
    vocab: vocabulary size.
    scale: a larger value gives smaller logits, hence more uniform draws.
    stop_shift: a larger value makes stopping less probable.
  """
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
  """Fake model that returns the logits of `table` to a sampler; its key/value cache holds the token ids."""

  def __init__(self, **settings):
    self.settings = settings

  def __call__(self, tokens_BxL, length_B, open_BxL=None):
    del open_BxL  # the logits do not depend on which gaps accept insertions
    logits_BxLxV, stop_BxSx2 = table(tokens_BxL, length_B, jnp, **self.settings)
    return Outputs(logits_BxLxV, jnp.eye(logits_BxLxV.shape[2]), stop_BxSx2)

  def empty_cache(self, rows, size):
    return jnp.zeros((rows, size), jnp.int32)

  def apply_cached(self, tokens_BxN, start_B, cache):
    row_Bx1 = jnp.arange(tokens_BxN.shape[0])[:, None]
    at_BxN = start_B[:, None] + jnp.arange(tokens_BxN.shape[1])[None]
    cache = cache.at[row_Bx1, at_BxN].set(tokens_BxN, mode='drop')
    outputs = self(cache, start_B + tokens_BxN.shape[1])
    hidden = jnp.take_along_axis(outputs.hidden_BxLxD, at_BxN[..., None].clip(max=cache.shape[1] - 1), axis=1)
    return Outputs(hidden, outputs.unembed_VxD), cache

  def look_up(self, row):
    """Return (logits[position][token], p(stop)) of `table` for one row of any length."""
    logits, stop = table(np.array([row]), np.array([len(row)]), np, **self.settings)
    return logits[0].astype(np.float64), 1 / (1 + np.exp(-np.float64(stop[0, 0, 0])))


def make_prompt(rows, *, size=8, requests=None, fill=0) -> Prompt:
  """Build a Prompt from rows, and append empty rows until there are `fill`.

  A row is (tokens, open) or (tokens, open, least, most). The last three have one value per token: whether insertions
  are allowed to the right of it, and their minimum and maximum number.
  """
  rows = [*rows, *[([], [])] * (fill - len(rows))]
  columns = [(0, np.int32), (False, bool), (0, np.int32), (UNLIMITED, np.int32)]
  arrays = [np.full((len(rows), size), value, dtype) for value, dtype in columns]
  for i, row in enumerate(rows):
    for array_BxL, values in zip(arrays, row, strict=False):
      array_BxL[i, : len(values)] = values
  request_B = np.arange(len(rows), dtype=np.int32)
  if requests is not None:
    request_B[: len(requests)] = requests
  length_B = np.array([len(row[0]) for row in rows], np.int32)
  tokens_BxL, open_BxL, least_BxL, most_BxL = arrays
  return jax.device_put(Prompt(tokens_BxL, length_B, open_BxL, request_B, least_BxL=least_BxL, most_BxL=most_BxL))
