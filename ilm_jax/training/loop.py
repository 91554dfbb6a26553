"""Training: one loop for every family and task, resumable to the bit from its last checkpoint."""

import contextlib
import os
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath

from ilm_jax import metrics as metrics_lib
from ilm_jax.data import pipeline
from ilm_jax.distributed import processes, sharding
from ilm_jax.evaluation import evaluate, scoring_models, text_statistics
from ilm_jax.families import settings
from ilm_jax.models import transformer
from ilm_jax.runs import checkpoint, logs, run_file
from ilm_jax.runs.run_file import as_json, flatten
from ilm_jax.runs.workdir import claim, same_run, writing
from ilm_jax.training import optimizer
from ilm_jax.training.experiment import Experiment, build
from ilm_jax.training.train_step import TrainState, abstract_state, compile_step, init_state
from ilm_jax.types import UserError

FINISHED, FAILED, PREEMPTED, INTERRUPTED = 0, 1, 75, 130  # exit codes


# --- signals ----------------------------------------------------------------------------------------------------------


class Signals:
  """Remembers SIGTERM and Ctrl-C until the loop asks; a second Ctrl-C interrupts at once.

  Before the loop has begun (`begun`), while data is prepared, a signal ends the process at once: there is nothing new
  to save. On several hosts SIGTERM is left to the runtime, which tells all of them at a step, and Ctrl-C becomes one:
  they stop at the same step, after an evaluation that is under way.

  Args:
    saving: is there a state to save? Without one, on several hosts, signals do what they always do.
  """

  def __init__(self, saving: bool = True):
    self._handled = (signal.SIGTERM, signal.SIGINT) if jax.process_count() == 1 else (signal.SIGINT,) if saving else ()
    self.begun = not saving
    self.code = None  # of the exit, once all hosts know that they stop
    self._mine = None  # what this process received
    self._old = {}

  def __enter__(self):
    for number in self._handled:
      self._old[number] = signal.signal(number, self._receive)
    return self

  def __exit__(self, *_):
    for number, handler in self._old.items():
      signal.signal(number, handler)

  def _receive(self, number, _):
    again, self._mine = self._mine, PREEMPTED if number == signal.SIGTERM else INTERRUPTED
    if number == signal.SIGINT and (again == INTERRUPTED or not self.begun):
      raise KeyboardInterrupt
    if not self.begun:
      self.code = self._mine
      logging.info('SIGTERM before a new step: leaving; the same command starts again')
      raise SystemExit(PREEMPTED)
    logging.info('%s: saving, then leaving', signal.Signals(number).name)
    if jax.process_count() == 1:
      self.code = self._mine
    else:
      os.kill(os.getpid(), signal.SIGTERM)

  def received(self) -> bool:
    """Shall the run stop?"""
    return self.code is not None

  def ask(self, step: int) -> bool:
    """`received`, after all hosts were asked; once at each step."""
    if self.code is None and processes.told_to_stop(step):
      codes = processes.gather(str(self._mine or PREEMPTED))
      self.code = INTERRUPTED if str(INTERRUPTED) in codes else PREEMPTED
    return self.received()


# --- the loop ---------------------------------------------------------------------------------------------------------


def train(cfg, workdir) -> int:
  """Train until the last step, the goal (`cfg.stop_at`), or a signal; then, when finished, evaluate the best weights.

  Args:
    cfg: the config.
    workdir: of the run: its state is read from there if there is one, and everything is written there.

  Returns:
    the exit code.
  """
  with Signals() as signals:
    exp = agreed(cfg, workdir, 'train')
    if cfg.init_from and not any(epath.Path(workdir).glob('checkpoints/*')):
      with processes.together():
        same_tokenizer(cfg.init_from, cfg)
      weights_of(
        cfg.init_from, transformer.abstract(exp.model_cfg, exp.mesh)
      )  # there, and of this shape, before a file is?
    evaluator = evaluate.Evaluator(cfg, **{k: v for k, v in exp._asdict().items() if k != 'cfg'})
    with claim(workdir, cfg):
      with processes.together():
        for split in ('train', 'validation', 'test'):
          evaluator.source(split)
      return _train(exp, workdir, signals, evaluator)


def agreed(cfg, workdir, mode: str) -> Experiment:
  """Build what the config names; on several hosts, only where all were told the same and see the same workdir."""
  with processes.together():
    exp = build(cfg, workdir)
  processes.agree({**run_file.code(), 'mode': mode, 'workdir': str(workdir), **flatten(as_json(cfg))})
  processes.share(workdir)
  return exp


def _train(exp: Experiment, workdir, signals, evaluator) -> int:
  cfg = exp.cfg
  tx, schedule = optimizer.make_optimizer(cfg.optimizer, cfg.steps)
  state, abstract = init_state(exp, tx)
  count = sum(x.size for x in jax.tree.leaves(state.params))
  held = sum(map(sharding.bytes_here, jax.tree.leaves(state)))
  logging.info('%s on %s: %s parameters, mesh %s, a state of %.1f MB on each device', cfg.family, cfg.task.name,
               f'{count:,}', dict(exp.mesh.shape), held / 1e6)  # fmt: skip
  for line in sharding.placement(state) if exp.mesh.size > 1 else ():
    logging.info('%s', line)

  if cfg.sampling.max_length < (longest := exp.task.longest(cfg.task)):
    logging.warning('sampling.max_length=%d: the longest example, %d tokens, cannot be answered',
                    cfg.sampling.max_length, longest)  # fmt: skip
  saved = checkpoint.Checkpoints(workdir, keep=cfg.keep, metric=cfg.eval.metric, mode=cfg.eval.mode)
  seen = {str(step): saved.metrics(step) is not None for step in saved.steps()}
  processes.agree({'checkpoints': seen}, processes.Absent, 'the workdir is not the same on all yet: start all again')
  restored = saved.restore_latest(abstract)
  if restored is not None:
    state = restored._replace(step=jax.device_put(restored.step, abstract.step.sharding))
    logging.info('resuming at step %d of %s', restored.step, workdir)
  elif cfg.init_from:
    state = start_from(cfg.init_from, state, abstract)
  start = int(state.step)

  run = run_file.read_run(workdir) or {'starts': []}
  starts = [*run['starts'], run_file.describe_start(start)]
  with processes.together(), writing(workdir):
    if processes.first():
      exp.task.carry(cfg.task, workdir)
      logs.forget_after(workdir, start, validated=start in saved.steps() and saved.metrics(start) is not None)
      run_file.write_json(epath.Path(workdir) / 'run.json', {'config': as_json(cfg), 'starts': starts})
    writer = logs.make_writer(workdir, silent=not processes.first())
  signals.begun = True
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
    code = report(exp, workdir, saved, saved.find(cfg.eval.checkpoint), abstract, evaluator, signals)
  saved.close()
  writer.close()
  return code


def weights_of(other, abstract_params):
  """(step, weights) of another run's best checkpoint: its moving average where there is one."""
  run = run_file.read_run(other)
  eval_cfg = {'metric': 'exact_match', 'mode': 'max', **(run['config'].get('eval', {}) if run else {})}
  source = checkpoint.Checkpoints(other, metric=eval_cfg['metric'], mode=eval_cfg['mode'], read_only=True)
  step = source.find('best')
  try:
    return step, source.restore_weights(step, abstract_params)
  except checkpoint.ShapeError as error:
    raise UserError(
      f'init_from={other}: {error.what}; give the model settings of that run, or leave init_from out'
    ) from None


def same_tokenizer(other, cfg) -> None:
  """Refuse to start from the weights of a run whose ids mean other text."""
  run = run_file.read_run(other) or {'config': {}}
  theirs = run['config'].get('task', {}).get('tokenizer', {}).get('fingerprint')
  ours = cfg.task.get('tokenizer', {}).get('fingerprint')
  if theirs and ours and theirs != ours:
    raise UserError(
      f'init_from={other}: its tokenizer ({theirs}) is not the one of this run ({ours}): give it, '
      f'--config.task.tokenizer.path={epath.Path(other) / "tokenizer"}'
    )


def start_from(other, state: TrainState, abstract: TrainState) -> TrainState:
  """Take the (averaged) weights of another run; step, optimizer and average start anew."""
  step, params = weights_of(other, abstract.params)
  logging.info('starting from the weights of step %d of %s', step, other)
  ema = None if state.ema_params is None else jax.tree.map(jnp.copy, params)
  return state._replace(params=params, ema_params=ema)


class Loop:
  """The training loop; its methods are what happens at a step, its attributes what they share."""

  def __init__(self, exp, workdir, saved, writer, evaluator, signals, step_fn):
    self.exp, self.cfg, self.workdir = exp, exp.cfg, workdir
    self.saved, self.writer, self.evaluator, self.signals = saved, writer, evaluator, signals
    self.step_fn = step_fn
    self.progress = logs.make_progress(writer, self.cfg.steps, self.cfg.report_seconds)
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
    if reached(cfg, metrics) or start >= cfg.steps or self.signals.received():
      return self.leave(start)
    self.progress(start)
    batches = pipeline.train_batches(
      self.evaluator.source('train'), self.exp.family.corrupt, cfg,
      start=start, stop=cfg.steps, part=sharding.my_part(self.exp.mesh),
    )  # fmt: skip
    try:
      for step in range(start + 1, cfg.steps + 1):
        before = time.monotonic()
        batch = sharding.put_part(next(batches), self.exp.mesh)
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
          if jax.process_count() > 1:
            self.save(state, step, None)  # nothing interrupts the evaluation there
          metrics = self.evaluate(state, step)
        stop = self.signals.ask(step) or last or reached(cfg, metrics)
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
      done = f'saved at step {step}' if step in self.saved.steps() else 'stopped before the first step'
      logging.info('%s; the same command continues from there', done)
      return self.signals.code
    return FINISHED

  def look(self, step: int) -> None:
    """Fetch the metrics of a step (the one after it is already running) and stop the run if they are not finite."""
    if self.pending is None:
      return
    pairs, self.pending = jax.device_get(self.pending), None
    self.sums = metrics_lib.add(self.sums, pairs)
    loss = pairs['loss'][0] / max(pairs['loss'][1], 1e-9)
    norms = pairs['gradient_norm'][0], pairs['update_norm'][0]
    if not np.isfinite([loss, *norms]).all():
      raise processes.everywhere(UserError(
        f'step {step}: the loss is {loss}, the norm of the gradient {norms[0]}, of the update {norms[1]}: '
        f'{self.saved.last_complete()} (in {self.saved.folder}); lower optimizer.learning_rate or optimizer.clip and '
        'start from there'
      ))  # fmt: skip

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
      said = f'eval.metric={goal!r} is not measured: expected one of {", ".join(sorted(values))}'
      raise processes.everywhere(UserError(said))
    self.writer.write_scalars(step, {f'validation/{name}': value for name, value in values.items()})
    logging.info('step %d  validation loss %.4f%s', step, values['loss'],
                 '' if goal == 'loss' else f'  {goal} {values[goal]:.4f}')  # fmt: skip
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


def report(exp: Experiment, workdir, saved, step: int, abstract: TrainState, evaluator, signals) -> int:
  """Evaluate the chosen weights on the test split, print the result with a few answers, and write eval.json."""
  began = time.monotonic()
  params = saved.restore_weights(step, abstract.params)
  scores = evaluator.answers(params, 'test', progress=True, interrupted=signals.received)
  if scores is None:
    return signals.code
  values = metrics_lib.means({**evaluator.validation_loss(params, 'test'), **scores.pairs})
  scored = None
  if exp.cfg.eval.score != 'none':
    scored = evaluator.likelihood(params, 'test', interrupted=signals.received)
    if scored is None:
      return signals.code
    values |= metrics_lib.means(scored.pairs())
  judged = judge(exp.cfg, scores.samples, evaluator.source('test'))
  if judged:
    values |= {f'judge_{name}': value for name, value in text_statistics.values(judged['samples']).items()}
  result = {
    'split': 'test',
    'likelihood': scored and scored.kind,
    'strings': scored and {name: getattr(scored, f'{name}_N').round(4).tolist() for name in ('nll', 'error', 'tokens')},
    'step': step,
    'finished': finished(exp.cfg, saved),
    'config': as_json(exp.cfg),
    'sampler': settings.describe(exp.sample_cfg),
    'seed': exp.cfg.seed,
    'chance': exp.task.chance(exp.cfg.task) if exp.task.chance else None,
    'parameters': sum(x.size for x in jax.tree.leaves(abstract.params)),
    'metrics': values,
    'judge': text_statistics.plain(judged),
    'pairs': {name: [float(x) for x in pair] for name, pair in scores.pairs.items()},
    'order_places': scores.places_NxN.tolist(),
    'seconds': time.monotonic() - began,
    'start': run_file.describe_start(step),
  }
  with processes.together(), writing(workdir):
    if processes.first():
      run_file.write_json(epath.Path(workdir) / 'eval.json', result)
  if processes.first():
    tell(exp, workdir, result, scores, judged)
  return FINISHED


def tell(exp: Experiment, workdir, result: dict, scores, judged: dict | None) -> None:
  """Print a result, and a few answers."""
  step, values = result['step'], result['metrics']
  scored_answers = 'exact_match' in scores.pairs
  print('\nA few test answers, with the token that came in at each step in brackets:\n' if scored_answers else
        '\nA few texts, and how they grew:\n')  # fmt: skip
  print('\n\n'.join(scores.texts))
  if scored_answers:
    print(f'\ntest exact match at step {step}: {metrics_lib.percent(*scores.pairs["exact_match"])}')
  else:
    print(f'\ntest {exp.cfg.eval.metric} at step {step}: {values[exp.cfg.eval.metric]:.4f}')
  if result['likelihood']:
    error = (values['nll_variance'] / len(result['strings']['nll'])) ** 0.5
    print(f'test -log p, {result["likelihood"]}: {values["nll"]:.4f} nats a string (standard error of the estimate '
          f'{error:.4f}), {values["nll_per_token"]:.4f} a token')  # fmt: skip
  if judged:
    columns = {name: judged[name] for name in ('samples', 'test')}
    print('\n'.join([f'\njudged by {judged["name"]}:', text_statistics.table(columns), *judged['notes']]))
  print(f'run: {workdir} (metrics: tensorboard --logdir={workdir}; result: {workdir}/eval.json)', flush=True)


def judge(cfg, samples, source) -> dict | None:
  """What `eval.perplexity_model` says of sampled texts, and of as many texts of a split; None without a judge."""
  if not cfg.eval.get('perplexity_model', ''):
    return None
  found = scoring_models.get(cfg.eval.perplexity_model)
  columns = {'samples': list(samples), 'test': [source.text(i) for i in range(len(samples))]}
  described = {
    name: text_statistics.describe(texts, found.nll(texts), seed=cfg.seed) for name, texts in columns.items()
  }
  notes = [line for name, one in described.items() for line in text_statistics.warnings(one, name, found)]
  return {'name': found.name, 'intervals': text_statistics.METHOD, **described, 'notes': notes}


def finished(cfg, saved) -> bool:
  """Has the run made all its steps, or reached its goal?"""
  latest = saved.find('latest')
  return latest >= cfg.steps or reached(cfg, saved.metrics(latest))


def reached(cfg, metrics: dict | None) -> bool:
  """Is the goal of a run, `cfg.stop_at`, reached on validation?"""
  value = (metrics or {}).get(cfg.eval.metric)
  if not cfg.stop_at or value is None:
    return False
  return value >= cfg.stop_at if cfg.eval.mode == 'max' else value <= cfg.stop_at


def evaluate_run(cfg, workdir) -> int:
  """Evaluate a finished or running run on the test split (`--mode=eval`)."""
  exp = agreed(cfg, workdir, 'eval')
  with processes.together():
    same_run(workdir, cfg)
  saved = checkpoint.Checkpoints(workdir, metric=cfg.eval.metric, mode=cfg.eval.mode, read_only=True)
  with processes.together():
    step = saved.find(cfg.eval.checkpoint)
  processes.agree({'checkpoint': step}, processes.Absent, 'the workdir is not the same on all yet: start all again')
  tx, _ = optimizer.make_optimizer(cfg.optimizer, cfg.steps)
  abstract = abstract_state(exp, tx)
  evaluator = evaluate.Evaluator(cfg, **{k: v for k, v in exp._asdict().items() if k != 'cfg'})
  with Signals(saving=False) as signals:
    return report(exp, workdir, saved, step, abstract, evaluator, signals)
