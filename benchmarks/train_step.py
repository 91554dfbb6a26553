"""Training step time and memory: padded against packed rows, chunked against dense vocabulary logits.

A step is a training step of `ilm_jax.training.loop` (forward, backward, AdamW, moving average of the weights), on one
group of examples and one device. The variants are:

    padded        one example per row, padded to the block length
    packed        several examples per row, with as many rows as the largest of many groups of examples needs
    ...-dense     with a loss that materializes logits and targets of size rows x positions x vocabulary

The data sets (--mixes) are star_hard (the graphs and the vocabulary of the config star:hard), lm1b (random words,
lognormal lengths with mean 29) and full (random words, every example has 128 tokens).

Gradients are accumulated over parts of about --positions positions, the same for every variant, so that ratios compare
equal conditions. Each configuration runs in its own process, so that peak memory is measured separately.
"""

import dataclasses
import itertools
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import time
import types
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from benchmarks import _report
from ilm_jax import families, tasks
from ilm_jax.configs import default, star
from ilm_jax.data import pipeline
from ilm_jax.distributed import sharding
from ilm_jax.families import ilm
from ilm_jax.models import numerics, transformer, vocabulary
from ilm_jax.special_tokens import BOS, CLS, SPECIAL
from ilm_jax.training import experiment, optimizer, train_step

VARIANTS = ('padded', 'packed', 'padded-dense', 'packed-dense')
GOALS = {'lm1b': 5.0, 'full': 1.7}  # expected speed-up of packed over padded rows, in examples per second
EXAMPLES = {'star_hard': 256, 'lm1b': 256, 'full': 512}  # examples per training step
BLOCK = 128  # maximum tokens per example of lm1b and full
SURVEYED = 25_600  # number of examples that are packed to find out how many rows a batch needs
TIMED_GROUPS = 4  # groups of examples that the timed steps alternate between
MIN_STEPS, MAX_STEPS = 2, 50  # timed steps per configuration
GIB = 2**30


# --- training data ----------------------------------------------------------------------------------------------------


class Mix(NamedTuple):
  """A data set for the benchmark, and the shape of its rows."""

  source: Any  # source[index] is an example
  vocab_size: int
  block: int  # length of a padded row
  row_length: int  # length of a packed row
  segments: int  # maximum examples per packed row


class Text:
  """Examples `[CLS] [BOS] word word ...` of random words; `length(rng)` draws the number of words."""

  def __init__(self, vocab_size: int, length):
    self.vocab_size, self.length = vocab_size, length

  def __getitem__(self, index: int):
    rng = np.random.default_rng((7, index))
    words = rng.integers(len(SPECIAL), self.vocab_size, size=self.length(rng))
    tokens = np.array([CLS, BOS, *words], np.int32)
    return {'tokens': tokens, 'fixed': np.arange(len(tokens)) < 2}


def lm1b_length(rng) -> int:
  """Draw the number of words in a sentence: lognormal with mean 29, at most 126."""
  sigma = 0.6
  return int(np.clip(round(rng.lognormal(math.log(29) - sigma**2 / 2, sigma)), 1, BLOCK - 2))


def star_hard(vocab_size: int) -> Mix:
  """Return the graphs, vocabulary and row shape of the config star:hard."""
  del vocab_size
  cfg = star.get_config('hard')
  task = tasks.get(cfg.task.name)
  source, words = task.source(cfg.task, 'train'), task.tokenizer(cfg.task).vocab_size
  return Mix(source, words, task.longest(cfg.task), cfg.data.row_length, cfg.data.segments)


MIXES = {
  'star_hard': star_hard,
  'lm1b': lambda vocab_size: Mix(Text(vocab_size, lm1b_length), vocab_size, BLOCK, BLOCK, 32),
  'full': lambda vocab_size: Mix(Text(vocab_size, lambda rng: BLOCK - 2), vocab_size, BLOCK, BLOCK, 32),
}


def corrupted(mix: Mix, group: int, examples: int, cfg) -> list[dict]:
  """Return the examples of group number `group`, corrupted as in training."""
  ids = range(group * examples, (group + 1) * examples)
  return [ilm.corrupt(pipeline.example_rng(0, 'train', i), mix.source[i], cfg.corrupt) for i in ids]


def shape_of(mix: Mix, packed: bool, groups: list[list[dict]]) -> pipeline.Shape:
  """Return the batch shape of a variant; packed batches have the number of rows that the largest group needs."""
  examples = len(groups[0])
  if not packed:
    return pipeline.Shape(examples, mix.block, targets=mix.block, segments=1)
  shape = pipeline.Shape(examples, mix.row_length, targets=2 * mix.row_length, segments=mix.segments)
  sizes = [[(len(e['tokens']), len(e['target_token'])) for e in group] for group in groups]
  rows = max(max(pipeline.assign_rows(group, shape)) + 1 for group in sizes)
  return dataclasses.replace(shape, rows=rows)


def split_rows(rows: int, length: int, positions: int) -> tuple[int, int]:
  """Return how gradient accumulation splits the rows of a batch: (number of parts, rows per part).

  A part has between 3/4 of `positions` and `positions`, rounded up to whole rows. Within this range, the split that
  adds the fewest padding rows is chosen.
  """
  most = min(rows, math.ceil(positions / length))
  part_rows = min(range(most, math.ceil(most * 3 / 4) - 1, -1), key=lambda n: math.ceil(rows / n) * n)
  return math.ceil(rows / part_rows), part_rows


# --- the dense loss ---------------------------------------------------------------------------------------------------


def dense_loss(outputs, batch, cfg):
  """Compute the loss of `families.ilm` from dense logits_BxLxV and targets_BxLxV, the baseline for the chunked loss."""
  segments = batch['cls_BxS'].shape[1]
  compute = vocabulary.head_compute(cfg.compute)
  logits_BxLxV = numerics.einsum('bld,vd->blv', outputs.hidden_BxLxD, outputs.unembed_VxD, compute)
  lse_BxL = jax.nn.logsumexp(logits_BxLxV, axis=-1)
  log_z_BxS = numerics.segment_logsumexp(lse_BxL, batch['segment_BxL'], batch['open_BxL'], segments)
  log_z_BxL = jnp.take_along_axis(log_z_BxS, jnp.maximum(batch['segment_BxL'] - 1, 0), axis=1)

  valid_BxT = (batch['target_segment_BxT'] > 0).astype(jnp.float32)
  dropped_BxS = numerics.segment_sum(valid_BxT, batch['target_segment_BxT'], segments)
  share_BxS = batch['segment_weight_BxS'] / jnp.maximum(dropped_BxS, 1)
  share_BxT = valid_BxT * jnp.take_along_axis(share_BxS, jnp.maximum(batch['target_segment_BxT'] - 1, 0), axis=1)
  row_Bx1 = jnp.arange(share_BxT.shape[0])[:, None]
  index = row_Bx1, batch['target_gap_BxT'], batch['target_token_BxT']
  target_BxLxV = jnp.zeros(logits_BxLxV.shape, jnp.float32).at[index].add(share_BxT)
  token = jnp.where(target_BxLxV > 0, target_BxLxV * (log_z_BxL[..., None] - logits_BxLxV), 0.0).sum()

  log_stop_BxSx2 = jax.nn.log_softmax(outputs.stop_BxSx2, axis=-1)
  stop_BxS = -jnp.where(dropped_BxS > 0, log_stop_BxSx2[..., 1], log_stop_BxSx2[..., 0])
  stop = (batch['segment_weight_BxS'] * stop_BxS).sum()
  return {'loss': (token + cfg.stop_weight * stop, batch['segment_weight_BxS'].sum())}


# --- one configuration, in its own process ----------------------------------------------------------------------------


def measure(args, name: str, variant: str) -> dict:
  """Measure the time and memory of training steps with one configuration: a data set and a variant."""
  mix, packed, dense = MIXES[name](args.vocab), variant.startswith('packed'), variant.endswith('dense')
  cfg, examples = default.get_config(), args.examples or EXAMPLES[name]
  number = max(TIMED_GROUPS, SURVEYED // examples) if packed else TIMED_GROUPS
  groups = [corrupted(mix, i, examples, cfg) for i in range(number)]
  shape = shape_of(mix, packed, groups)
  parts, part_rows = split_rows(shape.rows, shape.length, args.positions)
  shape = dataclasses.replace(shape, rows=parts * part_rows)
  cfg.data.batch_size = examples
  cfg.optimizer.accumulation_steps = parts

  exp = experiment.Experiment(
    cfg=cfg,
    family=types.SimpleNamespace(loss=dense_loss) if dense else families.get('ilm'),
    task=None,
    model_cfg=transformer.ModelConfig.create(mix.vocab_size, **_report.SIZES[args.size], compute=args.compute),
    sample_cfg=None,
    loss_cfg=ConfigDict({**cfg.loss.to_dict(), 'compute': args.compute}),
    mesh=sharding.make_mesh(cfg.mesh, jax.devices()[:1]),
  )
  tx, schedule = optimizer.make_optimizer(cfg.optimizer, cfg.steps)
  state, abstract = train_step.init_state(exp, tx)
  packs = [pipeline.pack(group, list(range(len(group))), shape) for group in groups[:TIMED_GROUPS]]
  batches = itertools.cycle([sharding.put_global_batch(batch, exp.mesh) for batch in packs])

  start = time.perf_counter()
  step = train_step.compile_step(exp, tx, schedule, abstract).lower(state, next(batches)).compile()
  compile_seconds = time.perf_counter() - start
  memory = step.memory_analysis()

  compilations, seconds, losses = _report.Compilations(), [], []
  while len(seconds) < 1 + MIN_STEPS or (sum(seconds[1:]) < args.seconds and len(seconds) < 1 + MAX_STEPS):
    start = time.perf_counter()
    state, pairs = jax.block_until_ready(step(state, next(batches)))
    seconds.append(time.perf_counter() - start)
    losses.append(float(pairs['loss'][0] / pairs['loss'][1]))
    if float(pairs['left_out_examples'][0]) or not math.isfinite(losses[-1]):
      left_out = float(pairs['left_out_examples'][0])
      raise AssertionError(f'{left_out:.0f} examples did not fit into the rows; the loss is {losses[-1]}')
    if len(seconds) == 1:
      _report.progress(f'      compiled in {compile_seconds:.0f} s, first step {seconds[0]:.3g} s')
      compilations.count = 0
  return {
    'mix': name,
    'variant': variant,
    'examples': examples,
    'rows': shape.rows,
    'length': shape.length,
    'parts': parts,
    'seconds': seconds[1:],
    'examples_per_second': examples / statistics.median(seconds[1:]),
    'kept_tokens': statistics.mean(int((batch['segment_BxL'] > 0).sum()) for batch in packs),
    'program_bytes': memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes
    - memory.alias_size_in_bytes,
    'peak_bytes': peak_bytes(),
    'losses': losses,
    'compile_seconds': compile_seconds,
    'compilations': compilations.count,
    'machine': _report.machine(),
  }  # fmt: skip


def peak_bytes() -> int:
  """Return the peak memory use so far: of the device, or on a CPU the resident memory of this process."""
  stats = jax.devices()[0].memory_stats()
  if stats:
    return stats['peak_bytes_in_use']
  try:
    with open('/proc/self/status') as file:  # on Linux, ru_maxrss would include the parent process's memory at the fork
      return next(int(line.split()[1]) * 1024 for line in file if line.startswith('VmHWM'))
  except (OSError, StopIteration):
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)


# --- the command ------------------------------------------------------------------------------------------------------


def parse(argv):
  """Parse the command line."""
  parser = _report.Parser(__doc__)
  parser.add_argument(
    '--mixes', type=_report.subset_of(MIXES), default=list(MIXES), help=f'data sets: {",".join(MIXES)} (default: all)'
  )
  parser.add_argument(
    '--variants',
    type=_report.subset_of(VARIANTS),
    help=f'{",".join(VARIANTS)} (default: all, but no dense loss for full)',
  )
  default_examples = ', '.join(f'{number} for {mix}' for mix, number in EXAMPLES.items())
  parser.add_argument('--examples', type=_report.positive, help=f'examples per step (default: {default_examples})')
  parser.add_argument(
    '--positions',
    type=_report.positive,
    help='positions per forward pass of gradient accumulation (default: 2048 on a CPU, 32768 on other devices)',
  )
  parser.add_argument(
    '--seconds',
    type=_report.seconds,
    default=10.0,
    help='time limit per configuration, for at least 2 timed steps (default: 10)',
  )
  parser.add_argument('--one', metavar='MIX:VARIANT', help='measure one configuration in this process and print JSON')
  parser.add_common_flags(size='small')
  return parser.parse_args(argv)


def cells(row: dict, baseline: dict | None) -> dict[str, str]:
  """Format a row of the table; `baseline` is the padded variant of the same data set, for the ratios."""

  def ratio(key):
    return f'{row[key] / baseline[key]:.2f}' if baseline else '-'

  seconds = statistics.median(row['seconds'])
  return {
    'mix': row['mix'],
    'variant': row['variant'],
    'examples': str(row['examples']),
    'rows x positions': f'{row["rows"]} x {row["length"]}',
    'parts': str(row['parts']),
    's / step (min - max)': _report.median_of(row['seconds']),
    'examples / s': _report.number(row['examples_per_second']),
    'speed-up': ratio('examples_per_second'),
    'kept tokens / s': _report.number(row['kept_tokens'] / seconds),
    'program GiB': f'{row["program_bytes"] / GIB:.2f}',
    'x program': ratio('program_bytes'),
    'peak GiB': f'{row["peak_bytes"] / GIB:.2f}',
    'x peak': ratio('peak_bytes'),
  }


def summary(rows: list[dict], failed: list[str], args) -> str:
  """Format the report: the machine, the table, the speed-ups from packing, and the configurations that failed."""
  speed = {(row['mix'], row['variant']): row['examples_per_second'] for row in rows}
  baselines = {row['mix']: row for row in rows if row['variant'] == 'padded'}
  lines = [
    rows[0]['machine'],
    f'size {args.size}, compute {args.compute}; gradients accumulated over parts of at most {args.positions} positions',
    'speed-up, x program and x peak: ratios to the variant padded',
    'program: arguments, temporaries and results of the compiled step; peak: peak memory of the device or CPU process',
    '',
    _report.table([cells(row, baselines.get(row['mix'])) for row in rows]),
    '',
  ]
  for mix in args.mixes:
    if (mix, 'padded') in speed and (mix, 'packed') in speed:
      goal = f' (goal: {GOALS[mix]})' if mix in GOALS else ''
      ratio = speed[mix, 'packed'] / speed[mix, 'padded']
      lines.append(f'{mix}: packing gives {ratio:.2f} times the examples per second{goal}')
  return '\n'.join([*lines, *failed])


def main(argv=None) -> int:
  """Run the benchmark; return 1 if a configuration failed, and 130 after Ctrl-C."""
  argv = sys.argv[1:] if argv is None else argv
  args = parse(argv)
  if args.one:
    args.positions = args.positions or (2048 if jax.default_backend() == 'cpu' else 32_768)
    mix, variant = args.one.split(':')
    print(json.dumps({**measure(args, mix, variant), 'positions': args.positions}))
    return 0
  rows, failed, code, start = [], [], 0, time.monotonic()
  todo = [
    (mix, variant) for mix in args.mixes for variant in args.variants or (VARIANTS[:2] if mix == 'full' else VARIANTS)
  ]
  for done, (mix, variant) in enumerate(todo):
    left = f', about {_report.duration((time.monotonic() - start) / done * (len(todo) - done))} left' if done else ''
    _report.progress(f'[{done + 1}/{len(todo)}] {mix} {variant}{left}')
    command = [sys.executable, '-m', 'benchmarks.train_step', *argv, f'--one={mix}:{variant}']
    paths = [str(_report.ROOT), *filter(None, [os.environ.get('PYTHONPATH')])]
    env = {**os.environ, 'PYTHONPATH': os.pathsep.join(paths)}
    try:
      child = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=env)
    except KeyboardInterrupt:
      code = 130
      break
    if child.returncode:
      reason = 'killed, probably out of memory' if child.returncode == -9 else f'exit code {child.returncode}'
      failed.append(f'{mix} {variant}: failed ({reason})')
      _report.progress(f'      failed: {reason}')
      code = 1
      continue
    rows.append(json.loads(child.stdout.splitlines()[-1]))
    args.positions = rows[-1]['positions']
    _report.progress(f'      {_report.number(rows[-1]["examples_per_second"])} examples / s')
  if rows:
    print(summary(rows, failed, args))
    if args.json:
      _report.write_json(args.json, arguments=vars(args), machine=rows[0]['machine'], rows=rows, failed=failed)
  return code


if __name__ == '__main__':
  sys.exit(_report.run(main))
