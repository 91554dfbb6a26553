"""Sampling cost: microseconds per generated token, by number of rows and by row length.

The first table is for family=ilm. A model with random weights, whose stop head never stops, inserts --insert tokens
anywhere into prompts of random words; --lengths are the final row lengths. A call that inserts n tokens per row makes
n + 1 forward passes, the last of which inserts nothing. The time per token counts all passes:

    us / token = seconds per call / ((n + 1) x rows)

The cost should depend on the current row length and not on --max_length, and no program should be compiled after the
warm-up call of each configuration.

The second table is for family=arm, with rows of --arm_lengths: sampling with the key-value cache, and with a forward
pass over the whole row for each token.

`benchmarks.batching` compares continuous and static batching; `benchmarks.parallel` measures several insertions per
step on a trained model.
"""

import dataclasses
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import _report
from ilm_jax import families
from ilm_jax.families import arm, ilm
from ilm_jax.families.growing import buffers
from ilm_jax.inference.static_batching import StaticSampler
from ilm_jax.models import transformer
from ilm_jax.special_tokens import BOS, CLS, SPECIAL
from ilm_jax.types import GREEDY, Prompt, Rule

MIN_CALLS, MAX_CALLS = 2, 30  # timed calls per configuration


def make_prompts(rng: np.random.Generator, rows: int, length: int, vocab_size: int) -> list[dict]:
  """Return random prompts `[CLS] [BOS] word word ...` that accept insertions everywhere but after [CLS]."""
  prompts = []
  for _ in range(rows):
    words = rng.integers(len(SPECIAL), vocab_size, size=length - 2)
    prompts.append({'tokens': np.array([CLS, BOS, *words], np.int32), 'open': np.arange(length) > 0})
  return prompts


# --- family=ilm -------------------------------------------------------------------------------------------------------


def buffer_length(args, length: int) -> int:
  """Return the length of the buffer that holds a row of `length` tokens."""
  return buffers(length, ilm.SampleConfig(args.max_length))[0]


def predict_pass_seconds(args, measured: dict, rows: int, length: int) -> float:
  """Predict the seconds per forward pass, scaling the closest configuration measured so far; 0 if there is none."""
  if not measured:
    return 0.0
  closest = max(measured, key=lambda key: (key[0] == rows, key[1] == length, key))
  growth = rows / closest[0] * buffer_length(args, length) / buffer_length(args, closest[1])
  return statistics.median(measured[closest]['pass_seconds']) * growth


def choose_insertions(args, pass_seconds: float) -> int:
  """Return the number of tokens to insert per call: --insert, halved until 1 + MIN_CALLS calls fit in --seconds."""
  count = args.insert
  while count > 1 and (1 + MIN_CALLS) * (count + 1) * pass_seconds > args.seconds:
    count //= 2
  return count


def measure(args, params, samplers: dict, compilations, *, rows: int, length: int, number: int) -> dict:
  """Time calls that insert `number` tokens into each row, after one warm-up call."""
  if (rows, number) not in samplers:
    sample_cfg = ilm.SampleConfig(
      max_length=args.max_length,
      max_steps=number,
      token=Rule(top_p=args.top_p) if args.top_p else GREEDY,
      stop_threshold=1.0,
      suppressed_tokens=tuple(range(len(SPECIAL))),
      compute=args.compute,
    )
    samplers[rows, number] = StaticSampler(args.model_cfg, families.get('ilm'), sample_cfg, rows)
  sampler, rng = samplers[rows, number], np.random.default_rng(length)
  start = max(2, length - number - 1)  # rows end one token below `length`, so that the last pass needs no larger buffer
  seconds, compiled, calls = [], 0, 0
  while len(seconds) < MIN_CALLS or (sum(seconds) < args.seconds / 2 and len(seconds) < MAX_CALLS):
    prompts, key = make_prompts(rng, rows, start, args.vocab), jax.random.key(calls)
    compiled_before, began = compilations.count, time.perf_counter()
    sampled = list(sampler(params, key, prompts))
    elapsed = time.perf_counter() - began
    if any(len(row['log_prob']) != number or row['stopped'] for row in sampled):
      raise AssertionError(f'expected {number} insertions in each row, got {[len(r["log_prob"]) for r in sampled]}')
    if calls:  # the first call compiles and is not timed
      seconds.append(elapsed)
      compiled += compilations.count - compiled_before
    calls += 1
  return {
    'rows': rows,
    'length': length,
    'from': start,
    'to': start + number,
    'buffer': buffer_length(args, start + number),
    'insertions': number,
    'seconds': seconds,
    'pass_seconds': [s / (number + 1) for s in seconds],
    'token_us': [1e6 * s / (number + 1) / rows for s in seconds],
    'compilations': compiled,
  }


def measure_all(args, measured: dict) -> None:
  """Measure every combination of --batches and --lengths for family=ilm; store the table rows in `measured`."""
  params = _report.random_params(args.model_cfg)
  compilations, samplers = _report.Compilations(), {}
  todo = [(rows, length) for rows in sorted(args.batches) for length in sorted(args.lengths)]
  for done, (rows, length) in enumerate(todo):
    pass_seconds = predict_pass_seconds(args, measured, rows, length)
    number = choose_insertions(args, pass_seconds)
    duration = _report.duration((1 + MIN_CALLS) * (number + 1) * pass_seconds)
    estimate = f', about {duration} plus compilation' if measured else ''
    _report.progress(f'[{done + 1}/{len(todo)}] {rows} rows of length {length}, {number} insertions{estimate}')
    row = measure(args, params, samplers, compilations, rows=rows, length=length, number=number)
    measured[rows, length] = row
    _report.progress(f'      {_report.number(statistics.median(row["token_us"]))} us / token')


def cells(row: dict, shortest: dict) -> dict[str, str]:
  """Format a row of the table; `shortest` is the row with the shortest length, for the column `x shortest`."""
  median, shortest_median = statistics.median(row['token_us']), statistics.median(shortest['token_us'])
  return {
    'rows': str(row['rows']),
    'length': str(row['length']),
    'row grows': f'{row["from"]} - {row["to"]}',
    'buffer': str(row['buffer']),
    'us / token (min - max)': _report.median_of(row['token_us']),
    'ms / pass': _report.number(1e3 * statistics.median(row['pass_seconds'])),
    'x shortest': f'{median / shortest_median:.2f}',
    'calls': str(len(row['seconds'])),
    'compiled after warm-up': str(row['compilations']),
  }


# --- family=arm -------------------------------------------------------------------------------------------------------


def sample_without_cache(forward, tokens_BxL, length_B, number: int, cfg):
  """Generate `number` tokens greedily, with a forward pass over the whole row for each."""

  def step(_, state):
    tokens_BxL, length_B = state
    outputs = forward(tokens_BxL, length_B)
    row_B = jnp.arange(length_B.shape[0])
    logits_BxV = arm.logits(outputs.hidden_BxLxD[row_B, length_B - 1], outputs.unembed_VxD, cfg)
    return tokens_BxL.at[row_B, length_B].set(logits_BxV.argmax(-1)), length_B + 1

  return jax.lax.fori_loop(0, number, step, (tokens_BxL, length_B))


def measure_arm(args, params, *, rows: int, length: int) -> dict:
  """Time generating the last --insert tokens of rows of this length, alternately with and without the KV cache."""
  cfg = arm.SampleConfig(
    max_length=length, max_steps=args.insert, suppressed_tokens=tuple(range(len(SPECIAL))), compute=args.compute
  )
  forward = transformer.Forward(args.arm_cfg, params)
  rng, start = np.random.default_rng(length), length - args.insert
  tokens_BxL = np.zeros((rows, length), np.int32)
  for row, prompt in enumerate(make_prompts(rng, rows, start, args.vocab)):
    tokens_BxL[row, :start] = prompt['tokens']
  length_B = np.full(rows, start, np.int32)
  last_BxL = np.arange(length)[None] == length_B[:, None] - 1
  prompt = Prompt(tokens_BxL, length_B, last_BxL, np.arange(rows))
  cached = jax.jit(lambda prompt: arm.sample(forward, jax.random.key(0), prompt, cfg).tokens_BxL)
  prefill = jax.jit(lambda prompt: arm.sample(forward, jax.random.key(0), prompt, cfg._replace(max_steps=0)).length_B)
  whole = jax.jit(lambda tokens, length: sample_without_cache(forward, tokens, length, args.insert, cfg)[0])
  calls = {
    'cached': lambda: cached(prompt),
    'prompt': lambda: prefill(prompt),
    'whole': lambda: whole(tokens_BxL, length_B),
  }
  results = {name: jax.block_until_ready(call()) for name, call in calls.items()}
  same = float((results['cached'] == results['whole'])[:, start:].mean())
  seconds = {name: [] for name in calls}
  while min(map(len, seconds.values())) < MIN_CALLS or sum(map(sum, seconds.values())) < args.seconds:
    for name, call in calls.items():
      began = time.perf_counter()
      jax.block_until_ready(call())
      seconds[name].append(time.perf_counter() - began)
    if len(seconds['whole']) >= MAX_CALLS:
      break
  median = {name: statistics.median(values) for name, values in seconds.items()}
  return {
    'rows': rows,
    'length': length,
    'insertions': args.insert,
    'seconds': seconds,
    'same_tokens': same,
    'cached_us': 1e6 * max(median['cached'] - median['prompt'], 0.0) / args.insert / rows,
    'cached_with_prompt_us': 1e6 * median['cached'] / args.insert / rows,
    'whole_us': 1e6 * median['whole'] / args.insert / rows,
  }


def measure_all_arm(args, measured: list) -> None:
  """Measure every combination of --batches and --arm_lengths for family=arm; append the table rows to `measured`."""
  args.arm_cfg = dataclasses.replace(args.model_cfg, causal=True, stop_head=False)
  params = _report.random_params(args.arm_cfg)
  for rows in sorted(args.batches):
    for length in sorted(args.arm_lengths):
      _report.progress(f'family=arm, {rows} rows of length {length}')
      measured.append(measure_arm(args, params, rows=rows, length=length))


def arm_cells(row: dict) -> dict[str, str]:
  """Format a row of the table for family=arm."""
  return {
    'rows': str(row['rows']),
    'row grows': f'{row["length"] - row["insertions"]} - {row["length"]}',
    'us / token, whole row': _report.number(row['whole_us']),
    'with the cache': _report.number(row['cached_us']),
    'with the cache and prefill': _report.number(row['cached_with_prompt_us']),
    'x faster': f'{row["whole_us"] / row["cached_us"]:.1f}' if row['cached_us'] else '–',
    'x faster with prefill': f'{row["whole_us"] / row["cached_with_prompt_us"]:.1f}',
    'same tokens': f'{100 * row["same_tokens"]:.1f} %',
  }


# --- the command ------------------------------------------------------------------------------------------------------


def parse(argv):
  """Parse the command line."""
  parser = _report.Parser(__doc__)
  parser.add_argument('--batches', type=_report.positives, default=[1, 8, 64], help='numbers of rows to measure')
  parser.add_argument(
    '--lengths', type=_report.positives, default=[16, 64, 128, 256, 512, 1024], help='row lengths of the ilm table'
  )
  parser.add_argument('--arm_lengths', type=_report.positives, default=[128, 512], help='row lengths of the arm table')
  parser.add_argument(
    '--insert', type=_report.positive, default=16, help='tokens inserted per row and call, fewer if slow (default: 16)'
  )
  parser.add_argument(
    '--top_p', type=_report.fraction, default=0.0, help='top_p of nucleus sampling of tokens; 0: greedy'
  )
  parser.add_argument(
    '--max_length', type=_report.positive, default=1024, help='maximum row length of the sampler (default: 1024)'
  )
  parser.add_argument(
    '--seconds',
    type=_report.seconds,
    default=15.0,
    help='time limit per configuration, for at least 2 timed calls (default: 15)',
  )
  parser.add_common_flags()
  args = parser.parse_args(argv)
  if min(args.lengths) < args.insert:
    parser.error(f'--lengths={min(args.lengths)} has no room for --insert={args.insert} tokens')
  if min(args.arm_lengths) <= args.insert + 2:
    parser.error(f'--arm_lengths={min(args.arm_lengths)} has no room for --insert={args.insert} tokens and a prompt')
  if max(args.lengths) > args.max_length:
    parser.error(f'--lengths={max(args.lengths)} is longer than --max_length={args.max_length}')
  return args


def main(argv=None) -> int:
  """Run the benchmark; return 1 if a program was compiled after the warm-up, and 130 after Ctrl-C."""
  args = parse(argv)
  args.model_cfg = _report.model_of(args)
  measured, measured_arm, code = {}, [], 0
  try:
    measure_all(args, measured)
  except KeyboardInterrupt:
    code = 130
  if measured:
    compiled = sum(row['compilations'] for row in measured.values())
    shortest = {}
    for (rows, _), row in measured.items():
      shortest.setdefault(rows, row)
    rule = f'nucleus sampling with top_p={args.top_p}' if args.top_p else 'greedy'
    print(_report.machine())
    print(f'size {args.size}, compute {args.compute}, vocabulary {args.vocab:,}, {rule}')
    print('x shortest: time per token relative to the shortest length with the same number of rows\n')
    print(_report.table([cells(row, shortest[row['rows']]) for row in measured.values()]))
    print(f'\ncompilations after warm-up: {compiled}')
    code = code or int(compiled > 0)
  if code != 130:
    try:
      measure_all_arm(args, measured_arm)
    except KeyboardInterrupt:
      code = 130
  if measured_arm:
    print('\nfamily=arm\n')
    print(_report.table([arm_cells(row) for row in measured_arm]))
  if args.json and (measured or measured_arm):
    arguments = {key: value for key, value in vars(args).items() if not key.endswith('_cfg')}
    tables = {'rows': list(measured.values()), 'left_to_right': measured_arm}
    _report.write_json(args.json, arguments=arguments, machine=_report.machine(), **tables)
  return code


if __name__ == '__main__':
  sys.exit(_report.run(main))
