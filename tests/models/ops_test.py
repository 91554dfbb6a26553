"""The numeric pieces against loops and dense forms."""

import functools
import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from ilm_jax.aot import hlo
from ilm_jax.distributed import sharding
from ilm_jax.families import drawing
from ilm_jax.models import numerics, transformer, vocabulary
from ilm_jax.types import GREEDY, Rule


def rows_of(seed, *shape):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def largest_array(jaxpr):
  """Entries of the largest array that a program makes, those inside its loops and calls included."""
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


# --- the vocabulary head ----------------------------------------------------------------------------------------------


def dense_logsumexp(hidden, unembed, bias):
  return jax.nn.logsumexp(hidden @ unembed.T + jnp.asarray(bias)[None, None], axis=-1)


@pytest.mark.parametrize('chunk', [1, 5, 4096])  # of 13 words: the last chunk is full, padded, the only one
@pytest.mark.parametrize('closed', [(), (0, 4, 12)])
def test_chunked_logsumexp_and_its_gradients_equal_the_dense_ones(chunk, closed):
  hidden, unembed, weight = rows_of(0, 2, 5, 6), rows_of(1, 13, 6), rows_of(2, 2, 5)
  bias = jnp.zeros(13).at[jnp.array(closed, int)].set(numerics.NEG_INF)

  def value_and_grad(f):
    return jax.jit(jax.value_and_grad(lambda h, w: (weight * f(h, w)).sum(), argnums=(0, 1)))(hidden, unembed)

  value = vocabulary.vocab_logsumexp(hidden, unembed, bias if closed else None, chunk=chunk)
  np.testing.assert_allclose(value, dense_logsumexp(hidden, unembed, bias), rtol=1e-6, atol=1e-6)
  total, grads = value_and_grad(lambda h, w: vocabulary.vocab_logsumexp(h, w, bias if closed else None, chunk=chunk))
  dense_total, dense_grads = value_and_grad(lambda h, w: dense_logsumexp(h, w, bias))
  np.testing.assert_allclose(total, dense_total, rtol=1e-6, atol=1e-6)
  for grad, dense_grad in zip(grads, dense_grads, strict=True):
    np.testing.assert_allclose(grad, dense_grad, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize('shift', [-500.0, 0.0, 500.0])
def test_chunked_logsumexp_survives_logits_far_from_zero(shift):
  hidden, unembed, bias = 30 * rows_of(0, 1, 3, 6), rows_of(1, 13, 6), jnp.full(13, shift)
  expected = dense_logsumexp(hidden, unembed, bias)
  np.testing.assert_allclose(vocabulary.vocab_logsumexp(hidden, unembed, bias, chunk=4), expected, rtol=1e-6)


@pytest.mark.parametrize('compute', ['float32', 'mixed', 'bfloat16'])
def test_no_array_of_size_rows_x_length_x_vocabulary_is_ever_alive(compute):
  hidden, unembed = rows_of(0, 2, 8, 4), rows_of(1, 1000, 4)
  too_large = 2 * 8 * 1000

  def program(f):
    return jax.make_jaxpr(jax.grad(lambda h, w: f(h, w).sum(), argnums=(0, 1)))(hidden, unembed).jaxpr

  assert largest_array(program(lambda h, w: dense_logsumexp(h, w, jnp.zeros(1000)))) >= too_large, (
    'the search overlooks arrays'
  )
  assert (
    largest_array(program(lambda h, w: vocabulary.vocab_logsumexp(h, w, chunk=64, compute=compute))) < too_large / 2
  )


def test_the_head_returns_float32_whatever_the_compute_type():
  hidden, unembed = rows_of(0, 2, 5, 6).astype(jnp.bfloat16), rows_of(1, 13, 6)
  expected = dense_logsumexp(hidden.astype(jnp.float32), unembed, jnp.zeros(13))
  for compute in ('float32', 'mixed', 'bfloat16'):
    value = vocabulary.vocab_logsumexp(hidden, unembed, chunk=4, compute=compute)
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, expected, atol=2e-2)


def test_target_logits_are_the_listed_entries_of_the_dense_logits():
  hidden, unembed = rows_of(0, 2, 5, 6), rows_of(1, 13, 6)
  gap, token = jnp.array([[0, 4, 4], [3, 3, 1]]), jnp.array([[12, 0, 5], [7, 7, 2]])
  dense = np.asarray(hidden, np.float64) @ np.asarray(unembed, np.float64).T
  got = np.asarray(vocabulary.target_logits(hidden, unembed, gap, token))
  for b in range(2):
    for t in range(3):
      assert got[b, t] == pytest.approx(dense[b, gap[b, t], token[b, t]], abs=1e-6)


# --- segments ---------------------------------------------------------------------------------------------------------


def test_segment_logsumexp_equals_a_loop():
  rng = np.random.default_rng(0)
  value, segment, mask = rng.normal(size=(3, 9)) * 5, rng.integers(0, 4, (3, 9)), rng.random((3, 9)) < 0.7
  segment[0][segment[0] == 2] = 1  # a segment that nobody belongs to
  got = np.asarray(numerics.segment_logsumexp(jnp.float32(value), jnp.asarray(segment), jnp.asarray(mask), 4))
  assert got.shape == (3, 4)
  for b in range(3):
    for s in range(1, 5):
      members = [value[b, i] for i in range(9) if segment[b, i] == s and mask[b, i]]
      if members:
        assert got[b, s - 1] == pytest.approx(np.log(np.sum(np.exp(members))), abs=1e-6)
      else:
        assert got[b, s - 1] <= numerics.NEG_INF / 2 and np.isfinite(got[b, s - 1])


def test_segment_logsumexp_of_an_empty_segment_has_a_finite_gradient():
  value, segment = rows_of(0, 1, 4), jnp.array([[1, 1, 0, 0]])
  grad = jax.jit(jax.grad(lambda v: numerics.segment_logsumexp(v, segment, segment > 0, 3)[0, 0]))(value)
  np.testing.assert_allclose(grad[0, :2], jax.nn.softmax(value[0, :2]), atol=1e-6)
  np.testing.assert_array_equal(grad[0, 2:], 0)


def test_segment_sum_equals_a_loop():
  rng = np.random.default_rng(0)
  value, segment = rng.normal(size=(3, 9)), rng.integers(0, 4, (3, 9))
  got = np.asarray(numerics.segment_sum(jnp.float32(value), jnp.asarray(segment), 4))
  for b in range(3):
    for s in range(1, 5):
      assert got[b, s - 1] == pytest.approx(sum(value[b, i] for i in range(9) if segment[b, i] == s), abs=1e-6)


# --- drawing ----------------------------------------------------------------------------------------------------------


choose = jax.jit(drawing.choose, static_argnums=2)


def keys(seed, number):
  return jax.random.split(jax.random.key(seed), number)


def allowed_by(logits, rule):
  """The entries that a rule keeps and their probabilities, from a sorted list (first come, first kept)."""
  ranked = sorted(range(len(logits)), key=lambda i: -logits[i])  # stable
  if rule.top_k:
    ranked = ranked[: rule.top_k]
  weight = {i: np.exp(float(logits[i]) / rule.temperature) for i in ranked}
  kept, mass = [], 0.0
  for i in ranked:
    if kept and mass >= rule.top_p:
      break
    kept.append(i)
    mass += weight[i] / sum(weight.values())
  total = sum(weight[i] for i in kept)
  return {i: weight[i] / total for i in kept}


def chi_square(counts, probabilities):
  """Pearson's statistic minus its mean, in units of its standard deviation."""
  expected = np.asarray(probabilities) * np.sum(counts)
  statistic, freedom = (np.square(counts - expected) / expected).sum(), len(expected) - 1
  return (statistic - freedom) / np.sqrt(2 * freedom)


RULES = [
  Rule(),
  Rule(temperature=0.5),
  Rule(temperature=3.0),
  Rule(top_k=3),
  Rule(top_p=0.7),
  Rule(temperature=0.7, top_k=4, top_p=0.8),
]


@pytest.mark.parametrize('rule', RULES)
def test_choose_draws_with_the_probabilities_of_the_rule(rule):
  logits, number = np.array([0.1, -1.0, 1.5, 0.7, -0.3, 1.1], np.float32), 20_000
  drawn = choose(keys(1, number), jnp.tile(logits, (number, 1)), rule)
  counts = np.bincount(drawn, minlength=6)
  allowed = allowed_by(logits, rule)
  assert all(counts[i] == 0 for i in range(6) if i not in allowed)
  assert abs(chi_square(counts[list(allowed)], list(allowed.values()))) < 4


@pytest.mark.parametrize('rule', RULES)
def test_restrict_keeps_what_a_sorted_list_keeps(rule):
  logits = 2 * np.random.default_rng(0).normal(size=(50, 9)).astype(np.float32)
  got = drawing.restrict(jnp.asarray(logits) / rule.temperature, rule)
  for row, expected in zip(np.asarray(got), logits, strict=True):
    assert set(np.flatnonzero(row > numerics.NEG_INF / 2)) == set(allowed_by(expected, rule))


def test_greedy_takes_the_first_of_the_largest():
  logits = jnp.array([[1.0, 3.0, 3.0, 2.0], [5.0, 1.0, 5.0, 5.0]])
  for rule in (GREEDY, Rule(top_k=1), Rule(temperature=0.0, top_p=0.3)):
    np.testing.assert_array_equal(choose(keys(0, 2), logits, rule), [1, 0])


def test_top_k_keeps_the_first_of_equal_entries():
  kept = drawing.restrict(jnp.array([[1.0, 2.0, 1.0, 2.0, 1.0]]), Rule(top_k=3)) > numerics.NEG_INF / 2
  np.testing.assert_array_equal(kept, [[True, True, False, True, False]])
  drawn = choose(keys(0, 500), jnp.zeros((500, 5)), Rule(top_k=2))
  assert set(drawn.tolist()) == {0, 1}


def test_top_k_beyond_the_open_entries_never_draws_a_closed_one():
  logits = jnp.tile(jnp.array([numerics.NEG_INF, 0.0, numerics.NEG_INF, 1.0]), (500, 1))
  for rule in (Rule(top_k=3), Rule(top_k=9), Rule(temperature=5.0, top_k=3), Rule(top_p=0.999)):
    assert set(choose(keys(0, 500), logits, rule).tolist()) == {1, 3}


def test_top_p_keeps_the_entry_that_crosses_and_always_the_first():
  logits = jnp.log(jnp.array([[0.15, 0.5, 0.3, 0.05]]))
  for top_p, expected in [(0.6, {1, 2}), (0.85, {0, 1, 2}), (0.45, {1}), (1e-6, {1}), (0.0, {1}), (0.99, {0, 1, 2, 3})]:
    kept = np.flatnonzero(drawing.restrict(logits, Rule(top_p=top_p))[0] > numerics.NEG_INF / 2)
    assert set(kept) == expected, top_p


@pytest.mark.parametrize('rule', [RULES[0], RULES[-1]])
def test_a_row_draws_the_same_alone_as_among_others(rule):
  logits, rngs = rows_of(0, 30, 7), keys(0, 30)
  together = choose(rngs, logits, rule).tolist()
  assert together == [int(choose(rngs[i : i + 1], logits[i : i + 1], rule)[0]) for i in range(30)]
  assert len(set(together)) > 2


@pytest.mark.parametrize('rule', [RULES[0], RULES[-1]])
def test_a_longer_row_of_closed_entries_draws_the_same(rule):
  logits, rngs = rows_of(0, 200, 7), keys(0, 200)
  longer = jnp.pad(logits, ((0, 0), (0, 93)), constant_values=numerics.NEG_INF)
  np.testing.assert_array_equal(choose(rngs, logits, rule), choose(rngs, longer, rule))


# --- inserting --------------------------------------------------------------------------------------------------------


def test_insert_equals_inserting_into_a_python_list():
  rng = np.random.default_rng(0)
  for _ in range(10):
    array, gap, value = rng.integers(0, 99, (6, 5)), rng.integers(0, 5, 6), rng.integers(100, 199, 6)
    go = rng.random(6) < 0.7
    got = np.asarray(drawing.insert(*map(jnp.asarray, (array, gap, value, go))))
    for b in range(6):
      row = array[b].tolist()
      if go[b]:
        row.insert(gap[b] + 1, int(value[b]))
      assert got[b].tolist() == row[:5]


def test_insert_keeps_the_type_of_the_array():
  array = jnp.array([[True, False, False]])
  got = drawing.insert(array, jnp.array([0]), jnp.array([1]), jnp.array([True]))
  assert got.dtype == bool and got.tolist() == [[True, True, False]]


# --- matrix products --------------------------------------------------------------------------------------------------

SOURCES = ''.join(inspect.getsource(module) for module in (transformer, numerics, vocabulary))
USED = sorted(set(re.findall(r"'([a-z.]+,[a-z]+->[a-z.]+)'", SOURCES)))
SIZES = dict(zip('bldhkfqscvntuw', range(2, 16), strict=True))


def operands(spec):
  """Random operands for a spec and a cotangent of its result, exact in bfloat16."""
  shapes = [[SIZES[letter] for letter in part.replace('...', 'bl')] for part in re.split(',|->', spec)]
  return [np.asarray(rows_of(i, *shape).astype(jnp.bfloat16), np.float32) for i, shape in enumerate(shapes)]


def test_the_specs_of_the_model_are_found():
  assert {'bld,dhk->blhk', 'bqhk,bshk->bhqs', 'bhqs,bshk->bqhk', '...d,vd->...v', 'nv,nd->vd'} <= set(USED)


@pytest.mark.parametrize('spec', USED)
def test_mixed_einsum_and_its_gradients_equal_einsum_on_rounded_operands(spec):
  x, y, cotangent = operands(spec)

  @jax.jit
  def both(x, y, cotangent):
    value, backward = jax.vjp(lambda x, y: numerics.einsum(spec, x, y, 'mixed'), x, y)
    return value, *backward(cotangent)

  value, grad_x, grad_y = both(x, y, cotangent)
  assert {a.dtype for a in (value, grad_x, grad_y)} == {jnp.dtype('float32')}
  np.testing.assert_allclose(value, np.einsum(spec, x, y, dtype=np.float64), rtol=1e-5, atol=1e-5)
  # The product is linear in each operand: <gradient, step> is the change of <cotangent, product>.
  for seed in range(5):
    step_x, step_y = (np.random.default_rng(seed).normal(size=a.shape) for a in (x, y))
    for grad, step, product in [
      (grad_x, step_x, np.einsum(spec, step_x, y)),
      (grad_y, step_y, np.einsum(spec, x, step_y)),
    ]:
      terms = cotangent * product
      assert (np.asarray(grad, np.float64) * step).sum() == pytest.approx(terms.sum(), abs=1e-6 * np.abs(terms).sum())


@pytest.mark.parametrize('spec', [*USED, 'bhqk,bqhd->bkhd', 'blhk,dhk->bld', 'nd,nv->vd', 'bqhk,bhqs->bshk'])
def test_the_order_of_operands_on_cpu_changes_nothing_but_the_speed(spec):
  x, y, _ = operands(spec)
  got = jax.jit(lambda x, y: numerics._bf16_einsum_cpu(spec, x, y))(jnp.bfloat16(x), jnp.bfloat16(y))
  assert got.dtype == jnp.float32
  np.testing.assert_allclose(got, np.einsum(spec, x, y, dtype=np.float64), rtol=1e-5, atol=1e-5)


def test_mixed_einsum_rounds_its_operands():
  one = jnp.array([1.0 + 2.0**-12])
  assert float(numerics.einsum('n,n->n', one, one, 'float32')[0]) > 1.0
  assert float(numerics.einsum('n,n->n', one, one, 'mixed')[0]) == 1.0
  assert numerics.einsum('n,n->n', one, one, 'bfloat16').dtype == jnp.bfloat16


# --- dropout and rotary embedding -------------------------------------------------------------------------------------


def test_dropout_zeroes_the_right_share_and_scales_the_rest():
  x = jnp.ones((64, 50, 20))
  for rate in (0.1, 0.5, 0.9):
    y = np.asarray(numerics.dropout(x, rate, jax.random.key(3)))
    assert set(np.unique(y).tolist()) == {0.0, float(np.float32(1 / (1 - rate)))}
    spread = np.sqrt(rate * (1 - rate))
    for axes in ((0, 1, 2), (0, 1), (0, 2), (1, 2)):  # of all entries, and along each axis
      share = (y == 0).mean(axis=axes)
      assert np.abs(share - rate).max() < 4.5 * spread / np.sqrt(y.size / share.size)
  assert numerics.dropout(x, 0.0, jax.random.key(3)) is x and numerics.dropout(x, 0.5, None) is x


def test_dropout_of_neighbours_and_of_other_keys_is_unrelated():
  first, second = (np.asarray(numerics.hash_bits(jax.random.key(i), (100, 100))) < 2**31 for i in (0, 1))
  for left, right in [(first, second), (first[1:], first[:-1]), (first[:, 1:], first[:, :-1]), (first, first.T)]:
    same = (left == right)[~np.eye(*left.shape, dtype=bool)] if left.shape[0] == left.shape[1] else left == right
    assert abs(same.mean() - 0.5) < 4.5 * 0.5 / np.sqrt(same.size)


def test_the_bits_of_an_entry_depend_on_its_index_alone():
  rng = jax.random.key(3)
  np.testing.assert_array_equal(numerics.hash_bits(rng, (3, 4)), numerics.hash_bits(rng, (7, 9))[:3, :4])


def test_rotary_embedding_turns_pairs_of_channels_as_complex_numbers():
  x, position = rows_of(0, 2, 3, 2, 10), jnp.array([[0, 1, 2], [7, 0, 130]])
  x, got = np.asarray(x), np.asarray(numerics.rotary(x, position, dim=8))
  np.testing.assert_array_equal(got[..., 8:], x[..., 8:])
  for b, i, h, c in np.ndindex(2, 3, 2, 4):
    angle = int(position[b, i]) * 10_000.0 ** (-2 * c / 8)
    turned = complex(x[b, i, h, c], x[b, i, h, c + 4]) * np.exp(1j * angle)
    assert got[b, i, h, c] == pytest.approx(turned.real, abs=1e-5)
    assert got[b, i, h, c + 4] == pytest.approx(turned.imag, abs=1e-5)


# --- on a mesh --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('vocab', [24, 23])  # 23 has no parts
@pytest.mark.parametrize('compute', ['float32', 'mixed'])
def test_the_vocabulary_head_is_the_same_on_a_mesh_whose_devices_keep_their_part_of_the_table(vocab, compute):
  mesh = small.mesh(data=2, fsdp=2, tensor=2)
  keys = jax.random.split(jax.random.key(0), 4)
  hidden, table = jax.random.normal(keys[0], (32, 6, 16)), jax.random.normal(keys[1], (vocab, 16))
  gap, token = jax.random.randint(keys[2], (32, 5), 0, 6), jax.random.randint(keys[3], (32, 5), 0, vocab)
  bias = vocabulary.closed_bias(vocab, (0, vocab - 1))

  def total(hidden, table, gap, token):
    args = {'chunk': 5, 'compute': compute}
    lse = vocabulary.vocab_logsumexp(hidden, table, bias, **args)
    z = vocabulary.target_logits(hidden, table, gap, token, compute=compute)
    logits = vocabulary.vocab_logits(hidden[:, 0], table, bias, compute=compute)
    loss = jnp.sin(lse).sum() + jnp.square(z).sum() + (logits[:, 1] * logits[:, 2]).sum()
    return loss, (lse, z, logits, vocabulary.vocab_max(jax.lax.stop_gradient(hidden), table, bias, **args))

  function = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)
  rows, table_place = sharding.rows_sharding(mesh), sharding.spec_of(vocabulary.TABLE, table.shape, mesh)
  place = jax.sharding.NamedSharding(mesh, table_place)
  compiled = jax.jit(
    sharding.on(mesh)(function),
    in_shardings=(rows, place, rows, rows),
    out_shardings=((None, None), (rows, place)),
  ).lower(hidden, table, gap, token).compile()  # fmt: skip
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-4 if compute == 'float32' else 1e-3),
    compiled(hidden, table, gap, token), jax.jit(function)(hidden, table, gap, token),
  )  # fmt: skip
  found = hlo.collectives(compiled.as_text(), 8)
  gathered = {one.size for one in found if one.kind == 'all-gather'}
  if compute == 'float32':  # on CPUs the mixed product keeps a layout, for which XLA gathers
    part = {4 * 16 * vocab // 2}  # of the table, over fsdp: no other part, no features, no logits
    assert gathered == (set() if vocab % 2 else part)


def test_a_target_outside_the_vocabulary_is_not_passed_over():
  hidden, table = jnp.ones((8, 2, 4)), jnp.ones((6, 4))
  gap, token = jnp.zeros((8, 2), jnp.int32), jnp.tile(jnp.array([[5, 6]]), (8, 1))
  for mesh in (None, small.mesh(data=2, fsdp=2, tensor=2)):
    z = jax.jit(sharding.on(mesh)(vocabulary.target_logits))(hidden, table, gap, token)
    np.testing.assert_array_equal(z, np.tile([[4.0, np.nan]], (8, 1)))


@pytest.mark.parametrize('compute', ['float32', 'bfloat16', 'mixed'])
def test_between_a_pass_and_its_gradient_a_device_keeps_its_part_of_a_weight(compute):
  mesh, layers, width = small.mesh(fsdp=8), 6, 64
  shape, kernels = (8, 4, width), jnp.ones((layers, width, width))
  place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, 'fsdp'))

  def total(kernels, x):
    def layer(x, kernel):
      return jnp.tanh(numerics.einsum('bld,df->blf', x, kernel, compute, ('embed', None)).astype(x.dtype)), None

    return jax.lax.scan(layer, x, kernels)[0].sum()

  step = jax.jit(
    sharding.on(mesh)(jax.grad(total)), in_shardings=(place, sharding.rows_sharding(mesh)), out_shardings=place
  )
  stacks = re.findall(rf'\w+\[{layers},{width},{width}\]', step.lower(kernels, jnp.ones(shape)).compile().as_text())
  assert not stacks
