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


def report(exp: Experiment, workdir, saved, step: int, abstract_params, evaluator, signals) -> int:
  """Evaluate the checkpoint of a step on the test split, write eval.json and print the result; return the exit code.

  Any signal ends the evaluation early, without a result.
  """
  began = time.monotonic()
  params = saved.restore_weights(step, abstract_params)
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
    found = text_statistics.values(scored_texts['samples'])
    values |= {f'scoring_model_{name}': value for name, value in found.items()}
  arrays = ('nll', 'error', 'tokens')
  latest = saved.find('latest')
  result = {
    'split': 'test',
    'likelihood': likelihood and likelihood.kind,
    'strings': likelihood and {name: getattr(likelihood, f'{name}_N').round(4).tolist() for name in arrays},
    'step': step,
    'finished': latest >= exp.cfg.steps or reached_goal(exp.cfg, saved.metrics(latest)),
    'config': as_json(exp.cfg),
    'sampler': settings.describe(exp.sample_cfg),
    'seed': exp.cfg.seed,
    'chance': exp.task.chance(exp.cfg.task) if exp.task.chance else None,
    'parameters': sum(x.size for x in jax.tree.leaves(abstract_params)),
    'metrics': values,
    'scoring_model': text_statistics.plain(scored_texts),
    'pairs': {name: [float(x) for x in pair] for name, pair in scores.pairs.items()},
    'order_places': scores.order_counts_NxN.tolist(),
    'seconds': time.monotonic() - began,
    'start': run_file.describe_start(step),
  }
  with processes.raise_on_all(), explain_write_errors(f'{workdir} could not be written'):
    if processes.is_first():
      run_file.write_json(epath.Path(workdir) / 'eval.json', result)
  if processes.is_first():
    print(result_text(exp, workdir, result, scores, scored_texts), flush=True)  # printing may fail, so it comes last
  return FINISHED


def result_text(exp: Experiment, workdir, result: dict, scores, scored_texts: dict | None) -> str:
  """Format the results of an evaluation, with a few sampled completions, as text."""
  step, values = result['step'], result['metrics']
  if 'exact_match' in scores.pairs:
    title = 'Sample answers, one line per decoding step, with the token inserted at that step in brackets'
    main = f'exact match at step {step}: {metrics_lib.format_proportion(*scores.pairs["exact_match"])}'
  else:
    title = 'Sample texts, also as they were after 1/4, 1/2 and 3/4 of the decoding steps'
    main = f'{exp.cfg.eval.metric} at step {step}: {values[exp.cfg.eval.metric]:.4f}'
  lines = ['\n\n'.join([f'\n{title}:', *scores.texts, f'test {main}'])]
  if result['likelihood']:
    error = (values['nll_variance'] / len(result['strings']['nll'])) ** 0.5
    lines.append(f'test -log p, {result["likelihood"]}: {values["nll"]:.4f} nats per string (standard error of the '
                 f'estimate {error:.4f}), {values["nll_per_token"]:.4f} per token')  # fmt: skip
  if scored_texts:
    columns = {name: scored_texts[name] for name in ('samples', 'test')}
    lines += [f'\nscored by {scored_texts["name"]}:', text_statistics.table(columns), *scored_texts['notes']]
  return '\n'.join([*lines, f'run: {workdir} (metrics: tensorboard --logdir={workdir}; result: {workdir}/eval.json)'])


def score_samples(cfg, samples, source) -> dict | None:
  """Return statistics of samples and of as many test texts, scored by `eval.perplexity_model`; None if it is unset."""
  if not cfg.eval.get('perplexity_model', ''):
    return None
  model = scoring_models.get(cfg.eval.perplexity_model)
  columns = {'samples': list(samples), 'test': [source.text(i) for i in range(len(samples))]}
  describe = text_statistics.describe
  statistics = {name: describe(texts, model.nll(texts), seed=cfg.seed) for name, texts in columns.items()}
  notes = [line for name, one in statistics.items() for line in text_statistics.warnings(one, name, model)]
  return {'name': model.name, 'intervals': text_statistics.METHOD, **statistics, 'notes': notes}


def reached_goal(cfg, metrics: dict | None) -> bool:
  """Return whether the validation metric that `cfg.eval.metric` names has reached the goal `cfg.stop_at`."""
  value = (metrics or {}).get(cfg.eval.metric)
  if not cfg.stop_at or value is None:
    return False
  return value >= cfg.stop_at if cfg.eval.mode == 'max' else value <= cfg.stop_at
