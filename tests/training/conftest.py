"""Fixtures of the tests that train the small run in this process."""

import pytest
import small

from ilm_jax.distributed import sharding


@pytest.fixture(scope='module', autouse=True)
def programs(tmp_path_factory):
  """Compile each program once for all tests of a module."""
  with small.compilation_cache_in(tmp_path_factory.getbasetemp() / 'programs'), small.shared_programs():
    yield


@pytest.fixture
def one_device(monkeypatch):
  """Let every mesh consist of the first device only."""
  monkeypatch.setattr(sharding, 'make_mesh', lambda *_: small.mesh())
