"""What the commands share on a terminal: one-line errors, short log lines, a compilation cache that lasts."""

import os
import sys
import warnings

from absl import flags, logging

from ilm_jax.types import UserError

HERE = os.path.dirname(os.path.abspath(__file__)) + os.sep


def fail(message) -> int:
  """Print one line of what is wrong; returns the exit code, that of a UserError, or 1."""
  print('error: ' + ' '.join(str(message).split()), file=sys.stderr)
  return message.code if isinstance(message, UserError) else 1


def wants_help(argv) -> bool:
  """Was --help asked for?"""
  return not {'-h', '-help', '--help', '--helpfull'}.isdisjoint(argv[1:])


def usage(doc: str, values: flags.FlagValues, names) -> int:
  """Print what a command does, and its flags."""
  print(doc.strip() + '\n')
  for name in names:
    print(f'  --{name}: {values[name].help}')
  return 0


def command(doc: str, define, run, argv=None, *, positional: bool = False) -> int:
  """Run a command with flags of its own; a user's mistake is one line on standard error and exit code 1.

  Args:
    doc: what --help prints before the flags.
    define: defines them, in the FlagValues it is given.
    run: values -> exit code; raises UserError for a mistake.
    argv: the arguments, sys.argv by default.
    positional: there may be arguments that are no flags, and they are the second argument of `run`.
  """
  values = flags.FlagValues()
  define(values)
  argv = sys.argv if argv is None else argv
  if wants_help(argv):
    return usage(doc, values, [name for name in values if name not in ('flagfile', 'undefok')])
  try:
    try:
      _, *rest = values(argv, known_only=False)
    except flags.Error as error:
      raise UserError(f'flags: {error}') from None
    if rest and not positional:
      raise UserError(f'flags: did not understand {rest[0]!r}: every argument is a flag, --name=value')
    return run(values, rest) if positional else run(values)
  except UserError as error:
    return fail(error)
  except BrokenPipeError:
    return 1
  except KeyboardInterrupt:
    return 130


def define_hosts(values: flags.FlagValues) -> None:
  """Define the flags of a command that several hosts may share."""
  flags.DEFINE_string('coordinator', None, 'HOST:PORT of the first of several hosts.', flag_values=values)
  flags.DEFINE_integer('num_processes', None, 'With --coordinator: how many there are.', flag_values=values)
  flags.DEFINE_integer('process_id', None, 'With --coordinator: which one this is, from 0.', flag_values=values)


def quiet() -> None:
  """Short log lines from this project alone, and a compilation cache that lasts."""
  import jax

  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()  # absl logs to standard error before that, and says so
  logging.set_verbosity(logging.INFO)
  logging.use_absl_handler()
  logging.get_absl_handler().setFormatter(Plain())
  logging.get_absl_handler().addFilter(ours_or_worse)
  sys.unraisablehook = unraisable
  warnings.filterwarnings('ignore', "coroutine '.*' was never awaited")  # parts of a write whose failure is raised
  if (cache := os.environ.get('JAX_COMPILATION_CACHE_DIR')) is None:
    cache = os.path.join(os.environ.get('XDG_CACHE_HOME', os.path.expanduser('~/.cache')), 'ilm_jax', 'xla')
  if cache:
    jax.config.update('jax_compilation_cache_dir', cache)
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)


def ours_or_worse(record) -> bool:
  """Libraries may warn, but only this project and CLU's progress report inform; what Orbax raises, we say ourselves."""
  if record.pathname.startswith(HERE) or 'Setting work unit notes' in str(record.msg):
    return True
  if record.name == 'asyncio':  # "exception was never retrieved", of a write that failed: its cause is raised
    return False
  return record.levelno == 30 or (record.levelno > 30 and f'{os.sep}orbax{os.sep}' not in record.pathname)


def unraisable(event) -> None:
  """Print what could not be raised, but what TensorStore's threads say when a write fails: its cause is raised."""
  if str(event.exc_value) != 'Event loop is closed':
    sys.__unraisablehook__(event)


class Plain(logging.PythonFormatter):
  """Time and message; the level where it is a warning or worse."""

  def format(self, record):
    stamp = self.formatTime(record, '%H:%M:%S')
    level = '' if record.levelno <= 20 else record.levelname.lower() + ': '
    return f'{stamp} {level}{record.getMessage().removeprefix("Setting work unit notes: ")}'
