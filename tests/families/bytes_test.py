"""Samples and infilled texts contain only whole characters: tokens for single bytes of a character are excluded."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ilm_jax import families
from ilm_jax.configs import text as text_config
from ilm_jax.data import tokenizers
from ilm_jax.inference import api
from ilm_jax.models import transformer
from ilm_jax.special_tokens import EOS, PAD
from ilm_jax.types import Rule

BROKEN = '\ufffd'
LINES = ['the dog ran home .', 'Tom saw a big bird and was happy', "don't sit here , said Anna !"] * 20
SIZES = {'num_layers': 1, 'num_heads': 2, 'd_model': 16, 'd_ff': 32, 'dropout': 0.0, 'attention_dropout': 0.0}


@pytest.fixture(scope='module')
def make_lm(tmp_path_factory):
  """Return a function from a family to a LanguageModel whose most probable tokens are single bytes of characters."""
  tokenizer, folder = tokenizers.train_sentencepiece(iter(LINES), size=320), tmp_path_factory.mktemp('tokenizer')
  tokenizer.save(folder)
  logit_V = np.zeros(tokenizer.vocab_size, np.float32)
  logit_V[[*tokenizer.byte_ids]], logit_V[[PAD, EOS]] = 3.0, -9.0

  def make(family, **settings):
    cfg = text_config.get_config('small')
    cfg.family, cfg.task.tokenizer.path, cfg.task.length = family, str(folder), 40
    cfg.corrupt.update({'fim_rate': 0.5, 'length': 40})
    cfg.sampling.update({'max_length': 40, 'stop_threshold': 1.0, 'end_threshold': 0.99})
    model_cfg = transformer.ModelConfig(tokenizer.vocab_size, **SIZES, **families.get(family).model_settings(cfg))
    params = jax.jit(lambda key: transformer.unbox(transformer.init(model_cfg, key)))(jax.random.key(0))
    # The hidden features of every text are (1, 0, 0, ...), so the logits are the first column of the unembedding.
    params['final_norm']['scale'] *= 0
    shift = params['final_modulation']['linear'] if family == 'mdm' else params['final_norm']
    shift['bias'] = jnp.zeros_like(shift['bias']).at[0].set(1.0)
    params['unembed'] = jnp.zeros_like(params['unembed']).at[:, 0].set(logit_V)
    rules = {'token': Rule(), **({'gap': Rule()} if family in ('ilm', 'it') else {})}
    return api.LanguageModel(cfg, model_cfg, params, min_buffer=40, max_steps=8, **rules, **settings)

  return functools.cache(make)


def texts_of(lm, number):
  """Return `number` generated texts followed by `number` infilled texts."""
  parts = ['Don’t say “', '” to the ', '.'] if lm.family.name in ('ilm', 'it') else ['Don’t say “', '” to Zoë.']
  limits = {'least': 3, 'most': 3} if lm.family.name == 'mdm' else {}
  filled = lm.infill([parts], n=number, **limits)[0]
  for infilling in filled:
    assert infilling.text == ''.join([parts[0], *(f + p for f, p in zip(infilling.fillings, parts[1:], strict=True))])
    assert any(infilling.fillings)
  return [generation.text for generation in lm.generate([''] * number)] + [infilling.text for infilling in filled]


@pytest.mark.parametrize('family', ['ilm', 'it', 'arm', 'mdm'])
def test_samples_and_infilled_gaps_contain_no_incomplete_utf8_characters(make_lm, family):
  texts = texts_of(make_lm(family), 40)
  assert len(texts) == 80 and sum(BROKEN in text for text in texts) == 0
  assert len(set(texts)) > 40


def test_the_setting_bytes_allows_incomplete_utf8_characters_to_be_generated(make_lm):
  assert sum(BROKEN in text for text in texts_of(make_lm('ilm', bytes=True), 40)) > 60


def test_a_line_break_is_a_whole_character_and_can_be_generated(make_lm):
  tokenizer = make_lm('ilm').tokenizer
  (line_break,), accented = tokenizer.encode('\n'), tokenizer.encode('é')
  assert tokenizer.pieces([line_break]) == ['<0x0A>'] and line_break not in tokenizer.byte_ids
  assert len(accented) == 2 and set(accented) <= set(tokenizer.byte_ids)
