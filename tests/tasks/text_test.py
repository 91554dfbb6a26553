"""Tests of the text task: cutting documents, preparing and reading examples, tokenizer training data, and configs."""

import errno
import json
import logging
import pickle
import shutil
import sys
import tarfile
import tempfile
import threading
import types

import numpy as np
import pytest
from absl import flags
from array_record.python import array_record_module
from etils import epath
from ml_collections import config_flags
from text_helpers import DATA, ROOT, all_texts, needs_real_text, refused, stories, task_config, write_corpus

from ilm_jax import paths
from ilm_jax.configs import lm1b as lm1b_config
from ilm_jax.configs import text as text_config
from ilm_jax.configs import tinystories as tinystories_config
from ilm_jax.data import pipeline, storage
from ilm_jax.data import tokenizers as tokenizer_lib
from ilm_jax.runs import run_file
from ilm_jax.special_tokens import BOS, CLS
from ilm_jax.tasks.text import corpora
from ilm_jax.tasks.text import task as text


@pytest.fixture(scope='module')
def corpus(tmp_path_factory):
  return write_corpus(tmp_path_factory.mktemp('corpus'))


@pytest.fixture(scope='module')
def cache(tmp_path_factory):
  return tmp_path_factory.mktemp('cache')


@pytest.fixture(scope='module')
def tokenizer():
  return tokenizer_lib.train_sentencepiece((line for s in stories(60, seed=7) for line in s.split('\n')), size=330)


def without_spaces(content: str) -> str:
  return ''.join(content.split())


# --- cutting ----------------------------------------------------------------------------------------------------------


class Letters:
  """A tokenizer that makes one token of each letter and ignores whitespace."""

  def encode_with_offsets(self, text):
    at = [i for i, letter in enumerate(text) if not letter.isspace()]
    return [ord(text[i]) for i in at], [(i, i + 1) for i in at]

  def encode(self, text):
    return self.encode_with_offsets(text)[0]


class Pairs(Letters):
  """A tokenizer: one token for every two characters in texts of more than 12 characters, else for each character."""

  def encode_with_offsets(self, text):
    size = 2 if len(text) > 12 else 1
    spans = [(i, min(i + size, len(text))) for i in range(0, len(text), size)]
    return [ord(text[start]) for start, _ in spans], spans


@pytest.mark.parametrize(
  ('whole', 'limit', 'pieces'),
  [
    ('Aa. Bb.', 6, ['Aa. Bb.']),
    ('Aa. Bb.', 5, ['Aa.', 'Bb.']),
    ('Aa. "Bb!" Cc', 9, ['Aa. "Bb!"', 'Cc']),
    ('Aa. Bbb bbb bbb bbb', 11, ['Aa. Bbb bbb', 'bbb bbb']),
    ('line\nline two here', 10, ['line\nline', 'two here']),
    ('a line\nto cut', 8, ['a line', 'to cut']),
    ('a  \n b', 1, ['a', 'b']),
    ('abcdefghij', 4, ['abcd', 'efgh', 'ij']),
    ('Aa.b cc. Dd', 7, ['Aa.b cc.', 'Dd']),
  ],
)
def test_a_long_text_is_cut_after_a_sentence_or_if_impossible_after_a_word(whole, limit, pieces):
  assert [piece for piece, _ in text.pieces_of(whole, Letters(), limit)] == pieces


def test_a_text_piece_that_has_more_tokens_when_encoded_alone_is_shortened_to_the_token_limit():
  pieces = list(text.pieces_of('abcdefghijklmnopqrstuvwxyz', Pairs(), 5))
  assert [piece for piece, _ in pieces] == ['abcde', 'fghij', 'klmno', 'pqrst', 'uvwxy', 'z']
  assert [''.join(map(chr, ids)) for _, ids in pieces] == [piece for piece, _ in pieces]


def test_pieces_of_a_cut_text_respect_the_token_limit_and_lose_only_whitespace(tokenizer):
  rng = np.random.default_rng(0)
  for _ in range(30):
    parts = stories(int(rng.integers(1, 12)), seed=int(rng.integers(99)))
    whole = ' '.join(parts).replace('. ', rng.choice(['. ', '  ', '日本 ']))
    limit = int(rng.integers(5, 60))
    pieces = list(text.pieces_of(whole, tokenizer, limit))
    assert all(0 < len(ids) <= limit for _, ids in pieces)
    assert without_spaces(''.join(piece for piece, _ in pieces)) == without_spaces(whole)
    for piece, ids in pieces:
      assert tokenizer.decode(ids) == piece or len(ids) == limit
      assert ids == tokenizer.encode(piece)[:limit]


def test_very_long_texts_and_characters_with_many_byte_tokens_are_cut(tokenizer):
  whole = ' '.join(stories(60)) * 8
  lengths = []

  class Watched:
    encode_with_offsets = tokenizer.encode_with_offsets

    def encode(self, window):
      lengths.append(len(window))
      return tokenizer.encode(window)

  pieces = list(text.pieces_of(whole, Watched(), 50))
  assert max(lengths) <= 50 * text.WINDOW < len(whole)
  assert without_spaces(''.join(piece for piece, _ in pieces)) == without_spaces(whole)
  # Each of these characters has more than two byte tokens, so its tokens are truncated to the limit of two.
  assert [(piece, len(ids)) for piece, ids in text.pieces_of('日本', tokenizer, 2)] == [('日', 2), ('本', 2)]
  spaces = 'a' + ' ' * 9_999 + 'b'  # the part of the text that is encoded grows until it has more than one token
  assert [piece.split() for piece, _ in text.pieces_of(spaces, Letters(), 1)] == [['a'], ['b']]


# --- examples ---------------------------------------------------------------------------------------------------------


def test_a_text_example_consists_of_cls_bos_and_the_tokens_of_the_text(corpus, cache):
  cfg = task_config(corpus, cache)
  tokenizer = text.tokenizer(cfg)
  sources = {split: text.Source(cfg, split) for split in corpora.SPLITS}
  for source in sources.values():
    assert not source.endless
    for i in range(len(source)):
      example = source[i]
      assert example['tokens'].dtype == np.int32 and example['tokens'][:2].tolist() == [CLS, BOS]
      assert example['fixed'].tolist() == [True, True] + [False] * (len(example['tokens']) - 2)
      assert tokenizer.decode(example['tokens']) == text.decode(example['tokens'], cfg) == source.text(i)
  texts = {split: all_texts(source) for split, source in sources.items()}
  assert sorted(texts['train']) == sorted(stories(60))
  assert sorted(texts['validation'] + texts['test']) == sorted(stories(24, seed=1))
  tokens = sum(len(tokenizer.encode(story)) for story in stories(60))
  assert sources['train'].counts == {'documents': 60, 'tokens': tokens, 'cut': 0, 'without_tokens': 0}
  for limit, count in ((7, 7), (10_000, 60)):
    assert all_texts(text.Source(task_config(corpus, cache, num_train=limit), 'train')) == texts['train'][:count]


def test_the_rest_of_a_long_document_is_dropped_or_becomes_further_examples(corpus, cache):
  tokenizer = text.tokenizer(task_config(corpus, cache))
  lengths = [len(tokenizer.encode(story)) for story in stories(60)]
  limit = int(np.median(lengths))
  for split_long_documents in (False, True):
    source = text.Source(
      task_config(corpus, cache, length=limit + 2, split_long_documents=split_long_documents), 'train'
    )
    assert source.counts['documents'] == 60 and source.counts['cut'] == sum(length > limit for length in lengths)
    assert max(len(source[i]['tokens']) for i in range(len(source))) <= limit + 2
    pieces = all_texts(source)
    assert all(any(piece in story for story in stories(60)) for piece in pieces)
    if split_long_documents:
      assert len(pieces) > 60
      assert sum(len(without_spaces(piece)) for piece in pieces) == sum(len(without_spaces(s)) for s in stories(60))
    else:
      assert len(pieces) == 60


def test_documents_without_tokens_are_skipped_with_a_warning(tmp_path, caplog):
  lines = [json.dumps({'text': t}) for t in [*stories(30), '', '\u200b \u200b']]
  (tmp_path / 'train.jsonl').write_text('\n'.join(lines))
  (tmp_path / 'valid.jsonl').write_text('\n'.join(json.dumps({'text': t}) for t in stories(9, seed=3)))
  vocab = ['[UNK]', *'abcdefghijklmnopqrstuvwxyz', *(f'##{c}' for c in 'abcdefghijklmnopqrstuvwxyz')]
  (tmp_path / 'vocab.model.txt').write_text('\n'.join(vocab))
  cfg = task_config(tmp_path, tmp_path / 'cache')
  cfg.tokenizer.path = str(tmp_path / 'vocab.model.txt')
  source = text.Source(cfg, 'train')
  assert len(source) == 30 and source.counts['without_tokens'] == 2
  (line,) = [line for line in caplog.messages if 'no tokens' in line]
  assert 'skipped 2 documents' in line and f'document 31 of {tmp_path / "train.jsonl"}' in line


def test_names_of_special_tokens_in_a_prompt_are_encoded_as_ordinary_characters(corpus, cache):
  cfg = task_config(corpus, cache)
  whole = 'Mara said [CLS] and [MASK], then <|endoftext|>.'
  ids = text.encode_prompt(whole, cfg)
  assert ids[:2] == [CLS, BOS] and min(ids[2:]) >= 7
  assert text.decode(ids, cfg) == whole
  assert text.encode_prompt('', cfg) == [CLS, BOS]


def test_the_tokenizer_is_trained_on_a_uniform_sample_of_documents_that_depends_on_the_seed():
  settings = text_config.get_config('small').task.tokenizer
  settings.documents = 20
  texts = [str(i) for i in range(100)]
  drawn = corpora.sample_uniformly(iter(texts), settings.documents, settings.seed)
  assert len(set(drawn)) == 20 and drawn == sorted(drawn, key=int) == corpora.sample_uniformly(
    iter(texts), settings.documents, settings.seed
  )
  counts = np.zeros(100)
  for seed in range(300):
    settings.seed = seed
    counts[[int(one) for one in corpora.sample_uniformly(iter(texts), settings.documents, settings.seed)]] += 1
  assert counts.sum() == 6_000 and counts.min() > 30 and counts.max() < 95
  settings.documents = 1_000
  assert corpora.sample_uniformly(iter(texts), settings.documents, settings.seed) == texts


# --- preparation on disk ----------------------------------------------------------------------------------------------


def forbid_preparation(monkeypatch):
  """Make corpus preparation and tokenizer training fail, and clear the tokenizers cached in this process."""
  monkeypatch.setattr(text, 'prepare', None)
  monkeypatch.setattr(tokenizer_lib, 'train_sentencepiece', None)
  monkeypatch.setattr(text, '_TOKENIZERS', {})


def file_names(folder) -> set[str]:
  """Return the paths of all files below a folder, relative to the folder."""
  return {str(path.relative_to(folder)) for path in folder.rglob('*') if path.is_file()}


def test_a_prepared_split_is_reopened_and_unpickled_without_preparing_it_again(corpus, cache, monkeypatch):
  cfg = task_config(corpus, cache)
  first = text.Source(cfg, 'train')
  forbid_preparation(monkeypatch)
  assert all_texts(text.Source(cfg, 'train')) == all_texts(pickle.loads(pickle.dumps(first))) == all_texts(first)


def test_preparation_leaves_no_temporary_folders(corpus, tmp_path, monkeypatch):
  monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path / 'temporary'))
  (tmp_path / 'temporary').mkdir()
  assert len(text.Source(task_config(corpus, tmp_path / 'cache'), 'train')) == 60
  assert not list((tmp_path / 'temporary').iterdir())


def test_only_one_of_several_processes_that_share_a_cache_prepares_the_data(corpus, tmp_path, monkeypatch):
  calls, wait, results = [], threading.Barrier(3), []
  prepare = text.prepare
  monkeypatch.setattr(text, 'prepare', lambda *args: calls.append(args[1]) or prepare(*args))
  cfg = task_config(corpus, tmp_path)
  text.tokenizer(cfg)

  def start():  # each thread opens the lock file itself, so threads wait for each other as processes would
    wait.wait()
    results.append(all_texts(text.Source(cfg, 'test')))

  threads = [threading.Thread(target=start) for _ in range(3)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert calls == ['test'] and len(results) == 3 and results[0] == results[1] == results[2]


def test_without_file_locks_the_cache_keeps_the_data_of_the_process_that_finishes_first(tmp_path, monkeypatch):
  def no_locks(*_):
    raise OSError(errno.ENOLCK, 'No locks available')

  monkeypatch.setattr(storage.fcntl, 'flock', no_locks)

  def make(folder):
    (folder / 'file').write_text('slow')
    storage.once(tmp_path, 'place', lambda other: (other / 'file').write_text('fast'))  # a faster process, simulated

  assert (storage.once(tmp_path, 'place', make) / 'file').read_text() == 'fast'
  assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ['place']


def test_separate_caches_and_no_cache_give_the_same_tokenizer_and_examples(corpus, tmp_path, monkeypatch):
  results = []
  for cache in (tmp_path / 'a', tmp_path / 'b', ''):
    monkeypatch.setattr(text, '_TOKENIZERS', {})
    sources = [text.Source(task_config(corpus, cache), split) for split in corpora.SPLITS]
    results.append([(source.text(i), source[i]['tokens'].tolist()) for source in sources for i in range(len(source))])
  assert results[0] == results[1] == results[2]
  assert file_names(tmp_path / 'a') == file_names(tmp_path / 'b')  # names contain a hash of the tokenizer fingerprint


def test_an_interrupted_preparation_leaves_no_files_except_locks(corpus, tmp_path, monkeypatch):
  cfg = task_config(corpus, tmp_path)
  text.tokenizer(cfg)
  before = file_names(tmp_path)

  def interrupted(*args):
    yield 'one', [7]
    raise KeyboardInterrupt

  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(text, 'prepare', interrupted)
    text.Source(cfg, 'train')
  assert {name for name in file_names(tmp_path) - before if '.lock' not in name} == set()
  # A killed process leaves an unfinished folder, which the next preparation removes.
  name = next(path.name for path in tmp_path.glob('.text-train-*.lock')).removeprefix('.').removesuffix('.lock')
  killed = tmp_path / f'.{name}.part-1-2'
  (killed / 'documents').mkdir(parents=True)
  assert len(text.Source(cfg, 'train')) == 60 and not killed.exists()


def test_errors_for_damaged_prepared_files_say_which_folder_to_remove(corpus, tmp_path):
  full = text_config.get_config('small')
  full.task = cfg = task_config(corpus, tmp_path)

  def read_in_a_thread():
    list(pipeline.train_batches(text.Source(cfg, 'train'), lambda rng, example, *_: example, full, start=0, stop=1))

  assert len(text.Source(cfg, 'train')) == 60
  (file,) = tmp_path.glob('text-train-*/**/*.array_record*')
  content = file.read_bytes()
  for damaged in (content[: len(content) // 2], content[:300] + b'\0' * 200 + content[500:], b'', None):
    file.unlink() if damaged is None else file.write_bytes(damaged)
    for read in (lambda: all_texts(text.Source(cfg, 'train')), read_in_a_thread):
      with refused(str(next(tmp_path.glob('text-train-*'))), 'remove that folder', 'rebuild'):
        read()


def test_preparation_logs_its_progress(corpus, tmp_path, monkeypatch, caplog):
  monkeypatch.setattr(storage, 'REPORT_SECONDS', 0)
  caplog.set_level(logging.INFO, 'absl')
  text.Source(task_config(corpus, tmp_path), 'train')
  lines = [line for line in caplog.messages if line.startswith('preparing text small, train: ')]
  assert max(int(line.split(': ')[1].split(' %')[0]) for line in lines) >= 95
  assert all(' documents, ' in line for line in lines)
  assert all(' a second' in line for line in lines) and any(line.endswith(' left') for line in lines)


def test_a_cache_in_a_bucket_is_built_by_one_machine_and_rebuilt_if_incomplete(corpus, tmp_path, monkeypatch):
  bucket = tmp_path / 'bucket'
  fake = types.SimpleNamespace(Path=lambda path: epath.Path(str(path).replace('gs://bucket', str(bucket))))
  for module in (storage, text):
    monkeypatch.setattr(module, 'epath', fake)
  monkeypatch.setattr(paths, '_installed', lambda package: True)

  def read_on(machine):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / machine))
    return all_texts(text.Source(task_config(corpus, 'gs://bucket/cache'), 'train'))

  first = read_on('one')
  assert sorted(first) == sorted(stories(60))
  with monkeypatch.context() as patch:
    forbid_preparation(patch)
    assert read_on('two') == read_on('two') == first
  for marker in (bucket / 'cache').glob(f'*/{storage.WHOLE}'):
    marker.unlink()  # simulates an interrupted upload
  for file in (bucket / 'cache').rglob('*array_record*'):
    file.write_bytes(b'')
  assert read_on('three') == first


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ('files', 'path', 'split', 'parts'),
  [
    ({}, 'none', 'train', ['none', 'does not exist']),
    (
      {'image.png': '?', 'empty.txt': ''},
      '.',
      'train',
      ['holds no text', 'found: empty.txt is empty, image.png has an unknown ending'],
    ),
    ({'empty.txt': ''}, 'empty.txt', 'train', ['empty.txt', 'holds no text']),
    ({'all.json': '[{"text": "one"}]'}, 'all.json', 'train', ['has an unknown ending', '*.jsonl']),
    ({'empty.txt': ' \n<|endoftext|>\n'}, '.', 'train', ['the train split is empty']),
    ({'two.txt': '\n<|endoftext|>\n'.join(stories(2))}, 'two.txt', 'validation', ['the validation split is empty']),
  ],
)
def test_errors_for_missing_or_empty_corpora_name_the_path(tmp_path, cache, files, path, split, parts):
  for name, content in files.items():
    (tmp_path / name).write_text(content)
  with refused(f'data.path={tmp_path}', *parts):
    text.Source(task_config(tmp_path / path, cache), split)


@pytest.mark.parametrize(
  ('changes', 'part'),
  [
    ({'length': 2}, 'task.length=2'),
    ({'documents': 'page'}, "task.documents='page'"),
    ({'source': 'wikipedia'}, "task.source='wikipedia'"),
  ],
)
def test_invalid_settings_of_the_text_task_are_refused(corpus, cache, changes, part):
  with refused(part, 'expected'):
    text.Source(task_config(corpus, cache, **changes), 'train')


def test_every_path_in_a_text_config_may_start_with_a_tilde_or_file_scheme(corpus, tokenizer, tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  shutil.copytree(corpus, tmp_path / 'corpus')
  tokenizer.save(tmp_path / 'words')
  with tarfile.open(tmp_path / 'corpus.tar.gz', 'w:gz') as archive:
    archive.add(corpus, 'corpus')
  results = []
  for start in ('~/', f'file://{tmp_path}/'):
    for name in ('corpus', 'corpus.tar.gz'):
      cfg = task_config(start + name, start + 'cache')
      cfg.tokenizer.path = start + 'words'
      results.append(all_texts(text.Source(cfg, 'validation')))
      assert text.tokenizer(cfg).fingerprint == tokenizer.fingerprint
  assert results[0] and results.count(results[0]) == 4
  assert {path.name for path in tmp_path.iterdir()} == {'cache', 'corpus', 'corpus.tar.gz', 'words'}


@pytest.mark.parametrize('setting', ['data.path', 'task.cache', 'task.tokenizer.path'])
def test_unknown_url_schemes_and_missing_bucket_packages_are_errors(corpus, tmp_path, monkeypatch, setting):
  monkeypatch.setattr(paths, '_installed', lambda package: False)
  monkeypatch.setattr(text, '_TOKENIZERS', {})
  for path, part in (('gss://b/x', 'unknown scheme gss://'), ('gs://b/x.tar.gz', "pip install 'ilm_jax[gcs]'")):
    cfg = task_config(path if setting == 'data.path' else corpus, path if setting == 'task.cache' else tmp_path)
    cfg.tokenizer.path = path if setting == 'task.tokenizer.path' else ''
    with refused(f'{setting}={path}', part):
      text.Source(cfg, 'train')


def test_the_error_for_an_unwritable_cache_folder_names_the_setting_task_cache(corpus, tmp_path, monkeypatch):
  (tmp_path / 'file').write_text('')
  monkeypatch.setattr(text, '_TOKENIZERS', {})
  with refused('task.cache', 'could not be written'):
    text.Source(task_config(corpus, tmp_path / 'file'), 'test')


def test_a_full_disk_raises_a_user_error_but_other_errors_are_not_converted(corpus, tmp_path, monkeypatch):
  cfg = task_config(corpus, tmp_path)
  text.tokenizer(cfg)

  def full(*_):
    raise RuntimeError('Failed to write: No space left on device')

  with monkeypatch.context() as patch, refused('task.cache', 'No space left on device', 'free some disk space'):
    patch.setattr(array_record_module.ArrayRecordWriter, 'write', full)
    text.Source(cfg, 'train')

  def broken(*_):
    yield 'one', [7]
    raise RecursionError('a subclass of RuntimeError that is raised while examples are prepared')

  monkeypatch.setattr(text, 'prepare', broken)
  with pytest.raises(RecursionError):
    text.Source(cfg, 'train')


# --- configs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('module', [text_config, tinystories_config, lm1b_config])
@pytest.mark.parametrize('name', text_config.VARIANTS)
def test_text_configs_have_consistent_lengths_and_minimize_the_validation_loss(module, name):
  cfg = module.get_config(name)
  assert cfg.sampling.max_length == cfg.corrupt.length == text.TASK.longest(cfg.task) <= cfg.data.row_length
  assert (cfg.eval.metric, cfg.eval.mode) == ('loss', 'min')
  with pytest.raises(ValueError, match='expected one of small, full'):
    module.get_config('tiny')


def test_a_single_flag_sets_the_corpus_path_or_the_length_everywhere_in_the_config(monkeypatch):
  argv = [f'--config={ROOT}/configs/tinystories.py:small', '--config.data.path=/some/where', '--config.task.length=99']
  monkeypatch.setattr(sys, 'argv', ['main', *argv])  # config_flags reads overrides from sys.argv
  values = flags.FlagValues()
  config_flags.DEFINE_config_file('config', None, flag_values=values)
  values(sys.argv)
  cfg = values.config
  assert cfg.task.corpus == '/some/where' and run_file.as_json(cfg)['task']['corpus'] == '/some/where'
  assert cfg.sampling.max_length == cfg.corrupt.length == 99


@needs_real_text
@pytest.mark.parametrize(('module', 'name'), [(tinystories_config, 'tinystories'), (lm1b_config, 'lm1b')])
def test_real_text_is_unchanged_by_preparation_and_tokenization(module, name, tmp_path):
  (tmp_path / 'corpus').mkdir()
  for file in (DATA / name).iterdir():
    lines = file.read_bytes().splitlines(keepends=True)
    (tmp_path / 'corpus' / file.name).write_bytes(b''.join(lines[:1_500]))
  cfg = module.get_config('small')
  cfg.task.update({'corpus': str(tmp_path / 'corpus'), 'cache': str(tmp_path / 'cache')})
  cfg.task.tokenizer.size = 1_000
  for split in corpora.SPLITS:
    source = text.Source(cfg.task, split)
    for i in range(min(50, len(source))):
      assert text.decode(source[i]['tokens'], cfg.task) == source.text(i)
