"""Write TensorBoard event files with CLU, read them, and truncate them when a run resumes from a checkpoint.

CLU's own summary writer needs TensorFlow. If TensorFlow is not installed, a writer based on tensorboardX replaces it.
"""

import importlib.util
import os
import struct
import sys
import time
import types

import numpy as np
import tensorboardX.summary
from etils import epath
from google.protobuf.message import DecodeError
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event

from ilm_jax import paths


def _import_clu():
  """Import CLU, without TensorFlow if it is not installed; return its modules (metric_writers, periodic_actions)."""
  name = 'clu.metric_writers.summary_writer'
  if importlib.util.find_spec('tensorflow') is None and name not in sys.modules:
    module = types.ModuleType(name)
    module.SummaryWriter = SummaryWriter
    sys.modules[name] = module
  from clu import metric_writers, periodic_actions

  return metric_writers, periodic_actions


class SummaryWriter:
  """Replacement for CLU's TensorFlow writer. Its methods write synchronously; CLU calls them in a background thread."""

  def __init__(self, logdir: str):
    epath.Path(logdir).mkdir(parents=True, exist_ok=True)
    # The suffix keeps file names unique if two event files are started within the same second.
    self._events = EventsWriter(os.path.join(logdir, 'events'), f'.{os.getpid()}.{time.time_ns() % 10**9}')

  def _write(self, step: int, summary):
    self._events.write_event(Event(wall_time=time.time(), step=int(step), summary=summary))

  def write_scalars(self, step: int, scalars):
    for key, value in scalars.items():
      self._write(step, tensorboardX.summary.scalar(key, float(np.asarray(value))))

  def write_texts(self, step: int, texts):
    for key, value in texts.items():
      self._write(step, tensorboardX.summary.text(key, value))

  def write_hparams(self, hparams):
    plain = {k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in hparams.items()}
    for summary in tensorboardX.summary.hparams(plain, {'loss': 0.0}):
      self._write(0, summary)

  def flush(self):
    self._events.flush()

  def close(self):
    self._events.close()


def make_writer(workdir, *, silent: bool = False):
  """Return a CLU metric writer to the console and, unless `silent`, to event files (asynchronously)."""
  return _import_clu()[0].create_default_writer(None if silent else str(workdir), just_logging=silent)


def make_progress(writer, steps: int, every_seconds: float):
  """Return CLU's ReportProgress hook, which logs training steps per second and the remaining time."""
  return _import_clu()[1].ReportProgress(num_train_steps=steps, writer=writer, every_secs=every_seconds)


def read_records(path):
  """Yield (event, byte offset of the end of its record) for each event in a file; skip an incomplete last record."""
  data, start = epath.Path(path).read_bytes(), 0
  while start + 12 <= len(data):  # record: size (8 bytes), its checksum (4), the event, its checksum (4)
    (size,) = struct.unpack_from('<Q', data, start)
    end = start + 12 + size + 4
    if end > len(data):
      return
    try:
      yield Event.FromString(data[start + 12 : end - 4]), end
    except DecodeError:
      return
    start = end


def event_files(workdir) -> list[epath.Path]:
  """Return the event files of a run, oldest first."""
  return paths.matching(workdir, 'events.out.tfevents.*')


def forget_after(workdir, step: int, *, validated: bool = True) -> None:
  """Remove the events that a run will write again when it resumes at `step`: all events if `step` is 0.

  Unless the checkpoint of `step` is `validated` (has validation metrics), the events of its validation are removed too.
  """
  for path in event_files(workdir):
    keep = 0  # number of bytes to keep from the start of the event file
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
  """Return the logged scalars of a run as {name: [(step, value), ...]}, in the order in which they were written."""
  out = {}
  for path in event_files(workdir):
    for event, _ in read_records(path):
      for value in event.summary.value:
        if value.WhichOneof('value') == 'simple_value':
          out.setdefault(value.tag, []).append((event.step, value.simple_value))
        elif value.WhichOneof('value') == 'tensor' and value.tensor.float_val:
          out.setdefault(value.tag, []).append((event.step, value.tensor.float_val[0]))
  return out


def wall_seconds(workdir) -> float:
  """Return the seconds a run took: time from first to last event, summed over its event files (one for each start)."""
  times = [[event.wall_time for event, _ in read_records(path)] for path in event_files(workdir)]
  return sum(found[-1] - found[0] for found in times if found)
