"""Tests of training on text: validation, resuming, signals during data preparation, all families, run tokenizers."""

import functools
import itertools
import json
import os
import pathlib
import shutil
import signal

import numpy as np
import pytest
import small
from text_helpers import refused, stories, write, write_corpus

import ilm_jax
from ilm_jax.configs import text as text_config
from ilm_jax.data import pipeline
from ilm_jax.data import tokenizers as tokenizer_lib
from ilm_jax.distributed import sharding
from ilm_jax.evaluation import evaluate
from ilm_jax.models import transformer
from ilm_jax.runs import logs
from ilm_jax.tasks.text import corpora
from ilm_jax.tasks.text import task as text
from ilm_jax.training import experiment, loop, signals


def run_config(path, cache, **changes):
  """Return the config of a small run of four training steps."""
  cfg = text_config.get_config('small')
  settings = {
    **{'data.path': str(path), 'task.cache': str(cache), 'task.length': 64, 'task.tokenizer.size': 330},
    **{'task.num_validation': 8, 'task.num_test': 8, 'steps': 4, 'log_every': 1, 'keep': 4},
    **{'model.num_layers': 1, 'model.num_heads': 2, 'model.d_model': 16, 'model.d_ff': 32, 'model.compute': 'float32'},
    **{'data.batch_size': 8, 'data.rows': 8, 'data.row_length': 64, 'data.segments': 3, 'data.prefetch': 1},
    **{'eval.every': 2, 'eval.batch_size': 8, 'eval.samples': 2, 'eval.print_samples': 2, 'checkpoint_every': 1},
    **{'optimizer.learning_rate': 1e-2, 'optimizer.warmup_steps': 0, 'sampling.max_steps': 6},
    **changes,
  }
  for name, value in settings.items():
    *parts, key = name.split('.')
    functools.reduce(getattr, parts, cfg)[key] = value
  return cfg


@pytest.fixture(scope='module', autouse=True)
def one_device_and_kept_programs(tmp_path_factory):
  """Run on one device, and compile each JAX program once for all tests of this file."""
  with small.compilation_cache_in(tmp_path_factory.mktemp('programs')), pytest.MonkeyPatch.context() as patch:
    patch.setattr(sharding, 'make_mesh', lambda *_: small.mesh())
    yield


@pytest.fixture(scope='module')
def corpus(tmp_path_factory):
  return write_corpus(tmp_path_factory.mktemp('corpus'))


@pytest.fixture(scope='module')
def cache(tmp_path_factory):
  return tmp_path_factory.mktemp('cache')


@pytest.fixture(scope='module')
def trained(corpus, cache, tmp_path_factory):
  """Train a small run to its end; return its workdir."""
  workdir = tmp_path_factory.mktemp('run') / 'work'
  assert loop.train(run_config(corpus, cache), workdir) == loop.FINISHED
  return workdir


@pytest.fixture(scope='module')
def other_tokenizer(tmp_path_factory):
  """Save a tokenizer that differs from the tokenizer of the run `trained`; return its folder."""
  lines = [line for story in stories(60, seed=7) for line in story.split('\n')]
  folder = tmp_path_factory.mktemp('tokenizer') / 'other'
  tokenizer_lib.train_sentencepiece(lines, size=330).save(folder)
  return folder


def copy_of(workdir, tmp_path) -> pathlib.Path:
  return pathlib.Path(shutil.copytree(workdir, tmp_path / 'work', copy_function=shutil.copy2))


def test_a_run_on_text_measures_the_validation_loss_and_logs_samples(trained):
  result = json.loads((trained / 'eval.json').read_text())
  assert result['chance'] is None and result['finished'] and 'exact_match' not in result['metrics']
  assert set(result['pairs']) >= {'stopped', 'length'} and result['pairs']['length'][1] == 2
  losses = dict(logs.read_scalars(trained)['validation/loss'])
  assert list(losses) == [2, 4] and result['step'] == min(losses, key=losses.get)
  events = [e for path in sorted(trained.glob('events*')) for e, _ in logs.read_records(path)]
  shown = [v.tensor.string_val[0].decode() for e in events for v in e.summary.value if 'samples' in v.tag]
  assert len(shown) == 2 and all(one.count(' tokens, ') == 2 and 'after 3 of 6 steps' in one for one in shown)


@pytest.mark.parametrize('number, kind', [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)])
def test_a_signal_during_data_preparation_stops_the_run_at_once(corpus, tmp_path, monkeypatch, number, kind):
  prepare, calls = text.prepare, []

  def signalled(*args):
    calls.append(args[1])
    yield from itertools.islice(prepare(*args), 3)
    os.kill(os.getpid(), number)
    yield from prepare(*args)

  monkeypatch.setattr(text, 'prepare', signalled)
  with pytest.raises(kind) as error:
    loop.train(run_config(corpus, tmp_path / 'cache'), tmp_path / 'work')
  assert len(calls) == 1 and not list((tmp_path / 'cache').glob('text-*'))
  assert kind is KeyboardInterrupt or error.value.code == signals.PREEMPTED


@pytest.mark.parametrize('family', ['arm', 'it', 'mdm'])
def test_every_family_evaluates_the_loss_and_samples_text(corpus, cache, family):
  cfg = run_config(corpus, cache, **{'family': family, 'data.rows': 16, 'eval.samples': 1})
  exp = experiment.build(cfg)
  evaluator = evaluate.Evaluator(cfg, **{k: v for k, v in exp._asdict().items() if k != 'cfg'})
  params = transformer.unbox(transformer.init(exp.model_cfg, small.jax.random.key(0)))
  total, weight = evaluator.validation_loss(params)['loss']
  assert 0.5 < total / weight / np.log(330) < 3, 'the loss of an untrained model should be close to uniform guessing'
  scores = evaluator.sample_answers(params, 'validation')
  assert scores.pairs['length'][0] > 0 and ' tokens, ' in scores.texts[0]
  (batch,) = pipeline.train_batches(exp.task.source(cfg.task, 'train'), exp.family.corrupt, cfg, start=0, stop=1)
  assert (batch['example_id_BxS'] >= 0).sum() == 8, 'all examples of the batch should fit into its rows'


def test_resuming_with_a_moved_corpus_and_an_empty_cache_is_bitwise_identical(corpus, trained, tmp_path, monkeypatch):
  work = copy_of(trained, tmp_path)
  for step in (3, 4):  # simulates a run that was killed after step 2
    shutil.rmtree(work / 'checkpoints' / str(step))
  shutil.copytree(corpus, tmp_path / 'moved', copy_function=shutil.copy2)
  monkeypatch.setattr(text, '_TOKENIZERS', {})
  monkeypatch.setattr(tokenizer_lib, 'train_sentencepiece', None)  # the run has a tokenizer and must not train another
  cfg = run_config(tmp_path / 'moved', tmp_path / 'cache', **{'task.tokenizer.path': str(tmp_path / 'gone.model')})
  assert loop.evaluate_run(cfg, work) == loop.FINISHED
  assert json.loads((work / 'eval.json').read_text())['step'] == 2
  assert loop.train(run_config(tmp_path / 'moved', tmp_path / 'cache'), work) == loop.FINISHED
  whole, resumed = (ilm_jax.load(path, 4, batch_size=1).params for path in (trained, work))
  small.jax.tree.map(np.testing.assert_array_equal, whole, resumed)


@pytest.mark.parametrize('workdir', ['.', pytest.param('runs/train', marks=pytest.mark.long)])
def test_a_run_inside_the_corpus_folder_resumes_with_the_same_data(trained, cache, tmp_path, caplog, workdir):
  folder = write_corpus(tmp_path / 'folder')
  work = shutil.copytree(trained, folder / workdir, dirs_exist_ok=True)
  shutil.copytree(cache, folder / 'data')
  for step in (3, 4):  # simulates a run that was killed after step 2
    shutil.rmtree(work / 'checkpoints' / str(step))
  assert loop.train(run_config(folder, folder / 'data'), work) == loop.FINISHED
  assert 'has changed' not in caplog.text and 'not read' not in caplog.text
  whole, resumed = (ilm_jax.load(path, 4, batch_size=1).params for path in (trained, work))
  small.jax.tree.map(np.testing.assert_array_equal, whole, resumed)


def test_a_run_and_its_cache_inside_the_corpus_folder_do_not_change_the_corpus(trained, cache, tmp_path, monkeypatch):
  write(tmp_path / 'stories.txt', stories(9))
  monkeypatch.chdir(tmp_path)
  before = corpora.find('.')
  shutil.copytree(trained, 'runs/text-small')
  shutil.copytree(cache, 'data')
  assert corpora.find('.') == before
  shutil.copytree(trained, tmp_path, dirs_exist_ok=True)  # --workdir and data.path are the same folder
  assert corpora.find('.') == before and [file.name for file in before.files['train']] == ['stories.txt']


# --- the tokenizer of a run -------------------------------------------------------------------------------------------


def test_a_run_saves_its_tokenizer_and_needs_no_corpus_to_generate_text(corpus, cache, trained, monkeypatch):
  expected = text.tokenizer(run_config(corpus, cache).task)
  run = json.loads((trained / 'run.json').read_text())
  assert run['config']['task']['tokenizer']['fingerprint'] == expected.fingerprint
  assert tokenizer_lib.load(trained / 'tokenizer').files() == expected.files()
  monkeypatch.setattr(text, '_TOKENIZERS', {})
  monkeypatch.setattr(text, 'corpus_of', None)
  lm = ilm_jax.load(trained, batch_size=2)
  assert lm.tokenizer.fingerprint == expected.fingerprint
  story = stories(1)[0]
  answers = lm.generate([story[:40], ''])
  assert answers[0].text.startswith(story[:40]) and len(answers[1].tokens) > 2
  with refused('tokens leave no room for a completion', 'sampling.max_length=64'):
    lm.generate([story * 9])


def test_a_run_refuses_a_tokenizer_that_its_checkpoints_were_not_trained_with(
  corpus, trained, other_tokenizer, tmp_path, monkeypatch
):
  work = copy_of(trained, tmp_path)
  own, other = (tokenizer_lib.load(path).fingerprint for path in (work / 'tokenizer', other_tokenizer))

  changed = run_config(corpus, tmp_path, **{'task.tokenizer.path': str(other_tokenizer)})
  with refused(str(other_tokenizer), other, own, 'another --workdir'):
    loop.train(changed, work)
  changed = run_config(corpus, tmp_path, **{'task.tokenizer.size': 331})
  with refused('task.tokenizer.size=330', 'nothing was overwritten'):
    loop.train(changed, work)
  # Replace the tokenizer in the run's folder with another one.
  shutil.rmtree(work / 'tokenizer')
  shutil.copytree(other_tokenizer, work / 'tokenizer')
  with refused(str(work / 'tokenizer'), other, own):
    ilm_jax.load(work)
  with refused('task.tokenizer.fingerprint', own):
    loop.evaluate_run(run_config(corpus, tmp_path), work)
  # Remove the tokenizer from the run's folder; without the corpus, it cannot be trained again.
  shutil.rmtree(work / 'tokenizer')
  monkeypatch.setattr(text, '_TOKENIZERS', {})
  monkeypatch.setattr(text, 'corpus_of', lambda cfg: corpora.find(str(tmp_path / 'gone')))
  with refused(f'there is no tokenizer in {work / "tokenizer"}'):
    ilm_jax.load(work)


def test_init_from_a_run_requires_the_tokenizer_of_that_run(corpus, trained, other_tokenizer, tmp_path):
  changes = {'init_from': str(trained), 'task.tokenizer.path': str(other_tokenizer), 'steps': 1, 'eval.samples': 1}
  fingerprint = tokenizer_lib.load(other_tokenizer).fingerprint
  with refused(fingerprint, f'--config.task.tokenizer.path={trained / "tokenizer"}'):
    loop.train(run_config(corpus, tmp_path, **changes), tmp_path / 'new')
  changes['task.tokenizer.path'] = str(trained / 'tokenizer')
  assert loop.train(run_config(corpus, tmp_path, **changes), tmp_path / 'new') == loop.FINISHED


def test_exact_match_is_refused_as_the_evaluation_metric_for_text(corpus, cache):
  with refused('no right answers', 'eval.metric=loss'):
    experiment.build(run_config(corpus, cache, **{'eval.metric': 'exact_match', 'eval.mode': 'max'}))


def test_1000_texts_sampled_or_infilled_by_a_trained_model_contain_no_incomplete_characters(cache, tmp_path):
  texts = [story.replace('Mara', 'Zoë’s cat').replace('goat', '山羊').replace('!', '…') for story in stories(84)]
  write(tmp_path / 'corpus' / 'train.txt', texts[:60])
  write(tmp_path / 'corpus' / 'valid.txt', texts[60:])
  cfg = run_config(tmp_path / 'corpus', cache, **{'steps': 60, 'eval.every': 60, 'checkpoint_every': 60})
  assert loop.train(cfg, tmp_path / 'work') == loop.FINISHED
  lm = ilm_jax.load(tmp_path / 'work', max_length=32, max_steps=16, batch_size=100)
  assert not set(lm.tokenizer.byte_ids) & {token for text in texts for token in lm.tokenizer.encode(text)}
  parts = ['“Zoë’s ', '”, said ', '.']
  outputs = [result.text for result in (*lm.generate([''] * 500), *lm.infill([parts], n=500)[0])]
  assert len(outputs) == 1000 and not any('\ufffd' in output for output in outputs)
  assert any(set('ë’山羊…') & set(output) for output in outputs[:500]), 'samples have rare characters'
