"""`ilm-jax convert`: exported files, 64-bit mode, and byte order marks. tests/cli_test.py tests its flags."""

import errno
import os

import jax
import numpy as np
import pytest
from text_models import make_language_model, run_command

from ilm_jax.evaluation import convert
from ilm_jax.inference import api


def test_export_writes_a_complete_file_or_no_file(tokenizer, tmp_path, monkeypatch, capsys):
  lm = make_language_model(tokenizer, tmp_path / 'tokenizer', 'ilm')
  lm.step = 7
  monkeypatch.setattr(api, 'load', lambda *_: lm)
  monkeypatch.setenv('HOME', str(tmp_path))
  flags = ['--workdir=~/run', '--out=~/weights.npz']
  save = np.savez

  def fail(file, **arrays):
    save(file, **arrays)
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  monkeypatch.setattr(np, 'savez', fail)
  code, out, err = run_command(capsys, convert, *flags)
  assert (code, out) == (1, '') and err == 'error: --out=~/weights.npz cannot be written: No space left on device\n'
  monkeypatch.setattr(np, 'savez', save)
  code, out, err = run_command(capsys, convert, *flags)
  assert code == 0 and out.startswith('~/weights.npz: ') and [*tmp_path.glob('*.npz')] == [tmp_path / 'weights.npz']
  np.testing.assert_array_equal(np.load(tmp_path / 'weights.npz')['embed_tokens.weight'], lm.params['embed'])


def test_64_bit_mode_does_not_change_the_comparison_with_the_reference_code(golden):
  numbers = golden('ilm')
  expected = convert.compare('ilm', numbers)
  with jax.enable_x64(True):
    assert convert.compare('ilm', numbers) == expected


@pytest.mark.parametrize('start', [b'', b'\xef\xbb\xbf'])
def test_config_json_may_start_with_a_byte_order_mark(start, tmp_path):
  (tmp_path / 'config.json').write_bytes(start + b'{"num_heads": 3}')
  assert convert.read_num_heads(tmp_path / 'config.json') == 3
