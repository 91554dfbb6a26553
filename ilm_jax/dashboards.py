"""What a run leaves for people to look at: TensorBoard event files, through CLU's writers, and run.json.

CLU's own summary writer needs TensorFlow. Where that is not installed, a writer over tensorboardX takes its place.
"""

import hashlib
import importlib.util
import json
import os
import pathlib
import platform
import shlex
import socket
import struct
import subprocess
import sys
import time
import types
from importlib import metadata

import jax
import numpy as np
from absl import logging
from etils import epath

PACKAGES = ('ilm_jax', 'jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'grain', 'clu', 'ml-collections', 'numpy')


# --- CLU without TensorFlow -------------------------------------------------------------------------------------------


def _import_clu():
  """Import CLU's writers and periodic actions; install our summary writer first where TensorFlow is absent."""
  name = 'clu.metric_writers.summary_writer'
  if importlib.util.find_spec('tensorflow') is None and name not in sys.modules:
    module = types.ModuleType(name)
    module.SummaryWriter = SummaryWriter
    sys.modules[name] = module
  from clu import metric_writers, periodic_actions

  return metric_writers, periodic_actions


class SummaryWriter:
  """The part of CLU's MetricWriter that a run uses, written as it comes (CLU makes it asynchronous)."""

  def __init__(self, logdir: str):
    from tensorboardX.event_file_writer import EventsWriter

    epath.Path(logdir).mkdir(parents=True, exist_ok=True)
    # Our own suffix keeps two starts within one second apart.
    self._events = EventsWriter(os.path.join(logdir, 'events'), f'.{os.getpid()}.{time.time_ns() % 10**9}')

  def _write(self, step: int, summary):
    from tensorboardX.proto.event_pb2 import Event

    self._events.write_event(Event(wall_time=time.time(), step=int(step), summary=summary))

  def write_scalars(self, step: int, scalars):
    from tensorboardX.summary import scalar

    for key, value in scalars.items():
      self._write(step, scalar(key, float(np.asarray(value))))

  def write_texts(self, step: int, texts):
    from tensorboardX.summary import text

    for key, value in texts.items():
      self._write(step, text(key, value))

  def write_hparams(self, hparams):
    from tensorboardX.summary import hparams as make

    plain = {k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in hparams.items()}
    for summary in make(plain, {'loss': 0.0}):
      self._write(0, summary)

  def write_summaries(self, step: int, values, metadata=None):
    raise TypeError('raw summaries need TensorFlow')

  write_images = write_videos = write_audios = write_histograms = write_summaries

  def flush(self):
    self._events.flush()

  def close(self):
    self._events.close()


def make_writer(workdir, *, silent: bool = False):
  """An asynchronous writer to the console and, unless silent (hosts other than the first), to event files."""
  metric_writers, _ = _import_clu()
  return metric_writers.create_default_writer(None if silent else str(workdir), just_logging=silent)


def make_progress(writer, steps: int, every_seconds: float):
  """CLU's ReportProgress: steps per second and an ETA on the console."""
  _, periodic_actions = _import_clu()
  return periodic_actions.ReportProgress(num_train_steps=steps, writer=writer, every_secs=every_seconds)


# --- event files ------------------------------------------------------------------------------------------------------


def read_records(path):
  """Yield (event, end offset) for each intact record of an event file; a cut last record is passed over."""
  from google.protobuf.message import DecodeError
  from tensorboardX.proto.event_pb2 import Event

  data, at = epath.Path(path).read_bytes(), 0
  while at + 12 <= len(data):
    (size,) = struct.unpack_from('<Q', data, at)
    end = at + 12 + size + 4
    if end > len(data):
      return
    try:
      yield Event.FromString(data[at + 12 : end - 4]), end
    except DecodeError:
      return
    at = end


def forget_after(workdir, step: int, *, validated: bool = True) -> None:
  """Cut from the event files what was written after `step`: those steps will be run, and written, again.

  Step 0 begins anew, with its hyperparameters: then nothing stays.

  Args:
    workdir: of the run.
    step: to start from.
    validated: was the evaluation of `step` saved with it? If not, it is cut too.
  """
  for path in sorted(epath.Path(workdir).glob('events.out.tfevents.*')):
    keep = 0
    for event, end in read_records(path):
      unsaved = not validated and any(value.tag.startswith('validation/') for value in event.summary.value)
      if event.step > step or step == 0 or (event.step == step and unsaved):
        break
      keep = end
    data = path.read_bytes()
    if not keep:
      path.unlink()
    elif keep < len(data):
      part = path.parent / f'.{path.name}.part'
      part.write_bytes(data[:keep])
      part.replace(path)


def read_scalars(workdir) -> dict[str, list[tuple[int, float]]]:
  """The scalars of all event files: name -> [(step, value), ...] in order of writing."""
  out = {}
  for path in sorted(epath.Path(workdir).glob('events.out.tfevents.*')):
    for event, _ in read_records(path):
      for value in event.summary.value:
        if value.WhichOneof('value') == 'simple_value':
          out.setdefault(value.tag, []).append((event.step, value.simple_value))
        elif value.WhichOneof('value') == 'tensor' and value.tensor.float_val:
          out.setdefault(value.tag, []).append((event.step, value.tensor.float_val[0]))
  return out


def wall_seconds(workdir) -> float:
  """Seconds of training: of each start, from the first record of its event file to the last one that still counts."""
  total = 0.0
  for path in sorted(epath.Path(workdir).glob('events.out.tfevents.*')):
    times = [event.wall_time for event, _ in read_records(path)]
    total += times[-1] - times[0] if times else 0.0
  return total


# --- run.json ---------------------------------------------------------------------------------------------------------


def commit() -> str:
  """The commit of the code that runs, `+changes` behind it when the tree is not clean; 'unknown' outside git."""
  here = os.path.dirname(os.path.abspath(__file__))

  def git(*args):
    return subprocess.run(['git', '-C', here, *args], capture_output=True, text=True, check=True).stdout.strip()

  try:
    if os.path.realpath(git('rev-parse', '--show-toplevel')) != os.path.realpath(os.path.dirname(here)):
      return 'unknown'  # installed inside somebody else's repository
    return git('rev-parse', 'HEAD') + ('+changes' if git('status', '--porcelain', '--untracked-files=no') else '')
  except (OSError, subprocess.CalledProcessError):
    return 'unknown'


def code() -> dict[str, str]:
  """What runs here, of things that must be the same on all hosts: commit, the package's files, versions."""
  here = pathlib.Path(__file__).parent
  files = hashlib.sha256()
  for path in sorted(here.rglob('*.py')):
    files.update(f'{path.relative_to(here)}\n{path.stat().st_size}\n'.encode() + path.read_bytes())
  return {
    'commit': commit(),
    'code': files.hexdigest()[:16],
    **{name: version(name) for name in (*PACKAGES[1:], 'sentencepiece', 'tokenizers')},
  }


def version(name: str) -> str:
  """Of an installed package."""
  try:
    return metadata.version(name)
  except metadata.PackageNotFoundError:
    return 'unknown'


def describe_start(step: int) -> dict:
  """What is worth knowing of one start of a run."""
  devices = jax.devices()
  return {
    'time': time.strftime('%Y-%m-%dT%H:%M:%S%z'),
    'from_step': step,
    'commit': commit(),
    'command': shlex.join(['python', '-m', 'ilm_jax.main', *sys.argv[1:]]),
    'devices': f'{len(devices)} x {devices[0].device_kind} ({devices[0].platform})',
    'processes': jax.process_count(),
    'host': socket.gethostname(),
    'cpus': os.cpu_count(),
    'python': platform.python_version(),
    'versions': {name: version(name) for name in PACKAGES},
  }


def parse_run(text: str) -> dict | None:
  """What a run.json says; None where it is not what a run writes."""
  try:
    run = json.loads(text)
    return run if isinstance(run['config'], dict) and isinstance(run['starts'], list) else None
  except (KeyError, TypeError, ValueError):
    return None


def read_run(workdir) -> dict | None:
  """The run.json of a workdir, if there is one."""
  path = epath.Path(workdir) / 'run.json'
  if not path.exists():
    return None
  run = parse_run(path.read_text())
  if run is None:
    logging.warning('%s is not what a run writes: passed over', path)
  return run


def write_json(path, value) -> None:
  """Write a JSON file in one move: a reader sees the old one or the new one."""
  path = epath.Path(path)
  part = path.parent / f'.{path.name}.{os.getpid()}.part'
  part.write_text(json.dumps(value, indent=2) + '\n')
  part.replace(path)
