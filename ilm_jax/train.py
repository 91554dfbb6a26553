"""Training: one loop for every family and task, resumable to the bit from its last checkpoint."""

import contextlib
import signal
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath
from ml_collections import ConfigDict

from ilm_jax import checkpoint, dashboards, evaluate, families, model, optimizer, sharding, tasks
from ilm_jax import metrics as metrics_lib
from ilm_jax.tasks import pipeline
from ilm_jax.types import UserError

FINISHED, FAILED, PREEMPTED, INTERRUPTED = 0, 1, 75, 130  # exit codes


class TrainState(NamedTuple):
  """All that a run has to remember."""

  step: Any  # number of updates made
  params: Any
  opt_state: Any
  ema_params: Any  # None without a moving average


class Experiment(NamedTuple):
  """What a config names, built: the parts that training and evaluation share."""

  cfg: ConfigDict
  family: Any
  task: Any
  model_cfg: model.ModelConfig
  sample_cfg: Any
  loss_cfg: ConfigDict
  mesh: jax.sharding.Mesh


LEAST = {  # the smallest value of settings that have one
  'seed': 0, 'steps': 1, 'keep': 1, 'log_every': 0, 'checkpoint_every': 0, 'report_seconds': 0,
  'task.seed': 0, 'task.num_train': 0, 'task.num_validation': 1, 'task.num_test': 1,
  'loss.vocab_chunk': 1, 'loss.stop_weight': 0,
  'data.batch_size': 1, 'data.groups': 1, 'data.rows': 1, 'data.row_length': 2, 'data.targets': 0,
  'data.segments': 1, 'data.workers': 0, 'data.prefetch': 1,
  'optimizer.warmup_steps': 0, 'optimizer.accumulate': 1, 'optimizer.clip': 0, 'optimizer.ema_decay': 0,
  'sampling.max_length': 3, 'sampling.max_steps': 0, 'eval.every': 0, 'eval.batch_size': 1, 'eval.show': 0,
}  # fmt: skip


def check_ranges(cfg) -> None:
  """Refuse numbers that can't be meant, before anything is computed or written."""
  values = flatten(as_json(cfg))
  for name, least in LEAST.items():
    if values.get(name) is not None and values[name] < least:
      raise UserError(f'{name}={values[name]}: expected at least {least}')
  which = str(cfg.eval.checkpoint)
  if which not in ('best', 'latest') and not which.isdigit():
    raise UserError(f"eval.checkpoint={which!r}: expected 'best', 'latest' or a step")


def build(cfg) -> Experiment:
  """Build what the config names; refuses what doesn't fit together, before anything is computed or written."""
  check_ranges(cfg)
  if cfg.eval.mode not in ('max', 'min'):
    raise UserError(f'eval.mode={cfg.eval.mode!r}: expected max or min')
  optimizer.make_schedule(cfg.optimizer, cfg.steps)
  family, task = families.get(cfg.family), tasks.get(cfg.task.name)
  tokenizer = task.tokenizer(cfg.task)
  task.source(cfg.task, 'test')
  settings = {**cfg.model.to_dict(), **family.model_settings(cfg)}
  model_cfg = model.ModelConfig.create(tokenizer.vocab_size, **settings)
  mesh = sharding.make_mesh(cfg.mesh)
  shape = pipeline.shape_of(cfg.data)
  pipeline.my_groups(cfg.data.groups, jax.process_index(), jax.process_count())
  sharding.check_rows(cfg.data.rows, mesh, 'data.rows')
  sharding.check_rows(cfg.eval.batch_size, mesh, 'eval.batch_size')
  if cfg.data.rows % cfg.optimizer.accumulate:
    fits = pipeline.nearest(cfg.data.rows, cfg.optimizer.accumulate)
    raise UserError(f'data.rows={cfg.data.rows} does not divide into optimizer.accumulate={cfg.optimizer.accumulate} '
                    f'parts: use data.rows={fits}')  # fmt: skip
  sharding.check_rows(cfg.data.rows // cfg.optimizer.accumulate, mesh, 'data.rows / optimizer.accumulate')
  if shape.length < task.longest(cfg.task):
    raise UserError(
      f'data.row_length={shape.length} is shorter than the longest example, {task.longest(cfg.task)} tokens: raise it'
    )
  sample_cfg = family.SampleConfig.create(
    cfg.sampling, closed_tokens=tokenizer.special_ids, compute=model_cfg.compute, vocab_chunk=cfg.loss.vocab_chunk
  )
  loss_cfg = ConfigDict({**cfg.loss.to_dict(), 'compute': model_cfg.compute})
  return Experiment(cfg, family, task, model_cfg, sample_cfg, loss_cfg, mesh)


# --- the step ---------------------------------------------------------------------------------------------------------


def init_state(exp: Experiment, tx) -> tuple[TrainState, TrainState]:
  """Make a fresh state on the mesh; returns (state, its shapes and shardings)."""

  def create():
    params = model.init(exp.model_cfg, jax.random.fold_in(jax.random.key(exp.cfg.seed), 0x494E4954))
    ema = jax.tree.map(jnp.copy, params) if exp.cfg.optimizer.ema_decay else None
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), ema)

  shardings = sharding.state_shardings(jax.eval_shape(create), exp.mesh)
  state = jax.jit(lambda: model.unbox(create()), out_shardings=shardings)()
  abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
  return state, abstract


def make_step(exp: Experiment, tx, schedule):
  """The pure function (state, batch) -> (state, metrics) of one update.

  The gradient is that of the *total* loss, divided once by the total weight: with gradient accumulation, totals and
  weights of the parts are summed first, so the update equals that of the whole batch.
  """
  cfg, parts = exp.cfg, exp.cfg.optimizer.accumulate
  root = jax.random.fold_in(jax.random.key(cfg.seed), 0x44524F50)
  drops = exp.model_cfg.dropout > 0 or exp.model_cfg.attention_dropout > 0

  def total_loss(params, batch, rng):
    outputs = model.apply(
      exp.model_cfg, params, batch['tokens_BxL'], batch['position_BxL'], batch['segment_BxL'], batch['cls_BxS'], rng=rng
    )
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
  dropped = (batch['target_segment_BxT'] > 0).sum()
  placed = (batch['example_id_BxS'] >= 0).sum()
  return {
    'kept_tokens': (kept, 1.0),
    'original_tokens': (kept + dropped, 1.0),
    'packing_efficiency': (kept, float(batch['segment_BxL'].size)),
    'left_out_examples': (jnp.float32(batch_size) - placed, 1.0),
  }


def compile_step(exp: Experiment, tx, schedule, abstract: TrainState):
  """Jit the step, with the state donated and everything placed on the mesh."""
  shardings = jax.tree.map(lambda x: x.sharding, abstract)
  return jax.jit(
    make_step(exp, tx, schedule),
    in_shardings=(shardings, sharding.rows_sharding(exp.mesh)),
    out_shardings=(shardings, sharding.replicated(exp.mesh)),
    donate_argnums=0,
  )


# --- signals ----------------------------------------------------------------------------------------------------------


class Signals:
  """Remembers SIGTERM and Ctrl-C until the loop asks; a second Ctrl-C interrupts at once."""

  def __init__(self):
    self.code = None
    self._old = {}

  def __enter__(self):
    for number in (signal.SIGTERM, signal.SIGINT):
      self._old[number] = signal.signal(number, self._receive)
    return self

  def __exit__(self, *_):
    for number, handler in self._old.items():
      signal.signal(number, handler)

  def _receive(self, number, _):
    if number == signal.SIGINT and self.code == INTERRUPTED:
      raise KeyboardInterrupt
    self.code = PREEMPTED if number == signal.SIGTERM else INTERRUPTED
    logging.info('%s: saving, then leaving', signal.Signals(number).name)

  def received(self) -> bool:
    return self.code is not None


# --- the workdir ------------------------------------------------------------------------------------------------------


IDENTITY = ('family', 'task', 'model', 'seed')  # what makes a run another run ...
FREE = ('task.num_validation', 'task.num_test', 'task.workers', 'task.cache')  # ... but these


def claim(workdir, cfg) -> None:
  """Make the workdir, or refuse it: it can't be written, or another run lives there. Nothing is overwritten."""
  path = epath.Path(workdir)
  try:
    path.mkdir(parents=True, exist_ok=True)
    probe = path / '.writable'
    probe.write_text('')
    probe.unlink()
  except OSError as error:
    reason = error.strerror or error
    raise UserError(f'the workdir {workdir} cannot be written ({reason}): give another --workdir') from error
  if dashboards.read_run(workdir) is None and any(path.glob('checkpoints/*')):
    raise UserError(f'{workdir} holds checkpoints but no run.json that says whose they are: give another --workdir')
  same_run(workdir, cfg)


@contextlib.contextmanager
def writing(workdir):
  """Say in one line that a file of the run could not be written."""
  try:
    yield
  except OSError as error:
    raise UserError(
      f'{workdir} could not be written ({error.strerror or error}): make room and start the same command again'
    ) from error


def same_run(workdir, cfg) -> None:
  """Refuse a workdir in which a run of another family, task, model or seed lives; warn of other changes."""
  run = dashboards.read_run(workdir)
  if run is None:
    return
  old, new = flatten(run['config']), flatten(as_json(cfg))
  changed = [key for key in sorted((old.keys() | new.keys()) - set(FREE)) if old.get(key) != new.get(key)]
  for part in IDENTITY:
    for key in changed:
      if key.split('.')[0] == part:
        raise UserError(
          f'{workdir} holds a run with {key}={old.get(key)}, this one has {key}={new.get(key)}: '
          'give another --workdir (nothing was overwritten)'
        )
  average = 'optimizer.ema_decay'
  if average in changed and not (old.get(average) and new.get(average)):
    raise UserError(
      f'{workdir} holds a run with {average}={old.get(average)}, this one has {new.get(average)}: a moving average '
      'cannot come or go within a run; give another --workdir'
    )
  for key in changed:
    logging.warning('this start changes %s from %s to %s', key, old.get(key), new.get(key))


def as_json(cfg) -> dict:
  """A config as a plain dict that JSON can hold."""
  return {
    key: as_json(value) if isinstance(value, ConfigDict) else list(value) if isinstance(value, tuple) else value
    for key, value in ((key, cfg[key]) for key in cfg)
  }


def flatten(tree: dict, prefix: str = '') -> dict:
  """Nested dicts as one, with dotted names."""
  out = {}
  for key, value in tree.items():
    out |= flatten(value, f'{prefix}{key}.') if isinstance(value, dict) else {prefix + key: value}
  return out


# --- the loop ---------------------------------------------------------------------------------------------------------


def train(cfg, workdir) -> int:
  """Train until the last step, the goal (`cfg.stop_at`), or a signal; then, when finished, evaluate the best weights.

  Args:
    cfg: the config.
    workdir: of the run: its state is read from there if there is one, and everything is written there.

  Returns:
    the exit code.
  """
  exp = build(cfg)
  if cfg.init_from and not any(epath.Path(workdir).glob('checkpoints/*')):
    checkpoint.Checkpoints(cfg.init_from, read_only=True).find('latest')  # there before anything is written?
  claim(workdir, cfg)
  tx, schedule = optimizer.make_optimizer(cfg.optimizer, cfg.steps)
  state, abstract = init_state(exp, tx)
  count = sum(x.size for x in jax.tree.leaves(state.params))
  logging.info('%s on %s: %s parameters, mesh %s', cfg.family, cfg.task.name, f'{count:,}', dict(exp.mesh.shape))

  saved = checkpoint.Checkpoints(workdir, keep=cfg.keep, metric=cfg.eval.metric, mode=cfg.eval.mode)
  restored = saved.restore_latest(abstract)
  if restored is not None:
    state = restored._replace(step=jax.device_put(restored.step, abstract.step.sharding))
    logging.info('resuming at step %d of %s', restored.step, workdir)
  elif cfg.init_from:
    state = start_from(cfg.init_from, state, abstract)
  start = int(state.step)

  run = dashboards.read_run(workdir) or {'starts': []}
  starts = [*run['starts'], dashboards.describe_start(start)]
  with writing(workdir):
    dashboards.forget_after(workdir, start, validated=start in saved.steps() and saved.metrics(start) is not None)
    dashboards.write_json(epath.Path(workdir) / 'run.json', {'config': as_json(cfg), 'starts': starts})
    writer = dashboards.make_writer(workdir)
  evaluator = evaluate.Evaluator(cfg, **{k: v for k, v in exp._asdict().items() if k != 'cfg'})
  with Signals() as signals:
    loop = Loop(exp, workdir, saved, writer, evaluator, signals, compile_step(exp, tx, schedule, abstract))
    try:
      code = loop.run(state, start)
      writer.flush()
    except Exception as error:
      with contextlib.suppress(Exception):  # the error is the news
        writer.flush()
      if 'AsyncError' in type(error).__name__:
        raise UserError(
          f'the event files in {workdir} could not be written ({error.__cause__ or error}): {saved.last_complete()}; '
          'make room and start the same command again'
        ) from error
      raise
    if code == FINISHED:
      code = report(exp, workdir, saved, abstract, evaluator, signals)
  saved.close()
  writer.close()
  return code


def start_from(other, state: TrainState, abstract: TrainState) -> TrainState:
  """Take the (averaged) weights of another run; step, optimizer and average start anew."""
  source = checkpoint.Checkpoints(other, read_only=True)
  step = source.find('latest')
  params = source.restore_weights(step, abstract.params)
  logging.info('starting from the weights of step %d of %s', step, other)
  ema = None if state.ema_params is None else jax.tree.map(jnp.copy, params)
  return state._replace(params=params, ema_params=ema)


class Loop:
  """The training loop; its methods are what happens at a step, its attributes what they share."""

  def __init__(self, exp, workdir, saved, writer, evaluator, signals, step_fn):
    self.exp, self.cfg, self.workdir = exp, exp.cfg, workdir
    self.saved, self.writer, self.evaluator, self.signals = saved, writer, evaluator, signals
    self.step_fn = step_fn
    self.progress = dashboards.make_progress(writer, self.cfg.steps, self.cfg.report_seconds)
    self.sums, self.waited, self.since = {}, 0.0, time.monotonic()
    self.pending = None  # metrics of the last dispatched step, not looked at yet

  def run(self, state: TrainState, start: int) -> int:
    """Run steps start, ..., cfg.steps - 1; returns the exit code."""
    cfg = self.cfg
    if start == 0:
      self.writer.write_hparams(flatten(as_json(cfg)))
    metrics = self.saved.metrics(start) if start in self.saved.steps() else None
    if start and metrics is None and (start == cfg.steps or self.due(cfg.eval.every, start)):  # stopped before it
      metrics = self.evaluate(state, start)
      self.save(state, start, metrics)
    if self.reached(metrics) or start >= cfg.steps or self.signals.received():
      return self.leave(start)
    self.progress(start)
    batches = pipeline.train_batches(
      self.exp.task.source(cfg.task, 'train'), self.exp.family.corrupt, cfg,
      start=start, stop=cfg.steps, host=jax.process_index(), hosts=jax.process_count(),
    )  # fmt: skip
    try:
      for step in range(start + 1, cfg.steps + 1):
        before = time.monotonic()
        batch = sharding.put_batch(next(batches), self.exp.mesh)
        self.waited += time.monotonic() - before
        state, pairs = self.step_fn(state, batch)
        self.look(step - 1)
        self.pending = pairs
        self.saved.check()
        last = step == cfg.steps
        if last or self.due(cfg.log_every, step):
          self.look(step)
          self.log(step)
        self.progress(step)
        metrics = None
        if last or self.due(cfg.eval.every, step):
          self.look(step)
          metrics = self.evaluate(state, step)
        stop = last or self.reached(metrics) or self.signals.received()
        if metrics or stop or self.due(cfg.checkpoint_every, step):
          self.look(step)
          self.save(state, step, metrics)
        if stop:
          return self.leave(step)
    finally:
      close = getattr(batches, 'close', None)
      if close:
        close()
    raise AssertionError('unreachable')

  def due(self, every: int, step: int) -> bool:
    """Is it time for what happens every so many steps (0: never)?"""
    return bool(every) and step % every == 0

  def leave(self, step: int) -> int:
    """Wait for the disk; say how it ended."""
    self.saved.wait()
    if self.signals.received():
      logging.info('saved at step %d; the same command continues from there', step)
      return self.signals.code
    return FINISHED

  def reached(self, metrics: dict | None) -> bool:
    """Is the goal of the run reached on validation?"""
    goal, value = self.cfg.stop_at, (metrics or {}).get(self.cfg.eval.metric)
    if goal is None or value is None:
      return False
    return value >= goal if self.cfg.eval.mode == 'max' else value <= goal

  def look(self, step: int) -> None:
    """Fetch the metrics of a step (the one after it is already running) and stop the run if they are not finite."""
    if self.pending is None:
      return
    pairs, self.pending = jax.device_get(self.pending), None
    self.sums = metrics_lib.add(self.sums, pairs)
    loss = pairs['loss'][0] / max(pairs['loss'][1], 1e-9)
    norms = pairs['gradient_norm'][0], pairs['update_norm'][0]
    if not np.isfinite([loss, *norms]).all():
      raise UserError(
        f'step {step}: the loss is {loss}, the norm of the gradient {norms[0]}, of the update {norms[1]}: '
        f'{self.saved.last_complete()} (in {self.saved.folder}); lower optimizer.learning_rate or optimizer.clip and '
        'start from there'
      )

  def log(self, step: int) -> None:
    """Write the means since the last time, and the rates."""
    now = time.monotonic()
    seconds = max(now - self.since, 1e-9)
    values = metrics_lib.means(self.sums)
    for name in ('kept_tokens', 'original_tokens'):
      values[f'{name}_per_second'] = float(self.sums[name][0]) / seconds
      del values[name]
    values['input_wait'] = self.waited / seconds
    values['left_out_examples'] = float(self.sums['left_out_examples'][0])
    values['epoch'] = step * self.cfg.data.batch_size / len(self.evaluator.source('train'))
    self.writer.write_scalars(step, {f'train/{name}': value for name, value in values.items()})
    logging.info(
      'step %d  loss %.4f (tokens %.4f, stop %.4f)  %s kept tokens/s  %.0f %% waiting for input', step, values['loss'],
      values.get('token_loss', values['loss']), values.get('stop_loss', 0.0),
      f'{values["kept_tokens_per_second"]:,.0f}', 100 * values['input_wait'],
    )  # fmt: skip
    self.sums, self.waited, self.since = {}, 0.0, now

  def evaluate(self, state: TrainState, step: int) -> dict | None:
    """Validate the averaged weights; returns means, or None when a signal cut it short."""
    began = time.monotonic()
    params = state.params if state.ema_params is None else state.ema_params
    scores = self.evaluator.answers(params, 'validation', progress=True, interrupted=self.signals.received)
    if scores is None:
      return None
    values = metrics_lib.means({**self.evaluator.validation_loss(params), **scores.pairs})
    goal = self.cfg.eval.metric
    if goal not in values:
      raise UserError(f'eval.metric={goal!r} is not measured: expected one of {", ".join(sorted(values))}')
    self.writer.write_scalars(step, {f'validation/{name}': value for name, value in values.items()})
    logging.info('step %d  validation loss %.4f  %s %.4f', step, values['loss'], goal, values[goal])
    self.writer.write_texts(step, {'samples': '\n\n'.join(f'```\n{text}\n```' for text in scores.texts)})
    self.since += time.monotonic() - began  # rates are of training alone
    return values

  def save(self, state: TrainState, step: int, metrics: dict | None) -> None:
    """Start saving; the arrays are copied before the next step may reuse them."""
    began = time.monotonic()
    self.writer.flush()  # what the event files hold goes at least as far as the checkpoint
    self.saved.save(step, state, metrics)
    self.since += time.monotonic() - began


# --- the end ----------------------------------------------------------------------------------------------------------


def report(exp: Experiment, workdir, saved, abstract: TrainState, evaluator, signals) -> int:
  """Evaluate the chosen weights on the test split, print the result with a few answers, and write eval.json."""
  step = saved.find(exp.cfg.eval.checkpoint)
  began = time.monotonic()
  params = saved.restore_weights(step, abstract.params)
  scores = evaluator.answers(params, 'test', progress=True, interrupted=signals.received)
  if scores is None:
    return signals.code
  values = metrics_lib.means({**evaluator.validation_loss(params, 'test'), **scores.pairs})
  result = {
    'split': 'test',
    'step': step,
    'seed': exp.cfg.seed,
    'metrics': values,
    'pairs': {name: [float(x) for x in pair] for name, pair in scores.pairs.items()},
    'seconds': time.monotonic() - began,
    'start': dashboards.describe_start(step),
  }
  with writing(workdir):
    dashboards.write_json(epath.Path(workdir) / 'eval.json', result)
  print('\nA few test answers, with the token that came in at each step in brackets:\n')
  print('\n\n'.join(scores.texts))
  total, weight = scores.pairs['exact_match']
  print(f'\ntest exact match at step {step}: {metrics_lib.percent(total, weight)}')
  print(f'run: {workdir} (metrics: tensorboard --logdir={workdir}; result: {workdir}/eval.json)', flush=True)
  return FINISHED


def evaluate_run(cfg, workdir) -> int:
  """Evaluate a finished or running run on the test split (`--mode=eval`)."""
  exp = build(cfg)
  same_run(workdir, cfg)
  saved = checkpoint.Checkpoints(workdir, metric=cfg.eval.metric, mode=cfg.eval.mode, read_only=True)
  saved.find(cfg.eval.checkpoint)
  tx, _ = optimizer.make_optimizer(cfg.optimizer, cfg.steps)
  _, abstract = init_state(exp, tx)
  evaluator = evaluate.Evaluator(cfg, **{k: v for k, v in exp._asdict().items() if k != 'cfg'})
  with Signals() as signals:
    return report(exp, workdir, saved, abstract, evaluator, signals)
