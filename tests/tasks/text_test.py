"""Text: files and splits, documents, cutting, preparing, the tokenizer of a run, whole runs; and input that is bad."""

import contextlib
import errno
import functools
import hashlib
import http.server
import io
import itertools
import json
import logging as std_logging
import os
import pathlib
import pickle
import pwd
import shutil
import signal
import sys
import tarfile
import threading
import types

import numpy as np
import pytest
import small
from absl import flags, logging
from array_record.python import array_record_module
from etils import epath
from ml_collections import config_flags

import ilm_jax
from ilm_jax.configs import lm1b as lm1b_config
from ilm_jax.configs import text as config
from ilm_jax.configs import tinystories as tinystories_config
from ilm_jax.data import pipeline, storage
from ilm_jax.data import tokenizers as tokenizer_lib
from ilm_jax.distributed import sharding
from ilm_jax.evaluation import evaluate
from ilm_jax.models import transformer
from ilm_jax.runs import checkpoint, logs, run_file
from ilm_jax.special_tokens import BOS, CLS
from ilm_jax.tasks.text import corpora
from ilm_jax.tasks.text import task as text
from ilm_jax.training import experiment, loop
from ilm_jax.types import UserError

ROOT = pathlib.Path(__file__).parents[2]
DATA = pathlib.Path(os.environ.get('ILM_JAX_DATA') or ROOT.parent / 'shared' / 'data')
real_text = pytest.mark.skipif(not DATA.is_dir(), reason='no ../shared/data, no ILM_JAX_DATA')


def stories(count: int, seed: int = 0) -> list[str]:
  """Small stories, all different."""
  rng = np.random.default_rng(seed)
  names, things = ['Mara', 'Odd', 'Piet', 'Ulla'], ['a boat', 'the goat', 'one red kite', 'an old map', 'two pears']
  verbs = ['found', 'sold', 'carried', 'lost', 'painted']

  def sentence():
    return f'{rng.choice(names)} {rng.choice(verbs)} {rng.choice(things)}.'

  return [f'Day {seed}-{i}: {sentence()} {sentence()}\n"{sentence()}" So it went{"!" * (i % 3)}' for i in range(count)]


def write(path: pathlib.Path, texts) -> pathlib.Path:
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(''.join(f'{text}\n<|endoftext|>\n' for text in texts), 'utf-8')
  return path


@pytest.fixture(scope='module')
def corpus(tmp_path_factory):
  """A folder with two files whose names say the split."""
  folder = tmp_path_factory.mktemp('corpus')
  write(folder / 'my-train.txt', stories(60))
  write(folder / 'my-valid.txt', stories(24, seed=1))
  return folder


@pytest.fixture(scope='module')
def cache(tmp_path_factory):
  return tmp_path_factory.mktemp('cache')


def task(path, cache='', **changes):
  cfg = config.get_config('small').task
  cfg.update({'corpus': str(path), 'cache': str(cache), 'length': 160, 'split_long_documents': False, **changes})
  cfg.tokenizer.size = 330
  return cfg


def bare(whole: str) -> str:
  return ''.join(whole.split())


def all_of(source) -> list[str]:
  return [source.text(i) for i in range(len(source))]


def one_line(error, *parts):
  assert '\n' not in str(error.value)
  for part in parts:
    assert part in str(error.value), f'{part!r} is not in {error.value}'


@contextlib.contextmanager
def logged():
  """The lines that are logged."""
  lines, handler = [], std_logging.Handler()
  handler.emit = lambda record: lines.append(record.getMessage())
  std_logging.getLogger('absl').addHandler(handler)
  verbosity = logging.get_verbosity()
  logging.set_verbosity(logging.INFO)
  try:
    yield lines
  finally:
    std_logging.getLogger('absl').removeHandler(handler)
    logging.set_verbosity(verbosity)


# --- files and splits -------------------------------------------------------------------------------------------------


def found(tmp_path, *names) -> dict[str, list[str]]:
  """What `find` makes of a folder with such files."""
  for name in names:
    file = tmp_path / 'folder' / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text('one\n')
  corpus = corpora.find(str(tmp_path / 'folder'))
  return {split: [file.name for file in files] for split, files in corpus.files.items()}, corpus.shared


def test_the_official_stories_are_told_by_their_names(tmp_path):
  files, shared = found(tmp_path, 'TinyStoriesV2-GPT4-train.txt', 'TinyStoriesV2-GPT4-valid.txt', 'README.md')
  assert files['train'] == ['TinyStoriesV2-GPT4-train.txt']
  assert files['validation'] == files['test'] == ['TinyStoriesV2-GPT4-valid.txt']
  assert shared == dict.fromkeys(('validation', 'test'), ('validation', 'test'))


def test_a_cache_inside_the_corpus_is_no_part_of_it(tmp_path):
  (tmp_path / 'a.txt').write_text('the dog ran')
  for name, mark in (('data/1.0.0', 'dataset_info.json'), ('words', 'ilm_tokenizer.json')):
    folder = tmp_path / name
    folder.mkdir(parents=True)
    (folder / mark).write_text('{}')
    (folder / 'x-00000-of-00001').write_bytes(b'\xff')
    (folder / 'vocab.txt').write_text('the')
  assert [file.name for file in corpora.find(str(tmp_path)).files['train']] == ['a.txt']


def test_the_official_shards_are_told_by_their_folders_and_names(tmp_path):
  train_, held = 'training-monolingual.tokenized.shuffled', 'heldout-monolingual.tokenized.shuffled'
  shards = [f'{train_}/news.en-0000{i}-of-00100' for i in (1, 2)]
  heldout = [f'{held}/news.en.heldout-0000{i}-of-00050' for i in (0, 1)]
  files, _ = found(tmp_path, *[f'{corpora.ARCHIVE}/{name}' for name in shards + heldout], f'{corpora.ARCHIVE}/README')
  assert files['train'] == [f'{corpora.ARCHIVE}/{name}' for name in shards]
  assert files['validation'] == files['test'] == [f'{corpora.ARCHIVE}/{name}' for name in heldout]


def test_a_named_test_set_is_the_test_set(tmp_path):
  files, shared = found(tmp_path, 'a.train.jsonl', 'a.dev.jsonl', 'a.test.jsonl', 'latest-notes.txt')
  assert files == {'train': ['a.train.jsonl'], 'validation': ['a.dev.jsonl'], 'test': ['a.test.jsonl']}
  assert not shared


@pytest.mark.parametrize(
  'names', [['all.txt'], ['heldout_s10-11.dev.tokens'], ['a.txt', 'b.txt'], ['train.txt', 'b.txt']]
)
def test_without_both_names_a_hash_decides(tmp_path, names):
  files, shared = found(tmp_path, *names)
  assert files == dict.fromkeys(corpora.SPLITS, sorted(names))
  assert shared == dict.fromkeys(corpora.SPLITS, corpora.SPLITS)


@pytest.mark.parametrize('name', ['held_out.txt', 'held-out.txt', 'heldout.txt', 'eval.txt', 'my_val.txt', 'VALID.txt'])
def test_what_is_held_out_may_be_called_many_ways(tmp_path, name):
  files, shared = found(tmp_path, 'train.txt', name, 'retrieval-notes.txt')
  assert files == {'train': ['train.txt'], 'validation': [name], 'test': [name]} and len(shared) == 2


def test_names_that_say_only_half_are_warned_of(tmp_path):
  with logged() as lines:
    found(tmp_path, 'train.txt', 'later.txt')
  (line,) = lines
  assert 'later.txt, train.txt do not say both' in line and 'all are shared among the splits' in line


def test_a_file_of_nobody_is_read(tmp_path, monkeypatch):
  monkeypatch.setattr(pwd, 'getpwuid', lambda uid: {}[f'uid not found: {uid}'])  # as in a container without its owner
  path = write(tmp_path / 'a.txt', stories(3))
  (file,) = corpora.find(str(path)).files['train']
  assert (file.size, file.changed) == (path.stat().st_size, int(path.stat().st_mtime))


def test_the_hash_gives_each_document_one_split(tmp_path):
  texts = stories(3_000)
  corpus = corpora.find(str(write(tmp_path / 'all.txt', [*texts, *texts[:100]])))
  splits = {split: [t for _, t in corpora.documents(corpus, split, 'endoftext')] for split in corpora.SPLITS}
  assert sorted(itertools.chain(*splits.values())) == sorted([*texts, *texts[:100]])
  assert not any(set(splits[a]) & set(splits[b]) for a in splits for b in splits if a < b)
  assert 0.935 < len(splits['train']) / 3_100 < 0.965
  assert 40 < len(splits['validation']) < 115 and 40 < len(splits['test']) < 115
  expected = {0: 'validation', 1: 'test'}
  for split, found in splits.items():
    for one in found:
      bucket = int(hashlib.blake2b(one.encode(), digest_size=8).hexdigest(), 16) % 40
      assert expected.get(bucket, 'train') == split


def test_held_out_documents_are_shared_in_halves(tmp_path):
  texts = stories(400)
  write(tmp_path / 'train.txt', stories(10, seed=2))
  write(tmp_path / 'valid.txt', texts)
  corpus = corpora.find(str(tmp_path))
  halves = [[t for _, t in corpora.documents(corpus, split, 'endoftext')] for split in ('validation', 'test')]
  assert sorted(itertools.chain(*halves)) == sorted(texts)
  assert 150 < len(halves[0]) < 250


# --- documents --------------------------------------------------------------------------------------------------------


def read(tmp_path, content, mode='endoftext', name='all.txt') -> list[str]:
  (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
  return [text for _, text in corpora.read(corpora.find(str(tmp_path / name)).files['train'][0], mode)]


@pytest.mark.parametrize(
  ('content', 'mode', 'expected'),
  [
    ('one\ntwo\n<|endoftext|>\nthree', 'endoftext', ['one\ntwo', 'three']),
    ('<|endoftext|>\n\n<|endoftext|>\n \n', 'endoftext', []),
    (
      'a <|endoftext|> b\n<|endoftext|>c\n  <|endoftext|> \nd\n',
      'endoftext',
      ['a <|endoftext|> b\n<|endoftext|>c', 'd'],
    ),
    ('one\n\n\ntwo\n  \nthree\nfour\n', 'endoftext', ['one\n\n\ntwo\n  \nthree\nfour']),
    ('one\n\n\ntwo\n  \nthree\nfour\n', 'paragraph', ['one', 'two', 'three\nfour']),
    ('one\n\n two \nthree', 'line', ['one', 'two', 'three']),
    ('one\r\ntwo\r\n<|endoftext|>\r\nthree\r\n', 'endoftext', ['one\ntwo', 'three']),
    ('\ufeffone\n\ufefftwo', 'line', ['one', '\ufefftwo']),
  ],
)
def test_documents_end_where_the_setting_says(tmp_path, content, mode, expected):
  assert read(tmp_path, content, mode) == expected


def test_stories_are_what_a_plain_split_gives(tmp_path):
  texts = stories(50)
  file = write(tmp_path / 'all.txt', texts)
  assert read(tmp_path, file.read_text()) == file.read_text().removesuffix('\n<|endoftext|>\n').split(
    '\n<|endoftext|>\n'
  )


def test_json_lines_give_their_text(tmp_path):
  lines = [{'text': 'one\ntwo', 'id': 3}, {'text': '<|endoftext|>'}, {'text': ' é '}, {'text': ''}]
  content = '\n'.join([json.dumps(lines[0]), '', *map(json.dumps, lines[1:])])
  assert read(tmp_path, content, name='all.jsonl') == ['one\ntwo', '<|endoftext|>', 'é', '']


@pytest.mark.parametrize(
  'line',
  ['{"text": 3}', '{"txt": "a"}', '["text"]', 'text', '{"text": "a"', 'null', '{"text": "\\ud800"}', '[' * 9_999],
)
def test_a_broken_line_of_json_is_named(tmp_path, line):
  with pytest.raises(UserError) as error:
    read(tmp_path, f'{{"text": "fine"}}\n\n{line}\n', name='all.jsonl')
  one_line(error, 'all.jsonl, line 3', '"text"')


@pytest.mark.parametrize('name', ['all.txt', 'all.jsonl'])
@pytest.mark.parametrize('end', ['\n', '\r\n'])
def test_what_is_no_utf8_is_named_with_its_byte(tmp_path, name, end):
  content = end.join(['{"text": "é"}', '{"text": "é"}', '{"text": "']).encode() + b'\xff'
  with pytest.raises(UserError) as error:
    read(tmp_path, content, name=name)
  one_line(error, name, f'not UTF-8: byte {len(content) - 1} is 0xff')


@pytest.mark.parametrize(
  ('tokenised', 'plain'),
  [
    ("But now , she isn 't sure .", "But now, she isn't sure."),
    ('" Go on , " he said .', '"Go on," he said.'),
    ('It cost $ 2,900 , or £ 20 ( 3 % ) .', 'It cost $2,900, or £20 (3%).'),
    ("Who ? The baker 's ; no , they 're not !", "Who? The baker's; no, they're not!"),
    ('See http : / / a.org and / or b', 'See http://a.org and/or b'),
    ('He wrote [ sic ] : no .', 'He wrote [sic]: no.'),
    ("She called it ' the end ' and left ..", "She called it 'the end' and left.."),
    ('A year - on year -- rise', 'A year - on year -- rise'),
    ('" One quote that stays open .', '"One quote that stays open.'),
  ],
)
def test_a_tokenised_sentence_is_written_as_people_do(tokenised, plain):
  assert corpora.detokenise(tokenised) == plain


@real_text
def test_real_sentences_lose_spaces_alone(tmp_path):
  file = next((DATA / 'lm1b').iterdir())
  lines = [line.strip() for line in file.read_text('utf-8').split('\n') if line.strip()]
  shorter = 0
  for line in lines:
    plain = corpora.detokenise(line)
    assert plain.replace(' ', '') == line.replace(' ', '')
    assert not plain.endswith((' .', ' ?', ' !'))
    shorter += len(plain) < len(line)
  assert shorter > 0.99 * len(lines)


# --- cutting ----------------------------------------------------------------------------------------------------------


class Letters:
  """A tokenizer whose tokens are the letters; blanks are none."""

  def encode_with_offsets(self, text):
    at = [i for i, letter in enumerate(text) if not letter.isspace()]
    return [ord(text[i]) for i in at], [(i, i + 1) for i in at]

  def encode(self, text):
    return self.encode_with_offsets(text)[0]


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
def test_a_long_text_is_cut_behind_a_sentence_else_a_word(whole, limit, pieces):
  assert [piece for piece, _ in text.pieces_of(whole, Letters(), limit)] == pieces


class Pairs:
  """A tokenizer whose tokens are pairs of letters in a text of more than 12, else single letters."""

  def encode_with_offsets(self, text):
    size = 2 if len(text) > 12 else 1
    spans = [(i, min(i + size, len(text))) for i in range(0, len(text), size)]
    return [ord(text[start]) for start, _ in spans], spans

  def encode(self, text):
    return self.encode_with_offsets(text)[0]


def test_a_piece_that_takes_more_tokens_alone_is_made_shorter():
  pieces = list(text.pieces_of('abcdefghijklmnopqrstuvwxyz', Pairs(), 5))
  assert [piece for piece, _ in pieces] == ['abcde', 'fghij', 'klmno', 'pqrst', 'uvwxy', 'z']
  assert [''.join(map(chr, ids)) for _, ids in pieces] == [piece for piece, _ in pieces]


def test_a_character_of_more_bytes_than_fit_does_not_hang(words):
  pieces = list(text.pieces_of('日本', words, 2))
  assert [piece for piece, _ in pieces] == ['日', '本'] and [len(ids) for _, ids in pieces] == [2, 2]


@pytest.fixture(scope='module')
def words():
  return tokenizer_lib.train_sentencepiece((line for s in stories(60, seed=7) for line in s.split('\n')), size=330)


def test_pieces_are_short_enough_and_lose_only_blanks(words):
  rng = np.random.default_rng(0)
  for _ in range(30):
    parts = stories(int(rng.integers(1, 12)), seed=int(rng.integers(99)))
    whole = ' '.join(parts).replace('. ', rng.choice(['. ', '  ', '日本 ']))
    limit = int(rng.integers(5, 60))
    pieces = list(text.pieces_of(whole, words, limit))
    assert all(0 < len(ids) <= limit for _, ids in pieces)
    assert bare(''.join(piece for piece, _ in pieces)) == bare(whole)
    for piece, ids in pieces:
      assert words.decode(ids) == piece or len(ids) == limit
      assert ids == words.encode(piece)[:limit]


def test_a_very_long_text_is_looked_at_a_window_at_a_time(words):
  whole = ' '.join(stories(60)) * 40
  seen = []

  class Watched:
    def encode(self, text):
      seen.append(len(text))
      return words.encode(text)

    def encode_with_offsets(self, text):
      return words.encode_with_offsets(text)

  pieces = list(text.pieces_of(whole, Watched(), 50))
  assert max(seen) <= 50 * text.WINDOW < len(whole)
  assert bare(''.join(piece for piece, _ in pieces)) == bare(whole)
  blanks = 'a' + ' ' * 99_999 + 'b'
  assert [piece.split() for piece, _ in text.pieces_of(blanks, Letters(), 1)] == [['a'], ['b']]


# --- the source -------------------------------------------------------------------------------------------------------


def test_an_example_is_cls_bos_and_the_text(corpus, cache):
  cfg = task(corpus, cache)
  words = text.tokenizer(cfg)
  for split, texts in (('train', stories(60)), ('validation', None)):
    source = text.source(cfg, split)
    assert not source.endless
    for i in range(len(source)):
      example = source[i]
      assert example['tokens'].dtype == np.int32 and example['tokens'][:2].tolist() == [CLS, BOS]
      assert example['fixed'].tolist() == [True, True] + [False] * (len(example['tokens']) - 2)
      assert words.decode(example['tokens']) == text.decode(example['tokens'], cfg) == source.text(i)
    if texts:
      assert sorted(all_of(source)) == sorted(texts)
  held = all_of(text.source(cfg, 'validation')) + all_of(text.source(cfg, 'test'))
  assert sorted(held) == sorted(stories(24, seed=1))
  assert text.source(cfg, 'train').counts == {
    'documents': 60, 'tokens': sum(len(words.encode(s)) for s in stories(60)), 'cut': 0, 'without_tokens': 0
  }  # fmt: skip


def test_what_is_cut_is_counted_and_left_out_or_kept(corpus, cache):
  words = text.tokenizer(task(corpus, cache))
  lengths = [len(words.encode(story)) for story in stories(60)]
  limit = int(np.median(lengths))
  too_long = sum(length > limit for length in lengths)
  for split_long_documents in (False, True):
    source = text.source(task(corpus, cache, length=limit + 2, split_long_documents=split_long_documents), 'train')
    assert source.counts['documents'] == 60 and source.counts['cut'] == too_long
    assert max(len(source[i]['tokens']) for i in range(len(source))) <= limit + 2
    found = sorted(all_of(source))
    assert all(any(one in story for story in stories(60)) for one in found)
    if split_long_documents:
      assert len(found) > 60
      assert sum(len(bare(one)) for one in found) == sum(len(bare(story)) for story in stories(60))
    else:
      assert len(found) == 60


def test_the_number_of_examples_may_be_limited(corpus, cache):
  everything = all_of(text.source(task(corpus, cache), 'train'))
  assert all_of(text.source(task(corpus, cache, num_train=7), 'train')) == everything[:7]
  assert len(text.source(task(corpus, cache, num_train=10_000), 'train')) == 60


def test_a_pickled_source_reads_the_same(corpus, cache):
  source = text.source(task(corpus, cache), 'train')
  assert all_of(pickle.loads(pickle.dumps(source))) == all_of(source)


def test_preparing_happens_once(corpus, cache, monkeypatch):
  cfg = task(corpus, cache)
  first = all_of(text.source(cfg, 'train'))
  monkeypatch.setattr(text, 'prepare', None)
  monkeypatch.setattr(tokenizer_lib, 'train_sentencepiece', None)
  monkeypatch.setattr(text, '_KNOWN', {})
  assert all_of(text.source(cfg, 'train')) == first


def test_processes_that_share_a_cache_prepare_once(corpus, tmp_path, monkeypatch):
  calls, wait, results = [], threading.Barrier(3), []
  prepare = text.prepare
  monkeypatch.setattr(text, 'prepare', lambda *args: calls.append(args[1]) or prepare(*args))
  cfg = task(corpus, tmp_path)
  text.tokenizer(cfg)

  def start():  # a lock belongs to an open file: threads wait for each other as processes do
    wait.wait()
    results.append(all_of(text.source(cfg, 'test')))

  threads = [threading.Thread(target=start) for _ in range(3)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert calls == ['test'] and len(results) == 3 and results[0] == results[1] == results[2]


def test_without_locks_the_first_of_several_is_kept(tmp_path, monkeypatch):
  def no_locks(*_):
    raise OSError(errno.ENOLCK, 'No locks available')

  monkeypatch.setattr(storage.fcntl, 'flock', no_locks)

  def make(folder):
    (folder / 'file').write_text('first')
    storage.once(tmp_path, 'place', lambda other: (other / 'file').write_text('second'))  # another is sooner

  assert (storage.once(tmp_path, 'place', make) / 'file').read_text() == 'second'
  assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ['place']


def contents(folder: pathlib.Path) -> dict[str, bytes]:
  files = [path for path in folder.rglob('*') if path.is_file()]
  return {str(path.relative_to(folder)): path.read_bytes() for path in files if path.name != 'dataset_info.json'}


def test_hosts_with_a_cache_each_make_identical_copies(corpus, tmp_path, monkeypatch):
  for name in ('a', 'b'):
    monkeypatch.setattr(text, '_KNOWN', {})
    for split in corpora.SPLITS:
      text.source(task(corpus, tmp_path / name), split)
  first, second = contents(tmp_path / 'a'), contents(tmp_path / 'b')
  assert first == second and sum('array_record' in name for name in first) == 3


def test_without_a_cache_the_examples_are_the_same(corpus, cache):
  assert all_of(text.source(task(corpus, ''), 'train')) == all_of(text.source(task(corpus, cache), 'train'))


def test_an_interrupted_preparation_leaves_nothing(corpus, tmp_path, monkeypatch):
  cfg = task(corpus, tmp_path)
  text.tokenizer(cfg)
  before = contents(tmp_path)

  def interrupted(*args):
    yield 'one', [7]
    raise KeyboardInterrupt

  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(text, 'prepare', interrupted)
    text.source(cfg, 'train')
  assert {name for name in contents(tmp_path).keys() - before.keys() if '.lock' not in name} == set()
  # ... and what a killed process could not tidy up is not kept
  name = next(path.name for path in tmp_path.glob('.text-train-*.lock')).removeprefix('.').removesuffix('.lock')
  killed = tmp_path / f'.{name}.part-1-2'
  (killed / 'documents').mkdir(parents=True)
  assert len(text.source(cfg, 'train')) == 60 and not killed.exists()


def test_a_damaged_preparation_is_said_in_one_line(corpus, tmp_path):
  cfg = task(corpus, tmp_path)
  assert len(text.source(cfg, 'train')) == 60
  (file,) = tmp_path.glob('text-train-*/**/*.array_record*')
  content = file.read_bytes()
  for damaged in (content[: len(content) // 2], content[:300] + b'\0' * 200 + content[500:], b''):
    file.write_bytes(damaged)
    with pytest.raises(UserError) as error:
      all_of(text.source(cfg, 'train'))
    one_line(error, str(next(tmp_path.glob('text-train-*'))), 'remove that folder', 'anew')
  full = config.get_config('small')
  full.task = cfg
  with pytest.raises(UserError) as error:  # ... also when a thread or a worker reads
    list(pipeline.train_batches(text.source(cfg, 'train'), lambda rng, example, *_: example, full, start=0, stop=1))
  one_line(error, 'remove that folder')
  file.unlink()
  with pytest.raises(UserError) as error:
    all_of(text.source(cfg, 'train'))
  one_line(error, 'remove that folder')


def test_documents_without_a_token_are_passed_over_and_said(tmp_path, cache):
  lines = [json.dumps({'text': t}) for t in [*stories(30), '', '\u200b \u200b']]
  (tmp_path / 'train.jsonl').write_text('\n'.join(lines))
  (tmp_path / 'valid.jsonl').write_text('\n'.join(json.dumps({'text': t}) for t in stories(9, seed=3)))
  vocab = ['[UNK]', *'abcdefghijklmnopqrstuvwxyz', *(f'##{c}' for c in 'abcdefghijklmnopqrstuvwxyz')]
  (tmp_path / 'vocab.model.txt').write_text('\n'.join(vocab))
  cfg = task(tmp_path, tmp_path / 'cache')
  cfg.tokenizer.path = str(tmp_path / 'vocab.model.txt')
  with logged() as lines:
    source = text.source(cfg, 'train')
  assert len(source) == 30 and source.counts['without_tokens'] == 2
  (line,) = [line for line in lines if 'without a token' in line]
  assert 'passed over 2 documents' in line and 'document 31 of' in line and 'train.jsonl' in line


def test_preparing_says_how_far_it_is(corpus, tmp_path, monkeypatch):
  monkeypatch.setattr(storage, 'REPORT_SECONDS', 0)
  with logged() as lines:
    text.source(task(corpus, tmp_path), 'train')
  lines = [line for line in lines if line.startswith('preparing text small, train: ')]
  assert max(int(line.split(': ')[1].split(' %')[0]) for line in lines) >= 95
  assert all(' documents, ' in line for line in lines)
  assert all(' a second' in line for line in lines) and any(line.endswith(' left') for line in lines)


# --- buckets ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def bucket(tmp_path, monkeypatch):
  """A folder that paths gs://bucket/... lead to."""
  folder = tmp_path / 'bucket'
  folder.mkdir()
  fake = types.SimpleNamespace(Path=lambda path: epath.Path(str(path).replace('gs://bucket', str(folder))))
  for module in (storage, corpora, text):
    monkeypatch.setattr(module, 'epath', fake)
  return folder


def test_a_cache_in_a_bucket_is_filled_once_and_copied(corpus, bucket, tmp_path, monkeypatch):
  shutil.copytree(corpus, bucket / 'corpus')
  cfg, found = task('gs://bucket/corpus', 'gs://bucket/cache'), []
  for machine in ('one', 'two', 'two'):
    monkeypatch.setattr(text, '_KNOWN', {})
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / machine))
    found.append(all_of(text.source(cfg, 'train')))
    monkeypatch.setattr(text, 'prepare', None)
    monkeypatch.setattr(tokenizer_lib, 'train_sentencepiece', None)
  assert sorted(found[0]) == sorted(stories(60)) and found[0] == found[1] == found[2]


def test_an_unfinished_copy_in_a_bucket_is_not_read(corpus, bucket, tmp_path, monkeypatch):
  cfg = task(corpus, 'gs://bucket/cache')
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'one'))
  first = all_of(text.source(cfg, 'train'))
  for marker in (bucket / 'cache').glob(f'*/{storage.WHOLE}'):
    marker.unlink()
  for file in (bucket / 'cache').rglob('*array_record*'):
    file.write_bytes(b'')
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'two'))
  assert all_of(text.source(cfg, 'train')) == first


# --- downloads --------------------------------------------------------------------------------------------------------


class Server(http.server.BaseHTTPRequestHandler):
  """Serves bytes, from an offset if asked; `cut` bytes are all that the first answer has."""

  files, cut, ranges = {}, None, []

  def do_GET(self):
    content = self.files.get(self.path)
    if content is None:
      return self.send_error(404)
    asked = self.headers.get('Range')
    self.ranges.append(asked)
    start = int(asked.removeprefix('bytes=').removesuffix('-')) if asked else 0
    if start >= len(content):
      self.send_response(416)
      self.send_header('Content-Range', f'bytes */{len(content)}')
      self.send_header('Last-Modified', 'Fri, 12 May 2023 18:31:07 GMT')
      self.send_header('Content-Length', '0')
      return self.end_headers()
    self.send_response(206 if asked else 200)
    self.send_header('Content-Length', str(len(content) - start))
    self.send_header('Last-Modified', 'Fri, 12 May 2023 18:31:07 GMT')
    self.end_headers()
    end, type(self).cut = self.cut, None
    self.wfile.write(content[start:end])

  def log_message(self, *_):
    pass


@pytest.fixture
def served(monkeypatch):
  """A server on this machine in the place of the corpora's own."""
  Server.files, Server.cut, Server.ranges = {}, None, []
  server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Server)
  thread = threading.Thread(target=server.serve_forever, daemon=True)
  thread.start()
  address = f'http://127.0.0.1:{server.server_address[1]}'
  monkeypatch.setattr(
    corpora, 'SOURCES',
    {name: tuple(f'{address}/{url.rpartition("/")[2]}' for url in urls) for name, urls in corpora.SOURCES.items()},
  )  # fmt: skip
  yield Server
  server.shutdown()
  server.server_close()


def archive(files: dict[str, str]) -> bytes:
  out = io.BytesIO()
  with tarfile.open(fileobj=out, mode='w:gz') as tar:
    for name, content in files.items():
      info = tarfile.TarInfo(f'{corpora.ARCHIVE}/{name}')
      info.size = len(content.encode())
      tar.addfile(info, io.BytesIO(content.encode()))
  return out.getvalue()


def test_an_interrupted_download_goes_on_where_it_ended(served, tmp_path, corpus):
  files = {'train': (corpus / 'my-train.txt').read_bytes(), 'valid': (corpus / 'my-valid.txt').read_bytes()}
  served.files = {f'/TinyStoriesV2-GPT4-{part}.txt': content for part, content in files.items()}
  served.cut = 1_000
  cfg = task('', tmp_path, source='tinystories')
  with pytest.raises(UserError) as error:
    text.source(cfg, 'train')
  one_line(error, 'the connection ended after 1,000 of', '--config.data.path')
  folder = tmp_path / 'downloads' / 'tinystories'
  assert [path.name for path in folder.glob('T*')] == ['TinyStoriesV2-GPT4-train.txt.part']
  assert sorted(all_of(text.source(cfg, 'train'))) == sorted(stories(60))
  assert served.ranges == [None, 'bytes=1000-', None]
  assert (folder / 'TinyStoriesV2-GPT4-train.txt').read_bytes() == files['train']
  served.files = {}
  assert len(text.source(cfg, 'validation')) > 0, 'nothing is downloaded twice'


def test_a_download_that_was_whole_is_not_fetched_again_and_has_the_date_of_the_server(served, tmp_path):
  served.files = {'/a': b'all of it'}
  url = corpora.SOURCES['tinystories'][0].rpartition('/')[0] + '/a'
  (tmp_path / 'a.part').write_bytes(b'all of it')
  storage.download(url, tmp_path / 'a')
  assert (tmp_path / 'a').read_bytes() == b'all of it' and served.ranges == ['bytes=9-']
  assert (tmp_path / 'a').stat().st_mtime == 1_683_916_267
  (tmp_path / 'b.part').write_bytes(b'something else, and longer')
  storage.download(url, tmp_path / 'b')
  assert (tmp_path / 'b').read_bytes() == b'all of it' and served.ranges[1:] == ['bytes=26-', None]
  assert (tmp_path / 'b').stat().st_mtime == 1_683_916_267


def test_the_shards_of_the_archive_are_read(served, tmp_path):
  def shards(pattern, first):
    return {pattern.format(n): ''.join(f"Odd 's goat , number {20 * n + i} , wasn 't sold .\n" for i in range(20))
            for n in range(first, first + 2)}  # fmt: skip

  training = shards('training-monolingual.tokenized.shuffled/news.en-0000{}-of-00100', 1)
  held_out = shards('heldout-monolingual.tokenized.shuffled/news.en.heldout-0000{}-of-00050', 5)
  served.files = {f'/{corpora.ARCHIVE}.tar.gz': archive(training | held_out)}
  cfg = lm1b_config.get_config('small').task
  cfg.cache, cfg.tokenizer.size = str(tmp_path), 300
  found = all_of(text.source(cfg, 'train'))
  assert sorted(found) == sorted(f"Odd's goat, number {i}, wasn't sold." for i in range(20, 60))
  rest = all_of(text.source(cfg, 'validation')) + all_of(text.source(cfg, 'test'))
  assert sorted(rest) == sorted(f"Odd's goat, number {i}, wasn't sold." for i in range(100, 140))
  # the archive as a path, and a damaged one
  file = next((tmp_path / 'downloads').rglob('*.tar.gz'))
  cfg.corpus, cfg.source = str(file), ''
  assert all_of(text.source(cfg, 'train')) == found
  cut = tmp_path / 'cut.tar.gz'
  cut.write_bytes(file.read_bytes()[:200])
  cfg.corpus = str(cut)
  with pytest.raises(UserError) as error:
    text.source(cfg, 'train')
  one_line(error, 'cut.tar.gz', 'damaged')


def test_without_a_network_it_is_said_what_to_put_where(served, tmp_path):
  with pytest.raises(UserError) as error:
    text.source(task('', tmp_path, source='tinystories'), 'train')
  one_line(
    error, 'TinyStoriesV2-GPT4-train.txt and TinyStoriesV2-GPT4-valid.txt', str(tmp_path / 'downloads' / 'tinystories'),
    '--config.data.path=PATH', 'Not Found',
  )  # fmt: skip
  with pytest.raises(UserError) as error:
    text.source(task('', '', source='tinystories'), 'train')
  one_line(error, 'data.path is empty', 'task.cache')
  with pytest.raises(UserError) as error:
    text.source(task('', tmp_path), 'train')
  one_line(error, 'data.path is empty', '--config.data.path=PATH')


# --- bad corpora ------------------------------------------------------------------------------------------------------


def test_a_corpus_that_is_not_there_or_holds_nothing_is_said_in_one_line(tmp_path, cache):
  with pytest.raises(UserError) as error:
    text.source(task(tmp_path / 'none', cache), 'train')
  one_line(error, str(tmp_path / 'none'), 'does not exist')
  (tmp_path / 'image.png').write_bytes(b'\x89')
  (tmp_path / 'empty.txt').write_bytes(b'')
  for path in (tmp_path, tmp_path / 'empty.txt'):
    with pytest.raises(UserError) as error:
      text.source(task(path, cache), 'train')
    one_line(error, str(path), 'holds no text')
  (tmp_path / 'empty.txt').write_text(' \n<|endoftext|>\n')
  with pytest.raises(UserError) as error:
    text.source(task(tmp_path, cache), 'train')
  one_line(error, 'the train split has no document')


def test_a_split_without_documents_is_said_in_one_line(tmp_path, cache):
  with pytest.raises(UserError) as error:
    text.source(task(write(tmp_path / 'two.txt', stories(2)), cache), 'validation')
  one_line(error, 'the validation split has no document', 'train and valid')


@pytest.mark.parametrize(
  ('changes', 'part'),
  [
    ({'length': 2}, 'task.length=2'),
    ({'documents': 'page'}, "task.documents='page'"),
    ({'source': 'wikipedia'}, "task.source='wikipedia'"),
  ],
)
def test_settings_that_mean_nothing_are_refused(corpus, cache, changes, part):
  with pytest.raises(UserError) as error:
    text.source(task(corpus, cache, **changes), 'train')
  one_line(error, part, 'expected')


def test_a_cache_that_cannot_be_written_is_said_in_one_line(corpus, tmp_path, monkeypatch):
  (tmp_path / 'file').write_text('')
  monkeypatch.setattr(text, '_KNOWN', {})
  with pytest.raises(UserError) as error:
    text.source(task(corpus, tmp_path / 'file'), 'test')
  one_line(error, 'task.cache', 'could not be written')


def test_a_disk_that_is_full_while_data_is_prepared_is_said_in_one_line(corpus, tmp_path, monkeypatch):
  cfg = task(corpus, tmp_path)
  text.tokenizer(cfg)

  def full(*_):
    raise RuntimeError('Failed to write: No space left on device')

  with monkeypatch.context() as patch, pytest.raises(UserError) as error:
    patch.setattr(array_record_module.ArrayRecordWriter, 'write', full)
    text.source(cfg, 'train')
  one_line(error, 'task.cache', 'No space left on device', 'make room')

  def odd(*_):
    yield 'one', [7]
    raise RecursionError('of what is written, not of the writer')

  monkeypatch.setattr(text, 'prepare', odd)
  with pytest.raises(RecursionError):
    text.source(cfg, 'train')


# --- the tokenizer of a run -------------------------------------------------------------------------------------------


def test_the_sample_for_training_is_uniform_and_decided_by_the_seed():
  settings = config.get_config('small').task.tokenizer
  settings.documents = 20
  texts = [str(i) for i in range(100)]
  drawn = text.draw(iter(texts), settings)
  assert len(set(drawn)) == 20 and drawn == sorted(drawn, key=int) == text.draw(iter(texts), settings)
  counts = np.zeros(100)
  for seed in range(300):
    settings.seed = seed
    counts[[int(one) for one in text.draw(iter(texts), settings)]] += 1
  assert counts.sum() == 6_000 and counts.min() > 30 and counts.max() < 95
  settings.documents = 1_000
  assert text.draw(iter(texts), settings) == texts


def test_names_of_special_tokens_in_a_text_are_characters(tmp_path, corpus, cache):
  cfg = task(corpus, cache)
  whole = 'Mara said [CLS] and [MASK], then <|endoftext|>.'
  ids = text.encode_prompt(whole, cfg)
  assert ids[:2] == [CLS, BOS] and min(ids[2:]) >= 7
  assert text.decode(ids, cfg) == whole
  assert text.encode_prompt('', cfg) == [CLS, BOS]


# --- runs -------------------------------------------------------------------------------------------------------------


def run_config(path, cache, **changes):
  cfg = config.get_config('small')
  settings = {
    **{'data.path': str(path), 'task.cache': str(cache), 'task.length': 64, 'task.tokenizer.size': 330},
    **{'task.num_validation': 8, 'task.num_test': 8, 'steps': 4, 'log_every': 1, 'keep': 1},
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
def programs(tmp_path_factory):
  with small.kept_programs(tmp_path_factory.mktemp('programs')):
    yield


@pytest.fixture
def one_device(monkeypatch):
  monkeypatch.setattr(sharding, 'make_mesh', lambda *_: small.mesh())


@pytest.fixture(scope='module')
def trained(corpus, cache, tmp_path_factory):
  """A run of an insertion model; its corpus and its cache are copies that tests may move."""
  folder = tmp_path_factory.mktemp('run')
  shutil.copytree(corpus, folder / 'corpus', copy_function=shutil.copy2)
  workdir = folder / 'work'
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sharding, 'make_mesh', lambda *_: small.mesh())
    assert loop.train(run_config(folder / 'corpus', folder / 'cache'), workdir) == loop.FINISHED
  return folder


def copy_of(trained, tmp_path) -> pathlib.Path:
  return pathlib.Path(shutil.copytree(trained / 'work', tmp_path / 'work', copy_function=shutil.copy2))


def test_a_run_measures_the_loss_and_shows_texts(trained, capsys):
  result = json.loads((trained / 'work' / 'eval.json').read_text())
  assert result['chance'] is None and result['finished'] and 'exact_match' not in result['metrics']
  assert set(result['pairs']) >= {'stopped', 'length'} and result['pairs']['length'][1] == 2
  scalars = logs.read_scalars(trained / 'work')
  assert [step for step, _ in scalars['validation/loss']] == [2, 4]
  events = [e for path in sorted((trained / 'work').glob('events*')) for e, _ in logs.read_records(path)]
  shown = [v.tensor.string_val[0].decode() for e in events for v in e.summary.value if 'samples' in v.tag]
  assert len(shown) == 2 and all(one.count(' tokens, ') == 2 and 'after 3 of 6 steps' in one for one in shown)


@pytest.mark.parametrize('number, kind', [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)])
def test_a_signal_while_data_is_prepared_ends_a_run_at_once(corpus, tmp_path, one_device, monkeypatch, number, kind):
  cfg, prepare, calls = run_config(corpus, tmp_path / 'cache'), text.prepare, []

  def signalled(*args):
    calls.append(args[1])
    yield from itertools.islice(prepare(*args), 3)
    os.kill(os.getpid(), number)
    yield from prepare(*args)

  with monkeypatch.context() as patch, pytest.raises(kind) as error:
    patch.setattr(text, 'prepare', signalled)
    loop.train(cfg, tmp_path / 'work')
  assert len(calls) == 1 and not list((tmp_path / 'cache').glob('text-*'))
  assert kind is KeyboardInterrupt or error.value.code == loop.PREEMPTED
  assert loop.train(cfg, tmp_path / 'work') == loop.FINISHED


def test_the_best_checkpoint_is_the_one_of_least_loss(corpus, cache, tmp_path, one_device, monkeypatch):
  losses = iter([3.0, 1.0, 2.0, 1.5])
  plan = lambda self, params, split='validation': {'loss': (next(losses), 1.0)}  # noqa: E731
  monkeypatch.setattr(evaluate.Evaluator, 'validation_loss', plan)
  loop.train(run_config(corpus, cache, steps=6), tmp_path)
  assert logs.read_scalars(tmp_path)['validation/loss'] == [(2, 3.0), (4, 1.0), (6, 2.0)]
  assert json.loads((tmp_path / 'eval.json').read_text())['step'] == 4
  saved = checkpoint.Checkpoints(tmp_path, metric='loss', mode='min', read_only=True)
  assert saved.find('best') == 4 and saved.steps() == [4, 6]


def test_a_run_stops_when_its_loss_is_reached(corpus, cache, tmp_path, one_device):
  cfg = run_config(corpus, cache, stop_at=100.0)
  assert loop.train(cfg, tmp_path) == loop.FINISHED
  result = json.loads((tmp_path / 'eval.json').read_text())
  assert result['step'] == 2 and result['finished']


@pytest.mark.parametrize('family', ['arm', 'it', 'mdm'])
def test_every_family_measures_and_writes_text(corpus, cache, one_device, family):
  cfg = run_config(corpus, cache, **{'family': family, 'data.rows': 16, 'eval.samples': 1})
  exp = experiment.build(cfg)
  evaluator = evaluate.Evaluator(cfg, **{k: v for k, v in exp._asdict().items() if k != 'cfg'})
  params = transformer.unbox(transformer.init(exp.model_cfg, small.jax.random.key(0)))
  total, weight = evaluator.validation_loss(params)['loss']
  assert 0.5 < total / weight / np.log(330) < 3, 'about as unlikely as chance'
  scores = evaluator.answers(params, 'validation')
  assert scores.pairs['length'][0] > 0 and ' tokens, ' in scores.texts[0]
  (batch,) = pipeline.train_batches(exp.task.source(cfg.task, 'train'), exp.family.corrupt, cfg, start=0, stop=1)
  assert (batch['example_id_BxS'] >= 0).sum() == 8, 'everything fits'


def test_a_run_goes_on_to_the_bit(trained, tmp_path, one_device):
  def cfg(steps):
    return run_config(trained / 'corpus', trained / 'cache', steps=steps)

  loop.train(cfg(2), tmp_path / 'cut')
  loop.train(cfg(4), tmp_path / 'cut')
  whole, cut = (ilm_jax.load(path, 4, batch_size=1) for path in (trained / 'work', tmp_path / 'cut'))
  flat = [small.jax.tree_util.tree_leaves(lm.params) for lm in (whole, cut)]
  for a, b in zip(*flat, strict=True):
    np.testing.assert_array_equal(a, b)


def test_a_run_carries_its_tokenizer(trained, tmp_path, monkeypatch, one_device):
  work = copy_of(trained, tmp_path)
  expected = text.tokenizer(run_config(trained / 'corpus', trained / 'cache').task)
  run = json.loads((work / 'run.json').read_text())
  assert run['config']['task']['tokenizer']['fingerprint'] == expected.fingerprint
  assert tokenizer_lib.load(work / 'tokenizer').files() == expected.files()
  # Nothing else of what it was made from is needed to write ...
  monkeypatch.setattr(text, '_KNOWN', {})
  monkeypatch.setattr(text, 'corpus_of', None)
  lm = ilm_jax.load(work, batch_size=2)
  assert lm.tokenizer.fingerprint == expected.fingerprint
  story = stories(1)[0]
  answers = lm.generate([story[:40], ''])
  assert answers[0].text.startswith(story[:40]) and len(answers[1].tokens) > 2
  with pytest.raises(UserError) as error:
    lm.generate([story * 9])
  one_line(error, 'prompt 1 is too long', 'sampling.max_length=64')


def test_a_run_whose_corpus_and_cache_have_moved_goes_on(trained, tmp_path, monkeypatch, one_device):
  work = copy_of(trained, tmp_path)
  shutil.copytree(trained / 'corpus', tmp_path / 'elsewhere', copy_function=shutil.copy2)
  monkeypatch.setattr(text, '_KNOWN', {})
  monkeypatch.setattr(tokenizer_lib, 'train_sentencepiece', None)
  cfg = run_config(tmp_path / 'elsewhere', tmp_path / 'cache', **{'task.tokenizer.path': str(tmp_path / 'gone.model')})
  assert loop.evaluate_run(cfg, work) == loop.FINISHED
  cfg = run_config(tmp_path / 'elsewhere', tmp_path / 'cache', steps=5)
  assert loop.train(cfg, work) == loop.FINISHED
  assert 5 in checkpoint.Checkpoints(work, read_only=True).steps()


def test_another_tokenizer_than_the_runs_is_refused(trained, words, tmp_path, monkeypatch, one_device):
  work = copy_of(trained, tmp_path)
  words.save(tmp_path / 'other')
  own = tokenizer_lib.load(work / 'tokenizer').fingerprint
  with pytest.raises(UserError) as error:
    loop.train(run_config(trained / 'corpus', tmp_path, **{'task.tokenizer.path': str(tmp_path / 'other')}), work)
  one_line(error, str(tmp_path / 'other'), words.fingerprint, own, 'another --workdir')
  with pytest.raises(UserError) as error:
    loop.train(run_config(trained / 'corpus', tmp_path, **{'task.tokenizer.size': 331}), work)
  one_line(error, 'task.tokenizer.size=330', 'nothing was overwritten')
  # its own one was replaced, or is gone
  shutil.rmtree(work / 'tokenizer')
  shutil.copytree(tmp_path / 'other', work / 'tokenizer')
  with pytest.raises(UserError) as error:
    ilm_jax.load(work)
  one_line(error, str(work / 'tokenizer'), words.fingerprint, own)
  with pytest.raises(UserError) as error:
    loop.evaluate_run(run_config(trained / 'corpus', tmp_path), work)
  one_line(error, 'task.tokenizer.fingerprint', own)
  shutil.rmtree(work / 'tokenizer')
  monkeypatch.setattr(text, '_KNOWN', {})
  monkeypatch.setattr(text, 'corpus_of', lambda cfg: corpora.find(str(tmp_path / 'gone')))
  with pytest.raises(UserError) as error:
    ilm_jax.load(work)
  one_line(error, f'there is no tokenizer in {work / "tokenizer"}')


def test_weights_of_another_tokenizer_are_no_start(trained, words, tmp_path, one_device):
  words.save(tmp_path / 'other')
  changes = {'init_from': str(trained / 'work'), 'task.tokenizer.path': str(tmp_path / 'other')}
  with pytest.raises(UserError) as error:
    loop.train(run_config(trained / 'corpus', tmp_path, **changes), tmp_path / 'new')
  one_line(error, words.fingerprint, f'--config.task.tokenizer.path={trained / "work" / "tokenizer"}')
  changes['task.tokenizer.path'] = str(trained / 'work' / 'tokenizer')
  assert loop.train(run_config(trained / 'corpus', tmp_path, steps=1, **changes), tmp_path / 'new') == loop.FINISHED


def test_exact_match_is_refused_for_text(corpus, cache):
  with pytest.raises(UserError) as error:
    experiment.build(run_config(corpus, cache, **{'eval.metric': 'exact_match', 'eval.mode': 'max'}))
  one_line(error, 'no right answers', 'eval.metric=loss')


# --- configs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('module', [config, tinystories_config, lm1b_config])
@pytest.mark.parametrize('name', config.NAMES)
def test_the_configs_agree_with_themselves(module, name):
  cfg = module.get_config(name)
  assert cfg.sampling.max_length == cfg.corrupt.length == text.longest(cfg.task) <= cfg.data.row_length
  assert (cfg.eval.metric, cfg.eval.mode) == ('loss', 'min')
  with pytest.raises(ValueError, match='expected one of small, full'):
    module.get_config('tiny')


def test_the_path_and_the_length_are_given_once(monkeypatch):
  argv = [f'--config={ROOT}/configs/tinystories.py:small', '--config.data.path=/some/where', '--config.task.length=99']
  monkeypatch.setattr(sys, 'argv', ['main', *argv])  # which the flags of a config look at
  values = flags.FlagValues()
  config_flags.DEFINE_config_file('config', None, flag_values=values)
  values(sys.argv)
  cfg = values.config
  assert cfg.task.corpus == '/some/where' and run_file.as_json(cfg)['task']['corpus'] == '/some/where'
  assert cfg.sampling.max_length == cfg.corrupt.length == 99


@real_text
@pytest.mark.parametrize(('module', 'name'), [(tinystories_config, 'tinystories'), (lm1b_config, 'lm1b')])
def test_real_text_is_prepared_and_survives_the_tokenizer(module, name, tmp_path):
  shutil.copytree(DATA / name, tmp_path / 'corpus')
  for file in (tmp_path / 'corpus').iterdir():  # the beginning of each
    file.write_bytes(b''.join(file.read_bytes().splitlines(keepends=True)[:3_000]))
  cfg = module.get_config('small')
  cfg.task.update({'corpus': str(tmp_path / 'corpus'), 'cache': str(tmp_path / 'cache')})
  cfg.task.tokenizer.size = 1_000
  for split in corpora.SPLITS:
    source = text.source(cfg.task, split)
    for i in range(min(50, len(source))):
      assert text.decode(source[i]['tokens'], cfg.task) == source.text(i)
