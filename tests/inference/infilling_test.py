"""Texts with gaps: what is given comes back byte for byte, and what comes in comes into the gaps."""

import html.parser
import json
import re
import shutil
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
LETTERS = [chr(code) for code in range(ord('a'), ord('z') + 1)]
WORDPIECES = list(dict.fromkeys([*SPECIAL, *map(str.lower, WORDS), *LETTERS, *(f'##{c}' for c in LETTERS), '##ing']))
FEW = {'batch_size': 4, 'min_buffer': 96}  # programs to compile
SIZES = {'num_layers': 1, 'num_heads': 2, 'd_model': 16, 'd_ff': 32, 'dropout': 0.0, 'attention_dropout': 0.0}


def sentences(number, seed=0):
  rng = np.random.default_rng(seed)
  return [' '.join(rng.choice(WORDS, rng.integers(3, 9))) for _ in range(number)]


@pytest.fixture(scope='module')
def spm():
  return tokenizers.train_sentencepiece(iter(sentences(300)), size=330)


@pytest.fixture(scope='module', params=['sentencepiece', 'wordpiece'])
def words(request, spm):
  return spm if request.param == 'sentencepiece' else tokenizers.WordPiece('\n'.join(WORDPIECES).encode())


def odd_text(rng):
  """Characters that tokenizers like to change: runs of spaces, line breaks, capitals, accents, special tokens."""
  pool = [
    'the',
    ' dog',
    '  ',
    '\n',
    'É',
    'ﬁ',
    ' ',
    '__',
    '[MASK]',
    '<|endoftext|>',
    'Tom',
    '.',
    ' 犬',
    '\t',
    'ran',
    '▁',
  ]
  return ''.join(rng.choice(pool, rng.integers(1, 6)))


def requests(number, seed=0):
  """Texts with one to three gaps, as lists of parts."""
  rng, out = np.random.default_rng(seed), []
  while len(out) < number:
    parts = [odd_text(rng) for _ in range(rng.integers(2, 5))]
    parts[0] = parts[0] if rng.random() < 0.8 else ''
    parts[-1] = parts[-1] if rng.random() < 0.8 else ''
    if all(part.strip() and part.strip(' \n\t▁') for part in parts[1:-1]):
      out.append(parts)
  return out


# --- requests ---------------------------------------------------------------------------------------------------------


def test_a_text_is_cut_at_its_markers():
  gaps = infilling.read('Tom had a ___ . He was ___', least=[1, 0], most=5)
  assert gaps == (['Tom had a ', ' . He was ', ''], [1, 0], [5, 5])
  assert infilling.read('a ___ b <x> c', marker='<x>') == (['a ___ b ', ' c'], [1], [UNLIMITED])
  assert infilling.read('a ___ b ___', most=[0, 3])[1:] == ([0, 1], [0, 3])
  assert infilling.read('a ___', most=10**12, usual=0)[1:] == ([0], [UNLIMITED])
  assert infilling.read(['', ' home ___']).parts == ['', ' home ___']


@pytest.mark.parametrize(
  'text, settings, message',
  [
    ('no gap here', {}, "no gap: expected '___' in the text, got 'no gap here'"),
    (['one'], {}, 'no gap: expected at least two parts, got 1'),
    (['one', 2], {}, r"expected a text, or the list of its parts around the gaps, got \['one', 2\]"),
    (5, {}, 'expected a text, or the list of its parts around the gaps, got 5'),
    ('a ___', {'least': 10**12}, r'gap 1 has least=1000000000000, most=\d+: expected'),
    ('a ___', {'most': -1}, 'gap 1 has least=0, most=-1: expected'),
    ('a ___ ___ b', {}, 'gaps 1 and 2 have nothing but space between them: make them one'),
    ('a ___ b', {'marker': ''}, 'the marker of a gap is empty'),
    ('a ___ b', {'least': 3, 'most': 2}, 'gap 1 has least=3, most=2: expected 0 <= least <= most'),
    ('a ___ b', {'least': -1}, 'gap 1 has least=-1'),
    ('a ___ b', {'most': [1, 2]}, r'most=\[1, 2\]: expected one number, or one for each of the 1 gaps'),
    ('a ___ b', {'most': 'many'}, "most='many': expected a whole number of tokens"),
    ('a ___ b', {'least': 1.5}, 'least=1.5: expected a whole number'),
  ],
)
def test_requests_that_cannot_be_meant_are_refused(text, settings, message):
  with pytest.raises(UserError, match=message):
    infilling.read(text, **settings)


def test_gaps_are_open_between_the_tokens_of_the_parts():
  words = tokenizers.WordTokenizer(WORDS)
  gaps = infilling.read('the ___ ran home . ___', least=[2, 0], most=[4, None])
  given = infilling.encode(gaps, words, limit=96)
  assert given['tokens'].tolist() == [CLS, BOS, *words.encode('the ran home .')]
  assert np.flatnonzero(given['open']).tolist() == [2, 5]
  assert (given['least'][2], given['least'][5], given['most'][2], given['most'][5]) == (2, 0, 4, UNLIMITED)
  start = infilling.encode(infilling.read('___ ran', least=0), words, limit=96)
  assert np.flatnonzero(start['open']).tolist() == [1] and 'least' not in start and 'most' not in start
  masked = infilling.encode(infilling.read('the ___ ran', least=2, most=2), words, limit=9, masks=True)
  assert masked['tokens'].tolist() == [CLS, BOS, words.encode('the')[0], MASK, MASK, words.encode('ran')[0]]
  assert not masked['open'].any()
  with pytest.raises(UserError, match=r'gap 1: this model replaces a known number of \[MASK\]s'):
    infilling.encode(infilling.read('the ___ ran', least=1), words, limit=9, masks=True)


# --- back to text -----------------------------------------------------------------------------------------------------


def filled_row(gaps, given, words, rng):
  """A row with random tokens in the gaps, and those tokens, gap by gap."""
  tokens, order, runs = [], [], []
  for token, open_ in zip(given['tokens'].tolist(), given['open'].tolist(), strict=True):
    tokens.append(token)
    order.append(-1)
    if open_:
      run = rng.integers(len(SPECIAL), words.vocab_size, rng.integers(0, 4)).tolist()
      tokens, order = tokens + run, order + [0] * len(run)
      runs.append(run)
  return {'tokens': np.array(tokens), 'order': np.array(order)}, runs


def test_parts_come_back_byte_for_byte_around_the_fillings(words):
  rng, changed = np.random.default_rng(1), 0
  for parts in requests(500):
    gaps = infilling.read(parts)
    try:
      given = infilling.encode(gaps, words, limit=96)
    except UserError as error:
      assert 'have no token between them' in str(error)  # a part of which a tokenizer sees nothing
      continue
    row, runs = filled_row(gaps, given, words, rng)
    made = infilling.decode(gaps, row, words)
    rest, last = [], 0
    for (start, end), filling in zip(made.spans, made.fillings, strict=True):
      assert made.text[start:end] == filling
      rest.append(made.text[last:start])
      last = end
    assert [*rest, made.text[last:]] == parts
    assert len(made.fillings) == len(runs)
    for filling, run in zip(made.fillings, runs, strict=True):
      assert not filling.strip() or run
      changed += bool(filling)
      if run and words.decode(run).strip():
        assert filling.strip()
  assert changed > 300


def test_a_request_may_fill_the_row_and_no_more():
  words = tokenizers.WordTokenizer(WORDS)
  gaps = infilling.read('the ___ ran', least=2, most=2)
  for masks in (False, True):
    assert len(infilling.encode(gaps, words, limit=6, masks=masks)['tokens']) == (6 if masks else 4)
    with pytest.raises(UserError, match=r'a text of 4 tokens and at least 2 to come leaves no room in sampling.max_l'):
      infilling.encode(gaps, words, limit=5, masks=masks)
  huge = infilling.read('the ___ ran', least=10**8, most=10**8)
  with pytest.raises(UserError, match='leaves no room'):
    infilling.encode(huge, words, limit=50, masks=True)


def test_a_filling_has_one_space_on_each_side_and_can_complete_a_word(spm):
  gaps = infilling.read('the ___ ran')
  for inside, expected in ((' dog', 'the dog ran'), (' big dog', 'the big dog ran'), ('', 'the  ran')):
    ids = [CLS, BOS, *spm.encode('the'), *spm.encode(inside), *spm.encode(' ran')]
    order = np.array(
      [-1] * (2 + len(spm.encode('the'))) + [0] * len(spm.encode(inside)) + [-1] * len(spm.encode(' ran'))
    )
    assert infilling.decode(gaps, {'tokens': np.array(ids), 'order': order}, spm).text == expected
  pieces = tokenizers.WordPiece('\n'.join(WORDPIECES).encode())
  gaps = infilling.read('saw___')
  row = {'tokens': np.array([CLS, BOS, *pieces.encode('sawing')]), 'order': np.array([-1, -1, -1, 0])}
  assert pieces.pieces(row['tokens'])[2:] == ['saw', '##ing']
  assert infilling.decode(gaps, row, pieces).text == 'sawing'


# --- a model ----------------------------------------------------------------------------------------------------------


def make_lm(words, folder, family='ilm', told=False, **settings):
  """A LanguageModel with random weights."""
  cfg = text_config.get_config('small')
  cfg.family = family
  words.save(folder)
  cfg.task.tokenizer.path = str(folder)
  cfg.task.length = 96
  cfg.sampling.update({'stop_threshold': 0.0, 'stop_temperature': 0.3})
  if family == 'arm':
    cfg.corrupt.fim_rate = 0.5
  decided = families.get(family).model_settings(ConfigDict({'model': {'conditioning': 'adaln'}}))
  model_cfg = transformer.ModelConfig(words.vocab_size, open_gap_embedding=told, **SIZES, **decided)
  params = jax.jit(lambda key: transformer.unbox(transformer.init(model_cfg, key)))(jax.random.key(0))
  params = jax.tree.map(lambda x: x + 0.2 * jax.random.normal(jax.random.key(x.size), x.shape), params)
  return api.LanguageModel(cfg, model_cfg, params, **{'min_buffer': 32, **settings})


@pytest.fixture(scope='module')
def lm(words, tmp_path_factory):
  return make_lm(words, tmp_path_factory.mktemp('words'))


def test_a_thousand_requests_keep_what_is_given(lm):
  wanted, filled = [], 0
  for parts in requests(1_200, seed=5):
    try:
      wanted.append((lm.gaps(parts), lm.encode(lm.gaps(parts))))
    except UserError as error:
      assert 'have no token between them' in str(error)
  wanted = wanted[:1_000]
  assert len(wanted) == 1_000
  for index, made in lm.stream([gaps for gaps, _ in wanted]):
    gaps, given = wanted[index]
    kept, last = [], 0
    for start, end in made.spans:
      kept.append(made.text[last:start])
      last = end
    assert [*kept, made.text[last:]] == gaps.parts
    fixed = [piece for piece, order in zip(made.tokens, made.order, strict=True) if order < 0]
    assert fixed == lm.tokenizer.pieces(given['tokens'])
    filled += sum(map(bool, made.fillings))
  assert filled > 1_500


def test_gaps_hold_as_many_tokens_as_were_asked_for(lm):
  limits = [(1, 1), (2, 3), (0, 2), (4, None), (0, 0)]
  texts = [f'the dog ___ {WORDS[i]} ran ___ .' for i in range(len(limits))]
  for i, (low, high) in enumerate(limits):
    made = lm.infill(texts[i], n=4, least=[low, 1], most=[high, None], seed=i)
    for one in made:
      given = -1
      counts = {}
      for order in one.order:
        given += order < 0
        counts[given] = counts.get(given, 0) + (order >= 0)
      counts = [count for count in counts.values() if count]
      first = lm.encode(lm.gaps(texts[i]))['open'].argmax()
      inside = sum(
        1 for place, order in enumerate(one.order) if order >= 0 and one.order[:place].count(-1) == first + 1
      )
      assert low <= inside <= (UNLIMITED if high is None else high)
      assert sum(counts) - inside >= 1


@pytest.mark.parametrize('family', ['ilm', 'it'])
def test_a_model_that_is_told_of_open_gaps_is_told_of_those_and_of_new_tokens(words, tmp_path, monkeypatch, family):
  seen, forward = [], transformer.Forward.__call__

  def watched(self, tokens_BxL, length_B, noise_BxS=None, open_BxL=None):
    jax.debug.callback(lambda *arrays: seen.append([np.asarray(x)[0] for x in arrays]), length_B, open_BxL)
    return forward(self, tokens_BxL, length_B, noise_BxS, open_BxL)

  monkeypatch.setattr(transformer.Forward, '__call__', watched)
  lm = make_lm(words, tmp_path, family, told=True, batch_size=1, max_steps=6)
  (made,) = lm.infill(['the ___ ran ___ .'])
  jax.effects_barrier()
  given, expected = lm.encode(lm.gaps('the ___ ran ___ .'))['open'], {}
  for step in range(max(made.order) + 2):
    there = [order for order in made.order if order < step]
    opened = iter(given.tolist())
    expected[len(there)] = [order >= 0 or next(opened) for order in there]
  assert given.sum() == 2 and len(expected) > 3
  found = {int(length): open_L for length, open_L in seen if length in expected}
  assert found.keys() == expected.keys()
  for length, open_L in found.items():
    assert open_L[:length].tolist() == expected[length] and not open_L[length:].any()


def test_prompts_gaps_and_nothing_in_one_batch_are_what_they_are_alone(lm):
  asked = ['the dog', lm.gaps('Tom ___ home'), '', lm.gaps(['', ' ran']), 'a cat was'] * 3
  together = dict(lm.stream(asked, seed=3))
  for i in (0, 3, 7, 14):
    alone = dict(lm.stream([asked[i]], seed=3, ids=[i]))[0]
    assert (alone.text, alone.order) == (together[i].text, together[i].order)
  assert isinstance(together[1], api.Infilling) and isinstance(together[2], api.Generation)
  texts = ['Tom ___ home', 'a ___']
  assert [made.text for made in lm.infill(texts)] == [pair[0].text for pair in lm.infill(texts, n=2)]
  assert len({made.text for made in lm.infill(texts[0], n=8)}) > 3


def test_requests_that_do_not_fit_are_refused(lm):
  with pytest.raises(UserError, match=r'text 1: a text of \d+ tokens and at least 1 to come leaves no room in'):
    lm.infill('the dog ran home . ' * 30 + '___')
  with pytest.raises(UserError, match=r'text 2: gap 1 has least=5, most=2'):
    lm.gaps('a ___', least=5, most=2, number=1)
  with pytest.raises(UserError, match='n=0: expected at least 1'):
    lm.infill('a ___', n=0)
  with pytest.raises(UserError, match='expected a list of prompts, got one string'):
    lm.generate('the dog')
  for odd, message in ((5, 'expected a text, or the list of its parts'), ([None], 'text 1: expected a text')):
    with pytest.raises(UserError, match=message):
      lm.infill(odd if isinstance(odd, list) else [odd])
  with pytest.raises(UserError, match='prompt 1: expected a text, got 5'):
    lm.generate([5])
  for ids in ([1, 2], [2**31], [-1]):
    with pytest.raises(UserError, match='ids: expected a number from 0 for each of the 1 requests'):
      lm.generate(['the dog'], ids=ids)
  if lm.tokenizer.kind == 'wordpiece':
    with pytest.raises(UserError, match='text 2 holds what the tokenizer does not know'):
      lm.score(['the dog', 'the 犬'])


def test_the_other_families_fill_what_they_can(spm, tmp_path):
  arm = make_lm(spm, tmp_path, 'arm', **FEW)
  one = arm.infill('the ___ ran home', most=3)
  assert one.text.startswith('the ') and one.text.endswith(' ran home') and sum(o >= 0 for o in one.order) <= 3
  with pytest.raises(UserError, match='family=arm fills one gap of a text, got 2'):
    arm.infill('the ___ ran ___')
  masked = make_lm(spm, tmp_path, 'mdm', max_steps=4, **FEW)
  for made in masked.infill('the ___ ran ___', least=[2, 1], most=[2, 1], n=30):
    assert sum(o >= 0 for o in made.order) == 3 and made.text.startswith('the ') and ' ran' in made.text
  with pytest.raises(UserError, match='text 1: gap 1: this model replaces a known number'):
    masked.infill('the ___ ran')
  gap = make_lm(spm, tmp_path, 'it', **FEW)
  assert gap.infill('the ___ ran').text.startswith('the')
  with pytest.raises(UserError, match='family=it has no minimum or maximum length of a gap'):
    gap.infill('the ___ ran', most=3)


def test_a_score_is_that_of_the_tokens_one_by_one(spm, tmp_path):
  lm = make_lm(spm, tmp_path, 'arm', **FEW)
  texts = ['the dog ran .', 'Tom', 'a cat and a bird']
  forward = jax.jit(lambda tokens_BxL, length_B: transformer.Forward(lm.model_cfg, lm.params)(tokens_BxL, length_B))
  for text, scored in zip(texts, lm.score(texts), strict=True):
    tokens = [CLS, BOS, *spm.encode(text)]
    out = forward(np.array([tokens + [0] * (20 - len(tokens))]), np.array([len(tokens)]))
    closed = np.isin(np.arange(spm.vocab_size), lm.sample_cfg.closed_tokens)
    log_prob = jax.nn.log_softmax(np.where(closed[None], -np.inf, out.hidden_BxLxD[0] @ out.unembed_VxD.T))
    expected = -sum(float(log_prob[i, token]) for i, token in enumerate([*tokens[2:], EOS], 1))
    np.testing.assert_allclose(scored.nll, expected, rtol=1e-5)
    assert (scored.kind, scored.tokens, scored.error) == ('exact', len(tokens) - 2, 0.0)
  assert lm.score(texts[::-1])[::-1] == lm.score(texts) and lm._scorer._cache_size() == 1
  bound = make_lm(spm, tmp_path, **FEW).score(texts[:1])[0]
  assert bound.kind == 'bound' and bound.nll > 0
  with pytest.raises(UserError, match='family=it has no likelihood'):
    make_lm(spm, tmp_path, 'it', **FEW).score(texts)


# --- pages ------------------------------------------------------------------------------------------------------------


class Page(html.parser.HTMLParser):
  """Reads the element with the id `text`: (words, those inserted last)."""

  def __init__(self, source):
    super().__init__()
    self.depth, self.words, self.now = 0, [], []
    self.feed(source)

  def handle_starttag(self, tag, attrs):
    attrs = dict(attrs)
    self.depth += self.depth > 0 or attrs.get('id') == 'text'
    self.latest = attrs.get('class') == 'now'

  def handle_endtag(self, tag):
    self.depth -= self.depth > 0

  def handle_data(self, data):
    if self.depth > 1:
      self.words.append(data)
      self.now += [data] if self.latest else []


def test_bytes_are_spelled_as_the_characters_they_make(spm):
  ids = spm.encode('the é犬 ran')
  assert ''.join(spm.spell(spm.pieces(ids))) == 'the é犬 ran' and len(spm.spell(spm.pieces(ids))) == len(ids)


def test_a_page_holds_its_data_and_no_address(lm, tmp_path):
  page = lm.trace(['the ___ </script> ran', 'Tom'], path=tmp_path / 'page.html')
  assert (tmp_path / 'page.html').read_text() == page
  assert 'http' not in page and page.count('</script>') == 2
  data = json.loads(re.search(r'type="application/json">(.*?)</script>', page, re.S)[1])
  assert len(data) == 2 and ''.join(data[0]['pieces']).strip().startswith('the')
  assert len(data[0]['pieces']) == len(data[0]['order']) and len(data[0]['probabilities']) == data[0]['steps']
  assert traces.page([], 'a & b').count('a &amp; b') == 2


@pytest.mark.skipif(not shutil.which('chromium'), reason='there is no chromium')
def test_a_browser_plays_the_insertions(lm, tmp_path):
  made = next(one for one in lm.infill('the dog ___ ran ___ .', n=5, least=2))
  (tmp_path / 'page.html').write_text(lm.page([made]))
  spelled = lm.tokenizer.spell(made.tokens)
  for step in (0, 2, max(made.order) + 1):
    command = [
      'chromium',
      '--headless',
      '--no-sandbox',
      '--disable-gpu',
      '--disable-background-networking',
      '--dump-dom',
    ]
    folder = f'--user-data-dir={tmp_path / "profile"}'
    address = f'file://{tmp_path / "page.html"}#{step}'
    done = subprocess.run([*command, folder, address], capture_output=True, text=True, timeout=120)
    seen = Page(done.stdout)
    assert ''.join(seen.words) == ''.join(s for s, o in zip(spelled, made.order, strict=True) if o < step)
    assert ''.join(seen.now) == ''.join(s for s, o in zip(spelled, made.order, strict=True) if o == step - 1 >= 0)
