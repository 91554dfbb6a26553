"""The rotary transformer of Insertion Language Models (arXiv 2505.05755), a pure function of parameters and tokens.

Pre-LayerNorm blocks, bidirectional or causal attention within segments, an untied output embedding, and a stop head at
[CLS]; the architecture follows the authors' reference implementation. With conditioning='adaln', for masked diffusion,
the noise level shifts, scales and gates the activations of every block (AdaLN; DiT, arXiv 2212.09748).
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from ilm_jax.distributed import sharding
from ilm_jax.models import attention, numerics, vocabulary
from ilm_jax.models.attention import Cache
from ilm_jax.models.config import CHOICES as CHOICES
from ilm_jax.models.config import PRESETS as PRESETS
from ilm_jax.models.config import ModelConfig
from ilm_jax.models.layers import LayerNorm, Linear, Modulation, NoiseEmbedding, StopHead, modulate, uniform_init
from ilm_jax.types import Batch, Outputs

FEATURES = ('rows', None, None)  # logical axis names of BxLxD activations
OPEN_TABLE = (None, 'embed')  # logical axis names of the embedding table that model.open_gap_embedding adds


class Block(nn.Module):
  """Transformer block: x + attention(norm1(x)), then x + mlp(norm2(x)).

  With noise-level conditioning, each branch is x + gate * f(norm(x) * (1 + scale) + shift).
  """

  cfg: ModelConfig

  @nn.compact
  def __call__(self, x_BxLxD, segment_BxL, position_BxL, noise_BxSxC, rngs=None, cache=None):
    """Return (features, cache); `rngs` are the keys from `dropout_rngs`, or None to disable dropout.

    With a cache (the block's `Cache`), attention is causal and covers the cached positions, segments are ignored, and
    the result's cache includes the keys and values of this call.
    """
    cfg = self.cfg
    D, H, K, F = cfg.d_model, cfg.num_heads, cfg.head_dim, cfg.d_ff
    attention_rng, out_rng, mlp_rng = (None, None, None) if rngs is None else rngs
    conditioned = noise_BxSxC is not None
    if conditioned:
      modulation = Modulation(cfg, 6, name='modulation')(noise_BxSxC, segment_BxL)
      shift1, scale1, gate1, shift2, scale2, gate2 = modulation

    y_BxLxD = LayerNorm(bias=not conditioned, name='norm1')(x_BxLxD)
    if conditioned:
      y_BxLxD = modulate(y_BxLxD, shift1, scale1)
      x_BxLxD = y_BxLxD if cfg.residual == 'modulated' else x_BxLxD
    names, dim = ('embed', 'heads', None), min(cfg.rotary_dim, K)
    q_BxLxHxK, k_BxLxHxK, v_BxLxHxK = (
      Linear('bld,dhk->blhk', (D, H, K), names, fan_in=D, compute=cfg.compute, name=name)(y_BxLxD)
      for name in ('query', 'key', 'value')
    )
    q_BxLxHxK, k_BxLxHxK = (attention.rotary(x, position_BxL, dim=dim) for x in (q_BxLxHxK, k_BxLxHxK))
    if cache is None:
      mask_BxLxL = attention.segment_mask(segment_BxL, position_BxL, causal=cfg.causal)
      y_BxLxHxK = attention.attend(q_BxLxHxK, k_BxLxHxK, v_BxLxHxK, mask_BxLxL, cfg=cfg, rng=attention_rng)
    else:
      cache = attention.update_cache(cache, k_BxLxHxK, v_BxLxHxK, position_BxL)
      mask_BxLxM = jnp.arange(cache.k_BxMxHxK.shape[1])[None, None] <= position_BxL[..., None]
      y_BxLxHxK = attention.attend(q_BxLxHxK, cache.k_BxMxHxK, cache.v_BxMxHxK, mask_BxLxM, cfg=cfg)
    names = ('heads', None, 'embed')
    y_BxLxD = Linear('blhk,hkd->bld', (H, K, D), names, fan_in=D, compute=cfg.compute, name='out')(y_BxLxHxK)
    y_BxLxD = numerics.dropout(y_BxLxD, cfg.dropout, out_rng)
    x_BxLxD = x_BxLxD + (gate1 * y_BxLxD if conditioned else y_BxLxD)

    y_BxLxD = LayerNorm(bias=not conditioned, name='norm2')(x_BxLxD)
    y_BxLxD = modulate(y_BxLxD, shift2, scale2) if conditioned else y_BxLxD
    y_BxLxF = Linear('bld,df->blf', (D, F), ('embed', 'mlp'), D, cfg.compute, bias=True, name='mlp_in')(y_BxLxD)
    y_BxLxF = jax.nn.relu(y_BxLxF) if cfg.activation == 'relu' else jax.nn.gelu(y_BxLxF, approximate=True)
    y_BxLxD = Linear('blf,fd->bld', (F, D), ('mlp', 'embed'), F, cfg.compute, bias=True, name='mlp_out')(y_BxLxF)
    y_BxLxD = numerics.dropout(y_BxLxD, cfg.dropout, mlp_rng)
    x_BxLxD = x_BxLxD + (gate2 * y_BxLxD if conditioned else y_BxLxD)
    return sharding.constrain(x_BxLxD, FEATURES), cache

  def dropout_rngs(self):
    """Return the RNG keys of the block's three dropout layers."""
    return tuple(self.make_rng('dropout') for _ in range(3))


def scan_blocks(cfg: ModelConfig, params, rngs, x_BxLxD, *args):
  """Apply all blocks as one `lax.scan` over their stacked parameters: XLA compiles one block, whatever the depth.

  `params` and `rngs` list the blocks' parameters and dropout keys (None without dropout); `args` go to every block. The
  stack is a temporary copy of the blocks' parameters; their layout in the parameter tree does not change.
  """

  def step(x_BxLxD, layer):
    params, rngs = layer
    return Block(cfg, parent=None).apply({'params': params}, x_BxLxD, *args, rngs)[0], None

  step = jax.checkpoint(step, prevent_cse=False) if cfg.remat else step
  stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *zip(params, rngs, strict=True))
  return jax.lax.scan(step, x_BxLxD, stacked)[0]


class Transformer(nn.Module):
  """The whole model: embedding, blocks, stop head, final norm and output embedding."""

  cfg: ModelConfig

  @nn.compact
  def __call__(
    self, tokens_BxL, position_BxL, segment_BxL, cls_BxS, noise_BxS=None, open_BxL=None, *, train: bool = False,
    cache=None,
  ):  # fmt: skip
    """Compute `Outputs`: features, output embedding and stop logits; with a cache, return (Outputs, caches).

    Args:
      tokens_BxL: token ids.
      position_BxL: rotary position of each token; may differ from its index in the row.
      segment_BxL: segment of each token, 0 for padding. Tokens attend within their segment.
      cls_BxS: index in the row of each segment's [CLS], the input of the stop head.
      noise_BxS: noise level of each segment; ignored without conditioning.
      open_BxL: whether a token may be inserted right of each token; ignored without open_gap_embedding.
      train: enable dropout (needs an RNG named 'dropout').
      cache: one `Cache` per block of a causal model. Tokens then attend to all cached positions up to their own;
        segments are ignored; the returned caches include these tokens.
    """
    cfg = self.cfg
    conditioned = cfg.conditioning == 'adaln'
    if conditioned and noise_BxS is None:
      raise ValueError("model.conditioning='adaln' needs noise_BxS, the noise level of each segment: pass it")
    std = 1.0 if cfg.init == 'reference' else 0.02

    def embed_init(rng, shape, dtype):
      return (jax.random.normal(rng, shape, dtype) * std).at[0].set(0.0)  # id 0 is [PAD]

    table = nn.with_logical_partitioning(embed_init, vocabulary.TABLE)
    embed_VxD = self.param('embed', table, (cfg.vocab_size, cfg.d_model), jnp.float32)
    dtype = jnp.bfloat16 if cfg.compute == 'bfloat16' else jnp.float32
    x_BxLxD = jnp.take(sharding.gather(embed_VxD, vocabulary.TABLE), tokens_BxL, axis=0).astype(dtype)
    # As in the reference implementation, the [PAD] embedding gets no gradient and stays zero, even where the model
    # generates [PAD] (mdm): the gradient of a LayerNorm at a zero vector is very large.
    x_BxLxD = jnp.where((tokens_BxL == 0)[..., None], jax.lax.stop_gradient(x_BxLxD), x_BxLxD)
    if cfg.open_gap_embedding:
      if open_BxL is None:
        raise ValueError('model.open_gap_embedding needs open_BxL, a mask of the tokens that may get a right neighbor')
      init = nn.with_logical_partitioning(nn.initializers.normal(std), OPEN_TABLE)
      open_2xD = self.param('open', init, (2, cfg.d_model), jnp.float32)
      x_BxLxD += jnp.take(sharding.gather(open_2xD, OPEN_TABLE), open_BxL.astype(jnp.int32), axis=0).astype(dtype)
    x_BxLxD = sharding.constrain(x_BxLxD, FEATURES)
    noise_BxSxC = NoiseEmbedding(cfg, name='noise')(noise_BxS) if conditioned else None
    make_block = nn.remat(Block) if cfg.remat and cache is None else Block
    blocks = [make_block(cfg, name=f'block_{layer}') for layer in range(cfg.num_layers)]
    rngs = [block.dropout_rngs() if train else None for block in blocks]
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
      x_BxLxD = LayerNorm(bias=not conditioned, name='final_norm')(x_BxLxD)
      if conditioned:
        x_BxLxD = modulate(x_BxLxD, *Modulation(cfg, 2, name='final_modulation')(noise_BxSxC, segment_BxL))
    table = nn.with_logical_partitioning(uniform_init(cfg.d_model), vocabulary.TABLE)
    unembed_VxD = self.param('unembed', table, (cfg.vocab_size, cfg.d_model), jnp.float32)
    outputs = Outputs(sharding.constrain(x_BxLxD, FEATURES), unembed_VxD, stop_BxSx2)
    return outputs if cache is None else (outputs, caches)


unbox = nn.unbox


def init(cfg: ModelConfig, rng) -> Any:
  """Return randomly initialized float32 parameters, boxed with their logical axis names (`unbox` removes the boxes)."""
  one = jnp.ones((1, 2), jnp.int32)
  return Transformer(cfg).init(rng, one, one, one, one[:, :1], jnp.zeros((1, 1)), one)['params']


def abstract_params(cfg: ModelConfig, mesh=None):
  """Return the parameters as `jax.ShapeDtypeStruct`s with shardings on the mesh, for restoring a checkpoint.

  Without a mesh, all parameters are on this process's first device.
  """
  boxed = jax.eval_shape(lambda: init(cfg, jax.random.key(0)))
  if mesh is None:
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    shardings = jax.tree.map(lambda _: device, unbox(boxed))
  else:
    shardings = sharding.state_shardings(boxed, mesh)
  return jax.tree.map(lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), unbox(boxed), shardings)


def apply(
  cfg: ModelConfig, params, tokens_BxL, position_BxL, segment_BxL, cls_BxS, noise_BxS=None, open_BxL=None, *, rng=None
) -> Outputs:
  """Run the transformer (for the arguments see `Transformer.__call__`); `rng` enables dropout."""
  rngs = None if rng is None else {'dropout': rng}
  args = tokens_BxL, position_BxL, segment_BxL, cls_BxS, noise_BxS, open_BxL
  return Transformer(cfg).apply({'params': params}, *args, train=rng is not None, rngs=rngs)


def apply_batch(cfg: ModelConfig, params, batch: Batch, *, rng=None) -> Outputs:
  """Run the transformer on a batch of packed rows (described in types.py); `rng` enables dropout."""
  names = ('tokens_BxL', 'position_BxL', 'segment_BxL', 'cls_BxS', 'noise_BxS')
  return apply(cfg, params, *(batch[name] for name in names), batch.get('open_BxL'), rng=rng)


class Forward(NamedTuple):
  """A model with its parameters, passed as `forward` to the functions that sample and score."""

  cfg: ModelConfig
  params: Any

  def __call__(self, tokens_BxL, length_B, noise_BxS=None, open_BxL=None) -> Outputs:
    """Run the model on rows of one sequence each (S = 1): [CLS] at index 0, padding from index `length_B` on."""
    index_BxL = jnp.broadcast_to(jnp.arange(tokens_BxL.shape[1]), tokens_BxL.shape)
    segment_BxL = (index_BxL < length_B[:, None]).astype(jnp.int32)
    cls_Bx1 = jnp.zeros((tokens_BxL.shape[0], 1), jnp.int32)
    return apply(self.cfg, self.params, tokens_BxL, index_BxL, segment_BxL, cls_Bx1, noise_BxS, open_BxL)

  def empty_cache(self, rows: int, size: int) -> list[Cache]:
    """Return one empty key-value cache per block, for sequences of at most `size` tokens."""
    return [attention.empty_cache(self.cfg, rows, size) for _ in range(self.cfg.num_layers)]

  def apply_cached(self, tokens_BxN, start_B, cache) -> tuple[Outputs, list[Cache]]:
    """Run a causal model on the next N tokens of each row, at positions start_B to start_B + N - 1.

    `cache` holds the earlier tokens, in one `Cache` per block. Returns (outputs of the new tokens, updated caches).
    """
    position_BxN = start_B[:, None] + jnp.arange(tokens_BxN.shape[1])[None]
    args = tokens_BxN, position_BxN, jnp.ones_like(tokens_BxN), jnp.zeros_like(tokens_BxN[:, :1])
    return Transformer(self.cfg).apply({'params': self.params}, *args, cache=cache)
