"""Look up families and tasks by name, in this package or in any module that can be imported."""

import importlib
import importlib.util

from ilm_jax.types import UserError


def find(name: str, *, table: dict[str, str], attribute: str, kind: type, setting: str):
  """Import the module table[name], or `name` itself if it is not in the table, and return its `attribute`."""
  path = table.get(name, name)
  try:
    spec = importlib.util.find_spec(path) if path.replace('.', '').isidentifier() else None
  except ModuleNotFoundError:
    spec = None
  if not spec:
    raise UserError(
      f'{setting}={name!r}: expected one of {", ".join(table)}, or the import path of a module that '
      f'defines {attribute} (the current folder is searched, too)'
    )
  try:
    value = getattr(importlib.import_module(path), attribute, None)
  except UserError:
    raise
  except Exception as error:  # a user's module may raise anything
    raise UserError(f'{setting}={name!r}: {spec.origin} cannot be imported: {type(error).__name__}: {error}') from error
  if not isinstance(value, kind):
    raise UserError(
      f'{setting}={name!r}: {spec.origin} defines no {attribute} of type {kind.__module__}.{kind.__name__}'
    )
  return value
