"""Code shared by all commands: flags, one-line errors, exit codes, log format and the compilation cache."""

import contextlib
import errno
import io
import os
import sys
import warnings

from absl import flags, logging

from ilm_jax.types import SEED_LIMIT, UserError

HERE = os.path.dirname(os.path.abspath(__file__)) + os.sep
BROKEN_PIPE = 141  # exit code if the reader of standard output closed the pipe: 128 + SIGPIPE, as in shells


def fail(message) -> int:
  """Print an error as one line on standard error; return its exit code: the `code` of a UserError, else 1."""
  code = message.code if isinstance(message, UserError) else 1
  if code != BROKEN_PIPE:  # a reader that closes the pipe early, such as `head`, expects no message
    with contextlib.suppress(OSError):
      print('error: ' + ' '.join(str(message).split()), file=sys.stderr)
  return code


class OutputLost(UserError):
  """Raised if standard output cannot be written."""

  def __init__(self, error: OSError):
    super().__init__(f'standard output cannot be written, so a part of the output is lost: {error.strerror or error}')
    self.code = BROKEN_PIPE if isinstance(error, BrokenPipeError) else 1


class Closed(io.TextIOBase):
  """Standard output that was closed when Python started: printing raises OSError."""

  def __init__(self):
    self.unused = open(os.devnull, 'w')  # noqa: SIM115 - no other file may get the file descriptor 1

  def write(self, text):
    raise OSError(errno.EBADF, 'it is closed')


class Output:
  """Wrapper of standard output whose failed writes raise OutputLost, to tell them from the OSErrors of other files."""

  def __init__(self, stream):
    self.stream = stream

  def __getattr__(self, name):
    function = getattr(self.stream, name)
    if name not in ('write', 'writelines', 'flush'):
      return function

    def attempt(*arguments):
      try:
        return function(*arguments)
      except OSError as error:
        with contextlib.suppress(OSError):  # redirect to devnull, else Python's flush at exit prints a traceback
          os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
        raise OutputLost(error) from error

    return attempt


def exit_code(call) -> int:
  """Return the exit code of call(), 0 if it returns None; report an expected error in one line and return its code.

  Expected are mistakes of the user, an unwritable standard output, Ctrl-C, and devices that JAX cannot use.
  """
  try:
    return call() or 0
  except UserError as error:
    return fail(error)
  except KeyboardInterrupt:
    return 130
  except Exception:
    if not (problem := device_problem()):
      raise
    return fail(problem)


def guard(call) -> int:
  """Run a whole command and return its exit code (see `exit_code`), which is not 0 if any standard output was lost."""
  # Python sets sys.stdin, sys.stdout and sys.stderr to None if they are closed when the process starts.
  sys.stdin = sys.stdin or open(os.devnull)  # noqa: SIM115
  sys.stderr = sys.stderr or open(os.devnull, 'w')  # noqa: SIM115
  if sys.stdout is None:
    sys.stdout = Closed()
  if hasattr(sys.stdout, 'reconfigure'):
    sys.stdout.reconfigure(errors='backslashreplace')  # escape characters that its encoding lacks
  sys.stdout = Output(stream := sys.stdout)
  try:
    code, lost = exit_code(call), exit_code(sys.stdout.flush)
  finally:
    sys.stdout = stream
  return code or lost


def device_problem() -> str | None:
  """Return an error message if JAX_PLATFORMS is set and JAX cannot use the devices that it names; otherwise None."""
  if (wanted := os.environ.get('JAX_PLATFORMS')) and (jax := sys.modules.get('jax')):
    try:
      jax.devices()
    except Exception as error:  # of any type, but only a RuntimeError has a helpful message
      reason = str(error).partition(' (set JAX_PLATFORMS')[0] if isinstance(error, RuntimeError) else 'not found'
      return (f'JAX_PLATFORMS={wanted}: JAX cannot use this device ({reason}): expected cpu, or cuda or tpu with its '
              'package installed')  # fmt: skip
  return None


def wants_help(argv) -> bool:
  """Return whether the arguments contain a help flag, such as --help."""
  return not {'-h', '-help', '--help', '--helpfull'}.isdisjoint(argv[1:])


def parse_flags(values: flags.FlagValues, argv) -> list[str]:
  """Parse the arguments of a command; return those that are not flags."""
  try:
    return values(argv)[1:]
  except flags.Error as error:
    raise UserError(f'flags: {error}') from None


def command(doc: str | None, define, run, argv=None, *, positional: bool = False, parse=parse_flags) -> int:
  """Run a command and return its exit code; see `guard` for how it handles errors.

  `--help` prints `doc` and the flags that `define` adds to the FlagValues given to it. `run` maps the parsed flags to
  the exit code. With `positional`, it also gets the list of arguments that are not flags, which are otherwise refused.
  """

  def call() -> int:
    values, words = flags.FlagValues(), sys.argv if argv is None else argv
    define(values)
    if wants_help(words):
      own = [f'  --{name}: {values[name].help}' for name in values if name not in ('flagfile', 'undefok')]
      print('\n'.join([(doc or 'The description is missing, because python -OO removes it.').strip(), '', *own]))
      return 0
    rest = parse(values, words)
    if rest and not positional:
      raise UserError(f'flags: unexpected argument {rest[0]!r}: every argument must have the form --name=value')
    return run(values, rest) if positional else run(values)

  return guard(call)


def define_seed(values: flags.FlagValues, text: str = 'Random seed of sampling.') -> None:
  """Define the flag --seed."""
  flags.DEFINE_integer('seed', 0, text, lower_bound=0, upper_bound=SEED_LIMIT - 1, flag_values=values)


def define_processes(values: flags.FlagValues) -> None:
  """Define the flags with which several processes run a command together, such as --coordinator."""
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
  # After a failed write, Orbax leaves coroutines that were never awaited; the error itself is raised anyway.
  warnings.filterwarnings('ignore', "coroutine '.*' was never awaited")
  if cache := compilation_cache():
    jax.config.update('jax_compilation_cache_dir', cache)
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)


def compilation_cache() -> str:
  """Return the folder of JAX's persistent compilation cache; '' if it is switched off or there is no home folder."""
  if (folder := os.environ.get('JAX_COMPILATION_CACHE_DIR')) is not None:
    return folder
  homes = os.environ.get('XDG_CACHE_HOME', ''), os.path.expanduser('~/.cache')  # ~ stays if there is no home folder
  return next((os.path.join(home, 'ilm_jax', 'xla') for home in homes if os.path.isabs(home)), '')


def is_relevant(record) -> bool:
  """Return whether to print a log record: one of this package, a progress report of CLU, or a warning of a library.

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
