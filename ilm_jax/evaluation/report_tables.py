"""The Markdown tables of `ilm-jax report`: accuracies, likelihoods, training settings and decoding order."""

import urllib.parse

import numpy as np
from etils import epath

from ilm_jax import metrics
from ilm_jax.evaluation.report_rows import Run, short_commit
from ilm_jax.types import UserError

Row = list[Run]  # one table row: runs that differ only in their seed

PAPER = {  # task -> family -> sequence accuracy in %, arXiv 2505.05755, table 1 (one seed each)
  'star easy': {'arm': 32.3, 'arm, oracle order': 100.0, 'mdm': 100.0, 'it': 35.2, 'ilm': 100.0},
  'star medium': {'arm': 75.0, 'mdm': 36.5, 'it': 22.1, 'ilm': 100.0},
  'star hard': {'arm': 23.0, 'mdm': 21.0, 'it': 17.5, 'ilm': 99.1},
  'zebra': {'arm': 81.2, 'arm, oracle order': 91.2, 'mdm': 82.6, 'ilm': 90.0},
}

PLOTS = {'accuracy.png': 'accuracy by step', 'loss.png': 'loss by step', 'order.png': 'decoding order'}

ACCURACY_TEXT = """
## Accuracy

Accuracy in % on held-out test examples. *Pooled*: accuracy over the examples of all seeds together, with a 95 % Wilson
interval. *Mean of seeds*: mean of the accuracies of three or more seeds, with a 95 % Student interval, clipped to 0 and
100. All seeds in a row answer the same test examples, with the weights that were best on the validation split. *Paper*:
arXiv 2505.05755, table 1, one seed; its model sizes and training budgets may differ from ours.
"""

LIKELIHOOD_TEXT = """
## Likelihood

Negative log-likelihood (NLL) of held-out test strings in nats, averaged over the seeds, with 95 % intervals over the
strings. The end token of a string is scored, and counts as a token. The NLL is *exact*, or an upper *bound* on it that
is estimated by sampling; the last column has the standard error of its mean. If a bound is above the exact NLL of
another model, the model is not necessarily worse, because the bound may be loose.
"""

TRAINING_TEXT = """
## Training and sampling

Steps: training steps of the evaluated weights, of the maximum number of steps.
"""

ORDER_TEXT = """
## Decoding order

Statistics of the sampled test answers. *Tau*: Kendall correlation between the step at which a token is inserted and
its position (1: left to right). *Adjacent*: share of tokens that are inserted next to the previously inserted token.
*Junction* (star graphs): when the node after the junction is inserted, which selects the arm of the star, as a fraction
of the decoding steps from 0 (first) to 1 (last).
"""


def report(rows: list[Row], command: str, date: str) -> str:
  """Return the whole report as Markdown, which names the `command` that made it and the `date`."""
  names = {name for row in rows for run in row for name in run.pairs}
  sections = (
    (ACCURACY_TEXT, accuracy_cells, [row for row in rows if 'exact_match' in row[0].pairs]),
    (LIKELIHOOD_TEXT, likelihood_cells, [row for row in rows if any(run.strings for run in row)]),
    (TRAINING_TEXT, training_cells, rows),
    (ORDER_TEXT, order_cells, rows if any(name.startswith('order_') for name in names) else []),
  )
  lines = ['# Results', '', f'Made by `{command}` on {date}.']
  for text, cells_of, chosen in sections:
    if chosen:
      lines += [*text.rstrip().split('\n'), '', *table(chosen, cells_of)]
  lines += ['', '## Runs', '']
  lines += [f'- `{run.workdir}`{_plot_links(run)}' for row in rows for run in row]
  return '\n'.join(lines) + '\n'


def table(rows: list[Row], cells_of) -> list[str]:
  """Return the lines of a Markdown table with a line for each row; `cells_of` maps a row to {column: cell}."""
  cells = [{'task': row[0].label, 'family': row[0].family, **cells_of(row)} for row in rows]
  header, *body = ('| ' + ' | '.join(line) + ' |' for line in (cells[0].keys(), *(one.values() for one in cells)))
  return [header, '|---' * len(cells[0]) + '|', *body]


def accuracy_cells(row: Row) -> dict[str, str]:
  """Return {column: text} for one row of the accuracy table."""
  correct = [run.pairs['exact_match'] for run in row]
  by_seed = [100 * total / weight for total, weight in correct]
  paper = PAPER.get(row[0].label, {}).get(row[0].family)
  return {
    'sequence accuracy, pooled': pooled(correct),
    'each seed': ', '.join(f'{value:.1f}' for value in by_seed),
    'mean of seeds': mean_of_seeds(by_seed),
    'token accuracy': ratio(row, 'token_accuracy', '{:.1f}', 100),
    'chance': '–' if row[0].chance is None else f'{100 * row[0].chance:.1f}',
    'paper': '–' if paper is None else f'{paper:.1f}',
  }


def likelihood_cells(row: Row) -> dict[str, str]:
  """Return {column: text} for one row of the likelihood table."""
  for run in row:
    if not run.strings:
      advice = 'evaluate it again with --mode=eval'
      raise UserError(f'{run.workdir} has no likelihoods, but other runs of its table row have them: {advice}')
  nll_SxN = np.array([run.strings['nll'] for run in row])  # S seeds, N strings
  per_string, per_token = nll_intervals(nll_SxN.mean(0), np.array(row[0].strings['tokens']))
  error = np.square([run.strings['error'] for run in row]).sum() ** 0.5 / nll_SxN.size
  return {
    'NLL': row[0].kind,
    'per string': '{:.2f} ± {:.2f}'.format(*per_string),
    'per token': '{:.4f} ± {:.4f}'.format(*per_token),
    'per string, each seed': ', '.join(f'{value:.2f}' for value in nll_SxN.mean(1)),
    'strings': str(nll_SxN.shape[1]),
    'standard error': f'{error:.2f}',
  }


def training_cells(row: Row) -> dict[str, str]:
  """Return {column: text} for one row of the table of training and sampling settings."""
  return {
    'seeds': ', '.join(str(run.seed) for run in row),
    'steps': ', '.join(f'{run.steps:,} of {run.budget:,}' for run in row),
    'parameters': f'{row[0].parameters:,}',
    'training time per seed': ', '.join(_duration(run.seconds) for run in row),
    'hardware': ' + '.join(sorted({run.hardware for run in row})),
    'commit': ', '.join(map(short_commit, sorted({commit for run in row for commit in run.commits}))),
    'sampler': row[0].sampler,
  }


def order_cells(row: Row) -> dict[str, str]:
  """Return {column: text} for one row of the decoding-order table."""
  return {name: ratio(row, f'order_{name}', '{:.2f}') for name in ('tau', 'adjacent', 'junction')}


def ratio(row: Row, name: str, form: str, scale: float = 1) -> str:
  """Format the mean of a statistic over all examples of a row's runs, times `scale`; a dash if no run has it."""
  pairs = [run.pairs[name] for run in row if name in run.pairs]
  total, weight = (sum(pair[i] for pair in pairs) for i in (0, 1))
  return form.format(scale * total / weight) if weight else '–'


def pooled(pairs) -> str:
  """Add up (correct, total) pairs, and format the accuracy in % with its 95 % Wilson interval."""
  total, weight = (sum(column) for column in zip(*pairs, strict=True))
  low, high = metrics.wilson_interval(total, weight)
  return f'{100 * total / weight:.1f} ({100 * low:.1f} – {100 * high:.1f})'


def mean_of_seeds(values: list[float]) -> str:
  """Format the mean of at least 3 accuracies (%) with its 95 % Student interval, cut to 0 - 100; a dash for fewer."""
  if len(values) < 3:
    return '–'
  from scipy import stats

  mean = float(np.mean(values))
  half = float(stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5)
  return f'{mean:.1f} ({max(0.0, mean - half):.1f} – {min(100.0, mean + half):.1f})'


def nll_intervals(nll_N, tokens_N) -> tuple[tuple[float, float], tuple[float, float]]:
  """Return two pairs, for the NLL per string and per token: the mean and the half width of its 95 % interval.

  `tokens_N` does not count the end token of each string. The mean per token is a ratio of sums; its interval is
  computed by linearization.
  """
  count, size_N = len(nll_N), np.asarray(tokens_N) + 1.0

  def half_width(value_N):
    return 1.96 * float(np.std(value_N, ddof=1)) / count**0.5 if count > 1 else float('inf')

  ratio = float(nll_N.sum() / size_N.sum())
  return (float(nll_N.mean()), half_width(nll_N)), (ratio, half_width(nll_N - ratio * size_N) / float(size_N.mean()))


def _duration(seconds: float) -> str:
  minutes = round(seconds / 60)
  return f'{minutes // 60} h {minutes % 60} min' if minutes >= 60 else f'{minutes} min'


def _plot_links(run: Run) -> str:
  """Return Markdown links to the plots in a run's folder; special characters of paths are percent-encoded."""
  paths = {title: epath.Path(run.workdir) / name for name, title in PLOTS.items()}
  links = [f'[{title}]({urllib.parse.quote(str(path), "/:")})' for title, path in paths.items() if path.exists()]
  return ': ' + ', '.join(links) if links else ''
