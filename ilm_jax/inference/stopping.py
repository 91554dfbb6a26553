"""When to stop: `ilm-jax stopping --workdir=runs/stories` shows how long texts are at each stopping rule.

One run that never stops gives all rules at once: what a row inserts does not depend on the rule, so a rule only says
where the row would have ended. Each rule's lengths are compared with those of real texts of the validation split, by
their means and by the distance between the two distributions (Wasserstein: tokens by which a length is off, on
average, when short ones are matched with short ones); the threshold, and the temperature of a sampled stop, that come
closest are the fitted ones. The flags that set them are printed.
"""

import sys
import time
from typing import NamedTuple

import numpy as np
from absl import flags

from ilm_jax.console import command, quiet
from ilm_jax.types import UserError

QUANTILES = np.linspace(0.005, 0.995, 100)
THRESHOLDS = (0.1, 0.25, 0.5, 0.75, 0.9, 0.99)
TEMPERATURES = (0.5, 1.0, 2.0)


class Lengths(NamedTuple):
  """The distribution of the lengths of a rule: P(length) of each row."""

  rule: str
  flag: str
  prob_BxL: np.ndarray  # of the rows; the last column includes those that a limit ended
  limit: np.ndarray  # of each row: probability that a limit ended it

  def mean(self) -> float:
    """Mean length."""
    return float((self.prob_BxL.mean(axis=0) * np.arange(self.prob_BxL.shape[1])).sum())

  def quantiles(self) -> np.ndarray:
    """Lengths at QUANTILES."""
    total_L = np.cumsum(self.prob_BxL.mean(axis=0))
    return np.searchsorted(total_L, QUANTILES * total_L[-1])

  def distance(self, real) -> float:
    """Wasserstein distance to real lengths, from QUANTILES."""
    return float(np.abs(self.quantiles() - np.quantile(real, QUANTILES, method='inverted_cdf')).mean())


def warm(stop: np.ndarray, temperature: float) -> np.ndarray:
  """p(stop) at a temperature, from that at temperature 1; 0 stays 0."""
  some = stop.astype(np.float64).clip(1e-12, 1 - 1e-12)
  return np.where(stop > 0, 1 / (1 + ((1 - some) / some) ** (1 / temperature)), 0.0)


def at_threshold(stops: list[np.ndarray], threshold: float, *, longest: int) -> Lengths:
  """The lengths of rows that stop when p(stop) reaches a threshold.

  Args:
    stops: of each row, p(stop) before each insertion, and after the last one that the limits allow.
    threshold: a probability.
    longest: the largest number of insertions.
  """
  prob_BxL = np.zeros((len(stops), longest + 1))
  limit = np.zeros(len(stops))
  for i, stop in enumerate(stops):
    reached = np.flatnonzero(stop >= threshold)
    limit[i] = not len(reached)
    prob_BxL[i, reached[0] if len(reached) else len(stop) - 1] = 1.0
  return Lengths(
    f'threshold {threshold:.3g}',
    f'--config.sampling.stop_threshold={np.floor(threshold * 1e6) / 1e6:.6g}',
    prob_BxL,
    limit,
  )


def sampled(stops: list[np.ndarray], temperature: float, *, longest: int) -> Lengths:
  """The lengths of rows that stop with the probability of the stop head at a temperature; arguments as above."""
  prob_BxL = np.zeros((len(stops), longest + 1))
  limit = np.zeros(len(stops))
  for i, stop in enumerate(stops):
    stop = warm(stop, temperature)
    alive = np.cumprod(np.concatenate([[1.0], 1 - stop]))
    prob_BxL[i, : len(stop)] = alive[:-1] * stop
    prob_BxL[i, len(stop) - 1] += alive[-1]
    limit[i] = alive[-1]
  flag = f'--config.sampling.stop_threshold=0 --config.sampling.stop_temperature={temperature:.3g}'
  return Lengths(f'sampled, temperature {temperature:.3g}', flag, prob_BxL, limit)


def fit(make, values, real) -> Lengths:
  """Of the rules make(value), the one whose lengths are closest to the real ones."""
  return min(
    (make(value) for value in values), key=lambda rule: (rule.distance(real), abs(rule.mean() - np.mean(real)))
  )


def candidates(stops: list[np.ndarray], number: int = 200) -> np.ndarray:
  """Thresholds between which lengths differ: quantiles of what the stop head has said."""
  return np.unique(np.quantile(np.concatenate(stops).astype(np.float64), np.linspace(0, 1, number)).clip(1e-6, 1.0))


def trajectories(lm, prompts: list[dict], *, seed: int = 0, say=lambda text: None) -> list[np.ndarray]:
  """p(stop) at temperature 1, at each forward pass of rows that never stop before a limit; 0 where it is not asked."""
  import jax

  from ilm_jax.inference import continuous_batching

  cfg = lm.sample_cfg._replace(stop_threshold=2.0, stop_temperature=1.0)  # no probability reaches it
  if cfg.gaps != 1:
    raise UserError(f'sampling.gaps={cfg.gaps}: lengths are told for one insertion a step: expected sampling.gaps=1')
  sampler = continuous_batching.ContinuousSampler(lm.model_cfg, lm.family, cfg, lm.batch_size)
  out, start = {}, time.monotonic()
  said = start
  for index, row in sampler(lm.params, jax.random.key(seed), prompts):
    out[index] = np.where((np.arange(len(row['stop_prob'])) == 0) & cfg.force_first, 0.0, row['stop_prob'])
    if time.monotonic() - said > 10:
      said = time.monotonic()
      say(f'{len(out)} of {len(prompts)} texts, {(len(prompts) - len(out)) * (said - start) / len(out):.0f} s left')
  return [out[i] for i in range(len(out))]


def rules_of(stops: list[np.ndarray], real, *, temperature: float = 1.0) -> list[Lengths]:
  """The usual rules, thresholds at the temperature of the run, and the two that were fitted."""
  longest, own = max(map(len, stops)) - 1, [warm(stop, temperature) for stop in stops]
  usual = [at_threshold(own, value, longest=longest) for value in THRESHOLDS]
  usual += [sampled(stops, value, longest=longest) for value in TEMPERATURES]
  fitted = [
    fit(lambda value: at_threshold(own, value, longest=longest), candidates(own), real),
    fit(lambda value: sampled(stops, value, longest=longest), np.geomspace(0.2, 5, 60), real),
  ]
  return usual + [rule._replace(rule=f'{rule.rule} (fitted)') for rule in fitted]


def table(rules: list[Lengths], real) -> str:
  """The rules as text."""
  lines = [f'{"rule":<38}{"mean length":>12}{"median":>8}{"10 - 90 %":>12}{"a limit":>9}{"distance":>10}']

  def line(name, mean, quantiles, limit, distance):
    low, middle, high = (int(quantiles[i]) for i in (10, 50, 89))
    return f'{name:<38}{mean:>12.1f}{middle:>8}{f"{low} - {high}":>12}{limit:>9}{distance:>10}'

  lines.append(line('real texts', np.mean(real), np.quantile(real, QUANTILES, method='inverted_cdf'), '', ''))
  for rule in rules:
    limit, distance = f'{100 * rule.limit.mean():.0f} %', f'{rule.distance(real):.1f}'
    lines.append(line(rule.rule, rule.mean(), rule.quantiles(), limit, distance))
  return '\n'.join(lines)


def plot(rules: list[Lengths], real, path: str) -> None:
  """Draw the distributions of the lengths."""
  try:
    import matplotlib
  except ImportError:
    raise UserError('drawing needs matplotlib: make setup EXTRAS=report, or leave out --plot') from None
  matplotlib.use('agg')
  from matplotlib import pyplot

  figure, axis = pyplot.subplots(figsize=(7, 4), dpi=120)
  axis.plot(np.quantile(real, QUANTILES), QUANTILES, color='black', linewidth=2.5, label='real texts')
  colours = pyplot.get_cmap('viridis')(np.linspace(0, 0.95, len(rules)))
  for rule, colour in zip(rules, colours, strict=True):
    style = '-' if 'fitted' in rule.rule else ':'
    axis.plot(rule.quantiles(), QUANTILES, style, color=colour, label=rule.rule)
  axis.set(xlabel='length, tokens', ylabel='share of the texts that are not longer', ylim=(0, 1))
  axis.legend(frameon=False, fontsize=7)
  figure.tight_layout()
  try:
    figure.savefig(path)
  except OSError as error:
    raise UserError(f'--plot={path}: {error.strerror or error}') from None
  pyplot.close(figure)


def define(values: flags.FlagValues) -> None:
  """Define this command's flags."""
  flags.DEFINE_string('workdir', None, 'Folder of the run.', flag_values=values)
  flags.DEFINE_string('checkpoint', 'best', "'best', 'latest' or a step.", flag_values=values)
  flags.DEFINE_integer('count', 200, 'Texts to write.', lower_bound=1, flag_values=values)
  flags.DEFINE_integer('batch_size', 64, 'Slots: texts at a time.', lower_bound=1, flag_values=values)
  flags.DEFINE_integer('seed', 0, 'Seed of the randomness.', flag_values=values)
  flags.DEFINE_string('plot', None, 'File for a picture of the distributions.', flag_values=values)


def run(values) -> int:
  """Load, write, compare, print."""
  if not values.workdir:
    raise UserError('--workdir is missing: expected the folder of a run, such as --workdir=runs/stories')
  quiet()
  from ilm_jax.inference import api, static_batching

  lm = api.load(values.workdir, values.checkpoint, batch_size=values.batch_size)
  if not hasattr(lm.sample_cfg, 'stop_threshold'):
    raise UserError(f'family={lm.cfg.family} has no stop head: expected a run of family=ilm')
  source = lm.task.source(lm.cfg.task, 'validation')
  real = [int((~source[i]['fixed']).sum()) for i in range(len(source))]
  prompts = [static_batching.prompt_of(source[i % len(source)]) for i in range(values.count)]
  stops = trajectories(lm, prompts, seed=values.seed, say=lambda text: print(text, file=sys.stderr))
  rules = rules_of(stops, real, temperature=lm.sample_cfg.stop_temperature)
  print(f'{len(stops)} texts of step {lm.step}, at most {lm.sample_cfg.max_length} tokens; {len(real)} real texts\n')
  print(table(rules, real))
  print('\nfitted: ' + '\n    or: '.join(rule.flag for rule in rules[-2:]))
  print('(of a run; of ilm_jax.generate, the same names: --stop_threshold, --stop_temperature)')
  if values.plot:
    plot(rules, real, values.plot)
  return 0


def main(argv=None) -> int:
  """Run the command."""
  return command(__doc__, define, run, argv)


if __name__ == '__main__':
  sys.exit(main())
