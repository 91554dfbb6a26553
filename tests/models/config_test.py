"""Model presets have the published sizes, and wrong model settings are rejected."""

import dataclasses

import jax
import pytest
from tiny_transformer import shapes_of

from ilm_jax.models import transformer
from ilm_jax.types import UserError


def parameter_count(tree):
  return sum(leaf.size for leaf in jax.tree.leaves(tree))


# block, blocks, stop: published millions of parameters per block, in all blocks, and in the stop head.
@pytest.mark.parametrize(
  ('preset', 'layers', 'head_dim', 'block', 'blocks', 'stop'),
  [
    ('small', 12, 64, 7.085, 85.02, 2.365),
    ('tiny', 6, 128, 7.085, 42.51, 2.365),
    ('tiny2', 8, 72, 5.315, 42.52, 1.331),
    ('xtiny2', 4, 64, 2.364, 9.45, 0.593),
  ],
)
def test_presets_have_the_published_parameter_counts(preset, layers, head_dim, block, blocks, stop):
  cfg = transformer.ModelConfig.create(30_524, preset=preset)
  assert (cfg.num_layers, cfg.head_dim) == (layers, head_dim)
  shapes = shapes_of(dataclasses.replace(cfg, num_layers=1))
  millions = {name: parameter_count(tree) / 1e6 for name, tree in shapes.items()}
  assert round(millions['block_0'], 3) == block and round(layers * millions['block_0'], 2) == blocks
  assert round(millions['stop'], 3) == stop
  assert millions['embed'] == millions['unembed'] == 30_524 * cfg.d_model / 1e6
  if preset == 'small':
    total = sum(millions.values()) - millions['final_norm'] + (layers - 1) * millions['block_0']
    assert round(total, 1) == 134.3


@pytest.mark.parametrize(
  ('preset', 'layers', 'd_model', 'head_dim', 'd_ff', 'd_cond'),
  [('ddit_small', 12, 768, 64, 3072, 128), ('ddit_tiny2', 8, 576, 72, 2304, 128), ('ddit_xtiny', 4, 384, 64, 1536, 96)],
)
def test_diffusion_presets_have_the_published_shapes(preset, layers, d_model, head_dim, d_ff, d_cond):
  cfg = transformer.ModelConfig.create(100, preset=preset, conditioning='adaln', stop_head=False)
  assert (cfg.num_layers, cfg.d_model, cfg.head_dim, cfg.d_ff, cfg.d_cond) == (layers, d_model, head_dim, d_ff, d_cond)
  if preset == 'ddit_small':
    block = parameter_count(shapes_of(dataclasses.replace(cfg, num_layers=1))['block_0'])
    assert round(block / 1e6, 2) == 7.68 and round(12 * block / 1e6, 1) == 92.1


def test_model_settings_override_the_preset_unless_they_are_none():
  cfg = transformer.ModelConfig.create(30, preset='small', num_layers=3, d_ff=None, causal=True)
  assert (cfg.vocab_size, cfg.num_layers, cfg.d_ff, cfg.causal) == (30, 3, 3072, True)


@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    ({'preset': 'small', 'n_layers': 3}, "unknown model setting 'n_layers': expected one of activation, "),
    ({'preset': 'big'}, "model.preset='big': expected one of small, tiny, tiny2, xtiny2"),
    ({'preset': 'small', 'num_heads': 7}, 'model.d_model=768: expected a multiple of model.num_heads=7'),
    ({'preset': 'small', 'd_model': 36}, 'model.d_model / model.num_heads = 3 is odd'),
    ({'preset': 'small', 'compute': 'fp8'}, "model.compute='fp8': expected one of float32, bfloat16, mixed"),
    ({'preset': 'small', 'residual': 'modulated'}, "model.residual='modulated' needs model.conditioning='adaln'"),
    ({'preset': 'small', 'd_cond': 0}, 'model.d_cond=0: expected at least 1'),
    ({'preset': 'small', 'dropout': 1.0}, 'model.dropout=1.0: expected a rate of at least 0 and below 1'),
    ({'num_layers': 2, 'num_heads': 2, 'd_model': 8}, 'model.d_ff is not set: set it, or choose a model.preset'),
  ],
)
def test_wrong_model_settings_give_a_one_line_error(settings, message):
  with pytest.raises(UserError) as error:
    transformer.ModelConfig.create(30, **settings)
  assert message in str(error.value) and '\n' not in str(error.value)
