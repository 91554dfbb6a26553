"""The model families (ilm, arm, it, mdm): each is a module of pure functions with the interface `contract.Family`.

A family module imports `types`, `special_tokens`, `models` and the shared modules of this package, but no task code; it
receives the data of a task as arrays. To read the code, start with `contract.py`, then `ilm.py`.

To add a family, write a module that defines `FAMILY = Family(...)` and set `config.family` to its import path, or to a
short name that you add to FAMILIES (docs/extending.md).
"""

from ilm_jax.families.contract import Family
from ilm_jax.plugins import find

FAMILIES = {name: f'ilm_jax.families.{name}' for name in ('ilm', 'arm', 'it', 'mdm')}


def get(name: str) -> Family:
  """Return a family by its name in FAMILIES, or by the import path of its module.

  Family modules are imported on demand, so that data workers, which only corrupt examples, need not load JAX.
  """
  return find(name, table=FAMILIES, attribute='FAMILY', kind=Family, setting='config.family')


def make_sample_config(family: Family, cfg, sampling, *, suppressed_tokens, compute: str):
  """Build a family's SampleConfig from a config, using `sampling` in place of the config's own `sampling` section."""
  decided = family.sample_settings(cfg)
  return family.SampleConfig.create(
    sampling, suppressed_tokens=suppressed_tokens, compute=compute, vocab_chunk=cfg.loss.vocab_chunk, **decided
  )
