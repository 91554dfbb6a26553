"""Sequences per second: continuous against static batching, and several insertions a step.

Requests of LM1B-like lengths (lognormal, 29 tokens in the mean, a block of 128; each is to get exactly its number of
tokens, by random weights) are served by `ilm_jax.inference.continuous_batching` with --slots slots, and by static batches of as many rows,
in turns, and must give the same tokens. The second table inserts in 1, 2, 4, ... of the best gaps at once (0: all):
one is the sampler of the paper.
"""

import statistics
import sys
import time

import flax.linen as nn
import jax
import numpy as np

from benchmarks import _report
from benchmarks.train_step import lm1b_length
from ilm_jax.families import ilm
from ilm_jax.inference.continuous_batching import ContinuousSampler
from ilm_jax.inference.static_batching import Sampler
from ilm_jax.models import transformer
from ilm_jax.special_tokens import BOS, CLS, SPECIAL
from ilm_jax.types import GREEDY

BLOCK = 128


def requests_of(number: int) -> list[dict]:
  """Prompts without text that ask for lognormal numbers of tokens."""
  rng, out = np.random.default_rng(0), []
  for _ in range(number):
    wanted = np.full(2, lm1b_length(rng), np.int32)
    out.append({'tokens': np.array([CLS, BOS]), 'open': np.array([False, True]), 'least': wanted, 'most': wanted})
  return out


def settings_of(args, gaps: int = 1) -> ilm.SampleConfig:
  """Greedy sampling that stops at the number of tokens alone."""
  return ilm.SampleConfig(
    max_length=BLOCK,
    gaps=gaps,
    gap=GREEDY,
    token=GREEDY,
    stop_threshold=1.0,
    closed_tokens=tuple(range(len(SPECIAL))),
    min_buffer=args.min_buffer,
    compute=args.compute,
  )


def timed(call) -> tuple[list[dict], float]:
  """(rows in the order of the requests, seconds) of a call that yields (index, row)."""
  begun = time.perf_counter()
  rows = dict(call())
  return [rows[i] for i in range(len(rows))], time.perf_counter() - begun


def compare(args, params, requests: list[dict]) -> dict:
  """Serve the requests both ways, in turns; the first turn warms up."""
  cfg, key = settings_of(args), jax.random.key(0)
  static = Sampler(args.model_cfg, ilm, cfg, args.slots)
  continuous = ContinuousSampler(args.model_cfg, ilm, cfg, args.slots)
  calls = {
    'static': lambda: enumerate(static(params, key, requests)),
    'continuous': lambda: continuous(params, key, requests),
  }
  seconds, rows = {name: [] for name in calls}, {}
  for turn in range(args.repeats + 1):
    for name, call in calls.items():
      rows[name], passed = timed(call)
      _report.note(f'{name}: {len(requests) / passed:.2f} sequences/s{"" if turn else " (compiling)"}')
      if turn:
        seconds[name].append(passed)
  same = [np.array_equal(a['tokens'], b['tokens']) for a, b in zip(rows['static'], rows['continuous'], strict=True)]
  wanted = [int(given['least'][1]) for given in requests]
  if [len(row['tokens']) - 2 for row in rows['continuous']] != wanted:
    raise AssertionError('a request did not get its number of tokens')
  return {'seconds': seconds, 'same_tokens': float(np.mean(same)), 'tokens': sum(wanted)}


def several(args, params, requests: list[dict], gaps: int) -> dict:
  """Serve the requests with so many insertions a step."""
  sampler, key = ContinuousSampler(args.model_cfg, ilm, settings_of(args, gaps), args.slots), jax.random.key(0)
  seconds = []
  for turn in range(args.repeats + 1):
    rows, passed = timed(lambda: sampler(params, key, requests))
    if turn:
      seconds.append(passed)
  passes = sum(len(row['log_prob']) + 1 for row in rows)
  return {'gaps': gaps, 'seconds': seconds, 'passes': passes / len(rows)}


def parse(argv):
  """Read the flags."""
  parser = _report.Parser(__doc__)
  parser.add_argument('--requests', type=_report.positive, default=512, help='sequences of a turn')
  parser.add_argument('--slots', type=_report.positive, default=64, help='rows of a static batch; slots')
  parser.add_argument('--min_buffer', type=_report.positive, default=32, help='shortest buffer, for both')
  parser.add_argument(
    '--gaps', type=_report.counts, default=[1, 2, 4, 8, 0], help='insertions of a step in the second table; 0: all'
  )
  parser.add_argument('--repeats', type=_report.positive, default=3, help='timed turns')
  parser.add_argument(
    '--size', choices=list(_report.SIZES), help='of the model: xtiny2 on a CPU by default, else small'
  )
  parser.add_argument('--compute', choices=_report.COMPUTE, default='mixed', help='type of the matrix products')
  parser.add_argument('--vocab', type=_report.positive, default=_report.LM1B_VOCABULARY, help='words')
  parser.add_argument('--json', metavar='FILE', help='where to write everything that was measured')
  return parser.parse_args(argv)


def main(argv=None) -> int:
  """Measure; returns 1 if the two ways gave different tokens in float32."""
  args = parse(argv)
  size = args.size or ('xtiny2' if jax.default_backend() == 'cpu' else 'small')
  args.model_cfg = transformer.ModelConfig.create(args.vocab, **_report.SIZES[size], compute=args.compute)
  params = jax.jit(lambda: nn.unbox(transformer.init(args.model_cfg, jax.random.key(0))))()
  requests = requests_of(args.requests)
  both = compare(args, params, requests)
  rates = {name: [args.requests / s for s in values] for name, values in both['seconds'].items()}
  ratios = [a / b for a, b in zip(rates['continuous'], rates['static'], strict=True)]
  print(_report.machine())
  print(
    f'size {size}, compute {args.compute}, vocabulary {args.vocab:,}, {args.requests} sequences of '
    f'{both["tokens"] / args.requests:.1f} tokens in the mean, {args.slots} slots\n'
  )
  print(_report.table([
    {'slots': str(args.slots), 'batching': name, 'sequences / s (min - max)': _report.median_of(values),
     'x static': '1' if name == 'static' else _report.median_of(ratios)}
    for name, values in rates.items()
  ]))  # fmt: skip
  print(f'\nsequences with the same tokens: {100 * both["same_tokens"]:.1f} %\n')
  rows = []
  for gaps in args.gaps:
    _report.note(f'{gaps or "all"} insertions a step')
    rows.append(several(args, params, requests, gaps))
  first = statistics.median(rows[0]['seconds']) if rows else 0
  print(_report.table([
    {'slots': str(args.slots), 'insertions a step': str(row['gaps'] or 'all'),
     'passes / sequence': f'{row["passes"]:.1f}',
     'sequences / s (min - max)': _report.median_of([args.requests / s for s in row['seconds']]),
     'x the first': f'{first / statistics.median(row["seconds"]):.2f}'}
    for row in rows
  ]))  # fmt: skip
  if args.json:
    plain = {key: value for key, value in vars(args).items() if key != 'model_cfg'} | {'size': size}
    _report.write_json(args.json, arguments=plain, machine=_report.machine(), both=both, several=rows)
  return int(args.compute == 'float32' and both['same_tokens'] < 1)


if __name__ == '__main__':
  sys.exit(main())
