"""The families of sequence models, each a module of pure functions under one contract.

    corrupt(rng, example, cfg, u=None) -> dict of numpy arrays   host side, in `families.corrupt` (numpy only)
    model_settings(cfg)                -> fields of ModelConfig that the family decides (causal, stop head)
    loss(outputs, batch, cfg)          -> {name: (total, weight)}, pure; 'loss' is what is minimised
    SampleConfig.create(sampling, ...) -> the hashable settings of `sample`, from a config's `sampling` part
    sample(forward, rng, prompt, cfg)  -> Sampled, in one jit
    score(forward, rng, tokens_BxL, fixed_BxL, length_B, cfg, kind=None, longest=...)
                                       -> Score: its kind, and its error
    check_score(kind, longest)         refuse what `score` would refuse
    sizes(cfg, longest, answer)        -> (tokens, targets), at most, of a corrupted example, from the numbers of tokens
                                          and of free tokens that an example may have; refuses a config that the family
                                          can't mean

and, where a family has them:

    sample_settings(cfg)               -> fields of SampleConfig that the whole config decides
    FILLS                              what a gap may be told: 'limits' (if missing), least and most tokens; 'free',
                                          nothing; 'masks', exactly how many
    check_prompt(given, cfg)           refuse a prompt {'tokens', 'open', ...} that `sample` cannot serve

A new family is one file and one entry of FAMILIES; modules are imported when asked for, so that the workers of the
data pipeline, which need the corruption alone, stay light.
"""

import importlib

from ilm_jax.types import UserError

FAMILIES = {name: f'ilm_jax.families.{name}' for name in ('ilm', 'arm', 'it', 'mdm')}


def get(name: str):
  """Return the module of a family."""
  if name not in FAMILIES:
    raise UserError(f'config.family={name!r}: expected one of {", ".join(FAMILIES)}')
  return importlib.import_module(FAMILIES[name])


def make_sample_config(family, cfg, sampling, *, closed_tokens, compute: str):
  """A family's SampleConfig, from a whole config and settings in place of its `sampling` part."""
  decided = family.sample_settings(cfg) if hasattr(family, 'sample_settings') else {}
  return family.SampleConfig.create(
    sampling, closed_tokens=closed_tokens, compute=compute, vocab_chunk=cfg.loss.vocab_chunk, **decided
  )
