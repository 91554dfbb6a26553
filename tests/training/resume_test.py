"""Resuming: however a run ends, the same command continues from the last checkpoint to bitwise equal weights."""

import io
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from absl import logging

from ilm_jax.distributed import sharding
from ilm_jax.evaluation import evaluate
from ilm_jax.runs import checkpoint, logs
from ilm_jax.runs.workdir import lock
from ilm_jax.training import loop, signals, train_step
from ilm_jax.types import UserError

# After a failed read or write, Python warns of coroutines that TensorStore never awaited.
pytestmark = pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')

RUN = {'steps': 100, 'eval.every': 50}  # a checkpoint is saved every 5 steps
TMP = '.orbax-checkpoint-tmp'  # suffix of the folder of an incomplete checkpoint


@pytest.fixture(scope='module')
def commands(tmp_path_factory):
  commands = small.Commands(tmp_path_factory.mktemp('commands'), tmp_path_factory.getbasetemp() / 'programs')
  yield commands
  commands.close()


@pytest.fixture(scope='module')
def abstract():
  """Return the shapes and shardings of the training state on one device."""
  return small.uninitialized()[-1]


def steps_in(workdir) -> list[int]:
  """Return the sorted steps of all complete checkpoints in a workdir."""
  folder = workdir / 'checkpoints'
  return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit()) if folder.exists() else []


def last_state(workdir, abstract):
  """Return the training state in the latest checkpoint of a workdir."""
  return checkpoint.Checkpoints(workdir, read_only=True).restore_latest(abstract)


def assert_ends_as(workdir, undisturbed, abstract):
  """Assert that two runs have bitwise equal final states, equal scores, and each step once in the event files."""
  state, expected = last_state(workdir, abstract), last_state(undisturbed, abstract)
  assert int(state.step) == int(expected.step)
  small.assert_same_bits(state, expected)
  results = [json.loads((path / 'eval.json').read_text()) for path in (workdir, undisturbed)]
  assert results[0]['metrics'] == results[1]['metrics'] and results[0]['step'] == results[1]['step']
  actual, wanted = logs.read_scalars(workdir), logs.read_scalars(undisturbed)
  for name in ('train/learning_rate', 'train/loss'):
    assert [step for step, _ in actual[name]] == [step for step, _ in wanted[name]], name
  for name in wanted:
    assert not name.startswith('validation/') or actual[name] == wanted[name], name


# --- killed and stopped processes -------------------------------------------------------------------------------------


def has_started(workdir) -> bool:
  """Return whether the run has started up to the point where training begins."""
  return any(workdir.glob('events.out.tfevents.*'))


def is_saving(workdir, after: int = 0) -> bool:
  """Return whether a checkpoint of a step after `after` is being written."""
  found = (workdir / 'checkpoints').glob(f'*{TMP}')
  return any(int(path.name.removesuffix(TMP)) > after for path in found)


def has_saved(workdir, step: int) -> bool:
  """Return whether a checkpoint of `step` or later is complete."""
  return max(steps_in(workdir), default=0) >= step


def end(commands, workdir, number, when, changes=RUN, delay: float = 0.0) -> tuple[int, str]:
  """Start the run, send it a signal when `when()` is true, and wait until it ends; return (exit code, stderr)."""
  process = commands.start('ilm_jax.main', small.flags(workdir, changes))
  try:
    while not when():
      assert process.poll() is None, f'the run ended before the signal: {process.err.read_text()}'
      time.sleep(0.001)
    time.sleep(delay)
    process.send_signal(number)
    return process.wait(60), process.err.read_text()
  finally:
    process.kill()


def kill(commands, workdir, when, changes=RUN, delay: float = 0.0) -> None:
  """Start the run and kill it with SIGKILL once `when()` is true."""
  code, err = end(commands, workdir, signal.SIGKILL, when, changes, delay)
  assert code == -signal.SIGKILL, err


def kill_inside_a_save(commands, workdir, after: int, changes=RUN) -> None:
  """Start the run and kill it while it writes a checkpoint of a step after `after`."""
  for _ in range(5):
    kill(commands, workdir, lambda after=after: is_saving(workdir, after), changes)
    if is_saving(workdir, after):
      return
    after = max(steps_in(workdir))  # the save finished before the signal: retry with a later save
  raise AssertionError('in five attempts, the save finished before the signal arrived')


def finish(commands, workdir, changes=RUN) -> str:
  """Start the run and let it finish; return standard error."""
  code, out, err = commands('ilm_jax.main', small.flags(workdir, changes))
  assert code == signals.FINISHED, err
  assert 'test exact match at step' in out
  return err


def data_file(folder):
  """Return the largest data file in a folder of a checkpoint, such as that of params."""
  return max((path for path in folder.glob('ocdbt.process_0/d/*')), key=lambda path: path.stat().st_size)


def test_kills_signals_damaged_checkpoints_and_a_full_disk_do_not_change_final_weights(tmp_path, commands, abstract):
  undisturbed, workdir = tmp_path / 'undisturbed', tmp_path / 'run'
  finish(commands, undisturbed)

  kill(commands, workdir, lambda: has_started(workdir))
  assert not steps_in(workdir), 'the run must be killed before its first checkpoint'
  kill_inside_a_save(commands, workdir, after=5)

  before = max(steps_in(workdir))
  code, err = end(commands, workdir, signal.SIGTERM, lambda: has_saved(workdir, before + 5))
  assert code == 75, err
  assert f'resuming at step {before} of' in err and 'Traceback' not in err
  at = max(steps_in(workdir))
  assert at > before and f'saved at step {at};' in err

  code, err = end(commands, workdir, signal.SIGINT, lambda: has_saved(workdir, at + 5))
  assert code == 130, err
  assert f'resuming at step {at} of' in err and f'saved at step {max(steps_in(workdir))};' in err

  # Add an incomplete checkpoint and damage the latest one. To simulate a full disk, limit files to a
  # size that the file `_METADATA` of a checkpoint exceeds.
  earlier, latest = steps_in(workdir)
  folder = workdir / 'checkpoints'
  shutil.copytree(folder / str(latest), folder / f'3{TMP}')
  data_file(folder / str(latest) / 'opt_state').unlink()
  code, _, err = commands('ilm_jax.main', small.flags(workdir, RUN), file_limit=14_700)
  assert code == 1
  progress = r'\d\d:\d\d:\d\d (step|resuming|ilm on|[\d.]+ steps/s)'
  incomplete, damaged, full = (line for line in err.splitlines() if not re.match(progress, line))
  assert 'warning: removed the incomplete checkpoint' in incomplete and f'/3{TMP}' in incomplete
  assert f'warning: moved the damaged checkpoint of step {latest} to' in damaged
  expected = rf'error: a checkpoint could not be written to {folder} \(File too large\): the last complete checkpoint '
  assert re.fullmatch(expected + rf'is step {earlier}; free disk space .* run the same command again', full)
  assert f'resuming at step {earlier} of' in err and steps_in(workdir) == [earlier]

  assert f'resuming at step {earlier} of' in finish(commands, workdir)
  assert not list(folder.glob(f'*{TMP}'))
  assert_ends_as(workdir, undisturbed, abstract)
  starts = json.loads((workdir / 'run.json').read_text())['starts']
  assert len(starts) >= 6 and starts[0]['from_step'] == starts[1]['from_step'] == 0


@pytest.mark.long
def test_killing_a_run_ten_times_does_not_change_the_final_weights(tmp_path, commands, abstract):
  changes = {'steps': 200, 'eval.every': 50}
  finish(commands, tmp_path / 'undisturbed', changes)
  workdir = tmp_path / 'run'
  kill(commands, workdir, lambda: has_started(workdir), changes)
  assert not steps_in(workdir), 'the run must be killed before its first checkpoint'
  for number in range(9):
    before = max(steps_in(workdir), default=0)
    if number % 3 == 0:
      kill_inside_a_save(commands, workdir, before + 5, changes)
    else:
      delay = random.uniform(0.0, 0.2)
      kill(commands, workdir, lambda step=before + 5: has_saved(workdir, step), changes, delay)
  finish(commands, workdir, changes)
  assert_ends_as(workdir, tmp_path / 'undisturbed', abstract)


# --- signals during an evaluation and after the end -------------------------------------------------------------------

SHORT = {'steps': 25}  # validation runs after step 20 and at the end


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
  """Return the workdir of an uninterrupted run, with checkpoints of steps 20 and 25."""
  workdir = tmp_path_factory.mktemp('finished') / 'run'
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sharding, 'make_mesh', lambda *_: small.mesh())
    assert loop.train(small.config(SHORT), workdir) == signals.FINISHED
  return workdir


@pytest.fixture
def copy(finished, tmp_path):
  return shutil.copytree(finished, tmp_path / 'copy')


def test_an_interrupted_evaluation_is_repeated_on_resume(tmp_path, finished, abstract, one_device):
  cfg, real = small.config(SHORT), evaluate.Evaluator.sample_answers

  def train_until(evaluation: int, number) -> int:
    """Train, and send signal `number` when evaluation number `evaluation` (from 1) starts; return the exit code."""
    calls = []

    def answers(self, *args, **options):
      calls.append(args)
      if len(calls) == evaluation:
        os.kill(os.getpid(), number)
      return real(self, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(evaluate.Evaluator, 'sample_answers', answers)
      return loop.train(cfg, tmp_path)

  def metrics_of(step: int):
    saved = checkpoint.Checkpoints(tmp_path, read_only=True)
    assert saved.steps()[-1] == step and not (tmp_path / 'eval.json').exists()
    return saved.metrics(step)

  for _ in range(2):  # interrupt the validation at step 20 twice
    assert train_until(1, signal.SIGTERM) == 75
    assert metrics_of(20) is None

  def fail(self, *_):
    self.writer.flush()
    raise RuntimeError('power cut')

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(loop.Loop, 'save', fail)
    with pytest.raises(RuntimeError, match='power cut'):
      loop.train(cfg, tmp_path)  # crashes after logging the validation metrics, before saving a checkpoint
  assert [step for step, _ in logs.read_scalars(tmp_path)['validation/loss']] == [20]

  assert train_until(2, signal.SIGINT) == 130  # interrupts the validation at the last step
  assert metrics_of(25) is None
  assert train_until(2, signal.SIGTERM) == 75  # interrupts the evaluation on the test split
  assert metrics_of(25) is not None
  assert loop.train(cfg, tmp_path) == signals.FINISHED
  assert_ends_as(tmp_path, finished, abstract)
  assert [step for step, _ in logs.read_scalars(tmp_path)['validation/loss']] == [20, 25]


def test_restarting_a_finished_run_only_reports_its_results(copy, one_device):
  before = {path: path.stat().st_mtime_ns for path in (copy / 'checkpoints').rglob('*')}
  scalars = logs.read_scalars(copy)
  (copy / 'eval.json').unlink()
  assert loop.train(small.config(SHORT), copy) == signals.FINISHED
  assert {path: path.stat().st_mtime_ns for path in (copy / 'checkpoints').rglob('*')} == before
  assert logs.read_scalars(copy) == scalars and (copy / 'eval.json').exists()


def test_a_run_in_a_thread_or_with_jax_in_64_bit_mode_ends_with_the_same_weights(copy, finished, abstract, one_device):
  shutil.rmtree(copy / 'checkpoints' / '25')
  codes = []

  def resume():
    with jax.enable_x64(True):
      codes.append(loop.train(small.config(SHORT), copy))

  thread = threading.Thread(target=resume)
  thread.start()
  thread.join()
  assert codes == [signals.FINISHED]
  assert_ends_as(copy, finished, abstract)


class Broken(io.StringIO):
  """Fake standard output on a full disk."""

  def write(self, text):
    raise OSError(28, 'No space left on device')


def test_eval_json_is_written_even_if_writing_to_standard_output_fails(copy, one_device, monkeypatch):
  (copy / 'eval.json').unlink()
  monkeypatch.setattr(sys, 'stdout', Broken())
  with pytest.raises(OSError, match='No space left on device'):
    loop.evaluate_run(small.config(SHORT), copy)
  assert json.loads((copy / 'eval.json').read_text())['split'] == 'test'


@pytest.mark.long
def test_a_run_trains_if_python_removes_asserts_and_docstrings(tmp_path, monkeypatch):
  monkeypatch.setenv('PYTHONOPTIMIZE', '2')
  code, out, err = small.run(small.flags(tmp_path / 'run', {'steps': 5}), tmp_path / 'cache')
  assert code == 0 and 'test exact match at step 5' in out, err


def test_a_second_ctrl_c_ends_the_process_immediately():
  before = signal.getsignal(signal.SIGINT)
  with signals.Signals() as received:
    received.begun = True
    assert not received.received()
    os.kill(os.getpid(), signal.SIGINT)
    assert received.received() and received.code == 130
    with pytest.raises(KeyboardInterrupt):
      os.kill(os.getpid(), signal.SIGINT)
      time.sleep(1)
  assert signal.getsignal(signal.SIGINT) == before


def test_a_second_process_in_the_same_workdir_is_refused(copy, one_device):
  with lock(copy):
    before = sorted(copy.rglob('*'))
    with pytest.raises(UserError, match=rf'^another process is training in {copy}: .* another --workdir$'):
      loop.train(small.config(SHORT), copy)
    assert sorted(copy.rglob('*')) == before


# --- damaged checkpoints ----------------------------------------------------------------------------------------------

DAMAGE = {
  'a data file of params': lambda folder: data_file(folder / 'params').unlink(),
  'half of a data file of opt_state': lambda folder: os.truncate(data_file(folder / 'opt_state'), 3000),
  'the manifest of ema_params': lambda folder: (folder / 'ema_params' / 'manifest.ocdbt').unlink(),
  'the metadata of opt_state': lambda folder: (folder / 'opt_state' / '_METADATA').unlink(),
  'params': lambda folder: shutil.rmtree(folder / 'params'),
  'everything': lambda folder: [shutil.rmtree(path) for path in folder.iterdir() if path.is_dir()],
}


@pytest.mark.parametrize('lost', DAMAGE)
def test_a_checkpoint_with_missing_files_is_moved_away_with_a_warning(lost, copy, abstract, caplog, monkeypatch):
  monkeypatch.setattr(logging.get_absl_logger(), 'propagate', True)
  earlier, latest = steps_in(copy)
  folder = copy / 'checkpoints'
  expected = checkpoint.Checkpoints(copy, read_only=True)
  expected = abstract._replace(
    step=np.int32(earlier),
    **{name: expected.restore(earlier, name, getattr(abstract, name)) for name in checkpoint.ITEMS},
  )
  DAMAGE[lost](folder / str(latest))
  remaining = sorted(path.relative_to(folder / str(latest)) for path in (folder / str(latest)).rglob('*'))
  kept = {path: path.read_bytes() for path in (folder / str(earlier)).rglob('*') if path.is_file()}

  saved = checkpoint.Checkpoints(copy)
  small.assert_same_bits(saved.restore_latest(abstract), expected)
  assert saved.steps() == [earlier]
  assert f'moved the damaged checkpoint of step {latest} to' in caplog.text
  aside = copy / f'damaged-checkpoint-{latest}'
  assert sorted(path.relative_to(aside) for path in aside.rglob('*')) == remaining
  assert {path: path.read_bytes() for path in (folder / str(earlier)).rglob('*') if path.is_file()} == kept
  saved.close()


def test_a_run_starts_from_step_0_if_every_checkpoint_is_damaged(copy, abstract):
  for step in steps_in(copy):
    shutil.rmtree(copy / 'checkpoints' / str(step) / 'params')
  (copy / f'damaged-checkpoint-{max(steps_in(copy))}').mkdir()  # as left by an earlier start
  assert checkpoint.Checkpoints(copy).restore_latest(abstract) is None
  assert len(list(copy.glob('damaged-checkpoint-*'))) == 3


@pytest.mark.parametrize('lost', [False, True], ids=['empty metrics', 'missing metrics'])
def test_metrics_can_be_added_to_a_saved_checkpoint_without_rewriting_its_state(lost, tmp_path):
  saved = checkpoint.Checkpoints(tmp_path, keep=1, metric='score')
  saved.save(1, state_of(jnp.zeros(3)))
  saved.wait()
  if lost:
    shutil.rmtree(tmp_path / 'checkpoints' / '1' / 'metrics')

  def times():
    files = tmp_path.glob('checkpoints/1/*/**/*')
    return {path: path.stat().st_mtime_ns for path in files if 'metrics' not in path.parts}

  before = times()
  saved.save(1, state_of(jnp.ones(3)), {'score': 0.5})
  assert times() == before
  saved.save(1, state_of(jnp.ones(3)), {'score': 0.1})  # ignored: step 1 already has metrics
  assert saved.metrics(1) == {'score': 0.5}
  saved.save(2, state_of(jnp.ones(3)), {'score': 0.2})
  saved.save(3, state_of(jnp.ones(3)))
  saved.close()
  assert checkpoint.Checkpoints(tmp_path, metric='score', read_only=True).steps() == [1, 3]


@pytest.mark.parametrize('text', ['', '{"exact_match": 0.'], ids=['empty', 'cut'])
def test_a_checkpoint_with_unreadable_metrics_can_still_be_restored(text, copy, abstract):
  earlier, latest = steps_in(copy)
  for step in (earlier, latest):
    (copy / 'checkpoints' / str(step) / 'metrics' / 'metrics').write_text(text)
  reader = checkpoint.Checkpoints(copy, read_only=True)
  assert reader.metrics(latest) is None and reader.find('best') == latest
  saved = checkpoint.Checkpoints(copy)
  assert saved.metrics(latest) is None
  assert int(saved.restore_latest(abstract).step) == latest


def test_loading_weights_from_a_damaged_checkpoint_fails_and_changes_no_file(copy, abstract):
  earlier, latest = steps_in(copy)
  data_file(copy / 'checkpoints' / str(latest) / 'ema_params').unlink()
  before = sorted(copy.rglob('*'))
  reader = checkpoint.Checkpoints(copy, read_only=True)
  with pytest.raises(UserError, match=rf'of step {latest} .* cannot be read .*choose another; .* of steps {earlier}, '):
    reader.restore_weights(latest, abstract.params)
  assert sorted(copy.rglob('*')) == before


def test_a_checkpoint_whose_array_shapes_differ_from_the_model_is_refused_and_not_moved_away(finished, abstract):
  wide = abstract._replace(params={**abstract.params, 'embed': jax.ShapeDtypeStruct((17, 32), jnp.float32)})
  before = sorted(finished.rglob('*'))
  with pytest.raises(UserError, match=r'embed is \(17, 16\) in the checkpoint, \(17, 32\) in this model'):
    checkpoint.Checkpoints(finished).restore_latest(wide)
  assert sorted(finished.rglob('*')) == before


def test_a_checkpoint_can_be_restored_on_a_different_mesh(finished, abstract):
  on_one_device = last_state(finished, abstract)
  *_, on_mesh = small.uninitialized(data=2, fsdp=2, tensor=2)
  shared = last_state(finished, on_mesh)
  small.assert_same_bits(shared, on_one_device)
  for array, wanted in zip(jax.tree.leaves(shared[1:]), jax.tree.leaves(on_mesh[1:]), strict=True):
    assert array.sharding == wanted.sharding


def test_metrics_written_early_by_process_0_do_not_make_other_processes_skip_a_barrier(copy, monkeypatch):
  step, met = steps_in(copy)[-1], []
  path = copy / 'checkpoints' / str(step) / 'metrics' / 'metrics'
  path.unlink()
  saved = checkpoint.Checkpoints(copy)

  def barrier(name):
    met.append(name)
    path.parent.mkdir(exist_ok=True)
    path.write_text('{"exact_match": 0.5}')  # process 0 writes the metrics right after the barrier

  monkeypatch.setattr(checkpoint.processes, 'barrier', barrier)
  monkeypatch.setattr(checkpoint.processes, 'is_first', lambda: False)
  saved.save(step, None, {'exact_match': 0.5})
  assert met == ['metrics read', 'metrics added'] and saved.metrics(step) == {'exact_match': 0.5}
  saved.save(step, None, {'exact_match': 0.25})
  assert met[2:] == ['metrics read'] and saved.metrics(step) == {'exact_match': 0.5}


@pytest.mark.parametrize(
  'error', [MemoryError(), PermissionError(13, 'Permission denied'), ValueError('UNAVAILABLE: x')], ids=repr
)
def test_a_transient_read_error_does_not_move_a_checkpoint_away(error, finished, abstract, monkeypatch):
  saved, before = checkpoint.Checkpoints(finished), sorted(finished.rglob('*'))

  def restore(*_):
    raise error

  monkeypatch.setattr(saved, 'restore', restore)
  with pytest.raises(UserError, match=r'could not be read .*run the same command again \(nothing was changed\)'):
    saved.restore_latest(abstract)
  assert sorted(finished.rglob('*')) == before


# --- saving -----------------------------------------------------------------------------------------------------------


def state_of(*arrays):
  """Return a TrainState with the given arrays as parameters, for tests that need no model."""
  params = {f'w{i}': array for i, array in enumerate(arrays)}
  return train_step.TrainState(0, params, {'m': jax.tree.map(lambda x: x + 1, params)}, None)


@pytest.mark.parametrize('axes', [{}, {'data': 2, 'fsdp': 2, 'tensor': 2}], ids=['one device', 'eight'])
def test_training_steps_during_a_save_do_not_change_the_saved_state(axes, tmp_path):
  mesh = small.mesh(**axes)
  spec = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('fsdp', 'tensor'))
  noise = np.random.default_rng(0).normal(size=(1024, 1024)).astype(np.float32)  # noise takes long to compress
  arrays = [jax.device_put(noise + i, spec) for i in range(6)]
  state = state_of(*arrays, jax.device_put(noise, sharding.replicated(mesh)))[1:3]
  abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
  step = jax.jit(lambda tree: jax.tree.map(lambda x: 2 * x + 1, tree), donate_argnums=0)
  # Copy in a jitted function: a NumPy view of the arrays would keep the step from reusing (donating) their memory.
  twin = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))
  expected, warm = jax.device_get(twin(state)), step(twin(state))
  saved = checkpoint.Checkpoints(tmp_path, keep=1)
  for attempt in range(1, 9):
    params, opt_state = twin(state)
    saved.save(attempt, train_step.TrainState(attempt, params, opt_state, None))
    trees = step((params, opt_state))
    jax.block_until_ready((trees, warm))
    in_time = saved._manager.is_saving_in_progress()
    trees = step(step(trees))
    saved.wait()
    for name, shapes, written in zip(('params', 'opt_state'), abstract, expected, strict=True):
      small.assert_same_bits(saved.restore(attempt, name, shapes), written)
    np.testing.assert_allclose(trees[0]['w1'], 8 * expected[0]['w1'] + 7, rtol=1e-5, atol=1e-5)  # 3 times x -> 2 x + 1
    if in_time:
      break
  else:
    raise AssertionError('in each of eight attempts, the save ended before the training step: make the arrays larger')
  saved.close()


@pytest.mark.parametrize('mode, best', [('max', 2), ('min', 3)])
def test_the_best_and_the_latest_checkpoints_are_kept_across_restarts(mode, best, tmp_path):
  metrics = {1: None, 2: 0.9, 3: 0.1, 4: 0.5, 5: None, 6: 0.6, 7: None}
  state = state_of(jnp.zeros(3))
  for step, value in metrics.items():
    if step in (1, 4, 7):
      saved = checkpoint.Checkpoints(tmp_path, keep=2, metric='score', mode=mode)
    saved.save(step, state, None if value is None else {'score': value, 'loss': 1.0})
    if step in (3, 6, 7):
      saved.close()
  saved = checkpoint.Checkpoints(tmp_path, metric='score', mode=mode, read_only=True)
  assert saved.steps() == [best, 6, 7]
  assert saved.find('best') == best and saved.find('latest') == 7 and saved.find(6) == saved.find('6') == 6
  assert saved.metrics(best) == {'score': metrics[best], 'loss': 1.0} and saved.metrics(7) is None
  for which in ('5', 'first'):
    with pytest.raises(UserError, match=r"no checkpoint of step 5|expected 'best', 'latest' or a step"):
      saved.find(which)


def test_of_two_equally_good_checkpoints_the_later_counts_as_best(tmp_path):
  saved = checkpoint.Checkpoints(tmp_path, keep=1, metric='score')
  for step, value in ((1, 0.5), (2, 0.7), (3, 0.7), (4, 0.1)):
    saved.save(step, state_of(jnp.zeros(3)), {'score': value})
  saved.wait()
  assert saved.steps() == [3, 4] and saved.find('best') == 3
  saved.close()


def test_a_failed_save_raises_an_error_and_keeps_older_checkpoints(tmp_path):
  saved = checkpoint.Checkpoints(tmp_path, keep=1)
  state = state_of(jnp.arange(100_000.0))
  saved.save(1, state)
  saved.wait()
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
  try:
    with pytest.raises(UserError, match=r'File too large.*: the last complete checkpoint is step 1; free disk'):
      saved.save(2, state)
      while True:  # like the training loop, check repeatedly whether a save in the background has failed
        saved.check()
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  assert steps_in(tmp_path) == [1]
  saved = checkpoint.Checkpoints(tmp_path, keep=1)
  assert saved.steps() == [1] and not list(tmp_path.glob(f'checkpoints/*{TMP}'))
  abstract = {'w0': jax.ShapeDtypeStruct((100_000,), jnp.float32, sharding=state.params['w0'].sharding)}
  np.testing.assert_array_equal(saved.restore(1, 'params', abstract)['w0'], np.arange(100_000.0))
  saved.close()
