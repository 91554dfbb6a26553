"""A trained model in Python: `lm = ilm_jax.load('runs/star-tiny'); lm.generate(prompts)`."""

from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from ilm_jax import checkpoint, families, model, sampling, tasks
from ilm_jax.families import settings as settings_lib
from ilm_jax.types import UserError


class Generation(NamedTuple):
  """One answer: the whole text, and how it came about."""

  text: str
  tokens: list[str]  # the whole row
  order: list[int]  # step at which each token was inserted, -1 for given ones
  probabilities: list[float]  # of each step's (gap, token) under the model
  stop_probabilities: list[float]  # seen at each forward pass
  stopped: bool  # by the stop head; False: a limit ended it


def load(workdir, checkpoint='best', **sampling_settings) -> 'LanguageModel':
  """Load the model of a run.

  Args:
    workdir: of the run, local or a bucket.
    checkpoint: 'best' on validation, 'latest', or a step.
    **sampling_settings: fields of the family's SampleConfig that replace the run's.

  Raises:
    UserError: no run or no such checkpoint there, or an unknown setting.
  """
  return LanguageModel.load(workdir, checkpoint, **sampling_settings)


class LanguageModel:
  """A family, a task and weights."""

  def __init__(self, cfg: ConfigDict, model_cfg: model.ModelConfig, params, *, step: int = 0, batch_size: int = 64,
               **sampling_settings):  # fmt: skip
    self.cfg, self.model_cfg, self.params, self.step = cfg, model_cfg, params, step
    self.family, self.task = families.get(cfg.family), tasks.get(cfg.task.name)
    self.tokenizer = self.task.tokenizer(cfg.task)
    known = {*self.family.SampleConfig._fields, 'two_stage'}
    for name in sampling_settings:
      if name in settings_lib.KNOWN and name not in known:
        raise UserError(f'sampling setting {name!r} means nothing to family={cfg.family}: leave it out')
    if 'joint' in sampling_settings:
      sampling_settings.setdefault('two_stage', False)
    settings = {**cfg.sampling.to_dict(), **sampling_settings}
    sample_cfg = families.make_sample_config(
      self.family, cfg, settings, closed_tokens=self.tokenizer.special_ids, compute=model_cfg.compute
    )
    self.sampler = sampling.Sampler(model_cfg, self.family, sample_cfg, batch_size)

  @classmethod
  def load(cls, workdir, which='best', **settings) -> 'LanguageModel':
    """See `load`."""
    cfg = ConfigDict(checkpoint.read_config(workdir))
    family, task = families.get(cfg.family), tasks.get(cfg.task.name)
    if hasattr(task, 'settle'):
      task.settle(cfg.task, workdir)
    model_settings = {**cfg.model.to_dict(), **family.model_settings(cfg)}
    model_cfg = model.ModelConfig.create(task.tokenizer(cfg.task).vocab_size, **model_settings)
    saved = checkpoint.Checkpoints(workdir, metric=cfg.eval.metric, mode=cfg.eval.mode, read_only=True)
    step = saved.find(which)
    params = saved.restore_weights(step, model.abstract(model_cfg))
    return cls(cfg, model_cfg, params, step=step, **settings)

  def generate(self, prompts: list[str], *, seed: int = 0, ids: list[int] | None = None) -> list[Generation]:
    """Answer prompts, in their order.

    Args:
      prompts: in the task's text form.
      seed: of the randomness, where the sampling rules leave any.
      ids: an identity for each prompt, its index by default: an answer depends on the seed, its identity and its text,
        not on the other prompts.

    Raises:
      UserError: a prompt that can't be read, holds an unknown token, or is too long.
    """
    return list(self.stream(prompts, seed=seed, ids=ids))

  def stream(self, prompts: list[str], *, seed: int = 0, ids: list[int] | None = None):
    """Like `generate`, but yield each answer when its batch is done."""
    given = [self.encode(text, number) for number, text in enumerate(prompts)]
    for row in self.sampler(self.params, jax.random.key(seed), given, ids):
      yield Generation(
        text=self.task.decode(row['tokens'], self.cfg.task),
        tokens=self.tokenizer.pieces(row['tokens']),
        order=row['order'].tolist(),
        probabilities=[round(float(p), 6) for p in np.exp(row['log_prob'])],
        stop_probabilities=[round(float(p), 6) for p in row['stop_prob']],
        stopped=row['stopped'],
      )

  def encode(self, text: str, number: int = 0) -> dict:
    """A prompt as tokens with their open gaps (the last one)."""
    try:
      tokens = np.array(self.task.encode_prompt(text, self.cfg.task), np.int32)
    except UserError as error:
      raise UserError(f'prompt {number + 1}: {error}') from None
    limit = self.sampler.cfg.max_length
    if len(tokens) >= limit:
      raise UserError(
        f'prompt {number + 1} is too long: {len(tokens)} tokens leave no room for an answer in '
        f'sampling.max_length={limit}; shorten it'
      )
    return {'tokens': tokens, 'open': np.arange(len(tokens)) == len(tokens) - 1}
