"""What a config would cost on devices that are not here: its steps, compiled ahead of time by the real TPU compiler.

    ilm-jax compile --config=configs/lm1b.py --topology=v5e:4x4 --config.mesh.fsdp=16

A topology is the type of a chip and the shape of a slice: v4:2x2x1, v5e:2x4, v5p:4x4x4, v6e:16x16; cpu:8 compiles for
eight CPU devices. Nothing is read but the config: a corpus and its tokenizer need not be there. Printed are, on each
device, the memory of the training step and of a step of the sampler, their collectives, and what the compiler gathers
whole against its will; the arithmetic of the training step, from a formula; and what the published limits of the chip
allow: a prediction, never a measurement. Needs libtpu (pip install -e '.[tpu]'), which runs on any Linux machine of
x86_64.
"""

import atexit
import functools
import os
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from absl import flags

from ilm_jax import main as entry
from ilm_jax.console import quiet
from ilm_jax.types import UserError

_TOPOLOGY = flags.DEFINE_string('topology', None, 'Chip and slice, such as v5e:2x4; cpu:8 for eight CPU devices.')
_VOCAB = flags.DEFINE_integer('vocab_size', None, "Entries of the vocabulary; the config's own by default.")
_SLOTS = flags.DEFINE_integer('slots', 0, 'Rows of the sampler that are compiled too; 0: one for each device, times 8.')
GIB = 2**30


class Chip(NamedTuple):
  """Published limits of a chip (cloud.google.com/tpu/docs, a page for each version)."""

  memory: float  # bytes; the compiler keeps a little of it for itself
  flops: float  # a second, bfloat16
  hbm: float  # bytes a second
  ici: float  # bytes a second out of a chip, over all its links


CHIPS = {
  'v4': Chip(32 * GIB, 275e12, 1228e9, 300e9),
  'v5e': Chip(16 * GIB, 197e12, 819e9, 200e9),
  'v5p': Chip(95 * GIB, 459e12, 2765e9, 600e9),
  'v6e': Chip(32 * GIB, 918e12, 1640e9, 400e9),
}


def devices_of(topology: str):
  """The devices of a topology, to compile for."""
  import jax

  kind, _, shape = topology.partition(':')
  sizes = shape.split('x')
  if kind not in (*CHIPS, 'cpu') or not all(size.isdigit() and int(size) for size in sizes):
    raise UserError(
      f'--topology={topology}: expected one of {", ".join(CHIPS)} and the shape of a slice, such as v5e:2x4, or cpu:8'
    )
  if kind == 'cpu':
    count = functools.reduce(lambda a, b: a * int(b), sizes, 1)
    if len(jax.devices()) < count:
      raise UserError(f'--topology={topology}: there are {len(jax.devices())}; set JAX_NUM_CPU_DEVICES={count}')
    return jax.devices()[:count]
  from jax.experimental import topologies

  try:
    return topologies.get_topology_desc(topology, 'tpu').devices
  except Exception as error:  # of the runtime's own types
    text = ' '.join(str(error).split())
    if 'lockfile' not in text and ('not installed' in text or 'libtpu' in text.lower()):
      raise UserError(
        f"libtpu is not installed, and TPU programs need it: pip install -e '.[tpu]' ({text[:120]})"
      ) from None
    raise UserError(f'--topology={topology} cannot be had ({text[:160]}): is there a slice of that shape?') from None


def vocab_of(cfg) -> int:
  """The entries of a config's vocabulary, without its data."""
  from ilm_jax import tasks

  if 'tokenizer' in cfg.task:
    return cfg.task.tokenizer.size
  return tasks.get(cfg.task.name).tokenizer(cfg.task).vocab_size


# --- the two programs -------------------------------------------------------------------------------------------------


def lower_training(exp):
  """The training step, lowered."""
  import jax

  from ilm_jax.data import pipeline
  from ilm_jax.distributed import sharding
  from ilm_jax.training import optimizer, train_step

  tx, schedule = optimizer.make_optimizer(exp.cfg.optimizer, exp.cfg.steps)
  state = train_step.abstract_state(exp, tx)
  whole = pipeline.shape_of(exp.cfg.data, groups=1).empty()
  rows = sharding.rows_sharding(exp.mesh)
  batch = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows) for name, x in whole.items()}
  return train_step.compile_step(exp, tx, schedule, state).lower(state, batch)


def lower_sampling(exp, slots: int):
  """The step of the sampler at its longest buffers, lowered; None for a family that samples otherwise."""
  import jax

  from ilm_jax.inference import continuous_batching
  from ilm_jax.models import transformer

  sampler = continuous_batching.ContinuousSampler(exp.model_cfg, exp.family, exp.sample_cfg, slots, mesh=exp.mesh)
  if sampler.growth is None:
    return None
  return sampler.lower(transformer.abstract(exp.model_cfg, exp.mesh), jax.random.key(0), slots)


# --- what they cost ---------------------------------------------------------------------------------------------------


def training_flops(cfg, rows: int, length: int, targets: int, *, again: bool = True) -> float:
  """Floating-point operations of the matrix products of a training step.

  Of a position: 8 D^2 (queries, keys, values, output), 4 D F (MLP), 4 L D (scores, weighted values) in each block, and
  2 V D in the head; of a target 2 D. The gradient takes twice as many. With `again`, what is computed again for the
  gradient counts as well: the head's logits, and with `cfg.remat` the blocks; model FLOPs (of MFU) leave it out.
  """
  D, F = cfg.d_model, cfg.d_ff
  blocks = cfg.num_layers * (8 * D * D + 4 * D * F + 4 * length * D)
  head = 2 * cfg.vocab_size * D
  once = rows * (length * (blocks + head) + 2 * D * targets)
  return 3 * once + (rows * length * (head + cfg.remat * blocks) if again else 0)


def memory_of(compiled) -> dict[str, int]:
  """Bytes on each device: of the arguments, of what is computed, and the most that is alive."""
  stats = compiled.memory_analysis()
  arguments, results = stats.argument_size_in_bytes, stats.output_size_in_bytes - stats.alias_size_in_bytes
  peak = arguments + results + stats.temp_size_in_bytes + stats.generated_code_size_in_bytes
  return {'arguments': arguments, 'temporary': stats.temp_size_in_bytes, 'program': stats.generated_code_size_in_bytes,
          'peak': peak}  # fmt: skip


def describe(compiled, devices: int, chip: Chip | None, seconds: float) -> list[str]:
  """Lines on memory and collectives."""
  from ilm_jax.aot import hlo

  memory = memory_of(compiled)
  fits = ''
  if chip:
    fits = f' of {chip.memory / GIB:.0f}: {"fits" if memory["peak"] <= chip.memory else "DOES NOT FIT"}'
  parts = ', '.join(f'{name} {size / GIB:.2f}' for name, size in memory.items() if name != 'peak')
  lines = [f'  compiled in {seconds:.0f} s', f'  memory of a device, GiB: {memory["peak"] / GIB:.2f}{fits} ({parts})']
  found = hlo.collectives(compiled.as_text(), devices)
  for kind in hlo.KINDS:
    ones = [one for one in found if one.kind == kind]
    if ones:
      unsure = '' if all(one.certain for one in ones) else ', at least: some are in loops of unknown length'
      count, sent = sum(one.times for one in ones), sum(one.traffic() for one in ones)
      largest = max(ones, key=lambda one: one.size)
      lines.append(f'  {kind}: {count} a step, {sent / 1e6:,.1f} MB sent by a device{unsure}; the largest: '
                   f'{largest.size / 1e6:,.1f} MB, {largest.where[:100] or "?"}')  # fmt: skip
  return lines


def roofline(compiled, flops: float, useful: float, devices: int, chip: Chip) -> list[str]:
  """What the limits of a chip allow: the slowest of arithmetic, memory and links, none of which waits for another.

  Args:
    compiled: the step.
    flops: of it, what is computed twice included.
    useful: those without that, which MFU counts.
    devices: that share the step.
    chip: each of them.
  """
  from ilm_jax.aot import hlo

  text = compiled.as_text()
  sent = sum(one.traffic() for one in hlo.collectives(text, devices))
  times = {'arithmetic': flops / devices / chip.flops, 'HBM': hlo.moved(text) / chip.hbm, 'ICI': sent / chip.ici}
  limit = max(times, key=times.get)
  parts = ', '.join(f'{name} {1e3 * seconds:.1f}' for name, seconds in times.items())
  return [
    f'  predicted from published limits, ms a step at least: {parts}; so {limit} is the limit, and MFU at most '
    f'{100 * useful / devices / chip.flops / times[limit]:.0f} %'
  ]


@functools.cache
def compiler_log() -> Path:
  """The folder in which the TPU compiler leaves its warnings; asked for before it is loaded."""
  made = tempfile.TemporaryDirectory(prefix='ilm-tpu-')
  atexit.register(made.cleanup)
  os.environ['TPU_LOG_DIR'] = made.name
  return Path(made.name)


def rematerialized() -> list[str] | None:
  """What the TPU compiler warned that it gathers whole, knowing no other way between two shardings; None: no log."""
  if not any(compiler_log().iterdir()):
    return None
  text = ''.join(file.read_text(errors='replace') for file in compiler_log().glob('*.log.WARNING.*'))
  return re.findall(r'Involuntary full rematerialization\. (.*)', text)


def run(cfg, topology: str | None) -> int:
  """Compile, and print what it costs."""
  compiler_log()
  os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
  os.environ.setdefault('TPU_ACCELERATOR_TYPE', '')
  os.environ.setdefault('JAX_PLATFORMS', 'cpu')
  os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')  # nothing here uses a TPU, so several may compile at once
  if not topology:
    raise UserError('--topology is missing: expected a chip and the shape of a slice, such as --topology=v5e:2x4')
  quiet()
  import jax

  jax.config.update('jax_enable_compilation_cache', False)  # what is compiled cannot be loaded here
  from ilm_jax.distributed import sharding
  from ilm_jax.training.experiment import build

  devices, chip = devices_of(topology), CHIPS.get(topology.partition(':')[0])
  exp = build(cfg, devices=devices, vocab_size=_VOCAB.value or vocab_of(cfg))
  data, sizes = cfg.data, exp.model_cfg
  targets = data.targets or 2 * data.row_length
  flops = training_flops(sizes, data.rows, data.row_length, targets)
  print(f'{topology}: {len(devices)} devices, mesh {dict(exp.mesh.shape)}; {cfg.family}, {sizes.num_layers} blocks of '
        f'width {sizes.d_model}, vocabulary {sizes.vocab_size:,}, {sizes.compute}', flush=True)  # fmt: skip
  print(f'training step: {data.rows} rows of {data.row_length}, {flops / 1e12:,.3g} TFLOP, '
        f'{flops / len(devices) / 1e9:,.3g} GFLOP a device', flush=True)  # fmt: skip
  useful = training_flops(sizes, data.rows, data.row_length, targets, again=False)
  tell(lower_training(exp), devices, chip, lambda made: roofline(made, flops, useful, len(devices), chip))
  slots = _SLOTS.value or 8 * sharding.row_parts(exp.mesh)
  lowered = lower_sampling(exp, slots)
  if lowered is None:
    print(f'sampling: {cfg.family} samples whole batches; not compiled')
    return 0
  print(f'sampling: a step of {slots} rows of {exp.sample_cfg.max_length}', flush=True)
  tell(lowered, devices, chip)
  return 0


def tell(lowered, devices, chip: Chip | None, more=None) -> None:
  """Compile, and print what there is to say, also where the compiler refuses what does not fit."""
  import jax

  began, before = time.monotonic(), len(rematerialized() or ())
  try:
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    text = ' '.join(str(error).split())
    if 'RESOURCE_EXHAUSTED' not in text:
      raise
    print(f'  DOES NOT FIT: {text[text.index("RESOURCE_EXHAUSTED") :][:240]}', flush=True)
    return
  lines = describe(compiled, len(devices), chip, time.monotonic() - began)
  if chip:
    found = rematerialized()
    new = () if found is None else found[before:]
    count = 'unknown, the compiler left no log' if found is None else len(new)
    lines.append(f'  involuntary full rematerializations: {count}{"".join(f"; {one[:160]}" for one in new[:3])}')
  print('\n'.join(lines + (more(compiled) if more and chip else [])), flush=True)


def main(argv=None) -> int:
  """Run the command."""
  names = ('config', 'topology', 'vocab_size', 'slots')
  return entry.command(__doc__, names, lambda: run(flags.FLAGS.config, _TOPOLOGY.value), argv)


if __name__ == '__main__':
  sys.exit(main())
