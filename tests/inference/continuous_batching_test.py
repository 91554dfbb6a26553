"""Continuous batching samples the same rows as static batching, for any number of slots and any mesh."""

import functools

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

V, MAX_LENGTH = 17, 30
SIZES = {'num_layers': 1, 'num_heads': 2, 'd_model': 16, 'd_ff': 32, 'dropout': 0.0, 'attention_dropout': 0.0}
SAMPLING = {'max_length': MAX_LENGTH, 'min_buffer': 16, 'token': {}, 'gap': {}}
SAMPLING |= {'stop_threshold': 0, 'stop_temperature': 0.5}
# name -> (family, sampling settings, fields of SampleConfig that depend on the trained model)
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


@functools.cache
def make_model(kind):
  """Return (ModelConfig, params, family, SampleConfig) of a model with random weights."""
  name, settings, model_fields = KINDS[kind]
  family = families.get(name)
  model_settings = family.model_settings(ConfigDict({'model': {'conditioning': 'adaln'}}))
  model_cfg = transformer.ModelConfig(V, **SIZES, **model_settings)
  params = jax.jit(lambda key: transformer.unbox(transformer.init(model_cfg, key)))(jax.random.key(0))
  params = jax.tree.map(lambda x: x + 0.3 * jax.random.normal(jax.random.key(x.size), x.shape), params)
  sample_cfg = family.SampleConfig.create(
    {**SAMPLING, **settings}, suppressed_tokens=tuple(range(len(SPECIAL))), compute='float32', **model_fields
  )
  return model_cfg, params, family, sample_cfg


@functools.cache
def make_sampler(kind, slots=8, **options):
  """Return a function that samples prompts by continuous batching (cached, so that tests share compiled programs)."""
  model_cfg, params, family, cfg = make_model(kind)
  return functools.partial(ContinuousSampler(model_cfg, family, cfg, slots, **options), params, jax.random.key(7))


@functools.cache
def make_static_sampler(kind):
  model_cfg, params, family, cfg = make_model(kind)
  return functools.partial(static_batching.StaticSampler(model_cfg, family, cfg, 6), params, jax.random.key(7))


def make_prompts(kind, number=30):
  """Return empty prompts, prompts to complete and, if the family supports it, infill requests; some limit lengths."""
  rng, prompts = np.random.default_rng(3), []
  for i in range(number):
    tokens = np.array([CLS, BOS, *rng.integers(7, V, i % 10)], np.int32)
    prompt = {'tokens': tokens, 'open': np.arange(len(tokens)) == len(tokens) - 1}
    if kind in ('ilm', 'several gaps', 'all gaps', 'it') and i % 3:
      prompt['open'] = (rng.random(len(tokens)) < 0.4) | prompt['open']
    elif kind == 'fim' and i % 3:
      prompt['open'] = np.arange(len(tokens)) == rng.integers(1, len(tokens))
    if kind in ('ilm', 'arm', 'fim') and i % 4 == 0:
      prompt['least'], prompt['most'] = np.full(len(tokens), 2), np.full(len(tokens), 4)
    prompts.append(prompt)
  return prompts


def assert_same_rows(rows, expected):
  assert sorted(rows) == list(range(len(expected)))
  for i, row in enumerate(expected):
    for name in ('tokens', 'order', 'stopped'):
      np.testing.assert_array_equal(rows[i][name], row[name], err_msg=f'{name} of row {i}')
    for name in ('log_prob', 'stop_prob'):
      np.testing.assert_allclose(rows[i][name], row[name], rtol=0, atol=1e-4, err_msg=f'{name} of row {i}')


@pytest.mark.parametrize('kind', KINDS)
def test_continuous_and_static_batching_sample_the_same_rows(kind):
  prompts = make_prompts(kind)
  expected = list(make_static_sampler(kind)(prompts))
  assert_same_rows(dict(make_sampler(kind)(prompts)), expected)
  inserted = [len(row['tokens']) - len(prompt['tokens']) for row, prompt in zip(expected, prompts, strict=True)]
  assert len(set(inserted)) > 3, 'rows should finish after different numbers of insertions'
  assert max(inserted) > 8, 'some rows should become longer than the shortest buffer'


def test_a_row_that_exactly_fills_its_buffer_keeps_its_last_token():
  prompts = []
  for length in range(11, 17):
    tokens = np.array([CLS, BOS, *(7 + i % 10 for i in range(length - 4))], np.int32)
    limits = {'least': np.full(len(tokens), 2), 'most': np.full(len(tokens), 2)}
    prompts.append({'tokens': tokens, 'open': np.arange(len(tokens)) == len(tokens) - 1, **limits})
  rows = dict(make_sampler('fim')(prompts))
  assert_same_rows(rows, list(make_static_sampler('fim')(prompts)))
  assert [len(rows[i]['tokens']) for i in range(6)] == list(range(11, 17))
  assert all((row['tokens'] > 0).all() for row in rows.values())


@pytest.mark.parametrize('slots, refill', [(1, 1), (40, 3)])
def test_the_number_of_slots_does_not_change_the_sampled_rows(slots, refill):
  prompts = make_prompts('ilm', 18)
  assert_same_rows(dict(make_sampler('ilm', slots, refill=refill)(prompts)), list(make_static_sampler('ilm')(prompts)))


@pytest.mark.parametrize('kind', ['ilm', 'arm'])
def test_sampling_on_a_mesh_does_not_change_the_sampled_rows(kind):
  prompts = make_prompts(kind, 18)
  sampler = make_sampler(kind, 16, mesh=small.mesh(data=2, fsdp=2, tensor=2))
  assert_same_rows(dict(sampler(prompts)), list(make_static_sampler(kind)(prompts)))


def test_a_sampled_row_depends_on_its_request_id_and_not_on_other_requests():
  prompts, sampler = make_prompts('ilm', 12), make_sampler('ilm')
  rows = dict(sampler(prompts))
  assert_same_rows(dict(sampler([prompts[5], prompts[7]], [5, 7])), [rows[5], rows[7]])


def test_prompts_are_read_lazily_as_slots_become_free():
  num_read = 0

  def source():
    nonlocal num_read
    for prompt in make_prompts('ilm', 40):
      num_read += 1
      yield prompt

  rows = make_sampler('ilm')(source())
  next(rows)
  assert num_read <= 24
  assert len(list(rows)) == 39 and num_read == 40


def test_a_prompt_longer_than_max_length_is_refused_and_an_empty_prompt_list_gives_no_rows():
  too_long = {'tokens': np.arange(MAX_LENGTH + 1), 'open': np.ones(MAX_LENGTH + 1, bool)}
  with pytest.raises(UserError, match=r'a prompt of 31 tokens is longer than sampling\.max_length=30'):
    list(make_sampler('ilm')([too_long]))
  assert list(make_sampler('ilm')([])) == []
