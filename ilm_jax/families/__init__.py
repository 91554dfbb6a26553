"""The families of sequence models: one module of pure functions each, under the contract of `contract.Family`.

A family imports `types`, `special_tokens`, `models` and the shared modules of this room; it knows nothing of tasks, and
meets them only as arrays. Start with `contract.py`, then `ilm.py`.

A new family is a module that ends in `FAMILY = Family(...)`. It needs an entry in FAMILIES to be found by a short name;
without one, `config.family` takes the import path of the module (docs/extending.md).
"""

from ilm_jax.families.contract import Family
from ilm_jax.plugins import find

FAMILIES = {name: f'ilm_jax.families.{name}' for name in ('ilm', 'arm', 'it', 'mdm')}


def get(name: str) -> Family:
  """Return a family by its name in FAMILIES, or by the import path of its module.

  Modules are imported on demand, so that the data workers, which only corrupt, need not load JAX.
  """
  return find(name, table=FAMILIES, attribute='FAMILY', kind=Family, setting='config.family')


def make_sample_config(family: Family, cfg, sampling, *, suppressed_tokens, compute: str):
  """Return a family's SampleConfig from a config, with `sampling` in place of the config's own `sampling` section."""
  decided = family.sample_settings(cfg)
  return family.SampleConfig.create(
    sampling, suppressed_tokens=suppressed_tokens, compute=compute, vocab_chunk=cfg.loss.vocab_chunk, **decided
  )
