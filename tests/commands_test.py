"""The commands: a mistake is one line and nothing written; prompts become answers; the README tells the truth."""

import json
import os
import re
import shlex
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

import ilm_jax
from ilm_jax.models import transformer

PROMPTS = ['1,2|2,3|3,4|1,5|5,6|6,7/1,4', '5,6|1,5|3,4|6,7|2,3|1,2/1,7', '0,9|9,8|8,7|0,1|1,2|2,3/0,3']
RANDOM = {
  'steps': 10,
  'sampling.gap.temperature': 1.0,
  'sampling.token.temperature': 1.0,
  'sampling.max_length': 20,
}  # long enough for the prompts above and some of an answer


@pytest.fixture(scope='module')
def command(tmp_path_factory):
  commands = small.Commands(tmp_path_factory.mktemp('commands'))
  yield commands
  commands.close()


@pytest.fixture(scope='module')
def trained(command, tmp_path_factory):
  """A run of 10 steps, whose answers are drawn at random."""
  workdir = tmp_path_factory.mktemp('trained') / 'run'
  code, out, err = command('ilm_jax.main', small.flags(workdir, RANDOM))
  assert code == 0, err
  assert 'test exact match at step 10: ' in out
  return workdir


@pytest.fixture
def copy(trained, tmp_path):
  return shutil.copytree(trained, tmp_path / 'run')


def snapshot(folder) -> dict:
  """All files with their content."""
  return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob('*')}


def assert_refused(result, message: str):
  """One line on standard error, exit code 1, nothing on standard output."""
  code, out, err = result
  assert code == 1, (code, err)
  assert out == ''
  assert re.fullmatch('error: .+\n', err), err
  assert re.search(message, err), err


# --- mistakes in what main is given -----------------------------------------------------------------------------------

TINY = '--config=configs/star.py:tiny'


@pytest.mark.parametrize(
  'arguments, message',
  [
    ([], r'--config is missing: expected a file, such as --config='),
    (['--config=configs/moon.py'], r'--config=configs/moon.py: there is no file configs/moon.py here \(/'),
    (['--config', 'configs/moon.py:x'], r'there is no file configs/moon.py here'),
    (['--config=configs'], r'there is no file configs here'),
    ([f'--config={small.ROOT / "README.md"}'], r'flags: .*(invalid|unterminated|never closed)'),
    ([f'--config={small.ROOT / "ilm_jax" / "types.py"}'], r"flags: .*has no attribute 'get_config'"),
    (['--config=configs/star.py:huge'], r'configs/star.py:huge: expected one of tiny, mini, easy, medium, hard'),
    ([TINY, '--config.modle.d_model=3'], r'flags: .*modle.* Did you mean "model"'),
    ([TINY, '--config.model.d_modle=3'], r'flags: .*d_modle.* Did you mean "d_model"'),
    ([TINY, '--config.steps=many'], r"flags: flag --config.steps=many: .*'many'"),
    ([TINY, '--config.model=3'], r'flags: flag --config.model=3'),
    ([TINY, '--wrokdir=runs/a'], r"flags: Unknown command line flag 'wrokdir'. Did you mean: workdir"),
    ([TINY, '--mode=dance'], r'flags: flag --mode=dance: value should be one of <train\|eval>'),
    ([TINY, 'runs/a'], r"flags: did not understand 'runs/a': every argument is a flag"),
    ([TINY, '--config.family=gpt'], r"config.family='gpt': expected one of ilm"),
    ([TINY, '--config.task.name=moon'], r"config.task.name='moon': expected one of star"),
    (
      ['--config=configs/star.py:easy', '--config.model.preset=huge'],
      r"model.preset='huge': expected one of small, tiny",
    ),
    ([TINY, '--config.model.compute=int4'], r"model.compute='int4': expected one of float32, bfloat16, mixed"),
    ([TINY, '--config.mesh.fsdp=3'], r'mesh.fsdp=3, .*does not fit 1 device\(s\): .*each size one of 1, or -1'),
    ([TINY, '--config.data.groups=7'], r'data.batch_size=\d+ is not a multiple of data.groups=7: use data.batch_size='),
    (
      [TINY, '--config.optimizer.accumulation_steps=7'],
      r'data.rows=\d+ does not divide into optimizer.accumulation_steps=7 parts: use',
    ),
    ([TINY, '--config.optimizer.schedule=up'], r"optimizer.schedule='up': expected one of constant, cosine, linear"),
    ([TINY, '--config.sampling.stop_threshold=7'], r'sampling.stop_threshold=7.0: expected a probability'),
    (
      [TINY, '--config.init_from=runs/none'],
      r'no checkpoint in .*runs/none/checkpoints: expected the workdir of a run',
    ),
    ([TINY, '--mode=eval'], r'no checkpoint in .*/run/checkpoints: expected the workdir of a run'),
  ],
  ids=lambda value: ' '.join(value).replace(TINY, '').strip() or 'nothing' if isinstance(value, list) else '',
)
def test_a_mistake_on_the_command_line_is_one_line_and_nothing_is_written(arguments, message, command, tmp_path):
  os.symlink(small.ROOT / 'configs', tmp_path / 'configs')
  where = [] if any(word.endswith('runs/a') for word in arguments) else [f'--workdir={tmp_path / "run"}']
  assert_refused(command('ilm_jax.main', [*arguments, *where], cwd=tmp_path), message)
  assert {path.name for path in tmp_path.rglob('*')} == {'configs'}


def test_help_says_what_the_commands_do(command):
  for module in ('ilm_jax.main', 'ilm_jax.generate'):
    code, out, err = command(module, ['--help'])
    assert (code, err) == (0, '') and '--workdir: ' in out and module in out


# --- mistakes in what the workdir holds -------------------------------------------------------------------------------


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'model.d_model': 32}, 'holds a run with model.d_model=16, this one has model.d_model=32: give another --workdir'),
    ({'task.num_nodes': 12}, 'holds a run with task.num_nodes=10, this one has task.num_nodes=12'),
    ({'seed': 7}, 'holds a run with seed=0, this one has seed=7'),
    ({'optimizer.ema_decay': 0.0}, 'a run with optimizer.ema_decay=0.99, this one has 0.0: a moving average cannot'),
  ],
  ids=str,
)
@pytest.mark.parametrize('mode', ['train', 'eval'])
def test_the_workdir_of_another_run_is_refused_and_left_alone(mode, changes, message, command, copy):
  before = snapshot(copy)
  arguments = [*small.flags(copy, {**RANDOM, **changes}), f'--mode={mode}']
  assert_refused(command('ilm_jax.main', arguments), message)
  assert snapshot(copy) == before


def test_another_number_of_steps_or_test_examples_is_the_same_run(command, copy):
  changes = {**RANDOM, 'steps': 12, 'task.num_test': 4}
  code, out, err = command('ilm_jax.main', small.flags(copy, changes))
  assert code == 0 and 'of 4;' in out
  assert 'this start changes steps from 10 to 12' in err and 'resuming at step 10' in err


def edit(workdir, change):
  """Change the config in a run.json."""
  path = workdir / 'run.json'
  run = json.loads(path.read_text())
  change(run['config'])
  path.write_text(json.dumps(run))


def test_a_checkpoint_of_another_shape_is_refused_and_left_alone(command, copy):
  edit(copy, lambda config: config['model'].update(d_model=32))
  before = snapshot(copy)
  message = (
    r'checkpoint of step 10 .* has another shape: \w+ .* is \(\d+,.* there, \(\d+,.* in this model; use the config'
  )
  changes = {**RANDOM, 'model.d_model': 32}
  assert_refused(command('ilm_jax.generate', [f'--workdir={copy}', f'--prompt={PROMPTS[0]}']), message)
  results = [command('ilm_jax.main', [*small.flags(copy, changes), f'--mode={mode}']) for mode in ('train', 'eval')]
  for code, out, err in results:
    assert (code, out) == (1, '') and 'Traceback' not in err
    assert len([line for line in err.splitlines() if line.startswith('error: ') and re.search(message, line)]) == 1, err
  assert snapshot(copy) == before


def test_starting_from_a_model_of_another_shape_is_refused_before_anything_is_written(command, trained, tmp_path):
  changes = {**RANDOM, 'model.d_model': 32, 'init_from': str(trained)}
  result = command('ilm_jax.main', small.flags(tmp_path / 'new', changes))
  assert_refused(result, rf'init_from={trained}: .* has another shape: .* give the model settings of that run')
  assert not (tmp_path / 'new').exists()


def test_likelihoods_are_in_the_evaluation(command, copy):
  arguments = [*small.flags(copy, {**RANDOM, 'eval.score': 'exact'}), '--mode=eval']
  code, out, err = command('ilm_jax.main', arguments)
  assert code == 0, err
  result = json.loads((copy / 'eval.json').read_text())
  assert result['likelihood'] == 'exact' and result['metrics']['nll_variance'] == 0
  said = re.search(r'test -log p, exact: ([\d.]+) nats a string \(.* 0\.0000\), ([\d.]+) a token', out)
  assert float(said[1]) == pytest.approx(result['metrics']['nll'], abs=1e-4)
  assert float(said[2]) == pytest.approx(result['metrics']['nll_per_token'], abs=1e-4)
  lm = ilm_jax.load(copy, 'latest')
  source = lm.task.source(lm.cfg.task, 'test')
  examples = [source[i] for i in range(len(source))]
  forward, lengths = transformer.Forward(lm.model_cfg, lm.params), np.full(len(examples), 22)
  tokens, fixed = (np.stack([example[name] for example in examples]) for name in ('tokens', 'fixed'))
  score = jax.jit(lambda *args: lm.family.score(forward, None, *args, lm.sampler.cfg, kind='exact', longest=6).nll_B)
  total = float(score(tokens, fixed, lengths).sum())
  assert result['metrics']['nll'] == pytest.approx(total / len(examples), rel=1e-4)


def test_checkpoints_without_a_run_json_are_left_alone(command, copy):
  for text in (None, 'not JSON'):
    (copy / 'run.json').unlink() if text is None else (copy / 'run.json').write_text(text)
    before = snapshot(copy)
    code, _, err = command('ilm_jax.main', small.flags(copy, RANDOM))
    assert code == 1 and err.splitlines()[-1].startswith(f'error: {copy} holds checkpoints but no run.json that says')
    assert snapshot(copy) == before


@pytest.mark.parametrize('where', ['a file', '/proc'])
def test_a_workdir_that_cannot_be_written_is_refused(where, command, tmp_path):
  (tmp_path / 'file').write_text('mine')
  workdir = {'a file': tmp_path / 'file' / 'run', '/proc': '/proc/ilm_jax'}[where]
  assert_refused(command('ilm_jax.main', small.flags(workdir)), f'the workdir {workdir} cannot be written')
  assert (tmp_path / 'file').read_text() == 'mine'


# --- mistakes in what generate is given -------------------------------------------------------------------------------

LONG = '|'.join(f'{n},{n + 1}' for n in range(9)) + '/0,1'


@pytest.mark.parametrize(
  'arguments, stdin, message',
  [
    (['--workdir='], '', r'--workdir is missing: expected the folder of a run'),
    (['--workdir=runs/none', '--prompt=x'], '', r'runs/none: expected the workdir of a run, but there is no run.json'),
    (['--prompt=1,2|2,11/1,3'], '', r"prompt 1: unknown token '11': expected one of 0 ... 9 \(10 words\)"),
    (['--prompt=1,2/1,2', '--prompt=1,2|2/1,3'], '', r"prompt 2: .*'1,2\|2/1,3': expected edges and ends as u,v\|"),
    (['--prompt=how are you?'], '', r'expected edges and ends'),
    ([f'--prompt={LONG}'], '', r'prompt 1 is too long: 22 tokens leave no room .*sampling.max_length=20; shorten it'),
    (['--prompt=1,2/1,2', '--prompts=a'], '', r'--prompt and --prompts: expected one of them, got both'),
    (['--prompts=none.txt'], '', r'--prompts=none.txt: No such file'),
    (['--prompts=.'], '', r'--prompts=.: Is a directory'),
    ([], '', r'standard input holds no prompt: expected one a line'),
    ([], '\n \n\u3000\n', r'standard input holds no prompt'),
    ([], b'\xef\xbb\xbf\xff', r'standard input, line 1 is not UTF-8: byte 3 is 0xff'),
    ([], b'\n\n\xff\xfe', r'standard input, line 3 is not UTF-8: byte 2 is 0xff'),
    ([], '{"prompt": "1,2', r'standard input, line 1: expected JSON with either "prompt"'),
    ([], '{"prompt": "1,2/1,2", "id": 1.5}', r'line 1: .*"id", a number from 0, got'),
    ([], '{"prompt": "1,2/1,2", "id": 1e999}', r'line 1: .*"id", a number from 0, got'),
    ([], '{"infill": ' + '[' * 100_000, r'line 1: expected JSON with either "prompt"'),
    ([], '{"prompt": "1,2/1,2", "most": 3}', r'line 1: "least" and "most" are of gaps'),
    (['--prompt=1,2/1,2', '--most=3'], '', r'--least and --most are of gaps: expected them with --infill'),
    (['--prompt=1,2/1,2', '--out=same', '--trace=same'], '', r'--out and --trace are the same file'),
    (['--prompts=requests', '--out=./requests'], '', r'--prompts and --out are the same file'),
    (['--prompt=1,2/1,2', '--trace=none/page.html'], '', r'--trace=none/page.html: there is no folder'),
    (['--infill=1,2/1,2'], '', r"text 1: no gap: expected '___' in the text"),
    (['--prompt=1,2/1,2', '--infill=a ___'], '', r'--prompt and --infill: expected one of them, got both'),
    (['--infill=a ___', '--least=3', '--most=2'], '', r'gap 1 has least=3, most=2: expected 0 <= least <= most'),
    ([], '{"text": "1,2/1,2"}', r'line 1: expected JSON with either "prompt"'),
    ([], '{"prompt": "1,2/1,2", "infill": "1___"}', r'line 1: expected JSON with either "prompt"'),
    ([], '{"infill": "1___", "min": 3}', r'line 1: "min" means nothing here: expected of id, prompt, infill, least'),
    ([], '{"prompt": 12}', r'line 1: expected JSON with either "prompt", a text'),
    ([], '{"prompt": "1,2/1,2", "id": -1}', r'line 1: .*"id", a number from 0, got'),
    ([], '{"prompt": "1,2/1,2", "id": 4294967296}', r'line 1: .*"id", a number from 0, got'),
    (['--prompt=1,2/1,2', '--checkpoint=7'], '', r'no checkpoint of step 7 in .*: there are 5, 10'),
    (['--prompt=1,2/1,2', '--checkpoint=first'], '', r"checkpoint 'first': expected 'best', 'latest' or a step"),
    (['--prompt=1,2/1,2', '--stop_threshold=2'], '', r'flags: flag --stop_threshold=2: .*not .*\[0.0, 1.0\]'),
    (['--prompt=1,2/1,2', '--batch_size=0'], '', r'flags: flag --batch_size=0'),
    (['--prompt=1,2/1,2', '--temprature=0'], '', r"flags: Unknown command line flag 'temprature'"),
    (['1,2/1,2'], '', r"flags: did not understand '1,2/1,2'"),
    (['--prompt=1,2/1,2', '--out=none/answers.jsonl'], '', r'--out=none/answers.jsonl: No such file'),
  ],
  ids=lambda value: (' '.join(value).strip() or 'stdin') if isinstance(value, list) else '',
)
def test_a_prompt_that_cannot_be_answered_is_one_line(arguments, stdin, message, command, trained, tmp_path):
  out = [] if any(word.startswith('--out') for word in arguments) else ['--out=answers.jsonl']
  result = command('ilm_jax.generate', [f'--workdir={trained}', *out, *arguments], stdin=stdin, cwd=tmp_path)
  assert_refused(result, message)
  assert not list(tmp_path.iterdir())


def test_a_file_of_json_lines_holds_nothing_else_and_what_does_not_fit_is_named(command, trained, three, tmp_path):
  lines = [b'[1, 2', b'"prompt": "x"}', b'1,2/1,2', b'{"prompt": "\xe9"}', json.dumps({'prompt': PROMPTS[0]}).encode()]
  (tmp_path / 'prompts.jsonl').write_bytes(b'\xef\xbb\xbf' + b'\n'.join(lines))
  code, out, err = command('ilm_jax.generate', [f'--workdir={trained}', f'--prompts={tmp_path / "prompts.jsonl"}'])
  (served,) = answers((0, out, ''))
  assert code == 1 and served['id'] == 4 and served['prompt'] == three[0]['prompt']
  assert [re.search(r'jsonl, line (\d)', line)[1] for line in err.splitlines()] == ['1', '2', '3', '4']
  assert f'line 4 is not UTF-8: byte {3 + sum(len(line) + 1 for line in lines[:3]) + 12} is 0xe9' in err


def test_a_mark_at_the_start_of_standard_input_is_no_part_of_it(command, trained, three):
  text = '\n'.join(json.dumps({'prompt': prompt}) for prompt in PROMPTS)
  assert answers(command('ilm_jax.generate', [f'--workdir={trained}'], stdin=f'\ufeff{text}')) == three


def test_rules_of_drawing_can_be_given(command, trained, three):
  def say(*words):
    return answers(command('ilm_jax.generate', [f'--workdir={trained}', *(f'--prompt={p}' for p in PROMPTS), *words]))

  assert say('--temperature=0') == say('--temperature=5', '--top_p=1e-6')  # greedy, both
  assert say('--stop_threshold=0', '--stop_temperature=100', '--seed=1') != say('--stop_threshold=0', '--seed=1')
  result = command(
    'ilm_jax.generate', [f'--workdir={trained}', f'--prompt={PROMPTS[0]}', '--temperature=0', '--top_p=0.5']
  )
  assert_refused(result, r'--top_p=0.5 means nothing to the most probable token: give --temperature, too')
  lm = ilm_jax.load(trained, token={'temperature': 5.0, 'top_p': 0.5}, gap_threshold=0.5)
  found = say('--temperature=5', '--top_p=0.5', '--gap_threshold=0.5')
  assert [answer['tokens'] for answer in found] == [one.tokens for one in lm.generate(PROMPTS)]
  assert lm.sample_cfg.gap_threshold == 0.5 and lm.sample_cfg.token == (5.0, 0, 0.5)


def test_a_workdir_without_a_checkpoint_or_with_a_broken_one_is_refused(command, copy):
  prompt = f'--prompt={PROMPTS[0]}'
  for path in copy.glob('checkpoints/10/ema_params/ocdbt.process_0/d/*'):
    path.unlink()
  result = command('ilm_jax.generate', [f'--workdir={copy}', prompt])
  assert_refused(result, r'the checkpoint of step 10 in .* cannot be read \(.*\): choose another, there are 5, 10')
  shutil.rmtree(copy / 'checkpoints')
  for _ in range(2):
    assert_refused(
      command('ilm_jax.generate', [f'--workdir={copy}', prompt]), r'no checkpoint in .*/checkpoints: expec'
    )
    (copy / 'checkpoints').mkdir(exist_ok=True)
  (copy / 'run.json').write_text('{}')
  assert_refused(command('ilm_jax.generate', [f'--workdir={copy}', prompt]), r'run.json is not what a run writes')


# --- answers ----------------------------------------------------------------------------------------------------------

FIELDS = ['id', 'prompt', 'text', 'tokens', 'order', 'probabilities', 'stop_probabilities', 'stopped']


def answers(result) -> list[dict]:
  code, out, err = result
  assert (code, err) == (0, ''), err
  return sorted(map(json.loads, out.splitlines()), key=lambda answer: answer['id'])


def essence(answer) -> tuple:
  """What must not depend on the neighbours."""
  return answer['text'], tuple(answer['tokens']), tuple(answer['order']), answer['stopped']


def assert_same_answer(a, b):
  assert essence(a) == essence(b)
  for name in ('probabilities', 'stop_probabilities'):
    np.testing.assert_allclose(a[name], b[name], atol=1e-5)


@pytest.fixture(scope='module')
def three(command, trained):
  """The answers to the three prompts, given as flags."""
  return answers(command('ilm_jax.generate', [f'--workdir={trained}', *(f'--prompt={text}' for text in PROMPTS)]))


def test_an_answer_says_how_it_came_about(three):
  assert [answer['id'] for answer in three] == [0, 1, 2]
  assert [answer['prompt'] for answer in three] == PROMPTS
  for answer in three:
    assert list(answer) == FIELDS
    given = ['[CLS]', *re.findall(r'\d+', answer['prompt']), '[BOS]']
    free = answer['tokens'][len(given) :]
    assert answer['tokens'][: len(given)] == given and len(free) == 4  # sampling.max_length is 20
    assert answer['order'][: len(given)] == [-1] * len(given)
    assert sorted(answer['order'][len(given) :]) == list(range(len(free)))
    assert all(0 < p <= 1 for p in answer['probabilities']) and len(answer['probabilities']) == len(free)
    assert len(answer['stop_probabilities']) == len(free) + 1  # the last forward pass inserts nothing
    assert answer['text'].startswith(answer['prompt'] + '=')
    words = answer['text'].split('=')[1]
    chained = free[1] == free[2]
    assert words == (','.join([free[0], free[1], free[3]]) if chained else '{},{}|{},{}'.format(*free))


def test_a_file_standard_input_and_flags_give_the_same_answers(command, trained, three, tmp_path):
  text = '\n'.join(PROMPTS)
  (tmp_path / 'prompts.txt').write_text(text + '\n')
  workdir = f'--workdir={trained}'
  results = [
    answers(command('ilm_jax.generate', [workdir, f'--prompts={tmp_path / "prompts.txt"}'])),
    answers(command('ilm_jax.generate', [workdir], stdin=text)),
    answers(command('ilm_jax.generate', [workdir], stdin='\n'.join(json.dumps({'prompt': p}) for p in PROMPTS))),
  ]
  assert answers(command('ilm_jax.generate', [workdir, f'--out={tmp_path / "out"}'], stdin=text)) == []
  results.append(answers((0, (tmp_path / 'out').read_text(), '')))
  assert all(result == three for result in results)


def test_a_line_that_cannot_be_served_is_named_and_the_others_are(command, trained, three):
  lines = [PROMPTS[0], '{"prompt": "1,2', PROMPTS[2], '1,2|2,11/1,3', '{"infill": ["1"]}']
  lines.append(json.dumps({'prompt': PROMPTS[1], 'id': 2}))
  code, out, err = command('ilm_jax.generate', [f'--workdir={trained}'], stdin='\n'.join(lines))
  served = answers((0, out, ''))
  assert code == 1 and [answer['id'] for answer in served] == [0, 2]
  for answer in served:
    assert_same_answer(answer, three[answer['id']])
  said = err.splitlines()
  assert [re.search(r'line (\d)', line)[1] for line in said] == ['2', '6', '4', '5']
  assert all(line.startswith('error: standard input, line') for line in said)
  assert 'the id 2 is that of line 3 already' in said[1] and "unknown token '11'" in said[2]


def test_several_answers_are_drawn_for_each_request_and_the_first_is_the_single_one(command, trained, three):
  arguments = [f'--workdir={trained}', *(f'--prompt={text}' for text in PROMPTS), '--n=3']
  made = answers(command('ilm_jax.generate', arguments))
  assert sorted((answer['id'], answer['sample']) for answer in made) == [(i, j) for i in range(3) for j in range(3)]
  for answer in made:
    if answer['sample'] == 0:
      assert_same_answer(answer, three[answer['id']])
  assert len({essence(answer) for answer in made if answer['id'] == 0}) > 1


def test_an_answer_depends_on_its_id_and_seed_not_on_its_neighbours(command, trained, three):
  workdir = f'--workdir={trained}'
  lines = [json.dumps({'prompt': PROMPTS[i], 'id': i}) for i in (2, 0)]
  alone = answers(command('ilm_jax.generate', [workdir, '--batch_size=1'], stdin='\n'.join(lines)))
  assert [answer['id'] for answer in alone] == [0, 2]
  assert_same_answer(alone[0], three[0])
  assert_same_answer(alone[1], three[2])
  # A blank line counts: the second prompt is on line 2, counted from 0.
  gap = answers(command('ilm_jax.generate', [workdir], stdin=f'{PROMPTS[0]}\n\n{PROMPTS[2]}\n'))
  assert [answer['id'] for answer in gap] == [0, 2]
  assert_same_answer(gap[1], three[2])
  same = [json.dumps({'prompt': PROMPTS[0], 'id': i}) for i in range(12)]
  drawn = answers(command('ilm_jax.generate', [workdir], stdin='\n'.join(same)))
  assert_same_answer(drawn[0], three[0])
  assert len({essence(answer) for answer in drawn}) > 6, 'the same prompt with other ids is drawn anew'
  other = answers(command('ilm_jax.generate', [workdir, '--seed=1'], stdin='\n'.join(same)))
  assert sum(essence(a) == essence(b) for a, b in zip(drawn, other, strict=True)) < 6


def test_the_model_in_python_gives_the_answers_of_the_command(trained, three):
  lm = ilm_jax.load(trained)
  assert lm.step == 10
  for answer, expected in zip(lm.generate(PROMPTS), three, strict=True):
    assert list(answer._asdict()) == FIELDS[2:]
    assert_same_answer(answer._asdict(), expected)
  assert [a.text for a in lm.generate([PROMPTS[2]], ids=[2])] == [three[2]['text']]
  greedy = ilm_jax.load(trained, 'latest', gap={'temperature': 0.0}, token={'temperature': 0.0}, max_steps=2)
  a, b = (greedy.generate([PROMPTS[0]], seed=seed)[0] for seed in (0, 1))
  assert a == b and len(a.probabilities) == 2
  with pytest.raises(
    ilm_jax.types.UserError, match="unknown sampling setting 'temprature': expected one of force_first, gap"
  ):
    ilm_jax.load(trained, temprature=1.0)


def test_probabilities_are_those_of_the_model_insertion_by_insertion(trained, three):
  lm = ilm_jax.load(trained)
  for answer in three:
    ids = np.array([lm.tokenizer.words.index(word) for word in answer['tokens']])
    order, bos = np.array(answer['order']), answer['tokens'].index('[BOS]')
    for step, expected in enumerate(answer['probabilities']):
      row = ids[order < step]  # what was there before
      out = transformer.apply_rows(lm.model_cfg, lm.params, jnp.array(row[None]), jnp.array([len(row)]))
      logits = np.array(out.hidden_BxLxD[0], np.float64) @ np.array(out.unembed_VxD, np.float64).T
      weights = {
        (gap, token): np.exp(logits[gap, token]) for gap in range(bos, len(row)) for token in range(7, len(logits[0]))
      }
      at = int(np.flatnonzero(order == step)[0])
      pair = int((order[:at] < step).sum()) - 1, ids[at]
      assert weights[pair] / sum(weights.values()) == pytest.approx(expected, abs=5e-6)
      stop = np.exp(np.array(out.stop_BxSx2[0, 0], np.float64))
      assert stop[0] / stop.sum() == pytest.approx(answer['stop_probabilities'][step], abs=5e-6)


# --- the README -------------------------------------------------------------------------------------------------------


def blocks(language: str) -> list[str]:
  return re.findall(rf'```{language}\n(.*?)```', (small.ROOT / 'README.md').read_text(), re.S)


def test_the_commands_of_the_readme_run(command, tmp_path, monkeypatch):
  """Each with few steps and a small model; every command but the first may use the runs of those before it."""
  os.symlink(small.ROOT / 'configs', tmp_path / 'configs')
  lines = [line for block in blocks('sh') for line in block.splitlines()]
  words = [shlex.split(line, comments=True) for line in lines]
  commands = [(word[2], word[3:]) for word in words if word[:2] == ['python', '-m']]
  assert {module for module, _ in commands} >= {'ilm_jax.main', 'ilm_jax.generate'}
  makes = [word[1] for word in words if word[:1] == ['make']]
  targets = re.findall(r'^([a-z-]+):', (small.ROOT / 'Makefile').read_text(), re.M)
  assert 'train' in makes and set(makes) <= set(targets)

  def shortened(arguments):
    """The arguments, over settings that make them quick; what the README itself sets wins."""
    quick = {'steps': 5, 'task.num_nodes': 20, 'sampling.max_length': 36, 'task.num_train': 20}
    settings = small.flags(changes=quick)
    if '--config=configs/text.py:small' in arguments:
      size = {'num_layers': 1, 'num_heads': 2, 'd_model': 16, 'd_ff': 32}
      text = {'steps': 5, 'task.length': 48, 'task.tokenizer.size': 300, 'data.batch_size': 4, 'eval.every': 5}
      settings = [f'--config.{k}={v}' for k, v in (text | {f'model.{k}': v for k, v in size.items()}).items()]
    named = {word.split('=')[0] for word in arguments}
    return [*arguments, *(word for word in settings if word.split('=')[0] not in named)]

  rng = np.random.default_rng(0)
  vocabulary = re.split(' ', 'Tom had a dog . He was happy The cat ran home and then Once upon time')
  (tmp_path / 'stories').mkdir()
  for i in range(60):
    (tmp_path / 'stories' / f'{i}.txt').write_text(' '.join(rng.choice(vocabulary, rng.integers(5, 30))))
  (tmp_path / 'requests.jsonl').write_text('{"infill": ["Tom had a ", " ."], "most": 5}')

  default = ('ilm_jax.main', ['--config=configs/star.py:tiny'])  # what `make train` does
  assert re.search(
    r'^train:.*\n\t.* -m ilm_jax.main --config=configs/star.py:tiny', (small.ROOT / 'Makefile').read_text(), re.M
  )
  for module, arguments in [default, *commands]:
    given = shortened(arguments) if module == 'ilm_jax.main' else arguments
    if module == 'ilm_jax.evaluation.report':
      given = [*arguments, '--mixed_commits']  # a checkout without git has none
    code, out, err = command(module, given, cwd=tmp_path)
    assert code == 0, (module, arguments, err)
    if module == 'ilm_jax.main':
      assert ('test loss' if 'text.py' in arguments[0] else 'test exact match') in out
    elif module == 'ilm_jax.inference.stopping':
      assert out.count('(fitted)') == 2
    elif '--out=answers.jsonl' in arguments:
      assert json.loads((tmp_path / 'answers.jsonl').read_text())['text'].startswith('Once upon a time')
    elif module == 'ilm_jax.evaluation.report':
      assert (
        len(re.findall(r'^\| star tiny \| (?:arm|ilm) \|', out, re.M)) == 7
      )  # two rows in three tables, one with likelihoods
    else:
      assert all(json.loads(line)['tokens'] for line in out.splitlines())
  assert (tmp_path / 'runs' / 'star-tiny' / 'eval.json').exists()

  monkeypatch.chdir(tmp_path)
  graphs, gaps = ({} for _ in range(2))
  exec(blocks('python')[0], graphs)
  assert re.fullmatch(r'[\d,|]+/\d+,\d+=[\d,|]*', graphs['answer'].text)
  exec(blocks('python')[1], gaps)
  assert all(re.fullmatch(r'Tom had a .* \. He was .* \.', one.text, re.S) for one in gaps['filled'])

  names = {}
  for cell in json.loads((small.ROOT / 'docs' / 'infilling.ipynb').read_text())['cells']:
    if cell['cell_type'] == 'code':
      exec(''.join(cell['source']), names)
  assert (tmp_path / 'trace.html').read_text() == names['page']
