"""Tests of what all commands share: failing standard streams, unusable devices, and the compilation cache."""

import io
import os
import subprocess
import sys
import types

import pytest
import small

from ilm_jax import cli, console
from ilm_jax.types import UserError, check_seed

NO_SPACE = 'error: standard output cannot be written, so a part of the output is lost: No space left on device\n'


def broken_pipe():
  """Return a text stream to a pipe that nobody reads."""
  reader, writer = os.pipe()
  os.close(reader)
  return os.fdopen(writer, 'w')


def full_disk(buffering: int = -1):
  """Return a text stream to a full disk; with buffering=1, print() itself fails, not just the next flush."""
  return os.fdopen(os.open('/dev/full', os.O_WRONLY), 'w', buffering)


@pytest.mark.parametrize('name', ['', 'help', '--version', *cli.SUBCOMMANDS])
@pytest.mark.parametrize(
  ('stream', 'result'),
  [
    (broken_pipe, (141, '')),
    (full_disk, (1, NO_SPACE)),
    (lambda: full_disk(buffering=1), (1, NO_SPACE)),
    (lambda: None, (1, 'error: standard output cannot be written, so a part of the output is lost: it is closed\n')),
  ],
  ids=['broken pipe', 'full disk', 'full disk, line buffered', 'closed'],
)
def test_a_command_fails_if_its_output_is_lost(name, stream, result, monkeypatch, capsys):
  monkeypatch.setattr(sys, 'stdout', stream())
  arguments = [name, '--help'] if name in cli.SUBCOMMANDS else [name] if name else []
  assert (cli.main(['ilm-jax', *arguments]), capsys.readouterr().err) == result
  if sys.stdout:
    sys.stdout.flush()  # as Python does when it exits


@pytest.mark.parametrize('unbuffered', ['', '1'])
@pytest.mark.parametrize('redirect, code, message', [('| true', 141, ''), ('> /dev/full', 1, NO_SPACE)])
def test_python_prints_no_traceback_at_exit_if_standard_output_cannot_be_written(redirect, code, message, unbuffered):
  command = f'"$0" -m ilm_jax.main --help {redirect}; exit ${{PIPESTATUS[0]}}'
  done = subprocess.run(
    ['bash', '-c', command, sys.executable], cwd=small.ROOT, capture_output=True, text=True,
    env={**os.environ, 'PYTHONUNBUFFERED': unbuffered},
  )  # fmt: skip
  assert (done.returncode, done.stderr) == (code, message)


def test_an_unwritable_standard_error_does_not_change_the_exit_code(monkeypatch, capsys):
  for stream in (lambda: full_disk(buffering=1), lambda: None):
    monkeypatch.setattr(sys, 'stderr', stream())
    assert cli.main(['ilm-jax', 'trian']) == 1
    assert capsys.readouterr().out == ''


def test_an_error_of_a_command_takes_precedence_over_lost_output(monkeypatch, capsys):
  def call():
    print('result')
    raise UserError('too late')

  monkeypatch.setattr(sys, 'stdout', broken_pipe())
  assert console.guard(call) == 1 and capsys.readouterr().err == 'error: too late\n'


def test_a_failed_write_to_a_file_is_not_reported_as_lost_standard_output(monkeypatch):
  def call():
    print('result')
    full_disk(buffering=1).write('x\n')

  monkeypatch.setattr(sys, 'stdout', io.StringIO())
  with pytest.raises(OSError, match='No space left'):
    console.guard(call)


@pytest.mark.parametrize(('encoding', 'expected'), [('ascii', rb'\xe9\u2019'), ('latin-1', b'\xe9\\u2019')])
def test_characters_that_the_encoding_of_the_output_lacks_are_escaped(encoding, expected, monkeypatch):
  raw = io.BytesIO()
  monkeypatch.setattr(sys, 'stdout', io.TextIOWrapper(raw, encoding=encoding))
  assert console.guard(lambda: print('\xe9\u2019')) == 0
  assert raw.getvalue() == expected + b'\n'


def test_devices_that_jax_cannot_use_give_a_one_line_error(monkeypatch, capsys):
  def devices():
    raise errors.pop()

  monkeypatch.setenv('JAX_PLATFORMS', 'cuda')
  monkeypatch.setitem(sys.modules, 'jax', types.SimpleNamespace(devices=devices))
  for reason in ('not found', 'no driver'):
    errors = [RuntimeError("no driver (set JAX_PLATFORMS='' ...)") if reason == 'no driver' else AssertionError()]
    assert console.guard(lambda: 1 / 0) == 1
    line = f'error: JAX_PLATFORMS=cuda: JAX cannot use this device ({reason}): expected cpu, or cuda or tpu with its '
    assert capsys.readouterr().err == f'{line}package installed\n'
  monkeypatch.setitem(sys.modules, 'jax', types.SimpleNamespace(devices=list))
  with pytest.raises(ZeroDivisionError):
    console.guard(lambda: 1 / 0)


def test_an_unusable_device_gives_a_one_line_error_even_inside_a_compiled_function(tmp_path):
  arguments = ['convert', f'--check={small.ROOT / "tests" / "golden"}']
  code, _, err = small.run(arguments, tmp_path, module='ilm_jax.cli', before='export JAX_PLATFORMS=xpu;')
  assert code == 1 and err.startswith('error: JAX_PLATFORMS=xpu: JAX cannot use') and err.count('\n') == 1, err


def test_every_command_prints_help_even_if_python_removes_docstrings():
  program = 'from ilm_jax import cli; print([cli.main(["ilm-jax", name, "--help"]) for name in cli.SUBCOMMANDS])'
  done = subprocess.run([sys.executable, '-OO', '-c', program], cwd=small.ROOT, capture_output=True, text=True)
  assert (done.returncode, done.stderr) == (0, '') and done.stdout.count('  --workdir: ') >= 4
  assert done.stdout.splitlines()[-1] == str([0] * len(cli.SUBCOMMANDS))


@pytest.mark.parametrize(
  ('variables', 'folder'),
  [
    ({}, '/home/a/.cache/ilm_jax/xla'),
    ({'XDG_CACHE_HOME': ''}, '/home/a/.cache/ilm_jax/xla'),
    ({'XDG_CACHE_HOME': 'relative'}, '/home/a/.cache/ilm_jax/xla'),
    ({'XDG_CACHE_HOME': '/big'}, '/big/ilm_jax/xla'),
    ({'HOME': None}, ''),  # no home folder is known: no cache, rather than a folder named ~
    ({'JAX_COMPILATION_CACHE_DIR': ''}, ''),
  ],
)
def test_the_compilation_cache_is_in_the_cache_folder_of_the_user(variables, folder, monkeypatch):
  for name in ('XDG_CACHE_HOME', 'JAX_COMPILATION_CACHE_DIR'):
    monkeypatch.delenv(name, raising=False)
  monkeypatch.setattr('pwd.getpwuid', {}.__getitem__)  # raises KeyError, as for an unknown user
  for name, value in {'HOME': '/home/a', **variables}.items():
    monkeypatch.setenv(name, value) if value is not None else monkeypatch.delenv(name)
  assert console.compilation_cache() == folder


def test_a_seed_is_an_integer_of_32_bits():
  for seed in (0, 2**31, 2**32 - 1):
    check_seed(seed)
  for seed in (-1, 2**32, 2**63, 1.5, None):
    with pytest.raises(UserError, match=r'^config.seed=.*: expected an integer from 0 to 4294967295$'):
      check_seed(seed, 'config.seed')
