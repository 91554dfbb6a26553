"""Train or evaluate: `python -m ilm_jax.main --config=configs/star.py:tiny [--workdir=...] [--mode=train|eval]`."""

import os
import re
import sys
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from ilm_jax.console import define_hosts, fail, quiet, usage, wants_help
from ilm_jax.types import UserError

MODES = ('train', 'eval')
_CONFIG = config_flags.DEFINE_config_file('config', None, 'The config, with its argument: configs/star.py:hard.')
_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of the run; runs/NAME-ARGUMENT by default.')
_MODE = flags.DEFINE_enum('mode', 'train', MODES, 'Train (or continue), or evaluate a run on the test split.')
define_hosts(flags.FLAGS)


def parse(argv) -> list[str]:
  """Parse the flags; every mistake in them is one line."""
  words = [word.removeprefix('-').removeprefix('-') for word in argv[1:]]
  path = next((word.split('=', 1)[1] for word in words if word.startswith('config=')), None)
  if path is None and 'config' in words[:-1]:
    path = words[words.index('config') + 1]
  if path is not None and not os.path.isfile(path.split(':')[0]):
    raise UserError(f'--config={path}: there is no file {path.split(":")[0]} here ({os.getcwd()})')
  try:
    rest = flags.FLAGS(argv)
  except UserError:
    raise
  except (AttributeError, KeyError) as error:
    raise UserError(f'flags: the config has no such setting: {plain(error)}') from error
  except Exception as error:  # a config file is code, and may raise anything
    raise UserError(f'flags: {plain(error)}') from error
  if _CONFIG.value is None:
    raise UserError('--config is missing: expected a file, such as --config=configs/star.py:tiny')
  if len(rest) > 1:
    raise UserError(f'flags: did not understand {rest[1]!r}: every argument is a flag, --name=value')
  return rest


def plain(error: Exception) -> str:
  """What an error of the flags says, without the traceback or the quotes that a library has wrapped around it."""
  text = str(error.args[0]) if error.args else str(error)
  while len(text) > 1 and text[0] == text[-1] and text[0] in '\'"':
    text = text[1:-1].replace("\\'", "'").replace('\\n', ' ')
  return re.split(r'\b\w*(?:Error|Exception): ', text)[-1] if 'Traceback' in text else text


def default_workdir() -> str:
  """`runs/star-tiny` for configs/star.py:tiny."""
  name, _, argument = config_flags.get_config_filename(flags.FLAGS['config']).partition(':')
  argument = argument or (flags.FLAGS['config'].config_filename.partition(':')[2])
  return str(Path('runs') / '-'.join(part for part in (Path(name).stem, argument) if part))


def run() -> int:
  """Train or evaluate; returns the exit code."""
  quiet()
  from ilm_jax.distributed import processes
  from ilm_jax.training import loop

  cfg = _CONFIG.value
  given = (flags.FLAGS[name].value for name in processes.FLAGS)
  processes.start(*given, saving=_MODE.value == 'train', **cfg.get('distributed', {}))
  workdir = _WORKDIR.value or default_workdir()
  call = {'train': loop.train, 'eval': loop.evaluate_run}[_MODE.value]
  return processes.end_together(lambda: call(cfg, workdir))


def command(doc: str, names, call, argv=None) -> int:
  """Run a command that takes a config; a user's mistake is one line on standard error and exit code 1.

  Args:
    doc: what --help prints before the flags.
    names: of the flags it prints.
    call: () -> exit code, once the flags are parsed.
    argv: the arguments, sys.argv by default.
  """
  argv = sys.argv if argv is None else argv
  if wants_help(argv):
    return usage(doc, flags.FLAGS, names)
  try:
    parse(argv)
    return call()
  except UserError as error:
    return fail(error)
  except KeyboardInterrupt:
    return 130


def main(argv=None) -> int:
  """Run this command."""
  return command(__doc__, ('config', 'workdir', 'mode', 'coordinator', 'num_processes', 'process_id'), run, argv)


if __name__ == '__main__':
  sys.exit(main())
