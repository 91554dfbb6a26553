"""Read finished runs for `ilm-jax report`, and group runs that differ only in their seed into table rows."""

import itertools
import json
from typing import NamedTuple

from etils import epath

from ilm_jax.runs import logs, run_file
from ilm_jax.types import UserError

FREE_SETTINGS = (  # settings with little or no effect on results, so runs in one table row may differ in them
  *('seed', 'keep', 'log_every', 'report_seconds', 'checkpoint_every', 'eval.print_samples'),
  *('data.num_workers', 'data.prefetch', 'model.remat', 'model.scan_layers', 'mesh.data', 'mesh.fsdp', 'mesh.tensor'),
  *('distributed.initialization_timeout', 'distributed.heartbeat_timeout'),
)


class Run(NamedTuple):
  """The results and settings of one finished run."""

  workdir: str
  label: str  # name of the task in the tables
  family: str  # name of the model family in the tables, see `_family_name`
  seed: int
  steps: int  # training steps of the evaluated weights
  budget: int  # training steps that the config allows
  key: str  # all settings except FREE_SETTINGS, as JSON; equal for all runs in a table row
  pairs: dict  # name -> (total, weight): decoding-order statistics, and accuracies if the task has right answers
  chance: float | None  # exact-match accuracy to expect from random answers
  kind: str | None  # kind of likelihood: 'exact', 'bound' or 'importance-weighted'; None if not measured
  strings: dict | None  # lists over the test strings: 'nll' (nats), 'error' (standard error of nll) and 'tokens'
  parameters: int  # number of parameters of the model
  seconds: float  # training time
  hardware: str
  commits: tuple[str, ...]  # git commits from which the run was started or resumed
  sampler: str  # description of the sampler's settings


def read(workdir: str) -> Run:
  """Read a run from its run.json, eval.json and event files; raise UserError if it is unfinished or not evaluated."""
  path = epath.Path(workdir)
  run = run_file.parse_run((path / 'run.json').read_bytes()) if (path / 'run.json').exists() else None
  if run is None:
    raise UserError(f'{workdir}: expected the workdir of a run, but it has no valid run.json')
  if not (path / 'eval.json').exists():
    raise UserError(f'{workdir} has no eval.json: finish the run, or evaluate it with --mode=eval')
  try:
    result = json.loads((path / 'eval.json').read_bytes())
    config = run_file.migrate(result['config'])
    pairs = result['pairs']
    if 'exact_match' not in pairs and not result.get('strings'):
      advice = 'evaluate the run with --mode=eval --config.eval.score='
      raise UserError(f'{workdir}: the task has no right answers, and no likelihoods were measured: {advice}')
    if not result['finished']:
      raise UserError(
        f'the run in {workdir} was evaluated before its last step: finish training, and evaluate it again'
      )
    starts = [*run['starts'], result['start']]
    settings = {name: value for name, value in run_file.flatten(config).items() if name not in FREE_SETTINGS}
    return Run(
      workdir=str(workdir),
      label=config['task']['label'],
      family=_family_name(config),
      seed=result['seed'],
      steps=result['step'],
      budget=config['steps'],
      key=json.dumps(settings, sort_keys=True),
      pairs=pairs,
      chance=None if result['chance'] is None else result['chance'] + 0.0,
      kind=result.get('likelihood'),
      strings=result.get('strings'),
      parameters=result['parameters'],
      seconds=logs.wall_seconds(workdir),
      hardware=' + '.join(sorted({f'{start["devices"]}, {start["cpus"]} cores' for start in starts})),
      commits=tuple(sorted({start['commit'] for start in starts})),
      sampler=result['sampler'],
    )
  except (KeyError, TypeError, ValueError) as error:
    advice = 'evaluate the run again with --mode=eval'
    raise UserError(f'{workdir}: eval.json lacks {error}, which the tables need: {advice}') from None


def _family_name(config: dict) -> str:
  """Return the family's name for the tables, with the settings that distinguish variants of the family."""
  if config['family'] == 'arm' and config['task'].get('order') in ('oracle', 'solver'):
    return 'arm, oracle order'
  weight = config.get('loss', {}).get('length_weight', 'none')
  return config['family'] if weight == 'none' else f'{config["family"]}, length_weight={weight}'


def group(runs: list[Run], mixed_commits: bool) -> list[list[Run]]:
  """Group runs into table rows of the same task, family and settings; sort each row by seed.

  UserError if two runs in a row have the same seed or, without `mixed_commits`, several or unknown git commits.
  """
  rows = {}
  for run in runs:
    rows.setdefault((run.label, run.family, run.key), []).append(run)
  for row in rows.values():
    row.sort(key=lambda run: run.seed)
    for a, b in itertools.pairwise(row):
      if a.seed == b.seed:
        raise UserError(f'{a.workdir} and {b.workdir} have equal settings and the same seed {a.seed}: leave one out')
    commits = {commit: run.workdir for run in row for commit in run.commits}
    if 'unknown' in commits and not mixed_commits:
      advice = 'run it in a checkout, or accept it with --mixed_commits'
      raise UserError(f'run {commits["unknown"]} was started outside a git checkout, so it has no commit: {advice}')
    if len(commits) > 1 and not mixed_commits:
      listed = ', '.join(f'{short_commit(commit)} ({workdir})' for commit, workdir in sorted(commits.items()))
      advice = 'run them again at one commit, or accept them with --mixed_commits'
      raise UserError(f'{row[0].label}, {row[0].family}: the runs are from several commits, {listed}: {advice}')
  return list(rows.values())


def short_commit(commit: str) -> str:
  """Return the first nine digits of a commit hash, with `+changes` if the working tree had uncommitted changes."""
  return commit[:9] + commit[40:]
