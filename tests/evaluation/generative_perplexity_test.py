"""`ilm-jax perplexity`: statistics of generated texts and infilled answers; errors for malformed files and flags."""

import json
import re
import sys
import types

import numpy as np
import pytest
from ml_collections import ConfigDict
from text_models import TableModel, make_language_model, run_command, sentences, write_corpus, write_run

from ilm_jax import families, generate, tasks
from ilm_jax.configs import text as text_config
from ilm_jax.evaluation import evaluate, generative_perplexity, infill_sets, samples, scoring_models
from ilm_jax.training import experiment, final_evaluation
from ilm_jax.types import UserError


def write_lines(path, records):
  path.write_text(''.join((line if isinstance(line, str) else json.dumps(line)) + '\n' for line in records))
  return path


def read_lines(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def score_with(monkeypatch):
  """Return a function that makes `ilm-jax perplexity` use a given scoring model, whatever --model names."""

  def patch(model):
    monkeypatch.setattr(scoring_models, 'check', lambda *_: None)
    monkeypatch.setattr(scoring_models, 'get', lambda *_: model)

  return patch


@pytest.fixture(scope='module')
def answered(tokenizer, tmp_path_factory):
  """Return a folder with infill requests, their true texts, and two answers of `ilm-jax generate` to each request."""
  folder = tmp_path_factory.mktemp('answered')
  lm = make_language_model(tokenizer, folder / 'tokenizer', 'ilm')
  requests = infill_sets.make_requests(sentences(30), kind='multi', unit='words', share=0.4, count=6, seed=0)
  prompts = write_lines(folder / 'requests.jsonl', requests)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr('ilm_jax.inference.api.load', lambda *_, **__: lm)
    flags = ['--workdir=w', f'--prompts={prompts}', f'--out={folder / "answers.jsonl"}', '--n=2']
    assert generate.main(['generate', *flags]) == 0
  return folder


def test_infilled_texts_are_compared_with_the_true_texts_and_with_the_given_parts(
  answered, arm, expected_nll, tokenizer, score_with, tmp_path, capsys
):
  score_with(arm)
  out = tmp_path / 'perplexity.json'
  flags = [f'--samples={answered / "answers.jsonl"}', f'--out={out}']
  code, shown, err = run_command(capsys, generative_perplexity, '--model=runs/arm', *flags)
  assert code == 0, err
  answers, changes, exact = read_lines(answered / 'answers.jsonl'), {'truth': {}, 'input': {}}, []

  def nll_per_token(text):
    ids = tokenizer.encode(text)[: arm.max_tokens]
    return expected_nll(ids) / len(ids)

  for answer in answers:
    given = re.sub(' +', ' ', ''.join(answer['infill'])).strip()  # joining the parts doubles the spaces at gaps
    for name, reference in (('truth', answer['truth']['text']), ('input', given)):
      change = 100 * (nll_per_token(answer['text']) / nll_per_token(reference) - 1)
      changes[name].setdefault(answer['id'], []).append(change)
    exact.append([a == b for a, b in zip(answer['fillings'], answer['truth']['fillings'], strict=True)])
  result = json.loads(out.read_text())
  statistics = result['infilling']
  assert (result['scoring_model'], statistics['answers'], statistics['requests']) == ('runs/arm', 12, 6)
  for name, label in (('truth', 'true text'), ('input', 'text without fillings')):
    expected = np.mean([np.mean(values) for values in changes[name].values()])
    change = statistics[f'change_{name}']
    assert change['value'] == pytest.approx(expected, rel=1e-3, abs=1e-3) and change['low'] < change['high']
    assert statistics[f'left_out_{name}'] == 0
    (line,) = [line for line in shown.splitlines() if line.startswith(f'NLL change against the {label}, %')]
    assert f' {change["value"]:+.2f} (' in line
  assert statistics['exact_match']['value'] == pytest.approx(np.mean([all(matches) for matches in exact]))
  assert statistics['filling_match']['value'] == pytest.approx(sum(map(sum, exact)) / sum(map(len, exact)))

  bare = [{key: value for key, value in answer.items() if key != 'truth'} for answer in answers]
  # --judge is the old name of --model.
  flags = ['--judge=runs/arm', f'--samples={write_lines(tmp_path / "bare.jsonl", bare)}', f'--out={out}']
  requests = f'--requests={answered / "requests.jsonl"}'
  assert run_command(capsys, generative_perplexity, *flags, requests)[0] == 0
  assert json.loads(out.read_text())['infilling'] == statistics
  assert run_command(capsys, generative_perplexity, *flags)[0] == 0
  assert set(json.loads(out.read_text())['infilling']) == {'answers', 'requests', 'change_input', 'left_out_input'}


def test_the_nll_change_is_zero_if_the_samples_are_the_true_texts():
  made = [
    samples.Sample(line['truth'], line['id'], line['infill'], line['fillings'], line['truth'], line['fillings'])
    for line in infill_sets.make_requests(sentences(9), kind='single', unit='words', share=0.5, count=9, seed=0)
  ]
  result = generative_perplexity.infill_statistics(TableModel(99), made)
  assert result['change_truth'] == (0, 0, 0) and result['exact_match'].value == result['filling_match'].value == 1
  assert result['change_input'].value != 0
  model = TableModel(max(len(sample.text.split()) for sample in made) - 1)
  assert generative_perplexity.infill_statistics(model, made)['left_out_truth'] > 0
  assert generative_perplexity.infill_statistics(model, [samples.Sample('a')]) is None


def test_reference_texts_are_scored_like_the_samples(tmp_path, score_with, monkeypatch, capsys):
  score_with(TableModel())
  monkeypatch.setitem(sys.modules, 'mauve', None)
  made = write_lines(tmp_path / 'samples.jsonl', [{'text': 'a bb'}, {'text': 'ccc'}])
  true = write_lines(tmp_path / 'true.jsonl', [{'text': 'a bb'}, {'text': 'a b c d e f g'}, {'text': ''}])
  flags = ['--model=m', f'--samples={made}', f'--out={tmp_path / "out.json"}']
  code, shown, _ = run_command(capsys, generative_perplexity, *flags, f'--reference={true}')
  result = json.loads((tmp_path / 'out.json').read_text())
  assert code == 0 and (result['samples']['texts'], result['reference']['texts']) == (2, 3)
  assert result['samples']['nll']['value'] == (1.5 + 3) / 2 and result['reference']['nll']['value'] == (1.5 + 1) / 2
  assert 'reference: 1 of 3 texts are longer than the 6 tokens that the scoring model can read' in shown
  assert 'reference: 1 of 3 texts have no tokens' in shown and 'MAUVE was not computed' in shown
  corpus = [f'--reference={write_corpus(tmp_path) / "valid.txt"}', '--documents=paragraph', '--split=train']
  code, _, err = run_command(capsys, generative_perplexity, *flags, *corpus)
  assert code == 0, err
  assert json.loads((tmp_path / 'out.json').read_text())['reference']['texts'] == 2


ANSWER = {'id': 0, 'text': 'a b c', 'infill': ['a ', ' c'], 'fillings': ['b'], 'spans': [[2, 3]]}


@pytest.mark.parametrize(
  'lines, requests, message',
  [
    (None, None, 'No such file or directory'),
    ([], None, 'contains no samples: expected one JSON object with "text" per line'),
    (['{"text": "a"}', '{"txt": 1}'], None, r'samples.jsonl, line 2: expected the key "text" with a string'),
    (['the dog'], None, 'line 1: expected a JSON object, got the dog'),
    (['[1]'], None, r'line 1: expected a JSON object, got \[1\]'),
    (['{"text": "\\ud800"}'], None, 'line 1: contains an unpaired surrogate'),
    (['{"text": "a", "p": [NaN]}'], None, 'line 1: contains NaN, which is not valid JSON: expected finite numbers'),
    (['{"text": "a", "p": -Infinity}'], None, 'line 1: contains -Infinity, which is not valid JSON'),
    ([ANSWER | {'spans': [[2, 9]]}], None, 'expected "fillings", a list of strings, and "spans"'),
    ([ANSWER | {'spans': [2]}], None, 'expected "fillings", a list of strings, and "spans"'),
    ([ANSWER | {'id': None}], None, 'expected the key "id" with the id of the infill request'),
    ([ANSWER, ANSWER], None, 'line 2 has the same "id" and "sample" as .*line 1: expected every answer once'),
    ([ANSWER | {'truth': 3}], None, 'expected the key "truth" with the true text'),
    ([ANSWER | {'truth': {'text': 'a d c', 'fillings': ['e']}}], None, 'do not join to the true text .a d c.'),
    ([ANSWER | {'truth': 'a d c'}, ANSWER | {'id': 1}], None, 'with id 1 has no true text, but others have'),
    ([ANSWER | {'id': 7}], [{'id': 0, 'truth': 'a d c'}], 'has no request with id 7, which a sample answers'),
    ([ANSWER], [{'id': 0}], 'requests.jsonl, line 1: expected the key "truth" with the true text'),
    ([ANSWER], [{'id': 0, 'truth': 'x d y', 'fillings': ['d']}], 'do not join to the true text .x d y.'),
    ([ANSWER], [{'truth': 'a d c'}], 'requests.jsonl, line 1: expected the key "id", which the samples refer to'),
    ([ANSWER], [{'id': 0, 'truth': 'a'}] * 2, 'line 2 has the same id 0 as .*line 1: expected every id once'),
  ],
  ids=lambda value: None if isinstance(value, str) else '',
)
def test_malformed_samples_and_requests_are_refused(lines, requests, message, tmp_path, score_with, capsys):
  score_with(TableModel())
  flags = ['--model=m', f'--samples={tmp_path / "samples.jsonl"}']
  if lines is not None:
    write_lines(tmp_path / 'samples.jsonl', lines)
  if requests:
    flags.append(f'--requests={write_lines(tmp_path / "requests.jsonl", requests)}')
  code, out, err = run_command(capsys, generative_perplexity, *flags)
  assert code == 1 and not out and re.fullmatch(f'error: .*{message}.*\n', err), err


def test_samples_may_start_with_a_byte_order_mark_and_their_paths_with_a_tilde(
  tmp_path, score_with, monkeypatch, capsys
):
  score_with(TableModel())
  monkeypatch.setenv('HOME', str(tmp_path))
  (tmp_path / 'samples.jsonl').write_bytes(b'\xef\xbb\xbf{"text": "a bb"}\n')
  code, out, err = run_command(
    capsys, generative_perplexity, '--model=m', '--samples=~/samples.jsonl', '--out=~/x.json'
  )
  assert code == 0 and out.startswith('~/samples.jsonl, scored by table:'), err
  assert json.loads((tmp_path / 'x.json').read_text())['samples']['nll']['value'] == 1.5


def test_a_full_disk_gives_an_error_but_the_statistics_are_still_printed(tmp_path, score_with, capsys):
  score_with(TableModel())
  made = f'--samples={write_lines(tmp_path / "samples.jsonl", [{"text": "a bb"}])}'
  code, out, err = run_command(capsys, generative_perplexity, '--model=m', made, '--out=/dev/full')
  assert (code, err) == (1, 'error: --out=/dev/full cannot be written: No space left on device\n')
  assert re.search(r'NLL per token, nats +1\.5000', out)


def test_a_scoring_model_with_damaged_weights_gives_an_error_and_no_file(tmp_path, score_with, capsys):
  class Damaged(TableModel):
    def token_nll(self, ids_BxL, length_B):
      return np.full(ids_BxL.shape, np.nan)

  score_with(Damaged())
  made = f'--samples={write_lines(tmp_path / "samples.jsonl", [{"text": "a bb"}])}'
  code, out, err = run_command(capsys, generative_perplexity, '--model=m', made, f'--out={tmp_path / "x.json"}')
  assert code == 1 and not out and not (tmp_path / 'x.json').exists()
  assert err.startswith('error: the scoring model table gives the negative log-likelihood nan to the text')


def test_wrong_flags_give_a_one_line_error(tmp_path, capsys):
  made = f'--samples={write_lines(tmp_path / "samples.jsonl", [{"text": "a"}])}'
  for arguments, message in (
    ([made], '--model is missing: expected the workdir of an ARM run, or hf:NAME'),
    (['--model=runs/arm'], '--samples is missing'),
    ([made, f'--model={tmp_path / "none"}'], 'expected the workdir of a run'),
    ([made, '--model=gss://x/y'], '(?<=error: )--model=gss://x/y: unknown scheme gss://'),
    ([made, '--modle=x'], 'flags: Unknown command line flag'),
    ([made, '--model=x', 'y'], "flags: .* 'y': every argument"),
  ):
    code, out, err = run_command(capsys, generative_perplexity, *arguments)
    assert code == 1 and not out and re.fullmatch(f'error: .*{message}.*\n', err), err
  assert 'ilm-jax perplexity' in run_command(capsys, generative_perplexity, '--help')[1]


# --- eval.perplexity_model in training runs ---------------------------------------------------------------------------


def test_a_training_run_scores_its_samples_and_an_equal_number_of_test_texts(monkeypatch):
  monkeypatch.setattr(scoring_models, 'get', lambda name: TableModel())
  cfg = ConfigDict({'seed': 1, 'eval': {'perplexity_model': 'runs/arm'}})
  source = types.SimpleNamespace(text=['a bb', 'ccc', 'not scored'].__getitem__)
  result = final_evaluation.score_samples(cfg, ('dd', ''), source)
  assert result['samples']['nll'].value == 2 and result['test']['nll'].value == (1.5 + 3) / 2
  assert result['notes'] == ['samples: 1 of 2 texts have no tokens, and so no NLL and no entropy']
  assert final_evaluation.score_samples(ConfigDict({'eval': {}}), (), source) is None


def test_eval_json_contains_the_statistics_computed_with_the_scoring_model(monkeypatch, tmp_path, capsys):
  monkeypatch.setattr(scoring_models, 'get', lambda name: TableModel())
  monkeypatch.setattr(final_evaluation.settings, 'describe', lambda sample_cfg: 'greedy')
  cfg = text_config.get_config('small')
  cfg.eval.update(perplexity_model='runs/arm', score='none')
  exp = types.SimpleNamespace(cfg=cfg, task=types.SimpleNamespace(chance=None), sample_cfg=None)
  evaluator = types.SimpleNamespace(
    sample_answers=lambda *_, **__: evaluate.Scores({'length': (2.0, 1.0)}, ['shown'], samples=('a bb',)),
    validation_loss=lambda *_: {'loss': (3.0, 1.0)},
    source=lambda split: types.SimpleNamespace(text=['ccc'].__getitem__),
  )
  saved = types.SimpleNamespace(restore_weights=lambda *_: None, find=lambda _: 5, metrics=lambda _: {})
  weights = types.SimpleNamespace(params=np.zeros(3), size=3)
  signals = types.SimpleNamespace(received=lambda: False)
  assert final_evaluation.report(exp, tmp_path, saved, 5, weights, evaluator, signals) == 0
  result = json.loads((tmp_path / 'eval.json').read_text())
  assert result['scoring_model']['samples']['nll']['value'] == result['metrics']['scoring_model_nll'] == 1.5
  assert result['scoring_model']['test']['nll']['value'] == 3 and 'scored by table:' in capsys.readouterr().out


def test_a_training_run_with_an_unusable_scoring_model_is_refused_at_its_start(tmp_path):
  cfg = text_config.get_config('small')
  parts = families.get('ilm'), tasks.get('text')
  experiment.check_choices(cfg, *parts)
  for name, message in ((tmp_path, 'expected the workdir of a run'), (write_run(tmp_path / 'it', 'it'), 'family=it')):
    cfg.eval.perplexity_model = str(name)
    with pytest.raises(UserError, match=f'^the scoring model .*{message}'):
      experiment.check_choices(cfg, *parts)
