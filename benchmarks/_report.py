"""Code shared by the benchmarks: command-line flags, random weights, printed tables, and counting compilations."""

import argparse
import json
import math
import os
import pathlib
import platform
import statistics
import sys

import jax

from ilm_jax import console
from ilm_jax.models import transformer
from ilm_jax.runs import run_file
from ilm_jax.types import UserError

ROOT = pathlib.Path(__file__).resolve().parent.parent
SIZES = {**transformer.PRESETS, 'toy': dict(num_layers=1, num_heads=2, d_model=16, d_ff=32)}
LM1B_VOCABULARY = 30_522


def run(main) -> int:
  """Run the `main` of a benchmark; return its exit code, 1 after an error in one line (see `ilm_jax.console.guard`)."""

  def call() -> int:
    try:
      return main()
    except SystemExit as stop:  # from argparse, after --help or a wrong flag
      return stop.code

  return console.guard(call)


# --- flags ------------------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
  """An argument parser that rejects abbreviated flags, and exits with code 1 and one line for an error.

  `doc` is the docstring of the benchmark, which --help shows.
  """

  def __init__(self, doc: str):
    super().__init__(description=doc, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)

  def error(self, message):
    self.exit(1, f'error: flags: {message} (see --help)\n')

  def add_common_flags(self, *, size: str | None = None) -> None:
    """Add --size (with default `size`; None: depending on the device), --compute, --vocab and --json."""
    default = size or 'xtiny2 on a CPU, small on other devices'
    self.add_argument('--size', choices=list(SIZES), default=size, help=f'model size (default: {default})')
    self.add_argument(
      '--compute',
      choices=transformer.CHOICES['compute'],
      default='mixed',
      help='precision of matrix products (default: mixed)',
    )
    self.add_argument('--vocab', type=positive, default=LM1B_VOCABULARY, help='vocabulary size (default: %(default)s)')
    self.add_argument('--json', metavar='FILE', help='write all measurements to this file')


def subset_of(names):
  """Return an argparse type for a comma-separated list of some of `names`."""

  def parse(text: str) -> list[str]:
    chosen = text.split(',')
    for name in chosen:
      if name not in names:
        raise argparse.ArgumentTypeError(f'{name!r} is unknown: expected a comma-separated list of {",".join(names)}')
    return chosen

  return parse


def positive(text: str) -> int:
  """Parse a positive integer; an argparse type."""
  if not text.isdecimal() or int(text) < 1:
    raise argparse.ArgumentTypeError(f'{text!r}: expected an integer of at least 1')
  return int(text)


def positives(text: str) -> list[int]:
  """Parse a comma-separated list of positive integers; an argparse type."""
  return [positive(part) for part in text.split(',')]


def counts(text: str) -> list[int]:
  """Parse a comma-separated list of non-negative integers; an argparse type."""
  if not all(part.isdecimal() for part in text.split(',')):
    raise argparse.ArgumentTypeError(f'{text!r}: expected comma-separated integers of at least 0')
  return [int(part) for part in text.split(',')]


def fraction(text: str) -> float:
  """Parse a number between 0 and 1; an argparse type."""
  if not 0 <= float(text) <= 1:
    raise argparse.ArgumentTypeError(f'{text!r}: expected a number between 0 and 1')
  return float(text)


def seconds(text: str) -> float:
  """Parse a finite number of seconds; an argparse type."""
  if not 0 <= float(text) < math.inf:
    raise argparse.ArgumentTypeError(f'{text!r}: expected a finite number of at least 0')
  return float(text)


# --- the model --------------------------------------------------------------------------------------------------------


def model_of(args) -> transformer.ModelConfig:
  """Return the ModelConfig given by --size, --compute and --vocab; sets args.size to its default if it is None."""
  args.size = args.size or ('xtiny2' if jax.default_backend() == 'cpu' else 'small')
  return transformer.ModelConfig.create(args.vocab, **SIZES[args.size], compute=args.compute)


def random_params(model_cfg):
  """Return randomly initialized parameters of a model."""
  return jax.jit(lambda: transformer.unbox(transformer.init(model_cfg, jax.random.key(0))))()


# --- output -----------------------------------------------------------------------------------------------------------


def progress(text: str) -> None:
  """Print a progress line to standard error."""
  print(text, file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
  """Format a duration: `48 s`, `3.2 min`."""
  return f'{seconds:.0f} s' if seconds < 100 else f'{seconds / 60:.1f} min'


def machine() -> str:
  """Describe the device, the processor, the jax version and the commit in one line. Starts the jax backend."""
  device = jax.devices()[0]
  name = device.device_kind if device.platform != 'cpu' else processor()
  return f'1 x {name} ({device.platform}), {os.cpu_count()} CPUs; jax {jax.__version__}; commit {run_file.commit()}'


def processor() -> str:
  """Return the model name of the CPU."""
  info = pathlib.Path('/proc/cpuinfo')
  lines = info.read_text().splitlines() if info.exists() else []
  names = [line.split(':', 1)[1].strip() for line in lines if line.startswith('model name')]
  return names[0] if names else platform.processor() or platform.machine()


def number(x: float, digits: int = 3) -> str:
  """Format a number with `digits` significant digits, but with all of its integer digits: `0.0123`, `12,345`."""
  return f'{x:,.0f}' if abs(x) >= 10 ** (digits - 1) else f'{x:.{digits}g}'


def median_of(values, digits: int = 3) -> str:
  """Format repeated measurements as `median (minimum - maximum)`."""
  return '{} ({} - {})'.format(*(number(x, digits) for x in (statistics.median(values), min(values), max(values))))


def table(rows: list[dict[str, str]]) -> str:
  """Format rows as aligned columns, with the keys as a header and a blank line where the first column changes."""
  names = list(rows[0])
  widths = [max(len(name), *(len(row[name]) for row in rows)) for name in names]
  numeric = [any(row[name][:1].isdigit() for row in rows) for name in names]

  def line(cells):
    aligned = (c.rjust(w) if right else c.ljust(w) for c, w, right in zip(cells, widths, numeric, strict=True))
    return '  '.join(aligned).rstrip()

  lines, previous = [line(names)], rows[0][names[0]]
  for row in rows:
    lines += [''] * (row[names[0]] != previous) + [line(row.values())]
    previous = row[names[0]]
  return '\n'.join(lines)


def write_json(path: str, **measurements) -> None:
  """Write measurements to a JSON file; raise UserError if it cannot be written."""
  try:
    with open(os.path.expanduser(path), 'w') as file:
      json.dump(measurements, file, indent=2)
      file.write('\n')
  except OSError as error:
    raise UserError(f'--json={path} cannot be written: {error.strerror or error}') from None


# --- compilations -----------------------------------------------------------------------------------------------------


class Compilations:
  """Counts the programs that jax compiles, or loads from its compilation cache, after this object is created."""

  def __init__(self):
    self.count = 0
    jax.monitoring.register_event_duration_secs_listener(self._record)

  def _record(self, event: str, seconds: float, **_):
    self.count += event == '/jax/core/compile/backend_compile_duration'
