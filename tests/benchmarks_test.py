"""Tests of the benchmarks, on a toy model; no test depends on measured times."""

import contextlib
import io
import json
import math
import os
import re
import runpy
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import _report, batching, parallel, sample, train_step
from ilm_jax.configs import default
from ilm_jax.data import pipeline
from ilm_jax.families import ilm
from ilm_jax.types import Outputs, UserError


def groups_of(name, examples, number=3, vocab=40):
  mix = train_step.MIXES[name](vocab)
  return mix, [train_step.corrupted(mix, i, examples, default.get_config()) for i in range(number)]


# --- train_step -------------------------------------------------------------------------------------------------------


def test_the_dense_loss_and_its_gradients_equal_those_of_the_chunked_loss():
  mix, groups = groups_of('lm1b', 12)
  shape = train_step.shape_of(mix, packed=True, groups=groups)
  batch = pipeline.pack(groups[0], list(range(12)), shape)
  rng = np.random.default_rng(0)
  hidden = jnp.asarray(rng.normal(size=(shape.rows, shape.length, 6)), jnp.float32)
  unembed = jnp.asarray(rng.normal(size=(40, 6)), jnp.float32)
  stop = jnp.asarray(rng.normal(size=(shape.rows, shape.segments, 2)), jnp.float32)
  cfg = types.SimpleNamespace(stop_weight=0.7, length_weight='none', compute='float32', vocab_chunk=16)

  def value_and_grads(loss):
    total = jax.jit(jax.value_and_grad(lambda *parts: loss(Outputs(*parts), batch, cfg)['loss'][0], (0, 1, 2)))
    return total(hidden, unembed, stop)

  assert (batch['segment_weight_BxS'].sum(axis=1) > 1).any(), 'no row contains more than one example'
  value, grads = value_and_grads(ilm.loss)
  dense_value, dense_grads = value_and_grads(train_step.dense_loss)
  np.testing.assert_allclose(dense_value, value, rtol=1e-5)
  for dense_grad, grad in zip(dense_grads, grads, strict=True):
    np.testing.assert_allclose(dense_grad, grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('name', train_step.MIXES)
def test_a_batch_has_exactly_as_many_rows_as_the_largest_group_of_examples_needs(name):
  mix, groups = groups_of(name, 24)
  for packed in (False, True):
    shape = train_step.shape_of(mix, packed, groups)
    placed = [pipeline.pack(group, list(range(24)), shape)['segment_weight_BxS'] for group in groups]
    assert [weight.sum() for weight in placed] == [24, 24, 24]
    assert max(weight.any(axis=1).sum() for weight in placed) == shape.rows
    assert packed or placed[0].shape == (24, 1)


def test_random_text_lengths_have_the_documented_mean_and_maximum():
  mix = train_step.MIXES['lm1b'](40)
  lengths = np.array([len(mix.source[i]['tokens']) - 2 for i in range(4_000)])
  assert abs(lengths.mean() - 29) < 1
  assert 86 < lengths.max() <= 126
  assert len(train_step.MIXES['full'](40).source[5]['tokens']) == 128


@pytest.mark.parametrize('rows, length, positions', [(256, 128, 2048), (256, 136, 2048), (13, 512, 2048), (3, 128, 64)])
def test_splitting_a_batch_into_parts_keeps_all_rows_and_adds_few_padding_rows(rows, length, positions):
  parts, part_rows = train_step.split_rows(rows, length, positions)
  assert rows <= parts * part_rows < rows + part_rows
  assert (part_rows - 1) * length < positions
  assert (rows, length) != (256, 136) or parts * part_rows == 256


@pytest.mark.long
def test_each_configuration_is_measured_in_its_own_child_process(monkeypatch, tmp_path, capsys):
  path = tmp_path / 'steps.json'
  flags = '--size=toy --vocab=97 --examples=24 --positions=1024 --seconds=0.01 --mixes=lm1b'
  flags = [*flags.split(), '--variants=padded,packed-dense', f'--json={path}']
  commands = []

  def run_here(command, *, env, **_):
    assert env['PYTHONPATH'].split(os.pathsep)[0] == str(_report.ROOT)
    commands.append(command)
    with contextlib.redirect_stdout(io.StringIO()) as out:
      code = train_step.main(command[3:])
    return subprocess.CompletedProcess(command, code, stdout=out.getvalue())

  monkeypatch.setattr(train_step, 'SURVEYED', 240)
  # Replace `subprocess` only in train_step: run_file needs the real subprocess.run to ask git for the commit.
  monkeypatch.setattr(train_step, 'subprocess', types.SimpleNamespace(run=run_here, PIPE=subprocess.PIPE))
  assert train_step.main(flags) == 0
  child = [sys.executable, '-m', 'benchmarks.train_step', *flags]
  assert commands == [[*child, '--one=lm1b:padded'], [*child, '--one=lm1b:packed-dense']]
  table = capsys.readouterr().out
  padded, packed = json.loads(path.read_text())['rows']
  assert [padded['variant'], packed['variant']] == ['padded', 'packed-dense']
  assert f'{padded["rows"]} x 128' in table
  assert f'{packed["rows"]} x 128' in table
  assert 'commit' in table.splitlines()[0]
  assert (padded['rows'], padded['parts']) == (24, 3)
  assert packed['rows'] < 8
  for row in (padded, packed):
    assert len(row['seconds']) >= 2
    assert row['compilations'] == 0
    assert 0 < row['program_bytes'] < row['peak_bytes']
    assert row['examples_per_second'] > 0
  # Padded and packed runs train on the same examples from the same weights; only dropout and rounding differ.
  np.testing.assert_allclose(packed['losses'][:3], padded['losses'][:3], rtol=0.05)
  assert 24 * 2 < packed['kept_tokens'] == padded['kept_tokens'] < 24 * 128


def test_the_benchmark_continues_after_a_failed_configuration(monkeypatch, capsys):
  row = dict.fromkeys(('rows', 'length', 'parts', 'kept_tokens', 'program_bytes', 'peak_bytes', 'positions'), 8)
  row |= {'mix': 'lm1b', 'examples': 8, 'seconds': [2.0, 4.0, 3.0], 'machine': 'a machine'}

  def child(command, **_):
    variant = command[-1].split(':')[1]
    speed = {'padded': 3.0, 'packed': 12.0, 'packed-dense': 1.5}.get(variant)
    return subprocess.CompletedProcess(
      command,
      returncode=0 if speed else -9,
      stdout=json.dumps({**row, 'variant': variant, 'examples_per_second': speed}),
    )

  monkeypatch.setattr(subprocess, 'run', child)
  assert train_step.main(['--mixes=lm1b']) == 1
  table = capsys.readouterr().out
  ratios = [re.findall(r'\d\.\d\d', line)[0] for line in table.splitlines() if ' 8 x 8 ' in line]
  assert ratios == ['1.00', '4.00', '0.50']
  assert '3 (2 - 4)' in table
  assert 'lm1b padded-dense: failed (killed, probably out of memory)' in table
  assert 'lm1b: packing gives 4.00 times the examples per second (goal: 5.0)' in table


# --- sample -----------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_sampling_compiles_nothing_after_the_warm_up(tmp_path, capsys):
  path = tmp_path / 'sample.json'
  flags = '--size=toy --vocab=97 --batches=2 --lengths=16,64,96 --insert=4 --max_length=128 --seconds=0.2'
  flags += ' --arm_lengths=20 --compute=float32'
  assert sample.main([*flags.split(), f'--json={path}']) == 0
  table = capsys.readouterr().out
  measured = json.loads(path.read_text())
  rows = measured['rows']
  assert [(row['rows'], row['length'], row['buffer']) for row in rows] == [(2, 16, 64), (2, 64, 64), (2, 96, 128)]
  assert 'compilations after warm-up: 0' in table
  for row in rows:
    assert row['compilations'] == 0
    assert row['to'] < row['length'] <= row['buffer']
    assert all(math.isfinite(us) and us > 0 for us in row['token_us'])
  (row,) = measured['left_to_right']
  assert (row['rows'], row['length'], row['same_tokens']) == (2, 20, 1.0)
  assert 'with the cache' in table


def test_the_compilation_counter_counts_each_new_program_once():
  compilations = _report.Compilations()
  jax.jit(lambda x: x * 3 + 1)(jnp.ones(5))
  before = compilations.count
  assert before > 0
  f = jax.jit(lambda x: x * 5 + 2)
  f(jnp.ones(5))
  f(jnp.ones(5))
  assert compilations.count == before + 1


def test_the_benchmark_measures_fewer_insertions_if_each_takes_longer():
  args = types.SimpleNamespace(insert=16, seconds=15.0)
  assert [sample.choose_insertions(args, seconds) for seconds in (0.0, 0.2, 0.4, 2.0, 100.0)] == [16, 16, 8, 1, 1]


# --- flags ------------------------------------------------------------------------------------------------------------


def test_measurements_that_cannot_be_written_give_a_one_line_error():
  with pytest.raises(UserError, match=r'^--json=/dev/full cannot be written: No space left on device$'):
    _report.write_json('/dev/full', rows=[])


@pytest.mark.parametrize(
  'module, flag',
  [
    (train_step, '--exmaples=3'),
    (train_step, '--mixes=lm1c'),
    (train_step, '--variants=packed,'),
    (train_step, '--examples=0'),
    (sample, '--size=huge'),
    (sample, '--batches=1,x'),
    (sample, '--lengths=8'),
    (sample, '--top_p=nan'),
    (train_step, '--seconds=inf'),
    (parallel, '--gap_threshold=1.5'),
  ],
)
def test_a_wrong_flag_gives_a_one_line_error(module, flag, capsys):
  with pytest.raises(SystemExit) as stopped:
    module.main([flag])
  assert stopped.value.code == 1
  error = capsys.readouterr().err
  assert error.startswith('error: ')
  assert error.count('\n') == 1
  assert flag.split('=')[0] in error


@pytest.mark.parametrize('module', [batching, parallel, sample, train_step])
def test_a_benchmark_fails_with_one_line_if_standard_output_cannot_be_written(module, monkeypatch, capsys):
  monkeypatch.setattr(sys, 'argv', [module.__file__, '--help'])
  with open('/dev/full', 'w') as full, monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
    patch.setattr(sys, 'stdout', full)
    runpy.run_path(module.__file__, run_name='__main__')
  error = capsys.readouterr().err
  assert stopped.value.code == 1 and error.count('\n') == 1 and 'standard output cannot be written' in error


# --- batching ---------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_static_and_continuous_batching_give_the_same_tokens(capsys, tmp_path):
  flags = '--size=toy --vocab=40 --requests=20 --slots=8 --repeats=1 --gaps=1,0 --compute=float32 --min_buffer=128'
  assert batching.main([*flags.split(), f'--json={tmp_path / "out.json"}']) == 0
  out = capsys.readouterr().out
  assert 'sequences with the same tokens: 100.0 %' in out
  assert re.search(r'^ *8  continuous +\S+', out, re.M) and re.search(r'^ *8 +all +\S+', out, re.M)
  measured = json.loads((tmp_path / 'out.json').read_text())
  one_gap, all_gaps = measured['several']
  assert one_gap['passes'] - 1 == measured['both']['tokens'] / 20  # 20 requests: one pass per token, then one to stop
  assert all_gaps['passes'] < one_gap['passes'] / 2
