"""The Insertion Transformer: targets, loss, serial and parallel decoding against growing lists."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tables
from ml_collections import ConfigDict

from ilm_jax.data import pipeline
from ilm_jax.families import corruption, drawing, it
from ilm_jax.models import numerics, vocabulary
from ilm_jax.special_tokens import BOS, CLS, EOS
from ilm_jax.types import Outputs, Prompt, UserError

V = 11
CLOSED = (0, 1, 2, 4, 5, 6)
CFG = ConfigDict({'close_prompt': False, 'eos_weight': 0.5})


def example(prompt, answer):
  tokens = np.array([CLS, *prompt, BOS, *answer], np.int32)
  return {'tokens': tokens, 'fixed': np.arange(len(tokens)) < len(prompt) + 2}


# --- training ---------------------------------------------------------------------------------------------------------


def test_every_gap_has_its_tokens_or_its_end():
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


def test_closed_gaps_of_the_prompt_have_no_end():
  cfg = ConfigDict({**CFG.to_dict(), 'close_prompt': True})
  made = corruption.it(np.random.default_rng(0), example([7, 8], [9, 10]), cfg, u=0.0)
  assert made['target_gap'].tolist() == [3, 4, 5] and made['target_token'].tolist() == [EOS] * 3


def test_packed_loss_is_the_mean_over_gaps_of_a_plain_loop():
  rng = np.random.default_rng(0)
  examples = [corruption.it(rng, example([7], rng.integers(7, V, n).tolist()), CFG) for n in (0, 2, 5, 7)]
  batch = pipeline.pack(examples, list(range(4)), pipeline.Shape(2, 20, 40, 3))
  hidden = rng.normal(size=(2, 20, 6)).astype(np.float32)
  table = rng.normal(size=(V, 6)).astype(np.float32)
  pairs = it.loss(Outputs(hidden, table), batch, ConfigDict({'compute': 'float32', 'vocab_chunk': 4}))
  log_prob = np.asarray(jax.nn.log_softmax(hidden @ table.T, axis=-1), np.float64)
  token = end = gaps = 0.0
  for b in range(2):
    for k in range(20):
      if batch['open_BxL'][b, k]:
        here = [t for t in range(40) if batch['target_segment_BxT'][b, t] and batch['target_gap_BxT'][b, t] == k]
        ids = [int(batch['target_token_BxT'][b, t]) for t in here]
        gaps += 1
        if ids == [EOS]:
          end -= 0.5 * log_prob[b, k, EOS]
        else:
          assert EOS not in ids and ids
          token -= sum(log_prob[b, k, i] for i in ids) / (len(ids) + 1)
  assert float(pairs['loss'][1]) == gaps
  np.testing.assert_allclose(
    [float(pairs[n][0]) for n in ('loss', 'token_loss', 'stop_loss')], [token + end, token, end], rtol=1e-5
  )


# --- sampling ---------------------------------------------------------------------------------------------------------

FORWARD = tables.Forward(vocab=V, scale=256)


class Ending:
  """The table, with [EOS] more probable the longer a row is."""

  def __call__(self, tokens_BxL, length_B, open_BxL=None):
    outputs = FORWARD(tokens_BxL, length_B)
    up = jnp.where(jnp.arange(V)[None] == EOS, 0.25 * length_B[:, None].astype(jnp.float32), 0.0)
    return outputs._replace(hidden_BxLxD=outputs.hidden_BxLxD + up[:, None])


def prompts(number=30):
  rng, rows = np.random.default_rng(1), [([CLS, BOS], [False, True])]
  while len(rows) < number:
    tokens = [CLS, BOS, *rng.integers(7, V, rng.integers(0, 6)).tolist()]
    rows.append((tokens, [False, *(rng.random(len(tokens) - 1) < 0.6).tolist()]))
  return rows


def make_prompt(rows, size=8):
  tokens_BxL, open_BxL = np.zeros((len(rows), size), np.int32), np.zeros((len(rows), size), bool)
  for i, (tokens, open_) in enumerate(rows):
    tokens_BxL[i, : len(tokens)], open_BxL[i, : len(tokens)] = tokens, open_
  length_B = np.array([len(tokens) for tokens, _ in rows], np.int32)
  return jax.device_put(Prompt(tokens_BxL, length_B, open_BxL, np.arange(len(rows))))


def grow(tokens, open_, cfg):
  """Decode one row greedily with lists."""
  row, log_probs, ends = [(token, o, -1) for token, o in zip(tokens, open_, strict=True)], [], []
  words = [v for v in range(V) if v not in cfg.closed_tokens and v != EOS]
  steps = 0
  while True:
    logits, _ = FORWARD.look_up([token for token, _, _ in row])
    logits[:, EOS] += 0.25 * len(row)
    unfinished, end = [], 1.0
    for k, (_, is_open, _) in enumerate(row):
      total = math.log(sum(math.exp(logits[k, v]) for v in words))
      if cfg.end_threshold is None:
        finished = logits[k, EOS] >= max(logits[k, v] for v in words)
      else:
        finished = 1 / (1 + math.exp(total - logits[k, EOS])) > cfg.end_threshold
      if is_open:
        end = min(end, 1 / (1 + math.exp(total - logits[k, EOS])))
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
      token = max(words, key=lambda v, k=k: logits[k, v])
      row.insert(k + done + 1, (token, True, steps))
      log_probs[-1] += logits[k, token] - total
    steps += 1


@pytest.mark.parametrize(
  'settings',
  [
    {},
    {'parallel': True},
    {'end_threshold': 0.6},
    {'end_threshold': 0.3, 'parallel': True, 'force_first': True},
    {'parallel': True, 'max_steps': 2},
    {'force_first': True, 'max_steps': 3},
  ],
  ids=str,
)
def test_decoding_equals_growing_a_list(settings):
  cfg = it.SampleConfig.create({'max_length': 23, 'min_buffer': 4, **settings}, closed_tokens=CLOSED)
  rows = prompts()
  run = jax.jit(functools.partial(it.sample, Ending(), cfg=cfg))
  out = jax.device_get(run(jax.random.key(0), make_prompt(rows)))
  ended = set()
  for i, (tokens, open_) in enumerate(rows):
    expected, steps, stopped, log_probs, ends = grow(tokens, open_, cfg)
    n = out.length_B[i]
    assert out.tokens_BxL[i, :n].tolist() == [token for token, _, _ in expected]
    assert out.order_BxL[i, :n].tolist() == [age for _, _, age in expected]
    assert (out.steps_B[i], bool(out.stopped_B[i])) == (steps, stopped)
    np.testing.assert_allclose(out.log_prob_BxM[i, :steps], log_probs, atol=1e-4)
    np.testing.assert_allclose(out.stop_prob_BxM[i, : steps + 1], ends, atol=1e-5)
    ended.add(stopped)
  assert (out.steps_B > 1).any() and True in ended and ('max_steps' not in settings or False in ended)


def test_probabilities_are_those_of_the_tokens_in_their_gaps():
  cfg = it.SampleConfig.create({'max_length': 12, 'token': {'temperature': 1.0}}, closed_tokens=CLOSED)
  rows = [([CLS, BOS], [False, True])] * 20
  out = jax.device_get(it.sample(Ending(), jax.random.key(0), make_prompt(rows), cfg))
  words = [v for v in range(V) if v not in cfg.closed_tokens]
  for i in range(20):
    if out.steps_B[i]:
      logits, _ = FORWARD.look_up([CLS, BOS])
      token = next(t for t, age in zip(out.tokens_BxL[i], out.order_BxL[i], strict=True) if age == 0)
      expected = logits[1, token] - math.log(sum(math.exp(logits[1, v]) for v in words))
      assert out.log_prob_BxM[i, 0] == pytest.approx(expected, abs=1e-4)
  assert len({int(out.tokens_BxL[i, 2]) for i in range(20)}) > 1


def test_rows_of_a_parallel_decoding_do_not_see_each_other():
  settings = {'max_length': 20, 'parallel': True, 'token': {'temperature': 1.0}, 'min_buffer': 4}
  cfg = it.SampleConfig.create(settings, closed_tokens=CLOSED)
  rows = prompts()
  run = jax.jit(functools.partial(it.sample, Ending()), static_argnames='cfg')
  together = run(jax.random.key(0), make_prompt(rows), cfg=cfg)
  for i in (0, 3, 7):
    prompt = make_prompt(rows[i : i + 1])._replace(request_B=jnp.array([i]))
    alone = run(jax.random.key(0), prompt, cfg=cfg._replace(min_buffer=64))
    assert together.tokens_BxL[i].tolist() == alone.tokens_BxL[0].tolist()


def test_insert_all_equals_lists():
  rng = np.random.default_rng(0)
  for _ in range(50):
    array, value = rng.integers(0, 99, (3, 7)), rng.integers(100, 199, (3, 7))
    go = rng.random((3, 7)) < rng.random()
    expected = []
    for b in range(3):
      row = []
      for i in range(7):
        row += [array[b, i], *([value[b, i]] if go[b, i] else [])]
      expected.append(row[:7])
    np.testing.assert_array_equal(drawing.insert_all(jnp.array(array), jnp.array(value), jnp.array(go)), expected)


def test_vocab_max_equals_the_dense_one():
  rng = np.random.default_rng(0)
  hidden, table = rng.normal(size=(2, 3, 5)).astype(np.float32), rng.normal(size=(13, 5)).astype(np.float32)
  bias = np.where(np.arange(13) < 4, numerics.NEG_INF, 0.0).astype(np.float32)
  got = vocabulary.vocab_max(hidden, table, bias, chunk=4)
  np.testing.assert_allclose(got, (hidden @ table.T + bias[None, None]).max(-1), rtol=1e-6)


def test_there_is_no_likelihood():
  with pytest.raises(UserError, match='family=it has no likelihood'):
    it.score(None, None, None, None, None, None)
  with pytest.raises(UserError, match=r'end_threshold=1.5: expected a probability'):
    it.SampleConfig.create({'max_length': 9, 'end_threshold': 1.5})
