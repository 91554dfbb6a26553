"""Several hosts: how the processes of a run find each other, agree, share a folder and stop together.

With one process, every function here returns at once.
"""

import contextlib
import hashlib
import json
import os
import secrets
import socket
import sys
import threading
import time
import traceback
from pathlib import Path

import jax
import numpy as np
from absl import logging
from etils import epath
from jax.experimental import multihost_utils

from ilm_jax.console import fail
from ilm_jax.types import UserError

WAIT = 60  # seconds for a file to be seen by all
LOST = 134  # exit code of a process that goes down with another one, as the runtime's own abort has it
SIGNS = (
  'closed by peer',
  'remote process exited',
  'reset by peer',
  'heartbeat',
  'coordination service',
  'tasks are unhealthy',
)  # of a lost host
FLAGS = ('coordinator', 'num_processes', 'process_id')
HOSTS = ('TPU_PROCESS_ADDRESSES', 'TPU_WORKER_HOSTNAMES')
COUNTS = ('SLURM_STEP_NUM_TASKS', 'OMPI_COMM_WORLD_SIZE')  # processes, where Slurm or Open MPI started them


class Absent(UserError):
  """Another host has not come, or is gone: to be tried again, with all of them."""

  code = LOST


def several(env=os.environ, devices=('/dev/accel0', '/dev/vfio/0')) -> bool:
  """May the environment (Slurm, Open MPI, TPU VMs, GKE with TPUs) say who the processes of this run are?"""
  if any(env.get(name, '1') not in ('', '1') for name in COUNTS):
    return True
  if env.get('JAX_PLATFORMS', 'tpu').split(',')[0] != 'tpu':
    return False
  if 'MEGASCALE_COORDINATOR_ADDRESS' in env or any(',' in env.get(name, '') for name in HOSTS):
    return True
  return 'TPU_SKIP_MDS_QUERY' not in env and any(Path(name).exists() for name in devices)


def start(
  coordinator: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
  *,
  saving: bool = True,
  initialization_timeout: int = 300,
  heartbeat_timeout: int = 30,
) -> None:
  """Join the other processes of the run, if there are any; before anything else asks for a device.

  Args:
    coordinator: HOST:PORT of process 0. Without it the environment is asked, and where it is silent this is the only
      process.
    num_processes: of the run.
    process_id: of this one, 0 ... num_processes - 1.
    saving: will `told_to_stop` be asked? Without it SIGTERM ends a process, as it does elsewhere.
    initialization_timeout: how long to wait for the others.
    heartbeat_timeout: a process that is silent for so long is taken for dead, and the runtime ends the others.

  Raises:
    UserError: some of the three without the others, values that can't be, or a coordinator that can't be reached.
  """
  given = dict(zip(FLAGS, (coordinator, num_processes, process_id), strict=True))
  missing = [name for name, value in given.items() if value is None]
  if len(missing) == len(given):
    if not several():
      return
    given = {}
  elif missing:
    there = next(name for name in given if name not in missing)
    raise UserError(f'--{there} needs {" and ".join(f"--{name}" for name in missing)} too')
  elif num_processes < 1 or not 0 <= process_id < num_processes:
    raise UserError(f'--process_id={process_id} --num_processes={num_processes}: expected 0 ... {num_processes - 1}')
  elif not coordinator.rpartition(':')[2].isdigit() or coordinator.startswith(':'):
    raise UserError(f'--coordinator={coordinator}: expected HOST:PORT of process 0')
  elif process_id:
    await_port(coordinator, initialization_timeout)
  names = {'coordinator': 'coordinator_address'}
  options = {names.get(name, name): value for name, value in given.items()}
  if given:
    options['cluster_detection_method'] = 'deactivate'
  jax.config.update('jax_enable_preemption_service', saving)
  where = coordinator or 'the coordinator that the environment names'
  nobody = Absent(
    f'no run came about at {where} within {initialization_timeout} s: is every process started, and can each reach that address?'
  )
  # The runtime aborts the process when the others do not come; this says so first.
  alarm = threading.Timer(initialization_timeout, lambda: _exit(fail(nobody)))
  alarm.daemon = True
  alarm.start()
  try:
    jax.distributed.initialize(
      **options,
      initialization_timeout=initialization_timeout + 60,
      heartbeat_timeout_seconds=heartbeat_timeout,
      shutdown_timeout_seconds=2 * heartbeat_timeout,
    )
  except ValueError:
    if given:
      raise
    if counts := [f'{name}={os.environ[name]}' for name in COUNTS if os.environ.get(name, '1') not in ('', '1')]:
      raise UserError(
        f'{counts[0]}: this is one of several processes, but JAX does not recognise where they meet (Open MPI 5 does '
        'not say so): give --coordinator=HOST:PORT, --num_processes and --process_id'
      ) from None
    return  # what looked like one of several was not
  except Exception as error:  # of the runtime's own types
    raise Absent(f'{nobody} ({" ".join(str(error).split())[:200]})') from error
  finally:
    alarm.cancel()
  if jax.process_index():
    logging.set_verbosity(logging.WARNING)  # the first host speaks for all
  logging.info('%d processes with %d devices', jax.process_count(), jax.device_count())


def await_port(address: str, seconds: float) -> None:
  """Wait until somebody listens at HOST:PORT; the runtime itself would abort the process when nobody does."""
  host, _, port = address.rpartition(':')
  end = time.monotonic() + seconds
  while True:
    try:
      socket.create_connection((host.strip('[]'), int(port)), timeout=5).close()
      return
    except OSError as error:
      if time.monotonic() > end:
        raise Absent(
          f'--coordinator={address} cannot be reached ({error.strerror or error}; tried for {seconds} s): is process 0 '
          'started there, and is the port open?'
        ) from None
    time.sleep(0.2)


def first() -> bool:
  """Is this the process that writes what only one may write?"""
  return jax.process_index() == 0


def which() -> tuple[int, int]:
  """(index of this process, number of them)."""
  return jax.process_index(), jax.process_count()


def digest(value) -> str:
  """A short text that stands for a value, of things that repr spells the same everywhere."""
  return hashlib.sha256(repr(value).encode()).hexdigest()[:16]


def gather(text: str) -> list[str]:
  """The texts of all hosts, in order; all must call it."""
  if jax.process_count() == 1:
    return [text]
  raw = np.frombuffer(text.encode(), np.uint8)
  lengths = multihost_utils.process_allgather(np.array([len(raw)], np.int32)).reshape(-1)
  rows = multihost_utils.process_allgather(np.pad(raw, (0, int(lengths.max()) - len(raw)))[None])
  rows = rows.reshape(len(lengths), -1)
  return [bytes(row[:length].astype(np.uint8)).decode() for row, length in zip(rows, lengths, strict=True)]


def everywhere(error: UserError) -> UserError:
  """Note that every host raises this error."""
  error.everywhere = True
  return error


@contextlib.contextmanager
def together():
  """A UserError of one host in the body is one of every host, after the body: none goes on, or waits, alone.

  The body must hold no collective operation: one that failed on a host alone would meet the one at the end here.
  """
  wrong = None
  try:
    yield
  except UserError as error:
    wrong = error
  said = gather('' if wrong is None else str(wrong))
  if wrong is not None:
    raise everywhere(wrong)
  for host, text in enumerate(said):
    if text:
      raise everywhere(UserError(f'host {host}: {text}'))


def agree(what: dict, error=UserError, advice: str = 'start all with the same command and code') -> None:
  """Refuse to go on where hosts were started with other settings or other code than the first.

  Args:
    what: flat, of things that JSON can hold.
    error: to raise where they differ.
    advice: what to do then.
  """
  said = [json.loads(text) for text in gather(json.dumps(what))]
  for host, other in enumerate(said):
    for name in sorted(said[0].keys() | other.keys()):
      if (ours := said[0].get(name)) != (theirs := other.get(name)):
        raise everywhere(error(f'host {host} has {name}={theirs}, host 0 has {ours}: {advice}'))


def share(folder) -> None:
  """Refuse a folder that is not the same one on every host."""
  if jax.process_count() == 1:
    return
  name = gather(secrets.token_hex(8))[0]
  path = epath.Path(folder) / f'.seen-by-all-{name}'
  with together():
    if first():
      try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('')
      except OSError as error:
        raise UserError(f'the workdir {folder} cannot be written ({error.strerror or error})') from error
  end = time.monotonic() + WAIT
  while not path.exists() and time.monotonic() < end:  # network file systems remember for a while what was not there
    time.sleep(0.5)
  blind = [str(host) for host, seen in enumerate(gather('x' if path.exists() else '')) if not seen]
  if first():
    path.unlink(missing_ok=True)
  if blind:
    raise everywhere(
      UserError(
        f'--workdir={folder}: host {", ".join(blind)} does not see what host 0 writes there: give a folder that all '
        'hosts share, or a bucket (gs://...)'
      )
    )


def barrier(name: str) -> None:
  """Wait for all."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)


def told_to_stop(step: int) -> bool:
  """Has any host received SIGTERM (or a notice of preemption)? All are told at the same step.

  Call it once at every step of the run.
  """
  return jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step)


def lost(error: BaseException | None) -> bool:
  """Is it the end of another host that this error of the runtime, or the cause of a message, is about?"""
  if jax.process_count() == 1:
    return False
  if isinstance(error, UserError):
    return error.__cause__ is not None and lost(error.__cause__)
  return isinstance(error, jax.errors.JaxRuntimeError) and any(sign in str(error).lower() for sign in SIGNS)


def _exit(code: int) -> None:
  """End this process at once, without waiting for the others."""
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(code)


def end_together(call) -> int:
  """Return what `call` returns; where it fails on this host alone, end the process at once, so that the others notice.

  (The runtime would wait for all to end together, and the others wait for this one.)
  """
  if jax.process_count() == 1:
    return call()
  try:
    return call()
  except KeyboardInterrupt:
    code = 130
  except Exception as error:
    if getattr(error, 'everywhere', False):
      raise
    code = LOST if lost(error) else error.code if isinstance(error, UserError) else 1
    if not isinstance(error, UserError):
      traceback.print_exc()
    if code == LOST:
      fail(f'another host ended or cannot be reached ({str(error)[:160]}): start all again with the same command, they '
           'go on from the last complete checkpoint')  # fmt: skip
    elif isinstance(error, UserError):
      fail(error)
  _exit(code)
