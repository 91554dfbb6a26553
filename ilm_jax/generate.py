"""Complete prompts and fill gaps with a trained model; the results are JSON, one object per line.

    ilm-jax generate --workdir=runs/star-tiny --prompt='5,9|9,2/5,2'
    ilm-jax generate --workdir=runs/stories --infill='Tom had a ___ . He was ___ .' --n=3 --trace=trace.html
    ilm-jax generate --workdir=runs/stories --prompts=requests.jsonl > completions.jsonl

`python -m ilm_jax.generate` is the same command. Without --prompt, --infill or --prompts, requests are read from
standard input. A file of requests has one request per line, either a prompt as plain text or a JSON object (in a
*.jsonl file, every line is JSON) with these keys:

    "prompt"             the prompt; "" asks for an unconditional sample
    "infill"             instead of "prompt": a text with markers, or a list of the parts around the gaps
    "id"                 optional: identifies the result; by default the line number, from 0
    "least", "most"      optional: limits on the number of tokens in a gap; a number, or a list with one for each gap
    "truth", "fillings"  optional: the original text and the original fillings; copied to the result

Results are written as soon as they finish, so they may be out of order. A line that cannot be served is reported on
standard error; the other lines are still served, and the exit code is then 1. Several devices (--mesh=data=-1) or
several processes can share the work, without any effect on the results. Start all processes with the same command; each
writes its share to its own file: completions-00000-of-00002.jsonl, ...
"""

import contextlib
import functools
import itertools
import json
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags
from etils import epath

from ilm_jax import paths
from ilm_jax.console import command, define_processes, define_seed, fail, quiet
from ilm_jax.runs import run_file
from ilm_jax.tasks.text import corpora
from ilm_jax.types import UserError

TOKEN_RULE_FLAGS = ('temperature', 'top_p')  # flags that set fields of the rule for sampling a token
# Flags that override the sampling setting of the same name in the run's config.
SAMPLING_FLAGS = ('stop_threshold', 'stop_temperature', 'max_length', 'gaps', 'gap_threshold')
# Flags that must have the same value in all processes that share the work.
SHARED_FLAGS = ('workdir', 'checkpoint', 'seed', 'n', 'marker', 'batch_size', 'mesh', *SAMPLING_FLAGS,
                *TOKEN_RULE_FLAGS)  # fmt: skip
BY_DEFAULT = "the run's setting by default"  # in the help of flags that override a sampling setting
KEYS = ('id', 'prompt', 'infill', 'least', 'most', 'truth', 'fillings')  # keys of a JSON request


def define(values: flags.FlagValues) -> None:
  """Define the flags of `ilm-jax generate`."""
  string, strings, integer, number = (
    functools.partial(kind, flag_values=values)
    for kind in (flags.DEFINE_string, flags.DEFINE_multi_string, flags.DEFINE_integer, flags.DEFINE_float)
  )
  string('workdir', None, 'Folder of the run whose model to use.')
  strings('prompt', [], 'A prompt; may be repeated.')
  strings('infill', [], 'A text with a marker at each gap; may be repeated.')
  string('prompts', None, 'File of requests, one per line: plain text or JSON.')
  string('marker', '___', 'String that marks a gap.')
  integer('least', None, 'Minimum number of tokens in a gap; 1 by default.', lower_bound=0)
  integer('most', None, 'Maximum number of tokens in a gap.', lower_bound=0)
  integer('n', None, 'Number of samples for each request.', lower_bound=1)
  string('out', None, 'File for the results; standard output by default.')
  string('trace', None, 'File for an HTML page that animates the insertions.')
  string('checkpoint', 'best', "Checkpoint: 'best', 'latest' or a step.")
  define_seed(values)
  integer('batch_size', 64, 'Number of requests decoded at a time (slots).', lower_bound=1)
  string('mesh', None, 'Device mesh, such as data=2,tensor=4; by default one device, or all with several processes.')
  integer('max_length', None, f'Maximum length of a text, in tokens; {BY_DEFAULT}.', lower_bound=3)
  integer('gaps', None, f'Gaps that get a token in each decoding step; 0: all gaps; {BY_DEFAULT}.', lower_bound=0)
  number('stop_threshold', None, 'Stop as soon as p(stop) reaches this threshold; 0: sample whether to stop; '
         f'{BY_DEFAULT}.', lower_bound=0.0, upper_bound=1.0)  # fmt: skip
  number('stop_temperature', None, f'Temperature of p(stop); {BY_DEFAULT}.', lower_bound=0.0)
  number('gap_threshold', None, 'With several gaps in a step: skip gaps less probable than this fraction of the best '
         f"gap's probability; {BY_DEFAULT}.", lower_bound=0.0, upper_bound=1.0)  # fmt: skip
  number('temperature', None, f'Temperature of tokens, 0: greedy; {BY_DEFAULT}.', lower_bound=0.0)
  number('top_p', None, f'Nucleus sampling (top-p); 1: off; {BY_DEFAULT}.', lower_bound=0.0, upper_bound=1.0)
  define_processes(values)


class Request(NamedTuple):
  """A prompt or an infill request, as the user wrote it."""

  id: int
  kind: str  # 'prompt' or 'infill'
  content: Any  # the prompt, the text with a marker at each gap, or the list of parts around the gaps
  where: str  # flag or input line that contains the request, for error messages
  limits: dict  # 'least' and 'most': limits on the number of tokens in a gap, if given
  truth: dict | None = None  # original 'text' and 'fillings' of an infill request, if known


def read_requests(values) -> tuple[list[Request], list[UserError]]:
  """Return the requests from the flags, a file or standard input, and an error for each invalid line."""
  given = [name for name in ('prompt', 'infill', 'prompts') if values[name].value]
  if len(given) > 1:
    raise UserError(f'--{given[0]} and --{given[1]}: expected one of them, got both')
  limits = {name: values[name].value for name in ('least', 'most') if values[name].value is not None}
  if texts := values.prompt or values.infill:
    kind = 'prompt' if values.prompt else 'infill'
    return [Request(i, kind, text, f'--{kind} {i + 1}', limits) for i, text in enumerate(texts)], []
  name = values.prompts or 'standard input'
  with naming(f'--prompts={name}'):
    content = epath.Path(name).read_bytes() if values.prompts else sys.stdin.buffer.read()
  lines, json_only, next_offset = content.split(b'\n'), name.endswith('.jsonl'), 0
  requests, errors, lines_of_ids = [], [], {}
  for number, line in enumerate(lines):
    offset, next_offset = next_offset, next_offset + len(line) + 1
    if number == 0 and line.startswith(corpora.BYTE_ORDER_MARK):
      offset, line = len(corpora.BYTE_ORDER_MARK), line[len(corpora.BYTE_ORDER_MARK) :]
    where = f'{name}, line {number + 1}'
    try:
      if (text := corpora.decode(line, where, offset).removesuffix('\r')).strip():
        request = read_line(text, number, where, limits, json_only=json_only)
        if request.id in lines_of_ids:
          raise UserError(f'{where}: id {request.id} is already used on line {lines_of_ids[request.id]}: change it')
        lines_of_ids[request.id] = number + 1
        requests.append(request)
    except UserError as error:
      errors.append(error)
  if not requests and not errors:
    raise UserError(f'{name} contains no prompt: expected one per line')
  return requests, errors


def read_line(text: str, number: int, where: str, limits: dict, *, json_only: bool = False) -> Request:
  """Parse an input line, which is JSON or, unless `json_only`, a plain-text prompt; return the request."""
  if not text.lstrip().startswith('{') and not json_only:
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
      f'{where}: expected JSON with either "prompt" (a text) or "infill" (a text with markers, or the '
      f'list of texts around the gaps), and optionally "id" (an integer, 0 or greater), got {text[:80]}'
    ) from None
  if unknown := sorted(record.keys() - set(KEYS)):
    raise UserError(f'{where}: unknown key "{unknown[0]}": expected one of {", ".join(KEYS)}')
  if kind == 'prompt' and (record.get('least') is not None or record.get('most') is not None):
    raise UserError(f'{where}: "least" and "most" apply only to gaps: use them with "infill"')
  own = {name: record[name] for name in ('least', 'most') if record.get(name) is not None}
  truth = {'text': record['truth'], 'fillings': record.get('fillings')} if 'truth' in record else None
  return Request(index, kind, content, where, limits | own, truth if kind == 'infill' else None)


def check_files(values, out: str | None = None) -> None:
  """Raise UserError if two of --prompts, --out and --trace are the same file, or the folder of --trace does not exist.

  `out` is the results file that this process writes, if it differs from --out.
  """
  named = {name: values[name].value for name in ('prompts', 'out', 'trace')} | ({'out': out} if out else {})
  files = {name: value if '://' in value else os.path.realpath(value) for name, value in named.items() if value}
  for one, other in itertools.combinations(files, 2):
    if files[one] == files[other]:
      raise UserError(f'--{one} and --{other} are the same file, {files[one]}: choose another')
  folder = os.path.dirname(files.get('trace', ''))
  if folder and '://' not in folder and not os.path.isdir(folder):
    raise UserError(f'--trace={values.trace}: the folder {folder} does not exist')


@contextlib.contextmanager
def naming(setting: str):
  """Context manager: convert file and bucket errors to a UserError that names the setting, such as --out=FILE."""
  try:
    yield
  except (OSError, ImportError) as error:  # ImportError: a package that reads buckets is missing
    raise UserError(f'{setting}: {getattr(error, "strerror", None) or error}') from None


@contextlib.contextmanager
def output(name: str | None):
  """Context manager: open the file for the results, by default standard output; convert file errors to UserErrors."""
  if not name:
    yield sys.stdout
    return
  with naming(f'--out={name}'), epath.Path(name).open('w') as file:
    yield file


def run(values) -> int:
  """Serve the requests given by the flags; return the exit code, 1 if a request could not be served."""
  if not values.workdir:
    raise UserError('--workdir is missing: expected the folder of a run, such as --workdir=runs/star-tiny')
  for name in ('workdir', 'prompts', 'out', 'trace'):
    if values[name].value:
      values[name].value = os.fspath(paths.resolve(values[name].value, f'--{name}'))
  check_files(values)
  if values.prompt and (values.least is not None or values.most is not None):
    raise UserError('--least and --most apply only to gaps: use them with --infill')
  requests, errors = read_requests(values)
  quiet()
  from ilm_jax.distributed import processes

  processes.start(values.coordinator, values.num_processes, values.process_id, saving=False)
  return processes.end_together(lambda: serve(values, requests, errors))


def serve(values, requests: list[Request], errors: list[UserError]) -> int:
  """Load the model and serve the requests; each process writes its share of the results.

  `errors` has one error for each invalid line of the file of requests; the exit code is 1 if there is any, else 0.
  """
  from ilm_jax.distributed import processes
  from ilm_jax.inference import api, checks

  index, count = processes.which()
  out_name = shard(values.out, index, count)
  if count > 1:
    if values.trace or not values.out:
      raise UserError(f'each of the {count} processes writes its own file: give --out, and omit --trace')
    check_files(values, out_name)
    shared = {name: values[name].value for name in SHARED_FLAGS}
    processes.agree({**run_file.code(), 'requests': processes.digest(requests), **shared})
  settings = sampling_settings(values)
  mesh = values.mesh or ('data=-1' if count > 1 else None)
  lm = api.load(values.workdir, values.checkpoint, mesh=mesh, batch_size=values.batch_size, **settings)
  valid = []  # pairs (request, argument for LanguageModel.stream)
  for number, request in enumerate(requests):
    try:
      argument = request.content
      if request.kind == 'infill':
        argument = lm.gaps(argument, marker=values.marker, number=number, **request.limits)
      lm.encode(argument, number)
      valid.append((request, argument))
    except UserError as error:
      message = str(error).removeprefix(f'prompt {number + 1}: ').removeprefix(f'text {number + 1}: ')
      errors.append(error if request.where.startswith('--') else UserError(f'{request.where}: {message}'))
  if errors and (not valid or values.prompt or values.infill):
    raise errors[0]  # raised before any output file is created
  for error in errors if index == 0 else ():
    fail(error)

  checks.check_samples(len(valid) * (values.n or 1), f'--n={values.n}')
  jobs = [(request, argument, sample) for request, argument in valid for sample in range(values.n or 1)]
  ids = [api.request_number(request.id, sample) for request, _, sample in jobs]
  results = {}
  with output(out_name) as out:
    for job, result in lm.stream([argument for _, argument, _ in jobs], seed=values.seed, ids=ids):
      if job % count != index:
        continue
      request, _, sample = jobs[job]
      record = {'id': request.id, **({} if values.n is None else {'sample': sample}), request.kind: request.content}
      record |= result._asdict() | ({} if request.truth is None else {'truth': request.truth})
      print(json.dumps(record), file=out, flush=True)
      if values.trace:
        results[job] = result
  if values.trace:
    page = lm.page([results[job] for job in sorted(results)])
    with naming(f'--trace={values.trace}'):
      epath.Path(values.trace).write_text(page, encoding='utf-8')
  return 1 if errors else 0


def sampling_settings(values) -> dict:
  """Return the sampling settings that the flags override, as arguments of `api.load`."""
  settings = {name: values[name].value for name in SAMPLING_FLAGS if values[name].value is not None}
  if rule := {name: values[name].value for name in TOKEN_RULE_FLAGS if values[name].value is not None}:
    cfg = run_file.read_config(values.workdir)
    is_joint = cfg['family'] == 'ilm' and not cfg['sampling'].get('two_stage', cfg['sampling'].get('joint') is None)
    name = 'joint' if is_joint else 'token'
    settings[name] = rule
    if rule.get('top_p', 1.0) < 1 and not {**(cfg['sampling'].get(name) or {}), **rule}.get('temperature', 1.0):
      raise UserError(f'--top_p={values.top_p} has no effect at temperature 0: set --temperature to more than 0')
  return settings


def shard(name: str | None, index: int, count: int) -> str | None:
  """Return the output file of process `index` of `count`, such as results-00000-of-00002.jsonl for results.jsonl."""
  if not name or count == 1:
    return name
  stem, dot, suffix = name.rpartition('.') if '.' in Path(name).name else (name, '', '')
  return f'{stem}-{index:05d}-of-{count:05d}{dot}{suffix}'


def main(argv=None) -> int:
  """Run `ilm-jax generate`; return the exit code."""
  return command(__doc__, define, run, argv)


if __name__ == '__main__':
  sys.exit(main())
