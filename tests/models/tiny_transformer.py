"""Helpers shared by the tests of models: a tiny transformer with random weights, and `assert_close`."""

import jax
import numpy as np

from ilm_jax.models import transformer

TINY = transformer.ModelConfig(vocab_size=40, num_layers=2, num_heads=2, d_model=16, d_ff=24)
CONDITIONED = transformer.ModelConfig(
  vocab_size=40, num_layers=2, num_heads=2, d_model=16, d_ff=24, stop_head=False, conditioning='adaln', d_cond=6
)
TOKENS = [11, 12, 13, 14, 15, 16, 17, 18]

apply = jax.jit(transformer.apply, static_argnums=0)


def shapes_of(cfg):
  return transformer.unbox(jax.eval_shape(lambda: transformer.init(cfg, jax.random.key(0))))


def random_params(cfg, std=0.3):
  """Return random parameters, large enough for each to affect the output; the padding embedding is not zero."""
  random = np.random.default_rng(0)
  return jax.tree.map(lambda x: random.normal(0, std, x.shape).astype(np.float32), shapes_of(cfg))


def logits_of(outputs):
  return np.asarray(outputs.hidden_BxLxD, np.float32) @ np.asarray(outputs.unembed_VxD).T


def assert_close(actual, expected, tolerance=1e-5, name=''):
  """Assert that the largest difference is below `tolerance` times the largest expected value."""
  actual, expected = np.asarray(actual), np.asarray(expected)
  assert actual.shape == expected.shape, f'{name}: shape {actual.shape}, expected {expected.shape}'
  error = np.abs(actual - expected).max() / np.abs(expected).max()
  assert error < tolerance, f'{name}: relative error {error:.2e}, allowed {tolerance:.0e}'
