"""Matrix products in a chosen compute type, dropout, rotary embedding and sums over segments."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from ilm_jax.distributed import sharding

NEG_INF = -1e30  # finite, so that a row without an admissible entry gives a number, never a NaN


def expand(x, ndim: int):
  """Put axes of size 1 before those of x until it has `ndim` (the tests refuse a silent rank promotion)."""
  return x.reshape((1,) * (ndim - x.ndim) + x.shape)


# --- matrix products in a chosen compute type -------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def mixed_einsum(spec, x, y, names=None):
  """Einsum of two operands rounded to bfloat16, accumulated and returned in float32, forwards and backwards.

  Every letter of an operand must occur in the other one or in the result. With `names`, y is a parameter of these
  logical axes, and gathered where it is read.
  """
  return _mixed_einsum_fwd(spec, x, y, names)[0]


def _bf16_einsum(spec, x, y):
  x, y = x.astype(jnp.bfloat16), y.astype(jnp.bfloat16)
  return jax.lax.platform_dependent(
    x, y, cpu=functools.partial(_bf16_einsum_cpu, spec), default=functools.partial(_bf16_einsum_plain, spec)
  )


def _bf16_einsum_plain(spec, x, y):
  return jnp.einsum(spec, x, y, preferred_element_type=jnp.float32)


def _bf16_einsum_cpu(spec, x, y):
  """The same product in the order of operands, and with the transposition stored, that XLA's CPU backend is fast at.

  Left alone, jaxlib 0.10 transposes a left operand strided and in float32 (four times slower than the product itself),
  and has no kernel for some transposed batched products of bfloat16.
  """
  operands, result = spec.split('->')
  left, right = operands.split(',')
  if '.' in spec:
    return _bf16_einsum_plain(spec, x, y)
  inner = [letter for letter in left if letter not in result]
  batch = [letter for letter in result if letter in left and letter in right]
  own = [letter for letter in result if letter not in batch]
  transposed = not (left.endswith(''.join(inner)) or right.endswith(''.join(inner)))
  if own and own[0] in right:
    left, right, x, y = right, left, y, x
  if transposed:
    ordered = ''.join([letter for letter in left if letter in result] + inner)
    x = x.transpose([left.index(letter) for letter in ordered])
    x, left = with_layout_constraint(x, Layout(tuple(range(x.ndim)))), ordered
  return _bf16_einsum_plain(f'{left},{right}->{result}', x, y)


def _mixed_einsum_fwd(spec, x, y, names):
  # Kept as they are multiplied: without the barrier XLA computes them again inside the transpositions of the gradient.
  x, y = jax.lax.optimization_barrier((x.astype(jnp.bfloat16), y.astype(jnp.bfloat16)))
  y = y if names is None else sharding.constrain(y, names)  # and cut as it lies: the gradient gathers it once more
  return _bf16_einsum(spec, x, _gathered(y, names)), (x, y)


def _gathered(y, names):
  return y if names is None else sharding.gather(y, names)


def _mixed_einsum_bwd(spec, names, saved, grad):
  return _gradients(_bf16_einsum, spec, names, saved, grad)


def _gradients(product, spec, names, saved, grad):
  x, y = saved
  operands, result = spec.split('->')
  left, right = operands.split(',')
  grad_x = product(f'{result},{right}->{left}', grad, _gathered(y, names))
  return grad_x, product(f'{left},{result}->{right}', x, grad)


mixed_einsum.defvjp(_mixed_einsum_fwd, _mixed_einsum_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def _gathering_einsum(spec, x, y, names):
  """Einsum with a parameter that is gathered where it is read, in the gradient once more; alive between is a part."""
  return _gathering_einsum_fwd(spec, x, y, names)[0]


def _gathering_einsum_fwd(spec, x, y, names):
  y = sharding.constrain(y, names)
  return jnp.einsum(spec, x, _gathered(y, names)), (x, y)


_gathering_einsum.defvjp(_gathering_einsum_fwd, functools.partial(_gradients, jnp.einsum))


def einsum(spec: str, x, y, compute: str, names=None):
  """Contract x and y in the compute type: 'float32', 'bfloat16' (operands and result) or 'mixed' (see above)."""
  if compute == 'mixed':
    return mixed_einsum(spec, x.astype(jnp.float32), y.astype(jnp.float32), names)
  x, y = x.astype(compute), y.astype(compute)
  if names is None or not sharding.several():
    return jnp.einsum(spec, x, y)
  return _gathering_einsum(spec, x, y, names)


# --- dropout ----------------------------------------------------------------------------------------------------------


def _mix(x):
  """Scramble uint32 words: xor-shifts and odd multiplications, after which each input bit reaches each output bit."""
  x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
  x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
  return x ^ (x >> 16)


def hash_bits(rng, shape):
  """Random uint32 words that depend on (key, index) alone: cheap, fused by XLA, the same under every sharding."""
  low, high = jax.random.key_data(rng).reshape(-1)[:2].astype(jnp.uint32)
  bits = low
  for axis in range(len(shape)):
    index = jax.lax.broadcasted_iota(jnp.uint32, (1,) * axis + (shape[axis],) + (1,) * (len(shape) - axis - 1), axis)
    bits = _mix(bits ^ (index + jnp.uint32(0x9E3779B9 + axis)))
  return _mix(bits ^ high)


def dropout(x, rate: float, rng):
  """Zero each entry of x with probability `rate` and scale the others by 1 / (1 - rate); rng None or rate 0: x."""
  if rng is None or rate == 0.0:
    return x
  keep = hash_bits(rng, x.shape) >= jnp.uint32(min(round(rate * 2**32), 2**32 - 1))
  return jnp.where(keep, x * jnp.asarray(1.0 / (1.0 - rate), x.dtype), jnp.zeros((), x.dtype))


# --- rotary embedding -------------------------------------------------------------------------------------------------


def rotary(x_BxLxHxK, position_BxL, *, dim: int, base: float = 10_000.0):
  """Rotate the first `dim` channels of each head by their position (first half paired with second half), in float32."""
  frequency = base ** (-jnp.arange(0, dim, 2, dtype=jnp.float32) / dim)
  angle = position_BxL.astype(jnp.float32)[..., None, None] * expand(frequency, position_BxL.ndim + 2)
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  x = x_BxLxHxK.astype(jnp.float32)
  first, second, rest = x[..., : dim // 2], x[..., dim // 2 : dim], x[..., dim:]
  rotated = [first * cos - second * sin, second * cos + first * sin, rest]
  return jnp.concatenate(rotated, axis=-1).astype(x_BxLxHxK.dtype)


def segment_logsumexp(value_BxL, segment_BxL, mask_BxL, num_segments: int):
  """Log-sum-exp of the masked values of each segment 1..S: BxS; NEG_INF where a segment has none."""
  ids_S = jnp.arange(1, num_segments + 1)
  member_BxSxL = (segment_BxL[:, None, :] == ids_S[None, :, None]) & mask_BxL[:, None, :]
  return jax.nn.logsumexp(jnp.where(member_BxSxL, value_BxL[:, None, :], NEG_INF), axis=-1)


def segment_sum(value_BxT, segment_BxT, num_segments: int):
  """Sum of the values of each segment 1..S: BxS (segment 0 is nobody's)."""
  member_BxTxS = jax.nn.one_hot(segment_BxT - 1, num_segments, dtype=value_BxT.dtype)
  return jnp.einsum('bt,bts->bs', value_BxT, member_BxTxS, precision='highest')
