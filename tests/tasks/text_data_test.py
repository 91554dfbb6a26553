"""Tests of the text task when its data change: edited files, resumed runs, and characters that occur rarely."""

import os

import pytest
from text_helpers import all_texts, refused, stories, task_config, write, write_corpus

from ilm_jax.data import file_hashes
from ilm_jax.tasks.text import corpora, task


@pytest.fixture(autouse=True)
def forget_tokenizers(monkeypatch):
  """Make each test load its tokenizers from its own cache."""
  monkeypatch.setattr(task, '_TOKENIZERS', {})


def prepare(corpus, cache):
  """Train a tokenizer on a corpus; return its fingerprint and the training texts of the corpus."""
  task._TOKENIZERS.clear()
  cfg = task_config(corpus, cache)
  return task.tokenizer(cfg).fingerprint, all_texts(task.Source(cfg, 'train'))


def replace(file, old: str, new: str):
  """Replace text in a file without changing the file's size or modification time."""
  times = file.stat()
  file.write_text(file.read_text().replace(old, new))
  os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
  assert file.stat().st_size == times.st_size


def test_an_edited_file_with_unchanged_size_and_modification_time_is_read_again(tmp_path):
  corpus, cache = write_corpus(tmp_path / 'corpus'), tmp_path / 'cache'
  before, texts = prepare(corpus, cache)
  replace(corpus / 'my-train.txt', 'Mara', 'Nora')
  after, new_texts = prepare(corpus, cache)
  assert after != before and sorted(new_texts) == sorted(text.replace('Mara', 'Nora') for text in texts) != sorted(
    texts
  )


def test_a_second_folder_with_the_same_text_reuses_the_prepared_data(tmp_path):
  cache = tmp_path / 'cache'
  prepare(write_corpus(tmp_path / 'one'), cache)
  entries = sorted(cache.iterdir())
  two = write_corpus(tmp_path / 'two')
  os.utime(two / 'my-train.txt', (1, 1))
  prepare(two, cache)
  assert sorted(cache.iterdir()) == entries


def test_a_resumed_run_warns_if_its_corpus_has_changed(tmp_path, caplog):
  corpus, run = write_corpus(tmp_path / 'corpus'), tmp_path / 'run'
  cfg = task_config(corpus, tmp_path / 'cache')
  for _ in range(2):
    task.save_assets(cfg, run)
  assert (run / file_hashes.RECORD).exists() and 'changed' not in caplog.text
  replace(corpus / 'my-valid.txt', 'Mara', 'Nora')
  write(corpus / 'more-train.txt', stories(3, seed=9))
  task.save_assets(cfg, run)
  (line,) = [line for line in caplog.messages if 'has changed' in line]
  assert str(corpus) in line and line.endswith(': more-train.txt is new, my-valid.txt has other content')


def test_every_character_of_the_training_text_is_a_token_although_the_tokenizer_is_trained_on_a_sample(tmp_path):
  corpus = write_corpus(tmp_path)
  with (corpus / 'my-train.txt').open('a', encoding='utf-8') as file:
    file.write('She said: “Ça va, 日本 🙂?”\n<|endoftext|>\n')
  cfg = task_config(corpus, tmp_path / 'cache')
  cfg.tokenizer.documents = 1
  words = task.tokenizer(cfg)
  for text in stories(60) + ['She said: “Ça va, 日本 🙂?”']:
    assert not set(words.encode(text)) & set(words.byte_ids)
  assert len(words.encode('日本🙂')) == 3


@pytest.mark.parametrize(('name', 'value', 'least'), [('seed', -1, 0), ('documents', 0, 1), ('size', -7, 1)])
def test_settings_of_the_tokenizer_below_their_minimum_are_refused(tmp_path, name, value, least):
  cfg = task_config(write_corpus(tmp_path), tmp_path / 'cache')
  cfg.tokenizer[name] = value
  with refused(f'task.tokenizer.{name}={value}', f'at least {least}'):
    task.tokenizer(cfg)


def test_a_tokenizer_of_more_than_a_million_tokens_is_refused(tmp_path):
  cfg = task_config(write_corpus(tmp_path), tmp_path / 'cache')
  cfg.tokenizer.size = 10**12
  with refused('task.tokenizer.size=1000000000000: expected at most 1,000,000'):
    task.tokenizer(cfg)


def test_tokenizer_seeds_that_are_equal_modulo_2_to_the_32_choose_different_documents():
  chosen = [corpora.sample_uniformly(range(1_000), 20, seed) for seed in (1, 1 + 2**32, 1 + 2**64)]
  assert chosen[0] != chosen[1] != chosen[2] != chosen[0]
