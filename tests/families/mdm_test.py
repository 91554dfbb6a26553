"""Masked diffusion: its corruption, loss, sampler and bound, against loops, enumeration and a table for a model."""

import collections
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from flax.core import meta
from ml_collections import ConfigDict
from tables import mix

from ilm_jax.data import pipeline
from ilm_jax.families import corruption, mdm
from ilm_jax.inference import static_batching
from ilm_jax.models import transformer
from ilm_jax.training import experiment, train_step
from ilm_jax.types import GREEDY, Outputs, Prompt, Rule, UserError

PAD, CLS, MASK, BOS = 0, 1, 2, 4
PLAIN = ConfigDict({'length': 0, 'noise_eps': 1e-3})


@pytest.fixture(scope='module', autouse=True)
def programs(tmp_path_factory):
  with small.kept_programs(tmp_path_factory.mktemp('programs')):
    yield


def sigma(t, eps=1e-3):
  return -math.log(1 - (1 - eps) * t)


def refusal(function, *args, **kwargs) -> str:
  """The line that a mistake gets."""
  with pytest.raises(UserError) as error:
    function(*args, **kwargs)
  assert '\n' not in str(error.value)
  return str(error.value)


# --- corruption -------------------------------------------------------------------------------------------------------


def example(fixed: str):
  """An example from a picture: `CpB....` has [CLS], a prompt token, [BOS] and four free tokens."""
  tokens = [{'C': CLS, 'B': BOS}.get(c, 10 + i) for i, c in enumerate(fixed)]
  return {'tokens': np.array(tokens, np.int32), 'fixed': np.array([c != '.' for c in fixed])}


def many(ex, number, cfg=PLAIN, **kwargs):
  return [corruption.mdm(np.random.default_rng(i), ex, cfg, **kwargs) for i in range(number)]


def test_masks_stand_where_free_tokens_were_and_the_targets_name_them():
  ex = example('CppB..x..yy.')
  sizes = set()
  for got in many(ex, 200):
    masked = got['tokens'] == MASK
    assert not masked[ex['fixed']].any() and (got['length'], got['free']) == (12, 5)
    np.testing.assert_array_equal(got['tokens'][~masked], ex['tokens'][~masked])
    np.testing.assert_array_equal(got['target_gap'], np.flatnonzero(masked))
    np.testing.assert_array_equal(got['target_token'], ex['tokens'][masked])
    assert len(got['target_weight']) == masked.sum() and len(got['open']) == 12
    sizes.add(int(masked.sum()))
  assert sizes == {0, 1, 2, 3, 4, 5}


def test_each_free_token_is_masked_by_itself_with_the_schedules_probability():
  ex, number = example('CB' + '.' * 10), 3_000
  for eps in (1e-3, 0.2):
    cfg = ConfigDict({'length': 0, 'noise_eps': eps})
    for u in (0.0, 0.3, 0.9):
      p = (1 - eps) * (1 - 0.999 * u)
      masked = np.array([got['tokens'][2:] == MASK for got in many(ex, number, cfg, u=u)])
      assert abs(masked.mean() - p) < 4.5 * math.sqrt(p * (1 - p) / masked.size)
      assert np.abs(masked.mean(axis=0) - p).max() < 4.5 * math.sqrt(p * (1 - p) / number) + 1e-9
      variance = masked.sum(axis=1).var()
      assert variance == pytest.approx(10 * p * (1 - p), rel=0.2, abs=5e-3), 'tokens are masked together'


def test_times_are_uniform_and_strata_replace_the_draw():
  ex = example('CB......')
  times = np.sort([(1 - math.exp(-got['noise'])) / 0.999 for got in many(ex, 4_000)])
  assert times[0] > 1e-3 and times[-1] <= 1 + 1e-9
  expected = 1e-3 + 0.999 * (np.arange(4_000) + 0.5) / 4_000
  assert np.abs(times - expected).max() < 1.9 / math.sqrt(4_000)  # Kolmogorov: one in 700
  for u, t in [(0.0, 1.0), (0.5, 0.5005), (np.nextafter(1, 0), 1e-3)]:
    assert corruption.mdm(np.random.default_rng(0), ex, PLAIN, u=u)['noise'] == pytest.approx(sigma(t), rel=1e-9)


@pytest.mark.parametrize('eps', [1e-3, math.exp(-10)])
def test_a_targets_weight_is_the_rate_over_the_odds(eps):
  cfg = ConfigDict({'length': 0, 'noise_eps': eps})
  for t in (0.01, 0.4, 0.9):
    got = corruption.mdm(np.random.default_rng(0), example('CB' + '.' * 300), cfg, u=(1 - t) / 0.999)
    assert got['noise'] == pytest.approx(sigma(t, eps), rel=1e-9)
    rate = (sigma(t + 1e-6, eps) - sigma(t - 1e-6, eps)) / 2e-6
    np.testing.assert_allclose(got['target_weight'], rate / math.expm1(sigma(t, eps)), rtol=1e-5)
    assert len(got['target_weight']) > 0


def test_noise_and_weight_are_the_references(golden):
  numbers = golden('mdm')
  for t, noise, rate in zip(numbers['t'], numbers['total_noise'], numbers['noise_rate'], strict=True):
    got = corruption.mdm(np.random.default_rng(0), example('CB' + '.' * 50), PLAIN, u=(1 - t) / 0.999)
    assert got['noise'] == pytest.approx(noise, rel=1e-6)
    np.testing.assert_allclose(got['target_weight'], rate / np.expm1(noise), rtol=1e-6)


def test_padding_is_masked_and_predicted_as_other_tokens_are():
  ex, cfg = example('CpB..'), ConfigDict({'length': 9, 'noise_eps': 1e-3})
  made = many(ex, 100, cfg)
  masked = np.array([got['tokens'] == MASK for got in made])
  assert not masked[:, :3].any() and (masked[:, 3:].mean(axis=0) > 0.3).all()
  for got, where in zip(made, masked, strict=True):
    whole = np.append(ex['tokens'], [PAD] * 4)
    np.testing.assert_array_equal(got['tokens'], np.where(where, MASK, whole))
    np.testing.assert_array_equal(got['target_token'], whole[where])
    assert (got['length'], got['free']) == (5, 2), 'without the padding'
  exact = corruption.mdm(np.random.default_rng(0), ex, ConfigDict({'length': 5, 'noise_eps': 1e-3}))
  assert len(exact['tokens']) == 5
  short = ConfigDict({'length': 4, 'noise_eps': 1e-3})
  line = refusal(corruption.mdm, np.random.default_rng(0), ex, short)
  assert line == 'corrupt.length=4: an example has 5 tokens: raise it'


def test_the_same_generator_gives_the_same_corruption_and_leaves_the_example_alone():
  ex, before = example('CpB...'), example('CpB...')
  for first, second in zip(many(ex, 20), many(ex, 20), strict=True):
    for name in first:
      np.testing.assert_array_equal(first[name], second[name])
  np.testing.assert_array_equal(ex['tokens'], before['tokens'])
  one = corruption.mdm(np.random.default_rng(0), example('CB'), PLAIN)
  types = {'tokens': np.int32, 'target_gap': np.int32, 'target_token': np.int32, 'target_weight': np.float32}
  assert {name: one[name].dtype for name in types} == types and len(one['target_gap']) == 0


# --- the loss ---------------------------------------------------------------------------------------------------------

MODEL = transformer.ModelConfig(
  vocab_size=23, num_layers=1, num_heads=2, d_model=16, d_ff=24, stop_head=False, conditioning='adaln', d_cond=6,
  dropout=0.0, attention_dropout=0.0,
)  # fmt: skip
LOSSES = {name: ConfigDict({'mdm': name, 'compute': 'float32', 'vocab_chunk': 5}) for name in mdm.LOSSES}


@pytest.fixture(scope='module')
def params():
  random = np.random.default_rng(0)
  shapes = meta.unbox(jax.eval_shape(lambda: transformer.init(MODEL, jax.random.key(0))))
  return jax.tree.map(lambda x: random.normal(0, 0.4, x.shape).astype(np.float32), shapes)


def make_examples():
  """Corruptions of examples of several lengths: much and little noise, nothing free, nothing masked."""
  rng, out = np.random.default_rng(0), []
  for prompt, free, u in [(0, 5, 0.6), (3, 4, 0.1), (1, 6, 0.0), (2, 1, 0.5), (0, 0, 0.5), (4, 7, 0.9), (0, 3, 0.999)]:
    tokens = np.array([CLS, *rng.integers(7, 23, prompt), BOS, *rng.integers(7, 23, free)], np.int32)
    out.append(corruption.mdm(rng, {'tokens': tokens, 'fixed': np.arange(len(tokens)) < prompt + 2}, PLAIN, u=u))
  sizes = [len(c['target_gap']) for c in out]
  assert sizes[2] == 6 and 0 in sizes[5:] and len(set(sizes)) > 3
  return out


PACKED = pipeline.Shape(rows=2, length=28, targets=14, segments=5)


def alone(corrupted):
  """One row for each example."""
  shape = pipeline.Shape(rows=1, length=16, targets=9, segments=1)
  return pipeline.concatenate([pipeline.pack([c], [i], shape) for i, c in enumerate(corrupted)])


def packed(corrupted):
  batch = pipeline.pack(corrupted, list(range(len(corrupted))), PACKED)
  assert (batch['example_id_BxS'] >= 0).sum() == len(corrupted) and (batch['example_id_BxS'][:, 2] >= 0).all()
  return batch


@jax.jit
def losses_and_gradients(params, batch):
  """((loss, metrics), gradient) of each way to train."""

  def total(params, name):
    pairs = mdm.loss(transformer.apply_batch(MODEL, params, batch), batch, LOSSES[name])
    return pairs['loss'][0], pairs

  return {name: jax.value_and_grad(total, has_aux=True)(params, name) for name in mdm.LOSSES}


def assert_same(first, second):
  for name in mdm.LOSSES:
    (pairs, grads), (other_pairs, other_grads) = ((made[name][0][1], made[name][1]) for made in (first, second))
    assert jax.tree.map(float, pairs) == jax.tree.map(lambda x: pytest.approx(float(x), rel=1e-5), other_pairs)
    scale = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(other_grads))
    jax.tree.map(
      lambda g, o, scale=scale: np.testing.assert_allclose(g, o, rtol=1e-5, atol=1e-5 * scale), grads, other_grads
    )


def test_the_loss_from_lists_equals_the_dense_form_and_packing_changes_nothing(params):
  corrupted = make_examples()
  batch = alone(corrupted)
  outputs = jax.jit(transformer.apply_batch, static_argnums=0)(MODEL, params, batch)
  hidden, unembed = np.asarray(outputs.hidden_BxLxD, np.float64), np.asarray(outputs.unembed_VxD, np.float64)
  weighted = plain = count = 0.0
  for row, c in enumerate(corrupted):
    t = (1 - math.exp(-c['noise'])) / 0.999
    for place, token in zip(c['target_gap'], c['target_token'], strict=True):
      logits = hidden[row, place] @ unembed.T
      loss = math.log(sum(math.exp(z) for z in logits)) - logits[token]
      weighted, plain, count = weighted + loss / t, plain + loss, count + 1
  first = losses_and_gradients(params, batch)
  for name in mdm.LOSSES:
    (total, pairs), _ = first[name]
    assert [float(x) for x in pairs['string_bound']] == pytest.approx([0.999 * weighted, len(corrupted)], rel=1e-5)
    assert [float(x) for x in pairs['token_loss']] == pytest.approx([plain, count], rel=1e-5)
    expected = pairs['string_bound'] if name == 'nelbo' else (weighted, count)
    assert [float(x) for x in pairs['loss']] == pytest.approx([float(x) for x in expected], rel=1e-5)
    assert float(total) == float(pairs['loss'][0])
  assert_same(losses_and_gradients(params, packed(corrupted)), first)


def test_padding_and_unused_places_have_no_say(params):
  batch = packed(make_examples())
  noisy = {name: value.copy() for name, value in batch.items()}
  empty = batch['segment_BxL'] == 0
  noisy['tokens_BxL'][empty], noisy['position_BxL'][empty] = 9, 5
  unused = batch['target_segment_BxT'] == 0
  for name, value in [('gap', 3), ('token', 7), ('weight', 2.0)]:
    noisy[f'target_{name}_BxT'][unused] = value
  noisy['noise_BxS'][batch['segment_weight_BxS'] == 0] = 3.0
  assert empty.any() and unused.any()
  assert_same(losses_and_gradients(params, noisy), losses_and_gradients(params, batch))


def test_the_weight_of_an_example_weighs_its_loss_and_its_masks(params):
  corrupted = make_examples()
  batch = alone(corrupted)
  batch['segment_weight_BxS'][:, 0] = [1, 0, 2, 1, 0, 0, 1]
  doubled = [corrupted[i] for i in (0, 2, 2, 3, 6, 4, 4)]
  expected = alone(doubled)
  expected['segment_weight_BxS'][5:] = 0
  assert_same(losses_and_gradients(params, batch), losses_and_gradients(params, expected))


def test_a_batch_of_padding_has_loss_zero_and_a_finite_gradient(params):
  for (total, pairs), grads in losses_and_gradients(params, PACKED.empty()).values():
    assert float(total) == 0 and float(pairs['loss'][1]) == 0
    assert all((np.asarray(g) == 0).all() for g in jax.tree.leaves(grads))


# --- a table for a model: logits that are a hash of the whole row, and move with the noise level ----------------------

V = 8  # 5, 6, 7 are words
CLOSED = (CLS, MASK, 3, BOS)


def table(tokens_BxL, length_B, noise_B, xp, *, scale=96, tilt=0.125):
  """logits_BxLxV; every token of a row changes them."""
  index_1xL = xp.arange(tokens_BxL.shape[1], dtype=xp.uint32)[None]
  words_BxL = mix(tokens_BxL.astype(xp.uint32) * np.uint32(2654435761) + index_1xL)
  words_BxL = xp.where(index_1xL < length_B[:, None].astype(xp.uint32), words_BxL, xp.uint32(0))
  row_B = words_BxL.sum(axis=1, dtype=xp.uint32)
  place_1xLxV = index_1xL[..., None] * np.uint32(7919) + xp.arange(V, dtype=xp.uint32)[None, None] * np.uint32(104729)
  hash_BxLxV = mix(row_B[:, None, None] + place_1xLxV)
  steps_BxLxV = (hash_BxLxV >> 16) % np.uint32(5)
  return (hash_BxLxV % np.uint32(509)).astype(xp.float32) / scale + tilt * noise_B[:, None, None] * steps_BxLxV.astype(
    xp.float32
  )


def forward(tokens_BxL, length_B, noise_BxS, **settings):
  return Outputs(table(tokens_BxL, length_B, noise_BxS[:, 0], jnp, **settings), jnp.eye(V))


@functools.cache
def log_probs(row, noise, closed=CLOSED, **settings):
  """The table for one row: log p[place][token] over the tokens that are not closed, else -inf."""
  logits = table(np.array([row]), np.array([len(row)]), np.array([noise], np.float32), np, **settings)[0].astype(float)
  logits[:, list(closed)] = -np.inf
  return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


@functools.partial(jax.jit, static_argnames=('cfg', 'forward'))
def sample(prompt, rng, cfg, forward=forward):
  return mdm.sample(forward, rng, prompt, cfg)


def make_prompt(rows, *, size=8, requests=None):
  """A Prompt from lists of (tokens, is the tail open, number of tokens to come)."""
  tokens_BxL, open_BxL = np.zeros((len(rows), size), np.int32), np.zeros((len(rows), size), bool)
  for i, (tokens, tail, _) in enumerate(rows):
    tokens_BxL[i, : len(tokens)] = tokens
    open_BxL[i, len(tokens) - 1] = tail and len(tokens) > 0
  length_B, free_B = np.array([len(row[0]) for row in rows], np.int32), np.array([row[2] for row in rows], np.int32)
  request_B = np.array(range(len(rows)) if requests is None else requests, np.int32)
  return Prompt(tokens_BxL, length_B, open_BxL, request_B, free_B)


def prompts(number=24, seed=0):
  """Prompts with an open tail, some closed, some with [MASK]s inside."""
  rng, rows = np.random.default_rng(seed), [([CLS, BOS], True, 6), ([], False, -1), ([CLS, BOS, 5], True, 0)]
  while len(rows) < number:
    tokens = [CLS, *rng.choice([MASK, 5, 6, 7], rng.integers(0, 5), p=[0.2, 0.3, 0.3, 0.2]).tolist(), BOS]
    rows.append((tokens, bool(rng.random() < 0.8), int(rng.integers(0, 6))))
  return rows


# --- the sampler against a plain loop ---------------------------------------------------------------------------------


def denoise(tokens, tail, free, cfg):
  """Sample one row greedily by certainty: (tokens, order, log p of each step)."""
  room = cfg.max_length - len(tokens)
  row = list(tokens) + [MASK] * ((room if cfg.length == 'predicted' else min(max(free, 0), room)) if tail else 0)
  masks = row.count(MASK)
  steps = min(masks, cfg.max_steps or cfg.max_length)
  order, sums = [-1] * len(row), []
  for step in range(steps):
    places = [i for i, token in enumerate(row) if token == MASK]
    seen = row + [PAD] * (cfg.max_length - len(row)) if cfg.length == 'predicted' else row
    log_p = log_probs(tuple(seen), sigma(len(places) / masks), cfg.closed_tokens)
    inside = log_probs(tuple(seen), sigma(len(places) / masks), (*cfg.closed_tokens, PAD))
    log_p = {i: inside[i] if i < len(tokens) else log_p[i] for i in places}  # a [MASK] of the prompt is a token
    certainty = {}
    for i in places:
      probs = sorted((math.exp(x) for x in log_p[i] if x > -math.inf), reverse=True)
      certainty[i] = {
        'top_probability': probs[0],
        'margin': probs[0] - probs[1],
        'entropy': sum(p * math.log(p) for p in probs),
      }[cfg.order]
    stay = masks * (steps - 1 - step) // steps
    chosen = sorted(places, key=lambda i: (-certainty[i], i))[: len(places) - stay]
    assert chosen
    sums.append(sum(log_p[i].max() for i in chosen))
    for i in chosen:
      row[i], order[i] = int(log_p[i].argmax()), step
  kept = [i for i in range(len(row)) if row[i] != PAD or order[i] < 0]
  return [row[i] for i in kept], [order[i] for i in kept], sums


@pytest.mark.parametrize(
  ('order', 'length', 'steps'),
  [
    ('top_probability', 'predicted', 3),
    ('margin', 'given', 3),
    ('margin', 'predicted', None),
    ('entropy', 'predicted', None),
  ],
)
def test_the_most_certain_tokens_come_first_as_in_a_plain_loop(order, length, steps):
  closed = CLOSED if length == 'predicted' else (*CLOSED, PAD)
  cfg = mdm.SampleConfig(max_length=11, max_steps=steps, order=order, length=length, token=GREEDY, closed_tokens=closed)
  rows, removed = prompts(), 0
  out = jax.device_get(sample(make_prompt(rows), jax.random.key(0), cfg))
  for i, row in enumerate(rows):
    tokens, ages, sums = denoise(*row, cfg)
    assert out.tokens_BxL[i].tolist() == tokens + [0] * (11 - len(tokens))
    assert out.order_BxL[i].tolist() == ages + [-1] * (11 - len(tokens))
    assert (out.length_B[i], out.steps_B[i]) == (len(tokens), len(sums))
    expected = sums + [0.0] * (out.log_prob_BxM.shape[1] - len(sums))
    np.testing.assert_allclose(out.log_prob_BxM[i], expected, atol=1e-4)
    removed += 11 - len(tokens) if row[1] else 0
  np.testing.assert_array_equal(out.stopped_B, [len(row[0]) > 0 for row in rows])
  assert not out.stop_prob_BxM.any() and out.log_prob_BxM.shape == (len(rows), steps or 11)
  assert steps is None or out.steps_B.max() == steps
  assert length == 'given' or removed > 10, '[PAD]s were taken out'


@pytest.mark.parametrize(
  ('order', 'steps'), [('ancestral', 1), ('ancestral', 7), ('top_probability', 2), ('top_probability', 30)]
)
def test_the_last_step_leaves_no_mask_behind(order, steps):
  cfg = mdm.SampleConfig(max_length=12, max_steps=steps, order=order, closed_tokens=(*CLOSED, PAD), length='given')
  rows = prompts(40, seed=1)
  out = jax.device_get(sample(make_prompt(rows), jax.random.key(3), cfg))
  assert not (out.tokens_BxL == MASK).any()
  assert out.order_BxL.max() < steps and out.steps_B.max() <= steps
  np.testing.assert_array_equal(out.order_BxL.max(axis=1) + 1, out.steps_B)
  for i, (tokens, tail, free) in enumerate(rows):
    assert out.length_B[i] == len(tokens) + (free if tail else 0), 'the length was given'
    row, ages = out.tokens_BxL[i, : out.length_B[i]], out.order_BxL[i, : out.length_B[i]]
    given = [token for token in tokens if token != MASK]
    assert row[ages < 0].tolist() == given, 'given tokens stay'
    assert set(row[ages >= 0].tolist()) <= {5, 6, 7}


def test_an_unknown_number_of_tokens_is_none_and_more_than_fit_are_cut():
  cfg = mdm.SampleConfig(max_length=6, length='given', closed_tokens=(*CLOSED, PAD))
  out = sample(make_prompt([([CLS, BOS], True, -1), ([CLS, BOS], True, 50)]), jax.random.key(0), cfg)
  assert out.length_B.tolist() == [2, 6]


def chi_square(counts: dict, probabilities: dict) -> float:
  """Pearson's statistic minus its mean, in units of its standard deviation."""
  number = sum(counts.values())
  assert set(counts) <= set(probabilities), 'something impossible happened'
  assert min(probabilities.values()) * number > 5, 'too few draws'
  statistic = sum((counts.get(key, 0) - p * number) ** 2 / (p * number) for key, p in probabilities.items())
  return (statistic - (len(probabilities) - 1)) / math.sqrt(2 * (len(probabilities) - 1))


EVEN = {'scale': 512, 'tilt': 1 / 64}
even = functools.partial(forward, **EVEN)  # everything is drawn often


def test_ancestral_steps_draw_tokens_and_times_as_the_enumeration_says():
  """Each token's step is uniform and its own; its distribution is that of the row and the noise before that step."""
  number, steps, exact = 30_000, 3, {}
  closed = (*CLOSED, PAD)
  for times in itertools.product(range(steps), repeat=2):
    for text in itertools.product((5, 6, 7), repeat=2):
      p = steps**-2
      for j in range(2):
        seen = tuple(text[k] if times[k] < times[j] else MASK for k in range(2))
        p *= math.exp(log_probs((CLS, BOS, *seen), sigma(1 - times[j] / steps), closed, **EVEN)[2 + j, text[j]])
      exact[text, times] = p
  assert sum(exact.values()) == pytest.approx(1)
  cfg = mdm.SampleConfig(max_length=6, max_steps=steps, length='given', closed_tokens=closed)
  out = jax.device_get(sample(make_prompt([([CLS, BOS], True, 2)] * number), jax.random.key(1), cfg, even))
  pairs = zip(out.tokens_BxL[:, 2:4].tolist(), out.order_BxL[:, 2:4].tolist(), strict=True)
  counts = collections.Counter((tuple(text), tuple(times)) for text, times in pairs)
  assert abs(chi_square(counts, exact)) < 4
  for i in range(300):
    text, times = out.tokens_BxL[i, 2:4].tolist(), out.order_BxL[i, 2:4].tolist()
    assert out.log_prob_BxM[i].sum() == pytest.approx(math.log(exact[tuple(text), tuple(times)] * steps**2), abs=1e-4)


# --- independence -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('order', ['ancestral', 'margin'])
def test_a_row_depends_on_its_request_alone(order):
  """Neighbours, place and size of the batch, and the prompts' buffer change neither its tokens nor their order."""
  rows, rng = prompts(8, seed=3), jax.random.key(5)
  requests = [11, 3, 7, 2**31 - 1, 0, 5, 8, 2]
  cfg = mdm.SampleConfig(max_length=12, max_steps=5, order=order, token=Rule(top_p=0.9), closed_tokens=CLOSED)

  def results(numbers, size=8):
    prompt = make_prompt([rows[i] for i in numbers], size=size, requests=[requests[i] for i in numbers])
    out = jax.device_get(sample(prompt, rng, cfg))
    return {number: jax.tree.map(lambda x, i=i: x[i], out) for i, number in enumerate(numbers)}

  expected = results(range(8))
  assert len({tuple(out.tokens_BxL) for out in expected.values()}) > 6
  for variant in (results([5, 2, 7, 0, 1, 6, 4, 3]), results([0], size=12), results([7], size=12)):
    for number, out in variant.items():
      for name in ('tokens_BxL', 'order_BxL', 'length_B', 'steps_B', 'stopped_B'):
        np.testing.assert_array_equal(getattr(out, name), getattr(expected[number], name))
      np.testing.assert_allclose(out.log_prob_BxM, expected[number].log_prob_BxM, atol=1e-5)
  assert results(range(8))[0].tokens_BxL.tolist() == expected[0].tokens_BxL.tolist()


def test_other_requests_and_other_keys_draw_something_else():
  cfg = mdm.SampleConfig(max_length=10, length='given', closed_tokens=(*CLOSED, PAD))
  rows = [([CLS, BOS], True, 8)] * 12
  first = sample(make_prompt(rows), jax.random.key(0), cfg).tokens_BxL.tolist()
  assert len({tuple(row) for row in first}) > 8
  assert sample(make_prompt(rows), jax.random.key(1), cfg).tokens_BxL.tolist() != first
  same = sample(make_prompt(rows, requests=[4] * 12), jax.random.key(0), cfg).tokens_BxL.tolist()
  assert same == [first[4]] * 12


def test_positions_taken_together_or_one_by_one_draw_the_same(monkeypatch):
  cfg = mdm.SampleConfig(max_length=10, closed_tokens=CLOSED)
  prompt = make_prompt(prompts(6))
  expected = jax.jit(lambda prompt: mdm.sample(forward, jax.random.key(0), prompt, cfg))(prompt)
  monkeypatch.setattr(mdm, 'ALIVE', 6 * V * 3)  # three positions at a time, then one
  got = jax.jit(lambda prompt: mdm.sample(forward, jax.random.key(0), prompt, cfg))(prompt)
  np.testing.assert_array_equal(got.tokens_BxL, expected.tokens_BxL)
  np.testing.assert_array_equal(got.order_BxL, expected.order_BxL)


def test_sampling_is_one_program_that_never_talks_to_the_host():
  cfg = mdm.SampleConfig(max_length=10, closed_tokens=CLOSED)
  program = jax.jit(lambda prompt, rng: mdm.sample(forward, rng, prompt, cfg))
  text = str(jax.make_jaxpr(program)(make_prompt(prompts(6)), jax.random.key(0)))
  assert 'while' in text and 'callback' not in text
  first, second = ((jax.device_put(make_prompt(prompts(6, seed))), jax.random.key(seed)) for seed in (0, 1))
  program(*first)
  with jax.transfer_guard('disallow'):
    program(*second)
  assert program._cache_size() == 1


# --- likelihood -------------------------------------------------------------------------------------------------------


def subsets(free: int):
  return [set(d) for n in range(1, free + 1) for d in itertools.combinations(range(free), n)]


def masked_losses(text, gone, noise, closed, **settings):
  """-log p of each masked token of a text after [CLS] [BOS]."""
  row = (CLS, BOS, *(MASK if j in gone else token for j, token in enumerate(text)))
  log_p = log_probs(row, noise, closed, **settings)
  return [-log_p[2 + j, text[j]] for j in sorted(gone)]


def exact_bound(text, closed, share=lambda t: t, lowest=0.0, **settings):
  """The integral of 1/t E sum of losses over t in (lowest, 1], each token masked with probability share(t)."""
  nodes, weights = np.polynomial.legendre.leggauss(120)
  total = 0.0
  for node, weight in zip(nodes, weights, strict=True):
    # t = 1 - (1 - lowest) s^2: dense near 1, where the noise level is steep
    s = (node + 1) / 2
    t = 1 - (1 - lowest) * s * s
    jacobian = (1 - lowest) * 2 * s * weight / 2
    p = share(t)
    for gone in subsets(len(text)):
      chance = p ** len(gone) * (1 - p) ** (len(text) - len(gone))
      total += jacobian * chance / t * sum(masked_losses(text, gone, sigma(t), closed, **settings))
  return total


def path_log_probabilities(text, closed, **settings):
  """Of each order in which single tokens can be revealed, where the noise level does not matter."""
  for order in itertools.permutations(range(len(text))):
    gone, total = set(range(len(text))), 0.0
    for j in order:
      total -= dict(zip(sorted(gone), masked_losses(text, gone, 0.0, closed, **settings), strict=True))[j]
      gone.remove(j)
    yield total


@functools.partial(jax.jit, static_argnames=('cfg', 'forward'))
def run_score(tokens_BxL, fixed_BxL, length_B, cfg, forward):
  return mdm.score(forward, jax.random.key(0), tokens_BxL, fixed_BxL, length_B, cfg)[1:]


def score(tokens, fixed, length, cfg, forward=forward):
  """The score of rows (lists) of one size."""
  arrays = np.array(tokens, np.int32), np.array(fixed, bool), np.array(length, np.int32)
  nll_B, error_B, tokens_B = run_score(*arrays, cfg, forward)
  return np.asarray(nll_B, np.float64), np.asarray(error_B, np.float64), tokens_B.tolist()


GIVEN = mdm.SampleConfig(max_length=8, length='given', closed_tokens=(*CLOSED, PAD), score_draws=8)
timeless = functools.partial(forward, tilt=0.0)


def test_the_score_estimates_the_integral_without_bias_and_knows_its_error():
  text, rows = (6, 5, 7), 2_000
  exact = exact_bound(text, GIVEN.closed_tokens)
  row = [CLS, BOS, *text]
  nll_B, error_B, tokens_B = score([row] * rows, [[1, 1, 0, 0, 0]] * rows, [5] * rows, GIVEN)
  spread = nll_B.std()
  assert spread > 0.05
  assert abs(nll_B.mean() - exact) < 4 * spread / math.sqrt(rows)
  assert math.sqrt((error_B**2).mean()) == pytest.approx(spread, rel=0.1)
  assert tokens_B == [3] * rows
  assert (
    mdm.score(forward, jax.random.key(0), np.array([row]), np.ones((1, 5), bool), np.array([5]), GIVEN)[0] == 'bound'
  )


def test_the_bound_is_the_mean_over_orders_and_above_the_true_likelihood():
  closed, total = GIVEN.closed_tokens, 0.0
  texts = list(itertools.product((5, 6, 7), repeat=3))
  for text in texts:
    paths = list(path_log_probabilities(text, closed, tilt=0.0))
    total += np.exp(paths).mean()
  assert total == pytest.approx(1), 'a mixture over orders, of strings of this length'
  for text in texts[::4]:
    paths = list(path_log_probabilities(text, closed, tilt=0.0))
    by_number = [
      np.mean(
        [np.mean(masked_losses(text, set(d), 0.0, closed, tilt=0.0)) for d in itertools.combinations(range(3), n)]
      )
      for n in (1, 2, 3)
    ]
    assert sum(by_number) == pytest.approx(-np.mean(paths), rel=1e-9)
    assert exact_bound(text, closed, tilt=0.0) == pytest.approx(-np.mean(paths), rel=1e-6)
    row = [CLS, BOS, *text]
    nll_B, _, _ = score([row] * 400, [[1, 1, 0, 0, 0]] * 400, [5] * 400, GIVEN, forward=timeless)
    error = nll_B.std() / 20
    assert abs(nll_B.mean() + np.mean(paths)) < 4 * error
    assert nll_B.mean() > -math.log(np.exp(paths).mean()) - 4 * error


def test_one_free_token_is_scored_by_its_loss_at_a_uniform_time():
  cfg = GIVEN._replace(score_draws=2)
  nll_B, error_B, _ = score([[CLS, BOS, 6]], [[1, 1, 0]], [3], cfg, forward=timeless)
  assert nll_B[0] == pytest.approx(masked_losses((6,), {0}, 0.0, cfg.closed_tokens, tilt=0.0)[0], abs=1e-5)
  assert error_B[0] < 1e-6


def test_the_bound_of_a_predicted_length_pays_for_the_padding():
  cfg = GIVEN._replace(length='predicted', max_length=6, closed_tokens=CLOSED)
  row, fixed = [CLS, 7, BOS, 6], [1, 1, 1, 0]
  predicted = score([row], [fixed], [4], cfg)
  written = score([[*row, PAD, PAD]], [[*fixed, 0, 0]], [6], cfg._replace(length='given'))
  assert predicted[0] == written[0] > 0 and predicted[1] == written[1] > 0
  assert (predicted[2], written[2]) == ([1], [3])
  buffers = score([[*row, 5, 5, 5, 5]], [[*fixed, 0, 1, 0, 1]], [4], cfg)
  assert buffers[2] == [1] and buffers[0][0] > 0


def test_strings_that_cannot_come_about_cost_infinitely_much_and_empty_ones_nothing():
  rows = [[CLS, BOS, 6, 5], [CLS, BOS, 6, BOS], [CLS, BOS, 6, PAD], [PAD] * 4, [CLS, BOS, 5, 5]]
  fixed = [[1, 1, 0, 0]] * 4 + [[1, 1, 1, 1]]
  nll_B, error_B, tokens_B = score(rows, fixed, [4, 4, 4, 0, 4], GIVEN._replace(score_draws=32))
  assert np.isfinite(nll_B).tolist() == [True, False, False, True, True]
  assert (nll_B[0] > 0, nll_B[3], nll_B[4]) == (True, 0, 0) and error_B[1:].tolist() == [0] * 4
  assert tokens_B == [2, 2, 2, 0, 0]
  short = GIVEN._replace(length='predicted', max_length=3, closed_tokens=CLOSED)
  assert np.isinf(score(rows[:1], fixed[:1], [4], short)[0][0]), 'longer than what is sampled'


def test_the_training_bound_is_the_same_integral_but_for_its_ends():
  text, number = (6, 5, 7), 6_000
  ex = {'tokens': np.array([CLS, BOS, *text], np.int32), 'fixed': np.array([True, True, False, False, False])}
  made = [
    corruption.mdm(np.random.default_rng(i), ex, PLAIN, u=(i + u) / number)
    for i, u in enumerate(np.random.default_rng(0).random(number))
  ]
  shape = pipeline.Shape(rows=200, length=5, targets=3, segments=1)
  batch = pipeline.concatenate([pipeline.pack(made[i : i + 200], [0] * 200, shape) for i in range(0, number, 200)])
  assert (batch['example_id_BxS'] >= 0).all()

  @jax.jit
  def losses(batch):
    outputs = forward(batch['tokens_BxL'], jnp.full(number, 5), batch['noise_BxS'])
    return mdm.example_losses(outputs, batch)[0][:, 0] * 0.999, mdm.loss(outputs, batch, LOSSES['nelbo'])[
      'string_bound'
    ]

  nelbo_B, (total, weight) = losses(batch)
  assert float(total / weight) == pytest.approx(float(nelbo_B.mean()), rel=1e-4)
  expected = exact_bound(text, (), share=lambda t: 0.999 * t, lowest=1e-3)
  assert abs(float(total / weight) - expected) < 4 * float(nelbo_B.std()) / math.sqrt(number)
  assert expected == pytest.approx(exact_bound(text, ()), rel=0.01)


# --- the contract: settings, batches, steps ---------------------------------------------------------------------------


def test_settings_come_from_a_config():
  sampling_cfg = ConfigDict({'max_length': 9, 'token': {'top_p': 0.9}, 'stop_threshold': 0.5, 'order': 'margin'})
  cfg = mdm.SampleConfig.create(sampling_cfg, closed_tokens=(0, 1, 4), noise_eps=0.01)
  assert cfg == mdm.SampleConfig(
    max_length=9, order='margin', token=Rule(top_p=0.9), closed_tokens=(1, 2, 4), noise_eps=0.01
  )
  given = mdm.SampleConfig.create({'max_length': 9, 'length': 'given'}, closed_tokens=(0, 1, 4))
  assert given.closed_tokens == (0, 1, 2, 4)


@pytest.mark.parametrize(
  ('settings', 'line'),
  [
    ({'order': 'left'}, "sampling.order='left': expected one of ancestral, top_probability, margin, entropy"),
    ({'length': 'long'}, "sampling.length='long': expected one of predicted, given"),
    ({'max_steps': 0}, 'sampling.max_steps=0: expected at least 1'),
    ({'score_draws': 3}, 'sampling.score_draws=3: expected an even number from 2'),
    ({'noise_eps': 0.1}, 'sampling.noise_eps cannot be set: the model and the task decide it'),
    ({'ordre': 'margin'}, "unknown sampling setting 'ordre': expected one of"),
  ],
)
def test_odd_settings_are_refused_in_one_line(settings, line):
  assert refusal(mdm.SampleConfig.create, {'max_length': 9, **settings}, noise_eps=1e-3).startswith(line)


MDM = {'family': 'mdm', **small.STILL}


@pytest.mark.parametrize(
  ('changes', 'line'),
  [
    ({'corrupt.noise_eps': 0.0}, 'corrupt.noise_eps=0.0: expected a share above 0 and below 1'),
    ({'loss.mdm': 'elbo'}, "loss.mdm='elbo': expected one of mean_masked, nelbo"),
    ({'corrupt.length': 0}, 'sampling.max_length=22: expected corrupt.length=0, to which the examples are padded'),
    ({'corrupt.length': 21, 'sampling.max_length': 21}, 'corrupt.length=21: the longest example has 22 tokens: raise'),
    ({'corrupt.length': -1}, 'corrupt.length=-1: expected at least 0'),
    (
      {'data.batch_size': 17},
      'data.rows=8 hold 16 examples of corrupt.length=22 tokens, fewer than data.batch_size=17: use data.rows=9',
    ),
    (
      {'corrupt.length': 50, 'sampling.max_length': 50},
      'data.row_length=44 is shorter than the longest example, 50 tokens: raise it',
    ),
    ({'data.targets': 20}, 'data.targets=20 is less than the targets of the longest example, 21: raise it'),
    ({'sampling.order': 'left'}, "sampling.order='left': expected one of"),
    ({'eval.score': 'exact'}, "score: kind='exact': expected bound for family=mdm"),
    ({'family': 'ilm', 'model.conditioning': 'adaln'}, "model.conditioning='adaln': the family ilm knows no noise"),
  ],
)  # fmt: skip
def test_a_config_that_cannot_be_meant_is_refused_in_one_line(changes, line):
  assert refusal(experiment.build, small.config({**MDM, **changes})).startswith(line)


def test_the_config_decides_the_model():
  default = experiment.build(small.config(MDM))
  assert (default.model_cfg.conditioning, default.model_cfg.residual) == ('adaln', 'input')
  assert not default.model_cfg.causal and not default.model_cfg.stop_head
  assert default.sample_cfg.closed_tokens == (1, 2, 3, 4, 5, 6) and default.sample_cfg.noise_eps == 1e-3
  plain = experiment.build(small.config({**MDM, 'model.conditioning': 'none', 'model.final_norm': False}))
  assert plain.model_cfg.conditioning == 'none' and not plain.model_cfg.final_norm
  parity = {'model.residual': 'modulated', 'model.d_cond': 8, 'model.final_norm': False, 'corrupt.noise_eps': 0.01}
  reference = experiment.build(small.config({**MDM, **parity}))
  assert (reference.model_cfg.residual, reference.model_cfg.d_cond) == ('modulated', 8)
  assert reference.model_cfg.final_norm and reference.sample_cfg.noise_eps == 0.01
  given = {'sampling.length': 'given', 'corrupt.length': 0, 'sampling.max_length': 30}
  assert PAD in experiment.build(small.config({**MDM, **given})).sample_cfg.closed_tokens


def test_a_step_sees_the_noise_level_and_is_the_same_in_parts():
  linear = {'optimizer.eps': 1.0, 'optimizer.warmup_steps': 0, 'optimizer.learning_rate': 0.1, 'optimizer.clip': 0.0}
  made = {}
  for parts in (1, 2):
    exp, tx, schedule, state, abstract = small.experiment({**MDM, **linear, 'optimizer.accumulation_steps': parts})
    batch = small.batches(exp, 1)[0]
    made[parts] = train_step.compile_step(exp, tx, schedule, abstract)(state, batch)
  pairs = jax.device_get(made[1][1])
  assert pairs['left_out_examples'][0] == 0 and pairs['kept_tokens'][0] == 16 * 22 == pairs['original_tokens'][0]
  assert pairs['loss'][1] == (batch['tokens_BxL'] == MASK).sum() > 0 and pairs['string_bound'][1] == 16
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), made[1][0].params, made[2][0].params)
  assert pairs['update_norm'][0] > 1e-2

  moved = made[1][0].params  # the step has moved the modulations away from zero
  run = jax.jit(transformer.apply_batch, static_argnums=0)
  first, other = (
    run(exp.model_cfg, moved, batch | {'noise_BxS': batch['noise_BxS'] + more}).hidden_BxLxD for more in (0.0, 1.0)
  )
  assert np.abs(first - other).max() > 1e-4


def test_a_prompt_must_say_how_many_tokens_come_where_the_length_is_given(params):
  cfg = mdm.SampleConfig(max_length=8, length='given', closed_tokens=tuple(range(7)))
  sampler = static_batching.Sampler(MODEL, mdm, cfg, batch_size=2)
  prompt = {'tokens': np.array([CLS, BOS]), 'open': np.array([False, True])}
  line = refusal(lambda: list(sampler(params, jax.random.key(0), [prompt])))
  assert line.startswith("sampling.length='given' needs the number of tokens to come of each prompt ('free'), got none")
  line = refusal(lambda: list(sampler(params, jax.random.key(0), [{**prompt, 'free': 7}])))
  assert line == 'a prompt of 2 tokens and 7 to come are more than sampling.max_length=8: raise the limit'
  rows = list(sampler(params, jax.random.key(0), [{**prompt, 'free': n} for n in (5, 0, 6)]))
  assert [len(row['tokens']) for row in rows] == [7, 2, 8] and all(row['stopped'] for row in rows)
  assert [len(row['log_prob']) for row in rows] == [row['order'].max() + 1 for row in rows]


def test_the_model_is_told_the_noise_level_while_sampling(params):
  """With the share eps of another schedule the noise levels differ, and so do the answers."""
  prompt = make_prompt([([CLS, BOS], True, 6)] * 4)
  cfg = mdm.SampleConfig(max_length=8, order='margin', token=GREEDY, closed_tokens=tuple(range(7)), length='given')

  @functools.partial(jax.jit, static_argnames='cfg')
  def run(cfg):
    return mdm.sample(transformer.Forward(MODEL, params), jax.random.key(0), prompt, cfg)

  first, second = run(cfg), run(cfg._replace(noise_eps=0.9))
  assert np.abs(first.log_prob_BxM - second.log_prob_BxM).max() > 1e-3
