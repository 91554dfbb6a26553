"""The Markdown tables of `ilm-jax report`: accuracies, likelihoods, training settings and decoding order."""

import numpy as np
from etils import epath

from ilm_jax import metrics
from ilm_jax.evaluation.report_rows import Run, short_commit
from ilm_jax.types import UserError

Row = list[Run]  # one table row: runs that differ only in their seed

PAPER = {  # sequence accuracy in %, arXiv 2505.05755, table 1 (one seed each)
  ('star easy', 'arm'): 32.3, ('star easy', 'arm, oracle order'): 100.0, ('star easy', 'mdm'): 100.0,
  ('star easy', 'it'): 35.2, ('star easy', 'ilm'): 100.0,
  ('star medium', 'arm'): 75.0, ('star medium', 'mdm'): 36.5, ('star medium', 'it'): 22.1,
  ('star medium', 'ilm'): 100.0,
  ('star hard', 'arm'): 23.0, ('star hard', 'mdm'): 21.0, ('star hard', 'it'): 17.5, ('star hard', 'ilm'): 99.1,
  ('zebra', 'arm'): 81.2, ('zebra', 'arm, oracle order'): 91.2, ('zebra', 'mdm'): 82.6, ('zebra', 'ilm'): 90.0,
}  # fmt: skip

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

ORDER_TEXT = """
## Decoding order

Statistics of the sampled test answers. *Tau*: Kendall correlation between the step at which a token is inserted and
its position (1: left to right). *Adjacent*: share of tokens that are inserted next to the previously inserted token.
*Junction* (star graphs): when the node after the junction is inserted, which selects the arm of the star, as a fraction
of the decoding steps from 0 (first) to 1 (last).
"""


def report(rows: list[Row], command: str, date: str) -> str:
  """Return the whole report as Markdown; it quotes the `command` and the `date` of its creation."""
  lines = ['# Results', '', f'Made by `{command}` on {date}.']
  if with_answers := [row for row in rows if row[0].correct]:
    lines += accuracy_table(with_answers)
  if with_likelihoods := [row for row in rows if any(run.strings for run in row)]:
    lines += likelihood_table(with_likelihoods)
  lines += training_table(rows)
  if any(run.orders for row in rows for run in row):
    lines += order_table(rows)
  lines += ['', '## Runs', '']
  lines += [f'- `{run.workdir}`{_plot_links(run)}' for row in rows for run in row]
  return '\n'.join(lines) + '\n'


def table(columns: list[str], rows: list[list[str]]) -> list[str]:
  """Format a Markdown table; return its lines."""
  header, *body = ('| ' + ' | '.join(cells) + ' |' for cells in [columns, *rows])
  return ['', header, '|---' * len(columns) + '|', *body]


def accuracy_table(rows: list[Row]) -> list[str]:
  """Return the lines of the report's accuracy section."""
  columns = ['task', 'family', 'sequence accuracy, pooled', 'each seed', 'mean of seeds', 'token accuracy', 'chance']
  cells = []
  for row in rows:
    by_seed = [100 * run.correct[0] / run.correct[1] for run in row]
    pairs = [run.tokens for run in row if run.tokens]
    token_accuracy = f'{100 * sum(c for c, _ in pairs) / sum(n for _, n in pairs):.1f}' if pairs else '–'
    chance = '–' if row[0].chance is None else f'{100 * row[0].chance:.1f}'
    paper = PAPER.get((row[0].label, row[0].family))
    cells.append([
      row[0].label, row[0].family, pooled([run.correct for run in row]), ', '.join(f'{value:.1f}' for value in by_seed),
      mean_of_seeds(by_seed), token_accuracy, chance,
      '–' if paper is None else f'{paper:.1f}',
    ])  # fmt: skip
  return [*ACCURACY_TEXT.rstrip().split('\n'), *table([*columns, 'paper'], cells)]


def likelihood_table(rows: list[Row]) -> list[str]:
  """Return the lines of the report's likelihood section."""
  columns = ['task', 'family', 'NLL', 'per string', 'per token', 'per string, each seed', 'strings', 'standard error']
  cells = []
  for row in rows:
    for run in row:
      if not run.strings:
        raise UserError(
          f'{run.workdir} has no likelihoods, but other runs of its row have them: evaluate it again with --mode=eval'
        )
    nll_SxN = np.array([run.strings['nll'] for run in row])  # S seeds, N strings
    per_string, per_token = nll_intervals(nll_SxN.mean(0), np.array(row[0].strings['tokens']))
    error = np.square([run.strings['error'] for run in row]).sum() ** 0.5 / nll_SxN.size
    cells.append([
      row[0].label, row[0].family, row[0].kind, '{:.2f} ± {:.2f}'.format(*per_string),
      '{:.4f} ± {:.4f}'.format(*per_token), ', '.join(f'{value:.2f}' for value in nll_SxN.mean(1)),
      str(nll_SxN.shape[1]), f'{error:.2f}',
    ])  # fmt: skip
  return [*LIKELIHOOD_TEXT.rstrip().split('\n'), *table(columns, cells)]


def training_table(rows: list[Row]) -> list[str]:
  """Return the lines of the report's section on training and sampling settings."""
  columns = ['task', 'family', 'seeds', 'steps', 'parameters', 'training time per seed', 'hardware', 'commit']
  cells = []
  for row in rows:
    commits = sorted({commit for run in row for commit in run.commits})
    cells.append([
      row[0].label, row[0].family, ', '.join(str(run.seed) for run in row),
      ', '.join(f'{run.steps:,} of {run.budget:,}' for run in row),
      f'{row[0].parameters:,}', ', '.join(_duration(run.seconds) for run in row),
      ' + '.join(sorted({run.hardware for run in row})), ', '.join(map(short_commit, commits)), row[0].sampler,
    ])  # fmt: skip
  text = 'Steps: training steps of the evaluated weights, of the maximum number of steps.'
  return ['', '## Training and sampling', '', text, *table([*columns, 'sampler'], cells)]


def order_table(rows: list[Row]) -> list[str]:
  """Return the lines of the report's decoding-order section."""
  cells = []
  for row in rows:
    numbers = []
    for name in ('order_tau', 'order_adjacent', 'order_junction'):
      pairs = [run.orders[name] for run in row if name in run.orders and run.orders[name][1]]
      numbers.append(f'{sum(pair[0] for pair in pairs) / sum(pair[1] for pair in pairs):.2f}' if pairs else '–')
    cells.append([row[0].label, row[0].family, *numbers])
  return [*ORDER_TEXT.rstrip().split('\n'), *table(['task', 'family', 'tau', 'adjacent', 'junction'], cells)]


# --- statistics -------------------------------------------------------------------------------------------------------


def pooled(pairs) -> str:
  """Format the accuracy in % over all (correct, total) pairs, added up, with its 95 % Wilson interval."""
  total, weight = (sum(column) for column in zip(*pairs, strict=True))
  low, high = metrics.wilson_interval(total, weight)
  return f'{100 * total / weight:.1f} ({100 * low:.1f} – {100 * high:.1f})'


def mean_of_seeds(values: list[float]) -> str:
  """Format the mean of accuracies (%) with its 95 % Student interval, clipped to 0 - 100; a dash if fewer than 3."""
  if len(values) < 3:
    return '–'
  from scipy import stats

  mean = float(np.mean(values))
  half = float(stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5)
  return f'{mean:.1f} ({max(0.0, mean - half):.1f} – {min(100.0, mean + half):.1f})'


def nll_intervals(nll_N, tokens_N) -> tuple[tuple[float, float], tuple[float, float]]:
  """Return the mean NLL and the half width of its 95 % confidence interval: a pair per string, and a pair per token.

  `tokens_N` does not count the end token of each string. The mean per token is a ratio of sums; its interval is
  computed by linearization.
  """
  count, size_N = len(nll_N), np.asarray(tokens_N) + 1.0

  def half_width(value_N):
    return 1.96 * float(np.std(value_N, ddof=1)) / count**0.5 if count > 1 else float('inf')

  ratio = float(nll_N.sum() / size_N.sum())
  return (float(nll_N.mean()), half_width(nll_N)), (ratio, half_width(nll_N - ratio * size_N) / float(size_N.mean()))


# --- formatting -------------------------------------------------------------------------------------------------------


def _duration(seconds: float) -> str:
  minutes = round(seconds / 60)
  return f'{minutes // 60} h {minutes % 60} min' if minutes >= 60 else f'{minutes} min'


def _plot_links(run: Run) -> str:
  """Return Markdown links to the plots in the run's folder."""
  paths = {title: epath.Path(run.workdir) / name for name, title in PLOTS.items()}
  links = [f'[{title}]({path})' for title, path in paths.items() if path.exists()]
  return ': ' + ', '.join(links) if links else ''
