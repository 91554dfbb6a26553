"""Fill-in-the-middle with the autoregressive family: rearranged training examples, sampled middles, likelihoods."""

import functools
import itertools

import jax
import numpy as np
import pytest
import small
import tables
from arm_tables import CLOSED, CausalTable, V, example, rows_of
from ml_collections import ConfigDict

from ilm_jax import families
from ilm_jax.families import arm, corruption
from ilm_jax.inference import static_batching
from ilm_jax.special_tokens import BOS, CLS, EOS, MASK
from ilm_jax.training import experiment
from ilm_jax.types import GREEDY, Prompt, Rule, UserError

HALF = ConfigDict({'fim_rate': 0.5})
BASE = arm.SampleConfig(max_length=21, fim=True, suppressed_tokens=CLOSED, min_buffer=4, token=Rule())
TABLE = tables.Forward(vocab=V)
CAUSAL = CausalTable(V)


def gap_example(prefix, middle, suffix):
  """Return an example in which the middle is free and all other tokens are given."""
  tokens = np.array([CLS, BOS, *prefix, *middle, *suffix], np.int32)
  index = np.arange(len(tokens)) - 2 - len(prefix)
  return {'tokens': tokens, 'fixed': (index < 0) | (index >= len(middle))}


def prompt_of(gaps, size=10):
  """Return a Prompt from a list of (given tokens, index of the token to the left of the gap)."""
  tokens_BxL, length_B = rows_of([row for row, _ in gaps], size)
  open_BxL = np.arange(size)[None] == np.array([gap for _, gap in gaps])[:, None]
  return Prompt(tokens_BxL, length_B, open_BxL & (length_B > 0)[:, None], np.arange(len(gaps)))


GAPS = [([CLS, BOS, 7, 8, 9], 2), ([CLS, BOS, 7, 8, 9], 4), ([CLS, BOS, 10], 1), ([], 0), ([CLS, 9, BOS, 8, 7, 7], 4)]
sample = jax.jit(arm.sample, static_argnames=('forward', 'cfg'))


# --- training ---------------------------------------------------------------------------------------------------------


def test_rearranging_an_example_moves_its_middle_to_the_end():
  tokens, place = corruption.rearrange(np.array([CLS, 7, 8, 9, 10]), 2, 4)
  assert tokens.tolist() == [CLS, 7, MASK, 10, MASK, 8, 9]
  assert tokens[place].tolist() == [CLS, 7, 8, 9, 10]


def test_every_free_token_and_eos_are_predicted_from_the_token_to_their_left():
  seen_masks, e = set(), example([7, 8], [9, 10, 11, 9])
  for seed in range(300):
    corrupted = corruption.arm(np.random.default_rng(seed), e, HALF)
    tokens = corrupted['tokens'].tolist()
    targets = dict(zip(corrupted['target_gap'].tolist(), corrupted['target_token'].tolist(), strict=True))
    next_tokens = [*tokens[1:], EOS]
    if MASK in tokens:
      first, second = (i for i, token in enumerate(tokens) if token == MASK)
      restored = tokens[:first] + tokens[second + 1 :] + tokens[first + 1 : second]
      seen_masks.add((first, second))
      expected = {i: next_tokens[i] for i in range(3, len(tokens)) if next_tokens[i] != MASK}
    else:
      restored, expected = tokens, {i: next_tokens[i] for i in range(3, len(tokens))}
      seen_masks.add(None)
    assert restored == e['tokens'].tolist()
    assert targets == expected and sorted(targets.values()) == sorted([9, 10, 11, 9, EOS])
    assert (corrupted['length'], corrupted['free']) == (8, 4)
  all_masks = {(first, first + 9 - end) for first, end in itertools.combinations_with_replacement(range(4, 9), 2)}
  assert seen_masks == {None, *all_masks}


def test_an_example_with_given_text_after_its_gap_is_always_rearranged():
  for seed in range(20):
    corrupted = corruption.arm(np.random.default_rng(seed), gap_example([7], [8, 9], [10, 11]), HALF)
    assert corrupted['tokens'].tolist() == [CLS, BOS, 7, MASK, 10, 11, MASK, 8, 9]
    assert corrupted['target_gap'].tolist() == [6, 7, 8] and corrupted['target_token'].tolist() == [8, 9, EOS]
  two_gaps = {'tokens': np.arange(5), 'fixed': np.array([True, False, True, False, True])}
  with pytest.raises(UserError, match='fills one gap of a text'):
    corruption.arm(np.random.default_rng(0), two_gaps, HALF)


def test_row_length_must_leave_room_for_the_two_mask_tokens_of_a_rearranged_example():
  assert experiment.build(small.config({'family': 'arm', 'data.row_length': 22})).cfg.data.row_length == 22
  short = {'family': 'arm', 'corrupt.fim_rate': 0.5, 'data.row_length': 21}
  with pytest.raises(UserError, match=r'data\.row_length=21.* 24 '):
    experiment.build(small.config(short))
  with pytest.raises(UserError, match=r'corrupt\.fim_rate=1\.5: expected a number from 0 to 1'):
    experiment.build(small.config({**short, 'corrupt.fim_rate': 1.5}))


# --- sampling ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  'gaps, settings',
  [(GAPS, {}), (GAPS, {'token': GREEDY, 'max_steps': 3}), (GAPS, {'max_length': 7}), (GAPS[1:2], {})],
  ids=['plain', 'greedy-max-steps', 'max-length', 'no-suffix'],
)
def test_the_sampled_middle_equals_the_continuation_of_the_rearranged_prompt(gaps, settings):
  cfg, rng = BASE._replace(**settings), jax.random.key(1)
  out = jax.device_get(sample(TABLE, rng, prompt_of(gaps, min(10, cfg.max_length)), cfg))
  assert out.tokens_BxL.shape == (len(gaps), cfg.max_length)
  for i, (given, gap) in enumerate(gaps):
    if not given:
      assert out.length_B[i] == 0
      continue
    masks = 2 if gap < len(given) - 1 else 0
    row = [*given[: gap + 1], MASK, *given[gap + 1 :], MASK] if masks else given
    plain_cfg = cfg._replace(fim=False, max_length=cfg.max_length + masks, max_steps=cfg.max_steps or 21)
    plain_prompt = prompt_of([(row, len(row) - 1)])._replace(request_B=np.array([i]))
    plain = jax.device_get(sample(TABLE, rng, plain_prompt, plain_cfg))
    middle = plain.tokens_BxL[0, len(row) : plain.length_B[0]].tolist()
    n = len(middle)
    expected = [*given[: gap + 1], *middle, *given[gap + 1 :]]
    assert out.tokens_BxL[i].tolist() == expected + [0] * (cfg.max_length - len(expected))
    assert out.order_BxL[i].tolist() == [-1] * (gap + 1) + list(range(n)) + [-1] * (cfg.max_length - gap - 1 - n)
    assert (out.length_B[i], out.steps_B[i], out.stopped_B[i]) == (len(expected), n, plain.stopped_B[0])
    np.testing.assert_allclose(out.log_prob_BxM[i, :n], plain.log_prob_BxM[0, :n], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(out.stop_prob_BxM[i, : n + 1], plain.stop_prob_BxM[0, : n + 1], rtol=1e-5, atol=1e-6)
  assert out.steps_B.max() > 0


def test_prompts_with_gaps_that_cannot_be_filled_are_rejected():
  sampler = static_batching.StaticSampler(None, families.get('arm'), BASE._replace(fim=False), 2)
  tokens = np.array([CLS, BOS, 7, 8])
  for gaps, message in (([1], 'can only continue a text, but this prompt has a gap'), ([1, 3], 'one gap.*got 2')):
    with pytest.raises(UserError, match=message):
      list(sampler(None, jax.random.key(0), [{'tokens': tokens, 'open': np.isin(np.arange(4), gaps)}]))


# --- likelihood -------------------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames='cfg')
def score(tokens_BxL, fixed_BxL, length_B, cfg=BASE):
  kind, *arrays = arm.score(CAUSAL, None, tokens_BxL, fixed_BxL, length_B, cfg)
  assert kind == 'exact'
  return arrays


def test_the_score_of_a_middle_equals_a_plain_loop_over_the_rearranged_text():
  parts = [([7], [8, 9, 10], [11, 7]), ([], [8], [9]), ([7, 8], [], []), ([9], [10, 10], []), ([7], [], [8])]
  examples = [gap_example(*part) for part in parts]
  tokens_BxL, length_B = rows_of([e['tokens'] for e in examples], 9)
  fixed_BxL = np.ones((len(parts), 9), bool)
  for i, e in enumerate(examples):
    fixed_BxL[i, : len(e['fixed'])] = e['fixed']
  nll_B, _, tokens_B = score(tokens_BxL, fixed_BxL, length_B)
  for i, (prefix, middle, suffix) in enumerate(parts):
    rest = [MASK, *suffix, MASK] if suffix and middle else suffix
    row, nll = [CLS, BOS, *prefix, *rest], 0.0
    for token in [*middle, EOS]:
      logits = CAUSAL.table.look_up(row)[0][len(row) - 1]
      nll -= logits[token] - np.log(np.exp(logits[[EOS, *range(7, V)]]).sum())
      row.append(token)
    np.testing.assert_allclose(nll_B[i], nll, rtol=1e-5)
    assert tokens_B[i] == len(middle)


def test_the_score_of_a_sample_equals_the_sum_of_the_log_probabilities_recorded_by_the_sampler():
  out = jax.device_get(sample(CAUSAL.table, jax.random.key(2), prompt_of(GAPS), BASE))
  nll_B, _, _ = score(out.tokens_BxL, out.order_BxL < 0, out.length_B)
  rows = [i for i in range(len(GAPS)) if out.stopped_B[i] and out.steps_B[i]]
  assert any(gap < len(given) - 1 for given, gap in (GAPS[i] for i in rows))
  for i in rows:
    n = out.steps_B[i]
    expected = -out.log_prob_BxM[i, :n].sum() - np.log(out.stop_prob_BxM[i, n])
    np.testing.assert_allclose(nll_B[i], expected, rtol=1e-4)
