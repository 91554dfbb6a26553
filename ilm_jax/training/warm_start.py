"""Start a run from the weights of another run (`config.init_from`)."""

import jax
import jax.numpy as jnp
from absl import logging
from etils import epath

from ilm_jax.runs import checkpoint, run_file
from ilm_jax.training.train_step import TrainState
from ilm_jax.types import UserError


def load_weights(workdir, abstract_params):
  """Return (step, weights) of the best checkpoint of another run; the weights' moving average if that run has one."""
  run = run_file.read_run(workdir)
  eval_cfg = {'metric': 'exact_match', 'mode': 'max', **(run['config'].get('eval', {}) if run else {})}
  source = checkpoint.Checkpoints(workdir, metric=eval_cfg['metric'], mode=eval_cfg['mode'], read_only=True)
  step = source.find('best')
  try:
    return step, source.restore_weights(step, abstract_params)
  except checkpoint.ShapeError as error:
    raise UserError(
      f'init_from={workdir}: {error.difference}; give the model settings of that run, or leave init_from out'
    ) from None


def check_same_tokenizer(workdir, cfg) -> None:
  """Raise UserError if the other run in `workdir` used a different tokenizer than this config."""
  run = run_file.read_run(workdir) or {'config': {}}
  theirs = run['config'].get('task', {}).get('tokenizer', {}).get('fingerprint')
  ours = cfg.task.get('tokenizer', {}).get('fingerprint')
  if theirs and ours and theirs != ours:
    raise UserError(
      f'init_from={workdir}: that run has the tokenizer {theirs}, this one has {ours}: use the tokenizer of that run, '
      f'--config.task.tokenizer.path={epath.Path(workdir) / "tokenizer"}'
    )


def warm_start(workdir, state: TrainState, abstract: TrainState) -> TrainState:
  """Return a newly initialized state with the weights of another run, which also start the moving average."""
  step, params = load_weights(workdir, abstract.params)
  logging.info('starting from the weights of step %d of %s', step, workdir)
  ema = None if state.ema_params is None else jax.tree.map(jnp.copy, params)
  return state._replace(params=params, ema_params=ema)
