"""run.json of a run (its config, and the machine and code of each start), and configs as plain dictionaries.

Settings that were renamed after a run was started are read under their new names (`RENAMED`).
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

RENAMED = {  # former name of a setting -> its present name
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
  """Return a config with former names of settings replaced by their present names."""
  flat = flatten(config)
  renamed = {RENAMED.get(name, name): value for name, value in flat.items()}
  return config if renamed.keys() == flat.keys() else unflatten(renamed)


def as_json(cfg) -> dict:
  """Return a config as nested dictionaries that JSON can hold; tuples become lists."""
  return {
    key: as_json(value) if isinstance(value, ConfigDict) else list(value) if isinstance(value, tuple) else value
    for key, value in ((key, cfg[key]) for key in cfg)
  }


def flatten(tree: dict, prefix: str = '') -> dict:
  """Return nested dictionaries as one dictionary with dotted names; `prefix` is put before each name."""
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
  """Return the config of the run in a workdir, as nested dictionaries; raise UserError if there is no run."""
  path = epath.Path(workdir) / 'run.json'
  if not path.exists():
    raise UserError(f'{workdir}: expected the workdir of a run, but there is no run.json in it')
  run = parse_run(path.read_text()) or {'config': {}}
  if not {'family', 'task', 'model', 'sampling', 'loss', 'eval'} <= run['config'].keys():
    raise UserError(f'{path} is not what a run writes: expected JSON with the config of the run')
  return run['config']


def commit() -> str:
  """Return the git commit of this package, followed by `+changes` if files differ; 'unknown' outside its repository."""

  def git(*args):
    return subprocess.run(['git', '-C', str(PACKAGE), *args], capture_output=True, text=True, check=True).stdout.strip()

  try:
    if os.path.realpath(git('rev-parse', '--show-toplevel')) != os.path.realpath(PACKAGE.parent):
      return 'unknown'  # the package is installed inside the repository of another project
    return git('rev-parse', 'HEAD') + ('+changes' if git('status', '--porcelain', '--untracked-files=no') else '')
  except (OSError, subprocess.CalledProcessError):
    return 'unknown'


def code() -> dict[str, str]:
  """Return what must be equal in all processes of a run: commit, a hash of the package's files, library versions."""
  files = hashlib.sha256()
  for path in sorted(PACKAGE.rglob('*.py')):
    files.update(f'{path.relative_to(PACKAGE)}\n{path.stat().st_size}\n'.encode() + path.read_bytes())
  return {
    'commit': commit(),
    'code': files.hexdigest()[:16],
    **{name: version(name) for name in (*PACKAGES[1:], 'sentencepiece', 'tokenizers')},
  }


def version(name: str) -> str:
  """Return the version of an installed package, or 'unknown'."""
  try:
    return metadata.version(name)
  except metadata.PackageNotFoundError:
    return 'unknown'


def command_line() -> list[str]:
  """Return the command that started this process, as a user would type it."""
  program = sys.argv[0].split() if sys.argv[0].startswith('ilm-jax') else ['python', '-m', 'ilm_jax.main']
  return [*program, *sys.argv[1:]]


def describe_start(step: int) -> dict:
  """Return the record of one start of a run in run.json: time, code, command, hardware, versions.

  Args:
    step: the step that this start continues from.
  """
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
  """Return the content of a run.json, its config under present names of settings, or None if it is malformed."""
  try:
    run = json.loads(text)
    if not isinstance(run['config'], dict) or not isinstance(run['starts'], list):
      return None
    return {**run, 'config': migrate(run['config'])}
  except (KeyError, TypeError, ValueError):
    return None


def read_run(workdir) -> dict | None:
  """Return the content of the run.json of a workdir; None, with a warning if it is malformed, if there is none."""
  path = epath.Path(workdir) / 'run.json'
  if not path.exists():
    return None
  run = parse_run(path.read_text())
  if run is None:
    logging.warning('ignored %s, which is not what a run writes', path)
  return run


def write_json(path, value) -> None:
  """Write a JSON file atomically: a reader sees the old file or the new one."""
  path = epath.Path(path)
  part = path.parent / f'.{path.name}.{os.getpid()}.part'
  part.write_text(json.dumps(value, indent=2) + '\n')
  part.replace(path)
