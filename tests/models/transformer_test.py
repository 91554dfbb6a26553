"""The transformer against the reference numbers, and what must hold for any weights."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta
from jax.ad_checkpoint import print_saved_residuals
from ml_collections import ConfigDict

from ilm_jax.families import ilm, mdm
from ilm_jax.models import numerics, reference, transformer
from ilm_jax.types import UserError

CHUNKS = [4096, 16]  # one chunk; three, the last one padded (the vocabulary has 40 entries)


def assert_close(actual, expected, tolerance=1e-5, name=''):
  """Largest difference over largest reference value, as the reference numbers ask."""
  actual, expected = np.asarray(actual), np.asarray(expected)
  assert actual.shape == expected.shape, f'{name}: {actual.shape}, the reference has {expected.shape}'
  error = np.abs(actual - expected).max() / np.abs(expected).max()
  assert error < tolerance, f'{name}: relative error {error:.2e}, allowed {tolerance:.0e}'


def assert_gradients_close(cfg, grads, numbers):
  ours = reference.to_reference(cfg, grads)
  theirs = {name.removeprefix('grad/'): array for name, array in numbers.items() if name.startswith('grad/')}
  assert set(theirs) == {name for name in ours if not name.endswith(('inv_freq', 'freqs'))}
  for name, array in theirs.items():
    assert_close(ours[name], array, name=name)


def shapes_of(cfg):
  return meta.unbox(jax.eval_shape(lambda: transformer.init(cfg, jax.random.key(0))))


apply = jax.jit(transformer.apply, static_argnums=0)


def load_weights(numbers, family):
  return reference.from_reference({k[6:]: v for k, v in numbers.items() if k.startswith('param/')}, family)


# --- the reference numbers: insertion model ---------------------------------------------------------------------------


@pytest.fixture(scope='module')
def insertion(golden):
  """(numbers, cfg, params) of the reference's insertion model."""
  numbers = golden('ilm')
  return numbers, *load_weights(numbers, 'ilm')


def batch_of(numbers):
  """The reference's inputs as a batch with one example a row."""
  used = numbers['gap_index'] >= 0
  mask = numbers['attention_mask']
  rows, length = mask.shape
  return {
    'tokens_BxL': numbers['input_ids'],
    'position_BxL': numbers['positions'],
    'segment_BxL': mask.astype(int),
    'open_BxL': mask & (np.arange(length) > 0),
    'target_gap_BxT': np.where(used, numbers['gap_index'], 0),
    'target_token_BxT': np.where(used, numbers['gap_token'], 0),
    'target_segment_BxT': used.astype(int),
    'cls_BxS': np.zeros((rows, 1), int),
    'segment_weight_BxS': np.ones((rows, 1), np.float32),
    'free_BxS': np.ones((rows, 1), int),
    'example_id_BxS': np.arange(rows)[:, None],
  }


def packed_batch_of(numbers):
  """All examples of the reference, without their padding, in one row of 48 with two unused segments."""
  length, targets, segments = 48, 48, 8
  batch = {
    **{f'{name}_BxL': np.zeros((1, length), int) for name in ('tokens', 'position', 'segment')},
    'open_BxL': np.zeros((1, length), bool),
    **{f'target_{name}_BxT': np.zeros((1, targets), int) for name in ('gap', 'token', 'segment')},
    'cls_BxS': np.zeros((1, segments), int),
    'segment_weight_BxS': np.zeros((1, segments), np.float32),
    'free_BxS': np.zeros((1, segments), int),
  }
  start = target = 0
  for row, mask in enumerate(numbers['attention_mask']):
    batch['cls_BxS'][0, row], batch['segment_weight_BxS'][0, row] = start, 1
    for gap, token in zip(numbers['gap_index'][row], numbers['gap_token'][row], strict=True):
      if gap >= 0:
        batch['target_gap_BxT'][0, target] = start + gap
        batch['target_token_BxT'][0, target] = token
        batch['target_segment_BxT'][0, target] = row + 1
        target += 1
    for i in range(mask.sum()):
      batch['tokens_BxL'][0, start] = numbers['input_ids'][row, i]
      batch['position_BxL'][0, start] = i
      batch['segment_BxL'][0, start] = row + 1
      batch['open_BxL'][0, start] = i > 0
      start += 1
  assert start < length and target < targets
  return batch


def outputs_of(cfg, params, batch, rng=None):
  names = ('tokens_BxL', 'position_BxL', 'segment_BxL', 'cls_BxS')
  return apply(cfg, params, *(batch[name] for name in names), rng=rng)


def logits_of(outputs):
  return np.asarray(outputs.hidden_BxLxD, np.float32) @ np.asarray(outputs.unembed_VxD).T


def test_insertion_logits_are_the_references_also_on_padding(insertion):
  numbers, cfg, params = insertion
  outputs = outputs_of(cfg, params, batch_of(numbers))
  assert_close(logits_of(outputs), numbers['vocab_logits'])
  assert_close(outputs.stop_BxSx2[:, 0], numbers['stop_logits'])


def stored(numbers, batch):
  """The batch with each row's tokens in the reference's permuted order."""
  perm = numbers['storage_perm']
  names = ('tokens_BxL', 'position_BxL', 'segment_BxL', 'open_BxL')
  moved = {name: np.take_along_axis(batch[name], perm, axis=1) for name in names}
  new_place_BxL = np.argsort(perm, axis=1)
  moved['target_gap_BxT'] = np.take_along_axis(new_place_BxL, batch['target_gap_BxT'], axis=1)
  moved['cls_BxS'] = np.argmax(moved['tokens_BxL'] == 1, axis=1)[:, None]
  return batch | moved


def test_insertion_logits_follow_positions_not_the_order_of_storage(insertion):
  numbers, cfg, params = insertion
  outputs = outputs_of(cfg, params, stored(numbers, batch_of(numbers)))
  assert_close(logits_of(outputs), numbers['storage_vocab_logits'])
  assert_close(outputs.stop_BxSx2[:, 0], numbers['storage_stop_logits'])


@pytest.mark.parametrize('chunk', CHUNKS)
def test_each_examples_losses_are_the_references(insertion, chunk):
  numbers, cfg, params = insertion
  for batch in (batch_of(numbers), stored(numbers, batch_of(numbers))):
    token_BxS, stop_BxS, dropped_BxS = example_losses(outputs_of(cfg, params, batch), batch, chunk=chunk)
    assert_close(token_BxS[:, 0], numbers['example_ce'])
    assert_close(stop_BxS[:, 0], numbers['example_stop_loss'])
    np.testing.assert_array_equal(dropped_BxS[:, 0], numbers['num_dropped'])


def mean_loss(cfg, params, batch, chunk):
  settings = ConfigDict({'stop_weight': 1.0, 'length_weight': 'none', 'compute': cfg.compute, 'vocab_chunk': chunk})
  outputs = outputs_of(cfg, params, batch)
  total, weight = ilm.loss(outputs, batch, settings)['loss']
  return total / weight, outputs


example_losses = jax.jit(ilm.example_losses, static_argnames=('compute', 'chunk'))
loss_and_grads = jax.jit(jax.value_and_grad(mean_loss, argnums=1, has_aux=True), static_argnums=(0, 3))


@pytest.mark.parametrize('chunk', CHUNKS)
def test_the_insertion_loss_and_all_its_gradients_are_the_references(insertion, chunk):
  numbers, cfg, params = insertion
  (loss, _), grads = loss_and_grads(cfg, params, batch_of(numbers), chunk)
  assert_close(loss, numbers['loss'])
  assert_gradients_close(cfg, grads, numbers)


def test_packing_does_not_change_the_loss(insertion):
  numbers, cfg, params = insertion
  batch, rows = packed_batch_of(numbers), len(numbers['input_ids'])
  token_BxS, stop_BxS, dropped_BxS = example_losses(outputs_of(cfg, params, batch), batch, chunk=16)
  assert_close(token_BxS[0, :rows], numbers['example_ce'])
  assert_close(stop_BxS[0, :rows], numbers['example_stop_loss'])
  np.testing.assert_array_equal(dropped_BxS[0], [*numbers['num_dropped'], 0, 0])


def test_packing_does_not_change_the_gradients(insertion):
  numbers, cfg, params = insertion
  (loss, _), grads = loss_and_grads(cfg, params, packed_batch_of(numbers), 16)
  assert_close(loss, numbers['loss'])
  assert_gradients_close(cfg, grads, numbers)


def test_the_loss_reports_its_parts(insertion):
  numbers, cfg, params = insertion
  batch = batch_of(numbers)
  batch['segment_weight_BxS'] = np.asarray([[1.0], [0.0], [2.0], [1.0], [0.0], [0.5]], np.float32)
  settings = ConfigDict({'stop_weight': 0.25, 'length_weight': 'none', 'compute': 'float32', 'vocab_chunk': 16})
  metrics = jax.jit(lambda *args: ilm.loss(*args, settings))(outputs_of(cfg, params, batch), batch)
  token = stop = right = 0.0
  for row, weight in enumerate([1.0, 0.0, 2.0, 1.0, 0.0, 0.5]):
    token += weight * numbers['example_ce'][row]
    stop += weight * numbers['example_stop_loss'][row]
    says_stop = numbers['stop_logits'][row, 0] >= numbers['stop_logits'][row, 1]
    right += weight * (says_stop == (numbers['num_dropped'][row] == 0))
  bound = 2 * (token + stop)  # of strings of one token
  expected = {
    'loss': token + 0.25 * stop,
    'string_bound': bound,
    'token_loss': token,
    'stop_loss': stop,
    'stop_accuracy': right,
  }
  assert {name: float(total) for name, (total, _) in metrics.items()} == pytest.approx(expected, rel=1e-5)
  assert all(float(weight) == 4.5 for _, weight in metrics.values())


# --- the reference numbers: autoregressive model ----------------------------------------------------------------------


@pytest.fixture(scope='module')
def autoregressive(golden):
  """(numbers, cfg, params) of the reference's autoregressive model."""
  numbers = golden('arm')
  return numbers, *load_weights(numbers, 'arm')


def arm_logits(cfg, params, numbers):
  inputs = [numbers[name] for name in ('input_ids', 'positions', 'attention_mask')]
  outputs = apply(cfg, params, *inputs, np.zeros((4, 1), int))
  return outputs.hidden_BxLxD @ outputs.unembed_VxD.T


def test_autoregressive_logits_are_the_references_also_on_padding(autoregressive):
  numbers, cfg, params = autoregressive
  assert cfg.causal and cfg.final_norm and not cfg.stop_head
  assert_close(arm_logits(cfg, params, numbers), numbers['logits'])


def test_the_autoregressive_loss_and_all_its_gradients_are_the_references(autoregressive):
  numbers, cfg, params = autoregressive

  def cross_entropy(params):
    log_prob = jax.nn.log_softmax(arm_logits(cfg, params, numbers))
    row, place = np.nonzero(numbers['target_ids'] != -100)
    return -log_prob[row, place, numbers['target_ids'][row, place]].mean()

  loss, grads = jax.jit(jax.value_and_grad(cross_entropy))(params)
  assert_close(loss, numbers['loss'])
  assert_gradients_close(cfg, grads, numbers)


def test_causality_follows_positions_not_the_order_of_storage(autoregressive):
  numbers, cfg, params = autoregressive
  perm = np.stack([np.random.default_rng(row).permutation(18) for row in range(4)])
  names = ('input_ids', 'positions', 'attention_mask')
  moved = numbers | {name: np.take_along_axis(numbers[name], perm, 1) for name in names}
  expected = np.take_along_axis(numbers['logits'], perm[..., None], 1)
  assert_close(arm_logits(cfg, params, moved), expected)


# --- the reference numbers: masked diffusion model --------------------------------------------------------------------


@pytest.fixture(scope='module')
def diffusion(golden):
  """(numbers, cfg, params) of the reference's masked diffusion model."""
  numbers = golden('mdm')
  return numbers, *load_weights(numbers, 'mdm')


def masked_batch_of(numbers, packed: bool):
  """The reference's inputs as a batch with one example a row, or all in one row with an unused segment."""
  rows, length = numbers['input_ids'].shape
  masked = numbers['input_ids'] != numbers['clean_ids']
  row, place = np.nonzero(masked)
  weight = numbers['noise_rate'] / np.expm1(numbers['total_noise'])
  targets = {'gap': place, 'token': numbers['clean_ids'][row, place], 'segment': row + 1, 'weight': weight[row]}
  batch = {
    'tokens_BxL': numbers['input_ids'].reshape(1, -1),
    'position_BxL': np.tile(np.arange(length), rows)[None],
    'segment_BxL': np.repeat(np.arange(rows) + 1, length)[None],
    'cls_BxS': np.arange(rows + 1)[None] % rows * length,
    'noise_BxS': np.append(numbers['total_noise'], 0)[None],
    'segment_weight_BxS': np.append(np.ones(rows), 0)[None],
  }
  if packed:
    targets['gap'] = row * length + place
    return batch | {f'target_{name}_BxT': value[None] for name, value in targets.items()}
  batch = {name: value[:, : rows * length].reshape(rows, length) for name, value in batch.items() if 'L' in name}
  one = np.ones((rows, 1))
  batch |= {'segment_BxL': batch['segment_BxL'] * 0 + 1, 'cls_BxS': one.astype(int) * 0}
  batch |= {'noise_BxS': numbers['total_noise'][:, None], 'segment_weight_BxS': one}
  targets['segment'] = np.ones_like(row)
  for name, value in targets.items():  # a list for each row, filled up with zeros
    batch[f'target_{name}_BxT'] = np.stack([np.pad(value[row == i], (0, (row != i).sum())) for i in range(rows)])
  return batch


def mdm_loss(cfg, params, batch):
  settings = ConfigDict({'mdm': 'mean_masked', 'compute': cfg.compute, 'vocab_chunk': 16})
  outputs = transformer.apply_batch(cfg, params, batch)
  total, weight = mdm.loss(outputs, batch, settings)['loss']
  return total / weight, logits_of_jax(outputs)


def logits_of_jax(outputs):
  return outputs.hidden_BxLxD @ outputs.unembed_VxD.T


mdm_loss_and_grads = jax.jit(jax.value_and_grad(mdm_loss, argnums=1, has_aux=True), static_argnums=0)


@pytest.mark.parametrize('packed', [False, True])
def test_the_diffusion_logits_loss_and_all_its_gradients_are_the_references(diffusion, packed):
  numbers, cfg, params = diffusion
  (loss, logits), grads = mdm_loss_and_grads(cfg, params, masked_batch_of(numbers, packed))
  assert_close(logits.reshape(numbers['logits'].shape), numbers['logits'])
  assert_close(loss, numbers['loss'])
  assert_gradients_close(cfg, grads, numbers)


def test_without_the_references_residual_shut_gates_leave_the_input_as_it_is(diffusion):
  numbers, cfg, params = diffusion
  batch = masked_batch_of(numbers, packed=False)
  proper = dataclasses.replace(cfg, residual='input')
  assert np.abs(mdm_loss(proper, params, batch)[1] - numbers['logits']).max() > 0.1
  blocks = ('block_0', 'block_1')
  shut = {
    name: params[name] | {'modulation': jax.tree.map(np.zeros_like, params[name]['modulation'])} for name in blocks
  }
  outputs = transformer.apply_batch(dataclasses.replace(proper, final_norm=False), params | shut, batch)
  np.testing.assert_array_equal(outputs.hidden_BxLxD, params['embed'][batch['tokens_BxL']])


CONDITIONED = transformer.ModelConfig(
  vocab_size=40, num_layers=2, num_heads=2, d_model=16, d_ff=24, stop_head=False, conditioning='adaln', d_cond=6
)


def test_a_segment_is_told_its_own_noise_level_and_padding_none():
  params, one = weights(CONDITIONED), np.ones((1, 6), int)
  segment = np.array([[1, 1, 2, 2, 2, 0]])
  args = one * [[7, 8, 7, 8, 9, 0]], np.array([[0, 1, 0, 1, 2, 0]]), segment, np.array([[0, 2, 0]])

  def changed(*noise):
    first, second = (
      apply(CONDITIONED, params, *args, np.array([levels])).hidden_BxLxD[0] for levels in ((0.3, 0.3, 0.3), noise)
    )
    assert np.isfinite(second).all()
    return (np.abs(first - second).max(-1) > 1e-4).tolist()

  assert changed(0.9, 0.3, 0.3) == [True, True, False, False, False, False]
  assert changed(0.3, 2.0, 0.3) == [False, False, True, True, True, False]
  assert changed(0.3, 0.3, 9.0) == [False] * 6


def test_fresh_modulations_are_zero_so_that_the_noise_level_does_not_matter_yet():
  params = meta.unbox(jax.jit(transformer.init, static_argnums=0)(CONDITIONED, jax.random.key(0)))
  for name in ('block_0', 'block_1', None):
    modulation = params[name]['modulation'] if name else params['final_modulation']
    assert not any(leaf.any() for leaf in jax.tree.leaves(modulation))
  assert all(leaf.any() for leaf in jax.tree.leaves(params['noise']))
  tokens = np.array([TOKENS])
  one = np.ones_like(tokens)
  first, second = (
    apply(CONDITIONED, params, tokens, one, one, one[:, :1], np.array([[level]])).hidden_BxLxD for level in (0.1, 4.0)
  )
  np.testing.assert_array_equal(first, second)


def test_a_model_that_must_be_told_a_noise_level_says_so():
  one = np.ones((1, 2), int)
  with pytest.raises(ValueError, match='needs noise_BxS'):
    transformer.apply(CONDITIONED, weights(CONDITIONED), one, one, one, one[:, :1])


@pytest.mark.parametrize('loop', [False, True])
def test_remat_remembers_less_and_changes_no_gradient(loop, capsys):
  sizes = dict(vocab_size=20, num_layers=2, num_heads=2, d_model=16, d_ff=32, dropout=0.1)
  cfg = transformer.ModelConfig(**sizes, scan_layers=loop)
  params, (tokens, ones) = weights(cfg), (jnp.arange(1, 13).reshape(2, 6), jnp.ones((2, 6), jnp.int32))
  position = jnp.broadcast_to(jnp.arange(6), (2, 6))

  def total(params, cfg):
    outputs = transformer.apply(cfg, params, tokens, position, ones, ones[:, :1], rng=jax.random.key(1))
    return jnp.square(outputs.hidden_BxLxD).sum() + outputs.stop_BxSx2.sum()

  found = {}
  for remat in (False, True):
    of_params = functools.partial(total, cfg=dataclasses.replace(cfg, remat=remat))
    print_saved_residuals(of_params, params)
    found[remat] = jax.jit(jax.grad(of_params))(params), len(capsys.readouterr().out.splitlines())
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), found[True][0], found[False][0])
  assert found[True][1] < found[False][1] * (0.7 if loop else 0.5)  # arrays, parameters included


@pytest.mark.parametrize('remat', [False, True])
@pytest.mark.parametrize('name', ['plain', 'told a noise level'])
def test_a_loop_over_the_layers_gives_the_same_numbers_from_a_shorter_program(name, remat):
  sizes = dict(vocab_size=20, num_layers=4, num_heads=2, d_model=16, d_ff=32, dropout=0.1, remat=remat)
  told = {} if name == 'plain' else dict(conditioning='adaln', d_cond=6, stop_head=False)
  cfg = transformer.ModelConfig(**sizes, **told)
  params, (tokens, ones) = weights(cfg), (jnp.arange(1, 13).reshape(2, 6), jnp.ones((2, 6), jnp.int32))
  args = tokens, jnp.broadcast_to(jnp.arange(6), (2, 6)), ones, ones[:, :1], jnp.full((2, 1), 0.3)

  def total(params, cfg, rng):
    outputs = transformer.apply(cfg, params, *args, rng=rng)
    return jnp.square(outputs.hidden_BxLxD).sum() + (0.0 if told else outputs.stop_BxSx2.sum())

  loop, lines = dataclasses.replace(cfg, scan_layers=True), []
  for rng in (None, jax.random.key(1)):  # with dropout, of the same entries
    found = []
    for way in (cfg, loop):
      made = jax.jit(jax.value_and_grad(functools.partial(total, cfg=way, rng=rng))).lower(params).compile()
      found.append(made(params))
      lines.append(len(made.as_text().splitlines()))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), *found)
  assert lines[1] < 0.7 * lines[0] and lines[3] < 0.7 * lines[2]


def test_without_conditioning_a_noise_level_is_passed_over():
  params, one = weights(TINY), np.ones((1, 4), int)
  args = one * 7, one, one, one[:, :1]
  expected = apply(TINY, params, *args).hidden_BxLxD
  np.testing.assert_array_equal(apply(TINY, params, *args, np.ones((1, 1))).hidden_BxLxD, expected)


@pytest.mark.parametrize('compute', ['float32', 'bfloat16'])
def test_being_told_of_open_gaps_is_to_have_two_embeddings_of_each_token(compute):
  told = dataclasses.replace(TINY, open_gap_embedding=True, compute=compute)
  params = weights(told)
  assert params['open'].shape == (2, 16)
  rng = np.random.default_rng(0)
  tokens, open_ = rng.integers(1, 40, (2, 7)), rng.random((2, 7)) < 0.5
  place, one = np.arange(7)[None].repeat(2, axis=0), np.ones((2, 7), int)
  args = place, one, one[:, :1] * 0
  found = apply(told, params, tokens, *args, None, open_)
  rest = {name: array for name, array in params.items() if name != 'open'}
  twice = np.concatenate([params['embed'] + params['open'][bit] for bit in (0, 1)])
  plain = dataclasses.replace(told, open_gap_embedding=False, vocab_size=80)
  rest |= {'embed': twice, 'unembed': np.tile(params['unembed'], (2, 1))}
  expected = apply(plain, rest, tokens + 40 * open_, *args)
  tolerance = 1e-5 if compute == 'float32' else 0.1
  np.testing.assert_allclose(found.hidden_BxLxD, expected.hidden_BxLxD, rtol=tolerance, atol=tolerance)
  np.testing.assert_allclose(found.stop_BxSx2, expected.stop_BxSx2, rtol=tolerance, atol=tolerance)
  assert np.abs(np.subtract(apply(told, params, tokens, *args, None, ~open_).stop_BxSx2, found.stop_BxSx2)).max() > 0.01
  with pytest.raises(ValueError, match='needs open_BxL'):
    apply(told, params, tokens, *args)


# --- who sees whom ----------------------------------------------------------------------------------------------------

TINY = transformer.ModelConfig(vocab_size=40, num_layers=2, num_heads=2, d_model=16, d_ff=24)


def weights(cfg):
  """Parameters large enough for everything to matter, the embedding of padding included."""
  random = np.random.default_rng(0)
  return jax.tree.map(lambda x: random.normal(0, 0.3, x.shape).astype(np.float32), shapes_of(cfg))


def influence(cfg, tokens, position, segment, cls=(0,)):
  """Whether the features at i depend on the token at j (LxL), and the stop logits of s on it (SxL), by a gradient."""
  tokens, position, segment, cls = (np.array([list(values)]) for values in (tokens, position, segment, cls))
  assert len(set(tokens[0])) == tokens.size, 'a token must be at one position'
  params = weights(cfg)
  direction_D = jnp.arange(1.0, cfg.d_model + 1)  # their plain sum would be constant after a LayerNorm

  def read(embed):
    outputs = transformer.apply(cfg, params | {'embed': embed}, tokens, position, segment, cls)
    stop_S = outputs.stop_BxSx2[0, :, 0] if cfg.stop_head else jnp.zeros(0)
    return outputs.hidden_BxLxD[0] @ direction_D, stop_S

  jacobians = jax.jit(jax.jacrev(read))(params['embed'])
  return [np.abs(np.asarray(x_IxVxD)).max(-1)[:, tokens[0]] > 0 for x_IxVxD in jacobians]


TOKENS = [11, 12, 13, 14, 15, 16, 17, 18]


def test_every_token_sees_every_other_without_causality():
  features, stop = influence(TINY, TOKENS, range(8), [1] * 8)
  assert features.all() and stop.all()


def test_a_causal_token_sees_itself_and_what_precedes_it():
  features, _ = influence(dataclasses.replace(TINY, causal=True, stop_head=False), TOKENS, range(8), [1] * 8)
  assert features.tolist() == [[j <= i for j in range(8)] for i in range(8)]


@pytest.mark.parametrize('causal', [False, True])
def test_segments_do_not_see_each_other_nor_padding(causal):
  cfg = dataclasses.replace(TINY, causal=causal)
  segment, position = [1, 1, 1, 2, 2, 3, 0, 0], [0, 1, 2, 0, 1, 0, 0, 0]
  features, stop = influence(cfg, TOKENS, position, segment, cls=(0, 3, 5))
  for i in range(6):
    for j in range(8):
      sees = segment[i] == segment[j] and (j <= i or not causal)
      assert features[i, j] == sees, f'position {i} must {"" if sees else "not "}see position {j}'
  for s, cls in enumerate((0, 3, 5)):
    sees = [segment[j] == s + 1 and (j <= cls or not causal) for j in range(8)]
    assert stop[s].tolist() == sees, f'the stop head of segment {s + 1} reads {stop[s]}'


def test_padding_is_finite_even_in_an_empty_row():
  zeros = np.zeros((2, 4), int)
  outputs = apply(TINY, weights(TINY), zeros, zeros, zeros, zeros[:, :1])
  assert np.isfinite(outputs.hidden_BxLxD).all() and np.isfinite(outputs.stop_BxSx2).all()


def test_padding_does_not_matter(insertion):
  numbers, cfg, params = insertion
  batch = batch_of(numbers)
  pad_BxL = batch['segment_BxL'] == 0
  other = batch | {'tokens_BxL': np.where(pad_BxL, 17, batch['tokens_BxL'])}
  longer = dict(batch)
  for name, value in [('tokens', 9), ('position', 3), ('segment', 0), ('open', False)]:
    longer[f'{name}_BxL'] = np.pad(batch[f'{name}_BxL'], ((0, 0), (0, 5)), constant_values=value)
  for changed in (other, longer):
    outputs = outputs_of(cfg, params, changed)
    losses = example_losses(outputs, changed)
    real = logits_of(outputs)[:, :12][~pad_BxL]
    assert_close(real, numbers['vocab_logits'][~pad_BxL])
    assert_close(losses[0][:, 0], numbers['example_ce'])
    assert_close(losses[1][:, 0], numbers['example_stop_loss'])


@pytest.mark.parametrize('rotary_dim', [64, 4])  # all 8 channels of a head, half of them
def test_only_the_differences_of_positions_matter(rotary_dim):
  cfg = dataclasses.replace(TINY, rotary_dim=rotary_dim)
  params, tokens, position = weights(cfg), np.array([TOKENS]), np.arange(8)[None]
  one = np.ones_like(tokens)

  def features(position):
    return apply(cfg, params, tokens, position, one, one[:, :1]).hidden_BxLxD

  assert_close(features(position + 100), features(position), 1e-4)
  assert np.abs(features(position * 2) - features(position)).max() > 1e-2, 'positions change nothing at all'


# --- compute types ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(('compute', 'tolerance'), [('mixed', 0.02), ('bfloat16', 0.05)])
def test_cheaper_products_stay_close_to_float32(insertion, compute, tolerance):
  numbers, cfg, params = insertion
  cfg = dataclasses.replace(cfg, compute=compute)
  (loss, outputs), grads = loss_and_grads(cfg, params, batch_of(numbers), 16)
  assert outputs.hidden_BxLxD.dtype == (jnp.float32 if compute == 'mixed' else jnp.bfloat16)
  assert outputs.stop_BxSx2.dtype == jnp.float32
  assert_close(logits_of(outputs), numbers['vocab_logits'], tolerance)
  error = np.abs(logits_of(outputs) - numbers['vocab_logits']).max()
  assert error > 1e-4, 'this was computed in float32'

  assert_close(loss, numbers['loss'], tolerance / 2)
  for name, array in reference.to_reference(cfg, grads).items():
    if f'grad/{name}' in numbers:
      difference = np.linalg.norm(array - numbers[f'grad/{name}']) / np.linalg.norm(numbers[f'grad/{name}'])
      assert difference < 0.2, f'{name}: {difference:.3f}'  # mostly by the ReLUs that rounding switches


# --- dropout ----------------------------------------------------------------------------------------------------------


def test_dropout_is_off_without_a_key(insertion):
  numbers, cfg, params = insertion
  none = dataclasses.replace(cfg, dropout=0.0, attention_dropout=0.0)
  assert cfg.dropout == cfg.attention_dropout == 0.1
  expected = logits_of(outputs_of(cfg, params, batch_of(numbers)))
  np.testing.assert_array_equal(logits_of(outputs_of(none, params, batch_of(numbers))), expected)
  np.testing.assert_array_equal(logits_of(outputs_of(none, params, batch_of(numbers), jax.random.key(0))), expected)


@pytest.mark.parametrize('rates', [(0.1, 0.0), (0.0, 0.1)], ids=['residual', 'attention'])
def test_dropout_follows_its_key(insertion, rates):
  numbers, cfg, params = insertion
  cfg = dataclasses.replace(cfg, dropout=rates[0], attention_dropout=rates[1])
  first, again, second = (
    logits_of(outputs_of(cfg, params, batch_of(numbers), jax.random.key(seed))) for seed in (0, 0, 1)
  )
  np.testing.assert_array_equal(first, again)
  for other in (second, numbers['vocab_logits']):
    assert np.abs(first - other).max() > 1e-2


def test_every_place_of_dropout_has_its_own_key(monkeypatch):
  cfg = dataclasses.replace(TINY, dropout=0.2, attention_dropout=0.3)
  one, rates = np.ones((1, 4), int), []

  @jax.jit
  def keys_of_dropout(params, rng):
    keys = []

    def noted(x, rate, rng):
      rates.append(rate)
      keys.append(jax.random.key_data(rng))
      return x

    monkeypatch.setattr(numerics, 'dropout', noted)
    transformer.apply(cfg, params, one, one, one, one[:, :1], rng=rng)
    return keys

  keys = keys_of_dropout(weights(cfg), jax.random.key(0))
  assert rates == [0.3, 0.2, 0.2] * 2 + [0.2]  # attention, its output, mlp; and the stop head
  assert len({tuple(key.tolist()) for key in keys}) == len(keys), 'two places drop the same entries'


def test_dropout_keeps_the_mean_and_the_rate():
  n = 10**6
  x = np.asarray(numerics.dropout(jnp.ones((1000, 1000)), 0.1, jax.random.key(2)))
  assert set(np.unique(x)) == {np.float32(0), np.float32(1 / 0.9)}
  assert abs((x > 0).mean() - 0.9) < 5 * (0.9 * 0.1 / n) ** 0.5
  assert abs(x.mean() - 1) < 5 * (0.1 / 0.9 / n) ** 0.5


def test_all_bits_of_the_hash_are_even_and_uncorrelated_with_their_neighbours():
  first, second, third = (
    np.asarray(numerics.hash_bits(jax.random.wrap_key_data(jnp.asarray(words, jnp.uint32)), (8, 50, 500)))
    for words in [(0, 0), (0, 1), (1, 0)]
  )
  pairs = {
    'axis 0': (first[1:], first[:-1]),
    'axis 1': (first[:, 1:], first[:, :-1]),
    'axis 2': (first[..., 1:], first[..., :-1]),
    'two apart': (first[..., 2:], first[..., :-2]),
    'first word of the key': (first, third),
    'second word of the key': (first, second),
  }
  for bit in range(32):
    ones = (first >> bit & 1).mean()
    assert abs(ones - 0.5) < 5 * 0.5 / first.size**0.5, f'bit {bit} is 1 with frequency {ones}'
    for name, (left, right) in pairs.items():
      same = ((left ^ right) >> bit & 1).mean()
      assert abs(same - 0.5) < 5 * 0.5 / left.size**0.5, f'bit {bit}, {name}: differs with frequency {same}'


# --- sizes and settings -----------------------------------------------------------------------------------------------


# SPEC A.5, in millions: of a block, of all blocks, of the stop head.
@pytest.mark.parametrize(
  ('preset', 'layers', 'head_dim', 'block', 'blocks', 'stop'),
  [
    ('small', 12, 64, 7.085, 85.02, 2.365),
    ('tiny', 6, 128, 7.085, 42.51, 2.365),
    ('tiny2', 8, 72, 5.315, 42.52, 1.331),
    ('xtiny2', 4, 64, 2.364, 9.45, 0.593),
  ],
)
def test_presets_have_the_published_sizes(preset, layers, head_dim, block, blocks, stop):
  cfg = transformer.ModelConfig.create(30_524, preset=preset)
  shapes = shapes_of(cfg)
  sizes = {name: sum(leaf.size for leaf in jax.tree.leaves(tree)) / 1e6 for name, tree in shapes.items()}
  in_blocks = [size for name, size in sizes.items() if name.startswith('block_')]
  assert len(in_blocks) == layers and cfg.head_dim == head_dim
  assert {round(size, 3) for size in in_blocks} == {block}
  assert round(sum(in_blocks), 2) == blocks
  assert round(sizes['stop'], 3) == stop
  assert sizes['embed'] == sizes['unembed'] == 30_524 * cfg.d_model / 1e6
  if preset == 'small':
    assert round(sum(sizes.values()) - sizes['final_norm'], 1) == 134.3


@pytest.mark.parametrize(
  ('preset', 'layers', 'd_model', 'head_dim', 'd_ff', 'd_cond'),
  [('ddit_small', 12, 768, 64, 3072, 128), ('ddit_tiny2', 8, 576, 72, 2304, 128), ('ddit_xtiny', 4, 384, 64, 1536, 96)],
)
def test_presets_of_diffusion_models_have_the_published_shapes(preset, layers, d_model, head_dim, d_ff, d_cond):
  cfg = transformer.ModelConfig.create(100, preset=preset, conditioning='adaln', stop_head=False)
  assert (cfg.num_layers, cfg.d_model, cfg.head_dim, cfg.d_ff, cfg.d_cond) == (layers, d_model, head_dim, d_ff, d_cond)
  if preset == 'ddit_small':
    shapes = shapes_of(cfg)
    block = sum(leaf.size for leaf in jax.tree.leaves(shapes['block_0']))
    assert round(block / 1e6, 2) == 7.68 and round(12 * block / 1e6, 1) == 92.1


@pytest.mark.parametrize(('init', 'std'), [('normal', 0.02), ('reference', 1.0)])
def test_fresh_parameters_have_the_spread_of_their_initialisation(init, std):
  cfg = dataclasses.replace(TINY, d_model=48, d_ff=96, init=init)
  params = meta.unbox(jax.jit(transformer.init, static_argnums=0)(cfg, jax.random.key(0, impl='rbg')))
  params = jax.tree.map(np.asarray, params)
  assert not params['embed'][0].any(), 'the row of padding is zero'
  assert params['embed'][1:].std() == pytest.approx(std, rel=0.1)
  blocks = [params['block_0'], params['block_1']]
  for name, fan_in in [('query', 48), ('key', 48), ('value', 48), ('out', 48), ('mlp_in', 48), ('mlp_out', 96)]:
    for leaf in blocks[0][name].values():
      assert 0.8 < np.abs(leaf).max() * fan_in**0.5 <= 1, name
    assert (blocks[0][name]['kernel'] != blocks[1][name]['kernel']).all(), f'{name}: the layers start alike'
  for name, fan_in in [('mlp_in', 48), ('mlp_out', 96), ('logits', 48)]:
    assert 0.8 < np.abs(params['stop'][name]['kernel']).max() * fan_in**0.5 <= 1, name
  assert 0.8 < np.abs(params['unembed']).max() * 48**0.5 <= 1
  assert (params['final_norm']['scale'] == 1).all() and (params['final_norm']['bias'] == 0).all()


def layer_norm(x, params):
  x = np.asarray(x, np.float64)
  return (x - x.mean()) / np.sqrt(x.var() + 1e-5) * params['scale'] + params['bias']


@pytest.mark.parametrize('rotary_dim', [64, 4])  # all 8 channels of a head, as in small; its first 4, as in tiny
def test_attention_and_its_norm_are_their_formulas(rotary_dim):
  cfg = dataclasses.replace(TINY, num_layers=1, final_norm=False, rotary_dim=rotary_dim)
  params, tokens, positions = weights(cfg), [11, 12, 13], [0, 5, 2]
  block, heads, size = params['block_0'], cfg.num_heads, cfg.head_dim
  for name in ('kernel', 'bias'):
    block['mlp_out'][name][:] = 0  # no mlp
  half = min(rotary_dim, size) // 2

  def turned(vector, position):
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
      pairs = [turned(query[i], positions[i]) @ turned(key[j], positions[j]) for j in range(3)]
      weight = np.exp(np.array(pairs) / np.sqrt(size))
      expected[i] += sum(weight[j] / weight.sum() * value[j] for j in range(3)) @ block['out']['kernel'][h]
  one = np.ones((1, 3), int)
  outputs = apply(cfg, params, np.array([tokens]), np.array([positions]), one, one[:, :1])
  assert_close(outputs.hidden_BxLxD[0], expected)


@pytest.mark.parametrize('activation', ['relu', 'gelu'])
def test_the_mlp_and_its_norm_are_their_formulas(activation):
  cfg = dataclasses.replace(TINY, num_layers=1, activation=activation, final_norm=False)
  params = weights(cfg)
  block = params['block_0']
  block['out']['kernel'][:] = 0  # no attention
  x = params['embed'][7].astype(np.float64)
  inner = layer_norm(x, block['norm2']) @ block['mlp_in']['kernel'] + block['mlp_in']['bias']
  if activation == 'relu':
    inner = np.maximum(inner, 0)
  else:
    inner = inner / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (inner + 0.044715 * inner**3)))
  expected = x + inner @ block['mlp_out']['kernel'] + block['mlp_out']['bias']
  one = np.ones((1, 1), int)
  assert_close(apply(cfg, params, one * 7, one, one, one * 0).hidden_BxLxD[0, 0], expected)


def test_the_stop_head_reads_what_the_final_norm_has_not_touched():
  with_norm, without = TINY, dataclasses.replace(TINY, final_norm=False)
  params, tokens = weights(with_norm), np.array([TOKENS])
  one = np.ones_like(tokens)
  first, second = (apply(cfg, params, tokens, np.cumsum(one)[None], one, one[:, :1]) for cfg in (with_norm, without))
  np.testing.assert_array_equal(first.stop_BxSx2, second.stop_BxSx2)
  assert np.abs(first.hidden_BxLxD - second.hidden_BxLxD).max() > 0.1


def test_a_setting_overrides_the_preset_and_none_leaves_it():
  cfg = transformer.ModelConfig.create(30, preset='small', num_layers=3, d_ff=None, causal=True)
  assert (cfg.vocab_size, cfg.num_layers, cfg.d_ff, cfg.causal) == (30, 3, 3072, True)


@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    ({'preset': 'small', 'n_layers': 3}, "unknown model setting 'n_layers': expected one of activation, "),
    ({'preset': 'big'}, "model.preset='big': expected one of small, tiny, tiny2, xtiny2"),
    ({'preset': 'small', 'num_heads': 7}, 'd_model=768 is not a multiple of model.num_heads=7'),
    ({'preset': 'small', 'd_model': 36}, 'the head dimension 3 is odd'),
    ({'preset': 'small', 'compute': 'fp8'}, "model.compute='fp8': expected one of float32, bfloat16, mixed"),
    ({'preset': 'small', 'conditioning': 'film'}, "model.conditioning='film': expected one of none, adaln"),
    ({'preset': 'small', 'residual': 'modulated'}, "model.residual='modulated' needs model.conditioning='adaln'"),
    ({'preset': 'small', 'd_cond': 0}, 'model.d_cond=0: expected at least 1'),
    ({'preset': 'small', 'activation': 'swish'}, "model.activation='swish': expected one of relu, gelu"),
    ({'num_layers': 2, 'num_heads': 2, 'd_model': 8}, 'model.d_ff is not set: give it, or a model.preset'),
  ],
)
def test_a_wrong_setting_is_refused_in_one_line(settings, message):
  with pytest.raises(UserError) as error:
    transformer.ModelConfig.create(30, **settings)
  assert message in str(error.value) and '\n' not in str(error.value)
