"""Lock the workdir of a run, and check that settings such as the model or the seed do not change when it resumes."""

import contextlib
import errno
import fcntl
import os

from absl import logging
from etils import epath

from ilm_jax import paths
from ilm_jax.distributed import processes
from ilm_jax.runs import run_file
from ilm_jax.runs.run_file import as_json, flatten
from ilm_jax.types import UserError

IDENTITY = ('family', 'task', 'model', 'seed')  # sections of the config that must not change when a run resumes
FREE = (  # settings within the IDENTITY sections that may still change when a run resumes
  *('task.num_validation', 'task.num_test', 'task.label', 'task.num_workers', 'task.cache'),
  *('task.corpus', 'task.tokenizer.path', 'model.remat', 'model.scan_layers'),
)


@contextlib.contextmanager
def claim(workdir, cfg):
  """Context manager: create the workdir of a run and lock it against other processes.

  UserError if it is not writable, in use, or holds a different run; no existing file is overwritten then.
  """
  path = epath.Path(workdir)
  with contextlib.ExitStack() as held:
    with processes.raise_on_all():
      if processes.is_first():
        with explain_write_errors(f'the workdir {workdir} cannot be written', 'give another --workdir'):
          path.mkdir(parents=True, exist_ok=True)
          held.enter_context(lock(workdir))
          probe = path / f'.writable-{os.getpid()}'
          probe.write_text('')
          probe.unlink()
        if run_file.read_run(workdir) is None and paths.matching(path / 'checkpoints', '*'):
          raise UserError(f'{workdir} has checkpoints but no valid run.json: give another --workdir')
        check_same_run(workdir, cfg)
    yield


@contextlib.contextmanager
def lock(workdir):
  """Context manager: lock a local folder against other processes on this machine; UserError if one has locked it."""
  if '://' in str(workdir):
    yield
    return
  folder = os.open(workdir, os.O_RDONLY)
  try:
    fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    os.close(folder)
    raise UserError(f'another process is training in {workdir}: wait for it, or give another --workdir') from None
  except OSError as error:  # some network file systems do not support locks
    logging.warning('%s cannot be locked (%s): make sure that no other process trains there', workdir, error.strerror)
  try:
    yield
  finally:
    os.close(folder)


@contextlib.contextmanager
def explain_write_errors(problem: str, advice: str = ''):
  """Context manager: convert an OSError to a UserError that states the problem, the system's reason and the advice.

  The default advice is to free disk space if the disk or the quota is full, else to correct the cause.
  """
  try:
    yield
  except OSError as error:
    if not advice:
      first = 'free disk space' if error.errno in (errno.ENOSPC, errno.EDQUOT) else 'correct the cause'
      advice = f'{first} and run the same command again'
    raise UserError(f'{problem} ({error.strerror or error}): {advice}') from error


def check_same_run(workdir, cfg) -> None:
  """Raise UserError if the run in the workdir has another family, task, model or seed; warn about other changes."""
  run = run_file.read_run(workdir)
  if run is None:
    return
  old, new = flatten(run['config']), flatten(as_json(cfg))
  common = (old.keys() & new.keys()) - set(FREE)  # an older run.json lacks settings that were added since
  changed = [key for key in sorted(common) if old[key] != new[key]]
  for key in sorted(changed, key=lambda key: key.split('.')[0] not in IDENTITY):
    difference = f'{workdir} holds a run with {key}={old[key]}, this one has {key}={new[key]}'
    if key.split('.')[0] in IDENTITY:
      raise UserError(f'{difference}: give another --workdir (nothing was overwritten)')
    if key == 'optimizer.ema_decay' and not (old[key] and new[key]):
      raise UserError(f'{difference}: a moving average cannot be added or removed during a run; give another --workdir')
    logging.warning('this start of the run changes %s from %s to %s', key, old[key], new[key])
