"""AdamW with the reference's decay mask, clipping, schedules and exponential moving average."""

import jax
import jax.numpy as jnp
import optax

from ilm_jax.types import UserError

SCHEDULES = ('constant', 'cosine', 'linear')


def make_schedule(cfg, steps: int) -> optax.Schedule:
  """Learning rate of each update: a linear warm-up, then constant, or decayed to `final_fraction` at the last step."""
  peak, warmup = cfg.learning_rate, cfg.warmup_steps
  rest = max(1, steps - warmup)
  if cfg.schedule not in SCHEDULES:
    raise UserError(f'optimizer.schedule={cfg.schedule!r}: expected one of {", ".join(SCHEDULES)}')
  after = {
    'constant': optax.constant_schedule(peak),
    'cosine': optax.cosine_decay_schedule(peak, rest, cfg.final_fraction),
    'linear': optax.linear_schedule(peak, peak * cfg.final_fraction, rest),
  }[cfg.schedule]
  if not warmup:
    return after
  return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])


def decays(path) -> bool:
  """Weight decay is for all parameters but biases and norms; embedding and unembedding are decayed."""
  names = jax.tree_util.keystr(path)
  return 'bias' not in names and 'norm' not in names


def make_optimizer(cfg, steps: int) -> tuple[optax.GradientTransformation, optax.Schedule]:
  """Return (AdamW behind a clipping of the global norm, its schedule)."""
  schedule = make_schedule(cfg, steps)

  def mask(params):
    return jax.tree_util.tree_map_with_path(lambda path, _: decays(path), params)

  adamw = optax.adamw(schedule, b1=cfg.b1, b2=cfg.b2, eps=cfg.eps, weight_decay=cfg.weight_decay, mask=mask)
  clip = optax.clip_by_global_norm(cfg.clip) if cfg.clip else optax.identity()
  return optax.chain(clip, adamw), schedule


def update_ema(ema, params, update, decay: float):
  """Move the average towards the parameters; `update` counts from 1 and ramps the decay: min(decay, (1+t)/(10+t))."""
  rate = 1.0 - jnp.minimum(decay, (1.0 + update) / (10.0 + update))
  return jax.tree.map(lambda old, new: old + rate * (new - old), ema, params)
