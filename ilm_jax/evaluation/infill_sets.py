"""Make infill requests from a corpus: texts with one or several gaps, together with the true texts.

    ilm-jax infill-sets --path=CORPUS --kind=single --count=500 --out=requests.jsonl
    ilm-jax generate --workdir=runs/stories --prompts=requests.jsonl > answers.jsonl
    ilm-jax perplexity --model=runs/arm --samples=answers.jsonl

--kind=single removes one sentence from each text (--unit=sentence), or one run of consecutive words that makes up the
fraction --share of the text (--unit=words, the default with --documents=line). --kind=multi removes two to five runs of
words that together make up the fraction --share of the text, with at least one word between two gaps. Texts that are
too short are skipped.

Each output line is {"id", "infill": the parts around the gaps, "truth": the original text, "fillings": the removed
texts}; parts and fillings join to the original text exactly. The output depends only on the corpus, the flags and the
seed. --tokenizer=RUN skips texts that are too long for that run. --lengths adds "least" and "most", both the number of
tokens removed at each gap, which masked diffusion models need.
"""

import itertools
import json
import re
import sys
from typing import NamedTuple

import numpy as np
from absl import flags
from ml_collections import ConfigDict

from ilm_jax import paths
from ilm_jax.console import command, define_seed, quiet
from ilm_jax.evaluation import output
from ilm_jax.runs import run_file
from ilm_jax.tasks.text import corpora
from ilm_jax.tasks.text import task as text_task
from ilm_jax.types import UserError

MAX_GAPS = 5  # maximum number of gaps in a text with --kind=multi


class GappedText(NamedTuple):
  """A text with gaps: parts[0], fillings[0], parts[1], ..., fillings[-1], parts[-1] join to the text."""

  parts: list[str]
  fillings: list[str]

  @property
  def text(self) -> str:
    """Return the original text, without gaps."""
    return self.parts[0] + ''.join(a + b for a, b in zip(self.fillings, self.parts[1:], strict=True))


def define_corpus_flags(values: flags.FlagValues, split: str) -> None:
  """Define the flags that select documents of a corpus; `split` is the default of --split."""
  flags.DEFINE_string('split', split, 'Split of the corpus: train, validation or test.', flag_values=values)
  separators = 'Separator of documents in a *.txt file of the corpus: endoftext, line or paragraph.'
  flags.DEFINE_string('documents', 'endoftext', separators, flag_values=values)
  spaces = 'Remove the spaces around punctuation of the One Billion Word corpus.'
  flags.DEFINE_bool('detokenize', False, spaces, flag_values=values)
  flags.DEFINE_alias('detokenise', 'detokenize', flag_values=values)


def define(values: flags.FlagValues) -> None:
  """Define the flags of `ilm-jax infill-sets`."""
  flags.DEFINE_string('path', None, f'Corpus: a file, or a folder of {corpora.READABLE}.', flag_values=values)
  define_corpus_flags(values, 'validation')
  flags.DEFINE_enum('kind', 'single', ['single', 'multi'], 'Make one gap in each text, or several.', flag_values=values)
  flags.DEFINE_enum('unit', None, ['sentence', 'words'], 'What --kind=single removes from a text.', flag_values=values)
  flags.DEFINE_float('share', 0.2, 'Fraction of the words of a text that is removed.', flag_values=values)
  flags.DEFINE_integer('count', 500, 'Maximum number of requests.', lower_bound=1, flag_values=values)
  define_seed(values, 'Random seed for choosing texts and gaps.')
  flags.DEFINE_string('tokenizer', None, 'Folder of a run; skips texts too long for its model.', flag_values=values)
  flags.DEFINE_bool('lengths', False, 'Add the number of tokens of each gap; needs --tokenizer.', flag_values=values)
  flags.DEFINE_string('out', None, 'JSONL file to write; standard output by default.', flag_values=values)


def remove_spans(text: str, spans) -> GappedText:
  """Remove (start, end) spans of characters from a text; the spans must be sorted and separated by text."""
  bounds = [0, *itertools.chain(*spans), len(text)]
  pieces = [text[start:end] for start, end in itertools.pairwise(bounds)]
  return GappedText(pieces[::2], pieces[1::2])


def sentence_spans(text: str) -> list[tuple[int, int]]:
  """Return the (start, end) character offsets of each sentence in a text, without surrounding white space."""
  spans, start = [], 0
  for end in [*(match.end() for match in text_task.SENTENCE.finditer(text)), len(text)]:
    sentence = text[start:end]
    if any(map(str.isalnum, sentence)):
      first = start + len(sentence) - len(sentence.lstrip())
      spans.append((first, first + len(sentence.strip())))
    start = end
  return spans


def word_spans(text: str) -> list[tuple[int, int]]:
  """Return the (start, end) character offsets of each word in a text; words are separated by white space."""
  return [match.span() for match in re.finditer(r'\S+', text)]


def remove_word_runs(text: str, rng: np.random.Generator, share: float, gaps: int) -> GappedText | None:
  """Remove `gaps` random runs of words from a text, with at least one word between two runs.

  The runs together make up the fraction `share` of the words, and have at least one word each. All placements of the
  runs are equally likely. Returns None if the text has too few words.
  """
  spans = word_spans(text)
  removed = max(gaps, round(share * len(spans)))
  kept = len(spans) - removed
  if kept < max(1, gaps - 1):
    return None
  # Number removed and kept words separately: gap i replaces removed[ends[i]:ends[i+1]], after kept[:kept_before[i]].
  ends = [0, *sorted(1 + rng.choice(removed - 1, gaps - 1, replace=False)), removed]
  kept_before = sorted(rng.choice(kept + 1, gaps, replace=False))
  runs = zip(kept_before, itertools.pairwise(ends), strict=True)
  return remove_spans(text, [(spans[before + start][0], spans[before + end - 1][1]) for before, (start, end) in runs])


def make_gaps(text: str, rng: np.random.Generator, *, kind: str, unit: str, share: float) -> GappedText | None:
  """Make gaps in a text as --kind, --unit and --share specify; return None if the text is too short."""
  if kind == 'single' and unit == 'sentence':
    spans = sentence_spans(text)
    return remove_spans(text, [spans[rng.integers(len(spans))]]) if len(spans) > 1 else None
  removed, gaps = round(share * len(word_spans(text))), 1
  if kind == 'multi':
    if removed < 2:
      return None
    gaps = int(rng.integers(2, min(MAX_GAPS, removed) + 1))
  return remove_word_runs(text, rng, share, gaps)


class RunTokenizer:
  """The tokenizer of a run with task.name=text, and the maximum number of tokens (sampling.max_length) of that run."""

  def __init__(self, workdir: str):
    folder = paths.resolve(workdir, '--tokenizer')
    try:
      cfg = ConfigDict(run_file.read_config(folder))
    except UserError as error:
      raise UserError(f'--tokenizer={error}') from None
    if cfg.task.name != 'text':
      raise UserError(f'--tokenizer={workdir} is a run of task.name={cfg.task.name}: expected task.name=text')
    text_task.resolve_assets(cfg.task, folder)
    self.tokenizer, self.max_length = text_task.tokenizer(cfg.task), cfg.sampling.max_length

  def gap_lengths(self, gapped: GappedText) -> list[int] | None:
    """Return the token count of each filling; None if the text is too long, or no token is in a gap or between two."""
    lengths, total = [], 2  # total: number of tokens; the first two are [CLS] and [BOS]
    for part, filling in zip(gapped.parts, gapped.fillings, strict=False):
      before_space = part.rstrip(' ')  # most tokenizers attach a space to the next token, here the filling
      given = len(self.tokenizer.encode(before_space))
      if lengths and not given:
        return None
      lengths.append(len(self.tokenizer.encode(part[len(before_space) :] + filling)))
      total += given + lengths[-1]
    total += len(self.tokenizer.encode(gapped.parts[-1]))
    return lengths if total < self.max_length and all(lengths) else None


def make_requests(
  texts, *, count: int, seed: int, run_tokenizer: RunTokenizer | None = None, lengths: bool = False, **gaps
) -> list[dict]:
  """Make at most `count` infill requests from texts that are drawn at random among those long enough for gaps.

  If `run_tokenizer` is given, texts that are too long for its run are skipped, and `lengths` adds `least` and `most`,
  both the number of tokens of each gap. `gaps` are the arguments `kind`, `unit` and `share` of `make_gaps`.
  """

  def candidates():
    for number, text in enumerate(texts):
      gapped = make_gaps(text, np.random.default_rng((seed, number)), **gaps)
      gap_lengths = run_tokenizer.gap_lengths(gapped) if gapped and run_tokenizer else None
      if gapped and (gap_lengths or not run_tokenizer):
        yield gapped, gap_lengths

  requests = []
  for number, (gapped, gap_lengths) in enumerate(corpora.sample_uniformly(candidates(), count, seed)):
    request = {'id': number, 'infill': gapped.parts, 'truth': gapped.text, 'fillings': gapped.fillings}
    requests.append({**request, 'least': gap_lengths, 'most': gap_lengths} if lengths else request)
  return requests


def run(values) -> int:
  """Make infill requests as the flags specify, and write them to --out or standard output; return the exit code."""
  if not values.path:
    raise UserError('--path is missing: expected a corpus: a file, or a folder of text, JSONL or Parquet files')
  if not 0 < values.share < 1:
    raise UserError(f'--share={values.share}: expected a number between 0 and 1')
  if values.lengths and not values.tokenizer:
    raise UserError('--lengths needs --tokenizer: give the workdir of a run, whose tokenizer counts the tokens')
  if values.unit and values.kind == 'multi':
    raise UserError('--unit applies to --kind=single only: the gaps of --kind=multi always remove words')
  out = output.check(values.out, [('--path', values.path)]) if values.out else None
  quiet()
  unit = values.unit or ('words' if values.documents == 'line' else 'sentence')
  run_tokenizer = RunTokenizer(values.tokenizer) if values.tokenizer else None
  texts = corpora.read_split(values.path, values.split, values.documents, detokenized=values.detokenize)
  options = {'kind': values.kind, 'unit': unit, 'share': values.share, 'lengths': values.lengths}
  requests = make_requests(texts, count=values.count, seed=values.seed, run_tokenizer=run_tokenizer, **options)
  if not requests:
    needed = 'long enough for these gaps' + (f' and short enough for {values.tokenizer}' if run_tokenizer else '')
    raise UserError(f'--path={values.path} has no text in its {values.split} split that is {needed}')
  if len(requests) < values.count:
    reason = 'too short or too long' if run_tokenizer else 'too short'
    print(f'{values.path}: made {len(requests)} requests of --count={values.count}; the other texts of the '
          f'{values.split} split are {reason}', file=sys.stderr)  # fmt: skip
  content = ''.join(json.dumps(request) + '\n' for request in requests)
  if out:
    with output.replacing(out, f'--out={values.out}') as file:
      file.write(content.encode())
  else:
    print(content, end='')
  return 0


def main(argv=None) -> int:
  """Run the command `ilm-jax infill-sets`; return the exit code."""
  return command(__doc__, define, run, argv)
