"""Train a model or evaluate a run.

    ilm-jax train --config=star:tiny [--workdir=FOLDER]
    ilm-jax eval --config=star:tiny [--workdir=FOLDER]
    python -m ilm_jax.main --config=configs/star.py:tiny [--workdir=FOLDER] [--mode=train|eval]

`ilm-jax train` and `ilm-jax eval` are the same command. --config takes the path of a config file, or the name of a
config that comes with the package (`ilm-jax configs` lists them); the part after the colon selects a variant. Any
setting can be changed on the command line: --config.optimizer.learning_rate=5e-4.
"""

import os
import re
import sys
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from ilm_jax.console import define_processes, fail, quiet, usage, wants_help
from ilm_jax.types import UserError

MODES = ('train', 'eval')
PACKAGED = Path(__file__).parent / 'configs'
_CONFIG = config_flags.DEFINE_config_file(
  'config', None, 'Config file or packaged config, with a variant, such as star:tiny.'
)
_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of the run; by default runs/CONFIG-VARIANT.')
_MODE = flags.DEFINE_enum('mode', 'train', MODES, 'Train (or resume), or evaluate a run on the test split.')
define_processes(flags.FLAGS)


def parse(argv) -> list[str]:
  """Parse the flags; raises UserError with a one-line message for every mistake in them."""
  argv = locate_config(argv)
  try:
    rest = flags.FLAGS(argv)
  except UserError:
    raise
  except (AttributeError, KeyError) as error:
    raise UserError(unknown_setting(plain(error), argv)) from error
  except Exception as error:  # a config file is code, and may raise anything
    raise UserError(f'flags: {plain(error)}') from error
  if _CONFIG.value is None:
    raise UserError('--config is missing: expected a config, such as --config=star:tiny; `ilm-jax configs` lists them')
  if len(rest) > 1:
    raise UserError(f'flags: unexpected argument {rest[1]!r}: every argument must have the form --name=value')
  return rest


def locate_config(argv) -> list[str]:
  """Return the arguments, with the name of a packaged config in --config replaced by the path of its file."""
  argv = list(argv)
  for index, word in enumerate(argv[1:], 1):
    name, equals, value = word.removeprefix('-').removeprefix('-').partition('=')
    if not word.startswith('-') or name != 'config':
      continue
    if not equals:
      index += 1
      value = argv[index] if index < len(argv) else ''
    path, colon, variant = value.partition(':')
    if os.path.isfile(path):
      continue
    packaged = PACKAGED / f'{path}.py'
    if not re.fullmatch(r'[a-z]\w*', path) or not packaged.is_file() or not is_config(packaged):
      names = ', '.join(sorted(file.stem for file in PACKAGED.glob('*.py') if is_config(file)))
      raise UserError(
        f'--config={value}: there is no file {path} in {os.getcwd()}, and no packaged config of this name: expected a '
        f'path, or one of {names}'
      )
    argv[index] = f'--config={packaged}{colon}{variant}' if equals else f'{packaged}{colon}{variant}'
  return argv


def is_config(file: Path) -> bool:
  """Return whether a file in ilm_jax/configs is a config that --config accepts by name."""
  from ilm_jax.configs.list import NAMES

  return file.stem in NAMES


def unknown_setting(text: str, argv) -> str:
  """Return the error message for a setting that the config lacks; for a renamed setting, it gives the new name."""
  from ilm_jax.runs.run_file import RENAMED

  for argument in argv[1:]:
    name = argument.lstrip('-').partition('=')[0].removeprefix('no').removeprefix('config.')
    if name in RENAMED:
      return f'flags: config.{name} was renamed: use --config.{RENAMED[name]}'
  return f'flags: the config has no such setting: {text}'


def plain(error: Exception) -> str:
  """Return the message of a flag parsing error, without the traceback and quotes that libraries add."""
  text = str(error.args[0]) if error.args else str(error)
  while len(text) > 1 and text[0] == text[-1] and text[0] in '\'"':
    text = text[1:-1].replace("\\'", "'").replace('\\n', ' ')
  return re.split(r'\b\w*(?:Error|Exception): ', text)[-1] if 'Traceback' in text else text


def default_workdir() -> str:
  """Return the default --workdir: `runs/star-tiny` for --config=star:tiny and for --config=configs/star.py:tiny."""
  name, _, argument = config_flags.get_config_filename(flags.FLAGS['config']).partition(':')
  argument = argument or (flags.FLAGS['config'].config_filename.partition(':')[2])
  return str(Path('runs') / '-'.join(part for part in (Path(name).stem, argument) if part))


def run() -> int:
  """Train or evaluate, as --mode says; returns the exit code."""
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
  """Run a command that takes a config; a user's mistake gives one line on standard error and exit code 1.

  Args:
    doc: printed by --help, before the flags.
    names: names of the flags that --help prints.
    call: function that runs the command after the flags are parsed, and returns the exit code.
    argv: the arguments; sys.argv by default.
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
  """Run `ilm-jax train` or `ilm-jax eval`; returns the exit code."""
  return command(__doc__, ('config', 'workdir', 'mode', 'coordinator', 'num_processes', 'process_id'), run, argv)


if __name__ == '__main__':
  sys.exit(main())
