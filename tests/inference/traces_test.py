"""Trace pages: they show exactly the characters of the text, also in a browser, and load nothing from the network."""

import html.parser
import itertools
import json
import os
import re
import shutil
import subprocess
import tempfile
import types

import numpy as np
import pytest
from ml_collections import ConfigDict

from ilm_jax import tasks
from ilm_jax.configs import star as star_config
from ilm_jax.inference import api, infilling, traces
from ilm_jax.special_tokens import BOS, CLS
from ilm_jax.tasks import star

needs_browser = pytest.mark.skipif(not shutil.which('chromium'), reason='chromium is not installed')
PARTS = ['  Tom had  a ', ' .\n\nHe <b>was</b> &amp; ', '  so\thappy 😀 犬 ', '  ']
FILLINGS = [' big dog and a cat', ' sad  then', ' é was 犬 </script>']


def tracer(tokenizer, cfg, task):
  """Return a LanguageModel without weights, which can only make trace pages."""
  lm = api.LanguageModel.__new__(api.LanguageModel)
  lm.tokenizer, lm.cfg, lm.task = tokenizer, ConfigDict(cfg), task
  return lm


def text_tracer(tokenizer):
  return tracer(
    tokenizer, {'task': {'name': 'text'}}, types.SimpleNamespace(decode=lambda ids, cfg: tokenizer.decode(ids))
  )


def decoding(tokenizer, tokens, order):
  """Return the fields of a Generation or Infilling that describe how it was decoded."""
  steps = max(order) + 1
  return {
    'tokens': tokenizer.pieces(tokens),
    'order': order,
    'probabilities': [round(1 / (2 + step), 6) for step in range(steps)],
    'stop_probabilities': [round(step / (steps + 1), 6) for step in range(steps + 1)],
    'stopped': True,
  }


def infill(tokenizer, parts, fillings, per_step=1):
  """Return an Infilling whose tokens are inserted in a random order, `per_step` at each step."""
  gaps = infilling.parse_request(parts)
  given = infilling.encode(gaps, tokenizer, limit=500)
  tokens, order, left = [], [], iter(fillings)
  for token, is_open in zip(given['tokens'].tolist(), given['open'].tolist(), strict=True):
    inserted = tokenizer.encode(next(left)) if is_open else []
    tokens, order = tokens + [token, *inserted], order + [-1, *[0] * len(inserted)]
  steps = iter(np.random.default_rng(0).permutation(order.count(0)) // per_step)
  order = [-1 if step < 0 else int(next(steps)) for step in order]
  filled = infilling.decode(gaps, {'tokens': np.array(tokens), 'order': np.array(order)}, tokenizer)
  return api.Infilling(**filled._asdict(), **decoding(tokenizer, tokens, order))


def complete(tokenizer, prompt, completion):
  """Return a Generation whose completion is inserted in a random order."""
  given, inserted = [CLS, BOS, *tokenizer.encode(prompt)], tokenizer.encode(completion)
  order = [-1] * len(given) + np.random.default_rng(0).permutation(len(inserted)).tolist()
  return api.Generation(tokenizer.decode(given + inserted), **decoding(tokenizer, given + inserted, order))


def star_example(order='path', answer=(1, 2, 2, 5, 5, 7)):
  """Return a tracer for star graphs and a Generation whose answer is inserted in the order 3, 1, 0, 2, 4, 5."""
  cfg = star_config.get_config('easy')
  cfg.task.order = order
  tokenizer = star.tokenizer(cfg.task)
  given = star.encode_prompt('1,2|2,5|5,7|1,3|3,4/1,7', cfg.task)
  tokens = given + tokenizer.ids([str(node) for node in (answer[::-1] if order == 'oracle' else answer)])
  steps = [-1] * len(given) + [3, 1, 0, 2, 4, 5]
  lm = tracer(tokenizer, {'task': cfg.task}, tasks.get('star'))
  return lm, api.Generation(star.decode(tokens, cfg.task), **decoding(tokenizer, tokens, steps))


def records_of(page):
  """Return the records in a trace page."""
  return json.loads(re.search(r'type="application/json">(.*?)</script>', page, re.S)[1])


def shown(record, step):
  """Return the text that the page shows after a number of steps, and the text inserted at the last of these steps."""
  gaps = [[(character, -1) for character in text] for text in record['start']]
  for token in record['tokens']:
    if token['step'] < step:
      for gap, at, removed, text, owner in token['edits']:
        gaps[gap][at : at + removed] = [(character, owner) for character in text]
  text, newest = record['parts'][0], ''
  for gap, part in zip(gaps, record['parts'][1:], strict=True):
    text += ''.join(character for character, _ in gap) + part
    newest += ''.join(character for character, owner in gap if owner == step - 1)
  return text, newest


@pytest.mark.parametrize('kind', ['sentencepiece', 'wordpiece'])
@pytest.mark.parametrize('per_step', [1, 4])
def test_the_first_frame_shows_the_given_text_and_the_last_frame_the_whole_text(kind, per_step, request):
  tokenizer = request.getfixturevalue(kind)
  results = [
    infill(tokenizer, PARTS, FILLINGS, per_step),
    infill(tokenizer, ['', ' ran'], ['the dog'], per_step),
    complete(tokenizer, '  the  dog\n é ', ' ran  home 😀犬\n '),
  ]
  for result, record in zip(results, records_of(text_tracer(tokenizer).page(results)), strict=True):
    assert shown(record, record['steps'])[0] == result.text
  first = records_of(text_tracer(tokenizer).page(results[:1]))[0]
  assert shown(first, 0) == (''.join(PARTS), '')
  if kind == 'sentencepiece':
    assert results[2].text == '  the  dog\n é  ran  home 😀犬\n '


def test_every_frame_shows_the_tokens_that_have_been_inserted(sentencepiece):
  result = infill(sentencepiece, ['the ', ' ran ', ''], [' the the cat', ' dog home'])
  (record,) = records_of(text_tracer(sentencepiece).page([result]))
  tokens = [(order, piece) for order, piece in zip(result.order, result.tokens, strict=True)]
  for step in range(record['steps'] + 1):
    text, newest = shown(record, step)
    words = [piece.replace('▁', '') for order, piece in tokens if order < step and piece not in ('[CLS]', '[BOS]')]
    assert re.sub(r'\s', '', text) == ''.join(words)
    assert newest.strip() == ''.join(piece for order, piece in tokens if order == step - 1 >= 0).replace('▁', '')
  after = {token['step']: (token['gap'], token['after'], token['token']) for token in record['tokens']}
  assert after[result.order.index(-1, 3) and min(after)][0] in (0, 1) and len(after) == record['steps']


def test_an_insertion_possible_at_several_offsets_is_placed_near_the_given_offset(sentencepiece):
  assert traces.edits('aa', 'aaa', 0) == [(0, 0, 'a')] and traces.edits('aa', 'aaa', 2) == [(2, 0, 'a')]
  assert traces.edits('6,8', '9,6|8', 0) == [(1, 1, '|'), (0, 0, '9,')]
  assert traces.edits('a', '', 0) == [(0, 1, '')]


@pytest.mark.parametrize('order', ['path', 'oracle'])
def test_the_record_of_a_star_graph_has_its_edges_and_the_path_from_source_to_goal(order):
  lm, result = star_example(order)
  (record,) = records_of(lm.page([result]))
  graph = record['graph']
  assert graph['edges'] == [['1', '2'], ['2', '5'], ['5', '7'], ['1', '3'], ['3', '4']]
  assert (graph['source'], graph['goal']) == ('1', '7')
  assert [node for node, _ in graph['path']] == ['1', '2', '2', '5', '5', '7']
  steps = [3, 1, 0, 2, 4, 5]
  assert [step for _, step in graph['path']] == (steps[::-1] if order == 'oracle' else steps)
  assert shown(record, record['steps'])[0] == result.text == '1,2|2,5|5,7|1,3|3,4/1,7=1,2,5,7'
  assert shown(record, 0)[0] == '1,2|2,5|5,7|1,3|3,4/1,7='


@pytest.mark.parametrize('order', ['path', 'oracle'])
@pytest.mark.parametrize('answer', [(1, 2, 2, 5, 5, 7), (1, 1, 1, 1, 1, 1), (1, 12, 2, 15, 1, 7)])
def test_each_step_of_a_star_graph_marks_the_inserted_node_and_no_other(order, answer):
  prompt, lm = '1,2|2,5|5,7|1,3|3,4/1,7=', star_example(order)[0]
  for steps in list(itertools.permutations(range(6)))[::60]:
    given = star.encode_prompt(prompt, lm.cfg.task)
    tokens = given + lm.tokenizer.ids([str(node) for node in answer])
    steps = [-1] * len(given) + list(steps)
    result = api.Generation(star.decode(tokens, lm.cfg.task), **decoding(lm.tokenizer, tokens, steps))
    (record,) = records_of(lm.page([result]))
    for token in record['tokens']:
      text, newest = shown(record, token['step'] + 1)
      present = [one for one, step in zip(tokens, steps, strict=True) if step <= token['step']]
      assert (text, newest) == (star.decode(present, lm.cfg.task), token['token'])


@pytest.mark.parametrize(
  ('prompt', 'rows'),
  [
    ('6,8|8,2|3,1|9,4|9,6|4,3/9,2', ['9', '4 3 1', '6 8 2']),  # two arms: all nodes but the leaves have two edges
    ('3,4|1,2|5,3|2,3|3,6|6,7|3,8/1,7', ['5', '1 2', '3', '4', '6 7', '8']),  # the junction 3 is not the source
    ('1,2|2,3|3,1|3,4|4,1/1,2', None),  # not a star graph
  ],
)
def test_each_arm_of_a_star_graph_is_drawn_in_a_row_of_its_own(prompt, rows):
  edges, ends = prompt.split('/')
  edges = [tuple(edge.split(',')) for edge in edges.split('|')]
  places = traces.layout(edges, *ends.split(','))
  assert set(places) == {node for edge in edges for node in edge} and len(set(places.values())) == len(places)
  if rows:
    assert all(places[b][0] - places[a][0] == 1 for a, b in edges)  # all edges point one column to the right
    arms = {}  # the junction is alone in column 0; on each side of it, nodes of the same row form an arm
    for node, (column, row) in sorted(places.items(), key=lambda item: item[1]):
      arms.setdefault((np.sign(column), row), []).append(node)
    assert sorted(' '.join(arm) for arm in arms.values()) == sorted(rows)


class Page(html.parser.HTMLParser):
  """Parser of a trace page: the content of elements by their id, all attributes, and the labels of the buttons."""

  def __init__(self, source):
    super().__init__()
    self.open, self.content, self.attributes, self.newest = [], {}, [], ''
    self.feed(source)

  def handle_starttag(self, tag, attributes):
    attributes = dict(attributes)
    self.attributes += attributes.items()
    if tag not in ('meta', 'input', 'line', 'circle'):
      self.open.append((tag, attributes.get('id'), attributes.get('class') or ''))

  def handle_endtag(self, tag):
    if self.open and self.open[-1][0] == tag:
      self.open.pop()

  def handle_data(self, data):
    for tag, name, _ in self.open:
      key = name or f'<{tag}>'
      self.content[key] = self.content.get(key, '') + data
    self.newest += data if self.open and 'newest' in self.open[-1][2] else ''


def test_a_page_contains_its_data_and_loads_nothing_from_the_network(sentencepiece):
  source = text_tracer(sentencepiece).page([infill(sentencepiece, PARTS, FILLINGS)])
  page = Page(source)
  assert 'http' not in source and '@import' not in source and 'url(' not in source and source.count('</script>') == 2
  assert not {'src', 'href', 'srcset', 'action'} & {name for name, _ in page.attributes}
  names = [page.content[name].strip() for name in ('play', 'back', 'forward', 'reset')]
  assert names == ['Play', 'Step back', 'Step', 'Reset']
  assert 'given text' in page.content['<main>'] and 'Space play or pause' in ' '.join(page.content['<main>'].split())
  assert 'A model wrote this text by inserting one token at a time' in page.content['<main>']
  legends = ('insertion of this step (outlined bar)', 'answer edge missing from the graph', 'p(stop) before')
  assert all(legend in page.content['<main>'] for legend in legends)
  assert traces.page([], 'a & b').count('a &amp; b') == 2


def in_browser(page, hash_='', script=''):
  """Run the page's scripts and then `script` in Chromium; return the resulting page, parsed."""
  flags = ['--headless', '--no-sandbox', '--disable-gpu', '--disable-background-networking', '--dump-dom']
  flags.append('--virtual-time-budget=20000')  # wait for the page's script, also on a busy machine
  with tempfile.TemporaryDirectory() as short:  # Chromium's socket does not work in folders with long paths
    with open(f'{short}/page.html', 'w', encoding='utf-8') as file:
      file.write(page.replace('</body>', f'<script>{script}</script></body>'))
    process = subprocess.run(
      ['chromium', *flags, f'--user-data-dir={short}/profile', f'file://{short}/page.html{hash_}'],
      capture_output=True, encoding='utf-8', timeout=120, env={**os.environ, 'TMPDIR': short},
    )  # fmt: skip
  return Page(process.stdout)


@needs_browser
@pytest.mark.long
def test_a_browser_shows_the_text_after_each_step(sentencepiece):
  result = infill(sentencepiece, PARTS, FILLINGS)
  source = text_tracer(sentencepiece).page([result])
  (record,) = records_of(source)
  for step in (0, 1, 7, record['steps']):
    page = in_browser(source, f'#{step}')
    assert (page.content['text'], page.newest) == shown(record, step)
  assert (
    in_browser(text_tracer(sentencepiece).page([result, result]))
    .content['which']
    .startswith('1: \xa0\xa0Tom\xa0had\xa0\xa0a')
  )
  assert page.content['text'] == result.text and page.content['said'].endswith('The model ended the text.')


KEYS = """
const seen = [], state = () => seen.push([$('count').textContent, $('play').textContent, $('text').textContent]);
const press = key => { document.body.dispatchEvent(new KeyboardEvent('keydown', {key, bubbles: true})); state(); };
const click = id => { $(id).click(); state(); };
['Home', 'ArrowRight', 'End', 'ArrowLeft'].forEach(press);
['reset', 'forward', 'back'].forEach(click);
$('body').rows[2].click(); state();
seen.push([...document.querySelectorAll('tr[aria-current=step] td')].map(cell => cell.textContent));
seen.push([...document.querySelectorAll('.link.path title, g:has(.link.path) title')].map(one => one.textContent));
click('reset'); press(' '); press(' '); press(' ');
const bars = () => [...document.querySelectorAll('#plot rect')].map(bar => +bar.getAttribute('height'));
const last = () => { click('reset'); $('body').rows[6].click(); state(); seen.push($('body').rows[6].textContent); };
const log = () => { state(); last(); seen.push($('said').textContent, bars()); };
setTimeout(() => { log(); document.body.append(element('pre', {id: 'log'}, JSON.stringify(seen))); }, 10000);
"""


@needs_browser
@pytest.mark.long
def test_keys_buttons_and_table_rows_select_which_step_is_shown():
  lm, result = star_example()
  result.probabilities[0] = 1e-6
  seen = json.loads(in_browser(lm.page([result]), script=KEYS).content['log'])
  steps = [state[0] for state in seen[:8]]
  assert steps == [f'step {step} of 6' for step in (0, 1, 6, 5, 0, 1, 0, 3)]
  assert seen[7][2].endswith('/1,7=2,2|5')
  assert seen[8][:3] == ['3', 'after “2”', '5']  # cells of the current table row: step, place, token
  assert seen[9] == ['edge 2, 5']  # the only edge of which both nodes have been inserted
  assert [state[1] for state in seen[10:13]] == ['Play', 'Pause', 'Play'] and seen[13][1] == 'Pause'
  assert (
    seen[14] == seen[16] == ['step 6 of 6', 'Play', result.text]
  )  # after the playback; after a click on the last row
  assert seen[17] == 'end0.857' and 'p(stop) is now 0.857' in seen[18]
  assert len(seen[19]) == 6 and min(seen[19]) == 3  # the smallest bar stays visible
