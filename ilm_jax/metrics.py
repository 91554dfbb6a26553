"""Metrics as (total, weight) pairs: accumulation, padded batches and many hosts are then exact."""

import math

from ilm_jax.types import Metrics


def add(a: Metrics, b: Metrics) -> Metrics:
  """Add two sets of pairs name by name; a name may be missing from either."""
  out = dict(a)
  for name, (total, weight) in b.items():
    old_total, old_weight = out.get(name, (0.0, 0.0))
    out[name] = (old_total + total, old_weight + weight)
  return out


def means(pairs: Metrics) -> dict[str, float]:
  """The weighted means; a name of weight 0 is left out."""
  return {name: float(total) / float(weight) for name, (total, weight) in pairs.items() if float(weight)}


def order_statistics(steps, landmark: int | None = None) -> Metrics:
  """In which order an answer came: pairs of `order_tau`, `order_adjacent` and, with a landmark, `order_junction`.

  Args:
    steps: the step at which each token of the answer came in, in reading order; equal where several came at once.
    landmark: index of a token whose place in the order is asked for.

  Returns:
    Kendall's tau between step and place (1: left to right; ties count as neither); the share of tokens that come in
    beside the one of the step before, among the tokens there are then; the landmark's step over the last step.
  """
  n, pairs = len(steps), {}
  if n > 1:
    signs = [(b > a) - (b < a) for i, a in enumerate(steps) for b in steps[i + 1 :]]
    pairs['order_tau'] = (sum(signs) / len(signs), 1.0)
    at = {step: i for i, step in enumerate(steps)}
    moves = [(at[s], at[s - 1]) for s in steps if s - 1 in at]
    near = sum(all(steps[k] > steps[i] for k in range(min(i, j) + 1, max(i, j))) for i, j in moves)
    if moves:
      pairs['order_adjacent'] = (float(near), float(len(moves)))
    if landmark is not None and max(steps):
      pairs['order_junction'] = (steps[landmark] / max(steps), 1.0)
  return pairs


def wilson(successes: float, trials: float, z: float = 1.959964) -> tuple[float, float]:
  """Wilson's 95 % interval of a proportion."""
  if not trials:
    return 0.0, 1.0
  p = successes / trials
  centre = p + z * z / (2 * trials)
  spread = z * math.sqrt(p * (1 - p) / trials + z * z / (4 * trials * trials))
  scale = 1 + z * z / trials
  return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def percent(total: float, weight: float) -> str:
  """A proportion for people: `99.60 % (996 of 1000; 95 % interval 98.98 - 99.84)`."""
  low, high = (100 * bound for bound in wilson(total, weight))
  share = 100 * total / max(weight, 1)
  return f'{share:.2f} % ({total:.0f} of {weight:.0f}; 95 % interval {low:.2f} - {high:.2f})'
