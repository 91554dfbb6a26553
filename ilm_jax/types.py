"""The structures that cross module borders, and the legend of the axis letters.

Arrays carry shape suffixes, axes joined by `x` (`tokens_BxL`):

    B rows            V vocabulary     H heads       F mlp width    T targets of a row
    L positions       D width          K head dim    N blocks       S segments of a row
    M insertion steps of a request          G gaps of a step              P parts of a vocabulary, of V entries each

A batch is a plain dict of arrays, made on the host by `tasks.pipeline` and read by `families.*.loss`:

    tokens_BxL, position_BxL           the kept tokens; positions restart in each segment
    segment_BxL                        1..S, 0 on padding
    open_BxL                           may a token be inserted to the right of this one?
    target_gap_BxT, target_token_BxT   a dropped token and the position (in the row) after which it belongs
    target_segment_BxT                 1..S, 0 where the list is unused
    target_weight_BxT                  of the target in its family's loss, 0 where unused
    cls_BxS                            position (in the row) of each segment's [CLS]
    segment_weight_BxS                 weight of the segment's example, 0 where unused
    example_id_BxS                     global index of the example, -1 where unused
    length_BxS, free_BxS               numbers of tokens, and of free ones, of the example before the corruption
    noise_BxS                          noise level of the example, for the families whose model sees one
"""

from typing import Any, NamedTuple

Array = Any  # jax.Array or np.ndarray
Batch = dict[str, Array]
Metrics = dict[str, tuple[Array, Array]]  # name -> (total, weight)


class UserError(Exception):
  """A mistake of the user: the commands print it as one line and exit with its code.

  Says what was expected, what came, and what to do. `code` is the exit code, `everywhere` that all hosts raise it.
  """

  code = 1
  everywhere = False


class Outputs(NamedTuple):
  """What a model gives to a loss or a sampler; the vocabulary logits are hidden_BxLxD @ unembed_VxD.T."""

  hidden_BxLxD: Array
  unembed_VxD: Array
  stop_BxSx2: Array | None = None  # class 0 = stop, class 1 = continue


UNLIMITED = 2**30  # tokens of a gap without a limit


class Prompt(NamedTuple):
  """What a sampler starts from. [CLS] is position 0 of every row."""

  tokens_BxL: Array
  length_B: Array
  open_BxL: Array  # may a token be inserted to the right of this one?
  request_B: Array  # identity of each request: its randomness depends on nothing else
  free_B: Array | None = None  # tokens to come, for the families that must be told; -1: unknown
  least_BxL: Array | None = None  # tokens that must be inserted to the right of an open one, at least
  most_BxL: Array | None = None  # ... and at most


class Rule(NamedTuple):
  """How an index is drawn from logits: temperature 0 is greedy; top_k 0 and top_p 1 keep everything."""

  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0


GREEDY = Rule(temperature=0.0)


class Score(NamedTuple):
  """Minus the log-likelihood (nats) of each row's free tokens and its end, given its fixed tokens; or a bound of it."""

  kind: str  # 'exact'; 'bound' (not below it, in expectation); 'importance-weighted' (between the two)
  nll_B: Array
  error_B: Array  # standard error of the estimate; 0 where nothing was drawn
  tokens_B: Array  # number of free tokens, without the end


class Sampled(NamedTuple):
  """Finished (or length-limited) rows, in reading order.

  Log-probabilities are those of the model on the admissible (gap, token) pairs at temperature 1, whatever the rule.
  """

  tokens_BxL: Array
  length_B: Array
  order_BxL: Array  # the step a token was inserted at (0, 1, ...), -1 for given tokens and padding
  log_prob_BxM: Array  # of each step's insertion; 0 after the last
  stop_prob_BxM: Array  # seen at each step's forward pass, the stopping one included; 0 after it
  steps_B: Array  # number of insertions
  stopped_B: Array  # the stop head ended the row (False: a limit did)
