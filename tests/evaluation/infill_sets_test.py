"""Infill requests made from a corpus: gaps of whole words or sentences, reconstruction, lengths, wrong flags."""

import json
import re
import types
from collections import Counter

import numpy as np
import pytest
from text_models import run_command, sentences, write_corpus

from ilm_jax.evaluation import infill_sets
from ilm_jax.inference import infilling

STORY = 'Tom had a dog. It was big!\n"Run," he said.  The dog ran "home."\n\nAnna saw it? Yes.'


def test_sentence_spans_exclude_surrounding_whitespace():
  found = [STORY[start:end] for start, end in infill_sets.sentence_spans(STORY)]
  assert found == [
    'Tom had a dog.', 'It was big!', '"Run," he said.', 'The dog ran "home."', 'Anna saw it?', 'Yes.',
  ]  # fmt: skip
  assert infill_sets.sentence_spans(' ... \n') == []


@pytest.mark.parametrize('kind, unit', [('single', 'sentence'), ('single', 'words'), ('multi', 'words')])
def test_the_parts_and_fillings_of_a_request_join_to_the_original_text(kind, unit):
  rng, counts = np.random.default_rng(0), Counter()
  pool = ['the', 'dog', 'ran.', '"Tom', '犬。', 'é!', '\n', '  ', '\t', '...', 'a', 'b?']
  for i in range(600):
    text = ' '.join(rng.choice(pool, rng.integers(0, 40))).strip()
    gapped = infill_sets.make_gaps(text, np.random.default_rng(i), kind=kind, unit=unit, share=0.3)
    if gapped is None:
      continue
    parts, fillings = gapped
    assert gapped.text == text and all(fillings) and ''.join(parts).strip()
    assert all(filling == filling.strip() for filling in fillings) and all(part.strip() for part in parts[1:-1])
    infilling.parse_request(parts)  # `ilm-jax generate` accepts the request
    counts[len(fillings)] += 1
    if unit == 'words':
      assert sum(len(filling.split()) for filling in fillings) == max(len(fillings), round(0.3 * len(text.split())))
      assert all(not part or part[-1].isspace() for part in parts[:-1])  # gaps begin at a word boundary
      assert all(not part or part[0].isspace() for part in parts[1:])  # gaps end at a word boundary
  assert set(counts) == ({1} if kind == 'single' else {2, 3, 4, 5}) and sum(counts.values()) > 300


def test_all_possible_gap_positions_are_equally_likely():
  counts = Counter()
  for i in range(3_000):
    gapped = infill_sets.remove_word_runs('a b c d e', np.random.default_rng(i), 0.4, 2)  # 2 gaps of 1 word
    counts[tuple(gapped.fillings)] += 1
  assert len(counts) == 6 and min(counts.values()) > 400
  assert infill_sets.remove_word_runs('a b c', np.random.default_rng(0), 0.9, 2) is None
  assert infill_sets.remove_word_runs('a', np.random.default_rng(0), 0.2, 1) is None


def test_infill_requests_depend_only_on_the_seed_and_the_corpus(tmp_path, capsys):
  corpus = f'--path={write_corpus(tmp_path)}', '--documents=paragraph'
  same, again, other = (
    run_command(capsys, infill_sets, *corpus, f'--seed={seed}', '--count=10')[1].splitlines() for seed in (0, 0, 1)
  )
  assert same == again != other and len(same) == 10
  for number, line in enumerate(same):
    record = json.loads(line)
    assert list(record) == ['id', 'infill', 'truth', 'fillings'] and record['id'] == number
    assert infill_sets.GappedText(record['infill'], record['fillings']).text == record['truth']
  out_file = tmp_path / 'requests.jsonl'
  code, out, err = run_command(capsys, infill_sets, *corpus, '--count=99', '--kind=multi', f'--out={out_file}')
  assert code == 0 and not out and f'made {len(out_file.read_text().splitlines())} requests of --count=99' in err


def test_the_lengths_in_a_request_are_the_numbers_of_tokens_to_insert_into_its_gaps(tokenizer):
  run_tokenizer = infill_sets.RunTokenizer.__new__(infill_sets.RunTokenizer)
  run_tokenizer.tokenizer, run_tokenizer.max_length = tokenizer, 40
  settings = {'kind': 'multi', 'unit': 'words', 'share': 0.4, 'count': 60, 'seed': 0, 'run_tokenizer': run_tokenizer}
  requests = infill_sets.make_requests(sentences(60), **settings, lengths=True)
  assert len(requests) > 20
  for request in requests:
    gaps = infilling.parse_request(request['infill'], least=request['least'], most=request['most'])
    masked = infilling.encode(gaps, tokenizer, limit=96, masks=True)
    assert request['least'] == request['most'] and len(masked['tokens']) < 40
  run_tokenizer.max_length = 8
  short = infill_sets.make_requests(sentences(60), **settings)
  assert 0 < len(short) < len(requests) and all(len(tokenizer.encode(request['truth'])) < 8 for request in short)
  run_tokenizer.tokenizer, run_tokenizer.max_length = types.SimpleNamespace(encode=list), 200
  for request in infill_sets.make_requests(sentences(60), **settings, lengths=True):
    spaces = [len(part) - len(part.rstrip(' ')) for part in request['infill'][:-1]]  # counted as part of the filling
    assert request['least'] == [n + len(text) for n, text in zip(spaces, request['fillings'], strict=True)]


def test_wrong_flags_give_a_one_line_error(tmp_path, capsys):
  folder = write_corpus(tmp_path)
  for arguments, message in (
    ([], '--path is missing'),
    ([f'--path={tmp_path / "none"}'], f'--path={tmp_path / "none"} does not exist'),
    ([f'--path={folder}', '--split=dev'], '--split=dev: expected one of train, validation, test'),
    ([f'--path={folder}', '--documents=page'], '--documents=page: expected one of'),
    ([f'--path={folder}', '--share=1'], '--share=1.0: expected a number between 0 and 1'),
    ([f'--path={folder}', '--lengths'], '--lengths needs --tokenizer'),
    ([f'--path={folder}', '--kind=multi', '--unit=words'], '--unit applies to --kind=single only'),
    ([f'--path={folder}', '--kind=many'], 'flags: flag --kind=many'),
    ([f'--path={folder}', '--split=train'], 'no text in its train split that is long enough for these gaps'),
    ([f'--path={folder}', f'--tokenizer={tmp_path}'], f'--tokenizer={tmp_path}: expected the workdir of a run'),
    ([f'--path={folder}', '--tokenizer=gss://b/c'], '--tokenizer=gss://b/c: unknown scheme gss://'),
    ([f'--path={folder}', f'--out={tmp_path}', '--documents=paragraph', '--count=5'], 'is a folder: expected a file'),
  ):
    code, out, err = run_command(capsys, infill_sets, *arguments)
    assert code == 1 and not out and re.fullmatch(f'error: .*{re.escape(message)}.*\n', err), (arguments, err)
    assert '=--' not in err  # a flag is named once
