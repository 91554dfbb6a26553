"""Evaluate a run on the test split, write eval.json, and print a summary."""

import time

import jax
from etils import epath

from ilm_jax import metrics as metrics_lib
from ilm_jax.distributed import processes
from ilm_jax.evaluation import scoring_models, text_statistics
from ilm_jax.families import settings
from ilm_jax.runs import run_file
from ilm_jax.runs.run_file import as_json
from ilm_jax.runs.workdir import explain_write_errors
from ilm_jax.training.experiment import Experiment
from ilm_jax.training.signals import FINISHED
from ilm_jax.training.train_step import TrainState


def report(exp: Experiment, workdir, saved, step: int, abstract: TrainState, evaluator, signals) -> int:
  """Evaluate one checkpoint on the test split, write eval.json, and print the result.

  Args:
    exp: the experiment.
    workdir: the folder of the run.
    saved: the checkpoints of the run.
    step: training step of the checkpoint to evaluate.
    abstract: shapes and shardings of the state.
    evaluator: the evaluator of the run.
    signals: received signals; any signal ends the evaluation early, without a result.

  Returns:
    The exit code.
  """
  began = time.monotonic()
  params = saved.restore_weights(step, abstract.params)
  scores = evaluator.sample_answers(params, 'test', progress=True, interrupted=signals.received)
  if scores is None:
    return signals.code
  values = metrics_lib.means({**evaluator.validation_loss(params, 'test'), **scores.pairs})
  likelihood = None
  if exp.cfg.eval.score != 'none':
    likelihood = evaluator.likelihood(params, 'test', interrupted=signals.received)
    if likelihood is None:
      return signals.code
    values |= metrics_lib.means(likelihood.pairs())
  scored_texts = score_samples(exp.cfg, scores.samples, evaluator.source('test'))
  if scored_texts:
    values |= {
      f'scoring_model_{name}': value for name, value in text_statistics.values(scored_texts['samples']).items()
    }
  strings = None
  if likelihood:
    strings = {name: getattr(likelihood, f'{name}_N').round(4).tolist() for name in ('nll', 'error', 'tokens')}
  result = {
    'split': 'test',
    'likelihood': likelihood and likelihood.kind,
    'strings': strings,
    'step': step,
    'finished': is_finished(exp.cfg, saved),
    'config': as_json(exp.cfg),
    'sampler': settings.describe(exp.sample_cfg),
    'seed': exp.cfg.seed,
    'chance': exp.task.chance(exp.cfg.task) if exp.task.chance else None,
    'parameters': sum(x.size for x in jax.tree.leaves(abstract.params)),
    'metrics': values,
    'scoring_model': text_statistics.plain(scored_texts),
    'pairs': {name: [float(x) for x in pair] for name, pair in scores.pairs.items()},
    'order_places': scores.order_counts_NxN.tolist(),
    'seconds': time.monotonic() - began,
    'start': run_file.describe_start(step),
  }
  with processes.raise_on_all(), explain_write_errors(workdir):
    if processes.is_first():
      run_file.write_json(epath.Path(workdir) / 'eval.json', result)
  if processes.is_first():
    print_result(exp, workdir, result, scores, scored_texts)
  return FINISHED


def print_result(exp: Experiment, workdir, result: dict, scores, scored_texts: dict | None) -> None:
  """Print the result of `report` and a few sampled completions."""
  step, values = result['step'], result['metrics']
  has_answers = 'exact_match' in scores.pairs
  if has_answers:
    print('\nSample answers, one line per decoding step, with the token inserted at that step in brackets:\n')
  else:
    print('\nSample texts, also as they were after 1/4, 1/2 and 3/4 of the decoding steps:\n')
  print('\n\n'.join(scores.texts))
  if has_answers:
    print(f'\ntest exact match at step {step}: {metrics_lib.format_proportion(*scores.pairs["exact_match"])}')
  else:
    print(f'\ntest {exp.cfg.eval.metric} at step {step}: {values[exp.cfg.eval.metric]:.4f}')
  if result['likelihood']:
    error = (values['nll_variance'] / len(result['strings']['nll'])) ** 0.5
    print(f'test -log p, {result["likelihood"]}: {values["nll"]:.4f} nats per string (standard error of the estimate '
          f'{error:.4f}), {values["nll_per_token"]:.4f} per token')  # fmt: skip
  if scored_texts:
    columns = {name: scored_texts[name] for name in ('samples', 'test')}
    print('\n'.join([f'\nscored by {scored_texts["name"]}:', text_statistics.table(columns), *scored_texts['notes']]))
  print(f'run: {workdir} (metrics: tensorboard --logdir={workdir}; result: {workdir}/eval.json)', flush=True)


def score_samples(cfg, samples, source) -> dict | None:
  """Score sampled texts and equally many test texts with the scoring model that `eval.perplexity_model` names.

  Args:
    cfg: the config.
    samples: the sampled texts.
    source: the test split.

  Returns:
    {'samples': statistics, 'test': statistics, ...}, or None if the config names no scoring model.
  """
  if not cfg.eval.get('perplexity_model', ''):
    return None
  model = scoring_models.get(cfg.eval.perplexity_model)
  columns = {'samples': list(samples), 'test': [source.text(i) for i in range(len(samples))]}
  statistics = {
    name: text_statistics.describe(texts, model.nll(texts), seed=cfg.seed) for name, texts in columns.items()
  }
  notes = [line for name, one in statistics.items() for line in text_statistics.warnings(one, name, model)]
  return {'name': model.name, 'intervals': text_statistics.METHOD, **statistics, 'notes': notes}


def is_finished(cfg, saved) -> bool:
  """Return whether the run has completed its last training step or reached its goal `cfg.stop_at`."""
  latest = saved.find('latest')
  return latest >= cfg.steps or reached_goal(cfg, saved.metrics(latest))


def reached_goal(cfg, metrics: dict | None) -> bool:
  """Return whether the value of `cfg.eval.metric` in the validation metrics has reached the goal `cfg.stop_at`."""
  value = (metrics or {}).get(cfg.eval.metric)
  if not cfg.stop_at or value is None:
    return False
  return value >= cfg.stop_at if cfg.eval.mode == 'max' else value <= cfg.stop_at
