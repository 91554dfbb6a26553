"""Tests of text corpora: the split of each file and document, where documents end, and errors for invalid files."""

import hashlib
import itertools
import json
import pwd

import pytest
from text_helpers import DATA, needs_real_text, refused, stories, write

from ilm_jax.tasks.text import corpora

HELD_OUT = ('validation', 'test')


# --- files and their splits -------------------------------------------------------------------------------------------


def find(tmp_path, *names):
  """Create a corpus of files with these names; return {split: names of its files} and the corpus's `shared` table."""
  for name in names:
    file = tmp_path / 'folder' / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text('one\n')
  corpus = corpora.find(str(tmp_path / 'folder'))
  return {split: [file.name for file in files] for split, files in corpus.files.items()}, corpus.shared


LM1B_TRAIN, LM1B_HELD_OUT = (
  [f'{corpora.ARCHIVE}/{folder}.tokenized.shuffled/news.en{suffix}-0000{i}-of-00{count}' for i in (1, 2)]
  for folder, suffix, count in (('training-monolingual', '', 100), ('heldout-monolingual', '.heldout', '050'))
)


@pytest.mark.parametrize(
  ('train', 'held_out'),
  [
    (['TinyStoriesV2-GPT4-train.txt'], ['TinyStoriesV2-GPT4-valid.txt']),
    (LM1B_TRAIN, LM1B_HELD_OUT),
    *((['train.txt'], [name]) for name in ('held_out.txt', 'held-out.txt', 'heldout.txt', 'eval.txt', 'my_val.txt')),
    (['a.TRAIN.tokens', 'b-train.jsonl'], ['VALID.txt']),
  ],
)
def test_file_or_folder_names_mark_training_and_held_out_files(tmp_path, train, held_out):
  files, shared = find(tmp_path, *train, *held_out, 'README', 'notes.md', 'retrieval-notes.txt')
  assert files == {'train': train, 'validation': held_out, 'test': held_out}
  assert shared == dict.fromkeys(HELD_OUT, HELD_OUT)


def test_files_with_test_in_their_name_become_the_test_split(tmp_path):
  files, shared = find(tmp_path, 'a.train.jsonl', 'a.dev.jsonl', 'a.test.jsonl', 'latest-notes.txt')
  assert files == {'train': ['a.train.jsonl'], 'validation': ['a.dev.jsonl'], 'test': ['a.test.jsonl']}
  assert not shared


@pytest.mark.parametrize('names', [['heldout_s10-11.dev.tokens'], ['a.txt', 'b.txt'], ['later.txt', 'train.txt']])
def test_unless_names_mark_training_and_held_out_files_all_splits_share_all_files(tmp_path, caplog, names):
  files, shared = find(tmp_path, *names)
  assert files == dict.fromkeys(corpora.SPLITS, names)
  assert shared == dict.fromkeys(corpora.SPLITS, corpora.SPLITS)
  warned = '(later.txt, train.txt) do not mark both' in caplog.text
  assert warned == ('train.txt' in names), 'a warning is expected if names mark only training files'


def test_a_cache_folder_inside_the_corpus_folder_is_ignored(tmp_path):
  (tmp_path / 'a.txt').write_text('the dog ran')
  for name, mark in (('data/1.0.0', 'dataset_info.json'), ('words', 'ilm_tokenizer.json')):
    folder = tmp_path / name
    folder.mkdir(parents=True)
    (folder / mark).write_text('{}')
    (folder / 'x-00000-of-00001').write_bytes(b'\xff')
    (folder / 'vocab.txt').write_text('the')
  assert [file.name for file in corpora.find(str(tmp_path)).files['train']] == ['a.txt']


def test_a_file_whose_owner_has_no_user_name_can_be_read(tmp_path, monkeypatch):
  monkeypatch.setattr(pwd, 'getpwuid', lambda uid: {}[f'uid not found: {uid}'])  # simulates an owner id without a name
  path = write(tmp_path / 'a.txt', stories(3))
  (file,) = corpora.find(str(path)).files['train']
  assert file.size == path.stat().st_size


def documents_of(corpus, split):
  return [text for _, text in corpora.documents(corpus, split, 'endoftext')]


def test_the_hash_assigns_each_document_to_one_split(tmp_path):
  texts = stories(3_000)
  corpus = corpora.find(str(write(tmp_path / 'all.txt', [*texts, *texts[:100]])))
  splits = {split: documents_of(corpus, split) for split in corpora.SPLITS}
  assert sorted(itertools.chain(*splits.values())) == sorted([*texts, *texts[:100]])
  assert 0.935 < len(splits['train']) / 3_100 < 0.965
  assert 40 < len(splits['validation']) < 115 and 40 < len(splits['test']) < 115
  for split, documents in splits.items():
    for document in documents:
      bucket = int(hashlib.blake2b(document.encode(), digest_size=8).hexdigest(), 16) % 40
      assert {0: 'validation', 1: 'test'}.get(bucket, 'train') == split


def test_the_hash_divides_held_out_documents_into_halves(tmp_path):
  texts = stories(400)
  write(tmp_path / 'train.txt', stories(10, seed=2))
  write(tmp_path / 'valid.txt', texts)
  halves = [documents_of(corpora.find(str(tmp_path)), split) for split in HELD_OUT]
  assert sorted(itertools.chain(*halves)) == sorted(texts)
  assert 150 < len(halves[0]) < 250


# --- documents --------------------------------------------------------------------------------------------------------


def read(tmp_path, content, mode='endoftext', name='all.txt') -> list[str]:
  """Write `content` to a corpus file; return the documents read from it."""
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
def test_the_documents_mode_determines_where_documents_end(tmp_path, content, mode, expected):
  assert read(tmp_path, content, mode) == expected


def test_each_json_line_holds_one_document(tmp_path):
  lines = [{'text': 'one\ntwo', 'id': 3}, {'text': '<|endoftext|>'}, {'text': ' é '}, {'text': ''}]
  content = '\n'.join([json.dumps(lines[0]), '', *map(json.dumps, lines[1:])])
  assert read(tmp_path, content, name='all.jsonl') == ['one\ntwo', '<|endoftext|>', 'é', '']


@pytest.mark.parametrize(
  'line',
  ['{"text": 3}', '{"txt": "a"}', '["text"]', 'text', '{"text": "a"', 'null', '{"text": "\\ud800"}', '[' * 9_999],
)
def test_the_error_for_an_invalid_json_line_names_the_line(tmp_path, line):
  with refused('all.jsonl, line 3', '"text"'):
    read(tmp_path, f'{{"text": "fine"}}\n\n{line}\n', name='all.jsonl')


@pytest.mark.parametrize(('name', 'end'), [('all.txt', '\n'), ('all.txt', '\r\n'), ('all.jsonl', '\r\n')])
def test_the_error_for_invalid_utf8_names_the_byte_and_its_offset(tmp_path, name, end):
  content = end.join(['{"text": "é"}', '{"text": "é"}', '{"text": "']).encode() + b'\xff'
  with refused(name, f'not UTF-8: byte {len(content) - 1} is 0xff'):
    read(tmp_path, content, name=name)


@pytest.mark.parametrize(
  ('tokenized', 'plain'),
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
def test_detokenization_removes_the_extra_spaces_of_lm1b(tokenized, plain):
  assert corpora.detokenize(tokenized) == plain


@needs_real_text
def test_detokenization_of_real_sentences_removes_only_spaces():
  file = next((DATA / 'lm1b').iterdir())
  lines = [line.strip() for line in file.read_text('utf-8').split('\n') if line.strip()]
  shorter = 0
  for line in lines:
    plain = corpora.detokenize(line)
    assert plain.replace(' ', '') == line.replace(' ', '')
    assert not plain.endswith((' .', ' ?', ' !'))
    shorter += len(plain) < len(line)
  assert shorter > 0.99 * len(lines)
