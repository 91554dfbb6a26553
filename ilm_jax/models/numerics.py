"""Matrix products in a chosen compute type, dropout from a stateless hash, and reductions over segments."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from ilm_jax.distributed import sharding

NEG_INF = -1e30  # logit of an excluded entry; finite, so that a softmax is not NaN even if all entries are excluded


def expand(x, ndim: int):
  """Prepend axes of size 1 until x has `ndim` axes (tests forbid implicit rank promotion)."""
  return x.reshape((1,) * (ndim - x.ndim) + x.shape)


def einsum(spec: str, x, y, compute: str, names=None):
  """Contract two operands in a compute type: 'float32', 'bfloat16' or 'mixed'.

  'bfloat16' rounds operands and result. 'mixed' rounds operands to bfloat16 but accumulates and returns float32, in the
  backward pass too; every axis letter of an operand must then occur in the other operand or in the result.

  If y is a sharded parameter, `names` are its logical axis names. It is all-gathered over fsdp in the forward pass and
  again in the backward pass, so that a device stores only its shard in between.
  """
  if compute == 'mixed':
    return _einsum(_bf16_einsum, spec, x.astype(jnp.float32), y.astype(jnp.float32), names)
  x, y = x.astype(compute), y.astype(compute)
  if names is None or not sharding.on_several_devices():
    return jnp.einsum(spec, x, y)
  return _einsum(jnp.einsum, spec, x, y, names)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 4))
def _einsum(product, spec, x, y, names):
  """Return product(spec, x, y), an einsum of x and the all-gathered y; the backward pass also uses `product`."""
  return _einsum_fwd(product, spec, x, y, names)[0]


def _gather(y, names):
  return y if names is None else sharding.gather(y, names)


def _einsum_fwd(product, spec, x, y, names):
  if product is _bf16_einsum:
    # The barrier makes the backward pass reuse the rounded operands; without it, XLA rounds them again for each use.
    x, y = jax.lax.optimization_barrier((x.astype(jnp.bfloat16), y.astype(jnp.bfloat16)))
  y = y if names is None else sharding.constrain(y, names)  # save only the shard: the backward pass gathers y again
  return product(spec, x, _gather(y, names)), (x, y)


def _einsum_bwd(product, spec, names, saved, grad):
  x, y = saved
  operands, result = spec.split('->')
  left, right = operands.split(',')
  grad_x = product(f'{result},{right}->{left}', grad, _gather(y, names))
  return grad_x, product(f'{left},{result}->{right}', x, grad)


_einsum.defvjp(_einsum_fwd, _einsum_bwd)


def _bf16_einsum(spec, x, y):
  """Einsum of bfloat16 operands with a float32 result, in the form that is fast on the platform (CPU or other)."""
  x, y = x.astype(jnp.bfloat16), y.astype(jnp.bfloat16)
  return jax.lax.platform_dependent(
    x, y, cpu=functools.partial(_bf16_einsum_cpu, spec), default=functools.partial(_bf16_einsum_default, spec)
  )


def _bf16_einsum_default(spec, x, y):
  return jnp.einsum(spec, x, y, preferred_element_type=jnp.float32)


def _bf16_einsum_cpu(spec, x, y):
  """Compute the bfloat16 einsum with the operand order and memory layout for which XLA's CPU backend is fast.

  Otherwise, jaxlib 0.10 transposes the left operand by a strided float32 copy, which takes four times as long as the
  product, and it lacks a kernel for some transposed, batched bfloat16 products.
  """
  operands, result = spec.split('->')
  left, right = operands.split(',')
  if '.' in spec:
    return _bf16_einsum_default(spec, x, y)
  contracted = [letter for letter in left if letter not in result]
  batch = [letter for letter in result if letter in left and letter in right]
  free = [letter for letter in result if letter not in batch]
  needs_transpose = not (left.endswith(''.join(contracted)) or right.endswith(''.join(contracted)))
  if free and free[0] in right:
    left, right, x, y = right, left, y, x
  if needs_transpose:
    ordered = ''.join([letter for letter in left if letter in result] + contracted)
    x = x.transpose([left.index(letter) for letter in ordered])
    x, left = with_layout_constraint(x, Layout(tuple(range(x.ndim)))), ordered
  return _bf16_einsum_default(f'{left},{right}->{result}', x, y)


def _mix_bits(x):
  """Hash uint32 words by xor-shifts and odd multiplications, so that every input bit affects every output bit."""
  x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
  x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
  return x ^ (x >> 16)


def hash_bits(rng, shape):
  """Return an array of random uint32 words, each a function of only the key and its index in the array.

  This is cheaper than JAX's threefry generator, is fused by XLA, and gives the same bits under every sharding.
  """
  low, high = jax.random.key_data(rng).reshape(-1)[:2].astype(jnp.uint32)
  bits = low
  for axis in range(len(shape)):
    index = jax.lax.broadcasted_iota(jnp.uint32, (1,) * axis + (shape[axis],) + (1,) * (len(shape) - axis - 1), axis)
    bits = _mix_bits(bits ^ (index + jnp.uint32(0x9E3779B9 + axis)))
  return _mix_bits(bits ^ high)


def dropout(x, rate: float, rng):
  """Zero each entry of x with probability `rate` and scale the others by 1 / (1 - rate); no-op if `rng` is None."""
  if rng is None or rate == 0.0:
    return x
  keep = hash_bits(rng, x.shape) >= jnp.uint32(min(round(rate * 2**32), 2**32 - 1))
  return jnp.where(keep, x * jnp.asarray(1.0 / (1.0 - rate), x.dtype), jnp.zeros((), x.dtype))


def segment_logsumexp(value_BxL, segment_BxL, mask_BxL, num_segments: int):
  """Return the BxS log-sum-exp of the values with mask True in each segment 1..S; NEG_INF for a segment without any."""
  ids_S = jnp.arange(1, num_segments + 1)
  member_BxSxL = (segment_BxL[:, None, :] == ids_S[None, :, None]) & mask_BxL[:, None, :]
  return jax.nn.logsumexp(jnp.where(member_BxSxL, value_BxL[:, None, :], NEG_INF), axis=-1)


def segment_sum(value_BxT, segment_BxT, num_segments: int):
  """Return the BxS sums of the values of each segment 1..S; values of segment 0 are ignored."""
  member_BxTxS = jax.nn.one_hot(segment_BxT - 1, num_segments, dtype=value_BxT.dtype)
  return jnp.einsum('bt,bts->bs', value_BxT, member_BxTxS, precision='highest')
