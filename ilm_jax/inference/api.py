"""A trained model in Python.

lm = ilm_jax.load('runs/stories')
lm.generate(['Once upon a time'])                          texts that go on from prompts; [''] from nothing
lm.infill('Tom had a ___ . He was ___ .', n=3)             gaps of unknown length filled, the rest untouched
lm.score(['The dog ran home.'])                            -log p, or a bound of it
lm.trace('Tom had a ___ .', path='trace.html')             a page that plays the insertions
"""

from typing import NamedTuple

import jax
import numpy as np
from absl import logging
from etils import epath
from ml_collections import ConfigDict

from ilm_jax import families, tasks
from ilm_jax.distributed import sharding
from ilm_jax.families import growing
from ilm_jax.families import settings as settings_lib
from ilm_jax.inference import continuous_batching, infilling, static_batching, traces
from ilm_jax.models import transformer
from ilm_jax.runs import checkpoint, run_file
from ilm_jax.special_tokens import PAD, UNK
from ilm_jax.types import UserError


class Generation(NamedTuple):
  """One answer: the whole text, and how it came about."""

  text: str
  tokens: list[str]  # the whole row
  order: list[int]  # step at which each token was inserted, -1 for given ones
  probabilities: list[float]  # of each step's (gap, token) under the model
  stop_probabilities: list[float]  # seen at each forward pass
  stopped: bool  # by the stop head; False: a limit ended it


class Infilling(NamedTuple):
  """A text whose gaps were filled, and how it came about."""

  text: str
  fillings: list[str]  # of each gap
  spans: list[tuple[int, int]]  # where they are in the text, in characters
  tokens: list[str]
  order: list[int]
  probabilities: list[float]
  stop_probabilities: list[float]
  stopped: bool


class TextScore(NamedTuple):
  """Minus the log-likelihood of a text and its end, in nats, or an estimate of a bound of it."""

  nll: float
  error: float  # standard error of the estimate; 0 where it is exact
  tokens: int  # of the text, without the end
  kind: str  # 'exact', 'bound' or 'importance-weighted'


def load(workdir, checkpoint='best', *, mesh=None, **sampling_settings) -> 'LanguageModel':
  """Load the model of a run.

  Args:
    workdir: of the run, local or a bucket.
    checkpoint: 'best' on validation, 'latest', or a step.
    mesh: of devices that share the work, 'data=-1' for all of them, 'data=2,tensor=4'; None: the first device.
    **sampling_settings: fields of the family's SampleConfig that replace the run's (of a rule, a dict those fields
      that it has: token={'top_p': 0.2}); `batch_size`, the number of slots.

  Raises:
    UserError: no run or no such checkpoint there, or an unknown setting.
  """
  return LanguageModel.load(workdir, checkpoint, mesh=mesh, **sampling_settings)


class LanguageModel:
  """A family, a task and weights."""

  def __init__(self, cfg: ConfigDict, model_cfg: transformer.ModelConfig, params, *, step: int = 0, batch_size: int = 64,
               mesh=None, **sampling_settings):  # fmt: skip
    self.cfg, self.model_cfg, self.params, self.step = cfg, model_cfg, params, step
    self.family, self.task = families.get(cfg.family), tasks.get(cfg.task.name)
    self.tokenizer = self.task.tokenizer(cfg.task)
    known = {*self.family.SampleConfig._fields, 'two_stage'}
    for name in sampling_settings:
      if name in settings_lib.KNOWN and name not in known:
        raise UserError(f'sampling setting {name!r} means nothing to family={cfg.family}: leave it out')
    if 'joint' in sampling_settings:
      sampling_settings.setdefault('two_stage', False)
    settings = cfg.sampling.to_dict()
    for name, value in sampling_settings.items():
      some = name in settings_lib.RULES and isinstance(value, dict)  # fields of a rule
      settings[name] = {**(settings.get(name) or {}), **value} if some else value
    self.sample_cfg = families.make_sample_config(
      self.family, cfg, settings, closed_tokens=self.tokenizer.special_ids, compute=model_cfg.compute
    )
    self.batch_size = batch_size
    self.sampler = continuous_batching.ContinuousSampler(model_cfg, self.family, self.sample_cfg, batch_size, mesh=mesh)
    kept = {} if mesh is None else {'out_shardings': sharding.replicated(mesh)}
    self._scorer = jax.jit(sharding.on(mesh)(self._score_rows), static_argnames=('kind', 'longest'), **kept)
    self._kinds = {}  # of (kind, longest), once traced

  @classmethod
  def load(cls, workdir, which='best', *, mesh=None, **settings) -> 'LanguageModel':
    """See `load`."""
    if isinstance(mesh, str):
      mesh = sharding.make_mesh(sharding.read_mesh(mesh))
    cfg = ConfigDict(run_file.read_config(workdir))
    family, task = families.get(cfg.family), tasks.get(cfg.task.name)
    task.settle(cfg.task, workdir)
    model_settings = {**cfg.model.to_dict(), **family.model_settings(cfg)}
    model_cfg = transformer.ModelConfig.create(task.tokenizer(cfg.task).vocab_size, **model_settings)
    if mesh is not None and (said := sharding.check_model(model_cfg, mesh)):
      logging.warning('%s', said)
    saved = checkpoint.Checkpoints(workdir, metric=cfg.eval.metric, mode=cfg.eval.mode, read_only=True)
    step = saved.find(which)
    params = saved.restore_weights(step, transformer.abstract(model_cfg, mesh))
    return cls(cfg, model_cfg, params, step=step, mesh=mesh, **settings)

  # --- sampling -------------------------------------------------------------------------------------------------------

  def generate(self, prompts: list[str], *, seed: int = 0, ids: list[int] | None = None) -> list[Generation]:
    """Answer prompts, or go on from them.

    Args:
      prompts: in the task's text form.
      seed: of the randomness, where the sampling rules leave any.
      ids: an identity for each prompt, its index by default: an answer depends on the seed, its identity and its text,
        not on the other prompts.

    Returns:
      A Generation for each prompt, in their order.

    Raises:
      UserError: a prompt that can't be read, holds an unknown token, or is too long.
    """
    if isinstance(prompts, str):
      raise UserError('generate: expected a list of prompts, got one string')
    return [made for _, made in sorted(self.stream(prompts, seed=seed, ids=ids), key=lambda pair: pair[0])]

  def infill(self, texts, *, n: int | None = None, marker: str = infilling.MARKER, least=None, most=None,
             seed: int = 0):  # fmt: skip
    """Fill the gaps of texts; what is given comes back unchanged.

    Args:
      texts: a text with a marker at each gap; or a list of texts, each with markers or as the list of its parts around
        the gaps: ['Tom had a ___ .', ['He was ', ' .']].
      n: fillings of each text; None: one, and no list of it.
      marker: of a gap.
      least: tokens of each gap, at least, 1 by default (0 lets gaps stay empty); a number, or a list of one a gap.
      most: tokens of each gap, at most; None: no limit.
      seed: of the randomness.

    Returns:
      An Infilling (with n, a list of n) for one text; for a list of strings, a list of what one text gives.

    Raises:
      UserError: no gap, numbers that contradict each other, too long a text, a model that can't fill these gaps.
    """
    one = isinstance(texts, str)
    requests = [
      self.gaps(text, marker=marker, least=least, most=most, number=number)
      for number, text in enumerate([texts] if one else texts)
    ]
    count = 1 if n is None else n
    if count < 1:
      raise UserError(f'n={n}: expected at least 1')
    numbers = [(i, j) for i in range(len(requests)) for j in range(count)]
    ids = [request_number(i, j) for i, j in numbers]
    made = dict(self.stream([requests[i] for i, _ in numbers], seed=seed, ids=ids))
    lists = [[made[i * count + j] for j in range(count)] for i in range(len(requests))]
    found = lists if n is not None else [filled for (filled,) in lists]
    return found[0] if one else found

  def stream(self, requests, *, seed: int = 0, ids: list[int] | None = None):
    """Serve prompts (strings) and texts with gaps (`gaps`), mixed in one batch.

    Yields:
      (index of the request, Generation or Infilling), as they finish.
    """
    requests = list(requests)
    if ids is not None and (len(ids) != len(requests) or not all(0 <= number < 2**31 for number in ids)):
      raise UserError(f'ids: expected a number from 0 for each of the {len(requests)} requests, got {list(ids)[:8]}')
    given = [self.encode(request, number) for number, request in enumerate(requests)]
    for index, row in self.sampler(self.params, jax.random.key(seed), given, ids):
      yield index, self._made(requests[index], row)

  def gaps(self, text, *, marker: str = infilling.MARKER, least=None, most=None, number: int = 0) -> infilling.Gaps:
    """A request of `stream`: a text with gaps, see `infill`."""
    usual = 1 if self.family.fills == 'limits' else 0
    try:
      return infilling.read(text, marker=marker, least=least, most=most, usual=usual)
    except UserError as error:
      raise UserError(f'text {number + 1}: {error}') from None

  def encode(self, request, number: int = 0) -> dict:
    """A request as tokens with their open gaps; refuses one that cannot be served."""
    limit = self.sample_cfg.max_length
    if isinstance(request, infilling.Gaps):
      try:
        masks = self.family.fills == 'masks'
        given = infilling.encode(request, self.tokenizer, limit=limit, masks=masks)
        if (
          self.sample_cfg.max_steps is not None
          and given['open'].any()
          and sum(request.least) > self.sample_cfg.max_steps
        ):
          raise UserError(
            f'at least {sum(request.least)} tokens to come are more than sampling.max_steps={self.sample_cfg.max_steps}'
          )
        static_batching.check(given, self.family, self.sample_cfg)
      except UserError as error:
        raise UserError(f'text {number + 1}: {error}') from None
      return given
    if not isinstance(request, str):
      raise UserError(f'prompt {number + 1}: expected a text, got {repr(request)[:60]}')
    try:
      tokens = np.array(self.task.encode_prompt(request, self.cfg.task), np.int32)
    except UserError as error:
      raise UserError(f'prompt {number + 1}: {error}') from None
    if len(tokens) >= limit:
      raise UserError(
        f'prompt {number + 1} is too long: {len(tokens)} tokens leave no room for an answer in '
        f'sampling.max_length={limit}; shorten it'
      )
    given = {'tokens': tokens, 'open': np.arange(len(tokens)) == len(tokens) - 1}
    try:
      static_batching.check(given, self.family, self.sample_cfg)
    except UserError as error:
      raise UserError(f'prompt {number + 1}: {error}') from None
    return given

  def _made(self, request, row: dict):
    how = {
      'tokens': self.tokenizer.pieces(row['tokens']),
      'order': row['order'].tolist(),
      'probabilities': [round(float(p), 6) for p in np.exp(row['log_prob'])],
      'stop_probabilities': [round(float(p), 6) for p in row['stop_prob']],
      'stopped': row['stopped'],
    }
    if isinstance(request, infilling.Gaps):
      return Infilling(**infilling.decode(request, row, self.tokenizer)._asdict(), **how)
    return Generation(text=self.task.decode(row['tokens'], self.cfg.task), **how)

  def trace(self, text, *, path=None, marker: str = infilling.MARKER, seed: int = 0) -> str:
    """A page that plays how an answer comes about, or the filling of gaps if the text holds the marker.

    Args:
      text: a prompt or a text with gaps; or a list of them, where a text with gaps may be the list of its parts.
      path: file to write the page to.
      marker: of a gap.
      seed: of the randomness.

    Returns:
      The page, HTML that needs no network.
    """
    texts = [text] if isinstance(text, str) else list(text)
    requests = [
      t if isinstance(t, str) and marker not in t else self.gaps(t, marker=marker, number=i)
      for i, t in enumerate(texts)
    ]
    made = dict(self.stream(requests, seed=seed))
    page = self.page([made[i] for i in range(len(requests))])
    if path is not None:
      epath.Path(path).write_text(page)
    return page

  def page(self, made: list) -> str:
    """The page of `trace`, of answers that are there already."""
    return traces.page([traces.record(one, self.tokenizer.spell(one.tokens)) for one in made])

  # --- likelihood -----------------------------------------------------------------------------------------------------

  def score(self, texts: list[str], *, kind: str | None = None, seed: int = 0) -> list[TextScore]:
    """Minus the log-likelihood of whole texts.

    Args:
      texts: of a task of texts.
      kind: 'exact', 'bound' or 'importance-weighted', as the family has it; its own by default.
      seed: of the estimates ('bound' and 'importance-weighted'), which also depend on the place in the list.

    Raises:
      UserError: the family has no likelihood, or a text is longer than sampling.max_length.
    """
    if isinstance(texts, str):
      raise UserError('score: expected a list of texts, got one string')
    if self.task.score is not None:
      raise UserError(f'score: the task {self.cfg.task.name} has prompts and answers: use --mode=eval with eval.score')
    limit = self.sample_cfg.max_length
    rows = [np.array(self.task.encode_prompt(text, self.cfg.task), np.int32) for text in texts]
    longest = max((len(row) for row in rows), default=2) - 2
    for number, row in enumerate(rows):
      if UNK in row:
        raise UserError(f'text {number + 1} holds what the tokenizer does not know: it has no likelihood')
      if len(row) > limit:
        raise UserError(f'text {number + 1} has {len(row)} tokens: more than sampling.max_length={limit}; shorten it')
    self.family.check_score(kind, longest)
    # Only the exact value of an insertion model depends on the longest text; passes are padded to few lengths.
    options = {'kind': kind, 'longest': longest if kind == 'exact' else 0}
    out, few = [], min(self.batch_size, 16)
    for first in range(0, len(rows), few):
      part = rows[first : first + few]
      size = next(size for size in growing.buffers(1, self.sample_cfg) if size >= max(map(len, part)))
      batch = {
        'tokens_BxL': np.full((few, size), PAD, np.int32),
        'fixed_BxL': np.ones((few, size), bool),
        'length_B': np.full(few, 2, np.int32),
      }
      batch['tokens_BxL'][:, :2] = rows[0][:2]
      for i, row in enumerate(part):
        batch['tokens_BxL'][i, : len(row)], batch['length_B'][i] = row, len(row)
        batch['fixed_BxL'][i, 2 : len(row)] = False
      rng = jax.random.fold_in(jax.random.key(seed), first)
      nll_B, error_B, tokens_B = jax.device_get(self._scorer(self.params, rng, batch, **options))
      pairs = zip(nll_B, error_B, tokens_B, strict=True)
      out += [
        TextScore(float(a), float(b), int(c), self._kinds[tuple(options.values())])
        for a, b, c in list(pairs)[: len(part)]
      ]
    return out

  def _score_rows(self, params, rng, batch, *, kind, longest):
    forward = transformer.Forward(self.model_cfg, params)
    args = batch['tokens_BxL'], batch['fixed_BxL'], batch['length_B']
    scored = self.family.score(forward, rng, *args, self.sample_cfg, kind=kind, longest=longest)
    self._kinds[kind, longest] = scored.kind
    return scored[1:]


def request_number(index: int, sample: int) -> int:
  """The identity of one of several samples of a request; the first has that of the request."""
  return index if not sample else int(np.random.SeedSequence([index, sample]).generate_state(1)[0] >> 1)
