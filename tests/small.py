"""The small run: a tiny config that many tests train, and helpers to start the commands in other processes."""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from unittest import mock

import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache

from ilm_jax.configs import star
from ilm_jax.data import pipeline
from ilm_jax.distributed import sharding
from ilm_jax.distributed.sharding import make_mesh
from ilm_jax.runs.run_file import as_json, flatten
from ilm_jax.training import optimizer, train_step
from ilm_jax.training.experiment import build

ROOT = pathlib.Path(__file__).parents[1]

SETTINGS = {
  'steps': 60,
  'stop_at': 2.0,  # above the highest exact match, 1: training never stops early
  'model.num_layers': 1,
  'model.num_heads': 2,
  'model.d_model': 16,
  'model.d_ff': 32,
  'model.activation': 'relu',
  'model.final_norm': True,
  'model.dropout': 0.1,
  'model.attention_dropout': 0.1,
  'model.compute': 'float32',
  'model.init': 'normal',
  'corrupt.close_prompt': False,
  'loss.stop_weight': 1.0,
  'loss.vocab_chunk': 10,
  'data.batch_size': 16,
  'data.groups': 1,
  'data.rows': 8,
  'data.row_length': 44,
  'data.targets': 0,
  'data.segments': 3,
  'data.num_workers': 0,
  'data.prefetch': 2,
  'optimizer.learning_rate': 1e-2,
  'optimizer.schedule': 'constant',
  'optimizer.warmup_steps': 4,
  'optimizer.final_fraction': 0.0,
  'optimizer.b1': 0.9,
  'optimizer.b2': 0.98,
  'optimizer.eps': 1e-8,
  'optimizer.weight_decay': 0.1,
  'optimizer.clip': 1.0,
  'optimizer.ema_decay': 0.99,
  'optimizer.accumulation_steps': 1,
  'sampling.max_length': 22,
  'sampling.max_steps': 6,
  'sampling.stop_threshold': 0.9,
  'task.num_train': 200,
  'task.num_validation': 8,
  'task.num_test': 8,
  'eval.every': 20,
  'eval.batch_size': 8,
  'eval.metric': 'exact_match',
  'eval.mode': 'max',
  'eval.checkpoint': 'best',
  'eval.print_samples': 2,
  'log_every': 5,
  'checkpoint_every': 5,
  'keep': 2,
}
NO_DROPOUT = {'model.dropout': 0.0, 'model.attention_dropout': 0.0}  # the loss then depends only on weights and batch


def config(changes=()):
  """Return the config of the small run as a ConfigDict; `changes` maps dotted names of settings to values."""
  cfg = star.get_config('tiny')
  for name, value in {**SETTINGS, **dict(changes)}.items():
    section, _, key = name.rpartition('.')
    (cfg[section] if section else cfg)[key] = value
  return cfg


def flags(workdir=None, changes=()) -> list[str]:
  """Return the config of the small run as command line arguments of ilm_jax.main."""
  settings = {**SETTINGS, **dict(changes)}
  workdir_flag = [] if workdir is None else [f'--workdir={workdir}']
  setting_flags = [f'--config.{name}={value}' for name, value in settings.items()]
  return ['--config=configs/star.py:tiny', *workdir_flag, *setting_flags]


def mesh(data: int = 1, fsdp: int = 1, tensor: int = 1):
  """Return a mesh with the given axis sizes, over the first data x fsdp x tensor devices."""
  sizes = {'data': data, 'fsdp': fsdp, 'tensor': tensor}
  return make_mesh(sizes, jax.devices()[: data * fsdp * tensor])


def uninitialized(changes=(), **axes):
  """Build the small run on a mesh; return (experiment, optimizer, schedule, abstract state with shardings)."""
  cfg = config(changes)
  with mock.patch.object(sharding, 'make_mesh', lambda *_: mesh(**axes)):
    exp = build(cfg)
  tx, schedule = optimizer.make_optimizer(cfg.optimizer, cfg.steps)
  return exp, tx, schedule, train_step.abstract_state(exp, tx)


def experiment(changes=(), **axes):
  """Build the small run on a mesh; return (experiment, optimizer, schedule, state, abstract state)."""
  exp, tx, schedule, _ = uninitialized(changes, **axes)
  return exp, tx, schedule, *train_step.init_state(exp, tx)


def batches(exp, steps: int):
  """Return the first `steps` training batches of the input pipeline, as numpy arrays."""
  cfg = exp.cfg
  source = exp.task.source(cfg.task, 'train')
  return list(pipeline.train_batches(source, exp.family.corrupt, cfg, start=0, stop=steps))


def leaves(tree) -> dict[str, np.ndarray]:
  """Return a dictionary from the path of each array in a tree to its copy on the host."""
  named = jax.tree_util.tree_flatten_with_path(tree)[0]
  return {jax.tree_util.keystr(path, simple=True, separator='/'): np.asarray(x) for path, x in named}


def assert_same_bits(actual, expected) -> None:
  """Assert that two trees of arrays have equal paths, dtypes and bits."""
  actual, expected = leaves(actual), leaves(expected)
  assert actual.keys() == expected.keys()
  for name, array in expected.items():
    assert actual[name].dtype == array.dtype and actual[name].tobytes() == array.tobytes(), f'{name} differs'


def environment(cache) -> dict[str, str]:
  """Return environment variables for a command: CPU only, fast compilation, compilation cache in a folder."""
  settings = {
    'JAX_PLATFORMS': 'cpu',
    'JAX_COMPILATION_CACHE_DIR': str(cache),
    'JAX_DISABLE_MOST_OPTIMIZATIONS': '1',
  }
  return {**os.environ, **settings}


def start(arguments, cache, *, module: str = 'ilm_jax.main', before: str = '', **options) -> subprocess.Popen:
  """Start `python -m MODULE ARGUMENTS`.

  Args:
    arguments: command line arguments of the module.
    cache: folder of the compilation cache.
    module: the module to run.
    before: shell code to run first, such as 'ulimit -f 16;'.
    **options: options of subprocess.Popen.
  """
  command = [sys.executable, '-m', module, *map(str, arguments)]
  if before:
    command = ['bash', '-c', f'{before} exec "$@"', '-', *command]
  options = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, 'text': True, 'cwd': ROOT} | options
  return subprocess.Popen(command, env=environment(cache), **options)


def run(arguments, cache, *, text: str | None = None, **options) -> tuple[int, str, str]:
  """Run `python -m MODULE ARGUMENTS` to its end; return (exit code, standard output, standard error)."""
  process = start(arguments, cache, stdin=subprocess.PIPE, **options)
  out, err = process.communicate(text, timeout=300)
  return process.returncode, out, err


# A server program: reads one JSON request per line, runs each command in a forked child, and answers with one line.
SERVER = """
import importlib, json, os, resource, sys, traceback
import jax
import ilm_jax.inference.api, ilm_jax.generate, ilm_jax.main, ilm_jax.training.loop

def run(job):
  try:
    for number, name in enumerate(job['files']):
      os.dup2(os.open(name, os.O_RDWR), number)
    sys.stdin = open(0, encoding='utf-8', closefd=False)
    os.chdir(job['cwd'])
    os.environ.update(job['env'])
    if job['devices']:
      jax.config.update('jax_num_cpu_devices', job['devices'])
    if job['file_limit']:
      resource.setrlimit(resource.RLIMIT_FSIZE, (job['file_limit'], job['file_limit']))
    sys.argv = job['argv']
    code = importlib.import_module(job['module']).main()
  except SystemExit as error:
    code = error.code
  except BaseException:
    traceback.print_exc()
    code = 99
  sys.exit(code)

for line in sys.stdin:
  job = json.loads(line)
  if 'wait' in job:
    pid, status = os.waitpid(job['wait'], 0 if job['block'] else os.WNOHANG)
    print(os.waitstatus_to_exitcode(status) if pid else 'running', flush=True)
  else:
    print(os.fork() or run(job), flush=True)
"""


class Command:
  """A running command, with the methods of subprocess.Popen that the tests use."""

  def __init__(self, commands: 'Commands', pid: int, out: pathlib.Path, err: pathlib.Path):
    self.commands, self.pid, self.out, self.err, self.returncode = commands, pid, out, err, None

  def poll(self) -> int | None:
    """Return the exit code, or None while the command runs."""
    return self._wait(block=False)

  def wait(self, timeout: float | None = None) -> int:
    """Wait until the command ends; return its exit code, or -n if it was killed by signal n."""
    end = None if timeout is None else time.monotonic() + timeout
    while self._wait(block=end is None) is None:
      if time.monotonic() > end:
        raise subprocess.TimeoutExpired(f'process {self.pid}', timeout)
      time.sleep(0.01)
    return self.returncode

  def _wait(self, *, block: bool) -> int | None:
    if self.returncode is None:
      answer = self.commands.ask({'wait': self.pid, 'block': block})
      self.returncode = None if answer == 'running' else int(answer)
    return self.returncode

  def send_signal(self, number: int) -> None:
    """Send a signal; it has no effect if the command has ended."""
    if self.returncode is None:  # the system does not reuse a process id until waitpid returns
      os.kill(self.pid, number)

  def kill(self) -> None:
    """Send SIGKILL, unless the command has ended."""
    self.send_signal(signal.SIGKILL)


class Commands:
  """Runs `python -m MODULE ARGUMENTS` in forked children of a server process that has already imported all modules."""

  def __init__(self, folder, cache=None):
    """Start the server process.

    Args:
      folder: folder for the files with the input and output of commands.
      cache: folder of the compilation cache; `folder/cache` by default.
    """
    self.folder, self.count = pathlib.Path(folder), 0
    self.process = subprocess.Popen(
      [sys.executable, '-c', SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
      env=environment(cache or self.folder / 'cache'),
    )  # fmt: skip

  def ask(self, request: dict) -> str:
    """Send a request to the server process and return its answer."""
    self.process.stdin.write(json.dumps(request) + '\n')
    self.process.stdin.flush()
    return self.process.stdout.readline().strip()

  def start(
    self, module: str, arguments, *, stdin: bytes | str = '', cwd=ROOT, devices: int = 0, file_limit: int = 0, env=()
  ) -> Command:
    """Start a command.

    Args:
      module: name of the module whose `main()` is called.
      arguments: command line arguments of the module.
      stdin: standard input of the command.
      cwd: working directory of the command.
      devices: number of virtual CPU devices; 0 means one.
      file_limit: maximum size in bytes of a file that the command may write; 0 means no limit.
      env: further environment variables.
    """
    self.count += 1
    files = [self.folder / f'{self.count}.{name}' for name in ('stdin', 'stdout', 'stderr')]
    for file in files:
      file.write_bytes(b'')
    files[0].write_bytes(stdin.encode() if isinstance(stdin, str) else stdin)
    pid = self.ask({
      'module': module, 'argv': [f'{module}.py', *map(str, arguments)], 'files': list(map(str, files)),
      'cwd': str(cwd), 'devices': devices, 'file_limit': file_limit, 'env': dict(env),
    })  # fmt: skip
    return Command(self, int(pid), *files[1:])

  def __call__(self, module: str, arguments, **options) -> tuple[int, str, str]:
    """Run a command to its end; return (exit code, standard output, standard error)."""
    command = self.start(module, arguments, **options)
    return command.wait(), command.out.read_text(), command.err.read_text()

  def close(self):
    """End the server process."""
    self.process.stdin.close()
    self.process.wait(60)


# Settings that do not change the compiled programs (given a constant learning rate).
LOOP_SETTINGS = (
  *('steps', 'stop_at', 'log_every', 'checkpoint_every', 'keep', 'init_from'),
  *('eval.every', 'eval.mode', 'eval.metric', 'eval.checkpoint'),
)


@contextlib.contextmanager
def shared_programs():
  """Context manager: let runs of `loop.train` with equal settings share compiled programs."""
  from ilm_jax.training import loop

  made, real = {}, {name: getattr(loop, name) for name in ('compile_step', 'init_state', 'make_evaluator')}

  def once(name, exp, *args):
    settings = {key: value for key, value in flatten(as_json(exp.cfg)).items() if key not in LOOP_SETTINGS}
    devices = [device.id for device in exp.mesh.devices.flat]
    key = json.dumps([name, settings, dict(exp.mesh.shape), devices])
    if key not in made:
      made[key] = real[name](exp, *args)
      if name == 'init_state':  # the training step donates the state, so keep a copy on the host
        made[key] = jax.device_get(made[key][0]), made[key][1]
    return made[key]

  def init_state(exp, tx):
    state, abstract = once('init_state', exp, tx)
    return jax.device_put(state, jax.tree.map(lambda x: x.sharding, abstract)), abstract

  with (
    mock.patch.object(loop, 'compile_step', lambda *args: once('compile_step', *args)),
    mock.patch.object(loop, 'init_state', init_state),
    mock.patch.object(loop, 'make_evaluator', lambda exp: once('make_evaluator', exp)),
  ):
    yield


@contextlib.contextmanager
def compilation_cache_in(folder):
  """Context manager: compile without optimizations, and cache compiled programs in a folder."""
  settings = {
    'jax_compilation_cache_dir': str(folder),
    'jax_persistent_cache_min_compile_time_secs': 0.2,
    'jax_disable_most_optimizations': True,
  }
  before = {name: jax.config.values[name] for name in settings}
  for name, value in settings.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()
  try:
    yield
  finally:
    for name, value in before.items():
      jax.config.update(name, value)
    compilation_cache.reset_cache()
