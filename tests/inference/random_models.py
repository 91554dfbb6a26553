"""Language models with random weights, for texts of a few words."""

import re

import jax
import numpy as np
from ml_collections import ConfigDict

from ilm_jax import families
from ilm_jax.configs import text as text_config
from ilm_jax.inference import api
from ilm_jax.models import transformer

WORDS = re.split(' ', 'the a dog cat ran home sat saw Tom Anna was happy sad . , ! and then bird big small blue')
FEW = {'batch_size': 4, 'min_buffer': 96}  # LanguageModel settings: small batches, a single buffer length
SIZES = {'num_layers': 1, 'num_heads': 2, 'd_model': 16, 'd_ff': 32, 'dropout': 0.0, 'attention_dropout': 0.0}


def sentences(number, seed=0):
  """Return `number` sentences of random words."""
  rng = np.random.default_rng(seed)
  return [' '.join(rng.choice(WORDS, rng.integers(3, 9))) for _ in range(number)]


def make_lm(tokenizer, folder, family='ilm', open_gap_embedding=False, **settings):
  """Return a LanguageModel of a family with random weights."""
  cfg = text_config.get_config('small')
  cfg.family = family
  tokenizer.save(folder)
  cfg.task.tokenizer.path = str(folder)
  cfg.task.length = 96
  cfg.sampling.update({'stop_threshold': 0.0, 'stop_temperature': 0.3})
  if family == 'arm':
    cfg.corrupt.fim_rate = 0.5
  fields = families.get(family).model_settings(ConfigDict({'model': {'conditioning': 'adaln'}}))
  fields |= {'open_gap_embedding': open_gap_embedding, **SIZES}
  model_cfg = transformer.ModelConfig(tokenizer.vocab_size, **fields)
  params = jax.jit(lambda key: transformer.unbox(transformer.init(model_cfg, key)))(jax.random.key(0))
  params = jax.tree.map(lambda x: x + 0.2 * jax.random.normal(jax.random.key(x.size), x.shape), params)
  return api.LanguageModel(cfg, model_cfg, params, **{'min_buffer': 32, **settings})
