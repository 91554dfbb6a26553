"""The insertion loss, on the real (tiny) model, against the dense form of the specification."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from ml_collections import ConfigDict

from ilm_jax.data import pipeline
from ilm_jax.families import corruption, ilm
from ilm_jax.models import transformer
from ilm_jax.types import Outputs

V, CLS, BOS = 23, 1, 4
MODEL = transformer.ModelConfig(
  vocab_size=V, num_layers=2, num_heads=2, d_model=16, d_ff=32, init='reference', dropout=0.0, attention_dropout=0.0
)
LOSS = ConfigDict({'stop_weight': 0.7, 'length_weight': 'none', 'compute': 'float32', 'vocab_chunk': 5})


@pytest.fixture(scope='module')
def params():
  return nn.unbox(jax.jit(transformer.init, static_argnums=0)(MODEL, jax.random.key(0)))


def make_examples(close_prompt=False):
  """Examples with prompts and answers of several lengths and their corruptions: none, some and all dropped."""
  rng, out = np.random.default_rng(0), []
  for prompt, free, dropped in [(0, 5, 2), (3, 4, 0), (1, 6, 6), (2, 1, 1), (0, 0, 0), (4, 7, 3), (0, 3, 3), (2, 2, 0)]:
    tokens = np.array([CLS, *rng.integers(7, V, prompt), BOS, *rng.integers(7, V, free)], np.int32)
    example = {'tokens': tokens, 'fixed': np.arange(len(tokens)) < prompt + 2}
    cfg = ConfigDict({'close_prompt': close_prompt})
    out.append((example, corruption.ilm(rng, example, cfg, u=(dropped + 0.5) / (free + 1))))
    assert len(out[-1][1]['target_token']) == dropped
  return out


PACKED = pipeline.Shape(rows=2, length=24, targets=11, segments=5)


def alone(corrupted):
  """One row for each example, left-aligned."""
  shape = pipeline.Shape(rows=1, length=16, targets=9, segments=1)
  return pipeline.concatenate([pipeline.pack([c], [i], shape) for i, c in enumerate(corrupted)])


@jax.jit
def run(params, batch):
  return transformer.apply(
    MODEL, params, batch['tokens_BxL'], batch['position_BxL'], batch['segment_BxL'], batch['cls_BxS']
  )


def log_softmax(z):
  z = z - z.max()
  return z - np.log(np.exp(z).sum())


def dense_losses(outputs, examples):
  """(token, stop) loss of each example, one a row: targets counted in an L x V table, one softmax over it."""
  hidden, unembed, stop = (np.asarray(x, np.float64) for x in outputs)
  result = []
  for row, (_, corrupted) in enumerate(examples):
    length, dropped = len(corrupted['tokens']), len(corrupted['target_token'])
    target_LxV = np.zeros((length, V))
    for gap, token in zip(corrupted['target_gap'], corrupted['target_token'], strict=True):
      target_LxV[gap, token] += 1
    logits_LxV = hidden[row, :length] @ unembed.T
    logits_LxV[~corrupted['open']] = -np.inf
    token = 0.0
    if dropped:
      log_p = log_softmax(logits_LxV.ravel()).reshape(length, V)
      token = -sum(target_LxV[k, v] / dropped * log_p[k, v] for k, v in np.argwhere(target_LxV))
    result.append((token, -log_softmax(stop[row, 0])[1 if dropped else 0]))
  return np.array(result, np.float64)


@pytest.mark.parametrize('close_prompt', [False, True])
def test_the_loss_from_target_lists_equals_the_dense_form(params, close_prompt):
  examples = make_examples(close_prompt)
  batch = alone([corrupted for _, corrupted in examples])
  outputs = run(params, batch)
  token_BxS, stop_BxS, dropped_BxS = ilm.example_losses(outputs, batch, chunk=5)
  expected = dense_losses(outputs, examples)
  np.testing.assert_allclose(np.stack([token_BxS[:, 0], stop_BxS[:, 0]], 1), expected, rtol=1e-6, atol=1e-6)
  assert dropped_BxS[:, 0].tolist() == [2, 0, 6, 1, 0, 3, 3, 0]
  np.testing.assert_array_equal(token_BxS[:, 0] == 0, dropped_BxS[:, 0] == 0)

  pairs = ilm.loss(outputs, batch, LOSS)
  np.testing.assert_allclose(pairs['token_loss'][0], expected[:, 0].sum(), rtol=1e-6)
  np.testing.assert_allclose(pairs['stop_loss'][0], expected[:, 1].sum(), rtol=1e-6)
  np.testing.assert_allclose(pairs['loss'][0], expected.sum(0) @ [1, 0.7], rtol=1e-6)
  assert all(float(weight) == len(examples) for _, weight in pairs.values())
  stops = np.asarray(outputs.stop_BxSx2)[:, 0].argmax(-1) == 0  # class 0: nothing is missing
  empty = np.array([len(c['target_token']) == 0 for _, c in examples])
  assert float(pairs['stop_accuracy'][0]) == (stops == empty).sum()


def test_the_worked_example_by_hand():
  """Kept `CLS p1 p2 BOS a d`, dropped b and c: logZ over all pairs but those of [CLS], minus the mean of two logits."""
  z = np.random.default_rng(0).normal(size=(6, V))
  z[0] = 50.0  # [CLS] is in no softmax
  outputs = Outputs(jnp.float32(z)[None], jnp.eye(V), jnp.array([[[0.3, -0.4]]]))
  batch = {
    'segment_BxL': jnp.ones((1, 6), int), 'open_BxL': jnp.arange(6)[None] > 0, 'cls_BxS': jnp.zeros((1, 1), int),
    'target_gap_BxT': jnp.array([[4, 4, 0]]), 'target_token_BxT': jnp.array([[11, 12, 0]]),
    'target_segment_BxT': jnp.array([[1, 1, 0]]), 'segment_weight_BxS': jnp.ones((1, 1)),
    'free_BxS': jnp.full((1, 1), 4),
  }  # fmt: skip
  pairs = ilm.loss(outputs, batch, LOSS)
  expected = np.log(np.exp(z[1:]).sum()) - 0.5 * (z[4, 11] + z[4, 12])
  assert float(pairs['token_loss'][0]) == pytest.approx(expected, rel=1e-6)
  assert float(pairs['stop_loss'][0]) == pytest.approx(np.log(1 + np.exp(0.7)), rel=1e-6)


def test_removing_dropped_tokens_equals_masking_them_in_place(params):
  examples = make_examples()
  removed = alone([corrupted for _, corrupted in examples])
  masked = {name: value.copy() for name, value in removed.items()}
  for row, (example, corrupted) in enumerate(examples):
    tokens, keep, start = example['tokens'], np.ones(len(example['tokens']), bool), len(corrupted['tokens'])
    gaps, missing = corrupted['target_gap'].tolist(), corrupted['target_token'].tolist()
    at = 0  # a dropped token follows the kept token of its gap, and those dropped before it in that gap
    for i in range(start):
      at += 1
      while gaps and gaps[0] == i:
        assert tokens[at] == missing[0]
        keep[at] = False
        gaps.pop(0), missing.pop(0)
        at += 1
    assert (keep.sum(), at) == (start, len(tokens))
    n, place = len(tokens), np.flatnonzero(keep)
    for name in ('tokens_BxL', 'segment_BxL', 'position_BxL', 'open_BxL'):
      masked[name][row] = 0
    masked['tokens_BxL'][row, :n] = tokens
    masked['segment_BxL'][row, :n] = keep
    masked['position_BxL'][row, :n] = np.cumsum(keep) - 1  # stale where nothing is kept
    masked['open_BxL'][row, 1:n] = True
    used = len(corrupted['target_gap'])
    masked['target_gap_BxT'][row, :used] = place[corrupted['target_gap']]

  outputs, in_place = run(params, removed), run(params, masked)
  for row, (_, corrupted) in enumerate(examples):
    kept = masked['segment_BxL'][row] > 0
    got, expected = in_place.hidden_BxLxD[row][kept], outputs.hidden_BxLxD[row, : len(corrupted['tokens'])]
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=2e-6)
  np.testing.assert_allclose(in_place.stop_BxSx2, outputs.stop_BxSx2, rtol=1e-5, atol=2e-6)
  first, second = ilm.loss(outputs, removed, LOSS), ilm.loss(in_place, masked, LOSS)
  for name in first:
    np.testing.assert_allclose(second[name][0], first[name][0], rtol=1e-6)


@jax.jit
@jax.value_and_grad
def loss_and_gradient(params, batch):
  outputs = run(params, batch)
  return ilm.loss(outputs, batch, LOSS)['loss'][0]


def leaf_errors(got, expected):
  """The largest deviation of each array, in units of the largest entry of all gradients."""
  scale = max(float(jnp.abs(e).max()) for e in jax.tree.leaves(expected))
  return {
    jax.tree_util.keystr(path): float(jnp.abs(g - e).max()) / scale
    for (path, g), e in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(expected), strict=True)
  }


def test_packing_changes_neither_the_loss_nor_its_gradient(params):
  corrupted = [c for _, c in make_examples()]
  packed = pipeline.pack(corrupted, list(range(8)), PACKED)
  ids = packed['example_id_BxS']
  assert sorted(ids[ids >= 0].tolist()) == list(range(8)) and (ids[:, 2] >= 0).all(), 'packed, in several segments'
  total, grads = loss_and_gradient(params, packed)
  separate, separate_grads = loss_and_gradient(params, alone(corrupted))
  assert float(total) == pytest.approx(float(separate), rel=1e-6)
  assert max(leaf_errors(grads, separate_grads).values()) < 1e-6


def test_padding_and_unused_places_have_no_say(params):
  corrupted = [c for _, c in make_examples()]
  batch = pipeline.pack(corrupted, list(range(8)), PACKED)
  noisy = {name: value.copy() for name, value in batch.items()}
  noisy['tokens_BxL'][batch['segment_BxL'] == 0] = 9
  noisy['position_BxL'][batch['segment_BxL'] == 0] = 5
  noisy['open_BxL'][batch['segment_BxL'] == 0] = True
  noisy['target_gap_BxT'][batch['target_segment_BxT'] == 0] = 3
  noisy['target_token_BxT'][batch['target_segment_BxT'] == 0] = 7
  noisy['cls_BxS'][batch['segment_weight_BxS'] == 0] = 2
  total, grads = loss_and_gradient(params, batch)
  noisy_total, noisy_grads = loss_and_gradient(params, noisy)
  assert float(noisy_total) == pytest.approx(float(total), rel=1e-6)
  assert max(leaf_errors(noisy_grads, grads).values()) < 1e-6
  assert all(float(w) == 8 for _, w in ilm.loss(run(params, noisy), noisy, LOSS).values())


def test_an_example_of_weight_zero_has_no_gradient(params):
  corrupted = [c for _, c in make_examples()]
  batch = alone(corrupted)
  batch['segment_weight_BxS'][3:] = 0
  total, grads = loss_and_gradient(params, batch)
  few = alone(corrupted[:3])
  few = {name: np.concatenate([few[name], np.zeros_like(value[3:])]) for name, value in batch.items()}
  few_total, few_grads = loss_and_gradient(params, few)
  assert float(total) == pytest.approx(float(few_total), rel=1e-6)
  assert max(leaf_errors(grads, few_grads).values()) < 1e-6


def test_a_batch_of_padding_has_loss_zero_and_a_finite_gradient(params):
  batch = PACKED.empty()
  total, grads = loss_and_gradient(params, batch)
  assert float(total) == 0 and all((np.asarray(g) == 0).all() for g in jax.tree.leaves(grads))


def test_a_length_weighted_loss_is_the_bound_over_the_mean_weight(params):
  examples = make_examples(close_prompt=True)
  batch = alone([corrupted for _, corrupted in examples])
  outputs = run(params, batch)
  plain = ConfigDict({**LOSS.to_dict(), 'stop_weight': 1.0})
  pairs = ilm.loss(outputs, batch, plain)
  weighted = ilm.loss(outputs, batch, ConfigDict({**plain.to_dict(), 'length_weight': 'elbo', 'mean_weight': 4.0}))
  losses, bounds = dense_losses(outputs, examples).sum(axis=1), 0.0
  for (example, _), loss in zip(examples, losses, strict=True):
    free = int((~example['fixed']).sum())
    bounds += (free + 1) * loss - math.lgamma(free + 1)
  more = np.array([1 + (~example['fixed']).sum() for example, _ in examples])
  np.testing.assert_allclose(float(weighted['loss'][0]), (more * losses).sum() / 4, rtol=1e-5)
  assert float(weighted['loss'][1]) == float(pairs['loss'][1]) == len(examples)
  np.testing.assert_allclose(float(pairs['string_bound'][0]), bounds, rtol=1e-5)
  np.testing.assert_allclose(float(weighted['token_loss'][0]), float(pairs['token_loss'][0]), rtol=1e-6)
