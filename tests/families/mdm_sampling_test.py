"""The masked diffusion sampler with a table as the model, compared to a plain loop and to enumerated probabilities."""

import collections
import functools
import itertools
import math

import jax
import numpy as np
import pytest
import small
from mdm_tables import BOS, CLOSED, CLS, MASK, PAD, V, forward, log_probs, sigma

from ilm_jax.families import mdm
from ilm_jax.types import GREEDY, Prompt, Rule


@pytest.fixture(scope='module', autouse=True)
def programs(tmp_path_factory):
  with small.compilation_cache_in(tmp_path_factory.mktemp('programs')):
    yield


@functools.partial(jax.jit, static_argnames=('cfg', 'forward'))
def sample(prompt, rng, cfg, forward=forward):
  return mdm.sample(forward, rng, prompt, cfg)


def make_prompt(rows, *, size=8, requests=None):
  """Return a Prompt from a list of (tokens, whether the gap at the end is open, number of tokens to generate)."""
  tokens_BxL, open_BxL = np.zeros((len(rows), size), np.int32), np.zeros((len(rows), size), bool)
  for i, (tokens, tail_open, _) in enumerate(rows):
    tokens_BxL[i, : len(tokens)] = tokens
    open_BxL[i, len(tokens) - 1] = tail_open and len(tokens) > 0
  length_B, free_B = np.array([len(row[0]) for row in rows], np.int32), np.array([row[2] for row in rows], np.int32)
  request_B = np.array(range(len(rows)) if requests is None else requests, np.int32)
  return Prompt(tokens_BxL, length_B, open_BxL, request_B, free_B)


def random_rows(number=24, seed=0):
  """Return rows for `make_prompt`; some accept no tokens at their end, some contain [MASK]s."""
  rng, rows = np.random.default_rng(seed), [([CLS, BOS], True, 6), ([], False, -1), ([CLS, BOS, 5], True, 0)]
  while len(rows) < number:
    tokens = [CLS, *rng.choice([MASK, 5, 6, 7], rng.integers(0, 5), p=[0.2, 0.3, 0.3, 0.2]).tolist(), BOS]
    rows.append((tokens, bool(rng.random() < 0.8), int(rng.integers(0, 6))))
  return rows


# --- revealing by certainty, compared to a plain loop -----------------------------------------------------------------


def denoise(tokens, tail_open, free, cfg):
  """Sample one row greedily, the most certain tokens first; return (tokens, order, log-probability of each step)."""
  new = cfg.max_length - len(tokens)
  new = new if cfg.length == 'predicted' else min(max(free, 0), new)
  row = list(tokens) + [MASK] * (new if tail_open else 0)
  masks = row.count(MASK)
  steps = min(masks, cfg.max_steps or cfg.max_length)
  order, sums = [-1] * len(row), []
  for step in range(steps):
    places = [i for i, token in enumerate(row) if token == MASK]
    noise = sigma(len(places) / masks, cfg.noise_eps)
    padded = tuple(row + [PAD] * (cfg.max_length - len(row)) if cfg.length == 'predicted' else row)
    generated = log_probs(padded, noise, cfg.suppressed_tokens)
    given = log_probs(padded, noise, (*cfg.suppressed_tokens, PAD))  # a [MASK] of the prompt is never filled with [PAD]
    log_p = {i: given[i] if i < len(tokens) else generated[i] for i in places}
    certainty = {}
    for i in places:
      probs = sorted((math.exp(x) for x in log_p[i] if x > -math.inf), reverse=True)
      certainty[i] = {
        'top_probability': probs[0],
        'margin': probs[0] - probs[1],
        'entropy': sum(p * math.log(p) for p in probs),
      }[cfg.order]
    masks_after = masks * (steps - 1 - step) // steps
    chosen = sorted(places, key=lambda i: (-certainty[i], i))[: len(places) - masks_after]
    assert chosen
    sums.append(sum(log_p[i].max() for i in chosen))
    for i in chosen:
      row[i], order[i] = int(log_p[i].argmax()), step
  kept = [i for i in range(len(row)) if row[i] != PAD or order[i] < 0]
  return [row[i] for i in kept], [order[i] for i in kept], sums


@pytest.mark.parametrize(
  ('order', 'length', 'steps'),
  [('top_probability', 'predicted', 3), ('margin', 'given', 3), ('entropy', 'predicted', None)],
)
def test_the_most_certain_tokens_are_revealed_first_as_in_a_plain_loop(order, length, steps):
  closed = CLOSED if length == 'predicted' else (*CLOSED, PAD)
  cfg = mdm.SampleConfig(
    max_length=11, max_steps=steps, order=order, length=length, token=GREEDY, suppressed_tokens=closed, noise_eps=0.01
  )
  rows, removed = random_rows(), 0
  out = jax.device_get(sample(make_prompt(rows), jax.random.key(0), cfg))
  for i, row in enumerate(rows):
    tokens, steps_of_tokens, sums = denoise(*row, cfg)
    assert out.tokens_BxL[i].tolist() == tokens + [0] * (11 - len(tokens))
    assert out.order_BxL[i].tolist() == steps_of_tokens + [-1] * (11 - len(tokens))
    assert (out.length_B[i], out.steps_B[i]) == (len(tokens), len(sums))
    expected = sums + [0.0] * (out.log_prob_BxM.shape[1] - len(sums))
    np.testing.assert_allclose(out.log_prob_BxM[i], expected, atol=1e-4)
    removed += 11 - len(tokens) if row[1] else 0
  np.testing.assert_array_equal(out.stopped_B, [len(row[0]) > 0 for row in rows])
  assert not out.stop_prob_BxM.any() and out.log_prob_BxM.shape == (len(rows), steps or 11)
  assert steps is None or out.steps_B.max() == steps
  assert length == 'given' or removed > 10, 'too few [PAD]s were generated to test their removal'


@pytest.mark.parametrize(('order', 'steps'), [('ancestral', 1), ('ancestral', 7), ('top_probability', 30)])
def test_no_mask_remains_after_the_last_step(order, steps):
  cfg = mdm.SampleConfig(max_length=12, max_steps=steps, order=order, suppressed_tokens=(*CLOSED, PAD), length='given')
  rows = random_rows(40, seed=1)
  out = jax.device_get(sample(make_prompt(rows), jax.random.key(3), cfg))
  assert not (out.tokens_BxL == MASK).any()
  assert out.order_BxL.max() < steps and out.steps_B.max() <= steps
  np.testing.assert_array_equal(out.order_BxL.max(axis=1) + 1, out.steps_B)
  for i, (tokens, tail_open, free) in enumerate(rows):
    assert out.length_B[i] == len(tokens) + (free if tail_open else 0)
    row, order_of_tokens = out.tokens_BxL[i, : out.length_B[i]], out.order_BxL[i, : out.length_B[i]]
    assert row[order_of_tokens < 0].tolist() == [token for token in tokens if token != MASK], (
      'a given token was replaced'
    )
    assert set(row[order_of_tokens >= 0].tolist()) <= {5, 6, 7}


def test_no_tokens_are_generated_if_their_number_is_unknown_and_max_length_limits_a_large_number():
  cfg = mdm.SampleConfig(max_length=6, length='given', suppressed_tokens=(*CLOSED, PAD))
  out = sample(make_prompt([([CLS, BOS], True, -1), ([CLS, BOS], True, 50)]), jax.random.key(0), cfg)
  assert out.length_B.tolist() == [2, 6]


# --- ancestral sampling, compared to enumeration ----------------------------------------------------------------------


def chi_square(counts: dict, probabilities: dict) -> float:
  """Return Pearson's chi-square statistic, minus its mean and divided by its standard deviation."""
  number = sum(counts.values())
  assert set(counts) <= set(probabilities), 'an outcome of probability 0 occurred'
  assert min(probabilities.values()) * number > 5, 'too few samples for the test'
  statistic = sum((counts.get(key, 0) - p * number) ** 2 / (p * number) for key, p in probabilities.items())
  return (statistic - (len(probabilities) - 1)) / math.sqrt(2 * (len(probabilities) - 1))


EVEN = {'scale': 1024, 'tilt': 1 / 16}  # nearly uniform distributions, so that every outcome occurs often
even_forward = functools.partial(forward, **EVEN)


def test_ancestral_samples_follow_the_enumerated_distribution():
  """Each token is revealed at a uniformly random step and drawn given the row and the noise level before this step."""
  number, steps, exact = 30_000, 3, {}
  closed = (*CLOSED, PAD)
  for times in itertools.product(range(steps), repeat=2):
    for text in itertools.product((5, 6, 7), repeat=2):
      p = steps**-2
      for j in range(2):
        row = (CLS, BOS, *(text[k] if times[k] < times[j] else MASK for k in range(2)))
        p *= math.exp(log_probs(row, sigma(1 - times[j] / steps), closed, **EVEN)[2 + j, text[j]])
      exact[text, times] = p
  assert sum(exact.values()) == pytest.approx(1)
  cfg = mdm.SampleConfig(max_length=6, max_steps=steps, length='given', suppressed_tokens=closed)
  out = jax.device_get(sample(make_prompt([([CLS, BOS], True, 2)] * number), jax.random.key(1), cfg, even_forward))
  pairs = zip(out.tokens_BxL[:, 2:4].tolist(), out.order_BxL[:, 2:4].tolist(), strict=True)
  outcomes = [(tuple(text), tuple(times)) for text, times in pairs]
  assert abs(chi_square(collections.Counter(outcomes), exact)) < 4
  for i in range(300):
    assert out.log_prob_BxM[i].sum() == pytest.approx(math.log(exact[outcomes[i]] * steps**2), abs=1e-4)


# --- independence -----------------------------------------------------------------------------------------------------


def test_a_row_depends_only_on_its_own_request():
  """Other rows, batch position, batch size and prompt buffer size change neither its tokens nor their order."""
  rows, requests = random_rows(8, seed=3), [11, 3, 7, 2**31 - 1, 0, 5, 8, 2]
  cfg = mdm.SampleConfig(max_length=12, max_steps=5, order='margin', token=Rule(top_p=0.9), suppressed_tokens=CLOSED)

  def results(numbers, size=8):
    prompt = make_prompt([rows[i] for i in numbers], size=size, requests=[requests[i] for i in numbers])
    out = jax.device_get(sample(prompt, jax.random.key(5), cfg))
    return {number: jax.tree.map(lambda x, i=i: x[i], out) for i, number in enumerate(numbers)}

  expected = results(range(8))
  assert len({tuple(out.tokens_BxL) for out in expected.values()}) > 6
  for variant in (results([5, 2, 7, 0, 1, 6, 4, 3]), results([7], size=12)):
    for number, out in variant.items():
      for name in ('tokens_BxL', 'order_BxL', 'length_B', 'steps_B', 'stopped_B'):
        np.testing.assert_array_equal(getattr(out, name), getattr(expected[number], name))
      np.testing.assert_allclose(out.log_prob_BxM, expected[number].log_prob_BxM, atol=1e-5)


def test_different_requests_and_seeds_give_different_samples():
  cfg = mdm.SampleConfig(max_length=10, length='given', suppressed_tokens=(*CLOSED, PAD))
  rows = [([CLS, BOS], True, 8)] * 12
  first = sample(make_prompt(rows), jax.random.key(0), cfg).tokens_BxL.tolist()
  assert len({tuple(row) for row in first}) > 8
  assert sample(make_prompt(rows), jax.random.key(1), cfg).tokens_BxL.tolist() != first
  same = sample(make_prompt(rows, requests=[4] * 12), jax.random.key(0), cfg).tokens_BxL.tolist()
  assert same == [first[4]] * 12


# --- compilation ------------------------------------------------------------------------------------------------------

CFG = mdm.SampleConfig(max_length=10, suppressed_tokens=CLOSED)


def test_samples_do_not_depend_on_how_many_positions_are_drawn_at_a_time(monkeypatch):
  prompt, rng = make_prompt(random_rows(6)), jax.random.key(0)
  expected = sample(prompt, rng, CFG)
  monkeypatch.setattr(mdm, 'MAX_LOGITS', 6 * V * 3)  # of 10 positions in 6 rows, draw 3, 3, 3 and 1 at a time
  got = jax.jit(lambda prompt: mdm.sample(forward, rng, prompt, CFG))(prompt)
  np.testing.assert_array_equal(got.tokens_BxL, expected.tokens_BxL)
  np.testing.assert_array_equal(got.order_BxL, expected.order_BxL)


def test_sampling_is_one_compiled_program_without_host_synchronization():
  program = jax.jit(lambda prompt, rng: mdm.sample(forward, rng, prompt, CFG))
  text = str(jax.make_jaxpr(program)(make_prompt(random_rows(6)), jax.random.key(0)))
  assert 'while' in text and 'callback' not in text
  first, second = ((jax.device_put(make_prompt(random_rows(6, seed))), jax.random.key(seed)) for seed in (0, 1))
  program(*first)
  with jax.transfer_guard('disallow'):
    program(*second)
  assert program._cache_size() == 1
