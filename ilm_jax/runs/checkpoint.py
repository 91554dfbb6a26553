"""Save and restore checkpoints with Orbax, asynchronously; keep the latest ones and the best by a validation metric.

A checkpoint stores `params`, `ema_params` and `opt_state` as separate items, so that the weights can be read without
the optimizer state and onto any device mesh.
"""

import json
import math
import re

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from orbax.checkpoint import checkpoint_managers as managers

from ilm_jax import paths
from ilm_jax.distributed import processes
from ilm_jax.types import UserError

ITEMS = ('params', 'ema_params', 'opt_state')
# Substrings of read errors that do not mean that the checkpoint is damaged.
TRANSIENT = ('RESOURCE_EXHAUSTED', 'PERMISSION_DENIED', 'UNAVAILABLE', 'DEADLINE_EXCEEDED', 'Input/output error')


class ShapeError(UserError):
  """Raised if the arrays of a checkpoint do not fit the model; `difference` is the message without the advice."""

  def __init__(self, difference: str):
    super().__init__(f'{difference}; use the config it was trained with, or another --workdir')
    self.difference = difference


def folder_of(workdir) -> epath.Path:
  """Return the absolute path of the checkpoint folder in a workdir; UserError if Orbax cannot handle the path."""
  folder = paths.resolve(workdir, 'workdir').resolve() / 'checkpoints'  # Orbax accepts absolute paths only
  text = str(folder).encode(errors='replace').decode()  # bytes that are not UTF-8 become ?, which is refused below
  if set(text) & set('*?[\\'):  # Orbax treats *, ? and [ as a pattern, TensorStore treats \ as /
    raise UserError(
      f'{text}: Orbax misreads paths with a character *, ?, [ or \\, or that are not UTF-8: rename or move the folder, '
      'or give another --workdir'
    )
  return folder


class Checkpoints:
  """Save, list and restore the checkpoints of a run in its workdir."""

  def __init__(self, workdir, *, keep: int = 2, metric: str = 'exact_match', mode: str = 'max', read_only=False):
    """Open the checkpoint folder of a run; unless read_only, create it and remove incomplete files.

    The `keep` latest checkpoints are kept, and the one with the best validation metric (`mode`: 'max' or 'min').
    """
    self.folder = folder_of(workdir)
    self.metric, self.mode = metric, mode
    if not read_only:
      if processes.is_first():
        self._remove_incomplete_files()
      processes.barrier('incomplete files removed')

    def score(metrics):
      return metrics.get(metric, math.inf if mode == 'min' else -math.inf)

    best = managers.BestN(get_metric_fn=score, reverse=mode == 'min', n=1, keep_checkpoints_without_metrics=False)
    verbosity = logging.get_verbosity()
    if read_only:
      logging.set_verbosity(logging.ERROR)  # hides Orbax's warning about read-only mode
    options = ocp.CheckpointManagerOptions(
      best_fn=score,  # without `best_fn`, Orbax would not write the metrics
      preservation_policy=managers.AnyPreservationPolicy([managers.LatestN(keep), best]),
      create=not read_only,
      read_only=read_only,
      lightweight_initialize=read_only,
      enable_async_checkpointing=True,
    )
    handlers = {name: ocp.StandardCheckpointHandler() for name in ITEMS}
    self._manager = ocp.CheckpointManager(self.folder, options=options, item_handlers=handlers)
    logging.set_verbosity(verbosity)

  def _remove_incomplete_files(self) -> None:
    """Remove incomplete checkpoints and metrics files that a killed process or a full disk has left behind."""
    for path in paths.matching(self.folder, '*orbax-checkpoint-tmp*'):
      logging.warning('removed the incomplete checkpoint %s', path)
      path.rmtree()
    for path in (step / 'metrics' / 'metrics' for step in paths.matching(self.folder, '*')):
      try:
        json.loads(path.read_text() if path.exists() else '{}')
      except ValueError:
        logging.warning('removed the metrics in %s, which are not valid JSON', path)
        path.unlink()

  def steps(self) -> list[int]:
    """Return the steps of the complete checkpoints, in ascending order."""
    return sorted(self._manager.all_steps())

  def metrics(self, step: int) -> dict | None:
    """Return the validation metrics saved with a checkpoint, or None if it has none."""
    try:
      return dict(self._manager.metrics(step) or {}) or None
    except ValueError:
      logging.warning('ignored the metrics of step %d in %s, which are not valid JSON', step, self.folder)
      return None

  def find(self, which) -> int:
    """Return the step of a checkpoint: 'latest', 'best' (the latest if none has metrics), or a step that must exist."""
    steps = self.steps()
    if not steps:
      raise UserError(f'no checkpoint in {self.folder}: expected the workdir of a run that has saved one')
    if which == 'latest':
      return steps[-1]
    if which == 'best':
      scored = [(found[self.metric], step) for step in steps if self.metric in (found := self.metrics(step) or {})]
      if not scored:
        return steps[-1]
      sign = 1 if self.mode == 'max' else -1
      return max(scored, key=lambda pair: (sign * pair[0], pair[1]))[1]
    try:
      step = int(which)
    except ValueError:
      raise UserError(f"checkpoint {which!r}: expected 'best', 'latest' or a step") from None
    if step not in steps:
      raise UserError(f'no checkpoint of step {step} in {self.folder}: choose one of {", ".join(map(str, steps))}')
    return step

  def save(self, step: int, state, metrics: dict | None = None) -> None:
    """Start saving a training state and its validation metrics; for a saved step, only add missing metrics."""
    if step in self.steps():
      if metrics:
        self._guard(lambda: self._add_metrics(step, metrics))
      return
    items = {name: getattr(state, name) for name in ITEMS}
    args = {name: ocp.args.StandardSave(item) for name, item in items.items() if item is not None}
    self._guard(lambda: self._manager.save(step, args=ocp.args.Composite(**args), metrics=metrics or {}, force=True))

  def _add_metrics(self, step: int, metrics: dict) -> None:
    """Add validation metrics to a complete checkpoint that has none."""
    self._manager.wait_until_finished()
    has_metrics = self.metrics(step) is not None
    processes.barrier('metrics read')  # no process may write metrics until all have checked whether metrics exist
    if has_metrics:
      return
    path = self.folder / str(step) / 'metrics' / 'metrics'
    if processes.is_first():
      path.parent.mkdir(exist_ok=True)
      part = path.parent / '.metrics.part'
      part.write_text(json.dumps(metrics))
      part.replace(path)
    processes.barrier('metrics added')
    self._manager.reload()

  def check(self) -> None:
    """Raise UserError if an asynchronous save has failed."""
    # Orbax's `check_for_errors` would clear the error, and a background thread would then delete older checkpoints.
    if not self._manager.is_saving_in_progress():
      self.wait()

  def wait(self) -> None:
    """Wait until all saves have ended; raise UserError if one failed."""
    self._guard(self._manager.wait_until_finished)

  def close(self) -> None:
    """Wait until all saves have ended, then stop Orbax's background threads."""
    self._guard(self._manager.close)

  def _guard(self, call):
    """Return call(); convert any exception to a UserError that names the last complete checkpoint."""
    try:
      return call()
    except Exception as error:  # Orbax raises OSError, ValueError and its own error types
      raise UserError(
        f'a checkpoint could not be written to {self.folder} ({reason(error)}): {self.last_complete()}; '
        'free disk space (or fix the named cause) and run the same command again'
      ) from error

  def last_complete(self) -> str:
    """Wait for a save in progress, then return a phrase for error messages that names the last complete checkpoint."""
    try:
      self._manager.wait_until_finished()
    except Exception as error:
      logging.warning('the last save failed (%s)', reason(error))
    self._manager.reload()
    steps = self.steps()
    return f'the last complete checkpoint is step {steps[-1]}' if steps else 'there is no complete checkpoint yet'

  def restore(self, step: int, item: str, abstract):
    """Read an item, such as 'params', with the dtypes and shardings of `abstract`; ShapeError if its shapes differ."""
    metadata = (self._manager.item_metadata(step) or {}).get(item)
    if metadata is not None:  # without metadata, the read below fails and reports why
      saved, wanted = _shapes(metadata), _shapes(abstract)
      for name, _ in sorted(saved.items() ^ wanted.items()):
        raise ShapeError(
          f'the checkpoint of step {step} in {self.folder} has other shapes: {item} {name} is '
          f'{saved.get(name, "absent")} in the checkpoint, {wanted.get(name, "absent")} in this model'
        )
    args = ocp.args.Composite(**{item: ocp.args.StandardRestore(abstract)})
    return self._manager.restore(step, args=args)[item]

  def restore_latest(self, abstract_state):
    """Return the training state of the latest readable checkpoint, or None; move damaged checkpoints aside.

    UserError if the shapes differ, or if reading failed for a reason that may be temporary, such as a network error.
    """
    for step in reversed(self.steps()):
      state, damage = abstract_state._replace(step=np.int32(step)), ''
      try:
        for name in ITEMS:
          if (item := getattr(abstract_state, name)) is not None:
            state = state._replace(**{name: self.restore(step, name, item)})
      except UserError:
        raise
      except Exception as error:
        damage = reason(error)
        if is_transient(error):
          raise UserError(
            f'the checkpoint of step {step} in {self.folder} could not be read ({damage}); it may be intact: '
            'fix the named cause and run the same command again (nothing was changed)'
          ) from error
      reasons = [text for text in processes.gather(damage) if text]
      if not reasons:
        return state
      if processes.is_first():
        self._set_aside(step, reasons[0])
      processes.barrier('set aside')
      self._manager.reload()
    return None

  def _set_aside(self, step: int, why: str) -> None:
    """Move a damaged checkpoint to `damaged-checkpoint-STEP` in the workdir, where it is never read or deleted."""
    earlier = len(paths.matching(self.folder.parent, f'damaged-checkpoint-{step}*'))
    aside = self.folder.parent / (f'damaged-checkpoint-{step}' + (f'-{earlier + 1}' if earlier else ''))
    logging.warning('moved the damaged checkpoint of step %d to %s (%s)', step, aside, why)
    (self.folder / str(step)).rename(aside)

  def restore_weights(self, step: int, abstract_params):
    """Return the weights to evaluate: their moving average if it was saved, else the parameters themselves."""
    averaged = (self.folder / str(step) / 'ema_params').exists()
    try:
      return self.restore(step, 'ema_params' if averaged else 'params', abstract_params)
    except UserError:
      raise
    except Exception as error:
      raise UserError(
        f'the checkpoint of step {step} in {self.folder} cannot be read ({reason(error)}): choose another; there are '
        f'checkpoints of steps {", ".join(map(str, self.steps()))}'
      ) from error


def is_transient(error: Exception) -> bool:
  """Return whether a read error may be temporary (memory, permissions, network or disk), so the data may be intact."""
  if isinstance(error, MemoryError) or (isinstance(error, OSError) and not isinstance(error, FileNotFoundError)):
    return True
  return any(word in str(error) for word in TRANSIENT)


def reason(error: Exception) -> str:
  """Return a one-line description of an exception: the operating system's message if any, else its type and text."""
  text = ' '.join(str(error).split())
  system = re.search(r"([^:]+) \[os_error_code='\d+'\]", text)
  return system[1].strip() if system else f'{type(error).__name__}: {text[:200]}'


def _shapes(tree) -> dict[str, tuple]:
  """Return {path: shape} of all arrays in a tree; paths do not depend on container types, such as list or tuple."""
  return {
    '/'.join(str(getattr(k, 'key', getattr(k, 'name', getattr(k, 'idx', k)))) for k in path):
      tuple(getattr(leaf, 'shape', None) or ())
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
  }  # fmt: skip
