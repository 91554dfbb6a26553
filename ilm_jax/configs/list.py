"""List the configs that come with the package: `ilm-jax configs`."""

import importlib
import sys
from pathlib import Path

from ilm_jax.console import command

FOLDER = Path(__file__).parent
NAMES = ('star', 'zebra', 'tinystories', 'lm1b', 'text')


def run(values) -> int:
  """Print a line for each packaged config: its name for --config, and a description."""
  del values
  modules = {name: importlib.import_module(f'ilm_jax.configs.{name}') for name in NAMES}
  about = {f'{name}:{key}': text for name, module in modules.items() for key, text in module.VARIANTS.items()}
  width = max(map(len, about))
  print('\n'.join(f'{name:<{width}}  {text}' for name, text in about.items()))
  print(f'\nUse a config by its name: --config=star:tiny. The files are in {FOLDER}; use an edited copy by its path:')
  print('--config=path/to/file.py:tiny.')
  return 0


def main(argv=None) -> int:
  """Run `ilm-jax configs`; return the exit code."""
  return command(__doc__, lambda values: None, run, argv)


if __name__ == '__main__':
  sys.exit(main())
