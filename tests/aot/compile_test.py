# ruff: noqa: E501 (programs have long lines)
"""Programs compiled for devices that are not there: what is read from them, and the formula of their arithmetic."""

import dataclasses
import functools
import importlib.util
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
import small

from ilm_jax.aot import compile, hlo
from ilm_jax.distributed import sharding
from ilm_jax.models import transformer
from ilm_jax.training import optimizer, train_step
from ilm_jax.training.experiment import build
from ilm_jax.types import UserError

TEXT = """\
HloModule jit_step

%body (p: (s32[], f32[8,16])) -> (s32[], f32[8,16]) {
  %x = f32[8,16]{1,0} get-tuple-element(%p), index=1
  %gathered = f32[64,16]{1,0} all-gather(%x), channel_id=1, replica_groups=[1,8]<=[8], metadata={op_name="jit(step)/scan/head"}
  ROOT %out = (s32[], f32[8,16]{1,0}) tuple(%i, %x)
}

%condition (p: (s32[], f32[8,16])) -> pred[] {
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

%counting (p: (s32[], f32[8,16], s32[])) -> (s32[], f32[8,16], s32[]) {
  %passed = f32[8,32]{1,0} collective-permute(%y), channel_id=9, source_target_pairs={{0,1},{1,0}}
  %two = s32[] constant(2)
  %before = s32[] get-tuple-element(%p), index=2
  %after = s32[] add(%before, %two)
  ROOT %out = (s32[], f32[8,16]{1,0}, /*index=2*/s32[]) tuple(%i, %x, %after)
}

%below (p: (s32[], f32[8,16], s32[])) -> pred[] {
  %limit = s32[] constant(7)
  %count = s32[] get-tuple-element(%p), index=2
  ROOT %less = pred[] compare(%count, %limit), direction=LT
}

%unknown (p: (s32[], f32[8,16])) -> (s32[], f32[8,16]) {
  %moved = (bf16[4,16]{1,0}, bf16[4,16]{1,0}) collective-permute-start(%y), channel_id=5, source_target_pairs={{0,1},{1,0}}
  ROOT %out = (s32[], f32[8,16]{1,0}) tuple(%i, %x)
}

%all-reduce-scatter.2 (a: f32[128]) -> f32[32] {
  %whole = f32[128]{0} all-reduce(%a), channel_id=7, replica_groups=[2,4]<=[8], to_apply=%add
  ROOT %slice = f32[32]{0} dynamic-slice(%whole, %i)
}

%branch (a: f32[2]) -> f32[4] {
  ROOT %pair = ((f32[2]{0}, f32[3]{0}), (f32[4]{0}, f32[6]{0})) all-gather-start(%a, %b), channel_id=8, replica_groups=[4,2]<=[8]
}

%part.1 (a: f32[2]) -> f32[32,16] {
  ROOT %part = f32[32,16]{1,0} all-reduce(%a), channel_id=3, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
}

ENTRY %main (a: f32[8,16]) -> f32[8,16] {
  %loop = (s32[], f32[8,16]{1,0}) while(%start), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %zero = s32[] constant(0)
  %copied = s32[] copy(%zero)
  %begin = (s32[], f32[8,16]{1,0}, /*index=2*/s32[]) tuple(%i, %a, /*index=2*/%copied)
  %counted = (s32[], f32[8,16]{1,0}, /*index=2*/s32[]) while(%begin), condition=%below, body=%counting
  %other = (s32[], f32[8,16]{1,0}) while(%start), condition=%condition, body=%unknown
  %sum = (f32[32,16]{1,0}, f32[2]{0}) all-reduce(%a, %b), channel_id=2, replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_1'}, to_apply=%add
  %first = f32[32,16]{1,0} fusion(%a), kind=kCustom, calls=%part.1
  %fused = f32[32]{0} fusion(%a), kind=kCustom, calls=%all-reduce-scatter.2
  %chosen = f32[4]{0} conditional(%p, %a, %b), true_computation=%branch, false_computation=%add
  %again = f32[32,16]{1,0} all-reduce(%a), channel_id=3, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  %scattered = f32[1,16]{1,0} reduce-scatter(%a), channel_id=4, replica_groups=[2,4]<=[8], dimensions={0}
  ROOT %result = f32[8,16]{1,0} get-tuple-element(%loop), index=1
}
"""


MOVES = """\
HloModule jit_step

%fused (a: f32[10,100], b: f32[100], c: f32[10,100]) -> f32[10,100] {
  %a = f32[10,100]{1,0} parameter(0)
  %b = f32[100]{0} parameter(1)
  %c = f32[10,100]{1,0} parameter(2)
  %row = f32[1,100]{1,0} dynamic-slice(%a, %i, %z)
  %sum = f32[1,100]{1,0} add(%row, %b)
  ROOT %into = f32[10,100]{1,0} dynamic-update-slice(%c, %sum, %i, %z)
}

%body (p: (f32[10,100], f32[100], f32[10,100])) -> (f32[10,100], f32[100], f32[10,100]) {
  %x = f32[10,100]{1,0} get-tuple-element(%p), index=0
  %y = f32[100]{0:T(128)} get-tuple-element(%p), index=1
  %z = f32[10,100]{1,0} get-tuple-element(%p), index=2
  %stacked = f32[10,100]{1,0} fusion(%x, %y, %z), kind=kLoop, calls=%fused
  ROOT %out = (f32[10,100]{1,0}, f32[100]{0}, f32[10,100]{1,0}) tuple(%x, %y, %stacked)
}

%condition (p: (f32[10,100], f32[100], f32[10,100])) -> pred[] {
  ROOT %less = pred[] constant(true)
}

ENTRY %main (a: f32[10,100], b: f32[100]) -> f32[100] {
  %a = f32[10,100]{1,0} parameter(0)
  %b = f32[100]{0} parameter(1)
  %start = (f32[10,100]{1,0}, f32[100]{0}, f32[10,100]{1,0}) tuple(%a, %b, %a)
  %loop = (f32[10,100]{1,0}, f32[100]{0}, f32[10,100]{1,0}) while(%start), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"10"}}
  %here = f32[10,100]{1,0} get-tuple-element(%loop), index=2
  %fetch = (f32[10,100]{1,0:T(8,128)S(1)}, f32[10,100]{1,0}, u32[]{:S(2)}) copy-start(%here)
  %there = f32[10,100]{1,0:T(8,128)S(1)} copy-done(%fetch)
  %kept = f32[10,100]{1,0:T(8,128)S(1)} multiply(%there, %there)
  %all = (f32[100]{0}, f32[400]{0}) all-gather-start(%b), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}
  %sent = (f32[100]{0}, f32[100]{0}, u32[], u32[]) collective-permute-start(%b), source_target_pairs={{0,1}}
  ROOT %total = f32[100]{0} reduce(%kept, %zero), dimensions={0}, to_apply=%add
}
"""


def test_bytes_are_counted_where_they_leave_the_chip_and_of_slices_alone():
  row = 4 * 100
  turn = row + row + row  # a slice, all of b, the part that is updated
  started = (row + 4 * row) + (row + row)
  assert hlo.moved(MOVES) == 10 * turn + 10 * row + started + row  # + a copy onto the chip, + the result


def test_bytes_of_a_product_are_those_of_its_operands_and_its_result():
  def several(x, ys):
    return jax.lax.scan(lambda x, y: (jnp.tanh(x @ y), None), x, ys)[0]

  shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((64, 256), (7, 256, 256))]
  once = 4 * (64 * 256 + 256 * 256 + 64 * 256)
  text = jax.jit(several).lower(*shapes).compile().as_text()
  assert 7 * once <= hlo.moved(text) < 7 * 3 * once


def test_collectives_are_counted_by_turns_of_their_loop_and_once_a_channel():
  found = {(one.kind, one.size): one for one in hlo.collectives(TEXT, 8)}
  assert len(found) == 8
  counted = found['collective-permute', 8 * 32 * 4]
  assert (counted.times, counted.certain) == (4, True)  # 0, 2, 4, 6
  fused = found['reduce-scatter', 128 * 4 // 4]
  assert (fused.group, fused.traffic()) == (4, 3 * 128)
  assert found['all-gather', (4 + 6) * 4].group == 2  # of several arrays, in a branch
  head = found['all-gather', 64 * 16 * 4]
  assert (head.group, head.times, head.certain, head.where) == (8, 5, True, 'jit(step)/scan/head')
  assert head.traffic() == 5 * 7 / 8 * 64 * 16 * 4
  moved = found['collective-permute', 4 * 16 * 2]
  assert (moved.times, moved.certain, moved.traffic()) == (1, False, 128)
  several = found['all-reduce', (32 * 16 + 2) * 4]
  assert (several.group, several.times, several.traffic()) == (2, 1, (32 * 16 + 2) * 4)
  assert (found['all-reduce', 32 * 16 * 4].group, found['all-reduce', 32 * 16 * 4].times) == (4, 1)
  assert found['reduce-scatter', 64].traffic() == 3 * 64
  traffic = [one.traffic() for one in hlo.collectives(TEXT, 8)]
  assert traffic == sorted(traffic, reverse=True)


QUICK = {
  **small.STILL, 'model.num_heads': 4, 'task.num_nodes': 25,
}  # fmt: skip


def test_the_formula_counts_what_the_compiler_counts():
  changes = {**QUICK, 'loss.vocab_chunk': 4096, 'model.d_model': 64, 'model.d_ff': 256}
  exp = build(small.config(changes), devices=jax.devices()[:1])
  data, shape = exp.cfg.data, (exp.cfg.data.rows, exp.cfg.data.row_length, 2 * exp.cfg.data.row_length)
  counted = compile.lower_training(exp).compile().cost_analysis()['flops']
  assert 0.9 < compile.training_flops(exp.model_cfg, *shape) / counted < 1.05
  assert data.rows * data.row_length == 352


def test_what_is_computed_again_is_no_model_flop():
  cfg = transformer.ModelConfig(vocab_size=7, num_layers=2, num_heads=1, d_model=4, d_ff=6)
  blocks = 2 * (8 * 16 + 4 * 4 * 6 + 4 * 5 * 4)  # of a position of a row of five
  once = 3 * (5 * (blocks + 2 * 7 * 4) + 2 * 4 * 10)  # three rows, ten targets each
  again = 3 * 5 * 2 * 7 * 4
  assert compile.training_flops(cfg, 3, 5, 10, again=False) == 3 * once
  assert compile.training_flops(cfg, 3, 5, 10) == 3 * once + again
  remat = dataclasses.replace(cfg, remat=True)
  assert compile.training_flops(remat, 3, 5, 10) == 3 * once + again + 3 * 5 * blocks
  assert compile.training_flops(remat, 3, 5, 10, again=False) == 3 * once


def test_a_program_that_does_not_fit_is_said(capsys):
  class Lowered:
    def compile(self):
      raise jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: Ran out of memory on HBM: 192G exceeds 15.75G')

  compile.tell(Lowered(), [], compile.CHIPS['v5e'])
  assert (
    capsys.readouterr().out == '  DOES NOT FIT: RESOURCE_EXHAUSTED: Ran out of memory on HBM: 192G exceeds 15.75G\n'
  )


def test_the_state_of_a_mesh_is_where_init_puts_it():
  cfg = small.config({**QUICK, 'mesh.fsdp': 2, 'mesh.tensor': 2})
  exp = build(cfg)
  tx, _ = optimizer.make_optimizer(cfg.optimizer, cfg.steps)
  state, _ = train_step.init_state(exp, tx)
  for made, said in zip(jax.tree.leaves(state), jax.tree.leaves(train_step.abstract_state(exp, tx)), strict=True):
    assert (made.shape, made.dtype, made.sharding) == (said.shape, said.dtype, said.sharding)
  compiled = compile.lower_training(exp).compile()
  held = sum(map(sharding.bytes_here, jax.tree.leaves(state)))
  assert held <= compile.memory_of(compiled)['arguments'] < 1.2 * held + 20_000


@pytest.fixture(scope='module')
def command(tmp_path_factory):
  """Run the command among eight CPU devices: (code, out, err)."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv('JAX_NUM_CPU_DEVICES', '8')
    commands = small.Commands(tmp_path_factory.mktemp('commands'))
  yield functools.partial(commands, 'ilm_jax.aot.compile')
  commands.close()


def test_the_command_prints_memory_collectives_and_both_programs(command):
  words = small.flags(changes={**QUICK, 'mesh.data': 2, 'mesh.fsdp': 2, 'mesh.tensor': 2})
  code, out, err = command([*words, '--topology=cpu:8'])
  assert code == 0, err
  assert "mesh {'data': 2, 'fsdp': 2, 'tensor': 2}; ilm, 1 blocks of width 16, vocabulary 32, float32" in out
  assert re.search(r'training step: 8 rows of 44, .* TFLOP, .* GFLOP a device', out)
  assert len(re.findall(r'memory of a device, GiB: \d', out)) == 2
  assert len(re.findall(r'all-reduce: \d+ a step, [\d.]+ MB sent by a device', out)) == 2
  assert 'sampling: a step of 32 rows of 22' in out and 'predicted' not in out  # no limits of a CPU


@pytest.mark.parametrize('topology', ['', 'v9:2x2', 'v5e', 'v5e:2xtwo', 'cpu:16'])
def test_a_topology_that_is_none_is_one_line(topology, command):
  code, out, err = command([*small.flags(), f'--topology={topology}'])
  assert code == 1 and not out and err.count('\n') == 1 and err.startswith('error: --topology')


@pytest.mark.skipif(importlib.util.find_spec('libtpu') is not None, reason='libtpu is installed')
def test_a_missing_compiler_says_how_to_install_it(command):
  code, out, err = command([*small.flags(), '--topology=v5e:2x4'])
  assert code == 1 and not out
  assert err.startswith('error: libtpu is not installed') and "pip install -e '.[tpu]'" in err and err.count('\n') == 1


def test_a_vocabulary_can_be_named_without_its_data():
  exp = build(small.config(), devices=jax.devices()[:1], vocab_size=30_522)
  assert exp.model_cfg.vocab_size == 30_522
  with pytest.raises(UserError, match=r'does not divide over mesh\.tensor=8'):
    build(small.config({'mesh.tensor': 8}), vocab_size=96)


# --- the real compiler: pip install -e '.[tpu]' -----------------------------------------------------------------------

WITHOUT = 'unset XLA_FLAGS JAX_DISABLE_MOST_OPTIMIZATIONS;'  # which are for programs of CPUs
GATHERED = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
from ilm_jax import compile_only

compile_only.compiler_log()
devices = compile_only.devices_of('v5e:2x4')
mesh = Mesh(np.array(devices).reshape(4, 2), ('a', 'b'), axis_types=(AxisType.Auto,) * 2)

@jax.jit
def step(x):
  x = jax.lax.with_sharding_constraint(jnp.sin(x), NamedSharding(mesh, P(('a', 'b'), None, None)))
  return jax.lax.with_sharding_constraint(jnp.cos(x), NamedSharding(mesh, P(None, 'b', 'a')))

compile_only.tell(step.lower(jax.ShapeDtypeStruct((8, 8, 8), jnp.float32)), devices, compile_only.CHIPS['v5e'])
"""


@pytest.mark.long
def test_what_the_real_compiler_gathers_against_its_will_is_said(tmp_path):
  pytest.importorskip('libtpu')
  env = {
    k: v for k, v in small.environment(tmp_path).items() if k not in ('XLA_FLAGS', 'JAX_DISABLE_MOST_OPTIMIZATIONS')
  }
  env |= {'TPU_SKIP_MDS_QUERY': '1', 'TPU_ACCELERATOR_TYPE': '', 'ALLOW_MULTIPLE_LIBTPU_LOAD': '1'}
  done = subprocess.run([sys.executable, '-c', GATHERED], env=env, cwd=small.ROOT, capture_output=True, text=True)
  assert re.search(r'involuntary full rematerializations: [1-9]\d*; The compiler cannot go from', done.stdout), done


@pytest.mark.long
@pytest.mark.parametrize('mesh', [{'fsdp': 8}, {'data': 2, 'fsdp': 2, 'tensor': 2}])
def test_the_real_compiler_gathers_weights_but_no_features_nor_logits(mesh, tmp_path):
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
  weight = 2 * max(width * hidden, vocab * width) / 1e6  # MB, in bfloat16
  features = 2 * (rows / mesh.get('data', 1)) * 1024 * width / 1e6  # of the rows whose devices share weights
  found = [float(size) for size in re.findall(r'all-gather: .*; the largest: ([\d.]+) MB', out)]
  assert found and max(found) <= weight + 0.05 < features
