"""Scoring models: token-by-token likelihoods, padding, truncation, caching, Hugging Face models, and errors."""

import sys
import types

import numpy as np
import pytest
from text_models import TableModel, write_run

from ilm_jax.evaluation import scoring_models
from ilm_jax.special_tokens import UNK
from ilm_jax.types import UserError

TEXTS = ['the dog ran home .', 'Tom', 'a cat and a bird', '', 'the dog ran home .', 'Anna saw ' * 20]


def test_the_nll_of_a_text_is_the_sum_of_its_token_nlls(arm, tokenizer, expected_nll):
  scored = arm.nll(TEXTS)
  for text, result in zip(TEXTS, scored, strict=True):
    ids = tokenizer.encode(text)
    assert (result.ids, result.num_tokens, result.truncated) == (ids, len(ids), False)
    np.testing.assert_allclose(result.nll, expected_nll(ids), rtol=1e-5, atol=1e-5)
  assert scored[3] == (0.0, [], False)
  arm.cache.clear()
  np.testing.assert_allclose(arm.nll(TEXTS[:1])[0].nll, scored[0].nll, rtol=1e-6)  # the same NLL if scored alone


def test_a_text_with_unknown_tokens_has_a_finite_nll(arm, expected_nll):
  ids_BxL = np.zeros((2, 32), np.int32)
  ids_BxL[0, :3] = 20, UNK, 30
  nll_BxL = arm.token_nll(ids_BxL, np.array([3, 0]))
  np.testing.assert_allclose(nll_BxL[0, :3].sum(), expected_nll([20, UNK, 30]), rtol=1e-5)


def test_scoring_texts_of_all_lengths_compiles_at_most_three_programs(arm):
  arm.nll([' '.join(['dog'] * n) for n in range(1, 90)])
  assert arm.next_losses._cache_size() <= 3  # texts are padded to 32, 64 or the model's maximum number of tokens


def test_texts_that_are_too_long_are_truncated_and_marked_as_truncated(arm, tokenizer):
  text = 'the dog ran home . ' * 40
  (result,) = arm.nll([text])
  assert result.truncated and result.ids == tokenizer.encode(text)[:94] and arm.max_tokens == 94
  assert TableModel().nll(['a b c d e f', 'a b c d e f g']) == [(6.0, [1] * 6, False), (6.0, [1] * 6, True)]


def test_a_scoring_model_scores_every_distinct_text_once():
  encoded = []

  class Model(TableModel):
    def encode(self, text):
      encoded.append(text)
      return super().encode(text)

  cached = Model()
  assert cached.nll(['a', 'bb', 'a']) == TableModel().nll(['a', 'bb', 'a'])
  assert cached.nll(['bb', 'c']) == TableModel().nll(['bb', 'c']) and encoded == ['a', 'bb', 'c']


def test_runs_that_cannot_be_scoring_models_are_refused(tmp_path, monkeypatch):
  with pytest.raises(UserError, match=r'the scoring model .*/none: expected the workdir of a run.* write hf:NAME'):
    scoring_models.get(tmp_path / 'none')
  with pytest.raises(UserError, match='is a run of family=ilm: expected family=arm, which has exact likelihoods'):
    scoring_models.get(write_run(tmp_path / 'ilm', 'ilm'))
  with pytest.raises(UserError, match=r'is a run of task\.name=star: expected .* and task\.name=text'):
    scoring_models.get(write_run(tmp_path / 'star', task='star'))
  monkeypatch.setitem(sys.modules, 'transformers', None)
  with pytest.raises(UserError, match=r'hf:NAME needs torch and transformers: pip install "ilm_jax\[perplexity\]"'):
    scoring_models.get('hf:gpt2')


# --- Hugging Face models ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize('start', ['bos_token', 'eos_token'])
def test_a_hugging_face_model_scores_a_text_token_by_token(start, tmp_path):
  transformers, torch = pytest.importorskip('transformers'), pytest.importorskip('torch')
  from tokenizers import Tokenizer, models, pre_tokenizers

  words = Tokenizer(models.WordLevel({'<s>': 0, 'a': 1, 'b': 2, 'c': 3}, unk_token='a'))
  words.pre_tokenizer = pre_tokenizers.Whitespace()
  transformers.PreTrainedTokenizerFast(tokenizer_object=words, **{start: '<s>'}).save_pretrained(tmp_path)
  net = transformers.GPT2LMHeadModel(
    transformers.GPT2Config(vocab_size=4, n_positions=9, n_embd=8, n_layer=2, n_head=2, bos_token_id=0)
  ).eval()
  net.save_pretrained(tmp_path)
  model, texts = scoring_models.get(f'hf:{tmp_path}'), ['a b c', 'b', '', 'c a ' * 5]
  assert (model.name, model.max_tokens) == (f'hf:{tmp_path}', 8)
  for text, result in zip(texts, model.nll(texts), strict=True):
    ids, expected = [' abc'.index(word) for word in text.split()][:8], 0.0
    for n, token in enumerate(ids):
      with torch.no_grad():
        logits_V = net(input_ids=torch.tensor([[0, *ids[:n]]])).logits[0, -1]
      expected -= float(torch.log_softmax(logits_V, -1)[token])
    assert (result.ids, result.truncated) == (ids, len(text.split()) > 8)
    assert result.nll == pytest.approx(expected, rel=1e-4)
  assert model.encode('a <s> b') == [1, 1, 1, 1, 2]  # '<s>' is ordinary text: three unknown words


def test_an_unusable_hugging_face_model_gives_a_one_line_error(monkeypatch):
  def fail(name):
    raise OSError(f'{name} is not a local folder\nand is not a valid model identifier')

  tokenizer = types.SimpleNamespace(bos_token_id=None, eos_token_id=None)
  transformers = types.ModuleType('transformers')
  transformers.AutoTokenizer = types.SimpleNamespace(from_pretrained=lambda name, **_: tokenizer)
  transformers.AutoModelForCausalLM = types.SimpleNamespace(from_pretrained=lambda name: None)
  monkeypatch.setitem(sys.modules, 'torch', types.ModuleType('torch'))
  monkeypatch.setitem(sys.modules, 'transformers', transformers)
  with pytest.raises(UserError, match='the scoring model hf:odd has neither a BOS nor an EOS token to start from'):
    scoring_models.get('hf:odd')
  transformers.AutoModelForCausalLM.from_pretrained = fail
  message = r'the scoring model hf:x could not be loaded .*\(x is not a local folder and is not.*: name another model'
  with pytest.raises(UserError, match=message) as error:
    scoring_models.get('hf:x')
  assert '\n' not in str(error.value)
  with pytest.raises(UserError, match='the scoring model hf:: expected a model name or path after hf:'):
    scoring_models.get('hf:')
