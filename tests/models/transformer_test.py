"""Properties of the transformer that hold for any weights: conditioning, rematerialization, scan, initialization."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import print_saved_residuals
from tiny_transformer import CONDITIONED, TINY, TOKENS, apply, assert_close, random_params

from ilm_jax.models import numerics, transformer

# --- noise levels and the open-gap embedding --------------------------------------------------------------------------


def test_the_features_of_a_segment_depend_only_on_its_own_noise_level():
  params, one = random_params(CONDITIONED), np.ones((1, 6), int)
  segment = np.array([[1, 1, 2, 2, 2, 0]])
  args = one * [[7, 8, 7, 8, 9, 0]], np.array([[0, 1, 0, 1, 2, 0]]), segment, np.array([[0, 2, 0]])

  def changed(*noise):
    """Return a mask of the tokens whose features differ from those with noise level 0.3 in all segments."""
    first, second = (
      apply(CONDITIONED, params, *args, np.array([levels])).hidden_BxLxD[0] for levels in ((0.3, 0.3, 0.3), noise)
    )
    assert np.isfinite(second).all()
    return (np.abs(first - second).max(-1) > 1e-4).tolist()

  assert changed(0.9, 0.3, 0.3) == [True, True, False, False, False, False]
  assert changed(0.3, 2.0, 0.3) == [False, False, True, True, True, False]
  assert changed(0.3, 0.3, 9.0) == [False] * 6


def test_adaln_modulations_are_initialized_to_zero_and_the_noise_embedding_is_not():
  params = transformer.unbox(jax.jit(transformer.init, static_argnums=0)(CONDITIONED, jax.random.key(0)))
  for modulation in (params['block_0']['modulation'], params['block_1']['modulation'], params['final_modulation']):
    assert not any(leaf.any() for leaf in jax.tree.leaves(modulation))
  assert all(leaf.any() for leaf in jax.tree.leaves(params['noise']))


def test_a_noise_conditioned_model_without_a_noise_level_raises_an_error():
  one = np.ones((1, 2), int)
  with pytest.raises(ValueError, match='needs noise_BxS'):
    transformer.apply(CONDITIONED, random_params(CONDITIONED), one, one, one, one[:, :1])


@pytest.mark.parametrize('compute', ['float32', 'bfloat16'])
def test_the_open_gap_embedding_is_equivalent_to_separate_token_embeddings_for_open_and_closed_gaps(compute):
  cfg = dataclasses.replace(TINY, open_gap_embedding=True, compute=compute)
  params = random_params(cfg)
  assert params['open'].shape == (2, 16)
  rng = np.random.default_rng(0)
  tokens, open_ = rng.integers(1, 40, (2, 7)), rng.random((2, 7)) < 0.5
  position, one = np.arange(7)[None].repeat(2, axis=0), np.ones((2, 7), int)
  args = position, one, one[:, :1] * 0
  found = apply(cfg, params, tokens, *args, None, open_)
  plain_params = {name: array for name, array in params.items() if name != 'open'} | {
    'embed': np.concatenate([params['embed'] + params['open'][bit] for bit in (0, 1)]),
    'unembed': np.tile(params['unembed'], (2, 1)),
  }
  plain = dataclasses.replace(cfg, open_gap_embedding=False, vocab_size=80)
  expected = apply(plain, plain_params, tokens + 40 * open_, *args)
  tolerance = 1e-5 if compute == 'float32' else 0.1
  np.testing.assert_allclose(found.hidden_BxLxD, expected.hidden_BxLxD, rtol=tolerance, atol=tolerance)
  np.testing.assert_allclose(found.stop_BxSx2, expected.stop_BxSx2, rtol=tolerance, atol=tolerance)
  assert np.abs(apply(cfg, params, tokens, *args, None, ~open_).stop_BxSx2 - found.stop_BxSx2).max() > 0.01
  with pytest.raises(ValueError, match='needs open_BxL'):
    apply(cfg, params, tokens, *args)


def test_the_stop_head_reads_features_before_the_final_norm():
  params, tokens = random_params(TINY), np.array([TOKENS])
  one = np.ones_like(tokens)
  args = tokens, np.cumsum(one)[None], one, one[:, :1]
  first, second = (apply(dataclasses.replace(TINY, final_norm=norm), params, *args) for norm in (True, False))
  assert_close(first.stop_BxSx2, second.stop_BxSx2)
  assert np.abs(first.hidden_BxLxD - second.hidden_BxLxD).max() > 0.1


# --- rematerialization and scan over the layers -----------------------------------------------------------------------


def scalar_of(cfg, rng):
  """Return a function from the parameters to a scalar that depends on all outputs for a small input."""
  tokens, ones = jnp.arange(1, 13).reshape(2, 6), jnp.ones((2, 6), jnp.int32)
  args = tokens, jnp.broadcast_to(jnp.arange(6), (2, 6)), ones, ones[:, :1], jnp.full((2, 1), 0.3)

  def total(params):
    outputs = transformer.apply(cfg, params, *args, rng=rng)
    return jnp.square(outputs.hidden_BxLxD).sum() + (outputs.stop_BxSx2.sum() if cfg.stop_head else 0.0)

  return total


def value_and_grads(cfg, params, rng):
  """Return the value and gradients of `scalar_of`, and the number of lines of its StableHLO program."""
  lowered = jax.jit(jax.value_and_grad(scalar_of(cfg, rng))).lower(params)
  return lowered.compile()(params), len(lowered.as_text().splitlines())


def assert_same(found, expected):
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), found, expected)


DEEP = dataclasses.replace(TINY, num_layers=3, dropout=0.1)
REMAT = dataclasses.replace(DEEP, remat=True)


def test_remat_and_scan_with_dropout_do_not_change_the_gradients():
  params, rng = random_params(DEEP), jax.random.key(1)
  expected, _ = value_and_grads(DEEP, params, rng)
  remat, unrolled_lines = value_and_grads(REMAT, params, rng)
  scan, scan_lines = value_and_grads(dataclasses.replace(REMAT, scan_layers=True), params, rng)
  assert_same(remat, expected)
  assert_same(scan, expected)
  assert scan_lines < 0.7 * unrolled_lines, 'scan over the layers must give a shorter program'


def test_scan_over_layers_gives_the_same_gradients_with_conditioning_and_no_dropout():
  params = random_params(CONDITIONED)
  (plain, _), (scan, _) = (
    value_and_grads(dataclasses.replace(CONDITIONED, scan_layers=scan), params, None) for scan in (False, True)
  )
  assert_same(scan, plain)


@pytest.mark.parametrize(('scan', 'fraction'), [(False, 0.5), (True, 0.7)])
def test_remat_saves_fewer_arrays_for_the_backward_pass(scan, fraction, capsys):
  saved = []
  for cfg in (REMAT, DEEP):
    total = scalar_of(dataclasses.replace(cfg, scan_layers=scan), jax.random.key(1))
    print_saved_residuals(total, random_params(cfg))
    saved.append(len(capsys.readouterr().out.splitlines()))  # one line per saved array, parameters included
  assert saved[0] < fraction * saved[1]


# --- dropout keys and initialization ----------------------------------------------------------------------------------


def test_every_dropout_layer_has_its_own_key(monkeypatch):
  cfg = dataclasses.replace(TINY, dropout=0.2, attention_dropout=0.3)
  one, rates = np.ones((1, 4), int), []

  @jax.jit
  def dropout_keys(params, rng):
    keys = []

    def record(x, rate, rng):
      rates.append(rate)
      keys.append(jax.random.key_data(rng))
      return x

    monkeypatch.setattr(numerics, 'dropout', record)
    transformer.apply(cfg, params, one, one, one, one[:, :1], rng=rng)
    return keys

  keys = dropout_keys(random_params(cfg), jax.random.key(0))
  # Rates of attention weights, attention output and MLP in each of the two blocks, then of the stop head.
  assert rates == [0.3, 0.2, 0.2] * 2 + [0.2]
  assert len({tuple(key.tolist()) for key in keys}) == len(keys), 'two dropout layers have the same RNG key'


def test_initial_parameters_have_the_documented_scale():
  cfg, rng = dataclasses.replace(TINY, d_model=48, d_ff=96), jax.random.key(0, impl='rbg')
  params = transformer.unbox(jax.jit(transformer.init, static_argnums=0)(cfg, rng))
  params = jax.tree.map(np.asarray, params)
  assert not params['embed'][0].any(), 'the embedding of padding must be zero'
  assert params['embed'][1:].std() == pytest.approx(0.02, rel=0.1)
  reference_cfg = dataclasses.replace(cfg, init='reference')
  embed_VxD = jax.jit(lambda rng: transformer.unbox(transformer.init(reference_cfg, rng))['embed'])(rng)
  assert not embed_VxD[0].any() and embed_VxD[1:].std() == pytest.approx(1.0, rel=0.1)
  blocks = [params['block_0'], params['block_1']]
  for name, fan_in in [('query', 48), ('key', 48), ('value', 48), ('out', 48), ('mlp_in', 48), ('mlp_out', 96)]:
    for leaf in blocks[0][name].values():
      assert 0.8 < np.abs(leaf).max() * fan_in**0.5 <= 1.0001, name
    assert (blocks[0][name]['kernel'] != blocks[1][name]['kernel']).all(), f'{name}: both blocks have equal weights'
  for name, fan_in in [('mlp_in', 48), ('mlp_out', 96), ('logits', 48)]:
    assert 0.8 < np.abs(params['stop'][name]['kernel']).max() * fan_in**0.5 <= 1.0001, name
  assert 0.8 < np.abs(params['unembed']).max() * 48**0.5 <= 1.0001
  assert (params['final_norm']['scale'] == 1).all() and (params['final_norm']['bias'] == 0).all()
