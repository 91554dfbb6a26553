"""Helpers for tests of text evaluation: random sentences, small language models and scoring models."""

import re

import jax
import numpy as np
from ml_collections import ConfigDict

from ilm_jax import families
from ilm_jax.configs import text as text_config
from ilm_jax.evaluation import scoring_models
from ilm_jax.inference import api
from ilm_jax.models import transformer
from ilm_jax.runs import run_file

WORDS = re.split(' ', 'the a dog cat ran home sat saw Tom Anna was happy sad . , ! and then bird big small blue')
MAX_LENGTH = 96  # maximum number of tokens per row in `make_language_model`


def sentences(number, seed=0):
  """Return `number` random sentences of 3 to 8 words."""
  rng = np.random.default_rng(seed)
  return [' '.join(rng.choice(WORDS, rng.integers(3, 9))) for _ in range(number)]


def make_language_model(tokenizer, folder, family):
  """Return a LanguageModel of a family with random weights; its tokenizer is written to `folder`."""
  tokenizer.save(folder)
  cfg = text_config.get_config('small')
  cfg.family, cfg.task.tokenizer.path, cfg.task.length = family, str(folder), MAX_LENGTH
  cfg.sampling.update({'stop_threshold': 0.0, 'stop_temperature': 0.3})
  sizes = {'num_layers': 1, 'num_heads': 2, 'd_model': 16, 'd_ff': 32, 'dropout': 0.0, 'attention_dropout': 0.0}
  settings = families.get(family).model_settings(ConfigDict({'model': {}}))
  model_cfg = transformer.ModelConfig(tokenizer.vocab_size, **sizes, **settings)
  params = jax.jit(lambda key: transformer.unbox(transformer.init(model_cfg, key)))(jax.random.key(0))
  params = jax.tree.map(lambda x: x + 0.2 * jax.random.normal(jax.random.key(x.size), x.shape), params)
  return api.LanguageModel(cfg, model_cfg, params, batch_size=4, min_buffer=MAX_LENGTH)


class TableModel(scoring_models.ScoringModel):
  """A fake scoring model: a token id is a word's length, and -log p is the id divided by the previous id."""

  def __init__(self, max_tokens=6):
    super().__init__('table', max_tokens, batch_size=3)

  def encode(self, text):
    return list(map(len, text.split()))

  def token_nll(self, ids_BxL, length_B):
    before_BxL = np.concatenate([np.ones((len(ids_BxL), 1)), ids_BxL[:, :-1]], axis=1)
    return ids_BxL / np.maximum(before_BxL, 1)


def write_run(folder, family='arm', task='text'):
  """Write a minimal run.json for a family and a task; return the folder as a string."""
  folder.mkdir(parents=True)
  config = {name: {} for name in ('model', 'sampling', 'loss', 'eval')}
  config |= {'family': family, 'task': {'name': task}}
  run_file.write_json(folder / 'run.json', {'config': config, 'starts': []})
  return str(folder)


def write_corpus(folder):
  """Write stories to valid.txt, one per paragraph, and a single sentence to train.txt; return the folder."""
  rng = np.random.default_rng(0)
  stories = [' '.join(f'{words.capitalize()}.' for words in sentences(rng.integers(1, 7), seed=i)) for i in range(40)]
  (folder / 'valid.txt').write_text('\n\n'.join(stories))
  (folder / 'train.txt').write_text('nothing here.')
  return folder


def run_command(capsys, module, *arguments):
  """Run `module.main` with arguments; return (exit code, standard output, standard error)."""
  code = module.main([module.__name__, *map(str, arguments)])
  return code, *capsys.readouterr()
