"""Prompts to answers, gaps to fillings, as JSONL.

    python -m ilm_jax.generate --workdir=runs/star-tiny --prompt='5,9|9,2/5,2'
    python -m ilm_jax.generate --workdir=runs/stories --infill='Tom had a ___ . He was ___ .' --n=3 --trace=trace.html
    python -m ilm_jax.generate --workdir=runs/stories --prompts=requests.jsonl > answers.jsonl

Without a flag, requests are read from standard input, one a line: a prompt, or JSON with "prompt" (a text; an empty one
asks for a whole text) or "infill" (a text with markers, or the list of its parts), and perhaps "id", "least" and "most"
(tokens of a gap; a number, or a list of one a gap). All lines of a *.jsonl are JSON. Answers come as they finish; "id"
says whose they are (the number of the line, from 0, unless JSON gives one). A line that cannot be served is named, and
the others are served. The "truth" of a line with gaps, and its "fillings", come with its answer as "truth", {"text",
"fillings"}.

    python -m ilm_jax.generate --workdir=gs://... --prompts=requests.jsonl --out=answers.jsonl --mesh=data=-1

The answers are the same on any mesh and number of hosts. Each of several hosts, which are started with the same
command, writes its share: answers-00000-of-00002.jsonl, ...
"""

import contextlib
import itertools
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags
from etils import epath

from ilm_jax.console import command, define_processes, fail, quiet
from ilm_jax.runs import run_file
from ilm_jax.tasks.text import corpora
from ilm_jax.types import UserError

RULE = ('temperature', 'top_p')  # flags of the rule by which a token is drawn
SETTINGS = ('stop_threshold', 'stop_temperature', 'max_length', 'gaps', 'gap_threshold')  # of sampling, as the run's
SAME = ('workdir', 'checkpoint', 'seed', 'n', 'marker', 'batch_size', 'mesh', *SETTINGS, *RULE)  # on all hosts
KEYS = ('id', 'prompt', 'infill', 'least', 'most', 'truth', 'fillings')  # of a line of JSON


def define(values: flags.FlagValues) -> None:
  """Define this command's flags."""
  flags.DEFINE_string('workdir', None, 'Folder of the run whose model to use.', flag_values=values)
  flags.DEFINE_multi_string('prompt', [], 'A prompt; may be repeated.', flag_values=values)
  flags.DEFINE_multi_string('infill', [], 'A text with a marker at each gap; may be repeated.', flag_values=values)
  flags.DEFINE_string('prompts', None, 'File of requests, one a line: text, or JSON as above.', flag_values=values)
  flags.DEFINE_string('marker', '___', 'Of a gap.', flag_values=values)
  flags.DEFINE_integer('least', None, 'Tokens of a gap, at least; 1 by default.', lower_bound=0, flag_values=values)
  flags.DEFINE_integer('most', None, 'Tokens of a gap, at most.', lower_bound=0, flag_values=values)
  flags.DEFINE_integer('n', None, 'Answers to each request.', lower_bound=1, flag_values=values)
  flags.DEFINE_string('out', None, 'File to write; standard output by default.', flag_values=values)
  flags.DEFINE_string('trace', None, 'File for a page (HTML) that plays the insertions.', flag_values=values)
  flags.DEFINE_string('checkpoint', 'best', "'best', 'latest' or a step.", flag_values=values)
  flags.DEFINE_integer('seed', 0, 'Seed of the randomness.', flag_values=values)
  flags.DEFINE_integer('batch_size', 64, 'Slots: requests at a time.', lower_bound=1, flag_values=values)
  flags.DEFINE_string('mesh', None, 'Devices that share the work, such as data=-1 (all), or data=2,tensor=4; the first '
                      'device by default, or all of several hosts.', flag_values=values)  # fmt: skip
  flags.DEFINE_integer('max_length', None, "Tokens of a text; the run's own by default.", lower_bound=3,
                       flag_values=values)  # fmt: skip
  flags.DEFINE_integer('gaps', None, 'Insertions of a step, in the best gaps; 0: all; the run\'s own by default.',
                       lower_bound=0, flag_values=values)  # fmt: skip
  flags.DEFINE_float('stop_threshold', None, "Stop when p(stop) reaches it; 0: sampled; the run's own by default.",
                     lower_bound=0.0, upper_bound=1.0, flag_values=values)  # fmt: skip
  flags.DEFINE_float('stop_temperature', None, "Of p(stop); the run's own by default.", lower_bound=0.0,
                     flag_values=values)  # fmt: skip
  flags.DEFINE_float('gap_threshold', None, 'Insert only in gaps that are as probable as this share of the best one; '
                     "the run's own by default.", lower_bound=0.0, upper_bound=1.0, flag_values=values)  # fmt: skip
  flags.DEFINE_float('temperature', None, "Of tokens, 0: the most probable; the run's own by default.", lower_bound=0.0,
                     flag_values=values)  # fmt: skip
  flags.DEFINE_float('top_p', None, "Nucleus of tokens, 1: all; the run's own by default.", lower_bound=0.0,
                     upper_bound=1.0, flag_values=values)  # fmt: skip
  define_processes(values)


class Request(NamedTuple):
  """A prompt or a text with gaps, as it was given."""

  id: int
  kind: str  # prompt or infill
  content: Any
  where: str  # for messages
  limits: dict
  truth: dict | None = None  # 'text' and 'fillings': what was in the gaps


def read_requests(values) -> tuple[list[Request], list[UserError]]:
  """The requests, and what is wrong with the lines that hold none."""
  given = [name for name in ('prompt', 'infill', 'prompts') if values[name].value]
  if len(given) > 1:
    raise UserError(f'--{given[0]} and --{given[1]}: expected one of them, got both')
  limits = {name: values[name].value for name in ('least', 'most') if values[name].value is not None}
  if values.prompt or values.infill:
    kind = 'prompt' if values.prompt else 'infill'
    texts = values.prompt or values.infill
    return [Request(i, kind, text, f'--{kind} {i + 1}', limits) for i, text in enumerate(texts)], []
  name = values.prompts or 'standard input'
  try:
    content = epath.Path(values.prompts).read_bytes() if values.prompts else sys.stdin.buffer.read()
  except (OSError, ImportError) as error:  # epath needs a package for each kind of bucket
    raise UserError(f'--prompts={name}: {getattr(error, "strerror", None) or error}') from None
  lines, structured, start = content.split(b'\n'), name.endswith('.jsonl'), 0
  out, wrong, taken = [], [], {}
  for number, line in enumerate(lines):
    at, start = start, start + len(line) + 1
    if number == 0 and line.startswith(corpora.MARK):
      at, line = len(corpora.MARK), line[len(corpora.MARK) :]
    where = f'{name}, line {number + 1}'
    try:
      if text := corpora.decode(line, where, at).strip():
        request = read_line(text, number, where, limits, structured=structured)
        if request.id in taken:
          raise UserError(f'{request.where}: the id {request.id} is that of {taken[request.id]} already: give another')
        taken[request.id] = f'line {number + 1}'
        out.append(request)
    except UserError as error:
      wrong.append(error)
  if not out and not wrong:
    raise UserError(f'{name} holds no prompt: expected one a line')
  return out, wrong


def read_line(text: str, number: int, where: str, limits: dict, *, structured: bool = False) -> Request:
  """One request: JSON, or a text, unless all lines are JSON (`structured`)."""
  if not text.startswith('{') and not structured:
    return Request(number, 'prompt', text, where, limits)
  try:
    record = json.loads(text)
    if not isinstance(record, dict) or ('prompt' in record) == ('infill' in record):
      raise ValueError
    kind = 'infill' if 'infill' in record else 'prompt'
    content, index = record[kind], number if record.get('id') is None else record['id']
    parts = isinstance(content, list) and kind == 'infill' and all(isinstance(part, str) for part in content)
    if not (isinstance(content, str) or parts) or type(index) is not int or not 0 <= index < 2**31:
      raise ValueError
  except (ValueError, KeyError, TypeError, RecursionError):
    raise UserError(
      f'{where}: expected JSON with either "prompt", a text, or "infill", a text or the list of its parts, and perhaps '
      f'"id", a number from 0, got {text[:80]}'
    ) from None
  if odd := sorted(record.keys() - set(KEYS)):
    raise UserError(f'{where}: "{odd[0]}" means nothing here: expected of {", ".join(KEYS)}')
  if kind == 'prompt' and (record.get('least') is not None or record.get('most') is not None):
    raise UserError(f'{where}: "least" and "most" are of gaps: expected them with "infill"')
  own = {name: record[name] for name in ('least', 'most') if record.get(name) is not None}
  truth = {'text': record['truth'], 'fillings': record.get('fillings')} if 'truth' in record else None
  return Request(index, kind, content, where, limits | own, truth if kind == 'infill' else None)


def check_files(values, out: str | None = None) -> None:
  """Refuse to write over what is read or written (`out` instead of --out, if given), and a page that has no place."""
  named = {name: values[name].value for name in ('prompts', 'out', 'trace')} | ({'out': out} if out else {})
  paths = {name: Path(value).resolve() for name, value in named.items() if value}
  for one, other in itertools.combinations(paths, 2):
    if paths[one] == paths[other]:
      raise UserError(f'--{one} and --{other} are the same file, {paths[one]}: give another')
  if 'trace' in paths and not paths['trace'].parent.is_dir():
    raise UserError(f'--trace={values.trace}: there is no folder {paths["trace"].parent}')
  if values.prompt and (values.least is not None or values.most is not None):
    raise UserError('--least and --most are of gaps: expected them with --infill')


def run(values) -> int:
  """Load, answer, write; the exit code is 1 where a line could not be served."""
  if not values.workdir:
    raise UserError('--workdir is missing: expected the folder of a run, such as --workdir=runs/star-tiny')
  check_files(values)
  requests, wrong = read_requests(values)
  quiet()
  from ilm_jax.distributed import processes

  processes.start(values.coordinator, values.num_processes, values.process_id, saving=False)
  return processes.end_together(lambda: serve(values, requests, wrong))


def serve(values, requests: list[Request], wrong: list[UserError]) -> int:
  """Load, answer, write."""
  from ilm_jax.distributed import processes
  from ilm_jax.inference import api

  index, many = processes.which()
  if many > 1:
    if values.trace or not values.out:
      raise UserError(f'{many} hosts write a file each: expected --out, and no --trace')
    check_files(values, shard(values.out, index, many))
    processes.agree({**run_file.code(), 'requests': processes.digest(requests), **settled(values)})
  given = {name: values[name].value for name in SETTINGS}
  settings = {name: value for name, value in given.items() if value is not None}
  if drawn := {name: values[name].value for name in RULE if values[name].value is not None}:
    cfg = run_file.read_config(values.workdir)
    at_once = cfg['family'] == 'ilm' and not cfg['sampling'].get('two_stage', cfg['sampling'].get('joint') is None)
    name = 'joint' if at_once else 'token'
    settings[name] = drawn
    if drawn.get('top_p', 1.0) < 1 and not {**(cfg['sampling'].get(name) or {}), **drawn}.get('temperature', 1.0):
      raise UserError(f'--top_p={values.top_p} means nothing to the most probable token: give --temperature, too')
  mesh = values.mesh or ('data=-1' if many > 1 else None)
  lm = api.load(values.workdir, values.checkpoint, mesh=mesh, batch_size=values.batch_size, **settings)
  served = []  # (request, what the model is asked)
  for number, request in enumerate(requests):
    try:
      asked = request.content
      if request.kind == 'infill':
        asked = lm.gaps(asked, marker=values.marker, number=number, **request.limits)
      lm.encode(asked, number)
      served.append((request, asked))
    except UserError as error:
      said = str(error).removeprefix(f'prompt {number + 1}: ').removeprefix(f'text {number + 1}: ')
      wrong.append(error if request.where.startswith('--') else UserError(f'{request.where}: {said}'))
  if wrong and (not served or values.prompt or values.infill):
    raise wrong[0]  # before anything is written
  for error in wrong if index == 0 else ():
    fail(error)

  jobs = [(request, asked, j) for request, asked in served for j in range(values.n or 1)]
  ids = [api.request_number(request.id, j) for request, _, j in jobs]
  made, name = {}, shard(values.out, index, many)
  with contextlib.ExitStack() as stack:
    try:
      out = stack.enter_context(epath.Path(name).open('w')) if name else sys.stdout
    except (OSError, ImportError) as error:
      raise UserError(f'--out={name}: {getattr(error, "strerror", None) or error}') from None
    for job, answer in lm.stream([asked for _, asked, _ in jobs], seed=values.seed, ids=ids):
      if job % many != index:
        continue
      request, _, sample = jobs[job]
      number = {} if values.n is None else {'sample': sample}
      true = {} if request.truth is None else {'truth': request.truth}
      write({'id': request.id, **number, request.kind: request.content, **answer._asdict(), **true}, out, name)
      if values.trace:
        made[job] = answer
  if values.trace:
    try:
      Path(values.trace).write_text(lm.page([made[job] for job in sorted(made)]), encoding='utf-8')
    except OSError as error:
      raise UserError(f'--trace={values.trace}: {error.strerror}') from None
  return 1 if wrong else 0


def settled(values) -> dict:
  """The flags that must be the same on all hosts."""
  return {name: values[name].value for name in SAME}


def shard(name: str | None, index: int, many: int) -> str | None:
  """The file of one of several hosts: answers-00000-of-00002.jsonl for answers.jsonl."""
  if not name or many == 1:
    return name
  stem, dot, suffix = name.rpartition('.') if '.' in Path(name).name else (name, '', '')
  return f'{stem}-{index:05d}-of-{many:05d}{dot}{suffix}'


def write(record: dict, out, name) -> None:
  """Write a line of JSON."""
  try:
    print(json.dumps(record), file=out, flush=True)
  except BrokenPipeError:
    raise
  except OSError as error:
    raise UserError(
      f'the answers could not be written to {name or "standard output"} ({error.strerror or error})'
    ) from None


def main(argv=None) -> int:
  """Run the command."""
  return command(__doc__, define, run, argv)


if __name__ == '__main__':
  sys.exit(main())
