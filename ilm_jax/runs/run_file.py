"""Read and write run.json (the config of a run and a record of each start); convert configs to plain dictionaries.

When the run.json of an older run is read, settings that were renamed since get their new names (see `RENAMED`).
"""

import hashlib
import json
import os
import pathlib
import platform
import shlex
import socket
import subprocess
import sys
import time
from importlib import metadata

from absl import logging
from etils import epath
from ml_collections import ConfigDict

from ilm_jax import paths
from ilm_jax.types import UserError

PACKAGE = pathlib.Path(__file__).resolve().parents[1]
PACKAGES = ('ilm_jax', 'jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'grain', 'clu', 'ml-collections', 'numpy')

RENAMED = {  # former name of a config setting -> its current name
  'hosts.start_seconds': 'distributed.initialization_timeout',
  'hosts.heartbeat_seconds': 'distributed.heartbeat_timeout',
  'data.workers': 'data.num_workers',
  'eval.judge': 'eval.perplexity_model',
  'eval.show': 'eval.print_samples',
  'model.tell_open': 'model.open_gap_embedding',
  'corrupt.infill': 'corrupt.infill_rate',
  'corrupt.fim': 'corrupt.fim_rate',
  'optimizer.accumulate': 'optimizer.accumulation_steps',
  'task.workers': 'task.num_workers',
  'task.keep_rest': 'task.split_long_documents',
  'task.detokenise': 'task.detokenize',
  'task.tokenizer.normalisation': 'task.tokenizer.normalization',
}


def migrate(config: dict) -> dict:
  """Return the config of an older run with renamed settings under their current names."""
  flat = flatten(config)
  renamed = {RENAMED.get(name, name): value for name, value in flat.items()}
  return config if renamed.keys() == flat.keys() else unflatten(renamed)


def as_json(cfg) -> dict:
  """Convert a config to nested dictionaries that can be stored as JSON; tuples become lists."""
  return {
    key: as_json(value) if isinstance(value, ConfigDict) else list(value) if isinstance(value, tuple) else value
    for key, value in ((key, cfg[key]) for key in cfg)
  }


def flatten(tree: dict, prefix: str = '') -> dict:
  """Flatten nested dictionaries into one with dotted keys, such as 'model.d_model', each preceded by `prefix`."""
  out = {}
  for key, value in tree.items():
    out |= flatten(value, f'{prefix}{key}.') if isinstance(value, dict) else {prefix + key: value}
  return out


def unflatten(flat: dict) -> dict:
  """Convert a dictionary with dotted keys to nested dictionaries; the inverse of `flatten`."""
  out = {}
  for name, value in flat.items():
    *sections, last = name.split('.')
    inner = out
    for key in sections:
      inner = inner.setdefault(key, {})
    inner[last] = value
  return out


def read_config(workdir):
  """Return the config of the run in a workdir as nested dictionaries; UserError if it has no valid run.json."""
  path = paths.resolve(workdir, 'workdir') / 'run.json'
  if not path.exists():
    raise UserError(f'{workdir}: expected the workdir of a run, but there is no run.json in it')
  run = parse_run(path.read_text()) or {'config': {}}
  if not {'family', 'task', 'model', 'sampling', 'loss', 'eval'} <= run['config'].keys():
    raise UserError(f'{path} is not a valid run.json: expected JSON with the config of the run')
  return run['config']


def commit() -> str:
  """Return the git commit of this code, with `+changes` if files were modified; 'unknown' outside its repository."""

  def git(*args):
    return subprocess.run(['git', '-C', str(PACKAGE), *args], capture_output=True, text=True, check=True).stdout.strip()

  try:
    if os.path.realpath(git('rev-parse', '--show-toplevel')) != os.path.realpath(PACKAGE.parent):
      return 'unknown'  # this package is installed inside the git repository of another project
    return git('rev-parse', 'HEAD') + ('+changes' if git('status', '--porcelain', '--untracked-files=no') else '')
  except (OSError, subprocess.CalledProcessError):
    return 'unknown'


def code() -> dict[str, str]:
  """Return commit, hash of the source files and library versions, which must be the same in all processes of a run."""
  files = hashlib.sha256()
  for path in sorted(PACKAGE.rglob('*.py')):
    files.update(f'{path.relative_to(PACKAGE)}\n{path.stat().st_size}\n'.encode() + path.read_bytes())
  versions = {name: version(name) for name in (*PACKAGES[1:], 'sentencepiece', 'tokenizers')}
  return {'commit': commit(), 'code': files.hexdigest()[:16], **versions}


def version(name: str) -> str:
  """Return the version of an installed package; 'unknown' if it is not installed."""
  try:
    return metadata.version(name)
  except metadata.PackageNotFoundError:
    return 'unknown'


def describe_start(step: int) -> dict:
  """Return the record of a start at `step` for run.json: time, commit, command, hardware, versions."""
  import jax

  devices = jax.devices()
  program = sys.argv[0].split() if sys.argv[0].startswith('ilm-jax') else ['python', '-m', 'ilm_jax.main']
  return {
    'time': time.strftime('%Y-%m-%dT%H:%M:%S%z'),
    'from_step': step,
    'commit': commit(),
    'command': shlex.join([*program, *sys.argv[1:]]),
    'devices': f'{len(devices)} x {devices[0].device_kind} ({devices[0].platform})',
    'processes': jax.process_count(),
    'host': socket.gethostname(),
    'cpus': os.cpu_count(),
    'python': platform.python_version(),
    'versions': {name: version(name) for name in PACKAGES},
  }


def parse_run(text: str) -> dict | None:
  """Parse the text of a run.json, and rename settings that have a new name; return None if the text is malformed."""
  try:
    run = json.loads(text)
    if not isinstance(run['config'], dict) or not isinstance(run['starts'], list):
      return None
    return {**run, 'config': migrate(run['config'])}
  except (KeyError, TypeError, ValueError):
    return None


def read_run(workdir) -> dict | None:
  """Return the content of a workdir's run.json; None if it is missing or, with a warning, malformed."""
  path = epath.Path(workdir) / 'run.json'
  if not path.exists():
    return None
  run = parse_run(path.read_text())
  if run is None:
    logging.warning('ignored %s, which is not a valid run.json', path)
  return run


def write_json(path, value) -> None:
  """Write a JSON file atomically: readers see either the complete old file or the complete new one."""
  path = epath.Path(path)
  part = path.parent / f'.{path.name}.{os.getpid()}.part'
  part.write_text(json.dumps(value, indent=2) + '\n')
  part.replace(path)
