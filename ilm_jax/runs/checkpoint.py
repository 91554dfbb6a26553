"""Checkpoints: Orbax, asynchronous, the latest ones and the best on validation.

A checkpoint holds the items `params`, `ema_params` and `opt_state` of a step, separately, so that a reader of weights
needs neither the optimizer nor the mesh they were trained on.
"""

import json
import math
import re

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from orbax.checkpoint import checkpoint_managers

from ilm_jax.distributed import processes
from ilm_jax.types import UserError

ITEMS = ('params', 'ema_params', 'opt_state')


PASSING = ('RESOURCE_EXHAUSTED', 'PERMISSION_DENIED', 'UNAVAILABLE', 'DEADLINE_EXCEEDED', 'Input/output error')


class ShapeError(UserError):
  """A checkpoint of another model. `what` lacks the advice, which depends on who reads."""

  def __init__(self, what: str):
    super().__init__(f'{what}; use the config it was trained with, or another --workdir')
    self.what = what


class Checkpoints:
  """The checkpoints of a workdir."""

  def __init__(self, workdir, *, keep: int = 2, metric: str = 'exact_match', mode: str = 'max', read_only=False):
    """Open (and, to write, create) the folder.

    Args:
      workdir: of the run, local or a bucket.
      keep: how many of the latest to keep.
      metric: of the validation; the checkpoint where it is best is kept too.
      mode: is 'max' best, or 'min'?
      read_only: never write or delete anything.
    """
    self.folder = epath.Path(workdir).resolve() / 'checkpoints'  # Orbax takes absolute paths alone
    self.metric, self.mode = metric, mode
    if not read_only:
      if processes.first():
        self._mend()
      processes.barrier('mended')

    def score(metrics):
      return metrics.get(metric, math.inf if mode == 'min' else -math.inf)

    best = checkpoint_managers.BestN(
      get_metric_fn=score, reverse=mode == 'min', n=1, keep_checkpoints_without_metrics=False
    )
    policies = [checkpoint_managers.LatestN(keep), best]
    verbosity = logging.get_verbosity()
    if read_only:
      logging.set_verbosity(logging.ERROR)  # Orbax warns that read-only means that nothing will be written
    options = ocp.CheckpointManagerOptions(
      best_fn=score,  # without it, Orbax would not write the metrics
      preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
      create=not read_only,
      read_only=read_only,
      lightweight_initialize=read_only,
      enable_async_checkpointing=True,
    )
    handlers = {name: ocp.StandardCheckpointHandler() for name in ITEMS}
    self._manager = ocp.CheckpointManager(self.folder, options=options, item_handlers=handlers)
    logging.set_verbosity(verbosity)

  def _mend(self) -> None:
    """Remove what a killed save or a failing disk left behind."""
    if not self.folder.exists():
      return
    for path in self.folder.glob('*orbax-checkpoint-tmp*'):
      logging.warning('passed over (and removed) the incomplete checkpoint %s', path)
      path.rmtree()
    for path in self.folder.glob('*/metrics/metrics'):
      try:
        json.loads(path.read_text())
      except ValueError:
        logging.warning('passed over (and removed) the metrics in %s, which are no JSON', path)
        path.unlink()

  def steps(self) -> list[int]:
    """Steps of the complete checkpoints."""
    return sorted(self._manager.all_steps())

  def metrics(self, step: int) -> dict | None:
    """The validation metrics saved with a step."""
    try:
      return dict(self._manager.metrics(step) or {}) or None
    except ValueError:
      logging.warning('passed over the metrics of step %d in %s, which are no JSON', step, self.folder)
      return None

  def find(self, which) -> int:
    """The step of 'best' (the latest, where nothing was validated), 'latest' or a number."""
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
      raise UserError(f'no checkpoint of step {step} in {self.folder}: there are {", ".join(map(str, steps))}')
    return step

  def save(self, step: int, state, metrics: dict | None = None) -> None:
    """Start saving a state; to a step that was saved without its metrics, the metrics are added."""
    if step in self.steps():
      if metrics:
        self._guard(lambda: self._add_metrics(step, metrics))
      return
    items = {name: getattr(state, name) for name in ITEMS}
    args = {name: ocp.args.StandardSave(item) for name, item in items.items() if item is not None}
    self._guard(lambda: self._manager.save(step, args=ocp.args.Composite(**args), metrics=metrics or {}, force=True))

  def _add_metrics(self, step: int, metrics: dict) -> None:
    self._manager.wait_until_finished()
    there = self.metrics(step)
    processes.barrier('metrics read')  # all have looked before the first writes
    if there:
      return
    path = self.folder / str(step) / 'metrics' / 'metrics'
    if processes.first():
      path.parent.mkdir(exist_ok=True)
      part = path.parent / '.metrics.part'
      part.write_text(json.dumps(metrics))
      part.replace(path)
    processes.barrier('metrics added')
    self._manager.reload()

  def check(self) -> None:
    """Raise what went wrong in an asynchronous save.

    Orbax's own check would take the error away from its finalizing thread, which would then delete older checkpoints.
    """
    if not self._manager.is_saving_in_progress():
      self.wait()

  def wait(self) -> None:
    """Wait until what was saved is on disk."""
    self._guard(self._manager.wait_until_finished)

  def close(self) -> None:
    """Wait, and let go of the threads."""
    self._guard(self._manager.close)

  def _guard(self, call):
    try:
      return call()
    except Exception as error:  # Orbax raises many types: OSError, ValueError, its own
      raise UserError(
        f'a checkpoint could not be written to {self.folder} ({reason(error)}): {self.last_complete()}; '
        'make room (or mend what it says) and start the same command again'
      ) from error

  def last_complete(self) -> str:
    """Say which checkpoint to go back to, once a save under way has ended."""
    try:
      self._manager.wait_until_finished()
    except Exception as error:
      logging.warning('the last save failed (%s)', reason(error))
    self._manager.reload()
    steps = self.steps()
    return f'the last complete checkpoint is step {steps[-1]}' if steps else 'there is no complete checkpoint yet'

  # --- reading ---

  def restore(self, step: int, item: str, abstract):
    """Read one item of a checkpoint onto the shapes and shardings of `abstract`; refuse other shapes."""
    self._compare(step, item, abstract)
    args = ocp.args.Composite(**{item: ocp.args.StandardRestore(abstract)})
    return self._manager.restore(step, args=args)[item]

  def has(self, step: int, item: str) -> bool:
    """Was the item saved at the step?"""
    return (self.folder / str(step) / item).exists()

  def restore_latest(self, abstract_state):
    """Read the latest state that can be read, or None; damaged checkpoints are set aside with a warning."""
    for step in reversed(self.steps()):
      state, wrong = None, None
      try:
        items = {name: getattr(abstract_state, name) for name in ITEMS}
        items = {name: None if item is None else self.restore(step, name, item) for name, item in items.items()}
        state = abstract_state._replace(step=np.int32(step), **items)
      except UserError:
        raise
      except Exception as error:
        wrong = error
        if passing(error):
          raise UserError(
            f'the checkpoint of step {step} in {self.folder} could not be read ({reason(error)}), which says nothing '
            'about its being whole: mend that, and start the same command again (nothing was changed)'
          ) from error
      reasons = [text for text in processes.gather('' if wrong is None else reason(wrong)) if text]
      if not reasons:
        return state
      if processes.first():
        self._set_aside(step, reasons[0])
      processes.barrier('set aside')
      self._manager.reload()
    return None

  def _set_aside(self, step: int, why: str) -> None:
    taken = len(list(self.folder.parent.glob(f'damaged-checkpoint-{step}*')))
    aside = self.folder.parent / (f'damaged-checkpoint-{step}' + (f'-{taken + 1}' if taken else ''))
    logging.warning('passed over the incomplete checkpoint of step %d, set aside as %s (%s)', step, aside, why)
    (self.folder / str(step)).rename(aside)

  def restore_weights(self, step: int, abstract_params):
    """Read the weights that evaluation uses: the moving average where there is one."""
    try:
      return self.restore(step, 'ema_params' if self.has(step, 'ema_params') else 'params', abstract_params)
    except UserError:
      raise
    except Exception as error:
      raise UserError(
        f'the checkpoint of step {step} in {self.folder} cannot be read ({reason(error)}): choose another, there are '
        f'{", ".join(map(str, self.steps()))}'
      ) from error

  def _compare(self, step: int, item: str, abstract) -> None:
    metadata = self._manager.item_metadata(step)
    metadata = metadata.get(item) if metadata is not None else None
    if metadata is None:
      return  # unreadable: the restore will say why
    saved = _shapes(metadata)
    wanted = _shapes(abstract)
    for name in sorted(saved.keys() | wanted.keys()):
      if saved.get(name) != wanted.get(name):
        raise ShapeError(
          f'the checkpoint of step {step} in {self.folder} has another shape: {item} {name} is '
          f'{saved.get(name, "absent")} there, {wanted.get(name, "absent")} in this model'
        )


def passing(error: Exception) -> bool:
  """May reading succeed another time (no memory, no permission, a failing network or disk), the data being whole?"""
  if isinstance(error, MemoryError) or (isinstance(error, OSError) and not isinstance(error, FileNotFoundError)):
    return True
  return any(word in str(error) for word in PASSING)


def reason(error: Exception) -> str:
  """What went wrong, in a line: the words of the operating system where they can be found in the libraries' own."""
  text = ' '.join(str(error).split())
  system = re.search(r"([^:]+) \[os_error_code='\d+'\]", text)
  return system[1].strip() if system else f'{type(error).__name__}: {text[:200]}'


def _shapes(tree) -> dict[str, tuple]:
  """Path -> shape, the paths spelled the same for lists, tuples, dicts and named tuples."""
  out = {}
  for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
    shape = getattr(leaf, 'shape', None)
    name = '/'.join(str(getattr(k, 'key', getattr(k, 'name', getattr(k, 'idx', k)))) for k in path)
    out[name] = tuple(shape) if shape is not None else ()
  return out
