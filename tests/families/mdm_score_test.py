"""The NELBO of masked diffusion with a table as the model, compared to numerical integration and enumeration."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from mdm_tables import BOS, CLOSED, CLS, MASK, PAD, forward, log_probs, sigma
from ml_collections import ConfigDict

from ilm_jax.data import pipeline
from ilm_jax.families import corruption, mdm


@pytest.fixture(scope='module', autouse=True)
def programs(tmp_path_factory):
  with small.compilation_cache_in(tmp_path_factory.mktemp('programs')):
    yield


def masked_losses(text, masked, noise, closed, **settings):
  """Return {j: -log p(text[j])} for each masked index j of a text that follows [CLS] [BOS]."""
  row = (CLS, BOS, *(MASK if j in masked else token for j, token in enumerate(text)))
  log_p = log_probs(row, noise, closed, **settings)
  return {j: -log_p[2 + j, text[j]] for j in masked}


def exact_bound(text, closed, mask_probability=lambda t: t, lowest=0.0):
  """Integrate 1/t E[sum of losses] over t in (lowest, 1], where each token has mask probability mask_probability(t)."""
  nodes, weights = np.polynomial.legendre.leggauss(120)
  subsets = [d for n in range(1, len(text) + 1) for d in itertools.combinations(range(len(text)), n)]
  total = 0.0
  for node, weight in zip(nodes, weights, strict=True):
    # Substitute t = 1 - (1 - lowest) s^2: the points are dense near t = 1, where the noise level changes fastest.
    s = (node + 1) / 2
    t, jacobian = 1 - (1 - lowest) * s * s, (1 - lowest) * s * weight
    p = mask_probability(t)
    for masked in subsets:
      chance = p ** len(masked) * (1 - p) ** (len(text) - len(masked))
      total += jacobian * chance / t * sum(masked_losses(text, masked, sigma(t), closed).values())
  return total


def order_log_probs(text, closed):
  """Return log p(text, order) for each order in which single tokens are revealed; the noise level has no effect."""
  out = []
  for order in itertools.permutations(range(len(text))):
    losses = [masked_losses(text, tuple(sorted(order[i:])), 0.0, closed, tilt=0.0)[j] for i, j in enumerate(order)]
    out.append(-sum(losses))
  return out


@functools.partial(jax.jit, static_argnames=('cfg', 'forward'))
def run_score(tokens_BxL, fixed_BxL, length_B, cfg, forward):
  kind, *arrays = mdm.score(forward, jax.random.key(0), tokens_BxL, fixed_BxL, length_B, cfg)
  assert kind == 'bound'
  return arrays


def score(tokens, fixed, length, cfg, forward=forward):
  """Score rows given as lists: return (NLLs, their standard errors, list of token counts)."""
  arrays = np.array(tokens, np.int32), np.array(fixed, bool), np.array(length, np.int32)
  nll_B, error_B, tokens_B = run_score(*arrays, cfg, forward)
  return np.asarray(nll_B, np.float64), np.asarray(error_B, np.float64), tokens_B.tolist()


GIVEN = mdm.SampleConfig(max_length=8, length='given', suppressed_tokens=(*CLOSED, PAD), score_draws=8)
noiseless_forward = functools.partial(forward, tilt=0.0)


def test_the_score_is_unbiased_and_its_standard_error_is_correct():
  text, rows = (6, 5, 7), 2_000
  exact = exact_bound(text, GIVEN.suppressed_tokens)
  nll_B, error_B, tokens_B = score([[CLS, BOS, *text]] * rows, [[1, 1, 0, 0, 0]] * rows, [5] * rows, GIVEN)
  spread = nll_B.std()
  assert spread > 0.05
  assert abs(nll_B.mean() - exact) < 4 * spread / math.sqrt(rows)
  assert math.sqrt((error_B**2).mean()) == pytest.approx(spread, rel=0.1)
  assert tokens_B == [3] * rows


def test_the_bound_is_the_mean_nll_over_reveal_orders_and_above_the_exact_nll():
  closed = GIVEN.suppressed_tokens
  texts = list(itertools.product((5, 6, 7), repeat=3))
  orders = {text: order_log_probs(text, closed) for text in texts}
  total = sum(np.exp(logs).mean() for logs in orders.values())
  assert total == pytest.approx(1), 'the probabilities of all texts of this length must sum to 1'
  for text in texts[::4]:
    bound, exact = -np.mean(orders[text]), -math.log(np.exp(orders[text]).mean())
    nll_B, _, _ = score([[CLS, BOS, *text]] * 400, [[1, 1, 0, 0, 0]] * 400, [5] * 400, GIVEN, noiseless_forward)
    error = nll_B.std() / 20
    assert abs(nll_B.mean() - bound) < 4 * error
    assert nll_B.mean() > exact - 4 * error


def test_a_single_free_token_is_scored_exactly_if_the_model_ignores_the_noise_level():
  cfg = GIVEN._replace(score_draws=2)
  nll_B, error_B, _ = score([[CLS, BOS, 6]], [[1, 1, 0]], [3], cfg, noiseless_forward)
  assert nll_B[0] == pytest.approx(masked_losses((6,), (0,), 0.0, cfg.suppressed_tokens, tilt=0.0)[0], abs=1e-5)
  assert error_B[0] < 1e-6


def test_the_score_includes_the_padding_if_the_model_predicts_the_length():
  cfg = GIVEN._replace(length='predicted', max_length=6, suppressed_tokens=CLOSED)
  row, fixed = [CLS, 7, BOS, 6], [1, 1, 1, 0]
  predicted = score([row], [fixed], [4], cfg)
  padded = score([[*row, PAD, PAD]], [[*fixed, 0, 0]], [6], cfg._replace(length='given'))
  np.testing.assert_allclose(predicted[0], padded[0], rtol=1e-6)
  np.testing.assert_allclose(predicted[1], padded[1], rtol=1e-5, atol=1e-6)
  assert predicted[0] > 0 and (predicted[2], padded[2]) == ([1], [3])
  longer_buffer = score([[*row, 5, 5, 5, 5]], [[*fixed, 0, 1, 0, 1]], [4], cfg)
  assert longer_buffer[2] == [1] and longer_buffer[0][0] > 0


def test_the_nll_is_infinite_for_impossible_texts_and_zero_for_empty_rows():
  rows = [[CLS, BOS, 6, 5], [CLS, BOS, 6, BOS], [CLS, BOS, 6, PAD], [PAD] * 4, [CLS, BOS, 5, 5]]
  fixed = [[1, 1, 0, 0]] * 4 + [[1, 1, 1, 1]]
  nll_B, error_B, tokens_B = score(rows, fixed, [4, 4, 4, 0, 4], GIVEN._replace(score_draws=32))
  assert np.isfinite(nll_B).tolist() == [True, False, False, True, True]
  assert (nll_B[0] > 0, nll_B[3], nll_B[4]) == (True, 0, 0) and error_B[1:].tolist() == [0] * 4
  assert tokens_B == [2, 2, 2, 0, 0]
  short = GIVEN._replace(length='predicted', max_length=3, suppressed_tokens=CLOSED)
  assert np.isinf(score(rows[:1], fixed[:1], [4], short)[0][0]), 'a row longer than max_length cannot be sampled'


def test_the_mean_training_bound_equals_the_nelbo_integral_over_the_diffusion_times_used_in_training():
  text, number = (6, 5, 7), 6_000
  ex = {'tokens': np.array([CLS, BOS, *text], np.int32), 'fixed': np.array([True, True, False, False, False])}
  plain = ConfigDict({'length': 0, 'noise_eps': 1e-3})
  corrupted = [
    corruption.mdm(np.random.default_rng(i), ex, plain, u=(i + u) / number)
    for i, u in enumerate(np.random.default_rng(0).random(number))
  ]
  shape = pipeline.Shape(rows=200, length=5, targets=3, segments=1)
  batch = pipeline.concatenate([pipeline.pack(corrupted[i : i + 200], [0] * 200, shape) for i in range(0, number, 200)])
  assert (batch['example_id_BxS'] >= 0).all()
  cfg = ConfigDict({'mdm': 'nelbo', 'compute': 'float32', 'vocab_chunk': 5})

  @jax.jit
  def losses(batch):
    outputs = forward(batch['tokens_BxL'], jnp.full(number, 5), batch['noise_BxS'])
    weighted_BxS, _, _ = mdm.example_losses(outputs, batch)
    return weighted_BxS[:, 0] * 0.999, mdm.loss(outputs, batch, cfg)['string_bound']

  nelbo_B, (total, weight) = losses(batch)
  assert float(total / weight) == pytest.approx(float(nelbo_B.mean()), rel=1e-4)
  expected = exact_bound(text, (), mask_probability=lambda t: 0.999 * t, lowest=1e-3)
  assert abs(float(total / weight) - expected) < 4 * float(nelbo_B.std()) / math.sqrt(number)
  assert expected == pytest.approx(exact_bound(text, ()), rel=0.01)
