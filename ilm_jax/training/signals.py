"""Handling of SIGTERM and Ctrl-C during training and evaluation, and the exit codes of a run."""

import os
import signal
import threading

import jax
from absl import logging

from ilm_jax.distributed import processes

FINISHED, PREEMPTED, INTERRUPTED = 0, 75, 130  # exit codes of a run: finished; stopped by SIGTERM; stopped by Ctrl-C


class Signals:
  """Context manager that records SIGTERM and Ctrl-C, so that the training loop can save before it stops.

  The first signal ends the process until the caller sets `begun`, since there is nothing to save; a second Ctrl-C
  always does. `code` is the exit code, None until all processes have agreed to stop. With several processes, the JAX
  runtime handles SIGTERM and chooses a step at which all of them stop; a Ctrl-C is forwarded to it as a SIGTERM.
  """

  def __init__(self, saving: bool = True):
    """Choose the signals to handle: none if there are several processes and they save no checkpoints."""
    self._handled = (signal.SIGTERM, signal.SIGINT) if jax.process_count() == 1 else (signal.SIGINT,) if saving else ()
    if threading.current_thread() is not threading.main_thread():
      self._handled = ()  # Python delivers signals to the main thread only
    self.begun = not saving
    self.code = None
    self._own_code = None  # exit code for the last signal that this process received
    self._old_handlers = {}

  def __enter__(self):
    for number in self._handled:
      self._old_handlers[number] = signal.signal(number, self._receive)
    return self

  def __exit__(self, *_):
    for number, handler in self._old_handlers.items():
      signal.signal(number, handler)

  def _receive(self, number, _):
    """Record a signal; raise KeyboardInterrupt or SystemExit if it ends the process at once."""
    previous, self._own_code = self._own_code, PREEMPTED if number == signal.SIGTERM else INTERRUPTED
    if number == signal.SIGINT and (previous == INTERRUPTED or not self.begun):
      raise KeyboardInterrupt
    if not self.begun:
      self.code = self._own_code
      logging.info('SIGTERM before the first step: exiting; run the same command to start again')
      raise SystemExit(PREEMPTED)
    logging.info('%s: saving a checkpoint, then exiting', signal.Signals(number).name)
    if jax.process_count() == 1:
      self.code = self._own_code
    else:
      os.kill(os.getpid(), signal.SIGTERM)

  def received(self) -> bool:
    """Return whether all processes have agreed to stop, or, with one process, whether a signal was received."""
    return self.code is not None

  def agree_to_stop(self, step: int) -> bool:
    """Return whether all processes stop after this step; every process must call this exactly once per step."""
    if self.code is None and processes.stop_requested(step):
      codes = processes.gather(str(self._own_code or PREEMPTED))
      self.code = INTERRUPTED if str(INTERRUPTED) in codes else PREEMPTED
    return self.received()
