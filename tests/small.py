"""A very small run, for the tests of training, of resuming and of the commands. Every setting that matters is here."""

import contextlib
import json
import os
import pathlib
import subprocess
import sys
from unittest import mock

import jax
from jax.experimental.compilation_cache import compilation_cache

from ilm_jax.configs import star
from ilm_jax.data import pipeline
from ilm_jax.distributed import sharding
from ilm_jax.distributed.sharding import make_mesh
from ilm_jax.training import optimizer, train_step
from ilm_jax.training.experiment import build

ROOT = pathlib.Path(__file__).parents[1]

SETTINGS = {
  'steps': 60,
  'stop_at': 2.0,  # never
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
STILL = {'model.dropout': 0.0, 'model.attention_dropout': 0.0}  # no noise but the corruption's


def config(changes=()):
  """The config as a ConfigDict; `changes` maps dotted names to values."""
  cfg = star.get_config('tiny')
  for name, value in {**SETTINGS, **dict(changes)}.items():
    part, _, key = name.rpartition('.')
    (cfg[part] if part else cfg)[key] = value
  return cfg


def flags(workdir=None, changes=()) -> list[str]:
  """The config as the arguments of main."""
  settings = {**SETTINGS, **dict(changes)}
  where = [] if workdir is None else [f'--workdir={workdir}']
  return ['--config=configs/star.py:tiny', *where, *(f'--config.{name}={value}' for name, value in settings.items())]


def mesh(data: int = 1, fsdp: int = 1, tensor: int = 1):
  """A mesh of the first devices."""
  sizes = {'data': data, 'fsdp': fsdp, 'tensor': tensor}
  return make_mesh(sizes, jax.devices()[: data * fsdp * tensor])


def experiment(changes=(), **axes):
  """(what the config builds, its optimizer, its schedule, a fresh state, the state's shapes and shardings)."""
  cfg = config(changes)
  with mock.patch.object(sharding, 'make_mesh', lambda *_: mesh(**axes)):
    exp = build(cfg)
  tx, schedule = optimizer.make_optimizer(cfg.optimizer, cfg.steps)
  return exp, tx, schedule, *train_step.init_state(exp, tx)


def batches(exp, steps: int):
  """The first batches of the real pipeline, on the host."""
  cfg = exp.cfg
  source = exp.task.source(cfg.task, 'train')
  return list(pipeline.train_batches(source, exp.family.corrupt, cfg, start=0, stop=steps))


def environment(cache) -> dict[str, str]:
  """One device; programs compiled quickly, and kept in `cache`: a second start is then a matter of seconds."""
  settings = {
    'JAX_PLATFORMS': 'cpu',
    'JAX_COMPILATION_CACHE_DIR': str(cache),
    'JAX_DISABLE_MOST_OPTIMIZATIONS': '1',
  }
  return {**os.environ, **settings}


def start(arguments, cache, *, module: str = 'ilm_jax.main', before: str = '', **options) -> subprocess.Popen:
  """Start a command as a user would; `before` is shell run in its place first (`ulimit -f 16; `)."""
  command = [sys.executable, '-m', module, *map(str, arguments)]
  if before:
    command = ['bash', '-c', f'{before} exec "$@"', '-', *command]
  options = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, 'text': True, 'cwd': ROOT} | options
  return subprocess.Popen(command, env=environment(cache), **options)


def run(arguments, cache, *, text: str | None = None, **options) -> tuple[int, str, str]:
  """Run a command to its end; returns (exit code, standard output, standard error)."""
  process = start(arguments, cache, stdin=subprocess.PIPE, **options)
  out, err = process.communicate(text, timeout=300)
  return process.returncode, out, err


SERVER = """
import importlib, json, os, sys, traceback
import ilm_jax.inference.api, ilm_jax.generate, ilm_jax.main, ilm_jax.training.loop

for line in sys.stdin:
  job = json.loads(line)
  pid = os.fork()
  if not pid:
    code = 99
    try:
      for number, name in enumerate(job['files']):
        os.dup2(os.open(name, os.O_RDWR), number)
      sys.stdin = open(0, encoding='utf-8', closefd=False)
      os.chdir(job['cwd'])
      sys.argv = job['argv']
      code = importlib.import_module(job['module']).main()
    except BaseException:
      traceback.print_exc()
    finally:
      sys.stdout.flush()
      sys.stderr.flush()
      os._exit(code)
  print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class Commands:
  """Runs `python -m MODULE ARGUMENTS` many times, in children of a process that has imported everything already."""

  def __init__(self, folder):
    self.folder = pathlib.Path(folder)
    self.process = subprocess.Popen(
      [sys.executable, '-c', SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
      env=environment(self.folder / 'cache'),
    )  # fmt: skip

  def __call__(self, module: str, arguments, *, stdin: bytes | str = '', cwd=ROOT) -> tuple[int, str, str]:
    """Run a command to its end; returns (exit code, standard output, standard error)."""
    files = [self.folder / name for name in ('stdin', 'stdout', 'stderr')]
    for file in files:
      file.write_bytes(b'')
    files[0].write_bytes(stdin.encode() if isinstance(stdin, str) else stdin)
    argv = [f'{module}.py', *map(str, arguments)]
    job = {'module': module, 'argv': argv, 'files': list(map(str, files)), 'cwd': str(cwd)}
    self.process.stdin.write(json.dumps(job) + '\n')
    self.process.stdin.flush()
    return int(self.process.stdout.readline()), files[1].read_text(), files[2].read_text()

  def close(self):
    """End the process."""
    self.process.stdin.close()
    self.process.wait(60)


@contextlib.contextmanager
def kept_programs(folder):
  """Compile quickly, and keep programs in a folder, so that what several tests run is compiled once."""
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
