"""Masked diffusion: corruption, loss and settings. mdm_sampling_test and mdm_score_test test sampling and scoring."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from flax.core import meta
from mdm_tables import BOS, CLS, MASK, PAD, sigma
from ml_collections import ConfigDict

from ilm_jax import families
from ilm_jax.data import pipeline
from ilm_jax.families import corruption, mdm
from ilm_jax.inference import static_batching
from ilm_jax.models import transformer
from ilm_jax.training import experiment, train_step
from ilm_jax.types import Rule, UserError

PLAIN = ConfigDict({'length': 0, 'noise_eps': 1e-3})


@pytest.fixture(scope='module', autouse=True)
def programs(tmp_path_factory):
  with small.compilation_cache_in(tmp_path_factory.mktemp('programs')):
    yield


def error_line(function, *args, **kwargs) -> str:
  """Return the message of the UserError that a call raises."""
  with pytest.raises(UserError) as error:
    function(*args, **kwargs)
  assert '\n' not in str(error.value)
  return str(error.value)


# --- corruption -------------------------------------------------------------------------------------------------------


def example(pattern: str):
  """Return an example from a pattern: `CpB....` is [CLS], a prompt token, [BOS] and four free tokens."""
  tokens = [{'C': CLS, 'B': BOS}.get(c, 10 + i) for i, c in enumerate(pattern)]
  return {'tokens': np.array(tokens, np.int32), 'fixed': np.array([c != '.' for c in pattern])}


def corrupt_often(ex, number, cfg=PLAIN, **kwargs):
  return [corruption.mdm(np.random.default_rng(i), ex, cfg, **kwargs) for i in range(number)]


def test_free_tokens_are_masked_in_place_and_become_the_targets():
  ex, sizes = example('CppB..x..yy.'), set()
  before = ex['tokens'].copy()
  for corrupted in corrupt_often(ex, 200):
    masked = corrupted['tokens'] == MASK
    assert not masked[ex['fixed']].any() and (corrupted['length'], corrupted['free']) == (12, 5)
    np.testing.assert_array_equal(corrupted['tokens'][~masked], ex['tokens'][~masked])
    np.testing.assert_array_equal(corrupted['target_gap'], np.flatnonzero(masked))
    np.testing.assert_array_equal(corrupted['target_token'], ex['tokens'][masked])
    assert len(corrupted['target_weight']) == masked.sum() and len(corrupted['open']) == 12
    sizes.add(int(masked.sum()))
  assert sizes == {0, 1, 2, 3, 4, 5}
  np.testing.assert_array_equal(ex['tokens'], before)


def test_corrupted_arrays_have_fixed_dtypes_even_without_targets():
  corrupted = corruption.mdm(np.random.default_rng(0), example('CB'), PLAIN)
  types = {'tokens': np.int32, 'target_gap': np.int32, 'target_token': np.int32, 'target_weight': np.float32}
  assert {name: corrupted[name].dtype for name in types} == types and len(corrupted['target_gap']) == 0


def test_free_tokens_are_masked_independently_with_the_probability_given_by_the_noise_schedule():
  ex, number = example('CB' + '.' * 10), 3_000
  for eps, u in [(1e-3, 0.0), (1e-3, 0.3), (0.2, 0.0), (0.2, 0.9)]:
    p = (1 - eps) * (1 - 0.999 * u)
    made = corrupt_often(ex, number, ConfigDict({'length': 0, 'noise_eps': eps}), u=u)
    masked = np.array([corrupted['tokens'][2:] == MASK for corrupted in made])
    assert abs(masked.mean() - p) < 4.5 * math.sqrt(p * (1 - p) / masked.size)
    assert np.abs(masked.mean(axis=0) - p).max() < 4.5 * math.sqrt(p * (1 - p) / number) + 1e-9
    variance = masked.sum(axis=1).var()
    assert variance == pytest.approx(10 * p * (1 - p), rel=0.2, abs=5e-3), 'tokens are not masked independently'


def test_diffusion_times_are_uniformly_random_unless_u_is_given():
  ex = example('CB......')
  times = np.sort([(1 - math.exp(-corrupted['noise'])) / 0.999 for corrupted in corrupt_often(ex, 4_000)])
  assert times[0] > 1e-3 and times[-1] <= 1 + 1e-9
  expected = 1e-3 + 0.999 * (np.arange(4_000) + 0.5) / 4_000
  assert np.abs(times - expected).max() < 1.9 / math.sqrt(4_000)  # Kolmogorov-Smirnov bound with p-value 1/700
  for u, t in [(0.0, 1.0), (0.5, 0.5005), (np.nextafter(1, 0), 1e-3)]:
    assert corruption.mdm(np.random.default_rng(0), ex, PLAIN, u=u)['noise'] == pytest.approx(sigma(t), rel=1e-9)


@pytest.mark.parametrize('eps', [1e-3, math.exp(-10)])
def test_the_loss_weight_of_a_masked_token_is_the_noise_rate_divided_by_the_odds_of_masking(eps):
  cfg = ConfigDict({'length': 0, 'noise_eps': eps})
  for t in (0.01, 0.4, 0.9):
    corrupted = corruption.mdm(np.random.default_rng(0), example('CB' + '.' * 300), cfg, u=(1 - t) / 0.999)
    assert corrupted['noise'] == pytest.approx(sigma(t, eps), rel=1e-9)
    rate = (sigma(t + 1e-6, eps) - sigma(t - 1e-6, eps)) / 2e-6
    np.testing.assert_allclose(corrupted['target_weight'], rate / math.expm1(sigma(t, eps)), rtol=1e-5)
    assert len(corrupted['target_weight']) > 0


def test_noise_levels_and_target_weights_equal_the_reference_implementation(golden):
  numbers = golden('mdm')
  for t, noise, rate in zip(numbers['t'], numbers['total_noise'], numbers['noise_rate'], strict=True):
    corrupted = corruption.mdm(np.random.default_rng(0), example('CB' + '.' * 50), PLAIN, u=(1 - t) / 0.999)
    assert corrupted['noise'] == pytest.approx(noise, rel=1e-6)
    np.testing.assert_allclose(corrupted['target_weight'], rate / np.expm1(noise), rtol=1e-6)


def test_padding_is_masked_and_predicted_like_other_tokens():
  ex, cfg = example('CpB..'), ConfigDict({'length': 9, 'noise_eps': 1e-3})
  made = corrupt_often(ex, 100, cfg)
  masked = np.array([corrupted['tokens'] == MASK for corrupted in made])
  assert not masked[:, :3].any() and (masked[:, 3:].mean(axis=0) > 0.3).all()
  padded = np.append(ex['tokens'], [PAD] * 4)
  for corrupted, where in zip(made, masked, strict=True):
    np.testing.assert_array_equal(corrupted['tokens'], np.where(where, MASK, padded))
    np.testing.assert_array_equal(corrupted['target_token'], padded[where])
    assert (corrupted['length'], corrupted['free']) == (5, 2), 'the counts must not include padding'
  cfg.length = 5
  assert len(corruption.mdm(np.random.default_rng(0), ex, cfg)['tokens']) == 5
  cfg.length = 4
  assert error_line(corruption.mdm, np.random.default_rng(0), ex, cfg).startswith('corrupt.length=4')


# --- the loss ---------------------------------------------------------------------------------------------------------

MODEL = transformer.ModelConfig(
  vocab_size=23, num_layers=1, num_heads=2, d_model=16, d_ff=24, stop_head=False, conditioning='adaln', d_cond=6,
  dropout=0.0, attention_dropout=0.0,
)  # fmt: skip
LOSSES = {name: ConfigDict({'mdm': name, 'compute': 'float32', 'vocab_chunk': 5}) for name in mdm.LOSSES}


@pytest.fixture(scope='module')
def params():
  random = np.random.default_rng(0)
  shapes = meta.unbox(jax.eval_shape(lambda: transformer.init(MODEL, jax.random.key(0))))
  return jax.tree.map(lambda x: random.normal(0, 0.4, x.shape).astype(np.float32), shapes)


def make_corrupted():
  """Return corrupted examples of several lengths and noise levels; some have no free token or no [MASK]."""
  rng, out = np.random.default_rng(0), []
  for prompt, free, u in [(0, 5, 0.6), (3, 4, 0.1), (1, 6, 0.0), (2, 1, 0.5), (0, 0, 0.5), (4, 7, 0.9), (0, 3, 0.999)]:
    tokens = np.array([CLS, *rng.integers(7, 23, prompt), BOS, *rng.integers(7, 23, free)], np.int32)
    out.append(corruption.mdm(rng, {'tokens': tokens, 'fixed': np.arange(len(tokens)) < prompt + 2}, PLAIN, u=u))
  sizes = [len(c['target_gap']) for c in out]
  assert sizes[2] == 6 and 0 in sizes[5:] and len(set(sizes)) > 3
  return out


PACKED = pipeline.Shape(rows=2, length=28, targets=14, segments=5)


def one_per_row(corrupted):
  shape = pipeline.Shape(rows=1, length=16, targets=9, segments=1)
  return pipeline.concatenate([pipeline.pack([c], [i], shape) for i, c in enumerate(corrupted)])


def packed(corrupted):
  batch = pipeline.pack(corrupted, list(range(len(corrupted))), PACKED)
  assert (batch['example_id_BxS'] >= 0).sum() == len(corrupted) and (batch['example_id_BxS'][:, 2] >= 0).all()
  return batch


@jax.jit
def losses_and_gradients(params, batch):
  """Return {loss name: ((loss, metrics), gradient)} for the two training losses."""

  def total(params, name):
    pairs = mdm.loss(transformer.apply_batch(MODEL, params, batch), batch, LOSSES[name])
    return pairs['loss'][0], pairs

  return {name: jax.value_and_grad(total, has_aux=True)(params, name) for name in mdm.LOSSES}


def assert_same(first, second):
  for name in mdm.LOSSES:
    (pairs, grads), (other_pairs, other_grads) = ((made[name][0][1], made[name][1]) for made in (first, second))
    assert jax.tree.map(float, pairs) == jax.tree.map(lambda x: pytest.approx(float(x), rel=1e-5), other_pairs)
    atol = 1e-5 * max(float(jnp.abs(g).max()) for g in jax.tree.leaves(other_grads))
    for grad, other_grad in zip(jax.tree.leaves(grads), jax.tree.leaves(other_grads), strict=True):
      np.testing.assert_allclose(grad, other_grad, rtol=1e-5, atol=atol)


def test_the_loss_equals_a_plain_loop_and_does_not_depend_on_packing(params):
  corrupted = make_corrupted()
  batch = one_per_row(corrupted)
  outputs = jax.jit(transformer.apply_batch, static_argnums=0)(MODEL, params, batch)
  hidden, unembed = np.asarray(outputs.hidden_BxLxD, np.float64), np.asarray(outputs.unembed_VxD, np.float64)
  weighted = plain = count = 0.0
  for row, c in enumerate(corrupted):
    t = (1 - math.exp(-c['noise'])) / 0.999
    for place, token in zip(c['target_gap'], c['target_token'], strict=True):
      logits = hidden[row, place] @ unembed.T
      loss = math.log(sum(math.exp(z) for z in logits)) - logits[token]
      weighted, plain, count = weighted + loss / t, plain + loss, count + 1
  unpacked = losses_and_gradients(params, batch)
  for name in mdm.LOSSES:
    (total, pairs), _ = unpacked[name]
    bound = [0.999 * weighted, len(corrupted)]
    expected = {'string_bound': bound, 'token_loss': [plain, count]}
    expected['loss'] = bound if name == 'nelbo' else [weighted, count]
    assert {k: [float(x) for x in pairs[k]] for k in expected} == {
      k: pytest.approx(pair, rel=1e-5) for k, pair in expected.items()
    }
    assert float(total) == float(pairs['loss'][0])
  assert_same(losses_and_gradients(params, packed(corrupted)), unpacked)


def test_padding_and_unused_targets_do_not_change_the_loss(params):
  batch = packed(make_corrupted())
  noisy = {name: value.copy() for name, value in batch.items()}
  padding = batch['segment_BxL'] == 0
  noisy['tokens_BxL'][padding], noisy['position_BxL'][padding] = 9, 5
  unused = batch['target_segment_BxT'] == 0
  for name, value in [('gap', 3), ('token', 7), ('weight', 2.0)]:
    noisy[f'target_{name}_BxT'][unused] = value
  noisy['noise_BxS'][batch['segment_weight_BxS'] == 0] = 3.0
  assert padding.any() and unused.any()
  assert_same(losses_and_gradients(params, noisy), losses_and_gradients(params, batch))


def test_an_example_of_weight_2_counts_as_two_copies_and_one_of_weight_0_as_none(params):
  corrupted = make_corrupted()
  batch = one_per_row(corrupted)
  batch['segment_weight_BxS'][:, 0] = [1, 0, 2, 1, 0, 0, 1]
  expected = one_per_row([corrupted[i] for i in (0, 2, 2, 3, 6, 4, 4)])
  expected['segment_weight_BxS'][5:] = 0
  assert_same(losses_and_gradients(params, batch), losses_and_gradients(params, expected))


def test_an_empty_batch_has_zero_loss_and_zero_gradient(params):
  for (total, pairs), grads in losses_and_gradients(params, PACKED.empty()).values():
    assert float(total) == 0 and float(pairs['loss'][1]) == 0
    assert all((np.asarray(g) == 0).all() for g in jax.tree.leaves(grads))


# --- settings ---------------------------------------------------------------------------------------------------------


def test_sampling_settings_are_read_from_a_config():
  sampling_cfg = ConfigDict({'max_length': 9, 'token': {'top_p': 0.9}, 'stop_threshold': 0.5, 'order': 'margin'})
  cfg = mdm.SampleConfig.create(sampling_cfg, suppressed_tokens=(0, 1, 4), noise_eps=0.01)
  assert cfg == mdm.SampleConfig(
    max_length=9, order='margin', token=Rule(top_p=0.9), suppressed_tokens=(1, 2, 4), noise_eps=0.01
  )
  given = mdm.SampleConfig.create({'max_length': 9, 'length': 'given'}, suppressed_tokens=(0, 1, 4))
  assert given.suppressed_tokens == (0, 1, 2, 4)


@pytest.mark.parametrize(
  ('settings', 'line'),
  [
    ({'order': 'left'}, "sampling.order='left': expected one of ancestral, top_probability, margin, entropy"),
    ({'length': 'long'}, "sampling.length='long': expected one of predicted, given"),
    ({'max_steps': 0}, 'sampling.max_steps=0: expected at least 1'),
    ({'score_draws': 3}, 'sampling.score_draws=3: expected an even number of at least 2'),
  ],
)
def test_invalid_sampling_settings_are_rejected_with_a_one_line_message(settings, line):
  assert error_line(mdm.SampleConfig.create, {'max_length': 9, **settings}, noise_eps=1e-3) == line


MDM = {'family': 'mdm', **small.NO_DROPOUT}


@pytest.mark.parametrize(
  ('changes', 'line'),
  [
    ({'corrupt.noise_eps': 0.0}, 'corrupt.noise_eps=0.0: expected a fraction above 0 and below 1'),
    ({'loss.mdm': 'elbo'}, "loss.mdm='elbo': expected one of mean_masked, nelbo"),
    ({'corrupt.length': 0}, 'sampling.max_length=22: expected corrupt.length=0, the padded length of training'),
    ({'corrupt.length': 21, 'sampling.max_length': 21}, 'corrupt.length=21: the longest example has 22 tokens'),
    ({'corrupt.length': -1}, 'corrupt.length=-1'),
    (
      {'data.batch_size': 17},
      'data.rows=8 can hold 16 examples of corrupt.length=22 tokens, fewer than data.batch_size=17: use data.rows=9',
    ),
    ({'corrupt.length': 50, 'sampling.max_length': 50}, 'data.row_length=44'),
    ({'data.targets': 20}, 'data.targets=20'),
    ({'sampling.order': 'left'}, "sampling.order='left'"),
    ({'eval.score': 'exact'}, "score: kind='exact': expected 'bound' for family=mdm"),
    ({'family': 'ilm', 'model.conditioning': 'adaln'}, "model.conditioning='adaln'"),
  ],
)  # fmt: skip
def test_invalid_configs_are_rejected_with_a_one_line_message(changes, line):
  assert error_line(experiment.build, small.config({**MDM, **changes})).startswith(line)


def test_the_config_determines_the_settings_of_the_model_and_the_sampler():
  default = experiment.build(small.config(MDM))
  assert (default.model_cfg.conditioning, default.model_cfg.residual) == ('adaln', 'input')
  assert not default.model_cfg.causal and not default.model_cfg.stop_head
  assert default.sample_cfg.suppressed_tokens == (1, 2, 3, 4, 5, 6) and default.sample_cfg.noise_eps == 1e-3
  plain = experiment.build(small.config({**MDM, 'model.conditioning': 'none', 'model.final_norm': False}))
  assert plain.model_cfg.conditioning == 'none' and not plain.model_cfg.final_norm
  parity = {'model.residual': 'modulated', 'model.d_cond': 8, 'model.final_norm': False, 'corrupt.noise_eps': 0.01}
  reference = experiment.build(small.config({**MDM, **parity}))
  assert (reference.model_cfg.residual, reference.model_cfg.d_cond) == ('modulated', 8)
  assert reference.model_cfg.final_norm and reference.sample_cfg.noise_eps == 0.01
  given = {'sampling.length': 'given', 'corrupt.length': 0, 'sampling.max_length': 30}
  assert PAD in experiment.build(small.config({**MDM, **given})).sample_cfg.suppressed_tokens


# --- with a transformer -----------------------------------------------------------------------------------------------


def test_a_training_step_gives_the_same_update_with_gradient_accumulation_and_learns_to_use_the_noise_level():
  linear = {'optimizer.eps': 1.0, 'optimizer.warmup_steps': 0, 'optimizer.learning_rate': 0.1, 'optimizer.clip': 0.0}
  made = {}
  for parts in (1, 2):
    exp, tx, schedule, state, abstract = small.experiment({**MDM, **linear, 'optimizer.accumulation_steps': parts})
    batch = small.batches(exp, 1)[0]
    made[parts] = train_step.compile_step(exp, tx, schedule, abstract)(state, batch)
  pairs = jax.device_get(made[1][1])
  assert pairs['left_out_examples'][0] == 0 and pairs['kept_tokens'][0] == 16 * 22 == pairs['original_tokens'][0]
  assert pairs['loss'][1] == (batch['tokens_BxL'] == MASK).sum() > 0 and pairs['string_bound'][1] == 16
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), made[1][0].params, made[2][0].params)
  assert pairs['update_norm'][0] > 1e-2

  # The adaLN modulations are initially 0; the training step has changed them, so the noise level now has an effect.
  run = jax.jit(
    lambda noise_BxS: transformer.apply_batch(exp.model_cfg, made[1][0].params, batch | {'noise_BxS': noise_BxS})
  )
  first, other = (run(batch['noise_BxS'] + shift).hidden_BxLxD for shift in (0.0, 1.0))
  assert np.abs(first - other).max() > 1e-4


def test_the_setting_length_given_requires_the_number_of_tokens_to_generate_in_each_prompt(params):
  cfg = mdm.SampleConfig(max_length=8, length='given', suppressed_tokens=tuple(range(7)))
  sampler = static_batching.StaticSampler(MODEL, families.get('mdm'), cfg, batch_size=3)
  prompt = {'tokens': np.array([CLS, BOS]), 'open': np.array([False, True])}
  line = error_line(lambda: list(sampler(params, jax.random.key(0), [prompt])))
  assert line.startswith("sampling.length='given' requires the number of tokens to generate ('free') in each prompt")
  line = error_line(lambda: list(sampler(params, jax.random.key(0), [{**prompt, 'free': 7}])))
  assert line == 'a prompt of 2 tokens and 7 tokens to generate exceed sampling.max_length=8: increase it'
  rows = list(sampler(params, jax.random.key(0), [{**prompt, 'free': n} for n in (5, 0, 6)]))
  assert [len(row['tokens']) for row in rows] == [7, 2, 8] and all(row['stopped'] for row in rows)
  assert [len(row['log_prob']) for row in rows] == [row['order'].max() + 1 for row in rows]


def test_forward_passes_the_noise_level_to_the_model(params):
  tokens_BxL, length_B = np.array([[CLS, BOS, MASK, MASK]]), np.array([4])
  forward = jax.jit(lambda noise_BxS: transformer.Forward(MODEL, params)(tokens_BxL, length_B, noise_BxS).hidden_BxLxD)
  assert np.abs(forward(np.array([[0.1]])) - forward(np.array([[3.0]]))).max() > 1e-3
