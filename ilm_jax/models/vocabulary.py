"""The vocabulary head, computed in chunks: log-sum-exp, maximum and selected logits without the BxLxV logits."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from ilm_jax.distributed import sharding
from ilm_jax.models import numerics

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
  """Logits of a window, numerics.NEG_INF for entries that an earlier one had, and its part of the table."""
  start, seen = window
  part_CxD = jax.lax.dynamic_slice_in_dim(unembed_VxD, start, chunk)
  bias_C = jax.lax.dynamic_slice_in_dim(bias_V, start, chunk)
  bias_C = jnp.where(jnp.arange(chunk) < seen, numerics.NEG_INF, bias_C)
  logits = numerics.einsum('...d,vd->...v', hidden, part_CxD, compute)
  return logits + numerics.expand(bias_C, logits.ndim), part_CxD


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

  start = jnp.full(hidden.shape[:-1], numerics.NEG_INF, jnp.float32), jnp.zeros(hidden.shape[:-1], jnp.float32)
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
    grad_hidden += numerics.einsum('...v,vd->...d', weight, part_CxD, compute)
    grad_CxD = numerics.einsum('nv,nd->vd', weight.reshape(-1, chunk), flat_hidden, compute)
    grad_CxD += jax.lax.dynamic_slice_in_dim(grad_VxD, window[0], chunk)
    return (grad_hidden, jax.lax.dynamic_update_slice_in_dim(grad_VxD, grad_CxD, window[0], 0)), None

  start = jnp.zeros(hidden.shape, jnp.float32), jnp.zeros(unembed_VxD.shape, jnp.float32)
  (grad_hidden, grad_VxD), _ = jax.lax.scan(step, start, _windows(unembed_VxD.shape[0], chunk))
  return grad_hidden.astype(hidden.dtype), grad_VxD.astype(unembed_VxD.dtype), jnp.zeros_like(bias_V)


_vocab_logsumexp.defvjp(_vocab_logsumexp_fwd, _vocab_logsumexp_bwd)


def vocab_logsumexp(hidden, unembed_VxD, bias_V=None, *, chunk: int = 2048, compute: str = 'float32'):
  """Log-sum-exp over the vocabulary of hidden @ unembed.T + bias, without ever holding all the logits.

  The vocabulary is scanned in chunks, and the gradient computes each chunk's logits again: alive at a time are
  hidden.size / D x chunk numbers. The bias (0 or numerics.NEG_INF: closed tokens) has no gradient.

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

    start = jnp.full(hidden.shape[:-1], numerics.NEG_INF, jnp.float32)
    return jax.lax.scan(step, start, _windows(part_VxD.shape[0], chunk))[0]

  return _over_parts(top_of, lambda top: top.max(axis=0), parts_PxVxD, bias_PxV)


def vocab_logits(hidden, unembed_VxD, bias_V, *, compute: str = 'float32'):
  """All of hidden @ unembed.T + bias, of few enough features: BxV or BxLxV, float32."""
  axes = 'bl'[: hidden.ndim - 1]
  logits = numerics.einsum(f'{axes}d,vd->{axes}v', hidden, unembed_VxD, head_compute(compute), TABLE)
  return logits + numerics.expand(bias_V, logits.ndim)


def target_logits(hidden_BxLxD, unembed_VxD, gap_BxT, token_BxT, *, compute: str = 'float32'):
  """The logits of listed (gap, token) pairs, as dot products: BxT, float32."""
  hidden_BxTxD = jnp.take_along_axis(hidden_BxLxD, gap_BxT[..., None], axis=1)
  parts_PxVxD = _parts(unembed_VxD)
  ways, size = parts_PxVxD.shape[:2]

  def of_part(part_VxD, first):
    index_BxT = token_BxT - first
    elsewhere_BxT = ((index_BxT < 0) | (index_BxT >= size)) & (token_BxT >= 0) & (token_BxT < ways * size)
    unembed_BxTxD = jnp.take(part_VxD, jnp.where(elsewhere_BxT, 0, index_BxT), axis=0)  # NaN for what nobody has
    z_BxT = numerics.einsum('btd,btd->bt', hidden_BxTxD, unembed_BxTxD, head_compute(compute))
    return jnp.where(elsewhere_BxT, 0.0, z_BxT)

  return _over_parts(of_part, lambda z: z.sum(axis=0), parts_PxVxD, jnp.arange(ways) * size)


def closed_bias(vocab: int, tokens):
  """A bias over the vocabulary: numerics.NEG_INF for the listed tokens, 0 for the others."""
  return jnp.zeros(vocab, jnp.float32).at[jnp.array(tuple(tokens), jnp.int32)].set(numerics.NEG_INF)


def head_compute(compute: str) -> str:
  """The vocabulary head keeps float32 results also in a bfloat16 model."""
  return 'mixed' if compute == 'bfloat16' else compute
