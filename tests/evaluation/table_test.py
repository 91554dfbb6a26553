"""launch/table.sh, which trains every family on planning tasks and prints the table of results."""

import os
import re
import subprocess
import sys

import pytest
import small

from ilm_jax import families

SCRIPT = small.ROOT / 'launch' / 'table.sh'


def smoke_flags() -> str:
  """Return the training flags of `make table-smoke`."""
  text = (small.ROOT / 'Makefile').read_text().replace('\\\n', ' ')
  return re.search(r'^SMOKE := (.*)$', text, re.M)[1]


def run_script(*configs, **variables):
  settings = {'PYTHON': sys.executable, **variables}
  return subprocess.run(['bash', SCRIPT, *configs], env={**os.environ, **settings}, capture_output=True, text=True)


def test_a_dry_run_prints_the_commands_of_all_runs_and_the_report():
  done = run_script(
    'star.py:tiny', 'star.py:mini', DRY_RUN='1', SEEDS='0 1', FAMILIES='ilm oracle', RUNS='r', PYTHON='python'
  )
  assert done.returncode == 0, done.stderr
  lines = done.stdout.splitlines()
  assert len(lines) == 9
  assert lines[3] == (
    'python -m ilm_jax.main --config=configs/star.py:tiny --workdir=r/star-tiny-6000-oracle-1 --config.family=arm '
    '--config.seed=1 --config.stop_at=0 --config.task.order=oracle --config.steps=6000'
  )
  assert lines[8].startswith('python -m ilm_jax.cli report r/star-tiny-6000-ilm-0 ') and lines[8].count('r/star') == 8


@pytest.mark.long
def test_table_sh_trains_every_family_once_and_prints_a_row_for_each(tmp_path):
  settings = {'RUNS': str(tmp_path / 'runs'), 'STEPS': '20', 'FLAGS': smoke_flags()}
  table = tmp_path / 'table.md'
  done = run_script('star.py:tiny', **settings, TABLE=str(table))
  assert done.returncode == 0, done.stderr
  text = table.read_text()
  for name in [*families.FAMILIES, 'arm, oracle order']:
    assert re.search(rf'^\| star tiny \| {name} \| .* \|$', text, re.M), name
  finished = {path: path.stat().st_mtime_ns for path in (tmp_path / 'runs').glob('*/eval.json')}
  assert len(finished) == 3 * (len(families.FAMILIES) + 1)
  again = run_script('star.py:tiny', **settings)
  assert again.returncode == 0 and '| star tiny | ilm |' in again.stdout
  assert {path: path.stat().st_mtime_ns for path in finished} == finished, 'a finished run was trained again'
