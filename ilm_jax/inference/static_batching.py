"""Static batching: pad prompts to batches of a fixed size, and run a family's jitted sampler on each batch."""

import functools

import jax
import numpy as np

from ilm_jax.distributed import sharding
from ilm_jax.models import transformer
from ilm_jax.special_tokens import BOS, CLS
from ilm_jax.types import UNLIMITED, Prompt, Sampled, UserError


class StaticSampler:
  """Samples prompts in static batches of `batch_size` rows, sharded over a device mesh if one is given.

  Calls take the parameters, so one sampler serves all steps of a training run. `sample_cfg` holds the sampling settings
  of the model's family (`families.*.SampleConfig`).
  """

  def __init__(self, model_cfg, family, sample_cfg, batch_size: int, mesh=None):
    self.family, self.cfg, self.batch_size, self.mesh = family, sample_cfg, batch_size, mesh
    if mesh is not None:
      sharding.check_rows(batch_size, mesh, 'eval.batch_size')
    shardings = {} if mesh is None else {'out_shardings': sharding.replicated(mesh)}

    @functools.partial(jax.jit, **shardings)
    @sharding.with_mesh(mesh)
    def run(params, rng, prompt):
      return family.sample(transformer.Forward(model_cfg, params), rng, prompt, sample_cfg)

    self._run = run

  def __call__(self, params, rng, prompts: list[dict], requests=None):
    """Sample a completion of each prompt; yield, in order, a dict of its sampled row without padding (see `cut`).

    Args:
      params: parameters of the transformer.
      rng: random key, shared by all prompts.
      prompts: dicts with 'tokens' (int[n]) and 'open' (bool[n]: whether tokens may be inserted right of this one),
        and optionally 'free' (number of tokens to generate), 'least' and 'most' (int[n]: limits on the number of tokens
        inserted there). UserError if one is too long or not supported by the family.
      requests: a number for each prompt, by default 0, 1, ...; only this number and `rng` determine a row's randomness.
    """
    for prompt in prompts:
      check(prompt, self.family, self.cfg)
    requests = list(range(len(prompts)) if requests is None else requests)
    for first in range(0, len(prompts), self.batch_size):
      chunk = prompts[first : first + self.batch_size]
      size = buffer_for(max(len(given['tokens']) for given in chunk), self.cfg)
      batch = pad(chunk, requests[first : first + len(chunk)], self.batch_size, size)
      if self.mesh is not None:
        batch = Prompt(**sharding.put_global_batch(batch._asdict(), self.mesh))
      with jax.enable_x64(False):
        sampled = jax.device_get(self._run(params, rng, batch))
      for row in range(len(chunk)):
        yield cut(sampled, row)


def check(given: dict, family, cfg) -> None:
  """Raise UserError if a prompt is longer than sampling.max_length, or not supported by the family."""
  if len(given['tokens']) > cfg.max_length:
    raise UserError(
      f'a prompt of {len(given["tokens"])} tokens is longer than sampling.max_length={cfg.max_length}: '
      'shorten it, or raise the limit'
    )
  family.check_prompt(given, cfg)


def buffer_for(longest: int, cfg) -> int:
  """Return a buffer length for rows of up to `longest` tokens, one of a few lengths so that few shapes are compiled."""
  size = cfg.min_buffer
  while size < longest:
    size *= 2
  return min(size, cfg.max_length)


def pad(prompts: list[dict], requests: list[int], rows: int, size: int) -> Prompt:
  """Pad prompts to a batch of `rows` rows with `size` positions; rows without a prompt have length 0."""
  prompt = Prompt(
    tokens_BxL=np.zeros((rows, size), np.int32),
    length_B=np.zeros(rows, np.int32),
    open_BxL=np.zeros((rows, size), bool),
    request_B=np.zeros(rows, np.int32),
    free_B=np.full(rows, -1, np.int32),
    least_BxL=np.zeros((rows, size), np.int32),
    most_BxL=np.full((rows, size), UNLIMITED, np.int32),
  )
  for row, (given, request) in enumerate(zip(prompts, requests, strict=True)):
    length = len(given['tokens'])
    prompt.length_B[row], prompt.request_B[row], prompt.free_B[row] = length, request, given.get('free', -1)
    for name in ('tokens', 'open', 'least', 'most'):
      if given.get(name) is not None:
        getattr(prompt, f'{name}_BxL')[row, :length] = given[name]
  return prompt


def pad_examples(examples, rows: int, size: int) -> dict:
  """Pad examples to be scored to a batch of `rows` rows; rows without an example contain only [CLS] and [BOS]."""
  tokens_BxL, fixed_BxL = np.zeros((rows, size), np.int32), np.ones((rows, size), bool)
  tokens_BxL[:, :2] = CLS, BOS
  length_B = np.full(rows, 2, np.int32)
  for row, example in enumerate(examples):
    length_B[row] = length = len(example['tokens'])
    tokens_BxL[row, :length], fixed_BxL[row, :length] = example['tokens'], example['fixed']
  return {'tokens_BxL': tokens_BxL, 'fixed_BxL': fixed_BxL, 'length_B': length_B}


def cut(sampled: Sampled, row: int) -> dict:
  """Return one row of a sampled batch as a dict of arrays without padding."""
  length, steps = int(sampled.length_B[row]), int(sampled.steps_B[row])
  return {
    'tokens': sampled.tokens_BxL[row, :length],
    'order': sampled.order_BxL[row, :length],
    'log_prob': sampled.log_prob_BxM[row, :steps],
    'stop_prob': sampled.stop_prob_BxM[row, : steps + 1],  # steps + 1 forward passes: the last one inserts no token
    'stopped': bool(sampled.stopped_B[row]),
  }


def prompt_of(example) -> dict:
  """Return the prompt of an example: its fixed tokens; only after the last of them may tokens be inserted."""
  given = example['tokens'][example['fixed']]
  return {'tokens': given, 'open': np.arange(len(given)) == len(given) - 1, 'free': int((~example['fixed']).sum())}
