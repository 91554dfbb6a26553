"""Compile a config ahead of time for devices that are not attached, with the real TPU compiler.

    ilm-jax compile --config=lm1b:full --topology=v5e:4x4 --config.mesh.fsdp=16

A topology names a chip and the shape of a slice: v4:2x2x1, v5e:2x4, v5p:4x4x4, v6e:16x16; cpu:8 compiles for eight CPU
devices. Only the config is read: the corpus and its tokenizer need not exist. For the training step and for a decoding
step, the command prints memory per device, collectives, and arrays that the compiler gathers unnecessarily; for the
training step also its floating-point operations, from a formula, and a roofline prediction (not a measurement) from the
chip's published limits. Needs libtpu (pip install 'ilm_jax[tpu]'), which runs on any x86_64 Linux machine.
"""

import contextlib
import functools
import math
import os
import re
import sys
import tempfile
import time
from pathlib import Path

from absl import flags

from ilm_jax import main as entry
from ilm_jax.aot import roofline
from ilm_jax.console import quiet
from ilm_jax.types import UserError


def define(values: flags.FlagValues) -> None:
  """Define the flags of `ilm-jax compile` except --config."""
  topology = 'TPU version and slice shape to compile for, such as v5e:2x4; cpu:8 compiles for eight CPU devices.'
  slots = 'Number of sequences in the compiled decoding step; 0: eight for each data-parallel group of devices.'
  flags.DEFINE_string('topology', None, topology, flag_values=values)
  flags.DEFINE_integer('vocab_size', None, 'Vocabulary size; by default that of the config.', flag_values=values)
  flags.DEFINE_integer('slots', 0, slots, flag_values=values)


def devices_of(topology: str):
  """Return the devices of a topology as compilation targets; they need not be attached to this machine."""
  kind, _, shape = topology.partition(':')
  sizes = shape.split('x')
  if kind not in (*roofline.CHIPS, 'cpu') or not all(size.isdecimal() and int(size) for size in sizes):
    chips = ', '.join(roofline.CHIPS)
    raise UserError(f'--topology={topology}: expected {chips} and the shape of a slice, such as v5e:2x4, or cpu:8')
  import jax
  from jax.experimental import topologies

  if kind == 'cpu':
    count = math.prod(map(int, sizes))
    if (found := len(jax.devices())) < count:
      raise UserError(f'--topology={topology}: there are {found} CPU devices; set JAX_NUM_CPU_DEVICES={count}')
    return jax.devices()[:count]
  try:
    return topologies.get_topology_desc(topology, 'tpu').devices
  except Exception as error:  # libtpu raises its own error types
    text = ' '.join(str(error).split())
    message = f'--topology={topology} is not available ({text[:160]}): check that slices of this shape exist'
    if 'lockfile' not in text and ('not installed' in text or 'libtpu' in text.lower()):
      message = f"libtpu is not installed, and compiling for TPUs needs it: pip install -e '.[tpu]' ({text[:120]})"
    raise UserError(message) from None


def lower_training(exp):
  """Return the lowered (not yet compiled) training step of an experiment."""
  import jax

  from ilm_jax.data import pipeline
  from ilm_jax.distributed import sharding
  from ilm_jax.training import optimizer, train_step

  tx, schedule = optimizer.make_optimizer(exp.cfg.optimizer, exp.cfg.steps)
  state = train_step.abstract_state(exp, tx)
  whole = pipeline.shape_of(exp.cfg.data, groups=1).empty()
  rows = sharding.rows_sharding(exp.mesh)
  batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows), whole)
  return train_step.compile_step(exp, tx, schedule, state).lower(state, batch)


def lower_sampling(exp, slots: int):
  """Return the lowered decoding step, with buffers of maximum length; None if the family has no continuous batching."""
  import jax

  from ilm_jax.inference import continuous_batching
  from ilm_jax.models import transformer

  sampler = continuous_batching.ContinuousSampler(exp.model_cfg, exp.family, exp.sample_cfg, slots, mesh=exp.mesh)
  if sampler.growth is None:
    return None
  return sampler.lower(transformer.abstract_params(exp.model_cfg, exp.mesh), jax.random.key(0), slots)


@contextlib.contextmanager
def compiler_log():
  """Yield a temporary folder for the log of the TPU compiler; must be entered before libtpu is loaded."""
  with tempfile.TemporaryDirectory(prefix='ilm-tpu-') as folder:
    os.environ['TPU_LOG_DIR'] = folder
    yield Path(folder)


def rematerialized(log: Path) -> list[str] | None:
  """Return the compiler's warnings about gathering a whole array to change its sharding; None if there is no log."""
  if not any(log.iterdir()):
    return None
  text = ''.join(file.read_text(errors='replace') for file in log.glob('*.log.WARNING.*'))
  return re.findall(r'Involuntary full rematerialization\. (.*)', text)


def compile_and_print(lowered, devices, chip, log: Path, more=None) -> None:
  """Compile a lowered program and print its costs, or that it does not fit into the memory of the devices.

  `chip` describes the devices (None: CPUs). `log` is the folder of the compiler's log. `more` maps the compiled program
  to further lines of text, which are printed for TPUs only.
  """
  import jax

  began, before = time.monotonic(), len(rematerialized(log) or ())
  try:
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    text = ' '.join(str(error).split())
    if 'RESOURCE_EXHAUSTED' not in text:
      raise
    print(f'  DOES NOT FIT: {text[text.index("RESOURCE_EXHAUSTED") :][:240]}', flush=True)
    return
  lines = roofline.describe(compiled, len(devices), chip, time.monotonic() - began)
  if chip:
    found = rematerialized(log)
    new = () if found is None else found[before:]
    count = 'unknown, because the compiler left no log' if found is None else len(new)
    lines.append(f'  involuntary full rematerializations: {count}{"".join(f"; {one[:160]}" for one in new[:3])}')
  print('\n'.join(lines + (more(compiled) if more and chip else [])), flush=True)


def run(values: flags.FlagValues, log: Path) -> int:
  """Compile the training step and a decoding step of a config and print their costs; return the exit code."""
  cfg, topology = values.config, values.topology
  # No TPU is used, so several processes may load libtpu at once.
  defaults = {'TPU_SKIP_MDS_QUERY': '1', 'TPU_ACCELERATOR_TYPE': '', 'ALLOW_MULTIPLE_LIBTPU_LOAD': '1'}
  os.environ.update({'JAX_PLATFORMS': 'cpu', **defaults, **os.environ})
  if not topology:
    raise UserError('--topology is missing: expected a chip and the shape of a slice, such as --topology=v5e:2x4')
  quiet()
  import jax

  from ilm_jax import tasks
  from ilm_jax.distributed import sharding
  from ilm_jax.training.experiment import build

  jax.config.update('jax_enable_x64', False)  # whatever JAX_ENABLE_X64 says, as in training
  jax.config.update('jax_enable_compilation_cache', False)  # cached programs for other devices could not be loaded here
  devices, chip = devices_of(topology), roofline.CHIPS.get(topology.partition(':')[0])
  words = cfg.task.get('tokenizer')  # they give the vocabulary size, so no trained tokenizer is needed
  size = values.vocab_size or (words.size if words else tasks.get(cfg.task.name).tokenizer(cfg.task).vocab_size)
  exp = build(cfg, devices=devices, vocab_size=size)
  data, sizes = cfg.data, exp.model_cfg
  shape = data.rows, data.row_length, data.targets or 2 * data.row_length
  flops, useful = (roofline.training_flops(sizes, *shape, again=again) for again in (True, False))
  print(f'{topology}: {len(devices)} devices, mesh {dict(exp.mesh.shape)}; {cfg.family}, {sizes.num_layers} blocks of '
        f'width {sizes.d_model}, vocabulary {sizes.vocab_size:,}, {sizes.compute}', flush=True)  # fmt: skip
  print(f'training step: {data.rows} rows of {data.row_length}, {flops / 1e12:,.3g} TFLOP, '
        f'{flops / len(devices) / 1e9:,.3g} GFLOP per device', flush=True)  # fmt: skip
  predict = functools.partial(roofline.roofline, flops=flops, useful=useful, devices=len(devices), chip=chip)
  compile_and_print(lower_training(exp), devices, chip, log, predict)
  slots = values.slots or 8 * sharding.num_row_shards(exp.mesh)
  lowered = lower_sampling(exp, slots)
  if lowered is None:
    print(f'decoding step not compiled: family={cfg.family} does not support continuous batching')
    return 0
  print(f'decoding step: {slots} rows of {exp.sample_cfg.max_length} tokens', flush=True)
  compile_and_print(lowered, devices, chip, log)
  return 0


def main(argv=None) -> int:
  """Run the command `ilm-jax compile`; return the exit code."""
  with compiler_log() as log:
    return entry.command(__doc__, define, functools.partial(run, log=log), argv)


if __name__ == '__main__':
  sys.exit(main())
