"""The chunked vocabulary head (logsumexp over the vocabulary) against dense logits, on one device and on a mesh."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from ilm_jax.distributed import sharding
from ilm_jax.models import numerics, vocabulary


def normal(seed, *shape):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def dense_logsumexp(hidden, unembed, bias):
  return jax.nn.logsumexp(hidden @ unembed.T + jnp.asarray(bias)[None, None], axis=-1)


# Chunk sizes for 13 tokens: 1 divides 13; 5 makes the last two chunks overlap; 4096 needs only one chunk.
@pytest.mark.parametrize(('chunk', 'closed'), [(1, ()), (5, ()), (5, (0, 4, 12)), (4096, (0, 4, 12))])
def test_chunked_logsumexp_and_its_gradients_equal_the_dense_computation(chunk, closed):
  hidden, unembed, weight = normal(0, 2, 5, 6), normal(1, 13, 6), normal(2, 2, 5)
  bias = jnp.zeros(13).at[jnp.array(closed, int)].set(numerics.NEG_INF)

  def value_and_grads(function):
    def total(hidden, unembed):
      value = function(hidden, unembed)
      return (weight * value).sum(), value

    return jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))(hidden, unembed)

  found = value_and_grads(lambda h, w: vocabulary.vocab_logsumexp(h, w, bias if closed else None, chunk=chunk))
  expected = value_and_grads(lambda h, w: dense_logsumexp(h, w, bias))
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), found, expected)


@pytest.mark.parametrize('shift', [-500.0, 500.0])
def test_chunked_logsumexp_is_stable_for_logits_far_from_zero(shift):
  hidden, unembed, bias = 30 * normal(0, 1, 3, 6), normal(1, 13, 6), jnp.full(13, shift)
  expected = dense_logsumexp(hidden, unembed, bias)
  np.testing.assert_allclose(vocabulary.vocab_logsumexp(hidden, unembed, bias, chunk=4), expected, rtol=1e-5, atol=1e-3)


def largest_array(jaxpr):
  """Return the size of the largest array that a jaxpr computes, including its loops and inner functions."""
  sizes = [0]
  for eqn in jaxpr.eqns:
    sizes += [var.aval.size for var in eqn.outvars if hasattr(var.aval, 'size')]
    for value in jax.tree.leaves(
      list(eqn.params.values()), is_leaf=lambda x: hasattr(x, 'eqns') or hasattr(x, 'jaxpr')
    ):
      inner = getattr(value, 'jaxpr', value)
      if hasattr(inner, 'eqns'):
        sizes.append(largest_array(inner))
  return max(sizes)


@pytest.mark.parametrize('compute', ['float32', 'mixed', 'bfloat16'])
def test_chunked_logsumexp_computes_no_array_of_all_logits(compute):
  hidden, unembed = normal(0, 2, 8, 4), normal(1, 1000, 4)

  def largest(function):
    gradient = jax.grad(lambda h, w: function(h, w).sum(), argnums=(0, 1))
    return largest_array(jax.make_jaxpr(gradient)(hidden, unembed).jaxpr)

  dense = largest(lambda h, w: dense_logsumexp(h, w, jnp.zeros(1000)))
  assert dense >= 2 * 8 * 1000, 'largest_array does not find the dense logits'
  assert largest(lambda h, w: vocabulary.vocab_logsumexp(h, w, chunk=64, compute=compute)) < dense / 2


@pytest.mark.parametrize('compute', ['float32', 'mixed', 'bfloat16'])
def test_the_vocabulary_head_returns_float32_in_every_compute_type(compute):
  hidden, unembed = normal(0, 2, 5, 6).astype(jnp.bfloat16), normal(1, 13, 6)
  value = vocabulary.vocab_logsumexp(hidden, unembed, chunk=4, compute=compute)
  assert value.dtype == jnp.float32
  expected = dense_logsumexp(hidden.astype(jnp.float32), unembed, jnp.zeros(13))
  np.testing.assert_allclose(value, expected, atol=2e-2)


def test_target_logits_equal_the_dense_logits_at_the_given_gaps_and_tokens():
  hidden, unembed = normal(0, 2, 5, 6), normal(1, 13, 6)
  gap, token = jnp.array([[0, 4, 4], [3, 3, 1]]), jnp.array([[12, 0, 5], [7, 7, 2]])
  dense = np.asarray(hidden, np.float64) @ np.asarray(unembed, np.float64).T
  got = np.asarray(vocabulary.target_logits(hidden, unembed, gap, token))
  for b in range(2):
    for t in range(3):
      assert got[b, t] == pytest.approx(dense[b, gap[b, t], token[b, t]], abs=1e-5)


# --- on a mesh --------------------------------------------------------------------------------------------------------


# A vocabulary of 23 tokens cannot be divided over the two devices of the tensor axis.
@pytest.mark.parametrize(('vocab', 'compute'), [(24, 'float32'), (24, 'mixed'), (23, 'float32')])
def test_a_sharded_vocabulary_head_gives_equal_results_without_gathering_the_whole_table(vocab, compute):
  mesh = small.mesh(data=2, fsdp=2, tensor=2)
  keys = jax.random.split(jax.random.key(0), 4)
  hidden, table = jax.random.normal(keys[0], (32, 6, 16)), jax.random.normal(keys[1], (vocab, 16))
  gap, token = jax.random.randint(keys[2], (32, 5), 0, 6), jax.random.randint(keys[3], (32, 5), 0, vocab)
  bias = vocabulary.suppressed_bias(vocab, (0, vocab - 1))

  def total(hidden, table, gap, token):
    args = {'chunk': 5, 'compute': compute}
    lse = vocabulary.vocab_logsumexp(hidden, table, bias, **args)
    z = vocabulary.target_logits(hidden, table, gap, token, compute=compute)
    logits = vocabulary.vocab_logits(hidden[:, 0], table, bias, compute=compute)
    loss = jnp.sin(lse).sum() + jnp.square(z).sum() + (logits[:, 1] * logits[:, 2]).sum()
    return loss, (lse, z, logits, vocabulary.vocab_max(jax.lax.stop_gradient(hidden), table, bias, **args))

  function = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)
  rows, table_spec = sharding.rows_sharding(mesh), sharding.spec_of(vocabulary.TABLE, table.shape, mesh)
  table_sharding = jax.sharding.NamedSharding(mesh, table_spec)
  compiled = jax.jit(
    sharding.with_mesh(mesh)(function),
    in_shardings=(rows, table_sharding, rows, rows),
    out_shardings=((None, None), (rows, table_sharding)),
  ).lower(hidden, table, gap, token).compile()  # fmt: skip
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-4 if compute == 'float32' else 1e-3),
    compiled(hidden, table, gap, token), jax.jit(function)(hidden, table, gap, token),
  )  # fmt: skip
  shapes = re.findall(r'= \w+\[([\d,]+)\]\S* all-gather\(', compiled.as_text())
  gathered = {math.prod(map(int, shape.split(','))) for shape in shapes}
  if compute == 'float32':  # with compute=mixed, XLA for CPUs gathers more arrays
    shard = 16 * vocab // 2  # after gathering over fsdp, a shard has `vocab` / 2 rows of width 16
    assert gathered == (set() if vocab % 2 else {shard}), 'only a shard of the table may be gathered'


def test_the_logit_of_a_token_outside_the_vocabulary_is_nan():
  hidden, table = jnp.ones((8, 2, 4)), jnp.ones((6, 4))
  gap, token = jnp.zeros((8, 2), jnp.int32), jnp.tile(jnp.array([[5, 6]]), (8, 1))
  for mesh in (None, small.mesh(data=2, fsdp=2, tensor=2)):
    z = jax.jit(sharding.with_mesh(mesh)(vocabulary.target_logits))(hidden, table, gap, token)
    np.testing.assert_array_equal(z, np.tile([[4.0, np.nan]], (8, 1)))
