"""Requests to fill gaps, made from a corpus: texts with one gap or several, and what was there.

    ilm-jax infill-sets --path=CORPUS --kind=single --count=500 --out=requests.jsonl
    python -m ilm_jax.generate --workdir=runs/stories --prompts=requests.jsonl > answers.jsonl
    ilm-jax perplexity --judge=runs/arm --samples=answers.jsonl

Kinds: `single`, one gap: a sentence (--unit=sentence, of texts with several), or neighbouring words, `--share` of all
(--unit=words; the default where a document is a line). `multi`: several gaps, two to five, that hold `--share` of the
words together, at least a word between two of them. Texts that are too short for it are passed over.

A line is {"id", "infill": the parts around the gaps, "truth": the text, "fillings": what was in the gaps}; parts and
fillings together are the text, character for character. The lines are a function of the corpus, the settings and the
seed. --tokenizer=RUN leaves out the texts that are too long for that run; --lengths adds the numbers of its tokens in
each gap, as "least" and "most": a masked diffusion model needs them.
"""

import itertools
import json
import re
import sys
from typing import NamedTuple

import numpy as np
from absl import flags

from ilm_jax.console import command, quiet
from ilm_jax.runs import run_file
from ilm_jax.types import UserError

MOST_GAPS = 5


class Gapped(NamedTuple):
  """A text in alternation: parts[0], fillings[0], parts[1], ..."""

  parts: list[str]
  fillings: list[str]

  @property
  def text(self) -> str:
    """The whole text."""
    return self.parts[0] + ''.join(a + b for a, b in zip(self.fillings, self.parts[1:], strict=True))


def define(values: flags.FlagValues) -> None:
  """Define this command's flags."""
  flags.DEFINE_string('path', None, 'Of the corpus: a file, or a folder of *.txt or *.jsonl.', flag_values=values)
  flags.DEFINE_string('split', 'validation', 'Of the corpus.', flag_values=values)
  flags.DEFINE_string('documents', 'endoftext', 'What ends one in a *.txt: endoftext, line or paragraph.',
                      flag_values=values)  # fmt: skip
  flags.DEFINE_bool('detokenize', False, 'Undo the spaces of the One Billion Word corpus.', flag_values=values)
  flags.DEFINE_enum('kind', 'single', ['single', 'multi'], 'One gap in each text, or several.', flag_values=values)
  flags.DEFINE_enum('unit', None, ['sentence', 'words'], 'What a single gap holds.', flag_values=values)
  flags.DEFINE_float('share', 0.2, 'Of the words, in gaps.', flag_values=values)
  flags.DEFINE_integer('count', 500, 'Lines, at most.', lower_bound=1, flag_values=values)
  flags.DEFINE_integer('seed', 0, 'Of the choice of texts and gaps.', lower_bound=0, flag_values=values)
  flags.DEFINE_string('tokenizer', None, 'Folder of a run that the texts are to fit.', flag_values=values)
  flags.DEFINE_bool('lengths', False, "Add the number of the tokenizer's tokens of each gap.", flag_values=values)
  flags.DEFINE_string('out', None, 'File to write; standard output by default.', flag_values=values)


# --- gaps -------------------------------------------------------------------------------------------------------------


def cut_out(text: str, spans) -> Gapped:
  """A text without some spans of characters, which are in order and apart."""
  edges = [0, *(edge for span in spans for edge in span), len(text)]
  pieces = [text[start:end] for start, end in itertools.pairwise(edges)]
  return Gapped(pieces[::2], pieces[1::2])


def sentences(text: str) -> list[tuple[int, int]]:
  """Where the sentences of a text are, without the spaces around them."""
  from ilm_jax.tasks.text.task import SENTENCE

  spans, start = [], 0
  for end in [*(match.end() for match in SENTENCE.finditer(text)), len(text)]:
    piece = text[start:end]
    if any(map(str.isalnum, piece)):
      left = start + len(piece) - len(piece.lstrip())
      spans.append((left, left + len(piece.strip())))
    start = end
  return spans


def one_sentence(text: str, rng: np.random.Generator) -> Gapped | None:
  """A text without one of its sentences; None if it has but one."""
  spans = sentences(text)
  return cut_out(text, [spans[rng.integers(len(spans))]]) if len(spans) > 1 else None


def words(text: str) -> list[tuple[int, int]]:
  """Where the words of a text are: what stands between spaces."""
  return [match.span() for match in re.finditer(r'\S+', text)]


def chunks(text: str, rng: np.random.Generator, share: float, gaps: int) -> Gapped | None:
  """A text without some runs of words, with kept words between any two of them.

  Args:
    text: any.
    rng: of the sizes of the runs, and where they are: all ways to place runs of these sizes are equally likely.
    share: of the words in the runs, rounded to whole words, at least one in each.
    gaps: number of runs.

  Returns:
    None where there are too few words.
  """
  spans = words(text)
  taken = max(gaps, round(share * len(spans)))
  kept = len(spans) - taken
  if kept < max(1, gaps - 1):
    return None
  borders = [0, *sorted(1 + rng.choice(taken - 1, gaps - 1, replace=False)), taken]  # within what is taken
  before = sorted(rng.choice(kept + 1, gaps, replace=False))  # kept words before each run
  out = []
  for i in range(gaps):
    first, last = before[i] + borders[i], before[i] + borders[i + 1] - 1
    out.append((spans[first][0], spans[last][1]))
  return cut_out(text, out)


def make(text: str, rng: np.random.Generator, *, kind: str, unit: str, share: float) -> Gapped | None:
  """A request of a kind from a text; None where it is too short."""
  if kind == 'single':
    return one_sentence(text, rng) if unit == 'sentence' else chunks(text, rng, share, 1)
  taken = round(share * len(words(text)))
  return chunks(text, rng, share, int(rng.integers(2, min(MOST_GAPS, taken) + 1))) if taken > 1 else None


# --- a run's tokens ---------------------------------------------------------------------------------------------------


class Fits:
  """The tokenizer of a run of texts, and how long its rows may be."""

  def __init__(self, workdir: str):
    from ml_collections import ConfigDict

    from ilm_jax.tasks.text import task as text

    try:
      cfg = ConfigDict(run_file.read_config(workdir))
    except UserError as error:
      raise UserError(f'--tokenizer={error}') from None
    if cfg.task.name != 'text':
      raise UserError(f'--tokenizer={workdir} is a run of the task {cfg.task.name}: expected one of texts')
    text.settle(cfg.task, workdir)
    self.tokenizer, self.limit = text.tokenizer(cfg.task), cfg.sampling.max_length

  def lengths(self, gapped: Gapped) -> list[int] | None:
    """Tokens of each gap; None where the text is too long for the run, or the run sees nothing of a part or gap."""
    counts, total = [], 2
    for part, filling in zip(gapped.parts, gapped.fillings, strict=False):
      bare = part.rstrip(' ')  # the tokens of most begin with their space
      given = len(self.tokenizer.encode(bare))
      if counts and not given:
        return None
      counts.append(len(self.tokenizer.encode(part[len(bare) :] + filling)))
      total += given + counts[-1]
    total += len(self.tokenizer.encode(gapped.parts[-1]))
    return counts if total < self.limit and all(counts) else None


# --- the command ------------------------------------------------------------------------------------------------------


def requests(texts, *, kind: str, unit: str, share: float, count: int, seed: int, fits: Fits | None = None,
             lengths: bool = False) -> list[dict]:  # fmt: skip
  """The lines of a set, drawn from the texts that allow them."""
  from ilm_jax.tasks.text import corpora

  def possible():
    for number, text in enumerate(texts):
      gapped = make(text, np.random.default_rng((seed, number)), kind=kind, unit=unit, share=share)
      tokens = fits.lengths(gapped) if gapped and fits else None
      if gapped and (tokens or not fits):
        yield gapped, tokens

  out = []
  for number, (gapped, tokens) in enumerate(corpora.draw(possible(), count, seed)):
    record = {'id': number, 'infill': gapped.parts, 'truth': gapped.text, 'fillings': gapped.fillings}
    out.append({**record, 'least': tokens, 'most': tokens} if lengths else record)
  return out


def run(values) -> int:
  """Read, draw, write."""
  if not values.path:
    raise UserError('--path is missing: expected a corpus, a file or a folder of *.txt or *.jsonl')
  if not 0 < values.share < 1:
    raise UserError(f'--share={values.share}: expected a number between 0 and 1')
  if values.lengths and not values.tokenizer:
    raise UserError('--lengths counts the tokens of a run: name its folder, --tokenizer=runs/stories')
  if values.unit and values.kind == 'multi':
    raise UserError('--unit is of --kind=single: the gaps of --kind=multi hold words')
  quiet()
  from ilm_jax.tasks.text import corpora

  unit = values.unit or ('words' if values.documents == 'line' else 'sentence')
  fits = Fits(values.tokenizer) if values.tokenizer else None
  texts = corpora.read_split(values.path, values.split, values.documents, detokenised=values.detokenize)
  lines = requests(texts, kind=values.kind, unit=unit, share=values.share, count=values.count, seed=values.seed,
                   fits=fits, lengths=values.lengths)  # fmt: skip
  if not lines:
    raise UserError(f'--path={values.path} has no text in its {values.split} split that is long enough for such gaps'
                    + (f' and short enough for {values.tokenizer}' if fits else ''))  # fmt: skip
  if len(lines) < values.count:
    print(f'{values.path} gives {len(lines)} of the {values.count} lines: the other texts of its {values.split} split '
          'are too short' + (' or too long' if fits else ''), file=sys.stderr)  # fmt: skip
  content = ''.join(json.dumps(line) + '\n' for line in lines)
  if not values.out:
    print(content, end='')
    return 0
  try:
    with open(values.out, 'w', encoding='utf-8') as file:
      file.write(content)
  except OSError as error:
    raise UserError(f'--out={values.out}: {error.strerror or error}') from None
  return 0


def main(argv=None) -> int:
  """Run the command."""
  return command(__doc__, define, run, argv)


if __name__ == '__main__':
  sys.exit(main())
