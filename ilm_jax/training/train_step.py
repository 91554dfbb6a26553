"""The training state, and the pure, jitted function that performs one optimizer update."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ilm_jax.distributed import sharding
from ilm_jax.models import transformer
from ilm_jax.training import optimizer
from ilm_jax.training.experiment import Experiment


class TrainState(NamedTuple):
  """Everything that a checkpoint must contain; random keys and batches are derived from the step number."""

  step: Any  # number of updates made so far
  params: Any
  opt_state: Any
  ema_params: Any  # None if the config asks for no moving average


def _initializer(exp: Experiment, tx):
  """Return a function that creates a training state whose parameters are boxed with their logical axis names."""

  def initialize():
    params = transformer.init(exp.model_cfg, jax.random.fold_in(jax.random.key(exp.cfg.seed), 0x494E4954))
    ema = jax.tree.map(jnp.copy, params) if exp.cfg.optimizer.ema_decay else None
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), ema)

  return initialize


def abstract_state(exp: Experiment, tx) -> TrainState:
  """Return the shapes, dtypes and shardings of a training state, without computing its values."""
  boxed = jax.eval_shape(_initializer(exp, tx))
  shapes, shardings = transformer.unbox(boxed), sharding.state_shardings(boxed, exp.mesh)
  return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, shardings)


def init_state(exp: Experiment, tx) -> tuple[TrainState, TrainState]:
  """Return (newly initialized training state on the mesh, its abstract state: shapes, dtypes and shardings)."""
  abstract, initialize = abstract_state(exp, tx), _initializer(exp, tx)
  shardings = jax.tree.map(lambda x: x.sharding, abstract)
  return jax.jit(lambda: transformer.unbox(initialize()), out_shardings=shardings)(), abstract


def make_step(exp: Experiment, tx, schedule):
  """Return the pure update function (state, batch) -> (state, metrics); each metric is a pair (total, weight).

  The gradient of the *total* loss is divided once by the total weight. Gradient accumulation sums totals and weights
  over the microbatches first, so the update equals that of the whole batch. `schedule` only serves as a metric.
  """
  cfg, microbatches = exp.cfg, exp.cfg.optimizer.accumulation_steps
  root = jax.random.fold_in(jax.random.key(cfg.seed), 0x44524F50)
  has_dropout = exp.model_cfg.dropout > 0 or exp.model_cfg.attention_dropout > 0

  def total_loss(params, batch, rng):
    outputs = transformer.apply_batch(exp.model_cfg, params, batch, rng=rng if has_dropout else None)
    pairs = exp.family.loss(outputs, batch, exp.loss_cfg)
    return pairs['loss'][0], pairs

  whole = jax.grad(total_loss, has_aux=True)

  def accumulated(params, batch, rng):
    # Row r goes to microbatch r % microbatches, so that each row stays on its device.
    batch = jax.tree.map(lambda x: x.reshape(-1, microbatches, *x.shape[1:]).swapaxes(0, 1), batch)

    def add(carry, item):
      index, microbatch = item
      return jax.tree.map(jnp.add, carry, whole(params, microbatch, jax.random.fold_in(rng, index))), None

    first = jax.tree.map(lambda x: x[0], batch)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(whole, params, first, rng))
    return jax.lax.scan(add, zeros, (jnp.arange(microbatches), batch))[0]

  def step(state: TrainState, batch):
    rng = jax.random.fold_in(root, state.step)
    grads, pairs = (whole if microbatches == 1 else accumulated)(state.params, batch, rng)
    weight = jnp.maximum(pairs['loss'][1], 1e-9)
    grads = jax.tree.map(lambda g: g / weight, grads)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = jax.tree.map(jnp.add, state.params, updates)
    ema = state.ema_params
    if ema is not None:
      ema = optimizer.update_ema(ema, params, state.step + 1, cfg.optimizer.ema_decay)
    pairs |= packing_metrics(batch, cfg.data.batch_size)
    pairs |= {'gradient_norm': (global_norm(grads), 1.0), 'update_norm': (global_norm(updates), 1.0)}
    pairs |= {'learning_rate': (schedule(state.step), 1.0)}
    return TrainState(state.step + 1, params, opt_state, ema), pairs

  return step


def global_norm(tree):
  """Return the Euclidean norm of all values in a tree of arrays, such as gradients."""
  return jnp.sqrt(sum(jnp.square(x).sum() for x in jax.tree.leaves(tree)))  # jnp.vdot would gather sharded arrays


def packing_metrics(batch, batch_size: int) -> dict:
  """Return metrics of a packed batch of `batch_size` examples: tokens, share of used positions, skipped examples."""
  kept = (batch['segment_BxL'] > 0).sum().astype(jnp.float32)
  placed = (batch['example_id_BxS'] >= 0).sum()
  return {
    'kept_tokens': (kept, 1.0),
    'original_tokens': (batch['length_BxS'].sum().astype(jnp.float32), 1.0),
    'packing_efficiency': (kept, float(batch['segment_BxL'].size)),
    'left_out_examples': (jnp.float32(batch_size) - placed, 1.0),
  }


def compile_step(exp: Experiment, tx, schedule, abstract: TrainState):
  """Return the jitted training step on the experiment's mesh; its output reuses the memory of the input state."""
  shardings = jax.tree.map(lambda x: x.sharding, abstract)
  return jax.jit(
    sharding.with_mesh(exp.mesh)(make_step(exp, tx, schedule)),
    in_shardings=(shardings, sharding.rows_sharding(exp.mesh)),
    out_shardings=(shardings, sharding.replicated(exp.mesh)),
    donate_argnums=0,
  )
