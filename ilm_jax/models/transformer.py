"""The rotary transformer of Insertion Language Models: a pure function of parameters and tokens (Flax Linen).

Pre-LayerNorm blocks, bidirectional (or causal) attention within segments, an untied vocabulary head, and a head at
[CLS] that says when to stop. Layout of the authors' reference implementation (arXiv 2505.05755). Told a noise level, as
masked diffusion is, it shifts, scales and gates by functions of it (AdaLN; DiT, arXiv 2212.09748).
"""

import dataclasses
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from ilm_jax.distributed import sharding
from ilm_jax.models import numerics, vocabulary
from ilm_jax.types import Batch, Outputs, UserError


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """Everything that decides the parameters' shapes and the function they compute."""

  vocab_size: int
  num_layers: int
  num_heads: int
  d_model: int
  d_ff: int
  activation: str = 'relu'  # or 'gelu' (tanh approximation)
  causal: bool = False
  final_norm: bool = True
  stop_head: bool = True
  rotary_dim: int = 64  # rotated channels of a head, at most
  dropout: float = 0.1
  attention_dropout: float = 0.1
  compute: str = 'float32'  # 'float32', 'bfloat16', or 'mixed': bfloat16 operands, everything else float32
  remat: bool = False  # compute each block again for the gradient instead of remembering it: less memory, slower
  scan_layers: bool = False  # compile one block and loop over the layers: the same numbers, far sooner compiled
  init: str = 'normal'  # embeddings N(0, 0.02); 'reference': N(0, 1)
  conditioning: str = 'none'  # 'adaln': on a noise level; its LayerNorms have no bias
  d_cond: int = 128  # width of what the noise level becomes
  open_gap_embedding: bool = False  # a vector is added to each token that says whether one may come right of it
  residual: str = 'input'  # attention is added to the block's input; 'modulated': to what it reads (the reference)

  def __post_init__(self):
    for name in ('vocab_size', 'num_layers', 'num_heads', 'd_model', 'd_ff', 'd_cond'):
      if getattr(self, name) < 1:
        raise UserError(f'model.{name}={getattr(self, name)}: expected at least 1')
    for name in ('dropout', 'attention_dropout'):
      if not 0 <= getattr(self, name) < 1:
        raise UserError(f'model.{name}={getattr(self, name)}: expected a share from 0 to below 1')
    if self.d_model % self.num_heads:
      raise UserError(
        f'model.d_model={self.d_model} is not a multiple of model.num_heads={self.num_heads}: change one of them'
      )
    for name, allowed in CHOICES.items():
      if getattr(self, name) not in allowed:
        raise UserError(f'model.{name}={getattr(self, name)!r}: expected one of {", ".join(allowed)}')
    if self.residual == 'modulated' and self.conditioning == 'none':
      raise UserError("model.residual='modulated' needs model.conditioning='adaln': set it, or leave residual out")
    if (self.d_model // self.num_heads) % 2:
      raise UserError(f'the head dimension {self.d_model // self.num_heads} is odd: rotary embedding pairs channels')

  @property
  def head_dim(self) -> int:
    return self.d_model // self.num_heads

  @classmethod
  def create(cls, vocab_size: int, **settings) -> 'ModelConfig':
    """Build from a config's `model` part: a preset's name under `preset`, and fields that override it."""
    preset = settings.pop('preset', None)
    if preset is not None and preset not in PRESETS:
      raise UserError(f'model.preset={preset!r}: expected one of {", ".join(PRESETS)}')
    known = {field.name for field in dataclasses.fields(cls)}
    if odd := sorted(set(settings) - known):
      raise UserError(f'unknown model setting {odd[0]!r}: expected one of {", ".join(sorted(known))}')
    merged = dict(PRESETS.get(preset, {})) | {k: v for k, v in settings.items() if v is not None}
    if missing := sorted({'num_layers', 'num_heads', 'd_model', 'd_ff'} - set(merged)):
      raise UserError(f'model.{missing[0]} is not set: give it, or a model.preset ({", ".join(PRESETS)})')
    return cls(vocab_size=vocab_size, **merged)


CHOICES = {
  'activation': ('relu', 'gelu'),
  'compute': ('float32', 'bfloat16', 'mixed'),
  'init': ('normal', 'reference'),
  'conditioning': ('none', 'adaln'),
  'residual': ('input', 'modulated'),
}

PRESETS = {
  'small': dict(num_layers=12, num_heads=12, d_model=768, d_ff=3072),
  'tiny': dict(num_layers=6, num_heads=6, d_model=768, d_ff=3072),
  'tiny2': dict(num_layers=8, num_heads=8, d_model=576, d_ff=3456),
  'xtiny2': dict(num_layers=4, num_heads=6, d_model=384, d_ff=2304),
  '1b': dict(num_layers=24, num_heads=16, d_model=2048, d_ff=8192),
  '8b': dict(num_layers=38, num_heads=32, d_model=4096, d_ff=16384),
  'ddit_small': dict(num_layers=12, num_heads=12, d_model=768, d_ff=3072, d_cond=128),
  'ddit_tiny2': dict(num_layers=8, num_heads=8, d_model=576, d_ff=2304, d_cond=128),
  'ddit_xtiny': dict(num_layers=4, num_heads=6, d_model=384, d_ff=1536, d_cond=96),
}
NOISE_FREQUENCIES = 128
ROWS = ('rows', None, None)  # logical axes of features
OPEN = (None, 'embed')


def _uniform(fan_in: int):
  """The reference's initialisation of a linear layer: U(-1/sqrt(fan_in), 1/sqrt(fan_in))."""
  bound = fan_in**-0.5
  return lambda rng, shape, dtype: jax.random.uniform(rng, shape, dtype, -bound, bound)


class Linear(nn.Module):
  """An einsum with a kernel that has the rank of its logical axis names, and a bias over the last output axes."""

  spec: str
  shape: tuple[int, ...]
  names: tuple[str | None, ...]
  fan_in: int
  compute: str
  bias: bool = False
  zero: bool = False  # starts as zero

  @nn.compact
  def __call__(self, x):
    init = nn.initializers.zeros if self.zero else _uniform(self.fan_in)
    kernel = self.param('kernel', nn.with_logical_partitioning(init, self.names), self.shape, jnp.float32)
    y = numerics.einsum(self.spec, x, kernel, self.compute, self.names)
    if self.bias:
      bias = self.param('bias', nn.with_logical_partitioning(init, self.names[-1:]), self.shape[-1:], jnp.float32)
      y = y + numerics.expand(bias.astype(y.dtype), y.ndim)
    return y


class LayerNorm(nn.Module):
  """LayerNorm in float32 with scale and bias, epsilon 1e-5; returns the type of its input."""

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


class NoiseLevel(nn.Module):
  """What the blocks are told of a noise level: cosines and sines of it through a small MLP."""

  cfg: ModelConfig

  @nn.compact
  def __call__(self, noise_BxS):
    C, wave, compute = self.cfg.d_cond, 2 * NOISE_FREQUENCIES, self.cfg.compute
    frequency = 10_000.0 ** (-jnp.arange(NOISE_FREQUENCIES, dtype=jnp.float32) / NOISE_FREQUENCIES)
    angle = noise_BxS.astype(jnp.float32)[..., None] * numerics.expand(frequency, 3)
    y = jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)
    y = Linear('bsw,wc->bsc', (wave, C), (None, None), wave, compute, bias=True, name='mlp_in')(y)
    return jax.nn.silu(
      Linear('bsc,cu->bsu', (C, C), (None, None), C, compute, bias=True, name='mlp_out')(jax.nn.silu(y))
    )


class Modulation(nn.Module):
  """Several vectors of width D for each position, by its segment's noise level; zero to begin with."""

  cfg: ModelConfig
  parts: int

  @nn.compact
  def __call__(self, noise_BxSxC, segment_BxL):
    C, wide = self.cfg.d_cond, self.parts * self.cfg.d_model
    linear = Linear('bsc,cw->bsw', (C, wide), (None, 'embed'), C, self.cfg.compute, bias=True, zero=True, name='linear')
    parts = jnp.split(linear(noise_BxSxC), self.parts, axis=-1)
    if noise_BxSxC.shape[1] == 1:
      return parts
    member_BxLxS = jax.nn.one_hot(segment_BxL - 1, noise_BxSxC.shape[1], dtype=parts[0].dtype)
    return [jnp.einsum('bls,bsd->bld', member_BxLxS, part_BxSxD, precision='highest') for part_BxSxD in parts]


def modulate(x, shift, scale):
  """Scale (by 1 where `scale` is 0) and shift."""
  return x * (1 + scale) + shift


def attention(q_BxLxHxK, k_BxLxHxK, v_BxLxHxK, segment_BxL, position_BxL, *, cfg: ModelConfig, rng=None):
  """Softmax attention within segments. A padding query (segment 0) sees every token, so no row is ever empty."""
  query, key = segment_BxL[:, :, None], segment_BxL[:, None, :]
  mask_BxLxL = (key > 0) & ((query == key) | (query == 0))
  if cfg.causal:
    mask_BxLxL &= (query == 0) | (position_BxL[:, :, None] >= position_BxL[:, None, :])
  return attend(q_BxLxHxK, k_BxLxHxK, v_BxLxHxK, mask_BxLxL, cfg=cfg, rng=rng)


def attend(q_BxNxHxK, k_BxMxHxK, v_BxMxHxK, mask_BxNxM, *, cfg: ModelConfig, rng=None):
  """Softmax attention of N queries to the M keys that the mask lets through."""
  scale = cfg.head_dim**-0.5
  logits_BxHxNxM = numerics.einsum('bqhk,bshk->bhqs', q_BxNxHxK * scale, k_BxMxHxK, cfg.compute).astype(jnp.float32)
  weight_BxHxNxM = jax.nn.softmax(jnp.where(mask_BxNxM[:, None], logits_BxHxNxM, numerics.NEG_INF), axis=-1)
  weight_BxHxNxM = numerics.dropout(weight_BxHxNxM, cfg.attention_dropout, rng)
  return numerics.einsum('bhqs,bshk->bqhk', weight_BxHxNxM, v_BxMxHxK, cfg.compute)


class Block(nn.Module):
  """x + attention(norm(x)), then x + mlp(norm(x)); told a noise level, x + gate * f(norm(x) * (1 + scale) + shift)."""

  cfg: ModelConfig

  @nn.compact
  def __call__(self, x_BxLxD, segment_BxL, position_BxL, noise_BxSxC, rngs=None, cache=None):
    """Returns x, and the cache of keys and values with those of this call in it (None without one).

    With `rngs`, those of `draw_rngs`, with dropout.
    """
    cfg = self.cfg
    D, H, K, F = cfg.d_model, cfg.num_heads, cfg.head_dim, cfg.d_ff
    attention_rng, out_rng, mlp_rng = (None, None, None) if rngs is None else rngs
    told = noise_BxSxC is not None
    if told:
      modulation = Modulation(cfg, 6, name='modulation')(noise_BxSxC, segment_BxL)
      shift1, scale1, gate1, shift2, scale2, gate2 = modulation

    y_BxLxD = LayerNorm(bias=not told, name='norm1')(x_BxLxD)
    if told:
      y_BxLxD = modulate(y_BxLxD, shift1, scale1)
      x_BxLxD = y_BxLxD if cfg.residual == 'modulated' else x_BxLxD
    names, dim = ('embed', 'heads', None), min(cfg.rotary_dim, K)
    q_BxLxHxK, k_BxLxHxK, v_BxLxHxK = (
      Linear('bld,dhk->blhk', (D, H, K), names, fan_in=D, compute=cfg.compute, name=name)(y_BxLxD)
      for name in ('query', 'key', 'value')
    )
    q_BxLxHxK, k_BxLxHxK = (numerics.rotary(x, position_BxL, dim=dim) for x in (q_BxLxHxK, k_BxLxHxK))
    if cache is None:
      y_BxLxHxK = attention(q_BxLxHxK, k_BxLxHxK, v_BxLxHxK, segment_BxL, position_BxL, cfg=cfg, rng=attention_rng)
    else:
      cache = remember(cache, k_BxLxHxK, v_BxLxHxK, position_BxL)
      mask_BxLxM = jnp.arange(cache.k_BxMxHxK.shape[1])[None, None] <= position_BxL[..., None]
      y_BxLxHxK = attend(q_BxLxHxK, cache.k_BxMxHxK, cache.v_BxMxHxK, mask_BxLxM, cfg=cfg)
    names = ('heads', None, 'embed')
    y_BxLxD = Linear('blhk,hkd->bld', (H, K, D), names, fan_in=D, compute=cfg.compute, name='out')(y_BxLxHxK)
    y_BxLxD = numerics.dropout(y_BxLxD, cfg.dropout, out_rng)
    x_BxLxD = x_BxLxD + (gate1 * y_BxLxD if told else y_BxLxD)

    y_BxLxD = LayerNorm(bias=not told, name='norm2')(x_BxLxD)
    y_BxLxD = modulate(y_BxLxD, shift2, scale2) if told else y_BxLxD
    y_BxLxF = Linear('bld,df->blf', (D, F), ('embed', 'mlp'), D, cfg.compute, bias=True, name='mlp_in')(y_BxLxD)
    y_BxLxF = jax.nn.relu(y_BxLxF) if cfg.activation == 'relu' else jax.nn.gelu(y_BxLxF, approximate=True)
    y_BxLxD = Linear('blf,fd->bld', (F, D), ('mlp', 'embed'), F, cfg.compute, bias=True, name='mlp_out')(y_BxLxF)
    y_BxLxD = numerics.dropout(y_BxLxD, cfg.dropout, mlp_rng)
    x_BxLxD = x_BxLxD + (gate2 * y_BxLxD if told else y_BxLxD)
    return sharding.constrain(x_BxLxD, ROWS), cache

  def draw_rngs(self):
    """The keys of its three dropouts."""
    return tuple(self.make_rng('dropout') for _ in range(3))


def scan_blocks(cfg: ModelConfig, params, rngs, x_BxLxD, *args):
  """Blocks one after the other as a loop over their stacked parameters: a program of one block, whatever the depth.

  The parameters stay as they are, one tree a block; the stack is a copy for as long as the pass and its gradient.

  Args:
    cfg: of the blocks.
    params: of each block.
    rngs: of each block; None without dropout.
    x_BxLxD: features.
    *args: of each block, between x and rngs.
  """

  def step(x_BxLxD, layer):
    params, rngs = layer
    return Block(cfg, parent=None).apply({'params': params}, x_BxLxD, *args, rngs)[0], None

  step = jax.checkpoint(step, prevent_cse=False) if cfg.remat else step
  stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *zip(params, rngs, strict=True))
  return jax.lax.scan(step, x_BxLxD, stacked)[0]


class Cache(NamedTuple):
  """Keys and values of one block at positions 0..M-1 of each row."""

  k_BxMxHxK: Any
  v_BxMxHxK: Any


def remember(cache: Cache, k_BxNxHxK, v_BxNxHxK, position_BxN) -> Cache:
  """Write keys and values at their positions; those at or beyond M are dropped."""
  row_Bx1 = jnp.arange(position_BxN.shape[0])[:, None]
  return Cache(*(
    old.at[row_Bx1, position_BxN].set(new.astype(old.dtype), mode='drop')
    for old, new in zip(cache, (k_BxNxHxK, v_BxNxHxK), strict=True)
  ))  # fmt: skip


class StopHead(nn.Module):
  """Two logits from the features at [CLS]: class 0 = stop, class 1 = continue. The residual is un-normalised."""

  cfg: ModelConfig

  @nn.compact
  def __call__(self, h_BxSxD, train: bool):
    D, compute = self.cfg.d_model, self.cfg.compute
    y = LayerNorm(name='norm')(h_BxSxD)
    y = Linear('bsd,df->bsf', (D, 2 * D), ('embed', 'mlp'), D, compute, bias=True, name='mlp_in')(y)
    y = Linear('bsf,fd->bsd', (2 * D, D), ('mlp', 'embed'), 2 * D, compute, bias=True, name='mlp_out')(jnp.tanh(y))
    y = numerics.dropout(y, self.cfg.dropout, self.make_rng('dropout') if train else None) + h_BxSxD
    return Linear('bsd,dc->bsc', (D, 2), ('embed', None), D, compute, name='logits')(y).astype(jnp.float32)


class Transformer(nn.Module):
  """Tokens to `Outputs`."""

  cfg: ModelConfig

  @nn.compact
  def __call__(
    self, tokens_BxL, position_BxL, segment_BxL, cls_BxS, noise_BxS=None, open_BxL=None, *, train: bool = False,
    cache=None,
  ):  # fmt: skip
    """Compute features, unembedding and stop logits.

    Args:
      tokens_BxL: ids.
      position_BxL: rotary positions, in any order of storage.
      segment_BxL: tokens attend within their segment; 0 is padding.
      cls_BxS: where the stop head reads; ignored without a stop head.
      noise_BxS: noise level of each segment; ignored without conditioning.
      open_BxL: may a token be inserted right of each; ignored unless the model is told.
      train: with dropout (needs an rng named 'dropout').
      cache: of each block, a `Cache`. A causal model then attends to what lies in it up to each token's position,
        whatever the segments, and returns (Outputs, caches with these tokens in them).
    """
    cfg = self.cfg
    told = cfg.conditioning == 'adaln'
    if told and noise_BxS is None:
      raise ValueError("a model with conditioning='adaln' needs noise_BxS, the noise level of each segment")
    std = 1.0 if cfg.init == 'reference' else 0.02

    def embed_init(rng, shape, dtype):
      return (jax.random.normal(rng, shape, dtype) * std).at[0].set(0.0)  # id 0 is padding

    table = nn.with_logical_partitioning(embed_init, vocabulary.TABLE)
    embed_VxD = self.param('embed', table, (cfg.vocab_size, cfg.d_model), jnp.float32)
    dtype = jnp.bfloat16 if cfg.compute == 'bfloat16' else jnp.float32
    x_BxLxD = jnp.take(sharding.gather(embed_VxD, vocabulary.TABLE), tokens_BxL, axis=0).astype(dtype)
    # [PAD] keeps its zeros also where it is a token as others (the reference): a LayerNorm is steep there.
    x_BxLxD = jnp.where((tokens_BxL == 0)[..., None], jax.lax.stop_gradient(x_BxLxD), x_BxLxD)
    if cfg.open_gap_embedding:
      if open_BxL is None:
        raise ValueError(
          'a model with open_gap_embedding needs open_BxL, whether a token may be inserted right of each'
        )
      init = nn.with_logical_partitioning(lambda rng, shape, dtype: jax.random.normal(rng, shape, dtype) * std, OPEN)
      open_2xD = self.param('open', init, (2, cfg.d_model), jnp.float32)
      x_BxLxD += jnp.take(sharding.gather(open_2xD, OPEN), open_BxL.astype(jnp.int32), axis=0).astype(dtype)
    x_BxLxD = sharding.constrain(x_BxLxD, ROWS)
    noise_BxSxC = NoiseLevel(cfg, name='noise')(noise_BxS) if told else None
    make_block = nn.remat(Block) if cfg.remat and cache is None else Block
    blocks = [make_block(cfg, name=f'block_{layer}') for layer in range(cfg.num_layers)]
    rngs = [block.draw_rngs() if train else None for block in blocks]
    if cfg.scan_layers and cache is None and not self.is_initializing():
      params = [block.variables['params'] for block in blocks]
      x_BxLxD = scan_blocks(cfg, params, rngs, x_BxLxD, segment_BxL, position_BxL, noise_BxSxC)
    else:
      caches = [None] * cfg.num_layers if cache is None else list(cache)
      for layer, block in enumerate(blocks):
        args = segment_BxL, position_BxL, noise_BxSxC, rngs[layer], caches[layer]
        x_BxLxD, caches[layer] = block(x_BxLxD, *args)

    stop_BxSx2 = None
    if cfg.stop_head:
      stop_BxSx2 = StopHead(cfg, name='stop')(jnp.take_along_axis(x_BxLxD, cls_BxS[..., None], axis=1), train)
    if cfg.final_norm:
      x_BxLxD = LayerNorm(bias=not told, name='final_norm')(x_BxLxD)
      if told:
        x_BxLxD = modulate(x_BxLxD, *Modulation(cfg, 2, name='final_modulation')(noise_BxSxC, segment_BxL))
    table = nn.with_logical_partitioning(_uniform(cfg.d_model), vocabulary.TABLE)
    unembed_VxD = self.param('unembed', table, (cfg.vocab_size, cfg.d_model), jnp.float32)
    outputs = Outputs(sharding.constrain(x_BxLxD, ROWS), unembed_VxD, stop_BxSx2)
    return outputs if cache is None else (outputs, caches)


unbox = nn.unbox


def init(cfg: ModelConfig, rng) -> Any:
  """Make fresh parameters, boxed with their logical axis names (`unbox` strips them)."""
  one = jnp.ones((1, 2), jnp.int32)
  return Transformer(cfg).init(rng, one, one, one, one[:, :1], jnp.zeros((1, 1)), one)['params']


def apply(
  cfg: ModelConfig, params, tokens_BxL, position_BxL, segment_BxL, cls_BxS, noise_BxS=None, open_BxL=None, *, rng=None
) -> Outputs:
  """Run the transformer; with `rng`, with dropout. `noise_BxS` and `open_BxL` are for models that are told them."""
  rngs = None if rng is None else {'dropout': rng}
  args = tokens_BxL, position_BxL, segment_BxL, cls_BxS, noise_BxS, open_BxL
  return Transformer(cfg).apply({'params': params}, *args, train=rng is not None, rngs=rngs)


def apply_batch(cfg: ModelConfig, params, batch: Batch, *, rng=None) -> Outputs:
  """Run the transformer on a batch of packed rows."""
  names = ('tokens_BxL', 'position_BxL', 'segment_BxL', 'cls_BxS', 'noise_BxS')
  return apply(cfg, params, *(batch[name] for name in names), batch.get('open_BxL'), rng=rng)


def apply_rows(cfg: ModelConfig, params, tokens_BxL, length_B, noise_BxS=None, open_BxL=None) -> Outputs:
  """Run the transformer on rows of one sequence each, [CLS] first: what samplers call `forward`."""
  index_BxL = jnp.broadcast_to(jnp.arange(tokens_BxL.shape[1]), tokens_BxL.shape)
  segment_BxL = (index_BxL < length_B[:, None]).astype(jnp.int32)
  cls_Bx1 = jnp.zeros((tokens_BxL.shape[0], 1), jnp.int32)
  return apply(cfg, params, tokens_BxL, index_BxL, segment_BxL, cls_Bx1, noise_BxS, open_BxL)


class Forward(NamedTuple):
  """A model with its parameters, as samplers see it."""

  cfg: ModelConfig
  params: Any

  def __call__(self, tokens_BxL, length_B, noise_BxS=None, open_BxL=None) -> Outputs:
    """Run on rows of one sequence each (S = 1), [CLS] first, with what the model is told: noise levels, open gaps."""
    return apply_rows(self.cfg, self.params, tokens_BxL, length_B, noise_BxS, open_BxL)

  def cache(self, rows: int, size: int) -> list[Cache]:
    """An empty cache of each block, for sequences of at most `size` tokens."""
    shape = rows, size, self.cfg.num_heads, self.cfg.head_dim
    dtype = jnp.float32 if self.cfg.compute == 'float32' else jnp.bfloat16  # what the products would round to
    return [Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(self.cfg.num_layers)]

  def cached(self, tokens_BxN, start_B, cache) -> tuple[Outputs, list[Cache]]:
    """Run a causal model on N more tokens of each row, the first at position start; earlier ones are in the cache."""
    position_BxN = start_B[:, None] + jnp.arange(tokens_BxN.shape[1])[None]
    args = tokens_BxN, position_BxN, jnp.ones_like(tokens_BxN), jnp.zeros_like(tokens_BxN[:, :1])
    return Transformer(self.cfg).apply({'params': self.params}, *args, cache=cache)


def abstract(cfg: ModelConfig, mesh=None):
  """Shapes and types of the parameters: what a checkpoint is read onto, this host's first device or a mesh."""
  boxed = jax.eval_shape(lambda: init(cfg, jax.random.key(0)))
  if mesh is None:
    place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    places = jax.tree.map(lambda _: place, unbox(boxed))
  else:
    places = sharding.state_shardings(boxed, mesh)
  return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), unbox(boxed), places)
