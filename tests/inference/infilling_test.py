"""Infilling: the given text is preserved exactly, and tokens are inserted only into the gaps."""

import collections
import functools
import html.parser
import json
import os
import re
import shutil
import string
import subprocess

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from ilm_jax import families
from ilm_jax.configs import text as text_config
from ilm_jax.data import tokenizers
from ilm_jax.inference import api, infilling, traces
from ilm_jax.models import transformer
from ilm_jax.special_tokens import BOS, CLS, EOS, MASK, SPECIAL
from ilm_jax.types import UNLIMITED, UserError

WORDS = re.split(' ', 'the a dog cat ran home sat saw Tom Anna was happy sad . , ! and then bird big small blue')
LETTERS = string.ascii_lowercase
WORDPIECES = list(dict.fromkeys([*SPECIAL, *map(str.lower, WORDS), *LETTERS, *(f'##{c}' for c in LETTERS), '##ing']))
FEW = {'batch_size': 4, 'min_buffer': 96}  # settings of a LanguageModel with few slots and one buffer length
SIZES = {'num_layers': 1, 'num_heads': 2, 'd_model': 16, 'd_ff': 32, 'dropout': 0.0, 'attention_dropout': 0.0}


def sentences(number, seed=0):
  """Return sentences of random words."""
  rng = np.random.default_rng(seed)
  return [' '.join(rng.choice(WORDS, rng.integers(3, 9))) for _ in range(number)]


@pytest.fixture(scope='module')
def sentencepiece():
  return tokenizers.train_sentencepiece(iter(sentences(300)), size=330)


@pytest.fixture(scope='module')
def wordpiece():
  return tokenizers.WordPiece('\n'.join(WORDPIECES).encode())


@pytest.fixture(scope='module', params=['sentencepiece', 'wordpiece'])
def tokenizer(request):
  return request.getfixturevalue(request.param)


def difficult_text(rng):
  """Return a text with parts that tokenizers normalize: runs of spaces, line breaks, accents, special tokens."""
  pool = ['the', ' dog', '  ', '\n', 'É', 'ﬁ', ' ', '__']
  pool += ['[MASK]', '<|endoftext|>', 'Tom', '.', ' 犬', '\t', 'ran', '▁']
  return ''.join(rng.choice(pool, rng.integers(1, 6)))


def random_requests(number, seed=0):
  """Return texts with one to three gaps, as lists of parts."""
  rng, out = np.random.default_rng(seed), []
  while len(out) < number:
    parts = [difficult_text(rng) for _ in range(rng.integers(2, 5))]
    parts[0] = parts[0] if rng.random() < 0.8 else ''
    parts[-1] = parts[-1] if rng.random() < 0.8 else ''
    if all(part.strip() and part.strip(' \n\t▁') for part in parts[1:-1]):
      out.append(parts)
  return out


# --- reading requests -------------------------------------------------------------------------------------------------


def test_a_text_is_split_at_its_markers():
  gaps = infilling.parse_request('Tom had a ___ . He was ___', least=[1, 0], most=5)
  assert gaps == (['Tom had a ', ' . He was ', ''], [1, 0], [5, 5])
  assert infilling.parse_request('a ___ b <x> c', marker='<x>') == (['a ___ b ', ' c'], [1], [UNLIMITED])
  assert infilling.parse_request('a ___ b ___', most=[0, 3])[1:] == ([0, 1], [0, 3])
  assert infilling.parse_request('a ___', most=10**12, default_least=0)[1:] == ([0], [UNLIMITED])
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
    ('a ___ b', {'least': -1}, 'gap 1 has least=-1'),
    ('a ___ b', {'most': [1, 2]}, r'most=\[1, 2\]: expected one number, or a list with one for each of the 1 gaps'),
    ('a ___ b', {'most': 'many'}, "most='many': expected a whole number of tokens"),
  ],
)
def test_a_text_without_gaps_or_with_contradictory_limits_is_refused(text, settings, message):
  with pytest.raises(UserError, match=message):
    infilling.parse_request(text, **settings)


def test_gaps_are_opened_after_the_last_token_of_each_part():
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


def test_given_tokens_and_minimum_fillings_may_reach_the_maximum_length_but_not_exceed_it():
  tokenizer = tokenizers.WordTokenizer(WORDS)
  gaps = infilling.parse_request('the ___ ran', least=2, most=2)
  for masks in (False, True):
    assert len(infilling.encode(gaps, tokenizer, limit=6, masks=masks)['tokens']) == (6 if masks else 4)
    with pytest.raises(UserError, match=r'4 given tokens and at least 2 in the gaps do not fit within sampling.max_l'):
      infilling.encode(gaps, tokenizer, limit=5, masks=masks)
  with pytest.raises(UserError, match='do not fit'):
    infilling.encode(infilling.parse_request('the ___ ran', least=10**8, most=10**8), tokenizer, limit=50, masks=True)


# --- decoding rows ----------------------------------------------------------------------------------------------------


def parts_of(filled):
  """Return the text around the fillings."""
  ends = [0, *(end for _, end in filled.spans)]
  starts = [*(start for start, _ in filled.spans), len(filled.text)]
  return [filled.text[end:start] for end, start in zip(ends, starts, strict=True)]


def random_row(prompt, tokenizer, rng):
  """Return a sampled row with random tokens in the open gaps, and those tokens for each gap."""
  tokens, order, fillings = [], [], []
  for token, is_open in zip(prompt['tokens'].tolist(), prompt['open'].tolist(), strict=True):
    tokens.append(token)
    order.append(-1)
    if is_open:
      ids = rng.integers(len(SPECIAL), tokenizer.vocab_size, rng.integers(0, 4)).tolist()
      tokens, order = tokens + ids, order + [0] * len(ids)
      fillings.append(ids)
  return {'tokens': np.array(tokens), 'order': np.array(order)}, fillings


def test_decoding_preserves_the_parts_and_returns_the_inserted_tokens_as_fillings(tokenizer):
  rng, num_filled = np.random.default_rng(1), 0
  for parts in random_requests(500):
    gaps = infilling.parse_request(parts)
    try:
      prompt = infilling.encode(gaps, tokenizer, limit=96)
    except UserError as error:
      assert 'have no token between them' in str(error)  # the tokenizer drops all characters of a part
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


def test_a_filling_is_separated_by_one_space_and_can_complete_a_word(sentencepiece, wordpiece):
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


def make_lm(tokenizer, folder, family='ilm', open_gap_embedding=False, **settings):
  """Return a LanguageModel with random weights."""
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


@pytest.fixture(scope='module')
def lm(tokenizer, tmp_path_factory):
  return make_lm(tokenizer, tmp_path_factory.mktemp('tokenizer'))


@pytest.fixture(scope='module')
def small_lm(sentencepiece, tmp_path_factory):
  """Return a function from a family's name to its LanguageModel, with few slots."""
  folder = tmp_path_factory.mktemp('tokenizer')
  return functools.cache(lambda family: make_lm(sentencepiece, folder, family, max_steps=8, **FEW))


def test_hundreds_of_infill_requests_preserve_the_given_text(lm):
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


def test_the_number_of_tokens_in_a_gap_is_within_its_limits(lm):
  for seed, (least, most) in enumerate([(1, 1), (2, 3), (0, 2), (4, None), (0, 0)]):
    text = f'the dog ___ {WORDS[seed]} ran ___ .'
    first, second = 1 + np.flatnonzero(lm.encode(lm.gaps(text))['open'])  # number of given tokens left of each gap
    for infilled in lm.infill(text, n=4, least=[least, 1], most=[most, None], seed=seed):
      order = infilled.order
      counts = collections.Counter(order[:i].count(-1) for i in range(len(order)) if order[i] >= 0)
      assert least <= counts[first] <= (UNLIMITED if most is None else most)
      assert counts[second] >= 1 and counts[first] + counts[second] == counts.total()


@pytest.mark.parametrize('family', ['ilm', 'it'])
def test_the_open_gap_embedding_sees_the_open_gaps_and_the_new_tokens(sentencepiece, tmp_path, monkeypatch, family):
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


def test_a_mixture_of_prompts_and_infill_requests_gives_what_each_gives_alone(lm):
  requests = ['the dog', lm.gaps('Tom ___ home'), '', lm.gaps(['', ' ran']), 'a cat was'] * 3
  together = dict(lm.stream(requests, seed=3))
  for i in (0, 3, 7, 14):
    alone = dict(lm.stream([requests[i]], seed=3, ids=[i]))[0]
    assert (alone.text, alone.order) == (together[i].text, together[i].order)
  assert isinstance(together[1], api.Infilling) and isinstance(together[2], api.Generation)
  texts = ['Tom ___ home', 'a ___']
  assert [one.text for one in lm.infill(texts)] == [samples[0].text for samples in lm.infill(texts, n=2)]
  assert len({one.text for one in lm.infill(texts[0], n=8)}) > 3


def test_invalid_requests_are_refused_by_number(lm):
  with pytest.raises(UserError, match=r'text 1: \d+ given tokens and at least 1 in the gaps do not fit within'):
    lm.infill('the dog ran home . ' * 30 + '___')
  with pytest.raises(UserError, match=r'text 2: gap 1 has least=5, most=2'):
    lm.gaps('a ___', least=5, most=2, number=1)
  with pytest.raises(UserError, match='n=0: expected at least 1'):
    lm.infill('a ___', n=0)
  with pytest.raises(UserError, match='expected a list of prompts, got one string'):
    lm.generate('the dog')
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


def test_each_family_fills_the_gaps_that_it_supports(small_lm):
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


def test_a_score_is_the_sum_of_the_token_log_probabilities(sentencepiece, small_lm):
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


# --- traces -----------------------------------------------------------------------------------------------------------


class Page(html.parser.HTMLParser):
  """Parses a rendered page: `words` are the displayed tokens, `latest` those inserted in the displayed step."""

  def __init__(self, source):
    super().__init__()
    self.depth, self.words, self.latest = 0, [], []
    self.feed(source)

  def handle_starttag(self, tag, attrs):
    attrs = dict(attrs)
    self.depth += self.depth > 0 or attrs.get('id') == 'text'
    self.in_latest = attrs.get('class') == 'now'

  def handle_endtag(self, tag):
    self.depth -= self.depth > 0

  def handle_data(self, data):
    if self.depth > 1:
      self.words.append(data)
      self.latest += [data] if self.in_latest else []


def test_byte_tokens_are_spelled_as_the_character_that_they_encode(sentencepiece):
  ids = sentencepiece.encode('the é犬 ran')
  spelled = sentencepiece.spell(sentencepiece.pieces(ids))
  assert ''.join(spelled) == 'the é犬 ran' and len(spelled) == len(ids)


def test_a_page_contains_its_data_and_needs_no_network(small_lm, tmp_path):
  page = small_lm('ilm').trace(['the ___ </script> ran', 'Tom'], path=tmp_path / 'page.html')
  assert (tmp_path / 'page.html').read_text() == page
  assert 'http' not in page and page.count('</script>') == 2
  data = json.loads(re.search(r'type="application/json">(.*?)</script>', page, re.S)[1])
  assert len(data) == 2 and ''.join(data[0]['pieces']).strip().startswith('the')
  assert len(data[0]['pieces']) == len(data[0]['order']) and len(data[0]['probabilities']) == data[0]['steps']
  assert traces.page([], 'a & b').count('a &amp; b') == 2


@pytest.mark.skipif(not shutil.which('chromium'), reason='chromium is not installed')
def test_a_browser_shows_the_text_after_each_step(small_lm, tmp_path):
  lm = small_lm('ilm')
  infilled = lm.infill('the dog ___ ran ___ .', least=2)
  (tmp_path / 'page.html').write_text(lm.page([infilled]))
  spelled = lm.tokenizer.spell(infilled.tokens)
  flags = ['--headless', '--no-sandbox', '--disable-gpu', '--disable-background-networking', '--dump-dom']
  flags.append('--virtual-time-budget=5000')  # wait for the page's script, also on a busy machine
  flags.append(f'--user-data-dir={tmp_path / "profile"}')
  for step in (0, 2, max(infilled.order) + 1):
    address = f'file://{tmp_path / "page.html"}#{step}'
    process = subprocess.run(
      ['chromium', *flags, address],
      capture_output=True,
      text=True,
      timeout=120,
      env={**os.environ, 'TMPDIR': str(tmp_path)},
    )
    page = Page(process.stdout)
    assert ''.join(page.words) == ''.join(s for s, o in zip(spelled, infilled.order, strict=True) if o < step)
    assert ''.join(page.latest) == ''.join(
      s for s, o in zip(spelled, infilled.order, strict=True) if o == step - 1 >= 0
    )
