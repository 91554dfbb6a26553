"""Fixtures: a tokenizer, an ARM scoring model, and its negative log-likelihoods computed token by token."""

import functools

import jax
import numpy as np
import pytest
from text_models import make_language_model, sentences

from ilm_jax.data import tokenizers
from ilm_jax.evaluation import scoring_models
from ilm_jax.models import transformer
from ilm_jax.special_tokens import BOS, CLS, EOS, UNK


@pytest.fixture(scope='session')
def tokenizer():
  return tokenizers.train_sentencepiece(iter(sentences(300)), size=330)


@pytest.fixture(scope='session')
def arm(tokenizer, tmp_path_factory):
  """Return a scoring model of family=arm with random weights."""
  lm = make_language_model(tokenizer, tmp_path_factory.mktemp('arm'), 'arm')
  return scoring_models.ArmScoringModel(lm, name='runs/arm', batch_size=2)


@pytest.fixture(scope='session')
def expected_nll(arm):
  """Return a function from token ids to their negative log-likelihood, with a separate forward pass per token."""
  forward = jax.jit(lambda *row: transformer.Forward(arm.lm.model_cfg, arm.lm.params)(*row))
  impossible = [i for i in range(7) if i not in (EOS, UNK)]

  @functools.cache
  def next_nll(before, token):
    row = [CLS, BOS, *before]
    outputs = forward(np.array([row + [0] * (64 - len(row))]), np.array([len(row)]))
    logits_V = np.array(outputs.hidden_BxLxD[0, len(row) - 1] @ outputs.unembed_VxD.T, np.float64)
    logits_V[impossible] = -np.inf
    return np.logaddexp.reduce(logits_V) - logits_V[token]

  def nll(ids):
    return sum(next_nll(tuple(ids[:n]), token) for n, token in enumerate(ids))

  return nll
