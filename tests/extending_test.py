"""docs/extending.md: its toy family and toy task, exactly as printed, train and generate in an empty folder."""

import json
import os
import re
import subprocess
import sys

import pytest
import small

from ilm_jax import families
from ilm_jax.types import UserError

PAGE = (small.ROOT / 'docs' / 'extending.md').read_text()
FILES = dict(re.findall(r'```python title="(\w+\.py)"\n(.*?)```', PAGE, re.S))


def ilm_jax(folder, *arguments) -> str:
  """Run `ilm-jax` in a folder and return its standard output."""
  env = {**os.environ, 'PYTHONPATH': str(small.ROOT), 'JAX_PLATFORMS': 'cpu'}
  command = [sys.executable, '-m', 'ilm_jax.cli', *arguments]
  done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)
  assert done.returncode == 0, done.stderr
  return done.stdout


def test_each_file_of_the_toy_example_in_the_docs_has_fewer_than_60_lines():
  assert set(FILES) == {'toy_family.py', 'toy_task.py', 'toy.py'}
  assert all(len(code.splitlines()) < 60 for code in FILES.values())


def test_the_toy_family_sorts_digits_from_right_to_left(tmp_path):
  for name, code in FILES.items():
    (tmp_path / name).write_text(code)
  commands = re.findall(r'^ilm-jax (train --config=toy.py|generate .*?)(?:  |$)', PAGE, re.M)
  assert len(commands) == 2
  out = ilm_jax(tmp_path, *commands[0].split())
  assert float(re.search(r'test exact match at step \d+: ([\d.]+) %', out)[1]) > 90
  answer = json.loads(ilm_jax(tmp_path, 'generate', '--workdir=runs/toy', '--prompt=5 3 9 1 1'))
  assert answer['text'] == '5 3 9 1 1 = 1 1 3 5 9'
  assert [step for step in answer['order'] if step >= 0] == [4, 3, 2, 1, 0]
  table = ilm_jax(tmp_path, 'report', 'runs/toy', '--noplots', '--mixed_commits')
  assert re.search(r'^\| sorting \| toy_family \| .* \| – \| – \| – \|$', table, re.M)


@pytest.mark.parametrize(
  ('code', 'message'),
  [
    (None, 'expected one of ilm, arm, it, mdm, or the import path of a module that defines FAMILY'),
    ('x = 1', 'broken_family.py defines no FAMILY of type ilm_jax.families.contract.Family'),
    ('import no_such_library', "broken_family.py cannot be imported: ModuleNotFoundError: No module named 'no_such_"),
    (
      "from ilm_jax.families.contract import Family\nFAMILY = Family(name='broken')",
      r"cannot be imported: TypeError: Family.__init__\(\) missing 6 required keyword-only arguments: 'corrupt'",
    ),
  ],
  ids=['no module', 'no FAMILY', 'broken import', 'missing fields'],
)
def test_an_unusable_family_module_gives_a_one_line_error(code, message, tmp_path, monkeypatch):
  monkeypatch.syspath_prepend(tmp_path)
  if code is not None:
    (tmp_path / 'broken_family.py').write_text(code)
  monkeypatch.delitem(sys.modules, 'broken_family', raising=False)
  with pytest.raises(UserError, match=message) as error:
    families.get('broken_family')
  assert '\n' not in str(error.value)
