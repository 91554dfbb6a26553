"""The contract of a model family: what its module must define so that a model can be trained, sampled and evaluated.

`Family` lists everything that the rest of the package calls in a family. Its fields without a default are required.
docs/extending.md builds a family step by step.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, Protocol

import numpy as np
from ml_collections import ConfigDict

from ilm_jax.special_tokens import MASK
from ilm_jax.types import Batch, Metrics, Outputs, Prompt, Sampled, Score, UserError

Example = dict[str, np.ndarray]  # 'tokens': int32[n]; 'fixed': bool[n], true for given tokens


class Corrupt(Protocol):
  """Turn an example into a model input and its targets. Data workers call it, so it may use NumPy but not JAX."""

  def __call__(self, rng: np.random.Generator, example: Example, cfg: ConfigDict, u: float | None = None) -> dict:
    """Return a corrupted example: a dict with the fields that `families.corruption` describes.

    Every random choice must use `rng`. `cfg` is the `corrupt` section of the config. For validation, `u` in [0, 1)
    sets the corruption level, which is otherwise drawn at random.
    """
    ...


class Loss(Protocol):
  """Compute the training loss of a batch. Pure and jittable."""

  def __call__(self, outputs: Outputs, batch: Batch, cfg: ConfigDict) -> Metrics:
    """Return metrics as name -> (total, weight); training minimizes total / weight of the metric 'loss'.

    The batch holds packed rows, with the fields listed in `types`. `cfg` is the `loss` section of the config, with
    `compute` and `mean_weight` (the mean over the data of the number of free tokens plus 1) added.
    """
    ...


class Sample(Protocol):
  """Complete a batch of prompts, inside one jitted function."""

  def __call__(self, forward: Callable[..., Outputs], rng, prompt: Prompt, cfg: Any) -> Sampled:
    """Return the rows of the prompts, completed by the model.

    `forward` maps (tokens_BxL, length_B) to Outputs; `cfg` is an instance of the family's SampleConfig. A row's
    randomness may depend only on `rng` and its number in `prompt.request_B`.
    """
    ...


class Likelihood(Protocol):
  """Score rows: compute the negative log-likelihood of their free (not given) tokens, or an upper bound on it."""

  def __call__(self, forward: Callable[..., Outputs], rng, tokens_BxL, fixed_BxL, length_B, cfg: Any, *,
               kind: str | None = None, longest: int = 0) -> Score:  # fmt: skip
    """Return each row's negative log-likelihood, or an upper bound on it, in nats.

    `forward` and `cfg` are those of `Sample`. Rows are complete and have `length_B` tokens, of which those in
    `fixed_BxL` are given. `rng` is for random estimates. `kind` is 'exact', 'bound' or 'importance-weighted'; None
    selects the family's default. `longest` is the largest number of free tokens in a row.
    """
    ...


class Growth(Protocol):
  """Decoding functions of a model family whose rows grow token by token; `growing.Growth` implements this protocol."""

  def begin(self, forward, rng, prompt: Prompt, cfg, size: int, /) -> Any:
    """Return the initial rows: the prompts in a buffer of `size` positions."""

  def step(self, forward, cfg, rows, /) -> Any:
    """Return the rows after one decoding step."""

  def needed(self, length_B, cfg, /) -> Any:
    """Return an upper bound on each row's number of tokens after the next decoding step."""

  def finish(self, rows, cfg, /) -> Sampled:
    """Return the decoded rows as a `Sampled`, whatever the size of their buffer."""


def no_likelihood(kind: str | None, longest: int) -> None:
  """Raise UserError: the default `Family.check_score`, for families that define no likelihood."""
  raise UserError('this family has no likelihood: use eval.score=none')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
  """A family of sequence models: its functions and its properties."""

  name: str  # short name: the value of `config.family`, also used in error messages
  corrupt: Corrupt
  loss: Loss
  sample: Sample
  # The settings of `sample` and `score`: a NamedTuple, hashable, with a constructor `create(sampling, **others)` that
  # takes the `sampling` section of a config.
  SampleConfig: Any
  # config -> the fields of ModelConfig that the family determines (`causal`, `stop_head`, ...)
  model_settings: Callable[[ConfigDict], dict]
  # (config, length of the longest example, length of the longest answer) -> maximum numbers of positions and of targets
  # of a corrupted example; raises UserError for `corrupt` and `loss` settings that the family does not support.
  sizes: Callable[[ConfigDict, int, int], tuple[int, int]]
  score: Likelihood | None = None  # None: the family defines no likelihood
  # (kind, longest) -> None; raises UserError if `score` does not support these arguments.
  check_score: Callable[[str | None, int], None] = no_likelihood
  # config -> the fields of SampleConfig that sections of the config other than `sampling` determine
  sample_settings: Callable[[ConfigDict], dict] = lambda cfg: {}
  # (prompt, SampleConfig) -> None; raises UserError if `sample` cannot complete the prompt.
  check_prompt: Callable[[dict, Any], None] = lambda given, cfg: None
  # What an infill request may specify about the number of tokens inserted into a gap: 'limits' (a minimum and a
  # maximum), 'free' (nothing) or 'masks' (the exact number).
  fills: Literal['limits', 'free', 'masks'] = 'limits'
  growth: Growth | None = None  # decoding functions for continuous batching; None: rows do not grow token by token
  open_gap_embedding: bool = False  # whether its models support the setting `model.open_gap_embedding`
  length_weights: tuple[str, ...] = ('none',)  # the values of `loss.length_weight` that the family supports


def check_completion(family: Family, given: dict, row: dict) -> None:
  """Raise UserError unless a sampled row keeps its prompt's tokens and has new ones only where the prompt allows."""
  new, tokens = row['order'] >= 0, np.asarray(given['tokens'])
  has_masks, fault = family.fills == 'masks', ''
  if row['tokens'][~new].tolist() != (tokens[tokens != MASK] if has_masks else tokens).tolist():
    fault = 'changes given tokens: they must stay as they are, in their order'
  elif not has_masks and not np.asarray(given['open'])[np.cumsum(~new)[new] - 1].all():
    fault = 'inserts tokens into closed gaps: insert only where rows.max_left_BxL is above 0'
  if fault:
    raise UserError(f'family={family.name}: its sampler {fault}')
