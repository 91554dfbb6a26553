"""Tests of the training loop: invalid configs, contents of event files and JSON files, and what stops a run."""

import errno
import json
import os
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from small import leaves

from ilm_jax.distributed import sharding
from ilm_jax.evaluation import evaluate
from ilm_jax.runs import checkpoint, logs, run_file
from ilm_jax.training import loop, warm_start
from ilm_jax.types import UserError


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'data.rows': 12}, r'data.rows=12 is not divisible by 8 devices .*: use 8 or 16'),
    ({'data.rows': 4}, r'data.rows=4 is not divisible by 8 devices .*: use 8$'),
    (
      {'data.rows': 8, 'optimizer.accumulation_steps': 3},
      r'data.rows=8 .*optimizer.accumulation_steps=3 parts: use data.rows=6 or 9',
    ),
    (
      {'data.rows': 8, 'optimizer.accumulation_steps': 2},
      r'data.rows / optimizer.accumulation_steps=4 is not divisible by 8',
    ),
    ({'data.groups': 3}, r'data.batch_size=16 is not a multiple of data.groups=3: use data.batch_size=15 or 18'),
    ({'data.groups': 16}, r'data.rows=8 is not a multiple of data.groups=16: use data.rows=16'),
    ({'data.row_length': 20}, r'data.row_length=20 is shorter than the longest example, 22 tokens'),
    ({'optimizer.accumulation_steps': 0}, r'optimizer.accumulation_steps=0: expected at least 1'),
    ({'optimizer.schedule': 'step'}, r"optimizer.schedule='step': expected one of constant, cosine, linear"),
    ({'eval.mode': 'most'}, r"eval.mode='most': expected one of max, min"),
    ({'optimizer.learning_rate': float('nan')}, r'^optimizer.learning_rate=nan: expected a finite number$'),
    ({'model.d_model': 2**20}, r'd_model=1048576, d_ff=32: the run needs at least \d.* GB .* this host, which has'),
    ({'data.rows': 8 * 10**7}, r'^data.rows=80000000, data.row_length=44: the run needs at least '),
    ({'data.batch_size': 10**12}, r'^data.batch_size=1000000000000: the run needs at least 500,000.0 GB of memory on'),
    ({'sampling.max_steps': 2 * 10**9}, r'^eval.batch_size=8, .*max_steps=2000000000: the run needs at least 256'),
    ({'init_from': 'gss://bucket/run'}, r'^init_from=gss://bucket/run: unknown scheme gss://'),
    ({'seed': -1}, r'^seed=-1: expected an integer from 0 to 4294967295$'),
    ({'family': 'gpt'}, r"family='gpt': expected one of"),
    ({'model.d_model': 15}, r'model.d_model=15'),
    ({'task.num_nodes': 5}, r'task.num_nodes=5'),
  ],
  ids=lambda value: ','.join(f'{name}={setting}' for name, setting in value.items()) if isinstance(value, dict) else '',
)
def test_an_invalid_config_is_refused_before_any_file_is_written(changes, message, tmp_path):
  with pytest.raises(UserError, match=message):
    loop.train(small.config(changes), tmp_path / 'run')
  assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize('name', ['z[1]', 'a*b', 'a?b', 'a\\b', 'caf\udce9'])
def test_a_workdir_whose_path_orbax_would_misread_is_refused_before_any_file_is_written(name, tmp_path):
  with pytest.raises(
    UserError, match=r'Orbax misreads paths with a character .*: rename or move the folder, or give another'
  ):
    loop.train(small.config(), tmp_path / name / 'run')
  assert not list(tmp_path.iterdir())


def test_a_workdir_may_begin_with_a_tilde_but_not_with_an_unknown_scheme(tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  assert loop.build_on_all(small.config(), '~/run', 'train')[1] == tmp_path / 'run'
  with pytest.raises(UserError, match=r'^--workdir=gss://bucket/run: unknown scheme'):
    loop.train(small.config(), 'gss://bucket/run')


# --- the files of a run -----------------------------------------------------------------------------------------------


class Crash(Exception):
  """Raised by tests to simulate a crash, which saves no checkpoint."""


def crash_at(monkeypatch, number: int, change=None):
  """Make the training step after step `number` raise Crash, or apply `change` to its result."""
  run = loop.Loop.run

  def run_until_crash(self, state, start):
    step_fn = self.step_fn

    def step(state, batch):
      if int(state.step) != number:
        return step_fn(state, batch)
      if change is None:
        self.saved.wait()  # the crash is simulated, so the threads that save checkpoints would go on
        raise Crash
      return change(*step_fn(state, batch))

    self.step_fn = step
    return run(self, state, start)

  monkeypatch.setattr(loop.Loop, 'run', run_until_crash)


LOGGED = {'log_every': 1, 'checkpoint_every': 5, 'eval.every': 10, 'steps': 20}


@pytest.fixture(scope='module')
def restarted(tmp_path_factory):
  """Return the workdir of a 20-step run that crashed in step 18, resumed from checkpoint 15 and finished."""
  workdir = tmp_path_factory.mktemp('restarted') / 'run'
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sys, 'argv', ['main.py'])  # run.json records the command; other tests change sys.argv
    patch.setattr(sharding, 'make_mesh', lambda *_: small.mesh())
    with pytest.MonkeyPatch.context() as broken:
      crash_at(broken, 17)
      with pytest.raises(Crash):
        loop.train(small.config(LOGGED), workdir)
    written = logs.read_scalars(workdir)['train/loss']
    assert [step for step, _ in written] == list(range(1, 18)), (
      'steps 1 to 17 must be logged before the crash; 16 and 17 are then repeated'
    )
    assert loop.train(small.config(LOGGED), workdir) == 0
  return workdir


TRAIN_TAGS = {
  'loss', 'token_loss', 'stop_loss', 'stop_accuracy', 'learning_rate', 'gradient_norm', 'update_norm', 'epoch',
  'kept_tokens_per_second', 'original_tokens_per_second', 'input_wait', 'packing_efficiency', 'left_out_examples',
}  # fmt: skip
VALIDATION_TAGS = {'loss', 'token_loss', 'stop_loss', 'exact_match', 'token_accuracy', 'stopped', 'length'}


def test_event_files_contain_every_step_once_after_a_restart(restarted):
  assert len(list(restarted.glob('events.out.tfevents.*'))) == 2
  scalars = logs.read_scalars(restarted)
  for name in TRAIN_TAGS:
    assert [step for step, _ in scalars[f'train/{name}']] == list(range(1, 21)), name
  for name in VALIDATION_TAGS:
    assert [step for step, _ in scalars[f'validation/{name}']] == [10, 20], name


def metrics_of_steps(count: int) -> list[dict]:
  """Return the metrics of the first `count` steps of the small run, computed without the training loop."""
  exp, tx, schedule, abstract = small.uninitialized()
  state, _ = loop.init_state(exp, tx)
  step, out = loop.compile_step(exp, tx, schedule, abstract), []
  for batch in small.batches(exp, count):
    state, pairs = step(state, sharding.put_global_batch(batch, exp.mesh))
    out.append(jax.device_get(pairs))
  return out


def test_event_files_contain_the_metrics_of_each_step(restarted):
  pairs = metrics_of_steps(20)
  scalars = logs.read_scalars(restarted)
  for name in ('loss', 'token_loss', 'stop_loss', 'gradient_norm', 'packing_efficiency'):
    expected = [pair[name][0] / pair[name][1] for pair in pairs]
    found = [value for _, value in scalars[f'train/{name}']]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6, err_msg=name)
  rates = [1e-2 * min(1, step / 4) for step in range(20)]
  np.testing.assert_allclose([value for _, value in scalars['train/learning_rate']], rates, rtol=1e-5, atol=1e-9)
  np.testing.assert_allclose([value for _, value in scalars['train/epoch']], [n * 16 / 200 for n in range(1, 21)])
  kept, original = (
    np.array([v for _, v in scalars[f'train/{name}_tokens_per_second']]) for name in ('kept', 'original')
  )
  expected = [pair['kept_tokens'][0] / pair['original_tokens'][0] for pair in pairs]
  np.testing.assert_allclose(kept / original, expected, rtol=1e-5)
  assert all(0 <= value <= 1 for _, value in scalars['train/input_wait'])


def test_event_files_contain_samples_and_hyperparameters(restarted):
  events = [e for path in sorted(restarted.glob('events*')) for e, _ in logs.read_records(path)]
  texts = [(e.step, v.tensor.string_val[0].decode()) for e in events for v in e.summary.value if 'samples' in v.tag]
  assert [step for step, _ in texts] == [10, 20]
  assert all(re.search(r'(right|wrong)  \d+,\d+\|.*/\d+,\d+=', text) for _, text in texts)
  plugins = [v.metadata.plugin_data for e in events for v in e.summary.value]
  plugins = [plugin for plugin in plugins if plugin.plugin_name == 'hparams']
  assert len(plugins) == 3  # experiment, session start, session end: written once, although the run started twice
  assert any(b'optimizer.learning_rate' in plugin.content for plugin in plugins)


def test_run_json_contains_the_config_and_a_record_of_each_start(restarted):
  found = json.loads((restarted / 'run.json').read_text())
  cfg = small.config(LOGGED)
  assert found['config'] == json.loads(cfg.to_json_best_effort())
  assert [start['from_step'] for start in found['starts']] == [0, 15]
  for start in found['starts']:
    assert re.fullmatch(r'[0-9a-f]{40}(\+changes)?|unknown', start['commit'])
    assert re.fullmatch(r'\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d{4}', start['time'])
    assert start['command'].startswith('python -m ilm_jax.main')
    assert start['devices'].startswith('8 x ') and start['processes'] == 1
    assert start['versions'].keys() == set(run_file.PACKAGES)
    assert start['versions']['jax'] == jax.__version__


def test_eval_json_contains_the_test_metrics(restarted):
  found = json.loads((restarted / 'eval.json').read_text())
  assert found['split'] == 'test' and found['seed'] == 0 and found['step'] in (10, 20)
  right, of = found['pairs']['exact_match']
  assert of == 8 and found['metrics']['exact_match'] == right / of


def test_init_from_initializes_a_run_with_the_averaged_weights_of_another_run(restarted, tmp_path, one_device):
  cfg = small.config({'init_from': str(restarted), 'seed': 3})
  *_, state, abstract = small.experiment({'seed': 3})
  started = warm_start.warm_start(cfg, state, abstract)
  source = checkpoint.Checkpoints(restarted, read_only=True)
  average = source.restore(20, 'ema_params', abstract.ema_params)
  small.assert_same_bits(started.params, average)
  small.assert_same_bits(started.ema_params, average)
  assert int(started.step) == 0 and not any(array.any() for array in leaves(started.opt_state).values())
  latest = source.restore(20, 'params', abstract.params)
  assert any((a != b).any() for a, b in zip(leaves(latest).values(), leaves(average).values(), strict=True))
  seen = []

  def run(self, state, start):
    seen.append((state, start))
    return 75

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(loop.Loop, 'run', run)
    assert loop.train(cfg, tmp_path / 'run') == 75
  assert seen[0][1] == 0
  small.assert_same_bits(seen[0][0].params, average)


# --- what stops a run -------------------------------------------------------------------------------------------------


def test_a_nan_loss_stops_the_run_and_the_error_names_the_last_complete_checkpoint(tmp_path, monkeypatch, one_device):
  changes = {**LOGGED, 'eval.every': 0}

  def spoil(state, pairs):
    return state._replace(params=jax.tree.map(lambda x: x * jnp.nan, state.params)), pairs

  crash_at(monkeypatch, 6, spoil)
  with pytest.raises(UserError, match=r'step 8: the loss is nan.* the last complete checkpoint is step 5 ') as error:
    loop.train(small.config(changes), tmp_path)
  assert str(tmp_path) in str(error.value)
  *_, abstract = small.uninitialized()
  saved = checkpoint.Checkpoints(tmp_path, read_only=True)
  assert saved.steps() == [5]
  for array in leaves(saved.restore_latest(abstract)).values():
    assert np.isfinite(array).all()
  logged = [step for step, _ in logs.read_scalars(tmp_path)['train/loss']]
  assert logged == list(range(1, 8))  # all steps before the NaN


@pytest.mark.parametrize(
  'changes, update', [({'optimizer.eps': 0.0}, 'nan'), ({'optimizer.learning_rate': 1e30}, 'inf')], ids=['nan', 'inf']
)
def test_a_parameter_update_that_is_not_finite_is_never_saved(changes, update, tmp_path, one_device):
  changes = {**LOGGED, 'log_every': 0, 'checkpoint_every': 1, 'optimizer.warmup_steps': 0, **changes}
  with pytest.raises(UserError, match=rf'step 1: the loss is \d.* of the update {update}: there is no complete'):
    loop.train(small.config(changes), tmp_path)
  assert not list(tmp_path.glob('checkpoints/*'))


def test_a_failed_write_of_event_files_stops_the_run_with_a_one_line_error(tmp_path, monkeypatch, one_device):
  write = logs.SummaryWriter._write

  def full(self, step, summary):
    if step > 7:
      raise OSError(28, 'No space left on device')
    write(self, step, summary)

  monkeypatch.setattr(logs.SummaryWriter, '_write', full)
  expected = rf'the event files in {tmp_path} could not be written .*No space.* the last complete checkpoint is step 5;'
  with pytest.raises(UserError, match=expected):
    loop.train(small.config(LOGGED), tmp_path)


@pytest.mark.parametrize(
  ('name', 'number', 'message'),
  [
    ('run.json', errno.ENOSPC, r'\(No space left on device\): free disk space and run'),
    ('eval.json', errno.EACCES, r'\(Permission denied\): correct the cause and run'),
  ],
)
def test_a_failed_write_of_a_json_file_stops_the_run_with_a_one_line_error(
  name, number, message, tmp_path, monkeypatch, one_device
):
  write = run_file.write_json

  def full(path, value):
    if path.name == name:
      raise OSError(number, os.strerror(number))
    write(path, value)

  monkeypatch.setattr(run_file, 'write_json', full)
  with pytest.raises(UserError, match=f'{tmp_path} could not be written {message}'):
    loop.train(small.config({'steps': 5}), tmp_path)


def test_the_error_for_an_unknown_eval_metric_lists_the_known_ones(tmp_path, one_device):
  with pytest.raises(UserError, match=r"eval.metric='bleu' is not measured: expected one of exact_match, .*token_loss"):
    loop.train(small.config({**LOGGED, 'eval.metric': 'bleu'}), tmp_path)


def planned(monkeypatch, values):
  """Fake the evaluations: the n-th one on the validation split reports the exact match values[n]."""
  plan = iter(values)

  def answers(self, params, split, **_):
    return evaluate.Scores({'exact_match': (next(plan) if split == 'validation' else 0.5, 1.0)}, ['an answer'])

  monkeypatch.setattr(evaluate.Evaluator, 'sample_answers', answers)


def test_a_run_that_reached_the_score_stop_at_does_not_train_again_when_restarted(tmp_path, monkeypatch, one_device):
  changes = {'eval.every': 10, 'eval.mode': 'min', 'steps': 40, 'stop_at': 2.0}
  planned(monkeypatch, [4.0, 3.0, 2.0])
  assert loop.train(small.config(changes), tmp_path) == 0
  saved = checkpoint.Checkpoints(tmp_path, read_only=True)
  assert saved.steps()[-1] == 30
  assert json.loads((tmp_path / 'eval.json').read_text())['step'] == 30
  planned(monkeypatch, [])  # fails if the restarted run evaluates again
  monkeypatch.setattr(loop.Loop, 'save', None)  # fails if the restarted run saves again
  assert loop.train(small.config(changes), tmp_path) == 0


def test_after_a_restart_the_best_checkpoint_is_kept_and_evaluated_at_the_end(tmp_path, monkeypatch, one_device):
  changes = {'eval.every': 10, 'steps': 40}
  planned(monkeypatch, [0.1, 0.5, 0.3, 0.2])
  with pytest.MonkeyPatch.context() as broken:
    crash_at(broken, 33)
    with pytest.raises(Crash):
      loop.train(small.config(changes), tmp_path)
  assert loop.train(small.config(changes), tmp_path) == 0
  saved = checkpoint.Checkpoints(tmp_path, read_only=True)
  assert saved.steps() == [20, 35, 40]  # the best checkpoint and the latest two
  assert saved.metrics(20)['exact_match'] == 0.5 and saved.metrics(35) is None
  assert json.loads((tmp_path / 'eval.json').read_text())['step'] == 20
