"""Greedy decoding of the insertion family, compared to Python lists: limits per gap, several insertions per step."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tables
from ml_collections import ConfigDict

from ilm_jax.families import drawing, ilm
from ilm_jax.models import numerics
from ilm_jax.types import GREEDY, UNLIMITED, Rule, UserError

V, CLS, BOS = 9, 1, 2
CLOSED = (0, 1, 2)
CFG = ilm.SampleConfig(max_length=16, stop_threshold=0.6, suppressed_tokens=CLOSED, min_buffer=4)
TABLE = tables.Forward(vocab=V)

sample = jax.jit(functools.partial(ilm.sample, TABLE), static_argnames='cfg')


def requests(number=40, limits=True):
  """Make rows (tokens, open, least, most) with random open gaps, with or without limits on the tokens per gap."""
  rng, rows = np.random.default_rng(0), []
  for _ in range(number):
    n = int(rng.integers(2, 9))
    least = rng.integers(0, 4, n) if limits else np.zeros(n, int)
    most = np.where(rng.random(n) < 0.5, least + rng.integers(0, 3, n), UNLIMITED) if limits else np.full(n, UNLIMITED)
    open_ = (rng.random(n) < 0.5) & (np.arange(n) > 0)
    rows.append(([CLS, BOS, *rng.integers(3, V, n - 2).tolist()], open_, least, np.maximum(most, least)))
  return rows


def grow(row, cfg):
  """Decode one row greedily with Python lists.

  Returns:
    (items, steps, stopped): an item is (token, index of its gap in the prompt, step that inserted the token).
  """
  tokens, opens, least, most = row
  items = [(token, i if open_ else None, -1) for i, (token, open_) in enumerate(zip(tokens, opens, strict=True))]
  count, steps = dict.fromkeys(range(len(tokens)), 0), 0
  allowed = [token for token in range(V) if token not in cfg.suppressed_tokens]
  while True:
    logits, p_stop = TABLE.look_up([token for token, *_ in items])
    may = [k for k, (_, gap, _) in enumerate(items) if gap is not None and count[gap] < most[gap]]
    lacking = [k for k in may if count[items[k][1]] < least[items[k][1]]]
    lack = sum(least[gap] - count[gap] for gap in {items[k][1] for k in lacking})
    room = min(cfg.max_length - len(items), (cfg.max_steps or cfg.max_length) - steps)
    bound = most
    if p_stop >= cfg.stop_threshold and not lack and not (cfg.force_first and steps == 0):
      return items, steps, True
    if lack and (p_stop >= cfg.stop_threshold or room <= lack):
      may, bound = lacking, least
    if not may or room <= 0:
      return items, steps, False
    if cfg.joint is None:
      total = {k: math.log(sum(math.exp(logits[k, token]) for token in allowed)) for k in may}
    else:
      total = {k: max(logits[k, token] for token in allowed) for k in may}
    best = sorted(may, key=lambda k: (-total[k], k))[: cfg.gaps or None]
    if cfg.gap_threshold:
      best = [k for k in best if total[k] >= total[best[0]] + math.log(cfg.gap_threshold)]
    chosen, now, spare = [], {}, cfg.max_length - len(items) - lack
    for k in best:
      gap = items[k][1]
      now[gap] = now.get(gap, 0) + 1
      if count[gap] + now[gap] > least[gap] and count[gap] + now[gap] <= bound[gap]:
        spare -= 1
        if spare < 0:
          continue
      if count[gap] + now[gap] <= bound[gap] and len(items) + len(chosen) < cfg.max_length:
        chosen.append(k)
    for k in sorted(chosen, reverse=True):
      gap = items[k][1]
      items.insert(k + 1, (min(allowed, key=lambda token, k=k: (-logits[k, token], token)), gap, steps))
      count[gap] += 1
    steps += 1


@pytest.mark.parametrize(
  ('settings', 'limits'),
  [
    ({}, True),
    ({'joint': GREEDY}, True),
    ({'max_steps': 4}, True),
    ({'force_first': True, 'stop_threshold': 0.2}, False),
    ({'suppressed_tokens': (), 'stop_threshold': 1.0}, False),
    ({'gaps': 2}, True),
    ({'gaps': 3, 'gap_threshold': 0.3}, True),
    ({'gaps': 0, 'gap_threshold': 0.7}, False),
    ({'gaps': 0}, False),
    ({'gaps': 2**31 - 1, 'min_buffer': 10}, True),
    ({'stop_temperature': 1e-45, 'stop_threshold': 0.5}, True),  # stop exactly if p(stop) >= 0.5
  ],
  ids=str,
)
def test_greedy_decoding_equals_insertion_into_a_python_list(settings, limits):
  cfg, rows = CFG._replace(**settings), requests(limits=limits)
  out = jax.device_get(sample(jax.random.key(0), tables.make_prompt(rows, size=10), cfg=cfg))
  several, limited, full = 0, 0, 0
  for i, row in enumerate(rows):
    items, steps, stopped = grow(row, cfg)
    rest = [0] * (cfg.max_length - len(items))
    assert out.tokens_BxL[i].tolist() == [token for token, *_ in items] + rest
    assert out.order_BxL[i].tolist() == [step for *_, step in items] + [-1] * len(rest)
    assert (out.steps_B[i], out.stopped_B[i]) == (steps, stopped)
    several += len(items) - len(row[0]) > steps
    full += len(items) == cfg.max_length
    limited += not stopped and len(items) < cfg.max_length and steps < (cfg.max_steps or 99) and row[1].any()
    if len(row[0]) + row[2][row[1]].sum() <= cfg.max_length and row[2][row[1]].sum() <= (cfg.max_steps or 99):
      inside = {gap: sum(item[1:] != (gap, -1) and item[1] == gap for item in items) for gap in np.flatnonzero(row[1])}
      assert all(row[2][gap] <= number <= row[3][gap] for gap, number in inside.items())
  assert bool(several) == (cfg.gaps != 1) and bool(limited) == limits and (full or cfg.max_steps)


def test_every_step_inserts_at_least_one_token_if_gaps_below_a_threshold_are_skipped():
  cfg = CFG._replace(gaps=3, gap_threshold=0.9, gap=Rule(), token=Rule(), stop_threshold=1.0)
  out = jax.device_get(sample(jax.random.key(0), tables.make_prompt(requests(limits=False), size=10), cfg=cfg))
  for row, steps in zip(out.order_BxL.tolist(), out.steps_B.tolist(), strict=True):
    assert set(row) - {-1} == set(range(steps))


# --- drawing without replacement --------------------------------------------------------------------------------------


@pytest.mark.parametrize('rule', [Rule(), Rule(0.7, top_p=0.8)], ids=str)
def test_the_first_of_several_tokens_drawn_together_equals_a_token_drawn_alone(rule):
  logits = 2 * jax.random.normal(jax.random.key(0), (300, 7))
  logits = logits.at[:100, 3:].set(numerics.NEG_INF)
  rng_B = jax.random.split(jax.random.key(1), 300)
  index, ok = drawing.choose_several(rng_B, logits, rule, count=4)
  np.testing.assert_array_equal(index[:, 0], drawing.choose(rng_B, logits, rule))
  assert ok[:, 0].all() and not ok[:100, 3].any()
  assert all(len(set(row)) == 4 for row in np.asarray(index).tolist())
  assert (np.asarray(index)[:100][np.asarray(ok)[:100]] < 3).all()


def test_the_function_choose_several_draws_without_replacement():
  weight = np.array([0.5, 0.3, 0.2])
  rng_B = jax.random.split(jax.random.key(0), 40_000)
  index, _ = drawing.choose_several(rng_B, jnp.tile(jnp.log(weight), (40_000, 1)), Rule(), count=2)
  for first in range(3):
    for second in range(3):
      share = np.mean((index[:, 0] == first) & (index[:, 1] == second))
      expected = 0 if first == second else weight[first] * weight[second] / (1 - weight[first])
      assert abs(share - expected) < 0.01


# --- settings ---------------------------------------------------------------------------------------------------------


def test_sampling_settings_are_read_from_a_config():
  sampling = ConfigDict({'max_length': 9, 'gap': {'temperature': 0.0}, 'token': {'top_p': 0.9}, 'stop_threshold': 0.0})
  cfg = ilm.SampleConfig.create(sampling, suppressed_tokens=(0, 1))
  assert cfg == ilm.SampleConfig(
    max_length=9, gap=Rule(temperature=0.0), token=Rule(top_p=0.9), stop_threshold=None, suppressed_tokens=(0, 1)
  )


@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    ({'stop_threshold': -0.1}, 'stop_threshold=-0.1: expected a probability'),
    ({'stop_threshold': 1.5}, 'stop_threshold=1.5: expected a probability'),
    ({'gaps': -1}, 'gaps=-1: expected a number of gaps'),
    ({'gap_threshold': 2.0}, 'gap_threshold=2.0: expected a fraction'),
    ({'gaps': 2, 'two_stage': False, 'joint': {}}, 'gaps=2 cannot be combined with sampling.joint'),
  ],
)
def test_settings_out_of_range_are_rejected_with_a_one_line_message(settings, message):
  with pytest.raises(UserError, match=message) as error:
    ilm.SampleConfig.create({'max_length': 9, **settings})
  assert '\n' not in str(error.value)
