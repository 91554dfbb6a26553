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

from ilm_jax import console, paths
from ilm_jax.configs import default
from ilm_jax.configs.list import FOLDER, NAMES
from ilm_jax.types import UserError


def define(values: flags.FlagValues) -> None:
  """Define the flags of training and evaluation, except --config."""
  flags.DEFINE_string('workdir', None, 'Folder of the run; by default runs/CONFIG-VARIANT.', flag_values=values)
  flags.DEFINE_enum('mode', 'train', ('train', 'eval'), 'Train (or resume), or evaluate a run on the test split.',
                    flag_values=values)  # fmt: skip
  console.define_processes(values)


def command(doc: str, define, run, argv=None) -> int:
  """Run a command that takes --config and the flags that `define` adds; see `console.command`."""
  argv = sys.argv if argv is None else argv

  def define_all(values):
    text = 'Config file or packaged config, with a variant, such as star:tiny.'
    config_flags.DEFINE_config_file('config', None, text, flag_values=values, sys_argv=argv)
    define(values)

  return console.command(doc, define_all, run, argv, parse=parse)


def parse(values: flags.FlagValues, argv) -> list[str]:
  """Parse the arguments of a command with --config; return those that are not flags."""
  unset = re.compile(rf'--?config\.({"|".join(map(re.escape, default.optional_settings()))})=None')
  given = join_none(argv)
  argv = locate_config(word for word in given if not unset.fullmatch(word))
  sys.modules.pop('config_config', None)  # else the functions of a config file loaded earlier would stay defined
  try:
    rest = values(argv)
    if values.config is None:
      raise UserError('--config is missing: expected a config, such as star:tiny; `ilm-jax configs` lists all')
    for match in filter(None, map(unset.fullmatch, given)):
      section, _, name = match[1].partition('.')
      values.config[section][name] = None
  except UserError:
    raise
  except (AttributeError, KeyError) as error:
    raise UserError(unknown_setting(plain(error), argv)) from error
  except Exception as error:  # a config file is code, and may raise anything
    if match := re.match(r'flag (--config\.[\w.]+=None): ', plain(error)):
      raise UserError(f'flags: {match[1]}: this setting cannot be None') from error
    raise UserError(f'flags: {plain(error)}') from error
  return rest[1:]


def join_none(argv) -> list[str]:
  """Return the arguments, with `--config.SETTING None` written as one word, `--config.SETTING=None`."""
  words = []
  for word in argv:
    if word == 'None' and words and re.fullmatch(r'--?config\.[\w.]+', words[-1]):
      words[-1] += '=None'
    else:
      words.append(word)
  return words


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
    if '://' in value:
      raise UserError(f'--config={value}: a config cannot be read from a URL: expected a local path')
    path, colon, variant = value.partition(':')
    file = os.path.expanduser(path)  # a shell does not expand the ~ in --config=~/file.py
    if not os.path.isfile(file) and path in NAMES:
      file = FOLDER / f'{path}.py'
    elif not os.path.isfile(file):
      raise UserError(
        f'--config={value}: there is no file {path} in {os.getcwd()}, and no packaged config of this name: expected a '
        f'path, or one of {", ".join(sorted(NAMES))}'
      )
    argv[index] = f'{"--config=" if equals else ""}{file}{colon}{variant}'
  return argv


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


def default_workdir(values: flags.FlagValues) -> str:
  """Return the default --workdir: `runs/star-tiny` for --config=star:tiny and for --config=configs/star.py:tiny."""
  name, _, variant = config_flags.get_config_filename(values['config']).partition(':')
  return str(Path('runs') / '-'.join(part for part in (Path(name).stem, variant) if part))


def run(values: flags.FlagValues) -> int:
  """Train or evaluate, as --mode says; return the exit code."""
  console.quiet()
  from ilm_jax.distributed import processes
  from ilm_jax.training import loop

  cfg, workdir = values.config, os.fspath(paths.resolve(values.workdir or default_workdir(values), '--workdir'))
  given = (values[name].value for name in processes.FLAGS)
  processes.start(*given, saving=values.mode == 'train', **cfg.get('distributed', {}))
  call = {'train': loop.train, 'eval': loop.evaluate_run}[values.mode]
  return processes.end_together(lambda: call(cfg, workdir))


def main(argv=None) -> int:
  """Run `ilm-jax train` or `ilm-jax eval`; return the exit code."""
  return command(__doc__, define, run, argv)


if __name__ == '__main__':
  sys.exit(main())
