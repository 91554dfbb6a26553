"""Start a run from the weights of another run (`config.init_from`)."""

import jax
import jax.numpy as jnp
from absl import logging

from ilm_jax import paths
from ilm_jax.distributed import processes
from ilm_jax.runs import checkpoint, run_file
from ilm_jax.training.train_step import TrainState
from ilm_jax.types import UserError


def load_weights(cfg, abstract_params):
  """Return (step, weights) of the best checkpoint of the run `cfg.init_from`; its averaged weights, if it has them.

  UserError if that run uses another tokenizer or has other shapes.
  """
  with processes.raise_on_all():
    workdir = paths.resolve(cfg.init_from, 'init_from')
    config = (run_file.read_run(workdir) or {'config': {}})['config']
    theirs = config.get('task', {}).get('tokenizer', {}).get('fingerprint')
    ours = cfg.task.get('tokenizer', {}).get('fingerprint')
    if theirs and ours and theirs != ours:
      raise UserError(
        f'init_from={workdir}: that run has the tokenizer {theirs}, this one has {ours}: use the tokenizer of that '
        f'run, --config.task.tokenizer.path={workdir / "tokenizer"}'
      )
  eval_cfg = {'metric': 'exact_match', 'mode': 'max', **config.get('eval', {})}
  source = checkpoint.Checkpoints(workdir, metric=eval_cfg['metric'], mode=eval_cfg['mode'], read_only=True)
  step = source.find('best')
  try:
    return step, source.restore_weights(step, abstract_params)
  except checkpoint.ShapeError as error:
    raise UserError(
      f'init_from={workdir}: {error.difference}; give the model settings of that run, or leave init_from out'
    ) from None


def warm_start(cfg, state: TrainState, abstract: TrainState) -> TrainState:
  """Return the state with its parameters and moving average set to the weights of the run `cfg.init_from`."""
  step, params = load_weights(cfg, abstract.params)
  logging.info('starting from the weights of step %d of %s', step, cfg.init_from)
  ema = None if state.ema_params is None else jax.tree.map(jnp.copy, params)
  return state._replace(params=params, ema_params=ema)
