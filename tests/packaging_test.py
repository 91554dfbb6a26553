"""The wheel: what files it contains, and that it trains and generates in an empty folder."""

import json
import os
import subprocess
import sys
import zipfile

import pytest
import small

GRAPH = '6,8|8,2|3,1|9,4|9,6|4,3/9,2'


@pytest.fixture(scope='module')
def site(tmp_path_factory):
  """Build the wheel and unpack it; return the folder with the unpacked files."""
  folder = tmp_path_factory.mktemp('wheel')
  command = [sys.executable, '-m', 'pip', 'wheel', '-q', '--no-deps', f'--wheel-dir={folder}', str(small.ROOT)]
  subprocess.run(command, check=True, cwd=folder, timeout=300)
  (wheel,) = folder.glob('*.whl')
  with zipfile.ZipFile(wheel) as file:
    file.extractall(folder / 'site')
  return folder / 'site'


def run(site, folder, *arguments) -> str:
  """Run `ilm-jax` from the unpacked wheel in a folder; return its standard output."""
  env = {**os.environ, 'PYTHONPATH': str(site), 'JAX_PLATFORMS': 'cpu'}
  code = 'import sys; from ilm_jax.cli import main; sys.exit(main())'
  command = [sys.executable, '-c', code, *arguments]
  done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)
  assert done.returncode == 0, done.stderr
  return done.stdout


@pytest.mark.long
def test_the_wheel_contains_the_package_and_nothing_else(site):
  top = {path.name for path in site.iterdir()}
  assert {name for name in top if not name.endswith('.dist-info')} == {'ilm_jax'}
  files = {str(path.relative_to(small.ROOT)) for path in (small.ROOT / 'ilm_jax').rglob('*.py')}
  assert {str(path.relative_to(site)) for path in site.rglob('*.py')} == files
  assert (site / 'ilm_jax' / 'py.typed').exists() and (site / 'ilm_jax' / 'inference' / 'trace.html').exists()
  (info,) = site.glob('*.dist-info')
  assert 'ilm-jax = ilm_jax.cli:main' in (info / 'entry_points.txt').read_text()


@pytest.mark.long
def test_the_wheel_trains_and_generates_in_a_folder_that_has_another_configs_package(site, tmp_path):
  (tmp_path / 'configs').mkdir()
  (tmp_path / 'configs' / '__init__.py').write_text('raise RuntimeError("the wrong configs package")\n')
  assert run(site, tmp_path, 'configs').startswith('star:tiny')
  settings = ['steps=50', 'eval.every=50', 'task.num_train=500', 'task.num_validation=20', 'task.num_test=20']
  out = run(site, tmp_path, 'train', '--config=star:tiny', *(f'--config.{setting}' for setting in settings))
  assert 'test exact match at step 50' in out
  answer = json.loads(run(site, tmp_path, 'generate', '--workdir=runs/star-tiny', f'--prompt={GRAPH}'))
  assert answer['text'].startswith(GRAPH + '=')
