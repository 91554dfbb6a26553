"""Print Markdown tables of the results of finished runs.

    ilm-jax report runs/a runs/b ... > RESULTS.md

A table row combines runs that differ only in their seed: same task, family, model, training and sampler. All numbers
are read from the files that the runs wrote (run.json, eval.json, event files). A run that has not been finished and
evaluated causes an error.
"""

import functools
import os
import sys
import time

from absl import flags

from ilm_jax import paths
from ilm_jax.console import command
from ilm_jax.evaluation import report_plots, report_rows, report_tables
from ilm_jax.types import UserError


def define(values: flags.FlagValues) -> None:
  """Define the flags of `ilm-jax report`."""
  flags.DEFINE_bool('mixed_commits', False, 'Allow runs of several commits in one table row.', flag_values=values)
  flags.DEFINE_bool('plots', True, 'Write plots (PNG) into the folder of each run.', flag_values=values)


def run(arguments: list[str], values, workdirs: list[str]) -> int:
  """Read the runs, write plots and print the report, which quotes the command's `arguments`."""
  if not workdirs:
    raise UserError('no runs given: expected the folders of runs, as in `ilm-jax report runs/a runs/b > RESULTS.md`')
  workdirs = [os.fspath(paths.resolve(workdir)) for workdir in workdirs]
  try:
    rows = report_rows.group([report_rows.read(workdir) for workdir in workdirs], values.mixed_commits)
    if values.plots:
      for workdir in workdirs:
        report_plots.plot(workdir)
    print(report_tables.report(rows, ' '.join(['ilm-jax report', *arguments]), time.strftime('%Y-%m-%d')), end='')
  except OSError as error:
    raise UserError(f'{error.filename or "a file"}: {error.strerror or error}') from None
  return 0


def main(argv=None) -> int:
  """Run the command `ilm-jax report`; return the exit code."""
  argv = sys.argv if argv is None else argv
  return command(__doc__, define, functools.partial(run, argv[1:]), argv, positional=True)
