"""The contract of a task: where its examples come from, and how answers are scored.

`Task` lists everything the rest of the package calls. A field without a default is required; the defaults are here and
nowhere else. Every function takes `cfg`, the `task` section of the config. docs/extending.md builds a task step by
step.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from ml_collections import ConfigDict


class Source(Protocol):
  """Random access to the examples of one split.

  An example is {'tokens': int32[n], 'fixed': bool[n]}; fixed tokens are given (a prompt, or the text around a gap) and
  never dropped. Example i must depend on the config, the split and i only.
  """

  endless: bool  # every index is a new example: the training loop then draws no epochs

  def __len__(self) -> int:
    """Return the number of examples of an epoch."""
    ...

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    """Return an example."""
    ...


def no_landmark(tokens: np.ndarray, cfg: ConfigDict) -> int | None:
  """Return None: the default of `Task.landmark`."""
  return None


def nothing_to_keep(cfg: ConfigDict, folder: Any) -> None:
  """Do nothing: the default of `Task.resolve_assets` and `Task.save_assets`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
  """A task, as functions.

  Attributes:
    name: the value of `config.task.name`, and the name in error messages.
    tokenizer: cfg -> the tokenizer, see `data.tokenizers`.
    source: (cfg, split) -> the examples of 'train', 'validation' or 'test'.
    longest: cfg -> number of tokens of the longest example.
    longest_answer: cfg -> number of free (not fixed) tokens of the longest answer.
    encode_prompt: (text, cfg) -> the token ids of a prompt, [CLS] first; raises UserError for a malformed prompt.
    decode: (tokens, cfg) -> the text of a whole row.
    score: (predicted, reference, cfg) -> (total, weight) pairs by name, from the free tokens of an answer and those of
      the example; must contain 'exact_match'. None if answers are not right or wrong, as for text: such runs are
      judged by their validation loss.
    chance: cfg -> exact match of a well-formed answer with random choices; None if unknown.
    landmark: (tokens, cfg) -> index in the answer of a token whose place in the decoding order is reported, or None.
    resolve_assets: (cfg, workdir or None) -> None; finds what a run must carry with it (a tokenizer), in the workdir or
      by the config, and records in the config which one it is.
    save_assets: (cfg, workdir) -> None; writes that into the workdir.
  """

  name: str
  tokenizer: Callable[[ConfigDict], Any]
  source: Callable[[ConfigDict, str], Source]
  longest: Callable[[ConfigDict], int]
  longest_answer: Callable[[ConfigDict], int]
  encode_prompt: Callable[[str, ConfigDict], list[int]]
  decode: Callable[[Any, ConfigDict], str]
  score: Callable[[np.ndarray, np.ndarray, ConfigDict], dict[str, tuple[float, float]]] | None = None
  chance: Callable[[ConfigDict], float] | None = None
  landmark: Callable[[Any, ConfigDict], int | None] = no_landmark
  resolve_assets: Callable[[ConfigDict, Any], None] = nothing_to_keep
  save_assets: Callable[[ConfigDict, Any], None] = nothing_to_keep
