"""What the benchmarks share: flags that fail in one line, the machine, the table, the count of compilations."""

import argparse
import json
import os
import pathlib
import platform
import statistics
import sys

import jax

from ilm_jax.models import transformer
from ilm_jax.runs import run_file

ROOT = pathlib.Path(__file__).resolve().parent.parent
SIZES = {**transformer.PRESETS, 'toy': dict(num_layers=1, num_heads=2, d_model=16, d_ff=32)}
COMPUTE = transformer.CHOICES['compute']
LM1B_VOCABULARY = 30_522


# --- flags ------------------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
  """A parser that says in one line what is wrong with a flag, and takes no abbreviations."""

  def __init__(self, doc: str):
    first, _, rest = doc.partition('\n')
    layout = argparse.RawDescriptionHelpFormatter
    super().__init__(description=f'{first}\n{rest}', allow_abbrev=False, formatter_class=layout)

  def error(self, message):
    self.exit(1, f'error: flags: {message} (--help lists them)\n')


def some_of(names):
  """A flag's type: some of `names`, separated by commas."""

  def parse(text: str) -> list[str]:
    chosen = text.split(',')
    for name in chosen:
      if name not in names:
        raise argparse.ArgumentTypeError(f'{name!r} is unknown: expected some of {",".join(names)}')
    return chosen

  return parse


def positive(text: str) -> int:
  """A flag's type: an integer of at least 1."""
  if not text.isdecimal() or int(text) < 1:
    raise argparse.ArgumentTypeError(f'{text!r}: expected an integer of at least 1')
  return int(text)


def counts(text: str) -> list[int]:
  """A flag's type: integers from 0, separated by commas."""
  if not all(part.isdecimal() for part in text.split(',')):
    raise argparse.ArgumentTypeError(f'{text!r}: expected numbers with commas between them')
  return [int(part) for part in text.split(',')]


def positives(text: str) -> list[int]:
  """A flag's type: integers of at least 1, separated by commas."""
  return [positive(part) for part in text.split(',')]


# --- what is printed --------------------------------------------------------------------------------------------------


def note(text: str) -> None:
  """A line of progress, on standard error."""
  print(text, file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
  """`48 s`, `3.2 min`."""
  return f'{seconds:.0f} s' if seconds < 100 else f'{seconds / 60:.1f} min'


def machine() -> str:
  """Device, processor, versions and commit, in one line. Starts the backend."""
  device = jax.devices()[0]
  name = device.device_kind if device.platform != 'cpu' else processor()
  return f'1 x {name} ({device.platform}), {os.cpu_count()} CPUs; jax {jax.__version__}; commit {run_file.commit()}'


def processor() -> str:
  """The processor's name."""
  info = pathlib.Path('/proc/cpuinfo')
  lines = info.read_text().splitlines() if info.exists() else []
  names = [line.split(':', 1)[1].strip() for line in lines if line.startswith('model name')]
  return names[0] if names else platform.processor() or platform.machine()


def number(x: float, digits: int = 3) -> str:
  """So many significant digits, but every digit before the point: `0.0123`, `12,345`."""
  return f'{x:,.0f}' if abs(x) >= 10 ** (digits - 1) else f'{x:.{digits}g}'


def median_of(values, digits: int = 3) -> str:
  """The median and, in parentheses, the least and the largest."""
  return '{} ({} - {})'.format(*(number(x, digits) for x in (statistics.median(values), min(values), max(values))))


def table(rows: list[dict[str, str]]) -> str:
  """Aligned columns under their names (the keys of the first row); a blank line where the first column changes."""
  names = list(rows[0])
  widths = [max(len(name), *(len(row[name]) for row in rows)) for name in names]
  numeric = [any(row[name][:1].isdigit() for row in rows) for name in names]

  def line(cells):
    aligned = (c.rjust(w) if right else c.ljust(w) for c, w, right in zip(cells, widths, numeric, strict=True))
    return '  '.join(aligned).rstrip()

  lines, before = [line(names)], rows[0][names[0]]
  for row in rows:
    lines += [''] * (row[names[0]] != before) + [line(row.values())]
    before = row[names[0]]
  return '\n'.join(lines)


def write_json(path: str, **parts) -> None:
  """Write what was measured."""
  with open(path, 'w') as file:
    json.dump(parts, file, indent=2)
    file.write('\n')


# --- compilations -----------------------------------------------------------------------------------------------------


class Compilations:
  """Counts the programs that jax compiles (or reads from its cache) from now on."""

  def __init__(self):
    self.count = 0
    jax.monitoring.register_event_duration_secs_listener(self._hear)

  def _hear(self, event: str, seconds: float, **_):
    self.count += event == '/jax/core/compile/backend_compile_duration'
