"""Compare stopping rules: `ilm-jax stopping --workdir=runs/stories` tabulates the text lengths that each rule produces.

A stopping rule of an insertion model is a threshold on p(stop), or a temperature at which stopping is sampled. The
command samples texts once without stopping and records p(stop) at every forward pass. The stopping rule does not
influence which tokens are inserted, so the lengths under every rule follow from these texts.

The lengths are compared with those of the validation split, by their mean and by the Wasserstein distance between the
two distributions, in tokens. The fitted threshold and the fitted temperature are those with the smallest distance; the
command prints the flags that set them.
"""

import functools
import sys
import time
from typing import NamedTuple

import numpy as np
from absl import flags

from ilm_jax import paths
from ilm_jax.console import command, define_seed, quiet
from ilm_jax.types import UserError, check_seed

QUANTILES = np.linspace(0.005, 0.995, 100)  # probabilities at which the quantiles of text lengths are compared
THRESHOLDS = (0.1, 0.25, 0.5, 0.75, 0.9, 0.99)  # thresholds on p(stop) that are always in the table
TEMPERATURES = (0.5, 1.0, 2.0)  # temperatures of sampled stopping that are always in the table


class Lengths(NamedTuple):
  """The distribution of text lengths under a stopping rule."""

  rule: str  # name of the stopping rule
  flag: str  # command-line flags that select the rule
  prob_BxL: np.ndarray  # for each text b and length l, the probability that l tokens are inserted
  limit: np.ndarray  # for each text, the probability that a length limit ends it before the stopping rule

  def mean(self) -> float:
    """Return the mean text length under this stopping rule, in tokens."""
    return float((self.prob_BxL.mean(axis=0) * np.arange(self.prob_BxL.shape[1])).sum())

  def quantiles(self) -> np.ndarray:
    """Return the quantiles of the text length at the probabilities QUANTILES."""
    cumulative_L = np.cumsum(self.prob_BxL.mean(axis=0))
    return np.searchsorted(cumulative_L, QUANTILES * cumulative_L[-1])

  def distance(self, real) -> float:
    """Return the Wasserstein distance to the lengths of real texts, in tokens, approximated from quantiles."""
    return float(np.abs(self.quantiles() - np.quantile(real, QUANTILES, method='inverted_cdf')).mean())


def apply_temperature(stop: np.ndarray, temperature: float) -> np.ndarray:
  """Return p(stop) at a temperature, given p(stop) at temperature 1; a p(stop) of exactly 0 stays 0."""
  clipped = stop.astype(np.float64).clip(1e-12, 1 - 1e-12)
  return np.where(stop > 0, 1 / (1 + ((1 - clipped) / clipped) ** (1 / temperature)), 0.0)


def lengths_under(stops: list[np.ndarray], longest: int) -> tuple[np.ndarray, np.ndarray]:
  """Return each text's distribution of lengths up to `longest`, and its probability of ending at the length limit.

  `stops` has, for each text, the probability of stopping before each insertion and after the last one.
  """
  prob_BxL, limit = np.zeros((len(stops), longest + 1)), np.zeros(len(stops))
  for i, stop in enumerate(stops):
    survival = np.cumprod(np.concatenate([[1.0], 1 - stop]))  # probability that the text has not stopped yet
    prob_BxL[i, : len(stop)] = survival[:-1] * stop
    prob_BxL[i, len(stop) - 1] += survival[-1]
    limit[i] = survival[-1]
  return prob_BxL, limit


def at_threshold(stops: list[np.ndarray], threshold: float, *, longest: int) -> Lengths:
  """Return the distribution of text lengths if texts stop as soon as p(stop) reaches a threshold."""
  flag = f'--config.sampling.stop_threshold={np.floor(threshold * 1e6) / 1e6:.6g}'
  reached = [(stop >= threshold).astype(np.float64) for stop in stops]
  return Lengths(f'threshold {threshold:.3g}', flag, *lengths_under(reached, longest))


def sampled(stops: list[np.ndarray], temperature: float, *, longest: int) -> Lengths:
  """Return the distribution of text lengths if stopping is sampled at a temperature, given p(stop) at temperature 1."""
  flag = f'--config.sampling.stop_threshold=0 --config.sampling.stop_temperature={temperature:.3g}'
  tempered = [apply_temperature(stop, temperature) for stop in stops]
  return Lengths(f'sampled, temperature {temperature:.3g}', flag, *lengths_under(tempered, longest))


def fit(make, values, real) -> Lengths:
  """Return the rule make(value), for a value in `values`, whose text lengths are closest to those of real texts."""
  return min(map(make, values), key=lambda rule: (rule.distance(real), abs(rule.mean() - np.mean(real))))


def trajectories(lm, prompts: list[dict], *, seed: int = 0, report=lambda message: None) -> list[np.ndarray]:
  """Sample texts that only stop at a length limit; return, for each text, p(stop) before each insertion and at the end.

  `prompts` are those of `static_batching.StaticSampler`, and `report` is called with a progress message every 10
  seconds. p(stop) is that at temperature 1; its first value is 0 if the first insertion is forced.
  """
  import jax

  from ilm_jax.inference import continuous_batching

  check_seed(seed)
  cfg = lm.sample_cfg._replace(stop_threshold=2.0, stop_temperature=1.0)  # p(stop) never reaches a threshold of 2
  if cfg.gaps != 1:
    raise UserError(f'sampling.gaps={cfg.gaps}: stopping rules are compared only for sampling.gaps=1')
  sampler = continuous_batching.ContinuousSampler(lm.model_cfg, lm.family, cfg, lm.batch_size)
  stops, start = {}, time.monotonic()
  last_report = start
  for index, row in sampler(lm.params, jax.random.key(seed), prompts):
    stops[index] = np.where((np.arange(len(row['stop_prob'])) == 0) & cfg.force_first, 0.0, row['stop_prob'])
    if time.monotonic() - last_report > 10:
      last_report = time.monotonic()
      remaining = (len(prompts) - len(stops)) * (last_report - start) / len(stops)
      report(f'sampled {len(stops)} of {len(prompts)} texts, about {remaining:.0f} s remaining')
  return [stops[i] for i in range(len(stops))]


def rules_of(stops: list[np.ndarray], real, *, temperature: float = 1.0) -> list[Lengths]:
  """Return the text length distributions under the standard stopping rules, and under two rules fitted to real texts.

  `stops` comes from `trajectories`, `real` holds the lengths of real texts, and `temperature` is the run's
  sampling.stop_temperature, at which p(stop) is compared with thresholds.
  """
  longest, tempered = max(map(len, stops)) - 1, [apply_temperature(stop, temperature) for stop in stops]
  threshold_rule = functools.partial(at_threshold, tempered, longest=longest)
  temperature_rule = functools.partial(sampled, stops, longest=longest)
  observed = np.quantile(np.concatenate(tempered).astype(np.float64), np.linspace(0, 1, 200))
  fitted = [
    fit(threshold_rule, np.unique(observed.clip(1e-6, 1.0)), real),
    fit(temperature_rule, np.geomspace(0.2, 5, 60), real),
  ]
  fitted = [rule._replace(rule=f'{rule.rule} (fitted)') for rule in fitted]
  return [*map(threshold_rule, THRESHOLDS), *map(temperature_rule, TEMPERATURES), *fitted]


def table(rules: list[Lengths], real) -> str:
  """Format a plain-text table of the text lengths under each stopping rule and of the lengths of real texts."""
  rows = [('real texts', np.mean(real), np.quantile(real, QUANTILES, method='inverted_cdf'), '', '')]
  for rule in rules:
    limit, distance = f'{100 * rule.limit.mean():.0f} %', f'{rule.distance(real):.1f}'
    rows.append((rule.rule, rule.mean(), rule.quantiles(), limit, distance))
  lines = [f'{"rule":<38}{"mean length":>12}{"median":>8}{"10 - 90 %":>12}{"at limit":>9}{"distance":>10}']
  for name, mean, quantiles, limit, distance in rows:
    low, median, high = (int(quantiles[i]) for i in (10, 50, 89))
    lines.append(f'{name:<38}{mean:>12.1f}{median:>8}{f"{low} - {high}":>12}{limit:>9}{distance:>10}')
  return '\n'.join(lines)


def plot(rules: list[Lengths], real, path) -> None:
  """Plot the cumulative distributions of the text lengths under each stopping rule to a file."""
  try:
    from matplotlib import colormaps
    from matplotlib.figure import Figure
  except ImportError:
    raise UserError('--plot needs matplotlib: pip install "ilm_jax[report]", or omit --plot') from None
  figure = Figure(figsize=(7, 4), dpi=120)
  axis = figure.subplots()
  axis.plot(np.quantile(real, QUANTILES), QUANTILES, color='black', linewidth=2.5, label='real texts')
  colours = colormaps['viridis'](np.linspace(0, 0.95, len(rules)))
  for rule, colour in zip(rules, colours, strict=True):
    style = '-' if 'fitted' in rule.rule else ':'
    axis.plot(rule.quantiles(), QUANTILES, style, color=colour, label=rule.rule)
  axis.set(xlabel='length, tokens', ylabel='fraction of texts at most this long', ylim=(0, 1))
  axis.legend(frameon=False, fontsize=7)
  figure.tight_layout()
  try:
    figure.savefig(path)
  except (OSError, ValueError) as error:  # ValueError: the file name does not end in a known image format
    raise UserError(f'--plot={path}: {getattr(error, "strerror", None) or error}') from None


def define(values: flags.FlagValues) -> None:
  """Define the flags of `ilm-jax stopping`."""
  flags.DEFINE_string('workdir', None, 'Folder of the run whose model is used.', flag_values=values)
  flags.DEFINE_string('checkpoint', 'best', "Checkpoint: 'best', 'latest' or a step.", flag_values=values)
  flags.DEFINE_integer('count', 200, 'Number of texts to sample.', lower_bound=1, flag_values=values)
  flags.DEFINE_integer('batch_size', 64, 'Number of texts decoded at a time.', lower_bound=1, flag_values=values)
  define_seed(values)
  flags.DEFINE_string('plot', None, 'File for a plot of the length distributions.', flag_values=values)


def run(values) -> int:
  """Sample texts, print the table of stopping rules and the flags of the fitted ones; return the exit code."""
  if not values.workdir:
    raise UserError('--workdir is missing: expected the folder of a run, such as --workdir=runs/stories')
  plot_file = paths.resolve(values.plot, '--plot') if values.plot else None
  quiet()
  from ilm_jax.inference import api, checks, static_batching

  checks.check_samples(values.count, f'--count={values.count}')
  lm = api.load(paths.resolve(values.workdir, '--workdir'), values.checkpoint, batch_size=values.batch_size)
  if not lm.model_cfg.stop_head:
    raise UserError(f'family={lm.cfg.family} has no stop head: expected a run with family=ilm')
  source = lm.task.source(lm.cfg.task, 'validation')
  real = [int((~source[i]['fixed']).sum()) for i in range(len(source))]
  prompts = [static_batching.prompt_of(source[i % len(source)]) for i in range(values.count)]
  stops = trajectories(lm, prompts, seed=values.seed, report=lambda message: print(message, file=sys.stderr))
  rules = rules_of(stops, real, temperature=lm.sample_cfg.stop_temperature)
  limit = f'at most {lm.sample_cfg.max_length} tokens'
  print(f'{len(stops)} texts sampled at step {lm.step}, {limit}; {len(real)} real texts\n')
  print(table(rules, real))
  print('\nfitted: ' + '\n    or: '.join(rule.flag for rule in rules[-2:]))
  print('(flags of `ilm-jax train` and `eval`; for `ilm-jax generate`, use --stop_threshold and --stop_temperature)')
  if plot_file:
    plot(rules, real, plot_file)
  return 0


def main(argv=None) -> int:
  """Run the command `ilm-jax stopping`; return the exit code."""
  return command(__doc__, define, run, argv)
