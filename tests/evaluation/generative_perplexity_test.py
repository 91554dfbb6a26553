"""Judged texts: numbers as a person would compute them, sets of gaps that make up their texts, mistakes in one line."""

import json
import math
import re
import sys
import types
from collections import Counter

import jax
import numpy as np
import pytest
from infilling_test import FEW, make_lm, sentences
from ml_collections import ConfigDict

from ilm_jax import families, generate, metrics, tasks
from ilm_jax.configs import text as text_config
from ilm_jax.data import tokenizers
from ilm_jax.evaluation import generative_perplexity, infill_sets, scoring_models, text_statistics
from ilm_jax.evaluation.scoring_models import Judged
from ilm_jax.inference import infilling
from ilm_jax.models import transformer
from ilm_jax.runs import run_file
from ilm_jax.special_tokens import BOS, CLS, EOS, UNK
from ilm_jax.training import experiment, loop
from ilm_jax.types import UserError

TEXTS = ['the dog ran home .', 'Tom', 'a cat and a bird', '', 'the dog ran home .', 'Anna saw ' * 20]


@pytest.fixture(scope='module')
def words():
  return tokenizers.train_sentencepiece(iter(sentences(300)), size=330)


@pytest.fixture(scope='module')
def arm(words, tmp_path_factory):
  """A judge with random weights."""
  return scoring_models.ArmJudge(
    make_lm(words, tmp_path_factory.mktemp('words'), 'arm', **FEW), name='runs/arm', rows=2
  )


@pytest.fixture(scope='module')
def by_hand(arm):
  """-log p of the tokens of a text one by one: a pass for each, over nothing but what is before it."""
  forward = jax.jit(
    lambda tokens_BxL, length_B: transformer.Forward(arm.lm.model_cfg, arm.lm.params)(tokens_BxL, length_B)
  )
  closed = [i for i in range(7) if i not in (EOS, UNK)]

  def losses(ids):
    out = []
    for n, token in enumerate(ids):
      given = [CLS, BOS, *ids[:n]]
      outputs = forward(np.array([given + [0] * (64 - len(given))]), np.array([len(given)]))
      logits_V = np.asarray(outputs.hidden_BxLxD[0, len(given) - 1] @ outputs.unembed_VxD.T, np.float64)
      open_V = np.delete(logits_V, closed)
      out.append(open_V.max() + math.log(np.exp(open_V - open_V.max()).sum()) - logits_V[token])
    return out

  return losses


class Table(scoring_models.Judge):
  """A judge to whom a token is a word, and -log p of a token the number of its letters over that of the one before."""

  name, limit, rows = 'table', 6, 3

  def encode(self, text):
    return list(map(len, text.split()))

  def losses(self, ids_BxL, tokens_B):
    before_BxL = np.concatenate([np.ones((len(ids_BxL), 1)), ids_BxL[:, :-1]], axis=1)
    return ids_BxL / np.maximum(before_BxL, 1)


# --- judges -----------------------------------------------------------------------------------------------------------


def test_a_judge_sums_the_tokens_one_by_one(arm, words, by_hand):
  judged = arm.nll(TEXTS)
  for text, one in zip(TEXTS, judged, strict=True):
    ids = words.encode(text)
    assert (one.ids, one.tokens, one.cut) == (ids, len(ids), False)
    np.testing.assert_allclose(one.nll, sum(by_hand(ids)), rtol=1e-5)
  assert judged[3] == (0.0, 0, [], False)
  np.testing.assert_allclose(arm.nll(TEXTS[:1])[0].nll, judged[0].nll, rtol=1e-6)  # whatever is beside it


def test_few_programs_serve_texts_of_every_length(arm):
  arm.run.clear_cache()
  arm.nll([' '.join(['dog'] * n) for n in range(1, 90)])
  assert arm.run._cache_size() <= 3  # 32, 64, and the judge's own length


def test_an_unknown_word_has_a_probability(tmp_path, words):
  pieces = tokenizers.WordPiece('\n'.join([*tokenizers.SPECIAL, 'the', 'dog']).encode())
  judged = scoring_models.ArmJudge(make_lm(pieces, tmp_path, 'arm', **FEW), rows=1).nll(['the zebra dog'])[0]
  assert UNK in judged.ids and 0 < judged.nll < 100


def test_a_long_text_is_cut_to_its_first_tokens_and_says_so(arm, words):
  text = 'the dog ran home . ' * 40
  (long,) = arm.nll([text])
  assert long.cut and long.tokens == arm.limit == 94 and long.ids == words.encode(text)[:94]
  assert Table().nll(['a b c d e f', 'a b c d e f g']) == [
    (6.0, 6, [1] * 6, False),
    (6.0, 6, [1] * 6, True),
  ]


def test_a_judge_looks_at_a_text_once():
  asked = []

  class Asked(Table):
    def encode(self, text):
      asked.append(text)
      return super().encode(text)

  once = scoring_models.Once(Asked())
  assert once.nll(['a', 'bb', 'a']) == Table().nll(['a', 'bb', 'a'])
  assert once.nll(['bb', 'c']) == Table().nll(['bb', 'c']) and asked == ['a', 'bb', 'c']


def write_run(folder, family='arm', task='text'):
  folder.mkdir(parents=True)
  config = {name: {} for name in ('model', 'sampling', 'loss', 'eval')}
  run_file.write_json(
    folder / 'run.json', {'config': {'family': family, 'task': {'name': task}, **config}, 'starts': []}
  )
  return str(folder)


def test_judges_that_there_are_not_are_refused(tmp_path, monkeypatch):
  with pytest.raises(UserError, match=r'the judge .*/none: expected the workdir of a run.*; or hf:NAME'):
    scoring_models.get(tmp_path / 'none')
  with pytest.raises(UserError, match=r'is a run of family=ilm: expected family=arm, which gives every text its exact'):
    scoring_models.get(write_run(tmp_path / 'ilm', 'ilm'))
  with pytest.raises(UserError, match=r'is a run of the task star: expected one of texts'):
    scoring_models.get(write_run(tmp_path / 'star', task='star'))
  monkeypatch.setitem(sys.modules, 'transformers', None)
  with pytest.raises(UserError, match=r'a judge hf:NAME needs transformers and torch: pip install "ilm_jax\[judge\]"'):
    scoring_models.get('hf:gpt2')


# --- Hugging Face, of which this is as much as the judge needs --------------------------------------------------------


class Tensor(np.ndarray):
  """A numpy array with the methods of torch that are called."""

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


class Nothing:
  def __enter__(self):
    return self

  def __exit__(self, *_):
    return None


class Net:
  """Logits of 9 tokens after a sequence: cos(token * (1 + sum of the sequence, of what the mask lets through))."""

  config = types.SimpleNamespace(max_position_embeddings=5)

  def to(self, **_):
    return self

  def eval(self):
    return self

  def __call__(self, input_ids, attention_mask):
    sums_BxL = np.cumsum(input_ids * attention_mask, axis=1)
    logits = np.cos(np.arange(9)[None, None] * (1 + sums_BxL)[..., None])
    return types.SimpleNamespace(logits=logits.view(Tensor))


class Words:
  """A tokenizer to whom the letters a .. h are the tokens 1 .. 8."""

  bos_token_id, eos_token_id, model_max_length = None, 7, 10**30

  def encode(self, text, add_special_tokens, verbose):
    assert not add_special_tokens and not verbose
    return [1 + 'abcdefgh'.index(letter) for letter in text]


@pytest.fixture
def hub(monkeypatch):
  """Packages under the names of torch and transformers; yields the class whose `from_pretrained` gives tokenizers."""

  def named(made):
    return types.SimpleNamespace(from_pretrained=lambda name, **_: made())

  torch = types.ModuleType('torch')
  torch.cuda = types.SimpleNamespace(is_available=lambda: False)
  torch.float32, torch.long, torch.bfloat16 = np.float32, np.int64, None
  torch.tensor = lambda array, device, dtype: np.asarray(array, dtype).view(Tensor)
  torch.stack = lambda arrays: np.stack(arrays).view(Tensor)
  torch.inference_mode = Nothing
  torch.nn = types.SimpleNamespace(functional=types.SimpleNamespace(cross_entropy=cross_entropy))
  transformers = types.ModuleType('transformers')
  transformers.AutoTokenizer, transformers.AutoModelForCausalLM = named(Words), named(Net)
  monkeypatch.setitem(sys.modules, 'torch', torch)
  monkeypatch.setitem(sys.modules, 'transformers', transformers)
  return transformers


def test_a_model_of_the_hub_predicts_the_first_token_after_its_start(hub):
  made = scoring_models.get('hf:some/model')
  assert (made.name, made.limit) == ('hf:some/model', 4)
  for text, one in zip(['abc', 'h', 'abcdef', ''], made.nll(['abc', 'h', 'abcdef', '']), strict=True):
    ids, expected, given = [1 + 'abcdefgh'.index(c) for c in text][:4], 0.0, [7]  # the end starts where there is no BOS
    for token in ids:
      odds = [math.exp(math.cos(i * (1 + sum(given)))) for i in range(9)]
      expected -= math.log(odds[token] / sum(odds))
      given.append(token)
    assert (one.ids, one.cut) == (ids, len(text) > 4)
    assert one.nll == pytest.approx(expected, rel=1e-5)


def test_a_model_that_the_hub_does_not_give_is_one_line(hub, monkeypatch):
  def gone(name):
    raise OSError(f'{name} is not a local folder\nand is not a valid model identifier')

  monkeypatch.setattr(Words, 'eos_token_id', None)
  with pytest.raises(UserError, match='the judge hf:odd has neither a BOS nor an EOS token to start from'):
    scoring_models.get('hf:odd')
  hub.AutoModelForCausalLM.from_pretrained = gone
  with pytest.raises(
    UserError, match=r'the judge hf:x could not be loaded .*\(x is not a local folder and is not.*: name another, or'
  ) as e:
    scoring_models.get('hf:x')
  assert '\n' not in str(e.value)
  with pytest.raises(UserError, match='the judge hf:: expected a name or path behind hf:'):
    scoring_models.get('hf:')


def test_a_real_model_of_the_hub_is_judged_token_by_token(tmp_path):
  transformers, torch = pytest.importorskip('transformers'), pytest.importorskip('torch')
  from tokenizers import Tokenizer, models, pre_tokenizers

  words = Tokenizer(models.WordLevel({'<s>': 0, 'a': 1, 'b': 2, 'c': 3}, unk_token='a'))
  words.pre_tokenizer = pre_tokenizers.Whitespace()
  transformers.PreTrainedTokenizerFast(tokenizer_object=words, bos_token='<s>').save_pretrained(tmp_path)
  settings = transformers.GPT2Config(vocab_size=4, n_positions=9, n_embd=8, n_layer=2, n_head=2, bos_token_id=0)
  net = transformers.GPT2LMHeadModel(settings).eval()
  net.save_pretrained(tmp_path)
  made = scoring_models.get(f'hf:{tmp_path}')
  for text, one in zip(['a b c', 'b', 'c a ' * 5], made.nll(['a b c', 'b', 'c a ' * 5]), strict=True):
    ids, expected = [' abc'.index(word) for word in text.split()][:8], 0.0
    for n, token in enumerate(ids):
      with torch.no_grad():
        logits_V = net(input_ids=torch.tensor([[0, *ids[:n]]])).logits[0, -1]
      expected -= float(torch.log_softmax(logits_V, -1)[token])
    assert (one.ids, one.cut) == (ids, len(text.split()) > 8)
    assert one.nll == pytest.approx(expected, rel=1e-4)
  assert made.encode('a <s> b') == [1, 1, 1, 1, 2]  # a special token in a text is text, here of unknown words


# --- statistics -------------------------------------------------------------------------------------------------------


def test_an_interval_is_that_of_a_loop_over_resamples():
  rng = np.random.default_rng(3)
  totals, weights = rng.normal(5, 2, 17).tolist(), rng.integers(1, 9, 17).tolist()
  for these in (weights, None):
    draws, means = np.random.default_rng(7), []
    for _ in range(300):
      picked = [int(i) for i in draws.integers(17, size=17)]
      means.append(sum(totals[i] for i in picked) / sum((these or [1] * 17)[i] for i in picked))
    means.sort()
    made = text_statistics.bootstrap(totals, these, seed=7, resamples=300)
    assert made.value == pytest.approx(sum(totals) / sum(these or [1] * 17))
    for bound, place in ((made.low, 0.025 * 299), (made.high, 0.975 * 299)):
      below, above = means[math.floor(place)], means[math.ceil(place)]
      assert bound == pytest.approx(below + (place % 1) * (above - below))
  assert text_statistics.bootstrap([2.0]) == (2.0, None, None) and text_statistics.bootstrap([]) == (None, None, None)


def test_intervals_hold_the_mean_as_often_as_they_say():
  rng, inside = np.random.default_rng(0), 0
  for i in range(200):
    made = text_statistics.bootstrap(rng.normal(1.0, 3.0, 60), seed=i, resamples=200)
    inside += made.low <= 1.0 <= made.high
  assert 0.88 <= inside / 200 <= 0.98


def test_statistics_of_texts_are_those_of_their_tokens(arm, words, by_hand):
  found = text_statistics.describe(TEXTS, arm.nll(TEXTS), seed=4)
  rows = [words.encode(text) for text in TEXTS]
  some = [row for row in rows if row]
  losses = [by_hand(row) for row in some]
  assert (found['texts'], found['empty'], found['cut']) == (6, 1, 0)
  assert found['nll'].value == pytest.approx(sum(sum(loss) / len(loss) for loss in losses) / 5, rel=1e-5)
  assert found['perplexity'].value == pytest.approx(math.exp(sum(map(sum, losses)) / sum(map(len, some))), rel=1e-5)
  assert found['length'].value == pytest.approx(sum(map(len, rows)) / 6)
  entropies = []
  for row in some:
    shares = [row.count(token) / len(row) for token in set(row)]
    entropies.append(-sum(p * math.log(p) for p in shares))
  assert found['entropy'].value == pytest.approx(sum(entropies) / 5)
  for n in (1, 2, 3, 4):
    grams = Counter(str(row[i : i + n]) for row in rows for i in range(len(row)) if i + n <= len(row))
    assert found[f'distinct_{n}'].value == pytest.approx(len(grams) / sum(grams.values()))
  assert found['repeated'] == (1 / 6, *metrics.wilson(1, 6))
  for name in ('nll', 'perplexity', 'entropy', 'length'):
    assert found[name].low < found[name].value < found[name].high
  shown = text_statistics.table({'samples': found})
  assert re.search(rf'NLL a token, nats +{found["nll"].value:.4f} \({found["nll"].low:.4f} – ', shown)
  json.dumps(text_statistics.plain(found), allow_nan=False)


def test_nothing_but_empty_texts_has_no_likelihood():
  found = text_statistics.describe(['', ''], Table().nll(['', '']))
  assert found['nll'] == found['entropy'] == found['distinct_1'] == found['perplexity'] == (None, None, None)
  assert found['length'].value == 0.0 and found['empty'] == 2
  assert re.search('NLL a token, nats +–', text_statistics.table({'samples': found}))
  assert text_statistics.values(found) == {'length': 0.0, 'repeated': 0.5}


def test_the_change_is_the_mean_of_the_relative_ones():
  made = [Judged(6.0, 3, [1], False), Judged(4.0, 4, [1], False), Judged(9.0, 1, [1], False), Judged(5.0, 1, [1], True)]
  other = [
    Judged(2.0, 2, [1], False),
    Judged(8.0, 4, [1], False),
    Judged(3.0, 1, [1], False),
    Judged(1.0, 1, [1], False),
  ]
  found = text_statistics.change(['a', 'b', 'c', 'd'], made, other)
  assert found['change'].value == pytest.approx((100 - 50 + 200) / 3) and found['left_out'] == 1
  together = text_statistics.change(['a', 'b', 'b', 'd'], made, other)['change']  # two answers to b
  assert together.value == pytest.approx((100 + (-50 + 200) / 2) / 2)
  assert text_statistics.change(['a'], [Judged(0.0, 0, [], False)], other[:1]) == {
    'change': (None, None, None),
    'left_out': 1,
  }


def test_fillings_match_but_for_spaces():
  made, true = [['a  b', 'c'], ['x', 'd']], [[' a b', 'c'], ['y', 'd']]
  found = text_statistics.matches([0, 1], made, true)
  assert found == {'exact_match': (0.5, *metrics.wilson(1, 2)), 'filling_match': (0.75, *metrics.wilson(1.5, 2))}
  twice = text_statistics.matches([0, 1, 0, 1], made * 2, true * 2)  # answers to one request are not independent
  assert twice == found


def test_mauve_is_left_out_and_said_or_made_by_its_package(monkeypatch):
  monkeypatch.setitem(sys.modules, 'mauve', None)
  assert text_statistics.mauve(['a'], ['b']) == (None, 'MAUVE is left out: the package mauve-text is not installed')
  package = types.ModuleType('mauve')
  package.compute_mauve = lambda p_text, q_text, verbose: types.SimpleNamespace(mauve=len(p_text) / len(q_text))
  monkeypatch.setitem(sys.modules, 'mauve', package)
  assert text_statistics.mauve(['a', 'b'], ['c']) == (0.5, '')
  package.compute_mauve = lambda **_: 1 / 0
  assert text_statistics.mauve(['a'], ['c']) == (None, 'MAUVE is left out: division by zero')


# --- sets of gaps -----------------------------------------------------------------------------------------------------

STORY = 'Tom had a dog. It was big!\n"Run," he said.  The dog ran "home."\n\nAnna saw it? Yes.'


def corpus(folder, number=40, seed=0):
  """Stories in a file of one document a paragraph."""
  rng = np.random.default_rng(seed)
  text = [' '.join(f'{one.capitalize()}.' for one in sentences(rng.integers(1, 7), seed=i)) for i in range(number)]
  (folder / 'valid.txt').write_text('\n\n'.join(text))
  (folder / 'train.txt').write_text('nothing here.')
  return folder


def test_sentences_are_found_without_the_spaces_around_them():
  found = [STORY[start:end] for start, end in infill_sets.sentences(STORY)]
  assert found == [
    'Tom had a dog.', 'It was big!', '"Run," he said.', 'The dog ran "home."', 'Anna saw it?', 'Yes.',
  ]  # fmt: skip
  assert infill_sets.sentences(' ... \n') == []


@pytest.mark.parametrize('kind, unit', [('single', 'sentence'), ('single', 'words'), ('multi', 'words')])
def test_parts_and_fillings_make_the_text(kind, unit):
  rng, counts = np.random.default_rng(0), Counter()
  pool = ['the', 'dog', 'ran.', '"Tom', '犬。', 'é!', '\n', '  ', '\t', '...', 'a', 'b?']
  for i in range(600):
    text = ' '.join(rng.choice(pool, rng.integers(0, 40))).strip()
    made = infill_sets.make(text, np.random.default_rng(i), kind=kind, unit=unit, share=0.3)
    if made is None:
      continue
    assert made.text == text and all(made.fillings) and ''.join(made.parts).strip()
    assert all(one == one.strip() for one in made.fillings) and all(part.strip() for part in made.parts[1:-1])
    infilling.read(made.parts)  # what generate reads
    counts[len(made.fillings)] += 1
    if unit == 'words':
      assert sum(len(one.split()) for one in made.fillings) == max(len(made.fillings), round(0.3 * len(text.split())))
      inside = ' '.join(part if part[:1].isspace() or part[-1:].isspace() else f'{part}|' for part in made.parts)
      assert '|' not in inside.rstrip('|') or made.parts[0] == '' or made.parts[-1] == ''  # gaps hold whole words
  assert set(counts) == ({1} if kind == 'single' else {2, 3, 4, 5}) and sum(counts.values()) > 300


def test_all_places_of_the_gaps_are_equally_likely():
  counts = Counter()
  for i in range(3_000):
    made = infill_sets.chunks('a b c d e', np.random.default_rng(i), 0.4, 2)  # two words of five, not beside each other
    counts[tuple(made.fillings)] += 1
  assert len(counts) == 6 and min(counts.values()) > 400
  assert infill_sets.chunks('a b c', np.random.default_rng(0), 0.9, 2) is None
  assert infill_sets.chunks('a', np.random.default_rng(0), 0.2, 1) is None


def command(module, *arguments, capsys):
  code = module.main([module.__name__, *map(str, arguments)])
  out, err = capsys.readouterr()
  return code, out, err


def test_a_set_is_a_function_of_the_seed_and_the_corpus(tmp_path, capsys):
  where = f'--path={corpus(tmp_path)}', '--documents=paragraph'
  runs = [
    command(infill_sets, *where, f'--seed={seed}', '--count=10', capsys=capsys)[1].splitlines() for seed in (0, 0, 1)
  ]
  assert runs[0] == runs[1] != runs[2] and len(runs[0]) == 10
  for number, line in enumerate(runs[0]):
    record = json.loads(line)
    assert list(record) == ['id', 'infill', 'truth', 'fillings'] and record['id'] == number
    assert infill_sets.Gapped(record['infill'], record['fillings']).text == record['truth']
  code, out, err = command(infill_sets, *where, '--count=99', '--kind=multi', f'--out={tmp_path / "o"}', capsys=capsys)
  lines = (tmp_path / 'o').read_text().splitlines()
  assert code == 0 and not out and f'gives {len(lines)} of the 99 lines' in err


def test_lengths_are_those_of_the_tokens_in_each_gap(words):
  fits = infill_sets.Fits.__new__(infill_sets.Fits)
  fits.tokenizer, fits.limit = words, 40
  settings = {'kind': 'multi', 'unit': 'words', 'share': 0.4, 'count': 60, 'seed': 0, 'fits': fits}
  lines = infill_sets.requests(sentences(60), **settings, lengths=True)
  assert len(lines) > 20
  for line in lines:
    masked = infilling.encode(
      infilling.read(line['infill'], least=line['least'], most=line['most']), words, limit=96, masks=True
    )
    assert line['least'] == line['most'] and len(masked['tokens']) < 40
  fits.limit = 8
  short = infill_sets.requests(sentences(60), **settings)
  assert 0 < len(short) < len(lines) and all(len(words.encode(line['truth'])) < 8 for line in short)
  fits.tokenizer, fits.limit = types.SimpleNamespace(encode=list), 200  # with the space before it, as generate sees it
  for line in infill_sets.requests(sentences(60), **settings, lengths=True):
    spaces = [len(part) - len(part.rstrip(' ')) for part in line['infill'][:-1]]
    assert line['least'] == [n + len(one) for n, one in zip(spaces, line['fillings'], strict=True)]


def test_mistakes_with_sets_are_one_line(tmp_path, capsys):
  folder = corpus(tmp_path)
  for arguments, message in (
    ([], '--path is missing'),
    ([f'--path={tmp_path / "none"}'], f'--path={tmp_path / "none"} does not exist'),
    ([f'--path={folder}', '--split=dev'], '--split=dev: expected one of train, validation, test'),
    ([f'--path={folder}', '--documents=page'], '--documents=page: expected one of'),
    ([f'--path={folder}', '--share=1'], '--share=1.0: expected a number between 0 and 1'),
    ([f'--path={folder}', '--lengths'], '--lengths counts the tokens of a run'),
    ([f'--path={folder}', '--kind=multi', '--unit=words'], '--unit is of --kind=single'),
    ([f'--path={folder}', '--kind=many'], 'flags: flag --kind=many'),
    ([f'--path={folder}', '--split=train'], 'no text in its train split that is long enough for such gaps'),
    ([f'--path={folder}', f'--tokenizer={tmp_path}'], f'--tokenizer={tmp_path}: expected the workdir of a run'),
    ([f'--path={folder}', f'--out={tmp_path}', '--documents=paragraph', '--count=5'], 'Is a directory'),
  ):
    code, out, err = command(infill_sets, *arguments, capsys=capsys)
    assert code == 1 and not out and re.fullmatch(f'error: .*{re.escape(message)}.*\n', err), (arguments, err)


# --- from requests to numbers -----------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def answered(words, tmp_path_factory):
  """Requests with their truth, and what generate writes for them."""
  folder = tmp_path_factory.mktemp('answered')
  lm = make_lm(words, folder / 'words', **FEW)
  lines = infill_sets.requests(sentences(30), kind='multi', unit='words', share=0.4, count=6, seed=0)
  (folder / 'requests.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr('ilm_jax.inference.api.load', lambda *_, **__: lm)
    code = generate.main(
      [
        'generate',
        '--workdir=w',
        f'--prompts={folder / "requests.jsonl"}',
        f'--out={folder / "answers.jsonl"}',
        '--n=2',
      ]
    )
  assert code == 0
  return folder


def read(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_truth_of_a_request_comes_with_its_answer(answered):
  asked = {line['id']: line for line in read(answered / 'requests.jsonl')}
  made = read(answered / 'answers.jsonl')
  assert len(made) == 12
  for line in made:
    assert line['truth'] == {'text': asked[line['id']]['truth'], 'fillings': asked[line['id']]['fillings']}


def test_fillings_are_judged_against_the_truth_and_the_input(
  answered, arm, by_hand, words, tmp_path, monkeypatch, capsys
):
  monkeypatch.setattr(scoring_models, 'check', lambda name: None)
  monkeypatch.setattr(scoring_models, 'get', lambda name: arm)
  out = tmp_path / 'judged.json'
  arguments = ['--judge=runs/arm', f'--samples={answered / "answers.jsonl"}', f'--out={out}']
  code, shown, err = command(generative_perplexity, *arguments, capsys=capsys)
  assert code == 0, err
  made, changes = read(answered / 'answers.jsonl'), {'truth': {}, 'input': {}}
  matched = []

  def per_token(text):
    ids = words.encode(text)[: arm.limit]
    return sum(by_hand(ids)) / len(ids)

  for line in made:
    given = re.sub(' +', ' ', ''.join(line['infill'])).strip()  # these texts have no others
    for name, reference in (('truth', line['truth']['text']), ('input', given)):
      change = 100 * (per_token(line['text']) / per_token(reference) - 1)
      changes[name].setdefault(line['id'], []).append(change)
    matched.append([a == b for a, b in zip(line['fillings'], line['truth']['fillings'], strict=True)])
  result = json.loads(out.read_text())
  assert (result['judge'], result['infilling']['answers'], result['infilling']['requests']) == ('runs/arm', 12, 6)
  for name, by_request in changes.items():
    expected = np.mean([np.mean(values) for values in by_request.values()])
    got = result['infilling'][f'change_{name}']
    assert got['value'] == pytest.approx(expected, rel=1e-3) and got['low'] < got['value'] < got['high']
    assert result['infilling'][f'left_out_{name}'] == 0
    assert re.search(rf'NLL against the {name}, % +{got["value"]:+.2f} ', shown)
  assert result['infilling']['exact_match']['value'] == pytest.approx(np.mean([all(one) for one in matched]))
  assert result['infilling']['filling_match']['value'] == pytest.approx(sum(map(sum, matched)) / sum(map(len, matched)))

  bare = tmp_path / 'bare.jsonl'  # the same without the truth, which the requests give
  bare.write_text(''.join(json.dumps({k: v for k, v in line.items() if k != 'truth'}) + '\n' for line in made))
  arguments = ['--judge=runs/arm', f'--samples={bare}', f'--out={out}']
  assert command(generative_perplexity, *arguments, f'--requests={answered / "requests.jsonl"}', capsys=capsys)[0] == 0
  assert json.loads(out.read_text())['infilling'] == result['infilling']
  assert command(generative_perplexity, *arguments, capsys=capsys)[0] == 0
  assert set(json.loads(out.read_text())['infilling']) == {'answers', 'requests', 'change_input', 'left_out_input'}


def test_the_truth_itself_changes_nothing_and_matches(tmp_path):
  samples = []
  for line in infill_sets.requests(sentences(9), kind='single', unit='words', share=0.5, count=9, seed=0):
    samples.append(
      generative_perplexity.Sample(
        line['truth'], line['id'], line['infill'], line['fillings'], line['truth'], line['fillings']
      )
    )
  judging = Table()
  judging.limit = 99
  found = generative_perplexity.infilling(judging, samples)
  assert found['change_truth'] == (0, 0, 0) and found['exact_match'].value == found['filling_match'].value == 1
  assert found['change_input'].value != 0
  judging.limit = max(len(sample.text.split()) for sample in samples) - 1
  assert generative_perplexity.infilling(judging, samples)['left_out_truth'] > 0
  assert (
    text_statistics.without_gaps(['the ', ' ran', '']) == 'the ran'
    and text_statistics.without_gaps(['', ' ran']) == 'ran'
  )
  assert text_statistics.without_gaps(['a', 'b ', ' c']) == 'ab c'
  assert text_statistics.without_gaps(['a ', '']) == 'a'


def test_references_are_judged_beside_the_samples(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(scoring_models, 'check', lambda name: None)
  monkeypatch.setattr(scoring_models, 'get', lambda name: Table())
  monkeypatch.setitem(sys.modules, 'mauve', None)
  (tmp_path / 'samples.jsonl').write_text('{"text": "a bb"}\n{"text": "ccc"}\n')
  (tmp_path / 'true.jsonl').write_text('{"text": "a bb"}\n{"text": "a b c d e f g"}\n{"text": ""}\n')
  arguments = ['--judge=t', f'--samples={tmp_path / "samples.jsonl"}', f'--out={tmp_path / "o.json"}']
  code, shown, _ = command(generative_perplexity, *arguments, f'--reference={tmp_path / "true.jsonl"}', capsys=capsys)
  result = json.loads((tmp_path / 'o.json').read_text())
  assert code == 0 and (result['samples']['texts'], result['reference']['texts']) == (2, 3)
  assert result['samples']['nll']['value'] == (1.5 + 3) / 2 and result['reference']['nll']['value'] == (1.5 + 1) / 2
  assert "reference: 1 of 3 are longer than the judge's 6 tokens, which it saw of them" in shown
  assert 'reference: 1 of 3 have no token' in shown and 'MAUVE is left out' in shown
  folder = corpus(tmp_path)
  code, _, err = command(
    generative_perplexity, *arguments, f'--reference={folder / "valid.txt"}', '--documents=paragraph', '--split=train', capsys=capsys
  )  # fmt: skip
  assert code == 0, err
  assert json.loads((tmp_path / 'o.json').read_text())['reference']['texts'] == 2


GOOD = {'id': 0, 'text': 'a b c', 'infill': ['a ', ' c'], 'fillings': ['b'], 'spans': [[2, 3]]}


@pytest.mark.parametrize(
  'lines, requests, message',
  [
    (None, None, 'No such file or directory'),
    ([], None, 'holds no sample: expected JSON with "text", a line each'),
    (['{"text": "a"}', '{"txt": 1}'], None, r'answers.jsonl, line 2: expected "text", a string'),
    (['the dog'], None, r'line 1: expected a JSON object, got the dog'),
    (['[1]'], None, r'line 1: expected a JSON object, got \[1\]'),
    (['{"text": "\\ud800"}'], None, 'line 1: holds half of a surrogate pair'),
    ([GOOD | {'spans': [[2, 9]]}], None, 'expected "fillings", a list of texts, and "spans"'),
    ([GOOD | {'spans': [2]}], None, 'expected "fillings", a list of texts, and "spans"'),
    ([GOOD | {'id': None}], None, 'expected "id", whose answer it is'),
    ([GOOD, GOOD], None, 'line 2 has the id and the sample of .*line 1: expected each answer once'),
    ([GOOD | {'truth': 3}], None, 'expected "truth", the whole text'),
    ([GOOD | {'truth': {'text': 'a d c', 'fillings': ['e']}}], None, 'do not make the truth, .a d c.'),
    ([GOOD | {'truth': 'a d c'}, GOOD | {'id': 1}], None, 'the id 1 has no truth, and others have one'),
    ([GOOD | {'id': 7}], [{'id': 0, 'truth': 'a d c'}], 'has no request with the id 7, which a sample has'),
    ([GOOD], [{'id': 0}], 'requests.jsonl, line 1: expected "truth", the whole text'),
    ([GOOD], [{'id': 0, 'truth': 'x d y', 'fillings': ['d']}], 'do not make the truth, .x d y.'),
    ([GOOD], [{'truth': 'a d c'}], 'requests.jsonl, line 1: expected "id", the one of its answers'),
    ([GOOD], [{'id': 0, 'truth': 'a'}] * 2, 'line 2 has the id 0 of .*line 1: expected each once'),
  ],
  ids=lambda value: None if isinstance(value, str) else '',
)
def test_samples_that_cannot_be_judged_are_refused(lines, requests, message, tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(scoring_models, 'check', lambda name: None)
  monkeypatch.setattr(scoring_models, 'get', lambda name: Table())
  files = {'samples': tmp_path / 'answers.jsonl', 'requests': tmp_path / 'requests.jsonl'}
  for name, content in (('samples', lines), ('requests', requests)):
    if content is not None:
      text = ''.join((one if isinstance(one, str) else json.dumps(one)) + '\n' for one in content)
      files[name].write_text(text)
  arguments = ['--judge=t', f'--samples={files["samples"]}']
  arguments += [f'--requests={files["requests"]}'] if requests else []
  code, out, err = command(generative_perplexity, *arguments, capsys=capsys)
  assert code == 1 and not out and re.fullmatch(f'error: .*{message}.*\n', err), err


def test_flags_that_mean_nothing_are_refused(tmp_path, capsys):
  (tmp_path / 'a.jsonl').write_text('{"text": "a"}\n')
  samples = f'--samples={tmp_path / "a.jsonl"}'
  for arguments, message in (
    ([samples], '--judge is missing: expected Folder of an ARM run, or hf:NAME'),
    (['--judge=runs/arm'], '--samples is missing'),
    ([samples, f'--judge={tmp_path / "none"}'], 'expected the workdir of a run'),
    ([samples, '--jugde=x'], 'flags: Unknown command line flag'),
    ([samples, '--judge=x', 'y'], "did not understand 'y'"),
  ):
    code, out, err = command(generative_perplexity, *arguments, capsys=capsys)
    assert code == 1 and not out and re.fullmatch(f'error: .*{message}.*\n', err), err
  assert 'ilm-jax perplexity' in command(generative_perplexity, '--help', capsys=capsys)[1]


def test_a_run_says_what_its_judge_says_of_its_samples(monkeypatch):
  monkeypatch.setattr(scoring_models, 'get', lambda name: Table())
  cfg = ConfigDict({'seed': 1, 'eval': {'perplexity_model': 'runs/arm'}})
  source = types.SimpleNamespace(text=['a bb', 'ccc', 'never seen'].__getitem__)
  found = loop.judge(cfg, ('dd', ''), source)
  assert found['samples']['nll'].value == 2 and found['test']['nll'].value == (1.5 + 3) / 2
  assert found['notes'] == ['samples: 1 of 2 have no token, and so no NLL and no entropy']
  assert loop.judge(ConfigDict({'eval': {}}), (), source) is None


def test_a_run_whose_judge_is_not_there_is_refused_before_anything_is_made(tmp_path):
  cfg = text_config.get_config('small')
  parts = families.get('ilm'), tasks.get('text')
  experiment.check_choices(cfg, *parts)
  for name, message in ((tmp_path, 'expected the workdir of a run'), (write_run(tmp_path / 'it', 'it'), 'family=it')):
    cfg.eval.perplexity_model = str(name)
    with pytest.raises(UserError, match=f'^the judge .*{message}'):
      experiment.check_choices(cfg, *parts)
