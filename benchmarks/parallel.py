"""Several insertions a step, on a trained model: what is gained in time, and what it costs in NLL and entropy.

Texts are written from nothing by the run in --workdir, in 1, 2, 4, ... of the best gaps at once (0: all; one is the
sampler of the paper), and judged by --judge (the folder of an ARM run, or hf:NAME). The same requests and seed for all.
"""

import sys
import time

from benchmarks import _report
from ilm_jax.evaluation import scoring_models, text_statistics
from ilm_jax.inference import api
from ilm_jax.types import UserError


def measure(args, judge, gaps: int) -> dict:
  """Write and judge the texts; the first call, which compiles, is not timed."""
  lm = api.load(args.workdir, gaps=gaps, gap_threshold=args.gap_threshold, batch_size=args.slots)
  prompts = [''] * args.count
  list(lm.stream(prompts[: 2 * args.slots], seed=1))
  begun = time.perf_counter()
  made = [one for _, one in sorted(lm.stream(prompts, seed=0), key=lambda pair: pair[0])]
  seconds = time.perf_counter() - begun
  texts = [one.text for one in made]
  found = text_statistics.describe(texts, judge.nll(texts))
  lengths = [sum(order >= 0 for order in one.order) for one in made]
  return {
    'gaps': gaps,
    'seconds': seconds,
    'passes': sum(len(one.stop_probabilities) for one in made) / len(made),
    'length': sum(lengths) / len(made),
    'stopped': sum(one.stopped for one in made) / len(made),
    'judged': text_statistics.plain(found),
  }


def cells(row: dict, first: dict) -> dict[str, str]:
  """A row of the table."""
  judged = row['judged']
  return {
    'insertions a step': str(row['gaps'] or 'all'),
    'passes / text': f'{row["passes"]:.1f}',
    'ms / text': _report.number(1e3 * row['seconds'] / row['count']),
    'x the first': f'{first["seconds"] / row["seconds"]:.2f}',
    'tokens': f'{row["length"]:.1f}',
    'stopped': f'{100 * row["stopped"]:.0f} %',
    **{name: _value(judged.get(name)) for name in ('nll', 'entropy')},
  }


def _value(found) -> str:
  if isinstance(found, dict):
    return '–' if found['low'] is None else f'{found["value"]:.3f} ({found["low"]:.3f} - {found["high"]:.3f})'
  return '–' if found is None else f'{found:.3f}'


def parse(argv):
  """Read the flags."""
  parser = _report.Parser(__doc__)
  parser.add_argument('--workdir', required=True, help='of a text run of family=ilm')
  parser.add_argument('--judge', required=True, help='folder of an ARM run, or hf:NAME')
  parser.add_argument('--count', type=_report.positive, default=200, help='texts')
  parser.add_argument('--slots', type=_report.positive, default=64, help='at a time')
  parser.add_argument('--gaps', type=_report.counts, default=[1, 2, 4, 8, 0], help='insertions of a step; 0: all')
  parser.add_argument(
    '--gap_threshold', type=float, default=0.0, help='only gaps as probable as this share of the best'
  )
  parser.add_argument('--json', metavar='FILE', help='where to write everything that was measured')
  return parser.parse_args(argv)


def main(argv=None) -> int:
  """Measure each number of insertions."""
  args = parse(argv)
  try:
    judge, rows = scoring_models.get(args.judge), []
    for gaps in args.gaps:
      _report.note(f'{gaps or "all"} insertions a step')
      rows.append({**measure(args, judge, gaps), 'count': args.count})
  except UserError as error:
    print(f'error: {error}', file=sys.stderr)
    return 1
  print(_report.machine())
  print(f'{args.workdir}: {args.count} texts, judged by {args.judge}\n')
  print(_report.table([cells(row, rows[0]) for row in rows]))
  if args.json:
    _report.write_json(args.json, arguments=vars(args), machine=_report.machine(), rows=rows)
  return 0


if __name__ == '__main__':
  sys.exit(main())
