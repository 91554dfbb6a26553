"""The file run.json of a run: its config, and what each start ran on; configs as plain dictionaries.

Settings that were renamed since a run was started are read under their new names (`RENAMED`).
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

from ilm_jax.types import UserError

PACKAGE = pathlib.Path(__file__).resolve().parents[1]
PACKAGES = ('ilm_jax', 'jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'grain', 'clu', 'ml-collections', 'numpy')

RENAMED = {  # old name of a setting -> its name today
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
  """Return a config under today's names of its settings."""
  flat = flatten(config)
  renamed = {RENAMED.get(name, name): value for name, value in flat.items()}
  return config if renamed.keys() == flat.keys() else unflatten(renamed)


def as_json(cfg) -> dict:
  """A config as a plain dict that JSON can hold."""
  return {
    key: as_json(value) if isinstance(value, ConfigDict) else list(value) if isinstance(value, tuple) else value
    for key, value in ((key, cfg[key]) for key in cfg)
  }


def flatten(tree: dict, prefix: str = '') -> dict:
  """Nested dicts as one, with dotted names."""
  out = {}
  for key, value in tree.items():
    out |= flatten(value, f'{prefix}{key}.') if isinstance(value, dict) else {prefix + key: value}
  return out


def unflatten(flat: dict) -> dict:
  """Return the nested dictionary of dotted names: the inverse of `flatten`."""
  out = {}
  for name, value in flat.items():
    *path, last = name.split('.')
    inner = out
    for key in path:
      inner = inner.setdefault(key, {})
    inner[last] = value
  return out


def read_config(workdir):
  """The config of the run in a workdir, as a plain dict."""
  path = epath.Path(workdir) / 'run.json'
  if not path.exists():
    raise UserError(f'{workdir}: expected the workdir of a run, but there is no run.json in it')
  run = parse_run(path.read_text()) or {'config': {}}
  if not {'family', 'task', 'model', 'sampling', 'loss', 'eval'} <= run['config'].keys():
    raise UserError(f'{path} is not what a run writes: expected JSON with the config of the run')
  return run['config']


def commit() -> str:
  """The commit of the code that runs, `+changes` behind it when the tree is not clean; 'unknown' outside git."""

  def git(*args):
    return subprocess.run(['git', '-C', str(PACKAGE), *args], capture_output=True, text=True, check=True).stdout.strip()

  try:
    if os.path.realpath(git('rev-parse', '--show-toplevel')) != os.path.realpath(PACKAGE.parent):
      return 'unknown'  # installed inside somebody else's repository
    return git('rev-parse', 'HEAD') + ('+changes' if git('status', '--porcelain', '--untracked-files=no') else '')
  except (OSError, subprocess.CalledProcessError):
    return 'unknown'


def code() -> dict[str, str]:
  """What runs here, of things that must be the same on all hosts: commit, the package's files, versions."""
  files = hashlib.sha256()
  for path in sorted(PACKAGE.rglob('*.py')):
    files.update(f'{path.relative_to(PACKAGE)}\n{path.stat().st_size}\n'.encode() + path.read_bytes())
  return {
    'commit': commit(),
    'code': files.hexdigest()[:16],
    **{name: version(name) for name in (*PACKAGES[1:], 'sentencepiece', 'tokenizers')},
  }


def version(name: str) -> str:
  """Of an installed package."""
  try:
    return metadata.version(name)
  except metadata.PackageNotFoundError:
    return 'unknown'


def command_line() -> list[str]:
  """Return the command that started this process, as a user would type it."""
  program = sys.argv[0].split() if sys.argv[0].startswith('ilm-jax') else ['python', '-m', 'ilm_jax.main']
  return [*program, *sys.argv[1:]]


def describe_start(step: int) -> dict:
  """What is worth knowing of one start of a run."""
  import jax

  devices = jax.devices()
  return {
    'time': time.strftime('%Y-%m-%dT%H:%M:%S%z'),
    'from_step': step,
    'commit': commit(),
    'command': shlex.join(command_line()),
    'devices': f'{len(devices)} x {devices[0].device_kind} ({devices[0].platform})',
    'processes': jax.process_count(),
    'host': socket.gethostname(),
    'cpus': os.cpu_count(),
    'python': platform.python_version(),
    'versions': {name: version(name) for name in PACKAGES},
  }


def parse_run(text: str) -> dict | None:
  """What a run.json says; None where it is not what a run writes."""
  try:
    run = json.loads(text)
    if not isinstance(run['config'], dict) or not isinstance(run['starts'], list):
      return None
    return {**run, 'config': migrate(run['config'])}
  except (KeyError, TypeError, ValueError):
    return None


def read_run(workdir) -> dict | None:
  """The run.json of a workdir, if there is one."""
  path = epath.Path(workdir) / 'run.json'
  if not path.exists():
    return None
  run = parse_run(path.read_text())
  if run is None:
    logging.warning('%s is not what a run writes: passed over', path)
  return run


def write_json(path, value) -> None:
  """Write a JSON file in one move: a reader sees the old one or the new one."""
  path = epath.Path(path)
  part = path.parent / f'.{path.name}.{os.getpid()}.part'
  part.write_text(json.dumps(value, indent=2) + '\n')
  part.replace(path)
