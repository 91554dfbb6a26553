"""Whatever ends a run, the same command goes on from its last complete checkpoint, and ends with the same bits."""

import json
import os
import random
import re
import resource
import shutil
import signal
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
from ilm_jax.runs.workdir import locked
from ilm_jax.training import loop, train_step
from ilm_jax.types import UserError

# What TensorStore leaves behind when a write or a read fails.
pytestmark = pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')

RUN = {'steps': 100, 'eval.every': 50}  # a checkpoint every 5 steps
TMP = '.orbax-checkpoint-tmp'


@pytest.fixture(scope='module', autouse=True)
def programs(tmp_path_factory):
  folder = tmp_path_factory.mktemp('programs')
  with small.kept_programs(folder):
    yield folder


@pytest.fixture(scope='module')
def cache(tmp_path_factory):
  """Compiled programs of the commands."""
  return tmp_path_factory.mktemp('cache')


@pytest.fixture(scope='module')
def abstract():
  return small.experiment()[-1]


@pytest.fixture
def one_device(monkeypatch):
  monkeypatch.setattr(sharding, 'make_mesh', lambda *_: small.mesh())


def steps_in(workdir) -> list[int]:
  """Steps of the finished checkpoints."""
  folder = workdir / 'checkpoints'
  return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit()) if folder.exists() else []


def leaves(tree) -> dict[str, np.ndarray]:
  named = jax.tree_util.tree_flatten_with_path(tree)[0]
  return {jax.tree_util.keystr(path): np.asarray(x) for path, x in named}


def assert_same_bits(actual, expected):
  actual, expected = leaves(actual), leaves(expected)
  assert actual.keys() == expected.keys()
  for name, array in expected.items():
    assert actual[name].dtype == array.dtype and actual[name].tobytes() == array.tobytes(), f'{name} differs'


def last_state(workdir, abstract):
  """The state of the latest checkpoint: step, params, opt_state and ema_params."""
  return checkpoint.Checkpoints(workdir, read_only=True).restore_latest(abstract)


def assert_ends_as(workdir, undisturbed, abstract):
  """The run ended as the undisturbed one: the same bits, the same scores, each step in the event files once."""
  state, expected = last_state(workdir, abstract), last_state(undisturbed, abstract)
  assert int(state.step) == int(expected.step)
  assert_same_bits(state, expected)
  results = [json.loads((path / 'eval.json').read_text()) for path in (workdir, undisturbed)]
  assert results[0]['metrics'] == results[1]['metrics'] and results[0]['step'] == results[1]['step']
  ours, theirs = logs.read_scalars(workdir), logs.read_scalars(undisturbed)
  for name in ('train/learning_rate', 'train/loss'):
    assert [step for step, _ in ours[name]] == [step for step, _ in theirs[name]], name
  for name in theirs:
    assert not name.startswith('validation/') or ours[name] == theirs[name], name


# --- killed processes -------------------------------------------------------------------------------------------------


def started(workdir) -> bool:
  """Training is about to begin."""
  return any(workdir.glob('events.out.tfevents.*'))


def saving(workdir, after: int = 0) -> bool:
  """A checkpoint of a step after `after` is being written."""
  found = (workdir / 'checkpoints').glob(f'*{TMP}')
  return any(int(path.name.removesuffix(TMP)) > after for path in found)


def reached(workdir, step: int) -> bool:
  """A checkpoint of `step` or later is complete."""
  return max(steps_in(workdir), default=0) >= step


def end(workdir, cache, number, when, changes=RUN, delay: float = 0.0) -> tuple[int, str]:
  """Start the run, send it a signal when `when()` says so, and wait; returns (exit code, standard error)."""
  process = small.start(small.flags(workdir, changes), cache)
  try:
    while not when():
      assert process.poll() is None, f'ended by itself: {process.communicate()}'
      time.sleep(0.001)
    time.sleep(delay)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
  finally:
    process.kill()
  return process.returncode, err


def kill(workdir, cache, when, changes=RUN, delay: float = 0.0) -> None:
  """Start the run and `kill -9` it when `when()` says so."""
  code, err = end(workdir, cache, signal.SIGKILL, when, changes, delay)
  assert code == -signal.SIGKILL, err


def kill_inside_a_save(workdir, cache, after: int, changes=RUN) -> None:
  """Start the run and kill it while it writes a checkpoint of a step after `after`."""
  for _ in range(5):
    kill(workdir, cache, lambda after=after: saving(workdir, after), changes)
    if saving(workdir, after):
      return
    after = max(steps_in(workdir))  # it was finished before the signal came: another one
  raise AssertionError('five times the save was finished before the signal came')


def finish(workdir, cache, changes=RUN) -> str:
  """Start the run and let it end; returns standard error."""
  code, out, err = small.run(small.flags(workdir, changes), cache)
  assert code == loop.FINISHED, err
  assert 'test exact match at step' in out
  return err


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory, cache):
  workdir = tmp_path_factory.mktemp('undisturbed') / 'run'
  finish(workdir, cache)
  return workdir


@pytest.fixture(scope='module')
def stopped(tmp_path_factory, cache, undisturbed):
  """A run that SIGTERM stopped somewhat after step 10."""
  workdir = tmp_path_factory.mktemp('stopped') / 'run'
  code, err = end(workdir, cache, signal.SIGTERM, lambda: reached(workdir, 10))
  assert code == loop.PREEMPTED == 75, err
  assert f'saved at step {max(steps_in(workdir))};' in err and 'Traceback' not in err
  return workdir


@pytest.fixture
def copy(stopped, tmp_path):
  return shutil.copytree(stopped, tmp_path / 'copy')


def test_a_run_that_was_killed_stopped_and_interrupted_ends_as_if_nothing_had_happened(
  tmp_path, cache, undisturbed, abstract
):
  workdir = tmp_path / 'run'
  kill(workdir, cache, lambda: started(workdir))
  assert not steps_in(workdir), 'meant to be before the first save'
  kill_inside_a_save(workdir, cache, after=5)
  kill(workdir, cache, lambda: reached(workdir, 20), delay=random.uniform(0.0, 0.1))

  before = max(steps_in(workdir))
  code, err = end(workdir, cache, signal.SIGTERM, lambda: reached(workdir, before + 5))
  assert code == 75, err
  assert f'resuming at step {before} of' in err
  at = max(steps_in(workdir))
  assert at > before and f'saved at step {at};' in err

  code, err = end(workdir, cache, signal.SIGINT, lambda: reached(workdir, at + 5))
  assert code == loop.INTERRUPTED == 130, err
  assert f'resuming at step {at} of' in err
  assert f'saved at step {max(steps_in(workdir))};' in err

  finish(workdir, cache)
  assert_ends_as(workdir, undisturbed, abstract)
  starts = json.loads((workdir / 'run.json').read_text())['starts']
  assert len(starts) >= 6 and starts[0]['from_step'] == starts[1]['from_step'] == 0


@pytest.mark.long
def test_ten_kills_leave_no_trace(tmp_path, cache, abstract):
  changes = {'steps': 200, 'eval.every': 50}
  finish(tmp_path / 'undisturbed', cache, changes)
  workdir = tmp_path / 'run'
  kill(workdir, cache, lambda: started(workdir), changes)
  assert not steps_in(workdir), 'meant to be before the first save'
  for number in range(9):
    before = max(steps_in(workdir), default=0)
    if number % 3 == 0:
      kill_inside_a_save(workdir, cache, before + 5, changes)
    else:
      delay = random.uniform(0.0, 0.2)
      kill(workdir, cache, lambda step=before + 5: reached(workdir, step), changes, delay)
  finish(workdir, cache, changes)
  assert_ends_as(workdir, tmp_path / 'undisturbed', abstract)


def test_a_finished_run_started_again_only_reports(undisturbed, cache, abstract):
  before = {path: path.stat().st_mtime_ns for path in (undisturbed / 'checkpoints').rglob('*')}
  scalars = logs.read_scalars(undisturbed)
  err = finish(undisturbed, cache)
  assert 'resuming at step 100' in err and 'loss' not in err
  assert {path: path.stat().st_mtime_ns for path in (undisturbed / 'checkpoints').rglob('*')} == before
  assert logs.read_scalars(undisturbed) == scalars


# --- signals at awkward moments ---------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def evaluated(tmp_path_factory):
  """An undisturbed run in this process: 25 steps, evaluated after 20 and at the end."""
  workdir = tmp_path_factory.mktemp('evaluated') / 'run'
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sharding, 'make_mesh', lambda *_: small.mesh())
    assert loop.train(small.config({'steps': 25}), workdir) == loop.FINISHED
  return workdir


@pytest.mark.parametrize(
  'moment, number, code',
  [(0, signal.SIGTERM, 75), (1, signal.SIGINT, 130), (2, signal.SIGTERM, 75)],
  ids=['step 20', 'the last step', 'the test'],
)
def test_a_signal_during_an_evaluation_stops_it_and_it_is_made_up_for(
  moment, number, code, tmp_path, evaluated, abstract, monkeypatch, one_device
):
  real, calls = evaluate.Evaluator.answers, []

  def answers(self, *args, **options):
    calls.append(args)
    if len(calls) - 1 in (moment, moment + 1):  # this time, and at once when it is made up for
      os.kill(os.getpid(), number)
    return real(self, *args, **options)

  monkeypatch.setattr(evaluate.Evaluator, 'answers', answers)
  cfg = small.config({'steps': 25})
  step = (20, 25, 25)[moment]
  for _ in range(2):
    assert loop.train(cfg, tmp_path) == code
    saved = checkpoint.Checkpoints(tmp_path, read_only=True)
    assert saved.steps()[-1] == step
    assert (saved.metrics(step) is None) == (moment < 2)
    assert not (tmp_path / 'eval.json').exists()
  assert loop.train(cfg, tmp_path) == loop.FINISHED
  assert_ends_as(tmp_path, evaluated, abstract)
  assert [step for step, _ in logs.read_scalars(tmp_path)['validation/loss']] == [20, 25]


def test_a_kill_between_an_evaluation_and_its_save_leaves_no_second_entry(tmp_path, evaluated, abstract, one_device):
  cfg = small.config({'steps': 25})
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(evaluate.Evaluator, 'answers', lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM))
    assert loop.train(cfg, tmp_path) == loop.PREEMPTED  # step 20 is saved, not evaluated
  with pytest.MonkeyPatch.context() as patch:

    def broken(self, *_):
      self.writer.flush()
      raise RuntimeError('power cut')

    patch.setattr(loop.Loop, 'save', broken)
    with pytest.raises(RuntimeError, match='power cut'):
      loop.train(cfg, tmp_path)  # evaluated, written to the event files, not saved
  assert [step for step, _ in logs.read_scalars(tmp_path)['validation/loss']] == [20]
  assert loop.train(cfg, tmp_path) == loop.FINISHED
  assert_ends_as(tmp_path, evaluated, abstract)


def test_a_second_interrupt_does_not_wait():
  before = signal.getsignal(signal.SIGINT)
  with loop.Signals() as signals:
    signals.begun = True
    assert not signals.received()
    os.kill(os.getpid(), signal.SIGINT)
    assert signals.received() and signals.code == loop.INTERRUPTED
    with pytest.raises(KeyboardInterrupt):
      os.kill(os.getpid(), signal.SIGINT)
      time.sleep(1)
  assert signal.getsignal(signal.SIGINT) == before


# --- incomplete checkpoints -------------------------------------------------------------------------------------------


def data_file(folder):
  """The largest data file of an item."""
  return max((path for path in folder.glob('ocdbt.process_0/d/*')), key=lambda path: path.stat().st_size)


DAMAGE = {
  'a data file of params': lambda folder: data_file(folder / 'params').unlink(),
  'half of a data file of opt_state': lambda folder: os.truncate(data_file(folder / 'opt_state'), 3000),
  'the manifest of ema_params': lambda folder: (folder / 'ema_params' / 'manifest.ocdbt').unlink(),
  'the metadata of opt_state': lambda folder: (folder / 'opt_state' / '_METADATA').unlink(),
  'opt_state': lambda folder: shutil.rmtree(folder / 'opt_state'),
  'params': lambda folder: shutil.rmtree(folder / 'params'),
  'everything': lambda folder: [shutil.rmtree(path) for path in folder.iterdir() if path.is_dir()],
}


@pytest.mark.parametrize('lost', DAMAGE)
def test_a_checkpoint_that_lost_files_is_passed_over_with_a_warning(lost, copy, abstract, caplog, monkeypatch):
  monkeypatch.setattr(logging.get_absl_logger(), 'propagate', True)
  earlier, latest = steps_in(copy)
  folder = copy / 'checkpoints'
  expected = checkpoint.Checkpoints(copy, read_only=True)
  expected = abstract._replace(
    step=np.int32(earlier),
    **{name: expected.restore(earlier, name, getattr(abstract, name)) for name in checkpoint.ITEMS},
  )
  DAMAGE[lost](folder / str(latest))
  left = sorted(path.relative_to(folder) for path in (folder / str(latest)).rglob('*'))
  kept = {path: path.read_bytes() for path in (folder / str(earlier)).rglob('*') if path.is_file()}

  saved = checkpoint.Checkpoints(copy)
  assert_same_bits(saved.restore_latest(abstract), expected)
  assert saved.steps() == [earlier]
  assert f'passed over the incomplete checkpoint of step {latest}' in caplog.text
  aside = copy / f'damaged-checkpoint-{latest}'
  assert sorted(str(path.relative_to(aside)) for path in aside.rglob('*')) == [
    str(path.relative_to(str(latest))) for path in left
  ]
  assert {path: path.read_bytes() for path in (folder / str(earlier)).rglob('*') if path.is_file()} == kept
  saved.close()


def test_a_run_goes_on_past_an_incomplete_and_a_damaged_checkpoint(copy, cache, undisturbed, abstract):
  earlier, latest = steps_in(copy)
  folder = copy / 'checkpoints'
  shutil.copytree(folder / str(latest), folder / f'3{TMP}')
  data_file(folder / str(latest) / 'opt_state').unlink()
  err = finish(copy, cache)
  warnings = [line for line in err.splitlines() if 'warning:' in line]
  assert len(warnings) == 2 and all('passed over' in line for line in warnings), warnings
  assert f'/3{TMP}' in warnings[0] and f'of step {latest}' in warnings[1]
  assert f'resuming at step {earlier} of' in err and not list(folder.glob(f'*{TMP}'))
  assert_ends_as(copy, undisturbed, abstract)


def test_when_every_checkpoint_is_damaged_the_run_begins_anew(copy, abstract):
  for step in steps_in(copy):
    shutil.rmtree(copy / 'checkpoints' / str(step) / 'params')
  (copy / f'damaged-checkpoint-{max(steps_in(copy))}').mkdir()  # it happened before
  assert checkpoint.Checkpoints(copy).restore_latest(abstract) is None
  assert len(list(copy.glob('damaged-checkpoint-*'))) == 3


@pytest.mark.parametrize('lost', [False, True], ids=['empty', 'lost'])
def test_metrics_that_come_later_are_added_without_touching_the_state(lost, tmp_path):
  saved = checkpoint.Checkpoints(tmp_path, keep=1, metric='score')
  saved.save(1, state_of(jnp.zeros(3)))
  saved.wait()
  if lost:
    shutil.rmtree(tmp_path / 'checkpoints' / '1' / 'metrics')
  before = {
    path: path.stat().st_mtime_ns for path in tmp_path.glob('checkpoints/1/*/**/*') if 'metrics' not in path.parts
  }
  saved.save(1, state_of(jnp.ones(3)), {'score': 0.5})
  assert {p: p.stat().st_mtime_ns for p in tmp_path.glob('checkpoints/1/*/**/*') if 'metrics' not in p.parts} == before
  saved.save(1, state_of(jnp.ones(3)), {'score': 0.1})  # once
  assert saved.metrics(1) == {'score': 0.5}
  saved.save(2, state_of(jnp.ones(3)), {'score': 0.2})
  saved.save(3, state_of(jnp.ones(3)))
  saved.close()
  assert checkpoint.Checkpoints(tmp_path, metric='score', read_only=True).steps() == [1, 3]


@pytest.mark.parametrize('text', ['', '{"exact_match": 0.'])
def test_metrics_that_cannot_be_read_cost_no_checkpoint(text, copy, abstract):
  latest = max(steps_in(copy))
  (copy / 'checkpoints' / str(latest) / 'metrics' / 'metrics').write_text(text)
  reader = checkpoint.Checkpoints(copy, read_only=True)
  assert reader.metrics(latest) is None and reader.find('best') == latest
  saved = checkpoint.Checkpoints(copy)
  assert saved.metrics(latest) is None
  assert int(saved.restore_latest(abstract).step) == latest


def test_a_reader_of_a_damaged_checkpoint_is_told_so_and_changes_nothing(copy, abstract):
  earlier, latest = steps_in(copy)
  data_file(copy / 'checkpoints' / str(latest) / 'ema_params').unlink()
  before = sorted(copy.rglob('*'))
  reader = checkpoint.Checkpoints(copy, read_only=True)
  with pytest.raises(UserError, match=rf'of step {latest} .* cannot be read .*choose another, there are {earlier}, '):
    reader.restore_weights(latest, abstract.params)
  assert sorted(copy.rglob('*')) == before


def test_a_checkpoint_of_another_shape_is_refused_not_passed_over(copy, abstract):
  wide = abstract._replace(params={**abstract.params, 'embed': jax.ShapeDtypeStruct((17, 32), jnp.float32)})
  before = sorted(copy.rglob('*'))
  with pytest.raises(UserError, match=r'another shape: params embed is \(17, 16\) there, \(17, 32\) in this model'):
    checkpoint.Checkpoints(copy).restore_latest(wide)
  assert sorted(copy.rglob('*')) == before


def test_a_checkpoint_is_read_onto_any_mesh(stopped, abstract):
  alone = last_state(stopped, abstract)
  *_, cut = small.experiment(data=2, fsdp=2, tensor=2)
  shared = last_state(stopped, cut)
  assert_same_bits(shared, alone)
  for array, wanted in zip(jax.tree.leaves(shared[1:]), jax.tree.leaves(cut[1:]), strict=True):
    assert array.sharding == wanted.sharding


def test_all_hosts_add_metrics_or_none_also_when_the_first_is_sooner(copy, monkeypatch):
  step, met = steps_in(copy)[-1], []
  path = copy / 'checkpoints' / str(step) / 'metrics' / 'metrics'
  path.unlink(missing_ok=True)
  saved = checkpoint.Checkpoints(copy)

  def barrier(name):
    met.append(name)
    path.parent.mkdir(exist_ok=True)
    path.write_text('{"exact_match": 0.5}')  # by the first host, as soon as it may

  monkeypatch.setattr(checkpoint.hosts, 'barrier', barrier)
  monkeypatch.setattr(checkpoint.hosts, 'first', lambda: False)
  saved.save(step, None, {'exact_match': 0.5})
  assert met == ['metrics read', 'metrics added'] and saved.metrics(step) == {'exact_match': 0.5}
  saved.save(step, None, {'exact_match': 0.25})
  assert met[2:] == ['metrics read'] and saved.metrics(step) == {'exact_match': 0.5}


@pytest.mark.parametrize(
  'error', [MemoryError(), PermissionError(13, 'Permission denied'), ValueError('UNAVAILABLE: x')]
)
def test_a_reading_that_failed_for_another_reason_moves_nothing(error, copy, abstract, monkeypatch):
  saved, before = checkpoint.Checkpoints(copy), sorted(copy.rglob('*'))

  def restore(*_):
    raise error

  monkeypatch.setattr(saved, 'restore', restore)
  with pytest.raises(UserError, match=r'could not be read .*start the same command again \(nothing was changed\)'):
    saved.restore_latest(abstract)
  assert sorted(copy.rglob('*')) == before


def test_a_second_process_in_the_same_workdir_is_refused(copy, cache):
  with locked(copy):
    before = sorted(copy.rglob('*'))
    code, _, err = small.run(small.flags(copy), cache)
    assert code == 1 and re.fullmatch(rf'error: another process is training in {copy}: .* another --workdir\n', err)
    assert sorted(copy.rglob('*')) == before


# --- saving -----------------------------------------------------------------------------------------------------------


def state_of(*arrays):
  """A state of named arrays, to save without a model."""
  params = {f'w{i}': array for i, array in enumerate(arrays)}
  return train_step.TrainState(0, params, {'m': jax.tree.map(lambda x: x + 1, params)}, None)


@pytest.mark.parametrize('axes', [{}, {'data': 2, 'fsdp': 2, 'tensor': 2}], ids=['one device', 'eight'])
def test_steps_that_take_over_the_arrays_do_not_change_what_is_being_saved(axes, tmp_path):
  mesh = small.mesh(**axes)
  cut = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('fsdp', 'tensor'))
  noise = np.random.default_rng(0).normal(size=(1024, 1024)).astype(np.float32)  # it takes time to compress
  arrays = [jax.device_put(noise + i, cut) for i in range(12)]
  state = state_of(*arrays, jax.device_put(noise, sharding.replicated(mesh)))[1:3]
  abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
  step = jax.jit(lambda tree: jax.tree.map(lambda x: 2 * x + 1, tree), donate_argnums=0)
  # Copied by a program: a NumPy view of the arrays would keep the step from taking them over.
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
      assert_same_bits(saved.restore(attempt, name, shapes), written)
    np.testing.assert_allclose(trees[0]['w1'], 8 * expected[0]['w1'] + 7, rtol=1e-5)  # the steps did run
    if in_time:
      break
  else:
    raise AssertionError('eight times the save was finished before the step: the arrays of this test are too small')
  saved.close()


@pytest.mark.parametrize('mode, best', [('max', 2), ('min', 3)])
def test_the_best_and_the_latest_are_kept_also_by_another_process(mode, best, tmp_path):
  metrics = {1: None, 2: 0.9, 3: 0.1, 4: 0.5, 5: None, 6: 0.6, 7: None}
  state = state_of(jnp.zeros(3))
  for step, value in metrics.items():
    saved = checkpoint.Checkpoints(tmp_path, keep=2, metric='score', mode=mode)
    saved.save(step, state, None if value is None else {'score': value, 'loss': 1.0})
    saved.close()
  saved = checkpoint.Checkpoints(tmp_path, metric='score', mode=mode, read_only=True)
  assert saved.steps() == [best, 6, 7]
  assert saved.find('best') == best and saved.find('latest') == 7 and saved.find(6) == saved.find('6') == 6
  assert saved.metrics(best) == {'score': metrics[best], 'loss': 1.0} and saved.metrics(7) is None
  for which in ('5', 'first'):
    with pytest.raises(UserError, match=r"no checkpoint of step 5|expected 'best', 'latest' or a step"):
      saved.find(which)


def test_the_later_of_two_equally_good_checkpoints_is_the_best(tmp_path):
  saved = checkpoint.Checkpoints(tmp_path, keep=1, metric='score')
  for step, value in ((1, 0.5), (2, 0.7), (3, 0.7), (4, 0.1)):
    saved.save(step, state_of(jnp.zeros(3)), {'score': value})
  saved.wait()
  assert saved.steps() == [3, 4] and saved.find('best') == 3
  saved.close()


# --- a full disk ------------------------------------------------------------------------------------------------------


def test_a_save_that_fails_is_said_and_costs_no_older_checkpoint(tmp_path):
  saved = checkpoint.Checkpoints(tmp_path, keep=1)
  state = state_of(jnp.arange(100_000.0))
  saved.save(1, state)
  saved.wait()
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
  try:
    with pytest.raises(UserError, match=r'File too large.*: the last complete checkpoint is step 1; make room'):
      saved.save(2, state)
      while True:  # as the loop does, after each step
        saved.check()
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  assert steps_in(tmp_path) == [1]
  saved = checkpoint.Checkpoints(tmp_path, keep=1)
  assert saved.steps() == [1] and not list(tmp_path.glob(f'checkpoints/*{TMP}'))
  abstract = {'w0': jax.ShapeDtypeStruct((100_000,), jnp.float32, sharding=state.params['w0'].sharding)}
  np.testing.assert_array_equal(saved.restore(1, 'params', abstract)['w0'], np.arange(100_000.0))
  saved.close()


def test_a_full_disk_ends_the_run_in_one_line_and_room_lets_it_go_on(tmp_path, cache):
  """The limit is far above every file but the weights, which are wide here, and far below those."""
  changes, whole, run = {**RUN, 'model.d_ff': 2048}, tmp_path / 'whole', tmp_path / 'run'
  finish(whole, cache, changes)  # compiles everything, too
  code, err = end(run, cache, signal.SIGTERM, lambda: reached(run, 10), changes)
  assert code == loop.PREEMPTED, err
  code, _, err = small.run(small.flags(run, changes), cache, before='ulimit -f 64;')
  assert code == loop.FAILED == 1
  lines = [
    line for line in err.splitlines() if not re.match(r'\d\d:\d\d:\d\d (step|resuming|ilm on|[\d.]+ steps/s)', line)
  ]
  assert len(lines) == 1, err
  latest = max(steps_in(run))
  expected = rf'error: a checkpoint could not be written to {run}/checkpoints \(File too large\): the last complete '
  assert re.fullmatch(expected + rf'checkpoint is step {latest}; make room .* start the same command again', lines[0])
  *_, abstract = small.experiment(changes)
  assert int(last_state(run, abstract).step) == latest
  assert f'resuming at step {latest} of' in finish(run, cache, changes)
  assert_ends_as(run, whole, abstract)
