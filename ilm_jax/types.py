"""Data structures shared by several packages, and the meaning of the axis letters in array names.

Arrays carry shape suffixes, axes joined by `x` (`tokens_BxL`):

    B rows            V vocabulary     H heads       F MLP width    T targets of a row
    L positions       D width          K head dim    N blocks       S segments of a row
    M decoding steps of a request      G gaps filled in a step      P shards of the vocabulary, of V entries each

A batch is a dict of arrays from `data.pipeline`. A segment is one corrupted example in a packed row:

    tokens_BxL, position_BxL           the tokens kept by the corruption; positions restart in each segment
    segment_BxL                        number of each token's segment, 1..S; 0 for padding
    open_BxL                           whether a token may be inserted to the right of each token
    target_gap_BxT, target_token_BxT   position (in the row) after which a dropped token belongs, and its token id
    target_segment_BxT, target_weight_BxT  segment (1..S) and weight in the loss of a target; 0 in unused entries
    cls_BxS                            position (in the row) of each segment's [CLS]
    segment_weight_BxS                 weight of the segment's example in the loss; 0 for unused segments
    example_id_BxS                     global index of the example; -1 for unused segments
    length_BxS, free_BxS               number of all tokens, and of tokens to generate, before corruption
    noise_BxS                          noise level of the example, for families whose model is conditioned on it
"""

from numbers import Integral
from typing import Any, NamedTuple

Array = Any  # jax.Array or np.ndarray
Batch = dict[str, Array]
Metrics = dict[str, tuple[Array, Array]]  # name -> (total, weight)


class UserError(Exception):
  """A mistake of the user. Its message, one line, says what is wrong, what was expected and how to fix it."""

  code = 1  # exit code of the command
  everywhere = False  # whether all processes of the run raise this error


SEED_LIMIT = 2**32  # JAX uses only the lowest 32 bits of a seed


def check_seed(seed, setting: str = 'seed') -> None:
  """Raise UserError unless the seed is an integer with 0 <= seed < SEED_LIMIT."""
  if isinstance(seed, bool) or not isinstance(seed, Integral) or not 0 <= seed < SEED_LIMIT:
    raise UserError(f'{setting}={seed!r}: expected an integer from 0 to {SEED_LIMIT - 1}')


class Outputs(NamedTuple):
  """Output of a model. The vocabulary logits are hidden_BxLxD @ unembed_VxD.T; losses compute them in chunks."""

  hidden_BxLxD: Array
  unembed_VxD: Array
  stop_BxSx2: Array | None = None  # logits of the stop head: class 0 = stop, class 1 = continue


UNLIMITED = 2**30  # maximum number of tokens for a gap without a limit


class Prompt(NamedTuple):
  """Input of a sampler: a batch of prompts, [CLS] at position 0 of every row."""

  tokens_BxL: Array
  length_B: Array
  open_BxL: Array  # whether a token may be inserted to the right of each token
  request_B: Array  # id of each row's request; the row's randomness depends only on this id and the seed
  free_B: Array | None = None  # number of tokens to generate, for families that need it in advance; -1: unknown
  least_BxL: Array | None = None  # minimum number of tokens to insert to the right of a token, where open_BxL is true
  most_BxL: Array | None = None  # maximum number of tokens to insert to the right of a token, where open_BxL is true


LEAST_TEMPERATURE = 1e-6  # at lower temperatures, sampling is greedy


class Rule(NamedTuple):
  """How to sample an index from logits: temperature 0 is greedy; top_k 0 and top_p 1 keep all candidates."""

  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0

  @property
  def greedy(self) -> bool:
    """Whether to select the largest logit: also at tiny temperatures, at which logits / temperature would overflow."""
    return self.temperature < LEAST_TEMPERATURE or self.top_k == 1


GREEDY = Rule(temperature=0.0)


class Score(NamedTuple):
  """Negative log-likelihood in nats, or an upper bound on it, of each row's completion given its prompt."""

  kind: str  # 'exact'; 'bound' (an upper bound in expectation); 'importance-weighted' (a tighter upper bound)
  nll_B: Array
  error_B: Array  # standard error of nll_B; 0 if nll_B is exact
  tokens_B: Array  # number of tokens in the completion, not counting the end of the row


class Sampled(NamedTuple):
  """Output of a sampler: the completed rows, with their tokens in reading order."""

  tokens_BxL: Array
  length_B: Array
  order_BxL: Array  # decoding step (0, 1, ...) that inserted each token; -1 for prompt tokens and padding
  log_prob_BxM: Array  # log-probability of each step's insertion at temperature 1; 0 after the last step
  stop_prob_BxM: Array  # p(stop) at each forward pass, including the last one; 0 after the last one
  steps_B: Array  # number of decoding steps that inserted a token
  stopped_B: Array  # whether the model ended the row; False if a length or step limit did
