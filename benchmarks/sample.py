"""Microseconds per inserted token, by the number of rows and their current length.

Rows of about the given length (prompts of random words, all gaps open) get --insert tokens by `ilm_jax.inference.static_batching`, in a
buffer that could grow to --max_length positions, with random weights and a stop head that never stops. A pass inserts
one token into each row; a call has one pass more, which finds that all is done, and is divided by all of its passes:

    us / token = seconds of a call / (passes x rows)

Cost should follow the current length, not the longest possible one; and once a shape was seen nothing is compiled.

A second table writes from left to right at --arm_lengths: with the cache of keys and values, and with the whole row
through the model for each token. Continuous against static batching is `benchmarks.batching`, several insertions a step
on a trained model `benchmarks.parallel`.
"""

import dataclasses
import statistics
import sys
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import _report
from ilm_jax.families import arm, ilm
from ilm_jax.families.growing import buffers
from ilm_jax.inference.static_batching import Sampler
from ilm_jax.models import transformer
from ilm_jax.special_tokens import BOS, CLS, SPECIAL
from ilm_jax.types import GREEDY, Prompt, Rule

LEAST, MOST = 2, 30  # timed calls


def prompts_of(rng: np.random.Generator, rows: int, length: int, vocab_size: int) -> list[dict]:
  """Random prompts, `[CLS] [BOS] w w w`, every gap open but that of [CLS]."""
  made = []
  for _ in range(rows):
    words = rng.integers(len(SPECIAL), vocab_size, size=length - 2)
    made.append({'tokens': np.array([CLS, BOS, *words], np.int32), 'open': np.arange(length) > 0})
  return made


def buffer_of(args, length: int) -> int:
  """Positions that a row of this length is computed in."""
  return buffers(length, ilm.SampleConfig(args.max_length))[0]


def predict(args, measured: dict, rows: int, length: int) -> float:
  """Seconds of a pass, in proportion to rows and buffers, from the nearest one measured; 0 before the first."""
  if not measured:
    return 0.0
  near = max(measured, key=lambda key: (key[0] == rows, key[1] == length, key))
  growth = rows / near[0] * buffer_of(args, length) / buffer_of(args, near[1])
  return statistics.median(measured[near]['pass_seconds']) * growth


def insertions(args, seconds_of_pass: float) -> int:
  """How many tokens to insert in a call: --insert, halved until the calls fit into --seconds."""
  number = args.insert
  while number > 1 and (1 + LEAST) * (number + 1) * seconds_of_pass > args.seconds:
    number //= 2
  return number


def measure(args, params, samplers: dict, compilations, *, rows: int, length: int, number: int) -> dict:
  """Time calls that insert `number` tokens into each row, after one call to warm up."""
  if (rows, number) not in samplers:
    sample_cfg = ilm.SampleConfig(
      max_length=args.max_length,
      max_steps=number,
      token=Rule(top_p=args.top_p) if args.top_p else GREEDY,
      stop_threshold=1.0,
      closed_tokens=tuple(range(len(SPECIAL))),
      compute=args.compute,
    )
    samplers[rows, number] = Sampler(args.model_cfg, ilm, sample_cfg, rows)
  sampler, rng = samplers[rows, number], np.random.default_rng(length)
  start = max(2, length - number - 1)  # one short of the length: the last pass belongs to the same buffer
  seconds, compiled, calls = [], 0, 0
  while len(seconds) < LEAST or (sum(seconds) < args.seconds / 2 and len(seconds) < MOST):
    prompts, key = prompts_of(rng, rows, start, args.vocab), jax.random.key(calls)
    before, begun = compilations.count, time.perf_counter()
    sampled = list(sampler(params, key, prompts))
    passed = time.perf_counter() - begun
    if any(len(row['log_prob']) != number or row['stopped'] for row in sampled):
      raise AssertionError(f'expected {number} insertions in each row, got {[len(r["log_prob"]) for r in sampled]}')
    if calls:  # the first one warms up
      seconds.append(passed)
      compiled += compilations.count - before
    calls += 1
  return {
    'rows': rows,
    'length': length,
    'from': start,
    'to': start + number,
    'buffer': buffer_of(args, start + number),
    'insertions': number,
    'seconds': seconds,
    'pass_seconds': [s / (number + 1) for s in seconds],
    'token_us': [1e6 * s / (number + 1) / rows for s in seconds],
    'compilations': compiled,
  }


def without_cache(forward, tokens_BxL, length_B, number: int, cfg):
  """Write `number` tokens greedily, with the whole row through the model for each."""

  def step(_, state):
    tokens_BxL, length_B = state
    outputs = forward(tokens_BxL, length_B)
    row_B = jnp.arange(length_B.shape[0])
    logits_BxV = arm.logits(outputs.hidden_BxLxD[row_B, length_B - 1], outputs.unembed_VxD, cfg)
    return tokens_BxL.at[row_B, length_B].set(logits_BxV.argmax(-1)), length_B + 1

  return jax.lax.fori_loop(0, number, step, (tokens_BxL, length_B))


def measure_arm(args, params, *, rows: int, length: int) -> dict:
  """Time the writing of the last --insert tokens up to a length, with and without the cache, in turns."""
  cfg = arm.SampleConfig(
    max_length=length, max_steps=args.insert, closed_tokens=tuple(range(len(SPECIAL))), compute=args.compute
  )
  forward = transformer.Forward(args.arm_cfg, params)
  rng, start = np.random.default_rng(length), length - args.insert
  tokens_BxL = np.zeros((rows, length), np.int32)
  for row, prompt in enumerate(prompts_of(rng, rows, start, args.vocab)):
    tokens_BxL[row, :start] = prompt['tokens']
  length_B = np.full(rows, start, np.int32)
  last_BxL = np.arange(length)[None] == length_B[:, None] - 1
  prompt = Prompt(tokens_BxL, length_B, last_BxL, np.arange(rows))
  cached = jax.jit(lambda prompt: arm.sample(forward, jax.random.key(0), prompt, cfg).tokens_BxL)
  prefill = jax.jit(lambda prompt: arm.sample(forward, jax.random.key(0), prompt, cfg._replace(max_steps=0)).length_B)
  whole = jax.jit(lambda tokens, length: without_cache(forward, tokens, length, args.insert, cfg)[0])
  calls = {
    'cached': lambda: cached(prompt),
    'prompt': lambda: prefill(prompt),
    'whole': lambda: whole(tokens_BxL, length_B),
  }
  results = {name: jax.block_until_ready(call()) for name, call in calls.items()}
  same = float((results['cached'] == results['whole'])[:, start:].mean())
  seconds = {name: [] for name in calls}
  while min(map(len, seconds.values())) < LEAST or sum(map(sum, seconds.values())) < args.seconds:
    for name, call in calls.items():
      begun = time.perf_counter()
      jax.block_until_ready(call())
      seconds[name].append(time.perf_counter() - begun)
    if len(seconds['whole']) >= MOST:
      break
  middle = {name: statistics.median(values) for name, values in seconds.items()}
  return {
    'rows': rows,
    'length': length,
    'insertions': args.insert,
    'seconds': seconds,
    'same_tokens': same,
    'cached_us': 1e6 * max(middle['cached'] - middle['prompt'], 0.0) / args.insert / rows,
    'cached_with_prompt_us': 1e6 * middle['cached'] / args.insert / rows,
    'whole_us': 1e6 * middle['whole'] / args.insert / rows,
  }


def arm_cells(row: dict) -> dict[str, str]:
  """A row of the second table."""
  return {
    'rows': str(row['rows']),
    'written at': f'{row["length"] - row["insertions"]} - {row["length"]}',
    'us / token, whole row': _report.number(row['whole_us']),
    'with the cache': _report.number(row['cached_us']),
    '... and its prompt': _report.number(row['cached_with_prompt_us']),
    'x faster': f'{row["whole_us"] / row["cached_us"]:.1f}' if row['cached_us'] else '–',
    '... with its prompt': f'{row["whole_us"] / row["cached_with_prompt_us"]:.1f}',
    'same tokens': f'{100 * row["same_tokens"]:.1f} %',
  }


def parse(argv):
  """Read the flags."""
  parser = _report.Parser(__doc__)
  parser.add_argument('--batches', type=_report.positives, default=[1, 8, 64], help='numbers of rows')
  parser.add_argument(
    '--lengths', type=_report.positives, default=[16, 64, 128, 256, 512, 1024], help='current lengths, at least 16'
  )
  parser.add_argument(
    '--arm_lengths', type=_report.positives, default=[128, 512], help='lengths of the table with and without a cache'
  )
  parser.add_argument('--insert', type=_report.positive, default=16, help='tokens of a call; fewer where it takes long')
  parser.add_argument(
    '--size', choices=list(_report.SIZES), help='of the model: xtiny2 on a CPU by default, else small'
  )
  parser.add_argument('--compute', choices=_report.COMPUTE, default='mixed', help='type of the matrix products')
  parser.add_argument('--vocab', type=_report.positive, default=_report.LM1B_VOCABULARY, help='words')
  parser.add_argument('--top_p', type=float, default=0.0, help='draw tokens from this nucleus; 0: greedy')
  parser.add_argument('--max_length', type=_report.positive, default=1024, help='that the buffers may grow to')
  parser.add_argument('--seconds', type=float, default=15.0, help='for each row of the table, 2 timed calls at least')
  parser.add_argument('--json', metavar='FILE', help='where to write everything that was measured')
  args = parser.parse_args(argv)
  if min(args.lengths) < args.insert:
    parser.error(f'--lengths={min(args.lengths)} has no room for --insert={args.insert} tokens')
  if min(args.arm_lengths) <= args.insert + 2:
    parser.error(f'--arm_lengths={min(args.arm_lengths)} has no room for --insert={args.insert} tokens and a prompt')
  if max(args.lengths) > args.max_length:
    parser.error(f'--lengths={max(args.lengths)} is longer than --max_length={args.max_length}')
  return args


def cells(row: dict, shortest: dict) -> dict[str, str]:
  """A row of the table; the ratios are to the shortest length of the same number of rows."""
  middle, least = statistics.median(row['token_us']), statistics.median(shortest['token_us'])
  return {
    'rows': str(row['rows']),
    'length': str(row['length']),
    'inserted at': f'{row["from"]} - {row["to"]}',
    'buffer': str(row['buffer']),
    'us / token (min - max)': _report.median_of(row['token_us']),
    'ms / pass': _report.number(1e3 * statistics.median(row['pass_seconds'])),
    'x shortest': f'{middle / least:.2f}',
    'calls': str(len(row['seconds'])),
    'compiled after warm-up': str(row['compilations']),
  }


def main(argv=None) -> int:
  """Measure every (rows, length); returns 1 if something was compiled after its warm-up."""
  args = parse(argv)
  size = args.size or ('xtiny2' if jax.default_backend() == 'cpu' else 'small')
  args.model_cfg = transformer.ModelConfig.create(args.vocab, **_report.SIZES[size], compute=args.compute)
  params = jax.jit(lambda: nn.unbox(transformer.init(args.model_cfg, jax.random.key(0))))()
  compilations, samplers, measured, code = _report.Compilations(), {}, {}, 0
  todo = [(rows, length) for rows in sorted(args.batches) for length in sorted(args.lengths)]
  try:
    for done, (rows, length) in enumerate(todo):
      guess = predict(args, measured, rows, length)
      number = insertions(args, guess)
      expected = f', about {_report.duration((1 + LEAST) * (number + 1) * guess)} and a compilation' if measured else ''
      _report.note(f'[{done + 1}/{len(todo)}] {rows} rows of length {length}, {number} insertions{expected}')
      row = measure(args, params, samplers, compilations, rows=rows, length=length, number=number)
      measured[rows, length] = row
      _report.note(f'      {_report.number(statistics.median(row["token_us"]))} us / token')
  except KeyboardInterrupt:
    code = 130
  if measured:
    compiled = sum(row['compilations'] for row in measured.values())
    shortest = {}
    for (rows, _), row in measured.items():
      shortest.setdefault(rows, row)
    drawn = f'nucleus of {args.top_p}' if args.top_p else 'greedy'
    print(_report.machine())
    print(
      f'size {size}, compute {args.compute}, vocabulary {args.vocab:,}, {drawn}; x shortest: within the same rows\n'
    )
    print(_report.table([cells(row, shortest[row['rows']]) for row in measured.values()]))
    print(f'\ncompilations after warm-up: {compiled}')
    code = code or int(compiled > 0)
  written = []
  if code != 130:
    args.arm_cfg = dataclasses.replace(args.model_cfg, causal=True, stop_head=False)
    params = jax.jit(lambda: nn.unbox(transformer.init(args.arm_cfg, jax.random.key(0))))()
    try:
      for rows in sorted(args.batches):
        for length in sorted(args.arm_lengths):
          _report.note(f'left to right, {rows} rows of length {length}')
          written.append(measure_arm(args, params, rows=rows, length=length))
    except KeyboardInterrupt:
      code = 130
  if written:
    print('\nfrom left to right\n')
    print(_report.table([arm_cells(row) for row in written]))
  if args.json and (measured or written):
    plain = {key: value for key, value in vars(args).items() if not key.endswith('_cfg')} | {'size': size}
    tables = {'rows': list(measured.values()), 'left_to_right': written}
    _report.write_json(args.json, arguments=plain, machine=_report.machine(), **tables)
  return code


if __name__ == '__main__':
  sys.exit(main())
