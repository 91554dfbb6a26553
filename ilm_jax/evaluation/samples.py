"""Read the JSONL files of samples, infill requests and reference texts for `ilm-jax perplexity`."""

import functools
import json
from typing import NamedTuple

from ilm_jax import paths
from ilm_jax.evaluation.infill_sets import GappedText
from ilm_jax.tasks.text import corpora
from ilm_jax.types import UserError


class Sample(NamedTuple):
  """A generated text. The fields from `parts` on are None unless the text answers an infill request."""

  text: str
  id: int | str | None = None  # id of the request; several samples may answer one request
  parts: list[str] | None = None  # the given text around the gaps, one part more than there are gaps
  fillings: list[str] | None = None  # generated text in each gap
  truth: str | None = None  # the original text, before gaps were made
  true_fillings: list[str] | None = None  # the original text in each gap


def records(path: str, flag: str):
  """Yield (location for error messages, JSON object) for each non-empty line of a JSONL file that is given by a flag.

  Raises UserError if the file cannot be read, or a line is not a JSON object in valid UTF-8.
  """
  try:
    lines = paths.resolve(path, f'--{flag}').read_bytes().decode('utf-8-sig').split('\n')
  except OSError as error:
    raise UserError(f'--{flag}={path}: {error.strerror or error}') from None
  except UnicodeDecodeError as error:
    raise UserError(f'--{flag}={path} is not UTF-8: byte {error.start} is {error.object[error.start]:#04x}') from None
  for number, line in enumerate(lines, 1):
    if not line.strip():
      continue
    where = f'{path}, line {number}'
    try:
      record = json.loads(line, parse_constant=functools.partial(_refuse_constant, where))
      json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError:
      raise UserError(f'{where}: contains an unpaired surrogate, which is not a valid character') from None
    except (ValueError, RecursionError):
      record = None
    if not isinstance(record, dict):
      raise UserError(f'{where}: expected a JSON object, got {line.strip()[:80]}')
    yield where, record


def _refuse_constant(where: str, name: str) -> None:
  raise UserError(f'{where}: contains {name}, which is not valid JSON: expected finite numbers')


def text_of(record: dict, where: str, key: str = 'text', meaning: str = 'a string') -> str:
  """Return the string under a key of a JSON record; UserError if there is none."""
  if not isinstance(record.get(key), str):
    raise UserError(f'{where}: expected the key "{key}" with {meaning}')
  return record[key]


def read_samples(path: str) -> list[Sample]:
  """Read a JSONL file of samples written by `ilm-jax generate`."""
  samples, seen = [], {}
  for where, record in records(path, 'samples'):
    text = text_of(record, where, meaning='a string, as `ilm-jax generate` writes it')
    sample = Sample(text, record.get('id'))
    if 'infill' in record:
      sample = _add_gaps(sample, record, where)
      key = sample.id, json.dumps(record.get('sample'))
      if key in seen:
        raise UserError(f'{where} has the same "id" and "sample" as {seen[key]}: expected every answer once')
      seen[key] = where
    samples.append(sample)
  if not samples:
    raise UserError(f'--samples={path} contains no samples: expected one JSON object with "text" per line')
  return samples


def _add_gaps(sample: Sample, record: dict, where: str) -> Sample:
  """Return the sample of an infilled text, with the parts, fillings and true text that its JSON record gives."""
  spans, fillings = record.get('spans'), record.get('fillings')
  try:
    bounds = [0, *(bound for start, end in spans for bound in (start, end)), len(sample.text)]
    if bounds != sorted(bounds) or [sample.text[start:end] for start, end in spans] != fillings:
      raise ValueError
  except (TypeError, ValueError):
    expected = '"fillings", a list of strings, and "spans", the [start, end] of each filling in "text"'
    raise UserError(f'{where}: expected {expected}') from None
  if not isinstance(sample.id, int | str):
    raise UserError(f'{where}: expected the key "id" with the id of the infill request')
  parts = [sample.text[start:end] for start, end in zip(bounds[::2], bounds[1::2], strict=True)]
  sample, truth = sample._replace(parts=parts, fillings=fillings), record.get('truth')
  if truth is None:
    return sample
  return _add_truth(sample, truth if isinstance(truth, dict) else {'text': truth}, where)


def _add_truth(sample: Sample, truth: dict, where: str) -> Sample:
  """Return the sample with the true text, `truth["text"]`, and the true fillings, if `truth` has "fillings"."""
  text, fillings = truth.get('text'), truth.get('fillings')
  if not isinstance(text, str):
    raise UserError(f'{where}: expected the key "truth" with the true text, a string')
  if fillings is not None:
    is_complete = isinstance(fillings, list) and len(fillings) == len(sample.parts) - 1
    if not is_complete or GappedText(sample.parts, [str(filling) for filling in fillings]).text != text:
      raise UserError(f'{where}: the given parts and the true fillings do not join to the true text {text[:60]!r}')
  return sample._replace(truth=text, true_fillings=fillings)


def add_requests(samples: list[Sample], path: str) -> list[Sample]:
  """Add the true texts in a file of infill requests to the samples that answer the requests, matched by id."""
  truths = {}
  for where, record in records(path, 'requests'):
    key = record.get('id')
    if not isinstance(key, int | str):
      raise UserError(f'{where}: expected the key "id", which the samples refer to')
    if key in truths:
      raise UserError(f'{where} has the same id {key!r} as {truths[key][1]}: expected every id once')
    truth = text_of(record, where, 'truth', 'the true text, a string')
    truths[key] = {'text': truth, 'fillings': record.get('fillings')}, where
  for sample in samples:
    if sample.parts is not None and sample.id not in truths:
      raise UserError(f'--requests={path} has no request with id {sample.id!r}, which a sample answers')
  return [sample if sample.parts is None else _add_truth(sample, *truths[sample.id]) for sample in samples]


def read_references(values, count: int) -> list[str]:
  """Read the reference texts: all texts of a *.jsonl file, or `count` documents drawn from a corpus.

  `values` are the flags of `ilm-jax perplexity`: `reference`, `split`, `documents`, `detokenize` and `seed`.
  """
  path = values.reference
  if path.endswith('.jsonl'):
    texts = [text_of(record, where) for where, record in records(path, 'reference')]
    if not texts:
      raise UserError(f'--reference={path} contains no texts')
    return texts
  options = {'detokenized': values.detokenize, 'flag': '--reference'}
  documents = corpora.read_split(path, values.split, values.documents, **options)
  texts = corpora.sample_uniformly(documents, count, values.seed)
  if not texts:
    raise UserError(f'--reference={path} contains no documents in its {values.split} split')
  return texts
