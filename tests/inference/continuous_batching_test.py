"""Continuous batching against static batches: the same rows, whatever the slots, the pools and the mesh."""

import jax
import numpy as np
import pytest
import small
from ml_collections import ConfigDict

from ilm_jax import families
from ilm_jax.inference import static_batching
from ilm_jax.inference.continuous_batching import ContinuousSampler
from ilm_jax.models import transformer
from ilm_jax.special_tokens import BOS, CLS, SPECIAL
from ilm_jax.types import UserError

V, LENGTH = 17, 30
SIZES = {'num_layers': 1, 'num_heads': 2, 'd_model': 16, 'd_ff': 32, 'dropout': 0.0, 'attention_dropout': 0.0}
PLAIN = {'max_length': LENGTH, 'min_buffer': 16, 'token': {}, 'gap': {}, 'stop_threshold': 0, 'stop_temperature': 0.5}
KINDS = {
  'ilm': ('ilm', {}, {}),
  'several gaps': ('ilm', {'gaps': 3}, {}),
  'all gaps': ('ilm', {'gaps': 0, 'gap_threshold': 0.5}, {}),
  'arm': ('arm', {}, {}),
  'fim': ('arm', {}, {'fim': True}),
  'it': ('it', {}, {}),
  'it, parallel': ('it', {'parallel': True}, {}),
  'mdm': ('mdm', {}, {}),
}


def make(kind, **changes):
  """(ModelConfig, params, family, SampleConfig)."""
  name, settings, others = KINDS[kind]
  family = families.get(name)
  decided = family.model_settings(ConfigDict({'model': {'conditioning': 'adaln'}}))
  model_cfg = transformer.ModelConfig(V, **SIZES, **decided)
  params = jax.jit(lambda key: transformer.unbox(transformer.init(model_cfg, key)))(jax.random.key(0))
  params = jax.tree.map(lambda x: x + 0.3 * jax.random.normal(jax.random.key(x.size), x.shape), params)
  closed = tuple(range(len(SPECIAL)))
  sampling_cfg = {**PLAIN, **settings, **changes}
  sample_cfg = family.SampleConfig.create(sampling_cfg, closed_tokens=closed, compute='float32', **others)
  return model_cfg, params, family, sample_cfg


def prompts(kind, number=30):
  """Nothing given, a beginning, and gaps anywhere, mixed; some with limits."""
  rng, out = np.random.default_rng(3), []
  for i in range(number):
    tokens = np.array([CLS, BOS, *rng.integers(7, V, i % 10)], np.int32)
    given = {'tokens': tokens, 'open': np.arange(len(tokens)) == len(tokens) - 1}
    if kind in ('ilm', 'several gaps', 'all gaps', 'it') and i % 3:
      given['open'] = (rng.random(len(tokens)) < 0.4) | given['open']
    elif kind == 'fim' and i % 3:
      given['open'] = np.arange(len(tokens)) == rng.integers(1, len(tokens))
    if kind in ('ilm', 'arm', 'fim') and i % 4 == 0:
      given['least'], given['most'] = np.full(len(tokens), 2), np.full(len(tokens), 4)
    out.append(given)
  return out


def static(kind, given, batch_size=6):
  model_cfg, params, family, cfg = make(kind)
  return list(static_batching.Sampler(model_cfg, family, cfg, batch_size)(params, jax.random.key(7), given))


def assert_same(rows, expected):
  assert sorted(rows) == list(range(len(expected)))
  for i, row in enumerate(expected):
    for name in ('tokens', 'order', 'stopped'):
      np.testing.assert_array_equal(rows[i][name], row[name], err_msg=f'{name} of {i}')
    for name in ('log_prob', 'stop_prob'):
      np.testing.assert_allclose(rows[i][name], row[name], atol=1e-4, err_msg=f'{name} of {i}')


@pytest.mark.parametrize('kind', KINDS)
def test_every_row_is_that_of_a_static_batch(kind):
  given = prompts(kind)
  model_cfg, params, family, cfg = make(kind)
  sampler = ContinuousSampler(model_cfg, family, cfg, 8)
  pairs = list(sampler(params, jax.random.key(7), given))
  expected = static(kind, given)
  assert_same(dict(pairs), expected)
  lengths = [len(row['tokens']) - len(p['tokens']) for row, p in zip(expected, given, strict=True)]
  assert len(set(lengths)) > 3 and max(lengths) > 8, 'rows end together, or none outgrows its pool'


def test_a_row_that_ends_with_its_buffer_keeps_its_last_token():
  model_cfg, params, family, cfg = make('fim')
  given = []
  for length in range(11, 17):
    tokens = np.array([CLS, BOS, *(7 + i % 10 for i in range(length - 4))], np.int32)
    limits = {'least': np.full(len(tokens), 2), 'most': np.full(len(tokens), 2)}
    given.append({'tokens': tokens, 'open': np.arange(len(tokens)) == len(tokens) - 1, **limits})
  rows = dict(ContinuousSampler(model_cfg, family, cfg, 8)(params, jax.random.key(7), given))
  assert_same(rows, static('fim', given))
  assert [len(rows[i]['tokens']) for i in range(6)] == list(range(11, 17))
  assert all((row['tokens'] > 0).all() for row in rows.values())


@pytest.mark.parametrize('slots, refill', [(1, 1), (40, 3)])
def test_slots_and_refills_change_nothing(slots, refill):
  given = prompts('ilm', 18)
  model_cfg, params, family, cfg = make('ilm')
  rows = dict(ContinuousSampler(model_cfg, family, cfg, slots, refill=refill)(params, jax.random.key(7), given))
  assert_same(rows, static('ilm', given))


@pytest.mark.parametrize('kind', ['ilm', 'arm'])
def test_a_mesh_changes_nothing(kind):
  given = prompts(kind, 18)
  model_cfg, params, family, cfg = make(kind)
  sampler = ContinuousSampler(model_cfg, family, cfg, 16, mesh=small.mesh(data=2, fsdp=2, tensor=2))
  assert_same(dict(sampler(params, jax.random.key(7), given)), static(kind, given))


def test_a_request_keeps_its_randomness_among_others():
  given = prompts('ilm', 12)
  model_cfg, params, family, cfg = make('ilm')
  sampler = ContinuousSampler(model_cfg, family, cfg, 4)
  rows = dict(sampler(params, jax.random.key(7), given))
  alone = dict(sampler(params, jax.random.key(7), [given[5], given[7]], [5, 7]))
  assert_same(alone, [rows[5], rows[7]])


def test_prompts_are_read_as_slots_become_free():
  read = []

  def source():
    for i, given in enumerate(prompts('ilm', 40)):
      read.append(i)
      yield given

  model_cfg, params, family, cfg = make('ilm')
  rows = ContinuousSampler(model_cfg, family, cfg, 4)(params, jax.random.key(0), source())
  next(rows)
  assert len(read) <= 20
  assert len(list(rows)) == 39 and len(read) == 40


def test_prompts_that_do_not_fit_are_refused_and_none_give_nothing():
  model_cfg, params, family, cfg = make('ilm')
  sampler = ContinuousSampler(model_cfg, family, cfg, 4)
  long = {'tokens': np.arange(LENGTH + 1), 'open': np.ones(LENGTH + 1, bool)}
  with pytest.raises(UserError, match=r'a prompt of 31 tokens is longer than sampling\.max_length=30'):
    list(sampler(params, jax.random.key(0), [long]))
  assert list(sampler(params, jax.random.key(0), [])) == []
