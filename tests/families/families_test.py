"""Requirements that every family in FAMILIES must meet; a new family is tested here without further code."""

import functools
import pickle
import re

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from ilm_jax import families
from ilm_jax.configs import default
from ilm_jax.data import pipeline
from ilm_jax.families import contract, settings
from ilm_jax.inference import static_batching
from ilm_jax.models import transformer
from ilm_jax.special_tokens import BOS, CLS, PAD, SPECIAL
from ilm_jax.types import Rule, Score, UserError

V, LENGTH = 17, 16
SIZES = {'num_layers': 2, 'num_heads': 2, 'd_model': 16, 'd_ff': 32, 'dropout': 0.0, 'attention_dropout': 0.0}
CORRUPTED = {'tokens', 'open', 'target_gap', 'target_token', 'length', 'free'}


def make_config(name):
  cfg = default.get_config()
  cfg.family, _, open_gap_embedding = name.partition(' with ')
  cfg.model.open_gap_embedding = bool(open_gap_embedding)
  cfg.corrupt.length = LENGTH
  return cfg


@pytest.fixture(scope='module', params=[*families.FAMILIES, 'ilm with open_gap_embedding'])
def made(request):
  """Return (family, a config of this family, a transformer.Forward with random weights)."""
  cfg = make_config(request.param)
  family = families.get(cfg.family)
  settings = {
    k: v for k, v in cfg.model.to_dict().items() if k in ('conditioning', 'residual', 'open_gap_embedding') and v
  }
  model_cfg = transformer.ModelConfig(V, **SIZES, **{**settings, **family.model_settings(cfg)})
  params = transformer.unbox(jax.jit(transformer.init, static_argnums=0)(model_cfg, jax.random.key(0)))
  params = jax.tree.map(lambda x: x + 0.3 * jax.random.normal(jax.random.key(x.size), x.shape), params)
  return family, cfg, transformer.Forward(model_cfg, params)


def example(rng, prompt=3, answer=5):
  tokens = np.array([CLS, *rng.integers(7, V, prompt), BOS, *rng.integers(7, V, answer)], np.int32)
  return {'tokens': tokens, 'fixed': np.arange(len(tokens)) < prompt + 2}


def examples_of(number=6):
  rng = np.random.default_rng(0)
  return [example(rng, prompt=i % 3, answer=i) for i in range(number)]


def corrupted(family, cfg, examples):
  corrupt = functools.partial(family.corrupt, cfg=cfg.corrupt)
  return [corrupt(np.random.default_rng(i), e, u=(i + 0.5) / len(examples)) for i, e in enumerate(examples)]


def loss_cfg(cfg):
  return ConfigDict({**cfg.loss.to_dict(), 'compute': 'float32', 'vocab_chunk': 6, 'mean_weight': 1.0})


def losses(made, batch, params=None):
  family, cfg, forward = made
  names = ['tokens_BxL', 'position_BxL', 'segment_BxL', 'cls_BxS']
  extra = {name: batch[name] for name in ('noise_BxS', 'open_BxL')}
  outputs = transformer.apply(
    forward.cfg, forward.params if params is None else params, *(batch[n] for n in names), **extra
  )
  return family.loss(outputs, batch, loss_cfg(cfg))


def test_corruption_depends_only_on_the_random_generator_and_its_examples_can_be_packed(made):
  family, cfg, _ = made
  examples = examples_of()
  for first, second in zip(corrupted(family, cfg, examples), corrupted(family, cfg, examples), strict=True):
    assert first.keys() >= CORRUPTED
    for name in first:
      np.testing.assert_array_equal(first[name], second[name])
    assert len(first['open']) == len(first['tokens'])
    assert len(first['target_gap']) == len(first['target_token'])
    assert all(0 <= gap < len(first['tokens']) for gap in first['target_gap'])
  for used, fresh in zip(examples, examples_of(), strict=True):
    for name in used:
      np.testing.assert_array_equal(used[name], fresh[name], err_msg='the corruption modified its input example')
  assert pickle.loads(pickle.dumps(functools.partial(family.corrupt, cfg=cfg.corrupt)))  # as sent to data workers


def test_packing_examples_into_rows_does_not_change_the_losses(made):
  examples = corrupted(*made[:2], examples_of())
  packed = pipeline.pack(examples, list(range(6)), pipeline.Shape(3, 2 * LENGTH, 4 * LENGTH, 3))
  assert packed['segment_BxL'].max() > 1
  one = pipeline.Shape(1, LENGTH, 2 * LENGTH, 1)
  alone = pipeline.concatenate([pipeline.pack([e], [i], one) for i, e in enumerate(examples)])
  run = jax.jit(functools.partial(losses, made))
  together, apart = run(packed), run(alone)
  assert {'loss'} <= together.keys() == apart.keys()
  for name in together:
    np.testing.assert_allclose(together[name], apart[name], rtol=2e-5, atol=1e-5, err_msg=name)
    assert float(together[name][1]) > 0


def test_every_parameter_has_a_nonzero_gradient(made):
  batch = pipeline.pack(corrupted(*made[:2], examples_of()), list(range(6)), pipeline.Shape(6, LENGTH, 2 * LENGTH, 1))
  grads = jax.jit(jax.grad(lambda params: losses(made, batch, params)['loss'][0]))(made[2].params)
  for path, grad in jax.tree_util.tree_flatten_with_path(grads)[0]:
    assert np.isfinite(grad).all()
    assert np.abs(grad).max() > 0, jax.tree_util.keystr(path)


make_sampler = functools.cache(static_batching.StaticSampler)  # all tests of a family share its compiled samplers


def make_sample_config(made, closed=(), byte_ids=(), **changed):
  family, cfg, _ = made
  decided = {'suppressed_tokens': (*range(len(SPECIAL)), *closed), 'byte_ids': byte_ids, 'compute': 'float32'}
  sampling = {**cfg.sampling.to_dict(), 'max_length': LENGTH, 'min_buffer': 4, 'token': {}, 'gap': {}, **changed}
  return family.SampleConfig.create(sampling, vocab_chunk=6, **decided)


def sample(made, prompts, requests=None, batch_size=8, **settings):
  family, _, forward = made
  sample_cfg = make_sample_config(made, **settings)
  assert hash(sample_cfg) == hash(sample_cfg._replace())
  sampler = make_sampler(forward.cfg, family, sample_cfg, batch_size)
  return list(sampler(forward.params, jax.random.key(0), prompts, requests))


def prompts_of(number):
  rng = np.random.default_rng(1)
  return [static_batching.prompt_of(example(rng, prompt=i % 4, answer=4)) for i in range(number)]


def test_completions_keep_the_prompt_and_contain_no_special_tokens(made):
  prompts = prompts_of(12)
  some = False
  for prompt, row in zip(prompts, sample(made, prompts), strict=True):
    given = row['order'] < 0
    assert row['tokens'][given].tolist() == prompt['tokens'].tolist()
    assert (row['tokens'][~given] >= len(SPECIAL)).all()
    assert len(row['tokens']) == len(row['order']) <= LENGTH
    assert (row['log_prob'] <= 1e-5).all() and np.isfinite(row['log_prob']).all()
    some |= bool((~given).any())
  assert some


def test_a_sampler_that_changes_given_text_or_fills_a_closed_gap_is_reported(made):
  family, prompts = made[0], prompts_of(12)
  rows = sample(made, prompts)
  for prompt, row in zip(prompts, rows, strict=True):
    contract.check_completion(family, prompt, row)
  prompt, row = next((p, r) for p, r in zip(prompts, rows, strict=True) if (r['order'] >= 0).sum() > 1)
  faults = [('changes given tokens', {'tokens': np.where(row['order'] < 0, row['tokens'] + 1, row['tokens'])})]
  if family.fills != 'masks':
    # Move the new tokens to the gap right of [CLS], which is always closed.
    moved = np.concatenate([[0], np.flatnonzero(row['order'] >= 0), np.flatnonzero(row['order'] < 0)[1:]])
    faults.append(('inserts tokens into closed gaps', {name: row[name][moved] for name in ('tokens', 'order')}))
  for fault, changed in faults:
    with pytest.raises(UserError, match=f'family={family.name}: its sampler {fault}: '):
      contract.check_completion(family, prompt, {**row, **changed})


def test_a_completion_depends_only_on_its_request(made):
  prompts = prompts_of(8)
  together = sample(made, prompts)
  alone = sample(made, prompts[5:6], requests=[5], batch_size=1, min_buffer=64)[0]
  for name in ('tokens', 'order', 'stopped'):
    np.testing.assert_array_equal(together[5][name], alone[name])
  np.testing.assert_allclose(together[5]['log_prob'], alone['log_prob'], atol=2e-4)
  again = sample(made, [prompts[i] for i in (5, 5, 7, 5)], requests=[5, 6, 7, 5])
  for row in (again[0], again[3]):
    np.testing.assert_array_equal(row['tokens'], together[5]['tokens'])


@pytest.mark.long
def test_64_bit_mode_gives_the_same_samples_losses_and_gradients(made):
  batch = pipeline.pack(
    corrupted(*made[:2], examples_of()), list(range(6)), pipeline.Shape(3, 2 * LENGTH, 4 * LENGTH, 3)
  )
  run = jax.jit(jax.value_and_grad(lambda params: losses(made, batch, params)['loss'][0]))
  family, prompts, sample_cfg = made[0], prompts_of(8), make_sample_config(made)
  rows, before = sample(made, prompts), run(made[2].params)
  padded = static_batching.pad(prompts, range(8), 8, LENGTH)
  with jax.enable_x64(True):
    assert jax.numpy.arange(2).dtype == np.int64
    after = run(made[2].params)
    complete = jax.jit(lambda rng, prompt: family.sample(made[2], rng, prompt, sample_cfg))
    sampled = jax.device_get(complete(jax.random.key(0), padded))
  for number, row in enumerate(rows):
    wide = static_batching.cut(sampled, number)
    np.testing.assert_array_equal(row['tokens'], wide['tokens'])
    np.testing.assert_array_equal(row['order'], wide['order'])
    np.testing.assert_allclose(row['log_prob'], wide['log_prob'], atol=1e-4)
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5), before, after)


def assert_same_samples(first, second):
  for a, b in zip(first, second, strict=True):
    np.testing.assert_array_equal(a['tokens'], b['tokens'])
    np.testing.assert_array_equal(a['log_prob'], b['log_prob'])


def test_byte_tokens_are_sampled_only_if_allowed_and_the_other_probabilities_are_renormalized(made):
  prompts, parts = prompts_of(16), (8, 11, 12, 13)
  closed = sample(made, prompts, byte_ids=parts)
  assert not any(np.isin(row['tokens'][row['order'] >= 0], parts).any() for row in closed)
  assert_same_samples(closed, sample(made, prompts, closed=parts))
  opened = make_sample_config(made, byte_ids=parts, bytes=True)
  assert settings.never_generated(opened) == make_sample_config(made).suppressed_tokens


def test_sampling_at_a_tiny_temperature_is_greedy(made):
  greedy = make_sample_config(made, token={'temperature': 0.0}, gap={'temperature': 0}, joint={'temperature': 0})
  for rule in ({'temperature': 1e-45}, {'temperature': 1e-38}, {'temperature': 1e-9}):
    assert make_sample_config(made, token=rule, gap=rule, joint=rule) == greedy


def test_scores_are_finite_and_state_which_kind_of_likelihood_they_are(made):
  family, cfg, forward = made
  sampling_cfg = {**cfg.sampling.to_dict(), 'max_length': LENGTH}
  special = tuple(range(len(SPECIAL)))
  sample_cfg = family.SampleConfig.create(sampling_cfg, suppressed_tokens=special, compute='float32', vocab_chunk=6)
  sample_cfg = sample_cfg._replace(byte_ids=tuple(range(len(SPECIAL), V)))  # byte tokens are never sampled, but scored
  rng = np.random.default_rng(0)
  examples = [example(rng, prompt=1, answer=n) for n in (0, 3)]
  tokens_BxL, fixed_BxL = np.full((2, LENGTH), PAD, np.int32), np.ones((2, LENGTH), bool)
  for i, e in enumerate(examples):
    tokens_BxL[i, : len(e['tokens'])], fixed_BxL[i, : len(e['tokens'])] = e['tokens'], e['fixed']
  length_B, kinds = np.array([len(e['tokens']) for e in examples], np.int32), []

  def score(rng, **options):
    scored = family.score(forward, rng, tokens_BxL, fixed_BxL, length_B, sample_cfg, **options)
    assert isinstance(scored, Score)
    kinds.append(scored.kind)
    return scored.nll_B, scored.tokens_B

  if family.score is None:
    with pytest.raises(UserError, match='no likelihood'):
      family.check_score(None, 0)
    return
  nll_B, tokens_B = jax.device_get(jax.jit(score)(jax.random.key(0)))
  with jax.enable_x64(True):
    np.testing.assert_allclose(jax.jit(lambda rng: score(rng))(jax.random.key(0))[0], nll_B, rtol=1e-4)
  assert kinds[0] in ('exact', 'bound', 'importance-weighted')
  assert np.isfinite(nll_B).all() and (nll_B > 0).all()
  if cfg.family != 'mdm':  # MDM scores include the padding, and the shorter text has more padding
    assert nll_B[1] > nll_B[0]
  assert tokens_B.tolist() == [0, 3]
  with pytest.raises(UserError, match="kind='guess'"):
    score(jax.random.key(0), kind='guess')


def test_unknown_families_are_rejected():
  with pytest.raises(UserError, match=r"config.family='gpt': expected one of ilm, arm"):
    families.get('gpt')


def test_unknown_sampling_settings_and_values_out_of_range_are_rejected(made):
  for changed, message in (
    ({'temprature': 1}, "unknown sampling setting 'temprature'"),
    ({'token': {'topk': 1}}, r'unknown setting sampling\.token\.topk'),
    ({'token': {'temperature': -1.0}}, r'sampling\.token\.temperature=-1\.0: expected a number of at least 0'),
    ({'token': {'top_p': 0.0}}, r'sampling\.token\.top_p=0\.0: expected a probability above 0'),
    ({'max_length': 1}, r'sampling\.max_length=1: expected at least 3'),
    ({'compute': 'float32'}, r'sampling\.compute cannot be set'),
    ({'token': {'temperature': 1e39}}, r'token\.temperature=1e\+39: expected a number .*, at most 3\.4e38$'),
    ({'stop_temperature': 1e300}, r'stop_temperature=1e\+300: expected a number above 0, at most 3\.4e38$'),
    ({'token': {'top_p': np.float32('nan')}}, r'token\.top_p=.*nan.*: expected a finite number'),
    ({'token': {'temperature': True}}, r'token\.temperature=True: expected a finite number'),
    ({'gaps': True}, r'sampling\.gaps=True: expected a whole number'),
    ({'gaps': 2**31}, r'sampling\.gaps=2147483648: expected a whole number below 2\*\*31'),
    ({'token': 0.5}, r"token=0\.5: expected a dict of temperature, top_k, top_p, such as {'temperature': 0\.7}"),
    ({'token': 'greedy'}, r"sampling\.token='greedy': expected a dict"),
    ({'token': None}, r'sampling\.token=None: expected a dict'),
    ({'gap': None}, r'sampling\.gap=None: expected a dict'),
    ({'bytes': 'no'}, r"sampling\.bytes='no': expected True or False"),
    ({'force_first': float('nan')}, r'sampling\.force_first=nan: expected True or False'),
    ({'two_stage': float('nan')}, r'sampling\.two_stage=nan: expected True or False'),
    ({'parallel': 1}, r'sampling\.parallel=1: expected True or False'),
  ):
    with pytest.raises(UserError, match=message):
      made[0].SampleConfig.create({'max_length': 9, **changed}, suppressed_tokens=(), compute='float32')


@pytest.mark.parametrize('value', [float('nan'), float('inf'), -float('inf'), 10**400, '1', 1j, None])
def test_sampling_settings_that_are_not_finite_numbers_are_rejected(made, value):
  skipped = Rule._fields + (settings.OPTIONAL if value is None else ())
  numbers = [(name, {name: value}) for name in settings.ALLOWED if name not in skipped]
  for rule in settings.RULES:
    numbers += [(f'{rule}.{field}', {rule: {field: value}}) for field in Rule._fields]
    numbers += [(f'{rule}.{field}', {rule: Rule(**{field: value})}) for field in Rule._fields]
  for name, changed in numbers:
    with pytest.raises(
      UserError, match=rf'^sampling\.{name}={re.escape(repr(value))}: expected a (finite|whole)'
    ) as error:
      made[0].SampleConfig.create({'max_length': 9, **changed}, suppressed_tokens=(), compute='float32')
    assert '\n' not in str(error.value)


def test_sampling_settings_that_count_something_must_be_whole_numbers(made):
  for name in ('max_length', 'max_steps', 'min_buffer', 'gaps'):
    with pytest.raises(UserError, match=rf'sampling\.{name}=4\.5: expected a whole number'):
      made[0].SampleConfig.create({'max_length': 9, name: 4.5}, suppressed_tokens=(), compute='float32')
