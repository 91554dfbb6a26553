"""Insertion language models in JAX and Flax.

import ilm_jax
lm = ilm_jax.load('runs/star-tiny')
lm.generate(['1,2|2,3/1,3'])
"""

from importlib import import_module

_PUBLIC = {'load': 'ilm_jax.inference.api', 'LanguageModel': 'ilm_jax.inference.api', 'UserError': 'ilm_jax.types'}
__all__ = ['LanguageModel', 'UserError', 'load']


def __getattr__(name):
  """Import a public name on first use, so that `import ilm_jax` does not load JAX."""
  if name == '__version__':
    from importlib.metadata import PackageNotFoundError, version

    try:
      return version('ilm_jax')
    except PackageNotFoundError:
      return 'unknown'
  if name not in _PUBLIC:
    raise AttributeError(f'module ilm_jax has no attribute {name!r}')
  return getattr(import_module(_PUBLIC[name]), name)
