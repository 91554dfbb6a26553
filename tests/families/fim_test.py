"""Filling in the middle with the autoregressive family: rearranged examples, answers back in reading order, scores."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
import tables
from ml_collections import ConfigDict

from ilm_jax.families import arm, corruption
from ilm_jax.inference import static_batching
from ilm_jax.models import transformer
from ilm_jax.special_tokens import BOS, CLS, EOS, MASK
from ilm_jax.training import experiment
from ilm_jax.types import Prompt, Rule, UserError

V = 12
CLOSED = (0, 1, 2, 4, 5, 6)  # all special tokens but [EOS]
HALF, ALWAYS = ConfigDict({'fim_rate': 0.5}), ConfigDict({'fim_rate': 1.0})
CFG = arm.SampleConfig(max_length=21, fim=True, closed_tokens=CLOSED, min_buffer=4, token=Rule())


def example(prompt, answer):
  tokens = np.array([CLS, *prompt, BOS, *answer], np.int32)
  return {'tokens': tokens, 'fixed': np.arange(len(tokens)) < len(prompt) + 2}


def gap_example(prefix, middle, suffix):
  tokens = np.array([CLS, BOS, *prefix, *middle, *suffix], np.int32)
  index = np.arange(len(tokens)) - 2 - len(prefix)
  return {'tokens': tokens, 'fixed': (index < 0) | (index >= len(middle))}


def rows_of(rows, size):
  tokens_BxL = np.zeros((len(rows), size), np.int32)
  for i, row in enumerate(rows):
    tokens_BxL[i, : len(row)] = row
  return tokens_BxL, np.array([len(row) for row in rows], np.int32)


def prompt_of(gaps, size=10):
  """From (given tokens, index of the token left of the gap)."""
  tokens_BxL, length_B = rows_of([row for row, _ in gaps], size)
  open_BxL = np.arange(size)[None] == np.array([gap for _, gap in gaps])[:, None]
  return Prompt(tokens_BxL, length_B, open_BxL & (length_B > 0)[:, None], np.arange(len(gaps)))


GAPS = [([CLS, BOS, 7, 8, 9], 2), ([CLS, BOS, 7, 8, 9], 4), ([CLS, BOS, 10], 1), ([], 0), ([CLS, 9, BOS, 8, 7, 7], 4)]


# --- training ---------------------------------------------------------------------------------------------------------


def test_the_worked_example():
  tokens, place = corruption.rearrange(np.array([CLS, 7, 8, 9, 10]), 2, 4)
  assert tokens.tolist() == [CLS, 7, MASK, 10, MASK, 8, 9]
  assert tokens[place].tolist() == [CLS, 7, 8, 9, 10]


def test_every_free_token_and_the_end_are_targets_of_the_token_to_their_left():
  shapes, e = set(), example([7, 8], [9, 10, 11, 9])
  for seed in range(300):
    made = corruption.arm(np.random.default_rng(seed), e, HALF)
    tokens = made['tokens'].tolist()
    targets = dict(zip(made['target_gap'].tolist(), made['target_token'].tolist(), strict=True))
    followed = [*tokens[1:], EOS]
    if MASK in tokens:
      first, second = (i for i, token in enumerate(tokens) if token == MASK)
      restored = tokens[:first] + tokens[second + 1 :] + tokens[first + 1 : second]
      shapes.add((first, second))
      expected = {i: followed[i] for i in range(3, len(tokens)) if followed[i] != MASK}
    else:
      restored, expected = tokens, {i: followed[i] for i in range(3, len(tokens))}
      shapes.add(None)
    assert restored == e['tokens'].tolist()
    assert targets == expected and sorted(targets.values()) == sorted([9, 10, 11, 9, EOS])
    assert (made['length'], made['free']) == (8, 4)
  cuts = {(first, first + 1 + 8 - past) for first, past in itertools.combinations_with_replacement(range(4, 9), 2)}
  assert shapes == {None, *cuts}


def test_an_example_with_a_gap_is_always_rearranged_around_it():
  for seed in range(20):
    made = corruption.arm(np.random.default_rng(seed), gap_example([7], [8, 9], [10, 11]), HALF)
    assert made['tokens'].tolist() == [CLS, BOS, 7, MASK, 10, 11, MASK, 8, 9]
    assert made['target_gap'].tolist() == [6, 7, 8] and made['target_token'].tolist() == [8, 9, EOS]
  scattered = {'tokens': np.arange(5), 'fixed': np.array([True, False, True, False, True])}
  with pytest.raises(UserError, match='fills one gap of a text, but an example has free tokens in several places'):
    corruption.arm(np.random.default_rng(0), scattered, HALF)


def test_rows_hold_the_two_more_tokens():
  short = {'family': 'arm', 'corrupt.fim_rate': 0.5, 'data.row_length': 21}
  longest = experiment.build(small.config({'family': 'arm', 'data.row_length': 22})).cfg.data.row_length
  assert longest == 22
  with pytest.raises(UserError, match=r'data\.row_length=21 is shorter than the longest example, 24 tokens'):
    experiment.build(small.config(short))
  with pytest.raises(UserError, match=r'corrupt\.fim_rate=1\.5: expected a share from 0 to 1'):
    experiment.build(small.config({**short, 'corrupt.fim_rate': 1.5}))


# --- sampling ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  'gaps, settings',
  [(GAPS, {}), (GAPS, {'token': Rule(0.0)}), (GAPS, {'max_steps': 3}), (GAPS, {'max_length': 7}), (GAPS[1:2], {})],
  ids=['plain', 'greedy', 'max_steps', 'max_length', 'at the end'],
)
def test_the_middle_is_what_the_plain_sampler_writes_behind_the_rearranged_text(gaps, settings):
  cfg, rng = CFG._replace(**settings), jax.random.key(1)
  run = jax.jit(functools.partial(arm.sample, tables.Forward(vocab=V)), static_argnames='cfg')
  out = jax.device_get(run(rng, prompt_of(gaps, min(10, cfg.max_length)), cfg=cfg))
  assert out.tokens_BxL.shape == (len(gaps), cfg.max_length)
  for i, (given, gap) in enumerate(gaps):
    if not given:
      assert out.length_B[i] == 0
      continue
    inside = gap < len(given) - 1
    row = [*given[: gap + 1], MASK, *given[gap + 1 :], MASK] if inside else given
    plain_cfg = cfg._replace(fim=False, max_length=cfg.max_length + 2 * inside, max_steps=cfg.max_steps or 21)
    alone = prompt_of([(row, len(row) - 1)], 10)._replace(request_B=np.array([i]))
    plain = jax.device_get(run(rng, alone, cfg=plain_cfg))
    middle = plain.tokens_BxL[0, len(row) : plain.length_B[0]].tolist()
    n = len(middle)
    expected = [*given[: gap + 1], *middle, *given[gap + 1 :]]
    assert out.tokens_BxL[i].tolist() == expected + [0] * (cfg.max_length - len(expected))
    order = [-1] * (gap + 1) + list(range(n)) + [-1] * (cfg.max_length - gap - 1 - n)
    assert out.order_BxL[i].tolist() == order
    assert (out.length_B[i], out.steps_B[i], out.stopped_B[i]) == (len(expected), n, plain.stopped_B[0])
    np.testing.assert_allclose(out.log_prob_BxM[i, :n], plain.log_prob_BxM[0, :n], rtol=1e-5)
    np.testing.assert_allclose(out.stop_prob_BxM[i, : n + 1], plain.stop_prob_BxM[0, : n + 1], rtol=1e-5)
  assert out.steps_B.max() > 0


def test_gaps_that_it_cannot_fill_are_refused():
  sampler = static_batching.Sampler(None, arm, CFG._replace(fim=False), 2)
  tokens = np.array([CLS, BOS, 7, 8])
  for gaps, message in (([1], 'continues a text, and this one has a gap before its end'), ([1, 3], 'one gap.*got 2')):
    with pytest.raises(UserError, match=message):
      list(sampler(None, jax.random.key(0), [{'tokens': tokens, 'open': np.isin(np.arange(4), gaps)}]))


# --- likelihood -------------------------------------------------------------------------------------------------------


class Prefix:
  """The table seen by a causal model: features of a place depend on the tokens up to it."""

  def __init__(self):
    self.table = tables.Forward(vocab=V, scale=512)

  def __call__(self, tokens_BxL, length_B):
    places = range(tokens_BxL.shape[1])
    rows = [self.table(tokens_BxL, jnp.full_like(length_B, n + 1)).hidden_BxLxD[:, n] for n in places]
    return transformer.Outputs(jnp.stack(rows, axis=1), jnp.eye(V))


def test_the_score_of_a_middle_is_the_sum_over_the_rearranged_text():
  parts = [([7], [8, 9, 10], [11, 7]), ([], [8], [9]), ([7, 8], [], []), ([9], [10, 10], []), ([7], [], [8])]
  examples = [gap_example(*part) for part in parts]
  tokens_BxL, length_B = rows_of([e['tokens'] for e in examples], 9)
  fixed_BxL = np.ones((len(parts), 9), bool)
  for i, e in enumerate(examples):
    fixed_BxL[i, : len(e['fixed'])] = e['fixed']
  scored = arm.score(Prefix(), None, tokens_BxL, fixed_BxL, length_B, CFG)
  for i, (prefix, middle, suffix) in enumerate(parts):
    behind = [MASK, *suffix, MASK] if suffix and middle else []
    row, nll = [CLS, BOS, *prefix, *(behind or suffix)], 0.0
    for token in [*middle, EOS]:
      logits, _ = tables.Forward(vocab=V, scale=512).look_up(row)
      may = [EOS, *range(7, V)]
      nll -= logits[len(row) - 1, token] - np.log(np.exp(logits[len(row) - 1, may]).sum())
      row.append(token)
    np.testing.assert_allclose(scored.nll_B[i], nll, rtol=1e-5)
    assert scored.tokens_B[i] == len(middle)


def test_the_score_of_an_answer_is_that_of_its_sampling():
  forward = Prefix()
  run = jax.jit(functools.partial(arm.sample, forward.table, cfg=CFG))
  out = jax.device_get(run(jax.random.key(2), prompt_of(GAPS)))
  scored = arm.score(forward, None, out.tokens_BxL, out.order_BxL < 0, out.length_B, CFG)
  rows = [i for i in range(len(GAPS)) if out.stopped_B[i] and out.steps_B[i]]
  assert any(gap < len(given) - 1 for given, gap in (GAPS[i] for i in rows))
  for i in rows:
    n = out.steps_B[i]
    nll = -out.log_prob_BxM[i, :n].sum() - np.log(out.stop_prob_BxM[i, n])
    np.testing.assert_allclose(scored.nll_B[i], nll, rtol=1e-4)
