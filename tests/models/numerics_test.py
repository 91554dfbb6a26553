"""Einsum in each compute type, dropout and segment reductions, compared with loops and dense computations."""

import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from ilm_jax.distributed import sharding
from ilm_jax.models import attention, layers, numerics, transformer, vocabulary

# --- matrix products --------------------------------------------------------------------------------------------------

SOURCES = ''.join(inspect.getsource(module) for module in (transformer, layers, attention, numerics, vocabulary))
USED = sorted(set(re.findall(r"'([a-z.]+,[a-z]+->[a-z.]+)'", SOURCES)))  # einsum specifications of the model
SIZES = dict(zip('bldhkfqscvntuw', range(2, 16), strict=True))  # axis letter -> size


def operands(spec):
  """Return random operands of an einsum and a cotangent of its result, all exactly representable in bfloat16."""
  shapes = [[SIZES[letter] for letter in part.replace('...', 'bl')] for part in re.split(',|->', spec)]
  arrays = [np.random.default_rng(seed).normal(size=shape) for seed, shape in enumerate(shapes)]
  return [np.asarray(jnp.asarray(array, jnp.bfloat16), np.float32) for array in arrays]


def test_the_regular_expression_finds_the_einsums_in_the_model_source():
  assert {'bld,dhk->blhk', 'bqhk,bshk->bhqs', 'bhqs,bshk->bqhk', '...d,vd->...v', 'nv,nd->vd'} <= set(USED)


@pytest.mark.parametrize('spec', USED)
def test_mixed_einsum_and_its_gradients_equal_float64_einsums_of_the_bfloat16_operands(spec):
  x, y, cotangent = operands(spec)

  @jax.jit
  def value_and_gradients(x, y, cotangent):
    value, backward = jax.vjp(lambda x, y: numerics.einsum(spec, x, y, 'mixed'), x, y)
    return value, *backward(cotangent)

  value, grad_x, grad_y = value_and_gradients(x, y, cotangent)
  assert {a.dtype for a in (value, grad_x, grad_y)} == {jnp.dtype('float32')}
  np.testing.assert_allclose(value, np.einsum(spec, x, y, dtype=np.float64), rtol=1e-5, atol=1e-5)
  # The einsum is linear in each operand: <gradient, x> equals <cotangent, einsum with x as this operand>.
  for seed in range(5):
    step_x, step_y = (np.random.default_rng(seed).normal(size=a.shape) for a in (x, y))
    for grad, step, product in [
      (grad_x, step_x, np.einsum(spec, step_x, y)),
      (grad_y, step_y, np.einsum(spec, x, step_y)),
    ]:
      terms = cotangent * product
      assert (np.asarray(grad, np.float64) * step).sum() == pytest.approx(terms.sum(), abs=1e-6 * np.abs(terms).sum())


# Axis orders that occur neither in the model's einsums nor in their gradients.
@pytest.mark.parametrize('spec', ['bhqk,bqhd->bkhd', 'blhk,dhk->bld', 'nd,nv->vd', 'bqhk,bhqs->bshk'])
def test_the_bfloat16_einsum_for_cpus_is_correct_for_any_axis_order(spec):
  x, y, _ = operands(spec)
  got = jax.jit(lambda x, y: numerics._bf16_einsum_cpu(spec, x, y))(jnp.bfloat16(x), jnp.bfloat16(y))
  assert got.dtype == jnp.float32
  np.testing.assert_allclose(got, np.einsum(spec, x, y, dtype=np.float64), rtol=1e-5, atol=1e-5)


def test_mixed_einsum_rounds_its_operands_to_bfloat16():
  one = jnp.array([1.0 + 2.0**-12])
  assert float(numerics.einsum('n,n->n', one, one, 'float32')[0]) > 1.0
  assert float(numerics.einsum('n,n->n', one, one, 'mixed')[0]) == 1.0
  assert numerics.einsum('n,n->n', one, one, 'bfloat16').dtype == jnp.bfloat16


@pytest.mark.parametrize('compute', ['float32', 'bfloat16', 'mixed'])
def test_each_device_saves_only_its_shard_of_the_weights_for_the_backward_pass(compute):
  mesh, layers, width = small.mesh(fsdp=8), 6, 64
  shape, kernels = (8, 4, width), jnp.ones((layers, width, width))
  place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, 'fsdp'))

  def total(kernels, x):
    def layer(x, kernel):
      return jnp.tanh(numerics.einsum('bld,df->blf', x, kernel, compute, ('embed', None)).astype(x.dtype)), None

    return jax.lax.scan(layer, x, kernels)[0].sum()

  step = jax.jit(
    sharding.with_mesh(mesh)(jax.grad(total)), in_shardings=(place, sharding.rows_sharding(mesh)), out_shardings=place
  )
  program = step.lower(kernels, jnp.ones(shape)).compile().as_text()
  assert not re.findall(rf'\w+\[{layers},{width},{width}\]', program), 'the program stores all gathered weights'


# --- dropout ----------------------------------------------------------------------------------------------------------


def test_dropout_zeroes_a_fraction_of_entries_equal_to_its_rate_and_rescales_the_rest():
  x = jnp.ones((64, 50, 20))
  for rate in (0.1, 0.5, 0.9):
    y = np.asarray(numerics.dropout(x, rate, jax.random.key(3)))
    assert set(np.unique(y).tolist()) == {0.0, float(np.float32(1 / (1 - rate)))}
    spread = np.sqrt(rate * (1 - rate))
    for axes in ((0, 1, 2), (0, 1), (0, 2), (1, 2)):  # fraction of zeros overall, then along each axis
      fraction = (y == 0).mean(axis=axes)
      assert np.abs(fraction - rate).max() < 4.5 * spread / np.sqrt(y.size / fraction.size)
  assert numerics.dropout(x, 0.0, jax.random.key(3)) is x and numerics.dropout(x, 0.5, None) is x


def test_every_bit_of_hash_bits_is_fair_and_uncorrelated_with_neighbouring_entries():
  first, second, third = (
    np.asarray(numerics.hash_bits(jax.random.wrap_key_data(jnp.asarray(words, jnp.uint32)), (8, 50, 500)))
    for words in [(0, 0), (0, 1), (1, 0)]
  )
  pairs = {
    'neighbours on axis 0': (first[1:], first[:-1]),
    'neighbours on axis 1': (first[:, 1:], first[:, :-1]),
    'neighbours on axis 2': (first[..., 1:], first[..., :-1]),
    'entries two apart': (first[..., 2:], first[..., :-2]),
    'keys that differ in the first word': (first, third),
    'keys that differ in the second word': (first, second),
  }
  for bit in range(32):
    ones = (first >> bit & 1).mean()
    assert abs(ones - 0.5) < 5 * 0.5 / first.size**0.5, f'bit {bit} is 1 with frequency {ones}'
    for name, (left, right) in pairs.items():
      differs = ((left ^ right) >> bit & 1).mean()
      assert abs(differs - 0.5) < 5 * 0.5 / left.size**0.5, f'{name}: bit {bit} differs with frequency {differs}'


def test_hash_bits_of_an_entry_depend_on_its_index_but_not_on_the_array_shape():
  rng = jax.random.key(3)
  np.testing.assert_array_equal(numerics.hash_bits(rng, (3, 4)), numerics.hash_bits(rng, (7, 9))[:3, :4])


# --- sum and logsumexp per segment ------------------------------------------------------------------------------------


def test_segment_sum_and_segment_logsumexp_equal_plain_loops():
  rng = np.random.default_rng(0)
  value, segment, mask = rng.normal(size=(3, 9)) * 5, rng.integers(0, 4, (3, 9)), rng.random((3, 9)) < 0.7
  segment[0][segment[0] == 2] = 1  # segment 2 of row 0 is empty
  lse = np.asarray(numerics.segment_logsumexp(jnp.float32(value), jnp.asarray(segment), jnp.asarray(mask), 4))
  total = np.asarray(numerics.segment_sum(jnp.float32(value), jnp.asarray(segment), 4))
  assert lse.shape == total.shape == (3, 4)
  for b in range(3):
    for s in range(1, 5):
      members = [i for i in range(9) if segment[b, i] == s]
      assert total[b, s - 1] == pytest.approx(sum(value[b, i] for i in members), abs=1e-5)
      if masked := [value[b, i] for i in members if mask[b, i]]:
        assert lse[b, s - 1] == pytest.approx(np.log(np.sum(np.exp(masked))), abs=1e-5)
      else:
        assert lse[b, s - 1] <= numerics.NEG_INF / 2 and np.isfinite(lse[b, s - 1])


def test_segment_logsumexp_with_empty_segments_has_a_finite_gradient():
  value, segment = jnp.array([[0.3, -1.2, 0.5, 2.0]]), jnp.array([[1, 1, 0, 0]])
  grad = jax.jit(jax.grad(lambda v: numerics.segment_logsumexp(v, segment, segment > 0, 3)[0, 0]))(value)
  np.testing.assert_allclose(grad[0, :2], jax.nn.softmax(value[0, :2]), atol=1e-6)
  np.testing.assert_array_equal(grad[0, 2:], 0)
