"""Metrics as (total, weight) pairs: sums of pairs over batches and processes give exact means."""

import math

from ilm_jax.types import Metrics


def add(a: Metrics, b: Metrics) -> Metrics:
  """Add two metrics dicts name by name; a name that is in only one of them keeps its (total, weight) pair."""
  out = dict(a)
  for name, (total, weight) in b.items():
    old_total, old_weight = out.get(name, (0.0, 0.0))
    out[name] = (old_total + total, old_weight + weight)
  return out


def means(pairs: Metrics) -> dict[str, float]:
  """Return each metric's mean, total / weight, by name; metrics whose weight is 0 are left out."""
  return {name: float(total) / float(weight) for name, (total, weight) in pairs.items() if float(weight)}


def order_statistics(steps, landmark: int | None = None) -> Metrics:
  """Return statistics of the insertion order of an answer; `steps` has each token's decoding step, in reading order.

  Undefined statistics are left out.
    order_tau: Kendall's tau between step and position; 1 is left to right, pairs inserted in the same step count as 0.
    order_adjacent: share of tokens that were inserted directly next to the token of the previous step.
    order_junction: step that inserted the token with index `landmark`, divided by the last step.
  """
  n, pairs = len(steps), {}
  if n > 1:
    signs = [(b > a) - (b < a) for i, a in enumerate(steps) for b in steps[i + 1 :]]
    pairs['order_tau'] = (sum(signs) / len(signs), 1.0)
    index_of_step = {step: i for i, step in enumerate(steps)}
    moves = [(index_of_step[s], index_of_step[s - 1]) for s in steps if s - 1 in index_of_step]
    num_adjacent = sum(all(steps[k] > steps[i] for k in range(min(i, j) + 1, max(i, j))) for i, j in moves)
    if moves:
      pairs['order_adjacent'] = (float(num_adjacent), float(len(moves)))
    if landmark is not None and max(steps):
      pairs['order_junction'] = (steps[landmark] / max(steps), 1.0)
  return pairs


def wilson_interval(successes: float, trials: float, z: float = 1.959964) -> tuple[float, float]:
  """Return the Wilson confidence interval (low, high) of a proportion; the default z gives 95 % confidence."""
  if not trials:
    return 0.0, 1.0
  p = successes / trials
  centre = p + z * z / (2 * trials)
  spread = z * math.sqrt(p * (1 - p) / trials + z * z / (4 * trials * trials))
  scale = 1 + z * z / trials
  return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def format_proportion(total: float, weight: float) -> str:
  """Format a proportion as `99.60 % (996 of 1000; 95 % interval 98.98 - 99.84)`."""
  low, high = (100 * bound for bound in wilson_interval(total, weight))
  share = 100 * total / max(weight, 1)
  return f'{share:.2f} % ({total:.0f} of {weight:.0f}; 95 % interval {low:.2f} - {high:.2f})'
