"""Scoring models: token-by-token likelihoods, padding, truncation, caching, Hugging Face models, and bad names."""

import math
import sys
import types

import numpy as np
import pytest
from text_models import TableModel, write_run

from ilm_jax.evaluation import scoring_models
from ilm_jax.special_tokens import UNK
from ilm_jax.types import UserError

TEXTS = ['the dog ran home .', 'Tom', 'a cat and a bird', '', 'the dog ran home .', 'Anna saw ' * 20]


def test_the_nll_of_a_text_is_the_sum_over_its_tokens(arm, tokenizer, expected_nll):
  scored = arm.nll(TEXTS)
  for text, result in zip(TEXTS, scored, strict=True):
    ids = tokenizer.encode(text)
    assert (result.ids, result.num_tokens, result.truncated) == (ids, len(ids), False)
    np.testing.assert_allclose(result.nll, expected_nll(ids), rtol=1e-5, atol=1e-5)
  assert scored[3] == (0.0, [], False)
  np.testing.assert_allclose(arm.nll(TEXTS[:1])[0].nll, scored[0].nll, rtol=1e-6)  # scored without the other texts


def test_unknown_tokens_have_a_probability(arm, expected_nll):
  ids_BxL = np.zeros((2, 32), np.int32)
  ids_BxL[0, :3] = 20, UNK, 30
  nll_BxL = arm.token_nll(ids_BxL, np.array([3, 0]))
  np.testing.assert_allclose(nll_BxL[0, :3].sum(), expected_nll([20, UNK, 30]), rtol=1e-5)


def test_few_compiled_programs_score_texts_of_all_lengths(arm):
  arm.nll([' '.join(['dog'] * n) for n in range(1, 90)])
  assert arm.next_losses._cache_size() <= 3  # lengths 32, 64 and the model's maximum


def test_long_texts_are_truncated_and_marked(arm, tokenizer):
  text = 'the dog ran home . ' * 40
  (result,) = arm.nll([text])
  assert result.truncated and result.ids == tokenizer.encode(text)[:94] and arm.max_tokens == 94
  assert TableModel().nll(['a b c d e f', 'a b c d e f g']) == [(6.0, [1] * 6, False), (6.0, [1] * 6, True)]


def test_a_cached_model_scores_every_text_once():
  encoded = []

  class Model(TableModel):
    def encode(self, text):
      encoded.append(text)
      return super().encode(text)

  cached = scoring_models.CachedScoringModel(Model())
  assert cached.nll(['a', 'bb', 'a']) == TableModel().nll(['a', 'bb', 'a'])
  assert cached.nll(['bb', 'c']) == TableModel().nll(['bb', 'c']) and encoded == ['a', 'bb', 'c']


def test_runs_that_cannot_score_texts_are_refused(tmp_path, monkeypatch):
  with pytest.raises(UserError, match=r'the scoring model .*/none: expected the workdir of a run.* write hf:NAME'):
    scoring_models.get(tmp_path / 'none')
  with pytest.raises(UserError, match='is a run of family=ilm: expected family=arm, which has exact likelihoods'):
    scoring_models.get(write_run(tmp_path / 'ilm', 'ilm'))
  with pytest.raises(UserError, match=r'is a run of task\.name=star: expected a run of task\.name=text'):
    scoring_models.get(write_run(tmp_path / 'star', task='star'))
  monkeypatch.setitem(sys.modules, 'transformers', None)
  with pytest.raises(UserError, match=r'hf:NAME needs torch and transformers: pip install "ilm_jax\[perplexity\]"'):
    scoring_models.get('hf:gpt2')


# --- Hugging Face, with stand-ins for the parts of torch and transformers that a scoring model calls ------------------


class Tensor(np.ndarray):
  """A numpy array with the methods of a torch tensor."""

  def float(self):
    return self

  cpu = float

  def numpy(self):
    return np.asarray(self)


def cross_entropy(logits_LxV, ids_L, reduction):
  assert reduction == 'none'
  return np.array(
    [-math.log(math.exp(row[i]) / sum(map(math.exp, row))) for row, i in zip(logits_LxV, ids_L, strict=True)]
  )


class InferenceMode:
  def __enter__(self):
    return self

  def __exit__(self, *_):
    return None


class Net:
  """A causal model of 9 tokens: the logit of a token is cos(token * (1 + sum of the unmasked tokens so far))."""

  config = types.SimpleNamespace(max_position_embeddings=5)

  def to(self, **_):
    return self

  def eval(self):
    return self

  def __call__(self, input_ids, attention_mask):
    sums_BxL = np.cumsum(input_ids * attention_mask, axis=1)
    logits = np.cos(np.arange(9)[None, None] * (1 + sums_BxL)[..., None])
    return types.SimpleNamespace(logits=logits.view(Tensor))


class LetterTokenizer:
  """A tokenizer of the letters a to h, with ids 1 to 8 and no BOS token."""

  bos_token_id, eos_token_id, model_max_length = None, 7, 10**30

  def encode(self, text, add_special_tokens, verbose):
    assert not add_special_tokens and not verbose
    return [1 + 'abcdefgh'.index(letter) for letter in text]


@pytest.fixture
def transformers(monkeypatch):
  """Install stand-ins for torch and transformers; returns the stand-in for transformers."""

  def loader(cls):
    return types.SimpleNamespace(from_pretrained=lambda name, **_: cls())

  torch = types.ModuleType('torch')
  torch.cuda = types.SimpleNamespace(is_available=lambda: False)
  torch.float32, torch.long, torch.bfloat16 = np.float32, np.int64, None
  torch.tensor = lambda array, device, dtype: np.asarray(array, dtype).view(Tensor)
  torch.stack = lambda arrays: np.stack(arrays).view(Tensor)
  torch.inference_mode = InferenceMode
  torch.nn = types.SimpleNamespace(functional=types.SimpleNamespace(cross_entropy=cross_entropy))
  module = types.ModuleType('transformers')
  module.AutoTokenizer, module.AutoModelForCausalLM = loader(LetterTokenizer), loader(Net)
  monkeypatch.setitem(sys.modules, 'torch', torch)
  monkeypatch.setitem(sys.modules, 'transformers', module)
  return module


def test_a_hugging_face_model_predicts_the_first_token_from_its_start_token(transformers):
  model, texts = scoring_models.get('hf:some/model'), ['abc', 'h', 'abcdef', '']
  assert (model.name, model.max_tokens) == ('hf:some/model', 4)
  for text, result in zip(texts, model.nll(texts), strict=True):
    ids, expected, before = [1 + 'abcdefgh'.index(c) for c in text][:4], 0.0, [7]  # EOS, as there is no BOS
    for token in ids:
      odds = [math.exp(math.cos(i * (1 + sum(before)))) for i in range(9)]
      expected -= math.log(odds[token] / sum(odds))
      before.append(token)
    assert (result.ids, result.truncated) == (ids, len(text) > 4)
    assert result.nll == pytest.approx(expected, rel=1e-5)


def test_hugging_face_models_that_cannot_be_used_are_refused_in_one_line(transformers, monkeypatch):
  def fail(name):
    raise OSError(f'{name} is not a local folder\nand is not a valid model identifier')

  monkeypatch.setattr(LetterTokenizer, 'eos_token_id', None)
  with pytest.raises(UserError, match='the scoring model hf:odd has neither a BOS nor an EOS token to start from'):
    scoring_models.get('hf:odd')
  transformers.AutoModelForCausalLM.from_pretrained = fail
  message = r'the scoring model hf:x could not be loaded .*\(x is not a local folder and is not.*: name another model'
  with pytest.raises(UserError, match=message) as error:
    scoring_models.get('hf:x')
  assert '\n' not in str(error.value)
  with pytest.raises(UserError, match='the scoring model hf:: expected a model name or path after hf:'):
    scoring_models.get('hf:')


def test_a_real_transformers_model_gives_the_nll_of_its_logits(tmp_path):
  transformers, torch = pytest.importorskip('transformers'), pytest.importorskip('torch')
  from tokenizers import Tokenizer, models, pre_tokenizers

  words = Tokenizer(models.WordLevel({'<s>': 0, 'a': 1, 'b': 2, 'c': 3}, unk_token='a'))
  words.pre_tokenizer = pre_tokenizers.Whitespace()
  transformers.PreTrainedTokenizerFast(tokenizer_object=words, bos_token='<s>').save_pretrained(tmp_path)
  settings = transformers.GPT2Config(vocab_size=4, n_positions=9, n_embd=8, n_layer=2, n_head=2, bos_token_id=0)
  net = transformers.GPT2LMHeadModel(settings).eval()
  net.save_pretrained(tmp_path)
  model, texts = scoring_models.get(f'hf:{tmp_path}'), ['a b c', 'b', 'c a ' * 5]
  for text, result in zip(texts, model.nll(texts), strict=True):
    ids, expected = [' abc'.index(word) for word in text.split()][:8], 0.0
    for n, token in enumerate(ids):
      with torch.no_grad():
        logits_V = net(input_ids=torch.tensor([[0, *ids[:n]]])).logits[0, -1]
      expected -= float(torch.log_softmax(logits_V, -1)[token])
    assert (result.ids, result.truncated) == (ids, len(text.split()) > 8)
    assert result.nll == pytest.approx(expected, rel=1e-4)
  assert model.encode('a <s> b') == [1, 1, 1, 1, 2]  # '<s>' in a text is ordinary text: three unknown words here
