"""Prompts in, samples out: pads prompts to batches of a fixed size and runs a family's sampler in one jit."""

import functools

import jax
import numpy as np

from ilm_jax.distributed import sharding
from ilm_jax.models import transformer
from ilm_jax.types import UNLIMITED, Prompt, Sampled, UserError


class Sampler:
  """A compiled sampler; the parameters are an argument, so one serves a whole training run.

  Args:
    model_cfg: of the model.
    family: module of the family.
    sample_cfg: its settings (`families.*.SampleConfig`).
    batch_size: rows of a call; shorter lists of prompts are padded with empty rows.
    mesh: where the rows are shared out, if given.
  """

  def __init__(self, model_cfg, family, sample_cfg, batch_size: int, mesh=None):
    self.family, self.cfg, self.batch_size, self.mesh = family, sample_cfg, batch_size, mesh
    if mesh is not None:
      sharding.check_rows(batch_size, mesh, 'eval.batch_size')
    shardings = {} if mesh is None else {'out_shardings': sharding.replicated(mesh)}

    @functools.partial(jax.jit, **shardings)
    @sharding.on(mesh)
    def run(params, rng, prompt):
      return family.sample(transformer.Forward(model_cfg, params), rng, prompt, sample_cfg)

    self._run = run

  def __call__(self, params, rng, prompts: list[dict], requests=None):
    """Sample one row for each prompt.

    Args:
      params: of the model.
      rng: key of the whole run.
      prompts: of {'tokens': int[n], 'open': bool[n]} each, perhaps with 'free', the number of tokens to come.
      requests: identity of each, 0, 1, ... by default; a row's randomness depends on nothing else.

    Yields:
      a dict of each field of `Sampled`, cut to the row's length (or number of steps).
    """
    for prompt in prompts:
      check(prompt, self.family, self.cfg)
    requests = range(len(prompts)) if requests is None else requests
    for first in range(0, len(prompts), self.batch_size):
      part = prompts[first : first + self.batch_size]
      batch = pad(part, list(requests)[first : first + len(part)], self.batch_size, buffer_for(part, self.cfg))
      if self.mesh is not None:
        batch = Prompt(**sharding.put_batch(batch._asdict(), self.mesh))
      sampled = jax.device_get(self._run(params, rng, batch))
      for row in range(len(part)):
        yield cut(sampled, row)


def check(given: dict, family, cfg) -> None:
  """Refuse a prompt that does not fit, or that the family cannot serve."""
  if len(given['tokens']) > cfg.max_length:
    raise UserError(
      f'a prompt of {len(given["tokens"])} tokens is longer than sampling.max_length={cfg.max_length}: '
      'shorten it, or raise the limit'
    )
  family.check_prompt(given, cfg)


def buffer_for(prompts: list[dict], cfg) -> int:
  """Positions of a buffer for prompts: one of a few sizes."""
  longest = max(len(given['tokens']) for given in prompts)
  size = cfg.min_buffer
  while size < longest:
    size *= 2
  return min(size, cfg.max_length)


def pad(prompts: list[dict], requests: list[int], rows: int, size: int) -> Prompt:
  """Stack prompts in buffers of `size` positions; rows that are left over are empty."""
  shape = (rows, size)
  prompt = Prompt(
    tokens_BxL=np.zeros(shape, np.int32),
    length_B=np.zeros(shape[:1], np.int32),
    open_BxL=np.zeros(shape, bool),
    request_B=np.zeros(shape[:1], np.int32),
    free_B=np.full(shape[:1], -1, np.int32),
    least_BxL=np.zeros(shape, np.int32),
    most_BxL=np.full(shape, UNLIMITED, np.int32),
  )
  for row, (given, request) in enumerate(zip(prompts, requests, strict=True)):
    length = len(given['tokens'])
    prompt.tokens_BxL[row, :length] = given['tokens']
    prompt.open_BxL[row, :length] = given['open']
    prompt.length_B[row] = length
    prompt.request_B[row] = request
    prompt.free_B[row] = given.get('free', -1)
    for name, array_BxL in (('least', prompt.least_BxL), ('most', prompt.most_BxL)):
      if given.get(name) is not None:
        array_BxL[row, :length] = given[name]
  return prompt


def cut(sampled: Sampled, row: int) -> dict:
  """One row without its padding, as numpy arrays."""
  length, steps = int(sampled.length_B[row]), int(sampled.steps_B[row])
  return {
    'tokens': sampled.tokens_BxL[row, :length],
    'order': sampled.order_BxL[row, :length],
    'log_prob': sampled.log_prob_BxM[row, :steps],
    'stop_prob': sampled.stop_prob_BxM[row, : steps + 1],  # the last forward pass inserts nothing
    'stopped': bool(sampled.stopped_B[row]),
  }


def prompt_of(example) -> dict:
  """The given part of an example whose free tokens come last: its last gap is open."""
  given = example['tokens'][example['fixed']]
  return {'tokens': given, 'open': np.arange(len(given)) == len(given) - 1, 'free': int((~example['fixed']).sum())}
