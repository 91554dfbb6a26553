"""The model families (ilm, arm, it, mdm): each is a module of pure functions and defines a `contract.Family`.

A family may import `types`, `special_tokens`, `models` and the shared modules of this package, but no task; it gets
the data of a task as arrays. Start with `contract.py`, then `ilm.py`. docs/extending.md shows how to add a family.
"""

from ilm_jax.families.contract import Family
from ilm_jax.plugins import find

FAMILIES = {name: f'ilm_jax.families.{name}' for name in ('ilm', 'arm', 'it', 'mdm')}


def get(name: str) -> Family:
  """Return a family by its name in FAMILIES, or by the import path of a module that defines `FAMILY = Family(...)`.

  The module is imported only now: data workers load `corruption`, but no JAX.
  """
  return find(name, table=FAMILIES, attribute='FAMILY', kind=Family, setting='config.family')


def make_sample_config(family: Family, cfg, sampling, *, suppressed_tokens, byte_ids=(), compute: str):
  """Build a family's SampleConfig from a config, with `sampling` in place of the config's `sampling` section.

  A SampleConfig without a field `byte_ids` gets these ids, those of single bytes, as suppressed tokens.
  """
  decided = family.sample_settings(cfg)
  if 'byte_ids' in family.SampleConfig._fields:
    decided = {**decided, 'byte_ids': tuple(byte_ids)}
  elif not sampling.get('bytes'):
    suppressed_tokens = (*suppressed_tokens, *byte_ids)
  return family.SampleConfig.create(
    sampling, suppressed_tokens=suppressed_tokens, compute=compute, vocab_chunk=cfg.loss.vocab_chunk, **decided
  )
