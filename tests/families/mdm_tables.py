"""A table of logits as a stand-in for a masked diffusion model, shared by the tests of sampling and of scoring.

The logits are a hash of the whole row, and they change linearly with the noise level.
"""

import functools
import math

import jax.numpy as jnp
import numpy as np
import tables

from ilm_jax.types import Outputs

PAD, CLS, MASK, BOS = 0, 1, 2, 4
V = 8  # vocabulary size; the ordinary (not special) tokens are 5, 6 and 7
CLOSED = (CLS, MASK, 3, BOS)


def sigma(t, eps=1e-3):
  """Return the noise level of the log-linear schedule at time t."""
  return -math.log(1 - (1 - eps) * t)


def table(tokens_BxL, length_B, noise_B, xp, *, scale=192, tilt=1 / 8):
  """Return logits_BxLxV, linear in the noise level: one half of the hashed values is the intercepts, one the slopes."""
  hashed_BxLx2V, _ = tables.table(tokens_BxL, length_B, xp, vocab=2 * V, scale=scale)
  return hashed_BxLx2V[..., :V] + tilt * noise_B[:, None, None] * hashed_BxLx2V[..., V:]


def forward(tokens_BxL, length_B, noise_BxS, **settings):
  """Return the logits of `table` as a model returns them."""
  return Outputs(table(tokens_BxL, length_B, noise_BxS[:, 0], jnp, **settings), jnp.eye(V))


@functools.cache
def log_probs(row, noise, closed=CLOSED, **settings):
  """Return log p[position][token] of one row; -inf for the tokens in `closed`."""
  logits = table(np.array([row]), np.array([len(row)]), np.array([noise], np.float32), np, **settings)[0].astype(float)
  logits[:, list(closed)] = -np.inf
  return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
