"""The Insertion Transformer: targets, loss, and serial and parallel decoding, compared to plain Python loops."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tables
from ml_collections import ConfigDict

from ilm_jax.data import pipeline
from ilm_jax.families import corruption, it
from ilm_jax.special_tokens import BOS, CLS, EOS
from ilm_jax.types import Outputs, UserError

V = 11
CLOSED = (0, 1, 2, 4, 5, 6)
WORDS = [v for v in range(V) if v not in (*CLOSED, EOS)]
CFG = ConfigDict({'close_prompt': False, 'eos_weight': 0.5})


def example(prompt, answer):
  tokens = np.array([CLS, *prompt, BOS, *answer], np.int32)
  return {'tokens': tokens, 'fixed': np.arange(len(tokens)) < len(prompt) + 2}


# --- training ---------------------------------------------------------------------------------------------------------


def test_the_targets_of_an_open_gap_are_its_dropped_tokens_or_eos():
  for seed in range(40):
    made = corruption.it(np.random.default_rng(seed), example([7, 8], [9, 10, 7, 8]), CFG)
    plain = corruption.ilm(np.random.default_rng(seed), example([7, 8], [9, 10, 7, 8]), CFG)
    assert made['tokens'].tolist() == plain['tokens'].tolist()
    missing = {}
    for gap, token in zip(plain['target_gap'], plain['target_token'], strict=True):
      missing.setdefault(int(gap), []).append(int(token))
    expected = [(g, t, 1 / (len(missing[g]) + 1)) for g in sorted(missing) for t in missing[g]]
    expected += [(g, EOS, 0.5) for g in range(1, len(made['tokens'])) if g not in missing]
    got = zip(made['target_gap'].tolist(), made['target_token'].tolist(), made['target_weight'].tolist(), strict=True)
    assert sorted(got) == sorted((g, t, float(np.float32(w))) for g, t, w in expected)

  closed = ConfigDict({**CFG.to_dict(), 'close_prompt': True})
  made = corruption.it(np.random.default_rng(0), example([7, 8], [9, 10]), closed, u=0.0)
  assert made['target_gap'].tolist() == [3, 4, 5] and made['target_token'].tolist() == [EOS] * 3


def test_the_packed_loss_equals_a_plain_loop_over_gaps():
  rng = np.random.default_rng(0)
  examples = [corruption.it(rng, example([7], rng.integers(7, V, n).tolist()), CFG) for n in (0, 2, 5, 7)]
  batch = pipeline.pack(examples, list(range(4)), pipeline.Shape(2, 20, 40, 3))
  hidden = rng.normal(size=(2, 20, 6)).astype(np.float32)
  table = rng.normal(size=(V, 6)).astype(np.float32)
  settings = ConfigDict({'compute': 'float32', 'vocab_chunk': 4})
  pairs = jax.jit(lambda *outputs: it.loss(Outputs(*outputs), batch, settings))(hidden, table)
  log_prob = np.asarray(jax.nn.log_softmax(hidden @ table.T, axis=-1), np.float64)
  token = end = gaps = 0.0
  for b, k in np.argwhere(batch['open_BxL']):
    here = (batch['target_segment_BxT'][b] > 0) & (batch['target_gap_BxT'][b] == k)
    ids = batch['target_token_BxT'][b, here].tolist()
    gaps += 1
    if ids == [EOS]:
      end -= 0.5 * log_prob[b, k, EOS]
    else:
      assert ids and EOS not in ids
      token -= sum(log_prob[b, k, i] for i in ids) / (len(ids) + 1)
  assert float(pairs['loss'][1]) == gaps
  got = [float(pairs[name][0]) for name in ('loss', 'token_loss', 'stop_loss')]
  np.testing.assert_allclose(got, [token + end, token, end], rtol=1e-5)


# --- sampling ---------------------------------------------------------------------------------------------------------

TABLE = tables.Forward(vocab=V, scale=256)


def forward(tokens_BxL, length_B, open_BxL=None):
  """Return logits from a table as a model returns them, with [EOS] more probable in longer rows."""
  outputs = TABLE(tokens_BxL, length_B)
  bonus_BxV = jnp.where(jnp.arange(V)[None] == EOS, 0.25 * length_B[:, None].astype(jnp.float32), 0.0)
  return outputs._replace(hidden_BxLxD=outputs.hidden_BxLxD + bonus_BxV[:, None])


def prompts(number=30):
  rng, rows = np.random.default_rng(1), [([CLS, BOS], [False, True])]
  while len(rows) < number:
    tokens = [CLS, BOS, *rng.integers(7, V, rng.integers(0, 6)).tolist()]
    rows.append((tokens, [False, *(rng.random(len(tokens) - 1) < 0.6).tolist()]))
  return rows


sample = jax.jit(functools.partial(it.sample, forward), static_argnames='cfg')


def grow(tokens, open_, cfg):
  """Decode one row greedily: return [(token, open, step)], steps, stopped, log-probabilities, p([EOS]) of each step."""
  row, log_probs, ends = [(token, o, -1) for token, o in zip(tokens, open_, strict=True)], [], []
  steps = 0
  while True:
    logits, _ = TABLE.look_up([token for token, _, _ in row])
    logits[:, EOS] += 0.25 * len(row)
    unfinished, end = [], 1.0
    for k, (_, is_open, _) in enumerate(row):
      total = math.log(sum(math.exp(logits[k, v]) for v in WORDS))
      end_prob = 1 / (1 + math.exp(total - logits[k, EOS]))
      if cfg.end_threshold is None:
        finished = logits[k, EOS] >= max(logits[k, v] for v in WORDS)
      else:
        finished = end_prob > cfg.end_threshold
      if is_open:
        end = min(end, end_prob)
      if is_open and not (finished and not (cfg.force_first and steps == 0)):
        unfinished.append((k, total))
    ends.append(end)
    if not unfinished:
      return row, steps, True, log_probs, ends
    if len(row) >= cfg.max_length or (cfg.max_steps is not None and steps >= cfg.max_steps):
      return row, steps, False, log_probs, ends
    if not cfg.parallel:
      unfinished = [max(unfinished, key=lambda pair: pair[1])]
    log_probs.append(0.0)
    for done, (k, total) in enumerate(unfinished[: cfg.max_length - len(row)]):
      token = max(WORDS, key=lambda v, k=k: logits[k, v])
      row.insert(k + done + 1, (token, True, steps))
      log_probs[-1] += logits[k, token] - total
    steps += 1


@pytest.mark.parametrize(
  'settings',
  [
    {},
    {'parallel': True},
    {'parallel': True, 'end_threshold': 0.3, 'force_first': True},
    {'end_threshold': 0.6, 'force_first': True, 'max_steps': 3},
  ],
  ids=str,
)
def test_greedy_decoding_equals_insertion_into_a_python_list(settings):
  settings = {'max_length': 23, 'min_buffer': 4, **settings}
  cfg = it.SampleConfig.create(settings, suppressed_tokens=CLOSED, vocab_chunk=4)
  rows, ended = prompts(), set()
  out = jax.device_get(sample(jax.random.key(0), tables.make_prompt(rows), cfg=cfg))
  for i, (tokens, open_) in enumerate(rows):
    expected, steps, stopped, log_probs, ends = grow(tokens, open_, cfg)
    n = out.length_B[i]
    assert out.tokens_BxL[i, :n].tolist() == [token for token, _, _ in expected]
    assert out.order_BxL[i, :n].tolist() == [step for _, _, step in expected]
    assert (out.steps_B[i], bool(out.stopped_B[i])) == (steps, stopped)
    np.testing.assert_allclose(out.log_prob_BxM[i, :steps], log_probs, atol=1e-4)
    np.testing.assert_allclose(out.stop_prob_BxM[i, : steps + 1], ends, atol=1e-5)
    ended.add(stopped)
  assert (out.steps_B > 1).any() and True in ended and ('max_steps' not in settings or False in ended)


def test_parallel_draws_depend_only_on_the_request_and_record_their_log_probability():
  settings = {'max_length': 20, 'parallel': True, 'token': {'temperature': 0.7}, 'min_buffer': 4}
  cfg = it.SampleConfig.create(settings, suppressed_tokens=CLOSED)
  rows = prompts(10) + [([CLS, BOS], [False, True])] * 20
  together = jax.device_get(sample(jax.random.key(0), tables.make_prompt(rows), cfg=cfg))
  for i in (0, 3, 7):
    prompt = tables.make_prompt(rows[i : i + 1], requests=[i])
    alone = sample(jax.random.key(0), prompt, cfg=cfg._replace(min_buffer=64))
    assert together.tokens_BxL[i].tolist() == alone.tokens_BxL[0].tolist()

  logits, _ = TABLE.look_up([CLS, BOS])
  total, first = math.log(sum(math.exp(logits[1, v]) for v in WORDS)), set()
  for i in range(10, 30):
    token = int(together.tokens_BxL[i, together.order_BxL[i] == 0][0])
    assert together.log_prob_BxM[i, 0] == pytest.approx(logits[1, token] - total, abs=1e-4)
    first.add(token)
  assert len(first) > 1


def test_end_thresholds_out_of_range_are_rejected():
  with pytest.raises(UserError, match=r'end_threshold=1.5: expected a probability'):
    it.SampleConfig.create({'max_length': 9, 'end_threshold': 1.5})
