"""Fixtures for tests that train the small run (tests/small.py) inside the test process."""

import pytest
import small

from ilm_jax.distributed import sharding


@pytest.fixture(scope='module', autouse=True)
def programs(tmp_path_factory):
  """Share compiled programs among all tests of a module."""
  with small.compilation_cache_in(tmp_path_factory.getbasetemp() / 'programs'), small.shared_programs():
    yield


@pytest.fixture
def one_device(monkeypatch):
  """Make every mesh contain only the first device."""
  monkeypatch.setattr(sharding, 'make_mesh', lambda *_: small.mesh())
