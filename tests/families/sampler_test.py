"""The insertion sampler on a table for a model, against growing Python lists and enumeration."""

import collections
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from tables import table

from ilm_jax.families import ilm
from ilm_jax.families.growing import buffers
from ilm_jax.types import Outputs, Prompt, Rule, UserError

V, CLS, BOS = 9, 1, 2
CLOSED = (0, 1, 2)


# --- the table: logits that are a hash of the whole row ---------------------------------------------------------------


def forward(tokens_BxL, length_B, open_BxL=None, **settings):
  del open_BxL  # it is not told
  logits_BxLxV, stop_BxSx2 = table(tokens_BxL, length_B, jnp, **settings)
  return Outputs(logits_BxLxV, jnp.eye(logits_BxLxV.shape[2]), stop_BxSx2)


@functools.partial(jax.jit, static_argnames=('cfg', 'forward'))
def sample(prompt, rng, cfg, forward=forward):
  return ilm.sample(forward, rng, prompt, cfg)


def look_up(row, **settings):
  """The table for one row of any length: logits[gap][token], p(stop)."""
  logits, stop = table(np.array([row]), np.array([len(row)]), np, **settings)
  return logits[0].astype(np.float64), 1 / (1 + math.exp(-float(stop[0, 0, 0])))


def make_prompt(rows, *, size=8, requests=None, fill=0):
  """A Prompt from lists of (tokens, open) pairs, filled up with empty rows."""
  rows = rows + [([], [])] * (fill - len(rows))
  tokens_BxL, open_BxL = np.zeros((len(rows), size), np.int32), np.zeros((len(rows), size), bool)
  for i, (tokens, open_) in enumerate(rows):
    tokens_BxL[i, : len(tokens)], open_BxL[i, : len(tokens)] = tokens, open_
  length_B = np.array([len(tokens) for tokens, _ in rows], np.int32)
  request_B = np.arange(len(rows), dtype=np.int32)
  if requests is not None:
    request_B[: len(requests)] = requests
  return jax.device_put(Prompt(tokens_BxL, length_B, open_BxL, request_B))


def prompts(number=40, seed=0):
  """Unconditional rows, prompts with one open gap at the end, and infilling with open gaps anywhere."""
  rng, rows = np.random.default_rng(seed), [([CLS, BOS], [False, True])]
  while len(rows) < number:
    tokens = [CLS, BOS, *rng.integers(3, V, rng.integers(0, 7)).tolist()]
    open_ = [False, *(rng.random(len(tokens) - 1) < 0.5).tolist()]
    if len(rows) % 3 == 0:
      open_ = [False] * (len(tokens) - 1) + [True]
    rows.append((tokens, open_))
  return rows


STOCHASTIC = ilm.SampleConfig(
  max_length=12, stop_threshold=None, gap=Rule(), token=Rule(top_p=0.9), closed_tokens=CLOSED, min_buffer=8
)


def draw(rows, *, seed=0, requests=None):
  """Sample rows with random gaps, tokens and stops, in one batch of 240."""
  return jax.device_get(sample(make_prompt(rows, requests=requests, fill=240), jax.random.key(seed), STOCHASTIC))


def strings(out):
  tokens_BxL = np.asarray(out.tokens_BxL)
  return [tokens_BxL[i, :n].tolist() for i, n in enumerate(np.asarray(out.length_B))]


# --- against a growing list -------------------------------------------------------------------------------------------


def grow(tokens, open_, cfg):
  """Sample one row greedily: tokens are appended to a list, only their positions say where they belong."""
  ids, position, closed = list(tokens), list(range(len(tokens))), [not o for o in open_]
  steps, stopped = 0, False
  while True:
    row = [token for _, token in sorted(zip(position, ids, strict=True))]
    logits, p_stop = look_up(row)
    if p_stop >= cfg.stop_threshold and not (cfg.force_first and steps == 0):
      stopped = True
      break
    if len(ids) >= cfg.max_length or (cfg.max_steps is not None and steps >= cfg.max_steps):
      break
    pairs = {}
    for place, shut in zip(position, closed, strict=True):
      for token in range(V):
        if not shut and token not in cfg.closed_tokens:
          pairs[place, token] = logits[place, token]
    if not pairs:
      break
    if cfg.joint is not None:
      gap, token = min(pairs, key=lambda pair: (-pairs[pair], pair))
    else:
      total = collections.Counter()
      for (place, _), value in pairs.items():
        total[place] += math.exp(value)
      gap = max(total, key=total.get)
      token = min((t for p, t in pairs if p == gap), key=lambda t: (-pairs[gap, t], t))
    position = [p + (p > gap) for p in position] + [gap + 1]
    ids, closed, steps = ids + [token], closed + [False], steps + 1
  age = [-1] * len(tokens) + list(range(steps))
  order = [a for _, a in sorted(zip(position, age, strict=True))]
  return [token for _, token in sorted(zip(position, ids, strict=True))], order, steps, stopped


GREEDY_CONFIGS = {
  'two-stage': {},
  'joint': {'joint': Rule(temperature=0.0)},
  'force_first': {'force_first': True, 'stop_threshold': 0.2},
  'max_steps': {'max_steps': 3, 'stop_threshold': 1.0},
  'no closed tokens': {'closed_tokens': ()},
}


@pytest.mark.parametrize('name', GREEDY_CONFIGS)
def test_the_static_buffers_give_what_growing_lists_give(name):
  settings = {'max_length': 12, 'stop_threshold': 0.6, 'closed_tokens': CLOSED, 'min_buffer': 4}
  cfg = ilm.SampleConfig(**{**settings, **GREEDY_CONFIGS[name]})
  rows = prompts()
  out = jax.device_get(sample(make_prompt(rows), jax.random.key(0), cfg))
  grown = [grow(tokens, open_, cfg) for tokens, open_ in rows]
  assert strings(out) == [tokens for tokens, _, _, _ in grown]
  for i, (tokens, order, steps, stopped) in enumerate(grown):
    assert out.order_BxL[i].tolist() == order + [-1] * (12 - len(tokens))
    assert (out.steps_B[i], out.stopped_B[i]) == (steps, stopped)
  assert (out.tokens_BxL[np.arange(12)[None] >= out.length_B[:, None]] == 0).all()
  assert sum(steps for _, _, steps, _ in grown) > 50


def test_rows_at_the_limit_of_length_are_full_and_did_not_stop():
  cfg = ilm.SampleConfig(max_length=12, stop_threshold=1.0, closed_tokens=CLOSED, min_buffer=4)
  out = jax.device_get(sample(make_prompt([([CLS, BOS], [0, 1]), ([CLS, BOS, 5], [0, 0, 0])]), jax.random.key(0), cfg))
  assert out.length_B.tolist() == [12, 3] and out.steps_B.tolist() == [10, 0] and not out.stopped_B.any()
  assert (out.tokens_BxL[0] > 0).all()


# --- what may be inserted where ---------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def drawn():
  """(rows, samples) with random gaps, tokens and stops; every prompt several times."""
  rows = prompts(30) * 8
  return rows, draw(rows)


def test_given_tokens_stay_as_they_are_and_in_order(drawn):
  rows, out = drawn
  for i, (tokens, _) in enumerate(rows):
    row, order = out.tokens_BxL[i, : out.length_B[i]], out.order_BxL[i, : out.length_B[i]]
    assert row[order < 0].tolist() == tokens
  assert (out.steps_B > 3).sum() > 20


def test_tokens_come_only_into_open_gaps(drawn):
  rows, out = drawn
  used = 0
  for i, (tokens, open_) in enumerate(rows):
    given = -1
    for order in out.order_BxL[i, : out.length_B[i]]:
      if order < 0:
        given += 1
      else:
        assert open_[given], 'what follows a given token, up to the next given one, grew out of its gap'
        used += 1
    assert given == len(tokens) - 1
  assert used == out.steps_B.sum()


def test_closed_tokens_are_never_inserted_and_the_others_are(drawn):
  _, out = drawn
  assert set(out.tokens_BxL[out.order_BxL >= 0].tolist()) == set(range(V)) - set(CLOSED)


def test_the_gap_of_cls_is_closed_whatever_the_prompt_says():
  assert strings(draw([([CLS, BOS], [1, 0])] * 20))[:20] == [[CLS, BOS]] * 20


def replay(row, order):
  """The row before each of its insertions, and (gap, token): by the order in which its tokens came."""
  for step in range(max(order) + 1):
    before = [token for token, age in zip(row, order, strict=True) if age < step]
    ages = [age for age in order if age < step]
    at = order.index(step)
    yield before, ages, sum(age < step for age in order[:at]) - 1, row[at]


def test_the_order_numbers_the_insertions_from_zero(drawn):
  (rows, out), texts = drawn, strings(drawn[1])
  for i, (tokens, _) in enumerate(rows):
    row, order = texts[i], out.order_BxL[i, : out.length_B[i]].tolist()
    assert sorted(order) == [-1] * len(tokens) + list(range(out.steps_B[i]))
    state = list(tokens)
    for before, _, gap, token in replay(row, order):
      assert before == state
      state.insert(gap + 1, token)
    assert state == row


def test_log_probabilities_are_those_of_the_admissible_pairs(drawn):
  (rows, out), texts = drawn, strings(drawn[1])
  for i, (tokens, open_) in enumerate(rows[:60]):
    row, order = texts[i], out.order_BxL[i, : out.length_B[i]].tolist()
    steps = out.steps_B[i]
    for step, (before, ages, gap, token) in enumerate(replay(row, order)):
      logits, p_stop = look_up(before)
      given = iter(open_)
      opened = [next(given) if age < 0 else True for age in ages]
      weights = [math.exp(logits[k, v]) for k in range(len(before)) if opened[k] for v in range(V) if v not in CLOSED]
      assert out.log_prob_BxM[i, step] == pytest.approx(logits[gap, token] - math.log(sum(weights)), abs=1e-5)
      assert out.stop_prob_BxM[i, step] == pytest.approx(p_stop, rel=1e-5)
    assert out.stop_prob_BxM[i, steps] == pytest.approx(look_up(row)[1], rel=1e-5), 'of the last forward pass'
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


def test_a_row_depends_on_its_request_alone():
  """Neighbours, place in the batch, size of the batch and of the buffers change neither its tokens nor their order."""
  rows, rng = prompts(8, seed=3), jax.random.key(5)
  requests = [11, 3, 7, 2**31 - 1, 0, 5, 8, 2]

  def results(numbers, *, cfg=STOCHASTIC, size=8):
    prompt = make_prompt([rows[i] for i in numbers], size=size, requests=[requests[i] for i in numbers])
    out = jax.device_get(sample(prompt, rng, cfg, patient))
    return {number: jax.tree.map(lambda x, i=i: x[i], out) for i, number in enumerate(numbers)}

  expected = results(range(8))  # buffers of 8 and 12
  assert sum(int(out.steps_B) for out in expected.values()) > 20
  variants = [
    results([5, 2, 7, 0, 1, 6, 4, 3]),
    *(results([i], cfg=STOCHASTIC._replace(min_buffer=5)) for i in range(8)),
  ]
  variants.append(results([3, 4, 6], size=12, cfg=STOCHASTIC._replace(min_buffer=64)))
  for variant in variants:
    for number, out in variant.items():
      for name in ('tokens_BxL', 'order_BxL', 'length_B', 'steps_B', 'stopped_B'):
        np.testing.assert_array_equal(getattr(out, name), getattr(expected[number], name))
      np.testing.assert_allclose(out.log_prob_BxM, expected[number].log_prob_BxM, atol=1e-5)
      np.testing.assert_allclose(out.stop_prob_BxM, expected[number].stop_prob_BxM, atol=1e-5)


def test_other_requests_and_other_keys_draw_something_else():
  rows = [([CLS, BOS], [0, 1])] * 16
  first, other = strings(draw(rows)), strings(draw(rows, seed=1))
  assert len({tuple(row) for row in first[:16]}) > 8 and first != other
  longest = max(range(16), key=lambda i: len(first[i]))
  assert strings(draw(rows, requests=[longest] * 16))[:16] == [first[longest]] * 16


def test_buffers_double_from_the_smallest_to_the_limit():
  def sizes(start, smallest, limit):
    return buffers(start, ilm.SampleConfig(max_length=limit, min_buffer=smallest))

  assert sizes(2, 64, 512) == [64, 128, 256, 512]
  assert sizes(100, 64, 300) == [128, 256, 300]
  assert sizes(128, 64, 128) == [128] and sizes(2, 64, 40) == [40] and sizes(99, 64, 40) == [40]


# --- distributions ----------------------------------------------------------------------------------------------------

MANY = 20_000


def chi_square(counts: dict, probabilities: dict) -> float:
  """Pearson's statistic minus its mean, in units of its standard deviation; cells of few counts are merged."""
  number = sum(counts.values())
  assert set(counts) <= set(probabilities), 'something impossible happened'
  rare = [key for key, p in probabilities.items() if p * number < 5]
  cells = [(counts.get(key, 0), p * number) for key, p in probabilities.items() if key not in rare]
  if rare:
    cells.append((sum(counts.get(key, 0) for key in rare), sum(probabilities[key] for key in rare) * number + 1e-9))
  statistic = sum((seen - expected) ** 2 / expected for seen, expected in cells)
  return (statistic - (len(cells) - 1)) / math.sqrt(2 * (len(cells) - 1))


patient = functools.partial(forward, stop_shift=8.0)  # seldom stops
mild = functools.partial(forward, scale=512)  # logits in [0, 2): everything is drawn often


def test_two_stages_of_plain_sampling_draw_as_one_draw_among_all_pairs():
  tokens, open_ = [CLS, BOS, 5, 3, 8], [False, True, True, False, True]
  logits, _ = look_up(tokens, scale=512)
  weight = {(k, v): math.exp(logits[k, v]) for k in (1, 2, 4) for v in range(3, V)}
  exact = {pair: w / sum(weight.values()) for pair, w in weight.items()}
  prompt = make_prompt([(tokens, open_)] * MANY)
  cfg = ilm.SampleConfig(
    max_length=6, max_steps=1, stop_threshold=1.0, gap=Rule(), token=Rule(), closed_tokens=CLOSED, min_buffer=8
  )
  for setting in (cfg, cfg._replace(joint=Rule())):
    out = jax.device_get(sample(prompt, jax.random.key(2), setting, mild))
    at = out.order_BxL.argmax(axis=1)
    pairs = collections.Counter(zip((at - 1).tolist(), out.tokens_BxL[np.arange(MANY), at].tolist(), strict=True))
    assert abs(chi_square(pairs, exact)) < 4
    seen = np.array([math.log(exact[pair]) for pair in zip(at - 1, out.tokens_BxL[np.arange(MANY), at], strict=True)])
    np.testing.assert_allclose(out.log_prob_BxM[:, 0], seen, atol=1e-5)


def test_sampled_stops_are_as_frequent_as_their_probability():
  prompt = make_prompt([([CLS, BOS, 5], [0, 1, 1])] * MANY)
  for temperature in (1.0, 3.0):
    cfg = ilm.SampleConfig(max_length=3, stop_threshold=None, stop_temperature=temperature, min_buffer=4)
    even = functools.partial(forward, stop_shift=4.0) if temperature == 1.0 else forward
    logits = table(np.array([[CLS, BOS, 5]]), np.array([3]), np, stop_shift=4.0 if temperature == 1.0 else 6.0)[1]
    p = 1 / (1 + math.exp(-logits[0, 0, 0] / temperature))
    assert 0.03 < p < 0.97
    out = sample(prompt, jax.random.key(3), cfg, even)
    share = float(out.stopped_B.mean())
    assert abs(share - p) < 4 * math.sqrt(p * (1 - p) / MANY)
    np.testing.assert_allclose(out.stop_prob_BxM[:, 0], p, rtol=1e-5)


TINY = dict(vocab=3, scale=512, stop_shift=4.5)  # every id may be inserted


@functools.cache
def tiny_table(row):
  """({(gap, token): log p}, p(stop)) of a row that starts with [CLS], whose gap is closed."""
  logits, p_stop = look_up(row, **TINY)
  total = math.log(np.exp(logits[1:]).sum())
  return {(k, v): logits[k, v] - total for k in range(1, len(row)) for v in range(3)}, p_stop


def insert(row, gap, token):
  return (*row[: gap + 1], token, *row[gap + 1 :])


def path_log_probabilities(text):
  """log of prod (1 - p(stop)) p(gap, token) along each of the L! orders in which the text can come about."""
  for order in itertools.permutations(range(len(text))):
    row, present, total = (0, 1), [], 0.0
    for j in order:
      gap = 1 + sum(i < j for i in present)
      pairs, p_stop = tiny_table(row)
      total += math.log(1 - p_stop) + pairs[gap, text[j]]
      row, present = insert(row, gap, text[j]), [*present, j]
    assert row == (0, 1, *text)
    yield total


def enumerate_strings(longest):
  """{(text, stopped): probability}, by pushing probability mass from strings to those one token longer."""
  mass, out = {(0, 1): 1.0}, {}
  for length in range(longest + 1):
    longer = collections.Counter()
    for row, p in mass.items():
      pairs, p_stop = tiny_table(row)
      out[row[2:], True] = p * p_stop
      if length == longest:
        out[row[2:], False] = p * (1 - p_stop)
      else:
        for (gap, token), log_p in pairs.items():
          longer[insert(row, gap, token)] += p * (1 - p_stop) * math.exp(log_p)
    mass = longer
  return out


def test_probabilities_of_all_strings_sum_to_one_and_are_the_frequencies_of_samples():
  exact = enumerate_strings(3)
  assert len(exact) == 1 + 3 + 9 + 2 * 27
  assert sum(exact.values()) == pytest.approx(1, abs=1e-9)
  for length in range(4):
    for text in itertools.product(range(3), repeat=length):
      paths = sum(map(math.exp, path_log_probabilities(text)))
      assert paths * tiny_table((0, 1, *text))[1] == pytest.approx(exact[text, True], rel=1e-9)

  prompt = make_prompt([((0, 1), (False, True))] * MANY)
  cfg = ilm.SampleConfig(max_length=5, stop_threshold=None, gap=Rule(), token=Rule(), min_buffer=8)
  out = jax.device_get(sample(prompt, jax.random.key(4), cfg, functools.partial(forward, **TINY)))
  texts = [tuple(row[2:]) for row in strings(out)]
  counts = collections.Counter(zip(texts, out.stopped_B.tolist(), strict=True))
  assert abs(chi_square(counts, exact)) < 4
  lengths = collections.Counter(map(len, texts))
  assert min(lengths[n] for n in range(4)) > 500, 'all lengths occur'
  for i in range(200):  # the traces of a sample multiply to the probability of its path
    text, steps, order = texts[i], out.steps_B[i], out.order_BxL[i, 2 : out.length_B[i]].tolist()
    total = out.log_prob_BxM[i, :steps].sum() + np.log1p(-out.stop_prob_BxM[i, :steps]).sum()
    orders = list(itertools.permutations(range(len(text))))
    mine = orders.index(tuple(order.index(step) for step in range(steps)))
    assert total == pytest.approx(list(path_log_probabilities(text))[mine], abs=1e-5)


def test_the_loss_times_the_number_of_sizes_is_the_bound_on_the_log_likelihood():
  """(L + 1) E_n[loss] - log L! = -E_order[log p(path)] - log p(stop) - log L! >= -log p(x)."""
  texts = [(), (2,), (0, 0), (1, 2, 1), (2, 0, 1)]
  cases = [
    (x, set(drop)) for x in texts for n in range(len(x) + 1) for drop in itertools.combinations(range(len(x)), n)
  ]
  batch = {
    'tokens_BxL': np.zeros((len(cases), 5), int), 'free_BxS': np.zeros((len(cases), 1)),
    'cls_BxS': np.zeros((len(cases), 1), int),
    'segment_weight_BxS': np.ones((len(cases), 1)), 'target_segment_BxT': np.zeros((len(cases), 3), int),
    'target_gap_BxT': np.zeros((len(cases), 3), int), 'target_token_BxT': np.zeros((len(cases), 3), int),
  }  # fmt: skip
  length_B = np.array([2 + len(text) - len(dropped) for text, dropped in cases])
  batch['segment_BxL'] = (np.arange(5)[None] < length_B[:, None]).astype(int)
  batch['open_BxL'] = np.tile(np.arange(5) > 0, (len(cases), 1))
  for row, (text, dropped) in enumerate(cases):
    kept = [j for j in range(len(text)) if j not in dropped]
    batch['tokens_BxL'][row, : length_B[row]] = [0, 1, *(text[j] for j in kept)]
    for t, j in enumerate(sorted(dropped)):
      batch['target_gap_BxT'][row, t] = 1 + sum(i < j for i in kept)
      batch['target_token_BxT'][row, t] = text[j]
      batch['target_segment_BxT'][row, t] = 1
  outputs = forward(batch['tokens_BxL'], length_B, **TINY)
  token_BxS, stop_BxS, _ = jax.jit(ilm.example_losses)(outputs, batch)
  loss_B = np.asarray(token_BxS + stop_BxS)[:, 0]

  for text in texts:
    size = len(text)
    by_number = [[] for _ in range(size + 1)]
    for (other, dropped), loss in zip(cases, loss_B, strict=True):
      if other == text:
        by_number[len(dropped)].append(loss)
    bound = sum(map(np.mean, by_number)) - math.lgamma(size + 1)
    paths, log_stop = list(path_log_probabilities(text)), math.log(tiny_table((0, 1, *text))[1])
    assert bound == pytest.approx(-np.mean(paths) - log_stop - math.lgamma(size + 1), abs=1e-5)
    assert bound >= -math.log(np.exp(paths).sum()) - log_stop - 1e-6


# --- one program ------------------------------------------------------------------------------------------------------


def primitives(jaxpr):
  for eqn in jaxpr.eqns:
    yield eqn.primitive.name
    for value in jax.tree.leaves(
      list(eqn.params.values()), is_leaf=lambda x: hasattr(x, 'eqns') or hasattr(x, 'jaxpr')
    ):
      inner = getattr(value, 'jaxpr', value)
      if hasattr(inner, 'eqns'):
        yield from primitives(inner)


def test_sampling_is_one_program_that_never_talks_to_the_host():
  program = jax.jit(lambda prompt, rng: ilm.sample(forward, rng, prompt, STOCHASTIC))
  names = set(primitives(jax.make_jaxpr(program)(make_prompt(prompts(6)), jax.random.key(0)).jaxpr))
  assert 'while' in names and not [name for name in names if 'callback' in name or 'infeed' in name]
  first = program(make_prompt(prompts(6, seed=0), size=8), jax.random.key(0))
  others = [(make_prompt(prompts(6, seed=seed), size=8), jax.random.key(seed)) for seed in (1, 2)]
  with jax.transfer_guard('disallow'):
    others = [program(*args) for args in others]
  assert program._cache_size() == 1
  assert strings(first) != strings(others[0])


# --- settings ---------------------------------------------------------------------------------------------------------


def test_settings_come_from_a_config():
  sampling = ConfigDict({'max_length': 9, 'gap': {'temperature': 0.0}, 'token': {'top_p': 0.9}, 'stop_threshold': None})
  cfg = ilm.SampleConfig.create(sampling, closed_tokens=(0, 1))
  assert cfg == ilm.SampleConfig(
    max_length=9, gap=Rule(temperature=0.0), token=Rule(top_p=0.9), stop_threshold=None, closed_tokens=(0, 1)
  )


@pytest.mark.parametrize(
  'settings', [{'max_lenght': 9}, {'max_length': 9, 'stop_threshold': -0.1}, {'max_length': 9, 'stop_threshold': 1.5}]
)
def test_odd_settings_are_refused_in_one_line(settings):
  with pytest.raises(UserError) as error:
    ilm.SampleConfig.create(ConfigDict(settings))
  assert '\n' not in str(error.value) and 'expected' in str(error.value)
