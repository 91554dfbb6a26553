"""Tests of cache folders (their location, and how paths are interpreted) and of shared memory for worker processes."""

import os
import types

import pytest
from text_helpers import refused

from ilm_jax import paths
from ilm_jax.data import storage, tokenizers


@pytest.fixture
def home(tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  monkeypatch.setenv('XDG_CACHE_HOME', '')
  monkeypatch.setattr(paths, '_installed', lambda package: True)
  return tmp_path


def test_cache_paths_may_start_with_a_tilde_or_a_file_url_scheme_and_contain_brackets(home):
  for folder in ('~/z[1]', f'file://{home}/z[1]', str(home / 'z[1]')):
    made = storage.once(folder, 'entry', lambda place: (place / 'x').write_text('once'))
    assert made == home / 'z[1]' / 'entry' and (made / 'x').read_text() == 'once'
  assert sorted(path.name for path in home.rglob('*')) == ['.entry.lock', 'entry', 'x', 'z[1]']


def test_writing_a_cache_entry_removes_unfinished_copies_only_from_its_own_cache_folder(tmp_path):
  own, other = tmp_path / 'z[1]' / '.entry.part-1', tmp_path / 'z1' / '.entry.part-1'
  for folder in (own, other):
    folder.mkdir(parents=True)
  storage.once(tmp_path / 'z[1]', 'entry', lambda place: None)
  assert not own.exists() and other.exists()


def test_the_local_copy_of_a_bucket_lies_in_the_users_cache_folder(home, monkeypatch):
  assert storage.local('gs://bucket/a').parent == home / '.cache' / 'ilm_jax' / 'data'
  assert storage.local('gs://bucket/a') != storage.local('gs://bucket/b')
  monkeypatch.setenv('XDG_CACHE_HOME', str(home / 'other'))
  assert storage.local('gs://bucket/a').parent == home / 'other' / 'ilm_jax' / 'data'


def test_a_path_in_an_unknown_home_folder_gives_an_error_that_names_the_setting(home, monkeypatch):
  monkeypatch.delenv('HOME')
  monkeypatch.setattr('pwd.getpwuid', lambda uid: {}[f'uid not found: {uid}'])  # simulates a user id without a name
  with refused('task.cache=~/data', 'home folder', 'whole path'):
    storage.local('~/data')
  with refused('XDG_CACHE_HOME', 'home folder'):
    storage.local('gs://bucket/a')
  with refused('task.tokenizer.path=~/words', 'home folder'):
    tokenizers.read('~/words')


@pytest.mark.parametrize('path', ['gss://bucket/x', 'hf:/me/words', 's3://bucket/x'])
def test_unknown_url_schemes_and_buckets_whose_python_package_is_missing_are_refused(monkeypatch, path):
  monkeypatch.setattr(paths, '_installed', lambda package: False)
  with refused(f'task.cache={path}'):
    storage.once(path, 'entry', None)
  with refused(f'task.tokenizer.path={path}'):
    tokenizers.read(path)


def test_worker_processes_are_refused_if_there_is_too_little_shared_memory(monkeypatch):
  def disk(blocks, free):
    monkeypatch.setattr(
      os, 'statvfs', lambda path: types.SimpleNamespace(f_blocks=blocks, f_bavail=free, f_frsize=4096)
    )

  disk(1_000, 256)
  assert storage.free_shared_memory('data.num_workers', 2) == 2**20
  disk(0, 0)  # no limit
  assert storage.free_shared_memory('data.num_workers', 2) > 2**40
  disk(1_000, 255)
  with refused('data.num_workers=2', '/dev/shm', '1020 KiB', 'set data.num_workers=0', '--shm-size'):
    storage.free_shared_memory('data.num_workers', 2)

  def read_only(*_):
    raise OSError(30, 'Read-only file system')

  monkeypatch.setattr(storage.multiprocessing, 'get_context', read_only)
  with refused('task.num_workers=3', 'Read-only file system', 'set task.num_workers=0'):
    storage.free_shared_memory('task.num_workers', 3)
