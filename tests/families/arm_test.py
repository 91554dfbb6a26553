"""The autoregressive family: targets and loss, decoding with and without a key-value cache, exact likelihood."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tables
from arm_tables import CLOSED, CausalTable, V, example, rows_of
from ml_collections import ConfigDict

from ilm_jax.data import pipeline
from ilm_jax.families import arm, corruption, drawing
from ilm_jax.models import transformer
from ilm_jax.special_tokens import BOS, CLS, EOS
from ilm_jax.types import GREEDY, Prompt, Rule, UserError

PLAIN = ConfigDict({'fim_rate': 0.0})
MODEL = transformer.ModelConfig(V, 2, 2, 16, 32, causal=True, stop_head=False, dropout=0.0, attention_dropout=0.0)


class ModelForward:
  """A transformer with constant parameters, which jit accepts as a static argument and compares by identity."""

  def __init__(self):
    init = jax.jit(lambda: transformer.unbox(transformer.init(MODEL, jax.random.key(1))))
    self.params = jax.tree.map(lambda x: 1.5 * x, init())
    self.forward = transformer.Forward(MODEL, self.params)
    self.empty_cache, self.apply_cached = self.forward.empty_cache, self.forward.apply_cached

  def __call__(self, tokens_BxL, length_B):
    return self.forward(tokens_BxL, length_B)


@pytest.fixture(scope='module')
def forward():
  return ModelForward()


ROWS = [[CLS, BOS], [CLS, 7, 8, 9, BOS], [], [CLS, 11, BOS], [CLS, 7, 7, 7, 7, 7, 7, BOS]]


def prompt_of(rows, size=8):
  tokens_BxL, length_B = rows_of(rows, size)
  return Prompt(tokens_BxL, length_B, np.arange(size)[None] == length_B[:, None] - 1, np.arange(len(rows)))


# --- training ---------------------------------------------------------------------------------------------------------


def test_the_targets_of_an_answer_are_its_tokens_followed_by_eos():
  corrupted = corruption.arm(None, example([7, 8], [9, 10, 11]), PLAIN)
  assert corrupted['tokens'].tolist() == [CLS, 7, 8, BOS, 9, 10, 11]
  assert corrupted['target_gap'].tolist() == [3, 4, 5, 6]
  assert corrupted['target_token'].tolist() == [9, 10, 11, EOS]
  assert not corrupted['open'].any()
  empty = corruption.arm(None, example([7], []), PLAIN)
  assert empty['target_gap'].tolist() == [2] and empty['target_token'].tolist() == [EOS]


def test_an_example_with_given_tokens_after_free_tokens_is_rejected():
  with pytest.raises(UserError, match=r'family=arm writes from left to right'):
    corruption.arm(None, {'tokens': np.arange(5), 'fixed': np.array([True, True, False, True, False])}, PLAIN)


def test_packed_loss_equals_a_loop_over_examples_and_positions(forward):
  rng = np.random.default_rng(0)
  examples = [example(rng.integers(7, V, 3).tolist(), rng.integers(7, V, n).tolist()) for n in (0, 1, 4, 6, 2)]
  batch = pipeline.pack(
    [corruption.arm(None, e, PLAIN) for e in examples], list(range(5)), pipeline.Shape(2, 24, 24, 4)
  )
  outputs = jax.jit(transformer.apply, static_argnums=0)(
    MODEL, forward.params, batch['tokens_BxL'], batch['position_BxL'], batch['segment_BxL'], batch['cls_BxS']
  )
  pairs = arm.loss(outputs, batch, ConfigDict({'compute': 'float32', 'vocab_chunk': 5}))
  alone = jax.jit(forward.__call__)(*rows_of([e['tokens'] for e in examples], 16))
  log_prob_BxLxV = jax.nn.log_softmax(alone.hidden_BxLxD @ alone.unembed_VxD.T, axis=-1)
  total, count = 0.0, 0
  for i, e in enumerate(examples):
    targets = [*e['tokens'], EOS]
    for position in range(int(e['fixed'].sum()), len(targets)):
      total -= float(log_prob_BxLxV[i, position - 1, targets[position]])
      count += 1
  assert float(pairs['loss'][1]) == count and float(pairs['string_loss'][1]) == 5
  np.testing.assert_allclose(float(pairs['loss'][0]), total, rtol=1e-5)
  np.testing.assert_allclose(float(pairs['string_loss'][0]), total, rtol=1e-5)


# --- decoding with a cache --------------------------------------------------------------------------------------------


@pytest.mark.parametrize('compute, tolerance', [('float32', 1e-5), ('mixed', 2e-2), ('bfloat16', 6e-2)])
def test_forward_passes_with_a_cache_give_the_hidden_states_of_a_single_full_pass(forward, compute, tolerance):
  cfg = dataclasses.replace(MODEL, compute=compute)
  tokens_BxL = np.random.default_rng(0).integers(7, V, (3, 12)).astype(np.int32)
  model = transformer.Forward(cfg, forward.params)
  run = jax.jit(lambda *args: model.apply_cached(*args))
  whole = np.asarray(jax.jit(lambda *args: model(*args))(tokens_BxL, np.full(3, 12)).hidden_BxLxD, np.float32)
  cache, parts, start = model.empty_cache(3, 16), [], 0
  for size in (4, 1, 1, 4, 1, 1):
    outputs, cache = run(jnp.array(tokens_BxL[:, start : start + size]), jnp.full(3, start), cache)
    parts.append(outputs.hidden_BxLxD)
    start += size
  assert np.abs(np.concatenate(parts, axis=1).astype(np.float32) - whole).max() <= tolerance * np.abs(whole).max()


sample = jax.jit(arm.sample, static_argnames=('forward', 'cfg'))


@functools.partial(jax.jit, static_argnames=('forward', 'cfg'))
def next_token(forward, tokens_1xL, length, rng, cfg):
  """Return (log-probabilities, drawn token) of the next token, from a forward pass over the whole row."""
  outputs = forward(tokens_1xL, length[None])
  logits = (
    (outputs.hidden_BxLxD[:, length - 1] @ outputs.unembed_VxD.T).at[:, jnp.array(cfg.suppressed_tokens)].set(-1e30)
  )
  return jax.nn.log_softmax(logits[0]), drawing.choose(rng[None], logits, cfg.token)[0]


def decode_without_cache(forward, rng, row, request, cfg):
  """Decode one row with the RNG keys of `arm.sample`; return (row, log-probabilities, p([EOS]) per step, stopped)."""
  row, log_probs, end_probs, max_steps = list(row), [], [], cfg.max_length if cfg.max_steps is None else cfg.max_steps
  request_rng = jax.random.fold_in(rng, request)
  while True:
    tokens_1xL, length = rows_of([row], cfg.max_length)[0], jnp.array(len(row))
    step_rng = jax.random.fold_in(request_rng, len(log_probs))
    log_prob, token = jax.device_get(next_token(forward, tokens_1xL, length, step_rng, cfg))
    end_probs.append(np.exp(log_prob[EOS]))
    if token == EOS or len(row) == cfg.max_length or len(log_probs) == max_steps:
      return row, log_probs, end_probs, token == EOS
    row.append(int(token))
    log_probs.append(log_prob[token])


BASE = arm.SampleConfig(max_length=21, suppressed_tokens=CLOSED, min_buffer=4, token=Rule())


@pytest.mark.parametrize(
  'model, settings',
  [
    ('transformer', {}),
    ('transformer', {'token': Rule(top_p=0.8)}),
    ('table', {'token': GREEDY}),
    ('table', {'token': Rule(0.7, top_k=3)}),
    ('table', {'max_steps': 4}),
  ],
  ids=['transformer', 'nucleus', 'greedy', 'top-k', 'max-steps'],
)
def test_decoding_with_a_cache_equals_decoding_without_a_cache(forward, model, settings):
  forward = forward if model == 'transformer' else tables.Forward(vocab=V)
  cfg, rng = BASE._replace(**settings), jax.random.key(3)
  out = jax.device_get(sample(forward, rng, prompt_of(ROWS), cfg))
  assert out.steps_B.max() > 3, 'the samples are too short to test decoding'
  for i, row in enumerate(ROWS):
    if not row:
      assert out.length_B[i] == 0 and not out.stopped_B[i]
      continue
    expected, log_probs, end_probs, stopped = decode_without_cache(forward, rng, row, i, cfg)
    n = out.steps_B[i]
    assert out.tokens_BxL[i, : out.length_B[i]].tolist() == expected
    assert n == len(log_probs) and out.stopped_B[i] == stopped
    assert out.order_BxL[i].tolist() == [-1] * len(row) + list(range(n)) + [-1] * (21 - len(expected))
    np.testing.assert_allclose(out.log_prob_BxM[i, :n], log_probs, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(out.stop_prob_BxM[i, : n + 1], end_probs, rtol=1e-4, atol=1e-6)


def test_force_first_prevents_empty_completions():
  table, prompt = tables.Forward(vocab=V, scale=512), prompt_of([[CLS, BOS]] * 30)
  cfg = BASE._replace(max_length=8, min_buffer=8)

  def some_are_empty(cfg):
    return bool((sample(table, jax.random.key(0), prompt, cfg).steps_B == 0).any())

  assert some_are_empty(cfg) and not some_are_empty(cfg._replace(force_first=True))


def test_eos_is_never_suppressed():
  cfg = arm.SampleConfig.create({'max_length': 9, 'gap': {'temperature': 0.0}, 'token': {}}, suppressed_tokens=range(7))
  assert cfg.suppressed_tokens == CLOSED


# --- likelihood -------------------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=('forward', 'cfg'))
def score(forward, tokens_BxL, fixed_BxL, length_B, cfg):
  kind, *arrays = arm.score(forward, None, tokens_BxL, fixed_BxL, length_B, cfg)
  assert kind == 'exact'
  return arrays


def test_probabilities_of_all_strings_sum_to_one():
  """Sum over all strings of up to 3 tokens from a vocabulary of 3, plus the total probability of longer strings."""
  words, closed = (7, 8, 9), tuple(i for i in range(10) if i not in (EOS, 7, 8, 9))
  model, cfg = CausalTable(10), arm.SampleConfig(max_length=9, suppressed_tokens=closed)
  strings = [s for n in range(4) for s in itertools.product(words, repeat=n)]
  tokens_BxL, length_B = rows_of([[CLS, 8, BOS, *s] for s in strings], 7)
  fixed_BxL = np.arange(7)[None] < np.full((len(strings), 1), 3)
  nll_B, error_B, tokens_B = score(model, tokens_BxL, fixed_BxL, length_B, cfg)
  assert tokens_B.tolist() == [len(s) for s in strings] and not error_B.any()
  probability_B = np.exp(-np.asarray(nll_B, np.float64))
  longer = 0.0
  for i, s in enumerate(strings):
    if len(s) == 3:
      logits, _ = model.table.look_up([CLS, 8, BOS, *s])
      p_end = np.exp(logits[5, EOS]) / np.exp(logits[5, [EOS, *words]]).sum()
      longer += probability_B[i] / p_end * (1 - p_end)
  np.testing.assert_allclose(probability_B.sum() + longer, 1.0, atol=1e-6)
  assert 0.01 < longer < 0.99


def test_the_score_of_a_sample_equals_the_sum_of_the_log_probabilities_recorded_by_the_sampler(forward):
  out = jax.device_get(sample(forward, jax.random.key(3), prompt_of(ROWS), BASE))
  nll_B, _, tokens_B = score(forward, out.tokens_BxL, out.order_BxL < 0, out.length_B, BASE)
  rows = [i for i in range(len(ROWS)) if out.stopped_B[i]]
  assert rows, 'no sample ended with [EOS]'
  for i in rows:
    n = out.steps_B[i]
    np.testing.assert_allclose(nll_B[i], -out.log_prob_BxM[i, :n].sum() - np.log(out.stop_prob_BxM[i, n]), rtol=1e-4)
    assert tokens_B[i] == n
