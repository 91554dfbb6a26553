"""Ahead-of-time compilation: the FLOP formula, the printed report, and tests with the real TPU compiler."""

import dataclasses
import functools
import importlib.util
import re
import subprocess
import sys

import jax
import pytest
import small

from ilm_jax.aot import compile, roofline
from ilm_jax.distributed import sharding
from ilm_jax.models import transformer
from ilm_jax.training import optimizer, train_step
from ilm_jax.training.experiment import build
from ilm_jax.types import UserError

QUICK = {**small.NO_DROPOUT, 'model.num_heads': 4, 'task.num_nodes': 25}


def test_the_training_flop_formula_agrees_with_the_operations_that_xla_counts():
  changes = {**QUICK, 'loss.vocab_chunk': 4096, 'model.d_model': 64, 'model.d_ff': 256}
  exp = build(small.config(changes), devices=jax.devices()[:1])
  data, shape = exp.cfg.data, (exp.cfg.data.rows, exp.cfg.data.row_length, 2 * exp.cfg.data.row_length)
  counted = compile.lower_training(exp).cost_analysis()['flops']
  assert 0.9 < roofline.training_flops(exp.model_cfg, *shape) / counted < 1.05
  assert data.rows * data.row_length == 352


def test_the_training_flop_formula_counts_recomputation_only_on_request():
  cfg = transformer.ModelConfig(vocab_size=7, num_layers=2, num_heads=1, d_model=4, d_ff=6)
  blocks = 2 * (8 * 16 + 4 * 4 * 6 + 4 * 5 * 4)  # FLOPs of 2 blocks per position: projections, MLP, attention
  # FLOPs of the forward pass of 3 rows: 5 positions with a vocabulary of 7, and 10 targets, all of width 4.
  once = 3 * (5 * (blocks + 2 * 7 * 4) + 10 * 2 * 4)
  again = 3 * 5 * 2 * 7 * 4
  assert roofline.training_flops(cfg, 3, 5, 10, again=False) == 3 * once
  assert roofline.training_flops(cfg, 3, 5, 10) == 3 * once + again
  remat = dataclasses.replace(cfg, remat=True)
  assert roofline.training_flops(remat, 3, 5, 10) == 3 * once + again + 3 * 5 * blocks
  assert roofline.training_flops(remat, 3, 5, 10, again=False) == 3 * once


def test_a_program_that_does_not_fit_into_memory_is_reported(capsys, tmp_path):
  message = 'RESOURCE_EXHAUSTED: Ran out of memory on HBM: 192G exceeds 15.75G'

  class Lowered:
    def compile(self):
      raise jax.errors.JaxRuntimeError(message)

  compile.compile_and_print(Lowered(), [], roofline.CHIPS['v5e'], tmp_path)
  assert capsys.readouterr().out == f'  DOES NOT FIT: {message}\n'


def test_the_abstract_training_state_has_the_shapes_and_shardings_of_the_real_one():
  cfg = small.config({**QUICK, 'mesh.fsdp': 2, 'mesh.tensor': 2})
  exp = build(cfg)
  tx, _ = optimizer.make_optimizer(cfg.optimizer, cfg.steps)
  state, _ = train_step.init_state(exp, tx)
  for made, said in zip(jax.tree.leaves(state), jax.tree.leaves(train_step.abstract_state(exp, tx)), strict=True):
    assert (made.shape, made.dtype, made.sharding) == (said.shape, said.dtype, said.sharding)
  compiled = compile.lower_training(exp).compile()
  held = sum(map(sharding.bytes_per_device, jax.tree.leaves(state)))
  assert held <= roofline.memory_of(compiled)['arguments'] < 1.2 * held + 20_000


@pytest.fixture(scope='module')
def command(tmp_path_factory):
  """Return a function that runs `ilm_jax.aot.compile` with 8 CPU devices: arguments -> (exit code, stdout, stderr)."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv('JAX_NUM_CPU_DEVICES', '8')
    patch.setenv('JAX_ENABLE_X64', '1')  # has no effect: the program is that of training, in 32-bit mode
    commands = small.Commands(tmp_path_factory.mktemp('commands'))
  yield functools.partial(commands, 'ilm_jax.aot.compile')
  commands.close()


def test_the_compile_command_reports_memory_and_collectives_of_training_and_decoding(command):
  words = small.flags(changes={**QUICK, 'mesh.data': 2, 'mesh.fsdp': 2, 'mesh.tensor': 2})
  code, out, err = command([*words, '--topology=cpu:8'])
  assert code == 0, err
  assert "mesh {'data': 2, 'fsdp': 2, 'tensor': 2}; ilm, 1 blocks of width 16, vocabulary 32, float32" in out
  assert re.search(r'training step: 8 rows of 44, .* TFLOP, .* GFLOP per device', out)
  assert len(re.findall(r'memory per device, GiB: \d', out)) == 2
  assert len(re.findall(r'all-reduce: \d+ per step, [\d.]+ MB sent per device', out)) == 2
  assert 'decoding step: 32 rows of 22' in out and 'predicted' not in out  # no predicted times for CPUs


@pytest.mark.parametrize('topology', ['', 'v9:2x2', 'v5e', 'v5e:2xtwo', 'cpu:16', 'cpu:²'])
def test_an_unknown_topology_gives_a_one_line_error(topology, command):
  code, out, err = command([*small.flags(), f'--topology={topology}'])
  assert code == 1 and not out and err.count('\n') == 1 and err.startswith('error: --topology')


@pytest.mark.skipif(importlib.util.find_spec('libtpu') is not None, reason='libtpu is installed')
def test_the_error_for_a_missing_tpu_compiler_says_how_to_install_it(command):
  code, out, err = command([*small.flags(), '--topology=v5e:2x4'])
  assert code == 1 and not out
  assert err.startswith('error: libtpu is not installed') and "pip install -e '.[tpu]'" in err and err.count('\n') == 1


def test_an_experiment_can_be_built_without_data_if_the_vocabulary_size_is_given():
  exp = build(small.config(), devices=jax.devices()[:1], vocab_size=30_522)
  assert exp.model_cfg.vocab_size == 30_522
  with pytest.raises(UserError, match=r'is not divisible by mesh\.tensor=8'):
    build(small.config({'mesh.tensor': 8}), vocab_size=96)


# --- the real TPU compiler: pip install -e '.[tpu]' -------------------------------------------------------------------

WITHOUT = 'unset XLA_FLAGS JAX_DISABLE_MOST_OPTIMIZATIONS;'  # these variables of the tests suit only the CPU compiler
GATHERED = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
from ilm_jax.aot import compile, roofline

context = compile.compiler_log()
log = context.__enter__()
devices = compile.devices_of('v5e:2x4')
mesh = Mesh(np.array(devices).reshape(4, 2), ('a', 'b'), axis_types=(AxisType.Auto,) * 2)

@jax.jit
def step(x):
  x = jax.lax.with_sharding_constraint(jnp.sin(x), NamedSharding(mesh, P(('a', 'b'), None, None)))
  return jax.lax.with_sharding_constraint(jnp.cos(x), NamedSharding(mesh, P(None, 'b', 'a')))

compile.compile_and_print(step.lower(jax.ShapeDtypeStruct((8, 8, 8), jnp.float32)), devices, roofline.CHIPS['v5e'], log)
context.__exit__(None, None, None)
"""


@pytest.mark.long
def test_involuntary_rematerializations_by_the_tpu_compiler_are_reported(tmp_path):
  pytest.importorskip('libtpu')
  cpu_only = ('XLA_FLAGS', 'JAX_DISABLE_MOST_OPTIMIZATIONS')
  env = {name: value for name, value in small.environment(tmp_path).items() if name not in cpu_only}
  env |= {'TPU_SKIP_MDS_QUERY': '1', 'TPU_ACCELERATOR_TYPE': '', 'ALLOW_MULTIPLE_LIBTPU_LOAD': '1'}
  done = subprocess.run([sys.executable, '-c', GATHERED], env=env, cwd=small.ROOT, capture_output=True, text=True)
  assert re.search(r'involuntary full rematerializations: [1-9]\d*; The compiler cannot go from', done.stdout), done


@pytest.mark.long
@pytest.mark.parametrize('mesh', [{'fsdp': 8}, {'data': 2, 'fsdp': 2, 'tensor': 2}])
def test_the_tpu_compiler_gathers_weights_but_neither_activations_nor_logits(mesh, tmp_path):
  pytest.importorskip('libtpu')
  width, hidden, vocab, rows = 768, 3072, 10_240, 32
  sizes = {'num_layers': 2, 'scan_layers': True, 'compute': 'bfloat16'}
  data = {'rows': rows, 'batch_size': 4 * rows, 'groups': 2}
  words = ['--config=configs/tinystories.py', '--topology=v5e:2x4', f'--vocab_size={vocab}', '--slots=16']
  for name, settings in (('model', sizes), ('data', data), ('mesh', {'data': 1, **mesh})):
    words += [f'--config.{name}.{key}={value}' for key, value in settings.items()]
  code, out, err = small.run(words, tmp_path, module='ilm_jax.aot.compile', before=WITHOUT)
  assert code == 0 and 'ematerialization' not in err, err
  assert re.findall(r'involuntary full rematerializations: (.*)', out) == ['0', '0']
  weight = 2 * max(width * hidden, vocab * width) / 1e6  # MB of the largest weight matrix, with 2 bytes per number
  rows_of_group = rows / mesh.get('data', 1)
  features = 2 * rows_of_group * 1024 * width / 1e6  # MB (bfloat16) of a data-parallel group: 1024 positions a row
  found = [float(size) for size in re.findall(r'all-gather: .*; the largest: ([\d.]+) MB', out)]
  assert found and max(found) <= weight + 0.05 < features
