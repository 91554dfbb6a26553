"""Export weights for the PyTorch reference code of the ILM paper, and check this package against outputs of that code.

    ilm-jax convert --workdir=runs/hard --out=weights.safetensors    export a run's best weights
    ilm-jax convert --check=tests/golden                             compare logits, losses and gradients

--workdir writes the weights under the names of the reference code. --check expects a folder with ilm.npz, arm.npz or
mdm.npz, which hold outputs of the reference code, and optionally config.json with "num_heads"; the README of
tests/golden describes the arrays. It prints the largest error of each quantity, relative to the largest reference
value, and exits with code 1 if an error is above 1e-5.
"""

import json
import zipfile

import numpy as np
from absl import flags

from ilm_jax import paths
from ilm_jax.console import command, quiet
from ilm_jax.evaluation import output
from ilm_jax.types import UserError

LIMIT = 1e-5  # largest accepted value of max |actual - expected| / max |expected|
FAMILIES = ('ilm', 'arm', 'mdm')
LOSS = {'compute': 'float32', 'vocab_chunk': 2048, 'stop_weight': 1.0, 'length_weight': 'none', 'mdm': 'mean_masked'}


def define(values: flags.FlagValues) -> None:
  """Define the flags of `ilm-jax convert`."""
  flags.DEFINE_string('check', None, 'Folder with outputs of the reference code to compare with.', flag_values=values)
  flags.DEFINE_string('workdir', None, 'Folder of the run whose weights are exported.', flag_values=values)
  flags.DEFINE_string('checkpoint', 'best', "Checkpoint to export: 'best', 'latest' or a step.", flag_values=values)
  flags.DEFINE_string('out', None, 'File to write: *.npz or *.safetensors.', flag_values=values)


def relative_error(actual, expected) -> float:
  """Return max |actual - expected| / max |expected|; infinite if the shapes differ or a value is not finite."""
  actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
  if actual.shape != expected.shape or not (np.isfinite(actual).all() and np.isfinite(expected).all()):
    return float('inf')
  return float(np.abs(actual - expected).max() / max(np.abs(expected).max(), 1e-30))


def make_batch(numbers, used_BxT, gap_BxT, token_BxT) -> dict:
  """Return a batch with one example per row; its targets are the tokens and gaps for which `used_BxT` is true."""
  rows, length = numbers['input_ids'].shape
  segment_BxL = numbers.get('attention_mask', np.ones((rows, length))).astype(np.int32)
  one = np.ones((rows, 1), np.float32)
  return {
    'tokens_BxL': numbers['input_ids'],
    'position_BxL': numbers.get('positions', np.tile(np.arange(length), (rows, 1))),
    'segment_BxL': segment_BxL,
    'open_BxL': segment_BxL > 0,
    'cls_BxS': np.zeros((rows, 1), np.int32),
    'segment_weight_BxS': one,
    'free_BxS': one.astype(np.int32),
    'noise_BxS': 0 * one,
    'target_gap_BxT': np.where(used_BxT, gap_BxT, 0),
    'target_token_BxT': np.where(used_BxT, token_BxT, 0),
    'target_segment_BxT': used_BxT.astype(np.int32),
    'target_weight_BxT': used_BxT.astype(np.float32),
  }


def ilm_batch(numbers) -> dict:
  """Convert the insertion model's inputs in ilm.npz to a batch; no token may be inserted after [CLS]."""
  batch = make_batch(numbers, numbers['gap_index'] >= 0, numbers['gap_index'], numbers['gap_token'])
  batch['open_BxL'] &= np.arange(batch['open_BxL'].shape[1]) > 0
  return batch


def selected_batch(numbers, selected_BxL, target_BxL) -> dict:
  """Return a batch with one example per row; its targets are `target_BxL` where `selected_BxL` is true."""
  first_BxL = np.argsort(~selected_BxL, axis=1, kind='stable')  # positions of the targets, then all other positions
  gap_BxT = first_BxL[:, : max(1, int(selected_BxL.sum(1).max()))]
  used_BxT = np.take_along_axis(selected_BxL, gap_BxT, axis=1)
  return make_batch(numbers, used_BxT, gap_BxT, np.take_along_axis(target_BxL, gap_BxT, axis=1))


def arm_batch(numbers) -> dict:
  """Convert the autoregressive model's inputs in arm.npz to a batch; a target id of -100 means no target."""
  return selected_batch(numbers, numbers['target_ids'] != -100, numbers['target_ids'])


def mdm_batch(numbers) -> dict:
  """Convert the masked diffusion model's inputs in mdm.npz to a batch with noise levels and loss weights."""
  batch = selected_batch(numbers, numbers['input_ids'] != numbers['clean_ids'], numbers['clean_ids'])
  weight_B = numbers['noise_rate'] / np.expm1(numbers['total_noise'])
  batch['target_weight_BxT'] = (batch['target_weight_BxT'] * weight_B[:, None]).astype(np.float32)
  return batch | {'noise_BxS': numbers['total_noise'][:, None].astype(np.float32)}


def compare(name: str, numbers, num_heads: int | None = None) -> dict[str, float]:
  """Return the relative errors of a family's logits, loss and gradients (`grad/NAME`) against the reference code.

  `numbers` are the arrays of the family's *.npz file. `num_heads` is needed if the weights do not determine it.
  """
  import jax
  from ml_collections import ConfigDict

  from ilm_jax import families
  from ilm_jax.models import reference, transformer

  state = {key.removeprefix('param/'): value for key, value in numbers.items() if key.startswith('param/')}
  cfg, params = reference.from_reference(state, name, num_heads)
  batch = {'ilm': ilm_batch, 'arm': arm_batch, 'mdm': mdm_batch}[name](numbers)

  def loss_of(params):
    outputs = transformer.apply_batch(cfg, params, batch)
    total, weight = families.get(name).loss(outputs, batch, ConfigDict(LOSS))['loss']
    return total / weight, (outputs.hidden_BxLxD @ outputs.unembed_VxD.T, outputs.stop_BxSx2)

  with jax.enable_x64(False), jax.default_matmul_precision('highest'):
    (loss, (logits, stop)), grads = jax.jit(jax.value_and_grad(loss_of, has_aux=True))(params)
  errors = {'logits': relative_error(logits, numbers['vocab_logits' if name == 'ilm' else 'logits'])}
  if name == 'ilm':
    errors['stop logits'] = relative_error(stop[:, 0], numbers['stop_logits'])
  errors['loss'] = relative_error(loss, numbers['loss'])
  ours = reference.to_reference(cfg, grads)
  wanted = {key: value for key, value in numbers.items() if key.startswith('grad/')}
  return errors | {key: relative_error(ours[key.removeprefix('grad/')], value) for key, value in wanted.items()}


def read_num_heads(path) -> int | None:
  """Return the value of "num_heads" in a config.json; None if the file or the key is missing."""
  if not path.exists():
    return None
  try:
    config = json.loads(path.read_bytes())
  except (OSError, ValueError) as error:
    raise UserError(f'{path} cannot be read as JSON: {" ".join(str(error).split())}') from None
  if not isinstance(config, dict):
    raise UserError(f'{path}: expected a JSON object, such as {{"num_heads": 3}}')
  return config.get('num_heads')


def read_numbers(path) -> dict:
  """Return the arrays of an *.npz file with outputs of the reference code."""
  try:
    with path.open('rb') as file, np.load(file) as arrays:
      numbers = dict(arrays)
  except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
    kind = type(error).__name__
    raise UserError(f'{path} cannot be read ({kind}): expected a file written by np.savez') from None
  if not any(key.startswith('grad/') for key in numbers):
    raise UserError(f'{path} holds no gradients: expected arrays named grad/NAME')
  return numbers


def check(folder) -> int:
  """Compare with the outputs of the reference code in a folder; print the errors, return 1 if one is above LIMIT."""
  path = paths.resolve(folder, '--check')
  files = {name: file for name in FAMILIES if (file := path / f'{name}.npz').exists()}
  if not files:
    raise UserError(f'--check={folder}: expected a folder with ilm.npz, arm.npz or mdm.npz')
  num_heads = read_num_heads(path / 'config.json')
  worst = 0.0
  print(f'{"":8}{"quantity":<58}largest relative error')
  for name, path in files.items():
    numbers = read_numbers(path)
    try:
      errors = compare(name, numbers, num_heads)
    except (KeyError, ValueError) as error:
      raise UserError(f'{path} does not hold the expected arrays: {" ".join(str(error).split())}') from None
    grads = {key: value for key, value in errors.items() if key.startswith('grad/')}
    rows = {key: value for key, value in errors.items() if key not in grads}
    largest = max(grads, key=grads.get)
    rows[f'{len(grads)} gradients, worst {largest[5:]}'] = grads[largest]
    for label, value in rows.items():
      print(f'{name:8}{label:<58}{value:.1e}{"" if value <= LIMIT else "  above the limit"}')
    worst = max(worst, *errors.values())
  print(f'largest of all: {worst:.1e}; the limit is {LIMIT:.0e}')
  return int(worst > LIMIT)


def export(workdir, checkpoint: str, out: str) -> int:
  """Write the weights of a run to a file, under the parameter names of the reference code; return the exit code."""
  from ilm_jax.inference import api
  from ilm_jax.models import reference

  path = output.check(out)
  if path.suffix not in ('.npz', '.safetensors'):
    raise UserError(f'--out={out}: expected a file that ends in .npz or .safetensors')
  if path.exists():
    raise UserError(f'--out={out} exists: name another file, or remove it first')
  try:
    import safetensors.numpy
  except ImportError:
    if path.suffix == '.safetensors':
      raise UserError('writing *.safetensors needs safetensors: pip install "ilm_jax[convert]"') from None
  lm = api.load(paths.resolve(workdir, '--workdir'), checkpoint)
  state = reference.to_reference(lm.model_cfg, lm.params)
  with output.replacing(path, f'--out={out}') as file:
    if path.suffix == '.npz':
      np.savez(file, **state)
    else:
      file.write(safetensors.numpy.save(state))
  print(f'{out}: {len(state)} arrays, {sum(array.size for array in state.values()):,} numbers, step {lm.step}')
  return 0


def run(values) -> int:
  """Compare with the reference code (--check) or export weights (--workdir); return the exit code."""
  if bool(values.check) == bool(values.workdir):
    raise UserError('expected --check=FOLDER, or --workdir=FOLDER with --out=FILE')
  quiet()
  if values.check:
    return check(values.check)
  if not values.out:
    raise UserError('--out is missing: expected a file, such as --out=weights.safetensors')
  return export(values.workdir, values.checkpoint, values.out)


def main(argv=None) -> int:
  """Run the command `ilm-jax convert`; return the exit code."""
  return command(__doc__, define, run, argv)
