"""The transformer's configuration: sizes, architecture variants, their validation, and named presets."""

import dataclasses

from ilm_jax.types import UserError

# Allowed values of the settings that are strings.
CHOICES = {
  'activation': ('relu', 'gelu'),
  'compute': ('float32', 'bfloat16', 'mixed'),
  'init': ('normal', 'reference'),
  'conditioning': ('none', 'adaln'),
  'residual': ('input', 'modulated'),
}

# Named sizes. The ddit_* presets are the sizes of the reference implementation's masked diffusion models.
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


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """All settings that determine the parameter shapes and the computation of the model."""

  vocab_size: int
  num_layers: int
  num_heads: int
  d_model: int
  d_ff: int
  activation: str = 'relu'  # 'relu' or 'gelu' (tanh approximation)
  causal: bool = False  # attend only to the same and to earlier positions
  final_norm: bool = True  # apply a LayerNorm after the last block
  stop_head: bool = True  # predict from the features at [CLS] whether generation stops or continues
  rotary_dim: int = 64  # maximum number of channels per head that rotary embedding rotates
  dropout: float = 0.1  # dropout rate of the residual branches and of the stop head
  attention_dropout: float = 0.1  # dropout rate of the attention weights
  compute: str = 'float32'  # 'float32', 'bfloat16', or 'mixed' (bfloat16 matmul operands, float32 everywhere else)
  remat: bool = False  # rematerialize each block in the backward pass: less memory, slower
  scan_layers: bool = False  # run the layers as one scan over stacked parameters: same results, faster compilation
  init: str = 'normal'  # initial embeddings: 'normal' draws from N(0, 0.02), 'reference' from N(0, 1)
  conditioning: str = 'none'  # 'adaln' conditions the blocks on a noise level; their LayerNorms then have no bias
  d_cond: int = 128  # width of the noise level's embedding (conditioning='adaln')
  open_gap_embedding: bool = False  # add an embedding of whether a token may be inserted right of each token
  # Attention output is added to the block's input ('input') or to the modulated LayerNorm's output ('modulated').
  residual: str = 'input'

  def __post_init__(self):
    for name in ('vocab_size', 'num_layers', 'num_heads', 'd_model', 'd_ff', 'd_cond'):
      if getattr(self, name) < 1:
        raise UserError(f'model.{name}={getattr(self, name)}: expected at least 1')
    for name in ('dropout', 'attention_dropout'):
      if not 0 <= getattr(self, name) < 1:
        raise UserError(f'model.{name}={getattr(self, name)}: expected a rate of at least 0 and below 1')
    if self.d_model % self.num_heads:
      raise UserError(f'model.d_model={self.d_model}: expected a multiple of model.num_heads={self.num_heads}')
    for name, allowed in CHOICES.items():
      if getattr(self, name) not in allowed:
        raise UserError(f'model.{name}={getattr(self, name)!r}: expected one of {", ".join(allowed)}')
    if self.residual == 'modulated' and self.conditioning == 'none':
      raise UserError("model.residual='modulated' needs model.conditioning='adaln': set it, or model.residual='input'")
    if self.head_dim % 2:
      raise UserError(f'model.d_model / model.num_heads = {self.head_dim} is odd: rotary embedding needs it to be even')

  @property
  def head_dim(self) -> int:
    """Number of channels per attention head."""
    return self.d_model // self.num_heads

  @classmethod
  def create(cls, vocab_size: int, **settings) -> 'ModelConfig':
    """Build a ModelConfig from the `model` section of an experiment config, whose `preset` names an entry of PRESETS.

    The other settings are fields of ModelConfig and override the preset; a field that is None keeps the value of the
    preset or the default. Raises UserError if a setting's name or value is not allowed, or a size is missing.
    """
    preset = settings.pop('preset', None)
    if preset is not None and preset not in PRESETS:
      raise UserError(f'model.preset={preset!r}: expected one of {", ".join(PRESETS)}')
    fields = {field.name for field in dataclasses.fields(cls)}
    if unknown := sorted(set(settings) - fields):
      raise UserError(f'unknown model setting {unknown[0]!r}: expected one of {", ".join(sorted(fields))}')
    merged = dict(PRESETS.get(preset, {})) | {k: v for k, v in settings.items() if v is not None}
    if missing := sorted({'num_layers', 'num_heads', 'd_model', 'd_ff'} - set(merged)):
      raise UserError(f'model.{missing[0]} is not set: set it, or choose a model.preset ({", ".join(PRESETS)})')
    return cls(vocab_size=vocab_size, **merged)
