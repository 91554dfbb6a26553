"""AdamW without decay of biases and norms, gradient clipping, learning rate schedules, and an EMA of the weights."""

import functools

import jax
import jax.numpy as jnp
import optax


def make_schedule(cfg, steps: int) -> optax.Schedule:
  """Return the learning rate schedule: linear warmup, then constant or a decay over the remaining updates."""
  peak, warmup = cfg.learning_rate, cfg.warmup_steps
  decay_steps = max(1, steps - warmup)
  after_warmup = {
    'constant': optax.constant_schedule(peak),
    'cosine': optax.cosine_decay_schedule(peak, decay_steps, cfg.final_fraction),
    'linear': optax.linear_schedule(peak, peak * cfg.final_fraction, decay_steps),
  }[cfg.schedule]
  warming = optax.linear_schedule(0.0, peak, warmup)
  return optax.join_schedules([warming, after_warmup], [warmup]) if warmup else after_warmup


def make_optimizer(cfg, steps: int) -> tuple[optax.GradientTransformation, optax.Schedule]:
  """Return (AdamW after gradient clipping by global norm, learning rate schedule) for a run of `steps` updates."""
  schedule = make_schedule(cfg, steps)

  def is_decayed(path, _) -> bool:
    """Return whether weight decay applies to a parameter; biases and norm parameters are excluded."""
    names = jax.tree_util.keystr(path)
    return 'bias' not in names and 'norm' not in names

  mask = functools.partial(jax.tree_util.tree_map_with_path, is_decayed)
  adamw = optax.adamw(schedule, b1=cfg.b1, b2=cfg.b2, eps=cfg.eps, weight_decay=cfg.weight_decay, mask=mask)
  clip = optax.clip_by_global_norm(cfg.clip) if cfg.clip else optax.identity()
  return optax.chain(clip, adamw), schedule


def update_ema(ema, params, update, decay: float):
  """Return the moving average of the weights after update t = 1, 2, ..., with decay min(decay, (1 + t) / (10 + t))."""
  rate = 1.0 - jnp.minimum(decay, (1.0 + update) / (10.0 + update))
  return jax.tree.map(lambda old, new: old + rate * (new - old), ema, params)
