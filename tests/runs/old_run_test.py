"""Compatibility: a run trained with an early version 0.1 loads, generates and resumes with the current code."""

import json
import tarfile

import jax
import numpy as np
import pytest
import small

import ilm_jax
from ilm_jax.runs import run_file

GOLDEN = small.ROOT / 'tests' / 'golden'


@pytest.fixture
def workdir(tmp_path):
  """Unpack the old run at step 20, with its original run.json; return its workdir."""
  with tarfile.open(GOLDEN / 'old_run.tar.gz') as file:
    file.extractall(tmp_path, filter='data')
  return tmp_path / 'old_run'


def test_renamed_settings_of_an_old_run_get_their_new_names(workdir):
  raw = json.loads((workdir / 'run.json').read_text())['config']
  assert raw['hosts']['heartbeat_seconds'] == 20 and raw['eval']['show'] == 2
  config = run_file.read_config(workdir)
  assert config['distributed']['heartbeat_timeout'] == 20 and config['eval']['print_samples'] == 2
  assert not set(run_file.RENAMED) & set(run_file.flatten(config))


def test_an_old_run_generates_the_same_completions_as_with_its_original_code(workdir):
  line = json.loads((GOLDEN / 'old_run_answers.jsonl').read_text().splitlines()[0])
  lm = ilm_jax.load(workdir, token={'temperature': 1.0})
  (completion,) = lm.generate([line['prompt']], seed=3)
  assert (completion.text, list(completion.order)) == (line['text'], line['order'])
  np.testing.assert_allclose(completion.probabilities, line['probabilities'], rtol=1e-4, atol=1e-6)


def test_an_old_run_resumes_to_the_same_weights_as_with_its_original_code(workdir):
  changes = {'steps': 30, 'eval.every': 10, 'checkpoint_every': 10, 'keep': 1}
  code, _, err = small.run(small.flags(workdir, changes), workdir.parent / 'cache')
  assert code == 0, err
  lm = ilm_jax.load(workdir, 'latest')
  assert lm.step == 30
  with np.load(GOLDEN / 'old_run_step_30.npz') as expected:
    found = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(lm.params)}
    assert set(found) == set(expected)
    for name, value in expected.items():
      np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-5, err_msg=name)
