"""Build the family, task, model and mesh that a config specifies, and check that its settings fit together."""

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
from ilm_jax.special_tokens import SPECIAL
from ilm_jax.training.checks import check_settings
from ilm_jax.types import UserError


class Experiment(NamedTuple):
  """The objects built from a config that training and evaluation share."""

  cfg: ConfigDict
  family: Any
  task: Any
  model_cfg: transformer.ModelConfig
  sample_cfg: Any  # settings of the family's sampler
  loss_cfg: ConfigDict  # settings of the family's loss
  mesh: jax.sharding.Mesh


def build(cfg, workdir=None, *, devices=None, vocab_size: int | None = None) -> Experiment:
  """Build the family, task, model and mesh that a config specifies; UserError if its settings do not fit together.

  The task may read files that it saved in the workdir, such as the tokenizer, and add its fingerprint to `cfg.task`.
  If `vocab_size` is given, no tokenizer and no data are loaded; the result can be compiled but not trained.
  """
  check_settings(cfg)
  family, task = families.get(cfg.family), tasks.get(cfg.task.name)
  check_choices(cfg, family, task)
  if vocab_size is None:
    task.resolve_assets(cfg.task, workdir)
    tokenizer = task.tokenizer(cfg.task)
    vocab_size, special_ids, byte_ids = tokenizer.vocab_size, tokenizer.special_ids, tokenizer.byte_ids
    source = task.source(cfg.task, 'train') if cfg.loss.length_weight == 'elbo' else None
    task.source(cfg.task, 'test')  # called for its UserError if the data are missing
  else:
    special_ids, byte_ids, source = tuple(range(len(SPECIAL))), (), None
  family_settings = family.model_settings(cfg)
  check_model_settings(cfg, family, family_settings, task)
  model_cfg = transformer.ModelConfig.create(vocab_size, **{**cfg.model.to_dict(), **family_settings})
  mesh = sharding.make_mesh(cfg.mesh, devices)
  if warning := sharding.check_model(model_cfg, mesh):
    logging.warning('%s', warning)
  check_batch(cfg, mesh, family, task)
  sample_cfg = families.make_sample_config(
    family, cfg, cfg.sampling, suppressed_tokens=special_ids, byte_ids=byte_ids, compute=model_cfg.compute
  )
  loss_cfg = ConfigDict({**cfg.loss.to_dict(), 'compute': model_cfg.compute})
  loss_cfg.mean_weight = 1.0 if source is None else mean_length_weight(cfg, family, source)
  return Experiment(cfg, family, task, model_cfg, sample_cfg, loss_cfg, mesh)


def check_choices(cfg, family, task) -> None:
  """Raise UserError if the family or the task does not support the chosen loss or the chosen evaluation."""
  if cfg.eval.score != 'none':
    family.check_score(cfg.eval.score or None, task.longest_answer(cfg.task))
  if cfg.loss.length_weight not in family.length_weights:
    raise UserError(f'loss.length_weight={cfg.loss.length_weight} does not apply to family={cfg.family}: leave it out')
  if cfg.eval.metric == 'exact_match' and task.score is None:
    raise UserError(
      f'eval.metric=exact_match: the task {cfg.task.name} has no right answers: use eval.metric=loss and eval.mode=min'
    )
  if cfg.eval.get('perplexity_model', ''):
    scoring_models.check(cfg.eval.perplexity_model)


def check_model_settings(cfg, family, family_settings: dict, task) -> None:
  """Raise UserError if the config asks for a model input that its family does not provide."""
  conditioning = cfg.model.get('conditioning')
  if conditioning not in (None, 'none') and 'conditioning' not in family_settings:
    raise UserError(f'model.conditioning={conditioning!r} does not apply to family={cfg.family}: leave it out')
  if not cfg.model.get('open_gap_embedding'):
    return
  if not family.open_gap_embedding:
    raise UserError(f'model.open_gap_embedding=True: family={cfg.family} cannot close gaps to insertions: leave it out')
  if not cfg.corrupt.close_prompt:
    raise UserError('model.open_gap_embedding=True needs corrupt.close_prompt=True: sampling never inserts in prompts')
  if not cfg.corrupt.infill_rate and task.score is None:
    logging.warning('model.open_gap_embedding=True has no effect in training on text unless corrupt.infill_rate > 0')


def check_batch(cfg, mesh, family, task) -> None:
  """Raise UserError unless a batch divides into groups, devices and microbatches, and every example fits into a row."""
  rows, parts = cfg.data.rows, cfg.optimizer.accumulation_steps
  shape = pipeline.shape_of(cfg.data)  # raises UserError if the batch does not divide into groups
  pipeline.groups_of_process(cfg.data.groups, *sharding.process_shard(mesh))
  sharding.check_rows(rows, mesh, 'data.rows')
  if rows % parts:
    raise UserError(f'data.rows={rows} does not divide into optimizer.accumulation_steps={parts} '
                    f'parts: use data.rows={pipeline.nearest_multiples(rows, parts)}')  # fmt: skip
  sharding.check_rows(rows // parts, mesh, 'data.rows / optimizer.accumulation_steps')
  length, targets = family.sizes(cfg, task.longest(cfg.task), task.longest_answer(cfg.task))
  if shape.length < length:
    raise UserError(f'data.row_length={shape.length} is shorter than the longest example, {length} tokens: raise it')
  if shape.targets < targets:
    raise UserError(f'data.targets={shape.targets}: the longest example has {targets} loss targets: raise data.targets')


def mean_length_weight(cfg, family, source) -> float:
  """Return the mean of (1 + number of tokens to generate) over the first 1,000 training examples, after corruption."""
  made = (family.corrupt(np.random.default_rng(i), source[i], cfg.corrupt) for i in range(min(1_000, len(source))))
  return float(np.mean([1 + example['free'] for example in made]))
