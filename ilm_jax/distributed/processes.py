"""Runs of several processes (usually one per host): start them, compare settings, share a folder, stop together.

In a run of one process, these functions do nothing or return at once.
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

from ilm_jax.console import exit_code, fail
from ilm_jax.types import UserError

FILE_TIMEOUT = 60  # seconds to wait until a file that process 0 writes is visible to all processes
PEER_LOST = 134  # exit code after losing contact with another process: 128 + SIGABRT, as if JAX had aborted
# Lower-case parts of JAX's error messages that indicate lost contact with another process.
PEER_LOST_SIGNS = ('closed by peer', 'remote process exited', 'reset by peer', 'heartbeat', 'coordination service',
                   'tasks are unhealthy')  # fmt: skip
FLAGS = ('coordinator', 'num_processes', 'process_id')
TPU_HOSTS = ('TPU_PROCESS_ADDRESSES', 'TPU_WORKER_HOSTNAMES')  # environment variables that list a TPU slice's hosts
PROCESS_COUNTS = ('SLURM_STEP_NUM_TASKS', 'OMPI_COMM_WORLD_SIZE')  # set by Slurm and Open MPI: number of processes


class PeerLost(UserError):
  """Error: another process did not start, died, or sees different files; starting all processes again may help."""

  code = PEER_LOST


def environment_names_peers(env=os.environ, devices=('/dev/accel0', '/dev/vfio/0')) -> bool:
  """Return whether the environment suggests a run of several processes (Slurm, Open MPI, TPU VMs, GKE with TPUs).

  `devices` are device files of which a TPU VM has at least one.
  """
  if any(env.get(name, '1') not in ('', '1') for name in PROCESS_COUNTS):
    return True
  if env.get('JAX_PLATFORMS', 'tpu').split(',')[0] != 'tpu':
    return False
  if 'MEGASCALE_COORDINATOR_ADDRESS' in env or any(',' in env.get(name, '') for name in TPU_HOSTS):
    return True
  return 'TPU_SKIP_MDS_QUERY' not in env and any(Path(name).exists() for name in devices)


def start(
  coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None, *,
  saving: bool = True, initialization_timeout: int = 300, heartbeat_timeout: int = 30,
) -> None:  # fmt: skip
  """Connect to the other processes of the run, if there are any. Call it before JAX uses a device.

  Args:
    coordinator: HOST:PORT of process 0; by default, environment variables tell whether there are other processes.
    num_processes: number of processes of the run.
    process_id: index of this process, 0 ... num_processes - 1.
    saving: whether this process will call `stop_requested` at every training step. If not, SIGTERM ends it at once.
    initialization_timeout: seconds to wait for the other processes.
    heartbeat_timeout: seconds without a heartbeat until a process counts as dead and the JAX runtime ends the others.
  """
  given = dict(zip(FLAGS, (coordinator, num_processes, process_id), strict=True))
  missing = [name for name, value in given.items() if value is None]
  if len(missing) == len(given):
    if not environment_names_peers():
      return
    given = {}
  elif missing:
    present = next(name for name in given if name not in missing)
    raise UserError(f'--{present} needs {" and ".join(f"--{name}" for name in missing)} too')
  elif num_processes < 1:
    raise UserError(f'--num_processes={num_processes}: expected at least 1')
  elif not 0 <= process_id < num_processes:
    raise UserError(f'--process_id={process_id} --num_processes={num_processes}: expected 0 to {num_processes - 1}')
  elif not coordinator.rpartition(':')[2].isdecimal() or coordinator.startswith(':'):
    raise UserError(f'--coordinator={coordinator}: expected HOST:PORT of process 0')
  elif process_id:
    wait_for_port(coordinator, initialization_timeout)
  if given:
    given['coordinator_address'] = given.pop('coordinator')
    given['cluster_detection_method'] = 'deactivate'
  jax.config.update('jax_enable_preemption_service', saving)
  address = coordinator or 'the coordinator that the environment names'
  timed_out = PeerLost(f'the processes did not all connect to {address} within {initialization_timeout} s: is every '
                       'process started, and can each reach that address?')  # fmt: skip
  # If not all processes connect in time, this timer reports it; JAX would later abort this one without a clear message.
  timer = threading.Timer(initialization_timeout, lambda: _exit(fail(timed_out)))
  timer.daemon = True
  timer.start()
  try:
    jax.distributed.initialize(
      **given,
      initialization_timeout=initialization_timeout + 60,
      heartbeat_timeout_seconds=heartbeat_timeout,
      shutdown_timeout_seconds=2 * heartbeat_timeout,
    )
  except ValueError:
    if given:
      raise
    counts = [f'{name}={os.environ[name]}' for name in PROCESS_COUNTS if os.environ.get(name, '1') not in ('', '1')]
    if counts:
      raise UserError(
        f'{counts[0]}: this is one of several processes, but JAX finds no coordinator in the environment (Open MPI 5 '
        'does not set one): give --coordinator=HOST:PORT, --num_processes and --process_id'
      ) from None
    return  # the environment suggested several processes, but this is the only one
  except Exception as error:  # JAX raises various types of error if it cannot connect
    raise PeerLost(f'{timed_out} ({" ".join(str(error).split())[:200]})') from error
  finally:
    timer.cancel()
  if jax.process_index():
    logging.set_verbosity(logging.WARNING)  # only the first process logs progress
  logging.info('%d processes with %d devices in total', jax.process_count(), jax.device_count())


def wait_for_port(address: str, seconds: float) -> None:
  """Wait until a process listens at HOST:PORT; raise PeerLost if none does (JAX's own error is unclear)."""
  host, _, port = address.rpartition(':')
  end = time.monotonic() + seconds
  while True:
    try:
      socket.create_connection((host.strip('[]'), int(port)), timeout=5).close()
      return
    except OSError as error:
      if time.monotonic() > end:
        raise PeerLost(
          f'--coordinator={address} cannot be reached ({error.strerror or error}; tried for {seconds} s): is process 0 '
          'started there, and is the port open?'
        ) from None
    time.sleep(0.2)


def is_first() -> bool:
  """Return whether this is process 0, which writes the files and logs of the run."""
  return jax.process_index() == 0


def which() -> tuple[int, int]:
  """Return (index of this process, number of processes)."""
  return jax.process_index(), jax.process_count()


def digest(value) -> str:
  """Return a short hash of repr(value), by which processes compare a large value."""
  return hashlib.sha256(repr(value).encode()).hexdigest()[:16]


def gather(text: str) -> list[str]:
  """Collective operation, which every process must call with a text: return the texts of all processes in order."""
  if jax.process_count() == 1:
    return [text]
  raw = np.frombuffer(text.encode(errors='backslashreplace'), np.uint8)
  lengths = multihost_utils.process_allgather(np.array([len(raw)], np.int32)).reshape(-1)
  rows = multihost_utils.process_allgather(np.pad(raw, (0, int(lengths.max()) - len(raw)))[None])
  rows = rows.reshape(len(lengths), -1)
  return [bytes(row[:length].astype(np.uint8)).decode() for row, length in zip(rows, lengths, strict=True)]


def raised_by_all(error: UserError) -> UserError:
  """Mark and return an error that every process raises, so that no process waits for another one when it exits."""
  error.everywhere = True
  return error


@contextlib.contextmanager
def raise_on_all():
  """Context manager: if one process raises a UserError in the body, all processes raise it after the body.

  Otherwise, the other processes would wait forever. The body must not contain collective operations, because other
  processes would match them with the one at the end of this function.
  """
  own_error = None
  try:
    yield
  except UserError as error:
    own_error = error
  messages = gather(str(own_error or ''))
  if own_error:
    raise raised_by_all(own_error)
  for process, message in enumerate(messages):
    if message:
      raise raised_by_all(UserError(f'process {process}: {message}'))


def agree(what: dict, error=UserError, advice: str = 'start all with the same command and code') -> None:
  """Check that the dict `what` (of JSON values) is equal in all processes; if not, raise `error` in each of them.

  `advice` ends the error message: what the user should do.
  """
  first, *others = (json.loads(text) for text in gather(json.dumps(what)))
  for process, other in enumerate(others, 1):
    for name in sorted(first.keys() | other.keys()):
      if first.get(name) != other.get(name):
        message = f'process {process} has {name}={other.get(name)}, process 0 has {first.get(name)}: {advice}'
        raise raised_by_all(error(message))


def check_shared(folder) -> None:
  """Raise UserError if a file that process 0 writes into the folder does not become visible to all processes."""
  if jax.process_count() == 1:
    return
  name = gather(secrets.token_hex(8))[0]
  path = epath.Path(folder) / f'.seen-by-all-{name}'
  with raise_on_all():
    if is_first():
      try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('')
      except OSError as error:
        raise UserError(f'the workdir {folder} cannot be written ({error.strerror or error})') from error
  end = time.monotonic() + FILE_TIMEOUT
  while not path.exists() and time.monotonic() < end:  # network file systems may cache that the file is missing
    time.sleep(0.5)
  blind = [str(process) for process, seen in enumerate(gather('x' if path.exists() else '')) if not seen]
  if is_first():
    path.unlink(missing_ok=True)
  if blind:
    message = f'--workdir={folder}: process {", ".join(blind)} does not see the files that process 0 writes there'
    raise raised_by_all(UserError(f'{message}: give a folder that all hosts share, or a bucket (gs://...)'))


def barrier(name: str) -> None:
  """Wait until every process has called this with the same name."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)


def stop_requested(step: int) -> bool:
  """Return whether any process has received SIGTERM or a preemption notice; the answer is the same in all processes.

  Every process must call this once per training step.
  """
  return jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step)


def is_peer_lost(error: BaseException | None) -> bool:
  """Return whether an error, or the cause of a UserError, is a JAX error about lost contact with another process."""
  if jax.process_count() == 1:
    return False
  if isinstance(error, UserError):
    return error.__cause__ is not None and is_peer_lost(error.__cause__)
  return isinstance(error, jax.errors.JaxRuntimeError) and any(sign in str(error).lower() for sign in PEER_LOST_SIGNS)


def _exit(code: int) -> None:
  """End this process at once with an exit code; a normal exit would wait for the other processes."""
  lost = exit_code(sys.stdout.flush)
  with contextlib.suppress(OSError):
    sys.stderr.flush()
  os._exit(code or lost)


def end_together(call) -> int:
  """Return call(), which runs a command; if it fails in this process only, end the process at once.

  A normal exit would wait for the other processes, which wait for this one. JAX then ends the other processes.
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
    code = PEER_LOST if is_peer_lost(error) else error.code if isinstance(error, UserError) else 1
    if not isinstance(error, UserError):
      traceback.print_exc()
    if code == PEER_LOST:
      fail(f'another process ended or cannot be reached ({str(error)[:160]}): start all processes again; '
           'training resumes from the last complete checkpoint')  # fmt: skip
    elif isinstance(error, UserError):
      fail(error)
  _exit(code)
