"""Drawing with temperature, top-k and nucleus sampling, and inserting into rows, compared to plain Python lists."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ilm_jax.families import drawing
from ilm_jax.models.numerics import NEG_INF
from ilm_jax.types import GREEDY, Rule

choose = jax.jit(drawing.choose, static_argnums=2)
restrict = jax.jit(drawing.restrict, static_argnums=1)

RULES = [
  Rule(),
  Rule(temperature=0.5),
  Rule(top_k=3),
  Rule(top_p=0.7),
  Rule(temperature=0.7, top_k=4, top_p=0.8),
]


def keys(seed, number):
  return jax.random.split(jax.random.key(seed), number)


def random_logits(*shape):
  return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


def allowed_by(logits, rule):
  """Return {index: probability} of the entries that a sampling rule allows, computed with a sorted list."""
  ranked = sorted(range(len(logits)), key=lambda i: -logits[i])  # a stable sort: equal entries stay in order
  if rule.top_k:
    ranked = ranked[: rule.top_k]
  weight = {i: np.exp(float(logits[i]) / rule.temperature) for i in ranked}
  kept, mass = [], 0.0
  for i in ranked:
    if kept and mass >= rule.top_p:
      break
    kept.append(i)
    mass += weight[i] / sum(weight.values())
  total = sum(weight[i] for i in kept)
  return {i: weight[i] / total for i in kept}


def chi_square(counts, probabilities):
  """Return Pearson's chi-square statistic, minus its mean and divided by its standard deviation."""
  expected = np.asarray(probabilities) * np.sum(counts)
  statistic, freedom = (np.square(counts - expected) / expected).sum(), len(expected) - 1
  return (statistic - freedom) / np.sqrt(2 * freedom)


@pytest.mark.parametrize('rule', RULES)
def test_the_function_choose_draws_with_the_probabilities_of_the_sampling_rule(rule):
  logits, number = np.array([0.1, -1.0, 1.5, 0.7, -0.3, 1.1], np.float32), 20_000
  drawn = choose(keys(1, number), jnp.tile(logits, (number, 1)), rule)
  counts = np.bincount(drawn, minlength=6)
  allowed = allowed_by(logits, rule)
  assert all(counts[i] == 0 for i in range(6) if i not in allowed)
  assert abs(chi_square(counts[list(allowed)], list(allowed.values()))) < 4


@pytest.mark.parametrize('rule', RULES)
def test_the_function_restrict_allows_the_entries_found_with_a_sorted_list(rule):
  logits = 2 * random_logits(50, 9)
  got = restrict(logits / rule.temperature, rule)
  for row, row_logits in zip(np.asarray(got), np.asarray(logits), strict=True):
    assert set(np.flatnonzero(row > NEG_INF / 2)) == set(allowed_by(row_logits, rule))


@pytest.mark.parametrize('top_p', [1.0, 0.6])
@pytest.mark.parametrize('temperature', [0.0, 1e-45, 1e-38, 1e-20, 1e-7, 2e-6, 1e-3, 0.5, 2.5, 1e4, 1e30])
def test_any_temperature_gives_the_frequencies_of_a_softmax_in_double_precision(temperature, top_p):
  logits = np.array([0.25, 1.5, -np.inf, 3.0, -20.0, 2.5, -np.inf], np.float64)
  exponent = np.where(logits == logits.max(), 0.0, -np.inf)
  if temperature > 0:
    exponent = (logits - logits.max()) / np.float64(temperature)
  probability, allowed = np.exp(exponent) / np.exp(exponent).sum(), np.zeros(7, bool)
  for i in np.argsort(-logits):
    if probability[allowed].sum() < top_p and probability[i] > 0:
      allowed[i] = True
  probability = np.where(allowed, probability, 0) / probability[allowed].sum()
  number, given = 4_000, jnp.asarray(np.where(np.isinf(logits), NEG_INF, logits), jnp.float32)
  rule, rngs = Rule(temperature=temperature, top_p=top_p), keys(3, number)
  drawn = np.asarray(choose(rngs, jnp.tile(given, (number, 1)), rule))
  np.testing.assert_allclose(np.bincount(drawn, minlength=7) / number, probability, atol=0.03)
  assert probability[drawn].min() > 0
  several, ok = drawing.choose_several(rngs[:50], jnp.tile(given, (50, 1)), rule, count=6)
  np.testing.assert_array_equal(several[:, 0], drawn[:50])
  assert np.isfinite(logits[np.asarray(several)[np.asarray(ok)]]).all()


def test_greedy_rules_choose_the_first_of_several_equal_maxima():
  logits = jnp.array([[1.0, 3.0, 3.0, 2.0], [5.0, 1.0, 5.0, 5.0]])
  for rule in (GREEDY, Rule(top_k=1), Rule(temperature=0.0, top_p=0.3)):
    np.testing.assert_array_equal(choose(keys(0, 2), logits, rule), [1, 0])


def test_top_k_allows_the_first_of_several_equal_entries():
  kept = restrict(jnp.array([[1.0, 2.0, 1.0, 2.0, 1.0]]), Rule(top_k=3)) > NEG_INF / 2
  np.testing.assert_array_equal(kept, [[True, True, False, True, False]])


def test_entries_with_logit_neg_inf_are_never_drawn():
  logits = jnp.tile(jnp.array([NEG_INF, 0.0, NEG_INF, 1.0]), (500, 1))
  for rule in (Rule(top_k=3), Rule(temperature=5.0, top_k=3), Rule(top_p=0.999)):
    assert set(choose(keys(0, 500), logits, rule).tolist()) == {1, 3}


def test_top_p_includes_the_entry_that_crosses_the_threshold():
  logits = jnp.log(jnp.array([[0.15, 0.5, 0.3, 0.05]]))
  for top_p, expected in [(0.6, {1, 2}), (0.45, {1}), (0.0, {1}), (0.99, {0, 1, 2, 3})]:
    kept = np.flatnonzero(restrict(logits, Rule(top_p=top_p))[0] > NEG_INF / 2)
    assert set(kept) == expected, top_p


@pytest.mark.parametrize('rule', [RULES[0], RULES[-1]])
def test_a_row_draws_the_same_index_alone_and_in_a_batch(rule):
  logits, rngs = random_logits(30, 7), keys(0, 30)
  together = choose(rngs, logits, rule).tolist()
  assert together == [int(choose(rngs[i : i + 1], logits[i : i + 1], rule)[0]) for i in range(30)]
  assert len(set(together)) > 2


@pytest.mark.parametrize('rule', [RULES[0], RULES[-1]])
def test_appending_entries_with_logit_neg_inf_does_not_change_the_draw(rule):
  logits, rngs = random_logits(200, 7), keys(0, 200)
  longer = jnp.pad(logits, ((0, 0), (0, 93)), constant_values=NEG_INF)
  np.testing.assert_array_equal(choose(rngs, logits, rule), choose(rngs, longer, rule))


def test_insert_equals_insertion_into_a_python_list():
  rng = np.random.default_rng(0)
  for _ in range(10):
    array, gap, value = rng.integers(0, 99, (6, 5)), rng.integers(0, 5, 6), rng.integers(100, 199, 6)
    go = rng.random(6) < 0.7
    got = np.asarray(drawing.insert(*map(jnp.asarray, (array, gap, value, go))))
    for b in range(6):
      row = array[b].tolist()
      if go[b]:
        row.insert(gap[b] + 1, int(value[b]))
      assert got[b].tolist() == row[:5]


def test_insert_keeps_the_dtype_of_the_array():
  array = jnp.array([[True, False, False]])
  got = drawing.insert(array, jnp.array([0]), jnp.array([1]), jnp.array([True]))
  assert got.dtype == bool and got.tolist() == [[True, True, False]]
