"""Sampling throughput: continuous against static batching, and several insertions per decoding step.

The requests have lengths like LM1B sentences (lognormal, mean 29 tokens, at most 126), and the model has random
weights, so each request prescribes its number of tokens. Both samplers serve the same requests with the same number of
slots, alternately, and should generate the same tokens. The second table compares insertions into the 1, 2, 4, ... most
probable gaps per decoding step (0: all gaps). The sampler of the ILM paper makes one insertion per step.
"""

import statistics
import sys
import time

import jax
import numpy as np

from benchmarks import _report
from benchmarks.train_step import lm1b_length
from ilm_jax import families
from ilm_jax.families import ilm
from ilm_jax.inference.continuous_batching import ContinuousSampler
from ilm_jax.inference.static_batching import StaticSampler
from ilm_jax.special_tokens import BOS, CLS, SPECIAL
from ilm_jax.types import GREEDY

BLOCK = 128  # maximum number of tokens in a row, including [CLS] and [BOS]


def make_requests(count: int) -> list[dict]:
  """Return requests with an empty prompt, each for a lognormally distributed number of tokens."""
  rng, requests = np.random.default_rng(0), []
  for _ in range(count):
    length = np.full(2, lm1b_length(rng), np.int32)
    requests.append({'tokens': np.array([CLS, BOS]), 'open': np.array([False, True]), 'least': length, 'most': length})
  return requests


def make_sample_config(args, gaps: int = 1) -> ilm.SampleConfig:
  """Return settings for greedy sampling that stops only at the requested number of tokens."""
  return ilm.SampleConfig(
    max_length=BLOCK,
    gaps=gaps,
    gap=GREEDY,
    token=GREEDY,
    stop_threshold=1.0,
    suppressed_tokens=tuple(range(len(SPECIAL))),
    min_buffer=args.min_buffer,
    compute=args.compute,
  )


def timed(call) -> tuple[list[dict], float]:
  """Return (rows in request order, seconds) of a call that yields (request index, row) pairs."""
  start = time.perf_counter()
  rows = dict(call())
  return [rows[i] for i in range(len(rows))], time.perf_counter() - start


def compare_batching(args, params, requests: list[dict]) -> dict:
  """Time static and continuous batching alternately, after an untimed call of each, which compiles."""
  cfg, key, family = make_sample_config(args), jax.random.key(0), families.get('ilm')
  static = StaticSampler(args.model_cfg, family, cfg, args.slots)
  continuous = ContinuousSampler(args.model_cfg, family, cfg, args.slots)
  calls = {
    'static': lambda: enumerate(static(params, key, requests)),
    'continuous': lambda: continuous(params, key, requests),
  }
  seconds, rows = {name: [] for name in calls}, {}
  for turn in range(args.repeats + 1):
    for name, call in calls.items():
      rows[name], elapsed = timed(call)
      _report.progress(f'{name}: {len(requests) / elapsed:.2f} sequences/s{"" if turn else " (compiling)"}')
      if turn:
        seconds[name].append(elapsed)
  same = [np.array_equal(a['tokens'], b['tokens']) for a, b in zip(rows['static'], rows['continuous'], strict=True)]
  lengths = [int(request['least'][1]) for request in requests]
  if [len(row['tokens']) - 2 for row in rows['continuous']] != lengths:
    raise AssertionError('a completion does not have the number of tokens that its request prescribes')
  return {'seconds': seconds, 'same_tokens': float(np.mean(same)), 'tokens': sum(lengths)}


def time_insertions(args, params, requests: list[dict], gaps: int) -> dict:
  """Time continuous batching with `gaps` insertions per decoding step (0: one into each gap)."""
  sampler = ContinuousSampler(args.model_cfg, families.get('ilm'), make_sample_config(args, gaps), args.slots)
  seconds = []
  for turn in range(args.repeats + 1):
    rows, elapsed = timed(lambda: sampler(params, jax.random.key(0), requests))
    if turn:
      seconds.append(elapsed)
  passes = sum(len(row['log_prob']) + 1 for row in rows)
  return {'gaps': gaps, 'seconds': seconds, 'passes': passes / len(rows)}


def parse(argv):
  """Parse the command line."""
  parser = _report.Parser(__doc__)
  parser.add_argument('--requests', type=_report.positive, default=512, help='sequences per timed call (default: 512)')
  parser.add_argument('--slots', type=_report.positive, default=64, help='rows decoded at the same time (default: 64)')
  parser.add_argument(
    '--min_buffer', type=_report.positive, default=32, help='initial buffer length, in tokens (default: 32)'
  )
  parser.add_argument(
    '--gaps', type=_report.counts, default=[1, 2, 4, 8, 0], help='insertions per step in the second table; 0: all gaps'
  )
  parser.add_argument('--repeats', type=_report.positive, default=3, help='timed calls of each sampler (default: 3)')
  parser.add_common_flags()
  return parser.parse_args(argv)


def main(argv=None) -> int:
  """Run the benchmark; return 1 if continuous and static batching generated different tokens in float32."""
  args = parse(argv)
  args.model_cfg = _report.model_of(args)
  params, requests = _report.random_params(args.model_cfg), make_requests(args.requests)
  both = compare_batching(args, params, requests)
  rates = {name: [args.requests / s for s in values] for name, values in both['seconds'].items()}
  ratios = [a / b for a, b in zip(rates['continuous'], rates['static'], strict=True)]
  print(_report.machine())
  print(
    f'size {args.size}, compute {args.compute}, vocabulary {args.vocab:,}, {args.requests} sequences with a mean of '
    f'{both["tokens"] / args.requests:.1f} tokens, {args.slots} slots\n'
  )
  print(_report.table([
    {'slots': str(args.slots), 'batching': name, 'sequences / s (min - max)': _report.median_of(values),
     'x static': '1' if name == 'static' else _report.median_of(ratios)}
    for name, values in rates.items()
  ]))  # fmt: skip
  print(f'\nstatic and continuous batching: sequences with the same tokens: {100 * both["same_tokens"]:.1f} %\n')
  rows = []
  for gaps in args.gaps:
    _report.progress(f'{gaps or "all"} insertions per step')
    rows.append(time_insertions(args, params, requests, gaps))
  first = statistics.median(rows[0]['seconds'])
  print(_report.table([
    {'slots': str(args.slots), 'insertions / step': str(row['gaps'] or 'all'),
     'passes / sequence': f'{row["passes"]:.1f}',
     'sequences / s (min - max)': _report.median_of([args.requests / s for s in row['seconds']]),
     'x first row': f'{first / statistics.median(row["seconds"]):.2f}'}
    for row in rows
  ]))  # fmt: skip
  if args.json:
    arguments = {key: value for key, value in vars(args).items() if key != 'model_cfg'}
    _report.write_json(args.json, arguments=arguments, machine=_report.machine(), both=both, several=rows)
  return int(args.compute == 'float32' and both['same_tokens'] < 1)


if __name__ == '__main__':
  sys.exit(_report.run(main))
