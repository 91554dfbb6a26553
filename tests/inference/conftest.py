"""Fixtures: tokenizers, and language models with random weights."""

import functools
import string

import pytest
from random_models import FEW, WORDS, make_lm, sentences

from ilm_jax.data import tokenizers
from ilm_jax.special_tokens import SPECIAL


@pytest.fixture(scope='session')
def sentencepiece():
  return tokenizers.train_sentencepiece(iter(sentences(300)), size=330)


@pytest.fixture(scope='session')
def wordpiece():
  letters = string.ascii_lowercase
  pieces = [*SPECIAL, *map(str.lower, WORDS), *letters, *(f'##{c}' for c in letters), '##ing']
  return tokenizers.WordPiece('\n'.join(dict.fromkeys(pieces)).encode())


@pytest.fixture(scope='session')
def small_lm(sentencepiece, tmp_path_factory):
  """Return a function from a family's name to a LanguageModel with random weights and batch size 4."""
  folder = tmp_path_factory.mktemp('tokenizer')
  return functools.cache(lambda family: make_lm(sentencepiece, folder, family, max_steps=8, **FEW))
