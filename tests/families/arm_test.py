"""The autoregressive family: loss, decoding with a cache against decoding without, exact likelihood by enumeration."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tables
from ml_collections import ConfigDict

from ilm_jax.data import pipeline
from ilm_jax.families import arm, corruption, drawing
from ilm_jax.models import numerics, transformer
from ilm_jax.special_tokens import BOS, CLS, EOS
from ilm_jax.types import Prompt, Rule, UserError

V = 12
CLOSED = (0, 1, 2, 4, 5, 6)  # all special tokens but [EOS]
PLAIN = ConfigDict({'fim_rate': 0.0})
MODEL = transformer.ModelConfig(V, 2, 2, 16, 32, causal=True, stop_head=False, dropout=0.0, attention_dropout=0.0)


@pytest.fixture(scope='module')
def forward():
  params = jax.jit(
    lambda: jax.tree.map(lambda x: 1.5 * x, transformer.unbox(transformer.init(MODEL, jax.random.key(1))))
  )()
  return transformer.Forward(MODEL, params)


def example(prompt, answer):
  tokens = np.array([CLS, *prompt, BOS, *answer], np.int32)
  return {'tokens': tokens, 'fixed': np.arange(len(tokens)) < len(prompt) + 2}


def prompt_of(rows, size=8, requests=None):
  tokens_BxL, open_BxL = np.zeros((len(rows), size), np.int32), np.zeros((len(rows), size), bool)
  for i, row in enumerate(rows):
    tokens_BxL[i, : len(row)] = row
    open_BxL[i, len(row) - 1] = bool(row)
  length_B = np.array([len(row) for row in rows], np.int32)
  return Prompt(tokens_BxL, length_B, open_BxL, np.arange(len(rows)) if requests is None else np.array(requests))


ROWS = [[CLS, BOS], [CLS, 7, 8, 9, BOS], [], [CLS, 11, BOS], [CLS, 7, 7, 7, 7, 7, 7, BOS]]

# --- training ---------------------------------------------------------------------------------------------------------


def test_targets_are_the_next_tokens_and_the_end():
  made = corruption.arm(None, example([7, 8], [9, 10, 11]), PLAIN)
  assert made['tokens'].tolist() == [CLS, 7, 8, BOS, 9, 10, 11]
  assert made['target_gap'].tolist() == [3, 4, 5, 6]
  assert made['target_token'].tolist() == [9, 10, 11, EOS]
  assert not made['open'].any()
  nothing = corruption.arm(None, example([7], []), PLAIN)
  assert nothing['target_gap'].tolist() == [2] and nothing['target_token'].tolist() == [EOS]


def test_given_text_behind_a_gap_is_refused():
  with pytest.raises(UserError, match=r'family=arm writes from left to right.*or family=ilm or mdm'):
    corruption.arm(None, {'tokens': np.arange(5), 'fixed': np.array([True, True, False, True, False])}, PLAIN)


def test_packed_loss_equals_the_plain_loop(forward):
  rng = np.random.default_rng(0)
  examples = [example(rng.integers(7, V, 3).tolist(), rng.integers(7, V, n).tolist()) for n in (0, 1, 4, 6, 2)]
  batch = pipeline.pack(
    [corruption.arm(None, e, PLAIN) for e in examples], list(range(5)), pipeline.Shape(2, 24, 24, 4)
  )
  outputs = jax.jit(transformer.apply, static_argnums=0)(
    MODEL, forward.params, batch['tokens_BxL'], batch['position_BxL'], batch['segment_BxL'], batch['cls_BxS']
  )
  cfg = ConfigDict({'compute': 'float32', 'vocab_chunk': 5})
  pairs = arm.loss(outputs, batch, cfg)
  total, count, one = 0.0, 0, jax.jit(lambda *args: forward(*args))
  for e in examples:
    tokens, row = e['tokens'], np.zeros((1, 16), np.int32)
    row[0, : len(tokens)] = tokens
    alone = one(row, np.array([len(tokens)]))
    log_prob = jax.nn.log_softmax(alone.hidden_BxLxD[0] @ alone.unembed_VxD.T, axis=-1)
    for at in range(int(e['fixed'].sum()), len(tokens) + 1):
      total -= float(log_prob[at - 1, tokens[at] if at < len(tokens) else EOS])
      count += 1
  assert float(pairs['loss'][1]) == count and float(pairs['string_loss'][1]) == 5
  np.testing.assert_allclose(float(pairs['loss'][0]), total, rtol=1e-5)
  np.testing.assert_allclose(float(pairs['string_loss'][0]), total, rtol=1e-5)


# --- the cache --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('compute', ['float32', 'mixed', 'bfloat16'])
def test_a_cached_pass_gives_the_features_of_a_whole_one(forward, compute):
  cfg = transformer.dataclasses.replace(MODEL, compute=compute)
  tokens_BxL = np.random.default_rng(0).integers(7, V, (3, 12)).astype(np.int32)
  cached = transformer.Forward(cfg, forward.params)
  run = jax.jit(lambda *args: cached.cached(*args))
  whole = jax.jit(lambda *args: cached(*args))(tokens_BxL, np.full(3, 12)).hidden_BxLxD
  cache, parts, at = cached.cache(3, 16), [], 0
  for size in (4, 1, 1, 3, 1, 2):
    outputs, cache = run(jnp.array(tokens_BxL[:, at : at + size]), jnp.full(3, at), cache)
    parts.append(outputs.hidden_BxLxD)
    at += size
  tolerance = {'float32': 2e-6, 'mixed': 2e-2, 'bfloat16': 6e-2}[compute]
  difference = np.abs(np.concatenate(parts, axis=1).astype(np.float32) - np.asarray(whole, np.float32)).max()
  assert difference <= tolerance * np.abs(np.asarray(whole, np.float32)).max()


@functools.partial(jax.jit, static_argnums=(0, 4))
def whole_pass(forward, tokens_1xL, length, rng, cfg, first):
  """(log-probabilities, drawn token) of the next token, with the whole row through the model."""
  outputs = forward(tokens_1xL, length[None])
  logits = (outputs.hidden_BxLxD[:, length - 1] @ outputs.unembed_VxD.T).at[:, jnp.array(cfg.closed_tokens)].set(-1e30)
  log_prob = jax.nn.log_softmax(logits[0])
  end = jnp.where(first & cfg.force_first, numerics.NEG_INF, logits[:, EOS])
  return log_prob, drawing.choose(rng[None], logits.at[:, EOS].set(end), cfg.token)[0]


class Fixed:
  """A forward with its parameters inside, which jit takes by identity."""

  def __init__(self, forward):
    self.forward = forward

  def __call__(self, tokens_BxL, length_B):
    return self.forward(tokens_BxL, length_B)


def uncached(forward, rng, row, request, cfg):
  """Decode one row: every step runs the whole row, and draws with the keys the sampler says it uses."""
  row, new, log_probs, stops = list(row), [], [], []
  limit = min(cfg.max_length, cfg.max_length if cfg.max_steps is None else cfg.max_steps)
  key = jax.random.fold_in(rng, request)
  while True:
    tokens = np.zeros((1, cfg.max_length), np.int32)
    tokens[0, : len(row)] = row
    log_prob, token = whole_pass(forward, tokens, jnp.array(len(row)), jax.random.fold_in(key, len(new)), cfg, not new)
    stops.append(float(jnp.exp(log_prob[EOS])))
    if int(token) == EOS:
      return row, new, log_probs, stops, True
    if len(row) >= cfg.max_length or len(new) >= limit:
      return row, new, log_probs, stops, False
    row, new = [*row, int(token)], [*new, int(token)]
    log_probs.append(float(log_prob[int(token)]))


@pytest.mark.parametrize(
  'settings',
  [
    {},
    {'token': Rule()},
    {'token': Rule(0.7, top_k=3)},
    {'token': Rule(top_p=0.8), 'force_first': True},
    {'token': Rule(), 'max_steps': 4},
  ],
  ids=['greedy', 'plain', 'top-k', 'nucleus', 'max_steps'],
)
@pytest.mark.parametrize('kind', ['model', 'table'])
def test_decoding_with_a_cache_equals_decoding_without(forward, kind, settings):
  forward = forward if kind == 'model' else tables.Forward(vocab=V)
  cfg = arm.SampleConfig(**{'max_length': 21, 'closed_tokens': CLOSED, 'min_buffer': 4, 'token': Rule(0.0), **settings})
  rng = jax.random.key(3)
  out = jax.device_get(jax.jit(functools.partial(arm.sample, forward, cfg=cfg))(rng, prompt_of(ROWS)))
  lengths, slow = [], Fixed(forward)
  for i, row in enumerate(ROWS):
    if not row:
      assert out.length_B[i] == 0 and not out.stopped_B[i]
      continue
    expected, new, log_probs, stops, stopped = uncached(slow, rng, row, i, cfg)
    n = out.steps_B[i]
    assert out.tokens_BxL[i, : out.length_B[i]].tolist() == expected
    assert n == len(new) and out.stopped_B[i] == stopped
    assert out.order_BxL[i].tolist() == [-1] * len(row) + list(range(n)) + [-1] * (21 - len(expected))
    np.testing.assert_allclose(out.log_prob_BxM[i, :n], log_probs, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(out.stop_prob_BxM[i, : n + 1], stops, rtol=1e-4, atol=1e-6)
    lengths.append(n)
  assert max(lengths) > 3, 'nothing was written'


def test_a_row_does_not_depend_on_its_neighbours_or_on_the_size_of_the_cache(forward):
  cfg = arm.SampleConfig(max_length=40, closed_tokens=CLOSED, min_buffer=4, token=Rule())
  rng = jax.random.key(0)
  run = jax.jit(functools.partial(arm.sample, forward), static_argnames='cfg')
  together = run(rng, prompt_of(ROWS), cfg=cfg)
  alone = run(rng, prompt_of(ROWS[1:2], size=5, requests=[1]), cfg=cfg._replace(min_buffer=64))
  assert together.tokens_BxL[1].tolist() == alone.tokens_BxL[0].tolist()


def test_the_end_token_is_never_closed_and_never_written(forward):
  cfg = arm.SampleConfig.create({'max_length': 9, 'gap': {'temperature': 0.0}, 'token': {}}, closed_tokens=range(7))
  assert cfg.closed_tokens == CLOSED
  run = jax.jit(functools.partial(arm.sample, forward, cfg=cfg))
  out = run(jax.random.key(0), prompt_of([[CLS, BOS]] * 50, requests=range(50)))
  assert out.stopped_B.any() and (out.tokens_BxL != EOS).all()


# --- likelihood -------------------------------------------------------------------------------------------------------


def test_stopped_and_living_mass_is_one():
  """Every string of up to 3 tokens over 3 words: their mass and that of all longer ones is 1."""
  words, closed = (7, 8, 9), tuple(i for i in range(10) if i not in (EOS, 7, 8, 9))
  forward, cfg = tables.Forward(vocab=10, scale=512), arm.SampleConfig(max_length=9, closed_tokens=closed)
  strings = [s for n in range(4) for s in itertools.product(words, repeat=n)]
  tokens_BxL = np.zeros((len(strings), 7), np.int32)
  for i, s in enumerate(strings):
    tokens_BxL[i, : 3 + len(s)] = [CLS, 8, BOS, *s]
  length_B = np.array([3 + len(s) for s in strings])
  fixed_BxL = np.arange(7)[None] < np.full((len(strings), 1), 3)

  class Prefix:
    """The table seen by a causal model: features of a place depend on the tokens up to it."""

    def __call__(self, tokens_BxL, length_B):
      rows = [forward(tokens_BxL, jnp.full_like(length_B, n + 1)).hidden_BxLxD[:, n] for n in range(7)]
      return transformer.Outputs(jnp.stack(rows, axis=1), jnp.eye(10))

  scored = arm.score(Prefix(), None, tokens_BxL, fixed_BxL, length_B, cfg)
  assert scored.kind == 'exact' and scored.tokens_B.tolist() == [len(s) for s in strings]
  mass = np.exp(-np.asarray(scored.nll_B, np.float64))
  alive = 0.0
  for i, s in enumerate(strings):
    if len(s) == 3:
      logits, _ = forward.look_up([CLS, 8, BOS, *s])
      p_end = np.exp(logits[5, EOS]) / np.exp(logits[5, [EOS, *words]]).sum()
      alive += mass[i] / p_end * (1 - p_end)
  np.testing.assert_allclose(mass.sum() + alive, 1.0, atol=1e-6)
  assert 0.01 < alive < 0.99


def test_the_score_of_an_answer_is_that_of_its_sampling(forward):
  cfg = arm.SampleConfig(max_length=30, closed_tokens=CLOSED, token=Rule())
  out = jax.device_get(jax.jit(functools.partial(arm.sample, forward, cfg=cfg))(jax.random.key(5), prompt_of(ROWS)))
  fixed_BxL = out.order_BxL < 0
  scored = arm.score(forward, None, out.tokens_BxL, fixed_BxL, out.length_B, cfg)
  rows = [i for i in range(len(ROWS)) if out.stopped_B[i]]
  assert rows, 'no row has ended by itself'
  for i in rows:
    n = out.steps_B[i]
    np.testing.assert_allclose(
      scored.nll_B[i], -out.log_prob_BxM[i, :n].sum() - np.log(out.stop_prob_BxM[i, n]), rtol=1e-4
    )
    assert scored.tokens_B[i] == n
