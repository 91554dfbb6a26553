"""The vocabulary head: log-sum-exp, maximum and selected logits, computed without storing the BxLxV logits.

If the mesh has a tensor axis, each device along it computes over its own shard of the output embedding. Axis letters in
addition to those of types.py: C vocabulary entries in a chunk, P shards of the vocabulary.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from ilm_jax.distributed import sharding
from ilm_jax.models import numerics
from ilm_jax.types import Outputs

TABLE = ('vocab', None)  # logical axis names of the VxD input and output embeddings


def suppressed_bias(vocab: int, tokens):
  """Return a bias over the vocabulary that excludes the given tokens: NEG_INF for them, 0 for all others."""
  return jnp.zeros(vocab, jnp.float32).at[jnp.array(tuple(tokens), jnp.int32)].set(numerics.NEG_INF)


def head_compute(compute: str) -> str:
  """Return the compute type of the vocabulary head: 'mixed' for a bfloat16 model, because logits are always float32."""
  return 'mixed' if compute == 'bfloat16' else compute


def vocab_logits(hidden, unembed_VxD, bias_V, *, compute: str = 'float32'):
  """Return all logits, hidden @ unembed.T + bias, for a BxD or a small BxLxD input: float32 BxV or BxLxV."""
  axes = 'bl'[: hidden.ndim - 1]
  logits = numerics.einsum(f'{axes}d,vd->{axes}v', hidden, unembed_VxD, head_compute(compute), TABLE)
  return logits + numerics.expand(bias_V, logits.ndim)


def target_logits(hidden_BxLxD, unembed_VxD, gap_BxT, token_BxT, *, compute: str = 'float32'):
  """Return the float32 BxT logits of the targets, given as (gap, token) pairs, computed as dot products.

  The logit of a token outside the vocabulary is NaN.
  """
  hidden_BxTxD = jnp.take_along_axis(hidden_BxLxD, gap_BxT[..., None], axis=1)
  shards_PxVxD = _shards(unembed_VxD)
  count, size = shards_PxVxD.shape[:2]

  def logits_of(shard_VxD, first):
    index_BxT = token_BxT - first
    elsewhere_BxT = ((index_BxT < 0) | (index_BxT >= size)) & (token_BxT >= 0) & (token_BxT < count * size)
    unembed_BxTxD = jnp.take(shard_VxD, jnp.where(elsewhere_BxT, 0, index_BxT), axis=0)  # NaN outside the vocabulary
    z_BxT = numerics.einsum('btd,btd->bt', hidden_BxTxD, unembed_BxTxD, head_compute(compute))
    return jnp.where(elsewhere_BxT, 0.0, z_BxT)

  return _reduce_shards(logits_of, lambda z: z.sum(axis=0), shards_PxVxD, jnp.arange(count) * size)


def target_nll(outputs: Outputs, gap_BxT, token_BxT, suppressed=(), *, chunk: int = 2048, compute: str = 'float32'):
  """Return -log p (BxT, in nats) of the targets, given as (gap, token) pairs; infinite for suppressed tokens."""
  hidden_BxLxD, unembed_VxD, _ = outputs
  bias_V = suppressed_bias(unembed_VxD.shape[0], suppressed)
  lse_BxL = vocab_logsumexp(hidden_BxLxD, unembed_VxD, bias_V, chunk=chunk, compute=compute)
  z_BxT = target_logits(hidden_BxLxD, unembed_VxD, gap_BxT, token_BxT, compute=compute)
  nll_BxT = jnp.take_along_axis(lse_BxL, gap_BxT, axis=1) - z_BxT
  return jnp.where(bias_V[token_BxT] < 0, jnp.inf, nll_BxT) if suppressed else nll_BxT


def vocab_logsumexp(hidden, unembed_VxD, bias_V=None, *, chunk: int = 2048, compute: str = 'float32'):
  """Return the float32 log-sum-exp over the vocabulary of hidden @ unembed.T + bias, for `hidden` of shape ...xD.

  It is computed in chunks of `chunk` vocabulary entries. The backward pass recomputes the logits of each chunk, so that
  at most hidden.size / D * chunk logits are stored. The gradient of bias_V (see `suppressed_bias`) is zero.
  """
  if bias_V is None:
    bias_V = jnp.zeros(unembed_VxD.shape[0], jnp.float32)
  shards_PxVxD, bias_PxV = _shards(unembed_VxD), bias_V.reshape(_num_shards(unembed_VxD), -1)
  size = shards_PxVxD.shape[1]
  return _reduce_shards(
    lambda shard, bias: _vocab_logsumexp(hidden, shard, bias, min(chunk, size), head_compute(compute)),
    lambda lse: jax.nn.logsumexp(lse, axis=0),
    shards_PxVxD,
    bias_PxV,
  )


def vocab_max(hidden, unembed_VxD, bias_V, *, chunk: int = 2048, compute: str = 'float32'):
  """Return the largest entry of hidden @ unembed.T + bias over the vocabulary, computed in chunks, without gradient."""
  shards_PxVxD, bias_PxV = _shards(unembed_VxD), bias_V.reshape(_num_shards(unembed_VxD), -1)
  settings = min(chunk, shards_PxVxD.shape[1]), head_compute(compute)
  return _reduce_shards(
    lambda shard, bias: _scan(hidden, shard, bias, *settings)[0], lambda top: top.max(axis=0), shards_PxVxD, bias_PxV
  )


def _windows(vocab: int, chunk: int):
  """Return the start of each vocabulary chunk, and how many of its first entries the previous chunk also covers.

  Chunks are slices of equal size of the unpadded table, so the last one starts earlier, in order to end at its end.
  """
  wanted = np.arange(math.ceil(vocab / chunk)) * chunk
  starts = np.minimum(wanted, vocab - chunk)
  return jnp.asarray(starts, jnp.int32), jnp.asarray(wanted - starts, jnp.int32)


def _chunk_logits(hidden, unembed_VxD, bias_V, window, chunk, compute):
  """Return a vocabulary chunk's logits (NEG_INF for entries also in the previous chunk) and its output embedding."""
  start, repeated = window
  unembed_CxD = jax.lax.dynamic_slice_in_dim(unembed_VxD, start, chunk)
  bias_C = jax.lax.dynamic_slice_in_dim(bias_V, start, chunk)
  bias_C = jnp.where(jnp.arange(chunk) < repeated, numerics.NEG_INF, bias_C)
  logits = numerics.einsum('...d,vd->...v', hidden, unembed_CxD, compute)
  return logits + numerics.expand(bias_C, logits.ndim), unembed_CxD


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _vocab_logsumexp(hidden, unembed_VxD, bias_V, chunk, compute):
  """Compute `vocab_logsumexp` over one shard of the vocabulary."""
  return _vocab_logsumexp_fwd(hidden, unembed_VxD, bias_V, chunk, compute)[0]


def _vocab_logsumexp_fwd(hidden, unembed_VxD, bias_V, chunk, compute):
  top, total = _scan(hidden, unembed_VxD, bias_V, chunk, compute)
  lse = top + jnp.log(total)
  return lse, (hidden, unembed_VxD, bias_V, lse)


def _scan(hidden, unembed_VxD, bias_V, chunk, compute):
  """Return the largest logit over the vocabulary, and the sum of exp(logit - largest logit)."""

  def step(carry, window):
    top, total = carry
    logits, _ = _chunk_logits(hidden, unembed_VxD, bias_V, window, chunk, compute)
    new_top = jnp.maximum(top, logits.max(-1))
    total = total * jnp.exp(top - new_top) + jnp.exp(logits - new_top[..., None]).sum(-1)
    return (new_top, total), None

  start = jnp.full(hidden.shape[:-1], numerics.NEG_INF, jnp.float32), jnp.zeros(hidden.shape[:-1], jnp.float32)
  return jax.lax.scan(step, start, _windows(unembed_VxD.shape[0], chunk))[0]


def _vocab_logsumexp_bwd(chunk, compute, saved, grad):
  hidden, unembed_VxD, bias_V, lse = saved
  flat_hidden = hidden.reshape(-1, hidden.shape[-1])

  def step(carry, window):
    grad_hidden, grad_VxD = carry
    logits, unembed_CxD = _chunk_logits(hidden, unembed_VxD, bias_V, window, chunk, compute)
    weight = jnp.exp(logits - lse[..., None]) * grad[..., None]
    grad_hidden += numerics.einsum('...v,vd->...d', weight, unembed_CxD, compute)
    grad_CxD = numerics.einsum('nv,nd->vd', weight.reshape(-1, chunk), flat_hidden, compute)
    grad_CxD += jax.lax.dynamic_slice_in_dim(grad_VxD, window[0], chunk)
    return (grad_hidden, jax.lax.dynamic_update_slice_in_dim(grad_VxD, grad_CxD, window[0], 0)), None

  start = jnp.zeros(hidden.shape, jnp.float32), jnp.zeros(unembed_VxD.shape, jnp.float32)
  (grad_hidden, grad_VxD), _ = jax.lax.scan(step, start, _windows(unembed_VxD.shape[0], chunk))
  return grad_hidden.astype(hidden.dtype), grad_VxD.astype(unembed_VxD.dtype), jnp.zeros_like(bias_V)


_vocab_logsumexp.defvjp(_vocab_logsumexp_fwd, _vocab_logsumexp_bwd)


def _num_shards(unembed_VxD) -> int:
  """Return the number of vocabulary shards: the size of the mesh's tensor axis, or 1 if V is not divisible by it."""
  count = sharding.axis_size('tensor')
  return count if unembed_VxD.shape[0] % count == 0 else 1


def _shards(unembed_VxD):
  """All-gather the output embedding over the fsdp axis; return it as PxVxD, a shard per device of the tensor axis."""
  table = sharding.gather(unembed_VxD, TABLE).reshape(_num_shards(unembed_VxD), -1, unembed_VxD.shape[1])
  return sharding.constrain(table, ('vocab_shard', None, None))


def _reduce_shards(function, reduce, *shards):
  """Apply a function to every vocabulary shard, on the devices that hold it, and reduce the stacked results."""
  if shards[0].shape[0] == 1:
    return function(*(shard[0] for shard in shards))
  return reduce(jax.vmap(function, spmd_axis_name='tensor')(*shards))
