"""Code shared by all commands: flags, one-line errors, exit codes, log format and the compilation cache."""

import os
import sys
import warnings

from absl import flags, logging

from ilm_jax.types import UserError

HERE = os.path.dirname(os.path.abspath(__file__)) + os.sep


def fail(message) -> int:
  """Print an error as one line on standard error; returns the exit code: the `code` of a UserError, else 1."""
  print('error: ' + ' '.join(str(message).split()), file=sys.stderr)
  return message.code if isinstance(message, UserError) else 1


def wants_help(argv) -> bool:
  """Return whether the arguments ask for help."""
  return not {'-h', '-help', '--help', '--helpfull'}.isdisjoint(argv[1:])


def parse_flags(values: flags.FlagValues, argv) -> list[str]:
  """Parse the arguments of a command; return those that are not flags."""
  try:
    return values(argv)[1:]
  except flags.Error as error:
    raise UserError(f'flags: {error}') from None


def command(doc: str, define, run, argv=None, *, positional: bool = False, parse=parse_flags) -> int:
  """Run a command; a user's mistake (UserError) gives one line on standard error and exit code 1.

  `--help` prints `doc` and the flags that `define` adds to the FlagValues given to it. `run` maps the parsed flags to
  the exit code. With `positional`, it also gets the list of arguments that are not flags, which are otherwise refused.
  """
  values, argv = flags.FlagValues(), sys.argv if argv is None else argv
  define(values)
  if wants_help(argv):
    own = [f'  --{name}: {values[name].help}' for name in values if name not in ('flagfile', 'undefok')]
    print('\n'.join([doc.strip(), '', *own]))
    return 0
  try:
    rest = parse(values, argv)
    if rest and not positional:
      raise UserError(f'flags: unexpected argument {rest[0]!r}: every argument must have the form --name=value')
    return run(values, rest) if positional else run(values)
  except UserError as error:
    return fail(error)
  except BrokenPipeError:
    return 1
  except KeyboardInterrupt:
    return 130


def define_processes(values: flags.FlagValues) -> None:
  """Define the flags of a command that several processes can run together."""
  flags.DEFINE_string('coordinator', None, 'With several processes: HOST:PORT of process 0.', flag_values=values)
  flags.DEFINE_integer('num_processes', None, 'With --coordinator: the number of processes.', flag_values=values)
  flags.DEFINE_integer('process_id', None, 'With --coordinator: index of this process, from 0.', flag_values=values)


def quiet() -> None:
  """Log only relevant messages, in a short format, and enable JAX's persistent compilation cache."""
  import jax

  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()  # absl prints a warning when it logs before the flags are parsed
  logging.set_verbosity(logging.INFO)
  logging.use_absl_handler()
  logging.get_absl_handler().setFormatter(ShortFormatter())
  logging.get_absl_handler().addFilter(is_relevant)
  sys.unraisablehook = print_unraisable
  # Orbax never awaits the coroutines of a failed write, but raises the failure itself.
  warnings.filterwarnings('ignore', "coroutine '.*' was never awaited")
  if (cache := os.environ.get('JAX_COMPILATION_CACHE_DIR')) is None:
    cache = os.path.join(os.environ.get('XDG_CACHE_HOME', os.path.expanduser('~/.cache')), 'ilm_jax', 'xla')
  if cache:
    jax.config.update('jax_compilation_cache_dir', cache)
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)


def is_relevant(record) -> bool:
  """Return whether a log record is printed: those of this project, CLU's progress reports, and libraries' warnings.

  Errors that Orbax and asyncio log are dropped, because they are also raised and then printed as one line.
  """
  if record.pathname.startswith(HERE) or 'Setting work unit notes' in str(record.msg):
    return True
  if record.name == 'asyncio':
    return False
  return record.levelno == 30 or (record.levelno > 30 and f'{os.sep}orbax{os.sep}' not in record.pathname)


def print_unraisable(event) -> None:
  """Print an unraisable exception, unless it follows from a failed read or write of a checkpoint.

  TensorStore's threads and Orbax's coroutines cause such exceptions; the failure itself is raised and printed.
  """
  code = getattr(event.object, 'cr_code', None)  # set if the object is a coroutine
  if str(event.exc_value) != 'Event loop is closed' and not (code and f'{os.sep}orbax{os.sep}' in code.co_filename):
    sys.__unraisablehook__(event)


class ShortFormatter(logging.PythonFormatter):
  """Formats a log record as time and message; warnings and errors also show their level."""

  def format(self, record):
    stamp = self.formatTime(record, '%H:%M:%S')
    level = '' if record.levelno <= 20 else record.levelname.lower() + ': '
    return f'{stamp} {level}{record.getMessage().removeprefix("Setting work unit notes: ")}'
