"""The README: its commands and Python examples run in an empty folder, with few steps and small models."""

import json
import os
import re
import shlex

import numpy as np
import pytest
import small

README = (small.ROOT / 'README.md').read_text()
MAKEFILE = (small.ROOT / 'Makefile').read_text()
STARS = {'steps': 5, 'task.num_nodes': 20, 'sampling.max_length': 36, 'task.num_train': 20, 'eval.every': 5}
TEXT = {'steps': 5, 'task.length': 48, 'task.tokenizer.size': 300, 'data.batch_size': 4, 'eval.every': 5}
SIZE = {'num_layers': 1, 'num_heads': 2, 'd_model': 16, 'd_ff': 32}
WORDS = re.split(' ', 'Tom had a dog . He was happy The cat ran home and then Once upon time')


def blocks(language: str) -> list[str]:
  """Return the README's code blocks in a language, such as sh or python."""
  return re.findall(rf'```{language}\n(.*?)```', README, re.S)


def commands() -> list[list[str]]:
  """Return the arguments of each `ilm-jax` command in the README; `python -m ilm_jax.main` means `ilm-jax train`."""
  lines = [line for block in blocks('sh') for line in block.splitlines()]
  words = [shlex.split(line, comments=True) for line in lines]
  words = [['ilm-jax', 'train', *w[3:]] if w[:3] == ['python', '-m', 'ilm_jax.main'] else w for w in words]
  return [w[1:] for w in words if w[:1] == ['ilm-jax']]


def shortened(arguments: list[str]) -> list[str]:
  """Add settings for a short run to a command's arguments, except those that the README sets itself."""
  if arguments[0] not in ('train', 'eval'):
    return [*arguments, '--mixed_commits'] if arguments[0] == 'report' else arguments
  if '--config=text:small' in arguments:
    settings = [f'--config.{k}={v}' for k, v in (TEXT | {f'model.{k}': v for k, v in SIZE.items()}).items()]
  else:
    settings = [word for word in small.flags(changes=STARS) if not word.startswith('--config=')]
  named = {word.split('=')[0] for word in arguments}
  return [*arguments, *(word for word in settings if word.split('=')[0] not in named)]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """Run all README commands in order in one folder; return the folder and the output of each command line."""
  folder = tmp_path_factory.mktemp('readme')
  os.symlink(small.ROOT / 'configs', folder / 'configs')
  (folder / 'tests').mkdir()
  os.symlink(small.ROOT / 'tests' / 'golden', folder / 'tests' / 'golden')
  rng = np.random.default_rng(0)
  (folder / 'stories').mkdir()
  for i in range(60):
    (folder / 'stories' / f'{i}.txt').write_text(' '.join(rng.choice(WORDS, rng.integers(5, 30))))
  (folder / 'requests.jsonl').write_text('{"infill": ["Tom had a ", " ."], "most": 5}')
  outputs = {}
  run = small.Commands(tmp_path_factory.mktemp('commands'))
  for arguments in commands():
    code, out, err = run('ilm_jax.cli', shortened(arguments), cwd=folder)
    assert code == 0, (arguments, err)
    outputs[' '.join(arguments)] = out
  run.close()
  (folder / 'outputs.json').write_text(json.dumps(outputs))
  return folder


def test_every_readme_command_prints_the_documented_output(folder):
  outputs = json.loads((folder / 'outputs.json').read_text())
  assert len(outputs) >= 12
  for line, out in outputs.items():
    if line.startswith(('train', 'eval')):
      assert ('test loss' if 'text:' in line else 'test exact match') in out, line
    elif line.startswith('report'):
      assert len(re.findall(r'^\| star tiny \| (?:arm|ilm) \|', out, re.M)) >= 4
    elif line.startswith('convert'):
      assert 'largest of all' in out
    elif '--out=' in line:
      assert json.loads((folder / 'completions.jsonl').read_text())['text'].startswith('Once upon a time')
    else:
      assert all(json.loads(row)['tokens'] for row in out.splitlines()), line
  assert (folder / 'runs' / 'star-tiny' / 'eval.json').exists() and (folder / 'trace.html').exists()


def test_the_python_code_of_the_readme_and_of_the_notebook_runs(folder, monkeypatch):
  monkeypatch.chdir(folder)
  graphs, gaps, names = {}, {}, {}
  exec(blocks('python')[0], graphs)
  assert re.fullmatch(r'[\d,|]+/\d+,\d+=[\d,|]*', graphs['completion'].text)
  exec(blocks('python')[1], gaps)
  assert all(re.fullmatch(r'Tom had a .* \. He was .* \.', one.text, re.S) for one in gaps['filled'])
  for cell in json.loads((small.ROOT / 'docs' / 'infilling.ipynb').read_text())['cells']:
    if cell['cell_type'] == 'code':
      exec(''.join(cell['source']), names)
  assert (folder / 'trace.html').read_text() == names['page']


def test_the_make_targets_named_in_the_readme_exist():
  targets = re.findall(r'^([a-z-]+):', MAKEFILE, re.M)
  named = set(re.findall(r'\bmake ([a-z-]+)', README))
  assert {'train', 'test', 'docs'} <= named <= set(targets)
  assert re.search(r'^train:.*\n\t.* -m ilm_jax.main --config=configs/star.py:tiny', MAKEFILE, re.M)
