"""The Python API of a trained model: `load`, and `LanguageModel` with `generate`, `infill`, `score` and `trace`.

lm = ilm_jax.load('runs/stories')
lm.generate(['Once upon a time'])                          completions of prompts; [''] gives an unconditional sample
lm.infill('Tom had a ___ . He was ___ .', n=3)             three ways to fill the gaps; the given text is preserved
lm.score(['The dog ran home.'])                            negative log-likelihood, or an upper bound on it
lm.trace('Tom had a ___ .', path='trace.html')             an HTML page that animates the insertions
"""

import contextlib
from typing import NamedTuple

import jax
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from ilm_jax import families, paths, tasks
from ilm_jax.distributed import sharding
from ilm_jax.families import settings as settings_lib
from ilm_jax.families.contract import check_completion
from ilm_jax.inference import continuous_batching, infilling, static_batching, traces
from ilm_jax.inference.checks import check_ids, check_list, check_memory, check_samples, check_whole
from ilm_jax.models import transformer
from ilm_jax.runs import checkpoint as checkpoint_lib
from ilm_jax.runs import run_file
from ilm_jax.special_tokens import UNK
from ilm_jax.types import UserError, check_seed


class Generation(NamedTuple):
  """A prompt with its completion, and a record of how the completion was decoded."""

  text: str  # the prompt and its completion
  tokens: list[str]  # the tokens of the whole sequence as strings, including the special tokens and the prompt
  order: list[int]  # the decoding step that inserted each token, counted from 0; -1 for given tokens
  probabilities: list[float]  # the model's probability of each insertion (gap and token together), at temperature 1
  stop_probabilities: list[float]  # the model's p(stop) at each forward pass
  stopped: bool  # True if the model ended the text, False if a length limit ended it


class Infilling(NamedTuple):
  """A text with its gaps filled, and a record of how the fillings were decoded."""

  text: str  # the whole text, with its gaps filled
  fillings: list[str]  # the generated text in each gap
  spans: list[tuple[int, int]]  # (start, end) offset of each filling in `text`, in characters
  tokens: list[str]  # this field and the following ones: see `Generation`
  order: list[int]
  probabilities: list[float]
  stop_probabilities: list[float]
  stopped: bool


class TextScore(NamedTuple):
  """The negative log-likelihood (NLL) of a text, including its end, or an upper bound on the NLL."""

  nll: float  # the NLL or its upper bound, in nats
  error: float  # standard error of `nll` in nats, if it is estimated by sampling; 0 if it is exact
  tokens: int  # number of tokens of the text, not counting its end
  kind: str  # 'exact', 'bound' or 'importance-weighted'


@jax.enable_x64(False)
def load(workdir, checkpoint='best', *, mesh=None, **sampling_settings) -> 'LanguageModel':
  """Load the trained model of a run for generation, infilling and scoring.

  Args:
    workdir: folder of the run, local or in a bucket.
    checkpoint: 'best' (by the run's validation metric), 'latest', or a training step.
    mesh: device mesh as text, such as 'data=2,tensor=4', or 'data=-1' for all devices; None uses the first device.
    **sampling_settings: override settings in the run's `sampling` section; a dict overrides only some fields of a
      rule: token={'top_p': 0.2}. Also `batch_size`, the number of texts decoded at a time.

  Raises:
    UserError: the run or the checkpoint does not exist, or a sampling setting is unknown, out of range or needs more
      memory than is available.
  """
  workdir = paths.resolve(workdir, 'workdir')
  if isinstance(mesh, str):
    mesh = sharding.make_mesh(sharding.read_mesh(mesh))
  cfg = ConfigDict(run_file.read_config(workdir))
  family, task = families.get(cfg.family), tasks.get(cfg.task.name)
  task.resolve_assets(cfg.task, workdir)
  model_settings = {**cfg.model.to_dict(), **family.model_settings(cfg)}
  model_cfg = transformer.ModelConfig.create(task.tokenizer(cfg.task).vocab_size, **model_settings)
  if mesh is not None and (message := sharding.check_model(model_cfg, mesh)):
    logging.warning('%s', message)
  checkpoints = checkpoint_lib.Checkpoints(workdir, metric=cfg.eval.metric, mode=cfg.eval.mode, read_only=True)
  step = checkpoints.find(checkpoint)
  params = checkpoints.restore_weights(step, transformer.abstract_params(model_cfg, mesh))
  return LanguageModel(cfg, model_cfg, params, step=step, mesh=mesh, **sampling_settings)


class LanguageModel:
  """A trained model: weights, the family that defines the likelihood and the sampler, and the task with its tokenizer.

  `load` makes one from a run. `cfg` is the run's config, `step` the training step of the checkpoint, `batch_size` the
  number of texts decoded at a time, and `sampling_settings` are described in `load`.
  """

  def __init__(self, cfg: ConfigDict, model_cfg: transformer.ModelConfig, params, *, step: int = 0,
               batch_size: int = 64, mesh=None, **sampling_settings):  # fmt: skip
    self.cfg, self.model_cfg, self.params, self.step = cfg, model_cfg, params, step
    self.family, self.task = families.get(cfg.family), tasks.get(cfg.task.name)
    self.tokenizer = self.task.tokenizer(cfg.task)
    known = {*self.family.SampleConfig._fields, 'two_stage'}
    if 'joint' in sampling_settings:
      sampling_settings.setdefault('two_stage', False)
    settings = cfg.sampling.to_dict()
    for name, value in sampling_settings.items():
      if name in settings_lib.KNOWN and name not in known:
        raise UserError(f'sampling setting {name!r} does not apply to family={cfg.family}: remove it')
      is_partial_rule = name in settings_lib.RULES and isinstance(value, dict)
      settings[name] = {**(settings.get(name) or {}), **value} if is_partial_rule else value
    self.sample_cfg = families.make_sample_config(
      self.family, cfg, settings, suppressed_tokens=self.tokenizer.special_ids, byte_ids=self.tokenizer.byte_ids,
      compute=model_cfg.compute,
    )  # fmt: skip
    check_whole('batch_size', batch_size, least=1)
    check_memory(self.sample_cfg, model_cfg, batch_size, 1 if mesh is None else mesh.size)
    self.batch_size = batch_size
    self.sampler = continuous_batching.ContinuousSampler(model_cfg, self.family, self.sample_cfg, batch_size, mesh=mesh)
    replicated = {} if mesh is None else {'out_shardings': sharding.replicated(mesh)}
    score_rows = sharding.with_mesh(mesh)(self._score_rows)
    self._scorer = jax.jit(score_rows, static_argnames=('kind', 'longest'), **replicated)
    self._score_kinds = {}  # (requested kind, longest) -> computed kind; filled when `_score_rows` is traced

  # --- sampling -------------------------------------------------------------------------------------------------------

  def generate(self, prompts: list[str], *, seed: int = 0, ids: list[int] | None = None) -> list[Generation]:
    """Generate a completion of each prompt, in the same order.

    Args:
      prompts: prompts in the text format of the task; '' asks for an unconditional sample.
      seed: random seed of sampling.
      ids: a number for each prompt, by default its index. A completion depends on the seed, its number and its prompt,
        not on the other prompts.

    Raises:
      UserError: a prompt has the wrong format, contains an unknown token, or is too long.
    """
    check_list('generate', prompts, 'prompts')
    results = dict(self.stream(prompts, seed=seed, ids=ids))
    return [results[i] for i in range(len(results))]

  def infill(self, texts, *, n: int | None = None, marker: str = infilling.MARKER, least=None, most=None,
             seed: int = 0):  # fmt: skip
    """Fill the gaps of texts; the given text is preserved exactly.

    Args:
      texts: one text with a marker at each gap; or a list of texts, each with markers or as a list of the parts around
        its gaps: ['Tom had a ___ .', ['He was ', ' .']].
      n: number of samples for each text; None returns a single Infilling for each text instead of a list.
      marker: string that marks a gap.
      least: minimum number of tokens in a gap, 1 by default (0 allows empty fillings): one number for all gaps, or a
        list with a number for each gap.
      most: maximum number of tokens in a gap, in the same form as `least`; None means no limit.
      seed: random seed of sampling.

    Returns:
      For one text, an Infilling, or a list of n Infillings if n is given; for a list of texts, a list of these results.

    Raises:
      UserError: a text has no gap or is too long, the limits contradict each other, or the family cannot fill the gaps.
    """
    single, count = isinstance(texts, str), 1 if n is None else n
    check_whole('n', count, least=1)
    check_list('infill', [] if single else texts, 'texts')
    requests = [
      self.gaps(text, marker=marker, least=least, most=most, number=number)
      for number, text in enumerate([texts] if single else texts)
    ]
    check_samples(len(requests) * count, f'n={n}')
    ids = [request_number(i, j) for i in range(len(requests)) for j in range(count)]
    results = dict(self.stream([request for request in requests for _ in range(count)], seed=seed, ids=ids))
    lists = [[results[i * count + j] for j in range(count)] for i in range(len(requests))]
    infillings = lists if n is not None else [samples[0] for samples in lists]
    return infillings[0] if single else infillings

  def stream(self, requests, *, seed: int = 0, ids: list[int] | None = None):
    """Decode prompts and infill requests together, by continuous batching.

    Args:
      requests: prompts (strings) and infill requests (made by `gaps`), in any order; all are checked before decoding
        starts, and a UserError names an invalid one.
      seed: random seed of sampling.
      ids: a number for each request, by default its index; see `generate`.

    Yields:
      (index of the request, Generation or Infilling), in the order in which requests finish.
    """
    check_seed(seed)
    requests = list(requests)
    if ids is not None:
      check_ids(ids, len(requests))
    prompts = [self.encode(request, number) for number, request in enumerate(requests)]
    for index, row in self.sampler(self.params, jax.random.key(seed), prompts, ids):
      check_completion(self.family, prompts[index], row)
      yield index, self._result(requests[index], row)

  def gaps(self, text, *, marker: str = infilling.MARKER, least=None, most=None, number: int = 0) -> infilling.Gaps:
    """Return a text with gaps as an infill request for `stream`.

    The arguments are those of `infill`; `number` is the index of the text, for the messages of UserErrors.
    """
    usual = 1 if self.family.fills == 'limits' else 0
    with errors_of(f'text {number + 1}'):
      return infilling.parse_request(text, marker=marker, least=least, most=most, default_least=usual)

  def encode(self, request, number: int = 0) -> dict:
    """Convert a prompt or infill request to the sampler's input, a dict described in `static_batching.StaticSampler`.

    `number` is the index of the request, for the messages of UserErrors.
    """
    limit, max_steps = self.sample_cfg.max_length, self.sample_cfg.max_steps
    with errors_of(f'{"text" if isinstance(request, infilling.Gaps) else "prompt"} {number + 1}'):
      if isinstance(request, infilling.Gaps):
        given = infilling.encode(request, self.tokenizer, limit=limit, masks=self.family.fills == 'masks')
        least = sum(request.least)
        if max_steps is not None and given['open'].any() and least > max_steps:
          raise UserError(f'the gaps need at least {least} tokens, more than sampling.max_steps={max_steps}')
      elif isinstance(request, str):
        tokens = np.array(self.task.encode_prompt(request, self.cfg.task), np.int32)
        if (count := len(tokens)) >= limit:
          problem = f'{count} tokens leave no room for a completion within sampling.max_length={limit}'
          raise UserError(f'{problem}: shorten the prompt')
        given = {'tokens': tokens, 'open': np.arange(len(tokens)) == len(tokens) - 1}
      else:
        raise UserError(f'expected a text, got {repr(request)[:60]}')
      static_batching.check(given, self.family, self.sample_cfg)
    return given

  def _result(self, request, row: dict):
    """Convert a sampled row of tokens to the Generation or Infilling that answers a request."""
    decoding = {
      'tokens': self.tokenizer.pieces(row['tokens']),
      'order': row['order'].tolist(),
      'probabilities': [round(float(p), 6) for p in np.exp(row['log_prob'])],
      'stop_probabilities': [round(float(p), 6) for p in row['stop_prob']],
      'stopped': row['stopped'],
    }
    if isinstance(request, infilling.Gaps):
      return Infilling(**infilling.decode(request, row, self.tokenizer)._asdict(), **decoding)
    return Generation(text=self.task.decode(row['tokens'], self.cfg.task), **decoding)

  def trace(self, text, *, path=None, marker: str = infilling.MARKER, seed: int = 0) -> str:
    """Complete a prompt or fill the gaps of a text, and return an HTML page that animates the insertions.

    Args:
      text: a prompt, or a text with markers at its gaps; or a list of these, in which a text with gaps may also be a
        list of the parts around its gaps.
      path: file to which the page is also written, if given. The page needs no network access, and shows exactly the
        characters of the result's `text`.
      marker: string that marks a gap.
      seed: random seed of sampling.
    """
    path = None if path is None else paths.resolve(path, 'path')
    texts = [text] if isinstance(text, str) else list(text)
    requests = [
      t if isinstance(t, str) and marker not in t else self.gaps(t, marker=marker, number=i)
      for i, t in enumerate(texts)
    ]
    results = dict(self.stream(requests, seed=seed))
    page = self.page([results[i] for i in range(len(requests))])
    if path is not None:
      try:
        path.write_text(page, encoding='utf-8')
      except OSError as error:
        raise UserError(f'path={path}: the page could not be written: {error.strerror or error}') from None
    return page

  def page(self, made: list) -> str:
    """Return an HTML page that animates the insertions of Generations and Infillings, as `trace` does."""
    ids_of_pieces = {piece: i for i, piece in enumerate(self.tokenizer.pieces(range(self.tokenizer.vocab_size)))}
    return traces.page([self._record(result, ids_of_pieces) for result in made])

  def _record(self, result, ids_of_pieces: dict[str, int]) -> dict:
    """Return the data of the trace page for one Generation or Infilling."""
    tokens, order = np.array([ids_of_pieces[piece] for piece in result.tokens]), np.array(result.order)
    if not isinstance(result, Infilling):
      is_star, backwards = self.cfg.task.name == 'star', self.cfg.task.get('order') == 'oracle'
      graph = traces.star_graph(result, backwards) if is_star else None
      return traces.record(result, ['', ''], lambda present: [self.task.decode(tokens[present], self.cfg.task)], graph)
    edges = [0, *(offset for span in result.spans for offset in span), len(result.text)]
    gaps = infilling.Gaps([result.text[i:j] for i, j in zip(edges[::2], edges[1::2], strict=True)], [], [])

    def decode(present):
      return infilling.decode(gaps, {'tokens': tokens[present], 'order': order[present]}, self.tokenizer).fillings

    return traces.record(result, gaps.parts, decode)

  # --- likelihood -----------------------------------------------------------------------------------------------------

  def score(self, texts: list[str], *, kind: str | None = None, seed: int = 0) -> list[TextScore]:
    """Return the negative log-likelihood of each text, or an upper bound on it; the run must have task.name=text.

    Args:
      texts: whole texts.
      kind: kind of likelihood: 'exact', 'bound' or 'importance-weighted'; None chooses the family's default. Not every
        family supports every kind.
      seed: random seed of 'bound' and 'importance-weighted', whose estimates also depend on a text's place in the list.

    Raises:
      UserError: the family does not support this kind, the task has prompts and answers, or a text is longer than
        sampling.max_length or contains characters unknown to the tokenizer.
    """
    check_list('score', texts, 'texts')
    check_seed(seed)
    if self.task.score is not None:
      raise UserError(f'score: the task {self.cfg.task.name} has prompts and answers: use ilm-jax eval with eval.score')
    limit = self.sample_cfg.max_length
    rows = [np.array(self.task.encode_prompt(text, self.cfg.task), np.int32) for text in texts]
    for number, row in enumerate(rows):
      if UNK in row:
        raise UserError(f'text {number + 1} contains characters unknown to the tokenizer, so it has no likelihood')
      if len(row) > limit:
        raise UserError(f'text {number + 1} has {len(row)} tokens, more than sampling.max_length={limit}; shorten it')
    longest = max((len(row) for row in rows), default=2) - 2
    self.family.check_score(kind, longest)
    # `longest` is a static argument of the jitted scorer, and only exact likelihoods need it; 0 avoids recompilation.
    options = {'kind': kind, 'longest': longest if kind == 'exact' else 0}
    out, batch_size = [], min(self.batch_size, 16)
    for first in range(0, len(rows), batch_size):
      chunk = rows[first : first + batch_size]
      size = static_batching.buffer_for(max(map(len, chunk)), self.sample_cfg)
      examples = [{'tokens': row, 'fixed': np.arange(len(row)) < 2} for row in chunk]
      batch = static_batching.pad_examples(examples, batch_size, size)
      with jax.enable_x64(False):
        rng = jax.random.fold_in(jax.random.key(seed), first)
        scored = self._scorer(self.params, rng, *batch.values(), **options)
      nll_B, error_B, tokens_B = jax.device_get(scored)
      score_kind = self._score_kinds[kind, options['longest']]
      out += [TextScore(float(nll_B[i]), float(error_B[i]), int(tokens_B[i]), score_kind) for i in range(len(chunk))]
    return out

  def _score_rows(self, params, rng, *rows, kind, longest):
    """Return the family's scores of a batch as arrays; store the kind of likelihood, a string, in `_score_kinds`."""
    forward = transformer.Forward(self.model_cfg, params)
    scored = self.family.score(forward, rng, *rows, self.sample_cfg, kind=kind, longest=longest)
    self._score_kinds[kind, longest] = scored.kind
    return scored[1:]


@contextlib.contextmanager
def errors_of(name: str):
  """Context manager: a UserError raised in the body gets the name of the request, such as 'prompt 3', as prefix."""
  try:
    yield
  except UserError as error:
    raise UserError(f'{name}: {error}') from None


def request_number(index: int, sample: int) -> int:
  """Return the number that seeds the sampling of one sample of a request; for sample 0, the index of the request."""
  return index if not sample else int(np.random.SeedSequence([index, sample]).generate_state(1)[0] >> 1)
