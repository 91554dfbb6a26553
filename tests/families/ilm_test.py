"""The insertion loss of a tiny transformer, compared to a dense softmax over all (gap, token) pairs."""

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

V, CLS, BOS = 23, 1, 4
MODEL = transformer.ModelConfig(
  vocab_size=V, num_layers=2, num_heads=2, d_model=16, d_ff=32, init='reference', dropout=0.0, attention_dropout=0.0
)
LOSS = ConfigDict({'stop_weight': 0.7, 'length_weight': 'none', 'compute': 'float32', 'vocab_chunk': 5})
ELBO = ConfigDict({**LOSS.to_dict(), 'stop_weight': 1.0, 'length_weight': 'elbo', 'mean_weight': 4.0})
PACKED = pipeline.Shape(rows=2, length=24, targets=11, segments=5)


@pytest.fixture(scope='module')
def params():
  return nn.unbox(jax.jit(transformer.init, static_argnums=0)(MODEL, jax.random.key(0)))


def make_examples(close_prompt=False):
  """Make (example, corrupted) pairs of several prompt and answer lengths, with none, some or all tokens dropped."""
  rng, out = np.random.default_rng(0), []
  for prompt, free, dropped in [(0, 5, 2), (3, 4, 0), (1, 6, 6), (2, 1, 1), (0, 0, 0), (4, 7, 3), (0, 3, 3), (2, 2, 0)]:
    tokens = np.array([CLS, *rng.integers(7, V, prompt), BOS, *rng.integers(7, V, free)], np.int32)
    example = {'tokens': tokens, 'fixed': np.arange(len(tokens)) < prompt + 2}
    cfg = ConfigDict({'close_prompt': close_prompt})
    out.append((example, corruption.ilm(rng, example, cfg, u=(dropped + 0.5) / (free + 1))))
    assert len(out[-1][1]['target_token']) == dropped
  return out


def one_per_row(corrupted):
  """Pack each corrupted example into a separate row."""
  shape = pipeline.Shape(rows=1, length=16, targets=9, segments=1)
  return pipeline.concatenate([pipeline.pack([c], [i], shape) for i, c in enumerate(corrupted)])


@jax.jit
def run(params, batch):
  names = ('tokens_BxL', 'position_BxL', 'segment_BxL', 'cls_BxS')
  return transformer.apply(MODEL, params, *(batch[name] for name in names))


@jax.jit
def losses(outputs, batch):
  """Return the losses without length weights, the losses with length weights, and the loss terms of each example."""
  return ilm.loss(outputs, batch, LOSS), ilm.loss(outputs, batch, ELBO), ilm.example_losses(outputs, batch, chunk=5)


@jax.jit
@jax.value_and_grad
def loss_and_gradient(params, batch):
  return ilm.loss(run(params, batch), batch, LOSS)['loss'][0]


def assert_same_loss_and_gradient(params, batch, expected_batch):
  loss, grads = loss_and_gradient(params, batch)
  expected, expected_grads = loss_and_gradient(params, expected_batch)
  assert float(loss) == pytest.approx(float(expected), rel=1e-5)
  scale = max(float(jnp.abs(grad).max()) for grad in jax.tree.leaves(expected_grads))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=5e-6 * scale), grads, expected_grads)


def log_softmax(z):
  z = z - z.max()
  return z - np.log(np.exp(z).sum())


def dense_losses(outputs, examples):
  """Return the (token, stop) loss of each example, by a softmax over all (gap, token) pairs and their target counts."""
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
def test_the_loss_equals_a_dense_softmax_over_all_gaps_and_tokens(params, close_prompt):
  examples = make_examples(close_prompt)
  batch = one_per_row([corrupted for _, corrupted in examples])
  outputs = run(params, batch)
  plain, elbo, (token_BxS, stop_BxS, dropped_BxS) = losses(outputs, batch)
  expected = dense_losses(outputs, examples)
  np.testing.assert_allclose(np.stack([token_BxS[:, 0], stop_BxS[:, 0]], 1), expected, rtol=1e-5, atol=1e-5)
  assert dropped_BxS[:, 0].tolist() == [2, 0, 6, 1, 0, 3, 3, 0]
  assert (token_BxS[:, 0] == 0).tolist() == (dropped_BxS[:, 0] == 0).tolist()

  assert all(float(weight) == len(examples) for _, weight in (*plain.values(), *elbo.values()))
  np.testing.assert_allclose(plain['token_loss'][0], expected[:, 0].sum(), rtol=1e-5)
  np.testing.assert_allclose(plain['stop_loss'][0], expected[:, 1].sum(), rtol=1e-5)
  np.testing.assert_allclose(plain['loss'][0], expected.sum(0) @ [1, 0.7], rtol=1e-5)
  predicts_stop = np.asarray(outputs.stop_BxSx2)[:, 0].argmax(-1) == 0
  assert float(plain['stop_accuracy'][0]) == (predicts_stop == (np.array(dropped_BxS)[:, 0] == 0)).sum()

  free = np.array([(~example['fixed']).sum() for example, _ in examples])
  bounds = (free + 1) * expected.sum(axis=1) - [math.lgamma(n + 1) for n in free]
  np.testing.assert_allclose(plain['string_bound'][0], bounds.sum(), rtol=1e-5)
  np.testing.assert_allclose(elbo['loss'][0], ((free + 1) * expected.sum(axis=1)).sum() / 4, rtol=1e-5)
  np.testing.assert_allclose(elbo['token_loss'][0], plain['token_loss'][0], rtol=1e-5)


def mask_in_place(examples, batch):
  """Put the dropped tokens back, hidden from attention by segment 0; return the batch and the indices of the others."""
  masked, kept = {name: value.copy() for name, value in batch.items()}, []
  for row, (example, corrupted) in enumerate(examples):
    # A dropped token is put behind the token left of its gap and behind earlier dropped tokens of this gap.
    in_gap = np.bincount(corrupted['target_gap'], minlength=len(corrupted['tokens']))
    place = np.arange(len(corrupted['tokens'])) + np.cumsum(in_gap) - in_gap
    n, keep = len(example['tokens']), np.isin(np.arange(len(example['tokens'])), place)
    assert example['tokens'][~keep].tolist() == corrupted['target_token'].tolist()
    for name in ('tokens_BxL', 'segment_BxL', 'position_BxL', 'open_BxL'):
      masked[name][row] = 0
    masked['tokens_BxL'][row, :n] = example['tokens']
    masked['segment_BxL'][row, :n] = keep
    masked['position_BxL'][row, :n] = np.cumsum(keep) - 1
    masked['open_BxL'][row, 1:n] = True
    masked['target_gap_BxT'][row, : len(corrupted['target_gap'])] = place[corrupted['target_gap']]
    kept.append(place)
  return masked, kept


def test_removing_the_dropped_tokens_gives_the_same_outputs_as_hiding_them_from_attention(params):
  examples = make_examples()
  removed = one_per_row([corrupted for _, corrupted in examples])
  masked, kept = mask_in_place(examples, removed)
  outputs, in_place = run(params, removed), run(params, masked)
  for row, place in enumerate(kept):
    expected = outputs.hidden_BxLxD[row, : len(place)]
    np.testing.assert_allclose(in_place.hidden_BxLxD[row, place], expected, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(in_place.stop_BxSx2, outputs.stop_BxSx2, rtol=1e-5, atol=1e-5)
  first, second = losses(outputs, removed)[0], losses(in_place, masked)[0]
  for name in first:
    np.testing.assert_allclose(second[name][0], first[name][0], rtol=1e-5)


def test_packing_does_not_change_the_loss_or_its_gradient(params):
  corrupted = [c for _, c in make_examples()]
  packed = pipeline.pack(corrupted, list(range(8)), PACKED)
  ids = packed['example_id_BxS']
  assert sorted(ids[ids >= 0].tolist()) == list(range(8)) and (ids[:, 2] >= 0).all(), (
    'each row must hold at least three examples'
  )
  assert_same_loss_and_gradient(params, packed, one_per_row(corrupted))


def test_padding_and_unused_targets_do_not_change_the_loss(params):
  batch = pipeline.pack([c for _, c in make_examples()], list(range(8)), PACKED)
  noisy = {name: value.copy() for name, value in batch.items()}
  noisy['tokens_BxL'][batch['segment_BxL'] == 0] = 9
  noisy['position_BxL'][batch['segment_BxL'] == 0] = 5
  noisy['open_BxL'][batch['segment_BxL'] == 0] = True
  noisy['target_gap_BxT'][batch['target_segment_BxT'] == 0] = 3
  noisy['target_token_BxT'][batch['target_segment_BxT'] == 0] = 7
  noisy['cls_BxS'][batch['segment_weight_BxS'] == 0] = 2
  assert_same_loss_and_gradient(params, noisy, batch)
  assert all(float(weight) == 8 for _, weight in losses(run(params, noisy), noisy)[0].values())


def test_examples_of_weight_zero_do_not_change_the_loss_or_its_gradient(params):
  corrupted = [c for _, c in make_examples()]
  batch = one_per_row(corrupted)
  batch['segment_weight_BxS'][3:] = 0
  few = one_per_row(corrupted[:3])
  few = {name: np.concatenate([few[name], np.zeros_like(value[3:])]) for name, value in batch.items()}
  assert_same_loss_and_gradient(params, batch, few)


def test_a_batch_of_padding_has_loss_zero_and_gradient_zero(params):
  loss, grads = loss_and_gradient(params, PACKED.empty())
  assert float(loss) == 0 and all((np.asarray(grad) == 0).all() for grad in jax.tree.leaves(grads))
