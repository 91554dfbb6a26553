"""Convert the weights of the authors' PyTorch implementation (the reference) to our parameters and back.

The conversion works on NumPy arrays; PyTorch is needed only to read `.pt`, `.pth` and `.ckpt` files.
"""

import io
import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from ilm_jax.models import layers, transformer
from ilm_jax.models.config import ModelConfig
from ilm_jax.types import Array, UserError

FAMILIES = ('ilm', 'arm', 'mdm')
ROTARY_DIM = 64  # maximum number of channels per head that the reference implementation rotates


def _layer(theirs: str, ours: str, kind: str = 'kernel', *, bias: bool = True) -> dict[str, list[str]]:
  """Map the PyTorch names of a layer's weight and bias to the paths of our parameters."""
  weight = {f'{theirs}.weight': [f'{ours}/{kind}']}
  return weight | {f'{theirs}.bias': [f'{ours}/bias']} if bias else weight


# Name in the reference implementation's state_dict -> paths of our parameters. If there are several paths, the PyTorch
# tensor is the concatenation of their (transposed) parameters along the first axis.
EMBEDDING = {'embed_tokens.weight': ['embed'], 'output_layer.linear.weight': ['unembed']}
BLOCK = {
  **_layer('norm1', 'norm1', 'scale'),
  'attn_qkv.weight': ['query/kernel', 'key/kernel', 'value/kernel'],
  **_layer('o_proj', 'out', bias=False),
  **_layer('norm2', 'norm2', 'scale'),
  **_layer('mlp.0', 'mlp_in'),
  **_layer('mlp.2', 'mlp_out'),
}
FINAL_NORM = _layer('output_layer.norm_final', 'final_norm', 'scale')
STOP_HEAD = {
  **_layer('length_output_layer.norm_final', 'stop/norm', 'scale'),
  **_layer('length_output_layer.mlp.0', 'stop/mlp_in'),
  **_layer('length_output_layer.mlp.2', 'stop/mlp_out'),
  **_layer('length_output_layer.linear', 'stop/logits', bias=False),
}
MODULATION = _layer('ada_ln_modulations.modulation', 'modulation/linear')
NOISE = {
  **_layer('sigma_map.mlp.0', 'noise/mlp_in'),
  **_layer('sigma_map.mlp.2', 'noise/mlp_out'),
  **_layer('output_layer.adaLN_modulation.modulation', 'final_modulation/linear'),
}


def _names(num_layers: int, *, final_norm: bool, stop_head: bool, noise: bool) -> dict[str, list[str]]:
  """Map each PyTorch parameter name to the paths of our parameters; with noise conditioning, LayerNorms lack a bias."""
  names = dict(EMBEDDING)
  for layer in range(num_layers):
    block = BLOCK | (MODULATION if noise else {})
    names |= {f'encoder.{layer}.{name}': [f'block_{layer}/{p}' for p in paths] for name, paths in block.items()}
  names |= (FINAL_NORM if final_norm else {}) | (STOP_HEAD if stop_head else {}) | (NOISE if noise else {})
  return {name: paths for name, paths in names.items() if not (noise and re.search(r'norm\w*\.bias$', name))}


def _shapes(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
  """Map the path of every parameter of our model to its shape."""
  leaves = jax.tree_util.tree_leaves_with_path(jax.eval_shape(lambda: transformer.init(cfg, jax.random.key(0))))
  keys = jax.tree_util.DictKey  # all other path entries are Flax's boxes for axis names: skip these
  return {'/'.join(part.key for part in path if isinstance(part, keys)): leaf.shape for path, leaf in leaves}


def _reference_shape(path: str, shape) -> tuple[int, ...]:
  """Return the PyTorch shape of one of our parameters; the kernel of a linear layer becomes an (out, in) matrix."""
  if not path.endswith('/kernel'):
    return tuple(shape)
  inputs = 2 if path.endswith('/out/kernel') else 1
  return int(np.prod(shape[inputs:])), int(np.prod(shape[:inputs]))


def _inverse_frequencies(dim: int) -> np.ndarray:
  """Return the dim / 2 frequencies of a rotary embedding with base 10000."""
  return 1.0 / np.float32(10_000.0) ** (np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim))


NOISE_BUFFER = 'sigma_map.freqs'  # PyTorch buffer that holds the frequencies of the noise embedding
NOISE_FREQUENCIES = _inverse_frequencies(2 * layers.NOISE_FREQUENCIES)


def from_reference(state_dict, family: str = 'ilm', num_heads: int | None = None) -> tuple[ModelConfig, dict]:
  """Convert the state_dict of the reference implementation to (ModelConfig, nested dicts of float32 NumPy arrays).

  Args:
    state_dict: maps names to arrays or tensors, or is a checkpoint with such a mapping under 'state_dict'. The prefix
      `model.` is removed; rotary buffers (`*.inv_freq`), `sigma_map.freqs` and `type_embeddings.*` are not converted.
    family: 'ilm' (has a stop head), 'arm' (causal) or 'mdm' (conditioned on a noise level).
    num_heads: number of attention heads; required if the rotary buffers do not determine it, else checked against them.
  """
  if family not in FAMILIES:
    raise UserError(f'family={family!r}: expected one of {", ".join(FAMILIES)}')
  arrays, rotary_buffers = {}, {}
  for name, value in _tensors(state_dict).items():
    short = name.removeprefix('model.')
    if short in arrays or short in rotary_buffers:
      raise UserError(f'{short} is given twice, with and without the prefix "model.": keep one of them')
    if re.fullmatch(r'encoder\.\d+\.rotary_emb\.inv_freq', short):
      rotary_buffers[short] = _float32(name, value)
    elif short == NOISE_BUFFER and family == 'mdm':
      _check_frequencies(name, _float32(name, value), NOISE_FREQUENCIES, 'the noise embedding')
    elif not short.endswith('inv_freq') and not short.startswith('type_embeddings.'):
      arrays[short] = _float32(name, value)

  layer_ids = {match[1] for name in arrays if (match := re.match(r'encoder\.(\d+)\.', name))}
  noise = family == 'mdm'
  final_norm = noise or any(name in FINAL_NORM for name in arrays)
  stop_head = any(name in STOP_HEAD for name in arrays)
  if stop_head != (family == 'ilm'):
    found = min(set(STOP_HEAD) & set(arrays)) if stop_head else 'no length_output_layer.*'
    wanted = 'a stop head' if family == 'ilm' else 'no stop head'
    raise UserError(f'family={family!r} has {wanted}, but the weights have {found}: pass the family of the weights')
  num_layers = max(1, len(layer_ids))
  names = _names(num_layers, final_norm=final_norm, stop_head=stop_head, noise=noise)
  kinds = {'missing': [n for n in names if n not in arrays], 'unexpected': [n for n in arrays if n not in names]}
  if problems := [f'{kind} {_first_few(found)}' for kind, found in kinds.items() if found]:
    raise UserError(f'these are not the weights of the {family} transformer: {"; ".join(problems)}')

  for name in ('embed_tokens.weight', 'encoder.0.mlp.0.weight', *(['sigma_map.mlp.2.weight'] if noise else [])):
    if arrays[name].ndim != 2 or not arrays[name].size:
      raise UserError(f'{name}: expected a non-empty matrix, got shape {arrays[name].shape}')
  vocab_size, d_model = arrays['embed_tokens.weight'].shape
  conditioning: dict = {}
  if noise:
    conditioning = {'conditioning': 'adaln', 'residual': 'modulated', 'd_cond': len(arrays['sigma_map.mlp.2.weight'])}
  cfg = ModelConfig(
    vocab_size=vocab_size,
    num_layers=num_layers,
    num_heads=_head_count(rotary_buffers, d_model, num_heads),
    d_model=d_model,
    d_ff=arrays['encoder.0.mlp.0.weight'].shape[0],
    causal=family == 'arm',
    final_norm=final_norm,
    stop_head=stop_head,
    rotary_dim=ROTARY_DIM,
    **conditioning,
  )
  shapes = _shapes(cfg)
  expected = {}
  for name, paths in names.items():
    first, *others = (_reference_shape(path, shapes[path]) for path in paths)
    expected[name] = (first[0] + sum(other[0] for other in others), *first[1:])
  if wrong := [name for name in names if arrays[name].shape != expected[name]]:
    lines = [f'{name}: expected shape {expected[name]}, got {arrays[name].shape}' for name in wrong]
    raise UserError(_first_few(lines, '; '))

  params = {}
  for name, paths in names.items():
    for path, part in zip(paths, np.split(arrays[name], len(paths)), strict=True):
      *parents, last = path.split('/')
      leaf = params
      for parent in parents:
        leaf = leaf.setdefault(parent, {})
      leaf[last] = np.array((part.T if last == 'kernel' else part).reshape(shapes[path]), order='C')
  return cfg, params


def to_reference(cfg: ModelConfig, params) -> dict[str, np.ndarray]:
  """Convert parameters (without Flax boxes) to the reference's state_dict, in float32; inverts `from_reference`.

  Raises UserError if the reference implementation does not support the architecture.
  """
  rotated = min(ROTARY_DIM, cfg.head_dim)
  if min(cfg.rotary_dim, cfg.head_dim) != rotated:
    raise UserError(f'model.rotary_dim={cfg.rotary_dim}: expected {rotated}, as in the reference implementation')
  noise = cfg.conditioning == 'adaln'
  if noise and (cfg.residual != 'modulated' or not cfg.final_norm or cfg.stop_head):
    raise UserError(
      f'model.residual={cfg.residual!r}, final_norm={cfg.final_norm}, stop_head={cfg.stop_head}: the reference has '
      "conditioning='adaln' only with residual='modulated', final_norm=True and stop_head=False"
    )
  state = {NOISE_BUFFER: NOISE_FREQUENCIES.copy()} if noise else {}
  names = _names(cfg.num_layers, final_norm=cfg.final_norm, stop_head=cfg.stop_head, noise=noise)
  for name, paths in names.items():
    parts = []
    for path in paths:
      leaf = params
      for key in path.split('/'):
        leaf = leaf[key]
      leaf = np.asarray(leaf, np.float32)
      shape = _reference_shape(path, leaf.shape)
      parts.append(leaf.reshape(shape[::-1]).T if path.endswith('/kernel') else leaf)
    state[name] = np.ascontiguousarray(np.concatenate(parts))  # contiguous, because safetensors ignores strides
  for layer in range(cfg.num_layers):
    state[f'encoder.{layer}.rotary_emb.inv_freq'] = _inverse_frequencies(rotated)
  return state


def _head_count(rotary_buffers: dict[str, np.ndarray], d_model: int, num_heads: int | None) -> int:
  """Infer the number of attention heads from the rotary buffers, or check the given number against them.

  A rotary buffer holds min(ROTARY_DIM, head dimension) / 2 frequencies, which gives the head dimension if below 64.
  """
  rotated = 2 * rotary_buffers[min(rotary_buffers)].size if rotary_buffers else None
  for name, buffer in rotary_buffers.items():
    _check_frequencies(name, buffer, _inverse_frequencies(rotated), 'rotary embedding')
  allowed = [
    d_model // head_dim
    for head_dim in range(d_model, 1, -1)
    if head_dim % 2 == 0 and d_model % head_dim == 0 and rotated in (None, min(ROTARY_DIM, head_dim))
  ]
  given = f'd_model={d_model}' + (f' and {rotated // 2} rotary frequencies' if rotary_buffers else '')
  if not allowed:
    raise UserError(f'no number of heads fits {given}: expected the weights of the reference implementation')
  choices = ', '.join(map(str, allowed))
  if num_heads is None:
    if rotary_buffers and len(allowed) == 1:
      return allowed[0]
    raise UserError(f'num_heads is ambiguous ({given} allow {choices}): pass one as num_heads')
  if num_heads not in allowed:
    raise UserError(f'num_heads={num_heads}: expected one of {choices} for {given}')
  return int(num_heads)


def _check_frequencies(name: str, buffer: np.ndarray, expected: np.ndarray, owner: str) -> None:
  """Raise UserError if a buffer does not hold the expected frequencies; `owner` names the layer that uses them."""
  if buffer.shape != expected.shape or not np.allclose(buffer, expected, rtol=1e-2):  # bfloat16 rounds by up to 0.4 %
    raise UserError(f'{name}: expected the {expected.size} frequencies of {owner} with base 10000, got other values')


def _first_few(items: list[str], separator: str = ', ') -> str:
  """Join the first three items for an error message; if there are more, append their total number."""
  return separator.join(items[:3]) + (f'{separator}... ({len(items)} in all)' if len(items) > 3 else '')


def load_state_dict(path) -> dict[str, np.ndarray]:
  """Read a weights file (.npz, .safetensors, .pt, .pth, .ckpt) as float32 arrays, without running code from it.

  If names in an .npz file start with `param/`, only those are read, without the prefix. Raises UserError if the file
  cannot be read, or the package that reads this format is not installed.
  """
  path = epath.Path(path)
  readers = {'.npz': _read_npz, '.safetensors': _read_safetensors}
  readers |= dict.fromkeys(('.pt', '.pth', '.ckpt'), _read_torch)
  if path.suffix not in readers:
    raise UserError(f'{path}: expected a file that ends in {", ".join(readers)}')
  try:
    loaded = _tensors(readers[path.suffix](path.read_bytes()))
  except UserError as error:
    raise UserError(f'{path}: {error}') from error
  except Exception as error:  # on malformed files, the libraries raise many types of errors
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    raise UserError(f'{path} cannot be read: {reason}') from error
  return {name: _float32(f'{path}: {name}', value) for name, value in loaded.items()}


def _read_npz(data: bytes):
  with np.load(io.BytesIO(data), allow_pickle=False) as file:
    prefix = 'param/' if any(name.startswith('param/') for name in file) else ''
    return {name.removeprefix(prefix): file[name] for name in file if name.startswith(prefix)}


def _read_safetensors(data: bytes):
  try:
    import safetensors
  except ImportError as error:
    raise UserError("reading .safetensors files needs safetensors: pip install 'ilm_jax[convert]'") from error
  # Decode the raw bytes, because safetensors.numpy supports bfloat16 only from version 0.5 on.
  types = {'F64': np.float64, 'F32': np.float32, 'F16': np.float16, 'BF16': jnp.bfloat16, 'I64': np.int64}
  arrays = {}
  for name, tensor in safetensors.deserialize(data):
    if tensor['dtype'] not in types:
      raise UserError(f'{name}: expected dtype {", ".join(types)}, got {tensor["dtype"]}')
    arrays[name] = np.frombuffer(tensor['data'], types[tensor['dtype']]).reshape(tensor['shape'])
  return arrays


def _read_torch(data: bytes):
  try:
    import torch
  except ImportError as error:
    advice = 'pip install torch, or save the state_dict as .safetensors'
    raise UserError(f'reading PyTorch files needs PyTorch: {advice}') from error
  return torch.load(io.BytesIO(data), weights_only=True, map_location='cpu')


def _tensors(loaded) -> dict[str, Array]:
  """Return the state_dict of a loaded file, with string names; a checkpoint has it under the key 'state_dict'."""
  if isinstance(loaded, Mapping) and isinstance(loaded.get('state_dict'), Mapping):
    loaded = loaded['state_dict']
  if not isinstance(loaded, Mapping):
    raise UserError(f'expected a mapping of names to tensors, got {type(loaded).__name__}')
  return {str(name): value for name, value in loaded.items()}


def _float32(name: str, value) -> np.ndarray:
  """Convert an array or a PyTorch tensor of any number type to a float32 NumPy array."""
  if hasattr(value, 'detach'):  # a PyTorch tensor: PyTorch must cast it, because NumPy has no bfloat16
    value = value.detach().cpu().float()
  try:
    array = np.asarray(value)
    if array.dtype == 'V2':  # .npz stores bfloat16 as 2-byte void
      array = array.view(jnp.bfloat16)
    return array.astype(np.float32)
  except (TypeError, ValueError) as error:
    raise UserError(f'{name}: expected an array of numbers, got {type(value).__name__}') from error
