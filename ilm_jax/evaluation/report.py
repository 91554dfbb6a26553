"""Runs to a table: `ilm-jax report runs/a runs/b ... > RESULTS.md`.

A row holds the runs of one task, family, model, training and sampler that differ in their seed alone. Each number is
read from what the runs wrote (run.json, eval.json, event files); a run that lacks one is refused.
"""

import functools
import itertools
import json
import sys
import time
from typing import NamedTuple

import numpy as np
from absl import flags
from etils import epath

from ilm_jax import metrics
from ilm_jax.console import command
from ilm_jax.runs import logs, run_file
from ilm_jax.types import UserError

PAPER = {  # sequence accuracy in %, arXiv 2505.05755, table 1 (one seed each)
  ('star easy', 'arm'): 32.3, ('star easy', 'arm, oracle order'): 100.0, ('star easy', 'mdm'): 100.0,
  ('star easy', 'it'): 35.2, ('star easy', 'ilm'): 100.0,
  ('star medium', 'arm'): 75.0, ('star medium', 'mdm'): 36.5, ('star medium', 'it'): 22.1,
  ('star medium', 'ilm'): 100.0,
  ('star hard', 'arm'): 23.0, ('star hard', 'mdm'): 21.0, ('star hard', 'it'): 17.5, ('star hard', 'ilm'): 99.1,
  ('zebra', 'arm'): 81.2, ('zebra', 'arm, oracle order'): 91.2, ('zebra', 'mdm'): 82.6, ('zebra', 'ilm'): 90.0,
}  # fmt: skip

FREE = (  # settings that change no result, or little: they may differ within a row
  *(
    'seed',
    'keep',
    'log_every',
    'report_seconds',
    'checkpoint_every',
    'eval.print_samples',
    'data.num_workers',
    'data.prefetch',
  ),
  *('model.remat', 'model.scan_layers', 'mesh.data', 'mesh.fsdp', 'mesh.tensor'),
  *('distributed.initialization_timeout', 'distributed.heartbeat_timeout'),
)


class Run(NamedTuple):
  """What a table needs of one run."""

  workdir: str
  label: str  # of the task
  family: str
  seed: int
  steps: int  # of the weights that were tested
  budget: int  # steps the run might have made
  key: str  # the config but FREE: what the runs of a row share
  correct: tuple[float, float] | None  # sequences: (right, all), of a task with right answers
  tokens: tuple[float, float] | None
  chance: float | None
  kind: str | None  # of the likelihood
  strings: dict | None  # 'nll', 'error' and 'tokens' of each test string
  parameters: int
  seconds: float  # of training
  hardware: str
  commits: tuple[str, ...]
  sampler: str
  orders: dict  # decoding-order statistics


def read(workdir: str) -> Run:
  """Read a run; refuses one that lacks what a row needs."""
  path = epath.Path(workdir)
  run = run_file.parse_run((path / 'run.json').read_bytes()) if (path / 'run.json').exists() else None
  if run is None:
    raise UserError(f'{workdir}: expected the workdir of a run, but there is no run.json of one in it')
  if not (path / 'eval.json').exists():
    raise UserError(f'{workdir} has no eval.json: finish the run, or evaluate it with --mode=eval')
  try:
    result = json.loads((path / 'eval.json').read_bytes())
    config = result['config']
    answers = 'exact_match' in result['pairs']
    if not answers and not result.get('strings'):
      raise UserError(
        f'{workdir}: {config["task"]["label"]} has no right answers to count, and no likelihoods were '
        'measured: evaluate it with --mode=eval --config.eval.score='
      )
    if not result['finished']:
      raise UserError(f'{workdir} was tested before it was finished: finish it, or stop_at earlier')
    starts = [*run['starts'], result['start']]
    flat = _flatten(config)
    return Run(
      workdir=str(workdir),
      label=config['task']['label'],
      family=_family(config),
      seed=result['seed'],
      steps=result['step'],
      budget=config['steps'],
      key=json.dumps({name: value for name, value in flat.items() if name not in FREE}, sort_keys=True),
      correct=tuple(result['pairs']['exact_match']) if answers else None,
      tokens=tuple(result['pairs']['token_accuracy']) if answers else None,
      chance=result['chance'] + 0.0 if answers else None,
      kind=result.get('likelihood'),
      strings=result.get('strings'),
      parameters=result['parameters'],
      seconds=logs.wall_seconds(workdir),
      hardware=' + '.join(sorted({f'{start["devices"]}, {start["cpus"]} cores' for start in starts})),
      commits=tuple(sorted({start['commit'] for start in starts})),
      sampler=result['sampler'],
      orders={name: pair for name, pair in result['pairs'].items() if name.startswith('order_')},
    )
  except (KeyError, TypeError, ValueError) as error:
    raise UserError(f'{workdir} lacks {error}, which a row needs: evaluate it again with --mode=eval') from None


def _family(config: dict) -> str:
  """The family, and what makes it another one in a table."""
  if config['family'] == 'arm' and config['task'].get('order') in ('oracle', 'solver'):
    return 'arm, oracle order'
  if config.get('loss', {}).get('length_weight', 'none') != 'none':
    return f'{config["family"]}, length_weight={config["loss"]["length_weight"]}'
  return config['family']


def _flatten(tree: dict, prefix: str = '') -> dict:
  out = {}
  for name, value in tree.items():
    out |= _flatten(value, f'{prefix}{name}.') if isinstance(value, dict) else {prefix + name: value}
  return out


def rows_of(runs: list[Run], mixed_commits: bool) -> list[list[Run]]:
  """Group runs into rows; refuses two runs of one seed, and commits that are mixed without having been asked for."""
  groups = {}
  for run in runs:
    groups.setdefault((run.label, run.family, run.key), []).append(run)
  for row in groups.values():
    row.sort(key=lambda run: run.seed)
    for a, b in itertools.pairwise(row):
      if a.seed == b.seed:
        raise UserError(f'{a.workdir} and {b.workdir} are the same run twice (seed {a.seed}): leave one out')
    commits = {commit: run.workdir for run in row for commit in run.commits}
    if 'unknown' in commits and not mixed_commits:
      raise UserError(
        f'{commits["unknown"]} does not say its commit (it ran outside a git checkout): run it from one, or ask for '
        'the row all the same with --mixed_commits'
      )
    if len(commits) > 1 and not mixed_commits:
      named = ', '.join(f'{short(commit)} ({workdir})' for commit, workdir in sorted(commits.items()))
      raise UserError(
        f'{row[0].label}, {row[0].family}: one row holds results of several commits, {named}: run them again at one, '
        'or ask for the mixture with --mixed_commits'
      )
  return list(groups.values())


def short(commit: str) -> str:
  """A commit for people: nine letters, and `+changes` where the tree was not clean."""
  return commit[:9] + commit[40:]


def student(values: list[float]) -> str:
  """Mean and 95 % Student interval of at least 3 values in %, clipped to 0 - 100; a dash for fewer."""
  if len(values) < 3:
    return '–'
  from scipy import stats

  mean = float(np.mean(values))
  half = float(stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5)
  return f'{mean:.1f} ({max(0.0, mean - half):.1f} – {min(100.0, mean + half):.1f})'


def _pooled(pairs) -> str:
  total, weight = (sum(column) for column in zip(*pairs, strict=True))
  low, high = metrics.wilson(total, weight)
  return f'{100 * total / weight:.1f} ({100 * low:.1f} – {100 * high:.1f})'


def accuracies(rows: list[list[Run]]) -> list[str]:
  """The lines of the table of right answers."""
  lines = [
    '',
    '## Right answers',
    '',
    'Accuracies in %, on held-out test examples. *Pooled*: over the examples of all seeds, with',
    "Wilson's 95 % interval. *Mean of seeds*: with Student's 95 % interval, from three seeds on, cut at 0 and 100.",
    'All seeds of a row answer the same test examples; the steps are those of the weights best on validation.',
    'The paper is arXiv 2505.05755, table 1: one seed, other sizes and budgets unless the row says the same.',
    '',
    '| task | family | sequence accuracy, pooled | each seed | mean of seeds | token accuracy | chance | paper |',
    '|---|---|---|---|---|---|---|---|',
  ]
  for row in rows:
    each = [100 * run.correct[0] / run.correct[1] for run in row]
    tokens = [sum(column) for column in zip(*(run.tokens for run in row), strict=True)]
    paper = PAPER.get((row[0].label, row[0].family))
    cells = [
      row[0].label, row[0].family, _pooled([run.correct for run in row]), ', '.join(f'{value:.1f}' for value in each),
      student(each), f'{100 * tokens[0] / tokens[1]:.1f}', f'{100 * row[0].chance:.1f}',
      '–' if paper is None else f'{paper:.1f}',
    ]  # fmt: skip
    lines.append('| ' + ' | '.join(cells) + ' |')
  return lines


def likelihoods(rows: list[list[Run]]) -> list[str]:
  """The lines of the table of likelihoods."""
  lines = [
    '',
    '## Likelihoods',
    '',
    '-log p of held-out test strings in nats: of a string with its end, and a token (the end is one too), with 95 %',
    'intervals over the strings, each the mean of its seeds. *Exact*, or an upper *bound* estimated by sampling, whose',
    'standard error of the mean is the last column; a bound may lie above another exact value for being loose alone.',
    '',
    '| task | family | -log p | nats a string | nats a token | each seed, a string | strings | error |',
    '|---|---|---|---|---|---|---|---|',
  ]
  for row in rows:
    for run in row:
      if not run.strings:
        raise UserError(f'{run.workdir} has no likelihoods, other runs of its row have: evaluate it with --mode=eval')
    nll_SxN = np.array([run.strings['nll'] for run in row])
    per_string, per_token = intervals(nll_SxN.mean(0), np.array(row[0].strings['tokens']))
    error = np.square([run.strings['error'] for run in row]).sum() ** 0.5 / nll_SxN.size
    cells = [
      row[0].label, row[0].family, row[0].kind, '{:.2f} ± {:.2f}'.format(*per_string),
      '{:.4f} ± {:.4f}'.format(*per_token), ', '.join(f'{value:.2f}' for value in nll_SxN.mean(1)),
      str(nll_SxN.shape[1]), f'{error:.2f}',
    ]  # fmt: skip
    lines.append('| ' + ' | '.join(cells) + ' |')
  return lines


def intervals(nll_N, tokens_N) -> tuple[tuple[float, float], tuple[float, float]]:
  """(mean, half of its 95 % interval) of nats a string, and of nats a token: a ratio, by linearisation."""
  count, size_N = len(nll_N), np.asarray(tokens_N) + 1.0

  def half(value_N):
    return 1.96 * float(np.std(value_N, ddof=1)) / count**0.5 if count > 1 else float('inf')

  ratio = float(nll_N.sum() / size_N.sum())
  return (float(nll_N.mean()), half(nll_N)), (ratio, half(nll_N - ratio * size_N) / float(size_N.mean()))


def table(rows: list[list[Run]], command: str) -> str:
  """The tables as Markdown."""
  lines = ['# Results', '', f'Made by `{command}`.']
  if scored := [row for row in rows if row[0].correct]:
    lines += accuracies(scored)
  if scored := [row for row in rows if any(run.strings for run in row)]:
    lines += likelihoods(scored)
  lines += [
    '',
    '## How each row was made',
    '',
    '| task | family | seeds | steps | parameters | training time a seed | hardware | commit | sampler |',
    '|---|---|---|---|---|---|---|---|---|',
  ]
  for row in rows:
    commits = sorted({commit for run in row for commit in run.commits})
    cells = [
      row[0].label, row[0].family, ', '.join(str(run.seed) for run in row),
      ', '.join(f'{run.steps:,} of {run.budget:,}' for run in row),
      f'{row[0].parameters:,}', ', '.join(_duration(run.seconds) for run in row),
      ' + '.join(sorted({run.hardware for run in row})), ', '.join(short(c) for c in commits), row[0].sampler,
    ]  # fmt: skip
    lines.append('| ' + ' | '.join(cells) + ' |')
  if any(run.orders for row in rows for run in row):
    lines += [
      '',
      '## In which order',
      '',
      'Over test answers. *Tau*: Kendall correlation of the step of a token with its place (1: from left to right).',
      '*Next to the last*: share of tokens that come in beside the one before. *Junction*: when the node behind the',
      'junction, the choice of an arm, comes in, from 0 (first) to 1 (last).',
      '',
      '| task | family | tau | next to the last | junction |',
      '|---|---|---|---|---|',
    ]
    for row in rows:
      cells = []
      for name in ('order_tau', 'order_adjacent', 'order_junction'):
        pairs = [run.orders[name] for run in row if name in run.orders and run.orders[name][1]]
        cells.append(f'{sum(p[0] for p in pairs) / sum(p[1] for p in pairs):.2f}' if pairs else '–')
      lines.append(f'| {row[0].label} | {row[0].family} | ' + ' | '.join(cells) + ' |')
  lines += ['', '## Runs', '']
  lines += [f'- `{run.workdir}`{_plot_links(run)}' for row in rows for run in row]
  return '\n'.join(lines) + '\n'


def _duration(seconds: float) -> str:
  minutes = round(seconds / 60)
  return f'{minutes // 60} h {minutes % 60} min' if minutes >= 60 else f'{minutes} min'


def _plot_links(run: Run) -> str:
  names = {'accuracy.png': 'accuracy against steps', 'loss.png': 'loss against steps', 'order.png': 'order of decoding'}
  there = [f'[{text}]({epath.Path(run.workdir) / name})' for name, text in names.items() if plotted(run, name)]
  return ': ' + ', '.join(there) if there else ''


def plotted(run: Run, name: str) -> bool:
  """Is the picture there?"""
  return (epath.Path(run.workdir) / name).exists()


def plot(workdir: str) -> None:
  """Draw what was learned against steps (accuracy.png, or loss.png) and the order of decoding (order.png)."""
  try:
    import matplotlib
  except ImportError:
    raise UserError('drawing needs matplotlib: make setup EXTRAS=report, or --noplots') from None
  matplotlib.use('agg')
  from matplotlib import pyplot

  def save(figure, name):
    figure.tight_layout()
    with (epath.Path(workdir) / name).open('wb') as file:
      figure.savefig(file, format='png')
    pyplot.close(figure)

  scalars = logs.read_scalars(workdir)
  losses = scalars.get('validation/loss', [])
  figure, axis = pyplot.subplots(figsize=(6.4, 3.6), dpi=120)
  if answers := 'validation/exact_match' in scalars:
    for name, colour in (('exact_match', '#14609f'), ('token_accuracy', '#3a7d44')):
      if points := scalars.get(f'validation/{name}'):
        steps, values = zip(*points, strict=True)
        axis.plot(steps, [100 * value for value in values], color=colour, label=name.replace('_', ' '), marker='.')
    axis.set(ylabel='validation, %', ylim=(-2, 102))
  elif losses:
    axis.plot(*zip(*losses, strict=True), color='#14609f', label='loss', marker='.')
    axis.set(ylabel='validation loss')
  axis.set(xlabel='training steps')
  if points := scalars.get('train/loss'):
    other = axis.twinx() if answers else axis
    other.plot(*zip(*points, strict=True), color='#999999', linewidth=0.8, label='training loss', zorder=0)
    if answers:
      other.set(ylabel='training loss (grey)', ylim=(0, None))
  axis.legend(loc='center right' if answers else 'upper right', frameon=False)
  axis.set_title(str(workdir), fontsize=9)
  save(figure, 'accuracy.png' if answers else 'loss.png')

  places = json.loads((epath.Path(workdir) / 'eval.json').read_text()).get('order_places')
  if places:
    share = np.array(places) / np.maximum(np.sum(places, axis=1, keepdims=True), 1)
    figure, axis = pyplot.subplots(figsize=(4.4, 3.8), dpi=120)
    image = axis.imshow(share, cmap='Blues', vmin=0, vmax=1, aspect='auto')
    axis.set(xlabel='place in the answer', ylabel='step of decoding')
    axis.set_title(f'{workdir}: what comes when', fontsize=9)
    figure.colorbar(image, label='share of the tokens of a step')
    save(figure, 'order.png')


def define(values: flags.FlagValues) -> None:
  """Define this command's flags."""
  flags.DEFINE_bool('mixed_commits', False, 'Put runs of several commits into one row.', flag_values=values)
  flags.DEFINE_bool('plots', True, 'Draw accuracy.png into each run folder.', flag_values=values)


def run(arguments: list[str], values, workdirs: list[str]) -> int:
  """Read, draw, print."""
  if not workdirs:
    raise UserError('no runs given: expected their folders, ilm-jax report runs/a runs/b > RESULTS.md')
  try:
    rows = rows_of([read(workdir) for workdir in workdirs], values.mixed_commits)
    if values.plots:
      for workdir in workdirs:
        plot(workdir)
    made = time.strftime('%Y-%m-%d')
    print(table(rows, f'ilm-jax report {" ".join(arguments)}` on `{made}'), end='')
  except BrokenPipeError:
    raise
  except OSError as error:
    raise UserError(f'{error.filename or "a file"}: {error.strerror or error}') from None
  return 0


def main(argv=None) -> int:
  """Run the command."""
  argv = sys.argv if argv is None else argv
  return command(__doc__, define, functools.partial(run, argv[1:]), argv, positional=True)


if __name__ == '__main__':
  sys.exit(main())
