"""Runs with several processes: same results as one process, checks at the start, and failures of a process."""

import json
import re
import shutil
import signal
import socket
import time

import jax
import numpy as np
import pytest
import small

from ilm_jax import generate, tasks
from ilm_jax.configs import default, star
from ilm_jax.distributed import processes
from ilm_jax.runs import checkpoint, logs, run_file
from ilm_jax.training import loop
from ilm_jax.types import UserError

RUN = {
  'data.groups': 2,
  'log_every': 1,
  'eval.every': 0,
  'distributed.heartbeat_timeout': 10,
  'distributed.initialization_timeout': 60,
}


@pytest.fixture(scope='module')
def commands(tmp_path_factory):
  commands = small.Commands(tmp_path_factory.mktemp('commands'), tmp_path_factory.getbasetemp() / 'programs')
  yield commands
  commands.close()


def free_port() -> int:
  """Return an unused TCP port of this machine."""
  with socket.socket() as found:
    found.bind(('127.0.0.1', 0))
    return found.getsockname()[1]


class Group:
  """The processes of one run, by default two with four devices each; the end of the `with` block kills all of them."""

  def __init__(
    self, commands, workdir, *, processes=2, devices=4, changes=(), worker_changes=(), module='ilm_jax.main', words=(),
    hold=None,
  ):  # fmt: skip
    """Start the processes of the run.

    Args:
      commands: the `small.Commands` that starts the processes.
      workdir: workdir of the run.
      processes: number of processes.
      devices: number of virtual devices per process.
      changes: settings that differ from those of the small run.
      worker_changes: settings that only process 1 changes.
      module: module to run.
      words: command line arguments instead of those of the small run.
      hold: step at which training hangs until killed (0: never); if set, saves all batches, see `tests.witness`.
    """
    port, self.processes, env = free_port(), [], {}
    if hold is not None:
      module, env = 'tests.witness', {'SEEN': str(seen(workdir)), 'HOLD': str(hold)}
    for index in range(processes):
      arguments = words or small.flags(workdir, {**RUN, **dict(changes), **(dict(worker_changes) if index else {})})
      if processes > 1:
        arguments = [
          *arguments, f'--coordinator=127.0.0.1:{port}', f'--num_processes={processes}', f'--process_id={index}',
        ]  # fmt: skip
      self.processes.append(commands.start(module, arguments, devices=devices, env=env))

  def __enter__(self):
    return self

  def __exit__(self, *_):
    for process in self.processes:
      process.kill()
      process.wait(60)

  def wait(self, seconds=120) -> list[int]:
    """Wait until all processes have ended; return their exit codes."""
    return [process.wait(seconds) for process in self.processes]

  def log(self, index=0) -> str:
    """Return the standard output and standard error of a process."""
    return self.processes[index].out.read_text() + self.processes[index].err.read_text()

  def wait_for_step(self, step: int) -> None:
    """Wait until process 0 has logged a step."""
    self.wait_until(lambda: f'step {step} ' in self.log())

  def wait_until(self, condition) -> None:
    """Wait until `condition()` is true; fail if process 0 ends first."""
    end = time.monotonic() + 120
    while not condition():
      assert time.monotonic() < end and self.processes[0].poll() is None, self.log()
      time.sleep(0.05)

  def kill(self) -> None:
    """Kill all processes with SIGKILL."""
    for process in self.processes:
      process.kill()
    assert self.wait() == [-signal.SIGKILL] * len(self.processes)


def losses(workdir) -> dict[int, float]:
  return dict(logs.read_scalars(workdir)['train/loss'])


def checkpoints(workdir) -> list[int]:
  return sorted(int(path.name) for path in workdir.glob('checkpoints/*') if path.name.isdigit())


def seen(workdir):
  """Return the folder in which `tests.witness` saves the training batches of a run."""
  return workdir.parent / f'{workdir.name}.seen'


def batch_at(workdir, step: int) -> dict:
  """Return the saved training batch of a step, concatenated over all processes."""
  files = sorted(seen(workdir).glob(f'{step}-*.npz'))
  parts = [dict(np.load(file)) for file in files]
  return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def assert_same_examples(workdir, expected, steps) -> None:
  """Assert that two runs read the same training batches at the given steps."""
  for step in steps:
    found, wanted = batch_at(workdir, step), batch_at(expected, step)
    assert found.keys() == wanted.keys() and (wanted['example_id_BxS'] >= 0).sum() > 10
    for name in wanted:
      np.testing.assert_array_equal(found[name], wanted[name], err_msg=f'{name}, step {step}')


def train_and_kill(commands, workdir, hold: int, **where) -> str:
  """Train to step `hold`, wait for the last checkpoint, kill all processes; return the log of process 0."""
  changes = {'steps': 30, **where.pop('changes')}
  with Group(commands, workdir, changes=changes, hold=hold, **where) as run:
    run.wait_for_step(hold)
    run.wait_until(lambda: checkpoints(workdir)[-1:] == [hold // 5 * 5])
    run.kill()
    return run.log()


def assert_close(found: dict, expected: dict) -> None:
  """Assert that two runs have nearly the same loss at each step."""
  assert found.keys() == expected.keys()
  np.testing.assert_allclose(found[1], expected[1], rtol=1e-5)
  for step in expected:
    np.testing.assert_allclose(found[step], expected[step], rtol=1e-4, err_msg=f'step {step}')


@pytest.fixture(scope='module')
def trained(tmp_path_factory, commands):
  """Return the workdir of a run of 30 steps in one process with one device."""
  workdir = tmp_path_factory.mktemp('trained') / 'run'
  changes = {'steps': 30, 'sampling.token.temperature': 1.0}
  with Group(commands, workdir, processes=1, devices=1, changes=changes, hold=0) as run:
    assert run.wait() == [0], run.log()
  return workdir


@pytest.fixture(scope='module')
def expected_losses(trained):
  """Return {step: loss} of the run `trained`, which used one process."""
  return losses(trained)


def answers(commands, folder, workdir, graphs, *, processes=1, devices=1, mesh=None) -> dict[int, dict]:
  """Run `ilm-jax generate` on prompts; check that each process wrote its share; return {id: result}."""
  folder.mkdir()
  (folder / 'graphs.txt').write_text('\n'.join(graphs))
  words = [f'--workdir={workdir}', f'--prompts={folder / "graphs.txt"}', f'--out={folder / "answers.jsonl"}']
  words += ['--batch_size=16', '--stop_threshold=0', *([f'--mesh={mesh}'] if mesh else [])]
  options = {'module': 'ilm_jax.generate', 'words': words}
  with Group(commands, folder / 'run', processes=processes, devices=devices, **options) as run:
    assert run.wait() == [0] * processes, run.log()
  found = {}
  files = sorted(folder.glob('*.jsonl'))
  assert len(files) == processes
  for number, file in enumerate(files):
    for line in file.read_text().splitlines():
      record = json.loads(line)
      assert record['id'] % processes == number and record['id'] not in found
      found[record['id']] = record
  assert sorted(found) == list(range(len(graphs)))
  return found


def assert_same(found: dict, expected: dict) -> None:
  """Assert that two runs of `ilm-jax generate` gave the same answers."""
  for index, record in expected.items():
    for name in ('text', 'tokens', 'order', 'stopped'):
      assert found[index][name] == record[name], index
    for name in ('probabilities', 'stop_probabilities'):
      np.testing.assert_allclose(found[index][name], record[name], rtol=1e-4, atol=1e-5)


def graphs_of(number: int) -> list[str]:
  """Return the first `number` star-graph prompts of the test split."""
  cfg = star.get_config('tiny').task
  source = tasks.get('star').source(cfg, 'test')
  examples = [source[i] for i in range(number)]
  return [tasks.get('star').decode(e['tokens'][e['fixed']], cfg).removesuffix('=') for e in examples]


@pytest.mark.parametrize('signaled', [
  pytest.param((0,), id='coordinator', marks=pytest.mark.long), pytest.param((1,), id='worker'),
  pytest.param((0, 1), id='both', marks=pytest.mark.long),
])  # fmt: skip
def test_two_processes_train_like_one_and_a_signal_stops_both_at_the_same_step(
  tmp_path, commands, expected_losses, signaled
):
  workdir = tmp_path / 'run'
  with Group(commands, workdir, devices=2, changes={'steps': 1000}) as run:
    run.wait_for_step(8)
    for index in signaled:
      run.processes[index].send_signal(signal.SIGTERM)
    assert run.wait() == [75, 75], run.log()
    assert "mesh {'data': 4" in run.log()
    assert 'step 8' not in run.log(1)  # only process 0 logs progress
  (saved,) = re.findall(r'saved at step (\d+)', run.log())
  assert checkpoints(workdir)[-1] == int(saved) < 25
  assert len(list(workdir.glob('events.out.tfevents.*'))) == 1
  with Group(commands, workdir, processes=1, devices=2, changes={'steps': 30, 'mesh.fsdp': 2}) as run:
    assert run.wait() == [0], run.log()
  assert f'resuming at step {saved}' in run.log()
  assert_close(losses(workdir), expected_losses)
  starts = json.loads((workdir / 'run.json').read_text())['starts']
  assert [start['processes'] for start in starts] == [2, 1]


@pytest.mark.long
def test_a_killed_run_resumes_on_any_number_of_devices_and_processes(tmp_path, commands, trained, expected_losses):
  workdir = tmp_path / 'run'
  for number, (count, devices, mesh) in enumerate((
    (1, 8, {'mesh.fsdp': 4}), (1, 4, {'mesh.tensor': 2}), (1, 2, {}), (1, 1, {}),
    (2, 4, {'mesh.fsdp': 2, 'mesh.tensor': 2}),
  )):  # fmt: skip
    start, hold = 5 * number, 5 * number + 8
    log = train_and_kill(commands, workdir, hold, processes=count, devices=devices, changes=mesh)
    assert (f'resuming at step {start} ' in log) == (start > 0)
    assert_same_examples(workdir, trained, range(start + 1, hold + 1))
    shutil.rmtree(seen(workdir))
  with Group(commands, workdir, processes=1, devices=8, changes={'steps': 30}, hold=0) as run:
    assert run.wait() == [0], run.log()
  assert_same_examples(workdir, trained, range(26, 31))
  assert_close(losses(workdir), expected_losses)


@pytest.mark.long
@pytest.mark.parametrize('processes, devices, mesh', [
  (1, 8, {'mesh.fsdp': 4}), (1, 8, {'mesh.fsdp': 2, 'mesh.tensor': 2}), (2, 4, {'mesh.fsdp': 8}),
])  # fmt: skip
def test_a_killed_run_resumes_to_bitwise_equal_weights_on_the_same_mesh(tmp_path, commands, processes, devices, mesh):
  where = {'processes': processes, 'devices': devices}
  abstract = small.experiment({**RUN, **mesh})[-1]
  states = []
  for name in ('undisturbed', 'killed'):
    workdir = tmp_path / name
    if name == 'killed':
      train_and_kill(commands, workdir, 8, **where, changes={'steps': 12, **mesh})
    with Group(commands, workdir, **where, changes={'steps': 12, **mesh}) as run:
      assert run.wait() == [0] * processes, run.log()
      assert ('resuming at step 5 ' in run.log()) == (name == 'killed')
    states.append(checkpoint.Checkpoints(workdir, read_only=True).restore_latest(abstract))
  assert int(states[0].step) == 12
  for one, other in zip(*map(jax.tree.leaves, states), strict=True):
    assert np.asarray(one).tobytes() == np.asarray(other).tobytes()
  assert losses(tmp_path / 'killed') == losses(tmp_path / 'undisturbed')


@pytest.mark.long
@pytest.mark.parametrize('axes', [{'mesh.fsdp': 8}, {'mesh.tensor': 2}])
def test_losses_do_not_change_if_the_mesh_spans_two_processes(tmp_path, commands, expected_losses, axes):
  workdir, changes = tmp_path / 'run', {'steps': 30, **axes}
  with Group(commands, workdir, changes=changes) as run:
    assert run.wait() == [0, 0], run.log()
  assert_close(losses(workdir), expected_losses)
  result = json.loads((workdir / 'eval.json').read_text())
  (workdir / 'eval.json').unlink()
  with Group(commands, workdir, words=[*small.flags(workdir, {**RUN, **changes}), '--mode=eval']) as run:
    assert run.wait() == [0, 0], run.log()
  again = json.loads((workdir / 'eval.json').read_text())
  assert (again['metrics'], again['step']) == (result['metrics'], result['step'])


@pytest.mark.long
@pytest.mark.parametrize('signaled', [0, 1], ids=['coordinator', 'worker'])
@pytest.mark.parametrize('number', [signal.SIGKILL, signal.SIGSTOP], ids=['killed', 'stopped'])
def test_if_one_process_dies_or_hangs_the_other_ends_and_the_run_can_resume(
  tmp_path, commands, expected_losses, number, signaled
):
  workdir = tmp_path / 'run'
  default_timeout = {'distributed.heartbeat_timeout': default.get_config().distributed.heartbeat_timeout}
  with Group(commands, workdir, changes={'steps': 100_000, **default_timeout}) as run:
    run.wait_for_step(8)
    run.processes[signaled].send_signal(number)
    assert run.processes[1 - signaled].wait(60) in (134, -signal.SIGABRT), run.log(1 - signaled)
    log = run.log(1 - signaled)
    assert 'start all processes again' in log or 'another task died' in log
  with Group(commands, workdir, changes={'steps': 30}) as run:
    assert run.wait() == [0, 0], run.log()
    assert 'resuming at step' in run.log()
  assert_close(losses(workdir), expected_losses)


def test_two_processes_generate_the_same_answers_as_one(tmp_path, commands, trained):
  graphs = graphs_of(20)
  expected = answers(commands, tmp_path / 'one', trained, graphs)
  assert len({tuple(record['tokens'][-4:]) for record in expected.values()}) > 10
  found = answers(commands, tmp_path / 'two', trained, graphs, processes=2, devices=2, mesh='data=2,tensor=2')
  assert_same(found, expected)


@pytest.mark.long
@pytest.mark.parametrize('processes, devices, mesh', [
  (1, 2, 'data=2'), (1, 4, 'fsdp=4,data=1'), (1, 8, 'fsdp=2,tensor=2'), (2, 4, None),
])  # fmt: skip
def test_two_hundred_generated_answers_do_not_depend_on_the_mesh(tmp_path, commands, trained, processes, devices, mesh):
  graphs = graphs_of(200)
  expected = answers(commands, tmp_path / 'one', trained, graphs)
  assert_same(
    answers(commands, tmp_path / 'many', trained, graphs, processes=processes, devices=devices, mesh=mesh), expected
  )


def test_processes_with_different_settings_are_refused(tmp_path, commands):
  with Group(commands, tmp_path / 'run', worker_changes={'optimizer.learning_rate': 0.02}) as run:
    assert run.wait() == [1, 1]
  for index in (0, 1):
    line = run.log(index).splitlines()[-1]
    assert line == ('error: process 1 has optimizer.learning_rate=0.02, process 0 has 0.01: start all with the same '
                    'command and code')  # fmt: skip
  assert not (tmp_path / 'run').exists()


def test_processes_with_different_code_are_refused(monkeypatch, tmp_path):
  code, asked = run_file.code(), {}
  assert code['jax'] == jax.__version__ and code['sentencepiece'] != 'unknown'
  for name, other in (('commit', 'abc'), ('code', '0123'), ('jaxlib', '0.0.1')):
    with monkeypatch.context() as patch:
      patch.setattr(processes, 'gather', lambda text, other=other, name=name: [text, json.dumps({**code, name: other})])
      with pytest.raises(
        UserError, match=rf'^process 1 has {name}={other}, process 0 has .*: start all with the same command'
      ):
        processes.agree(code)
  monkeypatch.setattr(processes, 'agree', asked.update)
  loop.build_on_all(small.config({'mesh.data': 8}), tmp_path / 'run', 'train')
  assert asked.items() >= code.items() and asked['mode'] == 'train'
  package = shutil.copytree(small.ROOT / 'ilm_jax', tmp_path / 'ilm_jax')
  monkeypatch.setattr(run_file, 'PACKAGE', package)
  assert run_file.code() == {**code, 'commit': 'unknown'}
  with (package / 'families' / 'ilm.py').open('a') as file:
    file.write('# a change\n')
  assert run_file.code()['code'] != code['code']


def test_processes_that_see_different_checkpoints_exit_and_ask_to_be_started_again(monkeypatch, tmp_path):
  def gather(text):
    return [text, text.replace('{}', json.dumps({'5': True}))]

  monkeypatch.setattr(processes, 'gather', gather)
  cfg = small.config({'mesh.data': 8})
  with pytest.raises(
    UserError, match=r"process 1 has checkpoints={'5': True}, process 0 has {}: .*: start all of them again"
  ) as error:
    loop.train(cfg, tmp_path / 'run')
  assert error.value.code == 134 and error.value.everywhere


@pytest.mark.long
def test_all_processes_exit_with_code_1_if_the_loss_diverges(tmp_path, commands):
  changes = {'steps': 1000, 'optimizer.learning_rate': 1e30, 'optimizer.clip': 1e30}
  with Group(commands, tmp_path / 'run', changes=changes) as run:
    assert run.wait() == [1, 1], run.log()
    assert 'lower optimizer.learning_rate' in run.log()


def test_generate_numbers_the_output_files_of_several_processes():
  for name, expected in (
    ('answers.jsonl', 'answers-00001-of-00002.jsonl'), ('runs/v1.2/answers', 'runs/v1.2/answers-00001-of-00002'),
    ('gs://bucket/out/answers.jsonl', 'gs://bucket/out/answers-00001-of-00002.jsonl'),
  ):  # fmt: skip
    assert generate.shard(name, 1, 2) == expected and generate.shard(name, 0, 1) == name


def test_a_user_error_in_one_process_is_raised_in_all_processes(monkeypatch):
  monkeypatch.setattr(processes, 'gather', lambda text: ['', text or 'no room'])
  with pytest.raises(UserError, match=r'^process 1: no room$'), processes.raise_on_all():
    pass
  with pytest.raises(UserError, match=r'^own error$'), processes.raise_on_all():
    raise UserError('own error')


def test_a_workdir_that_not_all_processes_share_is_refused(monkeypatch, tmp_path):
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  monkeypatch.setattr(processes, 'gather', lambda text: [text, text])
  processes.check_shared(tmp_path)
  monkeypatch.setattr(processes, 'FILE_TIMEOUT', 0)
  monkeypatch.setattr(processes, 'gather', lambda text: [text, '' if text == 'x' else text])
  with pytest.raises(UserError, match='process 1 does not see the files that process 0 writes there'):
    processes.check_shared(tmp_path)
  assert not list(tmp_path.iterdir())
  (tmp_path / 'file').write_text('')
  monkeypatch.setattr(processes, 'gather', lambda text: [text, ''])
  with pytest.raises(UserError, match=r'the workdir .*file/run cannot be written \(Not a directory\)'):
    processes.check_shared(tmp_path / 'file' / 'run')


@pytest.mark.parametrize('given, message', [
  (('a:1', None, None), '--coordinator needs --num_processes and --process_id too'),
  ((None, 2, None), '--num_processes needs --coordinator and --process_id too'),
  (('a:1', 2, 2), r'--process_id=2 --num_processes=2: expected 0 to 1'),
  (('a:1', 0, 0), r'^--num_processes=0: expected at least 1$'),
  (('a', 2, 1), '--coordinator=a: expected HOST:PORT'),
  ((':80', 2, 1), '--coordinator=:80: expected HOST:PORT'),
])  # fmt: skip
def test_incomplete_or_impossible_process_flags_are_refused(given, message):
  with pytest.raises(UserError, match=message):
    processes.start(*given)


def test_an_unreachable_coordinator_gives_a_one_line_error():
  port = free_port()
  with pytest.raises(UserError, match=rf'--coordinator=127.0.0.1:{port} cannot be reached \(Connection refused'):
    processes.start(f'127.0.0.1:{port}', 2, 1, initialization_timeout=0)


def test_a_timeout_while_waiting_for_other_processes_gives_a_one_line_error(tmp_path, commands):
  flags = [f'--coordinator=127.0.0.1:{free_port()}', '--num_processes=2', '--process_id=0']
  words = [*small.flags(tmp_path / 'run', {**RUN, 'distributed.initialization_timeout': 1}), *flags]
  code, out, err = commands('ilm_jax.main', words)
  assert code == 134 and not out  # launch/resume.sh restarts a run that exits with 134
  (line,) = [line for line in err.splitlines() if line.startswith('error: ')]
  assert re.fullmatch(r'error: the processes did not all connect to 127\.0\.0\.1:\d+ within 1 s: is every .*', line)


def test_environment_variables_of_multi_process_launchers_are_recognized(tmp_path):
  devices = (str(tmp_path / 'accel0'),)
  several = {'SLURM_STEP_NUM_TASKS': '4'}, {'OMPI_COMM_WORLD_SIZE': '2'}, {'TPU_WORKER_HOSTNAMES': 'a,b'}
  for env in (*several, {'TPU_PROCESS_ADDRESSES': 'a:1,b:1'}, {'MEGASCALE_COORDINATOR_ADDRESS': 'a'}):
    assert processes.environment_names_peers(env, devices), env
  for env in ({}, {'SLURM_STEP_NUM_TASKS': '1', 'SLURM_NTASKS': '4'}, {'TPU_WORKER_HOSTNAMES': 'localhost'}):
    assert not processes.environment_names_peers(env, devices), env
  (tmp_path / 'accel0').touch()
  assert processes.environment_names_peers({}, devices)  # a TPU VM may be one host of several
  assert not processes.environment_names_peers({'JAX_PLATFORMS': 'cpu', 'TPU_WORKER_HOSTNAMES': 'a,b'}, devices)


def test_a_process_without_coordinator_runs_alone_unless_a_launcher_started_several_processes(monkeypatch):
  asked = []

  def initialize(**options):
    asked.append(options)
    raise ValueError('coordinator_address should be defined.')

  monkeypatch.setattr(processes, 'environment_names_peers', lambda: True)  # as if a TPU device file existed
  monkeypatch.setattr(jax.distributed, 'initialize', initialize)
  assert processes.start() is None and len(asked) == 1
  assert processes.which() == (0, 1)
  monkeypatch.setenv('OMPI_COMM_WORLD_SIZE', '2')  # Open MPI 5 sets no coordinator address
  with pytest.raises(UserError, match=r'OMPI_COMM_WORLD_SIZE=2: .* give --coordinator=HOST:PORT'):
    processes.start()


def test_error_messages_about_a_lost_process_are_recognized(monkeypatch):
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  peer_lost = jax.errors.JaxRuntimeError('Gloo AllReduce failed: Connection closed by peer')
  assert processes.is_peer_lost(peer_lost)
  assert processes.is_peer_lost(jax.errors.JaxRuntimeError('NCCL: remote process exited or there was a network error'))
  for fault in ('RESOURCE_EXHAUSTED: out of memory', 'NCCL error: Duplicate GPU detected', '503 UNAVAILABLE'):
    assert not processes.is_peer_lost(jax.errors.JaxRuntimeError(fault))
  assert not processes.is_peer_lost(OSError('Connection closed by peer'))  # as raised by a network file system
  wrapped = UserError('--workdir=/home/heartbeat cannot be written')
  assert not processes.is_peer_lost(wrapped)
  wrapped.__cause__ = peer_lost
  assert processes.is_peer_lost(wrapped)
  monkeypatch.setattr(jax, 'process_count', lambda: 1)
  assert not processes.is_peer_lost(peer_lost)
