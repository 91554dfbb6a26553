"""Eight virtual CPU devices, exact matrix products, quick compilation, no silent rank promotion; reference numbers."""

import os
import pathlib

import jax
import numpy as np
import pytest

jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_num_cpu_devices', 8)
jax.config.update('jax_default_matmul_precision', 'highest')
jax.config.update('jax_numpy_rank_promotion', 'raise')
jax.config.update('jax_disable_most_optimizations', True)  # programs run once or twice: a third of the time is saved
# For processes that tests start, too: programs compile in a third of the time; newer versions do not know it, and abort
os.environ['XLA_FLAGS'] = '--xla_cpu_use_fusion_emitters=false' if jax.__version_info__ < (0, 11) else ''

GOLDEN = pathlib.Path(__file__).parent / 'golden'


@pytest.fixture(scope='session')
def golden():
  """Read the arrays of tests/golden/NAME.npz: `golden('ilm')`."""

  def load(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / f'{name}.npz') as file:
      return dict(file)

  return load
