"""Eight virtual CPU devices, exact matrix products, quick compilation, no silent rank promotion; reference numbers."""

import pathlib

import jax
import numpy as np
import pytest

jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_num_cpu_devices', 8)
jax.config.update('jax_default_matmul_precision', 'highest')
jax.config.update('jax_numpy_rank_promotion', 'raise')
jax.config.update('jax_disable_most_optimizations', True)  # programs run once or twice: a third of the time is saved

GOLDEN = pathlib.Path(__file__).parent / 'golden'


@pytest.fixture(scope='session')
def golden():
  """Read the arrays of tests/golden/NAME.npz: `golden('ilm')`."""

  def load(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / f'{name}.npz') as file:
      return dict(file)

  return load
