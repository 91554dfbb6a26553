"""Conversion of weights of the reference implementation to our parameters and back; files; error messages."""

import dataclasses
import io
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_transformer import random_params

from ilm_jax.models import reference, transformer
from ilm_jax.types import UserError


@pytest.fixture(scope='module')
def weights(golden):
  """Return a function from a family to its reference model's state_dict, such as `weights('ilm')`."""

  def load(name):
    return {key.removeprefix('param/'): array for key, array in golden(name).items() if key.startswith('param/')}

  return load


def error_of(function, *args, **kwargs) -> str:
  """Return the one-line message of the UserError that a call raises."""
  with pytest.raises(UserError) as error:
    function(*args, **kwargs)
  assert '\n' not in str(error.value)
  return str(error.value)


def assert_trees_equal(first, second):
  assert jax.tree.structure(first) == jax.tree.structure(second)
  jax.tree.map(np.testing.assert_array_equal, first, second)


# --- conversion in both directions ------------------------------------------------------------------------------------


@pytest.mark.parametrize('family', ['ilm', 'arm', 'mdm'])
def test_weights_of_the_reference_code_are_unchanged_after_conversion_and_back(weights, family):
  state = weights(family)
  back = reference.to_reference(*reference.from_reference(state, family))
  assert set(back) == set(state)
  for name, array in state.items():
    assert back[name].dtype == np.float32
    if name.endswith(('freq', 'freqs')):  # frequency buffers are recomputed, not converted
      np.testing.assert_allclose(back[name], array, rtol=1e-6)
    else:
      np.testing.assert_array_equal(back[name], array, err_msg=name)


def test_model_settings_are_inferred_from_the_weights(weights):
  common = dict(vocab_size=40, num_layers=2, num_heads=3, d_model=48, d_ff=96)
  insertion, _ = reference.from_reference(weights('ilm'))
  assert insertion == transformer.ModelConfig(**common, causal=False, final_norm=False, stop_head=True)
  autoregressive, _ = reference.from_reference(weights('arm'), 'arm')
  assert autoregressive == transformer.ModelConfig(**common, causal=True, final_norm=True, stop_head=False)
  diffusion, _ = reference.from_reference(weights('mdm'), 'mdm')
  conditioning = {'conditioning': 'adaln', 'residual': 'modulated', 'd_cond': 24}
  assert diffusion == transformer.ModelConfig(**common, **conditioning, final_norm=True, stop_head=False)


CFG = transformer.ModelConfig(vocab_size=11, num_layers=3, num_heads=3, d_model=24, d_ff=20)


@pytest.mark.parametrize(
  ('changes', 'heads_needed'),
  [
    ({}, False),
    ({'final_norm': False}, False),
    ({'causal': True, 'stop_head': False}, False),
    ({'stop_head': False, 'conditioning': 'adaln', 'residual': 'modulated', 'd_cond': 5}, False),
    ({'d_model': 64, 'num_heads': 1}, False),  # rotary buffers for 64 channels: only one head is possible
    ({'d_model': 144, 'num_heads': 2}, True),  # rotary buffers for 64 channels: 1 or 2 heads are possible
  ],
  ids=str,
)
def test_our_parameters_are_unchanged_after_conversion_and_back(changes, heads_needed):
  cfg = dataclasses.replace(CFG, **changes)
  params = random_params(cfg)
  state = reference.to_reference(cfg, params)
  family = 'ilm' if cfg.stop_head else 'arm' if cfg.causal else 'mdm'
  if heads_needed:
    assert 'pass one as num_heads' in error_of(reference.from_reference, state, family)
  back_cfg, back = reference.from_reference(state, family, num_heads=cfg.num_heads if heads_needed else None)
  assert back_cfg == cfg
  assert_trees_equal(back, params)


def test_weights_of_converted_linear_layers_have_the_row_order_of_the_reference_code():
  cfg = dataclasses.replace(CFG, num_layers=2)
  params = random_params(cfg)
  state = reference.to_reference(cfg, params)
  y = np.arange(24.0)
  for layer in range(2):
    block, name = params[f'block_{layer}'], f'encoder.{layer}.'
    query, key, value = np.split(state[name + 'attn_qkv.weight'] @ y, 3)
    for theirs, ours in [(query, 'query'), (key, 'key'), (value, 'value')]:
      expected = [[sum(y[d] * block[ours]['kernel'][d, h, k] for d in range(24)) for k in range(8)] for h in range(3)]
      np.testing.assert_allclose(theirs.reshape(3, 8), expected, rtol=1e-4, atol=1e-3)
    mixed = [sum(y[8 * h + k] * block['out']['kernel'][h, k] for h in range(3) for k in range(8))]
    np.testing.assert_allclose([state[name + 'o_proj.weight'] @ y], mixed, rtol=1e-4, atol=1e-3)
    assert state[name + 'mlp.0.weight'].shape == (20, 24) and state[name + 'mlp.2.weight'].shape == (24, 20)


def test_state_dicts_with_name_prefixes_and_training_checkpoints_are_accepted(weights):
  state = weights('ilm')
  expected = reference.from_reference(state)
  prefixed = {f'model.{name}': array for name, array in state.items()}
  for given in (prefixed, {'epoch': 3, 'state_dict': prefixed}, {'state_dict': state}):
    cfg, params = reference.from_reference(given)
    assert cfg == expected[0]
    assert_trees_equal(params, expected[1])


def test_buffers_and_type_embeddings_in_a_state_dict_are_ignored(weights):
  state = weights('ilm')
  expected = reference.from_reference(state)[1]
  extra = {'type_embeddings.weight': np.ones((2, 48)), 'model.type_embeddings.weight': np.zeros(3)}
  extra |= {'inv_freq': np.ones(3), 'model.rotary.inv_freq': np.ones((2, 2))}
  assert_trees_equal(reference.from_reference(state | extra)[1], expected)


def test_weights_of_every_float_dtype_are_converted_to_float32(weights):
  for dtype in (np.float16, jnp.bfloat16, np.float64):
    state = {name: array.astype(dtype) for name, array in weights('ilm').items()}
    cfg, params = reference.from_reference(state)
    assert cfg.num_heads == 3
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    np.testing.assert_array_equal(params['embed'], state['embed_tokens.weight'].astype(np.float32))


def test_converted_parameters_do_not_share_memory_with_the_given_weights(weights):
  state = weights('ilm')
  _, params = reference.from_reference(state)
  params['embed'][:] = 0
  params['block_0']['mlp_in']['bias'][:] = 0
  assert state['embed_tokens.weight'].any() and state['encoder.0.mlp.0.bias'].any()


# --- number of attention heads ----------------------------------------------------------------------------------------


def test_num_heads_is_checked_against_the_rotary_buffers(weights):
  state = weights('ilm')
  assert reference.from_reference(state, num_heads=3)[0].num_heads == 3
  for wrong in (2, 0, -3, 5):
    line = error_of(reference.from_reference, state, num_heads=wrong)
    assert line == f'num_heads={wrong}: expected one of 3 for d_model=48 and 8 rotary frequencies'


def test_num_heads_must_be_given_for_weights_without_rotary_buffers(weights):
  state = {name: array for name, array in weights('ilm').items() if not name.endswith('inv_freq')}
  line = error_of(reference.from_reference, state)
  choices = 'd_model=48 allow 1, 2, 3, 4, 6, 8, 12, 24'  # all numbers of heads that give an even head dimension
  assert line == f'num_heads is ambiguous ({choices}): pass one as num_heads'
  cfg, params = reference.from_reference(state, num_heads=6)
  assert params['block_1']['query']['kernel'].shape == (48, cfg.num_heads, 8)
  assert 'num_heads=5: expected one of 1, 2,' in error_of(reference.from_reference, state, num_heads=5)


def test_the_error_for_an_ambiguous_number_of_heads_lists_the_candidates():
  cfg = dataclasses.replace(CFG, d_model=768, num_heads=12, num_layers=1, d_ff=4)
  state = reference.to_reference(cfg, random_params(cfg))
  line = error_of(reference.from_reference, state)
  choices = 'd_model=768 and 32 rotary frequencies allow 1, 2, 3, 4, 6, 8, 12'
  assert line == f'num_heads is ambiguous ({choices}): pass one as num_heads'
  for heads in (12, 6):
    assert reference.from_reference(state, num_heads=heads)[0].num_heads == heads
  assert 'num_heads=24' in error_of(reference.from_reference, state, num_heads=24)


@pytest.mark.parametrize(
  ('frequencies', 'line'),
  [
    (
      500_000.0 ** -(np.arange(8) / 8),
      'expected the 8 frequencies of rotary embedding with base 10000, got other values',
    ),
    (10_000.0 ** -(np.arange(5) / 5), 'no number of heads fits d_model=48 and 5 rotary frequencies'),
    (10_000.0 ** -(np.arange(64) / 64), 'no number of heads fits d_model=48 and 64 rotary frequencies'),
    (np.zeros(0), 'no number of heads fits d_model=48 and 0 rotary frequencies'),
  ],
)
def test_unexpected_rotary_frequencies_are_rejected(weights, frequencies, line):
  state = weights('ilm')
  changed = {name: frequencies for name in state if name.endswith('inv_freq')}
  assert line in error_of(reference.from_reference, state | changed)
  one_layer = {'encoder.1.rotary_emb.inv_freq': frequencies}
  assert error_of(reference.from_reference, state | one_layer).startswith(
    'encoder.1.rotary_emb.inv_freq: expected the 8'
  )


def test_export_rejects_a_rotary_dim_that_the_reference_code_does_not_support():
  cfg = dataclasses.replace(CFG, rotary_dim=4)
  line = error_of(reference.to_reference, cfg, random_params(cfg))
  assert line == 'model.rotary_dim=4: expected 8, as in the reference implementation'


# --- errors for wrong weights -----------------------------------------------------------------------------------------

QKV = 'encoder.1.attn_qkv.weight'


def dropped(*names):
  return lambda state: {name: array for name, array in state.items() if name not in names}


def replaced(name, value):
  return lambda state: state | {name: value}


@pytest.mark.parametrize(
  ('change', 'line'),
  [
    (dropped(QKV), f'these are not the weights of the ilm transformer: missing {QKV}'),
    (replaced('extra.weight', np.ones(2)), 'the ilm transformer: unexpected extra.weight'),
    (
      lambda state: {name.replace('encoder', 'layers'): array for name, array in state.items()},
      'these are not the weights of the ilm transformer: missing encoder.0.norm1.weight, encoder.0.norm1.bias, '
      'encoder.0.attn_qkv.weight, ... (10 in all); unexpected layers.0.norm1.weight, layers.0.norm1.bias, '
      'layers.0.attn_qkv.weight, ... (20 in all)',
    ),
    (replaced('output_layer.norm_final.weight', np.ones(48)), 'missing output_layer.norm_final.bias'),
    (replaced(QKV, np.ones((48, 144))), f'{QKV}: expected shape (144, 48), got (48, 144)'),
    (replaced('embed_tokens.weight', np.ones(40)), 'embed_tokens.weight: expected a non-empty matrix, got shape (40,)'),
    (replaced('encoder.0.mlp.0.weight', np.ones((0, 48))), 'encoder.0.mlp.0.weight: expected a non-empty matrix'),
    (
      replaced('encoder.0.mlp.0.weight', np.ones((90, 48))),
      'encoder.0.mlp.0.bias: expected shape (90,), got (96,); encoder.0.mlp.2.weight: expected shape (48, 90), got '
      '(48, 96); encoder.1.mlp.0.weight: expected shape (90, 48), got (96, 48); ... (5 in all)',
    ),
    (replaced(QKV, 'text'), f'{QKV}: expected an array of numbers, got str'),
    (replaced(f'model.{QKV}', np.ones(2)), f'{QKV} is given twice, with and without the prefix'),
    (lambda state: {}, "family='ilm' has a stop head, but the weights have no length_output_layer.*"),
    (lambda state: [state], 'expected a mapping of names to tensors, got list'),
  ],
)
def test_wrong_weights_give_a_one_line_error(weights, change, line):
  assert line in error_of(reference.from_reference, change(weights('ilm')))


def test_weights_of_another_family_than_the_given_one_are_rejected(weights):
  for family in ('arm', 'mdm'):
    line = error_of(reference.from_reference, weights('ilm'), family)
    assert line.startswith(
      f'family={family!r} has no stop head, but the weights have length_output_layer.linear.weight'
    )
  line = error_of(reference.from_reference, weights('arm'), 'ilm')
  assert line.startswith("family='ilm' has a stop head, but the weights have no length_output_layer.*")
  assert error_of(reference.from_reference, {}, 'xlnet') == "family='xlnet': expected one of ilm, arm, mdm"


def test_weights_of_another_architecture_are_rejected(weights):
  without_stop = {name: array for name, array in weights('ilm').items() if not name.startswith('length_output_layer')}
  line = error_of(reference.from_reference, without_stop, 'mdm')
  assert line.startswith('these are not the weights of the mdm transformer: missing ')
  assert 'encoder.0.ada_ln_modulations.modulation.weight' in line and 'unexpected encoder.0.norm1.bias' in line


@pytest.mark.parametrize(
  ('change', 'line'),
  [
    (dropped('sigma_map.mlp.2.weight'), 'transformer: missing sigma_map.mlp.2.weight'),
    (
      replaced('sigma_map.freqs', np.ones(128)),
      'sigma_map.freqs: expected the 128 frequencies of the noise embedding with base 10000, got other values',
    ),
    (
      replaced('sigma_map.mlp.0.weight', np.ones((24, 64))),
      'sigma_map.mlp.0.weight: expected shape (24, 256), got (24, 64)',
    ),
    (replaced('output_layer.norm_final.bias', np.ones(48)), 'unexpected output_layer.norm_final.bias'),
  ],
)
def test_wrong_diffusion_weights_give_a_one_line_error(weights, change, line):
  assert line in error_of(reference.from_reference, change(weights('mdm')), 'mdm')


def test_diffusion_weights_may_lack_the_noise_frequencies(weights):
  state = weights('mdm')
  expected = reference.from_reference(state, 'mdm')
  assert_trees_equal(reference.from_reference(dropped('sigma_map.freqs')(state), 'mdm')[1], expected[1])


def test_export_rejects_a_diffusion_model_that_the_reference_code_does_not_support():
  cfg = dataclasses.replace(CFG, stop_head=False, conditioning='adaln')
  line = error_of(reference.to_reference, cfg, random_params(cfg))
  assert line.startswith("model.residual='input', final_norm=True, stop_head=False: the reference has conditioning=")


# --- weights files ----------------------------------------------------------------------------------------------------


def assert_states_equal(actual, expected):
  assert set(actual) == set(expected)
  for name, array in expected.items():
    assert actual[name].dtype == np.float32
    np.testing.assert_array_equal(actual[name], np.asarray(array).astype(np.float32), err_msg=name)


@pytest.mark.parametrize(('prefix', 'dtype'), [('', np.float32), ('param/', np.float16), ('param/', jnp.bfloat16)])
def test_weights_are_read_from_npz_files(weights, tmp_path, prefix, dtype):
  state = {name: array.astype(dtype) for name, array in weights('ilm').items()}
  other = {'loss': np.ones(3)} if prefix else {}
  np.savez(tmp_path / 'w.npz', **{prefix + name: array for name, array in state.items()}, **other)
  assert_states_equal(reference.load_state_dict(str(tmp_path / 'w.npz')), state)


@pytest.mark.parametrize('dtype', [np.float32, np.float16, jnp.bfloat16])
def test_weights_are_read_from_safetensors_files(weights, tmp_path, dtype):
  numpy = pytest.importorskip('safetensors.numpy')
  state = {name: array.astype(dtype) for name, array in weights('ilm').items()}
  numpy.save_file(state, tmp_path / 'w.safetensors')
  assert_states_equal(reference.load_state_dict(tmp_path / 'w.safetensors'), state)


def test_our_parameters_are_unchanged_after_writing_and_reading_a_safetensors_file(tmp_path):
  numpy = pytest.importorskip('safetensors.numpy')
  params = random_params(CFG)
  numpy.save_file(reference.to_reference(CFG, params), tmp_path / 'w.safetensors')
  assert_trees_equal(reference.from_reference(reference.load_state_dict(tmp_path / 'w.safetensors'))[1], params)


def test_unsupported_safetensors_dtypes_are_rejected(tmp_path):
  numpy = pytest.importorskip('safetensors.numpy')
  numpy.save_file({'a': np.ones(2, np.uint8)}, tmp_path / 'w.safetensors')
  line = error_of(reference.load_state_dict, tmp_path / 'w.safetensors')
  assert line == f'{tmp_path}/w.safetensors: a: expected dtype F64, F32, F16, BF16, I64, got U8'


@pytest.mark.parametrize(
  ('module', 'file', 'advice'),
  [
    ('safetensors', 'w.safetensors', "pip install 'ilm_jax[convert]'"),
    ('torch', 'w.ckpt', 'pip install torch, or save the state_dict as .safetensors'),
  ],
)
def test_the_error_for_a_missing_package_says_how_to_install_it(monkeypatch, tmp_path, module, file, advice):
  monkeypatch.setitem(sys.modules, module, None)
  (tmp_path / file).write_bytes(b'')
  line = error_of(reference.load_state_dict, tmp_path / file)
  assert line.startswith(f'{tmp_path}/{file}: reading ') and line.endswith(advice)


class Malicious:
  """An object that creates a file when it is unpickled."""

  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return open, (str(self.path), 'w')


def npz_bytes(**arrays):
  file = io.BytesIO()
  np.savez(file, **arrays)
  return file.getvalue()


@pytest.mark.parametrize(
  ('file', 'data'),
  [
    ('w.npz', b''),
    ('w.npz', b'not such a file'),
    ('w.npz', npz_bytes(a=np.ones(1000))[:900]),
    ('w.npz', npz_bytes(a=np.ones(1000)).replace(b'\x00\xf0?', b'\x00\xf0@', 1)),  # content does not match the checksum
    ('w.safetensors', b''),
    ('w.safetensors', b'\x09\0\0\0\0\0\0\0{"a": 1, '),
  ],
)
def test_a_corrupt_weights_file_gives_a_one_line_error(tmp_path, file, data):
  if file.endswith('.safetensors'):
    pytest.importorskip('safetensors')
  (tmp_path / file).write_bytes(data)
  assert error_of(reference.load_state_dict, tmp_path / file).startswith(f'{tmp_path}/{file} cannot be read: ')


def test_a_pickle_in_an_npz_file_is_not_loaded(tmp_path):
  np.savez(tmp_path / 'w.npz', a=np.array([Malicious(tmp_path / 'created')], object))
  assert 'allow_pickle=False' in error_of(reference.load_state_dict, tmp_path / 'w.npz')
  assert not (tmp_path / 'created').exists()


def test_missing_and_unsupported_weights_files_are_rejected(tmp_path):
  assert 'cannot be read: ' in error_of(reference.load_state_dict, tmp_path / 'none.npz')
  line = error_of(reference.load_state_dict, tmp_path / 'w.h5')
  assert line == f'{tmp_path}/w.h5: expected a file that ends in .npz, .safetensors, .pt, .pth, .ckpt'
  np.savez(tmp_path / 'w.npz', a=np.array(['text']))
  line = error_of(reference.load_state_dict, tmp_path / 'w.npz')
  assert line == f'{tmp_path}/w.npz: a: expected an array of numbers, got ndarray'


# --- PyTorch files (skipped without PyTorch) --------------------------------------------------------------------------


@pytest.mark.parametrize(('file', 'dtype'), [('w.pt', 'float32'), ('w.pth', 'float16'), ('w.ckpt', 'bfloat16')])
def test_weights_are_read_from_pytorch_files(weights, tmp_path, file, dtype):
  torch = pytest.importorskip('torch')
  state = weights('ilm')
  tensors = {name: torch.tensor(array).to(getattr(torch, dtype)) for name, array in state.items()}
  saved = tensors if file != 'w.ckpt' else {'epoch': 1, 'state_dict': {f'model.{k}': v for k, v in tensors.items()}}
  torch.save(saved, tmp_path / file)
  loaded = reference.load_state_dict(tmp_path / file)
  assert {array.dtype for array in loaded.values()} == {np.dtype(np.float32)}
  rounded = {name: array.astype(jnp.dtype(dtype)).astype(np.float32) for name, array in state.items()}
  assert_trees_equal(reference.from_reference(loaded)[1], reference.from_reference(rounded)[1])
  assert_trees_equal(reference.from_reference(saved)[1], reference.from_reference(rounded)[1])


def test_a_pytorch_file_with_pickled_objects_is_not_loaded(tmp_path):
  torch = pytest.importorskip('torch')
  torch.save({'state_dict': {}, 'config': Malicious(tmp_path / 'created')}, tmp_path / 'w.ckpt')
  line = error_of(reference.load_state_dict, tmp_path / 'w.ckpt')
  assert line.startswith(f'{tmp_path}/w.ckpt cannot be read: Weights only load failed')
  assert not (tmp_path / 'created').exists()


def test_a_corrupt_pytorch_file_gives_a_one_line_error(tmp_path):
  torch = pytest.importorskip('torch')
  torch.save({'a': torch.ones(1000)}, tmp_path / 'w.pt')
  for data in (b'', b'not such a file', (tmp_path / 'w.pt').read_bytes()[:900]):
    (tmp_path / 'w.pt').write_bytes(data)
    assert error_of(reference.load_state_dict, tmp_path / 'w.pt').startswith(f'{tmp_path}/w.pt cannot be read: ')
  torch.save([torch.ones(3)], tmp_path / 'w.pt')
  assert 'expected a mapping of names to tensors' in error_of(reference.load_state_dict, tmp_path / 'w.pt')
