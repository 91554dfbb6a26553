"""The training loop of all families and tasks, resumable bitwise from the last checkpoint; and evaluation of a run."""

import contextlib
import time

import jax
import numpy as np
from absl import logging
from etils import epath

from ilm_jax import metrics as metrics_lib
from ilm_jax import paths
from ilm_jax.data import pipeline
from ilm_jax.distributed import processes, sharding
from ilm_jax.evaluation import evaluate
from ilm_jax.models import transformer
from ilm_jax.runs import checkpoint, logs, run_file
from ilm_jax.runs.run_file import as_json, flatten
from ilm_jax.runs.workdir import check_same_run, claim, explain_write_errors
from ilm_jax.training import optimizer, warm_start
from ilm_jax.training.checks import check_memory
from ilm_jax.training.experiment import Experiment, build
from ilm_jax.training.final_evaluation import reached_goal, report
from ilm_jax.training.signals import FINISHED, Signals
from ilm_jax.training.train_step import TrainState, compile_step, init_state
from ilm_jax.types import UserError


def train(cfg, workdir) -> int:
  """Train until the last step, the goal `cfg.stop_at` or a signal; then evaluate a finished run on the test split.

  Training resumes from the latest checkpoint in the workdir, if any. Return the exit code of the process (see
  `training.signals`); UserError if the config or the workdir is invalid, or the loss becomes infinite or NaN.
  """
  with jax.enable_x64(False), explain_out_of_memory(), Signals() as signals:
    exp, workdir = build_on_all(cfg, workdir, 'train')
    if cfg.init_from and not paths.matching(workdir / 'checkpoints', '*'):
      # Reading the weights already here makes a wrong `init_from` fail before the workdir is created.
      warm_start.load_weights(cfg, transformer.abstract_params(exp.model_cfg, exp.mesh))
    evaluator = make_evaluator(exp)
    with claim(workdir, cfg):
      with processes.raise_on_all():
        for split in ('train', 'validation', 'test'):
          evaluator.source(split)
      return _train(exp, workdir, signals, evaluator)


def evaluate_run(cfg, workdir) -> int:
  """Evaluate a checkpoint of a run (`cfg.eval.checkpoint`) on the test split; return the exit code."""
  with jax.enable_x64(False), explain_out_of_memory():
    exp, workdir = build_on_all(cfg, workdir, 'eval')
    with processes.raise_on_all():
      check_same_run(workdir, cfg)
    saved = checkpoint.Checkpoints(workdir, metric=cfg.eval.metric, mode=cfg.eval.mode, read_only=True)
    with processes.raise_on_all():
      step = saved.find(cfg.eval.checkpoint)
    agree_on_checkpoints(step)
    evaluator = make_evaluator(exp)
    abstract_params = transformer.abstract_params(exp.model_cfg, exp.mesh)
    with Signals(saving=False) as signals:
      return report(exp, workdir, saved, step, abstract_params, evaluator, signals)


def build_on_all(cfg, workdir, mode: str) -> tuple[Experiment, epath.Path]:
  """Return (experiment, path of the workdir), built and checked in every process.

  UserError if the processes differ in their code, config or mode, or do not share the workdir.
  """
  with processes.raise_on_all():
    workdir = paths.resolve(workdir, '--workdir')
    checkpoint.folder_of(workdir)
    exp = build(cfg, workdir)
    check_memory(exp, training=mode == 'train')
  processes.agree({**run_file.code(), 'mode': mode, 'workdir': str(workdir), **flatten(as_json(cfg))})
  processes.check_shared(workdir)
  return exp, workdir


@contextlib.contextmanager
def explain_out_of_memory():
  """Context manager: convert out-of-memory errors of the device or the host to a UserError."""
  try:
    yield
  except (MemoryError, jax.errors.JaxRuntimeError) as error:
    if isinstance(error, MemoryError) or 'RESOURCE_EXHAUSTED' in str(error):
      raise UserError(
        f'out of memory ({checkpoint.reason(error)}): lower data.rows, raise optimizer.accumulation_steps or '
        'mesh.fsdp, set model.remat=True, or choose a smaller model'
      ) from error
    raise


def agree_on_checkpoints(found) -> None:
  """Raise PeerLost if the processes see different checkpoints, which a slow network file system can cause."""
  advice = 'not all processes see the same workdir yet: start all of them again'
  processes.agree({'checkpoints': found}, processes.PeerLost, advice)


def make_evaluator(exp: Experiment) -> evaluate.Evaluator:
  """Return the evaluator that computes losses and samples answers for an experiment."""
  return evaluate.Evaluator(**exp._asdict())


def _train(exp: Experiment, workdir, signals: Signals, evaluator: evaluate.Evaluator) -> int:
  """Restore or create the training state, train and, if the run is finished, evaluate it; return the exit code."""
  cfg = exp.cfg
  tx, schedule = optimizer.make_optimizer(cfg.optimizer, cfg.steps)
  state, abstract = init_state(exp, tx)
  log_sizes(exp, state)
  saved = checkpoint.Checkpoints(workdir, keep=cfg.keep, metric=cfg.eval.metric, mode=cfg.eval.mode)
  agree_on_checkpoints({str(step): saved.metrics(step) is not None for step in saved.steps()})
  restored = saved.restore_latest(abstract)
  if restored is not None:
    state = restored._replace(step=jax.device_put(restored.step, abstract.step.sharding))
    logging.info('resuming at step %d of %s', restored.step, workdir)
  elif cfg.init_from:
    state = warm_start.warm_start(cfg, state, abstract)
  start = int(state.step)
  run = run_file.read_run(workdir) or {'starts': []}
  starts = [*run['starts'], run_file.describe_start(start)]
  with processes.raise_on_all(), explain_write_errors(f'{workdir} could not be written'):
    if processes.is_first():
      exp.task.save_assets(cfg.task, workdir)
      logs.forget_after(workdir, start, validated=start in saved.steps() and saved.metrics(start) is not None)
      run_file.write_json(epath.Path(workdir) / 'run.json', {'config': as_json(cfg), 'starts': starts})
    writer = logs.make_writer(workdir, silent=not processes.is_first())
  signals.begun = True
  loop = Loop(exp, saved, writer, evaluator, signals, compile_step(exp, tx, schedule, abstract))
  try:
    code = loop.run(state, start)
    writer.flush()
  except Exception as error:
    with contextlib.suppress(Exception):  # report the original error, not a second one
      writer.flush()
    if 'AsyncError' in type(error).__name__:
      raise UserError(
        f'the event files in {workdir} could not be written ({error.__cause__ or error}): {saved.last_complete()}; '
        'free disk space and run the same command again'
      ) from error
    raise
  if code == FINISHED:
    code = report(exp, workdir, saved, saved.find(cfg.eval.checkpoint), abstract.params, evaluator, signals)
  saved.close()
  writer.close()
  return code


def log_sizes(exp: Experiment, state: TrainState) -> None:
  """Log the model size and the placement of the training state on devices; warn if sampling.max_length is too small."""
  cfg = exp.cfg
  parameters = sum(x.size for x in jax.tree.leaves(state.params))
  bytes_per_device = sum(map(sharding.bytes_per_device, jax.tree.leaves(state)))
  logging.info('%s on %s: %s parameters, mesh %s, training state of %.1f MB per device', cfg.family, cfg.task.name,
               f'{parameters:,}', dict(exp.mesh.shape), bytes_per_device / 1e6)  # fmt: skip
  for line in sharding.describe_placement(state) if exp.mesh.size > 1 else ():
    logging.info('%s', line)
  if cfg.sampling.max_length < (longest := exp.task.longest(cfg.task)):
    logging.warning('sampling.max_length=%d is less than the longest example, %d tokens: its answer cannot be sampled',
                    cfg.sampling.max_length, longest)  # fmt: skip


class Loop:
  """The training loop: steps, metrics, validation, checkpoints.

  The metrics of a step are fetched only after the next step is dispatched, so that the device never waits for the host.
  """

  def __init__(self, exp: Experiment, saved: checkpoint.Checkpoints, writer, evaluator, signals: Signals, step_fn):
    """Prepare the loop; `step_fn` is the compiled training step, (state, batch) -> (state, metrics)."""
    self.exp, self.cfg, self.saved, self.writer = exp, exp.cfg, saved, writer
    self.evaluator, self.signals, self.step_fn = evaluator, signals, step_fn
    self.progress = logs.make_progress(writer, self.cfg.steps, self.cfg.report_seconds)
    self.pending = None  # metrics of the last dispatched step, not yet fetched from the device
    self.sums = {}  # sums of the metrics since the last log line
    self.input_wait = 0.0  # seconds spent waiting for batches since the last log line
    self.clock_start = time.monotonic()  # start of the interval over which rates such as tokens per second are computed

  def run(self, state: TrainState, start: int) -> int:
    """Run training steps `start` + 1 to `cfg.steps`; return the exit code."""
    cfg = self.cfg
    if start == 0:
      self.writer.write_hparams(flatten(as_json(cfg)))
    metrics = self.saved.metrics(start) if start in self.saved.steps() else None
    # If the run was stopped during the validation at this step, that validation is repeated now.
    if start and metrics is None and (start == cfg.steps or is_due(cfg.eval.every, start)):
      metrics = self.evaluate(state, start)
      self.save(state, start, metrics)
    if reached_goal(cfg, metrics) or start >= cfg.steps or self.signals.received():
      return self.leave(start)
    self.progress(start)
    source, part = self.evaluator.source('train'), sharding.process_shard(self.exp.mesh)
    batches = pipeline.train_batches(source, self.exp.family.corrupt, cfg, start=start, stop=cfg.steps, part=part)
    try:
      for step in range(start + 1, cfg.steps + 1):
        before = time.monotonic()
        batch = sharding.put_process_batch(next(batches), self.exp.mesh)
        self.input_wait += time.monotonic() - before
        state, pairs = self.step_fn(state, batch)
        self.fetch_pending(step - 1)
        self.pending = pairs
        self.saved.check()
        last = step == cfg.steps
        if last or is_due(cfg.log_every, step):
          self.fetch_pending(step)
          self.log(step)
        self.progress(step)
        metrics = None
        if last or is_due(cfg.eval.every, step):
          self.fetch_pending(step)
          if jax.process_count() > 1:
            self.save(state, step, None)  # with several processes, an evaluation cannot be interrupted, so save first
          metrics = self.evaluate(state, step)
        stop = self.signals.agree_to_stop(step) or last or reached_goal(cfg, metrics)
        if metrics or stop or is_due(cfg.checkpoint_every, step):
          self.fetch_pending(step)
          self.save(state, step, metrics)
        if stop:
          return self.leave(step)
    finally:
      if hasattr(batches, 'close'):
        batches.close()
    raise AssertionError('unreachable')

  def leave(self, step: int) -> int:
    """Wait until all checkpoints are on disk; return the exit code of the run."""
    self.saved.wait()
    if self.signals.received():
      done = f'saved at step {step}' if step in self.saved.steps() else 'stopped before the first step'
      logging.info('%s; run the same command again to continue training', done)
      return self.signals.code
    return FINISHED

  def fetch_pending(self, step: int) -> None:
    """Fetch the metrics of `step` from the device and add them to the sums; raise UserError if they are not finite."""
    if self.pending is None:
      return
    pairs, self.pending = jax.device_get(self.pending), None
    self.sums = metrics_lib.add(self.sums, pairs)
    loss = pairs['loss'][0] / max(pairs['loss'][1], 1e-9)
    norms = pairs['gradient_norm'][0], pairs['update_norm'][0]
    if not np.isfinite([loss, *norms]).all():
      raise processes.raised_by_all(UserError(
        f'step {step}: the loss is {loss}, the gradient norm is {norms[0]}, the norm of the update {norms[1]}: '
        f'{self.saved.last_complete()} (in {self.saved.folder}); lower optimizer.learning_rate or optimizer.clip and '
        'run the command again'
      ))  # fmt: skip

  def log(self, step: int) -> None:
    """Write the mean metrics and the rates since the last call, both to the event files and to the console."""
    now = time.monotonic()
    seconds = max(now - self.clock_start, 1e-9)
    values = metrics_lib.means(self.sums)
    for name in ('kept_tokens', 'original_tokens'):
      values[f'{name}_per_second'] = float(self.sums[name][0]) / seconds
      del values[name]
    values['input_wait'] = self.input_wait / seconds
    values['left_out_examples'] = float(self.sums['left_out_examples'][0])
    values['epoch'] = step * self.cfg.data.batch_size / len(self.evaluator.source('train'))
    self.writer.write_scalars(step, {f'train/{name}': value for name, value in values.items()})
    loss, rate = values['loss'], f'{values["kept_tokens_per_second"]:,.0f}'
    token_loss, stop_loss = values.get('token_loss', loss), values.get('stop_loss', 0.0)
    logging.info('step %d  loss %.4f (tokens %.4f, stop %.4f)  %s input tokens/s  %.0f %% waiting for data',
                 step, loss, token_loss, stop_loss, rate, 100 * values['input_wait'])  # fmt: skip
    self.sums, self.input_wait, self.clock_start = {}, 0.0, now

  def evaluate(self, state: TrainState, step: int) -> dict | None:
    """Evaluate on the validation split, with averaged weights if any; return {metric: mean}, or None after a signal."""
    began = time.monotonic()
    params = state.params if state.ema_params is None else state.ema_params
    scores = self.evaluator.sample_answers(params, 'validation', progress=True, interrupted=self.signals.received)
    if scores is None:
      return None
    values = metrics_lib.means({**self.evaluator.validation_loss(params), **scores.pairs})
    metric = self.cfg.eval.metric
    if metric not in values:
      message = f'eval.metric={metric!r} is not measured: expected one of {", ".join(sorted(values))}'
      raise processes.raised_by_all(UserError(message))
    self.writer.write_scalars(step, {f'validation/{name}': value for name, value in values.items()})
    logging.info('step %d  validation loss %.4f%s', step, values['loss'],
                 '' if metric == 'loss' else f'  {metric} {values[metric]:.4f}')  # fmt: skip
    self.writer.write_texts(step, {'samples': '\n\n'.join(f'```\n{text}\n```' for text in scores.texts)})
    self.clock_start += time.monotonic() - began  # rates such as tokens per second exclude the time of evaluations
    return values

  def save(self, state: TrainState, step: int, metrics: dict | None) -> None:
    """Start saving a checkpoint. Arrays are copied before this returns, because the next step reuses their memory."""
    began = time.monotonic()
    self.writer.flush()  # the event files must contain all events up to the step of the checkpoint
    self.saved.save(step, state, metrics)
    self.clock_start += time.monotonic() - began


def is_due(every: int, step: int) -> bool:
  """Return whether `step` is a multiple of `every`; always False if `every` is 0."""
  return bool(every) and step % every == 0
