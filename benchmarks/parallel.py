"""Several insertions per decoding step on a trained model: the speed gained, and the loss in text quality.

The run in --workdir generates texts from empty prompts, inserting into the 1, 2, 4, ... most probable gaps per decoding
step (0: all gaps; 1: the sampler of the ILM paper). The scoring model --model (the workdir of an ARM run, or hf:NAME)
gives the negative log-likelihood per token of the texts. All rows of the table use the same requests and the same seed.
"""

import sys
import time

from benchmarks import _report
from ilm_jax.evaluation import scoring_models, text_statistics
from ilm_jax.inference import api


def measure(args, model, gaps: int) -> dict:
  """Generate texts with `gaps` insertions per step, timed after a call that only compiles, and score the texts."""
  lm = api.load(args.workdir, gaps=gaps, gap_threshold=args.gap_threshold, batch_size=args.slots)
  prompts = [''] * args.count
  list(lm.stream(prompts[: 2 * args.slots], seed=1))
  start = time.perf_counter()
  completions = [completion for _, completion in sorted(lm.stream(prompts, seed=0), key=lambda pair: pair[0])]
  seconds = time.perf_counter() - start
  texts = [completion.text for completion in completions]
  statistics = text_statistics.describe(texts, model.nll(texts))
  lengths = [sum(order >= 0 for order in completion.order) for completion in completions]
  return {
    'gaps': gaps,
    'seconds': seconds,
    'passes': sum(len(completion.stop_probabilities) for completion in completions) / len(completions),
    'length': sum(lengths) / len(completions),
    'stopped': sum(completion.stopped for completion in completions) / len(completions),
    'scored': text_statistics.plain(statistics),
  }


def cells(row: dict, first: dict) -> dict[str, str]:
  """Format a row of the table; `first` is the baseline row for the speed-up."""
  return {
    'insertions / step': str(row['gaps'] or 'all'),
    'passes / text': f'{row["passes"]:.1f}',
    'ms / text': _report.number(1e3 * row['seconds'] / row['count']),
    'x first row': f'{first["seconds"] / row["seconds"]:.2f}',
    'tokens / text': f'{row["length"]:.1f}',
    'stopped by the model': f'{100 * row["stopped"]:.0f} %',
    **{name: with_interval(row['scored'].get(name)) for name in ('nll', 'entropy')},
  }


def with_interval(statistic) -> str:
  """Format a statistic (None, a number, or a value with a confidence interval) as a cell of the table."""
  if isinstance(statistic, dict):
    low, high = statistic['low'], statistic['high']
    return '–' if low is None else f'{statistic["value"]:.3f} ({low:.3f} - {high:.3f})'
  return '–' if statistic is None else f'{statistic:.3f}'


def parse(argv):
  """Parse the command line."""
  parser = _report.Parser(__doc__)
  parser.add_argument('--workdir', required=True, help='workdir of a text run with family=ilm')
  parser.add_argument('--model', '--judge', required=True, help='scoring model: the workdir of an ARM run, or hf:NAME')
  parser.add_argument('--count', type=_report.positive, default=200, help='number of texts (default: 200)')
  parser.add_argument('--slots', type=_report.positive, default=64, help='texts decoded at the same time (default: 64)')
  parser.add_argument('--gaps', type=_report.counts, default=[1, 2, 4, 8, 0], help='insertions per step; 0: all gaps')
  parser.add_argument(
    '--gap_threshold',
    type=_report.fraction,
    default=0.0,
    help='use only gaps whose probability is at least this fraction of the best gap (default: 0)',
  )
  parser.add_argument('--json', metavar='FILE', help='write all measurements to this file')
  return parser.parse_args(argv)


def main(argv=None) -> int:
  """Run the benchmark; UserError if the run or the scoring model cannot be used."""
  args = parse(argv)
  model, rows = scoring_models.get(args.model, '--model'), []
  for gaps in args.gaps:
    _report.progress(f'{gaps or "all"} insertions per step')
    rows.append({**measure(args, model, gaps), 'count': args.count})
  print(_report.machine())
  print(f'{args.workdir}: {args.count} texts, scored by {args.model}\n')
  print(_report.table([cells(row, rows[0]) for row in rows]))
  if args.json:
    _report.write_json(args.json, arguments=vars(args), machine=_report.machine(), rows=rows)
  return 0


if __name__ == '__main__':
  sys.exit(_report.run(main))
