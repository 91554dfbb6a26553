"""Tests of the commands: user errors give one line and change no file; requests give the documented results."""

import io
import json
import os
import re
import shutil
import sys

import jax
import numpy as np
import pytest
import small

import ilm_jax
from ilm_jax import generate as generate_command
from ilm_jax.inference import api
from ilm_jax.models import transformer

PROMPTS = ['1,2|2,3|3,4|1,5|5,6|6,7/1,4', '5,6|1,5|3,4|6,7|2,3|1,2/1,7', '0,9|9,8|8,7|0,1|1,2|2,3/0,3']
CHANGES = {
  'steps': 10,
  'sampling.gap.temperature': 1.0,
  'sampling.token.temperature': 1.0,
  'sampling.max_length': 20,  # long enough for the prompts and four more tokens
}


@pytest.fixture(scope='module')
def command(tmp_path_factory):
  """Return a function that runs a module in a new process: module, arguments -> (exit code, stdout, stderr)."""
  commands = small.Commands(tmp_path_factory.mktemp('commands'))
  yield commands
  commands.close()


@pytest.fixture(scope='module')
def trained(command, tmp_path_factory):
  """Return the workdir of a run of 10 steps whose completions are sampled at temperature 1."""
  workdir = tmp_path_factory.mktemp('trained') / 'run'
  code, out, err = command('ilm_jax.main', small.flags(workdir, CHANGES))
  assert code == 0, err
  assert 'test exact match at step 10: ' in out
  return workdir


@pytest.fixture
def copy(trained, tmp_path):
  return shutil.copytree(trained, tmp_path / 'run')


@pytest.fixture(scope='module')
def load_once():
  """Return `api.load` with a cache, so that tests share loaded models and their compiled programs."""
  models, load = {}, api.load

  def cached(workdir, checkpoint='best', **settings):
    key = json.dumps([str(workdir), checkpoint, settings], sort_keys=True)
    if key not in models:
      models[key] = load(workdir, checkpoint, **settings)
    return models[key]

  return cached


@pytest.fixture
def generate(trained, load_once, monkeypatch, capsys, tmp_path):
  """Return a function that runs `generate` on the trained run: arguments -> (exit code, stdout, stderr).

  The command runs inside the test process, in an empty working directory, with a cached model.
  """
  monkeypatch.setattr(api, 'load', load_once)
  monkeypatch.setattr(generate_command, 'quiet', lambda: None)  # it would change process-wide settings
  monkeypatch.chdir(tmp_path)

  def run(*arguments, stdin=''):
    content = stdin if isinstance(stdin, bytes) else stdin.encode()
    monkeypatch.setattr(sys, 'stdin', io.TextIOWrapper(io.BytesIO(content)))
    capsys.readouterr()
    code = generate_command.main(['generate', f'--workdir={trained}', *map(str, arguments)])
    return code, *capsys.readouterr()

  return run


def snapshot(folder) -> dict:
  """Return a dictionary from the path of each file in a folder to its content."""
  return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob('*')}


def assert_refused(result, message: str):
  """Assert exit code 1, one line on standard error that matches the message, and nothing on standard output."""
  code, out, err = result
  assert (code, out) == (1, ''), err
  assert re.fullmatch('error: .+\n', err), err
  assert re.search(message, err), err


# --- wrong command line arguments of main -----------------------------------------------------------------------------

TINY = '--config=configs/star.py:tiny'


@pytest.mark.parametrize(
  'arguments, message',
  [
    ([], '--config is missing'),
    (['--config=configs/moon.py'], r'configs/moon\.py'),
    (['--config', 'configs/moon.py:x'], r'configs/moon\.py'),
    ([f'--config={small.ROOT / "README.md"}'], r'flags: .*(invalid|unterminated|never closed)'),
    ([f'--config={small.ROOT / "ilm_jax" / "types.py"}'], r"flags: .*has no attribute 'get_config'"),
    (['--config=configs/star.py:huge'], 'huge: expected one of tiny, mini, easy, medium, hard'),
    ([TINY, '--config.modle.d_model=3'], r'flags: .*modle.* Did you mean "model"'),
    ([TINY, '--config.steps=many'], r"flags: flag --config.steps=many: .*'many'"),
    ([TINY, '--wrokdir=runs/a'], "flags: Unknown command line flag 'wrokdir'. Did you mean: workdir"),
    ([TINY, '--config.seed=4294967296'], 'error: seed=4294967296: expected an integer from 0 to 4294967295'),
    ([TINY, '--config.seed=-1'], 'error: seed=-1: expected an integer from 0'),
    ([TINY, f'--config.task.seed={2**63}'], f'error: task.seed={2**63}: expected an integer from 0'),
    (
      ['--config=configs/text.py:small', '--config.task.tokenizer.seed=-3'],
      'error: task.tokenizer.seed=-3: expected an integer from 0',
    ),
    ([TINY, '--config.model.d_ff=None'], 'model.d_ff is not set: set it, or choose a model.preset'),
    ([TINY, '--config.steps=None'], 'flags: --config.steps=None: this setting cannot be None$'),
    ([TINY, '--workdir=gss://runs/a'], '--workdir=gss://runs/a: unknown scheme gss://'),
    ([TINY, '--workdir=~nobody9/runs/a'], '--workdir=~nobody9/runs/a: the home folder of ~nobody9 is unknown'),
    ([TINY, '--mode=dance'], r'flags: flag --mode=dance: value should be one of <train\|eval>'),
    ([TINY, 'runs/a'], "flags: .*'runs/a': every argument"),
    ([TINY, '--config.family=gpt'], "config.family='gpt': expected one of"),
    ([TINY, '--config.task.name=moon'], "config.task.name='moon': expected one of"),
    (['--config=configs/star.py:easy', '--config.model.preset=huge'], "model.preset='huge': expected one of"),
    ([TINY, '--config.model.compute=int4'], "model.compute='int4': expected one of float32, bfloat16, mixed"),
    ([TINY, '--config.mesh.fsdp=3'], 'mesh.fsdp=3.* 1 device'),
    ([TINY, '--config.data.groups=7'], r'data.batch_size=\d+ .*data.groups=7'),
    ([TINY, '--config.optimizer.accumulation_steps=7'], r'data.rows=\d+ .*optimizer.accumulation_steps=7'),
    ([TINY, '--config.optimizer.schedule=up'], "optimizer.schedule='up': expected one of constant, cosine, linear"),
    ([TINY, '--config.sampling.stop_threshold=7'], 'sampling.stop_threshold=7.0: expected a probability'),
    ([TINY, '--config.init_from=runs/none'], 'no checkpoint in .*runs/none/checkpoints'),
    ([TINY, '--mode=eval'], 'no checkpoint in .*/run/checkpoints'),
  ],
  ids=lambda value: ' '.join(value).replace(TINY, '').strip() or 'nothing' if isinstance(value, list) else '',
)
def test_main_refuses_a_wrong_argument_and_writes_nothing(arguments, message, command, tmp_path):
  os.symlink(small.ROOT / 'configs', tmp_path / 'configs')
  workdir = [] if any(word.endswith('runs/a') for word in arguments) else [f'--workdir={tmp_path / "run"}']
  assert_refused(command('ilm_jax.main', [*arguments, *workdir], cwd=tmp_path), message)
  assert {path.name for path in tmp_path.rglob('*')} == {'configs'}


def test_help_describes_the_command_and_its_flags(command):
  for module in ('ilm_jax.main', 'ilm_jax.generate'):
    code, out, err = command(module, ['--help'])
    assert (code, err) == (0, '') and '--workdir: ' in out and module in out


# --- a workdir that does not fit the command --------------------------------------------------------------------------


@pytest.mark.parametrize('mode', ['train', 'eval'])
def test_a_workdir_with_a_different_run_is_refused_and_left_unchanged(mode, command, copy):
  before = snapshot(copy)
  for changes, message in (
    ({'model.d_model': 32}, 'model.d_model=16, .* model.d_model=32.*--workdir'),
    ({'task.num_nodes': 12}, 'task.num_nodes=10, .* task.num_nodes=12'),
    ({'seed': 7}, 'seed=0, .* seed=7'),
    ({'optimizer.ema_decay': 0.0}, 'optimizer.ema_decay=0.99, .*optimizer.ema_decay=0.0: '),
  ):
    arguments = [*small.flags(copy, {**CHANGES, **changes}), f'--mode={mode}']
    assert_refused(command('ilm_jax.main', arguments), message)
  assert snapshot(copy) == before


def test_a_run_may_continue_with_more_steps_and_fewer_test_examples(command, copy):
  changes = {**CHANGES, 'steps': 12, 'task.num_test': 4}
  code, out, err = command('ilm_jax.main', small.flags(copy, changes))
  assert code == 0 and 'of 4;' in out
  assert 'steps from 10 to 12' in err and 'resuming at step 10' in err


def edit_config(workdir, change):
  """Edit the config in the run.json of a workdir with the function `change`."""
  path = workdir / 'run.json'
  run = json.loads(path.read_text())
  change(run['config'])
  path.write_text(json.dumps(run))


def test_a_checkpoint_whose_array_shapes_differ_from_the_model_is_refused_and_left_unchanged(command, copy):
  edit_config(copy, lambda config: config['model'].update(d_model=32))
  before = snapshot(copy)
  message = r'checkpoint of step 10 .*shape.* \w+ .* \(\d+,.*, \(\d+,.* model'
  changes = {**CHANGES, 'model.d_model': 32}
  assert_refused(command('ilm_jax.generate', [f'--workdir={copy}', f'--prompt={PROMPTS[0]}']), message)
  results = [command('ilm_jax.main', [*small.flags(copy, changes), f'--mode={mode}']) for mode in ('train', 'eval')]
  for code, out, err in results:
    assert (code, out) == (1, '') and 'Traceback' not in err
    assert len([line for line in err.splitlines() if line.startswith('error: ') and re.search(message, line)]) == 1, err
  assert snapshot(copy) == before


def test_init_from_a_run_whose_array_shapes_differ_from_the_model_is_refused(command, trained, tmp_path):
  changes = {**CHANGES, 'model.d_model': 32, 'init_from': str(trained)}
  assert_refused(command('ilm_jax.main', small.flags(tmp_path / 'new', changes)), rf'init_from={trained}: .*shape')
  assert not (tmp_path / 'new').exists()


def test_an_evaluation_reports_the_likelihood_of_the_test_split(command, copy, load_once):
  arguments = [*small.flags(copy, {**CHANGES, 'eval.score': 'exact'}), '--mode=eval']
  code, out, err = command('ilm_jax.main', arguments)
  assert code == 0, err
  result = json.loads((copy / 'eval.json').read_text())
  assert result['likelihood'] == 'exact' and result['metrics']['nll_variance'] == 0
  nll, nll_per_token = re.search(r'exact: ([\d.]+) nats .*0\.0000\), ([\d.]+) ', out).groups()
  assert float(nll) == pytest.approx(result['metrics']['nll'], abs=1e-4)
  assert float(nll_per_token) == pytest.approx(result['metrics']['nll_per_token'], abs=1e-4)
  lm = load_once(copy, 'latest')
  source = lm.task.source(lm.cfg.task, 'test')
  examples = [source[i] for i in range(len(source))]
  forward, lengths = transformer.Forward(lm.model_cfg, lm.params), np.full(len(examples), 22)
  tokens, fixed = (np.stack([example[name] for example in examples]) for name in ('tokens', 'fixed'))
  score = jax.jit(lambda *args: lm.family.score(forward, None, *args, lm.sample_cfg, kind='exact', longest=6).nll_B)
  assert result['metrics']['nll'] == pytest.approx(float(score(tokens, fixed, lengths).mean()), rel=1e-4)


def test_checkpoints_without_a_valid_run_json_are_refused_and_left_unchanged(command, copy):
  for text in (None, 'not JSON'):
    (copy / 'run.json').unlink() if text is None else (copy / 'run.json').write_text(text)
    before = snapshot(copy)
    code, _, err = command('ilm_jax.main', small.flags(copy, CHANGES))
    assert code == 1 and re.match(rf'error: {copy} .*checkpoints .*no valid run.json', err.splitlines()[-1])
    assert snapshot(copy) == before


@pytest.mark.parametrize('where', ['a file', '/proc'])
def test_a_workdir_that_cannot_be_written_is_refused(where, command, tmp_path):
  (tmp_path / 'file').write_text('mine')
  workdir = {'a file': tmp_path / 'file' / 'run', '/proc': '/proc/ilm_jax'}[where]
  assert_refused(command('ilm_jax.main', small.flags(workdir)), f'the workdir {workdir} cannot be written')
  assert (tmp_path / 'file').read_text() == 'mine'


# --- wrong arguments and requests of generate -------------------------------------------------------------------------

LONG = '|'.join(f'{n},{n + 1}' for n in range(9)) + '/0,1'
EXPECTED_JSON = r'line 1: expected JSON with either "prompt" \(a text\) or "infill".* got '


@pytest.mark.parametrize(
  'arguments, stdin, message',
  [
    (['--workdir='], '', '--workdir is missing: expected the folder of a run'),
    (['--workdir=runs/none', '--prompt=x'], '', 'runs/none: expected the workdir of a run, .* run.json'),
    (['--prompt=1,2|2,11/1,3'], '', r"prompt 1: unknown token '11': expected one of 0 ... 9 \(10 words\)"),
    (['--prompt=1,2/1,2', '--prompt=1,2|2/1,3'], '', r"prompt 2: .*'1,2\|2/1,3': expected"),
    ([f'--prompt={LONG}'], '', r'prompt 1: 22 tokens leave no room .*sampling.max_length=20: shorten the prompt'),
    (['--prompt=1,2/1,2', '--infill=a ___'], '', '--prompt and --infill: expected one of them, got both'),
    (['--prompt=1,2/1,2', '--most=3'], '', '--least and --most apply only to gaps: use them with --infill'),
    (['--prompts=none.txt'], '', '--prompts=none.txt: No such file'),
    ([], '\n \n\u3000\n', 'standard input contains no prompt: expected one per line'),
    ([], b'\n\n\xff\xfe', 'standard input, line 3 .*UTF-8: byte 2 is 0xff'),
    ([], '{"prompt": "1,2', EXPECTED_JSON),
    ([], '{"text": "1,2/1,2"}', EXPECTED_JSON),
    ([], '{"prompt": "1,2/1,2", "infill": "1___"}', EXPECTED_JSON),
    ([], '{"prompt": 12}', EXPECTED_JSON),
    ([], '{"infill": ' + '[' * 100_000, EXPECTED_JSON),
    ([], '{"prompt": "1,2/1,2", "id": 1.5}', r'line 1: .*"id" \(an integer, 0 or greater\), got'),
    ([], '{"prompt": "1,2/1,2", "id": -1}', EXPECTED_JSON),
    ([], '{"prompt": "1,2/1,2", "id": 4294967296}', EXPECTED_JSON),
    ([], '{"prompt": "1,2/1,2", "most": 3}', 'line 1: "least" and "most" apply only to gaps'),
    ([], '{"infill": "1___", "min": 3}', 'line 1: unknown key "min": expected one of id, prompt, infill, least'),
    (['--infill=1,2/1,2'], '', "text 1: no gap: expected '___' in the text"),
    (['--infill=a ___', '--least=3', '--most=2'], '', 'gap 1 has least=3, most=2: expected 0 <= least <= most'),
    (['--prompts=requests', '--out=./requests'], '', '--prompts and --out are the same file'),
    (['--prompt=1,2/1,2', '--trace=none/page.html'], '', '--trace=none/page.html: the folder .*none does not exist'),
    (['--prompt=1,2/1,2', '--out=none/results.jsonl'], '', '--out=none/results.jsonl: No such file'),
    (['--prompt=1,2/1,2', '--checkpoint=7'], '', 'no checkpoint of step 7 in .* 5, 10'),
    (['--prompt=1,2/1,2', '--checkpoint=first'], '', "checkpoint 'first': expected 'best', 'latest' or a step"),
    (['--prompt=1,2/1,2', '--temperature=0', '--top_p=0.5'], '', '--top_p=0.5 has no effect at temperature 0: set --t'),
    (['--prompt=1,2/1,2', '--stop_threshold=2'], '', r'flags: flag --stop_threshold=2: .*not .*\[0.0, 1.0\]'),
    (['--prompt=1,2/1,2', '--seed=4294967296'], '', r'flags: flag --seed=4294967296: .*\[0, 4294967295\]'),
    (['--prompt=1,2/1,2', '--seed=-1'], '', r'flags: flag --seed=-1: .*\[0, 4294967295\]'),
    *[
      (['--prompt=1,2/1,2', f'--{name}=gss://b/x'], '', f'--{name}=gss://b/x: unknown scheme gss://')
      for name in ('workdir', 'out', 'trace')
    ],
    (['--prompts=gss://b/x'], '', '--prompts=gss://b/x: unknown scheme gss://'),
    (['--prompt=1,2/1,2', '--out=/dev/full'], '', '--out=/dev/full: No space left on device'),
    (['--prompt=1,2/1,2', '--temprature=0'], '', "flags: Unknown command line flag 'temprature'"),
    (['1,2/1,2'], '', "flags: .*'1,2/1,2'"),
  ],
  ids=lambda value: (' '.join(value)[:40].strip() or 'stdin') if isinstance(value, list) else '',
)
def test_generate_refuses_a_wrong_argument_or_request(arguments, stdin, message, generate, tmp_path):
  out = [] if any(word.startswith('--out') for word in arguments) else ['--out=results.jsonl']
  assert_refused(generate(*out, *arguments, stdin=stdin), message)
  assert not list(tmp_path.iterdir())


def test_generate_reports_invalid_input_lines_and_answers_the_valid_ones(generate, three):
  lines = [PROMPTS[0], '{"prompt": "1,2', PROMPTS[2], '1,2|2,11/1,3', '{"infill": ["1"]}']
  lines.append(json.dumps({'prompt': PROMPTS[1], 'id': 2}))
  code, out, err = generate(stdin='\n'.join(lines))
  served = results_of((0, out, ''))
  assert code == 1 and [result['id'] for result in served] == [0, 2]
  for result in served:
    assert_same_result(result, three[result['id']])
  errors = err.splitlines()
  assert [re.search(r'line (\d)', line)[1] for line in errors] == ['2', '6', '4', '5']
  assert all(line.startswith('error: standard input, line') for line in errors)
  assert 'id 2 is already used on line 3' in errors[1] and "unknown token '11'" in errors[2]


def test_lines_of_a_jsonl_file_that_are_not_json_are_reported(generate, three, tmp_path):
  lines = [b'[1, 2', b'"prompt": "x"}', b'1,2/1,2', b'{"prompt": "\xe9"}', json.dumps({'prompt': PROMPTS[0]}).encode()]
  (tmp_path / 'prompts.jsonl').write_bytes(b'\xef\xbb\xbf' + b'\n'.join(lines))
  code, out, err = generate('--prompts=prompts.jsonl')
  (served,) = results_of((0, out, ''))
  assert code == 1 and served['id'] == 4 and served['prompt'] == PROMPTS[0]
  assert [re.search(r'jsonl, line (\d)', line)[1] for line in err.splitlines()] == ['1', '2', '3', '4']
  offset = len(b'\xef\xbb\xbf') + sum(len(line) + 1 for line in lines[:3]) + len(b'{"prompt": "')
  assert re.search(f'line 4 .*UTF-8: byte {offset} is 0xe9', err)


def test_a_workdir_with_missing_or_damaged_files_is_refused(command, copy):
  arguments = [f'--workdir={copy}', f'--prompt={PROMPTS[0]}']
  for path in copy.glob('checkpoints/10/ema_params/ocdbt.process_0/d/*'):
    path.unlink()
  assert_refused(command('ilm_jax.generate', arguments), r'checkpoint of step 10 in .* cannot be read \(.*\): .*5, 10')
  shutil.rmtree(copy / 'checkpoints')
  for _ in range(2):
    assert_refused(command('ilm_jax.generate', arguments), 'no checkpoint in .*/checkpoints')
    (copy / 'checkpoints').mkdir(exist_ok=True)
  (copy / 'run.json').write_text('{}')
  assert_refused(command('ilm_jax.generate', arguments), 'run.json is not ')


# --- results of generate ----------------------------------------------------------------------------------------------

FIELDS = ['id', 'prompt', 'text', 'tokens', 'order', 'probabilities', 'stop_probabilities', 'stopped']


def results_of(result) -> list[dict]:
  """Return the records that a successful command printed, in the order of their ids."""
  code, out, err = result
  assert (code, err) == (0, ''), err
  return sorted(map(json.loads, out.splitlines()), key=lambda record: record['id'])


def discrete_fields(result) -> tuple:
  """Return the fields of a result that rounding errors cannot change: all except floating-point numbers."""
  return result['text'], tuple(result['tokens']), tuple(result['order']), result['stopped']


def assert_same_result(a, b):
  assert discrete_fields(a) == discrete_fields(b)
  for name in ('probabilities', 'stop_probabilities'):
    np.testing.assert_allclose(a[name], b[name], rtol=0, atol=1e-5)


@pytest.fixture(scope='module')
def three(command, trained):
  """Return the results of `generate` in a new process, with the three prompts as --prompt flags."""
  return results_of(command('ilm_jax.generate', [f'--workdir={trained}', *(f'--prompt={text}' for text in PROMPTS)]))


def test_a_result_contains_the_completion_and_how_it_was_decoded(three):
  assert [result['id'] for result in three] == [0, 1, 2]
  assert [result['prompt'] for result in three] == PROMPTS
  for result in three:
    assert list(result) == FIELDS
    given = ['[CLS]', *re.findall(r'\d+', result['prompt']), '[BOS]']
    completion = result['tokens'][len(given) :]
    assert result['tokens'][: len(given)] == given and len(completion) == 4  # up to sampling.max_length=20
    assert result['order'][: len(given)] == [-1] * len(given)
    assert sorted(result['order'][len(given) :]) == list(range(4))
    assert all(0 < p <= 1 for p in result['probabilities']) and len(result['probabilities']) == 4
    assert len(result['stop_probabilities']) == 5  # four insertions take five forward passes
    assert result['text'].startswith(result['prompt'] + '=')
    is_path = completion[1] == completion[2]
    expected = ','.join([*completion[:2], completion[3]]) if is_path else '{},{}|{},{}'.format(*completion)
    assert result['text'].split('=')[1] == expected


def test_flags_files_and_standard_input_give_the_same_results(generate, three, tmp_path):
  text, lines = '\n'.join(PROMPTS), '\n'.join(json.dumps({'prompt': prompt}) for prompt in PROMPTS)
  (tmp_path / 'prompts.txt').write_text(text + '\n')
  assert results_of(generate('--out=results', stdin=text)) == []
  for found in (
    results_of(generate('--prompts=prompts.txt')),
    results_of(generate(stdin=f'\ufeff{lines}')),  # \ufeff is a byte order mark
    results_of((0, (tmp_path / 'results').read_text(), '')),
  ):
    for result, expected in zip(found, three, strict=True):
      assert_same_result(result, expected)


def test_spaces_around_a_prompt_line_are_preserved(generate, tmp_path):
  prompts = [f'  {PROMPTS[0]}', f'{PROMPTS[1]} ', f'\t{PROMPTS[2]}']
  (tmp_path / 'prompts.txt').write_bytes(b'\xef\xbb\xbf' + '\r\n'.join(prompts).encode())
  results = results_of(generate('--prompts=prompts.txt'))
  assert [result['prompt'] for result in results] == prompts
  assert results_of(generate(stdin=f'  {json.dumps({"prompt": prompts[0]})} '))[0]['prompt'] == prompts[0]


def test_a_tilde_in_a_flag_means_the_home_folder(generate, trained, monkeypatch, tmp_path):
  monkeypatch.setenv('HOME', str(tmp_path))
  (tmp_path / 'runs').symlink_to(trained.parent)
  (tmp_path / 'in').write_text(PROMPTS[0])
  flags = [f'--workdir=~/runs/{trained.name}', '--prompts=~/in', '--out=~/out', '--trace=~/trace.html']
  assert results_of(generate(*flags)) == []
  assert {path.name for path in tmp_path.iterdir()} == {'in', 'runs', 'out', 'trace.html'}


def test_generate_fails_if_it_cannot_write_its_results_or_read_its_prompts(generate, monkeypatch, capsys):
  with monkeypatch.context() as patch:
    patch.setattr(sys, 'stdout', os.fdopen(os.open('/dev/full', os.O_WRONLY), 'w'))
    code, _, err = generate(f'--prompt={PROMPTS[0]}')
  assert code == 1 and re.fullmatch('error: standard output cannot be written.*No space left on device\n', err)
  code, out, err = generate(f'--prompt={PROMPTS[0]}', '--trace=/dev/full')
  assert (code, out.count('\n'), err) == (1, 1, 'error: --trace=/dev/full: No space left on device\n')
  monkeypatch.setattr(sys, 'stdin', None)
  assert generate_command.main(['generate', '--workdir=runs/x']) == 1
  assert capsys.readouterr().err == 'error: standard input contains no prompt: expected one per line\n'


def test_sampling_flags_of_generate_override_the_settings_of_the_run(generate, trained, load_once, monkeypatch):
  default, loaded = load_once(trained), []
  monkeypatch.setattr(api, 'load', lambda *args, **settings: loaded.append(settings) or load_once(*args, **settings))
  flags = ['--temperature=5', '--top_p=0.5', '--gap_threshold=0.5', '--stop_threshold=0', '--stop_temperature=3']
  results = results_of(generate(*(f'--prompt={prompt}' for prompt in PROMPTS), *flags, '--max_length=19', '--seed=1'))
  expected = {'token': {'temperature': 5.0, 'top_p': 0.5}, 'gap_threshold': 0.5, 'stop_threshold': 0.0}
  expected |= {'stop_temperature': 3.0, 'max_length': 19}
  lm = load_once(trained, mesh=None, batch_size=64, **expected)
  assert loaded == [{'mesh': None, 'batch_size': 64, **expected}]
  assert lm.sample_cfg.token == (5.0, 0, 0.5) and lm.sample_cfg.gap_threshold == 0.5
  assert lm.sample_cfg.gap == default.sample_cfg.gap and lm.sample_cfg.max_length == 19
  assert [result['tokens'] for result in results] == [one.tokens for one in lm.generate(PROMPTS, seed=1)]
  assert [result['tokens'] for result in results] != [one.tokens for one in lm.generate(PROMPTS)]


def test_with_n_samples_per_request_the_first_equals_the_result_of_a_single_sample(generate, three):
  results = results_of(generate(*(f'--prompt={text}' for text in PROMPTS), '--n=3'))
  assert sorted((result['id'], result['sample']) for result in results) == [(i, j) for i in range(3) for j in range(3)]
  for result in results:
    if result['sample'] == 0:
      assert_same_result(result, three[result['id']])
  assert len({discrete_fields(result) for result in results if result['id'] == 0}) > 1


def test_a_sampled_result_depends_on_its_id_and_the_seed_but_not_on_other_requests(generate, three):
  lines = [json.dumps({'prompt': PROMPTS[i], 'id': i}) for i in (2, 0)]
  with_blank_line = f'{PROMPTS[0]}\n\n{PROMPTS[2]}\n'  # default id of a prompt: its line number, counting blank lines
  for found in (
    results_of(generate('--batch_size=1', stdin='\n'.join(lines))),
    results_of(generate(stdin=with_blank_line)),
  ):
    assert [result['id'] for result in found] == [0, 2]
    assert_same_result(found[0], three[0])
    assert_same_result(found[1], three[2])
  repeated = '\n'.join(json.dumps({'prompt': PROMPTS[0], 'id': i}) for i in range(12))
  results, other_seed = results_of(generate(stdin=repeated)), results_of(generate('--seed=1', stdin=repeated))
  assert_same_result(results[0], three[0])
  assert len({discrete_fields(result) for result in results}) > 6, 'different ids should give different samples'
  assert sum(discrete_fields(a) == discrete_fields(b) for a, b in zip(results, other_seed, strict=True)) < 6


def test_the_python_api_gives_the_same_results_as_the_generate_command(trained, three, load_once):
  lm = load_once(trained, mesh=None, batch_size=64)
  assert lm.step == 10
  for result, expected in zip(lm.generate(PROMPTS), three, strict=True):
    assert list(result._asdict()) == FIELDS[2:]
    assert_same_result(result._asdict(), expected)
  assert [result.text for result in lm.generate([PROMPTS[2]], ids=[2])] == [three[2]['text']]
  greedy = load_once(trained, 'latest', gap={'temperature': 0.0}, token={'temperature': 0.0}, max_steps=2)
  a, b = (greedy.generate([PROMPTS[0]], seed=seed)[0] for seed in (0, 1))
  assert a == b and len(a.probabilities) == 2
  with pytest.raises(ilm_jax.UserError, match="'temprature': expected one of bytes, force_first, gap"):
    ilm_jax.load(trained, temprature=1.0)


def test_the_reported_probabilities_equal_those_of_the_model_at_each_decoding_step(trained, three, load_once):
  lm, steps, rows = load_once(trained, mesh=None, batch_size=64), [], []
  for result in three:
    ids = np.array([lm.tokenizer.words.index(word) for word in result['tokens']])
    order, bos = np.array(result['order']), result['tokens'].index('[BOS]')
    for step, probability in enumerate(result['probabilities']):
      rows.append(ids[order < step])  # the tokens present before this step
      at = int(np.flatnonzero(order == step)[0])
      gap = int((order[:at] < step).sum()) - 1
      steps.append((gap, ids[at], bos, probability, result['stop_probabilities'][step]))
  tokens_BxL = np.stack([np.pad(row, (0, 20 - len(row))) for row in rows])
  forward = jax.jit(lambda *args: transformer.Forward(lm.model_cfg, lm.params)(*args))
  out = forward(tokens_BxL, np.array([len(row) for row in rows]))
  logits_BxLxV = np.array(out.hidden_BxLxD, np.float64) @ np.array(out.unembed_VxD, np.float64).T
  for i, (gap, token, bos, probability, stop_probability) in enumerate(steps):
    weights = np.exp(logits_BxLxV[i, bos : len(rows[i]), 7:])  # gaps that accept insertions; no special tokens
    assert weights[gap - bos, token - 7] / weights.sum() == pytest.approx(probability, abs=5e-6)
    stop = np.exp(np.array(out.stop_BxSx2[i, 0], np.float64))
    assert stop[0] / stop.sum() == pytest.approx(stop_probability, abs=5e-6)
