"""The authors' PyTorch weights as our parameters, and back.

Works on names and arrays: PyTorch itself is needed only to open `.pt`, `.pth` and `.ckpt` files.
"""

import io
import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from ilm_jax.models import transformer
from ilm_jax.models.transformer import ModelConfig
from ilm_jax.types import Array, UserError

FAMILIES = ('ilm', 'arm', 'mdm')
ROTARY_DIM = 64  # channels of a head that the reference rotates, at most

# The reference's names -> our paths. Tensors of several paths are stacked along the rows of the reference's one.
EMBEDDING = {'embed_tokens.weight': ['embed'], 'output_layer.linear.weight': ['unembed']}
BLOCK = {
  'norm1.weight': ['norm1/scale'],
  'norm1.bias': ['norm1/bias'],
  'attn_qkv.weight': ['query/kernel', 'key/kernel', 'value/kernel'],
  'o_proj.weight': ['out/kernel'],
  'norm2.weight': ['norm2/scale'],
  'norm2.bias': ['norm2/bias'],
  'mlp.0.weight': ['mlp_in/kernel'],
  'mlp.0.bias': ['mlp_in/bias'],
  'mlp.2.weight': ['mlp_out/kernel'],
  'mlp.2.bias': ['mlp_out/bias'],
}
FINAL_NORM = {
  'output_layer.norm_final.weight': ['final_norm/scale'],
  'output_layer.norm_final.bias': ['final_norm/bias'],
}
STOP_HEAD = {
  'length_output_layer.norm_final.weight': ['stop/norm/scale'],
  'length_output_layer.norm_final.bias': ['stop/norm/bias'],
  'length_output_layer.mlp.0.weight': ['stop/mlp_in/kernel'],
  'length_output_layer.mlp.0.bias': ['stop/mlp_in/bias'],
  'length_output_layer.mlp.2.weight': ['stop/mlp_out/kernel'],
  'length_output_layer.mlp.2.bias': ['stop/mlp_out/bias'],
  'length_output_layer.linear.weight': ['stop/logits/kernel'],
}
MODULATION = {
  'ada_ln_modulations.modulation.weight': ['modulation/linear/kernel'],
  'ada_ln_modulations.modulation.bias': ['modulation/linear/bias'],
}
NOISE = {
  'sigma_map.mlp.0.weight': ['noise/mlp_in/kernel'],
  'sigma_map.mlp.0.bias': ['noise/mlp_in/bias'],
  'sigma_map.mlp.2.weight': ['noise/mlp_out/kernel'],
  'sigma_map.mlp.2.bias': ['noise/mlp_out/bias'],
  'output_layer.adaLN_modulation.modulation.weight': ['final_modulation/linear/kernel'],
  'output_layer.adaLN_modulation.modulation.bias': ['final_modulation/linear/bias'],
}


# --- the two layouts --------------------------------------------------------------------------------------------------


def _names(num_layers: int, *, final_norm: bool, stop_head: bool, noise: bool) -> dict[str, list[str]]:
  """Map every name of the reference to our paths; a model that is told a noise level has LayerNorms without bias."""
  names = dict(EMBEDDING)
  for layer in range(num_layers):
    block = BLOCK | (MODULATION if noise else {})
    names |= {f'encoder.{layer}.{name}': [f'block_{layer}/{p}' for p in paths] for name, paths in block.items()}
  names |= (FINAL_NORM if final_norm else {}) | (STOP_HEAD if stop_head else {}) | (NOISE if noise else {})
  return {name: paths for name, paths in names.items() if not (noise and re.search(r'norm\w*\.bias$', name))}


def _shapes(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
  """Map every path of ours to the shape that the model gives it."""
  leaves = jax.tree_util.tree_leaves_with_path(jax.eval_shape(lambda: transformer.init(cfg, jax.random.key(0))))
  keys = jax.tree_util.DictKey  # what else is on a path belongs to the box of the axis names
  return {'/'.join(part.key for part in path if isinstance(part, keys)): leaf.shape for path, leaf in leaves}


def _sizes(path: str, shape) -> tuple[int, ...]:
  """The reference's shape of one of our arrays: a linear layer is (out, in), whatever axes ours has for each."""
  if not path.endswith('/kernel'):
    return tuple(shape)
  inputs = 2 if path.endswith('/out/kernel') else 1
  return int(np.prod(shape[inputs:])), int(np.prod(shape[:inputs]))


def _stacked(sizes: list[tuple[int, ...]]) -> tuple[int, ...]:
  return (sum(size[0] for size in sizes), *sizes[0][1:])


def _inverse_frequencies(dim: int) -> np.ndarray:
  return 1.0 / np.float32(10_000.0) ** (np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim))


NOISE_BUFFER, NOISE_FREQUENCIES = 'sigma_map.freqs', _inverse_frequencies(2 * transformer.NOISE_FREQUENCIES)


# --- converting -------------------------------------------------------------------------------------------------------


def from_reference(state_dict, family: str = 'ilm', num_heads: int | None = None) -> tuple[ModelConfig, dict]:
  """Turn the authors' state_dict into our parameters.

  Args:
    state_dict: names to arrays or tensors; also a checkpoint that holds one under 'state_dict'. A leading `model.` of
      the names is dropped; buffers (`*.inv_freq`, `sigma_map.freqs`) and the unused `type_embeddings.*` are accepted.
    family: 'ilm' (with a stop head), 'arm' (causal, without) or 'mdm' (told a noise level, without).
    num_heads: needed where the rotary buffers do not decide it; checked against them otherwise.

  Returns:
    (cfg, params): a ModelConfig and nested dicts of float32 numpy arrays.

  Raises:
    UserError: with what was expected and what came.
  """
  if family not in FAMILIES:
    raise UserError(f'family={family!r}: expected one of {", ".join(FAMILIES)}')
  arrays, buffers = {}, {}
  for name, value in _tensors(state_dict).items():
    short = name.removeprefix('model.')
    if short in arrays or short in buffers:
      raise UserError(f'{short} comes twice, with and without a leading model.: keep one of them')
    if re.fullmatch(r'encoder\.\d+\.rotary_emb\.inv_freq', short):
      buffers[short] = _float32(name, value)
    elif short == NOISE_BUFFER and family == 'mdm':
      _check_frequencies(name, _float32(name, value), NOISE_FREQUENCIES, 'the noise level')
    elif not short.endswith('inv_freq') and not short.startswith('type_embeddings.'):
      arrays[short] = _float32(name, value)

  layers = {match[1] for name in arrays if (match := re.match(r'encoder\.(\d+)\.', name))}
  noise = family == 'mdm'
  final_norm = noise or any(name in FINAL_NORM for name in arrays)
  stop_head = any(name in STOP_HEAD for name in arrays)
  if stop_head != (family == 'ilm'):
    came = f'{min(set(STOP_HEAD) & set(arrays))} came' if stop_head else 'no length_output_layer.* came'
    wanted = 'a stop head' if family == 'ilm' else 'no stop head'
    raise UserError(f'family={family!r} has {wanted}, but {came}: pass the family of these weights')
  names = _names(max(1, len(layers)), final_norm=final_norm, stop_head=stop_head, noise=noise)
  missing, odd = [name for name in names if name not in arrays], [name for name in arrays if name not in names]
  if missing or odd:
    parts = [f'missing {_some(missing)}'] if missing else []
    parts += [f'unexpected {_some(odd)}'] if odd else []
    raise UserError(f'these are not the weights of the {family} transformer: {"; ".join(parts)}')

  for name in ('embed_tokens.weight', 'encoder.0.mlp.0.weight', *(['sigma_map.mlp.2.weight'] if noise else [])):
    if arrays[name].ndim != 2 or not arrays[name].size:
      raise UserError(f'{name}: expected a matrix, came shape {arrays[name].shape}')
  vocab_size, d_model = arrays['embed_tokens.weight'].shape
  cfg = ModelConfig(
    vocab_size=vocab_size,
    num_layers=max(1, len(layers)),
    num_heads=_head_count(buffers, d_model, num_heads),
    d_model=d_model,
    d_ff=arrays['encoder.0.mlp.0.weight'].shape[0],
    causal=family == 'arm',
    final_norm=final_norm,
    stop_head=stop_head,
    rotary_dim=ROTARY_DIM,
    **(
      {'conditioning': 'adaln', 'residual': 'modulated', 'd_cond': arrays['sigma_map.mlp.2.weight'].shape[0]}
      if noise
      else {}
    ),
  )
  shapes = _shapes(cfg)
  expected = {name: _stacked([_sizes(path, shapes[path]) for path in paths]) for name, paths in names.items()}
  if wrong := [name for name in names if arrays[name].shape != expected[name]]:
    raise UserError(_some([f'{name}: expected {expected[name]}, came {arrays[name].shape}' for name in wrong], '; '))

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
  """Turn our parameters (without boxes) into the authors' state_dict, rotary buffers included: the exact inverse.

  Returns:
    The reference's names to float32 numpy arrays.
  """
  rotated = min(ROTARY_DIM, cfg.head_dim)
  if min(cfg.rotary_dim, cfg.head_dim) != rotated:
    raise UserError(f'model.rotary_dim={cfg.rotary_dim}: the reference rotates {rotated} channels of a head')
  noise = cfg.conditioning == 'adaln'
  if noise and (cfg.residual != 'modulated' or not cfg.final_norm or cfg.stop_head):
    raise UserError(
      f'model.residual={cfg.residual!r}, final_norm={cfg.final_norm}, stop_head={cfg.stop_head}: the reference has '
      "conditioning='adaln' with residual='modulated', a final norm and no stop head only"
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
      rows = _sizes(path, leaf.shape)
      parts.append(leaf.reshape(rows[::-1]).T if path.endswith('/kernel') else leaf)
    state[name] = np.ascontiguousarray(np.concatenate(parts))  # safetensors writes the memory as it lies
  for layer in range(cfg.num_layers):
    state[f'encoder.{layer}.rotary_emb.inv_freq'] = _inverse_frequencies(rotated)
  return state


def _head_count(buffers: dict[str, np.ndarray], d_model: int, num_heads: int | None) -> int:
  """Find the number of heads from the rotary buffers (a half of min(64, head dimension) frequencies), or check it."""
  allowed, where = [], f'd_model={d_model}'
  rotated = 2 * buffers[min(buffers)].size if buffers else None
  for name, buffer in buffers.items():
    _check_frequencies(name, buffer, _inverse_frequencies(rotated), 'rotary embedding')
  for head_dim in range(2, d_model + 1, 2):
    if d_model % head_dim == 0 and rotated in (None, min(ROTARY_DIM, head_dim)):
      allowed.insert(0, d_model // head_dim)
  if buffers:
    where += f' and rotary buffers of {rotated // 2}'
  if not allowed:
    raise UserError(f'no number of heads fits {where}')
  choices = ', '.join(map(str, allowed))
  if num_heads is None:
    if buffers and len(allowed) == 1:
      return allowed[0]
    raise UserError(f'num_heads is not decided by the weights ({where} allow {choices}): pass num_heads=')
  if num_heads not in allowed:
    raise UserError(f'num_heads={num_heads}: expected one of {choices} for {where}')
  return int(num_heads)


def _check_frequencies(name: str, buffer: np.ndarray, expected: np.ndarray, of: str) -> None:
  """Refuse a buffer of other frequencies."""
  if buffer.shape != expected.shape or not np.allclose(buffer, expected, rtol=1e-2):  # it may have been bfloat16
    raise UserError(f'{name}: expected the {expected.size} frequencies of {of} with base 10000, came others')


def _some(items: list[str], comma: str = ', ') -> str:
  """The first three, and how many there are."""
  return comma.join(items[:3]) + (f'{comma}... ({len(items)} in all)' if len(items) > 3 else '')


# --- reading files ----------------------------------------------------------------------------------------------------


def load_state_dict(path) -> dict[str, np.ndarray]:
  """Read a file of weights: `.npz`, `.safetensors`, or `.pt`, `.pth`, `.ckpt` of PyTorch. Never runs code from a file.

  Args:
    path: local or remote. Where names of an `.npz` begin with `param/`, only those are taken, without it.

  Returns:
    Names to float32 numpy arrays.
  """
  path = epath.Path(path)
  readers = {'.npz': _read_npz, '.safetensors': _read_safetensors} | dict.fromkeys(
    ('.pt', '.pth', '.ckpt'), _read_torch
  )
  if path.suffix not in readers:
    raise UserError(f'{path}: expected a file of {", ".join(readers)}')
  try:
    loaded = _tensors(readers[path.suffix](path.read_bytes()))
  except UserError as error:
    raise UserError(f'{path}: {error}') from error
  except Exception as error:  # the readers fail in many ways on what is not theirs
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
    raise UserError("reading .safetensors needs a package: pip install 'ilm_jax[convert]'") from error
  # Not safetensors.numpy: before 0.5 it does not know bfloat16.
  types = {'F64': np.float64, 'F32': np.float32, 'F16': np.float16, 'BF16': jnp.bfloat16, 'I64': np.int64}
  arrays = {}
  for name, tensor in safetensors.deserialize(data):
    if tensor['dtype'] not in types:
      raise UserError(f'{name}: expected numbers of {", ".join(types)}, came {tensor["dtype"]}')
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
  """The mapping of names to tensors, or the one under 'state_dict'."""
  if isinstance(loaded, Mapping) and isinstance(loaded.get('state_dict'), Mapping):
    loaded = loaded['state_dict']
  if not isinstance(loaded, Mapping):
    raise UserError(f'expected a mapping of names to tensors, came {type(loaded).__name__}')
  return {str(name): value for name, value in loaded.items()}


def _float32(name: str, value) -> np.ndarray:
  """A numpy array of float32, from an array or a tensor of any float type."""
  if hasattr(value, 'detach'):  # numpy has no bfloat16
    value = value.detach().cpu().float()
  try:
    array = np.asarray(value)
    if array.dtype == 'V2':  # how .npz stores bfloat16
      array = array.view(jnp.bfloat16)
    return array.astype(np.float32)
  except (TypeError, ValueError) as error:
    raise UserError(f'{name}: expected an array of numbers, came {type(value).__name__}') from error
