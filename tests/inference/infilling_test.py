"""Infilling: the given text is preserved exactly, and tokens are inserted only into the gaps."""

import collections

import jax
import numpy as np
import pytest
from random_models import WORDS, make_lm

from ilm_jax.data import tokenizers
from ilm_jax.inference import api, infilling
from ilm_jax.models import transformer
from ilm_jax.special_tokens import BOS, CLS, EOS, MASK, SPECIAL
from ilm_jax.types import UNLIMITED, UserError


@pytest.fixture(scope='module', params=['sentencepiece', 'wordpiece'])
def tokenizer(request):
  return request.getfixturevalue(request.param)


def difficult_text(rng):
  """Return a random text that tokenizers normalize: repeated spaces, line breaks, accents, special tokens."""
  pool = ['the', ' dog', '  ', '\n', 'É', 'ﬁ', ' ', '__']
  pool += ['[MASK]', '<|endoftext|>', 'Tom', '.', ' 犬', '\t', 'ran', '▁']
  return ''.join(rng.choice(pool, rng.integers(1, 6)))


def random_requests(number, seed=0):
  """Return infill requests with one to three gaps, each as a list of the text parts around its gaps."""
  rng, out = np.random.default_rng(seed), []
  while len(out) < number:
    parts = [difficult_text(rng) for _ in range(rng.integers(2, 5))]
    parts[0] = parts[0] if rng.random() < 0.8 else ''
    parts[-1] = parts[-1] if rng.random() < 0.8 else ''
    if all(part.strip() and part.strip(' \n\t▁') for part in parts[1:-1]):
      out.append(parts)
  return out


# --- parsing infill requests ------------------------------------------------------------------------------------------


def test_parse_request_splits_a_text_at_its_gap_markers():
  gaps = infilling.parse_request('Tom had a ___ . He was ___', least=[1, 0], most=5)
  assert gaps == (['Tom had a ', ' . He was ', ''], [1, 0], [5, 5])
  assert infilling.parse_request('a ___ b <x> c', marker='<x>') == (['a ___ b ', ' c'], [1], [UNLIMITED])
  assert infilling.parse_request('a ___ b ___', most=[0, 3])[1:] == ([0, 1], [0, 3])
  assert infilling.parse_request('a ___', most=10**12, default_least=0)[1:] == ([0], [10**12])
  assert infilling.parse_request(['', ' home ___']).parts == ['', ' home ___']


@pytest.mark.parametrize(
  'text, settings, message',
  [
    ('no gap here', {}, "no gap: expected '___' in the text, got 'no gap here'"),
    (['one'], {}, 'no gap: expected at least two parts, got 1'),
    (['one', 2], {}, r"expected a text, or a list of the parts around its gaps, got \['one', 2\]"),
    ('a ___ ___ b', {}, 'gaps 1 and 2 have only whitespace between them: merge them'),
    ('a ___ b', {'marker': ''}, 'the marker of a gap is empty'),
    ('a ___ b', {'least': 3, 'most': 2}, 'gap 1 has least=3, most=2: expected 0 <= least <= most'),
    ('a ___ b', {'least': -1}, 'gap 1 has least=-1: expected'),
    ('a ___ b', {'most': -1}, 'gap 1 has most=-1: expected'),
    ('a ___ b', {'most': [1, 2]}, r'most=\[1, 2\]: expected one number, or a list with one for each of the 1 gaps'),
    ('a ___ b', {'most': 'many'}, "most='many': expected a whole number of tokens"),
  ],
)
def test_an_infill_request_without_gaps_or_with_contradictory_limits_is_refused(text, settings, message):
  with pytest.raises(UserError, match=message):
    infilling.parse_request(text, **settings)


def test_the_last_token_before_a_gap_is_marked_as_open_and_carries_the_limits_of_the_gap():
  tokenizer = tokenizers.WordTokenizer(WORDS)
  gaps = infilling.parse_request('the ___ ran home . ___', least=[2, 0], most=[4, None])
  prompt = infilling.encode(gaps, tokenizer, limit=96)
  assert prompt['tokens'].tolist() == [CLS, BOS, *tokenizer.encode('the ran home .')]
  assert np.flatnonzero(prompt['open']).tolist() == [2, 5]
  least, most = prompt['least'], prompt['most']
  assert (least[2], least[5], most[2], most[5]) == (2, 0, 4, UNLIMITED)
  at_start = infilling.encode(infilling.parse_request('___ ran', least=0), tokenizer, limit=96)
  assert np.flatnonzero(at_start['open']).tolist() == [1] and 'least' not in at_start and 'most' not in at_start
  masked = infilling.encode(infilling.parse_request('the ___ ran', least=2, most=2), tokenizer, limit=9, masks=True)
  assert masked['tokens'].tolist() == [CLS, BOS, *tokenizer.encode('the'), MASK, MASK, *tokenizer.encode('ran')]
  assert not masked['open'].any()
  with pytest.raises(UserError, match=r'gap 1: this model replaces a fixed number of \[MASK\] tokens'):
    infilling.encode(infilling.parse_request('the ___ ran', least=1), tokenizer, limit=9, masks=True)


def test_given_tokens_plus_the_minimum_number_of_insertions_may_reach_but_not_exceed_max_length():
  tokenizer = tokenizers.WordTokenizer(WORDS)
  gaps = infilling.parse_request('the ___ ran', least=2, most=2)
  for masks in (False, True):
    assert len(infilling.encode(gaps, tokenizer, limit=6, masks=masks)['tokens']) == (6 if masks else 4)
    with pytest.raises(UserError, match=r'4 given tokens and at least 2 in the gaps do not fit within sampling.max_l'):
      infilling.encode(gaps, tokenizer, limit=5, masks=masks)
  with pytest.raises(UserError, match='do not fit'):
    infilling.encode(infilling.parse_request('the ___ ran', least=10**8, most=10**8), tokenizer, limit=50, masks=True)


# --- decoding sampled rows to text ------------------------------------------------------------------------------------


def parts_of(filled):
  """Return the parts of an infilled text that lie outside its fillings."""
  ends = [0, *(end for _, end in filled.spans)]
  starts = [*(start for start, _ in filled.spans), len(filled.text)]
  return [filled.text[end:start] for end, start in zip(ends, starts, strict=True)]


def random_row(prompt, tokenizer, rng):
  """Return a row with random tokens inserted into the gaps of a request, and a list of those tokens per gap."""
  tokens, order, fillings = [], [], []
  for token, is_open in zip(prompt['tokens'].tolist(), prompt['open'].tolist(), strict=True):
    tokens.append(token)
    order.append(-1)
    if is_open:
      ids = rng.integers(len(SPECIAL), tokenizer.vocab_size, rng.integers(0, 4)).tolist()
      tokens, order = tokens + ids, order + [0] * len(ids)
      fillings.append(ids)
  return {'tokens': np.array(tokens), 'order': np.array(order)}, fillings


def test_decode_preserves_the_given_parts_and_returns_the_inserted_tokens_as_fillings(tokenizer):
  rng, num_filled = np.random.default_rng(1), 0
  for parts in random_requests(500):
    gaps = infilling.parse_request(parts)
    try:
      prompt = infilling.encode(gaps, tokenizer, limit=96)
    except UserError as error:
      assert 'have no token between them' in str(error)  # the tokenizer ignores all text between two gaps
      continue
    row, ids_of_gaps = random_row(prompt, tokenizer, rng)
    filled = infilling.decode(gaps, row, tokenizer)
    assert [filled.text[start:end] for start, end in filled.spans] == filled.fillings
    assert parts_of(filled) == parts
    for filling, ids in zip(filled.fillings, ids_of_gaps, strict=True):
      assert not filling.strip() or ids
      num_filled += bool(filling)
      if ids and tokenizer.decode(ids).strip():
        assert filling.strip()
  assert num_filled > 300


def test_a_decoded_filling_is_separated_by_one_space_or_completes_a_word(sentencepiece, wordpiece):
  gaps = infilling.parse_request('the ___ ran')
  for inserted, expected in ((' dog', 'the dog ran'), (' big dog', 'the big dog ran'), ('', 'the  ran')):
    left, ids, right = (sentencepiece.encode(text) for text in ('the', inserted, ' ran'))
    order = np.array([-1] * (2 + len(left)) + [0] * len(ids) + [-1] * len(right))
    row = {'tokens': np.array([CLS, BOS, *left, *ids, *right]), 'order': order}
    assert infilling.decode(gaps, row, sentencepiece).text == expected
  row = {'tokens': np.array([CLS, BOS, *wordpiece.encode('sawing')]), 'order': np.array([-1, -1, -1, 0])}
  assert wordpiece.pieces(row['tokens'])[2:] == ['saw', '##ing']
  assert infilling.decode(infilling.parse_request('saw___'), row, wordpiece).text == 'sawing'


# --- infilling with a model -------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def lm(tokenizer, tmp_path_factory):
  return make_lm(tokenizer, tmp_path_factory.mktemp('tokenizer'))


def test_infilling_preserves_the_given_text_of_hundreds_of_requests(lm):
  accepted, num_filled = [], 0
  for parts in random_requests(350, seed=5):
    try:
      accepted.append((lm.gaps(parts), lm.encode(lm.gaps(parts))))
    except UserError as error:
      assert 'have no token between them' in str(error)
  assert len(accepted) >= 300
  for index, infilled in lm.stream([gaps for gaps, _ in accepted]):
    gaps, prompt = accepted[index]
    assert parts_of(infilled) == gaps.parts
    given = [piece for piece, order in zip(infilled.tokens, infilled.order, strict=True) if order < 0]
    assert given == lm.tokenizer.pieces(prompt['tokens'])
    num_filled += sum(map(bool, infilled.fillings))
  assert num_filled > 1.5 * len(accepted)


def test_the_number_of_tokens_inserted_into_a_gap_is_within_the_limits_least_and_most(lm):
  for seed, (least, most) in enumerate([(1, 1), (2, 3), (0, 2), (4, None), (0, 0)]):
    text = f'the dog ___ {WORDS[seed]} ran ___ .'
    first, second = 1 + np.flatnonzero(lm.encode(lm.gaps(text))['open'])  # number of given tokens before each gap
    for infilled in lm.infill(text, n=4, least=[least, 1], most=[most, None], seed=seed):
      order = infilled.order
      counts = collections.Counter(order[:i].count(-1) for i in range(len(order)) if order[i] >= 0)
      assert least <= counts[first] <= (UNLIMITED if most is None else most)
      assert counts[second] >= 1 and counts[first] + counts[second] == counts.total()


@pytest.mark.parametrize('family', ['ilm', 'it'])
def test_the_open_gap_embedding_marks_every_gap_that_accepts_insertions(sentencepiece, tmp_path, monkeypatch, family):
  seen, forward = [], transformer.Forward.__call__

  def recorded(self, tokens_BxL, length_B, noise_BxS=None, open_BxL=None):
    jax.debug.callback(lambda *arrays: seen.append([np.asarray(x)[0] for x in arrays]), length_B, open_BxL)
    return forward(self, tokens_BxL, length_B, noise_BxS, open_BxL)

  monkeypatch.setattr(transformer.Forward, '__call__', recorded)
  lm = make_lm(sentencepiece, tmp_path, family, open_gap_embedding=True, batch_size=1, max_steps=6)
  (infilled,) = lm.infill(['the ___ ran ___ .'])
  jax.effects_barrier()
  given_open, expected = lm.encode(lm.gaps('the ___ ran ___ .'))['open'], {}
  for step in range(max(infilled.order) + 2):
    present = [order for order in infilled.order if order < step]
    opened = iter(given_open.tolist())
    expected[len(present)] = [order >= 0 or next(opened) for order in present]
  assert given_open.sum() == 2 and len(expected) > 3
  found = {int(length): open_L for length, open_L in seen if length in expected}
  assert found.keys() == expected.keys()
  for length, open_L in found.items():
    assert open_L[:length].tolist() == expected[length] and not open_L[length:].any()


def test_prompts_and_infill_requests_in_one_batch_give_the_same_results_as_alone(lm):
  requests = ['the dog', lm.gaps('Tom ___ home'), '', lm.gaps(['', ' ran']), 'a cat was'] * 3
  together = dict(lm.stream(requests, seed=3))
  for i in (0, 3, 7, 14):
    alone = dict(lm.stream([requests[i]], seed=3, ids=[i]))[0]
    assert (alone.text, alone.order) == (together[i].text, together[i].order)
  assert isinstance(together[1], api.Infilling) and isinstance(together[2], api.Generation)
  texts = ['Tom ___ home', 'a ___']
  assert [one.text for one in lm.infill(texts)] == [samples[0].text for samples in lm.infill(texts, n=2)]
  assert len({one.text for one in lm.infill(texts[0], n=8)}) > 3


def test_the_error_for_an_invalid_request_names_the_number_of_the_request(lm):
  with pytest.raises(UserError, match=r'text 1: \d+ given tokens and at least 1 in the gaps do not fit within'):
    lm.infill('the dog ran home . ' * 30 + '___')
  with pytest.raises(UserError, match=r'text 1: 3 given tokens and at least 1000000000000 in the gaps do not fit'):
    lm.infill('the ___', least=10**12)
  with pytest.raises(UserError, match=r'text 2: gap 1 has least=5, most=2'):
    lm.gaps('a ___', least=5, most=2, number=1)
  with pytest.raises(UserError, match='n=0: expected a whole number, at least 1'):
    lm.infill('a ___', n=0)
  for wrong in ('the dog', 5, None):
    with pytest.raises(UserError, match=f'generate: expected a list of prompts, got {wrong!r}'):
      lm.generate(wrong)
    with pytest.raises(UserError, match=f'score: expected a list of texts, got {wrong!r}'):
      lm.score(wrong)
  with pytest.raises(UserError, match='infill: expected a list of texts, got 5'):
    lm.infill(5)
  for texts in ([5], [None]):
    with pytest.raises(UserError, match='text 1: expected a text, or a list of the parts'):
      lm.infill(texts)
  with pytest.raises(UserError, match='prompt 1: expected a text, got 5'):
    lm.generate([5])
  for ids in ([1, 2], [2**31], [-1]):
    with pytest.raises(UserError, match=r'ids: expected a number from 0 to 2\*\*31 - 1 for each of 1 requests'):
      lm.generate(['the dog'], ids=ids)
  if lm.tokenizer.kind == 'wordpiece':
    with pytest.raises(UserError, match='text 2 contains characters unknown to the tokenizer'):
      lm.score(['the dog', 'the 犬'])


def test_each_family_infills_supported_requests_and_refuses_others(small_lm):
  one = small_lm('arm').infill('the ___ ran home', most=3)
  assert one.text.startswith('the ') and one.text.endswith(' ran home') and sum(o >= 0 for o in one.order) <= 3
  with pytest.raises(UserError, match=r'family=arm .*one gap'):
    small_lm('arm').infill('the ___ ran ___')
  for one in small_lm('mdm').infill('the ___ ran ___', least=[2, 1], most=[2, 1], n=8):
    assert sum(o >= 0 for o in one.order) == 3 and one.text.startswith('the ') and ' ran' in one.text
  with pytest.raises(UserError, match='text 1: gap 1: this model replaces a fixed number'):
    small_lm('mdm').infill('the ___ ran')
  assert small_lm('it').infill('the ___ ran').text.startswith('the')
  with pytest.raises(UserError, match='family=it '):
    small_lm('it').infill('the ___ ran', most=3)
  with pytest.raises(UserError, match=r'text 1: the gaps need at least 9 tokens, more than sampling.max_steps=8'):
    small_lm('arm').infill('the ___ ran', least=9)


def test_the_score_of_a_text_is_the_sum_of_its_token_log_probabilities(sentencepiece, small_lm):
  lm, texts = small_lm('arm'), ['the dog ran .', 'Tom', 'a cat and a bird']
  forward = jax.jit(lambda tokens_BxL, length_B: transformer.Forward(lm.model_cfg, lm.params)(tokens_BxL, length_B))
  scores = lm.score(texts)
  for text, score in zip(texts, scores, strict=True):
    tokens = [CLS, BOS, *sentencepiece.encode(text)]
    out = forward(np.array([tokens + [0] * (20 - len(tokens))]), np.array([len(tokens)]))
    closed = np.isin(np.arange(sentencepiece.vocab_size), lm.sample_cfg.suppressed_tokens)
    log_prob = jax.nn.log_softmax(np.where(closed[None], -np.inf, out.hidden_BxLxD[0] @ out.unembed_VxD.T))
    expected = -sum(float(log_prob[i, token]) for i, token in enumerate([*tokens[2:], EOS], 1))
    np.testing.assert_allclose(score.nll, expected, rtol=1e-5, atol=1e-5)
    assert (score.kind, score.tokens, score.error) == ('exact', len(tokens) - 2, 0.0)
  backwards = [score.nll for score in lm.score(texts[::-1])]
  np.testing.assert_allclose(backwards[::-1], [score.nll for score in scores], rtol=1e-5, atol=1e-5)
  assert lm._scorer._cache_size() == 1
  bound = small_lm('ilm').score(texts[:1])[0]
  assert bound.kind == 'bound' and bound.nll > 0
  with pytest.raises(UserError, match='family=it has no likelihood'):
    small_lm('it').score(texts)
