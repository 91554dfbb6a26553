"""Likelihoods of the insertion model, compared to sums over all insertion orders and over all strings."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tables

from ilm_jax.data import pipeline
from ilm_jax.families import corruption, ilm, likelihood
from ilm_jax.special_tokens import BOS, CLS
from ilm_jax.types import UserError

WORDS = (7, 8, 9)
CLOSED = tuple(i for i in range(10) if i not in WORDS)
FORWARD = tables.Forward(vocab=10, scale=512, stop_shift=4.0)
CFG = ilm.SampleConfig(max_length=16, suppressed_tokens=CLOSED)
SIZE = 10


def rows_of(strings, prompt=(8,), suffix=()):
  """Return (tokens_BxL, fixed_BxL, length_B) of strings of free tokens between a given prompt and a given suffix."""
  tokens_BxL, fixed_BxL = np.zeros((len(strings), SIZE), np.int32), np.ones((len(strings), SIZE), bool)
  head = [CLS, *prompt, BOS]
  for i, string in enumerate(strings):
    row = [*head, *string, *suffix]
    tokens_BxL[i, : len(row)] = row
    fixed_BxL[i, len(head) : len(head) + len(string)] = False
  return tokens_BxL, fixed_BxL, np.array([len(head) + len(s) + len(suffix) for s in strings])


def plain_rows(tokens_BxL, fixed_BxL, length_B):
  return [(t[:n].tolist(), f[:n].tolist()) for t, f, n in zip(tokens_BxL, fixed_BxL, length_B, strict=True)]


def evaluate(tokens, fixed, *, keep):
  """Evaluate the table without dropped tokens: return (log p(stop), log p(go on), {dropped index: log p(insert)})."""
  row = [t for t, k in zip(tokens, keep, strict=True) if k]
  complete = [not f or (i + 1 < len(fixed) and not fixed[i + 1]) for i, f in enumerate(fixed)]
  complete[0] = False
  open_ = [o for o, k in zip(complete, keep, strict=True) if k]
  logits, p_stop = FORWARD.look_up(row)
  if all(keep):
    return math.log(p_stop), math.log1p(-p_stop), {}
  total = math.log(sum(math.exp(logits[k, w]) for k in range(len(row)) if open_[k] for w in WORDS))
  pairs = {j: logits[sum(keep[:j]) - 1, tokens[j]] - total for j, k in enumerate(keep) if not k}
  return math.log(p_stop), math.log1p(-p_stop), pairs


def by_orders(tokens, fixed):
  """Return log p(x), computed as a sum over all insertion orders, and the log-probability of each order."""
  free = [i for i, f in enumerate(fixed) if not f]
  logs = []
  for order in itertools.permutations(free):
    keep, log_p = list(fixed), 0.0
    for j in order:
      _, go, pairs = evaluate(tokens, fixed, keep=keep)
      log_p += go + pairs[j]
      keep[j] = True
    logs.append(log_p + evaluate(tokens, fixed, keep=keep)[0])
  return np.logaddexp.reduce(logs), logs


def by_sets(tokens, fixed):
  """Return the upper bound on -log p(x), computed as a sum over all sets of missing tokens."""
  free = [i for i, f in enumerate(fixed) if not f]
  total = -evaluate(tokens, fixed, keep=[True] * len(tokens))[0]
  for n in range(1, len(free) + 1):
    terms = []
    for missing in itertools.combinations(free, n):
      _, go, pairs = evaluate(tokens, fixed, keep=[i not in missing for i in range(len(tokens))])
      terms.append(-go - sum(pairs.values()) / n - math.log(n))
    total += np.mean(terms)
  return total


def score(key, rows, **options):
  """Run `ilm.score` in one jit."""
  kinds = []

  def run(key):
    scored = ilm.score(FORWARD, key, *rows, CFG, **options)
    kinds.append(scored.kind)
    return scored[1:]

  arrays = jax.device_get(jax.jit(run)(key))
  assert kinds[0] == (options.get('kind') or 'bound')
  return arrays


STRINGS = [(), (7,), (7, 7), (9, 8), (8, 7, 8), (9, 9, 9), (7, 8, 9, 7)]
CASES = {'prompt': {}, 'gap': {'suffix': (9, 7)}, 'nothing given': {'prompt': ()}}


@pytest.mark.parametrize('case', CASES.values(), ids=CASES)
def test_the_exact_likelihood_is_the_sum_over_all_insertion_orders(case):
  rows = rows_of(STRINGS, **case)
  nll_B, error_B, tokens_B = score(None, rows, kind='exact', longest=4)
  assert tokens_B.tolist() == [len(s) for s in STRINGS] and not np.any(error_B)
  expected_B = [-by_orders(*row)[0] for row in plain_rows(*rows)]
  np.testing.assert_allclose(nll_B, expected_B, rtol=1e-5, atol=1e-6)


def test_the_probabilities_of_all_finished_and_unfinished_strings_sum_to_one():
  strings = [s for n in range(4) for s in itertools.product(WORDS, repeat=n)]
  nll_B, _, _ = score(None, rows_of(strings), kind='exact', longest=3)
  finished = np.exp(-np.asarray(nll_B, np.float64))
  unfinished = 0.0
  for s, p in zip(strings, finished, strict=True):
    if len(s) == 3:
      _, p_stop = FORWARD.look_up([CLS, 8, BOS, *s])
      unfinished += p / p_stop * (1 - p_stop)
  np.testing.assert_allclose(finished.sum() + unfinished, 1.0, atol=1e-5)
  assert 0.01 < unfinished < 0.99


@pytest.mark.parametrize('case', [CASES['prompt'], CASES['gap']], ids=['prompt', 'gap'])
def test_the_means_of_the_bound_and_of_the_importance_weighted_estimate_equal_their_expectations(case):
  strings = STRINGS[-3:]
  rows = rows_of(strings, **case)
  nll_B, error_B, _ = score(jax.random.key(0), rows, samples=400)
  few, runs = 4, 200
  run = jax.jit(lambda key: likelihood.importance(FORWARD, key, *rows, CFG, samples=few).nll_B)
  tight = np.stack([run(jax.random.key(k)) for k in range(runs)])
  for i, row in enumerate(plain_rows(*rows)):
    expected, logs = by_orders(*row)
    mean = by_sets(*row)
    assert mean == pytest.approx(-np.mean(logs) - math.lgamma(len(strings[i]) + 1), rel=1e-9), (
      'the bound computed from sets must equal the bound computed from orders'
    )
    assert 0 < error_B[i] < 0.2
    assert abs(nll_B[i] - mean) < 4 * error_B[i]
    # Simulate the importance-weighted estimate, which draws insertion orders with replacement.
    drawn = np.random.default_rng(0).choice(logs, (20_000, few))
    draws = np.log(math.factorial(len(strings[i]))) + np.logaddexp.reduce(drawn, axis=1) - math.log(few)
    error = tight[:, i].std(ddof=1) / runs**0.5
    assert abs(tight[:, i].mean() + draws.mean()) < 4 * (error + draws.std() / 20_000**0.5)
    assert -expected < -draws.mean() < mean


def test_standard_errors_match_the_spread_of_repeated_estimates():
  rows = rows_of([(7, 8, 9, 7)])
  for kind, samples in (('bound', 8), ('importance-weighted', 64)):
    run = jax.jit(lambda key, kind=kind, k=samples: ilm.score(FORWARD, key, *rows, CFG, kind=kind, samples=k)[1:3])
    values, errors = zip(*(run(jax.random.key(k)) for k in range(150)), strict=True)
    spread, reported = np.std([v[0] for v in values], ddof=1), np.sqrt(np.mean([e[0] ** 2 for e in errors]))
    assert 0.75 < reported / spread < 1.33, (kind, reported, spread)
  _, error_B, _ = score(jax.random.key(0), rows, samples=1)
  assert np.isnan(error_B[0])


def test_rows_with_too_many_free_tokens_score_nan_and_invalid_kinds_of_likelihood_are_rejected():
  nll_B, _, _ = score(None, rows_of([(7, 8, 9), (7,)]), kind='exact', most=2)
  assert np.isnan(nll_B[0]) and np.isfinite(nll_B[1])
  with pytest.raises(UserError, match="kind='tight': expected one of bound, importance-weighted, exact"):
    ilm.check_score('tight', 1)
  with pytest.raises(UserError, match=r'kind=exact takes 2.n forward passes for n tokens, and a text has 13'):
    ilm.check_score('exact', 13)


def test_the_training_loss_averaged_over_all_sets_of_dropped_tokens_gives_the_bound_on_the_nll():
  """The bound is (L + 1) E_n[token loss + stop loss] - log L!, with n = 0 .. L of the L free tokens dropped."""
  shape, losses = pipeline.Shape(rows=1, length=SIZE, targets=3, segments=1), jax.jit(ilm.example_losses)
  for row, fixed in plain_rows(*rows_of([(), (7, 7), (7, 8, 9)])):
    free, tokens, packed = np.flatnonzero(~np.array(fixed)), np.array(row, np.int32), []
    for missing in itertools.chain.from_iterable(itertools.combinations(free, n) for n in range(len(free) + 1)):
      keep = ~np.isin(np.arange(len(row)), missing)
      gaps = np.array([keep[:j].sum() - 1 for j in missing], np.int32)
      open_ = corruption.open_gaps(np.array(fixed))[keep]
      corrupted = {'tokens': tokens[keep], 'open': open_, 'target_gap': gaps, 'target_token': tokens[list(missing)]}
      packed.append(pipeline.pack([corrupted | {'length': len(row), 'free': len(free)}], [0], shape))
    batch = pipeline.concatenate(packed)
    outputs = FORWARD(batch['tokens_BxL'], (batch['segment_BxL'] > 0).sum(axis=1))
    closed_V = jnp.where(np.isin(np.arange(10), CLOSED), -1e30, 0.0)
    outputs = outputs._replace(hidden_BxLxD=outputs.hidden_BxLxD + closed_V[None, None])
    token_BxS, stop_BxS, dropped_BxS = jax.device_get(losses(outputs, batch))
    loss_BxS = token_BxS + stop_BxS
    total = sum(loss_BxS[dropped_BxS == n].mean() for n in range(len(free) + 1)) - math.lgamma(len(free) + 1)
    assert total == pytest.approx(by_sets(row, fixed), rel=1e-5, abs=1e-5)
