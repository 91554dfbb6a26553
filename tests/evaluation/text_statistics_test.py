"""Statistics of texts compared with plain loops: intervals, entropy, n-grams, NLL, exact matches, MAUVE."""

import json
import math
import re
import sys
import types
from collections import Counter

import numpy as np
import pytest
from text_models import TableModel

from ilm_jax import metrics
from ilm_jax.evaluation import text_statistics
from ilm_jax.evaluation.scoring_models import TextNLL

TEXTS = ['the dog ran home .', 'Tom', 'a cat and a bird', '', 'the dog ran home .', 'Anna saw ' * 20]
UNDEFINED = (None, None, None)


def test_a_bootstrap_interval_equals_a_loop_over_resamples():
  rng = np.random.default_rng(3)
  totals, weights = rng.normal(5, 2, 17).tolist(), rng.integers(1, 9, 17).tolist()
  for given_weights in (weights, None):
    used = given_weights or [1] * 17
    draws, ratios = np.random.default_rng(7), []
    for _ in range(300):
      picked = [int(i) for i in draws.integers(17, size=17)]
      ratios.append(sum(totals[i] for i in picked) / sum(used[i] for i in picked))
    ratios.sort()
    result = text_statistics.bootstrap(totals, given_weights, seed=7, resamples=300)
    assert result.value == pytest.approx(sum(totals) / sum(used))
    for bound, rank in ((result.low, 0.025 * 299), (result.high, 0.975 * 299)):
      below, above = ratios[math.floor(rank)], ratios[math.ceil(rank)]
      assert bound == pytest.approx(below + (rank % 1) * (above - below))
  assert text_statistics.bootstrap([2.0]) == (2.0, None, None) and text_statistics.bootstrap([]) == UNDEFINED


def test_text_statistics_equal_plain_loops_over_tokens(arm, tokenizer, expected_nll):
  result = text_statistics.describe(TEXTS, arm.nll(TEXTS), seed=4)
  rows = [tokenizer.encode(text) for text in TEXTS]
  nonempty = [row for row in rows if row]
  nll = [expected_nll(row) for row in nonempty]
  assert (result['texts'], result['empty'], result['cut']) == (6, 1, 0)
  assert result['nll'].value == pytest.approx(
    sum(x / len(row) for x, row in zip(nll, nonempty, strict=True)) / 5, rel=1e-5
  )
  assert result['perplexity'].value == pytest.approx(math.exp(sum(nll) / sum(map(len, nonempty))), rel=1e-5)
  assert result['length'].value == pytest.approx(sum(map(len, rows)) / 6)
  entropies = []
  for row in nonempty:
    shares = [row.count(token) / len(row) for token in set(row)]
    entropies.append(-sum(p * math.log(p) for p in shares))
  assert result['entropy'].value == pytest.approx(sum(entropies) / 5)
  for n in (1, 2, 3, 4):
    ngrams = Counter(str(row[i : i + n]) for row in rows for i in range(len(row)) if i + n <= len(row))
    assert result[f'distinct_{n}'].value == pytest.approx(len(ngrams) / sum(ngrams.values()))
  assert result['repeated'] == (1 / 6, *metrics.wilson_interval(1, 6))
  for name in ('nll', 'perplexity', 'entropy', 'length'):
    assert result[name].low < result[name].value < result[name].high
  table = text_statistics.table({'samples': result})
  assert re.search(rf'NLL per token, nats +{result["nll"].value:.4f} \({result["nll"].low:.4f} – ', table)
  json.dumps(text_statistics.plain(result), allow_nan=False)


def test_the_nll_of_empty_texts_is_undefined():
  result = text_statistics.describe(['', ''], TableModel().nll(['', '']))
  assert result['nll'] == result['entropy'] == result['distinct_1'] == result['perplexity'] == UNDEFINED
  assert result['length'].value == 0.0 and result['empty'] == 2
  assert re.search('NLL per token, nats +–', text_statistics.table({'samples': result}))
  assert text_statistics.values(result) == {'length': 0.0, 'repeated': 0.5}


def test_the_nll_change_is_the_relative_change_averaged_over_requests():
  scored = [TextNLL(6.0, [1] * 3, False), TextNLL(4.0, [1] * 4, False), TextNLL(9.0, [1], False)]
  references = [TextNLL(2.0, [1] * 2, False), TextNLL(8.0, [1] * 4, False), TextNLL(3.0, [1], False)]
  truncated, empty, reference = TextNLL(5.0, [1], True), TextNLL(0.0, [], False), TextNLL(1.0, [1], False)
  scored, references = [*scored, truncated, empty], [*references, reference, reference]
  result = text_statistics.change(['a', 'b', 'c', 'd', 'e'], scored, references)
  assert result['change'].value == pytest.approx((100 - 50 + 200) / 3) and result['left_out'] == 2
  two_answers = text_statistics.change(['a', 'b', 'b', 'd', 'e'], scored, references)['change']
  assert two_answers.value == pytest.approx((100 + (-50 + 200) / 2) / 2)
  assert text_statistics.change(['e'], [empty], [reference]) == {'change': UNDEFINED, 'left_out': 1}


def test_fillings_that_differ_only_in_spaces_count_as_exact_matches():
  made, true = [['a  b', 'c'], ['x', 'd']], [[' a b', 'c'], ['y', 'd']]
  result = text_statistics.matches([0, 1], made, true)
  assert result == {
    'exact_match': (0.5, *metrics.wilson_interval(1, 2)),
    'filling_match': (0.75, *metrics.wilson_interval(1.5, 2)),
  }
  assert text_statistics.matches([0, 1, 0, 1], made * 2, true * 2) == result  # answers to one request are one trial


def test_join_parts_produces_no_double_spaces():
  for parts, text in (
    (['the ', ' ran', ''], 'the ran'),
    (['', ' ran'], 'ran'),
    (['a', 'b ', ' c'], 'ab c'),
    (['a ', ''], 'a'),
  ):
    assert text_statistics.join_parts(parts) == text


def test_mauve_is_computed_by_the_mauve_package_and_a_failure_is_reported(monkeypatch):
  monkeypatch.setitem(sys.modules, 'mauve', None)
  assert text_statistics.mauve(['a'], ['b']) == (
    None, 'MAUVE was not computed: the package mauve-text is not installed'
  )  # fmt: skip
  package = types.ModuleType('mauve')
  package.compute_mauve = lambda p_text, q_text, verbose: types.SimpleNamespace(mauve=len(p_text) / len(q_text))
  monkeypatch.setitem(sys.modules, 'mauve', package)
  assert text_statistics.mauve(['a', 'b'], ['c']) == (0.5, '')
  package.compute_mauve = lambda **_: 1 / 0
  assert text_statistics.mauve(['a'], ['c']) == (None, 'MAUVE was not computed: division by zero')
