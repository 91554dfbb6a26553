"""Flax layers of the transformer: linear, LayerNorm, noise-level embedding, AdaLN modulation and the stop head."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from ilm_jax.models import numerics
from ilm_jax.models.config import ModelConfig

NOISE_FREQUENCIES = 128  # number of frequencies of the sinusoidal noise level embedding, each with a cosine and a sine


def uniform_init(fan_in: int):
  """Return an initializer that draws from U(-1/sqrt(fan_in), 1/sqrt(fan_in)), PyTorch's default for linear layers."""
  bound = fan_in**-0.5
  return lambda rng, shape, dtype: jax.random.uniform(rng, shape, dtype, -bound, bound)


class Linear(nn.Module):
  """Linear layer written as an einsum of the input and a kernel; the optional bias covers the last output axis."""

  spec: str  # einsum specification: input,kernel->output
  shape: tuple[int, ...]  # shape of the kernel
  names: tuple[str | None, ...]  # logical axis names of the kernel
  fan_in: int  # number of input features, which scales the random initialization
  compute: str  # 'float32', 'bfloat16' or 'mixed', as in ModelConfig
  bias: bool = False
  zero_init: bool = False  # initialize kernel and bias with zeros

  @nn.compact
  def __call__(self, x):
    init = nn.initializers.zeros if self.zero_init else uniform_init(self.fan_in)
    kernel = self.param('kernel', nn.with_logical_partitioning(init, self.names), self.shape, jnp.float32)
    y = numerics.einsum(self.spec, x, kernel, self.compute, self.names)
    if self.bias:
      bias = self.param('bias', nn.with_logical_partitioning(init, self.names[-1:]), self.shape[-1:], jnp.float32)
      y = y + numerics.expand(bias.astype(y.dtype), y.ndim)
    return y


class LayerNorm(nn.Module):
  """LayerNorm over the last axis with epsilon 1e-5, computed in float32; the output has the input's dtype."""

  bias: bool = True

  @nn.compact
  def __call__(self, x):
    shape = x.shape[-1:]
    scale = self.param('scale', nn.with_logical_partitioning(nn.initializers.ones, ('embed',)), shape, jnp.float32)
    y = x.astype(jnp.float32)
    y = y - y.mean(-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + 1e-5)
    y = y * numerics.expand(scale, y.ndim)
    if self.bias:
      bias = self.param('bias', nn.with_logical_partitioning(nn.initializers.zeros, ('embed',)), shape, jnp.float32)
      y = y + numerics.expand(bias, y.ndim)
    return y.astype(x.dtype)


class NoiseEmbedding(nn.Module):
  """Embed the noise level of each segment: sinusoidal features, then a two-layer MLP. Returns BxSxC, C = d_cond."""

  cfg: ModelConfig

  @nn.compact
  def __call__(self, noise_BxS):
    C, W, compute = self.cfg.d_cond, 2 * NOISE_FREQUENCIES, self.cfg.compute
    frequency = 10_000.0 ** (-jnp.arange(NOISE_FREQUENCIES, dtype=jnp.float32) / NOISE_FREQUENCIES)
    angle = noise_BxS.astype(jnp.float32)[..., None] * numerics.expand(frequency, 3)
    y = jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)
    y = Linear('bsw,wc->bsc', (W, C), (None, None), W, compute, bias=True, name='mlp_in')(y)
    y = Linear('bsc,cu->bsu', (C, C), (None, None), C, compute, bias=True, name='mlp_out')(jax.nn.silu(y))
    return jax.nn.silu(y)


class Modulation(nn.Module):
  """AdaLN: map noise embeddings to `parts` vectors of width D per token (shifts, scales, gates), initially zero.

  Returns a list of BxLxD arrays (Bx1xD if a row has one segment). Each token gets the vectors of its segment.
  """

  cfg: ModelConfig
  parts: int

  @nn.compact
  def __call__(self, noise_BxSxC, segment_BxL):
    C, W = self.cfg.d_cond, self.parts * self.cfg.d_model
    names = (None, 'embed')
    linear = Linear('bsc,cw->bsw', (C, W), names, C, self.cfg.compute, bias=True, zero_init=True, name='linear')
    parts = jnp.split(linear(noise_BxSxC), self.parts, axis=-1)
    if noise_BxSxC.shape[1] == 1:
      return parts
    member_BxLxS = jax.nn.one_hot(segment_BxL - 1, noise_BxSxC.shape[1], dtype=parts[0].dtype)
    return [jnp.einsum('bls,bsd->bld', member_BxLxS, part_BxSxD, precision='highest') for part_BxSxD in parts]


def modulate(x, shift, scale):
  """Return x * (1 + scale) + shift."""
  return x * (1 + scale) + shift


class StopHead(nn.Module):
  """Classify the features at each segment's [CLS]: logit 0 means stop, logit 1 means continue.

  It is a residual MLP, whose skip connection bypasses the LayerNorm, followed by a linear layer.
  """

  cfg: ModelConfig

  @nn.compact
  def __call__(self, h_BxSxD, train: bool):
    D, compute = self.cfg.d_model, self.cfg.compute
    y = LayerNorm(name='norm')(h_BxSxD)
    y = Linear('bsd,df->bsf', (D, 2 * D), ('embed', 'mlp'), D, compute, bias=True, name='mlp_in')(y)
    y = Linear('bsf,fd->bsd', (2 * D, D), ('mlp', 'embed'), 2 * D, compute, bias=True, name='mlp_out')(jnp.tanh(y))
    y = numerics.dropout(y, self.cfg.dropout, self.make_rng('dropout') if train else None) + h_BxSxD
    return Linear('bsd,dc->bsc', (D, 2), ('embed', None), D, compute, name='logits')(y).astype(jnp.float32)
