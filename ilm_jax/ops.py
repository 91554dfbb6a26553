"""Numeric pieces shared by models, losses and samplers; each has a plain-loop twin in the tests."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Layout, with_layout_constraint

from ilm_jax import sharding
from ilm_jax.types import Rule

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


# --- the vocabulary head ----------------------------------------------------------------------------------------------

TABLE = ('vocab', None)  # logical axes of an embedding or unembedding


def _windows(vocab: int, chunk: int):
  """Starts of windows of `chunk` entries that cover the vocabulary, and how many of each were in the one before.

  Windows are slices of the table where it lies; the last one reaches back rather than over the end.
  """
  wanted = np.arange(math.ceil(vocab / chunk)) * chunk
  starts = np.minimum(wanted, vocab - chunk)
  return jnp.asarray(starts, jnp.int32), jnp.asarray(wanted - starts, jnp.int32)


def _window_logits(hidden, unembed_VxD, bias_V, window, chunk, compute):
  """Logits of a window, NEG_INF for entries that an earlier one had, and its part of the table."""
  start, seen = window
  part_CxD = jax.lax.dynamic_slice_in_dim(unembed_VxD, start, chunk)
  bias_C = jax.lax.dynamic_slice_in_dim(bias_V, start, chunk)
  bias_C = jnp.where(jnp.arange(chunk) < seen, NEG_INF, bias_C)
  logits = einsum('...d,vd->...v', hidden, part_CxD, compute)
  return logits + expand(bias_C, logits.ndim), part_CxD


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _vocab_logsumexp(hidden, unembed_VxD, bias_V, chunk, compute):
  return _vocab_logsumexp_fwd(hidden, unembed_VxD, bias_V, chunk, compute)[0]


def _vocab_logsumexp_fwd(hidden, unembed_VxD, bias_V, chunk, compute):
  def step(carry, window):
    top, total = carry
    logits, _ = _window_logits(hidden, unembed_VxD, bias_V, window, chunk, compute)
    new_top = jnp.maximum(top, logits.max(-1))
    total = total * jnp.exp(top - new_top) + jnp.exp(logits - new_top[..., None]).sum(-1)
    return (new_top, total), None

  start = jnp.full(hidden.shape[:-1], NEG_INF, jnp.float32), jnp.zeros(hidden.shape[:-1], jnp.float32)
  (top, total), _ = jax.lax.scan(step, start, _windows(unembed_VxD.shape[0], chunk))
  lse = top + jnp.log(total)
  return lse, (hidden, unembed_VxD, bias_V, lse)


def _vocab_logsumexp_bwd(chunk, compute, saved, grad):
  hidden, unembed_VxD, bias_V, lse = saved
  flat_hidden = hidden.reshape(-1, hidden.shape[-1])

  def step(carry, window):
    grad_hidden, grad_VxD = carry
    logits, part_CxD = _window_logits(hidden, unembed_VxD, bias_V, window, chunk, compute)
    weight = jnp.exp(logits - lse[..., None]) * grad[..., None]
    grad_hidden += einsum('...v,vd->...d', weight, part_CxD, compute)
    grad_CxD = einsum('nv,nd->vd', weight.reshape(-1, chunk), flat_hidden, compute)
    grad_CxD += jax.lax.dynamic_slice_in_dim(grad_VxD, window[0], chunk)
    return (grad_hidden, jax.lax.dynamic_update_slice_in_dim(grad_VxD, grad_CxD, window[0], 0)), None

  start = jnp.zeros(hidden.shape, jnp.float32), jnp.zeros(unembed_VxD.shape, jnp.float32)
  (grad_hidden, grad_VxD), _ = jax.lax.scan(step, start, _windows(unembed_VxD.shape[0], chunk))
  return grad_hidden.astype(hidden.dtype), grad_VxD.astype(unembed_VxD.dtype), jnp.zeros_like(bias_V)


_vocab_logsumexp.defvjp(_vocab_logsumexp_fwd, _vocab_logsumexp_bwd)


def vocab_logsumexp(hidden, unembed_VxD, bias_V=None, *, chunk: int = 2048, compute: str = 'float32'):
  """Log-sum-exp over the vocabulary of hidden @ unembed.T + bias, without ever holding all the logits.

  The vocabulary is scanned in chunks, and the gradient computes each chunk's logits again: alive at a time are
  hidden.size / D x chunk numbers. The bias (0 or NEG_INF: closed tokens) has no gradient.

  Returns: float32 of hidden's shape without its last axis.
  """
  if bias_V is None:
    bias_V = jnp.zeros(unembed_VxD.shape[0], jnp.float32)
  parts_PxVxD, bias_PxV = _parts(unembed_VxD), bias_V.reshape(_ways(unembed_VxD), -1)
  size = parts_PxVxD.shape[1]
  return _over_parts(
    lambda part, bias: _vocab_logsumexp(hidden, part, bias, min(chunk, size), head_compute(compute)),
    lambda lse: jax.nn.logsumexp(lse, axis=0),
    parts_PxVxD,
    bias_PxV,
  )


def _ways(unembed_VxD) -> int:
  """Parts of a table: as many as devices of the mesh's tensor axis, which have a part each, if they divide it."""
  ways = sharding.ways('tensor')
  return ways if unembed_VxD.shape[0] % ways == 0 else 1


def _parts(unembed_VxD):
  """The table, whole over fsdp, as PxVxD."""
  table = sharding.gather(unembed_VxD, TABLE).reshape(_ways(unembed_VxD), -1, unembed_VxD.shape[1])
  return sharding.constrain(table, ('part', None, None))


def _over_parts(function, join, *parts):
  """Call a function for each part of a table and join its results: a device computes that of its own part alone."""
  if parts[0].shape[0] == 1:
    return function(*(part[0] for part in parts))
  return join(jax.vmap(function, spmd_axis_name='tensor')(*parts))


def vocab_max(hidden, unembed_VxD, bias_V, *, chunk: int = 2048, compute: str = 'float32'):
  """The largest entry of hidden @ unembed.T + bias, computed like `vocab_logsumexp`."""
  parts_PxVxD, bias_PxV = _parts(unembed_VxD), bias_V.reshape(_ways(unembed_VxD), -1)
  chunk, compute = min(chunk, parts_PxVxD.shape[1]), head_compute(compute)

  def top_of(part_VxD, bias_V):
    def step(top, window):
      logits, _ = _window_logits(hidden, part_VxD, bias_V, window, chunk, compute)
      return jnp.maximum(top, logits.max(-1)), None

    start = jnp.full(hidden.shape[:-1], NEG_INF, jnp.float32)
    return jax.lax.scan(step, start, _windows(part_VxD.shape[0], chunk))[0]

  return _over_parts(top_of, lambda top: top.max(axis=0), parts_PxVxD, bias_PxV)


def vocab_logits(hidden, unembed_VxD, bias_V, *, compute: str = 'float32'):
  """All of hidden @ unembed.T + bias, of few enough features: BxV or BxLxV, float32."""
  axes = 'bl'[: hidden.ndim - 1]
  logits = einsum(f'{axes}d,vd->{axes}v', hidden, unembed_VxD, head_compute(compute), TABLE)
  return logits + expand(bias_V, logits.ndim)


def target_logits(hidden_BxLxD, unembed_VxD, gap_BxT, token_BxT, *, compute: str = 'float32'):
  """The logits of listed (gap, token) pairs, as dot products: BxT, float32."""
  hidden_BxTxD = jnp.take_along_axis(hidden_BxLxD, gap_BxT[..., None], axis=1)
  parts_PxVxD = _parts(unembed_VxD)
  ways, size = parts_PxVxD.shape[:2]

  def of_part(part_VxD, first):
    index_BxT = token_BxT - first
    elsewhere_BxT = ((index_BxT < 0) | (index_BxT >= size)) & (token_BxT >= 0) & (token_BxT < ways * size)
    unembed_BxTxD = jnp.take(part_VxD, jnp.where(elsewhere_BxT, 0, index_BxT), axis=0)  # NaN for what nobody has
    z_BxT = einsum('btd,btd->bt', hidden_BxTxD, unembed_BxTxD, head_compute(compute))
    return jnp.where(elsewhere_BxT, 0.0, z_BxT)

  return _over_parts(of_part, lambda z: z.sum(axis=0), parts_PxVxD, jnp.arange(ways) * size)


def closed_bias(vocab: int, tokens):
  """A bias over the vocabulary: NEG_INF for the listed tokens, 0 for the others."""
  return jnp.zeros(vocab, jnp.float32).at[jnp.array(tuple(tokens), jnp.int32)].set(NEG_INF)


def head_compute(compute: str) -> str:
  """The vocabulary head keeps float32 results also in a bfloat16 model."""
  return 'mixed' if compute == 'bfloat16' else compute


def segment_logsumexp(value_BxL, segment_BxL, mask_BxL, num_segments: int):
  """Log-sum-exp of the masked values of each segment 1..S: BxS; NEG_INF where a segment has none."""
  ids_S = jnp.arange(1, num_segments + 1)
  member_BxSxL = (segment_BxL[:, None, :] == ids_S[None, :, None]) & mask_BxL[:, None, :]
  return jax.nn.logsumexp(jnp.where(member_BxSxL, value_BxL[:, None, :], NEG_INF), axis=-1)


def segment_sum(value_BxT, segment_BxT, num_segments: int):
  """Sum of the values of each segment 1..S: BxS (segment 0 is nobody's)."""
  member_BxTxS = jax.nn.one_hot(segment_BxT - 1, num_segments, dtype=value_BxT.dtype)
  return jnp.einsum('bt,bts->bs', value_BxT, member_BxTxS, precision='highest')


# --- drawing and inserting --------------------------------------------------------------------------------------------


def choose(rng_B, logits_BxN, rule: Rule):
  """Draw one index of each row by the rule; the token that crosses top_p is kept. Rows use their own keys.

  An entry's noise depends on (key, index) alone, so a longer row of closed entries draws the same index.
  """
  if rule.temperature == 0.0 or rule.top_k == 1:
    return jnp.argmax(logits_BxN, axis=-1)
  logits = restrict(logits_BxN.astype(jnp.float32) / rule.temperature, rule)
  gumbel = jax.vmap(lambda rng: jax.random.gumbel(rng, logits.shape[1:]))(rng_B)
  return jnp.argmax(jnp.where(logits > NEG_INF / 2, logits + gumbel, NEG_INF), axis=-1)


def choose_several(rng_B, logits_BxN, rule: Rule, *, count: int):
  """Draw `count` different indices of each row by the rule, one after the other without replacement.

  The first is that of `choose` with the same key: the largest sums of logits and Gumbel noise are such draws.

  Returns:
    (index_BxG, ok_BxG): not ok where the rule leaves fewer.
  """
  if rule.temperature == 0.0 or rule.top_k == 1:  # greedy, either way: the best ones
    value_BxG, index_BxG = jax.lax.top_k(logits_BxN, count)
    return index_BxG, value_BxG > NEG_INF / 2
  logits = restrict(logits_BxN.astype(jnp.float32) / rule.temperature, rule)
  gumbel = jax.vmap(lambda rng: jax.random.gumbel(rng, logits.shape[1:]))(rng_B)
  value_BxG, index_BxG = jax.lax.top_k(jnp.where(logits > NEG_INF / 2, logits + gumbel, NEG_INF), count)
  return index_BxG, value_BxG > NEG_INF / 2


def restrict(logits_BxN, rule: Rule):
  """Put NEG_INF on all but the top_k largest entries, then on what lies outside the nucleus of mass top_p."""
  size = logits_BxN.shape[-1]
  if 0 < rule.top_k < size:
    key_BxN = _ordered(logits_BxN)
    logits_BxN = jnp.where(_largest(key_BxN, jnp.sort(key_BxN, axis=-1), rule.top_k), logits_BxN, NEG_INF)
  if rule.top_p < 1.0:
    key_BxN = _ordered(logits_BxN)
    sorted_BxN = jnp.sort(key_BxN, axis=-1)  # of integers, many times faster than an argsort
    prob_BxN = jax.nn.softmax(_ordered_back(sorted_BxN)[..., ::-1], axis=-1)
    before_BxN = jnp.cumsum(prob_BxN, axis=-1) - prob_BxN  # mass of the strictly more probable ones
    count_B = jnp.maximum((before_BxN < rule.top_p).sum(axis=-1), 1)
    logits_BxN = jnp.where(_largest(key_BxN, sorted_BxN, count_B), logits_BxN, NEG_INF)
  return logits_BxN


def _largest(key_BxN, sorted_BxN, count_B):
  """Whether an entry is among the `count` largest of its row; of equal ones, the first are."""
  count_Bx1 = jnp.broadcast_to(jnp.asarray(count_B), key_BxN.shape[:-1])[..., None]
  least_Bx1 = jnp.take_along_axis(sorted_BxN, sorted_BxN.shape[-1] - count_Bx1, axis=-1)
  above_BxN, equal_BxN = key_BxN > least_Bx1, key_BxN == least_Bx1
  room_Bx1 = count_Bx1 - above_BxN.sum(axis=-1, keepdims=True)
  return above_BxN | (equal_BxN & (jnp.cumsum(equal_BxN, axis=-1) <= room_Bx1))


def _ordered(x):
  """float32 as int32 in the same order."""
  bits = jax.lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), jnp.int32)  # one zero, not two
  return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def _ordered_back(key):
  return jax.lax.bitcast_convert_type(jnp.where(key < 0, key ^ 0x7FFFFFFF, key), jnp.float32)


def insert(array_BxL, gap_B, value_B, go_B):
  """Put value right of position gap in the rows with go, moving the rest up by one (the last entry falls off).

  [a b c _], gap 0, value x -> [a x b c].
  """
  index_1xL = jnp.arange(array_BxL.shape[1])[None]
  shifted = jnp.take_along_axis(array_BxL, index_1xL - (index_1xL > gap_B[:, None]), axis=1)
  inserted = jnp.where(index_1xL == gap_B[:, None] + 1, value_B[:, None].astype(array_BxL.dtype), shifted)
  return jnp.where(go_B[:, None], inserted, array_BxL)


def insert_all(array_BxL, value_BxL, go_BxL):
  """Put value_BxL[b, i] right of every position i with go, moving the rest up (what leaves the buffer is dropped).

  [a b c _ _], go at 0 and 2, values x . z -> [a x b c z].
  """
  size, go_BxL = array_BxL.shape[1], go_BxL.astype(jnp.int32)
  row_Bx1 = jnp.arange(array_BxL.shape[0])[:, None]
  to_BxL = jnp.arange(size)[None] + jnp.cumsum(go_BxL, axis=1) - go_BxL
  out_BxL = array_BxL.at[row_Bx1, to_BxL].set(array_BxL, mode='drop')
  new_BxL = jnp.where(go_BxL > 0, to_BxL + 1, size)
  return out_BxL.at[row_Bx1, new_BxL].set(value_BxL.astype(array_BxL.dtype), mode='drop')
