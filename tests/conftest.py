"""Settings for all tests: eight virtual CPU devices, exact matrix products, strict rank promotion, fast compilation."""

import os
import pathlib

import jax
import numpy as np
import pytest

jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_num_cpu_devices', 8)
jax.config.update('jax_default_matmul_precision', 'highest')
jax.config.update('jax_numpy_rank_promotion', 'raise')
# Tests run each program only once or twice, so skipping optimizations saves a third of their time.
jax.config.update('jax_disable_most_optimizations', True)
# Without fusion emitters, XLA compiles CPU programs three times as fast; newer JAX versions reject this flag.
# Processes that the tests start inherit the environment variable.
os.environ['XLA_FLAGS'] = '--xla_cpu_use_fusion_emitters=false' if jax.__version_info__ < (0, 11) else ''

# The slowest files start first, so that the test processes finish at about the same time.
SLOW_FILES = (
  *('resume_test', 'readme_test', 'processes_test', 'commands_test', 'text_training_test', 'extending_test'),
  *('train_step_test', 'families_test', 'loop_test', 'mdm_test', 'api_test', 'compile_test'),
)
GOLDEN = pathlib.Path(__file__).parent / 'golden'


@pytest.fixture(scope='session')
def golden():
  """Return a function that loads tests/golden/NAME.npz (numbers from the reference code), such as `golden('ilm')`."""

  def load(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / f'{name}.npz') as file:
      return dict(file)

  return load


def pytest_collection_modifyitems(items):
  """Move the tests of SLOW_FILES to the front."""
  order = {name: index for index, name in enumerate(SLOW_FILES)}
  items.sort(key=lambda item: order.get(item.path.stem, len(order)))
