"""Families and tasks by name: of this package, or of any module that can be imported."""

import importlib
import importlib.util

from ilm_jax.types import UserError


def find(name: str, *, table: dict[str, str], attribute: str, kind: type, setting: str):
  """Return the object `attribute` of the module that `name` stands for; raises UserError if there is none."""
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
