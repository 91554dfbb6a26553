"""Samples and fillings judged: NLL, perplexity, entropy, lengths, variety; change of the NLL, exact match.

    ilm-jax perplexity --judge=runs/arm --samples=answers.jsonl [--out=judged.json]
    ilm-jax perplexity --judge=hf:gpt2 --samples=answers.jsonl --reference=CORPUS

The samples are what `python -m ilm_jax.generate` writes: JSON with "text", a line each. Those of texts with gaps have
"spans" and "fillings" too, and, where their requests came from `ilm-jax infill-sets`, "truth"; or --requests
names the file of requests, and "id" says which is whose. The judge is the workdir of an ARM run, or hf:NAME, a causal
model of Hugging Face by name or path (pip install "ilm_jax[judge]"). What is measured: see ilm_jax/evaluation/text_statistics.py.

A text longer than the judge's length is cut to its first tokens, and counted; as are those without a token. A filled
text of which the judge would see, of itself or its reference, only a part is left out of the change of the NLL.
"""

import json
import sys
from pathlib import Path
from typing import NamedTuple

from absl import flags

from ilm_jax.console import command, quiet
from ilm_jax.types import UserError


def define(values: flags.FlagValues) -> None:
  """Define this command's flags."""
  flags.DEFINE_string('judge', None, 'Folder of an ARM run, or hf:NAME.', flag_values=values)
  flags.DEFINE_string('samples', None, 'File of samples, JSONL.', flag_values=values)
  flags.DEFINE_string('requests', None, 'File of requests with "truth", JSONL; where the samples have none.',
                      flag_values=values)  # fmt: skip
  flags.DEFINE_string('reference', None, 'True texts to compare with: a *.jsonl, or a corpus, of which as many '
                      'documents as there are samples are drawn.', flag_values=values)  # fmt: skip
  flags.DEFINE_string('split', 'test', 'Of the corpus.', flag_values=values)
  flags.DEFINE_string('documents', 'endoftext', 'What ends one in a *.txt: endoftext, line or paragraph.',
                      flag_values=values)  # fmt: skip
  flags.DEFINE_bool('detokenize', False, 'Undo the spaces of the One Billion Word corpus.', flag_values=values)
  flags.DEFINE_string('out', None, 'File to write, JSON.', flag_values=values)
  flags.DEFINE_integer('seed', 0, 'Of the bootstrap, and of the choice of documents.', lower_bound=0,
                       flag_values=values)  # fmt: skip


class Sample(NamedTuple):
  """A line of the file of samples."""

  text: str
  id: int | str | None = None
  parts: list[str] | None = None  # around the gaps
  fillings: list[str] | None = None
  truth: str | None = None  # the whole text
  true_fillings: list[str] | None = None


# --- reading ----------------------------------------------------------------------------------------------------------


def records(path: str, flag: str):
  """Yield (where, record) of the lines of a JSONL file."""
  try:
    lines = Path(path).read_text('utf-8').split('\n')
  except OSError as error:
    raise UserError(f'--{flag}={path}: {error.strerror or error}') from None
  except UnicodeDecodeError as error:
    raise UserError(f'--{flag}={path} is not UTF-8: byte {error.start} is {error.object[error.start]:#04x}') from None
  for number, line in enumerate(lines, 1):
    if line.strip():
      where = f'{path}, line {number}'
      try:
        record = json.loads(line)
        if not isinstance(record, dict):
          raise TypeError
        json.dumps(record, ensure_ascii=False).encode()
      except UnicodeEncodeError:
        raise UserError(f'{where}: holds half of a surrogate pair, which is no character') from None
      except (ValueError, TypeError, RecursionError):
        raise UserError(f'{where}: expected a JSON object, got {line.strip()[:80]}') from None
      yield where, record


def read_samples(path: str) -> list[Sample]:
  """The samples of a file.

  Raises:
    UserError: no file, no samples in it, or a line that is none.
  """
  out, seen = [], {}
  for where, record in records(path, 'samples'):
    if not isinstance(record.get('text'), str):
      raise UserError(f'{where}: expected "text", a string, as `python -m ilm_jax.generate` writes it')
    sample = Sample(record['text'], record.get('id'))
    if 'infill' in record:
      sample = read_filled(record, sample, where)
      key = sample.id, json.dumps(record.get('sample'))
      if key in seen:
        raise UserError(f'{where} has the id and the sample of {seen[key]}: expected each answer once')
      seen[key] = where
    out.append(sample)
  if not out:
    raise UserError(f'--samples={path} holds no sample: expected JSON with "text", a line each')
  return out


def read_filled(record: dict, sample: Sample, where: str) -> Sample:
  """A sample that was a text with gaps."""
  spans, fillings = record.get('spans'), record.get('fillings')
  try:
    edges = [0, *(edge for start, end in spans for edge in (start, end)), len(sample.text)]
    if edges != sorted(edges) or [sample.text[start:end] for start, end in spans] != fillings:
      raise ValueError
  except (TypeError, ValueError):
    raise UserError(f'{where}: expected "fillings", a list of texts, and "spans", where they are in "text"') from None
  if not isinstance(sample.id, int | str):
    raise UserError(f'{where}: expected "id", whose answer it is')
  parts = [sample.text[start:end] for start, end in zip(edges[::2], edges[1::2], strict=True)]
  return with_truth(sample._replace(parts=parts, fillings=fillings), record.get('truth'), where)


def with_truth(sample: Sample, truth, where: str) -> Sample:
  """A sample with the true text: a string, or {'text', 'fillings'}."""
  if truth is None:
    return sample
  fillings = truth.get('fillings') if isinstance(truth, dict) else None
  text = truth.get('text') if isinstance(truth, dict) else truth
  if not isinstance(text, str):
    raise UserError(f'{where}: expected "truth", the whole text')
  if fillings is not None and _joined(sample.parts, fillings) != text:
    raise UserError(f'{where}: the given parts of the text and its true fillings do not make the truth, {text[:60]!r}')
  return sample._replace(truth=text, true_fillings=fillings)


def _joined(parts: list[str], fillings) -> str | None:
  if not isinstance(fillings, list) or len(fillings) != len(parts) - 1:
    return None
  return parts[0] + ''.join(f'{filling}{part}' for filling, part in zip(fillings, parts[1:], strict=True))


def join_requests(samples: list[Sample], path: str) -> list[Sample]:
  """The samples of texts with gaps, with the truth of their requests."""
  truths = {}
  for where, record in records(path, 'requests'):
    key = record.get('id')
    if not isinstance(key, int | str):
      raise UserError(f'{where}: expected "id", the one of its answers')
    if key in truths:
      raise UserError(f'{where} has the id {key!r} of {truths[key][0]}: expected each once')
    if not isinstance(record.get('truth'), str):
      raise UserError(f'{where}: expected "truth", the whole text')
    truths[key] = where, {'text': record['truth'], 'fillings': record.get('fillings')}
  out = []
  for sample in samples:
    if sample.parts is None:
      out.append(sample)
      continue
    if sample.id not in truths:
      raise UserError(f'--requests={path} has no request with the id {sample.id!r}, which a sample has: name theirs')
    where, truth = truths[sample.id]
    out.append(with_truth(sample, truth, where))
  return out


def read_reference(values, count: int) -> list[str]:
  """True texts: all of a *.jsonl, or as many documents of a corpus."""
  from ilm_jax.tasks.text import corpora

  path = values.reference
  if path.endswith('.jsonl'):
    texts = []
    for where, record in records(path, 'reference'):
      if not isinstance(record.get('text'), str):
        raise UserError(f'{where}: expected "text", a string')
      texts.append(record['text'])
  else:
    found = corpora.read_split(
      path, values.split, values.documents, detokenised=values.detokenize, flag='--reference'
    )  # fmt: skip
    texts = corpora.draw(found, count, values.seed)
  if not texts:
    raise UserError(f'--reference={path} holds no text' + ('' if path.endswith('.jsonl') else f' in {values.split}'))
  return texts


# --- judging ----------------------------------------------------------------------------------------------------------


def infilling(judge, samples: list[Sample], *, seed: int = 0) -> dict | None:
  """What is measured of texts with gaps; None where there are none."""
  from ilm_jax.evaluation import text_statistics

  filled = [sample for sample in samples if sample.parts is not None]
  if not filled:
    return None
  lacking = [sample.id for sample in filled if sample.truth is None]
  if lacking and len(lacking) < len(filled):
    raise UserError(f'the sample with the id {lacking[0]!r} has no truth, and others have one: name the --requests')
  columns = {
    'made': [sample.text for sample in filled],
    'input': [text_statistics.without_gaps(s.parts) for s in filled],
  }
  if not lacking:
    columns['truth'] = [sample.truth for sample in filled]
  judged = {name: judge.nll(texts) for name, texts in columns.items()}
  ids = [sample.id for sample in filled]
  out = {'answers': len(filled), 'requests': len(set(ids))}
  for name in ('truth', 'input'):
    if name in judged:
      found = text_statistics.change(ids, judged['made'], judged[name], seed=seed)
      out |= {f'change_{name}': found['change'], f'left_out_{name}': found['left_out']}
  if all(sample.true_fillings for sample in filled):
    made, true = [sample.fillings for sample in filled], [sample.true_fillings for sample in filled]
    out |= text_statistics.matches(ids, made, true)
  return out


def judge_all(judge, samples: list[Sample], references: list[str], *, seed: int = 0) -> dict:
  """Everything that is measured, {'samples', 'reference', 'infilling', 'mauve', 'notes'}."""
  from ilm_jax.evaluation import text_statistics
  from ilm_jax.evaluation.scoring_models import Once

  judge, texts, notes = Once(judge), [sample.text for sample in samples], []
  out = {'samples': text_statistics.describe(texts, judge.nll(texts), seed=seed)}
  if references:
    out['reference'] = text_statistics.describe(references, judge.nll(references), seed=seed)
    out['mauve'], note = text_statistics.mauve(texts, references)
    notes += [note] if note else []
  if (found := infilling(judge, samples, seed=seed)) is not None:
    out['infilling'] = found
    for name in ('truth', 'input'):
      if left_out := found.get(f'left_out_{name}'):
        notes.append(f'fillings: {left_out} of {found["answers"]} are left out of the change against the {name}: of '
                     'either text, the judge would see nothing, or a part')  # fmt: skip
  for name in ('samples', 'reference'):
    if name in out:
      notes += text_statistics.warnings(out[name], name, judge)
  return {**out, 'notes': notes}


def show(result: dict) -> str:
  """The result for people."""
  from ilm_jax.evaluation import text_statistics

  columns = {name: result[name] for name in ('samples', 'reference') if name in result}
  lines = [text_statistics.table(columns)]
  if result.get('mauve') is not None:
    lines.append(f'MAUVE {result["mauve"]:.4f}')
  if 'infilling' in result:
    lines += ['', text_statistics.table({'fillings': result['infilling']})]
  return '\n'.join([*lines, '', f'In brackets: {text_statistics.METHOD}.', *result['notes']])


def run(values) -> int:
  """Read, judge, print, write."""
  for name in ('judge', 'samples'):
    if not values[name].value:
      raise UserError(f'--{name} is missing: expected {values[name].help.rstrip(".")}')
  samples = read_samples(values.samples)
  if values.requests:
    samples = join_requests(samples, values.requests)
  quiet()
  from ilm_jax.evaluation import scoring_models, text_statistics

  scoring_models.check(values.judge)
  references = read_reference(values, len(samples)) if values.reference else []
  judge = scoring_models.get(values.judge)
  result = judge_all(judge, samples, references, seed=values.seed)
  print(f'{values.samples}, judged by {judge.name}:\n\n{show(result)}')
  if values.out:
    settings = {name: values[name].value for name in ('samples', 'requests', 'reference', 'split', 'seed')}
    about = {'judge': judge.name, 'settings': settings, 'intervals': text_statistics.METHOD}
    record = {**about, **text_statistics.plain(result)}
    try:
      Path(values.out).write_text(json.dumps(record, indent=2) + '\n')
    except OSError as error:
      raise UserError(f'--out={values.out}: {error.strerror or error}') from None
  return 0


def main(argv=None) -> int:
  """Run the command."""
  return command(__doc__, define, run, argv)


if __name__ == '__main__':
  sys.exit(main())
