"""Look up families and tasks by name, in this package or in any module that can be imported."""

import importlib
import importlib.util

from ilm_jax.types import UserError


def find(name: str, *, table: dict[str, str], attribute: str, kind: type, setting: str):
  """Return `attribute` of the module with the import path table[name], or else name; UserError if there is none."""
  path = table.get(name, name)
  try:
    found = importlib.util.find_spec(path) if path.replace('.', '').isidentifier() else None
  except ModuleNotFoundError:
    found = None
  value = getattr(importlib.import_module(path), attribute, None) if found else None
  if not isinstance(value, kind):
    raise UserError(
      f'{setting}={name!r}: expected one of {", ".join(table)}, or the import path of a module that defines {attribute}'
    )
  return value
