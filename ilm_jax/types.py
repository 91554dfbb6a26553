"""The structures that cross the borders of packages, and the legend of the axis letters.

Arrays carry shape suffixes, axes joined by `x` (`tokens_BxL`):

    B rows            V vocabulary     H heads       F MLP width    T targets of a row
    L positions       D width          K head dim    N blocks       S segments of a row
    M decoding steps of a request      G gaps filled in a step      P shards of the vocabulary, of V entries each

A batch is a plain dict of arrays, made on the host by `data.pipeline` and read by the losses of `families`. A segment
is one corrupted example in a packed row:

    tokens_BxL, position_BxL           the kept tokens; positions restart in each segment
    segment_BxL                        number of the segment, 1..S; 0 on padding
    open_BxL                           whether a token may be inserted to the right of this one
    target_gap_BxT, target_token_BxT   a dropped token, and the position (in the row) after which it belongs
    target_segment_BxT                 segment of the target, 1..S; 0 in unused entries
    target_weight_BxT                  weight of the target in the loss; 0 in unused entries
    cls_BxS                            position (in the row) of each segment's [CLS]
    segment_weight_BxS                 weight of the segment's example in the loss; 0 for unused segments
    example_id_BxS                     global index of the example; -1 for unused segments
    length_BxS, free_BxS               numbers of all tokens and of free tokens of the example before corruption
    noise_BxS                          noise level of the example, for families whose model is conditioned on it
"""

from typing import Any, NamedTuple

Array = Any  # jax.Array or np.ndarray
Batch = dict[str, Array]
Metrics = dict[str, tuple[Array, Array]]  # name -> (total, weight)


class UserError(Exception):
  """A mistake of the user. Commands print it as one line and exit with its code.

  The message says what is wrong, what was expected and how to fix it.

  Attributes:
    code: exit code of the command.
    everywhere: whether all processes of the run raise this error.
  """

  code = 1
  everywhere = False


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
  open_BxL: Array  # whether a token may be inserted to the right of this one
  request_B: Array  # number of each request; the randomness of a row depends on it and the seed only
  free_B: Array | None = None  # tokens to generate, for families that need the number in advance; -1: unknown
  least_BxL: Array | None = None  # minimum number of tokens to insert into the gap right of each open token
  most_BxL: Array | None = None  # maximum number of tokens to insert into that gap


class Rule(NamedTuple):
  """Sampling rule for an index given logits: temperature 0 is greedy; top_k 0 and top_p 1 keep all candidates."""

  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0


GREEDY = Rule(temperature=0.0)


class Score(NamedTuple):
  """Negative log-likelihood, in nats, of each row's free tokens and its end given its fixed tokens, or a bound on
  it."""

  kind: str  # 'exact'; 'bound' (an upper bound in expectation); 'importance-weighted' (a tighter upper bound)
  nll_B: Array
  error_B: Array  # standard error of the estimate; 0 if it is exact
  tokens_B: Array  # number of free tokens, not counting the end


class Sampled(NamedTuple):
  """Output of a sampler: completed rows, tokens in reading order.

  Log-probabilities are those of the model at temperature 1 over the admissible (gap, token) pairs, whatever the
  sampling rule is.
  """

  tokens_BxL: Array
  length_B: Array
  order_BxL: Array  # decoding step (0, 1, ...) that inserted each token; -1 for given tokens and padding
  log_prob_BxM: Array  # log-probability of each step's insertion; 0 after the last step
  stop_prob_BxM: Array  # p(stop) at each forward pass, the stopping one included; 0 after it
  steps_B: Array  # number of decoding steps that inserted
  stopped_B: Array  # whether the model ended the row; False if a limit did
