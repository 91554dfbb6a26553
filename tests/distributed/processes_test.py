"""Several processes that train together: the steps of one, and an end for all when one ends."""

import json
import re
import shutil
import signal
import socket
import subprocess
import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import small

from ilm_jax import generate, tasks
from ilm_jax.configs import default, star
from ilm_jax.distributed import processes, sharding
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
def cache(tmp_path_factory):
  return tmp_path_factory.mktemp('cache')


def free_port() -> int:
  with socket.socket() as found:
    found.bind(('127.0.0.1', 0))
    return found.getsockname()[1]


class Pair:
  """Two processes of four devices each, or one of `devices`, that train, or run another command.

  With `hold`, what they read for training is seen in WORKDIR.seen, and they wait at that step (0: not) to be killed.
  """

  def __init__(
    self, workdir, cache, *, processes=2, devices=4, changes=(), other=(), module='ilm_jax.main', words=(), hold=None
  ):
    port, self.out = free_port(), [workdir.parent / f'{workdir.name}.{i}.out' for i in range(processes)]
    self.processes, before = [], f'export JAX_NUM_CPU_DEVICES={devices};'
    if hold is not None:
      module, before = 'tests.witness', f'{before} export SEEN={seen(workdir)} HOLD={hold};'
    for index, out in enumerate(self.out):
      many = [f'--coordinator=127.0.0.1:{port}', f'--num_processes={processes}', f'--process_id={index}']
      arguments = words or small.flags(workdir, {**RUN, **dict(changes), **(dict(other) if index else {})})
      self.processes.append(small.start(
        [*arguments, *(many if processes > 1 else [])], cache, module=module,
        before=before, stdout=out.open('w'), stderr=subprocess.STDOUT,
      ))  # fmt: skip

  def __enter__(self):
    return self

  def __exit__(self, *_):
    for process in self.processes:
      process.kill()
      process.wait()

  def wait(self, seconds=120) -> list[int]:
    """Exit codes of all."""
    return [process.wait(seconds) for process in self.processes]

  def said(self, index=0) -> str:
    return self.out[index].read_text()

  def reach(self, step: int) -> None:
    """Wait until the first has made a step."""
    self.await_(lambda: f'step {step} ' in self.said())

  def await_(self, happened) -> None:
    """Wait until something has happened, while the first runs."""
    end = time.monotonic() + 120
    while not happened():
      assert time.monotonic() < end and self.processes[0].poll() is None, self.said()
      time.sleep(0.05)

  def kill(self) -> None:
    """`kill -9` all at once."""
    for process in self.processes:
      process.kill()
    assert self.wait() == [-signal.SIGKILL] * len(self.processes)


def losses(workdir) -> dict[int, float]:
  return dict(logs.read_scalars(workdir)['train/loss'])


def checkpoints(workdir) -> list[int]:
  return sorted(int(path.name) for path in workdir.glob('checkpoints/*') if path.name.isdigit())


def seen(workdir):
  """Where the batches of a run lie."""
  return workdir.parent / f'{workdir.name}.seen'


def batch_at(workdir, step: int) -> dict:
  """What all processes together read for a step."""
  files = sorted(seen(workdir).glob(f'{step}-*.npz'))
  parts = [dict(np.load(file)) for file in files]
  return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def assert_same_examples(workdir, expected, steps) -> None:
  """The same ids, deletions and rows, at each step."""
  for step in steps:
    found, there = batch_at(workdir, step), batch_at(expected, step)
    assert found.keys() == there.keys() and (there['example_id_BxS'] >= 0).sum() > 10
    for name in there:
      np.testing.assert_array_equal(found[name], there[name], err_msg=f'{name}, step {step}')


def train_and_kill(workdir, cache, hold: int, **where) -> str:
  """Train up to a step, kill all processes there, after the checkpoint before it is complete; what the first said."""
  changes = {'steps': 30, **where.pop('changes')}
  with Pair(workdir, cache, changes=changes, hold=hold, **where) as run:
    run.reach(hold)
    run.await_(lambda: checkpoints(workdir)[-1:] == [hold // 5 * 5])
    run.kill()
    return run.said()


def assert_close(found: dict, expected: dict) -> None:
  assert found.keys() == expected.keys()
  np.testing.assert_allclose(found[1], expected[1], rtol=1e-6)
  for step in expected:
    np.testing.assert_allclose(found[step], expected[step], rtol=1e-4, err_msg=f'step {step}')


@pytest.fixture(scope='module')
def trained(tmp_path_factory, cache):
  """The workdir of thirty steps on one device of one process."""
  workdir = tmp_path_factory.mktemp('alone') / 'run'
  changes = {'steps': 30, 'sampling.token.temperature': 1.0}
  with Pair(workdir, cache, processes=1, devices=1, changes=changes, hold=0) as run:
    assert run.wait() == [0], run.said()
  return workdir


@pytest.fixture(scope='module')
def alone(trained):
  """The losses of those steps."""
  return losses(trained)


def answers(folder, cache, workdir, graphs, *, processes=1, devices=1, mesh=None) -> dict[int, dict]:
  """What `generate` says of graphs, and in which file."""
  folder.mkdir()
  (folder / 'graphs.txt').write_text('\n'.join(graphs))
  words = [f'--workdir={workdir}', f'--prompts={folder / "graphs.txt"}', f'--out={folder / "answers.jsonl"}']
  words += ['--batch_size=16', '--stop_threshold=0', *([f'--mesh={mesh}'] if mesh else [])]
  more = {'module': 'ilm_jax.generate', 'words': words}
  with Pair(folder / 'run', cache, processes=processes, devices=devices, **more) as run:
    assert run.wait() == [0] * processes, run.said()
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
  for index, record in expected.items():
    for name in ('text', 'tokens', 'order', 'stopped'):
      assert found[index][name] == record[name], index
    for name in ('probabilities', 'stop_probabilities'):
      np.testing.assert_allclose(found[index][name], record[name], atol=1e-5)


def graphs_of(number: int) -> list[str]:
  cfg = star.get_config('tiny').task
  source = tasks.get('star').source(cfg, 'test')
  examples = [source[i] for i in range(number)]
  return [tasks.get('star').decode(e['tokens'][e['fixed']], cfg).removesuffix('=') for e in examples]


@pytest.mark.parametrize('who', [
  pytest.param((0,), id='coordinator', marks=pytest.mark.long), pytest.param((1,), id='worker'),
  pytest.param((0, 1), id='both', marks=pytest.mark.long),
])  # fmt: skip
def test_two_processes_take_the_steps_of_one_and_stop_at_the_same_one(tmp_path, cache, alone, who):
  workdir = tmp_path / 'run'
  with Pair(workdir, cache, changes={'steps': 1000}) as run:
    run.reach(8)
    for index in who:
      run.processes[index].send_signal(signal.SIGTERM)
    assert run.wait() == [75, 75], run.said()
    assert "mesh {'data': 8" in run.said()
    assert 'step 8' not in run.said(1)  # the first speaks for all
  (saved,) = re.findall(r'saved at step (\d+)', run.said())
  assert checkpoints(workdir)[-1] == int(saved) < 25
  assert len(list(workdir.glob('events.out.tfevents.*'))) == 1
  with Pair(workdir, cache, processes=1, devices=2, changes={'steps': 30, 'mesh.fsdp': 2}) as run:
    assert run.wait() == [0], run.said()
  assert f'resuming at step {saved}' in run.said()
  assert_close(losses(workdir), alone)
  starts = json.loads((workdir / 'run.json').read_text())['starts']
  assert [start['processes'] for start in starts] == [2, 1]


@pytest.mark.long
def test_a_run_that_is_killed_goes_on_on_any_number_of_devices_and_hosts(tmp_path, cache, trained, alone):
  workdir = tmp_path / 'run'
  for number, (count, devices, mesh) in enumerate((
    (1, 8, {'mesh.fsdp': 4}), (1, 4, {'mesh.tensor': 2}), (1, 2, {}), (1, 1, {}),
    (2, 4, {'mesh.fsdp': 2, 'mesh.tensor': 2}),
  )):  # fmt: skip
    start, hold = 5 * number, 5 * number + 8
    said = train_and_kill(workdir, cache, hold, processes=count, devices=devices, changes=mesh)
    assert (f'resuming at step {start} ' in said) == (start > 0)
    assert_same_examples(workdir, trained, range(start + 1, hold + 1))
    shutil.rmtree(seen(workdir))
  with Pair(workdir, cache, processes=1, devices=8, changes={'steps': 30}, hold=0) as run:
    assert run.wait() == [0], run.said()
  assert_same_examples(workdir, trained, range(26, 31))
  assert_close(losses(workdir), alone)


@pytest.mark.long
@pytest.mark.parametrize('processes, devices, mesh', [
  (1, 8, {'mesh.fsdp': 4}), (1, 8, {'mesh.fsdp': 2, 'mesh.tensor': 2}), (2, 4, {'mesh.fsdp': 8}),
])  # fmt: skip
def test_a_run_that_is_killed_ends_with_the_same_bits_on_the_same_mesh(tmp_path, cache, processes, devices, mesh):
  where = {'processes': processes, 'devices': devices}
  abstract = small.experiment({**RUN, **mesh})[-1]
  states = []
  for name in ('undisturbed', 'killed'):
    workdir = tmp_path / name
    if name == 'killed':
      train_and_kill(workdir, cache, 8, **where, changes={'steps': 12, **mesh})
    with Pair(workdir, cache, **where, changes={'steps': 12, **mesh}) as run:
      assert run.wait() == [0] * processes, run.said()
      assert ('resuming at step 5 ' in run.said()) == (name == 'killed')
    states.append(checkpoint.Checkpoints(workdir, read_only=True).restore_latest(abstract))
  assert int(states[0].step) == 12
  for one, other in zip(*map(jax.tree.leaves, states), strict=True):
    assert np.asarray(one).tobytes() == np.asarray(other).tobytes()
  assert losses(tmp_path / 'killed') == losses(tmp_path / 'undisturbed')


@pytest.mark.long
@pytest.mark.parametrize('axes', [{'mesh.fsdp': 8}, {'mesh.tensor': 2}])
def test_a_mesh_over_processes_changes_no_loss(tmp_path, cache, alone, axes):
  workdir, changes = tmp_path / 'run', {'steps': 30, **axes}
  with Pair(workdir, cache, changes=changes) as run:
    assert run.wait() == [0, 0], run.said()
  assert_close(losses(workdir), alone)
  result = json.loads((workdir / 'eval.json').read_text())
  (workdir / 'eval.json').unlink()
  with Pair(workdir, cache, words=[*small.flags(workdir, {**RUN, **changes}), '--mode=eval']) as run:
    assert run.wait() == [0, 0], run.said()
  again = json.loads((workdir / 'eval.json').read_text())
  assert (again['metrics'], again['step']) == (result['metrics'], result['step'])


@pytest.mark.long
@pytest.mark.parametrize('who', [0, 1], ids=['coordinator', 'worker'])
@pytest.mark.parametrize('number', [signal.SIGKILL, signal.SIGSTOP], ids=['killed', 'stopped'])
def test_a_host_that_dies_or_falls_silent_ends_the_run_and_it_goes_on(tmp_path, cache, alone, number, who):
  workdir = tmp_path / 'run'
  patience = {'distributed.heartbeat_timeout': default.get_config().distributed.heartbeat_timeout}
  with Pair(workdir, cache, changes={'steps': 100_000, **patience}) as run:
    run.reach(8)
    run.processes[who].send_signal(number)
    assert run.processes[1 - who].wait(60) in (134, -signal.SIGABRT), run.said(1 - who)
    said = run.said(1 - who)
    assert 'start all again with the same command' in said or 'another task died' in said
  with Pair(workdir, cache, changes={'steps': 30}) as run:
    assert run.wait() == [0, 0], run.said()
    assert 'resuming at step' in run.said()
  assert_close(losses(workdir), alone)


def test_answers_of_two_processes_are_those_of_one(tmp_path, cache, trained):
  graphs = graphs_of(20)
  expected = answers(tmp_path / 'one', cache, trained, graphs)
  assert len({tuple(record['tokens'][-4:]) for record in expected.values()}) > 10
  found = answers(tmp_path / 'two', cache, trained, graphs, processes=2, devices=4, mesh='data=4,tensor=2')
  assert_same(found, expected)


@pytest.mark.long
@pytest.mark.parametrize('processes, devices, mesh', [
  (1, 2, 'data=2'), (1, 4, 'fsdp=4,data=1'), (1, 8, 'fsdp=2,tensor=2'), (2, 4, None),
])  # fmt: skip
def test_two_hundred_answers_do_not_depend_on_the_mesh(tmp_path, cache, trained, processes, devices, mesh):
  graphs = graphs_of(200)
  expected = answers(tmp_path / 'one', cache, trained, graphs)
  assert_same(
    answers(tmp_path / 'many', cache, trained, graphs, processes=processes, devices=devices, mesh=mesh), expected
  )


def test_hosts_with_other_settings_are_told_which(tmp_path, cache):
  with Pair(tmp_path / 'run', cache, other={'optimizer.learning_rate': 0.02}) as run:
    assert run.wait() == [1, 1]
  for index in (0, 1):
    line = run.said(index).splitlines()[-1]
    assert line == ('error: host 1 has optimizer.learning_rate=0.02, host 0 has 0.01: start all with the same command '
                    'and code')  # fmt: skip
  assert not (tmp_path / 'run').exists()


def test_hosts_with_other_code_are_told_so(monkeypatch, tmp_path):
  code, asked = run_file.code(), {}
  assert code['jax'] == jax.__version__ and code['sentencepiece'] != 'unknown'
  for name, other in (('commit', 'abc'), ('code', '0123'), ('jaxlib', '0.0.1')):
    with monkeypatch.context() as patch:
      patch.setattr(processes, 'gather', lambda text, other=other, name=name: [text, json.dumps({**code, name: other})])
      with pytest.raises(
        UserError, match=rf'^host 1 has {name}={other}, host 0 has .*: start all with the same command'
      ):
        processes.agree(code)
  monkeypatch.setattr(processes, 'agree', asked.update)
  loop.agreed(small.config({'mesh.data': 8}), tmp_path / 'run', 'train')
  assert asked.items() >= code.items() and asked['mode'] == 'train'
  package = shutil.copytree(small.ROOT / 'ilm_jax', tmp_path / 'ilm_jax')
  monkeypatch.setattr(run_file, 'PACKAGE', package)
  assert run_file.code() == {**code, 'commit': 'unknown'}
  with (package / 'families' / 'ilm.py').open('a') as file:
    file.write('# other\n')
  assert run_file.code()['code'] != code['code']


def test_hosts_that_do_not_see_the_same_checkpoints_are_to_be_started_again(monkeypatch, tmp_path):
  def gather(text):
    return [text, text.replace('{}', json.dumps({'5': True}))]

  monkeypatch.setattr(processes, 'gather', gather)
  cfg = small.config({'mesh.data': 8})
  with pytest.raises(
    UserError, match=r"host 1 has checkpoints={'5': True}, host 0 has {}: .* start all again"
  ) as error:
    loop.train(cfg, tmp_path / 'run')
  assert error.value.code == 134 and error.value.everywhere


@pytest.mark.long
def test_an_error_of_all_hosts_has_one_exit_code(tmp_path, cache):
  changes = {'steps': 1000, 'optimizer.learning_rate': 1e30, 'optimizer.clip': 1e30}
  with Pair(tmp_path / 'run', cache, changes=changes) as run:
    assert run.wait() == [1, 1], run.said()
    assert 'lower optimizer.learning_rate' in run.said()


def test_the_files_of_several_hosts_lie_where_the_one_would():
  for name, expected in (
    ('answers.jsonl', 'answers-00001-of-00002.jsonl'), ('runs/v1.2/answers', 'runs/v1.2/answers-00001-of-00002'),
    ('gs://bucket/out/answers.jsonl', 'gs://bucket/out/answers-00001-of-00002.jsonl'),
  ):  # fmt: skip
    assert generate.shard(name, 1, 2) == expected and generate.shard(name, 0, 1) == name


def test_a_mistake_of_one_host_is_said_by_all(monkeypatch):
  monkeypatch.setattr(processes, 'gather', lambda text: ['', text or 'no room'])
  with pytest.raises(UserError, match=r'^host 1: no room$'), processes.together():
    pass
  with pytest.raises(UserError, match=r'^mine$'), processes.together():
    raise UserError('mine')


def test_a_folder_that_a_host_does_not_see_is_refused(monkeypatch, tmp_path):
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  monkeypatch.setattr(processes, 'gather', lambda text: [text, text])
  processes.share(tmp_path)
  monkeypatch.setattr(processes, 'WAIT', 0)
  monkeypatch.setattr(processes, 'gather', lambda text: [text, '' if text == 'x' else text])
  with pytest.raises(UserError, match='host 1 does not see what host 0 writes there'):
    processes.share(tmp_path)
  assert not list(tmp_path.iterdir())
  (tmp_path / 'file').write_text('')
  monkeypatch.setattr(processes, 'gather', lambda text: [text, ''])
  with pytest.raises(UserError, match=r'the workdir .*file/run cannot be written \(Not a directory\)'):
    processes.share(tmp_path / 'file' / 'run')


@pytest.mark.parametrize('given, message', [
  (('a:1', None, None), '--coordinator needs --num_processes and --process_id too'),
  ((None, 2, None), '--num_processes needs --coordinator and --process_id too'),
  (('a:1', 2, 2), r'--process_id=2 --num_processes=2: expected 0 \.\.\. 1'),
  (('a', 2, 1), '--coordinator=a: expected HOST:PORT'),
  ((':80', 2, 1), '--coordinator=:80: expected HOST:PORT'),
])  # fmt: skip
def test_flags_of_hosts_that_make_no_sense_are_refused(given, message):
  with pytest.raises(UserError, match=message):
    processes.start(*given)


def test_a_coordinator_that_cannot_be_reached_is_one_line():
  port = free_port()
  with pytest.raises(UserError, match=rf'--coordinator=127.0.0.1:{port} cannot be reached \(Connection refused'):
    processes.start(f'127.0.0.1:{port}', 2, 1, initialization_timeout=0)


def test_a_coordinator_to_whom_nobody_comes_is_one_line(tmp_path, cache):
  many = [f'--coordinator=127.0.0.1:{free_port()}', '--num_processes=2', '--process_id=0']
  words = [*small.flags(tmp_path / 'run', {**RUN, 'distributed.initialization_timeout': 1}), *many]
  code, out, err = small.run(words, cache)
  assert code == 134 and not out  # another time, they may come
  (line,) = [line for line in err.splitlines() if line.startswith('error: ')]
  assert re.fullmatch(r'error: no run came about at 127\.0\.0\.1:\d+ within 1 s: is every process started, .*', line)


def test_environments_of_several_hosts_are_recognised(tmp_path):
  nowhere = (str(tmp_path / 'accel0'),)
  several = {'SLURM_STEP_NUM_TASKS': '4'}, {'OMPI_COMM_WORLD_SIZE': '2'}, {'TPU_WORKER_HOSTNAMES': 'a,b'}
  for env in (*several, {'TPU_PROCESS_ADDRESSES': 'a:1,b:1'}, {'MEGASCALE_COORDINATOR_ADDRESS': 'a'}):
    assert processes.several(env, nowhere), env
  for env in ({}, {'SLURM_STEP_NUM_TASKS': '1', 'SLURM_NTASKS': '4'}, {'TPU_WORKER_HOSTNAMES': 'localhost'}):
    assert not processes.several(env, nowhere), env
  (tmp_path / 'accel0').touch()
  assert processes.several({}, nowhere)  # a TPU VM, which may be one of many
  assert not processes.several({'JAX_PLATFORMS': 'cpu', 'TPU_WORKER_HOSTNAMES': 'a,b'}, nowhere)


def test_what_only_looks_like_one_of_several_hosts_is_alone(monkeypatch):
  asked = []

  def nowhere(**options):
    asked.append(options)
    raise ValueError('coordinator_address should be defined.')

  monkeypatch.setattr(processes, 'several', lambda: True)  # another device than a TPU has such a name
  monkeypatch.setattr(jax.distributed, 'initialize', nowhere)
  assert processes.start() is None and len(asked) == 1
  assert processes.which() == (0, 1)
  monkeypatch.setenv('OMPI_COMM_WORLD_SIZE', '2')  # which is sure, but Open MPI 5 does not say where they meet
  with pytest.raises(UserError, match=r'OMPI_COMM_WORLD_SIZE=2: .* give --coordinator=HOST:PORT'):
    processes.start()


def test_the_end_of_another_host_is_told_from_a_fault(monkeypatch):
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  gone = jax.errors.JaxRuntimeError('Gloo AllReduce failed: Connection closed by peer')
  assert processes.lost(gone)
  assert processes.lost(jax.errors.JaxRuntimeError('NCCL: remote process exited or there was a network error'))
  for fault in ('RESOURCE_EXHAUSTED: out of memory', 'NCCL error: Duplicate GPU detected', '503 UNAVAILABLE'):
    assert not processes.lost(jax.errors.JaxRuntimeError(fault))
  assert not processes.lost(OSError('Connection closed by peer'))  # of a bucket
  wrapped = UserError('--workdir=/home/heartbeat cannot be written')
  assert not processes.lost(wrapped)
  wrapped.__cause__ = gone
  assert processes.lost(wrapped)
  monkeypatch.setattr(jax, 'process_count', lambda: 1)
  assert not processes.lost(gone)


SIZES = {'num_heads': 4, 'd_model': 32, 'd_ff': 64, 'vocab_size': 32}


@pytest.mark.parametrize('sizes, message', [
  ({'num_heads': 3}, 'model.num_heads=3 does not divide over mesh.tensor=4: use mesh.tensor= one of 1, or'),
  ({'num_heads': 6}, 'model.num_heads=6 does not divide over mesh.tensor=4: use mesh.tensor= one of 1, 2, or'),
  ({'d_ff': 66}, 'model.d_ff=66 does not divide over mesh.tensor=4: use mesh.tensor= one of 1, 2, or'),
  ({'d_model': 33}, 'model.d_model=33 does not divide over mesh.fsdp=2: use mesh.fsdp= one of 1, or'),
])  # fmt: skip
def test_a_model_that_does_not_divide_names_what_fits(sizes, message):
  with pytest.raises(UserError, match=re.escape(message)):
    sharding.check_model(SimpleNamespace(**SIZES | sizes), small.mesh(fsdp=2, tensor=4))


def test_a_vocabulary_that_does_not_divide_is_said():
  mesh = small.mesh(fsdp=2, tensor=4)
  assert sharding.check_model(SimpleNamespace(**SIZES), mesh) is None
  for size, how in ((30, 'cut into 2'), (31, 'whole on each of them')):
    said = sharding.check_model(SimpleNamespace(**SIZES | {'vocab_size': size}), mesh)
    assert said.startswith(f'the vocabulary of {size} does not divide over 8 devices') and said.endswith(how)


def test_the_placement_of_a_state_is_told():
  state = small.experiment({'model.num_layers': 2}, data=2, fsdp=2, tensor=2)[3]
  lines = sharding.placement(state)
  assert "   2 x params/block_*/mlp_in/kernel 16x32 ('fsdp', 'tensor') 512 bytes a device" in lines
  total = sum(int(line.split()[0]) * int(line.split()[-4].replace(',', '')) for line in lines)
  held = [shard.data.nbytes for x in jax.tree.leaves(state) for shard in x.addressable_shards if shard.device.id == 0]
  assert total == sum(held) == sum(map(sharding.bytes_here, jax.tree.leaves(state)))


def test_a_mesh_is_read_from_a_text():
  assert sharding.read_mesh('tensor=2') == {'data': -1, 'fsdp': 1, 'tensor': 2}
  assert sharding.read_mesh('data=2, fsdp=4') == {'data': 2, 'fsdp': 4, 'tensor': 1}
  for wrong in ('tensors=2', 'data', 'data=two', '4', ''):
    with pytest.raises(UserError, match=r"mesh '.*': expected sizes of data, fsdp, tensor, such as"):
      sharding.read_mesh(wrong)
