"""Evaluation: the loss on a fixed validation set, sampled answers, and the task's scores of them."""

import functools
import time
from typing import NamedTuple

import jax
import numpy as np
from absl import logging

from ilm_jax import metrics as metrics_lib
from ilm_jax.data import pipeline
from ilm_jax.distributed import sharding
from ilm_jax.inference import static_batching
from ilm_jax.models import transformer
from ilm_jax.special_tokens import BOS, CLS
from ilm_jax.types import Metrics


class Scores(NamedTuple):
  """Pairs of each metric, and a few answers to look at."""

  pairs: Metrics
  texts: list[str]
  places_NxN: np.ndarray = np.zeros((0, 0), int)  # [step, place in the answer]: how many tokens came in there and then
  samples: tuple[str, ...] = ()  # all the answers, of a task without right ones


class Likelihood(NamedTuple):
  """-log p of each string and its end, in nats, or an estimate of a bound of it."""

  kind: str  # 'exact', 'bound' or 'importance-weighted'
  nll_N: np.ndarray
  error_N: np.ndarray  # standard error of each estimate
  tokens_N: np.ndarray  # of each string, without the end

  def pairs(self) -> Metrics:
    """`nll` in nats a string, `nll_per_token` (the end is one too), `nll_variance`: the mean variance of an estimate.

    The root of the variance over the root of the number of strings is the standard error of `nll` due to the estimate.
    """
    count = float(len(self.nll_N))
    return {
      'nll': (float(self.nll_N.sum()), count),
      'nll_per_token': (float(self.nll_N.sum()), float(self.tokens_N.sum() + count)),
      'nll_variance': (float(np.square(self.error_N).sum()), count),
    }


class Evaluator:
  """Evaluates parameters on a split; what is compiled is kept between calls."""

  def __init__(self, cfg, *, model_cfg, family, task, sample_cfg, loss_cfg, mesh):
    self.cfg, self.family, self.task, self.mesh = cfg, family, task, mesh
    parts = sharding.row_parts(mesh)
    asked = min(cfg.eval.batch_size, cfg.eval.samples or cfg.eval.batch_size)
    self.rows, rows = (-(-count // parts) * parts for count in (cfg.eval.batch_size, asked))  # some may stay empty
    self.sampler = static_batching.Sampler(model_cfg, family, sample_cfg, rows, mesh)
    self.tokenizer = task.tokenizer(cfg.task)
    self.sources = {}

    @functools.partial(jax.jit, out_shardings=sharding.replicated(mesh))
    @sharding.on(mesh)
    def loss(params, batch):
      return family.loss(transformer.apply_batch(model_cfg, params, batch), batch, loss_cfg)

    self._loss = loss
    self._kind = None

    @functools.partial(jax.jit, out_shardings=sharding.replicated(mesh))
    @sharding.on(mesh)
    def score(params, rng, rows):
      args = rows['tokens_BxL'], rows['fixed_BxL'], rows['length_B']
      options = {'kind': cfg.eval.score or None, 'longest': task.longest_answer(cfg.task)}
      scored = family.score(transformer.Forward(model_cfg, params), rng, *args, sample_cfg, **options)
      self._kind = scored.kind
      return scored[1:]

    self._score = score

  def source(self, split: str):
    """The examples of a split."""
    if split not in self.sources:
      self.sources[split] = self.task.source(self.cfg.task, split)
    return self.sources[split]

  def validation_loss(self, params, split: str = 'validation') -> Metrics:
    """The loss and its parts on a fixed, stratified corruption of a split."""
    total = {}
    for batch in pipeline.validation_batches(self.source(split), self.family.corrupt, self.cfg):
      total = metrics_lib.add(total, jax.device_get(self._loss(params, sharding.put_batch(batch, self.mesh))))
    return total

  def likelihood(self, params, split: str, *, interrupted=lambda: False) -> Likelihood | None:
    """-log p of a split's answers; None when `interrupted` says so between two batches."""
    source, size, parts = self.source(split), self.cfg.eval.batch_size, []
    start = said = time.monotonic()
    for first in range(0, len(source), size):
      if interrupted():
        return None
      if first and time.monotonic() - said > 10:
        said = time.monotonic()
        left = (len(source) - first) * (said - start) / first
        logging.info('%s: likelihood of %d of %d answers, %.0f s left', split, first, len(source), left)
      examples = [source[i] for i in range(first, min(first + size, len(source)))]
      rows = self.rows_of(examples, self.rows)
      rng = jax.random.fold_in(jax.random.fold_in(jax.random.key(self.cfg.seed), 0x4C4C), first)
      scored = jax.device_get(self._score(params, rng, sharding.put_batch(rows, self.mesh)))
      parts.append([array[: len(examples)] for array in scored])
    return Likelihood(self._kind, *(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))

  def rows_of(self, examples, rows: int) -> dict:
    """Whole examples as padded rows; rows that are left over hold [CLS] and [BOS] alone."""
    length = max(self.sampler.cfg.max_length, max(len(example['tokens']) for example in examples))
    batch = {
      'tokens_BxL': np.zeros((rows, length), np.int32),
      'fixed_BxL': np.ones((rows, length), bool),
      'length_B': np.full(rows, 2, np.int32),
    }
    batch['tokens_BxL'][:, :2] = CLS, BOS
    for row, example in enumerate(examples):
      n = len(example['tokens'])
      batch['tokens_BxL'][row, :n] = example['tokens']
      batch['fixed_BxL'][row, :n] = example['fixed']
      batch['length_B'][row] = n
    return batch

  def answers(self, params, split: str, *, progress: bool = False, interrupted=lambda: False) -> Scores | None:
    """Sample an answer to every prompt of a split, or to the first `eval.samples`; score it where the task can.

    Args:
      params: of the model.
      split: whose prompts.
      progress: log a rate and what is left from time to time.
      interrupted: asked between examples; when it says so, the result is None.
    """
    source, total, texts, samples = self.source(split), {}, [], []
    places_NxN = np.zeros((max(self.sampler.cfg.max_length, self.sampler.cfg.max_steps or 0),) * 2, np.int64)
    count = min(len(source), self.cfg.eval.samples or len(source))
    examples = [source[i] for i in range(count)]
    rng = jax.random.fold_in(jax.random.key(self.cfg.seed), 0x53)
    start = said = time.monotonic()
    prompts = [static_batching.prompt_of(example) for example in examples]
    for done, (example, row) in enumerate(zip(examples, self.sampler(params, rng, prompts), strict=True), 1):
      free = row['tokens'][row['order'] >= 0]
      pairs = {}
      if self.task.score is not None:
        pairs |= self.task.score(free, example['tokens'][~example['fixed']], self.cfg.task)
      pairs['stopped'] = (float(row['stopped']), 1.0)
      pairs['length'] = (float(len(free)), 1.0)
      pairs['reference_length'] = (float((~example['fixed']).sum()), 1.0)
      steps = row['order'][row['order'] >= 0].tolist()
      landmark = self.task.landmark(row['tokens'], self.cfg.task)
      pairs |= metrics_lib.order_statistics(steps, landmark)
      if self.task.score is not None:  # of texts, it would be large and say little
        np.add.at(places_NxN, (steps, np.arange(len(steps))), 1)
      else:
        samples.append(self.task.decode(row['tokens'], self.cfg.task))
      total = metrics_lib.add(total, pairs)
      if len(texts) < self.cfg.eval.print_samples:
        texts.append(show(self.task, self.tokenizer, row, example, self.cfg.task))
      if interrupted():
        return None
      if progress and time.monotonic() - said > 10:
        said = time.monotonic()
        rate = done / (said - start)
        logging.info('%s: %d of %d answers, %.0f a second, %.0f s left', split, done, len(examples), rate,
                     (len(examples) - done) / rate)  # fmt: skip
    used = int(max(np.flatnonzero(places_NxN.sum(0) + places_NxN.sum(1)), default=-1)) + 1
    return Scores(total, texts, places_NxN[:used, :used], tuple(samples))


def show(task, tokenizer, row, example, cfg) -> str:
  """An answer for people: whether it is right and its tokens as they came in, step by step; or a text as it grew."""
  tokens, order = row['tokens'], row['order']
  if task.score is None:
    return show_text(task, row, cfg)
  pairs = task.score(tokens[order >= 0], example['tokens'][~example['fixed']], cfg)
  right = pairs['exact_match'][0] == 1
  lines = [('right  ' if right else 'wrong  ') + task.decode(tokens, cfg)]
  steps = int(order.max(initial=-1)) + 1
  shown = range(steps) if steps <= 12 else sorted({2**i - 1 for i in range(steps.bit_length())} | {steps - 1})
  for step in shown:
    words = [
      f'[{word}]' if o == step else word
      for word, o in zip(tokenizer.pieces(tokens), order, strict=True)
      if 0 <= o <= step
    ]
    lines.append(f'  {step + 1:3d}  ' + ' '.join(words))
  return '\n'.join(lines)


def show_text(task, row, cfg) -> str:
  """A text and how it ended, and what was there after a quarter, a half and three quarters of the steps."""
  tokens, order = row['tokens'], row['order']
  steps = int(order.max(initial=-1)) + 1
  ended = 'it stopped' if row['stopped'] else 'a limit ended it'

  def printable(ids):
    return ''.join(c if c.isprintable() or c == '\n' else '\ufffd' for c in task.decode(ids, cfg))

  lines = [f'{int((order >= 0).sum())} tokens, {ended}', *printable(tokens).split('\n')]
  for quarter in (1, 2, 3) if steps >= 4 else ():
    step = steps * quarter // 4
    lines.append(f'  after {step} of {steps} steps: ' + ' '.join(printable(tokens[order < step]).split()))
  return '\n'.join(lines)
