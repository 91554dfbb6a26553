"""Several insertions in a step, and the least and most tokens of a gap, against growing Python lists."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tables

from ilm_jax.families import drawing, ilm
from ilm_jax.models import numerics
from ilm_jax.types import UNLIMITED, Prompt, Rule, UserError

V, CLS, BOS = 9, 1, 2
CLOSED = (0, 1, 2)
CFG = ilm.SampleConfig(max_length=16, stop_threshold=0.6, closed_tokens=CLOSED, min_buffer=4)
TABLE = tables.Forward(vocab=V)


@functools.partial(jax.jit, static_argnames='cfg')
def sample(prompt, rng, cfg):
  return ilm.sample(TABLE, rng, prompt, cfg)


def requests(number=40, limits=True):
  """(tokens, open, least, most) of rows with gaps anywhere."""
  rng, rows = np.random.default_rng(0), []
  for _ in range(number):
    n = int(rng.integers(2, 9))
    least = rng.integers(0, 4, n) if limits else np.zeros(n, int)
    most = np.where(rng.random(n) < 0.5, least + rng.integers(0, 3, n), UNLIMITED) if limits else np.full(n, UNLIMITED)
    open_ = (rng.random(n) < 0.5) & (np.arange(n) > 0)
    rows.append(([CLS, BOS, *rng.integers(3, V, n - 2).tolist()], open_, least, np.maximum(most, least)))
  return rows


def prompt_of(rows, size=10):
  def stack(which, fill, kind):
    out = np.full((len(rows), size), fill, kind)
    for i, row in enumerate(rows):
      out[i, : len(row[which])] = row[which]
    return out

  arrays = [stack(0, 0, np.int32), stack(1, False, bool), stack(2, 0, np.int32), stack(3, UNLIMITED, np.int32)]
  length_B = np.array([len(row[0]) for row in rows])
  return Prompt(arrays[0], length_B, arrays[1], np.arange(len(rows)), least_BxL=arrays[2], most_BxL=arrays[3])


def grow(row, cfg):
  """Sample one row greedily; each token carries the number of its gap, each gap counts what came into it."""
  tokens, opens, least, most = row
  items = [(token, i if open_ else None, -1) for i, (token, open_) in enumerate(zip(tokens, opens, strict=True))]
  count, steps = dict.fromkeys(range(len(tokens)), 0), 0
  while True:
    logits, p_stop = tables.Forward(vocab=V).look_up([token for token, *_ in items])
    may = [k for k, (_, gap, _) in enumerate(items) if gap is not None and count[gap] < most[gap]]
    lacking = [k for k in may if count[items[k][1]] < least[items[k][1]]]
    lack = sum(least[gap] - count[gap] for gap in {items[k][1] for k in lacking})
    room = min(cfg.max_length - len(items), (cfg.max_steps or cfg.max_length) - steps)
    bound = most
    if p_stop >= cfg.stop_threshold and not lack:
      return items, steps, True
    if lack and (p_stop >= cfg.stop_threshold or room <= lack):
      may, bound = lacking, least
    if not may or room <= 0:
      return items, steps, False
    allowed = [token for token in range(V) if token not in CLOSED]
    total = {k: math.log(sum(math.exp(logits[k, token]) for token in allowed)) for k in may}
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


@pytest.mark.parametrize('limits', [False, True], ids=['unlimited', 'limits'])
@pytest.mark.parametrize(
  'settings',
  [
    {},
    {'max_steps': 4},
    {'gaps': 2},
    {'gaps': 3, 'gap_threshold': 0.3},
    {'gaps': 0},
    {'gaps': 0, 'gap_threshold': 0.7},
    {'gaps': 40},
  ],
  ids=str,
)
def test_rows_are_those_of_growing_lists(settings, limits):
  cfg, rows = CFG._replace(**settings), requests(limits=limits)
  out = jax.device_get(sample(prompt_of(rows), jax.random.key(0), cfg))
  many, limited = 0, 0
  for i, row in enumerate(rows):
    items, steps, stopped = grow(row, cfg)
    assert out.tokens_BxL[i, : out.length_B[i]].tolist() == [token for token, *_ in items]
    assert out.order_BxL[i, : out.length_B[i]].tolist() == [step for *_, step in items]
    assert (out.steps_B[i], out.stopped_B[i]) == (steps, stopped)
    many += len(items) - len(row[0]) > steps
    limited += not stopped and len(items) < cfg.max_length and steps < (cfg.max_steps or 99) and row[1].any()
    if len(row[0]) + row[2][row[1]].sum() <= cfg.max_length and row[2][row[1]].sum() <= (cfg.max_steps or 99):
      inside = {gap: sum(item[1:] != (gap, -1) and item[1] == gap for item in items) for gap in np.flatnonzero(row[1])}
      assert all(row[2][gap] <= number <= row[3][gap] for gap, number in inside.items())
  assert bool(many) == (cfg.gaps != 1) and bool(limited) == limits


@pytest.mark.parametrize('rule', [Rule(), Rule(0.7, top_p=0.8)], ids=str)
def test_one_gap_of_several_is_the_one_of_a_single_draw(rule):
  logits = 2 * jax.random.normal(jax.random.key(0), (300, 7))
  logits = logits.at[:100, 3:].set(numerics.NEG_INF)
  rng_B = jax.random.split(jax.random.key(1), 300)
  index, ok = drawing.choose_several(rng_B, logits, rule, count=4)
  np.testing.assert_array_equal(index[:, 0], drawing.choose(rng_B, logits, rule))
  assert ok[:, 0].all() and not ok[:100, 3].any()
  assert all(len(set(row)) == 4 for row in np.asarray(index).tolist())
  assert (np.asarray(index)[:100][np.asarray(ok)[:100]] < 3).all()


def test_several_draws_are_without_replacement():
  weight = np.array([0.5, 0.3, 0.2])
  rng_B = jax.random.split(jax.random.key(0), 40_000)
  index, _ = drawing.choose_several(rng_B, jnp.tile(jnp.log(weight), (40_000, 1)), Rule(), count=2)
  for first in range(3):
    for second in range(3):
      share = np.mean((index[:, 0] == first) & (index[:, 1] == second))
      expected = 0 if first == second else weight[first] * weight[second] / (1 - weight[first])
      assert abs(share - expected) < 0.01


def test_with_a_threshold_no_step_is_without_an_insertion():
  cfg = CFG._replace(gaps=3, gap_threshold=0.9, gap=Rule(), token=Rule(), stop_threshold=1.0)
  out = jax.device_get(sample(prompt_of(requests(limits=False)), jax.random.key(0), cfg))
  for row, steps in zip(out.order_BxL.tolist(), out.steps_B.tolist(), strict=True):
    assert set(row) - {-1} == set(range(steps))


def test_settings_that_cannot_be_meant_are_refused():
  for odd, message in (({'gaps': -1}, 'gaps=-1'), ({'gap_threshold': 2.0}, 'gap_threshold=2.0')):
    with pytest.raises(UserError, match=message):
      ilm.SampleConfig.create({'max_length': 9, **odd})
  with pytest.raises(UserError, match='drawn in two stages'):
    ilm.SampleConfig.create({'max_length': 9, 'gaps': 2, 'two_stage': False, 'joint': {}})
