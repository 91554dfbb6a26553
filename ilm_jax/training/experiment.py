"""What a config names, built and checked: the parts that training and evaluation share."""

from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from ilm_jax import families, tasks
from ilm_jax.data import pipeline
from ilm_jax.distributed import sharding
from ilm_jax.evaluation import scoring_models
from ilm_jax.models import transformer
from ilm_jax.runs.run_file import as_json, flatten
from ilm_jax.special_tokens import SPECIAL
from ilm_jax.training import optimizer
from ilm_jax.types import UserError


class Experiment(NamedTuple):
  """What a config names, built: the parts that training and evaluation share."""

  cfg: ConfigDict
  family: Any
  task: Any
  model_cfg: transformer.ModelConfig
  sample_cfg: Any
  loss_cfg: ConfigDict
  mesh: jax.sharding.Mesh


LEAST = {  # the smallest value of settings that have one
  'seed': 0, 'steps': 1, 'keep': 1, 'log_every': 0, 'checkpoint_every': 0, 'report_seconds': 0,
  'task.seed': 0, 'task.num_train': 0, 'task.num_validation': 1, 'task.num_test': 1,
  'loss.vocab_chunk': 1, 'loss.stop_weight': 0,
  'corrupt.length': 0, 'data.batch_size': 1, 'data.groups': 1, 'data.rows': 1, 'data.row_length': 2, 'data.targets': 0,
  'data.segments': 1, 'data.num_workers': 0, 'data.prefetch': 1,
  'optimizer.warmup_steps': 0, 'optimizer.accumulation_steps': 1, 'optimizer.clip': 0, 'optimizer.ema_decay': 0,
  'sampling.max_length': 3, 'sampling.max_steps': 0,
  'distributed.initialization_timeout': 1, 'distributed.heartbeat_timeout': 5,
  'eval.every': 0, 'eval.batch_size': 1, 'eval.samples': 0, 'eval.print_samples': 0,
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


def check_choices(cfg, family, task) -> None:
  """Refuse words that mean nothing, and likelihoods that a family does not have."""
  if cfg.eval.score != 'none':
    family.check_score(cfg.eval.score or None, task.longest_answer(cfg.task))
  if cfg.loss.length_weight not in ('none', 'elbo'):
    raise UserError(f'loss.length_weight={cfg.loss.length_weight!r}: expected none or elbo')
  if cfg.loss.length_weight == 'elbo' and cfg.family != 'ilm':
    raise UserError(f'loss.length_weight=elbo is the bound of family=ilm: leave it out with family={cfg.family}')
  if cfg.eval.mode not in ('max', 'min'):
    raise UserError(f'eval.mode={cfg.eval.mode!r}: expected max or min')
  if cfg.eval.metric == 'exact_match' and task.score is None:
    raise UserError(
      f'eval.metric=exact_match: the task {cfg.task.name} has no right answers: use eval.metric=loss and eval.mode=min'
    )
  if cfg.eval.get('perplexity_model', ''):
    scoring_models.check(cfg.eval.perplexity_model)


def build(cfg, workdir=None, *, devices=None, vocab_size: int | None = None) -> Experiment:
  """Build what the config names; refuses what doesn't fit together, before anything is computed or written.

  Args:
    cfg: the config; a task may note in its part what it found (the fingerprint of a tokenizer).
    workdir: of the run, which may carry files of the task.
    devices: of the mesh; all by default.
    vocab_size: of a vocabulary that is not there, nor any data: what is built can be compiled, not run.
  """
  check_ranges(cfg)
  optimizer.make_schedule(cfg.optimizer, cfg.steps)
  family, task = families.get(cfg.family), tasks.get(cfg.task.name)
  check_choices(cfg, family, task)
  if vocab_size is None:
    task.settle(cfg.task, workdir)
    tokenizer = task.tokenizer(cfg.task)
    vocab_size, special_ids = tokenizer.vocab_size, tokenizer.special_ids
    source = task.source(cfg.task, 'train') if cfg.loss.length_weight == 'elbo' else None
    task.source(cfg.task, 'test')
  else:
    special_ids, source = tuple(range(len(SPECIAL))), None
  decided = family.model_settings(cfg)
  if cfg.model.get('conditioning') not in (None, 'none') and 'conditioning' not in decided:
    raise UserError(
      f'model.conditioning={cfg.model.conditioning!r}: the family {cfg.family} knows no noise level: leave it out'
    )
  if cfg.model.get('open_gap_embedding'):
    if not family.open_gap_embedding:
      raise UserError(
        f'model.open_gap_embedding=True: the family {cfg.family} has no open and closed gaps: leave it out'
      )
    if not cfg.corrupt.close_prompt:
      raise UserError(
        'model.open_gap_embedding=True needs corrupt.close_prompt=True: a sampler closes the gaps of what is given, and so must '
        'the training'
      )
    if not cfg.corrupt.infill_rate and task.score is None:
      logging.warning('model.open_gap_embedding=True with corrupt.infill_rate=0: no gap of a whole text is closed, so nothing is '
                      'learned of it')  # fmt: skip
  settings = {**cfg.model.to_dict(), **decided}
  model_cfg = transformer.ModelConfig.create(vocab_size, **settings)
  mesh = sharding.make_mesh(cfg.mesh, devices)
  if said := sharding.check_model(model_cfg, mesh):
    logging.warning('%s', said)
  shape = pipeline.shape_of(cfg.data)
  pipeline.my_groups(cfg.data.groups, *sharding.my_part(mesh))
  sharding.check_rows(cfg.data.rows, mesh, 'data.rows')
  if cfg.data.rows % cfg.optimizer.accumulation_steps:
    fits = pipeline.nearest(cfg.data.rows, cfg.optimizer.accumulation_steps)
    raise UserError(f'data.rows={cfg.data.rows} does not divide into optimizer.accumulation_steps={cfg.optimizer.accumulation_steps} '
                    f'parts: use data.rows={fits}')  # fmt: skip
  sharding.check_rows(
    cfg.data.rows // cfg.optimizer.accumulation_steps, mesh, 'data.rows / optimizer.accumulation_steps'
  )
  longest, most = family.sizes(cfg, task.longest(cfg.task), task.longest_answer(cfg.task))
  if shape.length < longest:
    raise UserError(f'data.row_length={shape.length} is shorter than the longest example, {longest} tokens: raise it')
  if shape.targets < most:
    raise UserError(f'data.targets={shape.targets} is less than the targets of the longest example, {most}: raise it')
  sample_cfg = families.make_sample_config(
    family, cfg, cfg.sampling, closed_tokens=special_ids, compute=model_cfg.compute
  )
  loss_cfg = ConfigDict({**cfg.loss.to_dict(), 'compute': model_cfg.compute})
  loss_cfg.mean_weight = 1.0 if source is None else mean_weight(cfg, family, source)
  return Experiment(cfg, family, task, model_cfg, sample_cfg, loss_cfg, mesh)


def mean_weight(cfg, family, source, examples: int = 1_000) -> float:
  """The mean over the first training examples, corrupted, of 1 + the number of their free tokens."""
  made = (family.corrupt(np.random.default_rng(i), source[i], cfg.corrupt) for i in range(min(examples, len(source))))
  return float(np.mean([1 + example['free'] for example in made]))
