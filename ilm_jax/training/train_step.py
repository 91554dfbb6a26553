"""One update: the state of a run, and the pure, jitted function that moves it on."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ilm_jax.distributed import sharding
from ilm_jax.models import transformer
from ilm_jax.training import optimizer
from ilm_jax.training.experiment import Experiment


class TrainState(NamedTuple):
  """All that a run has to remember."""

  step: Any  # number of updates made
  params: Any
  opt_state: Any
  ema_params: Any  # None without a moving average


def _create(exp: Experiment, tx):
  """Make a fresh state, boxed with logical axis names."""

  def create():
    params = transformer.init(exp.model_cfg, jax.random.fold_in(jax.random.key(exp.cfg.seed), 0x494E4954))
    ema = jax.tree.map(jnp.copy, params) if exp.cfg.optimizer.ema_decay else None
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), ema)

  return create


def abstract_state(exp: Experiment, tx) -> TrainState:
  """Shapes, types and shardings of a state."""
  boxed = jax.eval_shape(_create(exp, tx))
  shardings = sharding.state_shardings(boxed, exp.mesh)
  return jax.tree.map(
    lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), transformer.unbox(boxed), shardings
  )


def init_state(exp: Experiment, tx) -> tuple[TrainState, TrainState]:
  """Make a fresh state on the mesh; returns (state, its shapes and shardings)."""
  abstract, create = abstract_state(exp, tx), _create(exp, tx)
  shardings = jax.tree.map(lambda x: x.sharding, abstract)
  return jax.jit(lambda: transformer.unbox(create()), out_shardings=shardings)(), abstract


def make_step(exp: Experiment, tx, schedule):
  """The pure function (state, batch) -> (state, metrics) of one update.

  The gradient is that of the *total* loss, divided once by the total weight: with gradient accumulation, totals and
  weights of the parts are summed first, so the update equals that of the whole batch.
  """
  cfg, parts = exp.cfg, exp.cfg.optimizer.accumulation_steps
  root = jax.random.fold_in(jax.random.key(cfg.seed), 0x44524F50)
  drops = exp.model_cfg.dropout > 0 or exp.model_cfg.attention_dropout > 0

  def total_loss(params, batch, rng):
    outputs = transformer.apply_batch(exp.model_cfg, params, batch, rng=rng)
    pairs = exp.family.loss(outputs, batch, exp.loss_cfg)
    return pairs['loss'][0], pairs

  gradient = jax.grad(total_loss, has_aux=True)

  def whole(params, batch, rng):
    return gradient(params, batch, rng if drops else None)

  def accumulated(params, batch, rng):
    # Row r goes to part r % parts, so that each device keeps its rows.
    batch = jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), batch)

    def add(carry, item):
      index, part = item
      return jax.tree.map(jnp.add, carry, whole(params, part, jax.random.fold_in(rng, index))), None

    first = jax.tree.map(lambda x: x[0], batch)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(whole, params, first, rng))
    return jax.lax.scan(add, zeros, (jnp.arange(parts), batch))[0]

  def step(state: TrainState, batch):
    rng = jax.random.fold_in(root, state.step)
    grads, pairs = (whole if parts == 1 else accumulated)(state.params, batch, rng)
    weight = jnp.maximum(pairs['loss'][1], 1e-9)
    grads = jax.tree.map(lambda g: g / weight, grads)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = jax.tree.map(jnp.add, state.params, updates)
    ema = state.ema_params
    if ema is not None:
      ema = optimizer.update_ema(ema, params, state.step + 1, cfg.optimizer.ema_decay)
    pairs |= batch_pairs(batch, cfg.data.batch_size)
    pairs |= {'gradient_norm': (norm_of(grads), 1.0), 'update_norm': (norm_of(updates), 1.0)}
    pairs |= {'learning_rate': (schedule(state.step), 1.0)}
    return TrainState(state.step + 1, params, opt_state, ema), pairs

  return step


def norm_of(tree):
  """The Euclidean norm of all the numbers of a tree."""
  return jnp.sqrt(sum(jnp.square(x).sum() for x in jax.tree.leaves(tree)))  # vdot would gather sharded arrays


def batch_pairs(batch, batch_size: int) -> dict:
  """What the packing achieved: tokens before and after the corruption, share of positions in use, what did not fit."""
  kept = (batch['segment_BxL'] > 0).sum().astype(jnp.float32)
  placed = (batch['example_id_BxS'] >= 0).sum()
  return {
    'kept_tokens': (kept, 1.0),
    'original_tokens': (batch['length_BxS'].sum().astype(jnp.float32), 1.0),
    'packing_efficiency': (kept, float(batch['segment_BxL'].size)),
    'left_out_examples': (jnp.float32(batch_size) - placed, 1.0),
  }


def compile_step(exp: Experiment, tx, schedule, abstract: TrainState):
  """Jit the step, with the state donated and everything placed on the mesh."""
  shardings = jax.tree.map(lambda x: x.sharding, abstract)
  return jax.jit(
    sharding.on(exp.mesh)(make_step(exp, tx, schedule)),
    in_shardings=(shardings, sharding.rows_sharding(exp.mesh)),
    out_shardings=(shardings, sharding.replicated(exp.mesh)),
    donate_argnums=0,
  )
