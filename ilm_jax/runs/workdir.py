"""The folder of a run: who may write there, and what must not change between two starts."""

import contextlib
import fcntl
import os

from absl import logging
from etils import epath

from ilm_jax.distributed import processes
from ilm_jax.runs import run_file
from ilm_jax.runs.run_file import as_json, flatten
from ilm_jax.types import UserError

IDENTITY = ('family', 'task', 'model', 'seed')  # what makes a run another run ...
FREE = (  # ... but these; where files are is not what they are
  *('task.num_validation', 'task.num_test', 'task.label', 'task.num_workers', 'task.cache'),
  *('task.corpus', 'task.tokenizer.path', 'model.remat', 'model.scan_layers'),
)


@contextlib.contextmanager
def claim(workdir, cfg):
  """Make the workdir and hold it, or refuse it: it can't be written, or another run or another process is in it.

  Nothing is overwritten.
  """
  path = epath.Path(workdir)
  with contextlib.ExitStack() as held:
    with processes.together():
      if processes.first():
        with _writable(workdir):
          path.mkdir(parents=True, exist_ok=True)
        held.enter_context(locked(workdir))
        with _writable(workdir):
          probe = path / f'.writable-{os.getpid()}'
          probe.write_text('')
          probe.unlink()
        if run_file.read_run(workdir) is None and any(path.glob('checkpoints/*')):
          raise UserError(
            f'{workdir} holds checkpoints but no run.json that says whose they are: give another --workdir'
          )
        same_run(workdir, cfg)
    yield


@contextlib.contextmanager
def _writable(workdir):
  try:
    yield
  except OSError as error:
    reason = error.strerror or error
    raise UserError(f'the workdir {workdir} cannot be written ({reason}): give another --workdir') from error


@contextlib.contextmanager
def locked(workdir):
  """Keep a second process of this machine out of a folder (not of a bucket) while this one writes there."""
  if '://' in str(workdir):
    yield
    return
  with _writable(workdir):
    folder = os.open(workdir, os.O_RDONLY)
  try:
    fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    os.close(folder)
    raise UserError(f'another process is training in {workdir}: wait for it, or give another --workdir') from None
  except OSError as error:  # a network file system without locks
    logging.warning('%s cannot be locked (%s): see to it that no other process trains there', workdir, error.strerror)
  try:
    yield
  finally:
    os.close(folder)


@contextlib.contextmanager
def writing(workdir):
  """Say in one line that a file of the run could not be written."""
  try:
    yield
  except OSError as error:
    raise UserError(
      f'{workdir} could not be written ({error.strerror or error}): make room and start the same command again'
    ) from error


def same_run(workdir, cfg) -> None:
  """Refuse a workdir in which a run of another family, task, model or seed lives; warn of other changes."""
  run = run_file.read_run(workdir)
  if run is None:
    return
  old, new = flatten(run['config']), flatten(as_json(cfg))
  both = (old.keys() & new.keys()) - set(FREE)  # an older run lacks the settings that came later
  changed = [key for key in sorted(both) if old[key] != new[key]]
  for part in IDENTITY:
    for key in changed:
      if key.split('.')[0] == part:
        raise UserError(
          f'{workdir} holds a run with {key}={old.get(key)}, this one has {key}={new.get(key)}: '
          'give another --workdir (nothing was overwritten)'
        )
  average = 'optimizer.ema_decay'
  if average in changed and not (old.get(average) and new.get(average)):
    raise UserError(
      f'{workdir} holds a run with {average}={old.get(average)}, this one has {new.get(average)}: a moving average '
      'cannot come or go within a run; give another --workdir'
    )
  for key in changed:
    logging.warning('this start changes %s from %s to %s', key, old.get(key), new.get(key))
