"""Attention with rotary embedding and the MLP against their formulas, and which tokens attend to which."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_transformer import TINY, TOKENS, apply, assert_close, random_params

from ilm_jax.models import transformer


def layer_norm(x, params):
  x = np.asarray(x, np.float64)
  return (x - x.mean()) / np.sqrt(x.var() + 1e-5) * params['scale'] + params['bias']


@pytest.mark.parametrize('rotary_dim', [64, 4])  # a head has 8 channels: rotate all of them, or only the first 4
def test_attention_and_its_layer_norm_match_their_formulas(rotary_dim):
  cfg = dataclasses.replace(TINY, num_layers=1, final_norm=False, rotary_dim=rotary_dim)
  params, tokens, positions = random_params(cfg), [11, 12, 13], [0, 35, 2]
  block, heads, size = params['block_0'], cfg.num_heads, cfg.head_dim
  for name in ('kernel', 'bias'):
    block['mlp_out'][name][:] = 0  # disable the MLP
  half = min(rotary_dim, size) // 2

  def rotate(vector, position):
    vector = vector.copy()
    for c in range(half):
      number = complex(vector[c], vector[c + half]) * np.exp(1j * position * 10_000.0 ** (-c / half))
      vector[c], vector[c + half] = number.real, number.imag
    return vector

  x = [params['embed'][token].astype(np.float64) for token in tokens]
  y = [layer_norm(row, block['norm1']) for row in x]
  expected = [row.copy() for row in x]
  for h in range(heads):
    query, key, value = ([row @ block[name]['kernel'][:, h] for row in y] for name in ('query', 'key', 'value'))
    for i in range(3):
      logits = [rotate(query[i], positions[i]) @ rotate(key[j], positions[j]) for j in range(3)]
      weight = np.exp(np.array(logits) / np.sqrt(size))
      expected[i] += sum(weight[j] / weight.sum() * value[j] for j in range(3)) @ block['out']['kernel'][h]
  one = np.ones((1, 3), int)
  outputs = apply(cfg, params, np.array([tokens]), np.array([positions]), one, one[:, :1])
  assert_close(outputs.hidden_BxLxD[0], expected)


@pytest.mark.parametrize('activation', ['relu', 'gelu'])
def test_the_mlp_and_its_layer_norm_match_their_formulas(activation):
  cfg = dataclasses.replace(TINY, num_layers=1, activation=activation, final_norm=False)
  params = random_params(cfg)
  block = params['block_0']
  block['out']['kernel'][:] = 0  # disable attention
  x = params['embed'][7].astype(np.float64)
  hidden = layer_norm(x, block['norm2']) @ block['mlp_in']['kernel'] + block['mlp_in']['bias']
  if activation == 'relu':
    hidden = np.maximum(hidden, 0)
  else:
    hidden = hidden / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (hidden + 0.044715 * hidden**3)))
  expected = x + hidden @ block['mlp_out']['kernel'] + block['mlp_out']['bias']
  one = np.ones((1, 1), int)
  assert_close(apply(cfg, params, one * 7, one, one, one * 0).hidden_BxLxD[0, 0], expected)


# --- which outputs depend on which tokens -----------------------------------------------------------------------------


def influence(cfg, tokens, position, segment, cls=(0,)):
  """Find from gradients on which tokens each feature and each stop logit depends; return masks (LxL and SxL)."""
  tokens, position, segment, cls = (np.array([list(values)]) for values in (tokens, position, segment, cls))
  assert len(set(tokens[0])) == tokens.size, 'each token id must occur once'
  params = random_params(cfg)
  direction_D = jnp.arange(1.0, cfg.d_model + 1)  # not all ones: LayerNorm makes the sum of features constant

  def read(embed):
    outputs = transformer.apply(cfg, params | {'embed': embed}, tokens, position, segment, cls)
    stop_S = outputs.stop_BxSx2[0, :, 0] if cfg.stop_head else jnp.zeros(0)
    return outputs.hidden_BxLxD[0] @ direction_D, stop_S

  jacobians = jax.jit(jax.jacrev(read))(params['embed'])
  return [np.abs(np.asarray(x_IxVxD)).max(-1)[:, tokens[0]] > 0 for x_IxVxD in jacobians]


@pytest.mark.parametrize('causal', [False, True])
def test_tokens_attend_neither_to_other_segments_nor_to_padding(causal):
  cfg = dataclasses.replace(TINY, causal=causal)
  segment, position = [1, 1, 1, 2, 2, 3, 0, 0], [0, 1, 2, 0, 1, 0, 0, 0]
  features, stop = influence(cfg, TOKENS, position, segment, cls=(0, 3, 5))
  for i in range(6):
    for j in range(8):
      sees = segment[i] == segment[j] and (j <= i or not causal)
      assert features[i, j] == sees, f'token {i} must {"" if sees else "not "}depend on token {j}'
  for s, cls in enumerate((0, 3, 5)):
    sees = [segment[j] == s + 1 and (j <= cls or not causal) for j in range(8)]
    assert stop[s].tolist() == sees, f'the stop head of segment {s + 1} depends on tokens {stop[s]}'


def test_a_row_that_contains_only_padding_has_finite_features():
  zeros = np.zeros((2, 4), int)
  outputs = apply(TINY, random_params(TINY), zeros, zeros, zeros, zeros[:, :1])
  assert np.isfinite(outputs.hidden_BxLxD).all() and np.isfinite(outputs.stop_BxSx2).all()
