"""Tests of the `ilm-jax` command: its help, the packaged configs, and the one-line messages for user errors."""

import concurrent.futures
import pathlib
import re

import numpy as np
import pytest
import small

from ilm_jax import cli, main
from ilm_jax.configs import default, star
from ilm_jax.configs import list as packaged
from ilm_jax.evaluation import convert
from ilm_jax.families import settings
from ilm_jax.runs import run_file
from ilm_jax.training import experiment
from ilm_jax.types import UserError

GOLDEN = small.ROOT / 'tests' / 'golden'


def call(capsys, *arguments) -> tuple[int, str, str]:
  """Run `ilm-jax` in this process; returns (exit code, standard output, standard error)."""
  code = cli.main(['ilm-jax', *arguments])
  return code, *capsys.readouterr()


def test_help_lists_every_subcommand_and_every_subcommand_has_help(capsys):
  code, out, _ = call(capsys, '--help')
  assert code == 0 and all(re.search(rf'^  {name} +\w', out, re.M) for name in cli.SUBCOMMANDS)
  assert call(capsys) == (0, out, '') == call(capsys, 'help')
  for name in cli.SUBCOMMANDS:
    code, out, err = call(capsys, name, '--help')
    assert (code, err) == (0, '') and len(out) > 40, name


def test_an_unknown_subcommand_gives_a_one_line_error(capsys):
  code, out, err = call(capsys, 'trian')
  assert (code, out, err.count('\n')) == (1, '', 1) and 'ilm-jax trian: expected one of train, eval' in err


def test_the_version_flag_prints_the_version(capsys):
  assert re.fullmatch(r'ilm_jax (\d+\.\d+\.\d+\S*|unknown)\n', call(capsys, '--version')[1])


def test_every_packaged_config_is_listed_and_loads(capsys):
  import importlib

  out = call(capsys, 'configs')[1]
  files = {path.stem for path in pathlib.Path(packaged.FOLDER).glob('*.py')} - {'__init__', 'default', 'list'}
  assert set(packaged.NAMES) == files
  for line in out.splitlines():
    if match := re.match(r'(\w+):(\w+)  +\S', line):
      assert importlib.import_module(f'ilm_jax.configs.{match[1]}').get_config(match[2]).steps > 0
  assert len(re.findall(r'^\w+:\w+  ', out, re.M)) == 13


def test_a_packaged_config_is_found_by_its_name(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  file = str(packaged.FOLDER / 'star.py')
  assert main.locate_config(['x', '--config=star:tiny', '--config.steps=5']) == [
    'x',
    f'--config={file}:tiny',
    '--config.steps=5',
  ]
  assert main.locate_config(['x', '-config', 'star'])[2] == file
  monkeypatch.setenv('HOME', str(tmp_path))
  (tmp_path / 'own.py').write_text('')
  assert main.locate_config(['x', '--config=~/own.py:a'])[1] == f'--config={tmp_path}/own.py:a'
  (tmp_path / 'star').write_text('')  # a file with the name of a packaged config takes precedence
  assert main.locate_config(['x', '--config=star:tiny'])[1] == '--config=star:tiny'


@pytest.mark.parametrize('value', ['nosuch:tiny', 'configs/nosuch.py', 'default', '../configs/star'])
def test_an_unknown_config_gives_a_one_line_error_that_lists_the_packaged_configs(value, capsys):
  code, _, err = call(capsys, 'train', f'--config={value}')
  assert code == 1 and err.count('\n') == 1
  assert 'no packaged config of this name: expected a path, or one of lm1b, star, text, tinystories, zebra' in err


def test_a_config_at_a_url_is_refused(capsys):
  code, _, err = call(capsys, 'train', '--config=gs://b/c.py:tiny')
  assert (code, err) == (
    1,
    'error: --config=gs://b/c.py:tiny: a config cannot be read from a URL: expected a local path\n',
  )


def test_the_error_for_an_old_setting_name_states_the_new_name(capsys):
  code, _, err = call(capsys, 'train', '--config=star:tiny', '--config.data.workers=2')
  assert code == 1 and 'config.data.workers was renamed: use --config.data.num_workers' in err


def test_a_config_file_that_uses_the_old_name_of_a_setting_is_refused():
  config = star.get_config('tiny')
  config.optimizer.accumulate = 2  # a config file can set any name, also an old one
  with pytest.raises(UserError, match=r'optimizer.accumulate was renamed: set config.optimizer.accumulation_steps'):
    experiment.build(config)


def parse(*arguments):
  """Return the config that `ilm-jax train` builds from its arguments."""
  configs = []
  assert main.command('', lambda values: None, lambda values: configs.append(values.config), ['x', *arguments]) == 0
  return configs[0]


def test_every_optional_setting_can_be_unset_on_the_command_line():
  names = default.optional_settings()
  assert {f'sampling.{name}' for name in settings.OPTIONAL} < set(names)
  assert {'model.preset', 'model.d_ff', 'model.residual'} < set(names) and len(names) == 11
  sizes = {
    name: 3
    for name in names
    if parse('--config=star:tiny')[name.split('.')[0]].get_type(name.split('.')[1]) in (int, float)
  }
  cfg = parse('--config=star:tiny', *(f'--config.{name}={sizes.get(name, "none")}' for name in names))
  assert [cfg[name.split('.')[0]][name.split('.')[1]] for name in names] == [sizes.get(name, 'none') for name in names]
  for form in ('--config.{}=None', '--config.{} None'):
    cfg = parse('--config=star:tiny', *(word for name in names for word in form.format(name).split()))
    assert all(cfg[name.split('.')[0]][name.split('.')[1]] is None for name in names)


def test_a_second_command_in_the_same_process_does_not_see_the_flags_of_the_first(tmp_path, capsys):
  assert parse('--config=star:tiny', '--config.model.num_layers=7', '--config.seed=5').model.num_layers == 7
  (tmp_path / 'own.py').write_text('from ilm_jax.configs.star import get_config as get\n')
  assert main.main(['x', f'--config={tmp_path}/own.py']) == 1  # the file defines no get_config
  assert "has no attribute 'get_config'" in capsys.readouterr().err
  with concurrent.futures.ThreadPoolExecutor() as threads:
    cfg = threads.submit(parse, '--config=star:tiny').result()
  assert (cfg.model.num_layers, cfg.seed) == (4, 0)


def test_the_eval_subcommand_overrides_the_mode_flag(monkeypatch):
  given = []
  monkeypatch.setattr(main, 'main', given.extend)
  cli.main(['ilm-jax', 'eval', '--mode=train'])
  assert given[-1] == '--mode=eval'


def test_renamed_settings_in_old_configs_get_their_new_names():
  old = {'data': {'workers': 3, 'rows': 4}, 'hosts': {'start_seconds': 9}, 'eval': {'judge': 'hf:x'}, 'steps': 1}
  new = {'data': {'num_workers': 3, 'rows': 4}, 'distributed': {'initialization_timeout': 9}, 'steps': 1}
  assert run_file.migrate(old) == {**new, 'eval': {'perplexity_model': 'hf:x'}}
  assert run_file.migrate(new) == new


def test_convert_check_passes_on_the_numbers_of_the_reference_implementation(capsys):
  code, out, _ = call(capsys, 'convert', f'--check={GOLDEN}')
  assert code == 0 and all(len(re.findall(rf'^{name} ', out, re.M)) >= 3 for name in convert.FAMILIES)


def test_convert_check_fails_if_one_reference_number_is_wrong(tmp_path, capsys):
  with np.load(GOLDEN / 'arm.npz') as file:
    numbers = dict(file)
  numbers['grad/embed_tokens.weight'] = numbers['grad/embed_tokens.weight'] * (1 + 1e-4)
  np.savez(tmp_path / 'arm.npz', **numbers)
  code, out, _ = call(capsys, 'convert', f'--check={tmp_path}')
  assert code == 1 and re.search(r'^arm .*worst embed_tokens.weight +1\.0e-04  above the limit', out, re.M)


@pytest.mark.parametrize(
  ('dropped', 'message'),
  [
    ('grad/', 'arm.npz holds no gradients'),
    ('target_ids', 'arm.npz does not hold the expected arrays'),
    ('', 'cannot be'),
  ],
)
def test_a_damaged_file_of_reference_numbers_gives_a_one_line_error(dropped, message, tmp_path, capsys):
  with np.load(GOLDEN / 'arm.npz') as file:
    np.savez(tmp_path / 'arm.npz', **{name: array for name, array in file.items() if not name.startswith(dropped)})
  if not dropped:
    (tmp_path / 'arm.npz').write_bytes(b'PK\x03\x04 no archive')
  code, _, err = call(capsys, 'convert', f'--check={tmp_path}')
  assert code == 1 and err.count('\n') == 1 and message in err


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ([], 'expected --check=FOLDER, or --workdir=FOLDER with --out=FILE'),
    (['--check=/nowhere'], 'expected a folder with ilm.npz, arm.npz or mdm.npz'),
    (['--workdir=runs/x'], '--out is missing'),
    (['--workdir=runs/x', '--out=x.bin'], 'expected a file that ends in .npz or .safetensors'),
  ],
)
def test_wrong_convert_flags_give_a_one_line_error(arguments, message, capsys):
  code, _, err = call(capsys, 'convert', *arguments)
  assert code == 1 and err.count('\n') == 1 and message in err


@pytest.mark.parametrize(('actual', 'expected'), [([np.nan], [1.0]), ([1.0], [np.nan]), ([1.0, 1.0], [1.0])])
def test_a_nan_or_a_shape_mismatch_counts_as_an_infinite_relative_error(actual, expected):
  assert convert.relative_error(actual, expected) == np.inf
