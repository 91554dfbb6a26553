"""The families of sequence models, each a module of pure functions under one contract.

    corrupt(rng, example, cfg, u=None) -> dict of numpy arrays   host side, in `families.corrupt` (numpy only)
    model_settings(cfg)                -> fields of ModelConfig that the family decides (causal, stop head)
    loss(outputs, batch, cfg)          -> {name: (total, weight)}, pure; 'loss' is what is minimised
    SampleConfig.create(sampling, ...) -> the hashable settings of `sample`, from a config's `sampling` part
    sample(forward, rng, prompt, cfg)  -> Sampled, in one jit
    score(forward, rng, tokens_BxL, fixed_BxL, length_B, cfg, kind=None, longest=...)
                                       -> Score: its kind, and its error
    check_score(kind, longest)         refuse what `score` would refuse
    most_targets(longest, answer)      targets of the longest example, at most

A new family is one file and one entry of FAMILIES; modules are imported when asked for, so that the workers of the
data pipeline, which need the corruption alone, stay light.
"""

import importlib

from ilm_jax.types import UserError

FAMILIES = {name: f'ilm_jax.families.{name}' for name in ('ilm', 'arm', 'it')}


def get(name: str):
  """Return the module of a family."""
  if name not in FAMILIES:
    raise UserError(f'config.family={name!r}: expected one of {", ".join(FAMILIES)}')
  return importlib.import_module(FAMILIES[name])
