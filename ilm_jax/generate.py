"""Prompts to answers: `python -m ilm_jax.generate --workdir=runs/star-tiny --prompt=... | --prompts=FILE` as JSONL.

Without either flag, prompts are read from standard input, one a line; JSON lines may hold {"prompt": ..., "id": ...}.
"""

import contextlib
import json
import sys
from pathlib import Path

from absl import flags

from ilm_jax.console import fail, quiet, usage, wants_help
from ilm_jax.types import UserError


def define(values: flags.FlagValues) -> None:
  """Define this command's flags."""
  flags.DEFINE_string('workdir', None, 'Folder of the run whose model to use.', flag_values=values)
  flags.DEFINE_multi_string('prompt', [], 'A prompt; may be repeated.', flag_values=values)
  flags.DEFINE_string('prompts', None, 'File of prompts, one a line (text, or JSON with "prompt").', flag_values=values)
  flags.DEFINE_string('out', None, 'File to write; standard output by default.', flag_values=values)
  flags.DEFINE_string('checkpoint', 'best', "'best', 'latest' or a step.", flag_values=values)
  flags.DEFINE_integer('seed', 0, 'Seed of the randomness.', flag_values=values)
  flags.DEFINE_integer('batch_size', 64, 'Prompts at a time.', lower_bound=1, flag_values=values)
  flags.DEFINE_float('stop_threshold', None, "Stop when p(stop) reaches it; 0: sampled; the run's own by default.",
                     lower_bound=0.0, upper_bound=1.0, flag_values=values)  # fmt: skip


def read_prompts(values) -> list[tuple[str, int]]:
  """The prompts with their ids (the line's number, from 0, unless JSON gives one)."""
  if values.prompt and values.prompts:
    raise UserError('--prompt and --prompts: expected one of them, got both')
  if values.prompt:
    return [(text, i) for i, text in enumerate(values.prompt)]
  name = values.prompts or 'standard input'
  try:
    lines = (Path(values.prompts).read_text('utf-8') if values.prompts else sys.stdin.read()).split('\n')
  except OSError as error:
    raise UserError(f'--prompts={name}: {error.strerror}') from None
  except UnicodeDecodeError as error:
    raise UserError(f'{name} is not UTF-8: byte {error.start} is {error.object[error.start]:#04x}') from None
  out = []
  for number, line in enumerate(lines):
    if not line.strip():
      continue
    text, index = line.strip(), number
    if text.startswith('{'):
      try:
        record = json.loads(text)
        text, index = record['prompt'], int(record.get('id', number))
        if not isinstance(text, str) or not 0 <= index < 2**31:
          raise ValueError
      except (ValueError, KeyError, TypeError):
        raise UserError(
          f'{name}, line {number + 1}: expected JSON with "prompt", a text, and perhaps "id", a number from 0, '
          f'got {line.strip()[:80]}'
        ) from None
    out.append((text, index))
  if not out:
    raise UserError(f'{name} holds no prompt: expected one a line')
  return out


def run(values) -> int:
  """Load, answer, write."""
  if not values.workdir:
    raise UserError('--workdir is missing: expected the folder of a run, such as --workdir=runs/star-tiny')
  prompts = read_prompts(values)
  quiet()
  from ilm_jax import api

  settings = {} if values.stop_threshold is None else {'stop_threshold': values.stop_threshold}
  lm = api.load(values.workdir, values.checkpoint, batch_size=values.batch_size, **settings)
  texts, ids = [text for text, _ in prompts], [index for _, index in prompts]
  for number, text in enumerate(texts):
    lm.encode(text, number)  # a prompt that can't be served is said before the first answer is written
  with contextlib.ExitStack() as stack:
    try:
      out = stack.enter_context(open(values.out, 'w', encoding='utf-8')) if values.out else sys.stdout
    except OSError as error:
      raise UserError(f'--out={values.out}: {error.strerror}') from None
    for text, index, answer in zip(texts, ids, lm.stream(texts, seed=values.seed, ids=ids), strict=True):
      line = json.dumps({'id': index, 'prompt': text, **answer._asdict()})
      try:
        print(line, file=out, flush=True)
      except BrokenPipeError:
        raise
      except OSError as error:
        raise UserError(
          f'the answers could not be written to {values.out or "standard output"} ({error.strerror or error})'
        ) from None
  return 0


def main(argv=None) -> int:
  """Run the command; a user's mistake is one line on standard error and exit code 1."""
  values = flags.FlagValues()
  define(values)
  argv = sys.argv if argv is None else argv
  if wants_help(argv):
    return usage(__doc__, values, [name for name in values if name not in ('flagfile', 'undefok')])
  try:
    try:
      rest = values(argv, known_only=False)
    except flags.Error as error:
      raise UserError(f'flags: {error}') from None
    if len(rest) > 1:
      raise UserError(f'flags: did not understand {rest[1]!r}: every argument is a flag, --name=value')
    return run(values)
  except UserError as error:
    return fail(error)
  except BrokenPipeError:
    return 1
  except KeyboardInterrupt:
    return 130


if __name__ == '__main__':
  sys.exit(main())
