"""Evaluate a model on a data split: validation loss, likelihood, and sampled answers scored by the task."""

import functools
from typing import NamedTuple

import jax
import numpy as np

from ilm_jax import metrics as metrics_lib
from ilm_jax.data import pipeline
from ilm_jax.distributed import sharding
from ilm_jax.evaluation.progress import Progress
from ilm_jax.inference import static_batching
from ilm_jax.models import transformer
from ilm_jax.types import Metrics


class Scores(NamedTuple):
  """Metrics of sampled answers, and some of the answers as text."""

  pairs: Metrics  # {metric name: (total, weight)}; the metric is total / weight
  texts: list[str]  # the first `eval.print_samples` answers, formatted for printing
  order_counts_NxN: np.ndarray = np.zeros((0, 0), int)  # number of tokens by [decoding step, answer position]
  samples: tuple[str, ...] = ()  # all answers as plain text; empty if the task scores answers as right or wrong


class Likelihood(NamedTuple):
  """The negative log-likelihood of each string, including its end, in nats, or an estimated upper bound on it."""

  kind: str  # 'exact', 'bound' (an upper bound) or 'importance-weighted' (an estimate)
  nll_N: np.ndarray
  error_N: np.ndarray  # standard error of each NLL in nats; 0 if it is exact
  tokens_N: np.ndarray  # number of tokens of each string, without the end token

  def pairs(self) -> Metrics:
    """Return the metrics `nll` (nats per string), `nll_per_token` (the end counts as a token) and `nll_variance`.

    `nll_variance` is the mean of the squared standard errors of the strings: sqrt(nll_variance / number of strings) is
    the standard error of `nll` due to sampling.
    """
    count = float(len(self.nll_N))
    return {
      'nll': (float(self.nll_N.sum()), count),
      'nll_per_token': (float(self.nll_N.sum()), float(self.tokens_N.sum() + count)),
      'nll_variance': (float(np.square(self.error_N).sum()), count),
    }


class Evaluator:
  """Evaluates parameters on the splits of a task; its functions are compiled once and reused throughout training."""

  def __init__(self, cfg, *, model_cfg, family, task, sample_cfg, loss_cfg, mesh):
    self.cfg, self.family, self.task, self.mesh = cfg, family, task, mesh
    parts = sharding.num_row_shards(mesh)
    sample_batch = min(cfg.eval.batch_size, cfg.eval.samples or cfg.eval.batch_size)
    # Batch sizes are rounded up to a multiple of the number of batch shards; the additional rows are padding.
    self.rows, sampler_rows = (-(-count // parts) * parts for count in (cfg.eval.batch_size, sample_batch))
    self.sampler = static_batching.StaticSampler(model_cfg, family, sample_cfg, sampler_rows, mesh)
    self.tokenizer = task.tokenizer(cfg.task)
    self.sources = {}
    self._kind = None  # kind of likelihood that `score` computes; set when `score` is traced

    def loss(params, batch):
      return family.loss(transformer.apply_batch(model_cfg, params, batch), batch, loss_cfg)

    def score(params, rng, rows):
      args = rows['tokens_BxL'], rows['fixed_BxL'], rows['length_B']
      options = {'kind': cfg.eval.score or None, 'longest': task.longest_answer(cfg.task)}
      scored = family.score(transformer.Forward(model_cfg, params), rng, *args, sample_cfg, **options)
      self._kind = scored.kind
      return scored[1:]

    self._loss, self._score = (
      jax.jit(sharding.with_mesh(mesh)(function), out_shardings=sharding.replicated(mesh)) for function in (loss, score)
    )

  def source(self, split: str):
    """Return the examples of a data split, loaded at the first call."""
    if split not in self.sources:
      self.sources[split] = self.task.source(self.cfg.task, split)
    return self.sources[split]

  def validation_loss(self, params, split: str = 'validation') -> Metrics:
    """Compute the loss and its components on a split; each example is corrupted in the same way at every call."""
    batches = pipeline.validation_batches(self.source(split), self.family.corrupt, self.cfg)
    pairs = (jax.device_get(self._loss(params, sharding.put_global_batch(batch, self.mesh))) for batch in batches)
    return functools.reduce(metrics_lib.add, pairs, {})

  def likelihood(self, params, split: str, *, interrupted=lambda: False) -> Likelihood | None:
    """Compute the likelihood of the true answers of a split; return None if `interrupted()` becomes true."""
    source, size, parts = self.source(split), self.cfg.eval.batch_size, []
    progress = Progress(f'{split}: likelihood of answers', len(source))
    for first in range(0, len(source), size):
      if interrupted():
        return None
      progress.update(first)
      examples = [source[i] for i in range(first, min(first + size, len(source)))]
      length = max(self.sampler.cfg.max_length, *(len(example['tokens']) for example in examples))
      rows = sharding.put_global_batch(static_batching.pad_examples(examples, self.rows, length), self.mesh)
      rng = jax.random.fold_in(jax.random.fold_in(jax.random.key(self.cfg.seed), 0x4C4C), first)
      parts.append([array[: len(examples)] for array in jax.device_get(self._score(params, rng, rows))])
    return Likelihood(self._kind, *(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))

  def sample_answers(self, params, split: str, *, progress: bool = False, interrupted=lambda: False) -> Scores | None:
    """Sample answers to the prompts of a split (the first `eval.samples` if set); score them if `task.score` exists.

    `progress` logs how many answers are done. If `interrupted()` is true after an example, None is returned.
    """
    source, task, cfg = self.source(split), self.task, self.cfg
    total, texts, samples = {}, [], []
    order_counts_NxN = np.zeros((max(self.sampler.cfg.max_length, self.sampler.cfg.max_steps or 0),) * 2, np.int64)
    examples = [source[i] for i in range(min(len(source), cfg.eval.samples or len(source)))]
    rng = jax.random.fold_in(jax.random.key(cfg.seed), 0x53)
    log = Progress(f'{split}: answers', len(examples))
    prompts = [static_batching.prompt_of(example) for example in examples]
    for done, (example, row) in enumerate(zip(examples, self.sampler(params, rng, prompts), strict=True), 1):
      inserted = row['order'] >= 0
      steps = row['order'][inserted].tolist()
      reference = example['tokens'][~example['fixed']]
      pairs = {
        **(task.score(row['tokens'][inserted], reference, cfg.task) if task.score else {}),
        'stopped': (float(row['stopped']), 1.0),
        'length': (float(len(steps)), 1.0),
        'reference_length': (float(len(reference)), 1.0),
        **metrics_lib.order_statistics(steps, task.landmark(row['tokens'], cfg.task)),
      }
      if task.score:  # for generated text, a matrix of order counts would be large and uninformative
        np.add.at(order_counts_NxN, (steps, np.arange(len(steps))), 1)
      else:
        samples.append(task.decode(row['tokens'], cfg.task))
      total = metrics_lib.add(total, pairs)
      if len(texts) < cfg.eval.print_samples:
        texts.append(show(task, self.tokenizer, row, example, cfg.task))
      if interrupted():
        return None
      if progress:
        log.update(done)
    # Remove the rows and columns of decoding steps and answer positions that no answer reached.
    used = int(max(np.flatnonzero(order_counts_NxN.sum(0) + order_counts_NxN.sum(1)), default=-1)) + 1
    return Scores(total, texts, order_counts_NxN[:used, :used], tuple(samples))


def show(task, tokenizer, row, example, cfg) -> str:
  """Format a sampled answer for printing: right or wrong, then the tokens present after each decoding step.

  New tokens are in brackets. If there are more than 12 steps, only steps 1, 2, 4, 8, ... and the last one are shown. If
  the task has no right answers, the text is formatted by `show_text`.
  """
  if task.score is None:
    return show_text(task, row, cfg)
  tokens, order = row['tokens'], row['order']
  score = task.score(tokens[order >= 0], example['tokens'][~example['fixed']], cfg)
  lines = [('right  ' if score['exact_match'][0] == 1 else 'wrong  ') + task.decode(tokens, cfg)]
  steps = int(order.max(initial=-1)) + 1
  shown = range(steps) if steps <= 12 else sorted({2**i - 1 for i in range(steps.bit_length())} | {steps - 1})
  inserted = [(word, o) for word, o in zip(tokenizer.pieces(tokens), order, strict=True) if o >= 0]
  for step in shown:
    words = [f'[{word}]' if o == step else word for word, o in inserted if o <= step]
    lines.append(f'  {step + 1:3d}  ' + ' '.join(words))
  return '\n'.join(lines)


def show_text(task, row, cfg) -> str:
  """Format a sampled text for printing: length, reason for stopping, the text, and its state at three earlier steps."""
  tokens, order = row['tokens'], row['order']
  steps = int(order.max(initial=-1)) + 1
  ended = 'stopped by the model' if row['stopped'] else 'stopped by the length or step limit'

  def printable(ids):
    return ''.join(c if c.isprintable() or c == '\n' else ascii(c)[1:-1] for c in task.decode(ids, cfg))

  lines = [f'{int((order >= 0).sum())} tokens, {ended}', *printable(tokens).split('\n')]
  for quarter in (1, 2, 3) if steps >= 4 else ():
    step = steps * quarter // 4
    lines.append(f'  after {step} of {steps} steps: ' + ' '.join(printable(tokens[order < step]).split()))
  return '\n'.join(lines)
