"""Tests of the hashes that identify data files, and of the warning if the data of a run have changed."""

import json
import os

import pytest
from text_helpers import refused

from ilm_jax.data import file_hashes


def write_at(path, content: bytes, seconds: int):
  path.write_bytes(content)
  os.utime(path, (seconds, seconds))
  return file_hashes.hash_of(path)


@pytest.mark.parametrize(('size', 'noticed'), [(0, 0), (1, 1), (60, 60), (64, 64), (300, 64)])
def test_the_hash_depends_on_the_whole_content_of_small_files_and_on_16_blocks_of_large_ones(
  tmp_path, monkeypatch, size, noticed
):
  monkeypatch.setattr(file_hashes, 'BLOCK', 4)
  first = write_at(tmp_path / 'a', b'a' * size, 1)
  assert write_at(tmp_path / 'b', b'a' * size, 2) == first, 'neither the name nor the time matters'
  assert write_at(tmp_path / 'a', b'a' * (size + 1), 1) != first
  changed = [write_at(tmp_path / 'a', b'a' * i + b'b' + b'a' * (size - i - 1), 1) != first for i in range(size)]
  assert sum(changed) == noticed and all(changed[:4] + changed[-4:])


def test_the_error_for_an_unreadable_file_names_the_file(tmp_path):
  (tmp_path / 'one').write_text('')
  with refused(str(tmp_path / 'two'), 'No such file'):
    file_hashes.hashes_of({'a': tmp_path / 'one', 'b': tmp_path / 'two'})


def test_a_warning_names_changed_new_and_missing_data_files_of_a_run(tmp_path, caplog):
  first = {'a': '1', 'b': '2', 'c': '3'}
  for hashes in (first, first):
    file_hashes.check_unchanged(tmp_path, hashes, 'data.path=x')
  assert not caplog.messages
  file_hashes.check_unchanged(tmp_path, {'a': '1', 'b': '9', 'd': '4'}, 'data.path=x')
  (line,) = caplog.messages
  assert line.startswith('data.path=x has changed') and '\n' not in line
  assert line.endswith(': b has other content, c is missing, d is new')
  assert json.loads((tmp_path / file_hashes.RECORD).read_text()) == {'a': '1', 'b': '9', 'd': '4'}
  file_hashes.check_unchanged(tmp_path, {str(i): '' for i in range(9)}, 'data.path=x')
  assert caplog.messages[1].endswith(', 3 is new, 4 is new and 7 more')
