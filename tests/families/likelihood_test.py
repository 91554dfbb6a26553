"""Likelihoods of the insertion model, against sums over all orders and all strings."""

import itertools
import math

import jax
import numpy as np
import pytest
import tables

from ilm_jax.families import corruption, ilm, likelihood
from ilm_jax.special_tokens import BOS, CLS
from ilm_jax.types import Outputs, UserError

WORDS = (7, 8, 9)
CLOSED = tuple(i for i in range(10) if i not in WORDS)
FORWARD = tables.Forward(vocab=10, scale=512, stop_shift=4.0)
CFG = ilm.SampleConfig(max_length=16, closed_tokens=CLOSED)
SIZE = 10


def rows_of(strings, prompt=(8,), suffix=()):
  """(tokens_BxL, fixed_BxL, length_B) of answers behind a prompt, with given text behind them."""
  tokens_BxL, fixed_BxL = np.zeros((len(strings), SIZE), np.int32), np.ones((len(strings), SIZE), bool)
  head = [CLS, *prompt, BOS]
  for i, string in enumerate(strings):
    row = [*head, *string, *suffix]
    tokens_BxL[i, : len(row)] = row
    fixed_BxL[i, len(head) : len(head) + len(string)] = False
  return tokens_BxL, fixed_BxL, np.array([len(head) + len(s) + len(suffix) for s in strings])


def log_pairs(row, open_):
  logits, _ = FORWARD.look_up(row)
  total = math.log(sum(math.exp(logits[k, w]) for k in range(len(row)) if open_[k] for w in WORDS))
  return logits - total


def plain(tokens, fixed, *, keep):
  """What the model says with only `keep` of the tokens there: (log pi, log(1 - pi), {missing: log p})."""
  row = [t for t, k in zip(tokens, keep, strict=True) if k]
  original = [not f or (i + 1 < len(fixed) and not fixed[i + 1]) for i, f in enumerate(fixed)]
  original[0] = False
  open_ = [o for o, k in zip(original, keep, strict=True) if k]
  _, p_stop = FORWARD.look_up(row)
  if all(keep):
    return math.log(p_stop), math.log1p(-p_stop), {}
  log_p, out = log_pairs(row, open_), {}
  for j, k in enumerate(keep):
    if not k:
      out[j] = log_p[sum(keep[:j]) - 1, tokens[j]]
  return math.log(p_stop), math.log1p(-p_stop), out


def by_orders(tokens, fixed):
  """log p(x) as a sum over all orders of insertion, and each order's log-probability."""
  free = [i for i, f in enumerate(fixed) if not f]
  logs = []
  for order in itertools.permutations(free):
    keep, log_p = list(fixed), 0.0
    for j in order:
      _, go, pairs = plain(tokens, fixed, keep=keep)
      log_p += go + pairs[j]
      keep[j] = True
    logs.append(log_p + plain(tokens, fixed, keep=keep)[0])
  return np.logaddexp.reduce(logs), logs


def by_sets(tokens, fixed):
  """The expectation of the bound, from all sets of missing tokens."""
  free = [i for i, f in enumerate(fixed) if not f]
  total = -plain(tokens, fixed, keep=[True] * len(tokens))[0]
  for n in range(1, len(free) + 1):
    terms = []
    for missing in itertools.combinations(free, n):
      _, go, pairs = plain(tokens, fixed, keep=[i not in missing for i in range(len(tokens))])
      terms.append(-go - sum(pairs.values()) / n - math.log(n))
    total += np.mean(terms)
  return total


STRINGS = [(), (7,), (7, 7), (9, 8), (8, 7, 8), (9, 9, 9), (7, 8, 9, 7)]
CASES = {'prompt': {}, 'gap': {'suffix': (9, 7)}, 'nothing given': {'prompt': ()}}


@pytest.mark.parametrize('case', CASES.values(), ids=CASES)
def test_the_exact_value_is_the_sum_over_all_orders(case):
  tokens_BxL, fixed_BxL, length_B = rows_of(STRINGS, **case)
  scored = likelihood.exact(FORWARD, None, tokens_BxL, fixed_BxL, length_B, CFG, most=4)
  assert scored.tokens_B.tolist() == [len(s) for s in STRINGS] and not np.any(scored.error_B)
  for i in range(len(STRINGS)):
    n = length_B[i]
    expected, _ = by_orders(tokens_BxL[i, :n].tolist(), fixed_BxL[i, :n].tolist())
    assert scored.nll_B[i] == pytest.approx(-expected, rel=1e-5)


def test_stopped_and_living_mass_is_one():
  strings = [s for n in range(4) for s in itertools.product(WORDS, repeat=n)]
  scored = likelihood.exact(FORWARD, None, *rows_of(strings), CFG, most=3)
  mass = np.exp(-np.asarray(scored.nll_B, np.float64))
  alive = 0.0
  for s, p in zip(strings, mass, strict=True):
    if len(s) == 3:
      _, p_stop = FORWARD.look_up([CLS, 8, BOS, *s])
      alive += p / p_stop * (1 - p_stop)
  np.testing.assert_allclose(mass.sum() + alive, 1.0, atol=1e-6)
  assert 0.01 < alive < 0.99


@pytest.mark.parametrize('case', CASES.values(), ids=CASES)
def test_the_bound_and_its_tightening_estimate_what_they_say(case):
  strings = STRINGS[-3:]
  tokens_BxL, fixed_BxL, length_B = rows_of(strings, **case)
  run = jax.jit(lambda key: likelihood.bound(FORWARD, key, tokens_BxL, fixed_BxL, length_B, CFG, samples=400)[1:])
  nll_B, error_B, _ = jax.device_get(run(jax.random.key(0)))
  few, runs = 4, 200
  run = jax.jit(
    lambda key: likelihood.importance(FORWARD, key, tokens_BxL, fixed_BxL, length_B, CFG, samples=few).nll_B
  )
  tight = np.stack([run(jax.random.key(k)) for k in range(runs)])
  for i in range(len(strings)):
    n = length_B[i]
    row, fixed = tokens_BxL[i, :n].tolist(), fixed_BxL[i, :n].tolist()
    expected, logs = by_orders(row, fixed)
    mean = by_sets(row, fixed)
    assert 0 < error_B[i] < 0.2
    assert abs(nll_B[i] - mean) < 4 * error_B[i]
    # K orders drawn with replacement: the expectation of the estimate, from many draws of the enumerated orders.
    drawn = np.random.default_rng(0).choice(logs, (20_000, few))
    draws = np.log(math.factorial(len(strings[i]))) + np.logaddexp.reduce(drawn, axis=1) - math.log(few)
    error = tight[:, i].std(ddof=1) / runs**0.5
    assert abs(tight[:, i].mean() + draws.mean()) < 4 * (error + draws.std() / 20_000**0.5)
    assert -expected < -draws.mean() < mean


def test_standard_errors_are_those_of_repeated_estimates():
  rows = rows_of([(7, 8, 9, 7)])
  for kind, samples in (('bound', 8), ('importance-weighted', 64)):
    run = jax.jit(lambda key, kind=kind, k=samples: ilm.score(FORWARD, key, *rows, CFG, kind=kind, samples=k)[1:3])
    values, errors = zip(*(run(jax.random.key(k)) for k in range(150)), strict=True)
    spread, said = np.std([v[0] for v in values], ddof=1), np.sqrt(np.mean([e[0] ** 2 for e in errors]))
    assert 0.75 < said / spread < 1.33, (kind, said, spread)
  alone = ilm.score(FORWARD, jax.random.key(0), *rows, CFG, samples=1)
  assert alone.kind == 'bound' and np.isnan(alone.error_B[0])


def test_rows_that_are_too_long_and_kinds_that_are_not_there_are_said():
  scored = ilm.score(FORWARD, None, *rows_of([(7, 8, 9), (7,)]), CFG, kind='exact', most=2)
  assert np.isnan(scored.nll_B[0]) and np.isfinite(scored.nll_B[1])
  with pytest.raises(UserError, match="kind='tight': expected one of bound, importance-weighted, exact"):
    ilm.score(FORWARD, None, *rows_of([(7,)]), CFG, kind='tight')


def test_the_training_loss_is_the_bound():
  """(L + 1) E[token + stop loss] - log L! over n = 0..L, with the prompt's gaps closed (SPEC G.1's identity)."""
  tokens_BxL, fixed_BxL, length_B = rows_of([(7, 8, 9)])
  row, fixed = tokens_BxL[0, : length_B[0]].tolist(), fixed_BxL[0, : length_B[0]].tolist()
  free, losses = [i for i, f in enumerate(fixed) if not f], []
  bias = np.where(np.isin(np.arange(10), CLOSED), -1e30, 0.0).astype(np.float32)
  for n in range(len(free) + 1):
    part = []
    for missing in itertools.combinations(free, n):
      keep = np.array([i not in missing for i in range(len(row))])
      kept = np.array([row])[:, keep]
      outputs = FORWARD(kept, np.array([keep.sum()]))
      outputs = Outputs(outputs.hidden_BxLxD + bias[None, None], outputs.unembed_VxD, outputs.stop_BxSx2)
      open_ = corruption.open_gaps(np.array(fixed))[keep]
      batch = {
        'cls_BxS': np.zeros((1, 1), np.int32),
        'segment_BxL': np.ones(kept.shape, np.int32),
        'open_BxL': open_[None],
        'target_gap_BxT': np.array([[keep[:j].sum() - 1 for j in missing]], np.int32).reshape(1, -1),
        'target_token_BxT': np.array([[row[j] for j in missing]], np.int32).reshape(1, -1),
        'target_segment_BxT': np.ones((1, n), np.int32),
      }
      token, stop, _ = ilm.example_losses(outputs, batch)
      part.append(float(token[0, 0] + stop[0, 0]))
    losses.append(np.mean(part))
  assert sum(losses) - math.log(math.factorial(3)) == pytest.approx(by_sets(row, fixed), rel=1e-4)
