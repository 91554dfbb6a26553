"""Random sampling from the insertion family with a table as the model: replayed insertions, enumerated strings."""

import collections
import functools
import math

import jax
import numpy as np
import pytest
import tables
from tables import make_prompt

from ilm_jax.families import ilm
from ilm_jax.families.growing import buffers
from ilm_jax.types import Rule

V, CLS, BOS = 9, 1, 2
CLOSED = (0, 1, 2)
TABLE = tables.Forward(vocab=V)


@functools.partial(jax.jit, static_argnames=('cfg', 'forward'))
def sample(prompt, rng, cfg, forward=TABLE):
  return ilm.sample(forward, rng, prompt, cfg)


def prompts(number=30, seed=0):
  """Make (tokens, open) rows: unconditional, with one open gap at the end, and with open gaps anywhere."""
  rng, rows = np.random.default_rng(seed), [([CLS, BOS], [False, True])]
  while len(rows) < number:
    tokens = [CLS, BOS, *rng.integers(3, V, rng.integers(0, 7)).tolist()]
    open_ = [False, *(rng.random(len(tokens) - 1) < 0.5).tolist()]
    if len(rows) % 3 == 0:
      open_ = [False] * (len(tokens) - 1) + [True]
    rows.append((tokens, open_))
  return rows


RANDOM = ilm.SampleConfig(
  max_length=12, stop_threshold=None, gap=Rule(), token=Rule(top_p=0.9), suppressed_tokens=CLOSED, min_buffer=8
)


def draw(rows, *, seed=0, requests=None):
  """Sample completions of `rows`, padded with empty rows to a batch of 240; gaps, tokens and stopping are random."""
  return jax.device_get(sample(make_prompt(rows, requests=requests, fill=240), jax.random.key(seed), RANDOM))


def strings(out):
  tokens_BxL = np.asarray(out.tokens_BxL)
  return [tokens_BxL[i, :n].tolist() for i, n in enumerate(np.asarray(out.length_B))]


# --- admissible insertions --------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def drawn():
  """Return (prompts, samples); every prompt is sampled eight times."""
  rows = prompts() * 8
  return rows, draw(rows)


def replay(row, order):
  """Yield (tokens before an insertion, steps that inserted them, gap, new token) for each insertion in `order`."""
  for step in range(max(order) + 1):
    before = [token for token, age in zip(row, order, strict=True) if age < step]
    ages = [age for age in order if age < step]
    at = order.index(step)
    yield before, ages, sum(age < step for age in order[:at]) - 1, row[at]


def test_replaying_the_recorded_order_turns_the_prompt_into_the_sample(drawn):
  (rows, out), texts = drawn, strings(drawn[1])
  assert (out.steps_B > 3).sum() > 20
  for i, (tokens, open_) in enumerate(rows):
    order = out.order_BxL[i, : out.length_B[i]].tolist()
    assert sorted(order) == [-1] * len(tokens) + list(range(out.steps_B[i]))
    state, given = list(tokens), iter(open_)
    for before, _, gap, token in replay(texts[i], order):
      assert before == state
      state.insert(gap + 1, token)
    assert state == texts[i]
    for age in order:
      if age < 0:
        gap_is_open = next(given)
      else:
        assert gap_is_open, 'a token was inserted into a gap that the prompt does not open'
  assert set(out.tokens_BxL[out.order_BxL >= 0].tolist()) == set(range(V)) - set(CLOSED)


def test_nothing_is_inserted_right_of_cls_even_if_the_prompt_opens_this_gap():
  assert strings(draw([([CLS, BOS], [1, 0])] * 20))[:20] == [[CLS, BOS]] * 20


def test_recorded_log_probabilities_are_normalized_over_open_gaps_and_allowed_tokens(drawn):
  (rows, out), texts = drawn, strings(drawn[1])
  for i, (tokens, open_) in enumerate(rows[:60]):
    row, order = texts[i], out.order_BxL[i, : out.length_B[i]].tolist()
    steps = out.steps_B[i]
    for step, (before, ages, gap, token) in enumerate(replay(row, order)):
      logits, p_stop = TABLE.look_up(before)
      given = iter(open_)
      opened = [next(given) if age < 0 else True for age in ages]
      weights = [math.exp(logits[k, v]) for k in range(len(before)) if opened[k] for v in range(V) if v not in CLOSED]
      assert out.log_prob_BxM[i, step] == pytest.approx(logits[gap, token] - math.log(sum(weights)), abs=1e-5)
      assert out.stop_prob_BxM[i, step] == pytest.approx(p_stop, rel=1e-5)
    assert out.stop_prob_BxM[i, steps] == pytest.approx(TABLE.look_up(row)[1], rel=1e-5), (
      'p(stop) of the last forward pass must be recorded'
    )
    assert (out.log_prob_BxM[i, steps:] == 0).all() and (out.stop_prob_BxM[i, steps + 1 :] == 0).all()
    assert len(row) == len(tokens) + steps


def test_empty_rows_stay_empty():
  out = draw([([CLS, BOS], [0, 1]), ([], [])] * 20)
  for i in (1, 3, 39, 40, 239):
    assert (out.length_B[i], out.steps_B[i], out.stopped_B[i]) == (0, 0, False)
    assert not out.tokens_BxL[i].any() and (out.order_BxL[i] == -1).all()
    assert not out.log_prob_BxM[i].any() and not out.stop_prob_BxM[i].any()
  assert (out.length_B[:40:2] >= 2).all() and (out.length_B[:40:2] > 2).any()


# --- independence -----------------------------------------------------------------------------------------------------


def test_a_sample_does_not_depend_on_other_rows_batch_position_or_buffer_sizes():
  rows, requests, rng = prompts(8, seed=3), [11, 3, 7, 2**31 - 1, 0, 5, 8, 2], jax.random.key(5)
  rarely_stops = tables.Forward(vocab=V, stop_shift=8.0)

  def results(numbers, cfg=RANDOM):
    prompt = make_prompt([rows[i] for i in numbers], requests=[requests[i] for i in numbers])
    out = jax.device_get(sample(prompt, rng, cfg, rarely_stops))
    return {number: jax.tree.map(lambda x, i=i: x[i], out) for i, number in enumerate(numbers)}

  expected = results(range(8))  # the token buffer has 8, later 12 positions
  assert sum(int(out.steps_B) for out in expected.values()) > 20
  other_buffers = RANDOM._replace(min_buffer=5)  # the token buffer has 10, later 12 positions
  for variant in (results([5, 2, 7, 0, 1, 6, 4, 3]), *(results([i], other_buffers) for i in range(8))):
    for number, out in variant.items():
      for name in ('tokens_BxL', 'order_BxL', 'length_B', 'steps_B', 'stopped_B'):
        np.testing.assert_array_equal(getattr(out, name), getattr(expected[number], name))
      np.testing.assert_allclose(out.log_prob_BxM, expected[number].log_prob_BxM, atol=1e-5)
      np.testing.assert_allclose(out.stop_prob_BxM, expected[number].stop_prob_BxM, atol=1e-5)


def test_different_request_ids_and_different_rng_keys_give_different_samples():
  rows = [([CLS, BOS], [0, 1])] * 16
  first, other = strings(draw(rows)), strings(draw(rows, seed=1))
  assert len({tuple(row) for row in first[:16]}) > 8 and first != other
  longest = max(range(16), key=lambda i: len(first[i]))
  assert strings(draw(rows, requests=[longest] * 16))[:16] == [first[longest]] * 16


def test_buffer_sizes_double_from_min_buffer_to_max_length():
  def sizes(start, smallest, limit):
    return buffers(start, ilm.SampleConfig(max_length=limit, min_buffer=smallest))

  assert sizes(2, 64, 512) == [64, 128, 256, 512]
  assert sizes(100, 64, 300) == [128, 256, 300]
  assert sizes(128, 64, 128) == [128] and sizes(2, 64, 40) == [40] and sizes(99, 64, 40) == [40]


# --- distributions ----------------------------------------------------------------------------------------------------

MANY = 20_000


def chi_square(counts: dict, probabilities: dict) -> float:
  """Return Pearson's chi-square statistic, minus its mean, in standard deviations; rare outcomes are pooled."""
  number = sum(counts.values())
  assert set(counts) <= set(probabilities), 'an outcome of probability 0 was drawn'
  rare = [key for key, p in probabilities.items() if p * number < 5]
  cells = [(counts.get(key, 0), p * number) for key, p in probabilities.items() if key not in rare]
  if rare:
    cells.append((sum(counts.get(key, 0) for key in rare), sum(probabilities[key] for key in rare) * number + 1e-9))
  statistic = sum((seen - expected) ** 2 / expected for seen, expected in cells)
  return (statistic - (len(cells) - 1)) / math.sqrt(2 * (len(cells) - 1))


def test_drawing_a_gap_then_a_token_gives_the_distribution_of_drawing_a_pair():
  tokens, open_ = [CLS, BOS, 5, 3, 8], [False, True, True, False, True]
  flat = tables.Forward(vocab=V, scale=512)  # logits in [0, 2), so that every pair is drawn often
  logits, _ = flat.look_up(tokens)
  weight = {(k, v): math.exp(logits[k, v]) for k in (1, 2, 4) for v in range(3, V)}
  exact = {pair: w / sum(weight.values()) for pair, w in weight.items()}
  prompt = make_prompt([(tokens, open_)] * MANY)
  cfg = ilm.SampleConfig(
    max_length=6, max_steps=1, stop_threshold=1.0, gap=Rule(), token=Rule(), suppressed_tokens=CLOSED, min_buffer=8
  )
  for setting in (cfg, cfg._replace(joint=Rule())):
    out = jax.device_get(sample(prompt, jax.random.key(2), setting, flat))
    at = out.order_BxL.argmax(axis=1)
    pairs = list(zip((at - 1).tolist(), out.tokens_BxL[np.arange(MANY), at].tolist(), strict=True))
    assert abs(chi_square(collections.Counter(pairs), exact)) < 4
    np.testing.assert_allclose(out.log_prob_BxM[:, 0], [math.log(exact[pair]) for pair in pairs], atol=1e-5)


def test_the_frequency_of_stopping_equals_the_stop_probability_at_the_stop_temperature():
  row, temperature = [CLS, BOS, 5], 3.0
  _, p = TABLE.look_up(row)
  p = 1 / (1 + ((1 - p) / p) ** (1 / temperature))
  assert 0.03 < p < 0.97
  cfg = ilm.SampleConfig(max_length=3, stop_threshold=None, stop_temperature=temperature, min_buffer=4)
  out = sample(make_prompt([(row, [0, 1, 1])] * MANY), jax.random.key(3), cfg)
  assert abs(float(out.stopped_B.mean()) - p) < 4 * math.sqrt(p * (1 - p) / MANY)
  np.testing.assert_allclose(out.stop_prob_BxM[:, 0], p, rtol=1e-5)


TINY = tables.Forward(vocab=3, scale=512, stop_shift=4.5)  # all 3 tokens can be sampled


def enumerate_strings(longest):
  """Return {(text, stopped): probability}, computed for all strings of each length from those one token shorter."""
  mass, out = {(0, 1): 1.0}, {}
  for length in range(longest + 1):
    longer = collections.Counter()
    for row, p in mass.items():
      logits, p_stop = TINY.look_up(row)
      weight = np.exp(logits[1:]) / np.exp(logits[1:]).sum()  # the gap of [CLS], at position 0, is closed
      out[row[2:], True] = p * p_stop
      if length == longest:
        out[row[2:], False] = p * (1 - p_stop)
      else:
        for (k, token), share in np.ndenumerate(weight):
          longer[*row[: k + 2], token, *row[k + 2 :]] += p * (1 - p_stop) * share
    mass = longer
  return out


def test_strings_are_sampled_with_their_enumerated_probabilities():
  exact = enumerate_strings(3)
  assert len(exact) == 1 + 3 + 9 + 2 * 27
  assert sum(exact.values()) == pytest.approx(1, abs=1e-9)
  prompt = make_prompt([((0, 1), (False, True))] * MANY)
  cfg = ilm.SampleConfig(max_length=5, stop_threshold=None, gap=Rule(), token=Rule(), min_buffer=8)
  out = jax.device_get(sample(prompt, jax.random.key(4), cfg, TINY))
  texts = [tuple(row[2:]) for row in strings(out)]
  counts = collections.Counter(zip(texts, out.stopped_B.tolist(), strict=True))
  assert abs(chi_square(counts, exact)) < 4
  lengths = collections.Counter(map(len, texts))
  assert min(lengths[n] for n in range(4)) > 500, 'every length must occur often'


# --- compilation ------------------------------------------------------------------------------------------------------


def test_sampling_is_one_compiled_program_without_host_communication(drawn):
  del drawn  # this fixture has already compiled the program
  args = [(make_prompt(prompts(6, seed=seed), fill=240), jax.random.key(seed)) for seed in (0, 1)]
  jaxpr = str(jax.make_jaxpr(lambda prompt, rng: sample(prompt, rng, RANDOM))(*args[0]))
  assert 'while[' in jaxpr and 'callback' not in jaxpr and 'infeed' not in jaxpr
  programs = sample._cache_size()
  with jax.transfer_guard('disallow'):
    first, second = (sample(prompt, rng, RANDOM) for prompt, rng in args)
  assert sample._cache_size() == programs
  assert strings(first) != strings(second)
