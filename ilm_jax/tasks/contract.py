"""The interface of a task: where its examples come from, and how answers are scored.

`Task` lists every task function that the rest of the package calls; fields without a default are required. Every
function takes `cfg`, the `task` section of the config. docs/extending.md builds a task step by step.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from ml_collections import ConfigDict


class Source(Protocol):
  """Random access to the examples of one split.

  An example is {'tokens': int32[n], 'fixed': bool[n]}; fixed tokens are given (a prompt, or the text around a gap) and
  never dropped. Example i must depend only on the config, the split and i.
  """

  endless: bool  # whether every index is a new example, so that training has no epochs

  def __len__(self) -> int:
    """Return the number of examples in an epoch."""

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    """Return the example with this index."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
  """A task, defined by its functions.

  Attributes:
    name: the value of `config.task.name`, also used in error messages.
    tokenizer: cfg -> the tokenizer, see `data.tokenizers`.
    source: (cfg, split) -> the examples of 'train', 'validation' or 'test'.
    longest: cfg -> maximum number of tokens of an example.
    longest_answer: cfg -> maximum number of tokens of an answer (the tokens that are not fixed).
    encode_prompt: (text, cfg) -> the token ids of a prompt, [CLS] first; raises UserError for a malformed prompt.
    decode: (token ids of prompt and answer, cfg) -> their text.
    score: (predicted, reference, cfg) -> {metric name: (total, weight)}, from the answer tokens of the model and those
      of the example; must contain 'exact_match'. None, as for text, means that runs report only their validation loss.
    chance: cfg -> expected exact match accuracy of random well-formed answers; None if unknown.
    landmark: (tokens, cfg) -> answer index of a token whose position in the decoding order is reported, or None.
    resolve_assets: (cfg, workdir or None); finds the files that a run needs (its tokenizer) in the workdir or through
      the config, and writes their fingerprint into the config.
    save_assets: (cfg, workdir); saves these files in the workdir.
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
  landmark: Callable[[Any, ConfigDict], int | None] = lambda tokens, cfg: None
  resolve_assets: Callable[[ConfigDict, Any], None] = lambda cfg, folder: None
  save_assets: Callable[[ConfigDict, Any], None] = lambda cfg, folder: None
