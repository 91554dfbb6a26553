"""Paths that a user gives: ~, schemes, buckets, and names that look like patterns."""

import os

import pytest

from ilm_jax import paths
from ilm_jax.types import UserError


def test_a_tilde_means_the_home_folder(monkeypatch, tmp_path):
  monkeypatch.setenv('HOME', str(tmp_path))
  assert os.fspath(paths.resolve('~/runs', '--workdir')) == f'{tmp_path}/runs'
  with pytest.raises(UserError, match=r'--workdir=~nobody9/runs: the home folder of ~nobody9 is unknown'):
    paths.resolve('~nobody9/runs', '--workdir')


@pytest.mark.parametrize(
  'text', ['file:///data/runs', 'file:////data/runs', 'FILE:/data/runs', 'file://localhost/data/runs', '/data/runs']
)
def test_a_file_url_is_a_local_path(text):
  assert os.fspath(paths.resolve(text, '--workdir')) == '/data/runs'


@pytest.mark.parametrize('text', ['file://data/runs', 'file://host/data', 'file:data', 'file://'])
def test_a_file_url_with_another_host_or_a_relative_path_is_refused(text):
  with pytest.raises(UserError, match=f'^--workdir={text}: expected a local path, or file:///PATH with an absolute'):
    paths.resolve(text, '--workdir')


@pytest.mark.parametrize('text', ['gss://b/x', 'http://b/x', 'gs:/b/x', 'gs:b', 'hdfs://b'])
def test_unknown_schemes_are_refused_with_a_one_line_error(text):
  with pytest.raises(UserError, match=r'--out=.*: unknown scheme .*: expected a local path, or one of gs://, s3://'):
    paths.resolve(text, '--out')


@pytest.mark.parametrize('scheme', paths.BUCKETS)
def test_the_error_for_a_bucket_names_the_package_to_install(monkeypatch, scheme):
  monkeypatch.setattr(paths, '_installed', lambda package: False)
  with pytest.raises(UserError, match=rf'--workdir={scheme}://b/x: reading {scheme}:// needs .*pip install'):
    paths.resolve(f'{scheme}://b/x', '--workdir')


def test_brackets_in_a_folder_name_are_not_read_as_a_glob_pattern(tmp_path):
  for folder in ('z1', 'z[1]'):
    (tmp_path / folder).mkdir()
    (tmp_path / folder / f'events.{folder}').write_text('')
  assert [file.name for file in paths.matching(tmp_path / 'z[1]', 'events.*')] == ['events.z[1]']
  assert paths.matching(tmp_path / 'none', '*') == []
