"""Logits, losses and gradients against numbers that the reference implementation computed (tests/golden).

The tolerance is 1e-5 of the largest expected value (`assert_close`).
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from tiny_transformer import apply, assert_close, logits_of

from ilm_jax.evaluation.convert import ilm_batch, mdm_batch
from ilm_jax.families import ilm, mdm
from ilm_jax.models import reference, transformer

CHUNK = 16  # vocabulary entries per chunk; 40 entries need three chunks, of which the last two overlap


def load_golden(numbers, family):
  """Return (golden numbers, ModelConfig, params) of a model of the reference implementation."""
  weights = {name.removeprefix('param/'): array for name, array in numbers.items() if name.startswith('param/')}
  return numbers, *reference.from_reference(weights, family)


def assert_gradients_close(cfg, grads, numbers):
  found = reference.to_reference(cfg, grads)
  expected = {name.removeprefix('grad/'): array for name, array in numbers.items() if name.startswith('grad/')}
  assert set(expected) == {name for name in found if not name.endswith(('inv_freq', 'freqs'))}
  for name, array in expected.items():
    assert_close(found[name], array, name=name)


# --- insertion model --------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def insertion(golden):
  return load_golden(golden('ilm'), 'ilm')


def packed_batch_of(numbers):
  """Pack all examples of the golden numbers into one row of 48 tokens; its last two segments stay empty."""
  mask = numbers['attention_mask']
  row, index = np.nonzero(mask)
  target_row, column = np.nonzero(numbers['gap_index'] >= 0)
  first = np.cumsum(mask.sum(1)) - mask.sum(1)  # packed index of each example's [CLS]

  def pad(values, size=48):
    return np.pad(values, (0, size - len(values)))[None]

  return {
    'tokens_BxL': pad(numbers['input_ids'][row, index]),
    'position_BxL': pad(index),
    'segment_BxL': pad(row + 1),
    'open_BxL': pad(index > 0),
    'target_gap_BxT': pad(first[target_row] + numbers['gap_index'][target_row, column]),
    'target_token_BxT': pad(numbers['gap_token'][target_row, column]),
    'target_segment_BxT': pad(target_row + 1),
    'cls_BxS': pad(first, 8),
    'segment_weight_BxS': pad(np.ones(len(mask), np.float32), 8),
    'free_BxS': np.zeros((1, 8), int),
  }


def permuted_batch_of(numbers, batch):
  """Permute the tokens of each row by `storage_perm`; positions and targets move with the tokens."""
  perm = numbers['storage_perm']
  names = ('tokens_BxL', 'position_BxL', 'segment_BxL', 'open_BxL')
  moved = {name: np.take_along_axis(batch[name], perm, axis=1) for name in names}
  new_index_BxL = np.argsort(perm, axis=1)
  moved['target_gap_BxT'] = np.take_along_axis(new_index_BxL, batch['target_gap_BxT'], axis=1)
  moved['cls_BxS'] = np.argmax(moved['tokens_BxL'] == 1, axis=1)[:, None]
  return batch | moved


def outputs_of(cfg, params, batch, rng=None):
  names = ('tokens_BxL', 'position_BxL', 'segment_BxL', 'cls_BxS')
  return apply(cfg, params, *(batch[name] for name in names), rng=rng)


def mean_loss(cfg, params, batch):
  settings = ConfigDict({'stop_weight': 1.0, 'length_weight': 'none', 'compute': cfg.compute, 'vocab_chunk': CHUNK})
  outputs = outputs_of(cfg, params, batch)
  total, weight = ilm.loss(outputs, batch, settings)['loss']
  return total / weight, outputs


example_losses = jax.jit(ilm.example_losses, static_argnames=('compute', 'chunk'))
loss_and_grads = jax.jit(jax.value_and_grad(mean_loss, argnums=1, has_aux=True), static_argnums=0)


@pytest.mark.parametrize('permuted', [False, True])
def test_ilm_logits_and_losses_depend_on_positions_and_not_on_storage_order(insertion, permuted):
  numbers, cfg, params = insertion
  batch, prefix = (permuted_batch_of(numbers, ilm_batch(numbers)), 'storage_') if permuted else (ilm_batch(numbers), '')
  outputs = outputs_of(cfg, params, batch)
  assert_close(logits_of(outputs), numbers[prefix + 'vocab_logits'])  # compares padding positions too
  assert_close(outputs.stop_BxSx2[:, 0], numbers[prefix + 'stop_logits'])
  token_BxS, stop_BxS, dropped_BxS = example_losses(outputs, batch, chunk=CHUNK)
  assert_close(token_BxS[:, 0], numbers['example_ce'])
  assert_close(stop_BxS[:, 0], numbers['example_stop_loss'])
  np.testing.assert_array_equal(dropped_BxS[:, 0], numbers['num_dropped'])


def test_packing_does_not_change_the_loss_of_any_example(insertion):
  numbers, cfg, params = insertion
  batch, rows = packed_batch_of(numbers), len(numbers['input_ids'])
  token_BxS, stop_BxS, dropped_BxS = example_losses(outputs_of(cfg, params, batch), batch, chunk=CHUNK)
  assert_close(token_BxS[0, :rows], numbers['example_ce'])
  assert_close(stop_BxS[0, :rows], numbers['example_stop_loss'])
  np.testing.assert_array_equal(dropped_BxS[0], [*numbers['num_dropped'], 0, 0])


@pytest.mark.parametrize('make_batch', [ilm_batch, packed_batch_of])
def test_ilm_loss_and_gradients_equal_those_of_the_reference_implementation(insertion, make_batch):
  numbers, cfg, params = insertion
  (loss, _), grads = loss_and_grads(cfg, params, make_batch(numbers))
  assert_close(loss, numbers['loss'])
  assert_gradients_close(cfg, grads, numbers)


def test_ilm_loss_metrics_are_weighted_sums_of_the_example_losses_of_the_reference_code(insertion):
  numbers, cfg, params = insertion
  batch = ilm_batch(numbers)
  batch['segment_weight_BxS'] = np.asarray([[1.0], [0.0], [2.0], [1.0], [0.0], [0.5]], np.float32)
  settings = ConfigDict({'stop_weight': 0.25, 'length_weight': 'none', 'compute': 'float32', 'vocab_chunk': CHUNK})
  metrics = jax.jit(lambda *args: ilm.loss(*args, settings))(outputs_of(cfg, params, batch), batch)
  token = stop = right = 0.0
  for row, weight in enumerate([1.0, 0.0, 2.0, 1.0, 0.0, 0.5]):
    token += weight * numbers['example_ce'][row]
    stop += weight * numbers['example_stop_loss'][row]
    says_stop = numbers['stop_logits'][row, 0] >= numbers['stop_logits'][row, 1]
    right += weight * (says_stop == (numbers['num_dropped'][row] == 0))
  bound = 2 * (token + stop)  # (L + 1) (token + stop) - log L! with L = 1 free token per example
  expected = {
    'loss': token + 0.25 * stop,
    'string_bound': bound,
    'token_loss': token,
    'stop_loss': stop,
    'stop_accuracy': right,
  }
  assert {name: float(total) for name, (total, _) in metrics.items()} == pytest.approx(expected, rel=1e-5)
  assert all(float(weight) == 4.5 for _, weight in metrics.values())


def test_padding_tokens_and_longer_rows_do_not_change_the_ilm_losses(insertion):
  numbers, cfg, params = insertion
  batch = ilm_batch(numbers)
  pad_BxL = batch['segment_BxL'] == 0
  other = batch | {'tokens_BxL': np.where(pad_BxL, 17, batch['tokens_BxL'])}
  longer = dict(batch)
  for name, value in [('tokens', 9), ('position', 3), ('segment', 0), ('open', False)]:
    longer[f'{name}_BxL'] = np.pad(batch[f'{name}_BxL'], ((0, 0), (0, 5)), constant_values=value)
  for changed in (other, longer):
    outputs = outputs_of(cfg, params, changed)
    token_BxS, stop_BxS, _ = example_losses(outputs, changed, chunk=CHUNK)
    assert_close(logits_of(outputs)[:, :12][~pad_BxL], numbers['vocab_logits'][~pad_BxL])
    assert_close(token_BxS[:, 0], numbers['example_ce'])
    assert_close(stop_BxS[:, 0], numbers['example_stop_loss'])


@pytest.mark.parametrize(('compute', 'tolerance'), [('mixed', 0.02), ('bfloat16', 0.05)])
def test_lower_precision_stays_close_to_float32_results_of_the_reference_code(insertion, compute, tolerance):
  numbers, cfg, params = insertion
  cfg = dataclasses.replace(cfg, compute=compute)
  (loss, outputs), grads = loss_and_grads(cfg, params, ilm_batch(numbers))
  assert outputs.hidden_BxLxD.dtype == (jnp.float32 if compute == 'mixed' else jnp.bfloat16)
  assert outputs.stop_BxSx2.dtype == jnp.float32
  assert_close(logits_of(outputs), numbers['vocab_logits'], tolerance)
  error = np.abs(logits_of(outputs) - numbers['vocab_logits']).max()
  assert error > 1e-4, 'the model ignored the compute type and used float32'
  assert_close(loss, numbers['loss'], tolerance / 2)
  for name, array in reference.to_reference(cfg, grads).items():
    if f'grad/{name}' in numbers:
      difference = np.linalg.norm(array - numbers[f'grad/{name}']) / np.linalg.norm(numbers[f'grad/{name}'])
      assert difference < 0.2, f'{name}: {difference:.3f}'  # rounding changes which ReLUs are active


# --- dropout of the insertion model -----------------------------------------------------------------------------------


def test_dropout_is_disabled_without_a_key_or_with_rate_zero(insertion):
  numbers, cfg, params = insertion
  assert cfg.dropout == cfg.attention_dropout == 0.1  # unused in tests that pass no RNG key
  cfg = dataclasses.replace(cfg, dropout=0.0, attention_dropout=0.0)
  assert_close(logits_of(outputs_of(cfg, params, ilm_batch(numbers), jax.random.key(0))), numbers['vocab_logits'])


@pytest.mark.parametrize('rates', [(0.1, 0.0), (0.0, 0.1)], ids=['residual', 'attention'])
def test_dropout_depends_only_on_its_rng_key(insertion, rates):
  numbers, cfg, params = insertion
  cfg = dataclasses.replace(cfg, dropout=rates[0], attention_dropout=rates[1])
  first, again, second = (
    logits_of(outputs_of(cfg, params, ilm_batch(numbers), jax.random.key(seed))) for seed in (0, 0, 1)
  )
  np.testing.assert_array_equal(first, again)
  for other in (second, numbers['vocab_logits']):
    assert np.abs(first - other).max() > 1e-2


# --- autoregressive model ---------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def autoregressive(golden):
  return load_golden(golden('arm'), 'arm')


def arm_logits(cfg, params, numbers):
  inputs = [numbers[name] for name in ('input_ids', 'positions', 'attention_mask')]
  outputs = apply(cfg, params, *inputs, np.zeros((4, 1), int))
  return outputs.hidden_BxLxD @ outputs.unembed_VxD.T


def test_arm_logits_loss_and_gradients_equal_those_of_the_reference_implementation(autoregressive):
  numbers, cfg, params = autoregressive
  assert cfg.causal and cfg.final_norm and not cfg.stop_head

  def cross_entropy(params):
    logits = arm_logits(cfg, params, numbers)
    log_prob = jax.nn.log_softmax(logits)
    row, index = np.nonzero(numbers['target_ids'] != -100)
    return -log_prob[row, index, numbers['target_ids'][row, index]].mean(), logits

  (loss, logits), grads = jax.jit(jax.value_and_grad(cross_entropy, has_aux=True))(params)
  assert_close(logits, numbers['logits'])  # compares padding positions too
  assert_close(loss, numbers['loss'])
  assert_gradients_close(cfg, grads, numbers)


def test_causal_masking_depends_on_positions_and_not_on_storage_order(autoregressive):
  numbers, cfg, params = autoregressive
  perm = np.stack([np.random.default_rng(row).permutation(18) for row in range(4)])
  names = ('input_ids', 'positions', 'attention_mask')
  permuted = numbers | {name: np.take_along_axis(numbers[name], perm, 1) for name in names}
  expected = np.take_along_axis(numbers['logits'], perm[..., None], 1)
  assert_close(arm_logits(cfg, params, permuted), expected)


# --- masked diffusion model -------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def diffusion(golden):
  return load_golden(golden('mdm'), 'mdm')


def packed_mdm_batch(numbers):
  """Return all examples packed into one row, with one unused segment."""
  rows, length = numbers['input_ids'].shape
  row, place = np.nonzero(numbers['input_ids'] != numbers['clean_ids'])
  weight = numbers['noise_rate'] / np.expm1(numbers['total_noise'])
  return {
    'tokens_BxL': numbers['input_ids'].reshape(1, -1),
    'position_BxL': np.tile(np.arange(length), rows)[None],
    'segment_BxL': np.repeat(np.arange(rows) + 1, length)[None],
    'cls_BxS': np.arange(rows + 1)[None] % rows * length,
    'noise_BxS': np.append(numbers['total_noise'], 0)[None],
    'segment_weight_BxS': np.append(np.ones(rows), 0)[None],
    'target_gap_BxT': (row * length + place)[None],
    'target_token_BxT': numbers['clean_ids'][row, place][None],
    'target_segment_BxT': row[None] + 1,
    'target_weight_BxT': weight[row][None],
  }


def mdm_loss(cfg, params, batch):
  settings = ConfigDict({'mdm': 'mean_masked', 'compute': cfg.compute, 'vocab_chunk': CHUNK})
  outputs = transformer.apply_batch(cfg, params, batch)
  total, weight = mdm.loss(outputs, batch, settings)['loss']
  return total / weight, outputs.hidden_BxLxD @ outputs.unembed_VxD.T


@pytest.mark.parametrize('make_batch', [mdm_batch, packed_mdm_batch])
def test_mdm_logits_loss_and_gradients_equal_those_of_the_reference_implementation(diffusion, make_batch):
  numbers, cfg, params = diffusion
  batch = make_batch(numbers)
  value_and_grad = jax.jit(jax.value_and_grad(mdm_loss, argnums=1, has_aux=True), static_argnums=0)
  (loss, logits), grads = value_and_grad(cfg, params, batch)
  assert_close(logits.reshape(numbers['logits'].shape), numbers['logits'])
  assert_close(loss, numbers['loss'])
  assert_gradients_close(cfg, grads, numbers)


def test_mdm_blocks_with_zero_modulation_return_their_input_if_the_setting_residual_is_input(diffusion):
  numbers, cfg, params = diffusion
  batch = mdm_batch(numbers)
  run = jax.jit(transformer.apply_batch, static_argnums=0)
  cfg = dataclasses.replace(cfg, residual='input')
  assert np.abs(logits_of(run(cfg, params, batch)) - numbers['logits']).max() > 0.1, 'cfg.residual has no effect'
  closed = {
    name: params[name] | {'modulation': jax.tree.map(np.zeros_like, params[name]['modulation'])}
    for name in ('block_0', 'block_1')
  }
  outputs = run(dataclasses.replace(cfg, final_norm=False), params | closed, batch)
  np.testing.assert_array_equal(outputs.hidden_BxLxD, params['embed'][batch['tokens_BxL']])
