"""Training logs: TensorBoard event files, written through CLU and read back.

CLU's own summary writer needs TensorFlow. Where that is not installed, a writer over tensorboardX takes its place.
"""

import importlib.util
import os
import struct
import sys
import time
import types

import numpy as np
from etils import epath

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
