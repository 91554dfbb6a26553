"""Stand-in model and examples shared by the tests of the autoregressive family."""

import jax
import jax.numpy as jnp
import numpy as np
import tables

from ilm_jax.special_tokens import BOS, CLS
from ilm_jax.types import Outputs

V = 12
CLOSED = (0, 1, 2, 4, 5, 6)  # tokens that are never generated: all special tokens but [EOS]


def example(prompt, answer):
  """Return an example `[CLS] prompt [BOS] answer`, in which only the answer is free (not given)."""
  tokens = np.array([CLS, *prompt, BOS, *answer], np.int32)
  return {'tokens': tokens, 'fixed': np.arange(len(tokens)) < len(prompt) + 2}


def rows_of(rows, size):
  """Pad lists of tokens to `size`; return (tokens_BxL, length_B)."""
  tokens_BxL = np.zeros((len(rows), size), np.int32)
  for i, row in enumerate(rows):
    tokens_BxL[i, : len(row)] = row
  return tokens_BxL, np.array([len(row) for row in rows], np.int32)


class CausalTable:
  """A causal stand-in model: its output at each position is looked up in a table by the tokens up to this position."""

  def __init__(self, vocab):
    self.table, self.vocab = tables.Forward(vocab=vocab, scale=512), vocab

  def __call__(self, tokens_BxL, length_B):
    def cut(n):
      return self.table(tokens_BxL, jnp.full_like(length_B, n + 1)).hidden_BxLxD[:, n]

    hidden_LxBxD = jax.vmap(cut)(jnp.arange(tokens_BxL.shape[1]))
    return Outputs(hidden_LxBxD.swapaxes(0, 1), jnp.eye(self.vocab))
