"""The contract of a family: what a module must define to be trained, sampled and evaluated.

`Family` lists everything the rest of the package calls. A field without a default is required; the defaults are here
and nowhere else. docs/extending.md builds a family step by step.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, Protocol

import numpy as np
from ml_collections import ConfigDict

from ilm_jax.types import Batch, Metrics, Outputs, Prompt, Sampled, Score, UserError

Example = dict[str, np.ndarray]  # 'tokens': int32[n]; 'fixed': bool[n], the given tokens, which are never dropped


class Corrupt(Protocol):
  """Turn an example into a model input and its targets. Runs in the data workers: NumPy only."""

  def __call__(self, rng: np.random.Generator, example: Example, cfg: ConfigDict, u: float | None = None) -> dict:
    """Return the fields that `families.corruption` describes.

    Args:
      rng: generator of this example; every random choice must come from it.
      example: the tokens and which of them are given.
      cfg: the `corrupt` section of the config.
      u: in [0, 1), replaces the draw of the corruption level; validation passes evenly spaced values.
    """
    ...


class Loss(Protocol):
  """Compute the training loss of a batch. Pure and jittable."""

  def __call__(self, outputs: Outputs, batch: Batch, cfg: ConfigDict) -> Metrics:
    """Return (total, weight) pairs by name; the pair 'loss' is minimized.

    Args:
      outputs: features and unembedding of the model on the batch.
      batch: packed rows, see `types`.
      cfg: the `loss` section of the config, with `compute` and `mean_weight` added.
    """
    ...


class Sample(Protocol):
  """Complete a batch of prompts, inside one jit."""

  def __call__(self, forward: Callable[..., Outputs], rng, prompt: Prompt, cfg: Any) -> Sampled:
    """Return the completed rows.

    Args:
      forward: tokens_BxL, length_B -> Outputs.
      rng: key of the call; the randomness of a row may depend on it and on `prompt.request_B` only.
      prompt: the given tokens and the open gaps.
      cfg: an instance of the family's `SampleConfig`.
    """
    ...


class Likelihood(Protocol):
  """Score rows: the negative log-likelihood of their free tokens, or a bound on it."""

  def __call__(self, forward: Callable[..., Outputs], rng, tokens_BxL, fixed_BxL, length_B, cfg: Any, *,
               kind: str | None = None, longest: int = 0) -> Score:  # fmt: skip
    """Return the score in nats.

    Args:
      forward: as for `Sample`.
      rng: key of the estimate.
      tokens_BxL: complete rows.
      fixed_BxL: which tokens are given.
      length_B: number of tokens of each row.
      cfg: an instance of the family's `SampleConfig`.
      kind: 'exact', 'bound' or 'importance-weighted'; None selects the family's default.
      longest: the largest number of free tokens of a row, if the caller knows it.
    """
    ...


class Growth(Protocol):
  """The decoding step of a family whose rows grow token by token: a `growing.Growth`."""

  @property
  def begin(self) -> Callable:
    """Return (forward, rng, prompt, SampleConfig, buffer size) -> rows that hold the prompts."""

  @property
  def step(self) -> Callable:
    """Return (forward, SampleConfig, rows) -> rows after one decoding step."""

  @property
  def needed(self) -> Callable:
    """Return (length_B, SampleConfig) -> an upper bound on the buffer positions after the next step."""

  @property
  def finish(self) -> Callable:
    """Return (rows, SampleConfig) -> Sampled."""


def no_likelihood(kind: str | None, longest: int) -> None:
  """Raise UserError: the default of `Family.check_score`."""
  raise UserError('this family has no likelihood: leave eval.score at none')


def accept_prompt(given: dict, cfg: Any) -> None:
  """Accept every prompt: the default of `Family.check_prompt`."""


def no_settings(cfg: ConfigDict) -> dict:
  """Return no settings: the default of `Family.sample_settings`."""
  return {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
  """A family of sequence models, as functions and a few facts.

  Attributes:
    name: the value of `config.family`, and the name in error messages.
    corrupt: makes the model input and the targets of an example.
    loss: the training loss.
    sample: completes prompts.
    SampleConfig: hashable settings of `sample` and `score`, a NamedTuple with a static method `create(sampling, **...)`
      that takes the `sampling` section of a config.
    model_settings: config -> the fields of ModelConfig that the family decides (`causal`, `stop_head`, ...).
    sizes: (config, longest example, longest answer), in tokens -> (positions, targets) of the largest corrupted
      example; raises UserError for `corrupt` and `loss` settings that the family does not accept.
    score: likelihood of complete rows; None if the family has none.
    check_score: (kind, longest) -> None; raises UserError if `score` would refuse them.
    sample_settings: config -> the fields of SampleConfig that other sections of the config decide.
    check_prompt: (prompt, SampleConfig) -> None; raises UserError if `sample` cannot complete the prompt.
    fills: what an infill request may say about the number of tokens of a gap: 'limits' (a minimum and a maximum),
      'free' (nothing) or 'masks' (exactly how many).
    growth: the decoding step, for continuous batching; None if rows do not grow token by token.
    open_gap_embedding: the family supports `model.open_gap_embedding`.
    length_weights: the values of `loss.length_weight` that the family supports.
  """

  name: str
  corrupt: Corrupt
  loss: Loss
  sample: Sample
  SampleConfig: Any
  model_settings: Callable[[ConfigDict], dict]
  sizes: Callable[[ConfigDict, int, int], tuple[int, int]]
  score: Likelihood | None = None
  check_score: Callable[[str | None, int], None] = no_likelihood
  sample_settings: Callable[[ConfigDict], dict] = no_settings
  check_prompt: Callable[[dict, Any], None] = accept_prompt
  fills: Literal['limits', 'free', 'masks'] = 'limits'
  growth: Growth | None = None
  open_gap_embedding: bool = False
  length_weights: tuple[str, ...] = ('none',)
